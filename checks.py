"""What a user can get wrong in fastvim.py is refused here, in one sentence, before anything runs.

fastvim.check calls these at the public doors. They raise TypeError or ValueError."""
import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16,
            torch.uint32, torch.uint64)
LEAST = {"patch_size": 1, "in_chans": 1, "num_classes": 0, "embed_dim": 1, "depth": 1, "d_state": 1,
         "d_conv": 0, "expand": 1, "dt_rank": 1}            # fields of whole numbers
SWITCHES = ("class_token", "skip_before_expand", "hcs", "hcs_sorted")


def as_plain(value):
    """Numbers of NumPy, alone or in an array, list or tuple, as Python's; others as they are."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return type(value)(map(as_plain, value))
    return value


def check_fields(fields: dict, config: type):
    known = [field.name for field in dataclasses.fields(config)]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"unknown option {', '.join(unknown)}; choose from {', '.join(known)}")


def check_name(name: str, families: dict, sizes: dict):
    family, _, size = str(name).rpartition("_")
    if family not in families or size not in sizes:
        raise ValueError(f"unknown model {name!r}; choose a family from {', '.join(families)} and "
                         f"a size from {', '.join(sizes)}, for example fastvim_tiny")


def check_config(cfg, schedules: dict, norms: dict, pools: dict):
    """Every field of a fastvim.Config; of three of them, the tables of their values are given.
    Numbers of NumPy become Python's, which checkpoints can hold."""
    for name, value in vars(cfg).items():
        object.__setattr__(cfg, name, as_plain(value))

    def require(field, right, must):
        if not right:
            raise ValueError(f"{field}={getattr(cfg, field)!r} {must}")

    def is_number(value):
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    choices = {"schedule": schedules, "block_norm": norms, "ssm_norm": [None, *norms],
               "pool": pools, "mask_divisor": ["axis", "count"]}
    for field, names in choices.items():
        known = getattr(cfg, field) in list(names)
        require(field, known, f"is unknown; choose from {', '.join(map(str, names))}")
    for field, least in LEAST.items():
        value = getattr(cfg, field)
        whole = type(value) is int and value >= least or field == "dt_rank" and value is None
        require(field, whole, f"must be a whole number of at least {least}")
    for field in SWITCHES:
        require(field, isinstance(getattr(cfg, field), bool), "must be True or False")
    size = cfg.img_size
    fits = isinstance(size, tuple) and len(size) == 2
    fits = fits and all(type(side) is int and side >= cfg.patch_size for side in size)
    require("img_size", fits, "must be one size or (height, width) in whole pixels, of at least "
                              f"one patch ({cfg.patch_size} px)")
    rate = cfg.drop_path_rate
    require("drop_path_rate", is_number(rate) and 0 <= rate < 1, "must be a number in [0, 1)")
    scale = cfg.pool_scale
    require("pool_scale", is_number(scale) and 0 < scale < math.inf, "must be a positive number")
    pooling = any(pooled for _, pooled in cfg.rows)
    like = f"schedule={cfg.schedule!r}"
    require("pool", pooling or cfg.pool == "mean", f"has nothing to pool in {like}")
    require("pool_scale", scale == 1 or pooling and cfg.pool == "mean",
            f"scales mean pooling only; this model has {like}, pool={cfg.pool!r}")
    if cfg.out_indices is not None:
        check_blocks("out_indices", cfg.out_indices, cfg.depth)


def check_blocks(name: str, indices: Sequence[int], depth: int):
    indices = as_plain(indices)
    blocks = tuple(indices) if isinstance(indices, Sequence) else ()
    exist = blocks and all(type(i) is int and 0 <= i < depth for i in blocks)
    if not exist or len(set(blocks)) < len(blocks):
        raise ValueError(f"{name}={indices!r} must list different blocks between 0 and {depth - 1}")


def check_taps(indices: Sequence[int], cfg):
    check_blocks("indices", indices, cfg.depth)
    if cfg.out_indices is not None and tuple(cfg.out_indices) != tuple(indices):
        norms = f"the model has norms for out_indices={cfg.out_indices}"
        raise ValueError(f"indices={tuple(indices)}, but {norms}")


