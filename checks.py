"""What a user can get wrong in fastvim.py is refused here, in one sentence, before anything runs.

fastvim.check calls these at the public doors. They raise TypeError or ValueError."""
import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter


def as_plain(value):
    """Numbers of NumPy or PyTorch, alone or in an array or a list, as Python's; others stay."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return type(value)(map(as_plain, value))
    return value


def are_ids(values, count: int) -> bool:
    """Are they a sequence of different whole numbers from 0 to count - 1, at least one?"""
    if not isinstance(values, Sequence):
        return False
    known = all(type(i) is int and 0 <= i < count for i in values)
    return known and 0 < len(values) == len(set(values))


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

    def require(right, must, *fields):
        for field in fields:
            value = getattr(cfg, field)
            if not right(value):
                raise ValueError(f"{field}={value!r} {must}")

    def choose(field, names):
        known = f"is unknown; choose from {', '.join(map(str, names))}"
        require(lambda v: v in list(names), known, field)

    choose("schedule", schedules)
    choose("block_norm", norms)
    choose("ssm_norm", [None, *norms])
    choose("pool", pools)
    choose("mask_divisor", ["axis", "count"])
    require(lambda v: type(v) is int and v >= 0, "must be a whole number of at least 0",
            "num_classes", "d_conv")
    require(lambda v: type(v) is int and v >= 1, "must be a whole number of at least 1",
            "patch_size", "frames", "tubelet", "in_chans", "embed_dim", "depth", "d_state",
            "expand")
    require(lambda v: v is None or type(v) is int and v >= 1,
            "must be a whole number of at least 1, or None", "dt_rank")
    require(lambda v: type(v) is bool, "must be True or False",
            "class_token", "skip_before_expand", "hcs", "hcs_sorted")
    require(lambda v: type(v) in (int, float) and 0 <= v < 1, "must be a number in [0, 1)",
            "drop_path_rate")
    require(lambda v: type(v) in (int, float) and 0 < v < math.inf, "must be a positive number",
            "pool_scale")
    require(lambda v: len(v) == 2 and all(type(n) is int and n >= cfg.patch_size for n in v),
            "must be one size or (height, width) in whole pixels, of at least one patch "
            f"({cfg.patch_size} px)", "img_size")
    pooling = any(pooled for _, pooled in cfg.rows)
    like = f"schedule={cfg.schedule!r}"
    require(lambda v: v == 1 or "t" in cfg.extents, f"is for videos; {like} has no axis t",
            "frames", "tubelet")
    require(lambda v: v >= cfg.tubelet, f"must be at least one patch, tubelet={cfg.tubelet}",
            "frames")
    require(lambda v: v == "mean" or pooling, f"has nothing to pool in {like}", "pool")
    require(lambda v: v == 1 or pooling and cfg.pool == "mean",
            f"scales mean pooling only; this model has {like}, pool={cfg.pool!r}", "pool_scale")
    if cfg.out_indices is not None:
        check_blocks("out_indices", cfg.out_indices, cfg.depth)


def check_blocks(name: str, indices: Sequence[int], depth: int):
    if not are_ids(indices, depth):
        raise ValueError(f"{name}={indices!r} must list different blocks between 0 and {depth - 1}")


def check_taps(indices: Sequence[int], cfg):
    check_blocks("indices", indices, cfg.depth)
    if cfg.out_indices is not None and tuple(cfg.out_indices) != tuple(indices):
        raise ValueError(f"indices={tuple(indices)}, but the model has norms for out_indices="
                         f"{cfg.out_indices}")


def check_has_head(cfg):
    if cfg.out_indices is not None:
        raise ValueError("a model with out_indices has no final norm or head: use "
                         "forward_intermediates")


def check_sampling():
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        raise RuntimeError("in training, every call draws how many channels it takes, which an "
                           "exported program cannot: call model.eval(), or build it with hcs=False")


def check_images(x: Tensor, channels, cfg):
    kind = "images"
    axes = "BCHW"
    if "t" in cfg.extents:
        kind = "videos"
        axes = "BCTHW"
    must = f"{kind} must be a float tensor ({', '.join(axes)})"
    if not isinstance(x, Tensor):
        raise TypeError(f"{must}, not {type(x).__name__}")
    if x.ndim != len(axes) or not x.is_floating_point():
        raise TypeError(f"{must}, not {x.dtype} of shape {tuple(x.shape)}")
    if min(x.shape[2:]) < 1:
        raise ValueError(f"{kind} of shape {tuple(x.shape)} have no pixels")
    c = x.shape[1]
    last = cfg.in_chans - 1
    if channels is None:
        if c != cfg.in_chans:
            raise ValueError(f"{kind} have {c} channels, the model in_chans={cfg.in_chans}; a "
                             f"per-channel model takes channels=[ids between 0 and {last}]")
    elif not cfg.per_channel:
        raise ValueError("channels= is for per-channel models; this model mixes its channels in "
                         "patch_embed")
    elif has_values(channels):
        ids = as_plain(channels)
        if not are_ids(ids, cfg.in_chans) or len(ids) != c:
            raise ValueError(f"channels={ids!r} must give another id between 0 and {last} for each "
                             f"of the image's {c} channels")


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
    kind = keep.dtype
    integers = not (kind.is_floating_point or kind.is_complex or kind == torch.bool)
    if not integers or keep.ndim != 2 or keep.shape[0] != b or keep.shape[1] == 0:
        raise ValueError(f"keep must hold integer token ids of shape (B={b}, kept tokens), -1 for "
                         f"padding; got {kind} of shape {tuple(keep.shape)}")
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
