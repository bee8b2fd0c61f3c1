"""What timm, torch.hub and the Hugging Face hub ask of a backbone, for every FastVim.

    model.save_pretrained("folder")                     # config.json and model.safetensors
    model.push_to_hub("user/name")
    model = fastvim.FastVim.from_pretrained("folder")   # or "user/name"; strict, and runs no code

    import fastvim_timm                                 # or fastvim, after timm
    model = timm.create_model("fastvim_tiny", num_classes=10)
    maps = timm.create_model("fastvim_tiny", features_only=True, out_indices=(5, 11, 17, 23))(x)

timm and huggingface_hub are imported by the calls that need them, not before."""
import dataclasses
import functools
import inspect
import json
import logging
import math
import os
import sys
import tempfile
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

import checkpoints
import checks

log = logging.getLogger("fastvim")

# What the images of train_imagenet.py go through.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
CROP_PCT = 0.875

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
NO_WEIGHTS = ("pretrained=True: no weights come with this project; download a checkpoint from the "
              "release v0 of the paper's authors, whose licence excludes commercial use, and load "
              "it by fastvim.load_checkpoint(model, file)")


def default_cfg(cfg) -> dict:
    """What timm wants to know of a model with these fields of fastvim.Config: its images, or the
    frames of its videos, the name of its first convolution and of its classifier. Images of other
    than three channels have the mean of ImageNet's statistics in each, as timm has it."""
    channels = cfg.in_chans
    mean = MEAN
    std = STD
    if channels != 3:
        mean = (sum(MEAN) / 3,) * channels
        std = (sum(STD) / 3,) * channels
    first_conv = "patch_embed.proj" if len(cfg.extents) == 2 else None      # timm knows Conv2d
    return {"input_size": (channels, *cfg.img_size), "mean": mean, "std": std,
            "interpolation": "bicubic", "crop_pct": CROP_PCT, "num_classes": cfg.num_classes,
            "first_conv": first_conv, "classifier": "head"}


class Described:
    """The attribute default_cfg of a model, until another one is assigned to the model."""

    def __get__(self, model, owner=None):
        return default_cfg(model.cfg)


