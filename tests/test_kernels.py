"""The compiled backends: every operation and the whole mixer against plain PyTorch in float64,
outputs and gradients; autocast, torch.compile, checkpointing; the same bits twice;
the boundary to C; bad input. Each on its own device, which is the default one in its tests."""
import contextlib
import copy
import functools
import math
import os
import platform
import subprocess
import sys
import threading

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

import checks
import fastvim
import fastvim_kernels
from fastvim import CLASS, HOLE, Grid, GridWithHoles
from fastvim_kernels import (
    KERNELS,
    pack,
    read_ssm,
    run_add_norm,
    run_add_norm_backward,
    run_ssm,
    run_ssm_backward,
    scan_values,
    weights_of,
)
from helpers import images, outputs_and_gradients, random_keep, tiny, walk_of

PYTHON = fastvim.BACKENDS["python"]
# What PyTorch sees of an operation is the same, whatever library runs it: no need of the emulator
REAL = [name for name in KERNELS if name != "cuda-emulated"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}    # of the largest


@pytest.fixture(params=KERNELS)
def backend(request):
    backend = fastvim.BACKENDS[request.param]
    if backend.devices == ("cuda",) and not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert backend.problem() is None, backend.problem()
    with fastvim.use_backend(backend.name), torch.device(*backend.devices or ["cpu"]):
        yield backend


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    """Of patches on a GPU: in float32 all through, and the same bits twice."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def here(v):
    """What was made on the CPU, on the device under test; anything else as it is."""
    if isinstance(v, nn.Module) or isinstance(v, torch.Tensor) and v.device.type == "cpu":
        return v.to(torch.get_default_device())
    return v


@contextlib.contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def relative_error(values, references):
    """The largest error of any tensor, relative to its reference's largest value; what ought to be
    NaN must be."""
    worst = 0.0
    for v, r in zip(values, references, strict=True):
        if r is None or r.numel() == 0:
            assert v is None or v.shape == r.shape
            continue
        v = v.detach().double()
        r = r.to(v)
        assert v.shape == r.shape
        error = (v - r).abs().max() / r.abs().max().clamp(min=1e-3)
        worst = max(worst, error.nan_to_num(math.inf).item())
    return worst


# ---- the operations ------------------------------------------------------------------------------

GRIDS = {                                       # name: (row, storage, lengths, ids or None)
    "rows": (("h w", "w"), "h w", dict(h=3, w=5), None),
    "columns": (("w h", "h"), "h w", dict(h=3, w=5), None),
    "one token": (("h w", "w"), "h w", dict(h=1, w=1), None),
    "one row": (("h w", "w"), "h w", dict(h=1, w=9), None),
    "wide rows": (("h w", "w"), "h w", dict(h=2, w=37), None),
    "channels apart": (("w h c", "h"), "h w c", dict(h=4, w=3, c=2), None),
    "channels outside": (("c w h", "h"), "c h w", dict(c=2, h=4, w=3), None),
    "few groups": (("h w c", "h w"), "h w c", dict(h=5, w=7, c=2), None),
    "vim": (("h w", ""), "h w", dict(h=3, w=7), None),
    "across": (("w h", ""), "h w", dict(h=3, w=7), None),
    "masked": (("w h", "h"), "h w", dict(h=4, w=3), [[0, 2, 5, 8, 11], [1, 4, 7, HOLE, HOLE]]),
    "masked vim": (("h w", ""), "h w", dict(h=4, w=3),
                   [[0, 2, 5, 8, 11], [1, HOLE, HOLE, HOLE, HOLE]]),
    "class token": (("h w", "w"), "h w", dict(h=3, w=2), [[0, 1, 2, CLASS, 3, 4, 5]]),
}


def make_grid(name, pool):
    row, storage, sizes, ids = GRIDS[name]
    scale = 0.7 if pool == "mean" else 1.0
    grid = Grid(storage, *row, tuple(sizes.items()), scale)
    if ids is None:
        return grid
    return GridWithHoles(grid, torch.tensor(ids), class_token=name == "class token")


def make(name, e, n=16, pool="mean", batch=2, norm="layernorm", skip=False):
    """-> grid, xz and weights in float64, the same numbers on every device."""
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape, scale=1.0):
        v = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
        return here(v * scale)
    _, _, sizes, ids = GRIDS[name]
    length = math.prod(sizes.values())
    if ids is not None:
        length = len(ids[0])
        if len(ids) > 1:                                        # else all images are masked alike
            batch = len(ids)
    r = 3
    layernorm = None
    if norm is not None:
        layernorm = fastvim.NORMS[norm](e).double()
        for p in layernorm.parameters():
            p.data = normal(e)
    w = fastvim.SSMWeights(
        conv_weight=normal(2, e, 4, scale=0.5), conv_bias=normal(2, e),
        x_proj=normal(2, r + 2 * n, e, scale=e ** -0.5), dt_proj=normal(2, e, r),
        dt_bias=normal(2, e) - 1, A_log=normal(2, e, n), D=normal(2, e), score_weight=None,
        score_bias=None, layernorm=layernorm, pool=pool, skip_before_expand=skip)
    return make_grid(name, pool), normal(batch, length, 2 * e), w


def leaves(w):
    norm = [] if w.layernorm is None else w.layernorm.parameters()
    return [*w[:7], *norm]


def cast(w, dtype):
    """A copy of all weights, of which gradients can be asked."""
    tensors = {name: t.detach().to(dtype, copy=True).requires_grad_()
               for name, t in w._asdict().items() if isinstance(t, torch.Tensor)}
    return w._replace(**tensors, layernorm=copy.deepcopy(w.layernorm)._apply(
        lambda t: t.to(dtype)) if w.layernorm is not None else None)


def make_float32(*arguments, **options):
    grid, xz, w = make(*arguments, **options)
    return grid, xz.float(), cast(w, torch.float32)


def make_inputs(dtype, name, e, **options):
    """What dtype can hold: grid, xz, weights and dy."""
    grid, xz, w = make(name, e, **options)
    generator = torch.Generator("cpu").manual_seed(1)
    dy = torch.randn(*xz.shape[:2], e, generator=generator, device="cpu")
    return grid, xz.to(dtype), cast(w, torch.float32), here(dy.to(dtype))


@functools.cache
def reference(*arguments, **options):
    """Of make_inputs plain PyTorch's p, s, y and gradients of xz and all weights in float64."""
    with torch.device("cpu"):
        grid, xz, w, dy = make_inputs(*arguments, **options)
    exact = cast(w, torch.float64)
    v = xz.double().requires_grad_()
    c, p = fastvim.conv_pool(v, exact, grid)
    D = exact.D if exact.skip_before_expand else None
    A = -torch.exp(exact.A_log)
    dt, B, C = fastvim.select(p, exact)
    s = fastvim.selective_scan(p, dt, A, B, C, D, exact.dt_bias)
    y = fastvim.expand_gate(v, c, s, exact, grid)
    assert y.equal(fastvim.ssm(v, exact, grid))
    loss = (y * dy.double()).sum()
    grads = torch.autograd.grad(loss, [v, *leaves(exact)], materialize_grads=True)
    return [t.detach() for t in (p, s, y, *grads)]


