"""
The paper's ablations in small: do its orderings come out again, on data that needs no download?

    python train_imagenet.py --ablations    Tables 6, 7, 16, 17, 18, on drawn pairs of shapes
    python train_jump.py --ablations        Tables 19, 20, 21, on drawn cells of 4 channels
    ... --ablations --quick                 one seed, few steps: the machinery, not the ordering

Both write to OUT (runs/ablations): ablations.jsonl, a line for each run as it ends, ablations.md
and ablations.png, of all tables whose runs are there. The same command again runs what is missing.

Every row is trained alike: a fixed number of steps, after which the last weights are evaluated,
once. Every image is seen once. Rows with the same seed see the same images in the same order, those
of another seed others.

How data, sizes and steps were chosen: so that the default models end well between chance and 100 %
within a minute of one core. Of the pairs only the default and Pool_row had been tried when the grid
was fixed. Of the cells eight rows had been run by one seed at 32 pixels, when the default with
small patches was found at 99 %, and the images made smaller for that alone.
"""
import itertools
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import classification
import data
import fastvim
import runs
import safety
import training

# ---- The grid ------------------------------------------------------------------------------------

SEEDS = (0, 1, 2)
RECIPE = {"batch": 32, "lr": 3e-3, "weight_decay": 0.05, "clip": 1.0, "tests": 2000}
STEPS = {"pairs": 1000, "cells": 300}                       # warmup in the first tenth, then cosine
QUICK = {"tests": 200, "steps": 20}                         # instead, and one seed

# What all rows of a script share. ViT: as wide, and as deep.
SHARED = {
    "pairs": dict(img_size=32, patch_size=4, embed_dim=64, depth=6, num_classes=8),
    "cells": dict(img_size=24, patch_size=8, embed_dim=64, depth=6, num_classes=4, in_chans=4),
}
FAST = "fastvim_tiny"
VIT = {"model": "vit_tiny_patch16_224", "num_heads": 2}
CHANNEL = "channelvim_tiny"
FAST_CHANNEL = "fastchannelvim_tiny"
SMALL = {"model": FAST_CHANNEL, "patch_size": 4}            # the paper's patch 8 beside its 16
FLAT = {"schedule": "fastchannelvim_2d"}
SPATIAL = {"model": CHANNEL, "schedule": "channelvim_spatial"}

# Table of the paper, row, the paper's top-1 in %, and what makes the model. Tables 20 and 21 are
# about the pooling: their rows are compared with those of the same patch size.
PAIRS = [
    ("6", "FastVim: rows and columns in turn", 81.1, {"model": FAST}),
    ("6", "Pool_col", 80.0, {"model": FAST, "schedule": "pool_col"}),
    ("6", "Pool_row", 79.6, {"model": FAST, "schedule": "pool_row"}),
    ("7", "ViT", 80.1, VIT),
    ("7", "ViT with pooling", 73.9, {**VIT, "vit_pool": True}),
    ("7", "ViT with pooling and conv1d", 74.0, {**VIT, "vit_pool": True, "vit_conv": True}),
    ("7", "FastVim", 81.1, {"model": FAST}),
    ("7", "FastVim without conv1d", 78.4, {"model": FAST, "d_conv": 0}),
    ("16", "mean over the tokens", 81.1, {"model": FAST}),
    ("16", "class token", 81.3, {"model": FAST, "class_token": True}),
    ("17", "RMS-LN", 81.1, {"model": FAST}),
    ("17", "RMS-RMS", 80.7, {"model": FAST, "ssm_norm": "rmsnorm"}),
    ("17", "LN-LN", 80.9, {"model": FAST, "block_norm": "layernorm"}),
    ("18", "expand before the D skip", 81.1, {"model": FAST}),
    ("18", "expand after it", 78.7, {"model": FAST, "skip_before_expand": True}),
]
CELLS = [
    ("19", "channel-first, sorted", 73.5, {"model": CHANNEL}),
    ("19", "channel-first, unsorted", 69.4, {"model": CHANNEL, "hcs_sorted": False}),
    ("19", "spatial-first, sorted", 65.9, SPATIAL),
    ("19", "spatial-first, unsorted", 67.9, {**SPATIAL, "hcs_sorted": False}),
    ("20, large patches", "mean", 73.6, {"model": FAST_CHANNEL}),
    ("20, large patches", "max", 72.9, {"model": FAST_CHANNEL, "pool": "max"}),
    ("20, large patches", "attention", 73.1, {"model": FAST_CHANNEL, "pool": "attention"}),
    ("20, small patches", "mean", 83.1, SMALL),
    ("20, small patches", "max", 85.0, {**SMALL, "pool": "max"}),
    ("20, small patches", "attention", 85.8, {**SMALL, "pool": "attention"}),
    ("21, large patches", "1-D mean", 73.6, {"model": FAST_CHANNEL}),
    ("21, large patches", "1-D max", 72.9, {"model": FAST_CHANNEL, "pool": "max"}),
    ("21, large patches", "2-D mean", 74.3, {"model": FAST_CHANNEL, **FLAT}),
    ("21, large patches", "2-D max", 73.5, {"model": FAST_CHANNEL, **FLAT, "pool": "max"}),
    ("21, small patches", "1-D mean", 83.1, SMALL),
    ("21, small patches", "1-D max", 85.0, {**SMALL, "pool": "max"}),
    ("21, small patches", "2-D mean", 78.4, {**SMALL, **FLAT}),
    ("21, small patches", "2-D max", 84.0, {**SMALL, **FLAT, "pool": "max"}),
]
GRID = {"pairs": PAIRS, "cells": CELLS}


