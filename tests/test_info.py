"""python fastvim.py: the multiply-adds that it counts, its tables, the doctor, its command line."""
import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import fastvim
import fastvim_build
import info
import walkthrough
from helpers import images, tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]
VARIANTS = [{}, {"schedule": "vim", "class_token": True}, {"class_token": True},
            {"pool": "attention"}, {"d_conv": 0}, {"schedule": "fastchannelvim_2d"},
            {"schedule": "channelvim", "class_token": True}, {"dt_rank": 3, "expand": 1},
            {"schedule": "fastvim_video", "frames": 5, "tubelet": 2}]


# ---- counting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, (40, 24)], ids=str)
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_matrix_products_are_counted_exactly(monkeypatch, fields, size):
    """torch counts matrix products and convolutions, two operations a multiply-add. It does not see
    norms; the scan, which is counted by another convention, is left out here."""
    monkeypatch.setattr(fastvim, "selective_scan", lambda x, *_: x)
    model = tiny(torch.float32, **{"dt_rank": 2, **fields})     # rank 1 would run elementwise
    x = images(model, 1, size if isinstance(size, tuple) else (size, size))
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), fastvim.use_backend("python"):
        model(x)
    macs = info.count_macs(dataclasses.replace(model.cfg, img_size=size))
    counted = sum(n for part, n in macs.items() if part not in ("scan", "norm"))
    assert counter.get_total_flops() == 2 * counted


def test_masked_tokens_are_not_counted():
    cfg = fastvim.Config(embed_dim=16, depth=2, img_size=64, patch_size=8)  # 8 x 8 tokens
    whole = info.count_macs(cfg)
    quarter = info.count_macs(cfg, kept=0.25)
    assert all(quarter[k] * 4 == whole[k] for k in ("in_proj", "out_proj", "conv1d", "norm"))
    same = ("patch_embed", "x_proj", "dt_proj", "scan", "head")
    assert all(quarter[k] == whole[k] for k in same)


def test_scan_and_norm_are_counted_by_the_convention():
    cfg = fastvim.Config(embed_dim=16, depth=2, img_size=(64, 32))          # 4 x 2 tokens
    macs = info.count_macs(cfg)
    assert macs["scan"] == 2 * 9 * (4 + 2) * 32 * 16    # 9 p e n a direction; 4 rows, then 2 columns
    assert macs["norm"] == 5 * 8 * (16 + 2 * (16 + 32))         # final, then block and post-SSM norms


@pytest.mark.parametrize("name, giga", [("fastvim_tiny", 1.17), ("fastvim_small", 4.43),
                                        ("fastvim_base", 17.23)])
def test_totals_of_the_paper(name, giga):
    family, size = name.split("_")
    cfg = fastvim.Config(**fastvim.SIZES[size], **fastvim.FAMILIES[family])
    assert sum(info.count_macs(cfg).values()) / 1e9 == pytest.approx(giga, rel=0.03)


# ---- the command line --------------------------------------------------------------------------


def run_file(*arguments, **environment):
    return subprocess.run([sys.executable, "fastvim.py", *arguments], capture_output=True,
                          text=True, timeout=120, cwd=ROOT, env={**os.environ, **environment})


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fastvim.py", *arguments])
    info.main()


def test_the_table_of_models():
    result = run_file("--models", "fastvim_tiny")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^fastvim_tiny +7,166,056 +1\.1\d +\d+\.\d$", result.stdout, re.MULTILINE)
    assert "fastvim_small" not in result.stdout
    assert "backend" in result.stdout


def test_the_doctor(monkeypatch, capsys):
    monkeypatch.delenv("FASTVIM_BACKEND", raising=False)
    run_main(monkeypatch, "doctor")
    out = capsys.readouterr().out
    nvcc = f"nvcc      {fastvim_build.find_nvcc()[1]}\n"
    for word in ("python", torch.__version__, "cpu", "gpu", "g++", nvcc,
                 "FASTVIM_BACKEND is not set", "on cpu models run by", *fastvim.BACKENDS):
        assert word in out
    monkeypatch.setenv("PATH", "")                              # no compiler at all
    run_main(monkeypatch, "doctor")
    assert "not found" in capsys.readouterr().out


def test_figure_4(monkeypatch, capsys):
    run_main(monkeypatch, "--resolution", "224", "512")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {int(line[0]): [float(n) for n in line[1:]] for line in lines if line[0].isdigit()}
    assert rows[224] == pytest.approx([1.26, 1.8, 1.17], rel=0.03)
    assert rows[512][0] > rows[512][1] > rows[512][2]
    assert 0.3 < 1 - rows[224][2] / rows[224][1] < 0.4          # the paper: 35% fewer


@pytest.mark.parametrize("arguments, message", [
    (["--resolution", "8"], "at least 16 pixels"),
    (["--models", "resnet"], "no model has 'resnet'.*fastvim_tiny"),
    (["train"], "invalid choice"),
    (["--resolution", "x"], "invalid int")], ids=lambda v: "".join(v) if v else "")
def test_the_command_line_refuses_what_it_does_not_know(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, *arguments)
    assert stop.value.code not in (0, None)
    assert re.search(message, f"{stop.value.code} {capsys.readouterr().err}")


def test_the_command_line_names_an_unknown_backend():
    result = run_file("doctor", FASTVIM_BACKEND="abacus")
    assert result.returncode == 2
    assert "fastvim.py: error: " in result.stderr
    assert re.search("no backend 'abacus'.*; choose from python", result.stderr)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("layer", [0, 1])
def test_trace_computes_what_the_block_does(layer):
    model = tiny(img_size=(32, 48))
    tokens, grids, _, _ = model._embed(images(model, 1), None, None)
    block = model.layers[layer]
    steps = {name: value for name, _, value in walkthrough.steps_of(block, tokens, tokens, grids[layer])}
    expected = block(tokens, tokens, grids[layer], fastvim.BACKENDS["python"])
    torch.testing.assert_close((steps["hidden"], steps["residual"]), expected)
    assert steps["p"].shape[2] == (4, 6)[layer]


def test_trace_prints_shapes_and_paints(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    walkthrough.trace(str(tmp_path / "a.png"), tmp_path / "trace.png", None)
    said = capsys.readouterr().out
    assert "block 1 walks along 'w h' and pools 'h': 14 scan steps instead of 196" in said
    assert "(2, 1, 14, 384)" in said
    assert Image.open(tmp_path / "trace.png").size == (1400, 440)
    model = fastvim.create_model("fastvim_tiny", depth=2, img_size=32, patch_size=4, num_classes=3)
    built = {"name": "fastvim_tiny", "fields": dict(depth=2, img_size=32, patch_size=4, num_classes=3)}
    torch.save({"model": model.state_dict(), "built": built}, tmp_path / "own.pt")
    walkthrough.trace(str(tmp_path / "a.png"), tmp_path / "trace.png", tmp_path / "own.pt")
    assert "8 x 8 tokens" in capsys.readouterr().out
    built["fields"]["schedule"] = "vim"
    torch.save({"model": model.state_dict(), "built": built}, tmp_path / "own.pt")
    with pytest.raises(ValueError, match="trace shows FastVim"):
        walkthrough.trace(str(tmp_path / "a.png"), tmp_path / "trace.png", tmp_path / "own.pt")
