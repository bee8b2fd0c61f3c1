"""JUMP-CP: tables, Parquet or text, of images with their wells, and of what was in the wells."""

import collections
import csv
import gzip
import io
import os
import warnings
from collections.abc import Callable

from .cells import fetch, load_cells
from .loading import Files, extra, first_few
from .sites import normal_well, split_units
from .survey import one_error

MAX_BYTES = 2**30               # of an unpacked table
JUMP_CHANNELS = (*(f"fluorescence{i}" for i in range(1, 6)),
                 *(f"brightfield{i}" for i in range(1, 4)))
# Of plate BR00116991.
JUMP_MEAN = (4.0317, 1.5659, 3.7737, 3.4605, 4.1723, 6.7805, 6.7874, 6.7781)
JUMP_STD = (17.3184, 12.0159, 16.9661, 15.0648, 17.9641, 21.6388, 21.6706, 21.6395)


class JumpCP(Files):
    """As Files, of arrays (channels h w); .classes: control and the targets.

    index: path or URL, or a list of them, of tables with columns path and well_loc: one image each.
        Relative paths begin at the index's folder. images="OLD=NEW" replaces the beginning OLD of
        every path: for a copy of the files.
    platemap: table of well_position and broad_sample; metadata: of broad_sample and target, or
        gene (CRISPR and ORF). Wells A1, a01 and " A01 " are one.
    split_by: "site", the benchmark's own split, in which sites of a well part; "well": they do not.
    Images in wells without a label are left out, and counted.
    """

    def __init__(self, index: str | list[str], platemap: str, metadata: str, split: str,
                 transform: Callable, images: str = "", split_by: str = "site"):
        tables = [index] if isinstance(index, str) else list(index)
        where = f"{first_few(tables)} ({split})"
        label_of, classes, _ = labels_of_wells(platemap, metadata)
        listing = list_plates(tables, images, split_by)
        count = len(listing["path"])
        repeated = count - len(set(listing["path"]))
        if repeated:
            warnings.warn(f"{repeated} of {count} rows of {where} repeat a path: splits will "
                          "share these images")
        lost = [str(well) for well in listing["well"] if well not in label_of]
        if lost:
            message = (
                f"{len(lost)} of {count} images have no label: their wells "
                f"({first_few(sorted(set(lost)))}) are not in {platemap} joined with {metadata}, "
                f"which names {first_few(sorted(map(str, label_of))) or 'no wells'}")
            if len(lost) == count:
                raise ValueError(f"{where}: {message}")
            warnings.warn(f"{message}. They are left out.")
        rows = zip(listing["path"], listing["well"], listing["split"])
        samples = [(path, label_of[well]) for path, well, its_split in rows
                   if its_split == split and well in label_of]
        if not samples:
            raise ValueError(f"{where}: no images in this split of {count}")
        super().__init__(samples, classes, load_cells, transform, where)

    @staticmethod
    def locate(path: str | None, index: str, images: str) -> str | None:
        """Where the image is that the table `index` calls `path`."""
        if path is None:
            return None
        old, equals, new = images.partition("=")
        if equals and path.startswith(old):
            return new + path[len(old):]
        if "://" in path or os.path.isabs(path):
            return path
        folder, slash, _ = index.rpartition("/")
        return folder + slash + path


def list_index(tables: list[str], platemap: str, metadata: str, images: str, split_by: str
               ) -> dict[str, list]:
    """All images of the tables, also those in wells without a label; arguments as of JumpCP."""
    label_of, classes, compound_of = labels_of_wells(platemap, metadata)
    listing = list_plates(tables, images, split_by)
    wells = listing["well"]
    labels = [classes[label_of[well]] if well in label_of else None for well in wells]
    return {"path": listing["path"], "split": listing["split"], "label": labels,
            "compound": [compound_of.get(well) for well in wells], "plate": listing["plate"],
            "well": wells}


