"""Split attention into dense blocks and merge their results by log-sum-exp; exact, whatever the split.

Every backend in Python is this split with its own block function. Rows: query head h of KV head k = h // G and token
i become row g * q_len + i of KV head k (GQA packing), so each key and value is read once for its G query heads.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from kvzip.attention.quantized import QuantizedKV
from kvzip.attention.ragged import Focus, RaggedKV, TailFocus, TailKV


class Block(Protocol):
    """Attention of packed rows over one dense block of keys."""

    def __call__(
        self,
        rows: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scaling: float,
        softcap: float | None,
        mask: Tensor | None,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            rows: (batch, heads, rows, head_dim).
            keys: (batch, heads, kv_len, head_dim), kv_len > 0; values: (batch, heads, kv_len, v_head_dim).
            mask: (heads, kv_len) bool, True = visible; only with a batch of 1.
            causal: the rows are G x kv_len, and row g * kv_len + i sees keys 0..i.

        Returns:
            output (batch, heads, rows, v_head_dim) and log-sum-exp (batch, heads, rows), float32; -inf where nothing is
            seen.
        """


def merge(output_a: Tensor, lse_a: Tensor, output_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two partial attentions over disjoint keys; output (..., d), lse (...), float32, -inf = no key seen."""
    top = torch.maximum(lse_a, lse_b)
    pivot = torch.where(top == -torch.inf, 0.0, top)
    a, b = (lse_a - pivot).exp(), (lse_b - pivot).exp()
    # Not by exp(lse): the weights must add up to 1, and a rounded lse is off by its size.
    total = (a + b).clamp(min=1.0)
    return (output_a * a[..., None] + output_b * b[..., None]) / total[..., None], top + total.log()


class Ragged(Protocol):
    """Attention of packed rows over a whole ragged context."""

    def __call__(
        self, rows: Tensor, context: RaggedKV, *, scaling: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            rows: (1, num_key_value_heads, rows, head_dim).

        Returns:
            output (1, num_key_value_heads, rows, v_head_dim) and log-sum-exp (1, num_key_value_heads, rows), float32.
        """


def attend_ragged(
    block: Block, rows: Tensor, context: RaggedKV, *, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """`Ragged` by dense blocks: heads of equal length together, else one after the other."""
    _, num_kv_heads, num_rows, _ = rows.shape
    output = rows.new_zeros((1, num_kv_heads, num_rows, context.values.shape[1]), dtype=torch.float32)
    lse = rows.new_full((1, num_kv_heads, num_rows), -torch.inf, dtype=torch.float32)
    for heads, keys, values, mask in context.blocks():
        found = block(rows[:, heads], keys, values, scaling=scaling, softcap=softcap, mask=mask, causal=False)
        if keys.shape[1] == num_kv_heads:
            output, lse = found
            break
        output[:, heads], lse[:, heads] = found
    return (output, lse) if context.quantized is None else add_quantized(
        block, rows, context.quantized, output, lse, scaling=scaling, softcap=softcap
    )  # fmt: skip


def add_quantized(
    block: Block, rows: Tensor, context: QuantizedKV, output: Tensor, lse: Tensor, *, scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Merge attention over quantised rows, turned back some tiles at a time, into what was found over others."""
    output, lse, exact = output.clone(), lse.clone(), rows.float()
    for head, keys, values, mask in context.blocks():
        heads = slice(head, head + 1)
        seen = None if mask is None else mask[None]
        found = block(
            exact[:, heads], keys[None, None], values[None, None], scaling=scaling, softcap=softcap, mask=seen,
            causal=False,
        )  # fmt: skip
        output[:, heads], lse[:, heads] = merge(output[:, heads], lse[:, heads], *found)
    return output, lse


def attend_blocks(
    block: Block,
    query: Tensor,
    context: RaggedKV | None,
    tail: TailKV,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    ragged: Ragged | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend over context and tail with `block` doing the dense pieces; the contract is `backends.Backend`'s.

    Args:
        ragged: does the context; None = `block` does, piece by piece.
    """
    batch, num_heads, q_len, _ = query.shape
    num_kv_heads = tail.keys.shape[1]
    grouped = query.reshape(batch, num_kv_heads, (num_heads // num_kv_heads) * q_len, -1)
    if tail.skip is None:
        output, lse = _attend_tail(block, grouped, *tail.used(), q_len, scaling=scaling, softcap=softcap)
    else:
        rows = [
            _attend_padded(block, one, keys, values, q_len, span, scaling=scaling, softcap=softcap)
            for one, keys, values, span in zip(grouped, *tail.used(), tail.skip.tolist(), strict=True)
        ]
        output, lse = (torch.cat(parts) for parts in zip(*rows, strict=True))
    if context is not None:
        packed = grouped.transpose(0, 1).flatten(1, 2)[None]
        whole = partial(attend_ragged, block) if ragged is None else ragged
        found, found_lse = whole(packed, context, scaling=scaling, softcap=softcap)
        found = found.view(num_kv_heads, batch, -1, found.shape[-1]).transpose(0, 1)
        output, lse = merge(output, lse, found, found_lse.view(num_kv_heads, batch, -1).transpose(0, 1))
    output, lse = output.reshape(batch, num_heads, q_len, -1), lse.reshape(batch, num_heads, q_len)
    return _finished(output, lse, query.dtype, sinks), lse


def attend_focused(
    block: Block,
    query: Tensor,
    context: RaggedKV,
    tail: TailKV,
    focus: Focus | TailFocus,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to everything, and say how much of it is the focus; for one sequence.

    A `Focus` is in a context of which nothing was evicted or quantised; with a `TailFocus` the context may be any.

    Returns:
        output (1, q_len, num_heads, v_head_dim) over all keys, and log-sum-exp (1, num_heads, q_len) over the focus:
        the normaliser of a softmax over the focus alone, which costs nothing more, as parts are merged in this order.
    """
    if isinstance(focus, TailFocus):
        return _attend_tail_focused(block, query, context, tail, focus, scaling=scaling, softcap=softcap, sinks=sinks)
    _, num_heads, q_len, _ = query.shape
    num_kv_heads, length = len(context.lengths), context.lengths[0]
    rows = query.reshape(1, num_kv_heads, (num_heads // num_kv_heads) * q_len, -1)
    keys, values = (states.view(1, num_kv_heads, length, -1) for states in (context.keys, context.values))
    output, lse = _attend_tail(block, rows, *tail.used(), q_len, scaling=scaling, softcap=softcap)
    sink, start, stop = focus
    focus_lse = lse
    for inside, spans in ((True, ((0, sink), (start, stop))), (False, ((sink, start), (stop, length)))):
        for a, b in spans:
            if a < b:
                part = keys[:, :, a:b], values[:, :, a:b]
                found = block(rows, *part, scaling=scaling, softcap=softcap, mask=None, causal=False)
                output, lse = merge(output, lse, *found)
        focus_lse = lse if inside else focus_lse
    shape = (1, num_heads, q_len)
    output, lse = output.reshape(*shape, -1), lse.reshape(shape)
    return _finished(output, lse, query.dtype, sinks), focus_lse.reshape(shape)


def _attend_tail_focused(
    block: Block, query: Tensor, context: RaggedKV, tail: TailKV, focus: TailFocus, *, scaling: float,
    softcap: float | None, sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _, num_heads, q_len, _ = query.shape
    num_kv_heads = len(context.lengths)
    rows = query.reshape(1, num_kv_heads, (num_heads // num_kv_heads) * q_len, -1)
    keys, values = tail.used()
    past = keys.shape[2] - q_len
    options: dict[str, Any] = {"scaling": scaling, "softcap": softcap}
    output, lse = _attend_tail(block, rows, keys[:, :, past:], values[:, :, past:], q_len, **options)
    focus_lse = lse
    for number, (a, b) in enumerate([(focus.start, focus.stop), (0, focus.start), (focus.stop, past)]):
        if a < b:
            found = block(rows, keys[:, :, a:b], values[:, :, a:b], mask=None, causal=False, **options)
            output, lse = merge(output, lse, *found)
        focus_lse = lse if number == 0 else focus_lse
    if focus.prefix:
        first = context.cu_seqlens_k[:-1, None] + torch.arange(focus.prefix, device=keys.device)
        prefix = context.keys[first][None], context.values[first][None]
        focus_lse = torch.logaddexp(focus_lse, block(rows, *prefix, mask=None, causal=False, **options)[1])
    output, lse = merge(output, lse, *attend_ragged(block, rows, context, **options))
    shape = (1, num_heads, q_len)
    output, lse = output.reshape(*shape, -1), lse.reshape(shape)
    return _finished(output, lse, query.dtype, sinks), focus_lse.reshape(shape)


def _finished(output: Tensor, lse: Tensor, dtype: torch.dtype, sinks: Tensor | None) -> Tensor:
    """What a backend returns of output (batch, num_heads, q_len, v_head_dim) float32."""
    if sinks is not None:
        output = output * torch.sigmoid(lse - sinks.float()[None, :, None])[..., None]
    return output.to(dtype).transpose(1, 2).contiguous()


def _attend_tail(
    block: Block, rows: Tensor, keys: Tensor, values: Tensor, q_len: int, *, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    past = keys.shape[2] - q_len
    # A single query token sees the whole tail: no causal block, and one block less.
    if q_len == 1:
        return block(rows, keys, values, scaling=scaling, softcap=softcap, mask=None, causal=False)
    own = keys[:, :, past:], values[:, :, past:]
    output, lse = block(rows, *own, scaling=scaling, softcap=softcap, mask=None, causal=True)
    if past:
        seen = keys[:, :, :past], values[:, :, :past]
        found = block(rows, *seen, scaling=scaling, softcap=softcap, mask=None, causal=False)
        output, lse = merge(output, lse, *found)
    return output, lse


def _attend_padded(
    block: Block, rows: Tensor, keys: Tensor, values: Tensor, q_len: int, span: Sequence[int], *, scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One batch row whose keys `span` are padding; query rows that are padding themselves get zeros and -inf."""
    start, stop = span
    past = keys.shape[1] - q_len
    real = torch.tensor([i for i in range(q_len) if not start <= past + i < stop], device=rows.device)
    keys, values = (torch.cat([states[:, :start], states[:, stop:]], dim=1)[None] for states in (keys, values))
    heads, num_rows, head_dim = rows.shape
    output = rows.new_zeros((1, heads, num_rows // q_len, q_len, values.shape[-1]), dtype=torch.float32)
    lse = rows.new_full(output.shape[:-1], -torch.inf, dtype=torch.float32)
    if len(real):
        shown = rows.view(heads, -1, q_len, head_dim)[:, :, real].reshape(1, heads, -1, head_dim)
        found, found_lse = _attend_tail(block, shown, keys, values, len(real), scaling=scaling, softcap=softcap)
        output[..., real, :] = found.view(1, heads, -1, len(real), found.shape[-1])
        lse[..., real] = found_lse.view(1, heads, -1, len(real))
    return output.flatten(2, 3), lse.flatten(2, 3)
