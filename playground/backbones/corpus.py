"""Text that the stand-in language model is pretrained on: scenes in words, and conversations about them.

No image is involved. A scene is described as a list of phrases, as a raster of words, or condensed: one position per
cell (3x3) or per patch (6x6), whose input embedding is the weighted sum of the embeddings of the words that belong
there. Condensed descriptions stand where LLaVA puts visual tokens, so the model learns to look words up in dense
positions before it ever meets a projector.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_saep.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava_saep.data.conversation import Segment, Turn
from llava_saep.data.templates import conversation_template
from llava_saep.data.tokenization import Tokenizer, encode_segments
from playground.spatial_scenes import (
    IMAGE_SIZE_PX,
    KINDS,
    NUM_CELLS,
    QuestionWriter,
    Scene,
    caption,
    cell_name,
    listing,
    raster_reading,
    sample_scene,
    scan_pool,
)
from playground.spatial_scenes.descriptions import EMPTY_CELL
from playground.spatial_scenes.objects import OBJECT_SIZE_PX, Split
from playground.spatial_scenes.questions import Question
from playground.spatial_scenes.scene import CELLS_PER_SIDE
from playground.spatial_scenes.writing import CAPTION_PROMPT, READING_PROMPT

PATCHES_PER_SIDE = 6
_PATCH_SIZE_PX = IMAGE_SIZE_PX // PATCHES_PER_SIDE
_LEAST_COVERAGE = 0.15
_CONDENSED = ("cells", "patches")
_PLAIN_SHARE = 0.15
_MAX_WORDS = 5
_BATCHES_PER_POOL = 8
_STATEMENTS = 12
_DRILL_QUESTIONS = 8
_DRILL_FORMS = ("relation",)

WeightedWords = list[tuple[str, float]]


@dataclass(frozen=True)
class DescriptionMix:
    """How scenes are described.

    Attributes:
        weights: kind of description -> how often it is drawn.
        position_share: part of the condensed descriptions that name positions; the others leave only their order.
        spread: word weights of condensed descriptions vary by this factor around their value.
    """

    weights: Mapping[str, float]
    position_share: float
    spread: float


CLEAR_DESCRIPTIONS = DescriptionMix({"cells": 1.0}, position_share=1.0, spread=0.1)
ALL_DESCRIPTIONS = DescriptionMix(
    {"cells": 0.4, "patches": 0.3, "listing": 0.14, "raster": 0.08, "caption": 0.08}, position_share=0.8, spread=0.3
)


@dataclass(frozen=True)
class Document:
    """A tokenised text; `condensed` holds the words of each position in `condensed_span`, in order."""

    input_ids: list[int]
    labels: list[int]
    condensed: tuple[WeightedWords, ...] = ()
    condensed_start: int = 0


@dataclass(frozen=True)
class DocumentBatch:
    """Padded documents.

    Attributes:
        input_ids: (batch, length).
        labels: (batch, length), IGNORE_INDEX where nothing is learned.
        rows, columns: (positions,) where condensed positions stand.
        words, weights: (positions, 5) what their input embeddings are sums of; weight 0 pads.
    """

    input_ids: Tensor
    labels: Tensor
    rows: Tensor
    columns: Tensor
    words: Tensor
    weights: Tensor


class DocumentWriter:
    """Draws documents about random scenes of both worlds; the same seed gives the same documents."""

    def __init__(
        self, tokenizer: Tokenizer, seed: str, split: Split = "train", mix: DescriptionMix = ALL_DESCRIPTIONS
    ) -> None:
        self._rng = random.Random(seed)
        self._questions = QuestionWriter(self._rng)
        self._tokenizer = tokenizer
        self._pool = scan_pool(split)
        self._mix = mix
        self._word_ids: dict[str, list[int]] = {}

    def batches(self, size: int, restatement_share: float) -> Iterator[DocumentBatch]:
        """Batches of `size` documents of similar lengths, without end: padding would be half of a random batch."""
        while True:
            pool = sorted(
                (
                    self.restatement() if self._rng.random() < restatement_share else self.document()
                    for _ in range(size * _BATCHES_PER_POOL)
                ),
                key=lambda document: len(document.input_ids),
            )
            starts = range(0, len(pool), size)
            for start in self._rng.sample(starts, len(starts)):
                yield self._collate(pool[start : start + size])

    def drills(self, size: int) -> DocumentBatch:
        """`size` drills, a batch of their own: among other documents theirs would be a few tokens in a hundred."""
        return self._collate([self.drill() for _ in range(size)])

    def drill(self) -> Document:
        """Relation questions without a scene; the evidence is given, and only the verdict after it is learned.

        Whether "top left" is above "middle right" is knowledge of words alone.
        """
        segments = [Segment(f"{conversation_template('v1').system} ", False)]
        for _ in range(_DRILL_QUESTIONS):
            question = self._drill_question()
            segments.append(Segment(f"USER: {question.text} ASSISTANT:", False))
            segments += _conclusions(question)
            segments.append(Segment("</s>", False))
        return self._tokenized(segments, ())

    def _drill_question(self) -> Question:
        while True:
            scene = sample_scene(self._rng, "cells", self._pool)
            question = self._questions.draw(scene, self._rng.choice(_DRILL_FORMS))
            if question is not None:
                return question

    def batch(self, size: int, description: str | None = None) -> DocumentBatch:
        """`size` documents; `description` fixes how scenes are described (default: a random way each)."""
        return self._collate([self.document(description) for _ in range(size)])

    def document(self, description: str | None = None) -> Document:
        """A conversation about a random scene, or (plain, condensed only) a description followed by its caption."""
        scene, _, condensed, context = self._described_scene(description)
        if condensed and self._rng.random() < _PLAIN_SHARE:
            turns = [Turn("user", context), Turn("assistant", self._description_turn(scene)[1])]
            return self._tokenized(conversation_template("plain").render(turns), condensed)
        return self._tokenized(conversation_template("v1").render(self._conversation(scene, context)), condensed)

    def restatement(self) -> Document:
        """A description, then what it says in another order, both ways round; the loss is on what follows from it.

        Every statement is a look-up in the description, the skill that questions need; chats alone teach it slowly.
        """
        scene, _, condensed, context = self._described_scene(None)
        segments = [Segment(f"{context}\n", False)]
        for subject, fact in self._statements(scene, _STATEMENTS):
            segments += [Segment(f" {subject} is", False), Segment(f" {fact},", True)]
        return self._tokenized(segments, condensed)

    def _statements(self, scene: Scene, count: int) -> list[tuple[str, str]]:
        """Random facts: ("7", "top left"), ("top left", "7"), ("3", "nowhere"), ("top left", "nothing")."""
        rng, by_cell = self._rng, scene.by_cell
        cells = {placed.kind.name: cell_name(placed.cell) for placed in scene.objects}
        statements = []
        for _ in range(count):
            if rng.random() < 0.6:
                name = rng.choice(list(cells)) if rng.random() < 0.8 else rng.choice(KINDS).name
                statements.append((name, cells.get(name, "nowhere")))
            else:
                cell = rng.choice(list(by_cell)) if rng.random() < 0.8 else rng.randrange(NUM_CELLS)
                statements.append((cell_name(cell), by_cell[cell].kind.name if cell in by_cell else "nothing"))
        return statements

    def _described_scene(self, description: str | None) -> tuple[Scene, str, tuple[WeightedWords, ...], str]:
        """A random scene, how it is described, the condensed words (or none), and the context's text."""
        rng = self._rng
        scene = sample_scene(rng, rng.choice(("cells", "free")), self._pool)
        if description is None:
            description = rng.choices(list(self._mix.weights), list(self._mix.weights.values()))[0]
        condensed = self._condense(scene, description) if description in _CONDENSED else ()
        context = DEFAULT_IMAGE_TOKEN if condensed else _described(scene, description, rng)
        return scene, description, condensed, context

    def _tokenized(self, segments: list[Segment], condensed: tuple[WeightedWords, ...]) -> Document:
        encoded = encode_segments(
            segments, self._tokenizer, [len(condensed)] if condensed else [], self._tokenizer.pad_token_id
        )
        start = encoded.image_spans[0][0] if condensed else 0
        return Document(encoded.input_ids, encoded.labels, condensed, start)

    def _conversation(self, scene: Scene, context: str) -> list[Turn]:
        rng = self._rng
        pairs = [self._description_turn(scene)] if rng.random() < 0.3 else []
        pairs += [
            (question.text, question.reference) for question in self._questions.conversation(scene, rng.randint(3, 6))
        ]
        turns = []
        for prompt, answer in pairs:
            turns += [Turn("user", prompt), Turn("assistant", answer)]
        return [Turn("user", f"{context}\n{turns[0].text}"), *turns[1:]]

    def _description_turn(self, scene: Scene) -> tuple[str, str]:
        if self._rng.random() < 0.5:
            return READING_PROMPT, raster_reading(scene)
        return CAPTION_PROMPT, caption(scene)

    def _condense(self, scene: Scene, description: str) -> tuple[WeightedWords, ...]:
        """Words of each cell or patch; sometimes without position words, which leaves only their order."""
        rng = self._rng
        low, high = 1 - self._mix.spread, 1 + self._mix.spread
        position_weight = rng.uniform(1 - 2 * self._mix.spread, 1.0) if rng.random() < self._mix.position_share else 0.0
        spots = _cells(scene) if description == "cells" else _patches(scene)
        condensed = []
        for name, strength, cell in spots:
            words = [(word, strength * rng.uniform(low, high)) for word in name.split()]
            if position_weight:
                words += [(word, position_weight * rng.uniform(low, high)) for word in cell_name(cell).split()]
            condensed.append(words)
        return tuple(condensed)

    def _collate(self, documents: Sequence[Document]) -> DocumentBatch:
        length = max(len(document.input_ids) for document in documents)
        input_ids = torch.full((len(documents), length), self._tokenizer.pad_token_id)
        labels = torch.full((len(documents), length), IGNORE_INDEX)
        rows, columns, words, weights = [], [], [], []
        for row, document in enumerate(documents):
            input_ids[row, : len(document.input_ids)] = torch.tensor(document.input_ids)
            labels[row, : len(document.labels)] = torch.tensor(document.labels)
            for offset, spot in enumerate(document.condensed):
                rows.append(row)
                columns.append(document.condensed_start + offset)
                padding = [0] * (_MAX_WORDS - len(spot))
                words.append([self._word_id(word) for word, _ in spot] + padding)
                weights.append([weight for _, weight in spot] + [0.0] * len(padding))
        return DocumentBatch(
            input_ids,
            labels,
            torch.tensor(rows, dtype=torch.long),
            torch.tensor(columns, dtype=torch.long),
            torch.tensor(words).reshape(-1, _MAX_WORDS),
            torch.tensor(weights).reshape(-1, _MAX_WORDS),
        )

    def _word_id(self, word: str) -> int:
        if word not in self._word_ids:
            self._word_ids[word] = self._tokenizer(word, add_special_tokens=False).input_ids
        ids = self._word_ids[word]
        assert len(ids) == 1, f"{word!r} is {len(ids)} pieces"
        return ids[0]


