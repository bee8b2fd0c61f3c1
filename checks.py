"""What a user can get wrong in fastvim.py is refused here, before anything is computed.

Each raises ValueError (check_images TypeError, too), naming what was given and the choices."""
import math
from collections.abc import Sequence

import torch
from torch import Tensor

HOLE = -2               # fastvim.HOLE: a slot of the token tensor that holds no token
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
LEAST = {"patch_size": 1, "in_chans": 1, "num_classes": 0, "embed_dim": 1, "depth": 1,
         "d_state": 1, "d_conv": 0, "expand": 1, "dt_rank": 1}          # fields of whole numbers
SWITCHES = ("class_token", "skip_before_expand", "hcs", "hcs_sorted")


def check_config(cfg, schedules: dict, **choices: Sequence) -> None:
    """Checks all fields of a Config. schedules: fastvim.SCHEDULES; choices: the values of others.

    img_size and out_indices may be as the user gave them, or tuples already."""
    def check(field, right, must):
        if not right:
            raise ValueError(f"{field}={getattr(cfg, field)!r} {must}")

    def is_number(value):
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    for field, names in {"schedule": schedules, **choices}.items():
        known = getattr(cfg, field) in list(names)
        check(field, known, f"is unknown; choose from {', '.join(map(str, names))}")
    for field, least in LEAST.items():
        value = getattr(cfg, field)
        if field != "dt_rank" or value is not None:
            whole = type(value) is int and value >= least
            check(field, whole, f"must be a whole number of at least {least}")
    for field in SWITCHES:
        check(field, isinstance(getattr(cfg, field), bool), "must be True or False")
    size = cfg.img_size
    if not isinstance(size, (tuple, list)):
        size = (size, size)
    fits = len(size) == 2 and all(type(side) is int and side >= cfg.patch_size for side in size)
    check("img_size", fits, "must be one size or (height, width) in whole pixels, of at least one "
                            f"patch ({cfg.patch_size} px)")
    rate = cfg.drop_path_rate
    scale = cfg.pool_scale
    check("drop_path_rate", is_number(rate) and 0 <= rate < 1, "must be a number in [0, 1)")
    check("pool_scale", is_number(scale) and 0 < scale < math.inf, "must be a positive number")
    pools = any(pooled for _, pooled in schedules[cfg.schedule])
    check("pool", pools or cfg.pool == "mean", f"has nothing to pool in schedule={cfg.schedule!r}")
    check("pool_scale", scale == 1 or pools and cfg.pool == "mean",
          f"scales mean pooling only; this model has schedule={cfg.schedule!r}, pool={cfg.pool!r}")
    if cfg.out_indices is not None:
        check_blocks("out_indices", cfg.out_indices, cfg.depth)


def check_blocks(name: str, indices: Sequence[int], depth: int) -> tuple[int, ...]:
    """Indices of different blocks, as a tuple."""
    blocks = tuple(indices) if isinstance(indices, Sequence) else ()
    exist = blocks and all(type(i) is int and 0 <= i < depth for i in blocks)
    if not exist or len(set(blocks)) < len(blocks):
        raise ValueError(f"{name}={indices!r} must list different blocks between 0 and {depth - 1}")
    return blocks


def check_images(x: Tensor) -> None:
    """Images are float (b c h w) and have pixels."""
    if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point():
        tensor = isinstance(x, Tensor)
        what = f"{x.dtype} of shape {tuple(x.shape)}" if tensor else type(x).__name__
        raise TypeError(f"images must be a float tensor (B, C, H, W), not {what}")
    if min(x.shape[2:]) < 1:
        raise ValueError(f"images of shape {tuple(x.shape)} have no pixels")


def check_channels(x: Tensor, channels, in_chans: int, per_channel: bool) -> Tensor | None:
    """-> ids (c) int64 of the channels of x (b c h w), None for a model that mixes its channels."""
    c = x.shape[1]
    if not per_channel and channels is not None:
        raise ValueError("channels= is for per-channel models; this model mixes its channels in "
                         "patch_embed")
    if channels is None and c != in_chans:
        message = f"images have {c} channels, the model in_chans={in_chans}"
        if per_channel:
            message += f": say which they are by channels=[ids between 0 and {in_chans - 1}]"
        raise ValueError(message)
    if not per_channel:
        return None
    if channels is None:
        return torch.arange(c, device=x.device)
    ids = torch.as_tensor(channels)                     # checked where they are: no wait for a GPU
    right = ids.shape == (c,) and ids.dtype in INTEGERS and c > 0 and len(ids.unique()) == c
    if not right or not 0 <= int(ids.min()) <= int(ids.max()) < in_chans:
        raise ValueError(f"channels={ids.tolist()} must give another id between 0 and "
                         f"{in_chans - 1} for each of the image's {c} channels")
    return ids.long().to(x.device)


def check_keep(keep, b: int, l: int, device: torch.device) -> Tensor:
    """keep (b s) integer ids of the l tokens, -1 for padding -> slots (b s) int64: the ids sorted,
    then HOLE."""
    try:
        keep = torch.as_tensor(keep, device=device)
    except (TypeError, ValueError) as error:
        raise ValueError("keep must be a rectangle of token ids, shorter rows padded with -1 "
                         f"({error})") from None
    rectangle = keep.ndim == 2 and keep.shape[0] == b and keep.shape[1] > 0
    if not rectangle or keep.dtype not in INTEGERS:
        raise ValueError(f"keep must hold integer token ids of shape (B={b}, kept tokens), -1 for "
                         f"padding; got {keep.dtype} of shape {tuple(keep.shape)}")
    keep = keep.long()
    slots = keep.masked_fill(keep == -1, l).sort(1).values              # padding last, as id l
    twice = (slots[:, 1:] == slots[:, :-1]) & (slots[:, 1:] < l)
    exist = b == 0 or -1 <= int(keep.min()) and int(keep.max()) < l and int(slots[:, 0].max()) < l
    if not exist or bool(twice.any()):
        raise ValueError(f"keep must name at least one of the {l} tokens (0 to {l - 1}) of every "
                         "image, each at most once, and be -1 where it is padding")
    return slots.masked_fill(slots == l, HOLE)
