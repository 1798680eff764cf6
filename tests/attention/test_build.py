"""The kernels are compiled at first use: where they go, when they are not made again, and what is said without them."""

import logging
import shutil
import stat
from pathlib import Path

import pytest
import torch

from kvzip import ModelKVzip
from kvzip.attention import BACKENDS, build, cuda, resolve_backend
from kvzip.attention.build import KernelsUnavailable
from tests.attention.problems import missing
from tests.tiny import build as tiny_model
from tests.tiny import ids

CPU = torch.device("cpu")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A cache folder of its own that is empty, and a process that has not asked for kernels yet."""
    monkeypatch.setenv("KVZIP_CACHE", str(tmp_path / "cache"))
    build._load.cache_clear()
    yield tmp_path
    build._load.cache_clear()


def program(path, text):
    """An executable shell script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def recording_compiler(folder):
    """A compiler that writes down how it was called, and something where its output belongs."""
    text = f'echo "$@" >> {folder}/calls\nwhile [ "$1" != -o ]; do shift; done\necho compiled > "$2"'
    return program(folder / "compiler", text)


def calls(folder):
    return (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []


def without_compilers(monkeypatch, folder):
    """PATH holds nothing at all, and CXX names nothing that exists."""
    (folder / "bin").mkdir()
    monkeypatch.setenv("PATH", str(folder / "bin"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)


# -- where and when ----------------------------------------------------------------------------------------------------


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("KVZIP_CACHE", str(tmp_path / "here"))
    assert build.cache_folder() == tmp_path / "here" / "kernels"
    monkeypatch.delenv("KVZIP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.cache_folder() == tmp_path / "xdg" / "kvzip" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / ".cache" / "kvzip" / "kernels"


def test_a_second_build_does_nothing(fresh, monkeypatch):
    """The library is made once, in the cache folder and nowhere else, and nothing beside it stays there."""
    monkeypatch.setenv("CXX", recording_compiler(fresh))
    made = build.build("cpu")
    assert made == build.library_path("cpu")
    assert [path.name for path in (fresh / "cache" / "kernels").iterdir()] == [made.name]
    called = calls(fresh)
    assert len(called) == 2 * len(build.isas()) + 2 + 1, "every source, and the link"
    assert all(f"-DKVZIP_ISA={isa} " in " ".join(called) for isa in build.isas())
    before = made.stat().st_mtime_ns
    assert build.build("cpu") == made
    assert calls(fresh) == called
    assert made.stat().st_mtime_ns == before


def test_a_library_that_is_there_needs_no_compiler(fresh, monkeypatch):
    monkeypatch.setenv("CXX", recording_compiler(fresh))
    made = build.build("cpu")
    without_compilers(monkeypatch, fresh)
    assert build.build("cpu") == made


def test_changed_sources_are_another_library(monkeypatch, tmp_path):
    """A stale library is never loaded: a name follows from every source, and from nothing that does not matter."""
    package = tmp_path / "kvzip"
    shutil.copytree(build.sources(), package / "csrc")
    monkeypatch.setattr(build, "_PACKAGE", package)
    names = {build.library_path("cpu").name}
    assert build.library_path("cpu").name in names
    for path in ("cpu/simd.h", "cpu/dispatch.cpp", "include/kvzip/schedule.h"):
        source = package / "csrc" / path
        source.write_text(source.read_text() + "// changed\n")
        assert build.library_path("cpu").name not in names
        names.add(build.library_path("cpu").name)
    other = package / "csrc" / "cuda" / "launch.cu"
    other.write_text(other.read_text() + "// changed\n")
    assert build.library_path("cpu").name in names


def test_missing_sources_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_PACKAGE", tmp_path / "kvzip")
    with pytest.raises(KernelsUnavailable, match=r"sources are missing.*csrc"):
        build.build("cpu")


# -- without a compiler ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_missing_compiler_is_named(fresh, monkeypatch, target):
    if Path("/usr/local/cuda/bin/nvcc").exists() and target == "cuda":
        pytest.skip("nvcc is found without PATH")
    without_compilers(monkeypatch, fresh)
    wanted = r"g\+\+ or clang\+\+, or \$CXX" if target == "cpu" else r"nvcc \(or \$NVCC"
    with pytest.raises(KernelsUnavailable, match=rf"{target} kernels are not built, and .*{wanted}.* was not found"):
        build.load(target)
    assert not (fresh / "cache").exists(), "nothing is left behind"


def test_a_compiler_that_is_named_is_not_replaced(fresh, monkeypatch):
    """It may be more than one word, and where it is not there, no other one is taken."""
    monkeypatch.setenv("CXX", f"{recording_compiler(fresh)} --extra")
    build.build("cpu")
    assert all(call.startswith("--extra ") for call in calls(fresh))
    monkeypatch.setenv("KVZIP_CACHE", str(fresh / "other"))
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    with pytest.raises(KernelsUnavailable, match=r"was not found: \$CXX is '/nonexistent/g\+\+'"):
        build.build("cpu")


def test_auto_says_why_it_does_without_the_kernel(fresh, monkeypatch, caplog):
    """A whole model: prefill, scores and answers by PyTorch; the log has what is missing."""
    without_compilers(monkeypatch, fresh)
    with caplog.at_level(logging.INFO, logger="kvzip"):
        model = ModelKVzip.from_model(tiny_model("llama"), None, backend="auto")
    assert model.backend == "torch"
    warned, said = caplog.records
    assert warned.levelno == logging.WARNING
    assert "cpu is not available" in warned.getMessage()
    assert "$CXX" in warned.getMessage()
    assert "torch" in said.getMessage()
    kv = model.prefill(ids(20), scorer="random")
    assert len(model.generate(ids(3), kv, max_new_tokens=3, eos_token_id=None)) == 3


def test_asking_for_the_kernel_by_name_does_not_replace_it(fresh, monkeypatch):
    without_compilers(monkeypatch, fresh)
    with pytest.raises(KernelsUnavailable, match="C\\+\\+ compiler"):
        ModelKVzip.from_model(tiny_model("llama"), None, backend="cpu")


def test_a_compiler_that_fails_is_quoted_and_may_be_tried_again(fresh, monkeypatch):
    """Nothing half made is kept; once the compiler works, the same process goes on."""
    monkeypatch.setenv("CXX", program(fresh / "broken", "echo 'error: no such thing as a flux' >&2\nexit 3"))
    for _ in range(2):
        with pytest.raises(
            KernelsUnavailable, match=r"compiling the kernels failed: .*broken.*(?s:.*)no such thing as"
        ):
            build.load("cpu")
    assert list((fresh / "cache").rglob("*.so")) == []
    assert list((fresh / "cache" / "kernels").iterdir()) == []
    monkeypatch.setenv("CXX", recording_compiler(fresh))
    assert build.build("cpu").exists()


def test_a_library_that_does_not_load_is_said_so(fresh, monkeypatch):
    monkeypatch.setenv("CXX", recording_compiler(fresh))
    with pytest.raises(KernelsUnavailable, match=r"the cpu kernels in .*\.so do not load"):
        build.load("cpu")


def test_a_cache_folder_that_cannot_be_written_is_said_so(fresh, monkeypatch):
    """A file lies where the folder should be: "auto" goes on without the kernel."""
    monkeypatch.setenv("CXX", recording_compiler(fresh))
    (fresh / "cache").write_text("in the way")
    with pytest.raises(KernelsUnavailable, match="cache"):
        build.load("cpu")
    assert resolve_backend("auto", [CPU]).name == "torch"


def test_a_compiler_that_cannot_be_run_is_said_so(fresh, monkeypatch):
    """An executable that is no program, such as one for another machine."""
    path = fresh / "compiler"
    path.write_bytes(b"\x7fELF no program")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    with pytest.raises(KernelsUnavailable, match="compiler"):
        build.load("cpu")


# -- the other backends ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_and_flash_say_what_is_missing():
    device = torch.device("cuda", 0)
    with pytest.raises(KernelsUnavailable, match="needs a CUDA device and driver, and torch sees none"):
        resolve_backend("cuda", [device])
    with pytest.raises(
        KernelsUnavailable, match=r"flash-attn, which is not installed.*pip install|needs a CUDA device"
    ):
        resolve_backend("flash", [device])


def pretend_a_gpu(monkeypatch, capability=(9, 0)):
    """torch seems to have devices, which are this machine's CPU; the library of the CUDA kernels seems to be loaded."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(build, "load", lambda target: Path("library.so"))


@pytest.mark.skipif(bool(missing("cpu")), reason=missing("cpu"))
def test_cuda_is_available_where_its_kernels_run(monkeypatch):
    """The step that `load` tries is a call that a kernel takes: here that of the CPU."""
    pretend_a_gpu(monkeypatch)
    cuda.load([CPU])


def test_cuda_is_not_available_where_its_kernels_do_not_run(monkeypatch):
    """As with a driver that is older than the compiler: torch works, the library is built and loads."""

    def attend(*_, **__):
        raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")

    pretend_a_gpu(monkeypatch)
    monkeypatch.setattr(cuda, "attend", attend)
    with pytest.raises(KernelsUnavailable, match=r"do not run on cpu: CUDA driver version is insufficient"):
        cuda.load([CPU])


def test_cuda_needs_a_device_that_is_new_enough(monkeypatch):
    pretend_a_gpu(monkeypatch, (7, 5))
    with pytest.raises(KernelsUnavailable, match=r"needs compute capability \(8, 0\), cpu has \(7, 5\)"):
        cuda.load([CPU])


def test_a_driver_that_torch_cannot_use_is_no_matter(fresh, monkeypatch):
    """The driver lists a GPU, torch cannot start it: both kernels are built all the same, the GPU's for all of them."""

    def broken(device):
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", broken)
    monkeypatch.setenv("CXX", recording_compiler(fresh))
    monkeypatch.setenv("NVCC", recording_compiler(fresh))
    for target in build.TARGETS:
        assert build.build(target).exists()
    assert build.cuda_architectures() == build.CUDA_ARCHITECTURES


def test_the_cuda_compiler_is_found_in_its_toolkit(fresh, monkeypatch):
    without_compilers(monkeypatch, fresh)
    (fresh / "toolkit" / "bin").mkdir(parents=True)
    recording_compiler(fresh)
    (fresh / "compiler").rename(fresh / "toolkit" / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(fresh / "toolkit"))
    assert build._compiler("cuda") == [str(fresh / "toolkit" / "bin" / "nvcc")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_auto_on_a_gpu_without_kernels_is_torch(caplog):
    with caplog.at_level(logging.INFO, logger="kvzip"):
        assert resolve_backend("auto", [torch.device("cuda", 0)]).name == "torch"
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "INFO"]


@pytest.mark.parametrize("name", [name for name, backend in BACKENDS.items() if backend.devices is not None])
def test_layers_elsewhere_are_refused_before_anything_is_built(fresh, monkeypatch, name):
    without_compilers(monkeypatch, fresh)
    elsewhere = torch.device("mps")
    with pytest.raises(ValueError, match=rf"backend '{name}' computes on .*but layers are on mps"):
        resolve_backend(name, [elsewhere])


def test_the_environment_is_as_before():
    """The fixtures above leave the real kernels usable in this process."""
    backend = resolve_backend("auto", [CPU])
    assert backend.name in ("cpu", "torch")
