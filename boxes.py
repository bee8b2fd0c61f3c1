"""
Boxes around objects: anchors, deltas from one box to another, which box shows which object.

Everything of a detector that has no weights, for dense_heads.py. Symbols:

    b  images    c  channels    k  classes    h, w  size of a map    a  anchors of a map, 3 h w
    n  boxes     m  objects     p  boxes that show an object
    boxes (n 4) float32: left, top, right, bottom in pixels;  [(n 4)]: a list, one for each image
    std: two numbers, which a delta's place and size are divided by;  size: (height, width)

Girshick et al. 2014, R-CNN; Girshick 2015, Fast R-CNN; Ren et al. 2015, Faster R-CNN; Lin et al.
2017, FPN; He et al. 2017, Mask R-CNN.
"""
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torchvision import ops

STRIDES = (4, 8, 16, 32, 64)                    # pixels from one cell to the next, of p2 .. p6
RATIOS = (0.5, 1.0, 2.0)                        # height / width of the anchors of a cell,
ANCHOR_CELLS = 8                                # whose area is that of 8 x 8 cells
MAX_GROWTH = math.log(1000 / 16)                # no delta enlarges or shrinks a box by more
BACKGROUND, IGNORED = -1, -2                    # instead of the number of an object
MASK_SIZE = 28                                  # rows and columns of a mask within its box


# ---- Deltas --------------------------------------------------------------------------------------

def make_anchors(maps: Sequence[Tensor]) -> list[Tensor]:
    """The anchors [(a 4)] of maps [(b c h w)] of STRIDES. Faster R-CNN, section 3.1.1.

    Those of a cell lie around its upper left corner, in the order of RATIOS. (torchvision's
    generator rounds them to whole pixels.)"""
    device = maps[0].device
    ratio = torch.tensor(RATIOS, device=device)
    shape = torch.stack([ratio ** -0.5, ratio ** 0.5], 1)                   # (3 2) width, height
    anchors = []
    for grid, stride in zip(maps, STRIDES):
        x = stride * torch.arange(grid.shape[3], device=device)             # (w)
        y = stride * torch.arange(grid.shape[2], device=device)             # (h)
        corner = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[:, :, None]   # (h w 1 2)
        half = shape * ANCHOR_CELLS * stride / 2                            # (3 2)
        anchors.append(rearrange([corner - half, corner + half],
                                 "side h w a xy -> (h w a) (side xy)"))
    return anchors


