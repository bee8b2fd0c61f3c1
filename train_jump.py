"""
Microscopy, section 4.4 of the paper: images of many channels, a token for each patch of each channel. FastChannelVim,
ChannelVim and their baselines on the JUMP-CP benchmark, or on your own plates.

    python train_jump.py                                   without data: drawn cells of 8 channels, minutes on a CPU
    python train_jump.py --model vim_tiny --out runs/vim   the same by a model that mixes the channels at the start
    torchrun ... train_jump.py --index BR00116991.pq --platemap JUMP-Target-1_compound_platemap.tsv \\
        --metadata JUMP-Target-1_compound_metadata.tsv --patch 8 --pool max --batch-size 32                  8 GPUs: 256
    python train_jump.py --data DIR --channel-names DNA,ER,RNA,AGP,Mito         DIR/CLASS/*.npy or multi-page *.tif
    python train_jump.py --data DIR --stats                     mean and standard deviation of its channels
    python train_jump.py --data DIR --eval runs/jump/best.pt    accuracy by number of channels, and of named subsets
    python train_jump.py --predict cell.npy --eval runs/jump/best.pt

What the paper reports: top-1 on plate BR00116991 (161 classes, all 8 channels, S models, with channel sampling):

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
import itertools
import json
import os
import pathlib

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

import data
import fastvim
import train_imagenet
import training

timm = data.extra("timm")

# The recipe of the paper: AdamW, no EMA, no mixup, no label smoothing; the weight decay rises along a cosine.
RECIPE = dict(epochs=100.0, warmup=10.0, batch_size=32, weight_decay=0.04, weight_decay_end=0.4)
LR, LR_BATCH, LR_END = 1e-3, 256, 1e-6
MODEL = dict(model="fastchannelvim_small", patch=16, img_size=224, drop_path=0.05)

# The same on the drawn cells, scaled to 2,000 images of 32 pixels and two CPU cores.
CELLS = dict(epochs=20.0, warmup=2.0, batch_size=32, recipe_lr=5e-4, recipe_batch=32, eval_every=2, out="runs/cells")
CELLS_MODEL = dict(model="fastchannelvim_tiny", depth=6, patch=8, img_size=32, drop_path=0.0)

# (family, pooled axes, scan order) -> row of fastvim.SCHEDULES
SCHEDULES = {("fastchannelvim", 1, "channel-first"): "fastchannelvim",
             ("fastchannelvim", 1, "spatial-first"): "fastchannelvim_spatial",
             ("fastchannelvim", 2, "channel-first"): "fastchannelvim_2d",
             ("channelvim", 1, "channel-first"): "channelvim",
             ("channelvim", 1, "spatial-first"): "channelvim_spatial"}
VITS = dict(tiny=dict(embed_dim=192, num_heads=3), small=dict(embed_dim=384, num_heads=6),
            base=dict(embed_dim=768, num_heads=12))

# What a checkpoint says of its model and its data, where the command line leaves it open.
MODEL_FLAGS = ("model", "patch", "img_size", "depth", "drop_path", "pool", "pool_dims", "scan_order")
CHANNEL_FLAGS = ("mean", "std", "file_channels", "model_channels")


# ----------------------------------------------------------------------------------------------------------------------
# Options

def names(text):
    """An argparse type: 'a,b' -> ['a', 'b']"""
    found = [name.strip() for name in text.split(",")]
    if not all(found) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} must be different names or numbers, with commas between them")
    return found


def numbers(text):
    return [float(number) for number in text.split(",")]


def subset(text):
    name, _, channels = text.partition("=")
    return name, names(channels)


def get_args(argv=None):
    """The command line -> args. The recipe is that of JUMP-CP, or of the drawn cells without --data and --index."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description="Train, evaluate or use a classifier of "
                                     "multi-channel images. Without --data and --index: on drawn cells of 8 channels, "
                                     "by a recipe scaled to them.")
    yes_no, whole = argparse.BooleanOptionalAction, train_imagenet.WHOLE
    add = parser.add_argument_group("what to do").add_argument
    add("--data", metavar="DIR", help="your images: DIR/CLASS/*.npy (channels, height, width) or *.tif with a page per "
        "channel, each class split 60 : 20 : 20; or DIR/train/CLASS/, DIR/val/CLASS/ and perhaps DIR/test/CLASS/")
    add("--index", metavar="TABLE", nargs="+", help="JUMP-CP: Parquet with the columns path and well_loc, a path or "
        "URL (s3://...), one for each plate; split 60 : 20 : 20")
    add("--platemap", metavar="TABLE", help="its table of well_position and broad_sample, Parquet or text")
    add("--metadata", metavar="TABLE", help="its table of broad_sample and target (or gene)")
    add("--images", metavar="OLD=NEW", default="", help="replace the beginning OLD of the index's paths by NEW")
    add("--init", metavar="CKPT", help="start from the encoder of this checkpoint, ours or a released one, with a "
        "fresh head; channel embeddings are taken by the channels' names")
    add("--stats", action="store_true", help="only print mean and standard deviation of the training images' channels")
    add("--eval", metavar="CKPT", help="only evaluate this checkpoint, ours or a released one: the accuracy by number "
        "of channels and for --subsets, a table and OUT/channels.png (default OUT: where the checkpoint is)")
    add("--predict", metavar="FILE", nargs="+", help="print the five likeliest classes of each image, by --eval CKPT "
        "(default: OUT/best.pt)")
    add("--split", choices=["train", "val", "test"], help="what to evaluate (default test, or val if there is none)")
    add = parser.add_argument_group("channels").add_argument
    add("--channel-names", type=names, metavar="A,B", help="what the channels of the files are called (default: their "
        "numbers, from 0; JUMP-CP's 8: fluorescence1 to 5, brightfield1 to 3)")
    add("--channels", type=names, metavar="A,B", help="take these, by name or number, in this order (default all)")
    add("--mask-channels", type=names, metavar="A,B", help="set these to zero, which is their mean")
    add("--mean", type=numbers, metavar="X,Y", help="of the files' channels, in the files' units (default: computed "
        "from 1,000 images; JUMP-CP's 8: the recipe's); write --mean=-1,2 if the first one is negative")
    add("--std", type=numbers, metavar="X,Y", help="their standard deviations")
    add("--subsets", type=subset, nargs="+", metavar="NAME=A,B", help="channels to evaluate together (JUMP-CP's 8: "
        "fluorescence, brightfield)")
    add("--subset-samples", type=training.number(int, 0), default=5, help="how many subsets of each number of channels "
        "to evaluate (default %(default)s)")
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="NAME", help="fastchannelvim_small (default), channelvim_small, vim_small, fastvim_small, "
        "vit_small, channelvit_small, or another size: tiny, base")
    add("--patch", type=whole, help="pixels, 16 (default) or 8 in the paper")
    add("--img-size", type=whole, help="pixels (default 224); other images are cropped or padded, never resized")
    add("--depth", type=whole, help="blocks (default: the model's own; drawn cells: 6)")
    add("--pool", choices=fastvim.POOLS, help="how a row becomes one token (default mean)")
    add("--pool-dims", type=int, choices=[1, 2], help="FastChannelVim: axes pooled in a layer (default 1)")
    add("--scan-order", choices=["channel-first", "spatial-first"], help="walk over the channels of a patch, or the "
        "patches of a channel, before going on (default channel-first)")
    add("--hcs", action=yes_no, default=True, help="show a batch only some of the channels, drawn anew (default yes; a "
        "model that mixes the channels gets zeros for the others, and those shown scaled up)")
    add("--sort", action=yes_no, help="then keep their order (default yes; ChannelViT: no)")
    add("--drop-path", type=train_imagenet.SHARE, help="stochastic depth at the last block (default 0.05)")
    add("--grad-checkpointing", action="store_true", help="less memory, more time, the same result")
    add = parser.add_argument_group("augmentation and schedule").add_argument
    add("--augment", action=yes_no, default=True, help="crops, flips or rotation, defocus, holes (default yes)")
    add("--warmup", type=train_imagenet.POSITIVE, help="epochs of linear warmup")
    add("--weight-decay-end", type=train_imagenet.POSITIVE, help="the weight decay rises to this")
    training.add_training_arguments(parser, lr=LR, recipe_batch=LR_BATCH, out="runs/jump")
    parser.set_defaults(**RECIPE, **dict.fromkeys(("size", "file_channels", "model_channels", "classes")))
    first = parser.parse_known_args(argv)[0]
    if first.eval:
        parser.set_defaults(out=os.path.dirname(first.eval) or ".")
    elif not (first.data or first.index or first.predict):
        parser.set_defaults(**CELLS)
    args = parser.parse_args(argv)
    if args.data and args.index:
        parser.error("--data is a folder of classes, --index a table of JUMP-CP: give one of them")
    if not bool(args.index) == bool(args.platemap) == bool(args.metadata):
        parser.error("--index, --platemap and --metadata go together")
    if args.images and "=" not in args.images:
        parser.error(f"--images {args.images}: OLD=NEW is expected")
    if (args.mean is None) != (args.std is None):
        parser.error("--mean and --std go together")
    return args


