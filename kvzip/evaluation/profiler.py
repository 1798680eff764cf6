"""The steps that a profile measures, for one context.

The full cache answers first, then it is pruned and answers again: memory never holds two caches, so that what is read
after pruning is what a user has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from kvzip.data import Record
from kvzip.evaluation.asking import queries
from kvzip.evaluation.diagnostics import compare, trace_answer
from kvzip.evaluation.meter import Meter, Stage, summed
from kvzip.evaluation.profile import Answer, ContextProfile, QuestionProfile, Settings
from kvzip.evaluation.samples import Sample
from kvzip.head_scores import HeadScores
from kvzip.kvcache import KVCache
from kvzip.model import ModelKVzip

WARM_UP_TOKENS = 1024  # of the context, so that what is done once is not counted as the first stage's


def profile_context(model: ModelKVzip, sample: Sample, settings: Settings, meter: Meter) -> ContextProfile:
    """Take one context through every step, answer with the full and with the pruned cache, and measure.

    Raises:
        ValueError: data that cannot be read, or what `prefill`, `prune` and `generate` refuse.
    """
    record = sample.record()
    asked = [model.apply_template(query) for query in queries(record)]
    longest = settings.max_new_tokens or record.max_new_tokens
    meter.start()
    kv = _prefill(model, record.context, settings)
    name = "prefill + score" if settings.rides_on_prefill else "prefill"
    stages = [meter.stop(name, kv, tokens=kv.sealed_length)]
    if settings.scores_apart:
        model.score(kv, settings.scorer)
        stages.append(meter.stop("score", kv, tokens=kv.context_length))
    heads = _head_scores(model, kv, f"{sample}, scored by {settings.scorer}") if kv.scorers else None
    full, answering = _answer_all(model, kv, asked, longest, meter, "full")
    stages += answering
    traced = [_with_end(model, kv, ids, answer, longest) for ids, answer in zip(asked, full, strict=True)]
    before = [trace_answer(model, kv, *pair) for pair in zip(asked, traced, strict=True)]
    meter.start()
    kv.prune(settings.ratio, settings.level, bits=settings.bits)
    stages.append(meter.stop("prune", kv))
    pruned, answering = _answer_all(model, kv, asked, longest, meter, "pruned")
    stages += answering
    after = [trace_answer(model, kv, *pair) for pair in zip(asked, traced, strict=True)]
    questions = [
        QuestionProfile(
            question,
            references,
            _graded(model, sample, full[row], references),
            _graded(model, sample, pruned[row], references),
            compare(before[row], after[row]),
        )
        for row, (question, references) in enumerate(zip(record.questions, record.answers, strict=True))
    ]
    sizes = kv.context_length, kv.prefix_length, kv.ratio, kv.full_nbytes, kv.nbytes
    return ContextProfile(sample.source.label, sample.index, *sizes, stages, questions, heads)


def warm_up(model: ModelKVzip, record: Record, settings: Settings) -> None:
    """Do every step once with the beginning of a context, so that the first measured stage is like the later ones."""
    ids = model.encode(record.context)[:WARM_UP_TOKENS]
    kv = _prefill(model, ids, settings)
    if settings.scores_apart:
        model.score(kv, settings.scorer)
    kv.prune(settings.ratio, settings.level, bits=settings.bits)
    model.generate(ids[:8], kv, max_new_tokens=4, return_ids=True)


def timed_answer(
    model: ModelKVzip, kv: KVCache, query_ids: list[int], max_new_tokens: int, meter: Meter, cache: str
) -> tuple[list[int], Stage, Stage]:
    """Answer a query (ids); return the answer's ids and two stages, "query prefill" and "decode".

    The answer's first token comes out of the query's pass. Decoding steps are the tokens after it, and the end of the
    sequence where `max_new_tokens` did not cut the answer off.
    """
    read: list[Stage] = []
    meter.start()
    with _after_first_pass(
        model.model, lambda: read.append(meter.stop("query prefill", kv, tokens=len(query_ids), cache=cache))
    ):
        answer = model.generate(query_ids, kv, max_new_tokens=max_new_tokens, return_ids=True)
    assert isinstance(answer, Tensor)
    steps = min(len(answer), max_new_tokens - 1)
    return answer.tolist(), read[0], meter.stop("decode", kv, tokens=steps, cache=cache)


def _with_end(model: ModelKVzip, kv: KVCache, query_ids: list[int], answer: list[int], longest: int) -> list[int]:
    """The answer and the token that ended it, the likeliest of several that may; as it is where it was cut off."""
    end = model.model.generation_config.eos_token_id
    if end is None or len(answer) == longest:
        return answer
    if not isinstance(end, int):
        logits = model([*query_ids, *answer], kv)[0, -1]
        end = max(end, key=lambda token: logits[token].item())
    return [*answer, end]


def _prefill(model: ModelKVzip, context: str | list[int], settings: Settings) -> KVCache:
    return model.prefill(
        context,
        scorer=settings.scorer if settings.rides_on_prefill else None,
        kv_type=settings.kv_type,
        load_score=settings.load_score,
    )


def _answer_all(
    model: ModelKVzip, kv: KVCache, asked: list[list[int]], max_new_tokens: int, meter: Meter, cache: str
) -> tuple[list[list[int]], list[Stage]]:
    """Answers (ids) to all queries, one by one, and their stages added up."""
    answers, stages = [], []
    for ids in asked:
        answer, *pair = timed_answer(model, kv, ids, max_new_tokens, meter, cache)
        answers.append(answer)
        stages += pair
    return answers, summed(stages)


def _head_scores(model: ModelKVzip, kv: KVCache, data: str) -> HeadScores:
    """The largest pair score of each head, with where it comes from."""
    revision = str(getattr(model.config, "_commit_hash", None) or "")
    facts = {"model": model.name, "model_id": model.model_id["weights"], "revision": revision, "data": data}
    return HeadScores.from_pair_scores(kv.scores, **facts)


def _graded(model: ModelKVzip, sample: Sample, ids: list[int], references: Sequence[str]) -> Answer:
    text = model.decode(ids)
    return Answer(text, len(ids), sample.source.score(text, references))


@contextmanager
def _after_first_pass(module: nn.Module, call: Callable[[], object]) -> Iterator[None]:
    """Call once, when `module` has run for the first time inside the block; later passes run without a hook."""

    def hook(*_: object) -> None:
        handle.remove()
        call()

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
