"""How a layer walks the token grid: plans, masks, class tokens, and what they do and do not mix."""
import itertools
import math

import pytest
import torch
from einops import rearrange

import fastvim
from helpers import assert_close, images, outputs_and_gradients, random_keep, tiny
from test_fastvim import make_mixer, naive_mixer, run_with_gradients

ROWS = [pytest.param(row, rows[0][0], id=f"{name}-{i}") for name, rows in fastvim.SCHEDULES.items()
        for i, row in enumerate(rows)]
POOLED_ROWS = [r for r in ROWS if r.values[0][1]]
SIZES = dict(h=3, w=2, c=5)


# ---- the plan of a full grid -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("row, storage", ROWS)
def test_tables_axes_and_loops_agree(row, storage):
    plan = fastvim.make_plan(row, storage, SIZES)
    token, group = plan.tables()
    order, pooled = row[0].split(), row[1].split()
    ids = {c: i for i, c in enumerate(itertools.product(*(range(SIZES[a]) for a in storage.split())))}
    steps = {}
    for position, index in enumerate(itertools.product(*(range(SIZES[a]) for a in order))):
        where = dict(zip(order, index))
        step = steps.setdefault(tuple(where[a] for a in order if a not in pooled), len(steps))
        assert token[position] == ids[tuple(where[a] for a in storage.split())]
        assert token[position] == sum(i * stride for i, (_, stride, _) in zip(index, plan.axes, strict=True))
        kept = [(i, length) for i, (length, _, is_pooled) in zip(index, plan.axes) if not is_pooled]
        assert group[position] == step
        assert group[position] == sum(i * math.prod(n for _, n in kept[j + 1:]) for j, (i, _) in enumerate(kept))
    assert [length for length, _, _ in plan.axes] == [SIZES[a] for a in order]
    assert len(token) == position + 1 and plan.steps == len(steps)
    assert plan.token is None and plan.group is None and plan.divisor is None


@pytest.mark.parametrize("row, storage", ROWS)
def test_flatten_has_an_inverse_and_ragged_plans_walk_the_same_way(row, storage):
    full = fastvim.make_plan(row, storage, SIZES)
    token, group = full.tables()
    slots, x = torch.arange(len(token)).expand(2, -1), torch.randn(2, len(token), 3)
    same_order = fastvim.make_plan(row, storage, SIZES, slots)
    ragged = fastvim.make_plan(row, storage, SIZES, slots[:, torch.randperm(len(token))])
    assert fastvim.flatten(x, full).equal(x[:, token])
    assert fastvim.flatten(x, same_order).equal(x[:, token])
    for plan in (full, same_order, ragged):
        assert fastvim.unflatten(fastvim.flatten(x, plan), plan).equal(x)
    if row[1]:
        assert same_order.group.equal(group.expand(2, 2, -1))


# ---- masks: everything kept is the full grid, fewer tokens against the naive mixer -----------------------------------


@pytest.mark.parametrize("class_token", [False, True], ids=["", "class"])
@pytest.mark.parametrize("schedule, fields", [
    ("vim", {}), ("fastvim", {}), ("fastvim", dict(mask_divisor="count")), ("fastvim", dict(pool_scale=0.5)),
    ("fastvim", dict(pool="max")), ("fastvim", dict(pool="attention")), ("pool_row", {}), ("channelvim_spatial", {}),
    ("fastchannelvim", dict(pool="max")), ("fastchannelvim_spatial", dict(pool="attention")),
    ("fastchannelvim_2d", {}), ("fastchannelvim_2d", dict(mask_divisor="count"))],
    ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())))
def test_everything_kept_is_the_full_grid_in_any_order(schedule, fields, class_token):
    model = tiny(schedule=schedule, class_token=class_token, in_chans=3, img_size=(32, 24), **fields)
    x, tokens = images(model), 12 * (3 if model.cfg.per_channel else 1)
    full = outputs_and_gradients(model, x)
    for kept in (torch.arange(tokens).expand(2, -1), random_keep(2, tokens, tokens)):
        assert_close(outputs_and_gradients(model, x, keep=kept), full)


def ragged_slots(layouts):
    width = max(map(len, layouts))
    return [list(s) + [fastvim.PADDING] * (width - len(s)) for s in layouts]


CLASS, PADDING = fastvim.CLASS, fastvim.PADDING
MASKS = {       # ids of a 3 x 2 (or, for odd and even, 2 x 3) grid; the class token lies anywhere
    "a row empty": [[0, 1, 4, 5], [2, 3, 4, 5]], "one token each": [[5], [2]],
    "padded": [[5], [0, 2, 3], [1, 2, 3, 4, 5]],
    "class": [[0, 1, 4, CLASS, 5], [CLASS, 2, 3, 4, 5]], "class, all": [[0, 1, 2, CLASS, 3, 4, 5]],
    "class, padded": [[5, CLASS], [0, CLASS, 2, 3], [1, 2, CLASS, 3, 4, 5]],
    "class, padding within": [[5, PADDING, PADDING, CLASS], [CLASS, 0, 2, 3]], "class alone": [[CLASS], [CLASS, 3]]}


