"""
Training: one loop for every experiment.

    ctx = setup(args)                               # processes, device, seed
    model = create_model(...).to(ctx.device)        # after setup: its weights follow from --seed
    lr = peak_lr(args, ctx)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=lr)
    total, per_epoch = run_length(args, loader)     # in optimizer steps, as everything here
    fit(args, ctx, model, loader, loss_fn, optimizer, lambda step: cosine(step, total, lr),
        evaluate=lambda model, epoch: {"top1": ...}, metric="top1")

1. A run is a function of its options and the step. Learning rate, weight decay and all random
   numbers follow from the step, the order of the data from the epoch. So a checkpoint is weights,
   sums and counters, and a run resumed from any step, also amid an epoch, ends in the same bits (on
   a GPU: if its kernels are deterministic).
2. One wait for the device per step: loss, gradient norm and the wish to stop arrive together,
   before the optimizer moves.
3. Files are written whole or not at all. A crash at any moment leaves the previous checkpoint,
   readable.

Symbols: b = --batch-size, per process and micro-step; w processes; the effective batch is
b x --accum x w. On several GPUs: torchrun --nproc-per-node 8 train_imagenet.py ...
"""
import contextlib
import json
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

import logs
import safety
import sharding
import sinks
from processes import Context, join, seed_everything

# ---- Options, and what follows from them ---------------------------------------------------------


