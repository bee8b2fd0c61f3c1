"""The compiled backends of fastvim.py: calling the kernels, their operations for autograd, building.

fastvim.py registers what `backends` returns; nothing is compiled before a model runs. Four parts:

    1 the boundary to C: one function hands over pointers, and only of what C expects
    2 Kernels: the methods of fastvim.Backend by a library of C functions
    3 the same as operations of torch.library, which know their gradients and shapes
    4 building scan_cpu.cpp and scan_cuda.cu, once, whoever asks at the same time

The letters are those of fastvim.py: b images, l tokens, p steps, e inner width, n states, r rank.
"""
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import logging
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from typing import NamedTuple

import torch
import torch.nn as nn
from einops import rearrange, repeat
from torch import Tensor

log = logging.getLogger("fastvim")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)     # kernels know them by their place here
MAX_STATES = 64
EPS = 1e-5                                  # of all norms

# --------------------------------------------------------------------------------------------------
# 1. The boundary to C
#
# scan.h says which fields the structure of each operation has, and of what type. Python reads it, so
# that there is no second list to keep: fields are given by name, and one that is missing, too many or
# of another type, layout or device is an error here and not a crash there.


def read_structures(path: str) -> dict[str, list[tuple[str, str]]]:
    """scan.h -> {operation: [(field, type), ...]}, type one of int64_t, void, float and int32_t.

    A structure within another, such as Walk, is laid out in its place."""
    with open(path) as file:
        text = re.sub(r"//.*", "", file.read())
    structures = {}
    for name, body in re.findall(r"struct (\w+) \{(.*?)\};", text, re.DOTALL):
        fields = []
        for kind, names in re.findall(r"(?:const )?(\w+) ([^;]+);", body):
            if kind in structures:
                fields += structures[kind]
            else:
                fields += [(field.strip(" *\n"), kind) for field in names.split(",")]
        structures[name] = fields
    prototypes = re.findall(r"int (\w+)\(const (\w+) \*", text)
    return {operation: structures[name] for operation, name in prototypes}


def is_plain(t) -> bool:
    """Is t a tensor with memory of its own, as C needs it? Not so what FakeTensorMode, torch.func,
    DTensor and other subclasses make, and what is on no device or not strided."""
    return (
        type(t) in (Tensor, nn.Parameter)
        and t.layout is torch.strided
        and t.device.type != "meta"
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
    )


def to_c(operation: str, fields: list, device: torch.device, values: dict) -> list[int]:
    """The fields of an operation's structure as whole numbers: a tensor as its address, None as 0."""
    dtypes = {"float": torch.float32, "int32_t": torch.int32, "void": DTYPES[values.get("dtype", 0)]}
    numbers = []
    for name, kind in fields:
        value = values[name]
        if value is None:
            value = 0
        elif kind != "int64_t":
            right = is_plain(value) and value.device == device and value.dtype == dtypes[kind]
            if not right or not is_dense(value, values.get("stride") if name in "BC" else None):
                raise TypeError(
                    f"{operation}: {name} must be a contiguous {dtypes[kind]} tensor on {device}, "
                    f"not {describe(value)}"
                )
            value = value.data_ptr()
        numbers.append(value)
    return numbers


def is_dense(t: Tensor, row: int | None) -> bool:
    """Is t contiguous or, where row is given, do its rows lie evenly, `row` elements apart? Strides of
    axes of length 1 say nothing."""
    if row is None:
        return t.is_contiguous()
    _, b, p, _ = t.shape
    strides = (b * p * row, p * row, row, 1)
    layout = zip(t.shape, t.stride(), strides)
    return t.numel() == 0 or all(n == 1 or given == want for n, given, want in layout)


def describe(value) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{type(value).__name__} of {value.dtype} {tuple(value.shape)} on {value.device}"


class Walk(NamedTuple):
    """A Grid as kernels follow it: tables over the positions of its walk, for `rows` images, or one
    row if all walk alike. scan.h says the same."""
    token: Tensor                           # (rows l) int32, position -> token as it lies
    group: Tensor                           # (rows l) int32, position -> scan step, -1 for a hole
    weight: Tensor                          # (rows l) float32, factor in the mean of its step
    member: Tensor                          # (rows l) int32, positions sorted by step, holes last
    start: Tensor                           # (rows p+1) int32, step g has start[g] .. start[g + 1]


def make_walk(token, group, steps, pool_weight) -> Walk:
    """token, group (rows l) int64, group -1 for holes; pool_weight: how much of a step's mean its
    tokens make together (rows p)."""
    key = group.masked_fill(group < 0, steps)               # (rows l)
    key, member = key.sort(dim=1, stable=True)
    edges = torch.arange(steps + 1, device=key.device).repeat(len(key), 1)
    start = torch.searchsorted(key, edges)                  # (rows p+1)
    weight = pool_weight / start.diff(dim=1).clamp(min=1)   # (rows p)
    weight = weight.gather(1, group.clamp(min=0))           # (rows l)
    return Walk(token.int(), group.int(), weight.float(), member.int(), start.int())


