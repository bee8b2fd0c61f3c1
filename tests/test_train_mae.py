"""The masked autoencoding script from its command line: recipes, learning-rate groups, stages, pictures, errors."""
import argparse
import json
import pathlib

import numpy as np
import pytest
import torch

for module in ("timm", "torchvision", "sklearn", "PIL"):
    pytest.importorskip(module)

from PIL import Image

import classification
import data
import fastvim
import runs
import train_imagenet
import train_mae
import training
from helpers import run_named_script, run_script, two_processes

SMALL = ["--depth", "4", "--device", "cpu", "--threads", "1"]
PRETRAIN = ["pretrain", *SMALL, "--decoder-dim", "16", "--decoder-depth", "1", "--steps", "4", "--eval-every", "1"]


def run(*argv, script=train_mae):
    run_script(script, *argv)


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    out = tmp_path_factory.mktemp("mae")
    run(*PRETRAIN, "--out", out)
    return out


FOLDER = ["--img-size", 32, "--patch-size", 8, "--depth", 2, "--batch-size", 8, "--workers", 0, "--device", "cpu"]
ONE_STEP = ["--steps", 1, "--batch-size", 8, "--workers", 0, "--device", "cpu"]


# ---- recipes ---------------------------------------------------------------------------------------------------------


def recipe(*argv, **expected):
    args = train_mae.get_args([*argv, "--data", "x", *["--scratch"] * (argv[0] != "pretrain")])[0]
    actual = {k: vars(args)[k] for k in expected}
    assert actual == pytest.approx(expected), actual
    return args


def test_recipes_of_the_paper():
    """recipes.md, section 2. Learning rates are MAE's base rates x effective batch / 256."""
    recipe("pretrain", "--size", "b", recipe_lr=2.4e-3, recipe_batch=4096, epochs=1600, warmup=40, weight_decay=0.05,
           drop_path_rate=0, crop_scale=0.2, reprob=0, mask_ratio=0.75, decoder_depth=2, decoder_dim=512, clip=0, ema=0,
           mask_divisor="axis", pool_scale=None)
    recipe("finetune", "--size", "b", recipe_lr=2e-3, recipe_batch=1024, epochs=100, warmup=5, weight_decay=0.05,
           drop_path_rate=0.3, layer_decay=0.65, decay_blocks=2, mixup=0.8, cutmix=1.0, smoothing=0.1, reprob=0.25, clip=0,
           crop_pct=None, crop_scale=0.08, ema=0)
    for size in (["--size", "l"], ["--size", "h"], ["--model", "vim_large"]):
        recipe("finetune", *size, recipe_lr=4e-3, epochs=50, layer_decay=0.75, warmup=5, drop_path_rate=0.3)
    recipe("finetune", "--size", "h", "--img-size", "448", clip=3.0, crop_pct=1.0, epochs=50)
    recipe("finetune", "--size", "h", "--img-size", "448", "--clip", "1", clip=1.0, crop_pct=1.0)
    recipe("linear", "--size", "l", recipe_lr=1.6, recipe_batch=4096, epochs=90, warmup=10, weight_decay=0,
           drop_path_rate=0, mixup=0, cutmix=0, smoothing=0, reprob=0, crop_scale=0.08)
    for stage, policy in dict(pretrain="none", linear="none", finetune="rand-m9-mstd0.5-inc1").items():
        assert recipe(stage).auto_augment == policy
    assert recipe("pretrain", "--size", "h").patch_size is None and fastvim.SIZES["huge"]["patch_size"] == 14
    assert train_mae.get_args(["pretrain"])[0].out == "runs/digits_mae"
    with pytest.raises(FileNotFoundError, match="/nowhere/last.pt"):
        train_mae.get_args(["finetune", "--init", "/nowhere/last.pt"])