def jobs_of(task: str, made: dict, quick: bool) -> list[dict]:
    """The runs of one row, a seed each. A run that stands so in ablations.jsonl is done."""
    job = {"task": task, **RECIPE, "steps": STEPS[task], "model": {**SHARED[task], **made}}
    if quick:
        job |= QUICK
    return [{**job, "seed": seed} for seed in (SEEDS[:1] if quick else SEEDS)]


# ---- One run -------------------------------------------------------------------------------------

def build(model: str, vit_pool: bool = False, vit_conv: bool = False, **fields) -> nn.Module:
    if not model.startswith("vit"):
        return fastvim.create_model(model, **fields)
    vit = data.extra("timm").create_model(model, **fields)
    if vit_pool:
        classification.pool_attention(vit, runs.Options({"model": model, "vit_conv": vit_conv}))
    return vit


def batch_of(task: str, split: str, numbers: range) -> tuple[Tensor, Tensor]:
    """Images (b c h w) and labels (b), a function of the arguments alone."""
    if task == "pairs":
        images, labels = zip(*map(data.Pairs(split).draw, numbers))
        return torch.from_numpy(np.stack(images)), torch.tensor(labels)
    cells = data.Cells(split, np.asarray, SHARED[task]["img_size"])
    images = torch.from_numpy(np.stack([cells.draw(i)[:4] for i in numbers]))
    std, mean = torch.std_mean(images, (2, 3), keepdim=True)    # staining varies: learnt sooner
    return (images - mean) / std, torch.tensor(numbers) % 4     # four channels: four classes


def train(job: dict) -> dict:
    """-> the job, top-1 in % on images not trained on, the last batch's loss, seconds."""
    torch.set_num_threads(1)                                # a process for each core instead
    torch.manual_seed(job["seed"])
    began = time.monotonic()
    model = build(**job["model"])
    groups = training.parameter_groups(model, job["weight_decay"])
    optimizer = torch.optim.AdamW(groups, lr=job["lr"], fused=True)
    steps = job["steps"]
    size = job["batch"]
    for step in range(steps):
        lr = training.cosine(step, steps, job["lr"], warmup=steps // 10)
        training.set_schedules(optimizer, lr, None)
        first = 10**6 * job["seed"] + step * size
        images, labels = batch_of(job["task"], "train", range(first, first + size))
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), job["clip"])
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    right = 0
    with torch.no_grad():
        for first in range(0, job["tests"], 100):
            images, labels = batch_of(job["task"], "val", range(first, first + 100))
            right += (model(images).argmax(1) == labels).sum().item()
    return {**job, "top1": 100 * right / job["tests"], "loss": loss.item(),
            "seconds": time.monotonic() - began}


# ---- All runs ------------------------------------------------------------------------------------

def add_arguments(add) -> None:
    add("--ablations", action="store_true", help="the paper's ablations, small and on drawn data: "
        "tables and a plot; goes on after a kill")
    add("--quick", action="store_true", help="--ablations with one seed and few steps")


def options(typed: dict, parser) -> dict:
    """What --ablations changes of a recipe. It takes no option of training: they stand above."""
    if "ablations" not in typed or typed.keys() - {"ablations", "quick", "out"}:
        parser.error("--ablations goes with --quick and --out alone")
    return {"out": "runs/ablations"}


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def find(job: dict, results: list[dict]) -> dict | None:
    """The result of this very job."""
    return next((result for result in results if result.items() >= job.items()), None)


