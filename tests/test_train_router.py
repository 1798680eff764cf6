"""The trainer of routers: its command writes a file that scores, and says how near it came."""

import sys

from kvzip import ModelKVzip
from kvzip.scoring.methods.pikv import PiKV
from tools import teaching, train_router


def test_from_documents_to_a_file_that_scores(tmp_path, monkeypatch, capsys):
    """One of two experts is the teacher: the trained mixture comes nearer to it than the untrained one."""
    monkeypatch.setattr(teaching, "HELD_OUT", 2)
    out = tmp_path / "router"
    command = f"train_router --experts knorm,random --scorer knorm --lengths 128 --positions 1000 --out {out}"
    monkeypatch.setattr(sys, "argv", command.split())
    train_router.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    found = {name.removesuffix(":"): (float(a), float(b)) for name, a, b in rows}
    assert set(found) == {"trained", "untrained", "knorm", "random"}
    assert found["knorm"] == (1, 1)
    assert found["trained"][0] > found["untrained"][0] + 0.1
    scorer = PiKV(path=out)
    assert scorer.experts == ("knorm", "random")
    assert ModelKVzip().prefill("The red box holds 4417. " * 9, scorer=scorer).scorers == ("pikv",)
