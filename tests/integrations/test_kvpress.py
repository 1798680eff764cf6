"""Presses compress what a stock model prefills inside their block: the same pairs, really evicted."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from kvzip import KVCache, Merging, ModelKVzip
from kvzip.attention import restore
from kvzip.integrations import kvpress
from kvzip.integrations.kvpress import ComposedPress, PerLayerCompressionPress, press
from kvzip.kvcache import get_level
from kvzip.model.loading import load
from tests.integrations.pressed import CONTEXT, QUERY, SNAPKV, by_hand, run, stock, tensor
from tests.tiny import build


@pytest.fixture
def model():
    yield stock()
    restore(stock())


# -- inside the block --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_it", "scorer", "level"),
    [
        (lambda: press(SNAPKV, 0.7), SNAPKV, None),
        (lambda: press("knorm", 0.7, level="head"), "knorm", "head"),
        (lambda: kvpress.KnormPress(0.7), "knorm", "pair-uniform"),
        (lambda: kvpress.ExpectedAttentionPress(0.7), "expected_attention", "pair-uniform"),
        (lambda: kvpress.CompactorPress(0.7), "compactor", "pair-uniform"),
        (lambda: kvpress.AdaKVPress(kvpress.KeyDiffPress(0.7)), "keydiff", "adakv"),
        (lambda: kvpress.ChunkKVPress(kvpress.KnormPress(0.7), 6), "knorm", "chunkkv(chunk_length=6)"),
        (lambda: kvpress.KVComposePress(compression_ratio=0.7), "kvcompose", "kvcompose"),
    ],
)
def test_the_same_pairs_are_kept_as_without_a_press(make_it, scorer, level, model):
    kv = run(model, make_it())
    _, expected = by_hand(model, scorer, 0.3, level)
    assert torch.equal(kv.keep_mask, expected.keep_mask)
    assert kv.nbytes == expected.nbytes
    assert kv.nbytes < 0.4 * kv.full_nbytes
    held = [
        states.untyped_storage().nbytes() for one in kv.context_layers for states in (one.store.keys, one.store.values)
    ]
    assert sum(held) == kv.nbytes, "the rest is not hidden, it is gone"


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "smollm3", "phi3"])
def test_an_evicted_dynamic_cache_answers_as_the_kv_does(name):
    """The caller's own cache object, read by the stock model after the block, at the right positions."""
    model = stock(name)
    cache = DynamicCache()
    with kvpress.AdaKVPress(kvpress.KnormPress(0.5))(model) as block, torch.no_grad():
        outputs = model(tensor(CONTEXT), past_key_values=cache)
    assert outputs.past_key_values is cache
    assert cache.get_seq_length() == len(CONTEXT)
    assert block.kv.ratio == 0.5
    wrapped, kv = by_hand(model, "knorm", 0.5, "adakv")
    with torch.no_grad():
        found = model(tensor(QUERY), past_key_values=cache).logits
        torch.testing.assert_close(found, wrapped(QUERY, kv), atol=1e-5, rtol=1e-4)
        assert cache.get_seq_length() == len(CONTEXT) + len(QUERY)
    restore(model)


def test_the_pass_itself_is_the_stock_one(model):
    with torch.no_grad():
        expected = model(tensor(CONTEXT)).logits
        with kvpress.KnormPress(0.5)(model):
            found = model(tensor(CONTEXT)).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_generate_reads_the_compressed_context(model):
    """In the block a prompt of `generate` is the context, whatever the level."""
    with press("knorm", 0.5)(model) as block:
        found = model.generate(tensor(CONTEXT), max_new_tokens=6, do_sample=False)
    assert block.kv.ratio == 0.5
    with torch.no_grad():  # the first new token comes from the pass itself, the others are read from what was kept
        first = int(model(tensor(CONTEXT)).logits[0, -1].argmax())
    wrapped, kv = by_hand(model, "knorm", 0.5)
    rest = wrapped.generate([first], kv=kv, max_new_tokens=5, return_ids=True).tolist()
    assert found[0, len(CONTEXT) :].tolist() == [first, *rest]


