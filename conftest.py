"""For all tests: few threads, the emulated CUDA backend, and a table of the scan's errors at the end."""
import os
import pathlib
import subprocess
import tempfile

import numpy as np
import pytest
import torch

import fastvim
import fastvim_kernels

torch.set_num_threads(1)    # the tensors are tiny: a second thread costs more than it gives
HERE = pathlib.Path(__file__).resolve().parent
SCAN_ERRORS = {}            # (backend, device, dtype) -> {length: largest relative error}


def load_emulated():
    """scan_cuda.cu compiled by g++ through tests/cuda_emulator.h: the CUDA kernels, run on tensors of the CPU."""
    folder = tempfile.TemporaryDirectory()
    path = os.path.join(folder.name, "emulated.so")
    subprocess.run(["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-DFASTVIM_EMULATE", "-include",
                    HERE / "tests/cuda_emulator.h", "-x", "c++", HERE / "scan_cuda.cu", "-o", path], check=True)
    library = fastvim_kernels.CLibrary(path, 0)                             # the last argument: the stream
    library.folder = folder                                                 # deleted with the library
    return library


fastvim_kernels.register("cuda-emulated", "cpu", fastvim_kernels.DTYPES, load_emulated)
fastvim.register_backend(fastvim.BACKENDS["cpu"])                           # remains what models run by


@pytest.fixture
def record_scan_error():
    def record(run, length, error):
        row = SCAN_ERRORS.setdefault(run, {})
        row[length] = max(error, row.get(length, 0.0))
    return record


def pytest_terminal_summary(terminalreporter):
    if SCAN_ERRORS:
        lengths = sorted({length for row in SCAN_ERRORS.values() for length in row})
        terminalreporter.section("selective scan: largest relative error of outputs and gradients, by length")
        terminalreporter.write_line(f"{'backend':24}" + "".join(f"{length:>10}" for length in lengths))
        for run, row in SCAN_ERRORS.items():
            cells = (f"{row[length]:10.1e}" if length in row else " " * 10 for length in lengths)
            terminalreporter.write_line(f"{' '.join(run):24}" + "".join(cells))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Two classes of images, dark and light, in ImageNet's layout."""
    image = pytest.importorskip("PIL.Image")
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, n in (("train", 12), ("val", 4)):
        for label, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 100, (40, 48, 3)) + 150 * label
                image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root
