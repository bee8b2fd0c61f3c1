"""Building scan_cpu.cpp and scan_cuda.cu on the user's machine, once, whoever asks meanwhile.

A library is named by a hash of what it is built from and for, and one of the compiler, and kept in
the user's cache folder; where there is no compiler, any compiler's serves. What load_cpu and
load_cuda return is a function of (operation, its fields as numbers, device).
"""
import array
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
import sysconfig

import torch

log = logging.getLogger("fastvim")
USUAL_NVCC = "/usr/local/cuda/bin/nvcc"


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


def build_once(path: str, command: list[str], level: int):
    """Makes path by a compiler's command, unless it is there; says so in the log."""
    if os.path.exists(path):
        return
    with lock(os.path.splitext(path)[0] + ".lock"):
        if not os.path.exists(path):            # nobody else has built it meanwhile
            log.log(level, "compiling %s: once, which may take a minute", path)
            output_of(*command, "-o", f"{path}.tmp")
            os.replace(f"{path}.tmp", path)     # all or nothing, even if killed


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
        build_once(path, [*compiler, sources[0], *flags], logging.INFO)
    elif path is None:
        cxx = os.environ.get("CXX")
        wrong = f"CXX={cxx}: No such file" if cxx else "no C++ compiler found"
        raise RuntimeError(f"{wrong}: install g++ (Debian, Ubuntu: apt install g++) or set CXX")
    keep_freed_memory()
    return caller(ctypes.CDLL(path))


def keep_freed_memory():
    """Asks glibc to keep up to 1 GB of what is freed. Else it goes back to the system between two
    blocks, which hands it out again page by page: 21,000 page faults in a forward pass at 512 px, a
    sixth of its time. Whoever has set one of glibc's own variables knows better."""
    if not os.environ.keys() & {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_",
                                "GLIBC_TUNABLES"}:
        with contextlib.suppress(OSError, AttributeError, TypeError):       # no glibc
            libc = ctypes.CDLL(None)
            libc.mallopt(-3, 32 << 20)      # M_MMAP_THRESHOLD, the most that it takes
            libc.mallopt(-1, 1 << 30)       # M_TRIM_THRESHOLD


def caller(library):
    """What runs the operations of a library that g++ made of scan_cpu.cpp."""
    def call(operation: str, numbers: list[int], device: torch.device):
        check_device(device, "cpu")
        fields = array.array("q", numbers)      # faster than an array of ctypes
        error = getattr(library, operation)(ctypes.c_void_p(fields.buffer_info()[0]), None)
        if error == 1:
            raise ValueError(f"{operation}: the tables of the walk must visit every token once")
        if error:
            raise RuntimeError(f"{operation}: out of memory for what the kernels need besides "
                               "their outputs")

    return call


def list_nvcc() -> list[tuple[str, str]]:
    """[(path, how it was found)] of the CUDA compilers here, in the order in which they are tried:
    what CUDA_HOME names; pip's, which is of torch's version; others."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    named = [(os.path.join(home, "bin", "nvcc"), "CUDA_HOME")] if home else []
    others = []
    packages = importlib.util.find_spec("nvidia")
    if packages is not None:
        major = torch.version.cuda.split(".")[0]
        for folder in packages.submodule_search_locations:
            others.append((os.path.join(folder, f"cu{major}", "bin", "nvcc"), "pip"))
    others += [(shutil.which("nvcc"), "PATH"), (USUAL_NVCC, "usual place")]
    return named + [(path, found_by) for path, found_by in others if path and os.path.exists(path)]


def find_nvcc() -> tuple[str | None, str]:
    """The first compiler of torch's major CUDA version, or None; and in words, which it is and what
    is wrong with those that come before it."""
    if torch.version.cuda is None:
        return None, "this torch is built without CUDA"
    wrong = []
    for path, found_by in list_nvcc():
        try:
            version = re.search(r"release (\d+\.\d+)|$", output_of(path, "--version"))[1]
        except (OSError, RuntimeError) as error:
            wrong.append(f"{path} ({found_by}) cannot be used: {error}")
            continue
        if version is not None and version.split(".")[0] == torch.version.cuda.split(".")[0]:
            return path, "; ".join([f"{version} {path} ({found_by})", *wrong])
        wrong.append(f"{path} ({found_by}) is of CUDA {version}, torch of {torch.version.cuda}")
    said = "; ".join(wrong) or "no nvcc found"
    return None, (f"{said}: install the CUDA toolkit {torch.version.cuda} (from CUDA 13 on: "
                  f'pip install "cuda-toolkit[nvcc,cudart,cccl]=={torch.version.cuda}.*") or set '
                  "CUDA_HOME")


def gpu_targets(archs: str) -> list[str]:
    """nvcc's options for a list such as "8.0;9.0+PTX", without what is below 7.5, which has no tanh
    in one instruction. Raises RuntimeError if it is none."""
    options = []
    for arch in dict.fromkeys(archs.replace(";", " ").split()):
        found = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
        if found is None:
            raise RuntimeError(f"TORCH_CUDA_ARCH_LIST={archs}: {arch} is no number such as 9.0 or "
                               "9.0+PTX")
        if float(f"{found[1]}.{found[2][0]}") < 7.5:
            continue
        number = found[1] + found[2]
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if found[3]:
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def build_cuda() -> str:
    """The path of the library. nvcc makes all of it in one call: it knows where its headers are,
    also where it is a script. CUDA's runtime is the one that torch has loaded."""
    sources = [find_source("scan_cuda.cpp"), find_source("scan_cuda.cu")]
    if torch.version.cuda is None:
        raise RuntimeError("this torch is built without CUDA")
    gpus = range(torch.cuda.device_count())
    here = sorted({"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in gpus})
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST") or ("" if here else "8.0;9.0")
    targets = gpu_targets(";".join([asked, *here]))         # never without the GPUs that are here
    if not targets or (here and not gpu_targets(";".join(here))):
        raise RuntimeError("the kernels need a GPU of compute capability 7.5 or more, not "
                           f"{here or asked}")
    flags = ["-O3", "-std=c++20", "-ftz=true", *targets, "-shared", "-Xcompiler=-fPIC",
             "-cudart=none", "-DTORCH_EXTENSION_NAME=scan_cuda"]
    depends = [*sources, find_source("scan.h")]
    name = name_build("scan_cuda", depends, torch.__version__, sys.implementation.cache_tag, flags)
    nvcc, why = find_nvcc()
    if nvcc is None:
        path = newest(f"{name}_*.so")
        if path is None:
            raise RuntimeError(why)
        return path
    root = os.path.dirname(torch.__file__)
    headers = [f"{root}/include", f"{root}/include/torch/csrc/api/include",
               sysconfig.get_path("include")]
    libraries = ["c10", "c10_cuda", "torch_cpu", "torch_python"]
    name = name_build(name, [], output_of(nvcc, "--version"))
    path = os.path.join(cache_folder(), f"{name}.so")
    build_once(path, [
        nvcc, *flags, "--threads=0", *(f"-isystem={folder}" for folder in headers), *sources,
        f"-L{root}/lib", *(f"-l{library}" for library in libraries),
    ], logging.WARNING)
    return path


def load_cuda():
    path = build_cuda()
    spec = importlib.util.spec_from_file_location("scan_cuda", path)
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)

    def call(operation: str, numbers: list[int], device: torch.device):
        check_device(device, "cuda")
        library.call(operation, numbers, device.index)

    return call
