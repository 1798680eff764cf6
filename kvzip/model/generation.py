"""Generation over a kv: `model.decode` where it knows all that is asked for, else transformers' own `generate`."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from kvzip.kvcache import KVCache
from kvzip.model.checks import check_tokens
from kvzip.model.compressing import Compressor, Decoding
from kvzip.model.decode import decode, make_plan
from kvzip.model.passes import feed

if TYPE_CHECKING:
    from kvzip.model.model import ModelKVzip

DEFAULT_MAX_NEW_TOKENS = 512
_ONE_SEQUENCE = ("num_beams", "num_return_sequences")
# Transformers would feed the whole prompt behind the cache that has it already (5.23, any kind of cache).
_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
_OURS = ("past_key_values", "attention_mask", "position_ids", "inputs_embeds", "input_ids", "inputs")


def generate(
    model: ModelKVzip,
    queries: list[list[int]],
    kv: KVCache | None,
    *,
    keep: bool,
    close_turn: bool,
    compress: Decoding | None = None,
    **kwargs: Any,
) -> list[Tensor]:
    """Generate after each of `queries` (ids) over one `kv`, all at once.

    Args:
        keep: keep the turn in `kv`; with one query.
        close_turn: end a kept turn with the chat template's end of answer and start of the next user turn.
        compress: compress a copy of `kv` on the way, which `kv` becomes where the turn is kept; with one query.
        kwargs: for transformers' `generate`.

    Returns:
        The new ids of each query (n,) on the CPU, without the end-of-sequence token.

    Raises:
        ValueError: beams or several returned sequences, assisted decoding over a kv, what kvzip passes itself, no
            positions left, and what cannot be compressed. `kv` is unchanged.
    """
    history = model.prompting.prefix_ids() if kv is None else _history(kv)
    closing = model.prompting.between_ids if keep and close_turn else []
    # Positions beside the answer's own: those of a kept turn's end; without one, the last new token is never fed.
    longest = max(len(query) for query in queries)
    options = _options(model, kwargs, kv, len(history) + longest, closing=len(closing) if keep else -1)
    compressor = None if compress is None else _compressor(model, kv, compress, queries, keep=keep)
    # Padding is masked, whatever it is; as a token of the history it is no news to processors of logits.
    pad = history[0] if history else 0
    if kv is None:
        return _run(model, *_padded(history, queries, pad, model.device, before=True), None, options)
    start, hybrid = len(history), len(kv.context_layers) < len(kv.layers)
    answers: list[Tensor] = [torch.empty(0)] * len(queries)
    for rows in _batches(queries, equal=hybrid):
        batch = _padded(history, [queries[row] for row in rows], pad, model.device, before=False)
        used = kv if compressor is None else compressor.kv
        with kv.scratch(keep=keep) if compressor is None else nullcontext():
            for row, answer in zip(rows, _run(model, *batch, used, options, compressor), strict=True):
                answers[row] = answer
            if not keep:
                continue
            turn = [*queries[0], *answers[0].tolist(), *closing]
            rest = turn[used.get_seq_length() - start :]
            if rest:
                feed(model.model, used, rest)
            used.compact()
            used.input_ids = torch.cat([kv.input_ids, torch.tensor(turn, dtype=torch.int64)])
            kv.become(used)
    return answers


def _history(kv: KVCache) -> list[int]:
    """Ids, one a position: all, but where keys were moved together, without the context's first."""
    gone = kv.sealed_length - kv.context_end
    return torch.cat([kv.input_ids[: kv.prefix_length], kv.input_ids[kv.prefix_length + gone :]]).tolist()


def _compressor(
    model: ModelKVzip,
    kv: KVCache | None,
    how: Decoding,
    queries: list[list[int]],
    *,
    keep: bool,
) -> Compressor:
    """What compresses a copy of `kv`.

    Raises:
        ValueError: no kv, several queries, or a kept turn of a kv that only masks.
    """
    if not isinstance(how, Decoding):
        raise ValueError(f"compress must be a kvzip.Decoding, such as Decoding(tokens=2048), got {how!r}")
    if kv is None:
        raise ValueError("compress needs a kv to compress: prefill the context, or the first part of the query")
    if len(queries) > 1:
        raise ValueError(f"compress takes one query at a time, got {len(queries)}")
    if keep and kv.kv_type != "evict":
        raise ValueError(
            f"compress with update_cache=True evicts, which a kv of type {kv.kv_type!r} never does; use "
            "kv_type='evict', or update_cache=False"
        )
    return Compressor(model, kv.clone(), how)


