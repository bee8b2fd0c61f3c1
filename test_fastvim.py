"""Is FastVim right on this machine? Every backend's scan and mixer against slow, obvious
references, outputs and gradients; a table of the errors at the end.

    python test_fastvim.py                  this file: a minute and a half, compiling included
    python test_fastvim.py --all            and the folder tests/
    python test_fastvim.py -k scan -v       further arguments go to pytest

The references do in loops over single tokens what fastvim.py does with einops and whole tensors.
"""
import functools
import itertools
import math
import pathlib
import sys

try:
    import pytest
except ImportError:
    raise SystemExit('the tests need pytest: pip install pytest, or pip install -e ".[test]" for '
                     "all that they use") from None
import torch
import torch.nn.functional as F

import fastvim
import fastvim_kernels

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
SCAN_TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}            # see relative_error
MIXER_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3}


def is_compiled(backend):
    return backend in fastvim_kernels.KERNELS


def list_runs():
    for backend in fastvim.BACKENDS.values():
        dtypes = [torch.float32] if is_compiled(backend.name) else SCAN_TOLERANCE
        devices = [d for d in DEVICES if not backend.devices or d in backend.devices]
        for device, dtype in itertools.product(devices, dtypes):
            name = f"{backend.name}-{device}-{str(dtype)[6:]}"
            yield pytest.param(backend.name, device, dtype, id=name)


RUNS = list(list_runs())


def relative_error(values, references):
    """The largest error of a list of tensors, each relative to its reference's largest value; NaN
    counts as infinite. (Against noise, a reference that is all but zero beside the others is
    measured by a thousandth of theirs.)"""
    floor = 1e-3 * max(r.abs().max() for r in references)
    worst = 0.0
    for value, reference in zip(values, references, strict=True):
        error = (value.detach().cpu().double() - reference).abs().max()
        error = error / reference.abs().max().clamp(min=floor)
        worst = max(worst, error.nan_to_num(math.inf).item())
    return worst


# ---- the scan ------------------------------------------------------------------------------------

E = 3
N = 4
SCAN_CASES = [(1, 1, False, False), (3, 1, True, False), (1, 2, False, True), (3, 2, True, True)]


def scan_inputs(length, b, k, with_D, with_bias):
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = dict(x=normal(k, b, length, E), dt=normal(k, b, length, E) - 1,
                  A=-normal(k, E, N).exp(), B=normal(k, b, length, N), C=normal(k, b, length, N))
    if with_D:
        inputs["D"] = normal(k, E)
    if with_bias:
        inputs["dt_bias"] = normal(k, E)
    return inputs


def brute_force_scan(x, dt, A, B, C, D=None, dt_bias=None):
    """The state at step t is the sum of every step j up to t, decayed by all steps after j."""
    directions, batch, length, _ = x.shape
    if dt_bias is not None:
        dt = dt + dt_bias[:, None, None]
    dt = torch.log1p(torch.exp(dt))
    s = []
    for k, b, t in itertools.product(range(directions), range(batch), range(length)):
        steps = range(t + 1) if k == 0 else range(t, length)
        h = torch.zeros(E, N, dtype=x.dtype)
        for j in steps:
            after = dt[k, b, j + 1:t + 1] if k == 0 else dt[k, b, t:j]
            drive = (dt[k, b, j] * x[k, b, j])[:, None] * B[k, b, j]
            h = h + torch.exp(after.sum(0)[:, None] * A[k]) * drive
        s.append(h @ C[k, b, t])
        if D is not None:
            s[-1] = s[-1] + D[k] * x[k, b, t]
    return torch.stack(s).reshape(x.shape)


def weigh(y):
    """Numbers by which a loss weighs each output differently."""
    return torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).reshape(y.shape)