class Backbone(nn.Module):
    """The base class of FastVim, which has cfg, grid_size, pos_embed, layers, norm_f and head."""

    default_cfg = Described()
    pretrained_cfg = Described()            # timm's other name for it

    def __prepare_scriptable__(self):       # torch.jit.script asks for it
        raise RuntimeError("torch.jit.script cannot read these models: use torch.export.export, "
                           "torch.jit.trace or torch.onnx.export")

    @property
    def num_features(self) -> int:
        """The width of the tokens, and of what the head is given."""
        return self.cfg.embed_dim

    embed_dim = num_features
    head_hidden_size = num_features

    @property
    def num_classes(self) -> int:
        return self.cfg.num_classes

    @property
    def in_chans(self) -> int:
        return self.cfg.in_chans

    @property
    def num_prefix_tokens(self) -> int:
        """How many of the tokens are no patches. A class token is not the first: see Config."""
        return int(self.cfg.class_token)

    @property
    def global_pool(self) -> str:
        """What the head is given: "token", the class token, or "avg", the mean over tokens."""
        return "token" if self.cfg.class_token else "avg"

    @property
    def feature_info(self) -> list[dict]:
        """Of each block: the width and the pixels per token of its output, and its name."""
        info = {"num_chs": self.cfg.embed_dim, "reduction": self.cfg.patch_size}
        return [{**info, "module": f"layers.{i}"} for i in range(self.cfg.depth)]

    def forward_intermediates(self, x: Tensor, indices=None, channels=None) -> list[Tensor]:
        """Images -> feature maps (b d h w), (b d c h w) or (b d t h w), after the blocks `indices`:
        their own output, not the residual stream, through outnorm_i if the model has out_indices
        (then `indices` is those). So the released dense models were built."""
        cfg = self.cfg
        if indices is None:
            indices = cfg.out_indices
        indices = checks.as_plain(indices)
        checks.check_taps(indices, cfg)
        tokens, grids, ids, sizes = self._embed(x, None, channels)
        maps = {}
        for i, (hidden, _) in enumerate(self._run(tokens, grids)):
            if i not in indices:
                continue
            if ids is not None:                             # leave the class token out
                at = self._class_slot(**sizes)
                hidden = torch.cat([hidden[:, :at], hidden[:, at + 1:]], 1)
            if cfg.out_indices is not None:
                hidden = self.get_submodule(f"outnorm_{list(indices).index(i)}")(hidden)
            axes = " ".join(sizes)
            maps[i] = rearrange(hidden, f"b ({cfg.storage}) d -> b d {axes}", **sizes)
            if i == max(indices):
                break
        return [maps[i] for i in indices]

    def forward_head(self, tokens: Tensor, pre_logits: bool = False, keep=None) -> Tensor:
        """What forward does with the tokens (b s d) of forward_features -> logits (b num_classes),
        or with pre_logits what the head is given (b d). keep: that of forward_features, if any.

        Raises ValueError where the place of the class token cannot be known: in a model that pools,
        it depends on the height of the image, so that only images of img_size are read."""
        cfg = self.cfg
        checks.check_has_head(cfg)
        if tokens.ndim != 3 or tokens.shape[2] != cfg.embed_dim:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)} are not the (b s "
                             f"{cfg.embed_dim}) of forward_features")
        if cfg.class_token:
            x = tokens[:, self._class_place(tokens.shape[1], keep is not None)]
        elif keep is None:
            x = tokens.mean(1)
        else:                               # sorted, padding last, as forward_features has them
            keep = torch.as_tensor(keep, device=tokens.device)
            real = (keep >= 0).sort(1, descending=True).values
            real = real.to(tokens)[..., None]               # (b s 1)
            x = (tokens * real).sum(1) / real.sum(1)
        return x if pre_logits else self.head(x)            # (b d)

    def _class_place(self, count, masked):
        """Which of `count` tokens is the class token."""
        if masked or self.cfg.per_channel or not self.cfg.rows[0][1]:
            return (count - 1) // 2
        lengths = [math.ceil(length / patch) for length, patch in self.cfg.extents.values()]
        own = math.prod(lengths) + 1
        if count != own:
            raise ValueError(f"forward_head finds the class token among the {own} tokens of "
                             f"an image of {self.cfg.img_size}, not among {count}: call the model "
                             "itself for images of other sizes, or pass keep=")
        return self._class_slot(*self.grid_size)

    def get_classifier(self) -> nn.Module:
        """The head: a Linear, or Identity with num_classes=0."""
        checks.check_has_head(self.cfg)
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for so many classes, or none for 0. Raises ValueError for a global_pool that
        is not the model's."""
        checks.check_has_head(self.cfg)
        check_pool(self.cfg, global_pool)
        cfg = dataclasses.replace(self.cfg, num_classes=num_classes)        # ValueError if wrong
        head = nn.Identity()
        if num_classes:
            like = self.pos_embed
            head = nn.Linear(cfg.embed_dim, num_classes, device=like.device, dtype=like.dtype)
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.head = head
        self.cfg = cfg

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward pass, and compute the rest again."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay, as for fine-tuning: position embeddings,
        class token, biases, D. One-dimensional ones are everybody's own rule. A_log decays, as when
        the released models were trained."""
        return {name for name, _ in self.named_parameters()
                if name in ("pos_embed", "cls_token")
                or name.endswith((".time_embed", "bias", ".D"))}

    def group_matcher(self, coarse: bool = False) -> dict:
        """For layer-wise decay: what comes before the blocks, each block; norm and head are last.
        There are no stages, so that coarse groups are the same."""
        return {"stem": r"^(?:patch_embed|pos_embed|cls_token)", "blocks": r"^layers\.(\d+)"}

    # ---- The Hugging Face hub --------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes config.json, the fields of Config, and model.safetensors into the folder.

        Raises ValueError where they would not give this model again."""
        fields = dataclasses.asdict(self.cfg)
        others = inspect.signature(type(self)).parameters.keys() - {"fields"}
        if others:
            raise ValueError(f"a {type(self).__name__} is also made from {', '.join(others)}, "
                             f"which {CONFIG} does not hold: keep its state_dict instead")
        weights = self.state_dict()
        with torch.device("meta"):
            made = type(self)(**fields).state_dict()
        shapes = {name: value.shape for name, value in weights.items()}
        expected = {name: value.shape for name, value in made.items()}
        changed = sorted({name for name, _ in shapes.items() ^ expected.items()})
        if changed:
            raise ValueError(f"{', '.join(changed[:4])} changed since the model was made, which "
                             f"{CONFIG} does not hold: keep its state_dict instead, or make a "
                             "fresh head by reset_classifier")
        from safetensors.torch import save
        os.makedirs(folder, exist_ok=True)
        weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        with open(os.path.join(folder, WEIGHTS), "wb") as file:     # by the user's umask
            file.write(save(weights, {"format": "pt"}))
        with open(os.path.join(folder, CONFIG), "w") as file:
            json.dump(fields, file, indent=2)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, *, revision: str | None = None,
                        token: str | bool | None = None, cache_dir: str | os.PathLike | None = None,
                        force_download: bool = False, local_files_only: bool = False, **fields):
        """The model that save_pretrained wrote into the folder `name`, or that the hub has under
        user/name, for inference: in eval mode. fields override those of config.json.

        Raises ValueError if weights and fields do not agree, FileNotFoundError."""
        folder = os.fspath(name)
        if not os.path.isdir(folder):
            folder = download(folder, revision=revision, token=token, cache_dir=cache_dir,
                              force_download=force_download, local_files_only=local_files_only)
        path = os.path.join(folder, CONFIG)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no {CONFIG} in {folder}: it is no folder of save_pretrained")
        with open(path) as file:
            saved = json.load(file)
        if not isinstance(saved, dict) or "architecture" in saved:
            raise ValueError(f"{path} does not hold the fields of a model, as save_pretrained "
                             "writes them; timm.create_model reads timm's")
        for field, value in saved.items():
            if isinstance(value, list):
                saved[field] = tuple(value)
        model = cls(**{**saved, **fields})
        note = checkpoints.load(model, os.path.join(folder, WEIGHTS))
        log.info("%s: %s", name, note)
        return model.eval()

    def push_to_hub(self, repo_id: str, *, private: bool | None = None,
                    token: str | bool | None = None, revision: str | None = None,
                    commit_message: str = "Add model", create_pr: bool = False):
        """What save_pretrained writes, to the hub: user/name, made if it is new."""
        api = hub().HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return api.upload_folder(repo_id=repo.repo_id, folder_path=folder, revision=revision,
                                     commit_message=commit_message, create_pr=create_pr)


