"""
What a segmenter or a detector says of images: how right it is, and a picture of it.

Segmentation is measured by the intersection over union of each class, detection by pycocotools'
average precision.  Symbols: b images, k classes, n objects found, h, w pixels.
"""
import colorsys
import contextlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision.ops import box_convert
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

import data
import runs
import training
from dense_heads import IGNORE_INDEX, segment

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)      # of --multi-scale


# ---- Segmentation --------------------------------------------------------------------------------

def count_confusions(labels: Tensor, predicted: Tensor, k: int) -> Tensor:
    """labels, predicted: any shape -> (k k) int64, how many pixels of which label became what."""
    known = labels != IGNORE_INDEX
    pairs = labels[known] * k + predicted[known]
    return pairs.bincount(minlength=k * k).reshape(k, k)


def iou_of(confusion: Tensor) -> Tensor:
    """(k k) -> (k) intersection over union in percent; NaN: a class neither there nor predicted."""
    hit = confusion.diag().double()
    return 100 * hit / (confusion.sum(0) + confusion.sum(1) - hit)


def class_map(args: runs.Options, ctx: training.Context, model: nn.Module, image: Tensor,
              size: Sequence[int], **options) -> Tensor:
    """image (1 3 h w) -> the likeliest class (1 *size) of each pixel. options: of segment."""
    probabilities = segment(model, image.to(ctx.device), size, crop=args.img_size,
                            stride=args.img_size * 2 // 3, **options)
    return probabilities.argmax(1)


@torch.no_grad()
def evaluate_segmenter(args: runs.Options, ctx: training.Context, model: nn.Module, loader
                       ) -> tuple[dict, Tensor]:
    """-> {"miou", "pixels": percent of the labelled pixels that are right, "images"}, IoU of each
    class (k)."""
    k = len(loader.dataset.dataset.classes)
    confusion = torch.zeros(k, k, dtype=torch.long, device=ctx.device)
    images = torch.zeros((), device=ctx.device)
    options = {}
    if args.multi_scale:
        options = {"scales": SCALES, "flip": True}
    for image, labels in filter(None, loader):
        with torch.autocast(ctx.device.type, torch.bfloat16, enabled=args.amp):
            predicted = class_map(args, ctx, model, image, labels.shape[1:], **options)
        confusion += count_confusions(labels.to(ctx.device), predicted, k)
        images += 1
    seen = ctx.sum(images).item()
    runs.require_images(seen)
    confusion = ctx.sum(confusion)
    iou = iou_of(confusion)
    pixels = 100 * (confusion.diag().sum() / confusion.sum()).item()
    return {"miou": iou.nanmean().item(), "pixels": pixels, "images": seen}, iou


# ---- Detection -----------------------------------------------------------------------------------

@torch.no_grad()
def evaluate_detector(args: runs.Options, ctx: training.Context, model: nn.Module, loader
                      ) -> tuple[dict, None]:
    """-> {"box_ap", "mask_ap", both also at IoU 0.5 and 0.75, in percent, "images"}, None."""
    dataset = loader.dataset.dataset
    results, ids = [], []
    for images, _, infos in filter(None, loader):
        with torch.autocast(ctx.device.type, torch.bfloat16, enabled=args.amp):
            outputs = model(images.to(ctx.device), sizes=[info["size"] for info in infos],
                            originals=[info["original"] for info in infos])
        for info, output in zip(infos, outputs):
            ids.append(info["id"])
            results += coco_results(info["id"], dataset.category_ids, output)
    everyone = ctx.gather((results, ids))
    results = [result for theirs, _ in everyone for result in theirs]
    ids = sorted(number for _, theirs in everyone for number in theirs)
    runs.require_images(len(ids))
    return average_precision(dataset.coco, results, ids), None


def coco_results(image_id: int, category_ids: list, output: dict[str, Tensor]) -> list[dict]:
    """What the detector says of an image, in COCO's format of results."""
    masks = rearrange(output["masks"].byte(), "n h w -> h w n").cpu().numpy()
    masks = data.extra("pycocotools.mask").encode(masks.copy(order="F"))
    boxes = box_convert(output["boxes"], "xyxy", "xywh").tolist()
    scores = output["scores"].tolist()
    return [{"image_id": image_id, "category_id": category_ids[label], "score": score, "bbox": box,
             "segmentation": mask}
            for label, score, box, mask in zip(output["labels"].tolist(), scores, boxes, masks)]


def average_precision(coco, results: list[dict], ids: list[int]) -> dict:
    """coco: pycocotools' ground truth. ids: of the images looked at."""
    metrics = {"images": len(ids)}
    for kind, name, other in (("bbox", "box", "segmentation"), ("segm", "mask", "bbox")):
        values = [0.0] * 3
        if results:                             # pycocotools cannot do without
            # A result is small, medium or large by its own kind of area: it may have one only.
            of_kind = [{key: result[key] for key in result if key != other} for result in results]
            values = coco_statistics(coco, of_kind, kind, ids)[:3]
        for iou, value in zip(("", "50", "75"), values):
            metrics[f"{name}_ap{iou}"] = 100 * float(value)
    return metrics


def coco_statistics(coco, results: list[dict], kind: str, ids: list[int]) -> Sequence[float]:
    """Average precisions, first that over all IoUs, at IoU 0.5 and at 0.75; without the prints."""
    with contextlib.redirect_stdout(None):
        evaluation = data.extra("pycocotools.cocoeval").COCOeval(coco, coco.loadRes(results), kind)
        evaluation.params.imgIds = ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


MEASURES = {"seg": evaluate_segmenter, "det": evaluate_detector}

# ---- Pictures ------------------------------------------------------------------------------------


def colour(label: int) -> tuple[int, ...]:
    """Hues at the golden angle do not come close to each other soon."""
    saturation = 0.5 if label % 3 == 1 else 1.0
    rgb = colorsys.hsv_to_rgb(label * 0.618034 % 1, saturation, 1.0)
    return tuple(round(255 * part) for part in rgb)


@torch.no_grad()
def draw_prediction(args: runs.Options, ctx: training.Context, model: nn.Module, classes: list[str],
                    pixels: Tensor) -> Image.Image:
    """pixels (3 h w) uint8 -> a picture of what the model says of them, with 200 to 1600 pixels on
    its long side."""
    long = max(pixels.shape[1:])
    zoom = min(max(1, 400 // long), 1600 / long)
    size = [max(1, round(length * zoom)) for length in pixels.shape[1:]]
    canvas = F.interpolate(pixels[None].float(), size, mode="area")[0].byte()       # (3 *size)
    draw = {"seg": draw_classes, "det": draw_objects}[args.task]
    return draw(args, ctx, model, classes, pixels, canvas)


def draw_objects(args, ctx, model, classes, pixels, canvas) -> Image.Image:
    nothing = {"id": 0, "labels": torch.zeros(0), "masks": pixels[:0]}
    image, _, info = data.DetectionTransform(args.img_size, False)(pixels, nothing)
    [result] = model(image[None].to(ctx.device), sizes=[info["size"]],
                     originals=[tuple(canvas.shape[1:])])
    sure = result["scores"] >= 0.5
    if sure.any():
        result = {name: values[sure].cpu() for name, values in result.items()}
        labels = result["labels"].tolist()
        colours = [colour(label) for label in labels]
        texts = [f"{classes[label]} {score:.2f}"
                 for label, score in zip(labels, result["scores"].tolist())]
        canvas = draw_segmentation_masks(canvas, result["masks"], 0.5, colours)
        canvas = draw_bounding_boxes(canvas, result["boxes"], texts, colours, width=2)
    return to_pil_image(canvas)


def draw_classes(args, ctx, model, classes, pixels, canvas) -> Image.Image:
    """With a legend at the right."""
    height, width = canvas.shape[1:]
    image, _ = data.SegmentationTransform(args.img_size, False)(pixels, pixels[0])
    predicted = class_map(args, ctx, model, image[None], (height, width))[0].cpu()
    shown = predicted.unique()                                                      # (classes)
    colours = [colour(label) for label in shown.tolist()]
    canvas = draw_segmentation_masks(canvas, predicted == shown[:, None, None], 0.5, colours)
    canvas = to_pil_image(F.pad(canvas, (0, 120, 0, max(0, 14 * len(shown) + 12 - height))))
    pencil = ImageDraw.Draw(canvas)
    for line, label in enumerate(shown.tolist()):
        pencil.text((width + 8, 6 + 14 * line), classes[label], fill=colours[line])
    return canvas
