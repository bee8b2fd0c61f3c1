"""UperNet and Cascade Mask R-CNN: parity with the released heads, and every step against a naive
one written here."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

import fastvim

pytest.importorskip("torchvision")

import boxes as box_tools
import checkpoints
import dense_heads as dense
from boxes import BACKGROUND, IGNORED
from test_golden import read


def backbone(taps, img_size=64, embed_dim=32):
    return fastvim.FastVim(img_size=img_size, embed_dim=embed_dim, depth=max(taps) + 1,
                           block_norm="layernorm",
                           num_classes=0, out_indices=taps)


def segmenter(classes=5, embed_dim=16):
    """Seeded, in eval mode, no weight at 0 or 1."""
    torch.manual_seed(0)
    return perturb(dense.UperNet(backbone([0, 1, 2, 3], 32, embed_dim), classes, 8, 4)).eval()


def detector(classes=3, img_size=64):
    torch.manual_seed(0)
    return perturb(dense.CascadeMaskRCNN(backbone([1], img_size), classes, 16, 24)).eval()


def perturb(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return model


def random_boxes(n, H, W, smallest=2.0):
    """(n 4) within H x W, with corners between pixels."""
    size = smallest + torch.rand(n, 2) * (torch.tensor([W, H]) / 2 - smallest)
    corner = torch.rand(n, 2) * (torch.tensor([W, H]) - size)
    return torch.cat([corner, corner + size], 1)


def target_of(boxes, labels, H=64, W=64):
    """A target whose objects are ellipses that fill their boxes."""
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    x, y = torch.arange(W) + 0.5, torch.arange(H)[:, None] + 0.5
    masks = [((x - (l + r) / 2) / (r - l)) ** 2 + ((y - (t + b) / 2) / (b - t)) ** 2 <= 0.25
             for l, t, r, b in boxes.tolist()]
    return dict(boxes=boxes, labels=torch.tensor(labels, dtype=torch.long),
                masks=torch.stack(masks) if masks else torch.zeros(0, H, W, dtype=torch.bool))


EMPTY = target_of([], [])
STAGES = [(0.5, (0.1, 0.2), 1.0),               # recipe: IoU, std, weight
          (0.6, (0.05, 0.1), 0.5),
          (0.7, (0.033, 0.067), 0.25)]


# ---- parity with the released models -------------------------------------------------------------


def compare_upernet():
    """-> {output: largest absolute error}"""
    meta, weights, io = read("upernet")
    D = meta["in_channels"]
    model = dense.UperNet(backbone([0, 1, 2, 3], 32, D), meta["num_classes"], meta["channels"],
                          len(weights["auxiliary_head.convs.0.bn.bias"])).eval()
    own = {k: v for k, v in model.state_dict().items() if k.startswith("backbone.")}
    model.load_state_dict(own | weights, strict=True)
    maps = [io[f"io/f{i}"] for i in range(4)]
    with torch.no_grad():
        outputs = model.decode_head(maps), model.auxiliary_head(maps[dense.AUXILIARY_TAP])
    return {k: (y - io[f"io/{k}"]).abs().max().item() for k, y in zip(("y", "aux"), outputs)}


def in_order_of(found, scores, boxes):
    """found, in the reference's order where that rests on a score's last digits: neighbours of
    equal scores, give or take 1e-6, change places if then both boxes come nearer to the
    reference's."""
    order = list(range(len(scores)))
    for i in (scores[:-1] - scores[1:] < 1e-6).nonzero().flatten().tolist():
        first, second = (found["boxes"][k] for k in order[i:i + 2])
        straight = (first - boxes[i]).abs().max(), (second - boxes[i + 1]).abs().max()
        crossed = (second - boxes[i]).abs().max(), (first - boxes[i + 1]).abs().max()
        if crossed[0] < straight[0] and crossed[1] < straight[1]:
            order[i], order[i + 1] = order[i + 1], order[i]
    return {k: v[order] for k, v in found.items()}


