"""Questions that divide the projectors of a comparison, chosen by a rule."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llava_saep.evaluation.comparison.results import Entry, Results
from llava_saep.evaluation.questions import Question


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """A question that some answer rightly and others not.

    Args:
        answers: label -> (the first finished seed's answer, how many of its runs were right, how many there are).
    """

    question: Question
    answers: Mapping[str, tuple[str, int, int]]


def disagreements(results: Results, limit: int) -> list[Disagreement]:
    """The questions that divide the entries most evenly, one per image, kinds of question taking turns.

    Nothing is picked by eye: an entry counts as right by the share of its runs that are, and the variance of that share
    over the entries decides; the file's order decides between equals.
    """
    entries = [entry for entry in results.entries if entry.finished]
    if len(entries) < 2:
        return []
    shares = np.stack([np.stack([one.correct for one in entry.finished]).mean(axis=0) for entry in entries])
    spread = shares.var(axis=0)
    ranked = sorted(np.flatnonzero(spread > 0), key=lambda index: (-spread[index], index))
    chosen = _take_turns([int(index) for index in ranked], results.questions, limit)
    return [_disagreement(index, entries, results.questions) for index in chosen]


def _take_turns(ranked: Sequence[int], questions: Sequence[Question], limit: int) -> list[int]:
    by_category: dict[str, list[int]] = {}
    for index in ranked:
        by_category.setdefault(questions[index].category, []).append(index)
    chosen: list[int] = []
    images: set[str] = set()
    while any(by_category.values()) and len(chosen) < limit:
        for waiting in by_category.values():
            while waiting and questions[waiting[0]].image in images:
                waiting.pop(0)
            if waiting and len(chosen) < limit:
                chosen.append(waiting.pop(0))
                images |= {questions[chosen[-1]].image} - {None}
    return chosen


def _disagreement(index: int, entries: Sequence[Entry], questions: Sequence[Question]) -> Disagreement:
    answers = {
        entry.label: (
            entry.finished[0].answers[index],
            sum(bool(one.correct[index]) for one in entry.finished),
            len(entry.finished),
        )
        for entry in entries
    }
    return Disagreement(question=questions[index], answers=answers)
