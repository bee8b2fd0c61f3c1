"""What all scripts share: their options, and the checkpoints that they start from.

One rule for every option: {**defaults, **RECIPE, **toy, **checkpoint, **typed}. The last one holds.
Options do not change after that: what is computed from them has a name of its own. An option that
makes the model is called like its field of fastvim.Config: a checkpoint's fields are options, too.
"""
import argparse
import contextlib
import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

import checkpoints
import data
import fastvim
import safety
import sinks
import training

# ---- Options -------------------------------------------------------------------------------------

SIZES = {size[0]: size for size in fastvim.SIZES}

# What makes a model: fields of fastvim.Config, and two that train_imagenet.py gives to ViTs.
MODEL_FIELDS = ("img_size", "patch_size", "depth", "schedule", "pool", "pool_scale", "class_token",
                "block_norm", "ssm_norm", "d_conv", "skip_before_expand", "mask_divisor",
                "drop_path_rate", "vit_pool", "vit_conv")

# Folders in the --data of those readers that do not take every folder there for a class.
SPLITS = ("train", "val", "test", "images", "annotations", "train2017", "val2017")

# What a script's recipe leaves open of the options that every script has.
TRAINING = dict(batch_size=128, accum=1, weight_decay=0.0, clip=0.0, ema=0.0, amp=False,
                eval_every=1, save_minutes=10.0, seed=0, workers=min(4, os.cpu_count() or 1),
                device="auto")

# Groups of options, in the order in which --help shows those that are not empty.
GROUPS = ("recipe", "data and weights", "instead of training", "model", "channels", "augmentation",
          "the paper's ablations", "the run")


class Options(argparse.Namespace):
    """The options of a run as attributes, which cannot be changed."""

    def __init__(self, options: dict):
        vars(self).update(options)

    def __setattr__(self, name, value):
        raise AttributeError(f"options do not change: give {name}={value!r} a name of its own")


class Parser(argparse.ArgumentParser):
    """Keeps what was typed: any other option is absent from what it returns. ~ is the user's home:
    shells leave it in --out=~/runs and OLD=~/images as it is."""

    def __init__(self, **settings):
        layout = functools.partial(argparse.HelpFormatter, width=100, max_help_position=32)
        super().__init__(argument_default=argparse.SUPPRESS, allow_abbrev=False,
                         formatter_class=layout, **settings)
        self.groups = {name: self.add_argument_group(name) for name in GROUPS}

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        words = ["=".join(map(os.path.expanduser, word.split("="))) for word in words]
        return super().parse_args(words, namespace)


def defaults(parser: argparse.ArgumentParser) -> dict:
    """What holds for the parser's options where nothing is said: a switch is off, else None."""
    return {action.dest: False if isinstance(action, argparse._StoreTrueAction) else None
            for action in parser._actions if action.dest != "help"}


def number(kind: type, least: float, below: float = math.inf) -> Callable[[str], float]:
    """An argparse type: an int or float in [least, below)."""
    limits = f"at least {least}" + (f" and less than {below}" if below < math.inf else "")

    def parse(text):
        if not least <= kind(text) < below:
            raise argparse.ArgumentTypeError(f"{text} must be {limits}")
        return kind(text)

    parse.__name__ = kind.__name__  # argparse names it when the text is no number at all
    return parse


WHOLE = number(int, 1)
AT_LEAST_0 = number(float, 0)
SHARE = number(float, 0, 1)


