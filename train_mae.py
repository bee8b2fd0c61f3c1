"""
Masked autoencoding, section 4.3 of the paper: FastMaskVim learns to paint the three quarters of an image that it is not
shown; then a classifier is fine-tuned from its encoder, or a linear one trained on the frozen encoder.

    python train_mae.py pretrain                                without --data: handwritten digits, minutes on a CPU
    python train_mae.py finetune                                from the last pretraining; --scratch: from none
    python train_mae.py linear

    torchrun ... train_mae.py pretrain --size b --data IMAGENET_DIR --batch-size 64 --accum 8             8 GPUs: 4096
    torchrun ... train_mae.py finetune --data IMAGENET_DIR --init runs/mae/last.pt --batch-size 128       8 GPUs: 1024
    torchrun ... train_mae.py finetune --data IMAGENET_DIR --init runs/mae_h/last.pt --img-size 448 --crop-pct 1
    python train_mae.py pretrain --reconstruct cat.jpg dog.png --init runs/mae/last.pt
    python train_imagenet.py --data IMAGENET_DIR --eval runs/mae_finetune/best.pt                also --predict IMAGE

Every stage takes what it needs to know of the model from the checkpoint it starts from (--init); released checkpoints
do not say, so name --size, or --model vim_base, and --pool-scale 0.25 of a FastVim that is already fine-tuned.

What the paper reports (ImageNet-1k top-1):

    fine-tuned    FastMaskVim-B 83.0, L 84.9, H 86.1, H at 448 px 86.7; Vim-B 83.3, L 85.1 (pretrain --model vim_base)
                  B after epoch 10, 50, 100: 74.3, 81.0, 83.0
    linear        FastMaskVim-L 60.2; Vim-L 45.6; FastMaskVim-L without the scale factor 0.02 (linear --pool-scale 1)
    pretraining   B's loss near epoch 50, 100, 400, 1600: 0.454, 0.444, 0.438, 0.422
    ablations     L 84.6 without the scale factor (finetune --pool-scale 1), 83.9 with a decay of the learning rate at
                  every block (finetune --decay-blocks 1); B 82.8 with means over the kept tokens (pretrain
                  --mask-divisor count)
"""
import argparse
import math
import pathlib

import torch
from PIL import Image, ImageDraw

import data
import fastvim
import train_imagenet
import training

# Tables 9 to 11. The learning rate is that of the whole effective batch (MAE's base rate x batch / 256).
PRETRAIN = dict(recipe_lr=1.5e-4 * 4096 / 256, recipe_batch=4096, epochs=1600.0, warmup=40.0, weight_decay=0.05,
                eval_every=20, drop_path=0.0, auto_augment="none", reprob=0.0, crop_scale=0.2)
MASKING = dict(mask_ratio=0.75, mask_divisor="axis", decoder_depth=2, decoder_dim=512, released_masking=False,
               pixel_loss=False)
FINETUNE = dict(recipe_lr=5e-4 * 1024 / 256, recipe_batch=1024, epochs=100.0, warmup=5.0, weight_decay=0.05,
                layer_decay=0.65, drop_path=0.3, auto_augment="rand-m9-mstd0.5-inc1", reprob=0.25, crop_scale=0.08,
                mixup=0.8, cutmix=1.0, smoothing=0.1)
FINETUNE_LARGE = dict(recipe_lr=1e-3 * 1024 / 256, epochs=50.0, layer_decay=0.75)           # L and H
FINETUNE_448 = dict(clip=3.0, crop_pct=1.0)
LINEAR = dict(recipe_lr=0.1 * 4096 / 256, recipe_batch=4096, epochs=90.0, warmup=10.0, weight_decay=0.0, drop_path=0.0,
              auto_augment="none", reprob=0.0, crop_scale=0.08, mixup=0.0, cutmix=0.0, smoothing=0.0)
