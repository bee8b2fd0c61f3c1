"""
Dense prediction with FastVim: UperNet for segmentation (section 4.5), Cascade Mask R-CNN for detection (section 4.6).

Both take what single blocks of the backbone put out, a map with a vector for each patch, and add heads that are older
than Mamba. Written from their papers, with torchvision's operators, under the released checkpoints' parameter names:

    UperNet         Xiao et al. 2018, Unified Perceptual Parsing for Scene Understanding
    PSPNet          Zhao et al. 2017, Pyramid Scene Parsing Network: its pooling pyramid, its auxiliary loss
    Fast R-CNN, Faster R-CNN    Girshick 2015; Ren et al. 2015: regions, anchors, box deltas, their losses
    FPN, Mask R-CNN             Lin et al. 2017; He et al. 2017: regions at several scales, RoIAlign, masks
    Cascade R-CNN               Cai, Vasconcelos 2018: three stages, each of which refines the boxes of the last
    ViTDet                      Li et al. 2022: maps of several scales from the last one of a plain backbone

Symbols, the same everywhere:

    B  images     C  channels     K  classes     h, w  size of a map     H, W  size of the images in pixels
    A  anchors of a map, 3 h w    n  boxes       m  objects              p  boxes that show an object
    D  width of the backbone
    boxes (n 4) float32: left, top, right, bottom in pixels;  [(n 4)]: a list, one for each image
    sizes [(height, width)]: of each image without the padding that makes them a batch
"""
import collections
import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torchvision.ops import batched_nms, box_area, box_convert, box_iou, clip_boxes_to_image, roi_align