def setup(args, training: bool = True) -> Context:
    """Joins the processes that a launcher started, if it did; chooses the device, seeds.
    training=False: neither locks --out nor prints batch and learning rate. SystemExit: no such
    device. ValueError: another run works in --out, or nothing can be written there; the processes
    do not fit together. ImportError: a package of --log is missing."""
    ctx = join(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    seed_everything(args.seed)  # without the rank: all processes build the same model
    if not training:
        return ctx
    if args.log:
        sinks.require(args.log)
    problem = safety.lock_folder(args.out) if ctx.is_main else ""
    problem = ctx.gather(problem)[0]
    if problem:  # all processes raise it: none waits for one that was refused
        raise ValueError(problem)
    safety.outlast_readers()
    rule = "scaled with the batch" if args.lr is None else "as given"
    ctx.print(f"effective batch {effective_batch(args, ctx)} = {args.batch_size} x {args.accum} "
              f"micro-steps x {ctx.world_size} processes, learning rate {peak_lr(args, ctx):g} "
              f"{rule} (the recipe's: {args.recipe_lr:g} at {args.recipe_batch}), {ctx.device}")
    return ctx


def effective_batch(args, ctx: Context) -> int:
    """Samples per optimizer step."""
    return args.batch_size * args.accum * ctx.world_size


def peak_lr(args, ctx: Context) -> float:
    """--lr or, without it, the recipe's learning rate scaled linearly with the effective batch."""
    if args.lr is not None:
        return args.lr
    return args.recipe_lr * effective_batch(args, ctx) / args.recipe_batch


def run_length(args, loader) -> tuple[int, int]:
    """-> (optimizer steps of the run, steps per epoch). Batches that fill no step are left out.
    ValueError: the run is shorter than a step."""
    per_epoch = len(loader) // args.accum
    total = math.inf if args.epochs is None else round(args.epochs * per_epoch)
    if args.steps is not None:
        total = min(total, args.steps)
    if not per_epoch or not total:
        raise ValueError(f"{len(loader)} batches per epoch, --accum {args.accum}, --epochs "
                         f"{args.epochs}: a run needs at least one step")
    return total, per_epoch


# ---- Schedules: functions of the step, 0 .. total-1, after a linear warmup from start to value ---

def cosine(step, total, value, *, warmup=0, start=0.0, end=0.0) -> float:
    """From value to end along half a cosine. Also for a weight decay, with end > value."""
    if step < warmup:
        return start + (value - start) * step / warmup
    share = (step - warmup) / (total - warmup)
    return end + (value - end) * 0.5 * (1 + math.cos(math.pi * share))


def polynomial(step, total, value, *, warmup=0, start=0.0, end=0.0, power=1.0) -> float:
    """From value to end as (remaining share of the steps) ** power."""
    if step < warmup:
        return start + (value - start) * step / warmup
    share = (step - warmup) / (total - warmup)
    return end + (value - end) * (1 - share) ** power


def step_decay(step, value, milestones, *, factor=0.1, warmup=0, start=0.0) -> float:
    """value, times `factor` from each of the `milestones` (steps) on."""
    if step < warmup:
        return start + (value - start) * step / warmup
    return value * factor ** sum(step >= milestone for milestone in milestones)


# ---- Parameters ----------------------------------------------------------------------------------

def bias_or_1d(name: str, param: torch.Tensor) -> bool:
    """Biases, norms, and the skip D of a mixer, which has a row for each of its directions."""
    last = name.split(".")[-1]
    return param.ndim <= 1 or last.endswith("bias") or last == "D"


def parameter_groups(model, weight_decay: float, no_decay: Callable = bias_or_1d,
                     lr_scale: Callable = lambda name, param: 1.0) -> list[dict]:
    """Optimizer groups of all trainable parameters, each once, in the model's order.

    no_decay(name, param) -> bool: exempt from weight decay.
    lr_scale(name, param) -> float: its share of the learning rate (layer-wise decay).
    fit() sets lr = schedule * lr_scale and weight_decay = schedule * wd_scale."""
    groups = {}
    for name, param in model.named_parameters():  # names a shared parameter once
        if param.requires_grad:
            key = (0.0 if no_decay(name, param) else 1.0, float(lr_scale(name, param)))
            groups.setdefault(key, []).append(param)
    if not groups:
        raise ValueError("no trainable parameters")
    return [{"params": params, "weight_decay": weight_decay * wd, "wd_scale": wd, "lr_scale": lr}
            for (wd, lr), params in groups.items()]


# ---- A run: what is trained, and how far it is ---------------------------------------------------

# What a checkpoint says of it. epoch: finished ones; history: their log; running: sums of the next.
PROGRESS = ("step", "epoch", "best", "history", "running")
NO_SUMS = {"loss": 0.0, "grad_norm": 0.0, "steps": 0, "seconds": 0.0}


@dataclass
class Run:
    """What fit() works on. The folder of --out holds it, in last.pt and best.pt."""
    args: object
    ctx: Context
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    total: int  # steps
    per_epoch: int
    identity: dict  # what a checkpoint says besides progress and weights
    net: torch.nn.Module  # the model, within DistributedDataParallel if there are peers
    ema: torch.nn.Module | None = None
    sharded: bool = False  # are weights and optimizer state split over the processes?
    step: int = 0
    epoch: int = 0
    best: float | None = None
    history: list = field(default_factory=list)
    running: dict = field(default_factory=NO_SUMS.copy)
    first_step: int = 0  # of this process
    saved: float = field(default_factory=time.monotonic)
    drawn: float = -math.inf  # when the curve was

    @property
    def out(self) -> Path:
        return Path(self.args.out)

    @property
    def epochs(self) -> int:
        return math.ceil(self.total / self.per_epoch)

    @property
    def speed(self) -> float:
        """Images per second of this epoch."""
        images = self.running["steps"] * effective_batch(self.args, self.ctx)
        return images / self.running["seconds"]

    def count(self, loss: float, grad_norm: float, seconds: float) -> None:
        """Adds a step to the sums of this epoch."""
        step = {"loss": loss, "grad_norm": grad_norm, "steps": 1, "seconds": seconds}
        self.running = {key: self.running[key] + step[key] for key in NO_SUMS}

    def save(self, name: str, required: bool = False) -> None:
        self.saved = time.monotonic()
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "ema": self.ema and self.ema.module.state_dict()}
        if self.sharded:  # all processes are here
            state = tree_map_only(
                torch.Tensor, lambda x: sharding.whole(x, self.ctx.is_main), state)
        state |= {**{key: getattr(self, key) for key in PROGRESS}, **self.identity}
        if self.ctx.is_main:
            safety.write_whole(self.out / name, lambda file: torch.save(state, file), required)

    def leave(self, signals: list) -> None:
        """Ends the process as a signal asks for that this process or another one got."""
        self.save("last.pt", required=True)
        self.ctx.total(0)  # torchrun ends all processes once one has left
        self.ctx.print(f"\nstopped after step {self.step} of {self.total}; the same command with "
                       "--resume continues")
        raise SystemExit(128 + (signals or [signal.SIGTERM])[0])


