"""Readers of ADE20K and COCO on small files, good and bad; augmentation; the drawn scenes."""
import colorsys
import json
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("PIL")
pytest.importorskip("pycocotools")

from PIL import Image
from pycocotools import mask as rle

import data
import dense_results


def plain(*found):
    return found


def jpeg(path, height=24, width=32, value=128):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(path)


# ---- ADE20K --------------------------------------------------------------------------------------


def make_ade(root, n=3):
    for split in ("training", "validation"):
        for i in range(n):
            jpeg(root / "images" / split / f"ADE_{i}.jpg")
            labels = np.zeros((24, 32), np.uint8)
            labels[:, 8:], labels[:, 20:] = 1, 150
            (root / "annotations" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels).save(root / "annotations" / split / f"ADE_{i}.png")
    return root / "annotations" / "training" / "ADE_1.png"


def test_ade20k(tmp_path):
    make_ade(tmp_path)
    # A picture of a map, its numbers blurred.
    jpeg(tmp_path / "annotations" / "training" / "ADE_0.jpg")
    found = data.ADE20K(str(tmp_path), "train", plain)
    pixels, labels = found[0]
    assert len(found) == 3
    assert len(found.classes) == 150
    assert pixels.shape == (3, 24, 32)
    assert pixels.dtype == torch.uint8
    # What nobody labelled is not learnt.
    assert labels[0].tolist() == [255] * 8 + [0] * 12 + [149] * 12
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tName\n" + "".join(
        f"{i}\t0.1\tthing{i}, stuff\n" for i in range(1, 151)))
    assert data.ADE20K(str(tmp_path), "val", plain).classes[149] == "thing150"


@pytest.mark.parametrize(
    "fault, message",
    [
        ("no map", "No such file"),
        ("no image", "No such file"),
        ("size", "10 x 32 and not one number for each of 24 x"),
        ("colour", "24 x 32 x 3 and not"),
        ("label", "label 151, there are 150"),
        ("damaged", "cannot identify"),
    ],
)
def test_bad_files_of_ade20k_are_counted_and_named(tmp_path, fault, message):
    path = make_ade(tmp_path)
    if fault == "no map":
        path.unlink()
    elif fault == "no image":
        (tmp_path / "images" / "training" / "ADE_1.jpg").unlink()
    elif fault == "damaged":
        path.write_bytes(b"no png")
    else:
        shape = dict(size=(10, 32), colour=(24, 32, 3), label=(24, 32))[fault]
        Image.fromarray(np.full(shape, 151, np.uint8)).save(path)
    found = data.ADE20K(str(tmp_path), "train", plain)
    with pytest.warns(UserWarning, match=message):
        assert found[1] is None                           # one may be bad, however few there are
    assert len(found) == 3 and found.bad.sum() == 1 and found[0] is not None
    with pytest.warns(UserWarning), pytest.raises(data.BadDataError, match="ADE_1"):
        found.mark_bad(0, ValueError("another"))


@pytest.mark.parametrize(
    "table, expected",
    [
        ("Idx\tName\n2\tsky\n1\twall, brick\n\n", ["wall", "sky"]),
        ("\ufeff1\twall\n2\tsky\n", ["wall", "sky"]),
        ("Idx\tName\n", None),
        ("1\twall\n3\tsky\n", None),
        ("1\twall\n1\tsky\n2\ttree\n", None),
    ],
)
def test_table_of_ade20ks_classes(tmp_path, table, expected):
    (tmp_path / "table.txt").write_text(table, encoding="utf-8")
    if expected:
        assert data.dense.names_of_classes(tmp_path / "table.txt") == expected
    else:
        with pytest.raises(
            ValueError, match="table.txt: the first column should number the classes"
        ):
            data.dense.names_of_classes(tmp_path / "table.txt")


@pytest.mark.parametrize("depth", [2, 4])
def test_maps_of_few_levels_hold_numbers_too(tmp_path, depth):
    """Pillow cannot write such files, and scales their numbers when it reads them."""
    rows = np.random.default_rng(0).integers(0, 4, (24, 32))
    packed = (
        (rows.reshape(24, -1, 8 // depth) << np.arange(8 - depth, -1, -depth))
        .sum(2)
        .astype(np.uint8)
    )

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    path = make_ade(tmp_path)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 24, depth, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed)))
        + chunk(b"IEND", b"")
    )
    assert (data.ADE20K(str(tmp_path), "train", plain)[1][1].numpy() == (rows - 1) % 256).all()


