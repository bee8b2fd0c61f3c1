"""The CUDA kernels against PyTorch in float64: on the CPU through cuda_emulator.h, and on a GPU
where there is one.

    pytest tests/test_cuda_emulator.py

Without a GPU, g++ compiles scan_cuda.cu under the address and undefined-behaviour sanitizers, and a
second process, in which the sanitizers' libraries are loaded first, runs every case in three orders
of the threads and asks for equal bits. What that cannot show (speed, what nvcc makes of the code)
is left to the compiler below, and to a GPU.
"""
import contextlib
import ctypes
import itertools
import os
import pathlib
import shutil
import subprocess
import sys
import traceback

import pytest
import torch
import torch.nn.functional as F

import fastvim_build
from fastvim_kernels import DTYPES, structures

HERE = pathlib.Path(__file__).resolve().parent
SOURCE = HERE.parent / "scan_cuda.cu"
EMULATOR = HERE / "cuda_emulator.h"
STRUCTURES = structures()


# ---- the library under test

class Emulated:
    """The library that g++ made. Each call runs in three orders, which must agree in every bit."""
    device = "cpu"

    def __init__(self, path):
        self.library = ctypes.CDLL(path)

    def __call__(self, name, numbers, outputs):
        initial = [t.clone() for t in outputs]
        structure = (ctypes.c_int64 * len(numbers))(*numbers)
        results = []
        for order in range(3):
            for t, like in zip(outputs, initial):
                t.copy_(like)
            self.library.emulator_order(order, 5)
            assert getattr(self.library, name)(structure, None) == 0
            results.append([t.clone().view(torch.uint8) for t in outputs])
        for result in results[1:]:
            for i, (a, b) in enumerate(zip(results[0], result)):
                assert torch.equal(a, b), f"{name}: output {i} depends on the order of the threads"


class Extension:
    """The extension that torch built, on a GPU. Each call runs twice, with equal bits."""
    device = "cuda"

    def __init__(self, module):
        self.module = module

    def __call__(self, name, numbers, outputs):
        initial = [t.clone() for t in outputs]
        self.module.call(name, numbers, 0)
        first = [t.clone() for t in outputs]
        for t, like in zip(outputs, initial):
            t.copy_(like)
        self.module.call(name, numbers, 0)
        for a, b in zip(first, outputs):
            same = torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            assert same, f"{name}: the second call gave other bits"


def call(ops, name, outputs, **inputs):
    """Everything onto the library's device, into the structure of scan.h, and there; -> the outputs
    by name, on the CPU. A tensor that several names have stays one."""
    moved = {}
    for t in [*inputs.values(), *outputs.values()]:
        if isinstance(t, torch.Tensor):
            moved[id(t)] = t.to(ops.device)
    values = {**inputs, **outputs}
    numbers = []
    for field, *_ in STRUCTURES[name]:
        value = values.pop(field)
        if isinstance(value, torch.Tensor):
            value = moved[id(value)].data_ptr()
        numbers.append(value or 0)
    assert not values, f"{name} has no {list(values)}"
    written = {field: moved[id(t)] for field, t in outputs.items() if t is not None}
    ops(name, numbers, list(written.values()))
    return {field: t.cpu() for field, t in written.items()}


def out(*shape, dtype=torch.float32):
    """An output, full of what no kernel writes."""
    return torch.full(shape, torch.nan if dtype.is_floating_point else -9, dtype=dtype)


def out_if(wanted, *shape, dtype=torch.float32):
    return out(*shape, dtype=dtype) if wanted else None


def assert_near(actual, expected, tolerance, name):
    """Largest error relative to the largest value."""
    assert actual.shape == expected.shape, name
    assert actual.isfinite().all(), f"{name}: not finite"
    if actual.numel():
        error = (actual.double() - expected).abs().max()
        scale = max(float(expected.abs().max()), 1e-2)
        assert error <= tolerance * scale, f"{name}: error {error / scale:.1e}"


def tolerance(dtype):
    return 1e-5 if dtype == torch.float32 else 1e-2


def random(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype)


def random_if(wanted, *shape, dtype=torch.float32):
    return random(*shape, dtype=dtype) if wanted else None


# ---- walks: the tables of scan.h's Walk, with (rows l) each, and the number of steps

def make_walk(token, group, steps):
    key = group.masked_fill(group < 0, steps)
    key, member = key.sort(dim=1, stable=True)
    start = torch.searchsorted(key, torch.arange(steps + 1).repeat(len(key), 1))
    member = torch.where(key < steps, member, -10 ** 6)     # unspecified: whoever reads it, falls
    weight = torch.rand(group.shape) + 0.5
    tables = {
        "rows": len(group), "token": token.int(), "group": group.int(), "weight": weight,
        "member": member.int(), "start": start.int(),
    }
    return tables, steps


