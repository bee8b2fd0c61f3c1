"""Multi-channel microscopy images: files, object stores, JUMP-CP's tables, and augmentation."""

import collections
import functools
import io
import math
import os
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from .images import ImageFolder
from .loading import Files, extra, first_few
from .sites import BETWEEN_FILES, Site, group_sites, splits_of_units
from .tables import normal_well, parse_table
from .tiff import MAX_BYTES, parse_tiff

CELL_EXTENSIONS = (".npy", ".tif", ".tiff", ".npz")
JUMP_CHANNELS = (*(f"fluorescence{i}" for i in range(1, 6)),
                 *(f"brightfield{i}" for i in range(1, 4)))
# Of plate BR00116991.
JUMP_MEAN = (4.0317, 1.5659, 3.7737, 3.4605, 4.1723, 6.7805, 6.7874, 6.7781)
JUMP_STD = (17.3184, 12.0159, 16.9661, 15.0648, 17.9641, 21.6388, 21.6706, 21.6395)


# ---- Files ---------------------------------------------------------------------------------------

def fetch(path: str) -> bytes:
    """The bytes at `path`: a local path, or a URL that fsspec knows (s3://, https://, memory://).

    Object stores fail now and then: a URL is tried five times, then OSError. At once what trying
    again would not change: FileNotFoundError, PermissionError, ImportError (no library for this
    store), ValueError (no such kind of store).
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
            raise
        except Exception as error:                  # every store's library has its own
            if pause is None:
                raise OSError(f"{path}: failed 5 times, at last {type(error).__name__}: {error}"
                              ) from error
            time.sleep(pause)


def load_cells(path: str, planes: Mapping[str, int] | None = None) -> np.ndarray:
    """The multi-channel image at `path` (as for fetch): (channels h w), numbers as they are stored.

    A .npy of that shape, a .npz that holds one, or a TIFF, of which planes may choose a slice, time
    point or series (see tiff.py). "a.tif + b.tif" (see sites.py): files of a channel each.
    ValueError: a pickle, another shape, channels that come last, no numbers, NaN or infinite
    pixels, what parse_tiff refuses, a damaged file.
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
    if path.lower().endswith(".npy"):
        image = parse_npy(content)
    elif path.lower().endswith(".npz"):
        image = parse_npz(content)
    else:
        image = parse_tiff(content, os.path.basename(path), planes)
    if image.ndim != 3 or 0 in image.shape or image.dtype.kind not in "buif":
        raise ValueError("expected real numbers of shape (channels, height, width), got "
                         f"{image.dtype} of shape {image.shape}")
    if channels_come_last(image.shape):
        raise ValueError(f"shape {image.shape}: channels come first here, and seem to come last. "
                         "Convert it once: numpy.save(path, numpy.moveaxis(image, -1, 0))")
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        bad = np.count_nonzero(~np.isfinite(image))
        raise ValueError(f"{bad} of {image.size} pixels are NaN or infinite")
    return image


def channels_come_last(shape: tuple[int, int, int]) -> bool:
    """Is it (h w channels)? The last axis is small, the others are large, and equal or far larger.
    """
    *sides, last = shape
    large = min(sides)
    return large >= 16 and last < large and (sides[0] == sides[1] or 4 * last <= large)


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
    except Exception as error:                  # a damaged header can fail in any way
        raise ValueError(f"a damaged .npy file ({type(error).__name__}: {error})") from error


