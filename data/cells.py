"""Multi-channel microscopy images: files, object stores, statistics, augmentation."""

import collections
import functools
import io
import math
import os
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from .loading import Files, extra, first_few
from .tiff import MAX_BYTES, parse_tiff

BETWEEN_FILES = " + "           # the path of an image names all its files, one for each channel
CELL_EXTENSIONS = (".npy", ".tif", ".tiff", ".npz")


# ---- Files ---------------------------------------------------------------------------------------

def fetch(path: str) -> bytes:
    """The bytes at `path`: a local path, or a URL that fsspec knows (s3://, https://, memory://).

    Object stores fail now and then: a URL is tried five times, but for what does not change.
    """
    if "://" not in path:
        with open(path, "rb") as file:
            return file.read()
    fsspec = extra("fsspec")
    for pause in (0.5, 1, 2, 4, None):              # seconds
        try:
            store, name = fsspec.url_to_fs(path)    # in each process: connections survive no fork
            return store.cat_file(name)
        except (FileNotFoundError, PermissionError, ImportError, ValueError):
            raise                                   # no library for this store, no such kind ...
        except Exception as error:                  # every store's library has its own
            if pause is None:
                raise OSError(f"{path}: failed 5 times, at last {type(error).__name__}: {error}"
                              ) from error
            time.sleep(pause)


def load_cells(path: str, planes: Mapping[str, int] | None = None) -> np.ndarray:
    """The multi-channel image at `path` (as for fetch): (channels h w), numbers as they are stored.

    A .npy of that shape, a .npz that holds one, or a TIFF, of which planes may choose a slice, time
    point or series (see tiff.py). "a.tif + b.tif" (see sites.py): files of a channel each.
    """
    parts = [load_file(part, planes) for part in path.split(BETWEEN_FILES)]
    if len(parts) == 1:
        return parts[0]
    shapes = [part.shape for part in parts]
    if len(set(shapes)) > 1 or len(parts[0]) > 1:
        raise ValueError(f"the files of a site need one channel each, of one size: they are "
                         f"{', '.join(map(str, shapes))}")
    return np.concatenate(parts)


def load_file(path: str, planes: Mapping[str, int] | None) -> np.ndarray:
    content = fetch(path)
    suffix = path[-4:].lower()
    try:
        if suffix == ".npy":
            image = parse_npy(content)
        elif suffix == ".npz":
            image = parse_npz(content)
        else:
            image = parse_tiff(content, os.path.basename(path), planes)
    except (ValueError, ImportError):
        raise
    except Exception as error:                  # decoders of damaged files raise nearly anything
        raise ValueError(f"no {suffix} file, or damaged, or of a kind that is not read "
                         f"({type(error).__name__}: {error})") from error
    if image.ndim != 3 or 0 in image.shape or image.dtype.kind not in "buif":
        raise ValueError("expected real numbers of shape (channels, height, width), got "
                         f"{image.dtype} of shape {image.shape}")
    height, width, last = image.shape
    large = min(height, width)
    # A small axis behind large ones, which are equal or far larger: it is that of the channels.
    if large >= 16 and last < large and (height == width or 4 * last <= large):
        raise ValueError(f"shape {image.shape}: channels come first here, and seem to come last. "
                         "Convert it once: numpy.save(path, numpy.moveaxis(image, -1, 0))")
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        bad = np.count_nonzero(~np.isfinite(image))
        raise ValueError(f"{bad} of {image.size} pixels are NaN or infinite")
    return image


def parse_npy(content: bytes) -> np.ndarray:
    if not content.startswith(b"\x93NUMPY"):
        raise ValueError("no .npy file, which begins with \\x93NUMPY")
    try:
        return np.load(io.BytesIO(content), allow_pickle=False)
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise ValueError(
            "an array of Python objects is a pickle, which can run any code when it is read. If "
            "you trust the file, convert it once: numpy.save(path, numpy.stack(list(numpy.load("
            "path, allow_pickle=True))).astype('float32'))") from None


