"""How a layer walks the token grid: full grids, masks, class tokens; what they mix."""
import itertools
import math

import pytest
import torch
from einops import rearrange

import fastvim
import fastvim_kernels
from fastvim import CLASS, HOLE, Grid, GridWithHoles
from helpers import assert_close, images, outputs_and_gradients, random_keep, tiny, walk_of
from test_fastvim import make_mixer, naive_mixer, run_with_gradients

PYTHON = fastvim.BACKENDS["python"]
ROWS = [pytest.param(row, rows[0][0], id=f"{name}-{i}") for name, rows in fastvim.SCHEDULES.items()
        for i, row in enumerate(rows)]
POOLED_ROWS = [r for r in ROWS if r.values[0][1]]
SIZES = dict(h=3, w=2, c=5, t=4)


def make_grid(row, storage, sizes, scale=1.0):
    order, pooled = row
    return Grid(storage, order, pooled, tuple((a, sizes[a]) for a in storage.split()), scale)


def with_holes(row, sizes, ids, scale=1.0, **options):
    """A grid of h w of which the tokens ids are left; the layer walks it as its row says."""
    return GridWithHoles(make_grid(row, "h w", sizes, scale), torch.as_tensor(ids), **options)


def walk_by_loops(row, storage, sizes):
    """-> for each position of the walk its token, and its scan step."""
    order, pooled = (axes.split() for axes in row)
    cells = itertools.product(*(range(sizes[a]) for a in storage.split()))
    ids = {cell: i for i, cell in enumerate(cells)}
    steps = {}
    tokens = []
    groups = []
    for index in itertools.product(*(range(sizes[a]) for a in order)):
        where = dict(zip(order, index))
        kept = tuple(where[a] for a in order if a not in pooled)
        groups.append(steps.setdefault(kept, len(steps)))
        tokens.append(ids[tuple(where[a] for a in storage.split())])
    return torch.tensor(tokens), torch.tensor(groups)


# ---- full grids ----------------------------------------------------------------------------------


@pytest.mark.parametrize("row, storage", ROWS)
def test_grid_tables_and_loops_agree(row, storage):
    """The axes of einops, the tables that kernels follow, and loops over coordinates."""
    grid = make_grid(row, storage, SIZES, 0.5)
    token, group = walk_by_loops(row, storage, SIZES)
    length = len(token)
    steps = int(group.max()) + 1
    assert grid.steps == steps
    ids = torch.arange(length)[None, :, None]
    assert grid.flatten(ids)[0, :, 0].equal(token)
    assert grid.expand(torch.arange(steps)[None, None, :, None])[0, 0, :, 0].equal(group)
    walk = walk_of(grid)
    assert walk.token[0].equal(token.int())
    assert walk.group[0].equal(group.int())
    mean = 0.5 / (length // steps) if row[1] else 1.0           # nothing pooled, nothing scaled
    assert walk.weight[0].equal(torch.full((length,), mean))
    for step in range(steps):
        members = walk.member[0, walk.start[0, step]:walk.start[0, step + 1]]
        assert members.equal((group == step).nonzero()[:, 0].int())
    assert walk.start[0, -1] == length


@pytest.mark.parametrize("row, storage", ROWS)
def test_flatten_has_an_inverse_and_masked_grids_walk_the_same_way(row, storage):
    full = make_grid(row, storage, SIZES)
    token, group = walk_by_loops(row, storage, SIZES)
    ids = torch.arange(len(token)).expand(2, -1)
    x = torch.randn(2, len(token), 3)
    same_order = GridWithHoles(full, ids)
    mixed_order = GridWithHoles(full, ids[:, torch.randperm(len(token))])
    assert full.flatten(x).equal(x[:, token])
    assert same_order.flatten(x).equal(x[:, token])
    for grid in (full, same_order, mixed_order):
        assert grid.unflatten(grid.flatten(x)).equal(x)
        assert grid.steps == full.steps
    s = torch.randn(2, 2, full.steps, 3)
    assert same_order.expand(s).equal(s[:, :, group])
    walk = walk_of(same_order)
    assert walk.group.equal(group.int().expand(2, -1))


# ---- masks: everything kept is the full grid, fewer tokens against the naive mixer ---------------


@pytest.mark.parametrize("class_token", [False, True], ids=["", "class"])
@pytest.mark.parametrize("schedule, fields", [
    ("vim", {}), ("fastvim", {}), ("fastvim", dict(mask_divisor="count")),
    ("fastvim", dict(pool_scale=0.5)), ("fastvim", dict(pool="max")),
    ("fastvim", dict(pool="attention")), ("pool_row", {}), ("channelvim_spatial", {}),
    ("fastchannelvim", dict(pool="max")), ("fastchannelvim_spatial", dict(pool="attention")),
    ("fastchannelvim_2d", {}), ("fastchannelvim_2d", dict(mask_divisor="count"))],
    ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())))
