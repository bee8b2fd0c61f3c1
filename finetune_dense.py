"""
Dense prediction with FastVim: UperNet for segmentation (section 4.5), Cascade Mask R-CNN for detection (section 4.6).

    python finetune_dense.py seg                                     without data: drawn scenes, minutes on a CPU
    python finetune_dense.py det
    torchrun --nproc-per-node 8 finetune_dense.py seg --data ADE20K_DIR --backbone FastVim_tiny.ckpt --batch-size 2
    torchrun --nproc-per-node 8 finetune_dense.py det --data COCO_DIR --backbone FastVim_tiny.ckpt --batch-size 8
    python finetune_dense.py seg --data ADE20K_DIR --eval FastVim_tiny_iter_160000.pth      released weights, or our own
    python finetune_dense.py det --predict street.jpg --eval runs/det/best.pt --out pictures

What the paper reports: mIoU on ADE20K's and AP of boxes / masks on COCO's validation images.

               --model          seg        det                               --model        seg        det
    FastVim-T  fastvim_tiny    41.8    45.1 / 39.0            Vim-T         vim_tiny       41.0    45.7 / 39.2
    FastVim-S  fastvim_small   44.9    48.4 / 41.8            Vim-S         vim_small      44.9    47.1 / 40.6
    FastVim-B  fastvim_base    47.8    50.0 / 43.2            DeiT-T        deit_tiny      39.2    44.4 / 38.1

Both models take what single blocks of the backbone put out, a map with a vector for each patch, and add heads that are
older than Mamba. Written from their papers, with torchvision's operators, under the released checkpoints' names:

    UperNet         Xiao et al. 2018, Unified Perceptual Parsing for Scene Understanding
    PSPNet          Zhao et al. 2017, Pyramid Scene Parsing Network: its pooling pyramid, its auxiliary loss
    Fast R-CNN, Faster R-CNN    Girshick 2015; Ren et al. 2015: regions, anchors, box deltas, their losses
    FPN, Mask R-CNN             Lin et al. 2017; He et al. 2017: regions at several scales, RoIAlign, masks
    Cascade R-CNN               Cai, Vasconcelos 2018: three stages, each of which refines the boxes of the last
    ViTDet                      Li et al. 2022: maps of several scales from the last one of a plain backbone

Symbols, the same everywhere:

    B  images     C  channels     K  classes     h, w  size of a map     H, W  size of the images in pixels
    A  anchors of a map, 3 h w    n  boxes       m  objects              p  boxes that show an object
    D  width of the backbone
    boxes (n 4) float32: left, top, right, bottom in pixels;  [(n 4)]: a list, one for each image
    sizes [(height, width)]: of each image without the padding that makes them a batch
"""
import argparse
import collections
import colorsys
import contextlib
import functools
import math
import pathlib
import types

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torchvision.ops import box_convert
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

import data
import fastvim
import train_imagenet
import training
from dense_heads import IGNORE_INDEX, CascadeMaskRCNN, ChannelNorm, UperNet, segment

# The recipes of the paper, in optimizer steps, for ADE20K and COCO. Its text says that the detector's learning rate
# falls linearly; the released configuration divides it by ten after 8/9 and 26/27 of the run.
RECIPES = dict(
    seg=dict(steps=160_000, warmup=1500, batch_size=16, recipe_lr=6e-5, recipe_batch=16, weight_decay=0.01,
             img_size=512, jitter=(0.5, 2.0), distort=True, channels=512, eval_every=12, layer_decay=1.0,
             out="runs/seg"),
    det=dict(steps=184_375, warmup=250, batch_size=8, recipe_lr=1e-4, recipe_batch=64, weight_decay=0.05, img_size=1024,
             jitter=(0.1, 2.0), channels=256, hidden=1024, regions=512, clip=35.0, eval_every=10, layer_decay=0.7,
             out="runs/det"))
DROPS = 8 / 9, 26 / 27
DROP_PATH = dict(seg=dict(tiny=0.05, small=0.05, base=0.4, large=0.4, huge=0.4),     # released T and S: 0.1
                 det=dict(tiny=0.1, small=0.1, base=0.4, large=0.4, huge=0.4))

