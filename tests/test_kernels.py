"""The compiled backends: every operation and the whole block against plain PyTorch in float64, outputs and gradients;
autocast, torch.compile, torch.export, checkpointing; the same bits twice; bad input."""
import contextlib
import math

import pytest
import torch

import fastvim
from fastvim import CLASS, PADDING
from helpers import images, outputs_and_gradients, random_keep, tiny

PYTHON = fastvim.BACKENDS["python"]
COMPILED = [b.name for b in fastvim.BACKENDS.values() if b.kernels and (b.devices != ("cuda",)
                                                                       or torch.cuda.is_available())]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}   # of the largest reference value


@pytest.fixture(params=COMPILED)
def backend(request):
    backend = fastvim.BACKENDS[request.param]
    assert backend.kernels.error() is None, backend.kernels.error()
    with fastvim.use_backend(backend.name):
        yield backend


@contextlib.contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def relative_error(values, references):
    """The largest error of any tensor, relative to its reference's largest value; what ought to be NaN must be."""
    worst = 0.0
    for v, r in zip(values, references, strict=True):
        if r is None or r.numel() == 0:
            assert v is None or v.shape == r.shape
            continue
        v = v.detach().double().cpu()
        assert v.shape == r.shape
        worst = max(worst, ((v - r).abs().max() / r.abs().max().clamp(min=1e-3)).nan_to_num(math.inf).item())
    return worst


# ---- the operations --------------------------------------------------------------------------------------------------

GRIDS = {                                       # name: (row, storage, sizes, slots or None, class token, batch)
    "rows": (("h w", "w"), "h w", dict(h=3, w=5), None),
    "columns": (("w h", "h"), "h w", dict(h=3, w=5), None),
    "one token": (("h w", "w"), "h w", dict(h=1, w=1), None),
    "one row": (("h w", "w"), "h w", dict(h=1, w=9), None),
    "wide rows": (("h w", "w"), "h w", dict(h=2, w=37), None),
    "channels apart": (("w h c", "h"), "h w c", dict(h=4, w=3, c=2), None),
    "channels outside": (("c w h", "h"), "c h w", dict(h=4, w=3, c=2), None),
    "few groups": (("h w c", "h w"), "h w c", dict(h=5, w=7, c=2), None),
    "vim": (("h w", ""), "h w", dict(h=3, w=7), None),
    "across": (("w h", ""), "h w", dict(h=3, w=7), None),
    "masked": (("w h", "h"), "h w", dict(h=4, w=3), [[0, 2, 5, 8, 11], [1, 4, 7, PADDING, PADDING]]),
    "masked vim": (("h w", ""), "h w", dict(h=4, w=3), [[0, 2, 5, 8, 11], [1, PADDING, PADDING, PADDING, PADDING]]),
    "class token": (("h w", "w"), "h w", dict(h=3, w=2), [[0, 1, 2, CLASS, 3, 4, 5]]),
}


def make(grid, E, N=16, pool="mean", batch=2, norm="layernorm", skip=False, seed=0):
    """-> plan, xz and weights in float64."""
    row, storage, sizes, slots = GRIDS[grid]
    g = torch.Generator().manual_seed(seed)
    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=g, dtype=torch.float64) * scale
    slots = None if slots is None else torch.tensor(slots)
    plan = fastvim.make_plan(row, storage, sizes, slots, class_token=grid == "class token", pool_scale=0.7)
    if slots is not None:
        batch, L = (batch, slots.shape[1]) if len(slots) == 1 else slots.shape
    else:
        L = math.prod(sizes.values())
    R = 3
    w = fastvim.SSMWeights(
        normal(2, E, 4, scale=0.5), normal(2, E), normal(2, R + 2 * N, E, scale=E ** -0.5), normal(2, E, R),
        normal(2, E) - 1, normal(2, E, N), normal(2, E), None if norm is None else normal(E),
        normal(E) if norm == "layernorm" else None, None, None, pool, skip)
    return plan, normal(batch, L, 2 * E), w


