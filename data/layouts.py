"""
Where --data says that images are: in folders of classes, in tar shards (wds/DIR), in a data set of
Hugging Face (hfds/NAME_OR_DIR), or as ILSVRC and Kaggle distribute them, with all validation images
in one folder.

The classes of those are in the development kit, which lies in DIR, DIR/*devkit* or its data/, or in
Kaggle's table, DIR/LOC_val_solution.csv.
"""

import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from .huggingface import Rows, find_split
from .images import EXTENSIONS, ImageFolder, each_file, load_rgb
from .loading import Files, extra, first_few
from .shards import Shards, find_shards
from .survey import Finder, one_error, order_labels

KAGGLE = "ILSVRC/Data/CLS-LOC"      # where its folders train and val are


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


# ---- ILSVRC's validation images ------------------------------------------------------------------

def flat_validation(root: str, folder: str, transform: Callable | None,
                    classes: list[str] | None = None) -> Files:
    """The images in `folder`; root: where the ground truth is; classes: as for ImageFolder."""
    paths = list(each_file([folder], EXTENSIONS))
    names = ground_truth(root, folder, paths)
    found = sorted(set(names))
    place = {name: label for label, name in enumerate(found)}
    labels, classes = order_labels([place[name] for name in names], found, classes, folder)
    return Files(list(zip(paths, labels)), classes, load_rgb, transform, folder)


def ground_truth(root: str, folder: str, paths: Sequence[str]) -> list[str]:
    """The name of each image's class."""
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
    return names


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
