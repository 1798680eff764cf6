"""ModelKVzip: prefill a context, prune its cache, ask. Orchestration only; the parts live beside it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvzip import attention, head_scores
from kvzip.kvcache import Fidelity, KVCache, Seen, brought_back, check_bits, check_offload
from kvzip.model import blocks, calibration, fidelity, generation, loading, passes, restoring, seen
from kvzip.model.checks import (
    check_kv,
    check_kv_type,
    check_positions,
    check_scorers,
    check_tokens,
    check_vocabulary,
    check_whole,
)
from kvzip.model.compressing import Decoding
from kvzip.model.probe import make_layers
from kvzip.model.prompting import INSTRUCTION, Query, as_ids, is_batch, is_messages
from kvzip.model.wrapped import WrappedModel
from kvzip.scoring import Notes, PrefillScorer, Scorer


class ModelKVzip(WrappedModel):
    """A causal language model that answers from compressed contexts."""

    def __init__(
        self,
        name: str = loading.BUNDLED,
        *,
        kv_type: str = "evict",
        kv_bits: int = 16,
        backend: str = "auto",
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> None:
        """Load a model.

        Args:
            name: "bundled", an alias such as "qwen2.5-7b", a local folder, or a hub id.
            kv_type: default of `prefill`: "evict" frees what is pruned, "retain" keeps and masks it.
            kv_bits: default of `kv.prune(bits=)`: 16 keeps the model's precision, 8 or 4 quantise what is kept.
            backend: "auto" | "reference" | "torch" | "cpu" | "cuda" | "flash"; see `kvzip.attention.resolve_backend`.
            dtype: torch dtype of the weights, "auto" = the checkpoint's.
            device: None = the first CUDA device where there is one, else the CPU.
            kwargs: for transformers' `from_pretrained`: `device_map="auto"`, `revision`, ...

        Raises:
            ValueError: unknown name, kv_type or backend, or an architecture that cannot be used, and why.
            KernelsUnavailable: the backend needs a compiler, a driver or a package that is missing.
        """
        check_kv_type(kv_type)
        check_bits(kv_bits)
        attention.check_backend(backend)
        model, tokenizer = loading.load(name, dtype=dtype, device=device, **kwargs)
        self._set_up(model, tokenizer, name, kv_type, backend)
        self.kv_bits = kv_bits

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        kv_type: str = "evict",
        backend: str = "auto",
    ) -> ModelKVzip:
        """Use a loaded transformers model: put into eval mode, its attention set to ours until `restore()`.

        Without a tokenizer, contexts, queries and answers are ids.

        Raises:
            ValueError: unknown kv_type or backend, or an architecture that cannot be used, and why.
        """
        check_kv_type(kv_type)
        self = cls.__new__(cls)
        was_training, name = model.training, model.config.name_or_path or type(model).__name__
        try:
            self._set_up(model.eval(), tokenizer, name, kv_type, backend)
        except BaseException:
            model.train(was_training)
            raise
        return self

    # -- the three steps ---------------------------------------------------------------------------------------------

    def prefill(
        self,
        context: str | Sequence[int] | Tensor | Iterable[str],
        *,
        scorer: str | Scorer | Sequence[str | Scorer] | None = "kvzip",
        kv_type: str | None = None,
        load_score: bool | str | PathLike[str] | Sequence[str] = False,
        prefill_chunk_size: int = passes.PREFILL_CHUNK,
        instruction: str = INSTRUCTION,
        prefix_ids: Sequence[int] | None = None,
        query: Query | None = None,
        budget_tokens: int | None = None,
        budget_nbytes: int | str | None = None,
        block: int = blocks.BLOCK,
        offload: str | None = None,
    ) -> KVCache:
        """Run the context through the model once and score its KV pairs.

        With a budget, or a context that comes in pieces, it is read in blocks: each is scored by itself over what is
        left of those before, and all that is left is pruned to the budget. What is held is the budget and one block.

        Args:
            context: text; ids, as a list or LongTensor of shape (n,) or (1, n); or texts one after the other, such as
                an open file, of which no more than a block is held.
            scorer: name or object, or several that ride on one prefill, the first `prune`'s default; None = no scores.
            kv_type: "evict" or "retain"; None = the constructor's.
            load_score: use stored head scores and score nothing, which makes "head" the default level: True = those
                shipped for this model, else a name, a path, or several to merge.
            prefill_chunk_size, block: tokens of a forward pass, and of a block.
            instruction: line between the chat template's beginning and the context.
            prefix_ids: all ids in front of the context, in place of template and instruction; may be empty.
            query: a question that scorers which watch the prefill shall see, for methods that need one or do better
                with it; it is not kept. The cache is then made for this question.
            budget_tokens, budget_nbytes: what is kept while reading, tokens a head or "1GiB"; "retain" frees nothing.
            offload: "cpu" keeps what was read in host memory, see `kv.offload`. To hold no more than a block of it on
                the devices while reading, give the context in pieces: [text].

        Returns:
            The kv, unpruned unless there is a budget.

        Raises:
            ValueError: empty context, context longer than the model's positions, unknown scorer, kv_type or offload,
                head scores that do not fit.
        """
        kv_type, offload = check_kv_type(self.kv_type if kv_type is None else kv_type), check_offload(offload)
        check_tokens(prefill_chunk_size=prefill_chunk_size)
        scorers = check_scorers(scorer)
        scorers = [] if load_score else scorers
        budget = blocks.check_budget(budget_tokens, budget_nbytes, block)
        if budget or blocks.in_pieces(context):
            if load_score or query is not None:
                raise ValueError("a context in blocks takes neither load_score nor query")
            first = partial(
                self.prefill, scorer=scorers or None, kv_type=kv_type, prefill_chunk_size=prefill_chunk_size,
                instruction=instruction, prefix_ids=prefix_ids, offload=offload,
            )  # fmt: skip
            return blocks.prefill(
                self, blocks.as_pieces(context, self.encode), first, scorers, budget, block, prefill_chunk_size
            )
        loaded = calibration.load_head_scores(self, load_score)
        if isinstance(context, str):
            context = self.encode(context) if context.strip() else []
        context_ids = check_vocabulary(self, as_ids(context, "context"))  # type: ignore[arg-type]
        prefix = self.prompting.prefix_ids(instruction) if prefix_ids is None else list(prefix_ids)
        prefix = check_vocabulary(self, as_ids(prefix, "prefix") if prefix else [])
        length = len(prefix) + len(context_ids)
        kv = self.empty_kv(kv_type, length + passes.ANSWER_ROOM)
        query_ids = [] if query is None else check_vocabulary(self, self.apply_template(query))
        check_positions(self, length + len(query_ids))
        notes = passes.prefill(
            self.model, kv, prefix + context_ids, len(prefix), chunk_size=prefill_chunk_size,
            modules=self._seams.modules, scorers=scorers, query_ids=query_ids,
        )  # fmt: skip
        self._score(kv, scorers, notes)
        kv.level = scorers[0].level if scorers else kv.level
        if loaded is not None:
            kv.set_head_scores(loaded.tensor)
        kv.offload(offload)
        return kv

    def extend(
        self,
        kv: KVCache,
        more: str | Sequence[int] | Tensor | Iterable[str],
        *,
        scorer: str | Scorer | Sequence[str | Scorer] | None = None,
        budget_tokens: int | None = None,
        budget_nbytes: int | str | None = None,
        block: int = blocks.BLOCK,
    ) -> None:
        """Append to the context of `kv`, pruned or not: what is new is read after it, scored, and competes with it.

        Args:
            more: as `prefill`'s context.
            scorer: the methods that scored `kv`, where they had other than their default settings; None = by name.
            budget_tokens, budget_nbytes, block: as in `prefill`; without a budget nothing is dropped.

        Raises:
            ValueError: a kv of another model or with kept turns, other scorers than its own, no positions left. What
                was read before stays in `kv`.
        """
        scorers = check_scorers(list(kv.scorers) if scorer is None else scorer)
        budget = blocks.check_budget(budget_tokens, budget_nbytes, block)
        check_kv(self, kv)
        if kv.tail_length:
            raise ValueError(f"this kv has {kv.tail_length} tokens of kept turns; what extends it comes before those")
        if {one.name for one in scorers} != set(kv.scorers):
            raise ValueError(f"this kv was scored by {kv.scorers}; extend it with the same methods")
        blocks.extend(self, kv, blocks.as_pieces(more, self.encode), scorers, budget, block, passes.PREFILL_CHUNK)

    def score(self, kv: KVCache, scorer: str | Scorer | Sequence[str | Scorer] = "kvzip") -> None:
        """Score a kv that was prefilled without, or add the scores of further methods.

        Methods that watch the prefill cost another one.

        Raises:
            ValueError: unknown scorer, a kv of another model, that is not whole any more, or with kept turns.
        """
        scorers = check_scorers(scorer)
        check_kv(self, kv)
        check_whole(kv)
        watching = [one for one in scorers if isinstance(one, PrefillScorer)]
        notes = seen.read_again(self, kv, watching)[1] if watching else {}
        with brought_back(kv):
            self._score(kv, scorers, notes)

    def fidelity(self, kv: KVCache, **options: Any) -> Fidelity:
        """See `KVCache.fidelity`."""
        check_kv(self, kv)
        return fidelity.fidelity(self, kv, **options)

    def find_ratio(self, kv: KVCache, **options: Any) -> tuple[float, dict[str, str | float]]:
        """The ratio that `kv.prune("auto")` uses, and the evidence; see `kvzip.model.fidelity`."""
        check_kv(self, kv)
        return fidelity.find_ratio(self, kv, **options)

    def look(self, kv: KVCache, ids: Sequence[int]) -> list[Seen]:
        """What the prunable layers do with `ids` after all that `kv` holds; for transforms of a kv."""
        return seen.look(self, kv, ids)

    def _score(self, kv: KVCache, scorers: Sequence[Scorer], notes: Mapping[str, list[Notes]]) -> None:
        restoring.check(self, kv, scorers)
        with kv.unmasked():
            context = passes.scoring_context(self.model, kv, self._seams.modules, self.prompting, self.max_positions)
            passes.score(kv, scorers, context, notes)
        restoring.append(self, kv, scorers)

    def generate(
        self,
        query: Query | Sequence[Query],
        kv: KVCache | None = None,
        *,
        update_cache: bool = False,
        return_ids: bool = False,
        compress: Decoding | None = None,
        **kwargs: Any,
    ) -> str | Tensor | list[str] | list[Tensor]:
        """Answer a query from `kv`, or a list of queries at once; greedy unless told otherwise.

        Args:
            query: a question; chat messages (user and assistant in turns; a last assistant message begins the answer);
                or ids, which are used as they are. A list of these: all are asked of the same context, whose bytes
                every decoding step reads once; the answers are those of asking one by one.
            kv: what `prefill` gave, pruned or not; None = no context at all.
            update_cache: keep this turn in `kv`, closed as the chat template closes it, so that the next query is the
                next turn; otherwise `kv` is as before. With a single query.
            return_ids: return the new ids (n,) in place of text; always so without a tokenizer.
            compress: keep what is decoded within a budget, on a copy of `kv`, which `kv` becomes with `update_cache`.
            kwargs: for transformers' `generate`: `max_new_tokens` (default 512), `do_sample`, `streamer`,
                `stop_strings`, `logits_processor`, ...

        Returns:
            The answer, without the end-of-sequence token; for a list, a list.

        Raises:
            ValueError: a kv of another model or device, an empty query or list, beams or several returned sequences, or
                no positions left.
        """
        many = is_batch(query)
        queries: list[Any] = list(query) if many else [query]
        if not queries:
            raise ValueError("the list of queries is empty")
        if many and update_cache:
            raise ValueError(f"update_cache=True keeps one turn, got a list of {len(queries)} queries")
        ids = [check_vocabulary(self, self.apply_template(one)) for one in queries]
        if kv is not None:
            check_kv(self, kv, max(map(len, ids)))
        elif update_cache:
            raise ValueError("update_cache=True needs a kv to keep the turn in, got kv=None")
        templated = not many and (isinstance(query, str) or is_messages(query))
        with torch.no_grad():
            found = generation.generate(
                self, ids, kv, keep=update_cache, close_turn=templated, compress=compress, **kwargs
            )
        answers: list[Any] = found if return_ids or self.tokenizer is None else [self.decode(one) for one in found]
        return answers if many else answers[0]

    def __call__(self, ids: Sequence[int] | Tensor, kv: KVCache, *, update_cache: bool = False) -> Tensor:
        """Return logits (1, n, vocab_size) of `ids` (n,) or (1, n), fed after everything in `kv`.

        Raises:
            ValueError: a kv of another model or device, or no positions left.
        """
        ids = check_vocabulary(self, as_ids(ids, "input"))
        check_kv(self, kv, len(ids))
        with torch.no_grad(), kv.scratch(keep=update_cache):
            inputs = torch.tensor([ids], device=self.device)
            logits = self.model(input_ids=inputs, past_key_values=kv, use_cache=True).logits
            if update_cache:
                kv.input_ids = torch.cat([kv.input_ids, inputs[0].cpu()])
        return logits

    def compute_head_scores(
        self, texts: Iterable[str], *, data: str = "", scorer: str | Scorer = "kvzip"
    ) -> head_scores.HeadScores:
        """Return head scores from calibration texts, to `save` and load again; see `kvzip.model.calibration`."""
        return calibration.compute_head_scores(self, texts, data=data, scorer=scorer)

    def load_kv(self, path: str | PathLike[str], *, offload: str | None = None) -> KVCache:
        """Load what `kv.save` wrote to this model's devices; offloaded as it was, or as `kv.offload(offload)` says.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a kv file, cut or altered, or of another model or tokenizer.
        """
        from kvzip.kvcache.serialization import load

        # A file says itself which layers were treated as global; 0 tokens needed lets every window do.
        return load(self.empty_kv(self.kv_type, 0), path, offload).to(self.layer_devices)

    def restore(self) -> PreTrainedModel:
        """Give the transformers model back with the attention it had before; this object is of no use afterwards."""
        attention.restore(self.model)
        return self.model

    def empty_kv(self, kv_type: str, needed: int) -> KVCache:
        """A kv of this model without a context, for `needed` tokens that must fit into a window treated as global."""
        kv = KVCache(make_layers(self.model, self._backend, needed), kv_type=kv_type, model_id=self.model_id)
        kv.kv_bits, kv.owner = self.kv_bits, weakref.ref(self)
        return kv
