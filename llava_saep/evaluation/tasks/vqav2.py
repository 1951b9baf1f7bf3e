"""VQAv2 (Goyal et al., 2017, arXiv:1612.00837): short answers about COCO's images.

test-dev and test are scored by EvalAI from an upload, which always lists all questions of the test set; val is scored
here, with the soft accuracy of `_vqa_answers` on both sides of the comparison (EvalAI's own leaves answers as they are
where all people agree, a difference in rare spellings only).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_saep.errors import UserError

from ._base import Answer, Requirement, Task, TaskQuestion, TaskResult
from ._files import ID, read_json, read_json_lines, read_task_questions, required, write_json
from ._matching import match_labels, texts_by_id, unasked
from ._scoring import grouped, mean_metric, mean_rows
from ._sources import COCO_IMAGES, EVAL_ZIP, SHORT_ANSWER
from ._vqa_answers import human_answers, normalize_vqa_answer, vqa_score

TEST_FILE = "llava_vqav2_mscoco_test2015.jsonl"
QUESTION_FILES = {"test-dev": "llava_vqav2_mscoco_test-dev2015.jsonl", "test": TEST_FILE}
VAL_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
VAL_ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


def upload_records(question_ids: Sequence[Any], texts: Mapping[str, str]) -> list[dict[str, Any]]:
    """EvalAI's upload: a normalised answer per question of the test set, empty where there is none.

    Args:
        texts: answer by question_id as a text.
    """
    return [
        {"question_id": each, "answer": normalize_vqa_answer(texts[str(each)]) if str(each) in texts else ""}
        for each in question_ids
    ]


class VQAv2(Task):
    """Short answers, uploaded for test-dev and test, scored here for val."""

    name = "vqav2"
    title = "VQAv2"
    folder_name = "vqav2"
    splits = ("test-dev", "test", "val")
    default_splits = ("test-dev",)
    hidden_label_splits = ("test-dev", "test")

    def requirements(self, folder: Path, split: str) -> list[Requirement]:
        """LLaVA's question files and the test images; for val, the official files."""
        if split == "val":
            page = "https://visualqa.org/download.html"
            return [
                Requirement(path=folder / VAL_QUESTIONS, source=page),
                Requirement(path=folder / VAL_ANNOTATIONS, source=page, purpose="score"),
                Requirement(path=folder / "val2014", source=f"{COCO_IMAGES}/val2014.zip", purpose="images"),
            ]
        return [
            Requirement(path=folder / QUESTION_FILES[split], source=EVAL_ZIP),
            Requirement(path=folder / TEST_FILE, source=EVAL_ZIP, purpose="score"),
            Requirement(path=folder / "test2015", source=f"{COCO_IMAGES}/test2015.zip", purpose="images"),
        ]

    def questions(self, folder: Path, split: str) -> list[TaskQuestion]:
        """LLaVA's question file; for val, the official questions with LLaVA's instruction."""
        if split != "val":
            return read_task_questions(folder / QUESTION_FILES[split], folder / "test2015")
        path = folder / VAL_QUESTIONS
        records = required(read_json(path, dict), "questions", str(path), list)
        return [_val_question(record, folder, f"{path}, question {number}") for number, record in enumerate(records)]

    def score(self, folder: Path, split: str, answers: Sequence[Answer]) -> TaskResult:
        """Soft accuracy on val, overall and by type of answer."""
        if split != "val":
            raise UserError(f"vqav2:{split}: the labels are hidden; EvalAI scores the upload file (challenge 830)")
        path = folder / VAL_ANNOTATIONS
        records = required(read_json(path, dict), "annotations", str(path), list)
        annotations = {str(required(record, "question_id", str(path), ID)): record for record in records}
        asked = self.questions(folder, split)
        matched = match_labels(asked, answers, lambda question: annotations.get(str(question.question_id)), str(path))
        scores = [
            _annotation_score(annotation, text, str(path))
            for annotation, text in zip(matched.labels, matched.texts, strict=True)
        ]
        types = (str(annotation.get("answer_type", "unknown")) for annotation in matched.labels)
        return TaskResult(
            task=self.name,
            split=split,
            metrics=(mean_metric("accuracy", scores),),
            rows=mean_rows(grouped(types, scores)),
            exclusions=matched.exclusions + unasked(annotations, (str(q.question_id) for q in asked), path),
        )

    def export(self, folder: Path, split: str, answers: Sequence[Answer], output: Path) -> list[Path]:
        """EvalAI's upload file for test-dev and test."""
        if split == "val":
            return []
        question_ids = [
            required(record, "question_id", TEST_FILE, ID) for record in read_json_lines(folder / TEST_FILE)
        ]
        listed = set(map(str, question_ids))
        absent = [q.question_id for q in self.questions(folder, split) if str(q.question_id) not in listed]
        if absent:
            raise UserError(
                f"{folder / TEST_FILE}: lacks {len(absent)} questions of {QUESTION_FILES[split]}, the first one "
                f"{absent[0]!r}; an upload lists all of the test set"
            )
        records = upload_records(question_ids, texts_by_id(answers))
        return [write_json(output / f"vqav2_{split}_upload.json", records)]


def _val_question(record: Mapping[str, Any], folder: Path, place: str) -> TaskQuestion:
    question_id, text = required(record, "question_id", place, ID), required(record, "question", place, str)
    image_id = required(record, "image_id", place, int)
    return TaskQuestion(
        question_id=question_id,
        text=text + SHORT_ANSWER,
        prompt=text + SHORT_ANSWER,
        images=(folder / "val2014" / f"COCO_val2014_{image_id:012d}.jpg",),
    )


def _annotation_score(annotation: Mapping[str, Any], text: str | None, path: str) -> float:
    if text is None:
        return 0.0
    place = f"{path}: question {annotation['question_id']}"
    return vqa_score(text, human_answers(annotation, place), place)


TASK = VQAv2()
