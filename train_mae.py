"""
Masked autoencoding, section 4.3 of the paper: FastMaskVim learns to paint the three quarters of an
image that it is not shown; then a classifier is fine-tuned from its encoder, or a linear one
trained on the frozen encoder.

    python train_mae.py pretrain         without --data: handwritten digits, minutes on a CPU
    python train_mae.py finetune         from the last pretraining; --scratch: from none
    python train_mae.py linear

    torchrun ... train_mae.py pretrain --size b --data DIR --batch-size 64 --accum 8   8 GPUs: 4096
    torchrun ... train_mae.py finetune --data DIR --init runs/mae/last.pt              8 GPUs: 1024
    torchrun ... train_mae.py finetune --data DIR --init runs/mae_h/last.pt --img-size 448
    torchrun ... train_mae.py linear --data DIR --batch-size 512                       8 GPUs: 4096
    python train_mae.py pretrain --reconstruct cat.jpg dog.png --init runs/mae/last.pt
    python train_imagenet.py --data DIR --eval runs/mae_finetune/best.pt        also --predict IMAGE

Every stage takes what it needs to know of the model from the checkpoint it starts from (--init);
released checkpoints do not say, so name --size, or --model vim_base, and --pool-scale 0.25 of a
FastVim that is already fine-tuned.

What the paper reports (ImageNet-1k top-1):

    fine-tuned    FastMaskVim-B 83.0 (epoch 10, 50: 74.3, 81.0), L 84.9, H 86.1, H at 448 px 86.7;
                  pretrain --model vim_base 83.3, vim_large 85.1
    linear        FastMaskVim-L 60.2, without the scale factor 0.02 (--pool-scale 1); Vim-L 45.6
    pretraining   B's loss near epoch 50, 100, 400, 1600: 0.454, 0.444, 0.438, 0.422
    ablations     L 84.6 without the scale factor (finetune --pool-scale 1), 83.9 with a decay of
                  the learning rate at every block (finetune --decay-blocks 1); B 82.8 with means
                  over the kept tokens (pretrain --mask-divisor count)
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torchvision.utils import save_image

import checkpoints
import classification
import data
import fastvim
import runs
import training

# Tables 9 to 11. A learning rate is that of the whole batch: MAE's base rate x batch / 256.
COMMON = dict(runs.TRAINING, model="fastvim_tiny", img_size=classification.IMG_SIZE,
              drop_path_rate=0.0, auto_augment="none", reprob=0.0)
PRETRAIN = dict(COMMON, recipe_lr=1.5e-4 * 4096 / 256, recipe_batch=4096, epochs=1600.0,
                warmup=40.0, weight_decay=0.05, eval_every=20, crop_scale=0.2, out="runs/mae")
MASKING = dict(mask_ratio=0.75, mask_divisor="axis", decoder_depth=2, decoder_dim=512)
FINETUNE = dict(COMMON, **classification.AUGMENTATION, recipe_lr=5e-4 * 1024 / 256,
                recipe_batch=1024, epochs=100.0, warmup=5.0, weight_decay=0.05, layer_decay=0.65,
                decay_blocks=2, drop_path_rate=0.3, init="runs/mae/last.pt",
                out="runs/mae_finetune")
FINETUNE_LARGE = dict(recipe_lr=1e-3 * 1024 / 256, epochs=50.0, layer_decay=0.75)  # L and H
FINETUNE_448 = dict(clip=3.0, crop_pct=1.0)
FINETUNE_END = 1e-5  # of its cosine; the others end at 0
LINEAR = dict(COMMON, recipe_lr=0.1 * 4096 / 256, recipe_batch=4096, epochs=90.0, warmup=10.0,
              crop_scale=0.08, mixup=0.0, cutmix=0.0, smoothing=0.0, init="runs/mae/last.pt",
              out="runs/mae_linear")
RECIPES = dict(pretrain=PRETRAIN | MASKING, finetune=FINETUNE, linear=LINEAR)

# The same on the digits, scaled to 1,437 training images of 8 x 8 pixels and two CPU cores.
DIGITS_MODEL = dict(img_size=32, patch_size=4, decoder_dim=128)
DIGITS = dict(
    pretrain=dict(recipe_lr=1e-3, recipe_batch=64, batch_size=64, epochs=20.0, warmup=2.0,
                  eval_every=5, workers=0, out="runs/digits_mae"),
    finetune=dict(recipe_lr=1e-3, recipe_batch=32, batch_size=32, epochs=2.0, warmup=0.5,
                  drop_path_rate=0.0, mixup=0.0, cutmix=0.0, layer_decay=0.9, workers=0,
                  init="runs/digits_mae/last.pt", out="runs/digits_finetune"),
    linear=dict(recipe_lr=0.1 * 64 / 256, recipe_batch=64, batch_size=64, epochs=10.0, warmup=1.0,
                workers=0, init="runs/digits_mae/last.pt", out="runs/digits_linear"))

# ---- Options -------------------------------------------------------------------------------------

TEXTS = dict(
    pretrain="Learn to paint what is masked.",
    finetune="Train a classifier that starts from the encoder. FastVim-L and -H: learning rate "
    "0.004 x batch / 1024, 50 epochs, layer decay 0.75. From 448 px on: --clip 3 --crop-pct 1.",
    linear="Train a linear classifier on the frozen encoder.")


def make_parsers() -> tuple[runs.Parser, dict[str, runs.Parser]]:
    """-> the parser of the command line, and that of each stage."""
    top = runs.Parser(description="Masked autoencoding. Without --data: on the handwritten digits "
                      "that come with scikit-learn, by recipes scaled to them.")
    stages = top.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for stage, text in TEXTS.items():
        parser = stages.add_parser(stage, help=text.partition(".")[0], description=text,
                                   usage="%(prog)s [options]")
        classification.add_arguments(parser, RECIPES[stage])
        group = parser.groups["data and weights"]
        start = group.add_mutually_exclusive_group().add_argument
        start("--init", metavar="CKPT", help="start from these weights, ours or released ones "
              "(default: the last pretraining; pretrain: none)")
        add = parser.groups["model"].add_argument
        if stage == "pretrain":
            add("--mask-ratio", type=float, help="share of the patches that is removed")
            add("--mask-divisor", choices=["axis", "count"],
                help="what divides a row's sum: its length, or how many tokens it kept")
            add("--decoder-depth", type=runs.WHOLE, help="Vim blocks")
            add("--decoder-dim", type=runs.WHOLE, help="their width")
            parser.groups["instead of training"].add_argument(
                "--reconstruct", metavar="IMAGE", nargs="+", help="paint these images by --init "
                "(default: OUT/last.pt), into OUT/reconstruct.png")
        else:
            start("--scratch", dest="init", action="store_const", const=None,
                  help="start from random weights (default: as --init says)")
            add("--released-pos-rows", action="store_true", help="hand over Vim's position rows in "
                "the released code's order, which gives half of the patches a neighbour's")
        if stage == "finetune":
            add = parser.groups["recipe"].add_argument
            add("--layer-decay", type=runs.number(float, 0.01, 1.01), help="factor of the learning "
                "rate per step away from the head (default 0.65, L and H 0.75)")
            add("--decay-blocks", type=runs.WHOLE, help="a step every so many blocks")
        runs.add_training_arguments(parser, RECIPES[stage])
    return top, stages.choices


def get_args(argv: list[str] | None = None) -> tuple[runs.Options, runs.Saved]:
    """The command line -> the options, and the checkpoint that the stage starts from.

    FileNotFoundError, ValueError: there is none, or a model that is not ours."""
    top, parsers = make_parsers()
    typed = vars(top.parse_args(argv))
    stage = typed["stage"]
    recipe = {**runs.defaults(parsers[stage]), **RECIPES[stage]}
    toy = {} if typed.keys() & {"data", "reconstruct"} else DIGITS[stage]
    chosen = {**recipe, **toy, **typed}
    classification.check_pairs(chosen, parsers[stage])
    start = find_start(chosen)
    if toy and not start.content:
        toy = {**toy, **DIGITS_MODEL}
    known = classification.crop_of(start, typed)
    if stage == "pretrain":
        known |= start.model_options()
        known |= {name: start.options[name] for name in MASKING if name in start.options}
    else:
        known |= runs.encoder_options(start, typed)
    found = {**recipe, **toy, **known, **typed}
    if not classification.is_ours(found["model"]):
        raise ValueError(f"--model {found['model']} is none of ours: "
                         f"{', '.join(fastvim.list_models())}")
    if stage == "finetune" and found["model"].endswith(("_large", "_huge")):
        recipe |= FINETUNE_LARGE
    if stage == "finetune" and found["img_size"] >= 448:
        recipe |= FINETUNE_448
    return runs.Options({**recipe, **toy, **known, **typed}), start


def find_start(options: dict) -> runs.Saved:
    """What the stage starts from: its own run, --init, or nothing."""
    path = options["init"]
    try:
        if not options.get("reconstruct"):
            return runs.starting_point(options, path)
        own = runs.last_run(options["out"], RECIPES["pretrain"], DIGITS["pretrain"], "last.pt")
        return runs.read(path or own)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}: run `python train_mae.py pretrain` first, or name one "
                                "with --init; to fine-tune from none, --scratch") from error


# ---- The model -----------------------------------------------------------------------------------

class MAEOutput(NamedTuple):
    loss: Tensor  # scalar float32, mean square error per pixel of the removed patches
    pred: Tensor  # (b l p*p*c) what the decoder paints into each patch, see patchify
    mask: Tensor  # (b l) float32, 1 where the patch was removed


class MaskedAutoencoder(fastvim.FastVim):
    """Section 4.3; He et al., Masked Autoencoders Are Scalable Vision Learners: the encoder, a
    FastVim (then called FastMaskVim) or a Vim, sees a random quarter of the patches; a shallow Vim
    paints the others.

    fields: of fastvim.Config. Raises ValueError on a mask ratio that keeps or removes nothing, a
    width that is no multiple of 4."""

    def __init__(self, mask_ratio: float = 0.75, decoder_embed_dim: int = 512,
                 decoder_depth: int = 2, **fields):
        if fields.setdefault("num_classes", 0) or fields.get("out_indices") is not None:
            raise ValueError("a masked autoencoder has neither classes nor taps: leave num_classes "
                             "and out_indices out")
        super().__init__(**fields)
        cfg = self.cfg
        d = decoder_embed_dim
        if cfg.per_channel:
            raise ValueError("a masked autoencoder removes whole patches: "
                             f"schedule={cfg.schedule!r} has a token per channel")
        for name, width in {"embed_dim": cfg.embed_dim, "decoder_embed_dim": d}.items():
            if type(width) is not int or width < 4 or width % 4:
                raise ValueError(f"{name}={width!r} must be a multiple of 4, for sin-cos position "
                                 "embeddings")
        self.mask_ratio = mask_ratio
        patches = math.prod(self.grid_size)
        self.kept_patches(patches)  # raises early
        self.mask_token = nn.Parameter(torch.empty(1, 1, d))
        if cfg.class_token:
            self.class_row = 0  # the released order; checkpoints.load knows
        self.decoder_embed = nn.Linear(cfg.embed_dim, d)
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, patches + cfg.class_token, d))
        decoder = fastvim.Config(schedule="vim", embed_dim=d, depth=decoder_depth,
                                 d_state=cfg.d_state)
        self.decoder_blocks = nn.ModuleList(fastvim.Block(decoder) for _ in range(decoder_depth))
        self.decoder_norm = fastvim.NORMS["rmsnorm"](d, eps=1e-5)
        self.decoder_pred = nn.Linear(d, cfg.patch_size ** 2 * cfg.in_chans)
        fastvim.init_weights(self, init_patches)
        for pos in (self.pos_embed, self.decoder_pos_embed):
            sincos = sincos_pos_embed(*self.grid_size, pos.shape[2], cfg.class_token)
            pos.requires_grad_(False).copy_(sincos)

    def kept_patches(self, patches: int) -> int:
        """How many of them the encoder is shown. Raises ValueError if all or none."""
        ratio = self.mask_ratio
        kept = 0
        if isinstance(ratio, (int, float)) and 0 < ratio < 1:
            kept = int(patches * (1 - ratio) + 1e-6)
        if not 1 <= kept < patches:
            raise ValueError(f"mask_ratio={ratio!r} must be between 0 and 1, keep at least one of "
                             f"the image's {patches} patches and remove at least one")
        return kept

    def patchify(self, x: Tensor) -> Tensor:
        """Images (b c H W) -> patches (b l p*p*c): pixels by row, column, channel."""
        p = self.cfg.patch_size
        if x.shape[2] % p or x.shape[3] % p:
            raise ValueError(f"images must be of whole patches of {p} x {p} pixels, not of shape "
                             f"{tuple(x.shape)}")
        return rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)

    def unpatchify(self, patches: Tensor, h: int) -> Tensor:
        """The inverse, for a grid of h rows: patches (b l p*p*c) -> images (b c H W)."""
        p = self.cfg.patch_size
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=h, p=p, q=p)

    def target(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What to paint (b l p*p*c): each patch, less its mean, over its standard deviation; these
        two (b l 1)."""
        fastvim.check("images", x, None, self.cfg)
        patches = fastvim.at_least_float32(self.patchify(x))
        mean = patches.mean(-1, keepdim=True)
        std = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        return (patches - mean) / std, mean, std

    def random_masking(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """noise (b l): the patches of the smallest are kept -> keep (b s) their ids, ascending so
        that the scan follows the image, and mask (b l) float32, 1 for the removed ones."""
        kept = self.kept_patches(noise.shape[1])
        keep = noise.argsort(1)[:, :kept].sort(1).values
        return keep, torch.ones(noise.shape, device=noise.device).scatter(1, keep, 0.0)

    def decode(self, tokens: Tensor, ids: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (b s d) of a grid (h, w) -> the image (b l p*p*c). ids (b s): which patch each
        token is of, or fastvim.CLASS."""
        length = math.prod(grid)
        pos, class_pos = self.resize_pos_embed(self.decoder_pos_embed, self.grid_size, grid,
                                              self.class_row)
        tokens = self.decoder_embed(tokens)  # (b s d)
        x = self.mask_token.to(tokens).expand(len(ids), length, -1)
        if self.cfg.class_token:  # its place is behind all patches
            x = F.pad(x, (0, 0, 0, 1))
            pos = torch.cat([pos, class_pos], 1)
            ids = ids.masked_fill(ids == fastvim.CLASS, length)
        x = x.scatter(1, ids[..., None].expand(tokens.shape), tokens) + pos  # (b l d)
        sequence = fastvim.Grid(sizes=(("l", x.shape[1]),))
        backend = fastvim.pick_backend(x.device)
        recompute = self.grad_checkpointing and self.training
        rates = [0.0] * len(self.decoder_blocks)
        for hidden, residual in fastvim.run_blocks(self.decoder_blocks, x, [sequence], backend,
                                                   rates, recompute):
            pass
        x, _ = backend.add_norm(hidden, residual, self.decoder_norm)
        return self.decoder_pred(x[:, :length])

    def forward(self, x: Tensor, noise: Tensor | None = None) -> MAEOutput:
        """Images (b c H W), of whole patches. noise (b l) decides what is removed; default
        uniform."""
        target, _, _ = self.target(x)  # (b l p*p*c)
        h, w = (length // self.cfg.patch_size for length in x.shape[2:])
        if noise is None:
            noise = torch.rand(len(x), h * w, device=x.device)
        if noise.shape != target.shape[:2]:
            raise ValueError(f"noise must be a number per patch, {tuple(target.shape[:2])}, not "
                             f"{tuple(noise.shape)}")
        keep, mask = self.random_masking(noise)  # (b s) (b l)
        tokens, ids = self._encode(x, keep, None, checked=True)  # (b s d) (b s)
        pred = self.decode(tokens, ids, (h, w))  # (b l p*p*c)
        error = (fastvim.at_least_float32(pred) - target).square().mean(-1)  # (b l)
        return MAEOutput((error * mask).sum() / mask.sum(), pred, mask)


def init_patches(weight: Tensor) -> None:
    """Xavier uniform, for a linear layer on patches."""
    nn.init.trunc_normal_(weight)  # not used, but what a seed gives lies behind it
    nn.init.xavier_uniform_(weight.flatten(1))


def sincos_pos_embed(h: int, w: int, dim: int, class_token: bool = False) -> Tensor:
    """Fixed 2-D position embeddings (1 h*w dim): sines and cosines of the column in the first half,
    of the row in the second, of wavelengths from 2 pi to 10,000 times that; before them a row of
    zeros for a class token."""
    quarter = dim // 4
    frequency = 10_000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    row = torch.arange(h, dtype=torch.float64).repeat_interleave(w)[:, None] * frequency
    column = torch.arange(w, dtype=torch.float64).repeat(h)[:, None] * frequency  # (h*w dim/4)
    table = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], 1)  # (h*w dim)
    return F.pad(table, (0, 0, int(class_token), 0))[None].float()


def build_autoencoder(args: runs.Options) -> MaskedAutoencoder:
    """The one that args ask for."""
    fields = {**fastvim.model_fields(args.model), **runs.model_fields(args)}
    model = MaskedAutoencoder(args.mask_ratio, args.decoder_dim, args.decoder_depth, **fields)
    model.grad_checkpointing = args.grad_checkpointing
    return model


# ---- Pretraining ---------------------------------------------------------------------------------

def pretrain(args: runs.Options, ctx: training.Context, start: runs.Saved) -> list[dict]:
    """One run; returns training.fit's log."""
    train_set = classification.open_images(args, True)
    loader = runs.loader_of(args, ctx, train_set, True)
    model = build_autoencoder(args)
    if start.gives_weights:
        ctx.print(f"{start.path}: {checkpoints.load(model, start.content)}")
    model = model.to(ctx.device)
    patches = math.prod(model.grid_size)
    ctx.print(f"autoencoder of {args.model}: {sum(p.numel() for p in model.parameters()):,} "
              f"parameters, {model.kept_patches(patches)} of {patches} patches kept, "
              f"{len(train_set):,} images")

    evaluate = None
    if args.data is None or data.has_split(args.data, "val"):
        val_set = classification.open_images(args, False)
        val_loader = runs.loader_of(args, ctx, val_set, False)

        def evaluate(model, epoch):
            if ctx.is_main:
                paint_some(model, val_set, args, f"reconstruction-{epoch:04}.png")
            return masked_loss(model, val_loader, ctx, args.amp)

    groups = training.parameter_groups(model, args.weight_decay, lambda name, param: False)
    optimizer = torch.optim.AdamW(groups, lr=training.peak_lr(args, ctx), betas=(0.9, 0.95),
                                  fused=True)
    return training.fit(
        args, ctx, model, loader, lambda model, batch: model(batch[0]).loss, optimizer,
        runs.warmup_and_cosine(args, ctx, loader), evaluate=evaluate, metric="loss",
        lower_is_better=True, about={"built": {"name": args.model,
                                               "fields": runs.model_fields(args)}})


def masked_loss(model: MaskedAutoencoder, loader, ctx: training.Context, amp=False) -> dict:
    """-> {"loss": over all images, always under the same masks, "patch_mean": the loss of painting
    each patch evenly in its own mean, "images": how many}"""
    generator = torch.Generator().manual_seed(ctx.rank)
    sums = torch.zeros(3, dtype=torch.float64, device=ctx.device)
    for images, _ in filter(None, loader):
        images = images.to(ctx.device, non_blocking=True)
        target, _, _ = model.target(images)  # (b l p*p*c), of mean 0
        noise = torch.rand(target.shape[:2], generator=generator).to(ctx.device)
        with torch.autocast(ctx.device.type, torch.bfloat16, enabled=amp):
            loss, _, mask = model(images, noise)
        even = target.square().mean(-1)  # (b l)
        even = (even * mask).sum() / mask.sum()
        sums += len(images) * torch.stack([loss, even, torch.ones_like(loss)]).double()
    loss, even, count = ctx.sum(sums).tolist()
    runs.require_images(count)
    return {"loss": loss / count, "patch_mean": even / count, "images": count}


# ---- Pictures ------------------------------------------------------------------------------------

def paint_some(model: MaskedAutoencoder, dataset, args: runs.Options, name: str) -> None:
    """paint() for up to eight images, from all over the data set."""
    items = [dataset[i] for i in range(0, len(dataset), max(1, len(dataset) // 8))]
    images = torch.stack([item[0] for item in items if item][:8])
    paint(model, images.to(model.pos_embed.device), args, name, args.data is None)


@torch.no_grad()
def paint(model: MaskedAutoencoder, images: Tensor, args: runs.Options, name: str, digits: bool,
          required: bool = False) -> None:
    """OUT/name, a row for each of the normalised images (b 3 H W): the image, what the model sees
    of it, the removed patches painted evenly in their mean, and by the model.

    The model predicts neither a patch's mean nor its contrast: both are the true ones, so that the
    third column is what to compare the fourth with."""
    patches = model.patchify(images)  # (b l p*p*c)
    _, mean, std = model.target(images)  # (b l 1)
    noise = torch.rand(patches.shape[:2], generator=torch.Generator().manual_seed(0))
    _, pred, mask = model(images, noise.to(images.device))
    pred = pred.float() * std + mean
    kept = mask[..., None] == 0
    columns = [patches, patches * kept, patches.where(kept, mean), patches.where(kept, pred)]
    rows = images.shape[2] // model.cfg.patch_size
    pixels = torch.stack([model.unpatchify(column, rows) for column in columns], 1)
    colours = (data.DIGITS_MEAN, data.DIGITS_STD)
    if not digits:
        colours = (data.IMAGENET_MEAN, data.IMAGENET_STD)
    shift, scale = images.new_tensor(colours).reshape(2, -1, 1, 1)
    zoom = max(1, 128 // pixels.shape[4])
    tiles = repeat(pixels * scale + shift, "b column c h w -> (b column) c (h x) (w y)",
                   x=zoom, y=zoom)
    runs.write(args, name, lambda file: save_image(tiles, file, "png", nrow=4, padding=4,
                                                   pad_value=1.0), required)


def reconstruct(args: runs.Options, ctx: training.Context, start: runs.Saved) -> None:
    """Paints the files of --reconstruct. SystemExit(1), at the end, if some cannot be."""
    model = build_autoencoder(args).to(ctx.device).eval()
    ctx.print(f"{start.path}: {checkpoints.load(model, start.content)}")
    transform = classification.view_of(args, start)
    images = []
    try:
        for _, image in data.each_readable(args.reconstruct, data.load_rgb):
            images.append(transform(image))
    finally:
        if images and ctx.is_main:
            digits = runs.trained_on_built_in(start)
            paint(model, torch.stack(images).to(ctx.device), args, "reconstruct.png", digits, True)
            print(f"{args.out}/reconstruct.png: {len(images)} images")


# ---- Classification ------------------------------------------------------------------------------

def layer_scale(name: str, depth: int, decay: float, blocks: int = 2) -> float:
    """A parameter's share of the learning rate: decay, once for every `blocks` blocks between it
    and the head. MAE's code has blocks=1; a Mamba has twice as many blocks as a ViT of its size."""
    layer = depth + 1  # head and final norm
    if name.startswith(("patch_embed.", "pos_embed", "cls_token")):
        layer = 0
    elif name.startswith("layers."):
        layer = int(name.split(".")[1]) + 1
    return decay ** math.ceil((depth + 1 - layer) / blocks)


def no_decay(name: str, param: Tensor) -> bool:
    return training.bias_or_1d(name, param) or name in ("pos_embed", "cls_token")


def finetune(args: runs.Options, ctx: training.Context, start: runs.Saved) -> list[dict]:
    def optimizer_of(model, args, lr):
        def lr_scale(name, param):
            return layer_scale(name, model.cfg.depth, args.layer_decay, args.decay_blocks)

        groups = training.parameter_groups(model, args.weight_decay, no_decay, lr_scale)
        return torch.optim.AdamW(groups, lr=lr, fused=True)

    return classification.train(args, ctx, start, classification.build_model, optimizer_of,
                                lr_end=FINETUNE_END)


def linear(args: runs.Options, ctx: training.Context, start: runs.Saved) -> list[dict]:
    def build(args, num_classes):
        model = classification.build_model(args, num_classes)
        return classification.linear_probe(model, num_classes)

    def optimizer_of(model, args, lr):
        groups = training.parameter_groups(model, args.weight_decay)
        return torch.optim.SGD(groups, lr=lr, momentum=0.9)

    return classification.train(args, ctx, start, build, optimizer_of)


def main() -> None:
    stages = {"pretrain": pretrain, "finetune": finetune, "linear": linear}
    runs.run(get_args, {"reconstruct": reconstruct},
             lambda args, ctx, start: stages[args.stage](args, ctx, start))


if __name__ == "__main__":
    main()
