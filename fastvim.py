"""FastVim: vision state-space models that pool the token grid, in one file.

The idea. Vision Mamba (Vim) walks over all h x w patches of an image with a selective scan, forwards and backwards.
FastVim first averages the tokens of each row, scans the h averages, and gives every token of a row the result; the
next layer does the same with columns. One layer cannot tell the tokens of a row apart, two can; and the recurrence, the
one part that cannot run in parallel, takes h steps instead of h x w. Everything else in the block stays as it was.

    Fast Vision Mamba: Pooling Spatial Dimensions for Accelerated Processing. Kapse, Betz, Sivanandan.     (the paper)
    Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model. Zhu et al.      (Vim)
    Mamba: Linear-Time Sequence Modeling with Selective State Spaces. Gu, Dao.                                 (Mamba)

Every encoder of the paper is this block with two settings per layer: in which order the grid is flattened for the
convolution and the scan, and which of its axes are pooled away before the scan. So there is one table (SCHEDULES),
one mixer, one encoder. Read from top to bottom:

    1 schedules and variants     2 the plan: how a layer walks the grid       3 the operations, in plain PyTorch
    4 backends                   5 mixer, block, encoder, autoencoder         6 initialisation
    7 building and loading       8 counting multiply-adds                     9 the command line

    python fastvim.py             every model: parameters, multiply-adds at 224 px, milliseconds per image
    python fastvim.py doctor      what this machine has: torch, devices, compilers, backends

    model = fastvim.create_model("fastvim_tiny", num_classes=10)
    logits = model(torch.randn(2, 3, 224, 224))

Symbols, the same everywhere:

    B  batch               L  tokens of the grid, h * w or h * w * c       D  embed_dim, width of the residual stream
    E  inner width, 2 D    P  scan steps: groups of pooled tokens          N  d_state, states per inner channel
    R  dt_rank, ceil(D/16) W  d_conv, taps of the convolution              K  directions: 0 forward, 1 backward
    h, w, c  the axes of the token grid (rows, columns, image channels)
    x, z  the two halves of in_proj    c  silu(conv(x))    p  pooled c    s  what the scan says of each group
    A, B, C, D  in the scan, as in Mamba: decay, input and output of the state, weight of the skip
"""
import argparse
import collections
import contextlib
import dataclasses
import functools
import logging
import math
import os
import pickle
import shutil
import subprocess
import sys
import time
import types
import zipfile
from typing import Callable, NamedTuple, Optional, Sequence, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from einops import rearrange, repeat
from torch import Tensor

log = logging.getLogger("fastvim")

# ----------------------------------------------------------------------------------------------------------------------
# 1. Schedules and variants

# One row a layer, used in turn: (flatten order, axes pooled away), in einops axis names, outermost axis first.
# "h w" walks along the rows; pooling "w" there leaves one token for each row (the paper's Pool_col, section 3.1).
SCHEDULES = {
    "vim": [("h w", "")],
    "fastvim": [("h w", "w"), ("w h", "h")],
    "pool_col": [("h w", "w")],                                                     # Table 6: without alternation
    "pool_row": [("w h", "h")],
    "channelvim": [("h w c", "")],                                                  # section 3.3: a token per channel
    "channelvim_spatial": [("c h w", "")],
    "fastchannelvim": [("h w c", "w"), ("w h c", "h")],
    "fastchannelvim_spatial": [("c h w", "w"), ("c w h", "h")],
    "fastchannelvim_2d": [("h w c", "w c"), ("w h c", "h c"), ("h w c", "h w")],    # Table 21
}

SIZES = {                                                                           # Table 25
    "tiny": dict(embed_dim=192, depth=24),
    "small": dict(embed_dim=384, depth=24),
    "base": dict(embed_dim=768, depth=24),
    "large": dict(embed_dim=1024, depth=48),
    "huge": dict(embed_dim=1280, depth=64, patch_size=14),
}

FAMILIES = {
    "fastvim": dict(schedule="fastvim"),
    "vim": dict(schedule="vim", class_token=True),          # with the post-SSM norm; ssm_norm=None gives the first Vim
    "fastmaskvim": dict(schedule="fastvim"),                # a FastVim that is shown only the tokens of `keep`
    "channelvim": dict(schedule="channelvim", class_token=True, in_chans=8, num_classes=161),
    "fastchannelvim": dict(schedule="fastchannelvim", in_chans=8, num_classes=161),
}

NORMS = {"rmsnorm": functools.partial(nn.RMSNorm, eps=1e-5), "layernorm": functools.partial(nn.LayerNorm, eps=1e-5)}
POOLS = ("mean", "max", "attention")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclasses.dataclass(frozen=True)
class Config:
    """All that defines a model. Every field can be given to `create_model` by name.

    Raises ValueError, naming the field and the choices, on an unknown or impossible value."""
    schedule: str = "fastvim"                   # a row of SCHEDULES
    img_size: Union[int, tuple] = 224           # pixels, or (height, width), of pos_embed; images of any size run
    patch_size: int = 16                        # pixels
    in_chans: int = 3
    num_classes: int = 1000                     # 0: no head, the model returns the pooled features
    embed_dim: int = 192                        # D
    depth: int = 24                             # blocks
    d_state: int = 16                           # N
    d_conv: int = 4                             # W; 0 leaves the convolution out and keeps SiLU (Table 7)
    expand: int = 2                             # E / D
    dt_rank: Optional[int] = None               # R; None: ceil(D / 16)
    class_token: bool = False                   # one more token, un-pooled, whose scan step is the middle one
    block_norm: str = "rmsnorm"                 # Table 17
    ssm_norm: Optional[str] = "layernorm"       # norm after the scan, section 4.1 "Stability"; None: without
    pool: str = "mean"                          # mean | max | attention (Table 20)
    pool_scale: float = 1.0                     # factor of mean pooling; 0.25 after masked pretraining (Table 14)
    skip_before_expand: bool = False            # True: D multiplies the pooled tokens (Table 18, "After D")
    drop_path_rate: float = 0.0                 # stochastic depth at the last block, rising linearly from 0
    hcs: bool = True                            # hierarchical channel sampling in training (per-channel models only)
    hcs_sorted: bool = True                     # keep sampled channels in order, which a sequence model needs
    mask_divisor: str = "axis"                  # masked mean: divide by the "axis" length or by the "count" (Table 12)
    released_masking: bool = False              # repeat the released code's backward branch, which mixes rows
    out_indices: Optional[Sequence] = None      # blocks tapped for dense tasks: no head, one LayerNorm for each tap

    def __post_init__(self):
        def check(field, right, must):
            if not right:
                raise ValueError(f"{field}={getattr(self, field)!r} {must}")

        for field, choices in dict(schedule=SCHEDULES, block_norm=NORMS, ssm_norm=[None, *NORMS], pool=POOLS,
                                   mask_divisor=["axis", "count"]).items():
            check(field, getattr(self, field) in list(choices),
                  f"is unknown; choose from {', '.join(map(str, choices))}")
        for field, least in dict(patch_size=1, in_chans=1, num_classes=0, embed_dim=1, depth=1, d_state=1, d_conv=0,
                                 expand=1, dt_rank=1).items():
            value = 1 if field == "dt_rank" and self.dt_rank is None else getattr(self, field)
            check(field, type(value) is int and value >= least, f"must be a whole number of at least {least}")
        for field in ("class_token", "skip_before_expand", "hcs", "hcs_sorted", "released_masking"):
            check(field, isinstance(getattr(self, field), bool), "must be True or False")
        size = tuple(self.img_size) if isinstance(self.img_size, (tuple, list)) else (self.img_size,) * 2
        check("img_size", len(size) == 2 and all(type(v) is int and v >= self.patch_size for v in size),
              f"must be one size or (height, width) in whole pixels, of at least one patch ({self.patch_size} px)")
        object.__setattr__(self, "img_size", size)
        for field, right, must in (("drop_path_rate", lambda v: 0 <= v < 1, "must be a number in [0, 1)"),
                                   ("pool_scale", lambda v: 0 < v < math.inf, "must be a positive number")):
            value = getattr(self, field)
            check(field, isinstance(value, (int, float)) and not isinstance(value, bool) and right(value), must)
        pools = any(pooled for _, pooled in self.rows)
        check("pool", pools or self.pool == "mean", f"has nothing to pool in schedule={self.schedule!r}")
        check("pool_scale", self.pool_scale == 1 or pools and self.pool == "mean",
              f"scales mean pooling only; this model has schedule={self.schedule!r}, pool={self.pool!r}")
        check("released_masking", not (self.released_masking and self.class_token), "knows no class token")
        if self.out_indices is not None:
            object.__setattr__(self, "out_indices", check_blocks("out_indices", self.out_indices, self.depth))

    @property
    def rows(self):                             # layer i runs by rows[i % len(rows)]
        return SCHEDULES[self.schedule]

    @property
    def storage(self):                          # tokens lie in memory in the order in which the first layer walks them
        return self.rows[0][0]

    @property
    def unusual(self):                          # what runs in plain PyTorch only
        return ("attention pooling" if self.pool == "attention" else "convolution of other than four taps"
                if self.d_conv != 4 else "released_masking" if self.released_masking else "")

    @property
    def per_channel(self):
        return "c" in self.storage


def check_blocks(name, indices, depth):
    """Returns indices as a tuple, or raises ValueError if they do not name different blocks."""
    blocks = tuple(indices) if isinstance(indices, Sequence) else ()
    if not blocks or any(type(i) is not int or not 0 <= i < depth for i in blocks) or len(set(blocks)) < len(blocks):
        raise ValueError(f"{name}={indices!r} must list different blocks between 0 and {depth - 1}")
    return blocks


