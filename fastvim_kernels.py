"""The compiled backends of fastvim.py: calling kernels, and the operations that autograd sees.

fastvim.py registers what `backends` returns; nothing is compiled before a model runs. Five parts:

    1 the boundary to C: one function hands over pointers, and only of what C expects
    2 walks: the tables by which kernels follow a grid
    3 ssm and add_norm, forward and backward, by the operations of scan.h
    4 what PyTorch sees of them: gradients, programs, derivatives of derivatives
    5 the backends, and what they leave to plain PyTorch

The letters are those of fastvim.py: b images, l tokens, p steps, e inner width, n states, r rank.
"""
import contextlib
import functools
import logging
import math
import re
import sys
import threading
import types
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn.modules import module

import fastvim_build

DTYPES = (torch.float32, torch.bfloat16, torch.float16)     # kernels know them by their place here
MAX_STATES = 64
MAX_SIZE = 2 ** 31 - 1                      # of any axis: tables hold 32-bit integers
EPS = 1e-5                                                  # of all norms
PLAIN = (Tensor, nn.Parameter)              # not FakeTensor, DTensor and other subclasses
for kind in PLAIN:                          # einops notes each type at its first call: if that is
    rearrange(kind(torch.empty(0)), "a -> a")   # within torch.compile, a model is compiled twice

# ---- 1. The boundary to C ------------------------------------------------------------------------
#
# scan.h says which fields the structure of each operation has, of what type and of what shape.
# Python reads it: no list of arguments is kept twice. A field that is missing, or of another type,
# shape, layout or device than declared, is an error here and not a crash there.

MAY_BE_NULL = {"bias", "dout", "dhidden", "argmax", "D", "dt_bias", "norm_weight", "norm_bias"}


class Field(NamedTuple):
    name: str
    type: str                               # int64_t, void, float or int32_t
    axes: tuple                             # of an array, such as ("b", "l", "2 e")
    is_input: bool                          # const


@functools.cache
def structures() -> dict[str, list[Field]]:
    """scan.h -> {operation: the fields of its structure}. A structure within another, such as Walk,
    is laid out in its place. The comment behind pointers has the shape of each, or one for all."""
    with open(fastvim_build.find_source("scan.h")) as file:
        text = file.read()
    found = {}
    for structure, body in re.findall(r"^struct (\w+) \{(.*?)\};", text, re.DOTALL | re.MULTILINE):
        fields = found[structure] = []
        for const, kind, names, comment in re.findall(r"(const )?(\w+) ([^;/]+);([^\n]*)", body):
            names = re.findall(r"\w+", names)
            shapes = re.findall(r"(?:\[[^]]+\])+", comment) or [""]
            shapes *= len(names) if len(shapes) == 1 else 1
            own = [Field(name, kind, tuple(re.findall(r"\[(.+?)\]", shape)), bool(const))
                   for name, shape in zip(names, shapes, strict=True)]
            fields += found.get(kind, own)
    prototypes = re.findall(r"int (\w+)\(const (\w+) \*", text)
    return {operation: found[structure] for operation, structure in prototypes}


@functools.cache
def integers(operation: str) -> list[str]:
    return [field.name for field in structures()[operation] if field.type == "int64_t"]


def to_c(operation: str, values: dict) -> tuple[list[int], list[Tensor | None]]:
    """The structure of an operation as numbers, a tensor as its address, None as 0; and its
    outputs: what `values` lacks of them is made here, but for the gradients of what is None.
    `values` are named as in scan.h, where dtype is torch's, and has the device of all tensors.
    Raises TypeError or ValueError, naming the field, for what C could not read as declared."""
    device = values["device"]
    sizes = [values[name] for name in integers(operation)]
    numbers, arrays = layout(operation, values.get("batch", ()), *sizes)
    numbers = numbers.copy()
    outputs = []
    for place, name, dtype, shape, strides, is_input in arrays:
        if is_input or name in values:
            value = values[name]
            if value is not None or name not in MAY_BE_NULL:
                try:                        # the layout last: sparse and nested tensors have none
                    right = (
                        type(value) in PLAIN and value.dtype is dtype and value.device == device
                        and value.shape == shape and not value.is_neg()
                        and (value.stride() == strides if strides else value.is_contiguous())
                    )
                    address = value.data_ptr() if right else 0
                except RuntimeError:
                    address = right = 0
                if not address and not (right and 0 in shape):
                    refuse(f"{operation}: {name}", value, dtype, shape, device)
                numbers[place] = address
        elif values.get(name[1:], name) is None:
            value = None
        else:
            value = torch.empty(shape, dtype=dtype, device=device)
            numbers[place] = value.data_ptr()
        if not is_input:
            outputs.append(value)
    return numbers, outputs


