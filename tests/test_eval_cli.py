"""eval.py does what its help says: resumes after a kill, runs under launchers, tells mistakes in one line."""

import os
import resource
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import eval as cli
from kvzip.evaluation import sweep
from kvzip.evaluation.merge import merge
from kvzip.evaluation.shards import Shard
from kvzip.model.loading import bundled_path

ROOT = Path(__file__).parent.parent
SMALL = ["-d", "facts:60", "--scorer", "random,knorm", "--ratio", "0.5,1.0", "-n", "3"]
SMALL += ["--max-new-tokens", "4", "--quiet"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def answers(folder):
    """What a folder has, but for what is measured."""
    return {line.key: (line.prediction, line.score, line.kv_bytes) for line in merge([folder]).lines}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of `SMALL` that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    assert cli.main([*SMALL, "--output", str(folder)]) == 0
    return folder


def test_a_killed_process_goes_on_where_it_was(whole, tmp_path):
    command = [sys.executable, str(ROOT / "eval.py"), *SMALL, "-o", str(tmp_path)]
    process = subprocess.Popen(command, env=ENVIRONMENT)
    lines = tmp_path / "shard-000-of-001.jsonl"
    while process.poll() is None and (not lines.exists() or lines.read_bytes().count(b"\n") < 3):
        time.sleep(0.005)
    process.kill()
    process.wait()
    before = lines.read_bytes()
    assert before.count(b"\n") >= 3
    assert cli.main([*SMALL, "-o", str(tmp_path)]) == 0
    assert lines.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert answers(tmp_path) == answers(whole)


def test_torchrun_splits_the_contexts(whole, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(ROOT / "eval.py"), *SMALL, "-o", str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in tmp_path.glob("*.jsonl")} == {Shard(0, 2).name, Shard(1, 2).name}
    assert answers(tmp_path) == answers(whole)
    assert merge([tmp_path]).notes == []


@contextmanager
def room(size):
    """Let no file grow beyond `size` bytes: the kernel's own error, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_and_nothing_is_lost(whole, tmp_path, capsys):
    with room(3000):  # the settings and a few lines
        assert cli.main([*SMALL, "-o", str(tmp_path)]) == 2
    assert "cannot write" in capsys.readouterr().err.splitlines()[-1]
    kept = answers(tmp_path)
    assert 0 < len(kept) < len(answers(whole))
    assert cli.main([*SMALL, "-o", str(tmp_path)]) == 0
    assert answers(tmp_path) == answers(whole)


def test_the_environment_of_an_array_chooses_the_shard(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    for task in ("1", "2"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        assert cli.main([*SMALL, "-o", str(tmp_path)]) == 0
    assert "shard 1 of 2" in capsys.readouterr().out
    assert answers(tmp_path) == answers(whole)


def test_report_prints_notes_apart_from_tables(whole, tmp_path, capsys):
    for style in ("markdown", "csv"):
        assert cli.main(["report", str(whole), "--format", style, "-o", str(tmp_path)]) == 0
        printed = capsys.readouterr()
        assert "knorm" in printed.out
        assert str(tmp_path / "report.html") in printed.err
    assert (tmp_path / "report.html").exists()


def test_going_on_with_other_settings_is_refused(whole, capsys):
    assert cli.main([*SMALL, "-o", str(whole), "--seed", "7"]) == 2
    assert "seed=42, this run has 7" in capsys.readouterr().err


def test_weights_that_are_cut_are_told(tmp_path, capsys):
    model = shutil.copytree(bundled_path(), tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"cut")
    assert cli.main([*SMALL, "--model", str(model), "-o", str(tmp_path)]) == 2
    assert f"eval.py: cannot load model '{model}'" in capsys.readouterr().err.splitlines()[-1]


def test_results_of_another_name_are_told(whole, tmp_path, capsys):
    for path in whole.glob("shard-*"):
        shutil.copy(path, tmp_path / f"mine{path.suffix}")
    assert cli.main(["report", str(tmp_path / "mine.jsonl")]) == 2
    assert "called shard-INDEX-of-COUNT, such as shard-000-of-001; got 'mine'" in capsys.readouterr().err


def test_a_mistake_that_shows_late_does_not_occupy_the_folder(tmp_path, capsys):
    assert cli.main([*SMALL, "--scorer", "kvzap", "-o", str(tmp_path)]) == 2
    assert "kvzap" in capsys.readouterr().err
    assert cli.main([*SMALL, "-n", "1", "-o", str(tmp_path)]) == 0


def test_where_everything_was_left_out_the_report_says_so(tmp_path, capsys):
    assert cli.main([*SMALL, "--max-context", "5", "-o", str(tmp_path)]) == 0
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "3 contexts of facts:60 have more than 5 tokens and were left out" in capsys.readouterr().err


def test_no_arguments_are_those_of_the_caller(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["eval.py", "--num", "0"])
    monkeypatch.setattr(cli, "sweep", seen.append)
    assert cli.main([]) == 0
    assert seen[0].num == 100


def test_interrupted(monkeypatch, tmp_path, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run", interrupted)
    assert cli.main([*SMALL, "-o", str(tmp_path)]) == 130
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == "eval.py: interrupted; what is computed is kept, the same command goes on"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scorer", "kvzop"], "did you mean 'kvzip'"),
        (["--scorer", "knorm(size=3)"], "no setting 'size'"),
        (["--scorer", "finch"], "scorer 'finch' scores a context for one question"),
        (["-d", "factz"], "did you mean 'facts'"),
        (["-d", "facts:none"], "'none' in 'facts:none' is no number of tokens"),
        (["-d", "facts:3"], "no fact fits into 3 tokens"),
        (["--level", "pears"], "did you mean 'pair'"),
        (["--ratio", "0.5,half"], "--ratio '0.5,half' is not a comma list of numbers"),
        (["--ratio", "1.2"], "got 1.2"),
        (["--bits", "16,3"], "bits must be one of (16, 8, 4)"),
        (["--bits", "16,four"], "--bits '16,four' is not a comma list of 16, 8, 4"),
        (["--num", "0"], "num must be at least 1"),
        (["--model", "bundeld"], "did you mean 'bundled'"),
        (["--device", "gpu"], "device 'gpu' cannot be used"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["--device", "cpu", "--device-map", "auto"], "not both"),
        (["--head-scores", "nobodys"], "no head scores 'nobodys'"),
        (["--shard", "2/2"], "shard 2 of 2 does not exist"),
        (["--output", "/dev/null/results"], "Not a directory: /dev/null/results"),
        (["report", "/nowhere"], "no results at /nowhere"),
    ],
)
def test_mistakes_give_one_line_and_a_status(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    defaults = [] if arguments[0] == "report" else ["--num", "1", "--quiet"]
    assert cli.main([*arguments[:1], *defaults, *arguments[1:]] if not defaults else [*defaults, *arguments]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eval.py: ")]
    assert len(told) == 1
    assert message in told[0]


@pytest.mark.parametrize("arguments", [["--scorrer", "kvzip"], ["--num", "many"], ["report"], ["--backend", "fast"]])
def test_wrong_flags_give_one_line_and_a_status(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_ours_are_not_told_as_the_users_mistakes(monkeypatch, tmp_path):
    def broken(*args, **options):
        raise KeyError("ours")

    monkeypatch.setattr(sweep, "run", broken)
    with pytest.raises(KeyError):
        cli.main([*SMALL, "-o", str(tmp_path)])


def test_flags_may_have_underscores(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(sweep, "run", lambda model, plan, *args, **options: seen.append(plan) or 0)
    flags = ["--max_context", "50", "--batch_size=3", "--bits", "16,4"]
    assert cli.main([*SMALL, *flags, "-o", str(tmp_path)]) == 0
    assert (seen[0].max_context, seen[0].batch_size, seen[0].bits) == (50, 3, (16, 4))


def test_help_has_names_and_defaults(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for known in ("facts", "kvzip", "pair-uniform", "results/MODEL_DATA", "(42)"):
        assert known in text
