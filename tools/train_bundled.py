"""Train the bundled model: `python -m tools.train_bundled --max-minutes 150 --workers 2`.

The same command goes on from the last checkpoint; `--fresh` starts again. Runs on a GPU where there is one.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.bundled import recipe
from tools.bundled.attention import has_bfloat16, use_packed
from tools.bundled.evaluate import evaluate, pack, whole_answers
from tools.bundled.init import initialize, load_grown
from tools.bundled.parallel import average_gradients, gather, launch
from tools.bundled.samples import IGNORE, LISTS, QA_TASKS, Sample, Sampler, split_sentences
from tools.bundled.tokenizer import read_texts, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT, LOG = "last.pt", "train_log.jsonl"
SAVE_SECONDS = 60.0
LOG_STEPS = 25
HELD_OUT = 20  # one in so many sentences is kept for the evaluation
SMOOTH = 0.96


@dataclass
class State:
    """Where training stands; saved with the weights.

    Attributes:
        minutes: time trained so far, over all runs.
        accuracy: smoothed accuracy of each task in the current stage.
    """

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    minutes: float = 0.0
    tokens: int = 0
    accuracy: dict[str, float] = field(default_factory=dict)


def learning_rate(state: State, max_minutes: float) -> float:
    """Return the rate: a short warm-up, a plateau, and a linear fall over the last part of the time."""
    warm = min(1.0, (state.step + 1) / recipe.WARMUP_STEPS)
    left = 1.0 - min(1.0, state.minutes / max_minutes)
    fall = min(1.0, left / (1.0 - recipe.DECAY_FROM))
    return recipe.STAGES[state.stage].rate * warm * max(recipe.FLOOR, fall)


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Build the untrained model."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        recipe.model_config(tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    )
    initialize(model, seed=seed)
    return model


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices and AdamW for the rest; one rate fits both."""
    named = list(model.named_parameters())
    matrices = [weight for name, weight in named if weight.ndim == 2 and ".layers." in name]
    rest = [weight for name, weight in named if weight.ndim != 2 or ".layers." not in name]
    return [
        torch.optim.Muon(
            matrices, weight_decay=recipe.WEIGHT_DECAY, momentum=recipe.MOMENTUM, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, betas=recipe.BETAS, weight_decay=recipe.WEIGHT_DECAY),
    ]


def train_step(model: LlamaForCausalLM, samples: list[Sample], device: torch.device) -> dict[str, list[float]]:
    """Run forward and backward on one batch; logits are made at supervised positions only.

    Returns:
        per task [right, all], counting whole answers to questions, and tokens of repeats.
    """
    ids, positions, targets, weights = (tensor.to(device) for tensor in pack(samples))
    supervised = targets != IGNORE
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bfloat16(device)):
        lengths = [len(sample.ids) for sample in samples]
        hidden = model.model(input_ids=ids, position_ids=positions, use_cache=False, lengths=lengths).last_hidden_state
        logits = model.lm_head(hidden[supervised]).float()
    gold, weight = targets[supervised], weights[supervised]
    loss = (F.cross_entropy(logits, gold, reduction="none") * weight).sum() / weight.sum()
    loss.backward()
    right = iter((logits.argmax(-1) == gold).tolist())
    found: dict[str, list[float]] = {"loss": [loss.item(), 1.0]}
    for sample in samples:
        asked = [label for label in sample.labels[1:] if label != IGNORE]
        parts = [next(right) for _ in asked]
        if sample.task in QA_TASKS:
            parts = whole_answers(asked, parts, asked[-1])
        entry = found.setdefault(sample.task, [0.0, 0.0])
        entry[0] += sum(parts)
        entry[1] += len(parts)
    return found


def advance(state: State, max_minutes: float) -> bool:
    """Move to the next stage where this one's tasks are learnt or its time is over."""
    stage = recipe.STAGES[state.stage]
    if state.stage + 1 == len(recipe.STAGES) or state.stage_step < 40:
        return False
    tasks = [value for name, value in state.accuracy.items() if name not in ("loss", *LISTS)]
    if min(tasks, default=0.0) < stage.until and state.minutes < stage.share * max_minutes:
        return False
    state.stage += 1
    state.stage_step = 0
    return True


def save(path: Path, model: LlamaForCausalLM, steppers: list[torch.optim.Optimizer], state: State) -> None:
    """Write a checkpoint; a reader never sees half of one."""
    part = path.with_suffix(".part")
    optimizer = [one.state_dict() for one in steppers]
    torch.save({"model": model.state_dict(), "optimizer": optimizer, "state": vars(state)}, part)
    part.replace(path)


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights, configurations and tokenizer that `from_pretrained(folder)` loads.

    The file holds the weights in float16, the configuration says that they are computed with in float32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=64,
    )
    model.half().save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(folder)


def observe(state: State, results: list[tuple[dict[str, list[float]], int, float]]) -> None:
    """Add to `state` what the processes found in one step: counts per task, tokens and the time in minutes."""
    totals: dict[str, list[float]] = {}
    for found, tokens, _ in results:
        state.tokens += tokens
        for name, (good, count) in found.items():
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += good
            total[1] += count
    for name, (good, count) in totals.items():
        old = state.accuracy.get(name, good / count)
        state.accuracy[name] = SMOOTH * old + (1 - SMOOTH) * good / count
    state.step += 1
    state.stage_step += 1
    state.minutes += results[0][2]


