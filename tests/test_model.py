"""Whole models: sizes, names, initialisation, image sizes, options, precision, backends."""
import copy
import logging
import math
import os
import pathlib
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F

import checkpoints
import fastvim
from helpers import assert_close, images, outputs_and_gradients, random_keep, tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]
OPERATIONS = ("conv_pool", "selective_scan", "expand_gate")


def on_meta(name, **fields):
    with torch.device("meta"):
        return fastvim.create_model(name, **fields)


def small(family, **fields):
    """The family by its name, as tiny as it gets."""
    torch.manual_seed(0)
    fields = {**dict(img_size=32, patch_size=8, embed_dim=16, depth=3), **fields}
    return fastvim.create_model(f"{family}_tiny", **fields)


def name_by_values(fields):
    return "-".join(map(str, fields.values())) or "fastvim"


@pytest.fixture
def registry(monkeypatch):
    """The backends of the project, to be added to until the test ends."""
    monkeypatch.setattr(fastvim, "BACKENDS", dict(fastvim.BACKENDS))
    monkeypatch.delenv("FASTVIM_BACKEND", raising=False)
    fastvim.announce.cache_clear()
    return fastvim.BACKENDS


@pytest.fixture
def spy(registry, monkeypatch):
    """A backend that notes the types of what each operation is given and gives."""
    seen = []

    def noting(name):
        original = getattr(fastvim, name)

        def run(*arguments):
            result = original(*arguments)
            results = result if isinstance(result, tuple) else (result,)
            tensors = [t for t in (*arguments, *results) if isinstance(t, torch.Tensor)]
            seen.append((name, [t.dtype for t in tensors]))
            return result
        return run
    backend = fastvim.Backend()
    backend.name = "spy"
    backend.why = "notes"
    backend.add_norm = noting("add_norm")
    backend.ssm = noting("ssm")
    for name in OPERATIONS:                                     # ssm calls them
        monkeypatch.setattr(fastvim, name, noting(name))
    fastvim.register_backend(backend)
    return seen


# ---- building ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, parameters", [
    ("fastvim_tiny", 7_166_056), ("fastvim_small", 25_832_680), ("fastvim_base", 97_670_632),
    ("fastmaskvim_base", 97_670_632)])
def test_parameter_counts_of_the_paper(name, parameters):
    assert sum(p.numel() for p in on_meta(name).parameters()) == parameters


