"""Where --data says that images are: in folders of classes, as ILSVRC or Kaggle distribute them, in
tar shards (wds/DIR), in a data set of Hugging Face (hfds/NAME_OR_DIR)."""

import os
from collections.abc import Callable, Sequence

from . import huggingface, shards
from .ilsvrc import flat_validation, is_flat
from .images import ImageFolder
from .loading import Files, first_few
from .survey import order_of_classes

KAGGLE = "ILSVRC/Data/CLS-LOC"      # where its folders train and val are


def open_split(root: str, split: str, transform: Callable | None,
               classes: list[str] | None = None) -> Files:
    """The images of a split, "train" or "val". classes and errors: as for ImageFolder, Shards, Rows
    and flat_validation."""
    kind, place = kind_of(root)
    if kind == "wds":
        return shards.Shards(place, split, transform, classes)
    if kind == "hfds":
        return huggingface.Rows(place, split, transform, classes)
    folder = os.path.join(place, split)
    if split == "val" and is_flat(folder):
        return flat_validation(root, folder, transform, classes)
    return ImageFolder(place, split, transform, classes)


def has_split(root: str, split: str) -> bool:
    kind, place = kind_of(root)
    if kind == "wds":
        return bool(shards.find_shards(place, split))
    if kind == "hfds":
        return huggingface.find_split(place, split) is not None
    return os.path.isdir(os.path.join(place, split))


def class_order(root: str, names: Sequence[str], outputs: int) -> tuple[list[str], str]:
    """The classes `names` of --data for weights that do not name theirs -> order, note of it.

    Shards and data sets of Hugging Face number their classes; else as survey.order_of_classes."""
    if not kind_of(root)[0]:
        return order_of_classes(names, outputs)
    return list(names), ("the weights do not name their classes: those of the data are taken as it "
                         f"numbers them, {first_few(names)}")


def kind_of(root: str) -> tuple[str, str]:
    """--data -> how it is kept, "wds", "hfds" or "", and where."""
    kind, slash, place = str(root).partition("/")
    if kind in ("wds", "hfds") and slash:
        return kind, os.path.expanduser(place)
    inside = os.path.join(root, KAGGLE)
    if os.path.isdir(os.path.join(inside, "train")):
        return "", inside
    return "", root
