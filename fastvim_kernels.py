"""The compiled backends of fastvim.py: calling kernels, and the operations that autograd sees.

fastvim.py registers what `backends` returns; nothing is compiled before a model runs. Four parts:

    1 the boundary to C: one function hands over pointers, and only of what C expects
    2 the operations of scan.h, forward and backward, and the backend that they make
    3 the same as operations of torch.library, which know their gradients and shapes
    4 the backends by name

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

_source = fastvim_build.find_source                          # where pip put the kernels' sources
DTYPES = (torch.float32, torch.bfloat16, torch.float16)     # kernels know them by their place here
MAX_STATES = 64
MAX_SIZE = 2 ** 31 - 1                      # of any axis: tables hold 32-bit integers
EPS = 1e-5                                                  # of all norms
READ_BY_GRAPHS = {}                         # by id, the Walks whose addresses are in CUDA graphs
GLOBAL_HOOKS = (module._global_forward_hooks, module._global_forward_pre_hooks,
                module._global_backward_hooks, module._global_backward_pre_hooks)
PLAIN = (Tensor, nn.Parameter)              # not FakeTensor, DTensor and other subclasses
for kind in PLAIN:                          # einops notes each type at its first call: if that is
    rearrange(kind(torch.empty(0)), "a -> a")   # within torch.compile, a model is compiled twice
UNDERSTOOD = (*PLAIN, FakeTensor, FunctionalTensor)         # what a model's tensors are, traced
MAY_BE_NULL = {"bias", "dbias", "dout", "dhidden", "argmax", "D", "dD", "dt_bias", "ddt_bias",
               "norm_weight", "norm_bias", "dnorm_weight", "dnorm_bias"}        # as scan.h says

# ---- 1. The boundary to C ------------------------------------------------------------------------
#
# scan.h says which fields the structure of each operation has, of what type and of what shape.
# Python reads it: no list of arguments is kept twice. A field that is missing, or of another type,
# shape, layout or device than declared, is an error here and not a crash there.


class Field(NamedTuple):
    name: str
    type: str                               # int64_t, void, float or int32_t
    axes: tuple                             # of an array, such as ("b", "l", "2 e")
    is_input: bool                          # const


class Structure(tuple):
    """The Fields of an operation. Equal to itself alone, so that it is looked up fast."""
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(self, fields):
        self.integers = [field.name for field in fields if field.type == "int64_t"]


def read_structures(path: str) -> dict[str, Structure]:
    """scan.h -> {operation: its Fields}. A structure within another, such as Walk, is laid out in
    its place. The comment behind pointers has the shape of each of them, or one for all."""
    with open(path) as file:
        text = file.read()
    structures = {}
    for name, body in re.findall(r"^struct (\w+) \{(.*?)\};", text, re.DOTALL | re.MULTILINE):
        fields = []
        for const, kind, names, comment in re.findall(r"(const )?(\w+) ([^;/]+);([^\n]*)", body):
            names = [field.strip(" *") for field in names.split(",")]
            shapes = [()] * len(names)
            if kind in ("void", "float", "int32_t"):
                shapes = [re.findall(r"\[(.+?)\]", shape)
                          for shape in re.findall(r"(?:\[[^]]+\])+", comment)]
                shapes *= len(names) if len(shapes) == 1 else 1
            own = [Field(field, kind, tuple(axes), bool(const))
                   for field, axes in zip(names, shapes, strict=True)]
            fields += structures.get(kind, own)
        structures[name] = Structure(fields)
    prototypes = re.findall(r"int (\w+)\(const (\w+) \*", text)
    return {operation: structures[name] for operation, name in prototypes}


def to_c(operation: str, fields: Structure, device: torch.device, values: dict) -> list[int]:
    """The fields of an operation's structure as numbers: a tensor as its address, None as 0.
    Raises TypeError or ValueError, naming the field, for what C could not read as declared."""
    sizes = tuple([values[name] for name in fields.integers])
    for name, size in zip(fields.integers, sizes):
        if type(size) is not int:
            raise TypeError(f"{operation}: {name} must be a Python integer, not {describe(size)}")
    batch = tuple(values["residual"].shape[:-1]) if "d" in values else ()
    numbers, arrays = layout(operation, fields, sizes, batch)
    numbers = numbers.copy()
    for place, name, dtype, shape, row, is_input in arrays:
        value = values[name]
        if value is None and name in MAY_BE_NULL:
            continue
        try:                                # the layout last: sparse and nested tensors have none
            right = (
                type(value) in PLAIN and value.dtype is dtype and value.device == device
                and value.shape == shape and not (is_input and value.is_neg())
                and (value.is_contiguous() if row is None else is_dense(value, row))
            )
            address = value.data_ptr() if right else 0
        except RuntimeError:
            address = right = 0
        if not address and not (right and 0 in shape):
            refuse(f"{operation}: {name}", value, dtype, shape, device)
        numbers[place] = address
    return numbers


@functools.lru_cache(1024)
def layout(operation: str, fields: Structure, sizes: tuple, batch: tuple) -> tuple[list, list]:
    """For integers of these values: the fields as numbers, with 0 for arrays; and what each array
    must be: its place, name, dtype, shape, how far apart its rows lie where that is not their
    length, and whether it is read. batch: the axes of which the rows of add_norm are made."""
    sizes = dict(zip(fields.integers, sizes))
    for name, size in sizes.items():
        least = 1 if name in ("l", "p", "e", "n", "d") else 0
        if not least <= size <= MAX_SIZE:
            raise ValueError(f"{operation}: {name} must be {least} to {MAX_SIZE}, not {size}")
    if "d" in sizes and math.prod(batch) != sizes["rows"]:
        raise ValueError(f"{operation}: residual must have rows of {sizes['d']} numbers")
    activations = DTYPES[sizes.get("dtype", 0)]
    dtypes = {"float": torch.float32, "int32_t": torch.int32, "void": activations}
    numbers = [sizes.get(field.name, 0) for field in fields]
    arrays = []
    for place, (name, kind, axes, is_input) in enumerate(fields):
        if kind == "int64_t":
            continue
        if name == "ds" and sizes.get("shared"):
            axes = axes[1:]
        shape = tuple(length(axis, {"k": 2, **sizes}) for axis in axes)
        if axes == ("rows", "d"):
            shape = (*batch, sizes["d"])
        row = sizes.get("stride") if name in ("B", "C") else None
        arrays.append((place, name, dtypes[kind], shape, row, is_input))
    return numbers, arrays


def length(axis: str, sizes: dict) -> int:
    """Of an axis as scan.h writes it: "b", "4", "2 e" or "p + 1"."""
    terms = [term.split() for term in axis.split("+")]
    return sum(math.prod(int(w) if w.isdigit() else sizes[w] for w in term) for term in terms)


def is_dense(t: Tensor, row: int) -> bool:
    """Do t's rows lie evenly, `row` elements apart? Strides of axes of length 1 say nothing."""
    if t.numel() == 0:
        return True
    _, b, p, _ = t.shape
    steps = zip(t.shape, t.stride(), (b * p * row, p * row, row, 1))
    return all(length == 1 or stride == right for length, stride, right in steps)


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
    a class token among the tokens, or None. They are copied from the CPU, which waits until they
    are there: other streams may read them then. Raises RuntimeError within a CUDA graph."""
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


# ---- 2. The operations, and the backend that they make -------------------------------------------


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


class Kernels:
    """The operations of scan.h. Kernels trust their arguments, and allocate nothing that they
    return: the methods here allocate, and call through the boundary. `v` holds what the operations
    of one call of ssm share, under the names of scan.h: see ssm_values and scan_values.

    load() returns the library: a function of (operation, numbers, device)."""

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
                    self.structures = read_structures(_source("scan.h"))
                    self._library = self._load()
                except (OSError, RuntimeError, ImportError, AttributeError) as error:
                    self._problem = str(error) or type(error).__name__
        return self._problem

    def run(self, operation: str, device: torch.device, v: dict, **own):
        if self._library is None and self.problem():
            raise RuntimeError(f"backend {self.name} cannot be used: {self._problem}")
        if "dtype" in v and DTYPES[v["dtype"]] not in self.dtypes:
            raise TypeError(f"backend {self.name} has no {DTYPES[v['dtype']]} activations")
        numbers = to_c(operation, self.structures[operation], device, {**v, **own})
        self._library(operation, numbers, device)

    def add_norm(self, hidden, residual, weight, bias):
        """hidden, residual (b l d) -> normed in hidden's type, residual + hidden."""
        u = torch.empty_like(hidden)
        out = torch.empty_like(residual)
        v = norm_values(residual, weight, hidden.dtype)
        self.run("add_norm", residual.device, v, hidden=hidden, bias=float32(bias), u=u, out=out)
        return u, out

    def add_norm_backward(self, residual, weight, bias, du, dout):
        """residual: the sum that add_norm returned -> the gradients of residual (float32), of
        hidden in du's type or None if they are the same, of weight and bias."""
        grads = empty_like(dresidual=residual, dweight=weight.float(), dbias=float32(bias))
        dhidden = None if du.dtype == torch.float32 else torch.empty_like(du)
        v = norm_values(residual, weight, du.dtype) | grads
        centred = int(bias is not None)
        self.run("add_norm_backward", residual.device, v, centred=centred, du=du, dout=dout,
                 dhidden=dhidden)
        return grads["dresidual"], dhidden, grads["dweight"], grads["dbias"]

    def conv_pool(self, v: dict, pool: str):
        """-> pooled (k b p e) and, for max pooling, the place of each maximum."""
        device = v["xz"].device
        pooled = torch.empty(2, v["b"], v["p"], v["e"], dtype=torch.float32, device=device)
        argmax = torch.empty_like(pooled, dtype=torch.int32) if pool == "max" else None
        self.run("conv_pool", device, v, max=int(pool == "max"), pooled=pooled, argmax=argmax)
        return pooled, argmax

    def conv_pool_backward(self, v: dict, argmax, dpooled, g, dxz):
        """Fills the x half of dxz -> the gradients of conv_weight, conv_bias and D or None."""
        grads = empty_like(dconv_weight=v["conv_weight"], dconv_bias=v["conv_bias"], dD=v["D"])
        self.run("conv_pool_backward", dxz.device, v, max=int(argmax is not None), argmax=argmax,
                 dpooled=dpooled, g=g, dxz=dxz, **grads)
        return tuple(grads.values())

    def selective_scan(self, v: dict):
        """-> s (k b p e), see fastvim.selective_scan."""
        s = torch.empty_like(v["x"])
        self.run("selective_scan", s.device, v, s=s)
        return s

    def selective_scan_backward(self, v: dict, ds):
        """ds (k b p e), or (b p e) if it is the same for all directions -> the gradients of x, dt,
        A, B, C, D and dt_bias."""
        grads = empty_like(**{f"d{name}": v[name] for name in SCAN})
        self.run("selective_scan_backward", ds.device, v, shared=int(ds.ndim == 3), ds=ds, **grads)
        return tuple(grads.values())

    def expand_gate(self, v: dict, s):
        """s (k b p e) and the z of xz -> y (b l e)."""
        y = v["xz"].new_empty(v["b"], v["l"], v["e"])
        self.run("expand_gate", y.device, v, s=s, y=y)
        return y

    def expand_gate_backward(self, v: dict, s, dy, dxz):
        """Fills the z half of dxz -> g (b l e) the gradient of each direction's expanded s, that of
        s (b p e), the same in both directions, and those of the norm."""
        grads = empty_like(g=dy, ds=s[0], dnorm_weight=v["norm_weight"], dnorm_bias=v["norm_bias"])
        self.run("expand_gate_backward", dy.device, v, s=s, dy=dy, dxz=dxz, **grads)
        return tuple(grads.values())


