"""
Microscopy, section 4.4 of the paper: images of many channels, a token for each patch of each
channel. FastChannelVim and its baselines on the JUMP-CP benchmark, or on your own plates.

    python train_jump.py                            without data: drawn cells, minutes on a CPU
    python train_jump.py --model vim_tiny --out runs/vim      by a model that mixes the channels
    torchrun ... train_jump.py --index BR00116991.pq --patch 8 --pool max --batch-size 32 \\
        --platemap JUMP-Target-1_compound_platemap.tsv \\
        --metadata JUMP-Target-1_compound_metadata.tsv
    python train_jump.py --data DIR --channel-names DNA,ER,RNA     DIR/CLASS/*.npy, or paged *.tif
    python train_jump.py --data DIR \\
        --pattern '(?P<well>r\\d+c\\d+)f(?P<site>\\d+)p01-ch(?P<channel>\\d)'   a file per channel
    python train_jump.py --data DIR --stats         mean and standard deviation of its channels
    python train_jump.py --data DIR --eval runs/jump/best.pt    accuracy by number of channels
    python train_jump.py --predict cell.npy --eval runs/jump/best.pt
    python train_jump.py --embed OUT.parquet --data DIR --eval runs/jump/best.pt    features, for
                                                    other tools; --per well: their means

What the paper reports: top-1 on plate BR00116991 (160 perturbations, all 8 channels, S models,
channel sampling, 8 GPUs: a batch of 256):

                       patch 16  patch 8     flags
    FastChannelVim       73.6     83.1
      max                72.9     85.0       --pool max
      attention          73.1     85.8       --pool attention
      2-D mean           74.3     78.4       --pool-dims 2
      2-D max            73.5     84.0       --pool-dims 2 --pool max
    ChannelVim           73.5     83.0       --model channelvim_small
      unsorted           69.4                --model channelvim_small --no-sort
      spatial-first      65.9                --model channelvim_small --scan-order spatial-first
        unsorted         67.9                also --no-sort
    Vim                  61.0     66.4       --model vim_small
    ViT                  58.9     67.6       --model vit_small
    ChannelViT           68.6     74.8       --model channelvit_small
"""
import argparse
import functools
import json
import os
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import ablations
import baselines
import channels
import checkpoints
import data
import embed
import fastvim
import runs
import training
from channels import Channels, classify, match_channels, saved_channels

# The paper's: AdamW, no EMA, no mixup, no label smoothing; the weight decay rises along a cosine.
RECIPE = {**runs.TRAINING, "epochs": 100.0, "warmup": 10.0, "batch_size": 32, "recipe_lr": 1e-3,
          "recipe_batch": 256, "weight_decay": 0.04, "weight_decay_end": 0.4, "out": "runs/jump",
          "model": "fastchannelvim_small", "patch_size": 16, "img_size": 224,
          "drop_path_rate": 0.05, "hcs": True, "augment": True, "subset_samples": 5}
LR_END = 1e-6

# The same on the drawn cells, scaled to 2,000 images of 32 pixels and two CPU cores.
CELLS = {"epochs": 20.0, "warmup": 2.0, "recipe_lr": 5e-4, "recipe_batch": 32, "eval_every": 2,
         "out": "runs/cells", "model": "fastchannelvim_tiny", "depth": 6, "patch_size": 8,
         "img_size": 32, "drop_path_rate": 0.0, "workers": 0}   # a cell is drawn faster than sent

# How files are read: a trained model goes on with it. Another split would test on training images.
READING = ("pattern", "split_by", "planes")

# ---- Options -----------------------------------------------------------------------------------


def pattern(text: str) -> str:
    """An argparse type: a regular expression with a group `channel` or `well`, or nothing."""
    try:
        groups = re.compile(text).groupindex
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error
    if text and not {"channel", "well"} & set(groups):
        raise argparse.ArgumentTypeError(f"{text!r} needs a group (?P<channel>...) or "
                                         "(?P<well>...)")
    return text


