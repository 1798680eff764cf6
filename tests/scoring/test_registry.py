"""Scorers by name: found, listed, added by one class, and never replaced unnoticed."""

import subprocess
import sys
from dataclasses import dataclass
from functools import cache

import pytest
import torch

from kvzip import ModelKVzip, Scorer, list_scorers, register
from kvzip.kvcache import get_level
from kvzip.scoring import LayerScorer, get_scorer, named_scorers, registry
from kvzip.scoring.methods.knorm import KNorm
from tests.tiny import build, ids

NAMES = {"kvzip", "kvzip_plus", "random", "streaming_llm", "knorm"}


@cache
def model():
    return ModelKVzip.from_model(build("llama"), None)


@pytest.fixture(autouse=True)
def _same_registry_afterwards(monkeypatch):
    list_scorers()
    monkeypatch.setattr(registry._SCORERS, "_classes", dict(registry._SCORERS._classes))


def test_all_stands_for_what_needs_no_file_and_no_question() -> None:
    found = named_scorers("snapkv(window_size=8,kernel_size=3),all,gate,knorm")
    assert found[0] == "snapkv(window_size=8,kernel_size=3)"
    assert found[-1] == "gate"
    assert {"kvzip", "snapkv", "random", "knorm"} < set(found)
    assert len(set(found)) == len(found)
    assert not {"finch", "qfilter", "kvzap", "expected_attention_stats"} & set(found)
    assert named_scorers("knorm,knorm") == ["knorm", "knorm"]  # told by whoever takes them


def test_all_methods_are_listed_with_paper_and_cost():
    rows = list_scorers()
    assert {row.name for row in rows} >= NAMES
    assert [row.name for row in rows] == sorted(row.name for row in rows)
    for row in rows:
        assert row.paper
        assert row.cost
        assert get_scorer(row.name).name == row.name
        assert type(get_scorer(row.name)).__doc__, "its class says what it does"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("kvzp", "kvzip"), ("kvzip-pluss", "kvzip_plus"), ("streamingllm", "streaming_llm"), ("zz", None)],
)
def test_an_unknown_name_answers_with_the_nearest(name, nearest):
    with pytest.raises(ValueError, match="unknown scorer") as error:
        get_scorer(name)
    message = str(error.value)
    assert repr(name) in message
    assert all(repr(known) in message for known in NAMES)
    assert nearest is None or repr(nearest) in message.split("did you mean")[1]


def test_a_hyphen_is_an_underscore():
    assert get_scorer("kvzip-plus") == get_scorer("kvzip_plus")
    assert get_scorer("streaming-llm(n_sink=2)").n_sink == 2
    assert get_level("critical_adakv") == get_level("critical-adakv")


@pytest.mark.parametrize("wrong", [None, 3, KNorm, ["knorm"]], ids=str)
def test_something_that_is_no_scorer_is_refused(wrong):
    with pytest.raises(ValueError, match="unknown scorer"):
        get_scorer(wrong)


@pytest.mark.parametrize("wrong", [KNorm, 3], ids=str)
def test_prefill_refuses_something_that_is_no_scorer(wrong):
    with pytest.raises(ValueError, match="scorer"):
        model().prefill(ids(9), scorer=wrong)


def test_an_object_is_taken_as_it_is():
    scorer = get_scorer("random")
    assert get_scorer(scorer) is scorer


def test_a_scorer_is_added_by_one_class_and_works_to_the_end():
    """Registered here, used by name through prefill, prune and generate."""

    @register
    @dataclass(frozen=True)
    class LatestFirst(Scorer):
        """Keep the latest positions."""

        name = "latest_first"
        paper = "this test"

        def score(self, context):
            """Positions."""
            return torch.arange(context.context_length).float().expand(context.shape)

    assert ("latest_first", "this test", "nothing", "negligible") in list_scorers()
    kv = model().prefill(ids(20), scorer="latest_first")
    assert kv.scorers == ("latest_first",)
    assert kv.prune(0.25).threshold == 15
    assert torch.equal(kv.keep_mask, (torch.arange(20) >= 15).expand(4, 2, 20))
    assert len(model().generate(ids(3), kv, max_new_tokens=4, eos_token_id=None)) == 4


