"""Image classifiers: what train_imagenet.py shares with the later stages of train_mae.py."""
import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import checkpoints
import data
import fastvim
import runs
import training
from baselines import PooledAttention

IMG_SIZE = 224  # pixels
CROP_PCT = 0.875  # the side of the evaluation's centre crop, as a share of the resized image
AUGMENTATION = {"auto_augment": "rand-m9-mstd0.5-inc1", "reprob": 0.25, "crop_scale": 0.08,
                "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}


def size_name(letter: str) -> str:
    """An argparse type: s -> fastvim_small."""
    if letter not in runs.SIZES:
        raise argparse.ArgumentTypeError(f"{letter!r}: choose from {', '.join(runs.SIZES)}")
    return f"fastvim_{runs.SIZES[letter]}"


def add_arguments(parser: runs.Parser, recipe: dict, others: str = "") -> None:
    """What an encoder is, which images it sees and how. others: models that are not ours."""
    add = parser.groups["data and weights"].add_argument
    add("--data", metavar="DIR", help="DIR/{train,val}/CLASS/*.jpg, or ILSVRC's flat DIR/val; "
        "wds/DIR: tar shards; hfds/NAME or hfds/DIR: Hugging Face's (docs/data.md)")
    add = parser.groups["model"].add_argument
    add("--size", dest="model", type=size_name, metavar="{t,s,b,l,h}",
        help="FastVim-T, S, B, L or H (default t)")
    add("--model", metavar="NAME",
        help=f"another one: vim_small, ... (python fastvim.py lists them){others}")
    add("--patch-size", type=runs.WHOLE, help="pixels (default: the size's own, 16 or 14)")
    add = parser.groups["the paper's ablations"].add_argument
    add("--schedule", choices=["fastvim", "pool_col", "pool_row", "vim"],
        help="which axis is pooled in which layer")
    add("--pool", choices=fastvim.POOLS, help="how a row becomes one token (default mean)")
    add("--pool-scale", type=float, help="factor of the means (default 1; after pretraining 0.25)")
    add("--class-token", action=argparse.BooleanOptionalAction, help="read it out, not the mean")
    add("--block-norm", choices=fastvim.NORMS, help="norm before the mixer (default rmsnorm)")
    add("--ssm-norm", choices=[*fastvim.NORMS, "none"],
        help="norm after the scan (default layernorm)")
    add("--no-conv", dest="d_conv", action="store_const", const=0, help="leave out the convolution")
    add("--skip-before-expand", action="store_const", const=True, help="decompress after D")
    add = parser.groups["augmentation"].add_argument
    add("--auto-augment", metavar="POLICY", help="timm's policy string, or none")
    add("--reprob", type=runs.SHARE, help="probability of random erasing")
    add("--crop-scale", type=runs.number(float, 0.01, 1.01),
        help="smallest share of an image that a crop keeps")
    add("--crop-pct", type=runs.number(float, 0.1),
        help=f"evaluation: centre crop's share of the resized image (default {CROP_PCT})")
    if "mixup" in recipe:
        add("--mixup", type=runs.AT_LEAST_0, help="alpha of mixup, 0 for none")
        add("--cutmix", type=runs.AT_LEAST_0, help="alpha of cutmix, 0 for none")
        add("--smoothing", type=runs.SHARE, help="label smoothing")


def check_pairs(options: dict, parser: argparse.ArgumentParser) -> None:
    if (options.get("mixup") or options.get("cutmix")) and options["batch_size"] % 2:
        parser.error(f"--batch-size {options['batch_size']}: mixup and cutmix pair images, so it "
                     "has to be even")


def crop_of(saved: runs.Saved, typed: dict) -> dict:
    """The checkpoint's --crop-pct, if the run is of its image size."""
    known = saved.options.get("crop_pct")
    size = saved.fields.get("img_size", IMG_SIZE)
    if known is None or typed.get("img_size", size) != size:
        return {}
    return {"crop_pct": known}


# ---- Models --------------------------------------------------------------------------------------

def is_ours(model: str) -> bool:
    return model in fastvim.list_models()


def build_model(args: runs.Options, num_classes: int) -> nn.Module:
    """The model that args ask for. ValueError: an unknown name, an option that it does not have."""
    if not is_ours(args.model):
        return build_timm(args, num_classes)
    fields = runs.model_fields(args)
    if fields.keys() & {"vit_pool", "vit_conv"}:
        raise ValueError("--vit-pool and --vit-conv are for the ViTs of timm: name one with "
                         "--model")
    model = fastvim.create_model(args.model, num_classes=num_classes, **fields)
    model.grad_checkpointing = args.grad_checkpointing
    return model


def build_timm(args: runs.Options, num_classes: int) -> nn.Module:
    """A model of timm, a ViT perhaps with the pooling of Table 7."""
    timm = data.extra("timm")
    if not timm.is_model(args.model):
        raise ValueError(f"--model {args.model}: neither a model of timm nor one of ours: a "
                         f"family, {', '.join(fastvim.FAMILIES)}, and a size, "
                         f"{', '.join(fastvim.SIZES)}, such as fastvim_tiny")
    fields = runs.model_fields(args)
    for option in ("init", "shard"):
        if vars(args).get(option):
            raise ValueError(f"--{option} is for training our models, "
                             f"{', '.join(fastvim.list_models())}: {args.model} is none")
    known = ("img_size", "patch_size", "depth", "drop_path_rate")
    wrong = fields.keys() - {*known, "vit_pool", "vit_conv"}
    if wrong:
        raise ValueError(f"--model {args.model} is timm's and does not know {', '.join(wrong)}")
    fields = {name: value for name, value in fields.items() if name in known}
    try:
        model = timm.create_model(args.model, num_classes=num_classes, **fields)
    except TypeError:  # a convolutional net takes any size
        model = timm.create_model(args.model, num_classes=num_classes,
                                  drop_path_rate=args.drop_path_rate)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    if args.vit_conv and not args.vit_pool:
        raise ValueError("--vit-conv goes with --vit-pool")
    if args.vit_pool:
        pool_attention(model, args)
    return model


def pool_attention(model: nn.Module, args: runs.Options) -> None:
    blocks = getattr(model, "blocks", [None])
    if not all(hasattr(getattr(block, "attn", None), "qkv") for block in blocks):
        raise ValueError(f"--vit-pool: {args.model} is no ViT of timm")
    for i, block in enumerate(blocks):
        block.attn = PooledAttention(block.attn, model.num_prefix_tokens,
                                     model.patch_embed.grid_size, i % 2, args.vit_conv)


def linear_probe(model: fastvim.FastVim, num_classes: int) -> fastvim.FastVim:
    """The model frozen, under a classifier that learns (Table 11): of normalised features, without
    learnt scale or shift."""
    model.requires_grad_(False)
    linear = nn.Linear(model.cfg.embed_dim, num_classes)
    nn.init.trunc_normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    norm = nn.BatchNorm1d(model.cfg.embed_dim, affine=False, eps=1e-6)
    model.head = nn.Sequential(norm, linear)
    return model


def restore(args: runs.Options, ctx: training.Context, saved: runs.Saved) -> nn.Module:
    """The model that the checkpoint says it is, else that args name, with its weights."""
    weights, _ = checkpoints.model_weights(saved.content)
    head = weights.get("head.1.weight", weights.get("head.weight"))
    if saved.classes is None and head is None:
        raise ValueError(f"{saved.path} says neither its classes nor holds a head.weight to count "
                         "them")
    count = len(head) if saved.classes is None else len(saved.classes)
    model = build_model(args, count)
    if is_ours(args.model) and "head.1.weight" in weights:
        model = linear_probe(model, count)
    scale = "" if args.pool_scale is None else f", pool_scale {args.pool_scale:g}"
    ctx.print(f"{saved.path}: {checkpoints.load(model, saved.content)} into {args.model}{scale}")
    return model.to(ctx.device).eval()


# ---- Data ----------------------------------------------------------------------------------------

def open_images(args: runs.Options, train: bool, classes: list | None = None):
    """The training or the validation set. classes: names that the folders must have."""
    if args.data is None:
        return data.Digits(train, args.img_size)
    transform = data.image_transform(args.img_size, train, auto_augment=args.auto_augment,
                                     reprob=args.reprob, scale=(args.crop_scale, 1.0),
                                     crop_pct=args.crop_pct or CROP_PCT)
    return data.open_split(args.data, "train" if train else "val", transform, classes)


# ---- Training ------------------------------------------------------------------------------------

def train(args: runs.Options, ctx: training.Context, start: runs.Saved, build: Callable,
          optimizer_of: Callable, lr_start: float = 0.0, lr_end: float = 0.0) -> list[dict]:
    """One run; returns training.fit's log.

    build(args, num_classes) -> model; optimizer_of(model, args, lr): what updates it.
    lr_start, lr_end: where the warmup begins and the cosine ends."""
    train_set = open_images(args, True)
    if args.data:
        data.require_classes(train_set)
    classes = train_set.classes
    val_set = open_images(args, False, classes)
    loader = runs.loader_of(args, ctx, train_set, True)
    val_loader = runs.loader_of(args, ctx, val_set, False)
    model = build(args, len(classes))
    if start.gives_weights:
        pos_rows = vars(args).get("released_pos_rows", False)
        note = checkpoints.load(model, start.content, True, pos_rows)
        ctx.print(f"{start.path}: {note}; pool_scale {model.cfg.pool_scale:g}")
    model = model.to(ctx.device)
    ctx.print(f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters, "
              f"{len(classes)} classes, {len(train_set):,} training and {len(val_set):,} "
              "validation images")

    def evaluate(model, epoch):
        metrics = runs.evaluate_classifier(model, val_loader, ctx, args.amp)
        if args.data:
            metrics["unreadable"] = runs.count_bad(ctx, train_set, val_set)
        return metrics

    optimizer = optimizer_of(model, args, training.peak_lr(args, ctx))
    lr = runs.warmup_and_cosine(args, ctx, loader, lr_start, lr_end)
    built = {"name": args.model, "fields": runs.model_fields(args) | {"num_classes": len(classes)}}
    return training.fit(
        args, ctx, model, loader, classification_loss(args, len(classes)), optimizer, lr,
        evaluate=evaluate, metric="top1",
        about={"built": built, "classes": classes},
        shard_blocks=model.layers if vars(args).get("shard") else ())


def classification_loss(args: runs.Options, num_classes: int) -> Callable:
    """loss(model, (images, labels)): cross-entropy with --mixup, --cutmix and --smoothing."""
    mixup = None
    if args.mixup or args.cutmix:       # labels are smoothed below
        mixup = data.extra("timm.data").Mixup(args.mixup, args.cutmix, label_smoothing=0.0,
                                              num_classes=num_classes)

    def loss(model, batch):
        images, labels = mixup(*batch) if mixup else batch  # labels (b classes) or (b)
        return F.cross_entropy(model(images), labels, label_smoothing=args.smoothing)

    return loss


# ---- Evaluation and prediction -------------------------------------------------------------------

def view_of(args: runs.Options, saved: runs.Saved) -> Callable:
    """PIL image -> what a model of that checkpoint was evaluated on."""
    if runs.trained_on_built_in(saved):
        return data.digit_transform(args.img_size)
    return data.image_transform(args.img_size, False, crop_pct=args.crop_pct or CROP_PCT)


def evaluate(args: runs.Options, ctx: training.Context, saved: runs.Saved) -> None:
    model = restore(args, ctx, saved)
    runs.require_data(args, saved)
    dataset = open_images(args, False, saved.classes)
    image = torch.zeros(1, 3, args.img_size, args.img_size, device=ctx.device)
    outputs = model(image).shape[1]
    if outputs != len(dataset.classes):
        raise ValueError(f"the checkpoint tells {outputs} classes apart, {args.data} holds "
                         f"{len(dataset.classes)}")
    if args.data and saved.classes is None:
        order, note = data.class_order(args.data, dataset.classes, outputs)
        if note:
            ctx.print(note)
        if order != dataset.classes:
            dataset = open_images(args, False, order)
    loader = runs.loader_of(args, ctx, dataset, False)
    result = runs.evaluate_classifier(model, loader, ctx, args.amp)
    ctx.print(f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss "
              f"{result['loss']:.4f} on {result['images']:,.0f} images of {len(dataset):,}")


def predict(args: runs.Options, ctx: training.Context, saved: runs.Saved) -> None:
    """Prints the likeliest classes of each image."""
    if not ctx.is_main:
        return
    model = restore(args, ctx, saved)
    transform = view_of(args, saved)
    for path, image in data.each_readable(args.predict, data.load_rgb):
        with torch.inference_mode():
            p = model(transform(image)[None].to(ctx.device))[0].softmax(0)  # (classes)
        runs.print_likeliest(path, p, saved.classes or names_of(len(p)))


def names_of(count: int) -> list[str]:
    """Names for the classes of released weights: ImageNet's, or numbers."""
    if count != 1000:
        return [str(i) for i in range(count)]
    info = data.extra("timm.data").ImageNetInfo()
    return [info.index_to_description(i) for i in range(count)]
