"""Loading checkpoints: every released container, strictly, without running what a file asks for."""

import argparse
import collections
import contextlib
import importlib.util
import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoints
import fastvim
from helpers import images, tiny


def blank(**fields):
    """The model of `tiny` with other weights, in float32."""
    model = tiny(torch.float32, **fields)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    return model


def shifted(weights, by):
    return {k: v + by for k, v in weights.items()}


def prefixed(weights, prefix):
    return {prefix + k: v for k, v in weights.items()}


@pytest.fixture
def weights():
    return tiny(torch.float32).state_dict()


@pytest.fixture
def released(weights):
    """The same under the names of the released files, which were also those of our first ones."""
    return checkpoints.to_released(weights)


@pytest.fixture
def foreign(monkeypatch):
    """Classes of a library that is there when a file is written and gone when it is read."""
    module = types.ModuleType("foreign_library")

    class Base:
        def __init__(self, *args, **kwargs):
            self.args, self.more = args, dict(a=[1, 2], b={3})

    for name, bases in dict(
        Thing=(Base,),
        ConfigDict=(dict,),
        HistoryList=(list,),
        Ordered=(collections.OrderedDict,),
        Level=(int,),
        Names=(set,),
    ).items():
        setattr(
            module, name, type(name, bases, {"__module__": "foreign_library", "__qualname__": name})
        )
    module.Slots = type(
        "Slots", (), {"__slots__": ("x",), "__module__": "foreign_library", "__qualname__": "Slots"}
    )
    monkeypatch.setitem(sys.modules, "foreign_library", module)
    return module


def junk(foreign):
    slots, config = (
        foreign.Slots(),
        foreign.ConfigDict(lr=1e-3, nested=foreign.ConfigDict(x=foreign.Thing(1))),
    )
    slots.x, config.attribute = [foreign.Thing()], 1
    return {
        "config": config,
        "history": foreign.HistoryList([foreign.Thing("a"), 2]),
        "ordered": foreign.Ordered(a=1),
        "level": foreign.Level(3),
        "names": foreign.Names({1, 2}),
        "slots": slots,
        "thing": foreign.Thing(b"x", [1]),
        "means": np.arange(3.0),
        "number": np.float64(0.5),
        "default": collections.defaultdict(list, a=[1]),
        "counter": collections.Counter("aab"),
        "type": foreign.Thing,
        "dtype": torch.float16,
        "size": torch.Size([2]),
        "device": torch.device("cpu"),
        "range": range(3),
        "namespace": types.SimpleNamespace(a=1),
        "set": {1, 2},
    }


def save(content, path, monkeypatch=None, **options):
    """torch.save; with monkeypatch, the foreign library is then no longer to be had."""
    torch.save(content, path, **options)
    if monkeypatch:
        monkeypatch.delitem(sys.modules, "foreign_library")
        with pytest.raises(ImportError):
            import foreign_library  # noqa: F401
    return path


def assert_loaded(model, weights):
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32 and value.equal(weights[name].float()), name


