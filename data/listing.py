"""
What is to be embedded: all images of a data set with what is known of them, in all splits.

A listing is a dictionary of columns, lists of text of one length, None where nothing is known:
path, split, label, of plates also compound, well and what else tells wells and sites apart.
"""

import functools
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence

from .cells import (
    CELL_EXTENSIONS,
    labels_of_wells,
    rows_of_index,
    split_of,
    units_of_sites,
)
from .images import each_file
from .loading import first_few
from .sites import Site, group_sites, splits_of_units

SPLITS = ("train", "val", "test")
OWN_COLUMNS = ("path", "split", "label", "compound", "site")    # all others name a well
TAKEN = {"path", "split", "label", "sites", "features"}         # no group of a pattern is called so


def pick(listing: Mapping[str, list], chosen: Sequence[int]) -> dict[str, list]:
    """The rows of these numbers."""
    return {name: [values[i] for i in chosen] for name, values in listing.items()}


def well_columns(listing: Mapping[str, list]) -> list[str]:
    """The columns that name a well together; none where wells are not known."""
    return [name for name in listing if name not in OWN_COLUMNS] if "well" in listing else []


def list_folder(root: str, extensions: Sequence[str]) -> dict[str, list]:
    """The images in ROOT/CLASS/ and below, in ROOT/SPLIT/CLASS/ where there is a ROOT/train or
    ROOT/val, or in ROOT itself, without a label. FileNotFoundError, ValueError: there are none."""
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root}: no such folder; check the path of the data set")
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


def list_cells(root: str, pattern: str, split_by: str) -> tuple[dict[str, list], list[str]]:
    """The multi-channel images of a folder -> the listing, with a column for each group of the
    pattern, and names of the channels in it. Arguments and splits as of cell_folder, but labels are
    not needed. ValueError: as list_folder and group_sites; a group is called as another column."""
    listing = list_folder(root, CELL_EXTENSIONS)
    places = list(zip(listing["split"], listing["label"]))
    sites = [Site(path, place, None, {}) for path, place in zip(listing["path"], places)]
    names = []
    if pattern:
        groups = [name for name in re.compile(pattern).groupindex if name != "channel"]
        if clash := TAKEN.intersection(groups):
            raise ValueError(f"--pattern: rename its group {first_few(sorted(clash))}, which is "
                             "called as a column of the embedding")
        sites, names = group_sites(list(zip(listing["path"], places)), pattern, root)
        listing = {"path": [site.path for site in sites],
                   "split": [site.label[0] for site in sites],
                   "label": [site.label[1] for site in sites],
                   **{name: [site.groups[name] for site in sites] for name in groups}}
    if not any(listing["split"]):
        listing["split"] = splits_by_class(sites, listing["label"], split_by)
    return listing, names


def splits_by_class(sites: Sequence[Site], labels: Sequence[str | None], split_by: str) -> list:
    """The split that cell_folder puts each site into; None for those without a label."""
    splits = [None] * len(sites)
    known = {}
    for name in sorted(set(labels) - {None}):
        of_class = [i for i, label in enumerate(labels) if label == name]
        units = units_of_sites([sites[i] for i in of_class], split_by)
        for i, split in zip(of_class, splits_of_units(units, split_of, known)):
            splits[i] = split
    return splits


def list_index(tables: list[str], platemap: str, metadata: str, images: str, split_by: str
               ) -> dict[str, list]:
    """All images of JUMP-CP's tables, also those in wells without a label; arguments as of JumpCP.

    plate: the name of the table without folder and ending; of tables of one name, their paths."""
    label_of, classes, compound_of = labels_of_wells(platemap, metadata)
    plates = {table: table.rpartition("/")[2].partition(".")[0] for table in tables}
    if len(set(plates.values())) < len(plates):
        plates = {table: table for table in tables}
    rows = rows_of_index(tables, images, split_by)
    found = [row for row in rows if row.path is not None]
    if len(found) < len(rows):
        warnings.warn(f"{len(rows) - len(found)} of {len(rows)} rows of {first_few(tables)} have "
                      "no path and are left out")
    labels = [label_of.get(row.well) for row in found]
    return {"path": [row.path for row in found], "split": [row.split for row in found],
            "label": [None if label is None else classes[label] for label in labels],
            "compound": [compound_of.get(row.well) for row in found],
            "plate": [plates[row.table] for row in found], "well": [row.well for row in found]}


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
