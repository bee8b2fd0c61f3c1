"""FastVim: vision state-space models that pool the token grid, in one file.

The idea. Vision Mamba (Vim) walks over all h x w patches of an image with a selective scan, both
forwards and backwards. FastVim first averages the tokens of each row, scans the h averages, and
hands every token of a row the result; the next layer does the same with columns. One scan cannot
tell the tokens of a row apart, two can; and the recurrence, the one part that goes step by step,
takes h or w steps instead of h x w. The rest is Vim's block, and a norm after the scan.

    3 x 4 tokens           pool         scan, both ways          expand
    a  b  c  d             abcd            s1  |  ^           s1 s1 s1 s1
    e  f  g  h     -->     efgh    -->     s2  |  |    -->    s2 s2 s2 s2     an even layer: rows
    i  j  k  l             ijkl            s3  v  |           s3 s3 s3 s3

    a  b  c  d             aei bfj         s1 s2 s3 s4        s1 s2 s3 s4
    e  f  g  h     -->     cgk dhl  -->     --->  <---  -->   s1 s2 s3 s4     an odd layer: columns
    i  j  k  l                                                s1 s2 s3 s4

The block. Every encoder of the paper is this one, with two settings per layer: in which order the
grid is flattened, and which of its axes are pooled away before the scan (the table SCHEDULES).

    residual = residual + hidden
    x, z  = in_proj(norm(residual))            (b l e) each
    for the two directions, each with weights of its own:
        c = silu(causal_conv1d(x))             (b l e) along the layer's flatten order
        p = pool(c)                            (b p e)    Algorithm 1, line 3
        dt, B, C = select(p)                              Algorithm 1, lines 4 to 6
        s = selective_scan(p, dt, A, B, C)     (b p e)    Algorithm 1, lines 7 and 8
        y = expand(s) + D c                    (b l e)    Algorithm 1, line 9; D skips the pooling
    hidden = out_proj(norm(mean of both y) * silu(z))

   Kapse, Betz, Sivanandan. Fast Vision Mamba: Pooling Spatial Dimensions for Accelerated Processing
   Zhu et al. Vision Mamba: Efficient Visual Representation Learning with Bidirectional SSM (Vim)
   Gu, Dao. Mamba: Linear-Time Sequence Modeling with Selective State Spaces

In shapes, letters are lengths (H, W, T in pixels and frames); A, B, C, D are the paper's matrices:

    b  images           l  tokens of a grid     d  embed_dim, width of the residual stream
    k  directions, 2    p  scan steps           e  inner width, expand * d
    n  d_state          s  tokens kept          h, w, c, t  rows, columns, channels, time
    r  dt_rank          m  tokens of a step     A, B, C, D  decay, input, output of a state; skip

    python fastvim.py [doctor | trace IMAGE]    every model; this machine; an image on its way
"""
import contextlib
import dataclasses
import functools
import logging
import math
import os
import runpy
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

try:                                        # none of these imports this file
    import checks
    import fastvim_export
    import fastvim_hub
    import fastvim_kernels
    from checkpoints import load as load_checkpoint  # noqa: F401
    Backbone = fastvim_hub.Backbone         # nn.Module, and what timm and the hubs ask of a model
except ModuleNotFoundError as error:        # this file was copied alone: plain PyTorch it is
    if error.name != "checkpoints" and not error.name.startswith(("checks", "fastvim_")):
        raise
    checks = None
    Backbone = nn.Module

__version__ = "0.2.0"

# ---- 1. The selective scan -----------------------------------------------------------------------
#
# A state of n numbers per channel is carried from step to step: it decays, takes in the step's
# input and is read out. The scan is selective because dt, B and C depend on the input.


def selective_scan(x, dt, A, B, C, D=None, dt_bias=None) -> Tensor:
    """x, dt (k b p e), A (k e n), B, C (k b p n), D, dt_bias (k e) -> s (k b p e). Equations 2, 3.

    Direction 0 runs from the first step to the last, direction 1 from the last to the first. dt is
    yet without softplus. As in Mamba, A has equation 2's zero-order hold, B Euler's rule, dt B."""
    if dt_bias is not None:
        dt = dt + dt_bias[:, None, None]
    dt = F.softplus(dt)
    A = A.mT[:, None].contiguous()                          # (k 1 n e)  e last: long vectors
    if checks and torch.compiler.is_exporting():            # a program without loops
        return fastvim_export.selective_scan(x, dt, A, B, C, D)
    steps = zip(*(reverse_second(v).unbind(2) for v in (x, dt, B, C)))
    h = x.new_zeros(())                                     # the state, (k b n e) from step 1 on
    s = []
    for x_t, dt_t, B_t, C_t in steps:                       # (k b e) (k b e) (k b n) (k b n)
        decay = torch.exp(dt_t[:, :, None] * A)             # (k b n e)  equation 2: exp(dt A)
        drive = B_t[..., None] * (dt_t * x_t)[:, :, None]   # (k b n e)  Euler's rule: dt B x
        h = torch.addcmul(drive, decay, h)                  # (k b n e)  equation 3: decay h + drive
        s.append((C_t[:, :, None] @ h)[:, :, 0])            # (k b e)    equation 3: y = C h
    s = reverse_second(torch.stack(s, 2))                   # (k b p e)
    if D is not None:
        s = s + D[:, None, None] * x                        #            equation 3: ... + D x
    return s


def reverse_second(v: Tensor) -> Tensor:
    """Direction 1 reads the sequence from its other end. v (k b p ...) -> v[0], v[1] reversed."""
    return torch.cat([v[:1], v[1:].flip(2)])


