"""Short fingerprints of weights and tokenizer, so that a kv is only used with what made it."""

import hashlib
import json

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Settings that do not change what the model computes.
_BESIDE = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache", "attn_implementation"}
_SAMPLES = 32  # values of every parameter that enter the hash: enough to tell fine-tunes apart, quick for 70B


def model_fingerprint(model: PreTrainedModel) -> str:
    """Hash names, shapes, dtype and a spread of values of all parameters and saved buffers, and the config."""
    digest = hashlib.sha256()
    settings = model.config.get_text_config(decoder=True).to_dict()
    settings = {key: value for key, value in settings.items() if key not in _BESIDE and not key.endswith("_token_id")}
    digest.update(json.dumps([type(model).__name__, str(model.dtype), settings], sort_keys=True, default=str).encode())
    saved = model.state_dict(keep_vars=True)  # buffers that are saved, as a quantised model's weights, count too
    parts = dict(model.named_parameters()) | {name: one for name, one in model.named_buffers() if name in saved}
    for name, part in sorted(parts.items()):
        digest.update(f"{name} {tuple(part.shape)}".encode())
        digest.update(_sample(_at_hand(model, name, part)))
    return digest.hexdigest()[:16]


def _at_hand(model: PreTrainedModel, name: str, part: Tensor) -> Tensor:
    """`part`, or what accelerate keeps of it in host memory or on disk."""
    module, _, own = name.rpartition(".")
    hook = getattr(model.get_submodule(module), "_hf_hook", None)
    kept = getattr(hook, "weights_map", None) if part.is_meta else None
    return part if kept is None else kept[own]


def _sample(part: Tensor) -> bytes:
    if part.is_meta or part.numel() == 0:
        return b""
    flat = part.detach().flatten()
    index = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64).long()
    return flat[index.to(flat.device)].cpu().to(torch.float64).numpy().tobytes()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Hash the vocabulary and the chat template."""
    if tokenizer is None:
        return "none"
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{vocabulary}{tokenizer.chat_template}".encode()).hexdigest()[:16]
