"""The selective scan for programs that torch.export makes, ONNX among them.

fastvim.selective_scan is a loop, which an exported program repeats step by step: thousands of nodes
that serve one length. Here the steps are taken together, in rounds; their number may be open."""
import torch
from torch import Tensor

ROUNDS = 16                                 # up to 2 ** 16 steps


def selective_scan(x, dt, A, B, C, D) -> Tensor:
    """x, dt (k b p e), B, C (k b p n), D (k e) or None as in fastvim.selective_scan, dt after
    softplus; A (k 1 n e) -> s (k b p e).

    In round i, a step that knows of 2 ** i steps learns of as many before them. Each round is as
    much work as the loop, all states are in memory: 4 rounds for 14 steps, 16 for any number."""
    torch._check(x.shape[2] <= 2 ** ROUNDS, lambda: f"the scan has more than {2 ** ROUNDS} steps")
    first = [in_walking_order(v)[:, :, :, None] for v in (x, dt, B, C)]         # (k b p 1 e or n)
    x_t, dt_t, B_t, C_t = first
    decay = torch.exp(dt_t * A[:, :, None])                 # (k b p n e)
    h = B_t.mT * (dt_t * x_t)                               # (k b p n e)
    open_length = isinstance(x.shape[2], torch.SymInt)
    for i in range(ROUNDS if open_length else (x.shape[2] - 1).bit_length()):
        before = torch.arange(x.shape[2], device=x.device) - 2 ** i
        exists = (before >= 0)[:, None, None]
        before = before.clamp(min=0)
        h = h + exists * decay * h[:, :, before]
        decay = decay * decay[:, :, before]
    s = in_walking_order((C_t @ h)[:, :, :, 0])             # (k b p e)
    if D is not None:
        s = s + D[:, None, None] * x
    return s


def in_walking_order(v: Tensor) -> Tensor:
    """Direction 1 reads from the other end. v (k b p ...) -> v[0], v[1] reversed."""
    return torch.cat([v[:1], v[1:].flip(2)])
