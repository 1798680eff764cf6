"""One safetensors file holds a whole kv. Nothing in it is executed; a cut, altered or foreign one is refused.

Tensors carry the data; one metadata entry, JSON, carries the rest with a SHA-256 over both, so a file is either what
was saved or an error. The same kv gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvzip.kvcache.cache import KV_TYPES, KVCache
from kvzip.kvcache.offload import check_offload
from kvzip.kvcache.selection import get_level

FORMAT = "kvzip-kv/1"
_KEY = "kvzip"


def save(kv: KVCache, path: str | os.PathLike[str]) -> None:
    """Write `kv` to `path`; an existing file is replaced only when the new one is complete.

    Raises:
        ValueError: the kv holds no context.
        OSError: the folder does not exist, or the disk is full.
    """
    tensors, layers = {"input_ids": kv.input_ids}, []
    for index, layer in enumerate(kv.layers):
        stored, facts = layer.pack()
        tensors |= {f"layers.{index}.{name}": tensor for name, tensor in stored.items()}
        layers.append({"kind": layer.kind, **facts})
    for name in kv.scorers:
        scores = kv.scored[name]
        tensors[f"scores.{name}"] = scores.base
        if scores.slope is not None:
            tensors[f"slopes.{name}"] = scores.slope
    if kv.head_scores is not None:
        tensors["head_scores"] = kv.head_scores
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {
        "format": FORMAT,
        "model_id": kv.model_id,
        "kv_type": kv.kv_type,
        "level": str(kv.level),  # a level with settings is written as users write it
        "scorers": list(kv.scorers),
        "windows": {name: scores.window for name, scores in kv.scored.items() if scores.window},
        "pruned_with": kv.pruned_with,
        "offload": kv.offloaded,
        "layers": layers,
    }
    header["sha256"] = _digest(header, tensors)
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    os.close(handle)
    try:
        save_file(tensors, partial, metadata={_KEY: json.dumps(header, sort_keys=True)})
        os.chmod(partial, 0o666 & ~_umask())  # mkstemp's files are private, a saved one is like any other
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


def load(kv: KVCache, path: str | os.PathLike[str], offload: str | None = None) -> KVCache:
    """Fill the empty cache `kv` of a model (its layers, backend and `model_id`) from `path`.

    Args:
        offload: as for `KVCache.offload`; None = as it was saved.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a kv file, cut or altered, or of another model or tokenizer.
    """
    header, tensors = _read(path)
    try:
        _fill(kv, {**header, "offload": check_offload(offload) or header.get("offload")}, tensors)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from error
    return kv


def _fill(kv: KVCache, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    for what, expected in kv.model_id.items():
        found = header["model_id"].get(what)
        if found != expected:
            raise ValueError(f"it was saved with another {what}: {found!r} in the file, {expected!r} here")
    if len(header["layers"]) != len(kv.layers):
        raise ValueError(f"it has {len(header['layers'])} layers, this model has {len(kv.layers)}")
    kv.kv_type, kv.level, kv.pruned_with = header["kv_type"], header["level"], header["pruned_with"]
    if kv.kv_type not in KV_TYPES:
        raise ValueError(f"unknown kv_type {kv.kv_type!r}; expected one of {KV_TYPES}")
    get_level(kv.level)
    for index, (layer, facts) in enumerate(zip(kv.layers, header["layers"], strict=True)):
        prefix = f"layers.{index}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if facts["kind"] != layer.kind:
            raise ValueError(f"layer {index} is a {facts['kind']} layer, in this model a {layer.kind} layer")
        layer.unpack(own, facts)
    kv.offload(header.get("offload"))
    kv.input_ids = tensors["input_ids"]
    kv.head_scores = tensors.get("head_scores")
    for name in header["scorers"]:
        window = header.get("windows", {}).get(name, 0)
        kv.set_scores(name, tensors[f"scores.{name}"], tensors.get(f"slopes.{name}"), window)


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no kv file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if set(metadata) != {_KEY}:
                raise ValueError(f"{path} is a safetensors file, but not one that kv.save wrote")
            header = json.loads(metadata[_KEY])
            mapped = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is not a complete kv file: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else header
        raise ValueError(f"{path} has format {found!r}; expected {FORMAT!r}")
    if header.pop("sha256", None) != _digest(header, mapped):
        raise ValueError(f"{path} was altered or damaged: its checksum does not match")
    # Copies: what safetensors returns is a view of the file, which may change or vanish later.
    return header, {name: tensor.clone() for name, tensor in mapped.items()}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
