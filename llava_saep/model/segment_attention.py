"""Attention over a row of several conversations, each by itself: what `--attn_implementation segments` names.

A dense block-diagonal mask makes attention quadratic in the row; run segment by segment it costs what the conversations
cost alone. On CUDA in half precision that is one call of torch's variable-length kernel, elsewhere scaled dot-product
attention per segment. Where there are no segments (generation, padded batches) it is transformers' sdpa attention.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import find_packed_sequence_indices, sdpa_mask
from transformers.utils.generic import is_flash_attention_requested

from llava_saep.errors import UserError

try:
    from torch.nn.attention import varlen
except ImportError:  # before torch 2.10
    varlen = None

SEGMENTS = "segments"
"""Name of this attention among transformers' implementations."""

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_VARLEN_OPTIONS = () if varlen is None else tuple(inspect.signature(varlen.varlen_attn).parameters)
"""What this torch's kernel can be told, which has grown from release to release."""

_VARLEN_DTYPES = (torch.float16, torch.bfloat16)
_MAX_VARLEN_HEAD_SIZE = 256


def is_padding_free(attn_implementation: str) -> bool:
    """Whether an attention takes conversations one behind another in a single row, by where they begin and end."""
    name = attn_implementation
    return name == SEGMENTS or is_flash_attention_requested(requested_attention_implementation=name)


def why_not_packed(language_model: PreTrainedModel) -> str | None:
    """Say why conversations of one row would see each other in this language model; None if they do not."""
    config = language_model.config
    if language_model._is_stateful:
        return "it carries a state along the row, from one conversation into the next"
    if "position_ids" not in inspect.signature(language_model.forward).parameters:
        return "it takes no positions, which start anew in each conversation"
    strange = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS
    if strange:
        return f"it has layers of type {', '.join(sorted(strange))}"
    return None


def why_no_segments(language_model: PreTrainedModel) -> str | None:
    """Say why a language model cannot use this attention; None if it can."""
    config = language_model.config
    obstacle = why_not_packed(language_model)
    if obstacle is not None:
        return obstacle
    if not language_model._supports_attention_backend:
        return "its attention cannot be exchanged"
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", False):
        return "its tokens see what comes after them"
    if any(hasattr(module, "sinks") for module in language_model.modules()):
        return "its attention has sinks"
    return None


def use_segment_attention(language_model: PreTrainedModel) -> None:
    """Have a language model attend segment by segment; its saved config does not mention it.

    Raises:
        UserError: it cannot.
    """
    reason = why_no_segments(language_model)
    if reason is not None:
        raise UserError(
            f"--attn_implementation {SEGMENTS}: the language model {language_model.config.model_type} cannot use it: "
            f"{reason}; use sdpa, eager or flash_attention_2"
        )
    AttentionInterface.register(SEGMENTS, segment_attention)
    AttentionMaskInterface.register(SEGMENTS, segment_mask)
    language_model.set_attn_implementation(SEGMENTS)


def segment_mask(
    *, q_length: int, kv_length: int, attention_mask: Tensor | None = None, use_vmap: bool = False, **kwargs
) -> Tensor | None:
    """Make no mask where `segment_attention` can do without, and else sdpa's, in full."""
    has_own_pattern = use_vmap  # transformers' word for a mask that a model adds to the causal one
    if attention_mask is None and q_length == kv_length and not has_own_pattern:
        return None
    kwargs |= {"attention_mask": attention_mask, "use_vmap": use_vmap, "allow_is_causal_skip": False}
    return sdpa_mask(q_length=q_length, kv_length=kv_length, **kwargs)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attend causally within each segment; called by transformers' attention layers.

    Args:
        query: (batch, heads, length, head_size); key and value may have fewer heads.
        attention_mask: (batch, 1, length, keys), True where attended; None: causal, within segments.
        sliding_window: how many tokens back a token sees, itself counted.
        position_ids: (batch or 1, length); where cu_seq_lens_q is None, a segment begins wherever they do not go on.
        cu_seq_lens_q: (segments + 1,), where they begin and end in a batch of one row.
        max_length_q: tokens of the longest segment.
    Returns:
        (batch, length, heads, head_size), and no attention weights.
    Raises:
        UserError: the model asks for something that is not done here.
    """
    _refuse_unknown(module, kwargs)
    batch_size, num_heads, length, _ = query.shape
    attend = _Attend(scaling, dropout, softcap, sliding_window)
    if attention_mask is not None or key.shape[2] != length:
        output = attend(query, key, value, attention_mask, is_causal=False)
    elif cu_seq_lens_q is not None and _takes_varlen(query, dropout, softcap):
        output = _varlen_attention(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window)
    else:
        row = [states.transpose(0, 1).flatten(1, 2)[None] for states in (query, key, value)]
        output = _attend_each_segment(*row, cu_seq_lens_q, position_ids, batch_size, attend)
        output = output.unflatten(2, (batch_size, length))[0].transpose(0, 1)
    return output.transpose(1, 2).contiguous(), None


def _refuse_unknown(module: nn.Module, kwargs: dict) -> None:
    """Refuse what would change the result and is not implemented."""
    given = [name for name in ("s_aux", "position_bias", "cache") if kwargs.get(name) is not None]
    if kwargs.get("is_causal") is False:
        given.append("is_causal=False")
    if given:
        raise UserError(
            f"--attn_implementation {SEGMENTS}: {type(module).__name__} asks for {', '.join(given)}, which it does not "
            "do; use sdpa, eager or flash_attention_2"
        )


@dataclass(frozen=True)
class _Attend:
    """Attention of one sequence with itself, or of any sequences through a mask."""

    scaling: float
    dropout: float
    softcap: float | None
    sliding_window: int | None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """Attend -> (batch, heads, length, head_size).

        Args:
            mask: True where attended.
            is_causal: in place of a mask: tokens see themselves and what comes before, as far as the window reaches.
        """
        length = query.shape[2]
        if is_causal and self.sliding_window is not None and length > self.sliding_window:
            mask, is_causal = _window_mask(length, self.sliding_window, query.device), False
        if self.softcap is not None:
            return self._softcapped(query, key, value, _causal_mask(length, query.device) if is_causal else mask)
        groups = query.shape[1] // key.shape[1]
        if mask is not None:  # with a mask, kernels on CUDA want as many keys' heads as queries'
            key, value, groups = repeat_kv(key, groups), repeat_kv(value, groups), 1
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout,
            scale=self.scaling,
            is_causal=is_causal,
            enable_gqa=groups > 1,
        )

    def _softcapped(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attend with scores squashed into (-softcap, softcap), Gemma 2's way, which no kernel of torch does."""
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        scores = torch.tanh(query @ key.mT * (self.scaling / self.softcap)) * self.softcap
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
        return F.dropout(weights, self.dropout) @ value


