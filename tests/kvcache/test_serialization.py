"""A saved kv answers as before, in any process, and a save that fails leaves what was there."""

import os
import stat
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from kvzip import ModelKVzip
from kvzip.kvcache import serialization
from tests.tiny import build, ids

QUERY, GREEDY = ids(5, seed=3), {"max_new_tokens": 8, "eos_token_id": None}


@cache
def model_of(name="llama"):
    return ModelKVzip.from_model(build(name), None)


def prefill(name="llama", **options):
    return model_of(name).prefill(ids(60, seed=1), **{"prefix_ids": ids(4, seed=2), "scorer": "random", **options})


def evicted(name):
    kv = prefill(name)
    kv.prune(0.4)
    return kv


def masked(name):
    kv = prefill(name, kv_type="retain")
    kv.prune(0.4, "pair-uniform")
    return kv


def some_heads_empty(name):
    kv = prefill(name, prefix_ids=[])
    keep = kv.keep_mask.clone()
    keep[0] = keep[1, 0] = False
    kv.prune_to(keep)
    return kv


def head_scored(name):
    kv = prefill(name, scorer=None)
    kv.set_head_scores(torch.rand(kv.keep_mask.shape[:2], generator=torch.Generator().manual_seed(1)))
    kv.prune(0.6)
    return kv


def several_scorers(name):
    return prefill(name, scorer=["knorm", "random", "streaming_llm"])


def kept_turns(name):
    kv = evicted(name)
    for seed in (7, 8):
        model_of(name).generate(ids(9, seed=seed), kv, update_cache=True, **GREEDY)
    return kv


KINDS = {
    kind.__name__: kind
    for kind in (prefill, evicted, masked, some_heads_empty, head_scored, several_scorers, kept_turns)
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mistral"])
@each_kind
def test_a_loaded_kv_is_the_saved_one(tmp_path, kind, name):
    kv, model = KINDS[kind](name), model_of(name)
    kv.save(tmp_path / "kv")
    loaded = model.load_kv(tmp_path / "kv")
    for fact in (
        "kv_type",
        "level",
        "scorers",
        "pruned_with",
        "ratio",
        "nbytes",
        "full_nbytes",
        "tail_length",
        "model_id",
    ):
        assert getattr(loaded, fact) == getattr(kv, fact), fact
    assert repr(loaded) == repr(kv)
    assert loaded.input_ids.tolist() == kv.input_ids.tolist()
    assert torch.equal(loaded.keep_mask, kv.keep_mask)
    assert all(torch.equal(loaded.scores_of(one), kv.scores_of(one)) for one in kv.scorers)
    assert torch.equal(model(QUERY, loaded), model(QUERY, kv))
    assert model.generate(QUERY, loaded, **GREEDY).tolist() == model.generate(QUERY, kv, **GREEDY).tolist()
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "kv").read_bytes()


IN_ANOTHER_PROCESS = """
import sys
from kvzip import ModelKVzip
from tests.tiny import build
for name, path in zip(sys.argv[1::2], sys.argv[2::2]):
    model = ModelKVzip.from_model(build(name), None)
    print(model.generate({query}, model.load_kv(path), max_new_tokens=8, eos_token_id=None).tolist())
"""


def test_another_process_gives_the_same_answer(tmp_path):
    arguments, expected = [], []
    for name, kind in (("llama", kept_turns), ("gemma3_text", masked)):
        kv = kind(name)
        kv.save(tmp_path / name)
        arguments += [name, str(tmp_path / name)]
        expected.append(str(model_of(name).generate(QUERY, kv, **GREEDY).tolist()))
    program = IN_ANOTHER_PROCESS.replace("{query}", str(QUERY))
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:2] == expected


@each_kind
def test_saving_twice_gives_the_same_bytes(tmp_path, kind):
    kv = KINDS[kind]("llama")
    for name in ("a", "b"):
        kv.save(tmp_path / name)
        model_of().generate(QUERY, kv, **GREEDY)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_loaded_kv_can_be_pruned_on(tmp_path):
    for kind, ratio in ((evicted, 0.2), (masked, 0.9), (head_scored, 0.3)):
        kv = kind("llama")
        kv.save(tmp_path / "kv")
        loaded = model_of().load_kv(tmp_path / "kv")
        assert loaded.prune(ratio) == kv.prune(ratio)
        assert torch.equal(model_of()(QUERY, loaded), model_of()(QUERY, kv))
    kv = evicted("llama")
    kv.save(tmp_path / "kv")
    with pytest.raises(ValueError, match="left in this evicted cache"):
        model_of().load_kv(tmp_path / "kv").prune(0.9)


def test_a_loaded_kv_does_not_hang_on_its_file(tmp_path):
    """Another program may rewrite the file in place, or cut it, while the kv is in use."""
    evicted("llama").save(tmp_path / "kv")
    loaded = model_of().load_kv(tmp_path / "kv")
    size = (tmp_path / "kv").stat().st_size
    with open(tmp_path / "kv", "r+b") as file:
        file.write(b"\xff" * size)
    assert torch.equal(model_of()(QUERY, loaded), model_of()(QUERY, evicted("llama")))


# -- saving ------------------------------------------------------------------------------------------------------------


def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path, kv = tmp_path / "kv", evicted("llama")
    kv.save(path)
    old = path.read_bytes()

    def half(tensors, target, metadata):
        Path(target).write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(serialization, "save_file", half)
    kv.prune(0.1)
    for target in (path, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            kv.save(target)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    kv.save(path)
    assert model_of().load_kv(path).ratio == kv.ratio


def test_a_saved_file_has_the_permissions_of_any_new_file(tmp_path):
    """It is made to be handed to others."""
    umask = os.umask(0o022)
    try:
        evicted("llama").save(tmp_path / "kv")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "kv").stat().st_mode) == 0o644


def test_a_missing_folder_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"/no/kv cannot be written: there is no folder .*/no$"):
        evicted("llama").save(tmp_path / "no" / "kv")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        evicted("llama").save(tmp_path)
    assert not list(tmp_path.iterdir())
