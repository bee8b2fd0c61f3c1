"""
Training: one loop for every experiment, and what the scripts share around it.

    parser = argparse.ArgumentParser()
    add_training_arguments(parser, lr=1e-3, recipe_batch=1024, batch_size=128, epochs=300, weight_decay=0.05)
    args = parser.parse_args()
    ctx = setup(args)                                     # processes, device, seed, learning rate
    model = create_model(...).to(ctx.device)              # after setup: its random weights follow from --seed
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.lr)
    total, per_epoch = run_length(args, loader)           # in optimizer steps, as everything here
    fit(args, ctx, model, loader, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), optimizer,
        lr=lambda step: cosine(step, total, args.lr, warmup=5 * per_epoch, start=1e-6, end=1e-5),
        evaluate=lambda model, epoch: evaluate_classifier(model, val_loader, ctx, args.amp), metric="top1")

1. A run is a function of its arguments and the step. Learning rate, weight decay and all random numbers follow from
   the step, the order of the data from the epoch. So a checkpoint is weights, sums and counters, and a run resumed
   from any step, also amid an epoch, ends in the same bits (on a GPU: if its kernels are deterministic).
2. One wait for the device per step: loss, gradient norm and the wish to stop arrive together, before the optimizer.
3. Files are written whole or not at all. A crash at any moment leaves the previous checkpoint, readable.

Symbols: B = --batch-size, per process and micro-step; W processes; the effective batch is B x --accum x W.
On several GPUs: torchrun --nproc-per-node 8 train_imagenet.py ...
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# ---- Arguments and processes -----------------------------------------------------------------------------------------

# A resumed run may change these; any other change is refused, because the result would be of neither setting.
HARMLESS = {"out", "resume", "resume_changed", "workers", "device", "threads", "save_minutes"}


def number(kind, least, below=math.inf):
    """An argparse type: an int or float in [least, below)."""
    def parse(text):
        if not least <= kind(text) < below:
            limits = f"at least {least}" + (f" and less than {below}" if below < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text} must be {limits}")
        return kind(text)
    parse.__name__ = kind.__name__                        # argparse names it when the text is no number at all
    return parse


def add_training_arguments(parser, *, lr, recipe_batch, **defaults):
    """Add the options every script has. lr: the recipe's, at its effective batch `recipe_batch`.

    defaults: values for the options below, e.g. epochs=300. TypeError: one of them is not an option.
    """
    group = parser.add_argument_group("training")
    for name, kind, default, text in (
        ("batch-size", number(int, 1), 128, "samples per process and micro-step"),
        ("accum", number(int, 1), 1, "micro-steps per optimizer step; their gradients are averaged"),
        ("epochs", number(float, 1e-9), None, "passes over the training set, may be a fraction"),
        ("steps", number(int, 1), None, "optimizer steps; the run ends at --epochs or --steps, whichever comes first"),
        ("weight-decay", number(float, 0), 0.0, "decoupled weight decay"),
        ("clip", number(float, 0), 0.0, "largest gradient norm, 0 for no clipping"),
        ("ema", number(float, 0, 1), 0.0, "decay of the moving average of the weights, 0 for none"),
        ("eval-every", number(int, 1), 1, "epochs between evaluations"),
        ("save-minutes", number(float, 0), 10.0, "time between checkpoints within an epoch; each epoch ends with one"),
        ("seed", number(int, 0), 0, "the whole run follows from it"),
        ("workers", number(int, 0), min(4, os.cpu_count() or 1), "data-loading processes per training process"),
        ("threads", number(int, 1), None, "CPU threads per process; None leaves PyTorch's choice"),
        ("device", str, "auto", "auto (a GPU if there is one), cpu, cuda or cuda:1"),
        ("out", str, "out", "folder of checkpoints, log and curve"),
    ):
        group.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default %(default)s)")
    group.add_argument("--lr", type=number(float, 0), 
                       help=f"peak learning rate (default {lr:g} x batch / {recipe_batch})")
    group.add_argument("--amp", action=argparse.BooleanOptionalAction, default=False,
                       help="bfloat16 autocast; off: float32, as in the paper")
    group.add_argument("--resume", nargs="?", const="auto", metavar="FILE",
                       help="continue, as if never stopped, from FILE or else from OUT/last.pt if it exists")
    group.add_argument("--resume-changed", action="store_true", help="resume, though arguments changed")
    if unknown := set(defaults) - {action.dest for action in group._group_actions}:
        raise TypeError(f"not training options: {', '.join(sorted(unknown))}")
    parser.set_defaults(recipe_lr=lr, recipe_batch=recipe_batch, **defaults)


@dataclass(frozen=True)
class Context:
    """This process, the rank-th of world_size."""

    rank: int
    world_size: int
    device: torch.device
    is_main = property(lambda self: self.rank == 0)

    def print(self, *args):
        if self.is_main:
            print(*args, flush=True)

    def sum(self, tensor):
        """The sum of `tensor` over all processes, in place; no communication when there is one."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def wait(self):
        """Until every process has come here."""
        self.sum(torch.zeros(1, device=self.device)).item()

    def close(self):
        if self.world_size > 1:
            dist.destroy_process_group()


