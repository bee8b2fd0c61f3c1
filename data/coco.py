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

from .dense import DenseFiles, to_pixels
from .images import Image, load_rgb
from .loading import extra
from .survey import one_error, report_turned, require, spread

FAR = 1e5       # pixels: no image is so large


class Coco(DenseFiles):
    """ROOT/{train,val}2017/*.jpg with ROOT/annotations/instances_{train,val}2017.json.

    As DenseFiles, of what load_objects gives. .classes: the categories' names in the order of their
    ids, .category_ids: those ids. val: .coco has crowds too. train leaves out crowds, objects
    smaller than a pixel, images without any object.
    """

    def __init__(self, root: str, split: str, transform: Callable):
        folder = os.path.join(root, f"{split}2017")
        path = os.path.join(root, "annotations", f"instances_{split}2017.json")
        require(folder, path, hint=f"not found. Expected {root}/{{train,val}}2017/*.jpg and "
                                   f"{root}/annotations/instances_{{train,val}}2017.json")
        with one_error(f"{path}: no annotations of COCO's layout"), open(path, "rb") as file:
            content = json.load(file)
            categories = dict(sorted(by_id(content["categories"], "categories").items()))
            for number, category in categories.items():
                category["name"] = str(category.get("name") or number)
            images, unsized = images_of(content, folder)
            found, truth, notes = sort_objects(content, images, list(categories), split == "train")
            files = [os.path.join(folder, image["file"]) for image in found]
            self.category_ids = list(categories)
            if split == "val":
                sizes = [dict(id=image["id"], height=image["size"][0], width=image["size"][1])
                         for image in found]
                self.coco = as_coco(dict(annotations=truth, images=sizes,
                                         categories=list(categories.values())))
        looked_at = spread(files)
        if not any(map(os.path.exists, looked_at)):
            raise FileNotFoundError(f"{looked_at[0]}: not found, nor any other of the "
                                    f"{len(looked_at)} images looked at that {path} names")
        if unsized:
            notes.append(f"{len(unsized):,} images without height and width, which are taken from "
                         "the files")
        for note in notes:
            warnings.warn(f"{path}: {note}")
        report_turned(folder, unsized or files, sized=not unsized)
        samples = [(file, json.dumps(image).encode()) for file, image in zip(files, found)]
        classes = [category["name"] for category in categories.values()]
        super().__init__(samples, classes, load_objects, transform, folder)


def load_objects(path: str, text: bytes) -> tuple[torch.Tensor, dict]:
    """An image, turned as its noted size is, and what Coco notes of it -> pixels, objects as for
    DetectionTransform."""
    known = json.loads(text)
    pixels = to_pixels(load_rgb(path, upright=False, size=known["size"]))
    height, width = pixels.shape[1:]
    if [height, width] != known["size"]:
        raise ValueError(f"the image has {height} x {width} pixels, its annotation says "
                         f"{' x '.join(map(str, known['size']))}")
    masks = np.zeros((len(known["masks"]), height, width), np.uint8)
    for mask, outline in zip(masks, known["masks"]):
        mask[:] = extra("pycocotools.mask").decode(encoded(outline, height, width))
    labels = torch.tensor(known["labels"], dtype=torch.long)
    return pixels, dict(labels=labels, id=known["id"], masks=torch.from_numpy(masks))


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
    """An id: text, or a whole number if it is the text of one."""
    number = plain(value)
    if type(number) is int:
        return number
    if isinstance(value, str) and value:
        return value
    raise ValueError(f"{what} is {value!r}, which is no id")


def by_id(items: list[dict], kind: str) -> dict:
    """{id: item with that id}, in the order of the items."""
    known = {}
    for item in items:
        number = id_of(item.get("id"), f"the id of one of the {kind}")
        if number in known:
            raise ValueError(f"the id {number} belongs to more than one of the {kind}")
        known[number] = item | dict(id=number)
    return known


def images_of(content: dict, folder: str) -> tuple[dict, list[str]]:
    """{id: dict(id, file, size, labels, masks)} without any object yet, and the files of those that
    had no size: it is theirs. A size of 0 x 0: the file cannot be opened. It is a bad file."""
    images = {}
    unsized = []
    for number, image in by_id(content["images"], "images").items():
        name = image["file_name"]
        height, width = (plain(image.get(side)) for side in ("height", "width"))
        if not all(type(length) is int and 0 < length < FAR for length in (height, width)):
            unsized.append(os.path.join(folder, name))
            height = width = 0
            with contextlib.suppress(Exception), Image.open(unsized[-1]) as opened:
                width, height = opened.size
        images[number] = dict(id=number, file=name, size=[height, width], labels=[], masks=[])
    return images, unsized


# ---- Objects -------------------------------------------------------------------------------------

