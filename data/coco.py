"""
COCO's layout: one file of annotations, from many tools, beside a folder of images.

Labelling tools and spreadsheets leave out what can be computed and write numbers as text. Where
only one thing can be meant, it is read; an object that cannot be drawn is left out, and counted.
"""

import collections
import contextlib
import json
import math
import os
import warnings
from collections.abc import Callable

import numpy as np
import torch

from .dense import DenseFiles, require, to_pixels
from .images import Image, load_rgb
from .loading import extra
from .survey import report_turned, spread

FAR = 1e5       # pixels: no image is so large
NEAR = 2, 0.1  # a box is around its mask up to so many pixels, or such a share of its side


class Coco(DenseFiles):
    """ROOT/{train,val}2017/*.jpg with ROOT/annotations/instances_{train,val}2017.json.

    As DenseFiles, of what load_objects gives. .classes: the categories' names in the order of their
    ids, .category_ids: those ids. val: .coco has crowds too. train leaves out crowds, objects
    smaller than a pixel, images without any object. Objects that cannot be drawn are left out of
    both. A warning counts them all.
    Numbers may be text. Sizes of images that are missing are their files'; boxes that are missing
    and areas that are missing or impossible are the masks'; categories without names have numbers.
    A warning counts boxes that are not around their masks.
    FileNotFoundError: the folder or the annotations are missing. ValueError: no annotations of this
    layout, an object of an unknown category or image, an id that comes twice, no objects at all, no
    image is there.
    """

    def __init__(self, root: str, split: str, transform: Callable):
        folder = os.path.join(root, f"{split}2017")
        path = os.path.join(root, "annotations", f"instances_{split}2017.json")
        require(folder, path, hint=f"not found. Expected {root}/{{train,val}}2017/*.jpg and "
                                   f"{root}/annotations/instances_{{train,val}}2017.json")
        try:
            with open(path, encoding="utf-8-sig") as file:
                content = json.load(file)
            categories = categories_of(content)
            known, unsized = images_of(content, folder)
            images, truth, notes = sort_objects(content, known, list(categories), split == "train")
            self.category_ids = list(categories)
            if split == "val":
                self.coco = as_coco(content | dict(annotations=truth, images=list(known.values()),
                                                   categories=list(categories.values())))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: no annotations of COCO's layout "
                             f"({type(error).__name__}: {error})") from error
        for note in notes:
            warnings.warn(f"{path}: {note}")
        classes = [category["name"] for category in categories.values()]
        samples = [(os.path.join(folder, image["file"]), json.dumps(image).encode())
                   for image in images]
        looked_at = spread([file for file, _ in samples])
        if not any(map(os.path.exists, looked_at)):
            raise FileNotFoundError(f"{looked_at[0]}: not found, nor any other of the "
                                    f"{len(looked_at)} images looked at that {path} names")
        if unsized:
            unsized = [os.path.join(folder, name) for name in unsized]
            warnings.warn(f"{path}: {len(unsized):,} images without height and width, which are "
                          "taken from the files")
            report_turned(folder, unsized, sized=False)
        else:
            report_turned(folder, [file for file, _ in samples])
        super().__init__(samples, classes, load_objects, transform, folder)


# ---- What tools write ----------------------------------------------------------------------------

