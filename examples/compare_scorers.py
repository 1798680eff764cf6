"""Try an eviction idea: one prefill, several scorers, every ratio, right answers counted."""

from kvzip import ModelKVzip, data

model = ModelKVzip()
record = data.generate("kv", seed=3, split="test", tokens=400, count_tokens=model.tokenizer, num_questions=5)
kv = model.prefill(record.context, scorer=["kvzip", "streaming_llm", "random"], kv_type="retain")

for scorer in kv.scorers:
    for ratio in (1.0, 0.5, 0.3):
        kv.prune(ratio, scorer=scorer)
        answers = [model.generate(question, kv=kv, max_new_tokens=24) for question in record.questions]
        right = sum(data.score("kv", answer, gold) for answer, gold in zip(answers, record.answers, strict=True))
        print(f"{scorer:<14} ratio {ratio:<4} {right:.0f}/{len(answers)} right")
