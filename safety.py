"""
What keeps a run safe: whole files, signals that wait for a checkpoint, words for what fails.

    with stop_signals() as signals: ...           the first Ctrl-C only goes into the list
    outlast_readers()                             a full log disk ends nothing
    lock_folder(out)                              of two runs in one folder the second is refused
    write_whole(path, write)                      the old file or the new one, never half of it
    nonfinite_source(model, forward, batches)     which module made the nan
    checkpoint_to_resume(out, resume)             nothing is overwritten that could be continued
"""
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

# ---- Numbers that are not finite -----------------------------------------------------------------


def not_finite(nested) -> bool:
    """Is there a nan or inf in any tensor of the nested value?"""
    tensors = [leaf for leaf in tree_leaves(nested) if isinstance(leaf, torch.Tensor)]
    return any(not torch.isfinite(tensor).all() for tensor in tensors)


class NonFiniteError(RuntimeError):
    """Loss or gradient of a training.Run is nan or inf; the optimizer has not moved."""

    def __init__(self, what: str, run, where: str):
        super().__init__(
            f"{what} at step {run.step}, epoch {run.epoch + 1}. It begins in {where}. If that is "
            "no bug: a lower --lr, a longer warmup, --clip 1 or no --amp, from the last checkpoint "
            "on with --resume --resume-changed")


def nonfinite_source(model, forward: Callable, batches: list) -> str | None:
    """Where a loss went wrong, in words: calls forward(batch, micro) -> loss for all batches again.

    None: this time it went well. All batches are repeated, whatever the first one shows: in another
    process it may have been the second, and a SyncBatchNorm waits for all processes."""
    names = {module: name or "the model" for name, module in model.named_modules()}
    where = []

    def suspect(value, what):
        if not where and not_finite(value):
            where.append(what)

    def hook(module, inputs, output):  # inner modules finish, and are asked, before outer ones
        suspect(output, f"the output of {names[module]} ({type(module).__name__})")

    for name, param in model.named_parameters():
        suspect(param, f"the parameter {name}")
    handles = [module.register_forward_hook(hook) for module in model.modules()]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiled, it calls no hooks
        for micro, batch in enumerate(batches):
            suspect(batch, "the input batch")
            suspect(forward(batch, micro), "the loss function (all modules' outputs are finite)")
    for handle in handles:
        handle.remove()
    return next(iter(where), None)


def nonfinite_gradients(model) -> str:
    """Which parameters' gradients hold a nan or inf, in words."""
    bad = [name for name, param in model.named_parameters()
           if param.grad is not None and not_finite(param.grad)]
    if not bad:
        return "the norm: it overflows"
    return f"the gradients of {bad[0]} to {bad[-1]} ({len(bad)} parameters)"


# ---- Full memory, signals ------------------------------------------------------------------------

def is_out_of_memory(error: Exception) -> bool:
    signs = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def out_of_memory_advice(error: Exception, args) -> str:
    advice = "a smaller model or image"
    if args.batch_size % 4 == 0:  # mixup wants pairs, BatchNorm more than one image
        advice = (f"--batch-size {args.batch_size // 2} --accum {args.accum * 2} (the same "
                  "effective batch)")
    return (f"{error}\nOut of memory with --batch-size {args.batch_size} --accum {args.accum}: try "
            f"{advice}, or --amp; a checkpoint goes on with it with --resume --resume-changed")


# What schedulers, launchers and terminals announce the end by: SLURM any of them, submitit SIGUSR2,
# a connection that breaks SIGHUP.
STOP_SIGNALS = [getattr(signal, name)
                for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
                if hasattr(signal, name)]


@contextlib.contextmanager
def stop_signals() -> Iterator[list]:
    """Yields a list of what came of STOP_SIGNALS. A second Ctrl-C ends the process at once.

    Whoever has set another action (nohup ignores SIGHUP) keeps it, but for SIGTERM and SIGINT."""
    received = []
    ours = [signum for signum in STOP_SIGNALS if signum in (signal.SIGTERM, signal.SIGINT)
            or signal.getsignal(signum) == signal.SIG_DFL]

    def handle(signum, frame):
        received.append(signum)
        # Schedulers and torchrun send a wish to stop several times, and SIGKILL when they lose
        # patience. A second Ctrl-C is meant: it gets the system's own action, which works even
        # inside a hung kernel.
        for other in ours:
            signal.signal(other, signal.SIG_IGN)
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # the terminal may have gone
            os.write(2, b"\nstopping after this step; a second Ctrl-C (not by torchrun): at once\n")

    old = {signum: signal.signal(signum, handle) for signum in ours}
    try:
        yield received
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)


