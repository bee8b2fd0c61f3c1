"""Data that needs no download, for every experiment: scanned digits; drawn cells, scenes, pairs."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from .coco import as_coco
from .dense import DenseFiles
from .images import Image
from .loading import Files, extra

# ---- Handwritten digits --------------------------------------------------------------------------

DIGITS_MEAN = 0.305     # of the training digits' pixels in [0, 1]
DIGITS_STD = 0.376
# Largest rotation (radians), shear, log zoom and shifts (one of the 8 source pixels is 0.25). No
# flips: a mirrored 2 is no digit.
DIGITS_AFFINE = torch.tensor([0.26, 0.15, 0.15, 0.25, 0.25])


class Digits(Dataset):
    """scikit-learn's 1,797 scans of handwritten digits, 8 x 8 pixels: always the same 360 held out.

    Item i is ((3 img_size img_size) float32, label): bicubic, normalised; train: under a random
    affine map drawn from torch's global generator.
    """

    def __init__(self, train: bool, img_size: int = 32):
        images, labels = extra("sklearn.datasets").load_digits(return_X_y=True)
        train_test_split = extra("sklearn.model_selection").train_test_split
        kept, held_out = train_test_split(
            np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
        self.indices = np.sort(kept if train else held_out)
        scans = images[self.indices] / 16                       # (n 64) in 0..1
        self.images = torch.tensor(scans, dtype=torch.float32).view(-1, 1, 8, 8)
        self.labels = labels[self.indices].tolist()
        self.classes = [str(digit) for digit in range(10)]
        self.img_size = img_size
        self.augment = train

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        draw = 2 * torch.rand(5) - 1 if self.augment else torch.zeros(5)
        return enlarge(self.images[i:i + 1], self.img_size, draw), self.labels[i]


def enlarge(scan: torch.Tensor, img_size: int, draw: torch.Tensor) -> torch.Tensor:
    """A scan (1 1 8 8) in [0, 1] -> (3 img_size img_size), moved and normalised.

    draw: (5) in [-1, 1], shares of DIGITS_AFFINE. Enlarging and moving in one resampling of the
    8 x 8 scan is cheaper, and blurs once. Outside the scan is paper: zeros.
    """
    turn, shear, log_zoom, dx, dy = (DIGITS_AFFINE * draw).tolist()
    cos = math.cos(turn)
    sin = math.sin(turn)
    zoom = math.exp(log_zoom)
    # Output -> source position: zoom * rotation @ [[1, shear], [0, 1]], and a shift.
    theta = torch.tensor([[[zoom * cos, zoom * (shear * cos - sin), dx],
                           [zoom * sin, zoom * (shear * sin + cos), dy]]])
    grid = F.affine_grid(theta, (1, 1, img_size, img_size), align_corners=False)
    image = F.grid_sample(scan, grid, mode="bicubic", align_corners=False)
    image = (image.clamp_(0, 1) - DIGITS_MEAN) / DIGITS_STD     # bicubic overshoots
    return image[0].expand(3, -1, -1)


def digit_transform(img_size: int) -> Callable:
    """PIL image (one light digit on black, filling it) -> what `Digits` gives for such a scan."""
    def transform(image: Image.Image) -> torch.Tensor:
        small = image.convert("L").resize((8, 8), Image.Resampling.BOX)
        scan = torch.from_numpy(np.asarray(small, np.float32) / 255)
        return enlarge(scan[None, None], img_size, torch.zeros(5))
    return transform


# ---- Drawn cells ---------------------------------------------------------------------------------

class Cells(Files):
    """Drawn cells in 8 channels, of 8 classes that differ only in which channels show the same.

    A cell holds organelles of two kinds, spots that lie at random, and each channel stains one
    kind: channel i of class k the first kind if k & i has an even number of bits, else the second
    (the rows of a Hadamard matrix). Both kinds are drawn alike, so no channel by itself says
    anything of the class, two tell its half, three its quarter; what counts is which channels
    agree. How brightly a channel is stained varies up to 64-fold from cell to cell.

    Item i, a function of (split, i) alone, is (transform(array (8 img_size img_size) float32),
    label). .classes: which kind each channel shows, such as "ABABABAB".
    """

    code = np.array([[(k & i).bit_count() % 2 for i in range(8)] for k in range(8)])
    sizes = {"train": 2000, "val": 500, "test": 500}

    def __init__(self, split: str, transform: Callable, img_size: int = 32):
        self.split = split
        self.img_size = img_size
        classes = ["".join("AB"[kind] for kind in row) for row in self.code]
        samples = [(i, i % 8) for i in range(self.sizes[split])]
        super().__init__(samples, classes, self.draw, transform, f"the drawn cells ({split})")

    def draw(self, i: int) -> np.ndarray:
        rng = np.random.default_rng([list(self.sizes).index(self.split), i])
        axis = (np.arange(self.img_size) + 0.5) / self.img_size
        cy, cx = rng.uniform(0.4, 0.6, 2)                       # the cell's center
        ry, rx = rng.uniform(0.3, 0.42, 2)                      # and radii
        distance = np.sqrt(rng.uniform(0, 1, (2, 8)))           # (kind spot)
        angle = rng.uniform(0, 2 * np.pi, (2, 8))
        kind = self.code[i % 8]                                 # (channel)
        y = (cy + ry * distance * np.sin(angle))[kind, :, None]
        x = (cx + rx * distance * np.cos(angle))[kind, :, None]
        width = 0.05 * rng.uniform(0.8, 1.25, (8, 1, 1))        # sharpness is the channel's
        along_y = np.exp(-((axis - y) / width) ** 2 / 2)        # (channel spot S)
        along_x = np.exp(-((axis - x) / width) ** 2 / 2)
        image = np.einsum("cny,cnx->cyx", along_y, along_x)
        ellipse = ((axis[:, None] - cy) / ry) ** 2 + ((axis - cx) / rx) ** 2
        image += 0.3 / (1 + np.exp(8 * (ellipse - 1.1)))        # the cell's body
        image *= 8 ** rng.uniform(-1, 1, (8, 1, 1))
        return (image + 0.1 * rng.standard_normal(image.shape)).astype(np.float32)

    @classmethod
    def best(cls, channels: list[int]) -> float:
        """The accuracy in percent that a perfect classifier has on these channels."""
        rows = cls.code[:, list(channels)]
        return 100 * len({tuple(row ^ row[:1]) for row in rows}) / len(rows)


# ---- Drawn scenes --------------------------------------------------------------------------------

class Scenes(DenseFiles):
    """Drawn scenes: up to four shapes, one over the other, on a meadow or on water, behind lines.

    A shape has any place, size, colour and texture, so that only its outline tells its class; it is
    tilted a bit, and of what lies below, the visible part counts. A meadow is green with blots,
    water blue with waves. The lines mean nothing.

    objects=False: as DenseFiles of (pixels (3 S S) uint8, labels (S S) uint8), ground and shapes;
    True: of (pixels, objects as for DetectionTransform), shapes only. Item i is a function of
    (split, i) alone. .coco, .category_ids: as in Coco.
    """

    sizes = {"train": 4000, "val": 100}
    grounds = {"meadow": ((0.1, 0.4, 0.1), (0.5, 0.7, 0.3)),    # darkest, brightest colour
               "water": ((0.1, 0.1, 0.1), (0.3, 0.5, 0.9))}
    shapes = {  # of positions u, v, in units of the shape's radius
        "disc": lambda u, v: np.hypot(u, v) < 0.9,
        "square": lambda u, v: np.maximum(abs(u), abs(v)) < 0.8,
        "triangle": lambda u, v: (v < 0.6) & (abs(u) < 0.55 * (v + 1)),
        "cross": lambda u, v: (np.maximum(abs(u), abs(v)) < 0.95)
        & (np.minimum(abs(u), abs(v)) < 0.32)}

    def __init__(self, split: str, transform: Callable, img_size: int, objects: bool):
        self.split = split
        self.img_size = img_size
        self.objects = objects
        classes = list(self.shapes) if objects else [*self.grounds, *self.shapes]
        samples = [(i, split) for i in range(self.sizes[split])]
        super().__init__(samples, classes, self.draw, transform, f"the drawn scenes ({split})")
        if objects and split == "val":
            self.category_ids = list(range(len(classes)))
            self.coco = as_coco(self.annotations())

    def draw(self, i: int, split: str) -> tuple[torch.Tensor, torch.Tensor | dict]:
        rng = np.random.default_rng([list(self.sizes).index(split), i])
        size = self.img_size
        axis = np.arange(size) + 0.5                            # of the pixels' centers
        y = axis[:, None]
        x = axis
        ground = int(rng.integers(len(self.grounds)))
        darkest, brightest = list(self.grounds.values())[ground]
        image = self.paint(rng, rng.uniform(darkest, brightest), size / 12, axis, ground == 1)
        owner = np.full((size, size), -1)                       # which shape is seen at a pixel
        kinds = []
        for number in range(int(rng.integers(1, 5))):
            kinds.append(int(rng.integers(len(self.shapes))))
            radius = size * rng.uniform(0.16, 0.3)
            angle = rng.uniform(-0.3, 0.3)
            dy = (y - rng.uniform(0.1, 0.9) * size) / radius
            dx = (x - rng.uniform(0.1, 0.9) * size) / radius
            u = np.cos(angle) * dx + np.sin(angle) * dy
            v = np.cos(angle) * dy - np.sin(angle) * dx
            inside = list(self.shapes.values())[kinds[-1]](u, v)    # (S S)
            owner[inside] = number
            colour = rng.uniform(0, 1, 3)
            texture = self.paint(rng, colour, size / 8, axis, waves=rng.random() < 0.5)
            image = np.where(inside, texture, image)
        for _ in range(int(rng.integers(0, 4))):                # lines
            angle = rng.uniform(0, np.pi)
            cy, cx = rng.uniform(0.2, 0.8, 2) * size
            across = np.cos(angle) * (y - cy) + np.sin(angle) * (x - cx)
            along = np.cos(angle) * (x - cx) - np.sin(angle) * (y - cy)
            line = (abs(across) < size / 64) & (abs(along) < size / 5)
            image = np.where(line, rng.uniform(0, 1, (3, 1, 1)), image)
        image = image + 0.04 * rng.standard_normal(image.shape)
        pixels = torch.from_numpy((255 * image.clip(0, 1)).astype(np.uint8))
        if not self.objects:
            label_of = [*(len(self.grounds) + kind for kind in kinds), ground]      # -1: ground
            return pixels, torch.from_numpy(np.array(label_of, np.uint8)[owner])
        masks = torch.from_numpy(owner == np.arange(len(kinds))[:, None, None])     # (n S S)
        seen = masks.sum((1, 2)) >= (size / 16) ** 2
        return pixels, dict(id=i, labels=torch.tensor(kinds)[seen], masks=masks[seen].byte())

    @staticmethod
    def paint(rng: np.random.Generator, colour: np.ndarray, wavelength: float, axis: np.ndarray,
              waves: bool) -> np.ndarray:
        """colour (3) with waves of one direction, or with blots, the sum of many -> (3 S S)."""
        count = 1 if waves else 8
        angle, phase = rng.uniform(0, 2 * np.pi, (2, count, 1))
        k = 2 * np.pi / (wavelength * rng.uniform(0.8, 1.25, (count, 1)))
        # sin(ky y + kx x + phase) for all pixels at once: a product of what it is along y and x.
        along_y = np.exp(1j * k * np.sin(angle) * axis)
        along_x = np.exp(1j * (k * np.cos(angle) * axis + phase))
        texture = (along_y.T @ along_x).imag                    # (S S)
        return colour[:, None, None] + rng.uniform(0.05, 0.15) * texture / count ** 0.5

    def annotations(self) -> dict:
        """What COCO's annotation file would say of these scenes."""
        rle = extra("pycocotools.mask")
        items = []
        for i in range(len(self)):
            _, objects = self.draw(i, self.split)
            for label, mask in zip(objects["labels"].tolist(), objects["masks"].numpy()):
                coded = rle.encode(np.asfortranarray(mask))
                items.append(dict(
                    id=len(items) + 1, image_id=i, category_id=label, iscrowd=0,
                    segmentation=coded, area=float(mask.sum()), bbox=rle.toBbox(coded).tolist()))
        images = [dict(id=i, height=self.img_size, width=self.img_size) for i in range(len(self))]
        categories = [dict(id=k, name=name) for k, name in enumerate(self.classes)]
        return dict(annotations=items, categories=categories, images=images)