def _described(scene: Scene, description: str, rng: random.Random) -> str:
    if description == "listing":
        return listing(scene, rng)
    return raster_reading(scene) if description == "raster" else caption(scene)


def _cells(scene: Scene) -> list[tuple[str, float, int]]:
    """(object's name or ".", strength, cell) of each of the nine cells."""
    by_cell = scene.by_cell
    return [(by_cell[cell].kind.name if cell in by_cell else EMPTY_CELL, 1.0, cell) for cell in range(NUM_CELLS)]


def _patches(scene: Scene) -> list[tuple[str, float, int]]:
    """The same for 36 patches: the object that covers most of a patch, as strong as its coverage, and its cell."""
    patches = []
    for index in range(PATCHES_PER_SIDE**2):
        row, column = divmod(index, PATCHES_PER_SIDE)
        coverage, placed = max(
            ((_overlap(placed.top, row) * _overlap(placed.left, column), placed) for placed in scene.objects),
            key=lambda entry: entry[0],
        )
        if coverage < _LEAST_COVERAGE:
            per_cell = PATCHES_PER_SIDE // CELLS_PER_SIDE
            patches.append((EMPTY_CELL, 1.0, row // per_cell * CELLS_PER_SIDE + column // per_cell))
        else:
            patches.append((placed.kind.name, min(1.0, 0.3 + coverage), placed.cell))
    return patches


def _overlap(start_px: int, patch: int) -> float:
    """Share of a patch's extent along one axis that a box from `start_px` covers."""
    first, last = patch * _PATCH_SIZE_PX, (patch + 1) * _PATCH_SIZE_PX
    return max(0, min(last, start_px + OBJECT_SIZE_PX) - max(first, start_px)) / _PATCH_SIZE_PX


def induction_batch(rng: random.Random, tokenizer: Tokenizer, size: int, length: int = 64) -> DocumentBatch:
    """Random lists of different words, then random spans of them repeated; the loss is on the repeats.

    Looking a word up in its context grows from this within a few hundred steps, and hardly from scenes alone. The
    words are the corpus's own: with the whole vocabulary it takes much longer.
    """
    words = _corpus_word_ids(tokenizer)
    input_ids, labels = [], []
    for _ in range(size):
        unique = rng.sample(words, rng.randint(5, 20))
        ids, targets = list(unique), [IGNORE_INDEX] * len(unique)
        while len(ids) < length:
            start = rng.randint(0, len(unique) - 2)
            span = unique[start : start + rng.randint(2, len(unique) - start)]
            ids += span
            targets += [IGNORE_INDEX, *span[1:]]
        input_ids.append([tokenizer.bos_token_id, *ids[:length]])
        labels.append([IGNORE_INDEX, *targets[:length]])
    nowhere = torch.zeros(0, dtype=torch.long)
    return DocumentBatch(
        torch.tensor(input_ids),
        torch.tensor(labels),
        nowhere,
        nowhere,
        torch.zeros(0, _MAX_WORDS, dtype=torch.long),
        torch.zeros(0, _MAX_WORDS),
    )


def _corpus_word_ids(tokenizer: Tokenizer) -> list[int]:
    words = " ".join(
        [kind.name for kind in KINDS]
        + [cell_name(cell) for cell in range(NUM_CELLS)]
        + ["yes no so is the nothing nowhere . , ? of above below directly there object objects"]
    )
    return sorted(set(tokenizer(words, add_special_tokens=False).input_ids))


def _conclusions(question: Question) -> list[Segment]:
    """The full answer, with the verdict as its only target."""
    evidence, _, verdict = question.reference.partition(", so ")
    return [Segment(f" {evidence}, so", False), Segment(f" {verdict}", True)]