def test_the_recipe_follows_the_size_of_the_checkpoint(tmp_path):
    """Without --size on the command line: that of the pretraining decides."""
    saved = dict(size="l", model=None, data="x", img_size=None, mask_ratio=0.6)
    torch.save({"args": saved, "model": {"mask_token": torch.zeros(1, 1, 4)}}, tmp_path / "l.pt")
    start = ["finetune", "--data", "x", "--init", str(tmp_path / "l.pt"), "--out", str(tmp_path)]
    args = train_mae.get_args(start)[0]
    assert (args.model, args.epochs, args.layer_decay, args.recipe_lr, args.clip) == (
        "fastvim_large", 50, 0.75, 4e-3, 0)
    assert args.pool_scale == 0.4
    args = train_mae.get_args([*start, "--epochs", "7", "--img-size", "448", "--pool-scale", "1"])[0]
    assert (args.epochs, args.layer_decay, args.clip, args.crop_pct, args.pool_scale) == (7, 0.75, 3.0, 1.0, 1.0)


def test_layer_decay_against_a_list_written_by_hand():
    """Depth 4, n = 5: decay ** ceil((n - i) / 2)."""
    model = fastvim.FastVim(img_size=32, embed_dim=16, depth=4, d_state=4, schedule="vim", class_token=True)
    by_hand = {2: {"pos_embed": 3, "cls_token": 3, "patch_embed": 3, "layers.0": 2, "layers.1": 2, "layers.2": 1,
                   "layers.3": 1, "norm_f": 0, "head": 0},
               1: {"pos_embed": 5, "cls_token": 5, "patch_embed": 5, "layers.0": 4, "layers.1": 3, "layers.2": 2,
                   "layers.3": 1, "norm_f": 0, "head": 0}}
    for blocks, powers in by_hand.items():
        for name, _ in model.named_parameters():
            part = ".".join(name.split(".")[:2]) if name.startswith("layers") else name.split(".")[0]
            assert train_mae.layer_scale(name, 4, 0.65, blocks) == pytest.approx(0.65 ** powers[part]), name


