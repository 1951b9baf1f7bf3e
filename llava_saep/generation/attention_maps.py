"""Where an answer looked: for each of its tokens, how much attention went to each token of each image.

An answer that is there already is run through the model once more, as a whole (teacher forcing). An attention of our
own computes what the model's does and, for the positions that wrote the answer, the weights of the images' tokens, one
group of heads after the other: no (length x length) matrix is made, and what is kept is (layers, answer, image tokens)
in half precision, in the memory of the CPU.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from llava_saep.data.images import ImageSize
from llava_saep.errors import UserError
from llava_saep.generation.messages import Message
from llava_saep.generation.predictor import Predictor, Prompt
from llava_saep.model.segment_attention import segment_attention, segment_mask, why_no_segments
from llava_saep.model.token_layout import TokenLayout, layout_tokens

RECORDED = "recorded"
"""Name of this attention among transformers' implementations."""

MAX_ANSWER_TOKENS = 512
"""Longer answers are looked into as far as this."""


@dataclass(frozen=True)
class AnswerPiece:
    """A stretch of the answer's text and its tokens, [start, end): one, or several where they make one character."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class ImageAttention:
    """Attention to one image.

    Attributes:
        image: as the model's processor took it, before any resizing.
        layout: where its tokens lie on it.
        weights: (layers, answer tokens, image tokens), mean over heads. The weights of one answer token in one layer,
            over the whole prompt and the answer so far, sum to 1; these are the image's share of it.
    """

    image: Image.Image
    layout: TokenLayout
    weights: np.ndarray

    def mean(self, layers: range) -> np.ndarray:
        """Average over layers -> (answer tokens, image tokens)."""
        return self.weights[layers.start : layers.stop : layers.step].mean(axis=0, dtype=np.float32)

    def of_piece(self, piece: AnswerPiece, layers: range) -> np.ndarray:
        """Average over layers and the tokens of one piece -> (image tokens,)."""
        own = self.weights[layers.start : layers.stop : layers.step, piece.start : piece.end]
        return own.mean(axis=(0, 1), dtype=np.float32)


@dataclass(frozen=True)
class AttentionMaps:
    """Where an answer looked.

    Attributes:
        pieces: the answer's text in order; joined, they are the answer, as far as it was looked into.
        images: of the whole conversation, in order.
        num_layers: of the language model.
    """

    pieces: tuple[AnswerPiece, ...]
    images: tuple[ImageAttention, ...]
    num_layers: int


def attention_maps(predictor: Predictor, messages: Sequence[Message], answer: str) -> AttentionMaps:
    """Find where each token of an answer looked when it was chosen.

    What counts is the position before a token, which the model chose it from. Nothing else may use the model meanwhile:
    its attention is exchanged and put back.

    Args:
        messages: the conversation up to the user's message that was answered.
    Raises:
        UserError: as `Predictor.generate`; there is no image or no answer; or the language model's attention cannot be
            looked at.
    """
    language_model = predictor.model.model.language_model
    reason = why_no_segments(language_model)
    if reason is not None:
        raise UserError(f"the attention of the language model {language_model.config.model_type} is hidden: {reason}")
    prompt, answer_ids = predictor.encode_answered(messages, answer)
    if not prompt.images:
        raise UserError("the conversation has no image, so there is nothing on it to look at")
    pieces = answer_pieces(predictor.processor.tokenizer, answer_ids[:MAX_ANSWER_TOKENS], answer)
    if not pieces:
        raise UserError("the answer is empty: there is no token to look into")
    weights = _recorded_weights(predictor, prompt, answer_ids[: pieces[-1].end])
    layouts = [_layout(predictor, image) for image in prompt.images]
    images = tuple(ImageAttention(*parts) for parts in zip(prompt.images, layouts, weights, strict=True))
    return AttentionMaps(pieces, images, len(weights[0]))


def _recorded_weights(predictor: Predictor, prompt: Prompt, answer_ids: Sequence[int]) -> list[np.ndarray]:
    """Run the model over prompt and answer -> (layers, answer tokens, image tokens) per image."""
    recorder = AttentionRecorder(len(answer_ids), prompt.image_spans)
    # The last token is chosen at the position before it, and nothing is read at its own.
    whole = dataclasses.replace(prompt, input_ids=[*prompt.input_ids, *answer_ids[:-1]])
    inputs = predictor.model_inputs([whole])
    del inputs["attention_mask"]  # one row, without padding
    with torch.inference_mode(), attention_recorded(predictor.model.model.language_model):
        predictor.model.model(**inputs, use_cache=False, attention_recorder=recorder)
    return recorder.weights()


def _layout(predictor: Predictor, image: Image.Image) -> TokenLayout:
    processor = predictor.processor
    size = ImageSize(image.height, image.width)
    return layout_tokens(processor.image_tokens, processor.image_processor, processor.image_aspect_ratio, size)


def answer_pieces(tokenizer: Any, token_ids: Sequence[int], answer: str) -> tuple[AnswerPiece, ...]:
    """Split an answer at its tokens, keeping those together that only together are text.

    Args:
        token_ids: the answer's tokens; those before and behind its text, such as an empty thinking block and the token
            that ends it, are left out.
    """
    pieces: list[AnswerPiece] = []
    first = start = _first_token_of(answer, tokenizer, token_ids)
    text = ""
    for end in range(first + 1, len(token_ids) + 1):
        decoded = tokenizer.decode(token_ids[first:end], skip_special_tokens=True).lstrip()
        if not answer.startswith(decoded[: len(answer)]) or len(decoded) == len(text):
            continue  # bytes of a character that is not complete, or a token without text
        pieces.append(AnswerPiece(decoded[len(text) : len(answer)], start, end))
        text, start = decoded, end
        if len(text) >= len(answer):
            break
    return tuple(pieces)


def _first_token_of(answer: str, tokenizer: Any, token_ids: Sequence[int]) -> int:
    """Find where an answer's text begins among its tokens, which may end before it does."""
    for first in range(len(token_ids)):
        decoded = (
            tokenizer.decode(token_ids[first:], skip_special_tokens=True).lstrip().rstrip("\N{REPLACEMENT CHARACTER}")
        )
        length = min(len(decoded), len(answer))
        if length and decoded[:length] == answer[:length]:
            return first
    return 0


