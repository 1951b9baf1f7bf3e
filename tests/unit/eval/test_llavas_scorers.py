"""LLaVA's scorers and converters under their names: the same lines and files as theirs, for the same input."""

import importlib
import importlib.util
import json
import re
import runpy
import sys
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

from llava_saep.errors import UserError
from llava_saep.eval import eval_pope, eval_science_qa, eval_textvqa, m4c_evaluator, summarize_gpt_review

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden" / "llava"
INPUTS = GOLDEN / "eval_inputs"
REFERENCE = json.loads((GOLDEN / "eval_scores.json").read_text(encoding="utf-8"))


def flags(**places):
    return [word for name, place in places.items() for word in (f"--{name.replace('_', '-')}", str(place))]


def run_script(name, *arguments):
    """Run `main` of scripts/<name>.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main([str(argument) for argument in arguments]) == 0


POPE = {
    "annotation_dir": INPUTS / "pope" / "coco",
    "question_file": INPUTS / "pope" / "questions.jsonl",
    "result_file": INPUTS / "pope" / "answers.jsonl",
}


def test_eval_pope_prints_llavas_tables(capsys):
    assert eval_pope.main(flags(**POPE)) == 0
    said = capsys.readouterr()
    tables = said.out.split("====================================\n")[:-1]
    categories = REFERENCE["pope"]["categories"]
    assert [table.splitlines()[0] for table in tables] == [
        f"Category: {name}, # samples: 28" for name in sorted(categories)
    ]
    for table, name in zip(tables, sorted(categories), strict=True):
        expected = categories[name]
        assert table.splitlines()[1:] == [
            "TP\tFP\tTN\tFN\t",
            "\t".join(str(expected[each]) for each in ("TP", "FP", "TN", "FN")),
            f"Accuracy: {expected['accuracy']}",
            f"Precision: {expected['precision']}",
            f"Recall: {expected['recall']}",
            f"F1 score: {expected['f1']}",
            f"Yes ratio: {expected['yes_ratio']}",
            expected["line"],
        ]
    # The reference answers have "p" for a prompt, and nothing else is amiss.
    assert said.err == "84 answers to another wording, scored all the same (as 0, 1, 2, 3, 4)\n"


def test_eval_pope_counts_what_does_not_fit_together(tmp_path, capsys):
    lines = POPE["result_file"].read_text().splitlines()
    short = tmp_path / "short.jsonl"
    short.write_text("\n".join([*lines[:-1], lines[0], json.dumps({"question_id": 999, "text": "yes"})]))
    eval_pope.main(flags(**{**POPE, "result_file": short}))
    said = capsys.readouterr()
    assert "# samples: 27" in said.out
    assert "1 questions without an answer, counted as wrong (as 83)" in said.err
    assert "1 answers that a later one replaces, ignored (as 0)" in said.err
    assert "1 answers to no question, ignored (as 999)" in said.err


def test_eval_pope_counts_questions_without_a_file_of_labels(tmp_path, capsys):
    for name in ("adversarial", "popular"):
        path = POPE["annotation_dir"] / f"coco_pope_{name}.json"
        (tmp_path / path.name).write_bytes(path.read_bytes())
    eval_pope.main(flags(**{**POPE, "annotation_dir": tmp_path}))
    said = capsys.readouterr()
    assert said.out.count("Category: ") == 2
    assert "28 questions are left out: there is no coco_pope_random.json in --annotation-dir\n" in said.err


def test_eval_pope_names_a_folder_without_labels(tmp_path):
    with pytest.raises(UserError, match="has no file named coco_pope_<category>.json"):
        eval_pope.main(flags(**{**POPE, "annotation_dir": tmp_path}))


def test_eval_textvqa_prints_llavas_lines(tmp_path, capsys):
    annotations = INPUTS / "textvqa" / "ann.json"
    eval_textvqa.main(flags(annotation_file=annotations, result_file=INPUTS / "textvqa" / "llava.jsonl"))
    assert capsys.readouterr().out == REFERENCE["textvqa"]["stdout"]
    (tmp_path / "llava.jsonl").write_bytes((INPUTS / "textvqa" / "llava.jsonl").read_bytes())
    (tmp_path / "notes.txt").touch()
    eval_textvqa.main(flags(annotation_file=annotations, result_dir=tmp_path))
    assert capsys.readouterr().out == REFERENCE["textvqa"]["stdout"] + "Skipping notes.txt\n"


def test_eval_textvqa_counts_what_it_does_not_score_once(tmp_path, capsys):
    """Its number is LLaVA's, the mean over the lines that are there."""
    lines = (INPUTS / "textvqa" / "llava.jsonl").read_text().splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:2]))
    eval_textvqa.main(flags(annotation_file=INPUTS / "textvqa" / "ann.json", result_file=tmp_path / "a.jsonl"))
    said = capsys.readouterr()
    assert said.out == "a\nSamples: 2\nAccuracy: 100.00%\n\n"
    num_annotated = len(json.loads((INPUTS / "textvqa" / "ann.json").read_text())["data"])
    assert said.err.splitlines() == [
        f"{tmp_path}/a.jsonl: {num_annotated - 1} annotated questions have no answer, and count in no number",
        f"{tmp_path}/a.jsonl: 1 answers are to a question that has another one; all count",
    ]


