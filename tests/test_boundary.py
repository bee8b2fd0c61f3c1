"""The boundary to C, by random calls: whatever reaches it ends in an error of one sentence or in the
numbers of plain PyTorch, never in a crash.

    PYTHONPATH=. python tests/test_boundary.py --minutes 20 --seed 1

runs as many calls as go into 20 minutes, with scan_cpu.cpp built under the address and
undefined-behaviour sanitizers; a call that kills its process is printed. The test suite makes a few
hundred, the same ones each time.
"""
import argparse
import contextlib
import copy
import ctypes
import math
import os
import pathlib
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import nn

import fastvim
import fastvim_build
import fastvim_kernels
from fastvim import CLASS, HOLE, Grid, GridWithHoles
from fastvim_kernels import KERNELS, pack, weights_of

HERE = pathlib.Path(__file__).resolve().parent
REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError)
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 4e-2}


class Sub(torch.Tensor):
    pass


# ---- tensors of the same numbers in other forms, and of other numbers ----------------------------


def with_offset(t):
    """At an odd place of a larger storage."""
    memory = torch.full((t.numel() + 7,), math.nan).to(t.dtype)
    memory[3:3 + t.numel()] = t.flatten()
    return memory[3:3 + t.numel()].view(t.shape)


def negated(t):
    """The imaginary part of a conjugate, which is stored with the other sign."""
    return torch.complex(torch.zeros_like(t), -t).conj().imag


def one_stride(t):
    """Odd strides for axes of length 1."""
    strides = [1000 + i if n == 1 else s for i, (n, s) in enumerate(zip(t.shape, t.stride()))]
    return t.as_strided(t.shape, strides)