def test_files_of_one_name_are_not_mixed_up(tmp_path):
    make_ade(tmp_path, 1)
    for kind, suffix in (("images", "jpg"), ("annotations", "png")):
        folder = tmp_path / kind / "training"
        (folder / "b").mkdir()
        (folder / f"ADE_0.{suffix}").rename(folder / "b" / f"ADE_0.{suffix}")
    jpeg(tmp_path / "images" / "training" / "a" / "ADE_0.jpg")
    found = data.ADE20K(str(tmp_path), "train", plain)
    assert len(found) == 2 and found[1] is not None
    with pytest.warns(UserWarning, match="a/ADE_0.png"):
        assert found[0] is None
    Image.new("RGB", (32, 24)).save(tmp_path / "images" / "training" / "a" / "ADE_0.png")
    with pytest.raises(ValueError, match="ADE_0.png: which of them"):
        data.ADE20K(str(tmp_path), "train", plain)


def write_map(path, labels, kind="PNG"):
    Image.fromarray(labels).save(path, kind)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_255_is_nobodys_label(tmp_path, kind):
    path = make_ade(tmp_path)
    labels = np.full((24, 32), 3, kind)
    labels[0] = 255
    write_map(path, labels)
    found = data.ADE20K(str(tmp_path), "train", plain)[1][1]
    assert found[0].unique().tolist() == [255] and found[1:].unique().tolist() == [2]
    names = "".join(f"{i}\tthing{i}\n" for i in range(1, 256))
    (tmp_path / "objectInfo150.txt").write_text(names)      # but the last of so many classes
    assert data.ADE20K(str(tmp_path), "train", plain)[1][1][0].unique().tolist() == [254]


@pytest.mark.parametrize("value, message", [
    (0, "no pixel is labelled in the maps of the 3 images"),
    (255, "no pixel is labelled"),
    (151, "none of the 3 images looked at can be used .* holds label 151"),
])
def test_maps_that_are_all_wrong_stop_at_the_start(tmp_path, value, message):
    make_ade(tmp_path)
    for path in (tmp_path / "annotations" / "training").iterdir():
        write_map(path, np.full((24, 32), value, np.uint8))
    with pytest.raises(ValueError, match=message):
        data.ADE20K(str(tmp_path), "train", plain)
    data.ADE20K(str(tmp_path), "val", plain)


def test_maps_as_jpeg_are_refused(tmp_path):
    path = make_ade(tmp_path)
    write_map(path, np.full((24, 32), 3, np.uint8), "JPEG")     # whatever it is called
    with pytest.warns(UserWarning, match="is a JPEG image, and maps of labels have to be PNG"):
        assert data.ADE20K(str(tmp_path), "train", plain)[1] is None
    for other in list(path.parent.iterdir()):
        other.rename(other.with_suffix(".jpg"))
    with pytest.raises(ValueError, match=r"training: no images \(.png\) .*\(but 3 .jpg\)"):
        data.ADE20K(str(tmp_path), "train", plain)


def test_palette_maps_hold_numbers(tmp_path):
    path = make_ade(tmp_path)
    labels = np.zeros((24, 32), np.uint8)
    labels[5:] = 7
    image = Image.fromarray(labels, "P")
    image.putpalette([255, 0, 0] * 256)
    image.save(path)
    assert data.ADE20K(str(tmp_path), "train", plain)[1][1][:, 0].tolist() == [255] * 5 + [6] * 19


def note_orientation(path, orientation):
    """The note of a camera that was held another way."""
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x0112] = orientation
        image.save(path, exif=exif, quality=95)


@pytest.mark.parametrize("orientation, corner", [(6, (slice(8), slice(-8, None))),
                                                 (8, (slice(-8, None), slice(8)))])
def test_labels_of_photographs_that_the_camera_turned(tmp_path, orientation, corner):
    """A size that only the turned image has says that the labels are of it."""
    make_ade(tmp_path / "ade", 1)
    write_map(tmp_path / "ade/annotations/training/ADE_0.png", np.full((32, 24), 1, np.uint8))
    root = make_coco(tmp_path, [triangle(1), triangle(2, 2)])
    change_coco(tmp_path, "train", lambda content: content["images"][0].update(height=32, width=24))
    file = tmp_path / "train2017" / f"{1:012}.jpg"
    for path in (file, tmp_path / "ade/images/training/ADE_0.jpg"):
        pixels = np.zeros((24, 32, 3), np.uint8)
        pixels[:8, :8] = 255                                # as stored: the corner at the top left
        Image.fromarray(pixels).save(path)
        note_orientation(path, orientation)
    for found in (data.Coco(root, "train", plain),
                  data.ADE20K(str(tmp_path / "ade"), "train", plain)):
        pixels = found[0][0]
        assert pixels.shape == (3, 32, 24) and pixels[0][corner].float().mean() > 200


@pytest.mark.parametrize("size, orientation, named", [
    ((24, 24), 6, True), ((24, 32), 3, True), ((24, 32), 6, False), ((24, 24), 1, False)])
