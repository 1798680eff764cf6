"""Show what the compiler made of the CUDA kernels: registers, spills, tensor-core and memory instructions.

Exits with 1 if a tensor-core kernel spills, touches local memory, or has no HMMA or no asynchronous copies of 16 bytes.
Without a disassembler only the compiler's report is judged, and the output says so.

    python tools/inspect_cuda.py --architectures 80 90
    python tools/inspect_cuda.py --library kvzip/attention/_cuda.so
"""

import argparse
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "90", "100", "120")
INSTRUCTIONS = {
    "HMMA": re.compile(r"\bHMMA\."),
    "LDGSTS.128": re.compile(r"\bLDGSTS\.[\w.]*128\b"),
    "LDG.128": re.compile(r"\bLDG\.[\w.]*128\b"),
    "LDSM": re.compile(r"\bLDSM\."),
    "local": re.compile(r"\b(LDL|STL)\b"),
}
_REPORT = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '\S+'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass
class Kernel:
    """One kernel for one architecture; `spills` in bytes, None = not known."""

    architecture: str
    name: str
    registers: int | None = None
    spills: int | None = None
    instructions: Counter[str] = field(default_factory=Counter)

    @property
    def uses_tensor_cores(self) -> bool:
        return re.search(r"(Math16|Codes16|ColumnMax16)[<I]", self.name) is not None  # mangled or not

    def faults(self, disassembled: bool) -> list[str]:
        """What is wrong with it, in words."""
        found = [f"{self.spills} bytes of spills and stack"] if self.spills else []
        if self.instructions["local"]:
            found.append(f"{self.instructions['local']} local-memory instructions")
        if disassembled and self.uses_tensor_cores:
            found += [f"no {name}" for name in ("HMMA", "LDGSTS.128") if not self.instructions[name]]
        return found


def find_tool(name: str) -> str | None:
    """Return the path of a tool of the CUDA toolkit; triton's wheel carries some of them, too."""
    places = [Path(path) for path in sorted(Path("/usr/local").glob("cuda*/bin"), reverse=True)]
    if home := os.environ.get("CUDA_HOME"):
        places.insert(0, Path(home) / "bin")
    if (spec := importlib.util.find_spec("triton")) and spec.origin:
        places.append(Path(spec.origin).parent / "backends/nvidia/bin")
    return shutil.which(name) or next((str(place / name) for place in places if (place / name).exists()), None)


def demangle(names: list[str]) -> dict[str, str]:
    if not names or not (tool := shutil.which("c++filt")):
        return {name: name for name in names}
    out = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: re.sub(r"^void |kvzip::|\(.*\)$", "", text) for name, text in zip(names, out, strict=True)}


def compile_kernels(nvcc: str, architecture: str, source: Path, cubin: Path) -> list[Kernel]:
    """Compile the kernels of a file for one architecture and read the assembler's report."""
    command = [nvcc, "-O3", "-std=c++17", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin", "-o", str(cubin)]
    command += [f"-I{ROOT}/csrc/include", f"-I{ROOT}/csrc/cuda", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"nvcc failed for sm_{architecture}:\n{done.stderr[-4000:]}")
    return [
        Kernel(architecture, m["name"], int(m["registers"]), int(m["stack"]) + int(m["stores"]) + int(m["loads"]))
        for m in _REPORT.finditer(done.stderr)
    ]


def disassemble(cuobjdump: str, binary: Path) -> list[Kernel]:
    """Count the instructions of every kernel in a cubin or a library."""
    text = subprocess.run([cuobjdump, "-sass", str(binary)], capture_output=True, text=True, check=True).stdout
    kernels: list[Kernel] = []
    architecture = ""
    for line in text.splitlines():
        if match := re.search(r"\b(?:arch = |EF_CUDA_SM|target: )sm_?(\d+)", line):
            architecture = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            kernels.append(Kernel(architecture, match[1]))
        elif kernels:
            for name, pattern in INSTRUCTIONS.items():
                kernels[-1].instructions[name] += bool(pattern.search(line))
    return kernels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, help="compile for these (default: all)")
    parser.add_argument("--library", type=Path, help="inspect this library's code; compile nothing")
    args = parser.parse_args()

    cuobjdump = find_tool("cuobjdump")
    if cuobjdump is None:
        print("no cuobjdump (CUDA toolkit, or triton's wheel): instructions are not counted")
    kernels: list[Kernel] = []
    if args.library:
        if cuobjdump is None:
            return 1
        kernels = disassemble(cuobjdump, args.library)
    else:
        if (nvcc := find_tool("nvcc")) is None:
            sys.exit("no nvcc found")
        with tempfile.TemporaryDirectory() as folder:
            sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
            for architecture, source in itertools.product(args.architectures, sources):
                cubin = Path(folder) / f"{source.stem}_{architecture}.cubin"
                compiled = compile_kernels(nvcc, architecture, source, cubin)
                counted = {k.name: k.instructions for k in disassemble(cuobjdump, cubin)} if cuobjdump else {}
                for kernel in compiled:
                    kernel.instructions = counted.get(kernel.name, Counter())
                kernels += compiled

    names = demangle([kernel.name for kernel in kernels])
    print(f"{'sm':>4} {'regs':>4} {'spills':>6} " + " ".join(f"{name:>10}" for name in INSTRUCTIONS) + "  kernel")
    faults = 0
    for kernel in sorted(kernels, key=lambda k: (int(k.architecture or 0), names[k.name])):
        kernel.name = names[kernel.name]
        counts = " ".join(f"{kernel.instructions[name]:>10}" for name in INSTRUCTIONS)
        known = [("-" if value is None else value) for value in (kernel.registers, kernel.spills)]
        wrong = kernel.faults(cuobjdump is not None)
        print(f"{kernel.architecture:>4} {known[0]:>4} {known[1]:>6} {counts}  {kernel.name}", *wrong, sep="  <- ")
        faults += bool(wrong)
    print(f"{len(kernels)} kernels, {faults} with faults")
    return 1 if faults or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
