"""
A benchmark that tells the truth: every figure is measured here and now, beside its peers.

    python bench.py                     the figures from model to masked; tables, JSON, plots in runs/bench
    python bench.py model --px 224      one of them, at some image sizes
    python bench.py --quick             models of two blocks, tiny images: tries the command, its figures mean nothing

    model       FastVim-T by each backend, Vim-T and DeiT-T at inference: images per second, memory, by image size
    block       where the time of one block goes, beside what memory and matrix products of the machine allow
    sizes       FastVim-T, -S, -B; without the post-SSM norm; max pooling; ChannelVim and FastChannelVim
    training    forward and backward pass of FastVim-T, Vim-T and DeiT-T (16-bit: autocast)
    masked      the same of FastMaskVim-T and -B that see a quarter of the patches, or all; the share of the indexing
    loop        what the training loop costs beside bare forward, backward and AdamW
    data        images per second of the training pipelines of ImageNet, and where the time goes, and of microscopy

All peers of a size are warmed up, then called in turn, again and again, so that all see the same machine: tables give
the median, the slowest and the fastest call. What is absent, skipped or fails keeps its row and says why. Before
anything is timed, every backend must agree with plain PyTorch. Ratios carry over to other machines best.
"""
import argparse
import concurrent.futures
import copy
import datetime
import functools
import json
import math
import multiprocessing
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from typing import NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from tqdm import tqdm

import data
import fastvim
import train_imagenet
import training

PX_BATCH = {"cpu": [(224, 8), (224, 1), (512, 2), (1024, 1), (2048, 1)], "quick": [(32, 2), (64, 1)],
            "cuda": [(224, 128), (224, 1), (512, 32), (1024, 16), (2048, 4)]}
COMPILE, FUSED, MAMBA = "python, torch.compile", "composition, repeat + skip fused", "composition, mamba_ssm scan"
# What a stage of a block has to do, a bytes an activation: bytes for GB/s, operations of matrix products for GFLOP/s
WORK = dict(add_norm="B*L*D*(2*a + 8)", in_proj="4*B*L*D*E", conv_pool="B*L*E*a + 8*B*P*E",
            projections="8*B*P*E*(R + N)", scan="8*B*P*(3*E + 2*N)", expand_gate="3*B*L*E*a + 8*B*P*E",
            out_proj="2*B*L*D*E")
PRODUCTS = ("in_proj", "projections", "out_proj")
OUTSIDE = ("weights", "add_norm", "in_proj", "out_proj")                    # the rest of a block is its SSM part
HIDDEN = ("note", "seconds", "ms", "first call")                            # in the JSON file, not in the tables

# ----------------------------------------------------------------------------------------------------------------------
# Peers