FINETUNE_END = 1e-5                                                         # of its cosine; the others end at 0

# The same on the digits, scaled to 1,437 training images of 8 x 8 pixels and two CPU cores.
DIGITS_MODEL = dict(img_size=32, patch_size=4, decoder_dim=128)
DIGITS = dict(
    pretrain=dict(recipe_lr=1e-3, recipe_batch=64, batch_size=64, epochs=20.0, warmup=2.0, eval_every=5,
                  out="runs/digits_mae"),
    finetune=dict(recipe_lr=1e-3, recipe_batch=32, batch_size=32, epochs=2.0, warmup=0.5, drop_path=0.0, mixup=0.0,
                  cutmix=0.0, layer_decay=0.9, out="runs/digits_finetune"),
    linear=dict(recipe_lr=0.1 * 64 / 256, recipe_batch=64, batch_size=64, epochs=10.0, warmup=1.0,
                out="runs/digits_linear"))


def get_args(argv=None):
    """The command line, completed by what the checkpoint says that it starts from -> args, the parser of its stage, and
    train_imagenet.starting_point. Raises FileNotFoundError or ValueError if there is no such checkpoint."""
    top = argparse.ArgumentParser(description="Masked autoencoding. Without --data: on the handwritten digits that "
                                  "come with scikit-learn, by recipes scaled to them.")
    stages, parsers = top.add_subparsers(dest="stage", required=True, metavar="STAGE"), {}
    for stage, recipe, text, more in (
            ("pretrain", PRETRAIN, "Learn to paint what is masked.", ""),
            ("finetune", FINETUNE, "Train a classifier that starts from the encoder.",
             " FastVim-L and -H: learning rate 0.004 x batch / 1024, 50 epochs, layer decay 0.75. From 448 px on: "
             "--clip 3 --crop-pct 1."),
            ("linear", LINEAR, "Train a linear classifier on the frozen encoder.", "")):
        parser = parsers[stage] = stages.add_parser(
            stage, help=text, usage="%(prog)s [options]",
            description=f"{text}{more} Without --data: on the digits, by a recipe scaled to them.")
        add = parser.add_argument_group("what to do").add_argument
        add("--data", metavar="DIR", help="ImageNet's layout: DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg (or .png)")
        add("--init", metavar="CKPT", help="start from this checkpoint, ours or a released one" + (
            "" if stage == "pretrain" else " (default: the last pretraining)"))
        if stage == "pretrain":
            add("--reconstruct", metavar="IMAGE", nargs="+", help="only paint these images by --init (default: "
                "OUT/last.pt), into OUT/reconstruct.png")
        else:
            add("--scratch", action="store_true", help="start from random weights instead")
        add = train_imagenet.add_model_arguments(parser)
        if stage == "pretrain":
            add("--mask-ratio", type=float, help="share of the patches that is removed (default 0.75)")
            add("--mask-divisor", choices=["axis", "count"], help="what divides a row's sum: its "
                "length, or how many tokens it kept (default axis)")
            add("--released-masking", action="store_true", help="mix rows backwards, as the released code does")
            add("--decoder-depth", type=train_imagenet.WHOLE, help="Vim blocks (default 2)")
            add("--decoder-dim", type=train_imagenet.WHOLE, help="their width (default 512)")
            add("--pixel-loss", action="store_true", help="paint the pixels themselves, not normalised by patch")
        else:
            add("--released-pos-rows", action="store_true", help="hand over Vim's position rows in the released code's "
                "order, which gives half of the patches a neighbour's")
        if stage == "finetune":
            add("--layer-decay", type=training.number(float, 0.01, 1.01), help="factor of the learning rate per step "
                "away from the head (default 0.65, L and H 0.75)")
            add("--decay-blocks", type=train_imagenet.WHOLE, default=2, help="a step every so many blocks (default 2)")
        add = train_imagenet.add_image_arguments(parser)
        if stage != "pretrain":
            train_imagenet.add_label_arguments(add)
        training.add_training_arguments(parser, lr=recipe["recipe_lr"], recipe_batch=recipe["recipe_batch"],
                                        out="runs/mae" + f"_{stage}" * (stage != "pretrain"))
        parser.set_defaults(**recipe, probe=stage == "linear")
    first, _ = top.parse_known_args(argv)
    parser, paints = parsers[first.stage], first.stage == "pretrain" and first.reconstruct
    if not (first.data or paints):
        parser.set_defaults(**DIGITS[first.stage])
    args = top.parse_args(argv)
    if args.stage != "pretrain":
        train_imagenet.check_pairs(args, parser)
    if paints and not args.init:
        out, digits = args.out, DIGITS["pretrain"]["out"]
        if out == parser.get_default("out") and not pathlib.Path(out, "last.pt").is_file():
            out = digits                                                    # where it is without --data
        args.init = f"{out}/last.pt"
    if args.stage != "pretrain" and args.scratch:
        if args.init:
            parser.error("--scratch starts from random weights, --init from a checkpoint: choose one")
    elif args.stage != "pretrain":
        args.init = args.init or ("runs/mae" if args.data else DIGITS["pretrain"]["out"]) + "/last.pt"
    if args.init and not pathlib.Path(args.init).is_file() and (paints or not training.checkpoint_to_resume(args)):
        raise FileNotFoundError(f"no checkpoint at {args.init}: run `python train_mae.py pretrain` first, or name one "
                                "with --init" + ", or --scratch for none" * (args.stage != "pretrain"))
    if args.model and args.model not in fastvim.list_models():
        raise ValueError(f"--model {args.model} is none of ours: {', '.join(fastvim.list_models())}")
    start = (fastvim.read_checkpoint(args.init), True) if paints else train_imagenet.starting_point(
        args, classifier=args.stage != "pretrain")
    if args.stage == "finetune" and args.data:                              # now the size is known
        if train_imagenet.model_name(args).endswith(("_large", "_huge")):
            parser.set_defaults(**FINETUNE_LARGE)
        if (args.img_size or 0) >= 448:
            parser.set_defaults(**FINETUNE_448)
    found, args = args, top.parse_args(argv)
    args.init, args.pool_scale, crop_pct = found.init, found.pool_scale, args.crop_pct or found.crop_pct
    masking = MASKING if args.stage == "pretrain" else {}
    train_imagenet.adopt(args, start[0], (*train_imagenet.MODEL_FLAGS, *masking))
    args.crop_pct = crop_pct
    for defaults in ({} if args.data or start[0] else DIGITS_MODEL, masking):
        vars(args).update({k: v for k, v in defaults.items() if vars(args).get(k, v) is None})
    return args, parser, start