# ----------------------------------------------------------------------------------------------------------------------
# 2. The plan: how one layer walks the token grid

CLASS, PADDING = -1, -2     # what a slot of the token tensor may hold besides the id of a grid token


@dataclasses.dataclass(frozen=True)
class Plan:
    """Answers, for one layer, which token stands at a position of the flatten order, and to which group (scan step)
    that position belongs. All backends share it, so none of them ever needs to know what a row or a column is.

    A full grid needs no tables: it is the einops patterns of `storage`, `order` and `pooled`, or, for kernels, the
    strides of `axes`. Kept tokens of a mask and class tokens are the ragged form: tables over S slots, of batch B or 1.
        token (B S) int64       position -> slot of the token tensor
        group (K B S) int64     position -> scan step, for each direction
        divisor (K B S) float32 what the position's value is divided by in its group's mean; infinity for padding"""
    storage: str
    order: str
    pooled: str
    grid: tuple                                 # ((axis, length), ...) in storage order
    steps: int                                  # P
    pool_scale: float = 1.0
    token: Optional[Tensor] = None
    group: Optional[Tensor] = None
    divisor: Optional[Tensor] = None

    @property
    def sizes(self):
        return dict(self.grid)

    @property
    def kept(self):                             # the axes that the scan walks along, outermost first
        return " ".join(a for a in self.order.split() if a not in self.pooled.split())

    @property
    def axes(self):
        """((length, stride in tokens, pooled), ...) of the flatten order: position -> token is index arithmetic."""
        stride, strides = 1, {}
        for axis, length in reversed(self.grid):
            strides[axis], stride = stride, stride * length
        return tuple((self.sizes[a], strides[a], a in self.pooled.split()) for a in self.order.split())

    def tables(self, device=None):
        """The two answers for the full grid, as int64 tables: position -> token (L), position -> group (L)."""
        token = torch.arange(math.prod(list(self.sizes.values())), device=device)
        token = rearrange(token, f"({self.storage}) -> ({self.order})", **self.sizes)
        group = torch.arange(math.prod([self.sizes[a] for a in self.kept.split()]), device=device)
        return token, repeat(group, f"({self.kept}) -> ({self.order})", **self.sizes)

    def walk(self, device):
        """The plan as the Walk that compiled kernels follow; full grids are remembered."""
        if self.token is None:
            return _full_walk(self, str(device))
        padding = self.divisor[0].isinf()                                                    # (B S)
        return _walk(self.token, self.group[0].masked_fill(padding, -1), 1 / self.divisor[0], self.steps)


class Walk(NamedTuple):
    """A plan as tables over the S positions of the flatten order, of batch b = B, or 1 if all images share them."""
    token: Tensor                               # (b S) int32, position -> slot of the token tensor
    group: Tensor                               # (b S) int32, position -> scan step, -1 for padding
    weight: Tensor                              # (b S) float32, factor of the position in its group's mean
    member: Tensor                              # (b S) int32, positions sorted by group, padding last
    start: Tensor                               # (b P+1) int32, group g owns member[start[g]:start[g + 1]]


def _walk(token, group, weight, steps):
    key = group.masked_fill(group < 0, steps)                                                # (b S)
    key, member = key.sort(dim=1, stable=True)
    start = torch.searchsorted(key, torch.arange(steps + 1, device=key.device).repeat(len(key), 1))
    return Walk(token.int(), group.int(), weight.float(), member.int(), start.int())


@functools.lru_cache(64)
def _full_walk(plan, device):
    with torch.inference_mode(False):           # the tables outlive this call and may next serve a training step
        token, group = (t[None] for t in plan.tables(device))                                # (1 L)
        pooled = math.prod([plan.sizes[a] for a in plan.pooled.split()])
        weight = torch.full(group.shape, plan.pool_scale / pooled, device=device)
        return _walk(token, group, weight, plan.steps)


