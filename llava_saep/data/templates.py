"""Conversation templates by name: how turns become the text that a language model reads and writes.

The names, system prompts, roles and separators are LLaVA's (llava/conversation.py, v1.2.2), since released checkpoints
were trained on exactly these strings; `LLAVA_FORMATS` is the one table of them. Each rendering is checked against
prompts of the original in tests/golden/llava. `chat_template` stands for the template that a tokenizer brings.
"""

import difflib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llava_saep.constants import DEFAULT_IMAGE_TOKEN
from llava_saep.data.chat_template import CHAT_TEMPLATE, ChatTemplate
from llava_saep.data.conversation import MMTAG_IMAGE_MARKER, Role, Segment, Turn
from llava_saep.errors import UserError

_SYSTEM = (
    "A chat between a curious {user} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {user}'s questions."
)
_MMTAG_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_LLAVA_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_MPT_SYSTEM = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)
_V0_EXAMPLE = (
    "What are the key differences between renewable and non-renewable energy sources?",
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, such "
    "as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are finite and "
    "will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences between renewable "
    "and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are "
    "finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
    "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
    "operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations than "
    "non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations and "
    "needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable sources "
    "are not, and their depletion can lead to economic and social instability.\n",
)

Style = Literal["single", "two", "mpt", "llama_2", "plain"]


@dataclass(frozen=True, kw_only=True)
class LlavaFormat:
    """What LLaVA's conversation of one name consists of.

    Attributes:
        names: the keys under which LLaVA has it.
        style: how the parts are put together, LLaVA's SeparatorStyle.
        system: the text before the first turn, without the style's own wrapping; "" for none.
        roles: how user and assistant are called.
        separators: what ends a user's turn, and an assistant's.
        system_start: what stands before `system`.
        version: LLaVA's name of the training procedure that belongs to it.
        examples: question and answer that stand before every conversation (few-shot), or nothing.
    """

    names: tuple[str, ...]
    style: Style
    system: str
    roles: tuple[str, str]
    separators: tuple[str, str]
    system_start: str = ""
    version: str = "Unknown"
    examples: tuple[str, ...] = ()

    @property
    def has_image_tags(self) -> bool:
        """Whether images are written as "<Image><image></Image>"."""
        return "mmtag" in self.version


_HUMAN = {"roles": ("Human", "Assistant"), "style": "single", "separators": ("###", "###")}
_USER: dict[str, Any] = {"roles": ("USER", "ASSISTANT"), "version": "v1"}
_TWO = _USER | {"style": "two", "separators": (" ", "</s>")}
_INST = _USER | {"style": "llama_2", "version": "llama_v2"}
_CHATML: dict[str, Any] = {
    "roles": ("<|im_start|>user\n", "<|im_start|>assistant\n"),
    "style": "mpt",
    "separators": ("<|im_end|>", "<|im_end|>"),
    "system_start": "<|im_start|>system\n",
    "version": "mpt",
}

LLAVA_FORMATS = tuple(
    LlavaFormat(names=names, system=system, **parts)
    for names, system, parts in (
        (("default", "v0"), _SYSTEM.format(user="human"), _HUMAN | {"examples": _V0_EXAMPLE}),
        (("v1", "vicuna_v1"), _SYSTEM.format(user="user"), _TWO),
        (("llama_2",), _LLAMA_2_SYSTEM, _INST | {"separators": ("<s>", "</s>")}),
        (("mistral_instruct",), "", _INST | {"separators": ("", "</s>")}),
        (("chatml_direct", "mistral_direct"), "Answer the questions.", _CHATML),
        (("plain", "v0_plain"), "", {"roles": ("", ""), "style": "plain", "separators": ("\n", "\n")}),
        (("llava_v0",), _SYSTEM.format(user="human"), _HUMAN),
        (("v0_mmtag",), _MMTAG_SYSTEM, _HUMAN | {"version": "v0_mmtag"}),
        (("llava_v1",), _SYSTEM.format(user="human"), _TWO),
        (("v1_mmtag",), _MMTAG_SYSTEM, _TWO | {"version": "v1_mmtag"}),
        (("llava_llama_2",), _LLAVA_LLAMA_2_SYSTEM, _INST | {"separators": ("<s>", "</s>")}),
        (("mpt",), _MPT_SYSTEM, _CHATML),
    )
)
"""LLaVA's templates; two names in a row are one template."""

Renderer = Callable[[Sequence[Turn], bool, str], list[Segment]]


