"""
The data of the experiments: readers of real data sets, a built-in one that needs no download, and the loader.

    train = ImageFolder("/data/imagenet", "train", image_transform(224, True, auto_augment="rand-m9-mstd0.5-inc1"))
    val = ImageFolder("/data/imagenet", "val", image_transform(224, False), classes=train.classes)
    loader = make_loader(train, 128, train=True, seed=0, workers=8)
    loader.batch_sampler.set_epoch(3, skip=1000)         # epoch 3, from its batch 1000 on
    for images, labels in loader: ...                    # (B, 3, 224, 224) float32, (B,) int64

1. A sample is a pure function of (seed, epoch, index): the sampler sends (epoch, index), and `Seeded` sets the random
   generators from it. The number of workers and processes and the point of resuming change nothing, not one pixel.
2. A bad file is skipped, counted and named, and many of them stop the run. One broken JPEG should not end the run of a
   week; a failing disk should not train it on a tenth of the data.
"""

import atexit
import collections
import contextlib
import functools
import hashlib
import importlib
import io
import json
import math
import multiprocessing
import os
import random
import signal
import time
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info
from tqdm import tqdm


def extra(module):
    """Import a module of the scripts' extra, where it is needed: the digits need no timm, ImageNet no scikit-learn."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'data.py needs {module} ({error}): pip install ".[train]"') from error


# ---- Image files -----------------------------------------------------------------------------------------------------

Image, ImageOps, ImageSequence = extra("PIL.Image"), extra("PIL.ImageOps"), extra("PIL.ImageSequence")
EXTENSIONS = (".jpg", ".jpeg", ".png")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_BAD = 0.01                                            # a larger share of unreadable files stops the run


def load_rgb(path, upright=True):
    """Decode the image file at `path` completely: an 8-bit RGB PIL image. Raises what Pillow raises.

    upright: turned as the camera noted. Transparency is dropped, not blended, as torchvision's loader does: published
    accuracies are of such pixels.
    """
    with Image.open(path) as image:
        image.load()                                      # Pillow is lazy: a truncated file fails here, not later
        with contextlib.suppress(Exception):              # a garbled EXIF block beside good pixels: keep the pixels
            if upright:
                ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):                    # 16-bit gray: Pillow's convert() clips it to white
            image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")                 # the same colours, without a warning for each file
        return image.convert("RGB")


def some(names):
    """'a, b, c, d, e and 12 more'"""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def find_images(folder, extensions=EXTENSIONS):
    """Sorted paths of the images in `folder` and below. scandir knows folder from file: no stat per file (1.28 M)."""
    found = []
    for entry in os.scandir(folder):
        if entry.name.startswith("."):                    # .ipynb_checkpoints; macOS' ._name.JPEG, which are no JPEGs
            continue
        if entry.is_dir():
            found += find_images(entry.path, extensions)
        elif entry.name.lower().endswith(extensions):
            found.append(entry.path)
    return sorted(found)


def each_readable(paths, load):
    """Yields (path, load(path)). A file that cannot be read is named, the others go on; SystemExit(1) at the end."""
    unreadable = 0
    for path in paths:
        try:
            content = load(path)
        except Exception as error:                        # a damaged file can fail in any way
            print(f"{path}: cannot be read ({type(error).__name__}: {error})")
            unreadable += 1
        else:
            yield path, content
    if unreadable:
        raise SystemExit(1)


class BadDataError(RuntimeError):
    """Too much of the data cannot be read."""


class Files(Dataset):
    """Labelled files. Item i is (transform(load(path)), label), None when the file is bad.

    samples: list of (path, label); where: what the data set is called in messages; load(path) may raise anything.
    .bad: flags (n) uint8 of the files found bad so far, by all workers; .bad_count: their number. BadDataError, from an
    item: more than one file and more than 1% of the files are bad.
    """

    def __init__(self, samples, classes, load, transform, where):
        self.samples, self.classes, self.load, self.transform, self.where = samples, classes, load, transform, where
        self.bad = torch.zeros(len(samples), dtype=torch.uint8).share_memory_()         # flags that all workers see

    @property
    def bad_count(self):
        return int(self.bad.sum())

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        path, label = self.samples[i]
        try:
            image = self.load(path)
        except Exception as error:                        # decoders of damaged data raise nearly anything
            self.mark_bad(i, error)
            return None
        return self.transform(image), label               # outside the try: a fault of the transform is a bug, not data

    def mark_bad(self, i, error):
        if not self.bad[i]:                               # a later epoch tries the file again, in silence
            self.bad[i] = 1
            warnings.warn(f"{self.samples[i][0]}: skipped, {type(error).__name__}: {error}")
        if self.bad_count > max(1, MAX_BAD * len(self)):
            names = [self.samples[j][0] for j in self.bad.nonzero().flatten().tolist()]
            raise BadDataError(f"{len(names)} of the {len(self)} images in {self.where} cannot be read, more than "
                               f"{MAX_BAD:.0%}: {some(names)}. Check the disk; replace or delete them. The last one: "
                               f"{type(error).__name__}: {error}")


class ImageFolder(Files):
    """Images in ROOT/split/CLASS/ and below; split "": in ROOT/CLASS/. As Files, of PIL RGB images.

    classes: the class names in the order of the labels, by default the sorted folder names. Give the training split's
    `.classes` to the validation split, or a missing folder would shift the meaning of its labels in silence.
    FileNotFoundError: ROOT or ROOT/split is missing. ValueError: no class folders, a class without images, folders
    other than `classes`.
    """

    def __init__(self, root, split, transform, classes=None, load=load_rgb, extensions=EXTENSIONS):
        folder = os.path.join(root, split) if split else root
        layout = f"Expected {'/'.join(filter(None, ('ROOT', split, 'CLASS')))}/*{extensions[0]} (or " \
                 f"{', '.join(extensions[1:])})"
        for needed in (root, folder):
            if not os.path.isdir(needed):
                raise FileNotFoundError(f"{needed}: no such folder. {layout}; check the path of the data set.")
        found = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
        if not found:
            raise ValueError(f"{folder}: no class folders. {layout}; sort the images into one folder per class.")
        classes = found if classes is None else list(classes)
        missing, unknown = sorted(set(classes) - set(found)), sorted(set(found) - set(classes))
        if missing or unknown:
            raise ValueError(f"{folder}: its class folders are not the {len(classes)} classes of training. "
                             f"Missing: {some(missing) or 'none'}. Unknown: {some(unknown) or 'none'}. "
                             "Give both splits the same class folders.")
        files = {name: find_images(os.path.join(folder, name), extensions) for name in classes}
        empty = [os.path.join(folder, name) for name in classes if not files[name]]
        if empty:
            raise ValueError(f"{some(empty)}: no images ({', '.join(extensions)}) in this class folder. "
                             "Fill it, or remove it from every split.")
        samples = [(path, label) for label, name in enumerate(classes) for path in files[name]]
        super().__init__(samples, classes, load, transform, folder)


def posterize(image, bits, **_):
    """timm's, but at least one bit stays: at full strength it asks for 0, a black image, and Pillow 13 raises."""
    return ImageOps.posterize(image, min(max(bits, 1), 8))