def number_of(value) -> float | int | None:
    """A finite number, or one that is written as text; else None. Whole ones are int."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() else number


def numbers_of(values) -> list | None:
    """A list of numbers, or None; text becomes numbers."""
    if not isinstance(values, list):
        return None
    if set(map(type, values)) <= {int, float}:  # nearly always: COCO has 40 million coordinates
        return values
    values = [number_of(value) for value in values]
    return None if None in values else values


def id_of(value, what: str) -> int | str:
    """An id, a whole number if it is the text of one. ValueError: it is neither."""
    number = number_of(value)
    if isinstance(number, int):
        return number
    if isinstance(value, str) and value:
        return value
    raise ValueError(f"{what} is {value!r}, which is no id")


def is_crowd(value) -> int:
    """iscrowd of an object, 0 or 1. ValueError: it says neither."""
    if isinstance(value, str):
        value = {"true": 1, "false": 0, "": 0}.get(value.strip().lower(), value)
    number = number_of(int(value) if isinstance(value, bool) else value or 0)
    if number not in (0, 1):
        raise ValueError(f"iscrowd is {value!r}, and should be 0 or 1")
    return number


def by_id(items: list[dict], kind: str) -> dict:
    """{id: item with that id}, in the order of the items. ValueError: an id comes twice."""
    known = {}
    for item in items:
        number = id_of(item.get("id"), f"the id of one of the {kind}")
        if number in known:
            raise ValueError(f"the id {number} belongs to more than one of the {kind}")
        known[number] = item | dict(id=number)
    return known


def categories_of(content: dict) -> dict:
    """{id: category with a name}, in the order of the ids."""
    known = dict(sorted(by_id(content["categories"], "categories").items()))
    for number, category in known.items():
        name = category.get("name")
        known[number] = category | dict(name=str(number if name in (None, "") else name))
    return known


def images_of(content: dict, folder: str) -> tuple[dict, list[str]]:
    """{id: image with a size}, and the names of those that had none: it is their files'.

    A size of 0 x 0: the file cannot be opened. It is a bad file.
    """
    known = by_id(content["images"], "images")
    unsized = []
    for number, image in known.items():
        name = image["file_name"]
        if not isinstance(name, str) or not name:
            raise ValueError(f"the file_name of image {number} is {name!r}, and no name")
        size = [number_of(image.get(side)) for side in ("height", "width")]
        if not all(isinstance(length, int) and 0 < length < FAR for length in size):
            unsized.append(name)
            size = [0, 0]
            with contextlib.suppress(Exception), Image.open(os.path.join(folder, name)) as opened:
                size = [opened.height, opened.width]
        known[number] = image | dict(height=size[0], width=size[1])
    return known, unsized


# ---- Objects -------------------------------------------------------------------------------------

def sort_objects(content: dict, known: dict, category_ids: list, train: bool
                 ) -> tuple[list, list, list[str]]:
    """The content of an annotation file -> images to learn from, objects to measure by.

    The images, [dict(id, file, size, labels, masks)], are without crowds and objects smaller than a
    pixel; the objects as in the file, none in training. Neither has what cannot be drawn. The third
    result says what was left out, and what is odd. ValueError: see Coco.
    """
    label_of = {number: label for label, number in enumerate(category_ids)}
    images = {}
    truth = []
    left_out = collections.Counter()
    passed_over = collections.Counter()         # of the objects to learn from
    boxes = collections.Counter()
    for number, image in known.items():
        size = [image["height"], image["width"]]
        images[number] = dict(id=number, file=image["file_name"], size=size, labels=[], masks=[])
    for item in content["annotations"]:
        category = id_of(item["category_id"], "the category of an object")
        number = id_of(item["image_id"], "the image of an object")
        if category not in label_of or number not in images:
            raise ValueError(f"an object is of category {category} in image {number}, and there is "
                             "no such category or image")
        image = images[number]
        crowd = is_crowd(item.get("iscrowd"))
        try:
            outline, box, partly = drawable(item, *image["size"])
        except ValueError as error:
            left_out[f"objects {error}"] += 1
            continue
        if partly:
            left_out["objects' polygons, but not all of them"] += 1
        if not train:                           # numbered anew: to pycocotools id 0 is no object
            area = number_of(item.get("area")) or 0
            if area <= 0:
                area = mask_area(outline, *image["size"])
            truth.append(item | dict(id=len(truth) + 1, image_id=number, category_id=category,
                                     iscrowd=crowd, bbox=box, segmentation=outline, area=area))
        if crowd:
            passed_over["objects in a crowd"] += 1
        elif min(box[2:]) < 1:
            passed_over["objects smaller than a pixel"] += 1
        else:
            boxes[how_box_lies(box, outline)] += 1
            image["labels"].append(label_of[category])
            image["masks"].append(outline)
    with_objects = [image for image in images.values() if image["labels"]]
    if not with_objects:
        listed = list_of(left_out + passed_over)
        raise ValueError(f"no object that can be used: {listed}".removesuffix(": "))
    if train:
        left_out += passed_over
        if len(with_objects) < len(images):
            unseen = len(images) - len(with_objects)
            left_out[f"of {len(images):,} images without objects"] = unseen
    notes = [f"left out {list_of(left_out)}"] if left_out else []
    notes += notes_of(boxes)
    return with_objects if train else list(images.values()), truth, notes


def list_of(counts: collections.Counter) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in sorted(counts.items()))


def as_coco(content: dict):
    """An annotation file's content -> pycocotools' COCO, which otherwise prints how it gets on."""
    coco = extra("pycocotools.coco").COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(None):
        coco.createIndex()
    return coco


def drawable(item: dict, height: int, width: int) -> tuple[list | dict, list, bool]:
    """An object's outline and box as numbers, and whether flawed polygons were taken out of it.

    ValueError: what makes it unusable. pycocotools does not look: from such objects it crashes the
    process or makes masks of what lies in the memory.
    """
    if not height:
        raise ValueError("of images without a size whose files cannot be opened")
    box = item.get("bbox")
    if box not in (None, []):
        box = numbers_of(box)
        if not box or len(box) != 4 or min(box[2:]) < 0 or not are_near(box):
            raise ValueError("without a proper box")
    given = item.get("segmentation")
    if isinstance(given, str):                  # a cell of a spreadsheet
        with contextlib.suppress(ValueError):
            given = json.loads(given)
    partly = False
    if isinstance(given, dict):
        outline = sound_runs(given, height, width)
    else:
        outline = sound_polygons(given)
        partly = len(outline) < len(given)
    if not box:
        box = box_around(outline, height, width)
    return outline, box, partly


def sound_polygons(polygons) -> list[list]:
    """Those of three points and more. ValueError: there are none."""
    if isinstance(polygons, list):
        polygons = [numbers_of(polygon) for polygon in polygons]
        polygons = [polygon for polygon in polygons if polygon and are_near(polygon)
                    and len(polygon) >= 6 and len(polygon) % 2 == 0]
    if not isinstance(polygons, list) or not polygons:
        raise ValueError("without a polygon of three points")
    return polygons


def are_near(coordinates: list) -> bool:
    low = min(coordinates)
    high = max(coordinates)
    return -FAR < low and high < FAR and math.isfinite(sum(coordinates))     # NaN hides in min, max


def sound_runs(outline: dict, height: int, width: int) -> dict:
    """A run-length encoding, packed or not, as numbers. ValueError: it is not of that size."""
    packed = outline.get("counts")
    if isinstance(packed, str):
        runs = run_lengths(packed)
    elif isinstance(packed, list):
        runs = packed = [number_of(run) for run in packed]
    else:
        runs = [None]
    if (numbers_of(outline.get("size")) != [height, width]
            or not all(isinstance(run, int) and run >= 0 for run in runs)
            or sum(runs) != height * width):
        raise ValueError("whose mask is not of their image's size")
    return dict(size=[height, width], counts=packed)


def run_lengths(text: str) -> list[int]:
    """COCO's packed runs; the last is -1 if it does not end.

    Five bits in each character, a sixth says that more follow; from the fourth run on the
    difference to the last but one.
    """
    runs = []
    value = shift = 0
    for character in text.encode():
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << shift - 4           # the sign
            if len(runs) > 2:
                value += runs[-2]
            runs.append(value)
            value = shift = 0
    if shift:
        runs.append(-1)
    return runs


# ---- Boxes ---------------------------------------------------------------------------------------

def how_box_lies(box: list, outline: list | dict) -> str:
    """Is it "around" the mask, or would its numbers be as corners ("corners"), or "beside" it?"""
    left, top, right, bottom = extent(outline)
    if fits([box[0], box[1], box[0] + box[2], box[1] + box[3]], left, top, right, bottom):
        return "around"
    if fits(box, left, top, right, bottom):
        return "corners"
    return "beside"


def extent(outline: list | dict) -> tuple:
    """Left, top, right, bottom of what is drawn."""
    if isinstance(outline, dict):
        left, top, width, height = extra("pycocotools.mask").toBbox(
            encoded(outline, *outline["size"])).tolist()
        return left, top, left + width, top + height
    left = min(min(polygon[0::2]) for polygon in outline)
    top = min(min(polygon[1::2]) for polygon in outline)
    right = max(max(polygon[0::2]) for polygon in outline)
    bottom = max(max(polygon[1::2]) for polygon in outline)
    return left, top, right, bottom


def box_around(outline: list | dict, height: int, width: int) -> list:
    """Left, top, width, height of what is drawn in the image."""
    left, top, right, bottom = extent(outline)
    left = max(0, left)
    top = max(0, top)
    return [left, top, max(0, min(right, width) - left), max(0, min(bottom, height) - top)]


def fits(corners: list, left: float, top: float, right: float, bottom: float) -> bool:
    pixels, share = NEAR
    wide = max(pixels, share * (right - left))
    high = max(pixels, share * (bottom - top))
    return (abs(corners[0] - left) <= wide and abs(corners[2] - right) <= wide
            and abs(corners[1] - top) <= high and abs(corners[3] - bottom) <= high)


def notes_of(boxes: collections.Counter) -> list[str]:
    """What to say of boxes that lie as how_box_lies has counted."""
    wrong = boxes["beside"] + boxes["corners"]
    if not wrong:
        return []
    note = (f"the box of {wrong:,} of {boxes.total():,} objects is not around their mask. Boxes "
            "are learnt from masks, and measured by what the file says")
    if boxes["corners"]:
        note += (f". {boxes['corners']:,} would be, if they were two corners, x, y, X, Y: COCO's "
                 "are x, y, width, height")
    return [note]


# ---- Masks ---------------------------------------------------------------------------------------

def load_objects(path: str, text: bytes) -> tuple[torch.Tensor, dict]:
    """An image, and its objects as Coco notes them -> pixels, objects as for DetectionTransform.

    An image that the camera turned is as the noted size is. ValueError: it is of another size.
    """
    known = json.loads(text)
    pixels = to_pixels(load_rgb(path, upright=False, size=known["size"]))
    height, width = pixels.shape[1:]
    if [height, width] != known["size"]:
        raise ValueError(f"the image has {height} x {width} pixels, its annotation says "
                         f"{' x '.join(map(str, known['size']))}")
    masks = np.zeros((len(known["masks"]), height, width), np.uint8)
    for mask, outline in zip(masks, known["masks"]):
        mask[:] = object_mask(outline, height, width)
    labels = torch.tensor(known["labels"], dtype=torch.long)
    return pixels, dict(labels=labels, id=known["id"], masks=torch.from_numpy(masks))


def object_mask(outline: list | dict, height: int, width: int) -> np.ndarray:
    """COCO's polygons, or a run-length encoding, packed or not -> mask (height width) uint8."""
    return extra("pycocotools.mask").decode(encoded(outline, height, width))


def mask_area(outline: list | dict, height: int, width: int) -> float:
    return float(extra("pycocotools.mask").area(encoded(outline, height, width)))


def encoded(outline: list | dict, height: int, width: int) -> dict:
    """COCO's polygons, or a run-length encoding, packed or not -> the packed one."""
    rle = extra("pycocotools.mask")
    if isinstance(outline, list):
        return rle.merge(rle.frPyObjects(outline, height, width))
    if isinstance(outline["counts"], list):
        return rle.frPyObjects(outline, height, width)
    return outline
