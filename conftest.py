"""For all tests: few threads, builds that begin early, the emulated CUDA backend, tables of errors
at the end."""
import ctypes
import os
import pathlib
import subprocess
import threading

import numpy as np
import pytest
import torch

import fastvim
import fastvim_build
import fastvim_kernels
from fastvim_kernels import KERNELS

torch.set_num_threads(1)    # the tensors are tiny: a second thread costs more than it gives
HERE = pathlib.Path(__file__).resolve().parent
ERRORS = {}                 # table -> run -> column -> the largest relative error


def load_emulated():
    """scan_cuda.cu compiled by g++ through tests/cuda_emulator.h: the CUDA kernels, run on tensors
    of the CPU. Kept beside the other libraries."""
    source = HERE / "scan_cuda.cu"
    emulator = HERE / "tests" / "cuda_emulator.h"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-DFASTVIM_EMULATE", "-include", emulator]
    depends = [source, emulator, HERE / "scan.h"]
    name = fastvim_build.name_build("scan_emulated", depends, flags[:-1])
    path = os.path.join(fastvim_build.cache_folder(), f"{name}.so")
    if not os.path.exists(path):
        own = f"{path}.{os.getpid()}"
        subprocess.run(["g++", *flags, "-x", "c++", source, "-o", own], check=True)
        os.replace(own, path)
    library = ctypes.CDLL(path)

    def call(operation, numbers, device):
        assert getattr(library, operation)((ctypes.c_int64 * len(numbers))(*numbers), None) == 0

    return call


KERNELS["cuda-emulated"] = fastvim_kernels.Kernels(
    "cuda-emulated", fastvim_kernels.DTYPES, load_emulated)
fastvim.register_backend(fastvim_kernels.CompiledBackend(
    KERNELS["cuda-emulated"], "cpu", fastvim.BACKENDS["python"], fastvim.announce))
fastvim.register_backend(fastvim.BACKENDS["cpu"])           # remains what models run by


def backend_of(item):
    """The backend that a test is run with, if it has one as its argument."""
    if not hasattr(item, "callspec"):
        return None
    return item.callspec.params.get("backend")


def pytest_collection_modifyitems(items):
    """In test_fastvim.py, what needs no compiled library is run while the libraries are built."""
    def place(item):
        if item.path.name != "test_fastvim.py":
            return 2
        return 1 if backend_of(item) in KERNELS else 0
    items.sort(key=place)


def pytest_collection_finish(session):
    """Every library that a test will ask for by name is built from now on, each in a thread."""
    if session.config.option.collectonly:
        return
    names = {backend_of(item) for item in session.items} & KERNELS.keys()
    if not torch.cuda.is_available():
        names.discard("cuda")
    for name in names:
        threading.Thread(target=KERNELS[name].problem, daemon=True).start()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No test sees runs/ of this folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def record_error():
    """record(table, run, column, error): for the tables that are printed at the end."""
    def record(table, run, column, error):
        row = ERRORS.setdefault(table, {}).setdefault(" ".join(run), {})
        row[column] = max(error, row.get(column, 0.0))
    return record


def pytest_terminal_summary(terminalreporter):
    for table, runs in ERRORS.items():
        columns = list(dict.fromkeys(column for row in runs.values() for column in row))
        terminalreporter.section(f"{table}: largest relative error of outputs and gradients")
        terminalreporter.write_line(" " * 26 + "".join(f"{column:>10}" for column in columns))
        for run, row in runs.items():
            cells = (f"{row[column]:10.1e}" if column in row else " " * 10 for column in columns)
            terminalreporter.write_line(f"{run:26}" + "".join(cells))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Two classes of images, dark and light, in ImageNet's layout."""
    image = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, n in (("train", 12), ("val", 4)):
        for label, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 100, (40, 48, 3)) + 150 * label
                image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root