def runs(p, w):                                             # FastVim; w = 1: Vim
    group = torch.arange(p).repeat_interleave(w)[None]
    return make_walk(torch.randperm(p * w)[None], group, p)


def strided(p, length, outer=1):                            # h w c pooling w; outer = 1: 2-D to c
    group = torch.arange(outer)[:, None, None] * p + torch.arange(p).expand(outer, length, p)
    return make_walk(torch.randperm(group.numel())[None], group.reshape(1, -1), outer * p)


def ragged(b, l, p):
    """Per image: steps of any length, some empty, a class token's step of one, holes at the end."""
    token = torch.stack([torch.randperm(l) for _ in range(b)])
    group = torch.randint(0, p, (b, l)).sort(1).values
    later = group[:, l // 2:]
    later += (later < p - 1).long()
    for image in range(b):
        group[image, l - 2 * image:] = -1
    if b > 2:
        group[2] = -1                                       # an image without tokens
    return make_walk(token, group, p)


WALKS = {
    "fastvim": lambda: runs(5, 7),
    "fastvim_long": lambda: runs(3, 130),
    "vim": lambda: runs(37, 1),
    "one": lambda: runs(1, 1),
    "two": lambda: runs(2, 1),
    "three": lambda: runs(1, 3),
    "five": lambda: runs(1, 5),
    "channels": lambda: strided(3, 5, 4),
    "two_d": lambda: strided(2, 70),
    "ragged": lambda: ragged(3, 21, 6),
    "empty_steps": lambda: ragged(2, 4, 30),
    "pairs": lambda: runs(2, 2),
    "many_steps": lambda: runs(70, 1),                      # several steps a walker
}


# ---- the references, in float64 with autograd

def conv_silu_reference(x, conv_weight, conv_bias, walk):
    """x (b l e) by tokens -> c (2 b l e) by positions."""
    b, l, e = x.shape
    token = walk["token"].long().expand(b, l)
    x = x.gather(1, token[..., None].expand(b, l, e))
    x = torch.where((walk["group"] < 0)[..., None], 0.0, x)
    back = F.pad(x, (0, 0, 3, 0))
    ahead = F.pad(x, (0, 0, 0, 3))
    forward = conv_bias[0] + sum(conv_weight[0, :, j] * back[:, j:j + l] for j in range(4))
    backward = conv_bias[1] + sum(conv_weight[1, :, 3 - j] * ahead[:, j:j + l] for j in range(4))
    return F.silu(torch.stack([forward, backward]))


def pool_reference(c, walk, p):
    _, b, l, e = c.shape
    group = walk["group"].long()
    real = (group >= 0)[..., None]
    index = group.clamp(min=0).expand(b, l)[None, ..., None].expand(2, b, l, e)
    weighted = torch.where(real, walk["weight"].double()[..., None] * c, 0.0)
    return torch.zeros(2, b, p, e, dtype=c.dtype).scatter_add(2, index, weighted)


def scan_reference(x, dt, A, B, C, D, bias):
    k, b, p, e = x.shape
    if bias is not None:
        dt = dt + bias[:, None, None]
    delta = F.softplus(dt)
    rows = []
    for direction in range(k):
        h = torch.zeros(b, e, A.shape[-1], dtype=x.dtype)
        s = {}
        for t in sorted(range(p), reverse=direction == 1):
            decay = torch.exp(delta[direction, :, t, :, None] * A[direction])
            drive = (delta * x)[direction, :, t, :, None]
            h = decay * h + drive * B[direction, :, t, None]
            s[t] = (h * C[direction, :, t, None]).sum(-1)
        rows.append(torch.stack([s[t] for t in range(p)], 1))
    s = torch.stack(rows)
    if D is not None:
        s = s + D[:, None, None] * x
    return s


def norm_reference(v, weight, bias):
    if weight is None:
        return v
    if bias is None:
        return F.rms_norm(v, weight.shape, weight, 1e-5)
    return F.layer_norm(v, weight.shape, weight, bias, 1e-5)


def leaf(t):
    return None if t is None else t.cpu().double().requires_grad_()


def gradients(loss, leaves):
    """{name: leaf or None} -> {name: gradient}, without those that are None"""
    leaves = {name: t for name, t in leaves.items() if t is not None}
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))


# ---- the cases: functions of the library