def with_gradients(scan, inputs, device="cpu", dtype=torch.float64):
    """-> [s, the gradient of every input]. scan: a function, or the name of a backend, whose own
    backward function is taken if it has one."""
    inputs = {k: v.to(device, dtype).requires_grad_() for k, v in inputs.items()}
    backend = fastvim.BACKENDS.get(scan)
    function = backend.selective_scan if backend else scan
    s = function(**inputs)
    if backend and is_compiled(scan):
        values = fastvim_kernels.scan_values(**inputs)
        grads = backend.kernels.run("selective_scan_backward", values, shared=0, ds=weigh(s))
        return [s, *(grad for grad in grads if grad is not None)]
    loss = (s * weigh(s)).sum()
    return [s, *torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True)]


@functools.cache
def scan_reference(length, *case):
    return with_gradients(brute_force_scan, scan_inputs(length, *case))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 14, 33])
@pytest.mark.parametrize("case", SCAN_CASES, ids=lambda c: "b{}-k{}-D{:d}-bias{:d}".format(*c))
@pytest.mark.parametrize("backend, device, dtype", RUNS)
def test_scan(backend, device, dtype, case, length, record_error):
    values = with_gradients(backend, scan_inputs(length, *case), device, dtype)
    error = relative_error(values, scan_reference(length, *case))
    record_error("scan, by length", (backend, device, str(dtype)[6:]), length, error)
    assert values[0].dtype == dtype
    assert error < SCAN_TOLERANCE[dtype]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 14, 33])
@pytest.mark.parametrize("backend", ["cpu"])
def test_the_naive_scan_in_c(backend, length, record_error, monkeypatch):
    """The specification with which scan_cpu.cpp begins: forward only."""
    kernels = fastvim.BACKENDS[backend].kernels
    assert kernels.problem() is None
    structures = fastvim_kernels.structures()
    monkeypatch.setitem(structures, "selective_scan_naive", structures["selective_scan"])
    for case in SCAN_CASES:
        inputs = {k: v.float() for k, v in scan_inputs(length, *case).items()}
        [s] = kernels.run("selective_scan_naive", fastvim_kernels.scan_values(**inputs))
        error = relative_error([s], scan_reference(length, *case)[:1])
        record_error("scan, by length", ("scan_cpu.cpp, naive",), length, error)
        assert error < SCAN_TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend, device, dtype", RUNS)
def test_scan_stays_finite_for_large_steps(backend, device, dtype):
    """dt of 1e3 forgets everything (exp(dt A) = 0), dt of e^-40 keeps everything: never NaN."""
    inputs = scan_inputs(7, 1, 2, True, True)
    for shift in (1e3, -40):
        values = with_gradients(backend, {**inputs, "dt": inputs["dt"] + shift}, device, dtype)
        assert all(v.isfinite().all() for v in values)


# ---- the mixer -----------------------------------------------------------------------------------


def naive_norm(y, norm):
    is_layernorm = isinstance(norm, torch.nn.LayerNorm)
    if is_layernorm:
        y = y - y.mean()
    y = y / (y.square().mean() + 1e-5).sqrt() * norm.weight
    return y + norm.bias if is_layernorm else y


def naive_pool(kind, c, score, divisor):
    """One step: c, a list of (e); score, a list of numbers."""
    if kind == "mean":
        return sum(c) / divisor
    if kind == "max":
        return functools.reduce(torch.maximum, c)
    weights = [torch.exp(a - max(score)) for a in score]
    return sum(v * w for v, w in zip(c, weights)) / sum(weights)