def test_photographs_whose_labels_may_be_turned_are_named(tmp_path, size, orientation, named):
    make_coco(tmp_path, [triangle(1), triangle(2, 2)])
    height, width = size
    jpeg(tmp_path / "train2017" / f"{1:012}.jpg", height, width)
    note_orientation(tmp_path / "train2017" / f"{1:012}.jpg", orientation)
    change_coco(tmp_path, "train", lambda content: content["images"][0].update(width=width))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = data.Coco(str(tmp_path), "train", plain)
    assert found[0] is not None
    named_now = [text for text in map(str, (w.message for w in said)) if "EXIF orientation" in text]
    assert len(named_now) == named and all("000001.jpg" in text for text in named_now)


def test_folders_of_ade20k_that_are_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="annotations/{training"):
        data.ADE20K(str(tmp_path), "train", plain)
    (tmp_path / "images" / "training").mkdir(parents=True)
    (tmp_path / "annotations" / "training").mkdir(parents=True)
    with pytest.raises(ValueError, match="no images"):
        data.ADE20K(str(tmp_path), "train", plain)


# ---- COCO ----------------------------------------------------------------------------------------


def triangle(number, image=1, category=7, **more):
    return (
        dict(
            id=number,
            image_id=image,
            category_id=category,
            iscrowd=0,
            bbox=[2, 2, 10, 10],
            area=50.0,
            segmentation=[[2, 2, 12, 2, 2, 12]],
        )
        | more
    )


def make_coco(root, objects, images=2):
    for split in ("train", "val"):
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        for i in range(1, images + 1):
            jpeg(root / f"{split}2017" / f"{i:012}.jpg")
        (root / "annotations" / f"instances_{split}2017.json").write_text(
            json.dumps(
                dict(
                    images=[
                        dict(id=i, file_name=f"{i:012}.jpg", height=24, width=32)
                        for i in range(1, images + 1)
                    ],
                    categories=[dict(id=9, name="dog"), dict(id=7, name="cat")],
                    annotations=objects,
                )
            )
        )
    return str(root)


def square_mask(top, left, bottom, right):
    mask = np.zeros((24, 32), np.uint8, order="F")
    mask[top:bottom, left:right] = 1
    return mask


def test_coco_polygons_and_both_run_lengths(tmp_path):
    mask = square_mask(5, 6, 9, 16)
    packed = rle.encode(mask)
    packed["counts"] = packed["counts"].decode()
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, len(flat)]).tolist()
    objects = [triangle(1), triangle(2, category=9, segmentation=packed), triangle(
        3, segmentation=dict(size=[24, 32], counts=counts)), triangle(4, 2)]
    found = data.Coco(make_coco(tmp_path, objects), "train", plain)
    pixels, target = found[0]
    assert found.classes == ["cat", "dog"] and len(found) == 2  # in the order of their ids
    assert target["labels"].tolist() == [0, 1, 0] and target["id"] == 1
    assert (target["masks"][1].numpy() == mask).all() and (target["masks"][2].numpy() == mask).all()
    assert 40 <= target["masks"][0].sum() <= 60
    assert target["masks"][0, 3, 3]
    assert not target["masks"][0, 11, 11]


def test_what_is_left_out_of_coco_is_counted(tmp_path):
    objects = [
        triangle(1),
        triangle(2, iscrowd=1, segmentation=dict(size=[24, 32], counts=[700, 68])),
        triangle(3, segmentation=[[2, 2, 9, 9]]),
        triangle(4, bbox=[2, 2, 0.5, 9]),
        triangle(5, bbox=[3, 3, 1, 1], segmentation=[[3, 3, 4, 3, 4, 4, 3, 4]]),
    ]
    root = make_coco(tmp_path, objects)
    with pytest.warns(
        UserWarning,
        match="1 objects in a crowd, 1 objects smaller than a pixel, 1 objects without a "
        "polygon of three points, 1 of 2 images without objects",
    ):
        found = data.Coco(root, "train", data.DetectionTransform(32, False))
    image, target, info = found[0]
    assert len(found) == 1 and info == dict(id=1, size=(24, 32), original=(24, 32))
    assert target["boxes"][1].tolist() == [3, 3, 4, 4] and target["labels"].tolist() == [0, 0]
    with pytest.warns(UserWarning, match="left out 1 objects without a polygon of three points$"):
        val = data.Coco(root, "val", data.DetectionTransform(32, False))
    assert len(val) == 2 and len(val[1][1]["boxes"]) == 0 and val.category_ids == [7, 9]
    assert len(val.coco.anns) == 4 and val[1][1]["masks"].shape == (0, 32, 32)


