"""The smallest cache that still answers: a ratio that chooses itself, 8- or 4-bit codes, and a budget while reading."""

from kvzip import ModelKVzip, data

model = ModelKVzip()
record = data.generate("kv", seed=5, tokens=600, count_tokens=model.tokenizer)


def show(name, kv):
    answers = model.generate(record.questions, kv=kv, max_new_tokens=record.max_new_tokens)
    right = sum(data.score("kv", *pair) for pair in zip(answers, record.answers, strict=True))
    share = kv.nbytes / kv.full_nbytes
    print(f"{name:32} ratio {kv.ratio:.2f}, {share:6.1%} of the bytes, {right:.0f} of {len(answers)} answers right")


whole = model.prefill(record.context)
show("everything", whole)
for bits in (16, 8, 4):
    kv = whole.clone()
    kv.prune(0.3, bits=bits)
    show(f"prune(0.3, bits={bits})", kv)
kv = whole.clone()
kv.prune("auto", tolerance=0.01)
show('prune("auto")', kv)
print(kv.fidelity())
show("prefill(budget_tokens=150)", model.prefill(record.context, budget_tokens=150, block=128))