class Block:
    """The arguments and references that conv_pool and expand_gate share."""

    def __init__(self, walk, b, e, dtype=torch.float32, maximum=False, skip=True, norm="layer"):
        torch.manual_seed(0)
        self.walk, self.p = WALKS[walk]()
        rows, self.l = self.walk["group"].shape
        self.b = b if rows == 1 else rows
        self.e = e
        self.dtype = dtype
        self.maximum = maximum
        self.sizes = {"dtype": DTYPES.index(dtype), "b": self.b, "l": self.l, "p": self.p, "e": e}
        self.conv = {
            "conv_weight": random(2, e, 4, scale=0.5), "conv_bias": random(2, e, scale=0.5)
        }
        self.D = random_if(skip, 2, e)
        self.norm = {
            "norm_weight": random_if(norm, e), "norm_bias": random_if(norm == "layer", e)
        }

        self.token = self.walk["token"].long().expand(self.b, self.l)
        self.group = self.walk["group"].long().expand(self.b, self.l)
        self.real = (self.group >= 0)[..., None]            # (b l 1) by positions
        position = torch.arange(self.l).expand(self.b, self.l)
        self.position = torch.empty_like(self.token).scatter_(1, self.token, position)
        self.hole = ~self.by_token(self.real).expand(self.b, self.l, e)
        self.xz = random(self.b, self.l, 2 * e, dtype=dtype)
        self.xz[self.hole.repeat(1, 1, 2)] = torch.nan      # holes may hold anything
        self.x = self.xz[..., :e].double().nan_to_num(0)
        self.z = self.xz[..., e:].double().nan_to_num(0)

    def out(self, *shape):
        return out(*shape, dtype=self.dtype)

    def by_token(self, v):                                  # (b l e) positions -> tokens
        return v.gather(1, self.position[..., None].expand(v.shape))

    def by_position(self, v):
        return v.gather(1, self.token[..., None].expand(v.shape))

    def c(self):
        weights = (t.double() for t in self.conv.values())
        return conv_silu_reference(self.x, *weights, self.walk)


def check_pool(ops, *shape, **options):
    """conv_pool, forward and backward"""
    block = Block(*shape, **options)
    b, l, p, e = block.b, block.l, block.p, block.e
    near = tolerance(block.dtype)
    shared = dict(block.sizes, **block.walk, **block.conv, max=int(block.maximum), xz=block.xz)
    outputs = {"pooled": out(2, b, p, e), "argmax": None}
    if block.maximum:
        outputs["argmax"] = out(2, b, p, e, dtype=torch.int32)
    pooled, *argmax = call(ops, "conv_pool", outputs, **shared).values()
    c = block.c()
    if not block.maximum:
        assert_near(pooled, pool_reference(c, block.walk, p), near, "pooled")
    else:
        check_maxima(block, c, pooled, *argmax)

    dpooled = random(2, b, p, e)
    g = random(b, l, e, dtype=block.dtype)
    leaves = {"dxz": leaf(block.x), "dD": leaf(block.D)}
    for name, t in block.conv.items():
        leaves[f"d{name}"] = leaf(t)
    c = conv_silu_reference(
        leaves["dxz"], leaves["dconv_weight"], leaves["dconv_bias"], block.walk
    )
    if block.maximum:
        index = argmax[0].long()
        picked = torch.where(index >= 0, c.gather(2, index.clamp(min=0)), 0.0)
    else:
        picked = pool_reference(c, block.walk, p)
    loss = (picked * dpooled.double()).sum()
    if block.D is not None:
        skipped = torch.where(block.real, (leaves["dD"][:, None, None] * c).sum(0), 0.0)
        loss = loss + (skipped * block.by_position(g.double())).sum()
    expected = gradients(loss, leaves)
    outputs = {
        "dxz": torch.full_like(block.xz, 7), "dconv_weight": out(2, e, 4), "dconv_bias": out(2, e),
        "dD": out_if(block.D is not None, 2, e),
    }
    results = call(
        ops, "conv_pool_backward", outputs, **shared, D=block.D, argmax=next(iter(argmax), None),
        dpooled=dpooled, g=g,
    )
    assert (results["dxz"][..., e:] == 7).all(), "the z half of dxz is not conv_pool_backward's"
    results["dxz"] = results["dxz"][..., :e]
    assert (results["dxz"][block.hole] == 0).all(), "a hole has a gradient"
    for name, value in expected.items():
        assert_near(results[name], value, near, name)