def fill(args, defaults):
    """Completes what neither the command line nor a checkpoint says."""
    vars(args).update({key: value for key, value in defaults.items() if getattr(args, key) is None})


# ----------------------------------------------------------------------------------------------------------------------
# Data

def open_split(args, split, classes=None):
    """The raw images of a split: data.Files of arrays (channels, H, W) as they lie in the files."""
    if args.index:
        found = data.JumpCP(args.index, args.platemap, args.metadata, split, np.asarray, images=args.images)
    elif args.data:
        found = data.cell_folder(args.data, split, np.asarray, classes)
    else:
        found = data.Cells(split, np.asarray, args.img_size)
    if classes and found.classes != classes:
        raise ValueError(f"{found.where}: {len(found.classes)} classes ({data.some(found.classes)}), the model knows "
                         f"{len(classes)} ({data.some(classes)})")
    return found


def find(args, wanted, among):
    """Names of channels, or numbers of the files' channels -> their indices in `among`, a list of names."""
    by_number = {str(i): name for i, name in enumerate(args.file_channels)}
    found = [name if name in among else by_number.get(name) for name in wanted]
    if missing := [name for name, known in zip(wanted, found) if known not in among]:
        raise ValueError(f"no channel {', '.join(missing)}: there are {', '.join(among)}")
    if len(set(found)) < len(found):
        raise ValueError(f"{', '.join(wanted)} names a channel twice")
    return [among.index(name) for name in found]


