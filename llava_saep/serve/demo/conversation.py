"""A conversation as the page keeps it: plain, frozen values that become messages of a model, rows of a chat, and JSON.

Images are named by the SHA-256 of what was sent; `PictureStore` holds them.
"""

import dataclasses
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llava_saep.errors import UserError

TITLE_CHARACTERS = 40


@dataclass(frozen=True, kw_only=True)
class ChatMessage:
    """A question or an answer.

    Args:
        pictures: names in the store, in the order in which they were added.
        model_id: of an answer: who gave it.
        statistics: of an answer: the fields of `AnswerStatistics`.
        liked: of an answer: what was thought of it; None: nothing was said.
    """

    role: Literal["user", "assistant"]
    text: str
    pictures: tuple[str, ...] = ()
    model_id: str | None = None
    statistics: Mapping[str, Any] | None = None
    liked: bool | None = None


def whole_characters(text: str) -> str:
    """Replace halves of characters, which JSON can hold and a text cannot; a field that is full may cut one."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def shortened(text: str) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= TITLE_CHARACTERS else line[: TITLE_CHARACTERS - 1].rstrip() + "…"


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Questions and answers in turn, of which the last question may wait for its answer."""

    chat_id: str
    system: str = ""
    messages: tuple[ChatMessage, ...] = ()

    @classmethod
    def new(cls, system: str = "") -> "Conversation":
        """An empty one with a name that nobody guesses."""
        return cls(chat_id=secrets.token_hex(8), system=system)

    @property
    def title(self) -> str:
        """The beginning of the first question, on one line."""
        first = next((message.text for message in self.messages if message.text.strip()), "")
        return shortened(first) or ("Picture" if self.messages else "New chat")

    @property
    def questions(self) -> list[tuple[int, ChatMessage]]:
        """All questions, with their places in the conversation."""
        return [(index, message) for index, message in enumerate(self.messages) if message.role == "user"]

    @property
    def pictures(self) -> tuple[str, ...]:
        """All pictures in their order, one that is shown twice twice."""
        return tuple(name for message in self.messages for name in message.pictures)

    @property
    def waits_for_an_answer(self) -> bool:
        """Whether the last message is a question."""
        return bool(self.messages) and self.messages[-1].role == "user"

    def with_question(self, text: str, pictures: tuple[str, ...] = ()) -> "Conversation":
        """Append a question.

        Raises:
            UserError: there is neither text nor a picture.
        """
        if not text.strip() and not pictures:
            raise UserError("Write a question, or add a picture to ask about.")
        message = ChatMessage(role="user", text=whole_characters(text).strip(), pictures=pictures)
        return dataclasses.replace(self, messages=(*self.messages, message))

    def with_answer(self, text: str, model_id: str, statistics: Mapping[str, Any] | None) -> "Conversation":
        """Append the answer to the last question."""
        message = ChatMessage(role="assistant", text=text, model_id=model_id, statistics=statistics)
        return dataclasses.replace(self, messages=(*self.messages, message))

    def before_last_question(self) -> tuple["Conversation", ChatMessage | None]:
        """Take back the last question and what follows it; also return the question, None where there was none."""
        if not self.questions:
            return self, None
        place, question = self.questions[-1]
        return dataclasses.replace(self, messages=self.messages[:place]), question

    def with_edited_question(self, index: int, text: str) -> "Conversation":
        """Put other words into an earlier question; what followed it is dropped, its pictures stay.

        Raises:
            UserError: there is no question at this place, or nothing is left of it.
        """
        if not 0 <= index < len(self.messages) or self.messages[index].role != "user":
            raise UserError("This question is no longer there; reload the page.")
        before = dataclasses.replace(self, messages=self.messages[:index])
        return before.with_question(text, self.messages[index].pictures)

    def with_opinion(self, index: int, liked: bool | None) -> "Conversation":
        """Note what was thought of an answer.

        Raises:
            UserError: there is no answer at this place.
        """
        if not 0 <= index < len(self.messages) or self.messages[index].role != "assistant":
            raise UserError("This answer is no longer there; reload the page.")
        message = dataclasses.replace(self.messages[index], liked=liked)
        return dataclasses.replace(self, messages=(*self.messages[:index], message, *self.messages[index + 1 :]))

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Conversation":
        """Read what `to_json` wrote.

        Raises:
            KeyError, TypeError: it is something else.
        """
        messages = tuple(
            ChatMessage(**{**message, "pictures": tuple(message["pictures"])}) for message in fields["messages"]
        )
        return cls(chat_id=fields["chat_id"], system=fields["system"], messages=messages)