def test_eval_textvqa_names_an_answer_to_no_question(tmp_path):
    answer = {
        "question_id": "im0",
        "prompt": "Unasked?\nAnswer the question using a single word or phrase.",
        "text": "x",
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(answer))
    with pytest.raises(UserError, match="a.jsonl: image 'im0' has no annotated question 'unasked\\?'"):
        eval_textvqa.main(flags(annotation_file=INPUTS / "textvqa" / "ann.json", result_file=tmp_path / "a.jsonl"))


def test_eval_science_qa_prints_and_writes_what_llavas_does(tmp_path, capsys):
    places = {"base_dir": INPUTS / "sqa", "result_file": INPUTS / "sqa" / "pred.jsonl"}
    outputs = {"output_file": tmp_path / "output.json", "output_result": tmp_path / "result.json"}
    assert eval_science_qa.main(flags(**places, **outputs)) == 0
    expected = REFERENCE["scienceqa"]
    assert capsys.readouterr().out.strip() == expected["stdout"]
    result = json.loads(outputs["output_result"].read_text())
    assert {key: result[key] for key in ("acc", "correct", "count", "results")} == {
        key: expected[key] for key in ("acc", "correct", "count", "results")
    }
    analyses = json.loads(outputs["output_file"].read_text())
    assert [each["question_id"] for each in analyses["correct"]] == expected["correct_ids"]
    parsed = {each["question_id"]: each["parsed_ans"] for each in analyses["correct"] + analyses["incorrect"]}
    assert parsed == expected["parsed"]


def test_summary_of_reviews_is_llavas(tmp_path, capsys):
    review = INPUTS / "review" / "r_model.jsonl"
    assert summarize_gpt_review.main(["-f", str(review)]) == 0
    assert capsys.readouterr().out == REFERENCE["gpt_review"]["stdout"]
    (tmp_path / "reviews_m.jsonl").write_text(
        review.read_text() + json.dumps({"question_id": 9, "tuple": [-1, -1]}) + "\n"
    )
    summarize_gpt_review.main(["--dir", str(tmp_path)])
    said = capsys.readouterr()
    assert said.out.splitlines()[1:] == REFERENCE["gpt_review"]["stdout"].splitlines()[1:]
    assert "1 of 5 reviews have no points and are left out" in said.err
    summarize_gpt_review.main(["-f", str(review), "--ignore", "2", "3"])
    assert capsys.readouterr().out.splitlines()[1] == "all 88.2 85.0 75.0"


