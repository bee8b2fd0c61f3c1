"""The microscopy script from its command line: options, channels, subsets, readers, resume."""
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
import tifffile
import torch

for module in ("timm", "torchvision", "pyarrow", "fsspec", "PIL", "tifffile", "imagecodecs"):
    pytest.importorskip(module)

import baselines
import channels
import checkpoints
import data
import fastvim
import logs
import runs
import train_jump
import training
from helpers import assert_close, run_script
from test_cells import make_cells, make_plate, npy, write

CPU = ["--device", "cpu", "--workers", 0]
SMALL = ["--depth", 1, "--epochs", 1, "--threads", 1, "--batch-size", 16, *CPU,
         "--subset-samples", 0]
FAST = ["--model", "fastchannelvim_tiny"]


@pytest.fixture(autouse=True)
def few_cells(monkeypatch):
    for split in ("train", "val", "test"):
        monkeypatch.setitem(data.Cells.sizes, split, 32)


def run(*argv):
    run_script(train_jump, *argv)


@pytest.fixture
def only_training(monkeypatch):
    """Without pictures and the table at the end, which take longer than so short a training."""
    monkeypatch.setattr(runs, "write", lambda *args: None)
    monkeypatch.setattr(train_jump, "evaluate", lambda *args: None)
    monkeypatch.setattr(logs, "draw_curve", lambda *args: None)


def error_of(*argv):
    with pytest.raises(SystemExit) as caught:
        run(*argv)
    return str(caught.value)


def options_of(*argv):
    return train_jump.get_args([*map(str, argv)])


def subsets_in(out):
    return json.loads((out / "channels.json").read_text())["subsets"]


def weights(out, name="last.pt"):
    return torch.load(out / name, weights_only=True)["model"]


@pytest.fixture(scope="module")
def cells_run(tmp_path_factory):
    """A short run on 32 cells; the file-wide fixture that makes them few has not begun here."""
    out, sizes = tmp_path_factory.mktemp("cells"), dict(data.Cells.sizes)
    data.Cells.sizes.update(dict.fromkeys(sizes, 32))
    try:
        run(*SMALL, "--out", out)
    finally:
        data.Cells.sizes.update(sizes)
    return out


# ---- Every option trains an epoch ----------------------------------------------------------------

OPTIONS = [
    *([*FAST, "--pool", pool, *more] for pool in ("mean", "max", "attention")
      for more in ([], ["--scan-order", "spatial-first"], ["--pool-dims", 2])),
    *(["--model", "channelvim_tiny", *order, sort]
      for order in ([], ["--scan-order", "spatial-first"]) for sort in ("--sort", "--no-sort")),
    *(["--model", f"{family}_tiny", hcs] for family in ("vim", "vit", "channelvit", "fastvim")
      for hcs in ("--hcs", "--no-hcs")),
    ["--no-hcs"],
    ["--patch", 16], ["--no-augment"], ["--grad-checkpointing"], ["--drop-path", 0.2], ["--amp"],
    ["--model", "channelvit_tiny", "--grad-checkpointing"], ["--model", "vit_tiny", "--patch", 16],
    ["--channels", "3,1,7"], ["--mask-channels", "0"], ["--model", "vim_tiny", "--channels", "6"],
    ["--mean", "0,1,2,3,4,5,6,7", "--std", "1,2,3,4,5,6,7,8"], ["--img-size", 40],
    ["--channel-names", "a,b,c,d,e,f,g,h"],
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(map(str, options)))
def test_every_option_trains_an_epoch(tmp_path, monkeypatch, capsys, options):
    monkeypatch.setattr(channels, "draw_accuracy", lambda *args: None)      # half of the time
    monkeypatch.setattr(logs, "draw_curve", lambda *args: None)
    run(*SMALL, *options, "--out", tmp_path)
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert line["epoch"] == 1 and 0 < line["loss"] < 10 and line["metrics"]["images"] == 32
    table = json.loads((tmp_path / "channels.json").read_text())
    assert table["images"] == 32 and "top-1 in % on 32 of 32 images" in capsys.readouterr().out


def test_pictures(cells_run):
    for picture in ("channels.png", "curve.png"):
        assert (cells_run / picture).stat().st_size > 5000


