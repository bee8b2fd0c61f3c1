"""
Dense prediction with FastVim: segmentation by UperNet, detection by Cascade Mask R-CNN.

    python finetune_dense.py seg                    without data: drawn scenes, minutes on a CPU
    python finetune_dense.py det
    torchrun --nproc-per-node 8 finetune_dense.py seg --data ADE20K_DIR --batch-size 2 \\
        --backbone FastVim_tiny.ckpt
    torchrun --nproc-per-node 8 finetune_dense.py det --data COCO_DIR --batch-size 8 \\
        --backbone FastVim_tiny.ckpt
    python finetune_dense.py seg --data ADE20K_DIR --eval FastVim_tiny_iter_160000.pth
    python finetune_dense.py det --predict street.jpg --eval runs/det/best.pt --out pictures

What the paper (sections 4.5 and 4.6) reports, on the validation images of ADE20K, mIoU, and of
COCO, AP of boxes / masks:

               --model         seg   det                        --model       seg   det
    FastVim-T  fastvim_tiny    41.8  45.1 / 39.0      Vim-T     vim_tiny      41.0  45.7 / 39.2
    FastVim-S  fastvim_small   44.9  48.4 / 41.8      Vim-S     vim_small     44.9  47.1 / 40.6
    FastVim-B  fastvim_base    47.8  50.0 / 43.2      DeiT-T    deit_tiny     39.2  44.4 / 38.1

Checkpoints may be released ones or our own. dense_models.py builds the models of dense_heads.py;
dense_results.py measures and draws what they say.
"""
import argparse
import collections
import functools
import math
import pathlib
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

import checkpoints
import data
import dense_models as models
import runs
import training
from dense_results import MEASURES, average_precision, draw_prediction  # noqa: F401

# The recipes of the paper, in optimizer steps, for ADE20K and COCO. Its text says that the
# detector's learning rate falls linearly; the released configuration divides it by ten at DROPS,
# and its launch line gives a batch of 16, not 64.
RECIPES = {
    "seg": {**runs.TRAINING, "steps": 160_000, "warmup": 1500, "batch_size": 16, "recipe_lr": 6e-5,
            "recipe_batch": 16, "weight_decay": 0.01, "layer_decay": 1.0, "model": "fastvim_tiny",
            "img_size": 512, "jitter": (0.5, 2.0), "distort": True, "channels": 512,
            "eval_every": 12, "out": "runs/seg"},
    "det": {**runs.TRAINING, "steps": 184_375, "warmup": 250, "batch_size": 8, "recipe_lr": 1e-4,
            "recipe_batch": 64, "weight_decay": 0.05, "layer_decay": 0.7, "model": "fastvim_tiny",
            "img_size": 1024, "patch_size": 16, "jitter": (0.1, 2.0), "channels": 256,
            "hidden": 1024, "regions": 512, "clip": 35.0, "eval_every": 10, "out": "runs/det"},
}
DROPS = (8 / 9, 26 / 27)
METRICS = {"seg": "miou", "det": "box_ap"}      # by which the best epoch is told

# The same on 4,000 drawn scenes, from random weights, scaled to two CPU cores.
SCENES = {
    "seg": {"steps": 3000, "warmup": 50, "batch_size": 16, "recipe_lr": 2e-3, "recipe_batch": 16,
            "img_size": 64, "patch_size": 8, "depth": 4, "jitter": (0.8, 1.25), "distort": False,
            "channels": 64, "eval_every": 2, "drop_path_rate": 0.0, "workers": 0,
            "out": "runs/seg-scenes"},
    "det": {"steps": 1000, "warmup": 50, "batch_size": 8, "recipe_lr": 1e-3, "recipe_batch": 8,
            "img_size": 96, "depth": 4, "jitter": (0.8, 1.25), "channels": 32, "hidden": 128,
            "regions": 32, "eval_every": 1, "drop_path_rate": 0.0, "layer_decay": 1.0,
            "workers": 0, "out": "runs/det-scenes"},
}

# ---- Options -------------------------------------------------------------------------------------


