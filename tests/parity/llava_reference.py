"""Where the reference data of the original LLaVA lie, and the tokenizers that they were made with."""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

from transformers import LlamaTokenizer, PreTrainedTokenizerFast

_DEFAULT = Path(__file__).parents[1] / "golden"


def _reference_folder() -> Path:
    """The folder that LLAVA_SAEP_GOLDEN names, or `llava` in it; the default where that is of the projectors alone."""
    named = Path(os.environ.get("LLAVA_SAEP_GOLDEN") or _DEFAULT)
    candidates = (named / "llava", named, _DEFAULT / "llava")
    return next(folder for folder in candidates if (folder / "multimodal_merge.json").is_file())


REFERENCE_FOLDER = _reference_folder()


def read_json(name: str) -> Any:
    return json.loads((REFERENCE_FOLDER / name).read_text(encoding="utf-8"))


def original_name(name: str) -> str:
    """What the original calls a parameter of ours."""
    name = re.sub(r"^model\.language_model\.", "model.", name)
    return re.sub(r"^model\.multi_modal_projector\.mlp\.", "model.mm_projector.", name)


def read_json_lines(name: str) -> list[Any]:
    return [json.loads(line) for line in (REFERENCE_FOLDER / name).read_text(encoding="utf-8").splitlines()]


@functools.cache
def tokenizer(name: str) -> Any:
    """One of the reference's variants; what they are stands in tokenizer_ids.json under "description"."""
    family, _, variant = name.partition("_")
    folder = REFERENCE_FOLDER / "tokenizers"
    if name == "mpt_like":
        return PreTrainedTokenizerFast.from_pretrained(folder / name)
    if family == "yi":
        options = {"add_bos_token": False, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    elif family == "llama":
        options = {"add_bos_token": True}
    else:
        raise KeyError(f"{name}: no tokenizer of this name is known; tell here how it is made")
    variant, _, extra = variant.partition("_")
    made = LlamaTokenizer.from_pretrained(folder, legacy={"legacy": True, "new": False}[variant], **options)
    if extra == "pad":
        made.add_special_tokens({"pad_token": "[PAD]"})
    elif extra == "im_start_end":
        made.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    elif extra:
        raise KeyError(f"{name}: {extra!r} is not known; tell here how it is made")
    return made
