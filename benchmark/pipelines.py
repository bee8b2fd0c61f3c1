"""
What a run costs beside its model: `python bench.py loop` and `python bench.py data`.
"""
import copy
import itertools
import statistics
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import fastvim
import runs
import training


def loop(args: Namespace) -> None:
    """Blocks of 5 bare steps on a twin alternate with 5 steps of training.fit: the same machine."""
    with tempfile.TemporaryDirectory() as out:
        run = runs.Options({**runs.TRAINING, "batch_size": 32, "ema": args.ema, "epochs": 1000.0,
                            "steps": 5 * args.blocks + 1, "lr": 1e-3, "out": out, "threads": None,
                            "resume": None, "resume_changed": False})
        ctx = training.setup(run, training=False)
        model = fastvim.create_model("fastvim_tiny", img_size=32, patch_size=8, num_classes=10)
        model = model.to(ctx.device)
        twin = copy.deepcopy(model)
        optimizer, bare_optimizer = (torch.optim.AdamW(m.parameters(), lr=1e-3)
                                     for m in (model, twin))
        at = []
        steps = itertools.count()

        def mark():
            if ctx.device.type == "cuda":
                torch.cuda.synchronize()
            at.append(time.perf_counter())

        def loss_fn(model, batch):
            if next(steps) % 5 == 0:
                mark()
                for _ in range(5):
                    F.cross_entropy(twin(batch[0]), batch[1]).backward()
                    bare_optimizer.step()
                    bare_optimizer.zero_grad()
                mark()
            return F.cross_entropy(model(batch[0]), batch[1])

        loader = data.make_loader(data.Digits(True), 32, train=True)
        training.fit(run, ctx, model, loader, loss_fn, optimizer, lambda step: 1e-3)
    bare = np.diff(at)[:-1:2]                                       # seconds of 5 steps
    ours = np.diff(at)[1::2]
    low, middle, high = np.quantile(ours / bare, (0.25, 0.5, 0.75))
    print(f"FastVim-T, 32 images of 16 tokens, {ctx.device}, EMA {args.ema or 'off'}: a bare step "
          f"takes {200 * np.median(bare):.0f} ms; the loop, data included, {middle:.3f} x that "
          f"(quartiles {low:.3f} and {high:.3f}, {len(ours)} blocks)")


def loading_rate(files, workers: int) -> float:
    """Items per second that a loader makes of a data set, read four times: median of 3 epochs."""
    loader = data.make_loader(torch.utils.data.ConcatDataset([files] * 4), 64, train=True,
                              workers=workers)
    rates = []
    for epoch in range(4):                                          # the first starts the workers
        loader.batch_sampler.set_epoch(epoch)
        start = time.perf_counter()
        count = sum(len(labels) for _, labels in loader)
        rates.append(count / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def write_noise(folder: Path, width: int, height: int, rng) -> float:
    """256 JPEG files of smooth noise, quality 90 -> their mean size in kB."""
    from PIL import Image
    folder.mkdir(parents=True)
    for i in range(256):
        coarse = rng.integers(0, 256, (height // 8, width // 8, 3)).astype(np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(smooth) + rng.normal(0, 12, (height, width, 3))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{i}.jpg", quality=90)
    return statistics.mean(path.stat().st_size for path in folder.iterdir()) / 1e3


def images(args: Namespace) -> None:
    """JPEG files through ImageNet's whole augmentation."""
    rng = np.random.default_rng(0)
    transform = data.image_transform(224, True, auto_augment="rand-m9-mstd0.5-inc1", reprob=0.25)
    threads = torch.get_num_threads()
    for width, height in ((224, 224), (500, 375)):
        with tempfile.TemporaryDirectory() as root:
            size = write_noise(Path(root, "train", "noise"), width, height, rng)
            files = data.ImageFolder(root, "train", transform)
            rate = loading_rate(files, args.workers)
            torch.set_num_threads(1)
            start = time.process_time()
            for path, _ in files.samples:
                data.load_rgb(path)
            decode = (time.process_time() - start) / len(files)
            torch.set_num_threads(threads)
        print(f"{width} x {height} JPEG ({size:.0f} kB) -> 224 px: {rate:.0f} images/s with "
              f"{args.workers} workers; decoding takes {1e3 * decode:.2f} ms, "
              f"{100 * decode * rate / args.workers:.0f} % of a worker's time")


def cells(args: Namespace) -> None:
    """Cells of 8 channels, beside the steps of a model on the CPU where they are prepared."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as root:
        Path(root, "train", "noise").mkdir(parents=True)
        for i in range(128):
            pixels = rng.integers(0, 256, (8, 224, 224)).astype(np.uint8)
            np.save(f"{root}/train/noise/{i}.npy", pixels)
        transform = data.CellTransform(224, data.JUMP_MEAN, data.JUMP_STD, augment=True)
        rate = loading_rate(data.cell_folder(root, "train", transform), args.workers)
    model = fastvim.create_model("fastchannelvim_small")
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        F.cross_entropy(model(torch.randn(4, 8, 224, 224)), torch.arange(4)).backward()
        seconds.append(time.perf_counter() - start)
    print(f"8 x 224 x 224 .npy (401 kB): {rate:.0f} images/s with {args.workers} workers; forward "
          "and backward pass of FastChannelVim-S/16 on this CPU, half of its channels sampled: "
          f"{4 / statistics.median(seconds[1:]):.2f} images/s")
