"""Conversation templates by name: how turns become the text that a language model reads and writes.

The names, system prompts and separators are LLaVA's (llava/conversation.py, v1.2.2), since released checkpoints were
trained on exactly these strings. Each rendering is checked against prompts of the original in tests/golden/llava.
"""

import difflib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llava_saep.constants import DEFAULT_IMAGE_TOKEN
from llava_saep.data.conversation import Segment, Turn
from llava_saep.errors import UserError

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAVA_V1_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
LLAVA_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
MPT_SYSTEM = (
    "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)
CHATML_SYSTEM = "<|im_start|>system\nAnswer the questions."

Renderer = Callable[[Sequence[Turn], bool, str], list[Segment]]


@dataclass(frozen=True, kw_only=True)
class ConversationTemplate:
    """How one family of language models expects a conversation.

    Attributes:
        name: the name it was asked for by (`--version`).
        system: the text before the first turn; "" for none.
        stop_strings: an answer ends where one of these appears.
        renderer: turns, add_generation_prompt, system -> segments.
        single_exchange: training data must be one marker-bearing prompt and one answer (the `plain` format).
    """

    name: str
    system: str
    stop_strings: tuple[str, ...]
    renderer: Renderer
    single_exchange: bool = False

    def render(
        self, turns: Sequence[Turn], add_generation_prompt: bool = False, system: str | None = None
    ) -> list[Segment]:
        """Render a conversation to segments of prompt and target text.

        Args:
            turns: user and assistant turns, in order.
            add_generation_prompt: end with the text after which the model answers (last turn must be the user's).
                The result is a prefix of what training sees for the same conversation with its answer.
            system: a text to use in place of the template's own.
        Raises:
            UserError: an order of turns that the template cannot express.
        """
        if add_generation_prompt and turns and turns[-1].role != "user":
            raise UserError("the conversation ends with an answer; to get another one, end it with a user turn")
        return self.renderer(turns, add_generation_prompt, self.system if system is None else system)


def conversation_template(name: str) -> ConversationTemplate:
    """Look a template up by its LLaVA name.

    Raises:
        UserError: no template has this name; the message lists those that there are.
    """
    try:
        return _TEMPLATES[name]
    except KeyError:
        close = difflib.get_close_matches(name, TEMPLATE_NAMES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"unknown conversation template {name!r}.{hint} Known: {', '.join(TEMPLATE_NAMES)}") from None


def _render_role_names(turns: Sequence[Turn], add_generation_prompt: bool, system: str) -> list[Segment]:
    """Vicuna: "SYSTEM USER: question ASSISTANT: answer</s>USER: ..."."""
    segments = [Segment(f"{system} ", False)]
    for turn in turns:
        if turn.role == "user":
            segments.append(Segment(f"USER: {turn.text} ", False))
        else:
            # The space belongs to the answer: in SentencePiece vocabularies it is part of the answer's first token.
            segments += [Segment("ASSISTANT:", False), Segment(f" {turn.text}</s>", True)]
    if add_generation_prompt:
        segments.append(Segment("ASSISTANT:", False))
    return segments


def _render_inst(turns: Sequence[Turn], add_generation_prompt: bool, system: str, *, round_start: str) -> list[Segment]:
    """Llama-2 and Mistral: "[INST] question [/INST] answer </s>"; `round_start` precedes every round but the first."""
    segments = []
    for position, turn in enumerate(turns):
        expected = "user" if position % 2 == 0 else "assistant"
        if turn.role != expected:
            raise UserError(f"turn {position + 1} is the {turn.role}'s, but this template needs the {expected}'s")
        if turn.role == "assistant":
            segments.append(Segment(f" {turn.text} </s>", True))
            continue
        start = round_start if position else ""
        header = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system and position == 0 else ""
        segments.append(Segment(f"{start}[INST] {header}{turn.text} [/INST]", False))
    return segments  # a user turn already ends with what the answer follows


def _render_chatml(turns: Sequence[Turn], add_generation_prompt: bool, system: str) -> list[Segment]:
    """MPT and ChatML: "<|im_start|>user\\nquestion<|im_end|><|im_start|>assistant\\nanswer<|im_end|>"."""
    segments = [Segment(f"{system}<|im_end|>", False)]
    for turn in turns:
        if turn.role == "user":
            segments.append(Segment(f"<|im_start|>user\n{turn.text}<|im_end|>", False))
        else:
            segments += [Segment("<|im_start|>assistant\n", False), Segment(f"{turn.text}<|im_end|>", True)]
    if add_generation_prompt:
        segments.append(Segment("<|im_start|>assistant\n", False))
    return segments


def _render_plain(turns: Sequence[Turn], add_generation_prompt: bool, system: str) -> list[Segment]:
    """Pre-training: image markers, then "caption\\n". Text that the user wrote beside them is dropped, as in LLaVA."""
    segments = []
    for turn in turns:
        if turn.role == "user":
            segments.append(Segment(DEFAULT_IMAGE_TOKEN * turn.text.count(DEFAULT_IMAGE_TOKEN), False))
        else:
            segments.append(Segment(f"{turn.text}\n", True))
    return segments


def _templates() -> dict[str, ConversationTemplate]:
    """Build the registry; two names of one template share everything but the name."""
    rows: list[tuple[tuple[str, ...], str, str, Renderer]] = [
        (("v1", "vicuna_v1"), VICUNA_SYSTEM, "</s>", _render_role_names),
        (("llava_v1",), LLAVA_V1_SYSTEM, "</s>", _render_role_names),
        (("plain", "v0_plain"), "", "\n", _render_plain),
        (("llama_2",), LLAMA_2_SYSTEM, "</s>", functools.partial(_render_inst, round_start="<s>")),
        (("llava_llama_2",), LLAVA_LLAMA_2_SYSTEM, "</s>", functools.partial(_render_inst, round_start="<s>")),
        (("mistral_instruct",), "", "</s>", functools.partial(_render_inst, round_start="")),
        (("chatml_direct", "mistral_direct"), CHATML_SYSTEM, "<|im_end|>", _render_chatml),
        (("mpt",), MPT_SYSTEM, "<|im_end|>", _render_chatml),
    ]
    return {
        name: ConversationTemplate(
            name=name,
            system=system,
            stop_strings=(stop_string,),
            renderer=renderer,
            single_exchange=renderer is _render_plain,
        )
        for names, system, stop_string, renderer in rows
        for name in names
    }


_TEMPLATES = _templates()
TEMPLATE_NAMES: tuple[str, ...] = tuple(_TEMPLATES)
