"""
Folders of multi-channel images: classes, sites, wells, splits.

Without a pattern each file is an image. The raw layout of Cell Painting has a file for each channel
of a site, and wells of several sites: a pattern says what the names mean.

A listing is what is to be embedded: a dictionary of columns, lists of text of one length, None
where nothing is known: path, split, label, perhaps compound, well and what tells wells and sites
apart.
"""

import functools
import os
import re
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .cells import BETWEEN_FILES, CELL_EXTENSIONS, load_cells
from .images import ImageFolder, each_file
from .loading import MAX_BAD, Files, first_few
from .survey import require

SPLITS = ("train", "val", "test")
OWN_COLUMNS = ("path", "split", "label", "compound", "site")    # all others name a well
TAKEN = {"path", "split", "label", "sites", "features"}     # no group of a pattern is called so
WELL = re.compile(r"([A-Za-z]{1,2})0*([0-9]{1,2})")
# How Harmony, ImageXpress, CellVoyager and Bio-Formats write the number of a channel.
CHANNEL_NUMBER = re.compile(r"(?:(?<=[-_. ])|^)(?:ch|w|c|channel)[-_]?(\d{1,2})(?=[^\d]|$)|"
                            r"(?<=Z\d\d)C(\d\d)(?=\.)", re.IGNORECASE)


class Site(NamedTuple):
    """An image: of one file, or of a file for each channel."""
    path: str                   # load_cells reads it
    label: Hashable
    well: Hashable              # sites of one well are equal in this; None: not said
    groups: dict[str, str]      # what the pattern's groups say of it, but for the channel


def cell_folder(root: str, split: str, transform: Callable, classes: list[str] | None = None,
                pattern: str = "", split_by: str = "") -> Files:
    """Multi-channel images in ROOT/SPLIT/CLASS/, as ImageFolder, of arrays (channels h w).

    Without a folder ROOT/train: in ROOT/CLASS/, each class split 60 : 20 : 20, so that the sites of
    a well fall into one split, unless split_by is "site".
    pattern: see group_sites; names of channels in it become .channels.
    """
    sorted_already = os.path.isdir(os.path.join(root, "train"))
    files = ImageFolder(root, split if sorted_already else "", transform, classes, load_cells,
                        CELL_EXTENSIONS)
    sites, names = group_sites(files.samples, pattern, root)
    if split_by == "well" and any(site.well is None for site in sites):
        raise ValueError("--split-by well: the wells are not known without a --pattern that has a "
                         "group (?P<well>...)")
    where = files.where
    if not sorted_already:
        where = f"{root} ({split})"
        splits = split_sites(sites, [files.classes[site.label] for site in sites], split_by)
        sites = [site for site, its_split in zip(sites, splits) if its_split == split]
        for label, name in enumerate(files.classes):
            if not any(site.label == label for site in sites):
                count = sum(its_label == label for _, its_label in files.samples)
                raise ValueError(
                    f"{root}/{name}: {count} images are too few, or of too few wells (--split-by "
                    f"site parts them), to split 60 : 20 : 20: {split!r} gets none. Give it at "
                    "least 3, or sort the files into train/CLASS, val/CLASS and test/CLASS")
    samples = [(site.path, site.label) for site in sites]
    files = Files(samples, files.classes, load_cells, transform, where)
    files.channels = names
    return files


# ---- Listings ------------------------------------------------------------------------------------

def list_cells(root: str, pattern: str, split_by: str) -> tuple[dict[str, list], list[str]]:
    """The images of a folder -> the listing, with a column for each group of the pattern, and names
    of the channels in it. Arguments and splits as of cell_folder, but labels are not needed."""
    groups = [name for name in re.compile(pattern).groupindex if name != "channel"]
    if clash := TAKEN.intersection(groups):
        raise ValueError(f"--pattern: rename its group {first_few(sorted(clash))}, which is "
                         "called as a column of the embedding")
    files = list_folder(root, CELL_EXTENSIONS)
    places = zip(files["split"], files["label"])
    sites, names = group_sites(list(zip(files["path"], places)), pattern, root)
    splits = [site.label[0] for site in sites]
    labels = [site.label[1] for site in sites]
    if not any(splits):
        splits = split_sites(sites, labels, split_by)
    listing = {"path": [site.path for site in sites], "split": splits, "label": labels}
    return listing | {name: [site.groups[name] for site in sites] for name in groups}, names


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


# ---- Splits --------------------------------------------------------------------------------------