def settle_channels(args, raw, ctx):
    """Which channels the files have, args.file_channels, and the model sees, args.model_channels; their means and
    deviations; args.taken: where in the file each of the model's channels lies, -1 for one that is not shown.

    A trained model has its channels, by name: files may lack some of them, --channels may leave some out."""
    count = data.channel_count(raw) if raw else len(args.file_channels)
    if args.channel_names or args.file_channels is None:
        benchmark = list(data.JUMP_CHANNELS) if args.index and count == len(data.JUMP_CHANNELS) else None
        args.file_channels = args.channel_names or benchmark or [str(i) for i in range(count)]
    if raw and len(args.file_channels) != count:
        raise ValueError(f"the images in {raw.where} have {count} channels, not {len(args.file_channels)} "
                         f"({', '.join(args.file_channels)}): name theirs with --channel-names")
    taken = find(args, args.channels or args.file_channels, args.file_channels)
    if args.model_channels is None:
        if args.mean is None and args.index and count == len(data.JUMP_CHANNELS):
            args.mean, args.std = data.JUMP_MEAN, data.JUMP_STD
        elif args.mean is None:
            found = torch.tensor(data.channel_statistics(raw, count, 1000), device=ctx.device)
            args.mean, args.std = (ctx.sum(found) / ctx.world_size).tolist()                 # the same everywhere
        if not len(args.mean) == len(args.std) == count or not np.isfinite([*args.mean, *args.std]).all() or (
                min(args.std) <= 0):
            raise ValueError(f"--mean and --std need one number for each of the {count} channels of the files, and no "
                             f"deviation of 0: they are {args.mean} and {args.std}")
        args.model_channels, args.taken = [args.file_channels[i] for i in taken], taken
        args.mean, args.std = ([numbers[i] for i in taken] for numbers in (args.mean, args.std))
    else:
        where = {args.file_channels[i]: i for i in taken}
        args.taken = [where.get(name, -1) for name in args.model_channels]
        if max(args.taken) < 0:
            raise ValueError(f"the model knows the channels {', '.join(args.model_channels)}, it is to see "
                             f"{', '.join(where)}: none in common")
    args.mask_channels = [args.model_channels[i] for i in find(args, args.mask_channels or [], args.model_channels)]


