"""Tokenizers as LLaVA's and transformers' loaders expect them on disk."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import Metaspace
from transformers import LlamaTokenizer

from llava_saep.constants import DEFAULT_IMAGE_PATCH_TOKEN, DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava_saep.model.parts import SENTENCEPIECE_FILE, copy_sentencepiece

logger = logging.getLogger(__name__)


def save_without_placeholder(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer as LLaVA has it: without `<image>`, which LLaVA cuts out of the text itself.

    Where tokens come after it, one that LLaVA does not use takes its id (`<im_patch>`): LLaVA gives the embedding as
    many rows as there are tokens, so a free id would cost the last token its row.
    """
    stand_in = stand_in_for_placeholder(tokenizer)
    if copy_sentencepiece(tokenizer, folder):
        _write_json(folder / "tokenizer_config.json", _sentencepiece_config(tokenizer, stand_in))
        _write_json(folder / "special_tokens_map.json", _special_tokens(tokenizer))
        return
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    for token in content["added_tokens"]:
        token["content"] = _without_placeholder(token["content"], stand_in)
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] is not None]
    _write_json(file, content)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, list):
        settings["extra_special_tokens"] = [name for t in extra if (name := _without_placeholder(t, stand_in))]
    _write_json(folder / "tokenizer_config.json", settings)
    if isinstance(tokenizer, LlamaTokenizer):
        logger.warning(
            "the tokenizer has no %s beside it, which the original LLaVA reads; copy it from the language model",
            SENTENCEPIECE_FILE,
        )


def stand_in_for_placeholder(tokenizer: Any) -> str | None:
    """The token to write in place of `<image>`; None where nothing comes after it and it can be left out."""
    vocabulary = tokenizer.get_vocab()
    if vocabulary.get(DEFAULT_IMAGE_TOKEN, len(vocabulary)) >= len(vocabulary) - 1:
        return None
    return IMAGE_PLACEHOLDER if DEFAULT_IMAGE_PATCH_TOKEN in vocabulary else DEFAULT_IMAGE_PATCH_TOKEN


def _without_placeholder(token: str, stand_in: str | None) -> str | None:
    return stand_in if token == DEFAULT_IMAGE_TOKEN else token


def _sentencepiece_config(tokenizer: Any, stand_in: str | None) -> dict[str, Any]:
    """The settings of transformers 4's LlamaTokenizer that give this tokenizer's ids."""
    pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    is_legacy = not isinstance(pre_tokenizer, Metaspace) or pre_tokenizer.prepend_scheme == "always"
    first = tokenizer("").input_ids[:1]
    return {
        "add_bos_token": first == [tokenizer.bos_token_id],
        "add_eos_token": tokenizer("").input_ids[-1:] == [tokenizer.eos_token_id],
        "added_tokens_decoder": {
            str(index): {**_token_fields(token), "content": content}
            for index, token in sorted(tokenizer.added_tokens_decoder.items())
            if (content := _without_placeholder(token.content, stand_in)) is not None
        },
        **_special_tokens(tokenizer),
        "clean_up_tokenization_spaces": False,
        "legacy": is_legacy,
        "model_max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }


def _special_tokens(tokenizer: Any) -> dict[str, str]:
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    return {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}


def _token_fields(token: Any) -> dict[str, Any]:
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {name: getattr(token, name) for name in names}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
