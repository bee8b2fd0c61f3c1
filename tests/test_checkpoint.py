"""Loading checkpoints: every released container, strictly, without running what a file asks for."""

import argparse
import collections
import contextlib
import importlib.util
import io
import os
import pickle
import sys
import tarfile
import types
import zipfile

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


def test_a_pair_with_too_few_axes_is_refused(released):
    for half in ("conv1d", "conv1d_b"):
        released[f"layers.2.mixer.{half}.weight"] = torch.zeros(32)
    with pytest.raises(ValueError, match=r"2 of another shape: layers.2.mixer.conv1d.weight \(32,\)"):
        fastvim.load_checkpoint(blank(), released)


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


# ---- where the encoder lies ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.backbone.",
     "encoder.module.", "model.backbone.encoder._orig_mod.", "vision_tower."],
)
@pytest.mark.parametrize("keys", [[], ["model_state_dict"], ["net"], ["checkpoint", "network"]], ids=str)
def test_any_prefix_in_any_container(weights, released, prefix, keys):
    for stored in (weights, released):
        content = {**prefixed(stored, prefix), "head_of_something.weight": torch.ones(2)}
        for key in reversed(keys):
            content = {key: content, "epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}
        model = blank()
        note = fastvim.load_checkpoint(model, content)
        assert_loaded(model, weights)
        assert note == "loaded " + ".".join([*keys, prefix[:-1]])


@pytest.mark.parametrize(
    "average",
    [
        lambda w: {"model_ema": w},
        lambda w: {"ema": prefixed(w, "module.")},
        lambda w: {"ema_state_dict": prefixed(w, "ema.module.")},
        lambda w: {"state_dict_ema": w, "state_dict": prefixed(shifted(w, 1), "ema.module.")},
        lambda w: {"trainer": {"EMA": w}},
        lambda w: prefixed(w, "ema_model."),
    ],
)
def test_a_moving_average_goes_first_and_the_line_says_so(weights, average):
    model = blank()
    note = fastvim.load_checkpoint(model, {"model": shifted(weights, 2), **average(weights)})
    assert_loaded(model, weights)
    assert "ema" in note.lower() and note.endswith(", the moving average")


def test_mmengine_swaps_weights_and_average(weights):
    content = {"state_dict": weights, "ema_state_dict": prefixed(shifted(weights, 1), "module."),
               "message_hub": {}}
    model = blank()
    fastvim.load_checkpoint(model, content)
    assert_loaded(model, weights)


def test_of_several_encoders_none_is_guessed(weights):
    for content, named in (
        ({"teacher": weights, "student": weights}, ["teacher", "student"]),
        ({"state_dict": prefixed(weights, "student.") | prefixed(weights, "teacher.module.")},
         ["state_dict.student", "state_dict.teacher.module"]),
        ({**weights, **prefixed(weights, "momentum_encoder.")}, ["its own names", "momentum_encoder"]),
        ({"a": {"ema_9": weights}, "b": {"ema_99": weights}}, ["a.ema_9", "b.ema_99"]),
    ):
        model = blank()
        with pytest.raises(ValueError, match="several encoders") as caught:
            fastvim.load_checkpoint(model, content)
        assert all(name in str(caught.value) for name in named)
        assert not any(p.any() for p in model.parameters())
    model = blank()
    fastvim.load_checkpoint(model, {"teacher": weights, "student": {"conv1.weight": torch.ones(1)}})
    assert_loaded(model, weights)


def test_what_a_file_without_encoder_holds_is_listed(tmp_path):
    model = tiny(torch.float32)
    for content, named in (
        ({"model": model, "epoch": 3}, ["model (FastVim)", "epoch (int)", "state_dict()"]),
        ({"weights": {"fc.bias": torch.ones(1)}}, ["weights (fc.bias)"]),
        ({}, ["nothing"]),
        (model, ["FastVim", "state_dict()"]),
        ([1], ["list"]),
    ):
        save(content, tmp_path / "x.pt")
        with pytest.raises(ValueError) as caught:
            fastvim.load_checkpoint(blank(), tmp_path / "x.pt")
        assert all(text in str(caught.value) for text in named), caught.value
    knot = {"epoch": 3}
    knot["self"] = knot
    with pytest.raises(ValueError, match="no encoder"):
        fastvim.load_checkpoint(blank(), knot)


def test_the_weights_of_a_whole_dense_model(weights):
    inner = prefixed(weights, "module.backbone.")
    content = {"state_dict": {**inner, "module.decode_head.conv_seg.bias": torch.ones(2)}}
    stored, where = checkpoints.stored_weights(content)
    assert stored.keys() == {*prefixed(weights, "backbone."), "decode_head.conv_seg.bias"}
    assert where == "state_dict.module.backbone"


# ---- into what model -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [torch.compile, torch.nn.DataParallel, torch.optim.swa_utils.AveragedModel,
     lambda m: torch.nn.DataParallel(torch.compile(m)),
     lambda m: torch.compile(torch.nn.DataParallel(m))],
)
def test_into_a_wrapped_model(weights, released, wrap):
    model = blank()
    wrapped = wrap(model)
    if isinstance(wrapped, torch.optim.swa_utils.AveragedModel):
        model = wrapped.module
    fastvim.load_checkpoint(wrapped, released)
    assert_loaded(model, weights)