def test_only_fresh_caches_are_compressed_and_each_of_them(model):
    cache = DynamicCache()
    with kvpress.KnormPress(0.5)(model) as block, torch.no_grad():
        model(tensor(CONTEXT), past_key_values=cache)
        first = block.kv
        model(tensor(QUERY), past_key_values=cache)
        assert block.kv is first
        assert first.tail_length == len(QUERY)
        model(tensor(QUERY), use_cache=False)
        assert block.kv is first
        model(tensor(CONTEXT[:30]))
        assert block.kv.context_length == 30


def test_the_decoder_alone_is_watched_too(model):
    """As kvpress's own pipeline calls it, without the language-model head; and arguments by position."""
    for call in (model.model, model):
        with kvpress.KnormPress(0.5)(model) as block:
            outputs = call(tensor(CONTEXT), torch.ones(1, len(CONTEXT), dtype=torch.int64))
        assert isinstance(outputs.past_key_values, KVCache)
        assert outputs.past_key_values is block.kv


def test_protected_tokens_are_kept_and_not_counted(model):
    kv = run(model, press("knorm", 0.5), prefix_length=7)
    _, expected = by_hand(model, "knorm", 0.5, context=CONTEXT[7:], prefix=CONTEXT[:7])
    assert torch.equal(kv.keep_mask, expected.keep_mask)
    assert (kv.prefix_length, kv.context_length) == (7, 53)


def test_nothing_removed_leaves_the_cache_alone(model):
    cache = DynamicCache()
    with kvpress.SnapKVPress()(model) as block, torch.no_grad():
        model(tensor(CONTEXT), past_key_values=cache)
    assert block.kv is None
    assert cache.layers[0].keys.shape[-2] == len(CONTEXT)


def test_presses_in_sequence_take_from_what_the_one_before_left(model):
    both = ComposedPress([kvpress.KnormPress(0.5), kvpress.StreamingLLMPress(0.5)])
    kv = run(model, both)
    assert kv.ratio == 0.25
    assert both.compression_ratio == 0.75
    _, expected = by_hand(model, ["knorm", "streaming_llm"], 0.5, "pair-uniform")
    expected.prune(0.25, "pair-uniform", scorer="streaming_llm")
    assert torch.equal(kv.keep_mask, expected.keep_mask)


def test_each_layer_may_have_its_own_ratio(model):
    kv = run(model, PerLayerCompressionPress(kvpress.KnormPress(), [0.1, 0.3, 0.5, 0.7]))
    assert kv.kv_len_per_head.tolist() == [[54, 54], [42, 42], [30, 30], [18, 18]]


def test_a_threshold_says_itself_how_much_is_kept(model):
    middle = float(by_hand(model, "knorm", 0.5)[1].scores.median())
    kv = run(model, kvpress.DMSPress(kvpress.KnormPress(), threshold=middle, sliding_window_size=5))
    expected = kv.scores >= middle
    expected[..., -5:] = True
    assert 0 < int(expected[..., :-5].sum()) < expected[..., :-5].numel()
    assert torch.equal(kv.keep_mask, expected)
    with pytest.raises(ValueError, match=r"threshold.*None"):
        run(model, kvpress.DMSPress(kvpress.KnormPress()))


def test_a_share_of_heads_is_kept_whole(model):
    found = kvpress.DuoAttentionPress(head_compression_ratio=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(found), "level", lambda self: get_level("duo(sink_size=2, recent_size=6)"))
        kv = run(model, found)
    lengths = kv.kv_len_per_head.flatten().tolist()
    assert sorted(lengths) == [8] * 4 + [60] * 4


# -- presses that change what is kept --------------------------------------------------------------------------------


def same_afterwards(kv, wrapped, expected):
    """The same numbers follow from both."""
    assert torch.equal(kv.keep_mask, expected.keep_mask)
    assert kv.nbytes == expected.nbytes
    torch.testing.assert_close(wrapped(QUERY, kv), wrapped(QUERY, expected), atol=1e-5, rtol=1e-4)


