"""The trainer of gates: exact where it can be, better than a constant elsewhere, and what it writes is used."""

import sys
from functools import cache
from itertools import islice

import pytest
import torch

from kvzip import ModelKVzip
from kvzip.scoring.files import ScorerFile
from kvzip.scoring.gates import KINDS
from kvzip.scoring.methods.gate import TrainedGate
from tools import teaching, train_gate
from tools.teaching import agreement, from_files, generated, ranks
from tools.train_gate import compare, fit, observe, targets


@cache
def bundled():
    return ModelKVzip()


def problem(n=600, size=12):
    """Inputs with features of very different size, and targets that a straight line explains."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, size, generator=generator) * torch.logspace(-2, 2, size)
    weight = torch.randn(2, size, generator=generator) / torch.logspace(-2, 2, size)
    return hidden, hidden @ weight.T + torch.tensor([3.0, -5.0])


def test_a_linear_gate_is_the_least_squares_solution():
    hidden, wanted = problem()
    wanted = wanted + torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    gate = fit("linear", hidden, wanted, groups=2, width=0)
    rows = torch.cat([hidden, torch.ones(len(hidden), 1)], 1).double()
    best = rows @ torch.linalg.lstsq(rows, wanted.double()).solution
    found = gate(hidden).T
    assert float((found - wanted).square().mean()) <= 1.01 * float((best - wanted).square().mean())


@pytest.mark.parametrize(("kind", "left"), [("mlp", 0.1), ("low-rank", 0.6)])
def test_other_gates_learn_whatever_the_size_of_the_features(kind, left, monkeypatch):
    """The scale of the inputs is folded into the weights. A low-rank gate gives logarithms of numbers below 1."""
    monkeypatch.setattr(train_gate, "STEPS", 300)
    monkeypatch.setattr(train_gate, "BATCH", 200)
    hidden, wanted = problem()
    wanted = wanted if kind == "mlp" else -wanted.abs()
    gate = fit(kind, hidden, wanted, groups=2, width=16)
    error = float((gate(hidden).T - wanted).square().mean())
    assert error <= left * float((wanted - wanted.mean(0)).square().mean())
    again = fit(kind, hidden, wanted, groups=2, width=16)
    assert torch.equal(again(hidden), gate(hidden)), "the same seed, the same gate"
    assert not torch.equal(fit(kind, hidden, wanted, groups=2, width=16, seed=1)(hidden), gate(hidden))


def test_training_ends_when_the_time_is_over(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(teaching.time, "monotonic", lambda: next(clock))
    hidden, wanted = problem(50)
    fit("mlp", hidden, wanted, groups=1, width=4, seconds=20)
    assert next(clock) == 21, "a step a tick"


def test_targets_are_logarithms_with_a_floor():
    found = targets(torch.tensor([[1.0, 0.5, 0.0], [1e-3, 1e-30, 0.25]]))
    assert found.shape == (3, 2)
    torch.testing.assert_close(found[0].exp(), torch.tensor([1.0, 1e-3]))
    assert float(found.min()) == pytest.approx(-13.8155, abs=1e-3)


def test_ranks_share_their_mean_among_equals():
    assert ranks(torch.tensor([5.0, 1.0, 5.0, 2.0, 5.0])).tolist() == [4, 1, 4, 2, 4]


def test_agreement_is_that_of_the_order():
    scores = torch.rand(2, 50, generator=torch.Generator().manual_seed(0))
    assert agreement(scores.log(), scores) == pytest.approx((1, 1))
    assert agreement(-scores, scores) == pytest.approx((-1, 0))
    correlation, overlap = agreement(torch.rand(2, 50, generator=torch.Generator().manual_seed(1)), scores)
    assert abs(correlation) < 0.3
    assert 0.1 < overlap < 0.5
    tied = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    best = torch.tensor([0.0, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert agreement(best, tied)[1] == 1, "any three of four equal ones are right"


def test_documents_are_those_of_the_split_and_seed():
    cases = (("train", 0), ("train", 0), ("train", 1), ("test", 0))
    found = [list(islice(generated(bundled(), ("facts", "kv"), split, seed), 2)) for split, seed in cases]
    first, same, other, test = found
    assert first == same
    assert not {*first} & {*other, *test}


def test_texts_are_cut_into_documents(tmp_path):
    (tmp_path / "a.txt").write_text("The red box holds 4417. " * 40)
    cut = from_files(bundled(), [tmp_path / "a.txt"], 100, seed=0)
    whole = bundled().encode("The red box holds 4417. " * 40)
    assert sorted(map(len, cut)) == sorted([100] * (len(whole) // 100) + [len(whole) % 100] * (len(whole) % 100 > 0))
    assert sorted(token for one in cut for token in one) == sorted(whole)
    with pytest.raises(ValueError, match="expected 2 or more"):
        from_files(bundled(), [tmp_path / "a.txt"], 10_000, seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_from_documents_to_a_file_that_scores(kind, tmp_path, monkeypatch, capsys):
    """The command, with little to learn from: still far better than chance on documents it has not seen."""
    monkeypatch.setattr(train_gate, "STEPS", 60)
    monkeypatch.setattr(train_gate, "BATCH", 500)
    monkeypatch.setattr(teaching, "HELD_OUT", 2)
    out = tmp_path / "gate"
    command = f"train_gate --kind {kind} --lengths 256 --positions 1000 --out {out}"
    monkeypatch.setattr(sys, "argv", command.split())
    train_gate.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split()[1:] for line in lines if line.startswith("  layer")]
    assert [row[0] for row in rows] == [*(f"{i}:" for i in range(bundled().head_shape[0])), "all:"]
    correlation, overlap = map(float, rows[-1][1:])
    assert correlation > 0.4
    assert overlap > 0.5
    file = ScorerFile.load(out, "gate")
    assert file.model_id == bundled().model_id["weights"]
    assert file.settings["kind"] == kind
    scorer = TrainedGate(path=out)
    example = observe(bundled(), "kvzip", "The red box holds 4417. " * 9)
    scores = bundled().prefill("The red box holds 4417. " * 9, scorer=scorer).scores
    found = torch.stack([gate(hidden) for gate, hidden in zip(scorer.gates, example.hidden, strict=True)])
    torch.testing.assert_close(scores, found, atol=1e-5, rtol=1e-5)
    assert compare(scorer.gates, [example])[-1] == pytest.approx(agreement(scores, example.scores))


def test_texts_of_ones_own_and_another_models_name(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("The red box holds 4417. The blue box holds 9035. " * 40)
    out = tmp_path / "gate"
    command = f"train_gate --kind linear --text {tmp_path / 'a.txt'} --tokens 100 --out {out}"
    monkeypatch.setattr(sys, "argv", command.split())
    train_gate.main()
    assert ScorerFile.load(out, "gate").settings["data"] == "a.txt"
    monkeypatch.setattr(sys, "argv", ["train_gate", "--model", "qwen3-8b"])
    with pytest.raises(SystemExit):
        train_gate.main()
    assert "--out is needed" in capsys.readouterr().err
