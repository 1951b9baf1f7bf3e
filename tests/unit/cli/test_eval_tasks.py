"""`llava-saep eval --task` from its flags to its results, with a tiny model and small benchmarks."""

import json
import os
import shutil
from pathlib import Path

import pytest

from llava_saep.cli import main
from llava_saep.commands.evaluate.flags import parser
from llava_saep.commands.evaluate.model import chosen_output_dir, idle_gpus_hint
from llava_saep.evaluation.answer_files import claimed
from llava_saep.evaluation.asking import fingerprint_with_parts
from llava_saep.evaluation.results import SCHEMA
from llava_saep.evaluation.tasks import JudgedTask, find_task, select_tasks, task_names
from projectors import ProjectorError
from tests.fixtures.benchmarks import write_sample
from tests.fixtures.evaluation_runs import (
    TINY_ADAPTER,
    TINY_MODEL,
    copy_checkpoint,
    write_lines,
    write_mmvet,
    write_pope,
    write_spatial_scenes,
    write_vizwiz_test,
)
from tests.fixtures.judge import chat_reply, running_endpoint

GOLDEN_POPE = Path(__file__).parents[2] / "golden" / "llava" / "eval_inputs" / "pope"


@pytest.fixture
def data_dir(tmp_path):
    """Folders of four benchmarks in LLaVA's layout."""
    for write in (write_pope, write_spatial_scenes, write_mmvet, write_vizwiz_test):
        write(tmp_path / "data")
    return tmp_path / "data"


def run(data_dir, *flags, task="pope,spatial_scenes", code=0):
    """Evaluate, and return what results.json holds per benchmark."""
    output_dir = data_dir.parent / "out"
    model = ["--model-path", str(TINY_MODEL), "--device", "cpu", "--max-new-tokens", "4"]
    places = ["--data-dir", str(data_dir), "--output-dir", str(output_dir)]
    assert main(["eval", "--task", task, *model, *places, *flags]) == code
    return json.loads((output_dir / "results.json").read_text())["results"]


def answer_lines(data_dir, label):
    return [json.loads(line) for line in (data_dir.parent / "out" / label / "answers.jsonl").read_text().splitlines()]


