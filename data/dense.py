"""Dense tasks, a label for each pixel or objects with boxes and masks: ADE20K, COCO, transforms."""

import collections
import contextlib
import functools
import json
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .images import EXTENSIONS, IMAGENET_MEAN, IMAGENET_STD, find_images, load_rgb
from .loading import Files, extra

IGNORE_INDEX = 255      # label of the pixels that nobody labelled
PAD_VALUE = 114         # gray beside the images of detection


class DenseFiles(Files):
    """Files with more than one label: item i is transform(*load(*samples[i])), None when bad.

    .coco: pycocotools' COCO of the objects to measure by, None if there are none.
    """

    coco = None

    def read(self, sample: tuple):
        return self.load(*sample)

    def prepare(self, content: tuple, sample: tuple):
        return self.transform(*content)


# ---- Transforms ----------------------------------------------------------------------------------

def to_pixels(image: Image.Image) -> torch.Tensor:
    """RGB image -> (3 h w) uint8."""
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    """(3 h w) uint8 -> float32 by ImageNet's mean and standard deviation."""
    functional = extra("torchvision.transforms.v2").functional
    return functional.normalize(pixels / 255, IMAGENET_MEAN, IMAGENET_STD)


def random_window(shape: tuple[int, int], ratio: float, size: int) -> tuple[tuple, list[int]]:
    """Enlarge an image (height, width) by `ratio`, then crop at random to at most size x size.

    -> (top, left, height, width) of what that takes of the image, [height, width] of the result.
    Cropping first and resizing only what is needed gives the same up to rounding: at ratio 2 in a
    quarter of the time.
    """
    taken = [min(length, math.ceil(size / ratio - 1e-6)) for length in shape]
    starts = [int(torch.randint(length - part + 1, ())) for length, part in zip(shape, taken)]
    new = [min(size, max(2, round(part * ratio))) for part in taken]    # torch fails at 1 x 1
    return (*starts, *taken), new


def resized_crop(pixels: torch.Tensor, window: tuple, new: list[int], nearest: bool = False
                 ) -> torch.Tensor:
    """The window of (c h w), resized. Bilinear: unsmoothed, as OpenCV, for the published numbers.

    Nearest: exact, since torch's (and OpenCV's) other one moves the labels half a pixel away from
    the image.
    """
    v2 = extra("torchvision.transforms.v2")
    mode = v2.InterpolationMode.NEAREST_EXACT if nearest else v2.InterpolationMode.BILINEAR
    return v2.functional.resized_crop(pixels, *window, new, mode, antialias=False)