FORMS = {
    "as it is": lambda t: t,
    "offset": with_offset,
    "transposed": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "every second": lambda t: torch.stack([t, t], -1)[..., 0],
    "strides of ones": one_stride,
    "negated": lambda t: negated(t) if t.dtype == torch.float32 else t,
    "negative view": lambda t: torch._neg_view(-t) if t.is_floating_point() else t,
    "inference": lambda t: in_inference(t),
    "leaf": lambda t: t.detach().requires_grad_(t.is_floating_point()),
    "sparse": lambda t: t.to_sparse(),
    "mkldnn": lambda t: t.to_mkldnn() if t.dtype == torch.float32 else t,
    "subclass": lambda t: t.as_subclass(Sub),
}
OTHERS = {                                      # for these the call must not succeed
    "double": lambda t: t.double(),
    "integers": lambda t: t.long(),
    "half": lambda t: t.half(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t + 0j,
    "one more": lambda t: torch.cat([t, t[..., -1:]], -1) if t.ndim else t,
    "flat": lambda t: t.flatten() if t.ndim != 1 else t[None],
    "empty": lambda t: t.flatten()[:0],
    "a number": lambda t: t.new_zeros(()),
    "an axis more": lambda t: t[None],
    "meta": lambda t: t.to("meta"),
    "first half": lambda t: t[:len(t) // 2],
    "nested": lambda t: torch.nested.nested_tensor([t]),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
}
VALUES = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e38, -1e38, 1e-42]


def in_inference(t):
    with torch.inference_mode():
        return t.clone()


def draw_tensor(draw, *shape, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    t = torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu") * scale
    if t.numel() and draw(st.integers(0, 15)) == 15:
        t.view(-1)[draw(st.integers(0, t.numel() - 1))] = draw(st.sampled_from(VALUES))
    return t.to(dtype)


def change(draw, tensors: dict, least=0):
    """Some of the tensors in other forms -> the same, and whether the numbers are others, too."""
    tensors = dict(tensors)
    other = False
    names = [name for name, t in tensors.items() if isinstance(t, torch.Tensor)]
    for _ in range(draw(st.integers(least, 2))):
        how = draw(st.sampled_from(sorted(FORMS) * 2 + ([] if other else sorted(OTHERS))))
        if not names:
            break
        name = draw(st.sampled_from(names))
        try:
            tensors[name] = {**FORMS, **OTHERS}[how](tensors[name])
        except REFUSALS:                        # a combination that PyTorch does not know
            continue
        if how in OTHERS:
            other = True
            names.remove(name)
    return tensors, other


# ---- calls ---------------------------------------------------------------------------------------


def draw_grid(draw, b, pool):
    """-> Grid or GridWithHoles, and the number of tokens that it walks."""
    storage = draw(st.sampled_from(["h w", "h w c", "c h w"]))
    axes = storage.split()
    sizes = tuple((axis, draw(st.sampled_from([1, 1, 2, 3, 5, 9]))) for axis in axes)
    order = " ".join(draw(st.permutations(axes)))
    pooled = " ".join(draw(st.lists(st.sampled_from(axes), unique=True, max_size=len(axes) - 1)))
    grid = Grid(storage, order, pooled, sizes, 1.0 if pool == "max" else 0.25)
    cells = math.prod(n for _, n in sizes)
    if draw(st.booleans()) or not b:
        return grid, cells
    kept = draw(st.integers(1, cells))
    rows = draw(st.sampled_from([1, b]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    ids = torch.stack([torch.randperm(cells, generator=generator)[:kept].sort().values
                       for _ in range(rows)])
    for row in ids:
        row[kept - draw(st.integers(0, kept - 1)):] = HOLE
    class_token = draw(st.booleans())
    if class_token:
        ids = torch.cat([torch.full((rows, 1), CLASS), ids], 1)
    grid = GridWithHoles(grid, ids, class_token, pool == "mean" and draw(st.booleans()))
    return grid, ids.shape[1]


def draw_block(draw):
    """-> xz, SSMWeights, grid"""
    b = draw(st.sampled_from([0, 1, 2, 3]))
    e = draw(st.sampled_from([1, 2, 5, 16, 17, 40]))
    n = draw(st.sampled_from([1, 3, 4, 16]))
    r = draw(st.sampled_from([1, 3]))
    pool = draw(st.sampled_from(["mean", "max"]))
    grid, length = draw_grid(draw, b, pool)
    norm = draw(st.sampled_from([None, "rmsnorm", "layernorm"]))
    if norm is not None:
        norm = fastvim.NORMS[norm](e, device="cpu", dtype=torch.float32)
        for p in norm.parameters():
            p.data = draw_tensor(draw, e)
    w = fastvim.SSMWeights(
        draw_tensor(draw, 2, e, 4), draw_tensor(draw, 2, e), draw_tensor(draw, 2, r + 2 * n, e),
        draw_tensor(draw, 2, e, r), draw_tensor(draw, 2, e), draw_tensor(draw, 2, e, n),
        draw_tensor(draw, 2, e), None, None, norm, pool, draw(st.booleans()))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
    return draw_tensor(draw, b, length, 2 * e, dtype=dtype), w, grid


def plain_copy(v):
    """The same in float64, contiguous, in memory of its own."""
    if isinstance(v, nn.Module):
        return copy.deepcopy(v).double()
    if not isinstance(v, torch.Tensor):
        return v
    if v.is_quantized:
        v = v.dequantize()
    if v.layout != torch.strided:
        v = v.to_dense()
    v = v.detach().as_subclass(torch.Tensor).resolve_neg()
    return (v.double() if v.is_floating_point() else v).clone(memory_format=torch.contiguous_format)


def attempt(function, *arguments, **options):
    """-> result or None, the refusal or None"""
    try:
        return function(*arguments, **options), None
    except REFUSALS as error:
        return None, error


def check_refusal(error):
    """One sentence, but for those that PyTorch itself says of kinds of tensors that it cannot add."""
    said = str(error)
    if said.startswith("Could not run 'aten::") or "NestedTensor" in said:
        return
    assert said and "\n" not in said.strip() and len(said) < 900, repr(error)


def error_of(actual, expected) -> float:
    """Relative to the largest number; of what overflows in float32, nothing is asked."""
    actual = plain_copy(actual)
    assert actual.shape == expected.shape
    if expected.numel() == 0 or not expected.isfinite().all() or expected.abs().max() > 1e15:
        return 0.0
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-2)
    return error.nan_to_num(math.inf).item()


def grads_of(outputs, inputs):
    """Of a loss that tells the outputs' numbers apart."""
    loss = sum((y * torch.cos(torch.arange(y.numel(), device="cpu", dtype=torch.float64)
                              .view(y.shape)).to(y.dtype)).sum()
               for y in outputs if y is not None and y.requires_grad)
    if not isinstance(loss, torch.Tensor):
        return []
    return torch.autograd.grad(loss, inputs, allow_unused=True)


def is_huge(v):
    if not isinstance(v, torch.Tensor) or v.device.type == "meta" or v.dtype == torch.bool:
        return False
    if v.is_nested:                             # PyTorch has no any() of these
        return False
    return bool((plain_copy(v).abs() > 1e15).any())


def compare(other, tolerance, call, plain, tensors: dict, rest: tuple, backward: bool):
    """call and plain take (tensors, *rest) -> a list of outputs. other: some tensor is not what it
    should be. -> whether the call was computed, and not refused"""
    if backward and not other:
        tensors = {k: t.detach().requires_grad_() if t is not None and t.is_floating_point()
                   and not t.is_inference() else t for k, t in tensors.items()}

    def run(function, tensors, *rest):
        """-> outputs, then the gradients of what wants them, or None"""
        with contextlib.nullcontext() if backward else torch.no_grad():
            outputs = list(function(tensors, *rest))
        leaves = [t for t in tensors.values() if t is not None and t.requires_grad]
        grads = grads_of(outputs, leaves) if backward and leaves else []
        return [*outputs, *grads]

    def run_copies(change_type):
        copies = {k: change_type(plain_copy(t)) for k, t in tensors.items()}
        for k, t in tensors.items():
            if t is not None and t.requires_grad:
                copies[k].requires_grad_()
        return [None if t is None else plain_copy(t)
                for t in run(plain, copies, *(change_type(plain_copy(v)) for v in rest))]
    actual, refusal = attempt(run, call, tensors, *rest)
    if refusal is not None:
        check_refusal(refusal)
        return False
    if any(map(is_huge, tensors.values())):
        return True
    expected, refusal = attempt(run_copies, lambda v: v)
    if refusal is not None:                     # kernels convert types of which PyTorch makes none
        assert other, f"plain PyTorch refuses: {refusal}"
        return True
    if other:
        tolerance = max(tolerance, 4e-2)        # float16, perhaps
    errors = [0.0 if b is None else error_of(torch.zeros_like(b) if a is None else a, b)
              for a, b in zip(actual, expected, strict=True)]
    if max(errors, default=0.0) > tolerance:    # is the task so hard in float32?
        usual = [0.0 if b is None else error_of(torch.zeros_like(b) if a is None else a, b)
                 for a, b in zip(run_copies(to_float32), expected, strict=True)]
        assert max(errors) < 20 * max(usual), f"error {max(errors):.1e}, usually {max(usual):.1e}"
    return True


def to_float32(v):
    if isinstance(v, nn.Module):
        return v.float()
    return v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v


def one_scan(draw, backend):
    k, b = draw(st.sampled_from([1, 2])), draw(st.sampled_from([0, 1, 3]))
    p, e = draw(st.sampled_from([1, 2, 17, 33])), draw(st.sampled_from([1, 5, 16, 37]))
    n = draw(st.sampled_from([1, 3, 4, 64]))
    tensors = dict(
        x=draw_tensor(draw, k, b, p, e), dt=draw_tensor(draw, k, b, p, e),
        A=-draw_tensor(draw, k, e, n).abs(), B=draw_tensor(draw, k, b, p, n),
        C=draw_tensor(draw, k, b, p, n), D=draw_tensor(draw, k, e),
        dt_bias=draw(st.one_of(st.none(), st.just(draw_tensor(draw, k, e)))))
    tensors, other = change(draw, tensors)
    return compare(other, 2e-4, lambda t: [backend.selective_scan(**t)],
                   lambda t: [fastvim.selective_scan(**t)], tensors, (), False)


def one_block(draw, backend):
    xz, w, grid = draw_block(draw)
    tensors = {"xz": xz, **{k: t for k, t in w._asdict().items() if isinstance(t, torch.Tensor)}}
    tensors, other = change(draw, tensors)
    kind = draw(st.sampled_from(["ssm", "ssm", "conv_pool", "expand_gate"]))
    bf16 = xz.dtype == torch.bfloat16
    tolerance = TOLERANCE[xz.dtype]
    backward = kind == "ssm" and draw(st.booleans()) and not (bf16 and w.pool == "max")

    def weights(t, layernorm):
        return w._replace(**{k: v for k, v in t.items() if k != "xz"}, layernorm=layernorm)

    s = draw_tensor(draw, 2, len(xz), grid.steps, xz.shape[2] // 2)
    c = torch.zeros(2, *xz.shape[:2], xz.shape[2] // 2, dtype=torch.float64)

    def run(by, t, layernorm, s, convolve=None):
        w = weights(t, layernorm)
        if kind == "ssm":
            return [by.ssm(t["xz"], w, grid)]
        if kind == "conv_pool":
            return [by.conv_pool(t["xz"], w, grid)[1]]
        if convolve is not None:
            x, _ = t["xz"].chunk(2, -1)
            return [by.expand_gate(t["xz"], convolve(grid.flatten(x), w.conv_weight, w.conv_bias),
                                   s, w, grid)]
        return [by.expand_gate(t["xz"], c, s, w, grid)]

    return compare(other, tolerance, lambda t, norm, s: run(backend, t, norm, s),
                   lambda t, norm, s: run(fastvim.Backend, t, norm, s, fastvim.conv_silu),
                   tensors, (w.layernorm, s), backward)


def one_norm(draw, backend):
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3]), min_size=1, max_size=2))
    d = draw(st.sampled_from([1, 5, 16, 33]))
    norm = fastvim.NORMS[draw(st.sampled_from(["rmsnorm", "layernorm"]))](
        d, device="cpu", dtype=torch.float32)
    tensors = dict(hidden=draw_tensor(draw, *shape, d), residual=draw_tensor(draw, *shape, d))
    tensors, other = change(draw, tensors)
    return compare(other, 2e-4, lambda t, norm: backend.add_norm(t["hidden"], t["residual"], norm),
                   lambda t, norm: fastvim.add_norm(t["hidden"], t["residual"], norm),
                   tensors, (norm,), draw(st.booleans()))


INT_TABLES = ("token", "group", "member", "start")


def one_operation(draw, backend):
    """torch.ops.fastvim: arguments that the schema allows and that make no sense."""
    xz, w, grid = draw_block(draw)
    weights = weights_of(w)._asdict()
    kind = draw(st.sampled_from(["ssm", "ssm_backward", "add_norm", "add_norm_backward"]))
    name = draw(st.sampled_from([backend.name] * 12 + ["", "CPU", "python"]))
    if kind.startswith("add_norm"):
        d = draw(st.sampled_from([1, 5, 33]))
        shape = (2, draw(st.sampled_from([0, 1, 3])), d)
        tensors = dict(hidden=draw_tensor(draw, *shape), residual=draw_tensor(draw, *shape),
                       weight=draw_tensor(draw, d), bias=draw_tensor(draw, d))
        if kind == "add_norm_backward":
            tensors = dict(du=tensors.pop("hidden"), dout=draw_tensor(draw, *shape), **tensors)
        changed, other = change(draw, tensors, 1)
        operation = getattr(torch.ops.fastvim, kind)

        def call(t):
            return operation(*t.values(), name)
        return check_operation(call, tensors, changed, other)
    tables = fastvim_kernels.unpack(torch.device("cpu"), *pack(grid))._asdict()
    rest = dict(zip(("storage", "order", "pooled", "lengths", "slot", "scale"), pack(grid)[5:]))
    if draw(st.booleans()):
        rest.update(storage="")
    else:
        tables = dict.fromkeys(tables)
    saved = {}
    if kind == "ssm_backward":
        with torch.no_grad():
            y, *values = torch.ops.fastvim.ssm(
                xz, *weights.values(), *pack(grid), w.pool, w.skip_before_expand, backend.name)
        saved = dict(zip(("dy", "pooled", "argmax", "s"), (torch.ones_like(y), *values)))
    tensors = {**saved, "xz": xz, **weights, **tables}
    changed, other = change(draw, tensors, 1)
    pool = draw(st.sampled_from([w.pool] * 9 + ["attention", "min", ""]))
    wrong = pool != w.pool or name != backend.name
    if draw(st.integers(0, 3)) == 0:
        key = draw(st.sampled_from(sorted(rest)))
        bad = {"lengths": [[], [-1], [0], [2 ** 62], [2 ** 31, 2 ** 33], [3, 3, 3, 3]],
               "scale": [1.0, 0.25], "slot": [None, 0, 3, -1, 2 ** 40], "storage": ["h", "w h", "a b c", "h h", "-", "( )", "1 2"],
               "order": ["", "h", "h w c x", "h h", "...", "w h"], "pooled": ["x", "h h h", "h w c"]}
        rest[key] = draw(st.sampled_from(bad[key]))
        wrong = True
    table = draw(st.sampled_from(INT_TABLES))
    if tables["token"] is not None and changed[table] is not None and draw(st.booleans()):
        t = changed[table]
        if type(t) is torch.Tensor and t.layout == torch.strided and t.device.type == "cpu" \
                and not t.is_nested and t.numel() and not t.is_quantized and not t.is_inference():
            t = changed[table] = t.clone(memory_format=torch.contiguous_format)
            t.view(-1)[draw(st.integers(0, t.numel() - 1))] = draw(st.sampled_from(
                [-2 ** 31, -2, -1, 0, 1, 2, 1000, 10 ** 9, 2 ** 31 - 1])) \
                if t.dtype == torch.int32 else 0
            wrong = True

    def call(t):
        tables = [t[k] for k in fastvim_kernels.Walk._fields]
        rows = [t[k] for k in (*saved, "xz", *weights)]
        return getattr(torch.ops.fastvim, kind)(
            *rows, *tables, *rest.values(), pool, w.skip_before_expand, name)
    return check_operation(call, tensors, changed, other, wrong)


def check_operation(call, tensors, changed, other, wrong=False):
    """A refusal, or what clean tensors give; not its bits: matrix products depend on alignment."""
    with torch.no_grad():
        result, refusal = attempt(call, changed)
    if refusal is not None:
        check_refusal(refusal)
        return False
    if not wrong and not other:
        with torch.no_grad():
            expected = call(tensors)
        for a, b in zip(result, expected, strict=True):
            assert error_of(a.double(), b.double()) < 1e-2
    return True


def one_model(draw, backend):
    fields = dict(img_size=16, patch_size=8, embed_dim=8, depth=2, d_state=2, num_classes=3)
    fields.update(draw(st.sampled_from([
        {}, dict(schedule="vim", class_token=True), dict(schedule="fastchannelvim", in_chans=3),
        dict(pool="max"), dict(ssm_norm=None, block_norm="layernorm")])))
    torch.manual_seed(0)
    model = fastvim.FastVim(**fields).eval()
    b = draw(st.sampled_from([0, 1, 2]))
    tensors = dict(x=draw_tensor(draw, b, 3, *draw(st.sampled_from([(16, 16), (8, 24), (3, 1)]))))
    tensors, other = change(draw, tensors)
    keep = draw(st.sampled_from([None, None, [[0]], [[0, 1], [2, -1]], [[3, 0], [1, 2]], [[-1]],
                                 [[99]], [[2 ** 40]], [], "x", 3, torch.zeros(b, 1),
                                 torch.zeros(b, 1).long(), torch.zeros(b, 0).long()]))
    channels = draw(st.sampled_from([None, None, None, [0, 1, 2], [2, 0, 1], [0, 0, 0], [7], 1]))
    reference = copy.deepcopy(model).double()

    def plain(t):
        model_of_type = reference if t["x"].dtype == torch.float64 else model
        return run_model(fastvim.BACKENDS["python"], model_of_type, t["x"])

    def run_model(backend, model, x):
        with fastvim.use_backend(backend.name):
            return [model(x, keep, channels)]
    return compare(other, 2e-4, lambda t: run_model(backend, model, t["x"]), plain, tensors, (),
                   draw(st.booleans()))


KINDS = [one_scan, one_block, one_norm, one_operation, one_operation, one_model]
DEFAULTS = [torch.float32, torch.float32, torch.float64, torch.bfloat16]


def random_call(draw, backend, log=lambda kind: None):
    """-> whether it was computed, not refused"""
    kind = draw(st.sampled_from(KINDS))
    log(kind.__name__)
    default = draw(st.sampled_from(DEFAULTS))
    if kind is not one_model:                   # whose own parameters would be of that type
        torch.set_default_dtype(default)
    fastvim_kernels.full_walk.cache_clear()     # tables of earlier calls could hide wrong ones
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind(draw, backend)
    finally:
        torch.set_default_dtype(torch.float32)


QUIET = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))


