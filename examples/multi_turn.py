"""Talk about a compressed document: kept turns stay, and the context is never touched again."""

from kvzip import ModelKVzip

DOCUMENT = "My name is Ada Moreno. I live in Lisbon. I work as a baker. The red box holds 4417."

model = ModelKVzip()
kv = model.prefill(DOCUMENT)
kv.prune(0.5)
for question in ("What is my name?", "Where do I live?"):
    print(question, "->", model.generate(question, kv=kv, update_cache=True, max_new_tokens=12))
print(f"{kv.tail_length} tokens of conversation are kept after the context")

aside = kv.clone()  # shares the context, has a conversation of its own
print("aside:", model.generate("What does the red box hold?", kv=aside, update_cache=True, max_new_tokens=12))
print(f"here {kv.tail_length} tokens, in the clone {aside.tail_length}")
