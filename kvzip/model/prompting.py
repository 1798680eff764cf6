"""Prompt pieces as ids: what stands before the context, after a question, and between two turns.

The chat template is rendered once around markers and cut at them, so every template gives its own turn structure. All
pieces are tokenised separately, so that the ids of a context do not depend on the question that follows.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

INSTRUCTION = "Answer the questions from the context below.\n\n"
Message = dict[str, str]
Query = str | Sequence[int] | torch.Tensor | Sequence[Message]

_MARKERS = ("<<kvzip-user-1>>", "<<kvzip-assistant>>", "<<kvzip-user-2>>")


@dataclass(frozen=True)
class Template:
    """A tokenizer's turn structure.

    Attributes:
        before: text in front of the first user turn's content.
        suffix: text between a user turn's content and the answer.
        between: text between an answer and the next user turn's content.
    """

    before: str
    suffix: str
    between: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Template":
        """Cut the chat template; without one: the beginning-of-sequence token, and newlines between turns."""
        if not getattr(tokenizer, "chat_template", None):
            return cls(tokenizer.bos_token or "", "\n", "\n")
        user_1, assistant, user_2 = _MARKERS
        asked = _render(tokenizer, [("user", user_1)], add_generation_prompt=True)
        talked = _render(tokenizer, [("user", user_1), ("assistant", assistant), ("user", user_2)])
        before, _, suffix = asked.partition(user_1)
        between = talked.partition(assistant)[2].partition(user_2)[0]
        return cls(before, suffix, between)


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]], **kwargs: Any) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    # Templates that think unless told not to (Qwen3) write an empty think block; the others ignore the variable.
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False, **kwargs))
    missing = [content for _, content in turns if content not in text]
    if missing:
        raise ValueError(f"the chat template drops message contents {missing}; pass ids instead of text")
    return text


@dataclass(frozen=True)
class Prompting:
    """Turns texts and messages into ids with one tokenizer; None = only ids are understood."""

    tokenizer: PreTrainedTokenizerBase | None
    template: Template = field(init=False)

    def __post_init__(self) -> None:
        empty = Template("", "", "")
        object.__setattr__(self, "template", empty if self.tokenizer is None else Template.of(self.tokenizer))

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone, without special tokens around it.

        Raises:
            ValueError: there is no tokenizer.
        """
        if not text:
            return []
        if self.tokenizer is None:
            raise ValueError(f"this model has no tokenizer: pass ids instead of the text {text[:40]!r}")
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def prefix_ids(self, instruction: str = INSTRUCTION) -> list[int]:
        """Ids in front of the context: the template's beginning and a line that says what is wanted."""
        return self.encode(self.template.before) + (self.encode(instruction) if self.tokenizer else [])

    @property
    def suffix_ids(self) -> list[int]:
        """Ids between a question and its answer."""
        return self.encode(self.template.suffix)

    @property
    def between_ids(self) -> list[int]:
        """Ids between an answer and the next question."""
        return self.encode(self.template.between)

    def query_ids(self, query: Query) -> list[int]:
        """Ids to feed after the context: text gets the template's turn structure, ids are used as they are.

        Args:
            query: a question; ids (list or 1-d tensor); or messages, user and assistant in turns, user first. A last
                message of the assistant is the beginning of the answer.

        Raises:
            ValueError: empty, or messages out of turn.
        """
        if isinstance(query, str):
            if not query.strip():
                raise ValueError("the query is empty")
            return self.encode("\n\n" + query.strip()) + self.suffix_ids
        if is_messages(query):
            return self._messages_ids(query)  # type: ignore[arg-type]
        return as_ids(query, "query")  # type: ignore[arg-type]

    def _messages_ids(self, messages: Sequence[Message]) -> list[int]:
        ids: list[int] = []
        for turn, message in enumerate(messages):
            expected = ("user", "assistant")[turn % 2]
            role = message.get("role") if isinstance(message, Mapping) else None
            if role != expected or not isinstance(message.get("content"), str):
                raise ValueError(f"message {turn} is {message!r}; expected role {expected!r} with a text as content")
            if role == "user":
                ids += (self.between_ids if turn else []) + self.query_ids(message["content"])
            else:
                ids += self.encode(message["content"])
        return ids


def is_messages(query: object) -> bool:
    """Whether a query is a list of chat messages."""
    return isinstance(query, list | tuple) and len(query) > 0 and isinstance(query[0], dict)


def is_batch(query: object) -> bool:
    """Whether a query is a list of queries: of texts, chats or sequences of ids."""
    return isinstance(query, list | tuple) and all(isinstance(one, str | list | tuple | torch.Tensor) for one in query)


def as_ids(ids: Sequence[int] | torch.Tensor, what: str) -> list[int]:
    """Check and return ids as a list.

    Raises:
        ValueError: empty, not one-dimensional, or not whole numbers.
    """
    if isinstance(ids, torch.Tensor):
        if (
            ids.is_floating_point()
            or ids.dtype == torch.bool
            or ids.ndim not in (1, 2)
            or (ids.ndim == 2 and len(ids) != 1)
        ):
            raise ValueError(f"{what} ids must be integers of shape (n,) or (1, n), got {ids.dtype} {tuple(ids.shape)}")
        ids = ids.flatten().tolist()
    if isinstance(ids, Mapping | Set):
        raise ValueError(f"{what} must be a text or integer ids, got {type(ids).__name__} {list(ids)[:3]!r}; of what a "
                         "tokenizer returns, pass ['input_ids']")  # fmt: skip
    if isinstance(ids, (bytes, bytearray)):
        raise ValueError(f"{what} must be a text or integer ids, got bytes {bytes(ids[:8])!r}; decode them first")
    found = list(ids) if isinstance(ids, Iterable) else [ids]
    whole = all(isinstance(token, Integral) and not isinstance(token, bool) for token in found)
    if not isinstance(ids, Iterable) or not whole:
        raise ValueError(f"{what} must be a text or integer ids, got {found[:3]!r}")
    if not found:
        raise ValueError(f"{what} is empty")
    return [int(token) for token in found]
