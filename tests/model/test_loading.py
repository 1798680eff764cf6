"""From a name to a model, and from a context to a kv: what is accepted, and how the rest is refused."""

import math

import pytest
import torch
from tokenizers import normalizers
from transformers import AutoModelForCausalLM

from kvzip import ModelKVzip
from kvzip.model.loading import ALIASES, BUNDLED, bundled_path, resolve_name
from kvzip.scoring import list_scorers
from tests.model.test_generation import VOCAB, byte_tokenizer, model_of
from tests.tiny import build, ids

TEXT = "Anna lives in Rome.\nBob keeps bees."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny llama with its tokenizer."""
    path = tmp_path_factory.mktemp("tiny-llama")
    build("llama", vocab_size=VOCAB).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


# -- names -------------------------------------------------------------------------------------------------------------


def test_names_that_resolve(folder):
    assert resolve_name(BUNDLED) == str(bundled_path())
    assert resolve_name("qwen2.5-7b") == ALIASES["qwen2.5-7b"]
    assert resolve_name("owner/name-1.0") == "owner/name-1.0"
    assert resolve_name(str(folder)) == str(folder)
    assert all(target.count("/") == 1 for target in ALIASES.values())


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("qwen2.5-7B", "qwen2.5-7b"), ("llama3.1", "llama3.1-8b"), ("bundle", "bundled"), ("zzzzzz", None)],
)
def test_an_unknown_name_answers_with_the_nearest(name, nearest):
    for call in (resolve_name, ModelKVzip):
        with pytest.raises(ValueError, match="unknown model") as error:
            call(name)
        message = str(error.value)
        assert repr(name) in message
        assert all(repr(choice) in message for choice in (BUNDLED, *ALIASES))
        assert nearest is None or repr(nearest) in message.split("did you mean")[1]


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such", "~/no-such-folder-here", "a/b/c", "../x"])
def test_a_missing_folder_is_never_looked_for_on_the_hub(name):
    with pytest.raises(ValueError, match="no model folder") as error:
        ModelKVzip(name)
    assert repr(name) in str(error.value)


def test_a_folder_without_a_model_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"without a config\.json"):
        ModelKVzip(str(tmp_path))


# -- loading -----------------------------------------------------------------------------------------------------------


def test_a_saved_folder_gives_the_same_model(folder):
    loaded, ours = ModelKVzip(str(folder), device="cpu"), model_of()
    assert loaded.name == str(folder)
    assert loaded.model_id == ours.model_id
    kv, expected = loaded.prefill(TEXT, scorer="random"), ours.prefill(TEXT, scorer="random")
    assert torch.equal(loaded([7, 8], kv), ours([7, 8], expected))
    assert loaded.generate("Who?", kv, max_new_tokens=5) == ours.generate("Who?", expected, max_new_tokens=5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_dtype_passes_through(folder, dtype):
    model = ModelKVzip(str(folder), dtype=dtype, device="cpu")
    assert model.dtype == torch.bfloat16
    kv = model.prefill(TEXT, scorer=["kvzip", "kvzip_plus"])
    assert kv.scores.dtype == torch.float32
    assert all(layer.store.keys.dtype == torch.bfloat16 for layer in kv.layers)
    kv.prune(0.3)
    assert model([7, 8], kv).dtype == torch.bfloat16
    assert isinstance(model.generate("Who?", kv, max_new_tokens=3), str)


def test_device_map_auto_works_and_every_tensor_is_on_its_layers_device(folder):
    model = ModelKVzip(str(folder), device_map="auto")
    kv = model.prefill(TEXT, scorer="kvzip")
    kv.prune(0.5)
    assert [layer.store.keys.device for layer in kv.layers] == model.layer_devices
    assert torch.equal(model([7, 8], kv), model([7, 8], kv.to(model.layer_devices)))


def test_device_and_device_map_exclude_each_other(folder):
    with pytest.raises(ValueError, match=r"device \('cpu'\).*device_map \('auto'\)"):
        ModelKVzip(str(folder), device="cpu", device_map="auto")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "gpu"}, "device 'gpu' cannot be used"),
        ({"device": 3.5}, "device '3.5' cannot be used"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used.*torch sees cpu"),
        ({"dtype": "float3"}, "unknown dtype 'float3'"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"dtype": None}, "unknown dtype None"),
        ({"backend": "cpuu"}, "unknown backend 'cpuu'.*did you mean 'cpu'"),
        ({"name": None}, "named by a text, got None"),
        ({"name": " "}, "named by a text"),
    ],
    ids=str,
)
def test_a_bad_choice_is_told_before_any_weight_is_read(monkeypatch, options, words):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=words):
        ModelKVzip(**options)


def test_other_arguments_reach_transformers(folder):
    model = ModelKVzip(str(folder), device="cpu", attn_implementation="eager")
    assert model.restore().config._attn_implementation == "eager"


def test_bad_constructor_choices_name_value_and_choices(folder):
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for options, choices in (
        ({"kv_type": "drop"}, ["'drop'", "evict", "retain"]),
        ({"backend": "cudnn"}, ["'cudnn'", "auto", "reference", "torch"]),
    ):
        for call in (
            lambda o=options: ModelKVzip(str(folder), **o),
            lambda o=options: ModelKVzip.from_model(plain, None, **o),
        ):
            with pytest.raises(ValueError, match="expected one of") as error:
                call()
            assert all(choice in str(error.value) for choice in choices)
    assert plain.config._attn_implementation == "sdpa", "a refused construction installs nothing"


def test_kv_type_of_the_constructor_is_the_default_of_prefill():
    model = ModelKVzip.from_model(build("llama"), None, kv_type="retain")
    assert model.prefill(ids(9), scorer=None).kv_type == "retain"
    assert model.prefill(ids(9), scorer=None, kv_type="evict").kv_type == "evict"


# -- contexts ----------------------------------------------------------------------------------------------------------


def test_text_ids_and_tensors_are_the_same_context():
    model = model_of()
    tokens = model.encode(TEXT)
    expected = model.prefill(TEXT)
    assert expected.context_length == len(tokens)
    assert expected.input_ids.tolist() == [*model.prompting.prefix_ids(), *tokens]
    for context in (tokens, tuple(tokens), torch.tensor(tokens), torch.tensor([tokens]), torch.tensor(tokens).int()):
        kv = model.prefill(context)
        assert torch.equal(kv.scores, expected.scores)
        assert torch.equal(kv.input_ids, expected.input_ids)
        assert torch.equal(model([7, 8], kv), model([7, 8], expected))


def test_the_shortest_context_works():
    """One token: at any ratio at least one pair is left, without prefix too."""
    for prefix in (None, []):
        kv = model_of().prefill([9], prefix_ids=prefix)
        for level in ("pair", "pair-uniform", "head"):
            small = kv.clone()
            small.prune(0.01, level)
            assert int(small.keep_mask.sum()) == (8 if level == "pair-uniform" else 1)
            assert model_of()([7, 8], small).isfinite().all()


BAD_CONTEXTS = {
    "empty text": ("", "empty"),
    "white text": (" \n\t", "empty"),
    "empty list": ([], "empty"),
    "empty tensor": (torch.empty(0, dtype=torch.int64), "empty"),
    "two rows": (torch.ones(2, 3, dtype=torch.int64), r"\(1, n\)"),
    "fractions": (torch.ones(3), "integers"),
    "list of fractions": ([1.0, 2.0], "integer"),
    "a text among ids": (["a", 1], "integer"),
    "nothing": (None, "context"),
    "bytes": (b"abc", "decode"),
    "a number": (7, "context"),
    "outside the vocabulary": ([5, VOCAB], str(VOCAB)),
    "negative": ([5, -1], "-1"),
    "too long": ([5] * 513, "512 positions"),
}


@pytest.mark.parametrize("what", BAD_CONTEXTS)
def test_a_bad_context_is_refused(what):
    context, words = BAD_CONTEXTS[what]
    with pytest.raises(ValueError, match=words):
        model_of().prefill(context, scorer=None)


def test_a_text_without_any_token_is_an_empty_context():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    model = ModelKVzip.from_model(build("llama", vocab_size=VOCAB), tokenizer)
    with pytest.raises(ValueError, match="empty"):
        model.prefill("xxx")


def test_a_text_without_a_tokenizer_is_refused():
    model = ModelKVzip.from_model(build("llama"), None)
    for call in (lambda: model.prefill(TEXT), lambda: model.generate("Who?", model.prefill(ids(9), scorer=None))):
        with pytest.raises(ValueError, match="no tokenizer"):
            call()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_type": "drop"}, "'drop'.*evict.*retain"),
        ({"scorer": "kvzipp"}, "'kvzipp'.*did you mean 'kvzip'"),
        ({"scorer": ["knorm", "rnd"]}, "'rnd'"),
        ({"scorer": ["knorm", "knorm"]}, "different names"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size.*0"),
        ({"prefill_chunk_size": -3}, "prefill_chunk_size.*-3"),
        ({"prefix_ids": [VOCAB]}, str(VOCAB)),
    ],
)
def test_bad_prefill_choices_name_value_and_choices(options, words):
    with pytest.raises(ValueError, match=words):
        model_of().prefill(TEXT, **options)


def test_an_unknown_scorer_lists_all():
    with pytest.raises(ValueError, match="unknown scorer") as error:
        model_of().prefill(TEXT, scorer="zzz")
    assert all(repr(info.name) in str(error.value) for info in list_scorers())


def test_an_unscored_kv_cannot_be_pruned_and_says_why():
    kv = model_of().prefill(TEXT, scorer=None)
    assert kv.scorers == ()
    for call in (lambda: kv.prune(0.5), lambda: kv.prune(0.5, "head"), lambda: kv.scores):
        with pytest.raises(ValueError, match="scorer=None"):
            call()
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        kv.prune(math.nan)
    assert kv.ratio == 1
    assert isinstance(model_of().generate("Who?", kv, max_new_tokens=2), str)