# ---- containers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_plain_state_dict(weights, tmp_path, zipped):
    """What torch.save(model.state_dict()) writes: an OrderedDict with an attribute, _metadata."""
    model = blank()
    save(tiny(torch.float32).state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    assert "loaded" in fastvim.load_checkpoint(model, tmp_path / "w.pt")
    assert_loaded(model, weights)
    assert torch.isfinite(model(images(model))).all()
    save(dict(weights), tmp_path / "d.pt", _use_new_zipfile_serialization=zipped)
    fastvim.load_checkpoint(model, str(tmp_path / "d.pt"))
    model.load_state_dict(shifted(weights, 1))
    fastvim.load_checkpoint(model, dict(weights))  # or a dictionary that has been read already
    assert_loaded(model, weights)
    save(dict(tiny(torch.float32).named_parameters()), tmp_path / "p.pt")  # Parameters, not Tensors
    model.load_state_dict(shifted(weights, 1))
    fastvim.load_checkpoint(model, tmp_path / "p.pt")
    assert_loaded(model, weights)


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("named", [dict, checkpoints.to_released], ids=["", "first edition"])
def test_own_format(weights, tmp_path, ema, named):
    model, other = blank(), shifted(weights, 1)
    save(
        {
            "model": named(weights),
            "ema": named(other) if ema else None,
            "epoch": 3,
            "args": {"lr": 1e-3},
            "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
            "rng": [torch.get_rng_state(), np.arange(3)],
        },
        tmp_path / "last.pt",
    )
    note = fastvim.load_checkpoint(model, tmp_path / "last.pt")
    assert_loaded(model, other if ema else weights)
    assert "\n" not in note and ("ema" in note) == ema


def test_safetensors(weights, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="needs pip install safetensors")
    safetensors.save_file(weights, tmp_path / "w.safetensors")
    model = blank()
    fastvim.load_checkpoint(model, tmp_path / "w.safetensors")
    assert_loaded(model, weights)
    (tmp_path / "bad.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="bad.safetensors"):
        fastvim.load_checkpoint(model, tmp_path / "bad.safetensors")


@pytest.mark.parametrize("where", ["state_dict_ema", "state_dict"])
def test_lightning(weights, released, foreign, tmp_path, monkeypatch, where):
    """The EMA copy is taken: state_dict_ema where there is one, else ema.module of state_dict.
    hyper_parameters hold NumPy arrays, and objects of libraries that are not there."""
    content = {
        "state_dict": {
            **prefixed(released, "backbone."),
            **prefixed(shifted(released, 1), "ema.module."),
            "criterion.weight": torch.ones(3),
        },
        "hyper_parameters": junk(foreign),
        "epoch": 299,
        "pytorch-lightning_version": "1.9",
        "callbacks": junk(foreign),
    }
    if where == "state_dict_ema":
        content["state_dict_ema"] = shifted(released, 2)
    model = blank()
    note = fastvim.load_checkpoint(model, save(content, tmp_path / "m.ckpt", monkeypatch))
    assert_loaded(model, shifted(weights, 2 if where == "state_dict_ema" else 1))
    assert where in note


def test_mmengine(weights, released, foreign, tmp_path, monkeypatch):
    heads = {"decode_head.conv.weight": torch.ones(2), "auxiliary_head.conv.bias": torch.ones(2)}
    content = {
        "meta": junk(foreign),
        "message_hub": foreign.Thing(junk(foreign)),
        "state_dict": collections.OrderedDict({**prefixed(released, "backbone."), **heads}),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}},
        "param_schedulers": [foreign.Thing()],
    }
    content["state_dict"]._metadata = collections.OrderedDict({"": {"version": 1}})
    model = blank()
    fastvim.load_checkpoint(model, save(content, tmp_path / "iter_160000.pth", monkeypatch))
    assert_loaded(model, weights)


def test_original_vim(tmp_path):
    fields = dict(schedule="vim", class_token=True, ssm_norm=None)
    weights, model = tiny(torch.float32, **fields).state_dict(), blank(**fields)
    save(
        {
            "model": checkpoints.to_released(weights),
            "optimizer": {},
            "epoch": 299,
            "args": argparse.Namespace(lr=1e-3),
        },
        tmp_path / "vim_t.pth",
    )
    fastvim.load_checkpoint(model, tmp_path / "vim_t.pth")
    assert_loaded(model, weights)


def test_distributed_training_prefix(weights, released, tmp_path):
    model = blank()
    for prefix in ("module.", "module.backbone."):
        for stored in (weights, released):
            model.load_state_dict(shifted(weights, 1))
            fastvim.load_checkpoint(
                model, save({"model": prefixed(stored, prefix)}, tmp_path / "w.pt")
            )
            assert_loaded(model, weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [32, 48], ids=["", "resized"])
