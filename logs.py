"""
What a run says of itself: OUT/config.json; of each epoch: OUT/log.jsonl, a line on the terminal,
OUT/curve.png.
"""
import json
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import safety


def bar(run) -> tqdm:
    """A bar of a training.Run's steps, on a terminal; elsewhere a line per epoch is enough."""
    hidden = None if run.ctx.is_main else True  # None: unless it is a terminal
    return tqdm(total=run.total, initial=run.step, unit="step", disable=hidden)


def advance(bar: tqdm, run, loss: float) -> None:
    bar.set_postfix_str(f"epoch {run.epoch + 1}, loss {loss:.4f}, {run.speed:.0f} img/s", False)
    bar.update()


def write_config(run) -> None:
    """OUT/config.json: the options, where the code stood, what runs it."""
    device = torch.cuda.get_device_name() if run.ctx.device.type == "cuda" else "cpu"
    config = {**run.identity, "command": sys.argv, "total_steps": run.total,
              "started": time.strftime("%Y-%m-%d %H:%M:%S %z"), "device": device,
              "parameters": sum(param.numel() for param in run.model.parameters())}
    text = json.dumps(config, indent=2).encode()
    safety.write_whole(run.out / "config.json", lambda file: file.write(text))


def write(run) -> None:
    """The whole log, a JSON object a line."""
    log = "".join(json.dumps(line) + "\n" for line in run.history).encode()
    safety.write_whole(run.out / "log.jsonl", lambda file: file.write(log), required=False)


def tell(run, metric: str | None, bar: tqdm) -> None:
    """The last line of the log in words, and OUT/curve.png."""
    line = run.history[-1]
    numbers = {"loss": line["loss"], "lr": line["lr"], "img/s": line["img_per_s"]}
    for name, value in line["metrics"].items():
        numbers[f"val {name}"] = math.nan if value is None else value
    words = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    bar.write(f"epoch {run.epoch}/{run.epochs}: {words}")
    if run.epoch == run.epochs or time.monotonic() - run.drawn > 60:  # drawing takes a while
        draw_curve(run.out / "curve.png", run.history, metric)
        run.drawn = time.monotonic()


def draw_curve(path: Path, history: list[dict], metric: str | None) -> None:
    """A PNG of both losses and the metric against the epoch."""
    try:
        from matplotlib.figure import Figure  # without pyplot: no window system, no global state
    except ImportError:
        print("matplotlib is not installed: no curve.png", flush=True)
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    left.set(xlabel="epoch", ylabel="loss")
    left.locator_params(axis="x", integer=True)
    left.plot([line["epoch"] for line in history], [line["loss"] for line in history], ".-C0",
              label="training loss")
    right = left.twinx()
    right.set_ylabel(metric)
    for colour, (name, axes) in enumerate({metric: right, "loss": left}.items(), 1):
        points = [(line["epoch"], line["metrics"][name]) for line in history
                  if line["metrics"].get(name) is not None]
        if points:
            axes.plot(*zip(*points), ".-", color=f"C{colour}", label=f"validation {name}")
    figure.legend(loc="outside upper center", ncols=3)
    safety.write_whole(path, lambda file: figure.savefig(file, format="png"), required=False)
