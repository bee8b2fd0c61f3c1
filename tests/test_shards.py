"""Images that are kept otherwise than in folders of classes: tar shards, Parquet, ILSVRC's flat validation folder."""
import gzip
import io
import json
import os
import pickle
import sys
import tarfile

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import scipy.io
import torch
from PIL import Image

import classification
import data
import train_imagenet
import train_mae
from helpers import run_named_script, run_script, two_processes

SMALL = ["--img-size", 16, "--patch-size", 8, "--depth", 1, "--batch-size", 4, "--workers", 0, "--device", "cpu",
         "--threads", 1, "--ema", 0, "--lr", 1e-3, "--warmup", 1, "--save-minutes", 0]


def png(red):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (red, 250 * (red % 2), 20)).save(buffer, "PNG")
    return buffer.getvalue()


def first_red(image):
    return torch.tensor(np.asarray(image)[0, 0, 0].item())


def write_shard(path, members):
    """members: [(name, content)]"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            shard.addfile(about, io.BytesIO(content))


def pair(i, label=None):
    """The members of sample i, of class i % 2."""
    return [(f"a/s{i:03}.png", png(i)), (f"a/s{i:03}.cls", str(i % 2 if label is None else label).encode())]


def pairs(*numbers):
    return [member for i in numbers for member in pair(i)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three shards of training, 22 samples, and two of validation, 6."""
    root = tmp_path_factory.mktemp("shards")
    for k, numbers in enumerate((range(8), range(8, 16), range(16, 22))):
        write_shard(root / f"set-train-{k:04}.tar", pairs(*numbers))
    for k in range(2):
        write_shard(root / f"set-validation-{k:02}.tar", pairs(*range(3 * k, 3 * k + 3)))
    return root


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """The same in Parquet files."""
    root = tmp_path_factory.mktemp("parquet")
    for split, count in (("train", 22), ("validation", 6)):
        write_parquet(root, split, [dict(image=dict(bytes=png(i), path=f"{i}.png"), label=i % 2) for i in range(count)])
    return root


LABEL = datasets.ClassLabel(names=["even", "odd"])


def write_parquet(root, split, rows, label=LABEL, names=None):
    features = datasets.Features(image=datasets.Image(), label=label)
    rows = datasets.Dataset.from_list(rows, features=features).rename_columns(names or {})
    rows.to_parquet(root / f"{split}-00000-of-00001.parquet")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Where `datasets` keeps its copies."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield folder


def open_split(root, kind="wds", split="train", classes=None, transform=first_red):
    return data.open_split(f"{kind}/{root}", split, transform, classes)


# ---- Both ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, names", [("wds", ["0", "1"]), ("hfds", ["even", "odd"])])
def test_samples_labels_and_classes(kind, names, shards, parquet, monkeypatch):
    root = {"wds": shards, "hfds": parquet}[kind]
    train = open_split(root, kind)
    assert train.classes == names and len(train) == 22
    assert [train[i] for i in range(22)] == [(i, i % 2) for i in range(22)] and train.bad.sum() == 0
    val = open_split(root, kind, "val", train.classes)
    assert [val[i] for i in range(6)] == [(i, i % 2) for i in range(6)]
    turned = open_split(root, kind, "val", names[::-1])                     # the labels of another run
    assert [label for _, label in (turned[i] for i in range(6))] == [1, 0] * 3
    with pytest.raises(ValueError, match="val .* not the 3 classes of training. Missing: cat. Unknown: none"):
        open_split(root, kind, "val", ["cat", *names])
    assert data.has_split(f"{kind}/{root}", "val")
    monkeypatch.chdir(root.parent)
    assert len(open_split(root.name, kind)) == 22                           # a relative path


