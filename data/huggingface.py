"""
Images in data sets of Hugging Face: a name on the hub, or a folder of Parquet files.

Each row is read when it is its turn: all is as in folders of images. The package `datasets` copies
the rows into its cache first (HF_HOME says where). timm's reader of the same lies between us and it
with little gain: it takes a data set without a column `image` for one of empty images.

What comes with a data set does not run: from version 4 on the package has no loading scripts, and
older ones are refused.
"""

import importlib
import io
from collections.abc import Callable
from types import ModuleType

from .images import load_rgb
from .loading import Files, first_few
from .survey import NO_CLASS, SPLITS, one_error, order_labels


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