@pytest.mark.parametrize("options, schedule, order", [
    (["--model", "fastchannelvim_small"], "fastchannelvim", [("h w c", "w"), ("w h c", "h")]),
    (["--model", "fastchannelvim_small", "--scan-order", "spatial-first"], "fastchannelvim_spatial",
     [("c h w", "w"), ("c w h", "h")]),
    (["--model", "fastchannelvim_small", "--pool-dims", 2], "fastchannelvim_2d",
     [("h w c", "w c"), ("w h c", "h c"), ("h w c", "h w")]),
    (["--model", "channelvim_small"], "channelvim", [("h w c", "")]),
    (["--model", "channelvim_small", "--scan-order", "spatial-first"], "channelvim_spatial",
     [("c h w", "")]),
    (["--model", "vim_small"], "vim", [("h w", "")]),
])
def test_models_of_the_table(options, schedule, order):
    args, _ = options_of(*options, "--depth", 1, "--patch", 8)
    cfg = train_jump.build_model(args, train_jump.fields_of(args, 5, 161)).cfg
    assert cfg.schedule == schedule and cfg.rows == order
    assert (cfg.in_chans, cfg.patch_size, cfg.num_classes) == (5, 8, 161)
    assert cfg.per_channel == ("channel" in args.model)     # what channels.classify goes by


@pytest.mark.parametrize("options, message", [
    ([*FAST, "--pool-dims", 2, "--scan-order", "spatial-first"], "no such model.*There are"),
    (["--model", "channelvim_tiny", "--pool-dims", 2], "no such model"),
    (["--model", "vim_tiny", "--scan-order", "channel-first"], "no such model"),
    (["--model", "vim_tiny", "--pool", "max"], "nothing to pool"),
    (["--model", "channelvim_tiny", "--pool", "max"], "nothing to pool"),
    (["--model", "vit_tiny", "--pool", "max"], "without --pool"),
    (["--model", "vit_tiny", "--img-size", 36], "whole patches"),
    (["--model", "channelvit_huge"], "choose from.*channelvit_small"),
    (["--model", "resnet50"], "choose from"),
    (["--channels", "0,9"], "no channel 9: there are 0, 1, 2"),
    (["--channels", "a,0", "--channel-names", "a,b,c,d,e,f,g,h"], "a, 0 names a channel twice"),
    (["--mask-channels", "x"], "no channel x"),
    (["--subsets", "bad=0,8"], "no channel 8"),
    (["--channel-names", "a,b"], r"have 8 channels, not 2 \(a, b\)"),
    (["--channels", "1,2,3", "--mask-channels", "0"], "no channel 0: there are 1, 2, 3"),
    (["--mean", "nan,0,0,0,0,0,0,0", "--std", "1,1,1,1,1,1,1,1"], "one number for each"),
    (["--epochs", 0.1], "at least one step"),
    (["--mean", "1,2", "--std", "1,2"], "one number for each of the 8 channels"),
    (["--mean", "0,0,0,0,0,0,0,0", "--std", "1,1,1,0,1,1,1,1"], "no deviation of 0"),
    (["--batch-size", 33], "33"),
])
def test_what_cannot_be_says_why(tmp_path, options, message):
    assert re.search(message, error_of(*SMALL, *options, "--out", tmp_path))


@pytest.mark.parametrize("options, message", [
    (["--data", "d", "--index", "i", "--platemap", "p", "--metadata", "m"],
     "not allowed with"),
    (["--index", "i"], "go together"), (["--platemap", "i"], "go together"),
    (["--images", "x"], "OLD=NEW"), (["--mean", "1"], "go together"),
    (["--channels", "a,,b"], "different names"), (["--channels", "a,a"], "different names"),
    (["--subsets", "fluorescence"], "different names"),
    (["--mean", "1,x", "--std", "1,1"], "invalid numbers value"),
    (["--pool-dims", 3], "invalid choice"), (["--unknown"], "unrecognized arguments"),
])
def test_wrong_command_lines(capsys, options, message):
    with pytest.raises(SystemExit):
        train_jump.get_args([*map(str, options)])
    assert message in capsys.readouterr().err


# ---- The recipe ----------------------------------------------------------------------------------

def test_recipe_on_data():
    args, _ = options_of("--data", "d", "--batch-size", 32, "--device", "cpu")
    assert training.peak_lr(args, training.setup(args, training=False)) == 1e-3 * 32 / 256
    assert (args.epochs, args.warmup, args.weight_decay, args.weight_decay_end) == (
        100, 10, 0.04, 0.4)
    assert (args.model, args.patch_size, args.img_size, args.drop_path_rate) == (
        "fastchannelvim_small", 16, 224, 0.05)
    assert args.hcs and args.ema == args.clip == 0


