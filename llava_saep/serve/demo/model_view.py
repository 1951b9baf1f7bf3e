"""What the model sees: the pixels that the checkpoint's processor makes of a picture, made visible again."""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from llava_saep.data.images import ImageSize
from llava_saep.model.processing_llava_saep import LlavaSaepProcessor


class SeenPicture(NamedTuple):
    """One input of the vision tower, and what it is."""

    image: Image.Image
    caption: str


def what_the_model_sees(processor: LlavaSaepProcessor, picture: Image.Image) -> list[SeenPicture]:
    """Preprocess a picture as the checkpoint does, and undo the normalisation.

    Returns:
        one input, cropped or padded; where the checkpoint cuts pictures, the view of the whole and then its tiles, row
        by row.
    Raises:
        UserError: the picture is too thin to be processed.
    """
    (pixels,) = processor.preprocess_images([picture])
    (num_tokens,) = processor.count_tokens([picture])
    crops = pixels if pixels.dim() == 4 else pixels[None]
    images = [denormalised(crop, processor.image_processor) for crop in crops]
    height, width = crops.shape[-2:]
    how = {"square": "cropped to the centre", "pad": "padded to a square"}.get(processor.image_aspect_ratio)
    if how is not None:
        return [SeenPicture(images[0], f"{width} x {height} pixels, {how}: {num_tokens} tokens")]
    tokens_of_view = processor.image_tokens.num_tokens_of_view(ImageSize(height, width))
    captions = [f"whole picture, {width} x {height}: {tokens_of_view} tokens (all together {num_tokens})"]
    captions += [f"tile {index} of {len(images) - 1}" for index in range(1, len(images))]
    return [SeenPicture(image, caption) for image, caption in zip(images, captions, strict=True)]


def denormalised(pixels: torch.Tensor, image_processor) -> Image.Image:
    """Turn pixel values (3, height, width) back into an 8-bit picture; exact up to rounding."""
    values = pixels.float()
    if image_processor.do_normalize:
        mean = torch.tensor(image_processor.image_mean)[:, None, None]
        std = torch.tensor(image_processor.image_std)[:, None, None]
        values = values * std + mean
    if image_processor.do_rescale:
        values = values / image_processor.rescale_factor
    array = values.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(array))