def to_normalized(image):
    """What timm's ToTensor and Normalize do, in place: half their time (0.25 of 0.5 ms at 224 px)."""
    mean, std = (255 * np.array(v, np.float32)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")          # (3, H, W)
    pixels -= mean
    pixels /= std
    return torch.from_numpy(pixels)


def image_transform(img_size, train, *, auto_augment=None, reprob=0.0, crop_pct=0.875, scale=(0.08, 1.0), hflip=0.5,
                    color_jitter=None):
    """A transform PIL image -> (3, img_size, img_size) float32: bicubic, ImageNet's mean and standard deviation.

    train: random resized crop to an area share in `scale`, horizontal flip, `auto_augment` as timm's string
    ("rand-m9-mstd0.5-inc1"), erasing to noise with probability `reprob`. timm ignores color_jitter beside RandAugment.
    Else: short side to img_size / crop_pct (224 / 0.875 = 256), then the centre.
    """
    timm, compose = extra("timm.data"), extra("torchvision.transforms").Compose
    timm.auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize
    made = timm.create_transform(img_size, is_training=train, interpolation="bicubic", auto_augment=auto_augment,
                                 crop_pct=crop_pct, scale=scale, hflip=hflip, color_jitter=color_jitter, separate=train)
    if not train:
        return made
    erasing = timm.random_erasing.RandomErasing(reprob, mode="pixel", device="cpu")
    return compose([*made[0].transforms, *made[1].transforms, to_normalized, erasing])    # crop and flip, policy, ...


# ---- Built-in data: handwritten digits -------------------------------------------------------------------------------

DIGITS_MEAN, DIGITS_STD = 0.305, 0.376                    # of the training digits' pixels in [0, 1]
# Largest rotation, shear (radians), log zoom and shifts (one of the 8 source pixels is 0.25). No flips: a mirrored 2 is
# no digit.
DIGITS_AFFINE = torch.tensor([0.26, 0.15, 0.15, 0.25, 0.25])


def enlarge(scan, img_size, draw):
    """(1, 1, 8, 8) in [0, 1]; draw (5,) in [-1, 1], shares of DIGITS_AFFINE -> (3, img_size, img_size) normalised."""
    turn, shear, zoom, dx, dy = (DIGITS_AFFINE * draw).tolist()
    cos, sin, zoom = math.cos(turn), math.sin(turn), math.exp(zoom)
    # Output -> source position: zoom * rotation @ [[1, shear], [0, 1]], and a shift. Enlarging and moving in one
    # resampling of the 8 x 8 scan is cheaper, and blurs once. Outside the scan is paper: zeros.
    theta = torch.tensor([[[zoom * cos, zoom * (shear * cos - sin), dx],
                           [zoom * sin, zoom * (shear * sin + cos), dy]]])
    grid = F.affine_grid(theta, (1, 1, img_size, img_size), align_corners=False)
    image = F.grid_sample(scan, grid, mode="bicubic", align_corners=False)           # (1, 1, S, S)
    image = (image.clamp_(0, 1) - DIGITS_MEAN) / DIGITS_STD                          # bicubic overshoots
    return image[0].expand(3, -1, -1)


def digit_transform(img_size):
    """A transform PIL image (one light digit on black, filling it) -> what `Digits` gives for such a scan."""
    def transform(image):
        scan = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), np.float32) / 255
        return enlarge(torch.from_numpy(scan)[None, None], img_size, torch.zeros(5))
    return transform


class Digits(Dataset):
    """scikit-learn's 1,797 scans of handwritten digits, 8 x 8 pixels: 1,437 to train on, 360 held out, always the same.

    Item i is ((3, img_size, img_size) float32, label): bicubic, normalised; with `augment` (default: `train`) under a
    random affine map drawn from torch's global generator. .classes: '0'..'9'; .labels: list of the items' labels.
    """

    def __init__(self, train, img_size=32, augment=None):
        images, labels = extra("sklearn.datasets").load_digits(return_X_y=True)    # (1797, 64) in 0..16, (1797,)
        split = extra("sklearn.model_selection").train_test_split
        kept, held_out = split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
        self.indices = np.sort(kept if train else held_out)
        self.images = torch.tensor(images[self.indices] / 16, dtype=torch.float32).view(-1, 1, 8, 8)
        self.labels = labels[self.indices].tolist()
        self.classes = [str(digit) for digit in range(10)]
        self.img_size, self.augment = img_size, train if augment is None else augment

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        draw = 2 * torch.rand(5) - 1 if self.augment else torch.zeros(5)
        return enlarge(self.images[i:i + 1], self.img_size, draw), self.labels[i]


# ---- Multi-channel images: microscopy --------------------------------------------------------------------------------

CELL_EXTENSIONS = (".npy", ".tif", ".tiff")
JUMP_CHANNELS = tuple(f"fluorescence{i}" for i in range(1, 6)) + tuple(f"brightfield{i}" for i in range(1, 4))
JUMP_MEAN = (4.0317, 1.5659, 3.7737, 3.4605, 4.1723, 6.7805, 6.7874, 6.7781)             # of plate BR00116991
JUMP_STD = (17.3184, 12.0159, 16.9661, 15.0648, 17.9641, 21.6388, 21.6706, 21.6395)


def fetch(path, attempts=5, wait=0.5):
    """The bytes at `path`: a local path, or a URL that fsspec knows (s3://, gs://, https://, memory://).

    Object stores fail now and then: a URL is tried `attempts` times, the pauses growing from `wait` seconds (0.5, 1, 2,
    4). Then OSError; at once what trying again would not change: FileNotFoundError, PermissionError, ImportError (no
    library for this store), ValueError (no such kind of store)."""
    if "://" not in path:
        with open(path, "rb") as file:
            return file.read()
    fsspec = extra("fsspec")
    for attempt in range(attempts):
        try:
            store, name = fsspec.url_to_fs(path)          # in each process its own: connections survive no fork
            return store.cat_file(name)
        except (FileNotFoundError, PermissionError, ImportError, ValueError):
            raise
        except Exception as error:                        # every store's library has its own
            if attempt + 1 == attempts:
                raise OSError(f"{path}: failed {attempts} times, at last {type(error).__name__}: {error}") from error
            time.sleep(wait * 2 ** attempt)


def load_cells(path):
    """The multi-channel image at `path` -> array (channels, H, W) of the numbers as they are stored.

    A .npy of that shape, or a TIFF with a page for each channel; a path or URL as for fetch.
    ValueError: a pickle, another shape, no numbers, NaN or infinite pixels; or what NumPy and Pillow raise."""
    content = fetch(path)
    if path.lower().endswith(".npy"):
        if content[:6] != b"\x93NUMPY":
            raise ValueError("no .npy file, which begins with \\x93NUMPY")
        try:
            image = np.load(io.BytesIO(content), allow_pickle=False)
        except ValueError as error:
            if "allow_pickle" not in str(error):
                raise
            raise ValueError("an array of Python objects is a pickle, which can run any code when it is read. If you "
                             "trust the file, convert it once: numpy.save(path, numpy.stack(list(numpy.load(path, "
                             "allow_pickle=True))).astype('float32'))") from None
    else:
        try:
            tiff = Image.open(io.BytesIO(content), formats=["TIFF"])
        except Image.UnidentifiedImageError:
            raise ValueError("no TIFF, or one of a kind that Pillow does not know: save it as .npy") from None
        with tiff:
            image = np.stack([page_of(tiff) for _ in ImageSequence.Iterator(tiff)])               # (pages, H, W)
        if image.ndim == 4 and len(image) == 1:
            image = image[0].transpose(2, 0, 1)           # one page in colour
    if image.ndim != 3 or 0 in image.shape or image.dtype.kind not in "buif":
        raise ValueError(f"expected real numbers of shape (channels, height, width), got {image.dtype} of shape "
                         f"{image.shape}")
    if image.dtype.kind == "f" and (bad := image.size - int(np.isfinite(image).sum())):
        raise ValueError(f"{bad} of {image.size} pixels are NaN or infinite")
    return image