def test_groups_of_the_optimizers(pretrained, tmp_path, monkeypatch):
    """What fit() is given: learning-rate shares, weight decay, betas, what is trained at all."""
    seen = []
    monkeypatch.setattr(training, "fit", lambda args, ctx, model, loader, loss, optimizer, lr, **kw:
                        seen.append((args, model, optimizer, {"lr": lr, **kw})))

    def groups():
        args, model, optimizer, more = seen.pop()
        names = {id(p): k for k, p in model.named_parameters()}
        return args, model, optimizer, more, {names[id(p)]: (g["lr_scale"], g["weight_decay"])
                                              for g in optimizer.param_groups for p in g["params"]}
    run("pretrain", *SMALL, "--out", tmp_path)
    _, model, optimizer, more, found = groups()
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    assert set(found.values()) == {(1.0, 0.05)}
    assert found.keys() == {k for k, _ in model.named_parameters()} - {"pos_embed", "decoder_pos_embed"}
    assert more["metric"] == "loss" and more["lower_is_better"]
    peak, end = 2 * 22, 20 * 22                                             # 2 of 20 epochs of warmup, 22 steps each
    assert [more["lr"](step) for step in (0, peak // 2, peak, end)] == pytest.approx([0, 5e-4, 1e-3, 0], abs=1e-12)

    run("finetune", "--init", pretrained / "last.pt", "--out", tmp_path, "--layer-decay", 0.5, "--device", "cpu")
    args, model, optimizer, more, found = groups()
    lr = optimizer.param_groups[0]["lr"]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999) and args.pool_scale == 0.25 == model.cfg.pool_scale
    assert found["pos_embed"] == (0.125, 0.0) and found["head.weight"] == (1.0, 0.05) and found["head.bias"] == (1.0, 0)
    assert found["layers.0.mixer.A_log"] == (0.25, 0.05) and found["layers.3.mixer.D"] == (0.5, 0.0)
    assert found.keys() == {k for k, _ in model.named_parameters()}
    total = round(args.epochs * 44)
    assert more["lr"](0) == 0 and more["lr"](22) == lr == 1e-3 and more["lr"](total) == pytest.approx(1e-5)

    run("linear", "--init", pretrained / "last.pt", "--out", tmp_path, "--device", "cpu")
    args, model, optimizer, more, found = groups()
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.param_groups[0]["momentum"] == 0.9
    assert found.keys() == {"head.1.weight", "head.1.bias"} and {v for v in found.values()} == {(1.0, 0.0)}
    assert more["lr"](22) == optimizer.param_groups[0]["lr"] == 0.025 and more["lr"](10 * 22) == pytest.approx(0)
    run("linear", "--init", pretrained / "last.pt", "--out", tmp_path, "--device", "cpu", "--weight-decay", 0.5)
    assert set(groups()[4].values()) == {(1.0, 0.0), (1.0, 0.5)}            # the bias has none
    assert isinstance(model.head[0], torch.nn.BatchNorm1d) and not model.head[0].affine and model.head[0].eps == 1e-6
    assert model.cfg.pool_scale == 0.25 and 0.005 < model.head[1].weight.std() < 0.015


@pytest.mark.parametrize("flags, scale", [
    (["--mask-ratio", 0.5], 0.5), (["--mask-divisor", "count"], 1.0), (["--pool", "max"], 1.0),
    (["--model", "vim_tiny"], 1.0), (["--model", "fastmaskvim_tiny"], 0.25)])
def test_the_scale_follows_from_the_pretraining(flags, scale, folder, tmp_path):
    run("pretrain", "--data", folder, *FOLDER, "--decoder-dim", 16, "--steps", 1, *flags, "--out", tmp_path / "mae")
    start = ["finetune", "--data", folder, "--init", tmp_path / "mae/last.pt", *ONE_STEP]
    run(*start, "--out", tmp_path / "a")
    args, saved = train_imagenet.get_args(["--device", "cpu", "--eval", str(tmp_path / "a/last.pt")])
    ctx = training.setup(args, training=False)
    assert classification.restore(args, ctx, saved).cfg.pool_scale == scale
    if scale != 1:
        run(*start, "--out", tmp_path / "b", "--pool-scale", 1)
        assert torch.load(tmp_path / "b/last.pt", weights_only=True)["args"]["pool_scale"] == 1


# ---- three stages ----------------------------------------------------------------------------------------------------


def test_pretraining_writes_losses_pictures_and_its_decoder(pretrained):
    metrics = log(pretrained)[-1]["metrics"]
    assert metrics["images"] == 360 and 0.8 < metrics["patch_mean"] < 0.9 and metrics["loss"] > 0
    held = weights(pretrained / "last.pt")
    assert "decoder_blocks.0.mixer.in_proj.weight" in held and "mask_token" in held
    picture = Image.open(pretrained / "reconstruction-0001.png")
    assert picture.size == (4 + 4 * 132, 4 + 8 * 132)
    tile = np.asarray(picture)[4:4 + 128, 4:4 + 128, 0].reshape(32, 4, 32, 4)          # the first image, 4 x enlarged
    original = data.Digits(False, 32)[0][0][0] * data.DIGITS_STD + data.DIGITS_MEAN
    assert np.abs(tile[:, 0, :, 0] - 255 * original.numpy()).max() <= 1


def test_the_picture_shows_what_its_columns_say(tmp_path):
    """A model whose prediction is known: patches, visible or removed, in their places."""
    class Known(train_mae.MaskedAutoencoder):
        def forward(self, x, noise):
            target = self.target(x)[0]
            mask = self.random_masking(noise)[1]
            return train_mae.MAEOutput(None, target if self.perfect else torch.zeros_like(target), mask)

    model = Known(img_size=32, patch_size=8, embed_dim=16, depth=1, decoder_embed_dim=16)
    x = torch.stack([data.Digits(False, 32)[i][0] for i in range(2)])
    columns = {}
    for model.perfect in (True, False):
        train_mae.paint(model, x, runs.Options({"out": tmp_path}), "p.png", digits=True)
        sheet = np.asarray(Image.open(tmp_path / "p.png")).astype(int)
        columns[model.perfect] = [np.stack([sheet[4 + 132 * j:132 + 132 * j, 4 + 132 * i:132 + 132 * i] for j in range(2)])
                                  for i in range(4)]
    original, visible, means, painted = columns[True]
    assert np.abs(original - painted).max() <= 1 and not np.abs(original - means).max() <= 1
    assert np.abs(columns[False][3] - means).max() <= 1                     # zero, un-normalised, is the mean
    gray = (visible == round(255 * data.DIGITS_MEAN)).all(-1)
    gray = gray.reshape(2, 4, 32, 4, 32).all((2, 4))                        # (2 4 4) the removed patches
    assert gray.sum((1, 2)).tolist() == [12, 12]
    shown = np.repeat(np.repeat(~gray, 32, 1), 32, 2)
    assert (visible[shown] == original[shown]).all() and (means[shown] == original[shown]).all()


@pytest.mark.parametrize("flags", ["--model vim_tiny", "--mask-divisor count",
                                   "--amp --clip 1 --accum 2 --grad-checkpointing",
                                   "--schedule pool_col --class-token", "--pool max"])
def test_every_variant_pretrains_and_hands_over(flags, folder, tmp_path):
    run("pretrain", "--data", folder, *FOLDER, "--decoder-dim", 16, "--steps", 1, "--out", tmp_path / "mae",
        *flags.split())
    for stage in ("finetune", "linear"):
        run(stage, "--data", folder, "--init", tmp_path / "mae/last.pt", *ONE_STEP, "--out", tmp_path / stage)
        run("--data", folder, "--eval", tmp_path / stage / "last.pt", "--device", "cpu", "--workers", 0,
            script=train_imagenet)


def test_stages_on_the_digits_keep_what_they_should(pretrained, tmp_path, capsys):
    encoder = weights(pretrained / "last.pt")
    run("finetune", "--init", pretrained / "last.pt", "--steps", 1, "--lr", 0, "--out", tmp_path / "f", "--device",
        "cpu")
    said = capsys.readouterr().out
    dropped = sum(k.startswith(("decoder", "mask")) for k in encoder)
    assert f"{len(encoder) - dropped} weights of the encoder taken, {dropped} dropped (mask_token" in said
    tuned = weights(tmp_path / "f/last.pt")
    assert all(tuned[k].equal(encoder[k]) for k in tuned if not k.startswith("head"))       # lr 0: nothing moved
    run("linear", "--init", pretrained / "last.pt", "--steps", 3, "--out", tmp_path / "l", "--device", "cpu")
    probe = weights(tmp_path / "l/last.pt")
    assert all(probe[k].equal(encoder[k]) for k in probe if not k.startswith("head"))       # frozen
    assert probe["head.0.running_var"].ne(1).any() and probe["head.1.bias"].any()
    run("linear", "--init", tmp_path / "f/last.pt", "--steps", 1, "--out", tmp_path / "fl", "--device", "cpu")
    assert "2 dropped (head)" in capsys.readouterr().out                    # of a classifier: its head
    run("finetune", "--init", tmp_path / "fl/last.pt", "--steps", 1, "--out", tmp_path / "flf", "--device", "cpu")
    assert "5 dropped (head)" in capsys.readouterr().out and "head.weight" in weights(tmp_path / "flf/last.pt")
    moved = weights(tmp_path / "flf/last.pt")                               # not frozen any more
    assert torch.load(tmp_path / "flf/last.pt", weights_only=True)["built"]["fields"]["pool_scale"] == 0.25
    optimizer = torch.load(tmp_path / "flf/last.pt", weights_only=True)["optimizer"]
    assert sum(len(group["params"]) for group in optimizer["param_groups"]) == len(moved)
    run("--init", pretrained / "last.pt", "--steps", 1, "--out", tmp_path / "i", "--device", "cpu",
        script=train_imagenet)                                              # the other script knows the scale, too
    assert "pool_scale 0.25" in capsys.readouterr().out


def test_position_rows_of_a_vim(folder, tmp_path):
    run("pretrain", "--data", folder, *FOLDER, "--decoder-dim", 16, "--steps", 1, "--model", "vim_tiny", "--out",
        tmp_path / "mae")
    rows = weights(tmp_path / "mae/last.pt")["pos_embed"][0]
    for flags, expected in (([], torch.cat([rows[1:9], rows[:1], rows[9:]])), (["--released-pos-rows"], rows)):
        out = tmp_path / f"f{len(flags)}"
        run("finetune", "--data", folder, "--init", tmp_path / "mae/last.pt", *ONE_STEP, "--lr", 0, "--out", out, *flags)
        assert weights(out / "last.pt")["pos_embed"][0].equal(expected)


def test_a_larger_image_with_positions_resized(pretrained, tmp_path, capsys):
    run("finetune", "--init", pretrained / "last.pt", "--img-size", 48, "--steps", 1, "--out", tmp_path, "--device",
        "cpu")
    assert "position embeddings resized from 8 x 8 to 12 x 12" in capsys.readouterr().out
    assert weights(tmp_path / "last.pt")["pos_embed"].shape == (1, 144, 192)


def test_two_processes_evaluate_and_save_the_same_probe(pretrained, tmp_path, capsys):
    """BatchNorm's statistics differ between processes: the first one's are those that count and that are saved."""
    flags = ["--init", pretrained / "last.pt", "--lr", 1, "--warmup", 0, "--steps", 3, "--batch-size", 8, "--device",
             "cpu", "--threads", 1, "--out", tmp_path]
    ended = two_processes(tmp_path, run_named_script, "train_mae", "linear", *flags)
    assert [status for status, _ in ended] == [0, 0], ended
    run("--eval", tmp_path / "last.pt", "--device", "cpu", script=train_imagenet)
    assert f"loss {log(tmp_path)[-1]['metrics']['loss']:.4f}" in capsys.readouterr().out


def test_448_pixels_and_patch_14(folder, tmp_path):
    """The path of the paper's best result, in small: pretrained at 224 px by patches of 14, fine-tuned at 448 px."""
    flags = ["--data", folder, "--batch-size", 2, "--workers", 0, "--device", "cpu", "--steps", 1]
    run("pretrain", *flags, "--patch-size", 14, "--depth", 1, "--decoder-depth", 1, "--decoder-dim", 16, "--out",
        tmp_path / "mae")
    assert weights(tmp_path / "mae/last.pt")["pos_embed"].shape == (1, 256, 192)
    run("finetune", *flags, "--init", tmp_path / "mae/last.pt", "--img-size", 448, "--out", tmp_path / "f")
    content = torch.load(tmp_path / "f/last.pt", weights_only=True)
    assert content["model"]["pos_embed"].shape == (1, 1024, 192) and content["args"]["clip"] == 3.0


def test_crops_of_each_stage_and_of_the_evaluation(folder, pretrained, tmp_path):
    def crops(*argv, script=train_mae):
        args = script.get_args([*map(str, argv), "--data", str(folder), "--out", str(tmp_path / "none")])[0]
        sets = [classification.open_images(args, train).transform.transforms for train in (True, False)]
        resized = next(step.size for step in sets[1] if hasattr(step, "size"))
        if isinstance(resized, (tuple, list)):
            resized = resized[0]
        return sets[0][0].scale[0], round(args.img_size / resized, 3)
    size = ["--img-size", 224]
    assert crops("pretrain", *size) == (0.2, 0.875) and crops("linear", "--scratch", *size) == (0.08, 0.875)
    assert crops("finetune", "--scratch", *size) == (0.08, 0.875)
    assert crops("finetune", "--scratch", "--img-size", 448) == (0.08, 1.0)
    # a checkpoint keeps its crop for train_imagenet.py --eval and --predict
    content = torch.load(pretrained / "last.pt", weights_only=True)
    torch.save({**content, "args": {**content["args"], "crop_pct": 1.0}}, tmp_path / "cropped.pt")
    assert train_imagenet.get_args(["--data", "x", "--eval", str(tmp_path / "cropped.pt")])[0].crop_pct == 1.0


def test_the_validation_loss_has_the_same_masks_every_time():
    torch.manual_seed(0)
    model = train_mae.MaskedAutoencoder(img_size=32, patch_size=8, embed_dim=16, depth=1, decoder_embed_dim=16).eval()
    ctx = training.Context(0, 1, torch.device("cpu"))
    x = torch.stack([data.Digits(False, 32)[i][0] for i in range(8)])
    with torch.no_grad():
        first, second = (train_mae.masked_loss(model, [(x[:6], None), None, (x[6:], None)], ctx) for _ in range(2))
    assert first == second and first["images"] == 8
    patches = model.target(x)[0]                                            # the spread within patches, all of them
    spread = patches.var(-1, correction=0).mean().item()
    assert 0.5 * spread < first["patch_mean"] < 1.5 * spread


def test_pretraining_killed_and_resumed_or_continued(folder, tmp_path, capsys):
    """Exact resume, decoder included; --init continues from the weights alone, with the masking of its checkpoint."""
    images = ["pretrain", "--data", folder, *FOLDER]
    flags = [*images, "--decoder-dim", 16, "--decoder-depth", 1]
    run(*flags, "--steps", 4, "--out", tmp_path / "whole")
    run(*flags, "--steps", 2, "--out", tmp_path / "parts")
    run(*flags, "--steps", 4, "--out", tmp_path / "parts", "--resume", "--resume-changed")
    a, b = weights(tmp_path / "whole/last.pt"), weights(tmp_path / "parts/last.pt")
    assert all(a[k].equal(b[k]) for k in a)
    assert "at step 2 of 4" in capsys.readouterr().out
    run(*flags, "--steps", 1, "--lr", 0, "--init", tmp_path / "parts/last.pt", "--out", tmp_path / "more")
    more = weights(tmp_path / "more/last.pt")
    assert all(more[k].equal(b[k]) for k in b)
    assert len(log(tmp_path / "parts")) == 2                                # 3 steps, and the epoch that --steps cut
    options = ["--mask-ratio", 0.5, "--mask-divisor", "count", "--decoder-dim", 12]
    run(*images, *options, "--decoder-depth", 1, "--steps", 1, "--out", tmp_path / "own")
    start = ["pretrain", "--data", folder, "--init", tmp_path / "own/last.pt", *ONE_STEP]
    run(*start, "--out", tmp_path / "on")
    own, on = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("own", "on"))
    assert all(own["args"][k] == on["args"][k] for k in (*train_mae.MASKING, "depth", "patch_size", "pool_scale"))
    assert own["built"] == on["built"] and own["built"]["fields"]["mask_divisor"] == "count"
    run(*start, "--out", tmp_path / "larger", "--img-size", 48)
    assert weights(tmp_path / "larger/last.pt")["decoder_pos_embed"].shape == (1, 36, 12)


