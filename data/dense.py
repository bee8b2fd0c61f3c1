"""Dense tasks, a label for each pixel or objects with boxes and masks: transforms, ADE20K."""

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .images import EXTENSIONS, IMAGENET_MEAN, IMAGENET_STD, each_file, load_rgb
from .loading import Files, extra
from .survey import report_turned, require, spread

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
    is a bad file. .classes: those of ROOT/objectInfo150.txt; without it numbers, 150.
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
        load = functools.partial(load_labels, len(classes))
        require_labels(samples, load, image_folder)
        report_turned(image_folder, images.values())
        super().__init__(samples, classes, load, transform, image_folder)


def require_labels(samples: list[tuple], load: Callable, where: str) -> None:
    """ValueError: no image can be used, or in no map a pixel is labelled, of those looked at."""
    looked_at = spread(samples)
    faults = []
    for sample in looked_at:
        try:
            _, labels = load(*sample)
            if (labels != IGNORE_INDEX).any():
                return
        except Exception as error:          # as in Files
            faults.append(error)
    readable = len(looked_at) - len(faults)
    if not readable:
        raise ValueError(f"{where}: none of the {len(looked_at)} images looked at can be used with "
                         f"its map of labels. The last one: {faults[-1]}") from faults[-1]
    raise ValueError(f"{where}: no pixel is labelled in the maps of the {readable} images looked "
                     "at. In a map 0 and 255 mean no label, the first class is 1: are these the "
                     "right maps?")


def load_labels(classes: int, path: str, label_path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """An image and its map of labels, 0 for none, 1 for the first class.

    -> pixels (3 h w) uint8, labels (h w) uint8 from 0, IGNORE_INDEX for none, which 255 means in
    the map too, if there are less classes. An image that the camera turned is as its map is.
    """
    labels = read_map(label_path)
    pixels = to_pixels(load_rgb(path, upright=False, size=labels.shape[:2]))
    if labels.shape != pixels.shape[1:]:
        raise ValueError(f"{label_path} is {' x '.join(map(str, labels.shape))} and not one number "
                         f"for each of {' x '.join(map(str, pixels.shape[1:]))} pixels")
    if classes < IGNORE_INDEX:
        labels = np.where(labels == IGNORE_INDEX, 0, labels)
    if labels.max() > classes:
        raise ValueError(f"{label_path} holds label {labels.max()}, there are {classes} classes")
    return pixels, torch.from_numpy(labels.astype(np.uint8) - np.uint8(1))      # 0 becomes 255


def read_map(path: str) -> np.ndarray:
    """The numbers in a PNG, of a palette image too."""
    with Image.open(path) as image:
        if image.format != "PNG":
            raise ValueError(f"{path} is a {image.format} image, and maps of labels have to be "
                             "PNG: others blur the numbers. Export them anew")
        labels = np.array(image)
    with open(path, "rb") as file:
        depth, kind = file.read(26)[24:]
    if kind == 0 and depth in (2, 4):                   # gray: Pillow spreads few levels up to 255
        labels //= 255 // (2 ** depth - 1)
    return labels


def paths_by_stem(folder: str, extensions: tuple[str, ...]) -> dict[str, str]:
    """{path in `folder` without the extension: whole path}. Other kinds of files are reported."""
    paths = {}
    for path in each_file([folder], extensions):
        stem = os.path.splitext(os.path.relpath(path, folder))[0]
        if stem in paths:
            raise ValueError(f"{paths[stem]} and {path}: which of them is it? Remove one")
        paths[stem] = path
    return paths


def names_of_classes(path: str) -> list[str]:
    """Those of a table like ADE20K's objectInfo150.txt: number, more columns, "name, synonyms"."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        rows = [line.strip().split("\t") for line in file]
    rows = sorted((int(row[0]), row[-1]) for row in rows if row[0].isdecimal())     # no header
    if not 0 < len(rows) <= IGNORE_INDEX or [row[0] for row in rows] != [*range(1, len(rows) + 1)]:
        raise ValueError(
            f"{path}: the first column should number the classes from 1 to at most {IGNORE_INDEX}, "
            f"once each, between tabulators; {len(rows)} numbers were found")
    return [names.split(",")[0].strip() for _, names in rows]


def numbers(count: int) -> list[str]:
    """Names for classes without names."""
    return [str(i) for i in range(1, count + 1)]