def test_kept_keys_can_be_moved_together(model):
    cache = DynamicCache()
    with kvpress.KeyRerotationPress(kvpress.KnormPress(0.5))(model) as block, torch.no_grad():
        model(tensor(CONTEXT), past_key_values=cache)
    wrapped, expected = by_hand(model, "knorm", 0.5, "pair-uniform")
    before = wrapped(QUERY, expected)
    expected.rerotate()
    assert cache.get_seq_length() == expected.get_seq_length() == 30
    with torch.no_grad():
        found = model(tensor(QUERY), past_key_values=cache).logits
    torch.testing.assert_close(found, wrapped(QUERY, expected), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, before, atol=1e-2)
    assert block.kv.ratio == 0.5


def test_channels_of_keys_can_go_alone_or_after_pairs(model):
    wrapped, expected = by_hand(model, "knorm", 1.0)
    expected.prune_channels(0.5, window=8)
    alone = kvpress.ThinKPress(key_channel_compression_ratio=0.5, window_size=8)
    same_afterwards(run(model, alone), wrapped, expected)
    wrapped, expected = by_hand(model, SNAPKV, 0.5, "pair-uniform")
    expected.prune_channels(0.5, window=8)
    both = ComposedPress([kvpress.SnapKVPress(0.5, window_size=8), alone])
    same_afterwards(run(model, both), wrapped, expected)
    assert both.compression_ratio == 1 - 0.5 * 0.75


def test_evicted_values_can_live_on(model):
    wrapped, expected = by_hand(model, "knorm", 1.0)
    plain = expected.clone()
    plain.prune(0.5, "pair-uniform")
    expected.prune(0.5, "pair-uniform", merge=Merging(0.1, 0.75))
    kv = run(model, kvpress.MergingPress(kvpress.KnormPress(0.5), similarity_threshold=0.1, merge_fraction=0.75))
    same_afterwards(kv, wrapped, expected)
    assert not torch.allclose(wrapped(QUERY, kv), wrapped(QUERY, plain), atol=1e-3)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (lambda: kvpress.DecodingPress(kvpress.KnormPress()), "DecodingPress compresses while decoding"),
        (lambda: ComposedPress([kvpress.CAMPress(kvpress.KnormPress())]), "compresses while decoding"),
        (lambda: kvpress.PrefillDecodingPress(None, kvpress.DecodingPress(kvpress.KnormPress())), "while decoding"),
        (lambda: kvpress.DMSPress(kvpress.KnormPress(), 0.0, decoding=True), "DMSPress compresses while decoding"),
        (lambda: kvpress.DecodingPress(ComposedPress([])), "DecodingPress wraps a press that scores"),
        (lambda: kvpress.MergingPress(None), "MergingPress wraps a press that scores"),
        (lambda: ComposedPress([kvpress.DecodingPress(kvpress.KnormPress())] * 2), "only one press"),
    ],
)
def test_a_block_has_no_part_in_decoding(found, words, model):
    with pytest.raises(ValueError, match=words):
        run(model, found())


def test_methods_that_prompt_the_model_find_the_tokenizer_beside_its_files():
    model, _ = load("bundled", dtype="auto", device="cpu")
    wrapped = ModelKVzip()
    context = wrapped.encode("My name is Ada Moreno. I live in Lisbon. I work as a baker. " * 2)
    kv = run(model, kvpress.KVzipPress(0.5), context=context)
    expected = wrapped.prefill(context, prefix_ids=[], scorer="kvzip")
    torch.testing.assert_close(kv.scores, expected.scores)
    with pytest.raises(ValueError, match="tokenizer"):
        run(build("llama"), kvpress.KVzipPress(0.5))


# -- what is left on the model -----------------------------------------------------------------------------------------


