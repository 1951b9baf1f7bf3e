"""One evaluation on a question file: answers with the images and, for comparison, without them, and their reports."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_saep.evaluation.asking import AskedModel, ModelChoice
from llava_saep.evaluation.fingerprints import questions_fingerprint
from llava_saep.evaluation.metrics import Score, score_answers
from llava_saep.evaluation.questions import DEFAULT_MAX_NEW_TOKENS, Question, as_task_question
from llava_saep.evaluation.report import json_report, markdown_table, report_rows
from llava_saep.evaluation.results import describe_program
from llava_saep.evaluation.runner import (
    Answers,
    BadImagePolicy,
    ExcludedQuestion,
    answer_questions,
    check_images,
)

if TYPE_CHECKING:
    from llava_saep.generation import GenerationOptions


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model answered, and how well it did with the images and without them (`blind_*`; empty where not run).

    `excluded` holds questions that could not be put; they have no answer and count in no score.
    """

    questions: tuple[Question, ...]
    answers: dict[str | int, str]
    scores: tuple[Score, ...]
    blind_scores: tuple[Score, ...] = ()
    excluded: tuple[ExcludedQuestion, ...] = ()


def evaluate_model(
    model_path: Path,
    questions: Sequence[Question],
    *,
    image_folder: Path,
    output_dir: Path,
    batch_size: int,
    max_new_tokens: int | None,
    blind: bool = True,
    chance: Mapping[str, float] | None = None,
    model_id: str | None = None,
    device: str | None = None,
    trust_projector_code: bool = False,
) -> Evaluation:
    """Answer the questions greedily, write answers and reports to `output_dir`, and return the scores.

    `model_id` names the model in answers and reports; None: as its folder. The rest as `evaluate_questions`.
    """
    choice = ModelChoice(
        path=model_path,
        model_id=model_id or model_path.name,
        device=device,
        trust_projector_code=trust_projector_code,
    )
    evaluation = evaluate_questions(
        choice,
        questions,
        image_folder=image_folder,
        output_dir=output_dir,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        blind=blind,
        chance=chance,
    )
    assert evaluation is not None, "one process alone"
    return evaluation


def evaluate_questions(
    choice: ModelChoice,
    questions: Sequence[Question],
    *,
    image_folder: Path,
    output_dir: Path,
    batch_size: int,
    max_new_tokens: int | None,
    blind: bool = True,
    chance: Mapping[str, float] | None = None,
    on_bad_image: BadImagePolicy | None = None,
) -> Evaluation | None:
    """Answer the questions greedily, write answers and reports to `output_dir`, and return the scores on rank 0.

    Writes answers.jsonl, answers_blind.jsonl (when `blind`), report.json and report.md.

    Args:
        max_new_tokens: None: `DEFAULT_MAX_NEW_TOKENS`, or less where the model's context is short.
        chance: passed on to `score_answers`.
        on_bad_image: as in `BenchmarkSettings`.
    Raises:
        UserError, ProjectorError: the model cannot be loaded, images are missing, or see `answer_questions`.
    """
    asked = [as_task_question(question, image_folder) for question in questions]
    if on_bad_image != "exclude":
        check_images(asked)
    model = AskedModel.load(choice)
    options = model.answer_options(max_new_tokens, DEFAULT_MAX_NEW_TOKENS, "questions")
    ask = partial(model.asking, options, batch_size=batch_size, on_bad_image=on_bad_image or "exclude")
    answer = partial(answer_questions, asked, model_id=choice.model_id, fingerprint=model.answers_fingerprint(options))
    path, *blind_paths = answer_files(output_dir, blind=blind)
    seeing = answer(ask(), answers_path=path, description="with images")
    blinded = None
    for blind_path in blind_paths:
        blinded = answer(ask(blind=True), answers_path=blind_path, description="without images")
    if seeing is None:
        return None
    evaluation = _score(questions, seeing, blinded, chance)
    _write_reports(output_dir, choice.model_id, evaluation, _describe(model, options, asked))
    return evaluation


def answer_files(output_dir: Path, *, blind: bool) -> list[Path]:
    """Where the answers with the images go, and those without them when `blind`."""
    return [output_dir / name for name in ("answers.jsonl", *(("answers_blind.jsonl",) if blind else ()))]


def _score(
    questions: Sequence[Question], seeing: Answers, blinded: Answers | None, chance: Mapping[str, float] | None
) -> Evaluation:
    """Score the questions that could be put, with images and without by the same ones."""
    left_out = {each.position for each in seeing.excluded}
    asked = [question for position, question in enumerate(questions) if position not in left_out]
    answers = _by_id(questions, seeing)
    blind_answers = None if blinded is None else _by_id(questions, blinded)
    return Evaluation(
        questions=tuple(questions),
        answers=answers,
        scores=tuple(score_answers(asked, answers, chance)),
        blind_scores=() if blind_answers is None else tuple(score_answers(asked, blind_answers, chance)),
        excluded=seeing.excluded,
    )


def _by_id(questions: Sequence[Question], answers: Answers) -> dict[str | int, str]:
    pairs = zip(questions, answers.texts, strict=True)
    return {question.question_id: text for question, text in pairs if text is not None}


def _describe(model: AskedModel, options: GenerationOptions, asked: Sequence[Any]) -> dict[str, Any]:
    """What the numbers were made with."""
    return {
        "model": model.describe(),
        "prompt": model.describe_prompt(asked[0] if asked else None),
        "decoding": dataclasses.asdict(options),
        "preprocessing": model.describe_preprocessing(),
        "data": {"questions_fingerprint": questions_fingerprint(asked), "num_questions": len(asked)},
        "program": describe_program(model.predictor.model.device),
    }


def _write_reports(output_dir: Path, model_id: str, evaluation: Evaluation, made_with: Mapping[str, Any]) -> None:
    scores, blind_scores = evaluation.scores, evaluation.blind_scores
    excluded = [{"question_id": each.question_id, "reason": each.reason} for each in evaluation.excluded]
    report = {**json_report(model_id, scores, blind_scores), "excluded_questions": excluded, **made_with}
    text = json.dumps(report, indent=2, ensure_ascii=False)
    (output_dir / "report.json").write_text(text + "\n", encoding="utf-8")
    table = markdown_table(report_rows(scores, blind_scores))
    note = f"\n\n{excluded_note(evaluation)}" if excluded else ""
    (output_dir / "report.md").write_text(f"{table}{note}\n", encoding="utf-8")


def excluded_note(evaluation: Evaluation) -> str:
    """What the scores are not about, in one sentence."""
    first = evaluation.excluded[0]
    return (
        f"{len(evaluation.excluded)} of {len(evaluation.questions)} questions could not be put and count in no score, "
        f"the first one {first.question_id!r}: {first.reason}"
    )