def get_args(argv=None) -> tuple[runs.Options, runs.Saved]:
    """The command line -> the options, and the checkpoint that they are for."""
    parser = runs.Parser(description="Train, evaluate or use a segmenter or a detector. Without "
                         "--data: on drawn scenes, by a recipe scaled to them.")
    tasks = parser.add_subparsers(dest="task", required=True)
    parsers = {}
    for task, text in (("seg", "segmentation by UperNet"),
                       ("det", "detection by Cascade Mask R-CNN")):
        parsers[task] = tasks.add_parser(task, usage="%(prog)s [options]", help=text)
        add_arguments(parsers[task], task)
    typed = vars(parser.parse_args(argv))
    task = typed["task"]
    refuse_contradictions(typed, parsers[task].error)
    toy = {}
    if not typed.keys() & {"data", "eval", "predict"}:
        toy = SCENES[task]
    chosen = {**runs.defaults(parsers[task]), **RECIPES[task], **toy, **typed}
    path = starting_path(chosen)
    if typed.keys() & {"eval", "predict"}:
        start = runs.read(path)  # whatever --out holds: nothing is trained
    else:
        start = runs.starting_point(chosen, path)
    return runs.Options({**chosen, **options_of(start, chosen, typed), **typed}), start


def refuse_contradictions(typed: dict, error: Callable[[str], None]) -> None:
    for_training = [f"--{name}" for name in ("backbone", "init", "freeze", "resume")
                    if name in typed]
    if typed.keys() & {"eval", "predict"} and for_training:
        error(f"{' and '.join(for_training)}: for training only; --eval CKPT names the model to "
              "evaluate or to predict with")
    if typed.get("data") == "":
        error("--data is empty; without it drawn scenes are learnt")
    low, high = typed.get("jitter", (0, 1))
    if low > high:
        error("--jitter takes the smaller factor first")


def add_arguments(parser: runs.Parser, task: str) -> None:
    recipe = RECIPES[task]
    layout = {
        "seg": "ADE20K's: DIR/images/{training,validation}/*.jpg, DIR/annotations/.../*.png",
        "det": "COCO's: DIR/{train,val}2017, DIR/annotations/instances_{train,val}2017.json"}
    group = parser.groups["data and weights"]
    group.add_argument("--data", metavar="DIR", help=layout[task])
    add = group.add_mutually_exclusive_group().add_argument
    add("--backbone", metavar="CKPT", help="start from the encoder of this classifier or "
        "autoencoder, ours or a released one")
    add("--init", metavar="CKPT", help="start from this model of the same task, perhaps of other "
        "classes, ours or a released one")
    add = parser.groups["instead of training"].add_argument
    add("--eval", metavar="CKPT", help="evaluate this checkpoint, ours or a released one")
    add("--predict", metavar="IMAGE", nargs="+", help="draw into OUT what is seen in images or "
        "folders of them, by --eval CKPT (default: OUT/best.pt)")
    if task == "seg":
        add("--multi-scale", action="store_true", help="evaluate the mean of six sizes, mirrored, "
            "too")
    add = parser.groups["model"].add_argument
    add("--model", metavar="NAME", help="fastvim_tiny (default), vim_small, ... (python fastvim.py "
        "lists them), or deit_tiny, deit_small, deit_base from timm")
    if task == "seg":
        add("--patch-size", type=runs.WHOLE, help="pixels (default: the model's own)")
    add("--channels", type=runs.WHOLE, help="width of the heads")
    if task == "det":
        add("--hidden", type=runs.WHOLE, help="width of their linear layers")
        add("--regions", type=runs.WHOLE, help="of an image, that each stage trains on")
    add("--pool-scale", type=float,
        help="factor of mean pooling (default 1; 0.25 after masked pretraining)")
    add("--freeze", action="store_true", help="train the heads only")
    add = parser.groups["augmentation"].add_argument
    add("--jitter", type=runs.number(float, 0.01), nargs=2, metavar=("LOW", "HIGH"),
        help="range of a random factor of the images' size (default {:g} {:g})".format(
            *recipe["jitter"]))
    if task == "seg":
        add("--distort", action=argparse.BooleanOptionalAction,
            help="random brightness, contrast, saturation and hue")
    add = parser.groups["recipe"].add_argument
    add("--layer-decay", type=runs.number(float, 0.01), help="patch and position embeddings learn "
        "slower by this to the power of 13")
    add("--decay-blocks", action="store_true", help="and blocks by a power that falls from 12 to 1 "
        "with the depth, as the released detectors meant to")
    runs.add_training_arguments(parser, recipe)


def starting_path(chosen: dict) -> str | None:
    """The checkpoint that the options name."""
    if chosen["eval"] or not chosen["predict"]:
        return chosen["eval"] or chosen["init"] or chosen["backbone"]
    return runs.last_run(chosen["out"], RECIPES[chosen["task"]], SCENES[chosen["task"]])


