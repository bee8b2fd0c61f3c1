"""Whole models: sizes, names, initialisation, image sizes, options, precision, backends, counting, the command line."""
import copy
import logging
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import fastvim
from helpers import assert_close, images, outputs_and_gradients, random_keep, tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]
PYTHON = fastvim.BACKENDS["python"]


def on_meta(name, **fields):
    with torch.device("meta"):
        return fastvim.create_model(name, **fields)


def small(family, **fields):
    """The family by its name, as tiny as it gets."""
    torch.manual_seed(0)
    fields = {**dict(img_size=32, patch_size=8, embed_dim=16, depth=3), **fields}
    return fastvim.create_model(f"{family}_tiny", **fields)


@pytest.fixture
def spy(monkeypatch):
    """A backend that notes the types of what each operation is given and gives."""
    seen = []

    def noting(name):
        def run(*arguments):
            result = getattr(PYTHON, name)(*arguments)
            tensors = [t for t in (*arguments, *(result if isinstance(result, tuple) else (result,)))
                       if isinstance(t, torch.Tensor)]
            seen.append((name, [t.dtype for t in tensors]))
            return result
        return run
    names = ("add_norm", "conv_pool", "selective_scan", "expand_gate")
    monkeypatch.setattr(fastvim, "BACKENDS", dict(fastvim.BACKENDS))
    fastvim.register_backend(PYTHON._replace(name="spy", why="notes", **{name: noting(name) for name in names}))
    return seen


# ---- building --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, parameters", [("fastvim_tiny", 7_166_056), ("fastvim_small", 25_832_680),
                                              ("fastvim_base", 97_670_632), ("fastmaskvim_base", 97_670_632)])
def test_parameter_counts_of_the_paper(name, parameters):
    assert sum(p.numel() for p in on_meta(name).parameters()) == parameters


@pytest.mark.parametrize("name", fastvim.list_models())
def test_every_model_builds(name):
    model = on_meta(name)
    family, size = name.split("_")
    width, depth, patch = dict(tiny=(192, 24, 16), small=(384, 24, 16), base=(768, 24, 16), large=(1024, 48, 16),
                               huge=(1280, 64, 14))[size]
    assert len(model.layers) == depth and model.pos_embed.shape[2] == width
    assert model.patch_embed.proj.weight.shape[-1] == patch and model.layers[0].mixer.dt_proj.in_features == width // 16
    assert (model.cls_token is not None) == (family in ("vim", "channelvim"))


@pytest.mark.parametrize("family", fastvim.FAMILIES)
def test_every_family_trains(family):
    model = small(family)
    x = images(model)
    keep = {"keep": random_keep(2, 16, 7)} if family == "fastmaskvim" else {}
    y = model(x, **keep)
    F.cross_entropy(y, torch.tensor([0, 1])).backward()
    assert y.shape == (2, model.cfg.num_classes) and y.isfinite().all()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        if "channel_embed" not in name:                         # hierarchical sampling may leave channels out
            assert (p.grad != 0).any(), name


MIXER = ["in_proj.weight", "conv1d.weight", "conv1d.bias", "conv1d_b.weight", "conv1d_b.bias", "x_proj.weight",
         "x_proj_b.weight", "dt_proj.weight", "dt_proj.bias", "dt_proj_b.weight", "dt_proj_b.bias", "A_log", "A_b_log",
         "D", "D_b", "layernorm.weight", "layernorm.bias", "out_proj.weight"]
IMAGE = ["pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "layers.0.norm.weight",
         *(f"layers.0.mixer.{name}" for name in MIXER)]
HEAD = ["norm_f.weight", "head.weight", "head.bias"]
ATTENTION = [f"layers.0.mixer.pool_proj{b}.{p}" for b in ("", "_b") for p in ("weight", "bias")]


