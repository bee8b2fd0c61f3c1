"""
Classification: FastVim, Vim and baselines on ImageNet-1k, as in section 4.1 of the paper.

    python train_imagenet.py --size t                             without --data: handwritten digits, minutes on a CPU
    torchrun --nproc-per-node 8 train_imagenet.py --size s --data IMAGENET_DIR --batch-size 128
    python train_imagenet.py --size s --data DIR --init FastVim_small.ckpt --lr 1e-4        fine-tuning on other classes
    python train_imagenet.py --size s --data IMAGENET_DIR --eval FastVim_small.ckpt         released weights, or our own
    python train_imagenet.py --predict cat.jpg dog.png --eval runs/imagenet/best.pt

What the paper and its released logs report (top-1 of the EMA model, after epoch 10 / 50 / 100 / 200 / 300):

    FastVim-T  24.2  65.3  68.6  72.3  75.4     FastVim-S  37.6  72.8  75.5  79.1  81.1
    FastVim-B  48.2  72.8  76.3  80.8  82.6     Vim-B with LayerNorm  19.3  70.6  75.8  80.9  82.6

Its ablations, on FastVim-S (81.1), and the flags that repeat them:

    Pool_col only 80.0   --schedule pool_col          class token 81.3         --class-token
    Pool_row only 79.6   --schedule pool_row          RMS-RMS 80.7             --ssm-norm rmsnorm
    without conv1d 78.4  --no-conv                    LN-LN 80.9               --block-norm layernorm
    decompress after D 78.7  --skip-before-expand     ViT-S 80.1               --model deit_small_patch16_224
    ViT-S with pooling 73.9  also --vit-pool          and conv1d 74.0          also --vit-pool --vit-conv
    Vim-B without the post-SSM norm 81.2              --model vim_base --ssm-norm none
"""
import argparse

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat

import data
import fastvim
import training

# The recipe of the paper: 300 epochs of AdamW (0.9, 0.999) at an effective batch of 1024. Its text says lr 1e-3; the
# released configuration computes 2e-3 at that batch (--lr 2e-3).
RECIPE = dict(epochs=300.0, warmup=5.0, batch_size=128, weight_decay=0.05, ema=0.9999, mixup=0.8, cutmix=1.0,
              smoothing=0.1, auto_augment="rand-m9-mstd0.5-inc1", reprob=0.25, crop_scale=0.08)
LR, LR_BATCH, LR_WARMUP, LR_END = 1e-3, 1024, 1e-6, 1e-5
IMG_SIZE, CROP_PCT = 224, 0.875
DROP_PATH = dict(tiny=0.05, small=0.05, base=0.4, large=0.4, huge=0.4)     # T, S and B: paper; L and H: as B

# The same on the digits, scaled to 1,437 training images of 8 x 8 pixels and two CPU cores.
DIGITS = dict(epochs=5.0, warmup=1.0, batch_size=32, ema=0.98, mixup=0.0, cutmix=0.0, img_size=32, patch_size=8,
              drop_path=0.0, recipe_lr=1e-3, recipe_batch=32)

SIZES = {size[0]: size for size in fastvim.SIZES}


WHOLE, POSITIVE, SHARE = training.number(int, 1), training.number(float, 0), training.number(float, 0, 1)


def add_model_arguments(parser, others=""):
    """The options that make the model. others: models that are not ours, for the help."""
    parser.set_defaults(vit_pool=False, vit_conv=False, probe=False)
    add = parser.add_argument_group("model").add_argument
    add("--size", choices=SIZES, help="FastVim-T, S, B, L or H (default t)")
    add("--model", metavar="NAME", help="another one: vim_small, ... (python fastvim.py lists them)" + others)
    add("--img-size", type=WHOLE, help="pixels (default 224)")
    add("--patch-size", type=WHOLE, help="pixels (default: the size's own, 16 or 14)")
    add("--depth", type=WHOLE, help="blocks (default: the size's own)")
    add("--drop-path", type=SHARE, help="stochastic depth at the last block (default: the recipe's)")
    add("--grad-checkpointing", action="store_true", help="keep only the blocks' inputs for the backward pass and "
        "compute the rest again: less memory, more time, the same result")
    add = parser.add_argument_group("the paper's ablations").add_argument
    add("--schedule", choices=["fastvim", "pool_col", "pool_row", "vim"], help="which axis is pooled in which layer")
    add("--pool", choices=fastvim.POOLS, help="how a row becomes one token (default mean)")
    add("--pool-scale", type=float, help="factor of mean pooling (default 1; 0.25 after masked pretraining)")
    add("--class-token", action=argparse.BooleanOptionalAction, help="read out a class token instead of the mean")
    add("--block-norm", choices=fastvim.NORMS, help="norm before the mixer (default rmsnorm)")
    add("--ssm-norm", choices=[*fastvim.NORMS, "none"], help="norm after the scan (default layernorm)")
    add("--no-conv", action="store_true", help="leave out the convolution")
    add("--skip-before-expand", action="store_true", help="decompress after the D skip instead of before it")
    return add