def crop_and_flip(pixels: torch.Tensor, masks: torch.Tensor, window: tuple, new: list[int],
                  train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The window of (3 h w) and its masks (m h w), resized; train: mirrored half of the time."""
    pixels = resized_crop(pixels, window, new)
    if len(masks):
        masks = resized_crop(masks, window, new, nearest=True)
    else:
        masks = masks.new_zeros(0, *new)
    if train and torch.rand(()) < 0.5:
        return pixels.flip(2), masks.flip(2)
    return pixels, masks


def pad_to(x: torch.Tensor, size: int, value: float = 0) -> torch.Tensor:
    """(... h w) -> (... size size), filled at the right and below."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, size - width, 0, size - height), value=value)


def uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def distorted(pixels: torch.Tensor) -> torch.Tensor:
    """Photometric distortion (Liu et al. 2016, SSD, section 3.6): (3 h w) uint8 -> the same.

    Each with probability 0.5: +-32 levels of brightness, 0.5 to 1.5 times the contrast, the
    saturation, and a tenth of the circle of hues; contrast before or after the last two.
    (torchvision's brightness multiplies, its contrast keeps the mean: dark images would stay dark.)
    """
    functional = extra("torchvision.transforms.v2").functional
    steps = [lambda x: (x + uniform(-32, 32) / 255).clamp(0, 1),
             lambda x: functional.adjust_saturation(x, uniform(0.5, 1.5)),
             lambda x: functional.adjust_hue(x, uniform(-0.1, 0.1))]
    before_colours = torch.rand(()) < 0.5
    steps.insert(1 if before_colours else 3, lambda x: (x * uniform(0.5, 1.5)).clamp(0, 1))
    x = pixels / 255
    for step in steps:
        if torch.rand(()) < 0.5:
            x = step(x)
    return (255 * x).round().byte()


@dataclass
class SegmentationTransform:
    """(pixels (3 h w) uint8, labels (h w) uint8) -> (image (3 h w) float32, labels int64).

    The image is enlarged to a short side of `size`, a long side of at most 4 x size. train: times a
    random factor of `scale`; a crop of size x size, drawn again up to ten times while one class
    fills 75% of it; flip; distort: photometric distortion. Else labels stay in the file's size.
    """

    size: int
    train: bool
    scale: tuple[float, float] = (0.5, 2.0)
    distort: bool = True

    def __call__(self, pixels: torch.Tensor, labels: torch.Tensor) -> tuple:
        shape = labels.shape
        ratio = min(self.size / min(shape), 4 * self.size / max(shape))
        if not self.train:
            new = [max(1, round(length * ratio)) for length in shape]
            return normalized(resized_crop(pixels, (0, 0, *shape), new)), labels.long()
        ratio *= uniform(*self.scale)
        for _ in range(11):
            window, new = random_window(shape, ratio, self.size)
            top, left, height, width = window
            part = labels[top:top + height, left:left + width].flatten()
            counts = part.bincount(minlength=256)[:IGNORE_INDEX]
            if counts.max() < 0.75 * counts.sum():
                break
        pixels, (labels,) = crop_and_flip(pixels, labels[None], window, new, train=True)
        if self.distort:
            pixels = distorted(pixels)
        image = pad_to(normalized(pixels), self.size)
        return image, pad_to(labels.long(), self.size, IGNORE_INDEX)


@dataclass
class DetectionTransform:
    """(pixels (3 h w) uint8, objects) -> (image (3 size size) float32, target, info).

    objects: dict(labels (m), masks (m h w) uint8, id). The image is enlarged to fit size x size,
    padded at the right and below. train, "large-scale jitter": times a random factor of `scale`, a
    crop, flip. target: dict(boxes (n 4), labels (n), masks (n size size) bool) of the objects still
    to be seen, the boxes drawn tightly around the masks; info: dict(id, size: (height, width)
    without padding, original: that of the file).
    """

    size: int
    train: bool
    scale: tuple[float, float] = (0.1, 2.0)

    def __call__(self, pixels: torch.Tensor, objects: dict) -> tuple:
        original = tuple(pixels.shape[1:])
        ratio = self.size / max(original)
        if self.train:
            ratio *= uniform(*self.scale)
        window, new = random_window(original, ratio, self.size)     # in evaluation: all of it
        pixels, masks = crop_and_flip(pixels, objects["masks"], window, new, self.train)
        visible = masks.bool().flatten(1).any(1)
        masks = pad_to(masks[visible], self.size).bool()            # (n size size)
        boxes = extra("torchvision.ops").masks_to_boxes(masks)
        boxes += torch.tensor([0, 0, 1, 1])                         # ends of pixels
        target = dict(boxes=boxes.float(), labels=objects["labels"][visible], masks=masks)
        info = dict(id=objects["id"], size=tuple(new), original=original)
        return normalized(pad_to(pixels, self.size, PAD_VALUE)), target, info


def merge_detections(samples: list[tuple]) -> tuple:
    """A batch of images without equal numbers of objects: (b 3 h w), [target], [info]."""
    images, targets, infos = zip(*samples)
    return torch.stack(images), list(targets), list(infos)


# ---- ADE20K --------------------------------------------------------------------------------------

class ADE20K(DenseFiles):
    """ROOT/images/{training,validation}/*.jpg with ROOT/annotations/{training,validation}/*.png.

    As DenseFiles, of what load_labels gives. An image without its map, or a map without its image,
    is a bad file. .classes: the last column of ROOT/objectInfo150.txt, which comes with the data
    set; without it numbers, 150. FileNotFoundError: a folder is missing.
    """

    def __init__(self, root: str, split: str, transform: Callable):
        split = {"train": "training", "val": "validation"}[split]
        image_folder = os.path.join(root, "images", split)
        label_folder = os.path.join(root, "annotations", split)
        require(image_folder, label_folder,
                hint=f"no such folder. Expected {root}/images/{{training,validation}}/*.jpg and "
                     f"{root}/annotations/{{training,validation}}/*.png")
        table = os.path.join(root, "objectInfo150.txt")
        classes = names_of_classes(table) if os.path.exists(table) else numbers(150)
        images = paths_by_stem(image_folder, EXTENSIONS)
        labels = paths_by_stem(label_folder, (".png",))
        samples = [(images.get(stem, os.path.join(image_folder, f"{stem}.jpg")),
                    labels.get(stem, os.path.join(label_folder, f"{stem}.png")))
                   for stem in sorted({*images, *labels})]
        if not samples:
            raise ValueError(f"{image_folder}: no images")
        load = functools.partial(load_labels, len(classes))
        super().__init__(samples, classes, load, transform, image_folder)


def load_labels(classes: int, path: str, label_path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """An image and its map of labels, 0 for none, 1 for the first class.

    -> pixels (3 h w) uint8, labels (h w) uint8 from 0, IGNORE_INDEX for none. ValueError: the map
    is of another size, in colour, or has a label beyond the classes.
    """
    pixels = to_pixels(load_rgb(path, upright=False))   # the map is of the pixels as stored
    height, width = pixels.shape[1:]
    with Image.open(label_path) as image:
        labels = np.array(image)                        # of a palette image: the numbers
    with open(label_path, "rb") as file:
        depth, kind = file.read(26)[24:]                # of a PNG
    if kind == 0 and depth in (2, 4):                   # gray: Pillow spreads few levels up to 255
        labels //= 255 // (2 ** depth - 1)
    if labels.shape != (height, width):
        raise ValueError(f"{label_path} is {' x '.join(map(str, labels.shape))} and not one number "
                         f"for each of {height} x {width} pixels")
    if labels.max() > classes:
        raise ValueError(f"{label_path} holds label {labels.max()}, there are {classes} classes")
    return pixels, torch.from_numpy(labels.astype(np.uint8) - np.uint8(1))      # 0 becomes 255


def paths_by_stem(folder: str, extensions: tuple[str, ...]) -> dict[str, str]:
    """{path in `folder` without the extension: whole path}. ValueError: two files share a stem."""
    paths = {}
    for path in find_images(folder, extensions):
        stem = os.path.splitext(os.path.relpath(path, folder))[0]
        if stem in paths:
            raise ValueError(f"{paths[stem]} and {path}: which of them is it? Remove one")
        paths[stem] = path
    return paths


def names_of_classes(path: str) -> list[str]:
    """The names in a table like ADE20K's objectInfo150.txt: number, more columns, "name, synonyms".

    ValueError: the numbers are not 1, 2, 3 ...
    """
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        rows = [line.strip().split("\t") for line in file]
    rows = sorted((int(row[0]), row[-1]) for row in rows if row[0].isdecimal())     # no header
    known = [number for number, _ in rows]
    if not 0 < len(rows) <= IGNORE_INDEX or known != list(range(1, len(rows) + 1)):
        raise ValueError(
            f"{path}: the first column should number the classes from 1 to at most {IGNORE_INDEX}, "
            f"once each, between tabulators; {len(rows)} numbers were found")
    return [names.split(",")[0].strip() for _, names in rows]


def numbers(count: int) -> list[str]:
    """Names for classes without names."""
    return [str(i) for i in range(1, count + 1)]


def require(*paths: str, hint: str) -> None:
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path}: {hint}")


# ---- COCO ----------------------------------------------------------------------------------------

class Coco(DenseFiles):
    """ROOT/{train,val}2017/*.jpg with ROOT/annotations/instances_{train,val}2017.json.

    As DenseFiles, of what load_objects gives. .classes: the categories' names in the order of their
    ids, .category_ids: those ids. val: .coco has crowds too. train leaves out crowds, objects
    smaller than a pixel, images without any object. Objects that cannot be drawn are left out of
    both. A warning counts them all.
    FileNotFoundError: the folder or the annotations are missing. ValueError: no annotations of this
    layout, an object of an unknown category or image, an id that comes twice, no objects at all.
    """

    def __init__(self, root: str, split: str, transform: Callable):
        folder = os.path.join(root, f"{split}2017")
        path = os.path.join(root, "annotations", f"instances_{split}2017.json")
        require(folder, path, hint=f"not found. Expected {root}/{{train,val}}2017/*.jpg and "
                                   f"{root}/annotations/instances_{{train,val}}2017.json")
        try:
            with open(path, encoding="utf-8-sig") as file:
                content = json.load(file)
            categories = by_id(sorted(content["categories"], key=lambda c: c["id"]), "categories")
            images, truth, left_out = sort_objects(content, list(categories), split == "train")
            classes = [category["name"] for category in categories.values()]
            self.category_ids = list(categories)
            if split == "val":
                self.coco = as_coco(content | dict(annotations=truth))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: no annotations of COCO's layout "
                             f"({type(error).__name__}: {error})") from error
        if left_out:
            warnings.warn(f"{path}: left out {left_out}")
        samples = [(os.path.join(folder, image["file"]), json.dumps(image).encode())
                   for image in images]
        super().__init__(samples, classes, load_objects, transform, folder)


