"""Head scores: small readable files with provenance, merged by maximum, loaded safely, used in place of scoring."""

import datetime
import json
import pickle
import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from kvzip import HeadScores, ModelKVzip, head_scores
from kvzip.scoring.files import convert
from kvzip.scoring.methods.duo_attention import DuoAttention
from tests.tiny import build, ids

SCORES = [[0.5, 0.25], [1.0, 0.0], [0.125, 0.75], [0.3, 0.2]]
FULL = HeadScores(SCORES, model="tiny", model_id="abc", revision="main", data="a text", date="2025-01-31")


@cache
def model():
    return ModelKVzip.from_model(build("llama"), None)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "tiny.json"
    HeadScores(SCORES, model="tiny").save(path)
    return path


# -- files -------------------------------------------------------------------------------------------------------------


def test_roundtrip_keeps_scores_and_provenance(tmp_path):
    FULL.save(tmp_path / "a.json")
    for path in (tmp_path / "a.json", str(tmp_path / "a.json")):
        assert head_scores.load(path) == FULL
    FULL.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_the_file_is_json_that_a_person_can_read(tmp_path):
    FULL.save(tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text()
    facts = json.loads(text)
    assert facts["scores"] == SCORES
    assert {key: facts[key] for key in ("model", "model_id", "revision", "data", "date")} == {
        "model": "tiny", "model_id": "abc", "revision": "main", "data": "a text", "date": "2025-01-31"
    }  # fmt: skip
    lines = [line.strip().rstrip(",") for line in text.splitlines()]
    assert all(json.dumps(row) in lines for row in SCORES), "one line a layer"
    assert text.endswith("}\n")


def test_texts_of_any_kind_survive(tmp_path):
    odd = HeadScores(SCORES, model='q"uo\\te\n', data="Ünïcode — 文")
    odd.save(tmp_path / "odd.json")
    assert head_scores.load(tmp_path / "odd.json") == odd
    assert datetime.date.fromisoformat(odd.date) <= datetime.date.today()


def test_from_pair_scores_is_the_maximum_over_positions():
    pairs = torch.rand(3, 2, 40, generator=torch.Generator().manual_seed(0))
    made = HeadScores.from_pair_scores(pairs, model="tiny", data="x")
    assert (made.model, made.data) == ("tiny", "x")
    torch.testing.assert_close(made.tensor, pairs.amax(-1), atol=1e-6, rtol=0)
    assert made.tensor.dtype == torch.float32


def test_small_scores_stay_apart():
    """Some methods' scores are tiny everywhere; a file must not turn an order into ties."""
    pairs = torch.tensor([[[1e-8], [3e-8]], [[2e-8], [4e-8]]])
    assert HeadScores.from_pair_scores(pairs).tensor.unique().numel() == 4


@pytest.mark.parametrize("scores", [[], [1.0], [[[1.0]]], [[1.0], [1.0, 2.0]], [[float("nan")]], [["a"]], "abc", None])
def test_scores_that_are_no_matrix_of_numbers_are_refused(scores):
    with pytest.raises(ValueError, match="head scores"):
        HeadScores(scores)


# -- merging -----------------------------------------------------------------------------------------------------------


def test_merging_takes_the_maximum_and_all_provenance(tmp_path):
    other = HeadScores([[0.1, 0.9]] * 4, "tiny", "abc", "main", "another text", "2025-02-28")
    FULL.save(tmp_path / "a.json")
    other.save(tmp_path / "b.json")
    for merged in (FULL.merge(other), head_scores.load([tmp_path / "a.json", str(tmp_path / "b.json")])):
        assert torch.equal(merged.tensor, torch.maximum(FULL.tensor, other.tensor))
        assert merged.data == "a text; another text"
        assert (merged.model, merged.model_id, merged.date) == ("tiny", "abc", "2025-02-28")
    assert FULL.merge().tensor.tolist() == FULL.tensor.tolist()
    assert FULL.merge(FULL).data == "a text"


@pytest.mark.parametrize(
    "other", [HeadScores(SCORES[:3], "tiny", "abc"), HeadScores(SCORES, "other", "xyz"), HeadScores([[1.0] * 3] * 4)]
)
def test_scores_of_different_models_are_not_merged(other):
    with pytest.raises(ValueError, match="different models cannot be merged"):
        FULL.merge(other)


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_references_tensors_load(tmp_path, dtype):
    torch.save(torch.tensor(SCORES, dtype=dtype), tmp_path / "heads.pt")
    loaded = head_scores.load(tmp_path / "heads.pt")
    assert torch.equal(loaded.tensor, torch.tensor(SCORES, dtype=dtype).float())
    assert loaded.data == "heads.pt"


def test_a_pattern_is_what_duo_attention_loads(tmp_path):
    """As its own loader reads it: a table with tabs, and two sizes; a scorer takes the same files."""
    FULL.export(tmp_path / "new" / "pattern", sink_size=2, recent_size=3)
    table = tmp_path / "new" / "pattern" / "full_attention_heads.tsv"
    assert np.loadtxt(table, dtype=float, delimiter="\t").tolist() == SCORES
    config = json.loads(table.with_name("config.json").read_text())
    assert (config["sink_size"], config["recent_size"]) == (2, 3)
    assert head_scores.load(table) == FULL
    convert("duo_attention", table, tmp_path / "file")
    kv = model().prefill(ids(20), scorer=DuoAttention(path=tmp_path / "file"))
    torch.testing.assert_close(kv.scores[..., 0], FULL.tensor)
    assert kv.level == "duo(sink_size=2, recent_size=3)"


def test_a_trained_pattern_is_read(tmp_path):
    """Values a little out of range, a config of its own, or none."""
    path = tmp_path / "full_attention_heads.tsv"
    path.write_text("0.9\t-0.01\n" * 3 + "1.2\t0.5\n")
    assert head_scores.load(path).scores == [[0.9, 0.0]] * 3 + [[1.0, 0.5]]
    (tmp_path / "config.json").write_text('{"sink_size": 64, "lr": 0.02, "model_name": "some"}')
    assert head_scores.load(path).data == "full_attention_heads.tsv"
    assert model().prefill(ids(20), load_score=str(path)).head_scores.tolist()[3] == [1.0, 0.5]


@pytest.mark.parametrize("content", ["", "a\tb\n", "0.1\t0.2\n0.3\n", "nan\t1\n"])
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_a_table_that_is_no_pattern_is_refused_by_name(tmp_path, content):
    path = tmp_path / "heads.tsv"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"heads.tsv is not a DuoAttention pattern"):
        head_scores.load(path)


