"""
From single samples to the batches of a run: order, randomness, bad files.

1. A sample is a pure function of (seed, epoch, index): the sampler sends (epoch, index), and
   `Seeded` sets the random generators from it. The number of workers and processes and the point
   of resuming change nothing, not one pixel.
2. A bad file is skipped, counted and named, and many of them stop the run. One broken JPEG should
   not end the run of a week; a failing disk should not train it on a tenth of the data.
"""

import atexit
import functools
import hashlib
import importlib
import multiprocessing
import os
import pickle
import random
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from safety import STOP_SIGNALS

MAX_BAD = 0.01      # a larger share of unreadable files stops the run


# ---- Order, randomness, batches ------------------------------------------------------------------

def make_loader(dataset: Dataset, batch_size: int, *, train: bool, seed: int = 0, workers: int = 0,
                rank: int = 0, world_size: int = 1, merge: Callable = default_collate
                ) -> DataLoader:
    """A loader of (input, label) batches. train: shuffled, whole batches only; else in order, all.

    batch_size: per process; workers: loading processes, 0 to load in this one; merge([sample])
    makes a batch of samples.
    Call loader.batch_sampler.set_epoch(epoch, skip) before each epoch. It reaches workers that
    live on from epoch to epoch, because the epoch travels with every index.
    """
    return DataLoader(
        Seeded(dataset, seed),
        batch_sampler=BatchSampler(len(dataset), batch_size, seed, train, rank, world_size),
        collate_fn=functools.partial(collate, refill=train, merge=merge),
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=ignore_stop_signals,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),    # its own: else each epoch draws from the training's
    )


class BatchSampler(Sampler):
    """Yields this process's batches of one epoch, each a list of (epoch, index).

    The global batch i is order[i * b * w : (i + 1) * b * w], and process `rank` of w takes every
    w-th index of it: w processes with batch_size b see together what one process sees with
    batch_size b * w. train: order is shuffled, an incomplete last batch dropped. Else every index
    comes once over all processes: nothing is padded, so the last batch of a process may be
    shorter or missing. Keep collective calls out of such a loop.
    len() counts this process's batches in the whole epoch, skipped or not.
    """

    def __init__(self, n: int, batch_size: int, seed: int = 0, train: bool = True, rank: int = 0,
                 world_size: int = 1):
        self.n = n
        self.seed = seed
        self.train = train
        self.rank = rank
        self.world_size = world_size
        self.global_size = batch_size * world_size
        if train and n < self.global_size:
            raise ValueError(
                f"the training set has {n} samples, less than one batch of {self.global_size} "
                f"({batch_size} in each of {world_size} processes): lower --batch-size")
        self.set_epoch(0)

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose the next iteration's epoch, and how many of its batches were already seen."""
        self.epoch = epoch
        self.skip = skip

    def __len__(self) -> int:
        full, rest = divmod(self.n, self.global_size)
        return full + (not self.train and rest > self.rank)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        order = torch.arange(self.n)
        if self.train:
            key = stable_hash(self.seed, epoch) >> 64   # seed + epoch would repeat seed 0's orders
            order = torch.randperm(self.n, generator=torch.Generator().manual_seed(key))
        for batch in order.split(self.global_size)[self.skip:len(self)]:
            yield [(epoch, index) for index in batch[self.rank::self.world_size].tolist()]


class Seeded(Dataset):
    """`dataset` indexed by (epoch, index): an item's random choices follow from that and `seed`.

    Transforms draw from three global generators (timm from `random` and NumPy, torchvision from
    torch): those are seeded, and get their states back afterwards: in the main process they belong
    to the training.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def fingerprint(self) -> str:
        """What tells this list of samples from others; "1437 samples" if there is no list."""
        text = f"{len(self)} samples"
        samples = getattr(self.dataset, "samples", None)
        return text if samples is None else f"{text}, list {hash_samples(samples)}"

    def __getitem__(self, key: tuple[int, int]):            # (epoch, index)
        states = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        bits = stable_hash(self.seed, *key)
        random.seed(bits)
        np.random.seed(bits & 0xFFFFFFFF)   # not torch's bits: of one seed both make the same
        torch.default_generator.manual_seed(bits >> 64)     # torch.manual_seed: the GPU's too, slow
        try:
            return self.dataset[key[1]]
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


def stable_hash(*key: int) -> int:
    """128 bits from the numbers in `key`; unlike hash(), the same in all processes and machines."""
    text = ",".join(map(str, key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def collate(samples: Sequence, refill: bool, merge: Callable = default_collate):
    """merge([sample]) of the good samples, None without any; bad ones are None.

    refill: they are repeated, so that the batch keeps the size of the recipe (and mixup an even
    one). BadDataError: refill, and none is good."""
    good = [sample for sample in samples if sample is not None]
    if refill:
        if not good:
            raise BadDataError(f"all {len(samples)} samples of a batch are unreadable; the "
                               "warnings above name the files")
        good = [good[i % len(good)] for i in range(len(samples))]
    return merge(good) if good else None


def ignore_stop_signals(worker: int) -> None:
    """What ends the training must not end the workers before it has saved."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)       # torch ends workers whose process has gone


