"""The code in documents runs, their commands have the options that scripts have, their links lead
to what they name; one version; no file needs a file that needs it."""
import ast
import contextlib
import graphlib
import importlib
import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

import checkpoints
import fastvim

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
CODE = re.findall(r"## A (.*?)\n.*?```python\n(.*?)```", CONTRIBUTING, re.DOTALL)


DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
BLOCKS = {f"{name} {i}": code for name in ("README.md", "docs/backends.md")
          for i, code in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL))}
SCRIPTS = "train_imagenet|train_mae|train_jump|finetune_dense|bench"
COMMANDS = sorted({command.split("  #")[0].strip() for path in DOCUMENTS for command in
                   re.findall(rf"(?:python|torchrun) .*?((?:{SCRIPTS})\.py[^`\n]*)", path.read_text())})


@pytest.mark.parametrize("name", BLOCKS)
def test_the_code_of_documents_runs(name, tmp_path):
    weights = tmp_path / "FastVim_small.safetensors"
    checkpoints.export(fastvim.create_model("fastvim_small"), weights)
    code = BLOCKS[name].replace("FastVim_small.ckpt", str(weights))
    code = code.replace('create_model("fastvim_tiny")', 'create_model("fastvim_tiny", depth=2)')
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_documents_have_real_options(command, tmp_path, monkeypatch):
    """Or argparse would raise SystemExit. That there is no such checkpoint here is fine."""
    monkeypatch.chdir(tmp_path)
    script, *argv = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [script, *argv])
    if argv and not command.endswith("--help"):
        with contextlib.suppress(FileNotFoundError):
            importlib.import_module(script.removesuffix(".py")).get_args()


@pytest.mark.parametrize("command", [
    "train_imagenet", "train_mae pretrain", "train_mae finetune", "train_mae linear", "train_jump",
    "finetune_dense seg", "finetune_dense det"])
def test_help_fits_two_screens_recipe_first(command, capsys):
    script, *stage = command.split()
    with pytest.raises(SystemExit):
        importlib.import_module(script).get_args([*stage, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 2 * 50 and max(map(len, lines)) <= 100
    groups = [line for line in lines if line.endswith(":") and line[0] != " "]
    assert groups[:2] == ["options:", "recipe:"] and len(groups) >= 6


def test_links_of_the_readme_lead_to_what_they_name():
    lines = (ROOT / "fastvim.py").read_text().splitlines()
    links = re.findall(r"\[`(\w+)`\]\(fastvim\.py#L(\d+)\)", (ROOT / "README.md").read_text())
    assert len(links) >= 8
    for name, number in links:
        assert re.match(rf"\s*(def|class)? ?{name}\b", lines[int(number) - 1]), (name, number)


def test_links_of_documents_lead_to_files():
    for path in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#:]+)\)|(?:src|srcset)=\"([^\"]+)\"", path.read_text()):
            assert (path.parent / "".join(link)).exists(), (path.name, link)


@pytest.mark.parametrize("subject, code", CODE, ids=[subject for subject, _ in CODE])
def test_the_code_of_contributing_runs(tmp_path, subject, code):
    assert len(CODE) == 3
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "leaves").mkdir()
    for name in ("oak", "elm"):
        pixels = np.random.default_rng(0).integers(0, 255, (40, 48, 3), np.uint8)
        image.fromarray(pixels).save(tmp_path / "leaves" / f"{name}.png")
    (tmp_path / "leaves" / "train.csv").write_text("oak.png,oak\nelm.png,elm\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FASTVIM_BACKEND": ""}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            cwd=tmp_path, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    if subject == "data set":
        assert "torch.Size([2, 3, 224, 224])" in result.stdout


def test_one_version():
    """pyproject.toml reads fastvim.py's without importing it, which a literal allows."""
    version = fastvim.__version__
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {version}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert f'\n__version__ = "{version}"\n' in (ROOT / "fastvim.py").read_text()


def imports_of(path):
    """The modules that a file imports anywhere, in full: data.loading for its `from .loading import`."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield f"{package}.{node.module}" if node.level else node.module


def test_no_file_needs_a_file_that_needs_it():
    paths = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("benchmark/*.py")]
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
             for p in paths}
    graph = {name: names.keys() & set(imports_of(path)) for name, path in names.items()}
    assert list(graphlib.TopologicalSorter(graph).static_order())           # raises on a circle
    scripts = {"train_imagenet", "train_mae", "train_jump", "finetune_dense", "bench"}
    assert not scripts & set().union(*graph.values())                       # nobody imports a script
    assert graph["fastvim"] == {"checks", "checkpoints", "fastvim_export", "fastvim_hub",
                                "fastvim_kernels"}