@pytest.mark.parametrize("family, fields, names", [
    ("fastvim", {}, IMAGE + HEAD), ("fastmaskvim", {}, IMAGE + HEAD), ("vim", {}, IMAGE + HEAD + ["cls_token"]),
    ("vim", dict(ssm_norm=None), [n for n in IMAGE if "layernorm" not in n] + HEAD + ["cls_token"]),
    ("channelvim", {}, IMAGE + HEAD + ["cls_token", "patch_embed.channel_embed.weight"]),
    ("fastchannelvim", {}, IMAGE + HEAD + ["patch_embed.channel_embed.weight"]),
    ("fastvim", dict(num_classes=0), IMAGE + HEAD[:1]), ("fastvim", dict(pool="attention"), IMAGE + HEAD + ATTENTION),
    ("fastvim", dict(d_conv=0), [n for n in IMAGE if "conv1d" not in n] + HEAD),
    ("fastvim", dict(block_norm="layernorm", out_indices=[0]),
     IMAGE + ["layers.0.norm.bias", "outnorm_0.weight", "outnorm_0.bias"])],
    ids=lambda v: "" if isinstance(v, list) else v if isinstance(v, str) else "-".join(map(str, v)))
def test_parameter_names_are_those_of_the_released_checkpoints(family, fields, names):
    model = small(family, depth=1, **fields)
    assert sorted(model.state_dict()) == sorted(names) == sorted(k for k, _ in model.named_parameters())


def test_shapes_of_parameters():
    shapes = {k: tuple(v.shape) for k, v in small("vim", depth=1).state_dict().items()}
    assert shapes["pos_embed"] == (1, 17, 16) and shapes["cls_token"] == (1, 1, 16)
    mixer = {k.removeprefix("layers.0.mixer."): v for k, v in shapes.items()}
    for b in ("", "_b"):
        assert mixer[f"conv1d{b}.weight"] == (32, 1, 4) and mixer[f"x_proj{b}.weight"] == (1 + 2 * 16, 32)
        assert mixer[f"dt_proj{b}.weight"] == (32, 1) and mixer[f"A{b}_log"] == (32, 16) and mixer[f"D{b}"] == (32,)
    assert mixer["in_proj.weight"] == (64, 16) and mixer["out_proj.weight"] == (16, 32)
    assert tuple(small("channelvim").pos_embed.shape) == (1, 16, 16)            # its class token has no position


# ---- initialisation --------------------------------------------------------------------------------------------------


def assert_uniform(weight, bound):
    assert 0.98 * bound < weight.abs().max() <= bound * 1.0001
    assert abs(weight.std() / bound - 3 ** -0.5) < 0.02 and abs(weight.mean()) < 0.05 * bound


def assert_normal(weight, std, cut=None):
    deviation = 5 * std / math.sqrt(weight.numel())
    assert abs(weight.std() - std) < deviation and abs(weight.mean()) < deviation
    assert weight.abs().max() > 2 * std if cut is None else weight.abs().max() <= cut


def test_initialisation_follows_the_table():
    torch.manual_seed(0)
    D, depth, E, R = 128, 3, 256, 8
    model = fastvim.FastVim(embed_dim=D, depth=depth, img_size=224, num_classes=200, class_token=True, pool="attention",
                            d_state=5)
    fan_in = 3 * 16 * 16
    assert_normal(model.patch_embed.proj.weight, fan_in ** -0.5, cut=2 * fan_in ** -0.5 / 0.8796)
    assert_normal(model.pos_embed, 0.02)
    assert_normal(model.cls_token, 0.02)
    assert_normal(model.head.weight, 0.02)
    assert (model.patch_embed.proj.bias == 0).all() and (model.head.bias == 0).all()
    for block in model.layers:
        m = block.mixer
        assert_uniform(m.out_proj.weight, E ** -0.5 / depth ** 0.5)
        assert_uniform(m.in_proj.weight, D ** -0.5)
        assert (block.norm.weight == 1).all() and (m.layernorm.weight == 1).all() and (m.layernorm.bias == 0).all()
        for b in ("", "_b"):
            assert_uniform(getattr(m, f"x_proj{b}").weight, E ** -0.5)
            assert_uniform(getattr(m, f"conv1d{b}").weight, 4 ** -0.5)
            assert_uniform(getattr(m, f"dt_proj{b}").weight, R ** -0.5)
            assert_close(getattr(m, f"A{b}_log"), torch.arange(1.0, 6).log().expand(E, 5), 1e-6, 1e-6)
            assert (getattr(m, f"D{b}") == 1).all() and (getattr(m, f"pool_proj{b}").bias == 0).all()
        assert (m.dt_proj_b.bias == 0).all()                    # softplus gives 0.69: Vim's oversight, kept
        dt = F.softplus(m.dt_proj.bias)
        assert 1e-3 * 0.999 < dt.min() < 1.2e-3 and 0.08 < dt.max() < 0.1 * 1.001
        assert abs(dt.log().mean() - math.log(1e-2)) < 0.3 and abs(dt.log().std() - math.log(100) / 12 ** 0.5) < 0.15
    assert not model.layers[0].mixer.in_proj.weight.equal(model.layers[1].mixer.in_proj.weight)
    per_channel = fastvim.FastVim(schedule="fastchannelvim", embed_dim=D, depth=1, img_size=32, in_chans=8).patch_embed
    assert_normal(per_channel.channel_embed.weight, 0.02)
    assert_uniform(per_channel.proj.weight, 16.0 ** -1)         # PyTorch's default, with a bias that is not zero
    assert 0 < per_channel.proj.bias.abs().max() <= 16.0 ** -1