def hub():
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("the Hugging Face hub is reached by huggingface_hub, which is not here: "
                          "pip install huggingface_hub") from error
    return huggingface_hub


def download(name, **options) -> str:
    """The folder of the hub's cache that holds the model user/name."""
    user, slash, rest = name.partition("/")
    if not slash or "/" in rest or user in ("", ".", ".."):
        raise FileNotFoundError(f"{name} is neither a folder nor, as user/name, a model of the hub")
    return hub().snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS], **options)


def check_pool(cfg, global_pool):
    own = "token" if cfg.class_token else "avg"
    if global_pool not in (None, own):
        raise ValueError(f"global_pool={global_pool!r}: the head of this model is given its "
                         f"{own!r}, by class_token={cfg.class_token}; forward_features gives all "
                         "tokens")


# ---- timm ----------------------------------------------------------------------------------------

default_cfgs = {}                           # name -> default_cfg, where timm's registry looks


def register(names: list[str], create: Callable) -> None:
    """If timm is loaded, timm.create_model knows the models; create(name, **fields) makes one."""
    models = getattr(sys.modules.get("timm"), "models", None)
    register_model = getattr(models, "register_model", None)
    if register_model is None:              # there is no timm, or one of before 2023
        return
    for name in names:
        if not models.is_model(name):
            with torch.device("meta"):
                default_cfgs[name] = default_cfg(create(name, depth=1).cfg)
            entry = functools.partial(build, name, create)
            entry.__name__ = name
            entry.__module__ = __name__
            register_model(entry)


