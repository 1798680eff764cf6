"""Contexts in blocks: what is read is what one pass reads, budgets hold, memory is bounded, and what is refused."""

import io
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from kvzip import ModelKVzip, data
from kvzip.model.blocks import cut
from kvzip.scoring import get_scorer, list_scorers
from kvzip.scoring.methods.kvzip import KVzip
from kvzip.scoring.reconstruction import RepeatPrompts
from tests.scoring.test_matrix import scorer_of
from tests.tiny import build, ids

ROOT = Path(__file__).parents[2]
PREFIX, CONTEXT, QUERY = ids(4, seed=2), ids(90, seed=1), ids(5, seed=3)
PROMPTS = RepeatPrompts([5, 6, 7], [8, 9], [10])
GREEDY = {"max_new_tokens": 6, "eos_token_id": None}


@cache
def model(name="llama"):
    return ModelKVzip.from_model(build(name), None)


@cache
def bundled():
    return ModelKVzip()


def prefill(name="llama", context=CONTEXT, **options):
    return model(name).prefill(context, **{"prefix_ids": PREFIX, "scorer": "knorm", **options})


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("kv_type", ["evict", "retain"])
def test_blocks_without_pruning_are_one_prefill(name, kv_type):
    one = prefill(name, kv_type=kv_type)
    blocks = prefill(name, kv_type=kv_type, budget_tokens=10_000, block=32)
    assert torch.equal(blocks.input_ids, one.input_ids)
    assert (blocks.context_length, blocks.nbytes, blocks.ratio) == (90, one.nbytes, 1.0)
    torch.testing.assert_close(blocks.scores, one.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(name)(QUERY, kv=blocks), model(name)(QUERY, kv=one), rtol=1e-4, atol=1e-4)


def test_reconstruction_of_a_block_is_that_of_the_whole_where_nothing_is_dropped():
    """The first block sees what a short context sees; the later ones see it behind the others."""
    scorer = KVzip(30, prompts=PROMPTS)
    whole, blocks = prefill(scorer=scorer), prefill(scorer=scorer, budget_tokens=10_000, block=30)
    short = prefill(context=CONTEXT[:30], scorer=scorer)
    torch.testing.assert_close(blocks.scores[:, :, :30], short.scores, rtol=1e-4, atol=1e-6)
    # Positions and the request differ, so scores are near, not equal; chance is 0.
    for part in (slice(30, 60), slice(60, 90)):
        pair = torch.stack([blocks.scores[:, :, part].flatten(), whole.scores[:, :, part].flatten()])
        assert float(pair.log().corrcoef()[0, 1]) > 0.6
    assert bool(((blocks.scores > 0) & (blocks.scores <= 1)).all())


@pytest.mark.parametrize("scorer", ["kvzip", "knorm", "snapkv(window_size=8)", "keydiff", "expected_attention"])
@pytest.mark.parametrize("level", ["pair", "pair-uniform"])
def test_a_budget_in_tokens_holds(scorer, level):
    chosen = KVzip(16, prompts=PROMPTS) if scorer == "kvzip" else get_scorer(scorer)
    kv = prefill(scorer=chosen, budget_tokens=20, block=32)
    assert kv.context_length == 90
    assert int(kv.keep_mask.sum()) == 20 * 4 * 2
    assert kv.scores.shape == (4, 2, 90)
    kv.prune(tokens=3, level=level)
    assert len(model().generate(QUERY, kv, **GREEDY)) == 6


NOT_IN_BLOCKS = {
    "duo_attention": "level 'duo' may keep more than it is asked for",
    "finch": "finch scores a context for a question",
    "kvgrad": "gradients scores a whole context at once, .*block by block",
    "restorekv": "restorekv runs its tokens over a whole context",
}


@pytest.mark.parametrize("name", [info.name for info in list_scorers()])
@pytest.mark.parametrize("prefix", [12, 0])
def test_every_method_reads_blocks_behind_a_long_prefix_or_is_refused_by_name(name, prefix):
    """Chunks that do not divide a block; a prefix longer than any method's sinks."""
    options = {"context": ids(300, seed=5), "prefix_ids": ids(prefix, seed=2), "budget_tokens": 40, "block": 130}
    options |= {"scorer": scorer_of(name, model()), "prefill_chunk_size": 41}
    if name in NOT_IN_BLOCKS:
        with pytest.raises(ValueError, match=NOT_IN_BLOCKS[name]):
            prefill(**options)
        return
    kv = prefill(**options)
    assert kv.context_length == 300
    assert kv.scores.isfinite().all()
    assert kv.ratio == pytest.approx(40 / 300, abs=0.02)
    assert bool(model()(QUERY, kv).isfinite().all())