def make_plan(row, storage, sizes, slots=None, *, class_token=False, pool_scale=1.0, mask_divisor="axis",
              released_masking=False):
    """The plan of one schedule row over a grid of `sizes` {axis: length}, whose tokens lie in the order `storage`.

    slots: None for a full grid, or (B S) int64 that says what each slot of the token tensor holds: a grid token (its
    index in `storage` order, each at most once per image), CLASS (once, if there is a class_token) or PADDING.
    Section 3.2: a group that kept no token pools to zero and still takes its step of the scan."""
    order, pooled = row
    steps = math.prod([sizes[a] for a in order.split() if a not in pooled.split()])
    length = math.prod([sizes[a] for a in pooled.split()])
    pool_scale = pool_scale if pooled else 1.0
    plan = Plan(storage, order, pooled, tuple((a, sizes[a]) for a in storage.split()), steps, pool_scale)
    if slots is None:
        return plan

    token, group = plan.tables(slots.device)                                                 # (L) (L)
    real, is_class = slots >= 0, slots == CLASS                                              # (B S) (B S)
    rank = token.argsort()[slots.clamp(min=0)]                                               # (B S) place in the order
    if pooled:
        place = torch.arange(len(token), device=slots.device)
        begin = torch.full_like(place[:steps], len(token)).scatter_reduce(0, group, place, "amin")   # (P) of each group
        group = group[rank]                                                                  # (B S)
        middle = torch.full_like(slots[:, :1], steps // 2)                                   # (B 1)
        begin = begin[middle]                                                                # (B 1)
    else:                                       # nothing pooled: the kept tokens are the scan steps, one after another
        group = rank = rank.masked_fill(~real, len(token)).argsort(dim=1, stable=True).argsort(1)
        steps = slots.shape[1]
        middle = begin = real.sum(1, keepdim=True) // 2
    if class_token:
        # The class token takes the middle step of the scan and pushes the later groups back by one. In the flatten
        # order it stands before the group that it pushed: between the middle rows, or, in Vim, in the middle.
        group = torch.where(is_class, middle, group + (group >= middle))
        steps += bool(pooled)
    last = 2 * len(token) + 2
    key = torch.where(real, 2 * rank + 1, torch.where(is_class, 2 * begin, last))            # padding comes last
    token = key.argsort(dim=1, stable=True)                                                  # (B S) position -> slot
    real, is_class, group = (t.gather(1, token) for t in (real, is_class, group.clamp(max=steps - 1)))
    if released_masking:
        # The released code pools, and later expands, the reversed tokens by the row ids of the unreversed ones.
        if not bool(real.all()):
            raise ValueError("released_masking knows no padding: keep the same number of tokens of every image")
        group = torch.stack([group, steps - 1 - group.flip(1)])                              # (K B S)
    else:
        group = torch.stack([group, group])                                                  # (K B S)
    if mask_divisor == "count":
        count = torch.zeros(2, len(group[0]), steps, device=slots.device)
        count = count.scatter_add(2, group, real.float().expand(group.shape))                # (K B P)
        divisor = count.gather(2, group)
    else:
        divisor = torch.full(group.shape, float(length), device=slots.device)
    divisor = torch.where(is_class, 1.0, torch.where(real, divisor / pool_scale, math.inf))  # (K B S)
    return dataclasses.replace(plan, steps=steps, token=token, group=group, divisor=divisor)


# ----------------------------------------------------------------------------------------------------------------------
# 3. The operations, in plain PyTorch: the specification
#
# A few functions do all the work between the matrix products. Here they are written to be read. A faster backend has
# the same signatures and is tested against these, outputs and gradients.


class SSMWeights(NamedTuple):
    """What the operations need of a mixer. The leading axis K holds the two directions."""
    conv_w: Optional[Tensor]                    # (K E W), None without the convolution
    conv_b: Optional[Tensor]                    # (K E)
    x_proj: Tensor                              # (K R+2N E)
    dt_proj: Tensor                             # (K E R)
    dt_bias: Tensor                             # (K E)
    A_log: Tensor                               # (K E N)
    D: Tensor                                   # (K E)
    norm_w: Optional[Tensor]                    # (E), None without the post-SSM norm
    norm_b: Optional[Tensor]                    # (E), None for RMSNorm
    score_w: Optional[Tensor]                   # (K E), attention pooling only
    score_b: Optional[Tensor]                   # (K)
    pool: str
    skip_before_expand: bool


def activation_dtype(device, weight):
    """What matrix products compute in: autocast's type where it is on, else the weight's."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else weight.dtype


def at_least_float32(x):
    """States, sums and norms are kept in float32 when the activations are 16-bit, and in float64 when they are."""
    return x if x.dtype == torch.float64 else x.float()


def norm(x, weight, bias, eps=1e-5):
    """RMSNorm, or LayerNorm when there is a bias, over the last axis."""
    if bias is None:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_norm(hidden, residual, weight, bias):
    """hidden (B L D), residual (B L D) float32 or None -> normed (B L D) in weight's type, residual + hidden."""
    residual = at_least_float32(hidden) if residual is None else residual + hidden
    u = norm(residual, at_least_float32(weight), None if bias is None else at_least_float32(bias))
    return u.to(weight.dtype), residual


def flatten(x, plan):
    """Tokens as they lie -> as the layer walks them. x (B L E) -> (B L E)."""
    if plan.token is None:
        return rearrange(x, f"b ({plan.storage}) e -> b ({plan.order}) e", **plan.sizes)
    x = x.gather(1, plan.token[..., None].expand(x.shape))
    # padding reads as zero, which is what a convolution sees beyond the end of a sequence
    return x.masked_fill(plan.divisor[0].isinf()[..., None], 0)


def unflatten(y, plan):
    """The inverse of flatten: as the layer walks the tokens -> as they lie. y (B L E) -> (B L E)."""
    if plan.token is None:
        return rearrange(y, f"b ({plan.order}) e -> b ({plan.storage}) e", **plan.sizes)
    return y.gather(1, plan.token.argsort(1)[..., None].expand(y.shape))


def conv_silu(x, weight, bias):
    """SiLU of the causal depthwise convolution, in both directions. x (B L E), weight (K E W) -> c (K B L E).

    Forward, a token meets itself at tap W - 1 and the one W - 1 before it at tap 0. Backward is the same on the
    reversed sequence: mirrored taps and padding on the other side, so that nothing has to be turned around."""
    if weight is None:
        return F.silu(torch.stack([x, x]))                                                   # Table 7, "w/o conv1d"
    E, W = weight.shape[1:]
    x = x.mT                                                                                 # (B E L)
    forward = F.conv1d(F.pad(x, (W - 1, 0)), weight[0, :, None], bias[0], groups=E)
    backward = F.conv1d(F.pad(x, (0, W - 1)), weight[1, :, None].flip(2), bias[1], groups=E)
    return F.silu(torch.stack([forward.mT, backward.mT]))                                    # (K B L E)


def pool(c, plan, kind, score=None):
    """Tokens -> groups (Algorithm 1, line 3). c (K B L E), for attention score (K B L 1) -> p (K B P E).

    Of equal maxima the first in the flatten order counts and receives the gradient."""
    if plan.token is None and plan.pooled:                          # a full grid: every group has the same length
        pattern = f"k b ({plan.order}) e -> k b ({plan.kept}) ({plan.pooled}) e"
        c = rearrange(c, pattern, **plan.sizes)                                              # (K B P length E)
        if kind == "mean":
            return c.mean(3) * plan.pool_scale
        if kind == "max":
            return c.max(3).values
        return (c * rearrange(score, pattern, **plan.sizes).softmax(3)).sum(3)
    if plan.token is None:
        return c
    padding = plan.divisor.isinf()[..., None]                                                # (K B L 1)
    if not plan.pooled:
        return c.masked_fill(padding, 0)

    # Ragged groups: the same three by scattering.
    def group_max(v):                                                                        # (K B L X), of one's group
        index = plan.group[..., None].expand(v.shape)
        top = v.new_full((*v.shape[:2], plan.steps, v.shape[-1]), -math.inf)
        return top.scatter_reduce(2, index, v.detach().masked_fill(padding, -math.inf), "amax").gather(2, index)

    def group_sum(v):                                                                        # (K B L X) -> (K B P X)
        return v.new_zeros(*v.shape[:2], plan.steps, v.shape[-1]).scatter_add(
            2, plan.group[..., None].expand(v.shape), v)

    if kind == "mean":
        return group_sum(c / plan.divisor[..., None])
    if kind == "max":
        index, L = plan.group[..., None].expand(c.shape), c.shape[2]
        place = torch.arange(L, device=c.device)[:, None].expand(c.shape)
        place = place.masked_fill(~((c == group_max(c)) | c.isnan()) | padding, L)
        first = place.new_full((*c.shape[:2], plan.steps, c.shape[-1]), L).scatter_reduce(2, index, place, "amin")
        return F.pad(c, (0, 0, 0, 1)).gather(2, first)              # a group without tokens: zero
    # Padding is taken out before exp and before the division: inf and 0 / 0 there would reach the gradients as NaN.
    a = (score - group_max(score)).masked_fill(padding, -math.inf).exp()                     # (K B L 1)
    total = group_sum(a).gather(2, plan.group[..., None].expand(a.shape)).masked_fill(padding, 1)
    return group_sum(c * (a / total))


def expand(s, plan):
    """Groups -> tokens (Algorithm 1, line 9). s (K B P E) -> (K B L E)."""
    if plan.token is None:
        return repeat(s, f"k b ({plan.kept}) e -> k b ({plan.order}) e", **plan.sizes)
    return s.gather(2, plan.group[..., None].expand(-1, s.shape[1], -1, s.shape[-1]))


def conv_pool(xz, w, plan):
    """Operation 1: the x of xz (B L 2E) -> p (K B P E) and what expand_gate needs again: here c (K B L E); kernels
    compute c twice rather than store it, and return the argmax of max pooling or None."""
    c = conv_silu(flatten(at_least_float32(xz.chunk(2, -1)[0]), plan), w.conv_w, w.conv_b)
    score = None
    if w.pool == "attention":                                       # section 10, "Effect of different pooling methods"
        score = torch.einsum("kble,ke->kbl", c, w.score_w)[..., None] + w.score_b[:, None, None, None]
    return pool(c, plan, w.pool, score), c


def selective_scan(x, dt, A, B, C, D=None, dt_bias=None):
    """Operation 2, equations 2 to 4: h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t;  s_t = C_t h_t (+ D x_t).

    x, dt (K B P E), A (K E N), B, C (K B P N), D, dt_bias (K E) -> s (K B P E). dt goes through softplus(dt + dt_bias).
    Direction 0 runs from the first step to the last, direction 1 from the last to the first.
    As Mamba does, B is discretised by Euler's rule (dt B) and only A by the zero-order hold of equation 2."""
    if dt_bias is not None:
        dt = dt + dt_bias[:, None, None]
    dt = F.softplus(dt)
    A = A.mT.contiguous()[:, None]                                          # (K 1 N E): E innermost, for long vectors
    inputs = [torch.cat([v[:1], v[1:].flip(2)]) for v in (x, dt, B, C)]     # direction 1 starts at the other end
    h, s = x.new_zeros(()), []
    for x_t, dt_t, B_t, C_t in zip(*(v.unbind(2) for v in inputs)):         # (K B E) (K B E) (K B N) (K B N)
        decay, drive = torch.exp(dt_t[..., None, :] * A), B_t[..., None] * (dt_t * x_t)[..., None, :]    # (K B N E)
        h = torch.addcmul(drive, decay, h)                                  # (K B N E)
        s.append((C_t[..., None, :] @ h)[..., 0, :])                        # (K B E)
    s = torch.stack(s, 2)                                                   # (K B P E)
    s = torch.cat([s[:1], s[1:].flip(2)])
    return s if D is None else s + D[:, None, None] * x


def expand_gate(xz, c, s, w, plan):
    """Operation 3: c (K B L E), s (K B P E) and the gate z of xz (B L 2E) -> y (B L E), as the tokens lie.

    The skip uses the unpooled c (Figure 2): pooling shortens the scan, not the picture."""
    y = expand(s, plan)                                                     # (K B L E)
    if not w.skip_before_expand:
        y = y + w.D[:, None, None] * c
    y = (y[0] + y[1]) / 2                                                   # (B L E)
    if w.norm_w is not None:
        y = norm(y, w.norm_w, w.norm_b)
    if plan.token is not None:
        y = y.masked_fill(plan.divisor[0].isinf()[..., None], 0)            # padding stays zero
    return (unflatten(y, plan) * F.silu(at_least_float32(xz.chunk(2, -1)[1]))).to(xz.dtype)


def project(p, w):
    """What makes the scan selective: pooled tokens p (K B P E) -> dt (K B P E), B, C (K B P N), and low (K B P R)."""
    N, R = w.A_log.shape[-1], w.dt_proj.shape[-1]
    low, B, C = torch.bmm(p.flatten(1, 2), w.x_proj.mT).view(*p.shape[:3], R + 2 * N).split([R, N, N], -1)
    dt = torch.bmm(low.flatten(1, 2), w.dt_proj.mT).view(p.shape)           # (K B P E)
    return dt, B, C, low


def ssm(xz, w, plan, ops, *scratch):
    """Everything between in_proj and out_proj, by the operations of the backend ops: xz (B L 2E) -> y (B L E), and
    what a hand-written backward function wants to see again. scratch: for kernels, memory for y."""
    p, kept = ops.conv_pool(xz, w, plan)                                    # (K B P E) (K B L E)
    dt, B, C, _ = project(p, w)
    D = w.D if w.skip_before_expand else None
    s = ops.selective_scan(p, dt, -torch.exp(w.A_log), B, C, D, w.dt_bias)  # (K B P E)
    return ops.expand_gate(xz, kept, s, w, plan, *scratch), p, kept, s


# ----------------------------------------------------------------------------------------------------------------------
# 4. Backends: who runs the operations


class Backend(NamedTuple):
    """An implementation of the operations, with the signatures of section 3."""
    name: str
    devices: tuple                              # torch device types it serves; empty: all
    why: str                                    # one line for `doctor` and for the log
    add_norm: Callable
    conv_pool: Callable
    selective_scan: Callable
    expand_gate: Callable
    kernels: Optional[object] = None            # compiled ones: a fastvim_kernels.Kernels, which runs whole blocks


BACKENDS = {}                                   # name -> Backend; the last one registered that serves a device is taken
_forced = []                                    # innermost use_backend last
_announced = set()


def register_backend(backend):
    """Adds a Backend, or replaces the one of that name. It is preferred on its devices from now on."""
    BACKENDS.pop(backend.name, None)
    BACKENDS[backend.name] = backend


@contextlib.contextmanager
def use_backend(name):
    """`with use_backend("python"):` runs models by that backend, whatever the device and FASTVIM_BACKEND say.
    Raises ValueError, naming the choices, for an unknown name."""
    _known_backend(name, "use_backend")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def _known_backend(name, source):
    if name not in BACKENDS:
        raise ValueError(f"{source}: no backend {name!r}; choose from {', '.join(BACKENDS)}")
    return BACKENDS[name]


def _announce(level, *what):
    if what not in _announced:
        _announced.add(what)
        log.log(level, *what)


def pick_backend(device, dtype=torch.float32, unusual=""):
    """The backend for a torch.device: use_backend, else the variable FASTVIM_BACKEND, else the last one registered
    that serves it. What is chosen, and what is passed over and why, is logged once.

    dtype: of the activations. unusual: an option that only plain PyTorch knows, see Config.unusual.
    Compiled kernels are built here, at first use. Raises ValueError if the backend asked for does not serve the
    device, RuntimeError if it cannot be built."""
    return BACKENDS[_pick(torch.device(device).type, dtype, unusual)]


def _pick(device, dtype, unusual):
    variable = os.environ.get("FASTVIM_BACKEND")
    asked = _forced[-1] if _forced else variable
    if asked and _known_backend(asked, "use_backend" if _forced else "FASTVIM_BACKEND").devices and (
            device not in BACKENDS[asked].devices):
        raise ValueError(f"backend {asked!r} serves {', '.join(BACKENDS[asked].devices)}, not {device}")
    for name in [asked] if asked else reversed(BACKENDS):
        backend = BACKENDS[name]
        if backend.devices and device not in backend.devices:
            continue
        if backend.kernels:
            lacks = unusual or ("" if dtype in backend.kernels.dtypes else f"{dtype} activations")
            if lacks:
                _announce(logging.WARNING, "backend %s has no %s: python runs this model", name, lacks)
                return "python"
            if backend.kernels.error():
                problem = f"backend {name} cannot be used: {backend.kernels.error()}"
                if asked:
                    raise RuntimeError(problem)
                _announce(logging.WARNING, "%s", problem)
                continue
        _announce(logging.INFO, "backend %s on %s: %s", name, device, "asked for" if asked else backend.why)
        return name


# torch.compile takes the answer as a constant and does not look into the compiling of kernels. This is what
# torch.compiler.assume_constant_result does, without its import, which takes longer than all others together.
_pick._dynamo_marked_constant = True


register_backend(Backend("python", (), "plain PyTorch, on every device",
                         add_norm, conv_pool, selective_scan, expand_gate))

# ----------------------------------------------------------------------------------------------------------------------
# 5. Mixer, block, patch embeddings, encoder, masked autoencoder


class Mixer(nn.Module):
    """The bidirectional, pooled SSM of Figure 2. Parameters carry the names of the released checkpoints."""

    def __init__(self, cfg):
        super().__init__()
        D, N, W = cfg.embed_dim, cfg.d_state, cfg.d_conv
        E, R = cfg.expand * D, cfg.dt_rank or math.ceil(D / 16)
        self.cfg = cfg
        self.in_proj = nn.Linear(D, 2 * E, bias=False)
        for b in ("", "_b"):                    # forward; backward, on the reversed sequence, with weights of its own
            if W:
                self.add_module(f"conv1d{b}", nn.Conv1d(E, E, W, groups=E))
            self.add_module(f"x_proj{b}", nn.Linear(E, R + 2 * N, bias=False))
            self.add_module(f"dt_proj{b}", nn.Linear(R, E))
            self.register_parameter(f"A{b}_log", nn.Parameter(torch.empty(E, N)))
            self.register_parameter(f"D{b}", nn.Parameter(torch.empty(E)))
            if cfg.pool == "attention":
                self.add_module(f"pool_proj{b}", nn.Linear(E, 1))
        self.layernorm = NORMS[cfg.ssm_norm](E) if cfg.ssm_norm else None
        self.out_proj = nn.Linear(E, D, bias=False)

    def weights(self):
        cfg, part = self.cfg, self._modules     # a plain dictionary: this runs in every layer of every call
        def pair(a, b):
            return at_least_float32(torch.stack([a, b]))                                     # (K ...)
        (x_proj, x_proj_b), (dt, dt_b) = ([part[name], part[f"{name}_b"]] for name in ("x_proj", "dt_proj"))
        conv, conv_b = part.get("conv1d"), part.get("conv1d_b")
        score, score_b = part.get("pool_proj"), part.get("pool_proj_b")
        return SSMWeights(
            conv_w=pair(conv.weight, conv_b.weight).squeeze(2) if conv else None,
            conv_b=pair(conv.bias, conv_b.bias) if conv else None,
            x_proj=pair(x_proj.weight, x_proj_b.weight),
            dt_proj=pair(dt.weight, dt_b.weight),
            dt_bias=pair(dt.bias, dt_b.bias),
            A_log=pair(self.A_log, self.A_b_log),
            D=pair(self.D, self.D_b),
            norm_w=at_least_float32(part["layernorm"].weight) if cfg.ssm_norm else None,
            norm_b=at_least_float32(part["layernorm"].bias) if cfg.ssm_norm == "layernorm" else None,
            score_w=pair(score.weight, score_b.weight)[:, 0] if score else None,
            score_b=pair(score.bias, score_b.bias)[:, 0] if score else None,
            pool=cfg.pool, skip_before_expand=cfg.skip_before_expand)

    def backend(self, device):
        """The backend for this mixer. Kernels run a block as one operation: they neither call in_proj and out_proj nor
        see what hangs on them."""
        ends = self.in_proj, self.out_proj
        plain = all(type(m) is nn.Linear and not m._forward_hooks and not m._forward_pre_hooks for m in ends)
        return pick_backend(device, activation_dtype(device, self.in_proj.weight),
                            self.cfg.unusual or ("" if plain else "projections that are replaced or hooked"))

    def forward(self, u, plan, backend=None):
        """u (B L D), normed -> (B L D)."""
        backend = backend or self.backend(u.device)
        if backend.kernels:
            return backend.kernels.block(self, u, None, None, plan)[0]
        xz = self.in_proj(u)                                                # (B L 2E)
        with torch.autocast(u.device.type, enabled=False):                  # the scan and its inputs stay in float32
            y = ssm(xz, self.weights(), plan, backend)[0]                   # (B L E)
        return self.out_proj(y)                                             # (B L D)


class Block(nn.Module):
    """residual += drop_path(hidden); hidden = mixer(norm(residual)). The residual stream is kept in float32."""

    def __init__(self, cfg):
        super().__init__()
        self.norm = NORMS[cfg.block_norm](cfg.embed_dim)
        self.mixer = Mixer(cfg)

    def forward(self, hidden, residual, plan, drop_path=0.0, backend=None, scratch=None):
        backend = backend or self.mixer.backend(hidden.device)
        hidden = stochastic_depth(hidden, drop_path, self.training)
        if backend.kernels:
            return backend.kernels.block(self.mixer, hidden, residual, self.norm, plan, scratch)     # (B L D) twice
        u, residual = backend.add_norm(hidden, residual, self.norm.weight, getattr(self.norm, "bias", None))
        return self.mixer(u, plan, backend), residual                       # (B L D) (B L D)


def stochastic_depth(x, rate, training):
    """Drop path: in training, drops whole samples of a residual branch and scales the others up. x (B ...)."""
    if rate == 0 or not training:
        return x
    keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - rate)
    return x * keep / (1 - rate)


