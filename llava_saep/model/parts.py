"""The pretrained parts that a model is made of: vision tower, language model and its tokenizer."""

import copy
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlamaTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import deepspeed as hf_deepspeed

from llava_saep.constants import DEFAULT_IMAGE_TOKEN
from llava_saep.errors import UserError
from llava_saep.model.combined_towers import CombinedVisionConfig, split_tower_names
from llava_saep.model.hub import find_file
from llava_saep.model.reading import UNREADABLE_WEIGHTS, first_line, read_config, read_json_object
from llava_saep.model.vocabulary import add_special_tokens

SENTENCEPIECE_FILE = "tokenizer.model"

LLAMA_TOKENIZERS = ("LlamaTokenizer", "LlamaTokenizerFast")
"""What tokenizer_config.json calls LLaMA's."""


@contextmanager
def loading_whole() -> Iterator[None]:
    """Inside the block transformers loads ordinary modules even in a ZeRO-3 run.

    The parts are read whole and only the composed model is partitioned, as its weights are handed to each rank.
    """
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = reference


def load_part(auto_class, path: str, config: PreTrainedConfig, flag: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load one pretrained model by a transformers Auto class.

    Args:
        flag: what the user calls it, for the message.
    Raises:
        UserError: its weights are missing, damaged, misshapen or not all there.
    """
    try:
        model, info = auto_class.from_pretrained(path, config=config, dtype=dtype, output_loading_info=True)
    except UNREADABLE_WEIGHTS as error:
        raise UserError(f"{flag} {path!r} cannot be loaded: {first_line(error)}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"{flag} {path!r} lacks {len(missing)} weights of its architecture, such as {missing[0]!r}")
    return model


def tower_weights(path: str, config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Read a vision tower's weights, under the names that they have in the composed model; errors as `load_part`."""
    if not isinstance(config, CombinedVisionConfig):
        tower = load_part(AutoModel, path, config, "--vision_tower", dtype)
        return {f"model.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
    weights = {}
    for index, (name, single) in enumerate(zip(split_tower_names(path), config.tower_configs, strict=True)):
        state = load_part(AutoModel, name, single, "--vision_tower", dtype).state_dict()
        weights |= {f"model.vision_tower.towers.{index}.{key}": tensor for key, tensor in state.items()}
    return weights


def language_model_weights(path: str, config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Read a language model's weights, under the names that they have in the composed model; errors as `load_part`.

    Where the head is tied to the embedding, it is left out. There are as many rows as the files have, also where the
    config says more.
    """
    whole = read_config(path, "--model_name_or_path")
    config = copy.deepcopy(config)
    config.vocab_size = whole.get_text_config().vocab_size
    if whole.get_text_config() is whole:
        language_model = load_part(AutoModelForCausalLM, path, config, "--model_name_or_path", dtype)
        decoder = language_model.base_model
    else:  # a model that sees, such as Gemma 3 from 4B on: its language model is taken out
        language_model = load_part(AutoModelForImageTextToText, path, whole, "--model_name_or_path", dtype)
        decoder = language_model.get_decoder()
    weights = {f"model.language_model.{name}": t for name, t in decoder.state_dict().items()}
    if not config.tie_word_embeddings:
        weights["lm_head.weight"] = language_model.get_output_embeddings().weight.data
    return weights


def build_tokenizer(language_model: str, extra_tokens: Sequence[str] = (), text_config: PreTrainedConfig | None = None):
    """Load the language model's tokenizer and complete it as `complete_tokenizer` does.

    Args:
        extra_tokens: special tokens to add before the placeholder, where the tokenizer lacks them.
        text_config: the language model's, where the folder's config.json is one that transformers does not know.
    """
    tokenizer = read_tokenizer(language_model, text_config)
    add_special_tokens(tokenizer, extra_tokens)
    return complete_tokenizer(tokenizer)


def read_tokenizer(language_model: str, text_config: PreTrainedConfig | None = None):
    """Load the language model's tokenizer, padding on the right as for training; `text_config` as `build_tokenizer`.

    Raises:
        UserError: there is none that can be read.
    """
    try:
        if _is_llamas_in_one_file(language_model):
            return LlamaTokenizer.from_pretrained(language_model, padding_side="right")
        return AutoTokenizer.from_pretrained(language_model, config=text_config, padding_side="right")
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"the tokenizer of {language_model!r} cannot be loaded: {first_line(error)}") from error


def _is_llamas_in_one_file(language_model: str) -> bool:
    """Whether a tokenizer is LLaMA's and there is only tokenizer.model, as in LLaVA-1.6's Mistral.

    transformers 5 goes by the type of the language model then, and reads Mistral's without the blank that LLaMA's
    tokenizer puts in front of a text.
    """
    settings = find_file(language_model, "tokenizer_config.json")
    if settings is None or read_json_object(settings).get("tokenizer_class") not in LLAMA_TOKENIZERS:
        return False
    return find_file(language_model, "tokenizer.json") is None


def complete_tokenizer(tokenizer):
    """Give a tokenizer the `<image>` placeholder, and `<unk>` (else the end token) to pad with."""
    add_special_tokens(tokenizer, (DEFAULT_IMAGE_TOKEN,))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def copy_sentencepiece(tokenizer, folder: Path) -> bool:
    """Put the tokenizer.model that a tokenizer was made from into a folder; say whether there is one.

    transformers 5 writes tokenizer.json alone, but the original LLaVA reads tokenizer.model (use_fast=False).
    """
    source = getattr(tokenizer, "vocab_file", None)
    if source is None or Path(source).name != SENTENCEPIECE_FILE or not Path(source).is_file():
        return False
    target = folder / SENTENCEPIECE_FILE
    if not (target.exists() and target.samefile(source)):
        shutil.copyfile(source, target)
    return True