def test_other_precisions_arrive_as_float32(weights, tmp_path, dtype, size):
    model = blank(img_size=size)
    save({k: v.to(dtype) for k, v in weights.items()}, tmp_path / "w.pt")
    fastvim.load_checkpoint(model, tmp_path / "w.pt")
    expected = {k: v.to(dtype) for k, v in weights.items()}
    if size == 48:
        grid = expected["pos_embed"].float().reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(grid, (6, 6), mode="bicubic").flatten(2).mT
        torch.testing.assert_close(model.pos_embed.data, resized, atol=5e-3, rtol=5e-3)
        expected["pos_embed"] = model.pos_embed.data
    assert_loaded(model, expected)


# ---- position embeddings of another grid ---------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(class_token=True),
        dict(schedule="vim", class_token=True),
        dict(schedule="channelvim", class_token=True),
    ],
    ids=lambda f: "-".join(map(str, f.values())) or "fastvim",
)
@pytest.mark.parametrize("size", [(48, 48), (24, 40), (24, 24)], ids=str)
def test_position_embeddings_of_another_grid_are_resized(tmp_path, fields, size):
    """As the model would itself resize them for an image of that size; the class token's row moves
    to its new place."""
    source, model = tiny(torch.float32, **fields), blank(**fields, img_size=size)
    note = fastvim.load_checkpoint(model, save(dict(source.state_dict()), tmp_path / "w.pt"))
    assert "resized from 4 x 4" in note and f"{size[0] // 8} x {size[1] // 8}" in note
    x = images(source, size=size)
    torch.testing.assert_close(model(x), source(x), atol=1e-5, rtol=1e-5)
    with_row = fields.get("class_token") and fields.get("schedule") != "channelvim"
    assert model.pos_embed.shape[1] == size[0] * size[1] // 64 + bool(with_row)
    if with_row:
        h, w = size[0] // 8, size[1] // 8
        assert model.pos_embed[0, h * w // 2 if "schedule" in fields else h // 2 * w].equal(
            source.pos_embed[0, 8]
        )


# ---- names ---------------------------------------------------------------------------------------


PIXELS = {
    "patch_embed.proj.weight": (16, 3, 8, 8),
    "patch_embed.proj.bias": (16,),
    "pos_embed": (1, 16, 16),
    "norm_f.weight": (16,),
    "head.weight": (5, 16),
    "head.bias": (5,),
}
RELEASED = {
    "in_proj.weight": (64, 16),
    "out_proj.weight": (16, 32),
    "layernorm.weight": (32,),
    "layernorm.bias": (32,),
    "conv1d.weight": (32, 1, 4),
    "conv1d.bias": (32,),
    "conv1d_b.weight": (32, 1, 4),
    "conv1d_b.bias": (32,),
    "x_proj.weight": (9, 32),
    "x_proj_b.weight": (9, 32),
    "dt_proj.weight": (32, 1),
    "dt_proj.bias": (32,),
    "dt_proj_b.weight": (32, 1),
    "dt_proj_b.bias": (32,),
    "A_log": (32, 4),
    "A_b_log": (32, 4),
    "D": (32,),
    "D_b": (32,),
}
ATTENTION = {
    "pool_proj.weight": (1, 32),
    "pool_proj.bias": (1,),
    "pool_proj_b.weight": (1, 32),
    "pool_proj_b.bias": (1,),
}
VARIANTS = [
    {},
    {"pool": "attention"},
    {"d_conv": 0},
    {"ssm_norm": None},
    {"ssm_norm": "rmsnorm"},
    {"schedule": "vim", "class_token": True},
    {"schedule": "channelvim", "class_token": True},
    {"block_norm": "layernorm", "out_indices": (0, 2)},
]


