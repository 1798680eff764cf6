"""The harness's tasks run on compressed contexts, and at ratio 1 give what its own model gives."""

import json
import logging
import sys
from functools import partial

import pytest

from kvzip import ModelKVzip, data
from kvzip.integrations.splitting import Parts, Splitter

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from kvzip.integrations.lm_eval import KVzipLM, main
from kvzip.model.loading import bundled_path


@pytest.fixture(scope="module")
def model():
    return ModelKVzip()


@pytest.fixture(scope="module")
def harness():
    made = HFLM(str(bundled_path()), device="cpu", dtype="float32", batch_size=1)
    made.model.generation_config.max_new_tokens = None  # it would go before the length that the harness asks for
    return made


def lm(model, **options):
    return KVzipLM(model, **{"ratio": 1.0, **options})


def prompts(model, count=3):
    """Prompts about one context, and their answers."""
    record = data.generate("kv", 3, tokens=120, count_tokens=model.tokenizer)
    texts = [f"{record.context}\n\n{question}" for question in record.questions[:count]]
    return texts, [answers[0] for answers in record.answers[:count]]


def requests(texts, options):
    return [Instance("generate_until", {}, (text, dict(options)), 0) for text in texts]


# -- where a prompt is cut -------------------------------------------------------------------------------------------


def pieces(model, parts):
    return [model.tokenizer.decode(ids) for ids in parts[:3]]


def splitter(model, separator="\n\n"):
    return Splitter(model.tokenizer, model.prompting.template, separator)


@pytest.mark.parametrize(
    ("prompt", "separator", "expected"),
    [
        ("One.\n\nTwo.\n\nWhere?", "\n\n", ["", "One.\n\nTwo.", "\n\nWhere?"]),
        ("One.\n\nWhere?\n\n", "\n\n", ["", "One.", "\n\nWhere?\n\n"]),
        ("One. Two.\nQ: where?\n\nA:", "\nQ:", ["", "One. Two.", "\nQ: where?\n\nA:"]),
    ],
)
def test_prompts_are_cut_at_the_last_separator_with_something_after_it(prompt, separator, expected, model):
    parts = splitter(model, separator).split(prompt)
    assert pieces(model, parts) == expected
    assert parts.compress
    assert [*parts.prefix, *parts.context, *parts.query] == model.tokenizer(prompt)["input_ids"]


def test_a_chat_is_cut_within_its_last_user_turn_and_its_beginning_is_protected(model):
    text = lm(model).apply_chat_template([{"role": "user", "content": "One.\n\nTwo.\n\nWhere?"}])
    parts = splitter(model).split(text)
    template = model.prompting.template
    assert template.before
    decoded = [model.tokenizer.decode(ids, skip_special_tokens=False) for ids in parts[:3]]
    assert decoded == [template.before, "One.\n\nTwo.", f"\n\nWhere?{template.suffix}"]
    assert "".join(decoded) == text


def test_a_template_that_ends_with_a_blank_line_is_not_a_question(model):
    suffix = "<|end|>assistant\n\n"
    template = type(model.prompting.template)("user\n\n", suffix, "")
    parts = Splitter(model.tokenizer, template, "\n\n").split(f"user\n\nOne.\n\nWhere?{suffix}")
    assert pieces(model, parts)[1:] == ["One.", f"\n\nWhere?{model.tokenizer.decode(model.encode(suffix))}"]


def test_without_a_separator_nothing_is_compressed(model):
    parts = splitter(model).split("One. Two. Where?")
    assert (parts.compress, len(parts.query)) == (False, 1)


def test_mistakes_are_told(model):
    with pytest.raises(ValueError, match="separator is empty"):
        lm(model, separator="")
    with pytest.raises(ValueError, match=r"ratio must be .* got 2"):
        lm(model, ratio=2)
    with pytest.raises(ValueError, match="did you mean 'kvzip'"):
        lm(model, scorer="kvzop")
    with pytest.raises(ValueError, match="scorer 'finch' scores a context for one question"):
        lm(model, scorer="finch")
    with pytest.raises(ValueError, match="cannot be shortened to 4"):
        Parts((1,), (2, 3), (4, 5, 6, 7), True).shortened(4)


def test_the_level_is_the_scorers_own_unless_told(model):
    assert [str(lm(model, scorer=one).level) for one in ("kvzip", "tova", "kvcompose")] == [
        "pair",
        "pair-uniform",
        "kvcompose",
    ]
    assert str(lm(model, scorer="tova", level="pair").level) == "pair"