def train(rank: int, args: argparse.Namespace) -> None:
    """Train until `--max-minutes` from the last checkpoint; the process of rank 0 logs and saves."""
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, sentences = load_texts(args)
    sampler = Sampler(tokenizer, sentences[len(sentences) // HELD_OUT :])
    model = new_model(tokenizer, args.seed)
    model.to(device)  # type: ignore[arg-type]
    use_packed(model)
    steppers = optimizers(model)
    state = State()
    checkpoint, log = args.checkpoints / CHECKPOINT, args.checkpoints / LOG
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, known in zip(steppers, saved["optimizer"], strict=True):
            optimizer.load_state_dict(known)
        state = State(**saved["state"])
    elif args.start is not None:
        load_grown(model, LlamaForCausalLM.from_pretrained(args.start))
        state.stage = next(i for i, stage in enumerate(recipe.STAGES) if stage.name == args.stage)

    last, saved_at = time.monotonic(), time.monotonic()
    while state.minutes < args.max_minutes:
        rng = random.Random(f"{args.seed}/{state.step}/{rank}")
        samples = recipe.batch(sampler, recipe.STAGES[state.stage], rng, state.accuracy)
        rate = learning_rate(state, args.max_minutes)
        found = train_step(model, samples, device)
        average_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.CLIP)
        for optimizer in steppers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        now = time.monotonic()
        observe(state, gather((found, sum(len(sample.ids) for sample in samples), (now - last) / 60)))
        last = now
        if math.isnan(state.accuracy["loss"]):
            raise RuntimeError(f"loss is not a number at step {state.step}; go on from the last checkpoint")
        stage = recipe.STAGES[state.stage].name
        changed = state.minutes < args.max_minutes and advance(state, args.max_minutes)
        if rank == 0 and (changed or state.step % LOG_STEPS == 0):
            entry: dict[str, object] = {"step": state.step, "stage": stage}
            entry |= {"tokens": state.tokens, "minutes": round(state.minutes, 2)}
            write(log, entry | {name: round(value, 4) for name, value in sorted(state.accuracy.items())})
        if changed:
            state.accuracy.clear()
        if rank == 0 and (changed or now - saved_at > SAVE_SECONDS or state.minutes >= args.max_minutes):
            save(checkpoint, model, steppers, state)
            saved_at = now


def finish(args: argparse.Namespace) -> None:
    """Evaluate the last checkpoint on the test split and export it."""
    torch.set_num_threads(args.threads * args.workers)
    tokenizer, sentences = load_texts(args)
    model = new_model(tokenizer, args.seed).eval()
    saved = torch.load(args.checkpoints / CHECKPOINT, map_location="cpu", weights_only=True)
    model.load_state_dict(saved["model"])
    if args.average is not None:
        before = LlamaForCausalLM.from_pretrained(args.average).state_dict()
        mean = {name: torch.lerp(before[name], one, args.share) for name, one in model.state_dict().items()}
        model.load_state_dict(mean)
    export(model, tokenizer, args.out)
    model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    sampler = Sampler(tokenizer, sentences[: len(sentences) // HELD_OUT], split="test")
    for length in args.lengths:
        results = evaluate(model, sampler, length, args.samples)
        entry: dict[str, object] = {"step": saved["state"]["step"], "split": "test", "context": length}
        write(args.checkpoints / LOG, entry | {name: round(value, 4) for name, value in results.items()})
    (args.out / LOG).write_text((args.checkpoints / LOG).read_text())


def load_texts(args: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, list[str]]:
    """Return the trained tokenizer and the sentences of the texts."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.checkpoints / "tokenizer")
    return tokenizer, split_sentences(read_texts(args.text))


def write(log: Path, entry: dict[str, object]) -> None:
    """Print one line of JSON and add it to `log`."""
    line = json.dumps(entry)
    print(line, flush=True)
    with log.open("a") as file:
        file.write(line + "\n")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-minutes", type=float, default=74.0, help="time to train, over all runs")
    parser.add_argument("--out", type=Path, default=ROOT / "kvzip" / "model" / "bundled")
    parser.add_argument("--checkpoints", type=Path, default=ROOT / "checkpoints")
    essays = ROOT.parent / "shared" / "data" / "niah" / "PaulGrahamEssays"
    parser.add_argument("--text", type=Path, nargs="+", default=[essays], metavar="DIR", help="folders of .txt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes; each draws a batch a step")
    parser.add_argument("--threads", type=int, default=1, help="threads a process")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 1024, 2048])
    parser.add_argument("--samples", type=int, default=100, help="evaluation samples a task and length")
    parser.add_argument(
        "--start", type=Path, metavar="DIR", help="exported weights to start from, without a checkpoint"
    )
    stages = [stage.name for stage in recipe.STAGES]
    parser.add_argument("--stage", choices=stages, default="mix-768", help="where --start begins (default mix-768)")
    parser.add_argument("--fresh", action="store_true", help="ignore checkpoints")
    parser.add_argument("--tokenizer-only", action="store_true", help="train the tokenizer and stop")
    parser.add_argument("--export", action="store_true", help="evaluate and export the last checkpoint")
    parser.add_argument("--average", type=Path, metavar="DIR", help="export the mean with these weights (of --start)")
    parser.add_argument("--share", type=float, default=0.5, help="of the new weights in the mean of --average")
    args = parser.parse_args()
    if args.fresh:
        for name in (CHECKPOINT, LOG):
            (args.checkpoints / name).unlink(missing_ok=True)
    if args.fresh or not (args.checkpoints / "tokenizer" / "tokenizer.json").exists():
        args.checkpoints.mkdir(parents=True, exist_ok=True)
        if args.start is not None:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(args.start)
        else:
            tokenizer = train_tokenizer(read_texts(args.text), args.seed)
        tokenizer.save_pretrained(args.checkpoints / "tokenizer")
    if args.tokenizer_only:
        return
    if not args.export:
        launch(args.workers, train, args)
    finish(args)


if __name__ == "__main__":
    main()