def page_of(tiff):
    """The current page of an open TIFF as an array. Pillow takes uint32 for int32 and int8 for uint8."""
    bits, kind = (tiff.tag_v2.get(tag, (1,)) for tag in (258, 339))         # BitsPerSample; SampleFormat: 2 is signed
    page = np.asarray(tiff)
    return page.view({(32, 1): np.uint32, (8, 2): np.int8}.get((bits[0], kind[0]), page.dtype))


def take_channels(load, count, channels, path):
    """load(path), which must have `count` channels, with those at the indices `channels`, in that order; -1: zeros."""
    image = load(path)
    if len(image) != count:
        raise ValueError(f"{len(image)} channels, expected {count}: shape {image.shape}, channels come first. Files of "
                         "another kind need their own --channel-names")
    if -1 in channels:
        image = np.concatenate([image, np.zeros_like(image[:1])])
    return image[channels]


class CellTransform:
    """array (C, H, W) -> (C, img_size, img_size) float32: (x - mean) / std by channel (C numbers each, in the units of
    the files), zero in the channels `masked`.

    Images of another size are cropped, or padded with zeros, in the centre. augment: the recipe of the paper's
    microscopy experiments, given for 224 px and scaled to img_size: padded to 256, a random crop; then, each with
    probability 0.5, a flip, another flip or a rotation; defocus of radius 1, 2 or 3; up to ten holes of 10 x 10.
    """

    def __init__(self, img_size, mean, std, augment, masked=()):
        self.mean, self.std = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (mean, std))
        self.img_size, self.augment, self.masked = img_size, augment, list(masked)

    def __call__(self, image):
        x = self.window(image)                                              # (C S S)
        if self.augment:
            unit = self.img_size / 224
            turn, blur, holes = (torch.rand(3) < 0.5).tolist()
            if turn:
                kind = int(torch.randint(3, ()))
                x = x.flip(2 - kind) if kind < 2 else self.rotate(x, 360 * torch.rand(()).item())
            radius = unit * int(torch.randint(1, 4, ()))
            if blur and radius > 0.5:                                       # else the disc is one pixel
                x = defocus(x, radius)
            if holes:
                count, side = int(torch.randint(1, 11, ())), max(1, round(10 * unit))
                for top, left in torch.randint(max(1, self.img_size - side + 1), (count, 2)).tolist():
                    x[:, top:top + side, left:left + side] = 0
        x = x.sub_(self.mean).div_(self.std)
        x[self.masked] = 0
        return x

    def window(self, image):
        """Copies out of the image, and of the dark around it: the one pass that also makes float32 of any type."""
        size, padded = self.img_size, round(self.img_size * 256 / 224)
        out, target, source = np.zeros((len(image), size, size), np.float32), [slice(None)], [slice(None)]
        for length in image.shape[1:]:
            start = (length - size) // 2                                    # below 0: in the padding
            if self.augment:
                room = max(length, padded)
                start = int(torch.randint(room - size + 1, ())) - (room - length) // 2
            first, last = max(start, 0), min(start + size, length)
            source.append(slice(first, last))
            target.append(slice(first - start, last - start))
        out[tuple(target)] = image[tuple(source)]
        return torch.from_numpy(out)

    @staticmethod
    def rotate(x, degrees):
        v2 = extra("torchvision.transforms.v2")
        return v2.functional.rotate(x, degrees, v2.InterpolationMode.BILINEAR)


def defocus(x, radius):
    """(C, H, W): every point becomes a disc, whose rim weighs by its share of the pixel."""
    reach = math.ceil(radius - 0.5)
    axis = torch.arange(-reach, reach + 1)
    disc = (radius + 0.5 - torch.hypot(axis[:, None].float(), axis[None].float())).clamp(0, 1)           # (k k)
    x = F.pad(x[:, None], 4 * [reach], mode="reflect")
    return F.conv2d(x, (disc / disc.sum())[None, None])[:, 0]


def channel_count(files):
    """How many channels the images of a Files have: most of its first ten. ValueError: none of these can be read."""
    counts = []
    for path, _ in files.samples[:10]:
        try:
            counts.append(len(files.load(path)))
        except Exception as error:
            last = path, error
    if not counts:
        raise ValueError(f"the first images of {files.where} cannot be read. {last[0]}: {last[1]}") from last[1]
    return collections.Counter(counts).most_common(1)[0][0]


def channel_statistics(files, count, limit=None):
    """(means, standard deviations) of the channels over all images of a Files of arrays (C, H, W), or over `limit` of
    them at even distances: two lists of C floats, in the units of the files. Bad files are skipped as in training, and
    so are images that do not have `count` channels."""
    load = functools.partial(take_channels, files.load, count, list(range(count)))
    chosen = np.linspace(0, len(files) - 1, min(limit or len(files), len(files))).astype(int)
    images = Files([files.samples[i] for i in chosen], files.classes, load, sums_of_pixels, files.where)
    total = np.zeros((3, count))
    for i in tqdm(range(len(images)), "mean and deviation", disable=None):
        item = images[i]
        total += item[0] if item else 0
    if not total[0].all():
        raise ValueError(f"none of {len(images)} images in {files.where} can be read")
    pixels, first, second = total                                           # (3 C)
    mean = first / pixels
    return mean.tolist(), np.sqrt(np.maximum(second / pixels - mean ** 2, 0)).tolist()


def sums_of_pixels(image):
    """array (C, H, W) -> (3, C) float64: how many pixels, their sum, the sum of their squares."""
    x = image.reshape(len(image), -1).astype(np.float64)
    return np.stack([np.full(len(x), x.shape[1], np.float64), x.sum(1), np.square(x).sum(1)])


