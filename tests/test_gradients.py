"""Gradients of each operation of fastvim.py, by finite differences."""
import functools

import pytest
import torch
from torch.autograd import gradcheck as full_gradcheck

import fastvim
from fastvim import CLASS, HOLE, Grid, GridWithHoles
from test_fastvim import make_mixer

gradcheck = functools.partial(full_gradcheck, raise_exception=False)    # its message: a Jacobian
SIZES = (("h", 3), ("w", 2))
# holes: two images of three rows of two tokens and a class token; one keeps all but a row, the
# other one token of the last row
GRIDS = {
    "full": (Grid("h w", "w h", "h", SIZES), 6),
    "holes": (GridWithHoles(
        Grid("h w", "h w", "w", SIZES, 0.5),
        torch.tensor([[0, 1, CLASS, 4, 5], [5, HOLE, CLASS, HOLE, HOLE]]), class_token=True), 5),
}


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("options", [False, True], ids=["plain", "D-bias"])
def test_scan(k, options):
    inputs = [normal(k, 2, 3, 2), normal(k, 2, 3, 2), normal(k, 2, 2), normal(k, 2, 3, 2),
              normal(k, 2, 3, 2)]
    if options:
        inputs += [normal(k, 2), normal(k, 2)]
    assert gradcheck(fastvim.selective_scan, inputs)


@pytest.mark.parametrize("taps", [0, 1, 3, 6])
def test_conv(taps):
    weights = (None, None)
    if taps:
        weights = (normal(2, 2, taps), normal(2, 2))
    assert gradcheck(fastvim.conv_silu, (normal(2, 4, 2), *weights))


@pytest.mark.parametrize("kind", fastvim.POOLS)
@pytest.mark.parametrize("grid", GRIDS)
def test_pool(grid, kind):
    grid, length = GRIDS[grid]
    score = normal(2, 2, length, 1) if kind == "attention" else None
    assert gradcheck(lambda c, score: grid.pool(c, kind, score), (normal(2, 2, length, 2), score))


# The operations below read their weights from a mixer. gradcheck changes its inputs in place, so
# that it is enough to name them: the functions do not use those arguments. (Four inner channels:
# the LayerNorm of two is a sign, whose gradient is zero.)


@pytest.mark.parametrize("fields", [
    dict(), dict(ssm_norm=None, skip_before_expand=True), dict(ssm_norm="rmsnorm")],
    ids=["layernorm", "none-skip", "rmsnorm"])
@pytest.mark.parametrize("grid", GRIDS)
def test_expand_gate(grid, fields):
    grid, length = GRIDS[grid]
    m = make_mixer(embed_dim=2, d_state=1, dt_rank=1, **fields)
    used = [m.D]
    if m.layernorm is not None:
        used += m.layernorm.parameters()

    def f(xz, c, s, *used):
        return fastvim.expand_gate(xz, c, s, m.weights(), grid)
    assert gradcheck(f, (normal(2, length, 8), normal(2, 2, length, 4),
                         normal(2, 2, grid.steps, 4), *used))


@pytest.mark.parametrize("pool", fastvim.POOLS)
@pytest.mark.parametrize("grid", GRIDS)
def test_ssm(grid, pool):
    """The whole composite, with respect to its input and every weight."""
    grid, length = GRIDS[grid]
    m = make_mixer(embed_dim=2, d_state=2, dt_rank=1, d_conv=2, pool=pool)
    with torch.no_grad():                                       # the scan shall weigh as the skip
        m.x_proj *= 10
        m.dt_bias += 1
    used = [p for name, p in m.named_parameters() if name not in ("in_proj.weight",
                                                                  "out_proj.weight")]

    def f(xz, *used):
        return fastvim.ssm(xz, m.weights(), grid)
    assert gradcheck(f, (normal(2, length, 8), *used), fast_mode=True)
