"""
Heads for dense prediction: UperNet, which labels pixels, and Cascade Mask R-CNN, which finds
objects. They look at maps with a vector for each patch, the outputs of blocks of a plain backbone.

Written from their papers, under the released checkpoints' names:

    UperNet         Xiao et al. 2018, Unified Perceptual Parsing for Scene Understanding
    PSPNet          Zhao et al. 2017, Pyramid Scene Parsing Network: pooling pyramid, auxiliary loss
    Faster R-CNN    Ren et al. 2015, after Fast R-CNN, Girshick 2015: proposals, losses
    Mask R-CNN      He et al. 2017, on FPN, Lin et al. 2017: masks, regions at several scales
    Cascade R-CNN   Cai, Vasconcelos 2018: three stages, each of which refines the last one's boxes
    ViTDet          Li et al. 2022: maps of several scales from the last one of a plain backbone

A backbone has .cfg.embed_dim, .cfg.patch_size and .forward_intermediates(images) -> [(b d h w)].
Symbols as in boxes.py, and d, the width of the backbone; height, width, of images in pixels;
    targets  [dict(boxes (m 4) float32, labels (m) int64, masks (m height width) bool)], m may be 0
    sizes    [(height, width)] of each image, without the padding that makes them a batch
"""
import collections
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.ops import batched_nms

from boxes import (
    RATIOS,
    crop_masks,
    crop_regions,
    decode,
    encode,
    in_original_size,
    make_anchors,
    match,
    of_class,
    refine,
    sample_boxes,
)

# ---- What both models are made of ----------------------------------------------------------------


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (b c h w). eps 1e-5, as released (ViTDet: 1e-6)."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(rearrange(x, "b c h w -> b h w c"))
        return rearrange(x, "b h w c -> b c h w")


def named(**layers) -> nn.Sequential:
    return nn.Sequential(collections.OrderedDict(layers))


def conv(in_channels: int, channels: int, kernel: int, relu=True, **norm) -> nn.Sequential:
    """A convolution that keeps the size of its map, a norm and ReLU. norm: its released name and
    its class; it has a bias, the convolution then none."""
    layers = {"conv": nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=not norm)}
    for name, kind in norm.items():
        layers[name] = kind(channels)
    if relu:
        layers["relu"] = nn.ReLU()
    return named(**layers)


conv_bn = functools.partial(conv, bn=nn.BatchNorm2d)
conv_norm = functools.partial(conv, norm_layer=ChannelNorm)

INIT_STDS = {"fc_reg": 0.001, "fc_cls": 0.01, "conv_seg": 0.01,     # Fast R-CNN, section 2.3
             "rpn_head": 0.01}                                      # Faster R-CNN, section 3.1.3


def init_heads(model: nn.Module) -> None:
    """All but the backbone: biases 0, weights N(0, std) by INIT_STDS or as He et al. 2015 say."""
    for name, layer in model.named_modules():
        weighted = isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
        if name.startswith("backbone") or not weighted:
            continue
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        for part in INIT_STDS.keys() & set(name.split(".")):
            nn.init.normal_(layer.weight, std=INIT_STDS[part])
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


# ---- Segmentation: UperNet -----------------------------------------------------------------------

IGNORE_INDEX = 255                              # label of the pixels that nobody labelled
POOL_SCALES = (1, 2, 3, 6)                      # PSPNet, section 3.2
AUXILIARY_TAP = 2                               # PSPNet, section 3.3: a loss halfway helps the
AUXILIARY_WEIGHT = 0.4                          # blocks before it
DROPOUT = 0.1                                   # of whole channels, before the classifier


