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

import functools
import hashlib
import importlib
import math
import os
import random
import signal
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info


def extra(module):
    """Import a module of the scripts' extra, where it is needed: the digits need no timm, ImageNet no scikit-learn."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'data.py needs {module} ({error}): pip install ".[train]"') from error


# ---- Image files -----------------------------------------------------------------------------------------------------

Image, ImageOps = extra("PIL.Image"), extra("PIL.ImageOps")
EXTENSIONS = (".jpg", ".jpeg", ".png")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_BAD = 0.01                                            # a larger share of unreadable files stops the run


def load_rgb(path):
    """Decode the image file at `path` completely: an 8-bit RGB PIL image, upright. Raises what Pillow raises.

    Transparency is dropped, not blended, as torchvision's loader does: published accuracies are of such pixels.
    """
    with Image.open(path) as image:
        image.load()                                      # Pillow is lazy: a truncated file fails here, not later
        try:
            ImageOps.exif_transpose(image, in_place=True)
        except Exception:
            pass                                          # a garbled EXIF block beside good pixels: keep the pixels
        if image.mode.startswith("I"):                    # 16-bit gray: Pillow's convert() clips it to white
            image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")                 # the same colours, without a warning for each file
        return image.convert("RGB")


def some(names):
    """'a, b, c, d, e and 12 more'"""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def find_images(folder):
    """Sorted paths of the images in `folder` and below. scandir knows folder from file: no stat per file (1.28 M)."""
    found = []
    for entry in os.scandir(folder):
        if entry.name.startswith("."):                    # .ipynb_checkpoints; macOS' ._name.JPEG, which are no JPEGs
            continue
        if entry.is_dir():
            found += find_images(entry.path)
        elif entry.name.lower().endswith(EXTENSIONS):
            found.append(entry.path)
    return sorted(found)


class BadDataError(RuntimeError):
    """Too much of the data cannot be read."""


class ImageFolder(Dataset):
    """Images in ROOT/split/CLASS/ and below. Item i is (transform(PIL RGB image), label), None when the file is bad.

    classes: the class names in the order of the labels, by default the sorted folder names. Give the training split's
    `.classes` to the validation split, or a missing folder would shift the meaning of its labels in silence.
    .classes: list of names; .samples: list of (path, label); .bad_count: files found bad so far, by all workers.
    FileNotFoundError: ROOT or ROOT/split is missing. ValueError: no class folders, a class without images, folders
    other than `classes`. BadDataError, from an item: more than 1% of the files are bad.
    """

    def __init__(self, root, split, transform, classes=None):
        self.folder, self.transform = os.path.join(root, split), transform
        layout = f"Expected ROOT/{split}/CLASS/*.jpg (or .jpeg, .png)"
        for folder in (root, self.folder):
            if not os.path.isdir(folder):
                raise FileNotFoundError(f"{folder}: no such folder. {layout}; check the path of the data set.")
        found = sorted(e.name for e in os.scandir(self.folder) if e.is_dir() and not e.name.startswith("."))
        if not found:
            raise ValueError(f"{self.folder}: no class folders. {layout}; sort the images into one folder per class.")
        self.classes = found if classes is None else list(classes)
        missing, unknown = sorted(set(self.classes) - set(found)), sorted(set(found) - set(self.classes))
        if missing or unknown:
            raise ValueError(f"{self.folder}: its class folders are not the {len(self.classes)} classes of training. "
                             f"Missing: {some(missing) or 'none'}. Unknown: {some(unknown) or 'none'}. "
                             "Give both splits the same class folders.")
        files = {name: find_images(os.path.join(self.folder, name)) for name in self.classes}
        empty = [os.path.join(self.folder, name) for name in self.classes if not files[name]]
        if empty:
            raise ValueError(f"{some(empty)}: no images ({', '.join(EXTENSIONS)}) in this class folder. "
                             "Fill it, or remove it from every split.")
        self.samples = [(path, label) for label, name in enumerate(self.classes) for path in files[name]]
        self.bad = torch.zeros(len(self.samples), dtype=torch.uint8).share_memory_()    # flags that all workers see

    @property
    def bad_count(self):
        return int(self.bad.sum())

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        path, label = self.samples[i]
        try:
            image = load_rgb(path)
        except Exception as error:                        # decoders of damaged data raise nearly anything
            self.mark_bad(i, error)
            return None
        return self.transform(image), label               # outside the try: a fault of the transform is a bug, not data

    def mark_bad(self, i, error):
        if not self.bad[i]:                               # a later epoch tries the file again, in silence
            self.bad[i] = 1
            warnings.warn(f"{self.samples[i][0]}: skipped, {type(error).__name__}: {error}")
        share = len(self) / int(os.environ.get("WORLD_SIZE", 1))            # torchrun: each process sees only its own
        if self.bad_count > MAX_BAD * share:
            names = [self.samples[j][0] for j in self.bad.nonzero().flatten().tolist()]
            raise BadDataError(f"{len(names)} of the {share:.0f} images in {self.folder} cannot be read, more than "
                               f"{MAX_BAD:.0%}: {some(names)}. Check the disk; replace or delete them.")


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


def collate(samples, refill):
    """Samples, None for a bad one -> a batch of the good ones; refill: repeats them, so that the batch keeps the size
    of the recipe (and mixup an even one). None is good: None in evaluation, BadDataError with refill."""
    good = [sample for sample in samples if sample is not None]
    if not good and refill:
        raise BadDataError(f"all {len(samples)} samples of a batch are unreadable; the warnings above name the files")
    if not good:
        return None
    return default_collate([good[i % len(good)] for i in range(len(samples))] if refill else good)


def ignore_interrupt(worker):
    """Ctrl-C, and torchrun's SIGTERM, reach the workers too, and must not end them before the training has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)         # torch ends workers whose process has gone


def make_loader(dataset, batch_size, *, train, seed=0, workers=0, rank=0, world_size=1, pin_memory=None):
    """A DataLoader of (input, label) batches. train: shuffled, whole batches only; else in order and complete.

    batch_size: per process; workers: loading processes, 0 to load in this one; pin_memory: by default with a GPU.
    Call loader.batch_sampler.set_epoch(epoch, skip) before each epoch. It reaches persistent workers with the indices.
    """
    sampler = BatchSampler(len(dataset), batch_size, seed, train, train, rank, world_size)
    return DataLoader(Seeded(dataset, seed), batch_sampler=sampler, num_workers=workers,
                      worker_init_fn=ignore_interrupt,
                      collate_fn=functools.partial(collate, refill=train), persistent_workers=workers > 0,
                      pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
                      generator=torch.Generator())        # its own: else each epoch draws from the training's generator