def test_a_fine_tuning_is_resumed_though_the_pretraining_is_gone(pretrained, tmp_path):
    source = tmp_path / "mae.pt"
    source.write_bytes((pretrained / "last.pt").read_bytes())
    flags = ["finetune", "--init", source, "--device", "cpu", "--threads", 1, "--out", tmp_path / "f"]
    run(*flags, "--steps", 2)
    run(*flags, "--steps", 2, "--resume", "--init", pretrained / "last.pt")    # a path is no part of the recipe
    source.unlink()
    run(*flags, "--steps", 3, "--resume", "--resume-changed")
    assert torch.load(tmp_path / "f/last.pt", weights_only=True)["step"] == 3


def test_images_are_painted_and_bad_ones_counted(pretrained, folder, tmp_path, capsys, monkeypatch):
    Image.new("L", (8, 8), 128).save(tmp_path / "digit.png")
    (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(SystemExit) as end:
        run("pretrain", "--reconstruct", tmp_path / "digit.png", tmp_path / "bad.png", "--init", pretrained / "last.pt",
            "--out", tmp_path / "o", "--device", "cpu")
    assert end.value.code == 1 and "bad.png: cannot be read" in capsys.readouterr().out
    assert Image.open(tmp_path / "o/reconstruct.png").size == (532, 136)
    run("pretrain", "--data", folder, *FOLDER, "--decoder-dim", 16, "--steps", 1, "--out", tmp_path / "mae")
    Image.new("RGB", (7, 40)).save(tmp_path / "narrow.png")                 # narrower than a patch: enlarged
    run("pretrain", "--reconstruct", folder / "val/dark/0.png", tmp_path / "narrow.png", "--out", tmp_path / "mae",
        "--device", "cpu")
    assert Image.open(tmp_path / "mae/reconstruct.png").size == (532, 268)
    run("pretrain", *SMALL, "--mask-ratio", 0.5, "--decoder-dim", 12, "--steps", 1, "--out",
        tmp_path / "own")
    seen = []
    monkeypatch.setattr(train_mae, "paint", lambda model, images, *more, **kw: seen.append(
        (model.mask_ratio, images.shape)))
    run("pretrain", "--reconstruct", tmp_path / "digit.png", "--out", tmp_path / "own", "--device", "cpu")
    assert seen == [(0.5, (1, 3, 32, 32))]
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="/dev/null/x"):
        run("pretrain", "--reconstruct", tmp_path / "digit.png", "--init", pretrained / "last.pt", "--out",
            "/dev/null/x", "--device", "cpu")


