"""Which answer belongs to which question, with everything that does not fit counted."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from llava_saep.errors import UserError

from ._base import Answer, Exclusion, ExclusionEffect, TaskQuestion

NUM_EXAMPLES = 5

L = TypeVar("L")


@dataclass(frozen=True)
class MatchedAnswers:
    """One entry per question, None where there is no answer; how many of these there are, and what did not fit."""

    answers: tuple[Answer | None, ...]
    missing: Exclusion | None
    misfits: tuple[Exclusion, ...]

    @property
    def exclusions(self) -> tuple[Exclusion, ...]:
        """Questions without an answer, and answers that do not fit."""
        return collect_exclusions(self.missing, *self.misfits)

    @property
    def texts(self) -> list[str | None]:
        """The generated text per question."""
        return [None if answer is None else answer.text for answer in self.answers]


def match_answers(questions: Sequence[TaskQuestion], answers: Sequence[Answer]) -> MatchedAnswers:
    """Give each question its answer.

    By id and round where these are unique, else by the prompt too: TextVQA and MME have several questions per id. Of
    several answers to one question the last one counts, as in LLaVA's scorers; but where some have the question's own
    prompt or none, those with another one are to a question that is not asked (one about the same image).
    """
    ids_suffice = len({_short_key(question.key) for question in questions}) == len(questions)
    key_of = _short_key if ids_suffice else tuple
    waiting: dict[Hashable, list[Answer]] = defaultdict(list)
    for answer in answers:
        waiting[key_of(answer.key)].append(answer)
    strangers = _take_out_other_wordings(questions, waiting) if ids_suffice else []
    wanted: dict[Hashable, int] = defaultdict(int)
    for question in questions:
        wanted[key_of(question.key)] += 1
    unknown = [answer for answer in answers if key_of(answer.key) not in wanted] + strangers
    doubled = [answer for key, given in waiting.items() if key in wanted for answer in given[: -wanted[key]]]
    kept = {key: list(reversed(given[-wanted[key] :])) for key, given in waiting.items() if key in wanted}
    matched = tuple(kept[key].pop() if kept.get(key := key_of(question.key)) else None for question in questions)
    pairs = list(zip(questions, matched, strict=True))
    missing = [question for question, answer in pairs if answer is None]
    # Ids are often plain numbers, so that a file of another benchmark's answers fits too.
    reworded = [q for q, answer in pairs if answer is not None and answer.prompt not in ("", q.prompt)]
    return MatchedAnswers(
        matched,
        exclusion("questions without an answer", "counted as wrong", (q.question_id for q in missing)),
        collect_exclusions(
            exclusion("answers that a later one replaces", "ignored", (a.question_id for a in doubled)),
            exclusion("answers to no question", "ignored", (a.question_id for a in unknown)),
            exclusion("answers to another wording", "scored all the same", (q.question_id for q in reworded)),
        ),
    )


def _take_out_other_wordings(questions: Sequence[TaskQuestion], waiting: dict[Hashable, list[Answer]]) -> list[Answer]:
    """Answers to other prompts than the question's where there are some to its own; takes them out of `waiting`."""
    taken = []
    for question in questions:
        key = _short_key(question.key)
        given = waiting.get(key, [])
        own = [answer for answer in given if answer.prompt in ("", question.prompt)]
        if own and len(own) < len(given):
            taken += [answer for answer in given if answer.prompt not in ("", question.prompt)]
            waiting[key] = own
    return taken


def _short_key(key: tuple[str, str, int]) -> tuple[str, int]:
    question_id, _, round_id = key
    return question_id, round_id


def texts_by_id(answers: Iterable[Answer]) -> dict[str, str]:
    """Generated text by question_id as a text, for one file may write 7 where another has "7"; the last one counts."""
    return {str(answer.question_id): answer.text for answer in answers}


def id_misfits(answered: Iterable[Hashable], asked: Collection[Hashable]) -> list[str]:
    """What does not fit between a file of answers and ids that are asked, for programs that know ids alone.

    Returns:
        a sentence on questions without an answer, answers that a later one replaces, and answers to no question.
    """
    asked, counts = set(asked), Counter(answered)
    misfits = {
        "questions without an answer": len(asked - counts.keys()),
        "answers that a later one replaces": sum(number - 1 for each, number in counts.items() if each in asked),
        "answers to no question": sum(number for each, number in counts.items() if each not in asked),
    }
    return [f"{number} {reason}" for reason, number in misfits.items() if number]


def unreviewed(questions: Sequence[TaskQuestion], lines: Sequence[Mapping[str, Any]]) -> Exclusion | None:
    """The questions that no line of a review file is about."""
    reviewed = {str(line.get("question_id")) for line in lines}
    missing = (q.question_id for q in questions if str(q.question_id) not in reviewed)
    return exclusion("questions without a review", "left out", missing)


@dataclass(frozen=True)
class LabelledAnswers(Generic[L]):
    """The questions that have a label, with label and generated text (None: no answer) in the same order."""

    questions: tuple[TaskQuestion, ...]
    labels: tuple[L, ...]
    texts: tuple[str | None, ...]
    exclusions: tuple[Exclusion, ...]


def match_labels(
    questions: Sequence[TaskQuestion],
    answers: Sequence[Answer],
    label_of: Callable[[TaskQuestion], L | None],
    place: str,
) -> LabelledAnswers[L]:
    """Give each question its answer and its label; questions without a label are left out and counted.

    Args:
        label_of: None for a question that the annotations do not know.
        place: the annotations' file, for messages.
    Raises:
        UserError: no question has a label, so that the annotations belong to other questions.
    """
    matched = match_answers(questions, answers)
    triples = [(question, label_of(question), text) for question, text in zip(questions, matched.texts, strict=True)]
    labelled = [(question, label, text) for question, label, text in triples if label is not None]
    if not labelled:
        raise UserError(f"{place}: says nothing about any of the {len(questions)} questions; is it of another split?")
    unlabelled = (question.question_id for question, label, _ in triples if label is None)
    return LabelledAnswers(
        tuple(question for question, _, _ in labelled),
        tuple(label for _, label, _ in labelled),
        tuple(text for _, _, text in labelled),
        matched.exclusions
        + collect_exclusions(exclusion(f"questions that {Path(place).name} does not annotate", "left out", unlabelled)),
    )


def unasked(annotated: Iterable[Hashable], asked: Iterable[Hashable], place: str | Path) -> tuple[Exclusion, ...]:
    """The annotations that belong to no question, which a published score may count; nothing where there are none."""
    keys = set(asked)
    left = (key for key in annotated if key not in keys)
    return collect_exclusions(exclusion(f"annotations in {Path(place).name} of no question", "left out", left))


def exclusion(reason: str, effect: ExclusionEffect, ids: Iterable[Any]) -> Exclusion | None:
    """Count of the ids with the first of them as examples; None for none."""
    named = [str(each) for each in ids]
    if not named:
        return None
    return Exclusion(reason=reason, count=len(named), effect=effect, examples=tuple(named[:NUM_EXAMPLES]))


def collect_exclusions(*exclusions: Exclusion | None) -> tuple[Exclusion, ...]:
    """Those that count something."""
    return tuple(each for each in exclusions if each is not None)