@pytest.mark.parametrize("fields", [dict(), dict(pool="max"), dict(pool="attention"), dict(mask_divisor="count"),
                                    dict(pool_scale=0.25), dict(skip_before_expand=True)],
                         ids=lambda f: "-".join(map(str, f.values())) or "mean")
@pytest.mark.parametrize("mask", MASKS)
def test_masked_mixer_follows_the_pseudo_code(mask, fields):
    """Both layers of FastVim, and Vim, over grids with odd and even numbers of rows: rows without tokens take a step
    of the scan with input zero, the class token the middle one. Gradients must be finite and agree, too."""
    slots, m = ragged_slots(MASKS[mask]), make_mixer(**fields)
    real = torch.tensor(slots) != PADDING
    u = torch.randn(*real.shape, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = [("h w", "w"), ("w h", "h")] + ([("h w", "")] if not fields else [])
    for row, sizes in itertools.product(rows, (dict(h=3, w=2), dict(h=2, w=3))):
        plan = fastvim.make_plan(row, "h w", sizes, torch.tensor(slots), class_token=CLASS in slots[0],
                                 pool_scale=m.cfg.pool_scale, mask_divisor=m.cfg.mask_divisor)

        def naive(u):
            count = m.cfg.mask_divisor == "count"
            own = [[s for s in image if s != PADDING] for image in slots]
            return torch.cat([naive_mixer(m, u[i:i + 1, real[i]], row, "h w", sizes, [own[i]], count)[0]
                              for i in range(len(slots))])
        expected = run_with_gradients(naive, m, u)
        actual = run_with_gradients(lambda u: m(u, plan)[real], m, u)
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e)


def test_a_row_without_tokens_pools_to_zero_and_takes_a_step():
    keep = torch.tensor([[0, 1, 6, 7]])                         # of a 4 x 2 grid: rows 0 and 3
    sizes, m = dict(h=4, w=2), make_mixer()
    plan = fastvim.make_plan(("h w", "w"), "h w", sizes, keep)
    p, _ = fastvim.conv_pool(torch.randn(1, 4, 24).double(), m.weights(), plan)
    assert plan.steps == p.shape[2] == 4
    assert (p[:, :, 1:3] == 0).all() and (p[:, :, [0, 3]] != 0).all()
    near = fastvim.make_plan(("h w", "w"), "h w", sizes, torch.tensor([[0, 1, 2, 3]]))       # rows 0 and 1
    u = torch.randn(1, 4, 6, dtype=torch.float64)
    assert (m(u, plan) - m(u, near)).abs().max() > 1e-4         # the state decays over the steps in between


def test_count_divides_by_kept_tokens_and_axis_by_the_length():
    keep = torch.tensor([[0, 3, 4, 5], [1, 6, 7, -2]])          # of a 3 x 3 grid
    c, real = torch.randn(2, 2, 4, 5), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    rows = keep // 3
    for divisor in ("axis", "count"):
        plan = fastvim.make_plan(("h w", "w"), "h w", dict(h=3, w=3), keep, mask_divisor=divisor)
        p = fastvim.pool(c, plan, "mean")
        for b, r in itertools.product(range(2), range(3)):
            members = c[:, b, (rows[b] == r) & (real[b] == 1)]
            number = members.shape[1] if divisor == "count" else 3
            assert_close(p[:, b, r], members.sum(1) / max(number, 1), 1e-5, 1e-6)


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_token", [False, True], ids=["", "class"])
@pytest.mark.parametrize("fields", [dict(schedule="vim"), dict(), dict(pool="max"), dict(pool="attention"),
                                    dict(mask_divisor="count"), dict(schedule="fastchannelvim")],
                         ids=lambda f: "-".join(f.values()) or "mean")
def test_images_of_a_batch_do_not_meet(fields, class_token):
    """Image i alone, with only its own kept tokens, gives what it gives in a batch padded with -1; the gradients of a
    batch are the sum of the images'."""
    model = tiny(class_token=class_token, **fields)
    x = images(model, 4)
    kept = [[9, 5, 8, 15, 2, 3], [13], [0, 1, 2], list(range(15, 3, -1))]       # two keep nothing of row 0
    width = max(map(len, kept))
    keep = torch.tensor([ids + [-1] * (width - len(ids)) for ids in kept])
    for batch, alone in ((None, [None] * 4), (keep, [torch.tensor([ids]) for ids in kept])):
        together = outputs_and_gradients(model, x, keep=batch)
        single = [outputs_and_gradients(model, x[i:i + 1], keep=alone[i]) for i in range(4)]
        expected = {k: torch.cat([s[k] for s in single]) if k in "xy" else sum(s[k] for s in single) for k in together}
        assert_close(together, expected)


