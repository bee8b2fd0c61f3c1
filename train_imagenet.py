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

import torch
from torch import nn

import checkpoints
import classification
import data
import fastvim
import runs
import training
from baselines import PooledAttention

# The recipe of the paper: 300 epochs of AdamW (0.9, 0.999) at an effective batch of 1024. Its text
# says lr 1e-3; the released configuration computes 2e-3 at that batch (--lr 2e-3).
RECIPE = {**runs.TRAINING, **classification.AUGMENTATION, "model": "fastvim_tiny", "epochs": 300.0,
          "warmup": 5.0, "recipe_lr": 1e-3, "recipe_batch": 1024, "weight_decay": 0.05,
          "ema": 0.9999, "img_size": classification.IMG_SIZE, "crop_pct": classification.CROP_PCT,
          "out": "runs/imagenet"}
LR_WARMUP = 1e-6  # where the warmup begins
LR_END = 1e-5
DROP_PATH = {"tiny": 0.05, "small": 0.05, "base": 0.4, "large": 0.4, "huge": 0.4}  # L, H: as B

# The same on the digits, scaled to 1,437 training images of 8 x 8 pixels and two CPU cores.
DIGITS = {"epochs": 5.0, "warmup": 1.0, "batch_size": 32, "ema": 0.98, "mixup": 0.0, "cutmix": 0.0,
          "drop_path_rate": 0.0, "recipe_lr": 1e-3, "recipe_batch": 32, "out": "runs/digits"}
DIGITS_MODEL = {"img_size": 32, "patch_size": 8}


def make_parser() -> runs.Parser:
    parser = runs.Parser(usage="%(prog)s [options]", description="Train, evaluate or use an image "
                         "classifier. Without --data: on the handwritten digits that come with "
                         "scikit-learn, by a recipe scaled to them.")
    add = parser.add_argument_group("what to do").add_argument
    classification.add_data_argument(add)
    add("--init", metavar="CKPT", help="start from the encoder of this checkpoint of our models or "
        "the released ones, with a fresh head")
    add("--eval", metavar="CKPT", help="only evaluate this checkpoint, ours or a released one")
    add("--predict", metavar="IMAGE", nargs="+", help="print the five likeliest classes of each "
        "image, by --eval CKPT (default: OUT/best.pt)")
    add = classification.add_model_arguments(parser, ", or any of timm's")
    add("--vit-pool", action="store_const", const=True, help="alternate pooling in a ViT of timm")
    add("--vit-conv", action="store_const", const=True, help="a convolution before its attention, "
        "too")
    add = classification.add_image_arguments(parser)
    classification.add_label_arguments(add)
    runs.add_training_arguments(parser, RECIPE)
    return parser


def get_args(argv: list[str] | None = None) -> tuple[runs.Options, runs.Saved]:
    """The command line -> the options, and the checkpoint that the run starts from or looks at.

    The recipe is that of ImageNet, or of the digits without --data."""
    parser = make_parser()
    typed = vars(parser.parse_args(argv))
    on_digits = not typed.keys() & {"data", "eval", "predict"}
    toy = DIGITS if on_digits else {}
    chosen = {**runs.defaults(parser), **RECIPE, **toy, **typed}
    looks = chosen["eval"] or chosen["predict"]
    if looks:
        start = runs.read(chosen["eval"] or f"{chosen['out']}/best.pt")
    else:
        start = runs.starting_point(chosen, chosen["init"])
    if on_digits and not start.content:
        toy = {**DIGITS, **DIGITS_MODEL}
    known = {**runs.encoder_options(start, typed), **classification.crop_of(start, typed)}
    model = {**chosen, **known, **typed}["model"]
    recipe = {**runs.defaults(parser), **RECIPE, "drop_path_rate": drop_path_of(model)}
    args = runs.Options({**recipe, **toy, **known, **typed})
    if args.vit_conv and not args.vit_pool:
        parser.error("--vit-conv goes with --vit-pool")
    if not looks:
        classification.check_pairs(args, parser)
        if start.content and not is_ours(model):
            raise ValueError(f"--init is for our models, {', '.join(fastvim.list_models())}: {model} "
                             "is none")
    return args, start


def is_ours(model: str) -> bool:
    return model in fastvim.list_models()


def drop_path_of(model: str) -> float:
    """The recipe's, by the size of the model; 0 for those of timm."""
    if not is_ours(model):
        return 0.0
    return DROP_PATH[model.rpartition("_")[2]]


# ---- Models --------------------------------------------------------------------------------------

def build_model(args: runs.Options, num_classes: int) -> nn.Module:
    """The model that args ask for. ValueError: an unknown name, an option that it does not have."""
    if not is_ours(args.model):
        return build_timm(args, num_classes)
    if args.vit_pool:
        raise ValueError("--vit-pool and --vit-conv are for the ViTs of timm: name one with --model")
    return classification.build_encoder(args, num_classes)


def build_timm(args: runs.Options, num_classes: int) -> nn.Module:
    """A model of timm, a ViT perhaps with the pooling of Table 7."""
    timm = data.extra("timm")
    if not timm.is_model(args.model):
        raise ValueError(f"--model {args.model}: neither a model of timm nor one of ours: a family, "
                         f"{', '.join(fastvim.FAMILIES)}, and a size, {', '.join(fastvim.SIZES)}, "
                         "such as fastvim_tiny")
    fields = runs.model_fields(args)
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
        model = classification.linear_probe(model, count)
    scale = "" if args.pool_scale is None else f", pool_scale {args.pool_scale:g}"
    ctx.print(f"{saved.path}: {checkpoints.load(model, saved.content)} into {args.model}{scale}")
    return model.to(ctx.device).eval()


# ---- What to do ----------------------------------------------------------------------------------

def adamw(model: nn.Module, args: runs.Options, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(training.parameter_groups(model, args.weight_decay), lr=lr)


def evaluate(args: runs.Options, ctx: training.Context, saved: runs.Saved) -> None:
    model = restore(args, ctx, saved)
    if args.data is None and not classification.saw_digits(saved):
        raise ValueError("--eval: this model classifies images, so --data DIR has to say where they "
                         "are")
    dataset = classification.open_images(args, False, saved.classes)
    image = torch.zeros(1, 3, args.img_size, args.img_size, device=ctx.device)
    outputs = model(image).shape[1]
    if outputs != len(dataset.classes):
        raise ValueError(f"the checkpoint tells {outputs} classes apart, {args.data} holds "
                         f"{len(dataset.classes)}")
    loader = classification.loader_of(args, ctx, dataset, False)
    result = runs.evaluate_classifier(model, loader, ctx, args.amp)
    ctx.print(f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss "
              f"{result['loss']:.4f} on {result['images']:,.0f} images of {len(dataset):,}")


def predict(args: runs.Options, ctx: training.Context, saved: runs.Saved) -> None:
    """Prints the likeliest classes of each image."""
    model = restore(args, ctx, saved)
    transform = classification.view_of(args, saved)
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


def main() -> None:
    with runs.plain_errors("train_imagenet.py", data.BadDataError):
        args, start = get_args()
        ctx = training.setup(args, training=not (args.eval or args.predict))
        if args.predict:
            if ctx.is_main:
                predict(args, ctx, start)
        elif args.eval:
            evaluate(args, ctx, start)
        else:
            if args.data is None:
                ctx.print("no --data: training on the built-in handwritten digits, by a recipe "
                          "scaled to them")
            classification.train(args, ctx, start, build_model, adamw, LR_WARMUP, LR_END)
        ctx.close()


if __name__ == "__main__":
    main()