def test_schedules_of_learning_rate_and_weight_decay(tmp_path, monkeypatch, only_training):
    """Seen from within the optimizer: warmup from 0, the weight decay from 0.04 to 0.4, or none."""
    seen, step = [], torch.optim.AdamW.step

    def spy(self, *args, **more):
        seen.append([(g["lr"], g["weight_decay"], g["wd_scale"]) for g in self.param_groups])
        return step(self, *args, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    run(*SMALL, "--epochs", 5, "--warmup", 2, "--out", tmp_path)           # 10 steps, 4 of warmup
    assert [group[2] for group in seen[0]] in ([0, 1], [1, 0])
    rates = [groups[0][0] for groups in seen]
    peak = train_jump.CELLS["recipe_lr"] * 16 / 32
    assert rates[:5] == pytest.approx([0, peak / 4, peak / 2, 3 * peak / 4, peak])
    assert rates[-1] == pytest.approx(1e-6 + (peak - 1e-6) * (1 + np.cos(np.pi * 5 / 6)) / 2)
    decays = [next(wd for _, wd, scale in groups if scale) for groups in seen]
    assert decays == pytest.approx(
        [0.4 - 0.36 * (1 + np.cos(np.pi * i / 10)) / 2 for i in range(10)])
    assert {wd for groups in seen for _, wd, scale in groups if not scale} == {0}


# ---- Channels: sampling, baselines ---------------------------------------------------------------

def test_sampling_draws_how_many_and_which(monkeypatch, tmp_path, only_training):
    drawn = []
    classify = train_jump.classify

    def spy(args, net, images, ids):
        drawn.append(ids.tolist())
        return classify(args, net, images, ids)

    monkeypatch.setattr(train_jump, "classify", spy)
    for model, more in (("fastchannelvim_tiny", []), ("channelvit_tiny", []),
                        ("vim_tiny", ["--no-sort"])):
        run(*SMALL, "--batch-size", 2, "--model", model, *more, "--out", tmp_path / model)
        assert len(drawn) == 16
        assert len({len(ids) for ids in drawn}) >= 5 and len({i for ids in drawn for i in ids}) == 8
        assert all(ids == sorted(ids) for ids in drawn) == (model == "fastchannelvim_tiny")
        drawn.clear()
    run(*SMALL, "--no-hcs", "--out", tmp_path / "all")
    assert not drawn


def test_a_mixing_model_sees_zeros_scaled_and_a_channel_model_the_channels():
    images = torch.randn(2, 4, 3, 3)
    ids = torch.tensor([2, 0])
    for name in ("vim_tiny", "fastvim_tiny", "vit_tiny"):
        args = runs.Options({"model": name})
        y = channels.classify(args, lambda x: x, images, ids)
        assert_close(y, 2 * images * torch.tensor([1.0, 0, 1, 0])[:, None, None])
    for name in ("channelvim_tiny", "fastchannelvim_tiny", "channelvit_tiny"):
        args = runs.Options({"model": name})
        x, seen = channels.classify(args, lambda x, channels: (x, channels), images, ids)
        assert_close(x, images[:, [2, 0]])
        assert seen is ids


def channel_vit():
    torch.manual_seed(0)
    model = baselines.ChannelViT(in_chans=5, img_size=16, patch_size=8, num_classes=3, embed_dim=32,
                                 num_heads=2, depth=2)
    return model.double().eval()


def test_channel_vit_against_its_definition():
    """Tokens one by one: patch filter + position + channel, a class token first; timm's blocks."""
    model, x = channel_vit(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    ids = [4, 0, 1]
    tokens = [model.cls_token[0, 0] + model.pos_embed[0, 0]]
    tokens = [token.expand(2, -1) for token in tokens]
    for c, channel in enumerate(ids):
        for i, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            patch = x[:, c, 8 * row:8 * row + 8, 8 * column:8 * column + 8].flatten(1)
            token = patch @ model.patch_embed.proj.weight.flatten(1).T + model.patch_embed.proj.bias
            tokens.append(token + model.pos_embed[0, 1 + i] + model.channel_embed.weight[channel])
    expected = model.head(model.norm(model.blocks(torch.stack(tokens, 1)))[:, 0])
    assert_close(model(x, channels=torch.tensor(ids)), expected)
    order = torch.tensor([2, 0, 1])         # a set of tokens: the channels' order says nothing
    assert_close(model(x[:, order], channels=torch.tensor(ids)[order]), expected)
    full = torch.randn(2, 5, 16, 16, dtype=torch.float64)
    assert_close(model(full), model(full, channels=torch.arange(5)))


def test_channel_vit_checkpointing_changes_nothing():
    model, x = channel_vit().train(), torch.randn(2, 5, 16, 16, dtype=torch.float64)
    results = []
    for on in (False, True):
        model.set_grad_checkpointing(on)
        results.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    for a, b in zip(*results):
        assert_close(a, b)


# ---- Evaluation ----------------------------------------------------------------------------------

def test_table_of_subsets_against_counting(cells_run, tmp_path, capsys):
    run("--eval", cells_run / "best.pt", "--out", tmp_path, "--subset-samples", 3, "--split", "val",
        "--subsets", "basis=0,1,2,4", "pair=7,3", *CPU)
    rows = subsets_in(tmp_path)
    sizes = [len(row["channels"]) for row in rows if not row["name"]]
    assert sizes.count(1) == 8 and sizes.count(8) == 1
    assert all(1 <= sizes.count(k) <= 3 for k in range(2, 8))
    assert [row["channels"] for row in rows[:2]] == [list("0124"), list("73")]
    assert rows[0]["best"] == 100
    assert len({tuple(row["channels"]) for row in rows if not row["name"]}) == len(sizes)

    args, saved = options_of("--eval", cells_run / "best.pt", "--split", "val", "--device", "cpu")
    raw = train_jump.open_split(args, "val")
    model, seen = train_jump.restore(args, training.setup(args, training=False), saved, raw)
    cells = seen.normalized(raw, args.img_size)
    x, labels = torch.stack([cells[i][0] for i in range(32)]), torch.arange(32) % 8
    for row in rows:
        ids = [int(name) for name in row["channels"]]
        top1 = 100 * (model(x[:, ids], channels=ids).argmax(1) == labels).double().mean()
        assert row["top1"] == pytest.approx(top1.item())
    table = capsys.readouterr().out
    assert re.search(r"basis \(4\) +1 .* 100.0\n", table) and re.search(r"\n1 +8 .* 12.5\n", table)


def test_evaluation_on_some_channels(cells_run, tmp_path):
    best = ["--eval", cells_run / "best.pt", "--out", tmp_path, *CPU]
    run(*best, "--channels", "5,2")
    assert [row["channels"] for row in subsets_in(tmp_path)] == [["2"], ["5"], ["2", "5"]]
    ones = ",".join("1" * 8)
    assert "the model keeps those" in error_of(*best, "--mean", ones, "--std", ones)
    assert "do not show 0" in error_of(*best, "--channels", "5,2", "--subsets", "a=0")
    assert "none in common" in error_of(*best, "--channel-names", "a,b,c,d,e,f,g,h")


def test_numbers_are_those_of_the_files(tmp_path):
    """Trained on channels 3, 1, 7, 0: "1" is the file's channel 1 everywhere, not the model's."""
    run(*SMALL, "--channels", "3,1,7,0", "--mask-channels", "7", "--out", tmp_path,
        "--mean", "0,.1,.2,.3,.4,.5,.6,.7", "--std", "1,2,3,4,5,6,7,8")
    kept = torch.load(tmp_path / "last.pt", weights_only=True)["channels"]
    assert kept["masked"] == ["7"] and kept["taken"] == [3, 1, 7, 0]
    assert kept["mean"] == [0.3, 0.1, 0.7, 0] and kept["std"] == [4, 2, 8, 1]
    args, saved = options_of("--eval", tmp_path / "best.pt", *CPU)
    raw = train_jump.open_split(args, "test")
    _, seen = train_jump.restore(args, training.setup(args, training=False), saved, raw)
    image = raw[5][0]
    x = seen.normalized(raw, args.img_size)[5][0]
    mean = np.float32([0.3, 0.1, 0])[:, None, None]
    std = np.float32([4, 2, 1])[:, None, None]
    expected = torch.from_numpy((image[[3, 1, 0]] - mean) / std)
    assert_close(x[[0, 1, 3]], expected, rtol=1e-6, atol=1e-6)
    assert (x[2] == 0).all()
    run("--eval", tmp_path / "best.pt", "--subsets", "a=1,3", "--subset-samples", 0, *CPU)
    rows = subsets_in(tmp_path)                             # beside the checkpoint
    assert rows[0]["channels"] == ["1", "3"]
    assert rows[-1]["best"] == data.Cells.best([0, 1, 3]) == 50
    assert "no channel 2" in error_of("--eval", tmp_path / "best.pt", "--subsets", "a=1,2", *CPU)


def test_a_checkpoint_from_before_version_0_2(cells_run, tmp_path):
    """Then the options held what was computed, and mixers had the released names."""
    content = torch.load(cells_run / "best.pt", weights_only=True)
    del content["built"]
    kept = content.pop("channels")
    args = content["args"]
    args |= {"classes": content.pop("classes"), "patch": args.pop("patch_size"),
             "drop_path": args.pop("drop_path_rate"), "file_channels": kept["files"],
             "model_channels": kept["model"], "mean": kept["mean"], "std": kept["std"],
             "mask_channels": kept["masked"], "taken": kept["taken"]}
    content["model"] = checkpoints.to_released(content["model"])
    torch.save(content, tmp_path / "old.pt")
    run("--eval", cells_run / "best.pt", "--subset-samples", 1, "--out", tmp_path / "new", *CPU)
    run("--eval", tmp_path / "old.pt", "--subset-samples", 1, *CPU)
    assert subsets_in(tmp_path) == subsets_in(tmp_path / "new")


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory):
    """A model trained on a folder of 4-channel files of two classes, dark and light."""
    root, out = tmp_path_factory.mktemp("plates"), tmp_path_factory.mktemp("run")
    for name, level in (("dark", 10), ("light", 200)):
        (root / name).mkdir()
        for i in range(20):
            image = np.random.default_rng(i).integers(0, 50, (4, 36, 30)) + level
            np.save(root / name / f"{i}.npy", image.astype(np.uint16))
    run(*SMALL, "--data", root, "--img-size", 32, "--patch", 8, *FAST, "--lr", 1e-3, "--warmup", 0,
        "--epochs", 4, "--batch-size", 8, "--out", out, "--channel-names", "DNA,ER,RNA,Mito")
    return root, out


def test_a_folder_of_classes(folder_run, tmp_path, capsys):
    root, out = folder_run
    best = ["--eval", out / "best.pt", *CPU]
    log = (out / "log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["metrics"]["top1"] > 70
    run(*best, "--data", root, "--split", "val", "--out", tmp_path)
    assert "fastchannelvim_tiny, patch 8" in capsys.readouterr().out
    run(*best, "--predict", root / "dark/3.npy", root / "light/4.npy")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("dark/3.npy") and lines[4].endswith("light/4.npy")
    assert {lines[2].split()[-1], lines[3].split()[-1]} == {"dark", "light"}
    run(*best, "--predict", root / "dark")                  # the images of a folder
    assert capsys.readouterr().out.count("dark/") == 20
    np.save(tmp_path / "bad.npy", np.zeros((3, 9, 9)))
    with pytest.raises(SystemExit) as caught:
        run(*best, "--predict", tmp_path / "bad.npy", root / "dark/3.npy")
    assert caught.value.code == 1
    text = capsys.readouterr().out
    assert re.search("bad.npy: cannot be read .ValueError: 3 channels, expected 4.*--channel-names",
                     text)
    assert "dark/3.npy\n" in text
    assert "--data or --index has to say" in error_of(*best)
    wrong = make_cells(tmp_path / "wrong", {"dark": 5, "light": 5}, channels=2)
    message = "have 2 channels, not 4 (DNA, ER, RNA, Mito): name theirs with --channel-names"
    assert message in error_of(*best, "--data", wrong)
    three = make_cells(tmp_path / "three", {"dark": 5, "light": 5, "other": 5}, channels=4)
    assert "not the 2 classes of training" in error_of(*best, "--data", three)
    one = make_cells(tmp_path / "one", {"dark": 5}, channels=4)
    assert "one class, 'dark'" in error_of("--data", one, "--out", tmp_path / "out", *CPU)


def test_statistics_are_what_training_uses(folder_run, capsys):
    root, out = folder_run
    run("--stats", "--data", root, "--device", "cpu")
    printed = dict(re.findall(r"--(mean|std)=(\S+)", capsys.readouterr().out))
    kept = json.loads((out / "config.json").read_text())["channels"]
    files = data.cell_folder(root, "train", np.asarray)
    stack = np.stack([image for image, _ in files]).astype(float)
    for name, expected in (("mean", stack.mean((0, 2, 3))), ("std", stack.std((0, 2, 3)))):
        assert [float(x) for x in printed[name].split(",")] == pytest.approx(expected, rel=1e-4)
        assert kept[name] == pytest.approx(expected)


def test_files_with_fewer_channels_in_another_order(folder_run, tmp_path):
    """Channels go by name: a plate of RNA and DNA alone gives what the subset gives."""
    root, out = folder_run
    for path in root.glob("*/*.npy"):
        (tmp_path / "two" / path.parent.name).mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "two" / path.parent.name / path.name, np.load(path)[[2, 0]])
    best = ["--eval", out / "best.pt", *CPU]
    run(*best, "--data", tmp_path / "two", "--channel-names", "RNA,DNA", "--out", tmp_path / "a")
    run(*best, "--data", root, "--channels", "DNA,RNA", "--out", tmp_path / "b")
    two = subsets_in(tmp_path / "a")
    assert two == subsets_in(tmp_path / "b")
    assert [row["channels"] for row in two] == [["DNA"], ["RNA"], ["DNA", "RNA"]]


def test_init_takes_channel_embeddings_by_name(folder_run, tmp_path, capsys):
    root, out = folder_run
    run(*SMALL, "--data", root, "--init", out / "best.pt", "--channel-names", "Mito,AGP,ER,DNA",
        "--lr", 0, "--out", tmp_path, "--batch-size", 8)
    assert "of channels Mito, ER, DNA, the others as initialised" in capsys.readouterr().out
    old, new = weights(out, "best.pt"), weights(tmp_path)
    key = "patch_embed.channel_embed.weight"
    for i, j in ((0, 3), (2, 1), (3, 0)):
        assert_close(new[key][i], old[key][j])
    assert (new[key][1][None] != old[key]).any(1).all()
    for name in old:
        if name != key and not name.startswith("head."):
            assert_close(new[name], old[name])
    assert (new["head.weight"] != old["head.weight"]).any()


# ---- JUMP-CP -------------------------------------------------------------------------------------

def jump(base, *more, images=60):
    index, platemap, metadata = make_plate(base, images=images)
    return ["--index", index, "--platemap", platemap, "--metadata", metadata, "--img-size", 16,
            "--patch", 8, *more]


def test_the_benchmark_from_an_object_store(tmp_path, capsys):
    options = jump("memory://bucket/plate")
    run(*SMALL, *options, *FAST, "--out", tmp_path, "--workers", 2, "--batch-size", 8)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["classes"] == ["control", "KRAS", "EGFR"]
    assert config["channels"]["mean"] == list(data.JUMP_MEAN)
    assert config["channels"]["model"] == list(data.JUMP_CHANNELS)
    out = capsys.readouterr().out
    assert "36 training and 12 validation images" in out
    assert re.search(r"fluorescence \(5\) .*\nbrightfield \(3\)", out)
    run("--eval", tmp_path / "best.pt", *options[:6], *CPU, "--channels", "brightfield1,3")
    assert subsets_in(tmp_path)[-1]["channels"] == ["fluorescence4", "brightfield1"]


def test_a_given_normalisation_wins_over_the_benchmarks(tmp_path, only_training):
    run(*SMALL, *jump("memory://bucket/given"), *FAST, "--batch-size", 8, "--out", tmp_path,
        "--mean", "1,2,3,4,5,6,7,8", "--std", "8,7,6,5,4,3,2,1")
    kept = json.loads((tmp_path / "config.json").read_text())["channels"]
    assert kept["mean"] == [1, 2, 3, 4, 5, 6, 7, 8] and kept["std"] == [8, 7, 6, 5, 4, 3, 2, 1]


def test_a_released_checkpoint(tmp_path, capsys):
    """Lightning's layout, without a word of what the model is: --model and --patch name it."""
    model = fastvim.create_model("fastchannelvim_tiny", depth=2, patch_size=8, img_size=16,
                                 num_classes=3)
    path = tmp_path / "FastChannelVim_tiny.ckpt"
    released = checkpoints.to_released(model.state_dict())
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in released.items()},
                "hyper_parameters": {"lr": np.float64(1e-3)}}, path)
    (tmp_path / "images").mkdir()
    options = jump(str(tmp_path), *FAST, "--depth", 2, *CPU)
    run("--eval", path, *options, "--out", tmp_path)
    transform = data.CellTransform(16, data.JUMP_MEAN, data.JUMP_STD, False)
    x, labels = zip(*data.JumpCP(*options[1:6:2], "test", transform))
    right = model.eval()(torch.stack(x)).argmax(1) == torch.tensor(labels)
    assert subsets_in(tmp_path)[-1]["top1"] == pytest.approx(100 * right.double().mean().item())
    run("--predict", tmp_path / "images/7.npy", "--eval", path, *options[6:])
    assert "images/7.npy\n" in capsys.readouterr().out
    assert "belongs to another model" in error_of("--eval", path, *options, "--patch", 16)
    run(*SMALL, *options, "--init", path, "--out", tmp_path / "tuned", "--batch-size", 8,
        "--channels", "7,0", "--lr", 0)
    assert_close(weights(tmp_path / "tuned")["patch_embed.channel_embed.weight"],
                 model.patch_embed.channel_embed.weight.detach()[[7, 0]])


