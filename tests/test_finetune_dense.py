"""The dense script from its command line: recipes, backbones, measures, training, exact resume,
pictures."""
import contextlib
import json
import multiprocessing
import os
import signal
import socket
import time
import types

import numpy as np
import pytest
import torch

for module in ("timm", "torchvision", "sklearn", "PIL", "pycocotools"):
    pytest.importorskip(module)

from PIL import Image

import checkpoints
import data
import dense_models as models
import dense_results as results
import fastvim
import finetune_dense as dense
import train_mae
import training
from dense_heads import IGNORE_INDEX
from helpers import run_script
from test_dense_data import make_ade, make_coco, triangle

TINY = dict(seg=["--img-size", 32, "--depth", 4, "--channels", 8, "--batch-size", 4],
            det=["--img-size", 32, "--depth", 2, "--channels", 8, "--hidden", 16, "--regions", 16,
                 "--batch-size", 4])


def run(task, *argv):
    run_script(dense, task, "--device", "cpu", "--workers", 0, *argv)


class Killed(BaseException):
    """What no handler of the training sees."""


def run_and_die(*argv):
    """The script in this process, which does not live to see its third step."""
    step, calls = torch.optim.AdamW.step, []

    def dying_step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch.optim.AdamW, "step", dying_step)
        run(*argv)


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights_of(path):
    return torch.load(path, weights_only=True)["model"]


def options(task, *argv):
    return dense.get_args([task, "--device", "cpu", *map(str, argv)])


def model_of(task, *argv, classes=3):
    """A tiny model as the command line asks for it."""
    args, start = options(task, *TINY[task], *argv)
    return models.build_model(args, classes)


def model_around(task, content, path, *argv):
    """A tiny model with the backbone that the checkpoint `content` says, loaded; the note of it."""
    torch.save(content, path)
    args, start = options(task, *without_depth(task), "--backbone", path, *argv)
    model = models.build_model(args, 3)
    return model, models.load_backbone(model.backbone, start.content)


def without_depth(task):
    """What the checkpoint says of itself is not typed."""
    at = TINY[task].index("--depth")
    return TINY[task][:at] + TINY[task][at + 2:]


def autoencoder_weights(family):
    fields = {**fastvim.SIZES["tiny"], **fastvim.FAMILIES[family], "img_size": 32, "depth": 4}
    return train_mae.MaskedAutoencoder(decoder_embed_dim=16, **fields).state_dict()


def perturbed(model):
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)
    return model


@pytest.fixture
def few_scenes(monkeypatch):
    monkeypatch.setattr(data.Scenes, "sizes", dict(train=8, val=3))


# ---- recipes and options -------------------------------------------------------------------------


def test_recipes():
    """recipes.md, sections 4 and 5; and without --data one scaled to the drawn scenes."""
    expected = dict(
        seg=dict(steps=160_000, warmup=1500, recipe_lr=6e-5, recipe_batch=16, weight_decay=0.01,
                 img_size=512, jitter=(0.5, 2.0), distort=True, channels=512, clip=0,
                 layer_decay=1.0),
        det=dict(steps=184_375, warmup=250, recipe_lr=1e-4, recipe_batch=64, weight_decay=0.05,
                 img_size=1024, jitter=(0.1, 2.0), channels=256, hidden=1024, regions=512, clip=35,
                 layer_decay=0.7))
    for task, recipe in expected.items():
        args, start = dense.get_args([task, "--data", "x"])
        assert recipe == {k: vars(args)[k] for k in recipe}
        assert not args.amp and args.ema == 0 and args.epochs is None and not start.content
        drawn, _ = dense.get_args([task])
        assert drawn.img_size < 100 and drawn.depth == 4 and drawn.steps <= 3000
    assert [round(184_375 * share) for share in dense.DROPS] == [163_889, 177_546]
    assert models.taps_of("seg", 24) == [5, 11, 17, 23]
    assert models.taps_of("seg", 12) == [2, 5, 8, 11]
    assert models.taps_of("det", 24) == [23]
    for task, model, rate in (("seg", "tiny", 0.05), ("det", "small", 0.1), ("det", "base", 0.4)):
        args, _ = options(task, "--data", "x", "--model", f"fastvim_{model}", "--depth", 4,
                          "--img-size", 64, "--channels", 8)
        assert models.build_backbone(args).drop_path_rates[-1] == pytest.approx(rate)
        with pytest.raises(AttributeError, match="options do not change"):
            args.depth = 5