SCAN = ("x", "dt", "A", "B", "C", "D", "dt_bias")           # the inputs of selective_scan


def float32(t):
    return None if t is None else t.float()


def empty_like(**tensors) -> dict:
    """Contiguous memory for what is like each tensor; None for None."""
    form = torch.contiguous_format
    return {
        name: None if t is None else torch.empty_like(t, memory_format=form)
        for name, t in tensors.items()
    }


def norm_values(residual, weight, dtype) -> dict:
    """Raises ValueError or TypeError where C has no such activations or widths."""
    d = weight.numel()
    if dtype not in DTYPES:
        raise TypeError(f"activations must be of {', '.join(map(str, DTYPES))}, not {dtype}")
    if d < 1 or residual.shape[-1:] != weight.shape:
        raise ValueError(f"the norm's weight {tuple(weight.shape)} does not fit activations "
                         f"{tuple(residual.shape)}")
    return {"dtype": DTYPES.index(dtype), "rows": residual.numel() // d, "d": d,
            "residual": residual, "weight": weight.float()}


def ssm_values(xz, w: Weights, walk: Walk, skip: bool) -> dict:
    """What conv_pool, expand_gate and their backward passes share: xz (b l 2e), weights, walk and
    sizes. skip: the scan has D. Raises ValueError where the shapes do not fit together."""
    if xz.dtype not in DTYPES:
        raise TypeError(f"activations must be of {', '.join(map(str, DTYPES))}, not {xz.dtype}")
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
    sizes = {"dtype": DTYPES.index(xz.dtype), "b": b, "l": l, "p": edges - 1, "e": e, "rows": rows}
    values = {**sizes, **walk._asdict(), **w._asdict(), "xz": xz}
    return {**values, "D": None if skip else w.D}


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
    values = {"k": k, "b": b, "p": p, "e": e, "n": n, "stride": stride or n}
    return {**values, **dict(zip(SCAN, (x, dt, A, B, C, D, dt_bias)))}