@pytest.mark.parametrize("budget", [9_000, "12kB"])
def test_a_budget_in_bytes_holds(budget):
    kv = prefill(budget_nbytes=budget, block=25)
    assert kv.nbytes <= (12_000 if isinstance(budget, str) else budget)
    assert kv.context_length == 90


def test_bits_of_the_model_are_those_of_a_budgeted_kv():
    own = ModelKVzip.from_model(build("llama"), None)
    own.kv_bits = 4
    assert own.prefill(CONTEXT, prefix_ids=PREFIX, scorer="knorm", budget_tokens=30, block=40).bits == 4


def test_extending_is_reading_on():
    once = prefill(budget_tokens=1000, block=45)
    grown = prefill(context=CONTEXT[:45])
    grown.extend(CONTEXT[45:])
    assert torch.equal(grown.input_ids, once.input_ids)
    assert torch.equal(grown.scores, once.scores)
    assert torch.equal(model()(QUERY, kv=grown), model()(QUERY, kv=once))


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("kv_type", ["evict", "retain"])
def test_a_pruned_kv_can_be_extended_and_pruned_again(tmp_path, bits, kv_type):
    kv = prefill(kv_type=kv_type, context=CONTEXT[:60])
    kv.prune(0.5, bits=bits)
    kept = kv.keep_mask.clone()
    kv.extend(CONTEXT[60:])
    assert torch.equal(kv.keep_mask[:, :, :60], kept)
    assert bool(kv.keep_mask[:, :, 60:].all())
    kv.prune(0.2)
    assert kv.ratio == pytest.approx(0.2, abs=0.01)
    assert not bool((kv.keep_mask[:, :, :60] & ~kept).any()) or kv_type == "retain"
    kv.save(tmp_path / "kv")
    loaded = model().load_kv(tmp_path / "kv")
    assert torch.equal(model()(QUERY, kv=loaded), model()(QUERY, kv=kv))


@pytest.mark.parametrize("end", ["\n", "\n\n"])
def test_text_in_pieces_and_files(monkeypatch, end):
    """Wherever pieces end: the ids are those of the whole text."""
    monkeypatch.setattr("kvzip.model.blocks.TEXT", 200)
    record = data.generate("kv", 1, tokens=300, count_tokens=bundled().tokenizer)
    text = record.context.replace(", ", end)
    whole = bundled().prefill(text, scorer="knorm")
    parts = [text[start : start + 7] for start in range(0, len(text), 7)]
    for pieces in (text.splitlines(keepends=True), iter(parts), io.StringIO(text)):
        kv = bundled().prefill(pieces, scorer="knorm", block=64)
        assert torch.equal(kv.input_ids, whole.input_ids)


@pytest.mark.parametrize("scorer", ["snapkv(window_size=8)", "tova", "compactor", "simlayerkv(n_recent=8)"])
def test_a_window_is_the_last_one_of_all(scorer, tmp_path):
    """Where more text follows, what a window kept is no longer above the rest, also when it was saved in between."""
    kv = prefill(context=CONTEXT[:40], scorer=scorer)
    window = kv.scored[scorer.partition("(")[0]].window
    assert window > 0
    top = kv.scores == kv.scores.max()
    assert bool(top[..., 40 - window :].all())
    kv.save(tmp_path / "kv")
    kv = model().load_kv(tmp_path / "kv")
    kv.extend(CONTEXT[40:], scorer=get_scorer(scorer))
    scores = kv.scores
    median = scores[..., : 40 - window].median(-1, keepdim=True).values
    assert torch.equal(scores[..., 40 - window : 40], median.expand(-1, -1, window))
    kv.prune(tokens=window + 5, level="pair-uniform")
    assert bool(kv.keep_mask[..., 90 - window :].all())


@pytest.mark.parametrize("block", [10, 25, 90])
def test_streaming_llm_in_blocks_keeps_the_first_and_the_last(block):
    kv = prefill(scorer="streaming_llm", budget_tokens=20, block=block)
    kept = kv.keep_mask.all(0).all(0).nonzero().flatten().tolist()
    assert kept == [*range(4), *range(74, 90)]
    assert kv.ratio == pytest.approx(20 / 90)


