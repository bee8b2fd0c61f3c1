"""
training.py: schedules, groups, exact resume, several processes, and everything that can stop a run.

Some tests run the toy experiment below in a process of its own: to kill it, to send it signals, and beside another one.
"""

import argparse
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import data
import logs
import processes
import runs
import safety
import training
from helpers import Child, two_processes
from runs import evaluate_classifier
from safety import NonFiniteError
from training import (
    cosine,
    fit,
    parameter_groups,
    peak_lr,
    polynomial,
    run_length,
    setup,
    step_decay,
)

PER_EPOCH = 6                                             # batches
RECIPE = {**runs.TRAINING, "recipe_lr": 0.02, "recipe_batch": 8, "batch_size": 8, "epochs": 3, "workers": 0,
          "threads": 1, "ema": 0.9, "weight_decay": 0.05, "data": "here", "kill_with": signal.SIGKILL, "out": "out"}
safety.HARMLESS |= {"kill_at", "kill_with"}
INPUTS = torch.randn(48, 5, generator=torch.Generator().manual_seed(1))
LABELS = INPUTS[:, :3].argmax(1)


class Order:
    """The stand-in for data.py's batch sampler: an order of the samples that depends on the epoch alone."""

    def __init__(self, batch_size, rank, world_size):
        self.batch_size, self.rank, self.world_size, self.calls = batch_size, rank, world_size, []

    def __len__(self):
        return len(INPUTS) // (self.batch_size * self.world_size)

    def set_epoch(self, epoch, skip=0):
        self.epoch, self.skip = epoch, skip
        self.calls.append((epoch, skip))

    def __iter__(self):
        order, size = torch.randperm(48, generator=torch.Generator().manual_seed(self.epoch)), self.batch_size
        for i in range(self.skip, len(self)):
            start = (i * self.world_size + self.rank) * size
            yield order[start:start + size]


class Loader:
    def __init__(self, batch_size, rank=0, world_size=1):
        self.batch_sampler = Order(batch_size, rank, world_size)

    def __len__(self):
        return len(self.batch_sampler)

    def __iter__(self):
        for index in self.batch_sampler:
            yield {"x": INPUTS[index], "more": [LABELS[index], "text"]}


class Noise(nn.Module):
    """Draws from all three generators, so that any of them not being restored shows in the weights."""

    def forward(self, x):
        return x * (1 + 0.1 * random.random() + 0.1 * np.random.rand() + 0.1 * torch.rand(())) if self.training else x


class Poison(nn.Module):
    """Makes nan in the forward pass when told to."""

    active = False

    def forward(self, x):
        return x / 0 * 0 if Poison.active else x


def toy_model(noise=True):
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8) if noise else nn.Identity(), nn.Tanh(),
                         nn.Dropout(0.2 * noise), Noise() if noise else nn.Identity(),
                         nn.Sequential(Poison(), nn.Linear(8, 3)))


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["more"][0])


def toy(*argv, loss_fn=cross_entropy, on_step=lambda step: None, on_evaluate=lambda step: None,
        groups=None, **options):
    """The toy experiment with these command line arguments -> (model, log)."""
    parser = runs.Parser()
    parser.add_argument("--plain", action="store_true", help="no dropout, no noise, no batch norm")
    parser.add_argument("--data", help="a path")
    parser.add_argument("--kill-at", type=int, help="in which micro-step to send a signal")
    parser.add_argument("--kill-with", type=int, help="which one")
    runs.add_training_arguments(parser, RECIPE)
    typed = vars(parser.parse_args([str(arg) for arg in argv]))
    args = runs.Options({**runs.defaults(parser), **RECIPE, **typed})
    ctx = setup(args)
    model = toy_model(not args.plain).to(ctx.device)
    lr = peak_lr(args, ctx)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay, **(groups or {})), lr=lr)
    loader = Loader(args.batch_size, ctx.rank, ctx.world_size)
    total, per_epoch = run_length(args, loader)
    seen = []

    def counted_loss(model, batch):                       # once a micro-step
        if len(seen) == args.kill_at and ctx.is_main:
            os.kill(os.getpid(), args.kill_with)
        on_step(len(seen))
        seen.append(0)
        return loss_fn(model, batch)

    def evaluate(model, epoch):
        on_evaluate(len(seen))
        batches = [(INPUTS[i:i + 20], LABELS[i:i + 20]) for i in (0, 20, 40)]
        return evaluate_classifier(model, batches[ctx.rank::ctx.world_size], ctx)

    options = {"weight_decay": lambda step: cosine(step, total, 0.04, end=0.4), "evaluate": evaluate,
               "metric": "top1", **options}
    log = fit(args, ctx, model, loader, counted_loss, optimizer, lambda step: cosine(step, total, lr, warmup=4),
              **options)
    ctx.close()
    return model, log


def process(output, *argv, **environment):
    """The toy experiment in a process of its own."""
    return Child(toy, *map(str, argv), output=output, **environment)


def load(path):
    return torch.load(path, weights_only=True)


