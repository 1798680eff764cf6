"""demo.py does what its help says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import demo

ROOT = Path(__file__).parent.parent


def run(*arguments, capsys):
    """Run the demo in this process; return what it printed."""
    demo.run(demo.parse_args(list(arguments)))
    return capsys.readouterr().out


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "1.5"], "ratio must be"),
        (["--model", "bundeld"], "did you mean 'bundled'"),
        (["--context", "nowhere.txt", "--questions", "q"], "nowhere.txt"),
    ],
)
def test_mistakes_give_one_line_and_a_status(arguments, message, tmp_path):
    command = [sys.executable, str(ROOT / "demo.py"), "--out", str(tmp_path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_names_every_method():
    done = subprocess.run([sys.executable, str(ROOT / "demo.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(method in done.stdout for method in demo.METHODS)
