"""The diagnostics say what pruning changes in an answer: checked against stock transformers and by hand."""

import pytest
import torch

from kvzip import ModelKVzip
from kvzip.evaluation.diagnostics import AnswerChange, AnswerTrace, compare, diagnose, trace_answer
from tests import tiny

CONTEXT, QUERY, ANSWER = tiny.ids(60, seed=1), tiny.ids(5, seed=2), tiny.ids(12, seed=3)


@pytest.fixture(scope="module")
def model():
    return ModelKVzip.from_model(tiny.build("llama"), None)


@pytest.fixture
def kv(model):
    return model.prefill(CONTEXT, scorer="random", prefix_ids=[1])


def pruned(kv, ratio):
    other = kv.clone()
    other.prune(ratio)
    return other


def greedy_answer(model, kv):
    return model.generate(QUERY, kv, max_new_tokens=12, return_ids=True).tolist()


@pytest.mark.parametrize("answer", [ANSWER, ANSWER[:1]], ids=["12 tokens", "one token"])
def test_log_probabilities_margins_and_top_tokens_are_those_of_stock_transformers(model, kv, answer):
    stock = tiny.build("llama")
    with torch.no_grad():
        logits = stock(torch.tensor([[1, *CONTEXT, *QUERY, *answer]])).logits[0, -len(answer) - 1 : -1]
    trace = trace_answer(model, kv, QUERY, answer)
    logprobs = logits.log_softmax(-1)
    for i, token in enumerate(answer):
        others = torch.cat([logits[i, :token], logits[i, token + 1 :]])
        assert trace.logprobs[i].item() == pytest.approx(logprobs[i, token].item(), abs=1e-4)
        assert trace.margins[i].item() == pytest.approx((logits[i, token] - others.max()).item(), abs=1e-4)
    assert trace.top_ids.tolist() == logits.argmax(-1).tolist()
    assert trace.ids.tolist() == answer


def test_equal_caches_change_nothing(model, kv):
    answer = greedy_answer(model, kv)
    change = diagnose(model, kv, kv.clone(), QUERY, answer)
    assert change.logprobs == change.margins == (0.0,) * len(answer)
    assert change.flips == 0
    assert change.summary()["logprob_change_worst"] == 0


def test_the_caches_stay_as_they_are(model, kv):
    other, length = pruned(kv, 0.4), kv.get_seq_length()
    diagnose(model, kv, other, QUERY, ANSWER)
    assert [len(one.input_ids) for one in (kv, other)] == [length] * 2
    assert [one.tail_length for one in (kv, other)] == [0, 0]


def test_flips_are_where_greedy_decoding_of_the_pruned_cache_goes_another_way(model, kv):
    """Counted by feeding the answer token by token to stock code, for an answer that the full cache gave."""
    answer, other = greedy_answer(model, kv), pruned(kv, 0.1)
    expected = []
    with torch.no_grad(), other.scratch():
        logits = model.model(torch.tensor([QUERY]), past_key_values=other, use_cache=True).logits[0, -1]
        for token in answer:
            expected.append(int(logits.argmax()) != token)
            logits = model.model(torch.tensor([[token]]), past_key_values=other, use_cache=True).logits[0, -1]
    change = diagnose(model, kv, other, QUERY, answer)
    assert list(change.flipped) == expected
    assert 0 < change.flips < len(answer), "the case should have both kinds"
    full, margins = trace_answer(model, kv, QUERY, answer), trace_answer(model, other, QUERY, answer).margins
    assert bool((full.margins >= 0).all()), "a greedy answer's tokens are ahead"
    assert [margin < 0 for margin in margins.tolist()] == expected
    assert change.margins == pytest.approx((margins - full.margins).tolist())


def test_masked_and_evicted_caches_give_the_same_change(model, kv):
    retained = model.prefill(CONTEXT, scorer="random", prefix_ids=[1], kv_type="retain")
    masked, evicted = (diagnose(model, kv, pruned(one, 0.3), QUERY, ANSWER) for one in (retained, kv))
    assert masked.logprobs == pytest.approx(evicted.logprobs, abs=1e-4)
    assert masked.flipped == evicted.flipped


def trace(ids, logprobs, margins, top_ids):
    return AnswerTrace(torch.tensor(ids), torch.tensor(logprobs), torch.tensor(margins), torch.tensor(top_ids))


def test_summary_of_traces_made_by_hand():
    """The second token was never the likeliest, so it cannot flip; the third does."""
    full = trace([7, 8, 9], [-0.1, -2.0, -0.3], [2.0, -1.0, 1.0], [7, 5, 9])
    cut = trace([7, 8, 9], [-0.2, -2.5, -1.5], [1.0, -2.0, -0.5], [7, 6, 4])
    change = compare(full, cut)
    assert change.flipped == (False, False, True)
    assert change.summary() == pytest.approx(
        {
            "tokens": 3,
            "flipped": 1,
            "logprob_change_mean": -0.6,
            "logprob_change_worst": -1.2,
            "margin_change_mean": -3.5 / 3,
            "margin_change_worst": -1.5,
        }
    )


def test_joined_answers_count_every_token_once():
    one, two = AnswerChange((-1.0,), (-2.0,), (True,)), AnswerChange((0.0, -0.5), (0.0, 1.0), (False, True))
    both = AnswerChange.joined([one, two])
    assert both == AnswerChange((-1.0, 0.0, -0.5), (-2.0, 0.0, 1.0), (True, False, True))
    assert both.summary()["logprob_change_mean"] == pytest.approx(-0.5)
    assert both.flips == 2


def test_an_empty_answer_has_no_change(model, kv):
    change = diagnose(model, kv, pruned(kv, 0.3), QUERY, [])
    assert change == AnswerChange.joined([])
    assert change.summary() == {"tokens": 0, "flipped": 0, **dict.fromkeys(list(change.summary())[2:])}


def test_bad_input_is_named(model, kv):
    with pytest.raises(ValueError, match="query is empty"):
        trace_answer(model, kv, [], ANSWER)
    with pytest.raises(ValueError, match="different answers"):
        compare(trace_answer(model, kv, QUERY, ANSWER), trace_answer(model, kv, QUERY, ANSWER[:-1]))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        trace_answer(model, kv, QUERY, [tiny.VOCAB, 3])