def test_processor_and_scores_of_m4c_evaluator_are_llavas():
    processor = m4c_evaluator.EvalAIAnswerProcessor()
    assert all(processor(text) == expected for text, expected in REFERENCE["answer_processor"])
    for step, pairs in REFERENCE["answer_processor_steps"].items():
        assert all(getattr(processor, step)(text) == expected for text, expected in pairs)
    stvqa = REFERENCE["stvqa"]
    for (answer, truths), accuracy, anls in zip(stvqa["pairs"], stvqa["acc"], stvqa["anls"], strict=True):
        prediction = [{"pred_answer": answer, "gt_answers": truths}]
        assert m4c_evaluator.STVQAAccuracyEvaluator().eval_pred_list(prediction) == accuracy
        assert m4c_evaluator.STVQAANLSEvaluator().eval_pred_list(prediction) == anls
    records = json.loads((INPUTS / "textvqa" / "ann.json").read_text())["data"]
    prediction = [{"pred_answer": "Three", "gt_answers": records[1]["answers"]}]
    assert m4c_evaluator.TextVQAAccuracyEvaluator().eval_pred_list(prediction) == REFERENCE["textvqa"]["per_sample"][5]


def test_convert_vqav2_writes_and_prints_what_llavas_does(tmp_path, capsys):
    folder = tmp_path / "vqav2"
    for path in (INPUTS / "vqav2").rglob("*.jsonl"):
        copy = folder / path.relative_to(INPUTS / "vqav2")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    run_script("convert_vqav2_for_submission", "--dir", folder, "--ckpt", "ck", "--split", "s")
    assert capsys.readouterr().out == REFERENCE["vqav2_convert"]["stdout"]
    written = folder / "answers_upload" / "s" / "ck.json"
    assert json.loads(written.read_text()) == REFERENCE["vqav2_convert"]["output"]


def test_convert_vizwiz_writes_and_prints_what_llavas_does(tmp_path, capsys):
    upload = tmp_path / "new" / "upload.json"
    places = {"annotation_file": INPUTS / "vizwiz" / "ann.jsonl", "result_upload_file": upload}
    run_script("convert_vizwiz_for_submission", *flags(result_file=INPUTS / "vizwiz" / "res.jsonl", **places))
    assert capsys.readouterr().out == REFERENCE["vizwiz_convert"]["stdout"]
    assert json.loads(upload.read_text()) == REFERENCE["vizwiz_convert"]["output"]
    with pytest.raises(UserError, match="res_missing.jsonl: 2 of 3 questions have no answer"):
        run_script(
            "convert_vizwiz_for_submission", *flags(result_file=INPUTS / "vizwiz" / "res_missing.jsonl", **places)
        )


def converter(name, answers, tmp_path):
    """Arguments of a converter for a file of answers."""
    upload = tmp_path / "upload"
    if name == "convert_vqav2_for_submission":
        place = tmp_path / "vqav2" / "answers" / "s" / "ck" / "merge.jsonl"
        place.parent.mkdir(parents=True)
        place.write_bytes(answers.read_bytes())
        questions = (INPUTS / "vqav2" / "llava_vqav2_mscoco_test2015.jsonl").read_bytes()
        (tmp_path / "vqav2" / "llava_vqav2_mscoco_test2015.jsonl").write_bytes(questions)
        return flags(dir=tmp_path / "vqav2", ckpt="ck", split="s")
    if name == "convert_vizwiz_for_submission":
        places = {"annotation_file": INPUTS / "vizwiz" / "ann.jsonl", "result_file": answers}
        return flags(result_upload_file=upload, **places)
    if name == "convert_seed_for_submission":
        places = {"annotation_file": INPUTS / "seed" / "seed.json", "result_file": answers}
        return flags(result_upload_file=upload, **places)
    return flags(src=answers, dst=upload)


@pytest.mark.parametrize(
    ("name", "source", "has_questions"),
    [
        ("convert_vqav2_for_submission", "vqav2/answers/s/ck/merge.jsonl", True),
        ("convert_vizwiz_for_submission", "vizwiz/res.jsonl", True),
        ("convert_seed_for_submission", "seed/pred.jsonl", True),
        ("convert_gqa_for_eval", "gqa/merge.jsonl", False),
        ("convert_mmvet_for_eval", "mmvet/a.jsonl", False),
    ],
)
def test_converters_count_answers_that_do_not_fit(name, source, has_questions, tmp_path, capsys):
    lines = [line for line in (INPUTS / source).read_text().splitlines() if line.endswith("}")]
    run_script(name, *converter(name, INPUTS / source, tmp_path / "as_it_is"))
    before = capsys.readouterr().err.splitlines()
    stranger = json.dumps({**json.loads(lines[0]), "question_id": "nope"})
    (tmp_path / "answers.jsonl").write_text("\n".join([*lines, lines[0], stranger, stranger]))
    run_script(name, *converter(name, tmp_path / "answers.jsonl", tmp_path))
    counted = dict(line.split(" ", 1)[::-1] for line in before)

    def more(reason, number):
        counted[reason] = str(int(counted.get(reason, 0)) + number)

    more("answers that a later one replaces", 1 if has_questions else 2)
    if has_questions:
        more("answers to no question", 2)
    after = dict(line.split(" ", 1)[::-1] for line in capsys.readouterr().err.splitlines())
    assert after == counted


