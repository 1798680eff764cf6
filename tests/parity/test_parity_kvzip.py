"""Numbers of the reference KVzip: ids fed, scores, masks, logits, generated ids, one case per manifest entry."""

import json

import pytest
import torch

from kvzip.kvcache.selection import top_k_mask
from kvzip.scoring.methods.kvzip import KVzip
from kvzip.scoring.reconstruction import RepeatPrompts, reconstruction_inputs
from tests.parity import golden

MANIFEST = golden.manifest("kvzip")
LOGITS, SCORES = 1e-4, 1e-5
FILES = sorted(name for name in MANIFEST["files"] if name.endswith(".safetensors") and "/model/" not in name)


def files(stem):
    return [name for name in FILES if name.endswith(f"/{stem}.safetensors")]


def test_every_file_of_the_manifest_has_a_test():
    stems = ("inputs", "full", "kv_full", "repeat_inputs", "scores", "masks", "pruned", "cases")
    assert set(FILES) == {name for stem in stems for name in files(stem)}


def load(file):
    return golden.tensors("kvzip", file)


def model_of(variant):
    """The variant's checkpoint. `_w64` names a recorded window; else it was FlashAttention's, one more than ours."""
    name, _, window = variant.partition("_w")
    folder = golden.ROOT / "kvzip" / name / "model"
    config = json.loads((folder / "config.json").read_text())
    sliding = "sliding_attention" in (config.get("layer_types") or ()) or config.get("sliding_window_pattern")
    if not sliding:
        return golden.model(f"kvzip/{name}/model")
    return golden.model(f"kvzip/{name}/model", int(window) if window else config["sliding_window"] + 1)


def prefilled(file, *, scored=False, kv_type="retain"):
    """The model, inputs and kv that belong to a golden file `variant/ctx/[chunk/]name`."""
    parts = file.split("/")
    model, inputs = model_of(parts[0]), load(f"{parts[0]}/{parts[1]}/inputs.safetensors")
    scorer = None
    if scored:
        prompts = RepeatPrompts(*(inputs[k].tolist() for k in ("instr_first_ids", "instr_next_ids", "postfix_ids")))
        scorer = KVzip(chunk_size=int(parts[2].removeprefix("chunk")), prompts=prompts)
    kv = model.prefill(inputs["context_ids"], prefix_ids=inputs["system_ids"].tolist(), scorer=scorer, kv_type=kv_type)
    return model, inputs, kv


def check_talk(model, inputs, kv, found, prefix):
    """Greedy ids: twice the same without update, then a kept turn and the next one, twice."""
    talk = {"max_new_tokens": 16, "eos_token_id": None}
    for run in ("gen_run1_ids", "gen_run2_ids"):
        assert model.generate(inputs["query_ids"], kv, **talk).tolist() == found[f"{prefix}/{run}"].tolist()
    before = kv.get_seq_length()
    # The reference never feeds the last id: 15 ids kept here are its history.
    kept = model.generate(inputs["query_ids"], kv, update_cache=True, **{**talk, "max_new_tokens": 15})
    assert kept.tolist() == found[f"{prefix}/multi_turn1_ids"][:15].tolist()
    assert kv.input_ids.tolist() == found[f"{prefix}/multi_history_ids"].tolist()
    assert [before, kv.get_seq_length(), len(kv.input_ids)] == found[f"{prefix}/multi_seen_after_turn1"].tolist()
    for _ in range(2):  # the reference's own second run is wrong after eviction, see known_defects
        second = model.generate(inputs["query2_ids"], kv, **talk)
        assert second.tolist() == found[f"{prefix}/multi_turn2_run1_ids"].tolist()


@pytest.mark.parametrize("file", files("full"))
def test_full_cache(file):
    model, inputs, kv = prefilled(file)
    logits = model(torch.cat([inputs["query_ids"], inputs["answer_ids"]]), kv)[0]
    torch.testing.assert_close(logits, load(file)["full/logits"], atol=LOGITS, rtol=0)
    check_talk(model, inputs, kv, load(file), "full")


@pytest.mark.parametrize("file", files("kv_full"))
def test_keys_and_values(file):
    _, _, kv = prefilled(file)
    for name, expected in load(file).items():
        layer, what = name.removeprefix("layer").split("/")
        cached = kv.layers[int(layer)]
        if hasattr(cached, "context"):
            states = cached.context.keys if what == "key" else cached.context.values
            found = states.view(expected.shape[0], -1, expected.shape[-1])
        else:
            found = (cached.keys if what == "key" else cached.values)[0]
        held = min(found.shape[1], expected.shape[1])
        torch.testing.assert_close(found[:, -held:], expected[:, -held:], atol=SCORES, rtol=1e-4)