def open_run(args, ctx, model, optimizer, loader, about) -> Run:
    """A run at its start, or where --resume finds it; OUT/config.json says what it is."""
    path = safety.checkpoint_to_resume(args.out, args.resume)
    total, per_epoch = run_length(args, loader)
    options = {**vars(args), "lr": peak_lr(args, ctx), "world_size": ctx.world_size,
               "steps_per_epoch": per_epoch}
    about = {"args": options, **about, "git": safety.git_revision(), "torch": torch.__version__}
    if fingerprint := getattr(getattr(loader, "dataset", None), "fingerprint", None):
        about["training_set"] = fingerprint()
    identity = json.loads(json.dumps(about, default=str))  # what a checkpoint gives back
    run = Run(args, ctx, model, optimizer, total, per_epoch, identity, net=model)
    if args.ema:
        from timm.utils import ModelEmaV3  # here: only runs with --ema need timm
        run.ema = ModelEmaV3(model, decay=args.ema)
    if path:
        take_up(run, path)
    elif args.resume:
        ctx.print(f"nothing to resume in {run.out}, starting from the beginning")
    if ctx.total(run.step) != run.step * ctx.world_size:
        raise SystemExit(f"the processes resume at different steps, this one at {run.step}: --out "
                         "has to be a folder that all machines share")
    if ctx.is_main:
        logs.write_config(run)
    return run


def take_up(run: Run, path: Path) -> None:
    """Goes on where the checkpoint is. SystemExit: it is damaged, or another run's."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        progress = {key: checkpoint[key] for key in PROGRESS}
        before = {**checkpoint, **checkpoint["args"]}
    except Exception as error:  # a damaged or foreign file can fail in any way
        raise SystemExit(f"--resume: {path} is no readable checkpoint of a run "
                         f"({type(error).__name__}: {error}). Try --resume {run.out / 'best.pt'}"
                         ) from error
    changed = safety.check_same_run(before, {**run.identity, **run.identity["args"]})
    groups = [{key: value for key, value in group.items() if key != "params"}
              for group in run.optimizer.param_groups]
    try:
        run.model.load_state_dict(checkpoint["model"])
        run.optimizer.load_state_dict(checkpoint["optimizer"])
        if changed:
            for group, options in zip(run.optimizer.param_groups, groups):
                group.update(options)  # this run's, such as --weight-decay
        if run.ema:
            run.ema.module.load_state_dict(checkpoint["ema"] or checkpoint["model"])
    except (RuntimeError, ValueError) as error:
        raise SystemExit(f"--resume: {path} belongs to another model or optimizer:\n"
                         f"{str(error)[:2000]}")
    vars(run).update(progress, first_step=progress["step"])
    if run.step < run.total:  # that run may have ended by --steps within an epoch
        run.epoch = min(run.epoch, run.step // run.per_epoch)
        run.history = run.history[:run.epoch]
    if path.resolve().parent != run.out.resolve():
        run.best = None  # the new folder gets a best.pt of its own
    if changed:
        changed = f" with changed {changed}"
    run.ctx.print(f"resuming {path} at step {run.step} of {run.total}{changed}")


# ---- One step ------------------------------------------------------------------------------------

def micro_step(run: Run, net, loss_fn: Callable, batch, micro: int) -> torch.Tensor:
    """The mean loss of one batch from the host, with the random numbers that belong to it."""
    # From pinned memory the copy overlaps with computation. A copy on the CPU too: loss_fn may mix
    # images in place.
    device = run.ctx.device
    batch = tree_map_only(
        torch.Tensor, lambda x: x.to(device, non_blocking=True, copy=True), batch)
    seed_everything(run.args.seed, run.step, micro, run.ctx.rank)
    with torch.autocast(device.type, torch.bfloat16, enabled=run.args.amp):
        return loss_fn(net, batch)


def train_step(run: Run, loss_fn: Callable, batches, signals: list) -> tuple:
    """One optimizer step from --accum batches -> (mean loss, gradient norm before clipping, stop?,
    save?), the same on every process. So is a NonFiniteError, raised before the optimizer moves."""
    kept = []  # on the host, should the step have to be repeated
    mean_loss = 0.0
    for micro in range(run.args.accum):
        kept.append(next(batches))
        wait = run.net is not run.model and micro + 1 < run.args.accum
        with run.net.no_sync() if wait else contextlib.nullcontext():  # gradients are summed once
            loss = micro_step(run, run.net, loss_fn, kept[-1], micro) / run.args.accum
            loss.backward()
        mean_loss += loss.detach().float()
    params = [param for group in run.optimizer.param_groups for param in group["params"]
              if param.grad is not None]
    norm = torch.nn.utils.get_total_norm([param.grad for param in params]).float()
    if run.sharded:
        norm = norm.full_tensor()
    save = time.monotonic() - run.saved >= 60 * run.args.save_minutes
    wishes = [norm.new_full((), number) for number in (len(signals), save)]
    report = run.ctx.sum(torch.stack([mean_loss, norm, *wishes])).tolist()  # the one wait
    mean_loss, mean_norm, stop, save = (value / run.ctx.world_size for value in report)
    if not math.isfinite(mean_loss + mean_norm):
        raise nonfinite(run, loss_fn, kept, mean_loss, mean_norm)
    if run.args.clip:
        torch.nn.utils.clip_grads_with_norm_(params, run.args.clip, norm)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if run.ema:
        run.ema.update(run.model)
    run.step += 1
    return mean_loss, mean_norm, stop > 0, save > 0


def nonfinite(run: Run, loss_fn: Callable, batches: list, loss: float, norm: float):
    """The error that says where a nan or inf came from, the same on every process: each repeats
    the step's forward passes."""
    if math.isfinite(loss):
        what = f"the loss is finite, the gradient norm is {norm}"
        return safety.NonFiniteError(what, run, safety.nonfinite_gradients(run.model))
    where = safety.nonfinite_source(
        run.model, lambda batch, micro: micro_step(run, run.model, loss_fn, batch, micro), batches)
    if where and run.ctx.world_size > 1:
        where = f"{where}, process {run.ctx.rank}"
    everyone = run.ctx.gather(where)
    where = next(filter(None, everyone), "unknown: repeated, the loss is finite (faulty kernel?)")
    return safety.NonFiniteError(f"the loss is {loss}", run, where)


# ---- The loop ------------------------------------------------------------------------------------

def fit(args, ctx: Context, model, loader, loss_fn: Callable, optimizer, lr: Callable, *,
        weight_decay: Callable | None = None, evaluate: Callable | None = None,
        metric: str | None = None, lower_is_better: bool = False, about: dict | None = None,
        shard_blocks=()) -> list[dict]:
    """Trains `model`; returns the log, a dict per epoch. The model holds the last weights.

    model: on ctx.device. Each epoch puts it in train() mode: override train() to keep a part in
        eval mode. To compile, use model.compile(), which keeps the parameters' names.
    loader: len() and batch_sampler.set_epoch(epoch, skip), `skip` batches having been used.
    loss_fn(model, batch) -> scalar mean loss. The batch, any nesting of tensors, is on the device.
        Call model(...), none of its methods: with several processes it is wrapped.
    lr(step), weight_decay(step): schedules; without the latter the optimizer's weight decays stay.
    evaluate(model, epoch) -> {name: number}, called on every process after `epoch` epochs, with the
        moving average when --ema is on; `metric` decides which epoch becomes OUT/best.pt.
    about: what checkpoints say besides: {"built": how the model was made, "classes": names}.
    shard_blocks: modules of the model; if there are any, several processes share its weights,
        gathering these one at a time, instead of having a copy each. It stays split.

    Raises NonFiniteError; SystemExit for a refused start or full memory (status 1) and, after a
    checkpoint, for a signal of safety.STOP_SIGNALS (128 + its number); OSError when config.json or
    the last checkpoint cannot be written; ValueError as run_length and evaluate raise it."""
    run = open_run(args, ctx, model, optimizer, loader, about or {})
    if ctx.world_size > 1 and shard_blocks:
        sharding.shard(run, shard_blocks)
    elif ctx.world_size > 1:
        run.net = DistributedDataParallel(model)
    if run.total > 1 and lr(run.total - 1) > lr(run.total - 2):
        ctx.print("the learning rate still rises when this run ends: lower --warmup")
    also = sinks.opened(run) if args.log else contextlib.nullcontext()
    with safety.stop_signals() as signals, also as write_sinks, logs.bar(run) as bar:
        try:
            for epoch in range(run.epoch, run.epochs):
                end = min((epoch + 1) * run.per_epoch, run.total)
                used = (run.step - epoch * run.per_epoch) * args.accum  # batches of this epoch
                loader.batch_sampler.set_epoch(epoch, used)
                model.train()
                batches = iter(loader)
                while run.step < end:
                    began = time.perf_counter()
                    set_schedules(optimizer, lr(run.step), weight_decay and weight_decay(run.step))
                    loss, norm, stop, save = train_step(run, loss_fn, batches, signals)
                    run.count(loss, norm, time.perf_counter() - began)
                    logs.advance(bar, run, loss)
                    if stop:
                        run.leave(signals)
                    if save:
                        run.save("last.pt")
                metrics = {}
                if evaluate and (end == run.total or (epoch + 1) % args.eval_every == 0):
                    metrics = measure(run, evaluate)
                end_epoch(run, lr(end - 1), metrics)
                if write_sinks:
                    write_sinks(run.history[-1])
                if is_better(metrics.get(metric), run.best, lower_is_better):
                    run.best = metrics[metric]
                    run.save("best.pt")
                run.save("last.pt", required=end == run.total)
                if ctx.is_main:
                    logs.tell(run, metric, bar)
                if end < run.total and ctx.total(len(signals)):
                    run.leave(signals)
        except Exception as error:
            keep_progress(run, error)
            raise
    safety.unlock_folder(args.out)
    ctx.total(0)  # now all processes may read the checkpoints
    return run.history


def set_schedules(optimizer, lr: float, weight_decay: float | None) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        if weight_decay is not None:
            group["weight_decay"] = weight_decay * group.get("wd_scale", 1.0)


def keep_progress(run: Run, error: Exception) -> None:
    """What was learnt before the error is saved, unless that takes all processes and the error is
    this one's. SystemExit: the memory is full."""
    together = not run.sharded or isinstance(error, safety.NonFiniteError)
    if run.step > run.first_step and together:
        with contextlib.suppress(Exception):
            run.save("last.pt")
    if safety.is_out_of_memory(error):
        raise SystemExit(safety.out_of_memory_advice(error, run.args)) from error


def measure(run: Run, evaluate: Callable) -> dict:
    """What evaluate(model, epoch) finds, {name: float}, with the moving average if there is one."""
    # Evaluations can be long, and schedulers impatient.
    if run.ctx.total(time.monotonic() - run.saved > 60):
        run.save("last.pt")
    target = run.ema.module if run.ema else run.model
    if run.ctx.world_size > 1:  # a BatchNorm has seen other samples on each process
        for buffer in target.buffers():
            dist.broadcast(buffer, 0)
    target.eval()
    whole = sharding.unsharded(target) if run.sharded else contextlib.nullcontext()
    with torch.no_grad(), whole:  # inference_mode would spoil what models cache
        metrics = evaluate(target, run.epoch + 1)
    return {key: float(value) for key, value in metrics.items()}


def end_epoch(run: Run, lr: float, metrics: dict) -> None:
    """Adds the epoch's line to the log and writes it; a metric that is no number is None."""
    sums = run.running
    line = {"epoch": run.epoch + 1, "step": run.step, "lr": lr, "seconds": sums["seconds"],
            "loss": sums["loss"] / sums["steps"], "grad_norm": sums["grad_norm"] / sums["steps"],
            "metrics": {name: value if math.isfinite(value) else None
                        for name, value in metrics.items()},
            "img_per_s": run.speed,
            "peak_mib": torch.cuda.max_memory_allocated() / 2**20 or None}  # without a GPU
    run.epoch += 1
    run.history = [*run.history, line]
    run.running = NO_SUMS.copy()
    if run.ctx.is_main:
        logs.write(run)  # before the checkpoint, else a kill may lose a line


def is_better(value: float | None, best: float | None, lower_is_better: bool) -> bool:
    """A value that is not there or no number never is."""
    if value is None or not math.isfinite(value):
        return False
    return best is None or (value < best if lower_is_better else value > best)