NAN, INFINITE = float("nan"), float("inf")
SOUND = rle.encode(square_mask(2, 2, 9, 9))["counts"].decode()


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(segmentation=[[2, 2, 12, 2, 12]]), "polygon"),
        (dict(segmentation=[]), "polygon"),
        (dict(segmentation=None), "polygon"),
        (dict(segmentation=[2, 2, 12, 2, 12, 12]), "polygon"),
        (dict(segmentation=[[2, 2, 12, 2, 12, 12, 3]]), "polygon"),
        (dict(segmentation=[[NAN, 2, 12, 2, 12, 12]]), "polygon"),
        (dict(segmentation=[[1e9, 2, 12, 2, INFINITE, 12]]), "polygon"),
        (dict(segmentation="none"), "polygon"),
        (dict(segmentation=dict(size=[10, 32], counts=[320])), "mask"),
        (dict(segmentation=dict(size=[24, 32], counts=[700, 30])), "mask"),
        (dict(segmentation=dict(size=[24, 32], counts=[800, -32])), "mask"),
        (dict(segmentation=dict(size=[24, 32], counts="~~~~~~")), "mask"),
        (dict(segmentation=dict(size=[24, 32], counts=SOUND + "P")), "mask"),
        (dict(segmentation=dict(counts=7)), "mask"),
        (dict(bbox=[1, 2]), "box"),
        (dict(bbox=7), "box"),
        (dict(bbox=[2, 2, NAN, 9]), "box"),
        (dict(bbox=[2, 2, -3, 9]), "box"),
    ],
)
def test_objects_that_cannot_be_drawn_never_reach_pycocotools(tmp_path, change, reason):
    """Which would end the process, or draw what lies in the memory. The others are measured."""
    root = make_coco(tmp_path, [triangle(0), triangle(1) | change])
    for split in ("train", "val"):
        with pytest.warns(UserWarning, match=f"left out 1 objects .*{reason}"):
            found = data.Coco(root, split, plain)
        assert found[0][1]["labels"].tolist() == [0]
    (result,) = results_of(found)
    assert dense_results.average_precision(found.coco, [result], [1, 2])[
        "mask_ap"
    ] == pytest.approx(100)


def results_of(val):
    """The objects of the ground truth, as found without doubt."""
    return [dict(image_id=x["image_id"], category_id=x["category_id"], bbox=x["bbox"], score=1.0,
                 segmentation=val.coco.annToRLE(x)) for x in val.coco.anns.values()]


def test_annotations_need_no_ids_areas_or_crowds(tmp_path):
    """Nor may their ids be repeated or zero: to pycocotools zero means "no object"."""
    objects = [triangle(0), triangle(0, 2, 9), triangle(5, 2, bbox=[2, 2, 10, 10])]
    for key in ("id", "area", "iscrowd"):
        del objects[2][key]
    val = data.Coco(make_coco(tmp_path, objects), "val", plain)
    metrics = dense_results.average_precision(val.coco, results_of(val), [1, 2])
    assert metrics["box_ap"] == metrics["mask_ap"] == pytest.approx(100)


def change_coco(root, split, change):
    """Lets `change` work on the content of an annotation file."""
    path = root / "annotations" / f"instances_{split}2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def perfect(val):
    """The measure of what the file itself says."""
    return dense_results.average_precision(val.coco, results_of(val), sorted(val.coco.imgs))


def coco_of(tmp_path, change, split="val"):
    make_coco(tmp_path, [triangle(1), triangle(2, 2, 9)])
    change_coco(tmp_path, split, change)
    return data.Coco(str(tmp_path), split, plain)


@pytest.mark.parametrize("area", ["50", "50.0", " 50 ", "", "much", None, -3, 0, NAN, INFINITE,
                                  "nan", True, [50]])
def test_areas_are_numbers_or_the_masks(tmp_path, area):
    val = coco_of(tmp_path, lambda content: content["annotations"][0].update(area=area))
    assert 40 <= val.coco.anns[1]["area"] <= 60
    assert perfect(val)["box_ap"] == perfect(val)["mask_ap"] == pytest.approx(100)


@pytest.mark.parametrize("flag, crowd", [
    (0, 0), (1, 1), ("0", 0), ("1", 1), (True, 1), (False, 0), (None, 0), ("true", 1), ("False", 0),
    (1.0, 1), ("", 0)])
def test_crowds_by_number_text_or_truth(tmp_path, flag, crowd):
    val = coco_of(tmp_path, lambda content: content["annotations"][0].update(iscrowd=flag))
    assert val.coco.anns[1]["iscrowd"] == crowd and len(val[0][1]["labels"]) == 1 - crowd


@pytest.mark.parametrize("flag", ["maybe", 2, [1], NAN, "2"])
def test_crowds_that_are_neither(tmp_path, flag):
    with pytest.raises(ValueError, match="iscrowd is .* should be 0 or 1"):
        coco_of(tmp_path, lambda content: content["annotations"][0].update(iscrowd=flag))


