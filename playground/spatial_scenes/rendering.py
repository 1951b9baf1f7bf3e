"""From a scene to pixels: objects in light colours on a dark, slightly noisy background."""

from __future__ import annotations

import numpy as np

from playground.spatial_scenes.objects import COLOURS, OBJECT_SIZE_PX, digit_mask, shape_mask
from playground.spatial_scenes.scene import IMAGE_SIZE_PX, Scene

_DIGIT_COLOUR = (255, 255, 255)
_BACKGROUND_LEVEL = 12
_NOISE_LEVEL = 6


def render(scene: Scene, noise_seed: int) -> np.ndarray:
    """(48, 48, 3) uint8 RGB image of `scene`; `noise_seed` fixes the background noise."""
    noise = np.random.default_rng(noise_seed).normal(_BACKGROUND_LEVEL, _NOISE_LEVEL, (IMAGE_SIZE_PX, IMAGE_SIZE_PX, 1))
    image = np.repeat(noise.astype(np.float32), 3, axis=2)
    for placed in scene.objects:
        mask = digit_mask(placed.scan) if placed.kind.is_digit else shape_mask(placed.kind.form, placed.size_px)
        colour = np.array(_DIGIT_COLOUR if placed.kind.is_digit else COLOURS[placed.kind.colour], dtype=np.float32)
        box = image[placed.top : placed.top + OBJECT_SIZE_PX, placed.left : placed.left + OBJECT_SIZE_PX]
        # Boxes of neighbouring cells may touch by jitter: the lighter pixel wins, nothing is hidden.
        np.maximum(box, mask[..., None] * colour * placed.brightness, out=box)
    return np.clip(image, 0, 255).astype(np.uint8)