def _batches(queries: list[list[int]], *, equal: bool) -> list[list[int]]:
    """Indices of the queries that go together: all of them, or with `equal`, each length by itself.

    Padding takes up places in sliding windows, so that models with such layers get none.
    """
    if not equal:
        return [list(range(len(queries)))]
    by_length: dict[int, list[int]] = {}
    for row, query in enumerate(queries):
        by_length.setdefault(len(query), []).append(row)
    return list(by_length.values())


def _padded(
    history: list[int], queries: list[list[int]], pad: int, device: torch.device, *, before: bool
) -> tuple[Tensor, Tensor | None]:
    """Rows of `history` and a query each, as ids and mask (batch, n).

    Shorter queries are padded on their left: behind the history, which the kv holds, or, without a kv, `before` it.
    """
    longest = max(len(query) for query in queries)
    rows, mask = [], []
    for query in queries:
        pads = longest - len(query)
        rows.append([pad] * pads + history + query if before else history + [pad] * pads + query)
        hidden, seen = [0] * pads, [1] * len(history)
        mask.append((hidden + seen if before else seen + hidden) + [1] * len(query))
    ids = torch.tensor(rows, device=device)
    padded = any(len(query) < longest for query in queries)
    return ids, torch.tensor(mask, device=device) if padded else None


def _run(
    model: ModelKVzip,
    ids: Tensor,
    mask: Tensor | None,
    kv: KVCache | None,
    options: dict[str, Any],
    compressor: Compressor | None = None,
) -> list[Tensor]:
    config = _effective_config(model, options)
    plan = None if kv is None or config is None else make_plan(config)
    ends = None
    if plan is not None:
        assert kv is not None
        new = decode(model.model, kv, ids, mask, plan) if compressor is None else compressor.decode(ids, plan)
    else:
        if compressor is not None:
            criteria = [*(options.get("stopping_criteria") or ()), compressor.between_steps()]
            options = {**options, "stopping_criteria": StoppingCriteriaList(criteria)}
        elif len(ids) > 1:
            options, ends = _watched_ends(options)
        attention_mask = torch.ones_like(ids) if mask is None else mask
        cache = {} if kv is None else {"past_key_values": kv}
        with nullcontext() if compressor is None else compressor.watching():
            output = model.model.generate(ids, attention_mask=attention_mask, **cache, **options)  # type: ignore[operator]
        new = (output if isinstance(output, Tensor) else output.sequences)[:, ids.shape[1] :]
    stops = [None] * len(new) if ends is None else ends.counts(ids.shape[1])
    eos = torch.tensor(sorted(_eos_ids(model, options)), dtype=torch.int64)
    return [_until(row[:stop], eos) for row, stop in zip(new.cpu(), stops, strict=True)]


class _Ends(StoppingCriteria):
    """Ends rows by what the user asks for and remembers where: transformers goes on with them, or fills them up."""

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        self.criteria = criteria
        self.lengths: list[int | None] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Whether each row (batch,) is to end."""
        ended: Tensor = self.criteria(input_ids, scores, **kwargs)
        now = input_ids.shape[1]
        before = self.lengths or [None] * len(ended)
        self.lengths = [now if known is None and end else known for known, end in zip(before, ended, strict=True)]
        return ended

    def counts(self, start: int) -> list[int | None]:
        """Tokens behind the first `start` after which each row ended, None = it did not."""
        return [None if length is None else length - start for length in self.lengths]


def _watched_ends(options: dict[str, Any]) -> tuple[dict[str, Any], _Ends | None]:
    """`options` with stop strings and the user's criteria in one that knows where rows end; None: there are none."""
    options, criteria = dict(options), list(options.pop("stopping_criteria", None) or ())
    config = options.get("generation_config")
    strings = options.pop("stop_strings", None if config is None else config.stop_strings)
    if strings is not None:  # the tokenizer stays: transformers looks for the model's own stop strings itself
        criteria.append(StopStringCriteria(options["tokenizer"], strings))
    if config is not None and config.stop_strings is not None:
        options["generation_config"] = copy.deepcopy(config)
        options["generation_config"].stop_strings = None
    if not criteria:
        return options, None
    ends = _Ends(StoppingCriteriaList(criteria))
    return {**options, "stopping_criteria": StoppingCriteriaList([ends])}, ends


