"""How a model's prompts were worded in training, so that whoever uses it can word theirs the same way."""

from __future__ import annotations

import re
from dataclasses import dataclass

PLACE = "{prompt}"
_NO_TEXT = re.compile(r"[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]")  # controls, and halves of pairs


@dataclass(frozen=True)
class PromptTemplate:
    """The messages of a conversational prompt, one of which holds `{prompt}` where a user's text goes.

    A conditioned model's `prompt_template` is saved and loaded with it. `generate` takes tokens and leaves it alone;
    `clp generate` applies it.

    Args:
        messages: as chat templates take them, `{"role": ..., "content": ...}` each. A content may have several lines.

    Raises:
        ValueError: no messages, other keys, or not exactly one `{prompt}` in all of them; a role with unprintable
            characters, a content with control characters other than tabs and line breaks.
    """

    messages: list[dict[str, str]]

    def __post_init__(self) -> None:
        if wrong := [message for message in self.messages if set(message) != {"role", "content"}]:
            raise ValueError(f"messages hold {wrong[0]}, expected a role and a content in each")
        # They would reach prompts, messages and terminals unseen, and a saved role like that could not be read back.
        for role, content in ((message["role"], message["content"]) for message in self.messages):
            if not role.isprintable():
                raise ValueError(f"messages hold the role {role!r}, which has unprintable characters")
            if found := _NO_TEXT.search(content):
                raise ValueError(f"the {role}'s content holds the control character {found[0]!r}")
        if (count := sum(message["content"].count(PLACE) for message in self.messages)) != 1:
            raise ValueError(f"messages hold {PLACE} {count} times, expected once: where the user's text goes")

    def fill(self, prompt: str) -> list[dict[str, str]]:
        """The messages with `prompt` in its place, ready for the tokenizer's chat template."""
        return [{**message, "content": message["content"].replace(PLACE, prompt)} for message in self.messages]
