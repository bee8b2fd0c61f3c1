"""Is FastVim right on this machine? Every backend's scan and mixer against slow, obvious references, with gradients.

    python test_fastvim.py                  this file and the folder tests/; further arguments go to pytest
    python test_fastvim.py -k scan -v

The references here do in loops over single tokens what fastvim.py does with einops and whole tensors.
"""
import functools
import itertools
import math
import pathlib
import sys

try:
    import pytest
except ImportError:
    raise SystemExit('the tests need pytest: pip install pytest, or pip install -e ".[test]" for all that they use')
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck as full_gradcheck

import fastvim

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
PYTHON = fastvim.BACKENDS["python"]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}              # relative to the largest reference value
RUNS = [pytest.param(backend.name, device, dtype, id=f"{backend.name}-{device}-{str(dtype)[6:]}")
        for backend in fastvim.BACKENDS.values() for device in DEVICES for dtype in TOLERANCE
        if (not backend.devices or device in backend.devices) and (
            not backend.kernels or dtype in backend.kernels.dtypes)]


def relative_error(values, references):
    """The largest error of a list of tensors, each relative to its reference's largest value; NaN counts as infinite.
    (Against noise, a reference that is all but zero beside the others is measured by a thousandth of theirs.)"""
    floor = 1e-3 * max(r.abs().max() for r in references)
    errors = ((v.detach().cpu().double() - r).abs().max() / r.abs().max().clamp(min=floor)
              for v, r in zip(values, references, strict=True))
    return max(e.nan_to_num(math.inf).item() for e in errors)


# ---- the scan --------------------------------------------------------------------------------------------------------

E, N = 3, 4
SCAN_CASES = [(1, 1, False, False), (3, 1, True, False), (1, 2, False, True), (3, 2, True, True)]  # B, K, D, dt_bias


def scan_inputs(length, B, K, with_D, with_bias):
    g = torch.Generator().manual_seed(length)
    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)
    return dict(x=normal(K, B, length, E), dt=normal(K, B, length, E) - 1, A=-normal(K, E, N).exp(),
                B=normal(K, B, length, N), C=normal(K, B, length, N),
                **(dict(D=normal(K, E)) if with_D else {}), **(dict(dt_bias=normal(K, E)) if with_bias else {}))


def brute_force_scan(x, dt, A, B, C, D=None, dt_bias=None):
    """Written out: the state at step t is the sum of every step j up to t, decayed by all steps after j."""
    K, batch, length, _ = x.shape
    dt = torch.log1p(torch.exp(dt if dt_bias is None else dt + dt_bias[:, None, None]))
    s = []
    for k, b in itertools.product(range(K), range(batch)):
        for t in range(length):
            h = torch.zeros(E, N, dtype=x.dtype)
            for j in range(t + 1) if k == 0 else range(t, length):
                after = dt[k, b, j + 1:t + 1] if k == 0 else dt[k, b, t:j]               # the steps between j and t
                h = h + torch.exp(after.sum(0)[:, None] * A[k]) * (dt[k, b, j] * x[k, b, j])[:, None] * B[k, b, j]
            s.append(h @ C[k, b, t] + (0 if D is None else D[k] * x[k, b, t]))
    return torch.stack(s).reshape(x.shape)


def with_gradients(scan, inputs, device="cpu", dtype=torch.float64):
    """-> [s, the gradient of every input], of a loss that weighs each output differently. scan: a function, or the
    name of a backend, whose own backward function is taken if it has one."""
    inputs = {k: v.to(device, dtype).requires_grad_() for k, v in inputs.items()}
    backend = fastvim.BACKENDS.get(scan)
    s = (backend.selective_scan if backend else scan)(**inputs)
    ds = torch.linspace(-1, 1, s.numel(), device=device, dtype=dtype).reshape(s.shape)
    if backend and backend.kernels:
        grads = backend.kernels.checked_scan_backward(**{"D": None, "dt_bias": None, **inputs}, ds=ds)
        return [s, *(g for g in grads if g is not None)]
    return [s, *torch.autograd.grad((s * ds).sum(), list(inputs.values()), materialize_grads=True)]


@functools.lru_cache(None)
def scan_reference(length, *case):
    return with_gradients(brute_force_scan, scan_inputs(length, *case))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 14, 33])
@pytest.mark.parametrize("case", SCAN_CASES, ids=lambda c: "B{}-K{}-D{:d}-bias{:d}".format(*c))
@pytest.mark.parametrize("backend, device, dtype", RUNS)
def test_scan(backend, device, dtype, case, length, record_scan_error):
    values = with_gradients(backend, scan_inputs(length, *case), device, dtype)
    error = relative_error(values, scan_reference(length, *case))
    record_scan_error((backend, device, str(dtype)[6:]), length, error)
    assert values[0].dtype == dtype and error < TOLERANCE[dtype]


