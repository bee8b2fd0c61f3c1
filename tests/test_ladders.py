"""The teaching ladders in dev/cuda: every rung against the CPU, under the emulator, in odd sizes.

    pytest tests/test_ladders.py

On a machine with a GPU and nvcc the same programs print times: `nvcc -O3 dev/cuda/scan.cu`."""
import subprocess

import pytest

from test_cuda_emulator import EMULATED_FLAGS, HERE, find_nvcc, run

LADDERS = HERE.parent / "dev" / "cuda"
SIZES = {
    "conv_pool": [[2, 3, 37, 12], [1, 1, 2, 4], [2, 5, 1, 132]],
    "scan": [[2, 70, 12], [1, 1, 1], [1, 33, 67]],
}
RUNGS = {"conv_pool": 5, "scan": 3}


@pytest.mark.parametrize("name", SIZES)
def test_every_rung_agrees_with_the_cpu(tmp_path, name):
    program = tmp_path / name
    run("g++", *EMULATED_FLAGS, "-x", "c++", LADDERS / f"{name}.cu", "-o", program)
    for sizes in SIZES[name]:
        printed = run(program, *sizes)
        assert printed.count("error") == RUNGS[name]
        assert "BAD" not in printed
    refused = subprocess.run([program, "1"], check=False, capture_output=True, text=True)
    assert refused.returncode == 2 and "usage" in refused.stderr


@pytest.mark.parametrize("name", SIZES)
def test_a_wrong_rung_is_noticed(tmp_path, name):
    """One step too few in the last rung's sum, or the wrong sign of a decay."""
    source = (LADDERS / f"{name}.cu").read_text()
    wrong = {
        "conv_pool": ("slice < slices; ++slice) sum", "slice < slices - 1; ++slice) sum"),
        "scan": ("h = __expf(q.decay", "h = __expf(-q.decay"),
    }
    assert wrong[name][0] in source
    (tmp_path / "ladder.h").write_text((LADDERS / "ladder.h").read_text())
    (tmp_path / "wrong.cu").write_text(source.replace(*wrong[name]))
    run("g++", "-std=c++17", "-Wno-unknown-pragmas", "-DFASTVIM_EMULATE", "-include",
        HERE / "cuda_emulator.h", "-x", "c++", tmp_path / "wrong.cu", "-o", tmp_path / "wrong")
    sizes = [str(size) for size in SIZES[name][0]]
    done = subprocess.run([tmp_path / "wrong", *sizes], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.count("BAD") == 1


@pytest.mark.parametrize("name", SIZES)
def test_ladders_compile_for_a_gpu(tmp_path, name):
    run(find_nvcc(), "-O3", "-arch=sm_90", LADDERS / f"{name}.cu", "-o", tmp_path / name)
