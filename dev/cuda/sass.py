"""What nvcc makes of scan_cuda.cu, for GPUs that nobody here may have:

    python dev/cuda/sass.py > results/sass.txt

A line for each kernel: registers; bytes of spilled registers, stored / loaded; bytes of shared
memory, but for what a launch asks for; instructions in its longest loop, all of them, also what few
turns of it run; and these for each number of a tensor that a turn computes. Needs nvcc and
cuobjdump; both come by pip:
pip install -e ".[cuda]" nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
"""
import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import fastvim_build

TARGETS = ("sm_80", "sm_90")
# kernel -> of its template arguments, how many numbers a turn of its longest loop computes
NUMBERS = {"conv_pool_kernel": lambda a: 4 * 4,                     # channels, positions
           "conv_pool_backward_kernel": lambda a: 2 * 4,
           "expand_gate_kernel": lambda a: int(a[1]) * int(a[2]),
           "expand_gate_backward_kernel": lambda a: int(a[1])}


def parse_ptxas(text: str) -> dict[str, tuple]:
    """What nvcc --resource-usage says -> {mangled name: (registers, stores, loads, shared)}."""
    found = {}
    for part in text.split("Compiling entry function '")[1:]:
        name = part.split("'")[0]
        numbers = []
        for what in ("(\\d+) registers", "(\\d+) bytes spill stores", "(\\d+) bytes spill loads",
                     "(\\d+) bytes smem"):
            numbers.append(int((re.search(what, part) or [0, 0])[1]))
        found[name] = tuple(numbers)
    return found


def longest_loop(text: str) -> int:
    """The disassembly of a kernel -> instructions from a jump's target to the jump back there."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;]*);", text)
    places = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    longest = 0
    for i, (_, instruction) in enumerate(lines):
        jump = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", instruction)
        if jump:
            longest = max(longest, i + 1 - places.get(int(jump[1], 16), i + 1))
    return longest


def find_cuobjdump(nvcc: str) -> str:
    places = [os.path.dirname(nvcc)]
    places += [os.path.dirname(path) for path, _ in fastvim_build.list_nvcc()]
    found = shutil.which("cuobjdump", path=os.pathsep.join([*places, os.environ["PATH"]]))
    if found is None:
        sys.exit("no cuobjdump found: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return found


def main() -> None:
    nvcc, why = fastvim_build.find_nvcc()
    if nvcc is None:
        sys.exit(why)
    cuobjdump = find_cuobjdump(nvcc)
    source = fastvim_build.find_source("scan_cuda.cu")
    version = fastvim_build.output_of(nvcc, "--version").splitlines()[-1]
    print(f"nvcc {version}, {datetime.date.today()}")
    for target in TARGETS:
        with tempfile.TemporaryDirectory() as folder:
            cubin = os.path.join(folder, "scan_cuda.cubin")
            flags = ["-O3", "-std=c++20", "-ftz=true", f"-arch={target}", "--resource-usage"]
            said = subprocess.run([nvcc, *flags, "-cubin", source, "-o", cubin], check=True,
                                  capture_output=True, text=True)
            resources = parse_ptxas(said.stdout + said.stderr)
            sass = fastvim_build.output_of(cuobjdump, "-sass", cubin)
        print(f"\n{target:55} registers spilled shared  loop  a number")
        lines = []
        for part in sass.split("Function : ")[1:]:
            mangled = part.split()[0]
            registers, stores, loads, shared = resources[mangled]
            kernel = fastvim_build.output_of("c++filt", mangled)
            kernel = re.search(r"::(\w+(?:<.*>)?)\(", kernel)[1].replace("__nv_bfloat16", "bf16")
            name, _, arguments = kernel.partition("<")
            loop = longest_loop(part)
            each = "-"
            if name in NUMBERS:
                each = round(loop / NUMBERS[name](arguments.split(", ")))
            spilled = f"{stores}/{loads}"
            lines.append(f"{kernel:55} {registers:9} {spilled:>9} {shared:6} {loop:5} {each:>9}")
        print("\n".join(sorted(lines)))


if __name__ == "__main__":
    main()