def test_several_benchmarks_are_answered_scored_and_shown(data_dir, capsys):
    results = run(data_dir)
    assert list(results) == ["pope", "spatial_scenes"]
    questions = [json.loads(line) for line in (data_dir / "pope" / "llava_pope_test.jsonl").read_text().splitlines()]
    lines = answer_lines(data_dir, "pope")
    assert [(line["question_id"], line["prompt"]) for line in lines] == [
        (question["question_id"], question["text"]) for question in questions
    ]
    metrics = {metric["name"]: metric for metric in results["pope"]["result"]["metrics"]}
    is_yes = [not {"No", "no", "not"} & set(line["text"].split(".")[0].replace(",", "").split(" ")) for line in lines]
    accuracy = sum(yes == bool(index // 3 % 2) for index, yes in enumerate(is_yes)) / 12
    assert metrics["accuracy"]["value"] == pytest.approx(accuracy)
    assert {row["category"] for row in results["pope"]["result"]["rows"]} == {"adversarial", "popular", "random"}
    shown = capsys.readouterr().out
    assert "pope / random" in shown and "spatial_scenes" in shown
    page = (data_dir.parent / "out" / "results.md").read_text()
    assert "| pope | accuracy |" in page and "greedy, at most 4 tokens" in page


def test_every_result_says_what_made_it(data_dir):
    results = run(data_dir, "--conv-mode", "vicuna_v1")
    entry = json.loads((data_dir.parent / "out" / "pope" / "result.json").read_text())
    assert entry == results["pope"]
    assert entry["schema"] == SCHEMA
    assert entry["prompt"]["template"] == "vicuna_v1"
    assert entry["prompt"]["example"].endswith(
        "USER: <image>\nIs there a large dog in the image?\n"
        "Answer the question using a single word or phrase. ASSISTANT:"
    )
    assert entry["decoding"].items() >= {"max_new_tokens": 4, "temperature": 0.0, "num_beams": 1}.items()
    assert entry["preprocessing"]["aspect_ratio"] in ("square", "pad") and entry["preprocessing"]["size"]
    assert entry["model"]["fingerprint"] == fingerprint_with_parts(TINY_MODEL)
    assert entry["model"]["dtype"] == "float32"
    assert entry["model"]["projector"]["name"] == "mlp" and entry["model"]["tokens_per_image"] > 0
    assert set(entry["data"]["files"]) == {"llava_pope_test.jsonl"} | {
        f"coco/coco_pope_{name}.json" for name in ("adversarial", "popular", "random")
    }
    assert {"llava_saep", "torch", "transformers", "commit"} <= set(entry["program"]["versions"])
    assert entry["program"]["machine"]["processor"] and entry["program"]["date"].endswith("+00:00")
    assert entry["data"]["num_questions"] == 12 and entry["seconds"] > 0


def test_batches_give_the_answers_of_single_questions(data_dir):
    def texts(batch_size):
        shutil.rmtree(data_dir.parent / "out", ignore_errors=True)
        run(data_dir, "--batch-size", str(batch_size))
        return [line["text"] for label in ("pope", "spatial_scenes") for line in answer_lines(data_dir, label)]

    alone = texts(1)
    assert len(set(alone)) > 1  # the model's answers depend on what it sees
    assert texts(5) == alone
    assert texts(64) == alone


def test_second_run_answers_nothing_again_and_a_change_of_decoding_everything(data_dir):
    def ids():
        return [line["answer_id"] for line in answer_lines(data_dir, "pope")]

    run(data_dir, task="pope")
    first = ids()
    run(data_dir, task="pope")
    assert ids() == first
    run(data_dir, "--max-new-tokens", "3", task="pope")
    assert not set(ids()) & set(first)


def test_results_of_earlier_runs_stay_in_the_overview(data_dir):
    run(data_dir, task="pope")
    assert list(run(data_dir, task="spatial_scenes")) == ["pope", "spatial_scenes"]


def test_limit_asks_and_scores_the_first_questions_alone(data_dir):
    results = run(data_dir, "--limit", "3")
    assert [line["question_id"] for line in answer_lines(data_dir, "pope_first_3")] == [0, 1, 2]
    entry = results["pope (first 3)"]
    assert entry["result"]["metrics"][0]["n"] == 3
    assert not any("without an answer" in each["reason"] for each in entry["result"]["exclusions"])
    assert "only the first 3 questions" in entry["notes"][0] and not entry["uploads"]


def test_limited_run_leaves_answers_and_result_of_the_whole_alone(data_dir):
    run(data_dir, task="pope")
    before = (data_dir.parent / "out" / "pope" / "answers.jsonl").read_text()
    assert list(run(data_dir, "--limit", "2", task="pope")) == ["pope", "pope (first 2)"]
    assert (data_dir.parent / "out" / "pope" / "answers.jsonl").read_text() == before


def test_damaged_result_of_an_earlier_run_costs_the_overview_one_entry(data_dir, caplog):
    run(data_dir, task="pope")
    (data_dir.parent / "out" / "pope" / "result.json").write_text('{"schema": "llava-saep-')
    assert list(run(data_dir, task="spatial_scenes")) == ["spatial_scenes"]
    assert "pope/result.json: cannot be read as a result" in caplog.text


def test_hidden_labels_give_upload_files_and_no_score(data_dir, capsys):
    entry = run(data_dir, task="vizwiz")["vizwiz:test"]
    assert entry["result"] is None
    (upload,) = map(Path, entry["uploads"])
    assert [line["image"] for line in json.loads(upload.read_text())] == [f"VizWiz_test_{i:08}.jpg" for i in range(3)]
    assert "labels of these questions are not published" in capsys.readouterr().out


def test_answers_for_a_judge_are_written_and_the_missing_judge_is_said(data_dir, capsys):
    entry = run(data_dir, task="mmvet", code=1)["mmvet"]
    assert entry["result"] is None and len(answer_lines(data_dir, "mmvet")) == 3
    assert "--judge-url and --judge-model" in capsys.readouterr().out
    assert set(json.loads(Path(entry["uploads"][0]).read_text())) == {"v1_0", "v1_1", "v1_2"}


def test_free_answers_are_rated_by_the_judge_that_is_named(data_dir, monkeypatch):
    monkeypatch.setenv("LLAVA_SAEP_JUDGE_KEY", "secret")
    with running_endpoint() as endpoint:
        endpoint.respond = lambda text, times: chat_reply("0.5") if "dog" in text else (500, "", {})
        flags = ["--judge-url", endpoint.url, "--judge-model", "rater"]
        entry = run(data_dir, *flags, task="mmvet")["mmvet"]
        again = run(data_dir, *flags, task="mmvet")["mmvet"]
    assert entry["result"]["metrics"][0]["value"] == 0.5 and again["result"] == entry["result"]
    assert len(endpoint.requests) == 3  # the second run finds the reviews
    assert endpoint.requests[0][2]["Authorization"] == "Bearer secret"
    assert "judge: rater at 127.0.0.1" in entry["notes"][0]
    assert entry["num_failed_judge_requests"] == 0
    assert "secret" not in "".join(
        path.read_text() for path in (data_dir.parent / "out").rglob("*.*") if path.is_file()
    )


def test_requests_that_another_run_may_have_answered_are_counted_in_the_entry(data_dir, monkeypatch):
    """A reply without a score is none of them: the judge has been asked and has answered."""
    monkeypatch.setattr("llava_saep.evaluation.judge.time.sleep", lambda seconds: None)
    annotations = json.loads((data_dir / "mm-vet" / "mm-vet.json").read_text())
    for index, entry in enumerate(annotations.values()):
        entry["question"] = f"Question {index}?"
    (data_dir / "mm-vet" / "mm-vet.json").write_text(json.dumps(annotations))
    replies = {"Question 0?": (503, "busy", {}), "Question 1?": chat_reply("a fine answer")}
    with running_endpoint() as endpoint:
        endpoint.respond = lambda text, times: next(
            (reply for question, reply in replies.items() if question in text), chat_reply("1.0")
        )
        flags = ["--judge-url", endpoint.url, "--judge-model", "rater"]
        results = run(data_dir, *flags, task="mmvet,spatial_scenes")
        assert results["mmvet"]["num_failed_judge_requests"] == 1
        assert results["mmvet"]["result"]["metrics"][0]["n"] == 1
        assert results["spatial_scenes"]["num_failed_judge_requests"] == 0
        replies.clear()
        assert run(data_dir, *flags, task="mmvet")["mmvet"]["num_failed_judge_requests"] == 0


def test_judge_that_refuses_costs_no_answers(data_dir, capsys):
    with running_endpoint() as endpoint:
        endpoint.respond = lambda text, times: (401, "wrong key", {})
        entry = run(data_dir, "--judge-url", endpoint.url, "--judge-model", "rater", task="mmvet", code=1)["mmvet"]
    assert entry["result"] is None and "refuses (status 401): wrong key" in entry["notes"][0]
    assert len(answer_lines(data_dir, "mmvet")) == 3


def test_judge_whose_replies_hold_no_score_costs_no_answers_and_no_other_benchmark(data_dir):
    with running_endpoint() as endpoint:
        endpoint.respond = lambda text, times: chat_reply("a fine answer")
        flags = ["--judge-url", endpoint.url, "--judge-model", "rater"]
        entries = run(data_dir, *flags, task="mmvet,spatial_scenes", code=1)
    assert entries["mmvet"]["result"] is None
    assert "not rated: mmvet: none of the 3 reviews holds a score" in entries["mmvet"]["notes"]
    assert entries["spatial_scenes"]["result"] is not None


def test_question_without_an_answer_is_not_rated_and_counted(data_dir):
    (data_dir / "mm-vet" / "images" / "v1_1.png").write_bytes(b"no image")
    with running_endpoint() as endpoint:
        endpoint.respond = lambda text, times: chat_reply("1.0")
        entry = run(data_dir, "--judge-url", endpoint.url, "--judge-model", "rater", task="mmvet")["mmvet"]
    assert [each["question_id"] for each in entry["excluded_questions"]] == [1]
    assert entry["result"]["metrics"][0]["n"] == 2
    assert [(each["reason"], each["count"]) for each in entry["result"]["exclusions"]] == [
        ("questions without a review", 1)
    ]


@pytest.mark.parametrize("name", task_names())
def test_every_benchmark_runs_from_its_published_files_to_its_result(name, tmp_path):
    """All splits of the samples, images that stand in tables and several rounds among them."""
    task = find_task(name)
    write_sample(name, tmp_path / "data" / task.folder_name)
    splits = ",".join(f"{name}:{split}" for split in task.splits)
    judged = isinstance(task, JudgedTask)
    results = run(tmp_path / "data", task=splits, code=1 if judged else 0)
    assert len(results) == len(task.splits)
    for selected in select_tasks([splits]):
        entry = results[selected.label]
        label = selected.label.replace(":", "_")
        lines = answer_lines(tmp_path / "data", label)
        asked = task.questions(tmp_path / "data" / task.folder_name, selected.split)
        assert [(line["question_id"], line["prompt"]) for line in lines] == [(q.question_id, q.prompt) for q in asked]
        assert (entry["result"] is not None) == (task.has_labels(selected.split) and not judged)
        assert entry["result"] or entry["uploads"] or judged
        assert not entry["excluded_questions"]


def test_question_with_a_damaged_image_counts_as_wrong_and_is_reported(data_dir, capsys):
    image = data_dir / "pope" / "val2014" / "COCO_val2014_000000000002.jpg"
    image.write_bytes(image.read_bytes()[:50])
    entry = run(data_dir, task="pope")["pope"]
    assert [each["question_id"] for each in entry["excluded_questions"]] == [6, 7, 8]
    assert {metric["n"] for metric in entry["result"]["metrics"] if metric["name"] == "accuracy"} == {12}
    (exclusion,) = entry["result"]["exclusions"]
    assert (exclusion["count"], exclusion["effect"]) == (3, "counted as wrong")
    assert "3 of 12 questions could not be put, the first one 6: " in capsys.readouterr().out


def test_damaged_image_stops_the_run_where_that_is_asked_for(data_dir, capsys):
    image = data_dir / "pope" / "val2014" / "COCO_val2014_000000000002.jpg"
    image.write_bytes(b"no image")
    flags = ["--model-path", str(TINY_MODEL), "--device", "cpu", "--data-dir", str(data_dir), "--max-new-tokens", "2"]
    flags += ["--output-dir", str(data_dir.parent / "out"), "--on-bad-image", "error", "--task", "pope"]
    assert main(["eval", *flags]) == 2
    assert "cannot be read as an image" in capsys.readouterr().err


def mistake(capsys, *flags):
    """The message of a command that ends with code 2."""
    assert main(["eval", *map(str, flags)]) == 2
    return capsys.readouterr().err


def test_missing_files_are_said_before_the_model_is_loaded(data_dir, capsys):
    shutil.rmtree(data_dir / "pope" / "val2014")
    message = mistake(capsys, "--task", "pope,gqa", "--model-path", "absent", "--data-dir", data_dir)
    assert "pope: " in message and "val2014 is missing" in message and "val2014.zip" in message
    assert "gqa: " in message and "llava-saep eval doctor" in message


def test_missing_images_are_an_error_unless_they_are_to_be_left_out(data_dir, capsys):
    (data_dir / "pope" / "val2014" / "COCO_val2014_000000000001.jpg").unlink()
    flags = ["--model-path", TINY_MODEL, "--device", "cpu", "--data-dir", data_dir, "--task", "pope"]
    assert "1 images of the questions are missing" in mistake(capsys, *flags, "--output-dir", data_dir.parent / "o")
    assert not (data_dir.parent / "o").exists()
    entry = run(data_dir, "--on-bad-image", "exclude", task="pope")["pope"]
    assert [each["question_id"] for each in entry["excluded_questions"]] == [3, 4, 5]


def test_missing_labels_keep_the_answers_and_say_that_nothing_was_scored(data_dir, capsys):
    shutil.rmtree(data_dir / "pope" / "coco")
    entry = run(data_dir, task="pope", code=1)["pope"]
    assert entry["result"] is None and "not scored: " in entry["notes"][0]
    assert len(answer_lines(data_dir, "pope")) == 12


def test_labels_of_other_questions_keep_the_answers_and_the_benchmarks_that_follow(data_dir):
    for file in (data_dir / "pope" / "coco").iterdir():
        file.write_text(json.dumps({"image": "other.jpg", "text": "Is it?", "label": "yes"}) + "\n")
    results = run(data_dir, code=1)
    assert results["pope"]["result"] is None and "not scored: " in results["pope"]["notes"][0]
    assert results["spatial_scenes"]["result"] is not None


def test_folder_that_is_being_written_is_refused_before_the_model_is_loaded(data_dir, capsys):
    out = data_dir.parent / "out"
    flags = ["--model-path", data_dir.parent / "absent", "--data-dir", data_dir, "--output-dir", out]
    with claimed(out / "spatial_scenes" / "answers.jsonl"):
        assert "another evaluation is writing" in mistake(capsys, *flags, "--task", "pope,spatial_scenes")
        assert "no such folder" in mistake(capsys, *flags, "--task", "pope")


@pytest.mark.parametrize("reason", ["is a file", "takes no files"])
def test_place_that_takes_no_answers_is_told_before_the_model_is_loaded(data_dir, capsys, monkeypatch, reason):
    out = data_dir.parent / "out"
    if reason == "is a file":
        out.write_text("")
    else:
        monkeypatch.setattr(os, "access", lambda folder, mode: False)  # whoever is root may write anywhere
    flags = ["--model-path", "absent", "--data-dir", data_dir, "--output-dir", out, "--task", "pope"]
    place = out if reason == "is a file" else out.parent
    assert f"cannot be written, since {place} {reason}" in mistake(capsys, *flags)


def test_malformed_questions_of_any_benchmark_are_found_before_the_first_is_run(data_dir, capsys):
    (data_dir / "spatial_scenes" / "held_out" / "questions.jsonl").write_text("{\n")
    flags = ["--model-path", TINY_MODEL, "--device", "cpu", "--data-dir", data_dir, "--output-dir", data_dir / "out"]
    assert "questions.jsonl, line 1: is not JSON" in mistake(capsys, *flags, "--task", "pope,spatial_scenes")
    assert not (data_dir / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "pop"], "unknown task 'pop'. Did you mean 'pope'?"),
        (["--task", "pope:dev"], "task 'pope' has no split 'dev'"),
        (["--task", ","], "names no benchmark"),
        (["--task", "pope", "--question_file", "q.jsonl"], "name either benchmarks"),
        ([], "name either benchmarks"),
        (["--task", "pope", "--limit", "0"], "--limit must be at least 1"),
        (["--task", "pope", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--task", "pope", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--task", "mmvet", "--judge-url", "http://x"], "needs both --judge-url and --judge-model"),
        (["--task", "mmvet", "--judge-key-file", "key"], "--judge-key-file is for a judge, and there is none"),
        (["--task", "pope", "--output-dir", TINY_MODEL], "is the model's own folder"),
    ],
)
def test_contradicting_flags_are_refused(flags, message, capsys):
    assert message in mistake(capsys, *flags, "--model-path", TINY_MODEL)


