"""Full-cache accuracy of the bundled model on the held-out test split."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

import torch
from transformers import LlamaForCausalLM

from kvzip.data import score
from tools.bundled.samples import IGNORE, LISTS, OWN_TASKS, QA_TASKS, RULER_ROOM, Sample, Sampler

VALUE = re.compile(r"\b(?:\d{7}|[A-Z]{5})\b")  # of the lists: RULER's numbers and variables


def pack(samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Put samples behind each other in one row.

    Returns:
        ids, positions in the sample, and targets, each (1, num_tokens), where targets[:, i] is what token i has to
        predict or IGNORE; and weights (1, num_tokens) float32.
    """
    ids = torch.tensor([[token for sample in samples for token in sample.ids]])
    positions = torch.cat([torch.arange(len(sample.ids)) for sample in samples])[None]
    targets = torch.tensor([[label for sample in samples for label in (*sample.labels[1:], IGNORE)]])
    weights = torch.cat([torch.full((len(sample.ids),), float(sample.weight)) for sample in samples])[None]
    return ids, positions, targets, weights


def whole_answers(gold: Sequence[int], right: Sequence[bool], end: int) -> list[bool]:
    """Join tokens to answers: each ends with `end` and is right if all its tokens are.

    Args:
        gold: (num_tokens,) ids of consecutive answers.
        right: (num_tokens,) whether each was predicted.
    """
    answers, start = [], 0
    for i, token in enumerate(gold):
        if token == end:
            answers.append(all(right[start : i + 1]))
            start = i + 1
    return answers


def _cases(sampler: Sampler, length: int, count: int) -> Iterator[tuple[str, list[Sample]]]:
    """Yield for each measured quantity its name and `count` samples of about `length` context tokens."""
    rng = random.Random(f"evaluation/{length}")
    for task in QA_TASKS if length >= RULER_ROOM else OWN_TASKS:
        yield task, [sampler.questions(rng, task, length + 42, 1) for _ in range(count)]
    for task in OWN_TASKS:
        yield f"{task}, 6 turns", [sampler.questions(rng, task, length + 162, 6) for _ in range(count // 4)]
    repeats = max(4, count // 8)
    yield "repeat all", [sampler.repeat(rng, 2 * length + 60, partial=False) for _ in range(repeats)]
    yield "repeat part", [sampler.repeat(rng, length + 300, partial=True) for _ in range(repeats)]


def answer(model: LlamaForCausalLM, sampler: Sampler, sample: Sample) -> float:
    """Generate the answer to the first question of `sample` greedily and score it with the task's metric."""
    start = next(i for i, label in enumerate(sample.labels) if label != IGNORE)
    gold = sample.labels[start : sample.labels.index(sampler.end[0], start)]
    ids = torch.tensor([sample.ids[:start]], device=model.device)
    output = model.generate(ids, do_sample=False, max_new_tokens=len(gold) + 4)  # type: ignore[misc]
    text = str(sampler.tokenizer.decode(output[0, start:], skip_special_tokens=True))
    expected = str(sampler.tokenizer.decode(gold))
    return score(sample.task, text, VALUE.findall(expected) if sample.task in LISTS else [expected])


@torch.no_grad()
def predict(model: LlamaForCausalLM, sample: Sample) -> tuple[list[int], list[bool]]:
    """Return the supervised ids of `sample` and whether each is the most likely one given those before it."""
    ids, _, targets, _ = (tensor.to(model.device) for tensor in pack([sample]))
    supervised = targets[0] != IGNORE
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, supervised]
    gold = targets[0, supervised]
    return gold.tolist(), (model.lm_head(hidden).argmax(-1) == gold).tolist()


def evaluate(model: LlamaForCausalLM, sampler: Sampler, length: int, count: int) -> dict[str, float]:
    """Measure at contexts of about `length` tokens.

    Returns:
        for each task the mean score of generated answers to one question after the context; over several
        turns the share of answers whose tokens are all right; of the repeat prompts the share of right tokens.
    """
    assert sampler.split == "test"
    results = {}
    for name, samples in _cases(sampler, length, count):
        found: list[float] = []
        for sample in samples:
            if name in QA_TASKS:
                found.append(answer(model, sampler, sample))
                continue
            gold, right = predict(model, sample)
            found += right if name.startswith("repeat") else whole_answers(gold, right, sampler.end[0])
        results[name] = sum(found) / len(found)
    return results
