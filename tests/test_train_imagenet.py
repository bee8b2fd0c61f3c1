"""The ImageNet script from its command line: recipes, training, evaluation, prediction, exact resume, two processes."""
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch

for module in ("timm", "torchvision", "sklearn", "PIL"):
    pytest.importorskip(module)

from PIL import Image

import baselines
import classification
import data
import fastvim
import runs
import train_imagenet
import training
from helpers import Child, run_named_script, run_script

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMALL = ["--depth", "1", "--threads", "1", "--save-minutes", "0"]          # a checkpoint after every step


def run(*argv):
    run_script(train_imagenet, *argv)


def start(output, *argv):
    """The script in a process of its own."""
    return Child(run_named_script, "train_imagenet", *SMALL, *argv, output=output)


def start_alone(*argv, launcher=()):
    """The same as a user starts it."""
    return subprocess.Popen([sys.executable, *launcher, "train_imagenet.py", *SMALL, *map(str, argv)], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})


def restore(path):
    """As --eval does, without saying which model it is."""
    args, saved = train_imagenet.get_args(["--device", "cpu", "--eval", str(path)])
    ctx = training.setup(args, training=False)
    return classification.restore(args, ctx, saved), saved.classes, runs.trained_on_built_in(saved)


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    run("--depth", 2, "--epochs", 4, "--warmup", 0.5, "--lr", 2e-3, "--out", out, "--device", "cpu")
    return out


FOLDER = ["--img-size", 32, "--patch-size", 8, "--depth", 1, "--batch-size", 8, "--workers", 0, "--device", "cpu",
          "--ema", 0, "--lr", 1e-3, "--warmup", 1]


def test_recipes():
    """recipes.md, section 1; and without --data one scaled to the digits."""
    args = train_imagenet.get_args(["--data", "x", "--size", "b"])[0]
    expected = dict(epochs=300, warmup=5, weight_decay=0.05, ema=0.9999, mixup=0.8, cutmix=1.0, smoothing=0.1,
                    auto_augment="rand-m9-mstd0.5-inc1", reprob=0.25, crop_pct=None, recipe_lr=1e-3,
                    recipe_batch=1024)
    assert expected == {k: vars(args)[k] for k in expected} and not args.amp and args.clip == 0
    model = classification.build_model(args, 1000)
    assert sum(p.numel() for p in model.parameters()) == 97_670_632
    assert model.cfg.img_size == (224, 224) and model.cfg.drop_path_rate == 0.4
    assert train_imagenet.get_args(["--size", "s"])[0].img_size == 32
    assert train_imagenet.get_args(["--data", "x", "--epochs", "7"])[0].epochs == 7


def test_digits_are_learnt(digits_run):
    lines = log(digits_run)
    assert len(lines) == 4 and lines[-1]["metrics"]["top1"] > 85
    assert {"config.json", "best.pt", "last.pt", "log.jsonl", "curve.png"} <= {p.name for p in digits_run.iterdir()}


def test_evaluation_finds_the_logged_accuracy_without_being_told_the_model(digits_run, capsys):
    run("--eval", digits_run / "best.pt", "--device", "cpu")
    best = max(line["metrics"]["top1"] for line in log(digits_run))
    assert f"top-1 {best:.2f} %" in capsys.readouterr().out


def test_prediction_prints_five_classes_and_goes_on_after_a_bad_file(digits_run, tmp_path, capsys):
    held_out = data.Digits(False)
    for i in range(6):
        scan = Image.fromarray((held_out.images[i, 0] * 255).round().byte().numpy())
        scan.resize((64, 64), Image.Resampling.NEAREST).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_text("no image")
    model, classes, digits = restore(digits_run / "best.pt")
    assert digits and classes == held_out.classes
    with torch.no_grad():
        expected = [str(model(held_out[i][0][None]).argmax().item()) for i in range(6)]
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run("--predict", tmp_path / "bad.png", *(tmp_path / f"{i}.png" for i in range(6)), "--eval",
            digits_run / "best.pt", "--device", "cpu")
    assert end.value.code == 1
    lines = capsys.readouterr().out.split("bad.png: cannot be read")[1].splitlines()[1:]
    assert len(lines) == 6 * 6
    assert [lines[6 * i + 1].split()[-1] for i in range(6)] == expected
    shares = [float(line.split()[0]) for line in lines[1:6]]
    assert shares == sorted(shares, reverse=True) and sum(shares) <= 100.3