def assert_same(a, b):
    """Equal to the last bit, except times."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds", "img_per_s", "args", "git"}:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


@pytest.fixture
def poison():
    yield Poison
    Poison.active = False


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    toy("--out", out)
    return out


# ---- Schedules, parameters, arguments --------------------------------------------------------------------------------

def test_cosine():
    at = [cosine(step, 10, 1.0, warmup=2, start=0.2, end=0.1) for step in (0, 1, 2, 6, 10)]
    assert at == pytest.approx([0.2, 0.6, 1.0, 0.55, 0.1])
    assert cosine(4, 10, 1.0, warmup=2) == pytest.approx(0.5 + 0.5 * math.sqrt(0.5))         # an eighth of the circle
    assert [cosine(step, 4, 0.04, end=0.4) for step in (0, 2, 4)] == pytest.approx([0.04, 0.22, 0.4])


def test_polynomial():
    at = [polynomial(step, 12, 6.0, warmup=2, start=0.0) for step in (0, 1, 2, 7, 12)]
    assert at == pytest.approx([0.0, 3.0, 6.0, 3.0, 0.0])
    assert polynomial(5, 10, 1.0, end=0.5, power=2.0) == pytest.approx(0.625)


def test_step_decay():
    at = [step_decay(step, 1.0, (10, 20), warmup=4, start=0.5) for step in (0, 2, 4, 9, 10, 19, 20)]
    assert at == pytest.approx([0.5, 0.75, 1.0, 1.0, 0.1, 0.1, 0.01])


def test_parameter_groups():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[3].weight = model[2].weight                     # shared
    model[0].weight.requires_grad = False
    groups = parameter_groups(model, 0.3)
    assert [(g["weight_decay"], g["wd_scale"], g["lr_scale"]) for g in groups] == [(0, 0, 1), (0.3, 1, 1)]
    assert [id(p) for p in groups[1]["params"]] == [id(model[2].weight)]
    exempt = model[0].bias, *model[1].parameters(), model[2].bias, model[3].bias
    assert [id(p) for p in groups[0]["params"]] == [id(p) for p in exempt]
    groups = parameter_groups(model, 0.3, no_decay=lambda name, p: name == "1.bias",
                              lr_scale=lambda name, p: 0.5 if name.startswith("1.") else 1.0)
    assert [(g["weight_decay"], g["lr_scale"], len(g["params"])) for g in groups] == [
        (0.3, 1.0, 4), (0.3, 0.5, 1), (0.0, 0.5, 1)]
    with pytest.raises(ValueError, match="trainable"):
        parameter_groups(model.requires_grad_(False), 0.3)


def test_two_dimensional_bias_is_not_decayed():
    model = nn.Linear(2, 2)
    model.bias = nn.Parameter(torch.zeros(1, 2))
    assert [group["wd_scale"] for group in parameter_groups(nn.ModuleList([model]), 0.1)] == [1.0, 0.0]


@pytest.mark.parametrize("argv, lr", [
    (["--batch-size", 4, "--accum", 2], 0.02),
    (["--batch-size", 4, "--accum", 4], 0.04),
    (["--batch-size", 4, "--lr", 0.5], 0.5),
])
def test_learning_rate_rule(argv, lr, capsys, tmp_path):
    argv = [*argv, "--out", tmp_path]
    parser = runs.Parser()
    runs.add_training_arguments(parser, RECIPE)
    args = runs.Options({**runs.defaults(parser), **RECIPE, **vars(parser.parse_args([str(arg) for arg in argv]))})
    ctx = setup(args)
    said = capsys.readouterr().out
    assert peak_lr(args, ctx) == pytest.approx(lr)
    assert f"effective batch {4 * args.accum} " in said
    rule = "as given" if lr == 0.5 else "scaled with the batch"
    assert f"learning rate {lr:g} {rule} (the recipe's: 0.02 at 8)" in said


@pytest.mark.parametrize("steps, rises", [(5, True), (6, False)])
def test_a_warmup_as_long_as_the_run_is_said(steps, rises, tmp_path, capsys):
    toy("--out", tmp_path, "--steps", steps)                # its warmup takes 4
    assert ("still rises when this run ends: lower --warmup" in capsys.readouterr().out) == rises


def test_options_cannot_be_changed_and_help_shows_the_recipe(capsys):
    parser = runs.Parser()
    runs.add_training_arguments(parser, RECIPE)
    assert vars(parser.parse_args(["--seed", "3"])) == {"seed": 3}
    args = runs.Options({**runs.defaults(parser), **RECIPE})
    assert args.steps is None and args.resume_changed is False and args.ema == 0.9
    with pytest.raises(AttributeError, match="steps=3"):
        args.steps = 3
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "(default 0.9)" in said and "(default 0.02 x batch / 8)" in said and "SUPPRESS" not in said


def test_what_checkpoints_of_the_first_edition_were_built_with():
    """They hold the options of their run, but no `built`."""
    assert runs.built_from_options(dict(size="s", model=None, no_conv=True, ssm_norm="none", class_token=False)) == {
        "name": "fastvim_small", "fields": {"d_conv": 0, "ssm_norm": None}}
    for options, schedule in ((dict(pool_dims=2), "fastchannelvim_2d"), (dict(pool_dims=1), None),
                              (dict(scan_order="spatial-first"), "fastchannelvim_spatial")):
        built = runs.built_from_options(dict(model="fastchannelvim_tiny", patch=8, drop_path=0.05, **options))
        assert built["fields"].get("schedule") == schedule and built["fields"]["patch_size"] == 8


def test_run_length():
    args = argparse.Namespace(accum=4, epochs=1.5, steps=None)
    assert run_length(args, range(11)) == (3, 2)
    args.steps = 2
    assert run_length(args, range(11)) == (2, 2)
    args.epochs = None
    assert run_length(args, range(11)) == (2, 2)
    args.epochs = 0.1
    with pytest.raises(ValueError, match="--epochs 0.1"):
        run_length(args, range(11))
    with pytest.raises(ValueError, match="--accum"):
        run_length(argparse.Namespace(accum=4, epochs=1, steps=None), range(3))


# ---- The loop --------------------------------------------------------------------------------------------------------

def test_log_files_and_data_order(tmp_path):
    model, log = toy("--out", tmp_path, "--epochs", 2.5)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == log and [(line["epoch"], line["step"]) for line in lines] == [(1, 6), (2, 12), (3, 15)]
    assert lines[0].keys() == {"epoch", "step", "loss", "lr", "grad_norm", "metrics", "seconds", "img_per_s",
                               "peak_mib"}
    assert lines[2]["lr"] == cosine(14, 15, 0.02, warmup=4)
    assert lines[2]["metrics"].keys() == {"top1", "top5", "loss", "images"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["parameters"] == sum(p.numel() for p in model.parameters()) and config["args"]["ema"] == 0.9
    assert {"command", "git", "torch", "device", "started"} <= config.keys() and config["args"]["seed"] == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.tmp"))


def test_matches_a_hand_written_loop(tmp_path):
    """Weights, losses, norms, clipping, and the moving average, against PyTorch without training.py."""
    model, log = toy("--plain", "--out", tmp_path, "--epochs", 2, "--clip", 0.3, weight_decay=None)
    training.seed_everything(0)
    mine = toy_model(noise=False)
    optimizer = torch.optim.AdamW(parameter_groups(mine, 0.05))
    average = {name: value.clone() for name, value in mine.state_dict().items()}
    losses, norms, loader = [], [], Loader(8)
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        for batch in loader:
            for group in optimizer.param_groups:
                group["lr"] = cosine(len(losses), 12, 0.02, warmup=4)
            loss = F.cross_entropy(mine(batch["x"]), batch["more"][0])
            optimizer.zero_grad()
            loss.backward()
            norms.append(nn.utils.clip_grad_norm_(mine.parameters(), 0.3).item())
            optimizer.step()
            losses.append(loss.item())
            for name, value in mine.state_dict().items():
                average[name] = 0.9 * average[name] + 0.1 * value
    state = load(tmp_path / "last.pt")
    for name, value in mine.state_dict().items():
        torch.testing.assert_close(state["model"][name], value)
        torch.testing.assert_close(state["ema"][name], average[name])
    assert [line["loss"] for line in log] == pytest.approx([np.mean(losses[:6]), np.mean(losses[6:])], rel=1e-6)
    assert [line["grad_norm"] for line in log] == pytest.approx([np.mean(norms[:6]), np.mean(norms[6:])], rel=1e-5)
    assert max(norms) > 0.3                               # else clipping was not tested


def test_schedules_respect_the_groups_scales(tmp_path):
    toy("--out", tmp_path, "--steps", 6, groups=dict(lr_scale=lambda name, param: 0.5 if name.startswith("0.") else 1.0))
    groups = load(tmp_path / "last.pt")["optimizer"]["param_groups"]
    decay, rate = cosine(5, 6, 0.04, end=0.4), cosine(5, 6, 0.02, warmup=4)
    assert [(g["weight_decay"], g["lr"]) for g in groups] == [
        (decay, rate / 2), (0, rate / 2), (0, rate), (decay, rate)]


def test_accumulation_equals_the_larger_batch(tmp_path):
    one, log_one = toy("--plain", "--out", tmp_path / "1")
    two, log_two = toy("--plain", "--out", tmp_path / "2", "--batch-size", 4, "--accum", 2)
    for a, b in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert [line["loss"] for line in log_one] == pytest.approx([line["loss"] for line in log_two], abs=1e-5)


def test_best_is_by_the_metric_and_on_the_average(tmp_path):
    values, models = iter([3.0, 1.0, 2.0]), []
    toy("--out", tmp_path, metric="score", lower_is_better=True,
        evaluate=lambda model, epoch: models.append(model) or {"score": next(values)})
    state = load(tmp_path / "best.pt")
    assert state["best"] == 1.0 and state["epoch"] == 2 and load(tmp_path / "last.pt")["best"] == 1.0
    assert_same(dict(models[0].state_dict()), dict(load(tmp_path / "last.pt")["ema"])) and not models[0].training


@pytest.mark.parametrize("lower, values, best", [
    (False, [math.nan, 50.0, 60.0], 3), (False, [50.0, math.nan, 40.0], 1), (True, [math.nan, 2.0, math.inf], 2),
    (True, [3.0, math.nan, 2.0], 3), (False, [math.inf, 1.0, 0.5], 2)])
def test_no_number_is_never_the_best_and_null_in_the_log(lower, values, best, tmp_path):
    given = iter(values)
    toy("--out", tmp_path, metric="score", lower_is_better=lower,
        evaluate=lambda model, epoch: {"score": next(given), "other": math.nan})
    assert load(tmp_path / "best.pt")["epoch"] == best
    assert load(tmp_path / "last.pt")["best"] == values[best - 1]

    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "log.jsonl").open()]
    assert [line["metrics"]["score"] for line in lines] == [v if math.isfinite(v) else None for v in values]
    assert {line["metrics"]["other"] for line in lines} == {None} and (tmp_path / "curve.png").exists()


def test_an_evaluation_of_no_image_keeps_what_was_learnt(tmp_path):
    ctx = training.Context(0, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match="none of the images to evaluate on can be read"):
        toy("--out", tmp_path,
            evaluate=lambda model, epoch: evaluate_classifier(model, [None, None], ctx))
    assert load(tmp_path / "last.pt")["step"] == 6


def test_eval_every(tmp_path):
    log = toy("--out", tmp_path, "--eval-every", 2)[1]
    assert [bool(line["metrics"]) for line in log] == [False, True, True]


def test_evaluate_classifier_weighs_samples_not_batches():
    logits = torch.eye(7)[[0, 1, 2, 3]] * 5 + torch.arange(7) * 0.1
    labels = torch.tensor([0, 1, 2, 0])                   # the last: class 0 is the sixth of seven
    ctx = training.Context(0, 1, torch.device("cpu"))
    batches = [(logits[:3], labels[:3]), None, (logits[3:], labels[3:])]       # None: a batch of unreadable images
    result = evaluate_classifier(nn.Identity(), batches, ctx)
    assert result == pytest.approx({"top1": 75.0, "top5": 75.0, "loss": F.cross_entropy(logits, labels).item(),
                                    "images": 4})


# ---- Checkpoints and resume ------------------------------------------------------------------------------------------

def test_checkpoint_needs_no_pickle(whole):
    state = load(whole / "last.pt")
    assert {"model", "ema", "optimizer", "step", "epoch", "best", "args", "git", "torch", "running"} <= state.keys()
    assert state["step"] == 18 and state["epoch"] == 3 and state["args"]["lr"] == 0.02


def test_kill_within_an_epoch_then_resume_is_exact(tmp_path, whole):
    killed = process(tmp_path / "said", "--out", tmp_path, "--save-minutes", 0, "--kill-at", 9)
    assert killed.wait() == -signal.SIGKILL and load(tmp_path / "last.pt")["step"] == 9
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1
    toy("--out", tmp_path, "--resume")
    assert_same(load(tmp_path / "last.pt"), load(whole / "last.pt"))
    assert_same(load(tmp_path / "best.pt"), load(whole / "best.pt"))
    assert_same(*([json.loads(line) for line in (out / "log.jsonl").open()] for out in (tmp_path, whole)))


@pytest.mark.parametrize("step", [0, 5, 6, 17])
def test_resume_is_exact_from_any_step(tmp_path, whole, step):
    """Also at the borders: after the first step, before and after an epoch's evaluation, before the last one."""
    class Crash(Exception):
        pass

    def crash(now):
        if now == step + 1:
            raise Crash

    with pytest.raises(Crash):
        toy("--out", tmp_path, "--save-minutes", 0, on_step=crash, on_evaluate=crash)
    assert load(tmp_path / "last.pt")["step"] == step + 1
    toy("--out", tmp_path, "--resume")
    assert_same(load(tmp_path / "last.pt"), load(whole / "last.pt"))