def sort_objects(content: dict, images: dict, category_ids: list, train: bool
                 ) -> tuple[list, list, list[str]]:
    """The content of an annotation file -> images to learn from, objects to measure by, notes.

    The images are filled, but for crowds and objects smaller than a pixel; the objects are as in
    the file, none in training. Neither has what cannot be drawn.
    """
    label_of = {number: label for label, number in enumerate(category_ids)}
    truth = []
    reasons = collections.Counter()             # of leaving something out
    unlearnt = collections.Counter()            # of measuring by it only
    boxes = collections.Counter()
    for item in content["annotations"]:
        category = id_of(item["category_id"], "the category of an object")
        number = id_of(item["image_id"], "the image of an object")
        if category not in label_of or number not in images:
            raise ValueError(f"an object is of category {category} in image {number}, and there is "
                             "no such category or image")
        image = images[number]
        crowd = plain(str(item.get("iscrowd") or 0).lower())    # "True" is no JSON, "true" is
        if crowd not in (0, 1):
            raise ValueError(f"iscrowd is {item['iscrowd']!r}, and should be 0 or 1")
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
                                     iscrowd=int(crowd), bbox=box, segmentation=outline, area=area))
        if crowd:
            unlearnt["objects in a crowd"] += 1
        elif min(box[2:]) < 1:
            unlearnt["objects smaller than a pixel"] += 1
        else:
            boxes[how_box_lies(box, edges_of(outline))] += 1
            image["labels"].append(label_of[category])
            image["masks"].append(outline)
    found = [image for image in images.values() if image["labels"]]
    if not found:
        raise ValueError("no object that can be used: "
                         f"{list_of(reasons + unlearnt) or 'there is none'}")
    if train:
        reasons += unlearnt
        reasons[f"of {len(images):,} images without objects"] = len(images) - len(found)
    else:
        found = list(images.values())
    notes = []
    if wrong := boxes["beside"] + boxes["corners"]:
        notes.append(f"the box of {wrong:,} of {boxes.total():,} objects is not around their mask, "
                     f"by which they are learnt. {boxes['corners']:,} would be, if they were two "
                     "corners, x, y, X, Y: COCO's are x, y, width, height")
    if left_out := list_of(reasons):
        notes.append(f"left out {left_out}")
    return found, truth, notes


def list_of(counts: collections.Counter) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in sorted(counts.items()) if count)


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
    if isinstance(given, dict):
        outline = given = sound_runs(given, height, width)
    else:
        outline = list(filter(is_polygon, given if isinstance(given, list) else []))
    if not outline:
        raise ValueError("without a polygon of three points")
    return outline, box or box_around(outline, height, width), len(outline) < len(given)


def is_polygon(coordinates) -> bool:
    """x, y, x, y ... of three points and more."""
    return are_near(coordinates) and len(coordinates) >= 6 and len(coordinates) % 2 == 0


def are_near(coordinates) -> bool:
    """A list of numbers, none beyond any image. NaN hides in min and max, but not in the sum."""
    if not isinstance(coordinates, list) or not coordinates or not are_numbers(coordinates):
        return False
    near = -FAR < min(coordinates) and max(coordinates) < FAR
    return near and math.isfinite(sum(coordinates))


def sound_runs(outline: dict, height: int, width: int) -> dict:
    """A run-length encoding, packed or not -> not packed, as numbers."""
    given = outline.get("counts")
    runs = []
    if isinstance(given, str):
        runs = run_lengths(given)
    elif isinstance(given, list):
        runs = [plain(run) for run in given]
    whole = all(type(run) is int and run >= 0 for run in runs)
    if plain(outline.get("size")) != [height, width] or not whole or sum(runs) != height * width:
        raise ValueError("whose mask is not of their image's size")
    return dict(size=[height, width], counts=runs)


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


# ---- Masks and boxes -----------------------------------------------------------------------------

def encoded(outline: list | dict, height: int, width: int) -> dict:
    """Polygons, or a run-length encoding -> its packed form."""
    rle = extra("pycocotools.mask")
    found = rle.frPyObjects(outline, height, width)
    return rle.merge(found) if isinstance(outline, list) else found


def edges_of(outline: list | dict) -> list:
    """Left, top, right, bottom of what is drawn."""
    if isinstance(outline, dict):
        box = extra("pycocotools.mask").toBbox(encoded(outline, *outline["size"])).tolist()
        return [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    points = list(itertools.chain(*outline))            # x, y, x, y ...
    x = points[0::2]
    y = points[1::2]
    return [min(x), min(y), max(x), max(y)]


def box_around(outline: list | dict, height: int, width: int) -> list:
    """Left, top, width, height of what is drawn in the image."""
    left, top, right, bottom = np.clip(edges_of(outline), 0, [width, height] * 2).tolist()
    return [left, top, right - left, bottom - top]


def how_box_lies(box: list, edges: list) -> str:
    """Is it "around" the mask, or would its numbers be as corners ("corners"), or "beside" it?

    Up to two pixels, or a tenth of the side."""
    left, top, width, height = box
    slack = [max(2, 0.1 * (edges[2] - edges[0])), max(2, 0.1 * (edges[3] - edges[1]))] * 2
    readings = {"around": [left, top, left + width, top + height], "corners": box}
    for name, corners in readings.items():
        if all(abs(c - edge) <= most for c, edge, most in zip(corners, edges, slack)):
            return name
    return "beside"
