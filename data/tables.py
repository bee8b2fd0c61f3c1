"""Tables of wells and images: Parquet, or text as instruments and spreadsheets write it."""

import collections
import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterable

from .loading import extra, first_few

MAX_BYTES = 2**30               # of an unpacked table
# What pyarrow and pandas take for nothing in a text table.
NOTHING = {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND",
           "1.#QNAN", "N/A", "NA", "NULL", "NaN", "n/a", "nan", "null"}
WELL = re.compile(r"([A-Za-z]{1,2})0*([0-9]{1,2})")


def parse_table(content: bytes) -> dict[str, list]:
    """Parquet or text (tabs, semicolons or commas), perhaps packed by gzip -> {column: values}.

    ValueError: neither of them, damaged, a column that comes twice, more than MAX_BYTES unpacked.
    """
    try:
        if content.startswith(b"\x1f\x8b"):
            content = unpack(content)
        if content.startswith(b"PAR1"):         # the released benchmark has some named .tsv
            table = read_parquet(content)
        else:
            table = read_text(content)
    except RepeatedColumn:
        raise
    except (ValueError, OSError, NotImplementedError, csv.Error, EOFError, zlib.error) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"neither a Parquet nor a text table ({reason})") from error
    return table


class RepeatedColumn(ValueError):
    """Which of them is meant is not said."""


def check_names(names: Iterable[str]) -> None:
    counts = collections.Counter(name for name in names if name)
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise RepeatedColumn(f"column {first_few(repeated)} comes twice: rename or remove one")


def unpack(content: bytes) -> bytes:
    with gzip.open(io.BytesIO(content)) as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes when unpacked")
    return text


def read_parquet(content: bytes) -> dict[str, list]:
    pyarrow = extra("pyarrow")
    parquet = extra("pyarrow.parquet")
    sink = pyarrow.BufferOutputStream()     # a Python object that pyarrow's threads still hold when
    sink.write(content)                     # the interpreter ends aborts: so its own memory
    try:
        content = sink.getvalue()
        check_names(parquet.read_schema(pyarrow.BufferReader(content)).names)
        table = parquet.read_table(pyarrow.BufferReader(content), use_threads=False)
        return table.to_pydict()
    except RepeatedColumn:
        raise
    except (pyarrow.ArrowException, KeyError, TypeError, MemoryError, OverflowError) as error:
        raise ValueError(str(error)) from error


def read_text(content: bytes) -> dict[str, list[str | None]]:
    encoding = "utf-8-sig"
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):          # a spreadsheet's Unicode text
        encoding = "utf-16"
    text = content.decode(encoding)
    header = text.lstrip().partition("\n")[0]
    delimiter = max(",;", key=header.count)
    if "\t" in header:
        delimiter = "\t"
    rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if row]
    columns = list(zip(*rows, strict=True))
    check_names(name.strip() for name, *_ in columns)
    return {name.strip(): [None if v in NOTHING else v for v in values]
            for name, *values in columns}


def normal_well(name: str | None) -> str | None:
    """'A1', 'a01', ' A01 ' -> 'A01', AA1 -> AA01; what is no well of a plate is only stripped."""
    if name is None:
        return None
    if match := WELL.fullmatch(name.strip()):
        return f"{match[1].upper()}{int(match[2]):02d}"
    return name.strip()
