"""Files that scorers read: written and read back, refused with a reason, and converted from releases."""

import json
import pickle
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvzip import ModelKVzip
from kvzip.scoring import get_scorer
from kvzip.scoring.files import ScorerFile, convert
from kvzip.scoring.gates import MLPGate
from kvzip.scoring.methods.duo_attention import DuoAttention
from kvzip.scoring.methods.gate import TrainedGate
from kvzip.scoring.methods.kvzap import KVzap
from kvzip.scoring.methods.qfilter import QFilter
from tests.tiny import build, ids

FILTERS = {"q_filters": torch.arange(64.0).view(4, 2, 8)}
NEED_A_FILE = ("qfilter", "kvzap", "fastkvzip", "expected_attention_stats", "restorekv")


@cache
def model_of(name="llama", seed=0):
    return ModelKVzip.from_model(build(name, seed), None)


def gates(kind=MLPGate, layers=4, sizes=(32, 2, 3)):
    torch.manual_seed(0)
    states = [kind(*sizes).state_dict() for _ in range(layers)]
    return {f"layers.{row}.{name}": tensor for row, state in enumerate(states) for name, tensor in state.items()}


@pytest.fixture
def path(tmp_path):
    """A file of filters for the shared model's weights."""
    ScorerFile("qfilter", FILTERS, "tiny", model_of().model_id["weights"], {"a": 1}).save(tmp_path / "filters")
    return tmp_path / "filters"


# -- one file ----------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded_and_the_same_content_gives_the_same_bytes(path, tmp_path):
    found = ScorerFile.load(path, "qfilter")
    assert (found.method, found.model, found.settings) == ("qfilter", "tiny", {"a": 1})
    assert found.model_id == model_of().model_id["weights"]
    assert torch.equal(found.tensors["q_filters"], FILTERS["q_filters"])
    found.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_a_loaded_file_may_change_on_the_disk(path):
    found = ScorerFile.load(path, "qfilter")
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(found.tensors["q_filters"], FILTERS["q_filters"])


def test_half_precision_is_read_as_float32(tmp_path):
    header = {"format": "kvzip-scorer/1", "method": "qfilter"}
    half = {"q_filters": FILTERS["q_filters"].bfloat16()}
    save_file(half, tmp_path / "half", metadata={"kvzip": json.dumps(header)})
    assert ScorerFile.load(tmp_path / "half", "qfilter").tensors["q_filters"].dtype == torch.float32


def test_a_path_and_tensors_give_the_same_scores_by_name_too(path):
    by_path, by_name, given = (
        model_of().prefill(ids(9), scorer=scorer).scores
        for scorer in (QFilter(path=path), f"qfilter(path={str(path)!r})", QFilter(weights=FILTERS))
    )
    assert torch.equal(by_path, given)
    assert torch.equal(by_path, by_name)


@pytest.mark.parametrize("name", NEED_A_FILE)
def test_without_a_file_a_method_says_what_it_needs(name):
    """Before anything is paid for; and being listed needs none."""
    scorer = get_scorer(name)
    with pytest.raises(ValueError, match=rf"{name}\(path='...'\).*nothing is downloaded.*convert"):
        model_of().prefill(ids(9), scorer=scorer)
    with pytest.raises(FileNotFoundError, match=rf"nowhere.*{name}.*nothing is downloaded"):
        get_scorer(f"{name}(path='nowhere')")


@pytest.mark.parametrize("wrong", [3, None, ["a"]])
def test_a_path_is_a_path(wrong):
    with pytest.raises(ValueError, match="must be that of a file"):
        ScorerFile.load(wrong, "qfilter")


def test_path_and_tensors_together_are_refused(path):
    with pytest.raises(ValueError, match="path or weights, not both"):
        QFilter(path=path, weights=FILTERS)


# -- refused -----------------------------------------------------------------------------------------------------------


def foreign(path):
    save_file(FILTERS, path)


def other_format(path):
    save_file(FILTERS, path, metadata={"kvzip": json.dumps({"format": "kvzip-scorer/9", "method": "qfilter"})})