def test_scores_that_a_pattern_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"from -3 to 0\.5; a DuoAttention pattern has 0 to 1"):
        HeadScores([[-3.0, 0.5]]).export(tmp_path)
    with pytest.raises(ValueError, match="got -1 and 256"):
        FULL.export(tmp_path, sink_size=-1)
    assert not list(tmp_path.iterdir())


class Executed:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_is_refused_and_not_executed(tmp_path, legacy):
    path, trap = tmp_path / "heads.pt", Executed(tmp_path / "executed")
    if legacy:
        path.write_bytes(pickle.dumps(trap))
    else:
        torch.save({"scores": torch.tensor(SCORES), "trap": trap}, path)
    with pytest.raises(ValueError, match=r"heads\.pt"):
        head_scores.load(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 100, b"PK\x03\x04 half a zip", b"\x80\x02}q\x00.", b"hello\n", b"I5\n."]
)
def test_a_damaged_tensor_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "heads.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"heads\.pt"):
        head_scores.load(tmp_path / "heads.pt")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_whatever_is_damaged_in_a_tensor_file_is_refused_by_name_or_harmless(tmp_path):
    path, draw = tmp_path / "heads.pt", random.Random(0)
    torch.save(torch.tensor(SCORES), path, _use_new_zipfile_serialization=False)
    whole, refused = path.read_bytes(), 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            head_scores.load(path)
        except ValueError as error:
            refused += str(path) in str(error) or "scores" in str(error)
    assert refused > 100


@pytest.mark.parametrize(
    "thing", [{"a": torch.zeros(2, 2)}, [torch.zeros(2, 2)], torch.zeros(4), torch.full((2, 2), torch.nan)]
)
def test_a_tensor_file_with_something_else_is_refused(tmp_path, thing):
    torch.save(thing, tmp_path / "heads.pt")
    with pytest.raises(ValueError, match=r"expected a tensor|must be finite"):
        head_scores.load(tmp_path / "heads.pt")


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.pop("format"),
        lambda facts: facts.update(format="kvzip-head-scores/9"),
        lambda facts: facts.update(scores=[[1.0], [2.0, 3.0]]),
        lambda facts: facts.update(scores="none"),
        lambda facts: facts.pop("scores"),
        lambda facts: facts.update(more=1),
    ],
)
def test_an_altered_json_file_is_refused_by_name(tmp_path, saved, change):
    facts = json.loads(saved.read_text())
    change(facts)
    saved.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"tiny\.json is not a head-score file"):
        head_scores.load(saved)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"\xff\xfe\x00", b"[" * 100_000])
