"""The loader and its images: folders, bad files, samples that are (seed, epoch, index)'s alone."""
import functools
import io
import pathlib
import random
import subprocess
import sys
import traceback
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason='the data readers need pip install ".[train]"')
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import data
from data.loading import BatchSampler, collate, stable_hash


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(size=32):
    """A colour image: each pixel differs from its neighbours, so that crops and flips show."""
    ramp = np.linspace(0, 255, size).astype(np.uint8)
    return Image.fromarray(np.stack([np.tile(ramp, (size, 1)), np.tile(ramp[:, None], (1, size)),
                                     np.full((size, size), 90, np.uint8)], axis=-1))


def make_folder(root, counts, split="train", content=None):
    """ROOT/split/CLASS/i.png, for counts = {class: number}; their red is the file's number."""
    for name, count in counts.items():
        (root / split / name).mkdir(parents=True)
        for i in range(count):
            (root / split / name / f"{i:04d}.png").write_bytes(
                content or encoded(Image.new("RGB", (8, 8), (i % 256, 10, 20))))
    return root


def first_red(image):
    return torch.tensor(np.asarray(image)[0, 0, 0].item())


# ---- load_rgb ------------------------------------------------------------------------------------

def load(tmp_path, content, name="image.png"):
    (tmp_path / name).write_bytes(content)
    image = data.load_rgb(tmp_path / name)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("mode, value, expected", [
    ("RGB", (10, 20, 30), (10, 20, 30)),
    ("L", 77, (77, 77, 77)),
    ("LA", (77, 5), (77, 77, 77)),
    ("RGBA", (10, 20, 30, 40), (10, 20, 30)),             # alpha is dropped, not blended
    ("1", 1, (255, 255, 255)),
    ("I;16", 65535, (255, 255, 255)),
    ("I;16", 1000, (3, 3, 3)),  # scaled (1000 // 256), where clipping would give white
    ("I;16", 255, (0, 0, 0)),
])
def test_modes_become_rgb(tmp_path, mode, value, expected):
    pixels = load(tmp_path, encoded(Image.new(mode, (6, 4), value)))
    assert pixels.shape == (4, 6, 3)
    assert (pixels == expected).all()


@pytest.mark.parametrize("transparency", [None, 1, bytes([255, 0, 128])])
def test_palette(tmp_path, transparency):
    image = Image.new("P", (3, 1))
    image.putpalette([250, 0, 0, 0, 240, 0, 0, 0, 230])
    image.putdata([0, 1, 2])
    options = {} if transparency is None else dict(transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")                    # a million files must not warn once each
        pixels = load(tmp_path, encoded(image, **options))
    assert pixels.tolist() == [[[250, 0, 0], [0, 240, 0], [0, 0, 230]]]


def test_cmyk_jpeg(tmp_path):
    pixels = load(
        tmp_path,
        encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95),
        "red.jpg",
    )
    assert abs(pixels - (255, 0, 0)).max() <= 8


@pytest.mark.parametrize(
    "orientation, first_half",
    [(1, np.s_[:, :16]), (2, np.s_[:, 16:]), (6, np.s_[:16]), (8, np.s_[16:])],
)
def test_exif_orientation(tmp_path, orientation, first_half):
    stored = Image.new("RGB", (32, 16), (0, 0, 255))
    stored.paste((255, 0, 0), (0, 0, 16, 16))  # as stored: left half red, right half blue
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = load(tmp_path, encoded(stored, "JPEG", quality=95, exif=exif), "turned.jpg")
    assert pixels.shape == ((32, 16, 3) if orientation >= 5 else (16, 32, 3))
    red = np.zeros(pixels.shape[:2], bool)
    red[first_half] = True                                # upright: where the red half must lie
    assert ((pixels[..., 0] > 128) == red).mean() > 0.9
    assert ((pixels[..., 2] < 128) == red).mean() > 0.9


def test_garbled_exif_keeps_the_pixels(tmp_path, monkeypatch):
    def fail(image, in_place):
        raise TypeError("bad operand type")               # as Pillow raises for some EXIF blocks
    monkeypatch.setattr(data.images.ImageOps, "exif_transpose", fail)
    assert (load(tmp_path, encoded(gradient())) == np.asarray(gradient())).all()