@settings(max_examples=200, derandomize=True, **QUIET)
@given(st.data())
def test_random_calls(data):
    backend = fastvim.BACKENDS["cpu"]
    assert backend.problem() is None, backend.problem()
    random_call(data.draw, backend)


# ---- what random calls have found, and their neighbours -------------------------------------------


def block(pool="mean"):
    """-> (kind -> arguments of torch.ops.fastvim by name), in the order of the schema; the walk is
    given by its tables: 3 x 2 tokens, pooled to 3 steps, two images."""
    torch.manual_seed(0)
    norm = nn.LayerNorm(5)
    w = fastvim.SSMWeights(
        torch.randn(2, 5, 4), torch.randn(2, 5), torch.randn(2, 7, 5), torch.randn(2, 5, 1),
        torch.randn(2, 5), torch.randn(2, 5, 3), torch.randn(2, 5), None, None, norm, pool, False)
    grid = Grid("h w", "h w", "w", (("h", 3), ("w", 2)))
    walk = fastvim_kernels.unpack(torch.device("cpu"), *pack(grid))
    forward = dict(
        xz=torch.randn(2, 6, 10), **weights_of(w)._asdict(), **walk._asdict(), storage="", order="",
        pooled="", lengths=[], slot=None, scale=1.0, pool=pool, skip=False, backend="cpu")
    with torch.no_grad():
        y, pooled, argmax, s = torch.ops.fastvim.ssm(*forward.values())
    saved = dict(dy=torch.ones_like(y), saved_pooled=pooled, argmax=argmax, s=s)
    return dict(ssm=forward, ssm_backward={**saved, **forward})