def plane(text: str) -> tuple[str, int]:
    axis, _, number = text.partition("=")
    if not re.fullmatch("[a-z]|series", axis) or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: as z=2, t=0 or series=1, from 0")
    return axis, int(number)


def make_parser() -> runs.Parser:
    parser = runs.Parser(description="Train, evaluate or use a classifier of images of many "
                         "channels. Without --data and --index: on drawn cells of 8 channels, by a "
                         "recipe scaled to them.", usage="%(prog)s [options]")
    yes_no = argparse.BooleanOptionalAction
    group = parser.groups["data and weights"]
    add = group.add_mutually_exclusive_group().add_argument
    add("--data", metavar="DIR", help="DIR/CLASS/*.npy, *.npz or *.tif, each class split 60 : 20 : "
        "20, or DIR/{train,val,test}/CLASS/*")
    add("--index", metavar="TABLE", nargs="+", help="JUMP-CP's: Parquet with columns path and "
        "well_loc, a path or URL, for each plate")
    add = group.add_argument
    add("--platemap", metavar="TABLE", help="its table of well_position and broad_sample")
    add("--metadata", metavar="TABLE", help="its table of broad_sample and target (or gene)")
    add("--images", metavar="OLD=NEW", help="replace the beginning OLD of the index's paths by NEW")
    add("--pattern", type=pattern, metavar="REGEX", help="of --data's paths: files that differ in "
        "(?P<channel>...) alone are one image; images of a (?P<well>...), told apart by "
        "(?P<site>...), fall into one split")
    add("--split-by", choices=["well", "site"], help="what falls into one split (default: a well "
        "if --pattern has it, of --index a site)")
    add("--planes", type=plane, nargs="+", metavar="AXIS=N", help="of TIFFs with several slices, "
        "times or series: which one, z=2 t=0 series=1")
    add("--init", metavar="CKPT", help="start from this encoder, ours or a released one; channel "
        "embeddings go by name")
    group = parser.groups["instead of training"]
    ablations.add_arguments(group.add_argument)
    add = group.add_argument
    add("--eval", metavar="CKPT", help="accuracy by number of channels and for --subsets, of a "
        "checkpoint of ours or a released one, into OUT (default: its folder)")
    add("--split", choices=["train", "val", "test"], help="to evaluate (default: test, else val), "
        "or to embed (default: all)")
    add("--per", choices=["image", "well"], help="a row of --embed: an image, or a well's mean")
    add = group.add_mutually_exclusive_group().add_argument
    add("--predict", metavar="FILE", nargs="+", help="the five likeliest classes of each image, by "
        "--eval CKPT (default: OUT/best.pt)")
    add("--embed", metavar="FILE", type=embed.new_file, help="the features of all images, by "
        "--eval CKPT, as Parquet; goes on after a kill")
    add("--stats", action="store_true", help="the training images' --mean and --std")
    channels.add_arguments(parser)
    add = parser.groups["model"].add_argument
    add("--model", metavar="NAME", help="fastchannelvim, channelvim, fastvim, vim, vit, channelvit "
        "with _tiny, _small or _base")
    add("--patch", dest="patch_size", type=runs.WHOLE, help="pixels, 16 or 8 in the paper")
    add("--pool", choices=fastvim.POOLS, help="how a row becomes one token (default mean)")
    add("--pool-dims", type=int, choices=[1, 2], help="axes pooled in a layer (default 1)")
    add("--scan-order", choices=["channel-first", "spatial-first"], help="walk over the channels "
        "of a patch first (default), or over the patches of a channel")
    add = parser.groups["augmentation"].add_argument
    add("--augment", action=yes_no, help="crops, flips or rotation, defocus, holes; "
        "other sizes are cropped or padded in any case, never resized")
    add("--hcs", action=yes_no, help="show a batch some of the channels, drawn anew; models that "
        "mix channels get zeros for the others")
    add("--sort", action=yes_no, help="keep their order (default yes; ChannelViT: no)")
    parser.groups["recipe"].add_argument("--weight-decay-end", type=runs.AT_LEAST_0,
                                         help="the weight decay rises to this")
    runs.add_training_arguments(parser, RECIPE)
    return parser


