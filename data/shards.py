"""
Images in the tar shards of webdataset.

timm's reader of shards is a stream: an epoch repeats some samples and misses others, processes
share what the shards happen to hold, and a resumed run does not see what the stopped one would
have. But a shard is not compressed, an image in it lies at an offset. Here the headers are read
once, before training, and all is as in folders of images: the order is ours, a resumed run ends in
the same bits, a bad sample is skipped, counted and named.

Nothing in a shard can run: of what lies beside an image only the number of its class is read.
"""

import io
import multiprocessing
import os
import re
import tarfile
from collections.abc import Callable

from .images import load_rgb
from .loading import Files, first_few
from .survey import NO_CLASS, SPLITS, Finder, one_error, order_labels, require

KINDS = ("jpg", "jpeg", "png", "webp")      # what an image is called, after its key
CLASS = re.compile(rb"\s*(\d{1,9})\s*")     # what KEY.cls holds
INDEXERS = min(8, os.cpu_count() or 1)      # processes that read headers


class Shards(Files):
    """Images in webdataset's shards: DIR/train-000.tar, DIR/imagenet-val-00.tar, DIR/val/0.tar ...

    A sample is KEY.jpg (or another of KINDS) and KEY.cls, the number of its class from 0 on, in the
    same shard.
    """

    def __init__(self, root: str, split: str, transform: Callable | None,
                 classes: list[str] | None = None):
        self.shards = find_shards(root, split)
        if not self.shards:
            words = ", ".join(sorted(SPLITS[split]))
            raise ValueError(f"{root}: no shards of this split. Expected *.tar, not compressed, "
                             f"with one of the words {words} in the name")
        with multiprocessing.Pool(min(INDEXERS, len(self.shards))) as pool:
            indices = pool.map(index_shard, self.shards, chunksize=1)
        found = [(f"{path}/{name}", label, number, offset, size)
                 for number, (path, index) in enumerate(zip(self.shards, indices))
                 for name, label, offset, size in index]
        where = f"the {split} shards in {root}"
        labels, classes = order_labels([sample[1] for sample in found], None, classes, where)
        samples = [(name, label, *place) for (name, _, *place), label in zip(found, labels)]
        super().__init__(samples, classes, load_rgb, transform, where)

    def read(self, sample: tuple):
        _, label, shard, offset, size = sample
        if size == 0:
            raise ValueError("no image has this key")
        if label == NO_CLASS:
            raise ValueError("beside it is no .cls with the number of its class")
        with open(self.shards[shard], "rb") as file:
            file.seek(offset)
            return self.load(io.BytesIO(file.read(size)))


def find_shards(root: str, split: str) -> list[str]:
    """Sorted paths of the split's shards."""
    require(root, hint="no such folder of shards. After wds/ comes the path of a folder on this "
                       "machine, such as wds/shards or wds//data/shards")
    paths = Finder(root, (".tar",)).find(root)
    return [path for path in paths
            if SPLITS[split] & {*re.split("[^a-z]+", os.path.relpath(path, root).lower())}]


def index_shard(path: str) -> list[tuple]:
    """-> (name, label, offset, size) of each sample, in the order of the shard.

    size 0: there is no image; label NO_CLASS: no class."""
    images = {}
    labels = {}
    twice = []
    with (one_error(f"{path}: no whole tar archive. Fetch it again; a compressed one has to be "
                    "unpacked by gunzip"),
          tarfile.open(path, "r:") as shard):           # "r:" refuses a compressed one
        while member := shard.next():
            shard.members = []                          # tarfile would keep all of them
            if member.size < 0:                         # and read in a circle
                raise ValueError(f"{member.name} has a negative size")
            folder, _, name = member.name.rpartition("/")
            key, _, kind = name.partition(".")
            key = os.path.join(folder, key)
            kind = kind.lower()
            if not member.isreg() or kind not in (*KINDS, "cls"):
                continue
            if key in (labels if kind == "cls" else images):
                twice.append(member.name)
            if kind == "cls":
                number = CLASS.fullmatch(shard.extractfile(member).read(20))
                labels[key] = int(number[1]) if number else NO_CLASS
            else:
                images[key] = (member.name, member.offset_data, member.size)
        shard.fileobj.seek(shard.offset)                # a damaged header ends the loop, too
        if shard.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"damaged or cut at byte {shard.offset:,}")
    if twice:
        raise ValueError(f"{path}: {first_few(twice)} is there twice, or in two formats")
    samples = []
    for key in {**images, **labels}:
        name, offset, size = images.get(key, (key, 0, 0))
        samples.append((name, labels.get(key, NO_CLASS), offset, size))
    return samples