@functools.lru_cache(64)
def full_walk(storage, order, pooled, lengths, scale, device) -> Walk:
    """The Walk of a full grid, remembered: its tables depend on the grid alone."""
    sizes = dict(zip(storage.split(), lengths))
    kept = [axis for axis in order.split() if axis not in pooled.split()]
    steps = math.prod(sizes[axis] for axis in kept)
    with torch.inference_mode(False):       # the tables outlive this call, and may serve training
        token = torch.arange(math.prod(lengths), device=device)
        token = rearrange(token, f"({storage}) -> ({order})", **sizes)
        group = torch.arange(steps, device=device)
        group = repeat(group, f"({' '.join(kept)}) -> ({order})", **sizes)
        weight = torch.full((1, steps), scale if pooled else 1.0, device=device)
        return make_walk(token[None], group[None], steps, weight)


def walk_with_holes(grid) -> Walk:
    """The Walk of a GridWithHoles, from what its own methods do to numbers; kept in grid.tables."""
    if grid.tables is None:
        rows, length = grid.walk.shape
        step = torch.arange(grid.steps, device=grid.walk.device).expand(1, rows, -1)
        group = grid.expand(step[..., None])[0, ..., 0]     # (rows l)
        group = group.masked_fill(grid.hole, -1)
        ones = torch.ones(1, rows, length, 1, device=grid.walk.device)
        weight = grid.pool(ones)[0, ..., 0]                 # (rows p)
        grid.tables = make_walk(grid.walk, group, grid.steps, weight)
    return grid.tables


# --------------------------------------------------------------------------------------------------
# 2. The methods of a backend


class Tensors(NamedTuple):
    """The tensors of fastvim.SSMWeights that kernels take, all float32; k = 2 directions."""
    conv_weight: Tensor                     # (k e 4)
    conv_bias: Tensor                       # (k e)
    x_proj: Tensor                          # (k r+2n e)
    dt_proj: Tensor                         # (k e r)
    dt_bias: Tensor                         # (k e)
    A_log: Tensor                           # (k e n)
    D: Tensor                               # (k e)
    norm_weight: Tensor | None              # (e), None without the post-SSM norm
    norm_bias: Tensor | None                # (e), None for RMSNorm