class AttentionRecorder:
    """Collects, layer by layer, what the last positions of a row attend to.

    Args:
        num_rows: how many positions, counted from the end.
        spans: [start, end) of the keys of each image.
    """

    def __init__(self, num_rows: int, spans: Sequence[tuple[int, int]]):
        self.num_rows = num_rows
        self.spans = list(spans)
        self._layers: list[list[Tensor]] = []

    def add(self, attention: Tensor) -> None:
        """Keep one layer's weights.

        Args:
            attention: (rows, keys), mean over heads.
        """
        self._layers.append([attention[:, start:end].to("cpu", torch.float16) for start, end in self.spans])

    def weights(self) -> list[np.ndarray]:
        """Return (layers, rows, image tokens) per image.

        Raises:
            UserError: no layer has been heard of.
        """
        if not self._layers:
            raise UserError("the language model does not hand on to its attention layers what it is told")
        return [torch.stack(layers).numpy() for layers in zip(*self._layers, strict=True)]


@contextmanager
def attention_recorded(language_model: PreTrainedModel) -> Iterator[None]:
    """Let a language model's attention be recorded for a while."""
    AttentionInterface.register(RECORDED, recorded_attention)
    AttentionMaskInterface.register(RECORDED, segment_mask)
    own = language_model.config._attn_implementation
    language_model.set_attn_implementation(RECORDED)
    try:
        yield
    finally:
        language_model.set_attn_implementation(own)


def recorded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attention_recorder: AttentionRecorder,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as `segment_attention` does to one conversation, and record; called by transformers' attention layers."""
    rows = _mean_attention(query, key, attention_mask, attention_recorder.num_rows, scaling, softcap, sliding_window)
    attention_recorder.add(rows)
    options = {"scaling": scaling, "softcap": softcap, "sliding_window": sliding_window, **kwargs}
    return segment_attention(module, query, key, value, attention_mask, **options)


def _mean_attention(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    num_rows: int,
    scaling: float,
    softcap: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Compute the weights of the last rows, one head of keys after the other -> (rows, keys), mean over heads.

    Args:
        query: (1, heads, length, head_size); key may have fewer heads.
        mask: (1, 1, length, length), True where attended; None: causal, as far as the window reaches.
    """
    if mask is None:
        allowed = _seen_keys(query.shape[2], num_rows, sliding_window, query.device)
    else:
        allowed = mask[0, 0, -num_rows:]
    groups = query.shape[1] // key.shape[1]
    total = torch.zeros(num_rows, key.shape[2], dtype=torch.float32, device=query.device)
    for head, keys in enumerate(key[0]):
        queries = query[0, head * groups : (head + 1) * groups, -num_rows:]
        scores = (queries @ keys.mT).float() * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        total += scores.masked_fill_(~allowed, float("-inf")).softmax(dim=-1).sum(dim=0)
    return total / query.shape[1]


def _seen_keys(length: int, num_rows: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """Which of all keys the last rows see -> (rows, length)."""
    positions = torch.arange(length, device=device)
    distance = positions[-num_rows:, None] - positions
    return (distance >= 0) & (distance < (length if sliding_window is None else sliding_window))
