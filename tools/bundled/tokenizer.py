"""Train the tokenizer of the bundled model: byte-level BPE with single digits and a chat template."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvzip.data import generate

VOCAB_SIZE = 2048
BOS, PAD, SYSTEM, USER, ASSISTANT, END = SPECIALS = (
    "<|bos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
)  # fmt: skip
MAX_LENGTH = 8192

# A space belongs to the word before it, so a word at the end of a sentence, in quotes or alone in an answer
# has the same tokens everywhere; a leading space would give it others. Digits stand alone.
PIECES = r"'s ?|\p{N}|\p{L}+ ?|[^\s\p{L}\p{N}]+ ?|\s+"

CHAT_TEMPLATE = """\
{{- '<|bos|>' -}}
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('unknown role ' ~ message['role'] ~ '; expected system, user or assistant') -}}
{%- endif -%}
{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def read_texts(folders: Iterable[Path]) -> list[str]:
    """Read every .txt file in `folders`, in the order of their names.

    Raises:
        ValueError: if a folder is missing or holds no text; names the option.
    """
    texts = []
    for folder in folders:
        files = sorted(folder.glob("*.txt"))
        if not files:
            raise ValueError(f"no .txt files in {folder}; name a folder of plain texts with --text DIR")
        texts += [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return texts


def _corpus(texts: list[str], seed: int) -> Iterator[str]:
    """Yield the texts and as much again of generated documents, of the training split only."""
    yield from texts
    size = sum(map(len, texts))
    rng = random.Random(seed)
    while size > 0:
        record = generate(rng.choice(("facts", "kv", "passkey")), rng.randrange(10**9), split="train", tokens=400)
        document = "\n".join([record.context, *record.questions, *(refs[0] for refs in record.answers)])
        size -= len(document)
        yield document


def train_tokenizer(texts: list[str], seed: int) -> PreTrainedTokenizerFast:
    """Train on `texts` and on generated documents; special tokens take the ids from 0."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_corpus(texts, seed), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        padding_side="right",
        chat_template=CHAT_TEMPLATE,
    )
