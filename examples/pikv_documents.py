"""Questions about a long document through PiKVpress's router press, with PiKVpress's four rules and with real experts.

A trained router, if `python -m tools.train_router` left one in this folder, is asked too.
"""

from pathlib import Path

from transformers import DynamicCache, pipeline

from kvzip import data
from kvzip.integrations.kvpress import MoERouterPress
from kvzip.model.loading import bundled_path

pipe = pipeline("kv-press-text-generation", model=str(bundled_path()), device="cpu")
record = data.generate("kv", seed=3, split="test", tokens=400, count_tokens=pipe.tokenizer, num_questions=5)
questions = [f"\n\n{question}" for question in record.questions]

presses = {
    "nothing removed": None,
    "four rules": MoERouterPress(compression_ratio=0.5),
    "four rules, evenly": MoERouterPress(compression_ratio=0.5, router_type="eplb"),
    "kvzip and gate": MoERouterPress(compression_ratio=0.5, num_experts=2, experts=("kvzip", "gate")),
}
if Path("router.safetensors").is_file():
    presses["trained"] = MoERouterPress(compression_ratio=0.5, path="router.safetensors")

for name, press in presses.items():
    cache = DynamicCache()
    answers = pipe(record.context, questions=questions, press=press, cache=cache, max_new_tokens=16)["answers"]
    right = sum(data.score("kv", answer, gold) for answer, gold in zip(answers, record.answers, strict=True))
    held = sum(layer.nbytes for layer in cache.layers)
    print(f"{name:<20} {right:.0f}/{len(answers)} right, {held / 1024:.0f} KiB held")
    if press is not None:
        experts = press.get_stats()["layer_stats"][0]["expert_compression_stats"]
        rates = [round(one, 2) for one in experts["cache_hit_rates"].tolist()]
        print(f"{'':<20} attention that each expert would have kept in the first layer: {rates}")
