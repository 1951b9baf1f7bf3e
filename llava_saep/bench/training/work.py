"""Floating-point operations that a training step needs, and what share of a device's peak that is (MFU).

Counted are matrix products, two operations per multiply-add, of real tokens alone: no padding, nothing computed twice
(activation checkpointing), attention below the diagonal only, the head only where something is learned, the tower only
as deep as it is read, and backward only the gradients that training asks for. Each side is measured against the same
work, so what a side does beyond it lowers its utilisation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llava_saep.bench.flops import FlopCount
from llava_saep.bench.training.conversations import Conversation
from llava_saep.bench.training.shapes import ModelShape

Train = Literal["projector", "lora", "full"]
"""What learns: the projector; it and adapters on the language model; it and the whole language model."""

_TERA = 10**12

PEAK_FLOPS = {
    "B200": 2250 * _TERA,
    "H200 NVL": 835 * _TERA,
    "H200": 989 * _TERA,
    "H100 PCIe": 756 * _TERA,
    "H100 NVL": 835 * _TERA,
    "H100": 989 * _TERA,
    "H800": 989 * _TERA,
    "A100": 312 * _TERA,
    "A800": 312 * _TERA,
    "L40S": 362 * _TERA,
    "L40": 181 * _TERA,
    "L4": 121 * _TERA,
    "A10": 125 * _TERA,
    "A40": 150 * _TERA,
    "MI300X": 1307 * _TERA,
}
"""Word of a device's name -> dense bf16 operations per second by its maker's data sheet (without sparsity). The first
entry whose words all stand in the name counts."""


def peak_flops(device_name: str, dtype: str) -> int | None:
    """Operations per second that a device can do at most; None where that is not known (processors, fp32)."""
    if dtype not in ("bf16", "fp16"):
        return None
    words = set(device_name.replace("-", " ").split())
    return next((peak for name, peak in PEAK_FLOPS.items() if set(name.split()) <= words), None)


def utilisation(flops: int, seconds: float, peak: int | None) -> float | None:
    """Model FLOPs utilisation: needed operations per second, as a share of the peak."""
    return None if peak is None else flops / seconds / peak


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """Operations of one training step, by part; forward and backward together."""

    tower: int
    projector: int
    language_model: int
    head: int

    @property
    def total(self) -> int:
        """All parts."""
        return self.tower + self.projector + self.language_model + self.head


def step_work(
    shape: ModelShape,
    conversations: Sequence[Conversation],
    *,
    num_image_tokens: int,
    deepest_layer: int,
    projector: FlopCount,
    train: Train,
    lora_rank: int = 0,
) -> StepWork:
    """Count a step over these conversations, one image each, with a frozen tower.

    Args:
        num_image_tokens: of one image, behind the projector.
        deepest_layer: blocks of the tower that run: the highest index into its hidden states that is read.
        projector: its operations for all images.
        lora_rank: of the adapters, with `train` "lora".
    """
    lengths = [num_image_tokens + each.num_text_tokens for each in conversations]
    num_supervised = sum(each.num_supervised for each in conversations)
    head = 2 * shape.text_hidden_size * shape.vocab_size * num_supervised
    return StepWork(
        tower=len(conversations) * tower_forward_flops(shape, deepest_layer),
        projector=projector.total,
        language_model=sum(_language_model_flops(shape, length, train, lora_rank) for length in lengths),
        head=head * _passes(train),
    )


def tower_forward_flops(shape: ModelShape, num_layers: int) -> int:
    """Operations of the tower's first blocks on one image: patches and a class token, which all see each other."""
    width, num_patches = shape.vision_hidden_size, shape.grid.num_patches
    num_tokens = num_patches + 1
    embedding = 2 * num_patches * 3 * shape.patch_size**2 * width
    products = 2 * num_tokens * (4 * width**2 + 2 * width * shape.vision_intermediate_size)
    attention = 2 * 2 * num_tokens**2 * width
    return embedding + num_layers * (products + attention)


def language_model_parameters(shape: ModelShape) -> int:
    """Weights of one block's matrices."""
    return sum(height * width for height, width in _block_matrices(shape))


def _block_matrices(shape: ModelShape) -> list[tuple[int, int]]:
    """(in, out) of a block's linear layers: query, key, value, output, gate, up, down."""
    width, inner = shape.text_hidden_size, shape.text_intermediate_size
    key_value = width // shape.num_text_heads * shape.num_key_value_heads
    return [(width, width), *2 * [(width, key_value)], (width, width), *2 * [(width, inner)], (inner, width)]


def _language_model_flops(shape: ModelShape, length: int, train: Train, lora_rank: int) -> int:
    """Forward and backward of all blocks on one sequence."""
    products = 2 * length * language_model_parameters(shape)
    # Position i sees i positions: length * (length + 1) / 2 pairs, in two products.
    attention = 2 * 2 * shape.text_hidden_size * length * (length + 1) // 2
    adapters = 0
    if train == "lora":
        adapters = 2 * length * lora_rank * sum(height + width for height, width in _block_matrices(shape))
    # Attention has no weights: its backward is the gradients of both factors of each product.
    return shape.num_text_layers * (_passes(train) * products + 3 * attention + 3 * adapters)


def _passes(train: Train) -> int:
    """Forward, gradient of the input and, where the weights learn, theirs: each costs the same."""
    return 3 if train == "full" else 2