@pytest.mark.parametrize("file", files("repeat_inputs"))
def test_reconstruction_inputs(file):
    variant, ctx, chunk, _ = file.split("/")
    inputs, expected = load(f"{variant}/{ctx}/inputs.safetensors"), load(file)
    prompts = RepeatPrompts(*(inputs[k].tolist() for k in ("instr_first_ids", "instr_next_ids", "postfix_ids")))
    context = inputs["context_ids"].tolist()
    passes = reconstruction_inputs(context, int(chunk.removeprefix("chunk")), prompts)
    assert 2 * len(passes) == len(expected)
    for i, item in enumerate(passes):
        assert list(item.ids) == expected[f"repeat{i}_ids"].tolist()
        assert context[item.start : item.stop] == expected[f"chunk{i}_ids"].tolist()


@pytest.mark.parametrize("file", files("scores"))
def test_scores(file):
    _, _, kv = prefilled(file, scored=True)
    expected = load(file)
    torch.testing.assert_close(kv.scores, expected["scores"], atol=SCORES, rtol=0)
    torch.testing.assert_close(kv.scores.amax(-1), expected["head_scores"], atol=SCORES, rtol=0)
    if "global_layer_ids" in expected:
        assert kv.layer_indices == expected["global_layer_ids"].tolist()


def at_count(scores, mask, level):
    """Our ranking at the golden mask's own count."""
    if level == "pair-uniform":
        return top_k_mask(scores, int(mask[0, 0].sum()))
    if level == "head":
        heads = top_k_mask(scores.amax(-1).flatten(), int(mask.all(-1).sum())).view(mask.shape[:2])
        return heads[..., None].expand(mask.shape)
    return top_k_mask(scores.flatten(), int(mask.sum())).view(mask.shape)


@pytest.mark.parametrize("file", files("masks"))
def test_masks(file):
    scores, found = load(file.replace("masks", "scores"))["scores"], load(file)
    names = sorted({name.rsplit("/", 1)[0] for name in found})
    assert names
    for name in names:
        level, mask = name.split("/")[0], found[f"{name}/mask"]
        ours = at_count(scores, mask, level)
        assert torch.equal(ours, mask), name
        assert torch.equal(ours.sum(-1), found[f"{name}/kept_per_head"]), name


@pytest.mark.parametrize("kv_type", ["retain", "evict"])
@pytest.mark.parametrize("file", files("pruned"))
def test_pruned_cache(file, kv_type):
    found, masks = load(file), load(file.replace("pruned", "masks"))
    names = sorted({"/".join(name.split("/")[:2]) for name in found})
    assert names
    for name in names:
        model, inputs, kv = prefilled(file, kv_type=kv_type)
        kv.prune_to(masks[f"{name}/mask"])
        ids = torch.cat([inputs["query_ids"], inputs["answer_ids"]])
        # Sliding-window models were recorded masked only; evicting must give the same.
        expected = found.get(f"{name}/{kv_type}_logits", found[f"{name}/retain_logits"])
        torch.testing.assert_close(model(ids, kv)[0], expected, atol=LOGITS, rtol=0)
        if f"{name}/evict_len_per_head" in found:
            assert torch.equal(kv.kv_len_per_head, found[f"{name}/evict_len_per_head"])
        if f"{name}/retain/gen_run1_ids" in found:
            recorded = kv_type if f"{name}/{kv_type}/gen_run1_ids" in found else "retain"
            check_talk(model, inputs, kv, found, f"{name}/{recorded}")


@pytest.mark.parametrize("file", files("cases"))
def test_selection_at_the_reference_counts(file):
    found = load(file)
    masks = [name for name in found if name.endswith("/mask")]
    assert masks
    for name in masks:
        case, level, _, _ = name.split("/")
        scores, mask = found[f"{case}/scores"], found[name]
        if level == "pair":  # strictly above a cut: no tie straddles it
            assert torch.equal(at_count(scores, mask, level), mask), name
        else:  # among ties the reference's choice is open; the count and the kept values are not
            ours = top_k_mask(scores, int(mask[0, 0].sum()))
            assert torch.equal(ours.sum(-1), mask.sum(-1)), name
            kept = [torch.where(m, scores, -torch.inf).sort(-1).values for m in (ours, mask)]
            assert torch.equal(*kept), name