def check_has_head(cfg):
    if cfg.out_indices is not None:
        raise ValueError("a model with out_indices has no final norm or head: use "
                         "forward_intermediates")


def check_sampling():
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        raise RuntimeError("in training, every call draws how many channels it takes, which an "
                           "exported program cannot: call model.eval(), or build it with hcs=False")


def check_images(x: Tensor, channels, cfg):
    if not isinstance(x, Tensor):
        raise TypeError(f"images must be a float tensor (B, C, H, W), not {type(x).__name__}")
    if x.ndim != 4 or not x.is_floating_point():
        what = f"{x.dtype} of shape {tuple(x.shape)}"
        raise TypeError(f"images must be a float tensor (B, C, H, W), not {what}")
    if min(x.shape[2:]) < 1:
        raise ValueError(f"images of shape {tuple(x.shape)} have no pixels")
    c = x.shape[1]
    if not cfg.per_channel and channels is not None:
        raise ValueError("channels= is for per-channel models; this model mixes its channels in "
                         "patch_embed")
    last = cfg.in_chans - 1
    if channels is None and c != cfg.in_chans:
        hint = f": say which they are by channels=[ids between 0 and {last}]"
        raise ValueError(f"images have {c} channels, the model in_chans={cfg.in_chans}"
                         f"{hint if cfg.per_channel else ''}")
    if channels is None or not has_values(channels):
        return
    device = channels.device if isinstance(channels, Tensor) else "cpu"
    ids = torch.as_tensor(channels, device=device)          # where they are: no wait for a GPU
    right = ids.shape == (c,) and ids.dtype in INTEGERS and c > 0
    if right:                                               # one wait for a GPU
        known = ids.long().sort().values
        right = bool((known[0] >= 0) & (known[-1] <= last) & known.diff().all())
    if not right:
        raise ValueError(f"channels={ids.tolist()} must give another id between 0 and {last} for "
                         f"each of the image's {c} channels")


def has_values(v) -> bool:
    """Can v be read here? Not a tensor on `meta`, nor while a graph is made or a transform runs. A
    CUDA graph's arguments are looked at by the calls before its capture, and not by its replays."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    if not isinstance(v, Tensor):
        return True
    plain = type(v) in (Tensor, Parameter) and not v.is_meta
    return plain and not (v.is_cuda and torch.cuda.is_current_stream_capturing())


def check_keep(keep, tokens: Tensor):
    """keep for tokens (b l d): see FastVim.forward_features."""
    b, length = tokens.shape[:2]
    try:
        keep = torch.as_tensor(keep, device=tokens.device)
    except (TypeError, ValueError) as error:
        raise ValueError("keep must be a rectangle of token ids, shorter rows padded with -1 "
                         f"({error})") from None
    rectangle = keep.ndim == 2 and keep.shape[0] == b and keep.shape[1] > 0
    if not rectangle or keep.dtype not in INTEGERS:
        raise ValueError(f"keep must hold integer token ids of shape (B={b}, kept tokens), -1 for "
                         f"padding; got {keep.dtype} of shape {tuple(keep.shape)}")
    if not has_values(keep) or b == 0:
        return
    ids = keep.long().sort(1, descending=True).values
    twice = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
    exist = (ids[:, -1] >= -1) & (ids[:, 0] < length) & (ids[:, 0] >= 0)
    if not (exist & ~twice.any(1)).all():                   # one wait for a GPU
        raise ValueError(f"keep must name at least one of the {length} tokens (0 to {length - 1}) "
                         "of every image, each at most once, and be -1 where it is padding")


def check_residual(residual: Tensor | None):
    """What comes to a fastvim.Block; None comes to the first one."""
    if residual is not None and residual.dtype.itemsize < 4:
        raise TypeError(f"the residual stream came to a block as {residual.dtype}, and is kept in "
                        "float32: give fully_shard of blocks a MixedPrecisionPolicy(..., "
                        "cast_forward_inputs=False)")