def main(task: str, args: runs.Options, *_) -> None:
    """Runs what is missing of a script's grid, then prints and draws all that is there."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "ablations.jsonl"
    results = read(path)
    jobs = [jobs_of(task, made, args.quick) for *_, made in GRID[task]]
    missing = []
    for job in itertools.chain(*zip(*jobs)):                # all rows by one seed, then by the next
        if job not in missing and not find(job, results):
            missing.append(job)
    workers = max(1, min(os.cpu_count() or 1, len(missing)))
    print(f"{len(missing)} runs to do, {workers} at a time", flush=True)
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for count, result in enumerate(pool.imap_unordered(train, missing), 1):
            results.append(result)
            text = "".join(json.dumps(line) + "\n" for line in results).encode()
            safety.write_whole(path, lambda file, text=text: file.write(text))
            left = (time.monotonic() - began) * (len(missing) / count - 1)
            changed = dict(result["model"].items() - SHARED[task].items())
            print(f"{count}/{len(missing)} {changed} seed {result['seed']}: {result['top1']:.1f} %"
                  f", {result['seconds']:.0f} s; {left / 60:.0f} min left", flush=True)
    tables = summary(results, args.quick)
    text = markdown(tables)
    text += "\npairs: of rows, as in the paper, the other way round, not told apart\n"
    if args.quick:
        text += "\nFew steps, one seed: the order means nothing.\n"
    print(f"\n{text}")
    safety.write_whole(out / "ablations.md", lambda file: file.write(text.encode()))
    draw(tables, out / "ablations.png")


def summary(results: list[dict], quick: bool) -> dict[str, list[tuple]]:
    """-> table: its rows (name, the paper's top-1, top-1 of each seed), where all runs are done."""
    tables = {}
    for task, grid in GRID.items():
        for table, name, paper, made in grid:
            found = [find(job, results) for job in jobs_of(task, made, quick)]
            tables.setdefault(table, []).append((name, paper, [r and r["top1"] for r in found]))
    return {table: rows for table, rows in tables.items()
            if not any(None in top1 for _, _, top1 in rows)}


def verdict(rows: list[tuple]) -> tuple[int, int, int]:
    """Of the pairs of rows that the paper tells apart, how many come out as there, the other way
    round, or not told apart: some seed of the one lies between those of the other."""
    counts = [0, 0, 0]
    for pair in itertools.combinations(rows, 2):
        (_, paper, worse), (_, other, better) = sorted(pair, key=lambda row: row[1])
        if paper == other:
            continue
        if min(better) > max(worse):
            counts[0] += 1
        elif max(better) < min(worse):
            counts[1] += 1
        else:
            counts[2] += 1
    return tuple(counts)


def markdown(tables: dict[str, list[tuple]]) -> str:
    """All tables as one, each with its verdict in its first row."""
    words = {(False, False): "undecided", (True, False): "agrees", (True, True): "partly",
             (False, True): "differs"}
    lines = ["| table | row | top-1, mean | least to most | the paper | order | pairs |",
             "|---|---|---|---|---|---|---|"]
    for table, rows in tables.items():
        same, opposite, neither = verdict(rows)
        order = f"{words[same > 0, opposite > 0]} | {same}, {opposite}, {neither}"
        for name, paper, top1 in rows:
            lines.append(f"| {table} | {name} | {np.mean(top1):.1f} | {min(top1):.1f} to "
                         f"{max(top1):.1f} | {paper} | {order} |")
            table = ""
            order = " | "
    return "\n".join(lines) + "\n"


def draw(tables: dict[str, list[tuple]], path: Path) -> None:
    """A PNG: a panel for each table, a dot for each seed, a line at their mean."""
    figure = data.extra("matplotlib.figure").Figure(figsize=(11, 10), layout="constrained")
    panels = figure.subplots(5, 2).flat
    for panel, (table, rows) in zip(panels, tables.items()):
        for place, (_, _, top1) in enumerate(rows):
            panel.plot(top1, [place] * len(top1), "C0o", alpha=0.6)
            panel.plot(np.mean(top1), place, "C1|", markersize=16, markeredgewidth=2)
        panel.set_yticks(range(len(rows)), [f"{name} ({paper})" for name, paper, _ in rows],
                         fontsize=8)
        panel.invert_yaxis()
        panel.set_title(f"Table {table}", fontsize=10)
        panel.grid(axis="x", alpha=0.3)
    for panel in list(figure.axes)[len(tables):]:
        panel.set_axis_off()
    figure.supxlabel("top-1 on drawn data, % (in brackets: the paper's, on its own)", fontsize=9)
    safety.write_whole(path, lambda file: figure.savefig(file, format="png", dpi=100))
