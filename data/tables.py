"""Tables of wells and images: Parquet, or text as instruments and spreadsheets write it."""

import collections
import csv
import gzip
import io
import re
import zlib

from .loading import extra, first_few

MAX_BYTES = 2**30               # of an unpacked table
# What pyarrow and pandas take for nothing in a text table.
NOTHING = dict.fromkeys(["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan",
                         "1.#IND", "1.#QNAN", "N/A", "NA", "NULL", "NaN", "n/a", "nan", "null"])
WELL = re.compile(r"([A-Za-z]{1,2})0*([0-9]{1,2})")


def parse_table(content: bytes) -> dict[str, list]:
    """Parquet or text (tabs, semicolons or commas), perhaps packed by gzip -> {column: values}.

    ValueError: neither of them, damaged, a column that comes twice, more than MAX_BYTES unpacked.
    """
    try:
        if content.startswith(b"\x1f\x8b"):
            content = unpack(content)
        if content.startswith(b"PAR1"):         # the released benchmark has some named .tsv
            columns = read_parquet(content)
        else:
            columns = read_text(content)
    except (ValueError, OSError, NotImplementedError, csv.Error, EOFError, zlib.error) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"neither a Parquet nor a text table ({reason})") from error
    counts = collections.Counter(name for name, _ in columns if name)
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"column {first_few(repeated)} comes twice: rename or remove one")
    return dict(columns)


def unpack(content: bytes) -> bytes:
    with gzip.open(io.BytesIO(content)) as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes when unpacked")
    return text


def read_parquet(content: bytes) -> list[tuple[str, list]]:
    pyarrow = extra("pyarrow")
    parquet = extra("pyarrow.parquet")
    sink = pyarrow.BufferOutputStream()     # a Python object that pyarrow's threads still hold when
    sink.write(content)                     # the interpreter ends aborts: so its own memory
    try:
        content = sink.getvalue()
        names = parquet.read_schema(pyarrow.BufferReader(content)).names
        if len(set(names)) < len(names):        # it is refused by these, and pyarrow cannot read it
            return [(name, []) for name in names]
        table = parquet.read_table(pyarrow.BufferReader(content), use_threads=False)
        return list(table.to_pydict().items())
    except (pyarrow.ArrowException, KeyError, TypeError, MemoryError, OverflowError) as error:
        raise ValueError(str(error)) from error


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
    return [(name.strip(), [NOTHING.get(v, v) for v in values])
            for name, *values in zip(*rows, strict=True)]


def normal_well(name: str | None) -> str | None:
    """'A1', 'a01', ' A01 ' -> 'A01', AA1 -> AA01; what is no well of a plate is only stripped."""
    if name is None:
        return None
    if match := WELL.fullmatch(name.strip()):
        return f"{match[1].upper()}{int(match[2]):02d}"
    return name.strip()
