"""--embed of train_imagenet.py and train_jump.py: the features, what stands beside them, wells,
parts that go on after a kill."""
import json
import os
import signal
import time

import numpy as np
import pytest
import torch

for module in ("timm", "torchvision", "sklearn", "pyarrow", "fsspec", "PIL", "tifffile",
               "imagecodecs"):
    pytest.importorskip(module)

import pandas
import pyarrow.parquet

import classification
import data
import embed
import fastvim
import runs
import train_imagenet
import train_jump
import train_mae
import training
from helpers import Child, assert_close, run_script, two_processes
from test_cells import make_cells, make_plate

CPU = ["--device", "cpu", "--workers", 0]
FOLDER = ["--img-size", 32, "--patch-size", 8, "--depth", 1, "--batch-size", 8, "--threads", 1,
          *CPU]
SMALL = ["--depth", 1, "--epochs", 1, "--threads", 1, "--batch-size", 16, *CPU, "--warmup", 0,
         "--subset-samples", 0]
NAME = r"(?P<plate>p\d)_(?P<well>[A-Pa-p]\d+)_s(?P<site>\d)"


@pytest.fixture(autouse=True)
def few(monkeypatch):
    for split in ("train", "val", "test"):
        monkeypatch.setitem(data.Cells.sizes, split, 32)
    monkeypatch.setattr(embed, "PART", 20)      # not a whole number of batches


def imagenet(*argv):
    run_script(train_imagenet, *argv)


def jump(*argv):
    run_script(train_jump, *argv)


def error_of(run, *argv):
    with pytest.raises(SystemExit) as caught:
        run(*argv)
    return str(caught.value)


def read(path):
    """By pandas -> its columns, None where nothing is known, and the features as a matrix; pyarrow
    has to read the same."""
    frame = pandas.read_parquet(path).astype(object)
    frame = frame.where(frame.notna(), None)
    features = np.stack(frame["features"])
    table = pyarrow.parquet.read_table(str(path))
    kind = table.schema.field("features").type
    assert kind.list_size == features.shape[1] and kind.value_type == pyarrow.float32()
    assert features.dtype == np.float32
    assert np.array_equal(np.stack(table["features"].to_numpy()), features)
    return frame, torch.from_numpy(features)


def about(path):
    return json.loads(pyarrow.parquet.read_schema(str(path)).metadata[b"fastvim"])


def quick(monkeypatch):
    """Training without pictures and the table at the end."""
    monkeypatch.setattr(runs, "write", lambda *args: None)
    monkeypatch.setattr(train_jump, "evaluate", lambda *args: None)
    monkeypatch.setattr("logs.draw_curve", lambda *args: None)


# ---- train_imagenet.py ---------------------------------------------------------------------------

def restored(path, *more):
    """The model with its head, as --eval builds it, and what it looks at."""
    args, saved = train_imagenet.get_args([*map(str, ["--device", "cpu", "--eval", path, *more])])
    ctx = training.setup(args, training=False)
    return classification.restore(args, ctx, saved), classification.view_of(args, saved)


@pytest.mark.parametrize("flags", [
    "", "--class-token", "--model vit_tiny_patch16_224", "--model resnet10t",
    "--model vit_tiny_patch16_224 --vit-pool"])
def test_features_are_what_the_head_is_given(folder, tmp_path, monkeypatch, flags):
    monkeypatch.setattr("logs.draw_curve", lambda *args: None)
    best = tmp_path / "run/best.pt"
    imagenet("--data", folder, *FOLDER, "--steps", 1, *flags.split(), "--out", tmp_path / "run")
    imagenet("--embed", tmp_path / "a.parquet", "--data", folder, "--eval", best, *CPU,
             "--batch-size", 5)
    frame, features = read(tmp_path / "a.parquet")
    assert len(frame) == 32 and list(frame.columns) == ["path", "split", "label", "features"]
    assert list(frame["path"]) == sorted(map(str, folder.glob("*/*/*.png")))
    assert [f"{folder}/{s}/{k}" for s, k in zip(frame["split"], frame["label"])] == [
        os.path.dirname(path) for path in frame["path"]]
    model, view = restored(best)
    x = torch.stack([view(data.load_rgb(path)) for path in frame["path"]])
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
    assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert about(tmp_path / "a.parquet")["checkpoint"] == str(best)
    assert about(tmp_path / "a.parquet")["version"] == fastvim.__version__