def add_image_arguments(parser):
    """The options of build_data, but --data."""
    add = parser.add_argument_group("augmentation and schedule").add_argument
    add("--warmup", type=POSITIVE, help="epochs of linear warmup")
    add("--auto-augment", metavar="POLICY", help="timm's policy string, or none")
    add("--reprob", type=SHARE, help="probability of random erasing")
    add("--crop-scale", type=training.number(float, 0.01, 1.01), help="smallest share of an image that a crop keeps")
    add("--crop-pct", type=training.number(float, 0.1), help="evaluation: center crop's share of the resized image "
        f"(default {CROP_PCT})")
    return add


def add_label_arguments(add):
    add("--mixup", type=POSITIVE, help="alpha of mixup, 0 for none")
    add("--cutmix", type=POSITIVE, help="alpha of cutmix, 0 for none")
    add("--smoothing", type=SHARE, help="label smoothing")


def get_args(argv=None):
    """The command line -> (args, parser). The recipe is that of ImageNet, or of the digits without --data."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description="Train, evaluate or use an image "
                                     "classifier. Without --data: on the handwritten digits that come with "
                                     "scikit-learn, by a recipe scaled to them.")
    add = parser.add_argument_group("what to do").add_argument
    add("--data", metavar="DIR", help="ImageNet's layout: DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg (or .png)")
    add("--init", metavar="CKPT", help="start from the encoder of this checkpoint of our models or the released "
        "ones, with a fresh head")
    add("--eval", metavar="CKPT", help="only evaluate this checkpoint, ours or a released one")
    add("--predict", metavar="IMAGE", nargs="+", help="print the five likeliest classes of each image, by --eval CKPT "
        "(default: OUT/best.pt)")
    add = add_model_arguments(parser, ", or any of timm's")
    add("--vit-pool", action="store_true", help="alternate pooling in a ViT of timm")
    add("--vit-conv", action="store_true", help="a convolution before its attention, too")
    add_label_arguments(add_image_arguments(parser))
    training.add_training_arguments(parser, lr=LR, recipe_batch=LR_BATCH, out="runs/imagenet")
    parser.set_defaults(**RECIPE)
    first = parser.parse_known_args(argv)[0]
    if not (first.data or first.eval or first.predict):
        parser.set_defaults(**DIGITS, out="runs/digits")
        if first.init:                                                      # which says its sizes itself
            parser.set_defaults(img_size=None, patch_size=None)
    args = parser.parse_args(argv)
    if args.vit_conv and not args.vit_pool:
        parser.error("--vit-conv goes with --vit-pool")
    if not (args.eval or args.predict):
        check_pairs(args, parser)
    return args, parser


def check_pairs(args, parser):
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        parser.error(f"--batch-size {args.batch_size}: mixup and cutmix pair images, so it has to be even")


def build_model(args, num_classes, **more):
    """The model that args ask for; more: options for create_model. ValueError for an unknown name or an option that the
    model does not have."""
    name = model_name(args)
    options = dict(img_size=args.img_size or IMG_SIZE, patch_size=args.patch_size, depth=args.depth)
    ours = dict(schedule=args.schedule, pool=args.pool, pool_scale=args.pool_scale, class_token=args.class_token,
                block_norm=args.block_norm, ssm_norm=args.ssm_norm, d_conv=0 if args.no_conv else None,
                skip_before_expand=args.skip_before_expand or None)
    given = {k: v for k, v in {**options, **ours}.items() if v is not None}
    if name in fastvim.list_models():
        if args.vit_pool or args.vit_conv:
            raise ValueError("--vit-pool and --vit-conv are for the ViTs of timm: name one with --model")
        if given.get("ssm_norm") == "none":
            given["ssm_norm"] = None
        rate = DROP_PATH[name.rpartition("_")[2]] if args.drop_path is None else args.drop_path
        model = fastvim.create_model(name, num_classes=num_classes, drop_path_rate=rate, **given, **more)
        model.grad_checkpointing = args.grad_checkpointing
        return linear_probe(model, num_classes) if args.probe else model
    timm = data.extra("timm")
    if not timm.is_model(name):
        raise ValueError(f"--model {name}: neither a model of timm nor one of ours: a family, "
                         f"{', '.join(fastvim.FAMILIES)}, and a size, {', '.join(fastvim.SIZES)}, such as fastvim_tiny")
    if wrong := [k for k, v in ours.items() if v is not None]:
        raise ValueError(f"--model {name} is timm's and does not know {', '.join(wrong)}")
    try:
        model = timm.create_model(name, num_classes=num_classes, drop_path_rate=args.drop_path or 0.0,
                                  **{k: v for k, v in options.items() if v is not None})
    except TypeError:                                                       # a convolutional net takes any size
        model = timm.create_model(name, num_classes=num_classes, drop_path_rate=args.drop_path or 0.0)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    if args.vit_pool:
        if not all(hasattr(getattr(block, "attn", None), "qkv") for block in getattr(model, "blocks", [None])):
            raise ValueError(f"--vit-pool: {name} is no ViT of timm")
        for i, block in enumerate(model.blocks):
            block.attn = PooledAttention(block.attn, model.num_prefix_tokens, model.patch_embed.grid_size, i % 2,
                                         args.vit_conv)
    return model


def linear_probe(model, num_classes):
    """A frozen model under a classifier that learns (Table 11): normalised features, without learnt scale or shift."""
    model.requires_grad_(False)
    linear = nn.Linear(model.cfg.embed_dim, num_classes)
    nn.init.trunc_normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    model.head = nn.Sequential(nn.BatchNorm1d(model.cfg.embed_dim, affine=False, eps=1e-6), linear)
    return model


class PooledAttention(nn.Module):
    """Table 7: attention between the means of a ViT's rows (even blocks) or columns (odd blocks), repeated afterwards.

    Queries, keys and values are pooled alike; class tokens stay as they are. The paper does not say where its
    convolution goes: here, like Mamba's, a causal one of width 4 and SiLU on queries, keys and values."""

    def __init__(self, attn, prefix, grid_size, odd, conv):
        super().__init__()
        self.attn, self.prefix, self.grid_size, self.odd = attn, prefix, grid_size, odd
        channels = attn.qkv.out_features
        self.conv = nn.Conv1d(channels, channels, 4, padding=3, groups=channels) if conv else None

    def forward(self, x, *args, **kwargs):                                  # (B N C)
        h, w = self.grid_size
        qkv = self.attn.qkv(x)                                              # (B N 3C)
        if self.conv is not None:
            qkv = F.silu(self.conv(qkv.mT)[..., :qkv.shape[1]]).mT
        first, grid = qkv[:, :self.prefix], qkv[:, self.prefix:]
        pooled = rearrange(grid, "b (h w) c -> b h w c", h=h).mean(1 if self.odd else 2)
        q, k, v = rearrange(torch.cat([first, pooled], 1), "b n (three heads c) -> three b heads n c", three=3,
                            heads=self.attn.num_heads)
        y = rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n c -> b n (heads c)")
        first, pooled = y[:, :self.prefix], y[:, self.prefix:]
        grid = repeat(pooled, "b w c -> b (h w) c", h=h) if self.odd else repeat(pooled, "b h c -> b (h w) c", w=w)
        return self.attn.proj(torch.cat([first, grid], 1))