class Kernels:
    """Runs the operations of scan.h, forward and backward. load() returns the library: a function of
    (operation, numbers, device). Kernels trust their arguments and allocate nothing that they return:
    the methods here allocate, check and call."""

    def __init__(self, name: str, dtypes: tuple, load):
        self.name = name
        self.dtypes = dtypes
        self._load = load
        self._library = None
        self._problem = None
        self._lock = threading.Lock()

    def problem(self) -> str | None:
        """None if the library is there, which the first call builds; else one line on what is wrong."""
        with self._lock:
            if self._library is None and self._problem is None:
                try:
                    self.structures = read_structures(find_source("scan.h"))
                    self._library = self._load()
                except (OSError, RuntimeError, ImportError, AttributeError) as error:
                    self._problem = str(error) or type(error).__name__
        return self._problem

    def run(self, operation: str, device: torch.device, **values):
        if self._library is None and self.problem():
            raise RuntimeError(f"backend {self.name} cannot be used: {self._problem}")
        numbers = to_c(operation, self.structures[operation], device, values)
        self._library(operation, numbers, device)

    def add_norm(self, hidden, residual, weight, bias):
        """hidden, residual (b l d), weight, bias (d) -> normed in hidden's type, residual + hidden.
        hidden None: only the norm, in weight's type."""
        d = weight.numel()
        rows = residual.numel() // d
        u = torch.empty_like(residual, dtype=weight.dtype if hidden is None else hidden.dtype)
        out = None if hidden is None else torch.empty_like(residual)
        self.run(
            "add_norm", residual.device, dtype=DTYPES.index(u.dtype), rows=rows, d=d, hidden=hidden,
            residual=residual, weight=weight.float(), bias=float32(bias), u=u, out=out,
        )
        return u, out

    def add_norm_backward(self, residual, weight, bias, du, dout):
        """residual: the sum that add_norm returned -> the gradients of residual (float32), of hidden
        in du's type or None if they are the same, of weight and bias."""
        d = weight.numel()
        dresidual = torch.empty_like(residual)
        dhidden = None if du.dtype == torch.float32 else torch.empty_like(du)
        dweight = torch.empty_like(weight, dtype=torch.float32)
        dbias = None if bias is None else torch.empty_like(dweight)
        self.run(
            "add_norm_backward", residual.device, dtype=DTYPES.index(du.dtype),
            rows=residual.numel() // d, d=d, centred=int(bias is not None), residual=residual,
            weight=weight.float(), du=du, dout=dout, dresidual=dresidual, dhidden=dhidden,
            dweight=dweight, dbias=dbias,
        )
        return dresidual, dhidden, dweight, dbias

    def conv_pool(self, xz, w: Tensors, walk: Walk, pool: str):
        """xz (b l 2e) -> pooled (k b p e) and, for max pooling, the place of each maximum."""
        sizes = sizes_of(xz, w, walk)
        pooled = torch.empty((2, sizes["b"], sizes["p"], sizes["e"]), device=xz.device)
        argmax = torch.empty_like(pooled, dtype=torch.int32) if pool == "max" else None
        self.run(
            "conv_pool", xz.device, **sizes, **walk._asdict(), max=int(pool == "max"), xz=xz,
            conv_weight=w.conv_weight, conv_bias=w.conv_bias, pooled=pooled, argmax=argmax,
        )
        return pooled, argmax

    def conv_pool_backward(self, xz, argmax, w: Tensors, walk: Walk, skip, dpooled, g, dxz):
        """Fills the x half of dxz -> the gradients of conv_weight, conv_bias and, unless the scan
        has it (skip), D."""
        dconv_weight = torch.empty_like(w.conv_weight)
        dconv_bias = torch.empty_like(w.conv_bias)
        dD = None if skip else torch.empty_like(w.D)
        self.run(
            "conv_pool_backward", xz.device, **sizes_of(xz, w, walk), **walk._asdict(),
            max=int(argmax is not None), xz=xz, conv_weight=w.conv_weight, conv_bias=w.conv_bias,
            D=None if skip else w.D, argmax=argmax, dpooled=dpooled, g=g, dxz=dxz,
            dconv_weight=dconv_weight, dconv_bias=dconv_bias, dD=dD,
        )
        return dconv_weight, dconv_bias, dD

    def selective_scan(self, x, dt, A, B, C, D=None, dt_bias=None, stride=None):
        """As fastvim.selective_scan. stride: B and C are columns of a table that is so wide."""
        s = torch.empty_like(x)
        self.run(
            "selective_scan", x.device, **scan_sizes(x, A, stride), x=x, dt=dt, A=A, B=B, C=C, D=D,
            dt_bias=dt_bias, s=s,
        )
        return s

    def selective_scan_backward(self, x, dt, A, B, C, D, dt_bias, ds, stride=None):
        """ds (k b p e), or (b p e) if it is the same for all directions -> the gradients of the
        seven others."""
        like = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias}
        grads = {
            f"d{name}": None if t is None else torch.empty(t.shape, device=t.device)
            for name, t in like.items()
        }
        self.run(
            "selective_scan_backward", x.device, **scan_sizes(x, A, stride), shared=int(ds.ndim == 3),
            **like, ds=ds, **grads,
        )
        return tuple(grads.values())

    def expand_gate(self, xz, s, w: Tensors, walk: Walk, skip):
        """s (k b p e) and the z of xz (b l 2e) -> y (b l e)."""
        sizes = sizes_of(xz, w, walk)
        y = xz.new_empty(sizes["b"], sizes["l"], sizes["e"])
        self.run(
            "expand_gate", xz.device, **sizes, **walk._asdict(), xz=xz, s=s,
            conv_weight=w.conv_weight, conv_bias=w.conv_bias, D=None if skip else w.D,
            norm_weight=w.norm_weight, norm_bias=w.norm_bias, y=y,
        )
        return y

    def expand_gate_backward(self, xz, s, w: Tensors, walk: Walk, skip, dy, dxz):
        """Fills the z half of dxz -> g (b l e) the gradient of each direction's expanded s, that of s
        (b p e), the same in both directions, and those of the norm."""
        sizes = sizes_of(xz, w, walk)
        g = torch.empty_like(dy)
        ds = torch.empty((sizes["b"], sizes["p"], sizes["e"]), device=xz.device)
        dnorm_weight = None if w.norm_weight is None else torch.empty_like(w.norm_weight)
        dnorm_bias = None if w.norm_bias is None else torch.empty_like(w.norm_bias)
        self.run(
            "expand_gate_backward", xz.device, **sizes, **walk._asdict(), xz=xz, s=s,
            conv_weight=w.conv_weight, conv_bias=w.conv_bias, D=None if skip else w.D,
            norm_weight=w.norm_weight, norm_bias=w.norm_bias, dy=dy, dxz=dxz, g=g, ds=ds,
            dnorm_weight=dnorm_weight, dnorm_bias=dnorm_bias,
        )
        return g, ds, dnorm_weight, dnorm_bias


