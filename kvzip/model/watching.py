"""Shows the prefill to the scorers that want to see it; nothing stays on the model when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from kvzip.attention import recorded_rotations, rotation_of
from kvzip.kvcache import ContextLayer, KVCache
from kvzip.scoring import Notes, PrefillCall, PrefillScorer


class ModuleInputs(NamedTuple):
    """What enters an attention module: hidden states (q_len, hidden_size), and (cos, sin) of RoPE or None."""

    hidden_states: Tensor
    rotary: Any


@contextmanager
def inputs_of(modules: Iterable[nn.Module], inputs: dict[nn.Module, ModuleInputs]) -> Iterator[None]:
    """Record in `inputs` what enters `modules` inside the block."""

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        inputs[module] = ModuleInputs(hidden[0], kwargs.get("position_embeddings"))

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(record, with_kwargs=True).remove)
        yield


class Watch:
    """What the scorers that watch a prefill noted of it.

    Attributes:
        notes: for each scorer's name, one entry a prunable layer.
    """

    def __init__(self, scorers: Sequence[PrefillScorer], num_layers: int) -> None:
        """Begin with empty notes."""
        self.scorers = scorers
        self.notes: dict[str, list[Notes]] = {one.name: [{} for _ in range(num_layers)] for one in scorers}

    @contextmanager
    def over(
        self,
        model: PreTrainedModel,
        kv: KVCache,
        modules: Mapping[int, nn.Module],
        length: int,
        states: Callable[[ContextLayer], tuple[Tensor, Tensor]] = ContextLayer.all_states,
    ) -> Iterator[None]:
        """Show every attention of the prunable layers inside the block to the scorers.

        Args:
            length: tokens of prefix and context.
            states: layer -> keys and values that the scorers see.
        """
        if not self.scorers:
            yield
            return
        rows = {id(layer): row for row, layer in enumerate(kv.context_layers)}
        inputs: dict[nn.Module, ModuleInputs] = {}

        def observer(
            layer: ContextLayer, module: nn.Module, query: Tensor, lse: Tensor, scaling: float, softcap: float | None
        ) -> None:
            entered = inputs.pop(module)
            keys, values = states(layer)
            start = keys.shape[1] - query.shape[2]
            call = PrefillCall(
                row=rows[id(layer)],
                module=module,
                start=start,
                length=length,
                offset=layer.get_seq_length() - query.shape[2] - start,
                query=query[0],
                keys=keys,
                values=values,
                scaling=scaling,
                softcap=softcap,
                lse=lse[0],
                column_max=partial(layer.backend.column_max, scaling=scaling, softcap=softcap),
                rotation=rotation_of(module, entered.rotary, calls),
                hidden_states=entered.hidden_states,
            )
            for scorer in self.scorers:
                scorer.watch(call, self.notes[scorer.name][call.row])

        watched = [modules[index] for index in kv.layer_indices]
        with recorded_rotations(model.base_model) as calls, inputs_of(watched, inputs), kv.observe(observer):
            yield
