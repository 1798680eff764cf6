"""test.py, the profiler: runs without arguments, gives tables or JSON, and tells mistakes in one line."""

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvzip import head_scores
from kvzip.attention import BACKENDS
from kvzip.kvcache import KV_TYPES

SCRIPT = Path(__file__).parents[1] / "test.py"


@pytest.fixture(scope="module")
def cli():
    """The script as a module; its name is a package's of the standard library."""
    spec = importlib.util.spec_from_file_location("profiler_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments, cwd):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, cwd=cwd, timeout=300)


def status_of(cli, *arguments):
    """The exit status of a run in this process."""
    try:
        return cli.main(list(arguments))
    except SystemExit as leaving:
        return leaving.code


def test_runs_without_arguments(tmp_path):
    done = run(cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for shown in ("bundled", "facts, context 0", "prefill", "score", "decode, pruned cache", "flipped", "KV cache"):
        assert shown in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert not list(tmp_path.iterdir())


def test_json_on_the_standard_output_is_all_there_is(cli, capsys):
    options = (
        "-d",
        "facts:64,kv:64",
        "--idx",
        "5",
        "--num",
        "2",
        "--kv-type",
        "retain",
        "-r",
        "0.5",
        "--level",
        "pair-uniform",
    )
    assert status_of(cli, *options, "--scorer", "knorm", "--max_new_tokens", "3", "--seed", "1", "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["data"], one["index"]) for one in found["contexts"]] == [
        ("facts:64", 5),
        ("facts:64", 6),
        ("kv:64", 5),
        ("kv:64", 6),
    ]
    assert [stage["name"] for stage in found["stages"]] == ["load", "warm-up"]
    wanted = {"scorer": "knorm", "ratio": 0.5, "level": "pair-uniform", "kv_type": "retain", "max_new_tokens": 3}
    assert wanted.items() <= found["settings"].items()
    assert (found["data"], found["seed"]) == ("facts:64,kv:64", 1)
    for context in found["contexts"]:
        assert context["ratio"] == pytest.approx(0.5, abs=0.02)
        assert context["nbytes"] == context["full_nbytes"]
        assert all(question["full"]["tokens"] <= 3 for question in context["questions"])
        for stage in context["stages"]:
            if stage["tokens"]:
                assert stage["tokens_per_second"] * stage["seconds"] == pytest.approx(stage["tokens"])


def test_saves_json_and_head_scores_that_it_can_load(cli, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert status_of(cli, "-d", "facts:64", "--num", "2", "--save-head-score", "--json", "all.json") == 0
    out, err = capsys.readouterr()
    name = "head-scores-bundled-facts-64-0-1.json"
    assert name in err
    assert "2 contexts together" in out
    assert head_scores.load(name).tensor.shape == (5, 4)
    assert len(json.loads(Path("all.json").read_text())["contexts"]) == 2
    assert status_of(cli, "-d", "facts:64", "--load_score", name, "--bits", "4", "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["settings"]["level"], found["settings"]["bits"]) == ("head", 4)
    assert [stage["name"] for stage in found["contexts"][0]["stages"]][:2] == ["prefill", "query prefill"]


USAGE = [
    (["--frobnicate"], "unrecognized arguments"),
    (["--ratio", "1.5"], "ratio must be"),
    (["--ratio", "some"], "invalid float value"),
    (["--bits", "3"], "bits must be one of (16, 8, 4)"),
    (["--level", "pear"], "did you mean 'pair'"),
    (["--scorer", "kvzup"], "did you mean 'kvzip'"),
    (["--scorer", "snapkv(windw=3)"], "has no setting 'windw'"),
    (["--scorer", "finch"], "scorer 'finch' scores a context for one question"),
    (["--model", "bundeld"], "did you mean 'bundled'"),
    (["--model", "./nowhere"], "./nowhere"),
    (["--data", "fact"], "did you mean 'facts'"),
    (["--data", "facts:many"], "'many'"),
    (["--idx", "-1"], "--idx must be 0 or more"),
    (["--num", "0"], "--num 1 or more"),
    (["--kv_type", "evit"], "'evict', 'retain'"),
    (["--device", "gpu"], "device 'gpu' cannot be used"),
    (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    (["--device", "cpu", "--device-map", "auto"], "not both"),
    (["--max_new_tokens", "0"], "max_new_tokens must be at least 1"),
    (["--load_score", "--scorer", "knorm"], "--load_score scores nothing"),
    (["--load_score", "--level", "pair"], "level must be 'head'"),
    (["--json", "nowhere/all.json"], "its folder is missing"),
    (["--save_head_score", "."], "it is a folder"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE, ids=[" ".join(arguments) for arguments, _ in USAGE])
def test_a_wrong_command_line_gives_one_line_and_status_2(cli, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert status_of(cli, *arguments) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("test.py: ")
    assert (err.count("\n"), out) == (1, "")


def broken_model(folder):
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"')
    return str(folder)


def test_what_cannot_be_read_gives_one_line_and_status_1(cli, tmp_path, capsys):
    nowhere = str(tmp_path / "nowhere")
    cases = [
        (["--model", broken_model(tmp_path / "model")], "cannot load model"),
        (["--data", "squad", "--data_dir", nowhere], nowhere),
        (["--data", "facts:1"], "ask for a longer context"),
        (["--data", "facts:9k"], "facts:9216, sample 0: context and query have"),
        (["--load_score", "nothing.json"], "no head scores 'nothing.json'"),
        (["--backend", "cuda", "--device", "cpu"], "backend 'cuda' computes on cuda"),
    ]
    for arguments, message in cases:
        assert status_of(cli, *arguments, "--json", "-") == 1, arguments
        out, err = capsys.readouterr()
        assert message in err
        assert (err.count("\n"), out) == (1, "")


def test_what_was_computed_before_an_error_is_kept(cli, tmp_path, capsys):
    """The second context is longer than the model has positions."""
    files = {"--json": tmp_path / "all.json", "--save_head_score": tmp_path / "heads.json"}
    assert status_of(cli, "-d", "facts:60,facts:9k", *(str(part) for pair in files.items() for part in pair)) == 1
    assert "facts:9216, sample 0: context and query have" in capsys.readouterr().err
    (context,) = json.loads(files["--json"].read_text())["contexts"]
    assert context["questions"]
    assert files["--save_head_score"].is_file()


def test_a_full_disk_for_head_scores_leaves_the_rest(cli, tmp_path, capsys):
    arguments = ["-d", "facts:60", "--json", str(tmp_path / "all.json"), "--save_head_score", "/dev/full"]
    assert status_of(cli, *arguments) == 1
    assert "cannot write '/dev/full': No space left" in capsys.readouterr().err
    assert json.loads((tmp_path / "all.json").read_text())["contexts"]


def test_a_full_disk_is_told_with_the_files_name(cli, capsys):
    with pytest.raises(OSError, match="cannot write '/dev/full': No space left"):
        cli.write("/dev/full", "text")


def test_debug_shows_where_an_error_comes_from(cli):
    with pytest.raises(ValueError, match="unknown dataset"):
        cli.main(["--debug", "--data", "fact"])


def test_our_own_errors_are_not_swallowed(cli, monkeypatch):
    def broken(args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "run", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main([])


def test_interrupted_it_leaves_one_line_and_status_130(tmp_path):
    """Python loses an interrupt that falls into a destructor or an import's callback; who waits presses again.

    A shell's background jobs ignore interrupts, and so does what they start, these tests and theirs: not here.
    """
    listen = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    listen += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    command = [sys.executable, "-c", listen, SCRIPT, "--num", "1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert "bundled" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "test.py: interrupted\n")


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    """With a run that only prints, more than a pipe holds: nothing has to be loaded for it."""
    code = f"import runpy, sys; script = runpy.run_path({str(SCRIPT)!r}); main = script['main']; "
    code += "main.__globals__['run'] = lambda args: print('first\\n' + 'x' * 10**7); sys.exit(main([]))"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout.readline() == "first\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_help_names_all_choices_and_both_spellings(cli, capsys):
    assert status_of(cli, "--help") == 0
    text = capsys.readouterr().out
    for shown in (
        "--kv_type",
        "--kv-type",
        "--save_head_score",
        "--save-head-score",
        "snapkv",
        "pair-uniform",
        "needle",
    ):
        assert shown in text
    assert set(cli.BACKENDS) == {"auto", *BACKENDS}
    assert all(f"--kv_type {{{','.join(KV_TYPES)}}}" in text for _ in KV_TYPES)