def add_training_arguments(parser: argparse.ArgumentParser, recipe: dict) -> None:
    """Adds the options that every script has; then, to all help texts, the defaults of `recipe`."""
    unit = "steps" if "steps" in recipe else "epochs"
    for group, name, kind, text in (
        ("recipe", "epochs", number(float, 1e-9), "passes over the training set, or a fraction"),
        ("recipe", "steps", WHOLE, "optimizer steps at most; the schedule ends with them"),
        ("recipe", "batch-size", WHOLE, "samples per process and micro-step"),
        ("recipe", "accum", WHOLE, "micro-steps per optimizer step"),
        ("recipe", "lr", AT_LEAST_0,
         "peak learning rate (default {recipe_lr:g} x batch / {recipe_batch})"),
        ("recipe", "warmup", AT_LEAST_0, "{unit} of linear warmup"),
        ("recipe", "weight-decay", AT_LEAST_0, "decoupled from the gradient"),
        ("recipe", "clip", AT_LEAST_0, "largest gradient norm, 0 for no clipping"),
        ("recipe", "ema", SHARE, "decay of the moving average of the weights, 0 for none"),
        ("model", "img-size", WHOLE, "pixels"),
        ("model", "depth", WHOLE, "blocks (default: the model's own)"),
        ("the run", "out", str, "folder of checkpoints, log and curve"),
        ("the run", "device", str, "auto (a GPU if there is one), cpu, cuda or cuda:1"),
        ("the run", "seed", number(int, 0), "the whole run follows from it"),
        ("the run", "eval-every", WHOLE, "epochs between evaluations"),
        ("the run", "save-minutes", AT_LEAST_0, "time between checkpoints within an epoch"),
        ("the run", "workers", number(int, 0), "data-loading processes per training process"),
        ("the run", "threads", WHOLE, "CPU threads per process (default: PyTorch's choice)"),
    ):
        text = text.format(unit=unit, **recipe)
        parser.groups[group].add_argument(f"--{name}", type=kind, help=text)
    add = parser.groups["model"].add_argument
    add("--drop-path", dest="drop_path_rate", type=SHARE, metavar="RATE",
        help="stochastic depth at the last block")
    add("--grad-checkpointing", action="store_true", help="less memory, more time, the same result")
    add = parser.groups["the run"].add_argument
    add("--amp", action=argparse.BooleanOptionalAction,
        help="bfloat16 autocast; off: float32, as in the paper")
    add("--resume", nargs="?", const="auto", metavar="FILE",
        help="continue, as if never stopped, from FILE or else OUT/last.pt, if it exists")
    add("--resume-changed", action="store_true", help="resume, though options changed")
    add("--log", nargs="+", action="extend", choices=sinks.MODULES, metavar="SINK",
        help="also write the log's numbers for tensorboard, wandb, or both")
    for action in parser._actions:
        value = recipe.get(action.dest)
        if value is not None and value is not False and "default" not in action.help:
            action.help += f" (default {value})"


def model_fields(args: Options) -> dict:
    """The fields that the options set, for fastvim.create_model."""
    fields = {name: vars(args)[name] for name in MODEL_FIELDS if vars(args).get(name) is not None}
    if fields.get("ssm_norm") == "none":
        fields["ssm_norm"] = None
    return fields


# ---- Checkpoints ---------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint, and what it says of itself: nothing if it is a released file, or no file."""
    path: str = ""
    content: dict = dataclasses.field(default_factory=dict)  # as checkpoints.read returns it
    resumed: bool = False  # it is the run's own: training.fit takes its weights
    options: dict = dataclasses.field(default_factory=dict)  # of the run that wrote it
    name: str | None = None  # of the model
    fields: dict = dataclasses.field(default_factory=dict)  # that the model was made with
    classes: list | None = None  # their names

    @property
    def gives_weights(self) -> bool:
        return bool(self.content) and not self.resumed

    def model_options(self) -> dict:
        """The options that make this encoder again: all but what a recipe decides."""
        if self.name is None:
            return {}
        fields = {name: self.fields[name] for name in MODEL_FIELDS if name in self.fields}
        fields.pop("drop_path_rate", None)
        if "ssm_norm" in fields:
            fields["ssm_norm"] = fields["ssm_norm"] or "none"
        return {"model": self.name, **fields}


def read(path: str, resumed: bool = False) -> Saved:
    """The checkpoint at `path`. FileNotFoundError, ValueError: there is none, or it is damaged."""
    content = checkpoints.read(path)
    content.pop("optimizer", None)  # twice the weights, which a process would keep to its end
    options = content.get("args")
    if not isinstance(options, dict):
        options = {}
    if "built" not in content and not {"model", "data"} <= options.keys():
        return Saved(path, content, resumed)  # a released file may have args of its own
    built = content.get("built") or built_from_options(options)
    match built:
        case {"name": str(name), "fields": dict(fields)}:
            classes = content.get("classes", options.get("classes"))
            return Saved(path, content, resumed, options, name, fields, classes)
    raise ValueError(f"{path} does not say rightly how its model was built")