def float32(t):
    return None if t is None else t.float()


def sizes_of(xz, w: Tensors, walk: Walk) -> dict:
    """The lengths of all axes. Raises ValueError where the shapes do not fit together."""
    b, l, width = xz.shape
    e = width // 2
    r = w.dt_proj.shape[-1]
    n = w.A_log.shape[-1]
    rows, edges = walk.start.shape
    shapes = [(2, e, 4), (2, e), (2, r + 2 * n, e), (2, e, r), (2, e), (2, e, n), (2, e), (e,), (e,)]
    found = [t if t is None else t.shape for t in w]
    if found != [shape if t is not None else None for shape, t in zip(shapes, w)]:
        named = {name: None if t is None else tuple(t.shape) for name, t in w._asdict().items()}
        raise ValueError(f"activations {tuple(xz.shape)} do not fit weights of shapes {named}")
    if l < 1 or rows not in (1, b) or walk.token.shape != (rows, l) or not 1 <= n <= MAX_STATES:
        raise ValueError(
            f"activations {tuple(xz.shape)} do not fit a walk of {tuple(walk.token.shape)} tokens, "
            f"or {n} states are not 1 to {MAX_STATES}"
        )
    return {"dtype": DTYPES.index(xz.dtype), "b": b, "l": l, "p": edges - 1, "e": e, "rows": rows}


def scan_sizes(x, A, stride) -> dict:
    k, b, p, e = x.shape
    n = A.shape[2]
    if k not in (1, 2) or not 1 <= n <= MAX_STATES or p < 1:
        raise ValueError(
            f"{k} directions, {p} steps and {n} states; kernels know 1 or 2 directions, at least one "
            f"step and at most {MAX_STATES} states"
        )
    return {"k": k, "b": b, "p": p, "e": e, "n": n, "stride": stride or n}


class CompiledBackend:
    """fastvim.Backend by Kernels. What they do not know is run by `plain`, and said once."""
    why = "compiled kernels"

    def __init__(self, kernels: Kernels, device: str, plain, announce):
        self.kernels = kernels
        self.name = kernels.name
        self.devices = (device,)
        self.problem = kernels.problem
        self.plain = plain
        self.announce = announce

    def add_norm(self, hidden, residual, norm):
        if residual is None or not self.serves(hidden, lacks_norm(norm)):
            return self.plain.add_norm(hidden, residual, norm)
        weight = norm.weight
        hidden = hidden.to(weight.dtype).contiguous()
        arguments = (hidden, residual.contiguous(), weight, getattr(norm, "bias", None))
        if runs_directly(hidden):
            return self.kernels.add_norm(*arguments)
        return torch.ops.fastvim.add_norm(*arguments, self.name)

    def ssm(self, xz, w, grid):
        if not self.serves(xz, lacks_weights(w)):
            return self.plain.ssm(xz, w, grid)
        arguments = (xz.contiguous(), *tensors_of(w), w.pool, w.skip_before_expand)
        if runs_directly(xz):
            return run_ssm(self.kernels, walk_of(grid, xz.device), *arguments)[0]
        return torch.ops.fastvim.ssm(*arguments, *pack_grid(grid), self.name)[0]

    # One operation at a time, for tests and measurements: no gradients

    def conv_pool(self, xz, w, grid):
        """-> None, where plain PyTorch returns c, which kernels do not store; pooled (k b p e)."""
        walk = walk_of(grid, xz.device)
        return None, self.kernels.conv_pool(xz.contiguous(), tensors_of(w), walk, w.pool)[0]

    def selective_scan(self, x, dt, A, B, C, D=None, dt_bias=None):
        check_scan(x, dt, A, B, C, D, dt_bias)
        arguments = [None if t is None else t.contiguous() for t in (x, dt, A, B, C, D, dt_bias)]
        return self.kernels.selective_scan(*arguments)

    def expand_gate(self, xz, c, s, w, grid):
        walk = walk_of(grid, xz.device)
        return self.kernels.expand_gate(
            xz.contiguous(), s.contiguous(), tensors_of(w), walk, w.skip_before_expand
        )

    def serves(self, activations: Tensor, lacks: str) -> bool:
        """Can the kernels run this call? What they lack is logged once."""
        if not lacks and activations.dtype not in self.kernels.dtypes:
            lacks = f"{activations.dtype} activations"
        if not lacks and torch._C._functorch.peek_interpreter_stack() is not None:
            lacks = "torch.func transforms"
        if lacks and not torch.compiler.is_compiling():
            self.announce(
                logging.WARNING, "backend %s has no %s: python runs this", self.name, lacks
            )
        return not lacks


