"""From single samples to the batches of a run: order, randomness, bad files, tables.

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
import io
import multiprocessing
import pathlib
import random
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

MAX_BAD = 0.01      # a larger share of unreadable files stops the run


# ---- Order, randomness, batches ------------------------------------------------------------------

def make_loader(dataset: Dataset, batch_size: int, *, train: bool, seed: int = 0, workers: int = 0,
                rank: int = 0, world_size: int = 1, merge: Callable = default_collate
                ) -> DataLoader:
    """A loader of (input, label) batches. train: shuffled, whole batches only; else in order, all.

    batch_size: per process; workers: loading processes, 0 to load in this one; merge([sample])
    makes a batch. Call loader.batch_sampler.set_epoch(epoch, skip) before each epoch.
    """
    return DataLoader(
        Seeded(dataset, seed),
        batch_sampler=BatchSampler(len(dataset), batch_size, seed, train, rank, world_size),
        collate_fn=functools.partial(collate, refill=train, merge=merge),
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=ignore_interrupt,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),    # its own: else each epoch draws from the training's
    )


class BatchSampler(Sampler):
    """Yields this process's batches of one epoch, each a list of (epoch, index).

    Process `rank` of w takes every w-th index of each global batch: w processes with batch_size b
    see together what one sees with batch_size b * w. train: shuffled, an incomplete last batch
    dropped. Else every index comes once over all processes: nothing is padded, so the last batch
    of a process may be shorter or missing. Keep collective calls out of such a loop.
    len() counts this process's batches in the whole epoch, skipped or not.
    ValueError: train, and there is not one whole batch.
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
        for i in range(self.skip, len(self)):
            whole_batch = order[i * self.global_size:(i + 1) * self.global_size]
            indices = whole_batch[self.rank::self.world_size].tolist()
            yield [(epoch, index) for index in indices]


class Seeded(Dataset):
    """`dataset` indexed by (epoch, index): an item's random choices follow from that and `seed`.

    They come from the global generators of Python, NumPy and torch. In the main process those
    belong to the training, and get their states back afterwards.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]):
        if get_worker_info():
            return self.draw(*key)
        states = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        try:
            return self.draw(*key)
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])

    def draw(self, epoch: int, index: int):
        bits = stable_hash(self.seed, epoch, index)
        random.seed(bits)
        np.random.seed(bits & 0xFFFFFFFF)   # not torch's bits: one algorithm, so the same numbers
        torch.default_generator.manual_seed(bits >> 64)     # torch.manual_seed: the GPU's too, slow
        return self.dataset[index]


def stable_hash(*key: int) -> int:
    """128 bits from the numbers in `key`; unlike hash(), the same in all processes and machines."""
    text = ",".join(map(str, key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def collate(samples: Sequence, refill: bool, merge: Callable = default_collate):
    """merge([sample]) of the good samples; bad ones are None.

    refill: the good ones are repeated, so that the batch keeps the size of the recipe.
    If none is good: BadDataError with refill, else None.
    """
    good = [sample for sample in samples if sample is not None]
    if refill and not good:
        raise BadDataError(f"all {len(samples)} samples of a batch are unreadable; the warnings "
                           "above name the files")
    if refill:
        good = [good[i % len(good)] for i in range(len(samples))]
    return merge(good) if good else None


def ignore_interrupt(worker: int) -> None:
    """Ctrl-C and torchrun's SIGTERM must not end the workers before the training has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)   # torch ends workers whose process has gone


@atexit.register
def end_workers() -> None:
    """At exit multiprocessing would send those that an error's traceback still holds a SIGTERM,
    which they ignore, and wait for ever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


# ---- Files, some of them bad ---------------------------------------------------------------------

class BadDataError(RuntimeError):
    """Too much of the data cannot be read."""


class Files(Dataset):
    """Labelled files. Item i is (transform(load(path)), label), None when the file is bad.

    samples: list of (path, label); load(path) may raise anything; where: its name in messages.
    .bad: flags (n) uint8 of the files found bad so far, by all workers.
    BadDataError, from an item: more than one file and more than 1% of the files are bad.
    """

    def __init__(self, samples: list[tuple], classes: list[str], load: Callable,
                 transform: Callable | None, where: str):
        self.samples = samples
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
        """Note the file of sample i, and name it once. BadDataError: that was one too many."""
        reason = f"{type(error).__name__}: {error}"
        if not self.bad[i]:                 # a later epoch tries the file again, in silence
            self.bad[i] = 1
            warnings.warn(f"{self.samples[i][0]}: skipped, {reason}")
        names = [self.samples[j][0] for j in self.bad.nonzero().flatten().tolist()]
        if len(names) > max(1, MAX_BAD * len(self)):
            raise BadDataError(
                f"{len(names)} of the {len(self)} images in {self.where} cannot be read, more than "
                f"{MAX_BAD:.0%}: {first_few(names)}. Check the disk; replace or delete them. "
                f"The last one: {reason}")


def fetch(path: str) -> bytes:
    """The bytes at `path`: a local path, or a URL that fsspec knows (s3://, https://, memory://)."""
    if "://" not in path:
        return pathlib.Path(path).read_bytes()
    store, name = extra("fsspec").url_to_fs(path)   # in each process: connections survive no fork
    return store.cat_file(name)


def read_table(path: str, *wanted: str) -> list[list[str | None]]:
    """The columns `wanted` of the table at `path` (as for fetch): Parquet, or text (tabs, commas).

    "a|b" means a if the table has it, else b. None where there is nothing, or NaN.
    ValueError: a column is missing, or no table.
    """
    content = fetch(path)
    arrow = extra("pyarrow")
    try:
        if content.startswith(b"PAR1"):         # the released benchmark has some named .tsv
            table = extra("pyarrow.parquet").read_table(io.BytesIO(content))
        else:
            delimiter = "\t" if b"\t" in content.partition(b"\n")[0] else ","
            csv = extra("pyarrow.csv")
            texts = dict.fromkeys("|".join(wanted).split("|"), arrow.string())     # no numbers
            table = csv.read_csv(
                io.BytesIO(content), parse_options=csv.ParseOptions(delimiter=delimiter),
                convert_options=csv.ConvertOptions(column_types=texts, strings_can_be_null=True))
        known = table.column_names
    except (ValueError, OSError, NotImplementedError) as error:
        raise ValueError(f"{path}: neither a Parquet nor a text table ({error})") from error
    columns = []
    for names in wanted:
        name = next((name for name in names.split("|") if name in known), None)
        if name is None:
            raise ValueError(f"{path}: no column {names.replace('|', ' or ')}; it has "
                             f"{', '.join(known)}")
        values = table[name].cast(arrow.string()).to_pylist()
        columns.append([None if value == "nan" else value for value in values])
    return columns


def first_few(names: Sequence[str]) -> str:
    """'a, b, c, d, e and 12 more'"""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def extra(module: str) -> ModuleType:
    """Import a module of the scripts' extra where it is needed: the digits need no timm."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'data needs {module} ({error}): pip install ".[train]"') from error