def parse_npz(content: bytes) -> np.ndarray:
    """The one array in it."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        arrays = archive.infolist()
        if len(arrays) != 1:
            raise ValueError(f"a .npz needs one array, it has {len(arrays)}: "
                             f"{first_few([array.filename for array in arrays])}")
        if arrays[0].file_size > max(MAX_BYTES, len(content)):
            raise ValueError(f"{arrays[0].file_size} bytes when unpacked: too large")
        return parse_npy(archive.read(arrays[0]))


def take_channels(load: Callable, count: int, channels: list[int], path: str) -> np.ndarray:
    """load(path), which must have `count` channels: those at the indices `channels`; -1: zeros."""
    image = load(path)
    if len(image) != count:
        raise ValueError(f"{len(image)} channels, expected {count}: shape {image.shape}, channels "
                         "come first. Files of another kind need their own --channel-names")
    if -1 in channels:
        image = np.concatenate([image, np.zeros_like(image[:1])])
    return image[channels]


def channel_count(files: Files) -> int:
    """How many channels most of the first ten images have."""
    counts = collections.Counter()
    for path, _ in files.samples[:10]:
        try:
            counts[len(files.load(path))] += 1
        except Exception as error:
            last = error
    if not counts:
        raise ValueError(f"the first images of {files.where} cannot be read. {path}: {last}"
                         ) from last
    return counts.most_common(1)[0][0]


def channel_statistics(files: Files, count: int, limit: int | None = None
                       ) -> tuple[list[float], list[float]]:
    """(means, standard deviations) of the channels, `count` floats each, in the files' units.

    Over all images of a Files of arrays (channels h w), or over `limit` of them at even distances.
    Bad files are skipped as in training, and so are images that do not have `count` channels. Of a
    constant channel the deviation is 0.
    """
    load = functools.partial(take_channels, files.load, count, list(range(count)))
    chosen = np.linspace(0, len(files) - 1, min(limit or len(files), len(files))).astype(int)
    images = Files([files.samples[i] for i in chosen], files.classes, load, np.asarray,
                   files.where)
    pixels = 0
    total = np.zeros((2, count))
    for i in tqdm(range(len(images)), "mean and deviation", disable=None):
        if item := images[i]:
            x = item[0].reshape(count, -1).astype(np.float64)
            pixels += x.shape[1]
            total += x.sum(1), np.square(x).sum(1)
    if not pixels:
        raise ValueError(f"none of {len(images)} images in {files.where} can be read")
    mean, square = total / pixels                           # (count) each
    variance = square - mean ** 2
    variance[variance < 1e-12 * mean ** 2] = 0              # a constant, but for rounding
    return mean.tolist(), np.sqrt(variance).tolist()


# ---- Augmentation --------------------------------------------------------------------------------

class CellTransform:
    """Array (channels h w) -> (channels img_size img_size) float32: (x - mean) / std by channel.

    mean, std: a number for each channel, in the units of the files; masked: channels set to zero.
    Images of another size are cropped, or padded with zeros, in the centre. augment: the recipe of
    the paper's microscopy experiments, given for 224 px and scaled to img_size: padded to 256, a
    random crop; then, each with probability 0.5, a flip, another flip or a rotation; defocus of
    radius 1, 2 or 3; up to ten holes of 10 x 10.
    """

    def __init__(self, img_size: int, mean: list[float], std: list[float], augment: bool,
                 masked: Sequence[int] = ()):
        self.img_size = img_size
        self.mean = torch.tensor(mean, dtype=torch.float32)[:, None, None]
        self.std = torch.tensor(std, dtype=torch.float32)[:, None, None]
        self.augment = augment
        self.masked = list(masked)

    def __call__(self, image: np.ndarray) -> torch.Tensor:
        x = self.window(image)
        if self.augment:
            x = self.augmented(x)
        x = x.sub_(self.mean).div_(self.std)
        x[self.masked] = 0
        return x

    def window(self, image: np.ndarray) -> torch.Tensor:
        """Copies out of the image, and of the dark around it: one pass, also to float32."""
        rows, to_rows = self.overlap(image.shape[1])
        columns, to_columns = self.overlap(image.shape[2])
        x = np.zeros((len(image), self.img_size, self.img_size), np.float32)
        x[:, to_rows, to_columns] = image[:, rows, columns]
        return torch.from_numpy(x)

    def overlap(self, length: int) -> tuple[slice, slice]:
        """Place the window along an axis -> what it shows of the image, where in the window."""
        size = self.img_size
        start = (length - size) // 2                        # below 0: in the padding
        if self.augment:
            room = max(length, round(size * 256 / 224))
            start = int(torch.randint(room - size + 1, ())) - (room - length) // 2
        first = max(start, 0)
        last = min(start + size, length)
        return slice(first, last), slice(first - start, last - start)

    def augmented(self, x: torch.Tensor) -> torch.Tensor:
        unit = self.img_size / 224
        turn, blur, holes = (torch.rand(3) < 0.5).tolist()
        if turn:
            kind = int(torch.randint(3, ()))
            if kind < 2:
                x = x.flip(2 - kind)
            else:
                x = self.rotate(x, 360 * torch.rand(()).item())
        radius = unit * int(torch.randint(1, 4, ()))
        if blur and radius > 0.5:                           # else the disc is one pixel
            x = defocus(x, radius)
        if holes:
            count = int(torch.randint(1, 11, ()))
            side = max(1, round(10 * unit))
            last = max(0, self.img_size - side)
            for top, left in torch.randint(last + 1, (count, 2)).tolist():
                x[:, top:top + side, left:left + side] = 0
        return x

    @staticmethod
    def rotate(x: torch.Tensor, degrees: float) -> torch.Tensor:
        v2 = extra("torchvision.transforms.v2")
        return v2.functional.rotate(x, degrees, v2.InterpolationMode.BILINEAR)


def defocus(x: torch.Tensor, radius: float) -> torch.Tensor:
    """(c h w): every point becomes a disc, whose rim weighs by its share of the pixel."""
    reach = math.ceil(radius - 0.5)
    axis = torch.arange(-reach, reach + 1).float()
    disc = (radius + 0.5 - torch.hypot(axis[:, None], axis)).clamp(0, 1)
    disc /= disc.sum()
    x = F.pad(x[:, None], 4 * [reach], mode="reflect")      # (c 1 h+2r w+2r)
    return F.conv2d(x, disc[None, None])[:, 0]
