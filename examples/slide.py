"""
A slide larger than memory: which of its tiles speak for a lesion?   python examples/slide.py

40,000 x 40,000 pixels, 5 GB, most of them glass; here drawn, as a function of the position. (For a
real slide, let `read` ask openslide.) A coarse reading tells tissue from glass. Each tile of tissue
is read alone and becomes one vector, by a FastVim with random weights. A FastMaskVim takes them as
an image of 1 px patches, with holes where glass is; from small slides it learns whether there is a
lesion, never where. How far its score falls without some of the tiles: that is the heat map.
"""
import resource
import time

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastvim

TILE = 224                              # px of a side; 8 in the coarse reading
WIDTH = 192                             # numbers of a tile's vector
COLOURS = np.array([[244, 242, 245], [230, 170, 200], [100, 60, 140]], np.uint8)


class Slide:
    """Tissue on glass, perhaps with a lesion; reads: how many pixels each call of read returned."""

    def __init__(self, size: int, has_lesion: bool, seed: int):
        rng = np.random.default_rng(seed)
        self.size = size
        self.reads = []
        self.blobs = [(*rng.uniform(0.2, 0.8, 2), rng.uniform(0.1, 0.18)) for _ in range(3)]
        self.lesion = (*self.blobs[0][:2], has_lesion * 0.07)

    def read(self, top: int, left: int, size: int, step: int = 1) -> np.ndarray:
        """Every step-th pixel of a square -> (h w 3) uint8, computed here and now."""
        y = np.arange(top, top + size, step)[:, None]
        x = np.arange(left, left + size, step)[None]
        wave = 0.02 * np.sin(40 * y / self.size) * np.sin(31 * x / self.size)

        def inside(row, column, radius):
            return np.hypot(y / self.size - row, x / self.size - column) < radius + wave
        tissue = np.logical_or.reduce([inside(*blob) for blob in self.blobs])
        lesion = tissue & inside(*self.lesion) & (self.lesion[2] > 0)
        cell = y // 20 * 374761393 + x // 20 * 668265263                    # each its own number
        cell = (cell ^ cell >> 13) * 1274126177 >> 16 & 0xffff
        middle = np.hypot(y % 20 - 7 - cell % 8, x % 20 - 7 - cell // 8 % 8)
        nucleus = tissue & (middle < 4 + 2 * lesion) & (cell / 65536 < 0.3 + 0.5 * lesion)
        self.reads.append(tissue.size)
        return COLOURS[tissue.astype(int) + nucleus]        # of glass, tissue, nuclei


@torch.inference_mode()
def embed(slide: Slide, encoder) -> tuple[Tensor, Tensor]:
    """-> vectors of the tiles (WIDTH h w), zero on glass; ids (s) of those that are half tissue."""
    coarse = slide.read(0, 0, slide.size // TILE * TILE, TILE // 8)
    tissue = (np.ptp(coarse, 2).reshape(len(coarse) // 8, 8, -1, 8) > 20).mean((1, 3)) >= 0.5
    vectors = torch.zeros(WIDTH, *tissue.shape)
    for row, column in np.argwhere(tissue):
        tile = torch.from_numpy(slide.read(row * TILE, column * TILE, TILE))
        vectors[:, row, column] = encoder(tile.permute(2, 0, 1)[None] / 127.5 - 1)[0]
    return vectors, torch.from_numpy(np.flatnonzero(tissue))


def train(images, ids, labels, epochs: int = 12) -> fastvim.FastVim:
    """images (slides WIDTH h w), ids of the tissue of each, labels (slides) -> a FastMaskVim."""
    model = fastvim.create_model("fastmaskvim_tiny", depth=2, patch_size=1, in_chans=WIDTH,
                                 img_size=images.shape[2:], num_classes=1, mask_divisor="count")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(8):
            keep = nn.utils.rnn.pad_sequence([ids[i] for i in batch], True, -1)
            scores = model(images[batch], keep=keep)[:, 0]
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(scores, labels[batch]).backward()
            optimizer.step()
    return model.eval()


@torch.inference_mode()
def occlude(model, image, ids) -> tuple[float, Tensor]:
    """image (WIDTH h w), ids (s) -> its score; how far it falls without each window, (h w)."""
    score = model(image[None], keep=ids[None]).item()
    w = image.shape[2]
    side = max(1, w // 26)              # of a window, in tiles
    window = ids // w // side * w + ids % w // side
    heat = torch.full(image.shape[1:], torch.nan)
    for i in window.unique():
        heat.view(-1)[ids[window == i]] = score - model(image[None], keep=ids[None, window != i])[0]
    return score, heat


def main(size: int = 40_000, slides: int = 64, out: str = "slide.png") -> tuple[Slide, Tensor]:
    """size: px of the slide's side; slides: of how many small ones to learn."""
    start = time.perf_counter()
    torch.manual_seed(0)
    encoder = fastvim.create_model("fastvim_tiny", depth=2, patch_size=32, num_classes=0).eval()
    labels = torch.arange(slides) % 2.0
    images, ids = zip(*(embed(Slide(16 * TILE, i % 2 == 1, i), encoder) for i in range(slides)))
    tissue = torch.cat([image.flatten(1)[:, own] for image, own in zip(images, ids)], 1)
    std, mean = (v[:, None, None] for v in torch.std_mean(tissue, 1))
    model = train((torch.stack(images) - mean) / std, ids, labels)
    slide = Slide(size, True, 1000)
    image, own = embed(slide, encoder)
    score, heat = occlude(model, (image - mean) / std, own)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024        # MB, on Linux
    print(f"{len(slide.reads):,} readings of at most {3e-6 * max(slide.reads):.1f} of "
          f"{3e-6 * size ** 2:,.0f} MB: {len(own):,} of {heat.numel():,} tiles are tissue, "
          f"{len(own) / heat.numel():.0%}\npeak memory {peak:.0f} MB, score {score:.1f} (above 0: "
          f"a lesion), {time.perf_counter() - start:.0f} s: {out}")
    panel = Figure(figsize=(6, 5), layout="constrained").subplots()
    panel.imshow(slide.read(0, 0, size, size // 500), extent=(0, size, size, 0))
    panel.imshow(heat.numpy(), extent=(0, TILE * len(heat), TILE * len(heat), 0), cmap="inferno")
    panel.plot(slide.lesion[1] * size, slide.lesion[0] * size, "c+", markersize=20)
    panel.figure.savefig(out, dpi=80)
    return slide, heat


if __name__ == "__main__":
    main()