@functools.lru_cache(1024, typed=True)
def layout(operation: str, batch: tuple, *sizes) -> tuple[list, list]:
    """For integers of these values: the fields as numbers, with 0 for arrays; and what each array
    must be: its place, name, dtype, shape, strides if they are not those of its shape, and whether
    it is read. batch: the axes of which the rows of add_norm are made."""
    sizes = dict(zip(integers(operation), sizes))
    activations = sizes.pop("dtype", torch.float32)
    for name, size in sizes.items():
        least = 1 if name in ("l", "p", "e", "n", "d") else 0
        if type(size) is not int:
            raise TypeError(f"{operation}: {name} must be a Python integer, not {describe(size)}")
        if not least <= size <= MAX_SIZE:
            raise ValueError(f"{operation}: {name} must be {least} to {MAX_SIZE}, not {size}")
    sizes["dtype"] = DTYPES.index(activations)
    dtypes = {"float": torch.float32, "int32_t": torch.int32, "void": activations}
    arrays = []
    for place, (name, kind, axes, is_input) in enumerate(structures()[operation]):
        if kind == "int64_t":
            continue
        if name == "ds" and sizes.get("shared"):
            axes = axes[1:]
        shape = tuple(length(axis, {"k": 2, **sizes}) for axis in axes)
        if axes == ("rows", "d"):
            shape = (*batch, sizes["d"])
        strides = None
        if name in ("B", "C") and sizes["stride"] != sizes["n"]:
            _, b, p, _ = shape
            row = sizes["stride"]
            strides = (max(b, 1) * p * row, p * row, row, 1)
        arrays.append((place, name, dtypes[kind], shape, strides, is_input))
    return [sizes.get(field.name, 0) for field in structures()[operation]], arrays


def length(axis: str, sizes: dict) -> int:
    """Of an axis as scan.h writes it: "b", "4", "2 e" or "p + 1"."""
    terms = [term.split() for term in axis.split("+")]
    return sum(math.prod(int(w) if w.isdigit() else sizes[w] for w in term) for term in terms)


def refuse(field: str, value, dtype: torch.dtype, shape: tuple, device):
    right = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested
    if right and value.dtype == dtype and value.device == device and value.shape != shape:
        raise ValueError(f"{field} must have the shape {shape}, not {tuple(value.shape)}")
    raise TypeError(f"{field} must be a contiguous {dtype} tensor on {device}, "
                    f"not {describe(value)}")


def describe(value) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.is_nested:
        return f"nested {type(value).__name__} of {value.dtype} on {value.device}"
    said = f"{type(value).__name__} of {value.dtype} {tuple(value.shape)} on {value.device}"
    if value.is_neg() or value._is_zerotensor():
        return f"{said} whose numbers are not in memory: .clone() writes them there"
    return said


class Kernels:
    """The operations of scan.h by one library. load() returns it: a function of (operation,
    numbers, device)."""

    def __init__(self, name: str, dtypes: tuple, load):
        self.name = name
        self.dtypes = dtypes
        self._load = load
        self._library = None
        self._problem = None
        self._lock = threading.Lock()

    def problem(self) -> str | None:
        """None if the library is there, which the first call builds; else what is wrong."""
        with self._lock:
            if self._library is None and self._problem is None:
                try:
                    structures()
                    self._library = self._load()
                except (OSError, RuntimeError, ImportError, AttributeError) as error:
                    self._problem = str(error) or type(error).__name__
        return self._problem

    def run(self, operation: str, v: dict, **own) -> list[Tensor | None]:
        """-> the outputs, in the order of scan.h. v: values that operations share; own: others."""
        if self._library is None and self.problem():
            raise RuntimeError(f"backend {self.name} cannot be used: {self._problem}")
        if v.get("dtype", torch.float32) not in self.dtypes:
            raise TypeError(f"backend {self.name} has no {v['dtype']} activations")
        numbers, outputs = to_c(operation, {**v, **own})
        self._library(operation, numbers, v["device"])
        return outputs


KERNELS = {
    "cpu": Kernels("cpu", DTYPES[:2], fastvim_build.load_cpu),
    "cuda": Kernels("cuda", DTYPES, fastvim_build.load_cuda),
}

# ---- 2. Walks ------------------------------------------------------------------------------------

READ_BY_GRAPHS = {}                         # by id, the Walks whose addresses are in CUDA graphs