def test_pretraining_without_a_validation_folder(folder, tmp_path):
    (tmp_path / "train").symlink_to(folder / "train")
    run("pretrain", "--data", tmp_path, *FOLDER, "--decoder-dim", 16, "--steps", 1, "--out", tmp_path / "mae")
    assert log(tmp_path / "mae")[-1]["metrics"] == {}


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    ("pretrain --mask-ratio 0", "mask_ratio=0.0"), ("pretrain --mask-ratio 1", "mask_ratio=1.0"),
    ("pretrain --mask-ratio 0.99", "keep at least one"), ("pretrain --img-size 3", "at least one patch"),
    ("pretrain --decoder-dim 30", "multiple of 4"), ("pretrain --model resnet10t", "none of ours"),
    ("linear --scratch --model resnet10t", "none of ours"), ("pretrain --data /nowhere", "/nowhere"),
    ("finetune --init nofile.pt", "run `python train_mae.py pretrain` first"),
    ("pretrain --init nofile.pt", "nofile.pt"), ("pretrain --reconstruct x.png --init nofile.pt", "nofile.pt")])
def test_impossible_requests_end_in_one_clear_line(flags, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        run(*flags.split(), "--out", tmp_path, "--device", "cpu")


@pytest.mark.parametrize("flags, message", [
    ("", "STAGE"), ("probe", "invalid choice"), ("finetune --scratch --init x", "not allowed with"),
    ("linear --layer-decay 0.5", "unrecognized"), ("pretrain --mixup 0.8", "unrecognized"),
    ("finetune --batch-size 3 --mixup 1", "even"), ("finetune --decay-blocks 0", "at least 1")])
def test_flags_that_cannot_be_are_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        run(*flags.split())
    assert message in capsys.readouterr().err


def test_what_the_command_line_says_is_not_taken_from_the_checkpoint(pretrained, tmp_path):
    with pytest.raises(SystemExit, match="mask_ratio=0.0"):
        run("pretrain", "--init", pretrained / "last.pt", "--mask-ratio", 0, "--out", tmp_path, "--device", "cpu")
    saved = dict(size="t", model=None, data=None)

    def options(script, *argv, **more):
        """Those of a run that starts from a checkpoint of the first edition, which has no `built`."""
        torch.save({"args": {**saved, **more}, "model": {"x": torch.zeros(1)}}, tmp_path / "old.pt")
        return script.get_args([*argv, "--init", str(tmp_path / "old.pt"), "--out", str(tmp_path)])[0]
    args = options(train_imagenet, "--no-class-token", class_token=True, no_conv=True, pool="max")
    assert args.class_token is False and args.d_conv == 0 and args.pool == "max"
    for flags, name in (([], "vim_large"), (["--size", "b"], "fastvim_base"), (["--model", "vim_small"], "vim_small")):
        assert options(train_imagenet, *flags, size=None, model="vim_large").model == name
    for size, crop in (([], 1.0), (["--img-size", "448"], 1.0), (["--img-size", "224"], None)):
        for script, stage in ((train_mae, ["linear"]), (train_imagenet, [])):
            assert options(script, *stage, "--data", "x", *size, img_size=448, crop_pct=1.0).crop_pct == crop


def test_a_damaged_checkpoint_of_the_run_names_the_other(pretrained, tmp_path):
    flags = ["linear", "--init", pretrained / "last.pt", "--steps", 1, "--out", tmp_path, "--device", "cpu"]
    run(*flags)
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:100_000])
    with pytest.raises(SystemExit, match="best.pt"):
        run(*flags, "--resume")