@pytest.mark.parametrize("values, expected", [
    (np.int32([[0, 128, 255]]), [0, 128, 255]),
    (np.int32([[0, 300, 65535]]), [0, 1, 255]),
    (np.int32([[0, 70000]]), None),
    (np.int32([[-1, 255]]), None),
    (np.float32([[0, 0.5, 1]]), [0, 128, 255]),
    (np.float32([[0, 99.5, 255]]), [0, 99, 255]),
    (np.float32([[0, 256]]), None),
    (np.float32([[-0.1, 1]]), None),
    (np.float32([[np.nan, 1]]), None),
    (np.float32([[np.inf, 1]]), None),
])
def test_gray_of_32_bits_and_of_floating_point(tmp_path, values, expected):
    """Which Pillow clips: 0 to 1 would all be black, 0 to 65535 white."""
    content = encoded(Image.fromarray(values), "TIFF")
    if expected is None:
        with pytest.raises(ValueError, match="the image has values"):
            load(tmp_path, content, "image.tif")
    else:
        assert load(tmp_path, content, "image.tif")[0, :, 1].tolist() == expected


@pytest.mark.parametrize("kind, name", [
    ("WEBP", "a.webp"), ("BMP", "a.bmp"), ("GIF", "a.gif"), ("TIFF", "a.tif"), ("JPEG", "a.jfif"),
    ("PPM", "a.ppm")])
def test_kinds_of_files(tmp_path, kind, name):
    make_folder(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "train" / "a" / "0000.png").unlink()
    (tmp_path / "train" / "a" / name).write_bytes(encoded(Image.new("RGB", (16, 16), "red"), kind))
    image, label = data.ImageFolder(tmp_path, "train", np.asarray)[0]
    assert label == 0 and abs(image.astype(int) - (255, 0, 0)).max() <= 8


@pytest.mark.parametrize("packed", [False, True])
def test_a_long_comment_does_not_make_a_png_bad(tmp_path, packed):
    notes = PngInfo()
    notes.add_text("parameters", "word " * 800_000, zip=packed)
    pixels = load(tmp_path, encoded(gradient(), pnginfo=notes))
    assert (pixels == np.asarray(gradient())).all()


# ---- ImageFolder ---------------------------------------------------------------------------------

def test_samples_and_labels(tmp_path):
    make_folder(tmp_path, {"dog": 2, "cat": 3, "ant": 1})
    cat = tmp_path / "train" / "cat"
    (cat / "0001.png").rename(cat / "UPPER.PNG")
    (cat / "deeper").mkdir()
    (cat / "0002.png").rename(cat / "deeper" / "0002.png")
    (cat / "deeper" / "photo.JpEg").write_bytes(encoded(gradient(), "JPEG"))
    for name in ("notes.txt", "a.HEIC", "b.heic", "._0000.png", "Thumbs.db", ".DS_Store"):
        (cat / name).write_bytes(b"no image")
    for junk in ("train/.cache", "train/__MACOSX/cat", "train/cat/@eaDir/0000.png"):
        (tmp_path / junk).mkdir(parents=True)
        (tmp_path / junk / "small.jpg").write_bytes(encoded(gradient(), "JPEG"))
    with pytest.warns(UserWarning, match=r"3 files of other kinds .*: 2 \.heic, 1 \.txt$") as said:
        dataset = data.ImageFolder(str(tmp_path), "train", lambda image: image.size)
    assert len(said) == 1
    assert dataset.classes == ["ant", "cat", "dog"]
    assert [(path[len(str(cat.parent)) + 1:], label) for path, label in dataset.samples] == [
        ("ant/0000.png", 0), ("cat/0000.png", 1), ("cat/UPPER.PNG", 1), ("cat/deeper/0002.png", 1),
        ("cat/deeper/photo.JpEg", 1), ("dog/0000.png", 2), ("dog/0001.png", 2)]
    assert len(dataset) == 7 and dataset[4] == ((32, 32), 1) and dataset[6] == ((8, 8), 2)
    assert dataset.bad.sum() == 0


def test_missing_folders(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere: no such folder.*ROOT/train/CLASS.*check the path"
    ):
        data.ImageFolder(tmp_path / "nowhere", "train", None)
    make_folder(tmp_path, {"cat": 1})
    with pytest.raises(FileNotFoundError, match=r"val: no such folder.*ROOT/val/CLASS"):
        data.ImageFolder(tmp_path, "val", None)


