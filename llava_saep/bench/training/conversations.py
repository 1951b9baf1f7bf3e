"""The ragged batch that every side trains on: one image and a text of random length per conversation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from llava_saep.bench.training.shapes import NUM_SPECIAL_TOKENS, ModelShape
from llava_saep.constants import IGNORE_INDEX
from llava_saep.data.collator import SAMPLE_INDEX
from llava_saep.data.ledger import SampleLedger

_BOS_TOKEN_ID = 1


@dataclass(frozen=True)
class Conversation:
    """Tokens of one conversation besides its image; the last `num_supervised` of them are learned."""

    num_text_tokens: int
    num_supervised: int


@dataclass(frozen=True)
class TextLengths:
    """Lengths of texts in tokens, from `shortest` to `longest` with equal chances; `supervised_share` is answers."""

    shortest: int
    longest: int
    supervised_share: float


def draw_conversations(count: int, lengths: TextLengths, seed: int) -> tuple[Conversation, ...]:
    """Draw lengths; the same ones for the same seed, and a longer draw begins with a shorter one."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(count):
        length = int(torch.randint(lengths.shortest, lengths.longest + 1, (), generator=generator))
        # A question of at least the start token, an answer of at least one.
        num_supervised = min(max(round(length * lengths.supervised_share), 1), length - 1)
        drawn.append(Conversation(length, num_supervised))
    return tuple(drawn)


class ConversationSamples(Dataset[dict[str, Tensor]]):
    """Conversations as samples, in memory; one pass over them is one optimizer step.

    It answers what `LlavaTrainer` and packed rows ask of a `ConversationDataset`.
    """

    def __init__(
        self, conversations: Sequence[Conversation], shape: ModelShape, num_image_tokens: int, seed: int
    ) -> None:
        self.image_size = (shape.image_size, shape.image_size)
        self.ledger = SampleLedger(len(conversations))
        self.skipped: dict[str, int] = {}
        self.lengths = [each.num_text_tokens + num_image_tokens for each in conversations]
        self.max_length = max(self.lengths)
        generator = torch.Generator().manual_seed(seed)
        self._samples = [_draw_sample(each, shape, num_image_tokens, generator) for each in conversations]

    @property
    def modality_lengths(self) -> list[int]:
        """Positive, since every conversation has an image."""
        return self.lengths

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """input_ids (T,), labels (T,), pixel_values (1, 3, H, W) and sample_index ()."""
        return {**self._samples[index], SAMPLE_INDEX: torch.tensor(index)}

    def load_or_skip(self, index: int) -> dict[str, Tensor]:
        """The sample, as a packed row asks for it; every one can be used."""
        return self[index]

    def describe_sample(self, index: int) -> str:
        """Name a sample, for messages about it."""
        return f"conversation {index} of the benchmark"


def _draw_sample(
    conversation: Conversation, shape: ModelShape, num_image_tokens: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """The start token, the image, then text; pixels and text do not depend on how many tokens an image takes."""
    num_words = conversation.num_text_tokens - 1
    words = torch.randint(NUM_SPECIAL_TOKENS, shape.image_token_id, (num_words,), generator=generator)
    image = torch.full((num_image_tokens,), shape.image_token_id)
    input_ids = torch.cat([torch.tensor([_BOS_TOKEN_ID]), image, words])
    labels = input_ids.clone()
    labels[: -conversation.num_supervised] = IGNORE_INDEX
    pixels = torch.randn(1, 3, shape.image_size, shape.image_size, generator=generator)
    return {"input_ids": input_ids, "labels": labels, "pixel_values": pixels}


def pad_to_longest(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The usual collation for the stock Trainer: right padding to the batch's longest sample, with a mask."""
    pad = torch.nn.utils.rnn.pad_sequence
    input_ids = [sample["input_ids"] for sample in samples]
    return {
        "input_ids": pad(input_ids, batch_first=True, padding_value=0),
        "labels": pad([sample["labels"] for sample in samples], batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": pad([torch.ones_like(ids) for ids in input_ids], batch_first=True, padding_value=0),
        "pixel_values": torch.cat([sample["pixel_values"] for sample in samples]),
    }


def padding_share(num_positions: int, num_tokens: int) -> float:
    """How much of what the language model was given is padding, from 0 to 1."""
    return (num_positions - num_tokens) / num_positions