@pytest.mark.parametrize("schedule", ["vim", "fastvim"])
def test_the_order_of_kept_ids_does_not_matter(schedule):
    model = tiny(schedule=schedule)
    x, keep = images(model), random_keep(2, 16, 6)
    keep[0, 2] = -1                                             # padding may stand anywhere
    features = model.forward_features(x, keep=keep)
    for other in (keep.sort(1).values, keep.flip(1), keep.int()):
        assert model.forward_features(x, keep=other).equal(features)
    assert features.shape == (2, 6, 16)


# ---- what reaches what -----------------------------------------------------------------------------------------------


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
    """Swapping two tokens of another row changes nothing where only rows are pooled; where columns follow, it does."""
    same_row, same_column = (4, 5), (3, 5)                      # of a 3 x 2 grid
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
    (fastvim.SCHEDULES["fastvim"], [("w h", "h"), ("h w", "w")]), (fastvim.SCHEDULES["pool_col"], [("w h", "h")])],
    ids=["fastvim", "pool_col"])
def test_transposing_grid_and_schedule_together_changes_nothing(monkeypatch, rows, swapped, pool, class_token):
    monkeypatch.setitem(fastvim.SCHEDULES, "first", rows)
    monkeypatch.setitem(fastvim.SCHEDULES, "second", swapped)
    fields = dict(patch_size=1, pool=pool, class_token=class_token)
    first = tiny(schedule="first", img_size=(4, 6), **fields)
    second = tiny(schedule="second", img_size=(6, 4), **fields)
    state = first.state_dict()
    pos, own = fastvim.resize_pos_embed(first.pos_embed.detach(), (4, 6), (4, 6),
                                        first._class_slot(4, 6) if class_token else None)
    pos, at = rearrange(pos, "1 (h w) d -> 1 (w h) d", h=4), second._class_slot(6, 4)
    state["pos_embed"] = torch.cat([pos[:, :at], own, pos[:, at:]], 1) if class_token else pos
    second.load_state_dict(state)
    x, keep = images(first), random_keep(2, 24, 7)
    assert_close(second(x.mT), first(x))
    assert_close(second(x.mT, keep=keep), first(x, keep=keep))      # ids count as the first layer walks


# ---- pooling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row, storage", POOLED_ROWS)
def test_of_equal_maxima_the_first_in_flatten_order_counts(row, storage):
    torch.manual_seed(0)
    full = fastvim.make_plan(row, storage, SIZES)
    _, group = full.tables()
    c = torch.randint(0, 2, (2, 2, len(group), 4)).double()                         # as walked; ties everywhere
    for slots in (None, torch.arange(len(group)).expand(2, -1)):
        plan = fastvim.make_plan(row, storage, SIZES, slots)
        v = c.clone().requires_grad_()
        p = fastvim.pool(v, plan, "max")
        p.sum().backward()
        expected = torch.zeros_like(c)
        for k, b, g, e in itertools.product(range(2), range(2), range(plan.steps), range(4)):
            members = (group == g).nonzero()[:, 0].tolist()
            expected[k, b, next((i for i in members if c[k, b, i, e] == 1), members[0]), e] = 1
        assert v.grad.equal(expected)
        assert p.equal(torch.stack([c[:, :, group == g].amax(2) for g in range(plan.steps)], 2))


def test_max_pooling_passes_nan_on_and_beats_negative_values():
    c = torch.tensor([-3.0, -1.0, float("nan"), 2.0, -0.5, -0.25]).reshape(1, 1, 6, 1).expand(2, -1, -1, -1)
    for slots in (None, torch.arange(6)[None]):
        p = fastvim.pool(c, fastvim.make_plan(("h w", "w"), "h w", dict(h=3, w=2), slots), "max")[0, 0, :, 0]
        assert p[0] == -1 and p[1].isnan() and p[2] == -0.25


def test_pool_scale_scales_mean_pooling_but_not_the_class_token():
    slots, c = torch.tensor([[0, 1, CLASS, 3, PADDING]]), torch.randn(2, 1, 5, 3)
    for row in fastvim.SCHEDULES["fastvim"]:
        plans = [fastvim.make_plan(row, "h w", dict(h=2, w=2), slots, class_token=True, pool_scale=scale)
                 for scale in (1.0, 0.25)]
        p = [fastvim.pool(c, plan, "mean") for plan in plans]
        assert_close(p[1][:, :, [0, 2]], p[0][:, :, [0, 2]] * 0.25, 1e-6, 1e-7)
        assert p[1][:, :, 1].equal(p[0][:, :, 1]) and p[0][:, :, 1].ne(0).all()


