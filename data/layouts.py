"""
Where --data says that images are: in folders of classes, in tar shards (wds/DIR), in a data set of
Hugging Face (hfds/NAME_OR_DIR), or as ILSVRC and Kaggle distribute them, with all validation images
in one folder. All is as in folders of classes: the order is ours, a resumed run ends in the same
bits, a bad image is skipped, counted and named; and nothing that comes with the images can run.
"""

import csv
import importlib
import io
import multiprocessing
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from .images import EXTENSIONS, ImageFolder, each_file, load_rgb
from .loading import Files, extra, first_few
from .survey import NO_CLASS, SPLITS, Finder, one_error, order_labels, require

KAGGLE = "ILSVRC/Data/CLS-LOC"              # where its folders train and val are
KINDS = ("jpg", "jpeg", "png", "webp")      # what an image is called, after its key
CLASS = re.compile(rb"\s*(\d{1,9})\s*")     # what KEY.cls holds


def open_split(root: str, split: str, transform: Callable | None,
               classes: list[str] | None = None) -> Files:
    """The images of a split, "train" or "val". classes: as for ImageFolder."""
    kind, place = kind_of(root)
    if kind == "wds":
        return Shards(place, split, transform, classes)
    if kind == "hfds":
        return Rows(place, split, transform, classes)
    folder = os.path.join(place, split)
    if split == "val" and os.path.isdir(folder) and not Finder(folder, ()).folders(folder):
        return flat_validation(root, folder, transform, classes)
    return ImageFolder(place, split, transform, classes)


def has_split(root: str, split: str) -> bool:
    kind, place = kind_of(root)
    if kind == "wds":
        return bool(find_shards(place, split))
    if kind == "hfds":
        return find_split(place, split) is not None
    return os.path.isdir(os.path.join(place, split))


def class_order(root: str, names: Sequence[str], outputs: int) -> tuple[list[str], str]:
    """The classes `names` of --data for weights that do not name theirs -> order, note of it.

    ImageNet's folders n01440764 ... are sorted, and so is the output of models of ImageNet. Numbers
    are sorted as numbers. Shards and data sets of Hugging Face number their classes.
    """
    unnamed = "the weights do not name their classes"
    if kind_of(root)[0]:
        return list(names), (f"{unnamed}: those of the data are taken as it numbers them, "
                             f"{first_few(names)}")
    if all(name.isdecimal() for name in names):
        order = sorted(names, key=int)
        if len(set(map(int, names))) < len(names):
            raise ValueError(f"folders of the same number: {first_few(order)}; {unnamed}")
        return order, (f"{unnamed}: the folders {order[0]} to {order[-1]} are taken in the order "
                       "of their numbers, not of their names")
    if outputs != 1000 or len(names) != 1000:
        order = sorted(names)
        return order, f"{unnamed}: the folders are taken in alphabetical order, {first_few(order)}"
    known = extra("timm.data").ImageNetInfo().label_names()
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"{unnamed}, which are ImageNet's if the folders are {known[0]} to "
                         f"{known[-1]}, or their numbers 0 to 999. Neither are "
                         f"{first_few(unknown)}: rename the folders")
    return known, ""


def kind_of(root: str) -> tuple[str, str]:
    """--data -> how it is kept, "wds", "hfds" or "", and where."""
    kind, slash, place = str(root).partition("/")
    if kind in ("wds", "hfds") and slash:
        return kind, os.path.expanduser(place)
    inside = os.path.join(root, KAGGLE)
    if os.path.isdir(os.path.join(inside, "train")):
        return "", inside
    return "", root


# ---- Tar shards ----------------------------------------------------------------------------------
#
# timm's reader of shards is a stream: an epoch repeats some samples and misses others. But a shard
# is not compressed, an image in it lies at an offset: the headers are read once, before training.

class Shards(Files):
    """Images in webdataset's shards: DIR/train-000.tar, DIR/imagenet-val-00.tar, DIR/val/0.tar ...

    A sample is KEY.jpg (or another of KINDS) and KEY.cls, the number of its class, in one shard.
    """

    def __init__(self, root: str, split: str, transform: Callable | None,
                 classes: list[str] | None = None):
        self.shards = find_shards(root, split)
        if not self.shards:
            words = ", ".join(sorted(SPLITS[split]))
            raise ValueError(f"{root}: no shards of this split. Expected *.tar, not compressed, "
                             f"with one of the words {words} in the name")
        with multiprocessing.Pool(min(8, os.cpu_count() or 1, len(self.shards))) as pool:
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


# ---- Hugging Face --------------------------------------------------------------------------------
#
# The package copies the rows into its cache first (HF_HOME says where). timm's reader of the same
# takes a data set without a column `image` for one of empty images.