def test_everything_kept_is_the_full_grid_in_any_order(schedule, fields, class_token):
    model = tiny(schedule=schedule, class_token=class_token, in_chans=3, img_size=(32, 24),
                 **fields)
    x = images(model)
    tokens = 12 * (3 if model.cfg.per_channel else 1)
    full = outputs_and_gradients(model, x)
    for kept in (torch.arange(tokens).expand(2, -1), random_keep(2, tokens, tokens)):
        assert_close(outputs_and_gradients(model, x, keep=kept), full)


def rectangle(layouts):
    """Lists of ids -> lists of the same length."""
    width = max(map(len, layouts))
    return [list(ids) + [HOLE] * (width - len(ids)) for ids in layouts]


MASKS = {       # ids of a 3 x 2 (or, for odd and even, 2 x 3) grid; the class token lies anywhere
    "a row empty": [[0, 1, 4, 5], [2, 3, 4, 5]],
    "one token each": [[5], [2]],
    "padded": [[5], [0, 2, 3], [1, 2, 3, 4, 5]],
    "class": [[0, 1, 4, CLASS, 5], [CLASS, 2, 3, 4, 5]],
    "class, all": [[0, 1, 2, CLASS, 3, 4, 5]],
    "class, padded": [[5, CLASS], [0, CLASS, 2, 3], [1, 2, CLASS, 3, 4, 5]],
    "class, padding within": [[5, HOLE, HOLE, CLASS], [CLASS, 0, 2, 3]],
    "class alone": [[CLASS], [CLASS, 3]]}


@pytest.mark.parametrize("fields", [
    dict(), dict(pool="max"), dict(pool="attention"), dict(mask_divisor="count"),
    dict(pool_scale=0.25), dict(skip_before_expand=True)],
    ids=lambda f: "-".join(map(str, f.values())) or "mean")
@pytest.mark.parametrize("mask", MASKS)
def test_masked_mixer_follows_the_pseudo_code(mask, fields):
    """Both layers of FastVim, and Vim, over grids with odd and even numbers of rows: rows without
    tokens take a step of the scan with input zero, the class token the middle one. Gradients must
    be finite and agree, too."""
    ids = rectangle(MASKS[mask])
    real = torch.tensor(ids) != HOLE
    own = [[i for i in image if i != HOLE] for image in ids]
    m = make_mixer(**fields)
    scale = fields.get("pool_scale", 1.0)
    by_count = "mask_divisor" in fields
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(*real.shape, 6, dtype=torch.float64, generator=generator)
    rows = [("h w", "w"), ("w h", "h")]
    if not fields:
        rows.append(("h w", ""))
    for row, sizes in itertools.product(rows, (dict(h=3, w=2), dict(h=2, w=3))):
        grid = with_holes(row, sizes, ids, scale, class_token=CLASS in ids[0], by_count=by_count)

        def naive(u):
            return torch.cat([
                naive_mixer(m, u[i:i + 1, real[i]], row, "h w", sizes, [own[i]], scale, by_count)[0]
                for i in range(len(ids))])
        expected = run_with_gradients(naive, m, u)
        actual = run_with_gradients(lambda u: m(u, grid, PYTHON)[real], m, u)
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e)


def test_a_row_without_tokens_pools_to_zero_and_takes_a_step():
    keep = [[0, 1, 6, 7]]                                       # of a 4 x 2 grid: rows 0 and 3
    sizes = dict(h=4, w=2)
    m = make_mixer()
    grid = with_holes(("h w", "w"), sizes, keep)
    _, p = fastvim.conv_pool(torch.randn(1, 4, 24).double(), m.weights(), grid)
    assert grid.steps == p.shape[2] == 4
    assert (p[:, :, 1:3] == 0).all()
    assert (p[:, :, [0, 3]] != 0).all()
    near = with_holes(("h w", "w"), sizes, [[0, 1, 2, 3]])      # rows 0 and 1
    u = torch.randn(1, 4, 6, dtype=torch.float64)
    change = m(u, grid, PYTHON) - m(u, near, PYTHON)
    assert change.abs().max() > 1e-4                            # the state decays in between