class Walk(NamedTuple):
    """A Grid as kernels follow it: tables over the positions of its walk, for `rows` images, or one
    row if all walk alike. scan.h says the same."""
    token: Tensor                           # (rows l) int32, position -> token as it lies
    group: Tensor                           # (rows l) int32, position -> scan step, -1 for a hole
    weight: Tensor                          # (rows l) float32, factor in the mean of its step
    member: Tensor                          # (rows l) int32, positions sorted by step, holes last
    start: Tensor                           # (rows p+1) int32, where each step begins in member


def make_walk(token, group, steps, pool_weight) -> Walk:
    """token, group (rows l) int64, group -1 for holes; pool_weight (rows p): how much of a step's
    mean its tokens make together."""
    key = group.masked_fill(group < 0, steps)               # (rows l)
    key, member = key.sort(dim=1, stable=True)
    edges = torch.arange(steps + 1, device=key.device).repeat(key.shape[0], 1)
    start = torch.searchsorted(key, edges)                  # (rows p+1)
    weight = pool_weight / start.diff(dim=1).clamp(min=1)   # (rows p)
    weight = weight.gather(1, group.clamp(min=0))           # (rows l)
    return Walk(token.int(), group.int(), weight.float(), member.int(), start.int())


@functools.lru_cache(64)
def full_walk(storage, order, pooled, lengths, slot, scale, device) -> Walk:
    """The Walk of a full grid, remembered: its tables depend on the grid alone. slot: the place of
    a class token among the tokens, or None. Raises RuntimeError within a CUDA graph.

    All streams may read them: the copy is over when this returns, and begins when the device is
    idle, so that nobody still reads the tables that are forgotten for them."""
    axes = storage.split()
    sizes = dict(zip(axes, lengths))
    named = all(axis.isidentifier() and axis.islower() for axis in axes)
    same_axes = sorted(axes) == sorted(order.split()) and {*pooled.split()} <= {*axes}
    a_length_each = len(sizes) == len(axes) == len(lengths) and min(lengths) >= 1
    tokens = math.prod(lengths)
    if not (named and same_axes and a_length_each) or not 0 <= (slot or 0) <= tokens:
        raise ValueError(f"no grid is stored as {storage!r}, walked as {order!r} and pooled over "
                         f"{pooled!r} with lengths {lengths} and a class token at {slot}")
    if is_captured(device):
        raise RuntimeError("a CUDA graph cannot be captured of a grid's first use, which makes its "
                           f"tables: run the model once, at {lengths} tokens, before")
    kept = [axis for axis in order.split() if axis not in pooled.split()]
    steps = math.prod(sizes[axis] for axis in kept)
    with torch.inference_mode(False):       # the tables outlive this call, and may serve training
        token = rearrange(torch.arange(tokens, device="cpu"), f"({storage}) -> ({order})", **sizes)
        group = torch.arange(steps, device="cpu")
        group = repeat(group, f"({' '.join(kept)}) -> ({order})", **sizes)
        weight = torch.full([steps], scale if pooled else 1.0, dtype=torch.float32, device="cpu")
        if slot is not None:                # it is a step, the middle one, and stands before it
            half = steps // 2
            position = int((group == half).int().argmax())
            token = insert(token + (token >= slot), position, slot)
            group = insert(group + (group >= half), position, half)
            weight = insert(weight, half, 1.0)
            steps += 1
        tables = make_walk(token[None], group[None], steps, weight[None])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return Walk(*(table.to(device) for table in tables))


def insert(v: Tensor, place: int, value) -> Tensor:
    """v (m) -> (m+1) with the value at that place."""
    return torch.cat([v[:place], v.new_tensor([value]), v[place:]])


def is_captured(device: torch.device) -> bool:
    """Are this device's operations noted for a CUDA graph, and not run?"""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def walk_with_holes(grid) -> Walk:
    """The Walk of a GridWithHoles, from what its own methods do to numbers; kept with the grid."""
    if not hasattr(grid, "tables"):
        walk = grid.index["walk"]
        rows, length = walk.shape
        step = torch.arange(grid.steps, device=walk.device).expand(1, rows, -1)
        group = grid.expand(step[..., None])[0, ..., 0]     # (rows l)
        group = group.masked_fill(grid.index["hole"], -1)
        ones = torch.ones(1, rows, length, 1, dtype=torch.float32, device=walk.device)
        grid.tables = make_walk(walk, group, grid.steps, grid.pool(ones)[0, ..., 0])
    return grid.tables


