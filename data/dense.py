"""Dense tasks, a label for each pixel or objects with boxes and masks: ADE20K, COCO, transforms."""

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

from .images import IMAGENET_MEAN, IMAGENET_STD, find_images, load_rgb
from .loading import Files, extra, read_table

IGNORE_INDEX = 255      # label of the pixels that nobody labelled
PAD_VALUE = 114         # gray beside the images of detection


class DenseFiles(Files):
    """Files with more than one label: item i is transform(*load(*samples[i])), None when bad."""

    coco = None         # pycocotools' COCO of the objects to measure by

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
    Resizing only this gives the same up to rounding, in less time.
    """
    taken = [min(length, math.ceil(size / ratio - 1e-6)) for length in shape]
    starts = [int(torch.randint(length - part + 1, ())) for length, part in zip(shape, taken)]
    new = [min(size, max(2, round(part * ratio))) for part in taken]    # torch fails at 1 x 1
    return (*starts, *taken), new


def resized_crop(pixels: torch.Tensor, window: tuple, new: list[int], nearest: bool = False
                 ) -> torch.Tensor:
    """The window of (c h w), resized: bilinear unsmoothed, as OpenCV, for the published numbers;
    nearest exactly, as torch's (and OpenCV's) other kind moves labels by half a pixel."""
    v2 = extra("torchvision.transforms.v2")
    mode = v2.InterpolationMode.NEAREST_EXACT if nearest else v2.InterpolationMode.BILINEAR
    return v2.functional.resized_crop(pixels, *window, new, mode, antialias=False)


def crop_and_flip(pixels: torch.Tensor, masks: torch.Tensor, window: tuple, new: list[int],
                  train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The window of (3 h w) and its masks (m h w), resized; train: mirrored half of the time."""
    pixels = resized_crop(pixels, window, new)
    masks = resized_crop(masks, window, new, nearest=True)
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

    Unlike torchvision's, brightness adds and contrast multiplies: else dark images stay dark.
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

    As DenseFiles, of what load_labels gives; an image without its map is a bad file. .classes: from
    ROOT/objectInfo150.txt, which comes with the data set; without it numbers, 150.
    FileNotFoundError: a folder is missing. ValueError: no images, or as names_of_classes.
    """

    def __init__(self, root: str, split: str, transform: Callable):
        split = {"train": "training", "val": "validation"}[split]
        image_folder = os.path.join(root, "images", split)
        label_folder = os.path.join(root, "annotations", split)
        require(image_folder, label_folder,
                hint=f"no such folder. Expected {root}/images/{{training,validation}}/*.jpg and "
                     f"{root}/annotations/{{training,validation}}/*.png")
        classes = numbers(150)
        table = os.path.join(root, "objectInfo150.txt")
        if os.path.exists(table):
            classes = names_of_classes(table)
        samples = []
        for path in find_images(image_folder):
            name = os.path.splitext(os.path.relpath(path, image_folder))[0]
            samples.append((path, os.path.join(label_folder, f"{name}.png")))
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


def names_of_classes(path: str) -> list[str]:
    """The names in a table like ADE20K's objectInfo150.txt: a line "wall, brick" is a wall.

    ValueError: its column Idx does not number the classes 1, 2, 3 ...
    """
    known, names = read_table(path, "Idx", "Name")
    if known != numbers(len(known)) or not 0 < len(known) <= IGNORE_INDEX:
        raise ValueError(f"{path}: the column Idx should number the classes, in order, from 1 to "
                         f"at most {IGNORE_INDEX}")
    return [name.split(",")[0].strip() for name in names]


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

    As DenseFiles, of (pixels, objects as for DetectionTransform). Crowds, objects smaller than a
    pixel and those that cannot be drawn are left out, in train also images without any object.
    .classes: the categories' names in the order of their ids, .category_ids: those ids. val: .coco
    has all that can be drawn. An image of another size than noted is a bad file.
    FileNotFoundError: the folder or the annotations are missing. ValueError: no annotations of this
    layout, an object of an unknown category or image, no objects at all.
    """

    def __init__(self, root: str, split: str, transform: Callable):
        folder = os.path.join(root, f"{split}2017")
        path = os.path.join(root, "annotations", f"instances_{split}2017.json")
        require(folder, path, hint=f"not found. Expected {root}/{{train,val}}2017/*.jpg and "
                                   f"{root}/annotations/instances_{{train,val}}2017.json")
        try:
            with open(path, encoding="utf-8-sig") as file:
                content = json.load(file)
            names = {category["id"]: category["name"] for category in content["categories"]}
            self.category_ids = sorted(names)
            images = self.sort_objects(content, path)
            if split == "val":
                self.coco = as_coco(content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: no annotations of COCO's layout "
                             f"({type(error).__name__}: {error})") from error
        if split == "train":
            images = [image for image in images if image["labels"]]
        samples = [(os.path.join(folder, image["file"]), i) for i, image in enumerate(images)]
        # One array of text: a loading process that only looks at 860,000 lists copies them all,
        # because looking counts references.
        self.texts = extra("pyarrow").array([json.dumps(image) for image in images])
        classes = [names[number] for number in self.category_ids]
        super().__init__(samples, classes, self.load_one, transform, folder)

    def sort_objects(self, content: dict, path: str) -> list[dict]:
        """An annotation file's content -> its images, dict(id, file, size, labels, masks).

        Of the content's annotations those stay that can be drawn, with what pycocotools needs."""
        label_of = {number: label for label, number in enumerate(self.category_ids)}
        images = {
            image["id"]: dict(id=image["id"], file=image["file_name"], labels=[], masks=[],
                              size=[image["height"], image["width"]])
            for image in content["images"]}
        drawable = []
        for item in content["annotations"]:
            if item["category_id"] not in label_of or item["image_id"] not in images:
                raise ValueError(f"an object is of category {item['category_id']} in image "
                                 f"{item['image_id']}, and there is no such category or image")
            image = images[item["image_id"]]
            if not is_drawable(item, *image["size"]):
                continue
            drawable.append(item)
            width, height = item["bbox"][2:]
            item["id"] = len(drawable)          # to pycocotools id 0 is no object
            item["iscrowd"] = int(bool(item.get("iscrowd")))
            item["area"] = item.get("area") or width * height
            if not item["iscrowd"] and min(width, height) >= 1:
                image["labels"].append(label_of[item["category_id"]])
                image["masks"].append(item["segmentation"])
        flawed = len(content["annotations"]) - len(drawable)
        if flawed:
            warnings.warn(f"{path}: left out {flawed:,} objects without a proper box, a polygon of "
                          "three points, or run lengths that fill their image")
        if not any(image["labels"] for image in images.values()):
            raise ValueError("no object that can be used")
        content["annotations"] = drawable
        return list(images.values())

    def load_one(self, path: str, i: int) -> tuple[torch.Tensor, dict]:
        known = json.loads(self.texts[i].as_py())
        pixels = to_pixels(load_rgb(path, upright=False))
        height, width = pixels.shape[1:]
        if [height, width] != known["size"]:
            raise ValueError(f"the image has {height} x {width} pixels, its annotation says "
                             f"{' x '.join(map(str, known['size']))}")
        rle = extra("pycocotools.mask")
        masks = np.zeros((len(known["masks"]), height, width), np.uint8)
        for mask, outline in zip(masks, known["masks"]):
            runs = rle.frPyObjects(outline, height, width)      # of each polygon, or of the whole
            if isinstance(runs, list):
                runs = rle.merge(runs)
            mask[:] = rle.decode(runs)
        labels = torch.tensor(known["labels"], dtype=torch.long)
        return pixels, dict(labels=labels, id=known["id"], masks=torch.from_numpy(masks))


def is_drawable(item: dict, height: int, width: int) -> bool:
    """Whether an object of COCO's layout is sound. Takes flawed polygons out of it.

    pycocotools does not look: from others it crashes the process or draws what lies in the memory.
    """
    box = item.get("bbox")
    if not are_numbers(box) or len(box) != 4 or min(box[2:]) < 0:
        return False
    outline = item.get("segmentation")
    if isinstance(outline, list):
        item["segmentation"] = [polygon for polygon in outline if are_numbers(polygon)
                                and len(polygon) >= 6 and len(polygon) % 2 == 0]
        return bool(item["segmentation"])
    if not isinstance(outline, dict) or outline.get("size") != [height, width]:
        return False
    runs = outline.get("counts")
    return (isinstance(runs, list) and all(isinstance(run, int) and run >= 0 for run in runs)
            and sum(runs) == height * width)


def are_numbers(values) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, (int, float)) and abs(value) < 1e5 for value in values)


def as_coco(content: dict):
    """An annotation file's content -> pycocotools' COCO, which otherwise prints how it gets on."""
    coco = extra("pycocotools.coco").COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(None):
        coco.createIndex()
    return coco