def test_count_divides_by_kept_tokens_and_axis_by_the_length():
    keep = torch.tensor([[0, 3, 4, 5], [1, 6, 7, HOLE]])        # of a 3 x 3 grid
    c = torch.randn(2, 2, 4, 5)
    rows = keep // 3
    for by_count in (False, True):
        grid = with_holes(("h w", "w"), dict(h=3, w=3), keep, by_count=by_count)
        p = grid.pool(c)
        walk = walk_of(grid)
        for b, r in itertools.product(range(2), range(3)):
            here = (rows[b] == r) & (keep[b] >= 0)
            members = c[:, b, here]
            number = members.shape[1] if by_count else 3
            assert_close(p[:, b, r], members.sum(1) / max(number, 1), 1e-5, 1e-6)
            assert (walk.group[b] == r).equal(here)             # sorted ids: walked as they lie
            assert (walk.weight[b, here] == torch.tensor(1 / max(number, 1))).all()
        assert walk.group[1, 3] == -1


# ---- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_token", [False, True], ids=["", "class"])
@pytest.mark.parametrize("fields", [
    dict(schedule="vim"), dict(), dict(pool="max"), dict(pool="attention"),
    dict(mask_divisor="count"), dict(schedule="fastchannelvim")],
    ids=lambda f: "-".join(f.values()) or "mean")
def test_images_of_a_batch_do_not_meet(fields, class_token):
    """Image i alone, with only its own kept tokens, gives what it gives in a batch padded with -1;
    the gradients of a batch are the sum of the images'."""
    model = tiny(class_token=class_token, **fields)
    kept = [[9, 5, 8, 15, 2, 3], [13], list(range(15, 3, -1))]  # two keep nothing of row 0
    x = images(model, len(kept))
    width = max(map(len, kept))
    keep = torch.tensor([ids + [-1] * (width - len(ids)) for ids in kept])
    for batch, alone in ((None, [None] * 3), (keep, [torch.tensor([ids]) for ids in kept])):
        together = outputs_and_gradients(model, x, keep=batch)
        single = [outputs_and_gradients(model, x[i:i + 1], keep=alone[i]) for i in range(3)]
        expected = {}
        for name in together:
            values = [s[name] for s in single]
            expected[name] = torch.cat(values) if name in "xy" else sum(values)
        assert_close(together, expected)


@pytest.mark.parametrize("schedule", ["vim", "fastvim"])
def test_the_order_of_kept_ids_does_not_matter(schedule):
    model = tiny(schedule=schedule)
    x = images(model)
    keep = random_keep(2, 16, 6)
    keep[0, 2] = -1                                             # padding may stand anywhere
    features = model.forward_features(x, keep=keep)
    for other in (keep.sort(1).values, keep.flip(1), keep.int()):
        assert model.forward_features(x, keep=other).equal(features)
    assert features.shape == (2, 6, 16)


# ---- what reaches what ---------------------------------------------------------------------------


def final_token(model, x):
    return model.forward_features(x)[0, 0]                      # the token of the upper left corner


@pytest.mark.parametrize("schedule", ["vim", "fastvim", "pool_col", "pool_row"])
def test_every_token_reaches_every_other(schedule):
    """Without the convolution, whose taps wrap around row ends, after two layers."""
    model = tiny(schedule=schedule, d_conv=0, depth=2, img_size=(24, 40))
    x = images(model, 1).requires_grad_()
    final_token(model, x).square().sum().backward()
    reached = rearrange(x.grad, "1 c (h p) (w q) -> h w (c p q)", p=8, q=8).abs().amax(-1)
    assert (reached > 1e-9).all()


def test_only_alternation_tells_the_tokens_of_a_row_apart():
    """Swapping two tokens of another row changes nothing where only rows are pooled; where columns
    follow, it does."""
    same_row = (4, 5)                                           # of a 3 x 2 grid
    same_column = (3, 5)
    for schedule, swap, blind in [("pool_col", same_row, True), ("pool_col", same_column, False),
                                  ("pool_row", same_row, False), ("pool_row", same_column, True),
                                  ("fastvim", same_row, False), ("fastvim", same_column, False)]:
        model = tiny(schedule=schedule, d_conv=0, depth=2, patch_size=1, img_size=(3, 2))
        with torch.no_grad():
            model.pos_embed.copy_(model.pos_embed[:, :1].expand_as(model.pos_embed))
        x = images(model, 1)
        tokens = x.flatten(2).clone()
        tokens[..., swap] = tokens[..., swap[::-1]]
        change = (final_token(model, x) - final_token(model, tokens.view_as(x))).abs().max()
        assert (change < 1e-12) == blind, (schedule, swap, change)


