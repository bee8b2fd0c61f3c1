"""
The SSM part of a block as the paper composes it: what bench.py compares the kernels with.

FastVim's authors call PyTorch's operations around Mamba's scan kernel, which wants channels first,
and run the backward direction on flipped tokens. Here the same calls stand around any scan.

Symbols: those of fastvim.py.
"""
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastvim


class Composition(fastvim.Backend):
    """The SSM part as the paper runs it: separate PyTorch calls around a scan kernel.

    Channels come first, the backward direction runs on flipped tokens. fused: repeat and skip in
    one pass (Table 24). For full grids, mean pooling and inference."""
    why = "as the paper composes it"
    stages = ("pool", "gate")                                   # the last ones of its methods below

    def __init__(self, name: str, scan: Callable, add_norm: Callable, fused: bool = False):
        self.name = name
        self.selective_scan = functools.partial(self.scan_forwards, scan)
        self.add_norm = add_norm
        self.fused = fused
        self.mark = lambda stage: None                          # the block figure listens here

    @staticmethod
    def scan_forwards(scan, x, dt, A, B, C, D, dt_bias) -> Tensor:
        """Both directions from the first step to the last, one after the other."""
        each = [(v[:1], v[1:]) for v in (x, dt, A, B, C, dt_bias)]
        return torch.cat([scan(*direction[:5], None, direction[5]) for direction in zip(*each)])

    def conv_pool(self, xz, w, grid):
        """-> c [(b e l), flipped (b e l)], p (k b p e)"""
        x = grid.flatten(xz.chunk(2, -1)[0]).mT.contiguous()                    # (b e l)
        self.mark("order")
        both = (x, x.flip(2))
        self.mark("flips")
        c = []
        for v, taps, bias in zip(both, w.conv_weight.to(x), w.conv_bias.to(x)):
            padded = F.conv1d(v, taps[:, None], bias, padding=3, groups=len(bias))
            c.append(F.silu(padded[..., :-3]))                                  # (b e l)
        self.mark("conv")
        p = torch.stack(c)                                                      # (k b e l)
        if grid.pooled:
            p = p.unflatten(3, (grid.steps, -1)).mean(4)                        # (k b e p)
        return c, p.mT.float().contiguous()

    def expand_gate(self, xz, c, s, w, grid):
        s = s.mT.to(xz)                                                         # (k b e p)
        D = w.D[..., None].to(xz)                                               # (k e 1)
        y = []                                                                  # 2 x (b e l)
        if self.fused:
            for k in range(2):
                tokens = c[k].unflatten(2, (grid.steps, -1))                    # (b e p m)
                y.append(torch.addcmul(s[k][..., None], D[k][..., None], tokens).flatten(2))
        else:
            if grid.pooled:
                s = s.repeat_interleave(c[0].shape[2] // grid.steps, 3)         # (k b e l)
            self.mark("repeat")
            y = [s[k] + D[k] * c[k] for k in range(2)]
        self.mark("skip")
        y = ((y[0] + y[1].flip(2)) / 2).mT                                      # (b l e)
        self.mark("flips")
        if w.layernorm is not None:
            y = w.layernorm(y)
        self.mark("norm")
        return (grid.unflatten(y) * F.silu(xz.chunk(2, -1)[1])).to(xz)

    def ssm(self, xz, w, grid):
        return ssm_by_stages(self, xz, w, grid, self.mark)


def ssm_by_stages(backend, xz, w, grid, mark) -> Tensor:
    """fastvim.ssm by the single operations of a backend; mark(stage) after each of them."""
    first, last = getattr(backend, "stages", ("conv_pool", "expand_gate"))
    c, p = backend.conv_pool(xz, w, grid)
    mark(first)
    dt, B, C = fastvim.select(p, w)
    mark("projections")
    s = backend.selective_scan(p, dt, -torch.exp(w.A_log), B, C, None, w.dt_bias)
    mark("scan")
    y = backend.expand_gate(xz, c, s, w, grid)
    mark(last)
    return y


def mamba_scan(x, dt, A, B, C, D, dt_bias) -> Tensor:
    """fastvim.selective_scan of one direction, (1 b p e), by the authors' kernel."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    x, dt, B, C = (v[0].mT.contiguous() for v in (x, dt, B, C))                 # (b e p), (b n p)
    return selective_scan_fn(x, dt, A[0], B, C, None, None, dt_bias[0], True).mT[None]