def test_the_seed_decides_the_weights():
    first, again = small("fastvim"), small("fastvim")
    assert all(a.equal(b) for a, b in zip(first.parameters(), again.parameters()))
    fastvim.init_weights(again)
    assert not first.head.weight.equal(again.head.weight)


# ---- images of any size ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(33, 17), (5, 3), (64, 24), (32, 40), (16, 32)], ids=str)
@pytest.mark.parametrize("fields", [dict(), dict(schedule="vim", class_token=True), dict(class_token=True),
                                    dict(schedule="pool_row"), dict(schedule="fastchannelvim"),
                                    dict(schedule="channelvim", class_token=True)],
                         ids=lambda f: "-".join(map(str, f.values())) or "fastvim")
def test_any_size_equals_padding_by_hand_and_resized_positions(fields, size):
    model = tiny(**fields, img_size=(32, 24))
    x, (h, w) = images(model, 2, size), (-(-s // 8) for s in size)
    fitted = tiny(**fields, img_size=(8 * h, 8 * w))
    pos, row = model.pos_embed.detach(), None
    if model.cfg.class_token and not model.cfg.per_channel:     # Vim's row at N // 2, FastVim's before the middle row
        vim = model.cfg.schedule == "vim"
        row, to = 4 * 3 // 2 if vim else 2 * 3, h * w // 2 if vim else h // 2 * w
        own, pos = pos[:, row:row + 1], pos[:, [i for i in range(13) if i != row]]
    grid = pos.reshape(1, 4, 3, -1).permute(0, 3, 1, 2)
    pos = F.interpolate(grid, (h, w), mode="bicubic").flatten(2).mT
    if row is not None:
        pos = torch.cat([pos[:, :to], own, pos[:, to:]], 1)
    fitted.load_state_dict({**model.state_dict(), "pos_embed": pos})
    padded = torch.zeros(2, 3, 8 * h, 8 * w, dtype=x.dtype)
    padded[..., :size[0], :size[1]] = x
    assert_close(model(x), fitted(padded))
    assert_close(model.forward_intermediates(x, [1])[0], fitted.forward_intermediates(padded, [1])[0])


# ---- dense features --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_token", [False, True], ids=["", "class"])
@pytest.mark.parametrize("schedule", fastvim.SCHEDULES)
def test_intermediates_are_the_mixer_outputs_as_maps(schedule, class_token):
    model = tiny(schedule=schedule, class_token=class_token, img_size=(24, 32))
    x, outputs = images(model), []
    for block in model.layers:
        block.mixer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    maps = model.forward_intermediates(x, [1, 0])
    assert len(outputs) == 2                                    # blocks after the last tap are not run
    tapped = tiny(schedule=schedule, class_token=class_token, img_size=(24, 32), out_indices=(1, 0))
    tapped.load_state_dict({**model.state_dict(), **{k: v for k, v in tapped.state_dict().items() if "outnorm" in k}},
                           strict=False)
    storage = fastvim.SCHEDULES[schedule][0][0].replace(" ", "")
    axes = "chw" if "c" in storage else "hw"
    lengths = dict(c=3, h=3, w=4)
    ids = torch.arange(math.prod(lengths[a] for a in axes)).reshape([lengths[a] for a in storage])
    ids = ids.permute([storage.index(a) for a in axes])         # the map: which token lies where
    if class_token:
        same = model.head(model.forward_features(x))[0] - model(x)[0]                  # the token that is read
        at = same.abs().amax(-1).argmin().item()
        ids = ids + (ids >= at)
    for i, (tap, index) in enumerate(zip(maps, [1, 0])):
        expected = outputs[index][:, ids].movedim(-1, 1)
        assert tap.equal(expected) and tap.shape == (2, 16, *(lengths[a] for a in axes))
        norm = getattr(tapped, f"outnorm_{i}")
        expected = F.layer_norm(expected.movedim(1, -1), (16,), norm.weight, norm.bias, 1e-5).movedim(-1, 1)
        assert_close(tapped.forward_intermediates(x)[i], expected)
    assert tapped.forward_intermediates(x, (1, 0))[1].equal(tapped.forward_intermediates(x)[1])


def test_taps_are_the_blocks_own_outputs_in_training_too():
    """Drop path acts on the way into the residual stream; a tap before it must not lose whole images."""
    model = tiny(depth=2, drop_path_rate=0.9)                   # rates 0 and 0.9
    x = images(model, 4)
    expected = model.forward_intermediates(x, [0, 1])
    for tap, reference in zip(model.train().forward_intermediates(x, [0, 1]), expected):
        assert_close(tap, reference)


# ---- channels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [s for s in fastvim.SCHEDULES if "channel" in s])
@pytest.mark.parametrize("class_token", [False, True], ids=["", "class"])
def test_a_subset_of_channels_is_a_model_of_these_channels(schedule, class_token):
    model = tiny(schedule=schedule, in_chans=5, class_token=class_token)
    subset = tiny(schedule=schedule, in_chans=2, class_token=class_token)
    name = "patch_embed.channel_embed.weight"
    subset.load_state_dict({**model.state_dict(), name: model.state_dict()[name][[3, 1]]})
    x = images(subset)
    for channels in ([3, 1], torch.tensor([3, 1])):
        assert_close(model(x, channels=channels), subset(x))
    assert (model(x, channels=[1, 3]) - subset(x)).abs().max() > 1e-6
    assert_close(model.forward_intermediates(x, [2], channels=[3, 1])[0], subset.forward_intermediates(x, [2])[0])
    full = images(model)
    assert_close(model(full, channels=range(5)), model(full))


@pytest.mark.parametrize("hcs_sorted", [True, False])
def test_hierarchical_channel_sampling(hcs_sorted):
    """In training only: how many channels, uniformly, then which; the image's channels go with their ids."""
    model, drawn = tiny(schedule="channelvim", in_chans=4, depth=1, embed_dim=4, hcs_sorted=hcs_sorted), []
    def note(module, inputs):
        assert inputs[0][0, :, 0, 0].round().tolist() == inputs[1].tolist()
        drawn.append(inputs[1].tolist())
    model.patch_embed.register_forward_pre_hook(note)
    x = torch.arange(4.0).double()[:, None, None].expand(1, 4, 8, 8)                    # channel i is full of i
    model.eval()(x)
    assert drawn == [[0, 1, 2, 3]]
    model.train()
    drawn.clear()
    with torch.no_grad():
        for _ in range(400):
            model(x)
    counts = [len(d) for d in drawn]
    assert all(60 < counts.count(n) < 140 for n in (1, 2, 3, 4)) and all(len(set(d)) == len(d) for d in drawn)
    assert all(60 < sum(i in d for d in drawn if len(d) < 4) < 240 for i in range(4))
    assert all(d == sorted(d) for d in drawn) == hcs_sorted
    drawn.clear()
    for _ in range(20):
        model(x[:, 2:], channels=[2, 3])
    assert {tuple(sorted(d)) for d in drawn} == {(2,), (3,), (2, 3)}
    model = tiny(schedule="channelvim", in_chans=4, depth=1, hcs=False).train()
    assert_close(model(x), model.eval()(x))


# ---- stochastic depth ------------------------------------------------------------------------------------------------


def test_drop_path_rates_rise_linearly_and_sleep_in_eval(monkeypatch):
    model = tiny(depth=5, drop_path_rate=0.4)
    x, rates, original = images(model), [], fastvim.stochastic_depth
    monkeypatch.setattr(fastvim, "stochastic_depth", lambda x, rate, training: (
        rates.append(rate * training) or original(x, rate, training)))
    y = model(x)
    assert not any(rates)
    rates.clear()
    model.train()(x)
    assert [r for r in rates if r] == pytest.approx([0.1, 0.2, 0.3, 0.4])      # the last one before norm_f
    plain = tiny(depth=5)
    assert_close(y, plain(x))
    assert_close(plain.train()(x), y)


def test_stochastic_depth_drops_whole_samples_and_keeps_the_expectation():
    torch.manual_seed(0)
    x = torch.rand(4000, 3, 2) + 1
    y = fastvim.stochastic_depth(x, 0.3, True)
    kept = (y != 0).all((1, 2))
    assert ((y != 0) == kept[:, None, None]).all() and abs(kept.float().mean() - 0.7) < 0.03
    assert_close(y[kept], x[kept] / 0.7, 1e-5, 1e-6)
    assert abs(y.mean() / x.mean() - 1) < 0.04
    assert fastvim.stochastic_depth(x, 0, True) is x and fastvim.stochastic_depth(x, 0.3, False) is x


# ---- options ---------------------------------------------------------------------------------------------------------


def test_every_option_changes_the_result():
    x = images(tiny())
    variants = [dict(), dict(block_norm="layernorm"), dict(ssm_norm="rmsnorm"), dict(ssm_norm=None), dict(d_conv=0),
                dict(d_conv=3), dict(pool="max"), dict(pool="attention"), dict(pool_scale=0.25), dict(schedule="vim"),
                dict(skip_before_expand=True), dict(schedule="pool_col"), dict(schedule="pool_row"),
                dict(class_token=True), dict(expand=1), dict(dt_rank=3), dict(d_state=8)]
    weights, logits = tiny().state_dict(), []
    for fields in variants:
        model = tiny(**fields)
        same = {k: v for k, v in weights.items() if k in model.state_dict() and model.state_dict()[k].shape == v.shape}
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


@pytest.mark.parametrize("fields", [dict(), dict(schedule="vim", class_token=True), dict(schedule="fastchannelvim")],
                         ids=lambda f: f.get("schedule", "fastvim"))
def test_gradient_checkpointing_changes_nothing(fields):
    """Drop path and channel sampling draw the same numbers again when a block is run again."""
    model = tiny(drop_path_rate=0.5, **fields).train()
    x, results, calls = images(model, 4), [], []
    model.layers[1].mixer.register_forward_pre_hook(lambda *_: calls.append(0))
    for model.grad_checkpointing in (False, True):
        torch.manual_seed(3)
        results.append(outputs_and_gradients(model, x))
    assert_close(results[1], results[0])
    assert len(calls) == 3                                      # the second pass runs the block again


def test_models_can_be_copied_and_saved(tmp_path):
    model = tiny(class_token=True, out_indices=[0, 2])
    x = images(model)
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert all(a.equal(b) for a, b in zip(other.forward_intermediates(x), model.forward_intermediates(x)))


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["autocast", "bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("fields", [dict(), dict(schedule="vim", class_token=True), 
                                    dict(pool="attention", ssm_norm=None)], ids=["fastvim", "vim", "attention"])
def test_the_residual_stream_and_the_scan_stay_in_float32(spy, kind, fields):
    model = tiny(torch.float32, depth=4, **fields)
    x, wide = images(model), torch.float64 if kind == "float64" else torch.float32
    exact = outputs_and_gradients(model, x)
    run = copy.deepcopy(model) if kind == "autocast" else copy.deepcopy(model).to(getattr(torch, kind))
    types = []
    for block in run.layers:
        block.register_forward_hook(lambda module, inputs, output: types.append([t.dtype for t in output]))
    spy.clear()
    with fastvim.use_backend("spy"), torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        values = outputs_and_gradients(run, x.to(next(run.parameters()).dtype))
    narrow = torch.bfloat16 if kind == "autocast" else getattr(torch, kind)
    assert types == [[narrow, wide]] * 4                        # (hidden, residual)
    assert [name for name, _ in spy] == ["add_norm", "conv_pool", "selective_scan", "expand_gate"] * 4 + ["add_norm"]
    for name, dtypes in spy:
        if name == "selective_scan":
            assert set(dtypes) == {wide}
        if name == "conv_pool":
            assert dtypes[0] == narrow and set(dtypes[1:]) == {wide}                # x -> p, c
        if name == "add_norm":
            assert dtypes[-1] == wide                                               # the new residual
    assert values["y"].dtype == narrow
    for name in exact:                                          # in bfloat16 with its 8 bits; relative to the largest
        error = (values[name].double() - exact[name]).abs().max() / exact[name].abs().max().clamp(min=1e-3)
        assert error <= {"autocast": 0.1, "bfloat16": 0.1, "float16": 0.02, "float32": 0, "float64": 1e-3}[kind], name


# ---- backends --------------------------------------------------------------------------------------------------------


def test_choosing_a_backend(spy, monkeypatch, caplog):
    monkeypatch.setattr(fastvim, "_announced", set())
    monkeypatch.delenv("FASTVIM_BACKEND", raising=False)
    def chosen(device="cpu"):
        return fastvim.pick_backend(device).name
    with caplog.at_level(logging.INFO, "fastvim"):
        assert chosen() == chosen() == "spy"                    # the last one registered that serves the device
        assert len(caplog.messages) == 1 and "spy" in caplog.text and "notes" in caplog.text       # once, and why
    fastvim.register_backend(PYTHON._replace(name="elsewhere", devices=("cuda",)))
    assert chosen() == "spy" and chosen("cuda:1") == "elsewhere" and chosen(torch.device("meta")) == "spy"
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
    with pytest.raises(ValueError, match="elsewhere.*serves cuda, not cpu"):
        chosen()
    monkeypatch.delenv("FASTVIM_BACKEND")
    fastvim.register_backend(PYTHON)                            # a second time: now it is the last one
    assert chosen() == "python" and [*fastvim.BACKENDS].count("python") == 1


def test_a_model_runs_by_the_chosen_backend(spy, monkeypatch):
    model = tiny()
    x = images(model)
    y = model(x)
    assert len(spy) == 3 * 4 + 1
    with fastvim.use_backend("python"):
        assert model(x).equal(y)
    assert len(spy) == 3 * 4 + 1


# ---- counting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, (40, 24)], ids=str)
@pytest.mark.parametrize("fields", [dict(), dict(schedule="vim", class_token=True), dict(class_token=True),
                                    dict(pool="attention"), dict(d_conv=0), dict(schedule="fastchannelvim_2d"),
                                    dict(schedule="channelvim", class_token=True), dict(dt_rank=3, expand=1)],
                         ids=lambda f: "-".join(map(str, f.values())) or "fastvim")
def test_matrix_products_are_counted_exactly(monkeypatch, fields, size):
    """torch counts matrix products and convolutions, two operations a multiply-add. It does not see norms; the scan,
    which is counted by another convention, is left out here."""
    monkeypatch.setitem(fastvim.BACKENDS, "no scan", PYTHON._replace(selective_scan=lambda x, *_: x))
    model = tiny(torch.float32, **{"dt_rank": 2, **fields})      # rank 1 would run elementwise
    with FlopCounterMode(display=False) as counter, torch.no_grad(), fastvim.use_backend("no scan"):
        model(images(model, 1, (size, size) if isinstance(size, int) else size))
    macs = fastvim.count_macs(model.cfg, size)
    assert counter.get_total_flops() == 2 * sum(n for part, n in macs.items() if part not in ("scan", "norm"))


def test_masked_tokens_are_not_counted():
    cfg = fastvim.Config(embed_dim=16, depth=2, img_size=64, patch_size=8)                           # 8 x 8 tokens
    whole, quarter = fastvim.count_macs(cfg), fastvim.count_macs(cfg, kept=0.25)
    assert all(quarter[k] * 4 == whole[k] for k in ("in_proj", "out_proj", "conv1d", "norm"))
    assert all(quarter[k] == whole[k] for k in ("patch_embed", "x_proj", "dt_proj", "scan", "head"))


def test_scan_and_norm_are_counted_by_the_convention():
    macs = fastvim.count_macs(fastvim.Config(embed_dim=16, depth=2, img_size=(64, 32)))              # 4 x 2 tokens
    assert macs["scan"] == 2 * 9 * (4 + 2) * 32 * 16           # 9 P E N a direction; 4 rows, then 2 columns
    assert macs["norm"] == 5 * 8 * (16 + 2 * (16 + 32))                 # final, then block and post-SSM norms


@pytest.mark.parametrize("name, giga", [("fastvim_tiny", 1.17), ("fastvim_small", 4.43), ("fastvim_base", 17.23)])
def test_totals_of_the_paper(name, giga):
    family, size = name.split("_")
    cfg = fastvim.Config(**fastvim.SIZES[size], **fastvim.FAMILIES[family])
    assert sum(fastvim.count_macs(cfg).values()) / 1e9 == pytest.approx(giga, rel=0.03)


# ---- the file as a program -------------------------------------------------------------------------------------------


def run_python(*arguments, **environment):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **environment})