def split_of(n, split):
    """The indices of a split of n samples: 60 % "train", 20 % "val", 20 % "test", drawn as in the JUMP-CP benchmark."""
    first, last = {"train": (0, 6), "val": (6, 8), "test": (8, 10)}[split]
    return np.sort(np.random.RandomState(0).permutation(n)[n * first // 10:n * last // 10])


def cell_folder(root, split, transform, classes=None, load=load_cells):
    """Multi-channel images in ROOT/train/CLASS/, ROOT/val/CLASS/ and perhaps ROOT/test/CLASS/; or, without such
    folders, in ROOT/CLASS/, each class split 60 : 20 : 20. As ImageFolder, of arrays (channels, H, W).

    ValueError: a class without images in this split, besides what ImageFolder raises."""
    if os.path.isdir(os.path.join(root, "train")):
        return ImageFolder(root, split, transform, classes, load, CELL_EXTENSIONS)
    all_of = ImageFolder(root, "", transform, classes, load, CELL_EXTENSIONS)
    samples = []
    for label, name in enumerate(all_of.classes):
        of_class = [sample for sample in all_of.samples if sample[1] == label]
        chosen = split_of(len(of_class), split)
        if not len(chosen):
            raise ValueError(f"{root}/{name}: {len(of_class)} images are too few to split 60 : 20 : 20, {split!r} gets "
                             "none. Give it at least 3, or sort the files into train/CLASS, val/CLASS and test/CLASS")
        samples += [of_class[i] for i in chosen]
    return Files(samples, all_of.classes, load, transform, f"{root} ({split})")


def read_table(path, columns):
    """The table at `path` (Parquet, or text with tabs or commas; a path or URL) -> {column: list of str or None}.

    columns: those wanted; ("a", "b") means a if the table has it, else b. ValueError: one is missing, or no table."""
    parquet, csv, pyarrow = extra("pyarrow.parquet"), extra("pyarrow.csv"), extra("pyarrow")
    content = fetch(path)                                 # the released benchmark has Parquet under the name .tsv
    try:
        if content[:4] == b"PAR1":
            table = parquet.read_table(io.BytesIO(content))
        else:
            head = content.partition(b"\n")[0]
            delimiter = "\t" if b"\t" in head else ","
            names = head.decode("utf-8-sig").rstrip("\r").replace('"', "").split(delimiter)
            table = csv.read_csv(io.BytesIO(content), parse_options=csv.ParseOptions(delimiter=delimiter),
                                 convert_options=csv.ConvertOptions(strings_can_be_null=True, column_types={
                                     name: pyarrow.string() for name in names}))       # "01" is a name, not a 1
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path}: neither a Parquet nor a text table ({error})") from error
    found = {}
    for wanted in columns:
        choices = (wanted,) if isinstance(wanted, str) else wanted
        name = next((c for c in choices if c in table.column_names), None)
        if name is None:
            raise ValueError(f"{path}: no column {' or '.join(choices)}; it has {', '.join(table.column_names)}")
        found[choices[0]] = [None if v is None or v != v else str(v) for v in table[name].to_pylist()]
    return found


class JumpCP(Files):
    """The JUMP-CP benchmark: an index of images with their wells, and what was in the wells. As Files, of arrays
    (channels, H, W).

    index: path or URL, or a list of them, of tables with columns path and well_loc: one image each. Relative paths
        begin at the index's folder. images="OLD=NEW" replaces the beginning OLD of every path: for a copy of the files.
    platemap: table of well_position and broad_sample; metadata: of broad_sample and target, or gene (CRISPR and ORF).
    A well's label: 0, "control", if what is in it has no target, else 1 + the number of its target in the order in
    which targets appear when metadata is joined with platemap; of duplicate wells the last one holds. Images in wells
    that are not in the join have no label: left out, and counted by a warning.
    .classes: control and the targets. ValueError: no image has a label, an empty split, or as read_table.
    """

    def __init__(self, index, platemap, metadata, split, transform, load=load_cells, images=""):
        plate, meta = (read_table(path, columns) for path, columns in (
            (platemap, ("broad_sample", "well_position")), (metadata, ("broad_sample", ("target", "gene")))))
        wells = collections.defaultdict(list)             # untreated wells, and their row of metadata, name no sample
        for sample, well in zip(plate["broad_sample"], plate["well_position"]):
            wells[sample].append(well)
        targets, label_of = {None: 0}, {}
        for sample, target in zip(meta["broad_sample"], meta["target"]):
            for well in wells[sample]:
                label_of[well] = targets.setdefault(target, len(targets))
        rows = []
        for table in [index] if isinstance(index, str) else index:
            found = read_table(table, ("path", "well_loc"))
            rows += [(self.locate(path, table, images), well) for path, well in zip(found["path"], found["well_loc"])]
        where = f"{index if isinstance(index, str) else some(list(index))} ({split})"
        if again := len(rows) - len({path for path, _ in rows}):
            warnings.warn(f"{again} of {len(rows)} rows of {where} repeat a path: splits will share these images")
        lost = [well for path, well in rows if path is None or well not in label_of]
        if lost:
            wells = some(sorted({str(well) for well in lost}))
            message = f"{len(lost)} of {len(rows)} images have no label: their wells ({wells}) are not in {platemap} " \
                      f"joined with {metadata}, which names {some(sorted(map(str, label_of))) or 'no wells'}"
            if len(lost) == len(rows):
                raise ValueError(f"{where}: {message}")
            warnings.warn(f"{message}. They are left out.")
        samples = [(rows[i][0], label_of[rows[i][1]]) for i in split_of(len(rows), split)
                   if rows[i][0] is not None and rows[i][1] in label_of]
        if not samples:
            raise ValueError(f"{where}: no images in this split of {len(rows)}")
        super().__init__(samples, ["control", *list(targets)[1:]], load, transform, where)

    @staticmethod
    def locate(path, index, images):
        if path is None:
            return None
        old, equals, new = images.partition("=")
        if equals and path.startswith(old):
            return new + path[len(old):]
        if "://" in path or os.path.isabs(path):
            return path
        return f"{index.rpartition('/')[0]}/{path}" if "/" in index else path


# ---- Built-in data: drawn cells --------------------------------------------------------------------------------------

class Cells(Files):
    """Drawn cells in 8 channels, of 8 classes that differ only in which channels show the same.

    A cell holds organelles of two kinds, spots that lie at random, and each channel stains one kind: channel i of class
    k the first kind if k & i has an even number of bits, else the second (the rows of a Hadamard matrix). Both kinds
    are drawn alike, so no channel by itself says anything of the class, two tell its half, three its quarter; what
    counts is which channels agree. How brightly a channel is stained varies up to 64-fold from cell to cell.

    Item i, a function of (split, i) alone, is (transform(array (8, img_size, img_size) float32), label).
    .classes: which kind each channel shows, such as "ABABABAB".
    """

    code = np.array([[(k & i).bit_count() % 2 for i in range(8)] for k in range(8)])    # (class, channel)
    sizes = {"train": 2000, "val": 500, "test": 500}

    def __init__(self, split, transform, img_size=32):
        self.split, self.img_size = split, img_size
        classes = ["".join("AB"[kind] for kind in row) for row in self.code]
        super().__init__([(i, i % 8) for i in range(self.sizes[split])], classes, self.draw, transform,
                         f"the drawn cells ({split})")

    def draw(self, i, spots=8):
        rng = np.random.default_rng([list(self.sizes).index(self.split), i])
        axis = (np.arange(self.img_size) + 0.5) / self.img_size
        center, radius = rng.uniform(0.4, 0.6, 2), rng.uniform(0.3, 0.42, 2)
        distance, angle = np.sqrt(rng.uniform(0, 1, (2, spots))), rng.uniform(0, 2 * np.pi, (2, spots))    # (kind spot)
        y, x = (m + r * distance * f(angle) for m, r, f in zip(center, radius, (np.sin, np.cos)))
        width = 0.05 * rng.uniform(0.8, 1.25, (8, 1, 1))                    # of a spot: sharpness is the channel's
        ys, xs = (np.exp(-((axis - v[self.code[i % 8], :, None]) / width) ** 2 / 2) for v in (y, x))     # (8 spot S)
        image = np.einsum("cny,cnx->cyx", ys, xs)
        ellipse = sum(np.meshgrid(*(((axis - m) / r) ** 2 for m, r in zip(center, radius)), indexing="ij"))
        image += 0.3 / (1 + np.exp(8 * (ellipse - 1.1)))                    # the cell's body
        image *= 8 ** rng.uniform(-1, 1, (8, 1, 1))
        return (image + 0.1 * rng.standard_normal(image.shape)).astype(np.float32)      # (8 S S)

    @classmethod
    def best(cls, channels):
        """The accuracy in percent that a perfect classifier has on these channels."""
        rows = cls.code[:, list(channels)]
        return 100 * len({tuple(row ^ row[:1]) for row in rows}) / len(rows)


# ---- Dense tasks: a label for each pixel, or objects with boxes and masks --------------------------------------------

IGNORE_INDEX = 255                                        # label of the pixels that nobody labelled
PAD_VALUE = 114                                           # gray beside the images of detection


class DenseFiles(Files):
    """Images with more than one label. Item i is transform(*load(*samples[i])), None when the file is bad."""

    def __init__(self, samples, classes, load, transform, where):
        if not samples:
            raise ValueError(f"{where}: no images")
        super().__init__(samples, classes, load, transform, where)

    def __getitem__(self, i):
        try:
            found = self.load(*self.samples[i])
        except Exception as error:                        # as in Files
            self.mark_bad(i, error)
            return None
        return self.transform(*found)


def to_pixels(image):
    """RGB image -> (3 H W) uint8."""
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())