def built_from_options(options: dict) -> dict:
    """The entry "built" that checkpoints had not before version 0.2, from the run's options."""
    name = options.get("model") or f"fastvim_{SIZES[options.get('size') or 't']}"
    fields = {field: options.get(field) for field in MODEL_FIELDS}
    fields["patch_size"] = options.get("patch_size") or options.get("patch")
    if options.get("no_conv"):
        fields["d_conv"] = 0
    family = name.rpartition("_")[0]
    if options.get("pool_dims") == 2:
        fields["schedule"] = f"{family}_2d"
    elif options.get("scan_order") == "spatial-first":
        fields["schedule"] = f"{family}_spatial"
    fields = {field: value for field, value in fields.items()
              if value is not None and value is not False}  # a switch that was off
    if fastvim.FAMILIES.get(family, {}).get("class_token") and options.get("class_token") is False:
        fields["class_token"] = False                               # --no-class-token
    if fields.get("ssm_norm") == "none":
        fields["ssm_norm"] = None
    return {"name": name, "fields": fields}


def last_run(out: str, recipe: dict, toy: dict, name: str = "best.pt") -> str:
    """The checkpoint of the run in `out`; if that is the recipe's own folder and has none, of the
    run on built-in data."""
    outs = [out, toy["out"]] if out == recipe["out"] else [out]
    paths = [os.path.join(folder, name) for folder in outs]
    return next(filter(os.path.isfile, paths), paths[0])


def starting_point(options: dict, path: str | None) -> Saved:
    """What a run starts from: with --resume its own checkpoint, else that at `path`, else none."""
    if options.get("data"):
        refuse_out_inside_data(options["out"], options["data"])
    own = safety.checkpoint_to_resume(options["out"], options["resume"])
    if own is None:
        return read(path) if path else Saved()
    try:
        return read(own, resumed=True)
    except ValueError as error:
        raise ValueError(f"{error}. Try --resume {options['out']}/best.pt") from error


def refuse_out_inside_data(out: str, root: str) -> None:
    """ValueError: --out is where the readers look for the images of --data."""
    folder = Path(root).resolve()
    inside = Path(out).resolve()
    if not folder.is_dir() or folder not in inside.parents:
        return
    splits = [name for name in SPLITS if (folder / name).is_dir()]
    if not splits or inside.relative_to(folder).parts[0] in splits:
        raise ValueError(f"--out {out} lies among the images of --data {root}, where it would be a "
                         "class: choose another --out")


def encoder_options(saved: Saved, typed: dict) -> dict:
    """saved.model_options() for a model that is shown whole images.

    Of masked ones a row's sum had 1 - mask_ratio of its tokens and was divided by the row's length:
    a whole row's mean is so much larger, which pool_scale undoes (recipes: 0.25)."""
    options = saved.model_options()
    options.pop("mask_divisor", None)
    if not saved.gives_weights or "mask_token" not in checkpoints.model_weights(saved.content)[0]:
        return options
    made = {"model": "fastvim_tiny", **options, **typed}
    family = fastvim.FAMILIES.get(made["model"].rpartition("_")[0], {})
    schedule = made.get("schedule") or family.get("schedule", "vim")
    pooled = any(axes for _, axes in fastvim.SCHEDULES[schedule])
    by_axis = saved.options.get("mask_divisor") != "count"
    if pooled and by_axis and made.get("pool", "mean") == "mean":
        kept = 1 - saved.options.get("mask_ratio", 0.75)
        options["pool_scale"] = saved.fields.get("pool_scale", 1) * kept
    return options


# ---- Running -------------------------------------------------------------------------------------

