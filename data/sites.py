"""The raw layout of Cell Painting: a file for each channel of a site, wells of several sites."""

import os
import re
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from .loading import MAX_BAD, first_few
from .tables import normal_well

BETWEEN_FILES = " + "           # a sample's path names all files of a site
# How Harmony, ImageXpress, CellVoyager and Bio-Formats write the number of a channel.
CHANNEL_NUMBER = re.compile(r"(?:(?<=[-_. ])|^)(?:ch|w|c|channel)[-_]?(\d{1,2})(?=[^\d]|$)|"
                            r"(?<=Z\d\d)C(\d\d)(?=\.)", re.IGNORECASE)


class Site(NamedTuple):
    """An image: of one file, or of a file for each channel."""
    path: str                   # load_cells reads it
    label: int
    well: Hashable              # sites of one well are equal in this; None: not said
    groups: dict[str, str]      # what the pattern's groups say of it, but for the channel


def group_sites(samples: Sequence[tuple[str, int]], pattern: str, root: str
                ) -> tuple[list[Site], list[str]]:
    """Files whose path below root matches `pattern` -> (sites, names of the channels in order).

    The pattern is a regular expression. Files that differ in its group `channel` alone are one
    image; files that differ in `site` alone are of one well. Without `channel` each file is an
    image, and there are no names.
    Files that do not match are left out, and so are a few sites that lack a channel: warnings.
    ValueError: no file matches, two files for the same channel of a site, too many incomplete ones.
    """
    sites = {}                                  # key -> {channel: path}
    said = {}                                   # key -> the groups but for the channel
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
        said[key] = groups
        files = sites.setdefault(key, {})
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
    channels = sorted({channel for files in sites.values() for channel in files}, key=in_order)
    incomplete = [next(iter(files.values())) for files in sites.values()
                  if len(files) < len(channels)]
    if incomplete:
        message = (f"{root}: {len(incomplete)} of {len(sites)} sites lack some of the channels "
                   f"{', '.join(channels)}, as that of {first_few(incomplete)}")
        if len(incomplete) > max(1, MAX_BAD * len(sites)):
            raise ValueError(f"{message}. Let --pattern match complete sites only")
        warnings.warn(f"{message}. They are left out")
    found = []
    for key, files in sites.items():
        if len(files) == len(channels):
            path = BETWEEN_FILES.join(files[channel] for channel in channels)
            found.append(Site(path, *key[:2], said[key]))
    return found, [channel for channel in channels if channel]


def in_order(name: str) -> list:
    """A key for sorting: 2 before 10, as in "ch2", "ch10"."""
    return [part.zfill(20) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def splits_of_units(units: Sequence[Hashable], choose: Callable, known: dict) -> list[str]:
    """The split of each of `units`; equal ones fall into one, those in `known` where it says.

    choose(n, split) -> indices of a split of n; `known` learns the new ones."""
    new = list(dict.fromkeys(unit for unit in units if unit not in known))
    for split in ("train", "val", "test"):
        known.update((new[i], split) for i in choose(len(new), split))
    return [known[unit] for unit in units]


def named_by_channel(paths: Sequence[str]) -> bool:
    """Do names of a folder agree up to the number of a channel, as site1-ch1 and site1-ch2?"""
    numbers = {}
    for path in paths:
        if match := CHANNEL_NUMBER.search(os.path.basename(path)):
            found = numbers.setdefault(path[:path.rindex(match[0])], set())
            found.add(int(match[1] or match[2]))
    return any(2 <= len(found) <= 12 for found in numbers.values())
