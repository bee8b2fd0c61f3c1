"""Building scan_cpu.cpp and scan_cuda.cu on the user's machine, once, whoever asks meanwhile.

A library is named by a hash of what it is built from and for, and one of the compiler, and kept in
the user's cache folder; where there is no compiler, any compiler's serves. What load_cpu and
load_cuda return is a function of (operation, its fields as numbers, device).
"""
import contextlib
import ctypes
import glob
import hashlib
import importlib.util
import logging
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

import torch

log = logging.getLogger("fastvim")


def cache_folder() -> str:
    """Where compiled libraries are kept: FASTVIM_CACHE, else fastvim in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.environ.get("FASTVIM_CACHE") or os.path.join(home, "fastvim")
    folder = os.path.abspath(os.path.expanduser(folder))
    with writing(folder):
        os.makedirs(folder, exist_ok=True)
    return folder


@contextlib.contextmanager
def writing(folder: str):
    try:
        yield
    except OSError as error:
        raise RuntimeError(f"the cache folder {folder} cannot be written ({error.strerror}): set "
                           "FASTVIM_CACHE to one that can") from error


@contextlib.contextmanager
def lock(path: str):
    """One builder at a time. The lock belongs to the open file: a process that is killed gives it
    back."""
    try:
        import fcntl
    except ImportError:
        raise RuntimeError("building needs a POSIX system (Linux, macOS)") from None
    with writing(os.path.dirname(path)):
        file = open(path, "w")                  # noqa: SIM115
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def find_source(name: str) -> str:
    """The path of a kernel's source: beside this file, or where pip put it: in share/fastvim of a
    folder above, whichever the kind of installation. RuntimeError: it is nowhere."""
    here = pathlib.Path(__file__).absolute().parent
    for path in (here / name, *(above / "share/fastvim" / name for above in (here, *here.parents))):
        if path.is_file():
            return str(path)
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


def find_compiler() -> list[str] | None:
    """The words of the command, those of CXX if it is set; None where there is no such program."""
    named = os.environ.get("CXX", "").strip()
    if named:
        words = [named] if shutil.which(named) else named.split()       # "ccache g++"
        return words if shutil.which(words[0]) else None
    found = next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    return found and [found]


def newest(pattern: str) -> str | None:
    """What was built last of that name in the cache: it serves where there is no compiler."""
    built = glob.glob(os.path.join(glob.escape(cache_folder()), pattern))
    return max(built, key=os.path.getmtime, default=None)


def check_device(device: torch.device, right: str):
    if device.type != right:
        raise ValueError(f"the {right} kernels cannot run on {device}: use tensors on {right}, or "
                         "another backend")


def load_cpu():
    sources = [find_source("scan_cpu.cpp"), find_source("scan.h")]
    flags = ["-std=c++17", "-O3", "-march=native", "-fopenmp", *torch_openmp(), "-shared", "-fPIC"]
    name = name_build("scan_cpu", sources, flags, processor())
    compiler = find_compiler()
    path = newest(f"{name}_*.so")
    if compiler is not None:
        name = name_build(name, [], compiler, output_of(*compiler, "--version"))
        path = os.path.join(cache_folder(), f"{name}.so")
    elif path is None:
        cxx = os.environ.get("CXX")
        wrong = f"CXX={cxx}: No such file" if cxx else "no C++ compiler found"
        raise RuntimeError(f"{wrong}: install g++ (Debian, Ubuntu: apt install g++) or set CXX")
    if not os.path.exists(path):
        with lock(os.path.join(cache_folder(), f"{name}.lock")):
            if not os.path.exists(path):        # nobody else has built it meanwhile
                log.info("compiling %s", sources[0])
                output_of(*compiler, sources[0], *flags, "-o", f"{path}.tmp")
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


def check_nvcc(nvcc: str) -> str:
    """Its version. RuntimeError: torch is of another CUDA."""
    version, major = re.search(r"release ((\d+)\.\d+)", output_of(nvcc, "--version")).groups()
    if major != torch.version.cuda.split(".")[0]:
        raise RuntimeError(
            f"nvcc is of CUDA {version}, torch of CUDA {torch.version.cuda}: install a toolkit of "
            "the same major version and set CUDA_HOME to it"
        )
    return version


def load_cuda():
    from torch.utils import cpp_extension
    sources = [find_source("scan_cuda.cpp"), find_source("scan_cuda.cu")]
    if torch.version.cuda is None:
        raise RuntimeError("this torch is built without CUDA")
    flags = ["-O3", "-std=c++17", "-ftz=true"]
    gpus = range(torch.cuda.device_count())
    archs = {"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in gpus}
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(sorted(archs)) or "8.0;9.0"
    depends = [*sources, find_source("scan.h")]
    name = name_build("scan_cuda", depends, torch.__version__, flags, archs)
    nvcc = os.path.join(cpp_extension.CUDA_HOME or "", "bin", "nvcc")
    if os.path.exists(nvcc):
        name = name_build(name, [], check_nvcc(nvcc))
        done = os.path.join(cache_folder(), name, "done")
    else:
        done = newest(f"{name}_*/done")
    if done is None:
        raise RuntimeError(
            f"no nvcc found: install the CUDA toolkit {torch.version.cuda} or set CUDA_HOME"
        )
    folder = os.path.dirname(done)
    name = os.path.basename(folder)
    if not os.path.exists(done):
        with lock(os.path.join(cache_folder(), f"{name}.lock")):
            if not os.path.exists(done):
                os.makedirs(folder, exist_ok=True)
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
