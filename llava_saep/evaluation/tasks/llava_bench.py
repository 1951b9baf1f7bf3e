"""LLaVA-Bench in the wild (Liu et al., 2023, arXiv:2304.08485): open questions; a language model compares answers.

The judge reads a description of the image, the question, GPT-4's answer and the model's, and gives both 1 to 10 points.
Its instructions are LLaVA's, word for word (llava/eval/table/rule.json, Apache-2.0), because ratings under other ones
cannot be compared. Published scores are of gpt-4-0314.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_saep.errors import UserError

from ._base import (
    LONG_ANSWER_TOKENS,
    Answer,
    CategoryRow,
    Exclusion,
    JudgedTask,
    JudgeRequest,
    Metric,
    Requirement,
    Review,
    TaskQuestion,
    TaskResult,
)
from ._files import read_answers, read_json_lines, read_task_questions, required
from ._matching import collect_exclusions, exclusion, match_answers, unasked, unreviewed
from ._scoring import grouped

QUESTION_FILE = "questions.jsonl"
CONTEXT_FILE = "context.jsonl"
REFERENCE_FILE = "answers_gpt4.jsonl"
CATEGORY_PREFIX = "llava_bench_"
CATEGORIES = ("conv", "detail", "complex")
OVERALL = "all"
JUDGE_TOKENS = 1024
JUDGE_TEMPERATURE = 0.2
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
_DATA = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"

ROLE = "Assistant"
RULE = (
    "We would like to request your feedback on the performance of two AI assistants in response to the user question "
    "displayed above. The user asks the question on observing an image. For your reference, the visual content in the "
    "image is represented with a few sentences describing the image. \n"
    "Please rate the helpfulness, relevance, accuracy, level of details of their responses. Each assistant receives an "
    "overall score on a scale of 1 to 10, where a higher score indicates better overall performance.\n"
    "Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, "
    "respectively. The two scores are separated by a space.\n"
    "In the subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any potential "
    "bias and ensuring that the order in which the responses were presented does not affect your judgment."
)
UNREADABLE = (-1.0, -1.0)
"""LLaVA's pair of points for a reply that does not begin with two numbers."""


@dataclass(frozen=True)
class JudgeRule:
    """What the judge is asked to do, and what it calls the two whose answers it reads."""

    prompt: str = RULE
    role: str = ROLE


def judge_prompt(context: str, question: str, reference: str, answer: str, rule: JudgeRule) -> str:
    """The text that the judge reads, laid out as LLaVA does; an empty `context` leaves its part out."""
    head = f"[Context]\n{context}\n\n" if context else ""
    return (
        f"{head}[Question]\n{question}\n\n"
        f"[{rule.role} 1]\n{reference}\n\n[End of {rule.role} 1]\n\n"
        f"[{rule.role} 2]\n{answer}\n\n[End of {rule.role} 2]\n\n"
        f"[System]\n{rule.prompt}\n\n"
    )


def parse_points(reply: str) -> tuple[float, float]:
    """The two numbers that the first line of a reply consists of, spaces or a comma between; else `UNREADABLE`.

    LLaVA cannot read `8, 6`, with both.
    """
    words = reply.split("\n")[0].replace(",", " ").split()
    try:
        first, second = map(float, words)
    except ValueError:
        return UNREADABLE
    return (first, second) if math.isfinite(first) and math.isfinite(second) else UNREADABLE


@dataclass(frozen=True)
class PointsSummary:
    """Mean points of one category, rounded to three decimals as LLaVA does before it divides."""

    reference: float
    model: float
    n: int

    @property
    def relative(self) -> float:
        """The model's points in percent of the reference's, the published score; nan where the reference has none."""
        return self.model / self.reference * 100 if self.reference else math.nan

    @property
    def line_numbers(self) -> tuple[float, float, float]:
        """LLaVA's three columns: relative score, ten times the reference's points, ten times the model's."""
        return round(self.relative, 1), round(self.reference * 10, 1), round(self.model * 10, 1)


def summarize_points(lines: Iterable[Mapping[str, Any]], place: str) -> dict[str, PointsSummary]:
    """Mean points per category and overall ("all"), in alphabetical order; unreadable reviews are left out.

    LLaVA averages its -1 of unreadable reviews with the points.

    Raises:
        UserError: no line holds points.
    """
    readable = [line for line in lines if has_points(line)]
    if not readable:
        raise UserError(f"{place}: no review holds points")
    of_a_kind = [line for line in readable if "category" in line]
    points: dict[str, list[tuple[float, float]]] = {OVERALL: [tuple(_points(line) or ()) for line in readable]}
    points |= grouped((str(line["category"]) for line in of_a_kind), map(_points, of_a_kind))
    return {
        category: PointsSummary(
            *(round(sum(column) / len(pairs), 3) for column in zip(*pairs, strict=True)), len(pairs)
        )
        for category, pairs in sorted(points.items())
    }


def has_points(line: Mapping[str, Any]) -> bool:
    """Whether the judge's reply held points."""
    return _points(line) is not None


def _points(line: Mapping[str, Any]) -> tuple[float, float] | None:
    pair = line.get("tuple", line.get("score"))
    is_pair = isinstance(pair, list) and len(pair) == 2 and all(_is_number(each) for each in pair)
    return None if not is_pair or tuple(pair) == UNREADABLE else (pair[0], pair[1])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