def naive_walk(row, storage, sizes, ids):
    """The places in ids in the order in which a layer walks them, and those that each step pools;
    rows without tokens are steps, too. The class token stands before the row that it pushes on."""
    order, pooled = (axes.split() for axes in row)
    cells = list(itertools.product(*(range(sizes[a]) for a in storage.split())))
    where = [dict(zip(storage.split(), cells[i])) if i >= 0 else None for i in ids]

    def coordinates(i):
        return [where[i][a] for a in order]
    walk = sorted((i for i in range(len(ids)) if ids[i] >= 0), key=coordinates)
    steps = [[i] for i in walk]
    at = len(walk) // 2
    if pooled:
        kept = [a for a in order if a not in pooled]
        keys = list(itertools.product(*(range(sizes[a]) for a in kept)))
        steps = [[i for i in walk if tuple(where[i][a] for a in kept) == key] for key in keys]
        middle = dict(zip(kept, keys[len(keys) // 2]))
        at = sum(coordinates(i) < [middle.get(a, 0) for a in order] for i in walk)
    if fastvim.CLASS in ids:
        walk.insert(at, ids.index(fastvim.CLASS))
        steps.insert(len(steps) // 2, [ids.index(fastvim.CLASS)])
    return walk, steps


def naive_mixer(m, u, row, storage, sizes, ids=None, scale=1.0, by_count=False):
    """The block's pseudo-code, one image, one direction, one token at a time. u (b s d) -> (b s d).

    ids: for each image a list of the tokens' ids, one may be CLASS; None: the full grid."""
    if ids is None:
        ids = [list(range(u.shape[1]))] * len(u)
    results = []
    for image, own_ids in zip(u, ids):
        x, z = (image @ m.in_proj.weight.T).chunk(2, 1)                     # (s e) each
        walk, steps = naive_walk(row, storage, sizes, own_ids)
        divisors = []
        for places in steps:
            alone = not row[1] or fastvim.CLASS in [own_ids[i] for i in places]
            axis = math.prod(sizes[a] for a in row[1].split())
            divisors.append(1 if alone else (len(places) if by_count else axis) / scale)
        forward = naive_direction(m, 0, x, walk, list(zip(steps, divisors)))
        backward = naive_direction(m, 1, x, walk[::-1], list(zip(steps, divisors))[::-1])
        y = [(forward[i] + backward[i]) / 2 for i in range(len(x))]
        if m.layernorm is not None:
            y = [naive_norm(v, m.layernorm) for v in y]
        results.append((torch.stack(y) * F.silu(z)) @ m.out_proj.weight.T)
    return torch.stack(results)


def naive_direction(m, k, x, walk, steps):
    """What direction k gives to each token: place -> (e)."""
    taps = 0 if m.conv_weight is None else m.conv_weight.shape[2]
    c = {}
    for position, i in enumerate(walk):
        total = m.conv_bias[k] if taps else x[i]
        for back in range(min(taps, position + 1)):
            total = total + m.conv_weight[k, :, taps - 1 - back] * x[walk[position - back]]
        c[i] = F.silu(total)
    score = {}
    if m.pool == "attention":
        score = {i: c[i] @ m.score_weight[k] + m.score_bias[k] for i in c}
    _, e, r = m.dt_proj.shape
    n = m.A_log.shape[2]
    h = torch.zeros(e, n, dtype=x.dtype)
    y = {}
    for places, divisor in steps:
        p = torch.zeros(e, dtype=x.dtype)
        if places:
            p = naive_pool(m.pool, [c[i] for i in places], [score.get(i) for i in places], divisor)
        low, B, C = (m.x_proj[k] @ p).split([r, n, n])
        dt = F.softplus(m.dt_proj[k] @ low + m.dt_bias[k])
        h = torch.exp(dt[:, None] * -torch.exp(m.A_log[k])) * h + (dt * p)[:, None] * B
        for i in places:
            y[i] = h @ C + m.D[k] * (p if m.skip_before_expand else c[i])
    return y


def make_mixer(**fields):
    """A float64 mixer whose every parameter is random: at 0 or 1 mistakes hide."""
    torch.manual_seed(0)
    fields = {**dict(embed_dim=6, depth=1, d_state=3, dt_rank=2, img_size=16), **fields}
    m = fastvim.FastVim(**fields).layers[0].mixer.double()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return m


def run_with_gradients(f, m, u):
    """-> [f(u), the gradient of u, of every parameter]."""
    u = u.clone().requires_grad_()
    y = f(u)
    inputs = [u, *m.parameters()]
    return [y, *torch.autograd.grad((y * weigh(y)).sum(), inputs, materialize_grads=True)]


@functools.cache
def mixer_reference(row, storage, sizes, scale, **fields):
    """-> an input u, and run_with_gradients of the naive mixer."""
    m = make_mixer(**fields)
    length = math.prod(length for _, length in sizes)
    torch.manual_seed(1)
    u = torch.randn(2, length, 6, dtype=torch.float64)
    return u, run_with_gradients(
        lambda u: naive_mixer(m, u, row, storage, dict(sizes), scale=scale), m, u)


MIXERS = [dict(schedule=schedule, pool=pool) for schedule, rows in fastvim.SCHEDULES.items()
          for pool in fastvim.POOLS if pool == "mean" or rows[0][1]]
MIXERS += [dict(ssm_norm=None), dict(ssm_norm="rmsnorm"), dict(skip_before_expand=True),
           dict(pool_scale=0.25), dict(expand=1), dict(d_state=1), dict(dt_rank=None),
           dict(skip_before_expand=True, pool="max"), dict(d_conv=0), dict(d_conv=1),
           dict(d_conv=2), dict(d_conv=9), dict(skip_before_expand=True, pool="max", d_conv=0)]
# Kernels have neither attention nor other convolutions: plain PyTorch runs those, and is compared
KNOWN = [f for f in MIXERS if f.get("pool") != "attention" and "d_conv" not in f]
MIXER_RUNS = [pytest.param(*run.values, fields, id="-".join([run.id, *map(str, fields.values())]))
              for run in RUNS for fields in (KNOWN if is_compiled(run.values[0]) else MIXERS)]


@pytest.mark.parametrize("backend, device, dtype, fields", MIXER_RUNS)
def test_mixer_follows_the_pseudo_code(backend, device, dtype, fields, record_error):
    """Every row of the schedule table; each axis has another length: none can stand for another."""
    cfg = fastvim.Config(**fields)
    lengths = dict(h=2, w=4, c=3, t=3)
    sizes = tuple((axis, lengths[axis]) for axis in cfg.storage.split())
    m = make_mixer(**fields).to(device, dtype)
    for row in cfg.rows:
        u, expected = mixer_reference(row, cfg.storage, sizes, cfg.pool_scale, **fields)
        grid = fastvim.Grid(cfg.storage, *row, sizes, cfg.pool_scale)
        u = u.to(device, dtype)
        values = run_with_gradients(lambda u: m(u, grid, fastvim.BACKENDS[backend]), m, u)
        error = relative_error(values, expected)
        column = cfg.pool if "schedule" in fields else "options"
        record_error("mixer", (backend, device, str(dtype)[6:]), column, error)
        assert error < MIXER_TOLERANCE[dtype]


# ---- the model -----------------------------------------------------------------------------------


def test_a_model_learns():
    """The first thing that a user does: a small model, a few steps, and the loss falls."""
    torch.manual_seed(0)
    model = fastvim.FastVim(img_size=16, patch_size=4, embed_dim=32, depth=2, num_classes=4)
    x = torch.randn(8, 3, 16, 16)
    y = torch.arange(8) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        losses.append(F.cross_entropy(model(x), y))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert abs(losses[0].item() - math.log(4)) < 0.5
    assert losses[-1] < 0.3 * losses[0]


if __name__ == "__main__":
    here = pathlib.Path(__file__).resolve().parent
    arguments = [str(here / "test_fastvim.py"), "-q"]
    if "--all" in sys.argv:                 # two processes share the files (pytest-xdist)
        arguments += [str(here / "tests"), "-n", "2", "--dist", "loadfile"]
    arguments += [argument for argument in sys.argv[1:] if argument != "--all"]
    sys.exit(pytest.main(arguments))
