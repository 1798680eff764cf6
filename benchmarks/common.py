"""What the benchmarks share: a random model of known size, memory of this process, machine facts."""

import argparse
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import kvzip

RESULTS = Path(__file__).resolve().parent / "results"
# glibc gives freed blocks of this size and more straight back, so that resident memory means what is in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def llama_50m(seed: int = 0) -> LlamaForCausalLM:
    """A random float32 Llama of 54 M parameters: 12 layers, 8 query and 4 KV heads of 64."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=16_384,
        hidden_size=512,
        intermediate_size=1_536,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=65_536,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def random_ids(n: int, vocab_size: int, seed: int = 0) -> list[int]:
    """`n` ids."""
    return torch.randint(3, vocab_size, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def reset_peak() -> None:
    """Forget this process's peak of resident memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(what: str = "VmRSS") -> int:
    """Bytes of resident memory now ("VmRSS") or at the peak since `reset_peak` ("VmHWM")."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {what} in /proc/self/status: this benchmark needs Linux")


def in_fresh_process(script: str, *arguments: str) -> Any:
    """Run `script` with `arguments` in its own process; return the JSON of its last line."""
    import os

    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, env={**os.environ, **MALLOC}, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine() -> str:
    """One line about where figures come from."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    gpu = f"{torch.cuda.get_device_name(0)}, " if torch.cuda.is_available() else ""
    cpu = f"{cpu} ({torch.backends.cpu.get_cpu_capability()})"
    return (
        f"{gpu}{cpu}, {torch.get_num_threads()} threads; Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, kvzip {kvzip.__version__}"
    )


def positive(text: str) -> int:
    """A number of at least 1, of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def ratio(text: str) -> float:
    """A fraction kept, of the command line."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a fraction above 0 and up to 1, got {text!r}")
    return value


def device(text: str) -> str:
    """ "cpu" or "cuda", of the command line."""
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text!r}")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch sees no CUDA device")
    return text


def write(name: str, lines: list[str]) -> None:
    """Print a result and write it to results/NAME.md with this process's command and the machine."""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    text = "\n".join([f"Command: `{command}`", "", machine(), "", *lines, ""])
    print(text)
    (RESULTS / f"{name}.md").write_text(text)