# ---- Output --------------------------------------------------------------------------------------

class Lossy(io.FileIO):
    """A file that also takes what it cannot write: its disk is full, its reader gone."""

    def write(self, data) -> int:
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(data)


class LossyStream:
    """The same of a stream that somebody has put in the place of Python's."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # the second: it is closed
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def outlast_readers() -> None:
    """From here on nothing ends because what is printed cannot be written."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            file = io.BufferedWriter(Lossy(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(file, stream.encoding, "backslashreplace",
                                                line_buffering=True))
        elif not isinstance(stream, LossyStream):
            setattr(sys, name, LossyStream(stream))


# ---- Files ---------------------------------------------------------------------------------------

def write_whole(path: Path, write: Callable, required: bool = True) -> None:
    """write(file) on a temporary file, which is then renamed: `path` is always an old or new whole.

    Not required: failure is a warning. A disk full for an hour should not end the run of a week.
    OSError: required, and it cannot be written."""
    temporary = path.with_name(path.name + ".tmp")  # same folder: renaming is atomic within a disk
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # else a power cut can leave the new name on no data
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the second: torch.save, full disk
        with contextlib.suppress(OSError):
            temporary.unlink()
        if required:
            raise OSError(f"cannot write {path}: {error}") from error
        print(f"\nWARNING: cannot write {path}. The previous one is kept and training goes on.\n"
              f"{error}\n", file=sys.stderr, flush=True)


LOCKS = {}  # {folder: the open file of its lock} of this process


def lock_folder(out: str) -> str | None:
    """Makes the folder and locks it for this process -> None, or in words why it cannot be used.

    The system holds the lock, not the file OUT/.lock: a dead process has none, whatever it left."""
    folder = Path(out).resolve()
    if folder in LOCKS:  # to open it again and close it would release the lock
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "ab+", buffering=0)  # noqa: SIM115  it stays open
    except OSError as error:
        return f"--out {out} cannot be written ({error.strerror}): choose another --out"
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        return (f"--out {out}: another run is at work there ({file.read(1000).decode()}). Wait for "
                "its end, or choose another --out")
    except (ImportError, OSError):
        pass  # a system or a file server without locks
    LOCKS[folder] = file
    with contextlib.suppress(OSError):  # on a full disk it says nothing
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    return None


def unlock_folder(out: str) -> None:
    if file := LOCKS.pop(Path(out).resolve(), None):
        file.close()


def git_revision() -> str:
    """This folder's commit, "-dirty" if tracked files differ from it; "unknown" outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty",
               "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def checkpoint_to_resume(out: str, resume: str | None) -> Path | None:
    """What --out and --resume mean: the checkpoint to go on from, None for a fresh start.

    SystemExit: no such file, or a fresh start would overwrite a checkpoint."""
    # best.pt alone: the disk was full when last.pt was due
    own = [path for path in (Path(out, "last.pt"), Path(out, "best.pt")) if path.exists()]
    path = Path(resume) if resume and resume != "auto" else None
    if path and not path.exists():
        raise SystemExit(f"--resume {path}: no such file")
    if resume == "auto" and own:
        path = own[0]
    if own and (path is None or path.resolve().parent != Path(out).resolve()):
        raise SystemExit(f"{own[0]} exists: continue that run with --resume, or choose another "
                         "--out")
    return path


# A resumed run may change these; any other change is refused: the result would be of neither.
HARMLESS = {"out", "log", "resume", "resume_changed", "workers", "device", "threads",
            "save_minutes", "args", "built", "git", "torch", "grad_checkpointing", "shard",
            "data", "index", "images", "platemap", "metadata", "init", "backbone",  # where it lies
            "eval", "predict", "embed", "per", "split", "stats", "reconstruct",  # train nothing
            "subsets", "subset_samples", "multi_scale"}


def check_same_run(old: dict, new: dict) -> str:
    """Names what differs between checkpoint and run. SystemExit if the result would change."""
    changed = {key for key in old if key in new and old[key] != new[key]}
    changed -= HARMLESS
    text = ", ".join(f"{key} {new[key]!r} (checkpoint: {old[key]!r})" for key in sorted(changed))
    if "steps_per_epoch" in changed:  # then the checkpoint's step is no position in the data
        raise SystemExit(f"cannot resume: {text}. Keep the data and batch size x accum x processes")
    if changed and not new["resume_changed"]:
        raise SystemExit(f"cannot resume exactly, these differ: {text}. Give the checkpoint's "
                         "values, or add --resume-changed to go on with the new ones")
    return text