@pytest.mark.parametrize("flag", ["--augment", "--no-augment"])
def test_only_training_images_are_augmented(monkeypatch, tmp_path, only_training, flag):
    made = []
    init = data.CellTransform.__init__

    def spy(self, size, mean, std, augment, masked):
        made.append(augment)
        init(self, size, mean, std, augment, masked)

    monkeypatch.setattr(data.CellTransform, "__init__", spy)
    run(*SMALL, flag, "--out", tmp_path)
    assert made == [flag == "--augment", False]


def test_bad_data_ends_in_one_line(tmp_path, only_training):
    (tmp_path / "images").mkdir()
    options = [*SMALL, *jump(str(tmp_path), images=60), *FAST, "--batch-size", 8,
               "--out", tmp_path / "out"]
    for i in range(60):                                   # NaN everywhere
        (tmp_path / f"images/{i}.npy").write_bytes(npy(np.full((8, 4, 4), np.nan)))
    assert "cannot be read" in error_of(*options) and "NaN" in error_of(*options)
    for i in range(60):                     # the first files are whole, all others cut off
        content = npy(np.ones((8, 16, 16), np.uint8))
        (tmp_path / f"images/{i}.npy").write_bytes(content if i < 12 else content[:-5])
    with pytest.warns(UserWarning, match="skipped"):
        assert "cannot be read, more than 1%" in error_of(*options)
    assert "no such" in error_of(*SMALL, "--data", tmp_path / "nowhere").lower()
    index = ["--index", tmp_path / "no.pq", "--platemap", "p", "--metadata", "m"]
    assert "No such file" in error_of(*SMALL, *index)
    index = ["--index", tmp_path, "--platemap", tmp_path, "--metadata", tmp_path]
    assert "directory" in error_of(*SMALL, *index)
    workers = error_of(*options, "--workers", 1)    # without the traceback of a loading process
    assert "cannot be read, more than 1%" in workers and "Traceback" not in workers