class UperHead(nn.Module):
    """UperNet, section 3.1: a pooling pyramid over the last map, then a feature pyramid over all.

    A plain backbone has one resolution: the maps of the feature pyramid are added as they are."""

    def __init__(self, in_channels: int, channels: int, num_classes: int):
        super().__init__()
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), conv_bn(in_channels, channels, 1))
            for scale in POOL_SCALES)
        self.bottleneck = conv_bn(in_channels + len(POOL_SCALES) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(conv_bn(in_channels, channels, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(conv_bn(channels, channels, 3) for _ in range(3))
        self.fpn_bottleneck = conv_bn(4 * channels, channels, 3)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps (b c h w), of the first block to the last -> logits (b k h w)."""
        *maps, last = maps
        pooled = [F.interpolate(psp(last), last.shape[2:], mode="bilinear")
                  for psp in self.psp_modules]
        x = self.bottleneck(torch.cat([last, *pooled], 1))      # (b channels h w), as all below
        outputs = [x]
        for i in (2, 1, 0):
            x = x + self.lateral_convs[i](maps[i])
            outputs.insert(0, self.fpn_convs[i](x))
        return self.conv_seg(self.dropout(self.fpn_bottleneck(torch.cat(outputs, 1))))


class UperNet(nn.Module):
    """backbone: of four maps.

    In training BatchNorm sees one value per image and channel of the coarsest pooled map, so give
    two images at least; on several GPUs convert the model to SyncBatchNorm."""

    def __init__(self, backbone: nn.Module, num_classes=150, channels=512, auxiliary_channels=256):
        super().__init__()
        self.backbone = backbone
        width = backbone.cfg.embed_dim
        self.decode_head = UperHead(width, channels, num_classes)
        self.auxiliary_head = named(                            # a small FCN (Long et al. 2015)
            convs=nn.Sequential(conv_bn(width, auxiliary_channels, 3)),
            dropout=nn.Dropout2d(DROPOUT),
            conv_seg=nn.Conv2d(auxiliary_channels, num_classes, 1))
        init_heads(self)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """Normalised images (b 3 height width) -> logits (b k height width); with labels
        (b height width) int64, classes or IGNORE_INDEX, the losses {name: scalar} to be added."""
        maps = self.backbone.forward_intermediates(images)      # 4 x (b d h w)
        logits = self.upsample(self.decode_head(maps), images)
        if labels is None:
            return logits
        halfway = self.upsample(self.auxiliary_head(maps[AUXILIARY_TAP]), images)
        return {"decode": pixel_loss(logits, labels),
                "auxiliary": AUXILIARY_WEIGHT * pixel_loss(halfway, labels)}

    def upsample(self, logits: Tensor, images: Tensor) -> Tensor:
        """(b k h w) -> (b k height width): the last patches may reach beyond the image."""
        scale = self.backbone.cfg.patch_size
        logits = F.interpolate(logits, scale_factor=scale, mode="bilinear")
        return logits[..., :images.shape[2], :images.shape[3]]


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, the mean over all pixels: a crop may show no labelled one."""
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none").mean()


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """The last window ends where the image does; a smaller image is one window."""
    last = max(length - crop, 0)
    return [min(start, last) for start in range(0, last + stride, stride)]


def slide(model, images: Tensor, crop=512, stride=341) -> Tensor:
    """Logits (b k height width) of images (b 3 height width) larger than those of the training:
    the mean over the windows that show a pixel."""
    height, width = images.shape[2:]
    windows = [(..., slice(y, y + crop), slice(x, x + crop))
               for y in window_starts(height, crop, stride)
               for x in window_starts(width, crop, stride)]
    logits = [model(images[window]).float() for window in windows]          # (b k crop crop)
    total = logits[0].new_zeros(*logits[0].shape[:2], height, width)        # (b k height width)
    count = torch.zeros_like(total[:1, :1])                                 # (1 1 height width)
    for window, logit in zip(windows, logits):
        total[window] += logit
        count[window] += 1
    return total / count


def segment(model, images: Tensor, size=None, scales=(1.0,), flip=False, crop=512,
            stride=341) -> Tensor:
    """Class probabilities (b k *size) of images (b 3 height width); size: by default the images'.

    The mean over the images resized by each of the scales and, with flip, their mirror images."""
    size = size or images.shape[2:]
    total = 0
    for scale in scales:
        x = images
        if scale != 1:
            x = F.interpolate(images, scale_factor=scale, mode="bilinear")
        views = [slide(model, x, crop, stride)]
        if flip:
            views.append(slide(model, x.flip(3), crop, stride).flip(3))
        for logits in views:
            total = total + F.interpolate(logits, size, mode="bilinear").softmax(1)
    return total / (len(scales) * (1 + flip))


# ---- Detection: Cascade Mask R-CNN ---------------------------------------------------------------

RPN_STD = (1.0, 1.0)
STAGES = (                                      # Cascade R-CNN, section 4
    (0.5, (0.1, 0.2), 1.0),                     # the IoU from which a box shows an object, std of
    (0.6, (0.05, 0.1), 0.5),                    # its deltas, weight of the losses
    (0.7, (0.033, 0.067), 0.25),
)


class SimpleFeaturePyramid(nn.Module):
    """ViTDet, section 3: the last map of a plain backbone, brought to four strides by transposed
    convolutions and pooling. A fifth, for large anchors, is every other cell of the fourth."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        up = functools.partial(nn.ConvTranspose2d, kernel_size=2, stride=2)
        block = functools.partial(conv_norm, relu=False)
        widths = (width // 4, width // 2, width, width)
        self.fpn1 = nn.Sequential(up(width, widths[1]), ChannelNorm(widths[1]), nn.GELU(),
                                  up(widths[1], widths[0]))
        self.fpn2 = nn.Sequential(up(width, widths[1]))
        self.lateral_convs = nn.ModuleList(block(width, channels, 1) for width in widths)
        self.fpn_convs = nn.ModuleList(block(channels, channels, 3) for _ in range(4))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(b d h w) of stride 16 -> [p2 .. p6], (b c 4h 4w) to (b c h/4 w/4)."""
        maps = [self.fpn1(x), self.fpn2(x), x, F.max_pool2d(x, 2)]
        maps = [lateral(x) for lateral, x in zip(self.lateral_convs, maps)]
        maps = [fpn(x) for fpn, x in zip(self.fpn_convs, maps)]
        return [*maps, F.max_pool2d(maps[3], 1, stride=2)]


class RPNHead(nn.Module):
    """Faster R-CNN, section 3.1: does an anchor show an object, and where does it lie?"""

    def __init__(self, channels: int):
        super().__init__()
        self.rpn_conv = nn.Sequential(conv(channels, channels, 3), conv(channels, channels, 3))
        self.rpn_cls = nn.Conv2d(channels, len(RATIOS), 1)
        self.rpn_reg = nn.Conv2d(channels, len(RATIOS) * 4, 1)

    def forward(self, maps) -> tuple[list[Tensor], list[Tensor]]:
        """Maps [(b c h w)] -> logits [(b a)] and deltas [(b a 4)] of each map, float32."""
        logits, deltas = [], []
        for x in maps:
            x = self.rpn_conv(x)
            logits.append(rearrange(self.rpn_cls(x), "b a h w -> b (h w a)").float())
            deltas.append(rearrange(self.rpn_reg(x), "b (a k) h w -> b (h w a) k", k=4).float())
        return logits, deltas

    @torch.no_grad()
    def propose(self, logits, deltas, anchors, sizes, count: int) -> list[tuple[Tensor, Tensor]]:
        """The likeliest boxes -> [(boxes (n 4), scores (n))] of each image, best first: up to
        `count` of each map, of which overlapping ones are dropped (NMS), then of all maps."""
        proposals = []
        for i, size in enumerate(sizes):
            tops = [x[i].topk(min(count, x.shape[1])) for x in logits]
            scores = torch.cat([top.values for top in tops]).sigmoid()      # (n)
            boxes = torch.cat([decode(anchor[top.indices], delta[i, top.indices], RPN_STD, size)
                               for anchor, delta, top in zip(anchors, deltas, tops)])       # (n 4)
            level = torch.cat([torch.full_like(top.indices, j) for j, top in enumerate(tops)])
            inside = (boxes[:, 2:] > boxes[:, :2]).all(1)       # clipping left some of it
            boxes, scores, level = (x[inside] for x in (boxes, scores, level))
            keep = batched_nms(boxes, scores, level, 0.7)[:count]
            proposals.append((boxes[keep], scores[keep]))
        return proposals

    def losses(self, logits, deltas, anchors, targets) -> dict[str, Tensor]:
        """Faster R-CNN, equation 1 with L1: the mean over 256 anchors of each image, up to half of
        them positive."""
        anchors = torch.cat(anchors)                                        # (a 4), of all maps
        objectness, box, count = 0, 0, 0
        for logit, delta, target in zip(torch.cat(logits, 1), torch.cat(deltas, 1), targets):
            matched = match(anchors, target["boxes"], 0.3, 0.7, weakest=0.3)                # (a)
            at = sample_boxes(matched, 256, 0.5)
            shown = at[matched[at] >= 0]                                    # (p)
            goal = encode(anchors[shown], target["boxes"][matched[shown]], RPN_STD)
            objectness = objectness + F.binary_cross_entropy_with_logits(
                logit[at], (matched[at] >= 0).float(), reduction="sum")
            box = box + F.l1_loss(delta[shown], goal, reduction="sum")
            count += len(at)
        return {"rpn_class": objectness / count, "rpn_box": box / count}


class BoxHead(nn.Module):
    """Regions (n c 7 7) -> logits of the classes, background last (n k+1), and deltas for each
    class (n k 4), float32."""

    def __init__(self, channels: int, hidden: int, num_classes: int):
        super().__init__()
        self.shared_convs = nn.Sequential(*(conv_norm(channels, channels, 3) for _ in range(4)))
        self.shared_fcs = nn.Sequential(nn.Linear(channels * 7 * 7, hidden), nn.ReLU())
        self.fc_cls = nn.Linear(hidden, num_classes + 1)
        self.fc_reg = nn.Linear(hidden, num_classes * 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.shared_fcs(self.shared_convs(x).flatten(1))                # (n hidden)
        deltas = rearrange(self.fc_reg(x), "n (k four) -> n k four", four=4)
        return self.fc_cls(x).float(), deltas.float()


def mask_head(channels: int, num_classes: int) -> nn.Sequential:
    """Regions (n c 14 14) -> logits of a mask for each class (n k 28 28). Mask R-CNN, figure 4."""
    return named(
        convs=nn.Sequential(*(conv_norm(channels, channels, 3) for _ in range(4))),
        upsample=nn.ConvTranspose2d(channels, channels, 2, stride=2),
        relu=nn.ReLU(),
        conv_logits=nn.Conv2d(channels, num_classes, 1))


class Sample(NamedTuple):
    """The r boxes of an image that a stage trains on."""
    boxes: Tensor                               # (r 4)
    matched: Tensor                             # (r) number of the object that each shows, or -1
    label: Tensor                               # (r) its class; num_classes: background
    own: Tensor                                 # (r) bool: it is an object's own box


class CascadeHead(nn.Module):
    """Cascade R-CNN, section 4: each stage classifies the boxes of the one before and moves them
    nearer to objects. regions: how many of each image a stage trains on."""

    def __init__(self, channels: int, hidden: int, num_classes: int, regions=512):
        super().__init__()
        self.num_classes = num_classes
        self.regions = regions
        self.bbox_head = nn.ModuleList(BoxHead(channels, hidden, num_classes) for _ in STAGES)
        self.mask_head = nn.ModuleList(mask_head(channels, num_classes) for _ in STAGES)

    def sample(self, proposals: Tensor, target, iou: float) -> Sample:
        """Of the proposals (n 4) and the objects themselves, up to a quarter positive."""
        objects = target["boxes"]
        numbers = torch.arange(len(objects), device=objects.device)
        matched = torch.cat([numbers, match(proposals, objects, iou, iou)])
        at = sample_boxes(matched, self.regions, 0.25)
        labels = F.pad(target["labels"], (0, 1), value=self.num_classes)    # for -1, BACKGROUND
        return Sample(torch.cat([objects, proposals])[at], matched[at], labels[matched[at]],
                      at < len(objects))

    def losses(self, maps, boxes, targets, sizes) -> dict[str, Tensor]:
        """boxes [(n 4)]: proposals -> class, box and mask loss of each stage, weighted."""
        losses = {}
        for i, (iou, std, weight) in enumerate(STAGES):
            samples = [self.sample(box, target, iou) for box, target in zip(boxes, targets)]
            boxes = [x.boxes for x in samples]
            label = torch.cat([x.label for x in samples])                   # (n)
            shown = label < self.num_classes                                # (n)
            regions = [x.boxes[x.matched >= 0] for x in samples]            # [(p 4)]
            objects = [x.matched[x.matched >= 0] for x in samples]          # [(p)]
            logits, deltas = self.bbox_head[i](crop_regions(maps, boxes, 7))    # (n k+1) (n k 4)
            goal = torch.cat([t["boxes"][x] for t, x in zip(targets, objects)])     # (p 4)
            box_loss = F.l1_loss(of_class(deltas[shown], label[shown]),
                                 encode(torch.cat(regions), goal, std), reduction="sum")
            masks = self.mask_head[i](crop_regions(maps, regions, 14))      # (p k 28 28)
            masks = of_class(masks, label[shown])                           # (p 28 28)
            truth = torch.cat([crop_masks(t["masks"], x, region)
                               for t, x, region in zip(targets, objects, regions)])
            mask_loss = F.binary_cross_entropy_with_logits(masks, truth.float(), reduction="sum")
            losses[f"class_{i + 1}"] = weight * F.cross_entropy(logits, label)
            losses[f"box_{i + 1}"] = weight * (box_loss / len(label))
            losses[f"mask_{i + 1}"] = weight * mask_loss / max(masks.numel(), 1)
            # The next stage gets these boxes, moved by their class's deltas, or the likeliest
            # class's if they show no object; but not the objects' own, which it adds again.
            moving = torch.where(shown, label, logits[:, :-1].argmax(1))
            boxes = refine(boxes, deltas.detach(), moving, std, sizes)
            boxes = [box[~x.own] for box, x in zip(boxes, samples)]
        return losses

    def detect(self, maps, boxes, sizes) -> list[dict[str, Tensor]]:
        """boxes [(n 4)]: proposals -> [dict(boxes (n 4), scores (n), labels (n) int64, masks
        (n 28 28) float32)] of each image, at most 100, best first; a mask holds probabilities
        within its box."""
        refined, total = boxes, 0
        for head, (_, std, _) in zip(self.bbox_head, STAGES):
            boxes = refined                                     # by the stage before
            logits, deltas = head(crop_regions(maps, boxes, 7))             # (n k+1) (n k 4)
            refined = refine(boxes, deltas, logits[:, :-1].argmax(1), std, sizes)
            total = total + logits
        counts = [len(box) for box in boxes]
        scores = (total / len(STAGES)).softmax(1)[:, :-1].split(counts)     # [(n k)]
        results = []
        for box, score, delta, size in zip(boxes, scores, deltas.split(counts), sizes):
            which, label = (score > 0.05).nonzero(as_tuple=True)            # one may show several
            box = decode(box[which], delta[which, label], std, size)
            score = score[which, label]
            keep = batched_nms(box, score, label, 0.5)[:100]
            results.append({"boxes": box[keep], "scores": score[keep], "labels": label[keep]})
        regions = crop_regions(maps, [x["boxes"] for x in results], 14)
        label = torch.cat([x["labels"] for x in results])
        masks = sum(of_class(head(regions), label).float().sigmoid() for head in self.mask_head)
        masks = (masks / len(STAGES)).split([len(x["boxes"]) for x in results])
        return [x | {"masks": mask} for x, mask in zip(results, masks)]


class CascadeMaskRCNN(nn.Module):
    """backbone: of one map, of patches of 16 pixels. regions: of CascadeHead."""

    def __init__(self, backbone: nn.Module, num_classes=80, channels=256, hidden=1024, regions=512):
        super().__init__()
        self.backbone = backbone
        self.neck = SimpleFeaturePyramid(backbone.cfg.embed_dim, channels)
        self.rpn_head = RPNHead(channels)
        self.roi_head = CascadeHead(channels, hidden, num_classes, regions)
        init_heads(self)

    def forward(self, images: Tensor, targets=None, sizes=None,
                originals=None) -> list[dict[str, Tensor]] | dict[str, Tensor]:
        """Normalised images (b 3 height width), padded at the right and below -> [dict(boxes (n 4),
        scores (n), labels (n) int64, masks (n height width) bool)] of each image, at most 100, best
        first; with targets, the losses {name: scalar} to be added.

        sizes: default (height, width). originals: sizes that the images had, default the same, in
        which results are given. ValueError: a target has no area or is of no class."""
        sizes = sizes or [tuple(images.shape[2:])] * len(images)
        images = F.pad(images, (0, -images.shape[3] % 32, 0, -images.shape[2] % 32))    # fills p5
        maps = self.neck(self.backbone.forward_intermediates(images)[0])    # p2 .. p6
        logits, deltas = self.rpn_head(maps)
        anchors = make_anchors(maps)
        count = 1000 if targets is None else 2000
        proposals = self.rpn_head.propose(logits, deltas, anchors, sizes, count)
        boxes = [box for box, _ in proposals]
        if targets is not None:
            check_targets(targets, self.roi_head.num_classes)
            losses = self.rpn_head.losses(logits, deltas, anchors, targets)
            return losses | self.roi_head.losses(maps, boxes, targets, sizes)
        results = self.roi_head.detect(maps, boxes, sizes)
        return [in_original_size(x, size, original)
                for x, size, original in zip(results, sizes, originals or sizes)]


def check_targets(targets, num_classes: int) -> None:
    for target in targets:
        boxes, labels = target["boxes"], target["labels"]
        flat = (boxes[:, 2:] <= boxes[:, :2]).any()
        unknown = (labels < 0) | (labels >= num_classes)
        if flat or unknown.any():
            raise ValueError(f"each target needs an area and one of {num_classes} classes: "
                             f"boxes {boxes.tolist()}, labels {labels.tolist()}")