def is_untouched(module: nn.Module) -> bool:
    """Nobody has hung anything on the module: calling it does what its class says."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    changed = "forward" in module.__dict__ or module._backward_pre_hooks
    return not any(hooks) and not changed


def lacks_norm(norm: nn.Module | None) -> str:
    """What kernels lack to compute the norm, "" if nothing: they read its weights, do not call it."""
    if norm is None:
        return ""
    if not is_untouched(norm):
        return "hooks on norms"
    if not isinstance(norm, (nn.RMSNorm, nn.LayerNorm)) or norm.weight is None or norm.eps != EPS:
        return f"norms such as {type(norm).__name__}"
    return ""


def lacks_weights(w) -> str:
    if w.pool == "attention":
        return "attention pooling"
    if w.conv_weight is None or w.conv_weight.shape[2] != 4:
        return "convolution of other than four taps"
    return lacks_norm(w.layernorm)


def tensors_of(w) -> Tensors:
    """fastvim.SSMWeights -> what kernels take of them."""
    norm_weight = norm_bias = None
    if w.layernorm is not None:
        norm_weight = w.layernorm.weight.float()
        norm_bias = float32(getattr(w.layernorm, "bias", None))
    tensors = (*w[:7], norm_weight, norm_bias)
    return Tensors(*(None if t is None else t.contiguous() for t in tensors))


def walk_of(grid, device: torch.device) -> Walk:
    return unpack_grid(device, *pack_grid(grid))


def pack_grid(grid) -> tuple:
    """A Grid as arguments of an operation: tables, storage, order, pooled, lengths, scale. A full
    grid has no tables: they are looked up when the operation runs, on real tensors."""
    if hasattr(grid, "walk"):
        return (list(walk_with_holes(grid)), "", "", "", [grid.steps], 1.0)
    lengths = [length for _, length in grid.sizes]
    return ([], grid.storage, grid.order, grid.pooled, lengths, grid.scale)


def unpack_grid(device, tables, storage, order, pooled, lengths, scale) -> Walk:
    if tables:
        return Walk(*tables)
    return full_walk(storage, order, pooled, tuple(lengths), scale, device)


def runs_directly(t: Tensor) -> bool:
    """Is there nothing to record or transform? Then the plain function saves the dispatcher's time."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return is_plain(t) and torch._C._len_torch_dispatch_stack() == 0


def check_scan(x, dt, A, B, C, D, dt_bias):
    """Raises ValueError unless the shapes are those of fastvim.selective_scan."""
    if x.ndim != 4 or A.ndim != 3:
        raise ValueError(
            f"expected x (k b p e) and A (k e n), not {tuple(x.shape)} and {tuple(A.shape)}"
        )
    k, b, p, e = x.shape
    n = A.shape[2]
    shapes = {"dt": (k, b, p, e), "A": (k, e, n), "B": (k, b, p, n), "C": (k, b, p, n)}
    shapes |= {"D": (k, e), "dt_bias": (k, e)}
    for (name, shape), t in zip(shapes.items(), (dt, A, B, C, D, dt_bias)):
        if t is not None and t.shape != shape:
            raise ValueError(f"{name} must have the shape {shape}, not {tuple(t.shape)}")


# --------------------------------------------------------------------------------------------------
# 3. Operations of torch.library: what autograd, torch.compile and torch.export see
#
# Kernels know their own backward pass, so autograd need not look inside: ssm keeps xz and the pooled
# tensors, and computes the convolutions again on the way back.


def project(pooled, w: Tensors):
    """fastvim.select with the intermediate result: pooled (k b p e) -> dt (k b p e), B, C (k b p n),
    columns of a table, low (k bp r), the table's width."""
    r = w.dt_proj.shape[2]
    n = w.A_log.shape[2]
    table = torch.bmm(pooled.flatten(1, 2), w.x_proj.mT)    # (k bp r+2n)
    low, B, C = table.view(*pooled.shape[:3], r + 2 * n).split([r, n, n], -1)
    low = low.flatten(1, 2)                                 # (k bp r)
    dt = torch.bmm(low, w.dt_proj.mT).view(pooled.shape)    # (k b p e)
    return dt, B, C, low, r + 2 * n


def run_ssm(kernels, walk, xz, *rest):
    """fastvim.ssm by kernels -> y (b l e) and, for the way back, pooled, argmax or None, s."""
    *tensors, pool, skip = rest
    w = Tensors(*tensors)
    pooled, argmax = kernels.conv_pool(xz, w, walk, pool)   # (k b p e)
    dt, B, C, _, stride = project(pooled, w)
    D = w.D if skip else None
    A = -torch.exp(w.A_log)
    s = kernels.selective_scan(pooled, dt, A, B, C, D, w.dt_bias, stride)
    return kernels.expand_gate(xz, s, w, walk, skip), pooled, argmax, s