def ready(args, raw, augment=False):
    """Raw images -> normalised (C, img_size, img_size) float32 of the model's channels."""
    masked = [i for i, (at, name) in enumerate(zip(args.taken, args.model_channels))
              if at < 0 or name in args.mask_channels]
    raw.load = functools.partial(data.take_channels, raw.load, len(args.file_channels), args.taken)
    raw.transform = data.CellTransform(args.img_size, args.mean, args.std, augment, masked)
    return raw


def loader_of(args, ctx, dataset, train=False):
    workers = args.workers if args.data or args.index else 0                # a cell is drawn faster than sent
    return data.make_loader(dataset, args.batch_size, train=train, seed=args.seed, workers=workers, rank=ctx.rank,
                            world_size=ctx.world_size)


# ----------------------------------------------------------------------------------------------------------------------
# Models

class ChannelViT(timm.models.VisionTransformer):
    """The baseline: a ViT on a token for each patch of each channel, told apart by a channel embedding.

    Images (B c H W), ids of their channels (c), default all -> logits (B num_classes)."""

    def __init__(self, in_chans, **options):
        super().__init__(in_chans=1, **options)                             # one filter for all channels
        self.channel_embed = nn.Embedding(in_chans, self.embed_dim)
        nn.init.trunc_normal_(self.channel_embed.weight, std=0.02)

    def forward(self, x, channels=None):
        B, c = x.shape[:2]
        channels = torch.arange(c) if channels is None else channels
        x = self.patch_embed(rearrange(x, "b c h w -> (b c) 1 h w"))        # (B*c L D)
        x = rearrange(x, "(b c) l d -> b c l d", b=B) + self.pos_embed[:, None, 1:]
        x = x + self.channel_embed(channels.to(x.device))[:, None]          # (B c L D)
        token = (self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1)
        x = torch.cat([token, rearrange(x, "b c l d -> b (c l) d")], 1)
        x = timm.models.checkpoint_seq(self.blocks, x) if self.grad_checkpointing and self.training else self.blocks(x)
        return self.head(self.norm(x)[:, 0])


def build_model(args, num_classes):
    """The model that args ask for. ValueError: an unknown name, or an option that the model does not have."""
    family, _, size = args.model.rpartition("_")
    options = dict(img_size=args.img_size, patch_size=args.patch, in_chans=len(args.model_channels),
                   num_classes=num_classes, drop_path_rate=args.drop_path)
    if args.depth:
        options["depth"] = args.depth
    key = family, args.pool_dims or 1, args.scan_order or "channel-first"
    if key in SCHEDULES:
        options |= dict(schedule=SCHEDULES[key], hcs=False)                 # sampling is the training loop's, below
    elif args.pool_dims or args.scan_order:
        raise ValueError(f"--model {args.model} --pool-dims {key[1]} --scan-order {key[2]}: no such model. There are "
                         f"{'; '.join(f'{f}, {d}, {order}' for f, d, order in SCHEDULES)}")
    if args.model in fastvim.list_models():
        model = fastvim.create_model(args.model, pool=args.pool or "mean", **options)
        model.grad_checkpointing = args.grad_checkpointing
        return model
    if family not in ("vit", "channelvit") or size not in VITS or args.pool or args.img_size % args.patch:
        raise ValueError(f"--model {args.model}: choose from {', '.join(fastvim.list_models())}, or from "
                         f"{', '.join(f'{f}_{s}' for f in ('vit', 'channelvit') for s in VITS)} without --pool "
                         "and with an --img-size of whole patches")
    model = (ChannelViT if family == "channelvit" else timm.models.VisionTransformer)(**options, **VITS[size])
    model.set_grad_checkpointing(args.grad_checkpointing)
    return model


def is_per_channel(model):
    return isinstance(model, ChannelViT) or isinstance(model, fastvim.FastVim) and model.cfg.per_channel


def see(net, per_channel, images, channels):
    """Logits of images (B C H W) of which only `channels` (c) are to be seen.

    A model that mixes the channels gets zeros for the others; what it sees is scaled up, as in dropout, so that its
    patch embedding keeps its size."""
    if per_channel:
        return net(images[:, channels], channels=channels)
    shown = torch.zeros_like(images)
    shown[:, channels] = images[:, channels] * (images.shape[1] / len(channels))
    return net(shown)