class CompiledBackend:
    """fastvim.Backend by Kernels. What they do not know is run by `plain`, and said once."""
    why = "compiled kernels"

    def __init__(self, kernels: Kernels, device: str, plain, announce):
        self.kernels = kernels
        kernels.plain = plain
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
        if runs_directly(hidden):
            return self.kernels.add_norm(hidden, residual.contiguous(), norm.weight, bias)
        arguments = (hidden, residual.contiguous(), norm.weight, bias, self.name)
        return torch.ops.fastvim.add_norm(*arguments)

    def ssm(self, xz, w, grid):
        if not self.serves(xz.dtype, lacks_weights(w, self.plain.norms)):
            return self.plain.ssm(xz, w, grid)
        arguments = (xz.contiguous(), *weights_of(w), w.pool, w.skip_before_expand, *pack(grid))
        if runs_directly(xz):
            with no_autocast(xz.device):
                return run_ssm(self.kernels, *arguments)[0]
        return torch.ops.fastvim.ssm(*arguments, self.name)[0]

    # One operation at a time, for tests and measurements: no gradients

    def conv_pool(self, xz, w, grid):
        """-> None, where plain PyTorch returns c, which kernels do not store; pooled (k b p e)."""
        return None, self.kernels.conv_pool(self._values(xz, w, grid), w.pool)[0]

    def selective_scan(self, x, dt, A, B, C, D=None, dt_bias=None):
        tensors = (None if t is None else t.contiguous() for t in (x, dt, A, B, C, D, dt_bias))
        return self.kernels.selective_scan(scan_values(*tensors))

    def expand_gate(self, xz, c, s, w, grid):
        v = self._values(xz, w, grid)
        if s.shape != (2, v["b"], v["p"], v["e"]):
            raise ValueError(f"s {tuple(s.shape)} does not fit {v['p']} steps of {tuple(xz.shape)}")
        return self.kernels.expand_gate(v, s.contiguous())

    def _values(self, xz, w, grid):
        walk = unpack(xz.device, *pack(grid))
        return ssm_values(xz.contiguous(), weights_of(w), walk, w.skip_before_expand)

    def serves(self, dtype: torch.dtype, lacks: str) -> bool:
        """Can the kernels run this call? What they lack is logged, once."""
        if not lacks and dtype not in self.kernels.dtypes:
            lacks = f"{dtype} activations"
        if not lacks:
            lacks = lacks_transform()
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
    return lacks_norm(w.layernorm, w.D.shape[-1], known) or lacks_tensors(w[:7])