@pytest.mark.parametrize("name", fastvim.list_models())
def test_every_model_builds(name):
    model = on_meta(name)
    family, _, size = name.rpartition("_")
    width, depth, patch = dict(tiny=(192, 24, 16), small=(384, 24, 16), base=(768, 24, 16),
                               large=(1024, 48, 16), huge=(1280, 64, 14))[size]
    assert len(model.layers) == depth
    assert model.pos_embed.shape[2] == width
    assert model.patch_embed.proj.weight.shape[-1] == patch
    assert model.layers[0].mixer.dt_proj.shape == (2, 2 * width, width // 16)
    assert (model.cls_token is not None) == (family in ("vim", "channelvim"))


@pytest.mark.parametrize("family", fastvim.FAMILIES)
def test_every_family_trains(family):
    model = small(family)
    keep = {"keep": random_keep(2, 16, 7)} if family == "fastmaskvim" else {}
    y = model(images(model), **keep)
    F.cross_entropy(y, torch.tensor([0, 1])).backward()
    assert y.shape == (2, model.cfg.num_classes)
    assert y.isfinite().all()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        if "channel_embed" not in name:                         # sampling may leave channels out
            assert (p.grad != 0).any(), name


MIXER = ["in_proj.weight", "conv1d.weight", "conv1d.bias", "conv1d_b.weight", "conv1d_b.bias",
         "x_proj.weight", "x_proj_b.weight", "dt_proj.weight", "dt_proj.bias", "dt_proj_b.weight",
         "dt_proj_b.bias", "A_log", "A_b_log", "D", "D_b", "layernorm.weight", "layernorm.bias",
         "out_proj.weight"]
IMAGE = ["pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "layers.0.norm.weight",
         *(f"layers.0.mixer.{name}" for name in MIXER)]
HEAD = ["norm_f.weight", "head.weight", "head.bias"]
ATTENTION = [f"layers.0.mixer.pool_proj{b}.{p}" for b in ("", "_b") for p in ("weight", "bias")]


@pytest.mark.parametrize("family, fields, names", [
    ("fastvim", {}, IMAGE + HEAD),
    ("fastmaskvim", {}, IMAGE + HEAD),
    ("vim", {}, [*IMAGE, *HEAD, "cls_token"]),
    ("vim", dict(ssm_norm=None),
     [*(n for n in IMAGE if "layernorm" not in n), *HEAD, "cls_token"]),
    ("channelvim", {}, [*IMAGE, *HEAD, "cls_token", "patch_embed.channel_embed.weight"]),
    ("fastchannelvim", {}, [*IMAGE, *HEAD, "patch_embed.channel_embed.weight"]),
    ("fastvim", dict(num_classes=0), IMAGE + HEAD[:1]),
    ("fastvim", dict(pool="attention"), IMAGE + HEAD + ATTENTION),
    ("fastvim", dict(d_conv=0), [n for n in IMAGE if "conv1d" not in n] + HEAD),
    ("fastvim", dict(block_norm="layernorm", out_indices=[0]),
     [*IMAGE, "layers.0.norm.bias", "outnorm_0.weight", "outnorm_0.bias"])],
    ids=lambda v: "" if isinstance(v, list) else v if isinstance(v, str) else "-".join(v))
def test_parameters_have_the_names_of_the_released_checkpoints(family, fields, names):
    """Theirs, with a tensor for each direction; in a model both are one parameter."""
    model = small(family, depth=1, **fields)
    released = checkpoints.to_released(model.state_dict())
    assert sorted(released) == sorted(names)
    own = [name for name, _ in model.named_parameters()]
    assert sorted(own) == sorted(model.state_dict())
    assert sum(t.numel() for t in released.values()) == sum(p.numel() for p in model.parameters())


def test_names_and_shapes_of_parameters():
    shapes = {k: tuple(v.shape) for k, v in small("vim", depth=1).state_dict().items()}
    assert shapes["pos_embed"] == (1, 17, 16)
    assert shapes["cls_token"] == (1, 1, 16)
    start = "layers.0.mixer."
    mixer = {k.removeprefix(start): v for k, v in shapes.items() if k.startswith(start)}
    assert mixer == {
        "in_proj.weight": (64, 16), "conv_weight": (2, 32, 4), "conv_bias": (2, 32),
        "x_proj": (2, 1 + 2 * 16, 32), "dt_proj": (2, 32, 1), "dt_bias": (2, 32),
        "A_log": (2, 32, 16), "D": (2, 32), "layernorm.weight": (32,), "layernorm.bias": (32,),
        "out_proj.weight": (16, 32)}
    mixer = small("fastvim", depth=1, pool="attention").layers[0].mixer
    assert tuple(mixer.score_weight.shape) == (2, 32)
    assert tuple(mixer.score_bias.shape) == (2,)
    pos_embed = small("channelvim").pos_embed                   # its class token has no position
    assert tuple(pos_embed.shape) == (1, 16, 16)


# ---- initialisation ------------------------------------------------------------------------------


def assert_uniform(weight, bound):
    assert 0.98 * bound < weight.abs().max() <= bound * 1.0001
    assert abs(weight.std() / bound - 3 ** -0.5) < 0.02
    assert abs(weight.mean()) < 0.05 * bound


def assert_normal(weight, std, cut=math.inf):
    deviation = 5 * std / math.sqrt(weight.numel())
    assert abs(weight.std() - std) < deviation
    assert abs(weight.mean()) < deviation
    assert weight.abs().max() <= cut
    if cut == math.inf:
        assert weight.abs().max() > 2 * std


def test_initialisation_follows_the_table():
    torch.manual_seed(0)
    d = 128
    e = 256
    r = 8
    depth = 3
    model = fastvim.FastVim(embed_dim=d, depth=depth, img_size=224, num_classes=200,
                            class_token=True, pool="attention", d_state=5)
    std = (3 * 16 * 16) ** -0.5
    assert_normal(model.patch_embed.proj.weight, std, cut=2 * std / 0.8796)
    assert_normal(model.pos_embed, 0.02)
    assert_normal(model.cls_token, 0.02)
    assert_normal(model.head.weight, 0.02)
    assert (model.patch_embed.proj.bias == 0).all()
    assert (model.head.bias == 0).all()
    for block in model.layers:
        m = block.mixer
        assert_uniform(m.out_proj.weight, e ** -0.5 / depth ** 0.5)
        assert_uniform(m.in_proj.weight, d ** -0.5)
        assert (block.norm.weight == 1).all()
        assert (m.layernorm.weight == 1).all()
        assert (m.layernorm.bias == 0).all()
        for k in range(2):
            assert_uniform(m.x_proj[k], e ** -0.5)
            assert_uniform(m.conv_weight[k], 4 ** -0.5)
            assert_uniform(m.dt_proj[k], r ** -0.5)
        assert_close(m.A_log, torch.arange(1.0, 6).log().expand(2, e, 5), 1e-6, 1e-6)
        assert (m.D == 1).all()
        assert (m.score_bias == 0).all()
        assert (m.dt_bias[1] == 0).all()                        # softplus gives 0.69: an oversight
        dt = F.softplus(m.dt_bias[0])
        assert 1e-3 * 0.999 < dt.min() < 1.2e-3
        assert 0.08 < dt.max() < 0.1 * 1.001
        assert abs(dt.log().mean() - math.log(1e-2)) < 0.3
        assert abs(dt.log().std() - math.log(100) / 12 ** 0.5) < 0.15
    first, second = (model.layers[i].mixer.in_proj.weight for i in range(2))
    assert not first.equal(second)
    per_channel = fastvim.FastVim(schedule="fastchannelvim", embed_dim=d, depth=1, img_size=32,
                                  in_chans=8).patch_embed
    assert_normal(per_channel.channel_embed.weight, 0.02)
    assert_uniform(per_channel.proj.weight, 16.0 ** -1)         # PyTorch's default, with a bias
    assert 0 < per_channel.proj.bias.abs().max() <= 16.0 ** -1


def test_the_seed_decides_the_weights():
    first = small("fastvim")
    again = small("fastvim")
    assert all(a.equal(b) for a, b in zip(first.parameters(), again.parameters()))
    fastvim.init_weights(again)
    assert not first.head.weight.equal(again.head.weight)


# ---- images of any size --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(33, 17), (5, 3), (64, 24), (32, 40), (16, 32)], ids=str)
@pytest.mark.parametrize("fields", [
    dict(), dict(schedule="vim", class_token=True), dict(class_token=True),
    dict(schedule="pool_row"), dict(schedule="fastchannelvim"),
    dict(schedule="channelvim", class_token=True)], ids=name_by_values)
def test_any_size_equals_padding_by_hand_and_resized_positions(fields, size):
    model = tiny(**fields, img_size=(32, 24))
    x = images(model, 2, size)
    h, w = (-(-s // 8) for s in size)
    fitted = tiny(**fields, img_size=(8 * h, 8 * w))
    pos = model.pos_embed.detach()
    own_row = model.cfg.class_token and not model.cfg.per_channel
    if own_row:                         # Vim's at l // 2, FastVim's before the middle row
        row, to = 2 * 3, h // 2 * w
        if model.cfg.schedule == "vim":
            row, to = 4 * 3 // 2, h * w // 2
        own = pos[:, row:row + 1]
        pos = pos[:, [i for i in range(13) if i != row]]
    grid = pos.reshape(1, 4, 3, -1).permute(0, 3, 1, 2)
    pos = F.interpolate(grid, (h, w), mode="bicubic").flatten(2).mT
    if own_row:
        pos = torch.cat([pos[:, :to], own, pos[:, to:]], 1)
    fitted.load_state_dict({**model.state_dict(), "pos_embed": pos})
    padded = torch.zeros(2, 3, 8 * h, 8 * w, dtype=x.dtype)
    padded[..., :size[0], :size[1]] = x
    assert_close(model(x), fitted(padded))
    maps = model.forward_intermediates(x, [1])
    assert_close(maps[0], fitted.forward_intermediates(padded, [1])[0])


# ---- dense features ------------------------------------------------------------------------------


@pytest.mark.parametrize("class_token", [False, True], ids=["", "class"])
@pytest.mark.parametrize("schedule", fastvim.SCHEDULES)
def test_intermediates_are_the_mixer_outputs_as_maps(schedule, class_token):
    fields = dict(schedule=schedule, class_token=class_token, img_size=(24, 32))
    model = tiny(**fields)
    x = images(model)
    outputs = []
    for block in model.layers:
        block.mixer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    maps = model.forward_intermediates(x, [1, 0])
    assert len(outputs) == 2                                    # blocks after the last tap: not run
    tapped = tiny(**fields, out_indices=(1, 0))
    norms = {k: v for k, v in tapped.state_dict().items() if "outnorm" in k}
    tapped.load_state_dict({**model.state_dict(), **norms}, strict=False)
    storage = model.cfg.storage.split()
    axes = [*model.cfg.extents]
    lengths = dict(c=3, t=3, h=3, w=4)
    ids = torch.arange(math.prod(lengths[a] for a in axes))
    ids = ids.reshape([lengths[a] for a in storage])
    ids = ids.permute([storage.index(a) for a in axes])         # the map: which token lies where
    if class_token:
        same = model.head(model.forward_features(x))[0] - model(x)[0]       # the token that is read
        at = same.abs().amax(-1).argmin().item()
        ids = ids + (ids >= at)
    for i, (tap, index) in enumerate(zip(maps, [1, 0])):
        expected = outputs[index][:, ids].movedim(-1, 1)
        assert tap.equal(expected)
        assert tap.shape == (2, 16, *(lengths[a] for a in axes))
        norm = getattr(tapped, f"outnorm_{i}")
        expected = F.layer_norm(expected.movedim(1, -1), (16,), norm.weight, norm.bias, 1e-5)
        assert_close(tapped.forward_intermediates(x)[i], expected.movedim(-1, 1))
    named = tapped.forward_intermediates(x, (1, 0))
    assert named[1].equal(tapped.forward_intermediates(x)[1])


def test_taps_are_the_blocks_own_outputs_in_training_too():
    """Drop path acts on the way into the residual stream; a tap before it must not lose images."""
    model = tiny(depth=2, drop_path_rate=0.9)                   # rates 0 and 0.9
    x = images(model, 4)
    expected = model.forward_intermediates(x, [0, 1])
    for tap, reference in zip(model.train().forward_intermediates(x, [0, 1]), expected):
        assert_close(tap, reference)


# ---- channels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [s for s in fastvim.SCHEDULES if "channel" in s])
@pytest.mark.parametrize("class_token", [False, True], ids=["", "class"])
def test_a_subset_of_channels_is_a_model_of_these_channels(schedule, class_token):
    model = tiny(schedule=schedule, in_chans=5, class_token=class_token)
    subset = tiny(schedule=schedule, in_chans=2, class_token=class_token)
    name = "patch_embed.channel_embed.weight"
    subset.load_state_dict({**model.state_dict(), name: model.state_dict()[name][[3, 1]]})
    x = images(subset)
    expected = subset(x)
    for channels in ([3, 1], torch.tensor([3, 1])):
        assert_close(model(x, channels=channels), expected)
    assert (model(x, channels=[1, 3]) - expected).abs().max() > 1e-6
    maps = model.forward_intermediates(x, [2], channels=[3, 1])
    assert_close(maps[0], subset.forward_intermediates(x, [2])[0])
    full = images(model)
    assert_close(model(full, channels=range(5)), model(full))


@pytest.mark.parametrize("keep_order", [True, False])
def test_channel_samples(keep_order):
    """How many channels, uniformly, then which."""
    torch.manual_seed(0)
    drawn = [fastvim.sample_channels(4, keep_order).tolist() for _ in range(400)]
    counts = [len(d) for d in drawn]
    assert all(60 < counts.count(n) < 140 for n in (1, 2, 3, 4))
    assert all(len(set(d)) == len(d) for d in drawn)
    assert all(60 < sum(d[0] == i for d in drawn if len(d) < 4) for i in range(3)) or keep_order
    assert {i for d in drawn for i in d} == set(range(4))
    assert all(d == sorted(d) for d in drawn) == keep_order


@pytest.mark.parametrize("hcs_sorted", [True, False])
def test_hierarchical_channel_sampling(hcs_sorted):
    """In training only; the image's channels go with their ids."""
    fields = dict(schedule="channelvim", in_chans=4, depth=1, embed_dim=4)
    model = tiny(**fields, hcs_sorted=hcs_sorted)
    drawn = []

    def note(module, inputs):
        pixels, ids = inputs
        assert pixels[0, :, 0, 0].round().tolist() == ids.tolist()
        drawn.append(ids.tolist())
    model.patch_embed.register_forward_pre_hook(note)
    x = torch.arange(4.0).double()[:, None, None].expand(1, 4, 8, 8)        # channel i is full of i
    model.eval()(x)
    assert drawn == [[0, 1, 2, 3]]
    model.train()
    drawn.clear()
    for _ in range(30):
        model(x)
    assert {len(d) for d in drawn} == {1, 2, 3, 4}
    assert all(d == sorted(d) for d in drawn) == hcs_sorted
    drawn.clear()
    for _ in range(20):
        model(x[:, 2:], channels=[2, 3])
    assert {tuple(sorted(d)) for d in drawn} == {(2,), (3,), (2, 3)}
    model = tiny(**fields, hcs=False).train()
    assert_close(model(x), model.eval()(x))


# ---- stochastic depth ----------------------------------------------------------------------------


def test_drop_path_rates_rise_linearly_and_sleep_in_eval(monkeypatch):
    model = tiny(depth=5, drop_path_rate=0.4)
    x = images(model)
    rates = []
    original = fastvim.stochastic_depth

    def note(x, rate, training):
        rates.append(rate * training)
        return original(x, rate, training)
    monkeypatch.setattr(fastvim, "stochastic_depth", note)
    y = model(x)
    assert not any(rates)
    rates.clear()
    model.train()(x)                                            # the last one before norm_f
    assert [r for r in rates if r] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    plain = tiny(depth=5)
    assert_close(y, plain(x))
    assert_close(plain.train()(x), y)


def test_stochastic_depth_drops_whole_samples_and_keeps_the_expectation():
    torch.manual_seed(0)
    x = torch.rand(4000, 3, 2) + 1
    y = fastvim.stochastic_depth(x, 0.3, True)
    kept = (y != 0).all((1, 2))
    assert ((y != 0) == kept[:, None, None]).all()
    assert abs(kept.float().mean() - 0.7) < 0.03
    assert_close(y[kept], x[kept] / 0.7, 1e-5, 1e-6)
    assert abs(y.mean() / x.mean() - 1) < 0.04
    assert fastvim.stochastic_depth(x, 0, True) is x
    assert fastvim.stochastic_depth(x, 0.3, False) is x


# ---- options -------------------------------------------------------------------------------------


def test_every_option_changes_the_result():
    x = images(tiny())
    variants = [dict(), dict(block_norm="layernorm"), dict(ssm_norm="rmsnorm"), dict(ssm_norm=None),
                dict(d_conv=0), dict(d_conv=3), dict(pool="max"), dict(pool="attention"),
                dict(pool_scale=0.25), dict(schedule="vim"), dict(skip_before_expand=True),
                dict(schedule="pool_col"), dict(schedule="pool_row"), dict(class_token=True),
                dict(expand=1), dict(dt_rank=3), dict(d_state=8)]
    weights = tiny().state_dict()
    logits = []
    for fields in variants:
        model = tiny(**fields)
        own = model.state_dict()
        same = {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}
        model.load_state_dict(same, strict=False)
        values = outputs_and_gradients(model, x)
        assert all(v.isfinite().all() for v in values.values())
        logits.append(values["y"])
    for i, y in enumerate(logits):
        assert all((y - other).abs().max() > 1e-6 for other in logits[:i]), variants[i]


@pytest.mark.parametrize("class_token", [False, True], ids=["mean", "class"])
def test_the_readout_and_features(class_token):
    model = tiny(class_token=class_token)
    headless = tiny(class_token=class_token, num_classes=0)
    headless.load_state_dict({k: v for k, v in model.state_dict().items() if "head" not in k})
    x = images(model)
    tokens = model.forward_features(x)
    pooled = tokens[:, 8] if class_token else tokens.mean(1)
    assert_close(headless(x), pooled)
    assert_close(model(x), model.head(pooled))


@pytest.mark.parametrize("fields", [
    dict(), dict(schedule="vim", class_token=True), dict(schedule="fastchannelvim")],
    ids=lambda f: f.get("schedule", "fastvim"))
def test_gradient_checkpointing_changes_nothing(fields):
    """Drop path and channel sampling draw the same numbers again when a block is run again."""
    model = tiny(drop_path_rate=0.5, **fields).train()
    x = images(model, 4)
    results = []
    calls = []
    model.layers[1].mixer.register_forward_pre_hook(lambda *_: calls.append(0))
    for model.grad_checkpointing in (False, True):
        torch.manual_seed(3)
        results.append(outputs_and_gradients(model, x))
    assert_close(results[1], results[0])
    assert len(calls) == 3                                      # the second pass runs it again


def test_models_can_be_copied_and_saved(tmp_path):
    model = tiny(class_token=True, out_indices=[0, 2])
    x = images(model)
    expected = model.forward_intermediates(x)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copy.deepcopy(model), loaded):
        assert all(a.equal(b) for a, b in zip(other.forward_intermediates(x), expected))


# ---- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["autocast", "bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("fields", [
    dict(), dict(schedule="vim", class_token=True), dict(pool="attention", ssm_norm=None)],
    ids=["fastvim", "vim", "attention"])