@pytest.mark.parametrize("height, width", [("24", "32"), (24.0, "32.0"), (None, None), ("", 32),
                                           (0, 0), (24.5, 32), (-24, 32), (1e12, 32), ({}, [])])
def test_sizes_as_text_or_of_the_file(tmp_path, height, width):
    val = coco_of(tmp_path,
                  lambda content: content["images"][0].update(height=height, width=width))
    assert val[0] is not None and perfect(val)["mask_ap"] == pytest.approx(100)
    assert (val.coco.imgs[1]["height"], val.coco.imgs[1]["width"]) == (24, 32)


def test_sizes_that_are_missing_are_the_files(tmp_path):
    def forget(content):
        del content["images"][0]["height"], content["images"][1]["width"]
        content["annotations"].append(triangle(3))

    with pytest.warns(UserWarning, match="2 images without height and width"):
        assert coco_of(tmp_path, forget)[1] is not None
    (tmp_path / "val2017" / f"{1:012}.jpg").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="2 objects of images without a size"):
        val = data.Coco(str(tmp_path), "val", plain)
    with pytest.warns(UserWarning, match="cannot identify"):
        assert val[0] is None


def as_text(content):
    """Every number as text, as a table has them."""
    if isinstance(content, dict):
        return {name: as_text(value) for name, value in content.items()}
    if isinstance(content, list):
        return [as_text(value) for value in content]
    return str(content)


def test_everything_as_text(tmp_path):
    counts = [24 * 6 + 5, 4, 24 * 26 - 9]
    objects = [triangle(1), triangle(2, 2, 9),
               triangle(3, 2, segmentation=dict(size=[24, 32], counts=counts), bbox=[6, 5, 1, 4])]
    make_coco(tmp_path, objects)
    for split in ("train", "val"):
        plainly = data.Coco(str(tmp_path), split, plain)
        change_coco(tmp_path, split, lambda content: content.update(as_text(content)))
        found = data.Coco(str(tmp_path), split, plain)
        assert found.classes == plainly.classes and found.category_ids == [7, 9]
        for (_, one), (_, other) in zip(found, plainly):
            assert one["labels"].equal(other["labels"]) and one["masks"].equal(other["masks"])
            assert one["id"] == other["id"]
    assert perfect(found) == perfect(plainly)


def test_masks_in_a_cell_of_a_table(tmp_path):
    def change(content):
        for item in content["annotations"]:
            item["segmentation"] = json.dumps(item["segmentation"])
            item["bbox"] = json.dumps(item["bbox"])
        content["annotations"][1]["segmentation"] = json.dumps(dict(size=[24, 32], counts=SOUND))

    val = coco_of(tmp_path, change)
    assert (val[1][1]["masks"][0].numpy() == square_mask(2, 2, 9, 9)).all()
    assert val.coco.anns[1]["bbox"] == [2, 2, 10, 10]


def test_ids_may_be_words_but_not_nothing(tmp_path):
    def change(content, name="first"):
        content["images"][0]["id"] = content["annotations"][0]["image_id"] = name
        content["images"][1]["id"] = content["annotations"][1]["image_id"] = "second"

    val = coco_of(tmp_path, change)
    assert [val[i][1]["id"] for i in range(2)] == ["first", "second"]
    assert perfect(val)["mask_ap"] == pytest.approx(100)
    for nothing in (None, "", True, 1.5, [], {}):
        with pytest.raises(ValueError, match="one of the images is .* no id"):
            coco_of(tmp_path, lambda content, nothing=nothing: change(content, nothing))


@pytest.mark.parametrize("name, expected", [(None, "7"), ("", "7"), (5, "5"), ("cat", "cat")])
def test_categories_without_names_have_numbers(tmp_path, name, expected):
    val = coco_of(tmp_path, lambda content: content["categories"][1].update(name=name))
    assert val.classes == [expected, "dog"]
    val = coco_of(tmp_path, lambda content: content["categories"][1].pop("name"))
    assert val.classes == ["7", "dog"]


def test_categories_without_ids(tmp_path):
    with pytest.raises(ValueError, match="the id of one of the categories is None"):
        coco_of(tmp_path, lambda content: content["categories"][1].pop("id"))


@pytest.mark.parametrize("box", [None, []])
def test_boxes_that_are_missing_are_the_masks(tmp_path, box):
    for change in (lambda item: item.update(bbox=box), lambda item: item.pop("bbox")):
        val = coco_of(tmp_path, lambda content, change=change: change(content["annotations"][0]))
        assert val.coco.anns[1]["bbox"] == [2, 2, 10, 10] == val.coco.anns[2]["bbox"]
        assert perfect(val)["box_ap"] == pytest.approx(100)
    assert data.coco.box_around([[-5, 3, 40, 3, 40, 30]], 24, 32) == [0, 3, 32, 21]


