"""Lines and results folders that are made up, for tests without a model."""

import dataclasses
import json

from kvzip.evaluation.lines import Line
from kvzip.evaluation.results import ResultsFile
from kvzip.evaluation.shards import Shard

SETTINGS = {
    "model": "made-up",
    "data": {"facts": 2},
    "scorers": {"kvzip": "KVzip()"},
    "levels": {"pair": "Pair()"},
    "ratios": [0.5, 1.0],
    "bits": [16],
    "head_scores": False,
    "start": 0,
    "seed": 42,
    "max_context": None,
}
RUN = {"git": "abc", "kvzip": "1", "torch": "2", "transformers": "5", "device": "cpu", "backend": "cpu"}


def line(sample=0, question=0, ratio=0.5, **changes):
    """A line about the dataset "facts", as a sweep writes it."""
    made = Line(
        dataset="facts",
        sample=sample,
        question=question,
        num_questions=2,
        scorer="kvzip",
        level="pair",
        ratio=ratio,
        compression_ratio=1 - ratio,
        kept=ratio,
        context_tokens=100,
        kv_bytes=int(1000 * ratio),
        full_kv_bytes=1000,
        score=1.0,
        prediction='La "Paz"\n–',
        references=["La Paz"],
        prompt="Where?",
        answer_prefix="",
        answer_tokens=3,
        meta={},
        seconds={"prefill": 0.1, "question": 0.01, "per_token": 0.005},
    )
    return dataclasses.replace(made, **changes)


def all_lines(samples=(0, 1), **changes):
    """What `SETTINGS` asks for, of the given samples."""
    return [
        line(sample, question, ratio, **changes) for sample in samples for question in (0, 1) for ratio in (0.5, 1.0)
    ]


def write(folder, lines, shard=None, *, finished=True, settings=None, run=None):
    """Write a shard's results, as a sweep does."""
    with ResultsFile(folder, shard or Shard(), {**SETTINGS, **(settings or {})}, {**RUN, **(run or {})}) as results:
        results.append(lines)
        if finished:
            results.finish({})
    return results.path


def forget_bits(folder):
    """Take the bits out of all files of a folder, which may leave them out."""
    for path in folder.glob("*.jsonl"):
        found = [json.loads(text) for text in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({n: v for n, v in one.items() if n != "bits"}) + "\n" for one in found))
    for path in folder.glob("*.json"):
        state = json.loads(path.read_text())
        del state["settings"]["bits"]
        path.write_text(json.dumps(state))


def half_right(samples=range(12), **changes):
    """Lines: ratio 1 is always right, ratio 0.5 in half of the contexts; contexts have one to three questions."""
    return [
        line(sample, question, ratio, num_questions=1 + sample % 3, score=float(ratio == 1 or sample % 2), **changes)
        for sample in samples
        for question in range(1 + sample % 3)
        for ratio in (0.5, 1.0)
    ]


def with_bits():
    """Two scorers, of which one is there with two numbers of bits."""
    return [*half_right(), *half_right(bits=4, kv_bytes=140), *half_right(scorer="random")]
