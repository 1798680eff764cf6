"""RoPE undone on every architecture: queries and keys before it, and rotations at positions that were never fed."""

from dataclasses import dataclass, replace

import pytest
import torch

from kvzip import ModelKVzip
from kvzip.scoring import PrefillScorer
from tests.tiny import SUPPORTED, build, ids

SCALED = {
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 128,
    }
}


@dataclass(frozen=True)
class Calls(PrefillScorer):
    """Record every call."""

    name = "calls"
    paper = "this test"

    def watch(self, call, notes):
        """Keep it."""
        notes.setdefault("calls", []).append(call)

    def score_layer(self, layer, notes):
        """Nothing in it."""
        self_calls.extend(notes["calls"])
        return torch.zeros(layer.keys.shape[:2])


self_calls = []


def calls_of(name, chunk=11, **changes):
    model = ModelKVzip.from_model(build(name, **changes), None)
    self_calls.clear()
    model.prefill(ids(30), prefix_ids=ids(4, seed=5), scorer=Calls(), prefill_chunk_size=chunk)
    return list(self_calls)


def unrotated(call):
    """Queries as the module's projection and norm make them."""
    module, hidden = call.module, call.hidden_states
    if hasattr(module, "q_proj"):
        states = module.q_proj(hidden)
    elif hasattr(module, "qkv_proj"):
        states = module.qkv_proj(hidden)[:, : call.query.shape[0] * call.query.shape[2]]
    else:
        states = module.c_attn(hidden).split(hidden.shape[-1], dim=-1)[0]
    norm = getattr(module, "q_norm", None)
    if norm is not None and norm.weight.shape[0] == states.shape[-1]:
        states = norm(states)
    states = states.unflatten(-1, (call.query.shape[0], -1))
    if norm is not None and norm.weight.shape[0] == states.shape[-1]:
        states = norm(states)
    return states.transpose(0, 1)


@pytest.mark.parametrize(("name", "changes"), [*((name, {}) for name in SUPPORTED), ("llama", SCALED)])
def test_undo_gives_the_queries_before_rope(name, changes):
    for call in calls_of(name, **changes):
        with torch.no_grad():
            torch.testing.assert_close(call.rotation.undo(call.query), unrotated(call), rtol=1e-4, atol=1e-5)
        again = call.rotation.apply(call.rotation.undo(call.query))
        torch.testing.assert_close(again, call.query, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gemma4_text", "phi3", "glm4", "smollm3"])
def test_rotations_at_other_positions_are_the_models_own(name):
    calls = calls_of(name)
    first, second = (next(c for c in calls if c.start == start and c.row == 0) for start in (0, 11))
    there = first.rotation.at(torch.arange(11, 22))
    torch.testing.assert_close(there.undo(second.query), second.rotation.undo(second.query), rtol=1e-5, atol=1e-6)
    x = torch.randn(1, 1, first.query.shape[-1], generator=torch.Generator().manual_seed(0))
    mean = first.rotation.at(torch.arange(50, 60)).mean()
    one_by_one = [first.rotation.at(torch.tensor([position])).apply(x)[0, 0] for position in range(50, 60)]
    torch.testing.assert_close(mean.apply(x)[0, 0], torch.stack(one_by_one).mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mean.matrix(x.shape[-1]) @ x[0, 0], mean.apply(x)[0, 0], rtol=1e-5, atol=1e-6)


def test_calls_cover_the_context_and_their_normalisers_are_those_of_the_weights():
    calls = [call for call in calls_of("qwen3") if call.row == 1]
    assert [(call.start, call.query.shape[1], call.length) for call in calls] == [
        (0, 11, 34),
        (11, 11, 34),
        (22, 11, 34),
        (33, 1, 34),
    ]
    for call in calls:
        keys = call.keys.repeat_interleave(2, dim=0)
        logits = call.query @ keys.transpose(1, 2) * call.scaling
        seen = torch.arange(keys.shape[1]) <= torch.arange(call.start, call.start + call.query.shape[1])[:, None]
        torch.testing.assert_close(logits.masked_fill(~seen, -torch.inf).logsumexp(-1), call.lse, rtol=1e-5, atol=1e-5)


def test_looking_ahead_does_not_change_a_module_that_adapts():
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    call = calls_of("llama", rope_parameters=dynamic, max_position_embeddings=64)[0]
    rotary = call.rotation.call.module
    before = rotary.inv_freq.clone(), rotary.max_seq_len_cached
    far = call.rotation.at(torch.arange(500, 510))
    assert torch.equal(rotary.inv_freq, before[0])
    assert rotary.max_seq_len_cached == before[1]
    assert far.cos.shape[0] == 10


def test_a_rotation_of_unknown_origin_is_refused_elsewhere():
    call = calls_of("llama")[0]
    with pytest.raises(ValueError, match="was not seen"):
        replace(call.rotation, call=None).at(torch.arange(3))


def test_nothing_stays_on_the_model():
    model = ModelKVzip.from_model(build("llama"), None)
    model.prefill(ids(20), scorer="snapkv(window_size=4)", prefix_ids=[])
    hooks = [m for m in model.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks
