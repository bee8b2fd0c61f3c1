"""bench.py: its composition computes what the models compute, its clock adds up, and the whole command runs."""
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

import bench
import fastvim
from benchmark.composition import Composition
from helpers import assert_close, images, tiny

REPOSITORY = pathlib.Path(bench.__file__).parent


@pytest.mark.parametrize("fields", [{}, {"schedule": "vim"}, {"ssm_norm": None},
                                    {"ssm_norm": "rmsnorm"}])
@pytest.mark.parametrize("fused", [False, True])
def test_composition_is_the_model(monkeypatch, fused, fields):
    monkeypatch.setattr(fastvim, "BACKENDS", dict(fastvim.BACKENDS))
    model = tiny(torch.float32, **fields)
    x = images(model, size=(32, 48))
    with fastvim.use_backend("python"):
        expected = model(x)
    fastvim.register_backend(Composition("test", fastvim.selective_scan, fastvim.add_norm, fused))
    with fastvim.use_backend("test"):
        assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_default_backend_stays():
    before = fastvim.pick_backend("cpu").name
    assert bench.peers("cpu")["python"] is None
    assert fastvim.pick_backend("cpu").name == before


def run(*arguments, **environment):
    return subprocess.run([sys.executable, "bench.py", *arguments], cwd=REPOSITORY,
                          capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def test_command(tmp_path):
    result = run("model", "block", "training", "masked", "--quick", "--px", "32", "--device", "cpu",
                 "--no-compile", "--markdown", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"bench.json", "model.png", "block.png"}
    report = json.loads((tmp_path / "bench.json").read_text())
    assert {row["dtype"] for row in report["model"]} == {"float32", "bfloat16"}
    for row in report["model"] + report["training"] + report["block"] + report["masked"]:
        assert len(row.get("seconds", ())) == 2 or row["note"].startswith("absent"), row
    for row in report["model"]:
        if "seconds" in row:
            assert row["slowest"] <= row["images/s"] <= row["fastest"]
    assert len(report["masked"]) == 10 and sum("time / all" in row for row in report["masked"]) == 8
    assert "| px" in result.stdout and "SDPA" in result.stdout


def test_what_is_not_measured_says_why(tmp_path):
    result = run("model", "--quick", "--px", "32", "--device", "cpu", "--no-compile",
                 "--max-seconds", "0", "--out", str(tmp_path), CXX="/nonexistent/c++",
                 FASTVIM_CACHE=str(tmp_path))
    assert result.returncode == 0, result.stderr
    notes = [row["note"] for row in json.loads((tmp_path / "bench.json").read_text())["model"]]
    assert any(note.startswith("skipped: expected to take") for note in notes)
    assert any(note.startswith("absent") and "nonexistent" in note for note in notes)
    assert all(note.startswith(("absent", "skipped")) for note in notes)
    assert "[1] absent" in result.stdout


@pytest.mark.parametrize("arguments, message", [
    (("--px", "100"), "choose from"), (("nonsense",), "invalid choice"),
    (("model", "--device", "cpu", "--cuda-graphs"), "needs a GPU")])
def test_bad_arguments(arguments, message, monkeypatch, capsys, tmp_path):
    command = ["bench.py", *arguments, "--quick", "--no-compile", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as caught:
        bench.main()
    assert message in f"{caught.value} {capsys.readouterr().err}"