def no_json(path):
    save_file(FILTERS, path, metadata={"kvzip": "{"})


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def pickled(path):
    path.write_bytes(pickle.dumps(FILTERS))


def other_method(path):
    replace(ScorerFile.load(path, "qfilter"), method="kvzap").save(path)


def other_names(path):
    ScorerFile("qfilter", {"filters": FILTERS["q_filters"]}).save(path)


def not_finite(path):
    save_file(
        {"q_filters": torch.full((4, 2, 8), torch.nan)},
        path,
        metadata={"kvzip": json.dumps({"format": "kvzip-scorer/1", "method": "qfilter"})},
    )


def flat(path):
    ScorerFile("qfilter", {"q_filters": torch.zeros(64)}).save(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (foreign, "format None; expected 'kvzip-scorer/1'.*convert"),
        (other_format, "'kvzip-scorer/9'"),
        (no_json, "not a whole safetensors file"),
        (cut, "not a whole safetensors file"),
        (pickled, "not a whole safetensors file"),
        (other_method, "for scorer 'kvzap', not for 'qfilter'"),
        (other_names, r"\['filters'\]; expected \['q_filters'\]"),
        (not_finite, "'q_filters' is not a tensor of finite numbers"),
        (flat, r"shape \(64,\), expected .*layers, heads, head_dim"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_when_the_scorer_is_made(path, change, words):
    change(path)
    with pytest.raises(ValueError, match=words) as error:
        QFilter(path=path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("scorer", "words"),
    [
        (QFilter(weights={"q_filters": torch.zeros(5, 2, 8)}), r"\(5, 2, 8\), expected \(4, 2, 8\)"),
        (QFilter(weights={"q_filters": torch.zeros(4, 2, 9)}), r"\(4, 2, 9\), expected \(4, 2, 8\)"),
        (DuoAttention(weights={"head_scores": torch.zeros(2, 4)}), r"\(2, 4\), expected \(4, 2\)"),
        (KVzap(weights=gates(layers=5)), "'layers': 4"),
        (KVzap(weights=gates(layers=3)), "3 gates of hidden size.*layer 3 of this model"),
        (KVzap(weights=gates(sizes=(31, 2, 3))), r"hidden size \[31\], layer 0 of this model has 32"),
        (KVzap(weights=gates(sizes=(32, 4, 3))), r"\[4, 4, 4, 4\] heads.*'heads': 2"),
    ],
    ids=str,
)
def test_weights_of_another_model_are_refused_by_their_shapes(scorer, words):
    with pytest.raises(ValueError, match=words):
        model_of().prefill(ids(9), scorer=scorer)


def test_statistics_are_for_as_many_query_heads_as_the_model_has():
    weights = {"query_mean": torch.zeros(4, 8, 8), "query_cov": torch.zeros(4, 8, 8, 8)}
    with pytest.raises(ValueError, match=r"\(4, 8, 8\), expected \(4, 4, 8\)"):
        model_of().prefill(ids(9), scorer=type(get_scorer("expected_attention_stats"))(weights=weights))


def test_other_weights_of_the_same_shape_are_refused_unless_asked_for(path):
    other = model_of(seed=1)
    with pytest.raises(ValueError, match=r"made for tiny with weights .*any_weights=True"):
        other.prefill(ids(9), scorer=QFilter(path=path))
    assert other.prefill(ids(9), scorer=QFilter(path=path, any_weights=True)).scores.isfinite().all()
    replace(ScorerFile.load(path, "qfilter"), model_id="").save(path)
    assert other.prefill(ids(9), scorer=QFilter(path=path)).scores.isfinite().all()


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"layers.0.weight": torch.zeros(2, 32)}, "of no known gate"),
        ({"0.weight": torch.zeros(2, 32)}, "'0.weight' is of no gate"),
        ({"layers.1.weight": torch.zeros(2, 32), "layers.1.bias": torch.zeros(2)}, r"layers \[1\]"),
        ({"layers.0.weight": torch.zeros(2, 32), "layers.0.bias": torch.zeros(3)}, "do not make a linear gate"),
        ({"layers.0.weight": torch.zeros(32), "layers.0.bias": torch.zeros(2)}, "do not make a linear gate"),
        ({}, r"layers \[\]"),
    ],
)
def test_gates_that_are_not_whole_are_refused(weights, words):
    with pytest.raises(ValueError, match=words):
        TrainedGate(weights=weights)