def call_block(kind, pool="mean", **changes):
    arguments = block(pool)[kind]
    assert changes.keys() <= arguments.keys()
    with torch.no_grad():
        return getattr(torch.ops.fastvim, kind)(*{**arguments, **changes}.values())


def int32(*rows):
    return torch.tensor(rows, dtype=torch.int32)


ASTRAY = {                                      # of token 0 .. 5, group 0 0 1 1 2 2
    "a token beyond the image": dict(token=int32([0, 1, 2, 3, 4, 6])),
    "a token far beyond the image": dict(token=int32([0, 1, 2, 3, 4, 2 ** 31 - 1])),
    "a token before the image": dict(token=int32([-1, 1, 2, 3, 4, 5])),
    "a token twice": dict(token=int32([0, 1, 2, 3, 4, 4])),
    "a step beyond the last": dict(group=int32([0, 0, 1, 1, 2, 3])),
    "a step far beyond the last": dict(group=int32([0, 0, 1, 1, 2, 10 ** 9])),
    "a step before holes": dict(group=int32([0, 0, 1, 1, 2, -2])),
}


@pytest.mark.parametrize("kind", ["ssm", "ssm_backward"])
@pytest.mark.parametrize("what", ASTRAY)
def test_a_walk_that_leads_out_of_its_image(kind, what):
    with pytest.raises(ValueError, match="tables of the walk must visit every token once"):
        call_block(kind, **ASTRAY[what])