def weights_of(w) -> Weights:
    """fastvim.SSMWeights -> what kernels take of them."""
    norm = w.layernorm
    norm_weight = None if norm is None else norm.weight.float()
    norm_bias = float32(getattr(norm, "bias", None))
    tensors = (w.conv_weight, w.conv_bias, w.x_proj, w.dt_proj, w.dt_bias, w.A_log, w.D)
    tensors = (*tensors, norm_weight, norm_bias)
    return Weights(*(None if t is None else t.contiguous() for t in tensors))


def pack(grid) -> tuple:
    """A Grid as arguments of an operation: storage, order, pooled, lengths, slot, scale, five
    tables. A full grid, also one with a class token, has no tables: they are looked up when the
    operation runs, on real tensors."""
    full = getattr(grid, "full", grid)
    slot = getattr(grid, "slot", None)
    if full is not grid and slot is None:
        return ("", "", "", [grid.steps], None, 1.0, *walk_with_holes(grid))
    lengths = [length for _, length in full.sizes]
    return (full.storage, full.order, full.pooled, lengths, slot, full.scale, *[None] * 5)


def unpack(device, storage, order, pooled, lengths, slot, scale, *tables) -> Walk:
    if storage:
        walk = full_walk(storage, order, pooled, tuple(lengths), slot, scale, device)
        if is_captured(device):
            READ_BY_GRAPHS[id(walk)] = walk
        return walk
    if slot is not None or any(table is None for table in tables):
        raise ValueError("a walk needs either the storage of a full grid or all five tables")
    return Walk(*tables)


