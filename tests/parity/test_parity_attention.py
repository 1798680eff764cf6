"""Numbers of kvpress 0.5.5 for methods that look at attention and choose their own budgets: pyramidkv, simlayerkv,
finch, kvcompose and kvgrad's gradients."""

import pytest
import torch

from kvzip.kvcache.levels.pyramid import Pyramid
from kvzip.kvcache.selection import select, top_k_mask
from kvzip.scoring.methods.kvgrad import KVgrad
from tests.parity import golden
from tests.parity.test_parity_kvpress import TOLERANCE, check_scores, with_settings

MANIFEST = golden.manifest("kvpress")


def cases(press):
    """(file, variant) of a press."""
    files = [(file, facts) for file, facts in sorted(MANIFEST["files"].items()) if facts.get("press") == press]
    assert len(files) == 4
    return [(file, variant) for file, facts in files for variant in facts["variants"]]


def read(file, variant):
    """Model, ids, hyper-parameters and tensors of a case."""
    arch, length, _ = file.split("/")
    ids = golden.tensors("kvpress", f"{arch}/{length}/inputs.safetensors")["input_ids"][0].tolist()
    tensors = golden.tensors("kvpress", file)
    found = {name.removeprefix(f"{variant}."): t for name, t in tensors.items() if name.startswith(f"{variant}.")}
    settings = MANIFEST["files"][file]["variants"][variant]["hyperparameters"]
    return golden.model(f"kvpress/{arch}/model"), ids, settings, found


def check_kept(ours, found):
    """The recorded mask wherever its order is decided, and its counts."""
    theirs = found["kept_mask"].bool()
    unclear = found["ambiguous_mask"].bool() if "ambiguous_mask" in found else torch.zeros_like(theirs)
    assert torch.equal(ours[~unclear], theirs[~unclear])
    assert torch.equal(ours.sum(-1), theirs.sum(-1))


@pytest.mark.parametrize(("file", "variant"), cases("pyramidkv"))
def test_pyramidkv(file, variant):
    model, ids, settings, found = read(file, variant)
    kv = model.prefill(ids, scorer=with_settings("pyramidkv", settings), prefix_ids=[])
    check_scores(kv.scores, found["scores"])
    level = Pyramid(beta=settings["beta"], window_size=settings["window_size"])
    for removed, budgets in zip(found["budget_table_ratios"].tolist(), found["budget_table"].tolist(), strict=True):
        assert level.budgets(1 - round(removed, 3), 3, len(ids)) == budgets
    assert level.budgets(0.5, 3, len(ids)) == found["kept_count"].tolist()
    kv.prune(0.5)
    check_kept(kv.keep_mask, found)


@pytest.mark.parametrize(("file", "variant"), cases("simlayerkv"))
def test_simlayerkv(file, variant):
    """kvpress's masks need its count of kept recent tokens, which is n_last less than the paper's."""
    model, ids, settings, found = read(file, variant)
    kept = settings["n_recent"] - settings["n_last"]
    scorer = with_settings("simlayerkv", settings, n_recent_kept=kept)
    kv = model.prefill(ids, scorer=scorer, prefix_ids=[], kv_type="retain")
    middle = kv.scores[:, 0, len(ids) // 2]
    torch.testing.assert_close(-middle, found["mass"], atol=0, rtol=TOLERANCE)
    kv.prune(threshold=-settings["lazy_threshold"])
    check_kept(kv.keep_mask, found)
    assert torch.equal(~kv.keep_mask.all(-1).all(-1), found["lazy"].bool())
    share = kv.ratio
    kv.prune(share)  # the level takes the same lazy layers at this ratio
    check_kept(kv.keep_mask, found)

    paper = model.prefill(ids, scorer=with_settings("simlayerkv", settings), prefix_ids=[])
    paper.prune(threshold=-settings["lazy_threshold"])
    lazy = int(found["lazy"].sum())
    assert int(paper.keep_mask.sum() - kv.keep_mask.sum()) == lazy * 2 * settings["n_last"]


@pytest.mark.parametrize(("file", "variant"), cases("finch"))
def test_finch(file, variant):
    """kvpress's window is the question, given as a query here; its tokens are part of kvpress's counts."""
    model, ids, settings, found = read(file, variant)
    window = settings["window"]
    context = len(ids) - window
    scorer = with_settings("finch", settings, count_self=False)
    kv = model.prefill(ids[:context], query=ids[context:], scorer=scorer, prefix_ids=[])
    scores = torch.cat([kv.scores, kv.scores.amax() + torch.ones(*kv.scores.shape[:2], window)], dim=-1)
    check_scores(scores, found["scores"])
    size = settings.get("chunk_length") or len(ids)
    kept = [top_k_mask(chunk, max(1, chunk.shape[-1] // 2)) for chunk in scores.split(size, dim=-1)]
    check_kept(torch.cat(kept, dim=-1), found)
    if "kept_indices" in found:
        rows = torch.cat(kept, dim=-1)
        assert torch.equal(rows, torch.zeros_like(rows).scatter(-1, found["kept_indices"], True))


@pytest.mark.parametrize(("file", "variant"), cases("kvcompose"))
def test_kvcompose(file, variant):
    model, ids, settings, found = read(file, variant)
    kv = model.prefill(ids, scorer=with_settings("kvcompose", settings, chunk_size=100), prefix_ids=[])
    check_scores(kv.scores, found["scores"])
    per_layer, per_head = found["kept_count_per_layer"], found["kept_count_per_head"]
    total = int(per_layer.sum())
    structured = select(kv.scores, total / (len(per_layer) * len(ids)), "kvcompose").keep
    pairs = select(kv.scores, int(per_head.sum()) / kv.scores.numel(), "pair").keep
    assert torch.equal(pairs.sum(-1), per_head)
    # Layer 0 repeats values of the other layers: where such a pair is at the cut, ours goes to layer 0.
    ranked = found["composite_per_layer"].flatten().sort(descending=True).values
    if ranked[total - 1] > ranked[total]:
        assert torch.equal(structured.sum(-1), per_layer[:, None].expand_as(per_head))
    else:
        assert int((structured[:, 0].sum(-1) - per_layer).abs().sum()) <= 2
        structured = torch.stack([top_k_mask(*one) for one in zip(kv.scores, per_layer.tolist(), strict=True)])
    check_kept(structured if settings["structured"] else pairs, found)


@pytest.mark.parametrize(("file", "variant"), cases("kvgrad"))
def test_kvgrad_gradients(file, variant):
    """The norms themselves; scores and masks are checked with those of all presses."""
    model, ids, _, found = read(file, variant)
    seen = []

    class Gradients(KVgrad):
        """Look at what the method sees."""

        def score(self, context):
            """Gradients of every recorded pass."""
            for i in range(len(found["chunk_ranges"])):
                seen.append(context.gradient_norms(found[f"repeat_ids.chunk{i}"][0].tolist()))
            return torch.zeros(context.shape)

    model.prefill(ids, scorer=Gradients(), prefix_ids=[])
    for i, norms in enumerate(seen):
        expected = found[f"gradient_norm.chunk{i}"]
        assert float(((norms - expected).abs() / expected.amax(1, keepdim=True)).max()) <= TOLERANCE