class SSMWeights(NamedTuple):
    """What lies between a mixer's two projections needs these. All tensors are at least float32."""
    conv_weight: Tensor | None              # (k e taps), None without the convolution
    conv_bias: Tensor | None                # (k e)
    x_proj: Tensor                          # (k r+2n e)
    dt_proj: Tensor                         # (k e r)
    dt_bias: Tensor                         # (k e)
    A_log: Tensor                           # (k e n)
    D: Tensor                               # (k e)
    score_weight: Tensor | None             # (k e), attention pooling only
    score_bias: Tensor | None               # (k)
    layernorm: nn.Module | None             # over e, None without the post-SSM norm
    pool: str                               # a name of POOLS
    skip_before_expand: bool                # True: D multiplies the pooled tokens


def select(p: Tensor, w: SSMWeights) -> tuple[Tensor, Tensor, Tensor]:
    """Equation 4: pooled tokens p (k b p e) choose dt (k b p e) of rank r, and B, C (k b p n)."""
    n = w.A_log.shape[2]
    low, B, C = torch.einsum("kbpe,kre->kbpr", p, w.x_proj).split([w.dt_proj.shape[2], n, n], -1)
    dt = torch.einsum("kbpr,ker->kbpe", low, w.dt_proj)
    return dt, B, C


# ---- 2. Around the scan: convolution, pooling, gate ----------------------------------------------
#
# Three operations do all the work between the matrix products: conv_pool, selective_scan,
# expand_gate. In this file they are written to be read; faster backends are tested against them.