def pack(grid) -> tuple:
    """A Grid as arguments of an operation: five tables, storage, order, pooled, lengths, slot,
    scale. A full grid, also one with a class token, has no tables: they are looked up when the
    operation runs, on real tensors."""
    full = getattr(grid, "full", grid)
    slot = getattr(grid, "slot", None)
    if full is not grid and slot is None:
        return (*walk_with_holes(grid), "", "", "", [grid.steps], None, 1.0)
    lengths = [length for _, length in full.sizes]
    return (*[None] * 5, full.storage, full.order, full.pooled, lengths, slot, full.scale)


def unpack(device, *grid) -> Walk:
    *tables, storage, order, pooled, lengths, slot, scale = grid
    if storage:
        walk = full_walk(storage, order, pooled, tuple(lengths), slot, scale, device)
        if is_captured(device):
            READ_BY_GRAPHS[id(walk)] = walk
        return walk
    if slot is not None or any(table is None for table in tables):
        raise ValueError("a walk needs either the storage of a full grid or all five tables")
    return Walk(*tables)


# ---- 3. ssm and add_norm -------------------------------------------------------------------------


class Weights(NamedTuple):
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


def weights_of(w) -> Weights:
    """fastvim.SSMWeights -> what kernels take of them."""
    norm = [float32(getattr(w.layernorm, name, None)) for name in ("weight", "bias")]
    return Weights(*[None if t is None else t.contiguous() for t in w[:7]], *norm)


def float32(t):
    return None if t is None else t.float().contiguous()


def norm_values(residual, weight, bias, dtype) -> dict:
    """What add_norm and its backward pass share; dtype: of hidden. Raises ValueError where C has no
    such widths."""
    d = weight.numel()
    if d < 1 or residual.shape[-1:] != weight.shape:
        raise ValueError(f"the norm's weight {tuple(weight.shape)} does not fit activations "
                         f"{tuple(residual.shape)}")
    return {"device": residual.device, "dtype": dtype, "rows": residual.numel() // d, "d": d,
            "batch": residual.shape[:-1], "residual": residual, "weight": float32(weight),
            "bias": float32(bias)}