def get_args(argv: list[str] | None = None) -> tuple[runs.Options, runs.Saved]:
    """The command line -> the options, and the checkpoint to start from or to use."""
    parser = make_parser()
    typed = vars(parser.parse_args(argv))
    for names in (("index", "platemap", "metadata"), ("mean", "std")):
        if 0 < len(typed.keys() & set(names)) < len(names):
            parser.error(f"--{', --'.join(names)} go together")
    if "=" not in typed.get("images", "="):
        parser.error(f"--images {typed['images']}: OLD=NEW is expected")
    if "per" in typed and "embed" not in typed:
        parser.error("--per goes with --embed")
    looks = bool(typed.keys() & {"eval", "predict", "embed"})
    start = runs.Saved()
    recipe = {**runs.defaults(parser), **RECIPE}
    if looks:
        out = typed.get("out", RECIPE["out"])
        path = typed.get("eval") or runs.last_run(out, RECIPE, CELLS)
        start = runs.read(path)
        if start.options and "mean" in typed:
            raise ValueError("--mean and --std: the model keeps those that it was trained with")
        recipe |= {name: start.options.get(name) for name in READING}
        recipe["out"] = os.path.dirname(path) or "."
    elif not typed.keys() & {"data", "index"}:
        recipe |= CELLS
    if typed.keys() & {"ablations", "quick"}:
        recipe |= ablations.options(typed, parser)
    chosen = {**recipe, **typed}
    if not looks and not chosen["stats"]:
        start = runs.starting_point(chosen, chosen["init"])
    return runs.Options({**chosen, **start.model_options(), **typed}), start


# ---- Data and model ----------------------------------------------------------------------------

def open_split(args, split: str, classes: list[str] | None = None) -> data.Files:
    """The raw images of a split: arrays (channels h w) as they lie in the files.

    ValueError: they show other classes than a model knows."""
    if args.index:
        raw = data.JumpCP(args.index, args.platemap, args.metadata, split, np.asarray,
                          args.images or "", args.split_by or "site")
    elif args.data:
        raw = data.cell_folder(args.data, split, np.asarray, classes, args.pattern or "",
                               args.split_by or "")
    else:
        raw = data.Cells(split, np.asarray, args.img_size)
    if args.planes and (args.index or args.data):
        raw.load = functools.partial(data.load_cells, planes=dict(args.planes))
    if classes and raw.classes != classes:
        raise ValueError(f"{raw.where}: {len(raw.classes)} classes "
                         f"({data.first_few(raw.classes)}), the model knows {len(classes)} "
                         f"({data.first_few(classes)})")
    return raw


def fields_of(args, channels: int, classes: int) -> dict:
    """What the model that args ask for is made with. ValueError: it has no such schedule."""
    fields = {**runs.model_fields(args), "in_chans": channels, "num_classes": classes}
    if args.pool_dims or args.scan_order:
        schedule = args.model.rpartition("_")[0]
        if args.pool_dims == 2:
            schedule += "_2d"
        if args.scan_order == "spatial-first":
            schedule += "_spatial"
        rows = [row for row in fastvim.SCHEDULES if "channel" in row]
        if schedule not in rows:
            raise ValueError(f"--model {args.model} --pool-dims {args.pool_dims or 1} --scan-order "
                             f"{args.scan_order or 'channel-first'}: no such model. There are "
                             f"{', '.join(rows)}")
        fields["schedule"] = schedule
    return fields


def build_model(args, fields: dict) -> nn.Module:
    """ValueError: an unknown name, or an option that the model does not have."""
    whole_patches = args.img_size % args.patch_size == 0
    if args.model in fastvim.list_models():
        model = fastvim.create_model(args.model, hcs=False, **fields)   # train samples channels
    elif args.model in baselines.CELL_VITS and whole_patches and not args.pool:
        model = baselines.create_vit(args.model, **fields)
    else:
        raise ValueError(f"--model {args.model}: choose from {', '.join(fastvim.list_models())}, "
                         f"or from {', '.join(baselines.CELL_VITS)} without --pool and with an "
                         "--img-size of whole patches")
    model.grad_checkpointing = args.grad_checkpointing
    return model