def cast(w, dtype):
    return w._replace(**{k: v.to(dtype) for k, v in w._asdict().items() if isinstance(v, torch.Tensor)})


def reference(plan, xz, w, d_hidden):
    """Plain PyTorch's ssm, with the gradients of xz and all weights."""
    names = [k for k, v in w._asdict().items() if isinstance(v, torch.Tensor)]
    tensors = [xz, *(getattr(w, k) for k in names)]
    tensors = [t.clone().requires_grad_() for t in tensors]
    y, p, _, s = fastvim.ssm(tensors[0], w._replace(**dict(zip(names, tensors[1:]))), plan, PYTHON)
    return [p, s, y, *torch.autograd.grad((y * d_hidden).sum(), tensors, materialize_grads=True)], names


def by_kernels(backend, plan, xz, w, d_hidden, names):
    """The same by the kernels; in_proj and out_proj are unit matrices, so that the block is ssm alone."""
    B, L, width = xz.shape
    eye = [torch.eye(n).to(xz) for n in (width, width // 2)]
    walk = plan.walk(xz.device)
    leaves = [xz.clone().requires_grad_(), *(getattr(w, k).clone().requires_grad_() for k in names)]
    v = w._replace(**dict(zip(names, leaves[1:])))
    y, _, _, p, _, s = torch.ops.fastvim.block(leaves[0], None, None, None, *eye, *v[:9], *walk, w.pool,
                                               w.skip_before_expand, backend.name, True)
    return [p, s, y, *torch.autograd.grad((y * d_hidden).sum(), leaves, materialize_grads=True)]


def compare(backend, dtype, grid, E, **options):
    plan, xz, w = make(grid, E, **options)
    xz, w = xz.to(dtype).double(), cast(cast(w, torch.float32), torch.float64)          # the same numbers for both
    d_hidden = torch.randn(*xz.shape[:2], E, generator=torch.Generator().manual_seed(1)).to(dtype).double()
    expected, names = reference(plan, xz, w, d_hidden)
    values = by_kernels(backend, plan, xz.to(dtype), cast(w, torch.float32), d_hidden.to(dtype), names)
    if dtype != torch.float32 and w.pool == "max":              # which of two maxima that round to the same value gets
        values, expected = values[:3], expected[:3]             # the gradient is open; float32 checks the gradients
    error = relative_error(values, [e.detach() for e in expected])
    assert error < TOLERANCE[dtype], error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("E", [5, 40])
@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("grid", GRIDS)
def test_every_walk(backend, dtype, grid, pool, E):
    compare(backend, dtype, grid, E, pool=pool)


@pytest.mark.parametrize("options", [dict(norm=None), dict(norm="rmsnorm"), dict(skip=True), dict(N=1), dict(N=4),
                                     dict(N=33), dict(batch=1), dict(batch=129), dict(E=1), dict(E=17), dict(E=400)],
                         ids=lambda f: "-".join(f"{k}={v}" for k, v in f.items()))
def test_options_and_sizes(backend, options):
    compare(backend, torch.float32, "columns", **{"E": 24, **options})


@pytest.mark.parametrize("length", [1, 2, 3, 7, 14, 127, 128, 129, 1000, 4096])
def test_lengths_of_vim(backend, length, monkeypatch):
    monkeypatch.setitem(GRIDS, "line", (("h w", ""), "h w", dict(h=1, w=length), None))
    compare(backend, torch.float32, "line", 9, N=4, batch=1)


def test_float16_where_the_backend_knows_it(backend):
    if torch.float16 in backend.kernels.dtypes:
        compare(backend, torch.float16, "rows", 24)
    else:
        model = tiny(torch.float16)
        with fastvim.use_backend(backend.name):
            assert model(images(model)).dtype == torch.float16                          # plain PyTorch serves


@pytest.mark.parametrize("bias", [False, True], ids=["rmsnorm", "layernorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows, D", [(1, 1), (3, 7), (200, 192), (1, 300)])
def test_add_norm(backend, rows, D, dtype, bias):
    torch.manual_seed(0)
    hidden, residual, weight, b, du, dout = (torch.randn(2, rows, D).to(dtype).double().requires_grad_() if i != 2 else
                                             torch.randn(D, dtype=torch.float32).double().requires_grad_()
                                             for i in range(6))
    b = torch.randn(D).double().requires_grad_() if bias else None
    u, out = fastvim.add_norm(hidden, residual, weight, b)
    inputs = [hidden, weight, *([b] if bias else [])]
    expected = torch.autograd.grad((u * du + out * dout).sum(), inputs)
    f32 = [None if t is None else t.detach().float() for t in (residual, weight, b, dout)]
    values = backend.kernels.add_norm(hidden.detach().to(dtype), f32[0], f32[1], f32[2], dtype)
    assert values[0].dtype == dtype and values[1].dtype == torch.float32
    assert relative_error(values, [u.detach(), out.detach()]) < TOLERANCE[dtype]
    dr, dhidden, dw, db = backend.kernels.add_norm_backward(values[1], f32[1], f32[2], du.detach().to(dtype), f32[3])
    assert relative_error([dr, dw, *([db] if bias else [])], expected) < TOLERANCE[dtype]
    assert (dhidden is None) == (dtype == torch.float32) and (dhidden is None or dhidden.equal(dr.to(dtype)))


def test_an_empty_batch(backend):
    model = tiny(torch.float32)
    y = model(torch.zeros(0, 3, 32, 32))
    assert y.shape == (0, 5)
    y.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_inputs_that_are_not_contiguous(backend):
    torch.manual_seed(0)
    K, B, P, E, N = 2, 3, 5, 7, 4
    x, dt, A, Bm, Cm = (torch.randn(*shape) for shape in (
        (K, B, P, E), (K, B, P, E), (K, E, N), (K, B, P, N), (K, B, P, N)))
    arguments = x, dt, -A.exp(), Bm, Cm
    expected = backend.selective_scan(*arguments)
    odd = [torch.stack([t.movedim(1, -1)] * 2, -1)[..., 0].movedim(-1, 1) for t in arguments]
    assert not any(t.is_contiguous() for t in odd)
    assert backend.selective_scan(*odd).equal(expected)
    plan, xz, w = make("columns", 6)
    w, xz = cast(w, torch.float32), xz.float()
    p, kept = backend.conv_pool(xz, w, plan)
    y = backend.expand_gate(xz, kept, p, w, plan)
    xz2, p2 = xz.mT.contiguous().mT, p.transpose(0, 3).contiguous().transpose(0, 3)
    assert backend.conv_pool(xz2, w, plan)[0].equal(p) and backend.expand_gate(xz2, kept, p2, w, plan).equal(y)


# ---- the same bits, and values that are not finite -------------------------------------------------------------------


@pytest.mark.parametrize("grid", ["rows", "vim", "few groups", "masked"])
def test_the_same_bits_twice_and_by_any_number_of_threads(backend, grid):
    plan, xz, w = make(grid, 40, batch=9)
    xz, w = xz.float(), cast(w, torch.float32)
    names = [k for k, v in w._asdict().items() if isinstance(v, torch.Tensor)]
    runs = []
    for n in (1, 1, 2, 3):
        with threads(n):
            runs.append(by_kernels(backend, plan, xz, w, torch.ones(*xz.shape[:2], 40), names))
    # products of matrices are PyTorch's: their bits may follow the threads, ours do not
    for a, b in zip(*runs[:2]):
        assert a.equal(b)
    for run in runs[2:]:
        for i in (0, 3 + 1 + names.index("norm_w")):                                    # p; the gradient of norm_w
            if i == 0:
                assert run[i].equal(runs[0][i])
    K, B, P, E, N = 2, 3, 40, 24, 16
    torch.manual_seed(0)
    inputs = (torch.randn(K, B, P, E), torch.randn(K, B, P, E), -torch.rand(K, E, N), torch.randn(K, B, P, N),
              torch.randn(K, B, P, N), torch.randn(K, E), torch.randn(K, E))
    results = []
    for n in (1, 2, 3):
        with threads(n):
            s = backend.selective_scan(*inputs)
            walk, dxz = plan.walk("cpu"), torch.zeros_like(xz)
            p, kept = backend.conv_pool(xz, w, plan)
            gate = backend.kernels.expand_gate_backward(xz, p, w, walk, xz[..., :40].contiguous(), dxz)
            pooled = backend.kernels.conv_pool_backward(xz, kept, w, walk, p, gate[1], dxz)
            results.append([s, *backend.kernels.selective_scan_backward(*inputs, s), p, dxz, *gate, *pooled])
    for run in results[1:]:
        assert all(a is b is None or a.equal(b) for a, b in zip(run, results[0], strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("grid", ["rows", "vim", "masked"])
def test_what_is_not_finite_spreads_as_in_pytorch(backend, grid, pool, value):
    plan, xz, w = make(grid, 24, pool=pool if grid != "vim" else "mean")
    xz, w = xz.float(), cast(w, torch.float32)
    xz[0, 4, 3], xz[1, 1, 24 + 5] = value, value                                        # an x and a z
    expected, _ = fastvim.ssm(xz, w, plan, PYTHON)[::3][0], None
    with torch.no_grad():
        p = fastvim.ssm(xz, w, plan, PYTHON)[1]
    y, q = (fastvim.ssm(xz, w, plan, backend)[i] for i in (0, 1))
    assert q.isfinite().equal(p.isfinite()) and y.isfinite().equal(expected.isfinite())
    assert y.isnan().any() and y.isfinite().any()
    torch.testing.assert_close(y[expected.isfinite()], expected[expected.isfinite()], rtol=1e-3, atol=1e-4)


def test_argmax_of_ties_and_nan(backend):
    """Of equal maxima the first position wins; a NaN wins over everything."""
    plan, xz, w = make("columns", 4, pool="max")
    w = cast(w, torch.float32)._replace(conv_w=torch.zeros(2, 4, 4))                    # c = silu(bias) everywhere
    xz = xz.float()
    _, argmax = backend.conv_pool(xz, w, plan)
    first = plan.walk("cpu").start[0, :-1]
    assert argmax.equal(first[None, None, :, None].expand(argmax.shape).to(argmax))
    w = w._replace(conv_w=torch.ones(2, 4, 4))
    xz[0, 5, 0] = math.nan                                                              # row 1, column 0: position 1
    p, argmax = backend.conv_pool(xz, w, plan)
    assert p[0, 0, 0, 0].isnan() and argmax[0, 0, 0, 0] == 1


# ---- the model -------------------------------------------------------------------------------------------------------

MODELS = [dict(), dict(pool="max"), dict(schedule="vim", class_token=True), dict(class_token=True),
          dict(schedule="fastchannelvim_2d", in_chans=3), dict(schedule="channelvim", in_chans=2, class_token=True),
          dict(ssm_norm=None, block_norm="layernorm"), dict(skip_before_expand=True, ssm_norm="rmsnorm")]


@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("fields", MODELS, ids=lambda f: "-".join(map(str, f.values())) or "fastvim")
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


def test_training_with_drop_path_and_checkpointing(backend):
    def gradients(checkpointing, name):
        model = tiny(torch.float32, drop_path_rate=0.5).train()
        model.grad_checkpointing = checkpointing
        x = images(model)
        torch.manual_seed(3)
        with fastvim.use_backend(name):
            y = model(x)
        y.square().sum().backward()                             # outside: the backend of the forward pass still serves
        return [p.grad for p in model.parameters() if p.grad is not None]
    plain, ours, again = gradients(False, "python"), gradients(False, backend.name), gradients(True, backend.name)
    assert len(plain) == len(ours) > 20
    assert all(a.equal(b) for a, b in zip(ours, again))
    assert relative_error(ours, [g.double() for g in plain]) < 1e-4


def test_one_block_keeps_only_xz_the_residual_and_pooled_tensors(backend):
    model = tiny(torch.float32, depth=2, img_size=64)
    saved = []
    def pack(t):
        if t.numel() > 0 and t.data_ptr() not in {p.data_ptr() for p in model.parameters()}:
            saved.append(t)
        return t
    mixer, plan = model.layers[0].mixer, fastvim.make_plan(("h w", "w"), "h w", dict(h=8, w=8))
    hidden, residual = torch.randn(2, 64, 16, requires_grad=True), torch.randn(2, 64, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.layers[0](hidden, residual, plan)
    E = mixer.out_proj.in_features
    large = sorted(tuple(t.shape) for t in saved if t.ndim >= 3 and t.shape[-2] == 64)
    assert large == [(2, 64, 16), (2, 64, 2 * E)]


@pytest.mark.parametrize("kind", ["autocast", "bfloat16"])
def test_sixteen_bits(backend, kind):
    model = tiny(torch.float32)
    x = images(model)
    exact = outputs_and_gradients(tiny(torch.float64), x.double())
    run = model if kind == "autocast" else tiny(torch.bfloat16)
    values = {}
    for name in ("python", backend.name):
        with fastvim.use_backend(name), torch.autocast(x.device.type, torch.bfloat16, enabled=kind == "autocast"):
            values[name] = outputs_and_gradients(run, x if kind == "autocast" else x.bfloat16())
        assert {k: v.dtype for k, v in values[name].items()} == {k: v.dtype for k, v in values["python"].items()}
    errors = [relative_error(v.values(), exact.values()) for v in values.values()]
    assert errors[1] < 1.5 * errors[0]


def test_inference_mode_gives_the_same_and_tables_made_there_serve_training(backend):
    fastvim._full_walk.cache_clear()
    model = tiny(torch.float32, img_size=(40, 24))
    x = images(model)
    with torch.inference_mode():
        y, again = model(x), model(x)
    assert y.equal(again)                                       # scratch memory is shared by blocks, not by calls
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)
    model(x).sum().backward()


def test_second_derivatives_are_refused(backend):
    model = tiny(torch.float32)
    y = model(images(model)).square().sum()
    weight = model.layers[0].mixer.in_proj.weight
    gradient, = torch.autograd.grad(y, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="block_backward"):
        gradient.sum().backward()


def block_arguments(backend, grid="rows", **options):
    plan, xz, w = make(grid, 6, **options)
    w = cast(w, torch.float32)
    w = [t if t is None else t.requires_grad_() for t in w[:9]]
    hidden, residual = (torch.randn(*xz.shape[:2], 5, requires_grad=True) for _ in range(2))
    return [hidden, residual, torch.ones(5, requires_grad=True), None, torch.randn(12, 5, requires_grad=True),
            torch.randn(5, 6, requires_grad=True), *w, *plan.walk("cpu"), options.get("pool", "mean"),
            options.get("skip", False), backend.name, True]


@pytest.mark.parametrize("case", ["plain", "max", "mixer", "inference", "masked"])
def test_opcheck(backend, case):
    arguments = block_arguments(backend, grid="masked" if case == "masked" else "rows",
                                pool="max" if case == "max" else "mean")
    if case == "mixer":
        arguments[1:3] = None, None
    if case == "inference":
        arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
        arguments[-1] = False
    torch.library.opcheck(torch.ops.fastvim.block, tuple(arguments))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["python", *COMPILED])
def test_compile_and_export(name):
    """One graph without breaks, traced forward and backward; "aot_eager" leaves out only the code generation."""
    model = tiny(torch.float32, depth=1 if name == "python" else 2)
    x = images(model)
    with fastvim.use_backend(name):
        expected = outputs_and_gradients(model, x)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        values = outputs_and_gradients(compiled, x)
        for k, v in expected.items():
            torch.testing.assert_close(values.get(k, values.get(f"_orig_mod.{k}")), v, rtol=1e-3, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(compiled(x), model(x), rtol=0.02, atol=0.02)
        with torch.inference_mode():
            torch.testing.assert_close(compiled(x), expected["y"], rtol=1e-4, atol=1e-5)
        other = torch.randn(3, 3, 24, 40)                       # another size: dynamic shapes
        torch.testing.assert_close(compiled(other), model(other), rtol=1e-4, atol=1e-5)
        exported = torch.export.export(model, (x,))
        blocks = sum("fastvim.block" in str(node.target) for node in exported.graph.nodes)
        assert blocks == (0 if name == "python" else 2)
        torch.testing.assert_close(exported.module()(x), expected["y"], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_compile_to_code():
    """The default compiler, inductor, generates and compiles C++: slow, so one small model and the cpu backend."""
    model = tiny(torch.float32, depth=1, img_size=16)
    x = images(model)
    with fastvim.use_backend("cpu"):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True)
        values, expected = (outputs_and_gradients(m, x) for m in (compiled, model))
    for (k, v), w in zip(values.items(), expected.values()):
        torch.testing.assert_close(v, w, rtol=1e-3, atol=1e-5, msg=k)


# ---- bad input -------------------------------------------------------------------------------------------------------


def scan_arguments(**changes):
    K, B, P, E, N = 2, 3, 4, 5, 6
    shapes = dict(x=(K, B, P, E), dt=(K, B, P, E), A=(K, E, N), B=(K, B, P, N), C=(K, B, P, N), D=(K, E),
                  dt_bias=(K, E))
    return {**{k: torch.zeros(s) for k, s in shapes.items()}, **changes}


@pytest.mark.parametrize("changes, error, match", [
    (dict(x=torch.zeros(2, 3, 4)), ValueError, r"x \(K, B, P, E\).*\(2, 3, 4\)"),
    (dict(x="x"), ValueError, "expected x"),
    (dict(x=torch.zeros(2, 3, 0, 5)), ValueError, "x"),
    (dict(dt=torch.zeros(2, 3, 4, 6)), ValueError, r"dt must have the shape \(2, 3, 4, 5\), not \(2, 3, 4, 6\)"),
    (dict(dt=None), TypeError, "dt must be torch.float32.*NoneType"),
    (dict(B=torch.zeros(2, 3, 4, 6).double()), TypeError, "B must be torch.float32 on cpu, not torch.float64"),
    (dict(C=torch.zeros(2, 3, 4, 6, device="meta")), TypeError, "C must be.*on cpu.*not torch.float32 on meta"),
    (dict(A=torch.zeros(2, 5, 65)), ValueError, "65 states"),
    (dict(A=torch.zeros(2, 5)), ValueError, "A"),
    (dict(D=torch.zeros(5)), ValueError, r"D must have the shape \(2, 5\)"),
    (dict(dt_bias=torch.zeros(2, 5).long()), TypeError, "dt_bias"),
])
def test_bad_scan_arguments(backend, changes, error, match):
    with pytest.raises(error, match=match):
        backend.selective_scan(**scan_arguments(**changes))


def test_three_directions(backend):
    with pytest.raises(ValueError, match="3 directions"):
        backend.selective_scan(torch.zeros(3, 1, 1, 1), torch.zeros(3, 1, 1, 1), torch.zeros(3, 1, 1),
                               torch.zeros(3, 1, 1, 1), torch.zeros(3, 1, 1, 1))


@pytest.mark.parametrize("field, value, error, match", [
    ("conv_w", torch.zeros(2, 6, 3), ValueError, r"conv_w must have the shape \(2, 6, 4\)"),
    ("conv_w", None, TypeError, "conv_w.*NoneType"),
    ("conv_b", torch.zeros(2, 6).double(), TypeError, "conv_b must be torch.float32"),
    ("D", torch.zeros(2, 7), ValueError, "D must"),
    ("norm_w", torch.zeros(5), ValueError, "norm_w must"),
    ("A_log", torch.zeros(2, 6), ValueError, "A_log"),
    ("A_log", torch.zeros(2, 6, 65), ValueError, "N <= 64"),
])
def test_bad_weights(backend, field, value, error, match):
    plan, xz, w = make("rows", 6)
    w = cast(w, torch.float32)._replace(**{field: value})
    with pytest.raises(error, match=match):
        backend.conv_pool(xz.float(), w, plan)
    with pytest.raises(error, match=match):
        backend.expand_gate(xz.float(), None, torch.zeros(2, 2, plan.steps, 6), w, plan)


def test_bad_activations(backend):
    plan, xz, w = make("rows", 6)
    w, x = cast(w, torch.float32), xz.float()
    for bad, error, match in ((xz, TypeError, "float64"), (None, TypeError, "NoneType"), (x[0], ValueError, "B, L, 2E"),
                              (x[:, :5], ValueError, r"token must have the shape \(1, 5\), not \(1, 15\)"),
                              (x[..., :10], ValueError, r"conv_w must have the shape \(2, 5, 4\)")):
        with pytest.raises(error, match=match):
            backend.conv_pool(bad, w, plan)
    with pytest.raises(ValueError, match=r"s must have the shape \(2, 2, 3, 6\)"):
        backend.expand_gate(x, None, torch.zeros(2, 2, 4, 6), w, plan)
    plan, xz, w = make("masked", 6)                             # a plan of two images
    with pytest.raises(ValueError, match="plan of batch 2"):
        backend.conv_pool(torch.zeros(3, 5, 12), cast(w, torch.float32), plan)


def test_a_mixer_that_was_tampered_with(backend):
    """Shapes that a model cannot have by itself end in an error, not in memory that is not there."""
    model = tiny(torch.float32)
    model.layers[1].mixer.conv1d.weight = torch.nn.Parameter(torch.zeros(32, 1, 3))
    model.layers[1].mixer.conv1d_b.weight = torch.nn.Parameter(torch.zeros(32, 1, 3))
    with pytest.raises(ValueError, match="conv_w must have the shape"):
        model(images(model))
    mixer = tiny(torch.float32).layers[0].mixer
    plan = fastvim.make_plan(("h w", "w"), "h w", dict(h=4, w=4))
    with pytest.raises(ValueError, match=r"the plan's token must have the shape \(1, 9\)"):
        mixer(torch.zeros(2, 9, 16), plan)


def test_hooks_and_replaced_projections_are_seen(backend, caplog):
    model = tiny(torch.float32)
    x = images(model)
    y, seen = model(x), []
    handle = model.layers[1].mixer.in_proj.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    assert seen and "replaced or hooked" in caplog.text
    handle.remove()

    class Twice(torch.nn.Linear):                               # as an adapter might be
        def forward(self, u):
            return 2 * super().forward(u)
    out_proj = model.layers[0].mixer.out_proj
    model.layers[0].mixer.out_proj = Twice(out_proj.in_features, out_proj.out_features, bias=False)
    model.layers[0].mixer.out_proj.weight = torch.nn.Parameter(out_proj.weight / 2)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)


def test_what_kernels_lack_runs_in_plain_pytorch(backend, caplog):
    fastvim._announced.clear()
    for fields, word in ((dict(pool="attention"), "attention"), (dict(d_conv=3), "four taps"),
                         (dict(d_conv=0), "taps")):
        model = tiny(torch.float32, **fields)
        x = images(model)
        y = model(x)
        assert word in caplog.text and backend.name in caplog.text
        with fastvim.use_backend("python"):
            assert model(x).equal(y)
    before = len(caplog.messages)
    model(x)
    assert len(caplog.messages) == before                       # said once