def test_into_a_model_of_compiled_blocks_and_from_one(weights):
    source, model = tiny(torch.float32), blank()
    source.layers[0] = torch.compile(source.layers[0])
    assert "layers.0._orig_mod.norm.weight" in source.state_dict()
    fastvim.load_checkpoint(model, source.state_dict())
    assert_loaded(model, weights)
    model = blank()
    model.layers[1] = torch.compile(model.layers[1])
    fastvim.load_checkpoint(model, checkpoints.to_released(weights))
    assert all(v.equal(weights[k.replace("_orig_mod.", "")]) for k, v in model.state_dict().items())


def on_meta(**fields):
    with torch.device("meta"):
        return fastvim.FastVim(
            **dict(img_size=32, patch_size=8, embed_dim=16, depth=3, d_state=4, num_classes=5) | fields
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [32, 48])
def test_into_a_model_on_meta(weights, dtype, size):
    model = on_meta(img_size=size).requires_grad_(False).eval()
    model.head.requires_grad_(True)
    stored = {k: v.to(dtype) for k, v in weights.items()}
    fastvim.load_checkpoint(model, stored)
    assert not any(v.is_meta for v in model.state_dict().values())
    assert [k for k, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    real = blank(img_size=size)
    fastvim.load_checkpoint(real, stored)
    assert_loaded(model, real.state_dict())
    x = images(real)
    assert model(x).equal(real(x))
    model.head.weight.data.zero_()
    assert stored["head.weight"].any(), "the model has memory of its own"


def test_into_a_model_partly_on_meta(weights):
    model = on_meta()
    with pytest.raises(ValueError, match=r"values for head.weight, head.bias: create the model"):
        fastvim.load_checkpoint(model, weights, encoder_only=True)
    assert all(p.is_meta for p in model.parameters())
    model.head = torch.nn.Linear(16, 7)
    head, layer = model.head.weight, blank().layers[1]
    model.layers[1] = layer
    fastvim.load_checkpoint(model, weights, encoder_only=True)
    assert model.head.weight is head and model.layers[1] is layer
    assert layer.norm.weight.equal(weights["layers.1.norm.weight"])
    assert not any(p.is_meta for p in model.parameters())


# ---- grids that are not square -------------------------------------------------------------------


def resized(pos, old, new):
    grid = pos.reshape(1, *old, -1).permute(0, 3, 1, 2)
    return F.interpolate(grid, new, mode="bicubic", align_corners=False).flatten(2).mT


@pytest.mark.parametrize("old, new", [((2, 8), (4, 4)), ((2, 8), (4, 16)), ((3, 4), (6, 6)), ((2, 8), (8, 2))])
@pytest.mark.parametrize("how", ["argument", "numpy", "file"])
def test_the_grid_of_positions_is_said(old, new, how):
    source = tiny(torch.float32, img_size=(8 * old[0], 8 * old[1]))
    content = {"model": source.state_dict()}
    options = {"argument": {"pos_grid": list(old)}, "numpy": {"pos_grid": np.array(old)}}.get(how, {})
    if how == "file":
        content["built"] = {"name": "fastvim_tiny", "fields": {"img_size": source.cfg.img_size}}
    model = blank(img_size=(8 * new[0], 8 * new[1]))
    note = fastvim.load_checkpoint(model, content, **options)
    assert f"resized from {old[0]} x {old[1]} to {new[0]} x {new[1]}" in note
    torch.testing.assert_close(model.pos_embed.data, resized(source.pos_embed.data, old, new))


def test_the_grid_of_positions_is_not_said():
    source = tiny(torch.float32, img_size=(16, 64))
    same = blank(img_size=(16, 64))
    note = fastvim.load_checkpoint(same, source.state_dict())
    assert_loaded(same, source.state_dict())
    assert note.endswith("the 16 positions taken for a grid of 2 x 8")
    with pytest.raises(ValueError, match=r"4 x 4 patches or, like the model's, of 2 x 8: say .*pos_grid"):
        fastvim.load_checkpoint(blank(img_size=(32, 128)), source.state_dict())
    with pytest.raises(ValueError, match=r"\(1, 12, 16\), in .*\n  pos_grid=\(rows, columns\) says"):
        fastvim.load_checkpoint(blank(), tiny(torch.float32, img_size=(24, 32)).state_dict())
    with pytest.raises(ValueError, match="belongs to another model") as caught:
        fastvim.load_checkpoint(blank(num_classes=3), source.state_dict())
    assert "pos_grid" not in str(caught.value)
    for junk in (3, {"fields": 3}, {"fields": {"img_size": "a"}}, {"fields": {"img_size": (1, 2, 3)}}):
        fastvim.load_checkpoint(blank(), {"model": tiny(torch.float32).state_dict(), "built": junk})


def test_a_grid_that_cannot_be(weights):
    for grid, says in (((3, 5), "of 16 patches"), ((-4, -4), "two whole numbers"),
                       ((16,), "two whole numbers"), (4, "two whole numbers")):
        with pytest.raises(ValueError, match=says):
            fastvim.load_checkpoint(blank(), weights, pos_grid=grid)
    with pytest.raises(ValueError, match="for a FastVim, not a Linear"):
        checkpoints.load(torch.nn.Linear(2, 2), weights, pos_grid=(4, 4))


# ---- files that are something else ---------------------------------------------------------------


def test_files_that_are_something_else_are_named(weights, tmp_path):
    whole = save(dict(weights), tmp_path / "whole.pt").read_bytes()
    tar, packed, other = tmp_path / "a.tar", io.BytesIO(), io.BytesIO()
    with tarfile.open(tar, "w") as file:
        file.add(tmp_path / "whole.pt", "whole.pt")
    with tarfile.open(fileobj=packed, mode="w:gz") as file:
        file.add(tmp_path / "whole.pt", "whole.pt")
    with zipfile.ZipFile(other, "w") as file:
        file.writestr("whole.pt", whole)
    for content, says in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab", "Git LFS pointer"),
        (b"\xef\xbb\xbf\n<html>", "web page"),
        (b"<?xml version='1.0'?><Error>", "web page"),
        (b'{"error": "not found"}', "text that begins with '{\"error"),
        (b"404: Not Found\n", "text that begins with '404: Not Found'"),
        (b"", "empty"),
        (whole[:2000], "cut short"),
        (pickle.dumps(dict(weights))[:200], "damaged or cut short"),
        (tar.read_bytes(), "tar archive"),
        (packed.getvalue(), "packed by gzip"),
        (other.getvalue(), r"zip archive of other files \(whole.pt\)"),
    ):
        for name in ("x.pth", "x.safetensors"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=f"{name} is not a readable checkpoint: .*{says}") as caught:
                checkpoints.read(tmp_path / name)
            assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="is a folder: name the checkpoint in it"):
        checkpoints.read(tmp_path)