@atexit.register
def end_workers() -> None:
    """At exit multiprocessing asks the loading processes that are left to end, and waits.

    It asks by SIGTERM, which they ignore. Some are left when an error's traceback still holds
    their loader: without this the exit would wait for ever.
    """
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


# ---- Files, some of them bad ---------------------------------------------------------------------

class BadDataError(RuntimeError):
    """Too much of the data cannot be read."""


class Samples(Sequence):
    """A list of tuples as two arrays. A loading process that only looks at a list of a million
    tuples copies it, because looking counts references: 217 bytes a sample."""

    def __init__(self, samples: Iterable[tuple]):
        texts = [pickle.dumps(sample, pickle.HIGHEST_PROTOCOL) for sample in samples]
        self.ends = np.cumsum([0, *map(len, texts)])
        self.text = np.frombuffer(b"".join(texts), np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int | slice):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]             # IndexError; from the end, where negative
        return pickle.loads(self.text[self.ends[i]:self.ends[i + 1]])


def hash_samples(samples: Iterable[tuple]) -> str:
    """Of names as they are below the folder that all share, so that data may be moved."""
    digest = hashlib.blake2b(digest_size=8)
    for column in zip(*samples):
        if isinstance(column[0], str):
            shared = os.path.commonprefix([min(column), max(column)])
            start = shared.rfind("/") + 1
            column = (os.fsencode(path[start:]) for path in column)
        for value in column:
            digest.update(value if isinstance(value, bytes) else str(value).encode())
            digest.update(b"\0")
    return digest.hexdigest()


class Files(Dataset):
    """Labelled files. Item i is (transform(load(path)), label), None when the file is bad.

    samples: list of (path, label); load(path) may raise anything; where: what the data set is
    called in messages. .bad: flags (n) uint8 of the files found bad so far, by all workers.
    BadDataError, from an item: all files are bad, or more than one and more than 1% of them.
    """

    def __init__(self, samples: Iterable[tuple], classes: list[str], load: Callable,
                 transform: Callable | None, where: str):
        self.samples = Samples(samples)
        self.classes = classes
        self.load = load
        self.transform = transform
        self.where = where
        self.bad = torch.zeros(len(samples), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int):
        sample = self.samples[i]
        try:
            content = self.read(sample)
        except Exception as error:          # decoders of damaged data raise nearly anything
            self.mark_bad(i, error)
            return None
        return self.prepare(content, sample)    # outside the try: a fault of the transform is a bug

    def read(self, sample: tuple):
        return self.load(sample[0])

    def prepare(self, content, sample: tuple):
        return self.transform(content), sample[1]

    def mark_bad(self, i: int, error: Exception) -> None:
        """Note, name once and count the file of sample i. BadDataError: that was one too many."""
        reason = f"{type(error).__name__}: {error}"
        if not self.bad[i]:                 # a later epoch tries the file again, in silence
            self.bad[i] = 1
            warnings.warn(f"{self.samples[i][0]}: skipped, {reason}")
        names = [self.samples[j][0] for j in self.bad.nonzero().flatten().tolist()]
        if len(names) > max(1, MAX_BAD * len(self)) or len(names) == len(self):
            raise BadDataError(
                f"{len(names)} of the {len(self)} images in {self.where} cannot be read, more than "
                f"{MAX_BAD:.0%}: {first_few(names)}. Check the disk; replace or delete them. "
                f"The last one: {reason}")


def first_few(names: Sequence[str]) -> str:
    """'a, b, c, d, e and 12 more'"""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def extra(module: str) -> ModuleType:
    """Import a module of the scripts' extra, only where it is needed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'data needs {module} ({error}): pip install ".[train]"') from error
