"""
ILSVRC's validation images as they are distributed: all in one folder, their classes in a file.

Such a file lies in DIR, in the development kit DIR/*devkit*, or in its data/:
ILSVRC2012_validation_ground_truth.txt, whose line i is the number of the class of image i (the
kit's meta.mat says which class that is); Kaggle's LOC_val_solution.csv; or lines such as
"ILSVRC2012_val_00000001.JPEG n01751748".
"""

import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from .images import EXTENSIONS, load_rgb
from .loading import Files, extra, first_few
from .survey import Finder, entries, require_same_classes

# What may be such a file; whether it is one, its content tells.
PATTERNS = ("*val*.txt", "*val*.csv")
FOLDERS = ("", "*devkit*/", "*devkit*/data/")


def is_flat(folder: str) -> bool:
    """Are there images in the folder, and no folders?"""
    if not os.path.isdir(folder):
        return False
    found = entries(folder)
    images = any(entry.name.lower().endswith(EXTENSIONS) for entry in found)
    return images and not Finder(folder, EXTENSIONS).folders(folder)


def flat_validation(root: str, folder: str, transform: Callable | None,
                    classes: list[str] | None = None) -> Files:
    """The images in `folder`, a sample each; root: where the ground truth is; classes: as for
    ImageFolder. ValueError: no ground truth, more than one, or one of other classes."""
    finder = Finder(folder, EXTENSIONS)
    paths = finder.find(folder)
    finder.report(folder)
    truth = ground_truth(root, folder, paths)
    found = sorted(set(truth.values()))
    if classes is None:
        classes = found
    require_same_classes(folder, found, classes)
    place = {name: label for label, name in enumerate(classes)}
    samples = [(path, place[truth[path]]) for path in paths]
    return Files(samples, list(classes), load_rgb, transform, folder)


def ground_truth(root: str, folder: str, paths: Sequence[str]) -> dict[str, str]:
    """{path of an image: the name of its class}."""
    candidates = {path for place in FOLDERS for pattern in PATTERNS
                  for path in Path(root).glob(place + pattern)}
    found = {}
    for path in sorted(candidates):
        rows = read_rows(path)
        if all(key_of(image, rows) in rows for image in paths):
            found[path] = rows
    names = [str(path) for path in found]
    if len(found) != 1:
        state = f"several files say which ({first_few(names)}): leave one there"
        if not found:
            state = ("no file says which. Put ILSVRC2012_validation_ground_truth.txt and meta.mat "
                     "of the unpacked development kit, Kaggle's LOC_val_solution.csv, or a "
                     f"val_labels.txt with lines such as IMAGE.JPEG n01440764, into {root}")
        raise ValueError(f"{folder} holds images without folders of classes, and {state}")
    [(path, rows)] = found.items()
    if len(rows) > len(paths):
        warnings.warn(f"{path}: {len(rows) - len(paths):,} of its {len(rows):,} lines are of "
                      f"images that are not in {folder}")
    truth = {image: rows[key_of(image, rows)] for image in paths}
    if not any(name.isdecimal() for name in truth.values()):
        return truth
    meanings = read_meta(path)
    unknown = sorted(set(truth.values()) - meanings.keys())
    if unknown:
        raise ValueError(f"{path}: meta.mat knows no class {first_few(unknown)}")
    return {image: meanings[number] for image, number in truth.items()}


def read_rows(path: Path) -> dict[str | int, str]:
    """A file of classes -> {name of an image, without its ending: its class}; where a line has the
    class only, {number of the line, from 1: class}. An image with two classes is left out."""
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [re.split(r"[\s,]+", line.strip()) for line in file if line.strip()]
    rows = {}
    doubtful = set()
    for number, words in enumerate(lines, 1):
        key = number
        if len(words) > 1:
            key = Path(words[0]).stem
        name = words[min(1, len(words) - 1)]
        if rows.setdefault(key, name) != name:
            doubtful.add(key)
    rows.pop("ImageId", None)                   # Kaggle's heading
    return {key: name for key, name in rows.items() if key not in doubtful}


def key_of(image: str, rows: dict) -> str | int:
    """The key in read_rows' table of an image .../ILSVRC2012_val_00000001.JPEG."""
    stem = Path(image).stem
    number = re.search(r"\d+$", stem)
    if stem in rows or not number:
        return stem
    return int(number[0])


def read_meta(path: Path) -> dict[str, str]:
    """meta.mat beside the development kit's file -> {number of a class: its name, n01440764}.

    Numbers in other files may count the classes in any order. ValueError: these do, or no meta.mat.
    """
    meta = path.with_name("meta.mat")
    if not path.name.endswith("ground_truth.txt") or not meta.is_file():
        raise ValueError(f"{path} gives numbers of classes, and only meta.mat of the development "
                         "kit, beside its ILSVRC2012_validation_ground_truth.txt, says which they "
                         "are: put both there")
    try:
        synsets = extra("scipy.io").loadmat(meta, squeeze_me=True)["synsets"]
        return {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in synsets}
    except (ImportError, MemoryError):
        raise
    except Exception as error:                  # a damaged file can fail in any way
        raise ValueError(f"{meta}: not the development kit's ({type(error).__name__}: {error})"
                         ) from error