def conv_silu(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Causal depthwise convolution in both directions. x (b l e), weight (k e taps) -> c (k b l e).
    Backward, it is that of the reversed sequence: mirrored taps, padding on the other side."""
    if weight is None:
        return F.silu(torch.stack([x, x]))                  # Table 7, "w/o conv1d"
    e, taps = weight.shape[1:]
    x = x.mT                                                # (b e l)
    forward = F.conv1d(F.pad(x, (taps - 1, 0)), weight[0, :, None], bias[0], groups=e)
    backward = F.conv1d(F.pad(x, (0, taps - 1)), weight[1, :, None].flip(2), bias[1], groups=e)
    return F.silu(torch.stack([forward.mT, backward.mT]))   # (k b l e)


# How the m tokens of a scan step become one: c (k b p m e), score (k b p m 1) -> (k b p e).
# Of equal maxima the first counts, and receives the gradient. Table 20.
POOLS = {
    "mean": lambda c, score: c.mean(3),
    "max": lambda c, score: c.max(3).values,
    "attention": lambda c, score: (c * score.softmax(3)).sum(3),
}


@dataclasses.dataclass(frozen=True)
class Grid:
    """How one layer walks a grid of tokens, in the axis names of einops, outermost axis first."""
    storage: str = "l"                      # the order in which the tokens lie in memory
    order: str = "l"                        # in which the layer walks them: "w h" down the columns
    pooled: str = ""                        # the axes that are pooled away before the scan: "h"
    sizes: tuple = ()                       # in storage order: (("h", 14), ("w", 14))
    scale: float = 1.0                      # factor of the means (Table 14); 1 for other kinds

    @property
    def kept(self) -> str:
        """The axes that the scan walks along."""
        return " ".join(axis for axis in self.order.split() if axis not in self.pooled.split())

    @property
    def steps(self) -> int:
        """How many steps the scan takes."""
        return math.prod([n for axis, n in self.sizes if axis not in self.pooled.split()])

    def flatten(self, x: Tensor) -> Tensor:
        """Tokens as they lie -> as the layer walks them. x (b l e) -> (b l e)."""
        return rearrange(x, f"b ({self.storage}) e -> b ({self.order}) e", **dict(self.sizes))

    def unflatten(self, y: Tensor) -> Tensor:
        """The inverse of flatten. y (b l e) -> (b l e)."""
        return rearrange(y, f"b ({self.order}) e -> b ({self.storage}) e", **dict(self.sizes))

    def pool(self, c: Tensor, kind: str = "mean", score: Tensor | None = None) -> Tensor:
        """Tokens -> scan steps. c (k b l e), score (k b l 1) or None -> (k b p e)."""
        if not self.pooled:
            return c
        steps = f"k b ({self.order}) e -> k b ({self.kept}) ({self.pooled}) e"
        c = rearrange(c, steps, **dict(self.sizes))         # (k b p m e)
        if score is not None:
            score = rearrange(score, steps, **dict(self.sizes))
        return POOLS[kind](c, score) * self.scale           # (k b p e)

    def expand(self, s: Tensor) -> Tensor:
        """Scan steps -> their tokens. s (k b p e) -> (k b l e)."""
        return repeat(s, f"k b ({self.kept}) e -> k b ({self.order}) e", **dict(self.sizes))


def conv_pool(xz: Tensor, w: SSMWeights, grid: Grid) -> tuple[Tensor, Tensor]:
    """The x of xz (b l 2e) -> c (k b l e), and the scan's input p (k b p e)."""
    x, _ = at_least_float32(xz).chunk(2, -1)                # (b l e)
    c = conv_silu(grid.flatten(x), w.conv_weight, w.conv_bias)
    score = None
    if w.pool == "attention":
        score = c @ w.score_weight[:, None, :, None] + w.score_bias[:, None, None, None]
    return c, grid.pool(c, w.pool, score)


def expand_gate(xz: Tensor, c: Tensor, s: Tensor, w: SSMWeights, grid: Grid) -> Tensor:
    """The z of xz (b l 2e), c (k b l e) and the scan's output s (k b p e) -> y (b l e).
    The skip uses c as it was before pooling (Figure 2): the scan is shortened, not the picture."""
    y = grid.expand(s)                                      # (k b l e)
    if not w.skip_before_expand:
        y = y + w.D[:, None, None] * c
    y = (y[0] + y[1]) / 2                                   # (b l e)
    if w.layernorm is not None:
        y = run_norm(w.layernorm, y)                        # section 4.1, "Stability"
    _, z = at_least_float32(xz).chunk(2, -1)                # (b l e)
    return (grid.unflatten(y) * F.silu(z)).to(xz.dtype)


def ssm(xz: Tensor, w: SSMWeights, grid: Grid) -> Tensor:
    """All that lies between in_proj and out_proj. xz (b l 2e) -> y (b l e), as the tokens lie."""
    device = "cpu" if xz.is_meta else xz.device.type
    with torch.autocast(device, enabled=False):             # the scan stays in float32
        c, p = conv_pool(xz, w, grid)                       # Algorithm 1, line 3
        dt, B, C = select(p, w)                             # lines 4 to 6
        D = w.D if w.skip_before_expand else None           # Table 18, "After D"
        s = selective_scan(p, dt, -torch.exp(w.A_log), B, C, D, w.dt_bias)  # lines 7 and 8
        return expand_gate(xz, c, s, w, grid)               # line 9


def at_least_float32(v):
    """States, sums and norms are float32 when activations are 16-bit. Others pass as they are."""
    is_16_bit = isinstance(v, Tensor) and v.dtype in (torch.bfloat16, torch.float16)
    return v.float() if is_16_bit else v


# ---- 3. Schedules, sizes and options -------------------------------------------------------------

# One row a layer, used in turn: (flatten order, axes pooled away). "h w" walks along the rows;
# pooling "w" there leaves one token for each row (the paper's Pool_col, section 3.1).
SCHEDULES = {
    "vim": [("h w", "")],
    "fastvim": [("h w", "w"), ("w h", "h")],
    "pool_col": [("h w", "w")],                                             # Table 6
    "pool_row": [("w h", "h")],
    "channelvim": [("h w c", "")],          # section 3.3; channel-first, patch by patch
    "channelvim_spatial": [("c h w", "")],
    "fastchannelvim": [("h w c", "w"), ("w h c", "h")],
    "fastchannelvim_spatial": [("c h w", "w"), ("c w h", "h")],
    "fastchannelvim_2d": [("h w c", "w c"), ("w h c", "h c"), ("h w c", "h w")],    # Table 21
    "fastvim_video": [("t h w", "h w"), ("h w t", "w t"), ("w t h", "t h")],    # beyond the paper
}

SIZES = {                                                                   # Table 25
    "tiny": dict(embed_dim=192, depth=24),
    "small": dict(embed_dim=384, depth=24),
    "base": dict(embed_dim=768, depth=24),
    "large": dict(embed_dim=1024, depth=48),
    "huge": dict(embed_dim=1280, depth=64, patch_size=14),                  # of MAE's ViT-H
}

FAMILIES = {
    "fastvim": dict(schedule="fastvim"),
    "vim": dict(schedule="vim", class_token=True),      # ssm_norm=None gives the first Vim
    "fastmaskvim": dict(schedule="fastvim"),            # a FastVim that is shown only `keep`
    "channelvim": dict(schedule="channelvim", class_token=True, in_chans=8, num_classes=161),
    "fastchannelvim": dict(schedule="fastchannelvim", in_chans=8, num_classes=161),
    "fastvim_video": dict(schedule="fastvim_video", frames=16, tubelet=2, num_classes=400),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """All that defines a model, given to `create_model` by name. What is wrong is a ValueError."""
    schedule: str = "fastvim"               # a name in SCHEDULES
    img_size: int | tuple = 224             # pixels, or (height, width), of pos_embed
    patch_size: int = 16                    # pixels
    frames: int = 1                         # of a video, for schedules with an axis t
    tubelet: int = 1                        # frames of a patch
    in_chans: int = 3
    num_classes: int = 1000                 # 0: no head, the model returns the pooled features
    embed_dim: int = 192                    # d
    depth: int = 24                         # blocks
    d_state: int = 16                       # n
    d_conv: int = 4                         # taps; 0 leaves the convolution out (Table 7)
    expand: int = 2                         # e / d
    dt_rank: int | None = None              # r; None: ceil(d / 16)
    class_token: bool = False               # one more token, un-pooled, the middle step of the scan
    block_norm: str = "rmsnorm"             # Table 17
    ssm_norm: str | None = "layernorm"      # norm after the scan (section 4.1); None: without
    pool: str = "mean"                      # a name of POOLS
    pool_scale: float = 1.0                 # factor of the means; 0.25 after masked pretraining
    skip_before_expand: bool = False        # True: D multiplies the pooled tokens (Table 18)
    drop_path_rate: float = 0.0             # stochastic depth at the last block, rising from 0
    hcs: bool = True                        # hierarchical channel sampling (section 3.3)
    hcs_sorted: bool = True                 # sampled channels stay in order (Table 19)
    mask_divisor: str = "axis"              # masked means: by the axis, or by "count" (Table 12)
    out_indices: Sequence | None = None     # blocks tapped for dense tasks: a norm each, no head

    def __post_init__(self):
        size = self.img_size
        many = hasattr(size, "__len__") and not isinstance(size, str)
        object.__setattr__(self, "img_size", tuple(size) if many else (size, size))
        check("config", self, SCHEDULES, NORMS, POOLS)

    @property
    def rows(self) -> list:
        """Layer i runs by rows[i % len(rows)]."""
        return SCHEDULES[self.schedule]

    @property
    def storage(self) -> str:
        """Tokens lie in memory in the order in which the first layer walks them."""
        return self.rows[0][0]

    @property
    def per_channel(self) -> bool:
        return "c" in self.storage

    @property
    def extents(self) -> dict[str, tuple]:
        """Axes as patch_embed leaves them -> length, and a patch's, in pixels, frames, channels."""
        lengths = (self.in_chans, self.frames, *self.img_size)
        sizes = (1, self.tubelet, self.patch_size, self.patch_size)
        return {a: (n, p) for a, n, p in zip("cthw", lengths, sizes) if a in self.storage}


def check(what: str, *arguments):
    """Raises where an argument is wrong. This file copied alone trusts its caller."""
    if checks is not None:
        getattr(checks, f"check_{what}")(*arguments)


# ---- 4. Mixer and block --------------------------------------------------------------------------

# Norms compute in float32 at least, also where their weights are 16-bit.
class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        weight = at_least_float32(self.weight)
        return F.rms_norm(at_least_float32(x), self.normalized_shape, weight, self.eps)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        weights = (at_least_float32(self.weight), at_least_float32(self.bias))
        return F.layer_norm(at_least_float32(x), self.normalized_shape, *weights, self.eps)


NORMS = {"rmsnorm": functools.partial(RMSNorm, eps=1e-5), "layernorm": LayerNorm}


def norm_dtype(norm: nn.Module, x: Tensor) -> torch.dtype:
    """Of the norm's output: its weight's; x's without a weight, or if FSDP has yet to gather it."""
    weight = getattr(norm, "weight", None)
    return x.dtype if weight is None or hasattr(weight, "full_tensor") else weight.dtype


def run_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x). A norm of another class, put in the place of ours, gets x in its own type."""
    if not isinstance(norm, (RMSNorm, LayerNorm)):
        x = x.to(norm_dtype(norm, x))
    return norm(x)


def add_norm(hidden: Tensor, residual: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """hidden, residual (b l d), None before block 0 -> norm(residual + hidden) in the norm's type,
    and the sum. The residual stream is kept in float32 at least."""
    dtype = norm_dtype(norm, hidden)
    hidden = at_least_float32(hidden)
    residual = hidden if residual is None else residual + hidden
    return run_norm(norm, residual).to(dtype), residual


class Mixer(nn.Module):
    """Figure 2. Every parameter of the scan has the two directions as its first axis."""

    def __init__(self, cfg: Config):
        super().__init__()
        d = cfg.embed_dim
        e = cfg.expand * d
        n = cfg.d_state
        r = cfg.dt_rank or math.ceil(d / 16)

        def parameter(*shape, wanted=True):
            return nn.Parameter(torch.empty(2, *shape)) if wanted else None

        self.pool = cfg.pool
        self.skip_before_expand = cfg.skip_before_expand
        self.in_proj = nn.Linear(d, 2 * e, bias=False)
        self.conv_weight = parameter(e, cfg.d_conv, wanted=cfg.d_conv > 0)
        self.conv_bias = parameter(e, wanted=cfg.d_conv > 0)
        self.x_proj = parameter(r + 2 * n, e)
        self.dt_proj = parameter(e, r)
        self.dt_bias = parameter(e)
        self.A_log = parameter(e, n)
        self.D = parameter(e)
        self.score_weight = parameter(e, wanted=cfg.pool == "attention")
        self.score_bias = parameter(wanted=cfg.pool == "attention")
        init_ssm(self)
        self.layernorm = NORMS[cfg.ssm_norm](e) if cfg.ssm_norm else None
        self.out_proj = nn.Linear(e, d, bias=False)

    def weights(self) -> SSMWeights:
        return SSMWeights(*(at_least_float32(getattr(self, name)) for name in SSMWeights._fields))

    def forward(self, u: Tensor, grid: Grid, backend: "Backend") -> Tensor:
        """u (b l d), normed -> (b l d)."""
        y = backend.ssm(self.in_proj(u), self.weights(), grid)              # (b l e) of xz (b l 2e)
        return self.out_proj(y)                             # (b l d)


class Block(nn.Module):
    """residual += drop_path(hidden);  hidden = mixer(norm(residual))."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.norm = NORMS[cfg.block_norm](cfg.embed_dim)
        self.mixer = Mixer(cfg)

    def forward(self, hidden, residual, grid, backend, drop_path=0.0) -> tuple[Tensor, Tensor]:
        """hidden, residual (b l d) -> the same. drop_path: the rate at which hidden is dropped."""
        check("residual", residual)
        hidden = stochastic_depth(hidden, drop_path, self.training)
        u, residual = backend.add_norm(hidden, residual, self.norm)
        return self.mixer(u, grid, backend), residual


def stochastic_depth(x: Tensor, rate: float, training: bool) -> Tensor:
    """In training, drops whole samples of a residual branch, scales the others up. x (b ...)."""
    if rate == 0 or not training:
        return x
    keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - rate)
    return x * keep / (1 - rate)