@pytest.mark.parametrize("is_given", [True, False])
def test_folder_of_the_base_takes_no_reports(is_given, capsys, tmp_path):
    """They would change what the base is known by, and with it whether answers are taken for this model's."""
    base = copy_checkpoint(TINY_MODEL, tmp_path / "base")
    adapter = copy_checkpoint(TINY_ADAPTER, tmp_path / "adapter", base=None if is_given else base)
    flags = ["--task", "pope", "--model-path", adapter, "--output-dir", adapter / ".." / "base"]
    flags += ["--model-base", base] if is_given else []
    message = mistake(capsys, *flags)
    assert "is the folder of the model's base, where reports would pass for parts of a model" in message
    assert f"then it is {adapter / 'evaluation'}" in message


JUDGE = ["--judge-url", "http://x", "--judge-model", "m"]
VALUES = {
    "--batch-size": "8",
    "--max-new-tokens": "8",
    "--limit": "3",
    "--on-bad-image": "exclude",
    "--load-8bit": None,
    "--load-4bit": None,
    "--trust-projector-code": None,
    "--blind": None,
}
"""Of flags that take a number, a choice or nothing; all others take any text."""


def given(flag):
    value = VALUES.get(flag, "somewhere")
    return [flag] if value is None else [flag, value]


@pytest.mark.parametrize(
    ("flag", "beside", "message"),
    [
        *(
            (flag, ["--task", "pope", "--model-path", TINY_MODEL], "is for question files (--question-file)")
            for flag in ("--image-folder", "--blind")
        ),
        *(
            (flag, ["--question-file", "q.jsonl", "--model-path", TINY_MODEL], "is for benchmarks (--task)")
            for flag in ("--answers", "--limit", "--data-dir", "--judge-url", "--judge-model", "--judge-key-file")
        ),
        *(
            (flag, ["--task", "pope", "--answers", "a.jsonl"], "is for a model that answers")
            for flag in (
                *("--model-path", "--model-base", "--conv-mode", "--device", "--load-8bit", "--load-4bit"),
                *("--trust-projector-code", "--batch-size", "--max-new-tokens", "--on-bad-image"),
            )
        ),
    ],
)
def test_flags_that_would_change_nothing_are_refused(flag, beside, message, capsys):
    assert f"{flag} {message}" in mistake(capsys, *beside, *given(flag))