def test_convert_vqav2_counts_empty_answers(tmp_path, capsys):
    """The totals that LLaVA prints are equal where an answer to no question makes up for a missing one."""
    arguments = converter("convert_vqav2_for_submission", INPUTS / "vqav2/answers/s/ck/merge.jsonl", tmp_path)
    run_script("convert_vqav2_for_submission", *arguments)
    assert "1 questions without an answer" in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("name", ["vqav2", "vizwiz", "gqa", "mmvet"])
def test_converters_write_no_upload_of_nothing(name, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    if name in ("gqa", "mmvet"):
        script, arguments = f"convert_{name}_for_eval", flags(src=empty, dst=tmp_path / "upload")
    else:
        script = f"convert_{name}_for_submission"
        source = "vqav2/answers/s/ck/merge.jsonl" if name == "vqav2" else "vizwiz/res.jsonl"
        arguments = converter(script, INPUTS / source, tmp_path)
        if name == "vqav2":
            (tmp_path / "vqav2" / "llava_vqav2_mscoco_test2015.jsonl").write_text("")
        else:
            arguments[arguments.index("--annotation-file") + 1] = str(empty)
    with pytest.raises(UserError, match="holds no (questions|answers)"):
        run_script(script, *arguments)
    assert not list(tmp_path.rglob("upload*")) and not list(tmp_path.rglob("ck.json"))


def test_convert_gqa_and_mmvet_write_what_llavas_do(tmp_path):
    run_script("convert_gqa_for_eval", *flags(src=INPUTS / "gqa" / "merge.jsonl", dst=tmp_path / "gqa.json"))
    assert json.loads((tmp_path / "gqa.json").read_text()) == REFERENCE["gqa_convert"]["output"]
    run_script("convert_mmvet_for_eval", *flags(src=INPUTS / "mmvet" / "a.jsonl", dst=tmp_path / "mmvet.json"))
    assert json.loads((tmp_path / "mmvet.json").read_text()) == REFERENCE["mmvet_convert"]["output"]


def test_convert_seed_writes_and_prints_what_llavas_does(tmp_path, capsys):
    places = {"annotation_file": INPUTS / "seed" / "seed.json", "result_upload_file": tmp_path / "upload.jsonl"}
    run_script("convert_seed_for_submission", *flags(result_file=INPUTS / "seed" / "pred.jsonl", **places))
    assert capsys.readouterr().out == REFERENCE["seed"]["stdout"]
    written = [json.loads(line) for line in (tmp_path / "upload.jsonl").read_text().splitlines()]
    assert written == REFERENCE["seed"]["output"]
    with pytest.raises(UserError, match="1 of 12 questions have no answer, the first one '111'"):
        run_script("convert_seed_for_submission", *flags(result_file=INPUTS / "seed" / "pred_missing.jsonl", **places))
    assert capsys.readouterr().out == REFERENCE["seed_missing"]["stdout"]


def read_xlsx(path):
    """Cells of the first sheet, row by row, None for empty ones, read without the library that wrote them."""
    space = {"x": "http://schemas.openxmlformats.org/spreadsheetml/2006/main"}
    with zipfile.ZipFile(path) as archive:
        texts = [
            "".join(node.text or "" for node in item.iterfind(".//x:t", space))
            for item in ElementTree.fromstring(archive.read("xl/sharedStrings.xml")).iterfind("x:si", space)
        ]
        sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    rows = []
    for row in sheet.iterfind(".//x:row", space):
        cells = {}
        for cell in row.iterfind("x:c", space):
            assert cell.find("x:f", space) is None, "a formula"
            value = cell.find("x:v", space).text
            column = ord(re.match("[A-Z]", cell.get("r")).group()) - ord("A")
            cells[column] = texts[int(value)] if cell.get("t") == "s" else int(value)
        rows.append([cells.get(column) for column in range(max(cells) + 1)])
    return rows


def test_convert_mmbench_writes_llavas_table(tmp_path, capsys):
    places = {"annotation_file": INPUTS / "mmbench" / "dev.tsv", "result_dir": INPUTS / "mmbench"}
    run_script("convert_mmbench_for_submission", *flags(upload_dir=tmp_path, experiment="exp", **places))
    header, *rows = read_xlsx(tmp_path / "exp.xlsx")
    assert header == REFERENCE["mmbench_convert"]["columns"]
    assert rows == REFERENCE["mmbench_convert"]["rows"]
    assert capsys.readouterr().err == "1 of 5 questions have no answer, 1 answers no question\n"


def test_answers_that_look_like_formulas_or_links_are_uploaded_as_text(tmp_path):
    answers = ["=1+1", "https://example.org", "007", "A\nB", "no\uffffcharacter\ufffe"]
    lines = [json.dumps({"question_id": index, "text": text}) for index, text in enumerate(answers)]
    (tmp_path / "exp.jsonl").write_text("\n".join(lines))
    places = {"annotation_file": INPUTS / "mmbench" / "dev.tsv", "result_dir": tmp_path, "upload_dir": tmp_path}
    run_script("convert_mmbench_for_submission", *flags(experiment="exp", **places))
    expected = [*answers[:4], "no\ufffdcharacter\ufffd"]
    assert [row[6] for row in read_xlsx(tmp_path / "exp.xlsx")[1:]] == expected


@pytest.mark.parametrize("path", ["llava_saep/eval/eval_pope.py", "scripts/convert_gqa_for_eval.py"])
def test_programs_run_by_their_path_and_end_with_one_sentence(path, tmp_path, monkeypatch, capsys):
    arguments = flags(**{**POPE, "result_file": tmp_path / "absent.jsonl"})
    if path.startswith("scripts"):
        arguments = flags(src=tmp_path / "absent.jsonl", dst=tmp_path / "out.json")
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / path), run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip().endswith("absent.jsonl: no such file of answers")