@pytest.mark.parametrize("pool", ["mean", "attention"])
def test_an_export_has_the_released_names_and_shapes(pool):
    model = tiny(torch.float32, pool=pool)
    shapes = {k: tuple(v.shape) for k, v in checkpoints.to_released(model.state_dict()).items()}
    mixer = RELEASED | (ATTENTION if pool == "attention" else {})
    expected = dict(PIXELS)
    for i in range(3):
        expected |= {f"layers.{i}.norm.weight": (16,)} | prefixed(mixer, f"layers.{i}.mixer.")
    assert shapes == expected


def test_the_second_direction_is_the_released_b():
    mixer = tiny(torch.float32, pool="attention").layers[1].mixer
    released = checkpoints.to_released(prefixed(mixer.state_dict(), "mixer."))
    for k, b in enumerate(("", "_b")):
        assert released[f"mixer.conv1d{b}.weight"][:, 0].equal(mixer.conv_weight[k])
        assert released[f"mixer.conv1d{b}.bias"].equal(mixer.conv_bias[k])
        assert released[f"mixer.x_proj{b}.weight"].equal(mixer.x_proj[k])
        assert released[f"mixer.dt_proj{b}.weight"].equal(mixer.dt_proj[k])
        assert released[f"mixer.dt_proj{b}.bias"].equal(mixer.dt_bias[k])
        assert released[f"mixer.A{b}_log"].equal(mixer.A_log[k])
        assert released[f"mixer.D{b}"].equal(mixer.D[k])
        assert released[f"mixer.pool_proj{b}.weight"][0].equal(mixer.score_weight[k])
        assert released[f"mixer.pool_proj{b}.bias"][0].equal(mixer.score_bias[k])


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone.", "decoder_blocks.0."])
def test_there_and_back(fields, prefix):
    weights = prefixed(tiny(torch.float32, **fields).state_dict(), prefix)
    released = checkpoints.to_released(weights)
    back = checkpoints.from_released(released)
    assert back.keys() == weights.keys() and all(back[k].equal(weights[k]) for k in weights)
    assert not any(
        k.endswith((".x_proj", ".dt_bias", "conv_weight", "score_weight")) for k in released
    )
    for convert, there in (
        (checkpoints.from_released, weights),
        (checkpoints.to_released, released),
    ):
        again = convert(there)  # what is there already stays as it is
        assert again.keys() == there.keys() and all(again[k] is there[k] for k in there)


def test_names_that_are_no_mixers_stay():
    others = {
        k: torch.ones(2)
        for k in (
            "D",
            "A_log",
            "x_proj.weight",
            "remixer.x_proj.weight",
            "mixer",
            "a.mixers.D_b",
            "layers.0.norm.weight",
            "head.mixer_b",
        )
    }
    assert checkpoints.from_released(others) == others == checkpoints.to_released(others)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in {**RELEASED, **ATTENTION}
        if not name.startswith(("in_", "out_", "layernorm"))
    ],
)
def test_half_a_pair_is_refused(name):
    model = tiny(torch.float32, pool="attention")
    released = checkpoints.to_released(model.state_dict())
    del released[f"layers.1.mixer.{name}"]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    missing = rf"\n  1 missing in the file: layers\.1\.mixer\.{name}$"
    with pytest.raises(ValueError, match=missing):
        fastvim.load_checkpoint(model, released)
    assert_loaded(model, before)


@pytest.mark.parametrize(
    "name", ["conv1d_b.weight", "x_proj.weight", "A_b_log", "D", "dt_proj_b.bias"]
)
def test_a_pair_of_two_shapes_is_refused(released, name):
    name = f"layers.2.mixer.{name}"
    released[name] = released[name][1:]
    model = blank()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    one = rf"\n  1 of another shape: {name} \({len(released[name])},[^\n]*$"
    with pytest.raises(ValueError, match=one):
        fastvim.load_checkpoint(model, released)
    assert_loaded(model, before)


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_an_exported_model_is_the_model(tmp_path, fields, name):
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors.torch", reason="needs pip install safetensors")
    source, model = tiny(torch.float32, **fields), blank(**fields)
    checkpoints.export(source, tmp_path / name)
    content = checkpoints.read(tmp_path / name)
    assert content.keys() == checkpoints.to_released(source.state_dict()).keys()
    checkpoints.load(model, tmp_path / name)
    assert_loaded(model, source.state_dict())
    assert all(p.grad_fn is None and p.is_leaf for p in model.parameters())