# The same on 4,000 drawn scenes, from random weights, scaled to two CPU cores.
SCENES = dict(
    seg=dict(steps=3000, warmup=50, batch_size=16, recipe_lr=2e-3, recipe_batch=16, img_size=64, patch_size=8, depth=4,
             jitter=(0.8, 1.25), distort=False, channels=64, eval_every=2, drop_path=0.0, out="runs/seg-scenes"),
    det=dict(steps=1000, warmup=50, batch_size=8, recipe_lr=1e-3, recipe_batch=8, img_size=96, depth=4,
             jitter=(0.8, 1.25), channels=32, hidden=128, regions=32, eval_every=1, drop_path=0.0, layer_decay=1.0,
             out="runs/det-scenes"))

# What the command line may leave open. Checkpoints say it of their model, or of the backbone alone; the recipes, else.
BACKBONE_FLAGS = ("size", "model", "patch_size", "depth", "class_token", "pool", "pool_scale", "schedule", "ssm_norm",
                  "no_conv", "skip_before_expand")
MODEL_FLAGS = (*BACKBONE_FLAGS, "channels", "hidden")
FLAGS = *MODEL_FLAGS, "img_size", "regions", "drop_path", "jitter", "distort", "warmup", "layer_decay", "classes"
VITS = "deit_tiny", "deit_small", "deit_base"

# ---- Options ---------------------------------------------------------------------------------------------------------

def get_args(argv=None):
    """The command line -> args. The recipe is that of ADE20K or COCO or, without --data, of the drawn scenes."""
    parser = argparse.ArgumentParser(description="Train, evaluate or use a segmenter or a detector. Without --data: on "
                                     "drawn scenes, from random weights, by a recipe scaled to them.")
    tasks = parser.add_subparsers(dest="task", required=True)
    parsers = {task: tasks.add_parser(task, usage="%(prog)s [options]", help=text) for task, text in (
        ("seg", "segmentation by UperNet"), ("det", "detection by Cascade Mask R-CNN"))}
    for task, sub in parsers.items():
        add_arguments(sub, task)
    first = parser.parse_known_args(argv)[0]
    if not (first.data or first.eval or first.predict):
        parsers[first.task].set_defaults(**{k: v for k, v in SCENES[first.task].items() if k not in FLAGS})
    args = parser.parse_args(argv)
    error = parsers[args.task].error
    given = [f"--{k}" for k in ("backbone", "init", "freeze", "resume") if getattr(args, k)]
    if args.backbone and args.init:
        error("--backbone gives the encoder, --init the whole model: give one of them")
    if (args.eval or args.predict) and given:
        error(f"{' and '.join(given)}: for training only; --eval CKPT names the model to evaluate or to predict with")
    if args.data == "":
        error("--data is empty; without it drawn scenes are learnt")
    if args.jitter and args.jitter[0] > args.jitter[1]:
        error("--jitter takes the smaller factor first")
    return args