def test_split_without_class_folders(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "loose.png").write_bytes(encoded(gradient()))
    with pytest.raises(ValueError, match=r"val: no class folders.*one folder per class"):
        data.ImageFolder(tmp_path, "val", None)


def test_class_folder_without_images(tmp_path):
    make_folder(tmp_path, {"cat": 1, **{f"empty{i}": 0 for i in range(7)}})
    with pytest.raises(
        ValueError, match=r"train.empty0, .*empty4 and 2 more: no images.*Fill it, or remove"
    ) as error:
        data.ImageFolder(tmp_path, "train", None)
    assert "empty5" not in str(error.value) and "cat" not in str(error.value)


def test_val_classes_must_be_those_of_training(tmp_path):
    make_folder(tmp_path, {"cat": 1, "dog": 1, "eel": 1}, "val")
    with pytest.raises(
        ValueError, match=r"val: .* 2 classes of training. Missing: none. Unknown: eel. Give both"
    ):
        data.ImageFolder(tmp_path, "val", None, classes=["cat", "dog"])
    many = ["cat", "dog", "eel"] + [f"x{i}" for i in range(8)]
    with pytest.raises(ValueError, match=r"Missing: x0, x1, x2, x3, x4 and 3 more. Unknown: none"):
        data.ImageFolder(tmp_path, "val", None, classes=many)
    with pytest.raises(ValueError, match=r"Missing: fox. Unknown: eel"):
        data.ImageFolder(tmp_path, "val", None, classes=["cat", "dog", "fox"])
    # Labels count the given order.
    dataset = data.ImageFolder(tmp_path, "val", None, classes=["eel", "dog", "cat"])
    assert dataset.classes == ["eel", "dog", "cat"]
    assert ["eel" in path for path, label in dataset.samples if label == 0] == [True]


def links_of(root, name, target):
    (root / name).symlink_to(target, target_is_directory=True)


@pytest.mark.parametrize("name, target", [
    ("train/a/up", ".."), ("train/a/here", "."), ("train/a/self", "self"), ("train/a/b", "../b"),
    ("train/train", "../train"), ("train/a/root", "../../..")])
def test_folders_are_read_once_whatever_links_lead_to_them(tmp_path, name, target):
    make_folder(tmp_path, {"a": 2, "b": 1})
    links_of(tmp_path, name, target)
    with pytest.warns(UserWarning, match=f"not read are .*{name}|1 without ending") as said:
        dataset = data.ImageFolder(tmp_path, "train", None)
    assert len(said) == 1 and dataset.classes == ["a", "b"]
    assert [label for _, label in dataset.samples] == [0, 0, 1]


def test_links_in_a_circle_outside(tmp_path):
    make_folder(tmp_path / "store", {"x": 1, "y": 1}, "deep")
    links_of(tmp_path, "store/deep/x/round", "../../deep")
    make_folder(tmp_path, {"b": 1})
    links_of(tmp_path, "train/a", "../store/deep/x")            # a class may lie elsewhere
    links_of(tmp_path, "train/b/more", "../../store/deep/y")    # and a part of one
    with pytest.warns(UserWarning, match="train/a/round$"):
        dataset = data.ImageFolder(tmp_path, "train", None)
    assert [label for _, label in dataset.samples] == [0, 1, 1]


def test_two_names_for_a_class_folder(tmp_path):
    make_folder(tmp_path, {"cat": 2, "dog": 1})
    links_of(tmp_path, "train/a_cat", "cat")
    with pytest.warns(UserWarning, match="read elsewhere: .*a_cat$"):
        assert data.ImageFolder(tmp_path, "train", None).classes == ["cat", "dog"]


def test_what_lies_in_a_class_folder_without_images(tmp_path):
    make_folder(tmp_path, {"cat": 1, "dog": 0})
    for i in range(3):
        (tmp_path / "train" / "dog" / f"{i}.HEIC").write_bytes(b"")
    with pytest.raises(ValueError, match=r"dog: no images .*\(but 3 \.heic\). Fill it"):
        data.ImageFolder(tmp_path, "train", None)