@dataclass(frozen=True, kw_only=True)
class ConversationTemplate:
    """How one family of language models expects a conversation.

    Attributes:
        name: the name it was asked for by (`--version`).
        system: the text before the first turn; "" for none.
        stop_strings: an answer ends where one of these appears.
        renderer: turns, add_generation_prompt, system -> segments.
        training_renderer: the same for training, where that is something else.
        image_marker: what stands in a turn for one image.
        single_exchange: training data must be one marker-bearing prompt and one answer (the `plain` format).
        any_order: turns need not alternate, nor start with the user's.
        labels_by_sentence: labels are found as `tokenization.sentence_labels` does it.
        adds_bos: the tokenizer's bos goes before the text.
    """

    name: str
    system: str
    stop_strings: tuple[str, ...]
    renderer: Renderer
    training_renderer: Renderer | None = None
    image_marker: str = DEFAULT_IMAGE_TOKEN
    single_exchange: bool = False
    any_order: bool = False
    labels_by_sentence: bool = False
    adds_bos: bool = True

    @property
    def takes_system(self) -> bool:
        """Whether a system prompt has a place in it."""
        return bool(self.system)

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

    def render_training(self, turns: Sequence[Turn], system: str | None = None) -> list[Segment]:
        """Render a whole conversation as training sees it; arguments and errors as in `render`."""
        if self.training_renderer is None:
            return self.render(turns, system=system)
        return self.training_renderer(turns, False, self.system if system is None else system)


AnyTemplate = ConversationTemplate | ChatTemplate


def conversation_template(name: str, tokenizer: Any = None) -> AnyTemplate:
    """Look a template up by its LLaVA name, or make that of the tokenizer (`chat_template`).

    Args:
        tokenizer: needed for `chat_template` only.
    Raises:
        UserError: no template has this name, with those that there are; or the tokenizer's cannot be trained with.
    """
    if check_template_name(name) == CHAT_TEMPLATE:
        return ChatTemplate.from_tokenizer(tokenizer)
    return _TEMPLATES[name]


def is_same_template(name: str, other: str) -> bool:
    """Whether two names stand for one template (v1 and vicuna_v1)."""
    return name == other or any({name, other} <= set(llava.names) for llava in LLAVA_FORMATS)


def check_template_name(name: str) -> str:
    """Return the name of a template.

    Raises:
        UserError: no template has this name; the message lists those that there are.
    """
    if name in TEMPLATE_NAMES or name == CHAT_TEMPLATE:
        return name
    known = [*TEMPLATE_NAMES, CHAT_TEMPLATE]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise UserError(f"unknown conversation template {name!r}.{hint} Known: {', '.join(known)}")


def render_prompt(llava: LlavaFormat, turns: Sequence[tuple[Role, str]], system: str) -> str:
    """Render what LLaVA's Conversation.get_prompt renders, its peculiarities included.

    A turn without text is one that waits for its answer. Separators go by a turn's position and not by its role:
    LLaVA ends every second turn as an answer, whoever speaks. (In `render` the role decides.)

    Args:
        system: all that stands before the first separator, the style's wrapping included.
    Raises:
        ValueError: a llama_2 conversation does not start with a user's text.
    """
    separators = [llava.separators[position % 2] for position in range(len(turns))]
    if llava.style == "plain":
        return system + "".join(f"{text}{end}" for (_, text), end in zip(turns, separators, strict=True) if text)
    if llava.style == "llama_2":
        if turns and (turns[0][0] != "user" or not turns[0][1]):
            raise ValueError("a conversation in the format of Llama-2 starts with a text of the user's")
        rounds = [Turn(("user", "assistant")[at % 2], text) for at, (_, text) in enumerate(turns) if text]
        return "".join(segment.text for segment in _inst_segments(llava, rounds, system))
    start = f"{system}{llava.separators[0]}"
    return start + "".join(
        segment.text
        for (role, text), end in zip(turns, separators, strict=True)
        for segment in _named_turn(llava, role, text or None, end)
    )


def _named_turn(llava: LlavaFormat, role: Role, text: str | None, end: str) -> list[Segment]:
    """Render a turn that starts with its speaker's name; without a text, only that is there.

    The space after "ASSISTANT:" belongs to the answer: in SentencePiece vocabularies it is part of its first token.
    """
    name = llava.roles[role == "assistant"]
    space = "" if llava.style == "mpt" else " "
    segments = [Segment(name if llava.style == "mpt" else f"{name}:", False)]
    if text is not None:
        segments.append(Segment(f"{space}{text}{end}", role == "assistant"))
    return segments


