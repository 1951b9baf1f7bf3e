"""The language model's tokens of images seen lately, so that vision tower and projector see each image once."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from llava_saep.generation.predictor import Predictor


def content_key(image: Image.Image) -> str:
    """A name for what an image shows, equal for equal pixels."""
    pixels = image if image.mode == "RGB" else image.convert("RGBA")
    name = f"{image.mode} {image.width}x{image.height} "
    return hashlib.blake2b(name.encode() + pixels.tobytes(), digest_size=16).hexdigest()


class ImageFeatures:
    """Computes tokens of images and keeps those used last.

    Args:
        max_bytes: what is kept at most, beside the images of the question at hand.
    """

    def __init__(self, predictor: Predictor, *, max_bytes: int):
        self.predictor = predictor
        self.max_bytes = max_bytes
        self._kept: OrderedDict[str, Tensor] = OrderedDict()  # the one used last last

    def of(self, images: Sequence[Image.Image], keys: Sequence[str]) -> list[Tensor]:
        """Return one (tokens, text_hidden_size) tensor per image.

        Each is computed alone: the result must not depend on which others have been seen before.

        Args:
            keys: the images' `content_key`.
        """
        found = []
        for image, key in zip(images, keys, strict=True):
            if key not in self._kept:
                self._kept[key] = self._compute(image)
            self._kept.move_to_end(key)
            found.append(self._kept[key])
        while self._kept and sum(features.nbytes for features in self._kept.values()) > self.max_bytes:
            self._kept.popitem(last=False)
        return found

    def clear(self) -> bool:
        """Forget everything; returns whether there was anything."""
        had_any = bool(self._kept)
        self._kept.clear()
        return had_any

    def _compute(self, image: Image.Image) -> Tensor:
        model = self.predictor.model
        inputs = BatchFeature(self.predictor.processor.image_inputs([image])).to(model.device, model.dtype)
        (features,) = model.get_image_features(inputs["pixel_values"], inputs.get("image_sizes")).pooler_output
        return features
