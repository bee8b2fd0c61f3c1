"""Building the kernels: once, whoever asks at the same time; after a build was killed; without a
compiler. The source here is a small one, whose operations do nothing: these tests are about
builds."""
import importlib.util
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import sysconfig
import time

import pytest
import torch

import fastvim
import fastvim_build
import fastvim_kernels
from helpers import Child

ROOT = pathlib.Path(fastvim.__file__).parent


def write_source(folder):
    """scan.h, and a scan_cpu.cpp with an empty function for each of its operations."""
    header = (ROOT / "scan.h").read_text()
    (folder / "scan.h").write_text(header)
    source = '#include "scan.h"\n'
    for line in header.splitlines():
        if line.startswith("int "):
            source += f'extern "C" {line.rstrip(";")} {{ return 0; }}\n'
    (folder / "scan_cpu.cpp").write_text(source)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a small source, an empty cache, and a compiler that notes each of its runs.
    What fastvim_build looks for, it finds there."""
    write_source(tmp_path)
    real = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    assert real, "these tests need g++"
    compiler = tmp_path / "g++"
    compiler.write_text(f"""#!/bin/sh
case "$*" in *--version*) ;; *) echo $$ >> {tmp_path}/builds; sleep ${{SLOW:-0}};; esac
exec {real} "$@" -O0
""")
    compiler.chmod(0o755)
    monkeypatch.setattr(fastvim_build, "find_source", lambda name: str(tmp_path / name))
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("FASTVIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTVIM_BACKEND", raising=False)
    return tmp_path


def count_builds(project):
    notes = project / "builds"
    return len(notes.read_text().split()) if notes.exists() else 0


def new_kernels():
    """The cpu backend's, as a new process has them: nothing is loaded."""
    return fastvim_kernels.Kernels("cpu", fastvim_kernels.DTYPES[:2], fastvim_build.load_cpu)


def new_backends(monkeypatch):
    """fastvim's backends, as a new process has them."""
    plain = fastvim.BACKENDS["python"]
    cpu = fastvim_kernels.CompiledBackend(new_kernels(), "cpu", plain, fastvim.announce)
    monkeypatch.setattr(fastvim, "BACKENDS", {"python": plain, "cpu": cpu})
    fastvim.announce.cache_clear()


@torch.no_grad()
def run_model():
    """-> the name of the backend that ran a model."""
    model = fastvim.FastVim(img_size=32, embed_dim=16, depth=1, num_classes=3)
    for _ in range(2):
        assert model(torch.ones(1, 3, 32, 32)).shape == (1, 3)
    return fastvim.pick_backend("cpu").name


