"""bench.py: its composition computes what the models compute, its clock adds up, its rows are what
was asked for, and the whole command runs."""
import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import types

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


def test_default_backend_stays(monkeypatch):
    monkeypatch.setattr(fastvim, "BACKENDS", dict(fastvim.BACKENDS))
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


def options(**changes):
    return argparse.Namespace(**{
        "device": "cpu", "quick": False, "px": None, "batch": None, "dtypes": ("float32",),
        "without": (), "small": {"depth": 1}, "cuda_graphs": False, "max_seconds": 60,
        "rates": {"float32": 1e9, "bfloat16": 1e9}, **changes})


def test_the_batch_that_is_asked_for():
    args = options(batch=5, px=[224, 512])
    assert bench.sizes(args) == [(224, 5), (512, 5)]
    for figure in ("model", "sizes", "training", "masked"):
        found = bench.groups(figure, args)
        assert {spec.batch for group in found for spec in group} == {5}, figure
    found = bench.groups("training", options(batch=1, px=[1024]))
    assert {(spec.px, spec.batch) for group in found for spec in group} == {(1024, 1)}


@pytest.mark.parametrize("device, dtype, names", [
    ("cpu", "bfloat16", ["flash_attention"]), ("cuda", "float32", ["efficient_attention"]),
    ("cuda", "bfloat16", ["flash_attention", "cudnn_attention"]),
    ("cuda", "autocast", ["flash_attention", "cudnn_attention"])])
def test_attention_is_named_and_pinned(device, dtype, names, monkeypatch):
    spec = bench.Spec("DeiT-T", "deit", "", {"depth": 1}, 32, 2, dtype)
    rows = bench.each_attention(spec, device)
    assert [row.backend for row in rows] == [f"SDPA {name}" for name in names]
    real = torch.nn.functional.scaled_dot_product_attention
    for row in rows:
        seen = []

        def note(*arguments, seen=seen, **keywords):
            seen.append({name for name in ("flash", "mem_efficient", "cudnn", "math")
                         if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()})
            return torch.zeros_like(arguments[0])
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
        bench.build(row, "cpu")()
        name = row.backend.removeprefix("SDPA ").removesuffix("_attention")
        assert seen == [{name.replace("efficient", "mem_efficient")}]
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", real)
    bench.build(rows[0]._replace(backend="SDPA flash_attention", train=True), "cpu")()


def test_all_peers_get_one_input(monkeypatch):
    inputs = []
    make = bench.make_images

    def note(*shape):
        inputs.append(make(*shape))
        return inputs[-1]
    monkeypatch.setattr(bench, "make_images", note)
    for name, backend in (("fastvim_tiny", "python"), ("deit", "SDPA math")):
        bench.build(bench.Spec("", name, backend, {"depth": 1}, 32, 2), "cpu")
    assert inputs[0] is inputs[1]
    bench.build(bench.Spec("", "deit", "SDPA math", {"depth": 1}, 32, 3), "cpu")
    assert len(inputs[2]) == 3


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("px", [32, 1024])
def test_graphs_of_every_size_and_of_training(px, train, monkeypatch):
    """By what stands for torch.cuda here: a warm-up, then a capture, then replays."""
    said = []
    graph = types.SimpleNamespace(replay=lambda: said.append("replay"))
    stream = types.SimpleNamespace(wait_stream=lambda other: None)

    @contextlib.contextmanager
    def noting(name):
        said.append(name)
        yield
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: noting("side"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: noting("capture"))
    monkeypatch.setattr(bench, "build", lambda spec, device: lambda *mark: said.append("run"))
    monkeypatch.setattr(bench, "clock", lambda run, device: {"all": 0.0})
    monkeypatch.setattr(bench, "peak_memory", lambda *_: None)
    row = {"backend": "python"}
    spec = bench.Spec("", "fastvim_tiny", "python", {"depth": 1}, px, train=train)
    call = bench.prepare(spec, row, options(cuda_graphs=True))
    assert row["backend"] == "python, CUDA graph"
    call(said.append)
    assert said == ["side", "run", "capture", "run", "replay", "all"]


@pytest.mark.parametrize("arguments, message", [
    (("--px", "100"), "choose from"), (("nonsense",), "invalid choice"),
    (("model", "--device", "cpu", "--cuda-graphs"), "needs a GPU"),
    (("loop", "--device", "cuda", "--cuda-graphs"), "loop and data have none"),
    (("model", "--batch", "0"), "--batch")])
def test_bad_arguments(arguments, message, monkeypatch, capsys, tmp_path):
    command = ["bench.py", *arguments, "--quick", "--no-compile", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as caught:
        bench.main()
    assert message in f"{caught.value} {capsys.readouterr().err}"
