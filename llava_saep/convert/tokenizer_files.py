"""Tokenizers as LLaVA's and transformers' loaders expect them on disk."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import Metaspace

from llava_saep.constants import DEFAULT_IMAGE_TOKEN

logger = logging.getLogger(__name__)

SENTENCEPIECE_FILE = "tokenizer.model"


def copy_sentencepiece(tokenizer: Any, folder: Path) -> bool:
    """Put the tokenizer.model that a tokenizer was made from into a folder; say whether there is one.

    transformers 5 writes tokenizer.json alone, but the original LLaVA reads tokenizer.model (use_fast=False).
    """
    source = getattr(tokenizer, "vocab_file", None)
    if source is None or Path(source).name != SENTENCEPIECE_FILE or not Path(source).is_file():
        return False
    shutil.copyfile(source, folder / SENTENCEPIECE_FILE)
    return True


def save_without_placeholder(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer as LLaVA has it: without `<image>`, which LLaVA cuts out of the text itself."""
    if copy_sentencepiece(tokenizer, folder):
        _write_json(folder / "tokenizer_config.json", _sentencepiece_config(tokenizer))
        _write_json(folder / "special_tokens_map.json", _special_tokens(tokenizer))
        return
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != DEFAULT_IMAGE_TOKEN]
    _write_json(file, content)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, list):
        settings["extra_special_tokens"] = [token for token in extra if token != DEFAULT_IMAGE_TOKEN]
    _write_json(folder / "tokenizer_config.json", settings)
    if tokenizer.init_kwargs.get("sp_model_kwargs") is not None:
        logger.warning(
            "the tokenizer has no %s beside it, which the original LLaVA reads; copy it from the language model",
            SENTENCEPIECE_FILE,
        )


def _sentencepiece_config(tokenizer: Any) -> dict[str, Any]:
    """The settings of transformers 4's LlamaTokenizer that give this tokenizer's ids."""
    pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    is_legacy = not isinstance(pre_tokenizer, Metaspace) or pre_tokenizer.prepend_scheme == "always"
    first = tokenizer("").input_ids[:1]
    return {
        "add_bos_token": first == [tokenizer.bos_token_id],
        "add_eos_token": tokenizer("").input_ids[-1:] == [tokenizer.eos_token_id],
        "added_tokens_decoder": {
            str(index): _token_fields(token)
            for index, token in sorted(tokenizer.added_tokens_decoder.items())
            if token.content != DEFAULT_IMAGE_TOKEN
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