def check_maxima(block, c, pooled, argmax):
    near = tolerance(block.dtype)
    for image, step in itertools.product(range(block.b), range(block.p)):
        mine = (block.group[image] == step).nonzero()[:, 0]
        places = argmax[:, image, step]
        if len(mine) == 0:
            assert (places == -1).all() and (pooled[:, image, step] == 0).all()
            continue
        maxima = c[:, image, mine].max(1).values
        assert_near(pooled[:, image, step], maxima, near, "maximum")
        assert torch.isin(places, mine.int()).all()
        chosen = c[:, image].gather(1, places[:, None].long())[:, 0]
        assert_near(chosen, maxima, near, "argmax")


def check_gate(ops, *shape, **options):
    """expand_gate, forward and backward"""
    block = Block(*shape, **options)
    b, l, p, e = block.b, block.l, block.p, block.e
    near = tolerance(block.dtype)
    s = random(2, b, p, e)
    dy = random(b, l, e, dtype=block.dtype)
    index = block.group.clamp(min=0)[..., None].expand(b, l, e)
    total = sum(s[k].double().gather(1, index) for k in range(2))
    if block.D is not None:
        total = total + (block.D.double()[:, None, None] * block.c()).sum(0)
    leaves = {"dz": leaf(block.z), "dtotal": leaf(total)}
    for name, t in block.norm.items():
        leaves[f"d{name}"] = leaf(t)
    normed = norm_reference(leaves["dtotal"] / 2, leaves["dnorm_weight"], leaves["dnorm_bias"])
    y = block.by_token(torch.where(block.real, normed, 0.0)) * F.silu(leaves["dz"])
    expected = gradients((y * dy.double()).sum(), leaves)
    g = torch.where(block.real, expected.pop("dtotal"), 0.0)
    expected["g"] = block.by_token(g)
    expected["ds"] = torch.zeros(b, p, e, dtype=torch.double).scatter_add(1, index, g)

    shared = dict(block.sizes, **block.walk, **block.conv, **block.norm)
    shared.update(D=block.D, xz=block.xz, s=s)
    results = call(ops, "expand_gate", {"y": block.out(b, l, e)}, **shared)
    assert_near(results["y"], y.detach(), near, "y")
    assert (results["y"][block.hole] == 0).all(), "y: a hole is not zero"
    outputs = {"dxz": torch.full_like(block.xz, 7), "g": block.out(b, l, e), "ds": out(b, p, e)}
    for name, t in block.norm.items():
        outputs[f"d{name}"] = out_if(t is not None, e)
    results = call(ops, "expand_gate_backward", outputs, **shared, dy=dy)
    dx, results["dz"] = results.pop("dxz").split(e, 2)
    assert (dx == 7).all(), "the x half of dxz is not expand_gate_backward's"
    for name in ("dz", "g"):
        assert (results[name][block.hole] == 0).all(), f"{name}: a hole is not zero"
    for name, value in expected.items():
        assert_near(results[name], value, near, name)


def check_block(ops, *shape, **options):
    check_pool(ops, *shape, **options)
    check_gate(ops, *shape, **options)


def check_scan(ops, k, b, p, e, n, skip=True, bias=True, shared=True, wide=True):
    """wide: B and C are columns of one wider array, as x_proj's output is."""
    torch.manual_seed(0)
    x = random(k, b, p, e)
    dt = random(k, b, p, e)
    dt.view(-1)[::7] = 30.0                                 # softplus is the identity there
    dt.view(-1)[1::7] = -30.0
    A = -torch.rand(k, e, n) * 2
    if wide:
        table = random(k, b, p, 2 * n + 3).to(ops.device)   # not moved again: B, C are its views
        B = table[..., 2:2 + n]
        C = table[..., 2 + n:2 + 2 * n]
        stride = 2 * n + 3
    else:
        stride = n
        B = random(k, b, p, n)
        C = random(k, b, p, n)
    D = random_if(skip, k, e)
    dt_bias = random_if(bias, k, e)
    ds = random(k, b, p, e)
    if shared:
        ds = ds[0]
    inputs = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias}
    leaves = {f"d{name}": leaf(t) for name, t in inputs.items()}
    s = scan_reference(*leaves.values())
    expected = gradients((s * ds.double()).sum(), leaves)
    inputs.update(k=k, b=b, p=p, e=e, n=n, stride=stride)

    results = call(ops, "selective_scan", {"s": out(k, b, p, e)}, **inputs)
    assert_near(results["s"], s.detach(), 1e-5, "s")
    outputs = {name: None if t is None else out(*t.shape) for name, t in leaves.items()}
    results = call(ops, "selective_scan_backward", outputs, **inputs, ds=ds, shared=int(shared))
    for name, value in expected.items():
        assert_near(results[name], value, 2e-5, name)