def test_resume_between_micro_steps_skips_the_right_batches(tmp_path):
    argv = "--batch-size", 4, "--accum", 2
    toy("--out", tmp_path / "whole", *argv)
    with pytest.raises(SystemExit):
        toy("--out", tmp_path / "parts", *argv, on_step=lambda n: n == 15 and os.kill(os.getpid(), signal.SIGTERM))
    assert load(tmp_path / "parts" / "last.pt")["step"] == 8
    toy("--out", tmp_path / "parts", *argv, "--resume")
    assert_same(load(tmp_path / "parts" / "last.pt"), load(tmp_path / "whole" / "last.pt"))


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129),
                                            (signal.SIGUSR1, 138), (signal.SIGUSR2, 140)])
def test_signal_saves_then_resume_is_exact(tmp_path, whole, number, status):
    stopped = process(tmp_path / "said", "--out", tmp_path, "--kill-at", 7, "--kill-with", int(number))
    assert stopped.wait() == status and "with --resume continues" in stopped.said(), stopped.said()
    assert load(tmp_path / "last.pt")["step"] == 8        # the step at work was finished
    before = signal.getsignal(number)
    toy("--out", tmp_path, "--resume")
    assert signal.getsignal(number) == before
    assert_same(load(tmp_path / "last.pt"), load(whole / "last.pt"))


