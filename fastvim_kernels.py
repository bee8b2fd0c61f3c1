"""The compiled backends of fastvim.py: building the kernels, calling them, the block as one differentiable operation.

fastvim.py imports this file and registers what it finds here; nothing is compiled before a model runs. Three parts:

    1 Kernels: the operations of fastvim.py, section 3, and their backward functions, by a library of C functions
    2 the block as one operation of torch.library: its gradient, its shapes for torch.compile
    3 building scan_cpu.cpp and scan_cuda.cu, once, whoever asks at the same time
"""
import contextlib
import ctypes
import hashlib
import importlib.util
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

import fastvim
from fastvim import Backend, SSMWeights, Walk, project, ssm

log = logging.getLogger("fastvim")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)     # the kernels know them by their place in this list

# ----------------------------------------------------------------------------------------------------------------------
# 1. The operations by compiled kernels


class Kernels:
    """The operations by the C functions of a compiled library, forward and backward. scan_cpu.cpp and scan_cuda.cu
    have the same functions (the comment at the top of scan_cpu.cpp describes them). Here arguments are checked and
    results allocated; the kernels do neither.

    load() returns the library: an object whose functions take tensors (None for an absent one) and whole numbers."""

    def __init__(self, name, dtypes, load):
        self.name, self.dtypes, self._load = name, dtypes, load
        self._library, self._error, self._lock = None, None, threading.Lock()

    def error(self):
        """None if the library is there, which builds it on the first call; else one line on what is wrong."""
        with self._lock:
            if self._library is None and self._error is None:
                try:
                    self._library = self._load()
                except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
                    self._error = str(error) or type(error).__name__
        return self._error

    @property
    def library(self):
        if self.error():
            raise RuntimeError(f"backend {self.name} cannot be used: {self._error}")
        return self._library

    def block(self, mixer, hidden, residual, block_norm, plan):
        """A Block (or, without block_norm, a Mixer) as one operation -> hidden, residual (B L D)."""
        w, dtype = mixer.weights(), fastvim.activation_dtype(hidden.device, mixer.in_proj.weight)
        walk = plan if isinstance(plan, Walk) else plan.walk(hidden.device)
        norm = [None, None]
        if block_norm is not None:
            norm = [t if t is None else t.float() for t in (block_norm.weight, getattr(block_norm, "bias", None))]
            if residual is None:                                            # the first block
                hidden, residual = torch.zeros_like(hidden), hidden.float()
        return torch.ops.fastvim.block(
            hidden.to(dtype), residual, *norm, mixer.in_proj.weight.to(dtype), mixer.out_proj.weight.to(dtype), *w[:9],
            *walk, w.pool, w.skip_before_expand, self.name, torch.is_grad_enabled())[:2]

    def _check(self, name, tensor, dtype, shape, device):
        """Raises TypeError or ValueError unless tensor is as the kernels expect it."""
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.device != device:
            got = f"{tensor.dtype} on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"backend {self.name}: {name} must be {dtype} on {device}, not {got}")
        if tensor.shape != shape:
            raise ValueError(f"backend {self.name}: {name} must have the shape {tuple(shape)}, not "
                             f"{tuple(tensor.shape)}")

    def _checked(self, xz, w, walk):
        """Checks all that the operations get to see besides their own results -> xz and w, contiguous."""
        if not isinstance(xz, Tensor) or xz.dtype not in self.dtypes:
            raise TypeError(f"backend {self.name}: activations must be a tensor of {', '.join(map(str, self.dtypes))}, "
                            f"not {getattr(xz, 'dtype', type(xz).__name__)}")
        if xz.ndim != 3 or w.A_log.ndim != 3 or w.dt_proj.ndim != 3 or not 1 <= w.A_log.shape[2] <= 64:
            raise ValueError(f"backend {self.name}: expected activations (B, L, 2E), A_log (2, E, N <= 64) and dt_proj "
                             f"(2, E, R), not {tuple(xz.shape)}, {tuple(w.A_log.shape)} and {tuple(w.dt_proj.shape)}")
        (B, S, width), device, f32 = xz.shape, xz.device, torch.float32
        E, N, R, b, P = width // 2, w.A_log.shape[2], w.dt_proj.shape[2], walk.token.shape[0], walk.start.shape[-1] - 1
        shapes = dict(conv_w=(2, E, 4), conv_b=(2, E), x_proj=(2, R + 2 * N, E), dt_proj=(2, E, R), dt_bias=(2, E),
                      A_log=(2, E, N), D=(2, E), norm_w=(E,), norm_b=(E,))
        tensors = {name: getattr(w, name) for name in shapes}
        for name, t in tensors.items():
            if t is not None or name not in ("norm_w", "norm_b"):
                self._check(name, t, f32, shapes[name], device)
        if S < 1 or b not in (1, B):
            raise ValueError(f"backend {self.name}: activations {tuple(xz.shape)} do not fit a plan of batch {b}")
        for name, dtype in dict(token=torch.int32, group=torch.int32, weight=f32, member=torch.int32).items():
            self._check(f"the plan's {name}", getattr(walk, name), dtype, (b, S), device)
        self._check("the plan's start", walk.start, torch.int32, (b, P + 1), device)
        return xz.contiguous(), w._replace(**{name: t if t is None else t.contiguous() for name, t in tensors.items()})

    def _sizes(self, xz, walk):
        dtype = DTYPES.index(xz.dtype)
        return dtype, *xz.shape[:2], walk.start.shape[1] - 1, xz.shape[2] // 2, len(walk.token)

    def _arguments(self, xz, w, plan):
        """Checks unless plan is a Walk: then this is the block operation, which has checked."""
        if isinstance(plan, Walk):
            return xz, w, plan
        walk = plan.walk(xz.device)
        return *self._checked(xz, w, walk), walk

    def add_norm(self, hidden, residual, weight, bias, dtype=None):
        """As fastvim.add_norm; hidden None norms the residual alone and returns it as it is."""
        like = residual if hidden is None else hidden
        D, dtype = like.shape[-1], dtype or weight.dtype
        for name, t in dict(hidden=hidden, residual=residual).items():
            if t is not None:
                self._check(name, t, torch.float32 if name == "residual" else dtype, like.shape, weight.device)
        for name, t in dict(weight=weight, bias=bias).items():
            if t is not None:
                self._check(name, t, t.dtype, (D,), weight.device)
        weight, bias = (t if t is None else t.float().contiguous() for t in (weight, bias))
        hidden, residual = (t if t is None else t.contiguous() for t in (hidden, residual))
        u, out = torch.empty(like.shape, dtype=dtype, device=like.device), None
        if hidden is not None:
            out = torch.empty(like.shape, device=like.device)
        code = DTYPES.index(dtype)
        self.library.add_norm(code, like.numel() // D, D, hidden, residual, weight, bias, u, out)
        return u, residual if out is None else out

    def add_norm_backward(self, residual, weight, bias, du, dout):
        """-> the gradients of residual + hidden (float32; and in du's type, if that is another), weight and bias."""
        D, code = residual.shape[-1], DTYPES.index(du.dtype)
        dr, dhidden = torch.empty_like(residual), None if code == 0 else torch.empty_like(du)
        weight = weight.contiguous()
        dweight, dbias = torch.empty_like(weight), None if bias is None else torch.empty_like(weight)
        self.library.add_norm_backward(code, residual.numel() // D, D, residual, weight, int(bias is not None), du,
                                       dout if dout is None else dout.contiguous(), dr, dhidden, dweight, dbias)
        return dr, dhidden, dweight, dbias

    def conv_pool(self, xz, w, plan):
        xz, w, walk = self._arguments(xz, w, plan)
        sizes = _, B, _, P, E, _ = self._sizes(xz, walk)
        p = xz.new_empty(2, B, P, E, dtype=torch.float32)
        argmax = torch.empty_like(p, dtype=torch.int32) if w.pool == "max" else None
        self.library.conv_pool(*sizes, int(w.pool == "max"), xz, w.conv_w, w.conv_b, *walk, p, argmax)
        return p, argmax

    def conv_pool_backward(self, xz, argmax, w, walk, dp, g, dxz):
        """Fills the x half of dxz -> the gradients of conv_w, conv_b and, unless the scan has it, D."""
        dconv_w, dconv_b = torch.empty_like(w.conv_w), torch.empty_like(w.conv_b)
        D, dD = (None, None) if w.skip_before_expand else (w.D, torch.empty_like(w.D))
        self.library.conv_pool_backward(*self._sizes(xz, walk), int(w.pool == "max"), xz, w.conv_w, w.conv_b, D, *walk,
                                        argmax, dp, g, dxz, dconv_w, dconv_b, dD)
        return dconv_w, dconv_b, dD

    def _scan_arguments(self, x, dt, A, B, C, D, dt_bias):
        if not isinstance(x, Tensor) or x.ndim != 4 or not isinstance(A, Tensor) or A.ndim != 3 or x.shape[2] < 1:
            raise ValueError(f"backend {self.name}: expected x (K, B, P, E) and A (K, E, N), not "
                             f"{tuple(getattr(x, 'shape', '?'))} and {tuple(getattr(A, 'shape', '?'))}")
        (K, batch, P, E), N, f32 = x.shape, A.shape[2], torch.float32
        if K not in (1, 2) or not 1 <= N <= 64:
            raise ValueError(f"backend {self.name}: {K} directions and {N} states; it knows 1 or 2 and at most 64")
        for name, t, shape in (("x", x, x.shape), ("dt", dt, x.shape), ("A", A, (K, E, N)), ("B", B, (K, batch, P, N)),
                               ("C", C, (K, batch, P, N)), ("D", D, (K, E)), ("dt_bias", dt_bias, (K, E))):
            if t is not None or name in ("dt", "B", "C"):
                self._check(name, t, f32, shape, x.device)
        x, dt, A, D, dt_bias = (t if t is None else t.contiguous() for t in (x, dt, A, D, dt_bias))
        ld = B.stride(2) if B.shape[2] > 1 else N
        if ld < N or any(t.stride() != (batch * P * ld, P * ld, ld, 1) for t in (B, C)):    # not columns of one matrix
            B, C, ld = B.contiguous(), C.contiguous(), N
        return (K, batch, P, E, N), (x, dt, A, B, C, ld, D, dt_bias)

    def selective_scan(self, x, dt, A, B, C, D=None, dt_bias=None):
        sizes, arguments = self._scan_arguments(x, dt, A, B, C, D, dt_bias)
        s = torch.empty(x.shape, device=x.device)
        self.library.selective_scan(*sizes, *arguments, s)
        return s

    def selective_scan_backward(self, x, dt, A, B, C, D, dt_bias, ds):
        """ds (K B P E), or (B P E) if it is the same for all directions -> the gradients of the seven others."""
        sizes, arguments = self._scan_arguments(x, dt, A, B, C, D, dt_bias)
        self._check("ds", ds, torch.float32, x.shape[-ds.ndim:], x.device)
        grads = [None if t is None else torch.empty(t.shape, device=t.device) for t in (x, dt, A, B, C, D, dt_bias)]
        self.library.selective_scan_backward(*sizes, *arguments, ds.contiguous(), int(ds.ndim == 3), *grads)
        return grads

    def expand_gate(self, xz, kept, s, w, plan):
        xz, w, walk = self._arguments(xz, w, plan)
        sizes = _, B, S, P, E, _ = self._sizes(xz, walk)
        self._check("s", s, torch.float32, (2, B, P, E), xz.device)
        y = xz.new_empty(B, S, E)
        self.library.expand_gate(*sizes, xz, s.contiguous(), w.conv_w, w.conv_b, None if w.skip_before_expand else w.D,
                                 w.norm_w, w.norm_b, walk.token, walk.group, y)
        return y

    def expand_gate_backward(self, xz, s, w, walk, dy, dxz):
        """Fills the z half of dxz -> y once more, g (B L E) the gradient of each direction's expanded s, that of s
        (B P E), the same in both directions, and those of norm_w and norm_b."""
        sizes = _, B, S, P, E, _ = self._sizes(xz, walk)
        y, g, ds = torch.empty_like(dy), torch.empty_like(dy), xz.new_empty(B, P, E, dtype=torch.float32)
        dnorm_w, dnorm_b = (None if t is None else torch.empty_like(t) for t in (w.norm_w, w.norm_b))
        self.library.expand_gate_backward(*sizes, xz, s, w.conv_w, w.conv_b, None if w.skip_before_expand else w.D,
                                          w.norm_w, w.norm_b, walk.token, walk.group, walk.member, walk.start, dy,
                                          y, dxz, g, ds, dnorm_w, dnorm_b)
        return y, g, ds, dnorm_w, dnorm_b


# ----------------------------------------------------------------------------------------------------------------------
# 2. The block as one operation
#
# With kernels that know their own backward pass, autograd need not see inside: one operation a block keeps xz, the
# residual and the pooled tensors, and computes u, c and the gated y again in the backward pass. That is 6 D floats a
# token where autograd's own graph would keep several times that. torch.compile and torch.export see one node.


def _no_autocast(device):
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext()


@torch.library.custom_op("fastvim::block", mutates_args=())
def _block(hidden: Tensor, residual: Optional[Tensor], block_w: Optional[Tensor], block_b: Optional[Tensor],
           in_proj: Tensor, out_proj: Tensor, conv_w: Tensor, conv_b: Tensor, x_proj: Tensor, dt_proj: Tensor,
           dt_bias: Tensor, A_log: Tensor, D: Tensor, norm_w: Optional[Tensor], norm_b: Optional[Tensor],
           token: Tensor, group: Tensor, weight: Tensor, member: Tensor, start: Tensor,
           pool: str, skip: bool, backend: str, save: bool
           ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """add_norm, in_proj, ssm, out_proj -> hidden and residual (B L D), and, to save, xz, p, argmax, s. Without block_w
    the norm is left out: hidden comes normed. Tensors that are not there come back empty."""
    ops, walk = fastvim.BACKENDS[backend].kernels, Walk(token, group, weight, member, start)
    w = SSMWeights(conv_w, conv_b, x_proj, dt_proj, dt_bias, A_log, D, norm_w, norm_b, None, None, pool, skip)
    none = hidden.new_empty(0)
    with _no_autocast(hidden.device):
        u, out = hidden, none
        if block_w is not None:
            u, out = ops.add_norm(hidden, residual, block_w, block_b, in_proj.dtype)
        xz = F.linear(u, in_proj)                                           # (B L 2E)
        xz, w = ops._checked(xz, w, walk)
        y, p, argmax, s = ssm(xz, w, walk, ops)                             # (B L E)
        hidden = F.linear(y, out_proj)                                      # (B L D)
    return (hidden, out, xz, p, none.int() if argmax is None else argmax, s) if save else (
        hidden, out, none.clone(), none.clone(), none.int(), none.clone())


@_block.register_fake
def _(hidden, residual, block_w, block_b, in_proj, out_proj, conv_w, conv_b, x_proj, dt_proj, dt_bias, A_log, D, norm_w,
      norm_b, token, group, weight, member, start, pool, skip, backend, save):
    B, S, width = hidden.shape
    f32, i32, none = dict(dtype=torch.float32), dict(dtype=torch.int32), hidden.new_empty
    out = none(0) if block_w is None else none(B, S, width, **f32)
    pooled = 2, B, start.shape[1] - 1, out_proj.shape[1]
    saved = (none(B, S, in_proj.shape[0], dtype=in_proj.dtype), none(*pooled, **f32),
             none(*(pooled if pool == "max" else (0,)), **i32), none(*pooled, **f32)) if save else (
        none(0), none(0), none(0, **i32), none(0))
    return none(B, S, out_proj.shape[0], dtype=in_proj.dtype), out, *saved


@torch.library.custom_op("fastvim::block_backward", mutates_args=())
def _block_backward(d_hidden: Tensor, d_out: Optional[Tensor], u: Tensor, xz: Tensor, p: Tensor, argmax: Tensor,
                    s: Tensor, block_w: Optional[Tensor], block_b: Optional[Tensor], in_proj: Tensor, out_proj: Tensor,
                    conv_w: Tensor, conv_b: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor,
                    D: Tensor, norm_w: Optional[Tensor], norm_b: Optional[Tensor],
                    token: Tensor, group: Tensor, weight: Tensor, member: Tensor, start: Tensor,
                    pool: str, skip: bool, backend: str) -> list[Tensor]:
    """The gradients of the arguments of block, hidden (in the activations' type) to norm_b; empty where there is none.
    u: what block returned as residual, or, without block_w, its hidden."""
    ops, walk = fastvim.BACKENDS[backend].kernels, Walk(token, group, weight, member, start)
    w = SSMWeights(conv_w, conv_b, x_proj, dt_proj, dt_bias, A_log, D, norm_w, norm_b, None, None, pool, skip)
    _, w = ops._checked(xz, w, walk)
    with _no_autocast(u.device):
        residual = u
        if block_w is not None:
            u = ops.add_norm(None, residual, block_w, block_b, in_proj.dtype)[0]             # (B L D)
        d_hidden, dxz = d_hidden.contiguous(), torch.empty_like(xz)
        y, g, ds, d_norm_w, d_norm_b = ops.expand_gate_backward(xz, s, w, walk, d_hidden @ out_proj, dxz)
        d_out_proj = d_hidden.flatten(0, 1).mT @ y.flatten(0, 1)                             # (D E)
        dt, Bm, Cm, low = project(p, w)
        A = -torch.exp(A_log)
        dp, d_dt, dA, dB, dC, d_D, d_dt_bias = ops.selective_scan_backward(p, dt, A, Bm, Cm, D if skip else None,
                                                                           dt_bias, ds)
        d_dt = d_dt.flatten(1, 2)                                                            # (K BP E)
        d_dt_proj = d_dt.mT @ low.flatten(1, 2)                                              # (K E R)
        d_proj = torch.cat([d_dt @ dt_proj, dB.flatten(1, 2), dC.flatten(1, 2)], 2)          # (K BP R+2N)
        d_x_proj = d_proj.mT @ p.flatten(1, 2)                                               # (K R+2N E)
        dp = torch.baddbmm(dp.flatten(1, 2), d_proj, x_proj).view_as(p)                      # (K B P E)
        d_conv_w, d_conv_b, d_skip = ops.conv_pool_backward(xz, argmax if pool == "max" else None, w, walk, dp, g, dxz)
        du = dxz @ in_proj                                                                   # (B L D)
        d_in_proj = dxz.flatten(0, 1).mT @ u.flatten(0, 1)                                   # (2E D)
        d_residual = d_block_w = d_block_b = None
        if block_w is not None:
            d_residual, du, d_block_w, d_block_b = ops.add_norm_backward(residual, block_w, block_b, du, d_out)
    grads = (du, d_residual, d_block_w, d_block_b, d_in_proj, d_out_proj, d_conv_w, d_conv_b, d_x_proj, d_dt_proj,
             d_dt_bias, dA * A, d_D if skip else d_skip, d_norm_w, d_norm_b)
    return [xz.new_empty(0) if t is None else t for t in grads]


@_block_backward.register_fake
def _(d_hidden, d_out, u, xz, p, argmax, s, block_w, block_b, in_proj, out_proj, conv_w, conv_b, x_proj, dt_proj,
      dt_bias, A_log, D, norm_w, norm_b, *_):
    like = torch.empty_like
    f32 = block_w is not None and in_proj.dtype == torch.float32            # then hidden and residual share a gradient
    du = None if f32 else u.new_empty(u.shape, dtype=in_proj.dtype)
    residual = None if block_w is None else like(u)
    return [xz.new_empty(0) if t is None else like(t, memory_format=torch.contiguous_format) for t in (
        du, residual, block_w, block_b, in_proj, out_proj, conv_w, conv_b, x_proj, dt_proj, dt_bias, A_log, D, norm_w,
        norm_b)]


def _save_block(ctx, inputs, output):
    _, out, *saved = output
    ctx.save_for_backward(inputs[0] if inputs[2] is None else out, *saved, *inputs[2:20])
    ctx.flags = inputs[20:23]
    ctx.mark_non_differentiable(*saved, *([out] if inputs[2] is None else []))
    ctx.set_materialize_grads(False)


def _differentiate_block(ctx, d_hidden, d_out, *_):
    u, xz, p, argmax, s, block_w, block_b, in_proj, out_proj, *rest = ctx.saved_tensors
    if d_hidden is None:
        d_hidden = xz.new_zeros(*xz.shape[:2], out_proj.shape[0])
    inputs = block_w, block_b, in_proj, out_proj, *rest
    du, d_residual, *grads = torch.ops.fastvim.block_backward(
        d_hidden, None if block_w is None else d_out, u, xz, p, argmax, s, *inputs, *ctx.flags)
    if block_w is not None and in_proj.dtype == torch.float32:
        du = d_residual
    grads = [d_residual, *grads]
    return du, *(g if t is not None else None for g, t in zip(grads, (block_w, *inputs))), *[None] * 9


_block.register_autograd(_differentiate_block, setup_context=_save_block)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Building the libraries



def _cache():
    """Where compiled libraries are kept: FASTVIM_CACHE, else fastvim in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.environ.get("FASTVIM_CACHE") or os.path.join(home, "fastvim")
    os.makedirs(folder, exist_ok=True)
    return folder


@contextlib.contextmanager
def _build_lock(path):
    """One builder at a time. The lock belongs to the open file: a process that is killed gives it back."""
    try:
        import fcntl
    except ImportError:
        raise RuntimeError("building needs a POSIX system (Linux, macOS)") from None
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _source(name):
    for folder in (os.path.dirname(os.path.abspath(__file__)), os.path.join(sys.prefix, "share", "fastvim")):
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    raise RuntimeError(f"{name} is missing: it belongs beside fastvim.py")


def _digest(*parts):
    """Names a build by all that it depends on."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
    return digest.hexdigest()[:16]


def _output(*command):
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines() or ["?"]
        raise RuntimeError(f"{os.path.basename(command[0])} failed: {lines[0]}")
    return result.stdout


class CLibrary:
    """A shared library of C functions of pointers and int64: tensors go by their data, None as the null pointer."""

    def __init__(self, path):
        self._library = ctypes.CDLL(path)

    def __getattr__(self, name):
        function = getattr(self._library, name)
        function.restype = None

        def call(*args):
            values = [0 if a is None else a.data_ptr() if isinstance(a, Tensor) else a for a in args]
            if function.argtypes is None:       # a pointer travels like an int64 in all 64-bit calling conventions
                function.argtypes = [ctypes.c_int64] * len(values)
            function(*values)
        setattr(self, name, call)
        return call


def _load_cpu():
    source = _source("scan_cpu.cpp")
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler found: install g++ (Debian, Ubuntu: apt install g++) or set CXX")
    maps, cpuinfo = "/proc/self/maps", "/proc/cpuinfo"
    openmp, features = ["-fopenmp"], platform.machine()
    if os.path.exists(maps):                    # Linux: use torch's own OpenMP, two would fight for the cores
        with open(maps) as file:
            openmp += [p for p in sorted({line.split(None, 5)[-1].strip() for line in file if "omp" in line})
                       if re.search(r"lib(g|i)?omp[^/]*\.so", p)][:1]
        with open(cpuinfo) as file:
            features = next((line for line in file if line.startswith(("flags", "Features"))), features)
    flags = ["-std=c++17", "-O3", "-march=native", *openmp, "-shared", "-fPIC"]
    with open(source, "rb") as file:
        name = f"scan_cpu_{_digest(file.read(), compiler, _output(compiler, '--version'), flags, features)}"
    path = os.path.join(_cache(), f"{name}.so")
    if not os.path.exists(path):
        with _build_lock(os.path.join(_cache(), f"{name}.lock")):
            if not os.path.exists(path):        # nobody else has built it meanwhile
                log.info("compiling %s", source)
                _output(compiler, source, *flags, "-o", f"{path}.tmp")
                os.replace(f"{path}.tmp", path)                             # all or nothing, even if this is killed
    return CLibrary(path)


def _load_cuda():
    from torch.utils import cpp_extension
    sources = [_source("scan_cuda.cpp"), _source("scan_cuda.cu")]
    nvcc = cpp_extension.CUDA_HOME and os.path.join(cpp_extension.CUDA_HOME, "bin", "nvcc")
    if torch.version.cuda is None:
        raise RuntimeError("this torch is built without CUDA")
    if not nvcc or not os.path.exists(nvcc):
        raise RuntimeError(f"no nvcc found: install the CUDA toolkit {torch.version.cuda} or set CUDA_HOME")
    version = re.search(r"release ((\d+)\.\d+)", _output(nvcc, "--version"))
    if version[2] != torch.version.cuda.split(".")[0]:
        raise RuntimeError(f"nvcc is of CUDA {version[1]}, torch of CUDA {torch.version.cuda}: install a toolkit of "
                           "the same major version and set CUDA_HOME to it")
    flags = ["-O3", "-std=c++17"]
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(sorted(
        {"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())})) or "8.0;9.0"
    name = f"scan_cuda_{_digest(*(open(s, 'rb').read() for s in sources), torch.__version__, version[1], flags, archs)}"
    folder = os.path.join(_cache(), name)
    path = os.path.join(folder, f"{name}.so")
    os.makedirs(folder, exist_ok=True)
    if not os.path.exists(os.path.join(folder, "done")):
        with _build_lock(os.path.join(_cache(), f"{name}.lock")):
            if not os.path.exists(os.path.join(folder, "done")):
                log.warning("compiling the CUDA kernels for %s: once, about a minute", archs)
                with contextlib.suppress(FileNotFoundError):                # left by a build that was killed: load()
                    os.remove(os.path.join(folder, "lock"))                 # would wait for it for ever
                before = {k: os.environ.get(k) for k in ("PATH", "TORCH_CUDA_ARCH_LIST")}
                os.environ.update(TORCH_CUDA_ARCH_LIST=archs, PATH=os.pathsep.join(         # ninja is beside python
                    [os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]))
                try:
                    library = cpp_extension.load(name, sources, extra_cuda_cflags=flags, build_directory=folder)
                finally:
                    for key, value in before.items():
                        os.environ.pop(key) if value is None else os.environ.update({key: value})
                open(os.path.join(folder, "done"), "w").close()
                return library
    spec = importlib.util.spec_from_file_location(name, path)
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    return library


def register(name, device, dtypes, load):
    """Registers the Backend that runs the kernels of the library which load() returns."""
    k = Kernels(name, dtypes, load)
    fastvim.register_backend(Backend(name, (device,), "compiled kernels", k.add_norm, k.conv_pool, k.selective_scan,
                                     k.expand_gate, k))


register("cpu", "cpu", DTYPES[:2], _load_cpu)
register("cuda", "cuda", DTYPES, _load_cuda)