def check_norm(ops, rows, d, dtype, bias=False, dhidden=True, dout=True, alias=False):
    torch.manual_seed(0)
    near = tolerance(dtype)
    sizes = {"dtype": DTYPES.index(dtype), "rows": rows, "d": d}
    h = random(rows, d, dtype=dtype)
    r = random(rows, d) + 3
    total = r.double() + h.double()
    weights = {"weight": random(d), "bias": random_if(bias, d)}
    expected = norm_reference(total, weights["weight"].double(), leaf(weights["bias"]))
    residual_out = r if alias else out(rows, d)  # the sum may replace the residual
    outputs = {"u": out(rows, d, dtype=dtype), "out": residual_out}
    results = call(ops, "add_norm", outputs, **sizes, **weights, hidden=h, residual=r)
    assert_near(results["u"], expected.detach(), near, "u")
    assert_near(results["out"], total, 1e-6, "out")

    du = random(rows, d, dtype=dtype)
    d_out = random_if(dout, rows, d)
    leaves = {"dresidual": leaf(total.float())}
    for name, t in weights.items():
        leaves[f"d{name}"] = leaf(t)
    loss = (norm_reference(*leaves.values()) * du.double()).sum()
    if dout:
        loss = loss + (leaves["dresidual"] * d_out.double()).sum()
    expected = gradients(loss, leaves)
    outputs = {
        "dresidual": out(rows, d), "dhidden": out_if(dhidden, rows, d, dtype=dtype),
        "dweight": out(d), "dbias": out_if(bias, d),
    }
    results = call(
        ops, "add_norm_backward", outputs, **sizes, centred=int(bias), residual=total.float(),
        weight=weights["weight"], du=du, dout=d_out,
    )
    for name, value in expected.items():
        assert_near(results[name], value, 2e-5, name)
    if dhidden:
        assert_near(results["dhidden"], expected["dresidual"], near, "dhidden")


def check_ties_and_nan(ops, e):
    """Max pooling: of equal maxima the first position; a NaN wins. Nothing swallows a NaN or an
    infinity."""
    torch.manual_seed(0)
    walk, p = runs(2, 12)
    l = 24
    token = walk["token"][0].long()
    xz = torch.zeros(1, l, 2 * e)
    shared = dict(
        walk, dtype=0, b=1, l=l, p=p, e=e, xz=xz, conv_weight=random(2, e, 4),
        conv_bias=random(2, e),
    )
    outputs = {"pooled": out(2, 1, p, e), "argmax": out(2, 1, p, e, dtype=torch.int32)}
    argmax = call(ops, "conv_pool", outputs, **shared, max=1)["argmax"]
    assert (argmax[:, 0, 0] == 0).all() and (argmax[:, 0, 1] == 12).all()

    xz[0, token[14], 3] = torch.nan
    pooled, argmax = call(ops, "conv_pool", outputs, **shared, max=1).values()
    assert argmax[0, 0, 1, 3] == 14 and argmax[1, 0, 1, 3] == 12 and argmax[1, 0, 0, 3] == 11
    assert pooled[:, 0, 1, 3].isnan().all() and pooled[1, 0, 0, 3].isnan()
    assert pooled.isnan().sum() == 3

    xz.zero_()
    s = random(2, 1, p, e)
    s[0, 0, 0, 2] = torch.inf
    y = call(
        ops, "expand_gate", {"y": out(1, l, e)}, **shared, s=s, D=None, norm_weight=torch.ones(e),
        norm_bias=None,
    )["y"]
    assert y[0, token[:12], 2].isnan().all(), "inf / inf"


def check_far_means(ops, norm):
    """Rows far from zero: the variance is not what rounding leaves of two large numbers. And a NaN
    stays in the rows of its step, although the mean of a row serves the next one."""
    block = Block("fastvim", 1, 12, norm=norm, skip=False)
    l = block.l
    e = block.e
    s = random(2, 1, block.p, e)
    if norm == "layer":
        s += 1000
    dy = random(1, l, e)
    shared = dict(block.sizes, **block.walk, **block.conv, **block.norm, D=None, xz=block.xz, s=s)
    outputs = {"dxz": torch.full_like(block.xz, 7), "g": out(1, l, e), "ds": out(1, block.p, e)}
    for name, t in block.norm.items():
        outputs[f"d{name}"] = out_if(t is not None, e)
    index = block.group[..., None].expand(1, l, e)
    v = (s.double().sum(0).gather(1, index) / 2).requires_grad_()
    weights = (None if t is None else t.double() for t in block.norm.values())
    normed = block.by_token(norm_reference(v, *weights)) * F.silu(block.z)
    g = torch.autograd.grad((normed * dy.double()).sum(), v)[0] / 2
    y = call(ops, "expand_gate", {"y": out(1, l, e)}, **shared)["y"]
    results = call(ops, "expand_gate_backward", outputs, **shared, dy=dy)
    assert_near(y, normed.detach(), 5e-4, "y")
    assert_near(results["g"], block.by_token(g), 5e-4, "g")

    bad = block.by_token(block.group[..., None] == 1)[0, :, 0]
    s[0, 0, 1, 3] = torch.nan
    y = call(ops, "expand_gate", {"y": out(1, l, e)}, **shared)["y"]
    results = call(ops, "expand_gate_backward", outputs, **shared, dy=dy)
    for name, t in (("y", y), ("g", results["g"])):
        assert torch.equal(t[0].isnan().all(1), bad) and t[0, ~bad].isfinite().all(), name