def test_one_class_is_refused_with_what_is_inside(tmp_path):
    make_folder(tmp_path, {"cat": 1, "dog": 1}, "train/images")
    with pytest.raises(ValueError, match="one class, 'images', and in it the folders cat, dog. If"):
        data.require_classes(data.ImageFolder(tmp_path, "train", None))
    make_folder(tmp_path / "flat", {"cat": 1})
    with pytest.raises(ValueError, match="one class, 'cat'. There is nothing to tell apart"):
        data.require_classes(data.ImageFolder(tmp_path / "flat", "train", None))
    data.require_classes(data.ImageFolder(tmp_path / "train", "images", None))


def test_order_of_classes_without_names():
    order, note = data.class_order("folders", sorted(map(str, range(1000))), 1000)
    assert order == [str(i) for i in range(1000)] and "order of their numbers" in note
    assert data.class_order("folders", ["002", "010", "1"], 3)[0] == ["1", "002", "010"]
    with pytest.raises(ValueError, match="folders of the same number: "):
        data.class_order("folders", ["1", "01", "2"], 3)
    order, note = data.class_order("folders", ["cat", "dog"], 2)
    assert order == ["cat", "dog"] and "alphabetical order, cat, dog" in note
    known = pytest.importorskip("timm.data").ImageNetInfo().label_names()
    assert data.class_order("folders", sorted(known), 1000) == (sorted(known), "")
    with pytest.raises(ValueError, match="Neither are fish: rename"):
        data.class_order("folders", sorted([*known[1:], "fish"]), 1000)


def test_folders_and_addresses_among_the_files_to_read(tmp_path, capsys):
    make_folder(tmp_path, {"a": 2, "b": 1})
    (tmp_path / "train" / "a" / "notes.txt").write_text("")
    with pytest.warns(UserWarning, match="1 .txt"):
        found = list(data.each_readable([tmp_path / "train"], data.load_rgb))
    assert [path[-10:] for path, _ in found] == ["a/0000.png", "a/0001.png", "b/0000.png"]
    with pytest.raises(SystemExit):
        list(data.each_readable(["https://example.org/cat.jpg", found[0][0]], data.load_rgb))
    assert "cat.jpg: cannot be read" in (said := capsys.readouterr().out) and "Download it" in said
    (tmp_path / "train" / "b" / "0000.png").unlink()
    with pytest.raises(ValueError, match="b: no images .* in this folder$"):
        list(data.each_readable([str(tmp_path / "train" / "b")], data.load_rgb))


# ---- bad files -----------------------------------------------------------------------------------

