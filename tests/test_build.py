"""Building the kernels: once, whoever asks at the same time; after a build was killed; without a
compiler. The source here is a small one, whose operations do nothing: these tests are about
builds."""
import importlib.util
import logging
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import types

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


@pytest.fixture
def toolkits(tmp_path, monkeypatch):
    """For a torch of CUDA 13.2: add(place, version) puts an nvcc there, a script which makes empty
    libraries and notes its options in tmp_path/made. No other nvcc is to be found."""
    def add(place, version="13.2", body=None):
        folder = "nvidia/cu13/bin" if place == "pip" else place
        nvcc = tmp_path / folder / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(body or f"""#!/bin/sh
[ "$1" = --version ] && {{ echo "Cuda compilation tools, release {version}, V1"; exit; }}
echo "$@" >> {tmp_path}/made
for output; do :; done
echo library > "$output"
""")
        nvcc.chmod(0o755)
        return str(nvcc)

    packages = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: packages)
    monkeypatch.setattr(fastvim_build, "USUAL_NVCC", str(tmp_path / "usual" / "nvcc"))
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setenv("PATH", f"{tmp_path}/path:/usr/bin:/bin")
    monkeypatch.setenv("FASTVIM_CACHE", str(tmp_path / "cache"))
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return add


def test_which_nvcc_serves_and_why(toolkits, tmp_path, monkeypatch):
    """What CUDA_HOME names, then pip's, then others; each only if it is of torch's version."""
    assert fastvim_build.find_nvcc()[0] is None
    for place, name in (("usual", "usual place"), ("path", "PATH"), ("pip", "pip"),
                        ("home/bin", "CUDA_HOME")):
        nvcc = toolkits(place)
        if name == "CUDA_HOME":
            monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
        assert fastvim_build.find_nvcc() == (nvcc, f"13.2 {nvcc} ({name})")
    pathlib.Path(nvcc).unlink()                                 # CUDA_HOME now names nothing,
    (tmp_path / "nvidia/cu13/bin/nvcc").write_text("#!/bin/sh\nexit 1\n")     # pip's is broken,
    shutil.rmtree(tmp_path / "path")
    toolkits("path", "12.4")                                    # and that of PATH is too old
    found, why = fastvim_build.find_nvcc()
    assert found == str(tmp_path / "usual" / "nvcc")
    assert why.startswith(f"13.2 {found} (usual place); {nvcc} (CUDA_HOME) cannot be used: ")
    assert "nvcc (pip) cannot be used: nvcc failed: ?; " in why
    assert why.endswith("path/nvcc (PATH) is of CUDA 12.4, torch of 13.2")
    pathlib.Path(found).unlink()
    found, why = fastvim_build.find_nvcc()
    assert found is None
    assert 'torch of 13.2: install the CUDA toolkit 13.2' in why
    assert '"cuda-toolkit[nvcc,cudart,cccl]==13.2.*") or set CUDA_HOME' in why


def test_a_wrapper_builds_wherever_cuda_home_points(toolkits, tmp_path, monkeypatch):
    """A script on PATH that calls nvcc elsewhere: it is what runs, and where its headers lie is
    nobody's guess. Of all options only these have paths."""
    real = toolkits("elsewhere")
    wrapper = toolkits("path", body=f'#!/bin/sh\nexec {real} "$@"\n')
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert fastvim_build.find_nvcc()[0] == wrapper
    path = fastvim_build.build_cuda()
    assert pathlib.Path(path).read_text() == "library\n"
    options = (tmp_path / "made").read_text().split()
    root = pathlib.Path(torch.__file__).parent
    for option in options:
        inside = (str(ROOT), str(root), sysconfig.get_path("include"), f"{path}.tmp")
        assert "/" not in option or any(folder in option for folder in inside), option
    assert "-gencode=arch=compute_80,code=sm_80" in options


def test_a_built_cuda_library_serves_without_a_compiler(toolkits, tmp_path, monkeypatch):
    nvcc = pathlib.Path(toolkits("pip"))
    for _ in range(2):
        with pytest.raises(ImportError, match="invalid ELF|too short") as error:
            fastvim_build.load_cuda()
        built, = (tmp_path / "cache").glob("scan_cuda_*.so")
        assert str(built) in str(error.value)
        nvcc.unlink(missing_ok=True)
    assert len((tmp_path / "made").read_text().splitlines()) == 1
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")           # built for other GPUs
    with pytest.raises(RuntimeError, match="no nvcc found"):
        fastvim_build.load_cuda()


def test_an_nvcc_that_fails_says_so_and_leaves_nothing(toolkits, tmp_path):
    toolkits("pip", body="""#!/bin/sh
[ "$1" = --version ] && { echo "release 13.2, V1"; exit; }
echo "scan_cuda.cu(1): error: no such kernel" >&2; exit 2
""")
    with pytest.raises(RuntimeError, match="nvcc failed: scan_cuda.cu.1.: error: no such kernel"):
        fastvim_build.load_cuda()
    assert not list((tmp_path / "cache").glob("*.so*"))


@pytest.mark.parametrize("archs, targets", [
    ("9.0", "90:sm_90"), ("8.0;9.0", "80:sm_80 90:sm_90"), ("8.6+PTX", "86:sm_86 86:compute_86"),
    ("9.0a 12.0", "90a:sm_90a 120:sm_120"), ("5.2 7.0 7.5 8.0;8.0", "75:sm_75 80:sm_80"),
    ("6.1+PTX", ""), ("Hopper", None), ("9", None), ("8.0,9.0", None)])
def test_which_gpus_are_built_for(archs, targets):
    if targets is None:
        with pytest.raises(RuntimeError, match=f"TORCH_CUDA_ARCH_LIST={archs}: .* is no number"):
            fastvim_build.gpu_targets(archs)
        return
    pairs = (pair.split(":") for pair in targets.split())
    expected = [f"-gencode=arch=compute_{number},code={code}" for number, code in pairs]
    assert fastvim_build.gpu_targets(archs) == expected


@pytest.mark.parametrize("asked, here, built", [
    ("", [], "80 90"), ("8.0", [(9, 0)], "80 90"), ("9.0", [(9, 0), (9, 0)], "90"),
    ("8.0", [(7, 0)], None), ("7.0", [], None), ("7.0", [(7, 0), (8, 6)], "86")])
def test_the_gpus_that_are_here_are_always_built_for(toolkits, tmp_path, monkeypatch, asked, here, built):
    toolkits("pip")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(here))
    monkeypatch.setattr(torch.cuda, "get_device_capability", here.__getitem__)
    if built is None:
        with pytest.raises(RuntimeError, match="need a GPU of compute capability 7.5 or more, not .*7.0"):
            fastvim_build.build_cuda()
        return
    fastvim_build.build_cuda()
    made = re.findall(r"code=sm_(\w+)", (tmp_path / "made").read_text())
    assert made == built.split()


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
    assert fastvim_build.find_source("scan.h") == str(ROOT / "scan.h")


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


def test_cuda_says_what_it_misses(toolkits, monkeypatch):
    with pytest.raises(RuntimeError, match=r"no nvcc found: install the CUDA toolkit 13\.2"):
        fastvim_build.load_cuda()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeError, match="without CUDA"):
        fastvim_build.load_cuda()
    assert fastvim_build.find_nvcc() == (None, "this torch is built without CUDA")
