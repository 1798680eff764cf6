"""Generation over a kv by transformers' own `generate`; ours is only what comes before and after."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvzip.kvcache import KVCache
from kvzip.model.passes import feed

if TYPE_CHECKING:
    from kvzip.model.model import ModelKVzip

DEFAULT_MAX_NEW_TOKENS = 512
_ONE_SEQUENCE = ("num_beams", "num_return_sequences")


def generate(
    model: ModelKVzip, query_ids: list[int], kv: KVCache | None, *, keep: bool, close_turn: bool, **kwargs: Any
) -> Tensor:
    """Generate after `query_ids` (and `kv`); return the new ids (n,) on the CPU, without the end-of-sequence token.

    Args:
        keep: keep the turn in `kv`.
        close_turn: end a kept turn with the chat template's end of answer and start of the next user turn.
        kwargs: for transformers' `generate`.

    Raises:
        ValueError: beams or several returned sequences.
    """
    options = _options(model, kwargs)
    if kv is None:
        return _run(model, model.prompting.prefix_ids() + query_ids, options)
    start = kv.get_seq_length()
    with kv.scratch(keep=keep):
        history = kv.input_ids.tolist()
        _warn_of_positions(model, start + len(query_ids), options)
        answer = _run(model, history + query_ids, {**options, "past_key_values": kv})
        if keep:
            turn = [*query_ids, *answer.tolist(), *(model.prompting.between_ids if close_turn else [])]
            rest = turn[kv.get_seq_length() - start :]
            if rest:
                feed(model.model, kv, rest)
            kv.input_ids = torch.tensor(history + turn, dtype=torch.int64)
    return answer


def _run(model: ModelKVzip, ids: list[int], options: dict[str, Any]) -> Tensor:
    inputs = torch.tensor([ids], device=model.device)
    output = model.model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)  # type: ignore[operator]
    sequence = (output if isinstance(output, Tensor) else output.sequences)[0, len(ids) :].cpu()
    return sequence[:-1] if len(sequence) and int(sequence[-1]) in _eos_ids(model, options) else sequence


def _options(model: ModelKVzip, kwargs: dict[str, Any]) -> dict[str, Any]:
    options = dict(kwargs)
    config = options.get("generation_config") or model.model.generation_config
    for name in _ONE_SEQUENCE:
        count = options.get(name, getattr(config, name, None)) or 1
        if count != 1:
            raise ValueError(f"{name}={count} is not supported: a kvzip cache holds one sequence; expected 1")
    if "generation_config" not in options:
        if options.get("max_length") is None:
            options.setdefault("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
        if not options.setdefault("do_sample", False):
            # A checkpoint's sampling defaults mean nothing to greedy decoding; unset, transformers does not warn.
            for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
                options.setdefault(name, None)
    if options.get("stop_strings") is not None:
        options.setdefault("tokenizer", model.tokenizer)
    if options.get("pad_token_id", config.pad_token_id) is None:
        options["pad_token_id"] = next(iter(_eos_ids(model, options)), 0)
    return options


def _eos_ids(model: ModelKVzip, options: dict[str, Any]) -> set[int]:
    config = options.get("generation_config") or model.model.generation_config
    eos = options.get("eos_token_id", config.eos_token_id)
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


def _warn_of_positions(model: ModelKVzip, length: int, options: dict[str, Any]) -> None:
    wanted = options.get("max_new_tokens")
    if model.max_positions is not None and wanted is not None and length + wanted > model.max_positions:
        room = model.max_positions - length
        if "generation_config" in options or room < 1:
            warnings.warn(f"{model.name} has {model.max_positions} positions, {room} of them left", stacklevel=5)
