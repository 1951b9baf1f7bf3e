"""Shapes of the models that are measured; their weights are random, since speed does not depend on them."""

from dataclasses import dataclass, field, fields

from llava_saep.errors import UserError
from projectors import PatchGrid


def _size(meaning: str) -> int:
    """A required field of `ModelShape`, with what its flag's help says."""
    return field(metadata={"help": meaning})


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A CLIP tower and a Llama language model by their sizes.

    Raises:
        UserError: sizes that do not divide as they must.
    """

    image_size: int = _size("side of the images in pixels")
    patch_size: int = _size("side of the tower's patches in pixels")
    vision_hidden_size: int = _size("channels of the tower")
    vision_intermediate_size: int = _size("channels inside the tower's MLPs")
    num_vision_layers: int = _size("blocks of the tower")
    num_vision_heads: int = _size("attention heads of the tower")
    text_hidden_size: int = _size("channels of the language model")
    text_intermediate_size: int = _size("channels inside the language model's MLPs")
    num_text_layers: int = _size("blocks of the language model")
    num_text_heads: int = _size("attention heads of the language model")
    num_key_value_heads: int = _size("heads of its keys and values")
    vocab_size: int = _size("tokens that the language model knows")

    def __post_init__(self) -> None:
        for whole, part in (
            ("image_size", "patch_size"),
            ("vision_hidden_size", "num_vision_heads"),
            ("text_hidden_size", "num_text_heads"),
            ("num_text_heads", "num_key_value_heads"),
        ):
            if getattr(self, whole) % getattr(self, part):
                given = f"--{whole} {getattr(self, whole)} and --{part} {getattr(self, part)}"
                raise UserError(f"{given}: the first must be a multiple of the second")
        if self.vocab_size <= NUM_SPECIAL_TOKENS + 1:
            raise UserError(f"--vocab_size {self.vocab_size}: expected more than {NUM_SPECIAL_TOKENS + 1}")

    @property
    def grid(self) -> PatchGrid:
        """The patch map of an image."""
        return PatchGrid(self.image_size // self.patch_size, self.image_size // self.patch_size)

    @property
    def image_token_id(self) -> int:
        """The placeholder: the vocabulary's last id, since transformers' own model looks it up in the embedding."""
        return self.vocab_size - 1


NUM_SPECIAL_TOKENS = 3
"""<unk>, <s> and </s>, as Llama's vocabulary begins."""

PRESETS = {
    "tiny": ModelShape(
        image_size=56,
        patch_size=14,
        vision_hidden_size=32,
        vision_intermediate_size=64,
        num_vision_layers=3,
        num_vision_heads=2,
        text_hidden_size=48,
        text_intermediate_size=96,
        num_text_layers=2,
        num_text_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    ),
    "small": ModelShape(
        image_size=336,
        patch_size=14,
        vision_hidden_size=256,
        vision_intermediate_size=1024,
        num_vision_layers=6,
        num_vision_heads=4,
        text_hidden_size=512,
        text_intermediate_size=1376,
        num_text_layers=6,
        num_text_heads=8,
        num_key_value_heads=8,
        vocab_size=32_000,
    ),
    "7b": ModelShape(
        image_size=336,
        patch_size=14,
        vision_hidden_size=1024,
        vision_intermediate_size=4096,
        num_vision_layers=24,
        num_vision_heads=16,
        text_hidden_size=4096,
        text_intermediate_size=11_008,
        num_text_layers=32,
        num_text_heads=32,
        num_key_value_heads=32,
        vocab_size=32_000,
    ),
}
"""tiny: a step in milliseconds; small: seconds on a processor; 7b: CLIP ViT-L/14 at 336 px and Llama-7B."""


def shape_fields() -> dict[str, str]:
    """Each size with its meaning."""
    return {each.name: each.metadata["help"] for each in fields(ModelShape)}
