"""Scores, readings of answers and upload files equal what LLaVA's own programs gave on the same files."""

import json
import re
import shutil
from pathlib import Path

import pytest

from llava_saep.errors import UserError
from llava_saep.evaluation.tasks import _mmbench as mmbench
from llava_saep.evaluation.tasks import (
    find_task,
    gqa,
    llava_bench,
    mmvet,
    pope,
    scienceqa,
    seed_bench,
    textvqa,
    vizwiz,
    vqav2,
)
from llava_saep.evaluation.tasks._files import read_answer_file, read_answers, read_json_lines
from llava_saep.evaluation.tasks._matching import texts_by_id
from llava_saep.evaluation.tasks._vqa_answers import (
    human_agreement,
    normalize_vqa_answer,
    normalize_words,
    remove_punctuation,
    vqa_score,
)

GOLDEN = Path(__file__).parents[3] / "golden" / "llava"
INPUTS = GOLDEN / "eval_inputs"
REFERENCE = json.loads((GOLDEN / "eval_scores.json").read_text(encoding="utf-8"))


def test_pope_reads_answers_as_llava():
    read = [[text, pope.parse_yes_no(text)] for text, _ in REFERENCE["pope"]["text_to_pred"]]
    assert read == REFERENCE["pope"]["text_to_pred"]


def test_pope_scores_equal_llavas(tmp_path):
    shutil.copytree(INPUTS / "pope", tmp_path / "pope")
    (tmp_path / "pope" / "questions.jsonl").rename(tmp_path / "pope" / pope.QUESTION_FILE)
    result = find_task("pope").score(tmp_path / "pope", "test", read_answers(INPUTS / "pope" / "answers.jsonl"))
    scores = {row.category: {metric.name: metric.value for metric in row.metrics} for row in result.rows}
    names = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "F1": "f1", "yes ratio": "yes_ratio"}
    assert scores == {
        category: {ours: reference[theirs] for ours, theirs in names.items()}
        for category, reference in REFERENCE["pope"]["categories"].items()
    }
    # The reference answers have "p" for a prompt.
    assert [each.effect for each in result.exclusions] == ["scored all the same"]


def test_pope_defines_no_ratio_where_llava_divides_by_zero():
    counts = pope.count_yes_no(["no", "no"], ["yes", "no"])
    assert (counts.precision, counts.recall, counts.f1, counts.accuracy) == (None, 0.0, None, 0.5)
    assert pope.count_yes_no(["yes", "no"], ["no", "no"]).recall is None


@pytest.mark.parametrize("text", [text for text, _ in REFERENCE["answer_processor"]])
def test_answers_are_normalised_as_by_llavas_processor(text):
    assert normalize_vqa_answer(text) == dict(map(tuple, REFERENCE["answer_processor"]))[text]


@pytest.mark.parametrize(
    ("step", "function"),
    [("process_punctuation", remove_punctuation), ("process_digit_article", normalize_words)],
)
def test_each_step_of_the_normalisation_is_llavas(step, function):
    pairs = REFERENCE["answer_processor_steps"][step]
    assert [[text, function(text)] for text, _ in pairs] == pairs


def test_textvqa_scores_equal_llavas_answer_by_answer():
    annotations = textvqa.read_annotations(INPUTS / "textvqa" / "ann.json")
    answers = read_answers(INPUTS / "textvqa" / "llava.jsonl")
    scores = [textvqa.score_answer(answer, annotations, "file") for answer in answers]
    assert scores == REFERENCE["textvqa"]["per_sample"]
    assert sum(scores) / len(scores) == REFERENCE["textvqa"]["accuracy"]


def test_agreement_with_people_equals_llavas():
    records = json.loads((INPUTS / "textvqa" / "ann.json").read_text())["data"]
    expected = REFERENCE["textvqa"]["answer_scores"]  # of the first records
    assert [human_agreement(record["answers"]) for record in records[: len(expected)]] == expected


@pytest.mark.parametrize(("prompt", "question"), REFERENCE["textvqa"]["prompt_processor"])
def test_textvqa_finds_the_question_in_a_prompt_as_llava(prompt, question):
    if isinstance(question, dict):  # LLaVA's assertion or attribute error
        with pytest.raises(UserError, match="cannot tell the question"):
            textvqa.question_of_prompt(prompt)
    else:
        assert textvqa.question_of_prompt(prompt) == question


def test_textvqa_knows_no_prompt_with_ocr_tokens_and_a_fourth_line():
    with pytest.raises(UserError, match="cannot tell the question"):
        textvqa.question_of_prompt("What?\nReference OCR token: x\nand more\nAnswer.")


def test_another_number_of_human_answers_than_ten_is_refused():
    with pytest.raises(UserError, match="question 7: has 9 answers of people"):
        vqa_score("yes", ["yes"] * 9, "question 7")


def science_outcomes():
    problems, ids = scienceqa.read_problems(INPUTS / "sqa", "test")
    answers = {str(answer.question_id): answer for answer in read_answers(INPUTS / "sqa" / "pred.jsonl")}
    return scienceqa.judge_problems(problems, ids, answers, "problems.json")


def test_scienceqa_reads_letters_as_llava():
    outcomes = science_outcomes()
    assert {outcome.problem_id: outcome.letter for outcome in outcomes} == REFERENCE["scienceqa"]["parsed"]
    assert {outcome.problem_id: outcome.index for outcome in outcomes} == REFERENCE["scienceqa"]["results"]


