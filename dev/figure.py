"""
Draws the idea of FastVim, docs/idea-light.svg and docs/idea-dark.svg, its speed as bench.py has
measured it, docs/speed.png, and a drawn scene on its way through two blocks, docs/trace.png.

    PYTHONPATH=. python dev/figure.py
"""
import json
import tempfile
from pathlib import Path

from matplotlib.figure import Figure
from torchvision.io import write_png

import data
import walkthrough

ROOT = Path(__file__).resolve().parents[1]

ROWS, COLUMNS = 3, 4
SIDE = 26                               # of a token; all lengths in SVG units
GAP = 4
PITCH = SIDE + GAP
LEFT = (20, 205, 375, 545)              # where the four pictures of a layer begin
TOP = (64, 226)                         # of an even layer, of an odd one
THEMES = {
    "light": {"ink": "#1f2328", "faint": "#59636e", "line": "#1f2328",
              "hues": ("#d1495b", "#edae49", "#00798c", "#6a4c93")},
    "dark": {"ink": "#f0f6fc", "faint": "#9198a1", "line": "#f0f6fc",
             "hues": ("#ff7b86", "#ffc75f", "#3fc1d0", "#b197e0")},
}
CAPTIONS = ("tokens", "pool: mean", "scan, both ways", "repeat")


def text(x, y, words, colour, size=13, anchor="start") -> str:
    return (f'<text x="{x}" y="{y}" fill="{colour}" font-size="{size}" text-anchor="{anchor}">'
            f"{words}</text>")


def token(x, y, colour, opacity=1.0) -> str:
    return (f'<rect x="{x}" y="{y}" width="{SIDE}" height="{SIDE}" rx="5" fill="{colour}" '
            f'fill-opacity="{opacity:.2f}"/>')


def arrow(x0, y0, x1, y1, colour) -> str:
    return (f'<line x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}" stroke="{colour}" stroke-width="1.6" '
            'marker-end="url(#head)"/>')


def layer(top: float, along_rows: bool, theme: dict) -> list[str]:
    """The four pictures of a layer that pools each row, or each column, to one token."""
    shapes = []
    steps = ROWS if along_rows else COLUMNS
    width = COLUMNS * PITCH - GAP
    height = ROWS * PITCH - GAP
    for row in range(ROWS):
        for column in range(COLUMNS):
            step = row if along_rows else column
            shade = 0.35 + 0.6 * ((3 * row + 5 * column) % 4) / 3       # tokens of a step differ
            x = column * PITCH
            y = top + row * PITCH
            shapes.append(token(LEFT[0] + x, y, theme["hues"][step], shade))
            shapes.append(token(LEFT[3] + x, y, theme["hues"][step]))
    for step in range(steps):
        if along_rows:
            place = (width / 2 - SIDE / 2, step * PITCH)
        else:
            place = (step * PITCH, height / 2 - SIDE / 2)
        for left, opacity in ((LEFT[1], 0.65), (LEFT[2], 1.0)):
            shapes.append(token(left + place[0], top + place[1], theme["hues"][step], opacity))
    if along_rows:
        middle = LEFT[2] + width / 2
        shapes.append(arrow(middle - 24, top + 6, middle - 24, top + height - 2, theme["line"]))
        shapes.append(arrow(middle + 24, top + height - 6, middle + 24, top + 2, theme["line"]))
    else:
        middle = top + height / 2
        shapes.append(arrow(LEFT[2] + 6, middle - 24, LEFT[2] + width - 2, middle - 24,
                            theme["line"]))
        shapes.append(arrow(LEFT[2] + width - 6, middle + 24, LEFT[2] + 2, middle + 24,
                            theme["line"]))
    for left in LEFT[:3]:                                               # to the next picture
        shapes.append(arrow(left + width + 12, top + height / 2, left + width + 40,
                            top + height / 2, theme["faint"]))
    return shapes


def draw(theme: dict) -> str:
    shapes = []
    for left, caption in zip(LEFT, CAPTIONS):
        middle = left + (COLUMNS * PITCH - GAP) / 2
        shapes.append(text(middle, 24, caption, theme["faint"], anchor="middle"))
    for top, along_rows, words in zip(TOP, (True, False), (
            "an even layer: a row becomes one step, the scan takes h steps",
            "an odd layer: a column becomes one step, the scan takes w steps")):
        shapes.append(text(LEFT[0], top - 14, words, theme["ink"]))
        shapes += layer(top, along_rows, theme)
    shapes.append(text(LEFT[0], 344, "One layer cannot tell the tokens of a row apart; two can. "
                       "The scan sees h or w tokens instead of h x w.", theme["faint"], 12))
    body = "\n".join(shapes)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 690 360" width="690" '
            f'height="360" font-family="system-ui, sans-serif">\n<defs><marker id="head" '
            f'viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{theme["faint"]}"/></marker></defs>\n'
            f"{body}\n</svg>\n")


def plot_speed(rows: list[dict], machine: dict, path: Path) -> None:
    """Images per second against the image's side, of bench.py's rows; of two batches the larger."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, dtype in zip(panels, ("float32", "bfloat16")):
        for name, backend in (("FastVim-T", "cpu"), ("Vim-T", "cpu"), ("DeiT-T", "SDPA")):
            measured = [row for row in rows if row["model"] == name and "seconds" in row
                        and row["backend"].startswith(backend) and row["dtype"] == dtype]
            fastest = {row["px"]: row["images/s"]
                       for row in sorted(measured, key=lambda row: row["batch"])}
            panel.loglog(*zip(*sorted(fastest.items())), "o-", label=name)
        panel.set(title=dtype, xlabel="pixels of a side", ylabel="images per second")
        panel.set_xticks([224, 512, 1024, 2048], ["224", "512", "1024", "2048"])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(f"{machine['name']}, {machine['threads']} threads, torch {machine['torch']}",
                    fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    for name, theme in THEMES.items():
        (ROOT / f"docs/idea-{name}.svg").write_text(draw(theme))
    measured = json.loads((ROOT / "results/cpu.json").read_text())
    plot_speed(measured["model"], measured["machine"], ROOT / "docs/speed.png")
    scene, _ = data.Scenes("val", None, 224, objects=False).draw(61, "val")  # a disc
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        write_png(scene, file.name)
        walkthrough.trace(file.name, ROOT / "docs/trace.png", None)


if __name__ == "__main__":
    main()