def normalized(pixels):
    """(3 H W) uint8 -> float32 by ImageNet's mean and standard deviation."""
    return extra("torchvision.transforms.v2").functional.normalize(pixels / 255, IMAGENET_MEAN, IMAGENET_STD)


def random_window(shape, ratio, size):
    """An image (height, width), enlarged by `ratio`, then cropped at random to at most size x size: which of its pixels
    that takes, and how large they become -> (top, left, height, width), [new height, new width].

    Cropping first and resizing only what is needed gives the same up to rounding: at ratio 2 in a quarter of the
    time."""
    taken = [min(length, math.ceil(size / ratio - 1e-6)) for length in shape]
    starts = [int(torch.randint(length - part + 1, ())) for length, part in zip(shape, taken)]
    return (*starts, *taken), [min(size, max(2, round(part * ratio))) for part in taken]     # torch fails at 1 x 1


def resized_crop(pixels, window, size, nearest=False):
    """Bilinear without smoothing, as OpenCV does it, on which the published numbers rest. Nearest: exact, since torch's
    (and OpenCV's) other one moves the labels half a pixel away from the image."""
    v2 = extra("torchvision.transforms.v2")
    mode = v2.InterpolationMode.NEAREST_EXACT if nearest else v2.InterpolationMode.BILINEAR
    return v2.functional.resized_crop(pixels, *window, size, mode, antialias=False)


def uniform(low, high):
    return low + (high - low) * torch.rand(()).item()


def distorted(pixels):
    """Photometric distortion (Liu et al. 2016, Single Shot MultiBox Detector, section 3.6): (3 H W) uint8 -> the same.

    Each with probability 0.5: +-32 levels of brightness, 0.5 to 1.5 times the contrast, the saturation, and a tenth of
    the circle of hues; contrast before or after the last two. (torchvision's brightness multiplies, its contrast keeps
    the mean: dark images would stay dark.)"""
    change = extra("torchvision.transforms.v2").functional
    steps = [lambda x: (x + uniform(-32, 32) / 255).clamp(0, 1),
             lambda x: change.adjust_saturation(x, uniform(0.5, 1.5)),
             lambda x: change.adjust_hue(x, uniform(-0.1, 0.1))]
    steps.insert(1 if torch.rand(()) < 0.5 else 3, lambda x: (x * uniform(0.5, 1.5)).clamp(0, 1))
    x = pixels / 255
    for step in steps:
        x = step(x) if torch.rand(()) < 0.5 else x
    return (255 * x).round().byte()


class SegmentationTransform:
    """(pixels (3 H W) uint8, labels (H W) uint8) -> (image (3 h w) float32, labels int64).

    The image is enlarged to a short side of `size`, a long side of at most 4 x size. train: times a random factor of
    `scale`; a crop of size x size, drawn again up to ten times while one class fills 75 % of it; flip; distort:
    photometric distortion. Else labels stay in the size of the file."""

    def __init__(self, size, train, scale=(0.5, 2.0), distort=True):
        self.size, self.train, self.scale, self.distort = size, train, scale, distort

    def __call__(self, pixels, labels):
        short, long = sorted(labels.shape)
        ratio = min(self.size / short, 4 * self.size / long)
        if not self.train:
            new = [max(1, round(length * ratio)) for length in labels.shape]
            return normalized(resized_crop(pixels, (0, 0, *labels.shape), new)), labels.long()
        ratio *= uniform(*self.scale)
        for _ in range(11):
            window, new = random_window(labels.shape, ratio, self.size)
            counts = labels[window[0]:window[0] + window[2], window[1]:window[1] + window[3]].flatten().bincount(
                minlength=256)[:IGNORE_INDEX]
            if counts.max() < 0.75 * counts.sum():
                break
        pixels, labels = resized_crop(pixels, window, new), resized_crop(labels[None], window, new, nearest=True)[0]
        if torch.rand(()) < 0.5:
            pixels, labels = pixels.flip(2), labels.flip(1)
        if self.distort:
            pixels = distorted(pixels)
        rest = (0, self.size - new[1], 0, self.size - new[0])
        return F.pad(normalized(pixels), rest), F.pad(labels.long(), rest, value=IGNORE_INDEX)


class DetectionTransform:
    """(pixels (3 H W) uint8, dict(labels (m), masks (m H W) uint8, id)) -> (image (3 size size) float32, target, info).

    The image is enlarged to fit size x size, padded at the right and below. train, "large-scale jitter": times a random
    factor of `scale`, a crop, flip. target: dict(boxes (n 4), labels (n), masks (n size size) bool) of the objects that
    are still to be seen, the boxes drawn tightly around the masks; info: dict(id, size: (height, width) without
    padding, original: that of the file)."""

    def __init__(self, size, train, scale=(0.1, 2.0)):
        self.size, self.train, self.scale = size, train, scale

    def __call__(self, pixels, target):
        original, masks = tuple(pixels.shape[1:]), target["masks"]
        ratio = self.size / max(original) * (uniform(*self.scale) if self.train else 1)
        window, new = random_window(original, ratio, self.size)             # in evaluation: all of it
        pixels = resized_crop(pixels, window, new)
        masks = resized_crop(masks, window, new, nearest=True) if len(masks) else masks.new_zeros(0, *new)
        if self.train and torch.rand(()) < 0.5:
            pixels, masks = pixels.flip(2), masks.flip(2)
        rest = (0, self.size - new[1], 0, self.size - new[0])
        seen = masks.bool().flatten(1).any(1)
        masks = F.pad(masks[seen], rest).bool()                             # (n size size)
        boxes = extra("torchvision.ops").masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])      # ends of pixels
        return (normalized(F.pad(pixels, rest, value=PAD_VALUE)),
                dict(boxes=boxes.float(), labels=target["labels"][seen], masks=masks),
                dict(id=target["id"], size=tuple(new), original=original))


