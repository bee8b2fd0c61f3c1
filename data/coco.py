"""
COCO's layout: one file of annotations, from many tools, beside a folder of images.

Labelling tools and spreadsheets leave out what can be computed and write numbers as text. Where
only one thing can be meant, it is read; an object that cannot be drawn is left out, and counted.
"""

import collections
import contextlib
import itertools
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
# Objects that are measured by, but not learnt from.
CROWD = "objects in a crowd"
SMALL = "objects smaller than a pixel"


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
        files = [os.path.join(folder, image["file"]) for image in images]
        samples = [(file, json.dumps(image).encode()) for file, image in zip(files, images)]
        classes = [category["name"] for category in categories.values()]
        looked_at = spread(files)
        if not any(map(os.path.exists, looked_at)):
            raise FileNotFoundError(f"{looked_at[0]}: not found, nor any other of the "
                                    f"{len(looked_at)} images looked at that {path} names")
        if unsized:
            warnings.warn(f"{path}: {len(unsized):,} images without height and width, which are "
                          "taken from the files")
        report_turned(folder, unsized or files, sized=not unsized)
        super().__init__(samples, classes, load_objects, transform, folder)


# ---- What tools write ----------------------------------------------------------------------------

def plain(value):
    """What a text says, "5" or "[[2, 2, 9, 2, 9, 9]]"; of 5.0 the 5; in lists, too. Else value."""
    if isinstance(value, str):
        for read in (json.loads, float):
            with contextlib.suppress(ValueError):
                return plain(read(value))
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list) and not are_numbers(value):
        return [plain(item) for item in value]
    return value


def are_numbers(values: list) -> bool:
    return set(map(type, values)) <= {int, float}   # quickly: COCO has 40 million coordinates


def id_of(value, what: str) -> int | str:
    """An id, a whole number if it is the text of one. ValueError: it is neither."""
    number = plain(value)
    if type(number) is int:
        return number
    if isinstance(value, str) and value:
        return value
    raise ValueError(f"{what} is {value!r}, which is no id")


def is_crowd(value) -> int:
    """iscrowd of an object, 0 or 1. ValueError: it says neither."""
    said = plain(str(value or 0).lower())               # "True" is no JSON, "true" is
    if said not in (0, 1):
        raise ValueError(f"iscrowd is {value!r}, and should be 0 or 1")
    return int(said)


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
        if name in (None, ""):
            name = number
        known[number] = category | dict(name=str(name))
    return known


def images_of(content: dict, folder: str) -> tuple[dict, list[str]]:
    """{id: image with a size}, and the files of those that had none: it is theirs.

    A size of 0 x 0: the file cannot be opened. It is a bad file.
    """
    known = by_id(content["images"], "images")
    unsized = []
    for number, image in known.items():
        name = image["file_name"]
        if not isinstance(name, str) or not name:
            raise ValueError(f"the file_name of image {number} is {name!r}, and no name")
        height, width = (plain(image.get(side)) for side in ("height", "width"))
        if not all(type(length) is int and 0 < length < FAR for length in (height, width)):
            unsized.append(os.path.join(folder, name))
            height = width = 0
            with contextlib.suppress(Exception), Image.open(unsized[-1]) as opened:
                width, height = opened.size
        known[number] = image | dict(height=height, width=width)
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
    for number, image in known.items():
        size = [image["height"], image["width"]]
        images[number] = dict(id=number, file=image["file_name"], size=size, labels=[], masks=[])
    truth = []
    reasons = collections.Counter()             # of leaving something out
    boxes = collections.Counter()
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
            reasons[f"objects {error}"] += 1
            continue
        if partly:
            reasons["objects' polygons, but not all of them"] += 1
        if not train:                           # numbered anew: to pycocotools id 0 is no object
            area = plain(item.get("area"))
            if type(area) not in (int, float) or not 0 < area < math.inf:
                area = float(extra("pycocotools.mask").area(encoded(outline, *image["size"])))
            truth.append(item | dict(id=len(truth) + 1, image_id=number, category_id=category,
                                     iscrowd=crowd, bbox=box, segmentation=outline, area=area))
        if crowd:
            reasons[CROWD] += 1
        elif min(box[2:]) < 1:
            reasons[SMALL] += 1
        else:
            boxes[how_box_lies(box, outline)] += 1
            image["labels"].append(label_of[category])
            image["masks"].append(outline)
    found = [image for image in images.values() if image["labels"]]
    if not found:
        raise ValueError(f"no object that can be used: {list_of(reasons)}".removesuffix(": "))
    if train and len(found) < len(images):
        reasons[f"of {len(images):,} images without objects"] = len(images) - len(found)
    if not train:                               # what is no object to learn from is measured by
        found = list(images.values())
        del reasons[CROWD], reasons[SMALL]
    notes = notes_of(boxes)
    if reasons:
        notes.append(f"left out {list_of(reasons)}")
    return found, truth, notes


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
    box = plain(item.get("bbox")) or []
    if box and not (are_near(box) and len(box) == 4 and min(box[2:]) >= 0):
        raise ValueError("without a proper box")
    given = plain(item.get("segmentation"))
    partly = False
    if isinstance(given, dict):
        outline = sound_runs(given, height, width)
    else:
        outline = sound_polygons(given)
        partly = len(outline) < len(given)
    return outline, box or box_around(outline, height, width), partly