def scan_values(x, dt, A, B, C, D=None, dt_bias=None, stride=None) -> dict:
    """What selective_scan takes. stride: B and C are columns of a table that is so wide; else
    contiguous. Raises ValueError where C has no such sizes; to_c checks the shapes."""
    if x.ndim != 4 or A.ndim != 3:
        raise ValueError(
            f"expected x (k b p e) and A (k e n), not {tuple(x.shape)} and {tuple(A.shape)}"
        )
    k, b, p, e = x.shape
    n = A.shape[2]
    if k not in (1, 2) or not 1 <= n <= MAX_STATES or p < 1:
        raise ValueError(f"{k} directions, {p} steps and {n} states; kernels know 1 or 2 "
                         f"directions, at least one step and at most {MAX_STATES} states")
    return {"device": x.device, "k": k, "b": b, "p": p, "e": e, "n": n, "stride": stride or n,
            "x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias}


def scan_of(pooled, w: Weights, skip: bool):
    """fastvim.select: pooled (k b p e) -> the values of its scan, whose B and C are columns of a
    table; and of that table the columns from which dt was made, low (k bp r)."""
    k, b, p, e = pooled.shape
    r = w.dt_proj.shape[2]
    n = w.A_log.shape[2]
    table = torch.bmm(pooled.view(k, b * p, e), w.x_proj.mT)            # (k bp r+2n)
    low = table.narrow(2, 0, r)                             # (k bp r)  split() takes longer
    dt = torch.bmm(low, w.dt_proj.mT).view(k, b, p, e)
    table = table.view(k, b, p, r + 2 * n)
    B = table.narrow(3, r, n)                               # (k b p n)
    C = table.narrow(3, r + n, n)
    A = w.A_log.exp().neg_()                                # (k e n)
    return scan_values(pooled, dt, A, B, C, w.D if skip else None, w.dt_bias, r + 2 * n), low


def run_ssm(xz, *rest):
    """fastvim.ssm by kernels -> y (b l e) and, for the way back, pooled, argmax or None, s."""
    kernels, w, v = read_ssm(xz, *rest)
    with no_autocast(xz.device):
        pooled, argmax = kernels.run("conv_pool", v)        # (k b p e)
        [s] = kernels.run("selective_scan", scan_of(pooled, w, v["skip"])[0])
        [y] = kernels.run("expand_gate", v, s=s)
    return y, pooled, argmax, s


def run_ssm_backward(dy, pooled, argmax, s, xz, *rest):
    """dy (b l e) -> the gradients of xz and of the nine Weights, None where there is none. It
    computes the convolutions again; two kernels fill the halves of dxz."""
    kernels, w, v = read_ssm(xz, *rest)
    argmax = argmax if v["max"] else None                   # programs have an empty one
    with no_autocast(xz.device):
        dxz, g, ds, *dnorm = kernels.run("expand_gate_backward", v, s=s, dy=dy)
        scan, low = scan_of(pooled, w, v["skip"])
        dp, ddt, dA, dB, dC, dD, ddt_bias = kernels.run(
            "selective_scan_backward", scan, shared=1, ds=ds)
        ddt = ddt.flatten(1, 2)                             # (k bp e)
        ddt_proj = ddt.mT @ low                             # (k e r)
        dtable = torch.cat([ddt @ w.dt_proj, dB.flatten(1, 2), dC.flatten(1, 2)], 2)
        dx_proj = dtable.mT @ pooled.flatten(1, 2)          # (k r+2n e)
        dp = torch.baddbmm(dp.flatten(1, 2), dtable, w.x_proj).view_as(pooled)
        _, dconv_weight, dconv_bias, dskip = kernels.run(
            "conv_pool_backward", v, argmax=argmax, dpooled=dp, g=g, dxz=dxz)
    dA_log = dA * scan["A"]                                 # of A = -exp(A_log)
    dD = dD if v["skip"] else dskip
    return dxz, dconv_weight, dconv_bias, dx_proj, ddt_proj, ddt_bias, dA_log, dD, *dnorm


def read_ssm(xz, *rest) -> tuple[Kernels, Weights, dict]:
    """The arguments of SSM -> the kernels, the weights, and the values that conv_pool, expand_gate
    and their backward passes share. Raises ValueError where the shapes do not fit together."""
    w = Weights(*rest[:len(Weights._fields)])
    *grid, pool, skip, backend = rest[len(Weights._fields):]
    *_, storage, _, _, lengths, slot, scale = grid
    if pool not in ("mean", "max"):
        raise ValueError(f"pool={pool!r}: kernels know mean and max")
    if pool == "max" and scale != 1:
        raise ValueError(f"scale={scale}: maxima are not scaled, means are")
    tokens = math.prod(lengths) + (slot is not None)
    if storage and xz.shape[1:2] != (tokens,):  # before tables of any size are made
        raise ValueError(f"activations {tuple(xz.shape)} do not fit a walk of {(1, tokens)} tokens")
    walk = unpack(xz.device, *grid)
    if (xz.ndim, w.dt_proj.ndim, w.A_log.ndim, walk.start.ndim) != (3, 3, 3, 2):
        found = tuple(tuple(t.shape) for t in (xz, w.dt_proj, w.A_log, walk.start))
        raise ValueError(f"expected xz (b l 2e), dt_proj (k e r), A_log (k e n), start (rows p+1), "
                         f"not {', '.join(map(str, found))}")
    b, l, width = xz.shape
    e = width // 2
    r = w.dt_proj.shape[-1]
    n = w.A_log.shape[-1]
    rows, edges = walk.start.shape
    # of these two C sees only products; to_c checks the others
    if w.x_proj.shape != (2, r + 2 * n, e) or w.dt_proj.shape != (2, e, r):
        found = {name: tuple(t.shape) for name, t in w._asdict().items() if t is not None}
        raise ValueError(f"activations {tuple(xz.shape)} do not fit weights of shapes {found}")
    fits = l >= 1 and edges >= 2 and rows in (1, b) and walk.token.shape == (rows, l)
    if not fits or not 1 <= n <= MAX_STATES:
        raise ValueError(
            f"activations {tuple(xz.shape)} do not fit a walk of {tuple(walk.token.shape)} tokens, "
            f"or {n} states are not 1 to {MAX_STATES}"
        )
    v = {"device": xz.device, "dtype": xz.dtype, "b": b, "l": l, "p": edges - 1, "e": e,
         "rows": rows, "max": int(pool == "max"), "skip": skip, "xz": xz}
    v |= walk._asdict() | w._asdict()
    if skip:
        v["D"] = None                       # the scan has it
    if pool == "mean":
        v["argmax"] = None
    return kernels_of(backend), w, v


def kernels_of(backend: str) -> Kernels:
    if backend not in KERNELS:
        raise ValueError(f"no kernels are called {backend!r}; choose from {', '.join(KERNELS)}")
    return KERNELS[backend]


def no_autocast(device):
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def run_add_norm(hidden, residual, weight, bias, backend):
    """hidden, residual (b l d) -> normed in hidden's type, residual + hidden."""
    v = norm_values(residual, weight, bias, hidden.dtype)
    return kernels_of(backend).run("add_norm", v, hidden=hidden)


def run_add_norm_backward(du, dout, out, weight, bias, backend):
    """out: the sum that add_norm returned -> the gradients of residual (float32), of hidden in du's
    type or None if they are the same, of weight and bias."""
    v = norm_values(out, weight, bias, du.dtype)
    own = {"dhidden": None} if du.dtype == torch.float32 else {}
    centred = int(bias is not None)
    return kernels_of(backend).run(
        "add_norm_backward", v, centred=centred, du=du, dout=dout, **own)


# ---- 4. What PyTorch sees ------------------------------------------------------------------------
#
# Kernels know their own backward pass, so autograd need not look inside. Programs (torch.compile,
# torch.export) and whoever else notes operations see those of torch.library. All other calls go
# past them: the dispatcher's bookkeeping costs as much as the kernels do on small images.

SSM = (
    "Tensor xz, Tensor conv_weight, Tensor conv_bias, Tensor x_proj, Tensor dt_proj, "
    "Tensor dt_bias, Tensor A_log, Tensor D, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? token, Tensor? group, Tensor? weight, Tensor? member, Tensor? start, "
    "str storage, str order, str pooled_axes, SymInt[] lengths, SymInt? slot, float scale, "
    "str pool, bool skip, str backend"
)
TENSORS = SSM.count("Tensor")               # they come first
WEIGHTS = 1 + len(Weights._fields)          # of these the first have gradients
OPERATIONS = {}                             # name -> what runs it, and what autograd asks of it


def register(name, arguments, outputs, run, like, *autograd):
    """An operation of torch.library. It returns so many tensors, an empty one for None. like: its
    arguments, which may have no memory -> tensors such as it returns. autograd: what to save, how
    to differentiate, and how to do that twice."""
    def tensors_only(function):
        def checked(*arguments):
            # PyTorch takes a call that mixes tensors with and without memory to the latter
            devices = {str(t.device) for t in arguments if isinstance(t, Tensor)}
            if len(devices) > 1:
                raise ValueError(
                    f"tensors must be on one device, not on {' and '.join(sorted(devices))}")
            empty = arguments[0].new_empty
            return tuple(empty(0) if t is None else t for t in function(*arguments))
        return checked

    def shapes(*arguments):
        form = torch.contiguous_format
        return [t if t is None else torch.empty_like(t, memory_format=form)
                for t in like(*arguments)]

    OPERATIONS[name] = (run, *autograd)
    schema = f"({arguments}) -> ({', '.join(['Tensor'] * outputs)})"
    operation = torch.library.custom_op(
        f"fastvim::{name}", tensors_only(run), mutates_args=(), schema=schema)
    operation.register_fake(tensors_only(shapes))
    if autograd:
        save, differentiate, _ = autograd
        operation.register_autograd(differentiate, setup_context=save)


def call(name: str, context, *arguments):
    """-> the outputs of an operation. context: what it takes to differentiate it twice."""
    first = arguments[0]
    noted = torch.compiler.is_compiling() or type(first) not in PLAIN
    if noted or torch._C._len_torch_dispatch_stack() > 0:
        return getattr(torch.ops.fastvim, name)(*arguments)
    if torch.is_grad_enabled():
        return Direct.apply(name, context, *arguments)
    run, *_ = OPERATIONS[name]
    return run(*arguments)


class Direct(torch.autograd.Function):
    """An operation that nobody but autograd notes."""

    @staticmethod
    def forward(ctx, name, context, *arguments):
        run, save, *ctx.differentiate = OPERATIONS[name]
        ctx.context = context
        outputs = run(*arguments)
        save(ctx, arguments, outputs)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        once, twice = ctx.differentiate
        batches = [torch._C._functorch.is_legacy_batchedtensor(g) for g in grads if g is not None]
        if torch.is_grad_enabled() or any(batches) or torch._C._are_functorch_transforms_active():
            return None, None, *twice(ctx, *grads)
        return None, None, *once(ctx, *grads)


def save_ssm(ctx, inputs, output):
    """Of what has the tokens' length only xz is kept."""
    ctx.mark_non_differentiable(*[t for t in output[1:] if t is not None])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *inputs[:TENSORS])
    ctx.rest = inputs[TENSORS:]


