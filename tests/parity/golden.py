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


@cache
def manifest(kind: str) -> dict:
    """The manifest of `kind`; the tests of the calling file are skipped where there is none."""
    path = ROOT / kind / "MANIFEST.json"
    if not path.is_file() and "KVZIP_GOLDEN_DIR" in os.environ:
        raise FileNotFoundError(f"KVZIP_GOLDEN_DIR is {ROOT}, where there is no {kind}/MANIFEST.json")
    if not path.is_file():
        pytest.skip(f"no golden files at {path} (set KVZIP_GOLDEN_DIR)", allow_module_level=True)
    return json.loads(path.read_text())


@cache
def tensors(kind: str, file: str) -> dict:
    """All tensors of one golden file."""
    return load_file(ROOT / kind / file)


def variants(*presses: str) -> list[tuple[str, str]]:
    """(file, variant) of everything that kvpress's `presses` recorded."""
    return [
        (file, variant)
        for file, facts in sorted(manifest("kvpress")["files"].items())
        if facts.get("press") in presses
        for variant in facts["variants"]
    ]


def without(*presses: str) -> dict[str, set[str]]:
    """Of kvpress's `presses`, the folders (a model and a length) in which another one was recorded, but not they."""
    files = {file: facts["press"] for file, facts in manifest("kvpress")["files"].items() if "press" in facts}
    folders = {file.rsplit("/", 1)[0] for file in files}
    found = {press: {file.rsplit("/", 1)[0] for file, one in files.items() if one == press} for press in presses}
    return {press: folders - there for press, there in found.items() if there != folders}


def recorded(file: str, variant: str) -> tuple[dict, dict]:
    """Settings and tensors of one variant of a file of kvpress."""
    start = f"{variant}."
    found = {name.removeprefix(start): one for name, one in tensors("kvpress", file).items() if name.startswith(start)}
    return manifest("kvpress")["files"][file]["variants"][variant]["hyperparameters"], found


@cache
def model(folder: str, sliding_window: int | None = None) -> ModelKVzip:
    """The checkpoint in `folder`, without tokenizer, perhaps with another window."""
    changed = {} if sliding_window is None else {"sliding_window": sliding_window}
    return ModelKVzip.from_model(AutoModelForCausalLM.from_pretrained(ROOT / folder, **changed), None)