def compare_detector():
    """-> {output: largest absolute error}; of labels and masks the share that differs."""
    meta, weights, io = read("cascade_mask_rcnn")
    taps = fastvim.FastVim(img_size=tuple(meta["img_size"]), embed_dim=meta["dim"],
                           depth=meta["depth"],
                           block_norm="layernorm", num_classes=0, out_indices=[meta["depth"] - 1])
    model = dense.CascadeMaskRCNN(taps, meta["nc"], meta["ch"], meta["fc"]).eval()
    model.load_state_dict(checkpoints.from_released(weights), strict=True)
    pairs = {}
    with torch.no_grad():
        maps = model.neck(taps.forward_intermediates(io["io/x"])[0])
        logits, deltas = model.rpn_head(maps)
        [(proposals, scores)] = model.rpn_head.propose(logits, deltas, box_tools.make_anchors(maps),
                                                       [(128, 128)], 1000)
        [found] = model(io["io/x"])
    found = in_order_of(found, io["io/scores"], io["io/boxes"])
    for i in range(5):
        pairs[f"p{i + 2}"] = maps[i]
        pairs[f"rpn_cls_p{i + 2}"] = rearrange(logits[i], "b (h w a) -> b a h w", a=3,
                                               h=maps[i].shape[2])
        pairs[f"rpn_reg_p{i + 2}"] = rearrange(deltas[i], "b (h w a) k -> b (a k) h w", a=3,
                                               h=maps[i].shape[2])
    pairs |= dict(proposals=proposals, proposal_scores=scores, boxes=found["boxes"],
                  scores=found["scores"])
    assert all(pairs[k].shape == io[f"io/{k}"].shape for k in pairs)
    errors = {k: (v - io[f"io/{k}"]).abs().max().item() for k, v in pairs.items()}
    shape = tuple(io["io/masks_shape"].tolist())
    masks = np.unpackbits(io["io/masks"].numpy())[:math.prod(shape)]
    masks = torch.from_numpy(masks.reshape(shape)).bool()
    assert found["masks"].shape == shape and found["masks"].dtype == torch.bool
    return errors | dict(labels=(found["labels"] != io["io/labels"]).float().mean().item(),
                         masks=(found["masks"] != masks).sum().item() / masks.sum().item())


def test_upernet_agrees_with_the_released_heads():
    assert max(compare_upernet().values()) <= 1e-4


def test_detector_agrees_with_the_released_one():
    errors = compare_detector()
    assert errors.pop("boxes") <= 1e-2 and errors.pop("proposals") <= 1e-2
    assert errors.pop("labels") == 0
    assert errors.pop("masks") <= 1e-3          # of the pixels that show an object
    assert max(errors.values()) <= 1e-4, errors


# ---- segmentation --------------------------------------------------------------------------------


def windowed(x):
    """A stand-in for a model, of which each window sees itself only: (B 3 H W) -> (B 2 H W)."""
    return torch.stack([x.sum(1) + x.mean((1, 2, 3))[:, None, None], x[:, 0].cumsum(2)], 1)


@pytest.mark.parametrize("size", [(16, 16), (10, 12), (17, 33), (40, 9), (27, 48)])
def test_sliding_window_is_the_mean_over_windows(size):
    torch.manual_seed(0)
    x, crop, stride = torch.randn(2, 3, *size), 16, 11
    values = [[[] for _ in range(size[1])] for _ in range(size[0])]
    tops, lefts = [], []
    for starts, length in ((tops, size[0]), (lefts, size[1])):
        starts.append(0)
        while starts[-1] + crop < length:                    # until the last window reaches the end
            starts.append(min(starts[-1] + stride, length - crop))
    for top in tops:
        for left in lefts:
            y = windowed(x[:, :, top:top + crop, left:left + crop])
            for i in range(y.shape[2]):
                for j in range(y.shape[3]):
                    values[top + i][left + j].append(y[:, :, i, j])
    expected = torch.stack([torch.stack([torch.stack(v).mean(0) for v in row], -1)
                            for row in values], -2)
    torch.testing.assert_close(dense.slide(windowed, x, crop, stride), expected)


def test_windows_are_of_the_training_size():
    seen = []
    dense.slide(lambda x: seen.append(x.shape[2:]) or x, torch.zeros(1, 3, 512, 1000))
    assert seen == [(512, 512)] * 3                                         # 0, 341, 488