def run_ssm_backward(kernels, walk, dy, pooled, argmax, s, xz, *rest):
    """dy (b l e) -> the gradients of xz and of the nine Tensors, None where there is none."""
    *tensors, pool, skip = rest
    w = Tensors(*tensors)
    dxz = torch.empty_like(xz)
    g, ds, *dnorm = kernels.expand_gate_backward(xz, s, w, walk, skip, dy, dxz)
    dt, B, C, low, stride = project(pooled, w)
    D = w.D if skip else None
    A = -torch.exp(w.A_log)
    dp, ddt, dA, dB, dC, dD, ddt_bias = kernels.selective_scan_backward(
        pooled, dt, A, B, C, D, w.dt_bias, ds, stride
    )
    ddt = ddt.flatten(1, 2)                                 # (k bp e)
    ddt_proj = ddt.mT @ low                                 # (k e r)
    dtable = torch.cat([ddt @ w.dt_proj, dB.flatten(1, 2), dC.flatten(1, 2)], 2)
    dx_proj = dtable.mT @ pooled.flatten(1, 2)              # (k r+2n e)
    dp = torch.baddbmm(dp.flatten(1, 2), dtable, w.x_proj).view_as(pooled)
    argmax = argmax if pool == "max" else None
    dconv_weight, dconv_bias, dskip = kernels.conv_pool_backward(
        xz, argmax, w, walk, skip, dp, g, dxz
    )
    dD = dD if skip else dskip
    return [dxz, dconv_weight, dconv_bias, dx_proj, ddt_proj, ddt_bias, dA * A, dD, *dnorm]


def no_autocast(device):
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def or_empty(like, values):
    """Operations return tensors: an empty one stands for None."""
    return [like.new_empty(0) if t is None else t for t in values]


# The arguments that ssm and its backward pass share
SSM = (
    "Tensor xz, Tensor conv_weight, Tensor conv_bias, Tensor x_proj, Tensor dt_proj, Tensor dt_bias, "
    "Tensor A_log, Tensor D, Tensor? norm_weight, Tensor? norm_bias, str pool, bool skip, "
    "Tensor[] tables, str storage, str order, str pooled, SymInt[] lengths, float scale, str backend"
)
TENSORS = 10                                                # xz and the nine after it
GRID = slice(TENSORS + 2, TENSORS + 8)


def ssm_operation(*arguments):
    kernels = KERNELS[arguments[-1]]
    xz = arguments[0]
    walk = unpack_grid(xz.device, *arguments[GRID])
    with no_autocast(xz.device):
        return tuple(or_empty(xz, run_ssm(kernels, walk, *arguments[:TENSORS + 2])))


ssm = torch.library.custom_op(
    "fastvim::ssm", ssm_operation, mutates_args=(),
    schema=f"({SSM}) -> (Tensor y, Tensor pooled, Tensor argmax, Tensor s)",
)