def wish_to_stop_four_times():
    with safety.stop_signals() as received:
        for name in ("INT", "TERM", "TERM"):
            os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
        print(received, flush=True)
        os.kill(os.getpid(), signal.SIGINT)
        print("here", flush=True)


@pytest.mark.parametrize("environment, status, last", [
    ({}, -signal.SIGINT, "[2]"), ({"TORCHELASTIC_RUN_ID": "1"}, 0, "here")])
def test_only_a_second_ctrl_c_ends_at_once(environment, status, last, tmp_path):
    """Schedulers repeat SIGTERM, and torchrun repeats whatever it receives: neither may cost the checkpoint."""
    child = Child(wish_to_stop_four_times, output=tmp_path / "said", **environment)
    assert child.wait() == status
    lines = [line for line in child.said().splitlines() if line in ("[2]", "here")]
    assert lines[0] == "[2]" and lines[-1] == last


def test_actions_of_others_on_signals_stay():
    """nohup ignores SIGHUP, submitit has an action of its own on SIGUSR2."""
    seen = []
    old = [signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGUSR2, lambda *args: seen.append(args))]
    try:
        with safety.stop_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR2)
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGHUP)
        assert received == [signal.SIGUSR1] and len(seen) == 1
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, old[0])
        signal.signal(signal.SIGUSR2, old[1])


def test_signal_during_the_evaluation_ends_after_it(tmp_path, whole):
    def interrupt(step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as caught:
        toy("--out", tmp_path, on_evaluate=interrupt)
    assert caught.value.code == 128 + signal.SIGTERM
    assert load(tmp_path / "last.pt")["step"] == 6 and load(tmp_path / "last.pt")["epoch"] == 1
    toy("--out", tmp_path, "--resume")
    assert_same(load(tmp_path / "last.pt"), load(whole / "last.pt"))


def test_best_alone_and_damaged_checkpoints(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "last.pt").unlink()               # as after a full disk
    assert toy("--out", tmp_path / "run", "--resume")[1] == load(whole / "best.pt")["history"]
    for content in ((whole / "last.pt").read_bytes()[:1000], b"text"):
        (tmp_path / "run" / "last.pt").write_bytes(content)
        with pytest.raises(SystemExit, match="last.pt is no readable checkpoint.*best.pt"):
            toy("--out", tmp_path / "run", "--resume")


def test_a_run_continued_elsewhere_gets_its_own_best(tmp_path, whole):
    toy("--out", tmp_path / "a", "--epochs", 1)
    toy("--out", tmp_path / "b", "--epochs", 2, "--resume", tmp_path / "a" / "last.pt", "--resume-changed")
    assert load(tmp_path / "b" / "best.pt")["epoch"] == 2


def test_an_error_keeps_what_was_learnt_before(tmp_path, whole):
    def fail(step):
        if step == 4:
            raise OSError("the disk of the data has gone")

    def loss_fn(model, batch):
        fail(calls.append(None) or len(calls))
        return cross_entropy(model, batch)

    calls = []
    with pytest.raises(OSError, match="has gone"):
        toy("--out", tmp_path, loss_fn=loss_fn)
    assert load(tmp_path / "last.pt")["step"] == 3


@pytest.mark.parametrize("flags", ["--batch-size 0", "--accum 0", "--epochs 0", "--epochs -1", "--steps 0", "--ema 1",
                                   "--ema -0.1", "--clip -1", "--weight-decay -1", "--save-minutes -1", "--seed -1",
                                   "--workers -1", "--threads 0", "--lr -1", "--lr nan", "--eval-every 0"])
def test_values_out_of_range_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        toy(*flags.split())
    assert f"argument {flags.split()[0]}: {flags.split()[1]} must be at least" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["abacus", "meta9", "cuda:99"])
def test_unusable_devices_are_refused(device, tmp_path):
    with pytest.raises(SystemExit, match=f"--device {device} cannot be used"):
        toy("--device", device, "--out", tmp_path)


def test_finished_run_resumes_to_nothing(tmp_path):
    toy("--out", tmp_path, "--epochs", 1)
    before = load(tmp_path / "last.pt")
    toy("--out", tmp_path, "--epochs", 1, "--resume")
    assert_same(before, load(tmp_path / "last.pt"))


def test_resume_without_a_checkpoint_starts(tmp_path, whole):
    toy("--out", tmp_path, "--resume")                    # a cluster's restart script can always say --resume
    assert_same(load(tmp_path / "last.pt"), load(whole / "last.pt"))
    with pytest.raises(SystemExit, match="no such file"):
        toy("--out", tmp_path, "--resume", tmp_path / "nothing.pt")


def test_changed_arguments_are_named(tmp_path, capsys):
    toy("--out", tmp_path, "--epochs", 1)
    with pytest.raises(SystemExit, match=r"epochs 2.0 \(checkpoint: 1.0\), lr 0.5 \(checkpoint: 0.02\)"):
        toy("--out", tmp_path, "--resume", "--epochs", 2, "--lr", 0.5)
    with pytest.raises(SystemExit, match="steps_per_epoch 3"):
        toy("--out", tmp_path, "--resume", "--epochs", 1, "--accum", 2, "--resume-changed")
    toy("--out", tmp_path, "--resume", "--epochs", 1, "--workers", 3, "--data", "there", "--save-minutes", 3)
    capsys.readouterr()
    toy("--out", tmp_path, "--resume", "--resume-changed", "--epochs", 2)
    assert "epochs 2.0 (checkpoint: 1.0)" in capsys.readouterr().out and load(tmp_path / "last.pt")["step"] == 12