def by_kernels(backend, grid, xz, w, dy):
    """The same by the operation that autograd sees."""
    xz = xz.clone().requires_grad_()
    y, p, _, s = torch.ops.fastvim.ssm(*ssm_arguments(backend, grid, xz, w))
    loss = (y * dy).sum()
    return [p, s, y, *torch.autograd.grad(loss, [xz, *leaves(w)], materialize_grads=True)]


def ssm_arguments(backend, grid, xz, w):
    return xz, *weights_of(w), *pack(grid), w.pool, w.skip_before_expand, backend.name


def compare(backend, dtype, name, e, **options):
    expected = reference(dtype, name, e, **options)
    values = by_kernels(backend, *make_inputs(dtype, name, e, **options))
    if dtype != torch.float32 and options.get("pool") == "max":
        values = values[:3]             # which of two maxima that round to the same value gets the
        expected = expected[:3]         # gradient is open; float32 checks the gradients
    assert relative_error(values, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("e", [5, 40])
@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("name", GRIDS)
def test_every_walk(backend, dtype, name, pool, e):
    compare(backend, dtype, name, e, pool=pool)


@pytest.mark.parametrize("options", [
    dict(norm=None), dict(norm="rmsnorm"), dict(skip=True), dict(n=1), dict(n=4), dict(n=33),
    dict(batch=1), dict(batch=129), dict(e=1), dict(e=17), dict(e=400)],
    ids=lambda f: "-".join(f"{k}={v}" for k, v in f.items()))
def test_options_and_sizes(backend, options):
    compare(backend, torch.float32, "columns", **{"e": 24, **options})


@pytest.mark.parametrize("length", [1, 2, 3, 7, 14, 127, 128, 129, 1000, 4096])
def test_lengths_of_vim(backend, length, monkeypatch):
    if backend.name == "cuda-emulated" and length > 1000:
        length = 513                            # the emulator is slow
    line = (("h w", ""), "h w", dict(h=1, w=length), None)
    monkeypatch.setitem(GRIDS, f"line {length}", line)
    compare(backend, torch.float32, f"line {length}", 9, n=4, batch=1)


def test_float16_where_the_backend_knows_it(backend):
    if torch.float16 in backend.kernels.dtypes:
        compare(backend, torch.float16, "rows", 24)
    else:
        model = tiny(torch.float16)
        assert model(images(model)).dtype == torch.float16      # plain PyTorch serves


@pytest.mark.parametrize("kind", fastvim.NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows, d", [(1, 1), (3, 7), (200, 192), (1, 300)])
def test_add_norm(backend, rows, d, dtype, kind):
    torch.manual_seed(0)
    hidden = torch.randn(2, rows, d).to(dtype)
    residual = torch.randn(2, rows, d)
    norm = fastvim.NORMS[kind](d)
    norm.weight.data = torch.randn(d)
    du = torch.randn(2, rows, d).to(dtype)
    dout = torch.randn(2, rows, d)
    if kind == "layernorm":
        norm.bias.data = torch.randn(d)
    exact = copy.deepcopy(norm).double()
    h = hidden.double().requires_grad_()
    u, out = fastvim.add_norm(h, residual.double(), exact)
    loss = (u * du.double() + out * dout.double()).sum()
    expected = torch.autograd.grad(loss, [h, *exact.parameters()])
    weight = norm.weight.detach()
    bias = norm.bias.detach() if kind == "layernorm" else None
    values = run_add_norm(hidden, residual, weight, bias, backend.name)
    assert values[0].dtype == dtype
    assert values[1].dtype == torch.float32
    assert relative_error(values, [u.detach(), out.detach()]) < TOLERANCE[dtype]
    dresidual, dhidden, *dweights = run_add_norm_backward(
        du, dout, values[1], weight, bias, backend.name)
    dweights = [t for t in dweights if t is not None]
    assert relative_error([dresidual, *dweights], expected) < TOLERANCE[dtype]
    if dtype == torch.float32:
        assert dhidden is None
    else:
        assert dhidden.equal(dresidual.to(dtype))


@pytest.mark.parametrize("fields", [dict(), dict(schedule="vim", class_token=True)],
                         ids=["fastvim", "vim"])
def test_an_empty_batch(backend, fields):
    model = tiny(torch.float32, **fields)
    for keep in (None, torch.zeros(0, 3, dtype=torch.long)):
        y = model(torch.zeros(0, 3, 32, 32), keep=keep)
        assert y.shape == (0, 5)
        y.sum().backward()
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    empty = torch.zeros(2, 0, 3, 5)
    B = torch.zeros(2, 0, 3, 4)
    s = backend.selective_scan(empty, empty, torch.zeros(2, 5, 4), B, B)
    assert s.shape == (2, 0, 3, 5)


def scan_inputs(k=2, b=3, p=5, e=7, n=4):
    """x, dt, A, B, C, D, dt_bias"""
    torch.manual_seed(0)
    shapes = [(k, b, p, e), (k, b, p, e), (k, e, n), (k, b, p, n), (k, b, p, n), (k, e), (k, e)]
    inputs = [torch.randn(*shape) for shape in shapes]
    inputs[2] = -inputs[2].exp()
    return inputs


def test_inputs_that_are_not_contiguous(backend):
    inputs = scan_inputs()
    expected = backend.selective_scan(*inputs)
    odd = [torch.stack([t.movedim(1, -1)] * 2, -1)[..., 0].movedim(-1, 1) for t in inputs]
    assert not any(t.is_contiguous() for t in odd)
    assert backend.selective_scan(*odd).equal(expected)
    grid, xz, w = make_float32("columns", 6)
    _, p = backend.conv_pool(xz, w, grid)
    y = backend.expand_gate(xz, None, p, w, grid)
    other_xz = xz.mT.contiguous().mT
    other_p = p.transpose(0, 3).contiguous().transpose(0, 3)
    assert backend.conv_pool(other_xz, w, grid)[1].equal(p)
    assert backend.expand_gate(other_xz, None, other_p, w, grid).equal(y)
    results = []
    for v in (xz, other_xz):
        v.requires_grad_()
        y = backend.ssm(v, w, grid)
        results.append([y, *torch.autograd.grad(y.mT, [v, *leaves(w)], torch.ones_like(y.mT))])
    assert all(a.equal(b) for a, b in zip(*results))


@pytest.mark.parametrize("name", ["n first", "step first"])
def test_strides_of_axes_of_length_one_are_not_trusted(backend, name):
    """B and C of a single step, transposed: PyTorch calls them contiguous whatever the strides of
    the step's axis, and they were once read with a stride of 1."""
    x, dt, A, B, C, D, dt_bias = scan_inputs(p=1)
    expected = backend.selective_scan(x, dt, A, B, C, D, dt_bias)
    torch.testing.assert_close(expected, fastvim.selective_scan(x, dt, A, B, C, D, dt_bias))

    def lie(t):
        form = torch.contiguous_format
        if name == "n first":
            return t.mT.clone(memory_format=form).mT                        # from (k b n p)
        return t.movedim(2, 0).clone(memory_format=form).movedim(0, 2)      # from (p k b n)
    B, C = lie(B), lie(C)
    assert B.is_contiguous()
    assert B.stride(2) != B.shape[3]
    x, dt = lie(x), lie(dt)
    assert backend.selective_scan(x, dt, A, B, C, D, dt_bias).equal(expected)
    run = functools.partial(backend.kernels.run, "selective_scan_backward", shared=0)
    values = scan_values(x, dt, A, B, C, D, dt_bias)
    assert backend.kernels.run("selective_scan", values)[0].equal(expected)
    grads = run(values, ds=torch.ones_like(x))
    clean = [t.clone(memory_format=torch.contiguous_format) for t in (x, dt, A, B, C, D, dt_bias)]
    expected = run(scan_values(*clean), ds=torch.ones(x.shape))
    assert all(g.equal(e) for g, e in zip(grads, expected, strict=True))


# ---- the same bits, and values that are not finite -----------------------------------------------


@pytest.mark.parametrize("name", ["rows", "vim", "few groups", "masked"])
def test_the_same_bits_twice_and_by_any_number_of_threads(backend, name):
    grid, xz, w = make_float32(name, 40, batch=9)
    dy = torch.ones(*xz.shape[:2], 40)
    runs = []
    for n in (1, 1, 2, 3):
        with threads(n):
            runs.append(by_kernels(backend, grid, xz, w, dy))
    # products of matrices are PyTorch's: their bits may follow the threads, ours do not
    for a, b in zip(*runs[:2]):
        assert a.equal(b)
    for run in runs[2:]:
        assert run[0].equal(runs[0][0])
    scan = scan_values(*scan_inputs(p=40, e=24, n=16))
    v = read_ssm(*ssm_arguments(backend, grid, xz, w))[2]
    results = []
    for n in (1, 2, 3):
        with threads(n), torch.no_grad():
            run = backend.kernels.run
            [s] = run("selective_scan", scan)
            ds = run("selective_scan_backward", scan, shared=0, ds=s)
            p, argmax = run("conv_pool", v)
            dy = xz[..., :40].contiguous()
            gate = run("expand_gate_backward", v, s=p, dy=dy)
            conv = run("conv_pool_backward", v, dpooled=p, g=gate[1], dxz=gate[0])
            results.append([s, *ds, p, *gate, *conv])
    for run in results[1:]:
        assert all(a is b is None or a.equal(b) for a, b in zip(run, results[0], strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name, pool", [("rows", "mean"), ("rows", "max"), ("vim", "mean"),
                                        ("masked", "mean"), ("masked", "max")])
@torch.no_grad()
def test_what_is_not_finite_spreads_as_in_pytorch(backend, name, pool, value):
    grid, xz, w = make_float32(name, 24, pool=pool)
    xz[0, 4, 3] = value                                         # an x
    xz[1, 1, 24 + 5] = value                                    # and a z
    (_, p), expected = fastvim.conv_pool(xz, w, grid), fastvim.ssm(xz, w, grid)
    (_, q), y = backend.conv_pool(xz, w, grid), backend.ssm(xz, w, grid)
    finite = expected.isfinite()
    assert q.isfinite().equal(p.isfinite())
    assert y.isfinite().equal(finite)
    assert y.isnan().any()
    assert finite.any()
    torch.testing.assert_close(y[finite], expected[finite], rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("argument", range(7))
def test_a_nan_in_any_argument_of_the_scan_goes_where_it_goes_in_pytorch(backend, argument):
    inputs = scan_inputs(e=19)                                  # whole vectors, and a rest
    for place in (0, 18):
        tensors = [t.clone() for t in inputs]
        tensors[argument].view(-1)[place] = math.nan
        expected = fastvim.selective_scan(*tensors).isnan()
        assert expected.any()
        assert torch.equal(backend.selective_scan(*tensors).isnan(), expected)


def test_argmax_of_ties_and_nan(backend):
    """Of equal maxima the first position wins; a NaN wins over everything."""
    grid, xz, w = make_float32("columns", 4, pool="max")
    def pool(weight):
        v = read_ssm(*ssm_arguments(backend, grid, xz, w._replace(conv_weight=weight)))[2]
        return backend.kernels.run("conv_pool", v)
    _, argmax = pool(torch.zeros(2, 4, 4))                      # c = silu(bias)
    first = walk_of(grid).start[0, :-1]
    assert argmax.equal(first[None, None, :, None].expand(argmax.shape))
    xz[0, 5, 0] = math.nan                                      # row 1, column 0: position 1
    p, argmax = pool(torch.ones(2, 4, 4))
    assert p[0, 0, 0, 0].isnan()
    assert argmax[0, 0, 0, 0] == 1


# ---- the model -----------------------------------------------------------------------------------

MODELS = [dict(), dict(pool="max"), dict(schedule="vim", class_token=True), dict(class_token=True),
          dict(schedule="fastchannelvim_2d", in_chans=3),
          dict(schedule="channelvim", in_chans=2, class_token=True),
          dict(ssm_norm=None, block_norm="layernorm"),
          dict(skip_before_expand=True, ssm_norm="rmsnorm")]


@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("fields", MODELS,
                         ids=lambda f: "-".join(map(str, f.values())) or "fastvim")
def test_models(backend, fields, masked):
    """As far from float64 as plain PyTorch in float32 is, or nearly."""
    model = tiny(torch.float32, **fields)
    x = images(model)
    tokens = 16 * (model.cfg.in_chans if model.cfg.per_channel else 1)
    keep = random_keep(2, tokens, 9)
    keep[1, 6:] = -1
    arguments = dict(keep=keep) if masked else {}
    exact = outputs_and_gradients(tiny(torch.float64, **fields), x.double(), **arguments)

    def error(values):
        return relative_error(values.values(), exact.values())
    with fastvim.use_backend("python"):
        plain = error(outputs_and_gradients(model, x, **arguments))
    assert error(outputs_and_gradients(model, x, **arguments)) < 2 * plain + 1e-5
    with torch.no_grad():                                       # the way past the dispatcher
        y = model(x, **arguments)
    assert relative_error([y], [exact["y"]]) < 2 * plain + 1e-5


def test_training_with_drop_path_and_checkpointing(backend):
    def gradients(checkpointing, name):
        model = tiny(torch.float32, drop_path_rate=0.5).train()
        model.grad_checkpointing = checkpointing
        x = images(model)
        torch.manual_seed(3)
        with fastvim.use_backend(name):
            y = model(x)
        y.square().sum().backward()     # outside: the backend of the forward pass still serves
        return [p.grad for p in model.parameters() if p.grad is not None]
    plain = gradients(False, "python")
    ours = gradients(False, backend.name)
    again = gradients(True, backend.name)
    assert len(plain) == len(ours) > 20
    assert all(a.equal(b) for a, b in zip(ours, again))
    assert relative_error(ours, [g.double() for g in plain]) < 1e-4


def test_what_a_block_keeps_for_the_way_back(backend):
    """The residual, xz and the projections' inputs; of the convolution and the scan nothing that
    has the tokens' length."""
    model = tiny(torch.float32, depth=1, img_size=64)
    parameters = {p.data_ptr() for p in model.parameters()}
    saved = {}

    def pack(t):
        if t.data_ptr() not in parameters and t.numel() >= 2 * 64 * 16:
            saved[t.data_ptr()] = t.numel() // (2 * 64)
        return t
    grid = Grid("h w", "h w", "w", (("h", 8), ("w", 8)))
    hidden, residual = torch.randn(2, 2, 64, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.layers[0](hidden, residual, grid, backend)
    d = 16
    e = 32
    assert sorted(saved.values()) == [d, d, e, 2 * e]           # residual, two projections', xz


@pytest.mark.parametrize("kind", ["autocast", "bfloat16"])
def test_sixteen_bits(backend, kind):
    model = tiny(torch.float32)
    x = images(model)
    exact = outputs_and_gradients(tiny(torch.float64), x.double())
    autocast = kind == "autocast"
    if not autocast:
        model = tiny(torch.bfloat16)
        x = x.bfloat16()
    values = {}
    for name in ("python", backend.name):
        with (fastvim.use_backend(name),
              torch.autocast(x.device.type, torch.bfloat16, enabled=autocast)):
            values[name] = outputs_and_gradients(model, x)
    dtypes = [{k: v.dtype for k, v in run.items()} for run in values.values()]
    assert dtypes[1] == dtypes[0]
    plain, ours = (relative_error(v.values(), exact.values()) for v in values.values())
    assert ours < 1.5 * plain


def test_tables_made_in_inference_mode_serve_training(backend):
    fastvim_kernels.full_walk.cache_clear()
    model = tiny(torch.float32, img_size=(40, 24))
    x = images(model)
    with torch.inference_mode():
        y = model(x)
        again = model(x)
    assert y.equal(again)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)
    model(x).sum().backward()


def test_a_graph_of_cuda_takes_only_tables_that_are_there(monkeypatch):
    """Made within a capture they would be empty; those that a graph reads are kept for good."""
    cuda = torch.device("cuda", 0)
    grid = (*[None] * 5, "h w", "h w", "w", (3, 2), None, 1.0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(fastvim_kernels, "READ_BY_GRAPHS", {})
    fastvim_kernels.full_walk.cache_clear()
    with pytest.raises(RuntimeError, match=r"run the model once, at \(3, 2\) tokens, before"):
        fastvim_kernels.unpack(cuda, *grid)
    assert not fastvim_kernels.READ_BY_GRAPHS
    walk = object()
    monkeypatch.setattr(fastvim_kernels, "full_walk", lambda *_: walk)
    for _ in range(2):
        assert fastvim_kernels.unpack(cuda, *grid) is walk
    assert list(fastvim_kernels.READ_BY_GRAPHS.values()) == [walk]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(fastvim_kernels, "full_walk", lambda *_: object())
    fastvim_kernels.unpack(cuda, *grid)
    assert list(fastvim_kernels.READ_BY_GRAPHS.values()) == [walk]


# ---- what looks into an operation ----------------------------------------------------------------

KINDS = {
    "rows and columns": {},
    "max": dict(pool="max"),
    "class token": dict(class_token=True),
    "sequence": dict(schedule="vim"),
    "other norms": dict(ssm_norm="rmsnorm", block_norm="layernorm", skip_before_expand=True),
    "without norm": dict(ssm_norm=None),
}


def derivatives(model, x, **arguments):
    """First and second derivatives, the second of the first's squares; and the gradients of each
    logit of image 0, in one batch."""
    x = x.clone().requires_grad_()
    inputs = [x, *model.parameters()]
    y = model(x, **arguments)
    first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True, materialize_grads=True)
    penalty = sum(g.square().sum() for g in first)
    second = torch.autograd.grad(penalty, inputs, materialize_grads=True)
    y = model(x, **arguments)[0]
    batch = torch.autograd.grad(y, inputs, torch.eye(len(y)).to(y), is_grads_batched=True,
                                materialize_grads=True)
    return first, second, batch


@pytest.mark.parametrize("backend", REAL, indirect=True)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_derivatives_and_batches_of_them(backend, kind, masked):
    """The way back is then plain PyTorch's, through the tables of the kernels."""
    fields = dict(**KINDS[kind], depth=2)
    model = tiny(**fields)
    keep = random_keep(2, 16, 7) if masked else None
    with fastvim.use_backend("python"):
        expected = derivatives(model, images(model), keep=keep)
    model = tiny(torch.float32, **fields)
    for values, references in zip(derivatives(model, images(model), keep=keep), expected):
        assert relative_error(values, references) < 1e-4


@pytest.mark.parametrize("backend", REAL, indirect=True)
def test_derivatives_of_derivatives_of_shared_weights(backend):
    """What a weight does in an earlier layer is the earlier layer's to say."""
    def run(dtype, name):
        model = tiny(dtype, depth=2)
        first, second = model.layers
        second.norm = first.norm
        for weight in ("A_log", "conv_weight", "layernorm"):
            setattr(second.mixer, weight, getattr(first.mixer, weight))
        with fastvim.use_backend(name):
            return derivatives(model, images(model))
    for values, references in zip(run(torch.float32, backend.name), run(torch.float64, "python")):
        assert relative_error(values, references) < 1e-4


@pytest.mark.parametrize("backend", REAL, indirect=True)
def test_transforms(backend, caplog):
    """torch.func and forward-mode derivatives, with and without autograd's own recording: plain
    PyTorch serves, and says so once."""
    fastvim.announce.cache_clear()
    model = tiny(torch.float32, depth=2)
    x = images(model)
    direction = torch.randn_like(x)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, image):
        return torch.func.functional_call(model, weights, (image[None],)).square().sum()

    with fastvim.use_backend("python"):
        y = model(x)
        step = 1e-3 * direction
        double = tiny(depth=2)
        change = double((x + step).double()) - double((x - step).double())
    tangent = (change / 2e-3).float()
    for recording in (True, False):
        with torch.set_grad_enabled(recording):
            value, found = torch.func.jvp(model, (x,), (direction,))
            torch.testing.assert_close(value, y, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found, tangent, rtol=1e-3, atol=1e-4)
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(x, direction)
                found = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
            torch.testing.assert_close(found, tangent, rtol=1e-3, atol=1e-4)
            one_by_one = torch.func.vmap(lambda image: model(image[None])[0])(x)
            torch.testing.assert_close(one_by_one, y, rtol=1e-4, atol=1e-5)
            per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
            jacobian = torch.func.jacrev(lambda x: model(x)[0])(x)
    for i in range(len(x)):
        model.zero_grad()
        loss(dict(model.named_parameters()), x[i]).backward()
        for name, p in model.named_parameters():
            assert relative_error([per_sample[name][i]], [p.grad.double()]) < 1e-4, name
    forwards = (jacobian * direction).flatten(1).sum(1)         # the same tangent, by reverse mode
    torch.testing.assert_close(forwards, tangent[0], rtol=1e-3, atol=1e-4)
    assert caplog.text.count("no torch.func transforms") == 1
    assert caplog.text.count("no forward-mode derivatives") == 1


@pytest.mark.parametrize("backend", REAL, indirect=True)
def test_flops_are_counted(backend):
    """The counter hooks every module, so that plain PyTorch serves, whose products it sees."""
    model = tiny(torch.float32)
    x = images(model)
    counts = []
    for name in ("python", backend.name):
        with fastvim.use_backend(name), flop_counter.FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_compiled_models_run_by_kernels_and_as_use_backend_says():
    """Forward and back are one operation each of a block, in one graph; another choice around the
    compiled model is followed, in the thread that made it."""
    model = tiny(torch.float32, depth=1)
    x = images(model)
    graphs = []

    def note(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)
    torch._dynamo.reset()
    noting = aot_autograd(fw_compiler=note, bw_compiler=note)
    compiled = torch.compile(model, fullgraph=True, backend=noting)

    def run():
        graphs.clear()
        compiled(x).sum().backward()
        names = ("ssm", "add_norm", "ssm_backward", "add_norm_backward")
        return [sum(f"fastvim.{name}.default" in graph for graph in graphs) for name in names]
    with fastvim.use_backend("cpu"):
        assert run() == [1, 1, 1, 1]
        with fastvim.use_backend("python"):
            assert run() == [0, 0, 0, 0]
            assert len(graphs) == 2                             # they were compiled anew
            found = []                                          # another thread: it chose nothing
            other = threading.Thread(target=lambda: found.append(run()))
            other.start()
            other.join()
            assert found == [[1, 1, 1, 1]]
        run()
        assert not graphs


@pytest.mark.parametrize("fields", [dict(), dict(class_token=True)], ids=["", "class token"])
def test_compiled_models_make_no_tables(fields):
    """Those of a full grid are looked up when an operation runs: sorting is in no graph, and a
    second call finds them."""
    model = tiny(torch.float32, depth=2, **fields)
    x = images(model)
    names = []

    def note(graph, _):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=note))
    fastvim_kernels.full_walk.cache_clear()
    with fastvim.use_backend("cpu"):
        for _ in range(2):
            torch.testing.assert_close(compiled(x), model(x))
            assert fastvim_kernels.full_walk.cache_info().misses == 2
    assert any("fastvim.ssm" in name for name in names)
    assert not any("sort" in name for name in names)