def test_scales_and_mirror_images_are_averaged_as_probabilities():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 20, 24)
    resize = lambda v, size: F.interpolate(v, size, mode="bilinear", align_corners=False)
    expected = 0
    for size in ((20, 24), (10, 12), (30, 36)):
        scaled = resize(x, size)
        straight = dense.slide(windowed, scaled, 16, 11)
        mirrored = torch.flip(dense.slide(windowed, torch.flip(scaled, [-1]), 16, 11), [-1])
        expected = expected + resize(straight, (7, 9)).softmax(1)
        expected = expected + resize(mirrored, (7, 9)).softmax(1)
    actual = dense.segment(windowed, x, (7, 9), (1.0, 0.5, 1.5), True, 16, 11)
    torch.testing.assert_close(actual, expected / 6)
    torch.testing.assert_close(dense.segment(windowed, x), windowed(x).softmax(1))


def test_segmentation_losses_are_the_mean_cross_entropy_of_all_pixels():
    model, x = segmenter(), torch.randn(2, 3, 32, 48)
    labels = torch.randint(0, 5, (2, 32, 48))
    labels[:, :20] = 255
    maps = model.backbone.forward_intermediates(x)
    outputs = (("decode", model.decode_head(maps), 1),
               ("auxiliary", model.auxiliary_head(maps[2]), 0.4))
    for name, logits, weight in outputs:
        p = F.interpolate(logits, (32, 48), mode="bilinear",
                          align_corners=False).softmax(1).double()
        picked = [p[b, labels[b, i, j], i, j].log() for b in range(2) for i in range(20, 32)
                  for j in range(48)]
        torch.testing.assert_close(model(x, labels)[name].double(),
                                   -sum(picked) * weight / labels.numel())
    losses = model(x, torch.full_like(labels, 255))
    assert losses.keys() == {"decode", "auxiliary"} and sum(losses.values()) == 0
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_segmenter_takes_images_that_fill_no_whole_patches():
    model, x = segmenter(), torch.randn(1, 3, 40, 21)
    padded = F.pad(x, (0, 11, 0, 8))
    assert model(x).shape == (1, 5, 40, 21)
    torch.testing.assert_close(model(x), model(padded)[..., :40, :21])


def test_gradients_reach_every_parameter_of_the_segmenter():
    model = segmenter().train()
    sum(model(torch.randn(2, 3, 32, 32), torch.randint(0, 5, (2, 32, 32))).values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None
            or not p.grad.abs().sum() > 0] == []


def test_dropout_of_channels_comes_before_both_classifiers():
    model, maps = segmenter(), [torch.randn(1, 16, 4, 4) for _ in range(4)]
    for head, x in ((model.decode_head, maps), (model.auxiliary_head, maps[2])):
        inputs = []
        head.conv_seg.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        head(x), head.dropout.train(), [head(x) for _ in range(100)]
        whole, kept = inputs[0], torch.cat(inputs[1:])                      # (1 C h w) (100 C h w)
        scale = kept.sum((2, 3)) / whole.sum((2, 3))               # (100 C) of each channel, as one
        torch.testing.assert_close(kept, whole * scale[..., None, None])
        dropped = scale == 0
        assert (((scale - 1 / 0.9).abs() < 1e-5) | dropped).all()
        assert 0.03 < dropped.float().mean() < 0.2


# ---- boxes ---------------------------------------------------------------------------------------


def naive_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def naive_match(boxes, objects, negative, positive, weakest=None):
    iou = [[naive_iou(b, o) for o in objects.tolist()] for b in boxes.tolist()]
    result = []
    for row in iou:
        best = max(row, default=0)
        if best >= positive:
            result.append(row.index(best))
        else:
            result.append(BACKGROUND if best < negative else IGNORED)
    for o in range(len(objects) if weakest is not None else 0):
        best = max(row[o] for row in iou)
        for b, row in enumerate(iou):
            if row[o] == best >= weakest:
                result[b] = o
    return result