def test_painting_finds_the_pretraining_on_the_digits(pretrained, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/digits_mae").symlink_to(pretrained)
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8), 128).save("digit.png")
    run("pretrain", "--reconstruct", "digit.png", "--device", "cpu")
    assert pathlib.Path("runs/mae/reconstruct.png").exists()


def test_checkpoints_that_do_not_fit(pretrained, tmp_path):
    flags = ["finetune", "--out", tmp_path / "f", "--device", "cpu", "--init"]
    content = torch.load(pretrained / "last.pt", weights_only=True)
    decoder = {k: v for k, v in content["model"].items() if k.startswith("decoder")}
    torch.save({"model": decoder}, tmp_path / "decoder.pt")
    with pytest.raises(SystemExit, match="holds no encoder"):
        run(*flags, tmp_path / "decoder.pt")
    with pytest.raises(SystemExit, match=r"patch_embed.proj.weight \(192, 3, 4, 4\), in the model \(192, 3, 8, 8\)"):
        run(*flags, pretrained / "last.pt", "--patch-size", 8)
    with pytest.raises(SystemExit, match=r"of another shape.*\(192"):
        run(*flags, pretrained / "last.pt", "--size", "s")
    released = {"model": content["model"], "args": argparse.Namespace(mask_ratio=0.75)}     # as MAE's code saves them
    torch.save(released, tmp_path / "released.pth")
    with pytest.raises(SystemExit, match="unknown to the model: layers|missing in the file: layers"):
        run(*flags, tmp_path / "released.pth")                              # which says no depth
    sizes = ["--depth", 4, "--img-size", 32, "--patch-size", 4]
    run(*flags, tmp_path / "released.pth", *sizes, "--steps", 1)
    args = torch.load(tmp_path / "f/last.pt", weights_only=True)["args"]
    assert args["pool_scale"] == 0.25
    with pytest.raises(SystemExit, match="another model or optimizer"):
        run("linear", "--init", pretrained / "last.pt", "--resume", tmp_path / "f/last.pt", "--resume-changed",
            "--batch-size", 32, "--out", tmp_path / "l", "--device", "cpu")
    (tmp_path / "text.pt").write_text("nothing")
    with pytest.raises(SystemExit, match="no readable|not a readable checkpoint"):
        run("finetune", "--out", tmp_path / "g", "--init", tmp_path / "text.pt")
    assert not pathlib.Path(tmp_path / "g").exists()
