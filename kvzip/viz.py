"""Pictures of what a pruned kv kept: a heat map of layers and heads, and the context shaded token by token."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path

from kvzip.kvcache import KVCache, format_bytes

LONGEST = 4  # bytes of a character


def heatmap_png(kv: KVCache, path: str | PathLike[str]) -> None:
    """Write a PNG of the kept fraction of every layer and KV head. Needs matplotlib (extra `eval`)."""
    from matplotlib.figure import Figure

    fractions = kv.keep_mask.float().mean(-1)
    layers, heads = fractions.shape
    figure = Figure(figsize=(max(4.0, 1.5 + 0.45 * heads), max(2.5, 1.5 + 0.3 * layers)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(fractions.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set(xlabel="KV head", ylabel="layer", title=f"kept of {kv.context_length:,} tokens: {kv.ratio:.0%}")
    axes.set_xticks(range(heads))
    axes.set_yticks(range(layers), [str(index) for index in kv.layer_indices])
    if layers * heads <= 128:
        for row in range(layers):
            for head in range(heads):
                value = float(fractions[row, head])
                color = "white" if value < 0.6 else "black"
                axes.text(head, row, f"{value:.0%}", ha="center", va="center", color=color)
    figure.colorbar(image, label="kept fraction")
    figure.savefig(path, dpi=120)


def shaded_html(kv: KVCache, path: str | PathLike[str], decode: Callable[[list[int]], str]) -> None:
    """Write a self-contained page of the context, every token shaded by the share of layers and heads that keep it.

    Args:
        decode: ids -> text, for one token at a time, or the few that make up one character.
    """
    kept = kv.keep_mask.float().mean((0, 1))
    ids = kv.input_ids[kv.prefix_length : kv.sealed_length].tolist()
    spans = []
    for start, stop in characters(ids, decode):
        share = float(kept[start:stop].mean())
        text = html.escape(decode(ids[start:stop])).replace("\n", "↵<br>")
        spans.append(f'<span style="background:rgba(255,140,0,{share:.2f})" title="{share:.0%} kept">{text}</span>')
    sizes = f"{format_bytes(kv.full_nbytes)} → {format_bytes(kv.nbytes)}"
    Path(path).write_text(
        f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>kvzip: what was kept</title>
<style>
body {{ font: 16px/1.7 Georgia, serif; max-width: 52em; margin: 2em auto; padding: 0 1em; color: #222 }}
p.facts {{ font: 14px system-ui, sans-serif; color: #555 }}
span:hover {{ outline: 1px solid #c60 }}
</style>
<h1>What was kept</h1>
<p class="facts">{kv.context_length:,} context tokens, {kv.ratio:.1%} of their KV pairs kept, {sizes}.
The darker a token, the more layers and heads keep its pair; point at it for the share.</p>
<p>{"".join(spans)}</p>
</html>
""",
        encoding="utf-8",
    )


def characters(ids: list[int], decode: Callable[[list[int]], str]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of each token, or of the tokens of a byte each that make up a character together."""
    start = 0
    for stop in range(1, len(ids) + 1):
        broken = "\N{REPLACEMENT CHARACTER}" in decode(ids[start:stop])
        if not broken or stop - start == LONGEST or stop == len(ids):
            yield start, stop
            start = stop