@pytest.mark.parametrize(
    "fields, names",
    [
        ({"d_conv": 0}, ["conv1d.bias", "conv1d_b.weight", "unknown to the model"]),
        ({"pool": "attention"}, ["pool_proj.bias", "pool_proj_b.weight", "missing in the file"]),
        (
            {"d_state": 6},
            [
                "x_proj_b.weight (9, 32), in the model (13, 32)",
                "A_b_log (32, 4), in the model (32, 6)",
            ],
        ),
        ({"ssm_norm": None}, ["layernorm.weight", "unknown to the model"]),
    ],
    ids=str,
)
def test_differences_bear_the_names_of_the_file(weights, released, fields, names):
    model = blank(depth=1, **fields)

    def one_block(stored):
        return {k: v for k, v in stored.items() if not k.startswith(("layers.1.", "layers.2."))}

    with pytest.raises(ValueError) as caught:
        fastvim.load_checkpoint(model, one_block(released))
    assert all(name in str(caught.value) for name in names), str(caught.value)
    with pytest.raises(ValueError, match="belongs to another model") as caught:
        fastvim.load_checkpoint(model, one_block(weights))
    assert not any(name in str(caught.value) for name in ("conv1d", "pool_proj", "_b."))


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, named",
    [
        (dict(depth=2), ["layers.2", "unknown"]),
        (dict(depth=4), ["layers.3", "missing"]),
        (dict(num_classes=7), ["head.weight", "(5, 16)", "(7, 16)"]),
        (dict(ssm_norm=None), ["layernorm"]),
        (dict(class_token=True), ["cls_token", "pos_embed"]),
        (dict(embed_dim=32), ["shape"]),
        (dict(img_size=48, num_classes=0), ["head.weight"]),
    ],
    ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_another_model_is_refused_and_nothing_changes(weights, tmp_path, fields, named):
    model = tiny(torch.float32, **fields)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    save({"model": dict(weights)}, tmp_path / "w.pt")
    with pytest.raises(ValueError) as caught:
        fastvim.load_checkpoint(model, tmp_path / "w.pt")
    assert all(word in str(caught.value) for word in named), str(caught.value)
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "pos",
    [
        torch.zeros(3),
        torch.zeros(1, 0, 16),
        torch.zeros(2, 9, 16),
        torch.zeros(1, 16),
        torch.zeros(1, 15, 16),
        torch.zeros(1, 9, 8),
        torch.zeros(()),
    ],
    ids=lambda p: str(tuple(p.shape)),
)
@pytest.mark.parametrize("class_token", [False, True], ids=["", "class"])
def test_position_embeddings_that_fit_no_grid_are_refused(pos, class_token):
    model = tiny(torch.float32, class_token=class_token)
    with pytest.raises(ValueError, match="pos_embed"):
        fastvim.load_checkpoint(model, {**model.state_dict(), "pos_embed": pos})