def test_import_needs_little_and_builds_nothing():
    """Only torch, numpy and einops; no compiler, no other program."""
    code = """
import sys, torch, numpy, einops, subprocess
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("timm", "torchvision", "sklearn", "matplotlib", "PIL", "safetensors", "tqdm", "ninja",
                                  "pandas", "pyarrow", "pycocotools", "fsspec", "triton") or "cpp_extension" in name:
            raise ImportError("refused " + name)
def no_program(*a, **k):
    raise AssertionError("a program was started")
sys.meta_path.insert(0, Refuse())
subprocess.Popen = no_program
import fastvim
assert not {"torch.utils.cpp_extension", "torch._dynamo"} & set(sys.modules)
model = fastvim.FastVim(img_size=32, embed_dim=16, depth=1)
with fastvim.use_backend("python"):
    print(model(torch.zeros(1, 3, 32, 32)).shape)
"""
    result = run_python("-c", code)
    assert result.returncode == 0 and "torch.Size([1, 1000])" in result.stdout, result.stderr


def test_the_table_of_models():
    result = run_python("fastvim.py", "--models", "fastvim_tiny")
    assert result.returncode == 0, result.stderr
    row = re.search(r"^fastvim_tiny +7,166,056 +1\.1\d +\d+\.\d$", result.stdout, re.MULTILINE)
    assert row and "fastvim_small" not in result.stdout and "backend" in result.stdout


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fastvim.py", *arguments])
    fastvim.main()


