"""Short fingerprints of weights and tokenizer, so that a kv is only used with what made it."""

import hashlib
import json

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SAMPLES = 32  # values of every parameter that enter the hash: enough to tell fine-tunes apart, quick for 70B


def model_fingerprint(model: PreTrainedModel) -> str:
    """Hash names, shapes, dtype and a spread of values of all parameters, and the position settings of the config."""
    digest = hashlib.sha256()
    config = model.config.get_text_config(decoder=True)
    settings = {key: getattr(config, key, None) for key in ("rope_parameters", "rope_theta", "sliding_window")}
    digest.update(json.dumps([type(model).__name__, str(model.dtype), settings], sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(_sample(parameter))
    return digest.hexdigest()[:16]


def _sample(parameter: nn.Parameter) -> bytes:
    if parameter.is_meta or parameter.numel() == 0:
        return b""
    flat = parameter.detach().flatten()
    index = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64).long()
    return flat[index.to(flat.device)].cpu().to(torch.float64).numpy().tobytes()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Hash the vocabulary and the chat template."""
    if tokenizer is None:
        return "none"
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{vocabulary}{tokenizer.chat_template}".encode()).hexdigest()[:16]