class PatchEmbed(nn.Module):
    """Image (B C H W) -> a token per patch, or per patch and channel: (B D h w) or (B D c h w)."""

    def __init__(self, cfg):
        super().__init__()
        p, self.patch_size, self.per_channel = cfg.patch_size, cfg.patch_size, cfg.per_channel
        if cfg.per_channel:                     # section 3.3: one filter for all channels, told apart by an embedding
            self.proj = nn.Conv3d(1, cfg.embed_dim, (1, p, p), (1, p, p))
            self.channel_embed = nn.Embedding(cfg.in_chans, cfg.embed_dim)
        else:
            self.proj = nn.Conv2d(cfg.in_chans, cfg.embed_dim, p, p)

    def forward(self, x, channels=None):
        (H, W), p = x.shape[-2:], self.patch_size
        x = F.pad(x, (0, (W + p - 1) // p * p - W, 0, (H + p - 1) // p * p - H))            # zeros below and right
        if not self.per_channel:
            return self.proj(x)                                             # (B D h w)
        channel = self.channel_embed(channels).mT                           # (D c)
        return self.proj(x[:, None]) + channel[..., None, None]             # (B D c h w)


def sample_channels(C, keep_order=True):
    """Hierarchical channel sampling (section 3.3): how many of C channels, then which -> their ids (c) int64. Drawn
    once a batch from torch's generator. keep_order: sorted, as a sequence model needs them (Table 19)."""
    pick = torch.randperm(C)[:int(torch.randint(1, C + 1, ()))]
    return pick.sort().values if keep_order else pick


class Layout(NamedTuple):
    """How the tokens of a batch lie in memory."""
    sizes: dict                                 # {axis: length} of the token grid
    slots: Optional[Tensor]                     # (B or 1, S) int64: see make_plan; None: a full grid
    padded: bool                                # some image keeps fewer tokens than another


class FastVim(nn.Module):
    """The encoder: patches, blocks by the schedule table, a head. One class for every model of the paper.

    FastVim(schedule="fastvim", embed_dim=192, ...): the fields of Config. Images are float (B in_chans H W), of any
    height and width: padded with zeros to whole patches, position embeddings resized, pooled by their own grid."""

    def __init__(self, **fields):
        super().__init__()
        unknown = sorted(set(fields) - {f.name for f in dataclasses.fields(Config)})
        if unknown:
            raise ValueError(f"unknown option {', '.join(unknown)}; choose from "
                             f"{', '.join(f.name for f in dataclasses.fields(Config))}")
        self.cfg = cfg = Config(**fields)
        D = cfg.embed_dim
        self.patch_embed = PatchEmbed(cfg)
        self.grid_size = tuple(-(-s // cfg.patch_size) for s in cfg.img_size)       # (h, w) of pos_embed
        positions = math.prod(self.grid_size) + (cfg.class_token and not cfg.per_channel)
        self.pos_embed = nn.Parameter(torch.empty(1, positions, D))         # channels share the position of their patch
        self.cls_token = nn.Parameter(torch.empty(1, 1, D)) if cfg.class_token else None
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        if cfg.out_indices is None:
            self.norm_f = NORMS[cfg.block_norm](D)
            self.head = nn.Linear(D, cfg.num_classes) if cfg.num_classes else nn.Identity()
        else:                                                               # dense tasks: a norm for each tap, no head
            for i in range(len(cfg.out_indices)):
                self.add_module(f"outnorm_{i}", NORMS["layernorm"](D))
        # of what comes into block i, the last one of what comes into norm_f: blocks 0 and 1 both take in the first rate
        self.drop_path_rates = [0.0] + torch.linspace(0, cfg.drop_path_rate, cfg.depth, device="cpu").tolist()
        self.grad_checkpointing = False         # True: keep only each block's input, recompute the rest backwards
        init_weights(self)

    # -- tokens

    def _class_slot(self, h, w, c=1):
        """Where the class token lies among the tokens of a full grid. The plan would find it anywhere; here Vim walks
        over all tokens as they lie, and an image model's pos_embed has its rows in the order of the first layer."""
        return (h // 2) * w if self.cfg.rows[0][1] and not self.cfg.per_channel else h * w * c // 2

    def _position_embedding(self, h, w):
        """pos_embed for a grid of h x w tokens (1 h*w D) and, if it has a row of its own, for the class token."""
        return resize_pos_embed(self.pos_embed, self.grid_size, (h, w), self._class_row())

    def _class_row(self):
        """The row of pos_embed that belongs to the class token, or None."""
        return self._class_slot(*self.grid_size) if self.cfg.class_token and not self.cfg.per_channel else None

    def _tokens(self, x, keep, channels, checked=False):
        """Image -> tokens (B S D) as they lie, and their Layout. checked: keep is known to be sorted and right."""
        cfg = self.cfg
        if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point():
            what = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"images must be a float tensor (B, C, H, W), not {what}")
        if min(x.shape[2:]) < 1:
            raise ValueError(f"images of shape {tuple(x.shape)} have no pixels")
        channels = self._channels(x, channels)
        if cfg.per_channel and cfg.hcs and self.training:
            pick = sample_channels(x.shape[1], cfg.hcs_sorted).to(x.device)
            x, channels = x[:, pick], channels[pick]
        x = self.patch_embed(x, channels)                                   # (B D h w) or (B D c h w)
        sizes = dict(zip("chw" if cfg.per_channel else "hw", x.shape[2:]))
        pos, class_pos = self._position_embedding(sizes["h"], sizes["w"])   # (1 h*w D) (1 1 D) or None
        pos = rearrange(pos, "1 (h w) d -> 1 d h w", h=sizes["h"])
        x = x + (pos[:, :, None] if cfg.per_channel else pos)
        x = rearrange(x, f"b d {' '.join(sizes)} -> b ({cfg.storage}) d")   # (B L D)
        slots, at, padded = None, self._class_slot(**sizes), False
        if keep is not None:
            slots = keep if checked else self._check_keep(keep, x)          # (B S)
            padded = not checked and bool((slots == PADDING).any())
            x = x.gather(1, slots.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))       # (B S D)
            at = slots.shape[1] // 2
        if cfg.class_token:
            token = self.cls_token if class_pos is None else self.cls_token + class_pos
            x = torch.cat([x[:, :at], token.expand(len(x), -1, -1), x[:, at:]], 1)           # (B S D)
            if slots is None:
                slots = torch.arange(x.shape[1] - 1, device=x.device)[None]
            slots = torch.cat([slots[:, :at], slots.new_full((len(slots), 1), CLASS), slots[:, at:]], 1)
        return x, Layout(sizes, slots, padded)

    def _channels(self, x, channels):
        """Checks the image's channels against the model's; returns their ids as a tensor for per-channel models."""
        cfg, C = self.cfg, x.shape[1]
        if not cfg.per_channel:
            if channels is not None:
                raise ValueError("channels= is for per-channel models; this model mixes its channels in patch_embed")
            if C != cfg.in_chans:
                raise ValueError(f"images have {C} channels, the model in_chans={cfg.in_chans}")
            return None
        if channels is None:
            if C != cfg.in_chans:
                raise ValueError(f"images have {C} channels, the model in_chans={cfg.in_chans}: say which they are by "
                                 f"channels=[ids between 0 and {cfg.in_chans - 1}]")
            return torch.arange(C, device=x.device)
        channels = torch.as_tensor(channels)                                # checked where they are: no wait for a GPU
        if channels.shape != (C,) or channels.dtype not in INTEGERS or C == 0 or len(channels.unique()) < C or not (
                0 <= int(channels.min()) and int(channels.max()) < cfg.in_chans):
            raise ValueError(f"channels={channels.tolist()} must give another id between 0 and {cfg.in_chans - 1} for "
                             f"each of the image's {C} channels")
        return channels.long().to(x.device)

    def _check_keep(self, keep, x):
        """keep (B S) integer ids of tokens, -1 for padding -> slots (B S), sorted as they lie, padding last."""
        B, L = x.shape[:2]
        try:
            keep = torch.as_tensor(keep, device=x.device)
        except (TypeError, ValueError) as error:
            raise ValueError(f"keep must be a rectangle of token ids, shorter rows padded with -1 ({error})") from None
        if keep.ndim != 2 or keep.shape[0] != B or keep.dtype not in INTEGERS or keep.shape[1] == 0:
            raise ValueError(f"keep must hold integer token ids of shape (B={B}, kept tokens), -1 for padding; "
                             f"got {keep.dtype} of shape {tuple(keep.shape)}")
        keep = keep.long()
        ids = keep.masked_fill(keep == -1, L).sort(1).values                # (B S) padding last
        if B and not (-1 <= int(keep.min()) and int(keep.max()) < L and int(ids[:, 0].max()) < L) or bool(
                ((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] < L)).any()):
            raise ValueError(f"keep must name at least one of the {L} tokens (0 to {L - 1}) of every image, each at "
                             "most once, and be -1 where it is padding")
        return ids.masked_fill(ids == L, PADDING)

    def _plan(self, row, layout):
        cfg, slots = self.cfg, layout.slots
        if slots is not None and row == (cfg.storage, "") and not layout.padded:    # all tokens, walked as they lie
            return make_plan(("l", ""), "l", dict(l=slots.shape[1]))
        return make_plan(row, cfg.storage, layout.sizes, slots, class_token=cfg.class_token, pool_scale=cfg.pool_scale,
                         mask_divisor=cfg.mask_divisor, released_masking=cfg.released_masking)

    def _blocks(self, x, layout):
        """Runs the blocks; yields each one's output and the residual that it has yet to be added to, both (B S D)."""
        plans = [self._plan(row, layout) for row in self.cfg.rows]          # once a batch, not once a layer
        return run_blocks(self.layers, x, plans, self.drop_path_rates, self.grad_checkpointing and self.training)

    # -- public

    def forward_features(self, x, keep=None, channels=None):
        """Images (B C H W) -> normed tokens (B S D).

        keep (B S) int64: encode only these tokens, -1 pads images that keep fewer (section 3.2, FastMaskVim). Tokens
            are numbered in the order in which they lie (h w; h w c for channel-first per-channel models) and come out
            sorted by number, padding last; with a class token S is one more.
        channels (C) ids of the given channels, for per-channel models; default all in order.
        Raises TypeError or ValueError on a wrong dtype, shape, channel or token id."""
        return self._features(x, keep, channels)[0]

    def _features(self, x, keep, channels, checked=False):
        if self.cfg.out_indices is not None:
            raise ValueError("a model with out_indices has no final norm or head: use forward_intermediates")
        x, layout = self._tokens(x, keep, channels, checked)
        for hidden, residual in self._blocks(x, layout):
            pass
        hidden = stochastic_depth(hidden, self.drop_path_rates[-1], self.training)
        return last_norm(self.layers[-1], hidden, residual, self.norm_f), layout.slots

    def forward(self, x, keep=None, channels=None):
        """Images (B C H W) -> logits (B num_classes). The readout is the class token, or the mean over tokens."""
        x, slots = self._features(x, keep, channels)                        # (B S D)
        if self.cfg.class_token:
            x = x[torch.arange(len(x), device=x.device), (slots == CLASS).int().argmax(1)]   # (B D)
        elif slots is None:
            x = x.mean(1)                                                   # (B D)
        else:
            real = (slots >= 0).to(x)[..., None]                            # (B S 1)
            x = (x * real).sum(1) / real.sum(1)
        return self.head(x)

    def forward_intermediates(self, x, indices=None, channels=None):
        """Images (B C H W) -> a list of feature maps (B D h w), or (B D c h w) per channel, after the blocks `indices`.

        A tap is the block's own output, not the residual stream, through outnorm_i if the model was made with
        out_indices (then `indices` is those): so the released dense checkpoints were built."""
        cfg = self.cfg
        indices = check_blocks("indices", cfg.out_indices if indices is None else indices, cfg.depth)
        if cfg.out_indices not in (None, indices):
            raise ValueError(f"indices={indices}, but the model has norms for out_indices={cfg.out_indices}")
        x, layout = self._tokens(x, None, channels)
        maps = {}
        for i, (hidden, _) in enumerate(self._blocks(x, layout)):
            if i not in indices:
                continue
            if cfg.class_token:
                at = self._class_slot(**layout.sizes)
                hidden = torch.cat([hidden[:, :at], hidden[:, at + 1:]], 1)
            if cfg.out_indices is not None:
                hidden = getattr(self, f"outnorm_{indices.index(i)}")(hidden)
            maps[i] = rearrange(hidden, f"b ({cfg.storage}) d -> b d {' '.join(layout.sizes)}", **layout.sizes)
            if i == max(indices):
                break
        return [maps[i] for i in indices]


def run_blocks(blocks, x, plans, drop_path_rates, recompute=False):
    """x (B S D) through blocks, of which the i-th follows plans[i % len(plans)]; yields each one's output and the
    residual that it has yet to be added to, both (B S D). recompute: gradient checkpointing."""
    backends = [block.mixer.backend(x.device) for block in blocks]
    walks = [plan.walk(x.device) for plan in plans] if any(b.kernels for b in backends) else None
    hidden, residual, scratch = x, None, {}
    for i, (block, backend) in enumerate(zip(blocks, backends)):
        plan = (walks if backend.kernels else plans)[i % len(plans)]
        args = hidden, residual, plan, drop_path_rates[i], backend, scratch
        hidden, residual = torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False) if recompute else (
            block(*args))
        yield hidden, residual


def last_norm(block, hidden, residual, norm):
    """What comes out of the last block -> normed (B S D)."""
    backend = block.mixer.backend(hidden.device)
    differentiate = backend.kernels and (torch.is_grad_enabled() or torch.compiler.is_compiling())
    by = add_norm if differentiate else backend.add_norm                    # kernels do not differentiate by themselves
    return by(hidden, residual, norm.weight, getattr(norm, "bias", None))[0]


def resize_pos_embed(pos, old, new, class_row=None):
    """pos (1 rows D) of a grid old (h, w) -> (1 h*w D) of the grid new, bicubic; and the class token's row or None."""
    own = None
    if class_row is not None:
        own = pos[:, class_row:class_row + 1]
        pos = torch.cat([pos[:, :class_row], pos[:, class_row + 1:]], 1)
    if tuple(old) != tuple(new):
        grid = rearrange(pos, "1 (h w) d -> 1 d h w", h=old[0])
        grid = F.interpolate(at_least_float32(grid), new, mode="bicubic", align_corners=False).to(pos.dtype)
        pos = rearrange(grid, "1 d h w -> 1 (h w) d")
    return pos, own


def sincos_pos_embed(h, w, dim, class_token=False):
    """Fixed 2-D position embeddings (1 h*w dim): sines and cosines of the column in the first half, of the row in the
    second, of wavelengths from 2 pi to 10,000 times that; before them a row of zeros for a class token."""
    frequency = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))     # (dim / 4)
    row, column = (p.flatten()[:, None] * frequency for p in torch.meshgrid(
        torch.arange(h, dtype=torch.float64), torch.arange(w, dtype=torch.float64), indexing="ij"))
    table = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], 1)                 # (h*w dim)
    return F.pad(table, (0, 0, int(class_token), 0))[None].float()