class Rows(Files):
    """Images in the column `image`, their classes in `label`.

    name: on the hub, or of a folder: DIR/train-*.parquet, DIR/validation-*.parquet.
    """

    def __init__(self, name: str, split: str, transform: Callable | None,
                 classes: list[str] | None = None):
        datasets = import_datasets()
        where = f"the {split} split of hfds/{name}"
        own_name = find_split(name, split)
        if own_name is None:
            raise ValueError(f"{where}: there is none; expected is one called "
                             f"{' or '.join(sorted(SPLITS[split]))}")
        with one_error(f"{where}: cannot be read"):
            rows = datasets.load_dataset(name, split=own_name)
            if not {"image", "label"} <= rows.features.keys():
                raise ValueError(f"its columns are {first_few(rows.column_names)}; expected are "
                                 "image and label")
            kind = rows.features["label"]
            if "int" not in str(getattr(kind, "dtype", "")):
                raise ValueError(f"its column label holds {kind}; expected are numbers of classes, "
                                 "counted from 0")
            labels = rows.with_format("arrow")["label"][:].fill_null(NO_CLASS).to_pylist()
            images = rows.select_columns("image")           # no other is decoded, nor is this one
            self.images = images.cast_column("image", datasets.Image(decode=False))
        labels = [max(label, NO_CLASS) for label in labels]
        labels, classes = order_labels(labels, getattr(kind, "names", None), classes, where)
        samples = [(f"{name}/{split} row {row}", label, row) for row, label in enumerate(labels)]
        super().__init__(samples, classes, load_rgb, transform, where)

    def read(self, sample: tuple):
        _, label, row = sample
        if label == NO_CLASS:
            raise ValueError("it has no class")
        image = self.images[row]["image"]
        if image is None:
            raise ValueError("it has no image")
        if image["bytes"] is None:                          # a file beside the data set
            return self.load(image["path"])
        return self.load(io.BytesIO(image["bytes"]))


def find_split(name: str, split: str) -> str | None:
    """What the data set calls the split."""
    with one_error(f"hfds/{name}: cannot be read"):
        names = import_datasets().get_dataset_split_names(name)
    return next((found for found in names if found in SPLITS[split]), None)


def import_datasets() -> ModuleType:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(f"--data hfds/... needs the package datasets ({error}): "
                          "pip install datasets") from error
    if int(datasets.__version__.partition(".")[0]) < 4:
        raise ImportError(f"datasets {datasets.__version__} may run code that comes with a data "
                          "set: pip install 'datasets>=4'")
    return datasets


# ---- ILSVRC's validation images ------------------------------------------------------------------

def flat_validation(root: str, folder: str, transform: Callable | None,
                    classes: list[str] | None = None) -> Files:
    """The images in `folder`; classes: as for ImageFolder.

    Which they are says the development kit, in ROOT, ROOT/*devkit* or its data/, or Kaggle's table.
    """
    paths = list(each_file([folder], EXTENSIONS))
    kits = [path for place in ("", "*devkit*/", "*devkit*/data/")
            for path in sorted(Path(root).glob(f"{place}ILSVRC2012_validation_ground_truth.txt"))]
    table = Path(root, "LOC_val_solution.csv")
    if kits:
        source, class_of = kits[0], read_kit(kits[0])
    elif table.is_file():
        source, class_of = table, read_kaggle(table)
    else:
        raise ValueError(f"{folder} holds images without folders of classes, and no file says "
                         "which. Put ILSVRC2012_validation_ground_truth.txt and meta.mat of the "
                         "unpacked development kit, or Kaggle's LOC_val_solution.csv, into "
                         f"{root}")
    names = [class_of.get(Path(path).stem) for path in paths]
    if None in names:
        raise ValueError(f"{paths[names.index(None)]}: no class by this name in {source}")
    found = sorted(set(names))
    place = {name: label for label, name in enumerate(found)}
    labels, classes = order_labels([place[name] for name in names], found, classes, folder)
    return Files(list(zip(paths, labels)), classes, load_rgb, transform, folder)


def read_kit(path: Path) -> dict[str, str]:
    """The development kit: line i is the number of the class of image i, and meta.mat beside it
    says which class that is -> {image: its class, n01440764}."""
    meta = path.with_name("meta.mat")
    with one_error(f"{path} and {meta}: not the development kit's"), open(meta, "rb") as file:
        synsets = extra("scipy.io").loadmat(file, squeeze_me=True)["synsets"]
        name_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        return {f"ILSVRC2012_val_{i:08}": name_of[int(number)]
                for i, number in enumerate(path.read_text().split(), 1)}


def read_kaggle(path: Path) -> dict[str, str]:
    """Kaggle's table: of each image its class, followed by boxes."""
    with one_error(f"{path}: not Kaggle's"), open(path, newline="") as file:
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