# Of scripts/v1_5/eval: what follows each program there.
PUBLISHED = {
    "model_vqa_mmbench": "--model-path liuhaotian/llava-v1.5-13b --question-file mmbench_dev_20230712.tsv "
    "--answers-file answers/llava-v1.5-13b.jsonl --lang cn --single-pred-prompt --temperature 0 --conv-mode vicuna_v1",
    "model_vqa_science": "--model-path liuhaotian/llava-v1.5-13b --question-file llava_test_CQM-A.json "
    "--image-folder scienceqa/images/test --answers-file a.jsonl --single-pred-prompt --temperature 0 "
    "--conv-mode vicuna_v1",
    "eval_science_qa": "--base-dir scienceqa --result-file a.jsonl --output-file o.jsonl --output-result r.json",
    "eval_pope": "--annotation-dir pope/coco --question-file llava_pope_test.jsonl --result-file a.jsonl",
    "eval_textvqa": "--annotation-file TextVQA_0.5.1_val.json --result-file a.jsonl",
    "summarize_gpt_review": "-f reviews/llava-v1.5-13b.jsonl",
    "eval_gpt_review_bench": "--question questions.jsonl --context context.jsonl --rule llava/eval/table/rule.json "
    "--answer-list answers_gpt4.jsonl answers/llava-v1.5-13b.jsonl --output reviews/llava-v1.5-13b.jsonl",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_argument_lists_of_llavas_scripts_are_understood(name):
    module = importlib.import_module(f"llava_saep.eval.{name}")
    parser = module.build_parser(module.BENCH) if name == "eval_gpt_review_bench" else module.build_parser()
    parser.parse_args(PUBLISHED[name].split())