def test_a_changed_weight_decay_is_what_the_resumed_run_trains_with(tmp_path):
    def decays():
        return [group["weight_decay"] for group in load(tmp_path / "last.pt")["optimizer"]["param_groups"]]

    toy("--out", tmp_path, "--epochs", 1, "--weight-decay", 0.3, weight_decay=None)
    assert set(decays()) == {0.3, 0}
    toy("--out", tmp_path, "--resume", "--epochs", 2, "--weight-decay", 0.1, "--resume-changed", weight_decay=None)
    assert set(decays()) == {0.1, 0}


def test_fresh_start_does_not_overwrite(tmp_path):
    toy("--out", tmp_path / "a", "--epochs", 1)
    files = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    for argv in ((), ("--seed", 3), ("--resume", tmp_path / "b" / "last.pt")):
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / "last.pt").write_bytes(files[tmp_path / "a" / "last.pt"])
        with pytest.raises(SystemExit, match="exists"):
            toy("--out", tmp_path / "a", *argv)
    assert files == {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    (tmp_path / "a" / "last.pt").unlink()
    with pytest.raises(SystemExit, match="best.pt exists"):
        toy("--out", tmp_path / "a")


def test_full_disk_keeps_the_previous_checkpoint(tmp_path, capsys):
    """A limit on the size of files stands for the full disk; it is lifted again before the last save."""
    def on_step(step):
        if step in (2, 4):
            soft = 2000 if step == 2 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))
        if step == 4:
            state = load(tmp_path / "last.pt")
            assert state["step"] == 2 and not list(tmp_path.glob("*.tmp"))

    toy("--out", tmp_path, "--epochs", 1, "--save-minutes", 0, on_step=on_step)
    assert capsys.readouterr().err.count("WARNING: cannot write") == 2
    assert load(tmp_path / "last.pt")["step"] == 6


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_failing_last_save_is_an_error(tmp_path, monkeypatch, name):
    def fail(*args):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        toy("--out", tmp_path, "--epochs", 1, "--save-minutes", 0,
            on_step=lambda step: monkeypatch.setattr(safety.os, name, fail) if step == 3 else None)
    assert load(tmp_path / "last.pt")["step"] == 3 and not list(tmp_path.glob("*.tmp"))


# ---- Sinks of the log ------------------------------------------------------------------------------------------------

def on_board(out):
    """What TensorBoard reads: {name: [its events]}."""
    read = EventAccumulator(str(out / "tensorboard")).Reload()
    return {name: read.Scalars(name) for name in read.Tags()["scalars"]}


def lines_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").open()]


def assert_on_board(out):
    """Each line of the log once."""
    lines = lines_of(out)
    board = {name: [(event.step, event.value) for event in events] for name, events in on_board(out).items()}
    names = {"epoch", "lr", "loss", "grad_norm", "seconds", "img_per_s", "val/top1", "val/top5", "val/loss", "val/images"}
    assert board.keys() == names
    for name in ("loss", "lr", "grad_norm", "epoch"):
        assert board[name] == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
    assert board["val/top1"] == [(line["step"], pytest.approx(line["metrics"]["top1"])) for line in lines]


def test_tensorboard_has_each_line_once_whatever_happened(tmp_path, whole):
    killed = process(tmp_path / "said", "--out", tmp_path, "--log", "tensorboard", "--save-minutes", 0, "--kill-at", 13)
    assert killed.wait() == -signal.SIGKILL
    before = on_board(tmp_path)["loss"]
    assert [event.step for event in before] == [6, 12]
    [file] = (tmp_path / "tensorboard").iterdir()
    while int(time.time()) <= int(file.name.split(".")[3]):  # TensorBoard sorts files by the second of their start
        time.sleep(0.01)
    toy("--out", tmp_path, "--log", "tensorboard", "--resume")
    assert_on_board(tmp_path)
    assert on_board(tmp_path)["loss"][:2] == before       # with the time of day
    assert_same(load(tmp_path / "last.pt"), load(whole / "last.pt"))
    toy("--out", tmp_path, "--log", "tensorboard", "--resume", tmp_path / "best.pt")        # from further back
    assert_on_board(tmp_path)


def test_a_log_that_began_before_its_sink_is_written_whole(tmp_path):
    with pytest.raises(SystemExit):
        toy("--out", tmp_path, on_step=lambda n: n == 13 and os.kill(os.getpid(), signal.SIGTERM))
    toy("--out", tmp_path, "--log", "tensorboard", "--resume")
    assert_on_board(tmp_path)


def test_a_kill_between_sink_and_checkpoint(tmp_path, monkeypatch):
    class Crash(BaseException):
        pass

    def crash(run, name, required=False):
        if run.step == 12 and name == "last.pt":
            raise Crash
        return save(run, name, required)

    save = training.Run.save
    monkeypatch.setattr(training.Run, "save", crash)
    with pytest.raises(Crash):
        toy("--out", tmp_path, "--log", "tensorboard")
    monkeypatch.undo()
    assert load(tmp_path / "last.pt")["step"] == 6 and len(on_board(tmp_path)["loss"]) == 2
    toy("--out", tmp_path, "--log", "tensorboard", "--resume", tmp_path / "last.pt")
    assert_on_board(tmp_path)


class FakeWandB(types.ModuleType):
    """What wandb does, as far as sinks.py asks for it: a server that keeps the lines of each id."""

    class Run:
        def __init__(self, lines, options):
            self.lines, self.options, self.step = lines, options, max(lines, default=-1) + 1

        def log(self, values, step, commit):
            assert step >= self.step and commit and step not in self.lines
            self.lines[step] = values
            self.step = step + 1

        def finish(self):
            self.finished = True

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.server = [], {}

    def Settings(self, console):
        return console

    def init(self, **options):
        assert options["resume"] == "allow"
        self.runs.append(self.Run(self.server.setdefault(options["id"], {}), options))
        return self.runs[-1]