def _causal_mask(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def _window_mask(length: int, sliding_window: int, device: torch.device) -> Tensor:
    return _causal_mask(length, device).triu(1 - sliding_window)


@torch.compiler.disable  # lengths differ in each batch, and each would be compiled anew
def _attend_each_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor | None,
    position_ids: Tensor | None,
    batch_size: int,
    attend: _Attend,
) -> Tensor:
    """Attend within each segment of a row (1, heads, batch * length, head_size) -> the same shape as `query`."""
    if cu_seq_lens is not None:
        lengths = _lengths_between(cu_seq_lens)
    else:
        lengths = _segment_lengths(position_ids, batch_size, query.shape[2] // batch_size)
    segments = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([attend(*segment, None, is_causal=True) for segment in segments], dim=2)


@functools.lru_cache(maxsize=2)  # read once for all layers of a batch: on a GPU it waits for everything before it
def _lengths_between(cu_seq_lens: Tensor) -> tuple[int, ...]:
    """Return what lies between boundaries; a tensor is its own key, and must not be written to."""
    return tuple(cu_seq_lens.diff().tolist())


def _segment_lengths(position_ids: Tensor | None, batch_size: int, length: int) -> list[int]:
    """Find segments where positions do not go on, row by row of a batch; None: each row is one."""
    if position_ids is None:
        return [length] * batch_size
    packed = find_packed_sequence_indices(position_ids.expand(batch_size, -1))
    if packed is None:
        return [length] * batch_size
    return [size for row in packed for size in row.unique_consecutive(return_counts=True)[1].tolist()]


def _takes_varlen(query: Tensor, dropout: float, softcap: float | None) -> bool:
    """Whether torch's variable-length kernel (on CUDA, in half precision, in recent releases) computes this."""
    if not query.is_cuda or dropout > 0 or softcap is not None or not {"scale", "window_size"} <= {*_VARLEN_OPTIONS}:
        return False
    head_size = query.shape[-1]
    return _dtype_of(query) in _VARLEN_DTYPES and head_size % 8 == 0 and head_size <= _MAX_VARLEN_HEAD_SIZE


def _dtype_of(states: Tensor) -> torch.dtype:
    """Return the dtype that autocast would have attention compute in."""
    device_type = states.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else states.dtype


def _varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    max_length: int,
    scaling: float,
    sliding_window: int | None,
) -> Tensor:
    """Attend within each segment of a batch of one row, in one call -> (1, heads, length, head_size)."""
    dtype = _dtype_of(query)  # rotary embeddings in float32 make float32 of queries and keys under autocast
    options = {"scale": scaling, "window_size": (-1 if sliding_window is None else sliding_window - 1, 0)}
    groups = query.shape[1] // key.shape[1]
    if "enable_gqa" in _VARLEN_OPTIONS:
        options["enable_gqa"] = groups > 1
    else:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    rows = [states[0].transpose(0, 1).to(dtype) for states in (query, key, value)]
    output = varlen.varlen_attn(*rows, cu_seq_lens, cu_seq_lens, max_length, max_length, **options)
    return output.transpose(0, 1)[None]