def test_a_few_bad_images_are_counted_and_reported(tmp_path, only_training):
    base = str(tmp_path)
    (tmp_path / "images").mkdir()
    options = jump(base, *FAST, "--batch-size", 80, images=400)
    plate = data.JumpCP(*options[1:6:2], "train", np.asarray)
    for i, image in ((200, np.full((8, 4, 4), np.inf)), (100, np.zeros((7, 4, 4)))):
        write(base, f"images/{pathlib.Path(plate.samples[i][0]).name}", npy(image))
    with pytest.warns(UserWarning, match="skipped, ValueError: (7 channels|128 of 128 pixels)"):
        run(*SMALL, *options, "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out/log.jsonl").read_text())["metrics"]["unreadable"] == 2


def test_resuming_takes_the_normalisation_from_the_checkpoint(folder_run, tmp_path):
    """A file that has changed or failed since must not change the means of a run that goes on."""
    root, _ = folder_run
    options = [*SMALL, "--data", tmp_path / "copy", "--img-size", 16, "--patch", 8, *FAST,
               "--batch-size", 8, "--out", tmp_path / "out", "--epochs", 2]
    shutil.copytree(root, tmp_path / "copy")
    run(*options, "--steps", 3)
    for path in (tmp_path / "copy").glob("*/1*.npy"):
        np.save(path, np.load(path) + 100)
    before = torch.load(tmp_path / "out/last.pt", weights_only=True)["channels"]["mean"]
    run(*options, "--steps", 4, "--resume", "--resume-changed")
    assert torch.load(tmp_path / "out/last.pt", weights_only=True)["channels"]["mean"] == before


