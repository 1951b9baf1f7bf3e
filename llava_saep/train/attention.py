"""Which attention the language model trains with, and whether conversations may share a row of it."""

from __future__ import annotations

import logging

from transformers import PreTrainedModel

from llava_saep.errors import UserError
from llava_saep.model.segment_attention import (
    SEGMENTS,
    is_padding_free,
    use_segment_attention,
    why_no_segments,
    why_not_packed,
)

logger = logging.getLogger(__name__)


def check_attention(name: str | None, *, on_accelerator: bool) -> None:
    """Refuse an attention that could not train on this device, before any weights are read.

    Raises:
        UserError: it has no gradients there.
    """
    if name == "flex_attention" and not on_accelerator:
        raise UserError(
            "--attn_implementation flex_attention: PyTorch has its gradients on GPUs alone, and this run is on CPU; "
            f"use {SEGMENTS} or sdpa"
        )


def library_attention(name: str | None) -> str | None:
    """Return what transformers is to load the model with: tower and language model attend alike until training."""
    return None if name == SEGMENTS else name


def choose_attention(language_model: PreTrainedModel, name: str | None, *, packing: bool) -> bool:
    """Have the language model attend as `--attn_implementation` says: by segments if it says nothing and they can be.

    The choice is for training alone; a saved config does not mention it.

    Returns:
        whether batches come without padding.
    Raises:
        UserError: the model cannot attend so, or conversations that share a row would see each other in it.
    """
    obstacle = why_not_packed(language_model)
    if packing and obstacle is not None:
        raise UserError(
            f"--packing True: conversations of one row would not stay apart in the language model "
            f"{language_model.config.model_type}: {obstacle}; train without --packing"
        )
    if name == SEGMENTS or (name is None and why_no_segments(language_model) is None):
        use_segment_attention(language_model)
    used = language_model.config._attn_implementation
    if used == SEGMENTS:
        logger.info("attention: each conversation by itself (%s), batches without padding", SEGMENTS)
    else:
        logger.info("attention: %s", used)
    return is_padding_free(used) and obstacle is None