def test_a_layer_scorer_sees_the_states_of_one_layer_without_the_prefix():
    seen = []

    @dataclass(frozen=True)
    class Watch(LayerScorer):
        """Record the views."""

        name, paper = "watch", "this test"

        def score_layer(self, layer):
            """The first component of every key."""
            seen.append(layer)
            return layer.keys[..., 0]

    kv = model().prefill(ids(20), prefix_ids=ids(3, seed=2), scorer=Watch())
    assert [(view.row, view.layer_idx, view.prefix_length) for view in seen] == [(i, i, 3) for i in range(4)]
    for view, layer in zip(seen, kv.layers, strict=True):
        assert view.keys.shape == view.values.shape == (2, 20, 8)
        assert view.all_keys.shape == view.all_values.shape == (2, 23, 8)
        assert torch.equal(view.all_keys.reshape(46, 8), layer.store.keys)
        assert torch.equal(view.values, layer.store.values.view(2, 23, 8)[:, 3:])


class Broken(Scorer):
    """Gives what it was made with."""

    name, paper = "broken", "this test"

    def __init__(self, result):
        self.result = result

    def score(self, context):
        """The result."""
        return self.result


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (torch.full((4, 2, 9), torch.nan), "NaN"),
        (torch.full((4, 2, 9), torch.inf), "infinity"),
        (torch.zeros(4, 9), "shape"),
        (torch.zeros(4, 2, 10), "shape"),
    ],
)
def test_scores_that_cannot_be_used_are_refused_with_the_scorers_name(result, words):
    with pytest.raises(ValueError, match=f"'broken'.*{words}"):
        model().prefill(ids(9), scorer=Broken(result))


def another(class_name, scorer_name):
    return type(class_name, (Scorer,), {"name": scorer_name, "paper": "none", "score": lambda self, context: None})


@pytest.mark.parametrize("class_name", ["Mine", "KNorm"])
def test_a_name_is_not_taken_twice(class_name):
    """Not even by a class of the same name in another file."""
    with pytest.raises(ValueError, match="'knorm' is taken by"):
        register(another(class_name, "knorm"))
    assert type(get_scorer("knorm")) is KNorm


def test_registering_the_same_class_again_changes_nothing():
    assert register(KNorm) is KNorm
    assert type(get_scorer("knorm")) is KNorm


TAKEN_FIRST = """
from kvzip import Scorer, list_scorers, register
class Mine(Scorer):
    name, paper = "knorm", "mine"
    def score(self, context): ...
try:
    register(Mine)
except ValueError as error:
    print("refused:", error)
print(sorted(row.name for row in list_scorers()))
"""


def test_a_built_in_name_is_taken_before_anything_was_looked_up():
    """The class that comes too late is the user's, whatever has been imported so far; the registry stays usable."""
    done = subprocess.run([sys.executable, "-c", TAKEN_FIRST], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("refused: scorer name 'knorm' is taken"), done.stderr[-300:]
    assert "'streaming_llm'" in done.stdout


@pytest.mark.parametrize("text", ["snapkv(window_size='a')", "snapkv(window_size=None)"])
def test_a_setting_of_the_wrong_kind_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"scorer .*window_size"):
        get_scorer(text)


@pytest.mark.parametrize(
    "value", ["{[1]: 2}", "-" * 6000 + "1", "1" + "+1" * 6000, "(" * 300], ids=lambda text: text[:8]
)
def test_settings_that_cannot_be_read_are_refused_with_a_reason(value: str) -> None:
    with pytest.raises(ValueError, match=r"scorer 'kvzip\(chunk_size=.* cannot be read: \w"):
        get_scorer(f"kvzip(chunk_size={value})")