def split_sites(sites: Sequence[Site], labels: Sequence[str | None], split_by: str
                ) -> list[str | None]:
    """The split of each site, None without a label: class by class 60 : 20 : 20 of the wells, or of
    the sites where no wells are known, or split_by is "site"."""
    units = [site.path for site in sites]
    if split_by != "site":
        units = [site.well or site.path for site in sites]
    known = {}
    for name in sorted(set(labels) - {None}):
        of_class = [unit for unit, label in zip(units, labels) if label == name]
        known |= split_units([unit for unit in of_class if unit not in known])
    return [None if label is None else known[unit] for unit, label in zip(units, labels)]


def split_units(units: Sequence[Hashable]) -> dict[Hashable, str]:
    """The split of each; equal units are one."""
    units = list(dict.fromkeys(units))
    return {units[i]: split for split in SPLITS for i in split_of(len(units), split)}


def split_of(n: int, split: str) -> np.ndarray:
    """Indices of a split of n samples, as JUMP-CP's: 60% "train", 20% "val", 20% "test"."""
    first, last = {"train": (0, 6), "val": (6, 8), "test": (8, 10)}[split]
    return np.sort(np.random.RandomState(0).permutation(n)[n * first // 10:n * last // 10])


# ---- What names say ------------------------------------------------------------------------------

def group_sites(samples: Sequence[tuple[str, Hashable]], pattern: str, root: str
                ) -> tuple[list[Site], list[str]]:
    """Files whose path below root matches `pattern` -> (sites, names of the channels in order).

    The pattern is a regular expression. Files that differ in its group `channel` alone are one
    image; files that differ in `site` alone are of one well. Without `channel` each file is an
    image, and there are no names.
    Files that do not match are left out, and so are a few sites that lack a channel: warnings.
    """
    sites = {}                                  # (label, well, ...) -> (groups, {channel: path})
    left_out = []
    for path, label in samples:
        name = os.path.relpath(path, root).replace(os.sep, "/")
        match = re.search(pattern, name)
        if not match:
            left_out.append(name)
            continue
        groups = match.groupdict()
        channel = groups.pop("channel", None) or ""
        well = None
        if "well" in groups:
            groups["well"] = normal_well(groups["well"])
            well = tuple(value for group, value in groups.items() if group != "site")
        key = (label, well, *groups.values())
        if "channel" not in match.re.groupindex:
            key = (*key, name)
        _, files = sites.setdefault(key, (groups, {}))
        if channel in files:
            raise ValueError(
                f"{files[channel]} and {path} are both channel {channel!r} of one site: the "
                "--pattern needs a group for what tells them apart, as (?P<plate>...)")
        if BETWEEN_FILES in path:
            raise ValueError(f"{path}: a name with {BETWEEN_FILES!r} in it. Rename it")
        files[channel] = path
    if not sites:
        raise ValueError(f"{root}: none of {len(samples)} files matches --pattern {pattern}, as "
                         f"{first_few(left_out)}")
    if left_out:
        warnings.warn(f"{root}: {len(left_out)} of {len(samples)} files do not match --pattern and "
                      f"are left out: {first_few(left_out)}")
    channels = sorted({name for _, files in sites.values() for name in files}, key=in_order)
    found = []
    incomplete = []
    for (label, well, *_), (groups, files) in sites.items():
        if len(files) < len(channels):
            incomplete.append(next(iter(files.values())))
        else:
            path = BETWEEN_FILES.join(files[channel] for channel in channels)
            found.append(Site(path, label, well, groups))
    if incomplete:
        message = (f"{root}: {len(incomplete)} of {len(sites)} sites lack some of the channels "
                   f"{', '.join(channels)}, as that of {first_few(incomplete)}")
        if len(incomplete) > max(1, MAX_BAD * len(sites)):
            raise ValueError(f"{message}. Let --pattern match complete sites only")
        warnings.warn(f"{message}. They are left out")
    return found, [channel for channel in channels if channel]


def normal_well(name: str | None) -> str | None:
    """'A1', 'a01', ' A01 ' -> 'A01', AA1 -> AA01; what is no well of a plate is only stripped."""
    if name is None:
        return None
    if match := WELL.fullmatch(name.strip()):
        return f"{match[1].upper()}{int(match[2]):02d}"
    return name.strip()


def in_order(name: str) -> list:
    """A key for sorting: 2 before 10, as in "ch2", "ch10"."""
    return [part.zfill(20) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def named_by_channel(paths: Sequence[str]) -> bool:
    """Do names of a folder agree up to the number of a channel, as site1-ch1 and site1-ch2?"""
    numbers = {}
    for path in paths:
        if match := CHANNEL_NUMBER.search(os.path.basename(path)):
            found = numbers.setdefault(path[:path.rindex(match[0])], set())
            found.add(int(match[1] or match[2]))
    return any(2 <= len(found) <= 12 for found in numbers.values())