def differentiate_ssm(ctx, dy, *_):
    if dy is None:                          # y was used, and what used it has no gradient
        return (None,) * (TENSORS + len(ctx.rest))
    pooled, argmax, s, *inputs = ctx.saved_tensors
    saved = (dy.contiguous(), pooled, argmax, s)
    grads = call("ssm_backward", None, *saved, *inputs, *ctx.rest)
    grads = [None if t is None else grad for t, grad in zip(inputs, grads)]
    return *grads, *[None] * (TENSORS - WEIGHTS + len(ctx.rest))


def differentiate_ssm_twice(ctx, dy, *_):
    if dy is None:
        return (None,) * (TENSORS + len(ctx.rest))
    plain, grid = ctx.context
    *_, pool, skip, _ = ctx.rest

    def ssm(xz, *weights):
        w = Weights(*weights)
        norm = norm_of(w.norm_weight, w.norm_bias)
        values = dict(w._asdict(), pool=pool, skip_before_expand=skip, layernorm=norm)
        return plain.ssm(xz, types.SimpleNamespace(**values), grid)
    grads = differentiate_plainly(ssm, ctx.saved_tensors[3:3 + WEIGHTS], dy)
    return *grads, *[None] * (TENSORS - WEIGHTS + len(ctx.rest))