def four(*shape):
    return torch.zeros(*shape, dtype=torch.float32)


SENSELESS = {                                   # arguments, what the sentence says
    "no steps": (dict(start=int32([0])), "do not fit a walk"),
    "no edges": (dict(start=int32([])), "do not fit a walk"),
    "a group too short": (dict(group=int32([0, 0, 1])), r"group must have the shape \(1, 6\)"),
    "members too short": (dict(member=int32([0, 1])), r"member must have the shape \(1, 6\)"),
    "weights too short": (dict(weight=four(1, 3)), r"weight must have the shape \(1, 6\)"),
    "no token table": (dict(token=None), "storage of a full grid or all five tables"),
    "an odd width": (dict(xz=four(2, 6, 11)), r"xz must have the shape \(2, 6, 10\)"),
    "no images' axis": (dict(xz=four(6, 10)), r"expected xz \(b l 2e\)"),
    "no backend": (dict(backend="abacus"), "no kernels are called 'abacus'.*cpu"),
    "no pooling": (dict(pool="attention"), "pool='attention'"),
    "float16": (dict(xz=torch.zeros(2, 6, 10, dtype=torch.float16)), "no torch.float16"),
    "a grid that is huge": (dict(storage="h w", order="h w", pooled="w", lengths=[2 ** 40, 2 ** 9]),
                            "do not fit a walk"),
    "no such order": (dict(storage="h w", order="h h", pooled="w", lengths=[3, 2]),
                      "no grid is stored as 'h w', walked as 'h h'"),
    "no such axis": (dict(storage="h w", order="h w", pooled="c", lengths=[3, 2]), "pooled over"),
    "one length": (dict(storage="h w", order="h w", pooled="w", lengths=[6]), "lengths"),
    "a pattern": (dict(storage="(h w)", order="(h w)", pooled="", lengths=[3, 2]), "no grid"),
    "negative lengths": (dict(storage="h w", order="h w", pooled="w", lengths=[-3, -2]), "lengths"),
    "a class token outside": (dict(storage="h w", order="h w", pooled="w", lengths=[5, 1], slot=6),
                              "no grid.* a class token at 6"),
    "a class token of tables": (dict(slot=0), "either the storage of a full grid or all five"),
    "tensors without memory": (dict(D=torch.zeros(2, 5, device="meta")), "on one device"),
}


