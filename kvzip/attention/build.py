"""Compiles the kernels in csrc/ at first use, or by `make kernels`, and keeps the libraries in a cache folder.

Importing the package needs no compiler: only asking for the backend "cpu" or "cuda" does. A library is named after
everything it follows from (sources, flags, torch), so that a stale one is never loaded.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)
_PACKAGE = Path(__file__).resolve().parent.parent
TARGETS = ("cpu", "cuda")
OLDEST_TORCH = "2.11"
TORCH_TARGET = "0x020b000000000000"  # torch 2.11: the oldest whose stable ABI has all that the bindings use
CUDA_ARCHITECTURES = ("80", "90", "100", "120")

_COMMON = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden")
# One source, compiled once for each instruction set; the library chooses when it is loaded.
_ISAS = {
    "x86_64": {
        "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
        "avx2": ("-mavx2", "-mfma", "-mf16c"),
        "generic": (),
    },
}
_PER_ISA, _ONCE = ("kernels.cpp", "column_max.cpp"), ("dispatch.cpp", "bindings.cpp")


class KernelsUnavailable(RuntimeError):  # noqa: N818
    """The kernels of a backend can be neither found nor built; the message says what is missing."""


def sources() -> Path:
    """Folder of the C++ sources: in the installed package, or at the root of a checkout.

    Raises:
        KernelsUnavailable: there is none.
    """
    for folder in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if (folder / "include").is_dir():
            return folder
    raise KernelsUnavailable(f"the kernel sources are missing: neither {_PACKAGE / 'csrc'} nor a checkout's csrc/")


def cache_folder() -> Path:
    """Where built libraries are kept: $KVZIP_CACHE, else kvzip in the user's cache folder."""
    chosen = os.environ.get("KVZIP_CACHE")
    if chosen:
        return Path(chosen) / "kernels"
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise KernelsUnavailable(f"there is no folder for compiled kernels ({error}); set KVZIP_CACHE") from error
    return home / "kvzip" / "kernels"


def isas() -> dict[str, tuple[str, ...]]:
    """Instruction sets and their compiler flags for this machine's processor."""
    return _ISAS.get(platform.machine(), {"generic": ()})


def cpu_objects(folder: Path, out: Path, flags: Sequence[str] = _COMMON) -> list[tuple[list[str], Path]]:
    """Commands that compile the CPU kernels, without a compiler's name, each with the object file it writes.

    Args:
        folder: the sources.
        out: folder of the object files.
        flags: common to all.
    """
    steps = []
    include = [f"-I{folder / 'include'}"]
    for isa, options in isas().items():
        for source in _PER_ISA:
            target = out / f"{Path(source).stem}_{isa}.o"
            steps.append(([*flags, f"-DKVZIP_ISA={isa}", *options, *include, *_input(folder / "cpu" / source)], target))
    for source in _ONCE:
        target = out / f"{Path(source).stem}.o"
        steps.append(([*flags, *include, *_torch_flags("-isystem"), *_input(folder / "cpu" / source)], target))
    return steps


def _input(source: Path) -> list[str]:
    return ["-c", str(source)]


