"""A transformers model with our attention on it, its tokenizer, and what can be read off them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kvzip.attention import resolve_backend
from kvzip.model.fingerprint import model_fingerprint, tokenizer_fingerprint
from kvzip.model.probe import check_architecture
from kvzip.model.prompting import Prompting, Query


class WrappedModel:
    """Holds model and tokenizer.

    Attributes:
        model, tokenizer: transformers' own; the tokenizer may be None.
        name: as the user gave it.
        kv_type, kv_bits: defaults of `prefill` and of `kv.prune(bits=)`.
        prompting: turns texts and messages into ids.
    """

    def _set_up(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str, kv_type: str, backend: str
    ) -> None:
        self.model, self.tokenizer, self.name, self.kv_type = model, tokenizer, name, kv_type
        self.kv_bits = 16
        devices = {one.device for one in model.parameters() if not one.is_meta}
        # Of the text model's layers, which have a number: a config may have a head_dim for each of them, or none.
        layers = (one for one in model.modules() if getattr(one, "layer_idx", None) is not None)
        named = {getattr(one, "head_dim", None) for one in layers}
        head_dims = sorted(head_dim for head_dim in named if isinstance(head_dim, int))
        self._backend = resolve_backend(backend, devices, head_dims=head_dims, dtype=model.dtype)
        self.prompting = Prompting(tokenizer)
        self._seams = check_architecture(model, self._backend)

    @property
    def config(self) -> PretrainedConfig:
        """The text model's config."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def device(self) -> torch.device:
        """Where ids go in."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.model.dtype

    @property
    def backend(self) -> str:
        """Name of the attention backend."""
        return self._backend.name

    @property
    def layer_devices(self) -> list[torch.device]:
        """The device of every layer, for `kv.to(...)`."""
        return self._seams.devices

    @property
    def modules(self) -> dict[int, nn.Module]:
        """Attention modules of the prunable layers, by layer index."""
        return self._seams.modules

    @property
    def head_shape(self) -> tuple[int, int]:
        """(num_layers, num_key_value_heads) of what can be pruned."""
        return self._seams.shape

    @cached_property
    def model_id(self) -> dict[str, str]:
        """Fingerprints that tie a kv to this model and tokenizer."""
        return {"weights": model_fingerprint(self.model), "tokenizer": tokenizer_fingerprint(self.tokenizer)}

    @property
    def max_positions(self) -> int | None:
        """Positions that the config allows, None = not said."""
        return getattr(self.config, "max_position_embeddings", None)

    def __repr__(self) -> str:
        return f"ModelKVzip({self.name!r}, {self.dtype}, backend={self.backend!r}, kv_type={self.kv_type!r})"

    # -- text and ids ------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, no special tokens added."""
        return self.prompting.encode(text)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of `ids`, special tokens left out.

        Raises:
            ValueError: there is no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: use return_ids=True")
        ids = ids if isinstance(ids, Tensor) else list(ids)
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def apply_template(self, query: Query) -> list[int]:
        """Ids to feed after the context for a question (text), messages, or ids, which are used as they are."""
        return self.prompting.query_ids(query)
