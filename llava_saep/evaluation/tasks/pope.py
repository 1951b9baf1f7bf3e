"""POPE (Li et al., 2023, arXiv:2305.10355): is an object in the image? Three ways of choosing objects that are not.

The parsing of an answer is LLaVA's, oddities included, for published numbers come from it. Not kept: LLaVA gives labels
to answers by their order alone; here a label belongs to the question about the same image in the same words.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llava_saep.errors import UserError

from ._base import Answer, CategoryRow, Exclusion, Metric, Requirement, Task, TaskQuestion, TaskResult
from ._files import read_json_lines, read_task_questions, required
from ._matching import collect_exclusions, exclusion, match_answers
from ._scoring import grouped, share_metric
from ._sources import EVAL_ZIP

CATEGORIES = ("adversarial", "popular", "random")
QUESTION_FILE = "llava_pope_test.jsonl"

YesNo = Literal["yes", "no"]


def parse_yes_no(text: str) -> YesNo:
    """LLaVA's reading: "no" where the first sentence has the word No, no or not; everything else is a yes.

    So `NO`, `No!` and the empty answer are yes, and `Yes, but not fully` is no.
    """
    first_sentence = text.split(".")[0]
    words = first_sentence.replace(",", "").split(" ")
    return "no" if any(word in ("No", "not", "no") for word in words) else "yes"


@dataclass(frozen=True, kw_only=True)
class YesNoCounts:
    """Right and wrong answers, "yes" being the positive one. Ratios are None where they would divide by zero.

    A question without an answer counts in the accuracy, and in the recall where "yes" was right.
    """

    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int
    unanswered_yes: int = 0
    unanswered_no: int = 0

    @property
    def num_answers(self) -> int:
        """Questions that were answered."""
        return self.true_positives + self.false_positives + self.true_negatives + self.false_negatives

    @property
    def num_questions(self) -> int:
        """All questions."""
        return self.num_answers + self.unanswered_yes + self.unanswered_no

    @property
    def accuracy(self) -> float | None:
        """Share of right answers among all questions."""
        return _ratio(self.true_positives + self.true_negatives, self.num_questions)

    @property
    def precision(self) -> float | None:
        """Share of right ones among the answers "yes"."""
        return _ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float | None:
        """Share of questions with label "yes" that were answered so."""
        return _ratio(self.true_positives, self.true_positives + self.false_negatives + self.unanswered_yes)

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall."""
        if self.precision is None or self.recall is None:
            return None
        return _ratio(2 * self.precision * self.recall, self.precision + self.recall)

    @property
    def yes_ratio(self) -> float | None:
        """Share of "yes" among the answers given."""
        return _ratio(self.true_positives + self.false_positives, self.num_answers)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def count_yes_no(predictions: Iterable[YesNo | None], labels: Iterable[str]) -> YesNoCounts:
    """Count predictions against labels, pairwise; None is a question without an answer, a label other than "no" yes."""
    pairs = [(prediction, label == "no") for prediction, label in zip(predictions, labels, strict=True)]
    return YesNoCounts(
        true_positives=pairs.count(("yes", False)),
        false_positives=pairs.count(("yes", True)),
        true_negatives=pairs.count(("no", True)),
        false_negatives=pairs.count(("no", False)),
        unanswered_yes=pairs.count((None, False)),
        unanswered_no=pairs.count((None, True)),
    )


def label_questions(
    questions: Sequence[tuple[str, str]], annotations: Sequence[Mapping[str, Any]], place: str
) -> tuple[list[str | None], list[str]]:
    """Labels of questions, given as (image, text), from the annotations about the same image in the same words.

    Returns:
        a label per question, None where no annotation fits; and the annotations that belong to no question, as texts.
    Raises:
        UserError: an annotation is malformed, or its label neither yes nor no, which LLaVA takes for a yes.
    """
    waiting: dict[tuple[str, str], list[str]] = defaultdict(list)
    for annotation in annotations:
        image, text, label = (required(annotation, name, place, str) for name in ("image", "text", "label"))
        if label not in ("yes", "no"):
            raise UserError(f"{place}: label must be yes or no, found {label!r}")
        waiting[image, _bare(text)].append(label)
    labels = [waiting[image, _bare(text)].pop(0) if waiting[image, _bare(text)] else None for image, text in questions]
    left = [f"{image}: {text}" for (image, text), unused in waiting.items() for _ in unused]
    return labels, left


def _bare(text: str) -> str:
    """The question without the instruction that LLaVA puts below it."""
    return text.split("\n")[0].strip()


