"""
Segmenters and detectors as finetune_dense.py's options ask for them, and their weights.

A model is a backbone, whose blocks are looked at by UperNet or Cascade Mask R-CNN (dense_heads.py).
Its weights come from a released dense checkpoint or one of ours, position embeddings resized, or
those of its backbone from a classifier or masked autoencoder.
"""
import re

from torch import Tensor, nn

import checkpoints
import data
import fastvim
import runs
from baselines import DenseViT
from dense_heads import CascadeMaskRCNN, UperNet

VITS = ("deit_tiny", "deit_small", "deit_base")
DROP_PATH = {                                   # released FastVim-T and S for seg: 0.1
    "seg": {"tiny": 0.05, "small": 0.05, "base": 0.4, "large": 0.4, "huge": 0.4},
    "det": {"tiny": 0.1, "small": 0.1, "base": 0.4, "large": 0.4, "huge": 0.4},
}
CLASSIFIERS = {"conv_seg", "fc_cls", "fc_reg", "conv_logits"}       # as wide as there are classes

# ---- Building ------------------------------------------------------------------------------------


def model_name(args: runs.Options) -> str:
    return args.model.removesuffix("_patch16_224")      # as timm calls a DeiT


def size_of(args: runs.Options) -> str:
    return model_name(args).rpartition("_")[2]


def depth_of(args: runs.Options) -> int:
    if args.depth:
        return args.depth
    if model_name(args) in VITS:
        return 12
    return fastvim.SIZES[size_of(args)]["depth"]


