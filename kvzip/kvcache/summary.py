"""What `print(kv)` shows: sizes, ratio, and how much every head of every layer keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvzip.kvcache.store import FULL

if TYPE_CHECKING:
    from kvzip.kvcache.cache import KVCache

_SHADES = "·▁▂▃▄▅▆▇█"


def format_bytes(count: float) -> str:
    """Bytes in the unit a person would choose, binary: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def shade(fraction: float) -> str:
    """One character for a kept fraction in [0, 1]: `·` nothing, `█` everything."""
    if fraction <= 0:
        return _SHADES[0]
    return _SHADES[min(len(_SHADES) - 1, 1 + int(fraction * (len(_SHADES) - 2)))]


def describe(kv: KVCache) -> str:
    """A few lines: context length, ratio, bytes before and after, and one row of shades a layer."""
    if any(layer.context is None for layer in kv.context_layers):
        return "KVCache(no context yet)"
    scored = ", ".join(kv.scorers) or ("head scores" if kv.head_scores is not None else "no")
    turns = f" + {kv.tail_length} of kept turns" if kv.tail_length else ""
    lines = [
        f"KVCache of {kv.context_length:,} context tokens (prefix {kv.prefix_length}{turns}), "
        f"kv_type={kv.kv_type!r}, scored by: {scored}",
        f"kept {kv.ratio:.1%}: {format_bytes(kv.full_nbytes)} -> {format_bytes(kv.nbytes)}"
        + (f" at {kv.bits} bits" if kv.bits != FULL else "")
        + (" (masked, still stored)" if kv.kv_type == "retain" and kv.is_pruned else "")
        + (", kept in host memory (offload='cpu')" if kv.offloaded else ""),
    ]
    keys = kv.context_layers[0].layout
    if keys.shift:
        lines.append(
            f"kept keys stand together: what follows is at position {kv.context_end:,}, not {kv.sealed_length:,}"
        )
    if keys.channels is not None:
        lines.append(f"keys have {keys.channels.shape[1]} of {keys.width} channels")
    if kv.pruned_with:
        facts = (
            f"{what} {value:g}" if isinstance(value, float) else f"{what} {value}"
            for what, value in sorted(kv.pruned_with.items())
        )
        lines.append(f"chosen by {', '.join(facts)}")
    if kv.is_pruned:
        fractions = kv.keep_mask.float().mean(-1)
        lines.append("kept per layer and KV head (· none, █ all):")
        for index, row in zip(kv.layer_indices, fractions.tolist(), strict=True):
            lines.append(f"  layer {index:3d}  {''.join(map(shade, row))}  {sum(row) / len(row):4.0%}")
    return "\n".join(lines)
