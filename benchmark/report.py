"""
Tables and plots of what bench.py measured: rows {column: value}, a line each.

A row that was measured has "seconds", of each call; one that was not has a "note" that says why.
"""
import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

HIDDEN = ("note", "seconds", "ms", "first call")            # in the JSON file, in no table
WORDS = 5                                                   # columns of words, before the numbers


def table(rows: list[dict], markdown: bool) -> str:
    """Aligned text, or Markdown. Notes become footnotes."""
    keys = list(dict.fromkeys(key for row in rows for key in row if key not in HIDDEN))
    notes = list(dict.fromkeys(row["note"] for row in rows if "note" in row))

    def cell(row, key):
        value = row.get(key)
        if value is None:
            return "-"
        if isinstance(value, float):
            return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        if key == "backend" and "note" in row:
            value = f"{value} [{notes.index(row['note']) + 1}]"
        return str(value)

    columns = []
    for i, key in enumerate(keys):
        column = [key, *(cell(row, key) for row in rows)]
        width = max(map(len, column))
        if i < WORDS:
            columns.append([text.ljust(width) for text in column])
        else:
            columns.append([text.rjust(width) for text in column])
    lines = ["  ".join(line) for line in zip(*columns)]
    if markdown:
        lines = [f"| {' | '.join(line)} |" for line in zip(*columns)]
        lines.insert(1, "|" + "---|" * WORDS + "--:|" * (len(keys) - WORDS))
        lines.append("")
    return "\n".join([*lines, *(f"[{i}] {note}" for i, note in enumerate(notes, 1))])


def plot_models(rows: list[dict], path: Path) -> None:
    """Images per second and memory by image size; of two batches the larger counts."""
    figure = Figure(figsize=(14, 9), layout="constrained")
    axes = figure.subplots(2, 2)
    for i, dtype in enumerate(dict.fromkeys(row["dtype"] for row in rows)):
        lines = {}
        for row in sorted(rows, key=lambda row: row["batch"]):
            if row["dtype"] == dtype:
                points = lines.setdefault(f"{row['model']} {row['backend']}", {})
                memory = (row["peak MB"] or math.nan) / row["batch"]
                points[row["px"]] = (row["px"] ** 2, row["images/s"], memory)
        for label, points in lines.items():
            pixels, speed, memory = zip(*(points[px] for px in sorted(points)))
            axes[0, i].loglog(pixels, speed, "o-", label=label)
            axes[1, i].loglog(pixels, memory, "o-", label=label)
        axes[0, i].set(title=dtype, xlabel="pixels", ylabel="images/s")
        axes[1, i].set(title=dtype, xlabel="pixels", ylabel="peak MB per image")
        axes[0, i].legend(fontsize=6)
    figure.savefig(path, dpi=120)


def plot_blocks(rows: list[dict], path: Path) -> None:
    """The stages of each block as stacked bars."""
    kinds = list(dict.fromkeys((row["px"], row["dtype"]) for row in rows))
    stages = dict.fromkeys(stage for row in rows for stage in row["ms"])
    figure = Figure(figsize=(5 * len(kinds), 6), layout="constrained")
    axes = figure.subplots(1, len(kinds), squeeze=False)[0]
    for ax, (px, dtype) in zip(axes, kinds):
        shown = [row for row in rows if (row["px"], row["dtype"]) == (px, dtype)]
        bottom = np.zeros(len(shown))
        for k, stage in enumerate(stages):
            ms = np.array([row["ms"].get(stage, 0) for row in shown])
            ax.bar([f"{row['block']}\n{row['backend']}" for row in shown], ms, bottom=bottom,
                   label=stage, hatch="//" * (k // 10))
            bottom += ms
        ax.set(title=f"{px} px, {dtype}", ylabel="ms")
        ax.tick_params(axis="x", rotation=90, labelsize=6)
    axes[-1].legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)