@pytest.mark.parametrize("backend, device, dtype", RUNS)
def test_scan_stays_finite_for_large_steps(backend, device, dtype):
    """dt of 1e3 forgets everything (exp(dt A) = 0), dt of e^-40 keeps everything: no NaN from either end."""
    inputs = scan_inputs(7, 1, 2, True, True)
    for shift in (1e3, -40):
        values = with_gradients(backend, {**inputs, "dt": inputs["dt"] + shift}, device, dtype)
        assert all(v.isfinite().all() for v in values)


# ---- the mixer -------------------------------------------------------------------------------------------------------


def naive_norm(y, norm):
    if isinstance(norm, torch.nn.LayerNorm):
        y = y - y.mean()
        return y / (y.square().mean() + 1e-5).sqrt() * norm.weight + norm.bias
    return y / (y.square().mean() + 1e-5).sqrt() * norm.weight


def naive_pool(c, score, kind, scale, divisor):
    """One group: c, a list of (E); score, a list of numbers. A group without tokens is zero."""
    if kind == "mean":
        return sum(c) / divisor * scale
    if kind == "max":
        return functools.reduce(torch.maximum, c)
    total = sum(torch.exp(a - max(score)) for a in score)
    return sum(v * torch.exp(a - max(score)) / total for v, a in zip(c, score))