# ----------------------------------------------------------------------------------------------------------------------
# Training

def take_encoder(args, model, content):
    """Loads the encoder of --init, the channel embeddings by name; returns what was taken, in words."""
    weights, saved, note, own = fastvim.model_weights(content)[0], content.get("args", {}), "", model.state_dict()
    for key in own.keys() & {"patch_embed.channel_embed.weight", "channel_embed.weight"} & weights.keys():
        theirs = saved.get("model_channels", data.JUMP_CHANNELS)
        if len(theirs) != len(weights[key]):
            raise ValueError(f"{args.init}: {len(weights[key])} channel embeddings without names")
        common = [name for name in args.model_channels if name in theirs]
        own[key][[args.model_channels.index(name) for name in common]] = weights[key][
            [theirs.index(name) for name in common]]
        weights[key], note = own[key], f"; of channels {', '.join(common) or 'none'}, the others as initialised"
    return fastvim.load_checkpoint(model, weights, encoder_only=True) + note


def train(args, ctx):
    resumed, content = training.checkpoint_to_resume(args), {}
    if resumed or args.init:                                                # with --init both say what the model is
        content = fastvim.read_checkpoint(resumed or args.init)
        train_imagenet.adopt(args, content, (MODEL_FLAGS if args.init else ()) + (CHANNEL_FLAGS if resumed else ()))
    fill(args, MODEL if args.data or args.index else CELLS_MODEL)
    train_set = open_split(args, "train")
    settle_channels(args, train_set, ctx)
    args.classes = train_set.classes                                        # kept in the checkpoint
    model = build_model(args, len(args.classes))
    if args.init and not resumed:
        ctx.print(f"{args.init}: {take_encoder(args, model, content)}")
    train_set, val_set = ready(args, train_set, args.augment), ready(args, open_split(args, "val", args.classes))
    loader, val_loader = loader_of(args, ctx, train_set, train=True), loader_of(args, ctx, val_set)
    model, per_channel = model.to(ctx.device), is_per_channel(model)
    sort = not isinstance(model, ChannelViT) if args.sort is None else args.sort
    ctx.print(f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(args.classes)} classes, "
              f"channels {', '.join(args.model_channels)}; {len(train_set):,} training and {len(val_set):,} validation "
              "images")
    if ctx.is_main:
        draw_examples(args, train_set)

    def loss_fn(net, batch):
        images, labels = batch
        if not args.hcs:
            return F.cross_entropy(net(images), labels)
        channels = fastvim.sample_channels(images.shape[1], sort)
        return F.cross_entropy(see(net, per_channel, images, channels), labels)

    def evaluate(model, epoch):
        return training.evaluate_classifier(model, val_loader, ctx, args.amp) | {
            "unreadable": training.count_bad(ctx, train_set, val_set)}

    total, per_epoch = training.run_length(args, loader)
    training.fit(args, ctx, model, loader, loss_fn, train_imagenet.adamw(model, args), evaluate=evaluate, metric="top1",
                 harmless=("data", "index", "images", "platemap", "metadata", "split", "eval", "predict", "stats",
                           "init", "grad_checkpointing", "subsets", "subset_samples"),
                 weight_decay=lambda step: training.cosine(step, total, args.weight_decay, end=args.weight_decay_end),
                 lr=lambda step: training.cosine(step, total, args.lr, warmup=round(args.warmup * per_epoch),
                                                 end=LR_END))
    args.eval = f"{args.out}/best.pt"
    evaluate_subsets(args, ctx)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation

def restore(args, ctx, path):
    """-> (model at path, the images to evaluate it on or, with --predict, None). args gets what the command line leaves
    open of model, channels and classes; a released checkpoint says nothing of them."""
    content = fastvim.read_checkpoint(path)
    given, fresh = args.mean, args.model_channels is None
    saved = train_imagenet.adopt(args, content, (*MODEL_FLAGS, *CHANNEL_FLAGS, "mask_channels", "classes"))
    if saved and given and fresh:
        raise ValueError("--mean and --std: the model keeps those that it was trained with")
    drawn = saved and not saved["data"] and not saved.get("index")
    if not (args.predict or args.data or args.index or drawn):
        raise ValueError("--eval: this model was trained on files, so --data or --index has to say where they are")
    fill(args, CELLS_MODEL if drawn else MODEL)
    raw = None
    if not args.predict:
        has_test = not args.data or not os.path.isdir(f"{args.data}/train") or os.path.isdir(f"{args.data}/test")
        raw = open_split(args, args.split or ("test" if has_test else "val"), args.classes)
    elif not saved:                                                         # nor is there a data set to ask
        args.file_channels, args.mean, args.std = list(data.JUMP_CHANNELS), data.JUMP_MEAN, data.JUMP_STD
    settle_channels(args, raw, ctx)
    head = fastvim.model_weights(content)[0].get("head.weight", ())
    model = build_model(args, len(head))
    ctx.print(f"{path}: {fastvim.load_checkpoint(model, content)} into {args.model}, patch {args.patch}")
    if raw and len(head) != len(raw.classes):
        raise ValueError(f"the checkpoint tells {len(head)} classes apart, {raw.where} holds {len(raw.classes)}")
    return model.to(ctx.device).eval(), raw


def subsets_of(args):
    """[(name or "", ids of the model's channels)]: the named ones; each shown channel, some of each number, all."""
    shown, rng, named = shown_channels(args), np.random.RandomState(args.seed), args.subsets
    if named is None and set(data.JUMP_CHANNELS) == {args.model_channels[i] for i in shown}:
        named = [("fluorescence", data.JUMP_CHANNELS[:5]), ("brightfield", data.JUMP_CHANNELS[5:])]
    found = [(name, find(args, channels, args.model_channels)) for name, channels in named or []]
    if missing := [args.model_channels[i] for _, ids in found for i in ids if i not in shown]:
        raise ValueError(f"--subsets: the images do not show {', '.join(missing)}")
    for size in range(1, len(shown) + 1):
        drawn = {tuple(np.sort(rng.permutation(shown)[:size]).tolist()) for _ in range(args.subset_samples)}
        every = size in (1, len(shown))
        found += [("", list(ids)) for ids in sorted(itertools.combinations(shown, size) if every else drawn)]
    return found


def shown_channels(args):
    return [i for i, at in enumerate(args.taken) if at >= 0]


def evaluate_subsets(args, ctx):
    """Top-1 of --eval on --split, by number of channels and for named subsets: a table, OUT/channels.json and .png."""
    model, raw = restore(args, ctx, args.eval)
    per_channel, subsets = is_per_channel(model), subsets_of(args)
    hits = torch.zeros(len(subsets) + 1, dtype=torch.float64, device=ctx.device)             # the last: all images
    with torch.inference_mode(), torch.autocast(ctx.device.type, torch.bfloat16, enabled=args.amp):
        for images, labels in filter(None, tqdm(loader_of(args, ctx, ready(args, raw)), "subsets",
                                                disable=None if ctx.is_main else True)):
            images, labels = images.to(ctx.device), labels.to(ctx.device)
            for i, (_, ids) in enumerate(subsets):
                hits[i] += (see(model, per_channel, images, torch.tensor(ids)).argmax(1) == labels).sum()
            hits[-1] += len(labels)
    *hits, count = ctx.sum(hits).tolist()
    if not count:
        raise ValueError(f"{raw.where}: none of the images can be read")
    if not ctx.is_main:
        return
    rows, groups, masked = [], {}, args.mask_channels
    for (name, ids), hit in zip(subsets, hits):
        row = dict(name=name, channels=[args.model_channels[i] for i in ids], top1=100 * hit / count)
        if isinstance(raw, data.Cells):                                     # of drawn cells it is known
            row["best"] = data.Cells.best([args.taken[i] for i in ids if args.model_channels[i] not in masked])
        rows.append(row)
        groups.setdefault(f"{name} ({len(ids)})" if name else str(len(ids)), []).append(row)
    print(f"top-1 in % on {count:.0f} of {len(raw)} images of {raw.where}\n{'channels':24}{'subsets':>8}{'mean':>8}"
          f"{'least':>8}{'most':>8}{'best possible' * ('best' in rows[0]):>16}")
    for label, group in groups.items():
        top1 = [row["top1"] for row in group]
        best = f"{np.mean([row['best'] for row in group]):16.1f}" if "best" in group[0] else ""
        print(f"{label:24}{len(group):8}{np.mean(top1):8.1f}{min(top1):8.1f}{max(top1):8.1f}{best}")
    text = json.dumps(dict(checkpoint=str(args.eval), data=raw.where, images=count, subsets=rows), indent=1)
    pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)
    training.write_whole(pathlib.Path(args.out, "channels.json"), lambda file: file.write(text.encode()), False)
    draw_subsets(args, rows)