def test_the_residual_stream_and_the_scan_stay_in_float32(spy, kind, fields):
    model = tiny(torch.float32, depth=4, **fields)
    x = images(model)
    exact = outputs_and_gradients(model, x)
    autocast = kind == "autocast"
    narrow = torch.bfloat16 if autocast else getattr(torch, kind)
    wide = torch.float64 if kind == "float64" else torch.float32
    run = copy.deepcopy(model) if autocast else copy.deepcopy(model).to(narrow)
    types = []
    for block in run.layers:
        block.register_forward_hook(lambda *call: types.append([t.dtype for t in call[2]]))
    spy.clear()
    with fastvim.use_backend("spy"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        values = outputs_and_gradients(run, x.to(next(run.parameters()).dtype))
    assert types == [[narrow, wide]] * 4                        # (hidden, residual)
    assert [name for name, _ in spy] == ["add_norm", *OPERATIONS, "ssm"] * 4 + ["add_norm"]
    for name, dtypes in spy:
        if name == "selective_scan":
            assert set(dtypes) == {wide}
        if name == "conv_pool":
            assert dtypes == [narrow, wide, wide]               # xz -> c, p
        if name == "ssm":
            assert dtypes == [narrow, narrow]                   # xz -> y
        if name == "add_norm":
            assert dtypes[-1] == wide                           # the new residual
    assert values["y"].dtype == narrow
    bound = {"autocast": 0.1, "bfloat16": 0.1, "float16": 0.02, "float32": 0, "float64": 1e-3}[kind]
    for name, e in exact.items():       # in bfloat16 with its 8 bits; relative to the largest
        error = (values[name].double() - e).abs().max() / e.abs().max().clamp(min=1e-3)
        assert error <= bound, name


# ---- backends ------------------------------------------------------------------------------------


def test_choosing_a_backend(spy, registry, monkeypatch, caplog):
    def chosen(device="cpu"):
        return fastvim.pick_backend(device).name
    with caplog.at_level(logging.INFO, "fastvim"):
        assert chosen() == chosen() == "spy"                    # the last that serves the device
        assert len(caplog.messages) == 1                        # said once, and why
        assert "spy" in caplog.text
        assert "notes" in caplog.text
    elsewhere = fastvim.Backend()
    elsewhere.name = "elsewhere"
    elsewhere.devices = ("cuda",)
    fastvim.register_backend(elsewhere)
    assert chosen() == "spy"
    assert chosen("cuda:1") == "elsewhere"
    assert chosen(torch.device("meta")) == "spy"
    with fastvim.use_backend("python"):
        assert chosen() == "python"
        with fastvim.use_backend("spy"):
            assert chosen() == "spy"
        assert chosen() == "python"
        with pytest.raises(KeyError), fastvim.use_backend("spy"):
            raise KeyError
        assert chosen() == "python"
    assert chosen() == "spy"
    monkeypatch.setenv("FASTVIM_BACKEND", "python")
    assert chosen() == chosen("cuda") == "python"
    with fastvim.use_backend("spy"):
        assert chosen() == "spy"
    monkeypatch.setenv("FASTVIM_BACKEND", "elsewhere")
    with pytest.raises(ValueError, match="no backend 'elsewhere' for cpu; choose from python"):
        chosen()
    monkeypatch.setenv("FASTVIM_BACKEND", "abacus")
    with pytest.raises(ValueError, match="no backend 'abacus' for cpu; choose from python"):
        chosen()
    with (pytest.raises(ValueError, match="no backend 'abacus'; choose from python"),
          fastvim.use_backend("abacus")):
        pass
    monkeypatch.delenv("FASTVIM_BACKEND")
    fastvim.register_backend(registry["python"])                # again: now it is the last one
    assert chosen() == "python"
    assert [*registry].count("python") == 1


def test_each_thread_chooses_its_backend(spy, registry):
    """Threads that leave in another order than they came do not take away each other's choice."""
    entered = threading.Barrier(3)
    first_left = threading.Event()
    seen = {}

    def choose(name):
        with fastvim.use_backend(name):
            entered.wait()
            if name == "python":
                first_left.wait()
            seen[name] = fastvim.pick_backend("cpu").name
        first_left.set()

    def choose_nothing():
        entered.wait()
        seen["nothing"] = fastvim.pick_backend("cpu").name
    names = [("python",), ("cpu",)]
    threads = [threading.Thread(target=choose, args=name) for name in names]
    threads.append(threading.Thread(target=choose_nothing))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"python": "python", "cpu": "cpu", "nothing": "spy"}