@pytest.mark.parametrize("backend", REAL, indirect=True)
@pytest.mark.parametrize("case", ["plain", "max", "masked", "inference", "add_norm", "add_norm16"])
def test_opcheck(backend, case):
    if case.startswith("add_norm"):
        dtype = torch.bfloat16 if case == "add_norm16" else torch.float32
        hidden = torch.randn(2, 3, 5, dtype=dtype, requires_grad=True)
        residual = torch.randn(2, 3, 5, requires_grad=True)
        weight = torch.ones(5, requires_grad=True)
        bias = torch.zeros(5, requires_grad=True) if dtype == torch.float32 else None
        arguments = (hidden, residual, weight, bias, backend.name)
        torch.library.opcheck(torch.ops.fastvim.add_norm, arguments)
        return
    pool = "max" if case == "max" else "mean"
    grid, xz, w = make_float32("masked" if case == "masked" else "rows", 6, pool=pool)
    arguments = ssm_arguments(backend, grid, xz.requires_grad_(), w)
    if case == "inference":
        arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    torch.library.opcheck(torch.ops.fastvim.ssm, tuple(arguments))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["python", *REAL], indirect=True)
def test_compile(backend):
    """One graph without breaks, traced forward and backward; "aot_eager" leaves out only the code
    generation."""
    size = 16 if backend is PYTHON else 32                      # plain PyTorch's scan is unrolled
    model = tiny(torch.float32, depth=1, img_size=size)
    x = images(model)
    expected = outputs_and_gradients(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    values = outputs_and_gradients(compiled, x)
    for k, v in expected.items():
        value = values.get(k, values.get(f"_orig_mod.{k}"))
        torch.testing.assert_close(value, v, rtol=1e-3, atol=1e-5)
    if backend is not PYTHON:
        with torch.autocast(x.device.type, torch.bfloat16):
            torch.testing.assert_close(compiled(x), model(x), rtol=0.02, atol=0.02)
        with torch.inference_mode():
            torch.testing.assert_close(compiled(x), expected["y"], rtol=1e-4, atol=1e-5)
        keep = random_keep(2, 16, 7)
        masked = compiled(x, keep=keep)
        torch.testing.assert_close(masked, model(x, keep=keep), rtol=1e-4, atol=1e-5)
        other = torch.randn(3, 3, 24, 40)                       # another size: dynamic shapes
        torch.testing.assert_close(compiled(other), model(other), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", REAL, indirect=True)
def test_compile_to_code(backend):
    """The default compiler, inductor, generates and compiles code: slow, so one small model."""
    model = tiny(torch.float32, depth=1, img_size=16)
    x = images(model)
    torch._dynamo.reset()
    expected = outputs_and_gradients(model, x)
    values = outputs_and_gradients(torch.compile(model, fullgraph=True), x)
    for (k, v), w in zip(values.items(), expected.values()):
        torch.testing.assert_close(v, w, rtol=1e-3, atol=1e-5, msg=k)


# ---- streams, graphs and memory of a GPU ---------------------------------------------------------

GRAPHS = [dict(), dict(class_token=True), dict(schedule="vim", class_token=True), dict(pool="max"),
          dict(schedule="fastchannelvim", in_chans=3)]
EACH_GRAPH = pytest.mark.parametrize("fields", GRAPHS, ids=lambda f: "-".join(map(str, f.values())))
ON_A_GPU = pytest.mark.parametrize("backend", ["cuda"], indirect=True)


class Waits(TorchDispatchMode):
    """Notes what a GPU's queue has to be empty for: copies between devices, and numbers read."""

    def __init__(self):
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [t for t in (*args, result) if isinstance(t, torch.Tensor)]
        copies = "copy" in str(operation) and len({t.device for t in tensors}) > 1
        if copies or str(operation).startswith(("aten._local_scalar", "aten.nonzero", "aten._uni")):
            self.noted.append(operation)
        return result


@pytest.mark.parametrize("name", ["python", "cuda"])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@EACH_GRAPH
def test_a_forward_pass_never_waits_for_a_gpu(fields, masked, name, monkeypatch):
    """On tensors that claim to be on one; what is said of keep and channels is not looked at."""
    monkeypatch.setattr(fastvim.BACKENDS["cuda"], "problem", lambda: None)
    model = fastvim.FastVim(embed_dim=16, depth=2, img_size=64, **fields).eval()
    with FakeTensorMode(allow_non_fake_inputs=True), fastvim.use_backend(name):
        model._apply(lambda t: torch.empty(t.shape, device="cuda"))
        arguments = {}
        if masked:
            arguments["keep"] = torch.zeros(2, 5, dtype=torch.int64, device="cuda")
        if masked and model.cfg.per_channel:
            arguments["channels"] = torch.zeros(3, dtype=torch.int64, device="cuda")
        x = torch.zeros(2, 3, 64, 64, device="cuda")
        with Waits() as waits:
            y = model(x, **arguments)
    assert y.device.type == "cuda"
    assert not waits.noted


def test_values_are_not_read_while_a_cuda_graph_is_captured(monkeypatch):
    assert checks.has_values(torch.zeros(1))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert checks.has_values(torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not checks.has_values(torch.zeros(1))


@ON_A_GPU
@torch.no_grad()
def test_the_first_call_may_be_on_another_stream(backend):
    model = tiny(torch.float32, img_size=512)
    x = images(model)
    fastvim_kernels.full_walk.cache_clear()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)                          # cycles: its queue is long
        first = model(x)
    y = model(x)                                                # reads the tables at once
    torch.cuda.synchronize()
    assert y.equal(first)


@ON_A_GPU
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@EACH_GRAPH
@torch.no_grad()
def test_inference_as_a_graph(backend, fields, dtype, masked):
    """Replays see what lies in the tensors then, other masks too; first use in a capture is
    refused, and tables that a graph reads outlive their place in the cache."""
    model = tiny(dtype, **fields)
    tensors = [images(model)]
    if masked:
        tensors.append(random_keep(2, 16, 7))
    model(*tensors)                                             # PyTorch's own libraries start
    fastvim_kernels.full_walk.cache_clear()
    if not masked:
        with pytest.raises(RuntimeError, match="run the model once"), \
                torch.cuda.graph(torch.cuda.CUDAGraph()):
            model(*tensors)
    model(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(*tensors)
    fastvim_kernels.full_walk.cache_clear()
    torch.full((2 ** 24,), -1, dtype=torch.int32)               # on what was given back
    tensors[0].copy_(images(model, seed=5))
    if masked:
        tensors[1].copy_(random_keep(2, 16, 7, seed=6))
    graph.replay()
    torch.testing.assert_close(y, model(*tensors), rtol=1e-5, atol=1e-6)


@ON_A_GPU
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@EACH_GRAPH
def test_a_training_step_as_a_graph(backend, fields, autocast):
    model = tiny(torch.float32, **fields, hcs=False).train()
    x = images(model)

    def step():
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(x).float().square().sum()
        loss.backward()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    x.copy_(images(model, seed=5))
    graph.replay()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    step()
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    assert relative_error(grads, expected) < (2e-2 if autocast else 1e-5)


@ON_A_GPU
def test_memory_that_is_short(backend, monkeypatch):
    """What a kernel needs besides its outputs, which are there."""
    calls = []
    backend.problem()
    library = backend.kernels._library

    def note(*call):
        calls.append(call)
        library(*call)
    monkeypatch.setattr(backend.kernels, "_library", note)
    *inputs, w, dy = make_inputs(torch.float32, "wide rows", 512, batch=64)
    with torch.no_grad():
        v = read_ssm(*ssm_arguments(backend, *inputs, w))[2]
        dp = torch.ones(2, 64, 2, 512)
        dxz = torch.empty_like(inputs[1])
        _, *grads = backend.kernels.run("conv_pool_backward", v, dpooled=dp, g=dy, dxz=dxz)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    filled = []
    try:
        with contextlib.suppress(torch.OutOfMemoryError):       # the gaps that PyTorch keeps
            while True:
                filled.append(torch.empty(2 ** 17))
        with pytest.raises(torch.OutOfMemoryError, match="conv_pool_backward: CUDA out of memory"):
            library(*calls[-1])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(grad.isfinite().all() for grad in grads)


# ---- what kernels lack ---------------------------------------------------------------------------


def test_what_kernels_lack_runs_in_plain_pytorch(backend, caplog):
    fastvim.announce.cache_clear()
    for fields, word in ((dict(pool="attention"), "attention"), (dict(d_conv=3), "four taps"),
                         (dict(d_conv=0), "taps"), (dict(d_state=65), "more than 64 states")):
        model = tiny(torch.float32, **fields)
        x = images(model)
        y = model(x)
        assert word in caplog.text
        assert backend.name in caplog.text
        with fastvim.use_backend("python"):
            torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    before = len(caplog.messages)
    model(x)
    assert len(caplog.messages) == before                       # said once


def test_norms_whose_weights_are_parts_of_others(backend):
    model = tiny(torch.float32)
    x = images(model)
    expected = outputs_and_gradients(model, x).values()
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            for name, weight in [*module.named_parameters()]:
                wide = torch.stack([weight.detach(), weight.detach()], 1)
                setattr(module, name, nn.Parameter(wide[:, 0]))
                assert not getattr(module, name).is_contiguous()
    assert relative_error(outputs_and_gradients(model, x).values(), expected) < 1e-6


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


@pytest.mark.parametrize("create_graph", [False, True])
def test_an_output_that_is_used_without_a_gradient(backend, create_graph):
    grid, xz, w = make_float32("rows", 6)
    xz.requires_grad_()
    y = NoGradient.apply(backend.ssm(xz, w, grid)).sum() + xz.sum()
    grad, = torch.autograd.grad(y, xz, create_graph=create_graph)
    assert torch.equal(grad, torch.ones_like(xz))


# ---- the boundary to C ---------------------------------------------------------------------------


class Spy(fastvim_kernels.Kernels):
    """Kernels that note their calls and compute nothing."""

    def __init__(self, kernels):
        super().__init__("spy", kernels.dtypes, lambda: None)
        self.calls = {}

    def run(self, operation, v, **own):
        self.calls[operation] = (v, own)
        return fastvim_kernels.to_c(operation, {**v, **own})[1]


def call_all(backend):
    """Every operation once, on tensors that fit."""
    grid, xz, w = make_float32("rows", 6, pool="max")
    hidden = torch.zeros(2, 3, 5)
    one = torch.ones(5)
    run_add_norm(hidden, hidden, one, one, backend)
    run_add_norm_backward(hidden.bfloat16(), hidden, hidden, one, one, backend)
    arguments = (xz, *weights_of(w), *pack(grid), w.pool, False, backend)
    y, *saved = run_ssm(*arguments)
    run_ssm_backward(y, *saved, *arguments)


@torch.no_grad()
def test_the_fields_of_scan_h_are_those_that_python_gives(monkeypatch):
    """Each operation gives every input of its structure, refuses to go without one, and gives none
    of its own that the structure has not; the outputs are made as declared, also those that it is
    given."""
    structures = fastvim_kernels.structures()
    spy = Spy(KERNELS["cpu"])
    monkeypatch.setitem(KERNELS, "spy", spy)
    call_all("spy")
    assert spy.calls.keys() == structures.keys()
    assert len(structures) == 8
    for operation, (v, own) in spy.calls.items():
        fields = structures[operation]
        names = {name for name, *_ in fields}
        assert len(names) == len(fields)
        assert own.keys() <= names, operation
        values = {**v, **own}
        numbers, outputs = fastvim_kernels.to_c(operation, values)
        assert len(numbers) == len(fields)
        assert all(type(number) is int for number in numbers)
        given = {field.name: number for field, number in zip(fields, numbers)}
        written = [field.name for field in fields if not field.is_input and field.axes]
        for name, output in zip(written, outputs, strict=True):
            if output is None:                                  # here the skip is not the scan's
                assert (operation, name) == ("selective_scan_backward", "dD")
            else:
                assert output is values.get(name, output)
                assert given[name] == output.data_ptr() > 0
        for name in names - set(written):
            others = {field: value for field, value in values.items() if field != name}
            with pytest.raises((TypeError, KeyError), match=name):
                fastvim_kernels.to_c(operation, others)


class Sub(torch.Tensor):
    pass


def fake(*shape):
    with torch._subclasses.FakeTensorMode():
        return torch.zeros(*shape)


SHAPE = (2, 3, 5, 7)                                            # x of scan_inputs
NOT_FOR_C = {
    "meta": lambda: torch.zeros(SHAPE, device="meta"),
    "fake": lambda: fake(*SHAPE),
    "double": lambda: torch.zeros(SHAPE, dtype=torch.float64),
    "half": lambda: torch.zeros(SHAPE, dtype=torch.float16),
    "integers": lambda: torch.zeros(SHAPE, dtype=torch.int32),
    "transposed": lambda: torch.zeros(7, 5, 3, 2).permute(3, 2, 1, 0),
    "every second": lambda: torch.zeros(2, 3, 5, 14)[..., ::2],
    "expanded": lambda: torch.zeros(1).expand(SHAPE),
    "sparse": lambda: torch.zeros(SHAPE).to_sparse(),
    "subclass": lambda: torch.zeros(SHAPE).as_subclass(Sub),
    "list": lambda: [0.0],
    "number": lambda: 1.0,
}


@pytest.mark.parametrize("what", NOT_FOR_C)
def test_c_is_given_nothing_but_contiguous_real_tensors(backend, what):
    """One sentence that names the operation, the argument and what is wrong with it."""
    value = NOT_FOR_C[what]()
    with pytest.raises(TypeError) as error:
        values = scan_values(*scan_inputs())
        backend.kernels.run("selective_scan", {**values, "dt": value})
    sentence = str(error.value)
    device = torch.zeros(0).device
    assert sentence.startswith(
        f"selective_scan: dt must be a contiguous torch.float32 tensor on {device}, not ")
    assert "\n" not in sentence
    if isinstance(value, torch.Tensor):
        assert type(value).__name__ in sentence
        assert str(value.dtype) in sentence
        assert str(value.device) in sentence


def test_c_is_given_nothing_of_torch_func(backend):
    x, *others = scan_inputs()

    def scan(x):
        return backend.selective_scan(x, *others).sum()
    for transformed, argument in ((torch.func.vmap(scan), x[None]), (torch.func.grad(scan), x)):
        with pytest.raises((TypeError, RuntimeError), match="contiguous|data pointer"):
            transformed(argument)


# ---- bad input -----------------------------------------------------------------------------------


def scan_arguments(**changes):
    k, b, p, e, n = 2, 3, 4, 5, 6
    shapes = dict(x=(k, b, p, e), dt=(k, b, p, e), A=(k, e, n), B=(k, b, p, n), C=(k, b, p, n),
                  D=(k, e), dt_bias=(k, e))
    changes = {name: here(value) for name, value in changes.items()}
    return {**{name: torch.zeros(shape) for name, shape in shapes.items()}, **changes}


@pytest.mark.parametrize("changes, error, match", [
    (dict(x=torch.zeros(2, 3, 4)), ValueError, r"x \(k b p e\).*\(2, 3, 4\)"),
    (dict(x=torch.zeros(2, 3, 0, 5), dt=torch.zeros(2, 3, 0, 5), B=torch.zeros(2, 3, 0, 6),
          C=torch.zeros(2, 3, 0, 6)), ValueError, "0 steps"),
    (dict(dt=torch.zeros(2, 3, 4, 6)), ValueError,
     r"dt must have the shape \(2, 3, 4, 5\), not \(2, 3, 4, 6\)"),
    (dict(B=torch.zeros(2, 3, 4, 6).double()), TypeError,
     "B must be a contiguous torch.float32 tensor on .*, not Tensor of torch.float64"),
    (dict(C=torch.zeros(2, 3, 4, 6, device="meta")), TypeError,
     "C must be.*not Tensor of torch.float32.* on meta"),
    (dict(A=torch.zeros(2, 5, 65), B=torch.zeros(2, 3, 4, 65), C=torch.zeros(2, 3, 4, 65)),
     ValueError, "65 states"),
    (dict(A=torch.zeros(2, 5)), ValueError, "A"),
    (dict(D=torch.zeros(5)), ValueError, r"D must have the shape \(2, 5\)"),
    (dict(dt_bias=torch.zeros(2, 5).long()), TypeError, "dt_bias"),
])
def test_bad_scan_arguments(backend, changes, error, match):
    with pytest.raises(error, match=match):
        backend.selective_scan(**scan_arguments(**changes))


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C"])
@pytest.mark.parametrize("value", [None, "x"], ids=str)
def test_scan_arguments_that_are_no_tensors(backend, name, value, monkeypatch):
    monkeypatch.setattr(backend.kernels, "_library", lambda *call: pytest.fail("C was called"))
    with pytest.raises((TypeError, ValueError, AttributeError)):
        backend.selective_scan(**scan_arguments(**{name: value}))


def test_three_directions(backend):
    one = torch.zeros(3, 1, 1, 1)
    with pytest.raises(ValueError, match="3 directions"):
        backend.selective_scan(one, one, torch.zeros(3, 1, 1), one, one)


@pytest.mark.parametrize("field, value, error, match", [
    ("conv_weight", torch.zeros(2, 6, 3), ValueError,
     r"conv_weight must have the shape \(2, 6, 4\), not \(2, 6, 3\)"),
    ("conv_bias", torch.zeros(2, 6).double(), TypeError, "conv_bias must be.*torch.float32"),
    ("D", torch.zeros(2, 7), ValueError, r"D must have the shape \(2, 6\), not \(2, 7\)"),
    ("layernorm", nn.LayerNorm(5), ValueError, r"norm_weight must have the shape \(6,\), not \(5,\)"),
    ("x_proj", torch.zeros(2, 3, 5), ValueError, r"do not fit.*'x_proj': \(2, 3, 5\)"),
    ("dt_proj", torch.zeros(2, 5, 1), ValueError, r"do not fit.*'dt_proj': \(2, 5, 1\)"),
    ("A_log", torch.zeros(2, 6), ValueError, "A_log"),
    ("A_log", torch.zeros(2, 6, 65), ValueError, "A_log"),
])
def test_bad_weights(backend, field, value, error, match):
    grid, xz, w = make_float32("rows", 6)
    w = w._replace(**{field: here(value)})
    if field not in ("D", "layernorm"):                         # it does not read these
        with pytest.raises(error, match=match):
            backend.conv_pool(xz, w, grid)
    with pytest.raises(error, match=match):
        backend.expand_gate(xz, None, torch.zeros(2, 2, grid.steps, 6), w, grid)


def test_too_many_states(backend):
    grid, xz, w = make_float32("rows", 6, n=65)
    with pytest.raises(ValueError, match="65 states are not 1 to 64"):
        backend.conv_pool(xz, w, grid)


@torch.no_grad()
def test_bad_activations(backend):
    grid, x, w = make_float32("rows", 6)
    for bad, error, match in (
            (x.double(), (TypeError, ValueError), "float64"),
            (x[:, :5], ValueError, r"\(2, 5, 12\) do not fit a walk of \(1, 15\) tokens"),
            (x[..., :10], ValueError, r"\(2, 15, 10\) do not fit weights")):
        with pytest.raises(error, match=match):
            backend.conv_pool(bad, w, grid)
    grid, _, w = make_float32("masked", 6)                      # tables of two images
    with pytest.raises(ValueError, match=r"do not fit a walk of \(2, 5\) tokens"):
        backend.conv_pool(torch.zeros(3, 5, 12), w, grid)


@torch.no_grad()
def test_steps_that_do_not_fit(backend, monkeypatch):
    monkeypatch.setattr(backend.kernels, "_library", lambda *call: pytest.fail("C was called"))
    grid, x, w = make_float32("rows", 6)
    with pytest.raises(ValueError, match=r"\(2, 2, 4, 6\)"):
        backend.expand_gate(x, None, torch.zeros(2, 2, 4, 6), w, grid)


def test_a_mixer_that_was_tampered_with(backend):
    """Shapes that a model cannot have by itself end in an error, not beyond a tensor's
    memory."""
    model = tiny(torch.float32)
    model.layers[1].mixer.conv_weight = nn.Parameter(torch.zeros(2, 31, 4))
    with pytest.raises(ValueError, match=r"conv_weight must have the shape \(2, 32, 4\)"):
        model(images(model))
    mixer = tiny(torch.float32).layers[0].mixer
    grid = Grid("h w", "h w", "w", (("h", 4), ("w", 4)))
    with pytest.raises(ValueError, match=r"do not fit a walk of \(1, 16\) tokens"):
        mixer(torch.zeros(2, 9, 16), grid, backend)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc")
def test_memory_of_a_block_is_not_given_back_and_fetched_again():
    """In a process without glibc's variables: few page faults in a forward pass, once it has run."""
    code = """if True:
        import resource, torch, fastvim
        model = fastvim.create_model("fastvim_tiny", depth=6).eval()
        x = torch.randn(2, 3, 512, 512)
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            model(x)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        with torch.inference_mode(), fastvim.use_backend("cpu"):
            print(min(faults() for _ in range(5)))"""
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(("MALLOC_", "GLIBC_"))}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)}).stdout
    assert int(said) < 300
