"""Architecture and curriculum of the bundled model."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import LlamaConfig

from tools.bundled.samples import QA_TASKS, ROOM, Sample, Sampler
from tools.bundled.tokenizer import MAX_LENGTH, VOCAB_SIZE

BETAS = (0.9, 0.98)
MOMENTUM = 0.95
WEIGHT_DECAY = 0.01
CLIP = 1.0
WARMUP_STEPS = 50
DECAY_FROM = 0.4  # share of the time after which the learning rate falls, to FLOOR of its peak
FLOOR = 0.05
FEWEST, MOST = 0.08, 0.3  # weights of tasks that are always right and hardly ever; between them, by how often wrong


def model_config(pad: int, bos: int, eos: int) -> LlamaConfig:
    """Return a 7.5 M parameter Llama: hidden size 384, 5 layers, 8 query and 4 KV heads of 64."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=384,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=False,
        initializer_range=0.06,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
    )


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum.

    Attributes:
        lengths: sequence lengths are drawn between these (tokens), most of them in the upper half.
        tokens: tokens a batch.
        random: share of sequences that repeat random tokens.
        repeats: share of sequences with a repeat prompt; questions take the rest.
        rate: peak learning rate; answers need a lower one than induction.
        period: (fewest, most) tokens of a random string.
        until: accuracy of the weakest task (answers, or tokens of repeats; not of lists) for the next stage.
        share: share of the whole time after which the next stage begins at the latest.
    """

    name: str
    lengths: tuple[int, int]
    tokens: int = 4096
    random: float = 0.05
    repeats: float = 0.2
    period: tuple[int, int] = (8, 64)
    rate: float = 5e-4
    until: float = 0.96
    share: float = 1.0


STAGES = (
    Stage("induction", (96, 160), 2048, 1.0, 0.0, (8, 64), 1.5e-3, until=0.9),
    Stage("gentle", (96, 256), 4096, 0.35, 0.4, (16, 128), 1.5e-3, until=0.6, share=0.1),
    Stage("mix-224", (64, 224), 4096, repeats=0.1, until=0.95, share=0.12),
    Stage("mix-384", (64, 384), 4096, repeats=0.1, until=0.95, share=0.2),
    Stage("mix-768", (64, 768), 6144, repeats=0.1, until=0.95, share=0.36),
    Stage("mix-1k", (64, 1200), 6144, repeats=0.15, until=0.95, share=0.47),
    Stage("mix-2k", (64, 2300), 8192, random=0.03, repeats=0.12, until=0.95, share=0.65),
    Stage("mix-4k", (64, 4400), 9000, random=0.03, repeats=0.15),
)


def batch(sampler: Sampler, stage: Stage, rng: random.Random, accuracy: Mapping[str, float]) -> list[Sample]:
    """Draw the samples of one step, all of about the same length.

    Args:
        accuracy: of each task so far; a task that is wrong more often is drawn more often.
    """
    low, high = stage.lengths
    length = rng.randint(low, high) if rng.random() < 0.35 else rng.randint((low + high) // 2, high)
    tasks = [task for task in QA_TASKS if length >= ROOM[task]]
    weights = [min(MOST, FEWEST + 1.0 - accuracy.get(task, 0.0)) for task in tasks]
    samples = []
    for _ in range(max(1, round(stage.tokens / length))):
        kind = rng.random()
        if kind < stage.random:
            most = max(stage.period[0], min(stage.period[1], length // 2))
            period = (stage.period[0], most)
            samples.append(sampler.random_repeat(rng, min(length, 512), period=period))
        elif kind < stage.random + stage.repeats:
            samples.append(sampler.repeat(rng, length, partial=length > 1400 or rng.random() < 0.5))
        else:
            most = max(1, min(24, length // 16))
            task = rng.choices(tasks, weights)[0]
            asked = most if rng.random() < 0.5 else rng.randint(1, most)
            samples.append(sampler.questions(rng, task, length, asked))
    return samples