MODEL_FLAGS = ("size", "model", "img_size", "patch_size", "depth", "schedule", "pool", "pool_scale", "class_token",
               "block_norm", "ssm_norm", "no_conv", "skip_before_expand", "vit_pool", "vit_conv", "crop_pct")


def adopt(args, content, flags=MODEL_FLAGS):
    """Fills in what the command line leaves open of `flags` with what a checkpoint of ours says. -> its args or {}"""
    saved = content.get("args")
    if not isinstance(saved, dict) or not {"size", "model", "data"} <= saved.keys():
        return {}
    given = vars(args)
    if given["size"] and not given["model"]:                                # one of the two names the model
        flags = [flag for flag in flags if flag != "model"]
    given.update({flag: saved[flag] for flag in flags if flag in saved and (
        given[flag] is None or given[flag] is False and flag != "class_token")})             # which has a --no- form
    return saved


def restore(args, ctx, path):
    """-> (model with the weights at path, its class names or None, whether it was trained on the digits).

    Our checkpoints say which model they hold: args gets what the command line leaves open. Released ones do not."""
    content = fastvim.read_checkpoint(path)
    saved = adopt(args, content)
    args.probe = bool(saved.get("probe"))
    classes, head = saved.get("classes"), fastvim.model_weights(content)[0].get("head.weight")
    if classes is None and head is None:
        raise ValueError(f"{path} says neither its classes nor holds a head.weight to count them")
    model = build_model(args, len(head) if classes is None else len(classes)).to(ctx.device).eval()
    ctx.print(f"{path}: {fastvim.load_checkpoint(model, content)} into {model_name(args)}"
              f"{'' if args.pool_scale is None else f', pool_scale {args.pool_scale:g}'}")
    return model, classes, classes is not None and saved["data"] is None