def runs_directly(t: Tensor) -> bool:
    """Is there nothing to record or transform? Then a plain call saves the dispatcher's time."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return type(t) in PLAIN and torch._C._len_torch_dispatch_stack() == 0


# ---- 3. Operations of torch.library: what autograd, torch.compile and torch.export see -----------
#
# Kernels know their own backward pass, so autograd need not look inside: ssm keeps xz and the
# pooled tensors, and computes the convolutions again on the way back. Operations return tensors
# only: an empty one stands for None.


def project(pooled, w: Weights):
    """fastvim.select with what its backward pass needs: pooled (k b p e) -> dt (k b p e), B, C
    (k b p n), columns of a table, low (k bp r), the table's width."""
    r = w.dt_proj.shape[2]
    n = w.A_log.shape[2]
    table = torch.bmm(pooled.flatten(1, 2), w.x_proj.mT)    # (k bp r+2n)
    low, B, C = table.view(*pooled.shape[:3], r + 2 * n).split([r, n, n], -1)
    low = low.flatten(1, 2)                                 # (k bp r)
    dt = torch.bmm(low, w.dt_proj.mT).view(pooled.shape)    # (k b p e)
    return dt, B, C, low, r + 2 * n


def scan_of(pooled, w: Weights, skip: bool):
    """-> the values of the scan, and low."""
    dt, B, C, low, stride = project(pooled, w)
    D = w.D if skip else None
    return scan_values(pooled, dt, -torch.exp(w.A_log), B, C, D, w.dt_bias, stride), low


def run_ssm(kernels, xz, *rest):
    """fastvim.ssm by kernels -> y (b l e) and, for the way back, pooled, argmax or None, s."""
    w, pool, skip, walk = sort_arguments(xz, *rest)
    v = ssm_values(xz, w, walk, skip)
    pooled, argmax = kernels.conv_pool(v, pool)             # (k b p e)
    s = kernels.selective_scan(scan_of(pooled, w, skip)[0])
    return kernels.expand_gate(v, s), pooled, argmax, s