@pytest.mark.parametrize("box, said", [
    ([8, 9, 18, 20], "1 of 2 objects is not around .* 1 would be, if they were two corners"),
    ([12, 9, 10, 11], "1 of 2 objects is not around"),
    ([7, 10.5, 11, 8.5], None),
])
def test_boxes_beside_their_masks_are_counted(tmp_path, box, said):
    for outline in ([[8, 9, 18, 9, 18, 20, 8, 20]], rle_of(square_mask(9, 8, 20, 18))):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            coco_of(tmp_path, lambda content, outline=outline: content["annotations"][0].update(
                bbox=box, segmentation=outline))
        texts = [str(w.message) for w in caught if w.category is UserWarning]
        if said is None:
            assert not texts
        else:
            assert len(texts) == 1 and re.search(said, texts[0])


def rle_of(mask):
    packed = rle.encode(mask)
    return packed | dict(counts=packed["counts"].decode())


@pytest.mark.parametrize("split", ["train", "val"])
def test_nothing_to_learn_from_says_every_reason(tmp_path, split):
    objects = [
        triangle(1, iscrowd=1),
        triangle(2, bbox=[0.1, 0.1, 0.5, 0.5], segmentation=[[0.1, 0.1, 0.6, 0.1, 0.6, 0.6]]),
        triangle(3, segmentation=[]),
        triangle(4, bbox=[1]),
    ]
    with pytest.raises(ValueError, match=(
            "no object that can be used: 1 objects in a crowd, 1 objects smaller than a pixel, "
            "1 objects without a polygon of three points, 1 objects without a proper box")):
        data.Coco(make_coco(tmp_path, objects), split, plain)


def test_images_that_lie_elsewhere(tmp_path):
    with pytest.raises(FileNotFoundError, match="a/000000000001.jpg: not found, nor any other"):
        coco_of(tmp_path, lambda content: [image.update(file_name=f"a/{image['file_name']}")
                                           for image in content["images"]])


@pytest.mark.parametrize("kind", ["images", "categories"])
def test_ids_that_come_twice(tmp_path, kind):
    root = make_coco(tmp_path, [triangle(1)])
    path = tmp_path / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content[kind].append(content[kind][0])
    path.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=f"the id {content[kind][0]['id']} belongs to more than one of the {kind}"
    ):
        data.Coco(root, "train", plain)


def test_packed_runs():
    rng = np.random.default_rng(0)
    for density in (0.0, 0.001, 0.02, 0.5, 1.0):
        mask = np.asfortranarray(rng.random((400, 300)) < density).astype(np.uint8)
        packed = rle.encode(mask)
        flat = mask.flatten(order="F")
        expected = np.diff([0, *np.flatnonzero(np.diff(flat, prepend=0)), len(flat)]).tolist()
        assert data.coco.run_lengths(packed["counts"].decode()) == expected


def test_labels_are_of_the_pixels_as_stored(tmp_path):
    root = make_coco(tmp_path / "coco", [triangle(1, segmentation=[[0, 0, 8, 0, 8, 8, 0, 8]])])
    make_ade(tmp_path / "ade")
    coco, ade = (
        tmp_path / "coco" / "train2017" / f"{1:012}.jpg",
        tmp_path / "ade/images/training/ADE_0.jpg",
    )
    for path in (coco, ade):
        pixels = np.zeros((24, 32, 3), np.uint8)
        pixels[:8, :8] = 255
        Image.fromarray(pixels).save(path)
        note_orientation(path, 3)
    for found in (
        data.Coco(root, "train", plain),
        data.ADE20K(str(tmp_path / "ade"), "train", plain),
    ):
        assert found[0][0][:, :6, :6].float().mean() > 200
    # Upright, for those who look at it.
    assert np.asarray(data.load_rgb(coco))[-6:, -6:].mean() > 200


@pytest.mark.parametrize(
    "objects, message",
    [
        ([triangle(1, category=8)], "category 8 in image 1"),
        ([triangle(1, image=5)], "image 5"),
        ([dict(id=1)], "KeyError"),
        ([triangle(1, bbox=[1, 2])], "no object that can be used: 1 objects without a proper"),
        ([], "no object that can be used"),
        ([3], "TypeError"),
    ],
)
def test_annotations_that_make_no_sense(tmp_path, objects, message):
    with pytest.raises(ValueError, match=message):
        data.Coco(make_coco(tmp_path, objects), "train", plain)