# ---- Training ----------------------------------------------------------------------------------

def train(args, ctx, start: runs.Saved) -> None:
    if not (args.data or args.index):
        ctx.print("no --data, no --index: training on drawn cells, by a recipe scaled to them")
    raw = open_split(args, "train")
    data.require_classes(raw)
    classes = raw.classes
    seen = match_channels(args, ctx, raw, saved_channels(start) if start.resumed else {})
    fields = fields_of(args, len(seen.model), len(classes))
    model = build_model(args, fields)
    if start.gives_weights:
        weights = checkpoints.model_weights(start.content)[0]
        note = channels.take_embeddings(model, weights, start, seen.model)
        taken = fastvim.load_checkpoint(model, weights, encoder_only=True)
        ctx.print(f"{args.init}: {taken}{note}")
    model = model.to(ctx.device)
    train_set = seen.normalized(raw, args.img_size, args.augment)
    val_set = seen.normalized(open_split(args, "val", classes), args.img_size)
    loader = runs.loader_of(args, ctx, train_set, train=True)
    val_loader = runs.loader_of(args, ctx, val_set)
    ctx.print(f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters, "
              f"{len(classes)} classes, channels {', '.join(seen.model)}; {len(train_set):,} "
              f"training and {len(val_set):,} validation images")
    keep_order = args.sort
    if keep_order is None:
        keep_order = not args.model.startswith("channelvit")

    def loss_fn(net, batch):
        images, labels = batch
        if not args.hcs:
            return F.cross_entropy(net(images), labels)
        shown = fastvim.sample_channels(images.shape[1], keep_order)
        return F.cross_entropy(classify(args, net, images, shown), labels)

    def evaluate_all(model, epoch):
        metrics = runs.evaluate_classifier(model, val_loader, ctx, args.amp)
        return {**metrics, "unreadable": runs.count_bad(ctx, train_set, val_set)}

    total, _ = training.run_length(args, loader)
    groups = training.parameter_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=training.peak_lr(args, ctx), fused=True)
    training.fit(
        args, ctx, model, loader, loss_fn, optimizer,
        runs.warmup_and_cosine(args, ctx, loader, end=LR_END),
        weight_decay=functools.partial(training.cosine, total=total, value=args.weight_decay,
                                       end=args.weight_decay_end),
        evaluate=evaluate_all, metric="top1",
        about={"built": {"name": args.model, "fields": fields}, "classes": classes,
               "channels": seen._asdict()})
    evaluate(args, ctx, runs.read(f"{args.out}/best.pt"))


# ---- Evaluation --------------------------------------------------------------------------------

def restore(args, ctx, saved: runs.Saved, raw: data.Files | None = None, headless: bool = False
            ) -> tuple[nn.Module, Channels]:
    """-> the model of a checkpoint, in eval mode, and its channels in raw images, or in files.

    headless: the model gives the features that its head, if it has one, would be given."""
    known = saved_channels(saved)
    if not known and raw is None:           # a released one, and no data set to ask
        files = args.channel_names or list(data.JUMP_CHANNELS)
        known = {"files": files, "model": files, "mean": data.JUMP_MEAN, "std": data.JUMP_STD}
    elif not known:                         # its channels are those of the files, all of them
        every = runs.Options({**vars(args), "channels": None})
        known = match_channels(every, ctx, raw, {})._asdict()
    seen = match_channels(args, ctx, raw, known)
    head = () if headless else checkpoints.model_weights(saved.content)[0].get("head.weight", ())
    model = build_model(args, fields_of(args, len(seen.model), len(head)))
    note = fastvim.load_checkpoint(model, saved.content, encoder_only=headless)
    ctx.print(f"{saved.path}: {note} into {args.model}, patch {args.patch_size}")
    if raw and not headless and len(head) != len(raw.classes):
        raise ValueError(f"the checkpoint tells {len(head)} classes apart, {raw.where} holds "
                         f"{len(raw.classes)}")
    return model.to(ctx.device).eval(), seen


