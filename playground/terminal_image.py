"""Small images as text: half blocks in colour where the terminal shows them, shades of grey as letters elsewhere."""

import os
from typing import TextIO

from PIL import Image

SHADES = " .:-=+*#%@"
"""From black to white."""


def supports_color(stream: TextIO) -> bool:
    """Whether a stream is a terminal that may be written to in colour (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def image_to_text(image: Image.Image, num_columns: int, color: bool) -> str:
    """Draw an image, scaled to a width in characters, keeping its proportions.

    A character is about twice as high as wide: one line of half blocks holds two rows of pixels, one line of letters
    stands for two rows.
    """
    num_rows = max(2, round(image.height * num_columns / image.width / 2) * 2)
    if color:
        return _half_blocks(image.convert("RGB").resize((num_columns, num_rows), Image.Resampling.LANCZOS))
    return _letters(image.convert("L").resize((num_columns, num_rows // 2), Image.Resampling.LANCZOS))


def _half_blocks(image: Image.Image) -> str:
    lines = []
    for row in range(0, image.height, 2):
        cells = []
        for column in range(image.width):
            upper, lower = (";".join(map(str, image.getpixel((column, row + half)))) for half in (0, 1))
            cells.append(f"\x1b[38;2;{upper}m\x1b[48;2;{lower}m▀")
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)


def _letters(image: Image.Image) -> str:
    shades = [
        SHADES[image.getpixel((column, row)) * len(SHADES) // 256]
        for row in range(image.height)
        for column in range(image.width)
    ]
    return "\n".join("".join(shades[start : start + image.width]) for start in range(0, len(shades), image.width))