def test_safetensors_under_another_name(weights, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="needs pip install safetensors")
    safetensors.save_file(weights, tmp_path / "pytorch_model.bin")
    assert checkpoints.read(tmp_path / "pytorch_model.bin").keys() == weights.keys()


# ---- numbers of NumPy ----------------------------------------------------------------------------


def test_numbers_of_numpy_become_plain_and_come_back_from_a_checkpoint(tmp_path):
    fields = dict(
        num_classes=np.array([0, 4]).max() + 1, img_size=np.array([32, 48]), patch_size=np.int32(8),
        embed_dim=np.uint8(16), depth=np.int16(3), d_state=np.array(4), dt_rank=np.int64(1),
        drop_path_rate=np.float32(0.5), pool_scale=np.float64(0.25), hcs=np.bool_(False),
        block_norm="layernorm",
    )
    cfg = fastvim.Config(**fields, out_indices=np.array([0, 2]))
    plain = dict(num_classes=5, img_size=(32, 48), patch_size=8, embed_dim=16, depth=3, d_state=4,
                 dt_rank=1, drop_path_rate=0.5, pool_scale=0.25, hcs=False, out_indices=[0, 2])
    for name, value in plain.items():
        assert repr(getattr(cfg, name)) == repr(value)
    assert fastvim.Config(img_size=np.int64(32)).img_size == (32, 32)
    assert repr(fastvim.Config(img_size=[np.int64(32), 40]).img_size) == "(32, 40)"
    assert repr(fastvim.Config(out_indices=(np.int64(1),)).out_indices) == "(1,)"
    torch.save(vars(cfg), tmp_path / "cfg.pt")
    assert checkpoints.read(tmp_path / "cfg.pt") == vars(cfg)