def options_of(start: runs.Saved, chosen: dict, typed: dict) -> dict:
    """What the checkpoint decides: as its weights show and as its run says."""
    if not start.content:
        return {}
    said = runs.encoder_options(start, typed)
    if chosen["backbone"] is None or start.resumed:
        weights = models.dense_weights(chosen["task"], start.content)
        said |= {name: start.options.get(name) for name in ("channels", "hidden")}
    else:
        weights = checkpoints.model_weights(start.content)[0]
    if not (chosen["eval"] or chosen["predict"]):
        said.pop("img_size", None)
    said.pop("block_norm", None)  # here it is always the same
    said = {**models.options_shown(weights), **said}
    return {name: value for name, value in said.items() if value is not None}


# ---- Data ----------------------------------------------------------------------------------------

def open_split(args: runs.Options, split: str, classes=None) -> data.Files:
    """A split of --data or of the drawn scenes. classes: the names that it must have; numbers go
    with all names."""
    train = split == "train"
    if args.task == "det":
        reader, transform = data.Coco, data.DetectionTransform(args.img_size, train, args.jitter)
    else:
        reader = data.ADE20K
        transform = data.SegmentationTransform(args.img_size, train, args.jitter, args.distort)
    if args.data:
        dataset = reader(args.data, split, transform)
    else:
        dataset = data.Scenes(split, transform, args.img_size, args.task == "det")
    count = len(dataset.classes)
    known = classes or dataset.classes
    unnamed = data.numbers(count) in (known, dataset.classes)
    if len(known) != count or known != dataset.classes and not unnamed:
        raise ValueError(f"{dataset.where} has {count} classes "
                         f"({data.first_few(dataset.classes)}), the model knows {len(known)} "
                         f"({data.first_few(known)})")
    return dataset


def loader_of(args: runs.Options, ctx: training.Context, dataset, train=False):
    """Segmentation is evaluated image by image, as each has a size of its own."""
    settings = {}
    if args.task == "det":
        settings["merge"] = data.merge_detections
    elif not train:
        settings["batch_size"] = 1
    return runs.loader_of(args, ctx, dataset, train, **settings)


# ---- Training ------------------------------------------------------------------------------------

def no_weight_decay(task: str, name: str, param: Tensor) -> bool:
    """Which parameters weight decay leaves alone."""
    last = name.split(".")[-1]
    if task == "det":
        return last == "pos_embed"
    exempt = "norm" in name or last in ("pos_embed", "cls_token", "A_log", "D")
    return name.startswith("backbone.") and exempt


def lr_scale(args: runs.Options, name: str, param: Tensor) -> float:
    """A parameter's share of the learning rate. That of the embeddings is smaller, and with
    --decay-blocks those of the blocks, the earlier they come."""
    if not name.startswith("backbone."):
        return 1.0
    if {"patch_embed", "pos_embed", "cls_token"} & set(name.split(".")):
        return args.layer_decay ** 13
    block = re.search(r"\.(?:layers|blocks)\.(\d+)\.", name)
    if block is None or not args.decay_blocks:
        return 1.0
    depth = models.depth_of(args)
    return args.layer_decay ** math.ceil(12 * (depth - int(block[1])) / depth)


def schedule(args: runs.Options, lr: float, total: int) -> Callable[[int], float]:
    """The learning rate at each optimizer step of the run."""
    if args.task == "seg":
        return functools.partial(training.polynomial, total=total, value=lr, warmup=args.warmup)
    return functools.partial(training.step_decay, value=lr, warmup=args.warmup,
                             milestones=[round(total * share) for share in DROPS])


def train(args: runs.Options, ctx: training.Context, start: runs.Saved) -> None:
    if not args.data:
        ctx.print("no --data: training on drawn scenes, by a recipe scaled to them")
    train_set = open_split(args, "train")
    val_set = open_split(args, "val", train_set.classes)
    model = models.build_model(args, len(train_set.classes))
    if start.gives_weights and args.init:
        weights = models.dense_weights(args.task, start.content)
        note = models.load_dense(model, weights, len(train_set.classes))
        ctx.print(f"{start.path}: {note}")
    elif start.gives_weights:
        ctx.print(f"{start.path}: {models.load_backbone(model.backbone, start.content)}")
    model.backbone.requires_grad_(not args.freeze)
    model = synchronized(args, ctx, model).to(ctx.device)
    loader = loader_of(args, ctx, train_set, train=True)
    val_loader = loader_of(args, ctx, val_set)
    ctx.print(f"{models.model_name(args)}: {sum(p.numel() for p in model.parameters()):,} "
              f"parameters, {len(train_set.classes)} classes, {len(train_set):,} training and "
              f"{len(val_set):,} validation images")

    def loss_fn(net, batch):
        if args.task == "seg":
            return sum(net(*batch).values())
        images, targets, infos = batch
        return sum(net(images, targets, [info["size"] for info in infos]).values())

    def evaluate(model, epoch):
        metrics, _ = MEASURES[args.task](args, ctx, model, val_loader)
        return metrics | {"unreadable": runs.count_bad(ctx, train_set, val_set)}

    lr = training.peak_lr(args, ctx)
    groups = training.parameter_groups(
        model, args.weight_decay, functools.partial(no_weight_decay, args.task),
        functools.partial(lr_scale, args))
    total, _ = training.run_length(args, loader)
    training.fit(
        args, ctx, model, loader, loss_fn, torch.optim.AdamW(groups, lr=lr, fused=True),
        schedule(args, lr, total), evaluate=evaluate, metric=METRICS[args.task],
        about={"built": {"name": models.model_name(args), "fields": models.backbone_fields(args)},
               "classes": train_set.classes})
    if ctx.is_main:
        draw_examples(args, ctx, model.eval(), val_set)