def build(name: str, create: Callable, pretrained: bool = False, pretrained_cfg=None,
          pretrained_cfg_overlay: dict | None = None, **options) -> nn.Module:
    """What timm.create_model calls. pretrained: reads pretrained_cfg_overlay["file"], as
    fastvim.load_checkpoint does, without its head if that is of another number of classes.

    Raises ValueError for what the models do not know; options are fields of fastvim.Config."""
    from timm.models import build_model_with_cfg, resolve_pretrained_cfg
    source = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay)
    from_file = pretrained and source.file and source.source != "local-dir"
    if pretrained and not source.has_weights and not source.state_dict:
        raise ValueError(NO_WEIGHTS)
    if options.pop("feature_cls", "getter") != "getter":
        raise ValueError("feature_cls: features_only of these models has a class of its own, which "
                         "calls forward_intermediates")
    def make(drop_rate=0.0, global_pool=None, **fields):
        if drop_rate:
            raise ValueError(f"drop_rate={drop_rate}: there is no dropout before the head; "
                             "drop_path_rate is stochastic depth")
        model = create(name, **fields)
        check_pool(model.cfg, global_pool)
        model.register_load_state_dict_pre_hook(take_released_names)
        if from_file:
            log.info("%s: %s", name, load_source(model, source))
        return model

    model = build_model_with_cfg(
        make, name, pretrained and not from_file, source, feature_cfg={"feature_cls": Features,
        "out_indices": None}, pretrained_filter_fn=checkpoints.from_released, **options)
    described = default_cfg(getattr(model, "model", model).cfg)     # of Features, that within
    for key in ("input_size", "mean", "std"):               # unless the caller said otherwise
        if tuple(getattr(source, key)) == default_cfgs[name][key]:
            model.pretrained_cfg[key] = described[key]
    return model


def load_source(model, source) -> str:
    """Loads the file of a timm.models.PretrainedCfg; returns what was taken."""
    content = checkpoints.read(source.file)
    head = checkpoints.model_weights(content)[0].get("head.weight", torch.empty(0))
    other = model.num_classes != source.num_classes and len(head) != model.num_classes
    return checkpoints.load(model, content, encoder_only=other)


def take_released_names(model, weights, *_):
    """Before load_state_dict: weights under the released names get ours, in place."""
    renamed = checkpoints.from_released(weights)
    weights.clear()
    weights.update(renamed)


class Features(nn.Module):
    """features_only=True: images -> the maps (b d h w) of some blocks, as forward_intermediates
    gives them. Blocks behind them, norm_f and head are left out."""

    def __init__(self, model: Backbone, out_indices: int | tuple | None = None):
        from timm.models import FeatureInfo
        super().__init__()
        depth = model.cfg.depth
        if len(model.cfg.extents) == 3:
            axes = " ".join(model.cfg.extents)
            raise ValueError(f"features_only: the maps of this model are (b d {axes}), for each "
                             "channel or time, not timm's (b d h w); call forward_intermediates")
        if out_indices is None:                             # the last block of each quarter
            out_indices = sorted({max(depth * part // 4, 1) - 1 for part in range(1, 5)})
        if type(out_indices) is int:                        # as in timm: the last ones
            out_indices = range(max(depth - out_indices, 0), depth)
        blocks = [i + depth if i < 0 else i for i in checks.as_plain(out_indices)]
        checks.check_blocks("out_indices", blocks, depth)
        self.feature_info = FeatureInfo(model.feature_info, tuple(blocks))
        self.out_indices = blocks
        model.layers = model.layers[:max(blocks) + 1]
        model.norm_f = nn.Identity()
        model.reset_classifier(0)
        self.model = model

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.model.set_grad_checkpointing(enable)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.model.forward_intermediates(x, self.out_indices)