def center_and_extent(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """(... 4) -> (... 2) x and y, (... 2) width and height."""
    return ops.box_convert(boxes, "xyxy", "cxcywh").split(2, -1)


def encode(boxes: Tensor, objects: Tensor, std: Sequence[float]) -> Tensor:
    """The deltas (n 4) that move boxes (n 4) onto objects (n 4). R-CNN, appendix C; divided by std
    since Fast R-CNN, section 2.3."""
    center, extent = center_and_extent(boxes)
    goal, goal_extent = center_and_extent(objects)
    move = (goal - center) / extent / std[0]
    grow = (goal_extent / extent).log() / std[1]
    return torch.cat([move, grow], -1)


def decode(boxes: Tensor, deltas: Tensor, std: Sequence[float], size: tuple[int, int]) -> Tensor:
    """Boxes (... 4) moved by deltas (... 4), clipped to an image of that size: undoes encode."""
    center, extent = center_and_extent(boxes)
    move, grow = deltas.split(2, -1)
    center = center + move * std[0] * extent
    half = extent / 2 * (grow * std[1]).clamp(-MAX_GROWTH, MAX_GROWTH).exp()
    return ops.clip_boxes_to_image(torch.cat([center - half, center + half], -1), size)


def of_class(x: Tensor, label: Tensor) -> Tensor:
    """x (n k ...), label (n) -> (n ...)."""
    return x[torch.arange(len(x), device=x.device), label]


def refine(boxes: Sequence[Tensor], deltas: Tensor, label: Tensor, std: Sequence[float],
           sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Boxes [(n 4)], moved by the deltas (n k 4) of one class each, label (n), where n counts those
    of all images."""
    deltas = of_class(deltas, label).split([len(box) for box in boxes])
    return [decode(box, delta, std, size) for box, delta, size in zip(boxes, deltas, sizes)]


# ---- Which box shows which object ----------------------------------------------------------------

def match(boxes: Tensor, objects: Tensor, negative: float, positive: float,
          weakest: float | None = None) -> Tensor:
    """Which of the objects (m 4) each box (n 4) shows -> (n) int64.

    It is the number of the object of the largest IoU if that is at least `positive`, BACKGROUND if
    it is below `negative`, else IGNORED. weakest: an object also takes the boxes that have the
    largest IoU with it, if that is at least so much: objects that no anchor resembles would be lost
    otherwise (Faster R-CNN, section 3.1.2)."""
    if len(objects) == 0:
        return torch.full_like(boxes[:, 0], BACKGROUND, dtype=torch.long)
    iou = ops.box_iou(objects, boxes)                                       # (m n)
    largest, matched = iou.max(0)                                           # (n) (n)
    matched[largest < positive] = IGNORED
    matched[largest < negative] = BACKGROUND
    if weakest is not None:
        of_object = iou.amax(1, keepdim=True)                               # (m 1)
        number = torch.arange(len(objects), device=iou.device)[:, None]     # (m 1)
        takes = (iou == of_object) & (of_object >= weakest)                 # (m n)
        taken = torch.where(takes, number, -1).amax(0)                      # (n)
        matched = torch.where(taken >= 0, taken, matched)
    return matched


def draw(candidates: Tensor, most: int) -> Tensor:
    """Up to `most` of the numbers at which candidates (n) bool is true, at random."""
    numbers = candidates.nonzero()[:, 0]
    return numbers[torch.randperm(len(numbers), device=numbers.device)[:most]]


def sample_boxes(matched: Tensor, count: int, share: float) -> Tensor:
    """Which boxes to train on, at random: matched (n), what `match` said -> the numbers of up to
    `count` boxes, of which at most that share show an object."""
    positive = draw(matched >= 0, int(count * share))
    return torch.cat([positive, draw(matched == BACKGROUND, count - len(positive))])


# ---- What lies within a box ----------------------------------------------------------------------

def crop_regions(maps: Sequence[Tensor], boxes: Sequence[Tensor], size: int) -> Tensor:
    """The boxes [(n 4)] of each image, cut from its maps p2 .. p5 [(b c h w)] by RoIAlign
    -> (n c size size), where n counts those of all images.

    A box of 224 x 224 pixels is cut from p4, one of half that size from p3 (FPN, equation 1).
    torchvision's MultiScaleRoIAlign does it by the older, unaligned RoIAlign, half a cell off."""
    rois = torch.cat([F.pad(box, (1, 0), value=i) for i, box in enumerate(boxes)])      # (n 5)
    level = (ops.box_area(rois[:, 1:]).sqrt() / 56).log2().floor().clamp(0, 3)          # (n)
    members = [(level == i).nonzero()[:, 0] for i in range(4)]
    regions = [ops.roi_align(x, rois[at], size, 1 / stride, aligned=True)
               for x, at, stride in zip(maps, members, STRIDES)]
    return torch.cat(regions)[torch.cat(members).argsort()]


def crop_masks(masks: Tensor, objects: Tensor, boxes: Tensor) -> Tensor:
    """Of masks (m height width) those of the objects (p), within boxes (p 4) -> (p 28 28) bool."""
    rois = torch.cat([objects[:, None], boxes], 1)                          # (p 5) object, box
    return ops.roi_align(masks[:, None].float(), rois, MASK_SIZE, aligned=True)[:, 0] >= 0.5


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks (n 28 28), stretched over their boxes (n 4) bilinearly -> bool (n height width).

    Interpolation is a matrix product along each axis; a pixel's row of the matrix is a hat of width
    two around the place of its center in the mask. (torchvision's function first moves the boxes
    to whole pixels.)"""
    def hats(start, end, length):
        """The matrices (n length 28) of boxes from start (n) to end (n)."""
        pixel = torch.arange(length, device=boxes.device) + 0.5             # (length)
        extent = (end - start).clamp(min=1e-6)[:, None]                     # (n 1)
        place = (pixel - start[:, None]) / extent * MASK_SIZE - 0.5         # (n length)
        cell = torch.arange(MASK_SIZE, device=boxes.device)                 # (28)
        return (1 - (place[..., None] - cell).abs()).clamp(min=0)

    left, top, right, bottom = boxes.unbind(1)
    with torch.autocast(boxes.device.type, enabled=False):
        rows = hats(top, bottom, size[0])                                   # (n height 28)
        columns = hats(left, right, size[1])                                # (n width 28)
        return rows @ masks @ columns.mT >= 0.5


def in_original_size(result: dict[str, Tensor], size: tuple[int, int],
                     original: tuple[int, int]) -> dict[str, Tensor]:
    """result: what was detected in an image of `size`, with masks (n 28 28) -> the same in the
    image as it was before resizing, with masks (n *original) bool."""
    scale = [original[1] / size[1], original[0] / size[0]]                  # x, y
    boxes = result["boxes"] * result["boxes"].new_tensor(scale * 2)
    chunks = zip(result["masks"].split(8), boxes.split(8))      # all would fill the memory
    masks = torch.cat([paste_masks(mask, box, original) for mask, box in chunks])
    return result | {"boxes": boxes, "masks": masks}
