"""LLaVA's own interface to its prompts, for code that was written against `llava.conversation`.

`conv_templates[name].copy()`, `append_message`, `get_prompt`: what comes out is what LLaVA's prints, character by
character. Inside this package, templates render conversations (templates.py).
"""

import enum
from dataclasses import dataclass, field, replace
from typing import Any

from llava_saep.constants import DEFAULT_IMAGE_TOKEN
from llava_saep.data.conversation import MMTAG_IMAGE_MARKER, Role
from llava_saep.data.templates import LLAVA_FORMATS, LlavaFormat, Style, render_prompt


class SeparatorStyle(enum.Enum):
    """How the parts of a conversation are put together."""

    SINGLE = enum.auto()
    TWO = enum.auto()
    MPT = enum.auto()
    PLAIN = enum.auto()
    LLAMA_2 = enum.auto()


_STYLES: dict[SeparatorStyle, Style] = {
    SeparatorStyle.SINGLE: "single",
    SeparatorStyle.TWO: "two",
    SeparatorStyle.MPT: "mpt",
    SeparatorStyle.PLAIN: "plain",
    SeparatorStyle.LLAMA_2: "llama_2",
}


@dataclass
class Conversation:
    """A conversation that grows, with LLaVA's attributes.

    Attributes:
        messages: [role, message] each; a message is a text, None for an answer that is to come, or a tuple
            (text, image, how to prepare the image).
        offset: how many of the messages are examples that belong to the template.
    """

    system: str
    roles: tuple[str, str]
    messages: list[list[Any]] = field(default_factory=list)
    offset: int = 0
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    skip_next: bool = False

    def append_message(self, role: str, message: Any) -> None:
        """Add a message; a None as the last one asks for the assistant's answer."""
        self.messages.append([role, message])

    def copy(self) -> "Conversation":
        """Return one that can grow by itself."""
        return replace(self, messages=[list(message) for message in self.messages])

    def get_prompt(self) -> str:
        """Render what LLaVA renders; in `plain` also an answer, at which LLaVA fails.

        An empty text counts as None. An image is put in front of the text only in the first message; a tuple in a
        later one counts as its text.

        Raises:
            ValueError: a llama_2 conversation does not start with a text of the first role.
        """
        llava = LlavaFormat(
            names=(),
            style=_STYLES[self.sep_style],
            system=self.system,
            roles=self.roles,
            separators=(self.sep, self.sep if self.sep2 is None else self.sep2),
            version=self.version,
        )
        turns: list[tuple[Role, str]] = []
        for role, message in self._messages_with_first_image(llava):
            text = message[0] if isinstance(message, tuple) else message
            turns.append(("user" if role == self.roles[0] else "assistant", text or ""))
        return render_prompt(llava, turns, self.system)

    def _messages_with_first_image(self, llava: LlavaFormat) -> list[list[Any]]:
        if not self.messages or not isinstance(self.messages[0][1], tuple):
            return self.messages
        (role, (text, *_)), *others = self.messages
        text = text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
        if llava.has_image_tags:
            return [[self.roles[0], MMTAG_IMAGE_MARKER], [self.roles[1], "Received."], [role, text], *others]
        return [[role, f"{DEFAULT_IMAGE_TOKEN}\n{text}"], *others]


def _conversation(llava: LlavaFormat) -> Conversation:
    sep, sep2 = llava.separators
    return Conversation(
        system=llava.system_start + llava.system,
        roles=llava.roles,
        messages=[[role, text] for role, text in zip(llava.roles, llava.examples, strict=False)],
        offset=len(llava.examples),
        sep_style=next(style for style, name in _STYLES.items() if name == llava.style),
        sep=sep,
        sep2=sep2 if llava.style in ("two", "llama_2") else None,
        version=llava.version,
    )


conv_templates = {name: _conversation(llava) for llava in LLAVA_FORMATS for name in llava.names}
default_conversation = conv_templates["vicuna_v1"]
