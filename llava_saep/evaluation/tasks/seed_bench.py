"""SEED-Bench (Li et al., 2023, arXiv:2307.16125): multiple choice about images and frames of videos.

As in LLaVA's scorer an answer counts when it is the letter and nothing else: `A.` and `a` are wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_saep.errors import UserError

from ._base import Answer, Requirement, Task, TaskQuestion, TaskResult
from ._files import ID, read_json, read_task_questions, required, write_json_lines
from ._matching import match_labels, texts_by_id, unasked
from ._options import check_letter_labels
from ._scoring import grouped, mean_metric, mean_rows
from ._sources import EVAL_ZIP

QUESTION_FILE = "llava-seed-bench.jsonl"
ANNOTATION_FILE = "SEED-Bench.json"
LETTERS = ("A", "B", "C", "D")


def read_seed_annotations(path: Path) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Questions of SEED-Bench.json, and the names of its question types by their numbers.

    Raises:
        UserError: the file is absent or malformed.
    """
    content = read_json(path, dict)
    types = required(content, "question_type", str(path), dict)
    names = {required(types, name, f"{path}, question_type", int): name for name in types}
    questions = required(content, "questions", str(path), list)
    for number, question in enumerate(questions):
        kinds = {"question_id": ID, "question_type_id": int, "data_type": str, "answer": str}
        for field, kind in kinds.items():
            required(question, field, f"{path}, question {number}", kind)
        if question["question_type_id"] not in names:
            raise UserError(f"{path}, question {number}: unknown question_type_id {question['question_type_id']!r}")
    return questions, names


def upload_records(
    annotations: Sequence[Mapping[str, Any]], texts: Mapping[str, str], place: str
) -> list[dict[str, str]]:
    """The leaderboard's upload: every question of SEED-Bench.json with the model's answer.

    Args:
        texts: answer by question_id as a text.
    Raises:
        UserError: a question has no answer; `place` names the answers.
    """
    missing = [each["question_id"] for each in annotations if str(each["question_id"]) not in texts]
    if missing:
        raise UserError(
            f"{place}: {len(missing)} of {len(annotations)} questions have no answer, the first one {missing[0]!r}; "
            "an upload must answer all"
        )
    return [{"question_id": each["question_id"], "prediction": texts[str(each["question_id"])]} for each in annotations]


class SeedBench(Task):
    """Accuracy over images and videos together, of each, and by type of question."""

    name = "seed_bench"
    title = "SEED-Bench"
    folder_name = "seed_bench"
    splits = default_splits = ("test",)

    def requirements(self, folder: Path, split: str) -> list[Requirement]:
        """LLaVA's question file; annotations, images and middle frames of videos by SEED-Bench's guide."""
        guide = "https://github.com/AILab-CVC/SEED-Bench/blob/main/DATASET.md"
        frames = f"the middle frame of each video of {guide}; LLaVA's eval.zip has extract_video_frames.py"
        return [
            Requirement(path=folder / QUESTION_FILE, source=EVAL_ZIP),
            Requirement(path=folder / "SEED-Bench-image", source=guide, purpose="images"),
            Requirement(path=folder / "SEED-Bench-video-image", source=frames, purpose="images"),
            Requirement(path=folder / ANNOTATION_FILE, source=guide, purpose="score"),
        ]

    def questions(self, folder: Path, split: str) -> list[TaskQuestion]:
        """LLaVA's question file."""
        return read_task_questions(folder / QUESTION_FILE, folder)

    def score(self, folder: Path, split: str, answers: Sequence[Answer]) -> TaskResult:
        """Exact letters: total, images, videos, and by type."""
        path = folder / ANNOTATION_FILE
        annotations, names = read_seed_annotations(path)
        by_id = {str(annotation["question_id"]): annotation for annotation in annotations}
        asked = self.questions(folder, split)
        matched = match_labels(asked, answers, lambda question: by_id.get(str(question.question_id)), str(path))
        check_letter_labels({label["question_id"]: label["answer"] for label in matched.labels}, LETTERS, str(path))
        is_right = [
            float(text == annotation["answer"]) for annotation, text in zip(matched.labels, matched.texts, strict=True)
        ]
        media = grouped((annotation["data_type"] for annotation in matched.labels), is_right)
        types = grouped((names[annotation["question_type_id"]] for annotation in matched.labels), is_right)
        return TaskResult(
            task=self.name,
            split=split,
            metrics=(
                mean_metric("accuracy", is_right),
                *(mean_metric(f"{medium} accuracy", media[medium]) for medium in ("image", "video") if medium in media),
            ),
            rows=mean_rows(types),
            exclusions=matched.exclusions + unasked(by_id, (str(q.question_id) for q in asked), path),
        )

    def export(self, folder: Path, split: str, answers: Sequence[Answer], output: Path) -> list[Path]:
        """The leaderboard's jsonl file."""
        path = folder / ANNOTATION_FILE
        records = upload_records(read_seed_annotations(path)[0], texts_by_id(answers), "the answers")
        return [write_json_lines(output / "seed_bench_upload.jsonl", records)]


TASK = SeedBench()