def taps_of(task: str, depth: int) -> list[int]:
    """Which blocks the heads see: the last one; for segmentation also those after one, two and
    three quarters."""
    if task == "det":
        return [depth - 1]
    return [depth * quarters // 4 - 1 for quarters in (1, 2, 3, 4)]


def backbone_fields(args: runs.Options) -> dict:
    """What the backbone is made with, besides its name and its taps."""
    fields = {"drop_path_rate": DROP_PATH[args.task][size_of(args)], **runs.model_fields(args)}
    if args.freeze:
        fields["drop_path_rate"] = 0.0          # as it is, not thinned out at random
    if model_name(args) not in VITS:
        fields |= {"num_classes": 0, "block_norm": "layernorm"}
    return fields


def build_backbone(args: runs.Options) -> nn.Module:
    """ValueError: an unknown name, an option that the model does not have, too few blocks."""
    name = model_name(args)
    names = [model for model in fastvim.list_models()
             if "channel" not in model and "video" not in model] + list(VITS)
    if name not in names:
        raise ValueError(f"--model {name}: choose from {', '.join(names)}")
    depth = depth_of(args)
    if args.task == "seg" and depth < 4:
        raise ValueError(f"--depth {depth}: segmentation looks at four blocks")
    taps = taps_of(args.task, depth)
    fields = backbone_fields(args)
    if name not in VITS:
        backbone = fastvim.create_model(name, out_indices=taps, **fields)
        backbone.grad_checkpointing = args.grad_checkpointing
        return backbone
    unknown = fields.keys() - {"img_size", "patch_size", "depth", "drop_path_rate"}
    if unknown:
        raise ValueError(f"--model {name} is timm's and does not know {', '.join(unknown)}")
    backbone = DenseViT(f"{name}_patch16_224", taps, **fields)
    backbone.vit.set_grad_checkpointing(args.grad_checkpointing)
    return backbone


def build_model(args: runs.Options, num_classes: int) -> UperNet | CascadeMaskRCNN:
    """The model that args ask for. ValueError: as build_backbone, or patches that do not go."""
    backbone = build_backbone(args)
    if args.task == "seg":
        return UperNet(backbone, num_classes, args.channels, max(args.channels // 2, 1))
    if backbone.cfg.patch_size != 16:
        raise ValueError(f"--model {model_name(args)}: its patches have {backbone.cfg.patch_size} "
                         "pixels, the detector's need 16")
    return CascadeMaskRCNN(backbone, num_classes, args.channels, args.hidden, args.regions)


# ---- Weights -------------------------------------------------------------------------------------

def dense_weights(task: str, content: dict) -> dict[str, Tensor]:
    """What checkpoints.read returned -> {name: tensor}, those of the heads among them. ValueError:
    there is no model of that task."""
    weights = checkpoints.from_released(checkpoints.stored_weights(content)[0])
    kind, classifier = {"seg": ("segmenter", "decode_head.conv_seg.bias"),
                        "det": ("detector", "roi_head.mask_head.0.conv_logits.bias")}[task]
    if classifier not in weights:
        raise ValueError(f"the checkpoint holds no {kind}, which would have {classifier}; "
                         "--backbone takes the encoder of any model")
    return weights


def count_classes(weights: dict[str, Tensor]) -> int:
    return next(len(weight) for name, weight in weights.items()
                if name.endswith(("conv_seg.bias", "conv_logits.bias")))


def options_shown(weights: dict[str, Tensor]) -> dict:
    """What the weights of a backbone, or of a model around it, show of its options."""
    options = {}
    blocks = re.findall(r"^(?:.*\.)?(?:layers|blocks)\.(\d+)\.", "\n".join(weights), re.MULTILINE)
    if blocks:
        options["depth"] = 1 + max(map(int, blocks))
    for name, weight in weights.items():
        if name.endswith("patch_embed.proj.weight"):
            options["patch_size"] = weight.shape[-1]
    mixer = [name for name in weights if "layers.0.mixer." in name]
    if mixer and not any(".mixer.layernorm." in name for name in mixer):
        options["ssm_norm"] = "none"            # Vim's first mixer
    return options


def load_backbone(backbone: nn.Module, content: dict) -> str:
    """A classifier's or an autoencoder's encoder into the backbone -> what was taken, in words.

    Dense backbones have LayerNorm blocks: they take an RMSNorm's weights, their biases start at 0.
    Taps of another dense model follow other blocks: useless, as is the norm before a classifier.
    ValueError: the encoder is of another shape."""
    weights = checkpoints.model_weights(content)[0]
    if isinstance(backbone, DenseViT):
        weights = {name.removeprefix("vit."): weight for name, weight in weights.items()}
        taken = without(weights, "norm.", "head", "fc_norm.", "outnorm.")
        load_strictly(backbone.vit, resized_for(backbone, taken))
        return (f"{len(taken)} weights taken, {len(weights) - len(taken)} of the last norm and the "
                "head dropped")
    taken = without(weights, "norm_f.", "outnorm_")
    own = backbone.state_dict()
    taps = {name: weight for name, weight in own.items() if name.startswith("outnorm_")}
    biases = {name: weight for name, weight in own.items()
              if name.endswith(".norm.bias") and name not in weights}
    note = checkpoints.load(backbone, taken | taps | biases, encoder_only=True)
    return (f"{note}; {len(weights) - len(taken)} of the last norm dropped; fresh: {len(biases)} "
            "biases of the blocks' norms, the taps' norms")


def load_dense(model: UperNet | CascadeMaskRCNN, weights: dict[str, Tensor],
               num_classes: int) -> str:
    """Loads the weights strictly -> what was taken, in words. Position embeddings of another grid
    are resized, classifiers of another number of classes stay as initialised."""
    own = model.state_dict()
    note = f"{len(weights)} weights"
    if count_classes(weights) != num_classes:
        kept = {name: own[name] for name in own if CLASSIFIERS & set(name.split("."))}
        note += (f", but {len(kept)} of the classifiers, which tell {count_classes(weights)} "
                 "classes apart")
        weights = weights | kept
    inner = within(weights, "backbone.")
    if isinstance(model.backbone, DenseViT):
        vit = resized_for(model.backbone, within(inner, "vit."))
        inner |= {f"vit.{name}": weight for name, weight in vit.items()}
    else:
        note += f", backbone: {checkpoints.load(model.backbone, inner)}"
        inner = model.backbone.state_dict()
    load_strictly(model, weights | {f"backbone.{name}": weight for name, weight in inner.items()})
    return note


def without(weights: dict[str, Tensor], *beginnings: str) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights.items() if not name.startswith(beginnings)}


def within(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those of that prefix, without it."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items()
            if name.startswith(prefix)}


def resized_for(backbone: DenseViT, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a ViT of timm with the position embeddings of this one's grid."""
    vision_transformer = data.extra("timm.models.vision_transformer")
    return vision_transformer.checkpoint_filter_fn(weights, backbone.vit)


def load_strictly(model: nn.Module, weights: dict[str, Tensor]) -> None:
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint belongs to another model: {str(error)[:1500]}") from error
