"""
A look at a data set as a whole, before anything is learnt from it. It takes seconds at most.

A single bad file is found when it is read (loading.py). Here is what only shows in the whole:
files that no reader takes, folders that links lead to twice, one class, labels that name nothing.
What cannot be meant is refused, by ValueError or FileNotFoundError; what may be meant is counted
and named in a warning.
"""

import collections
import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from .loading import Files, extra, first_few

LOOKED_AT = 200     # files, spread over the data set, are opened
# What file servers and systems put between the files of their users, with hidden files.
JUNK = {"thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "@recycle", "#recycle", "#snapshot",
        "~snapshot", "$recycle.bin", "system volume information", "lost+found", "__macosx"}
ORIENTATION = 0x0112    # EXIF's tag
SPLITS = {"train": {"train", "training"}, "val": {"val", "valid", "validation"}}    # their names
NO_CLASS = -1               # the label of a sample that has none


# ---- What goes wrong -----------------------------------------------------------------------------

@contextlib.contextmanager
def one_error(words: str) -> Iterator[None]:
    """Damaged files make decoders raise nearly anything: here it is a ValueError that begins with
    `words`."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{words} ({type(error).__name__}: {reason})") from error


def require(*paths: str, hint: str) -> None:
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path}: {hint}")


# ---- Folders -------------------------------------------------------------------------------------

class Finder:
    """Finds the files with certain endings below folders: each folder once, in the same order.

    root: the folder of all. .others: how many files of which other kinds there are; .links: those
    that lead to a folder above them, to one that is read anyway, or nowhere.
    """

    def __init__(self, root: str, extensions: Sequence[str]):
        self.root = os.path.realpath(root)
        self.extensions = tuple(extensions)
        self.others = collections.Counter()
        self.links = []
        self.known = set()

    def folders(self, folder: str) -> list[str]:
        """The sorted names of the folders in `folder`; find() enters them, but no link to them."""
        return sorted(entry.name for entry in entries(folder)
                      if is_folder(entry) and self.enter(entry))

    def find(self, folder: str) -> list[str]:
        """Sorted paths of the files in `folder` and below."""
        paths = []
        for entry in entries(folder):           # knows folder from file: no stat per file (1.28 M)
            if is_folder(entry):
                if self.enter(entry):
                    paths += self.find(entry.path)
            elif entry.name.lower().endswith(self.extensions):
                paths.append(entry.path)
            else:
                suffix = os.path.splitext(entry.name)[1].lower()
                self.others[suffix or "without ending"] += 1
        return sorted(paths)

    def enter(self, entry: os.DirEntry) -> bool:
        """Is this folder to be entered? Not twice, and not where a link leads up."""
        inner = os.path.realpath(entry.path)
        outer = os.path.realpath(os.path.dirname(entry.path))
        leads_up = inner in (os.path.commonpath([inner, outer]),
                             os.path.commonpath([inner, self.root]))
        if leads_up or inner in self.known:
            self.links.append(entry.path)
            return False
        self.known.add(inner)
        return True

    def kinds(self) -> str:
        """'3 .heic, 1 .txt'"""
        return first_few([f"{count:,} {kind}" for kind, count in self.others.most_common()])

    def instead(self) -> str:
        """For a message that there is nothing: what else there is."""
        return f" (but {self.kinds()})" if self.others else ""

    def report(self, where: str) -> None:
        """Warns of all that is not read."""
        if self.others:
            warnings.warn(f"{where}: not read are {self.others.total():,} files of other kinds "
                          f"than {', '.join(self.extensions)}: {self.kinds()}")
        if self.links:
            warnings.warn(f"{where}: not read are folders that are read elsewhere: "
                          f"{first_few(self.links)}")


def is_folder(entry: os.DirEntry) -> bool:
    """entry.is_dir() alone fails at a link to itself."""
    return os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()


def entries(folder: str) -> list[os.DirEntry]:
    """What is in a folder, sorted, links last, so that a folder is rather read by its own name."""
    with os.scandir(folder) as found:
        kept = [entry for entry in found
                if not entry.name.startswith(".") and entry.name.lower() not in JUNK]
    return sorted(kept, key=lambda entry: (entry.is_symlink(), entry.name))


# ---- Classes -------------------------------------------------------------------------------------

def require_classes(files: Files) -> None:
    """A classifier of one class would be right whatever it says."""
    if len(files.classes) != 1:
        return
    [name] = files.classes
    folder = os.path.join(files.where, name)
    inside = ""
    if os.path.isdir(folder) and (names := Finder(folder, ()).folders(folder)):
        inside = (f", and in it the folders {first_few(names)}. If those are the classes, move "
                  "them one folder up")
    raise ValueError(f"{files.where}: one class, {name!r}{inside}. There is nothing to tell apart")


def require_same_classes(where: str, found: Iterable[str], classes: Sequence[str]) -> None:
    """The labels of a split that has other classes than training would mean other things."""
    missing = sorted(set(classes) - set(found))
    unknown = sorted(set(found) - set(classes))
    if missing or unknown:
        raise ValueError(
            f"{where}: its classes are not the {len(classes)} classes of training. "
            f"Missing: {first_few(missing) or 'none'}. "
            f"Unknown: {first_few(unknown) or 'none'}. Give both splits the same classes.")


def order_labels(labels: Sequence[int], names: list[str] | None, classes: list[str] | None,
                where: str) -> tuple[list[int], list[str]]:
    """A reader's own labels -> labels in the order of `classes`, and `classes`.

    names: of the reader's labels; None: they are called "0", "1", ... classes: as for ImageFolder.
    NO_CLASS stays what it is. A class without samples is named in a warning.
    """
    largest = max(labels, default=NO_CLASS)
    if largest == NO_CLASS:
        raise ValueError(f"{where}: no sample has the number of its class")
    if names is None:
        if largest >= max(len(labels), len(classes or ())):
            raise ValueError(f"{where}: {len(labels)} samples, and class numbers up to {largest}. "
                             "They have to count the classes, from 0 on")
        names = [str(number) for number in range(largest + 1)]
        if classes is not None and names == classes[:len(names)]:
            names = classes                     # of the last ones there is no sample
    if largest >= len(names):
        raise ValueError(f"{where}: labels go up to {largest}, counted from 0, and there are names "
                         f"of {len(names)} classes")
    if classes is None:
        classes = names
    require_same_classes(where, names, classes)
    seen = set(labels)
    empty = [name for number, name in enumerate(names) if number not in seen]
    if empty:
        warnings.warn(f"{where}: no sample is of the classes {first_few(empty)}")
    place = {name: label for label, name in enumerate(classes)}
    order = [place[name] for name in names]
    return [label if label == NO_CLASS else order[label] for label in labels], list(classes)


# ---- Photographs that the camera turned ----------------------------------------------------------

def spread(paths: Sequence) -> list:
    """At most LOOKED_AT of the paths, evenly spread over them, in their order."""
    chosen = np.linspace(0, len(paths) - 1, min(LOOKED_AT, len(paths))).round().astype(int)
    return [paths[i] for i in chosen]


def report_turned(where: str, paths: Iterable[str], sized: bool = True) -> None:
    """Warns of photographs whose labels may be of the picture as stored, or as seen.

    sized: labels have a size, which tells the two apart, but for squares and half turns."""
    looked_at = spread(list(paths))
    unclear = [path for path in looked_at if may_be_turned(path, sized)]
    if unclear:
        warnings.warn(
            f"{where}: {len(unclear)} of {len(looked_at)} images looked at have an EXIF "
            "orientation, and no size tells whether their labels are of the turned image: "
            f"taken as stored are {first_few(unclear)}. If the labels are of what one sees, turn "
            "the files, such as by exiftran -ai or mogrify -auto-orient")


def may_be_turned(path: str, sized: bool) -> bool:
    with contextlib.suppress(Exception), extra("PIL.Image").open(path) as image:
        orientation = image.getexif().get(ORIENTATION, 1)
        told = sized and orientation in (5, 6, 7, 8) and image.width != image.height
        return orientation in range(2, 9) and not told
    return False            # it is a bad file, or its EXIF block is