# -- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("until", [["\n"], [".", "a"], []])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_at_ratio_1_answers_are_the_harness_models_own(until, batch_size, model, harness):
    texts, _ = prompts(model)
    asked = requests([*texts, "No blank line here: one two three"], {"until": until, "max_gen_toks": 8})
    own = lm(model, batch_size=batch_size).generate_until(asked, disable_tqdm=True)
    assert own == harness.generate_until(asked, disable_tqdm=True)
    assert any(own)


def test_at_ratio_1_likelihoods_are_the_harness_models_own(model, harness):
    texts, answers = prompts(model)
    pairs = [
        *zip(texts, answers, strict=True),
        (texts[0] + " ", "wrong"),
        ("", "Some text."),
        ("No blank line", " here"),
    ]
    asked = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    own = lm(model).loglikelihood(asked, disable_tqdm=True)
    for (mine, greedy), (theirs, also) in zip(own, harness.loglikelihood(asked, disable_tqdm=True), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)
        assert greedy == also


def test_answers_are_those_of_the_pruned_cache(model):
    texts, _ = prompts(model)
    own = lm(model, ratio=0.2, scorer="knorm", level="pair-uniform")
    (parts,) = {own._splitter.split(text)._replace(query=()) for text in texts}
    kv = model.prefill(parts.context, prefix_ids=parts.prefix, scorer="knorm", kv_type="evict")
    kv.prune(0.2, "pair-uniform")
    asked = requests(texts, {"until": [], "max_gen_toks": 8})
    by_hand = model.generate([own._splitter.split(text).query for text in texts], kv=kv, max_new_tokens=8)
    assert own.generate_until(asked, disable_tqdm=True) == by_hand
    assert by_hand != lm(model).generate_until(asked, disable_tqdm=True)


def test_a_context_of_several_questions_is_prefilled_once(model, monkeypatch):
    seen = []
    prefill = model.prefill
    monkeypatch.setattr(model, "prefill", lambda *args, **options: seen.append(1) or prefill(*args, **options))
    texts, answers = prompts(model)
    lm(model, ratio=0.5).generate_until(requests(texts, {"max_gen_toks": 2}), disable_tqdm=True)
    asked = [Instance("loglikelihood", {}, (text, answer), 0) for text in texts for answer in answers]
    lm(model, ratio=0.5).loglikelihood(asked, disable_tqdm=True)
    assert len(seen) == 2


def test_long_contexts_lose_their_beginning(model, caplog):
    texts, _ = prompts(model, 1)
    own = lm(model, max_length=60)
    with caplog.at_level(logging.WARNING):
        assert own.generate_until(requests(texts, {"max_gen_toks": 4}), disable_tqdm=True)
    assert "left out to fit into 60 tokens" in caplog.text
    whole = own._splitter.split(texts[0])
    assert whole.shortened(56) == whole._replace(context=whole.context[whole.length - 56 :])


def test_rolling_likelihoods_are_refused(model):
    with pytest.raises(ValueError, match=r"rolling likelihood.*multiple_choice"):
        lm(model).loglikelihood_rolling([])


# -- the harness -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tasks(model, tmp_path):
    """A folder with a task of four questions."""
    texts, answers = prompts(model, 4)
    documents = [{"text": text, "answer": answer} for text, answer in zip(texts, answers, strict=True)]
    (tmp_path / "lookups.json").write_text(json.dumps(documents))
    (tmp_path / "lookups.yaml").write_text(
        f"""
task: lookups
dataset_path: json
dataset_kwargs:
  data_files: {{test: {tmp_path / "lookups.json"}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["<|end|>"], max_gen_toks: 16}}
metric_list:
  - {{metric: exact_match, ignore_case: true}}
"""
    )
    return tmp_path


def test_a_task_of_the_harness_is_answered(tasks, model):
    assert get_model("kvzip") is KVzipLM
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    scores = []
    for ratio in (1.0, 0.4):
        own = lm(model, ratio=ratio, batch_size=4)
        found = simple_evaluate(
            own, tasks=["lookups"], task_manager=manager, apply_chat_template=True, bootstrap_iters=0
        )
        scores.append(found["results"]["lookups"]["exact_match,none"])
        assert found["n-samples"]["lookups"]["effective"] == 4
    assert scores[0] >= 0.5
    assert scores[1] >= 0.5


def test_the_command_line_knows_the_model(tasks, monkeypatch, capsys):
    # Reading the names of all of the harness's own tasks would take longest.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    arguments = ["--tasks", "lookups", "--include_path", str(tasks), "--limit", "1", "--device", "cpu"]
    arguments += ["--model_args", "pretrained=bundled,ratio=0.5,scorer=knorm"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    main()
    printed = capsys.readouterr().out
    assert "kvzip ({'pretrained': 'bundled', 'ratio': 0.5, 'scorer': 'knorm'})" in printed
    assert "exact_match" in printed