def add_arguments(parser, task):
    recipe, whole = RECIPES[task], train_imagenet.WHOLE
    parser.set_defaults(**dict.fromkeys(FLAGS))                             # see complete
    layout = dict(seg="ADE20K's layout: DIR/images/{training,validation}/*.jpg, DIR/annotations/.../*.png",
                  det="COCO's layout: DIR/{train,val}2017/*.jpg, DIR/annotations/instances_{train,val}2017.json")
    add = parser.add_argument_group("what to do").add_argument
    add("--data", metavar="DIR", help=layout[task])
    add("--backbone", metavar="CKPT", help="start from the encoder of this classifier or autoencoder, ours or a "
        "released one")
    add("--init", metavar="CKPT", help="start from this model of the same task, ours or a released one; for other "
        "classes than its own its classifiers are left out")
    add("--eval", metavar="CKPT", help="only evaluate this checkpoint, ours or a released one")
    if task == "seg":
        add("--multi-scale", action="store_true", help="evaluate the mean over six sizes and their mirror images")
    add("--predict", metavar="IMAGE", nargs="+", help="draw into OUT what is seen in each image" + (
        " (objects of a score from 0.5)" if task == "det" else "") + ", by --eval CKPT (default: OUT/best.pt)")
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="NAME", help="fastvim_tiny (default), vim_small, ... (python fastvim.py lists them), or "
        "deit_tiny, deit_small, deit_base from timm")
    add("--img-size", type=whole, help=f"pixels (default {recipe['img_size']})")
    if task == "seg":
        add("--patch-size", type=whole, help="pixels (default: the model's own)")
    add("--depth", type=whole, help="blocks (default: the model's own)")
    add("--channels", type=whole, help=f"width of the heads (default {recipe['channels']})")
    if task == "det":
        add("--hidden", type=whole, help=f"width of their linear layers (default {recipe['hidden']})")
        add("--regions", type=whole, help=f"of an image, that each stage trains on (default {recipe['regions']})")
    add("--pool-scale", type=float, help="factor of mean pooling (default 1; 0.25 for what was pretrained masked)")
    add("--drop-path", type=train_imagenet.SHARE, help="stochastic depth at the last block (default: the recipe's)")
    add("--freeze", action="store_true", help="train the heads only: the backbone, with the norms of its taps, "
        "stays as it is, without drop path")
    add("--grad-checkpointing", action="store_true", help="less memory, more time, the same result")
    add = parser.add_argument_group("augmentation and schedule").add_argument
    add("--jitter", type=training.number(float, 0.01), nargs=2, metavar=("LOW", "HIGH"), help="range of a random "
        "factor of the images' size (default {:g} {:g})".format(*recipe["jitter"]))
    if task == "seg":
        add("--distort", action=argparse.BooleanOptionalAction, help="change brightness, contrast, saturation and hue "
            "at random (default: yes)")
    add("--warmup", type=training.number(int, 0), help=f"steps of linear warmup (default {recipe['warmup']})")
    add("--layer-decay", type=training.number(float, 0.01), help="patch and position embeddings learn slower by this "
        f"to the power of 13 (default {recipe['layer_decay']:g})")
    add("--decay-blocks", action="store_true", help="and blocks by a power that falls from 12 to 1 with the depth: the "
        "released detectors' configuration meant to, but its names matched no block")
    training.add_training_arguments(parser, lr=recipe["recipe_lr"], recipe_batch=recipe["recipe_batch"])
    parser.set_defaults(**{k: v for k, v in recipe.items() if k not in FLAGS})


def complete(args, content, weights, flags=FLAGS):
    """What the command line leaves open of the model: as the checkpoint `content` says or its weights show, else by the
    recipe. -> whether the drawn scenes are meant"""
    given, saved = args.pool_scale, train_imagenet.adopt(args, content, flags)
    parts = [k.split(".") for k in weights]
    blocks = [int(b) for name in parts for a, b in zip(name, name[1:]) if a in ("layers", "blocks")]
    args.depth = args.depth or (1 + max(blocks) if blocks else None)
    patch = next((w.shape[-1] for k, w in weights.items() if k.endswith("patch_embed.proj.weight")), None)
    args.patch_size = args.patch_size or patch
    if "mask_token" in weights and given is None:
        train_imagenet.unmask(args, saved)
    drawn = not args.data and (not (args.eval or args.predict) or saved and not saved["data"])
    recipe = RECIPES[args.task] | (SCENES[args.task] if drawn else {})
    vars(args).update({k: recipe.get(k) for k in FLAGS if getattr(args, k) is None})
    return drawn


# ---- Models ----------------------------------------------------------------------------------------------------------

class ViT(nn.Module):
    """The baseline: a ViT of timm as a backbone, with a LayerNorm for each tap as FastVim has it."""

    def __init__(self, name, taps, **options):
        super().__init__()
        self.taps = taps
        self.vit = data.extra("timm").create_model(name, num_classes=0, dynamic_img_size=True, dynamic_img_pad=True,
                                                   **options)
        self.vit.norm = nn.Identity()                                       # that of the classifier
        self.cfg = types.SimpleNamespace(embed_dim=self.vit.embed_dim, patch_size=self.vit.patch_embed.patch_size[0])
        self.outnorm = nn.ModuleList(ChannelNorm(self.vit.embed_dim) for _ in taps)

    def forward_intermediates(self, x):
        maps = self.vit.forward_intermediates(x, indices=self.taps, intermediates_only=True)         # [(B D h w)]
        return [norm(x) for norm, x in zip(self.outnorm, maps)]


