"""A scene in words: the captions of stage 1, and the descriptions that the language model's pretraining reads."""

from __future__ import annotations

import random

from playground.spatial_scenes.scene import NUM_CELLS, PlacedObject, Scene, cell_name

EMPTY_CELL = "."


def raster_reading(scene: Scene) -> str:
    """The nine cells in raster order, a full stop for an empty one: "7 . red circle . . 3 . . ."."""
    by_cell = scene.by_cell
    return " ".join(by_cell[cell].kind.name if cell in by_cell else EMPTY_CELL for cell in range(NUM_CELLS))


def caption(scene: Scene) -> str:
    """The objects in raster order with their positions: "7 is top left, red circle is middle right"."""
    return ", ".join(_phrase(placed) for placed in scene.objects)


def listing(scene: Scene, rng: random.Random) -> str:
    """The objects in random order with their positions, the text-only counterpart of the image."""
    return ", ".join(_phrase(placed) for placed in rng.sample(scene.objects, len(scene.objects)))


def _phrase(placed: PlacedObject) -> str:
    return f"{placed.kind.name} is {cell_name(placed.cell)}"