class Pope(Task):
    """Yes or no about objects, in three sets of questions that are answered in one file."""

    name = "pope"
    title = "POPE"
    folder_name = "pope"
    splits = default_splits = ("test",)

    def requirements(self, folder: Path, split: str) -> list[Requirement]:
        """The question file, COCO's validation images, and three files of labels."""
        labels = (
            "https://github.com/AoiDragon/POPE, folder output/coco at commit e3e39262c85a6a83f26cf5094022a782cb0df58d"
        )
        return [
            Requirement(path=folder / QUESTION_FILE, source=EVAL_ZIP),
            Requirement(
                path=folder / "val2014",
                source="http://images.cocodataset.org/zips/val2014.zip",
                purpose="images",
            ),
            *(Requirement(path=_label_file(folder, name), source=labels, purpose="score") for name in CATEGORIES),
        ]

    def questions(self, folder: Path, split: str) -> list[TaskQuestion]:
        """Questions of all three sets; the set is the category."""
        return read_task_questions(folder / QUESTION_FILE, folder / "val2014")

    def score(self, folder: Path, split: str, answers: Sequence[Answer]) -> TaskResult:
        """Precision, recall and F1 per set, and their means over the sets."""
        questions = self.questions(folder, split)
        unknown = sorted({question.category for question in questions} - set(CATEGORIES))
        if unknown:
            raise UserError(
                f"{folder / QUESTION_FILE}: unknown category {unknown[0]!r}; expected {', '.join(CATEGORIES)}"
            )
        matched = match_answers(questions, answers)
        by_category = grouped((q.category for q in questions), zip(questions, matched.texts, strict=True))
        counts, exclusions = {}, list(matched.exclusions)
        for category, pairs in by_category.items():
            counts[category], left_out = score_category(_label_file(folder, category), category, pairs)
            exclusions += left_out
        return TaskResult(
            task=self.name,
            split=split,
            metrics=_mean_metrics(counts),
            rows=tuple(CategoryRow(category=name, metrics=_metrics(each)) for name, each in counts.items()),
            exclusions=tuple(exclusions),
            notes=_notes(counts),
        )


def _label_file(folder: Path, category: str) -> Path:
    return folder / "coco" / f"coco_pope_{category}.json"


def score_category(
    path: Path, category: str, pairs: Sequence[tuple[TaskQuestion, str | None]]
) -> tuple[YesNoCounts, tuple[Exclusion, ...]]:
    """Count the answers to one set's questions against its file of labels; None is a question without an answer.

    Raises:
        UserError: the file is absent or malformed, or labels none of the questions.
    """
    asked = [(question.images[0].name if question.images else "", question.text) for question, _ in pairs]
    labels, left = label_questions(asked, read_json_lines(path), str(path))
    labelled = [(text, label) for (_, text), label in zip(pairs, labels, strict=True) if label is not None]
    unlabelled = [question.question_id for (question, _), label in zip(pairs, labels, strict=True) if label is None]
    if not labelled:
        raise UserError(f"{path}: none of its annotations is about an image and in the words of a question of this set")
    predictions = [None if text is None else parse_yes_no(text) for text, _ in labelled]
    return count_yes_no(predictions, [label for _, label in labelled]), collect_exclusions(
        exclusion(f"{category}: questions without a label in {path.name}", "left out", unlabelled),
        exclusion(f"{category}: labels of no question in {path.name}", "ignored", left),
    )


def _metrics(counts: YesNoCounts) -> tuple[Metric, ...]:
    n = counts.num_questions
    return (
        share_metric("accuracy", counts.true_positives + counts.true_negatives, n),
        Metric(name="precision", value=counts.precision, n=n),
        Metric(name="recall", value=counts.recall, n=n),
        Metric(name="F1", value=counts.f1, n=n),
        Metric(name="yes ratio", value=counts.yes_ratio, n=counts.num_answers),
    )


def _mean_metrics(counts: Mapping[str, YesNoCounts]) -> tuple[Metric, ...]:
    """Means over the sets, F1 first: the number that LLaVA's papers quote."""
    values = {
        "F1": [each.f1 for each in counts.values()],
        "accuracy": [each.accuracy for each in counts.values()],
        "precision": [each.precision for each in counts.values()],
        "recall": [each.recall for each in counts.values()],
        "yes ratio": [each.yes_ratio for each in counts.values()],
    }
    n = sum(each.num_questions for each in counts.values())
    return tuple(Metric(name=name, value=_mean(each), n=n) for name, each in values.items())


def _notes(counts: Mapping[str, YesNoCounts]) -> tuple[str, ...]:
    missing = [name for name in CATEGORIES if name not in counts]
    return (f"sets without a question, which the means are without: {', '.join(missing)}",) if missing else ()


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


TASK = Pope()