# ----------------------------------------------------------------------------------------------------------------------
# Pretraining


def build_autoencoder(args):
    """The MaskedAutoencoder that args ask for."""
    return train_imagenet.build_model(
        args, 0, autoencoder=True, mask_ratio=args.mask_ratio, mask_divisor=args.mask_divisor,
        released_masking=args.released_masking, decoder_depth=args.decoder_depth, decoder_embed_dim=args.decoder_dim,
        norm_pix_loss=not args.pixel_loss)


def pretrain(args, ctx, start):
    train_set, val_set = train_imagenet.build_data(args, True), None
    if args.data is None or (pathlib.Path(args.data) / "val").is_dir():
        val_set = train_imagenet.build_data(args, False)
    loader = train_imagenet.loader_of(args, ctx, train_set, True)
    model = build_autoencoder(args)
    if start[1]:
        ctx.print(f"{args.init}: {fastvim.load_checkpoint(model, start[0])}")
    model = model.to(ctx.device)
    kept, val_loader = model.kept_patches(math.prod(model.grid_size)), None
    if val_set is not None:
        val_loader = train_imagenet.loader_of(args, ctx, val_set, False)
    ctx.print(f"autoencoder of {train_imagenet.model_name(args)}: {sum(p.numel() for p in model.parameters()):,} "
              f"parameters, {kept} of {math.prod(model.grid_size)} patches kept, {len(train_set):,} images")

    def evaluate(model, epoch):
        if val_set is None:
            return {}
        if ctx.is_main:
            shown = [item[0] for i in range(0, len(val_set), max(1, len(val_set) // 8)) if (item := val_set[i])][:8]
            paint(model, torch.stack(shown).to(ctx.device), f"{args.out}/reconstruction-{epoch:04}.png",
                  args.data is None)
        return masked_loss(model, val_loader, ctx, args.amp)

    optimizer = torch.optim.AdamW(training.parameter_groups(model, args.weight_decay, lambda name, param: False),
                                  lr=args.lr, betas=(0.9, 0.95))
    total, per_epoch = training.run_length(args, loader)
    training.fit(args, ctx, model, loader, lambda model, batch: model(batch[0]).loss, optimizer, evaluate=evaluate,
                 metric="loss", lower_is_better=True, harmless=("data", "init", "reconstruct", "grad_checkpointing"),
                 lr=lambda step: training.cosine(step, total, args.lr, warmup=round(args.warmup * per_epoch)))


def masked_loss(model, loader, ctx, amp=False):
    """-> {"loss": over all images, always under the same masks, "patch_mean": the loss of painting each patch evenly in
    its own mean, "images": how many}"""
    generator, sums = torch.Generator().manual_seed(ctx.rank), torch.zeros(3, dtype=torch.float64, device=ctx.device)
    for images, _ in filter(None, loader):
        images = images.to(ctx.device, non_blocking=True)
        target, mean, _ = model.target(images)                                               # (B L p*p*C) (B L 1)
        noise = torch.rand(target.shape[:2], generator=generator).to(ctx.device)
        with torch.autocast(ctx.device.type, torch.bfloat16, enabled=amp):
            loss, _, mask = model(images, noise)
        even = (target - (0 if model.norm_pix_loss else mean)).square().mean(-1)             # (B L)
        sums += len(images) * torch.stack([loss, (even * mask).sum() / mask.sum(), torch.ones_like(loss)]).double()
    loss, even, count = ctx.sum(sums).tolist()
    return {"loss": loss / count, "patch_mean": even / count, "images": count}


@torch.no_grad()
def paint(model, images, path, digits, required=False):
    """A PNG, a row for each of the normalised images (B 3 H W): the image, what the model sees of it, the removed
    patches painted evenly in their mean, and by the model. With norm_pix_loss it predicts neither a patch's mean nor
    its contrast: both are then the true ones, so that the third column is what to compare the fourth with."""
    h = images.shape[2] // model.cfg.patch_size
    patches, (target, mean, std) = model.patchify(images), model.target(images)              # (B L p*p*C)
    noise = torch.rand(target.shape[:2], generator=torch.Generator().manual_seed(0)).to(images.device)
    _, pred, mask = model(images, noise)
    pred, removed = pred.float() * std + mean if model.norm_pix_loss else pred.float(), mask[..., None] > 0
    columns = [("original", patches)] + [(name, torch.where(removed, v, patches)) for name, v in (
        ("visible", torch.zeros_like(mean)), ("patch means", mean), ("reconstruction", pred))]
    shift, scale = (data.DIGITS_MEAN, data.DIGITS_STD) if digits else (
        torch.tensor(v, device=images.device)[:, None, None] for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    pixels = torch.stack([model.unpatchify(v.expand_as(patches), h) for _, v in columns])    # (4 B 3 H W)
    pixels = ((pixels * scale + shift).clamp(0, 1) * 255).round().byte().cpu().numpy()
    zoom, gap, head = max(1, 128 // pixels.shape[-1]), 4, 16
    H, W = (zoom * n for n in pixels.shape[-2:])
    sheet = Image.new("RGB", (4 * (W + gap) - gap, head + len(images) * (H + gap)), "white")
    for i, (name, _) in enumerate(columns):
        ImageDraw.Draw(sheet).text((i * (W + gap), 2), name, fill="black")
        for j, image in enumerate(pixels[i].transpose(0, 2, 3, 1)):
            tile = Image.fromarray(image).resize((W, H), Image.Resampling.NEAREST)
            sheet.paste(tile, (i * (W + gap), head + j * (H + gap)))
    training.write_whole(pathlib.Path(path), lambda file: sheet.save(file, format="png"), required)


def reconstruct(args, ctx, content):
    """Paints the files of --reconstruct; returns the number of those that cannot be."""
    saved = train_imagenet.adopt(args, content)
    model = build_autoencoder(args).to(ctx.device).eval()
    ctx.print(f"{args.init}: {fastvim.load_checkpoint(model, content)}")
    digits, size, images, bad = saved and saved["data"] is None, args.img_size or train_imagenet.IMG_SIZE, [], 0
    transform = data.digit_transform(size) if digits else data.image_transform(
        size, False, crop_pct=args.crop_pct or train_imagenet.CROP_PCT)
    for file in args.reconstruct:
        try:
            image = data.load_rgb(file)
            if min(image.size) < model.cfg.patch_size and not digits:
                raise ValueError(f"{image.width} x {image.height} pixels are less than one patch of "
                                 f"{model.cfg.patch_size}")
            images.append(transform(image))
        except Exception as error:                                          # a damaged file can fail in any way
            print(f"{file}: cannot be read ({type(error).__name__}: {error})")
            bad += 1
    if images:
        out = pathlib.Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        paint(model, torch.stack(images).to(ctx.device), out / "reconstruct.png", digits, required=True)
        print(f"{out / 'reconstruct.png'}: {len(images)} images")
    return bad


# ----------------------------------------------------------------------------------------------------------------------
# Classification


def layer_scale(name, depth, decay, blocks=2):
    """A parameter's share of the learning rate: decay, once for every `blocks` blocks between it and the head. MAE's
    code has blocks=1; a Mamba has twice as many blocks as a ViT of its size (section 8, key detail 1)."""
    layer = depth + 1                                                       # head and final norm
    if name.startswith(("patch_embed.", "pos_embed", "cls_token")):
        layer = 0
    elif name.startswith("layers."):
        layer = int(name.split(".")[1]) + 1
    return decay ** math.ceil((depth + 1 - layer) / blocks)


def no_decay(name, param):
    return param.ndim <= 1 or name in ("pos_embed", "cls_token")


def classify(args, ctx, start):
    def optimizer_of(model, args):
        if args.stage == "linear":
            return torch.optim.SGD(training.parameter_groups(model, args.weight_decay), lr=args.lr, momentum=0.9)
        return torch.optim.AdamW(training.parameter_groups(
            model, args.weight_decay, no_decay,
            lambda name, param: layer_scale(name, model.cfg.depth, args.layer_decay, args.decay_blocks)), lr=args.lr)

    train_imagenet.train(args, ctx, start, optimizer_of, 0.0, FINETUNE_END if args.stage == "finetune" else 0.0,
                         args.released_pos_rows)


def main():
    with training.plain_errors("train_mae.py", None):
        args, parser, start = get_args()
    with training.plain_errors(parser.prog, args, data.BadDataError, OSError):
        only_paint = args.stage == "pretrain" and args.reconstruct
        ctx = training.setup(args, training=not only_paint)
        if only_paint:
            if reconstruct(args, ctx, start[0]):
                raise SystemExit(1)
        elif args.stage == "pretrain":
            pretrain(args, ctx, start)
        else:
            classify(args, ctx, start)
        ctx.close()


if __name__ == "__main__":
    main()