def setup(args, training=True):
    """Join the processes torchrun started, if it did; choose the device, seed, fill in args.lr. Returns a Context.

    training=False: print nothing of batch and learning rate. SystemExit: there is no such device."""
    rank, world_size, local_rank = (int(os.environ.get(name, default)) for name, default in
                                    (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    try:
        best = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(best if args.device == "auto" else args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}")
    cuda = device.type == "cuda"
    if cuda:
        if world_size > 1 or device.index is None:
            device = torch.device("cuda", local_rank)     # one GPU per process
        torch.cuda.set_device(device)
        torch.cuda.init()                                 # so that seed_everything reaches it
    if args.threads:
        torch.set_num_threads(args.threads)
    if world_size > 1:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    ctx = Context(rank, world_size, device)
    seed_everything(args.seed)                            # without the rank: all processes build the same model

    effective, rule = args.batch_size * args.accum * world_size, "given by --lr, not scaled"
    if args.lr is None:
        args.lr = args.recipe_lr * effective / args.recipe_batch
        rule = "the recipe's" if effective == args.recipe_batch else "scaled linearly with the batch"
    if training:
        ctx.print(f"effective batch {effective} = {args.batch_size} x {args.accum} micro-steps x {world_size} "
                  f"processes, learning rate {args.lr:g} ({rule}; recipe: {args.recipe_lr:g} at {args.recipe_batch}), "
                  f"{device}")
    return ctx


def run_length(args, loader):
    """-> (optimizer steps of the whole run, steps per epoch). Batches that fill no whole step are left out.

    ValueError: the run or an epoch is shorter than one step, or neither --epochs nor --steps is given.
    """
    per_epoch = len(loader) // args.accum
    limits = [limit for limit in (args.epochs and round(args.epochs * per_epoch), args.steps) if limit is not None]
    if not per_epoch or not limits or not min(limits):
        raise ValueError(f"{len(loader)} batches per epoch, --accum {args.accum}, --epochs {args.epochs}, --steps "
                         f"{args.steps}: give one of the last two, at least one step, and an --accum of at most the "
                         "number of batches")
    return int(min(limits)), per_epoch


def seed_everything(*key):
    """Seed all global generators from the integers in `key`: random, NumPy's legacy one (timm's mixup), torch's."""
    words = [int(word) for word in np.random.SeedSequence(key).generate_state(3)]
    random.seed(words[0])
    np.random.seed(words[1])
    torch.default_generator.manual_seed(words[2])         # torch.manual_seed takes 0.1 ms, too much for every step
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(words[2])


# ---- Schedules: functions of the optimizer step, 0 .. total-1, after a linear warmup from start to value -------------

def cosine(step, total, value, *, warmup=0, start=0.0, end=0.0):
    """From value to end along half a cosine. For a learning rate or, with end > value, a weight decay."""
    if step < warmup:
        return start + (value - start) * step / warmup
    return end + (value - end) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def polynomial(step, total, value, *, warmup=0, start=0.0, end=0.0, power=1.0):
    """From value to end as (remaining share of the steps) ** power."""
    if step < warmup:
        return start + (value - start) * step / warmup
    return end + (value - end) * (1 - (step - warmup) / (total - warmup)) ** power


def step_decay(step, value, milestones, *, factor=0.1, warmup=0, start=0.0):
    """value, times `factor` from each of the `milestones` (steps) on."""
    if step < warmup:
        return start + (value - start) * step / warmup
    return value * factor ** sum(step >= milestone for milestone in milestones)


# ---- Parameters and tensors ------------------------------------------------------------------------------------------

def bias_or_1d(name, param):
    return param.ndim <= 1 or name.split(".")[-1] == "bias"


def parameter_groups(model, weight_decay, no_decay=bias_or_1d, lr_scale=None):
    """Optimizer groups of all trainable parameters, each parameter once, in the model's order.

    no_decay(name, param) -> bool: exempt from weight decay. lr_scale(name, param) -> float: the parameter's share of
    the learning rate (layer-wise decay). fit() sets lr = schedule * lr_scale and weight_decay = schedule * wd_scale.
    ValueError: everything is frozen.
    """
    groups = {}
    for name, param in model.named_parameters():          # names a shared parameter once
        if param.requires_grad:
            key = (0.0 if no_decay(name, param) else 1.0, float(lr_scale(name, param)) if lr_scale else 1.0)
            groups.setdefault(key, []).append(param)
    if not groups:
        raise ValueError("no trainable parameters")
    return [{"params": params, "weight_decay": weight_decay * wd, "wd_scale": wd, "lr_scale": lr}
            for (wd, lr), params in groups.items()]


def map_tensors(function, nested):
    """`nested` with function(tensor) for every tensor in its dicts, lists and (named) tuples; other values stay."""
    if isinstance(nested, torch.Tensor):
        return function(nested)
    if isinstance(nested, dict):
        return {key: map_tensors(function, value) for key, value in nested.items()}
    if isinstance(nested, (list, tuple)):
        values = [map_tensors(function, value) for value in nested]
        return type(nested)(*values) if hasattr(nested, "_fields") else type(nested)(values)
    return nested


# ---- Stopping: non-finite numbers, full memory, signals --------------------------------------------------------------

class NonFiniteError(RuntimeError):
    """Loss or gradient is nan or inf; the optimizer step was not taken. Attributes: step, epoch (from 1), where."""

    def __init__(self, what, step, epoch, where):
        super().__init__(
            f"{what} at step {step}, epoch {epoch}. It begins in {where}. If that is no bug: a lower --lr, a longer "
            "warmup, --clip 1 or no --amp, from the last checkpoint on with --resume --resume-changed")
        self.step, self.epoch, self.where = step, epoch, where


def not_finite(nested):
    """Is there a nan or inf in any tensor of the nested value?"""
    found = []
    map_tensors(lambda tensor: found.append(not torch.isfinite(tensor).all()), nested)
    return any(found)


def nonfinite_source(args, ctx, model, loss_fn, batches, step):
    """Where the loss of `step` went wrong, in words: repeats its forward passes with the same random numbers.

    Every process repeats all of its batches and none stops early: a SyncBatchNorm would wait for the others.
    """
    names = {module: name or "the model" for name, module in model.named_modules()}
    where = [f"the parameter {name}" for name, param in model.named_parameters() if not_finite(param)]

    def hook(module, inputs, output):                     # inner modules finish, and are asked, before outer ones
        if not where and not_finite(output):
            where.append(f"the output of {names[module]} ({type(module).__name__})")

    handles = [module.register_forward_hook(hook) for module in model.modules()]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):      # a compiled module calls no hooks
        for micro, batch in enumerate(batches):
            if not where and not_finite(batch):
                where.append("the input batch")
            loss = micro_step(args, ctx, model, loss_fn, batch, step, micro)
            if not where and not_finite(loss):
                where.append("the loss function (all modules' outputs are finite)")
    for handle in handles:
        handle.remove()
    everyone = [where[:1]]
    if ctx.world_size > 1:
        everyone = [None] * ctx.world_size
        dist.all_gather_object(everyone, [f"{text}, process {ctx.rank}" for text in where[:1]])
    return next((first[0] for first in everyone if first), "unknown: repeated, the loss is finite (faulty kernel?)")


def out_of_memory_advice(error, args):
    """What to do about `error`, or None when it is not about memory."""
    signs = "out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED"
    if not isinstance(error, torch.OutOfMemoryError) and not any(sign in str(error) for sign in signs):
        return None
    half = f"--batch-size {args.batch_size // 2} --accum {args.accum * 2} (the same effective batch)"
    return (f"{error}\nOut of memory with --batch-size {args.batch_size} --accum {args.accum}: try "
            f"{half if args.batch_size > 1 else 'a smaller model or image'}, or --amp; a checkpoint goes on with it "
            "with --resume --resume-changed")


@contextlib.contextmanager
def plain_errors(prog, args, *kinds):
    """For a script's main(): what the user can put right, `kinds` among it, ends in one line instead of a traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError, ImportError, NonFiniteError, *kinds) as error:
        text = str(error)
        if "Original Traceback" in text:                  # from a loading process: only the message is wanted
            text = text.rpartition(f"{type(error).__name__}: ")[2].strip()
        raise SystemExit(f"{prog}: {text}") from error
    except RuntimeError as error:
        if advice := out_of_memory_advice(error, args):
            raise SystemExit(f"{prog}: {advice}") from error
        raise


@contextlib.contextmanager
def stop_signals():
    """Yields a list. The first SIGTERM or SIGINT only goes into it; a second Ctrl-C ends the process at once."""
    received, pid = [], os.getpid()

    def handle(signum, frame):
        received.append(signum)
        # Schedulers and torchrun send one wish to stop several times, and SIGKILL when they lose patience. A second
        # Ctrl-C is meant: it gets the system's own action, which works even inside a hung kernel.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN if "TORCHELASTIC_RUN_ID" in os.environ else signal.SIG_DFL)
        if os.getpid() == pid:                            # forked loading processes inherit the handler
            os.write(2, b"\nstopping after this step; a second Ctrl-C: at once, without saving\n")

    old = {signum: signal.signal(signum, handle) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)


# ---- Files -----------------------------------------------------------------------------------------------------------

def write_whole(path, write, required=True):
    """Call write(file) on a temporary file, then rename it: at any moment `path` is the old file or the whole new one.

    Not required: failure is a warning. A disk that is full for an hour should not end the run of a week.
    """
    temporary = path.with_name(path.name + ".tmp")        # in the same folder: renaming is atomic within one disk
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())                       # else a power cut can leave the new name on no data
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if required or not isinstance(error, (OSError, RuntimeError)):    # RuntimeError: torch.save on a full disk
            raise
        print(f"\nWARNING: cannot write {path}. The previous one is kept and training goes on.\n{error}\n",
              file=sys.stderr, flush=True)


def draw_curve(path, history, metric):
    """A PNG of the training loss and the metric against the epoch."""
    from matplotlib.figure import Figure                  # without pyplot: no window system, no global state
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    left.plot([line["epoch"] for line in history], [line["loss"] for line in history], ".-C0")
    left.set(xlabel="epoch", ylabel="training loss (blue)")
    if points := [(line["epoch"], line["metrics"][metric]) for line in history if metric in line["metrics"]]:
        right = left.twinx()
        right.plot(*zip(*points), ".-C1")
        right.set_ylabel(f"{metric} (orange)")
    write_whole(path, lambda file: figure.savefig(file, format="png"), required=False)


def git_revision():
    """The commit of this folder, with "-dirty" when tracked files differ from it; "unknown" outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def checkpoint_to_resume(args):
    """The path to resume from, or None for a fresh start. SystemExit: a fresh start would overwrite a checkpoint."""
    out = Path(args.out)
    path = Path(args.resume) if args.resume else None
    if args.resume == "auto":                             # best.pt alone: the disk was full when last.pt was due
        path = out / ("best.pt" if (out / "best.pt").exists() and not (out / "last.pt").exists() else "last.pt")
    if path and not path.exists() and args.resume != "auto":
        raise SystemExit(f"--resume {path}: no such file")
    for existing in (out / "last.pt", out / "best.pt"):
        if existing.exists() and (path is None or not path.exists() or path.resolve().parent != out.resolve()):
            raise SystemExit(f"{existing} exists: continue that run with --resume, or choose another --out")
    return path if path and path.exists() else None


def check_same_run(old, new, harmless):
    """Compare the arguments of checkpoint and run. SystemExit names those that differ and would change the result."""
    changed = {key for key in old if key in new and old[key] != new[key]} - harmless
    text = ", ".join(f"{key} {new[key]!r} (checkpoint: {old[key]!r})" for key in sorted(changed))
    if "steps_per_epoch" in changed:                      # then the checkpoint's step is no position in the data
        raise SystemExit(f"cannot resume: {text}. Keep the data and batch size x accum x processes")
    if changed and not new["resume_changed"]:
        raise SystemExit(f"cannot resume exactly, these differ: {text}. Give the checkpoint's values, or add "
                         "--resume-changed to go on with the new ones")
    return text


# ---- The loop --------------------------------------------------------------------------------------------------------

def micro_step(args, ctx, net, loss_fn, batch, step, micro):
    """The mean loss of one batch from the host, with the random numbers that belong to it."""
    # From pinned memory the copy overlaps with computation. A copy on the CPU too: loss_fn may mix images in place.
    batch = map_tensors(lambda tensor: tensor.to(ctx.device, non_blocking=True, copy=True), batch)
    seed_everything(args.seed, step, micro, ctx.rank)
    with torch.autocast(ctx.device.type, torch.bfloat16, enabled=args.amp):
        return loss_fn(net, batch)


def train_step(args, ctx, model, net, loss_fn, optimizer, batches, step, epoch, signals):
    """One optimizer step from --accum batches -> (mean loss, gradient norm before clipping, should the run stop?).

    model: the bare one; net: the same within DistributedDataParallel if there are peers. All three results are the
    same on every process. Raises NonFiniteError, on every process, before the optimizer has moved.
    """
    kept, mean_loss = [], 0.0
    for micro in range(args.accum):
        kept.append(next(batches))                        # on the host, should the step have to be repeated
        share = net is not model and micro == args.accum - 1              # one exchange of gradients per step
        with contextlib.nullcontext() if net is model or share else net.no_sync():
            loss = micro_step(args, ctx, net, loss_fn, kept[-1], step, micro) / args.accum
            loss.backward()
        mean_loss += loss.detach().float()

    params = [param for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
    norm = torch.nn.utils.get_total_norm([param.grad for param in params]).float()
    report = ctx.sum(torch.stack([mean_loss, norm, norm.new_full((), len(signals))])).tolist()         # the one wait
    mean_loss, mean_norm, stopping = (value / ctx.world_size for value in report)
    if not math.isfinite(mean_loss):
        where = nonfinite_source(args, ctx, model, loss_fn, kept, step)
        raise NonFiniteError(f"the loss is {mean_loss}", step, epoch + 1, where)
    if not math.isfinite(mean_norm):
        bad = [name for name, param in model.named_parameters() if param.grad is not None and not_finite(param.grad)]
        where = f"the gradients of {bad[0]} to {bad[-1]} ({len(bad)} parameters)" if bad else "the norm: it overflows"
        raise NonFiniteError(f"the loss is finite, the gradient norm is {mean_norm}", step, epoch + 1, where)
    if args.clip:
        torch.nn.utils.clip_grads_with_norm_(params, args.clip, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return mean_loss, mean_norm, stopping > 0


def fit(args, ctx, model, loader, loss_fn, optimizer, lr, *, weight_decay=None, evaluate=None, metric=None,
        lower_is_better=False, harmless=()):
    """Train `model` as `args` say; returns the log, a list of one dict per epoch. The model holds the last weights.

    model: on ctx.device. Each epoch puts it in train() mode: override train() to keep a part in eval mode. To compile,
        use model.compile(), which keeps the parameters' names.
    loader: len() and batch_sampler.set_epoch(epoch, skip), `skip` batches of the epoch having been used.
    loss_fn(model, batch) -> scalar mean loss. The batch, any nesting of tensors, is on the device. Call model(...),
        none of its methods: with several processes it is wrapped.
    lr(step), weight_decay(step): schedules; without the latter the optimizer's weight decays stay.
    evaluate(model, epoch) -> {name: number}, called on every process after `epoch` epochs, with the moving average when
        --ema is on; `metric` names the number that decides which epoch becomes OUT/best.pt.
    harmless: names in `args` that a resumed run may change (paths, for example).

    Raises NonFiniteError; SystemExit for a refused start or full memory (status 1) and, after a checkpoint, for SIGTERM
    or SIGINT (128 + its number); OSError or RuntimeError when the final checkpoint cannot be written.
    """
    total, per_epoch = run_length(args, loader)
    epochs, effective = math.ceil(total / per_epoch), args.batch_size * args.accum * ctx.world_size
    out, path, cuda = Path(args.out), checkpoint_to_resume(args), ctx.device.type == "cuda"
    identity = {"args": {**json.loads(json.dumps(vars(args), default=str)), "world_size": ctx.world_size,
                         "steps_per_epoch": per_epoch}, "git": git_revision(), "torch": str(torch.__version__)}
    ema = None
    if args.ema:
        from timm.utils import ModelEmaV3                 # here: only runs with --ema need timm
        ema = ModelEmaV3(model, decay=args.ema)
    progress = {"step": 0, "epoch": 0, "best": None, "history": [],       # epoch: finished ones, history: their log
                "running": {"loss": 0.0, "grad_norm": 0.0, "steps": 0, "seconds": 0.0}}       # sums of this epoch
    if path:
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            checkpoint["args"], checkpoint["history"]
        except Exception as error:                        # a damaged or foreign file can fail in any way
            raise SystemExit(f"--resume: {path} is no readable checkpoint of a run ({type(error).__name__}: {error}). "
                             f"Try --resume {out / 'best.pt'}")
        changed = check_same_run(checkpoint["args"], identity["args"], HARMLESS | set(harmless))
        try:
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            if ema:
                ema.module.load_state_dict(checkpoint["ema"] or checkpoint["model"])
        except (RuntimeError, ValueError) as error:
            raise SystemExit(f"--resume: {path} belongs to another model or optimizer:\n{str(error)[:2000]}")
        progress = {key: checkpoint[key] for key in progress}
        if progress["step"] < total:                      # that run may have ended by --steps within an epoch
            progress["epoch"] = min(progress["epoch"], progress["step"] // per_epoch)
            progress["history"] = progress["history"][:progress["epoch"]]
        del checkpoint                                    # a second copy of everything
        if path.resolve().parent != out.resolve():
            progress["best"] = None                       # the new folder gets a best.pt of its own
        ctx.print(f"resuming {path} at step {progress['step']} of {total}", changed and f"with changed {changed}")
    elif args.resume:
        ctx.print(f"nothing to resume in {out}, starting from the beginning")
    if ctx.sum(torch.tensor(float(progress["step"]), device=ctx.device)).item() != progress["step"] * ctx.world_size:
        raise SystemExit(f"the processes resume at different steps, this one at {progress['step']}: --out has to be a "
                         "folder that all machines share")
    net = model
    if ctx.world_size > 1:
        net = DistributedDataParallel(model, device_ids=[ctx.device] if cuda else None)
    draw = importlib.util.find_spec("matplotlib") is not None
    if ctx.is_main:
        out.mkdir(parents=True, exist_ok=True)
        config = {**identity, "command": sys.argv, "total_steps": total, "first_step": progress["step"],
                  "started": time.strftime("%Y-%m-%d %H:%M:%S %z"), "seed": args.seed,
                  "device": torch.cuda.get_device_name(ctx.device) if cuda else "cpu",
                  "parameters": sum(param.numel() for param in model.parameters())}
        write_whole(out / "config.json", lambda file: file.write(json.dumps(config, indent=2).encode()))
        if not draw:
            print("matplotlib is not installed: no curve.png", flush=True)

    def save(name, required=False):
        if ctx.is_main:
            state = {**progress, **identity, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                     "ema": ema.module.state_dict() if ema else None}
            write_whole(out / name, lambda file: torch.save(state, file), required)

    def leave(step):
        save("last.pt", required=True)
        ctx.wait()                                        # torchrun ends all processes once one has left
        ctx.print(f"\nstopped after step {step} of {total}; the same command with --resume continues")
        raise SystemExit(128 + (signals or [signal.SIGTERM])[0])

    # disable=None: a bar only on a terminal. Elsewhere a line per epoch is enough.
    saved, drawn, running_from = time.monotonic(), -math.inf, progress["step"]
    bar = tqdm(total=total, initial=progress["step"], unit="step", disable=None if ctx.is_main else True)
    with stop_signals() as signals, bar:
        for epoch in range(progress["epoch"], epochs):
            running, end = progress["running"], min((epoch + 1) * per_epoch, total)
            bar.set_description(f"epoch {epoch + 1}/{epochs}", refresh=False)
            model.train()
            loader.batch_sampler.set_epoch(epoch, (progress["step"] - epoch * per_epoch) * args.accum)
            batches = iter(loader) if progress["step"] < end else None    # None: only the evaluation is missing
            while progress["step"] < end:
                began, step = time.perf_counter(), progress["step"]
                for group in optimizer.param_groups:
                    group["lr"] = lr(step) * group.get("lr_scale", 1.0)
                    if weight_decay:
                        group["weight_decay"] = weight_decay(step) * group.get("wd_scale", 1.0)
                try:
                    loss, norm, stop = train_step(args, ctx, model, net, loss_fn, optimizer, batches, step, epoch,
                                                  signals)
                except Exception as error:                # nothing has moved in this step: keep what was learnt before
                    if step > running_from:
                        with contextlib.suppress(Exception):
                            save("last.pt")
                    if advice := out_of_memory_advice(error, args):
                        raise SystemExit(advice) from error
                    raise
                if ema:
                    ema.update(model)
                progress["step"] += 1
                for key, value in zip(running, (loss, norm, 1, time.perf_counter() - began)):
                    running[key] += value
                speed = running["steps"] * effective / running["seconds"]
                bar.set_postfix_str(f"loss {loss:.4f}, lr {lr(step):.2e}, {speed:.0f} img/s", refresh=False)
                bar.update()
                if stop:
                    leave(step + 1)
                if time.monotonic() - saved >= 60 * args.save_minutes:
                    save("last.pt")
                    saved = time.monotonic()

            metrics, finished = {}, epoch + 1 == epochs
            if evaluate and (finished or (epoch + 1) % args.eval_every == 0):
                if time.monotonic() - saved > 60:         # evaluations can be long, and schedulers impatient
                    save("last.pt")
                target = ema.module if ema else model
                if ctx.world_size > 1:                    # a BatchNorm has seen other samples on each process
                    for buffer in target.buffers():
                        dist.broadcast(buffer, 0)
                target.eval()
                with torch.no_grad():                     # inference_mode would spoil tensors the model caches
                    metrics = {key: float(value) for key, value in (evaluate(target, epoch + 1) or {}).items()}
            line = {"epoch": epoch + 1, "step": end, "lr": lr(end - 1), "seconds": running["seconds"],
                    **{key: running[key] / running["steps"] for key in ("loss", "grad_norm")}, "metrics": metrics,
                    "img_per_s": running["steps"] * effective / running["seconds"],
                    "peak_mib": torch.cuda.max_memory_allocated(ctx.device) / 2**20 if cuda else None}
            progress |= {"epoch": epoch + 1, "history": progress["history"] + [line],
                         "running": {"loss": 0.0, "grad_norm": 0.0, "steps": 0, "seconds": 0.0}}
            if ctx.is_main:                               # before the checkpoint, else a kill may lose a line
                numbers = {"loss": line["loss"], "lr": line["lr"], "img/s": line["img_per_s"],
                           **{f"val {key}": value for key, value in metrics.items()}}
                bar.write(f"epoch {epoch + 1}/{epochs}: " + ", ".join(f"{key} {x:.4g}" for key, x in numbers.items()))
                log = "".join(json.dumps(line) + "\n" for line in progress["history"]).encode()
                write_whole(out / "log.jsonl", lambda file: file.write(log), required=False)
                if draw and (finished or time.monotonic() - drawn > 60):  # drawing takes a while, epochs may be short
                    draw_curve(out / "curve.png", progress["history"], metric)
                    drawn = time.monotonic()
            value, best = metrics.get(metric), progress["best"]
            if value is not None and (best is None or (value < best if lower_is_better else value > best)):
                progress["best"] = value
                save("best.pt")
            save("last.pt", required=finished)
            saved = time.monotonic()
            if not finished and ctx.sum(torch.tensor(float(len(signals)), device=ctx.device)).item():
                leave(end)
    ctx.wait()                                            # now all processes may read the checkpoints
    return progress["history"]


def count_bad(ctx, *datasets):
    """How many files of these data.Files some process has found bad."""
    return sum(int((ctx.sum(files.bad.to(ctx.device, torch.float32)) > 0).sum()) for files in datasets)


def evaluate_classifier(model, loader, ctx, amp=False):
    """-> {"top1", "top5": percent, "loss": mean cross-entropy, "images": how many} over all processes' loaders, whose
    batches are (images, labels), or None where no image could be read.

    Sums and counts are added up, so batches and processes of unequal size weigh as they should.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=ctx.device)         # loss, right at first, among five, images
    with torch.no_grad():
        for images, labels in filter(None, loader):
            images, labels = images.to(ctx.device, non_blocking=True), labels.to(ctx.device, non_blocking=True)
            with torch.autocast(ctx.device.type, torch.bfloat16, enabled=amp):
                logits = model(images).float()            # (B, classes)
            hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]                       # (B, 5)
            sums[0] += F.cross_entropy(logits, labels, reduction="sum")
            sums[1] += hits[:, 0].sum()
            sums[2] += hits.sum()
            sums[3] += len(labels)
    loss, top1, top5, count = ctx.sum(sums).tolist()
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count, "images": count}
