"""The exams that tools and benchmarks sit: which, and how answers are counted."""

import dataclasses

from kvzip import ModelKVzip
from tools.exams import TASKS, Exam, exams, right


def test_every_task_and_length_has_its_documents_the_longest_first():
    chosen = exams([64, 128], documents=2, questions=3, seed=7)
    assert [exam.length for exam in chosen] == [128] * 6 + [64] * 6
    assert set(chosen) == {Exam(task, length, seed, 3) for task in TASKS for length in (64, 128) for seed in (7, 8)}


def test_right_is_the_share_of_exact_answers():
    model = ModelKVzip()
    record = Exam("kv", 64, 7, 2).record(model)
    assert len(record.questions) == 2
    kv = model.prefill(record.context, scorer=None)
    own = model.generate(record.questions, kv, max_new_tokens=record.max_new_tokens)
    for answers, share in (([[own[0]], [own[1]]], 1.0), ([[own[0]], ["another"]], 0.5), ([["x"], ["y"]], 0.0)):
        assert right(model, kv, dataclasses.replace(record, answers=answers)) == share
