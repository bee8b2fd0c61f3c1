"""The CUDA kernels against PyTorch in float64: on the CPU through cuda_emulator.h, and on a GPU where there is one.

    pytest tests/test_cuda_emulator.py

Without a GPU, g++ compiles scan_cuda.cu under the address and undefined-behaviour sanitizers, and a second process, in
which the sanitizers' libraries are loaded first, runs every case in three orders of the threads and asks for equal
bits. What that cannot show (speed, and what nvcc makes of the code) is left to the compiler below, and to a GPU.
"""
import contextlib
import ctypes
import itertools
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import traceback

import pytest
import torch
import torch.nn.functional as F

HERE = pathlib.Path(__file__).resolve().parent
SOURCE, BINDING, EMULATOR = HERE.parent / "scan_cuda.cu", HERE.parent / "scan_cuda.cpp", HERE / "cuda_emulator.h"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CONV_POOL, EXPAND_GATE, SCAN = range(3)


# ---- the library under test: called with tensors, None and integers

class Emulated:
    """The library that g++ made, called by ctypes. Each call runs in three orders, which must agree in every bit."""
    device = "cpu"

    def __init__(self, path):
        self.library = ctypes.CDLL(path)

    def __call__(self, name, inputs, outputs):
        arguments, outputs = (*inputs, *outputs), [t for t in outputs if t is not None]
        initial = [t.clone() for t in outputs]
        converted = [ctypes.c_int64(a) if isinstance(a, int) else
                     ctypes.c_void_p(a.data_ptr() if a is not None else None) for a in arguments]
        results = []
        for order in range(3):
            for t, like in zip(outputs, initial):
                t.copy_(like)
            self.library.emulator_order(order, 5)
            assert getattr(self.library, name)(*converted, None) == 0
            results.append([t.clone().view(torch.uint8) for t in outputs])
        for result in results[1:]:
            for i, (a, b) in enumerate(zip(results[0], result)):
                assert torch.equal(a, b), f"{name}: output {i} depends on the order of the threads"

    def set_rung(self, kernel, rung):
        self.library.set_rung(ctypes.c_int64(kernel), ctypes.c_int64(rung))


class Extension:
    """The extension that torch built, on a GPU. Each call runs twice, with equal bits."""
    device = "cuda"

    def __init__(self, module):
        self.module, self.set_rung = module, module.set_rung

    def __call__(self, name, inputs, outputs):
        arguments, outputs = (*inputs, *outputs), [t for t in outputs if t is not None]
        initial = [t.clone() for t in outputs]
        getattr(self.module, name)(*arguments)
        first = [t.clone() for t in outputs]
        for t, like in zip(outputs, initial):
            t.copy_(like)
        getattr(self.module, name)(*arguments)
        for a, b in zip(first, outputs):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"{name}: the second call gave other bits"


def out(*shape, dtype=torch.float32):
    """An output, full of what no kernel writes."""
    return torch.full(shape, torch.nan if dtype.is_floating_point else -9, dtype=dtype)


@contextlib.contextmanager
def rung(ops, kernel, number):
    ops.set_rung(kernel, number)
    try:
        yield
    finally:
        ops.set_rung(kernel, 0)


def assert_near(actual, expected, tolerance, name):
    """Largest error relative to the largest value."""
    assert actual.shape == expected.shape, name
    assert actual.isfinite().all(), f"{name}: not finite"
    error = (actual.double() - expected).abs().max() if actual.numel() else 0
    scale = max(float(expected.abs().max()), 1e-2) if actual.numel() else 1
    assert error <= tolerance * scale, f"{name}: error {error / scale:.1e}"


def tolerance(dtype):
    return 1e-2 if dtype != torch.float32 else 1e-5


def random(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype)


# ---- walks: name -> token, group, weight (Bt S), steps

def make_walk(token, group, steps, weight=None):
    key = group.masked_fill(group < 0, steps)
    key, member = key.sort(dim=1, stable=True)
    start = torch.searchsorted(key, torch.arange(steps + 1).repeat(len(key), 1))
    member = torch.where(key < steps, member, -10 ** 6)         # the tail is unspecified: whoever reads it, falls
    weight = torch.rand(group.shape) + 0.5 if weight is None else weight
    return token.int(), group.int(), weight.float(), member.int(), start.int(), steps