def _torch_flags(include: str) -> list[str]:
    return [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", include, str(Path(torch.__file__).parent / "include")]


def _link_flags(to_linker: str) -> list[str]:
    # libtorch.so brings libtorch_cuda.so where there is one, so that a library built without CUDA finds it at run time.
    return [f"-L{Path(torch.__file__).parent / 'lib'}", f"{to_linker}--no-as-needed", "-ltorch", "-ltorch_cpu"]


def _compiler(target: str) -> list[str]:
    """The compiler and what is to follow its name, as in CXX="ccache g++"; one that is named is not replaced."""
    variable = {"cpu": "CXX", "cuda": "NVCC"}[target]
    chosen = shlex.split(os.environ.get(variable, ""))
    toolkits = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    known = {"cpu": ("g++", "clang++"), "cuda": ("nvcc", *(f"{one}/bin/nvcc" for one in toolkits if one))}
    for name in chosen[:1] or known[target]:
        if found := shutil.which(name):
            return [found, *chosen[1:]]
    wanted = "a C++ compiler (g++ or clang++, or $CXX)" if target == "cpu" else "the CUDA compiler nvcc (or $NVCC)"
    named = f": ${variable} is {chosen[0]!r}" if chosen else ""
    raise KernelsUnavailable(f"the {target} kernels are not built, and {wanted} was not found{named}")


def library_path(target: str, *, everything: bool = False) -> Path:
    """Where the library of `target` ("cpu" or "cuda") belongs, built or not.

    Args:
        everything: the one for all GPU architectures, not this machine's alone.

    Raises:
        KernelsUnavailable: no sources.
    """
    folder = sources()
    if target == "cpu":
        targets: object = isas()
    else:
        targets = CUDA_ARCHITECTURES if everything else cuda_architectures()
    digest = hashlib.sha256(f"{torch.__version__} {platform.machine()} {targets}".encode())
    digest.update(Path(__file__).read_bytes())
    files = [*(folder / "include").rglob("*"), *(folder / target).rglob("*")]
    for path in sorted(path for path in files if path.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    return cache_folder() / f"kvzip_{target}_{digest.hexdigest()[:16]}.so"


def build(target: str) -> Path:
    """Return the library of `target`, compiled now if it was not before.

    Raises:
        KernelsUnavailable: no compiler or no sources, a compiler that fails, or a torch too old.
    """
    if torch.__version__ < OLDEST_TORCH:  # a TorchVersion, which compares as versions do
        raise KernelsUnavailable(f"the {target} kernels need torch {OLDEST_TORCH}, this is {torch.__version__}")
    path = library_path(target)
    for found in (path, library_path(target, everything=True)):
        if found.exists():
            return found
    compiler = _compiler(target)
    logger.warning("compiling the %s kernels, once: %s", target, "seconds" if target == "cpu" else "a minute or two")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _compile(target, compiler, path)
    except OSError as error:
        raise KernelsUnavailable(f"the {target} kernels cannot be built: {error}") from error
    return path


def _compile(target: str, compiler: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        if target == "cpu":
            steps = cpu_objects(sources(), Path(scratch))
            for command, output in steps:
                _run([*compiler, *command, "-o", str(output)])
            _run([*compiler, "-shared", *(str(output) for _, output in steps), *_link_flags("-Wl,"), "-o", str(made)])
        else:
            _run([*compiler, *cuda_command(sources()), "-o", str(made)])
        made.replace(path)


def cuda_architectures() -> tuple[str, ...]:
    """Those that this machine's GPUs run, so that a first use waits less; all where there is none, or a newer one."""
    found = set()
    if not torch.cuda.is_available():  # also where there is a GPU, but a driver too old for torch
        return CUDA_ARCHITECTURES
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        known = [one for one in CUDA_ARCHITECTURES if one[:-1] == str(major) and int(one[-1]) <= minor]
        if not known:
            return CUDA_ARCHITECTURES
        found.add(known[-1])
    return tuple(sorted(found, key=int)) or CUDA_ARCHITECTURES


def cuda_command(folder: Path) -> list[str]:
    """Arguments of nvcc, but for its output, that make one library for all of `cuda_architectures()`."""
    flags = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    for number in cuda_architectures():  # PTX too: for GPUs between, and to come
        flags += ["-gencode", f"arch=compute_{number},code=[sm_{number},compute_{number}]"]
    inputs = sorted(str(path) for path in (folder / "cuda").iterdir() if path.suffix in (".cu", ".cpp"))
    return [*flags, f"-I{folder / 'include'}", *_torch_flags("-isystem"), *inputs, *_link_flags("-Xlinker=")]


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        message = f"compiling the kernels failed: {' '.join(command)}\n{error.stderr[-2000:]}"
        raise KernelsUnavailable(message) from error


def load(target: str) -> Path:
    """Build where needed, and register the operators of `target` with torch; once a process, also where it fails.

    Raises:
        KernelsUnavailable: as `build`.
    """
    found = _load(target)
    if isinstance(found, KernelsUnavailable):
        raise found
    return found


@cache
def _load(target: str) -> Path | KernelsUnavailable:
    try:
        path = build(target)
    except KernelsUnavailable as error:
        return error
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return KernelsUnavailable(f"the {target} kernels in {path} do not load: {error}")
    return path


def build_all() -> None:
    """Build what can be built here, and say so: `make kernels`."""
    for target in TARGETS:
        try:
            print(target, build(target))
        except KernelsUnavailable as problem:
            print(target, "not built:", problem)