def sort_objects(content: dict, category_ids: list, train: bool) -> tuple[list, list, str]:
    """The content of an annotation file -> images to learn from, objects to measure by.

    The images, [dict(id, file, size, labels, masks)], are without crowds and objects smaller than a
    pixel; the objects as in the file, none in training. Neither has what cannot be drawn. The third
    result counts what was left out. ValueError: see Coco.
    """
    label_of = {number: label for label, number in enumerate(category_ids)}
    images = {}
    truth = []
    left_out = collections.Counter()
    for number, image in by_id(content["images"], "images").items():
        size = [image["height"], image["width"]]
        images[number] = dict(id=number, file=image["file_name"], size=size, labels=[], masks=[])
    for item in content["annotations"]:
        if item["category_id"] not in label_of or item["image_id"] not in images:
            raise ValueError(f"an object is of category {item['category_id']} in image "
                             f"{item['image_id']}, and there is no such category or image")
        image = images[item["image_id"]]
        outline = item.get("segmentation")
        flaw = flaw_of(item, *image["size"])
        if flaw:
            left_out[f"objects {flaw}"] += 1
            continue
        if len(item["segmentation"]) < len(outline):
            left_out["objects' polygons, but not all of them"] += 1
        width, height = item["bbox"][2:]
        if not train:                           # numbered anew: to pycocotools id 0 is no object
            truth.append(item | dict(id=len(truth) + 1, iscrowd=int(bool(item.get("iscrowd"))),
                                     area=item.get("area") or width * height))
        if not item.get("iscrowd") and min(width, height) >= 1:
            image["labels"].append(label_of[item["category_id"]])
            image["masks"].append(item["segmentation"])
        elif train:
            kind = "in a crowd" if item.get("iscrowd") else "smaller than a pixel"
            left_out[f"objects {kind}"] += 1
    with_objects = [image for image in images.values() if image["labels"]]
    if train and 0 < len(with_objects) < len(images):
        left_out[f"of {len(images):,} images without objects"] = len(images) - len(with_objects)
    listed = ", ".join(f"{count:,} {what}" for what, count in sorted(left_out.items()))
    if not with_objects:
        raise ValueError(f"no object that can be used: {listed}".removesuffix(": "))
    return with_objects if train else list(images.values()), truth, listed


