"""How a model's prompts were worded in training, so that whoever uses it can word theirs the same way."""

from __future__ import annotations

from dataclasses import dataclass

PLACE = "{prompt}"


@dataclass(frozen=True)
class PromptTemplate:
    """The messages of a conversational prompt, one of which holds `{prompt}` where a user's text goes.

    A conditioned model's `prompt_template` is saved and loaded with it. `generate` takes tokens and leaves it alone;
    `clp generate` applies it.

    Args:
        messages: as chat templates take them, `{"role": ..., "content": ...}` each.

    Raises:
        ValueError: no messages, other keys, or not exactly one `{prompt}` in all of them.
    """

    messages: list[dict[str, str]]

    def __post_init__(self) -> None:
        if wrong := [message for message in self.messages if set(message) != {"role", "content"}]:
            raise ValueError(f"messages hold {wrong[0]}, expected a role and a content in each")
        if (count := sum(message["content"].count(PLACE) for message in self.messages)) != 1:
            raise ValueError(f"messages hold {PLACE} {count} times, expected once: where the user's text goes")

    def fill(self, prompt: str) -> list[dict[str, str]]:
        """The messages with `prompt` in its place, ready for the tokenizer's chat template."""
        return [{**message, "content": message["content"].replace(PLACE, prompt)} for message in self.messages]
