"""Building the kernels: once, whoever asks at the same time; after a build was killed; without a compiler."""
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import fastvim

ROOT = pathlib.Path(fastvim.__file__).parent
RUN = """
import logging, sys, torch, fastvim
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
model = fastvim.FastVim(img_size=32, embed_dim=16, depth=1, num_classes=3)
print(model(torch.ones(1, 3, 32, 32)).shape, fastvim.pick_backend("cpu").name)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Starts a process that runs a model, with an empty cache and a compiler that notes each of its runs."""
    compiler, notes = tmp_path / "g++", tmp_path / "builds"
    real = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    assert real, "these tests need g++"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *--version*) ;; *) echo $$ >> {notes}; sleep ${{SLOW:-0}};; esac\n'
                        f'exec {real} "$@" -O0\n')                   # these tests want the library, not its speed
    compiler.chmod(0o755)

    def start(code=RUN, **environment):
        env = {**os.environ, "FASTVIM_CACHE": str(tmp_path / "cache"), "CXX": str(compiler), "OMP_NUM_THREADS": "1",
               "PYTHONPATH": str(ROOT), **environment}
        env = {k: v for k, v in env.items() if v is not None}
        return subprocess.Popen([sys.executable, "-c", code], env=env, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, cwd=tmp_path, start_new_session=True)
    start.builds = lambda: len(notes.read_text().split()) if notes.exists() else 0
    start.compiler, start.cache = compiler, tmp_path / "cache"
    return start


def finish(process, timeout=200):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err
    return out, err


def test_eight_processes_build_once_and_the_next_not_at_all(run):
    processes = [run() for _ in range(8)]
    for process in processes:
        assert finish(process)[0] == "torch.Size([1, 3]) cpu\n"
    assert run.builds() == 1
    assert finish(run())[0].endswith("cpu\n") and run.builds() == 1
    assert [p.suffix for p in sorted(run.cache.iterdir())] == [".lock", ".so"]


def test_a_build_that_is_killed_does_not_stop_the_next(run):
    first = run(SLOW="60")
    deadline = time.time() + 60
    while not run.builds():
        assert time.time() < deadline and first.poll() is None
        time.sleep(0.05)
    waiting = run()                                             # asks while the first holds the lock
    time.sleep(0.5)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert finish(waiting)[0].endswith("cpu\n") and run.builds() == 2
    for leftover in run.cache.iterdir():                       # what a killed build may leave
        if leftover.suffix == ".so":
            leftover.rename(f"{leftover}.tmp")
    assert finish(run())[0].endswith("cpu\n") and run.builds() == 3


def test_another_source_or_compiler_is_another_build(run, tmp_path):
    for name in ("fastvim.py", "fastvim_kernels.py", "scan_cpu.cpp"):
        shutil.copy(ROOT / name, tmp_path)
    env = dict(PYTHONPATH=str(tmp_path))
    finish(run(**env))
    with open(tmp_path / "scan_cpu.cpp", "a") as file:
        file.write("// changed\n")
    finish(run(**env))
    assert run.builds() == 2
    finish(run(CXX=None, **env))
    assert run.builds() == 2 and len(list(run.cache.glob("*.so"))) == 3


def test_a_library_that_cannot_be_loaded_is_reported(run):
    finish(run())
    library, = run.cache.glob("*.so")
    library.write_bytes(b"not a library")
    out, err = finish(run())
    assert out.endswith("python\n") and "backend cpu cannot be used" in err and library.name in err


@pytest.mark.parametrize("script, reason", [
    ("#!/bin/sh\necho 'x.cpp:1:2: error: no such thing as a vector' >&2\nexit 1\n", "no such thing as a vector"),
    ("#!/bin/sh\nexit 7\n", "g++ failed"),
    (None, "No such file"),
])
def test_a_compiler_that_fails_is_reported_once_and_python_serves(run, script, reason):
    if script is None:
        run.compiler.unlink()
    else:
        run.compiler.write_text(script)
    out, err = finish(run(RUN + "\nmodel(torch.ones(1, 3, 32, 32))"))
    assert out.endswith("python\n") and reason in err and err.count("cannot be used") == 1
    asked = run(FASTVIM_BACKEND="cpu")                          # who asks for it by name gets an error instead
    _, err = asked.communicate(timeout=100)
    assert asked.returncode == 1 and "RuntimeError: backend cpu cannot be used" in err and reason in err


def test_no_compiler_at_all(run, tmp_path):
    (tmp_path / "empty").mkdir()
    out, err = finish(run(CXX=None, PATH=str(tmp_path / "empty")))
    assert out.endswith("python\n") and "no C++ compiler found: install g++" in err


def test_a_copy_of_fastvim_py_alone_runs(run, tmp_path):
    shutil.copy(ROOT / "fastvim.py", tmp_path)
    hide = "import sys; sys.modules['fastvim_kernels'] = None\n"            # it may be installed, too
    out, err = finish(run(hide + RUN, PYTHONPATH=str(tmp_path)))
    assert out.endswith("python\n") and "cannot be used" not in err
    shutil.copy(ROOT / "fastvim_kernels.py", tmp_path)          # with the glue, without the sources
    out, err = finish(run(PYTHONPATH=str(tmp_path)))
    assert out.endswith("python\n") and "scan_cpu.cpp is missing: it belongs beside fastvim.py" in err


def test_importing_compiles_nothing(run):
    finish(run("import fastvim; fastvim.create_model('fastvim_tiny', depth=1)"))
    assert run.builds() == 0 and not run.cache.exists()


def test_an_unwritable_cache_is_reported(run, tmp_path):
    (tmp_path / "file").write_text("")
    out, err = finish(run(FASTVIM_CACHE=str(tmp_path / "file" / "cache")))
    assert out.endswith("python\n") and "cannot be used" in err and "file" in err


def test_cuda_says_what_it_misses(monkeypatch):
    """On a machine without a GPU the reasons can be had one by one; none of them is a traceback from a build."""
    from torch.utils import cpp_extension

    import fastvim_kernels
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    with pytest.raises(RuntimeError, match="no nvcc found: install the CUDA toolkit 13.2"):
        fastvim_kernels._load_cuda()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeError, match="without CUDA"):
        fastvim_kernels._load_cuda()


@pytest.mark.parametrize("release, match", [("12.4", "nvcc is of CUDA 12.4, torch of CUDA 13.2"),
                                            (None, "nvcc failed")])
def test_an_nvcc_of_another_major_version(monkeypatch, tmp_path, release, match):
    from torch.utils import cpp_extension

    import fastvim_kernels
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V1'\n" if release else
                    "#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    with pytest.raises(RuntimeError, match=match):
        fastvim_kernels._load_cuda()
