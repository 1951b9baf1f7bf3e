"""Tokens that a vocabulary gains, and the rows of embedding and head that belong to them.

`--mm_use_im_start_end` adds <im_start> and <im_end>, as LLaVA's initialize_vision_tokenizer does. Their rows start as
the mean of the others. What they have learnt lies beside the projector's weights, as a whole embedding or their rows.
"""

import copy
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from llava_saep.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN
from llava_saep.errors import UserError

EMBEDDING_NAME = "model.language_model.embed_tokens.weight"
HEAD_NAME = "lm_head.weight"

START_END_TOKENS = (DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN)
"""What `--mm_use_im_start_end` adds, in the order of their ids."""


def is_embedding(name: str) -> bool:
    """Whether a weight beside projector weights is the language model's input embedding, under any prefix."""
    return name.endswith("embed_tokens.weight")


def add_special_tokens(tokenizer: Any, tokens: Sequence[str]) -> tuple[int, ...]:
    """Give a tokenizer those of these special tokens that it lacks; return the ids of the new ones."""
    known = tokenizer.get_vocab()
    lacking = [token for token in tokens if token not in known]
    tokenizer.add_tokens(lacking, special_tokens=True)
    return tuple(tokenizer.convert_tokens_to_ids(lacking))


def check_special_tokens(tokenizer: Any, num_rows: int) -> None:
    """Refuse a tokenizer whose pad, bos or eos token has no row in the embedding, before a run trips over it.

    Raises:
        UserError: names token, id and rows; or there is nothing to pad with.
    """
    if tokenizer.pad_token_id is None:
        raise UserError(
            "the tokenizer names no pad, unk or eos token, so batches cannot be padded; name one in its "
            'tokenizer_config.json ("pad_token")'
        )
    for kind in ("pad", "bos", "eos"):
        token, token_id = getattr(tokenizer, f"{kind}_token"), getattr(tokenizer, f"{kind}_token_id")
        if token_id is not None and not 0 <= token_id < num_rows:
            raise UserError(
                f"the tokenizer's {kind} token {token!r} has id {token_id}, but the language model's embedding has "
                f"{num_rows} rows; name another one in tokenizer_config.json ({kind}_token), or take the language "
                "model that this tokenizer was made for"
            )


def with_room_for(text_config: PreTrainedConfig, token_ids: Sequence[int]) -> PreTrainedConfig:
    """Return the config of the same language model, with at least as many rows as these tokens need."""
    grown = copy.deepcopy(text_config)
    grown.vocab_size = max(text_config.vocab_size, *(token_id + 1 for token_id in token_ids), 0)
    return grown


def add_rows(
    weights: MutableMapping[str, Tensor],
    vocab_size: int,
    token_ids: Sequence[int] = (),
    *,
    names: Sequence[str] = (EMBEDDING_NAME, HEAD_NAME),
) -> None:
    """Give embedding and head the rows that they lack: the mean of the others, as in LLaVA.

    Some language models have spare rows, which the new tokens take: those of the embedding start as the mean as well,
    and those of the head stay, since the model has learnt to leave them out.

    Args:
        weights: changed in place; those of a tied head are not among them.
        vocab_size: rows in the end.
        token_ids: of the new tokens.
    """
    for name in names:
        matrix = weights.get(name)
        if matrix is None or (matrix.shape[0] >= vocab_size and not token_ids):
            continue
        known = matrix[: min(token_ids, default=matrix.shape[0])]
        mean = known.float().mean(dim=0, keepdim=True).to(matrix.dtype)
        grown = torch.cat([matrix, mean.expand(max(vocab_size - matrix.shape[0], 0), -1)])
        if token_ids and is_embedding(name):
            grown[list(token_ids)] = mean
        weights[name] = grown


def rows_of_tokens(stored: Tensor, token_ids: Sequence[int], text_config: PreTrainedConfig, where: str) -> Tensor:
    """Take the rows of added tokens out of an embedding that lies beside projector weights.

    Args:
        stored: the whole matrix, or these rows alone. LLaVA's matrix ends with them, and has one row more where
            --mm_use_im_patch_token added <im_patch> before them.
        where: the file, for the message.
    Raises:
        UserError: the matrix belongs to another vocabulary or width.
    """
    vocab_size, width = text_config.vocab_size, text_config.hidden_size
    num_tokens, num_rows = len(token_ids), max(token_ids, default=-1) + 1
    if tuple(stored.shape) == (vocab_size, width):
        return stored[list(token_ids)]
    if stored.dim() == 2 and stored.shape[1] == width and stored.shape[0] in (num_tokens, num_rows, num_rows + 1):
        return stored[-num_tokens:]
    raise UserError(
        f"{where}: its token embedding has shape {tuple(stored.shape)}, but this language model's with "
        f"{' and '.join(START_END_TOKENS)} is {(vocab_size, width)}; expected that shape, or {(num_tokens, width)} for "
        "the new rows alone. Start from the language model that stage 1 was trained with"
    )
