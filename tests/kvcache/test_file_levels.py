"""Levels that go with stored weights: duo, whole heads and windows; lu_kv, a budget for every head from a curve."""

import math

import numpy as np
import pytest
import torch

from kvzip import ModelKVzip
from kvzip.kvcache import get_level, select
from tests.tiny import build, ids


def test_duo_keeps_whole_heads_and_windows():
    scores = torch.tensor([[0.1, 0.9], [0.5, 0.3]])[..., None].expand(2, 2, 100)
    for ratio, whole in ((1.0, 4), (0.9, 4), (0.8, 3), (0.55, 2), (0.35, 1), (0.1, 0), (0.01, 0)):
        keep = select(scores, ratio, "duo(sink_size=3, recent_size=7)").keep
        heads = keep.flatten(0, 1)[[1, 2, 3, 0]]  # from the best to the worst
        assert heads.sum(-1).tolist() == [100] * whole + [10] * (4 - whole)
        assert bool(keep[..., :3].all())
        assert bool(keep[..., -7:].all())
    assert bool(select(scores, 0.1, "duo").keep.all()), "nothing is outside the windows"
    first = select(scores, 0.6, "duo(sink_size=3, recent_size=7)").keep
    then = select(scores, 0.35, "duo(sink_size=3, recent_size=7)", available=first).keep
    assert torch.equal(then, select(scores, 0.35, "duo(sink_size=3, recent_size=7)").keep)
    with pytest.raises(ValueError, match="keep 3 whole heads"):
        select(scores, 0.8, "duo(sink_size=3, recent_size=7)", available=first)


def test_duo_prunes_a_kv():
    kv = ModelKVzip.from_model(build("llama"), None).prefill(ids(37), prefix_ids=ids(4), scorer="duo_attention")
    kv.prune(0.5, "duo(sink_size=2, recent_size=3)")
    assert set((kv.kv_len_per_head - kv.prefix_length).flatten().tolist()) == {5, 37}


@pytest.mark.parametrize("wrong", ["sink_size=-1", "recent_size=2.5", "sink_size=0, recent_size=0"])
def test_bad_windows_are_refused(wrong):
    with pytest.raises(ValueError, match=r"sink_size|recent_size"):
        get_level(f"duo({wrong})")


# -- lu_kv -------------------------------------------------------------------------------------------------------------


def curve(tmp_path, layers=2, heads=2):
    """Heads that lose 20 % more or less than asked."""
    share = np.resize([0.8, 1.2], (layers, heads))
    path = tmp_path / "curve.npy"
    np.save(path, np.linspace(0.01, 0.99, 99)[:, None, None].clip(0, 0.8) * share)
    return str(path)


def naive_budgets(rates, length):
    """Floors, then one more for the largest remainders of the layer."""
    rows = []
    for layer in rates:
        ideal = [rate * length for rate in layer]
        counts = [math.floor(one) for one in ideal]
        order = sorted(range(len(layer)), key=lambda i: (counts[i] - ideal[i], i))
        for i in order[: round(sum(ideal)) - sum(counts)]:
            counts[i] += 1
        rows.append([min(length, max(1, one)) for one in counts])
    return rows


@pytest.mark.parametrize("length", [1, 5, 37, 1001])
@pytest.mark.parametrize("ratio", [1.0, 0.995, 0.9, 0.505, 0.5, 0.3333, 0.05, 0.003])
def test_lu_kv_budgets_follow_the_curve(tmp_path, ratio, length):
    """Between two rows on the line, to nothing lost at ratio 1; every head keeps something."""
    level = get_level(f"lu_kv(path={curve(tmp_path)!r})")
    removed = [0.8 * min(1 - ratio, 0.8), 1.2 * min(1 - ratio, 0.8)]
    if ratio < 0.01:
        removed = [1 - ratio * 100 * (1 - 0.64), 1 - ratio * 100 * (1 - 0.96)]
    rates = [[1 - one for one in removed]] * 2
    found = torch.tensor(level.budgets(ratio, length).tolist())
    assert float((found - torch.tensor(naive_budgets(rates, length))).abs().max()) <= 1e-9
    if ratio == 1:
        assert bool((found == length).all())


def test_lu_kv_keeps_the_best_of_every_head_and_its_ends(tmp_path):
    level = get_level(f"lu_kv(path={curve(tmp_path)!r}, sink=2, window=3)")
    scores = torch.rand(2, 2, 50, generator=torch.Generator().manual_seed(0))
    keep = select(scores, 0.5, level).keep
    assert keep.sum(-1).tolist() == [[30, 20], [30, 20]]
    assert bool(keep[..., :2].all())
    assert bool(keep[..., -3:].all())
    for row, mask in zip(scores.flatten(0, 1), keep.flatten(0, 1), strict=True):
        inner = slice(2, -3)
        assert float(row[inner][mask[inner]].min()) > float(row[inner][~mask[inner]].max())
    assert not (select(scores, 0.2, level, available=keep).keep & ~keep).any()
    with pytest.raises(ValueError, match="head 0 of layer 0"):
        select(scores, 0.9, level, available=keep)


def test_lu_kv_refuses_what_is_no_curve_for_the_model(tmp_path):
    with pytest.raises(ValueError, match="needs the"):
        get_level("lu_kv")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npy"):
        get_level("lu_kv(path='nowhere.npy')")
    path = tmp_path / "wrong.npy"
    for content, words in (
        (np.zeros((99, 2)), "expected fractions"),
        (np.zeros((98, 2, 2)), "expected fractions"),
        (np.full((99, 2, 2), 1.5), "outside"),
        (np.full((99, 2, 2), np.nan), "outside"),
        (np.array([{}], dtype=object), "not a .npy file"),
    ):
        np.save(path, content, allow_pickle=True)
        with pytest.raises(ValueError, match=words):
            get_level(f"lu_kv(path={str(path)!r})")
    with pytest.raises(ValueError, match=r"is for \(3, 2\) layers"):
        select(torch.rand(2, 2, 9), 0.5, f"lu_kv(path={curve(tmp_path, layers=3)!r})")
