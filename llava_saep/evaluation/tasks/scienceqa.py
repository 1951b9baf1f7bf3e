"""ScienceQA (Lu et al., 2022, arXiv:2209.09513): multiple choice from school books, about half of it with an image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_saep.errors import UserError

from ._base import LONG_ANSWER_TOKENS, Answer, CategoryRow, Requirement, Task, TaskQuestion, TaskResult
from ._files import ID, read_json, required
from ._matching import collect_exclusions, exclusion, match_answers
from ._scoring import grouped, mean_metric, mean_rows
from ._sources import EVAL_ZIP, OPTION_LETTER

QUESTION_FILE = "llava_test_CQM-A.json"
LETTERS = ("A", "B", "C", "D", "E")
FAILED = "FAILED"
"""LLaVA's word for an answer in which no letter was found."""
UNANSWERED_PROMPT = "Unknown"
"""What LLaVA's scorer puts for the prompt of a question without an answer; it then counts as one without an image."""

_STATED_ANSWER = re.compile(r"The answer is ([A-Z]).")


def parse_option(text: str, letters: Sequence[str] = LETTERS) -> str:
    """LLaVA's reading of an answer: a letter alone, `X. ...`, or `The answer is X` with one more character behind it.

    That character may be any but a line break, so `The answer is AB.` is read as A while `The answer is B` at the end
    of a line, or said twice, is `FAILED`.
    """
    if text in letters:
        return text
    if len(text) >= 3 and text[0] in letters and text[1:3] == ". ":
        return text[0]
    stated = _STATED_ANSWER.findall(text)
    return stated[0] if len(stated) == 1 else FAILED


def option_index(letter: str, num_choices: int, letters: Sequence[str] = LETTERS) -> int:
    """Index of a letter among the choices that a problem has; -1 for all others."""
    offered = list(letters[:num_choices])
    return offered.index(letter) if letter in offered else -1


@dataclass(frozen=True, kw_only=True)
class ScienceOutcome:
    """One problem: what was answered (`prediction`), the letter read from it, the index, and whether that is right."""

    problem_id: str
    prompt: str
    prediction: str
    letter: str
    index: int
    truth: int

    @property
    def is_right(self) -> bool:
        """Whether the choice is the right one."""
        return self.index == self.truth

    @property
    def has_image(self) -> bool:
        """Whether an image was asked about: LLaVA looks for the marker in the prompt."""
        return "<image>" in self.prompt


def judge_problems(
    problems: Mapping[str, Mapping[str, Any]],
    problem_ids: Sequence[str],
    answers: Mapping[str, Answer],
    place: str,
    letters: Sequence[str] = LETTERS,
) -> list[ScienceOutcome]:
    """Compare answers with problems, in the order of `problem_ids`; one without an answer is wrong.

    Raises:
        UserError: a problem is absent, or its entry malformed; `place` names the file.
    """
    absent = [each for each in problem_ids if each not in problems]
    if absent:
        raise UserError(
            f"{place}: lacks {len(absent)} problems that pid_splits.json lists, the first one {absent[0]!r}"
        )
    return [
        _outcome(problem_id, problems[problem_id], answers.get(problem_id), letters, f"{place}: problem {problem_id}")
        for problem_id in problem_ids
    ]


def _outcome(
    problem_id: str, problem: Mapping[str, Any], answer: Answer | None, letters: Sequence[str], place: str
) -> ScienceOutcome:
    answer = answer or Answer(question_id=problem_id, text=FAILED, prompt=UNANSWERED_PROMPT)
    letter, truth = parse_option(answer.text, letters), required(problem, "answer", place, int)
    if not 0 <= truth < len(letters):
        raise UserError(
            f"{place}: the right choice is number {truth}, which none of the letters {''.join(letters)} means"
        )
    return ScienceOutcome(
        problem_id=problem_id,
        prompt=answer.prompt,
        prediction=answer.text,
        letter=letter,
        index=option_index(letter, len(required(problem, "choices", place, list)), letters),
        truth=truth,
    )


def read_problems(folder: Path, split: str) -> tuple[dict[str, Any], list[str]]:
    """The problems of ScienceQA's problems.json, and the ids of a split of pid_splits.json, each once as LLaVA.

    Raises:
        UserError: a file is absent or malformed, or there is no such split.
    """
    path = folder / "pid_splits.json"
    ids = required(read_json(path, dict), split, str(path), list)
    if not all(isinstance(each, str) for each in ids):
        raise UserError(f"{path}: {split} must list ids as texts")
    return read_json(folder / "problems.json", dict), list(dict.fromkeys(ids))