def model_name(args):
    return args.model or f"fastvim_{SIZES[args.size or 't']}"


def build_data(args, train, classes=None):
    """The training or the validation set. classes: names that the folders must have."""
    size = args.img_size or IMG_SIZE
    if args.data is None:
        return data.Digits(train, size)
    policy = None if args.auto_augment == "none" else args.auto_augment
    try:
        transform = data.image_transform(size, train, auto_augment=policy if train else None, reprob=args.reprob,
                                         scale=(args.crop_scale, 1.0), crop_pct=args.crop_pct or CROP_PCT)
    except (AssertionError, KeyError, NotImplementedError) as error:
        raise ValueError(f"--auto-augment {policy}: timm does not know it; the paper's is {RECIPE['auto_augment']}"
                         ) from error
    return data.ImageFolder(args.data, "train" if train else "val", transform, classes)


def loader_of(args, ctx, dataset, train):
    workers = args.workers if args.data else 0                              # the digits lie in memory
    return data.make_loader(dataset, args.batch_size, train=train, seed=args.seed, workers=workers, rank=ctx.rank,
                            world_size=ctx.world_size)


def unmask(args, saved):
    """args.pool_scale for a model that sees whole images by weights that saw masked ones in a run with args `saved`: a
    row's sum then had 1 - mask_ratio of its tokens and was divided by all (section 8, key detail 2)."""
    family = fastvim.FAMILIES.get(model_name(args).rpartition("_")[0], {})
    pooled = fastvim.SCHEDULES[args.schedule or family.get("schedule", "vim")][0][1]
    if pooled and args.pool in (None, "mean") and saved.get("mask_divisor") != "count":
        args.pool_scale = (args.pool_scale or 1) * (1 - saved.get("mask_ratio", 0.75))


def read_start(args, path):
    """-> the content of the checkpoint at path, {} without one; or, if the run goes on, of its own, which says as well
    what the model is; and the path of its own, or None."""
    resumed = training.checkpoint_to_resume(args) if path else None
    try:
        return fastvim.read_checkpoint(resumed or path) if path else {}, resumed
    except ValueError as error:
        raise ValueError(f"{error}. Try --resume {args.out}/best.pt" if resumed else error) from error


def starting_point(args, classifier=True):
    """What --init names, or, if the run goes on, its own checkpoint: {} or the content of a file, which says what the
    command line leaves open of the model; and whether its weights are to be taken."""
    given = args.pool_scale, args.crop_pct
    content, resumed = read_start(args, args.init)
    saved = adopt(args, content)
    if not resumed and args.img_size != saved.get("img_size"):
        args.crop_pct = given[1]                                            # that of the other size
    if args.init and model_name(args) not in fastvim.list_models():
        raise ValueError(f"--init is for our models, {', '.join(fastvim.list_models())}: {model_name(args)} is none")
    masked = content and "mask_token" in fastvim.model_weights(content)[0]
    if classifier and masked and given[0] is None and not resumed:
        unmask(args, saved)
    return content, bool(args.init and not resumed)


def adamw(model, args):
    return torch.optim.AdamW(training.parameter_groups(model, args.weight_decay), lr=args.lr)