@pytest.mark.parametrize("kind", ["ssm", "ssm_backward"])
@pytest.mark.parametrize("what", SENSELESS)
def test_senseless_arguments_of_a_block(kind, what):
    changes, sentence = SENSELESS[what]
    with pytest.raises((ValueError, TypeError), match=sentence) as caught:
        call_block(kind, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, value", [
    ("s", four(2, 2, 2, 5)), ("s", four(2, 2, 3, 4)), ("saved_pooled", four(2, 2, 2, 5)),
    ("argmax", torch.zeros(0)), ("argmax", torch.zeros(2, 2, 1, 5, dtype=torch.int32)),
    ("dy", four(2, 5, 5)), ("dy", four(1, 6, 5))])
def test_what_the_way_back_is_given(name, value):
    with pytest.raises((ValueError, TypeError), match="must"):
        call_block("ssm_backward", pool="max", **{name: value})


@pytest.mark.parametrize("masked", [False, True])
def test_tables_do_not_depend_on_the_default_type(masked):
    """Shares of a third, which bfloat16 has not."""
    def tables():
        fastvim_kernels.full_walk.cache_clear()
        grid = Grid("h w", "h w", "w", (("h", 2), ("w", 3)), 0.7)
        if masked:
            grid = GridWithHoles(grid, torch.tensor([[0, 1, 3]]))
        return fastvim_kernels.unpack(torch.device("cpu"), *pack(grid)).weight
    expected = tables()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert tables().equal(expected)
    finally:
        torch.set_default_dtype(torch.float32)
        fastvim_kernels.full_walk.cache_clear()