def run_in_process(folder):
    """The whole of a user's process."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
    fastvim_build.find_source = lambda name: os.path.join(folder, name)
    print(run_model(), flush=True)


def start(project, **environment):
    output = project / f"output {time.monotonic_ns()}"
    names = ("CXX", "FASTVIM_CACHE")
    environment = {**{name: os.environ[name] for name in names}, **environment}
    return Child(run_in_process, str(project), output=output, **environment)


def finish(child):
    assert child.wait() == 0, child.said()
    return child.said()


def test_eight_processes_build_once_and_the_next_not_at_all(project):
    children = [start(project, SLOW="1") for _ in range(8)]
    for child in children:
        assert finish(child).endswith("cpu\n")
    assert count_builds(project) == 1
    assert finish(start(project)).endswith("cpu\n")
    assert count_builds(project) == 1
    assert [p.suffix for p in sorted((project / "cache").iterdir())] == [".lock", ".so"]


def test_a_build_that_is_killed_does_not_stop_the_next(project):
    first = start(project, SLOW="60")
    deadline = time.time() + 60
    while not count_builds(project):
        assert time.time() < deadline
        assert first.poll() is None
        time.sleep(0.05)
    waiting = start(project)                                    # asks while the first has the lock
    time.sleep(0.5)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert finish(waiting).endswith("cpu\n")
    assert count_builds(project) == 2
    library, = (project / "cache").glob("*.so")
    library.rename(f"{library}.tmp")                            # what a killed build may leave
    assert finish(start(project)).endswith("cpu\n")
    assert count_builds(project) == 3


def test_another_source_or_compiler_is_another_build(project, monkeypatch):
    for _ in range(2):
        assert new_kernels().problem() is None
    assert count_builds(project) == 1
    for name in ("scan_cpu.cpp", "scan.h"):
        before = count_builds(project)
        with open(project / name, "a") as file:
            file.write("// changed\n")
        assert new_kernels().problem() is None
        assert count_builds(project) == before + 1
    monkeypatch.delenv("CXX")
    assert new_kernels().problem() is None
    assert count_builds(project) == 3
    assert len(list((project / "cache").glob("*.so"))) == 4


def test_a_library_that_cannot_be_loaded_is_reported(project, monkeypatch, caplog):
    assert new_kernels().problem() is None
    library, = (project / "cache").glob("*.so")
    other = project / "other"
    other.mkdir()
    (other / library.name).write_bytes(b"not a library")
    monkeypatch.setenv("FASTVIM_CACHE", str(other))
    new_backends(monkeypatch)
    assert run_model() == "python"
    assert "backend cpu cannot be used" in caplog.text
    assert library.name in caplog.text


@pytest.mark.parametrize("script, reason", [
    ("#!/bin/sh\necho 'x.cpp:1:2: error: no such thing as a vector' >&2\nexit 1\n",
     "no such thing as a vector"),
    ("#!/bin/sh\nexit 7\n", "g++ failed"),
    (None, "No such file"),
], ids=["error", "silent", "missing"])
def test_a_compiler_that_fails_is_reported_once_and_python_serves(
        project, script, reason, monkeypatch, caplog):
    compiler = project / "g++"
    compiler.unlink()
    if script is not None:
        compiler.write_text(script)
        compiler.chmod(0o755)
    new_backends(monkeypatch)
    assert run_model() == "python"
    assert reason in caplog.text
    assert caplog.text.count("cannot be used") == 1
    monkeypatch.setenv("FASTVIM_BACKEND", "cpu")                # who asks for it gets an error
    with pytest.raises(RuntimeError, match="backend cpu cannot be used") as error:
        run_model()
    assert reason in str(error.value)


def test_no_compiler_at_all(project, monkeypatch, caplog):
    hide_compilers(project, monkeypatch)
    new_backends(monkeypatch)
    assert run_model() == "python"
    assert "no C++ compiler found: install g++" in caplog.text


def test_an_unwritable_cache_is_reported(project, monkeypatch, caplog):
    (project / "file").write_text("")
    monkeypatch.setenv("FASTVIM_CACHE", str(project / "file" / "cache"))
    new_backends(monkeypatch)
    assert run_model() == "python"
    assert "cannot be used" in caplog.text
    assert f"the cache folder {project}/file/cache cannot be written" in caplog.text
    assert "set FASTVIM_CACHE to one that can" in caplog.text


def hide_compilers(project, monkeypatch):
    (project / "empty").mkdir()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(project / "empty"))


def test_a_built_library_serves_without_a_compiler(project, monkeypatch):
    assert new_kernels().problem() is None
    older, = (project / "cache").glob("*.so")
    os.utime(older, (1, 1))
    (project / "cache" / "scan_cpu_0123456789abcdef_0.so").write_bytes(b"from another source")
    hide_compilers(project, monkeypatch)
    assert new_kernels().problem() is None
    newer = project / "cache" / f"{older.stem}2.so"
    newer.write_bytes(b"built last")
    assert newer.name in new_kernels().problem()                # so it was the one to be loaded
    newer.unlink()
    monkeypatch.setenv("CXX", "g++")                            # as the build stage left it
    assert new_kernels().problem() is None
    with open(project / "scan_cpu.cpp", "a") as file:
        file.write("// changed\n")
    assert "No such file" in new_kernels().problem()
    monkeypatch.delenv("CXX")
    assert "no C++ compiler found" in new_kernels().problem()
    assert count_builds(project) == 1


def test_a_built_cuda_library_serves_without_a_compiler(project, monkeypatch):
    from torch.utils import cpp_extension
    for name in ("scan_cuda.cpp", "scan_cuda.cu"):
        (project / name).write_text("")
    nvcc = project / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'release 13.2, V13'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(project))
    built = []

    def build(name, sources, flags, archs, folder):
        built.append(f"{folder}/{name}.so")
        pathlib.Path(built[-1]).write_bytes(b"not a library")

    monkeypatch.setattr(fastvim_build, "build_extension", build)
    for _ in range(2):
        with pytest.raises(ImportError, match="invalid ELF|too short") as error:
            fastvim_build.load_cuda()
        assert built[0] in str(error.value)
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    assert len(built) == 1
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")           # built for other GPUs
    with pytest.raises(RuntimeError, match="no nvcc found"):
        fastvim_build.load_cuda()


def test_a_compiler_of_several_words(project, monkeypatch):
    wrapper = project / "ccache"
    wrapper.write_text(f'#!/bin/sh\necho "$1" >> {project}/wrapped\nexec "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", f"{wrapper}  {os.environ['CXX']} -O1")
    assert new_kernels().problem() is None
    assert count_builds(project) == 1
    assert len((project / "wrapped").read_text().split()) == 2              # --version, and the build
    spaced = project / "my tools"
    spaced.mkdir()
    shutil.copy(project / "g++", spaced)
    monkeypatch.setenv("CXX", str(spaced / "g++"))
    assert new_kernels().problem() is None
    assert count_builds(project) == 2


@pytest.mark.parametrize("variable, value, folder", [
    ("FASTVIM_CACHE", "~/x", "home/x"), ("FASTVIM_CACHE", "rel/x", "rel/x"),
    ("XDG_CACHE_HOME", "~/y", "home/y/fastvim"), ("XDG_CACHE_HOME", "", "home/.cache/fastvim")])
def test_where_the_cache_is(tmp_path, monkeypatch, variable, value, folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FASTVIM_CACHE", raising=False)
    monkeypatch.setenv(variable, value)
    assert fastvim_build.cache_folder() == str(tmp_path / folder)
    assert (tmp_path / folder).is_dir()


def test_a_cache_that_cannot_be_written_serves_what_it_holds(project):
    assert new_kernels().problem() is None
    lock, = (project / "cache").glob("*.lock")
    lock.unlink()
    lock.mkdir()                                                # nobody can have it
    assert new_kernels().problem() is None
    lock.with_suffix(".so").unlink()
    assert "cache cannot be written (Is a directory): set FASTVIM_CACHE" in new_kernels().problem()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Of the project, as pip makes it."""
    source = tmp_path_factory.mktemp("source")
    for pattern in ("fastvim*.py", "check*.py", "info.py", "scan*", "pyproject.toml", "README.md"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, source)
    pip("wheel", "--no-build-isolation", "--wheel-dir", source, source)
    made, = source.glob("*.whl")
    return made