def test_image_folder_with_the_whole_augmentation(folder, tmp_path, capsys):
    run("--data", folder, *FOLDER, "--epochs", 8, "--out", tmp_path / "run")
    assert log(tmp_path / "run")[-1]["metrics"]["top1"] == 100
    run("--data", folder, "--eval", tmp_path / "run" / "best.pt", "--device", "cpu", "--workers", 0, "--batch-size", 3)
    assert "top-1 100.00 %" in capsys.readouterr().out
    run("--predict", folder / "val" / "light" / "0.png", "--eval", tmp_path / "run" / "best.pt", "--device", "cpu")
    assert capsys.readouterr().out.splitlines()[-2].endswith("light")
    with pytest.raises(SystemExit, match="last.pt"):                       # nothing is overwritten
        run("--data", folder, *FOLDER, "--out", tmp_path / "run")


@pytest.mark.parametrize("flags", [
    "--schedule pool_row", "--class-token", "--pool attention", "--pool-scale 0.25", "--block-norm layernorm",
    "--ssm-norm rmsnorm", "--no-conv", "--skip-before-expand", "--model vim_tiny --ssm-norm none",
    "--model vit_tiny_patch16_224 --patch-size 8 --vit-pool --vit-conv", "--model resnet10t",
    "--amp --clip 1 --accum 2 --drop-path 0.2"])
def test_every_variant_trains_a_step_and_is_restored(flags, folder, tmp_path):
    run("--data", folder, *FOLDER, "--steps", 1, "--out", tmp_path, *flags.split())
    model, classes, digits = restore(tmp_path / "last.pt")
    assert classes == ["dark", "light"] and not digits and model(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


@pytest.mark.parametrize("flags", [[], ["--model", "vit_tiny_patch16_224", "--patch-size", 8]])
def test_gradient_checkpointing_changes_nothing(flags, folder, tmp_path, monkeypatch):
    runs, calls, checkpoint = [], [], fastvim.checkpoint
    monkeypatch.setattr(fastvim, "checkpoint", lambda *a, **kw: calls.append(1) or checkpoint(*a, **kw))
    for name, more in (("a", []), ("b", ["--grad-checkpointing"])):
        run("--data", folder, *FOLDER, "--steps", 2, "--drop-path", 0.3, "--out", tmp_path / name, *flags, *more)
        runs.append(torch.load(tmp_path / name / "last.pt", weights_only=True)["model"])
        assert flags or len(calls) == 2 * len(more)                         # one block, two steps
    assert all(torch.allclose(runs[0][k], runs[1][k], atol=1e-7) for k in runs[0])
    run("--data", folder, *FOLDER, "--steps", 2, "--drop-path", 0.3, "--out", tmp_path / "b", *flags, "--resume")


def test_pooled_attention_gives_a_row_one_result():
    import timm
    model = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), patch_size=16, depth=1)
    x = torch.randn(2, 1 + 2 * 3, 192)
    for odd in (0, 1):
        attn = baselines.PooledAttention(model.blocks[0].attn, 1, (2, 3), odd, conv=False)
        grid = attn(x)[:, 1:].reshape(2, 2, 3, 192)
        spread = grid.std(2 - odd).max()
        assert spread < 1e-6 < grid.std(1 + odd).max()
    # rows of one token: plain attention
    full = baselines.PooledAttention(model.blocks[0].attn, 1, (2, 1), 0, conv=False)
    torch.testing.assert_close(full(x[:, :3]), model.blocks[0].attn(x[:, :3]))


@pytest.mark.parametrize("flags, message", [
    ("--model nomodel", "fastvim_tiny"), ("--data /nowhere", "/nowhere: no such folder"),
    ("--eval nofile.pt", "nofile.pt"), ("--vit-pool", "ViTs of timm"),
    ("--model resnet10t --no-conv", "does not know d_conv"),
    ("--batch-size 2000", "--batch-size"), ("--pool max --pool-scale 0.5", "mean pooling only"),
    ("--model resnet10t --vit-pool", "no ViT"), ("--vit-conv", "ViTs of timm"),
    ("--model vit_tiny_patch16_224 --vit-conv", "goes with --vit-pool")])
