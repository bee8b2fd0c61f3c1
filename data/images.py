"""Image files in folders of classes, and the transforms of the paper's ImageNet experiments."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from .loading import Files, extra, first_few
from .survey import Finder, require, require_same_classes

Image = extra("PIL.Image")
ImageOps = extra("PIL.ImageOps")
EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm",
              ".pgm")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LONGEST = 8         # in evaluation: of more than so many squares in a row the middle is looked at
# A comment of a megabyte makes no bad PNG; Pillow refuses it, since some unpack to gigabytes.
extra("PIL.PngImagePlugin").MAX_TEXT_CHUNK = 64 << 20


def load_rgb(path: str, upright: bool = True, size: Sequence[int] | None = None) -> Image.Image:
    """Decode the image file at `path` completely: 8-bit RGB.

    upright: turned as the camera noted; else, with size, (height, width) of its labels, if that is
    the size it has then and no other. Transparency is dropped, not blended, as torchvision's
    loader does: published accuracies are of such pixels. Of an animation it is the first picture.
    """
    with Image.open(path) as image:
        image.load()                            # Pillow is lazy: a truncated file fails here
        if size is not None:
            upright = image.size == tuple(size) and image.width != image.height
        if upright:
            with contextlib.suppress(Exception):    # a garbled EXIF block beside good pixels
                ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":               # Pillow's convert() clips these to white or black
            image = Image.fromarray(gray_levels(np.asarray(image)))
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")       # the same colours, without a warning for each file
        return image.convert("RGB")


def gray_levels(values: np.ndarray) -> np.ndarray:
    """Gray (h w) of 16 or 32 bits, or of floating point -> the same in 8 bits.

    White is 65535 in 16 bits; in 32 bits too, or else 255; in floating point 1 or 255. Which of the
    two, the largest value tells.
    """
    whites = {"u": (65535,), "i": (255, 65535), "f": (1, 255)}[values.dtype.kind]
    white = next((white for white in whites if values.max() <= white), None)    # NaN is below none
    if white is None or not values.min() >= 0:
        raise ValueError(f"the image has values from {values.min():g} to {values.max():g}: store "
                         f"it with values from 0 to {' or '.join(map(str, whites))}")
    if white == 1:
        values = (255 * values).round()
    if white == 65535:
        values = values // 256
    return values.astype(np.uint8)


def each_readable(paths: Iterable[str], load: Callable, extensions: Sequence[str] = EXTENSIONS
                  ) -> Iterator[tuple]:
    """Yields (path, load(path)), of a folder those of its files that have one of the extensions.

    Files that cannot be read are named; SystemExit(1) at the end.
    """
    unreadable = 0
    for path in each_file(paths, extensions):
        try:
            content = load(path)
        except Exception as error:              # a damaged file can fail in any way
            advice = ". Download it, and give the file" if "://" in str(path) else ""
            print(f"{path}: cannot be read ({type(error).__name__}: {error}){advice}")
            unreadable += 1
        else:
            yield path, content
    if unreadable:
        raise SystemExit(1)


def each_file(paths: Iterable[str], extensions: Sequence[str]) -> Iterator[str]:
    """The paths, of a folder those of the files in it."""
    for path in paths:
        if not os.path.isdir(path):
            yield path
            continue
        finder = Finder(path, extensions)
        found = finder.find(path)
        if not found:
            raise ValueError(f"{path}: no images ({', '.join(extensions)}) in this folder"
                             f"{finder.instead()}")
        finder.report(path)
        yield from found


class ImageFolder(Files):
    """Images in ROOT/split/CLASS/ and below; split "": in ROOT/CLASS/. As Files, of PIL RGB images.

    classes: the class names in the order of the labels, by default the sorted folder names. Give
    the training split's `.classes` to the validation split, or a missing folder would shift the
    meaning of its labels in silence.
    """

    def __init__(self, root: str, split: str, transform: Callable | None,
                 classes: list[str] | None = None, load: Callable = load_rgb,
                 extensions: tuple[str, ...] = EXTENSIONS):
        folder = os.path.join(root, split) if split else root
        layout = (f"Expected {os.path.join('ROOT', split, 'CLASS')}/*{extensions[0]} "
                  f"(or {', '.join(extensions[1:])})")
        require(root, folder,
                hint=f"no such folder. {layout}; check the path of the data set.")
        finder = Finder(folder, extensions)
        found = finder.folders(folder)
        if not found:
            raise ValueError(f"{folder}: no class folders. {layout}; sort the images into one "
                             "folder per class.")
        classes = found if classes is None else list(classes)
        require_same_classes(folder, found, classes)
        paths = [finder.find(os.path.join(folder, name)) for name in classes]
        if not all(paths):
            empty = [os.path.join(folder, name) for name, its in zip(classes, paths) if not its]
            raise ValueError(f"{first_few(empty)}: no images ({', '.join(extensions)}) in this "
                             f"class folder{finder.instead()}. Fill it, or remove it from every "
                             "split.")
        finder.report(folder)
        samples = [(path, label) for label, its in enumerate(paths) for path in its]
        super().__init__(samples, classes, load, transform, folder)


def image_transform(img_size: int, train: bool, *, auto_augment: str | None = None,
                    reprob: float = 0.0, crop_pct: float = 0.875, scale: tuple = (0.08, 1.0)
                    ) -> Callable:
    """PIL image -> (3 img_size img_size) float32: bicubic, ImageNet's mean and deviation.

    train: random resized crop to an area share in `scale`, horizontal flip, `auto_augment` as
    timm's string ("rand-m9-mstd0.5-inc1"), erasing to noise with probability `reprob`.
    Else: short side to img_size / crop_pct (224 / 0.875 = 256), then the centre.
    """
    timm = extra("timm.data")
    timm.auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize
    if auto_augment == "none":
        auto_augment = None
    try:
        transform = timm.create_transform(
            img_size, is_training=train, interpolation="bicubic", auto_augment=auto_augment,
            crop_pct=crop_pct, scale=scale, color_jitter=None, re_prob=reprob, re_mode="pixel")
    except (AssertionError, KeyError, NotImplementedError) as error:
        raise ValueError(f"--auto-augment {auto_augment}: timm does not know it; the paper's is "
                         "rand-m9-mstd0.5-inc1") from error
    if not train:
        transform.transforms.insert(0, middle)
    return transform


def middle(image: Image.Image) -> Image.Image:
    """Of a very long image only the middle: all that the centre crop sees, before it is enlarged.

    2 x 60,000 pixels would become 256 x 7,680,000. What is cut off at both ends is the same.
    """
    width, height = image.size
    longest = LONGEST * min(image.size)
    x = max(0, (width - longest) // 2)
    y = max(0, (height - longest) // 2)
    return image.crop((x, y, width - x, height - y)) if x or y else image


def posterize(image: Image.Image, bits: int, **_) -> Image.Image:
    """timm's with at least one bit: at full strength it asks for 0, which Pillow 13 refuses."""
    return ImageOps.posterize(image, min(max(bits, 1), 8))