def runs(P, w):                                                 # FastVim; w = 1: Vim
    group = torch.arange(P).repeat_interleave(w)[None]
    return make_walk(torch.randperm(P * w)[None], group, P)


def strided(P, length, outer=1):                                # h w c pooling w; outer = 1: 2-D pooling to c
    group = torch.arange(outer)[:, None, None] * P + torch.arange(P).expand(outer, length, P)
    return make_walk(torch.randperm(group.numel())[None], group.reshape(1, -1), outer * P)


def ragged(B, S, P):
    """Per image: groups of any length, some empty, a class token's group of one, padding at the end."""
    token = torch.stack([torch.randperm(S) for _ in range(B)])
    group = torch.randint(0, P, (B, S)).sort(1).values
    group[:, group.shape[1] // 2:] += (group[:, group.shape[1] // 2:] < P - 1).long()
    for b in range(B):
        group[b, S - 2 * b:] = -1
    if B > 2:
        group[2] = -1                                           # an image without tokens
    return make_walk(token, group, P)


WALKS = {
    "fastvim": lambda: runs(5, 7), "fastvim_long": lambda: runs(3, 130), "vim": lambda: runs(37, 1),
    "one": lambda: runs(1, 1), "two": lambda: runs(2, 1), "three": lambda: runs(1, 3), "five": lambda: runs(1, 5),
    "channels": lambda: strided(3, 5, 4), "two_d": lambda: strided(2, 70), "ragged": lambda: ragged(3, 21, 6),
    "empty_groups": lambda: ragged(2, 4, 30),
}


# ---- the references, in float64 with autograd

def conv_silu_reference(x, conv_w, conv_b, walk):
    """x (B S E) in slot order -> c (2 B S E) by positions."""
    token, group = walk[0].long(), walk[1]
    B, S, E = x.shape
    x = x.gather(1, token.expand(B, S)[..., None].expand(B, S, E))
    x = torch.where((group < 0)[..., None], 0.0, x)
    back, ahead = F.pad(x, (0, 0, 3, 0)), F.pad(x, (0, 0, 0, 3))
    a0 = conv_b[0] + sum(conv_w[0, :, 3 - j] * back[:, 3 - j:3 - j + S] for j in range(4))
    a1 = conv_b[1] + sum(conv_w[1, :, 3 - j] * ahead[:, j:j + S] for j in range(4))
    return F.silu(torch.stack([a0, a1]))


def pool_reference(c, walk):
    group, weight, P = walk[1].long(), walk[2].double(), walk[5]
    _, B, S, E = c.shape
    real = (group >= 0)[..., None]
    index = group.clamp(min=0).expand(B, S)[None, ..., None].expand(2, B, S, E)
    return torch.zeros(2, B, P, E, dtype=c.dtype).scatter_add(2, index, torch.where(real, weight[..., None] * c, 0.0))


def scan_reference(x, dt, A, Bm, Cm, D, bias):
    K, B, P, E = x.shape
    delta = F.softplus(dt if bias is None else dt + bias[:, None, None])
    rows = []
    for k in range(K):
        h, s = torch.zeros(B, E, A.shape[-1], dtype=x.dtype), [None] * P
        for t in range(P)[::-1 if k else 1]:
            h = torch.exp(delta[k, :, t, :, None] * A[k]) * h + (delta * x)[k, :, t, :, None] * Bm[k, :, t, None]
            s[t] = (h * Cm[k, :, t, None]).sum(-1)
        rows.append(torch.stack(s, 1))
    return torch.stack(rows) + (0 if D is None else D[:, None, None] * x)


def norm_reference(v, weight, bias):
    if weight is None:
        return v
    shape = weight.shape
    return F.rms_norm(v, shape, weight, 1e-5) if bias is None else F.layer_norm(v, shape, weight, bias, 1e-5)


def leaf(t):
    return None if t is None else t.double().requires_grad_()


# ---- the cases: functions of the library

def call(ops, name, inputs, outputs):
    """Everything onto the library's device, then name(*inputs, *outputs); -> the outputs, on the CPU."""
    def move(values):
        return [v.to(ops.device) if isinstance(v, torch.Tensor) else v for v in values]
    outputs = move(outputs)
    ops(name, move(inputs), outputs)
    return [t.cpu() if t is not None else None for t in outputs]


def check_block(ops, walk, B, E, dtype, rungs=(0,), expand_rungs=(0,), maximum=False, skip=True, norm="layer",
                with_y=True):
    """conv_pool and expand_gate, forward and backward."""
    torch.manual_seed(0)
    walk = WALKS[walk]() if isinstance(walk, str) else walk()
    token, group, weight, member, start, P = walk
    (Bt, S), code, tol = group.shape, DTYPES.index(dtype), tolerance(dtype)
    B = Bt if Bt > 1 else B
    xz = random(B, S, 2 * E, dtype=dtype)
    for b in range(B):                                          # padding may hold anything
        xz[b, token[b % Bt][group[b % Bt] < 0].long()] = torch.nan
    clean = xz.double().nan_to_num(0)
    conv_w, conv_b = random(2, E, 4, scale=0.5), random(2, E, scale=0.5)
    D = random(2, E) if skip else None
    norm_w, norm_b = (random(E) + 1 if norm else None), (random(E) if norm == "layer" else None)
    s, dp = random(2, B, P, E), random(2, B, P, E)
    dy, g = random(B, S, E, dtype=dtype), random(B, S, E, dtype=dtype)
    sizes = (code, B, S, P, E, Bt)
    real = (group >= 0)[..., None]                              # (Bt S 1) by position
    slots = torch.empty(B, S, dtype=torch.long).scatter_(1, token.long().expand(B, S), torch.arange(S).expand(B, S))
    slot_real = real.expand(B, S, 1).gather(1, slots[..., None])

    def by_slot(v):                                             # positions -> slots
        return v.gather(1, slots[..., None].expand(v.shape))

    def by_position(v):
        return v.gather(1, token.long().expand(B, S)[..., None].expand(v.shape))

    # forward: p
    c = conv_silu_reference(clean[..., :E], conv_w.double(), conv_b.double(), walk)
    for number in rungs:
        with rung(ops, CONV_POOL, number):
            argmax = out(2, B, P, E, dtype=torch.int32) if maximum else None
            p, argmax = call(ops, "conv_pool", (*sizes, int(maximum), xz, conv_w, conv_b, *walk[:5]),
                             (out(2, B, P, E), argmax))
        if not maximum:
            assert_near(p, pool_reference(c, walk), tol, f"p, rung {number}")
        else:
            for b, q in itertools.product(range(B), range(P)):
                mine = (group[b % Bt] == q).nonzero()[:, 0]
                if len(mine) == 0:
                    assert (argmax[:, b, q] == -1).all() and (p[:, b, q] == 0).all()
                    continue
                assert_near(p[:, b, q], c[:, b, mine].max(1).values, tol, f"max, rung {number}")
                assert torch.isin(argmax[:, b, q], mine.int()).all()
                chosen = c[:, b].gather(1, argmax[:, b, q, None].long())[:, 0]
                assert_near(chosen, c[:, b, mine].max(1).values, tol, "argmax")

    # backward: dx and the convolution's parameters
    x_, w_, b_, D_ = map(leaf, (clean[..., :E], conv_w, conv_b, D))
    c_ = conv_silu_reference(x_, w_, b_, walk)
    if maximum:
        index = argmax.long().clamp(min=0)
        picked = torch.where(argmax >= 0, c_.gather(2, index), 0.0)
    else:
        picked = pool_reference(c_, walk)
    loss = (picked * dp.double()).sum()
    if skip:
        loss = loss + (torch.where(real, (D_[:, None, None] * c_).sum(0), 0.0) * by_position(g.double())).sum()
    expected = torch.autograd.grad(loss, [x_, w_, b_] + ([D_] if skip else []))
    for number in rungs:
        with rung(ops, CONV_POOL, number):
            dxz = torch.full_like(xz, 7)                        # the other half must stay as it is
            results = call(ops, "conv_pool_backward",
                           (*sizes, int(maximum), xz, conv_w, conv_b, D, *walk[:5], argmax, dp, g),
                           (dxz, out(2, E, 4), out(2, E), out(2, E) if skip else None))
        assert (results[0][..., E:] == 7).all(), "the z half of dxz is not conv_pool_backward's"
        assert (results[0][..., :E][~slot_real.expand(B, S, E)] == 0).all(), "padding has a gradient"
        for name, a, e in zip(["dx", "dconv_w", "dconv_b", "dD"], [results[0][..., :E], *results[1:]], expected):
            assert_near(a, e, tol, name)

    # y, and its gradients
    z_, s_, nw_, nb_ = map(leaf, (clean[..., E:], s, norm_w, norm_b))
    index = group.long().clamp(min=0).expand(B, S)[..., None].expand(B, S, E)
    summed = sum(s_[k].gather(1, index) for k in range(2)).detach()
    if skip:
        summed = summed + (D.double()[:, None, None] * c).sum(0)
    summed.requires_grad_()
    y_ = by_slot(torch.where(real, norm_reference(summed / 2, nw_, nb_), 0.0)) * F.silu(z_)
    names = ["z", "sum", "norm_w", "norm_b"]
    grads = torch.autograd.grad((y_ * dy.double()).sum(), [t for t in (z_, summed, nw_, nb_) if t is not None])
    grads = dict(zip([n for n, t in zip(names, (z_, summed, nw_, nb_)) if t is not None], grads))
    ds_ = torch.zeros(B, P, E, dtype=torch.double).scatter_add(1, index, torch.where(real, grads["sum"], 0.0))
    parameters = (conv_w, conv_b, D, norm_w, norm_b)
    for number in expand_rungs:
        with rung(ops, EXPAND_GATE, number):
            y, = call(ops, "expand_gate", (*sizes, xz, s, *parameters, token, group), (out(B, S, E, dtype=dtype),))
            assert_near(y, y_.detach(), tol, f"y, rung {number}")
            results = call(
                ops, "expand_gate_backward", (*sizes, xz, s, *parameters, token, group, member, start, dy),
                (out(B, S, E, dtype=dtype) if with_y else None, torch.full_like(xz, 7), out(B, S, E, dtype=dtype),
                 out(B, P, E), out(E) if norm else None, out(E) if norm == "layer" else None))
        if with_y:
            assert_near(results[0], y_.detach(), tol, f"y recomputed, rung {number}")
        assert (results[1][..., :E] == 7).all(), "the x half of dxz is not expand_gate_backward's"
        dz = results[1][..., E:]
        for name, a in dict(y=results[0], dz=dz, g=results[2]).items():
            assert a is None or (a[~slot_real.expand(B, S, E)] == 0).all(), f"{name}: padding is not zero"
        assert_near(dz, grads["z"], tol, f"dz, rung {number}")
        assert_near(results[2], by_slot(torch.where(real, grads["sum"], 0.0)), tol, f"g, rung {number}")
        assert_near(results[3], ds_, tol, f"ds, rung {number}")
        if norm:
            assert_near(results[4], grads["norm_w"], tol, "dnorm_w")
        if norm == "layer":
            assert_near(results[5], grads["norm_b"], tol, "dnorm_b")


def check_scan(ops, K, B, P, E, N, rungs=(0,), skip=True, bias=True, shared=True, wide=True):
    """wide: B and C are columns of one wider array, as x_proj's output is."""
    torch.manual_seed(0)
    x, dt = random(K, B, P, E), random(K, B, P, E)
    dt.view(-1)[::7] = 30.0                                     # softplus is the identity there
    dt.view(-1)[1::7] = -30.0
    A = -torch.rand(K, E, N) * 2
    ld = 2 * N + 3 if wide else N
    table = random(K, B, P, ld)
    Bm, Cm = (table[..., 2:2 + N], table[..., 2 + N:2 + 2 * N]) if wide else (table, random(K, B, P, N))
    D, dt_bias = random(K, E) if skip else None, random(K, E) if bias else None
    ds = random(B, P, E) if shared else random(K, B, P, E)
    leaves = [leaf(t) for t in (x, dt, A, Bm, Cm, D, dt_bias)]
    s_ = scan_reference(*leaves)
    wanted = [t for t in leaves if t is not None]
    grads = iter(torch.autograd.grad((s_ * ds.double()).sum(), wanted))
    grads = [next(grads) if t is not None else None for t in leaves]
    if wide and ops.device != "cpu":
        table = table.to(ops.device)
        Bm, Cm = table[..., 2:2 + N], table[..., 2 + N:2 + 2 * N]
    inputs = (K, B, P, E, N, x, dt, A, Bm, Cm, ld, D, dt_bias)
    names = ["dx", "ddt", "dA", "dB", "dC", "dD", "ddt_bias"]
    for number in rungs:
        with rung(ops, SCAN, number):
            s, = call(ops, "selective_scan", inputs, (out(K, B, P, E),))
            assert_near(s, s_.detach(), 1e-5, f"s, rung {number}")
            results = call(ops, "selective_scan_backward", (*inputs, ds, int(shared)),
                           [out(*e.shape) if e is not None else None for e in grads])
            for name, a, e in zip(names, results, grads):
                assert e is None or assert_near(a, e, 2e-5, f"{name}, rung {number}") is None


def check_norm(ops, rows, D, dtype, bias=False, hidden=True, residual=True, dout=True, alias=False):
    torch.manual_seed(0)
    code, tol = DTYPES.index(dtype), tolerance(dtype)
    h, r = random(rows, D, dtype=dtype) if hidden else None, random(rows, D) + 3 if residual else None
    weight, b = random(D), random(D) if bias else None
    total = (0 if h is None else h.double()) + (0 if r is None else r.double())
    expected = norm_reference(total, weight.double(), None if b is None else b.double())
    r_out = r.to(ops.device, copy=True) if alias else out(rows, D)              # the sum may replace the residual
    u, new = call(ops, "add_norm", (code, rows, D, h, r_out if alias else r, weight, b),
                  (out(rows, D, dtype=dtype), r_out))
    assert_near(u, expected, tol, "u")
    assert_near(new, total, 1e-6, "residual")
    u, _ = call(ops, "add_norm", (code, rows, D, h, r, weight, b), (out(rows, D, dtype=dtype), None))
    assert_near(u, expected, tol, "u without residual")

    du, d = random(rows, D, dtype=dtype), random(rows, D) if dout else None
    r_, w_, b_ = leaf(total.float()), leaf(weight), leaf(b)
    loss = (norm_reference(r_, w_, b_) * du.double()).sum() + (0 if d is None else (r_ * d.double()).sum())
    grads = torch.autograd.grad(loss, [t for t in (r_, w_, b_) if t is not None])
    results = call(ops, "add_norm_backward", (code, rows, D, total.float(), weight, int(bias), du, d),
                   (out(rows, D), out(rows, D, dtype=dtype) if hidden else None, out(D), out(D) if bias else None))
    assert_near(results[0], grads[0], 2e-5, "dr")
    if hidden:
        assert_near(results[1], grads[0], tol, "dhidden")
    assert_near(results[2], grads[1], 2e-5, "dweight")
    if bias:
        assert_near(results[3], grads[2], 2e-5, "dbias")


def check_ties_and_nan(ops):
    """Max pooling: of equal maxima the first position; a NaN wins. Nothing swallows a NaN or an infinity."""
    torch.manual_seed(0)
    E = 8
    token, group, weight, member, start, P = runs(2, 12)
    S = 24
    xz, conv_w, conv_b = torch.zeros(1, S, 2 * E), random(2, E, 4), random(2, E)
    inputs = (0, 1, S, P, E, 1, 1, xz, conv_w, conv_b, token, group, weight, member, start)
    outputs = (out(2, 1, P, E), out(2, 1, P, E, dtype=torch.int32))
    for number in range(6):
        with rung(ops, CONV_POOL, number):
            _, argmax = call(ops, "conv_pool", inputs, outputs)
            assert (argmax[:, 0, 0] == 0).all() and (argmax[:, 0, 1] == 12).all()
    xz[0, token[0, 14], 3] = torch.nan
    for number in range(6):
        with rung(ops, CONV_POOL, number):
            p, argmax = call(ops, "conv_pool", inputs, outputs)
            assert argmax[0, 0, 1, 3] == 14 and argmax[1, 0, 1, 3] == 12 and argmax[1, 0, 0, 3] == 11
            assert p[:, 0, 1, 3].isnan().all() and p[1, 0, 0, 3].isnan() and p.isnan().sum() == 3
    s, y = random(2, 1, P, E), out(1, S, E)
    s[0, 0, 0, 2] = torch.inf
    for number in range(5):
        with rung(ops, EXPAND_GATE, number):
            y, = call(ops, "expand_gate",
                      (0, 1, S, P, E, 1, xz * 0, s, conv_w, conv_b, None, torch.ones(E), None, token, group),
                      (out(1, S, E),))
            assert y[0, token[0, :12].long(), 2].isnan().all(), "inf / inf"


def check_nothing(ops):
    """An empty batch: empty outputs, zero gradients of the parameters."""
    E, P, S, N = 8, 2, 6, 4
    token, group, weight, member, start, P = runs(2, 3)
    e, sizes, conv = torch.empty(0), (0, 0, S, P, E, 1), (random(2, E, 4), random(2, E))
    walk, nothing = (token, group, weight, member, start), out(0)
    A, norm = random(2, E, N), (random(E), random(E))
    results = call(ops, "conv_pool_backward", (*sizes, 0, e, *conv, random(2, E), *walk, None, e, e),
                   (nothing, out(2, E, 4), out(2, E), out(2, E)))
    results += call(ops, "selective_scan_backward",
                    (2, 0, P, E, N, e, e, A, e, e, N, random(2, E), random(2, E), e, 1),
                    (nothing, nothing, out(2, E, N), nothing, nothing, out(2, E), out(2, E)))
    results += call(ops, "expand_gate_backward", (*sizes, e, e, *conv, None, *norm, token, group, member, start, e),
                    (nothing, nothing, nothing, nothing, out(E), out(E)))
    results += call(ops, "add_norm_backward", (0, 0, E, e, random(E), 1, e, None), (nothing, nothing, out(E), out(E)))
    assert all((r == 0).all() for r in results)
    call(ops, "conv_pool", (*sizes, 0, e, *conv, *walk), (e, None))
    call(ops, "selective_scan", (2, 0, P, E, N, e, e, A, e, e, N, None, None), (e,))
    call(ops, "expand_gate", (*sizes, e, e, *conv, None, None, None, token, group), (e,))
    call(ops, "add_norm", (0, 0, E, e, None, random(E), None), (e, None))


def make_cases():
    f32, cases = torch.float32, {}

    def add(name, function, *arguments, **more):
        cases[name] = lambda ops: function(ops, *arguments, **more)

    for walk in WALKS:                                          # best rungs; E no multiple of the vector width, and one
        for E in (7, 12):
            add(f"block-{walk}-{E}", check_block, walk, 2, E, f32)
            add(f"block-{walk}-{E}-max", check_block, walk, 2, E, f32, maximum=True, norm="rms", with_y=False)
    for walk, E in (("fastvim", 136), ("ragged", 37), ("two_d", 8), ("vim", 4)):
        every = dict(rungs=range(1, 6), expand_rungs=range(1, 5))
        add(f"rungs-{walk}-{E}", check_block, walk, 2, E, f32, **every)
        add(f"rungs-{walk}-{E}-max", check_block, walk, 2, E, f32, maximum=True, norm=None, **every)
    for dtype, walk in itertools.product(DTYPES[1:], ("fastvim", "ragged", "channels")):
        name = str(dtype)[6:]
        add(f"{name}-{walk}", check_block, walk, 2, 16, dtype, rungs=(0, 1), expand_rungs=(0, 1))
        add(f"{name}-{walk}-max", check_block, walk, 1, 5, dtype, maximum=True, norm="rms")
    for norm, skip in itertools.product(("layer", "rms", None), (True, False)):
        add(f"norm-{norm}-skip-{skip}", check_block, "fastvim", 1, 12, f32, norm=norm, skip=skip, expand_rungs=(1, 4))
    add("wide-rows", check_block, lambda: runs(2, 2), 1, 2564, f32)             # more threads, fewer registers
    add("wider-rows", check_block, lambda: runs(2, 2), 1, 3076, f32)            # too wide for a block: rung 1
    add("odd-wide-rows", check_block, lambda: runs(2, 2), 1, 771, f32)
    add("many-groups", check_block, lambda: runs(1100, 1), 5, 4, f32)           # several groups a walker
    for N in (1, 4, 16, 33, 64):
        add(f"scan-N{N}", check_scan, 2, 2, 19, 5, N, rungs=(0, 1, 2))
    for P in (1, 2, 7, 8, 9, 64, 130):
        add(f"scan-P{P}", check_scan, 2, 1, P, 67, 16, rungs=(0, 2), shared=P % 2 == 0, wide=P != 9)
    add("scan-one-direction", check_scan, 1, 2, 40, 33, 16, shared=False)
    add("scan-plain", check_scan, 2, 2, 20, 3, 16, rungs=(0, 1, 2), skip=False, bias=False)
    add("scan-chunks-N20", check_scan, 2, 1, 70, 3, 20)
    for dtype, D in itertools.product(DTYPES, (5, 64, 140)):
        add(f"norm-{str(dtype)[6:]}-{D}", check_norm, 11, D, dtype, bias=D != 64)
    add("norm-no-residual", check_norm, 3, 12, DTYPES[1], residual=False, dout=False)
    add("norm-no-hidden", check_norm, 3, 12, f32, hidden=False, bias=True)
    add("norm-alias", check_norm, 3, 12, f32, alias=True)
    add("norm-many-rows", check_norm, 1200, 4, f32, bias=True)
    add("norm-wide", check_norm, 2, 6404, f32, bias=True)                       # two column ranges
    add("ties-and-nan", check_ties_and_nan)
    add("nothing", check_nothing)
    return cases


CASES = make_cases()


# ---- building, and the second process

EMULATED_FLAGS = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wno-unknown-pragmas", "-DFASTVIM_EMULATE",
                  "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-include", str(EMULATOR), "-x",
                  "c++"]