def test_the_doctor(monkeypatch, capsys):
    run_main(monkeypatch, "doctor")
    out = capsys.readouterr().out
    for word in ("python", torch.__version__, "cpu", "gpu", "g++", "nvcc", "ninja", "FASTVIM_BACKEND is not set",
                 "on cpu models run by", *fastvim.BACKENDS):
        assert word in out
    monkeypatch.setenv("PATH", "")                              # no compiler at all
    run_main(monkeypatch, "doctor")
    assert "not found" in capsys.readouterr().out


def test_figure_4(monkeypatch, capsys):
    run_main(monkeypatch, "--resolution", "224", "512")
    rows = {int(line.split()[0]): [float(n) for n in line.split()[1:]]
            for line in capsys.readouterr().out.splitlines() if re.match(r" *\d", line)}
    assert rows[224] == pytest.approx([1.26, 1.8, 1.17], rel=0.03) and rows[512][0] > rows[512][1] > rows[512][2]
    assert 0.3 < 1 - rows[224][2] / rows[224][1] < 0.4          # the paper: 35% fewer


@pytest.mark.parametrize("arguments, message", [
    (["--resolution", "8"], "at least 16 pixels"), (["--models", "resnet"], "no model has 'resnet'.*fastvim_tiny"),
    (["train"], "invalid choice"), (["--resolution", "x"], "invalid int")], ids=lambda v: "".join(v) if v else "")
def test_the_command_line_refuses_what_it_does_not_know(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, *arguments)
    assert stop.value.code not in (0, None)
    assert re.search(message, f"{stop.value.code} {capsys.readouterr().err}")


def test_the_command_line_names_an_unknown_backend():
    result = run_python("fastvim.py", "doctor", FASTVIM_BACKEND="abacus")
    assert result.returncode == 2 and "no backend 'abacus'; choose from python" in result.stderr
    assert "Traceback" not in result.stderr
