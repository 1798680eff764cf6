"""The fast path of generation: greedy and sampled decoding over a kv, with nothing else between two tokens.

It gives the tokens of transformers' `generate`, which does everything that is not known here. On a GPU the step is
captured as a CUDA graph where the cache allows it: then it reads its token and its positions from buffers that stay,
and lengths live on the device.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvzip.kvcache import ContextLayer, KVCache

logger = logging.getLogger(__name__)
_PLAIN = {"bos_token_id", "eos_token_id", "pad_token_id", "max_new_tokens", "max_length", "do_sample"}
_PLAIN |= {"transformers_version", "use_cache", "cache_implementation"}
_SAMPLING = {"temperature", "top_k", "top_p"}
DEFAULT_TOP_K = 50  # transformers' own where sampling is asked for and top_k is not said
_WORTH_A_GRAPH = 16  # steps
_WARM_UP = 2  # steps before the capture
_ROOM = 1024  # tokens that a sequence has room for at first
_CHECK_EVERY = 8  # captured steps between two looks at what they gave, each of which waits for the GPU
# What torch says of an operation that waits; that the mode which says so is a prototype, it says once in other words.
_WAITED = "called a synchronizing"


@dataclass(frozen=True)
class Plan:
    """What to do with logits, and when to stop.

    Attributes:
        max_new_tokens: at most so many a row.
        eos_ids: tokens that end a row.
        pad_id: follows a row's end.
        do_sample: draw from the distribution; otherwise take the likeliest.
        processors: transformers' own, in its order.
    """

    max_new_tokens: int
    eos_ids: tuple[int, ...]
    pad_id: int
    do_sample: bool
    processors: LogitsProcessorList

    def choose(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Next tokens (batch,) after `ids` (batch, n), from logits (batch, vocab_size)."""
        logits = self.processors(ids, logits.float())  # type: ignore[arg-type]
        if self.do_sample:
            return torch.multinomial(torch.softmax(logits, dim=-1), num_samples=1).squeeze(1)
        return logits.argmax(-1)


def make_plan(config: GenerationConfig) -> Plan | None:
    """Read a generation config; None where it asks for something that only transformers does."""
    asked = {name for name, value in config.to_diff_dict().items() if value not in (None, False) and name[0] != "_"}
    known = _PLAIN | _SAMPLING | {"repetition_penalty"}
    if not asked <= known or config.max_new_tokens is None or config.cache_implementation is not None:
        return None
    eos = config.eos_token_id
    processors = LogitsProcessorList()
    if config.repetition_penalty not in (None, 1.0):
        processors.append(RepetitionPenaltyLogitsProcessor(penalty=config.repetition_penalty))
    if config.do_sample:
        if config.temperature not in (None, 1.0):
            processors.append(TemperatureLogitsWarper(config.temperature))
        top_k = DEFAULT_TOP_K if config.top_k is None else config.top_k
        if top_k:
            processors.append(TopKLogitsWarper(top_k=top_k))
        if config.top_p is not None and config.top_p < 1.0:
            processors.append(TopPLogitsWarper(top_p=config.top_p))
    return Plan(
        max_new_tokens=config.max_new_tokens,
        eos_ids=() if eos is None else tuple(torch.as_tensor(eos).flatten().tolist()),
        pad_id=config.pad_token_id or 0,
        do_sample=bool(config.do_sample),
        processors=processors,
    )


def decode(
    model: PreTrainedModel, kv: KVCache, ids: Tensor, mask: Tensor | None, plan: Plan, *, graph: bool | None = None
) -> Tensor:
    """Feed what `kv` does not have of `ids` and decode; the last token is not fed.

    Args:
        ids: (batch, n), beginning with the tokens that `kv` holds.
        mask: (batch, n), 0 at padding; None = there is none.
        graph: use buffers that stay, captured on a GPU; None = where that is possible and worth it.

    Returns:
        (batch, new tokens), filled up with the padding token behind a row's end.
    """
    batch, start = ids.shape
    device = ids.device
    past = kv.get_seq_length()
    # Padding would be penalised as a repetition; a token that the row has anyway is not.
    sequence = _roomier(ids if mask is None else torch.where(mask.bool(), ids, ids[:, :1]), plan)
    positions = None if mask is None else (mask.long().cumsum(1) - 1).clamp_min(0)
    logits = model(
        input_ids=ids[:, past:],
        attention_mask=mask,
        position_ids=None if positions is None else positions[:, past:],
        past_key_values=kv,
        use_cache=True,
        **_last_only(model),
    ).logits[:, -1]
    at = torch.full((batch, 1), start - 1, device=device) if positions is None else positions[:, -1:].clone()
    if graph is None:
        graph = device.type == "cuda" and plan.max_new_tokens >= _WORTH_A_GRAPH and _is_static(model, kv, device)
    if graph and kv.context_layers[0].sliding_window is not None:
        window = kv.context_layers[0].sliding_window
        raise ValueError(f"captured steps cannot watch that the sliding window of {window} tokens is not crossed")
    eos = torch.tensor(plan.eos_ids, dtype=torch.int64, device=device)
    running = torch.ones(batch, dtype=torch.bool, device=device)
    step = _Step(model, kv, batch, at, plan.max_new_tokens if graph else None)
    with step.prepared():
        for length in range(start, start + plan.max_new_tokens):
            if length == sequence.shape[1]:
                sequence = _roomier(sequence, plan)
            chosen = plan.choose(sequence[:, :length], logits)
            sequence[:, length] = torch.where(running, chosen, plan.pad_id)
            running &= torch.isin(chosen, eos, invert=True)
            last = length + 1 == start + plan.max_new_tokens
            if last or (step.may_look(length - start) and not bool(running.any())):
                break
            logits = step(sequence[:, length])
    return _cut(kv, sequence, start, length + 1, eos)