def _until(row: Tensor, eos: Tensor) -> Tensor:
    """The row before its first end-of-sequence token."""
    ends = torch.isin(row, eos).nonzero()
    return row[: int(ends[0])] if len(ends) else row


def _effective_config(model: ModelKVzip, options: dict[str, Any]) -> GenerationConfig | None:
    """The generation config that `options` amount to; None where they hold more than one's fields."""
    config = copy.deepcopy(options.get("generation_config") or model.model.generation_config)
    config.update(**model.model.generation_config.to_dict(), defaults_only=True)
    unused = config.update(**{name: value for name, value in options.items() if name != "generation_config"})
    return None if unused else config


def _options(
    model: ModelKVzip, kwargs: dict[str, Any], kv: KVCache | None, length: int, *, closing: int
) -> dict[str, Any]:
    options = dict(kwargs)
    config = options.get("generation_config") or model.model.generation_config
    for name in _ONE_SEQUENCE:
        count = options.get(name, getattr(config, name, None)) or 1
        if count != 1:
            raise ValueError(f"{name}={count} is not supported: a kvzip cache holds one sequence; expected 1")
    for name in _OURS:
        if name in options:
            raise ValueError(f"{name} is not an option of generate: kvzip passes its own")
    assisted = [name for name in _ASSISTED if options.get(name, getattr(config, name, None)) not in (None, False)]
    if kv is not None and assisted:
        raise ValueError(f"{assisted[0]} is not supported over a kv: transformers would feed it the context again")
    room = _room(model, length, closing)
    if "generation_config" not in options:
        if options.get("max_length") is None:
            default = DEFAULT_MAX_NEW_TOKENS if room is None else min(DEFAULT_MAX_NEW_TOKENS, room)
            options.setdefault("max_new_tokens", default)
        if not options.setdefault("do_sample", False):
            # A checkpoint's sampling defaults mean nothing to greedy decoding; unset, transformers does not warn.
            for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
                options.setdefault(name, None)
    wanted = options.get("max_new_tokens", getattr(config, "max_new_tokens", None))
    most = options.get("max_length", getattr(config, "max_length", None))
    limits = {"max_new_tokens": wanted, "max_length": most}
    check_tokens(**{name: limit for name, limit in limits.items() if limit is not None})
    _check_room(model, wanted if wanted is not None or most is None else most - length, room)
    settled: dict[str, Any] = {} if kv is None else {"use_cache": True}  # some checkpoints say False
    named = (options.get("stop_strings"), config.stop_strings, model.model.generation_config.stop_strings)
    strings = next((one for one in named if one is not None), None)
    if strings is not None:
        settled["stop_strings"] = strings
        if options.setdefault("tokenizer", model.tokenizer) is None:
            raise ValueError(f"stop_strings={strings!r} needs a tokenizer, and this model has none: pass tokenizer=")
    if options.get("pad_token_id", config.pad_token_id) is None:
        settled["pad_token_id"] = next(iter(_eos_ids(model, options)), 0)
    if "generation_config" in options:  # transformers takes either that or single settings
        options["generation_config"] = copy.deepcopy(config)
        options["generation_config"].update(**settled)
        return {name: value for name, value in options.items() if name not in settled}
    return options | settled


def _room(model: ModelKVzip, length: int, closing: int) -> int | None:
    """New tokens that fit after `length` tokens and before `closing` more; None = no limit."""
    if model.max_positions is None:
        return None
    room = model.max_positions - length - closing
    if room < 1:
        raise ValueError(
            f"prompt and turn have {length + max(0, closing)} tokens, which leaves no room for an answer in the "
            f"{model.max_positions} positions of {model.name}"
        )
    return room


def _check_room(model: ModelKVzip, wanted: int | None, room: int | None) -> None:
    """Refuse more new tokens than a table of learned positions has rows; rotary positions go on, with a warning."""
    if wanted is None or room is None or wanted <= room:
        return
    message = f"max_new_tokens={wanted} exceeds the {room} positions that {model.name} has left"
    if getattr(model.config, "rope_parameters", None) is None:
        raise ValueError(message)
    warnings.warn(f"{message}; answers may be poor beyond them", stacklevel=5)


def _eos_ids(model: ModelKVzip, options: dict[str, Any]) -> set[int]:
    own = model.model.generation_config
    config = options.get("generation_config") or own
    eos = options.get("eos_token_id", own.eos_token_id if config.eos_token_id is None else config.eos_token_id)
    return set() if eos is None else set(torch.as_tensor(eos).flatten().tolist())