@ssm.register_fake
def _(*arguments):
    xz, pool = arguments[0], arguments[TENSORS]
    tables, storage, order, pooled, lengths, _ = arguments[GRID]
    b, l, width = xz.shape
    if tables:
        p = tables[4].shape[1] - 1
    else:
        sizes = dict(zip(storage.split(), lengths))
        p = math.prod(n for axis, n in sizes.items() if axis not in pooled.split())
    p = xz.new_empty(2, b, p, width // 2, dtype=torch.float32)
    argmax = torch.empty_like(p, dtype=torch.int32) if pool == "max" else xz.new_empty(0)
    return xz.new_empty(b, l, width // 2), p, argmax, torch.empty_like(p)


def ssm_backward_operation(dy, pooled, argmax, s, *arguments):
    kernels = KERNELS[arguments[-1]]
    xz = arguments[0]
    walk = unpack_grid(xz.device, *arguments[GRID])
    with no_autocast(xz.device):
        saved = (dy.contiguous(), pooled, argmax, s)
        grads = run_ssm_backward(kernels, walk, *saved, *arguments[:TENSORS + 2])
    return or_empty(xz, grads)


ssm_backward = torch.library.custom_op(
    "fastvim::ssm_backward", ssm_backward_operation, mutates_args=(),
    schema=f"(Tensor dy, Tensor pooled_, Tensor argmax, Tensor s, {SSM}) -> Tensor[]",
)


@ssm_backward.register_fake
def _(dy, pooled, argmax, s, *arguments):
    return or_empty(arguments[0], [None if t is None else torch.empty_like(t) for t in arguments[:TENSORS]])


def save_ssm(ctx, inputs, output):
    ctx.save_for_backward(*output[1:], *inputs[:TENSORS], *inputs[TENSORS + 2])
    ctx.rest = [v for i, v in enumerate(inputs) if i >= TENSORS and i != TENSORS + 2]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def differentiate_ssm(ctx, dy, *_):
    pooled, argmax, s, *inputs = ctx.saved_tensors
    tensors, tables = inputs[:TENSORS], inputs[TENSORS:]
    pool, skip, *rest = ctx.rest
    grads = torch.ops.fastvim.ssm_backward(
        dy, pooled, argmax, s, *tensors, pool, skip, tables, *rest
    )
    grads = [None if t is None else grad for t, grad in zip(tensors, grads)]
    return (*grads, None, None, [None] * len(tables), *[None] * 6)


ssm.register_autograd(differentiate_ssm, setup_context=save_ssm)


def add_norm_operation(hidden, residual, weight, bias, backend):
    return KERNELS[backend].add_norm(hidden, residual, weight, bias)


add_norm = torch.library.custom_op(
    "fastvim::add_norm", add_norm_operation, mutates_args=(),
    schema="(Tensor hidden, Tensor residual, Tensor weight, Tensor? bias, str backend) "
           "-> (Tensor u, Tensor out)",
)


@add_norm.register_fake
def _(hidden, residual, weight, bias, backend):
    return torch.empty_like(hidden), torch.empty_like(residual)


def add_norm_backward_operation(du, dout, out, weight, bias, backend):
    grads = KERNELS[backend].add_norm_backward(out, weight, bias, du.contiguous(), dout)
    return or_empty(du, grads)


add_norm_backward = torch.library.custom_op(
    "fastvim::add_norm_backward", add_norm_backward_operation, mutates_args=(),
    schema="(Tensor du, Tensor? dout, Tensor out, Tensor weight, Tensor? bias, str backend) "
           "-> Tensor[]",
)


@add_norm_backward.register_fake
def _(du, dout, out, weight, bias, backend):
    dhidden = None if du.dtype == torch.float32 else torch.empty_like(du)
    dweight = torch.empty_like(weight, dtype=torch.float32)
    dbias = None if bias is None else torch.empty_like(dweight)
    return or_empty(du, [torch.empty_like(out), dhidden, dweight, dbias])


def save_add_norm(ctx, inputs, output):
    _, _, weight, bias, backend = inputs
    ctx.save_for_backward(output[1], weight, bias)
    ctx.backend = backend
    ctx.set_materialize_grads(False)


def differentiate_add_norm(ctx, du, dout):
    out, weight, bias = ctx.saved_tensors
    if du is None:
        return dout, dout, None, None, None
    dout = None if dout is None else dout.contiguous()
    dresidual, dhidden, dweight, dbias = torch.ops.fastvim.add_norm_backward(
        du, dout, out, weight, bias, ctx.backend
    )
    dhidden = dresidual if du.dtype == torch.float32 else dhidden
    dbias = None if bias is None else dbias.to(bias.dtype)
    return dhidden, dresidual, dweight.to(weight.dtype), dbias, None


add_norm.register_autograd(differentiate_add_norm, setup_context=save_add_norm)


# --------------------------------------------------------------------------------------------------
# 4. Building the libraries



def cache_folder() -> str:
    """Where compiled libraries are kept: FASTVIM_CACHE, else fastvim in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.environ.get("FASTVIM_CACHE") or os.path.join(home, "fastvim")
    os.makedirs(folder, exist_ok=True)
    return folder


@contextlib.contextmanager
def lock(path: str):
    """One builder at a time. The lock belongs to the open file: a process that is killed gives it
    back."""
    try:
        import fcntl
    except ImportError:
        raise RuntimeError("building needs a POSIX system (Linux, macOS)") from None
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def find_source(name: str) -> str:
    here = os.path.dirname(os.path.abspath(__file__))
    for folder in (here, os.path.join(sys.prefix, "share", "fastvim")):
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    raise RuntimeError(f"{name} is missing: it belongs beside fastvim.py")


def name_build(stem: str, sources: list[str], *parts) -> str:
    """A name that changes with all that a build depends on."""
    digest = hashlib.sha256(repr(parts).encode())
    for source in sources:
        with open(source, "rb") as file:
            digest.update(file.read())
    return f"{stem}_{digest.hexdigest()[:16]}"


def output_of(*command: str) -> str:
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    if result.returncode:
        lines = result.stderr.splitlines() or ["?"]
        wrong = [line for line in lines if "error" in line] or lines
        raise RuntimeError(f"{os.path.basename(command[0])} failed: {wrong[0]}")
    return result.stdout


def torch_openmp() -> list[str]:
    """The OpenMP runtime that torch has loaded (Linux): two would fight for the cores."""
    if not os.path.exists("/proc/self/maps"):
        return []
    with open("/proc/self/maps") as file:
        loaded = sorted({line.split(None, 5)[-1].strip() for line in file if "omp" in line})
    return [path for path in loaded if re.search(r"lib(g|i)?omp[^/]*\.so", path)][:1]


def processor() -> str:
    """What -march=native depends on."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith(("flags", "Features")):
                    return line
    return platform.machine()


def load_cpu():
    sources = [find_source("scan_cpu.cpp"), find_source("scan.h")]
    compilers = (os.environ.get("CXX"), *map(shutil.which, ("g++", "clang++", "c++")))
    compiler = next(filter(None, compilers), None)
    if compiler is None:
        raise RuntimeError(
            "no C++ compiler found: install g++ (Debian, Ubuntu: apt install g++) or set CXX"
        )
    flags = ["-std=c++17", "-O3", "-march=native", "-fopenmp", *torch_openmp(), "-shared", "-fPIC"]
    version = output_of(compiler, "--version")
    name = name_build("scan_cpu", sources, compiler, version, flags, processor())
    path = os.path.join(cache_folder(), f"{name}.so")
    if not os.path.exists(path):
        with lock(os.path.join(cache_folder(), f"{name}.lock")):
            if not os.path.exists(path):        # nobody else has built it meanwhile
                log.info("compiling %s", sources[0])
                output_of(compiler, sources[0], *flags, "-o", f"{path}.tmp")
                os.replace(f"{path}.tmp", path)                 # all or nothing, even if killed
    library = ctypes.CDLL(path)

    def call(operation: str, numbers: list[int], device: torch.device):
        getattr(library, operation)((ctypes.c_int64 * len(numbers))(*numbers), None)

    return call


def load_cuda():
    from torch.utils import cpp_extension
    sources = [find_source("scan_cuda.cpp"), find_source("scan_cuda.cu")]
    if torch.version.cuda is None:
        raise RuntimeError("this torch is built without CUDA")
    nvcc = os.path.join(cpp_extension.CUDA_HOME or "", "bin", "nvcc")
    if not os.path.exists(nvcc):
        raise RuntimeError(
            f"no nvcc found: install the CUDA toolkit {torch.version.cuda} or set CUDA_HOME"
        )
    version, major = re.search(r"release ((\d+)\.\d+)", output_of(nvcc, "--version")).groups()
    if major != torch.version.cuda.split(".")[0]:
        raise RuntimeError(
            f"nvcc is of CUDA {version}, torch of CUDA {torch.version.cuda}: install a toolkit of "
            "the same major version and set CUDA_HOME to it"
        )
    flags = ["-O3", "-std=c++17", "-ftz=true"]
    gpus = range(torch.cuda.device_count())
    archs = {"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in gpus}
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(sorted(archs)) or "8.0;9.0"
    name = name_build(
        "scan_cuda", [*sources, find_source("scan.h")], torch.__version__, version, flags, archs
    )
    folder = os.path.join(cache_folder(), name)
    os.makedirs(folder, exist_ok=True)
    done = os.path.join(folder, "done")
    if not os.path.exists(done):
        with lock(os.path.join(cache_folder(), f"{name}.lock")):
            if not os.path.exists(done):
                log.warning("compiling the CUDA kernels for %s: once, about a minute", archs)
                build_extension(name, sources, flags, archs, folder)
                open(done, "w").close()
    path = os.path.join(folder, f"{name}.so")
    spec = importlib.util.spec_from_file_location(name, path)
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    return lambda operation, numbers, device: library.call(operation, numbers, device.index)


def build_extension(name, sources, flags, archs, folder):
    """torch's way to compile, which reads its settings from the environment."""
    from torch.utils import cpp_extension
    with contextlib.suppress(FileNotFoundError):                # left by a build that was killed:
        os.remove(os.path.join(folder, "lock"))                 # load() would wait for it for ever
    before = {key: os.environ.get(key) for key in ("PATH", "TORCH_CUDA_ARCH_LIST")}
    beside_python = os.path.dirname(sys.executable)             # where ninja is
    os.environ["PATH"] = os.pathsep.join([beside_python, before["PATH"] or os.defpath])
    os.environ["TORCH_CUDA_ARCH_LIST"] = archs
    try:
        cpp_extension.load(name, sources, extra_cuda_cflags=flags, build_directory=folder)
    finally:
        for key, value in before.items():
            os.environ.pop(key)
            if value is not None:
                os.environ[key] = value


KERNELS = {
    "cpu": Kernels("cpu", DTYPES[:2], load_cpu),
    "cuda": Kernels("cuda", DTYPES, load_cuda),
}


def backends(plain, announce) -> list[CompiledBackend]:
    """plain: the fastvim.Backend for what kernels do not know; announce: logs a message once."""
    return [CompiledBackend(kernels, name, plain, announce) for name, kernels in KERNELS.items()]
