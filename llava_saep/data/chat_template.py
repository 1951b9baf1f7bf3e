"""The chat template that a tokenizer brings, as a conversation template for training and generation.

What of its output is the answer is not told by counting characters or tokens: the template is rendered once more with
a mark in place of each answer, and what stands between the marks is what the template itself wrote. Put together with
the answers that must give the template's own output again, or the conversation is refused.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from llava_saep.constants import DEFAULT_IMAGE_TOKEN
from llava_saep.data.conversation import MMTAG_IMAGE_MARKER, Segment, Turn
from llava_saep.errors import UserError

CHAT_TEMPLATE = "chat_template"
"""The name (`--version`) of the tokenizer's own template."""

RENDER_OPTIONS: Mapping[str, Any] = {"enable_thinking": False}
"""LLaVA's data hold answers without reasoning; templates that do not know the option ignore it (Qwen3, SmolLM3 do)."""

THINKING_OFF = "{%- if enable_thinking is not defined %}{% set enable_thinking = false %}{% endif -%}"
"""RENDER_OPTIONS inside a template, for those who render it themselves."""

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A tokenizer's chat template; has the interface of `templates.ConversationTemplate`.

    Attributes:
        tokenizer: whose `chat_template` renders.
        lead: what the model writes before the text of an answer, such as a space, or an empty thinking block.
        ending: what it writes after it, its end-of-turn token last.
        stop_strings: an answer ends where one of these appears.
        takes_system: a system message has a place in it.
    """

    tokenizer: Any
    lead: str
    ending: str
    stop_strings: tuple[str, ...]
    takes_system: bool
    name: str = CHAT_TEMPLATE
    system: str = ""  # the template's own default is inside it
    image_marker: str = DEFAULT_IMAGE_TOKEN
    single_exchange: bool = False
    any_order: bool = False
    labels_by_sentence: bool = False
    adds_bos: bool = False  # the template writes the special tokens that it wants

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "ChatTemplate":
        """Find out how the tokenizer's template begins and ends an answer.

        Raises:
            UserError: there is no template, it is no Jinja that renders, or answers have no recognisable end.
        """
        check_has_template(tokenizer)
        conversation = [Turn("user", "Hi"), Turn("assistant", _mark(0))]
        before, after = _split_at_marks(_rendered(tokenizer, _messages(conversation)), 1)
        prompt = _rendered(tokenizer, _messages(conversation[:1]), add_generation_prompt=True)
        lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
        ending = after
        if _GENERATION_BLOCK.search(tokenizer.chat_template):
            block_lead, ending = _generation_block(tokenizer, conversation)
            lead = min(lead, block_lead, key=len)  # SmolLM3's block begins with the assistant's header
        ending, stop = _end_of_turn(ending, tokenizer)
        takes_system = _takes_system(tokenizer, conversation)
        return cls(tokenizer=tokenizer, lead=lead, ending=ending, stop_strings=(stop,), takes_system=takes_system)

    def render(
        self, turns: Sequence[Turn], add_generation_prompt: bool = False, system: str | None = None
    ) -> list[Segment]:
        """Render a conversation to segments of prompt and target text.

        The generation prompt is what training shows before an answer, whatever the template does for its own
        `add_generation_prompt`.

        Args and errors as in `templates.ConversationTemplate.render`, and
        UserError: the template refuses the conversation (its own words follow), or rewrites an answer.
        """
        if not add_generation_prompt:
            return self.render_training(turns, system)
        if turns and turns[-1].role != "user":
            raise UserError("the conversation ends with an answer; to get another one, end it with a user turn")
        messages = _messages([*turns, Turn("assistant", _mark(0))], system)
        before, _ = _split_at_marks(_rendered(self.tokenizer, messages), 1)
        return [Segment(before.removesuffix(self.lead), False)]

    def render_training(self, turns: Sequence[Turn], system: str | None = None) -> list[Segment]:
        """Render a whole conversation as training sees it; arguments and errors as in `render`."""
        answers = [turn.text for turn in turns if turn.role == "assistant"]
        marks = iter(range(len(answers)))
        marked = [Turn(turn.role, _mark(next(marks))) if turn.role == "assistant" else turn for turn in turns]
        for _ in range(2):  # a template may write the time of day, which passes between two renderings
            whole = _rendered(self.tokenizer, _messages(turns, system))
            parts = _split_at_marks(_rendered(self.tokenizer, _messages(marked, system)), len(answers))
            for kept in (answers, [answer.strip() for answer in answers]):  # many templates strip
                if "".join(_interleaved(parts, kept)) == whole:
                    return self._segments(parts, kept)
        raise UserError(
            "the tokenizer's chat template rewrites an answer of this conversation (thinking blocks inside answers are "
            "not supported), so it cannot be told what of its output to learn"
        )

    def _segments(self, parts: Sequence[str], answers: Sequence[str]) -> list[Segment]:
        """Give each answer what the model writes before and after it."""
        segments = []
        for position, part in enumerate(parts):
            if position > 0 and part.startswith(self.ending):
                segments.append(Segment(self.ending, True))
                part = part.removeprefix(self.ending)
            if position == len(answers):
                segments.append(Segment(part, False))
                break
            lead = self.lead if part.endswith(self.lead) else ""
            segments.append(Segment(part.removesuffix(lead), False))
            segments.append(Segment(lead + answers[position], True))
        return [segment for segment in segments if segment.text]


def check_has_template(tokenizer: Any) -> None:
    """Raise UserError unless the tokenizer has a chat template of its own, and a single one.

    In a folder that a run saved, the tokenizer's file holds what the processor asks with: after training with one of
    LLaVA's templates that is its Jinja form.
    """
    template = getattr(tokenizer, "chat_template", None)
    is_llavas = isinstance(template, str) and template.startswith(
        (flattening(DEFAULT_IMAGE_TOKEN), flattening(MMTAG_IMAGE_MARKER))
    )
    if not isinstance(template, str) or is_llavas:
        found = "several chat templates" if template else "no chat template"
        found = "no chat template but that of an earlier run's --version" if is_llavas else found
        source = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise UserError(
            f"--version {CHAT_TEMPLATE}: the tokenizer {source} has {found}; name one of LLaVA's templates instead, "
            "such as --version v1, or take the tokenizer of a chat model"
        )


def flattening(image_marker: str) -> str:
    """Return Jinja that goes before a template for text, so that a message's content may be a list of parts.

    An image among them becomes its marker and a line break.
    """
    marker = image_marker + "\\n"
    return (
        "{%- set flat = namespace(messages=[], text='') -%}"
        "{%- for message in messages -%}"
        "{%- set flat.text = message['content'] if message['content'] is string else '' -%}"
        "{%- for part in ([] if message['content'] is string else message['content']) -%}"
        f"{{%- set flat.text = flat.text + ('{marker}' if part['type'] == 'image' else part['text']) -%}}"
        "{%- endfor -%}"
        "{%- set flat.messages = flat.messages + [dict(message, content=flat.text)] -%}"
        "{%- endfor -%}"
        "{%- set messages = flat.messages -%}"
    )


def _messages(turns: Sequence[Turn], system: str | None = None) -> list[Message]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": turn.role, "content": turn.text} for turn in turns]


def _rendered(tokenizer: Any, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **RENDER_OPTIONS
        )
    except (TemplateError, TypeError, ValueError) as error:  # Jinja's own, and what Python says to its expressions
        raise UserError(f"the tokenizer's chat template refuses this conversation: {error}") from error


def _mark(position: int) -> str:
    return f"[[answer-{position}-7c41f0]]"  # ASCII without spaces: neither stripping nor JSON quoting changes it


def _split_at_marks(text: str, num_marks: int) -> list[str]:
    """Return the num_marks + 1 stretches of text around the marks.

    Raises:
        UserError: the template does not write each answer exactly once and in order.
    """
    parts = []
    rest = text
    for position in range(num_marks):
        if text.count(_mark(position)) != 1 or _mark(position) not in rest:
            raise UserError(
                f"the tokenizer's chat template does not write answer {position + 1} of this conversation exactly "
                "once, so the model could not learn it"
            )
        part, _, rest = rest.partition(_mark(position))
        parts.append(part)
    return [*parts, rest]


def _interleaved(parts: Sequence[str], answers: Sequence[str]) -> list[str]:
    return [text for pair in zip(parts, [*answers, ""], strict=True) for text in pair]


def _takes_system(tokenizer: Any, conversation: Sequence[Turn]) -> bool:
    """Return whether a system message is neither refused nor passed over."""
    try:
        return _mark(1) in _rendered(tokenizer, _messages(conversation, _mark(1)))
    except UserError:
        return False


def _generation_block(tokenizer: Any, conversation: Sequence[Turn]) -> tuple[str, str]:
    """Return what the template's `{% generation %}` block holds before and after an answer."""
    rendered, spans = render_jinja_template(
        conversations=[_messages(conversation)],
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **RENDER_OPTIONS},
    )
    blocks = [rendered[0][start:end] for start, end in spans[0]]
    block = next((block for block in blocks if _mark(0) in block), None)
    if block is None:
        raise UserError("the generation block of the tokenizer's chat template does not hold the answer")
    lead, _, ending = block.partition(_mark(0))
    return lead, ending


def _end_of_turn(after: str, tokenizer: Any) -> tuple[str, str]:
    """Cut what follows an answer behind its end-of-turn token -> (ending, stop string).

    Phi-3's template ends a conversation with "<|end|>\\n<|endoftext|>": the model answers up to "<|end|>". Without any
    token of the vocabulary in it, all that follows is the ending.
    """
    contents = [token.content for token in tokenizer.added_tokens_decoder.values()]
    found = [(after.index(content), -len(content), content) for content in contents if content in after]
    if found:
        start, _, stop = min(found)
        return after[: start + len(stop)], stop
    if not after:
        raise UserError(
            "the tokenizer's chat template writes nothing after an answer, so a model trained with it would never "
            "stop; name one of LLaVA's templates instead, such as --version v1"
        )
    return after, after.strip() or after