def read_science_questions(path: Path, image_folder: Path, ask_for_letter: bool) -> list[TaskQuestion]:
    """Questions of LLaVA's file for ScienceQA, a list of training records.

    Args:
        ask_for_letter: append LLaVA's instruction to answer with the letter alone (its --single-pred-prompt).
    Raises:
        UserError: the file is absent or malformed.
    """
    return [
        _question(record, image_folder, ask_for_letter, f"{path}, record {number}")
        for number, record in enumerate(read_json(path, list))
    ]


def _question(record: Any, image_folder: Path, ask_for_letter: bool, place: str) -> TaskQuestion:
    turns = required(record, "conversations", place, list)
    if not turns:
        raise UserError(f"{place}: has no turn to take the question from")
    text = required(turns[0], "value", place, str).replace("<image>", "").strip()
    if ask_for_letter:
        text = f"{text}\n{OPTION_LETTER}"
    image = None if record.get("image") is None else required(record, "image", place, str)
    return TaskQuestion(
        question_id=required(record, "id", place, ID),
        text=text,
        prompt=text if image is None else f"<image>\n{text}",
        images=() if image is None else (image_folder / image,),
    )


class ScienceQA(Task):
    """Accuracy on the test set; the number that LLaVA's papers quote is that of the questions with an image."""

    name = "scienceqa"
    title = "ScienceQA"
    folder_name = "scienceqa"
    splits = default_splits = ("test",)
    max_new_tokens = LONG_ANSWER_TOKENS

    def requirements(self, folder: Path, split: str) -> list[Requirement]:
        """LLaVA's question file; problems, splits and images of ScienceQA's repository."""
        repository = "https://github.com/lupantech/ScienceQA, folder data/scienceqa"
        return [
            Requirement(path=folder / QUESTION_FILE, source=EVAL_ZIP),
            Requirement(path=folder / "images" / "test", source=f"{repository}, tools/download.sh", purpose="images"),
            Requirement(path=folder / "pid_splits.json", source=repository, purpose="score"),
            Requirement(path=folder / "problems.json", source=repository, purpose="score"),
        ]

    def questions(self, folder: Path, split: str) -> list[TaskQuestion]:
        """LLaVA's question file, with its instruction to answer with the letter."""
        return read_science_questions(folder / QUESTION_FILE, folder / "images" / "test", ask_for_letter=True)

    def score(self, folder: Path, split: str, answers: Sequence[Answer]) -> TaskResult:
        """Accuracy on questions with an image and on all, and by subject and grade where problems.json has them."""
        problems, problem_ids = read_problems(folder, split)
        questions = {str(question.question_id): question for question in self.questions(folder, split)}
        asked = [questions[each] for each in problem_ids if each in questions]
        if not asked:
            raise UserError(f"{folder / QUESTION_FILE}: asks none of the problems of the split {split!r}")
        matched = match_answers(asked, answers)
        given = {
            str(q.question_id): Answer(
                question_id=q.question_id, text=FAILED if text is None else text, prompt=q.prompt
            )
            for q, text in zip(asked, matched.texts, strict=True)
        }
        outcomes = judge_problems(problems, list(given), given, str(folder / "problems.json"))
        unanswered = {str(q.question_id) for q, text in zip(asked, matched.texts, strict=True) if text is None}
        unread = [each for each in outcomes if each.letter == FAILED and each.problem_id not in unanswered]
        is_right = [float(outcome.is_right) for outcome in outcomes]
        with_image = [float(outcome.is_right) for outcome in outcomes if outcome.has_image]
        return TaskResult(
            task=self.name,
            split=split,
            metrics=(mean_metric("accuracy with image", with_image), mean_metric("accuracy", is_right)),
            rows=_rows([problems[each] for each in given], is_right),
            exclusions=matched.exclusions
            + collect_exclusions(
                exclusion("problems that are not asked", "left out", (x for x in problem_ids if x not in questions))
            ),
            notes=(f"answers in which no letter was found: {len(unread)}",),
        )


def _rows(problems: Sequence[Mapping[str, Any]], is_right: Sequence[float]) -> tuple[CategoryRow, ...]:
    subjects = grouped((str(problem.get("subject", "")) for problem in problems), is_right)
    grades = grouped((_grades(problem) for problem in problems), is_right)
    return mean_rows({name: each for groups in (subjects, grades) for name, each in groups.items() if name})


def _grades(problem: Mapping[str, Any]) -> str | None:
    number = str(problem.get("grade", "")).removeprefix("grade")
    return None if not number.isdigit() else "grades 1-6" if int(number) <= 6 else "grades 7-12"


TASK = ScienceQA()
