"""
One image through the first two blocks of FastVim, step by step: shapes, equations, pictures.

    python fastvim.py trace cat.jpg                     trace.png; random weights show the geometry
    python fastvim.py trace cat.jpg --weights FastVim_tiny.ckpt --out cat_trace.png
    python fastvim.py trace digit.png --weights runs/digits/best.pt
"""
from collections.abc import Iterator

import torch
from torch import Tensor

import checkpoints
import data
import fastvim

COLUMNS = ("residual", "u", "c", "p", "s", "expand(s)", "y")


def steps_of(block: fastvim.Block, hidden: Tensor, residual: Tensor | None,
             grid: fastvim.Grid) -> Iterator[tuple[str, str, Tensor]]:
    """Yields (name, equation, value) of what Block.forward computes, last its hidden (b l d)."""
    mixer = block.mixer
    w = mixer.weights()
    u, residual = fastvim.add_norm(hidden, residual, block.norm)
    yield "residual", "residual + hidden", residual
    yield "u", "norm(residual)", u
    xz = mixer.in_proj(u)
    yield "xz", "in_proj(u): x and z", xz
    c, p = fastvim.conv_pool(xz, w, grid)
    yield "c", "silu(causal_conv1d(x)), forward and backward", c
    yield "p", f"mean of c over {grid.pooled}: Algorithm 1, line 3", p
    dt, B, C = fastvim.select(p, w)
    yield "dt", "lines 4 to 6, equation 4", dt
    yield "B", "equation 4", B
    yield "C", "equation 4", C
    s = fastvim.selective_scan(p, dt, -torch.exp(w.A_log), B, C, None, w.dt_bias)
    yield "s", "lines 7 and 8: h = exp(dt A) h + dt B p, s = C h", s
    yield "expand(s)", f"each step back to its tokens along {grid.pooled}: line 9", grid.expand(s)
    y = fastvim.expand_gate(xz, c, s, w, grid)
    yield "y", "norm(mean of both expand(s) + D c) silu(z)", y
    yield "hidden", "out_proj(y)", mixer.out_proj(y)


def picture_of(name: str, value: Tensor, grid: fastvim.Grid) -> Tensor:
    """A value of steps_of for one image -> (rows columns 3) in 0..1: its three main components as
    colours, a pixel for each token or scan step. Of two directions: the forward one."""
    if value.ndim == 4:
        value = value[0]                                    # (b l e) or (b p e)
    sizes = dict(grid.sizes)
    if name in ("c", "expand(s)"):                          # along the walk -> as the tokens lie
        value = grid.unflatten(value)
    if name in ("p", "s"):
        sizes[grid.pooled] = 1
    flat = value[0] - value[0].mean(0)                      # (l e)
    _, _, axes = torch.linalg.svd(flat, full_matrices=False)
    colours = flat @ axes[:3].mT                            # (l 3)
    low, high = colours.quantile(torch.tensor([0.02, 0.98]), dim=0)
    colours = ((colours - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return colours.reshape(sizes["h"], sizes["w"], 3)


def make_model(weights: str | None) -> fastvim.FastVim:
    torch.manual_seed(0)
    if weights is None:
        print("random weights: --weights names others\n")
        return fastvim.create_model("fastvim_tiny").eval()
    content = checkpoints.read(weights)
    built = content.get("built", {"name": "fastvim_tiny", "fields": {}})
    model = fastvim.create_model(built["name"], **built["fields"]).eval()
    if model.cfg.schedule != "fastvim" or model.cfg.class_token:
        raise ValueError(f"{weights} is of {built['name']}: trace shows FastVim, which pools rows "
                         "and columns in turn")
    print(f"{weights}: {checkpoints.load(model, content)}\n")
    return model


def trace(image: str, out: str, weights: str | None) -> None:
    """Prints every step of two blocks, and paints the tokens into `out`, a PNG.

    weights: of a FastVim-T, or of a model of ours that its checkpoint describes. ValueError: it
    does not pool rows and columns in turn."""
    figure_of = data.extra("matplotlib.figure").Figure
    model = make_model(weights)
    view = data.image_transform(model.cfg.img_size[0], train=False)
    pixels = view(data.load_rgb(image))[None]               # (1 3 img_size img_size)
    figure = figure_of(figsize=(2 * len(COLUMNS), 4.4), layout="constrained")
    panels = figure.subplots(2, len(COLUMNS))
    with torch.inference_mode():
        hidden, grids, _, sizes = model._embed(pixels, None, None)
        print(f"patch_embed + pos_embed       {tuple(hidden.shape)}: {sizes['h']} x {sizes['w']} "
              "tokens, row by row")
        residual = None
        for i, (grid, row) in enumerate(zip(grids, panels)):
            print(f"\nblock {i} walks along '{grid.order}' and pools '{grid.pooled}': "
                  f"{grid.steps} scan steps instead of {hidden.shape[1]}")
            for name, equation, value in steps_of(model.layers[i], hidden, residual, grid):
                print(f"  {name:10} {tuple(value.shape)!s:18} {equation}")
                if name == "residual":
                    residual = value
                if name in COLUMNS:
                    panel = row[COLUMNS.index(name)]
                    panel.imshow(picture_of(name, value, grid).numpy())
                    panel.set_title(f"block {i}: {name}", fontsize=9)
                    panel.set_axis_off()
            hidden = value
    figure.savefig(out)
    print(f"\n{out}: tokens and scan steps, coloured by their three main components")
