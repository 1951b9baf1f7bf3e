"""Scenes: which objects stand where. Positions are named by thirds of the image, "top left" to "bottom right".

Both worlds keep at most one object per third, so a position names one object and two objects whose thirds differ in a
row or a column have an unambiguous relation. `cells` places objects in the middle of the thirds with jitter; `free`
places them anywhere without overlap, across the borders of thirds and patches.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from playground.spatial_scenes.objects import KINDS, OBJECT_SIZE_PX, Kind

World = Literal["cells", "free"]

IMAGE_SIZE_PX = 48
CELLS_PER_SIDE = 3
NUM_CELLS = CELLS_PER_SIDE**2
CELL_SIZE_PX = IMAGE_SIZE_PX // CELLS_PER_SIDE
MIN_OBJECTS, MAX_OBJECTS = 3, 6
JITTER_PX = 2
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")


def cell_name(cell: int) -> str:
    """Name of the third with row-major index 0..8, for example "top left"."""
    return f"{ROWS[cell // CELLS_PER_SIDE]} {COLUMNS[cell % CELLS_PER_SIDE]}"


@dataclass(frozen=True)
class PlacedObject:
    """An object in a scene.

    Attributes:
        kind: what it is.
        top, left: corner of its 14x14 box, in pixels.
        scan: index of the handwritten scan (digits only, otherwise None).
        size_px: extent of a shape inside its box.
        brightness: factor on its colour.
    """

    kind: Kind
    top: int
    left: int
    scan: int | None = None
    size_px: int = OBJECT_SIZE_PX
    brightness: float = 1.0

    @property
    def cell(self) -> int:
        """Row-major index of the third that holds the centre of its box."""
        half = OBJECT_SIZE_PX // 2
        return (self.top + half) // CELL_SIZE_PX * CELLS_PER_SIDE + (self.left + half) // CELL_SIZE_PX


@dataclass(frozen=True)
class Scene:
    """Objects in raster order of their cells; no two share a kind or a cell."""

    objects: tuple[PlacedObject, ...]

    @property
    def by_cell(self) -> dict[int, PlacedObject]:
        return {placed.cell: placed for placed in self.objects}


def sample_scene(
    rng: random.Random, world: World, pool: Mapping[int, Sequence[int]], num_objects: int | None = None
) -> Scene:
    """Draw a scene of `num_objects` (3 to 6 where None) distinct kinds; digits use scans of `pool`.

    Raises:
        ValueError: `world` is neither "cells" nor "free".
    """
    if world not in ("cells", "free"):
        raise ValueError(f"unknown world {world!r}; worlds are cells, free")
    count = rng.randint(MIN_OBJECTS, MAX_OBJECTS) if num_objects is None else num_objects
    corners = _corners_in_cells(rng, count) if world == "cells" else _corners_anywhere(rng, count)
    placed = [_place(rng, kind, corner, pool) for kind, corner in zip(rng.sample(KINDS, count), corners, strict=True)]
    return Scene(tuple(sorted(placed, key=lambda item: item.cell)))


def _place(rng: random.Random, kind: Kind, corner: tuple[int, int], pool: Mapping[int, Sequence[int]]) -> PlacedObject:
    scan = rng.choice(pool[int(kind.form)]) if kind.is_digit else None
    return PlacedObject(
        kind, *corner, scan=scan, size_px=rng.randint(11, OBJECT_SIZE_PX), brightness=rng.uniform(0.8, 1.0)
    )


def _corners_in_cells(rng: random.Random, count: int) -> list[tuple[int, int]]:
    margin = (CELL_SIZE_PX - OBJECT_SIZE_PX) // 2
    largest = IMAGE_SIZE_PX - OBJECT_SIZE_PX

    def jittered(index: int) -> int:
        return max(0, min(largest, index * CELL_SIZE_PX + margin + rng.randint(-JITTER_PX, JITTER_PX)))

    return [
        (jittered(cell // CELLS_PER_SIDE), jittered(cell % CELLS_PER_SIDE))
        for cell in rng.sample(range(NUM_CELLS), count)
    ]


def _corners_anywhere(rng: random.Random, count: int) -> list[tuple[int, int]]:
    """Boxes that do not overlap, at most one centre per third; starts over where no place is left."""
    largest = IMAGE_SIZE_PX - OBJECT_SIZE_PX
    half = OBJECT_SIZE_PX // 2
    while True:
        corners: list[tuple[int, int]] = []
        for _ in range(40 * count):
            top, left = rng.randint(0, largest), rng.randint(0, largest)
            third = ((top + half) // CELL_SIZE_PX, (left + half) // CELL_SIZE_PX)
            free = all(
                (abs(top - y) >= OBJECT_SIZE_PX or abs(left - x) >= OBJECT_SIZE_PX)
                and third != ((y + half) // CELL_SIZE_PX, (x + half) // CELL_SIZE_PX)
                for y, x in corners
            )
            if free:
                corners.append((top, left))
                if len(corners) == count:
                    return corners