def test_bad_files_of_coco(tmp_path, monkeypatch):
    root = make_coco(tmp_path, [triangle(i, i) for i in range(1, 5)], 4)
    (tmp_path / "train2017" / f"{1:012}.jpg").unlink()
    jpeg(tmp_path / "train2017" / f"{2:012}.jpg", 20)
    file = tmp_path / "train2017" / f"{3:012}.jpg"
    file.write_bytes(file.read_bytes()[:300])
    monkeypatch.setattr(data.loading, "MAX_BAD", 1)
    found = data.Coco(root, "train", plain)
    for i, message in enumerate(
        ("No such file", "has 20 x 32 pixels, its annotation says 24 x 32", "(?i)truncated")
    ):
        with pytest.warns(UserWarning, match=message):
            assert found[i] is None
    assert found.bad.sum() == 3 and found[3] is not None
    with pytest.raises(FileNotFoundError, match="instances_"):
        data.Coco(str(tmp_path / "x"), "train", plain)
    (tmp_path / "annotations" / "instances_val2017.json").write_text("{")
    with pytest.raises(ValueError, match="JSONDecodeError"):
        data.Coco(root, "val", plain)


# ---- augmentation --------------------------------------------------------------------------------


def marked(H=40, W=60):
    """An image whose pixels tell their label: red is 1 + label."""
    labels = torch.zeros(H, W, dtype=torch.uint8)
    labels[:, W // 2:], labels[:H // 4] = 1, 2
    return torch.stack([10 * labels + 10, labels * 0, labels * 0]), labels


def undo(image):
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    return 255 * (image * std + mean)


def test_segmentation_pixels_and_labels_move_together():
    transform, sizes = data.SegmentationTransform(32, True, distort=False), set()
    for seed in range(20):
        torch.manual_seed(seed)
        image, labels = transform(*marked())
        assert image.shape == (3, 32, 32)
        assert labels.shape == (32, 32)
        assert labels.dtype == torch.int64
        known = labels != 255
        sizes.add(int(known.sum()))
        agree = (undo(image)[0][known] - 10 * labels[known] - 10).abs() < 1
        assert agree.float().mean() > 0.8                                   # but at edges
        assert (image[:, ~known] == 0).all()
    assert 1024 in sizes and min(sizes) < 700  # some are smaller than the crop: padded


def test_photometric_distortion():
    """Each change has probability 1/2, and brightness adds: dark pixels get light."""
    gray = torch.full((3, 2, 2), 10, dtype=torch.uint8)
    colour = torch.tensor([200, 100, 50], dtype=torch.uint8)[:, None, None].expand(3, 2, 2)
    torch.manual_seed(0)
    found = torch.stack([data.dense.distorted(gray)[:, 0, 0] for _ in range(1000)])  # (1000 3)
    # Gray has no saturation and no hue.
    assert found.dtype == torch.uint8 and (found == found[:, :1]).all()
    assert found.min() == 0 and 58 <= found.max() <= 63 and 0.2 < (found == 10).float().mean() < 0.3
    hue = [
        colorsys.rgb_to_hsv(*data.dense.distorted(colour)[:, 0, 0].tolist()) for _ in range(1000)
    ]
    hue, before = torch.tensor([h for h, s, v in hue]), colorsys.rgb_to_hsv(200, 100, 50)[0]
    moved = (hue - before + 0.5) % 1 - 0.5
    assert 0.09 < moved.max() < 0.12 and -0.12 < moved.min() < -0.09        # rounding adds a bit
    assert 0.4 < (moved.abs() < 0.02).float().mean() < 0.7


def test_masks_stay_on_their_pixels():
    """Centers differ by nothing on average; with the usual nearest neighbour by half a pixel."""
    pixels, masks = (
        torch.zeros(3, 90, 90, dtype=torch.uint8),
        torch.zeros(1, 90, 90, dtype=torch.uint8),
    )
    pixels[:, 20:60, 30:70], masks[:, 20:60, 30:70] = 200, 1
    differences = []
    for ratio in torch.linspace(0.4, 1.9, 30).tolist():
        axis = torch.arange(float(round(90 * ratio)))
        image, mask = (
            data.dense.resized_crop(x, (0, 0, 90, 90), [len(axis)] * 2, nearest).float()[0]
            for x, nearest in ((pixels, False), (masks, True))
        )
        differences += [(x * axis).sum() / x.sum() - (y * axis).sum() / y.sum()
                        for x, y in zip((image.sum(0), image.sum(1)), (mask.sum(0), mask.sum(1)))]
    assert torch.stack(differences).mean().abs() < 0.05


def test_crops_are_filled():
    """Where the image is large enough: no strip of padding from rounding."""
    for ratio in torch.linspace(1, 2, 50).tolist():
        (_, _, height, width), new = data.dense.random_window((48, 64), ratio, 32)
        assert new == [32, 32] and height * ratio > 32 - 1e-3 and width * ratio < 32 + ratio
    assert data.dense.random_window((3, 3), 0.1, 32)[1] == [2, 2]  # torch cannot resize to 1 x 1


def test_crops_of_one_class_are_drawn_again():
    labels = torch.zeros(40, 200, dtype=torch.uint8)
    labels[:, 30:60] = 1
    transform, mixed = data.SegmentationTransform(20, True, (1.0, 1.0)), 0
    for seed in range(30):
        torch.manual_seed(seed)
        counts = (
            transform(torch.zeros(3, 40, 200, dtype=torch.uint8), labels)[1].flatten().bincount()
        )
        mixed += len(counts) > 1 and counts.max() < 0.77 * 400
    assert mixed > 15                           # of crops drawn once a fifth would be


def test_evaluation_keeps_labels_and_fits_both_sides():
    pixels, labels = marked()
    image, kept = data.SegmentationTransform(80, False)(pixels, labels)
    assert image.shape == (3, 80, 120) and kept.equal(labels.long())
    image, _ = data.SegmentationTransform(80, False)(*marked(10, 100))
    assert image.shape == (3, 32, 320)          # 4 x 80 is the most for the long side


@pytest.mark.parametrize("train", [False, True])
def test_boxes_are_drawn_around_masks(train):
    torch.manual_seed(0)
    pixels, masks = (
        torch.full((3, 24, 48), 255, dtype=torch.uint8),
        torch.zeros(2, 24, 48, dtype=torch.uint8),
    )
    masks[0, 4:12, 6:22], masks[1, 20:, 40:] = 1, 1
    given = dict(labels=torch.tensor([3, 4]), masks=masks, id=5)
    image, target, info = data.DetectionTransform(96, train)(pixels, given)
    h, w = info["size"]
    assert image.shape == (3, 96, 96)
    assert info["original"] == (24, 48)
    assert target["masks"].shape[1:] == (96, 96)
    assert (undo(image)[:, :h, :w] - 255).abs().max() < 1e-3
    assert (undo(image)[:, h:] - 114).abs().max() < 1e-3
    for box, mask in zip(target["boxes"].long().tolist(), target["masks"]):
        y, x = mask.nonzero(as_tuple=True)
        assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]
    if not train:
        assert (h, w) == (48, 96) and target["labels"].tolist() == [3, 4]
        assert target["boxes"].tolist() == [[12, 8, 44, 24], [80, 40, 96, 48]]