def taps_of(task, depth):
    """Which blocks the heads see: the last one; for segmentation also those after one, two and three quarters."""
    return [depth - 1] if task == "det" else [depth * i // 4 - 1 for i in (1, 2, 3, 4)]


def build_model(args, num_classes, weights):
    """The model that args ask for, weights (those to be loaded, if any) telling whether it has Vim's first mixer.
    ValueError: an unknown name, or a depth or patch size that does not go."""
    name = train_imagenet.model_name(args).removesuffix("_patch16_224")     # as timm calls a DeiT
    names = [model for model in fastvim.list_models() if "channel" not in model] + [*VITS]
    if name not in names:
        raise ValueError(f"--model {name}: choose from {', '.join(names)}")
    rate = DROP_PATH[args.task][name.rpartition("_")[2]] if args.drop_path is None else args.drop_path
    rate = 0.0 if args.freeze else rate                                     # as it is, not thinned out at random
    given = dict(patch_size=args.patch_size, class_token=args.class_token, pool=args.pool, pool_scale=args.pool_scale,
                 schedule=args.schedule, ssm_norm=args.ssm_norm, d_conv=0 if args.no_conv else None,
                 skip_before_expand=args.skip_before_expand or None)
    given = {k: v for k, v in given.items() if v is not None}
    args.depth = args.depth or (12 if name in VITS else fastvim.SIZES[name.rpartition("_")[2]]["depth"])
    if args.task == "seg" and args.depth < 4:
        raise ValueError(f"--depth {args.depth}: segmentation looks at four blocks")
    taps, options = taps_of(args.task, args.depth), dict(img_size=args.img_size, depth=args.depth, drop_path_rate=rate)
    if name in VITS:
        if wrong := given.keys() - {"patch_size"}:
            raise ValueError(f"--model {name} is timm's and does not know {', '.join(wrong)}")
        backbone = ViT(f"{name}_patch16_224", taps, **options, **given)
        backbone.vit.set_grad_checkpointing(args.grad_checkpointing)
    else:
        if args.task == "det":
            given.setdefault("patch_size", 16)                              # FastVim-H's own is 14
        if any("layers.0.mixer." in k for k in weights) and not any("mixer.layernorm." in k for k in weights):
            given["ssm_norm"] = None
        backbone = fastvim.create_model(name, num_classes=0, block_norm="layernorm", out_indices=taps, **options,
                                        **given)
        backbone.grad_checkpointing = args.grad_checkpointing
    if args.task == "seg":
        return UperNet(backbone, num_classes, args.channels, max(args.channels // 2, 1))
    if backbone.cfg.patch_size != 16:
        raise ValueError(f"--model {name}: its patches have {backbone.cfg.patch_size} pixels, the detector's need 16")
    return CascadeMaskRCNN(backbone, num_classes, args.channels, args.hidden, args.regions)


def load_backbone(backbone, content):
    """A classifier's or an autoencoder's encoder into the backbone; returns what was taken, in words.

    Dense backbones have LayerNorm blocks: they take an RMSNorm's weights, and their biases start at 0."""
    weights = fastvim.model_weights(content)[0]
    if isinstance(backbone, ViT):
        weights = {k.removeprefix("vit."): v for k, v in weights.items()}   # of a dense model of ours
        kept = {k: v for k, v in weights.items() if not k.startswith(("norm.", "head", "fc_norm.", "outnorm."))}
        load_strictly(backbone.vit, resized_for(backbone, kept))
        return f"{len(kept)} weights taken, {len(weights) - len(kept)} of the last norm and the head dropped"
    # Taps of another dense model follow other blocks; they are as useless as the norm before a classifier.
    kept = {k: v for k, v in weights.items() if not k.startswith(("norm_f.", "outnorm_"))}
    own = backbone.state_dict()
    taps = {k: v for k, v in own.items() if k.startswith("outnorm_")}
    biases = {k: v for k, v in own.items() if k.endswith(".norm.bias") and k not in weights}
    note = fastvim.load_checkpoint(backbone, kept | taps | biases, encoder_only=True)
    return (f"{note}; {len(weights) - len(kept)} of the last norm dropped; fresh: {len(biases)} biases of the blocks' "
            "norms, the taps' norms")


def resized_for(backbone, weights):
    """The weights of a ViT of timm with the position embeddings of this one's grid."""
    return data.extra("timm.models.vision_transformer").checkpoint_filter_fn(weights, backbone.vit)


def load_strictly(model, weights):
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint belongs to another model: {str(error)[:1500]}") from error


CLASSIFIERS = "conv_seg", "fc_cls", "fc_reg", "conv_logits"                # whose shape depends on the classes


def dense_weights(task, content):
    """What fastvim.read_checkpoint returned -> {name: tensor}, those of the heads among them."""
    weights, _ = fastvim.stored_weights(content)
    kind, classifier = dict(seg=("segmenter", "decode_head.conv_seg.bias"),
                            det=("detector", "roi_head.mask_head.0.conv_logits.bias"))[task]
    if classifier not in weights:
        raise ValueError(f"the checkpoint holds no {kind}, which would have {classifier}; --backbone takes the encoder "
                         "of any model")
    return weights


def count_classes(weights):
    return len(next(v for k, v in weights.items() if k.endswith(("conv_seg.bias", "conv_logits.bias"))))


def load_dense(model, weights, num_classes):
    """Loads the weights strictly into a segmenter or detector; returns what was taken, in words. Position embeddings
    of another grid are resized, classifiers of another number of classes stay as initialised."""
    own, note = model.state_dict(), f"{len(weights)} weights"
    if count_classes(weights) != num_classes:
        kept = {k for k in own if set(k.split(".")) & set(CLASSIFIERS)}
        note += f", but {len(kept)} of the classifiers, which tell {count_classes(weights)} classes apart"
        weights = weights | {k: own[k] for k in kept}
    inner = {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
    if isinstance(model.backbone, fastvim.FastVim):
        note += f", backbone: {fastvim.load_checkpoint(model.backbone, inner)}"
        inner = model.backbone.state_dict()
    else:
        inner |= {f"vit.{k}": v for k, v in resized_for(model.backbone, {
            k.removeprefix("vit."): v for k, v in inner.items() if k.startswith("vit.")}).items()}
    weights = weights | {f"backbone.{k}": v for k, v in inner.items()}
    load_strictly(model, weights)
    return note


def no_weight_decay(task, name, param):
    """Which parameters weight decay leaves alone."""
    last = name.split(".")[-1]
    if task == "det":
        return last == "pos_embed"
    return name.startswith("backbone.") and ("norm" in name or last in (
        "pos_embed", "cls_token", "A_log", "A_b_log", "D", "D_b"))


def lr_scale(args, name, param):
    """A parameter's share of the learning rate: that of a layer is smaller the earlier it comes."""
    parts = name.split(".")
    if parts[0] != "backbone":
        return 1.0
    if {"patch_embed", "pos_embed", "cls_token"} & set(parts):
        return args.layer_decay ** 13
    block = next((int(b) for a, b in zip(parts, parts[1:]) if a in ("layers", "blocks")), None)
    if block is None or not args.decay_blocks:
        return 1.0
    return args.layer_decay ** math.ceil(12 * (args.depth - block) / args.depth)


# ---- Data ------------------------------------------------------------------------------------------------------------

def open_split(args, split, classes=None):
    """A split of --data or of the drawn scenes. classes: those that it must have, or how many."""
    train, reader = split == "train", dict(seg=data.ADE20K, det=data.Coco)[args.task]
    transform = data.DetectionTransform(args.img_size, train, args.jitter) if args.task == "det" else (
        data.SegmentationTransform(args.img_size, train, args.jitter, args.distort))
    found = reader(args.data, split, transform) if args.data else data.Scenes(
        split, transform, args.img_size, args.task == "det")
    count = len(found.classes)
    known = data.numbers(classes) if isinstance(classes, int) else classes or found.classes
    if len(known) != count or known != found.classes and data.numbers(count) not in (known, found.classes):
        raise ValueError(f"{found.where} has {count} classes ({data.some(found.classes)}), the model knows "
                         f"{len(known)} ({data.some(known)})")
    return found


def loader_of(args, ctx, dataset, train=False):
    """Segmentation is evaluated image by image, as each has a size of its own."""
    size = args.batch_size if train or args.task == "det" else 1
    return data.make_loader(dataset, size, train=train, seed=args.seed, workers=args.workers if args.data else 0,
                            rank=ctx.rank, world_size=ctx.world_size,
                            merge=data.merge_detections if args.task == "det" else data.default_collate)


# ---- Evaluation ------------------------------------------------------------------------------------------------------

def count_confusions(labels, found, K):
    """labels, found: any shape -> (K K) int64, how many pixels of which label were found to be what."""
    known = labels != IGNORE_INDEX
    return (labels[known] * K + found[known]).bincount(minlength=K * K).reshape(K, K)


def iou_of(confusion):
    """(K K) -> (K) intersection over union, in percent; NaN for a class that is neither there nor found."""
    hit = confusion.diag().double()
    return 100 * hit / (confusion.sum(0) + confusion.sum(1) - hit)


def evaluate_segmenter(args, ctx, model, loader):
    """-> {"miou", "pixels": percent of the labelled pixels that are right, "images"}, IoU of each class (K)"""
    K = len(loader.dataset.dataset.classes)
    confusion, images = torch.zeros(K, K, dtype=torch.long, device=ctx.device), torch.zeros((), device=ctx.device)
    more = dict(scales=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75), flip=True) if args.multi_scale else {}
    with torch.no_grad():
        for image, labels in filter(None, loader):
            labels = labels.to(ctx.device)
            with torch.autocast(ctx.device.type, torch.bfloat16, enabled=args.amp):
                found = segment(model, image.to(ctx.device), labels.shape[1:], crop=args.img_size,
                                stride=args.img_size * 2 // 3, **more).argmax(1)             # (1 H W)
            confusion += count_confusions(labels, found, K)
            images += 1
    iou = iou_of(ctx.sum(confusion))                                        # the sum is in place
    pixels = 100 * (confusion.diag().sum() / confusion.sum()).item()
    return dict(miou=iou.nanmean().item(), pixels=pixels, images=ctx.sum(images).item()), iou


def evaluate_detector(args, ctx, model, loader):
    """-> {"box_ap", "mask_ap", each also at IoU 0.5 and 0.75, in percent, "images"}, by pycocotools; None"""
    rle, dataset, found, images = data.extra("pycocotools.mask"), loader.dataset.dataset, [], []
    with torch.no_grad():
        for image, _, infos in filter(None, loader):
            with torch.autocast(ctx.device.type, torch.bfloat16, enabled=args.amp):
                outputs = model(image.to(ctx.device), sizes=[x["size"] for x in infos],
                                originals=[x["original"] for x in infos])
            for info, x in zip(infos, outputs):
                images.append(info["id"])
                coded = rle.encode(rearrange(x["masks"].byte(), "n h w -> h w n").cpu().numpy().copy(order="F"))
                boxes = box_convert(x["boxes"], "xyxy", "xywh").tolist()
                found += [dict(image_id=info["id"], category_id=dataset.category_ids[label], score=score, bbox=box,
                               segmentation=mask) for label, score, box, mask in zip(
                                   x["labels"].tolist(), x["scores"].tolist(), boxes, coded)]
    everyone = [(found, images)]
    if ctx.world_size > 1:
        everyone = [None] * ctx.world_size
        dist.all_gather_object(everyone, (found, images))
    return average_precision(dataset.coco, [x for found, _ in everyone for x in found],
                             sorted(i for _, images in everyone for i in images)), None


MEASURES = dict(seg=evaluate_segmenter, det=evaluate_detector)


def average_precision(coco, found, images):
    """found: in COCO's format of results; images: the ids of those looked at."""
    evaluation, metrics = data.extra("pycocotools.cocoeval").COCOeval, dict(images=len(images))
    for kind, name, other in (("bbox", "box", "segmentation"), ("segm", "mask", "bbox")):
        values = [0.0] * 3
        if found:                                                           # pycocotools cannot do without
            with contextlib.redirect_stdout(None):
                # A result is small, medium or large by its own kind of area, so it may have one only.
                results = coco.loadRes([{k: v for k, v in x.items() if k != other} for x in found])
                result = evaluation(coco, results, kind)
                result.params.imgIds = images
                result.evaluate()
                result.accumulate()
                result.summarize()
            values = result.stats[:3]
        metrics |= {f"{name}_ap{at}": 100 * float(value) for at, value in zip(("", "50", "75"), values)}
    return metrics


# ---- Training --------------------------------------------------------------------------------------------------------

def train(args, ctx):
    path = args.init or args.backbone
    content, resumed = train_imagenet.read_start(args, path)
    whole = resumed or args.init
    weights = {} if not path else dense_weights(args.task, content) if whole else fastvim.model_weights(content)[0]
    complete(args, content, weights, MODEL_FLAGS if whole else BACKBONE_FLAGS)
    train_set = open_split(args, "train")
    args.classes = train_set.classes                                        # kept in the checkpoint
    val_set = open_split(args, "val", args.classes)
    model = build_model(args, len(args.classes), weights)
    if path and not resumed:
        ctx.print(f"{path}:", load_dense(model, weights, len(args.classes)) if whole else
                  load_backbone(model.backbone, content))
    model.backbone.requires_grad_(not args.freeze)
    synchronous = ctx.world_size > 1 and ctx.device.type == "cuda"          # PyTorch's SyncBatchNorm is for GPUs only
    if args.task == "seg" and args.batch_size == 1 and not synchronous:
        raise ValueError("--batch-size 1: BatchNorm needs two images in each process (or, on several GPUs, in all)")
    if synchronous:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(ctx.device)
    loader, val_loader = loader_of(args, ctx, train_set, train=True), loader_of(args, ctx, val_set)
    ctx.print(f"{train_imagenet.model_name(args)}: {sum(p.numel() for p in model.parameters()):,} parameters, "
              f"{len(args.classes)} classes, {len(train_set):,} training and {len(val_set):,} validation images")

    def loss_fn(net, batch):
        if args.task == "seg":
            return sum(net(*batch).values())
        images, targets, infos = batch
        return sum(net(images, targets, [info["size"] for info in infos]).values())

    def evaluate(model, epoch):
        metrics, _ = MEASURES[args.task](args, ctx, model, val_loader)
        return metrics | {"unreadable": training.count_bad(ctx, train_set, val_set)}

    groups = training.parameter_groups(model, args.weight_decay, functools.partial(no_weight_decay, args.task),
                                       functools.partial(lr_scale, args))
    total, _ = training.run_length(args, loader)

    def lr(step):
        if args.task == "seg":
            return training.polynomial(step, total, args.lr, warmup=args.warmup)
        return training.step_decay(step, args.lr, [round(total * share) for share in DROPS], warmup=args.warmup)

    training.fit(args, ctx, model, loader, loss_fn, torch.optim.AdamW(groups, lr=args.lr), lr, evaluate=evaluate,
                 metric=dict(seg="miou", det="box_ap")[args.task],
                 harmless=("data", "eval", "predict", "backbone", "init", "grad_checkpointing", "multi_scale"))
    if ctx.is_main:
        draw_examples(args, ctx, model, val_set)


def restore(args, ctx, path):
    """-> the model with the weights at path, and the names of its classes."""
    content = fastvim.read_checkpoint(path)
    weights = dense_weights(args.task, content)
    drawn = complete(args, content, weights)
    model = build_model(args, count_classes(weights), weights)
    ctx.print(f"{path}: {load_dense(model, weights, count_classes(weights))}")
    if not (args.predict or args.data or drawn):
        raise ValueError("--eval: this model was trained on files, so --data has to say where they are")
    return model.to(ctx.device).eval(), args.classes or names_of(args.task, count_classes(weights))


def names_of(task, count):
    """Names for the classes of a released model: COCO's, or numbers, ADE20K's."""
    coco = data.extra("torchvision.models.detection").MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    coco = [name for name in coco if name not in ("__background__", "N/A")]
    return coco if task == "det" and count == len(coco) else data.numbers(count)


def evaluate(args, ctx):
    model, classes = restore(args, ctx, args.eval)
    dataset = open_split(args, "val", args.classes or len(classes))
    metrics, iou = MEASURES[args.task](args, ctx, model, loader_of(args, ctx, dataset))
    if iou is not None:
        ctx.print("\n".join(f"{value:6.1f}  {name}" for name, value in zip(dataset.classes, iou.tolist())))
    metrics |= dict(unreadable=training.count_bad(ctx, dataset))
    ctx.print(", ".join(f"{name} {value:.2f}" for name, value in metrics.items()))


# ---- Pictures --------------------------------------------------------------------------------------------------------

def colour(i):
    """A colour for class i: hues at the golden angle never come close to each other soon."""
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.5 + 0.5 * (i % 3 != 1), 1.0))


@torch.no_grad()
def draw_seen(args, ctx, model, classes, pixels):
    """pixels (3 H W) uint8 -> a picture of what the model sees there, PIL, with 200 to 1600 pixels on its long side."""
    long = max(pixels.shape[1:])
    H, W = (max(1, round(length * min(max(1, 400 // long), 1600 / long))) for length in pixels.shape[1:])
    canvas = F.interpolate(pixels[None].float(), (H, W), mode="area")[0].byte()              # (3 H W)
    if args.task == "det":
        image, _, info = data.DetectionTransform(args.img_size, False)(
            pixels, dict(id=0, labels=torch.zeros(0), masks=pixels[:0]))
        [found] = model(image[None].to(ctx.device), sizes=[info["size"]], originals=[(H, W)])
        found = {k: v[found["scores"] >= 0.5].cpu() for k, v in found.items()}
        colours = [colour(i) for i in found["labels"].tolist()]
        texts = [f"{classes[i]} {score:.2f}" for i, score in zip(found["labels"].tolist(), found["scores"].tolist())]
        if texts:
            canvas = draw_segmentation_masks(canvas, found["masks"], 0.5, colours)
            canvas = draw_bounding_boxes(canvas, found["boxes"], texts, colours, width=2)
        return to_pil_image(canvas)
    image, _ = data.SegmentationTransform(args.img_size, False)(pixels, pixels[0])
    found = segment(model, image[None].to(ctx.device), (H, W), crop=args.img_size, stride=args.img_size * 2 // 3)
    found = found[0].argmax(0).cpu()                                        # (H W)
    shown = found.unique()                                                  # (classes)
    colours = [colour(i) for i in shown.tolist()]
    canvas = draw_segmentation_masks(canvas, found == shown[:, None, None], 0.5, colours)
    canvas = to_pil_image(F.pad(canvas, (0, 120, 0, max(0, 14 * len(shown) + 12 - H))))
    pencil = data.extra("PIL.ImageDraw").Draw(canvas)                       # a legend at the right
    for line, (i, fill) in enumerate(zip(shown.tolist(), colours)):
        pencil.text((W + 8, 6 + 14 * line), classes[i], fill=fill)
    return canvas


def save_picture(args, name, picture):
    pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)
    picture.save(pathlib.Path(args.out, name))
    print(f"{args.out}/{name}")


def draw_examples(args, ctx, model, dataset, count=4):
    """OUT/example-0.png ...: what the model sees in the first validation images."""
    for i, sample in enumerate(dataset.samples[:count]):
        try:
            pixels = dataset.load(*sample)[0]
        except Exception:                                                   # it has been reported as a bad file
            continue
        save_picture(args, f"example-{i}.png", draw_seen(args, ctx, model.eval(), args.classes, pixels))


def predict(args, ctx):
    """Draws OUT/NAME-seg.png or -det.png of each image; of a second one of that name NAME-2-..., and so on."""
    path = args.eval or f"{args.out}/best.pt"
    if not args.eval and args.out == RECIPES[args.task]["out"] and not pathlib.Path(path).exists():
        path = f"{SCENES[args.task]['out']}/best.pt"                        # where a run without --data leaves it
    model, classes = restore(args, ctx, path)
    names = collections.Counter()
    for path, image in data.each_readable(args.predict, data.load_rgb):
        stem = pathlib.Path(path).stem
        names[stem] += 1
        number = f"-{names[stem]}" if names[stem] > 1 else ""
        picture = draw_seen(args, ctx, model, classes, data.to_pixels(image))
        save_picture(args, f"{stem}{number}-{args.task}.png", picture)


def main():
    args = get_args()
    with training.plain_errors("finetune_dense.py", args, data.BadDataError, OSError):
        ctx = training.setup(args, training=not (args.eval or args.predict))
        if args.predict:
            if ctx.is_main:
                predict(args, ctx)
        elif args.eval:
            evaluate(args, ctx)
        else:
            if not args.data:
                ctx.print("no --data: training on drawn scenes, by a recipe scaled to them")
            train(args, ctx)
        ctx.close()


if __name__ == "__main__":
    main()
