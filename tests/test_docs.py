"""What the documents show runs as shown."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from kvzip import ModelKVzip, list_scorers
from kvzip.scoring import registry
from tests import tiny

ROOT = Path(__file__).parent.parent
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))


def python_blocks(path):
    """The Python code blocks of a Markdown file."""
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), flags=re.DOTALL)


@pytest.fixture(autouse=True)
def what_pages_register_goes(monkeypatch):
    list_scorers()  # all are imported
    monkeypatch.setattr(registry._SCORERS, "_classes", dict(registry._SCORERS._classes))


def test_add_a_scorer_example_runs():
    namespace = {"__name__": "valuenorm"}
    exec(python_blocks("docs/add_a_scorer.md")[0], namespace)
    model = ModelKVzip.from_model(tiny.build("llama"), None)
    kv = model.prefill(tiny.ids(20), prefix_ids=[1], scorer=["valuenorm", namespace["ValueNorm"](p=2)][1])
    expected = torch.stack([layer.store.values.view(2, 21, -1)[:, 1:].norm(dim=-1) ** 2 for layer in kv.context_layers])
    torch.testing.assert_close(kv.scores, expected)
    assert "valuenorm" in model.prefill(tiny.ids(20), scorer="valuenorm").scorers
    assert abs(kv.prune(0.3).ratio - 0.3) < 0.01


def test_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    quick_start, own_idea = python_blocks("README.md")
    exec(quick_start, namespace)
    printed = capsys.readouterr().out
    assert "Lisbon" in printed.splitlines()[0]
    assert re.search(r"kept (29\.[5-9]|30\.\d)%", printed)
    assert (tmp_path / "ctx.safetensors").is_file()
    exec(own_idea, namespace)
    answers = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert answers.keys() == {"kvzip", "loud_values"}
    assert "Lisbon" in answers["kvzip"]


def test_guide_runs(tmp_path, monkeypatch, capsys):
    """Its blocks in order, on the bundled model and a book of two sentences."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("Ada Moreno works as a baker. Ada Moreno lives in Lisbon.")
    namespace = {"__name__": "guide"}
    for block in python_blocks("docs/guide.md"):
        exec(block.replace('"qwen2.5-7b"', '"bundled"'), namespace)
    assert len(capsys.readouterr().out.splitlines()) == 3  # an answer a question
    assert namespace["output"].shape[1] > namespace["ids"].shape[1]
    assert namespace["kv"].get_seq_length() < namespace["ids"].shape[1]  # what was appended is gone


@pytest.mark.parametrize("path", PAGES)
def test_links_lead_to_files(path):
    text = (ROOT / path).read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert ((ROOT / path).parent / target).exists(), target


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(path, capsys):
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.count("\n") >= 3
