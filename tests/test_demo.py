"""demo.py does what its help says."""

import re
from pathlib import Path

import pytest

import demo
from kvzip import ModelKVzip
from kvzip.evaluation.asking import Answers
from kvzip.viz import shaded_html


def run(*arguments, capsys):
    """Run the demo in this process; return what it printed."""
    demo.run(demo.parse_args(list(arguments)))
    return capsys.readouterr().out


def test_the_page_shows_letters_of_several_bytes(tmp_path):
    """A character whose bytes are tokens of their own is one span, with the mean of what was kept of them."""
    model, text = ModelKVzip(), "Café Zürich, 東京: 12 €."
    kv = model.prefill(text, scorer="random")
    kv.prune(0.5)
    shaded_html(kv, tmp_path / "kept.html", model.decode)
    page = (tmp_path / "kept.html").read_text()
    shown = re.findall(r"<span[^>]*>([^<]*)</span>", page)
    assert "".join(shown) == text
    assert len(shown) < kv.context_length


def test_head_scores_of_another_file(tmp_path, capsys):
    model = ModelKVzip()
    model.compute_head_scores(["The red box holds 4417."]).save(tmp_path / "mine.json")
    out = run("-m", "kvzip_head", "--head-scores", str(tmp_path / "mine.json"), "--out", str(tmp_path), capsys=capsys)
    assert "level 'head'" in out
    assert demo.main(["-m", "kvzip_head", "--head-scores", "nowhere.json"]) == 2
    assert "nowhere.json" in capsys.readouterr().err


def test_defaults_answer_from_the_pruned_cache_and_draw_pictures(tmp_path, capsys):
    printed = run("--out", str(tmp_path / "pictures"), "--tokens", "400", "--exam", "facts", capsys=capsys)
    for column in ("full", "kept 30%", "no document", "KV cache", "prefill", "scoring", "ms per token"):
        assert column in printed
    assert (tmp_path / "pictures" / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "pictures" / "kept.html").read_text()
    assert page.count("<span") > 300
    shades = [float(shade) for shade in re.findall(r"rgba\(255,140,0,([\d.]+)\)", page)]
    assert min(shades) < 0.25, "tokens of which hardly anything was kept"
    assert max(shades) > 0.5, "and others that were"


@pytest.mark.parametrize(
    ("method", "shown", "absent"),
    [("kvzip_head", "level 'head'", "scoring"), ("full", "full", "pruning"), ("no", "no document", "prefill")],
)
def test_methods(method, shown, absent, tmp_path, capsys):
    printed = run("-m", method, "--out", str(tmp_path), "--tokens", "300", capsys=capsys)
    assert shown in printed
    assert absent not in printed


def test_own_document_and_questions(tmp_path, capsys):
    document = tmp_path / "me.txt"
    document.write_text("My name is Ada Moreno. I live in Lisbon. The red box holds 4417.")
    question = "Where do I live?"
    printed = run("--context", str(document), "--questions", question, "--out", str(tmp_path), capsys=capsys)
    assert f"Q: {question}" in printed
    assert "Lisbon" in printed


@pytest.mark.parametrize(("exam", "tokens"), [("needle", "100"), ("niah_single_1", "400")])
def test_exams_of_one_question_and_with_a_beginning_of_the_answer(exam, tokens, tmp_path, capsys):
    printed = run("-m", "full", "--exam", exam, "--tokens", tokens, "--max-new-tokens", "4", capsys=capsys)
    assert printed.count("\nQ: ") == 1
    assert "right answers: full" in printed


def test_an_exam_of_the_benchmark_is_asked_as_the_benchmark_does(monkeypatch):
    asked, made = [], Answers(["1"], tokens=[1], question_seconds=0.0, decode_seconds=0.5, steps=2)
    monkeypatch.setattr(demo, "answer_timed", lambda model, kv, queries, **_: asked.extend(queries) or made)
    model = ModelKVzip()
    args = demo.parse_args(["--exam", "niah_single_1", "--tokens", "400"])
    document = demo.make_document(args, model, None)
    assert demo.ask(model, document, None, 3) == demo.Answers(["1"], 250.0)
    assert asked[0][0]["content"] == document.questions[0]
    assert asked[0][1]["role"] == "assistant"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Files that are no documents, in the folder where the demo runs."""
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" \n")
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("model").mkdir()
    Path("model/config.json").write_text('{"model_type": "llama"')


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "1.5"], "ratio must be"),
        (["--ratio", "0"], "ratio must be"),
        (["-m", "full", "--ratio", "nan"], "ratio must be"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--tokens", "3"], "3 tokens"),
        (["--questions", "Who?", " "], "--questions has an empty one"),
        (["--model", "bundeld"], "did you mean 'bundled'"),
        (["--model", "model"], "cannot load model 'model'"),
        (["--context", "nowhere.txt", "--questions", "q"], "nowhere.txt"),
        (["--context", "model", "--questions", "q"], "Is a directory: model"),
        (["--context", "empty.txt", "--questions", "q"], "--context empty.txt is empty"),
        (["--context", "latin.txt", "--questions", "q"], "--context latin.txt is not a UTF-8 text"),
        (["--context", "latin.txt"], "latin.txt"),
        (["--out", "empty.txt"], "--out empty.txt is not a folder"),
    ],
)
def test_mistakes_give_one_line_and_a_status(arguments, message, files, capsys):
    assert demo.main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.startswith("demo.py: ")
    assert told.count("\n") == 1


def test_interrupted(monkeypatch, capsys):
    monkeypatch.setattr(demo, "load_model", lambda name: (_ for _ in ()).throw(KeyboardInterrupt))
    assert demo.main([]) == 130
    assert capsys.readouterr().err == "demo.py: interrupted\n"


def test_ours_are_not_told_as_the_users_mistakes(monkeypatch):
    monkeypatch.setattr(demo, "run", lambda args: {}["ours"])
    with pytest.raises(KeyError):
        demo.main([])


def test_help_names_every_method(capsys):
    with pytest.raises(SystemExit) as left:
        demo.main(["--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert all(method in printed for method in demo.METHODS)
