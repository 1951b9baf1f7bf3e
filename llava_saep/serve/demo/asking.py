"""What one asks with, the same in every section: the field for a question with its pictures, and how it is answered."""

from typing import Any, NamedTuple

import gradio as gr

from llava_saep.generation import GenerationOptions
from llava_saep.serve.demo.conversation import whole_characters
from llava_saep.serve.limits import Limits

ACCEPTED_FILES = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"]


class Controls(NamedTuple):
    """Sliders and fields of how an answer is decoded, in the order in which handlers get their values."""

    system: gr.Textbox
    temperature: gr.Slider
    top_p: gr.Slider
    max_new_tokens: gr.Slider


class ControlValues(NamedTuple):
    """What `Controls` say, as the browser sends it.

    Handlers take it last, as `*controls`: Gradio finds the place of the request only before those.
    """

    system: str | None
    temperature: float
    top_p: float
    max_new_tokens: float

    @property
    def system_prompt(self) -> str:
        """Empty: the template's own."""
        return whole_characters(self.system or "").strip()

    @property
    def options(self) -> GenerationOptions:
        """How the model shall decode.

        Raises:
            UserError: a value is out of range.
        """
        return GenerationOptions(
            temperature=float(self.temperature), top_p=float(self.top_p), max_new_tokens=int(self.max_new_tokens)
        )


def question_field(
    limits: Limits, *, file_count: str = "multiple", max_lines: int = 4, **arguments: Any
) -> gr.MultimodalTextbox:
    """Make the field for a question with its pictures.

    Args:
        arguments: further ones of gr.MultimodalTextbox: placeholder, elem_id, ...
    """
    return gr.MultimodalTextbox(
        file_types=ACCEPTED_FILES,
        file_count=file_count,
        sources=["upload"],
        lines=1,
        max_lines=max_lines,
        max_plain_text_length=limits.max_prompt_characters,
        **arguments,
    )