def test_scienceqa_scores_equal_llavas():
    outcomes = science_outcomes()
    right = [outcome.problem_id for outcome in outcomes if outcome.is_right]
    with_image = [outcome.is_right for outcome in outcomes if outcome.has_image]
    assert right == REFERENCE["scienceqa"]["correct_ids"]
    assert 100 * len(right) / len(outcomes) == pytest.approx(REFERENCE["scienceqa"]["acc"], abs=1e-12)  # one rounding
    share = float(re.search(r"IMG-Accuracy: ([\d.]+)%", REFERENCE["scienceqa"]["stdout"]).group(1))
    assert round(100 * sum(with_image) / len(with_image), 2) == share


def test_scienceqa_refuses_fewer_letters_than_right_choices_need():
    problems, ids = scienceqa.read_problems(INPUTS / "sqa", "test")
    with pytest.raises(UserError, match="problem .*: the right choice is number 2, which none of the letters AB means"):
        scienceqa.judge_problems(problems, ids, {}, "problems.json", "AB")


def test_gqa_predictions_equal_llavas():
    records = gqa.prediction_records(read_answers(INPUTS / "gqa" / "merge.jsonl"))
    assert records == REFERENCE["gqa_convert"]["output"]


def test_vqav2_upload_equals_llavas():
    folder = INPUTS / "vqav2"
    ids = [record["question_id"] for record in read_json_lines(folder / vqav2.TEST_FILE)]
    file = read_answer_file(folder / "answers" / "s" / "ck" / "merge.jsonl")
    texts = texts_by_id(file.answers)
    assert vqav2.upload_records(ids, texts) == REFERENCE["vqav2_convert"]["output"]
    assert f"error_line: {file.num_broken_lines}\n" in REFERENCE["vqav2_convert"]["stdout"]


def test_vizwiz_upload_equals_llavas():
    questions = read_json_lines(INPUTS / "vizwiz" / "ann.jsonl")
    texts = texts_by_id(read_answers(INPUTS / "vizwiz" / "res.jsonl"))
    assert vizwiz.upload_records(questions, texts, "file") == REFERENCE["vizwiz_convert"]["output"]
    incomplete = texts_by_id(read_answers(INPUTS / "vizwiz" / "res_missing.jsonl"))
    with pytest.raises(UserError, match="file: 2 of 3 questions have no answer, the first one 2"):
        vizwiz.upload_records(questions, incomplete, "file")


def test_mmvet_results_equal_llavas():
    assert mmvet.results_by_id(read_answers(INPUTS / "mmvet" / "a.jsonl")) == REFERENCE["mmvet_convert"]["output"]


def test_seed_bench_upload_equals_llavas():
    annotations, _ = seed_bench.read_seed_annotations(INPUTS / "seed" / "seed.json")
    texts = texts_by_id(read_answers(INPUTS / "seed" / "pred.jsonl"))
    assert seed_bench.upload_records(annotations, texts, "file") == REFERENCE["seed"]["output"]
    with pytest.raises(UserError, match="1 of 12 questions have no answer, the first one '111'"):
        seed_bench.upload_records(annotations, {k: v for k, v in texts.items() if k != "111"}, "file")


def test_seed_bench_scores_equal_llavas(tmp_path):
    annotations = json.loads((INPUTS / "seed" / "seed.json").read_text())
    (tmp_path / seed_bench.ANNOTATION_FILE).write_text(json.dumps(annotations))
    lines = [json.dumps({"question_id": q["question_id"], "text": "Q"}) for q in annotations["questions"]]
    (tmp_path / seed_bench.QUESTION_FILE).write_text("\n".join(lines))
    result = find_task("seed_bench").score(tmp_path, "test", read_answers(INPUTS / "seed" / "pred.jsonl"))
    said = [f"{row.category}: {100 * row.metrics[0].value:.2f}%" for row in result.rows]
    said += [f"{metric.name}: {100 * metric.value:.2f}%" for metric in result.metrics]
    expected = REFERENCE["seed"]["stdout"].replace("Total accuracy", "accuracy").splitlines()
    assert sorted(said) == sorted(expected)


def test_mmbench_upload_equals_llavas():
    rows = mmbench.read_table(INPUTS / "mmbench" / "dev.tsv")
    predictions = mmbench.predictions_by_index(read_answers(INPUTS / "mmbench" / "exp.jsonl"))
    header, *table = mmbench.upload_table(rows, predictions)
    assert header == REFERENCE["mmbench_convert"]["columns"]
    # An empty answer is an empty cell, which reads back as nothing.
    read_back = [[None if cell == "" else cell for cell in row] for row in table]
    assert read_back == REFERENCE["mmbench_convert"]["rows"]


def test_mmbench_options_are_llavas():
    rows = mmbench.read_table(INPUTS / "mmbench" / "dev.tsv")
    options = [mmbench.row_options(row) for row in rows]
    assert all(each in options for each in REFERENCE["mmbench_options"])
    for value, expected in REFERENCE["is_none"]:
        assert mmbench.is_none(value) == expected


def test_summary_of_reviews_equals_llavas():
    lines = read_json_lines(INPUTS / "review" / "r_model.jsonl")
    summaries = llava_bench.summarize_points(lines, "file")
    said = [" ".join(map(str, (category, *each.line_numbers))) for category, each in summaries.items()]
    assert said == REFERENCE["gpt_review"]["stdout"].splitlines()[1:-1]