@pytest.mark.parametrize("beside", [["--model-path", TINY_MODEL], ["--answers", "a.jsonl"]])
def test_judge_of_answers_that_no_judge_rates_is_refused(beside, capsys, tmp_path):
    message = mistake(capsys, "--task", "pope,gqa" if "--model-path" in beside else "pope", *beside, *JUDGE)
    assert "--judge-url is for benchmarks whose answers a language model rates (llava_bench, mmvet); --task " in message


def test_empty_name_of_an_answer_file_is_said(capsys):
    """As a script gives it whose variable is not set."""
    assert "--answers is empty; name a file of answers" in mistake(capsys, "--task", "pope", "--answers", "")


def test_trusted_projector_of_a_llava_folder_is_trusted_by_all_that_looks_at_it(tmp_path):
    """Only LLaVA's format needs the projector's class to be inspected; ours looks it up when the model is built."""
    folder = tmp_path / "llava"
    shutil.copytree(TINY_MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    blur = f"{Path(__file__).parents[3]}/playground/examples/blur_projector.py:BlurProjector"
    config["mm_vision_tower"] = str(TINY_MODEL.parent / config["mm_vision_tower"])
    config["projector"] = {"name": "blur", "provider": blur, "options": {}}
    (folder / "config.json").write_text(json.dumps(config))
    command = ["--model-path", str(folder), "--output-dir", str(tmp_path / "out"), "--task", "pope"]
    with pytest.raises(ProjectorError, match="trust_projector_code"):
        chosen_output_dir(parser().parse_args(command))
    arguments = parser().parse_args([*command, "--trust-projector-code"])
    assert chosen_output_dir(arguments) == tmp_path / "out"


def test_model_is_needed_unless_there_are_answers(capsys):
    assert "--model-path is missing" in mistake(capsys, "--task", "pope")


def test_answer_files_of_llava_are_scored_without_a_model(tmp_path, capsys):
    """The numbers are those of LLaVA's own scorer on the same files (tests/golden/llava/eval_scores.json)."""
    shutil.copytree(GOLDEN_POPE, tmp_path / "pope")
    (tmp_path / "pope" / "questions.jsonl").rename(tmp_path / "pope" / "llava_pope_test.jsonl")
    answers = tmp_path / "pope" / "answers.jsonl"
    flags = ["--task", "pope", "--answers", str(answers), "--data-dir", str(tmp_path)]
    assert main(["eval", *flags, "--output-dir", str(tmp_path / "out")]) == 0
    assert "pope / adversarial" in capsys.readouterr().out
    entry = json.loads((tmp_path / "out" / "pope" / "result.json").read_text())
    rows = {row["category"]: {m["name"]: m["value"] for m in row["metrics"]} for row in entry["result"]["rows"]}
    assert rows["adversarial"]["accuracy"] == pytest.approx(0.5714285714285714)
    assert rows["random"]["F1"] == pytest.approx(0.5)


def test_answers_without_their_prompts_are_rated(data_dir):
    """Questions are told apart by their ids, as where answers are compared with labels."""
    answers = data_dir.parent / "answers.jsonl"
    write_lines(answers, [{"question_id": index, "text": "a dog"} for index in range(2)])
    places = ["--answers", str(answers), "--data-dir", str(data_dir), "--output-dir", str(data_dir.parent / "out")]
    with running_endpoint() as endpoint:
        endpoint.respond = lambda text, times: chat_reply("1.0")
        judge = ["--judge-url", endpoint.url, "--judge-model", "rater"]
        assert main(["eval", "--task", "mmvet", *places, *judge]) == 0
    entry = json.loads((data_dir.parent / "out" / "mmvet" / "result.json").read_text())
    assert entry["result"]["metrics"][0]["n"] == 2 and entry["num_failed_judge_requests"] == 0
    assert [(each["reason"], each["count"]) for each in entry["result"]["exclusions"]] == [
        ("questions without a review", 1)
    ]


def answers_that_do_not_fit(data_dir, ids):
    """Answers to these questions, one to the last of them again, and one to no question; flags that name the file."""
    lines = [{"question_id": each, "text": f"a dog {number}"} for number, each in enumerate([*ids, ids[-1], "nope"])]
    answers = write_lines(data_dir.parent / "answers.jsonl", lines)
    return ["--answers", str(answers), "--data-dir", str(data_dir), "--output-dir", str(data_dir.parent / "out")]


def test_answers_that_do_not_fit_are_reported_where_a_judge_rates(data_dir):
    path = data_dir / "mm-vet" / "llava-mm-vet.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))  # the third entry is not asked
    with running_endpoint() as endpoint:
        endpoint.respond = lambda text, times: chat_reply("1.0")
        flags = [*answers_that_do_not_fit(data_dir, [1]), "--judge-url", endpoint.url, "--judge-model", "rater"]
        assert main(["eval", "--task", "mmvet", *flags]) == 0
    entry = json.loads((data_dir.parent / "out" / "mmvet" / "result.json").read_text())
    assert [(each["reason"], each["count"], each["examples"]) for each in entry["result"]["exclusions"]] == [
        ("questions without a review", 1, ["0"]),
        ("answers that a later one replaces", 1, ["1"]),
        ("answers to no question", 1, ["nope"]),
        ("annotations in mm-vet.json of no question", 1, ["v1_2"]),
    ]


def test_answers_that_do_not_fit_are_said_where_nothing_is_scored(tmp_path, capsys):
    """An upload to VQAv2 has empty answers where there are none, so that a server's score is low for no reason."""
    write_sample("vqav2", tmp_path / "data" / "vqav2")
    flags = answers_that_do_not_fit(tmp_path / "data", [11])
    assert main(["eval", "--task", "vqav2", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    for words in (
        "1 questions without an answer, the first one 10",
        "1 answers that a later one replaces, the first one 11",
        "1 answers to no question, the first one nope",
    ):
        assert f"vqav2:test-dev: {words}" in lines


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("mmbench", "mmbench_dev_20230712.tsv", "index\tquestion\tA\timage\n"),
        ("vsr", "zeroshot/test.jsonl", "\n"),
        ("vizwiz:val", "val.json", "[]"),
        ("vqav2:val", "v2_OpenEnded_mscoco_val2014_questions.json", '{"questions": []}'),
        ("scienceqa", "llava_test_CQM-A.json", "[]"),
    ],
)
def test_file_without_questions_is_said_before_the_model_is_loaded(name, file, content, tmp_path, capsys):
    task = find_task(name.partition(":")[0])
    folder = tmp_path / task.folder_name
    write_sample(task.name, folder)
    (folder / file).write_text(content)
    answers = write_lines(tmp_path / "answers.jsonl", [{"question_id": 1, "text": "A"}])
    for flags in (["--answers", answers], ["--model-path", "absent", "--output-dir", tmp_path / "out"]):
        message = mistake(capsys, "--task", name, "--data-dir", tmp_path, *flags)
        assert f"{folder / file}: holds no questions" in message
    assert main(["eval", "doctor", "--task", name, "--data-dir", str(tmp_path)]) == 1


def test_answer_file_is_of_one_set_of_questions(tmp_path, capsys):
    message = mistake(capsys, "--task", "pope,gqa", "--answers", tmp_path / "a.jsonl")
    assert "--answers is one file of one set of questions" in message


def test_absent_answer_file_is_said(tmp_path, capsys):
    assert "a.jsonl: no such" in mistake(capsys, "--task", "pope", "--answers", tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("name", "ids"),
    [("pope", []), ("pope", ["other"]), ("vqav2", ["other"]), ("mmvet", ["other"]), ("textvqa:val_ocr", ["0a"])],
)
def test_answers_of_which_none_fits_are_not_scored(name, ids, tmp_path, capsys):
    """As labels that know none of the questions; a score of 0 would be of nothing. The last one lacks its prompt."""
    task = find_task(name.partition(":")[0])
    write_sample(task.name, tmp_path / "data" / task.folder_name)
    answers = write_lines(tmp_path / "answers.jsonl", [{"question_id": each, "text": "yes"} for each in ids])
    message = mistake(capsys, "--task", name, "--answers", answers, "--data-dir", tmp_path / "data")
    assert f"answers.jsonl: none of its {len(ids)} answers is to one of the " in message
    assert not (tmp_path / task.name).exists()


def test_answers_to_questions_that_are_not_there_are_not_scored(tmp_path, capsys):
    shutil.copytree(GOLDEN_POPE, tmp_path / "pope")
    message = mistake(
        capsys, "--task", "pope", "--answers", tmp_path / "pope" / "answers.jsonl", "--data-dir", tmp_path
    )
    assert "pope: " in message and "llava_pope_test.jsonl is missing. eval.zip" in message
    assert "val2014" not in message  # images are not asked for again
    assert "--question-file" not in message


@pytest.mark.parametrize(
    ("device", "num_gpus", "num_ranks", "is_said"),
    [(None, 8, 1, True), (None, 8, 8, False), (None, 1, 1, False), ("cuda:3", 8, 1, False), (None, 0, 1, False)],
)
def test_gpus_that_would_idle_are_pointed_out(device, num_gpus, num_ranks, is_said):
    hint = idle_gpus_hint(device, num_gpus, num_ranks)
    assert ("torchrun --nproc_per_node 8 -m llava_saep.commands.evaluate" in hint) == is_said == bool(hint)


def test_list_names_every_benchmark_with_its_splits(capsys):
    assert main(["eval", "--task", "list"]) == 0
    listed = capsys.readouterr().out
    assert "mmbench_cn" in listed and "(dev_all_rounds)" in listed and "test-dev*" in listed


def test_doctor_is_content_where_everything_is_there(data_dir, capsys):
    assert main(["eval", "doctor", "--task", "pope,spatial_scenes", "--data-dir", str(data_dir)]) == 0
    said = capsys.readouterr().out
    assert "ok       pope: 12 questions" in said and "ready: pope, spatial_scenes" in said
    assert "MISSING" not in said


def test_doctor_names_what_is_missing_and_where_to_get_it(data_dir, capsys):
    shutil.rmtree(data_dir / "pope" / "coco")
    (data_dir / "spatial_scenes" / "held_out" / "images" / "3.png").unlink()
    assert main(["eval", "doctor", "--task", "pope,gqa,spatial_scenes", "--data-dir", str(data_dir)]) == 1
    said = capsys.readouterr().out
    lines = said.splitlines()
    label = next(index for index, line in enumerate(lines) if "coco_pope_random.json" in line)
    assert lines[label].startswith("MISSING  pope: ") and "cannot be scored" in lines[label]
    assert "github.com/AoiDragon/POPE" in lines[label + 1]
    assert "1 of their images are missing, the first one" in said
    assert "something is missing: gqa, pope, spatial_scenes" in said


def test_doctor_has_scenes_written_where_it_looked(tmp_path, capsys):
    folder = tmp_path / "my data"
    assert main(["eval", "doctor", "--task", "spatial_scenes", "--data-dir", str(folder)]) == 1
    assert f"-> python -m playground.spatial_scenes --output '{folder}/spatial_scenes'" in capsys.readouterr().out


def test_doctor_says_where_there_is_no_folder_at_all(tmp_path, capsys):
    assert main(["eval", "doctor", "--task", "pope", "--data-dir", str(tmp_path / "absent")]) == 1
    assert capsys.readouterr().out.startswith(f"--data-dir {tmp_path / 'absent'}: no such folder here")


def test_doctor_finds_questions_that_cannot_be_read(data_dir, capsys):
    (data_dir / "pope" / "llava_pope_test.jsonl").write_text('{"question_id": 1}\n')
    assert main(["eval", "doctor", "--task", "pope", "--data-dir", str(data_dir), "--json"]) == 1
    finding = json.loads(capsys.readouterr().out)[-1]
    assert finding["level"] == "missing" and "line 1: text must be a text" in finding["detail"]