def check_nothing(ops):
    """An empty batch: empty outputs, zero gradients of the parameters."""
    e = 8
    n = 4
    walk, p = runs(2, 30)
    empty = torch.empty(0)
    conv = {"conv_weight": random(2, e, 4), "conv_bias": random(2, e)}
    block = dict(walk, dtype=0, b=0, l=60, p=p, e=e, xz=empty, **conv)
    gate = dict(block, s=empty, D=random(2, e), norm_weight=random(e), norm_bias=random(e))
    norm = {"dtype": 0, "rows": 0, "d": e, "residual": empty, "weight": random(e)}
    scan = {"k": 2, "b": 0, "p": p, "e": e, "n": n, "stride": n, "A": random(2, e, n)}
    scan.update(x=empty, dt=empty, B=empty, C=empty, D=random(2, e), dt_bias=random(2, e))
    call(ops, "conv_pool", {"pooled": empty, "argmax": None}, **block, max=0)
    call(ops, "selective_scan", {"s": empty}, **scan)
    call(ops, "expand_gate", {"y": empty}, **gate)
    call(ops, "add_norm", {"u": empty, "out": empty}, **norm, hidden=empty, bias=None)

    outputs = {"dconv_weight": out(2, e, 4), "dconv_bias": out(2, e), "dD": out(2, e)}
    pooled = {"max": 0, "argmax": None, "dpooled": empty, "g": empty, "D": random(2, e)}
    results = [call(ops, "conv_pool_backward", dict(outputs, dxz=empty), **block, **pooled)]
    outputs = {"dA": out(2, e, n), "dD": out(2, e), "ddt_bias": out(2, e)}
    outputs.update(dx=empty, ddt=empty, dB=empty, dC=empty)
    results.append(call(ops, "selective_scan_backward", outputs, **scan, ds=empty, shared=1))
    outputs = {"dnorm_weight": out(e), "dnorm_bias": out(e), "dxz": empty, "g": empty, "ds": empty}
    results.append(call(ops, "expand_gate_backward", outputs, **gate, dy=empty))
    outputs = {"dweight": out(e), "dbias": out(e), "dresidual": empty, "dhidden": None}
    results.append(call(ops, "add_norm_backward", outputs, **norm, centred=1, du=empty, dout=None))
    for result in results:
        for name, t in result.items():
            assert (t == 0).all(), name