@pytest.fixture
def wandb(monkeypatch):
    module = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_goes_on_with_the_same_run(tmp_path, wandb):
    with pytest.raises(SystemExit):
        toy("--out", tmp_path, "--log", "wandb", on_step=lambda n: n == 8 and os.kill(os.getpid(), signal.SIGTERM))
    toy("--out", tmp_path, "--log", "wandb", "--resume")
    toy("--out", tmp_path, "--log", "wandb", "--resume", tmp_path / "best.pt")
    [(name, lines)] = wandb.server.items()
    assert name == (tmp_path / "wandb.id").read_text() and len(name) == 16
    assert list(lines) == [6, 12, 18] and all(run.finished for run in wandb.runs)
    assert [line["loss"] for line in lines.values()] == [line["loss"] for line in lines_of(tmp_path)]
    assert lines[18]["val/top1"] == lines_of(tmp_path)[2]["metrics"]["top1"] and "peak_mib" not in lines[6]
    assert wandb.runs[0].options["config"]["ema"] == 0.9 and wandb.runs[0].options["dir"] == tmp_path
    toy("--out", tmp_path / "other", "--log", "wandb", "--epochs", 1)
    assert len(wandb.server) == 2                         # another run, another id


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_sink_that_fails_does_not_end_the_run(where, tmp_path, whole, wandb, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(wandb if where == "init" else FakeWandB.Run, where, fail)
    toy("--out", tmp_path, "--log", "wandb", "tensorboard", "--log", "wandb")
    said = capsys.readouterr().err
    assert said.count("--log wandb ends here, the training goes on: ConnectionError: no route to host") == 1
    assert_same(load(tmp_path / "last.pt"), load(whole / "last.pt"))
    assert_on_board(tmp_path)


def test_without_log_nothing_is_imported_and_a_missing_package_is_named_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    toy("--out", tmp_path / "without", "--epochs", 1)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(ImportError, match=f"--log {name} needs the package {name} .*: pip install {name}$"):
            toy("--out", tmp_path / name, "--log", name)
        assert not (tmp_path / name).exists()
    with pytest.raises(SystemExit):
        toy("--out", tmp_path, "--log", "paper")
    assert "invalid choice: 'paper'" in capsys.readouterr().err


def test_the_main_process_alone_writes(tmp_path):
    ended = two_processes(tmp_path, toy, "--out", str(tmp_path), "--log", "tensorboard", "--batch-size", "4")
    assert [status for status, _ in ended] == [0, 0], ended
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert_on_board(tmp_path)


# ---- Other people's processes and folders --------------------------------------------------------------------------

def launched(monkeypatch, variables):
    """What the launcher says that sets these "A=1 B=2"; the machine's own are gone."""
    for names in processes.LAUNCHERS.values():
        for name in (*names, "SLURM_STEP_NUM_TASKS", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    return processes.place()


@pytest.mark.parametrize("variables, expected", [
    ("", (0, 1, 0)), ("RANK=1 WORLD_SIZE=4 LOCAL_RANK=1", (1, 4, 1)), ("RANK=0 WORLD_SIZE=1", (0, 1, 0)),
    ("SLURM_NTASKS=8", (0, 1, 0)), ("SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0", (0, 1, 0)), ("SLURM_PROCID=0", (0, 1, 0)),
    ("SLURM_PROCID=3 SLURM_NTASKS=8 SLURM_LOCALID=1", (3, 8, 1)),
    ("SLURM_PROCID=0 SLURM_NTASKS=8 SLURM_STEP_NUM_TASKS=1", (0, 1, 0)),
    ("OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1", (1, 2, 1)), ("PMI_RANK=1 PMI_SIZE=2", (1, 2, 0)),
    ("RANK=5 WORLD_SIZE=16 LOCAL_RANK=5 SLURM_PROCID=0 SLURM_NTASKS=2", (5, 16, 5)),        # a torchrun a node
    ("RANK=0 WORLD_SIZE=1 SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_LOCALID=1", (1, 2, 1)),      # the first two are left over
    ("TORCHELASTIC_RUN_ID=x RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 SLURM_PROCID=0 SLURM_NTASKS=8", (0, 1, 0))])
def test_what_launchers_say(variables, expected, monkeypatch):
    assert launched(monkeypatch, variables) == expected


@pytest.mark.parametrize("variables", [
    "RANK=1", "RANK=0", "LOCAL_RANK=1", "WORLD_SIZE=2", "RANK=2 WORLD_SIZE=2", "RANK=-1 WORLD_SIZE=2", "RANK=a WORLD_SIZE=2",
    "RANK=1 LOCAL_RANK=1", "WORLD_SIZE=2 LOCAL_RANK=0", "SLURM_PROCID=1", "SLURM_PROCID=2 SLURM_NTASKS=2", "PMI_RANK=1",
    "OMPI_COMM_WORLD_RANK=1", "RANK=0 WORLD_SIZE=0", "RANK= WORLD_SIZE=1"])
def test_half_a_launcher_is_refused(variables, monkeypatch):
    with pytest.raises(ValueError, match=f"{variables.split()[0]}.* in the environment.*start with torchrun"):
        launched(monkeypatch, variables)


@pytest.mark.parametrize("variables", ["RANK=1 WORLD_SIZE=2", "SLURM_PROCID=0 SLURM_NTASKS=2", "PMI_RANK=1 PMI_SIZE=2 MASTER_ADDR=x"])
def test_processes_that_cannot_find_each_other_are_refused(variables, monkeypatch):
    launched(monkeypatch, variables)
    with pytest.raises(ValueError, match="of 2, and .*MASTER_PORT not set"):
        processes.join("cpu")


def hold(folder):
    assert safety.lock_folder(folder) is None
    print("locked", flush=True)
    signal.pause()


def test_a_folder_has_one_run_at_a_time(tmp_path):
    """The lock of a process that was killed is none, whatever its file says."""
    holder = Child(hold, str(tmp_path / "run"), output=tmp_path / "said")
    while not (tmp_path / "said").exists() or "locked" not in holder.said():
        assert holder.poll() is None
    with pytest.raises(ValueError, match=f"another run is at work there \\(process {holder.pid} on "):
        toy("--out", tmp_path / "run", "--steps", 1)
    toy("--out", tmp_path / "other", "--steps", 1)
    os.kill(holder.pid, signal.SIGKILL)
    assert holder.wait() == -signal.SIGKILL and "process" in (tmp_path / "run" / ".lock").read_text()
    toy("--out", tmp_path / "run", "--steps", 1)
    holder = Child(hold, str(tmp_path / "run"), output=tmp_path / "again")           # a run that has ended gives it back
    while not (tmp_path / "again").exists() or "locked" not in holder.said():
        assert holder.poll() is None
    os.kill(holder.pid, signal.SIGKILL)
    assert holder.wait()


@pytest.mark.parametrize("out", ["file", "file/run", "x" * 300, "/proc/run"])
def test_a_folder_that_cannot_be_written_is_refused_in_one_line(out, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit, match="script: .*(cannot be written|File name too long)") as caught, runs.plain_errors("script"):
        toy("--out", tmp_path / out)
    assert "\n" not in str(caught.value)


def test_the_last_run_is_that_of_the_recipe_or_else_of_the_built_in_data(tmp_path):
    recipe, toy_recipe, typed = ({"out": str(tmp_path / name)} for name in ("recipe", "toy", "typed"))

    def found(out, name="best.pt"):
        return os.path.relpath(runs.last_run(out["out"], recipe, toy_recipe, name), tmp_path)

    assert found(recipe) == "recipe/best.pt"                    # there is none: it is named
    for folder in ("toy", "recipe"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "best.pt").touch()
        assert found(recipe) == f"{folder}/best.pt"
    assert found(typed) == "typed/best.pt" and found(recipe, "last.pt") == "recipe/last.pt"


@pytest.mark.parametrize("built", ["fastvim_tiny", [1], {"name": 3, "fields": {}}, {"fields": {}}, {"name": "fastvim_tiny"},
                                   {"name": "fastvim_tiny", "fields": [("depth", 2)]}])
def test_a_checkpoint_that_says_wrongly_how_its_model_was_built(built, tmp_path):
    torch.save({"model": {}, "built": built, "args": {}}, tmp_path / "best.pt")
    with pytest.raises(ValueError, match="best.pt does not say rightly how its model was built"):
        runs.read(str(tmp_path / "best.pt"))


@pytest.mark.parametrize("dev", [False, True])
def test_errors_are_a_line_and_for_developers_a_traceback(dev):
    code = "import runs\nwith runs.plain_errors('script'): raise ValueError('--lr is odd')"
    result = subprocess.run([sys.executable, *["-X", "dev"][:2 * dev], "-W", "ignore", "-c", code], cwd=os.path.dirname(runs.__file__),
                            capture_output=True, text=True, check=False)
    assert result.returncode == 1 and ("Traceback" in result.stderr) == dev
    assert result.stderr.endswith("script: --lr is odd\n") != dev


def flood(descriptor, *argv):
    """Every print into it fails, those at the exit too."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)
    toy(*argv)
    print("after", file=[sys.stdout, sys.stderr][descriptor - 1])


@pytest.mark.parametrize("descriptor", [1, 2])
def test_a_full_log_disk_ends_nothing(descriptor, tmp_path, whole):
    run = Child(flood, descriptor, "--out", str(tmp_path / "run"), output=tmp_path / "said")
    assert run.wait() == 0, run.said()
    assert ("epoch 3/3" in run.said()) == (descriptor == 2)
    assert_same(load(tmp_path / "run" / "last.pt"), load(whole / "last.pt"))


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), BrokenPipeError(), ValueError("closed file")])
def test_a_stream_that_others_have_put_there_and_that_is_full_ends_nothing(name, error, tmp_path, monkeypatch, whole):
    class Full(io.StringIO):
        def fail(self, *text):
            raise error

        write = flush = fail

    monkeypatch.setattr(sys, name, Full())
    toy("--out", tmp_path)
    print("after", file=getattr(sys, name), flush=True)
    assert_same(load(tmp_path / "last.pt"), load(whole / "last.pt"))


def test_an_epoch_is_saved_before_it_is_told(tmp_path, monkeypatch):
    def fail(run, *rest):
        raise RuntimeError(load(run.out / "last.pt")["epoch"])

    monkeypatch.setattr(logs, "tell", fail)
    with pytest.raises(RuntimeError, match="^1$"):
        toy("--out", tmp_path)


def test_another_list_of_samples_is_refused(tmp_path, monkeypatch, capsys):
    def again(paths, *flags):
        files = data.Files([(path, i % 3) for i, path in enumerate(paths)], ["a", "b", "c"], None, None, "x")
        monkeypatch.setattr(Loader, "dataset", data.Seeded(files, 0), raising=False)
        toy("--out", tmp_path, "--epochs", 1, "--resume", *flags)

    paths = [f"/data/train/{i:02}/\udcff.png" for i in range(48)]              # a name that is no UTF-8
    again(paths)
    again([path.replace("/data", "/moved/elsewhere") for path in paths])       # the same below the folder
    for other in ([*paths[1:], "/data/train/new"], paths[::-1], [*paths, "/data/train/49"]):
        with pytest.raises(SystemExit, match="training_set '.* samples, list .*--resume-changed"):
            again(other)
    again([*paths, "/data/train/49"], "--resume-changed")
    assert "with changed training_set '49 samples" in capsys.readouterr().out


def test_home_is_found_in_every_option(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = runs.Parser()
    parser.add_argument("--predict", nargs="+")
    parser.add_argument("--images")
    runs.add_training_arguments(parser, RECIPE)
    args = parser.parse_args(["--out=~/a", "--resume", "~/b", "--predict", "~/c", "d~", "--images", "s3://x=~/y", "--steps", "3"])
    assert vars(args) == {"out": "/home/me/a", "resume": "/home/me/b", "predict": ["/home/me/c", "d~"],
                          "images": "s3://x=/home/me/y", "steps": 3}


@pytest.mark.parametrize("folders, out, fine", [
    ("a b", "runs/x", False), ("a b", "a", False), ("a b", ".", True), ("a b", "../runs", True),
    ("train val", "runs/x", True), ("train val", "train/x", False), ("train val", "val", False),
    ("images annotations", "runs", True), ("train2017 annotations", "annotations/x", False)])
def test_out_among_the_images_is_refused(folders, out, fine, tmp_path):
    for name in folders.split():
        (tmp_path / "data" / name).mkdir(parents=True)
    options = {"out": str(tmp_path / "data" / out), "data": str(tmp_path / "data"), "resume": None}
    if fine:
        assert runs.starting_point(options, None) == runs.Saved()
    else:
        with pytest.raises(ValueError, match="--out .* lies among the images of --data"):
            runs.starting_point(options, None)


@pytest.mark.parametrize("error", [OSError(40, "Too many levels of symbolic links"), FileExistsError("x"),
                                   data.BadDataError("x"), ValueError("x"), PermissionError(13, "x")])
def test_expected_faults_end_in_a_line(error):
    with pytest.raises(SystemExit, match="^script: [^\n]*$"), runs.plain_errors("script"):
        raise error
    with pytest.raises(KeyError), runs.plain_errors("script"):
        raise KeyError("a bug")


def test_names_that_are_no_text_are_printed_escaped(tmp_path, monkeypatch):
    with open(tmp_path / "log", "w", encoding="ascii") as file:
        monkeypatch.setattr("sys.stdout", file)
        with runs.plain_errors("script"):
            print("/d/\udcff\u00e9.png")
    assert (tmp_path / "log").read_text() == "/d/\\udcff\\xe9.png\n"


def test_samples_read_as_the_list_they_were_made_of():
    listed = [(f"/d/\udcff{i}", i) for i in range(5)] + [("/d/x", b"text")]
    samples = data.loading.Samples(listed)
    assert len(samples) == 6 and list(samples) == listed and samples[-1] == listed[-1] and samples[1:3] == listed[1:3]
    assert samples[np.int64(3)] == listed[3]
    with pytest.raises(IndexError):
        samples[6]
    assert list(data.loading.Samples([])) == []


# ---- Stopping --------------------------------------------------------------------------------------------------------

def test_nonfinite_loss_names_the_module_and_spares_the_weights(tmp_path, poison):
    def on_step(step):
        poison.active = step >= 8

    with pytest.raises(NonFiniteError, match=r"step 8, epoch 2.*output of 5.0 \(Poison\)") as caught:
        toy("--out", tmp_path, "--save-minutes", 0, on_step=on_step)
    assert "at step 8, epoch 2. " in str(caught.value)
    state = load(tmp_path / "last.pt")
    assert state["step"] == 8 and not safety.not_finite(state["model"])


def test_nonfinite_loss_names_loss_input_or_parameter(tmp_path):
    with pytest.raises(NonFiniteError, match="the loss function"):
        toy("--out", tmp_path, loss_fn=lambda model, batch: cross_entropy(model, batch) / 0)
    with pytest.raises(NonFiniteError, match="the parameter 5.1.bias"):
        def loss_fn(model, batch):
            with torch.no_grad():
                model[5][1].bias[1] = math.inf
            return cross_entropy(model, batch)
        toy("--out", tmp_path, loss_fn=loss_fn)
    INPUTS[7, 2], good = math.nan, INPUTS[7, 2].item()
    try:
        with pytest.raises(NonFiniteError, match="the input batch"):
            toy("--out", tmp_path)
    finally:
        INPUTS[7, 2] = good


def test_nonfinite_loss_that_does_not_recur(tmp_path):
    losses = iter([math.nan])
    with pytest.raises(NonFiniteError, match="unknown"):
        toy("--out", tmp_path, loss_fn=lambda model, batch: cross_entropy(model, batch) * next(losses, 1.0))


def test_rerun_sees_the_same_batch_and_random_numbers(tmp_path, poison):
    seen = []

    def loss_fn(model, batch):
        seen.append((batch["x"].clone(), torch.rand(3), random.random(), np.random.rand()))
        batch["x"].mul_(0.5)                              # in place, as timm's mixup does
        return cross_entropy(model, batch)

    poison.active = True
    with pytest.raises(NonFiniteError):
        toy("--out", tmp_path, loss_fn=loss_fn)
    assert_same(*seen)


def test_nonfinite_gradient_names_the_parameters(tmp_path):
    def loss_fn(model, batch):
        return cross_entropy(model, batch) + (model[5][1].weight * 0).abs().sqrt().sum()     # infinite slope at zero

    with pytest.raises(NonFiniteError, match=r"loss is finite.*step 0.*gradients of 5.1.weight"):
        toy("--out", tmp_path, loss_fn=loss_fn)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")])
def test_out_of_memory_says_what_to_try(tmp_path, error):
    def loss_fn(model, batch):
        raise error

    with pytest.raises(SystemExit, match="try --batch-size 4 --accum 2") as caught:
        toy("--out", tmp_path, loss_fn=loss_fn)
    assert caught.value.__cause__ is error
    with pytest.raises(SystemExit, match="smaller model"):
        toy("--out", tmp_path, "--batch-size", 1, loss_fn=loss_fn)
    with pytest.raises(SystemExit, match="smaller model"):      # 3 would be odd, which mixup refuses
        toy("--out", tmp_path, "--batch-size", 6, loss_fn=loss_fn)


def test_other_errors_pass(tmp_path):
    def loss_fn(model, batch):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        toy("--out", tmp_path, loss_fn=loss_fn)


# ---- Several processes -----------------------------------------------------------------------------------------------

def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    """Two micro-steps each, stopped by a signal to one of them and resumed on the way."""
    argv = "--plain", "--accum", 2
    toy("--out", tmp_path / "one", *argv, "--batch-size", 8)
    argv = "--out", tmp_path / "two", *argv, "--batch-size", 4
    ended = two_processes(tmp_path, toy, *argv, "--kill-at", 9, "--kill-with", 15)
    assert [status for status, _ in ended] == 2 * [128 + signal.SIGTERM], ended
    assert "stopped after step 5 of 9" in ended[0][1]
    (first, said), (second, nothing) = two_processes(tmp_path, toy, *argv, "--resume")
    assert first == second == 0, said + nothing
    assert said.count("epoch 2/3") == 1 and "epoch 2/3" not in nothing      # only one process prints
    one, two = load(tmp_path / "one" / "last.pt"), load(tmp_path / "two" / "last.pt")
    for part in ("model", "ema"):
        for name in one[part]:
            torch.testing.assert_close(one[part][name], two[part][name], rtol=1e-5, atol=1e-5)
    for a, b in zip(one["history"], two["history"], strict=True):
        assert [b["loss"], b["grad_norm"]] == pytest.approx([a["loss"], a["grad_norm"]], abs=1e-5)
        assert b["metrics"] == pytest.approx(a["metrics"], abs=1e-5)


def test_nonfinite_loss_on_one_process_stops_both(tmp_path):
    said = "NonFiniteError: the loss is nan at step 3, epoch 1. It begins in the output of 5.0 (Poison), process 1"
    for status, printed in two_processes(tmp_path, poisoned, "--out", tmp_path, "--batch-size", 4):
        assert status != 0 and said in printed


def poisoned(*argv):
    """Process 1 meets a nan in its step 3."""
    def poison_one(step):
        Poison.active = step >= 3 and os.environ["RANK"] == "1"

    toy(*argv, on_step=poison_one)
