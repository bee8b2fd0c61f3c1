"""What nvcc makes of scan_cuda.cu, for GPUs that nobody here may have:

    python dev/cuda/sass.py > results/sass.txt

A line for each kernel: registers; bytes of spilled registers, stored / loaded; bytes of shared
memory, but for what a launch asks for; instructions that a turn of its main loop runs; and these
for each number of a tensor that a turn computes, or each step of a scan. A turn is the way round
that does all the work (most calls of special functions, shuffles and barriers), and of these ways
the shortest: what a turn runs at times, where a step ends or neighbours are not there, is not
counted, and a loop within counts once. Needs nvcc and cuobjdump; both come by pip:
pip install -e ".[cuda]" nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
"""
import datetime
import glob
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import fastvim_build

TARGETS = ("sm_80", "sm_90")
# kernel -> of its template arguments, how many numbers a turn of its main loop computes
NUMBERS = {"conv_pool_kernel": lambda a: 4 * 8,                     # channels, positions
           "conv_pool_backward_kernel": lambda a: 2 * 8,
           "expand_gate_kernel": lambda a: int(a[1]) * (8 if a[3] == "true" else int(a[2])),
           "expand_gate_backward_kernel": lambda a: int(a[1]) * (8 if a[2] == "true" else 1),
           "scan_kernel": lambda a: 8}                              # steps
WORK = re.compile(r"MUFU|SHFL|BAR")


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


def main_turn(text: str) -> int:
    """The disassembly of a kernel -> instructions of a turn of its main loop."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;]*);", text)
    places = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    targets = {}
    for i, (_, instruction) in enumerate(lines):
        jump = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", instruction)
        if jump and int(jump[1], 16) in places:
            targets[i] = places[int(jump[1], 16)]
    turns = [best_way(lines, targets, head, end) for end, head in targets.items() if head < end]
    return -max(turns, default=(0, 0))[1]


def best_way(lines: list, targets: dict, head: int, end: int) -> tuple[int, int]:
    """From instruction head on to instruction end, by jumps that lead ahead -> its work, minus its
    length."""
    ways = {head: (0, 0)}
    for i in range(head, end + 1):
        if i not in ways:
            continue
        instruction = lines[i][1].strip()
        work, length = ways[i]
        way = (work + bool(WORK.search(instruction)), length - 1)
        if i == end:
            return way
        following = []
        if i < targets.get(i, -1) <= end:
            following.append(targets[i])
        leaves = re.match(r"(BRA (?!U)|EXIT)", instruction)     # not under a condition
        if not leaves:
            following.append(i + 1)
        for place in following:
            ways[place] = max(way, ways.get(place, way))
    return (-1, 0)                              # no loop: nothing leads there


def find_cuobjdump(nvcc: str) -> str:
    places = [os.path.dirname(nvcc)]
    places += [os.path.dirname(path) for path, _ in fastvim_build.list_nvcc()]
    places += glob.glob(os.path.join(sysconfig.get_path("purelib"), "nvidia", "cu*", "bin"))
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
        print(f"\n{target:55} registers spilled shared  turn  a number")
        lines = []
        for part in sass.split("Function : ")[1:]:
            mangled = part.split()[0]
            registers, stores, loads, shared = resources[mangled]
            kernel = fastvim_build.output_of("c++filt", mangled)
            kernel = re.search(r"::(\w+(?:<.*>)?)\(", kernel)[1].replace("__nv_bfloat16", "bf16")
            name, _, arguments = kernel.partition("<")
            turn = main_turn(part)
            each = "-"
            if name in NUMBERS:
                each = round(turn / NUMBERS[name](arguments.split(", ")))
            spilled = f"{stores}/{loads}"
            lines.append(f"{kernel:55} {registers:9} {spilled:>9} {shared:6} {turn:5} {each:>9}")
        print("\n".join(sorted(lines)))


if __name__ == "__main__":
    main()