def make_cases():
    """{name: function of the library}. A width of a multiple of 4 takes the kernels that load four
    channels at once, others those that load one by one."""
    f32 = torch.float32
    cases = {}

    def add(name, function, *arguments, **more):
        cases[name] = lambda ops: function(ops, *arguments, **more)

    for i, walk in enumerate(list(WALKS)[:11]):
        add(f"block-{walk}-12", check_block, walk, 2, 12)
        add(f"block-{walk}-12-max", check_block, walk, 2, 12, maximum=True, norm="rms")
        add(f"block-{walk}-7", check_block, walk, 2, 7, maximum=i % 2 == 1)
    for walk, e in (("fastvim", 136), ("ragged", 37)):      # several warps, the last not full
        add(f"block-{walk}-{e}", check_block, walk, 2, e)
        add(f"pool-{walk}-{e}-max", check_pool, walk, 2, e, maximum=True)
    for dtype, walk in itertools.product(DTYPES[1:], ("fastvim", "ragged", "channels")):
        name = str(dtype)[6:]
        add(f"{name}-{walk}", check_block, walk, 2, 16, dtype)
        add(f"{name}-{walk}-max", check_block, walk, 1, 5, dtype, maximum=True, norm="rms")
    for norm, skip in itertools.product(("layer", "rms", None), (True, False)):
        add(f"norm-{norm}-skip-{skip}", check_gate, "fastvim", 1, 12, norm=norm, skip=skip)
        add(f"norm-{norm}-skip-{skip}-odd", check_gate, "fastvim", 1, 5, norm=norm, skip=skip)
    add("pool-no-skip", check_pool, "fastvim", 1, 12, skip=False)
    add("wide-rows", check_gate, "pairs", 1, 2564)          # more threads, fewer registers
    add("wider-rows", check_gate, "pairs", 1, 3076)         # too wide for a block's registers
    add("odd-wide-rows", check_gate, "pairs", 1, 771)
    add("many-steps", check_block, "many_steps", 4, 4)
    for n in (1, 4, 16, 33, 64):
        add(f"scan-n{n}", check_scan, 2, 1, 11, 5, n)
    for p in (1, 2, 7, 8, 9, 64, 130):
        e = 67 if p < 64 else 5
        add(f"scan-p{p}", check_scan, 2, 1, p, e, 16, shared=p % 2 == 0, wide=p != 9)
    add("scan-one-direction", check_scan, 1, 2, 40, 33, 16, shared=False)
    add("scan-plain", check_scan, 2, 2, 20, 3, 16, skip=False, bias=False)
    add("scan-chunks-n20", check_scan, 2, 1, 40, 3, 20)
    for dtype, d in itertools.product(DTYPES, (5, 64, 140)):
        add(f"norm-{str(dtype)[6:]}-{d}", check_norm, 11, d, dtype, bias=d != 64)
    add("norm-no-dout", check_norm, 3, 12, DTYPES[1], dout=False)
    add("norm-no-dhidden", check_norm, 3, 12, f32, dhidden=False, bias=True)
    add("norm-alias", check_norm, 3, 12, f32, alias=True)
    add("norm-many-rows", check_norm, 150, 4, f32, bias=True)
    add("norm-wide", check_norm, 2, 4096, f32, bias=True)   # the widest that all kernels take
    add("ties-and-nan-8", check_ties_and_nan, 8)
    add("ties-and-nan-7", check_ties_and_nan, 7)
    for norm in ("layer", "rms"):
        add(f"far-means-{norm}", check_far_means, norm)
    add("nothing", check_nothing)
    return cases


CASES = make_cases()


# ---- building, and the second process

# What the emulator promises to find. All of -fsanitize=undefined compiles twice as long.
SANITIZERS = "address,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"
EMULATED_FLAGS = [
    "-std=c++17", "-Og", "-g1", "-Wall", "-Wno-unknown-pragmas", "-DFASTVIM_EMULATE",
    f"-fsanitize={SANITIZERS}", f"-fno-sanitize-recover={SANITIZERS}", "-include", str(EMULATOR),
]


def run(*command):
    command = [str(part) for part in command]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout[-3000:]}{done.stderr[-6000:]}"
    return done.stdout


class Worker:
    """A Python with the sanitizers loaded, that runs one case after another. If one kills it, the
    next starts anew."""

    def __init__(self, library, folder):
        self.library = library
        self.log_path = folder / "log"
        self.process = None

    def start(self):
        names = ("libasan.so", "libubsan.so")
        preload = " ".join(run("g++", f"-print-file-name={name}").strip() for name in names)
        env = dict(
            os.environ, LD_PRELOAD=preload, ASAN_OPTIONS="detect_leaks=0", OMP_NUM_THREADS="1",
            UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1", PYTHONPATH=str(HERE.parent),
        )
        command = [sys.executable, __file__, str(self.library)]
        with open(self.log_path, "w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, text=True, stdout=subprocess.PIPE, stderr=log,
                env=env, cwd=HERE.parent,
            )

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
            lines = self.log_path.read_text().splitlines()
            answer = "\n".join(line[:300] for line in lines[:40])
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
    library = folder / "emulated.so"
    run("g++", "-fPIC", "-shared", *EMULATED_FLAGS, "-x", "c++", SOURCE, "-o", library)
    worker = Worker(library, folder)
    yield worker
    worker.stop()


@pytest.mark.parametrize("case", CASES)
def test_emulated_kernels(worker, case):
    worker.run(case)


# ---- the emulator itself: does it notice?

