"""
How long a scan remembers: docs/decay.png, the spectrum of the decays exp(dt A) of a trained model.

    python train_imagenet.py --size t
    PYTHONPATH=. python dev/decay.py --weights runs/digits/best.pt

A state number that is multiplied by exp(dt A) in each step is down to 1/e after -1 / (dt A) steps.
A column of a panel is a block: the shares of its e x n state numbers, over all steps of the scans
of the held-out digits, by how many steps they remember. Above the line they outlast the scan.
"""
import argparse
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

import data
import fastvim

BINS = torch.logspace(-2, 4, 49)        # steps
ROOT = Path(__file__).resolve().parents[1]


@torch.no_grad()
def spectra_of(model: fastvim.FastVim, images: torch.Tensor) -> tuple[torch.Tensor, int]:
    """-> (k depth bins): shares of the state numbers by the steps that they remember; a scan's
    steps."""
    shares = []
    steps = []

    def look(x, dt, A, B, C, D=None, dt_bias=None):
        rate = F.softplus(dt + dt_bias[:, None, None])      # (k b p e)
        memory = -1 / (rate[..., None] * A[:, None, None])  # (k b p e n)
        found = [torch.histogram(direction.flatten(), BINS).hist for direction in memory]
        shares.append(torch.stack(found) / memory[0].numel())
        steps.append(x.shape[2])
        return scan(x, dt, A, B, C, D, dt_bias)

    scan = fastvim.selective_scan
    with patch.object(fastvim, "selective_scan", look), fastvim.use_backend("python"):
        model(images)
    return torch.stack(shares, 1), steps[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the decay spectra of a model trained on "
                                     "the digits, beside those of its random weights.")
    parser.add_argument("--weights", metavar="CKPT", default="runs/digits/best.pt")
    parser.add_argument("--out", default=str(ROOT / "docs/decay.png"))
    args = parser.parse_args()
    torch.manual_seed(0)
    model = fastvim.create_model("fastvim_tiny", img_size=32, patch_size=8, num_classes=10).eval()
    digits = data.Digits(False, 32)
    images = torch.stack([digits[i][0] for i in range(len(digits))])        # (360 3 32 32)
    found = {"random weights": spectra_of(model, images)}
    fastvim.load_checkpoint(model, args.weights)
    found["trained"] = spectra_of(model, images)
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for column, (weights, (spectra, steps)) in zip(panels.T, found.items()):
        for panel, direction, spectrum in zip(column, ("forward", "backward"), spectra):
            drawn = panel.pcolormesh(torch.arange(len(spectrum) + 1), BINS, spectrum.T,
                                     norm=LogNorm(1e-4, 1), cmap="magma")
            panel.axhline(steps, color="tab:cyan", linewidth=1)
            panel.set(yscale="log", title=f"{weights}, {direction}")
    figure.supxlabel("block")
    figure.supylabel("steps until 1/e is left")
    figure.colorbar(drawn, ax=panels, label="share of the state")
    figure.savefig(args.out, dpi=90)


if __name__ == "__main__":
    main()
