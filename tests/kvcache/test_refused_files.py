"""A file that is not exactly what was saved is refused with a clear error, and nothing in it is executed."""

import json
import pickle
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvzip import ModelKVzip
from kvzip.kvcache import serialization
from tests.kvcache.test_serialization import evicted, kept_turns, model_of
from tests.model.test_generation import TEMPLATE, VOCAB, byte_tokenizer
from tests.tiny import build, ids


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Bytes of a saved kv."""
    path = tmp_path_factory.mktemp("saved") / "kv"
    kept_turns("llama").save(path)
    return path.read_bytes()


def refused(path, match=None):
    with pytest.raises(ValueError, match=match) as error:
        model_of().load_kv(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        model_of().load_kv(tmp_path / "nothing-here")


def test_a_truncated_or_longer_file_is_refused(tmp_path, saved):
    head = 8 + int.from_bytes(saved[:8], "little")
    lengths = {0, 1, 7, 8, 9, head - 1, head, head + 1, len(saved) // 2, len(saved) - 1}
    lengths |= set(random.Random(0).sample(range(len(saved)), 30))
    for length in sorted(lengths):
        (tmp_path / "cut").write_bytes(saved[:length])
        refused(tmp_path / "cut")
    for rest in (b"\0", saved):
        (tmp_path / "long").write_bytes(saved + rest)
        refused(tmp_path / "long")


def test_one_changed_byte_anywhere_is_refused(tmp_path, saved):
    """Every byte of the beginning, and samples of the header's rest and of the data, each changed in several ways."""
    head, draw = 8 + int.from_bytes(saved[:8], "little"), random.Random(1)
    padding = len(saved[:head]) - len(saved[:head].rstrip(b" "))
    places = [*range(40), *draw.sample(range(40, head - padding), 250), *draw.sample(range(head, len(saved)), 100)]
    for place in [*places, len(saved) - 1]:
        change = draw.choice([1, 2, 4, 8, 16, 32, 64, 128, 255])
        altered = bytearray(saved)
        altered[place] ^= change
        (tmp_path / "kv").write_bytes(altered)
        with pytest.raises(ValueError, match="kv"):
            model_of().load_kv(tmp_path / "kv")


def rewritten(saved, path, change):
    """The saved file with `change(tensors, metadata)` applied and no new checksum."""
    path.write_bytes(saved)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata or None)
    return path


CHANGES = {
    "no metadata": lambda tensors, metadata: metadata.clear(),
    "more metadata": lambda tensors, metadata: metadata.update(note="hello"),
    "metadata is no JSON": lambda tensors, metadata: metadata.update(kvzip="{"),
    "metadata is a list": lambda tensors, metadata: metadata.update(kvzip="[]"),
    "metadata is a number": lambda tensors, metadata: metadata.update(kvzip="3"),
    "metadata nests deeply": lambda tensors, metadata: metadata.update(kvzip="[" * 100_000),
    "other format": lambda tensors, metadata: metadata.update(kvzip='{"format": "kvzip-kv/2"}'),
    "no checksum": lambda tensors, metadata: metadata.update(
        kvzip=json.dumps({k: v for k, v in json.loads(metadata["kvzip"]).items() if k != "sha256"})
    ),
    "more tensors": lambda tensors, metadata: tensors.update(more=torch.zeros(1)),
    "fewer tensors": lambda tensors, metadata: tensors.pop("layers.2.keys"),
    "other dtype": lambda tensors, metadata: tensors.update(input_ids=tensors["input_ids"].int()),
    "other shape": lambda tensors, metadata: tensors.update({"scores.random": tensors["scores.random"].flatten()}),
    "keys and values exchanged": lambda tensors, metadata: tensors.update(
        {"layers.0.keys": tensors["layers.0.values"], "layers.0.values": tensors["layers.0.keys"].clone()}
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_an_altered_file_is_refused(tmp_path, saved, what):
    refused(rewritten(saved, tmp_path / "kv", CHANGES[what]))


FORGERIES = {
    "lengths too long": lambda header: header["layers"][0].update(lengths=[10**6, 1]),
    "lengths not numbers": lambda header: header["layers"][0].update(lengths="many"),
    "negative prefix": lambda header: header["layers"][0].update(prefix_length=-5),
    "no layers": lambda header: header.pop("layers"),
    "a layer without kind": lambda header: header["layers"][0].pop("kind"),
    "scorer without scores": lambda header: header["scorers"].append("knorm"),
    "unknown kv_type": lambda header: header.update(kv_type="both"),
    "model_id is a text": lambda header: header.update(model_id="mine"),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_forged_file_with_a_right_checksum_is_refused_too(tmp_path, saved, what):
    """A checksum is no signature: what a file says about itself is checked before it is used."""

    def forge(tensors, metadata):
        header = json.loads(metadata["kvzip"])
        header.pop("sha256")
        FORGERIES[what](header)
        header["sha256"] = serialization._digest(header, tensors)
        metadata["kvzip"] = json.dumps(header, sort_keys=True)

    refused(rewritten(saved, tmp_path / "kv", forge))


class Executed:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_other_files_are_refused_and_nothing_is_executed(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("not a safetensors file at all")
    (tmp_path / "empty").touch()
    (tmp_path / "pickle").write_bytes(pickle.dumps(Executed(tmp_path / "executed")))
    torch.save({"x": Executed(tmp_path / "executed")}, tmp_path / "torch.pt")
    for name in ("other.safetensors", "text", "empty", "pickle", "torch.pt"):
        refused(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_other_weights_and_another_architecture_are_refused_by_name(tmp_path):
    evicted("llama").save(tmp_path / "kv")
    for other in (build("llama", seed=1), build("qwen3"), build("llama", num_hidden_layers=3)):
        with pytest.raises(ValueError, match="another weights"):
            ModelKVzip.from_model(other, None).load_kv(tmp_path / "kv")


def test_another_tokenizer_is_refused_by_name(tmp_path):
    same = build("llama", vocab_size=VOCAB)
    ModelKVzip.from_model(same, byte_tokenizer()).prefill(ids(20), scorer=None).save(tmp_path / "kv")
    for tokenizer in (None, byte_tokenizer(TEMPLATE + " ")):
        with pytest.raises(ValueError, match="another tokenizer"):
            ModelKVzip.from_model(same, tokenizer).load_kv(tmp_path / "kv")
    loaded = ModelKVzip.from_model(same, byte_tokenizer()).load_kv(tmp_path / "kv")
    assert loaded.context_length == 20