# ---- Drawn pairs ---------------------------------------------------------------------------------

class Pairs:
    """Two reddish shapes of Scenes among four bluish ones that mean nothing, 32 x 32 pixels.

    The 8 classes: which shape the left one of the two is, and whether it lies above or below the
    other. Each of the six stands somewhere in a field of 3 x 3 of its own, the two never in the
    same row or column of fields, so that both questions have an answer; which fields, sizes, tilts
    and colours are drawn. No patch tells the class, nor do all patches without their places.

    draw(i) -> (image (3 32 32) float32, label), a function of (split, i) alone; any i >= 0.
    """

    size = 32                                                   # pixels
    fields = 3                                                  # in a row, and in a column
    count = 6                                                   # shapes, of which two matter
    classes = [f"{shape} {side}" for shape in Scenes.shapes for side in ("below", "above")]

    def __init__(self, split: str):
        self.split = ("train", "val").index(split)

    def draw(self, i: int) -> tuple[np.ndarray, int]:
        rng = np.random.default_rng([self.split, i])
        rows, columns = rng.permuted(np.tile(np.arange(self.fields), (2, 1)), axis=1)[:, :2]
        pair = rows * self.fields + columns                     # the two's fields, by number
        others = np.setdiff1d(np.arange(self.fields ** 2), pair)
        field = np.concatenate([pair, rng.permutation(others)[:self.count - 2]])
        place = np.stack([field // self.fields, field % self.fields])
        place = place + 0.5 + rng.uniform(-0.2, 0.2, place.shape)
        cy, cx = place[..., None, None] * self.size / self.fields       # (count 1 1) each
        radius = self.size * rng.uniform(0.12, 0.16, (self.count, 1, 1))
        angle = rng.uniform(-0.3, 0.3, (self.count, 1, 1))
        colour = rng.uniform(0.3, 1, (self.count, 3))
        colour[:2, 2] *= 0.3                                    # the two have little blue
        colour[2:, 0] *= 0.3                                    # the others little red
        kinds = rng.integers(0, len(Scenes.shapes), self.count)
        axis = np.arange(self.size) + 0.5                       # of the pixels' centers
        dy = (axis[:, None] - cy) / radius
        dx = (axis - cx) / radius
        u = np.cos(angle) * dx + np.sin(angle) * dy             # (count S S)
        v = np.cos(angle) * dy - np.sin(angle) * dx
        image = 0.1 * rng.standard_normal((3, self.size, self.size))
        for n, kind in enumerate(kinds):
            inside = list(Scenes.shapes.values())[kind](u[n], v[n])
            image[:, inside] += colour[n][:, None]
        left, right = np.argsort(columns)
        label = 2 * kinds[left] + (rows[left] < rows[right])
        return image.astype(np.float32), int(label)