def evaluate(args, ctx, saved: runs.Saved) -> None:
    """Top-1 by number of channels and of named subsets: a table, OUT/channels.json and .png."""
    runs.require_data(args, saved, "--data or --index")
    split = "test"
    if args.data and Path(args.data, "train").is_dir() and not Path(args.data, "test").is_dir():
        split = "val"
    raw = open_split(args, args.split or split, saved.classes)
    model, seen = restore(args, ctx, saved, raw)
    subsets = seen.subsets(args)
    loader = runs.loader_of(args, ctx, seen.normalized(raw, args.img_size))
    top1, count = channels.accuracy(args, ctx, model, loader, subsets)
    if not ctx.is_main:
        return
    rows = []
    for (name, ids), percent in zip(subsets, top1):
        rows.append({"name": name, "channels": [seen.model[i] for i in ids], "top1": percent})
        if isinstance(raw, data.Cells):     # of drawn cells it is known
            unmasked = [i for i in ids if seen.model[i] not in seen.masked]
            rows[-1]["best"] = data.Cells.best([seen.taken[i] for i in unmasked])
    print(f"top-1 in % on {count} of {len(raw)} images of {raw.where}")
    channels.print_table(rows)
    report = {"checkpoint": saved.path, "data": raw.where, "images": count, "subsets": rows}
    text = json.dumps(report, indent=1).encode()
    runs.write(args, "channels.json", lambda file: file.write(text))
    runs.write(args, "channels.png", lambda file: channels.draw_accuracy(rows, args.model, file))


def predict(args, ctx, saved: runs.Saved) -> None:
    """Prints the likeliest classes of each image."""
    if not ctx.is_main:
        return
    model, seen = restore(args, ctx, saved)
    load = functools.partial(data.load_cells, planes=dict(args.planes or []))
    files = seen.normalized(data.Files([], [], load, None, ""), args.img_size)
    paths = list(data.each_file(args.predict, data.CELL_EXTENSIONS))
    if args.pattern:
        sites, _ = data.group_sites([(path, 0) for path in paths], args.pattern, os.curdir)
        paths = [site.path for site in sites]
    for path, image in data.each_readable(paths, files.load):
        with torch.inference_mode():
            x = files.transform(image)[None].to(ctx.device)                     # (1 c h w)
            logits = classify(args, model, x, torch.tensor(seen.shown))
        p = logits[0].softmax(0)                                                # (classes)
        runs.print_likeliest(path, p, saved.classes or [str(i) for i in range(len(p))])


def embed_images(args, ctx, saved: runs.Saved) -> None:
    """Features of all images, or their means by well, as a Parquet file."""
    runs.require_data(args, saved, "--data or --index")
    listing, raw = embed.list_cells(args)
    model, seen = restore(args, ctx, saved, raw, headless=True)
    shown = torch.tensor(seen.shown)
    about = {"checkpoint": saved.path, "channels": [seen.model[i] for i in seen.shown],
             "known_channels": seen._asdict(), "planes": args.planes}
    embed.write(args, ctx, seen.normalized(raw, args.img_size), listing, model,
                lambda images: classify(args, model, images, shown), about)


def print_statistics(args, ctx, saved: runs.Saved) -> None:
    raw = open_split(args, "train")
    mean, std = data.channel_statistics(raw, channels.count_channels(args, raw))
    ctx.print("--mean=" + ",".join(f"{x:.6g}" for x in mean),
              "--std=" + ",".join(f"{x:.6g}" for x in std))


def main() -> None:
    runs.run(get_args, {"predict": predict, "embed": embed_images, "stats": print_statistics,
                        "eval": evaluate,
                        "ablations": functools.partial(ablations.main, "cells")}, train)


if __name__ == "__main__":
    main()