def train(args, ctx, start, optimizer_of=adamw, lr_start=LR_WARMUP, lr_end=LR_END, released_pos_rows=False):
    """One run. start: of starting_point; optimizer_of(model, args): what updates the model."""
    train_set = build_data(args, True)
    args.classes = train_set.classes                                        # kept in the checkpoint, for --predict
    val_set = build_data(args, False, train_set.classes)
    loader, val_loader = loader_of(args, ctx, train_set, True), loader_of(args, ctx, val_set, False)
    model = build_model(args, len(train_set.classes))
    if start[1]:
        ctx.print(f"{args.init}: {fastvim.load_checkpoint(model, start[0], True, released_pos_rows)}; pool_scale "
                  f"{model.cfg.pool_scale:g}")
    model = model.to(ctx.device)
    ctx.print(f"{model_name(args)}: {sum(p.numel() for p in model.parameters()):,} parameters, "
              f"{len(train_set.classes)} classes, {len(train_set):,} training and {len(val_set):,} validation images")
    mixup = None
    if args.mixup or args.cutmix:
        mixup = data.extra("timm.data").Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing,
                                              num_classes=len(train_set.classes))

    def loss_fn(model, batch):
        images, labels = batch
        if mixup:
            images, labels = mixup(images, labels)                          # labels (B classes), smoothed
            return F.cross_entropy(model(images), labels)
        return F.cross_entropy(model(images), labels, label_smoothing=args.smoothing)

    def evaluate(model, epoch):
        metrics = training.evaluate_classifier(model, val_loader, ctx, args.amp)
        if args.data:
            metrics["unreadable"] = training.count_bad(ctx, train_set, val_set)
        return metrics

    total, per_epoch = training.run_length(args, loader)
    training.fit(args, ctx, model, loader, loss_fn, optimizer_of(model, args), metric="top1", evaluate=evaluate,
                 harmless=("data", "eval", "predict", "init", "grad_checkpointing"), lr=lambda step: training.cosine(
                     step, total, args.lr, warmup=round(args.warmup * per_epoch), start=lr_start, end=lr_end))


def evaluate(args, ctx):
    model, classes, digits = restore(args, ctx, args.eval)
    if not digits and args.data is None:
        raise ValueError("--eval: this model classifies images, so --data DIR has to say where they are")
    dataset = build_data(args, False, classes)
    outputs = model(torch.zeros(1, 3, *2 * [args.img_size or IMG_SIZE], device=ctx.device)).shape[1]
    if outputs != len(dataset.classes):
        raise ValueError(f"the checkpoint tells {outputs} classes apart, {args.data} holds {len(dataset.classes)}")
    result = training.evaluate_classifier(model, loader_of(args, ctx, dataset, False), ctx, args.amp)
    ctx.print(f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss {result['loss']:.4f} on "
              f"{result['images']:,.0f} images of {len(dataset):,}")


def predict(args, ctx):
    """Prints the likeliest classes of each image."""
    model, classes, digits = restore(args, ctx, args.eval or f"{args.out}/best.pt")
    size = args.img_size or IMG_SIZE
    transform = data.digit_transform(size) if digits else data.image_transform(
        size, False, crop_pct=args.crop_pct or CROP_PCT)
    for path, image in data.each_readable(args.predict, data.load_rgb):
        with torch.inference_mode():
            p = model(transform(image)[None].to(ctx.device))[0].softmax(0)  # (classes)
        if classes is None:                                                 # released weights: ImageNet's order
            info = data.extra("timm.data").ImageNetInfo()
            classes = [info.index_to_description(i) if len(p) == 1000 else str(i) for i in range(len(p))]
        print_likeliest(path, p, classes)


def print_likeliest(path, p, classes):
    """p (classes): prints the five greatest with their names."""
    p, top = p.topk(min(5, len(p)))
    print(path, *(f"  {100 * q:5.1f} %  {classes[i]}" for q, i in zip(p.tolist(), top.tolist())), sep="\n")


def main():
    args, parser = get_args()
    with training.plain_errors(parser.prog, args, data.BadDataError):
        ctx = training.setup(args, training=not (args.eval or args.predict))
        if args.predict:
            if ctx.is_main:
                predict(args, ctx)
        elif args.eval:
            evaluate(args, ctx)
        else:
            if args.data is None:
                ctx.print("no --data: training on the built-in handwritten digits, by a recipe scaled to them")
            train(args, ctx, starting_point(args))
        ctx.close()


if __name__ == "__main__":
    main()
