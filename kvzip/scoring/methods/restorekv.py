"""RestoreKV: learned tokens that read the whole context before it is pruned, on top of KVzip (arXiv 2608.01247)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kvzip.scoring.base import ScoringContext
from kvzip.scoring.files import FileScorer
from kvzip.scoring.methods.kvzip import KVzip
from kvzip.scoring.methods.kvzip_plus import KVzipPlus
from kvzip.scoring.reconstruction import Weighting
from kvzip.scoring.registry import register

EMBEDDINGS = "restore_embeddings"
# Settings of PEFT under which an adapter is not x A' B' times one number.
_OTHER = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save",
    "layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens",
)  # fmt: skip


@register
@dataclass(frozen=True)
class RestoreKV(KVzip, FileScorer):
    """Score = KVzip's, above which are learned tokens that are run after the context and become its last tokens.

    They are run once, over the whole context, through the model with low-rank adapters (LoRA) on its linear layers;
    what they find there stands for what goes. A budget counts them as context, and drops them last. Questions come
    after them. They have no text: `kv.input_ids` repeats the context's last id in their place, which is what a pass
    over the context's ids sees (`kv.fidelity`, `kv.prune_channels`). They need a whole context, not one in blocks.

    The file has `restore_embeddings` (tokens, hidden_size) and, for each adapted layer by its name in the transformers
    model, `<name>.lora_A` (rank, in_features) and `<name>.lora_B` (out_features, rank), the scale in it.

    Args:
        kvzip_plus_normalization: score as `KVzipPlus`, which weights of a release with `_plus` were trained with.
        chunk_size, n_sink, prompts, inputs: see `KVzip`.
    """

    name = "restorekv"
    paper = "arXiv 2608.01247"
    needs = "a file of learned tokens and adapters trained for the model"
    cost = "that of kvzip, and a pass of a few tokens"
    by_layer = False

    kvzip_plus_normalization: bool = False

    def __post_init__(self) -> None:
        KVzip.__post_init__(self)
        FileScorer.__post_init__(self)

    def score(self, context: ScoringContext) -> Tensor:
        """Score as KVzip, where the file belongs to the model."""
        self.check(context)
        return super().score(context)

    def weighting(self) -> Weighting | None:
        """KVzip's or KVzip+'s."""
        return KVzipPlus().weighting() if self.kvzip_plus_normalization else None

    @property
    def embeddings(self) -> Tensor:
        """(tokens, hidden_size), what enters the first layer."""
        return self.file.tensors[EMBEDDINGS]

    @property
    def adapters(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By the layer's name: (rank, in_features) and (out_features, rank)."""
        tensors = self.file.tensors
        names = [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]
        return {name: (tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]) for name in names}

    def check_file(self, sizes: Mapping[str, int]) -> None:
        """Raise ValueError where there are no embeddings, or a tensor is no half of an adapter."""
        names = set(self.file.tensors)
        embeddings = self.file.tensors.get(EMBEDDINGS)
        if embeddings is None or embeddings.ndim != 2 or not len(embeddings):
            found = sorted(names) if embeddings is None else tuple(embeddings.shape)
            raise ValueError(f"{self.file.where} has {found}; expected {EMBEDDINGS!r} of shape (tokens, hidden_size)")
        halves = names - {EMBEDDINGS}
        wanted = {
            f"{name.removesuffix('.lora_A').removesuffix('.lora_B')}.lora_{half}" for name in halves for half in "AB"
        }
        if halves != wanted:
            raise ValueError(
                f"{self.file.where} has {sorted(halves - wanted)} and lacks {sorted(wanted - halves)}; expected pairs "
                "such as 'model.layers.0.self_attn.q_proj.lora_A' and '.lora_B'"
            )
        for name, (down, up) in self.adapters.items():
            if down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1]:
                raise ValueError(
                    f"{self.file.where}: the adapter of {name!r} has shapes {tuple(down.shape)} and {tuple(up.shape)}; "
                    "expected (rank, in_features) and (out_features, rank)"
                )

    @classmethod
    def released(cls, tensors: Mapping[str, Tensor], source: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """PEFT's adapter, its scale from `adapter_config.json`, and the embeddings, in files beside it."""
        beside = source.with_name(f"{EMBEDDINGS}.safetensors")
        if not beside.is_file():
            raise FileNotFoundError(f"no {beside.name} beside {source}")
        try:
            embeddings = {name: tensor.float() for name, tensor in load_file(beside).items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{beside} is not a whole safetensors file: {error}") from error
        scale = _scale(source.with_name("adapter_config.json"))
        found = {name.removeprefix("base_model.model.").removesuffix(".weight"): one for name, one in tensors.items()}
        return {
            **{name: one * scale if name.endswith(".lora_B") else one for name, one in found.items()},
            **embeddings,
        }, {}


def _scale(path: Path) -> float:
    """What PEFT multiplies a LoRA's output with.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not the settings of a plain LoRA.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}: it says how the adapter is scaled")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = config["r"], config["lora_alpha"]
        scale = float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is not the config of a LoRA: {error!r}") from error
    other = {name: config[name] for name in _OTHER if config.get(name)}
    if other or config.get("peft_type") != "LORA":
        raise ValueError(f"{path} has peft_type={config.get('peft_type')!r}, {other}; expected a plain LoRA")
    return scale