def test_files_that_are_no_checkpoints(weights, tmp_path):
    whole = save(dict(weights), tmp_path / "whole.pt").read_bytes()
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    for name, content in {
        "empty.pt": b"",
        "text.pt": b"404: Not Found\n",
        "html.ckpt": b"<!DOCTYPE html><html></html>",
        "half.pt": whole[: len(whole) // 2],
        "cut.pt": whole[:-30],
        "start.pt": whole[:50],
        "zeros.pth": bytes(1000),
        "empty.safetensors": b"",
        "number.pt": pickle.dumps(3),
    }.items():
        (tmp_path / name).write_bytes(content)
    save([1, 2], tmp_path / "list.pt")
    save({"epoch": 3}, tmp_path / "no_weights.pt")
    save({"state_dict": {}}, tmp_path / "no_state.pt")
    save(tiny(), tmp_path / "module.pt")
    model = blank()
    if not importlib.util.find_spec("safetensors"):
        (tmp_path / "empty.safetensors").unlink()
    for path in tmp_path.iterdir():
        if path.name == "whole.pt":
            continue
        with pytest.raises(ValueError) as caught:
            fastvim.load_checkpoint(model, path)
        assert path.name in str(caught.value) or "no weights" in str(caught.value)
    assert not any(p.any() for p in model.parameters())
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        fastvim.load_checkpoint(model, tmp_path / "nowhere.pt")
    with pytest.raises(FileNotFoundError):
        fastvim.load_checkpoint(model, tmp_path)


# ---- files that attack ---------------------------------------------------------------------------


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


class State:
    """Pickles as a dictionary whose attributes and items are results of calls."""

    def __init__(self, *call):
        self.call = Call(*call)

    def __reduce__(self):
        return collections.OrderedDict, (), {"x": self.call}, None, iter([("k", self.call)])


ATTACKS = dict(
    system=lambda path: Call(os.system, f"touch {path}"),
    eval=lambda path: Call(eval, f"open({path!r}, 'w')"),
    exec=lambda path: Call(exec, f"open({path!r}, 'w')"),
    mkdir=lambda path: Call(os.mkdir, path),
    open=lambda path: Call(open, path, "w"),
    loads=lambda path: Call(pickle.loads, pickle.dumps(Call(os.mkdir, path))),
    state=lambda path: State(os.mkdir, path),
    torch=lambda path: Call(torch.save, {}, path),
)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("container", ["zip", "legacy", "raw", "raw protocol 0"])
def test_nothing_is_run(weights, tmp_path, container, attack):
    """Whatever a file names is not called, wherever it stands; weights beside it are loaded
    or refused."""
    path, trace, model = tmp_path / "evil.pth", tmp_path / "trace", blank()
    attack = ATTACKS[attack](str(trace))
    for content in (
        attack,
        {"state_dict": attack},
        {**weights, "x": attack},
        {"state_dict": weights, "meta": [(attack, {1: attack})]},
        {"state_dict": weights, "meta": collections.OrderedDict(a=attack)},
    ):
        if container.startswith("raw"):
            path.write_bytes(pickle.dumps(content, protocol=0 if "0" in container else 2))
        else:
            save(content, path, _use_new_zipfile_serialization=container == "zip")
        with contextlib.suppress(ValueError):
            fastvim.load_checkpoint(model, path)
            assert_loaded(model, weights)
        assert not trace.exists(), "the file ran code"


def test_the_attacks_are_real(tmp_path):
    """Each of them does leave its trace when a file is read by pickle itself."""
    for name, attack in ATTACKS.items():
        pickle.loads(pickle.dumps(attack(str(tmp_path / name))))
        assert (tmp_path / name).exists(), name


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_is_refused_unrun(tmp_path):
    """torch.load hands such files to torch.jit.load, which runs their __setstate__, and that may
    write files."""
    trace = tmp_path / "trace"

    class Script(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.x = torch.zeros(1)
            self.path = str(trace)

        def forward(self):
            return self.x

        @torch.jit.export
        def __getstate__(self):
            return self.x, self.path, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[torch.Tensor, str, bool]):
            self.x, self.path, self.training = state
            torch.save(self.x, self.path)

    try:
        torch.jit.script(Script()).save(str(tmp_path / "script.pt"))
    except Exception as error:
        pytest.skip(f"TorchScript does not work here: {error}")
    with pytest.raises(ValueError, match="script.pt"):
        fastvim.load_checkpoint(blank(), tmp_path / "script.pt")
    assert not trace.exists(), "the archive ran code"
