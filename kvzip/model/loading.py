"""From a name to a model and tokenizer: the bundled model, aliases, local folders, hub ids."""

import difflib
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvzip.devices import check_device

BUNDLED = "bundled"

ALIASES = {
    "gemma3-4b": "google/gemma-3-4b-it",
    "gemma3-12b": "google/gemma-3-12b-it",
    "gemma3-27b": "google/gemma-3-27b-it",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.1-70b": "meta-llama/Llama-3.1-70B-Instruct",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "phi4-mini": "microsoft/Phi-4-mini-instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct-1M",
    "qwen2.5-14b": "Qwen/Qwen2.5-14B-Instruct-1M",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
}


def bundled_path() -> Path:
    """Folder of the bundled model."""
    return Path(str(files("kvzip.model") / "bundled"))


def resolve_name(name: str) -> str:
    """Return what transformers loads: a folder or a hub id.

    Raises:
        ValueError: neither "bundled", an alias, an existing folder nor the form of a hub id.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"a model is named by a text, got {name!r}; a loaded one goes to ModelKVzip.from_model")
    if name == BUNDLED:
        return str(bundled_path())
    if name in ALIASES:
        return ALIASES[name]
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{name!r} is a folder without a config.json, not a model")
        return str(path)
    # A hub id is owner/name; more slashes, or a leading dot, slash or tilde, can only be a path.
    if name.count("/") == 1 and name[0] not in "./~" and all(name.split("/")):
        return name
    if "/" in name:
        raise ValueError(f"no model folder at {name!r}")
    known = (BUNDLED, *ALIASES)
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"unknown model {name!r}: not a folder, a hub id (owner/name) or one of {known}{hint}")


def load(
    name: str, *, dtype: str | torch.dtype, device: str | torch.device | None, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer.

    Args:
        dtype: a torch dtype or "auto", the checkpoint's own.
        device: None = the first CUDA device where there is one, else the CPU; not with `device_map`.
        kwargs: for `from_pretrained`: `device_map`, `revision`, `quantization_config`, ...

    Raises:
        ValueError: unknown name, dtype or device, a device that is not there, or both device and device_map.
    """
    where, dtype = resolve_name(name), _dtype(dtype)
    device = None if device is None else check_device(device)
    for_tokenizer = {
        key: kwargs[key] for key in ("revision", "token", "trust_remote_code", "cache_dir") if key in kwargs
    }
    tokenizer = AutoTokenizer.from_pretrained(where, **for_tokenizer)
    if kwargs.get("device_map") is not None:
        if device is not None:
            raise ValueError(f"give device ({str(device)!r}) or device_map ({kwargs['device_map']!r}), not both")
        return AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **kwargs), tokenizer
    model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **kwargs)
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device), tokenizer  # type: ignore[arg-type]


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if found == "auto" or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise ValueError(f"unknown dtype {dtype!r}; expected 'auto', 'float32', 'bfloat16', 'float16' or a torch dtype")
