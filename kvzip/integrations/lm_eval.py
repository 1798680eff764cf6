"""A model for lm-evaluation-harness (extra `lm-eval`): its tasks, answered from compressed contexts.

Importing this module registers the model "kvzip". From the command line:

    python -m kvzip.integrations.lm_eval --tasks mytask --include_path tasks --model_args pretrained=bundled,ratio=0.3

which is lm-eval's own command line with the model known. A prompt is cut at its last blank line, or another separator:
what stands before is the context, compressed without knowledge of what comes after. At ratio 1 the model sees the very
ids that the harness's own "hf" model sees.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from kvzip.integrations.splitting import Parts, Splitter
from kvzip.kvcache import KVCache
from kvzip.kvcache.selection import check_ratio, get_level
from kvzip.model import ModelKVzip
from kvzip.scoring import get_scorer

logger = logging.getLogger(__name__)
T = TypeVar("T")
AUTO_BATCH = 16  # questions at once where the harness says "auto"


@register_model("kvzip")
class KVzipLM(TemplateLM):
    """Answers the requests of the harness from compressed contexts."""

    def __init__(
        self,
        pretrained: str | ModelKVzip = "bundled",
        *,
        ratio: float = 0.3,
        scorer: str = "kvzip",
        level: str | None = None,
        separator: str = "\n\n",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Load a model.

        Args:
            pretrained: name of a model, see `ModelKVzip`, or one that is loaded.
            ratio: fraction of the context's KV pairs KEPT, in (0, 1]; 1 = no compression.
            scorer, level: how to choose them, perhaps with settings; level None = the scorer's own.
            separator: the question begins at the last one in the prompt that has something after it; "\\n" may be
                written as a backslash and an n.
            max_length: tokens of prompt and answer; the beginning of longer contexts is left out. None = the model's.
            max_gen_toks: longest answer, where a task does not say.
            batch_size: questions about one context asked at once; "auto" = 16.
            max_batch_size: not used.
            device: None = the first CUDA device where there is one, else the CPU.
            kwargs: for `ModelKVzip`: `dtype`, `backend`, `device_map`, `revision`, ...

        Raises:
            ValueError: unknown name, a scorer that needs the question, ratio out of range, a tokenizer that does not
                tell offsets, or several processes.
        """
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("the harness's kvzip model runs in one process; use device_map=auto for several GPUs")
        check_ratio(ratio)
        self.ratio, self.scorer = ratio, get_scorer(scorer)
        if self.scorer.needs_query:
            raise ValueError(f"scorer {scorer!r} scores a context for one question; here it is compressed before any")
        self.level = get_level(self.scorer.level if level is None else level)
        if not isinstance(pretrained, ModelKVzip):
            if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
                device = None  # the harness's command line asks for a GPU unless told otherwise
            pretrained = ModelKVzip(pretrained, device=device, **kwargs)
        if pretrained.tokenizer is None:
            raise ValueError(f"{pretrained.name} has no tokenizer")
        self.model, self.tokenizer = pretrained, pretrained.tokenizer
        self._splitter = Splitter(self.tokenizer, self.model.prompting.template, separator.replace("\\n", "\n"))
        self._device = self.model.device
        self.max_length, self.max_gen_toks = max_length or self.model.max_positions, max_gen_toks
        self.batch_size = AUTO_BATCH if str(batch_size).startswith("auto") else int(batch_size)

    # -- what the harness asks for -----------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """End of text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """For the names of the harness's files."""
        return self.model.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, with the tokenizer's special tokens unless it begins with them."""
        return self._splitter.encoding(string, add_special_tokens)["input_ids"]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Text of a chat, as the harness's own model renders it."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            enable_thinking=False,
        )
        return str(text)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer each request; those about the same context are asked of one compressed kv."""
        answers: dict[int, str] = {}
        jobs = []
        for index, request in enumerate(requests):
            options = dict(normalize_gen_kwargs(request.args[1], self.max_gen_toks))
            parts = self._shortened(self._splitter.split(request.args[0]), options["max_gen_toks"])
            if not parts.context:
                parts = parts._replace(context=(self.prefix_token_id,))
            jobs.append((parts, options, index))
        self._tell([parts for parts, _, _ in jobs])
        with tqdm(total=len(requests), desc="kvzip generate_until", disable=disable_tqdm) as bar:
            for members in _grouped(((job[0]._replace(query=()), job[1]), job) for job in jobs):
                parts, options, _ = members[0]
                kv = self._compressed(parts)
                size = self.batch_size if len(kv.context_layers) == len(kv.layers) else 1  # sliding windows: no padding
                for first in range(0, len(members), size):
                    batch = members[first : first + size]
                    found = self._generate(kv, [parts.query for parts, _, _ in batch], options)
                    for (_, _, index), text in zip(batch, found, strict=True):
                        answers[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update(len(batch))
        return [answers[index] for index in range(len(requests))]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Score continuations; the context of each is compressed, its question and continuation are not."""
        scored: dict[int, tuple[float, bool]] = {}
        jobs = []
        for index, ((text, _), ids, continuation) in enumerate(requests):
            # Spaces at the end of a context belong to the continuation, as the harness cuts them.
            parts = self._splitter.split(text.rstrip()) if text else Parts((), (), tuple(ids), False)
            jobs.append((self._shortened(parts, len(continuation)), continuation, index))
        self._tell([parts for parts, _, _ in jobs])
        with tqdm(total=len(requests), desc="kvzip loglikelihood", disable=disable_tqdm) as bar:
            for members in _grouped((job[0]._replace(query=()), job) for job in jobs):
                kv = self._compressed(members[0][0]) if members[0][0].context else None
                for parts, continuation, index in members:
                    scored[index] = self._loglikelihood(kv, list(parts.query), continuation)
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], scored[index])
                    bar.update()
        return [scored[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Refuse: there is no context apart from what is scored."""
        raise ValueError(
            "kvzip compresses a context in front of a question, which a rolling likelihood has not: choose tasks of "
            "output_type generate_until, loglikelihood or multiple_choice"
        )

    # -- the model ---------------------------------------------------------------------------------------------------

    def _shortened(self, parts: Parts, new: int) -> Parts:
        if self.max_length is None or parts.length + new <= self.max_length:
            return parts
        logger.warning("the beginning of a context is left out to fit into %d tokens", self.max_length)
        return parts.shortened(self.max_length - new)

    def _tell(self, prompts: Sequence[Parts]) -> None:
        whole = sum(not parts.compress for parts in prompts)
        if whole and self.ratio < 1:
            logger.warning(
                "%d of %d prompts have no %r: they are not compressed", whole, len(prompts), self._splitter.separator
            )

    def _compressed(self, parts: Parts) -> KVCache:
        """The kv of a context, pruned if it is to be."""
        prune = parts.compress and self.ratio < 1
        scorer = self.scorer if prune else None
        kv = self.model.prefill(parts.context, prefix_ids=parts.prefix, scorer=scorer, kv_type="evict")
        if prune:
            kv.prune(self.ratio, self.level)
        return kv

    def _generate(self, kv: KVCache, queries: Sequence[tuple[int, ...]], options: dict[str, Any]) -> list[str]:
        options = dict(options)
        until = [stop for stop in handle_stop_sequences(options.pop("until", None), eos=None) if stop]
        options["max_new_tokens"] = options.pop("max_gen_toks")
        if not options.get("do_sample"):
            options.pop("temperature", None)
        if until:
            start = len(kv.input_ids) + max(map(len, queries))
            options["stopping_criteria"] = StoppingCriteriaList([_Until(self.tokenizer, until, start)])
        texts = self.model.generate([list(query) for query in queries], kv=kv, **options)
        return [postprocess_generated_text(text, stop=until, think_end_token=None) for text in texts]

    def _loglikelihood(self, kv: KVCache | None, query: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log-probability of a continuation, and whether greedy decoding gives it."""
        ids = [*query, *continuation[:-1]]
        if kv is None:
            with torch.no_grad():
                logits = self.model.model(torch.tensor([ids], device=self.model.device), use_cache=False).logits
        else:
            logits = self.model(ids, kv)
        log_probs = logits[0, -len(continuation) :].float().log_softmax(-1)
        target = torch.tensor(continuation, device=log_probs.device)
        chosen = log_probs.gather(1, target[:, None])
        return float(chosen.sum()), bool((log_probs.argmax(-1) == target).all())


class _Until(StoppingCriteria):
    """Ends each row when one of the texts stands in what is new in it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, until: Sequence[str], start: int) -> None:
        self.tokenizer, self.until, self.start = tokenizer, until, start
        self.window = (
            max(len(stop.encode()) for stop in until) + 4
        )  # tokens that can hold one, none shorter than a byte

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        new = self.tokenizer.batch_decode(input_ids[:, self.start :][:, -self.window :], skip_special_tokens=True)
        ended = [any(stop in text for stop in self.until) for text in new]
        return torch.tensor(ended, device=input_ids.device)


def _grouped(pairs: Iterable[tuple[Any, T]]) -> list[list[T]]:
    """Values with equal keys together, in the order of each key's first one."""
    groups: dict[str, list[T]] = {}
    for key, value in pairs:
        groups.setdefault(repr(key), []).append(value)
    return list(groups.values())


def main() -> None:
    """Run lm-eval's command line with the model "kvzip" known, and chosen unless another is named."""
    from lm_eval.__main__ import cli_evaluate

    arguments = sys.argv[1:]
    named = any(one.partition("=")[0] in ("--model", "-M") for one in arguments)
    if not named and (arguments[:1] == ["run"] or (arguments and arguments[0].startswith("-"))):
        sys.argv += ["--model", "kvzip"]
    cli_evaluate()


if __name__ == "__main__":
    main()