def break_files(root):
    """Files 3, 5, 7 of class 'a': a truncated JPEG, a text file, an empty file -> their paths."""
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8)
    # Mostly pixels: cut, it opens, and fails only when decoded.
    photo = encoded(Image.fromarray(noise), "JPEG")
    contents = photo[:len(photo) * 3 // 4], b"this is text\n" * 50, b""
    paths = [root / "train" / "a" / f"{i:04d}.jpg" for i in (3, 5, 7)]
    for path, content in zip(paths, contents):
        path.with_suffix(".png").unlink()
        path.write_bytes(content)
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A folder of 300 files, of which 3 are bad, items 3, 5 and 7, and their paths: to be read."""
    root = make_folder(tmp_path_factory.mktemp("broken"), {"a": 200, "b": 100})
    return str(root), break_files(root)


def test_bad_files_are_skipped_with_one_warning_each(broken):
    root, paths = broken
    dataset = data.ImageFolder(root, "train", first_red)
    for i, path in zip((3, 5, 7), paths):
        with pytest.warns(UserWarning) as caught:
            assert dataset[i] is None
        assert len(caught) == 1 and str(caught[0].message).startswith(f"{path}: skipped, ")
    assert Image.open(paths[0]).size == (64, 64)          # the truncated file has a good header
    assert dataset.bad.sum() == 3                         # 3 of 300 are 1%, not more
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dataset[3] is None and dataset[4] == (4, 0)  # known by now
    assert dataset.bad.sum() == 3


def test_decompression_bomb_is_a_bad_file(tmp_path, monkeypatch):
    make_folder(tmp_path, {"a": 100})
    (tmp_path / "train" / "a" / "0000.png").write_bytes(encoded(gradient(64)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    dataset = data.ImageFolder(tmp_path, "train", first_red)
    with pytest.warns(UserWarning, match="DecompressionBombError"):
        assert dataset[0] is None
    assert dataset[1] == (1, 0)


def test_bad_files_are_counted_across_workers(broken):
    dataset = data.ImageFolder(broken[0], "train", first_red)
    loader = data.make_loader(dataset, 50, train=False, workers=2)
    for _ in range(2):
        batches = list(loader)
        assert [len(labels) for _, labels in batches] == [47, 50, 50, 50, 50, 50]
        assert batches[0][0].tolist() == [i for i in range(50) if i not in (3, 5, 7)]
        assert dataset.bad.sum() == 3


@pytest.mark.filterwarnings("ignore:.*skipped")
@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_one_percent_bad_stops_the_run(tmp_path, workers):
    make_folder(tmp_path, {"a": 20})
    for name in ("0013.png", "0004.png"):                 # one alone would be left out
        (tmp_path / "train" / "a" / name).write_bytes(b"text")
    loader = data.make_loader(
        data.ImageFolder(tmp_path, "train", first_red), 5, train=True, workers=workers
    )
    with pytest.raises(
        RuntimeError, match=r"2 of the 20 images in .*train cannot be.* more than 1%: .*0013"
    ) as error:
        list(loader)
    traceback.clear_frames(error.tb)  # end the workers now, by their last reference: those found
    del loader  # as cyclic garbage take torch 10 s, in some later test


def test_a_run_that_ends_by_bad_files_ends(tmp_path):
    """The exception holds the loader, whose processes ignore SIGTERM: exit must not wait."""
    make_folder(tmp_path, {"a": 40}, content=b"text")
    code = ("import sys, data\n"
            "try:\n"
            f"    images = data.ImageFolder({str(tmp_path)!r}, 'train', None)\n"
            "    loader = data.make_loader(images, 5, train=True, workers=1)\n"
            "    list(loader)\n"
            "except RuntimeError as error:\n"
            "    kept, sys.kept = sys.exc_info(), error\n"
            "    raise SystemExit('too many')\n")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=pathlib.Path(data.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert result.returncode == 1 and "too many" in result.stderr


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_one_percent_of_all_files_whatever_the_number_of_processes(broken, monkeypatch):
    """Every epoch deals the files anew, so each process comes to see all of them."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    dataset = data.ImageFolder(broken[0], "train", first_red)
    assert dataset[3] is dataset[5] is dataset[7] is None
    with pytest.raises(data.BadDataError, match="4 of the 300 images"):
        dataset.mark_bad(8, ValueError())


def test_a_fault_of_the_transform_is_no_bad_file(tmp_path):
    def broken(image):
        raise OSError("a bug")
    with pytest.raises(OSError, match="a bug"):
        data.ImageFolder(make_folder(tmp_path, {"a": 1}), "train", broken)[0]


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_training_batches_keep_their_size(broken):
    dataset = data.ImageFolder(broken[0], "train", first_red)
    loader = data.make_loader(dataset, 6, train=True, seed=1)
    for (reds, labels), pairs in zip(loader, loader.batch_sampler, strict=True):
        planned = {(dataset.samples[i][1], i % 200) for _, i in pairs if i not in (3, 5, 7)}
        # Repeats of the same batch.
        assert len(reds) == 6 and set(zip(labels.tolist(), reds.tolist())) == planned
    assert dataset.bad.sum() == 3


def test_collate():
    samples = [None, (torch.zeros(2), 4), (torch.ones(2), 5), None, None]
    images, labels = collate(samples, refill=True)
    assert images.shape == (5, 2)
    assert set(labels.tolist()) == {4, 5}
    assert (images[:, 0] == labels - 4).all()
    assert collate(samples, refill=False)[1].tolist() == [4, 5]
    with pytest.raises(RuntimeError, match="all 3 samples of a batch are unreadable"):
        collate([None] * 3, refill=True)
    assert collate([None] * 3, refill=False) is None


# ---- transforms ----------------------------------------------------------------------------------

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def unit(image):
    return torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255


@pytest.mark.parametrize(
    "img_size, crop_pct, border", [(224, 0.875, 16), (192, 0.75, 32), (256, 1.0, 0)]
)
def test_evaluation_transform(img_size, crop_pct, border):
    pytest.importorskip("timm")
    image = gradient(256)                                 # already at the size it is resized to
    got = data.image_transform(img_size, False, crop_pct=crop_pct)(image)
    expected = (unit(image)[:, border:256 - border, border:256 - border] - MEAN) / STD
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("size", [(2, 60000), (60000, 3), (1, 60001), (1500, 100)])
def test_of_a_long_image_the_middle_is_seen(size, monkeypatch):
    """Before it is enlarged: 2 x 60,000 pixels would take 8 GB, and show the same."""
    pytest.importorskip("timm")
    sizes = []
    resize = Image.Image.resize

    def watched(image, size, *args, **kwargs):
        sizes.append(size)
        return resize(image, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", watched)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    got = data.image_transform(32, False)(image)
    assert got.shape == (3, 32, 32) and max(sizes[-1]) < 1000
    if max(size) < 2000:
        monkeypatch.setattr(data.images, "LONGEST", 1e9)
        torch.testing.assert_close(data.image_transform(32, False)(image), got)


def test_training_transform():
    pytest.importorskip("timm")
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    image = gradient(32)
    plain = (unit(image) - MEAN) / STD
    transform = data.image_transform(32, True, scale=(1.0, 1.0))
    mirrored = 0
    for _ in range(16):                                     # the defaults flip, and add nothing
        made = transform(image)
        mirrored += not torch.allclose(made, plain, atol=1e-5)
        assert min((made - plain).abs().max(), (made - plain.flip(-1)).abs().max()) < 1e-5
    assert 3 < mirrored < 13
    erased = data.image_transform(32, True, reprob=1.0, scale=(1.0, 1.0))(image)
    changed = min(((erased != base).all(0) for base in (plain, plain.flip(-1))), key=torch.sum)
    # Noise, not a constant.
    assert 0.02 * 1024 < changed.sum() < 0.4 * 1024 and erased[:, changed].std() > 0.5
    recipe = str(data.image_transform(224, True, auto_augment="rand-m9-mstd0.5-inc1", reprob=0.25))
    assert "RandAugment(n=2" in recipe and "bicubic" in recipe and "p=0.25, mode=pixel" in recipe
    assert "ColorJitter" not in recipe
    assert "scale=(0.2, 1.0)" in str(data.image_transform(224, True, scale=(0.2, 1.0)))


def test_posterize_at_full_strength():
    """With mstd0.5, magnitude 9 reaches 10 once in 44; then timm keeps 0 bits, Pillow 13 fails."""
    pytest.importorskip("timm")
    transform = data.image_transform(32, True, auto_augment="rand-m10-inc1")
    randaugment, = (step for step in transform.transforms if hasattr(step, "ops"))
    operation, = (op for op in randaugment.ops if op.name == "PosterizeIncreasing")
    operation.prob = 1.0
    assert set(np.unique(operation(gradient()))) == {0, 128}


# ---- Seeded --------------------------------------------------------------------------------------

class Draws:
    """Item i: i and draws of each global generator. Equal seeds: NumPy's and torch's agree."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return torch.tensor([i, random.random(), random.gauss(0, 1),
                             np.random.randint(2**24) / 2**24, np.random.rand(), np.random.randn(),
                             torch.rand(()), torch.randn(())], dtype=torch.float64), 0


def all_items(dataset, epoch, workers, seed=0, rank=0, world_size=1, batch_size=4, skip=0):
    loader = data.make_loader(dataset, batch_size, train=True, seed=seed, workers=workers,
                              rank=rank, world_size=world_size)
    loader.batch_sampler.set_epoch(epoch, skip)
    return torch.cat([inputs for inputs, _ in loader])


def sort(items):
    return items[items[:, 0].argsort()]


def test_samples_depend_on_seed_epoch_and_index_only():
    reference = all_items(Draws(), 3, 0)
    assert torch.equal(all_items(Draws(), 3, 2), reference)
    assert torch.equal(all_items(Draws(), 3, 0, skip=2), reference[8:])
    ranks = torch.cat(
        [all_items(Draws(), 3, 0, rank=r, world_size=2, batch_size=2) for r in range(2)]
    )
    assert torch.equal(sort(ranks), sort(reference))
    for other in (all_items(Draws(), 4, 0), all_items(Draws(), 3, 0, seed=1)):
        assert not torch.equal(other[:, 0], reference[:, 0])  # another order
        assert (sort(other)[:, 1:] != sort(reference)[:, 1:]).all()  # other draws, all of them
    values = reference[:, 1:].flatten()
    # No two samples, and no two generators, draw the same.
    assert len(values.unique()) == len(values)


def test_persistent_workers_follow_the_epoch():
    loader = data.make_loader(Draws(), 4, train=True, workers=2)
    for epoch in (0, 1, 5):
        loader.batch_sampler.set_epoch(epoch)
        assert torch.equal(
            torch.cat([inputs for inputs, _ in loader]), all_items(Draws(), epoch, 0)
        )


@pytest.mark.parametrize("workers", [0, 2])
def test_training_keeps_its_own_random_state(workers):
    def draw():
        python = (random.random(), random.gauss(0, 1))
        return *python, np.random.rand(), np.random.randn(), torch.rand(1).item()

    def seed():
        random.seed(5), np.random.seed(6), torch.manual_seed(7)
        return draw()  # leaves a cached normal behind, part of the state

    seed()
    expected = draw()
    seed()
    all_items(Draws(), 0, workers)
    assert draw() == expected


def test_state_is_restored_after_an_error():
    class Broken(Draws):
        def __getitem__(self, i):
            random.random(), np.random.rand(), torch.rand(1)
            raise KeyError(i)

    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with pytest.raises(KeyError):
        data.Seeded(Broken(), 0)[0, 1]
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_stable_hash_is_the_same_everywhere():
    assert stable_hash(0, 1, 23) == 0x16D4D97D75A572482C68E0058DD4FF5D
    assert stable_hash(0, 1, 23) == stable_hash(0, np.int64(1), 23)
    keys = ((0, 1, 23), (0, 12, 3), (1, 0, 23), (0, 1), (0, 123))
    assert len({stable_hash(*key) for key in keys}) == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_augmented_images_repeat_exactly(tmp_path, workers):
    pytest.importorskip("timm")
    make_folder(tmp_path, {"a": 6, "b": 6}, content=encoded(gradient(48)))
    transform = data.image_transform(32, True, auto_augment="rand-m9-mstd0.5-inc1", reprob=0.5)
    items = functools.partial(all_items, data.ImageFolder(tmp_path, "train", transform))
    reference = items(2, 0)
    assert reference.shape == (12, 3, 32, 32) and reference.dtype == torch.float32
    assert len({image.numpy().tobytes() for image in reference}) == 12  # equal files, own draws
    assert torch.equal(items(2, workers), reference)
    assert not torch.equal(items(3, workers), reference)


# ---- BatchSampler --------------------------------------------------------------------------------

def epoch_of(sampler, epoch, skip=0):
    sampler.set_epoch(epoch, skip)
    return list(sampler)


def test_ranks_share_the_global_batch():
    whole = epoch_of(BatchSampler(50, 12, seed=3), 7)
    for world_size in (2, 3):
        parts = [epoch_of(BatchSampler(50, 12 // world_size, 3, rank=r, world_size=world_size), 7)
                 for r in range(world_size)]
        assert [len(part) for part in parts] == [4] * world_size
        for i, batch in enumerate(whole):
            assert all(len(part[i]) == 12 // world_size for part in parts)
            assert sorted(pair for part in parts for pair in part[i]) == sorted(batch)


def test_training_order():
    sampler = BatchSampler(50, 12, seed=3)
    first, second = epoch_of(sampler, 0), epoch_of(sampler, 1)
    for epoch, batches in enumerate((first, second)):
        # 2 are dropped.
        assert len(batches) == len(sampler) == 4 and all(len(batch) == 12 for batch in batches)
        assert {e for batch in batches for e, _ in batch} == {epoch}
        indices = [i for batch in batches for _, i in batch]
        assert len(set(indices)) == 48
        assert set(indices) <= set(range(50))
        assert indices != sorted(indices)
    assert [i for _, i in first[0]] != [i for _, i in second[0]]
    assert epoch_of(sampler, 0) == first == list(sampler)
    # seed 4 at epoch 0 is no repetition of seed 3 at epoch 1
    other = epoch_of(BatchSampler(50, 12, seed=4), 0)
    assert [i for _, i in other[0]] != [i for _, i in second[0]]


def test_skip_resumes_exactly():
    for rank in range(2):
        sampler = BatchSampler(50, 6, 3, rank=rank, world_size=2)
        whole = epoch_of(sampler, 2)
        for skip in range(5):
            assert epoch_of(sampler, 2, skip) == whole[skip:] and len(sampler) == 4
        sampler.set_epoch(2)  # the next epoch starts at its beginning again
        assert list(sampler) == whole


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 11, 12, 13, 25])
def test_evaluation_visits_each_index_once(n, world_size):
    seen = []
    for rank in range(world_size):
        sampler = BatchSampler(n, 4, train=False, rank=rank, world_size=world_size)
        batches = list(sampler)
        assert len(batches) == len(sampler) and all(0 < len(batch) <= 4 for batch in batches)
        indices = [i for batch in batches for _, i in batch]
        assert indices == sorted(indices)
        seen += indices
    assert sorted(seen) == list(range(n))


def test_too_small_training_set():
    with pytest.raises(
        ValueError, match=r"has 10 samples.* 12 \(6 in each of 2 processes\).*--batch-size"
    ):
        BatchSampler(10, 6, world_size=2)
    assert len(BatchSampler(12, 6, world_size=2)) == 1
    with pytest.raises(ValueError, match="--batch-size"):
        data.make_loader(Draws(), 13, train=True)
    assert len(data.make_loader(Draws(), 13, train=False)) == 1


# ---- Digits --------------------------------------------------------------------------------------

def test_digits_split():
    pytest.importorskip("sklearn")
    train, held_out = data.Digits(True), data.Digits(False)
    assert (len(train), len(held_out)) == (1437, 360)
    assert sorted([*train.indices, *held_out.indices]) == list(range(1797))  # disjoint, complete
    assert train.classes == held_out.classes == list("0123456789")
    counts = np.bincount(train.labels), np.bincount(held_out.labels)
    assert (abs(counts[1] - 0.2 * (counts[0] + counts[1])) <= 1).all()  # stratified
    assert (data.Digits(False).indices == held_out.indices).all()
    assert held_out.indices[:8].tolist() == [21, 24, 28, 34, 35, 37, 39, 42]    # in every version


def plain_digits():
    digits = data.Digits(True)
    digits.augment = False
    return digits


def test_digits_images():
    pytest.importorskip("sklearn")
    train = plain_digits()
    image, label = train[0]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and label == train.labels[0]
    assert data.Digits(False, img_size=20)[0][0].shape == (3, 20, 20)
    pixels = torch.stack([train[i][0] for i in range(300)])
    assert abs(pixels.mean()) < 0.1 and abs(pixels.std() - 1) < 0.1
    # Averaging over 4 x 4 blocks gives the scan back: upright, in place, not smeared.
    blocks = torch.nn.functional.avg_pool2d(pixels[:, :1], 4) * data.DIGITS_STD + data.DIGITS_MEAN
    pair = torch.stack([blocks.flatten(), train.images[:300].flatten()])
    assert torch.corrcoef(pair)[0, 1] > 0.97
    # No overshoot.
    assert blocks.min() > -1e-6 and pixels.max() * data.DIGITS_STD + data.DIGITS_MEAN < 1 + 1e-6
    assert torch.equal(image[0], image[1]) and torch.equal(train[0][0], image)


def test_digits_augmentation():
    pytest.importorskip("sklearn")
    plain = plain_digits()
    default = data.Digits(True)
    seeded = data.Seeded(default, 0)
    still, moved = plain[0][0], seeded[0, 0][0]
    assert moved.shape == still.shape and not torch.allclose(moved, still)
    assert torch.equal(seeded[0, 0][0], moved) and not torch.allclose(seeded[1, 0][0], moved)
    # Held out: no augmentation.
    assert torch.equal(data.Digits(False)[0][0], data.Digits(False)[0][0])

    def similarity(a, b):
        return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
    shifted = torch.stack([similarity(seeded[0, i][0], plain[i][0]) for i in range(200)])
    mirrored = torch.stack([similarity(seeded[0, i][0], plain[i][0].flip(-1)) for i in range(200)])
    # Moved, but no other digit.
    assert 0.5 < shifted.mean() < 0.95 and shifted.mean() > mirrored.mean() + 0.1


def test_digit_transform():
    """A held-out scan, saved as a larger picture, gives the data set's item again."""
    pytest.importorskip("sklearn")
    digits = data.Digits(False)
    scan = (digits.images[7, 0] * 255).round().byte()
    picture = scan.repeat_interleave(9, 0).repeat_interleave(9, 1).numpy()
    got = data.digit_transform(32)(Image.fromarray(picture).convert("RGB"))
    torch.testing.assert_close(got, digits[7][0], atol=0.02, rtol=0)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'sklearn.*pip install "\.\[train\]"'):
        data.Digits(True)