def test_jitter_reaches_both_ends_and_drops_what_is_no_longer_seen():
    pixels, masks = (
        torch.zeros(3, 64, 64, dtype=torch.uint8),
        torch.zeros(1, 64, 64, dtype=torch.uint8),
    )
    masks[0, :4, :4] = 1
    sizes, counts = [], []
    for seed in range(60):
        torch.manual_seed(seed)
        _, target, info = data.DetectionTransform(64, True)(
            pixels, dict(labels=torch.tensor([0]), masks=masks, id=0)
        )
        sizes.append(info["size"][0])
        counts.append(len(target["boxes"]))
    assert min(sizes) < 20 and max(sizes) == 64 and set(counts) == {0, 1}


# ---- drawn scenes --------------------------------------------------------------------------------


def test_scenes_are_a_function_of_split_and_index():
    first, again, val = (
        data.Scenes(split, plain, 48, False) for split in ("train", "train", "val")
    )
    assert all(a.equal(b) for i in (0, 5) for a, b in zip(first[i], again[i]))
    assert not first[0][0].equal(val[0][0]) and not first[0][0].equal(first[1][0])
    labels = torch.stack([first[i][1] for i in range(40)])
    share = labels.flatten().bincount() / labels.numel()
    assert len(share) == 6 == len(first.classes) and share.min() > 0.02 and share.max() < 0.6


def test_scenes_as_objects_are_those_of_the_map_of_labels():
    whole, parts = data.Scenes("val", plain, 48, False), data.Scenes("val", plain, 48, True)
    for i in range(10):
        (pixels, labels), (same, target) = whole[i], parts[i]
        assert pixels.equal(same) and (target["masks"].sum(0) <= 1).all()   # only the visible part
        for mask, label in zip(target["masks"].bool(), target["labels"]):
            assert (labels[mask] == len(data.Scenes.grounds) + label).all() and mask.sum() >= 9
    assert len(parts.coco.imgs) == len(parts) and len(parts.coco.cats) == 4


def test_batches_of_detection_keep_their_lists():
    dataset = data.Scenes("train", data.DetectionTransform(48, True), 48, True)
    loader = data.make_loader(dataset, 4, train=True, merge=data.merge_detections)
    images, targets, infos = next(iter(loader))
    assert images.shape == (4, 3, 48, 48) and len(targets) == len(infos) == 4
    assert all(len(t["boxes"]) == len(t["labels"]) == len(t["masks"]) for t in targets)