def sound_polygons(polygons) -> list[list]:
    """Those of three points and more. ValueError: there are none."""
    sound = []
    if isinstance(polygons, list):
        sound = [polygon for polygon in polygons
                 if are_near(polygon) and len(polygon) >= 6 and len(polygon) % 2 == 0]
    if not sound:
        raise ValueError("without a polygon of three points")
    return sound


def are_near(coordinates) -> bool:
    """A list of numbers, none beyond any image. NaN hides in min and max, but not in the sum."""
    if not isinstance(coordinates, list) or not coordinates or not are_numbers(coordinates):
        return False
    near = -FAR < min(coordinates) and max(coordinates) < FAR
    return near and math.isfinite(sum(coordinates))


def sound_runs(outline: dict, height: int, width: int) -> dict:
    """A run-length encoding, packed or not, as numbers. ValueError: it is not of that size."""
    packed = outline.get("counts")
    runs = []
    if isinstance(packed, str):
        runs = run_lengths(packed)
    elif isinstance(packed, list):
        runs = packed = [plain(run) for run in packed]
    whole = all(type(run) is int and run >= 0 for run in runs)
    if plain(outline.get("size")) != [height, width] or not whole or sum(runs) != height * width:
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
    left, top, width, height = box
    edges = edges_of(outline)
    if are_close([left, top, left + width, top + height], edges):
        return "around"
    if are_close(box, edges):
        return "corners"
    return "beside"


def edges_of(outline: list | dict) -> list:
    """Left, top, right, bottom of what is drawn."""
    if isinstance(outline, dict):
        box = extra("pycocotools.mask").toBbox(encoded(outline, *outline["size"])).tolist()
        return [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    points = list(itertools.chain(*outline))            # x, y, x, y ...
    x = points[0::2]
    y = points[1::2]
    return [min(x), min(y), max(x), max(y)]


def are_close(corners: list, edges: list) -> bool:
    """Up to two pixels, or a tenth of the side."""
    sides = [edges[2] - edges[0], edges[3] - edges[1]] * 2
    return all(abs(corner - edge) <= max(2, 0.1 * side)
               for corner, edge, side in zip(corners, edges, sides))


def box_around(outline: list | dict, height: int, width: int) -> list:
    """Left, top, width, height of what is drawn in the image."""
    left, top, right, bottom = np.clip(edges_of(outline), 0, [width, height] * 2).tolist()
    return [left, top, right - left, bottom - top]


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


def encoded(outline: list | dict, height: int, width: int) -> dict:
    """COCO's polygons, or a run-length encoding, packed or not -> the packed one."""
    rle = extra("pycocotools.mask")
    if isinstance(outline, list):
        return rle.merge(rle.frPyObjects(outline, height, width))
    if isinstance(outline["counts"], list):
        return rle.frPyObjects(outline, height, width)
    return outline