def merge_detections(samples):
    """Images without equal numbers of objects: (images (B 3 H W), [target], [info])."""
    images, targets, infos = zip(*samples)
    return torch.stack(images), list(targets), list(infos)


def load_labels(classes, path, label_path):
    """An image and its map of labels, 0 for none, 1 for the first class -> pixels (3 H W), labels (H W) from 0."""
    pixels = to_pixels(load_rgb(path, upright=False))     # the map is of the pixels as they are stored
    with Image.open(label_path) as image:
        labels = np.array(image)                          # of a palette image: the numbers, not the colours
    with open(label_path, "rb") as file:
        depth, kind = file.read(26)[24:]                  # of a PNG
    if kind == 0 and depth in (2, 4):                     # few levels of gray, which Pillow spreads up to 255
        labels //= 255 // (2 ** depth - 1)
    if labels.shape != tuple(pixels.shape[1:]):
        raise ValueError(f"{label_path} is {' x '.join(map(str, labels.shape))} and not one number for each of "
                         f"{pixels.shape[1]} x {pixels.shape[2]} pixels")
    if labels.max() > classes:
        raise ValueError(f"{label_path} holds label {labels.max()}, there are {classes} classes")
    return pixels, torch.from_numpy(labels.astype(np.uint8) - np.uint8(1))  # 0 becomes 255, IGNORE_INDEX