@pytest.mark.parametrize("kind", ["wds", "hfds"])
def test_two_processes_share_no_sample_and_loading_processes_change_none(kind, shards, parquet):
    train = open_split({"wds": shards, "hfds": parquet}[kind], kind)
    whole = [batch[0].tolist() for batch in data.make_loader(train, 8, train=True, seed=3)]
    halves = [[batch[0].tolist() for batch in data.make_loader(train, 4, train=True, seed=3, workers=1, rank=rank,
                                                               world_size=2)] for rank in (0, 1)]
    assert len(whole) == len(halves[0]) == len(halves[1]) == 2
    assert [sorted(a + b) for a, b in zip(*halves)] == [sorted(batch) for batch in whole]
    assert len({red for batch in whole for red in batch}) == 16


@pytest.mark.parametrize("kind", ["wds", "hfds"])
def test_a_run_goes_on_with_the_same_bits(kind, shards, parquet, tmp_path, monkeypatch, capsys):
    flags = ["--data", f"{kind}/{shards if kind == 'wds' else parquet}", *SMALL, "--epochs", 2, "--drop-path", 0.3]
    run_script(train_imagenet, *flags, "--out", tmp_path / "whole")
    made = classification.classification_loss

    def failing(args, count):
        loss, calls = made(args, count), []

        def once(model, batch):
            calls.append(1)
            if len(calls) == 8:                                             # amid the second epoch
                raise KeyboardInterrupt
            return loss(model, batch)
        return once

    monkeypatch.setattr(classification, "classification_loss", failing)
    with pytest.raises(KeyboardInterrupt):
        run_script(train_imagenet, *flags, "--out", tmp_path / "half")
    monkeypatch.undo()
    run_script(train_imagenet, *flags, "--out", tmp_path / "half", "--resume")
    said = capsys.readouterr().out
    assert "2 classes, 22 training and 6 validation images" in said and "at step 7 of 10" in said
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "half"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert a["history"][-1]["metrics"] == b["history"][-1]["metrics"] and "list " in a["training_set"]
    run_script(train_imagenet, "--data", flags[1], "--eval", tmp_path / "half" / "best.pt", "--device", "cpu",
               "--workers", 0)
    assert "on 6 images of 6" in capsys.readouterr().out


def in_process(cache, *argv):
    datasets.config.HF_DATASETS_CACHE = cache
    run_named_script("train_imagenet", *argv)


@pytest.mark.parametrize("kind", ["wds", "hfds"])
def test_two_processes_train_as_one(kind, shards, parquet, tmp_path):
    flags = ["--data", f"{kind}/{shards if kind == 'wds' else parquet}", *SMALL, "--epochs", 1, "--mixup", 0,
             "--cutmix", 0, "--drop-path", 0]
    ended = two_processes(tmp_path, in_process, str(tmp_path / "fresh"), *map(str, flags), "--out", str(tmp_path / "two"))
    assert [status for status, _ in ended] == [0, 0], ended
    flags[flags.index("--batch-size") + 1] = 8
    run_script(train_imagenet, *flags, "--out", tmp_path / "one")
    a, b = (json.loads((tmp_path / name / "log.jsonl").read_text()) for name in ("one", "two"))
    assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert a["metrics"]["loss"] == pytest.approx(b["metrics"]["loss"], abs=1e-5)


@pytest.mark.parametrize("kind", ["wds", "hfds"])
def test_masked_autoencoding(kind, shards, parquet, tmp_path):
    run_script(train_mae, "pretrain", "--data", f"{kind}/{shards if kind == 'wds' else parquet}", *SMALL, "--steps", 1,
               "--eval-every", 1, "--decoder-dim", 8, "--out", tmp_path)
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert line["metrics"]["images"] == 6 and (tmp_path / "reconstruction-0001.png").exists()


# ---- Tar shards ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("train, val", [
    ("train-000.tar", "val-000.tar"), ("train/0.tar", "valid/0.tar"), ("imagenet12k-training-{0}.tar", "x_VAL_1.tar")])
def test_names_of_shards(train, val, tmp_path):
    write_shard(tmp_path / train, pairs(1, 2))
    write_shard(tmp_path / val, pairs(3, 4, 5))
    write_shard(tmp_path / "trained.tar", pairs(6))                         # no word of a split
    assert [len(open_split(tmp_path, split=split)) for split in ("train", "val")] == [2, 3]