def synchronized(args: runs.Options, ctx: training.Context, model: nn.Module) -> nn.Module:
    """The model with BatchNorm over all processes; PyTorch's is for GPUs only. ValueError: it would
    see one image."""
    if ctx.world_size > 1 and ctx.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if args.task == "seg" and args.batch_size == 1:
        raise ValueError("--batch-size 1: BatchNorm needs two images in each process (or, on "
                         "several GPUs, in all)")
    return model


# ---- A trained model -----------------------------------------------------------------------------

def restore(args: runs.Options, ctx: training.Context, start: runs.Saved) -> tuple[nn.Module, int]:
    """-> the model of the checkpoint, and how many classes it tells apart."""
    weights = models.dense_weights(args.task, start.content)
    count = models.count_classes(weights)
    model = models.build_model(args, count)
    ctx.print(f"{start.path}: {models.load_dense(model, weights, count)}")
    return model.to(ctx.device).eval(), count


def evaluate(args: runs.Options, ctx: training.Context, start: runs.Saved) -> None:
    runs.require_data(args, start)
    model, count = restore(args, ctx, start)
    dataset = open_split(args, "val", start.classes or data.numbers(count))
    metrics, iou = MEASURES[args.task](args, ctx, model, loader_of(args, ctx, dataset))
    if iou is not None:
        for name, value in zip(dataset.classes, iou.tolist()):
            ctx.print(f"{value:6.1f}  {name}")
    metrics |= {"unreadable": runs.count_bad(ctx, dataset)}
    ctx.print(", ".join(f"{name} {value:.2f}" for name, value in metrics.items()))


def predict(args: runs.Options, ctx: training.Context, start: runs.Saved) -> None:
    """Draws OUT/NAME-seg.png or -det.png of each image; of a second one of that name NAME-2-..."""
    if not ctx.is_main:
        return
    model, count = restore(args, ctx, start)
    classes = start.classes or names_of(args.task, count)
    names = collections.Counter()
    for path, image in data.each_readable(args.predict, data.load_rgb):
        name = pathlib.Path(path).stem
        names[name] += 1
        if names[name] > 1:
            name += f"-{names[name]}"
        picture = draw_prediction(args, ctx, model, classes, data.to_pixels(image))
        save_picture(args, f"{name}-{args.task}.png", picture)


def names_of(task: str, count: int) -> list[str]:
    """Names for the classes of a released model: COCO's, or numbers, ADE20K's."""
    weights = data.extra("torchvision.models.detection").MaskRCNN_ResNet50_FPN_Weights.COCO_V1
    coco = [name for name in weights.meta["categories"] if name not in ("__background__", "N/A")]
    if task == "det" and count == len(coco):
        return coco
    return data.numbers(count)


def save_picture(args: runs.Options, name: str, picture) -> None:
    runs.write(args, name, lambda file: picture.save(file, format="png"), required=True)
    print(f"{args.out}/{name}")


def draw_examples(args: runs.Options, ctx: training.Context, model: nn.Module, dataset: data.Files,
                  count: int = 4) -> None:
    """OUT/example-0.png ...: what the model says of the first validation images."""
    for i, sample in enumerate(dataset.samples[:count]):
        try:
            pixels = dataset.load(*sample)[0]
        except Exception:  # noqa: S112         it has been reported as a bad file
            continue
        picture = draw_prediction(args, ctx, model, dataset.classes, pixels)
        save_picture(args, f"example-{i}.png", picture)


def main() -> None:
    runs.run(get_args, {"predict": predict, "eval": evaluate}, train)


if __name__ == "__main__":
    main()
