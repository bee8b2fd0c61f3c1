"""Image files in folders of classes, and the transforms of the paper's ImageNet experiments."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from .loading import Files, extra, first_few

Image = extra("PIL.Image")
ImageOps = extra("PIL.ImageOps")
EXTENSIONS = (".jpg", ".jpeg", ".png")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def load_rgb(path: str, upright: bool = True) -> Image.Image:
    """The image at `path` in 8-bit RGB. Raises what Pillow raises. upright: as the camera noted.

    Transparency is dropped, not blended, as in torchvision: so accuracies were published.
    """
    with Image.open(path) as image:
        image.load()                            # Pillow is lazy: a truncated file fails here
        if upright:
            with contextlib.suppress(Exception):    # a garbled EXIF block beside good pixels
                ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):          # 16-bit gray: Pillow's convert() clips it to white
            image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")       # the same colours, without a warning for each file
        return image.convert("RGB")


def each_readable(paths: Iterable[str], load: Callable) -> Iterator[tuple]:
    """Yields (path, load(path)). Files that cannot be read are named; SystemExit(1) at the end."""
    unreadable = 0
    for path in paths:
        try:
            content = load(path)
        except Exception as error:              # a damaged file can fail in any way
            print(f"{path}: cannot be read ({type(error).__name__}: {error})")
            unreadable += 1
        else:
            yield path, content
    if unreadable:
        raise SystemExit(1)


def find_images(folder: str, extensions: tuple[str, ...] = EXTENSIONS) -> list[str]:
    """Sorted paths of the images in `folder` and below, without hidden ones (macOS' ._a.JPEG)."""
    paths = []
    for entry in os.scandir(folder):            # knows folder from file: no stat per file (1.28 M)
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            paths += find_images(entry.path, extensions)
        elif entry.name.lower().endswith(extensions):
            paths.append(entry.path)
    return sorted(paths)


class ImageFolder(Files):
    """Images in ROOT/split/CLASS/ and below; split "": in ROOT/CLASS/. As Files, of PIL RGB images.

    classes: in the order of the labels, by default the sorted folder names. Give the training
    split's to the validation split: a missing folder would shift its labels in silence.
    FileNotFoundError: ROOT or ROOT/split is missing. ValueError: no class folders, a class without
    images, folders other than `classes`.
    """

    def __init__(self, root: str, split: str, transform: Callable | None,
                 classes: list[str] | None = None, load: Callable = load_rgb,
                 extensions: tuple[str, ...] = EXTENSIONS):
        folder = os.path.join(root, split)
        layout = (f"Expected {os.path.join('ROOT', split, 'CLASS')}/*{extensions[0]} "
                  f"(or {', '.join(extensions[1:])})")
        for needed in (root, folder):
            if not os.path.isdir(needed):
                raise FileNotFoundError(
                    f"{needed}: no such folder. {layout}; check the path of the data set.")
        found = sorted(entry.name for entry in os.scandir(folder)
                       if entry.is_dir() and not entry.name.startswith("."))
        if not found:
            raise ValueError(f"{folder}: no class folders. {layout}; sort the images into one "
                             "folder per class.")
        if classes is None:
            classes = found
        missing = sorted(set(classes) - set(found))
        unknown = sorted(set(found) - set(classes))
        if missing or unknown:
            raise ValueError(
                f"{folder}: its class folders are not the {len(classes)} classes of training. "
                f"Missing: {first_few(missing) or 'none'}. "
                f"Unknown: {first_few(unknown) or 'none'}. "
                "Give both splits the same class folders.")
        paths = {name: find_images(os.path.join(folder, name), extensions) for name in classes}
        empty = [os.path.join(folder, name) for name in classes if not paths[name]]
        if empty:
            raise ValueError(f"{first_few(empty)}: no images ({', '.join(extensions)}) in this "
                             "class folder. Fill it, or remove it from every split.")
        samples = [(path, label) for label, name in enumerate(classes) for path in paths[name]]
        super().__init__(samples, list(classes), load, transform, folder)


def image_transform(img_size: int, train: bool, *, auto_augment: str | None = None,
                    reprob: float = 0.0, crop_pct: float = 0.875, scale: tuple = (0.08, 1.0),
                    hflip: float = 0.5, color_jitter: float | None = None) -> Callable:
    """PIL image -> (3 img_size img_size) float32: bicubic, ImageNet's mean and deviation.

    train: random resized crop to an area share in `scale`, flip, timm's `auto_augment`, erasing to
    noise with probability `reprob`. timm ignores color_jitter beside RandAugment.
    Else: short side to img_size / crop_pct (224 / 0.875 = 256), then the centre.
    """
    timm = extra("timm.data")
    timm.auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize
    steps = timm.create_transform(
        img_size, is_training=train, interpolation="bicubic", auto_augment=auto_augment,
        crop_pct=crop_pct, scale=scale, hflip=hflip, color_jitter=color_jitter, separate=train)
    if not train:
        return steps
    crop_and_flip, policy, _ = steps
    erasing = timm.random_erasing.RandomErasing(reprob, mode="pixel", device="cpu")
    return extra("torchvision.transforms").Compose(
        [*crop_and_flip.transforms, *policy.transforms, to_normalized, erasing])


def posterize(image: Image.Image, bits: int, **_) -> Image.Image:
    """timm's with at least one bit: at full strength it asks for 0, which Pillow 13 refuses."""
    return ImageOps.posterize(image, min(max(bits, 1), 8))


def to_normalized(image: Image.Image) -> torch.Tensor:
    """timm's ToTensor and Normalize, in place: half their time (0.25 of 0.5 ms at 224 px)."""
    pixels = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")     # (3 h w)
    pixels -= 255 * np.array(IMAGENET_MEAN, np.float32)[:, None, None]
    pixels /= 255 * np.array(IMAGENET_STD, np.float32)[:, None, None]
    return torch.from_numpy(pixels)