def parse_npz(content: bytes) -> np.ndarray:
    """The one array in it. ValueError: several, too large, damaged."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            arrays = archive.infolist()
            if len(arrays) != 1:
                raise ValueError(f"a .npz needs one array, it has {len(arrays)}: "
                                 f"{first_few([array.filename for array in arrays])}")
            if arrays[0].file_size > max(MAX_BYTES, len(content)):
                raise ValueError(f"{arrays[0].file_size} bytes when unpacked: too large")
            content = archive.read(arrays[0])
    except ValueError:
        raise
    except Exception as error:                  # zipfile and its decoders raise nearly anything
        raise ValueError(f"no .npz file, or damaged ({type(error).__name__}: {error})") from error
    return parse_npy(content)


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
    """How many channels most of the first ten images have. ValueError: none of them can be read."""
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
    images = Files([files.samples[i] for i in chosen], files.classes, load, sums_of_pixels,
                   files.where)
    total = np.zeros((3, count))
    for i in tqdm(range(len(images)), "mean and deviation", disable=None):
        item = images[i]
        if item:
            total += item[0]
    pixels, first, second = total                           # (count) each
    if not pixels.all():
        raise ValueError(f"none of {len(images)} images in {files.where} can be read")
    mean = first / pixels
    variance = second / pixels - mean ** 2
    variance[variance < 1e-12 * mean ** 2] = 0              # a constant, but for rounding
    return mean.tolist(), np.sqrt(variance).tolist()


def sums_of_pixels(image: np.ndarray) -> np.ndarray:
    """(channels h w) -> (3 channels) float64: number of pixels, their sum, the sum of squares."""
    x = image.reshape(len(image), -1).astype(np.float64)
    return np.stack([np.full(len(x), x.shape[1], np.float64), x.sum(1), np.square(x).sum(1)])


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


# ---- Data sets -----------------------------------------------------------------------------------

def split_of(n: int, split: str) -> np.ndarray:
    """Indices of a split of n samples, as JUMP-CP's: 60% "train", 20% "val", 20% "test"."""
    first, last = {"train": (0, 6), "val": (6, 8), "test": (8, 10)}[split]
    return np.sort(np.random.RandomState(0).permutation(n)[n * first // 10:n * last // 10])


def cell_folder(root: str, split: str, transform: Callable, classes: list[str] | None = None,
                pattern: str = "", split_by: str = "", planes: Mapping[str, int] | None = None
                ) -> Files:
    """Multi-channel images in ROOT/SPLIT/CLASS/, as ImageFolder, of arrays (channels h w).

    Without a folder ROOT/train: in ROOT/CLASS/, each class split 60 : 20 : 20, so that the sites of
    a well fall into one split, unless split_by is "site".
    pattern: see group_sites; names of channels in it become .channels. planes: see load_cells.
    ValueError: a class without images in this split, besides what ImageFolder raises.
    """
    load = functools.partial(load_cells, planes=planes)
    sorted_already = os.path.isdir(os.path.join(root, "train"))
    files = ImageFolder(root, split if sorted_already else "", transform, classes, load,
                        CELL_EXTENSIONS)
    names = []
    sites = [Site(path, label, None, {}) for path, label in files.samples]
    if pattern:
        sites, names = group_sites(files.samples, pattern, root)
    if split_by == "well" and any(site.well is None for site in sites):
        raise ValueError("--split-by well: the wells are not known without a --pattern that has a "
                         "group (?P<well>...)")
    where = files.where
    if not sorted_already:
        sites = sites_of_split(root, split, sites, files.classes, split_by)
        where = f"{root} ({split})"
    samples = [(site.path, site.label) for site in sites]
    files = Files(samples, files.classes, load, transform, where)
    files.channels = names
    return files


def sites_of_split(root: str, split: str, sites: list[Site], classes: list[str], split_by: str
                   ) -> list[Site]:
    """Class by class 60 : 20 : 20 of the wells, or of the sites where no wells are known."""
    known = {}
    chosen = []
    for label, name in enumerate(classes):
        of_class = [site for site in sites if site.label == label]
        units = units_of_sites(of_class, split_by)
        splits = splits_of_units(units, split_of, known)
        mine = [site for site, its_split in zip(of_class, splits) if its_split == split]
        if not mine:
            what = "images"
            if len(set(units)) < len(of_class):
                what = "wells (--split-by site parts their sites)"
            raise ValueError(
                f"{root}/{name}: {len(set(units))} {what} are too few to split 60 : 20 : 20, "
                f"{split!r} gets none. Give it at least 3, or sort the files into train/CLASS, "
                "val/CLASS and test/CLASS")
        chosen += mine
    return chosen


def units_of_sites(sites: list[Site], split_by: str) -> list:
    """What falls into one split: their wells, or they themselves."""
    by_well = split_by != "site"
    return [site.well if by_well and site.well else site.path for site in sites]


def read_table(path: str, *wanted: str) -> list[list[str | None]]:
    """The columns `wanted`, or of one sequence of names, of the table at `path` (as for fetch).

    Parquet or text, perhaps packed by gzip; see tables.py. "a|b" means a if the table has it, else
    b. None where there is nothing, or NaN.
    ValueError: a column is missing or comes twice, or no table.
    """
    if len(wanted) == 1 and not isinstance(wanted[0], str):
        wanted, = wanted
    content = fetch(path)
    try:
        table = parse_table(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    columns = []
    for names in wanted:
        name = next((name for name in names.split("|") if name in table), None)
        if name is None:
            raise ValueError(f"{path}: no column {names.replace('|', ' or ')}; it has "
                             f"{', '.join(table)}")
        columns.append([None if v is None or v != v else str(v)         # noqa: PLR0124  NaN
                        for v in table[name]])
    return columns


class IndexRow(NamedTuple):
    """An image of JUMP-CP's tables."""
    path: str | None
    table: str              # one for each plate
    well: str | None
    split: str


def rows_of_index(tables: list[str], images: str, split_by: str) -> list[IndexRow]:
    """All images of the tables; arguments as for JumpCP."""
    found = []
    units = []
    for table in tables:
        for path, name in zip(*read_table(table, "path", "well_loc")):
            well = normal_well(name)
            found.append((JumpCP.locate(path, table, images), table, well))
            units.append((table, well) if split_by == "well" else len(found))
    splits = splits_of_units(units, split_of, {})
    return [IndexRow(*row, split) for row, split in zip(found, splits)]


class JumpCP(Files):
    """The JUMP-CP benchmark: tables of images with their wells, and of what was in the wells.

    index: path or URL, or a list of them, of tables with columns path and well_loc: one image each.
        Relative paths begin at the index's folder. images="OLD=NEW" replaces the beginning OLD of
        every path: for a copy of the files.
    platemap: table of well_position and broad_sample; metadata: of broad_sample and target, or
        gene (CRISPR and ORF). Wells A1, a01 and " A01 " are one.
    split_by: "site", the benchmark's own split, in which sites of a well part; "well": they do not.
    planes: see load_cells.
    As Files, of arrays (channels h w). .classes: control and the targets.
    A well's label: see labels_of_wells. Images in wells without a label are left out, and counted
    by a warning. ValueError: no image has a label, an empty split, or as read_table.
    """

    def __init__(self, index: str | list[str], platemap: str, metadata: str, split: str,
                 transform: Callable, images: str = "", split_by: str = "site",
                 planes: Mapping[str, int] | None = None):
        label_of, classes, _ = labels_of_wells(platemap, metadata)
        tables = [index] if isinstance(index, str) else list(index)
        where = f"{first_few(tables)} ({split})"
        rows = rows_of_index(tables, images, split_by)
        repeated = len(rows) - len({row.path for row in rows})
        if repeated:
            warnings.warn(f"{repeated} of {len(rows)} rows of {where} repeat a path: splits will "
                          "share these images")
        labelled = [row.path is not None and row.well in label_of for row in rows]
        if not all(labelled):
            lost = {str(row.well) for row, known in zip(rows, labelled) if not known}
            message = (
                f"{labelled.count(False)} of {len(rows)} images have no label: their wells "
                f"({first_few(sorted(lost))}) are not in {platemap} joined with {metadata}, which "
                f"names {first_few(sorted(map(str, label_of))) or 'no wells'}")
            if not any(labelled):
                raise ValueError(f"{where}: {message}")
            warnings.warn(f"{message}. They are left out.")
        samples = []
        for row, known in zip(rows, labelled):
            if known and row.split == split:
                samples.append((row.path, label_of[row.well]))
        if not samples:
            raise ValueError(f"{where}: no images in this split of {len(rows)}")
        load = functools.partial(load_cells, planes=planes)
        super().__init__(samples, classes, load, transform, where)

    @staticmethod
    def locate(path: str | None, index: str, images: str) -> str | None:
        """Where the image is that the table `index` calls `path`."""
        if path is None:
            return None
        old, equals, new = images.partition("=")
        if equals and path.startswith(old):
            return new + path[len(old):]
        if "://" in path or os.path.isabs(path):
            return path
        folder, slash, _ = index.rpartition("/")
        return folder + slash + path


def labels_of_wells(platemap: str, metadata: str) -> tuple[dict, list[str], dict]:
    """{well: label}, class names, {well: what is in it}, also of wells without a label.

    The label is 0, "control", if what is in the well has no target, else 1 + the number of its
    target in the order in which targets appear when metadata is joined with platemap; of
    duplicate wells the last one holds.
    """
    wells_of = collections.defaultdict(list)    # None: untreated wells, and their row of metadata
    sample_of_well = {}
    for sample, name in zip(*read_table(platemap, "broad_sample", "well_position")):
        well = normal_well(name)
        wells_of[sample].append(well)
        sample_of_well[well] = sample
    label_of_target = {None: 0}
    label_of_well = {}
    for sample, target in zip(*read_table(metadata, "broad_sample", "target|gene")):
        for well in wells_of[sample]:
            label = label_of_target.setdefault(target, len(label_of_target))
            label_of_well[well] = label
            sample_of_well[well] = sample
    return label_of_well, ["control", *list(label_of_target)[1:]], sample_of_well
