"""
A benchmark that tells the truth: every figure is measured here and now, beside its peers.

    python bench.py                     the figures from model to masked; tables, JSON, plots
    python bench.py model --px 224      one of them, at some image sizes
    python bench.py --quick             two blocks, tiny images: tries the command, means nothing

    model       FastVim-T by each backend, Vim-T and DeiT-T: images per second, memory, by size
    block       where the time of one block goes, beside what memory and matrix products allow
    sizes       FastVim-T, -S, -B; without the post-SSM norm; max pooling; models of channels
    training    forward and backward pass of FastVim-T, Vim-T and DeiT-T (16-bit: autocast)
    masked      the same of FastMaskVim-T and -B that see a quarter of the patches, or all
    loop        what the training loop costs beside bare forward, backward and AdamW
    data        images per second of the training pipelines of ImageNet and of microscopy

All peers of a size get one input and are warmed up, then called in turn, again and again, so that
all see the same machine: tables give the median, the slowest and the fastest call. What is absent,
skipped or fails keeps its row and says why. Before anything is timed, every backend must agree with
plain PyTorch. Ratios carry over to other machines best.

Symbols: those of fastvim.py; px pixels, the height and width of images.
"""
import argparse
import concurrent.futures
import datetime
import functools
import itertools
import json
import math
import multiprocessing
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import fastvim
import info
import runs
from benchmark import pipelines, report
from benchmark.clock import capture, clock, median, race
from benchmark.composition import Composition, mamba_scan, ssm_by_stages

FIGURES = ("model", "block", "sizes", "training", "masked")
PX_BATCH = {"cpu": [(224, 8), (224, 1), (512, 2), (1024, 1), (2048, 1)],
            "cuda": [(224, 128), (224, 1), (512, 32), (1024, 16), (2048, 4)],
            "quick": [(32, 2), (64, 1)]}
# dtype of a row -> of the weights, of the matrix products, how far a backend may be from PyTorch
DTYPES = {"float32": (torch.float32, "float32", 1e-4),
          "bfloat16": (torch.bfloat16, "bfloat16", 5e-2),
          "autocast": (torch.float32, "bfloat16", 5e-2)}
COMPILE = "python, torch.compile"
COMPOSITION = "composition"
FUSED = "composition, repeat + skip fused"
MAMBA = "composition, mamba_ssm scan"

# What a stage of a block has to do, with a bytes an activation: bytes for GB/s and, of matrix
# products, operations for GFLOP/s.
WORK = {"add_norm": "b*l*d*(2*a + 8)", "in_proj": "4*b*l*d*e", "conv_pool": "b*l*e*a + 8*b*p*e",
        "projections": "8*b*p*e*(r + n)", "scan": "8*b*p*(3*e + 2*n)",
        "expand_gate": "3*b*l*e*a + 8*b*p*e", "out_proj": "2*b*l*d*e"}
PRODUCTS = ("in_proj", "projections", "out_proj")
OUTSIDE = ("weights", "add_norm", "in_proj", "out_proj")        # the rest is a block's SSM part

# ---- Peers -------------------------------------------------------------------------------------


@functools.cache
def peers(device: str) -> dict[str, str | None]:
    """Registers the compositions as backends -> {backend of FastVim: why it is absent, or None}."""
    compiled = fastvim.BACKENDS[device]
    own = list(fastvim.BACKENDS.values())
    absent = compiled.problem()
    add_norm = compiled.add_norm                # theirs is one kernel, too
    if absent:
        add_norm = fastvim.add_norm
    no_mamba = None
    try:
        if device != "cuda":
            raise ImportError("mamba_ssm needs a GPU")
        import mamba_ssm  # noqa: F401
    except ImportError as error:
        no_mamba = str(error)
    for backend in (Composition(COMPOSITION, compiled.selective_scan, add_norm),
                    Composition(MAMBA, mamba_scan, add_norm),
                    Composition(FUSED, compiled.selective_scan, add_norm, fused=True),
                    *own):                      # the last one registered would be taken by default
        fastvim.register_backend(backend)
    return {device: absent, "python": None, COMPILE: None, COMPOSITION: absent, FUSED: absent,
            MAMBA: no_mamba}


