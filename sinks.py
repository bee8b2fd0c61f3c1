"""
Where a run's log goes besides OUT/log.jsonl, when asked: --log tensorboard, --log wandb.

    tensorboard --logdir OUT                    reads OUT/tensorboard
    wandb sync OUT/wandb/offline-run-*          after a run with WANDB_MODE=offline

Their packages are imported only when asked for. A line is written before the checkpoint that knows
of it: what a kill loses is written again by the resumed run, which takes back what lies beyond its
checkpoint. A sink that fails is closed with a warning; the training goes on.
"""
import contextlib
import importlib
import math
import secrets
import sys
from collections.abc import Callable, Iterator

import safety

MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def require(names: list[str] | None) -> None:
    """ImportError: a package of these sinks is missing."""
    for name in names or ():
        try:
            importlib.import_module(MODULES[name])
        except ImportError as error:
            raise ImportError(f"--log {name} needs the package {name} ({error}): "
                              f"pip install {name}") from error


@contextlib.contextmanager
def opened(run) -> Iterator[Callable[[dict], None]]:
    """Yields write(line of the log), for the sinks of a training.Run; in the main process."""
    sinks = {}

    def attempt(name, function, *arguments):
        try:
            return function(*arguments)
        except Exception as error:              # a full disk, no network, no account
            sinks.pop(name, None)
            print(f"\nWARNING: --log {name} ends here, the training goes on: "
                  f"{type(error).__name__}: {error}\n", file=sys.stderr, flush=True)

    def write(line):
        for name, sink in list(sinks.items()):
            attempt(name, sink.write, line["step"], numbers(line))

    names = run.args.log or () if run.ctx.is_main else ()
    for name in dict.fromkeys(names):
        sink = attempt(name, SINKS[name], run)
        if sink is not None:
            sinks[name] = sink
    for line in run.history:
        write(line)
    try:
        yield write
    finally:
        for name, sink in list(sinks.items()):
            attempt(name, sink.close)


def numbers(line: dict) -> dict[str, float]:
    """A line of the log -> {name: number}, those of the evaluation as val/name."""
    flat = {name: value for name, value in line.items() if name not in ("step", "metrics")}
    flat |= {f"val/{name}": value for name, value in line["metrics"].items()}
    return {name: value for name, value in flat.items()
            if value is not None and math.isfinite(value)}


class TensorBoard:
    def __init__(self, run):
        module = importlib.import_module(MODULES["tensorboard"])
        folder = run.out / "tensorboard"
        self.first = 0
        if folder.exists():
            self.first = run.step + 1
        # Of what is there, TensorBoard forgets the steps from `first` on.
        self.writer = module.SummaryWriter(folder, purge_step=self.first)

    def write(self, step: int, values: dict[str, float]) -> None:
        if step < self.first:
            return
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    def __init__(self, run):
        wandb = importlib.import_module(MODULES["wandb"])
        path = run.out / "wandb.id"
        if not path.exists():
            safety.write_whole(path, lambda file: file.write(secrets.token_hex(8).encode()))
        self.run = wandb.init(project="fastvim", id=path.read_text(), resume="allow", dir=run.out,
                              config=run.identity["args"],
                              settings=wandb.Settings(console="off"))

    def write(self, step: int, values: dict[str, float]) -> None:
        if step >= self.run.step:               # the server has those before
            self.run.log(values, step=step, commit=True)

    def close(self) -> None:
        self.run.finish()


SINKS = {"tensorboard": TensorBoard, "wandb": WandB}