def test_a_file_that_is_no_json_is_refused_by_name(saved, content):
    saved.write_bytes(content)
    with pytest.raises(ValueError, match=r"tiny\.json"):
        head_scores.load(saved)


def test_an_unknown_name_answers_with_what_there_is():
    with pytest.raises(ValueError, match="no head scores 'no-such-model'") as error:
        head_scores.load("no-such-model")
    assert all(repr(name) in str(error.value) for name in head_scores.available())
    with pytest.raises(ValueError, match="no head-score file named"):
        head_scores.load([])
    for name in head_scores.available():
        loaded = head_scores.load(name)
        assert loaded.model
        assert loaded.data
        with pytest.raises(ValueError, match=f"did you mean {name!r}"):
            head_scores.load(name + "s")


# -- use ---------------------------------------------------------------------------------------------------------------


def count_forwards(call):
    passes = []
    handle = model().model.base_model.register_forward_hook(lambda *_: passes.append(1))
    try:
        return call(), len(passes)
    finally:
        handle.remove()


def test_loaded_scores_replace_the_scoring_pass(saved):
    kv, passes = count_forwards(lambda: model().prefill(ids(30), load_score=saved, prefill_chunk_size=10))
    assert passes == 3, "the prefill's own chunks and no more"
    assert kv.scorers == ()
    assert kv.level == "head"
    assert kv.head_scores.tolist() == torch.tensor(SCORES).tolist()
    result = kv.prune(0.5)
    assert result.threshold == pytest.approx(0.3)
    assert result.ratio == 0.5
    heads = torch.tensor([[1, 0], [1, 0], [0, 1], [1, 0]], dtype=torch.bool)
    assert torch.equal(kv.keep_mask, heads[..., None].expand(4, 2, 30))
    assert len(model().generate(ids(3), kv, max_new_tokens=4, eos_token_id=None)) == 4


@pytest.mark.parametrize("level", ["pair", "pair-uniform"])
def test_there_are_no_pair_scores_then(saved, level):
    kv = model().prefill(ids(30), load_score=str(saved))
    with pytest.raises(ValueError, match="only head scores were loaded"):
        kv.prune(0.5, level)
    assert kv.ratio == 1


def test_several_files_are_merged(tmp_path, saved):
    HeadScores([[0.4, 0.4]] * 4, model="tiny").save(tmp_path / "more.json")
    kv = model().prefill(ids(30), load_score=[saved, tmp_path / "more.json"])
    assert torch.equal(kv.head_scores, torch.tensor(SCORES).clamp_min(0.4))


def test_all_heads_tied_still_keep_the_exact_count(tmp_path):
    HeadScores([[1.0, 1.0]] * 4).save(tmp_path / "ties.json")
    kv = model().prefill(ids(30), load_score=tmp_path / "ties.json")
    assert kv.prune(0.2).ratio == 2 / 8
    assert kv.kv_len_per_head.tolist() == [[30, 30], [0, 0], [0, 0], [0, 0]]


def test_scores_that_do_not_fit_are_refused_before_anything_is_computed(tmp_path):
    HeadScores(SCORES[:3]).save(tmp_path / "short.json")
    passes = []
    handle = model().model.base_model.register_forward_hook(lambda *_: passes.append(1))
    try:
        with pytest.raises(ValueError, match=r"\(3, 2\).*\(4, 2\)"):
            model().prefill(ids(30), load_score=tmp_path / "short.json")
    finally:
        handle.remove()
    assert not passes, "a long prefill for nothing"


def test_scores_of_other_weights_warn_and_are_used(tmp_path):
    FULL.save(tmp_path / "other.json")
    with pytest.warns(UserWarning, match="tiny with other weights"):
        kv = model().prefill(ids(30), load_score=tmp_path / "other.json")
    assert kv.level == "head"


def test_none_shipped_for_this_model_is_an_error():
    with pytest.raises(ValueError, match="no head scores"):
        model().prefill(ids(30), load_score=True)


def test_own_scores_serve_where_none_were_loaded():
    kv = model().prefill(ids(30), scorer="random")
    kv.prune(0.5, "head")
    kept = kv.scores.amax(-1).flatten().topk(4).indices
    assert sorted(kept.tolist()) == kv.keep_mask.all(-1).flatten().nonzero().flatten().tolist()