def test_a_backend_that_cannot_be_used(registry, caplog):
    """It is passed over, and why is said once; who asks for it by name gets an error."""
    broken = fastvim.Backend()
    broken.name = "broken"
    broken.problem = lambda: "it lacks a wheel"
    before = fastvim.pick_backend("cpu").name
    fastvim.register_backend(broken)
    for _ in range(2):
        assert fastvim.pick_backend("cpu").name == before
    assert caplog.text.count("backend broken cannot be used: it lacks a wheel") == 1
    with (pytest.raises(RuntimeError, match="backend broken cannot be used: it lacks a wheel"),
          fastvim.use_backend("broken")):
        fastvim.pick_backend("cpu")


def test_a_model_runs_by_the_chosen_backend(spy):
    model = tiny()
    x = images(model)
    y = model(x)
    names = [name for name, _ in spy]
    assert names == ["add_norm", *OPERATIONS, "ssm"] * 3 + ["add_norm"]
    spy.clear()
    with fastvim.use_backend("python"):
        assert model(x).equal(y)
    assert {name for name, _ in spy} == set(OPERATIONS)         # plain PyTorch's, which are watched


# ---- the file alone ------------------------------------------------------------------------------


def test_import_needs_little_and_builds_nothing(tmp_path):
    """Only torch, numpy and einops; no compiler, no other program, no file in the cache."""
    code = """
import sys, torch, numpy, einops, subprocess
REFUSED = ("timm", "torchvision", "sklearn", "matplotlib", "PIL", "safetensors", "tqdm", "ninja",
           "pandas", "pyarrow", "pycocotools", "fsspec", "triton")
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in REFUSED or "cpp_extension" in name:
            raise ImportError("refused " + name)
def no_program(*a, **k):
    raise AssertionError("a program was started")
sys.meta_path.insert(0, Refuse())
subprocess.Popen = no_program
import fastvim
fastvim.create_model("fastvim_tiny", depth=1)
assert not {"torch.utils.cpp_extension", "torch._dynamo"} & set(sys.modules)
model = fastvim.FastVim(img_size=32, embed_dim=16, depth=1)
with fastvim.use_backend("python"):
    print(model(torch.zeros(1, 3, 32, 32)).shape)
"""
    cache = tmp_path / "cache"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FASTVIM_CACHE": str(cache)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            timeout=120, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    assert "torch.Size([1, 1000])" in result.stdout
    assert not cache.exists()
