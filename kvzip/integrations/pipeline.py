"""kvpress's text-generation pipeline: context, questions and a press in, answers out.

Importing this module registers it with transformers as "kv-press-text-generation".
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from kvzip.integrations.compression import BasePress, prune, scorers_of
from kvzip.kvcache import KVCache
from kvzip.model import Decoding, ModelKVzip
from kvzip.scoring.methods.finch import Finch

logger = logging.getLogger(__name__)
TASK = "kv-press-text-generation"
AT_ONCE = 16  # questions that are answered together


class KVPressTextGenerationPipeline(Pipeline):
    """Compress a context once and answer questions about it, greedily unless told otherwise.

        pipe = pipeline("kv-press-text-generation", model="Qwen/Qwen3-8B")
        pipe(context, question=question, press=press)["answer"]
        pipe(context, questions=questions, press=press)["answers"]

    The context stands at the beginning of the chat template's first turn, which is kept and not counted, and is
    compressed before any question is seen (but for `FinchPress`, which needs one). The model keeps kvzip's attention;
    with other caches it works as before.

    Args of a call, beside the context (a text, or a list of texts for a list of results):
        question, questions: a text or several; with neither, the model goes on from the context.
        answer_prefix: the beginning of every answer, which is not repeated in what is returned.
        press: how to compress; None = not at all.
        max_new_tokens: of an answer, 50 unless told otherwise.
        max_context_length: longer contexts lose their end, tokens; None = what the tokenizer says.
        cache: a fresh `DynamicCache` that shall hold the compressed context afterwards.
        Anything else is for transformers' `generate`.

    Raises:
        ValueError: question and questions together, one of them or a press of another kind, or a cache in use.
    """

    _load_tokenizer = True  # type: ignore[assignment]
    _load_processor = False  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what every transformers pipeline takes, and put kvzip's attention on the model."""
        super().__init__(*args, **kwargs)
        self.kvzip = ModelKVzip.from_model(self.model, self.tokenizer)

    def _sanitize_parameters(
        self,
        question: str | None = None,
        questions: Sequence[str] | None = None,
        answer_prefix: str | None = None,
        press: BasePress | None = None,
        max_new_tokens: int = 50,
        max_context_length: int | None = None,
        cache: DynamicCache | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if question is not None and questions is not None:
            raise ValueError("give question or questions, not both")
        if not isinstance(question, str | None) or isinstance(questions, str):
            raise ValueError(f"question is a text, questions a list of texts; got {question!r} and {questions!r}")
        if press is not None and not isinstance(press, BasePress):
            raise ValueError(
                f"press must come from kvzip.integrations.kvpress, got {type(press).__module__}.{type(press).__name__}"
            )
        if cache is not None and (type(cache) is not DynamicCache or cache.get_seq_length()):
            raise ValueError(f"cache must be a fresh DynamicCache, got {cache!r}")
        preprocess = {
            "questions": [question or ""] if questions is None else list(questions),
            "answer_prefix": answer_prefix or "",
            "max_context_length": max_context_length,
        }
        forward = {"press": press, "max_new_tokens": int(max_new_tokens), "cache": cache, **kwargs}
        return preprocess, forward, {"single": questions is None}

    def preprocess(  # type: ignore[override]
        self, context: str, questions: Sequence[str], answer_prefix: str, max_context_length: int | None
    ) -> dict[str, Any]:
        """Ids of the template's beginning, of the context, and of each question with the turn change after it."""
        prompting = self.kvzip.prompting
        prefix, ids = prompting.encode(prompting.template.before), prompting.encode(context)
        limit = self.tokenizer.model_max_length if max_context_length is None else max_context_length  # type: ignore[union-attr]
        room = int(min(limit, 10**10)) - len(prefix)
        if room < 1:
            raise ValueError(
                f"max_context_length={limit} leaves no room after the {len(prefix)} tokens of the template"
            )
        if len(ids) > room:
            logger.warning("the context of %d tokens is cut to %d", len(ids) + len(prefix), limit)
        after = prompting.template.suffix + answer_prefix
        return {
            "prefix": prefix,
            "context": ids[:room],
            "questions": [prompting.encode(one + after) for one in questions],
        }

    def _forward(  # type: ignore[override]
        self,
        inputs: dict[str, Any],
        press: BasePress | None = None,
        cache: DynamicCache | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        steps, compress = ([], None) if press is None else (press.steps(), press.while_decoding())
        scorers, questions = scorers_of(steps), inputs["questions"]
        query = None
        if any(isinstance(one, Finch) for one in scorers):
            if len(questions) != 1:
                raise ValueError(f"FinchPress compresses for one question, got {len(questions)}: ask them one by one")
            query = questions[0]
        kv = self.kvzip.prefill(
            inputs["context"], scorer=scorers or None, kv_type="evict", prefix_ids=inputs["prefix"], query=query
        )
        prune(kv, steps)
        compress = fitted(compress, kv)
        logger.debug("%d tokens of context, %.3f of the pairs kept, %d bytes", kv.context_length, kv.ratio, kv.nbytes)
        answers: list[Tensor] = []
        size = AT_ONCE if compress is None else 1
        for start in range(0, len(questions), size):
            batch = questions[start : start + size]
            answers += self.kvzip.generate(batch, kv=kv, return_ids=True, compress=compress, **kwargs)  # type: ignore[arg-type]
        if cache is not None:
            cache.layers = list(kv.layers)
        return answers

    def postprocess(self, model_outputs: list[Tensor], single: bool) -> dict[str, Any]:  # type: ignore[override]
        """Texts: {"answer": text} for one question, else {"answers": texts}."""
        texts = [self.kvzip.decode(one) for one in model_outputs]
        return {"answer": texts[0]} if single else {"answers": texts}


def fitted(compress: Decoding | None, kv: KVCache) -> Decoding | None:
    """`compress` for `kv`: where heads hold different numbers of pairs, tokens are scored once, and all compete."""
    lengths = kv.kv_len_per_head
    if compress is None or compress.level != "pair-uniform" or bool((lengths == lengths[0, 0]).all()):
        return compress
    return replace(compress, rescore=False, level="pair")


PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=KVPressTextGenerationPipeline, pt_model=AutoModelForCausalLM, type="text"
)