def _roomier(ids: Tensor, plan: Plan) -> Tensor:
    """`ids` (batch, n) with room for as many again, filled with padding: many may be asked for, and few come."""
    more = min(plan.max_new_tokens, max(_ROOM, ids.shape[1]))
    return torch.cat([ids, ids.new_full((len(ids), more), plan.pad_id)], dim=1)


def _cut(kv: KVCache, sequence: Tensor, start: int, stop: int, eos: Tensor) -> Tensor:
    """The new tokens up to the last row's end, and the kv without what was fed beyond it."""
    ended = torch.isin(sequence[:, start:stop], eos).int()
    lengths = torch.where(ended.any(1), ended.argmax(1) + 1, stop - start)
    new = int(lengths.max())
    surplus = stop - start - new
    if surplus:
        for layer in kv.context_layers:
            layer.crop(-surplus)
    return sequence[:, start : start + new]


class _Step:
    """One decoding step; with `capacity`, in buffers that stay and, on a GPU, as a graph."""

    def __init__(self, model: PreTrainedModel, kv: KVCache, batch: int, at: Tensor, capacity: int | None) -> None:
        self.model, self.kv, self.capacity = model, kv, capacity
        # Copies of an offloaded store are begun and waited for by the host, layer by layer: no graph has that.
        self.captured = capacity is not None and at.is_cuda and kv.offloaded is None
        self.positions = at
        self.tokens = torch.zeros((batch, 1), dtype=torch.int64, device=at.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None
        self.steps = 0

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Hold the tails in place inside the block, where `capacity` asks for it."""
        if self.capacity is None:
            yield
            return
        cursor = torch.tensor([self.kv.tail_length], dtype=torch.int64, device=self.positions.device)
        self.write_at, self.length = cursor, cursor.clone()
        try:
            for layer in self.kv.context_layers:
                layer.tail.fix(self.capacity, self.write_at, self.length)
            yield
        finally:
            for layer in self.kv.context_layers:
                layer.tail.unfix(self.steps)

    def may_look(self, count: int) -> bool:
        """Whether to look for ended rows after `count` tokens: always, but for captured steps."""
        return self.graph is None or count % _CHECK_EVERY == 0

    def __call__(self, tokens: Tensor) -> Tensor:
        """Feed tokens (batch,); return logits (batch, vocab_size), overwritten by the next step where captured."""
        self.tokens.copy_(tokens[:, None])
        self.steps += 1
        if not self.captured or self.steps < _WARM_UP:
            return self._forward()
        if self.steps == _WARM_UP:
            return self._watched_forward()
        if self.graph is None and not self._capture():
            return self._forward()
        assert self.graph is not None
        assert self.logits is not None
        self.graph.replay()
        return self.logits

    def _capture(self) -> bool:
        """Record a step, without doing it; False where the model does something that cannot be recorded."""
        device, graph = self.positions.device, torch.cuda.CUDAGraph()
        try:
            # The outer block restores the stream even where ending a broken capture raises.
            with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
                stream = torch.cuda.Stream(device)
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    self.logits = self._forward()
        except RuntimeError as error:
            logger.warning("decoding goes on without a CUDA graph: %s", error)
            self.captured = False
            return False
        self.graph = graph
        return True

    def _watched_forward(self) -> Tensor:
        """A plain step that notices what would break a capture: waiting for the GPU (some RoPE types do)."""
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("warn")
            try:
                logits = self._forward()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        waits = [one for one in seen if _WAITED in str(one.message)]
        if waits:
            where = f"{waits[0].filename}:{waits[0].lineno}"
            logger.info("decoding without a CUDA graph: a step of this model waits for the GPU (%s)", where)
            self.captured = False
        return logits

    def _forward(self) -> Tensor:
        self.positions += 1
        if self.capacity is not None:
            self.write_at.copy_(self.length)
            self.length += 1
        output = self.model(input_ids=self.tokens, position_ids=self.positions, past_key_values=self.kv, use_cache=True)
        logits: Tensor = output.logits[:, -1]
        return logits


def _is_static(model: PreTrainedModel, kv: KVCache, device: torch.device) -> bool:
    """Whether a step can be captured.

    Sliding windows move, the kernel has to read lengths on the device, copies of an offloaded store are begun by the
    host, and a model that makes its positions from the cache's length instead of taking them would have the same ones
    in every step.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    return {layer.device for layer in kv.layers} == {device} and all(
        isinstance(layer, ContextLayer) and layer.is_static for layer in kv.layers
    )


def _last_only(model: PreTrainedModel) -> dict[str, int]:
    return {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}  # type: ignore[operator]
