"""The teaching ladders in dev/cuda: every rung against the CPU, under the emulator, in odd sizes.

    pytest tests/test_ladders.py

On a machine with a GPU and nvcc the same programs print times: `nvcc -O3 dev/cuda/scan.cu`."""
import runpy
import subprocess

import pytest

import fastvim_build
from test_cuda_emulator import EMULATED_FLAGS, HERE, run

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
    nvcc, why = fastvim_build.find_nvcc()
    if nvcc is None:
        pytest.skip(why)
    run(nvcc, "-O3", "-arch=sm_90", LADDERS / f"{name}.cu", "-o", tmp_path / name)


def test_what_the_table_of_kernels_reads():
    """sass.py, of two kernels as ptxas reports them, and of a loop as cuobjdump prints it."""
    sass = runpy.run_path(str(LADDERS / "sass.py"))
    said = """
ptxas info    : Compiling entry function '_Z3addPf' for 'sm_90'
ptxas info    : Function properties for _Z3addPf
    16 bytes stack frame, 12 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 16 bytes cumulative stack size
ptxas info    : Compiling entry function '_Z3mulPf' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 39936 bytes smem
"""
    assert sass["parse_ptxas"](said) == {"_Z3addPf": (128, 12, 24, 0), "_Z3mulPf": (32, 0, 0, 39936)}
    loop = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;      /* 0x00000a00ff017b82 */
        /*0010*/                   FADD R2, R2, R1 ;           /* 0x0000000102027221 */
        /*0020*/              @!P0 BRA 0x50 ;                  /* 0x0000000000088947 */
        /*0030*/                   FADD R2, R2, R1 ;           /* 0x0000000102027221 */
        /*0040*/                   FADD R2, R2, R1 ;           /* 0x0000000102027221 */
        /*0050*/              @!P2 BRA 0x70 ;                  /* 0x0000000000088947 */
        /*0060*/                   MUFU.TANH R2, R2 ;          /* 0x0000000200027308 */
        /*0070*/              @P1  BRA 0x10 ;                  /* 0xfffffffc00f01947 */
        /*0080*/                   EXIT ;                      /* 0x000000000000794d */
"""
    # the work of MUFU is done, the two additions of another way are not
    assert sass["main_turn"](loop) == 5
    assert sass["main_turn"](loop.replace("@!P0 BRA", "NOP")) == 7
    assert sass["main_turn"](loop.replace("@!P2 BRA", "BRA")) == 4
    assert sass["main_turn"](loop.replace("BRA 0x10", "BRA 0x80")) == 0