def naive_steps(row, storage, sizes, slots, walk):
    """Which tokens each scan step pools, as lists of slots in walking order; walk is the sequence of slots."""
    order, pooled = row
    kept = [a for a in order.split() if a not in pooled.split()]
    cells = list(itertools.product(*(range(sizes[a]) for a in storage.split())))        # id -> coordinates
    where = [dict(zip(storage.split(), cells[i])) if i >= 0 else None for i in slots]    # slot -> coordinates
    image = [i for i in walk if slots[i] >= 0]
    if pooled:
        keys = list(itertools.product(*(range(sizes[a]) for a in kept)))                 # rows without tokens count too
        steps = [[i for i in image if tuple(where[i][a] for a in kept) == key] for key in keys]
    else:
        steps = [[i] for i in image]
    if fastvim.CLASS in slots:
        steps.insert(len(steps) // 2, [slots.index(fastvim.CLASS)])
    return steps


def naive_walk(row, storage, sizes, slots):
    """The slots in the order in which a layer walks them. The class token stands before the row that it pushed back."""
    order, pooled = row
    cells = list(itertools.product(*(range(sizes[a]) for a in storage.split())))
    def place(i):
        where = dict(zip(storage.split(), cells[slots[i]]))
        return [where[a] for a in order.split()]
    walk = sorted((i for i, s in enumerate(slots) if s >= 0), key=place)
    if fastvim.CLASS in slots:
        at = len(walk) // 2
        if pooled:                              # pooled schedules with class tokens: the scanned axes come first
            kept = [a for a in order.split() if a not in pooled.split()]
            middle = list(itertools.product(*(range(sizes[a]) for a in kept)))
            middle = dict(zip(kept, middle[len(middle) // 2]))
            first = [middle.get(a, 0) for a in order.split()]
            at = sum(place(i) < first for i in walk)
        walk.insert(at, slots.index(fastvim.CLASS))
    return walk


def naive_mixer(m, u, row, storage, sizes, slots=None, count=False):
    """The block's pseudo-code, one image, one direction and one token at a time. u (B S D) -> (B S D).

    slots: for each image a list of token ids, fastvim.CLASS or fastvim.PADDING; None: the full grid."""
    cfg = m.cfg
    if slots is None:
        slots = [list(range(u.shape[1]))] * len(u)
    width, R = cfg.expand * cfg.embed_dim, m.dt_proj.in_features
    results = []
    for image, image_slots in zip(u, slots):
        x, z = (image @ m.in_proj.weight.T).split(width, 1)                              # (S E) each
        forward = naive_walk(row, storage, sizes, image_slots)
        forward_steps = naive_steps(row, storage, sizes, image_slots, forward)
        y = [torch.zeros(width, dtype=u.dtype) for _ in image_slots]
        for b in ("", "_b"):
            walk = forward if b == "" else forward[::-1]
            steps = forward_steps if b == "" else forward_steps[::-1]
            x_proj, dt_proj = getattr(m, f"x_proj{b}"), getattr(m, f"dt_proj{b}")
            A, D = -torch.exp(getattr(m, f"A{b}_log")), getattr(m, f"D{b}")
            c, score = {}, {}
            for i, slot in enumerate(walk):
                if cfg.d_conv:
                    conv, total = getattr(m, f"conv1d{b}"), 0
                    for tap in range(min(cfg.d_conv, i + 1)):                            # tap steps back
                        total = total + conv.weight[:, 0, cfg.d_conv - 1 - tap] * x[walk[i - tap]]
                    c[slot] = F.silu(total + conv.bias)
                else:
                    c[slot] = F.silu(x[slot])
                if cfg.pool == "attention":
                    score[slot] = (getattr(m, f"pool_proj{b}")(c[slot]))[0]
            h = torch.zeros(width, cfg.d_state, dtype=u.dtype)
            for members in steps:
                is_class = bool(members) and image_slots[members[0]] == fastvim.CLASS
                if not members:
                    p = torch.zeros(width, dtype=u.dtype)
                elif is_class or not row[1]:
                    p = c[members[0]]
                else:
                    divisor = len(members) if count else math.prod(sizes[a] for a in row[1].split())
                    p = naive_pool([c[i] for i in members], [score.get(i) for i in members], cfg.pool, cfg.pool_scale,
                                   divisor)
                dt, Bm, Cm = (x_proj.weight @ p).split([R, cfg.d_state, cfg.d_state])
                dt = F.softplus(dt_proj.weight @ dt + dt_proj.bias)
                h = torch.exp(dt[:, None] * A) * h + (dt * p)[:, None] * Bm
                s = h @ Cm
                for i in members:
                    y[i] = y[i] + s + D * (p if cfg.skip_before_expand else c[i])
        y = torch.stack([v / 2 if m.layernorm is None else naive_norm(v / 2, m.layernorm) for v in y])
        results.append((y * F.silu(z)) @ m.out_proj.weight.T)
    return torch.stack(results)


def make_mixer(**fields):
    """A float64 mixer whose every parameter is random: none is left at 0 or 1, where mistakes hide."""
    torch.manual_seed(0)
    fields = {**dict(embed_dim=6, depth=1, d_state=3, dt_rank=2, img_size=16), **fields}
    m = fastvim.FastVim(**fields).layers[0].mixer.double()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return m


def run_with_gradients(f, m, u):
    """-> [f(u), the gradient of u, of every parameter], for a loss that weighs each output differently."""
    u, names = u.clone().requires_grad_(), list(m.parameters())
    y = f(u)
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).reshape(y.shape)).sum()
    return [y, *torch.autograd.grad(loss, [u, *names], materialize_grads=True)]


def compare_mixer(m, row, storage, sizes, backend="python", device="cpu", dtype=torch.float64, tolerance=None):
    torch.manual_seed(1)
    u = torch.randn(2, math.prod(sizes[a] for a in storage.split()), m.cfg.embed_dim, dtype=torch.float64)
    expected = run_with_gradients(lambda u: naive_mixer(m, u, row, storage, sizes), m, u)
    plan = fastvim.make_plan(row, storage, sizes, pool_scale=m.cfg.pool_scale)
    run = make_mixer(**vars(m.cfg)).to(device, dtype)
    with fastvim.use_backend(backend):
        values = run_with_gradients(lambda u: run(u, plan), run, u.to(device, dtype))
    assert relative_error(values, expected) < (tolerance or TOLERANCE[dtype])


@pytest.mark.parametrize("schedule, pool", [(schedule, pool) for schedule, rows in fastvim.SCHEDULES.items()
                                            for pool in fastvim.POOLS if pool == "mean" or rows[0][1]])
@pytest.mark.parametrize("backend, device, dtype", RUNS)
def test_mixer_follows_the_pseudo_code(backend, device, dtype, schedule, pool):
    """Every row of the schedule table; each axis has another length, so that none can stand for another."""
    m, rows = make_mixer(schedule=schedule, pool=pool), fastvim.SCHEDULES[schedule]
    for row in rows:
        compare_mixer(m, row, rows[0][0], dict(h=2, w=4, c=3), backend, device, dtype,
                      tolerance=1e-3 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("fields", [
    dict(d_conv=0), dict(d_conv=1), dict(d_conv=2), dict(d_conv=9), dict(ssm_norm=None), dict(ssm_norm="rmsnorm"),
    dict(skip_before_expand=True), dict(pool_scale=0.25), dict(expand=1), dict(d_state=1), dict(dt_rank=None),
    dict(skip_before_expand=True, pool="max", d_conv=0)], ids=lambda f: "-".join(f"{k}={v}" for k, v in f.items()))
@pytest.mark.parametrize("backend, device, dtype", RUNS)
def test_mixer_options(backend, device, dtype, fields):
    compare_mixer(make_mixer(**fields), ("w h", "h"), "h w", dict(h=3, w=2), backend, device, dtype,
                  tolerance=1e-3 if dtype == torch.float32 else 1e-10)


# ---- gradients of each operation, by finite differences --------------------------------------------------------------

gradcheck = functools.partial(full_gradcheck, raise_exception=False)           # whose message is all of the Jacobian
FULL = fastvim.make_plan(("w h", "h"), "h w", dict(h=3, w=2))
# two images of three rows of two tokens and a class token: one keeps all but a row, one keeps one token of the last row
RAGGED = fastvim.make_plan(("h w", "w"), "h w", dict(h=3, w=2), class_token=True, pool_scale=0.5,
                           slots=torch.tensor([[0, 1, -1, 4, 5], [5, -2, -1, -2, -2]]))


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("options", [False, True], ids=["plain", "D-bias"])
def test_gradcheck_scan(K, options):
    inputs = [normal(K, 2, 3, 2), normal(K, 2, 3, 2), normal(K, 2, 2), normal(K, 2, 3, 2), normal(K, 2, 3, 2)]
    assert gradcheck(fastvim.selective_scan, inputs + [normal(K, 2), normal(K, 2)] * options)


@pytest.mark.parametrize("W", [0, 1, 3, 6])
def test_gradcheck_conv(W):
    weights = (normal(2, 2, W), normal(2, 2)) if W else (None, None)
    assert gradcheck(fastvim.conv_silu, (normal(2, 4, 2), *weights))


@pytest.mark.parametrize("kind", fastvim.POOLS)
@pytest.mark.parametrize("plan, S", [(FULL, 6), (RAGGED, 5)], ids=["full", "ragged"])
def test_gradcheck_pool(plan, S, kind):
    score = normal(2, 2, S, 1) if kind == "attention" else None
    assert gradcheck(lambda c, score: fastvim.pool(c, plan, kind, score), (normal(2, 2, S, 2), score))


def ssm_weights(m, tensors):
    """SSMWeights of a mixer with its tensors replaced by those given, in order."""
    w, tensors = m.weights(), iter(tensors)
    return w._replace(**{k: next(tensors) for k, v in w._asdict().items() if isinstance(v, torch.Tensor)})


def weight_tensors(m):
    return [v.detach().requires_grad_() for v in m.weights() if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("fields", [dict(), dict(ssm_norm=None, skip_before_expand=True), dict(ssm_norm="rmsnorm")],
                         ids=["layernorm", "none-skip", "rmsnorm"])
@pytest.mark.parametrize("plan, S", [(FULL, 6), (RAGGED, 5)], ids=["full", "ragged"])
def test_gradcheck_expand_gate(plan, S, fields):
    m = make_mixer(embed_dim=1, d_state=1, dt_rank=1, **fields)
    names = [k for k, v in m.weights()._asdict().items() if k in ("D", "norm_w", "norm_b") and v is not None]
    def f(xz, c, s, *tensors):
        return fastvim.expand_gate(xz, c, s, m.weights()._replace(**dict(zip(names, tensors))), plan)
    inputs = normal(2, S, 4), normal(2, 2, S, 2), normal(2, 2, plan.steps, 2)
    used = [getattr(m.weights(), k).detach().requires_grad_() for k in names]
    assert gradcheck(f, (*inputs, *used))


@pytest.mark.parametrize("pool", fastvim.POOLS)
@pytest.mark.parametrize("plan, S", [(FULL, 6), (RAGGED, 5)], ids=["full", "ragged"])
def test_gradcheck_ssm(plan, S, pool):
    """The whole composite, with respect to its input and every weight."""
    m = make_mixer(embed_dim=1, d_state=2, dt_rank=1, d_conv=2, pool=pool)
    assert gradcheck(lambda xz, *tensors: fastvim.ssm(xz, ssm_weights(m, tensors), plan, PYTHON)[0],
                     (normal(2, S, 4), *weight_tensors(m)), fast_mode=True)


# ---- the model -------------------------------------------------------------------------------------------------------


def test_a_model_learns():
    """The first thing that a user does: a small model, a few steps, and the loss falls."""
    model = fastvim.FastVim(img_size=16, patch_size=4, embed_dim=32, depth=2, num_classes=4)
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8) % 4
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(15):
        losses.append(F.cross_entropy(model(x), y))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert abs(losses[0].item() - math.log(4)) < 0.5 and losses[-1] < 0.3 * losses[0]


if __name__ == "__main__":
    here = pathlib.Path(__file__).resolve().parent
    sys.exit(pytest.main([str(here / "test_fastvim.py"), str(here / "tests"), "-q", *sys.argv[1:]]))
