"""Where the context of a finished prompt ends and its question begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from kvzip.model.prompting import Template


class Parts(NamedTuple):
    """Ids of a prompt, in order.

    Attributes:
        prefix: protected: special tokens and the chat template's beginning.
        context, query: what comes before and after the cut.
        compress: whether there was a place to cut; otherwise only the last id is the query.
    """

    prefix: tuple[int, ...]
    context: tuple[int, ...]
    query: tuple[int, ...]
    compress: bool

    @property
    def length(self) -> int:
        """Tokens in all."""
        return len(self.prefix) + len(self.context) + len(self.query)

    def shortened(self, room: int) -> Parts:
        """The same with the beginning of the context left out, so that `room` tokens hold it.

        Raises:
            ValueError: too little room for the rest.
        """
        surplus = self.length - room
        if surplus <= 0:
            return self
        if surplus >= len(self.context):
            raise ValueError(f"a prompt of {self.length} tokens cannot be shortened to {room}")
        return self._replace(context=self.context[surplus:])


@dataclass(frozen=True)
class Splitter:
    """Cuts prompts at the last separator, such as a blank line, that has something after it.

    Raises:
        ValueError: an empty separator, or a tokenizer that does not tell the offsets of its tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template
    separator: str

    def __post_init__(self) -> None:
        if not self.separator:
            raise ValueError("the separator is empty")
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(f"{type(self.tokenizer).__name__} does not tell the offsets of its tokens")

    def encoding(self, text: str, add_special_tokens: bool | None = None, **kwargs: Any) -> Any:
        """What the tokenizer makes of `text`, with its special tokens unless the text begins with them."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and text.startswith(bos))
        return self.tokenizer(text, add_special_tokens=add_special_tokens, **kwargs)

    def split(self, prompt: str) -> Parts:
        """Cut a prompt into ids, which together are those of all of it; where a chat template was applied, before
        the end of the last user turn. A token across an edge goes to what comes after.
        """
        found = self.encoding(prompt, return_offsets_mapping=True)
        ids, ends = tuple(found["input_ids"]), [stop for _, stop in found["offset_mapping"]]
        before, text = 0, prompt
        if self.tokenizer.chat_template and self.template.suffix and self.template.suffix in prompt:
            text = prompt[: prompt.rindex(self.template.suffix)]
            before = len(self.template.before) if prompt.startswith(self.template.before) else 0
        cut = text.rstrip().rfind(self.separator, before)
        first = sum(stop <= before for stop in ends)
        last = sum(stop <= cut for stop in ends)
        if last > first:
            return Parts(ids[:first], ids[first:last], ids[last:], True)
        return Parts((), ids[:-1], ids[-1:], False)