def run(*command, **more):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **more)
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout[-3000:]}{done.stderr[-6000:]}"
    return done.stdout


class Worker:
    """A Python with the sanitizers loaded, that runs one case after another. If one kills it, the next starts anew."""

    def __init__(self, library, folder):
        self.library, self.log, self.process = library, folder / "log", None

    def start(self):
        preload = " ".join(run("g++", f"-print-file-name={name}").strip() for name in ("libasan.so", "libubsan.so"))
        env = dict(os.environ, LD_PRELOAD=preload, ASAN_OPTIONS="detect_leaks=0", OMP_NUM_THREADS="1",
                   UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1")
        self.process = subprocess.Popen([sys.executable, __file__, str(self.library)], stdin=subprocess.PIPE, text=True,
                                        stdout=subprocess.PIPE, stderr=open(self.log, "w"), env=env, cwd=HERE.parent)

    def run(self, case):
        if self.process is None or self.process.poll() is not None:
            self.start()
        with contextlib.suppress(BrokenPipeError):
            print(case, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if answer.strip() == "ok":
            return
        if not answer:
            self.process.wait()
            answer = "\n".join(line[:300] for line in self.log.read_text().splitlines()[:40])
        pytest.fail(answer.replace("\\n", "\n"), pytrace=False)

    def stop(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


def work(library):
    ops = Emulated(library)
    torch.set_num_threads(1)
    for case in sys.stdin:
        try:
            CASES[case.strip()](ops)
            print("ok", flush=True)
        except Exception:
            print(traceback.format_exc(limit=-3).replace("\n", "\\n"), flush=True)


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("emulated")
    run("g++", "-fPIC", "-shared", *EMULATED_FLAGS, SOURCE, "-o", folder / "emulated.so")
    worker = Worker(folder / "emulated.so", folder)
    yield worker
    worker.stop()


@pytest.mark.parametrize("case", CASES)
def test_emulated_kernels(worker, case):
    worker.run(case)


# ---- the emulator itself: does it notice?

def kernel(body, shared=512):
    return f"""
__global__ void broken(float* x) {{ DYNAMIC_SHARED(shared); const int t = threadIdx.x; {body} }}
int main(int, char** argv) {{
    emulator_order(atoi(argv[1]), 0);
    float* x = static_cast<float*>(malloc(128 * sizeof(float)));
    const int error = launch(broken, 1, dim3(128), {shared}, nullptr, x);
    for (int i = 0; i < 128; ++i) printf("%.8g ", x[i]);
    return error;
}}"""


NOTICED = {
    "barrier": ("shared[t] = t; if (t > 3) __syncthreads(); x[t] = 0;", "a barrier that not all threads reach"),
    "two places": ("shared[t] = t; if (t > 3) __syncthreads();\n else __syncthreads(); x[t] = 0;", "a barrier that"),
    "shuffle": ("x[t] = t; if (t != 40) x[t] = __shfl_xor_sync(~0u, x[t], 1);", "a shuffle with missing threads"),
    "shared memory": ("shared[t + 1] = t; x[t] = 0;", "heap-buffer-overflow"),
    "global memory": ("x[t - 1] = 0;", "heap-buffer-overflow"),
    "alignment": ("uint4* v = reinterpret_cast<uint4*>(x + 1); v->x = 0;", "misaligned address"),
}


@pytest.fixture
def execute(tmp_path):
    def build_and_run(source, order=0):
        (tmp_path / "kernel.cu").write_text(source)
        if not (tmp_path / "kernel").exists():
            run("g++", *EMULATED_FLAGS, tmp_path / "kernel.cu", "-o", tmp_path / "kernel")
        env = dict(os.environ, ASAN_OPTIONS="detect_leaks=0")
        return subprocess.run([tmp_path / "kernel", str(order)], capture_output=True, text=True, env=env)
    return build_and_run


@pytest.mark.parametrize("what", NOTICED)
def test_the_emulator_notices(execute, what):
    body, message = NOTICED[what]
    done = execute(kernel(body))
    assert done.returncode != 0 and message in done.stderr, done.stderr[-2000:]


def test_the_emulator_runs_threads_in_several_orders(execute):
    source = kernel("shared[t] = t; if (t < 0) __syncthreads(); x[t] = shared[127 - t];")
    assert len({execute(source, order).stdout for order in range(3)}) == 3


def test_the_emulator_runs_correct_kernels_and_poisons_shared_memory(execute):
    body = "shared[t] = t; __syncthreads(); x[t] = shared[127 - t] + __shfl_xor_sync(~0u, float(t), 3);"
    done = execute(kernel(body))
    assert done.returncode == 0
    assert [float(v) for v in done.stdout.split()] == [127 - t + (t ^ 3) for t in range(128)]


# ---- the real compiler, and a real GPU

def find_nvcc():
    """nvcc of torch's major CUDA version, or a skip that says what is missing."""
    nvcc = shutil.which("nvcc") or next((p for p in ["/usr/local/cuda/bin/nvcc"] if os.path.exists(p)), None)
    if nvcc is None or torch.version.cuda is None:
        pytest.skip("no nvcc here" if nvcc is None else "this PyTorch has no CUDA")
    version = run(nvcc, "--version").split("release ")[1].split(",")[0]
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        pytest.skip(f"nvcc is {version}, PyTorch has CUDA {torch.version.cuda}")
    return pathlib.Path(nvcc).resolve()


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    """The real extension, compiled for sm_80 and sm_90 and linked. -> its path"""
    nvcc, folder = find_nvcc(), tmp_path_factory.mktemp("extension")
    dryrun = subprocess.run([nvcc, "--dryrun", "-c", SOURCE], capture_output=True, text=True).stderr
    toolkit = pathlib.Path(next(line for line in dryrun.splitlines() if line.startswith("#$ TOP="))[len("#$ TOP="):])
    torch_root = pathlib.Path(torch.__file__).parent
    run(nvcc, "-O3", "-std=c++17", "-ftz=true", "-Xcompiler", "-fPIC", "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90", "-c", SOURCE, "-o", folder / "kernels.o")
    includes = [toolkit / "include", torch_root / "include", torch_root / "include/torch/csrc/api/include",
                sysconfig.get_path("include")]
    run("g++", "-O1", "-std=c++20", "-fPIC", "-Wall", "-DTORCH_EXTENSION_NAME=scan_cuda",
        *itertools.chain(*(("-isystem", i) for i in includes)), "-c", BINDING, "-o", folder / "binding.o")
    libraries = ("-lc10", "-lc10_cuda", "-ltorch_cpu", "-ltorch_cuda", "-ltorch", "-ltorch_python", "-lcudart")
    folders = (torch_root / "lib", toolkit / "lib64", toolkit / "lib")
    run("g++", "-shared", folder / "kernels.o", folder / "binding.o", *(f"-L{f}" for f in folders), *libraries,
        "-o", folder / "scan_cuda.so")
    return folder / "scan_cuda.so"


def load_extension(path):
    import importlib.util
    spec = importlib.util.spec_from_file_location("scan_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_extension_builds_and_refuses_wrong_arguments(extension):
    module = load_extension(extension)
    with pytest.raises(RuntimeError, match="add_norm.*CUDA"):
        module.add_norm(0, 1, 4, torch.zeros(1, 4), None, torch.ones(4), None, torch.zeros(1, 4), None)
    with pytest.raises(TypeError):
        module.add_norm(0, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("case", CASES if torch.cuda.is_available() else [])
def test_kernels_on_a_gpu(extension, case):
    CASES[case](Extension(load_extension(extension)))


if __name__ == "__main__":
    work(sys.argv[1])
