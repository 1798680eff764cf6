"""Compress a document once, save it, and ask many questions of the file."""

import tempfile
from pathlib import Path

from kvzip import ModelKVzip

DOCUMENT = "My name is Ada Moreno. I live in Lisbon. I work as a baker. The red box holds 4417. Omar lives in Oslo."

model = ModelKVzip()
kv = model.prefill(DOCUMENT)
kv.prune(0.5)
print(kv)

path = Path(tempfile.mkdtemp()) / "document.safetensors"
kv.save(path)

kv = model.load_kv(path)
questions = ["What is my name?", "Where do I live?", "What does the red box hold?", "Where does Omar live?"]
# All at once: every decoding step reads the context's bytes once for all of them.
for question, answer in zip(questions, model.generate(questions, kv=kv, max_new_tokens=12), strict=True):
    print(f"{question:<30} {answer}")