def test_maxima_have_no_scale():
    with pytest.raises(ValueError, match=r"scale=0.5"):
        call_block("ssm", pool="max", scale=0.5)


@pytest.mark.parametrize("kind, shapes, match", [
    ("add_norm", [(2, 3, 5), (2, 2, 5), (5,), (5,)], "hidden must have the shape"),
    ("add_norm", [(2, 2, 5), (2, 3, 5), (5,), (5,)], "hidden must have the shape"),
    ("add_norm", [(3, 2, 5), (2, 3, 5), (5,), (5,)], "hidden must have the shape"),
    ("add_norm", [(2, 3, 5), (2, 3, 5), (5,), (4,)], "bias must have the shape"),
    ("add_norm", [(2, 3, 5), (2, 3, 5), (6,), (6,)], "does not fit"),
    ("add_norm", [(2, 3, 0), (2, 3, 0), (0,), (0,)], "does not fit"),
    ("add_norm", [(), (), (), ()], "hidden must have the shape"),
    ("add_norm_backward", [(2, 2, 5), (2, 3, 5), (2, 3, 5), (5,), (5,)], "du must have the shape"),
    ("add_norm_backward", [(2, 3, 5), (2, 1, 5), (2, 3, 5), (5,), (5,)], "dout must have the"),
])
def test_add_norm_of_other_shapes(kind, shapes, match):
    with pytest.raises(ValueError, match=match):
        getattr(torch.ops.fastvim, kind)(*map(four, shapes), "cpu")


def resized(t):
    """As fully_shard leaves a parameter between its uses."""
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


SCAN = dict(k=2, b=1, p=3, e=4, n=2)


def scan_values():
    k, b, p, e, n = SCAN.values()
    return fastvim_kernels.scan_values(
        four(k, b, p, e), four(k, b, p, e), four(k, e, n), four(k, b, p, n), four(k, b, p, n))