def pip(command, *arguments, **environment):
    options = ("-q", "--no-deps", "--disable-pip-version-check", *map(str, arguments))
    result = subprocess.run([sys.executable, "-m", "pip", command, *options], capture_output=True,
                            text=True, env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("options", [
    ["--target", "{0}"], ["--prefix", "{0}"], ["--root", "{0}"], ["--user"]], ids=lambda o: o[0])
def test_sources_are_found_however_pip_installs(wheel, tmp_path, options):
    options = [option.format(tmp_path) for option in options]
    script = None
    if "--user" in options:                 # not in a virtual environment: by its scheme, then
        scheme = f"{os.name}_user"
        paths = sysconfig.get_paths(scheme, {"userbase": str(tmp_path)})
        options = ["--target", paths["purelib"]]
        script = paths["data"]
    pip("install", "--ignore-installed", *options, wheel)
    if script is not None:
        os.renames(os.path.join(options[1], "share"), os.path.join(script, "share"))
    installed, = tmp_path.rglob("fastvim_build.py")
    spec = importlib.util.spec_from_file_location("installed_build", installed)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("scan.h", "scan_cpu.cpp", "scan_cuda.cpp", "scan_cuda.cu"):
        found = pathlib.Path(module.find_source(name))
        assert tmp_path in found.parents
        assert found.read_bytes() == (ROOT / name).read_bytes()
    with pytest.raises(RuntimeError, match="scan.f is missing: it belongs beside fastvim.py"):
        module.find_source("scan.f")


def test_sources_of_a_clone_lie_beside_the_modules():
    assert fastvim_kernels._source("scan.h") == str(ROOT / "scan.h")


def test_copies_without_the_other_files_run(tmp_path):
    """fastvim.py alone, in plain PyTorch; and with all but the sources of the kernels."""
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(ROOT / "fastvim.py", alone)
    names = ("fastvim_kernels", "fastvim_build", "fastvim_export", "fastvim_hub",
             "checkpoints", "checks")
    hide = f"import sys\nfor name in {names}: sys.modules[name] = None\n"   # it may be installed
    glue = tmp_path / "glue"
    glue.mkdir()
    for name in ("fastvim", *names):
        shutil.copy(ROOT / f"{name}.py", glue)
    run = """
import torch, fastvim
model = fastvim.FastVim(img_size=32, embed_dim=16, depth=1, num_classes=3)
print(tuple(model(torch.ones(1, 3, 32, 32)).shape), fastvim.pick_backend("cpu").name)
"""
    said = {}
    for folder, code in ((alone, hide + run), (glue, run)):
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        environment.pop("FASTVIM_BACKEND", None)
        result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=folder,
                                capture_output=True, text=True, timeout=200)
        assert result.stdout == "(1, 3) python\n", result.stderr
        said[folder] = result.stderr
    assert "cannot be used" not in said[alone]
    assert "scan.h is missing: it belongs beside fastvim.py" in said[glue]


def test_cuda_says_what_it_misses(monkeypatch):
    """On a machine without a GPU the reasons can be had one by one; none of them is a traceback
    from a build."""
    from torch.utils import cpp_extension
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    with pytest.raises(RuntimeError, match=r"no nvcc found: install the CUDA toolkit 13\.2"):
        fastvim_build.load_cuda()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeError, match="without CUDA"):
        fastvim_build.load_cuda()


@pytest.mark.parametrize("script, match", [
    ("echo 'Cuda compilation tools, release 12.4, V1'",
     r"nvcc is of CUDA 12\.4, torch of CUDA 13\.2"),
    ("exit 1", "nvcc failed")], ids=["older", "failing"])
def test_an_nvcc_of_another_major_version(monkeypatch, tmp_path, script, match):
    from torch.utils import cpp_extension
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    with pytest.raises(RuntimeError, match=match):
        fastvim_build.load_cuda()