class Composition:
    """The SSM part as the paper runs it: separate PyTorch calls around a scan kernel, channels first, the backward
    direction on flipped tokens. fused: repeat and skip in one pass (Table 24). For full grids and mean pooling."""
    mark = staticmethod(lambda stage: None)                                 # the block figure listens here

    def __init__(self, scan, fast_norm, fused=False):
        self.scan, self.fast_norm, self.fused = scan, fast_norm, fused

    def add_norm(self, hidden, residual, weight, bias):                     # the authors' is one kernel, too
        fast = self.fast_norm and hidden.dtype == weight.dtype
        return (self.fast_norm if fast else fastvim.add_norm)(hidden, residual, weight, bias)

    def conv_pool(self, xz, w, plan):
        x = fastvim.flatten(xz.chunk(2, -1)[0], plan).mT.contiguous()                        # (B E L)
        self.mark("order")
        xs = x, x.flip(2)
        self.mark("flips")
        c = [F.silu(F.conv1d(v, taps[:, None].to(v), bias.to(v), padding=3, groups=len(bias))[..., :-3])
             for v, taps, bias in zip(xs, w.conv_w, w.conv_b)]                               # K x (B E L)
        self.mark("conv")
        p = [v.unflatten(2, (plan.steps, -1)).mean(3) for v in c] if plan.pooled else c      # K x (B E P)
        return torch.stack(p).mT.float().contiguous(), c                                     # (K B P E)

    def selective_scan(self, x, dt, A, B, C, D, dt_bias):                   # both directions are walked forwards
        return torch.cat([self.scan(*(v[k:k + 1] for v in (x, dt, A, B, C)), None, dt_bias[k:k + 1]) for k in (0, 1)])

    def expand_gate(self, xz, c, s, w, plan):
        s, D = s.mT.to(xz), w.D[..., None].to(xz)                                            # (K B E P) (K E 1)
        if self.fused:
            y = [torch.addcmul(s[k][..., None], D[k][..., None], c[k].unflatten(2, (plan.steps, -1))).flatten(2)
                 for k in (0, 1)]                                                            # K x (B E L)
        else:
            y = s.repeat_interleave(c[0].shape[2] // plan.steps, 3) if plan.pooled else s    # (K B E L)
            self.mark("repeat")
            y = [y[k] + D[k] * c[k] for k in (0, 1)]
        self.mark("skip")
        y = ((y[0] + y[1].flip(2)) / 2).mT                                                   # (B L E)
        self.mark("flips")
        if w.norm_w is not None:
            y = fastvim.norm(y, w.norm_w.to(y), None if w.norm_b is None else w.norm_b.to(y))
        self.mark("norm")
        return fastvim.unflatten(y, plan) * F.silu(xz.chunk(2, -1)[1])


@functools.cache
def peers(device):
    """Registers the compositions as backends -> {backend of FastVim: why it is absent, or None}."""
    compiled, own, mamba = fastvim.BACKENDS[device], list(fastvim.BACKENDS.values()), None
    why, no_mamba = compiled.kernels.error(), None if device == "cuda" else "mamba_ssm needs a GPU"
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        def mamba_scan(x, dt, A, B, C, D, dt_bias):
            x, dt, B, C = (v[0].mT.contiguous() for v in (x, dt, B, C))                      # (B E P), (B N P)
            return selective_scan_fn(x, dt, A[0], B, C, None, None, dt_bias[0], True).mT[None]       # (1 B P E)
        mamba = mamba_scan
    except ImportError as error:
        no_mamba = str(error)
    scan, fast_norm = compiled.selective_scan, None if why else compiled.add_norm
    for name, ops in (("composition", Composition(scan, fast_norm)), (MAMBA, Composition(mamba, fast_norm)),
                      (FUSED, Composition(scan, fast_norm, fused=True))):
        fastvim.register_backend(fastvim.Backend(name, (device,), "as the paper composes it", ops.add_norm,
                                                 ops.conv_pool, ops.selective_scan, ops.expand_gate))
    for backend in own:                         # the last one registered would be taken by default
        fastvim.register_backend(backend)
    return {device: why, "python": None, COMPILE: None, "composition": why, FUSED: why, MAMBA: no_mamba}


class Spec(NamedTuple):
    """One row of a table: plain values, which travel to another process."""
    model: str
    name: str                                   # as fastvim.create_model knows it, or "deit"
    backend: str
    fields: dict
    px: int
    batch: int
    dtype: str                                  # of the model; "autocast": float32, under bfloat16 autocast
    train: bool = False
    kept: float = 1.0                           # share of the patches that the encoder is shown


def build(spec, device):
    """-> run(mark, small), one call of the model. small: on one tiny image."""
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=spec.px, dynamic_img_size=True, **spec.fields) if (
        spec.name == "deit") else fastvim.create_model(spec.name, img_size=spec.px, **spec.fields)
    dtype = torch.bfloat16 if spec.dtype == "bfloat16" else torch.float32
    model = model.to(device, dtype).train(spec.train)
    x = torch.randn(spec.batch, 3 if spec.name == "deit" else model.cfg.in_chans, spec.px, spec.px).to(device, dtype)
    if spec.backend == COMPILE:                 # each kind of block by itself: all 24 at once would take hours
        torch._dynamo.reset()
        torch._dynamo.config.fail_on_recompile_limit_hit = True             # else it would silently run uncompiled
        for block in model.layers:
            block.compile(fullgraph=True)
    backend = spec.backend if spec.backend in fastvim.BACKENDS else "python"

    def run(mark=lambda stage: None, small=False):
        with torch.inference_mode(not spec.train), fastvim.use_backend(backend), torch.autocast(
                device, torch.bfloat16, spec.dtype == "autocast"):
            arguments = {}
            if spec.kept < 1 and not small:                                 # other patches in every call
                noise = torch.rand(spec.batch, math.prod(model.grid_size), device=device)
                arguments["keep"] = noise.argsort(1)[:, :int(spec.kept * noise.shape[1])]
            y = model(x[:1, :, :32, :32] if small else x, **arguments)
            if spec.train:
                F.cross_entropy(y, torch.zeros_like(y[:, 0], dtype=torch.int64)).backward()
                model.zero_grad(set_to_none=True)
        mark("all")
        return y.detach()
    return run