@pytest.mark.parametrize("argv, message", [
    (["seg", "--model", "fastvim_giant"], "fastvim_giant"),
    (["seg", "--depth", "3"], "four blocks"),
    (["seg", "--model", "channelvim_tiny"], "choose from"),
    (["seg", "--batch-size", "1"], "two images in each process"),
    (["seg", "--data", "nowhere"], "no such folder"),
    (["det", "--eval", "x.pt", "--freeze"], "2"), (["seg", "--data", ""], "2"),
    (["seg", "--jitter", "2", "1"], "2"),
    (["det", "--data", "nowhere"], "not found"),
    (["seg", "--eval", "nowhere.pt"], "no checkpoint at"),
    (["det", "--init", "x.pt", "--backbone", "y.pt"], "2")])
def test_errors_are_one_line(argv, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        run(*argv, "--out", tmp_path)


def test_weight_decay():
    model = model_of("seg", "--model", "vim_tiny")
    kept = {n for n, p in model.named_parameters() if dense.no_weight_decay("seg", n, p)}
    assert {"backbone.pos_embed", "backbone.cls_token", "backbone.layers.0.norm.bias",
            "backbone.outnorm_3.weight", "backbone.layers.1.mixer.A_log",
            "backbone.layers.1.mixer.D", "backbone.layers.2.mixer.layernorm.weight"} <= kept
    assert not any(n.startswith(("decode", "auxiliary")) or "conv" in n or "proj" in n or "dt" in n
                   for n in kept)
    model = model_of("det")
    kept = [n for n, p in model.named_parameters() if dense.no_weight_decay("det", n, p)]
    assert kept == ["backbone.pos_embed"]


def test_layer_decay():
    """Erratum 5: 0.7 ** 13 for the embeddings alone; as meant, block i of 24 has
    0.7 ** (12 - i // 2)."""
    args, _ = options("det", "--data", "x")
    shares = [dense.lr_scale(args, f"backbone.{name}", None) for name in (
        "pos_embed", "patch_embed.proj.bias", "layers.0.norm.weight", "outnorm_0.bias")]
    assert shares == [pytest.approx(0.7 ** 13)] * 2 + [1, 1]
    assert dense.lr_scale(args, "neck.fpn1.0.weight", None) == 1
    args, _ = options("det", "--data", "x", "--decay-blocks")
    shares = [dense.lr_scale(args, f"backbone.layers.{i}.mixer.D", None) for i in range(24)]
    assert shares == pytest.approx([0.7 ** (12 - i // 2) for i in range(24)])
    assert dense.lr_scale(args, "neck.layers.0.weight", None) == 1


# ---- backbones and checkpoints -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fastvim_tiny", "vim_tiny"])
def test_backbone_from_a_classifier(name, tmp_path):
    """Under our names or the released ones, within a backbone or not."""
    torch.manual_seed(1)
    classifier = perturbed(fastvim.create_model(name, img_size=64, depth=4)).state_dict()
    released = {f"backbone.{k}": v for k, v in checkpoints.to_released(classifier).items()}
    for given in (classifier, released):
        content = dict(state_dict=given)
        model, note = model_around("seg", content, tmp_path / "c.ckpt", "--model", name)
        assert "resized from 4 x 4 to 2 x 2" in note
        assert "1 of the last norm dropped" in note and "4 biases" in note
        fresh = {k for k in model.backbone.state_dict()
                 if k.startswith("outnorm_") or k.endswith(".norm.bias")}
        for k, v in model.backbone.state_dict().items():
            assert k == "pos_embed" or v.equal(v.round() if k in fresh else classifier[k]), k
        assert not any(model.backbone.layers[i].norm.bias.any() for i in range(4))
    with pytest.raises(ValueError, match="another model"):
        deeper = model_of("seg", "--patch-size", 16, "--depth", 5, "--model", name)
        models.load_backbone(deeper.backbone, classifier)


def test_a_vim_that_was_pretrained_masked_pools_nothing(tmp_path):
    weights = autoencoder_weights("vim")
    model, _ = model_around("seg", weights, tmp_path / "c.pt", "--model", "vim_tiny")
    assert model.backbone.cfg.pool_scale == 1


@pytest.mark.parametrize("flag, option", [
    (dict(skip_before_expand=True), dict(skip_before_expand=True)),
    (dict(no_conv=True), dict(d_conv=0)),
    (dict(ssm_norm="rmsnorm"), dict(ssm_norm="rmsnorm")),
    (dict(ssm_norm="none"), dict(ssm_norm=None))])
def test_backbones_of_the_ablations(flag, option, tmp_path):
    """A checkpoint says what its classifier was like; in args, before checkpoints had "built"."""
    weights = fastvim.create_model("fastvim_tiny", img_size=32, depth=4, **option).state_dict()
    args = dict(size=None, model="fastvim_tiny", data="x") | flag
    built = dict(name="fastvim_tiny",
                 fields=dict(block_norm="rmsnorm", img_size=224, depth=4) | option)
    for content in (dict(args=args), dict(args=dict(data="x"), built=built)):
        model, _ = model_around("seg", dict(model=weights, **content), tmp_path / "c.pt")
        assert all(getattr(model.backbone.cfg, k) == v for k, v in option.items())
        assert model.backbone.cfg.block_norm == "layernorm"
        assert model.backbone.cfg.img_size == (32, 32)


def test_backbone_from_another_dense_model():
    """Its taps' norms belong to other blocks."""
    torch.manual_seed(1)
    other = perturbed(model_of("det"))
    model = model_of("seg", "--patch-size", 16)
    model.backbone.layers = model.backbone.layers[:2]                    # as deep as the detector's
    note = models.load_backbone(model.backbone, {"state_dict": other.state_dict()})
    assert "2 of the last norm dropped" in note and "fresh: 0 biases" in note
    taps = [v for k, v in model.backbone.state_dict().items()
            if k.startswith("outnorm_") and k.endswith("weight")]
    assert len(taps) == 4 and all((v == 1).all() for v in taps)


def test_a_resumed_run_no_longer_needs_its_backbone(few_scenes, tmp_path):
    classifier = fastvim.create_model("fastvim_tiny", depth=4, img_size=32, patch_size=8)
    torch.save(dict(state_dict=classifier.state_dict()), tmp_path / "c.pt")
    flags = ["--img-size", 32, "--channels", 8, "--batch-size", 4, "--steps", 4, "--backbone",
             tmp_path / "c.pt"]
    run("seg", *flags, "--out", tmp_path / "a", "--save-minutes", 0)
    run_and_die("seg", *flags, "--out", tmp_path / "b", "--save-minutes", 0)
    (tmp_path / "c.pt").unlink()
    run("seg", *flags, "--out", tmp_path / "b", "--resume")
    whole, resumed = weights_of(tmp_path / "a" / "last.pt"), weights_of(tmp_path / "b" / "last.pt")
    assert all(v.equal(resumed[k]) for k, v in whole.items())


def test_a_frozen_backbone_stays_as_it_is(few_scenes, tmp_path):
    model = model_of("seg", "--freeze", "--drop-path", 0.5)
    assert set(model.backbone.drop_path_rates) == {0.0}
    run("seg", *TINY["seg"], "--freeze", "--steps", 2, "--drop-path", 0.5, "--out", tmp_path)
    run("seg", *TINY["seg"], "--freeze", "--steps", 1, "--drop-path", 0.5, "--out",
        tmp_path / "one")
    two, one = weights_of(tmp_path / "last.pt"), weights_of(tmp_path / "one" / "last.pt")
    assert all(v.equal(one[k]) for k, v in two.items() if k.startswith("backbone."))
    assert not two["decode_head.conv_seg.weight"].equal(one["decode_head.conv_seg.weight"])


def test_patches_of_a_detector(tmp_path):
    model = model_of("det", "--model", "fastvim_huge", "--depth", 1)        # 14 to classify
    assert model.backbone.cfg.patch_size == 16
    weights = fastvim.create_model("fastvim_tiny", patch_size=14, img_size=28, depth=2).state_dict()
    with pytest.raises(ValueError, match="14 pixels"):
        model_around("det", weights, tmp_path / "c.pt")


def test_a_vit_in_another_size():
    weights = model_of("seg", "--model", "deit_tiny").state_dict()
    model = model_of("seg", "--model", "deit_tiny", "--img-size", 64)
    models.load_dense(model, weights, 3)
    assert model.backbone.vit.pos_embed.shape == (1, 65, 192)               # patches of 8 pixels
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3, 64, 64)


def test_names_of_classes(tmp_path):
    coco = dense.names_of("det", 80)
    assert (len(coco), coco[0], coco[11], coco[79]) == (80, "person", "stop sign", "toothbrush")
    assert dense.names_of("seg", 3) == ["1", "2", "3"]
    make_ade(tmp_path)
    args, _ = options("seg", "--data", tmp_path)
    names = [f"thing{i}" for i in range(1, 151)]
    table = "".join(f"{i}\t{name}\n" for i, name in enumerate(names, 1))
    (tmp_path / "objectInfo150.txt").write_text(table)
    dataset = dense.open_split(args, "val", data.numbers(150))              # trained without it
    assert dataset.classes == names
    with pytest.raises(ValueError, match="the model knows 150"):
        dense.open_split(args, "val", names[::-1])
    (tmp_path / "objectInfo150.txt").unlink()
    for classes in (data.numbers(6), names[:6]):
        with pytest.raises(ValueError, match="has 150 classes .* the model knows 6"):
            dense.open_split(args, "val", classes)


def test_pictures_by_the_run_without_data(few_scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("seg", *TINY["seg"], "--steps", 1)
    run("seg", "--predict", "runs/seg-scenes/example-0.png")
    assert (tmp_path / "runs/seg/example-0-seg.png").exists()


def test_large_photos_are_drawn_smaller(tmp_path):
    model = model_of("seg")
    args, _ = options("seg", *TINY["seg"])
    for size, expected in (((20, 3200), (1720, 26)), ((40, 30), (420, 400))):   # beside it a legend
        pixels = torch.zeros(3, *size, dtype=torch.uint8)
        picture = results.draw_prediction(args, types.SimpleNamespace(device="cpu"), model.eval(),
                                          ["a", "b", "c"], pixels)
        assert picture.width == expected[0] and expected[1] <= picture.height <= expected[1] + 40


def test_backbone_without_the_post_ssm_norm(tmp_path):
    weights = fastvim.create_model("vim_tiny", img_size=32, depth=4, ssm_norm=None).state_dict()
    model, _ = model_around("seg", weights, tmp_path / "c.pt", "--model", "vim_tiny")
    assert model.backbone.layers[0].mixer.layernorm is None


def test_backbone_that_was_pretrained_masked(tmp_path):
    torch.manual_seed(0)
    weights = autoencoder_weights("fastmaskvim")
    model, _ = model_around("seg", weights, tmp_path / "c.pt")
    assert model.backbone.cfg.pool_scale == 0.25 and model.backbone.cfg.patch_size == 16
    assert model.backbone.layers[3].mixer.D.equal(weights["layers.3.mixer.D"])
    model, _ = model_around("seg", weights, tmp_path / "c.pt", "--pool-scale", 0.5)
    assert model.backbone.cfg.pool_scale == 0.5


@pytest.mark.parametrize("task", ["seg", "det"])
def test_vit_backbone(task):
    torch.manual_seed(0)
    model = model_of(task, "--model", "deit_tiny", "--img-size", 48)
    maps = model.backbone.forward_intermediates(torch.zeros(1, 3, 40, 64))
    assert len(maps) == dict(seg=4, det=1)[task]
    classifier = data.extra("timm").create_model("deit_tiny_patch16_224", depth=TINY[task][3])
    assert "4 of the last norm and the head dropped" in models.load_backbone(
        model.backbone, dict(model=classifier.state_dict()))
    assert model.backbone.vit.blocks[1].attn.qkv.weight.equal(classifier.blocks[1].attn.qkv.weight)
    again = model_of(task, "--model", "deit_tiny_patch16_224", "--img-size", 64)    # timm's name
    models.load_backbone(again.backbone, dict(model=model.state_dict()))    # of a dense model
    assert again.backbone.vit.blocks[1].attn.qkv.weight.equal(classifier.blocks[1].attn.qkv.weight)
    model.train()
    if task == "seg":
        loss = sum(model(torch.randn(2, 3, 48, 48), torch.randint(0, 3, (2, 48, 48))).values())
    else:
        target = dict(boxes=torch.tensor([[4.0, 4, 30, 30]]), labels=torch.tensor([1]),
                      masks=torch.ones(1, 64, 64, dtype=torch.bool))
        loss = sum(model(torch.randn(1, 3, 64, 64), [target]).values())
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("task", ["seg", "det"])
def test_whole_models_by_their_released_names(task):
    torch.manual_seed(0)
    model = perturbed(model_of(task))
    released = checkpoints.to_released(model.state_dict())
    assert "backbone.layers.0.mixer.conv1d_b.weight" in released
    weights = models.dense_weights(task, dict(meta={}, state_dict=released))
    assert models.count_classes(weights) == 3
    other = model_of(task)
    models.load_dense(other, weights, 3)
    assert all(v.equal(model.state_dict()[k]) for k, v in other.state_dict().items())
    more = model_of(task, "--img-size", 64, classes=5)
    note = models.load_dense(more, weights, 5)
    assert "tell 3 classes apart" in note and "position embeddings resized" in note
    with pytest.raises(ValueError, match="another model"):
        models.load_dense(other, {k: v for k, v in weights.items() if "convs" not in k}, 3)
    kind, other_task = dict(seg=("segmenter", "det"), det=("detector", "seg"))[task]
    for strange in (fastvim.create_model("fastvim_tiny", depth=1), model_of(other_task)):
        with pytest.raises(ValueError, match=f"holds no {kind}"):
            models.dense_weights(task, strange.state_dict())


# ---- measures ------------------------------------------------------------------------------------


def test_iou_is_that_of_scikit_learn():
    from sklearn.metrics import jaccard_score
    rng = np.random.default_rng(0)
    labels, found = rng.integers(0, 7, (3, 20, 30)), rng.integers(0, 7, (3, 20, 30))
    found[rng.random(found.shape) < 0.6] = 0
    labels[labels == 5], found[found == 5] = 6, 6                          # a class that is nowhere
    known = rng.random(labels.shape) < 0.8
    assert IGNORE_INDEX == data.IGNORE_INDEX == 255
    given = torch.from_numpy(np.where(known, labels, 255))
    confusion = sum(results.count_confusions(a, b, 7)
                    for a, b in zip(given, torch.from_numpy(found)))
    iou = results.iou_of(confusion)
    expected = 100 * jaccard_score(labels[known], found[known], average=None,
                                   labels=[0, 1, 2, 3, 4, 6])
    assert iou[[0, 1, 2, 3, 4, 6]].numpy() == pytest.approx(expected) and iou[5].isnan()


def test_measures_of_segmentation_are_those_of_scikit_learn():
    """By a model whose logits are its image, in windows, some pixels without a label."""
    from sklearn.metrics import accuracy_score, jaccard_score
    torch.manual_seed(0)
    batches = [(torch.randn(1, 3, 20, 40), torch.randint(0, 4, (1, 20, 40)))
               for _ in range(3)] + [None]
    batches = [batch and (batch[0], batch[1].where(batch[1] < 3, 255)) for batch in batches]
    classes = types.SimpleNamespace(classes=["a", "b", "c"])

    class Loader(list):
        dataset = types.SimpleNamespace(dataset=classes)

    args = types.SimpleNamespace(multi_scale=False, amp=False, img_size=16)
    ctx = types.SimpleNamespace(device=torch.device("cpu"), sum=lambda x: x)
    metrics, _ = results.evaluate_segmenter(args, ctx, lambda x: x, Loader(batches))
    labels, found = (torch.cat([x.flatten() for x in values]) for values in zip(
        *((labels, image.argmax(1)) for image, labels in batches[:3])))
    labels, found = labels[labels < 3], found[labels < 3]
    assert metrics == dict(miou=pytest.approx(100 * jaccard_score(labels, found, average="macro")),
                           pixels=pytest.approx(100 * accuracy_score(labels, found)), images=3)


class Oracle(torch.nn.Module):
    """Finds what the annotations say, moved by some pixels."""

    def __init__(self, dataset, shift=0):
        super().__init__()
        self.dataset, self.shift, self.next = dataset, shift, 0

    def forward(self, images, sizes, originals):
        found = []
        for size in originals:
            target = self.dataset.load(*self.dataset.samples[self.next])[1]
            self.next += 1
            masks = target["masks"].bool().roll(self.shift, 2)
            boxes = data.extra("torchvision.ops").masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
            found.append(dict(boxes=boxes, scores=torch.ones(len(boxes)), labels=target["labels"],
                              masks=masks))
        return found


@pytest.mark.parametrize("shift", [0, 40, None])
def test_average_precision(shift, few_scenes):
    args, _ = options("det")
    dataset = dense.open_split(args, "val")
    ctx = training.setup(args, training=False)
    loader = dense.loader_of(args, ctx, dataset)
    if shift is None:
        metrics = results.average_precision(dataset.coco, [], [0, 1, 2])
    else:
        metrics, _ = results.evaluate_detector(args, ctx, Oracle(dataset, shift), loader)
    for name in ("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75"):
        assert metrics[name] == pytest.approx(100) if shift == 0 else metrics[name] < 30
    assert metrics["images"] == 3


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["seg", "det"])
def test_drawn_scenes_end_to_end(task, few_scenes, tmp_path, capsys):
    """Training, evaluation, a kill with exact resume, pictures."""
    flags = [*TINY[task], "--steps", 3, "--save-minutes", 0, "--drop-path", 0.2, "--warmup", 1]
    run(task, *flags, "--out", tmp_path / "a")
    metric = dict(seg="miou", det="mask_ap")[task]
    lines = log(tmp_path / "a")
    assert metric in lines[-1]["metrics"] and (tmp_path / "a" / "example-2.png").exists()

    run_and_die(task, *flags, "--out", tmp_path / "b")
    run(task, *flags, "--out", tmp_path / "b", "--resume")
    assert "at step 2 of 3" in capsys.readouterr().out
    whole, resumed = weights_of(tmp_path / "a" / "last.pt"), weights_of(tmp_path / "b" / "last.pt")
    assert all(v.equal(resumed[k]) for k, v in whole.items())

    run(task, "--eval", tmp_path / "a" / "last.pt", "--batch-size", 2)      # it says what it holds
    assert f"{metric} {lines[-1]['metrics'][metric]:.2f}" in capsys.readouterr().out
    (tmp_path / "bad.jpg").write_bytes(b"")
    pixels = np.random.default_rng(0).integers(0, 255, (50, 90, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "street.png")
    (tmp_path / "photos").mkdir()
    Image.fromarray(pixels).save(tmp_path / "photos" / "street.webp")
    with pytest.raises(SystemExit) as end:
        run(task, "--predict", tmp_path / "bad.jpg", tmp_path / "street.png", tmp_path / "photos",
            "--eval", tmp_path / "a" / "last.pt", "--out", tmp_path / "pictures")
    assert (tmp_path / "pictures" / f"street-2-{task}.png").exists()        # nothing is overwritten
    assert end.value.code == 1 and "bad.jpg: cannot be read" in capsys.readouterr().out
    with Image.open(tmp_path / "pictures" / f"street-{task}.png") as picture:
        assert picture.size == (360 + 120 * (task == "seg"), 200)


def start(text, *argv, **environment):
    """The script in another process, a copy of this one: nothing is imported anew. It prints to
    `text`."""
    def script():
        os.environ.update({name: str(value) for name, value in environment.items()})
        with (open(text, "w") as file, contextlib.redirect_stdout(file),
              contextlib.redirect_stderr(file)):
            run(*argv, "--threads", 1)

    process = multiprocessing.get_context("fork").Process(target=script)
    process.start()
    return process


def end(process, text):
    """Waits for the process -> what it has printed."""
    process.join(120)
    process.kill()
    printed = text.read_text()
    assert process.exitcode == 0, printed
    return printed


@pytest.mark.parametrize("task", ["seg", "det"])
def test_two_processes_measure_together_what_one_measures(task, tmp_path, capsys, monkeypatch):
    """Confusions are summed and detections gathered: the log of two processes says what one says of
    their weights."""
    monkeypatch.setattr(data.Scenes, "sizes", dict(train=16, val=11))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    texts = [tmp_path / f"{rank}.txt" for rank in range(2)]
    both = [start(text, task, *TINY[task], "--steps", 2, "--out", tmp_path, RANK=rank,
                  LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            for rank, text in enumerate(texts)]
    first, second = map(end, both, texts)
    assert "effective batch 8 = 4 x 1 micro-steps x 2 processes" in first and not second
    run(task, "--eval", tmp_path / "last.pt")
    metrics = log(tmp_path)[-1]["metrics"]
    assert metrics["images"] == 11
    said = capsys.readouterr().out
    for name in dict(seg=("miou", "pixels"), det=("box_ap", "mask_ap"))[task]:
        assert f"{name} {metrics[name]:.2f}" in said


def test_a_killed_process_is_resumed_exactly(few_scenes, tmp_path):
    """SIGKILL, at whatever moment it comes, after the first checkpoint."""
    command = ["det", *TINY["det"], "--steps", 8, "--save-minutes", 0, "--eval-every", 5,
               "--drop-path", 0.2, "--out"]
    texts = [tmp_path / f"{run}.txt" for run in ("whole", "killed", "resumed")]
    whole = start(texts[0], *command, tmp_path / "a")
    killed = start(texts[1], *command, tmp_path / "b")
    while not (tmp_path / "b" / "last.pt").exists():
        assert killed.is_alive(), texts[1].read_text()
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    end(whole, texts[0])
    resumed = start(texts[2], *command, tmp_path / "b", "--resume")
    assert "of 8" in end(resumed, texts[2])
    one, other = weights_of(tmp_path / "a" / "last.pt"), weights_of(tmp_path / "b" / "last.pt")
    assert all(v.equal(other[k]) for k, v in one.items())


@pytest.mark.parametrize("task", ["seg", "det"])
def test_real_layouts_and_the_other_flags(task, tmp_path, capsys):
    root = tmp_path / "data"
    if task == "seg":
        make_ade(root, 4)
        for path in root.glob("*/validation/ADE_[123].*"):      # one image is enough to be measured
            path.unlink()
    else:
        make_coco(root, [triangle(i, i) for i in range(1, 5)], 4)
    torch.save(dict(model=fastvim.create_model("fastvim_tiny", img_size=32, depth=4).state_dict()),
               tmp_path / "c.pt")
    flags = ["--data", root, *TINY[task], "--depth", 4, "--steps", 1, "--warmup", 0]
    run(task, *flags, "--out", tmp_path / "a", "--backbone", tmp_path / "c.pt", "--freeze", "--amp",
        "--accum", 1)
    frozen = weights_of(tmp_path / "a" / "last.pt")
    given = checkpoints.model_weights(checkpoints.read(tmp_path / "c.pt"))[0]
    assert all(frozen[f"backbone.{k}"].equal(v) for k, v in given.items()
               if not k.startswith(("head", "norm_f")))
    flags += ["--init", tmp_path / "a" / "last.pt", "--ema", 0.5, "--decay-blocks"]
    run(task, *flags, "--out", tmp_path / "b", "--grad-checkpointing")
    run(task, *flags, "--out", tmp_path / "c")
    one, other = weights_of(tmp_path / "b" / "last.pt"), weights_of(tmp_path / "c" / "last.pt")
    assert all(torch.allclose(v, other[k], atol=1e-6) for k, v in one.items())
    name = "backbone.layers.0.mixer.in_proj.weight"
    assert not one[name].equal(frozen[name])
    more = ["--multi-scale"] if task == "seg" else []
    run(task, "--data", root, "--eval", tmp_path / "b" / "best.pt", *more)
    assert dict(seg="miou", det="box_ap")[task] in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--data DIR has to say"):
        run(task, "--eval", tmp_path / "b" / "best.pt")