class MAEOutput(NamedTuple):
    loss: Tensor                                # scalar float32, mean square error per pixel of the removed patches
    pred: Tensor                                # (B L p*p*C) what the decoder paints into each patch, see patchify
    mask: Tensor                                # (B L) float32, 1 where the patch was removed


class MaskedAutoencoder(FastVim):
    """Masked autoencoding (section 4.3; He et al., Masked Autoencoders Are Scalable Vision Learners): the encoder, a
    FastVim (then called FastMaskVim) or a Vim, sees a random quarter of the patches; a shallow Vim paints the others.

    MaskedAutoencoder(mask_ratio=0.75, decoder_embed_dim=512, decoder_depth=2, norm_pix_loss=True, ...): the others are
    fields of Config. norm_pix_loss: the target is each patch, less its mean, over its standard deviation.
    Raises ValueError on a mask ratio that keeps or removes nothing, a width that is no multiple of 4."""

    def __init__(self, mask_ratio=0.75, decoder_embed_dim=512, decoder_depth=2, norm_pix_loss=True, **fields):
        if fields.setdefault("num_classes", 0) or fields.get("out_indices") is not None:
            raise ValueError("a masked autoencoder has neither classes nor taps: leave num_classes and out_indices out")
        super().__init__(**fields)
        cfg, (h, w) = self.cfg, self.grid_size
        if cfg.per_channel:
            raise ValueError(f"a masked autoencoder removes whole patches: schedule={cfg.schedule!r} has a token per "
                             "channel")
        for name, width in dict(embed_dim=cfg.embed_dim, decoder_embed_dim=decoder_embed_dim).items():
            if type(width) is not int or width < 4 or width % 4:
                raise ValueError(f"{name}={width!r} must be a multiple of 4, for sin-cos position embeddings")
        self.mask_ratio, self.norm_pix_loss = mask_ratio, norm_pix_loss
        self.kept_patches(h * w)                # raises early
        D = decoder_embed_dim
        self.pos_embed = nn.Parameter(torch.empty_like(self.pos_embed), requires_grad=False)
        self.mask_token = nn.Parameter(torch.empty(1, 1, D))
        self.decoder_embed = nn.Linear(cfg.embed_dim, D)
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, h * w + cfg.class_token, D), requires_grad=False)
        decoder = Config(schedule="vim", embed_dim=D, depth=decoder_depth, d_state=cfg.d_state)
        self.decoder_blocks = nn.ModuleList(Block(decoder) for _ in range(decoder_depth))
        self.decoder_norm = NORMS["rmsnorm"](D)
        self.decoder_pred = nn.Linear(D, cfg.patch_size ** 2 * cfg.in_chans)
        init_weights(self)

    def _class_row(self):
        return 0 if self.cfg.class_token else None              # the released order; load_checkpoint knows

    def kept_patches(self, L):
        """How many of L patches the encoder is shown. Raises ValueError if all or none."""
        ratio = self.mask_ratio
        number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
        kept = int(L * (1 - ratio) + 1e-6) if number and 0 < ratio < 1 else 0
        if not 1 <= kept < L:
            raise ValueError(f"mask_ratio={ratio!r} must be between 0 and 1, keep at least one of the image's {L} "
                             "patches and remove at least one")
        return kept

    def patchify(self, x):
        """Images (B C H W) -> patches (B L p*p*C): pixels by row, column, channel."""
        p = self.cfg.patch_size
        if not isinstance(x, Tensor) or x.ndim != 4 or min(x.shape[2:]) < p or x.shape[2] % p or x.shape[3] % p:
            what = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"images must be (B, C, H, W), of whole patches of {p} x {p} pixels, not {what}")
        return rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)

    def unpatchify(self, patches, h):
        """The inverse, for a grid of h rows: patches (B L p*p*C) -> images (B C H W)."""
        p = self.cfg.patch_size
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=h, p=p, q=p)

    def target(self, x):
        """What the decoder is to paint -> (B L p*p*C), and each patch's mean and standard deviation (B L 1)."""
        patches = at_least_float32(self.patchify(x))
        mean, std = patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        return (patches - mean) / std if self.norm_pix_loss else patches, mean, std

    def random_masking(self, noise):
        """noise (B L): the patches of the smallest are kept -> keep (B S) their ids, ascending so that the scan follows
        the image, and mask (B L) float32, 1 for the removed ones."""
        keep = noise.argsort(1)[:, :self.kept_patches(noise.shape[1])].sort(1).values
        return keep, torch.ones(noise.shape, device=noise.device).scatter(1, keep, 0.0)

    def decode(self, tokens, keep, grid):
        """The encoder's tokens (B S D), of patches keep (B S) of a grid (h, w) -> what belongs there (B L p*p*C)."""
        B, L, row = len(keep), math.prod(grid), self._class_row()
        pos, class_pos = resize_pos_embed(self.decoder_pos_embed, self.grid_size, grid, row)
        tokens, own = self.decoder_embed(tokens), []                                         # (B S d)
        if self.cfg.class_token:                # from the middle of the kept tokens to the end of all
            at = keep.shape[1] // 2
            own = [tokens[:, at:at + 1] + class_pos]
            tokens = torch.cat([tokens[:, :at], tokens[:, at + 1:]], 1)
        x = self.mask_token.to(tokens).expand(B, L, -1)
        x = x.scatter(1, keep[..., None].expand(tokens.shape), tokens) + pos                 # (B L d)
        x = torch.cat([x, *own], 1)
        plan = make_plan(("l", ""), "l", dict(l=x.shape[1]))
        depth, recompute = len(self.decoder_blocks), self.grad_checkpointing and self.training
        for hidden, residual in run_blocks(self.decoder_blocks, x, [plan], [0.0] * depth, recompute):
            pass
        x = last_norm(self.decoder_blocks[-1], hidden, residual, self.decoder_norm)
        return self.decoder_pred(x[:, :L])

    def forward(self, x, noise=None):
        """Images (B C H W), of whole patches -> MAEOutput. noise (B L): decides what is removed; default uniform."""
        target, _, _ = self.target(x)                                                        # (B L p*p*C)
        h, w = (n // self.cfg.patch_size for n in x.shape[2:])
        if noise is None:
            noise = torch.rand(len(x), h * w, device=x.device)
        if noise.shape != target.shape[:2]:
            raise ValueError(f"noise must be a number per patch, {tuple(target.shape[:2])}, not {tuple(noise.shape)}")
        keep, mask = self.random_masking(noise)                                              # (B S) (B L)
        tokens, _ = self._features(x, keep, None, checked=True)                              # (B S D)
        pred = self.decode(tokens, keep, (h, w))                                             # (B L p*p*C)
        error = (at_least_float32(pred) - target).square().mean(-1)                          # (B L)
        return MAEOutput((error * mask).sum() / mask.sum(), pred, mask)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Initialisation, all of it, as in the released code

# patch_embed.proj         image: LeCun normal, bias 0; per channel: PyTorch's default; autoencoder: Xavier uniform
# pos_embed                truncated normal 0.02; autoencoder: sines and cosines, fixed
# cls_token, mask_token    truncated normal 0.02
# channel_embed            normal 0.02
# head                     truncated normal 0.02, bias 0
# out_proj                 Kaiming uniform (a = sqrt 5) / sqrt(depth), so that the residual stream keeps its scale; the
#                          encoder's depth in the decoder, too
# A_log                    log(1 .. N): the real part of S4D
# D                        1
# dt_proj                  weight U(-R^-1/2, R^-1/2), bias softplus^-1(dt) with dt log-uniform in [1e-3, 1e-1]
# dt_proj_b                PyTorch's default weight, bias 0: softplus gives dt = 0.69. An oversight that came with Vim's
#                          code; the published numbers were trained with it, so it is the default here too
# other linear biases      0; in_proj, x_proj, pool_proj, conv1d and norms keep PyTorch's default


@torch.no_grad()
def init_weights(model):
    """Initialises a FastVim in place, from torch's global generator."""
    autoencoder = hasattr(model, "mask_token")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.bias is not None and not name.endswith(".dt_proj"):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Conv2d):
            std = math.prod(module.weight.shape[1:]) ** -0.5 / 0.87962566103423978      # of a normal cut at 2 sigma
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            if autoencoder:
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
            nn.init.zeros_(module.bias)
        if isinstance(module, Mixer):
            R, (E, N) = module.dt_proj.in_features, module.A_log.shape
            nn.init.uniform_(module.dt_proj.weight, -R ** -0.5, R ** -0.5)
            dt = torch.exp(torch.rand(E) * (math.log(0.1) - math.log(1e-3)) + math.log(1e-3))
            module.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))                # softplus(bias) = dt
            for A_log, D in ((module.A_log, module.D), (module.A_b_log, module.D_b)):
                A_log.copy_(torch.arange(1.0, N + 1).log().expand(E, N))
                nn.init.ones_(D)
            nn.init.kaiming_uniform_(module.out_proj.weight, a=math.sqrt(5))
            module.out_proj.weight /= math.sqrt(model.cfg.depth)
    for name in ("pos_embed", "cls_token", "mask_token"):
        if getattr(model, name, None) is not None:
            nn.init.trunc_normal_(getattr(model, name), std=0.02)
    if autoencoder:
        for pos in (model.pos_embed, model.decoder_pos_embed):
            pos.copy_(sincos_pos_embed(*model.grid_size, pos.shape[2], model.cfg.class_token))
    if model.cfg.per_channel:
        nn.init.normal_(model.patch_embed.channel_embed.weight, std=0.02)
    if isinstance(getattr(model, "head", None), nn.Linear):
        nn.init.trunc_normal_(model.head.weight, std=0.02)