def predict(args, ctx):
    """Prints the likeliest classes of each image."""
    model, _ = restore(args, ctx, args.eval or f"{args.out}/best.pt")
    files = ready(args, data.Files([], [], data.load_cells, None, ""))
    for path, image in data.each_readable(args.predict, files.load):
        with torch.inference_mode():
            x, shown = files.transform(image)[None].to(ctx.device), torch.tensor(shown_channels(args))
            p = see(model, is_per_channel(model), x, shown)[0].softmax(0)                     # (classes)
        train_imagenet.print_likeliest(path, p, args.classes or [str(i) for i in range(len(p))])


# ----------------------------------------------------------------------------------------------------------------------
# Pictures

def save_picture(args, name, width, height, draw):
    """OUT/name, a PNG of what draw(figure) draws; without matplotlib none, which is said."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print(f"matplotlib is not installed: no {name}", flush=True)
    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure)
    pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)
    training.write_whole(pathlib.Path(args.out, name), lambda file: figure.savefig(file, format="png", dpi=150), False)


def draw_examples(args, dataset, rows=6):
    """OUT/examples.png: training images as the model sees them, a column for each channel."""
    images = data.Seeded(dataset, args.seed)
    shown = filter(None, (images[0, int(i)] for i in np.linspace(0, len(dataset) - 1, 3 * rows)))  # but unreadable ones
    shown = list(itertools.islice(shown, rows))

    def draw(figure):
        tiles = F.pad(torch.stack([image for image, _ in shown]), 4 * [1], value=torch.nan)        # (rows C S S)
        low, high = (f(tiles.nan_to_num(), (2, 3), keepdim=True) for f in (torch.amin, torch.amax))
        tiles, axes = (tiles - low) / (high - low).clamp(min=1e-9), figure.subplots()             # each by itself
        axes.imshow(rearrange(tiles, "n c h w -> (n h) (c w)").numpy(), "gray")
        centers = (np.arange(max(tiles.shape[:2])) + 0.5) * tiles.shape[-1]
        axes.set_xticks(centers[:tiles.shape[1]], args.model_channels, fontsize=7)
        axes.set_yticks(centers[:len(tiles)], [args.classes[label] for _, label in shown], fontsize=7)

    if shown:
        save_picture(args, "examples.png", 1.2 * len(args.model_channels) + 1, 1.2 * rows, draw)


def draw_subsets(args, rows):
    """OUT/channels.png: the accuracy of each subset against its number of channels."""
    sizes = sorted({len(row["channels"]) for row in rows})

    def draw(figure):
        axes = figure.subplots()
        for field, style, label in (("top1", "C0", f"{args.model}, mean"), ("best", "C7--", "best possible, mean")):
            if field in rows[0]:
                means = [np.mean([row[field] for row in rows if len(row["channels"]) == size]) for size in sizes]
                axes.plot(sizes, means, style, label=label)
        for row in rows:
            axes.plot(len(row["channels"]), row["top1"], "D" if row["name"] else "C0.", label=row["name"] or None)
        axes.set(xlabel="channels", ylabel="top-1, %", xticks=sizes)
        axes.legend()

    save_picture(args, "channels.png", 6, 4, draw)


def main():
    args = get_args()
    with training.plain_errors("train_jump.py", args, data.BadDataError, OSError):
        ctx = training.setup(args, training=not (args.eval or args.predict or args.stats))
        if args.predict:
            if ctx.is_main:
                predict(args, ctx)
        elif args.stats:
            fill(args, MODEL if args.data or args.index else CELLS_MODEL)
            raw = open_split(args, "train")
            ctx.print(*(f"--{name}={','.join(f'{x:.6g}' for x in values)}" for name, values in zip(
                ("mean", "std"), data.channel_statistics(raw, data.channel_count(raw)))))
        elif args.eval:
            evaluate_subsets(args, ctx)
        else:
            if not (args.data or args.index):
                ctx.print("no --data, no --index: training on drawn cells, by a recipe scaled to them")
            train(args, ctx)
        ctx.close()


if __name__ == "__main__":
    main()
