"""Building scan_cpu.cpp and scan_cuda.cu on the user's machine, once, whoever asks meanwhile.

A library is named by a hash of all that it depends on and kept in the user's cache folder. What
load_cpu and load_cuda return is a function of (operation, its fields as numbers, device).
"""
import contextlib
import ctypes
import hashlib
import importlib.util
import logging
import os
import platform
import re
import shutil
import subprocess
import sys

import torch

log = logging.getLogger("fastvim")


def cache_folder() -> str:
    """Where compiled libraries are kept: FASTVIM_CACHE, else fastvim in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.environ.get("FASTVIM_CACHE") or os.path.join(home, "fastvim")
    os.makedirs(folder, exist_ok=True)
    return folder


@contextlib.contextmanager
def lock(path: str):
    """One builder at a time. The lock belongs to the open file: a process that is killed gives it
    back."""
    try:
        import fcntl
    except ImportError:
        raise RuntimeError("building needs a POSIX system (Linux, macOS)") from None
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def find_source(name: str) -> str:
    here = os.path.dirname(os.path.abspath(__file__))
    for folder in (here, os.path.join(sys.prefix, "share", "fastvim")):
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    raise RuntimeError(f"{name} is missing: it belongs beside fastvim.py")


def name_build(stem: str, sources: list[str], *parts) -> str:
    """A name that changes with all that a build depends on."""
    digest = hashlib.sha256(repr(parts).encode())
    for source in sources:
        with open(source, "rb") as file:
            digest.update(file.read())
    return f"{stem}_{digest.hexdigest()[:16]}"


def output_of(*command: str) -> str:
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
        check=False,
    )
    if result.returncode:
        lines = result.stderr.splitlines() or ["?"]
        wrong = [line for line in lines if "error" in line] or lines
        raise RuntimeError(f"{os.path.basename(command[0])} failed: {wrong[0]}")
    return result.stdout


def torch_openmp() -> list[str]:
    """The OpenMP runtime that torch has loaded (Linux), whatever others are: two would fight for
    the cores, and torch.set_num_threads reaches its own."""
    if not os.path.exists("/proc/self/maps"):
        return []
    with open("/proc/self/maps") as file:
        loaded = {line.split(None, 5)[-1].strip() for line in file if "omp" in line}
    runtimes = [path for path in sorted(loaded) if re.search(r"lib(g|i)?omp[^/]*\.so", path)]
    runtimes.sort(key=lambda path: not path.startswith(os.path.dirname(torch.__file__)))
    return runtimes[:1]


def processor() -> str:
    """What -march=native depends on."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith(("flags", "Features")):
                    return line
    return platform.machine()


def check_device(device: torch.device, right: str):
    if device.type != right:
        raise ValueError(f"the {right} kernels cannot run on {device}: use tensors on {right}, or "
                         "another backend")


def load_cpu():
    sources = [find_source("scan_cpu.cpp"), find_source("scan.h")]
    compilers = (os.environ.get("CXX"), *map(shutil.which, ("g++", "clang++", "c++")))
    compiler = next(filter(None, compilers), None)
    if compiler is None:
        raise RuntimeError(
            "no C++ compiler found: install g++ (Debian, Ubuntu: apt install g++) or set CXX"
        )
    flags = ["-std=c++17", "-O3", "-march=native", "-fopenmp", *torch_openmp(), "-shared", "-fPIC"]
    version = output_of(compiler, "--version")
    name = name_build("scan_cpu", sources, compiler, version, flags, processor())
    path = os.path.join(cache_folder(), f"{name}.so")
    if not os.path.exists(path):
        with lock(os.path.join(cache_folder(), f"{name}.lock")):
            if not os.path.exists(path):        # nobody else has built it meanwhile
                log.info("compiling %s", sources[0])
                output_of(compiler, sources[0], *flags, "-o", f"{path}.tmp")
                os.replace(f"{path}.tmp", path)                 # all or nothing, even if killed
    return caller(ctypes.CDLL(path))


def caller(library):
    """What runs the operations of a library that g++ made of scan_cpu.cpp."""
    def call(operation: str, numbers: list[int], device: torch.device):
        check_device(device, "cpu")
        error = getattr(library, operation)((ctypes.c_int64 * len(numbers))(*numbers), None)
        if error == 1:
            raise ValueError(f"{operation}: the tables of the walk must visit every token once, "
                             "and agree on the step of each")
        if error:
            raise RuntimeError(f"{operation}: out of memory for what the kernels need besides "
                               "their outputs")

    return call


def load_cuda():
    from torch.utils import cpp_extension
    sources = [find_source("scan_cuda.cpp"), find_source("scan_cuda.cu")]
    if torch.version.cuda is None:
        raise RuntimeError("this torch is built without CUDA")
    nvcc = os.path.join(cpp_extension.CUDA_HOME or "", "bin", "nvcc")
    if not os.path.exists(nvcc):
        raise RuntimeError(
            f"no nvcc found: install the CUDA toolkit {torch.version.cuda} or set CUDA_HOME"
        )
    version, major = re.search(r"release ((\d+)\.\d+)", output_of(nvcc, "--version")).groups()
    if major != torch.version.cuda.split(".")[0]:
        raise RuntimeError(
            f"nvcc is of CUDA {version}, torch of CUDA {torch.version.cuda}: install a toolkit of "
            "the same major version and set CUDA_HOME to it"
        )
    flags = ["-O3", "-std=c++17", "-ftz=true"]
    gpus = range(torch.cuda.device_count())
    archs = {"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in gpus}
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(sorted(archs)) or "8.0;9.0"
    name = name_build(
        "scan_cuda", [*sources, find_source("scan.h")], torch.__version__, version, flags, archs
    )
    folder = os.path.join(cache_folder(), name)
    os.makedirs(folder, exist_ok=True)
    done = os.path.join(folder, "done")
    if not os.path.exists(done):
        with lock(os.path.join(cache_folder(), f"{name}.lock")):
            if not os.path.exists(done):
                log.warning("compiling the CUDA kernels for %s: once, about a minute", archs)
                build_extension(name, sources, flags, archs, folder)
                open(done, "w").close()
    path = os.path.join(folder, f"{name}.so")
    spec = importlib.util.spec_from_file_location(name, path)
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)

    def call(operation: str, numbers: list[int], device: torch.device):
        check_device(device, "cuda")
        library.call(operation, numbers, device.index)

    return call


def build_extension(name, sources, flags, archs, folder):
    """torch's way to compile, which reads its settings from the environment."""
    from torch.utils import cpp_extension
    with contextlib.suppress(FileNotFoundError):                # left by a build that was killed:
        os.remove(os.path.join(folder, "lock"))                 # load() would wait for it for ever
    before = {key: os.environ.get(key) for key in ("PATH", "TORCH_CUDA_ARCH_LIST")}
    beside_python = os.path.dirname(sys.executable)             # where ninja is
    os.environ["PATH"] = os.pathsep.join([beside_python, before["PATH"] or os.defpath])
    os.environ["TORCH_CUDA_ARCH_LIST"] = archs
    try:
        cpp_extension.load(name, sources, extra_cuda_cflags=flags, build_directory=folder)
    finally:
        for key, value in before.items():
            os.environ.pop(key)
            if value is not None:
                os.environ[key] = value