def test_a_method_takes_its_own_kind_of_gate():
    with pytest.raises(ValueError, match=r"mlp.*'fastkvzip' takes \('low-rank',\)"):
        type(get_scorer("fastkvzip"))(weights=gates())


# -- the shipped gate --------------------------------------------------------------------------------------------------


def test_the_bundled_model_has_a_gate_and_no_other_model_takes_it():
    model = ModelKVzip()
    text = "The red box holds 4417. The blue box holds 9035. " * 8
    kv = model.prefill(text, scorer="gate", prefill_chunk_size=33)
    assert kv.scorers == ("gate",)
    torch.testing.assert_close(kv.scores, model.prefill(text, scorer="gate").scores, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"the gate shipped for the bundled model.*tools.train_gate trains a gate"):
        model_of().prefill(ids(9), scorer="gate")


# -- converted ---------------------------------------------------------------------------------------------------------


class Harmful:
    """Would write a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_in_a_pt_file_is_executed(tmp_path):
    torch.save({"module": [Harmful(tmp_path / "written")]}, tmp_path / "release.pt")
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        convert("fastkvzip", tmp_path / "release.pt", tmp_path / "out")
    assert not (tmp_path / "written").exists()
    assert not (tmp_path / "out").exists()


def test_trained_patterns_bring_the_sizes_of_their_windows(tmp_path):
    (tmp_path / "full_attention_heads.tsv").write_text("0.9\t0.1\n" * 3 + "1.2\t-0.1\n")
    (tmp_path / "config.json").write_text('{"sink_size": 2, "recent_size": 3, "lr": 0.02}')
    convert("duo_attention", tmp_path / "full_attention_heads.tsv", tmp_path / "out", model="tiny")
    kv = model_of().prefill(ids(30), prefix_ids=ids(3), scorer=DuoAttention(path=tmp_path / "out"))
    torch.testing.assert_close(kv.scores[..., 0], torch.tensor([[0.9, 0.1]] * 3 + [[1.0, 0.0]]))
    assert kv.level == "duo(sink_size=2, recent_size=3)"
    kv.prune(0.5)
    assert (kv.kv_len_per_head - 3).tolist() == [[30, 5]] * 2 + [[5, 5]] + [[30, 5]]


def test_layers_of_a_hybrid_model_are_picked(tmp_path):
    save_file(gates(layers=4), tmp_path / "release.safetensors")
    convert("kvzap", tmp_path / "release.safetensors", tmp_path / "out", layers=[1, 3])
    found = load_file(tmp_path / "out")
    assert {name.split(".")[1] for name in found} == {"0", "1"}
    assert torch.equal(found["layers.1.0.weight"], gates()["layers.3.0.weight"])
    save_file(FILTERS, tmp_path / "release.safetensors")
    convert("qfilter", tmp_path / "release.safetensors", tmp_path / "out", layers=[1, 3])
    assert torch.equal(load_file(tmp_path / "out")["q_filters"], FILTERS["q_filters"][[1, 3]])
    for method, tensors in (("kvzap", gates(layers=4)), ("qfilter", FILTERS)):
        save_file(tensors, tmp_path / "release.safetensors")
        with pytest.raises(ValueError, match=r"layers \[1, 4\] are not all among"):
            convert(method, tmp_path / "release.safetensors", tmp_path / "out", layers=[1, 4])


def test_what_is_no_release_of_the_method_is_refused(tmp_path):
    save_file(FILTERS, tmp_path / "release.safetensors")
    (tmp_path / "release.bin").write_bytes(b"")
    for method, source, words in (
        ("kvzap", "release.safetensors", "'q_filters' is of no gate"),
        ("qfilter", "release.bin", "is none of"),
        ("qfliter", "release.safetensors", "did you mean 'qfilter'"),
        ("knorm", "release.safetensors", "'knorm' reads no file"),
    ):
        with pytest.raises(ValueError, match=words):
            convert(method, tmp_path / source, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert("qfilter", tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()
