"""What the trainers are told wrong is said before anything is loaded or trained, in one line, without a traceback."""

import re
import sys

import pytest

from tools import train_gate, train_router


@pytest.mark.parametrize("trainer", [train_gate, train_router])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--out {folder}/none/file", "no folder .*none"),
        ("--out {folder}/file --positions 0", "--positions.*0"),
        ("--out {folder}/file --scorer kvzp", "unknown scorer 'kvzp'.*did you mean 'kvzip'"),
        ("--out {folder}/file --model bundle", "unknown model 'bundle'.*bundled"),
        ("--out {folder}/file --text {folder}/none.txt", "none.txt"),
    ],
)
def test_mistakes_are_told_at_once(trainer, options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["trainer", *options.format(folder=tmp_path).split()])
    monkeypatch.setattr(trainer, "train", None)
    with pytest.raises(SystemExit):
        trainer.main()
    assert re.search(words, capsys.readouterr().err.replace("\n", " "))
    assert not list(tmp_path.iterdir())