# ---- Raw plates: a file per channel, constant channels ---------------------------------------------

def test_a_file_per_channel(tmp_path, capsys, monkeypatch):
    root = tmp_path / "plates"
    for k, name in enumerate("ab"):
        (root / name).mkdir(parents=True)
        for site in range(10):
            for channel in (1, 2, 3):
                image = np.random.default_rng(site + channel).integers(1, 99, (32, 32))
                tifffile.imwrite(root / name / f"A{k}{site // 2}_s{site}-ch{channel}.tif",
                                 image.astype(np.uint16))
    options = [*SMALL, "--data", root, "--img-size", 32, *FAST, "--batch-size", 4, "--warmup", 0]
    assert "reads those of a site as one image" in error_of(*options, "--out", tmp_path / "x")
    assert "reads those of a site as one" in error_of("--stats", "--data", root, "--device", "cpu")
    pattern = ["--pattern", r"(?P<well>A\d+)_s(?P<site>\d+)-ch(?P<channel>\d)"]
    run(*options, *pattern, "--channels", "3,1", "--out", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["channels"]["files"] == ["1", "2", "3"] and config["channels"]["taken"] == [2, 0]
    assert "12 training and 4 validation images" in capsys.readouterr().out
    run("--eval", tmp_path / "out/best.pt", "--data", root, *CPU)   # reads them in the same way
    assert "4 of 4 images" in capsys.readouterr().out
    files = [root / f"a/A00_s1-ch{i}.tif" for i in (1, 2, 3)]
    run("--eval", tmp_path / "out/best.pt", "--predict", *files, *CPU)
    assert " + ".join(map(str, files)) in capsys.readouterr().out
    run(*options, "--channel-names", "DNA", "--out", tmp_path / "single")   # each file an image
    assert "36 training" in capsys.readouterr().out


@pytest.mark.parametrize("argument", ["(", "abc", "(?P<site>.)"])
def test_patterns_that_are_none(capsys, argument):
    with pytest.raises(SystemExit):
        train_jump.get_args(["--data", "d", "--pattern", argument])
    assert "regular expression" in (err := capsys.readouterr().err) or "needs a group" in err


@pytest.mark.parametrize("argument", ["z", "z=", "z=-1", "zz=1", "Z=1", "series=a"])
def test_planes_that_are_none(capsys, argument):
    with pytest.raises(SystemExit):
        train_jump.get_args(["--data", "d", "--planes", argument])
    assert "as z=2, t=0 or series=1" in capsys.readouterr().err


def test_slices_are_chosen(tmp_path, only_training):
    for name in "ab":
        (tmp_path / "d" / name).mkdir(parents=True)
        for i in range(5):
            stack = np.random.default_rng(i).integers(0, 99, (2, 3, 16, 16)).astype(np.uint16)
            tifffile.imwrite(tmp_path / "d" / name / f"{i}.tif", stack, imagej=True,
                             metadata={"axes": "ZCYX"})
    options = [*SMALL, "--data", tmp_path / "d", "--img-size", 16, *FAST, "--batch-size", 2,
               "--out", tmp_path / "out"]
    assert "--planes z=0" in error_of(*options)
    run(*options, "--planes", "z=1")
    args, _ = options_of("--data", tmp_path / "d", "--planes", "z=1")
    np.testing.assert_array_equal(train_jump.open_split(args, "train")[0][0].shape, (3, 16, 16))
    args, _ = options_of("--eval", tmp_path / "out/best.pt", "--data", tmp_path / "d")
    assert dict(args.planes) == {"z": 1}


@pytest.mark.parametrize("dtype, value", [("u2", 0), ("u2", 7), ("f4", 0.1), ("f8", 1e6 / 3)])
def test_a_constant_channel_matters_where_it_is_used(tmp_path, only_training, dtype, value):
    for name in "ab":
        (tmp_path / "d" / name).mkdir(parents=True)
        for i in range(8):
            image = np.random.default_rng(i).integers(1, 999, (3, 32, 32)).astype(dtype)
            image[1] = value
            np.save(tmp_path / "d" / name / f"{i}.npy", image)
    options = [*SMALL, "--data", tmp_path / "d", "--img-size", 32, *FAST, "--batch-size", 4]
    message = error_of(*options, "--out", tmp_path / "out")
    assert "channel 1 is constant" in message and "--channels 0,2" in message
    named = error_of(*options, "--channel-names", "DNA,ER,RNA", "--out", tmp_path / "out")
    assert "channel ER is constant" in named and "--channels DNA,RNA" in named
    run(*options, "--channels", "0,2", "--out", tmp_path / "chosen")
    run(*options, "--mask-channels", "1", "--out", tmp_path / "masked")
    run(*options, "--channels", "2,0", "--mean", "1,2,3", "--std", "1,0,1", "--out", tmp_path / "o")


# ---- Resume --------------------------------------------------------------------------------------

@pytest.mark.parametrize("model", ["fastchannelvim_tiny", "vim_tiny"])
def test_killed_within_an_epoch_and_resumed_ends_in_the_same_bits(tmp_path, monkeypatch,
                                                                  only_training, model):
    """The channels of a batch follow from the step, the augmentation from the sample."""
    options = [*SMALL, "--model", model, "--epochs", 3, "--batch-size", 8, "--warmup", 1,
               "--drop-path", 0.2, "--save-minutes", 0]
    run(*options, "--out", tmp_path / "whole")
    step_of = training.train_step

    def killed(run, *rest):
        if run.step == 6:                                 # the third step of the second epoch
            raise KeyboardInterrupt
        return step_of(run, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "train_step", killed)
        run(*options, "--out", tmp_path / "parts")
    run(*options, "--out", tmp_path / "parts", "--resume")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