class Spec(NamedTuple):
    """One row of a table: plain values, which travel to another process."""
    model: str
    name: str                                   # as fastvim.create_model knows it, or "deit"
    backend: str
    fields: dict                                # of the model
    px: int = 224
    batch: int = 1
    dtype: str = "float32"                      # of the model; "autocast": float32, under autocast
    train: bool = False
    kept: float = 1.0                           # share of the patches that the encoder is shown


def build(spec: Spec, device: str) -> Callable:
    """-> run(mark, small), one call of the model. small: on one tiny image."""
    torch.manual_seed(0)
    channels = 3
    if spec.name == "deit":
        model = timm.create_model("deit_tiny_patch16_224", img_size=spec.px, dynamic_img_size=True,
                                  **spec.fields)
    else:
        model = fastvim.create_model(spec.name, img_size=spec.px, **spec.fields)
        channels = model.cfg.in_chans
    dtype = DTYPES[spec.dtype][0]
    model = model.to(device, dtype).train(spec.train)
    images = make_images((spec.batch, channels, spec.px, spec.px), dtype, device)
    tiny = images[:1, :, :32, :32]
    if spec.backend == COMPILE:                 # each block by itself: all 24 at once take hours
        torch._dynamo.reset()
        torch._dynamo.config.fail_on_recompile_limit_hit = True     # not silently uncompiled
        for block in model.layers:
            block.compile(fullgraph=True)
    backend = "python"
    if spec.backend in fastvim.BACKENDS:
        backend = spec.backend
    attention = spec.backend.removeprefix("SDPA ").upper()          # DeiT's; others have none
    attention = getattr(SDPBackend, attention, SDPBackend.MATH)

    def run(mark=lambda stage: None, small=False):
        keep = {}
        if spec.kept < 1 and not small:                             # other patches in every call
            noise = torch.rand(spec.batch, math.prod(model.grid_size), device=device)
            keep["keep"] = noise.argsort(1)[:, :int(spec.kept * noise.shape[1])]
        autocast = torch.autocast(device, torch.bfloat16, spec.dtype == "autocast")
        with (torch.inference_mode(not spec.train), fastvim.use_backend(backend), autocast,
              sdpa_kernel(attention)):
            y = model(tiny if small else images, **keep)
            if spec.train:
                F.cross_entropy(y, torch.zeros_like(y[:, 0], dtype=torch.int64)).backward()
                model.zero_grad(set_to_none=True)
        mark("all")
        return y.detach()

    return run