class LlavaBench(JudgedTask):
    """The model's points in percent of GPT-4's, overall and for conversation, description and reasoning."""

    name = "llava_bench"
    title = "LLaVA-Bench (In-the-Wild)"
    folder_name = "llava-bench-in-the-wild"
    splits = default_splits = ("test",)
    max_new_tokens = LONG_ANSWER_TOKENS

    def requirements(self, folder: Path, split: str) -> list[Requirement]:
        """The data set's files."""
        return [
            Requirement(path=folder / QUESTION_FILE, source=_DATA),
            Requirement(path=folder / "images", source=_DATA, purpose="images"),
            Requirement(path=folder / CONTEXT_FILE, source=_DATA, purpose="score"),
            Requirement(path=folder / REFERENCE_FILE, source=_DATA, purpose="score"),
        ]

    def questions(self, folder: Path, split: str) -> list[TaskQuestion]:
        """The data set's questions; the category is conv, detail or complex."""
        return read_task_questions(folder / QUESTION_FILE, folder / "images")

    def judge_requests(self, folder: Path, split: str, answers: Sequence[Answer]) -> list[JudgeRequest]:
        """One comparison per answer; a question without one is not put to the judge, which `score_reviews` counts."""
        questions = self.questions(folder, split)
        matched = match_answers(questions, answers)
        references = match_answers(questions, read_answers(folder / REFERENCE_FILE))
        contexts = read_contexts(folder / CONTEXT_FILE)
        return [
            comparison_request(number, question, reference, answer, contexts, folder / REFERENCE_FILE)
            for number, (question, reference, answer) in enumerate(
                zip(questions, references.answers, matched.answers, strict=True), 1
            )
            if answer is not None
        ]

    def review_line(self, review: Review) -> dict[str, Any]:
        """LLaVA's review line; a reply without two numbers, or none at all, gets -1 twice."""
        points = UNREADABLE if review.reply is None else parse_points(review.reply)
        return {**review.record, "content": review.reply, "tuple": list(points)}

    def misfits(self, folder: Path, split: str, answers: Sequence[Answer]) -> tuple[Exclusion, ...]:
        """Answers that do not fit, and answers of the reference to questions that are not asked."""
        path, questions = folder / REFERENCE_FILE, self.questions(folder, split)
        referenced = dict.fromkeys(str(answer.question_id) for answer in read_answers(path))
        asked = (str(question.question_id) for question in questions)
        return match_answers(questions, answers).misfits + unasked(referenced, asked, path)

    def score_reviews(self, folder: Path, split: str, lines: Sequence[Mapping[str, Any]]) -> TaskResult:
        """Relative score and mean points, overall and per category."""
        summaries = summarize_points(lines, self.name)
        unreadable = (line.get("question_id") for line in lines if not has_points(line))
        return TaskResult(
            task=self.name,
            split=split,
            metrics=_metrics(summaries[OVERALL]),
            rows=tuple(
                CategoryRow(category=name, metrics=_metrics(each))
                for name, each in summaries.items()
                if name != OVERALL
            ),
            exclusions=collect_exclusions(
                exclusion("reviews without points", "left out", unreadable),
                unreviewed(self.questions(folder, split), lines),
            ),
        )


def read_contexts(path: Path) -> dict[str, str]:
    """Description of each image of a context file, several sentences on lines of their own."""
    contexts = {}
    for number, record in enumerate(read_json_lines(path), 1):
        caption = required(record, "caption", f"{path}, record {number}", (str, list))
        contexts[required(record, "image", f"{path}, record {number}", str)] = (
            caption if isinstance(caption, str) else "\n".join(map(str, caption))
        )
    return contexts


def comparison_request(
    number: int,
    question: TaskQuestion,
    reference: Answer | None,
    answer: Answer,
    contexts: Mapping[str, str],
    reference_file: Path,
) -> JudgeRequest:
    """What the judge is asked about one question; `number` counts from 1, as LLaVA's review ids."""
    image = question.images[0].name if question.images and isinstance(question.images[0], Path) else ""
    if reference is None:
        raise UserError(f"{reference_file}: has no answer to question {question.question_id!r}")
    if image not in contexts:
        raise UserError(f"{reference_file.with_name(CONTEXT_FILE)}: describes no image {image!r}")
    if question.category not in CATEGORIES:
        raise UserError(
            f"{reference_file.with_name(QUESTION_FILE)}: question {question.question_id!r} has the category "
            f"{question.category!r}; expected {', '.join(CATEGORIES)}"
        )
    return JudgeRequest(
        question_id=question.question_id,
        system=SYSTEM,
        user=judge_prompt(contexts[image], question.text, reference.text, answer.text, JudgeRule()),
        record=review_record(number, question.question_id, reference, answer, CATEGORY_PREFIX + question.category),
        max_tokens=JUDGE_TOKENS,
        temperature=JUDGE_TEMPERATURE,
    )


def review_record(number: int, question_id: Any, reference: Answer, answer: Answer, category: str) -> dict[str, Any]:
    """What LLaVA's review line holds beside the judge's reply."""
    return {
        "id": number,
        "question_id": question_id,
        "answer1_id": reference.fields.get("answer_id", reference.question_id),
        "answer2_id": answer.fields.get("answer_id", answer.question_id),
        "category": category,
    }


def _metrics(summary: PointsSummary) -> tuple[Metric, ...]:
    relative, reference, model = summary.line_numbers
    return tuple(
        Metric(name=name, value=None if math.isnan(value) else value, n=summary.n, unit="points")
        for name, value in (("relative score", relative), ("reference x 10", reference), ("model x 10", model))
    )


TASK = LlavaBench()
