"""One evaluation from a saved model to its reports: answers with the images and, for comparison, without them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llava_saep.errors import UserError
from llava_saep.evaluation.metrics import Score, score_answers
from llava_saep.evaluation.questions import Question
from llava_saep.evaluation.report import json_report, markdown_table, report_rows
from llava_saep.evaluation.runner import answer_questions, model_fingerprint


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model answered, and how well it did with the images and without them (`blind_*`; empty where not run)."""

    questions: tuple[Question, ...]
    answers: dict[str | int, str]
    scores: tuple[Score, ...]
    blind_scores: tuple[Score, ...] = ()


def evaluate_model(
    model_path: Path,
    questions: Sequence[Question],
    *,
    image_folder: Path,
    output_dir: Path,
    batch_size: int,
    max_new_tokens: int,
    blind: bool = True,
    chance: Mapping[str, float] | None = None,
    model_id: str | None = None,
    device: str | None = None,
    trust_projector_code: bool = False,
) -> Evaluation:
    """Answer the questions greedily, write answers and reports to `output_dir`, and return the scores.

    `chance` is passed on to `score_answers`. `model_id` names the model in answers and reports; None: as its folder.
    Writes answers.jsonl, answers_blind.jsonl (when `blind`), report.json and report.md.
    """
    if not model_path.is_dir():
        raise UserError(f"{model_path}: no such folder; --model_path names what training wrote (its --output_dir)")
    from llava_saep.generation import GenerationOptions, Predictor

    model_id = model_id or model_path.name
    predictor = Predictor.from_pretrained(model_path, device=device, trust_projector_code=trust_projector_code)
    answer = partial(
        answer_questions,
        questions,
        partial(predictor.generate, options=GenerationOptions(max_new_tokens=max_new_tokens)),
        image_folder=image_folder,
        model_id=model_id,
        # Another limit gives other answers, so it is part of what made them.
        fingerprint=f"{model_fingerprint(model_path)}-{max_new_tokens}",
        batch_size=batch_size,
    )
    question_ids = [question.question_id for question in questions]
    texts = answer(answers_path=output_dir / "answers.jsonl", description="with images")
    answers = dict(zip(question_ids, texts, strict=True))
    scores = score_answers(questions, answers, chance)
    blind_scores: list[Score] = []
    if blind:
        blind_path = output_dir / "answers_blind.jsonl"
        blind_texts = answer(answers_path=blind_path, blind=True, description="without images")
        blind_scores = score_answers(questions, dict(zip(question_ids, blind_texts, strict=True)), chance)
    _write_reports(output_dir, model_id, scores, blind_scores)
    return Evaluation(
        questions=tuple(questions), answers=answers, scores=tuple(scores), blind_scores=tuple(blind_scores)
    )


def _write_reports(output_dir: Path, model_id: str, scores: Sequence[Score], blind_scores: Sequence[Score]) -> None:
    report = json.dumps(json_report(model_id, scores, blind_scores), indent=2)
    (output_dir / "report.json").write_text(report + "\n", encoding="utf-8")
    (output_dir / "report.md").write_text(markdown_table(report_rows(scores, blind_scores)) + "\n", encoding="utf-8")