def names_of_classes(path):
    """The names in a table like ADE20K's objectInfo150.txt: number, more columns, "name, synonyms"; a header."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        rows = [line.strip().split("\t") for line in file]
    names = sorted((int(row[0]), row[-1].split(",")[0].strip()) for row in rows if row[0].isdecimal())
    if not 0 < len(names) <= IGNORE_INDEX or [number for number, _ in names] != [*range(1, len(names) + 1)]:
        raise ValueError(f"{path}: the first column should number the classes from 1 to at most {IGNORE_INDEX}, once "
                         f"each, between tabulators; {len(names)} numbers were found")
    return [name for _, name in names]


class ADE20K(DenseFiles):
    """ROOT/images/{training,validation}/*.jpg with ROOT/annotations/{training,validation}/*.png, whose pixels are 0
    where nobody labelled them, else the number of a class from 1. As DenseFiles, of what load_labels gives.

    .classes: the last column of ROOT/objectInfo150.txt, which comes with the data set; without it numbers, 150.
    An image without its map, or a map without its image, is a bad file. FileNotFoundError: a folder is missing."""

    def __init__(self, root, split, transform):
        split = {"train": "training", "val": "validation"}[split]
        folders = [os.path.join(root, kind, split) for kind in ("images", "annotations")]
        for folder in folders:
            if not os.path.isdir(folder):
                raise FileNotFoundError(f"{folder}: no such folder. Expected {root}/images/{{training,validation}}/"
                                        f"*.jpg and {root}/annotations/{{training,validation}}/*.png")
        table = os.path.join(root, "objectInfo150.txt")
        classes = names_of_classes(table) if os.path.exists(table) else numbers(150)
        images, maps = {}, {}
        for found, folder, extensions in ((images, folders[0], EXTENSIONS), (maps, folders[1], (".png",))):
            for path in find_images(folder, extensions):
                stem = os.path.splitext(os.path.relpath(path, folder))[0]
                if stem in found:
                    raise ValueError(f"{found[stem]} and {path}: which of them is it? Remove one")
                found[stem] = path
        samples = [(images.get(stem) or os.path.join(folders[0], stem + ".jpg"),
                    maps.get(stem) or os.path.join(folders[1], stem + ".png")) for stem in sorted({*images, *maps})]
        super().__init__(samples, classes, functools.partial(load_labels, len(classes)), transform, folders[0])


def numbers(count):
    """Names for classes without names."""
    return [str(i) for i in range(1, count + 1)]


def run_lengths(text):
    """COCO's packed runs -> [int]. Five bits in each character, a sixth says that more follow; from the fourth run on
    the difference to the last but one."""
    runs, value, shift = [], 0, 0
    for character in text.encode():
        bits = character - 48
        value, shift = value | (bits & 31) << shift, shift + 5
        if not bits & 32:
            value -= (bits & 16) << shift - 4             # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs + [-1] * bool(shift)                      # a run without an end


def flaw_of(item, height, width):
    """What makes an object of COCO's layout unusable, or None. Polygons that cannot be drawn are taken out of it.

    pycocotools does not look: from such objects it crashes the process or makes masks of what lies in the memory."""
    def are_numbers(values):
        return isinstance(values, list) and all(isinstance(v, (int, float)) and -1e5 < v < 1e5 for v in values)

    outline, box = item.get("segmentation"), item.get("bbox")
    if not are_numbers(box) or len(box) != 4 or min(box[2:]) < 0:
        return "without a proper box"
    if isinstance(outline, dict):
        runs = outline.get("counts")
        runs = run_lengths(runs) if isinstance(runs, str) else runs
        if outline.get("size") != [height, width] or not isinstance(runs, list) or not all(
                isinstance(run, int) and run >= 0 for run in runs) or sum(runs) != height * width:
            return "whose mask is not of their image's size"
        return None
    item["segmentation"] = [polygon for polygon in (outline if isinstance(outline, list) else [])
                            if are_numbers(polygon) and len(polygon) >= 6 and len(polygon) % 2 == 0]
    return None if item["segmentation"] else "without a polygon of three points"


def object_mask(segmentation, height, width):
    """COCO's polygons, or a run-length encoding, packed or not -> mask (height width) uint8."""
    rle = extra("pycocotools.mask")
    if isinstance(segmentation, list):
        return rle.decode(rle.merge(rle.frPyObjects(segmentation, height, width)))
    return rle.decode(rle.frPyObjects(segmentation, height, width) if isinstance(segmentation["counts"], list) else
                      segmentation)


def load_objects(path, text):
    """An image and its objects, as Coco notes them -> pixels (3 H W), dict(labels (m), masks (m H W) uint8, id)."""
    known, pixels = json.loads(text), to_pixels(load_rgb(path, upright=False))
    H, W = pixels.shape[1:]
    if [H, W] != known["size"]:
        raise ValueError(f"the image has {H} x {W} pixels, its annotation says {' x '.join(map(str, known['size']))}")
    masks = [object_mask(segmentation, H, W) for segmentation in known["masks"]]
    return pixels, dict(labels=torch.tensor(known["labels"], dtype=torch.long), id=known["id"],
                        masks=torch.from_numpy(np.stack(masks) if masks else np.zeros((0, H, W), np.uint8)))


def as_coco(content):
    """The contents of an annotation file -> pycocotools' COCO, which otherwise prints how it gets on."""
    coco = extra("pycocotools.coco").COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(None):
        coco.createIndex()
    return coco


def by_id(items, kind):
    """{id: item}. ValueError: an id comes twice."""
    known = {}
    for item in items:
        if known.setdefault(item["id"], item) is not item:
            raise ValueError(f"the id {item['id']} belongs to more than one of the {kind}")
    return known


class Coco(DenseFiles):
    """ROOT/{train,val}2017/*.jpg with ROOT/annotations/instances_{train,val}2017.json. As DenseFiles, of what
    load_objects gives.

    .classes: the categories' names in the order of their ids, .category_ids: those ids.
    val: .coco, pycocotools' COCO of the ground truth, crowds included. train leaves out crowds, objects smaller than a
    pixel, images without any object. Objects that cannot be drawn are left out of both. A warning counts them all.
    FileNotFoundError: the folder or the annotations are missing. ValueError: no annotations of this layout, an object
    of an unknown category or image, an id that comes twice, no objects at all."""

    def __init__(self, root, split, transform):
        folder = os.path.join(root, f"{split}2017")
        path = os.path.join(root, "annotations", f"instances_{split}2017.json")
        for needed in (folder, path):
            if not os.path.exists(needed):
                raise FileNotFoundError(f"{needed}: not found. Expected {root}/{{train,val}}2017/*.jpg and "
                                        f"{root}/annotations/instances_{{train,val}}2017.json")
        left_out, truth, train = collections.Counter(), [], split == "train"
        try:
            with open(path, encoding="utf-8-sig") as file:
                content = json.load(file)
            categories = by_id(sorted(content["categories"], key=lambda c: c["id"]), "categories")
            label_of = {number: label for label, number in enumerate(categories)}
            images = {number: dict(id=number, size=[image["height"], image["width"]], labels=[], masks=[])
                      for number, image in by_id(content["images"], "images").items()}
            for item in content["annotations"]:
                if item["category_id"] not in label_of or item["image_id"] not in images:
                    raise ValueError(f"an object is of category {item['category_id']} in image {item['image_id']}, and "
                                     "there is no such category or image")
                image = images[item["image_id"]]
                polygons = item.get("segmentation")
                flaw = flaw_of(item, *image["size"])
                if not flaw and len(item["segmentation"]) < len(polygons):
                    left_out["objects' polygons, but not all of them"] += 1
                width, height = (0, 0) if flaw else item["bbox"][2:]
                reason = flaw or ("in a crowd" if item.get("iscrowd") else
                                  "smaller than a pixel" if min(width, height) < 1 else None)
                if flaw or train and reason:
                    left_out[f"objects {reason}"] += 1
                if not train and not flaw:                # numbered anew: to pycocotools an id of 0 is no object
                    truth.append(item | dict(id=len(truth) + 1, iscrowd=int(bool(item.get("iscrowd"))),
                                             area=item.get("area") or width * height))
                if not reason:
                    image["labels"].append(label_of[item["category_id"]])
                    image["masks"].append(item["segmentation"])
            samples = [(os.path.join(folder, image["file_name"]), images[image["id"]]) for image in content["images"]]
            if not any(known["labels"] for _, known in samples):
                raise ValueError(f"no object that can be used{': ' * bool(left_out)}{listed(left_out)}")
            self.coco, self.category_ids = None, list(categories)
            if not train:
                self.coco = as_coco(content | dict(annotations=truth))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: no annotations of COCO's layout ({type(error).__name__}: {error})") from error
        if train:
            kept = [sample for sample in samples if sample[1]["labels"]]
            if len(kept) < len(samples):
                left_out[f"of {len(samples):,} images without objects"] = len(samples) - len(kept)
            samples = kept
        if left_out:
            warnings.warn(f"{path}: left out {listed(left_out)}")
        # As one array of text: a loading process that only looks at 860,000 lists copies them all, because looking
        # counts references.
        texts = [json.dumps(known).encode() for _, known in samples]
        self.text, self.ends = np.frombuffer(b"".join(texts), np.uint8), np.cumsum([0, *map(len, texts)])
        names = [(name, i) for i, (name, _) in enumerate(samples)]
        super().__init__(names, [c["name"] for c in categories.values()], self.load_one, transform, folder)

    def load_one(self, path, i):
        return load_objects(path, self.text[self.ends[i]:self.ends[i + 1]].tobytes())


def listed(counts):
    return ", ".join(f"{count:,} {what}" for what, count in sorted(counts.items()))


# ---- Built-in data: drawn scenes -------------------------------------------------------------------------------------

class Scenes(DenseFiles):
    """Drawn scenes: up to four shapes, one over the other, on a meadow or on water, behind lines that mean nothing.

    A shape has any place, size, colour and texture, so that only its outline tells its class; it is tilted a bit, and
    of what lies below, the visible part counts. A meadow is green with blots, water blue with waves.

    objects=False: as DenseFiles of (pixels (3 S S) uint8, labels (S S) uint8), ground and shapes; True: of (pixels,
    dict(labels (m), masks (m S S) uint8, id)), shapes only. Item i is a function of (split, i) alone.
    .coco: as in Coco.
    """

    grounds, sizes = ("meadow", "water"), {"train": 4000, "val": 100}
    shapes = dict(disc=lambda u, v: np.hypot(u, v) < 0.9,                   # u, v: in units of the shape's radius
                  square=lambda u, v: np.maximum(abs(u), abs(v)) < 0.8,
                  triangle=lambda u, v: (v < 0.6) & (abs(u) < 0.55 * (v + 1)),
                  cross=lambda u, v: (np.maximum(abs(u), abs(v)) < 0.95) & (np.minimum(abs(u), abs(v)) < 0.32))

    def __init__(self, split, transform, img_size, objects):
        self.split, self.img_size, self.objects, self.coco = split, img_size, objects, None
        classes = [*self.shapes] if objects else [*self.grounds, *self.shapes]
        super().__init__([(i, split) for i in range(self.sizes[split])], classes, self.draw, transform,
                         f"the drawn scenes ({split})")
        if objects and split == "val":
            self.category_ids, self.coco = list(range(len(classes))), as_coco(self.annotations())

    def draw(self, i, split):
        rng, S = np.random.default_rng([list(self.sizes).index(split), i]), self.img_size
        axis = np.arange(S) + 0.5
        y, x = axis[:, None], axis                                          # of the pixels' centers
        ground = int(rng.integers(len(self.grounds)))
        darkest, brightest = (((0.1, 0.4, 0.1), (0.5, 0.7, 0.3)), ((0.1, 0.1, 0.1), (0.3, 0.5, 0.9)))[ground]
        colour = rng.uniform(darkest, brightest)                            # (3)
        image = self.paint(rng, colour, S / 12, axis, waves=ground == 1)    # (3 S S)
        owner, kinds = np.full((S, S), -1), []                              # which shape is seen at a pixel
        for number in range(int(rng.integers(1, 5))):
            kinds.append(int(rng.integers(len(self.shapes))))
            radius, angle = S * rng.uniform(0.16, 0.3), rng.uniform(-0.3, 0.3)
            dy, dx = ((axis - rng.uniform(0.1, 0.9) * S) / radius for axis in (y, x))
            u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
            inside = [*self.shapes.values()][kinds[-1]](u, v)               # (S S)
            owner[inside] = number
            texture = self.paint(rng, rng.uniform(0, 1, 3), S / 8, axis, waves=rng.random() < 0.5)
            image = np.where(inside, texture, image)
        for _ in range(int(rng.integers(0, 4))):                            # lines
            angle, place = rng.uniform(0, np.pi), rng.uniform(0.2, 0.8, 2) * S
            across = np.cos(angle) * (y - place[0]) + np.sin(angle) * (x - place[1])
            along = np.cos(angle) * (x - place[1]) - np.sin(angle) * (y - place[0])
            image = np.where((abs(across) < S / 64) & (abs(along) < S / 5), rng.uniform(0, 1, (3, 1, 1)), image)
        image = image + 0.04 * rng.standard_normal(image.shape)
        pixels = torch.from_numpy((255 * image.clip(0, 1)).astype(np.uint8))
        if not self.objects:
            labels = np.array([*(len(self.grounds) + kind for kind in kinds), ground], np.uint8)[owner]
            return pixels, torch.from_numpy(labels)
        masks = [owner == number for number in range(len(kinds))]
        seen = [number for number, mask in enumerate(masks) if mask.sum() >= (S / 16) ** 2]
        return pixels, dict(id=i, labels=torch.tensor([kinds[number] for number in seen], dtype=torch.long),
                            masks=torch.from_numpy(np.stack([masks[n] for n in seen] or np.zeros((0, S, S), bool)
                                                            ).astype(np.uint8)))

    @staticmethod
    def paint(rng, colour, wavelength, axis, waves):
        """colour (3) with waves of one direction, or with blots, the sum of waves of many directions -> (3 S S)."""
        count = 1 if waves else 8
        angle, phase = rng.uniform(0, 2 * np.pi, (2, count, 1))
        k = 2 * np.pi / (wavelength * rng.uniform(0.8, 1.25, (count, 1)))
        # sin(ky y + kx x + phase) for all pixels at once, as a matrix product of what it is along y and along x.
        along_y, along_x = np.exp(1j * k * np.sin(angle) * axis), np.exp(1j * (k * np.cos(angle) * axis + phase))
        texture = (along_y.T @ along_x).imag                                # (S S)
        return colour[:, None, None] + rng.uniform(0.05, 0.15) * texture / count ** 0.5

    def annotations(self):
        """What COCO's annotation file would say of these scenes."""
        rle, items = extra("pycocotools.mask"), []
        for i in range(len(self)):
            target = self.draw(i, self.split)[1]
            for label, mask in zip(target["labels"].tolist(), target["masks"].numpy()):
                coded = rle.encode(np.asfortranarray(mask))
                items.append(dict(id=len(items) + 1, image_id=i, category_id=label, iscrowd=0, segmentation=coded,
                                  area=float(mask.sum()), bbox=rle.toBbox(coded).tolist()))
        return dict(annotations=items, categories=[dict(id=k, name=name) for k, name in enumerate(self.classes)],
                    images=[dict(id=i, height=self.img_size, width=self.img_size) for i in range(len(self))])


# ---- Order, randomness, batches --------------------------------------------------------------------------------------

def stable_hash(*key):
    """128 bits from the numbers in `key`; unlike hash(), the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=16).digest(), "little")


class Seeded(Dataset):
    """`dataset` indexed by (epoch, index): every random choice of the item follows from (seed, epoch, index) alone.

    Transforms draw from three global generators (timm from `random` and NumPy, torchvision from torch): those are
    seeded. In the main process they belong to the training and get their states back afterwards.
    """

    def __init__(self, dataset, seed):
        self.dataset, self.seed = dataset, seed

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, pair):
        epoch, index = pair
        in_main = get_worker_info() is None
        if in_main:
            states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        bits = stable_hash(self.seed, epoch, index)
        random.seed(bits)
        np.random.seed(bits & 0xFFFFFFFF)                 # not torch's bits: the same algorithm, so the same numbers
        torch.default_generator.manual_seed(bits >> 64)   # torch.manual_seed would reseed the GPU too, and is slow
        try:
            return self.dataset[index]
        finally:
            if in_main:
                random.setstate(states[0])
                np.random.set_state(states[1])
                torch.set_rng_state(states[2])


class BatchSampler(Sampler):
    """Yields this process's batches of one epoch, each a list of (epoch, index).

    The global batch i is order[i * B * W : (i + 1) * B * W], and process `rank` of W takes every W-th index of it:
    W processes with batch_size B see together what one process sees with batch_size B * W.
    Without drop_last every index comes once over all processes: nothing is padded, so the last batch of a process may
    be shorter or missing. Keep collective calls out of such a loop.
    len() counts this process's batches in the whole epoch, skipped or not.
    """

    def __init__(self, n, batch_size, seed=0, shuffle=True, drop_last=True, rank=0, world_size=1):
        if drop_last and n < batch_size * world_size:
            raise ValueError(f"the training set has {n} samples, less than one batch of {batch_size * world_size} "
                             f"({batch_size} in each of {world_size} processes): lower --batch-size")
        self.n, self.batch_size, self.seed, self.shuffle, self.drop_last = n, batch_size, seed, shuffle, drop_last
        self.rank, self.world_size = rank, world_size
        self.set_epoch(0)

    def set_epoch(self, epoch, skip=0):
        """Choose the epoch of the next iteration, and how many of its batches this process has already seen."""
        self.epoch, self.skip = epoch, skip

    def __len__(self):
        full, rest = divmod(self.n, self.batch_size * self.world_size)
        return full + (not self.drop_last and rest > self.rank)

    def __iter__(self):
        epoch, order = self.epoch, torch.arange(self.n)
        if self.shuffle:
            key = stable_hash(self.seed, epoch) >> 64     # seed + epoch would give seed 1 the orders of seed 0
            order = torch.randperm(self.n, generator=torch.Generator().manual_seed(key))
        size = self.batch_size * self.world_size
        for i in range(self.skip, len(self)):
            yield [(epoch, index) for index in order[i * size:(i + 1) * size][self.rank::self.world_size].tolist()]


def collate(samples, refill, merge=default_collate):
    """Samples, None for a bad one -> a batch of the good ones, merge([sample]); refill: repeats them, so that the batch
    keeps the size of the recipe (and mixup an even one). None is good: None in evaluation, BadDataError with refill."""
    good = [sample for sample in samples if sample is not None]
    if not good and refill:
        raise BadDataError(f"all {len(samples)} samples of a batch are unreadable; the warnings above name the files")
    if not good:
        return None
    return merge([good[i % len(good)] for i in range(len(samples))] if refill else good)


def ignore_interrupt(worker):
    """Ctrl-C, and torchrun's SIGTERM, reach the workers too, and must not end them before the training has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)         # torch ends workers whose process has gone


@atexit.register
def end_workers():
    """At exit multiprocessing waits for loading processes that nobody has ended, for one because an error's traceback
    still holds their loader, and asks them by SIGTERM, which they ignore: without this it would wait for ever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def make_loader(dataset, batch_size, *, train, seed=0, workers=0, rank=0, world_size=1, pin_memory=None,
                merge=default_collate):
    """A DataLoader of (input, label) batches. train: shuffled, whole batches only; else in order and complete.

    batch_size: per process; workers: loading processes, 0 to load in this one; pin_memory: by default with a GPU;
    merge([sample]) makes a batch of samples.
    Call loader.batch_sampler.set_epoch(epoch, skip) before each epoch. It reaches persistent workers with the indices.
    """
    sampler = BatchSampler(len(dataset), batch_size, seed, train, train, rank, world_size)
    return DataLoader(Seeded(dataset, seed), batch_sampler=sampler, num_workers=workers,
                      worker_init_fn=ignore_interrupt,
                      collate_fn=functools.partial(collate, refill=train, merge=merge), persistent_workers=workers > 0,
                      pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
                      generator=torch.Generator())        # its own: else each epoch draws from the training's generator
