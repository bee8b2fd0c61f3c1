"""
What one token sees: docs/reach.png, gradients of a token behind some blocks with respect to the
tokens that enter the model.

    PYTHONPATH=. python dev/reach.py

Behind one block of FastVim, a token sees the convolution's neighbours in its row and, through the
scan, the averages of all rows: stripes. The next block adds the columns, and both close the cross.
With Pool_col alone the stripes stay stripes; Vim's scan tells all tokens apart, and those in the
same row best. Random weights, colours over nine decades: what can be seen, not what is learnt.
"""
from pathlib import Path

import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

import fastvim

SCHEDULES = ("fastvim", "pool_col", "vim")
BLOCKS = (1, 2, 4, 24)
SIZE = 28                               # tokens of a side


def maps_of(schedule: str) -> list[torch.Tensor]:
    """-> for each of BLOCKS, the norms (28 28) of the gradients of the sum of the middle token."""
    torch.manual_seed(0)
    model = fastvim.create_model("fastvim_tiny", schedule=schedule, img_size=16 * SIZE).eval()
    tokens, grids, _, _ = model._embed(torch.randn(1, 3, 16 * SIZE, 16 * SIZE), None, None)
    tokens = tokens.detach().requires_grad_()               # (1 784 192)
    middle = SIZE // 2 * SIZE + SIZE // 2
    maps = []
    for i, (hidden, residual) in enumerate(model._run(tokens, grids), 1):
        if i in BLOCKS:
            seen = (hidden + residual)[0, middle].sum()
            gradient, = torch.autograd.grad(seen, tokens, retain_graph=True)
            maps.append(gradient[0].norm(dim=1).reshape(SIZE, SIZE))
    return maps


def main() -> None:
    figure = Figure(figsize=(2.3 * len(BLOCKS), 2.4 * len(SCHEDULES)), layout="constrained")
    panels = figure.subplots(len(SCHEDULES), len(BLOCKS))
    for schedule, row in zip(SCHEDULES, panels):
        for count, panel, seen in zip(BLOCKS, row, maps_of(schedule)):
            seen = (seen / seen.max()).clamp(min=1e-9)
            panel.imshow(seen.numpy(), norm=LogNorm(1e-9, 1), cmap="magma")
            panel.set_title(f"{schedule}, {count} blocks", fontsize=9)
            panel.set_axis_off()
    figure.savefig(Path(__file__).resolve().parents[1] / "docs/reach.png", dpi=90)


if __name__ == "__main__":
    main()
