"""The compiled backends of fastvim.py: building the kernels, calling them, the block as one differentiable operation.

fastvim.py imports this file and registers what it finds here; nothing is compiled before a model runs. Three parts:

    1 Kernels: the operations of fastvim.py, section 3, and their backward functions, by a library of C functions
    2 the block as one operation of torch.library: its gradient, its shapes for torch.compile
    3 building scan_cpu.cpp and scan_cuda.cu, once, whoever asks at the same time
"""
import contextlib
import ctypes
import functools
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
    have the same functions (the comment at the top of scan_cpu.cpp describes them); they trust their arguments and
    allocate nothing. The methods here allocate and call; those called checked_... also check, for use by hand.

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
                except (OSError, RuntimeError, ImportError, AttributeError) as error:
                    self._error = str(error) or type(error).__name__
        return self._error

    @property
    def library(self):
        if self._library is None and self.error():
            raise RuntimeError(f"backend {self.name} cannot be used: {self._error}")
        return self._library

    def block(self, mixer, hidden, residual, block_norm, plan, scratch=None):
        """A Block (or, without block_norm, a Mixer) as one operation -> hidden, residual (B L D).
        scratch: a dictionary that the blocks of one call of a model share at inference, see _empty."""
        w, dtype = mixer.weights(), fastvim.activation_dtype(hidden.device, mixer.in_proj.weight)
        walk = plan if isinstance(plan, Walk) else plan.walk(hidden.device)
        norm_w = norm_b = None
        if block_norm is not None:
            norm_w, norm_b = block_norm.weight, getattr(block_norm, "bias", None)
            norm_w, norm_b = (t if t is None else t.float().contiguous() for t in (norm_w, norm_b))
            if residual is None:                                            # the first block
                hidden, residual = torch.zeros_like(hidden), hidden.float()
        save = torch.is_grad_enabled()
        # Without gradients there is nothing to dispatch: the plain function saves a tenth of a millisecond a block.
        plain = not save and type(hidden) is Tensor and not torch.compiler.is_compiling()
        run = functools.partial(_run_block, scratch) if plain else torch.ops.fastvim.block
        return run(
            hidden.to(dtype), residual, norm_w, norm_b, mixer.in_proj.weight.to(dtype), mixer.out_proj.weight.to(dtype),
            *w[:9], *walk, w.pool, w.skip_before_expand, self.name, save)[:2]

    # -- the operations: arguments as the functions of fastvim.py take them, contiguous and right; plan is a Walk

    def add_norm(self, hidden, residual, weight, bias, dtype, scratch=None):
        """-> normed (B L D) in dtype, residual + hidden. hidden None norms the residual alone."""
        u, out, D = _empty(residual.shape, dtype, residual.device, scratch, "u"), None, residual.shape[-1]
        if hidden is not None:
            out = torch.empty_like(residual)
        self.library.add_norm(DTYPES.index(dtype), residual.numel() // D, D, hidden, residual, weight, bias, u, out)
        return u, residual if out is None else out

    def add_norm_backward(self, residual, weight, bias, du, dout):
        """-> the gradients of residual + hidden (float32; and in du's type, if that is another), weight and bias."""
        D, code = residual.shape[-1], DTYPES.index(du.dtype)
        dr, dhidden = torch.empty_like(residual), None if code == 0 else torch.empty_like(du)
        dweight, dbias = torch.empty_like(weight), None if bias is None else torch.empty_like(weight)
        self.library.add_norm_backward(code, residual.numel() // D, D, residual, weight, int(bias is not None), du,
                                       dout, dr, dhidden, dweight, dbias)
        return dr, dhidden, dweight, dbias

    def conv_pool(self, xz, w, walk):
        _, B, _, P, E, _ = sizes = _sizes(xz, walk)
        p = torch.empty((2, B, P, E), device=xz.device)
        argmax = torch.empty_like(p, dtype=torch.int32) if w.pool == "max" else None
        self.library.conv_pool(*sizes, int(w.pool == "max"), xz, w.conv_w, w.conv_b, *walk, p, argmax)
        return p, argmax

    def conv_pool_backward(self, xz, argmax, w, walk, dp, g, dxz):
        """Fills the x half of dxz -> the gradients of conv_w, conv_b and, unless the scan has it, D."""
        dconv_w, dconv_b = torch.empty_like(w.conv_w), torch.empty_like(w.conv_b)
        D, dD = (None, None) if w.skip_before_expand else (w.D, torch.empty_like(w.D))
        self.library.conv_pool_backward(*_sizes(xz, walk), int(w.pool == "max"), xz, w.conv_w, w.conv_b, D, *walk,
                                        argmax, dp, g, dxz, dconv_w, dconv_b, dD)
        return dconv_w, dconv_b, dD

    def selective_scan(self, x, dt, A, B, C, D, dt_bias):
        s = torch.empty_like(x)
        self.library.selective_scan(*x.shape, A.shape[2], x, dt, A, B, C, B.stride(2), D, dt_bias, s)
        return s

    def selective_scan_backward(self, x, dt, A, B, C, D, dt_bias, ds):
        """ds (K B P E), or (B P E) if it is the same for all directions -> the gradients of the seven others."""
        dB, dC = (torch.empty(t.shape, device=t.device) for t in (B, C))
        dx, ddt, dA, dD, ddt_bias = (None if t is None else torch.empty_like(t) for t in (x, dt, A, D, dt_bias))
        self.library.selective_scan_backward(*x.shape, A.shape[2], x, dt, A, B, C, B.stride(2), D, dt_bias, ds,
                                             int(ds.ndim == 3), dx, ddt, dA, dB, dC, dD, ddt_bias)
        return dx, ddt, dA, dB, dC, dD, ddt_bias

    def expand_gate(self, xz, kept, s, w, walk, scratch=None):
        _, B, S, _, E, _ = sizes = _sizes(xz, walk)
        y = _empty((B, S, E), xz.dtype, xz.device, scratch, "y")
        self.library.expand_gate(*sizes, xz, s, w.conv_w, w.conv_b, None if w.skip_before_expand else w.D, w.norm_w,
                                 w.norm_b, walk.token, walk.group, y)
        return y

    def expand_gate_backward(self, xz, s, w, walk, dy, dxz):
        """Fills the z half of dxz -> y once more, g (B L E) the gradient of each direction's expanded s, that of s
        (B P E), the same in both directions, and those of norm_w and norm_b."""
        _, B, _, P, E, _ = sizes = _sizes(xz, walk)
        y, g, ds = torch.empty_like(dy), torch.empty_like(dy), torch.empty((B, P, E), device=xz.device)
        dnorm_w, dnorm_b = (None if t is None else torch.empty_like(t) for t in (w.norm_w, w.norm_b))
        self.library.expand_gate_backward(*sizes, xz, s, w.conv_w, w.conv_b, None if w.skip_before_expand else w.D,
                                          w.norm_w, w.norm_b, walk.token, walk.group, walk.member, walk.start, dy,
                                          y, dxz, g, ds, dnorm_w, dnorm_b)
        return y, g, ds, dnorm_w, dnorm_b

    # -- the same with checks

    def _check(self, name, tensor, dtype, shape, device):
        """Raises TypeError or ValueError unless tensor is as the kernels expect it."""
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.device != device:
            got = f"{tensor.dtype} on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"backend {self.name}: {name} must be {dtype} on {device}, not {got}")
        if tensor.shape != shape:
            raise ValueError(f"backend {self.name}: {name} must have the shape {tuple(shape)}, not "
                             f"{tuple(tensor.shape)}")

    def _checked(self, xz, w, walk):
        """Checks all that conv_pool and expand_gate get to see besides their own results -> xz and w, contiguous."""
        if not isinstance(xz, Tensor) or xz.dtype not in self.dtypes:
            raise TypeError(f"backend {self.name}: activations must be a tensor of {', '.join(map(str, self.dtypes))}, "
                            f"not {getattr(xz, 'dtype', type(xz).__name__)}")
        if xz.ndim != 3 or w.A_log.ndim != 3 or w.dt_proj.ndim != 3 or not 1 <= w.A_log.shape[2] <= 64:
            raise ValueError(f"backend {self.name}: expected activations (B, L, 2E), A_log (2, E, N <= 64) and dt_proj "
                             f"(2, E, R), not {tuple(xz.shape)}, {tuple(w.A_log.shape)} and {tuple(w.dt_proj.shape)}")
        (B, S, width), device = xz.shape, xz.device
        E, N, R, b, P = width // 2, w.A_log.shape[2], w.dt_proj.shape[2], walk.token.shape[0], walk.start.shape[-1] - 1
        if S < 1 or b not in (1, B):
            raise ValueError(f"backend {self.name}: activations {tuple(xz.shape)} do not fit a plan of batch {b}")
        shapes = [(2, E, 4), (2, E), (2, R + 2 * N, E), (2, E, R), (2, E), (2, E, N), (2, E), (E,), (E,),
                  (b, S), (b, S), (b, S), (b, S), (b, P + 1)]
        f32, i32 = torch.float32, torch.int32
        tensors = w[:9] + tuple(walk)
        for t, shape, dtype in zip(tensors, shapes, (f32,) * 9 + (i32, i32, f32, i32, i32)):
            if t is None or t.shape != shape or t.dtype != dtype or t.device != device:      # rare: now find its name
                for name in SSMWeights._fields[:9] + Walk._fields:
                    if (getattr(w, name) if name in SSMWeights._fields else getattr(walk, name)) is t:
                        break
                if t is not None or name not in ("norm_w", "norm_b"):
                    self._check(name if name in SSMWeights._fields else f"the plan's {name}", t, dtype, shape, device)
        if not all(t is None or t.is_contiguous() for t in tensors[:9]):
            w = SSMWeights(*(t if t is None else t.contiguous() for t in tensors[:9]), *w[9:])
        return xz.contiguous(), w

    def checked_add_norm(self, hidden, residual, weight, bias):
        if not isinstance(hidden, Tensor) or not isinstance(weight, Tensor) or hidden.ndim < 1:
            raise TypeError(f"backend {self.name}: hidden and weight must be tensors")
        self._check("weight", weight, weight.dtype, hidden.shape[-1:], hidden.device)
        for name, t, like in ("residual", residual, hidden), ("bias", bias, weight):
            if t is not None:
                self._check(name, t, torch.float32, like.shape, hidden.device)
        if weight.dtype not in self.dtypes:
            raise TypeError(f"backend {self.name}: weight must be of {', '.join(map(str, self.dtypes))}, not "
                            f"{weight.dtype}")
        if residual is None:
            hidden, residual = None, hidden.float()
        arguments = (t if t is None else t.contiguous() for t in (
            hidden if hidden is None else hidden.to(weight.dtype), residual, weight.float(), bias))
        return self.add_norm(*arguments, weight.dtype)

    def checked_conv_pool(self, xz, w, plan):
        walk = plan.walk(getattr(xz, "device", "cpu"))
        return self.conv_pool(*self._checked(xz, w, walk), walk)

    def checked_expand_gate(self, xz, kept, s, w, plan):
        walk = plan.walk(getattr(xz, "device", "cpu"))
        xz, w = self._checked(xz, w, walk)
        self._check("s", s, torch.float32, (2, len(xz), plan.steps, xz.shape[2] // 2), xz.device)
        return self.expand_gate(xz, kept, s.contiguous(), w, walk)

    def _checked_scan(self, x, dt, A, B, C, D, dt_bias):
        if not isinstance(x, Tensor) or x.ndim != 4 or not isinstance(A, Tensor) or A.ndim != 3 or x.shape[2] < 1:
            raise ValueError(f"backend {self.name}: expected x (K, B, P, E) and A (K, E, N), not "
                             f"{tuple(getattr(x, 'shape', '?'))} and {tuple(getattr(A, 'shape', '?'))}")
        (K, batch, P, E), N = x.shape, A.shape[2]
        if K not in (1, 2) or not 1 <= N <= 64:
            raise ValueError(f"backend {self.name}: {K} directions and {N} states; it knows 1 or 2 and at most 64")
        for name, t, shape in (("x", x, x.shape), ("dt", dt, x.shape), ("A", A, (K, E, N)), ("B", B, (K, batch, P, N)),
                               ("C", C, (K, batch, P, N)), ("D", D, (K, E)), ("dt_bias", dt_bias, (K, E))):
            if t is not None or name in ("dt", "B", "C"):
                self._check(name, t, torch.float32, shape, x.device)
        return [t if t is None else t.contiguous() for t in (x, dt, A, B, C, D, dt_bias)]

    def checked_scan(self, x, dt, A, B, C, D=None, dt_bias=None):
        return self.selective_scan(*self._checked_scan(x, dt, A, B, C, D, dt_bias))

    def checked_scan_backward(self, x, dt, A, B, C, D, dt_bias, ds):
        arguments = self._checked_scan(x, dt, A, B, C, D, dt_bias)
        self._check("ds", ds, torch.float32, x.shape, x.device)
        return self.selective_scan_backward(*arguments, ds.contiguous())


def _empty(shape, dtype, device, scratch, name):
    """An empty tensor, in scratch if there is one. On a CPU, fresh large buffers come page by page from the system,
    which costs more than filling them: sharing u, xz and y made FastVim-T 1.2 x faster at 1024 and 2048 px."""
    if scratch is None or device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    if name not in scratch or scratch[name].shape != shape or scratch[name].dtype != dtype:
        scratch[name] = torch.empty(shape, dtype=dtype)
    return scratch[name]


def _sizes(xz, walk):
    B, S, width = xz.shape
    b, P = walk.start.shape
    return DTYPES.index(xz.dtype), B, S, P - 1, width // 2, b


# ----------------------------------------------------------------------------------------------------------------------
# 2. The block as one operation
#
# With kernels that know their own backward pass, autograd need not see inside: one operation a block keeps xz, the
# residual and the pooled tensors, and computes u, c and the gated y again in the backward pass. That is 6 D floats a
# token where autograd's own graph would keep several times that. torch.compile and torch.export see one node.


def _no_autocast(device):
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext()


_SCHEMA = ("Tensor? block_w, Tensor? block_b, Tensor in_proj, Tensor out_proj, Tensor conv_w, Tensor conv_b, "
           "Tensor x_proj, Tensor dt_proj, Tensor dt_bias, Tensor A_log, Tensor D, Tensor? norm_w, Tensor? norm_b, "
           "Tensor token, Tensor group, Tensor weight, Tensor member, Tensor start, str pool, bool skip, str backend")


def _run_block(scratch, hidden, residual, block_w, block_b, in_proj, out_proj, *rest):
    """add_norm, in_proj, ssm, out_proj -> hidden and residual (B L D), and, to save, xz, p, argmax, s. Without block_w
    the norm is left out: hidden comes normed."""
    (pool, skip, backend, _), walk = rest[14:], Walk(*rest[9:14])
    ops, w, out = fastvim.BACKENDS[backend].kernels, SSMWeights(*rest[:9], None, None, pool, skip), None
    with _no_autocast(hidden.device):
        u = hidden
        if block_w is not None:
            D = hidden.shape[-1:]
            if residual is None or residual.shape != hidden.shape or residual.dtype != torch.float32:
                raise ValueError(f"residual must be float32 of hidden's shape {tuple(hidden.shape)}")
            if block_w.shape != D or block_w.dtype != torch.float32 or hidden.dtype != in_proj.dtype or (
                    block_b is not None and (block_b.shape != D or block_b.dtype != torch.float32)):
                raise ValueError(f"the block's norm must be float32 of shape {tuple(D)}, hidden of in_proj's type")
            u, out = ops.add_norm(hidden.contiguous(), residual.contiguous(), block_w, block_b, in_proj.dtype, scratch)
        if scratch is None:
            xz = F.linear(u, in_proj)                                       # (B L 2E)
        else:
            xz = _empty((*u.shape[:2], len(in_proj)), u.dtype, u.device, scratch, "xz")
            torch.mm(u.flatten(0, 1), in_proj.mT, out=xz.flatten(0, 1))
        xz, w = ops._checked(xz, w, walk)
        y, p, argmax, s = ssm(xz, w, walk, ops, scratch)                    # (B L E)
        return F.linear(y, out_proj), out, xz, p, argmax, s                 # (B L D) ...


def _block_operation(hidden, *arguments):
    hidden, *others = _run_block(None, hidden, *arguments)
    if not arguments[-1]:                                                   # nothing to save
        others[1:] = [None] * 4
    return hidden, *[hidden.new_empty(0) if t is None else t for t in others]


_block = torch.library.custom_op(
    "fastvim::block", _block_operation, mutates_args=(),
    schema=f"(Tensor hidden, Tensor? residual, {_SCHEMA}, bool save) "
           "-> (Tensor hidden, Tensor residual, Tensor xz, Tensor p, Tensor argmax, Tensor s)")


@_block.register_fake
def _(hidden, residual, block_w, block_b, in_proj, out_proj, *rest):
    start, pool, save = rest[13], rest[14], rest[17]
    B, S, D = hidden.shape
    pooled, f32 = (2, B, start.shape[1] - 1, out_proj.shape[1]), dict(dtype=torch.float32)
    empty = hidden.new_empty
    out = empty(0) if block_w is None else empty(B, S, D, **f32)
    saved = [empty(0) for _ in range(4)] if not save else [
        empty(B, S, in_proj.shape[0], dtype=in_proj.dtype), empty(pooled, **f32),
        empty(pooled, dtype=torch.int32) if pool == "max" else empty(0), empty(pooled, **f32)]
    return empty(B, S, out_proj.shape[0], dtype=in_proj.dtype), out, *saved


def _block_backward_operation(d_hidden, d_out, u, xz, p, argmax, s, block_w, block_b, in_proj, out_proj, *rest):
    """The gradients of the arguments of block, hidden (in the activations' type) to norm_b; empty where there is none.
    u: what block returned as residual, or, without block_w, its hidden."""
    (pool, skip, backend), walk = rest[14:], Walk(*rest[9:14])
    ops, w = fastvim.BACKENDS[backend].kernels, SSMWeights(*rest[:9], None, None, pool, skip)
    xz, w = ops._checked(xz, w, walk)
    with _no_autocast(u.device):
        residual = u
        if block_w is not None:
            u = ops.add_norm(None, residual, block_w, block_b, in_proj.dtype)[0]             # (B L D)
        d_hidden, dxz = d_hidden.contiguous(), torch.empty_like(xz)
        y, g, ds, d_norm_w, d_norm_b = ops.expand_gate_backward(xz, s, w, walk, d_hidden @ out_proj, dxz)
        d_out_proj = d_hidden.flatten(0, 1).mT @ y.flatten(0, 1)                             # (D E)
        dt, Bm, Cm, low = project(p, w)
        A, D = -torch.exp(w.A_log), w.D if skip else None
        dp, d_dt, dA, dB, dC, d_D, d_dt_bias = ops.selective_scan_backward(p, dt, A, Bm, Cm, D, w.dt_bias, ds)
        d_dt = d_dt.flatten(1, 2)                                                            # (K BP E)
        d_dt_proj = d_dt.mT @ low.flatten(1, 2)                                              # (K E R)
        d_proj = torch.cat([d_dt @ w.dt_proj, dB.flatten(1, 2), dC.flatten(1, 2)], 2)        # (K BP R+2N)
        d_x_proj = d_proj.mT @ p.flatten(1, 2)                                               # (K R+2N E)
        dp = torch.baddbmm(dp.flatten(1, 2), d_proj, w.x_proj).view_as(p)                    # (K B P E)
        d_conv_w, d_conv_b, d_skip = ops.conv_pool_backward(xz, argmax if pool == "max" else None, w, walk, dp, g, dxz)
        du = dxz @ in_proj                                                                   # (B L D)
        d_in_proj = dxz.flatten(0, 1).mT @ u.flatten(0, 1)                                   # (2E D)
        d_residual = d_block_w = d_block_b = None
        if block_w is not None:
            d_residual, du, d_block_w, d_block_b = ops.add_norm_backward(
                residual, block_w, block_b, du, d_out if d_out is None else d_out.contiguous())
    grads = (du, d_residual, d_block_w, d_block_b, d_in_proj, d_out_proj, d_conv_w, d_conv_b, d_x_proj, d_dt_proj,
             d_dt_bias, dA * A, d_D if skip else d_skip, d_norm_w, d_norm_b)
    return [xz.new_empty(0) if t is None else t for t in grads]


_block_backward = torch.library.custom_op(
    "fastvim::block_backward", _block_backward_operation, mutates_args=(),
    schema=f"(Tensor d_hidden, Tensor? d_out, Tensor u, Tensor xz, Tensor p, Tensor argmax, Tensor s, {_SCHEMA}) "
           "-> Tensor[]")


@_block_backward.register_fake
def _(d_hidden, d_out, u, xz, p, argmax, s, block_w, block_b, in_proj, *rest):
    du = None if block_w is not None and in_proj.dtype == torch.float32 else u.new_empty(u.shape, dtype=in_proj.dtype)
    like = du, None if block_w is None else u, block_w, block_b, in_proj, *rest[:10]
    return [xz.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in like]


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
    """A shared library of C functions of pointers and int64: tensors go by their data, None as the null pointer.
    last: further arguments, the same for every function."""

    def __init__(self, path, *last):
        library = ctypes.CDLL(path)

        def wrap(function):
            function.restype = None

            def call(*args):
                values = [0 if a is None else a.data_ptr() if isinstance(a, Tensor) else a for a in args + last]
                if function.argtypes is None:   # a pointer travels like an int64 in all 64-bit calling conventions
                    function.argtypes = [ctypes.c_int64] * len(values)
                function(*values)
            return call
        for name in ("add_norm", "conv_pool", "selective_scan", "expand_gate"):
            setattr(self, name, wrap(getattr(library, name)))
            setattr(self, f"{name}_backward", wrap(getattr(library, f"{name}_backward")))


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
    flags = ["-O3", "-std=c++17", "-ftz=true"]
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
    fastvim.register_backend(Backend(name, (device,), "compiled kernels", k.checked_add_norm, k.checked_conv_pool,
                                     k.checked_scan, k.checked_expand_gate, k))


register("cpu", "cpu", DTYPES[:2], _load_cpu)
register("cuda", "cuda", DTYPES, _load_cuda)
