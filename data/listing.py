"""
What is to be embedded: all images of a data set with what is known of them, in all splits.

A listing is a dictionary of columns, lists of text of one length, None where nothing is known:
path, split, label, of plates also compound, well and what else tells wells and sites apart.
Here are those of folders and of built-in data; sites.py and plates.py have those of wells.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence

from .images import each_file
from .survey import require

SPLITS = ("train", "val", "test")
OWN_COLUMNS = ("path", "split", "label", "compound", "site")    # all others name a well


def pick(listing: Mapping[str, list], chosen: Sequence[int]) -> dict[str, list]:
    """The rows of these numbers."""
    return {name: [values[i] for i in chosen] for name, values in listing.items()}


def well_columns(listing: Mapping[str, list]) -> list[str]:
    """The columns that name a well together; none where wells are not known."""
    return [name for name in listing if name not in OWN_COLUMNS] if "well" in listing else []


def list_folder(root: str, extensions: Sequence[str]) -> dict[str, list]:
    """The images in ROOT/CLASS/ and below, in ROOT/SPLIT/CLASS/ where there is a ROOT/train or
    ROOT/val, or in ROOT itself, without a label."""
    require(root, hint="no such folder; check the path of the data set")
    has_splits = any(os.path.isdir(os.path.join(root, split)) for split in SPLITS[:2])
    listing = {"path": list(each_file([root], extensions)), "split": [], "label": []}
    for path in listing["path"]:
        *folders, _ = os.path.relpath(path, root).split(os.sep)
        split = None
        if has_splits and folders and folders[0] in SPLITS:
            split = folders.pop(0)
        listing["split"].append(split)
        listing["label"].append(folders[0] if folders else None)
    return listing


def list_built_in(sets: Mapping[str, Sequence], labels: Mapping[str, Sequence[int]]
                  ) -> tuple[dict[str, list], Callable]:
    """Built-in data sets, one a split, with the labels of their items -> the listing, with paths as
    "train/17", and load(path) -> the image as the data set gives it."""
    listing = {"path": [], "split": [], "label": []}
    for split, images in sets.items():
        listing["path"] += [f"{split}/{i}" for i in range(len(images))]
        listing["split"] += [split] * len(images)
        listing["label"] += [images.classes[label] for label in labels[split]]
    return listing, functools.partial(item_of, sets)


def item_of(sets: Mapping[str, Sequence], path: str):
    split, number = path.split("/")
    return sets[split][int(number)][0]