def test_impossible_requests_end_in_one_clear_line(flags, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        run(*flags.split(), "--out", tmp_path)


@pytest.mark.parametrize("flags, message", [
    ("--size x", "choose from"), ("--reprob 7", "less than 1"), ("--mixup -1", "at least 0"),
    ("--img-size 0", "at least 1"),
    ("--batch-size 3 --mixup 1", "even"), ("--no-such-flag", "unrecognized")])
def test_flags_that_cannot_be_are_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        run(*flags.split())
    assert message in capsys.readouterr().err


def test_unknown_policy(folder, tmp_path):
    with pytest.raises(SystemExit, match="--auto-augment bogus"):
        run("--data", folder, *FOLDER, "--auto-augment", "bogus", "--out", tmp_path)


def test_checkpoint_of_another_model_names_the_keys(digits_run):
    content = torch.load(digits_run / "best.pt", weights_only=True)
    del content["args"], content["built"]                                   # as a released file, which names no model
    torch.save(content, digits_run / "anonymous.pt")
    with pytest.raises(SystemExit, match=r"missing in the file: layers\.10"):
        run("--eval", digits_run / "anonymous.pt", "--device", "cpu")


def test_killed_in_mid_epoch_and_resumed_ends_in_the_same_bits(folder, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ["--data", folder, *FOLDER, "--ema", 0.9, "--steps", 24, "--eval-every", 100, "--drop-path", 0.3]
    reference = start(tmp_path / "a", *flags, "--out", whole)
    victim = start(tmp_path / "b", *flags, "--out", killed)
    while not (killed / "last.pt").exists() and victim.poll() is None:
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL and reference.wait() == 0, reference.said()
    step = torch.load(killed / "last.pt", weights_only=True)["step"]
    assert 0 < step < 24
    resumed = start(tmp_path / "c", *flags, "--out", killed, "--resume")
    assert resumed.wait() == 0 and f"at step {step} of 24" in resumed.said(), resumed.said()
    a, b = (torch.load(out / "last.pt", weights_only=True) for out in (whole, killed))
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    a, b = log(whole), log(killed)
    assert [line["loss"] for line in a] == [line["loss"] for line in b] and a[-1]["metrics"] == b[-1]["metrics"]


def test_sigterm_to_the_whole_group_saves_in_spite_of_loading_workers(folder, tmp_path):
    """As torchrun and schedulers send it: the data-loading processes receive it too."""
    process = start_alone("--data", folder, *FOLDER, "--workers", 1, "--epochs", 1000, "--save-minutes", 60,
                    "--out", tmp_path)
    while not (tmp_path / "log.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM and "--resume continues" in output, output
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] >= 3


def test_a_checkpoint_is_evaluated_at_another_size_and_refuses_other_classes(folder, digits_run, tmp_path, capsys):
    run("--data", folder, *FOLDER, "--epochs", 8, "--out", tmp_path / "run")
    best = tmp_path / "run" / "best.pt"
    results = []
    for size in ([], ["--img-size", 48]):
        run("--data", folder, "--eval", best, "--device", "cpu", "--workers", 0, *size)
        results.append(capsys.readouterr().out.splitlines()[-2:])
    assert "resized from 4 x 4 to 6 x 6" in results[1][0] and results[0][1] != results[1][1]
    with pytest.raises(SystemExit, match="--data DIR has to say where"):
        run("--eval", best, "--device", "cpu")
    with pytest.raises(SystemExit, match="Unknown: dark, light"):           # the classes of the digits
        run("--data", folder, "--eval", digits_run / "best.pt", "--device", "cpu")
    content = torch.load(best, weights_only=True)
    released = {"state_dict": {f"backbone.{k}": v for k, v in content["model"].items()}}   # no model, no classes
    torch.save(released, tmp_path / "released.ckpt")
    flags = ["--img-size", "32", "--patch-size", "8", "--depth", "1", "--device", "cpu", "--workers", "0", "--eval"]
    run("--data", folder, *flags, tmp_path / "released.ckpt")
    assert capsys.readouterr().out.splitlines()[-1] == results[0][1]
    run("--predict", folder / "val" / "light" / "0.png", *flags, tmp_path / "released.ckpt")
    assert capsys.readouterr().out.splitlines()[-2].endswith(" 1")          # no names: the class's index
    (tmp_path / "val" / "third").mkdir(parents=True)
    for name in ("dark", "light", "third"):
        (tmp_path / "val" / name).mkdir(exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "val" / name / "0.png")
    with pytest.raises(SystemExit, match="2 classes apart.* holds 3"):
        run("--data", tmp_path, *flags, tmp_path / "released.ckpt")


def test_two_processes_match_one_with_the_same_effective_batch(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ["--epochs", 0.3, "--lr", 1e-3, "--save-minutes", 10]
    first = start(tmp_path / "said", *flags, "--batch-size", 64, "--out", one)
    second = start_alone(*flags, "--batch-size", 32, "--out", two, launcher=(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"))
    assert second.wait() == 0, second.stdout.read()
    assert first.wait() == 0, first.said()
    a, b = log(one)[-1], log(two)[-1]
    assert abs(a["loss"] - b["loss"]) < 1e-4 and abs(a["metrics"]["loss"] - b["metrics"]["loss"]) < 1e-4
    a, b = (torch.load(out / "last.pt", weights_only=True)["model"] for out in (one, two))
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-4
