"""Names of datasets and groups, and what a list of them is resolved to."""

from __future__ import annotations

import pytest

from kvzip.data import dataset, names
from kvzip.data.record import Record
from kvzip.data.registry import GROUPS, generated, resolve


def test_names_and_lengths_are_pairs_in_order():
    assert resolve("niah_single_1:4k, ruler_vt:1000,kv") == [("niah_single_1", 4096), ("ruler_vt", 1000), ("kv", None)]
    assert resolve("kv:128K") == [("kv", 131072)]


def test_a_group_stands_for_its_datasets():
    niah = resolve("niah:2k")
    assert len(niah) == 8
    assert {tokens for _, tokens in niah} == {2048}
    ruler = {name for name, _ in resolve("ruler:8k")}
    assert ruler >= {name for name, _ in niah} | {"ruler_vt", "ruler_cwe", "ruler_fwe"}
    assert resolve("scbench") == [(name, None) for name in sorted(GROUPS["scbench"])]
    assert all(name.endswith("_tiny") for name, _ in resolve("scbench_tiny"))


def test_no_pattern_of_a_group_is_in_vain():
    for group in GROUPS:
        assert group not in names()
        assert len(resolve(group)) >= len(GROUPS[group])


def test_what_came_before_is_not_repeated():
    assert resolve("niah_single_1,niah,niah_single_1:1k") == [
        ("niah_single_1", None),
        *((name, None) for name, _ in resolve("niah") if name != "niah_single_1"),
        ("niah_single_1", 1024),
    ]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nia_single_1", "unknown dataset 'nia_single_1'; did you mean 'niah_single_1'"),
        ("rulr", "did you mean 'ruler'"),
        ("kv:4x", "'4x' in 'kv:4x' is no number of tokens"),
        ("kv:", "'' in 'kv:' is no number of tokens"),
        ("kv:0", "'0' in 'kv:0' is no number of tokens"),
        ("kv:1.5k", "no number of tokens"),
        (" , ", "no dataset in ' , '"),
        ("", "no dataset in ''"),
    ],
)
def test_what_cannot_be_resolved_is_refused_with_the_reason(spec, message):
    with pytest.raises(ValueError, match=message):
        resolve(spec)


def test_every_generated_dataset_takes_a_length():
    for name in names():
        if dataset(name).generate is not None:
            assert resolve(f"{name}:4k") == [(name, 4096)]


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="'kv' is taken"):
        generated("kv", lambda seed: None, lambda prediction, references: 0.0, summary="")


def test_a_record_refuses_prefixes_that_do_not_match_its_questions():
    with pytest.raises(ValueError, match="2 questions but 1 answer prefixes"):
        Record("c", ["q", "r"], [["a"], ["b"]], 1, "t", answer_prefixes=["p"])


def test_a_record_has_a_prefix_for_every_question():
    assert Record("c", ["q", "r"], [["a"], ["b"]], 1, "t", answer_prefix="p").prefixes == ["p", "p"]
    assert Record("c", ["q", "r"], [["a"], ["b"]], 1, "t", answer_prefixes=["p", "s"]).prefixes == ["p", "s"]
    same = Record("c", ["q"], [["a"]], 1, "t", answer_prefixes=["p"])
    assert same == Record("c", ["q"], [["a"]], 1, "t", answer_prefix="p")
