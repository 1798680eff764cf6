"""A sweep's lines are the honest answers of pruned caches, each once, however often it is stopped."""

import dataclasses
import json
import shutil

import pytest

from kvzip import ModelKVzip, data
from kvzip.evaluation.lines import Cell, read_lines
from kvzip.evaluation.merge import merge
from kvzip.evaluation.shards import Shard
from kvzip.evaluation.sweep import HEAD_SCORES, Sweep, run
from kvzip.scoring import get_scorer
from tests.evaluation import made

SMALL = Sweep(
    data="facts:60,kv:60",
    scorers=("kvzip", "random"),
    levels=("pair", "head"),
    ratios=(0.3, 1.0),
    num=2,
    max_new_tokens=6,
)


@pytest.fixture(scope="module")
def model():
    return ModelKVzip()


def lines_in(folder):
    """All lines, but for what is measured, as text; sorted."""
    files = sorted(folder.glob("*.jsonl"))
    return sorted(dataclasses.replace(line, seconds={}).to_json() for file in files for line, _ in read_lines(file))


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """An uninterrupted run of `SMALL`."""
    folder = tmp_path_factory.mktemp("whole")
    written = run(model, SMALL, folder, quiet=True)
    assert written == len(lines_in(folder))
    return folder


def test_every_question_is_there_once_for_every_curve_and_ratio(model, whole):
    lines = merge([whole]).lines
    expected = set()
    for source in SMALL.sources(model.tokenizer):
        for sample in source.samples():
            for question in range(len(sample.record().questions)):
                expected |= {(source.label, sample.index, question, *cell) for cell in SMALL.cells}
    assert len(SMALL.cells) == 8
    assert len(lines) == len(expected)
    assert {line.key for line in lines} == expected


def test_lines_say_what_was_asked_answered_and_stored(model, whole):
    for line in merge([whole]).lines:
        name, _, tokens = line.dataset.partition(":")
        options = {"num": 1, "start": line.sample, "tokens": int(tokens), "count_tokens": model.tokenizer}
        (record,) = data.load(name, **options)
        assert line.prompt == record.questions[line.question]
        assert line.references == record.answers[line.question]
        assert line.score == data.score(name, line.prediction, line.references)
        assert line.context_tokens == len(model.encode(record.context))
        assert line.ratio + line.compression_ratio == 1
        assert line.kept == pytest.approx(line.ratio, abs=0.05)
        per_token = 2 * 4 * model.config.head_dim  # bytes of a float32 key and value
        pairs = line.context_tokens * model.config.num_hidden_layers * model.config.num_key_value_heads
        assert line.full_kv_bytes - line.kv_bytes == per_token * round((1 - line.kept) * pairs)
        assert set(line.seconds) == {"prefill", "question", "per_token"}
    assert {line.score for line in merge([whole]).lines} == {0.0, 1.0}


def test_predictions_are_those_of_a_pruned_cache(model, whole):
    (record,) = data.load("facts", num=1, start=1, tokens=60, count_tokens=model.tokenizer)
    kv = model.prefill(record.context, scorer="random", kv_type="evict")
    kv.prune(0.3, "head")
    by_hand = [model.generate(question, kv=kv, max_new_tokens=6) for question in record.questions]
    cell = Cell("random", "head", 0.3, 16)
    found = [line for line in merge([whole]).lines if line.key[:2] == ("facts:60", 1) and line.cell == cell]
    assert [line.prediction for line in found] == by_hand
    assert {line.kv_bytes for line in found} == {kv.nbytes}


def test_the_full_cache_is_asked_once_for_all_curves(model, tmp_path, monkeypatch):
    asked = []
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda *args, kv, **options: asked.append(kv.ratio) or generate(*args, kv=kv, **options)
    )
    run(model, dataclasses.replace(SMALL, data="facts:60", num=1), tmp_path, quiet=True)
    assert asked[0] == 1
    assert len(asked) == 5
    lines = [line for line in merge([tmp_path]).lines if line.ratio == 1]
    of_curve = [[line.prediction for line in lines if line.key[3:5] == curve] for curve in SMALL.curves]
    assert of_curve == of_curve[:1] * 4


def test_scorers_ride_on_one_prefill_a_context(model, tmp_path, monkeypatch):
    seen = []
    prefill = model.prefill
    monkeypatch.setattr(
        model, "prefill", lambda *args, **options: seen.append(options["scorer"]) or prefill(*args, **options)
    )
    sweep = Sweep("facts:60", ("kvzip", "random", "random(seed=3)", "knorm"), ratios=(0.2,), num=2, max_new_tokens=4)
    run(model, sweep, tmp_path, quiet=True)
    assert seen == [["kvzip", "random", "knorm"], ["random(seed=3)"]] * 2
    predicted = {
        scorer: [line.prediction for line in merge([tmp_path]).lines if line.scorer == scorer]
        for scorer in sweep.scorers
    }
    assert predicted["random"] != predicted["random(seed=3)"]


def test_bits_are_an_axis_of_the_same_prefill(model, tmp_path, monkeypatch):
    sweep = Sweep("kv:60", ("kvzip", "random"), ("pair",), (0.3, 1.0), bits=(4, 16, 8), num=1, max_new_tokens=6)
    (record,) = data.load("kv", num=1, tokens=60, count_tokens=model.tokenizer)
    scored = model.prefill(record.context, scorer=["kvzip", "random"])
    prefill, prefills = model.prefill, []
    monkeypatch.setattr(model, "prefill", lambda *args, **options: prefills.append(args) or prefill(*args, **options))
    run(model, sweep, tmp_path, quiet=True)
    assert len(prefills) == 1
    results = merge([tmp_path])
    assert results.notes == []
    assert len(sweep.cells) == 12
    assert len(results.lines) == 12 * len(record.questions)
    for cell in sweep.cells:
        kv = scored.clone()
        kv.prune(cell.ratio, cell.level, scorer=cell.scorer, bits=cell.bits)
        found = [line for line in results.lines if line.cell == cell]
        assert [line.prediction for line in found] == model.generate(record.questions, kv=kv, max_new_tokens=6)
        assert {(line.bits, line.kv_bytes) for line in found} == {(kv.bits, kv.nbytes)}


def test_results_without_bits_are_gone_on_with(model, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "copy")
    made.forget_bits(folder)
    (file,) = folder.glob("*.jsonl")
    text = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(text[:-2]))
    assert run(model, SMALL, folder, quiet=True) == 2
    assert lines_in(folder) == lines_in(whole)
    assert merge([folder]).notes == []


