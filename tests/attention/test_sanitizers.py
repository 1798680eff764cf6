"""The C++ of the CPU backend on its own (csrc/tests/cpu_kernels.cpp): right, within bounds, and kept apart by ISA."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvzip.attention import build

SANITIZE = ("-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = [ROOT / "csrc/tests" / name for name in ("cpu_kernels.cpp", "quantized_kernels.cpp")]

compiler = next((found for found in map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++")) if found), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler is None, reason="no C++ compiler"),
    pytest.mark.skipif(not PROGRAMS[0].exists(), reason="not a checkout: csrc/tests is missing"),
]


def compile_kernels(out, flags):
    """Objects of everything but the bindings, which need torch."""
    steps = [step for step in build.cpu_objects(build.sources(), out, flags) if step[1].stem != "bindings"]
    assert len(steps) == 2 * len(build.isas()) + 1
    for command, target in steps:
        subprocess.run([compiler, *command, "-o", str(target)], check=True)
    return [target for _, target in steps]


@pytest.fixture
def sanitizers(tmp_path):
    """Skip where the compiler has no runtime libraries of the sanitizers."""
    source = tmp_path / "empty.cpp"
    source.write_text("int main() { return 0; }\n")
    done = subprocess.run([compiler, *SANITIZE, str(source), "-o", str(tmp_path / "empty")], capture_output=True)
    if done.returncode or subprocess.run([tmp_path / "empty"], capture_output=True).returncode:
        pytest.skip(f"{compiler} cannot link the address and undefined-behaviour sanitizers")


@pytest.mark.usefixtures("sanitizers")
def test_kernels_and_schedule_are_right_and_clean(tmp_path):
    """Every instruction set of this processor against double, threads and all, without one finding of a sanitizer."""
    objects = compile_kernels(tmp_path, SANITIZE)
    include = f"-I{build.sources() / 'include'}"
    for source in PROGRAMS:
        program = tmp_path / source.stem
        subprocess.run([compiler, *SANITIZE, include, str(source), *objects, "-pthread", "-o", program], check=True)
        done = subprocess.run([program], capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr[-4000:]
        assert re.search(r"^0 of \d{5,} checks failed; instruction sets:.* generic$", done.stdout, re.MULTILINE)


def test_sixteen_lanes_are_right_on_any_processor(tmp_path):
    """What AVX-512 has a kernel do, rows and sums and remainders, done by lesser instructions."""
    lanes = ("-std=c++17", "-O1", "-Wno-psabi", "-DKVZIP_GENERIC_LANES=16", "-DKVZIP_ISA=generic")
    include, folder = f"-I{build.sources() / 'include'}", build.sources() / "cpu"
    own = [str(folder / name) for name in ("kernels.cpp", "column_max.cpp", "dispatch.cpp")]
    objects = [str(tmp_path / f"{Path(source).stem}.o") for source in own]
    for source, target in zip(own, objects, strict=True):
        subprocess.run([compiler, *lanes, include, "-c", source, "-o", target], check=True)
    for source in PROGRAMS:
        program = tmp_path / source.stem
        subprocess.run([compiler, *lanes[:2], include, str(source), *objects, "-pthread", "-o", program], check=True)
        done = subprocess.run([program], capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr[-4000:]


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm to read symbols with")
def test_no_function_can_be_merged_across_instruction_sets(tmp_path):
    """A weak function made with AVX-512 would be the linker's choice for all: none leaves its own namespace.

    As the library is built. DW.ref.* are pointers to the exception handler, data that is the same for all.
    """
    seen = 0
    for path in compile_kernels(tmp_path, build._COMMON):
        isa = path.stem.rpartition("_")[2]
        if isa not in build.isas():
            continue
        listed = subprocess.run(["nm", "-C", "--defined-only", path], check=True, capture_output=True, text=True).stdout
        found = re.findall(r"^[0-9a-f]+ (\w) (.+)$", listed, re.MULTILINE)
        assert found
        seen += 1
        shared = [name for kind, name in found if kind in "WVu" and not name.startswith("DW.ref.")]
        assert [name for name in shared if f"kvzip::{isa}::" not in name] == []
    assert seen == 2 * len(build.isas())