def run_ssm_backward(kernels, dy, pooled, argmax, s, xz, *rest):
    """dy (b l e) -> the gradients of xz and of the nine Weights, None where there is none."""
    w, pool, skip, walk = sort_arguments(xz, *rest)
    v = ssm_values(xz, w, walk, skip)
    dxz = torch.empty_like(xz)
    g, ds, *dnorm = kernels.expand_gate_backward(v, s, dy, dxz)
    scan, low = scan_of(pooled, w, skip)
    dp, ddt, dA, dB, dC, dD, ddt_bias = kernels.selective_scan_backward(scan, ds)
    ddt = ddt.flatten(1, 2)                                 # (k bp e)
    ddt_proj = ddt.mT @ low                                 # (k e r)
    dtable = torch.cat([ddt @ w.dt_proj, dB.flatten(1, 2), dC.flatten(1, 2)], 2)
    dx_proj = dtable.mT @ pooled.flatten(1, 2)              # (k r+2n e)
    dp = torch.baddbmm(dp.flatten(1, 2), dtable, w.x_proj).view_as(pooled)
    argmax = argmax if pool == "max" else None
    dconv_weight, dconv_bias, dskip = kernels.conv_pool_backward(v, argmax, dp, g, dxz)
    dD = dD if skip else dskip
    dA_log = dA * scan["A"]                                 # of A = -exp(A_log)
    return [dxz, dconv_weight, dconv_bias, dx_proj, ddt_proj, ddt_bias, dA_log, dD, *dnorm]


def sort_arguments(xz, *rest):
    """The arguments of an operation after xz -> Weights, pool, skip, Walk."""
    tensors = rest[:len(Weights._fields)]
    pool, skip, *grid = rest[len(Weights._fields):]
    if pool not in ("mean", "max"):
        raise ValueError(f"pool={pool!r}: kernels know mean and max")
    storage, _, _, lengths, slot, scale, *_ = grid
    if pool == "max" and scale != 1:
        raise ValueError(f"scale={scale}: maxima are not scaled, means are")
    tokens = math.prod(lengths) + (slot is not None)
    if storage and xz.shape[1:2] != (tokens,):  # before tables of any size are made
        raise ValueError(f"activations {tuple(xz.shape)} do not fit a walk of {(1, tokens)} tokens")
    return Weights(*tensors), pool, skip, unpack(xz.device, *grid)


def kernels_of(backend: str) -> Kernels:
    if backend not in KERNELS:
        raise ValueError(f"no kernels are called {backend!r}; choose from {', '.join(KERNELS)}")
    return KERNELS[backend]


