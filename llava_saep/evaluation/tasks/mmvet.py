"""MM-Vet (Yu et al., 2023, arXiv:2308.02490): open questions that need several abilities; a language model rates.

The judge's instructions and examples are MM-Vet's own, word for word (github.com/yuweihao/MM-Vet, Apache-2.0), because
ratings under other ones cannot be compared. Published scores are of GPT-4 (gpt-4-0613), at best the mean of five runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_saep.errors import UserError

from ._base import (
    LONG_ANSWER_TOKENS,
    Answer,
    Exclusion,
    JudgedTask,
    JudgeRequest,
    Requirement,
    Review,
    TaskQuestion,
    TaskResult,
)
from ._files import read_json, read_task_questions, required, write_json
from ._matching import collect_exclusions, exclusion, match_answers, unasked, unreviewed
from ._scoring import mean_metric, mean_rows
from ._sources import EVAL_ZIP

QUESTION_FILE = "llava-mm-vet.jsonl"
ANNOTATION_FILE = "mm-vet.json"
JUDGE_TOKENS = 3
_RELEASE = "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"

_MEME_TRUTH = (
    "This meme is poking fun at the fact that the names of the countries Iceland and Greenland are misleading. Despite "
    "its name, Iceland is known for its beautiful green landscapes, while Greenland is mostly covered in ice and snow. "
    "The meme is saying that the person has trust issues because the names of these countries do not accurately "
    "represent their landscapes."
)
_EXAMPLES = (
    ("What is x in the equation?", "-1 <AND> -5", "x = 3", "0.0"),
    ("What is x in the equation?", "-1 <AND> -5", "x = -1", "0.5"),
    ("What is x in the equation?", "-1 <AND> -5", "x = -5", "0.5"),
    ("What is x in the equation?", "-1 <AND> -5", "x = -5 or 5", "0.5"),
    ("What is x in the equation?", "-1 <AND> -5", "x = -1 or x = -5", "1.0"),
    (
        "Can you explain this meme?",
        _MEME_TRUTH,
        "The meme talks about Iceland and Greenland. It's pointing out that despite their names, Iceland is not "
        "very icy and Greenland isn't very green.",
        "0.4",
    ),
    (
        "Can you explain this meme?",
        _MEME_TRUTH,
        "The meme is using humor to point out the misleading nature of Iceland's and Greenland's names. Iceland, "
        "despite its name, has lush green landscapes while Greenland is mostly covered in ice and snow. The text "
        "'This is why I have trust issues' is a playful way to suggest that these contradictions can lead to "
        "distrust or confusion. The humor in this meme is derived from the unexpected contrast between the names "
        "of the countries and their actual physical characteristics.",
        "1.0",
    ),
)
_INSTRUCTIONS = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. <AND> in "
    "the ground truth means it is totally right only when all elements in the ground truth are present in the "
    "prediction, and <OR> means it is totally right when any one element in the ground truth is present in the "
    "prediction. The correctness score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 "
    "(totally right). Just complete the last space of the correctness score."
)


def judge_prompt(question: str, truth: str, prediction: str) -> str:
    """The table of examples and, below an empty line, a row with the question, whose last cell the judge is to fill."""
    truth = truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    table = [
        "Question | Ground truth | Prediction | Correctness",
        "--- | --- | --- | ---",
        *(" | ".join(row) for row in _EXAMPLES),
        "",  # MM-Vet's own text ends with a line break, before the one that its evaluator adds
        f"{question} | {truth} | {prediction} | ",
    ]
    return f"{_INSTRUCTIONS}\n\n" + "\n".join(table)


def parse_score(reply: str) -> float | None:
    """The first word as a score in [0, 1]; None for anything else."""
    words = reply.split()
    try:
        score = float(words[0]) if words else None
    except ValueError:
        return None
    return score if score is not None and 0 <= score <= 1 else None


def results_by_id(answers: Sequence[Answer]) -> dict[str, str]:
    """The file that MM-Vet's own evaluator reads: `v1_<question_id>` -> answer; of several the last one."""
    return {f"v1_{answer.question_id}": answer.text for answer in answers}