# ---- What both models are made of ------------------------------------------------------------------------------------


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (B C h w); eps 1e-5, as the released detectors have it (ViTDet: 1e-6)."""

    def forward(self, x):
        return rearrange(super().forward(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")


def named(**layers):
    return nn.Sequential(collections.OrderedDict(layers))


def conv(in_channels, channels, kernel, norm=None, relu=True):
    """A convolution that keeps the size of its map, its norm and ReLU, under their released names."""
    layers = dict(conv=nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=norm is None))
    if norm:
        layers["bn" if norm is nn.BatchNorm2d else "norm_layer"] = norm(channels)
    return named(**layers, **(dict(relu=nn.ReLU()) if relu else {}))


def init_heads(model):
    """Everything but the backbone: biases 0, weights N(0, std) by this table, or N(0, sqrt(2 / fan_in)) (He et al.)."""
    stds = dict(fc_reg=0.001, fc_cls=0.01, conv_seg=0.01,                   # Fast R-CNN, section 2.3
                rpn_head=0.01)                                              # Faster R-CNN, section 3.1.3
    for name, layer in model.named_modules():
        if not name.startswith("backbone") and isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            for part in stds.keys() & set(name.split(".")):
                nn.init.normal_(layer.weight, std=stds[part])
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


# ---- Segmentation: UperNet -------------------------------------------------------------------------------------------

POOL_SCALES = (1, 2, 3, 6)                      # PSPNet, section 3.2
AUXILIARY_TAP, AUXILIARY_WEIGHT = 2, 0.4        # PSPNet, section 3.3: a loss halfway helps the blocks before it
DROPOUT = 0.1                                   # of whole channels, before the classifier
IGNORE_INDEX = 255                              # label of the pixels that nobody labelled


class UperHead(nn.Module):
    """UperNet, section 3.1: a pooling pyramid over the last map, then a feature pyramid over all four.

    A plain backbone has one resolution, so the maps of the feature pyramid are added without resizing."""

    def __init__(self, in_channels, channels, num_classes):
        super().__init__()
        block = functools.partial(conv, norm=nn.BatchNorm2d)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), block(in_channels, channels, 1)) for scale in POOL_SCALES)
        self.bottleneck = block(in_channels + len(POOL_SCALES) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(block(in_channels, channels, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(block(channels, channels, 3) for _ in range(3))
        self.fpn_bottleneck = block(4 * channels, channels, 3)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps):
        """Four maps (B C h w), of the first block to the last -> logits (B K h w)."""
        *maps, last = maps
        pooled = [F.interpolate(psp(last), last.shape[2:], mode="bilinear") for psp in self.psp_modules]
        x = self.bottleneck(torch.cat([last, *pooled], 1))                  # (B channels h w), like all that follow
        outputs = [x]
        for lateral, fpn, earlier in zip(self.lateral_convs[::-1], self.fpn_convs[::-1], maps[::-1]):
            x = x + lateral(earlier)
            outputs = [fpn(x), *outputs]
        return self.conv_seg(self.dropout(self.fpn_bottleneck(torch.cat(outputs, 1))))


class UperNet(nn.Module):
    """backbone: a FastVim with four out_indices.

    In training BatchNorm sees one value per image and channel of the coarsest pooled map, so give two images at least;
    on several GPUs convert the model to SyncBatchNorm."""

    def __init__(self, backbone, num_classes=150, channels=512, auxiliary_channels=256):
        super().__init__()
        self.backbone, D = backbone, backbone.cfg.embed_dim
        self.decode_head = UperHead(D, channels, num_classes)
        self.auxiliary_head = named(                                        # a small FCN (Long et al. 2015)
            convs=nn.Sequential(conv(D, auxiliary_channels, 3, nn.BatchNorm2d)), dropout=nn.Dropout2d(DROPOUT),
            conv_seg=nn.Conv2d(auxiliary_channels, num_classes, 1))
        init_heads(self)

    def forward(self, images, labels=None):
        """Normalised images (B 3 H W) -> logits (B K H W); or, with labels (B H W) int64, which are classes or
        IGNORE_INDEX, the losses {name: scalar}, whose sum is to be minimised."""
        maps = self.backbone.forward_intermediates(images)                  # 4 x (B D h w)

        def upsample(logits):                   # the last patches may reach beyond the image
            logits = F.interpolate(logits, scale_factor=self.backbone.cfg.patch_size, mode="bilinear")
            return logits[..., :images.shape[2], :images.shape[3]]          # (B K H W)

        def loss(logits):                       # the mean over all pixels: a crop may show no labelled one
            return F.cross_entropy(upsample(logits), labels, ignore_index=IGNORE_INDEX, reduction="none").mean()

        if labels is None:
            return upsample(self.decode_head(maps))
        return dict(decode=loss(self.decode_head(maps)),
                    auxiliary=AUXILIARY_WEIGHT * loss(self.auxiliary_head(maps[AUXILIARY_TAP])))


def slide(model, images, crop=512, stride=341):
    """Logits (B K H W) of images (B 3 H W) larger than those of the training: the mean over the windows that show a
    pixel. The last window of a row or column ends where the image does; a smaller image is one window."""
    rests = [max(length - crop, 0) for length in images.shape[2:]]
    tops, lefts = ([min(start, rest) for start in range(0, rest + stride, stride)] for rest in rests)
    windows = [(..., slice(y, y + crop), slice(x, x + crop)) for y in tops for x in lefts]
    logits = [model(images[window]) for window in windows]                  # (B K crop crop)
    total = logits[0].new_zeros(*logits[0].shape[:2], *images.shape[2:])    # (B K H W)
    count = torch.zeros_like(total[:1, :1])                                 # (1 1 H W)
    for window, logit in zip(windows, logits):
        total[window] += logit
        count[window] += 1
    return total / count


def segment(model, images, size=None, scales=(1.0,), flip=False, crop=512, stride=341):
    """Class probabilities (B K *size) of images (B 3 H W); size (height, width), by default that of the images.

    They are the mean over the images resized by each of the scales and, with flip, over their mirror images."""
    total = 0
    for scale in scales:
        x = images if scale == 1 else F.interpolate(images, scale_factor=scale, mode="bilinear")
        for mirror in (False, True)[:1 + flip]:
            logits = slide(model, x.flip(3), crop, stride).flip(3) if mirror else slide(model, x, crop, stride)
            total = total + F.interpolate(logits, size or images.shape[2:], mode="bilinear").softmax(1)
    return total / (len(scales) * (1 + flip))


# ---- Detection: boxes ------------------------------------------------------------------------------------------------

STRIDES = (4, 8, 16, 32, 64)                    # pixels from one cell to the next, of the maps p2 .. p6
RATIOS, ANCHOR_CELLS = (0.5, 1.0, 2.0), 8       # height / width of the anchors, whose area is that of 8 x 8 cells
RPN_STD = (1.0, 1.0)                            # what a delta's (place, size) is divided by
STAGES = (                                      # Cascade R-CNN, section 4: IoU of a positive, std, weight of the losses
    (0.5, (0.1, 0.2), 1.0),
    (0.6, (0.05, 0.1), 0.5),
    (0.7, (0.033, 0.067), 0.25),
)
MAX_GROWTH = math.log(1000 / 16)                # no delta enlarges or shrinks a box by more
BACKGROUND, IGNORED = -1, -2                    # instead of the number of an object


def make_anchors(maps):
    """The anchors [(A 4)] of maps [(B C h w)] of STRIDES. Those of a cell lie around its upper left corner, in the
    order of RATIOS. Faster R-CNN, section 3.1.1. (torchvision's generator rounds them to whole pixels.)"""
    ratio, anchors = torch.tensor(RATIOS, device=maps[0].device), []
    shape = torch.stack([ratio ** -0.5, ratio ** 0.5], 1)                   # (3 2) width, height
    for (h, w), stride in zip((x.shape[2:] for x in maps), STRIDES):
        x, y = torch.arange(w, device=ratio.device), torch.arange(h, device=ratio.device)
        corner = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[:, :, None] * stride   # (h w 1 2) x, y
        half = shape * ANCHOR_CELLS * stride / 2                            # (3 2)
        anchors.append(rearrange([corner - half, corner + half], "side h w a xy -> (h w a) (side xy)"))
    return anchors


def encode(boxes, objects, std):
    """The deltas (n 4) that move boxes (n 4) onto objects (n 4). Fast R-CNN, section 2.3, after R-CNN, appendix C."""
    (center, extent), (goal, goal_extent) = (box_convert(x, "xyxy", "cxcywh").split(2, -1) for x in (boxes, objects))
    return torch.cat([(goal - center) / extent / std[0], (goal_extent / extent).log() / std[1]], -1)


def decode(boxes, deltas, std, size):
    """Boxes (... 4) moved by deltas (... 4) and clipped to an image of size (height, width): undoes encode."""
    center, extent = box_convert(boxes, "xyxy", "cxcywh").split(2, -1)      # (... 2) (... 2)
    move, grow = deltas.split(2, -1)
    center = center + move * std[0] * extent
    half = extent / 2 * (grow * std[1]).clamp(-MAX_GROWTH, MAX_GROWTH).exp()
    return clip_boxes_to_image(torch.cat([center - half, center + half], -1), size)


def match(boxes, objects, negative, positive, weakest=None):
    """Which of the objects (m 4) each box (n 4) shows -> (n) int64: its number, BACKGROUND or IGNORED.

    It is the object of the largest IoU if that is at least `positive`; BACKGROUND if it is below `negative`.
    weakest: an object also takes those boxes that have the largest IoU with it, if that is at least so much: objects
        that no anchor resembles would be lost otherwise (Faster R-CNN, section 3.1.2)."""
    if len(objects) == 0:
        return torch.full_like(boxes[:, 0], BACKGROUND, dtype=torch.long)
    iou = box_iou(objects, boxes)                                           # (m n)
    largest, matched = iou.max(0)                                           # (n) (n)
    matched[largest < positive] = IGNORED
    matched[largest < negative] = BACKGROUND
    if weakest is not None:
        of_object = iou.amax(1, keepdim=True)                               # (m 1)
        number = torch.arange(len(objects), device=iou.device)[:, None]     # (m 1)
        taken = torch.where((iou == of_object) & (of_object >= weakest), number, -1).amax(0)     # (n)
        matched = torch.where(taken >= 0, taken, matched)
    return matched


def draw(matched, count, share):
    """Which boxes to train on, at random: matched (n), what `match` said -> the numbers of up to `count` boxes, of
    which at most that share show an object."""
    def some(candidates, most):
        at = candidates.nonzero()[:, 0]
        return at[torch.randperm(len(at), device=at.device)[:most]]

    positive = some(matched >= 0, int(count * share))
    return torch.cat([positive, some(matched == BACKGROUND, count - len(positive))])


def of_class(x, label):
    """x (n K ...), label (n) -> (n ...)."""
    return x[torch.arange(len(x), device=x.device), label]


def refine(boxes, deltas, label, std, sizes):
    """Boxes [(n 4)], moved by the deltas (n K 4) of one class each, label (n), where n counts those of all images."""
    deltas = of_class(deltas, label).split([len(box) for box in boxes])
    return [decode(box, delta, std, size) for box, delta, size in zip(boxes, deltas, sizes)]


def crop_regions(maps, boxes, size):
    """The boxes [(n 4)] of each image, cut from its maps p2 .. p5 [(B C h w)] by RoIAlign -> (n C size size).

    A box of 224 x 224 pixels is cut from p4, one of half that size from p3 (FPN, equation 1). torchvision's
    MultiScaleRoIAlign does that by the older, unaligned RoIAlign, which is half a cell off."""
    rois = torch.cat([F.pad(box, (1, 0), value=i) for i, box in enumerate(boxes)])           # (n 5) image, box
    level = (box_area(rois[:, 1:]).sqrt() / 56).log2().floor().clamp(0, 3)  # (n)
    members = [(level == i).nonzero()[:, 0] for i in range(4)]
    regions = [roi_align(x, rois[at], size, 1 / stride, aligned=True) for x, at, stride in zip(maps, members, STRIDES)]
    return torch.cat(regions)[torch.cat(members).argsort()]


# ---- Detection: Cascade Mask R-CNN -----------------------------------------------------------------------------------


class SimpleFeaturePyramid(nn.Module):
    """ViTDet, section 3: the last map of a plain backbone, brought to four strides by transposed convolutions and
    pooling. A fifth, for large anchors, is every other cell of the fourth."""

    def __init__(self, D, channels):
        super().__init__()
        up = functools.partial(nn.ConvTranspose2d, kernel_size=2, stride=2)
        block = functools.partial(conv, norm=ChannelNorm, relu=False)
        self.fpn1 = nn.Sequential(up(D, D // 2), ChannelNorm(D // 2), nn.GELU(), up(D // 2, D // 4))
        self.fpn2 = nn.Sequential(up(D, D // 2))
        self.lateral_convs = nn.ModuleList(block(width, channels, 1) for width in (D // 4, D // 2, D, D))
        self.fpn_convs = nn.ModuleList(block(channels, channels, 3) for _ in range(4))

    def forward(self, x):
        """(B D h w) of stride 16 -> [p2 .. p6], (B C 4h 4w) to (B C h/4 w/4)."""
        maps = self.fpn1(x), self.fpn2(x), x, F.max_pool2d(x, 2)
        maps = [fpn(lateral(x)) for lateral, fpn, x in zip(self.lateral_convs, self.fpn_convs, maps)]
        return [*maps, F.max_pool2d(maps[3], 1, stride=2)]


class RPNHead(nn.Module):
    """Faster R-CNN, section 3.1: says of each anchor whether it shows an object, and how to move it there."""

    def __init__(self, channels):
        super().__init__()
        self.rpn_conv = nn.Sequential(conv(channels, channels, 3), conv(channels, channels, 3))
        self.rpn_cls = nn.Conv2d(channels, len(RATIOS), 1)
        self.rpn_reg = nn.Conv2d(channels, len(RATIOS) * 4, 1)

    def forward(self, maps):
        """Maps [(B C h w)] -> logits [(B A)] and deltas [(B A 4)] of each map."""
        maps = [self.rpn_conv(x) for x in maps]
        return ([rearrange(self.rpn_cls(x), "b a h w -> b (h w a)").float() for x in maps],
                [rearrange(self.rpn_reg(x), "b (a k) h w -> b (h w a) k", k=4).float() for x in maps])

    @torch.no_grad()
    def propose(self, logits, deltas, anchors, sizes, count):
        """The likeliest boxes -> [(boxes (n 4), scores (n))] of each image, best first: up to `count` of each map, of
        which overlapping ones are dropped (NMS), then up to `count` of all maps."""
        proposals = []
        for i, size in enumerate(sizes):
            tops = [x[i].topk(min(count, x.shape[1])) for x in logits]
            scores = torch.cat([top.values for top in tops]).sigmoid()      # (n)
            boxes = torch.cat([decode(anchor[top.indices], delta[i, top.indices], RPN_STD, size)
                               for anchor, delta, top in zip(anchors, deltas, tops)])        # (n 4)
            level = torch.cat([torch.full_like(top.indices, number) for number, top in enumerate(tops)])
            inside = (boxes[:, 2:] > boxes[:, :2]).all(1)                   # clipping leaves no area of the others
            boxes, scores, level = boxes[inside], scores[inside], level[inside]
            keep = batched_nms(boxes, scores, level, 0.7)[:count]
            proposals.append((boxes[keep], scores[keep]))
        return proposals

    def losses(self, logits, deltas, anchors, targets):
        """Faster R-CNN, equation 1 with L1: the mean over 256 anchors of each image, up to half of them positive."""
        logits, deltas, anchors = torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(anchors)
        objectness, box, count = 0, 0, 0
        for logit, delta, target in zip(logits, deltas, targets):
            matched = match(anchors, target["boxes"], 0.3, 0.7, weakest=0.3)                 # (A)
            at = draw(matched, 256, 0.5)
            shown = at[matched[at] >= 0]                                    # (p)
            goal = encode(anchors[shown], target["boxes"][matched[shown]], RPN_STD)
            objectness = objectness + F.binary_cross_entropy_with_logits(
                logit[at], (matched[at] >= 0).float(), reduction="sum")
            box = box + F.l1_loss(delta[shown], goal, reduction="sum")
            count += len(at)
        return dict(rpn_class=objectness / count, rpn_box=box / count)


class BoxHead(nn.Module):
    """Regions (n C 7 7) -> logits of the classes, background last (n K+1), and deltas for each class (n K 4)."""

    def __init__(self, channels, hidden, num_classes):
        super().__init__()
        self.shared_convs = nn.Sequential(*(conv(channels, channels, 3, ChannelNorm) for _ in range(4)))
        self.shared_fcs = nn.Sequential(nn.Linear(channels * 7 * 7, hidden), nn.ReLU())
        self.fc_cls = nn.Linear(hidden, num_classes + 1)
        self.fc_reg = nn.Linear(hidden, num_classes * 4)

    def forward(self, x):
        x = self.shared_fcs(self.shared_convs(x).flatten(1))                # (n hidden)
        return self.fc_cls(x).float(), rearrange(self.fc_reg(x), "n (k four) -> n k four", four=4).float()


def mask_head(channels, num_classes):
    """Regions (n C 14 14) -> logits of a mask for each class (n K 28 28). Mask R-CNN, figure 4."""
    return named(convs=nn.Sequential(*(conv(channels, channels, 3, ChannelNorm) for _ in range(4))),
                 upsample=nn.ConvTranspose2d(channels, channels, 2, stride=2), relu=nn.ReLU(),
                 conv_logits=nn.Conv2d(channels, num_classes, 1))


class CascadeHead(nn.Module):
    """Cascade R-CNN, section 4: each stage classifies the boxes of the one before and moves them nearer to objects."""

    def __init__(self, channels, hidden, num_classes):
        super().__init__()
        self.num_classes = num_classes
        self.bbox_head = nn.ModuleList(BoxHead(channels, hidden, num_classes) for _ in STAGES)
        self.mask_head = nn.ModuleList(mask_head(channels, num_classes) for _ in STAGES)

    def sample(self, proposals, target, iou):
        """What a stage trains on: 512 of the proposals (n 4) and the objects themselves, up to a quarter positive ->
        boxes (512 4), the object that each shows (512), its class (512), whether it is that object's own box (512)."""
        objects, K = target["boxes"], self.num_classes
        own = torch.arange(len(objects), device=objects.device)
        matched = torch.cat([own, match(proposals, objects, iou, iou)])
        at = draw(matched, 512, 0.25)
        label = F.pad(target["labels"], (0, 1), value=K)[matched[at]]       # BACKGROUND, -1, picks the K at the end
        return torch.cat([objects, proposals])[at], matched[at], label, at < len(objects)

    def losses(self, maps, boxes, targets, sizes):
        """boxes [(n 4)]: proposals -> {name: scalar}: class, box and mask loss of each stage, weighted."""
        losses, K = {}, self.num_classes
        for i, (iou, std, weight) in enumerate(STAGES):
            boxes, matched, label, own = zip(*(self.sample(x, t, iou) for x, t in zip(boxes, targets)))
            label, shown = torch.cat(label), torch.cat(matched) >= 0        # (n) (n)
            regions = [box[x >= 0] for box, x in zip(boxes, matched)]       # [(p 4)]
            objects = [x[x >= 0] for x in matched]                          # [(p)]
            logits, deltas = self.bbox_head[i](crop_regions(maps, boxes, 7))                 # (n K+1) (n K 4)
            goal = torch.cat([t["boxes"][x] for t, x in zip(targets, objects)])              # (p 4)
            box_loss = F.l1_loss(of_class(deltas[shown], label[shown]), encode(torch.cat(regions), goal, std),
                                 reduction="sum") / len(label)
            masks = of_class(self.mask_head[i](crop_regions(maps, regions, 14)), label[shown])       # (p 28 28)
            truth = torch.cat([roi_align(t["masks"][:, None].float(), torch.cat([x[:, None], region], 1), 28,
                                         aligned=True)[:, 0] for t, x, region in zip(targets, objects, regions)])
            mask_loss = F.binary_cross_entropy_with_logits(masks, (truth >= 0.5).float(), reduction="sum")
            losses |= {f"class_{i + 1}": weight * F.cross_entropy(logits, label), f"box_{i + 1}": weight * box_loss,
                       f"mask_{i + 1}": weight * mask_loss / max(masks.numel(), 1)}
            # The next stage gets these boxes, moved by their class's deltas, or the likeliest class's if they show no
            # object; but not the objects' own boxes, which it adds again.
            label = torch.where(shown, label, logits[:, :K].argmax(1))
            boxes = [box[~x] for box, x in zip(refine(boxes, deltas.detach(), label, std, sizes), own)]
        return losses

    def detect(self, maps, boxes, sizes):
        """boxes [(n 4)]: proposals -> [dict(boxes (n 4), scores (n), labels (n) int64, masks (n 28 28) float32)] of
        each image, at most 100, best first; a mask holds probabilities within its box."""
        refined, total, found = boxes, 0, []
        for head, (_, std, _) in zip(self.bbox_head, STAGES):
            boxes = refined                                                 # by the stage before
            logits, deltas = head(crop_regions(maps, boxes, 7))             # (n K+1) (n K 4)
            refined = refine(boxes, deltas, logits[:, :-1].argmax(1), std, sizes)
            total = total + logits
        scores, counts = (total / len(STAGES)).softmax(1)[:, :-1], [len(box) for box in boxes]       # (n K)
        for box, score, delta, size in zip(boxes, scores.split(counts), deltas.split(counts), sizes):
            which, label = (score > 0.05).nonzero(as_tuple=True)            # a box may show several classes
            box, score = decode(box[which], delta[which, label], std, size), score[which, label]
            keep = batched_nms(box, score, label, 0.5)[:100]
            found.append(dict(boxes=box[keep], scores=score[keep], labels=label[keep]))
        regions, label = crop_regions(maps, [x["boxes"] for x in found], 14), torch.cat([x["labels"] for x in found])
        masks = sum(of_class(head(regions), label).float().sigmoid() for head in self.mask_head) / len(STAGES)
        for x, mask in zip(found, masks.split([len(x["boxes"]) for x in found])):            # (n 28 28)
            x["masks"] = mask
        return found


def paste_masks(masks, boxes, size):
    """Masks (n 28 28), stretched over their boxes (n 4) by bilinear interpolation -> bool (n height width).

    Interpolation is a matrix product along each axis; a pixel's row of the matrix is a hat of width two around the
    place of its center in the mask. (torchvision's function first moves the boxes to whole pixels.)"""
    def hats(start, end, length):
        pixel = torch.arange(length, device=boxes.device) + 0.5                              # (length)
        place = (pixel - start[:, None]) / (end - start).clamp(min=1e-6)[:, None] * 28 - 0.5     # (n length)
        return (1 - (place[..., None] - torch.arange(28, device=boxes.device)).abs()).clamp(min=0)

    left, top, right, bottom = boxes.unbind(1)
    with torch.autocast(boxes.device.type, enabled=False):
        rows, columns = hats(top, bottom, size[0]), hats(left, right, size[1])               # (n H 28) (n W 28)
        return rows @ masks @ columns.mT >= 0.5


class CascadeMaskRCNN(nn.Module):
    """backbone: a FastVim of patch size 16 with one of out_indices, its last block."""

    def __init__(self, backbone, num_classes=80, channels=256, hidden=1024):
        super().__init__()
        self.backbone = backbone
        self.neck = SimpleFeaturePyramid(backbone.cfg.embed_dim, channels)
        self.rpn_head = RPNHead(channels)
        self.roi_head = CascadeHead(channels, hidden, num_classes)
        init_heads(self)

    def forward(self, images, targets=None, sizes=None, originals=None):
        """Normalised images (B 3 H W), padded at the right and below -> what they show, or the losses.

        targets: [dict(boxes (m 4) float32, labels (m) int64, masks (m H W) bool)] for training; m may be 0.
        sizes: default (H, W). originals: sizes before the images were resized, in which results are given.
        With targets {name: scalar}, whose sum is to be minimised; else [dict(boxes (n 4), scores (n), labels (n) int64,
            masks (n height width) bool)] of each image, at most 100, best first.
        Raises ValueError if a target has no area or is of no class."""
        sizes = sizes or [tuple(images.shape[2:])] * len(images)
        images = F.pad(images, (0, -images.shape[3] % 32, 0, -images.shape[2] % 32))         # p5 covers all of it
        maps = self.neck(self.backbone.forward_intermediates(images)[0])    # p2 .. p6
        logits, deltas = self.rpn_head(maps)
        anchors = make_anchors(maps)
        proposals = self.rpn_head.propose(logits, deltas, anchors, sizes, 1000 if targets is None else 2000)
        boxes = [box for box, _ in proposals]
        if targets is not None:
            for t in targets:
                if (t["boxes"][:, 2:] <= t["boxes"][:, :2]).any() or not (
                        (0 <= t["labels"]) & (t["labels"] < self.roi_head.num_classes)).all():
                    raise ValueError(f"each target needs an area and one of {self.roi_head.num_classes} classes: "
                                     f"boxes {t['boxes'].tolist()}, labels {t['labels'].tolist()}")
            losses = self.rpn_head.losses(logits, deltas, anchors, targets)
            return losses | self.roi_head.losses(maps, boxes, targets, sizes)
        found = self.roi_head.detect(maps, boxes, sizes)
        for x, (h, w), original in zip(found, sizes, originals or sizes):
            x["boxes"] = x["boxes"] * x["boxes"].new_tensor([original[1] / w, original[0] / h] * 2)
            x["masks"] = paste_masks(x["masks"], x["boxes"], original)
        return found