def _render_named(llava: LlavaFormat, turns: Sequence[Turn], add_generation_prompt: bool, system: str) -> list[Segment]:
    """Vicuna, MPT and ChatML: "SYSTEM USER: question ASSISTANT: answer</s>USER: ..."."""
    examples = [Turn(role, text) for role, text in zip(("user", "assistant"), llava.examples, strict=False)]
    segments = [Segment(f"{llava.system_start}{system}{llava.separators[0]}", False)]
    for turn in examples:
        segments += [Segment(segment.text, False) for segment in _closed_turn(llava, turn)]
    for turn in turns:
        segments += _closed_turn(llava, turn)
    if add_generation_prompt:
        segments += _named_turn(llava, "assistant", None, "")
    return segments


def _closed_turn(llava: LlavaFormat, turn: Turn) -> list[Segment]:
    return _named_turn(llava, turn.role, turn.text, llava.separators[turn.role == "assistant"])


def _render_sentences(
    llava: LlavaFormat, turns: Sequence[Turn], add_generation_prompt: bool, system: str
) -> list[Segment]:
    """Write what LLaVA's preprocess_v0 trains on, which is not what it prompts with: one segment per sentence."""
    sentences = [Segment(f"{system}\n\n", False)]
    for turn in turns:
        is_answer = turn.role == "assistant"
        sentences.append(Segment(f"### {llava.roles[is_answer]}: {turn.text}\n", is_answer))
    return [*sentences, Segment("### ", True)]


def _inst_segments(llava: LlavaFormat, turns: Sequence[Turn], system: str) -> list[Segment]:
    """Llama-2 and Mistral: "[INST] question [/INST] answer </s>"; from the second round on "<s>" goes before it."""
    segments = []
    for position, turn in enumerate(turns):
        if turn.role == "assistant":
            segments.append(Segment(f" {turn.text} {llava.separators[1]}", True))
            continue
        start = llava.separators[0] if position else ""
        header = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system and position == 0 else ""
        segments.append(Segment(f"{start}[INST] {header}{turn.text} [/INST]", False))
    return segments


def _render_inst(llava: LlavaFormat, turns: Sequence[Turn], add_generation_prompt: bool, system: str) -> list[Segment]:
    """Render rounds, after which nothing more is needed: a user's turn already ends with what the answer follows."""
    for position, turn in enumerate(turns):
        expected = "user" if position % 2 == 0 else "assistant"
        if turn.role != expected:
            raise UserError(f"turn {position + 1} is the {turn.role}'s, but this template needs the {expected}'s")
    return _inst_segments(llava, turns, system)


def _render_plain(llava: LlavaFormat, turns: Sequence[Turn], add_generation_prompt: bool, system: str) -> list[Segment]:
    """Pre-training: image markers, then "caption\\n". Text that the user wrote beside them is dropped, as in LLaVA."""
    segments = []
    for turn in turns:
        if turn.role == "user":
            segments.append(Segment(DEFAULT_IMAGE_TOKEN * turn.text.count(DEFAULT_IMAGE_TOKEN), False))
        else:
            segments.append(Segment(f"{turn.text}{llava.separators[1]}", True))
    return segments


_RENDERERS: dict[Style, Callable[..., list[Segment]]] = {
    "single": _render_named,
    "two": _render_named,
    "mpt": _render_named,
    "llama_2": _render_inst,
    "plain": _render_plain,
}


def _template(name: str, llava: LlavaFormat) -> ConversationTemplate:
    is_v0 = llava.style == "single"
    return ConversationTemplate(
        name=name,
        system=llava.system,
        stop_strings=(llava.separators[1],),
        renderer=functools.partial(_RENDERERS[llava.style], llava),
        training_renderer=functools.partial(_render_sentences, llava) if is_v0 else None,
        image_marker=MMTAG_IMAGE_MARKER if llava.has_image_tags else DEFAULT_IMAGE_TOKEN,
        single_exchange=llava.style == "plain",
        any_order=is_v0,
        labels_by_sentence=is_v0,
    )


_TEMPLATES = {name: _template(name, llava) for llava in LLAVA_FORMATS for name in llava.names}
TEMPLATE_NAMES: tuple[str, ...] = tuple(_TEMPLATES)
"""LLaVA's names; `chat_template` is a name as well, but needs a tokenizer."""
