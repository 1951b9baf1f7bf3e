"""Questions about a scene, with answers that state their evidence before the verdict; the final words are scored.

Answers are balanced while they are drawn: verdicts of each yes/no template alternate, so that a model which does not
see the image stays at one half on relation and existence.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from playground.spatial_scenes.objects import KINDS, Kind
from playground.spatial_scenes.scene import CELLS_PER_SIDE, NUM_CELLS, PlacedObject, Scene, cell_name

CATEGORIES = ("relation", "position", "count", "neighbour", "existence")
_EMPTY_POSITION_SHARE = 0.2


@dataclass(frozen=True)
class Question:
    """One question about an image.

    Attributes:
        category: one of CATEGORIES.
        template: the question's form without its objects, for the statistics of constant answers.
        text: what the user asks.
        reference: the full answer, evidence first.
        answer: the final words of `reference`, which are scored.
    """

    category: str
    template: str
    text: str
    reference: str
    answer: str


@dataclass(frozen=True)
class _Direction:
    relation: str  # "left of", as in "is the 7 left of the 3?"
    row_step: int
    column_step: int

    def holds(self, first: PlacedObject, second: PlacedObject) -> bool:
        rows = first.cell // CELLS_PER_SIDE - second.cell // CELLS_PER_SIDE
        columns = first.cell % CELLS_PER_SIDE - second.cell % CELLS_PER_SIDE
        return rows * self.row_step + columns * self.column_step > 0

    def neighbour_cell(self, cell: int) -> int | None:
        row, column = cell // CELLS_PER_SIDE + self.row_step, cell % CELLS_PER_SIDE + self.column_step
        inside = 0 <= row < CELLS_PER_SIDE and 0 <= column < CELLS_PER_SIDE
        return row * CELLS_PER_SIDE + column if inside else None


DIRECTIONS = (
    _Direction("left of", 0, -1),
    _Direction("right of", 0, 1),
    _Direction("above", -1, 0),
    _Direction("below", 1, 0),
)


class QuestionWriter:
    """Draws questions; keeps the state that balances verdicts over all scenes that it is asked about."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._next_verdict: dict[str, bool] = {}
        self._forms: dict[str, Callable[[Scene], Question | None]] = {
            "relation": self.relation,
            "what": self.what_is_at,
            "where": self.where_is,
            "count": self.count,
            "neighbour": self.neighbour,
            "neighbour_colour": self.neighbour_colour,
            "existence": self.existence,
        }

    @property
    def forms(self) -> tuple[str, ...]:
        """The kinds of question that `draw` knows; position and neighbour have two each."""
        return tuple(self._forms)

    def draw(self, scene: Scene, form: str) -> Question | None:
        """A question of that form, or None where the scene allows none (no neighbours, all in one row)."""
        return self._forms[form](scene)

    def conversation(self, scene: Scene, num_questions: int) -> list[Question]:
        """`num_questions` different questions of random forms about one scene."""
        questions: dict[str, Question] = {}
        while len(questions) < num_questions:
            question = self.draw(scene, self._rng.choice(self.forms))
            if question is not None and question.text not in questions:
                questions[question.text] = question
        return list(questions.values())

    def _verdict(self, template: str) -> bool:
        """Alternates per template, from a random start."""
        verdict = self._next_verdict.setdefault(template, self._rng.random() < 0.5)
        self._next_verdict[template] = not verdict
        return verdict

    def relation(self, scene: Scene) -> Question | None:
        """Ask whether one object is left of, right of, above or below another; None where no pair allows it."""
        direction = self._rng.choice(DIRECTIONS)
        pairs = [
            (first, second) for first in scene.objects for second in scene.objects if direction.holds(first, second)
        ]
        if not pairs:
            return None
        first, second = self._rng.choice(pairs)
        template = f"relation: {direction.relation}"
        verdict = self._verdict(template)
        if not verdict:
            first, second = second, first
        word = "yes" if verdict else "no"
        return Question(
            "relation",
            template,
            f"Is the {first.kind.name} {direction.relation} the {second.kind.name}?",
            f"{_located(first)}, {_located(second)}, so {word}",
            word,
        )

    def what_is_at(self, scene: Scene) -> Question:
        empty = [cell for cell in range(NUM_CELLS) if cell not in scene.by_cell]
        cells = empty if self._rng.random() < _EMPTY_POSITION_SHARE else list(scene.by_cell)
        cell = self._rng.choice(cells)
        name = scene.by_cell[cell].kind.name if cell in scene.by_cell else "nothing"
        return Question(
            "position", "position: what", f"What is at the {cell_name(cell)}?", f"{cell_name(cell)} is {name}", name
        )

    def where_is(self, scene: Scene) -> Question:
        placed = self._rng.choice(scene.objects)
        return Question(
            "position", "position: where", f"Where is the {placed.kind.name}?", _located(placed), cell_name(placed.cell)
        )

    def count(self, scene: Scene) -> Question:
        number = str(len(scene.objects))
        return Question("count", "count", "How many objects are there?", f"there are {number}", number)

    def neighbour(self, scene: Scene) -> Question | None:
        """Ask what stands beside an object; None where nothing does."""
        found = self._neighbours(scene)
        if not found:
            return None
        placed, direction, beside = self._rng.choice(found)
        return Question(
            "neighbour",
            "neighbour: what",
            f"What is directly {direction.relation} the {placed.kind.name}?",
            f"{_located(placed)}, {cell_name(beside.cell)} is {beside.kind.name}",
            beside.kind.name,
        )

    def neighbour_colour(self, scene: Scene) -> Question | None:
        """Ask for the colour of the shape beside an object; None where no shape is."""
        found = [entry for entry in self._neighbours(scene) if not entry[2].kind.is_digit]
        if not found:
            return None
        placed, direction, beside = self._rng.choice(found)
        colour = beside.kind.colour
        return Question(
            "neighbour",
            "neighbour: colour",
            f"What colour is the object directly {direction.relation} the {placed.kind.name}?",
            f"{_located(placed)}, {cell_name(beside.cell)} is {beside.kind.name}, so {colour}",
            colour,
        )

    def existence(self, scene: Scene) -> Question:
        present = {placed.kind: placed for placed in scene.objects}
        verdict = self._verdict("existence")
        kind = self._rng.choice(list(present) if verdict else [kind for kind in KINDS if kind not in present])
        evidence = _located(present[kind]) if verdict else f"{kind.name} is nowhere"
        word = "yes" if verdict else "no"
        return Question(
            "existence", "existence", f"Is there {_article(kind)} {kind.name}?", f"{evidence}, so {word}", word
        )

    @staticmethod
    def _neighbours(scene: Scene) -> list[tuple[PlacedObject, _Direction, PlacedObject]]:
        by_cell = scene.by_cell
        return [
            (placed, direction, by_cell[cell])
            for placed in scene.objects
            for direction in DIRECTIONS
            if (cell := direction.neighbour_cell(placed.cell)) in by_cell
        ]


def _located(placed: PlacedObject) -> str:
    return f"{placed.kind.name} is {cell_name(placed.cell)}"


def _article(kind: Kind) -> str:
    return "an" if kind.name == "8" else "a"