def check_devices(*arguments):
    """For the operations on tensors without memory, to which PyTorch also takes a call that mixes
    these with others: its outputs would be what lies in memory."""
    devices = {str(t.device) for t in arguments if isinstance(t, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"tensors must be on one device, not on {' and '.join(sorted(devices))}")


def no_autocast(device):
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def or_empty(like, values):
    return [like.new_empty(0) if t is None else t for t in values]


SSM = (
    "Tensor xz, Tensor conv_weight, Tensor conv_bias, Tensor x_proj, Tensor dt_proj, "
    "Tensor dt_bias, Tensor A_log, Tensor D, Tensor? norm_weight, Tensor? norm_bias, "
    "str pool, bool skip, str storage, str order, str pooled_axes, SymInt[] lengths, SymInt? slot, "
    "float scale, Tensor? token, Tensor? group, Tensor? weight, Tensor? member, Tensor? start, "
    "str backend"
)


@functools.partial(
    torch.library.custom_op, "fastvim::ssm", mutates_args=(),
    schema=f"({SSM}) -> (Tensor y, Tensor pooled, Tensor argmax, Tensor s)",
)
def ssm(xz, *rest):
    *rest, backend = rest
    with no_autocast(xz.device):
        return tuple(or_empty(xz, run_ssm(kernels_of(backend), xz, *rest)))


@functools.partial(
    torch.library.custom_op, "fastvim::ssm_backward", mutates_args=(),
    schema=f"(Tensor dy, Tensor pooled, Tensor argmax, Tensor s, {SSM}) -> Tensor[]",
)
def ssm_backward(dy, pooled, argmax, s, xz, *rest):
    *rest, backend = rest
    saved = (dy.contiguous(), pooled, argmax, s)
    with no_autocast(xz.device):
        return or_empty(xz, run_ssm_backward(kernels_of(backend), *saved, xz, *rest))


@ssm.register_fake
def _(xz, *rest):
    check_devices(xz, *rest)
    pool, _, storage, _, pooled, lengths, slot, _, *tables, _ = rest[len(Weights._fields):]
    b, l, width = xz.shape
    if storage:
        axes = zip(storage.split(), lengths)
        p = math.prod([length for axis, length in axes if axis not in pooled.split()])
        p += slot is not None
    else:
        p = Walk(*tables).start.shape[1] - 1
    p = xz.new_empty(2, b, p, width // 2, dtype=torch.float32)
    argmax = torch.empty_like(p, dtype=torch.int32) if pool == "max" else xz.new_empty(0)
    return xz.new_empty(b, l, width // 2), p, argmax, torch.empty_like(p)


@ssm_backward.register_fake
def _(dy, pooled, argmax, s, xz, *rest):
    check_devices(dy, pooled, argmax, s, xz, *rest)
    like = (xz, *rest[:len(Weights._fields)])
    return or_empty(xz, [None if t is None else torch.empty_like(t) for t in like])


def save_ssm(ctx, inputs, output):
    ctx.is_tensor = [isinstance(v, Tensor) for v in inputs]
    tensors = [v for v in inputs if isinstance(v, Tensor)]
    ctx.others = [v for v in inputs if not isinstance(v, Tensor)]
    ctx.save_for_backward(*output[1:], *tensors)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def differentiate_ssm(ctx, dy, *_):
    pooled, argmax, s, *tensors = ctx.saved_tensors
    tensors = iter(tensors)
    others = iter(ctx.others)
    inputs = [next(tensors if is_tensor else others) for is_tensor in ctx.is_tensor]
    if is_differentiated_again(dy):
        grads = differentiate_plain_ssm(dy, argmax, *inputs)
    else:
        grads = torch.ops.fastvim.ssm_backward(dy, pooled, argmax, s, *inputs)
    grads = [grad if is_tensor else None for grad, is_tensor in zip(grads, ctx.is_tensor)]
    return (*grads, *[None] * (len(inputs) - len(grads)))


ssm.register_autograd(differentiate_ssm, setup_context=save_ssm)


@functools.partial(
    torch.library.custom_op, "fastvim::add_norm", mutates_args=(),
    schema="(Tensor hidden, Tensor residual, Tensor weight, Tensor? bias, str backend) "
           "-> (Tensor u, Tensor out)",
)
def add_norm(hidden, residual, weight, bias, backend):
    return kernels_of(backend).add_norm(hidden, residual, weight, bias)


@functools.partial(
    torch.library.custom_op, "fastvim::add_norm_backward", mutates_args=(),
    schema="(Tensor du, Tensor? dout, Tensor out, Tensor weight, Tensor? bias, str backend) "
           "-> Tensor[]",
)
def add_norm_backward(du, dout, out, weight, bias, backend):
    return or_empty(du, kernels_of(backend).add_norm_backward(out, weight, bias, du, dout))


@add_norm.register_fake
def _(hidden, residual, weight, bias, backend):
    check_devices(hidden, residual, weight, bias)
    return torch.empty_like(hidden), torch.empty_like(residual)


@add_norm_backward.register_fake
def _(du, dout, out, weight, bias, backend):
    check_devices(du, dout, out, weight, bias)
    grads = empty_like(dout=out, du=du, dweight=weight.float(), dbias=float32(bias))
    if du.dtype == torch.float32:
        grads["du"] = None
    return or_empty(du, grads.values())


def save_add_norm(ctx, inputs, output):
    _, _, weight, bias, ctx.backend = inputs
    ctx.save_for_backward(output[1], weight, bias)
    ctx.set_materialize_grads(False)


def differentiate_add_norm(ctx, du, dout):
    out, weight, bias = ctx.saved_tensors
    if du is None:
        return dout, dout, None, None, None
    if is_differentiated_again(du):
        return differentiate_plain_norm(du, dout, out, weight, bias)
    if dout is not None:
        dout = dout.contiguous()
    arguments = (du.contiguous(), dout, out, weight, bias, ctx.backend)
    dresidual, dhidden, dweight, dbias = torch.ops.fastvim.add_norm_backward(*arguments)
    if du.dtype == torch.float32:
        dhidden = dresidual
    dbias = None if bias is None else dbias.to(bias.dtype)
    return dhidden, dresidual, dweight.to(weight.dtype), dbias, None


add_norm.register_autograd(differentiate_add_norm, setup_context=save_add_norm)

# Gradients of gradients, and batches of gradients (is_grads_batched, jacobian(vectorize=True)): the
# way back is then taken by plain PyTorch, which knows its own derivatives.


def is_differentiated_again(dy) -> bool:
    if torch.compiler.is_compiling():
        return False
    batched = torch._C._functorch.is_legacy_batchedtensor(dy)
    return batched or torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def differentiate_plain_ssm(dy, argmax, xz, *rest):
    """run_ssm_backward in plain PyTorch."""
    *rest, backend = rest
    w, pool, skip, walk = sort_arguments(xz, *rest)
    norm = None if w.norm_weight is None else Norm(w.norm_weight, w.norm_bias)
    values = types.SimpleNamespace(**w._asdict(), pool=pool, skip_before_expand=skip,
                                   layernorm=norm)
    grid = WalkedGrid(walk, argmax if pool == "max" else None)
    with torch.enable_grad():
        y = KERNELS[backend].plain.ssm(xz, values, grid)
    return gradients(y, (xz, *w), dy)


def differentiate_plain_norm(du, dout, out, weight, bias):
    """The way back through add_norm in plain PyTorch; out is the sum that it returned."""
    with torch.enable_grad():
        u = Norm(weight.float(), float32(bias))(out).to(du.dtype)
    dresidual, dweight, dbias = gradients(u, (out, weight, bias), du)
    if dout is not None:
        dresidual = dresidual + dout
    return dresidual.to(du.dtype), dresidual, dweight, dbias, None


def gradients(y, inputs, dy) -> list:
    """Those of the inputs that require them, None for others."""
    wanted = [i for i, t in enumerate(inputs) if t is not None and t.requires_grad]
    again = torch.is_grad_enabled()
    found = torch.autograd.grad(y, [inputs[i] for i in wanted], dy, create_graph=again)
    grads = [None] * len(inputs)
    for i, grad in zip(wanted, found):
        grads[i] = grad
    return grads


class Norm(NamedTuple):
    """A norm over the last axis, from its weights."""
    weight: Tensor
    bias: Tensor | None                     # None for RMSNorm

    def __call__(self, y: Tensor) -> Tensor:
        if self.bias is None:
            return F.rms_norm(y, y.shape[-1:], self.weight, EPS)
        return F.layer_norm(y, y.shape[-1:], self.weight, self.bias, EPS)


class WalkedGrid:
    """A Walk with the methods of fastvim.Grid. argmax (k b p e): where the maxima were, or None."""

    def __init__(self, walk: Walk, argmax: Tensor | None):
        self.argmax = argmax
        self.steps = walk.start.shape[1] - 1
        self.token = walk.token.long()[..., None]           # (rows l 1)
        self.hole = walk.group[..., None] < 0
        self.group = walk.group.long().clamp(min=0)[..., None]
        self.weight = walk.weight[..., None].masked_fill(self.hole, 0)

    def flatten(self, x):
        return x.gather(1, self.token.expand(x.shape)).masked_fill(self.hole, 0)

    def unflatten(self, y):
        return y.masked_fill(self.hole, 0).gather(1, self.token.argsort(1).expand(y.shape))

    def pool(self, c, kind, score):
        if self.argmax is not None:
            place = self.argmax.long()
            return c.gather(2, place.clamp(min=0)).masked_fill(place < 0, 0)
        zero = c.new_zeros(*c.shape[:2], self.steps, c.shape[3])
        return zero.scatter_add(2, self.group.expand(c.shape), c * self.weight)

    def expand(self, s):
        group = self.group.expand(*s.shape[:2], -1, s.shape[3])
        return s.gather(2, group)


# ---- 4. The backends ----------------------------------------------------------------------------

KERNELS = {
    "cpu": Kernels("cpu", DTYPES[:2], fastvim_build.load_cpu),
    "cuda": Kernels("cuda", DTYPES, fastvim_build.load_cuda),
}


def backends(plain, announce) -> list[CompiledBackend]:
    """plain: the fastvim.Backend for what kernels do not know; announce: logs a message once."""
    return [CompiledBackend(kernels, name, plain, announce) for name, kernels in KERNELS.items()]
