"""Finding golden files: their folder, their manifests, and models loaded once."""

import json
import os
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kvzip import ModelKVzip

ROOT = Path(os.environ.get("KVZIP_GOLDEN_DIR", Path(__file__).parents[3] / "shared" / "golden"))


def manifest(kind: str) -> dict:
    """The manifest of `kind`; the tests of the calling file are skipped where there is none."""
    path = ROOT / kind / "MANIFEST.json"
    if not path.is_file():
        pytest.skip(f"no golden files at {path} (set KVZIP_GOLDEN_DIR)", allow_module_level=True)
    return json.loads(path.read_text())


@cache
def tensors(kind: str, file: str) -> dict:
    """All tensors of one golden file."""
    return load_file(ROOT / kind / file)


@cache
def model(folder: str, sliding_window: int | None = None) -> ModelKVzip:
    """The checkpoint in `folder`, without tokenizer, perhaps with another window."""
    changed = {} if sliding_window is None else {"sliding_window": sliding_window}
    return ModelKVzip.from_model(AutoModelForCausalLM.from_pretrained(ROOT / folder, **changed), None)