@pytest.mark.parametrize("value", [np.bool_(True), np.float64(5), np.float32(5.5), np.array([5, 5]), np.str_("5")])
@pytest.mark.parametrize("field", ["num_classes", "depth", "dt_rank"])
def test_what_is_no_whole_number_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}=.* must be a whole number"):
        fastvim.Config(**{field: value})


@pytest.mark.parametrize("dtype", [np.int64, np.int16, np.uint8, np.uint16, np.uint32, np.uint64])
def test_ids_of_numpy(dtype):
    model = tiny(torch.float32)
    x, ids = images(model), np.array([[3, 1], [0, 15]], dtype)
    assert model(x, keep=ids).equal(model(x, keep=ids.tolist()))
    assert model(x, keep=[list(row) for row in ids.astype(np.int64)]).equal(model(x, keep=ids.tolist()))
    maps = model.forward_intermediates(x, np.array([0, 2], dtype))
    assert all(a.equal(b) for a, b in zip(maps, model.forward_intermediates(x, [0, 2])))
    model = tiny(torch.float32, schedule="channelvim", in_chans=5)
    x = images(model, channels=2)
    channels = np.array([4, 1], dtype)
    assert model(x, channels=channels).equal(model(x, channels=[4, 1]))
    for wrong in ([4, 5], [1, 1]):
        with pytest.raises(ValueError, match="channels="):
            model(x, channels=np.array(wrong, dtype))


def test_ids_of_tensors():
    model = tiny(torch.float32, schedule="channelvim", in_chans=5)
    x = images(model, channels=2)
    expected = model(x, channels=[4, 1])
    for ids in (torch.tensor([4, 1]), [torch.tensor(4), torch.tensor(1)], (4, np.int64(1))):
        assert model(x, channels=ids).equal(expected)
    maps = model.forward_intermediates(x, torch.tensor([0, 2]), [4, 1])
    assert maps[1].equal(model.forward_intermediates(x, [2], [4, 1])[0])