@pytest.mark.parametrize(("budget", "block"), [(300, 80), (200, 64), (260, 130)])
def test_a_pyramid_keeps_its_budget_while_the_context_grows(budget, block):
    """What a layer no longer has goes to the others."""
    kv = prefill(scorer="pyramidkv(window_size=8)", context=ids(500, seed=8), budget_tokens=budget, block=block)
    assert str(kv.level).startswith("pyramid")
    assert int(kv.keep_mask.sum()) == pytest.approx(budget * 8, abs=8)


def test_blocks_cut_evenly():
    found = [
        list(cut([list(range(a)), list(range(b))], lambda text: [], 10)) for a, b in ((3, 4), (8, 3), (25, 7), (9, 21))
    ]
    assert [list(map(len, blocks)) for blocks in found] == [[7], [5, 6], [10, 10, 6, 6], [10, 10, 10]]
    assert [token for block in found[2] for token in block] == [*range(25), *range(7)]


def test_answers_from_blocks_are_those_of_one_pass():
    right = {"one": 0, "blocks": 0}
    total = 0
    for seed in range(3):
        record = data.generate("kv", seed + 50, tokens=400, count_tokens=bundled().tokenizer, num_questions=6)
        one = bundled().prefill(record.context)
        one.prune(0.4)
        blocks = bundled().prefill(record.context, budget_tokens=int(0.4 * one.context_length), block=128)
        for name, kv in (("one", one), ("blocks", blocks)):
            answers = bundled().generate(record.questions, kv=kv, max_new_tokens=30)
            right[name] += sum(map(str.__eq__, answers, (reference[0] for reference in record.answers)))
        total += len(record.questions)
    assert right["blocks"] >= right["one"] - 2
    assert right["blocks"] >= 0.75 * total


MEASURED = """
import sys
from kvzip import ModelKVzip
from tests.tiny import build, ids
length = int(sys.argv[1])
tiny = build("llama", num_hidden_layers=2, head_dim=64, max_position_embeddings=200_000)
pieces = (ids(2048, seed=number) for number in range(length // 2048))
kv = ModelKVzip.from_model(tiny, None).prefill(pieces, prefix_ids=[], scorer="knorm", budget_tokens=1024, block=2048)
print(kv.context_length, kv.ratio * kv.context_length, kv.full_nbytes)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_memory_is_the_budget_and_a_block_whatever_the_length():
    """The peak of a process that reads 100,000 tokens, beside one that reads a fifth of them."""
    peaks, whole = [], []
    for length in (20_480, 102_400):
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(length)], capture_output=True, text=True, check=True, cwd=ROOT
        )
        tokens, kept, nbytes, peak = map(float, done.stdout.split())
        assert (tokens, kept) == (length, 1024)
        peaks.append(peak * 1024)
        whole.append(nbytes)
    # What grows is a score and a byte a pair, of 2 layers of 2 heads, and the id: twice that at most while they grow.
    assert peaks[1] - peaks[0] < 2 * 81_920 * (2 * 2 * 5 + 8) + 8e6 < (whole[1] - whole[0]) / 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget_tokens": 0}, "budget_tokens.*0"),
        ({"budget_tokens": 1.5}, "budget_tokens.*1.5"),
        ({"budget_nbytes": "much"}, "nbytes.*much"),
        ({"budget_nbytes": 100, "block": 20}, "nbytes=100"),
        ({"budget_tokens": 5, "budget_nbytes": 100}, "one budget"),
        ({"budget_tokens": 5, "block": 0}, "block.*0"),
        ({"budget_tokens": 5, "query": QUERY}, "query"),
    ],
)
def test_bad_budgets_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        prefill(**options)


def test_what_cannot_be_extended():
    kv = prefill()
    before = model()(QUERY, kv=kv)
    with pytest.raises(ValueError, match=r"knorm.*same methods"):
        kv.extend(CONTEXT, scorer="keydiff")
    with pytest.raises(ValueError, match="empty"):
        kv.extend([])
    kv.level = "duo"
    with pytest.raises(ValueError, match=r"level 'duo'.*holds no budget"):
        kv.extend(CONTEXT, budget_tokens=20)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        kv.extend([1, 2, 10_000])
    with pytest.raises(ValueError, match="positions"):
        kv.extend(ids(600))
    assert torch.equal(model()(QUERY, kv=kv), before)
    model().generate(QUERY, kv, update_cache=True, **GREEDY)
    with pytest.raises(ValueError, match="kept turns"):
        kv.extend(CONTEXT)
    with pytest.raises(ValueError, match="empty"):
        model().prefill(iter([]), prefix_ids=PREFIX, scorer="knorm")