def attention(spec, device):
    """What scaled_dot_product_attention runs DeiT by."""
    dtype = torch.float32 if spec.dtype == "float32" else torch.bfloat16
    q = torch.empty(1, 3, (spec.px // 16) ** 2 + 1, 64, dtype=dtype, device=device, requires_grad=spec.train)
    return "SDPA " + SDPBackend(torch._fused_sdp_choice(q, q, q)).name.lower()


def check(args):
    """Raises SystemExit unless every backend agrees with plain PyTorch -> [the errors found]."""
    found = []
    for dtype in args.dtypes:
        runs = {peer: build(Spec("", "fastvim_tiny", peer, dict(depth=2), 64, 2, dtype), args.device)
                for peer, why in peers(args.device).items() if not why and peer not in args.without}
        expected, limit = runs.pop("python")().float(), 1e-4 if dtype == "float32" else 5e-2
        for peer, run in runs.items():
            error = float((run().float() - expected).abs().max() / expected.abs().max())
            found.append(dict(backend=peer, dtype=dtype, error=error, limit=limit))
            print(f"{peer}, {dtype}: within {error:.1e} of plain PyTorch (limit {limit:.0e} of the largest output)")
            if not error <= limit:
                raise SystemExit(f"backend {peer} is wrong: nothing is timed")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Method


def clock(call, device, ahead=False):
    """One call(mark) -> {stage: seconds}: mark(stage) charges a stage with the time since the mark before. ahead: keeps
    a GPU busy first, so that stages take as long as their kernels, not as long as launching them."""
    cuda, marks, total = device == "cuda", [], {}

    def mark(stage):
        marks.append((stage, torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter()))
        if cuda:
            marks[-1][1].record()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda._sleep(5_000_000 * ahead)
    mark("")
    call(mark)
    if cuda:
        torch.cuda.synchronize()
    for (_, a), (stage, b) in zip(marks, marks[1:]):
        total[stage] = total.get(stage, 0) + (a.elapsed_time(b) / 1e3 if cuda else b - a)
    return total


def race(calls, args, ahead=False):
    """All in turn, args.repeats times, the slow ones less often -> {key: [{stage: seconds}, ...]}."""
    times, spent = {key: [] for key in calls}, dict.fromkeys(calls, 0)
    for _ in range(args.repeats):
        for key, call in calls.items():
            if spent[key] < args.seconds:
                times[key].append(clock(call, args.device, ahead))
                spent[key] += sum(times[key][-1].values())
    return times


def median(times, stage="all"):
    return statistics.median(t[stage] for t in times)


def machine(args):
    """What it is; what copies and matrix products reach on it, measured."""
    n, m = (2 ** 20, 256) if args.quick else (2 ** 26, 2048) if args.device == "cpu" else (2 ** 28, 8192)
    (a, b), name = torch.zeros(2, n, device=args.device), platform.processor() or platform.machine()
    calls = {"copy": lambda mark: (a.copy_(b), mark("all"))}
    for dtype in ("float32", "bfloat16"):
        pair = torch.randn(2, m, m, device=args.device).to(getattr(torch, dtype))
        calls[dtype] = lambda mark, pair=pair: (pair[0] @ pair[1], mark("all"))
    race(calls, args)                                                       # warm-up
    rates = {key: (8 * n if key == "copy" else 2 * m ** 3) / median(t) / 1e9 for key, t in race(calls, args).items()}
    if args.device == "cuda":
        name = torch.cuda.get_device_name()
    elif (info := pathlib.Path("/proc/cpuinfo")).exists():
        name = next((line.split(":")[1].strip() for line in info.open() if line.startswith("model name")), name)
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, timm {timm.__version__}: copy "
          f"{rates['copy']:.3g} GB/s, matrix products {rates['float32']:.3g} GFLOP/s in float32 (without TF32), "
          f"{rates['bfloat16']:.3g} in bfloat16")
    return dict(device=args.device, name=name, threads=torch.get_num_threads(), platform=platform.platform(),
                python=sys.version, torch=torch.__version__, timm=timm.__version__, rates=rates)


def expected_seconds(spec, args):
    """A rough upper guess: three times the matrix products, and 0.1 ms for each step of a loop in Python, which
    torch.compile unrolls: compiling takes 1.5 s a step."""
    macs, steps = fastvim.count_vit_macs(spec.px), 0
    if spec.name != "deit":
        with torch.device("meta"):
            cfg = fastvim.create_model(spec.name, img_size=spec.px, **spec.fields).cfg
        macs, side = sum(fastvim.count_macs(cfg).values()), -(-spec.px // cfg.patch_size)
        plan = fastvim.make_plan(cfg.rows[0], cfg.storage, dict(h=side, w=side, c=cfg.in_chans))
        if spec.backend == COMPILE:
            return 1.5 * plan.steps
        steps = cfg.depth * plan.steps * (spec.backend == "python")
    rate = 1e9 * args.rates["float32" if spec.dtype == "float32" else "bfloat16"]
    return (1 + 2 * spec.train) * (6 * spec.batch * macs / rate + 1e-4 * steps)


def child_memory(spec, threads):
    """In a fresh process. ru_maxrss would not do: it starts from the peak of the parent process."""
    def status(key):
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024
    torch.set_num_threads(threads)
    peers("cpu")
    run = build(spec, "cpu")
    run(small=True)                                                         # thread pools, libraries
    pathlib.Path("/proc/self/clear_refs").write_text("5")                   # forgets the peak so far
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def peak_memory(spec, run, args):
    """MB above weights and input, of a GPU's allocator or a CPU process; None if that cannot be told: what
    torch.compile itself needs on a CPU would drown the figure."""
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    if spec.backend == COMPILE or not pathlib.Path("/proc/self/clear_refs").exists():
        return None
    server = multiprocessing.get_context("forkserver")                      # imports once, then forks for each
    server.set_forkserver_preload(["timm", "bench"])
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=server) as pool:
        return pool.submit(child_memory, spec, torch.get_num_threads()).result()


# ----------------------------------------------------------------------------------------------------------------------
# Figures


def sizes(args):
    table = PX_BATCH["quick" if args.quick else args.device]
    chosen = [(px, batch) for px, batch in table if not args.px or px in args.px]
    return chosen or sys.exit(f"--px: choose from {', '.join(str(px) for px, _ in table)}")


def groups(figure, args):
    """Lists of the Specs that are measured together."""
    train, small, chosen = figure in ("training", "masked"), dict(depth=2) if args.quick else {}, sizes(args)
    kernels, absent = args.device, peers(args.device)
    best = "python" if absent[kernels] else kernels
    if figure == "sizes":
        names = [("FastVim-T", "fastvim_tiny"), ("FastVim-S", "fastvim_small"), ("FastVim-B", "fastvim_base")]
        models = [(label, name, best, {}) for label, name in names] + [
            ("FastVim-T, no post-SSM norm", "fastvim_tiny", best, dict(ssm_norm=None)),
            ("FastVim-T, max pooling", "fastvim_tiny", best, dict(pool="max"))]
        plan = [(chosen[:1], models)]
        for p in (16, 8):
            largest = 1 if p == 8 and args.device == "cpu" else 8           # 6,272 tokens an image
            plan.append(([(px, min(batch, largest)) for px, batch in chosen[:1]], [
                (f"ChannelVim-S/{p}", "channelvim_small", best, dict(patch_size=p)),
                (f"FastChannelVim-S/{p}", "fastchannelvim_small", best, dict(patch_size=p)),
                (f"FastChannelVim-S/{p}, max pooling", "fastchannelvim_small", best, dict(patch_size=p, pool="max"))]))
    elif figure == "masked":
        px, batch = chosen[0]
        plan = [([(px, batch * times)], [
            (f"FastMaskVim-{size[0].upper()}, {what}", f"fastmaskvim_{size}", best, {}, share)
            for what, share in (("25 % kept", 0.25), ("all patches", 1.0))])
            for size, times in (("tiny", 4), ("base", 1))]                  # as in pretraining, large batches
    else:
        ours = [b for b in absent if b not in args.without and (not train or b in (kernels, "python"))]
        models = [("FastVim-T", "fastvim_tiny", backend, {}) for backend in ours]
        plan = [([s for s in chosen if not train or s[0] <= 512 and s[1] > 1],
                 models + [("Vim-T", "vim_tiny", best, {}), ("DeiT-T", "deit", "", {})])]
    return [[Spec(label, name, backend, {**fields, **small}, px, batch, dtype, train, *kept)
             for label, name, backend, fields, *kept in models] for where, models in plan for px, batch in where
            for dtype in (("float32", "autocast") if train else args.dtypes)]


def prepare(spec, row, args):
    """Warms a Spec up and measures its memory -> what race() calls. Raises RuntimeError, saying why it cannot."""
    if why := peers(args.device).get(spec.backend):
        raise RuntimeError(f"absent: {why}")
    if (seconds := expected_seconds(spec, args)) > args.max_seconds:
        raise RuntimeError(f"skipped: expected to take {seconds:.0f} s, more than --max-seconds")
    run = build(spec, args.device)
    row["first call"] = clock(run, args.device)["all"]
    if row["first call"] > args.max_seconds and spec.backend != COMPILE:
        raise RuntimeError(f"skipped: the first call took {row['first call']:.0f} s, more than --max-seconds")
    row["peak MB"] = peak_memory(spec, run, args)
    if not args.cuda_graphs or spec.px > 512 or spec.train:
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    row["backend"] += ", CUDA graph"
    return lambda mark, run=run: (graph.replay(), mark("all"))              # run keeps weights and images alive


def throughput(figure, args):
    """-> the rows of a figure that compares whole models."""
    rows, todo = [], groups(figure, args)
    bar = tqdm(total=sum(map(len, todo)), desc=figure)
    for specs in todo:
        shown = ("px", "batch", "dtype", "model", "backend")
        group, calls = [{key: getattr(spec, key) for key in shown} for spec in specs], {}
        for i, (spec, row) in enumerate(zip(specs, group)):
            try:
                row["backend"] = row["backend"] or attention(spec, args.device)
                calls[i] = prepare(spec, row, args)
            except RuntimeError as error:                                   # out of memory is one
                why = str(error).strip().splitlines()[0]
                row["note"] = why if why.startswith(("absent", "skipped")) else f"failed: {why}"
            bar.update()
        for i, times in race(calls, args).items():
            seconds = group[i]["seconds"] = [t["all"] for t in times]
            memory = group[i].pop("peak MB")                                # the last column
            for column, value in (("images/s", statistics.median), ("slowest", max), ("fastest", min)):
                group[i][column] = specs[i].batch / value(seconds)
            group[i]["peak MB"] = memory
        rates = {(s.name, s.backend): row["images/s"] for s, row in zip(specs, group) if "images/s" in row}
        for row in group if figure == "masked" and all("images/s" in row for row in group) else ():
            row["time / all"] = group[-1]["images/s"] / row["images/s"]
        for (name, _), row in zip([s[1:3] for s in specs] * (figure in ("model", "training")), group):
            for column, other in (("x DeiT", ("deit", "")), ("x python", (name, "python"))):
                if "images/s" in row and other in rates:
                    row[column] = row["images/s"] / rates[other]
        rows += group
    bar.close()
    return rows


def dissect(block, hidden, residual, plan, ops, mark):
    """One block at inference, as Block and Mixer run it, stage by stage."""
    composed, Composition.mark = ops.name.startswith("composition"), staticmethod(mark)
    with torch.inference_mode():
        w = block.mixer.weights()
        mark("weights")
        u, residual = ops.add_norm(hidden, residual, block.norm.weight, None)
        mark("add_norm")
        xz = block.mixer.in_proj(u)
        mark("in_proj")
        p, kept = ops.conv_pool(xz, w, plan)
        mark("pool" if composed else "conv_pool")
        dt, B, C, _ = fastvim.project(p, w)
        mark("projections")
        s = ops.selective_scan(p, dt, -torch.exp(w.A_log), B, C, None, w.dt_bias)
        mark("scan")
        y = ops.expand_gate(xz, kept, s, w, plan)
        mark("gate" if composed else "expand_gate")
        block.mixer.out_proj(y)
        mark("out_proj")


def dissection(args):
    """-> rows: the stages of one block, by the kernels and as the paper composes them; the first is the yardstick."""
    rows, absent = [], peers(args.device)
    backends = [b for b in absent if b != COMPILE and (b != "python" or absent[args.device])]
    for (px, batch), dtype in tqdm([(s, d) for s in sizes(args) for d in ("float32", "bfloat16")], desc="block"):
        calls, shapes, group, h = {}, {}, [], px // 16
        for label, name, layer in (("FastVim-T, rows", "fastvim_tiny", 0), ("FastVim-T, columns", "fastvim_tiny", 1),
                                   ("Vim-T", "vim_tiny", 0)):
            block = fastvim.create_model(name, depth=2).layers[layer].to(args.device, getattr(torch, dtype))
            cfg, D, L = block.mixer.cfg, block.mixer.cfg.embed_dim, h * h + block.mixer.cfg.class_token
            plan = fastvim.make_plan(cfg.rows[layer], "h w", dict(h=h, w=h)) if name == "fastvim_tiny" else (
                fastvim.make_plan(("l", ""), "l", dict(l=L)))
            residual = torch.randn(batch, L, D, device=args.device)
            for backend in backends:
                group.append(dict(px=px, batch=batch, dtype=dtype, block=label, backend=backend))
                if absent[backend]:
                    group[-1]["note"] = f"absent: {absent[backend]}"
                    continue
                hidden = residual.to(getattr(torch, dtype))
                call = functools.partial(dissect, block, hidden, residual, plan, fastvim.BACKENDS[backend])
                clock(call, args.device)                                    # warm-up
                calls[len(group) - 1], shapes[len(group) - 1] = call, dict(
                    B=batch, L=L, D=D, E=2 * D, P=plan.steps, N=cfg.d_state, R=block.mixer.dt_proj.in_features,
                    a=hidden.element_size())
        for i, times in race(calls, args, ahead=True).items():
            row, ms = group[i], {stage: 1e3 * median(times, stage) for stage in times[0]}
            for stage in ms:
                row[stage] = f"{ms[stage]:.3g}"
                if stage in WORK:
                    row[stage] += f" ({eval(WORK[stage], {}, shapes[i]) / 1e6 / ms[stage]:.3g})"
            row.update({"seconds": times, "ms": ms, "SSM part": sum(ms[stage] for stage in ms if stage not in OUTSIDE)})
            first = next(r for r in group if r["block"] == row["block"] and "ms" in r)
            row["x first"] = row["SSM part"] / first["SSM part"]
        rows += group
    return rows


def indexing(args):
    """What it costs that kept patches lie anywhere: the blocks of FastVim-T, forward and backward, on 14 rows of 4
    tokens that are the whole grid, and on the same number left, in other places each time, of 14 rows of 16."""
    (px, batch), small = sizes(args)[0], dict(depth=2) if args.quick else {}
    model = fastvim.create_model("fastvim_tiny", **small).to(args.device)
    x = torch.randn(batch, 56, model.cfg.embed_dim, device=args.device, requires_grad=True)
    row, rates = ("h w", "w"), [0.0] * len(model.layers)

    def run(mark, width):
        slots = None
        if width > 4:
            slots = torch.rand(batch, 14, width, device=args.device).argsort(2)[..., :4].sort(2).values
            slots = (slots + width * torch.arange(14, device=args.device)[:, None]).flatten(1)      # (B 56)
        plan = fastvim.make_plan(row, "h w", dict(h=14, w=width), slots)
        for hidden, residual in fastvim.run_blocks(model.layers, x, [plan], rates):
            pass
        (hidden + residual).sum().backward()
        model.zero_grad(set_to_none=True)
        mark("all")
    calls = {width: functools.partial(run, width=width) for width in (4, 16)}
    race(calls, args)                                                       # warm-up
    times = race(calls, args)
    return [dict(px=px, batch=batch, dtype="float32", model=what, backend=fastvim.pick_backend(args.device).name,
                 seconds=[t["all"] for t in times[width]], **{"ms/step": 1e3 * median(times[width])},
                 **{"time / grid": median(times[width]) / median(times[4])})
            for what, width in (("56 tokens: a grid", 4), ("56 tokens: indexed", 16))]


# ----------------------------------------------------------------------------------------------------------------------
# Output


def table(rows, markdown):
    """Aligned text, or Markdown. Notes become footnotes."""
    columns = list(dict.fromkeys(k for row in rows for k in row if k not in HIDDEN))
    notes = list(dict.fromkeys(row["note"] for row in rows if "note" in row))

    def cell(row, key):
        v, mark = row.get(key), f" [{notes.index(row['note']) + 1}]" if key == "backend" and "note" in row else ""
        return ("-" if v is None else f"{v:,.0f}" if v >= 1000 else f"{v:.3g}") if v is None or isinstance(
            v, float) else f"{v}{mark}"
    lines = [columns] + [[cell(row, key) for key in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [[v.rjust(n) if i > 4 else v.ljust(n) for i, (v, n) in enumerate(zip(line, widths))] for line in lines]
    if markdown:
        lines.insert(1, ["-" * (n - 1) + ":" if i > 4 else "-" * n for i, n in enumerate(widths)])
    lines = ["| " + " | ".join(line) + " |" if markdown else "  ".join(line) for line in lines]
    return "\n".join(lines + [""] * markdown + [f"[{i}] {note}" for i, note in enumerate(notes, 1)])


def plot(figure, rows, path):
    """model: images per second and memory by image size; block: its stages as stacked bars."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows, i = [row for row in rows if "seconds" in row], 0
    kinds = list(dict.fromkeys((row["dtype"], row["px"] * (figure == "block")) for row in rows))
    if not rows:
        return
    _, axes = plt.subplots(2, len(kinds), figsize=(7 * len(kinds), 9), squeeze=False) if figure == "model" else (
        plt.subplots(1, len(kinds), figsize=(5 * len(kinds), 5), squeeze=False))
    stages = list(dict.fromkeys(stage for row in rows for stage in row.get("ms", ())))
    for j, (dtype, px) in enumerate(kinds):
        shown = [row for row in rows if row["dtype"] == dtype and px in (0, row["px"])]
        for i, column in enumerate(("images/s", "peak MB") if figure == "model" else ()):
            lines = {}
            for row in sorted(shown, key=lambda row: row["batch"]):         # of two batches the larger counts
                if row.get(column):
                    value = row[column] / (row["batch"] if i else 1)
                    lines.setdefault(f"{row['model']} {row['backend']}", {})[row["px"] ** 2] = value
            for label, points in lines.items():
                axes[i, j].loglog(*zip(*sorted(points.items())), "o-", label=label)
            axes[i, j].set(title=dtype, xlabel="pixels", ylabel="peak MB per image" if i else column)
        if figure == "block":
            bottom, names = np.zeros(len(shown)), [f"{row['block']}\n{row['backend']}" for row in shown]
            for k, stage in enumerate(stages):
                ms = np.array([row["ms"].get(stage, 0) for row in shown])
                axes[0, j].bar(names, ms, bottom=bottom, label=stage, color=plt.cm.tab20(k % 20))
                bottom += ms
            axes[0, j].set(title=f"{px} px, {dtype}", ylabel="ms")
            axes[0, j].tick_params(axis="x", rotation=90, labelsize=6)
    for ax in axes.flat if figure == "model" else axes[0, -1:]:
        ax.legend(fontsize=6, **({} if figure == "model" else dict(loc="upper left", bbox_to_anchor=(1, 1))))
    plt.tight_layout()
    plt.savefig(path, dpi=120)
    plt.close()


def figures(names, args):
    """Measures, prints and writes; what is done is on disk before the next figure begins."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtypes = ("float32", "autocast" if args.autocast else "bfloat16")
    args.without = (COMPILE,) if args.no_compile else ()
    args.repeats, args.out = 2 if args.quick else args.repeats, pathlib.Path(args.out)
    if args.cuda_graphs and args.device != "cuda":
        raise SystemExit("--cuda-graphs needs a GPU")
    torch.backends.cudnn.allow_tf32 = False
    args.out.mkdir(parents=True, exist_ok=True)
    result = dict(command=sys.argv, date=datetime.datetime.now().isoformat(timespec="seconds"), machine=machine(args),
                  work=WORK)
    args.rates = result["machine"]["rates"]
    result["agreement"] = check(args)
    for figure in names:
        rows = result[figure] = dissection(args) if figure == "block" else throughput(figure, args)
        if figure == "masked":
            rows += indexing(args)
        (args.out / "bench.json").write_text(json.dumps(result, indent=1))
        print(f"\n{figure}: {result['machine']['name']}, {torch.get_num_threads()} threads\n")
        composed = [row for row in rows if "block" in row and "composition" in row["backend"]]
        print(table([row for row in rows if row not in composed], args.markdown))
        if figure == "block":
            print(f"\n{table(composed, args.markdown)}\n\nms of each stage; in brackets GFLOP/s of "
                  f"{', '.join(PRODUCTS)}, GB/s of the others, by these counts (a: bytes of an activation):")
            print("\n".join(f"  {stage} {work}" for stage, work in WORK.items()))
        if figure in ("model", "block"):
            plot(figure, rows, args.out / f"{figure}.png")


# ----------------------------------------------------------------------------------------------------------------------
# The training loop and the data pipeline


def loop(args):
    """Blocks of 5 bare steps on a twin alternate with 5 steps of training.fit, so that both see the same machine."""
    parser = argparse.ArgumentParser()
    training.add_training_arguments(parser, lr=1e-3, recipe_batch=32, batch_size=32, ema=args.ema)
    with tempfile.TemporaryDirectory() as out:
        run = parser.parse_args(["--steps", str(5 * args.blocks + 1), "--out", out, "--epochs", "1000"])
        ctx = training.setup(run, training=False)
        model = fastvim.create_model("fastvim_tiny", img_size=32, patch_size=8, num_classes=10).to(ctx.device)
        twin, count, at = copy.deepcopy(model), 0, []
        ours, bare = (torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, twin))

        def mark():
            if ctx.device.type == "cuda":
                torch.cuda.synchronize()
            at.append(time.perf_counter())

        def loss_fn(model, batch):
            nonlocal count
            if count % 5 == 0:
                mark()
                for _ in range(5):
                    F.cross_entropy(twin(batch[0]), batch[1]).backward()
                    bare.step()
                    bare.zero_grad()
                mark()
            count += 1
            return F.cross_entropy(model(batch[0]), batch[1])

        loader = data.make_loader(data.Digits(True), 32, train=True)
        training.fit(run, ctx, model, loader, loss_fn, ours, lambda step: 1e-3)
    bare, ours = np.diff(at)[:-1:2], np.diff(at)[1::2]                      # seconds of 5 steps
    low, mid, high = np.quantile(ours / bare, (0.25, 0.5, 0.75))
    print(f"FastVim-T, 32 images of 16 tokens, {ctx.device}, EMA {args.ema or 'off'}: a bare step takes "
          f"{200 * np.median(bare):.0f} ms; the loop, data included, {mid:.3f} x that (quartiles {low:.3f} and "
          f"{high:.3f}, {len(ours)} blocks)")


def loading_rate(images, workers):
    """Items per second that a training loader makes of a data set, read four times over: the median of three epochs."""
    many = torch.utils.data.ConcatDataset([images] * 4)
    loader, rates = data.make_loader(many, 64, train=True, workers=workers), []
    for epoch in range(4):                                                  # the first starts the workers
        loader.batch_sampler.set_epoch(epoch)
        start = time.perf_counter()
        rates.append(sum(len(labels) for _, labels in loader) / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def pipeline(args):
    """JPEG files of smooth noise, quality 90, through the recipe's whole augmentation; then cells of 8 channels."""
    from PIL import Image
    recipe, rng = train_imagenet.RECIPE, np.random.default_rng(0)
    threads = torch.get_num_threads()
    for width, height in ((224, 224), (500, 375)):
        with tempfile.TemporaryDirectory() as root:
            folder = pathlib.Path(root, "train", "noise")
            folder.mkdir(parents=True)
            for i in range(256):
                coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3)).astype(np.uint8))
                pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
                pixels = pixels + rng.normal(0, 12, (height, width, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
            transform = data.image_transform(224, True, auto_augment=recipe["auto_augment"], reprob=recipe["reprob"])
            images = data.ImageFolder(root, "train", transform)
            rate = loading_rate(images, args.workers)
            torch.set_num_threads(1)
            start = time.process_time()
            for path, _ in images.samples:
                data.load_rgb(path)
            decode = (time.process_time() - start) / len(images)
            torch.set_num_threads(threads)
            size = sum(p.stat().st_size for p in folder.iterdir()) / len(images) / 1e3
        print(f"{width} x {height} JPEG ({size:.0f} kB) -> 224 px: {rate:.0f} images/s with {args.workers} workers; "
              f"decoding takes {1e3 * decode:.2f} ms, {100 * decode * rate / args.workers:.0f} % of a worker's time")
    with tempfile.TemporaryDirectory() as root:
        pathlib.Path(root, "train", "noise").mkdir(parents=True)
        for i in range(128):
            np.save(f"{root}/train/noise/{i}.npy", rng.integers(0, 256, (8, 224, 224)).astype(np.uint8))
        transform = data.CellTransform(224, data.JUMP_MEAN, data.JUMP_STD, augment=True)
        rate = loading_rate(data.cell_folder(root, "train", transform), args.workers)
    model, seconds = fastvim.create_model("fastchannelvim_small"), []       # on the CPU: where the data are prepared
    for _ in range(4):
        start = time.perf_counter()
        F.cross_entropy(model(torch.randn(4, 8, 224, 224)), torch.arange(4)).backward()
        seconds.append(time.perf_counter() - start)
    print(f"8 x 224 x 224 .npy (401 kB): {rate:.0f} images/s with {args.workers} workers; forward and backward pass of "
          f"FastChannelVim-S/16 on this CPU, half of its channels sampled: {4 / statistics.median(seconds[1:]):.2f} "
          "images/s")


def main():
    every, number = ["model", "block", "sizes", "training", "masked"], training.number
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", nargs="*", choices=[*every, "loop", "data", "all"], default="all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two repeats")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--threads", type=number(int, 1), help="of the CPU (default: torch's)")
    parser.add_argument("--px", type=number(int, 16), nargs="+", help="only these image sizes")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 by autocast, not by model.bfloat16()")
    parser.add_argument("--cuda-graphs", action="store_true", help="all peers as CUDA graphs, up to 512 px")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes minutes")
    parser.add_argument("--repeats", type=number(int, 1), default=20, help="calls of each peer, at most (20)")
    parser.add_argument("--seconds", type=number(float, 0), default=5, help="no more calls of a peer after these (5)")
    parser.add_argument("--max-seconds", type=number(float, 0), default=60, help="skip peers of which one "
                        "call, or compiling, would take longer (60)")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    parser.add_argument("--out", default="runs/bench", help="folder of bench.json, model.png, block.png")
    parser.add_argument("--blocks", type=number(int, 4), default=20, help="loop: blocks of 5 steps (20)")
    parser.add_argument("--ema", type=number(float, 0, 1), default=0.0, help="loop: EMA decay (default off)")
    parser.add_argument("--workers", type=number(int, 1), default=2, help="data: processes (2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    names = every if args.figure == "all" else args.figure
    for name in ("loop", "data"):
        if name in names:
            {"loop": loop, "data": pipeline}[name](args)
    if wanted := [name for name in every if name in names or "all" in names]:
        figures(wanted, args)


if __name__ == "__main__":
    main()