def test_encoders_without_a_head(tmp_path, monkeypatch):
    """A masked autoencoder's on the digits, and the same weights as a released file, which says
    nothing of itself."""
    monkeypatch.setattr("logs.draw_curve", lambda *args: None)
    monkeypatch.setattr(train_mae, "paint_some", lambda *args: None)
    size = ["--img-size", 32, "--patch-size", 8, "--depth", 2]
    run_script(train_mae, "pretrain", *size, "--steps", 1, *CPU, "--decoder-depth", 1,
               "--decoder-dim", 16, "--out", tmp_path / "mae")
    imagenet("--embed", tmp_path / "digits.parquet", "--eval", tmp_path / "mae/last.pt", *CPU)
    frame, features = read(tmp_path / "digits.parquet")
    assert list(frame["split"].value_counts()) == [1437, 360]
    model = fastvim.create_model("fastvim_tiny", depth=2, img_size=32, patch_size=8, num_classes=0,
                                 pool_scale=0.25)
    content = torch.load(tmp_path / "mae/last.pt", weights_only=True)
    fastvim.load_checkpoint(model, content, encoder_only=True)
    train, held_out = data.Digits(True, 32), data.Digits(False, 32)
    train.augment = False
    x = torch.stack([train[i][0] for i in range(100)] + [held_out[i][0] for i in range(360)])
    with torch.no_grad():
        expected = model.eval()(x)
    assert_close(torch.cat([features[:100], features[1437:]]), expected, rtol=1e-4, atol=1e-5)
    assert list(frame["label"]) == [str(label) for label in train.labels + held_out.labels]
    assert frame["path"][1440] == "val/3"

    released = {f"backbone.{k}": v for k, v in model.state_dict().items()}
    torch.save({"state_dict": released}, tmp_path / "released.ckpt")
    (tmp_path / "flat").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (3, 40, 48, 3), np.uint8)
    for i, pixels in enumerate(noise):
        data.images.Image.fromarray(pixels).save(tmp_path / f"flat/{i}.png")
    imagenet("--embed", tmp_path / "flat.parquet", "--data", tmp_path / "flat",
             "--eval", tmp_path / "released.ckpt", *size, "--pool-scale", 0.25, *CPU)
    frame, features = read(tmp_path / "flat.parquet")
    assert frame["label"].isna().all() and frame["split"].isna().all() and len(frame) == 3
    view = data.image_transform(32, False)
    with torch.no_grad():
        expected = model(torch.stack([view(data.load_rgb(path)) for path in frame["path"]]))
    assert_close(features, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def photos(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("photos")
    imagenet("--data", folder, *FOLDER, "--steps", 1, "--out", out)
    return out / "best.pt"


def test_what_cannot_be_embedded_says_why(folder, photos, tmp_path, capsys):
    out = tmp_path / "a.parquet"
    for argv, message in (
            (["--eval", photos], "--data DIR has to say where"),
            (["--eval", photos, "--data", tmp_path / "x"], "no such folder"),
            (["--out", "nowhere"], "no checkpoint at nowhere/best.pt")):
        assert message in error_of(imagenet, "--embed", out, *CPU, *argv)
    assert not out.exists()
    out.write_text("something of the user's")
    for run, argv, message in (
            (imagenet, ["--embed", out], f"{out} exists: delete it"),
            (jump, ["--embed", out], f"{out} exists: delete it"),
            (imagenet, ["--embed", "b", "--predict", "x.png"], "not allowed with"),
            (jump, ["--embed", "b", "--predict", "x.npy"], "not allowed with"),
            (jump, ["--per", "well"], "--per goes with --embed")):
        error_of(run, *argv)
        assert message in capsys.readouterr().err
    assert out.read_text() == "something of the user's"


def test_bad_files_are_named_and_left_out_and_many_stop(folder, photos, tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    source = (folder / "val/dark/0.png").read_bytes()
    for i in range(10):
        (tmp_path / f"flat/{i}.png").write_bytes(source)
    (tmp_path / "flat/3.png").write_bytes(source[:99])
    no_text = os.fsencode(tmp_path) + b"/flat/\xff.png"
    os.link(tmp_path / "flat/0.png", no_text)
    options = ["--data", tmp_path / "flat", "--eval", photos, *CPU, "--batch-size", 4]
    with pytest.warns(UserWarning, match=r"3\.png: skipped"):
        imagenet("--embed", tmp_path / "a.parquet", *options)
    assert "10 images; 1 of 11 cannot be read" in capsys.readouterr().out
    frame, features = read(tmp_path / "a.parquet")
    expected = [*(f"{i}.png" for i in range(10) if i != 3), "\\xff.png"]
    assert [os.path.basename(path) for path in frame["path"]] == expected
    assert (features == features[0]).all()
    (tmp_path / "flat/4.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="skipped"):
        message = error_of(imagenet, "--embed", tmp_path / "b.parquet", *options)
    assert "2 of the 11 images in" in message
    assert not (tmp_path / "b.parquet").exists()


# ---- Parts ---------------------------------------------------------------------------------------

def stop_after(monkeypatch, images):
    """The run dies when it reads one image more."""
    load_rgb = data.load_rgb
    seen = []

    def load(path):
        seen.append(path)
        if len(seen) > images:
            raise KeyboardInterrupt
        return load_rgb(path)

    monkeypatch.setattr(data, "load_rgb", load)
    return seen


def test_a_killed_run_goes_on_and_ends_in_the_same_bits(folder, photos, tmp_path, monkeypatch,
                                                        capsys):
    options = ["--data", folder, "--eval", photos, *CPU, "--batch-size", 6]     # parts of 18, 14
    imagenet("--embed", tmp_path / "whole.parquet", *options)
    again = ["--embed", tmp_path / "parts.parquet", *options]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 30)
        imagenet(*again)
    folder_of_parts = tmp_path / "parts.parquet.parts"
    assert [path.name for path in folder_of_parts.iterdir()] == ["000000000.parquet"]
    assert not (tmp_path / "parts.parquet").exists()
    with monkeypatch.context() as patch:
        seen = stop_after(patch, 100)
        capsys.readouterr()
        imagenet(*again)
    assert len(seen) == 14 and "1 of 2 parts are there already" in capsys.readouterr().out
    assert (tmp_path / "parts.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not folder_of_parts.exists()


def test_parts_of_something_else_are_refused(folder, photos, tmp_path, monkeypatch):
    options = ["--embed", tmp_path / "a.parquet", "--data", folder, *CPU]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 30)
        imagenet(*options, "--eval", photos, "--batch-size", 6)
    content = torch.load(photos, weights_only=True)
    content["ema" if content.get("ema") else "model"]["norm_f.weight"] += 1
    torch.save(content, tmp_path / "other.pt")
    for more, changed in ((["--eval", tmp_path / "other.pt"], "weights"), (["--amp"], "amp"),
                          (["--data", folder / "val"], "images"),
                          (["--batch-size", 5], "batch_size, part"),
                          (["--img-size", 48], "img_size, weights"),
                          (["--crop-pct", 0.9], "crop_pct")):
        message = error_of(imagenet, *options, "--eval", photos, "--batch-size", 6, *more)
        assert f"was begun with other {changed}: go on" in message and "\n" not in message
    (tmp_path / "a.parquet.parts/000000000.parquet").write_bytes(b"PAR1 and no more")
    message = error_of(imagenet, *options, "--eval", photos, "--batch-size", 6)
    assert "is no part of an embedding: delete it" in message
    (tmp_path / "a.parquet.parts/000000000.parquet").unlink()
    imagenet(*options, "--eval", photos, "--batch-size", 5)


def hang_after_two_parts(*argv):
    """In a process of its own: 96 drawn cells in six parts; the third is not finished."""
    for split in ("train", "val", "test"):
        data.Cells.sizes[split] = 32
    embed.PART = 16
    classify = train_jump.classify
    seen = []

    def slowly(*arguments):
        seen.append(1)
        if len(seen) > 5:
            time.sleep(600)
        return classify(*arguments)

    train_jump.classify = slowly
    run_script(train_jump, *argv)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    out = tmp_path_factory.mktemp("cells")
    with pytest.MonkeyPatch.context() as patch:
        for split in ("train", "val", "test"):
            patch.setitem(data.Cells.sizes, split, 32)
        quick(patch)
        jump(*SMALL, "--out", out)
    return out / "best.pt"


def test_sigterm_leaves_whole_parts(cells, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "PART", 16)
    options = ["--eval", cells, *CPU, "--batch-size", 8, "--threads", 1]
    jump("--embed", tmp_path / "whole.parquet", *options)
    parts = tmp_path / "a.parquet.parts"
    process = Child(hang_after_two_parts, "--embed", tmp_path / "a.parquet", *options,
                    output=tmp_path / "said")
    while len(list(parts.glob("*.parquet"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM, process.said()
    names = sorted(path.name for path in parts.glob("*.parquet"))
    assert names == ["000000000.parquet", "000000016.parquet"]
    jump("--embed", tmp_path / "a.parquet", *options)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def embed_in_small_parts(*argv):
    for split in ("train", "val", "test"):
        data.Cells.sizes[split] = 32
    embed.PART = 16
    run_script(train_jump, *argv)


def test_two_processes_share_the_parts(cells, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "PART", 16)
    options = ["--eval", cells, *CPU, "--batch-size", 8, "--threads", 1]
    jump("--embed", tmp_path / "one.parquet", *options)
    ended = two_processes(tmp_path, embed_in_small_parts, "--embed", tmp_path / "two.parquet",
                          *options)
    assert [status for status, _ in ended] == [0, 0], ended
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


# ---- train_jump.py -------------------------------------------------------------------------------

@pytest.mark.parametrize("model", ["fastchannelvim_tiny", "channelvim_tiny", "fastvim_tiny",
                                   "vim_tiny", "vit_tiny", "channelvit_tiny"])
def test_any_model_on_some_channels(tmp_path, monkeypatch, model):
    """The head, put on the features, gives the logits."""
    quick(monkeypatch)
    jump(*SMALL, "--model", model, "--out", tmp_path)
    best = tmp_path / "best.pt"
    jump("--embed", tmp_path / "a.parquet", "--eval", best, *CPU, "--channels", "5,2,7",
         "--split", "test")
    frame, features = read(tmp_path / "a.parquet")
    assert list(frame["path"]) == [f"test/{i}" for i in range(32)]
    assert set(frame["split"]) == {"test"}
    options = ["--eval", str(best), "--device", "cpu", "--channels", "5,2,7"]
    args, saved = train_jump.get_args(options)
    raw = train_jump.open_split(args, "test")
    assert list(frame["label"]) == [raw.classes[label] for _, label in raw.samples]
    net, seen = train_jump.restore(args, training.setup(args, training=False), saved, raw)
    images = seen.normalized(raw, args.img_size)
    x = torch.stack([images[i][0] for i in range(32)])
    with torch.no_grad():
        expected = train_jump.classify(args, net, x, torch.tensor([2, 5, 7]))
        assert_close(net.head(features), expected, rtol=1e-4, atol=1e-5)
    said = about(tmp_path / "a.parquet")
    assert said["channels"] == ["2", "5", "7"] and said["model"] == model
    assert said["checkpoint"] == str(best)


def test_a_released_checkpoint_and_the_tables_of_plates(tmp_path, capsys):
    """Every image of the tables, also in wells without a label, on some channels; then the means
    of its wells."""
    net = fastvim.create_model("fastchannelvim_tiny", depth=2, patch_size=8, img_size=16,
                               num_classes=0).eval()
    released = {f"backbone.{k}": v for k, v in net.state_dict().items()}
    torch.save({"state_dict": released}, tmp_path / "net.ckpt")
    (tmp_path / "images").mkdir()
    wells = ["A01", "a2", "A03", " A04", "Z9", None, "A001"]
    index, platemap, metadata = make_plate(str(tmp_path), images=28, wells=wells)
    for i in range(28):
        image = np.random.default_rng(i).integers(0, 99, (8, 16, 16), np.uint8)
        np.save(tmp_path / f"images/{i}.npy", image)
    tables = ["--index", index, "--platemap", platemap, "--metadata", metadata]
    options = ["--eval", tmp_path / "net.ckpt", *tables, "--model", "fastchannelvim_tiny",
               "--depth", 2, "--img-size", 16, "--patch", 8, *CPU, "--batch-size", 8,
               "--channels", "brightfield1,fluorescence2"]
    jump("--embed", tmp_path / "a.parquet", *options)
    frame, features = read(tmp_path / "a.parquet")
    known = ["path", "split", "label", "compound", "plate", "well"]
    assert list(frame.columns) == [*known, "features"]
    assert list(frame["path"]) == [f"{tmp_path}/images/{i}.npy" for i in range(28)]
    assert frame["well"][:7].to_list() == ["A01", "A02", "A03", "A04", "Z09", None, "A01"]
    assert frame["label"][:7].to_list() == ["KRAS", "control", "KRAS", "EGFR", None, None, "KRAS"]
    assert frame["compound"][:7].to_list() == ["s2", None, "s1", "s3", None, None, "s2"]
    assert set(frame["plate"]) == {"BR00116991"}
    for split in ("train", "val", "test"):
        with pytest.warns(UserWarning, match="have no label"):
            plate = data.JumpCP(*tables[1::2], split, np.asarray)
        labelled = frame[(frame["split"] == split) & frame["label"].notna()]
        assert list(labelled["path"]) == [path for path, _ in plate.samples]
    transform = data.CellTransform(16, data.JUMP_MEAN, data.JUMP_STD, False)
    x = torch.stack([transform(np.load(path)) for path in frame["path"]])
    with torch.no_grad():
        tokens = net.forward_features(x[:, [1, 5]], channels=[1, 5])
    assert_close(features, net.forward_head(tokens, pre_logits=True), rtol=1e-4, atol=1e-5)

    with pytest.warns(UserWarning, match="4 of 28 images are in no well and are left out"):
        jump("--embed", tmp_path / "wells.parquet", *options, "--per", "well")
    assert "5 wells of 24 images; 0 of 24 cannot be read" in capsys.readouterr().out
    means, by_well = read(tmp_path / "wells.parquet")
    assert list(means.columns) == [*known[1:], "sites", "features"]
    assert list(means["well"]) == ["A01", "A02", "A03", "A04", "Z09"]
    assert list(means["sites"]) == [8, 4, 4, 4, 4]
    assert means["label"].to_list() == ["KRAS", "control", "KRAS", "EGFR", None]
    for well, mean in zip(means["well"], by_well):
        mine = torch.from_numpy(np.flatnonzero(frame["well"] == well))
        assert_close(mean, features[mine].mean(0), rtol=1e-5, atol=1e-6)
        splits = set(frame["split"][frame["well"] == well])
        common = splits.pop() if len(splits) == 1 else None
        assert means["split"][means["well"] == well].to_list() == [common]


def test_two_plates_are_two_even_if_their_tables_are_called_alike(tmp_path):
    (tmp_path / "images").mkdir()
    index, platemap, metadata = make_plate(str(tmp_path), images=5)
    for names in (("a/x.pq", "b/y.parquet.gzip"), ("a/x.pq", "b/x.pq")):
        tables = []
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes((tmp_path / "BR00116991.pq").read_bytes())
            tables.append(str(tmp_path / name))
        plates = data.list_index(tables, platemap, metadata, "", "site")["plate"]
        assert plates[::5] == (["x", "y"] if names[1] == "b/y.parquet.gzip" else tables)


def make_wells(root, classes=("",)):
    """Two plates, three wells (one of them written in two ways), two sites, a channel a file."""
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for plate in "p1", "p2":
            for well in "A01", "B2", "C3":
                for site in range(2):
                    for channel in range(1, 4):
                        shown = "a1" if well == "A01" and site else well
                        rng = np.random.default_rng([k, site, channel])
                        np.save(root / name / f"{plate}_{shown}_s{site}-ch{channel}.npy",
                                rng.integers(0, 99, (1, 32, 32), np.uint16))
    return root


@pytest.fixture
def channels_run(tmp_path, monkeypatch):
    quick(monkeypatch)
    root = make_cells(tmp_path / "train", {"a": 6, "b": 6}, channels=3)
    jump(*SMALL, "--data", root, "--img-size", 16, "--patch", 8, "--model", "fastchannelvim_tiny",
         "--batch-size", 4, "--channel-names", "1,2,3", "--out", tmp_path / "run")
    return ["--eval", tmp_path / "run/best.pt", *CPU]


def test_wells_of_a_flat_folder(channels_run, tmp_path, capsys):
    root = make_wells(tmp_path / "flat")
    pattern = ["--pattern", NAME + r"-ch(?P<channel>\d)"]
    options = [*channels_run, "--data", root]
    jump("--embed", tmp_path / "a.parquet", *options, *pattern)
    frame, features = read(tmp_path / "a.parquet")
    assert list(frame.columns)[3:] == ["plate", "well", "site", "features"] and len(frame) == 12
    assert frame["label"].isna().all() and frame["split"].isna().all()
    assert frame["path"][0] == " + ".join(f"{root}/p1_A01_s0-ch{i}.npy" for i in (1, 2, 3))
    for path in root.glob("p2_B2_*-ch2.npy"):                   # all sites of a well
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="skipped"):
        message = error_of(jump, "--embed", tmp_path / "b.parquet", *options, *pattern)
    assert "cannot be read, more than 1%" in message
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.loading, "MAX_BAD", 0.5)
        lost = "1 of 6 wells are left out, none of their images can be read: p2/B02"
        with pytest.warns(UserWarning, match=lost):
            jump("--embed", tmp_path / "b.parquet", *options, *pattern, "--per", "well")
    means, by_well = read(tmp_path / "b.parquet")
    assert "5 wells of 10 images; 2 of 12 cannot be read" in capsys.readouterr().out
    found = [*zip(means["plate"], means["well"], means["sites"])]
    assert sorted(found) == [("p1", "A01", 2), ("p1", "B02", 2), ("p1", "C03", 2),
                             ("p2", "A01", 2), ("p2", "C03", 2)]
    for (plate, well, _), mean in zip(found, by_well):
        mine = np.flatnonzero((frame["plate"] == plate) & (frame["well"] == well))
        assert_close(mean, features[torch.from_numpy(mine)].mean(0), rtol=1e-5, atol=1e-6)
    for argv, message in (
            ([*options, "--per", "well"], "wells are not known"),
            ([*options, "--pattern", NAME.replace("plate", "label")], "rename its group label"),
            ([*options, *pattern, "--split", "val"], "none of 12 images is to be embedded"),
            (channels_run, "--data or --index has to say")):
        assert message in error_of(jump, "--embed", tmp_path / "c.parquet", *argv)


@pytest.mark.parametrize("pattern, split_by", [("", ""), (NAME, ""), (NAME, "site")])
def test_splits_and_labels_are_those_of_training(tmp_path, pattern, split_by):
    root = str(make_wells(tmp_path, ["x", "y", "z"]))
    listing, names = data.list_cells(root, pattern, split_by)
    assert names == [] and len(listing["path"]) == 108
    for split in ("train", "val", "test"):
        files = data.cell_folder(root, split, np.asarray, pattern=pattern, split_by=split_by)
        expected = {(path, files.classes[label]) for path, label in files.samples}
        rows = zip(listing["path"], listing["label"], listing["split"])
        assert expected == {row[:2] for row in rows if row[2] == split}


def test_splits_that_are_folders(tmp_path):
    root = make_cells(tmp_path, {"a": 2, "b": 1}, splits=("train", "val", "test"))
    np.save(tmp_path / "train/loose.npy", np.zeros((3, 4, 4)))
    listing, _ = data.list_cells(root, "", "")
    rows = [*zip(listing["path"], listing["split"], listing["label"])]
    assert (f"{root}/train/loose.npy", "train", None) in rows and len(rows) == 10
    assert (f"{root}/test/b/00.npy", "test", "b") in rows
    (tmp_path / "classes").mkdir()                              # a class may be called as a split
    root = make_cells(tmp_path / "classes", {"control": 1, "test": 1})
    assert data.list_folder(root, (".npy",))["label"] == ["control", "test"]
    assert data.list_folder(root, (".npy",))["split"] == [None, None]
