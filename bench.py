"""
Benchmarks. Figures of other machines differ; ratios measured in one run carry over best.

    python bench.py loop          what the training loop costs beside bare forward, backward and AdamW
    python bench.py data          images per second of the ImageNet training pipeline, and where the time goes
"""
import argparse
import copy
import pathlib
import statistics
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F

import data
import fastvim
import train_imagenet
import training


def loop(args):
    """Blocks of 5 bare steps on a twin alternate with 5 steps of training.fit, so that both see the same machine."""
    parser = argparse.ArgumentParser()
    training.add_training_arguments(parser, lr=1e-3, recipe_batch=32, batch_size=32, ema=args.ema)
    with tempfile.TemporaryDirectory() as out:
        run = parser.parse_args(["--steps", str(5 * args.blocks + 1), "--out", out, "--epochs", "1000"])
        ctx = training.setup(run, training=False)
        model = fastvim.create_model("fastvim_tiny", img_size=32, patch_size=8, num_classes=10).to(ctx.device)
        twin = copy.deepcopy(model)
        ours, bare = (torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, twin))
        count, since, times = 0, 0.0, ([], [])

        def now():
            if ctx.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter()

        def loss_of(model, batch):
            return F.cross_entropy(model(batch[0]), batch[1])

        def loss_fn(model, batch):
            nonlocal count, since
            if count % 5 == 0:
                start = now()
                if count:
                    times[0].append(start - since)
                for _ in range(5):
                    loss_of(twin, batch).backward()
                    bare.step()
                    bare.zero_grad()
                since = now()
                times[1].append(since - start)
            count += 1
            return loss_of(model, batch)

        loader = data.make_loader(data.Digits(True), 32, train=True)
        training.fit(run, ctx, model, loader, loss_fn, ours, lambda step: 1e-3)
    ratios = sorted(a / b for a, b in zip(*times))
    print(f"FastVim-T, 32 images of 16 tokens, {ctx.device}, EMA {args.ema or 'off'}: a bare step "
          f"takes {200 * statistics.median(times[1]):.0f} ms; the loop, data included, "
          f"{statistics.median(ratios):.3f} x that (quartiles {ratios[len(ratios) // 4]:.3f} and "
          f"{ratios[3 * len(ratios) // 4]:.3f}, {len(ratios)} blocks)")


def pipeline(args):
    """JPEG files of smooth noise, quality 90, through the recipe's whole augmentation."""
    from PIL import Image
    recipe = train_imagenet.RECIPE
    rng = np.random.default_rng(0)
    for width, height in ((224, 224), (500, 375)):
        with tempfile.TemporaryDirectory() as root:
            folder = pathlib.Path(root, "train", "noise")
            folder.mkdir(parents=True)
            for i in range(256):
                coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3)).astype(np.uint8))
                fine = rng.normal(0, 12, (height, width, 3))
                pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) + fine
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
            transform = data.image_transform(224, True, auto_augment=recipe["auto_augment"], reprob=recipe["reprob"])
            images = data.ImageFolder(root, "train", transform)
            many = torch.utils.data.ConcatDataset([images] * 4)
            loader, rates = data.make_loader(many, 64, train=True, workers=args.workers), []
            for epoch in range(4):                                          # the first starts the workers
                loader.batch_sampler.set_epoch(epoch)
                start = time.perf_counter()
                count = sum(len(labels) for _, labels in loader)
                rates.append(count / (time.perf_counter() - start))
            torch.set_num_threads(1)
            start = time.process_time()
            for path, _ in images.samples:
                data.load_rgb(path)
            decode = (time.process_time() - start) / len(images)
            size = sum(p.stat().st_size for p in folder.iterdir()) / len(images) / 1e3
        rate = statistics.median(rates[1:])
        print(f"{width} x {height} JPEG ({size:.0f} kB) -> 224 px: {rate:.0f} images/s with {args.workers} workers; "
              f"decoding takes {1e3 * decode:.2f} ms, {100 * decode * rate / args.workers:.0f} % of a worker's time")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["loop", "data"])
    parser.add_argument("--blocks", type=training.number(int, 4), default=20, help="loop: blocks of 5 steps (20)")
    parser.add_argument("--ema", type=training.number(float, 0, 1), default=0.0, help="loop: EMA decay (default off)")
    parser.add_argument("--workers", type=training.number(int, 1), default=2, help="data: processes (default 2)")
    args = parser.parse_args()
    {"loop": loop, "data": pipeline}[args.what](args)


if __name__ == "__main__":
    main()
