"""What can stand in a scene: ten handwritten digits and sixteen coloured shapes.

Digits are the real scans that scikit-learn ships (UCI Optical Recognition of Handwritten Digits, 8x8 grey levels). A
fixed permutation splits the scans, so that no scan of a held-out image was ever seen in training.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image

Split = Literal["train", "held_out"]

OBJECT_SIZE_PX = 14
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {"red": (235, 55, 50), "green": (60, 200, 75), "blue": (70, 110, 250), "yellow": (240, 215, 60)}
NUM_TRAIN_SCANS = 1400
_SCAN_SPLIT_SEED = 20241014


@dataclass(frozen=True)
class Kind:
    """A kind of object; scenes hold each kind at most once, so that its name identifies one object.

    `colour` is None exactly for digits, which are drawn in white to light grey.
    """

    form: str
    colour: str | None = None

    @property
    def name(self) -> str:
        """How questions and answers call it: "7" or "red circle"."""
        return self.form if self.colour is None else f"{self.colour} {self.form}"

    @property
    def is_digit(self) -> bool:
        return self.colour is None


KINDS = tuple(
    [Kind(str(digit)) for digit in range(10)] + [Kind(shape, colour) for colour in COLOURS for shape in SHAPES]
)


@lru_cache(maxsize=1)
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """All scans as (1797, 14, 14) floats in 0..1, and their digits (1797,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    size = (OBJECT_SIZE_PX, OBJECT_SIZE_PX)
    levels = (digits.images / 16 * 255).astype(np.uint8)
    scaled = [Image.fromarray(scan).resize(size, Image.BILINEAR) for scan in levels]
    return np.stack([np.asarray(scan, dtype=np.float32) / 255 for scan in scaled]), digits.target


@lru_cache(maxsize=2)
def scan_pool(split: Split) -> dict[int, tuple[int, ...]]:
    """Digit -> indices of the scans that this split may draw; the two splits share none."""
    targets = _scans()[1]
    order = list(range(len(targets)))
    random.Random(_SCAN_SPLIT_SEED).shuffle(order)
    chosen = order[:NUM_TRAIN_SCANS] if split == "train" else order[NUM_TRAIN_SCANS:]
    return {digit: tuple(i for i in chosen if targets[i] == digit) for digit in range(10)}


def digit_mask(scan: int) -> np.ndarray:
    """(14, 14) ink coverage in 0..1 of one handwritten digit."""
    return _scans()[0][scan]


@lru_cache(maxsize=64)
def shape_mask(form: str, size_px: int) -> np.ndarray:
    """(14, 14) coverage in 0..1 of one shape of `size_px` pixels, centred, with antialiased edges.

    Raises:
        ValueError: `form` is not one of SHAPES.
    """
    fine = 4
    axis = (np.arange(OBJECT_SIZE_PX * fine) + 0.5) / fine - OBJECT_SIZE_PX / 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    half = size_px / 2
    if form == "circle":
        inside = x**2 + y**2 <= half**2
    elif form == "square":
        inside = np.maximum(np.abs(x), np.abs(y)) <= half * 0.9
    elif form == "triangle":
        inside = (y <= half) & (np.abs(x) <= (y + half) / 2)
    elif form == "cross":
        inside = (np.minimum(np.abs(x), np.abs(y)) <= half * 0.3) & (np.maximum(np.abs(x), np.abs(y)) <= half)
    else:
        raise ValueError(f"unknown shape {form!r}; shapes are {', '.join(SHAPES)}")
    blocks = inside.reshape(OBJECT_SIZE_PX, fine, OBJECT_SIZE_PX, fine)
    return blocks.mean(axis=(1, 3)).astype(np.float32)