NOT_IN_MEMORY = {
    "resized": resized,
    "negative": torch._neg_view,
    "zeros": lambda t: torch._efficientzerotensor(t.shape),
    "mkldnn": lambda t: t.to_mkldnn(),
    "sparse rows": lambda t: t[0].to_sparse_csr(),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "meta": lambda t: t.to("meta"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR|The PyTorch API of nested")
@pytest.mark.parametrize("kind", NOT_IN_MEMORY)
def test_tensors_whose_numbers_are_not_in_memory(kind):
    value = NOT_IN_MEMORY[kind](four(2, 1, 3, 4))
    with pytest.raises(TypeError, match="dt must be a contiguous torch.float32 tensor on cpu"):
        KERNELS["cpu"].run("selective_scan", {**scan_values(), "dt": value})


@pytest.mark.parametrize("value", [np.int64(3), torch.tensor(3), 3.0, True, None], ids=repr)
def test_sizes_that_are_no_python_integers(value):
    with pytest.raises(TypeError, match="p must be a Python integer"):
        KERNELS["cpu"].run("selective_scan", {**scan_values(), "p": value})


@pytest.mark.parametrize("size", [0, -1, 2 ** 31, 2 ** 62, 2 ** 80])
def test_sizes_out_of_range(size):
    with pytest.raises(ValueError, match="p must be 1 to"):
        KERNELS["cpu"].run("selective_scan", {**scan_values(), "p": size})


@pytest.mark.parametrize("field", ["x", "A", "B", "s"])
def test_tensors_smaller_than_the_sizes_say(field):
    with pytest.raises(ValueError, match=rf"{field} must have the shape"):
        KERNELS["cpu"].run("selective_scan",
                           {**scan_values(), "s": four(2, 1, 3, 4), field: four(2, 1, 1, 1)})


def test_kernels_of_another_device():
    """All tensors agree, so it is the library that says what it runs on."""
    assert KERNELS["cpu"].problem() is None
    with pytest.raises(ValueError, match="cpu kernels cannot run on cuda:0"):
        KERNELS["cpu"]._library("selective_scan", [0] * 14, torch.device("cuda:0"))


@pytest.mark.parametrize("operation, sizes", [
    ("selective_scan_backward", dict(k=1, b=1, p=2 ** 57, e=1, n=1)),       # before the threads
    ("selective_scan", dict(k=1, b=1, p=1, e=1, n=2 ** 55))])               # in one of them
def test_short_of_memory_is_an_error_and_not_the_end(operation, sizes):
    assert KERNELS["cpu"].problem() is None
    fields = fastvim_kernels.structures()[operation]
    numbers = [sizes.get(field.name, 0) for field in fields]
    with pytest.raises(RuntimeError, match=f"{operation}: out of memory"):
        KERNELS["cpu"]._library(operation, numbers, torch.device("cpu"))


# ---- for longer, under the sanitizers ------------------------------------------------------------

# What a bad call could lead to. All of -fsanitize=undefined compiles for many minutes.
CHECKS = "address,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"
SANITIZERS = [f"-fsanitize={CHECKS}", f"-fno-sanitize-recover={CHECKS}"]


def load_sanitized():
    """scan_cpu.cpp on one thread, with checks of every access to memory and of every overflow."""
    flags = ["-std=c++17", "-O1", "-g", "-march=native", "-shared", "-fPIC", *SANITIZERS]
    sources = [str(HERE.parent / name) for name in ("scan_cpu.cpp", "scan.h")]
    name = fastvim_build.name_build("scan_sanitized", sources, flags)
    path = os.path.join(fastvim_build.cache_folder(), f"{name}.so")
    if not os.path.exists(path):
        subprocess.run(["g++", *flags, sources[0], "-o", f"{path}.tmp"], check=True)
        os.replace(f"{path}.tmp", path)
    return fastvim_build.caller(ctypes.CDLL(path))


def run_for(minutes: float, first_seed: int):
    """Calls under the sanitizers until the time is over; stops at the first that goes wrong."""
    torch.set_num_threads(1)
    KERNELS["cpu"]._load = load_sanitized
    backend = fastvim.BACKENDS["cpu"]
    assert backend.problem() is None, backend.problem()
    counts = {}
    end = time.monotonic() + 60 * minutes
    round_ = first_seed
    while time.monotonic() < end:
        @seed(round_)
        @settings(max_examples=500, phases=[Phase.generate], **QUIET)
        @given(st.data())
        def calls(data):
            kind = []
            computed = random_call(data.draw, backend, kind.append)
            key = (kind[0], "computed" if computed else "refused")
            counts[key] = counts.get(key, 0) + 1
        print(f"seed {round_}", flush=True)     # the last one printed is the one that crashed
        calls()
        round_ += 1
    print(f"seeds {first_seed} to {round_ - 1}, {sum(counts.values())} calls, nothing found")
    for key, count in sorted(counts.items()):
        print(f"{count:8}", *key)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if "LD_PRELOAD" not in os.environ:          # the sanitizers must be loaded before Python
        names = ("libasan.so", "libubsan.so")
        paths = [subprocess.run(["g++", f"-print-file-name={name}"], check=True, text=True,
                                capture_output=True).stdout.strip() for name in names]
        environment = dict(os.environ, LD_PRELOAD=" ".join(paths), ASAN_OPTIONS="detect_leaks=0",
                           UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1")
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    run_for(args.minutes, args.seed)


if __name__ == "__main__":
    main()