def test_matching_by_hand():
    objects = torch.tensor([[0.0, 0, 10, 10], [100, 0, 140, 10], [200, 0, 210, 10]])
    boxes = torch.tensor([
        [0.0, 0, 10, 10],                       # object 0 exactly
        [0, 0, 10, 8],                          # IoU 0.8
        [0, 0, 10, 5],                          # 0.5: neither
        [0, 0, 10, 2],                          # 0.2: background
        [100, 0, 116, 10],                      # 0.4, the most that any has with object 1
        [124, 0, 140, 10],                      # 0.4 as well
        [200, 0, 202, 10],                      # 0.2, the most with object 2, but below 0.3
        [50, 50, 60, 60]])                      # nothing
    expected = [0, 0, IGNORED, BACKGROUND, IGNORED, IGNORED, BACKGROUND, BACKGROUND]
    assert box_tools.match(boxes, objects, 0.3, 0.7).tolist() == expected
    expected[4:6] = [1, 1]
    assert box_tools.match(boxes, objects, 0.3, 0.7, weakest=0.3).tolist() == expected
    expected[6] = 2
    assert box_tools.match(boxes, objects, 0.3, 0.7, weakest=0.1).tolist() == expected
    assert box_tools.match(boxes, objects, 0.5, 0.5).tolist() == [0, 0, 0] + [BACKGROUND] * 5
    assert box_tools.match(boxes, objects[:0], 0.3, 0.7, weakest=0.3).tolist() == [BACKGROUND] * 8


def test_an_object_keeps_its_best_box_though_another_overlaps_it_more():
    objects = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 4]])
    boxes = torch.tensor([[0.0, 0, 10, 9]])     # 0.9 with the first, 0.44 with the second, its only
    assert box_tools.match(boxes, objects, 0.3, 0.7, weakest=0.3).tolist() == [1]


@pytest.mark.parametrize("seed", range(3))
def test_matching_of_random_boxes(seed):
    torch.manual_seed(seed)
    boxes, objects = random_boxes(200, 40, 40).round(), random_boxes(5, 40, 40).round()
    boxes, objects = boxes.double(), objects.double()
    for arguments in ((0.3, 0.7, 0.3), (0.3, 0.7), (0.5, 0.5)):
        matched = box_tools.match(boxes, objects, *arguments)
        assert matched.tolist() == naive_match(boxes, objects, *arguments)


def test_drawing_prefers_positives_up_to_their_share():
    matched = torch.tensor([3] * 50 + [BACKGROUND] * 300 + [IGNORED] * 100)[torch.randperm(450)]
    for count, share, positives, negatives in ((256, 0.5, 50, 206), (64, 0.5, 32, 32),
                                               (400, 0.25, 50, 300)):
        torch.manual_seed(1)
        at = box_tools.sample_boxes(matched, count, share)
        assert len(at.unique()) == len(at)
        assert ((matched[at] == 3).sum(), (matched[at] == BACKGROUND).sum(), len(at)) == (
            positives, negatives, positives + negatives)
        again = box_tools.sample_boxes(matched, count, share)           # others, unless it took all
        assert (set(again.tolist()) == set(at.tolist())) == (len(at) == 350)
        torch.manual_seed(1)
        assert at.equal(box_tools.sample_boxes(matched, count, share))


def test_deltas_by_hand_and_back():
    box, other = torch.tensor([[10.0, 20, 30, 60]]), torch.tensor([[14.0, 16, 54, 36]])
    deltas = torch.tensor([[0.7, -0.35, math.log(2), math.log(0.5)]])    # centers 20, 40 and 34, 26
    torch.testing.assert_close(box_tools.encode(box, other, (1.0, 1.0)), deltas)
    torch.testing.assert_close(box_tools.encode(box, other, (0.1, 0.2)),
                               deltas / torch.tensor([0.1, 0.1, 0.2, 0.2]))
    torch.manual_seed(0)
    boxes, objects = random_boxes(50, 60, 90), random_boxes(50, 60, 90)
    for std in (dense.RPN_STD, *(std for _, std, _ in STAGES)):
        back = box_tools.decode(boxes, box_tools.encode(boxes, objects, std), std, (60, 90))
        torch.testing.assert_close(back, objects, atol=1e-4, rtol=1e-5)
    big = box_tools.decode(box, torch.tensor([[0.0, 0, 99, -99]]), (1.0, 1.0), (10_000, 10_000))
    expected = torch.tensor([[0, 40 - 0.32, 20 + 625, 40 + 0.32]])      # 20 and 40 px, 62.5 times
    torch.testing.assert_close(big, expected)
    assert box_tools.decode(box, torch.zeros(1, 4), (1.0, 1.0),
                            (50, 25)).tolist() == [[10, 20, 25, 50]]