# ----------------------------------------------------------------------------------------------------------------------
# 7. Building and loading


def list_models():
    """The names that create_model knows."""
    return [f"{family}_{size}" for family in FAMILIES for size in SIZES]


def create_model(name, autoencoder=False, **overrides):
    """A freshly initialised model by name, for example "fastvim_tiny", with any field of Config overridden.

    autoencoder: the MaskedAutoencoder of that encoder, such as "fastmaskvim_base", which has options of its own.
    Raises ValueError for an unknown name, option or combination, naming the choices."""
    family, _, size = str(name).rpartition("_")
    if family not in FAMILIES or size not in SIZES:
        raise ValueError(f"unknown model {name!r}; choose a family from {', '.join(FAMILIES)} and a size from "
                         f"{', '.join(SIZES)}, for example fastvim_tiny")
    return (MaskedAutoencoder if autoencoder else FastVim)(**{**SIZES[size], **FAMILIES[family], **overrides})


class _Inert:
    """Stands for every object of a checkpoint file that is neither a tensor nor a plain value: it does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def _nothing(self, *args, **kwargs):
        pass

    __setstate__ = __setitem__ = __call__ = append = extend = add = _nothing


class _TensorsOnly(pickle.Unpickler):
    """Reads a checkpoint without running anything that it names. Released files hold NumPy arrays and objects of
    Lightning and MMEngine, which the user need not have, and for which weights_only=True refuses the whole file."""
    allowed = {("collections", "OrderedDict"): collections.OrderedDict}
    allowed.update({("torch._utils", f): getattr(torch._utils, f)
                    for f in ("_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_tensor")})

    def find_class(self, module, name):
        return self.allowed.get((module, name), _Inert)


def read_checkpoint(path):
    """The dictionary in a .safetensors, .pt, .pth or .ckpt file, read without running code from it.

    Raises FileNotFoundError, or ValueError for a file that is no checkpoint."""
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file
            content = load_file(path)
        else:
            if zipfile.is_zipfile(path) and any(n.endswith("constants.pkl") for n in zipfile.ZipFile(path).namelist()):
                raise ValueError("it is a TorchScript program, not a dictionary of weights")
            reader = types.SimpleNamespace(Unpickler=_TensorsOnly, __name__="tensors_only",
                                           load=lambda file, **options: _TensorsOnly(file, **options).load())
            content = torch.load(path, map_location="cpu", pickle_module=reader, weights_only=False)
    except ImportError:
        raise
    except Exception as error:                                              # a damaged file can fail in any way
        raise ValueError(f"{path} is not a readable checkpoint ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no dictionary of weights")
    return content


def stored_weights(content):
    """What read_checkpoint returned -> ({name: Tensor} as stored, under which key). EMA weights when there are some.

    They lie in state_dict_ema or state_dict of Lightning and MMEngine files, in ema or model of ours, Vim's and MAE's,
    or the dictionary is them."""
    source = next((key for key in ("state_dict_ema", "ema", "state_dict", "model")
                   if isinstance(content.get(key), dict) and content[key]), "")
    return {k: v for k, v in (content[source] if source else content).items() if isinstance(v, Tensor)}, source


def model_weights(content):
    """What read_checkpoint returned -> (weights {name: Tensor} of the encoder or autoencoder under our names, where in
    the file they lay). Raises ValueError if there are none."""
    tensors, source = stored_weights(content)
    for prefix in ("ema.module.", "module.", "backbone."):
        if found := {k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)}:
            tensors, source = found, f"{source} {prefix[:-1]}".strip()
    if not tensors:
        raise ValueError("the checkpoint holds no weights")
    return tensors, source or "the weights"


def _fit_positions(model, tensors, released_pos_rows):
    """Moves and resizes tensors["pos_embed"] to where the model expects it; returns what was done, in words."""
    pos, row = tensors.get("pos_embed"), model._class_row()     # row: that of the class token, in the model
    if pos is None or pos.ndim != 3 or len(pos) != 1:
        return ""
    if isinstance(model, MaskedAutoencoder):
        if pos.shape == model.pos_embed.shape:
            return ""                                           # else: it has sines and cosines for its own grid
        tensors.update(pos_embed=model.pos_embed, decoder_pos_embed=model.decoder_pos_embed)
        return f", position embeddings those of {' x '.join(map(str, model.grid_size))} patches"
    side = math.isqrt(max(0, pos.shape[1] - (row is not None)))
    same = pos.shape == model.pos_embed.shape
    old = model.grid_size if same else (side, side)
    if not side and not same or math.prod(old) + (row is not None) != pos.shape[1]:
        return ""                                               # no square grid: it will be listed as of another shape
    was, note = row, ""
    if row is not None:
        was = 0 if "mask_token" in tensors and not released_pos_rows else model._class_slot(*old)
    if same and was == row:
        return ""
    pos, own = resize_pos_embed(pos, old, model.grid_size, was)
    tensors["pos_embed"] = pos if row is None else torch.cat([pos[:, :row], own, pos[:, row:]], 1)
    if was != row and "mask_token" in tensors and not released_pos_rows:
        note += f", position row of the class token moved from 0 to {row}"
    if not same:
        note += f", position embeddings resized from {side} x {side} to {' x '.join(map(str, model.grid_size))}"
    return note


def load_checkpoint(model, path, encoder_only=False, released_pos_rows=False):
    """Loads the weights at `path` (a file, or what read_checkpoint made of it) strictly into a model; returns one line
    that says what was taken.

    Position embeddings of another, square grid are resized.
    encoder_only: the file's head, or its autoencoder's decoder, is dropped, and the model keeps its own head.
    released_pos_rows: an autoencoder's pos_embed has the class token's row first, a classifier's where the token lies.
        The released code hands the rows over as they are, so that half of a Vim's patches get their neighbour's.
    Raises ValueError, listing the keys that differ, if the file belongs to another model, which is then left as it was;
    FileNotFoundError or ValueError as read_checkpoint."""
    tensors, source = model_weights(path if isinstance(path, dict) else read_checkpoint(path))
    own, note = model.state_dict(), f"loaded {source}"
    if isinstance(model, FastVim):
        if not any(name.startswith("layers.") for name in tensors):
            raise ValueError(f"the checkpoint holds no encoder: of its {len(tensors)} weights none is called layers.*; "
                             f"they are {', '.join(sorted(tensors)[:4])}{', ...' * (len(tensors) > 4)}")
        note += _fit_positions(model, tensors, released_pos_rows)
    if encoder_only:
        parts = collections.Counter(k.partition(".")[0] for k in tensors
                                    if k.startswith(("head.", "decoder_", "mask_token")))
        tensors = {k: v for k, v in tensors.items() if k.partition(".")[0] not in parts}
        fresh = {k: v for k, v in own.items() if k.startswith("head.")}
        note += (f"; {len(tensors)} weights of the encoder taken, {sum(parts.values())} dropped "
                 f"({', '.join(parts) or 'none'}), {len(fresh)} of the head as initialised")
        tensors |= fresh
    differ = {"missing in the file": sorted(own.keys() - tensors.keys()),
              "unknown to the model": sorted(tensors.keys() - own.keys()),
              "of another shape": [f"{k} {tuple(tensors[k].shape)}, in the model {tuple(own[k].shape)}"
                                   for k in own if k in tensors and tensors[k].shape != own[k].shape]}
    if any(differ.values()):
        raise ValueError("the checkpoint belongs to another model:" + "".join(
            f"\n  {len(keys)} {what}: {'; '.join(keys[:6])}{'; ...' * (len(keys) > 6)}"
            for what, keys in differ.items() if keys))
    model.load_state_dict(tensors, strict=True)
    return note


# ----------------------------------------------------------------------------------------------------------------------
# 8. Counting multiply-adds


def count_macs(cfg, img_size=None, kept=1.0):
    """Multiply-adds of one image's forward pass, by part, as {part: count}. cfg is a Config, img_size pixels or (H, W),
    kept the share of the tokens that a mask leaves.

    The matrix products are exact. As is usual since fvcore, the scan counts 9 P E N a direction and a norm 5 per
    element. What remains uncounted is elementwise: SiLU, the gate, pooling, the D skip, the residual additions."""
    H, W = (img_size, img_size) if isinstance(img_size, int) else img_size or cfg.img_size
    h, w, c = -(-H // cfg.patch_size), -(-W // cfg.patch_size), cfg.in_chans if cfg.per_channel else 1
    D, E, N, patch = cfg.embed_dim, cfg.expand * cfg.embed_dim, cfg.d_state, cfg.patch_size ** 2
    R, L = cfg.dt_rank or math.ceil(D / 16), int(kept * h * w * c) + cfg.class_token
    macs = dict(patch_embed=h * w * D * cfg.in_chans * patch, in_proj=0, conv1d=0, score=0, x_proj=0, dt_proj=0,
                out_proj=0, scan=0, norm=5 * L * D, head=D * cfg.num_classes)
    for i in range(cfg.depth):
        row = cfg.rows[i % len(cfg.rows)]
        P = make_plan(row, cfg.storage, dict(h=h, w=w, c=c)).steps + cfg.class_token if row[1] else L
        macs["in_proj"] += 2 * L * D * E
        macs["conv1d"] += 2 * L * E * cfg.d_conv
        macs["score"] += 2 * L * E * (cfg.pool == "attention")
        macs["x_proj"] += 2 * P * E * (R + 2 * N)
        macs["dt_proj"] += 2 * P * R * E
        macs["scan"] += 2 * 9 * P * E * N
        macs["out_proj"] += L * E * D
        macs["norm"] += 5 * L * D + (5 * L * E if cfg.ssm_norm else 0)
    return macs


def count_vit_macs(img_size, embed_dim=192, depth=12, patch_size=16, in_chans=3, num_classes=1000):
    """Multiply-adds of a ViT (DeiT) with a class token, for the comparison of Figure 4."""
    D, patches = embed_dim, math.ceil(img_size / patch_size) ** 2
    L = patches + 1
    return patches * D * in_chans * patch_size ** 2 + depth * (12 * L * D * D + 2 * L * L * D) + D * num_classes


# ----------------------------------------------------------------------------------------------------------------------
# 9. The command line


def _milliseconds(cfg, device, kept):
    """Time of one image, measured here and now: the median of three runs, or one run if that takes long."""
    with torch.device("meta"):
        model = FastVim(**dataclasses.asdict(cfg))
    model = model.to_empty(device=device).eval()
    for p in model.parameters():
        p.data.normal_(std=0.02)
    x, times, tokens = torch.randn(1, cfg.in_chans, *cfg.img_size, device=device), [], math.prod(model.grid_size)
    keep = None if kept == 1 else torch.randperm(tokens, device=device)[None, :int(kept * tokens)]
    with torch.inference_mode():
        while len(times) < 4 and sum(times) < 4:                            # the first run warms up
            start = time.perf_counter()
            model(x, keep=keep).sum().item()                                           # .item() waits for the device
            times.append(time.perf_counter() - start)
    times = sorted(times[1:] or times)
    return 1e3 * times[len(times) // 2]


def _table(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = [m for m in list_models() if args.models in m]
    if not wanted:
        raise SystemExit(f"no model has {args.models!r} in its name; the models are: {', '.join(list_models())}")
    print(f"backend {pick_backend(device).name} on {device}, {torch.get_num_threads()} threads, float32, batch 1; "
          "FastMaskVim keeps 25 % of its tokens\n(the largest take seconds to minutes; --models tiny: the smallest)")
    print(f"{'model':24} {'parameters':>12} {'G multiply-adds':>16} {'ms / image':>11}")
    for name in wanted:
        with torch.device("meta"):
            model = create_model(name)
        parameters = sum(p.numel() for p in model.parameters())
        kept = 0.25 if name.startswith("fastmaskvim") else 1.0
        macs = sum(count_macs(model.cfg, 224, kept).values()) / 1e9
        print(f"{name:24} {parameters:12,} {macs:16.2f} {_milliseconds(model.cfg, device, kept):11.1f}", flush=True)


def _figure4(resolutions):
    print("G multiply-adds by resolution (the paper's Figure 4)")
    print(f"{'pixels':>8} {'ViT-T':>10} {'Vim-T':>10} {'FastVim-T':>10}")
    vim, fast = (Config(**SIZES["tiny"], **FAMILIES[f]) for f in ("vim", "fastvim"))
    for r in resolutions:
        counts = count_vit_macs(r), sum(count_macs(vim, r).values()), sum(count_macs(fast, r).values())
        print(f"{r:8} " + " ".join(f"{n / 1e9:10.2f}" for n in counts))


def _doctor():
    def version(command):
        path = shutil.which(command)
        if path is None:
            return "not found"
        lines = subprocess.run([path, "--version"], capture_output=True, text=True).stdout.strip().splitlines()
        return (lines[-1] if command == "nvcc" else lines[0]) if lines else path
    print(f"python    {sys.version.split()[0]}\ntorch     {torch.__version__} (CUDA {torch.version.cuda})")
    print(f"cpu       {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
          f"{torch.backends.cpu.get_cpu_capability()}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"gpu       {', '.join(gpus) or 'none'}")
    for command in ("g++", "nvcc", "ninja"):
        print(f"{command:9} {version(command)}")
    forced = os.environ.get("FASTVIM_BACKEND")
    print(f"backends  FASTVIM_BACKEND is {forced or 'not set'}")
    for backend in BACKENDS.values():
        state = backend.why
        if backend.kernels:                     # asking compiles them
            missing = "cuda" in backend.devices and not gpus
            state = "no GPU here" if missing else backend.kernels.error() or "compiled kernels, ready"
        print(f"  {backend.name:8} {', '.join(backend.devices) or 'every device'}: {state}")
    for device in ["cpu"] + ["cuda"] * bool(gpus):
        print(f"  on {device} models run by {pick_backend(device).name!r}")


def main():
    parser = argparse.ArgumentParser(description="The models: parameters, multiply-adds at 224 px, time per image.")
    parser.add_argument("command", nargs="?", choices=["table", "doctor"], default="table",
                        help="table: every model, measured here (default); doctor: what this machine has")
    parser.add_argument("--models", default="", metavar="TEXT", help="only names that contain TEXT, such as tiny")
    parser.add_argument("--resolution", type=int, nargs="+", metavar="PX",
                        help="instead: multiply-adds of ViT-T, Vim-T and FastVim-T at these sizes (Figure 4)")
    args = parser.parse_args()
    try:
        if args.command == "doctor":
            _doctor()
        elif args.resolution:
            if min(args.resolution) < 16:
                parser.error("--resolution: at least 16 pixels, one patch")
            _figure4(args.resolution)
        else:
            _table(args)
    except ValueError as error:
        parser.error(str(error))


try:
    import fastvim_kernels      # noqa: F401, E402   registers the backends cpu and cuda, compiles nothing yet
except ModuleNotFoundError as error:
    if error.name != "fastvim_kernels":         # else this file was copied alone: plain PyTorch it is
        raise

if __name__ == "__main__":
    from fastvim import main    # the module, not this script: there must be one table of backends
    main()