def run_blocks(blocks, x, grids, backend, drop_path_rates, recompute=False) -> Iterator[tuple]:
    """x (b l d) through blocks, of which the i-th walks grids[i % len(grids)]; yields each one's
    output and the residual that it has yet to be added to. recompute: gradient checkpointing."""
    state = (x, None)
    for i, block in enumerate(blocks):
        if recompute:
            block = functools.partial(checkpoint, block, use_reentrant=False)
        state = block(*state, grids[i % len(grids)], backend, drop_path_rates[i])
        yield state


# ---- 5. Encoder: patches, blocks, head. Who stops after this section has read FastVim. -----------

class PatchEmbed(nn.Module):
    """Pixels, padded with zeros to whole patches -> a token for each. Image (b c H W) -> (b d h w),
    or per patch and channel (b d c h w); video (b c T H W) -> (b d t h w)."""

    def __init__(self, cfg: Config):
        super().__init__()
        d = cfg.embed_dim
        self.patch = [size for _, size in cfg.extents.values()]
        if cfg.per_channel:                 # section 3.3: one filter, and an embedding per channel
            self.proj = nn.Conv3d(1, d, self.patch, self.patch)
            self.channel_embed = nn.Embedding(cfg.in_chans, d)
        elif "t" in cfg.extents:            # beyond the paper: tubelets, an embedding per time
            self.proj = nn.Conv3d(cfg.in_chans, d, self.patch, self.patch)
            self.time_embed = nn.Parameter(torch.empty(1, d, math.ceil(cfg.frames / cfg.tubelet)))
        else:
            self.proj = nn.Conv2d(cfg.in_chans, d, self.patch, self.patch)

    def forward(self, x: Tensor, channels: Tensor | None = None) -> Tensor:
        padding = []
        for n, p in zip(x.shape[:1:-1], self.patch[::-1]):  # F.pad wants the last axis first
            padding += [0, (n + p - 1) // p * p - n]
        x = F.pad(x, padding)
        if channels is not None:
            return self.proj(x[:, None]) + self.channel_embed(channels).mT[..., None, None]
        x = self.proj(x)
        if x.ndim == 5:                     # a clip of another length: time_embed is resized
            x = x + F.interpolate(self.time_embed, x.shape[2], mode="linear")[..., None, None]
        return x


class FastVim(Backbone):
    """The encoder, one class for every model: FastVim(schedule="vim", ...), with fields of Config.

    x (b in_chans H W), a video (b in_chans T H W): floats of any size; positions are resized.
    keep (b s): integer ids of the tokens to encode, -1 pads images that keep fewer (section 3.2,
        FastMaskVim). Tokens are numbered as they lie, in cfg.storage: h w, or such as h w c.
    channels (c): ids of the given channels, for per-channel models; default all in order."""

    def __init__(self, **fields):
        super().__init__()
        check("fields", fields, Config)
        cfg = Config(**fields)
        d = cfg.embed_dim
        self.cfg = cfg
        self.patch_embed = PatchEmbed(cfg)
        self.grid_size = tuple(math.ceil(s / cfg.patch_size) for s in cfg.img_size)     # (h, w)
        self.class_row = None               # the row of pos_embed that belongs to the class token
        if cfg.class_token and not cfg.per_channel:
            self.class_row = self._class_slot(*self.grid_size)
        positions = math.prod(self.grid_size) + (self.class_row is not None)
        self.pos_embed = nn.Parameter(torch.empty(1, positions, d))
        self.cls_token = nn.Parameter(torch.empty(1, 1, d)) if cfg.class_token else None
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        if cfg.out_indices is None:
            self.norm_f = NORMS[cfg.block_norm](d)
            self.head = nn.Linear(d, cfg.num_classes) if cfg.num_classes else nn.Identity()
        else:                               # dense tasks: a norm for each tap, no head
            for i in range(len(cfg.out_indices)):
                self.add_module(f"outnorm_{i}", nn.LayerNorm(d))
        rates = torch.linspace(0, cfg.drop_path_rate, cfg.depth, device="cpu")
        self.drop_path_rates = [0.0, *rates.tolist()]       # of what a block, and norm_f, is given
        self.grad_checkpointing = False     # True: keep only the blocks' inputs, recompute the rest
        init_weights(self)

    def forward(self, x: Tensor, keep=None, channels=None) -> Tensor:
        """Images -> logits (b num_classes), of the class token or else of the mean over tokens."""
        tokens, ids = self._encode(x, keep, channels)       # (b s d), (b s) or None
        return self.head(read_out(tokens, ids, self.cfg.class_token))

    def forward_features(self, x: Tensor, keep=None, channels=None) -> Tensor:
        """Images -> normed tokens (b s d), as they lie; those of keep by number, padding last."""
        return self._encode(x, keep, channels)[0]

    def _encode(self, x, keep, channels, checked=False):
        """-> normed tokens (b s d), and their grid ids (b s) or None for a full grid."""
        check("has_head", self.cfg)
        tokens, grids, ids, _ = self._embed(x, keep, channels, checked)
        for hidden, residual in self._run(tokens, grids):
            pass                            # the last block's output stays
        hidden = stochastic_depth(hidden, self.drop_path_rates[-1], self.training)
        return pick_backend(tokens.device).add_norm(hidden, residual, self.norm_f)[0], ids

    def _run(self, tokens, grids):
        backend = pick_backend(tokens.device)
        recompute = self.grad_checkpointing and self.training
        return run_blocks(self.layers, tokens, grids, backend, self.drop_path_rates, recompute)

    def _embed(self, x, keep, channels, checked=False):
        """-> tokens (b s d) as they lie, a grid for each row of the schedule, ids, axis lengths."""
        cfg = self.cfg
        check("images", x, channels, cfg)
        if cfg.per_channel:
            x, channels = choose_channels(x, channels, cfg, self.training)
        x = self.patch_embed(x, channels)                   # (b d h w), (b d c h w) or (b d t h w)
        axes = " ".join(cfg.extents)
        sizes = dict(zip(cfg.extents, x.shape[2:]))
        pos, class_pos = self.resize_pos_embed(
            self.pos_embed, self.grid_size, x.shape[-2:], self.class_row)
        x = x + repeat(pos, f"1 (h w) d -> 1 d {axes}", **sizes)
        x = rearrange(x, f"b d {axes} -> b ({cfg.storage}) d")              # (b l d)
        ids = None
        at = self._class_slot(**sizes)
        slot = at if keep is None else None                 # of the class token in a full grid
        if keep is not None:
            ids = keep if checked else sort_keep(keep, x)   # (b s)  checked: right, and sorted
            at = ids.shape[1] // 2
            x = take(x, ids.clamp(min=0))                   # (b s d)
        if cfg.class_token:
            x, ids = insert_class_token(x, ids, self.cls_token + class_pos, at)
        grids = [self._grid(row, sizes, ids, slot) for row in cfg.rows]
        return x, grids, ids, sizes

    @staticmethod
    def resize_pos_embed(pos: Tensor, old, new, class_row=None) -> tuple[Tensor, Tensor | float]:
        """pos (1 rows d) of grid old (h, w) -> (1 h*w d) of new, bicubic; a class token's or 0."""
        class_pos = 0.0
        if class_row is not None:
            class_pos = pos[:, class_row:class_row + 1]
            pos = torch.cat([pos[:, :class_row], pos[:, class_row + 1:]], 1)
        if torch.compiler.is_exporting() or tuple(old) != tuple(new):           # sizes may be open
            grid = rearrange(at_least_float32(pos), "1 (h w) d -> 1 d h w", h=old[0])
            grid = F.interpolate(grid, new, mode="bicubic", align_corners=False).to(pos.dtype)
            pos = rearrange(grid, "1 d h w -> 1 (h w) d")
        return pos, class_pos

    def _grid(self, row, sizes, ids, slot):
        """How this row's layers walk the tokens. slot: the class token's place, None if masked."""
        cfg = self.cfg
        if slot is not None and tuple(row) == (cfg.storage, ""):    # as they lie: a plain sequence
            return Grid(sizes=(("l", math.prod(list(sizes.values())) + cfg.class_token),))
        stored = tuple((axis, sizes[axis]) for axis in cfg.storage.split())
        grid = Grid(cfg.storage, *row, stored, cfg.pool_scale)
        if ids is None:
            return grid
        return GridWithHoles(grid, ids, cfg.class_token, cfg.mask_divisor == "count", slot)

    def _class_slot(self, h, w, c=1, t=1):
        """The class token's place in a full grid: amid it, or if layers pool, before row h // 2."""
        if self.cfg.rows[0][1] and not self.cfg.per_channel:
            return (h // 2) * w
        return h * w * c * t // 2

# ---- 6. Masks, class tokens, subsets of the channels ---------------------------------------------
#
# A masked set is a full grid with holes: to pool, the kept tokens are put back into it. Holes are
# zeros to a mean, and no candidates else. A class token is a scan step of its own, the middle one.

CLASS, HOLE = -1, -2                        # ids of what is no token of the grid


class GridWithHoles:
    """A Grid, full, of which a mask left some tokens, and perhaps a class token. Its methods are
    Grid's. ids (b s) int64: each token's place in full.storage, CLASS, or HOLE for padding; b is 1
    if all images are masked alike. by_count: means divide by how many tokens a step kept, not by
    the length of the axis. A step without tokens pools to zero, and stays."""

    def __init__(self, full: Grid, ids, class_token=False, by_count=False, slot=None):
        self.full = full
        self.ids = ids
        self.class_token = class_token
        self.by_count = by_count
        self.slot = slot                    # the class token's place, if no other token is missing
        self.steps = full.steps + class_token if full.pooled else ids.shape[1]
        self.cells = math.prod([length for _, length in full.sizes])
        self._index = None

    @property                               # made when asked for: a backend may do without
    def index(self) -> dict[str, Tensor]:
        """(b s) each, position -> token as it lies; is it padding?; cell, class token or hole."""
        if self._index is not None:
            return self._index
        ids = self.ids
        real = ids >= 0
        place = torch.arange(self.cells, device=ids.device)
        place = self.full.unflatten(place[None, :, None])[0, :, 0]          # (cells) of a grid id
        cell = place[ids.clamp(min=0)]                      # (b s)  its place in the full walk
        if self.full.pooled:                # the class token stands before the middle step
            step = torch.arange(self.full.steps, device=ids.device)[None, None, :, None]
            middle = (self.full.expand(step).flatten() == self.full.steps // 2).int().argmax()
        else:                               # every token is a step: it stands amid the kept ones
            cell = cell.masked_fill(~real, self.cells).argsort(1).argsort(1)
            middle = real.sum(1, keepdim=True) // 2
        cell = cell.masked_fill(ids == CLASS, self.cells).masked_fill(ids == HOLE, self.cells + 1)
        walk = torch.where(ids == CLASS, middle.double() - 0.5, cell).argsort(1)
        self._index = dict(walk=walk, hole=(ids == HOLE).gather(1, walk), cell=cell.gather(1, walk))
        return self._index

    def flatten(self, x: Tensor) -> Tensor:
        """x (b s e), as the tokens lie -> as the layer walks them; padding reads as zero."""
        return take(x, self.index["walk"]).masked_fill(self.index["hole"][..., None], 0)

    def unflatten(self, y: Tensor) -> Tensor:
        """The inverse of flatten; padding is zero."""
        return take(y.masked_fill(self.index["hole"][..., None], 0), self.index["walk"].argsort(1))

    def pool(self, c: Tensor, kind: str = "mean", score: Tensor | None = None) -> Tensor:
        """c (k b s e), score (k b s 1) or None -> (k b p e)."""
        if not self.full.pooled:
            return c.masked_fill(self.index["hole"][..., None], 0)
        cells = self._put_back(c, {"max": -math.inf}.get(kind, 0.0))        # (k b cells+2 e)
        if score is not None:
            lowest = torch.finfo(score.dtype).min           # -inf: an empty step's softmax is 0 / 0
            score = self._put_back(score, lowest)[:, :, :-2]
        p = self.full.pool(cells[:, :, :-2], kind, score)
        if kind == "max":
            p = p.masked_fill(p == -math.inf, 0)
        if self.by_count and kind == "mean":
            kept = self._put_back(torch.ones_like(c[:1, ..., :1]), 0.0)[:, :, :-2]
            share = self.full.pool(kept) / self.full.scale  # (1 b p 1)  of a step's cells
            p = p / share.masked_fill(share == 0, 1)
        if self.class_token:
            half = self.full.steps // 2
            p = torch.cat([p[:, :, :half], cells[:, :, -2:-1], p[:, :, half:]], 2)
        return p

    def expand(self, s: Tensor) -> Tensor:
        """s (k b p e) -> (k b s e)."""
        if not self.full.pooled:
            return s
        half = self.full.steps // 2
        own = s[:, :, half:half + 1]                        # of the class token
        if self.class_token:
            s = torch.cat([s[:, :, :half], s[:, :, half + 1:]], 2)
        cells = torch.cat([self.full.expand(s), own, own], 2)               # and one for the holes
        return take(cells, self.index["cell"])

    def _put_back(self, c, nothing):
        """c (k b s e) -> (k b cells+2 e): the grid, the class token, and what padding leaves."""
        full = c.new_full((*c.shape[:2], self.cells + 2, c.shape[3]), nothing)
        return full.scatter(2, self.index["cell"][..., None].expand(c.shape), c)


def take(x: Tensor, index: Tensor) -> Tensor:
    """x (... l e), index (b m) or (1 m) -> (... m e): the tokens index of every image."""
    return x.gather(-2, index[..., None].expand(*x.shape[:-2], -1, x.shape[-1]))


def sort_keep(keep: Tensor, tokens: Tensor) -> Tensor:
    """keep (b s), ids of the tokens (b l d) and -1 for padding -> sorted ids (b s), HOLEs last."""
    check("keep", keep, tokens)
    keep = torch.as_tensor(keep, device=tokens.device).long()
    ids = keep.masked_fill(keep < 0, tokens.shape[1]).sort(1).values
    return ids.masked_fill(ids == tokens.shape[1], HOLE)


def insert_class_token(x, ids, token, at):
    """x (b s d), ids (b s) or None for a full grid -> both with the class token (1 1 d) at `at`."""
    if ids is None:
        ids = torch.arange(x.shape[1], device=x.device)[None]
    own = ids.new_full((ids.shape[0], 1), CLASS)
    x = torch.cat([x[:, :at], token.expand(x.shape[0], -1, -1), x[:, at:]], 1)
    return x, torch.cat([ids[:, :at], own, ids[:, at:]], 1)


def read_out(tokens: Tensor, ids: Tensor | None, class_token: bool) -> Tensor:
    """tokens (b s d), ids (b s), (1 s) or None -> (b d): the class token, or the mean of others."""
    if ids is None:
        return tokens.mean(1)
    if class_token:
        return take(tokens, (ids == CLASS).int().argmax(1, keepdim=True))[:, 0]
    real = (ids >= 0).to(tokens)[..., None]                 # (b s 1)
    return (tokens * real).sum(1) / real.sum(1)


def choose_channels(x, channels, cfg, training):
    """Images (b c H W), ids of their channels or None -> the same; in training a sample of them."""
    if channels is None:
        channels = torch.arange(x.shape[1], device=x.device)
    channels = torch.as_tensor(channels, device=x.device).long()
    if not cfg.hcs or not training:
        return x, channels
    check("sampling")
    sample = sample_channels(x.shape[1], cfg.hcs_sorted).to(x.device)
    return x[:, sample], channels[sample]


def sample_channels(count: int, keep_order: bool = True) -> Tensor:
    """Hierarchical channel sampling (section 3.3): how many channels, then which -> places (c)."""
    sample = torch.randperm(count, device="cpu")[:torch.randint(1, count + 1, (), device="cpu")]
    return sample.sort().values if keep_order else sample


# ---- 7. Initialisation, as in the released code; the rest keeps PyTorch's defaults ---------------

@torch.no_grad()
def init_ssm(m: Mixer):
    """PyTorch's defaults, some replaced by init_weights: drawn all, so that seeds keep meaning."""
    def layer(weight, bias=None):
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))    # U(-1, 1) / sqrt(fan_in)
        if bias is not None:
            bound = 1 / math.sqrt(weight.shape[1])
            nn.init.uniform_(bias, -bound, bound)
    for k in range(2):
        if m.conv_weight is not None:
            layer(m.conv_weight[k], m.conv_bias[k])
        layer(m.x_proj[k])
        layer(m.dt_proj[k], m.dt_bias[k])
        if m.score_weight is not None:
            layer(m.score_weight[k, None], m.score_bias[k])


def lecun_normal_(weight: Tensor):
    std = math.prod(weight.shape[1:]) ** -0.5 / 0.87962566103423978     # of a normal cut at 2 sigma
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


@torch.no_grad()
def init_weights(model: nn.Module, init_patches=lecun_normal_):
    """Sets, in place, what differs from PyTorch's defaults; draws from its global generator."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (nn.Conv2d, nn.Conv3d)) and not model.cfg.per_channel:
            init_patches(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, Mixer):
            _, e, r = module.dt_proj.shape
            n = module.A_log.shape[2]
            # dt is log-uniform in [1e-3, 0.1] in the forward direction. Backward it is softplus(0),
            # 0.69: an oversight of Vim's code, with which the published numbers were trained.
            nn.init.uniform_(module.dt_proj[0], -r ** -0.5, r ** -0.5)
            dt = torch.exp(torch.rand(e) * (math.log(0.1) - math.log(1e-3)) + math.log(1e-3))
            module.dt_bias[0] = dt + torch.log(-torch.expm1(-dt))           # softplus(dt_bias) = dt
            module.dt_bias[1] = 0
            module.A_log.copy_(torch.arange(1.0, n + 1).log().expand(2, e, n))      # S4D-Real
            module.D.fill_(1)
            if module.score_bias is not None:
                module.score_bias.fill_(0)
            nn.init.kaiming_uniform_(module.out_proj.weight, a=math.sqrt(5))
            module.out_proj.weight /= math.sqrt(model.cfg.depth)
    for name, token in model.named_parameters(recurse=False):
        if name in ("pos_embed", "cls_token", "mask_token"):
            nn.init.trunc_normal_(token, std=0.02)
    if model.cfg.per_channel:
        nn.init.normal_(model.patch_embed.channel_embed.weight, std=0.02)
    if "t" in model.cfg.extents:
        nn.init.zeros_(model.patch_embed.time_embed)        # at first, all frames are alike
    if isinstance(getattr(model, "head", None), nn.Linear):
        nn.init.trunc_normal_(model.head.weight, std=0.02)


# ---- 8. Backends: who computes what lies between the projections ---------------------------------

class Backend:
    """Plain PyTorch, the specification; a faster one has the same methods: fastvim_kernels.py."""
    name = "python"
    devices = ()                            # the torch device types that it serves; (): all
    why = "plain PyTorch"                   # for `doctor` and the log
    # norms that kernels may compute without calling them, as long as this is their forward
    norms = {kind: kind.forward for kind in (RMSNorm, LayerNorm, nn.RMSNorm, nn.LayerNorm)}
    add_norm = staticmethod(add_norm)
    ssm = staticmethod(ssm)
    conv_pool = staticmethod(conv_pool)
    selective_scan = staticmethod(selective_scan)
    expand_gate = staticmethod(expand_gate)

    def problem(self) -> str | None:
        """None, or in one line why it cannot be used. A compiled one is built by the first call."""
        return None


BACKENDS = {}                               # name -> Backend; the last registered one is preferred
_asked = threading.local()                  # .name: what use_backend asks for, in each thread


def register_backend(backend: Backend):
    """Adds a Backend, or replaces the one of that name. It is preferred on its devices."""
    BACKENDS.pop(backend.name, None)
    BACKENDS[backend.name] = backend


@contextlib.contextmanager
def use_backend(name: str):
    """`with use_backend("python"):` in this thread, models run by it, whatever FASTVIM_BACKEND."""
    if name not in BACKENDS:
        raise ValueError(f"use_backend: no backend {name!r}; choose from {', '.join(BACKENDS)}")
    before = getattr(_asked, "name", None)
    _asked.name = name
    try:
        yield
    finally:
        _asked.name = before


@functools.cache
def announce(level: int, *what):
    """Logs a message, once."""
    logging.getLogger("fastvim").log(level, *what)


def pick_backend(device: str | torch.device) -> Backend:
    """The backend for a device: use_backend, else the variable FASTVIM_BACKEND, else the last one
    registered that serves it; logged once. ValueError: none of its name. RuntimeError: no build."""
    return BACKENDS[_pick(torch.device(device).type, getattr(_asked, "name", None))]


def _pick(device, asked):
    asked = asked or os.environ.get("FASTVIM_BACKEND")
    names = [name for name, b in BACKENDS.items() if not b.devices or device in b.devices]
    if asked and asked not in names:
        raise ValueError(f"use_backend or FASTVIM_BACKEND: no backend {asked!r} for {device}; "
                         f"choose from {', '.join(names)}")
    for name in [asked] if asked else reversed(names):
        problem = BACKENDS[name].problem()
        if not problem:
            announce(logging.INFO, "backend %s on %s: %s", name, device, BACKENDS[name].why)
            return name
        if asked:
            raise RuntimeError(f"backend {name} cannot be used: {problem}")
        announce(logging.WARNING, "backend %s cannot be used: %s", name, problem)


# torch.compile takes the answer as a constant: assume_constant_result, without its slow import
_pick._dynamo_marked_constant = True

# ---- 9. Models by name, and the other files of the project ---------------------------------------

def list_models() -> list[str]:
    """The names that create_model knows."""
    return [f"{family}_{size}" for family in FAMILIES for size in SIZES]


def create_model(name: str, **overrides) -> FastVim:
    """A freshly initialised model, such as "fastvim_tiny", with any field of Config overridden.
    Raises ValueError for an unknown name, option or combination, naming the choices."""
    return FastVim(**{**model_fields(name), **overrides})


def model_fields(name: str) -> dict:
    """What a model's name says of its Config."""
    check("name", name, FAMILIES, SIZES)
    family, _, size = name.rpartition("_")
    return {**SIZES[size], **FAMILIES[family]}


register_backend(Backend())
if checks is not None:
    for compiled in fastvim_kernels.backends(BACKENDS["python"], announce):
        register_backend(compiled)          # compiles nothing yet
    fastvim_hub.register(list_models(), create_model)       # if timm is there

if __name__ == "__main__":
    runpy.run_path(os.path.join(os.path.dirname(__file__), "info.py"), run_name="__main__")