@contextlib.contextmanager
def plain_errors(prog: str) -> Iterator[None]:
    """For main(): what the user or the administrator can put right ends in a line on stderr, not in
    a traceback. Names of files that are no text of the terminal's are printed escaped."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except (ValueError, OSError, ImportError, data.BadDataError, safety.NonFiniteError) as error:
        if sys.flags.dev_mode:  # python -X dev: for whoever changes the code, the traceback
            raise
        text = str(error)
        if "Original Traceback" in text:  # from a loading process: only the message is wanted
            text = text.rpartition(f"{type(error).__name__}: ")[2].strip()
        raise SystemExit(f"{prog}: {text}") from error
    except RuntimeError as error:
        if not safety.is_out_of_memory(error):
            raise
        raise SystemExit(f"{prog}: {error}\nOut of memory: try a smaller --batch-size, or --amp")


def loader_of(args: Options, ctx: training.Context, dataset, train: bool = False, **more):
    """The data.make_loader of this process. more: its options that are not as args say."""
    settings = {"batch_size": args.batch_size, "workers": args.workers, **more}
    return data.make_loader(dataset, train=train, seed=args.seed, rank=ctx.rank,
                            world_size=ctx.world_size, **settings)


def count_bad(ctx: training.Context, *datasets) -> int:
    """How many files of these data.Files some process has found bad."""
    found = [ctx.sum(files.bad.to(ctx.device, torch.float32)) > 0 for files in datasets]
    return sum(int(bad.sum()) for bad in found)


def require_images(count: float) -> None:
    """ValueError: an evaluation has seen none."""
    if not count:
        raise ValueError("none of the images to evaluate on can be read: the warnings name them")


def evaluate_classifier(model, loader, ctx: training.Context, amp: bool = False) -> dict:
    """-> {"top1", "top5": percent, "loss": mean cross-entropy, "images": how many}.

    loader: batches (images, labels), None where no image could be read. All processes' sums and
    counts are added up, so batches and processes of unequal size weigh as they should."""
    sums = torch.zeros(4, dtype=torch.float64, device=ctx.device)  # loss, right first, in 5, images
    with torch.no_grad():
        for batch in filter(None, loader):
            images, labels = (tensor.to(ctx.device, non_blocking=True) for tensor in batch)
            with torch.autocast(ctx.device.type, torch.bfloat16, enabled=amp):
                logits = model(images).float()  # (b classes)
            hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (b 5)
            sums[0] += F.cross_entropy(logits, labels, reduction="sum")
            sums[1] += hits[:, 0].sum()
            sums[2] += hits.sum()
            sums[3] += len(labels)
    loss, top1, top5, count = ctx.sum(sums).tolist()
    require_images(count)
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count,
            "images": count}


def print_likeliest(path: str, p: torch.Tensor, classes: list) -> None:
    """p (classes): prints the five greatest with their names."""
    print(path)
    values, labels = p.topk(min(5, len(p)))
    for value, label in zip(values.tolist(), labels.tolist()):
        print(f"  {100 * value:5.1f} %  {classes[label]}")


# ---- What a script does --------------------------------------------------------------------------

def run(get_args: Callable, uses: dict[str, Callable], train: Callable) -> None:
    """A script: what the option that was given does, {option: function}, or else training. All
    functions take (args, ctx, start)."""
    with plain_errors(os.path.basename(sys.argv[0])):
        args, start = get_args()
        todo = next((use for option, use in uses.items() if vars(args).get(option)), train)
        ctx = training.setup(args, training=todo is train)
        todo(args, ctx, start)
        ctx.close()


def trained_on_built_in(saved: Saved) -> bool:
    """Is it a checkpoint of a run without --data?"""
    return bool(saved.options) and not (saved.options.get("data") or saved.options.get("index"))


def require_data(args: Options, saved: Saved, options: str = "--data DIR") -> None:
    """ValueError: neither are there files, nor was the model trained without any."""
    if not (args.data or vars(args).get("index") or trained_on_built_in(saved)):
        raise ValueError(f"this model was trained on files, so {options} has to say where they are")


def write(args: Options, name: str, content: Callable, required: bool = False) -> None:
    """content(file) writes OUT/name; if it cannot, and that is not required, it is a warning."""
    Path(args.out).mkdir(parents=True, exist_ok=True)
    safety.write_whole(Path(args.out, name), content, required)


def warmup_and_cosine(args: Options, ctx: training.Context, loader, start: float = 0.0,
                      end: float = 0.0) -> Callable[[int], float]:
    """The learning rate at each step: --warmup epochs from start to the peak, a cosine to end."""
    total, per_epoch = training.run_length(args, loader)
    return functools.partial(training.cosine, total=total, value=training.peak_lr(args, ctx),
                             start=start, end=end, warmup=round(args.warmup * per_epoch))