KERNELS = {                                                 # name: body
    "barrier": "shared[t] = t; if (t > 3) __syncthreads(); x[t] = 0;",
    "places": """shared[t] = t;
        if (t > 3) __syncthreads();
        else __syncthreads();
        x[t] = 0;""",
    "shuffle": "x[t] = t; if (t != 40) x[t] = __shfl_xor_sync(~0u, x[t], 1);",
    "shared_memory": "shared[t + 1] = t; x[t] = 0;",
    "global_memory": "x[t - 1] = 0;",
    "alignment": """struct alignas(16) Four { float v[4]; };
        reinterpret_cast<Four*>(x + 1)->v[0] = 0;""",
    "overflow": "x[t] = t + (t == 3 ? 2147483647 : 0);",
    "race": "shared[t] = t; if (t < 0) __syncthreads(); x[t] = shared[127 - t];",
    "right": """shared[t] = t; __syncthreads();
        x[t] = shared[127 - t] + __shfl_xor_sync(~0u, float(t), 3);""",
}
NOTICED = {                                                 # name: what the emulator says
    "barrier": "a barrier that not all threads reach",
    "places": "a barrier that",
    "shuffle": "a shuffle with missing threads",
    "shared_memory": "heap-buffer-overflow",
    "global_memory": "heap-buffer-overflow",
    "alignment": "misaligned address",
    "overflow": "signed integer overflow",
}


@pytest.fixture(scope="module")
def execute(tmp_path_factory):
    """One program of all kernels -> a function that runs one of them."""
    parts = []
    for name, body in KERNELS.items():
        parts.append(f"""
__global__ void {name}(float* x) {{ DYNAMIC_SHARED(shared); const int t = threadIdx.x; {body} }}""")
    choices = "".join(f'if (!strcmp(argv[1], "{name}")) chosen = {name};' for name in KERNELS)
    parts.append(f"""
int main(int, char** argv) {{
    void (*chosen)(float*) = nullptr;
    {choices}
    emulator_order(atoi(argv[2]), 0);
    float* x = static_cast<float*>(malloc(128 * sizeof(float)));
    const int error = launch(chosen, 1, dim3(128), 512, nullptr, x);
    for (int i = 0; i < 128; ++i) printf("%.8g ", x[i]);
    return error;
}}""")
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "kernels.cpp").write_text("".join(parts))
    run("g++", *EMULATED_FLAGS, folder / "kernels.cpp", "-o", folder / "kernels")
    env = dict(os.environ, ASAN_OPTIONS="detect_leaks=0")

    def run_kernel(name, order=0):
        command = [folder / "kernels", name, str(order)]
        return subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    return run_kernel


@pytest.mark.parametrize("name", NOTICED)
def test_the_emulator_notices(execute, name):
    done = execute(name)
    assert done.returncode != 0 and NOTICED[name] in done.stderr, done.stderr[-2000:]


def test_the_emulator_runs_threads_in_several_orders(execute):
    assert len({execute("race", order).stdout for order in range(3)}) == 3


def test_the_emulator_runs_correct_kernels(execute):
    done = execute("right")
    assert done.returncode == 0
    assert [float(v) for v in done.stdout.split()] == [127 - t + (t ^ 3) for t in range(128)]


# ---- the real compiler, and a real GPU

@pytest.fixture(scope="module")
def extension():
    """The real extension, as users build it; without a GPU, for sm_80 and sm_90. -> its path"""
    nvcc, why = fastvim_build.find_nvcc()
    if nvcc is None:
        pytest.skip(why)
    return fastvim_build.build_cuda()


def load_extension(path):
    import importlib.util
    spec = importlib.util.spec_from_file_location("scan_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_extension_builds_and_refuses_wrong_arguments(extension):
    module = load_extension(extension)
    fields = len(STRUCTURES["add_norm"])
    with pytest.raises(RuntimeError, match=f"add_norm takes {fields} fields, not 1"):
        module.call("add_norm", [0], 0)
    with pytest.raises(RuntimeError, match="no operation layer_norm"):
        module.call("layer_norm", [0], 0)
    with pytest.raises(TypeError):
        module.call("add_norm", [0] * fields)


def test_every_structure_has_the_fields_that_python_reads(extension):
    """The compiler's sizeof against scan.h as Python reads it: a call with the right number of fields gets as
    far as the GPU, which is missing or refuses the type 9."""
    module = load_extension(extension)
    for name, fields in STRUCTURES.items():
        numbers = [9 if field.name == "dtype" else int(field.type == "int64_t") for field in fields]
        if "scan" not in name:
            with pytest.raises(RuntimeError, match="CUDA|driver|cuda"):
                module.call(name, numbers, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("case", CASES if torch.cuda.is_available() else [])
def test_kernels_on_a_gpu(extension, case):
    CASES[case](Extension(load_extension(extension)))


if __name__ == "__main__":
    work(sys.argv[1])
