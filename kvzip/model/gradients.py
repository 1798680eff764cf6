"""Gradients of a replay pass: how much does each layer's attention matter for what the model computes in the end?

The backends have no backward pass, and neither has a cache that is written in place. So the pass reads the stored
context through layers of its own, which keep nothing, and attention's gradient is computed from its output and
log-sum-exp, tile by tile, as FlashAttention does (arXiv 2205.14135, algorithm 4).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvzip.attention import Padding, TailKV
from kvzip.attention.reference import logits_of, tile_logits
from kvzip.kvcache import ContextLayer, KVCache


def gradient_norms(model: PreTrainedModel, kv: KVCache, modules: Mapping[int, nn.Module], ids: Sequence[int]) -> Tensor:
    """Run `ids` after the unpruned `kv`, forward and backward; see `ScoringContext.gradient_norms`.

    Args:
        modules: the attention modules of the prunable layers, by layer index.
    """
    outputs: dict[int, Tensor] = {}
    last: list[Tensor] = []

    def on_attention(index: int, module: nn.Module, args: Any, output: Any) -> Any:
        found = output[0] if isinstance(output, tuple) else output
        outputs[index] = found = found if found.requires_grad else found.detach().requires_grad_()
        return (found, *output[1:]) if isinstance(output, tuple) else found

    def on_last_layer(module: nn.Module, args: Any, output: Any) -> None:
        last.append(output[0] if isinstance(output, tuple) else output)

    layers = [_ReadOnly(layer) if isinstance(layer, ContextLayer) else copy.copy(layer) for layer in kv.layers]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_frozen(model))
        for index, module in modules.items():
            stack.callback(module.register_forward_hook(partial(on_attention, index)).remove)
        stack.callback(_last_layer(model, modules).register_forward_hook(on_last_layer).remove)
        inputs = torch.tensor([list(ids)], device=model.device)
        model.base_model(input_ids=inputs, past_key_values=Cache(layers=list(layers)), use_cache=True)
        gradients = torch.autograd.grad(last[0].float().square().sum(), [outputs[index] for index in modules])
    return torch.stack([gradient[0].float().norm(dim=-1).cpu() for gradient in gradients])


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let parameters need no gradient in the block, which saves what their gradients would be computed from."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _last_layer(model: PreTrainedModel, modules: Mapping[int, nn.Module]) -> nn.Module:
    """The last decoder layer, whose output goes to the final norm.

    Raises:
        ValueError: the model's layers are not in one list.
    """
    index, attention = next(iter(modules.items()))
    for stack in model.base_model.modules():
        if isinstance(stack, nn.ModuleList) and len(stack) > index and attention in list(stack[index].modules()):
            return stack[-1]
    raise ValueError(f"{type(model).__name__} does not hold its decoder layers in one list: gradients are not known")


class _ReadOnly(ContextLayer):
    """Another layer's context with the states of the running pass behind it, differentiable and never stored."""

    def __init__(self, layer: ContextLayer) -> None:
        super().__init__(layer.backend, layer.sliding_window, hybrid=layer.hybrid)
        self.context = layer.store
        self.prefix_length, self.context_length = layer.prefix_length, layer.context_length

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Any, Any]:
        """Hold the new states until attention asks for them."""
        self.new = key_states.contiguous(), value_states.contiguous()
        return self, self

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        *,
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        sliding_window: int | None = None,
        padding: Padding | None = None,
    ) -> Tensor:
        """Attend to the context and the new states; a replay has neither padding nor a window to cross."""
        keys, values = self.new
        del self.new
        output: Tensor = _Attention.apply(query, keys, values, self, scaling, softcap, sinks)
        return output


class _Attention(torch.autograd.Function):
    """A backend's attention over a whole stored context and new states, with gradients of the latter and the query."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        layer: ContextLayer,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        tail = TailKV(keys, values, query.shape[2])
        output, lse = layer.backend.attend(query, layer.store, tail, scaling=scaling, softcap=softcap, sinks=sinks)
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks.float()[None, :, None])
        ctx.save_for_backward(query, keys, values, output, lse)
        ctx.layer, ctx.scaling, ctx.softcap = layer, scaling, softcap
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, new_keys, new_values, output, lse = ctx.saved_tensors
        num_heads, q_len, heads = query.shape[1], query.shape[2], new_keys.shape[1]
        # Everything by KV head: (heads, group, q_len, ...).
        rows, lse = query[0].float().unflatten(0, (heads, -1)), lse[0].unflatten(0, (heads, -1))[..., None]
        output, gradient = (
            states[0].transpose(0, 1).float().unflatten(0, (heads, -1)) for states in (output, gradients[0])
        )
        delta = (output * gradient).sum(-1, keepdim=True)
        by_query = torch.zeros_like(rows)
        by_key, by_value = (torch.zeros_like(states[0], dtype=torch.float32) for states in (new_keys, new_values))
        store = ctx.layer.store
        stored = (states.view(heads, store.lengths[0], -1) for states in (store.keys, store.values))
        step = max(1, tile_logits(query.device) // (num_heads * q_len))
        for keys, values, own in ((*stored, False), (new_keys[0], new_values[0], True)):
            for k in range(0, keys.shape[1], step):
                tile = slice(k, k + step)
                key, value = keys[:, None, tile].float(), values[:, None, tile].float()
                logits = logits_of(rows, key, ctx.scaling, ctx.softcap)
                weights = torch.exp(logits - lse)
                if own:
                    weights.tril_(-k)
                    by_value[:, tile] = (weights.transpose(-1, -2) @ gradient).sum(1)
                by_logit = weights * (gradient @ value.transpose(-1, -2) - delta) * ctx.scaling
                if ctx.softcap is not None:
                    by_logit *= 1 - (logits / ctx.softcap) ** 2
                by_query += by_logit @ key
                if own:
                    by_key[:, tile] = (by_logit.transpose(-1, -2) @ rows).sum(1)
        found = by_query.flatten(0, 1), by_key, by_value
        return *(one[None].to(query.dtype) for one in found), None, None, None, None