@pytest.mark.parametrize("class_token", [False, True], ids=["", "class"])
@pytest.mark.parametrize("pool", fastvim.POOLS)
@pytest.mark.parametrize("rows, swapped", [
    (fastvim.SCHEDULES["fastvim"], [("w h", "h"), ("h w", "w")]),
    (fastvim.SCHEDULES["pool_col"], [("w h", "h")])], ids=["fastvim", "pool_col"])
def test_transposing_grid_and_schedule_together_changes_nothing(
        monkeypatch, rows, swapped, pool, class_token):
    monkeypatch.setitem(fastvim.SCHEDULES, "first", rows)
    monkeypatch.setitem(fastvim.SCHEDULES, "second", swapped)
    fields = dict(patch_size=1, pool=pool, class_token=class_token)
    first = tiny(schedule="first", img_size=(4, 6), **fields)
    second = tiny(schedule="second", img_size=(6, 4), **fields)
    state = first.state_dict()
    row = first._class_slot(4, 6) if class_token else None
    pos = first.pos_embed.detach()
    pos, own = fastvim.FastVim.resize_pos_embed(pos, (4, 6), (4, 6), row)
    pos = rearrange(pos, "1 (h w) d -> 1 (w h) d", h=4)
    if class_token:
        at = second._class_slot(6, 4)
        pos = torch.cat([pos[:, :at], own, pos[:, at:]], 1)
    second.load_state_dict({**state, "pos_embed": pos})
    x = images(first)
    keep = random_keep(2, 24, 7)
    assert_close(second(x.mT), first(x))
    assert_close(second(x.mT, keep=keep), first(x, keep=keep))  # ids count as the first layer walks


# ---- pooling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("row, storage", POOLED_ROWS)
def test_of_equal_maxima_the_first_in_flatten_order_counts(row, storage):
    torch.manual_seed(0)
    full = make_grid(row, storage, SIZES)
    _, group = walk_by_loops(row, storage, SIZES)
    c = torch.randint(0, 2, (2, 2, len(group), 4)).double()     # as walked; ties everywhere
    expected = torch.zeros_like(c)
    places = itertools.product(range(2), range(2), range(full.steps), range(4))
    for k, b, step, e in places:
        members = (group == step).nonzero()[:, 0].tolist()
        ones = [i for i in members if c[k, b, i, e] == 1]
        expected[k, b, (ones or members)[0], e] = 1
    for grid in (full, GridWithHoles(full, torch.arange(len(group)).expand(2, -1))):
        v = c.clone().requires_grad_()
        p = grid.pool(v, "max")
        p.sum().backward()
        assert v.grad.equal(expected)
        largest = [c[:, :, group == step].amax(2) for step in range(full.steps)]
        assert p.equal(torch.stack(largest, 2))


def test_max_pooling_passes_nan_on_and_beats_negative_values():
    c = torch.tensor([-3.0, -1.0, float("nan"), 2.0, -0.5, -0.25]).reshape(1, 1, 6, 1)
    c = c.expand(2, -1, -1, -1)
    full = make_grid(("h w", "w"), "h w", dict(h=3, w=2))
    for grid in (full, GridWithHoles(full, torch.arange(6)[None])):
        p = grid.pool(c, "max")[0, 0, :, 0]
        assert p[0] == -1
        assert p[1].isnan()
        assert p[2] == -0.25


def test_pool_scale_scales_mean_pooling_but_not_the_class_token():
    ids = [[0, 1, CLASS, 3, HOLE]]
    c = torch.randn(2, 1, 5, 3)
    for row in fastvim.SCHEDULES["fastvim"]:
        plain, scaled = (with_holes(row, dict(h=2, w=2), ids, scale, class_token=True).pool(c)
                         for scale in (1.0, 0.25))
        assert_close(scaled[:, :, [0, 2]], plain[:, :, [0, 2]] * 0.25, 1e-6, 1e-7)
        assert scaled[:, :, 1].equal(plain[:, :, 1])
        assert plain[:, :, 1].ne(0).all()


# ---- class tokens --------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [3, 4], ids=["odd", "even"])
def test_the_class_token_of_vim_stands_in_the_middle(side):
    """Vim's classifier: the token at l // 2, then a position embedding of l + 1 rows in sequence
    order."""
    model = tiny(schedule="vim", class_token=True, img_size=8 * side)
    x = images(model)
    length = side * side
    half = length // 2
    tokens = model.patch_embed(x).flatten(2).mT
    own = model.cls_token.expand(2, -1, -1)
    residual = torch.cat([tokens[:, :half], own, tokens[:, half:]], 1) + model.pos_embed
    for block in model.layers:
        u = torch.nn.functional.rms_norm(residual, (16,), block.norm.weight, 1e-5)
        residual = residual + naive_mixer(block.mixer, u, ("l", ""), "l", dict(l=length + 1))
    token = torch.nn.functional.rms_norm(residual[:, half], (16,), model.norm_f.weight, 1e-5)
    assert_close(model(x), model.head(token))


@pytest.mark.parametrize("h, w", [(2, 3), (3, 4), (4, 4), (5, 1), (1, 1)])
def test_the_class_token_of_fastvim_takes_the_middle_step_unpooled(h, w):
    """Between the middle rows; for an odd count before the middle row."""
    ids = torch.cat([torch.arange(h * w), torch.tensor([CLASS])])[None]
    for row in fastvim.SCHEDULES["fastvim"]:
        sizes = dict(h=h, w=w)
        n = sizes[row[0][0]]
        grid = with_holes(row, sizes, ids, class_token=True)
        assert grid.steps == n + 1
        walk = walk_of(grid)
        assert walk.token.equal(grid.index["walk"].int())
        at = ids[0, grid.index["walk"][0]].tolist().index(CLASS)
        groups = walk.group[0].tolist()
        assert groups[at] == n // 2
        assert groups.count(n // 2) == 1
        assert walk.weight[0, at] == 1
        assert at == n // 2 * (h * w // n)                      # it lies between the same rows
        assert groups == sorted(groups)
        assert set(groups) == set(range(n + 1))
        steps = torch.arange(n + 1.0)[None, None, :, None]
        assert grid.expand(steps)[0, 0, :, 0].tolist() == groups


@pytest.mark.parametrize("by_count", [False, True])
@pytest.mark.parametrize("schedule", fastvim.SCHEDULES)
def test_tables_of_a_full_grid_with_a_class_token(schedule, by_count):
    """Looked up by the lengths of its axes, they are those of the same tokens as a masked set."""
    for lengths in (dict(h=2, w=3, c=4, t=5), dict(h=3, w=1, c=2, t=2), dict(h=1, w=1, c=1, t=1)):
        for row in fastvim.SCHEDULES[schedule]:
            storage = fastvim.SCHEDULES[schedule][0][0]
            sizes = tuple((axis, lengths[axis]) for axis in storage.split())
            full = Grid(storage, *row, sizes, 0.7 if row[1] else 1.0)
            tokens = math.prod(length for _, length in sizes)
            for slot in (0, tokens // 2, tokens):
                ids = torch.arange(tokens)
                ids = torch.cat([ids[:slot], torch.tensor([CLASS]), ids[slot:]])[None]
                expected = walk_of(GridWithHoles(full, ids, True, by_count))
                tables = walk_of(GridWithHoles(full, ids, True, by_count, slot))
                for name, table in tables._asdict().items():
                    other = getattr(expected, name)
                    assert table.dtype == other.dtype, name
                    torch.testing.assert_close(table, other, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("schedule", ["fastvim", "fastchannelvim"])
def test_a_class_token_costs_no_tables_in_each_call(schedule, monkeypatch):
    model = tiny(torch.float32, schedule=schedule, class_token=True)
    x = images(model)
    fastvim_kernels.full_walk.cache_clear()

    def run():
        with fastvim.use_backend("cpu"):
            model(x).sum().backward()
        return fastvim_kernels.full_walk.cache_info().misses
    assert run() == 2                                           # of rows and of columns
    monkeypatch.setattr(GridWithHoles, "index", property(lambda grid: pytest.fail("looked up")))
    assert run() == 2


@pytest.mark.parametrize("schedule", fastvim.SCHEDULES)
@pytest.mark.parametrize("size", [(24, 32), (32, 24)], ids=str)
def test_the_class_token_is_what_is_read(schedule, size):
    """Only its own final state reaches the head, whichever the schedule, and it hears of every
    patch."""
    model = tiny(schedule=schedule, class_token=True, img_size=size)
    x = images(model, 1).requires_grad_()
    features = model.forward_features(x)
    logits = model(x)
    same = (model.head(features) - logits[:, None]).abs().amax(-1).lt(1e-12)
    assert same.sum() == 1
    logits.square().sum().backward()
    reached = rearrange(x.grad, "1 c ... (h p) (w q) -> c ... h w (p q)", p=8, q=8).abs().amax(-1)
    assert (reached > 1e-9).all()