def test_no_shards(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder of shards. After wds/"):
        open_split(tmp_path / "nowhere")
    write_shard(tmp_path / "train-0.tar", pairs(0, 1))
    with pytest.raises(ValueError, match="no shards of this split.* val, valid, validation"):
        open_split(tmp_path, split="val")
    assert not data.has_split(f"wds/{tmp_path}", "val")


def test_what_the_writer_of_webdataset_writes(tmp_path, monkeypatch):
    """Long names and times of fractions make it write more than a header for a member."""
    with tarfile.open(tmp_path / "train.tar", "w", format=tarfile.PAX_FORMAT) as shard:
        for i in range(3):
            for name, content in ((f"{'k' * 120}{i}.JPG", png(i)), (f"{'k' * 120}{i}.cls", b" 1\n")):
                about = tarfile.TarInfo(name)
                about.size = len(content)
                about.mtime = 1.5
                shard.addfile(about, io.BytesIO(content))
    with pytest.warns(UserWarning, match="no sample is of the classes 0$"):
        train = open_split(tmp_path)
    assert [train[i] for i in range(3)] == [(0, 1), (1, 1), (2, 1)] and train.classes == ["0", "1"]


class Payload:
    """Whoever loads its pickle leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_nothing_in_a_shard_runs(tmp_path):
    trap = str(tmp_path / "ran")
    poison = pickle.dumps(Payload(trap))
    kinds = ("pickle", "pkl", "pyd", "pth", "npy", "npz", "json", "py", "cls.pkl", "txt", "ten", "cbor")
    more = [member for i in range(1, 301) for member in pair(i)]
    write_shard(tmp_path / "train.tar", [
        ("x.png", png(9)), ("x.cls", b"1"), *((f"x.{kind}", poison) for kind in kinds), ("y.png", poison),
        ("y.cls", b"0"), ("z.png", png(3)), ("z.cls", poison), *more])
    train = open_split(tmp_path)
    assert len(train) == 303 and train[0] == (9, 1)
    with pytest.warns(UserWarning, match=r"train.tar/y.png: skipped, UnidentifiedImageError"):
        assert train[1] is None
    with pytest.warns(UserWarning, match=r"train.tar/z.png: skipped, ValueError: beside it is no .cls"):
        assert train[2] is None
    assert not os.path.exists(trap)
    pickle.loads(poison)
    assert os.path.exists(trap)                                             # it would have


def test_bad_samples_are_skipped_and_many_stop_the_run(tmp_path):
    members = [member for i in range(300) for member in pair(i % 250, label=i % 2)]
    members = [(f"{i // 2}.{name.rpartition('.')[2]}", content) for i, (name, content) in enumerate(members)]
    members[0] = ("0.png", png(0)[:40])
    del members[3]                                                          # 1.cls
    del members[3]                                                          # 2.png: its class is left
    write_shard(tmp_path / "train.tar", members)
    train = open_split(tmp_path)
    assert len(train) == 300
    names = [name.rpartition("/")[2] for name, *_ in train.samples]
    for name, reason in (("0.png", "skipped"), ("1.png", "no .cls with the number"), ("2", "no image has this key")):
        with pytest.warns(UserWarning, match=f"{name}: .*{reason}"):
            assert train[names.index(name)] is None
    assert train.bad.sum() == 3 and train[names.index("5.png")] == (5, 1)
    write_shard(tmp_path / "val.tar", [*pairs(1, 2), ("a/s001.txt", b""), ("b.png", b"text"), ("c.png", png(0))])
    val = open_split(tmp_path, split="val", classes=train.classes)
    with pytest.warns(UserWarning), pytest.raises(data.BadDataError, match="2 of the 4 images in the val shards"):
        [val[i] for i in range(4)]


@pytest.mark.parametrize("damage, message", [
    (lambda tar: tar[:700], "unexpected end"), (lambda tar: tar[:2048], "cut at byte 2,048"),
    (lambda tar: b"text\n" * 300, "invalid header"), (lambda tar: b"", "empty"),
    (lambda tar: tar[:2048] + b"x" + tar[2049:], "damaged or cut at byte 2,048"), (gzip.compress, "unpacked by gunzip")])
def test_damaged_shards_are_refused(damage, message, tmp_path):
    write_shard(tmp_path / "train-0.tar", pairs(0, 1))
    content = (tmp_path / "train-0.tar").read_bytes()
    (tmp_path / "train-1.tar").write_bytes(damage(content))
    with pytest.raises(ValueError, match=f"train-1.tar: no whole tar archive.*{message}"):
        open_split(tmp_path)


def test_a_shard_that_leads_back_is_refused(tmp_path):
    write_shard(tmp_path / "train.tar", pairs(0, 1))
    back = tarfile.TarInfo("back")
    back.size = -5 * 512                                                    # to where it begins
    content = (tmp_path / "train.tar").read_bytes()
    (tmp_path / "train.tar").write_bytes(content[:2048] + back.tobuf(tarfile.GNU_FORMAT) + content[2048:])
    with pytest.raises(ValueError, match="no whole tar archive.*(back has a negative size|invalid offset)"):
        open_split(tmp_path)


def test_a_key_twice_is_refused(tmp_path):
    for extra in (("a/s000.png", png(3)), ("a/s000.jpg", png(3)), ("a/s000.cls", b"1")):
        write_shard(tmp_path / "train.tar", [*pairs(0, 1), extra])
        with pytest.raises(ValueError, match="s000.*is there twice, or in two formats"):
            open_split(tmp_path)


def test_numbers_of_classes(tmp_path):
    write_shard(tmp_path / "train.tar", [*pair(0, 0), *pair(1, 2), *pair(2, 2)])
    with pytest.warns(UserWarning, match="no sample is of the classes 1"):
        assert open_split(tmp_path).classes == ["0", "1", "2"]
    with pytest.warns(UserWarning, match="no sample is of the classes 1, 3"):       # of the last one there is none
        assert open_split(tmp_path, classes=list("0123")).classes == list("0123")
    with pytest.raises(ValueError, match="2 classes of training. Missing: none. Unknown: 2"):
        open_split(tmp_path, classes=["0", "1"])
    with pytest.raises(ValueError, match="Missing: cat, dog, eel. Unknown: 0, 1, 2"):
        open_split(tmp_path, classes=["cat", "dog", "eel"])
    write_shard(tmp_path / "train.tar", [*pair(0, 999_999_999), *pair(1, 0)])
    with pytest.raises(ValueError, match="2 samples, and class numbers up to 999999999"):
        open_split(tmp_path)
    write_shard(tmp_path / "train.tar", [*pair(0, 0), *pair(2, 0)])
    with pytest.raises(ValueError, match="one class, '0'. There is nothing to tell apart"):
        data.require_classes(open_split(tmp_path))
    write_shard(tmp_path / "train.tar", [*pair(0, "n01440764"), *pair(2, -1)])
    with pytest.raises(ValueError, match="no sample has the number of its class"):
        open_split(tmp_path)


def test_weights_that_do_not_name_their_classes_take_the_numbers():
    names = [str(i) for i in range(1000)]
    order, note = data.class_order("wds//data", names, 1000)
    assert order == names and "as it numbers them, 0, 1" in note
    words = [f"fish {i}" for i in range(1000)]
    assert data.class_order("hfds/imagenet", words, 1000)[0] == words
    with pytest.raises(ValueError, match="rename the folders"):
        data.class_order("folders", words, 1000)


# ---- Hugging Face ----------------------------------------------------------------------------------------------------

def test_bad_rows_are_skipped(tmp_path):
    rows = [dict(image=dict(bytes=png(i % 250), path=None), label=i % 2) for i in range(300)]
    rows[1]["image"]["bytes"] = b"text"
    rows[2]["label"] = None
    rows[3]["image"] = None
    write_parquet(tmp_path, "train", rows)
    train = open_split(tmp_path, "hfds")
    for row, reason in ((1, "UnidentifiedImageError"), (2, "it has no class"), (3, "it has no image")):
        with pytest.warns(UserWarning, match=f"{tmp_path}/train row {row}: skipped, .*{reason}"):
            assert train[row] is None
    assert train.bad.sum() == 3 and train[4] == (4, 0)


@pytest.mark.parametrize("kind, value, renamed, message", [
    (datasets.Value("string"), "cat", {}, "column label holds Value.*expected are numbers"),
    (datasets.Value("float32"), 1.0, {}, "expected are numbers"),
    (LABEL, 0, {"image": "img"}, "its columns are img, label; expected are image and label"),
    (LABEL, 0, {"label": "labels"}, "its columns are image, labels; expected")])
def test_columns(kind, value, renamed, message, tmp_path):
    write_parquet(tmp_path, "train", [dict(image=dict(bytes=png(0), path=None), label=value)] * 3, kind, renamed)
    with pytest.raises(ValueError, match=message):
        open_split(tmp_path, "hfds")


def test_labels_without_a_name_are_refused(tmp_path):
    write_parquet(tmp_path, "train", [dict(image=dict(bytes=png(0), path=None), label=1)] * 3)
    [path] = tmp_path.glob("*.parquet")
    table = pyarrow.parquet.read_table(path)
    table = table.set_column(1, table.schema.field("label"), pyarrow.array([0, 1, 2], table.schema.field("label").type))
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(ValueError, match="labels go up to 2, counted from 0, and there are names of 2 classes"):
        open_split(tmp_path, "hfds")


def test_no_such_split_or_folder(tmp_path):
    write_parquet(tmp_path, "train", [dict(image=dict(bytes=png(0), path=None), label=0)])
    with pytest.raises(ValueError, match="val split of hfds/.*: there is none; expected is one called val or valid or"):
        open_split(tmp_path, "hfds", "val")
    assert not data.has_split(f"hfds/{tmp_path}", "val")
    with pytest.raises(ValueError, match="nowhere: cannot be read"):
        open_split(tmp_path / "nowhere", "hfds")


def test_code_of_a_data_set_does_not_run(parquet, tmp_path, monkeypatch):
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nimport datasets\n"
                                        "class S(datasets.GeneratorBasedBuilder): pass\n")
    with pytest.raises(ValueError, match="scripted: cannot be read"):
        open_split(folder, "hfds")
    assert not (tmp_path / "ran").exists()
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(ImportError, match=r"datasets 3.6.0 may run code .* pip install 'datasets>=4'"):
        open_split(parquet, "hfds")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"--data hfds/... needs the package datasets .*: pip install datasets$"):
        open_split(parquet, "hfds")


# ---- ILSVRC's validation images --------------------------------------------------------------------------------------

NAMES = ["n01", "n02", "n03"]
TRUTH = ["n03", "n01", "n02", "n01"]                        # of images 1 to 4
IDS = {"n01": 2, "n02": 3, "n03": 1}                        # the development kit counts in an order of its own


@pytest.fixture
def ilsvrc(tmp_path):
    for name in NAMES:
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "a.JPEG").write_bytes(png(1))
    (tmp_path / "val").mkdir()
    for i in range(1, 5):
        (tmp_path / "val" / f"ILSVRC2012_val_{i:08}.JPEG").write_bytes(png(i))
    return tmp_path


def image(i):
    return f"ILSVRC2012_val_{i:08}"


def write_kit(folder, ids=IDS):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{ids[name]}\n" for name in TRUTH))
    (folder / "ILSVRC2014_clsloc_validation_blacklist.txt").write_text("2\n")
    rows = [(number, name, f"words of {name}", 0) for name, number in ids.items()] + [(4, "n99", "an animal", 3)]
    kinds = [("ILSVRC2012_ID", float), ("WNID", object), ("words", object), ("num_children", float)]
    scipy.io.savemat(folder / "meta.mat", dict(synsets=np.array(rows, kinds)[:, None]))


def write_kaggle(folder):
    lines = [f"{image(i)},{name} 1 2 3 4 {name} 5 6 7 8\n" for i, name in enumerate(TRUTH, 1)]
    (folder / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(lines[::-1]))


@pytest.mark.parametrize("write, place", [
    (write_kit, "ILSVRC2012_devkit_t12/data"), (write_kit, "devkit"), (write_kit, "."), (write_kaggle, ".")])
def test_flat_validation_folder(write, place, ilsvrc):
    write(ilsvrc / place)
    train = data.open_split(str(ilsvrc), "train", first_red)
    val = data.open_split(str(ilsvrc), "val", first_red, train.classes)
    assert val.classes == NAMES
    assert [val[i] for i in range(4)] == [(i, NAMES.index(name)) for i, name in enumerate(TRUTH, 1)]
    assert data.open_split(str(ilsvrc), "val", first_red).classes == NAMES
    with pytest.raises(ValueError, match="val: its classes are not the 2 classes of training.*Unknown: n03"):
        data.open_split(str(ilsvrc), "val", first_red, NAMES[:2])


def test_folders_of_classes_need_no_ground_truth(ilsvrc):
    for name in NAMES:
        (ilsvrc / "val" / name).mkdir()
        (ilsvrc / "val" / name / "a.JPEG").write_bytes(png(7))
    assert len(data.open_split(str(ilsvrc), "val", first_red, NAMES)) == 3


def test_layout_of_kaggle(ilsvrc, tmp_path_factory):
    root = tmp_path_factory.mktemp("kaggle")
    inside = root / "ILSVRC" / "Data" / "CLS-LOC"
    inside.parent.mkdir(parents=True)
    ilsvrc.rename(inside)
    write_kaggle(root)
    val = data.open_split(str(root), "val", first_red, data.open_split(str(root), "train", None).classes)
    assert [label for _, label in val.samples] == [2, 0, 1, 0] and data.has_split(str(root), "val")


def test_ground_truth_that_is_missing_or_damaged_is_refused(ilsvrc):
    def refused(message):
        with pytest.raises(ValueError, match=message):
            data.open_split(str(ilsvrc), "val", first_red, NAMES)

    refused("val holds images without folders of classes, and no file says which. Put ILSVRC2012_validation_ground")
    kit = ilsvrc / "devkit" / "data"
    write_kit(kit)
    (kit / "meta.mat").write_bytes(b"no mat")
    refused("meta.mat: not the development kit's .MatReadError")
    (kit / "meta.mat").unlink()
    refused("meta.mat: not the development kit's .FileNotFoundError")
    write_kit(kit)
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n3\n77\n")
    refused("not the development kit's .KeyError: 77")
    (kit / "ILSVRC2012_validation_ground_truth.txt").unlink()
    for text in ("image,class\na,b\n", f"ImageId,PredictionString\n{image(1)}\n", f"ImageId,PredictionString\n{image(1)},\n"):
        (ilsvrc / "LOC_val_solution.csv").write_text(text)
        refused("LOC_val_solution.csv: not Kaggle's")


@pytest.mark.parametrize("write", [write_kit, write_kaggle])
def test_images_that_the_ground_truth_does_not_know_are_refused(write, ilsvrc):
    write(ilsvrc)
    (ilsvrc / "val" / f"{image(2)}.JPEG").unlink()          # a part of the images is fine
    val = data.open_split(str(ilsvrc), "val", first_red, NAMES)
    assert [label for _, label in val.samples] == [2, 1, 0]
    (ilsvrc / "val" / f"{image(5)}.JPEG").write_bytes(png(5))
    with pytest.raises(ValueError, match="00005.JPEG: no class by this name in .*(truth.txt|solution.csv)"):
        data.open_split(str(ilsvrc), "val", first_red, NAMES)