def list_plates(tables: list[str], images: str, split_by: str) -> dict[str, list]:
    """All images of the tables, without what is in the wells; arguments as of JumpCP.

    plate: the name of the table without folder and ending; of tables of one name, their paths."""
    plates = {table: table.rpartition("/")[2].partition(".")[0] for table in tables}
    if len(set(plates.values())) < len(plates):
        plates = {table: table for table in tables}
    rows = [(JumpCP.locate(path, table, images), plates[table], normal_well(well))
            for table in tables for path, well in zip(*read_table(table, "path", "well_loc"))]
    units = range(len(rows))
    if split_by == "well":
        units = [(plate, well) for _, plate, well in rows]
    split = split_units(units)
    rows = [(*row, split[unit]) for row, unit in zip(rows, units)]
    listing = {name: [row[i] for row in rows if row[0] is not None]
               for i, name in enumerate(["path", "plate", "well", "split"])}
    if lost := len(rows) - len(listing["path"]):
        warnings.warn(f"{lost} of {len(rows)} rows of {first_few(tables)} have no path and are "
                      "left out")
    return listing


def labels_of_wells(platemap: str, metadata: str) -> tuple[dict, list[str], dict]:
    """{well: label}, class names, {well: what is in it}, also of wells without a label.

    The label is 0, "control", if what is in the well has no target, else 1 + the number of its
    target in the order in which targets appear when metadata is joined with platemap; of
    duplicate wells the last one holds.
    """
    wells_of = collections.defaultdict(list)    # None: untreated wells, and their row of metadata
    sample_of_well = {}
    for sample, name in zip(*read_table(platemap, "broad_sample", "well_position")):
        well = normal_well(name)
        wells_of[sample].append(well)
        sample_of_well[well] = sample
    label_of_target = {None: 0}
    label_of_well = {}
    for sample, target in zip(*read_table(metadata, "broad_sample", "target|gene")):
        for well in wells_of[sample]:
            label = label_of_target.setdefault(target, len(label_of_target))
            label_of_well[well] = label
            sample_of_well[well] = sample
    return label_of_well, ["control", *list(label_of_target)[1:]], sample_of_well


# ---- Tables --------------------------------------------------------------------------------------

def read_table(path: str, *wanted: str) -> list[list[str | None]]:
    """The columns `wanted` of the table at `path` (as for fetch).

    Parquet or text (tabs, semicolons or commas), perhaps packed by gzip. "a|b" means a if the table
    has it, else b. None where there is nothing, or NaN.
    """
    content = fetch(path)
    with one_error(f"{path}: neither a Parquet nor a text table"):
        if content.startswith(b"\x1f\x8b"):
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read(MAX_BYTES + 1)
            if len(content) > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES} bytes when unpacked")
        if content.startswith(b"PAR1"):         # the released benchmark has some named .tsv
            columns = read_parquet(content)
        else:
            columns = read_text(content)
    counts = collections.Counter(name for name, _ in columns if name)
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"{path}: column {first_few(repeated)} comes twice: rename or remove one")
    table = dict(columns)
    found = []
    for names in wanted:
        name = next((name for name in names.split("|") if name in table), None)
        if name is None:
            raise ValueError(f"{path}: no column {names.replace('|', ' or ')}; it has "
                             f"{', '.join(table)}")
        found.append([None if v is None or v != v else str(v)           # noqa: PLR0124  NaN
                      for v in table[name]])
    return found


def read_parquet(content: bytes) -> list[tuple[str, list]]:
    pyarrow = extra("pyarrow")
    parquet = extra("pyarrow.parquet")
    sink = pyarrow.BufferOutputStream()     # a Python object that pyarrow's threads still hold when
    sink.write(content)                     # the interpreter ends aborts: so its own memory
    content = sink.getvalue()
    names = parquet.read_schema(pyarrow.BufferReader(content)).names
    if len(set(names)) < len(names):        # which read_table refuses, and pyarrow cannot read
        return [(name, []) for name in names]
    table = parquet.read_table(pyarrow.BufferReader(content), use_threads=False)
    return list(table.to_pydict().items())


def read_text(content: bytes) -> list[tuple[str, list[str | None]]]:
    encoding = "utf-8-sig"
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):          # a spreadsheet's Unicode text
        encoding = "utf-16"
    text = content.decode(encoding)
    header = text.lstrip().partition("\n")[0]
    delimiter = max(",;", key=header.count)
    if "\t" in header:
        delimiter = "\t"
    rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if row]
    nothing = dict.fromkeys(extra("pyarrow.csv").ConvertOptions().null_values)      # NA, NaN ...
    return [(name.strip(), [nothing.get(v, v) for v in values])
            for name, *values in zip(*rows, strict=True)]