def test_a_model_reads_other_caches_as_before_and_can_be_restored(model):
    before = model.config._attn_implementation
    with torch.no_grad():
        expected = model(tensor(CONTEXT)).logits
    hooks = len(model.model._forward_hooks), len(model.model._forward_pre_hooks)
    run(model, kvpress.KnormPress(0.5))
    assert (len(model.model._forward_hooks), len(model.model._forward_pre_hooks)) == hooks
    with torch.no_grad():
        outputs = model(tensor(CONTEXT))
    assert torch.equal(outputs.logits, expected)
    assert type(outputs.past_key_values) is DynamicCache
    restore(model)
    assert model.config._attn_implementation == before


def test_a_block_without_a_context_leaves_the_model_as_it_was(model):
    before = model.config._attn_implementation
    with kvpress.KnormPress(0.5)(model):
        assert model.config._attn_implementation != before
    assert model.config._attn_implementation == before
    with pytest.raises(RuntimeError, match="mine"), kvpress.KnormPress(0.5)(model):
        raise RuntimeError("mine")
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("failing", ["pass", "scoring"])
def test_an_error_gives_the_cache_back_as_it_was(failing, model):
    """Whether the forward pass raises or what comes after it; and the next context is compressed as usual."""
    cache = DynamicCache(config=model.config)
    layers = list(cache.layers)
    found = kvpress.SnapKVPress(0.5, window_size=8 if failing == "pass" else 500)
    handle = None
    if failing == "pass":
        handle = model.model.layers[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises((ZeroDivisionError, ValueError)), found(model):
        model(tensor(CONTEXT), past_key_values=cache)
    assert cache.layers == layers
    assert cache.get_seq_length() == 0
    assert torch.is_grad_enabled()
    if handle is not None:
        handle.remove()
    found.window_size = 8
    with found(model) as block, torch.no_grad():
        model(tensor(CONTEXT), past_key_values=cache)
    assert block.kv.ratio == 0.5


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"input_ids": torch.tensor([CONTEXT, CONTEXT])}, r"one context.*\(2, 60\)"),
        ({"inputs_embeds": torch.zeros(1, 9, 32)}, "input_ids, got none"),
        ({"input_ids": torch.tensor([CONTEXT]), "attention_mask": torch.tensor([[0] + [1] * 59])}, "attention_mask"),
        ({"input_ids": torch.tensor([CONTEXT]), "position_ids": torch.arange(1, 61)[None]}, "positions.*0 to 59"),
        ({"input_ids": torch.tensor([CONTEXT[:3]])}, "3 tokens, of which prefix_length=5"),
    ],
)
def test_what_is_no_single_context_is_refused(inputs, words, model):
    with pytest.raises(ValueError, match=words), kvpress.KnormPress(0.5)(model, prefix_length=5):
        model(**inputs)


def test_caches_of_other_kinds_are_refused(model):
    fixed = StaticCache(config=model.config, max_cache_len=80)
    with pytest.raises(ValueError, match=r"DynamicCache.*StaticCache"), kvpress.KnormPress(0.5)(model):
        model(tensor(CONTEXT), past_key_values=fixed)
    with pytest.raises(ValueError, match=r"prefix_length.*-1"):
        kvpress.KnormPress(0.5)(model, prefix_length=-1)


def test_finch_says_that_it_needs_a_question(model):
    with pytest.raises(ValueError, match=r"finch.*query"):
        run(model, kvpress.FinchPress(0.5))


def test_a_block_inside_another_is_refused_and_the_outer_one_goes_on(model):
    with press("knorm", 0.5)(model) as outer, torch.no_grad():
        with pytest.raises(ValueError, match=r"ComposedPress"), press("keydiff", 0.5)(model):
            pass
        cache = DynamicCache()
        model(tensor(CONTEXT), past_key_values=cache)
        assert outer.kv.ratio == 0.5
    with press("keydiff", 0.5)(model) as after, torch.no_grad():
        model(tensor(CONTEXT))
    assert after.kv.scorers == ("keydiff",)
    with pytest.raises(ValueError, match="while decoding"), kvpress.DecodingPress(kvpress.KnormPress())(model):
        pass
    with press("knorm", 0.5)(model):
        pass