# ---- class tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [3, 4], ids=["odd", "even"])
def test_the_class_token_of_vim_stands_in_the_middle(side):
    """Vim's classifier: the token at N // 2, then a position embedding of N + 1 rows in sequence order."""
    model = tiny(schedule="vim", class_token=True, img_size=8 * side)
    x, N = images(model), side * side
    tokens = model.patch_embed(x).flatten(2).mT
    tokens = torch.cat([tokens[:, :N // 2], model.cls_token.expand(2, -1, -1), tokens[:, N // 2:]], 1) + model.pos_embed
    residual = tokens
    for block in model.layers:
        u = torch.nn.functional.rms_norm(residual, (16,), block.norm.weight, 1e-5)
        residual = residual + naive_mixer(block.mixer, u, ("l", ""), "l", dict(l=N + 1))
    token = torch.nn.functional.rms_norm(residual[:, N // 2], (16,), model.norm_f.weight, 1e-5)
    assert_close(model(x), model.head(token))


@pytest.mark.parametrize("h, w", [(2, 3), (3, 4), (4, 4), (5, 1), (1, 1)])
def test_the_class_token_of_fastvim_takes_the_middle_step_unpooled(h, w):
    """Between the middle rows; for an odd count before the middle row."""
    slots = torch.cat([torch.arange(h * w), torch.tensor([CLASS])])[None]
    for row in fastvim.SCHEDULES["fastvim"]:
        plan, n = fastvim.make_plan(row, "h w", dict(h=h, w=w), slots, class_token=True), dict(h=h, w=w)[row[0][0]]
        assert plan.steps == n + 1
        walk = [slots[0, i].item() for i in plan.token[0]]
        at, groups = walk.index(CLASS), plan.group[0, 0].tolist()
        assert groups[at] == n // 2 and groups.count(n // 2) == 1 and plan.divisor[0, 0, at] == 1
        assert at == n // 2 * (h * w // n)                      # the flatten order has it between the same rows
        assert groups == sorted(groups) and plan.group[1].equal(plan.group[0])
        assert set(groups) == set(range(n + 1))


@pytest.mark.parametrize("schedule", fastvim.SCHEDULES)
@pytest.mark.parametrize("size", [(24, 32), (32, 24)], ids=str)
def test_the_class_token_is_what_is_read(schedule, size):
    """Only its own final state reaches the head, whichever the schedule, and it hears of every patch."""
    model = tiny(schedule=schedule, class_token=True, img_size=size)
    x = images(model, 1).requires_grad_()
    features, logits = model.forward_features(x), model(x)
    assert (model.head(features) - logits[:, None]).abs().amax(-1).lt(1e-12).sum() == 1
    logits.square().sum().backward()
    assert (rearrange(x.grad, "1 c (h p) (w q) -> c h w (p q)", p=8, q=8).abs().amax(-1) > 1e-9).all()


# ---- the released masking --------------------------------------------------------------------------------------------


def test_released_masking_differs_in_the_backward_direction_only():
    keep = torch.tensor([[0, 1, 2, 4, 7, 8, 9], [0, 3, 5, 6, 7, 10, 11]])               # of a 4 x 3 grid
    xz, m = torch.randn(2, 7, 24, dtype=torch.float64), make_mixer()
    for row, size in zip(fastvim.SCHEDULES["fastvim"], (4, 3)):
        plans = [fastvim.make_plan(row, "h w", dict(h=4, w=3), keep, released_masking=r) for r in (False, True)]
        ours, released = (fastvim.conv_pool(xz, m.weights(), plan)[0] for plan in plans)
        assert released[0].equal(ours[0]) and (released[1] - ours[1]).abs().max() > 1e-3
        # the released code: reversed tokens, pooled and expanded by the row ids of the unreversed ones
        c = fastvim.conv_pool(xz, m.weights(), plans[1])[1][1].flip(1)                    # (B L E)
        ids = (keep // 3 if row[1] == "w" else (keep % 3).sort(1).values)[..., None].expand(c.shape)
        pooled = torch.zeros(2, size, 12, dtype=torch.float64).scatter_add(1, ids, c) / (12 // size)
        assert_close(released[1].flip(1), pooled)
        s = torch.randn(2, 2, size, 12, dtype=torch.float64)
        assert fastvim.expand(s, plans[1])[1].equal(s[1].flip(1).gather(1, ids).flip(1))


def test_released_masking_of_everything_kept_is_the_full_grid():
    model, released = tiny(), tiny(released_masking=True)
    x = images(model)
    assert_close(released(x, keep=random_keep(2, 16, 16)), model(x))
    assert_close(released(x), model(x))
    keep = random_keep(2, 16, 6)
    assert (released(x, keep=keep) - model(x, keep=keep)).abs().max() > 1e-6