def save_add_norm(ctx, inputs, output):
    _, _, weight, bias, ctx.backend = inputs
    ctx.save_for_backward(output[1], weight, bias)


def differentiate_add_norm(ctx, du, dout):
    out, weight, bias = ctx.saved_tensors
    arguments = (du.contiguous(), dout.contiguous(), out, weight, bias, ctx.backend)
    dresidual, dhidden, dweight, dbias = call("add_norm_backward", None, *arguments)
    if du.dtype == torch.float32:
        dhidden = dresidual
    return dhidden, dresidual, dweight, None if bias is None else dbias, None


def differentiate_add_norm_twice(ctx, du, dout):
    def norm(out, weight, bias):
        return norm_of(weight.float(), float32(bias))(out).to(du.dtype)
    dout2, dweight, dbias = differentiate_plainly(norm, ctx.saved_tensors, du)
    return dout + dout2, dout + dout2, dweight, dbias, None


def norm_of(weight, bias):
    """A norm over the last axis, from its weights; without bias it is RMSNorm."""
    if weight is None:
        return None
    if bias is None:
        return lambda y: F.rms_norm(y, weight.shape, weight, EPS)
    return lambda y: F.layer_norm(y, weight.shape, weight, bias, EPS)


def differentiate_plainly(function, inputs, dy) -> list:
    """The gradients of a function of plain PyTorch, which knows its own derivatives: of the inputs
    that require them. Views stand for them: it ends there, even if one was made from another."""
    with torch.enable_grad():
        inputs = [None if t is None else t.view_as(t) for t in inputs]
        y = function(*inputs)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    again = torch.is_grad_enabled()
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=again))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def like_ssm(xz, *rest):
    """-> tensors such as y, pooled, argmax, s."""
    *tables, storage, _, pooled, lengths, slot, _, pool, _, _ = rest[len(Weights._fields):]
    if storage:
        axes = zip(storage.split(), lengths)
        p = math.prod([length for axis, length in axes if axis not in pooled.split()])
        p += slot is not None
    else:
        p = Walk(*tables).start.shape[1] - 1
    b, l, width = xz.shape
    p = xz.new_empty(2, b, p, width // 2, dtype=torch.float32)
    return xz.new_empty(b, l, width // 2), p, p.int() if pool == "max" else None, p


def like_add_norm_backward(du, dout, out, weight, bias, backend):
    return out, None if du.dtype == torch.float32 else du, weight.float(), float32(bias)


register("ssm", SSM, 4, run_ssm, like_ssm,
         save_ssm, differentiate_ssm, differentiate_ssm_twice)
register("ssm_backward", f"Tensor dy, Tensor pooled, Tensor argmax, Tensor s, {SSM}", WEIGHTS,
         run_ssm_backward, lambda dy, pooled, argmax, s, *inputs: inputs[:WEIGHTS])
register("add_norm", "Tensor hidden, Tensor residual, Tensor weight, Tensor? bias, str backend", 2,
         run_add_norm, lambda hidden, residual, *_: (hidden, residual),
         save_add_norm, differentiate_add_norm, differentiate_add_norm_twice)
register("add_norm_backward",
         "Tensor du, Tensor? dout, Tensor out, Tensor weight, Tensor? bias, str backend", 4,
         run_add_norm_backward, like_add_norm_backward)

# ---- 5. The backends -----------------------------------------------------------------------------

GLOBAL_HOOKS = (module._global_forward_hooks, module._global_forward_pre_hooks,
                module._global_backward_hooks, module._global_backward_pre_hooks)
UNDERSTOOD = (*PLAIN, FakeTensor, FunctionalTensor)         # what a model's tensors are, traced


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
        lacks = lacks_norm(norm, hidden.shape[-1], self.plain.norms)
        dtype = hidden.dtype if lacks else norm.weight.dtype
        if residual is None or not self.serves(dtype, lacks):
            return self.plain.add_norm(hidden, residual, norm)
        hidden = hidden.to(norm.weight.dtype).contiguous()
        bias = getattr(norm, "bias", None)
        return call("add_norm", None, hidden, residual.contiguous(), norm.weight, bias, self.name)

    def ssm(self, xz, w, grid):
        if not self.serves(xz.dtype, lacks_weights(w, self.plain.norms)):
            return self.plain.ssm(xz, w, grid)
        return call("ssm", (self.plain, grid), *self.arguments(xz, w, grid))[0]

    def arguments(self, xz, w, grid) -> tuple:
        """Those of SSM."""
        tensors = (xz.contiguous(), *weights_of(w))
        return *tensors, *pack(grid), w.pool, w.skip_before_expand, self.name

    # One operation at a time, for tests and measurements: no gradients

    def conv_pool(self, xz, w, grid):
        """-> None, where plain PyTorch returns c, which kernels do not store; pooled (k b p e)."""
        kernels, _, v = read_ssm(*self.arguments(xz, w, grid))
        return None, kernels.run("conv_pool", v)[0]

    def selective_scan(self, x, dt, A, B, C, D=None, dt_bias=None):
        tensors = (None if t is None else t.contiguous() for t in (x, dt, A, B, C, D, dt_bias))
        return self.kernels.run("selective_scan", scan_values(*tensors))[0]

    def expand_gate(self, xz, c, s, w, grid):
        kernels, _, v = read_ssm(*self.arguments(xz, w, grid))
        if s.shape != (2, v["b"], v["p"], v["e"]):
            raise ValueError(f"s {tuple(s.shape)} does not fit {v['p']} steps of {tuple(xz.shape)}")
        return kernels.run("expand_gate", v, s=s.contiguous())[0]

    def serves(self, dtype: torch.dtype, lacks: str) -> bool:
        """Can the kernels run this call? What they lack is logged, once."""
        if not lacks and dtype not in self.kernels.dtypes:
            lacks = f"{dtype} activations"
        lacks = lacks or lacks_transform()
        if lacks and not torch.compiler.is_dynamo_compiling():
            said = "backend %s has no %s: python runs this model"
            self.announce(logging.WARNING, said, self.name, lacks)
        return not lacks


def lacks_transform() -> str:
    """The transform or tracing in force, if it must look into an operation; or ""."""
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives"
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export():
        return "torch.onnx.export"
    return ""


def lacks_norm(norm: nn.Module | None, width: int, known: dict) -> str:
    """What kernels, which read a norm's weights and do not call it, lack to compute it over `width`
    numbers; or "". known: {class of norm: its forward}."""
    if norm is None:
        return ""
    hooks = (norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks,
             norm._backward_pre_hooks, *GLOBAL_HOOKS)
    if any(hooks) or "forward" in norm.__dict__:
        return "hooks on norms"
    bias = getattr(norm, "bias", None)
    right = known.get(type(norm)) is type(norm).forward and norm.eps == EPS
    right = right and tuple(norm.normalized_shape) == (width,) and norm.weight is not None
    if not right or isinstance(norm, nn.LayerNorm) != (bias is not None):
        return f"norms such as {norm}"
    return lacks_tensors((norm.weight, bias))


def lacks_tensors(tensors) -> str:
    """The same of weights: kernels read float32 memory, which a quantized tensor has not."""
    for t in tensors:
        if isinstance(t, Tensor) and type(t) not in UNDERSTOOD:
            return f"weights such as {type(t).__name__}"
        if t is not None and t.dtype == torch.float64:
            return "float64 weights"
    return ""


def lacks_weights(w, known: dict) -> str:
    if w.pool == "attention":
        return "attention pooling"
    if w.conv_weight is None or w.conv_weight.shape[2] != 4:
        return "convolution of other than four taps"
    if w.A_log.shape[2] > MAX_STATES:
        return f"more than {MAX_STATES} states"
    return lacks_norm(w.layernorm, w.D.shape[-1], known) or lacks_tensors(w[:7])


def backends(plain, announce) -> list[CompiledBackend]:
    """plain: the fastvim.Backend for what kernels do not know; announce: logs a message once."""
    return [CompiledBackend(kernels, name, plain, announce) for name, kernels in KERNELS.items()]
