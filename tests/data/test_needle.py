"""One sentence in a book: the grid of lengths and depths, where the sentence is, and the essays that are read."""

from __future__ import annotations

import pytest

from kvzip import data
from kvzip.data.essays import read_essays, split_sentences
from tests.data.test_niah import ESSAY, count

NEEDLE = "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."


def make(seed=0, **options):
    return data.generate("needle", seed, **{"tokens": 1000, "count_tokens": count, "essays": ESSAY} | options)


def test_the_grid_is_kvzips():
    records = list(data.load("needle", count_tokens=count))
    cells = [(record.meta["tokens"], record.meta["depth"]) for record in records]
    assert cells == [(length, depth) for length in (500, 2000, 8000) for depth in range(0, 101, 10)]
    for record in records:
        assert 0.9 * record.meta["tokens"] <= count(record.context) <= record.meta["tokens"]
        assert record.meta["context_tokens"] == count(record.context)


def test_the_cells_of_a_length_differ_in_nothing_but_the_depth():
    records = list(data.load("needle", count_tokens=count, tokens=900))
    assert len(records) == 11
    books = {" ".join(record.context.replace(NEEDLE, " ").split()) for record in records}
    shortest = min(books, key=len)
    assert all(book.startswith(shortest) for book in books)
    assert len({record.context for record in records}) == 11


def test_start_and_num_choose_cells():
    options = {"count_tokens": count, "tokens": 700}
    assert list(data.load("needle", start=3, num=2, **options)) == list(data.load("needle", **options))[3:5]
    assert list(data.load("needle", num=0, **options)) == []


@pytest.mark.parametrize("depth", [0, 10, 37.5, 50, 90, 100])
def test_the_needle_is_at_its_depth_between_two_sentences(depth):
    for seed in range(5):
        context = make(seed, depth=depth).context
        assert context.count(NEEDLE) == 1
        before, after = (part.strip() for part in context.split(NEEDLE))
        assert 100 * len(before) / (len(before) + len(after)) == pytest.approx(depth, abs=2)
        assert not before or before.endswith(".")
        assert not after or after.startswith("Sentence")


def test_the_wording_is_the_benchmarks():
    record = make()
    assert record.questions == ["Based on the content of the book, the best thing to do in San Francisco is:"]
    assert f"\n{NEEDLE}\n" in record.context
    assert NEEDLE.endswith(f"{record.answers[0][0]}.")
    assert record.max_new_tokens == 32


def test_models_are_trained_on_another_needle():
    for seed in range(20):
        record = make(seed, split="train")
        assert "San Francisco" not in record.context + record.questions[0]
        assert "sandwich" not in record.context
        assert record.answers[0][0] in record.context


def test_a_seed_gives_one_record_and_another_seed_another_book():
    assert make(3) == make(3)
    assert make(3).context != make(4).context
    assert make(3, essays=None) == make(3, essays=None)


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="depth must be between 0 and 100"):
        make(depth=101)
    with pytest.raises(ValueError, match=r"needle needs at least \d+ tokens, not 10"):
        make(tokens=10)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        make(split="dev")


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("eat a sandwich and sit in Dolores Park on a sunny day.", 1.0),
        ("You should: Eat a sandwich, and sit in Dolores Park on a sunny day!", 1.0),
        ("eat a sandwich and sit in a park on a sunny day", 0.0),
        ("eat a sandwich", 0.0),
        ("", 0.0),
    ],
)
def test_the_score_wants_the_whole_needle(prediction, right):
    assert data.score("needle", prediction, make().answers[0]) == right


def test_essays_are_found_in_the_folders_that_are_named(tmp_path):
    for folder in ("niah/PaulGrahamEssays", "PaulGrahamEssays", "."):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "essay.txt").write_text(f"This is from {folder.replace('.', 'here')}.\n")
    record = next(data.load("needle", data_dir=tmp_path, count_tokens=count, num=1))
    assert "This is from niah/PaulGrahamEssays." in record.context
    assert "PaulGrahamEssays.\n" not in record.context.replace("niah/", "")
    assert read_essays(tmp_path) == ("This is from here.",)


def test_a_folder_that_is_not_there_is_told_and_one_without_essays_once(tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match=r"--data-dir .*nowhere is not a folder"):
        next(data.load("needle", data_dir=tmp_path / "nowhere", count_tokens=count, num=1))
    for _ in range(2):
        next(data.load("needle", data_dir=tmp_path, count_tokens=count, num=1))
    assert caplog.text.count("no essays") == 1


def test_an_essay_that_is_no_text_is_told_by_name(tmp_path):
    (tmp_path / "essay.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"essay\.txt is not a UTF-8 text"):
        read_essays(tmp_path)


def test_sentences_are_split_at_their_ends():
    assert split_sentences("One.  Two?\nThree goes\non! 3.14 is a number.") == [
        "One.", "Two?", "Three goes on!", "3.14 is a number.",
    ]  # fmt: skip