def test_anchors_by_hand():
    maps = [torch.zeros(1, 1, h, w) for h, w in ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1))]
    anchors = box_tools.make_anchors(maps)
    assert [len(a) for a in anchors] == [3 * 96, 3 * 24, 18, 6, 3]
    r = math.sqrt(2)
    for level, stride in enumerate((4, 8, 16, 32, 64)):
        half = 4 * stride
        expected = [[-half * r, -half / r, half * r, half / r], [-half] * 2 + [half] * 2,
                    [-half / r, -half * r, half / r, half * r]]
        torch.testing.assert_close(anchors[level][:3], torch.tensor(expected))
    cell = anchors[0].reshape(8, 12, 3, 4)[5, 7, 1]                # row 5, column 7, the square one
    assert cell.tolist() == [28 - 16, 20 - 16, 28 + 16, 20 + 16]


def test_regions_come_from_the_map_of_their_size():
    maps = [torch.full((2, 1, 256 // s, 256 // s), float(s)) for s in (4, 8, 16, 32, 64)]
    maps = [torch.cat([x[:1], -x[1:]]) for x in maps]              # the second image's are negative
    sizes = [8, 111, 112, 223.9, 224, 250]
    boxes = torch.tensor([[1, 1, 1 + s, 1 + s] for s in sizes] + [[3.0, 3, 3, 3]])
    strides = box_tools.crop_regions(maps, [boxes[:4], boxes[4:]], 7)[:, 0].mean((1, 2))
    torch.testing.assert_close(strides, torch.tensor([4.0, 4, 8, 8, -16, -16, 0]))  # no area: zeros
    large = torch.tensor([[0.0, 0, 1000, 1000]])
    assert box_tools.crop_regions(maps, [large, large[:0]], 7)[0, 0, 0, 0] == 32


def test_regions_are_aligned_with_their_pixels():
    cells = (torch.arange(16) + 0.5) * 4                   # a map whose cells know their center's x
    maps = [cells.expand(1, 1, 16, 16)] + [torch.zeros(1, 1, 64 // s, 64 // s) for s in (8, 16, 32)]
    box = torch.tensor([[10.0, 12, 38, 40]])                                # bins of 4 pixels
    torch.testing.assert_close(box_tools.crop_regions(maps, [box], 7)[0, 0],
                               (12 + 4 * torch.arange(7.0)).expand(7, 7))


def test_masks_are_pasted_into_their_boxes():
    torch.manual_seed(0)
    masks, boxes, H, W = torch.rand(9, 28, 28), random_boxes(9, 30, 44), 30, 44
    boxes[0] = torch.tensor([-5.0, -3, 20, 50])                           # reaches beyond the image
    boxes[1] = torch.tensor([7.0, 7, 7, 7])                               # no area, nothing to show
    x, y = torch.arange(W) + 0.5, torch.arange(H) + 0.5
    actual = box_tools.paste_masks(masks, boxes, (H, W))
    for mask, (left, top, right, bottom), pasted in zip(masks, boxes.tolist(), actual):
        if right == left:
            assert not pasted.any()
            continue
        grid = torch.stack(torch.meshgrid((x - left) / (right - left) * 2 - 1,
                                          (y - top) / (bottom - top) * 2 - 1,
                                          indexing="xy"), -1)
        expected = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0] >= 0.5
        assert (pasted != expected).sum() <= 1              # a pixel at 0.5 may fall to either side
    full = box_tools.paste_masks(torch.ones(1, 28, 28), torch.tensor([[3.0, 4, 20, 11]]), (H, W))[0]
    assert full.sum() == 17 * 7 and full[4:11, 3:20].all()


# ---- the detector's losses -----------------------------------------------------------------------


def naive_l1(boxes, objects, deltas, std):
    """The sum over pairs of |delta - encoded delta|, one number after another."""
    total = 0
    for b, o, d in zip(boxes.tolist(), objects.tolist(), deltas):
        w, h = b[2] - b[0], b[3] - b[1]
        goal = [(o[0] + o[2] - b[0] - b[2]) / 2 / w / std[0],
                (o[1] + o[3] - b[1] - b[3]) / 2 / h / std[0],
                math.log((o[2] - o[0]) / w) / std[1], math.log((o[3] - o[1]) / h) / std[1]]
        total = total + sum((d[i] - g).abs() for i, g in enumerate(goal))
    return total


def test_rpn_losses_are_the_mean_over_drawn_anchors():
    torch.manual_seed(0)
    head, anchors = dense.RPNHead(4), [random_boxes(60, 64, 64, 8), random_boxes(40, 64, 64, 8)]
    logits = [torch.randn(2, len(a)) for a in anchors]
    deltas = [torch.randn(2, len(a), 4) for a in anchors]
    target, flat = target_of(random_boxes(4, 64, 64, 8), [0, 1, 2, 0]), torch.cat(anchors)
    losses = head.losses(logits, deltas, anchors, [target, EMPTY])   # fewer than 256: all are drawn
    matched = naive_match(flat, target["boxes"], 0.3, 0.7, 0.3)
    used = [i for i, m in enumerate(matched) if m != IGNORED]
    shown = [i for i, m in enumerate(matched) if m >= 0]
    assert 4 <= len(shown) < len(used) < 100
    p = torch.cat(logits, 1).sigmoid()
    entropy = -sum((p[0, i] if i in shown else 1 - p[0, i]).log()
                   for i in used) - (1 - p[1]).log().sum()
    count = len(used) + 100
    torch.testing.assert_close(losses["rpn_class"], entropy / count)
    box = naive_l1(flat[shown], target["boxes"][[matched[i] for i in shown]],
                   torch.cat(deltas, 1)[0, shown], (1, 1))
    torch.testing.assert_close(losses["rpn_box"], box / count)


def naive_mask_target(mask, box):
    """(28 28): the mean of bilinear samples, as many in a bin as it is pixels wide, rounded up; cut
    at 0.5."""
    left, top, right, bottom = box.tolist()
    n = [max(math.ceil(s / 28), 1) for s in (right - left, bottom - top)]
    x = left + (torch.arange(28 * n[0]) + 0.5) * (right - left) / (28 * n[0])
    y = top + (torch.arange(28 * n[1]) + 0.5) * (bottom - top) / (28 * n[1])
    H, W = mask.shape
    grid = torch.stack(torch.meshgrid(x / W * 2 - 1, y / H * 2 - 1, indexing="xy"), -1)
    values = F.grid_sample(mask[None, None].float(), grid[None], padding_mode="border",
                           align_corners=False)[0, 0]
    return rearrange(values, "(h a) (w b) -> h w (a b)", h=28, w=28).mean(-1) >= 0.5


def test_cascade_losses_are_those_of_each_stage():
    torch.manual_seed(0)
    head = perturb(dense.CascadeHead(8, 12, 3))
    for box_head in head.bbox_head:             # boxes that move
        torch.nn.init.normal_(box_head.fc_reg.weight, std=0.2)
    maps = [torch.randn(2, 8, 64 // s, 64 // s) for s in (4, 8, 16, 32, 64)]
    target = target_of([[4, 6, 30, 40], [20, 10, 60, 52], [8, 40, 22, 61]], [2, 0, 1])
    sizes = [(64, 64), (60, 50)]
    proposals = [torch.cat([target["boxes"].repeat(12, 1) + 4 * torch.randn(36, 4),
                            random_boxes(20, 64, 64)]),
                 random_boxes(30, 60, 50)]
    losses = head.losses(maps, proposals, [target, EMPTY], sizes)    # fewer than 512: all are drawn
    assert len(losses) == 9
    # A stage's boxes are given: its losses do not train the stage before.
    first = head.bbox_head[0].fc_reg.weight
    assert torch.autograd.grad(losses["box_2"], first, retain_graph=True,
                               allow_unused=True) == (None,)
    for stage, (iou, std, weight) in enumerate(STAGES):
        entropy, box_loss, mask_loss, count, masks, refined = 0, 0, 0, 0, 0, []
        for image, (boxes, objects) in enumerate(zip(proposals, (target["boxes"], EMPTY["boxes"]))):
            matched = [*range(len(objects)), *naive_match(boxes, objects, iou, iou)]
            boxes = torch.cat([objects, boxes])
            of_image = [[boxes, boxes[:0]], [boxes[:0], boxes]][image]
            logits, deltas = head.bbox_head[stage](box_tools.crop_regions(maps, of_image, 7))
            stencils = head.mask_head[stage](box_tools.crop_regions(maps, of_image, 14)).sigmoid()
            kept = []
            for i, m in enumerate(matched):
                label = target["labels"][m].item() if m >= 0 else 3
                entropy, count = entropy - logits[i].softmax(0)[label].log(), count + 1
                if m >= 0:
                    box_loss = box_loss + naive_l1(boxes[i:i + 1], objects[m:m + 1],
                                                   deltas[i:i + 1, label], std)
                    truth, p = naive_mask_target(target["masks"][m], boxes[i]), stencils[i, label]
                    mask_loss = mask_loss - torch.where(truth, p, 1 - p).log().mean()
                    masks += 1
                label = label if m >= 0 else logits[i, :3].argmax()
                if i >= len(objects):
                    kept.append(box_tools.decode(boxes[i], deltas[i, label], std,
                                                 sizes[image]).detach())
            refined.append(torch.stack(kept))
        assert 5 < masks < 60 and count == 89
        for name, value in (("class", entropy / count), ("box", box_loss / count),
                            ("mask", mask_loss / masks)):
            rtol = 2e-3 if name == "mask" else 1e-4     # a mean of samples may be 0.5, give or take
            torch.testing.assert_close(losses[f"{name}_{stage + 1}"], weight * value, atol=1e-5,
                                       rtol=rtol)
        proposals = refined


def test_objects_train_their_own_class_even_if_another_has_the_same_box():
    head, objects = dense.CascadeHead(4, 4, 3), torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 9]])
    boxes, matched, label, own = head.sample(objects[:1] + 40,
                                             dict(boxes=objects, labels=torch.tensor([2, 1])), 0.5)
    sampled = sorted(zip(matched.tolist(), label.tolist(), own.tolist()))
    assert sampled == [(-1, 3, False), (0, 2, True), (1, 1, True)]
    torch.manual_seed(0)
    many = torch.cat([objects[:1].expand(700, 4), objects[:1].expand(700, 4) + 40])
    boxes, matched, label, own = head.sample(many,
                                             dict(boxes=objects[:1], labels=torch.tensor([2])), 0.5)
    assert len(boxes) == 512 and (label == 2).sum() == 128 and (label == 3).sum() == 384


def losses_of(model, targets, seed=3):
    torch.manual_seed(seed)
    images = torch.randn(len(targets), 3, 64, 64)
    model.zero_grad()
    losses = model(images, targets)
    sum(losses.values()).backward()
    return losses


def test_gradients_reach_every_parameter_of_the_detector():
    model = detector().train()
    target = target_of([[4, 6, 30, 40], [20, 10, 60, 52]], [2, 0])
    losses = losses_of(model, [target, EMPTY])
    assert len(losses) == 11 and all(loss > 0 for loss in losses.values())
    assert [n for n, p in model.named_parameters() if p.grad is None
            or not p.grad.abs().sum() > 0] == []
    losses = losses_of(model, [target, EMPTY])
    again = model(torch.randn(2, 3, 64, 64), [target, EMPTY])      # nor do they train the proposals
    assert torch.autograd.grad(again["box_1"], model.rpn_head.rpn_reg.weight,
                               allow_unused=True) == (None,)
    again = losses_of(model, [target, EMPTY])
    assert all(losses[k].equal(again[k]) for k in losses)


@pytest.mark.parametrize("targets", [[EMPTY, EMPTY], [target_of([[17, 30, 18, 31]], [1])]],
                         ids=["none", "one pixel"])
def test_images_without_objects_and_objects_of_one_pixel(targets):
    model = detector().train()
    losses = losses_of(model, targets)
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    shown = len(targets[0]["boxes"]) > 0
    assert all((losses[f"mask_{i}"] > 0) == shown for i in (1, 2, 3))


@pytest.mark.parametrize("target", [target_of([[5, 5, 5, 9]], [0]), target_of([[5, 5, 9, 9]], [3]),
                                    target_of([[5, 5, 9, 9]], [-1])],
                                    ids=["no area", "class 3", "class -1"])
def test_impossible_targets_are_refused(target):
    with pytest.raises(ValueError, match="an area and one of 3 classes"):
        detector()(torch.zeros(1, 3, 64, 64), [target])


# ---- the detector's results ----------------------------------------------------------------------


def test_results_lie_within_the_image_and_come_in_its_own_size():
    model, images = detector(), torch.randn(2, 3, 45, 36)
    with torch.no_grad():
        whole, part = model(images, sizes=[(45, 36), (40, 24)])
        _, scaled = model(images, sizes=[(45, 36), (40, 24)], originals=[(45, 36), (20, 72)])
        # It pads to multiples of 32 itself.
        [alone] = model(F.pad(images[:1], (0, 28, 0, 19)), sizes=[(45, 36)])
    assert len(whole["boxes"]) == 100 and whole["masks"].shape == (100, 45, 36)
    for k in whole:
        torch.testing.assert_close(alone[k], whole[k])
    reach = part["boxes"].amax(0)[2:] / torch.tensor([24, 40])
    assert (part["boxes"] >= 0).all() and (0.99 < reach).all() and (reach <= 1).all()
    assert part["masks"].shape[1:] == (40, 24) and scaled["masks"].shape[1:] == (20, 72)
    torch.testing.assert_close(scaled["boxes"], part["boxes"] * torch.tensor([3, 0.5, 3, 0.5]))
    for found in (whole, part):
        assert (found["scores"].diff() <= 0).all() and (found["scores"] > 0.05).all()
        assert found["labels"].dtype == torch.int64 and set(found["labels"].tolist()) <= {0, 1, 2}


def test_a_detector_that_is_sure_of_background_finds_nothing():
    model = detector()
    for head in model.roi_head.bbox_head:
        head.fc_cls.bias.data[3] = 50
    [found] = model(torch.randn(1, 3, 64, 64))
    shapes = {k: tuple(v.shape) for k, v in found.items()}
    assert shapes == dict(boxes=(0, 4), scores=(0,), labels=(0,), masks=(0, 64, 64))


def test_training_draws_its_boxes_from_two_thousand_proposals(monkeypatch):
    model, counts = detector(), []
    propose = model.rpn_head.propose
    monkeypatch.setattr(model.rpn_head, "propose", lambda *args: counts.append(args[-1])
                        or propose(*args))
    model(torch.randn(1, 3, 64, 64), [EMPTY])
    model(torch.randn(1, 3, 64, 64))
    assert counts == [2000, 1000]


def test_initialisation():
    torch.manual_seed(0)
    encoder = backbone([1])
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    model = dense.CascadeMaskRCNN(encoder, 80, 32, 64)
    assert all(v.equal(before[k]) for k, v in encoder.state_dict().items())
    expected = {"rpn_head.rpn_conv.0.conv": 0.01, "rpn_head.rpn_reg": 0.01,
                "roi_head.bbox_head.2.fc_cls": 0.01,
                "roi_head.bbox_head.0.fc_reg": 0.001,
                "roi_head.mask_head.1.convs.2.conv": (2 / (9 * 32)) ** 0.5,
                "roi_head.bbox_head.1.shared_fcs.0": (2 / (49 * 32)) ** 0.5}
    for name, std in expected.items():
        layer = model.get_submodule(name)
        assert abs(layer.weight.std().item() / std - 1) < 0.1, name
        assert layer.bias is None or not layer.bias.any()
    head = dense.UperNet(backbone([0, 1, 2, 3]), 150, 64).decode_head
    assert abs(head.conv_seg.weight.std() / 0.01 - 1) < 0.1


if __name__ == "__main__":
    for name, error in (compare_upernet() | compare_detector()).items():
        print(f"{name:20} {error:.1e}")