def by_id(items: list[dict], kind: str) -> dict:
    """{id: item}. ValueError: an id comes twice."""
    known = {}
    for item in items:
        if known.setdefault(item["id"], item) is not item:
            raise ValueError(f"the id {item['id']} belongs to more than one of the {kind}")
    return known


def as_coco(content: dict):
    """An annotation file's content -> pycocotools' COCO, which otherwise prints how it gets on."""
    coco = extra("pycocotools.coco").COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(None):
        coco.createIndex()
    return coco


def flaw_of(item: dict, height: int, width: int) -> str | None:
    """What makes an object of COCO's layout unusable, or None. Takes flawed polygons out of it.

    pycocotools does not look: from such objects it crashes the process or makes masks of what lies
    in the memory.
    """
    box = item.get("bbox")
    if not are_numbers(box) or len(box) != 4 or min(box[2:]) < 0:
        return "without a proper box"
    outline = item.get("segmentation")
    if isinstance(outline, dict):
        runs = outline.get("counts")
        if isinstance(runs, str):
            runs = run_lengths(runs)
        if (outline.get("size") == [height, width] and isinstance(runs, list)
                and all(isinstance(run, int) and run >= 0 for run in runs)
                and sum(runs) == height * width):
            return None
        return "whose mask is not of their image's size"
    if isinstance(outline, list):
        item["segmentation"] = [polygon for polygon in outline if are_numbers(polygon)
                                and len(polygon) >= 6 and len(polygon) % 2 == 0]
        if item["segmentation"]:
            return None
    return "without a polygon of three points"


def are_numbers(values) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, (int, float)) and -1e5 < value < 1e5 for value in values)


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


def load_objects(path: str, text: bytes) -> tuple[torch.Tensor, dict]:
    """An image, and its objects as Coco notes them -> pixels, objects as for DetectionTransform.

    ValueError: the image is not of the noted size.
    """
    known = json.loads(text)
    pixels = to_pixels(load_rgb(path, upright=False))
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
    rle = extra("pycocotools.mask")
    if isinstance(outline, list):
        return rle.decode(rle.merge(rle.frPyObjects(outline, height, width)))
    if isinstance(outline["counts"], list):
        outline = rle.frPyObjects(outline, height, width)
    return rle.decode(outline)