@functools.lru_cache(1)
def make_images(shape: tuple, dtype: torch.dtype, device: str) -> Tensor:
    """The one input of all peers that are measured together."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def each_attention(spec: Spec, device: str) -> list[Spec]:
    """A row, or DeiT's for each kernel of scaled_dot_product_attention that is worth a comparison;
    build() takes no other."""
    if spec.name != "deit":
        return [spec]
    names = ["flash_attention"]
    if device == "cuda":
        names = ["flash_attention", "cudnn_attention"]
        if DTYPES[spec.dtype][1] == "float32":
            names = ["efficient_attention"]
    return [spec._replace(backend=f"SDPA {name}") for name in names]


def check(args) -> list[dict]:
    """Raises SystemExit unless every backend agrees with plain PyTorch -> the errors found."""
    found = []
    here = [name for name, why in peers(args.device).items()
            if not why and name not in args.without]
    for dtype in args.dtypes:
        spec = Spec("", "fastvim_tiny", "python", {"depth": 2}, 64, 2, dtype)
        expected = build(spec, args.device)().float()
        limit = DTYPES[dtype][2]
        for name in here:
            y = build(spec._replace(backend=name), args.device)().float()
            error = float((y - expected).abs().max() / expected.abs().max())
            found.append({"backend": name, "dtype": dtype, "error": error, "limit": limit})
            print(f"{name}, {dtype}: within {error:.1e} of plain PyTorch (limit {limit:.0e} of the "
                  "largest output)")
            if not error <= limit:
                raise SystemExit(f"backend {name} is wrong: nothing is timed")
    return found


# ---- Method ------------------------------------------------------------------------------------

def machine(args) -> dict:
    """What it is; what copies (GB/s) and matrix products (GFLOP/s) reach on it, measured."""
    numbers, side = {"cpu": (2 ** 26, 2048), "cuda": (2 ** 28, 8192)}[args.device]
    if args.quick:
        numbers, side = 2 ** 20, 256
    target, source = torch.zeros(2, numbers, device=args.device)
    calls = {"copy": lambda mark: (target.copy_(source), mark("all"))}
    work = {"copy": 8 * numbers, "float32": 2 * side ** 3, "bfloat16": 2 * side ** 3}
    for dtype in ("float32", "bfloat16"):
        pair = torch.randn(2, side, side, device=args.device).to(getattr(torch, dtype))
        calls[dtype] = lambda mark, pair=pair: (pair[0] @ pair[1], mark("all"))
    race(calls, args)                                                           # warm-up
    rates = {key: work[key] / median(times) / 1e9 for key, times in race(calls, args).items()}
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if args.device == "cuda":
        name = torch.cuda.get_device_name()
    elif cpuinfo.exists():
        models = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines()
                  if line.startswith("model name")]
        name = [*models, name][0]
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, timm "
          f"{timm.__version__}: copy {rates['copy']:.3g} GB/s, matrix products "
          f"{rates['float32']:.3g} GFLOP/s in float32 (without TF32), {rates['bfloat16']:.3g} in "
          "bfloat16")
    return {"device": args.device, "name": name, "threads": torch.get_num_threads(),
            "platform": f"{platform.system()} {platform.machine()}", "python": sys.version,
            "torch": torch.__version__, "timm": timm.__version__, "rates": rates}


def expected_seconds(spec: Spec, rates: dict) -> float:
    """A rough upper guess: three times the matrix products, and 0.1 ms a step of a loop in Python.

    torch.compile unrolls that loop: compiling takes 1.5 s a step."""
    steps = 0
    if spec.name == "deit":
        macs = info.count_vit_macs(spec.px)
    else:
        fields = {**fastvim.model_fields(spec.name), **spec.fields, "img_size": spec.px}
        cfg = fastvim.Config(**fields)
        macs = sum(info.count_macs(cfg).values())
        side = math.ceil(spec.px / cfg.patch_size)
        lengths = {"h": side, "w": side, "c": cfg.in_chans}
        sizes = tuple((axis, lengths[axis]) for axis in cfg.storage.split())
        grid = fastvim.Grid(cfg.storage, *cfg.rows[0], sizes)
        if spec.backend == COMPILE:
            return 1.5 * grid.steps
        if spec.backend == "python":
            steps = cfg.depth * grid.steps
    rate = 1e9 * rates[DTYPES[spec.dtype][1]]
    return (1 + 2 * spec.train) * (6 * spec.batch * macs / rate + 1e-4 * steps)


def child_memory(spec: Spec, threads: int) -> float:
    """In a fresh process. ru_maxrss would not do: it starts from the parent process's peak."""
    def status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

    torch.set_num_threads(threads)
    peers("cpu")
    run = build(spec, "cpu")
    run(small=True)                                                 # thread pools, libraries
    Path("/proc/self/clear_refs").write_text("5")                   # forgets the peak so far
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def peak_memory(spec: Spec, run: Callable, device: str) -> float | None:
    """MB above weights and input, of a GPU's allocator or a CPU process.

    None if that cannot be told: what torch.compile itself needs on a CPU would drown the figure."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    if spec.backend == COMPILE or not Path("/proc/self/clear_refs").exists():
        return None
    server = multiprocessing.get_context("forkserver")              # imports once, forks for each
    server.set_forkserver_preload(["timm", "bench"])
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=server) as pool:
        return pool.submit(child_memory, spec, torch.get_num_threads()).result()


# ---- Figures that compare whole models ---------------------------------------------------------

def sizes(args) -> list[tuple[int, int]]:
    """[(px, batch)]"""
    table = PX_BATCH[args.device]
    if args.quick:
        table = PX_BATCH["quick"]
    chosen = [(px, batch) for px, batch in table if not args.px or px in args.px]
    if args.batch:
        chosen = [(px, args.batch) for px in dict(chosen)]
    return chosen or sys.exit(f"--px: choose from {', '.join(str(px) for px, _ in table)}")


def groups(figure: str, args) -> list[list[Spec]]:
    """The Specs of a figure, in lists of those that are measured together."""
    absent = peers(args.device)
    best = "python" if absent[args.device] else args.device
    places = sizes(args)
    train = figure in ("training", "masked")
    plan = []                                           # ([(px, batch), ...], [Spec, ...])
    if figure == "sizes":
        models = [Spec(f"FastVim-{size[0].upper()}", f"fastvim_{size}", best, {})
                  for size in ("tiny", "small", "base")]
        models += [Spec("FastVim-T, no post-SSM norm", "fastvim_tiny", best, {"ssm_norm": None}),
                   Spec("FastVim-T, max pooling", "fastvim_tiny", best, {"pool": "max"})]
        plan.append((places[:1], models))
        px, batch = places[0]
        for p in (16, 8):
            most = 8
            if p == 8 and args.device == "cpu":                     # 6,272 tokens an image
                most = 1
            plan.append(([(px, args.batch or min(batch, most))], [
                Spec(f"ChannelVim-S/{p}", "channelvim_small", best, {"patch_size": p}),
                Spec(f"FastChannelVim-S/{p}", "fastchannelvim_small", best, {"patch_size": p}),
                Spec(f"FastChannelVim-S/{p}, max pooling", "fastchannelvim_small", best,
                     {"patch_size": p, "pool": "max"})]))
    elif figure == "masked":
        px, batch = places[0]
        for size, times in (("tiny", 4), ("base", 1)):              # large, as in pretraining
            label = f"FastMaskVim-{size[0].upper()}"
            every = Spec(f"{label}, all patches", f"fastmaskvim_{size}", best, {})
            quarter = every._replace(model=f"{label}, 25 % kept", kept=0.25)
            plan.append(([(px, args.batch or batch * times)], [quarter, every]))
    else:
        backends = [name for name in absent if name not in args.without]
        if train:
            backends = [name for name in backends if name in (args.device, "python")]
            places = [(px, batch) for px, batch in places
                      if (args.px or px <= 512) and (args.batch or batch > 1)]
        models = [Spec("FastVim-T", "fastvim_tiny", name, {}) for name in backends]
        models += [Spec("Vim-T", "vim_tiny", best, {}), Spec("DeiT-T", "deit", "", {})]
        plan.append((places, models))
    dtypes = ("float32", "autocast") if train else args.dtypes
    found = []
    for places, models in plan:
        for (px, batch), dtype in itertools.product(places, dtypes):
            rows = [spec._replace(px=px, batch=batch, dtype=dtype, train=train,
                                  fields={**spec.fields, **args.small}) for spec in models]
            found.append([row for spec in rows for row in each_attention(spec, args.device)])
    return found


def prepare(spec: Spec, row: dict, args) -> Callable:
    """Warms a Spec up and measures its memory -> what race() calls. RuntimeError: why it cannot."""
    if why := peers(args.device).get(spec.backend):
        raise RuntimeError(f"absent: {why}")
    seconds = expected_seconds(spec, args.rates)
    if seconds > args.max_seconds:
        raise RuntimeError(f"skipped: expected to take {seconds:.0f} s, more than --max-seconds")
    run = build(spec, args.device)
    row["first call"] = clock(run, args.device)["all"]
    if row["first call"] > args.max_seconds and spec.backend != COMPILE:
        raise RuntimeError(f"skipped: the first call took {row['first call']:.0f} s, more than "
                           "--max-seconds")
    row["peak MB"] = peak_memory(spec, run, args.device)
    if not args.cuda_graphs:
        return run
    row["backend"] += ", CUDA graph"
    return capture(run)


def throughput(figure: str, args) -> list[dict]:
    """The rows of a figure that compares whole models."""
    rows = []
    todo = groups(figure, args)
    bar = tqdm(total=sum(map(len, todo)), desc=figure)
    for specs in todo:
        group = []
        calls = {}
        for i, spec in enumerate(specs):
            row = {key: getattr(spec, key) for key in ("px", "batch", "dtype", "model", "backend")}
            group.append(row)
            try:
                calls[i] = prepare(spec, row, args)
            except RuntimeError as error:                           # out of memory is one
                row["note"] = str(error).strip().splitlines()[0]
                if not row["note"].startswith(("absent", "skipped")):
                    row["note"] = f"failed: {row['note']}"
            bar.update()
        for i, times in race(calls, args).items():
            row = group[i]
            row["seconds"] = [seconds["all"] for seconds in times]
            row["images/s"] = specs[i].batch / median(times)
            row["slowest"] = specs[i].batch / max(row["seconds"])
            row["fastest"] = specs[i].batch / min(row["seconds"])
            row["peak MB"] = row.pop("peak MB")                     # the last column
        add_ratios(figure, specs, group)
        rows += group
    bar.close()
    return rows


def add_ratios(figure: str, specs: list[Spec], group: list[dict]) -> None:
    """Columns that compare the rows of a group."""
    rates = {(spec.name, spec.backend): row["images/s"] for spec, row in zip(specs, group)
             if "images/s" in row}
    attention = [rate for (name, _), rate in rates.items() if name == "deit"]
    if attention:
        rates["deit", "best"] = max(attention)
    for spec, row in zip(specs, group):
        if "images/s" not in row:
            continue
        if figure == "masked" and "images/s" in group[-1]:          # the last sees all patches
            row["time / all"] = group[-1]["images/s"] / row["images/s"]
        if figure in ("model", "training"):
            columns = {"x DeiT": ("deit", "best"), "x python": (spec.name, "python")}
            for column, other in columns.items():
                if other in rates:
                    row[column] = row["images/s"] / rates[other]


# ---- Figures of single blocks ------------------------------------------------------------------

def dissect(block: nn.Module, hidden: Tensor, residual: Tensor, grid, backend, mark) -> None:
    """One block at inference, as Block and Mixer run it, stage by stage."""
    if isinstance(backend, Composition):
        backend.mark = mark
    with torch.inference_mode():
        u, _ = backend.add_norm(hidden, residual, block.norm)
        mark("add_norm")
        xz = block.mixer.in_proj(u)
        mark("in_proj")
        weights = block.mixer.weights()
        mark("weights")
        y = ssm_by_stages(backend, xz, weights, grid, mark)
        block.mixer.out_proj(y)
        mark("out_proj")


def dissection(args) -> list[dict]:
    """The stages of one block, by the kernels and as the paper composes them."""
    rows = []
    absent = peers(args.device)
    backends = [name for name in absent if name not in (COMPILE, "python")]
    if absent[args.device]:
        backends.append("python")
    kinds = [(px, batch, dtype) for px, batch in sizes(args) for dtype in ("float32", "bfloat16")]
    for px, batch, dtype in tqdm(kinds, desc="block"):
        calls = {}
        shapes = {}
        group = []
        for label, name, layer in (("FastVim-T, rows", "fastvim_tiny", 0),
                                   ("FastVim-T, columns", "fastvim_tiny", 1),
                                   ("Vim-T", "vim_tiny", 0)):
            model = fastvim.create_model(name, depth=2, img_size=px)
            block = model.layers[layer].to(args.device, getattr(torch, dtype))
            h, w = model.grid_size
            l = h * w + model.cfg.class_token
            grid = fastvim.Grid(sizes=(("l", l),))
            if name == "fastvim_tiny":
                grid = fastvim.Grid("h w", *model.cfg.rows[layer], (("h", h), ("w", w)))
            _, e, r = block.mixer.dt_proj.shape
            residual = torch.randn(batch, l, e // 2, device=args.device)
            hidden = residual.to(getattr(torch, dtype))
            for backend in backends:
                row = {"px": px, "batch": batch, "dtype": dtype, "block": label, "backend": backend}
                group.append(row)
                if absent[backend]:
                    row["note"] = f"absent: {absent[backend]}"
                    continue
                i = len(group) - 1
                calls[i] = functools.partial(dissect, block, hidden, residual, grid,
                                             fastvim.BACKENDS[backend])
                clock(calls[i], args.device)                        # warm-up
                shapes[i] = {"b": batch, "l": l, "d": e // 2, "e": e, "p": grid.steps, "r": r,
                             "n": model.cfg.d_state, "a": hidden.element_size()}
        for i, times in race(calls, args, ahead=True).items():
            add_stages(group[i], times, shapes[i])
            first = next(row for row in group if row["block"] == group[i]["block"] and "ms" in row)
            group[i]["x first"] = group[i]["SSM part"] / first["SSM part"]      # the yardstick
        rows += group
    return rows


def add_stages(row: dict, times: list[dict], shape: dict) -> None:
    """Columns with the milliseconds of each stage and, in brackets, what rate that is."""
    ms = {stage: 1e3 * median(times, stage) for stage in times[0]}
    for stage, value in ms.items():
        row[stage] = f"{value:.3g}"
        if stage in WORK:
            row[stage] += f" ({eval(WORK[stage], {}, shape) / 1e6 / value:.3g})"
    row["seconds"] = times
    row["ms"] = ms
    row["SSM part"] = sum(ms[stage] for stage in ms if stage not in OUTSIDE)


def indexing(args) -> list[dict]:
    """What it costs that kept patches lie anywhere: blocks of FastVim-T, forward and backward.

    They walk 14 rows of 4 tokens that are the whole grid, and as many left, in other places each
    time, of 14 rows of 16."""
    px, batch = sizes(args)[0]
    model = fastvim.create_model("fastvim_tiny", **args.small).to(args.device)
    backend = fastvim.pick_backend(args.device)
    x = torch.randn(batch, 56, model.cfg.embed_dim, device=args.device, requires_grad=True)
    rates = [0.0] * len(model.layers)

    def run(mark=lambda stage: None, width=16):
        grid = fastvim.Grid("h w", "h w", "w", (("h", 14), ("w", width)))
        if width > 4:
            kept = torch.rand(batch, 14, width, device=args.device).argsort(2)[..., :4].sort(2)
            first = width * torch.arange(14, device=args.device)[:, None]
            grid = fastvim.GridWithHoles(grid, (first + kept.values).flatten(1))        # ids (b 56)
        for hidden, residual in fastvim.run_blocks(model.layers, x, [grid], backend, rates):
            pass
        (hidden + residual).sum().backward()
        model.zero_grad(set_to_none=True)
        mark("all")

    calls = {width: functools.partial(run, width=width) for width in (4, 16)}
    name = backend.name
    if args.cuda_graphs:
        calls = {width: capture(call) for width, call in calls.items()}
        name += ", CUDA graph"
    race(calls, args)                                               # warm-up
    times = race(calls, args)
    rows = []
    for label, width in (("56 tokens: a grid", 4), ("56 tokens: indexed", 16)):
        rows.append({"px": px, "batch": batch, "dtype": "float32", "model": label,
                     "backend": name,
                     "seconds": [seconds["all"] for seconds in times[width]],
                     "ms/step": 1e3 * median(times[width]),
                     "time / grid": median(times[width]) / median(times[4])})
    return rows


# ---- The command -------------------------------------------------------------------------------

def figures(names: list[str], args) -> None:
    """Measures, prints and writes; what is done is on disk before the next figure begins."""
    sizes(args)                                                     # or ends here
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    result = {"command": sys.argv, "date": datetime.datetime.now().isoformat(timespec="seconds"),
              "machine": machine(args), "work": WORK, "agreement": check(args)}
    args = argparse.Namespace(**vars(args), rates=result["machine"]["rates"])
    for figure in names:
        rows = dissection(args) if figure == "block" else throughput(figure, args)
        if figure == "masked":
            rows += indexing(args)
        result[figure] = rows
        (out / "bench.json").write_text(json.dumps(result, indent=1))
        print(f"\n{figure}: {result['machine']['name']}, {torch.get_num_threads()} threads\n")
        composed = [row for row in rows if "block" in row and "composition" in row["backend"]]
        print(report.table([row for row in rows if row not in composed], args.markdown))
        measured = [row for row in rows if "seconds" in row]
        if figure == "block":
            print(f"\n{report.table(composed, args.markdown)}\n\nms of each stage; in brackets "
                  f"GFLOP/s of {', '.join(PRODUCTS)}, GB/s of the others, by these counts (a: "
                  "bytes of an activation):")
            print("\n".join(f"  {stage} {work}" for stage, work in WORK.items()))
            if measured:
                report.plot_blocks(measured, out / "block.png")
        if figure == "model" and measured:
            report.plot_models(measured, out / "model.png")


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("figure", nargs="*", choices=[*FIGURES, "loop", "data", "all"], default="all")
    add("--quick", action="store_true", help="tiny sizes, two repeats")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one",
        default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=runs.WHOLE, help="of the CPU (default: torch's)")
    add("--px", type=runs.number(int, 16), nargs="+", help="only these image sizes")
    add("--batch", type=runs.WHOLE, help="images a call, whatever the size and the figure")
    add("--autocast", dest="dtypes", action="store_const", const=("float32", "autocast"),
        default=("float32", "bfloat16"), help="bfloat16 by autocast, not by model.bfloat16()")
    add("--cuda-graphs", action="store_true", help="all peers as CUDA graphs (but block, which "
        "measures kernels alone)")
    add("--no-compile", dest="without", action="store_const", const=(COMPILE,), default=(),
        help="without torch.compile, which takes minutes")
    add("--repeats", type=runs.WHOLE, default=20, help="calls of each peer, at most (20)")
    add("--seconds", type=runs.AT_LEAST_0, default=5,
        help="no more calls of a peer after these (5)")
    add("--max-seconds", type=runs.AT_LEAST_0, default=60, help="skip peers of which one call, or "
        "compiling, would take longer (60)")
    add("--markdown", action="store_true", help="tables in Markdown")
    add("--out", default="runs/bench", help="folder of bench.json, model.png, block.png")
    add("--blocks", type=runs.number(int, 4), default=20, help="loop: blocks of 5 steps (20)")
    add("--ema", type=runs.SHARE, default=0.0, help="loop: EMA decay (default off)")
    add("--workers", type=runs.WHOLE, default=2, help="data: processes (2)")
    args = parser.parse_args()
    if args.cuda_graphs and args.device != "cuda":
        raise SystemExit("--cuda-graphs needs a GPU")
    if args.cuda_graphs and {"loop", "data"} & {*args.figure}:
        raise SystemExit("--cuda-graphs: loop and data have none, leave it out")
    if args.quick:
        print("--quick shows that all runs; its times, of two calls each, mean nothing")
        return argparse.Namespace(**{**vars(args), "repeats": 2, "small": {"depth": 2}})
    return argparse.Namespace(**vars(args), small={})               # fields of all models


def main() -> None:
    args = get_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.backends.cudnn.allow_tf32 = False
    if "loop" in args.figure:
        pipelines.loop(args)
    if "data" in args.figure:
        pipelines.images(args)
        pipelines.cells(args)
    names = [name for name in FIGURES if name in args.figure or "all" in args.figure]
    if names:
        figures(names, args)


if __name__ == "__main__":
    main()