class MMVet(JudgedTask):
    """Mean rating in [0, 1], overall and per ability."""

    name = "mmvet"
    title = "MM-Vet"
    folder_name = "mm-vet"
    splits = default_splits = ("test",)
    max_new_tokens = LONG_ANSWER_TOKENS

    def requirements(self, folder: Path, split: str) -> list[Requirement]:
        """LLaVA's question file; images and right answers of MM-Vet's release."""
        return [
            Requirement(path=folder / QUESTION_FILE, source=EVAL_ZIP),
            Requirement(path=folder / "images", source=_RELEASE, purpose="images"),
            Requirement(path=folder / ANNOTATION_FILE, source=_RELEASE, purpose="score"),
        ]

    def questions(self, folder: Path, split: str) -> list[TaskQuestion]:
        """LLaVA's question file."""
        return read_task_questions(folder / QUESTION_FILE, folder / "images")

    def judge_requests(self, folder: Path, split: str, answers: Sequence[Answer]) -> list[JudgeRequest]:
        """One table per answer; a question without one is not put to the judge, which `score_reviews` counts."""
        path = folder / ANNOTATION_FILE
        annotations = read_json(path, dict)
        questions = self.questions(folder, split)
        return [
            _request(question, text, annotations, str(path))
            for question, text in zip(questions, match_answers(questions, answers).texts, strict=True)
            if text is not None
        ]

    def review_line(self, review: Review) -> dict[str, Any]:
        """The question's id and abilities, the judge's reply and the score (None: failed or no score)."""
        score = None if review.reply is None else parse_score(review.reply)
        return {**review.record, "question_id": review.question_id, "content": review.reply, "score": score}

    def misfits(self, folder: Path, split: str, answers: Sequence[Answer]) -> tuple[Exclusion, ...]:
        """Answers that do not fit, and entries of mm-vet.json that no question asks."""
        path, questions = folder / ANNOTATION_FILE, self.questions(folder, split)
        asked = (f"v1_{question.question_id}" for question in questions)
        return match_answers(questions, answers).misfits + unasked(read_json(path, dict), asked, path)

    def score_reviews(self, folder: Path, split: str, lines: Sequence[Mapping[str, Any]]) -> TaskResult:
        """Mean score, overall and per ability; lines without a score are left out and counted."""
        rated = [line for line in lines if line.get("score") is not None]
        if not rated:
            raise UserError(f"mmvet: none of the {len(lines)} reviews holds a score")
        abilities: dict[str, list[float]] = {}
        for line in rated:
            for ability in line["capability"]:
                abilities.setdefault(ability, []).append(line["score"])
        failed = (line["question_id"] for line in lines if line.get("score") is None)
        return TaskResult(
            task=self.name,
            split=split,
            metrics=(mean_metric("score", [line["score"] for line in rated]),),
            rows=mean_rows(abilities, "score"),
            exclusions=collect_exclusions(
                exclusion("reviews without a score", "left out", failed),
                unreviewed(self.questions(folder, split), lines),
            ),
        )

    def export(self, folder: Path, split: str, answers: Sequence[Answer], output: Path) -> list[Path]:
        """The file that MM-Vet's own evaluator reads."""
        return [write_json(output / "mmvet_results.json", results_by_id(answers), indent=2)]


def _request(question: TaskQuestion, text: str, annotations: Mapping[str, Any], place: str) -> JudgeRequest:
    name = f"v1_{question.question_id}"
    if name not in annotations:
        raise UserError(f"{place}: has no entry {name!r}, which {QUESTION_FILE} asks")
    annotation, place = annotations[name], f"{place}: {name}"
    truth, capability = required(annotation, "answer", place, str), required(annotation, "capability", place, list)
    return JudgeRequest(
        question_id=question.question_id,
        system="",
        user=judge_prompt(required(annotation, "question", place, str), truth, text),
        record={"capability": list(map(str, capability))},
        max_tokens=JUDGE_TOKENS,
        temperature=0.0,
    )


TASK = MMVet()
