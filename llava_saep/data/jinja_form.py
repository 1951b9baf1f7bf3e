"""Conversation templates as Jinja, for `processor.apply_chat_template` and whatever calls it, such as `pipeline`.

templates.py is the reference: the same conversation gives the same text in both. A message's content may be a text or a
list of parts, of which an image becomes the template's marker and a line break.
"""

import json

from llava_saep.constants import DEFAULT_IMAGE_TOKEN
from llava_saep.data.chat_template import CHAT_TEMPLATE, THINKING_OFF, flattening
from llava_saep.data.conversation import MMTAG_IMAGE_MARKER, between_start_and_end
from llava_saep.data.templates import LLAVA_FORMATS, LlavaFormat, Style

_SYSTEM_APART = (
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set turns = messages -%}{%- endif -%}"
)
_NAMED = (
    "{{- start + system + ends[0] + examples -}}"
    "{%- for message in turns -%}{%- set at = 1 if message['role'] == 'assistant' else 0 -%}"
    "{{- names[at] + space + message['content'] + ends[at] -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- names[1] -}}{%- endif -%}"
)
_INST = (
    "{%- for message in turns -%}"
    "{%- if (message['role'] == 'assistant') != (loop.index0 % 2 == 1) -%}"
    "{{- raise_exception('user and assistant must alternate, the user first') -}}{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{{- ' ' + message['content'] + ' ' + ends[1] -}}"
    "{%- else -%}{{- '' if loop.first else ends[0] -}}{{- '[INST] ' -}}"
    "{%- if loop.first and system -%}{{- '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' -}}{%- endif -%}"
    "{{- message['content'] + ' [/INST]' -}}{%- endif -%}{%- endfor -%}"
)
_PLAIN = (
    "{%- for message in turns -%}{%- if message['role'] == 'assistant' -%}{{- message['content'] + ends[1] -}}"
    "{%- else -%}{{- '<image>' * (message['content'].split('<image>') | length - 1) -}}{%- endif -%}{%- endfor -%}"
)
_BODIES: dict[Style, str] = {"single": _NAMED, "two": _NAMED, "mpt": _NAMED, "llama_2": _INST, "plain": _PLAIN}


def jinja_form(name: str, tokenizer_template: str | None = None, *, use_im_start_end: bool = False) -> str:
    """Return the Jinja form of a conversation template.

    Args:
        name: one of `templates.TEMPLATE_NAMES`, or `chat_template`.
        tokenizer_template: what `chat_template` stands for.
        use_im_start_end: images stand between <im_start> and <im_end>; but `plain` drops what is beside them.
    """
    if name == CHAT_TEMPLATE:
        prefix = THINKING_OFF + flattening(_marker(DEFAULT_IMAGE_TOKEN, use_im_start_end))
        return tokenizer_template if tokenizer_template.startswith(prefix) else prefix + tokenizer_template
    (llava,) = (llava for llava in LLAVA_FORMATS if name in llava.names)
    return _llava_form(llava, use_im_start_end)


def _marker(marker: str, use_im_start_end: bool) -> str:
    return between_start_and_end(marker) if use_im_start_end else marker


def _llava_form(llava: LlavaFormat, use_im_start_end: bool) -> str:
    """Name the parts of a format, then let the body of its style put them together."""
    has_colon = llava.style != "mpt"
    names = [f"{role}:" if has_colon else role for role in llava.roles]
    space = " " if has_colon else ""
    parts = {
        "start": llava.system_start,
        "system": llava.system,
        "names": names,
        "ends": list(llava.separators),
        "space": space,
        "examples": "".join(
            f"{name}{space}{text}{end}"
            for name, text, end in zip(names, llava.examples, llava.separators, strict=bool(llava.examples))
        ),
    }
    named = "".join(f"{{%- set {part} = {json.dumps(value)} -%}}" for part, value in parts.items())
    marker = MMTAG_IMAGE_MARKER if llava.has_image_tags else DEFAULT_IMAGE_TOKEN
    return flattening(_marker(marker, use_im_start_end)) + named + _SYSTEM_APART + _BODIES[llava.style]