@pytest.mark.parametrize("calls", [0, 1, 7])
def test_killed_and_started_again_the_lines_are_those_of_one_run(calls, model, whole, tmp_path, monkeypatch):
    generate, left = model.generate, [calls]

    def killed(*args, **options):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return generate(*args, **options)

    monkeypatch.setattr(model, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        run(model, SMALL, tmp_path, quiet=True)
    monkeypatch.undo()
    (file,) = tmp_path.glob("*.jsonl")
    done = len(lines_in(tmp_path))
    assert (done > 0) == (calls > 0)
    with file.open("ab") as half:
        half.write(b'{"dataset": "facts:60", "sample": 0, "ques')
    assert run(model, SMALL, tmp_path, quiet=True) == len(lines_in(whole)) - done
    assert lines_in(tmp_path) == lines_in(whole)
    assert merge([tmp_path]).notes == []


def test_a_batch_of_which_a_part_is_missing_is_asked_again_as_it_was(model, whole, tmp_path):
    run(model, SMALL, tmp_path, quiet=True)
    (file,) = tmp_path.glob("*.jsonl")
    text = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(text[: len(text) // 2 + 1]))
    run(model, SMALL, tmp_path, quiet=True)
    assert lines_in(tmp_path) == lines_in(whole)


def test_a_finished_run_has_nothing_to_do(model, whole, monkeypatch):
    before = lines_in(whole)
    monkeypatch.delattr(ModelKVzip, "prefill")
    assert run(model, SMALL, whole, quiet=True) == 0
    assert lines_in(whole) == before


def test_two_shards_are_the_single_run(model, whole, tmp_path):
    for index in (1, 0):
        run(model, SMALL, tmp_path, Shard(index, 2), quiet=True)
    files = sorted(tmp_path.glob("*.jsonl"))
    assert len(files) == 2
    assert {line.sample for line, _ in read_lines(files[1])} == {1}
    assert lines_in(tmp_path) == lines_in(whole)
    assert merge([tmp_path]).notes == []


def test_shards_share_many_datasets_of_one_context_each(model, tmp_path):
    one = dataclasses.replace(SMALL, num=1)
    for index in (0, 1):
        run(model, one, tmp_path, Shard(index, 2), quiet=True)
    files = sorted(tmp_path.glob("*.jsonl"))
    assert [{line.dataset for line, _ in read_lines(file)} for file in files] == [{"facts:60"}, {"kv:60"}]
    assert merge([tmp_path]).notes == []


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("ratios", (0.3,), r"ratios=\[0.3, 1.0\]"),
        ("bits", (16, 4), r"bits=\[16\]"),
        ("scorers", ("kvzip",), "scorers="),
        ("levels", (), "levels="),
        ("seed", 1, "seed=42"),
        ("num", 1, "data="),
        ("max_new_tokens", None, "max_new_tokens=6"),
        ("batch_size", 1, "batch_size=16"),
    ],
)
def test_going_on_with_other_settings_is_refused_by_name(name, value, shown, model, whole):
    with pytest.raises(ValueError, match=f"has results with {shown}"):
        run(model, dataclasses.replace(SMALL, **{name: value}), whole, quiet=True)


def test_going_on_after_a_data_file_was_edited_is_refused_by_the_name_of_the_dataset(model, tmp_path):
    def edited(folder, city):
        found = {"question": "Where?", "answers": {"text": [city]}, "context": f"We are in {city}."}
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "v1.1.jsonl").write_text(json.dumps(found))
        sweep = Sweep("squad", ("random",), ratios=(0.5,), max_new_tokens=2, data_dir=tmp_path / folder)
        return run(model, sweep, tmp_path / "out", quiet=True)

    assert (edited("one", "Lima"), edited("copy", "Lima")) == (1, 0)
    with pytest.raises(
        ValueError, match=r"results with digest of squad='\w+', this run has '\w+': resume with the same"
    ):
        edited("one", "Rome")


def test_batches_do_not_change_answers(model, whole, tmp_path):
    run(model, dataclasses.replace(SMALL, batch_size=1), tmp_path, quiet=True)
    assert lines_in(tmp_path) == lines_in(whole)


def test_stored_head_scores_are_a_curve(model, tmp_path):
    sweep = Sweep("facts:60", (), ratios=(0.3, 1.0), num=1, head_scores=True, max_new_tokens=4)
    run(model, sweep, tmp_path, quiet=True)
    run(model, dataclasses.replace(sweep, head_scores=model.name), tmp_path / "by_name", quiet=True)
    digests = [json.loads(path.read_text())["settings"]["digests"] for path in tmp_path.rglob("*.json")]
    assert digests[0] == digests[1]
    assert set(digests[0]) == {"facts:60", HEAD_SCORES}
    lines = merge([tmp_path]).lines
    assert {line.cell for line in lines} == {(HEAD_SCORES, "head", 0.3, 16), (HEAD_SCORES, "head", 1.0, 16)}
    kv = model.prefill("Some text of a few tokens.", load_score=True)
    kv.prune(0.3)
    assert lines[0].kept == pytest.approx(kv.ratio)


def test_scorers_have_levels_of_their_own():
    sweep = Sweep("facts", ("kvzip", "tova", "pyramidkv"))
    assert sweep.curves == [(name, get_scorer(name).level) for name in sweep.scorers]
    assert len({level for _, level in sweep.curves}) == 3


def test_settings_are_beside_the_results(whole):
    state = json.loads((whole / "shard-000-of-001.json").read_text())
    assert state["settings"]["data"] == {"facts:60": 2, "kv:60": 2}
    assert state["settings"]["scorers"]["random"] == "Random(seed=0)"
    assert {"kvzip", "torch", "transformers", "git", "device", "backend", "started"} <= set(state["runs"][0])
