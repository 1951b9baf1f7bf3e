"""`llava-saep compare`: flags, the embedded recipe, and trained models compared from the command line."""

import importlib
import json
import logging
import multiprocessing
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava_saep.cli import main
from llava_saep.commands.compare import forget_changed_models, measure_speeds, plan
from llava_saep.commands.compare.flags import parser
from llava_saep.errors import UserError
from llava_saep.evaluation.asking import fingerprint_with_parts
from llava_saep.evaluation.comparison import runs, steps
from llava_saep.evaluation.comparison.choice import parse_choices
from llava_saep.evaluation.comparison.folder import claimed
from llava_saep.evaluation.comparison.recipe import read_recipe
from llava_saep.evaluation.comparison.steps import Placement, Step
from llava_saep.evaluation.questions import Question, as_task_question
from playground import comparison
from playground.quickstart import SMALL_PROJECTORS
from tests.fixtures.benchmarks import write_sample
from tests.fixtures.evaluation_runs import write_mmvet, write_vizwiz_test
from tests.fixtures.judge import chat_reply, running_endpoint
from tests.fixtures.saved_models import write_saved_model
from tests.fixtures.tiny import write_bases, write_image


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "name either --projectors"),
        ("--projectors saep --model-path a", "name either --projectors"),
        ("--projectors saep,sape", "Did you mean 'saep'"),
        ("--projectors saep --seeds 0", "--seeds must be at least 1, got 0"),
        ("--projectors saep --seed 1", "--seed: a comparison takes a number of seeds, --seeds N"),
        ("--projectors saep --jobs 0", "--jobs must be at least 1, got 0"),
        ("--projectors saep --reference mlp2x_gelu", "--reference mlp2x_gelu: not among what is compared: saep"),
        ("--projectors saep --question-file q.jsonl", "--question-file belongs to --model-path"),
        ("--projectors saep --recipe r.json --budget quick", "--budget belongs to the embedded job"),
        ("--projectors saep --recipe r.json", "--recipe r.json: cannot be read (No such file or directory)"),
        ("--model-path a --budget quick", "--budget says how to train"),
        ("--model-path a --task pope --question-file q", "--model-path needs either"),
        ("--model-path a --task pop", "Did you mean 'pope'"),
        ("--model-path a --question-file q --limit 3", "--limit is for benchmarks"),
        ("--projectors saep --max-new-tokens 5", "--max-new-tokens belongs to --model-path"),
        ("--projectors saep --image-folder images", "--image-folder belongs to --model-path"),
        ("--projectors saep --task pope", "--task belongs to --model-path"),
        ("--model-path a b", "--model-path needs either --question-file or --task"),
        ("--projectors saep --data-dir d", "--data-dir belongs to --model-path"),
        ("--projectors saep --batch-size 5", "--batch-size belongs to --model-path"),
        ("--projectors saep --trust-projector-code", "--trust-projector-code belongs to --model-path"),
        ("--projectors saep --judge-model m", "--judge-model belongs to --model-path"),
        ("--model-path a --question-file q --seeds 2", "--seeds says how to train"),
        ("--model-path a --question-file q --data-dir d", "--data-dir is for benchmarks"),
        ("--model-path a --question-file q --judge-url u", "--judge-url is for benchmarks"),
        ("--model-path a --task mmvet --judge-url u", "a judge needs both"),
        ("--model-path a --task pope --judge-url u --judge-model m", "--task pope names none"),
        ("--model-path a --task pope --image-folder i", "--image-folder belongs to --question-file"),
        ("--projectors saep --device gpu9", "--device gpu9: expected cpu"),
    ],
)
def test_mistakes_end_in_one_sentence(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparison, "make_dataset", None)  # nothing is generated before the flags are right
    monkeypatch.chdir(tmp_path)
    if "--device" in flags:
        flags += f" --recipe {write_own_recipe(tmp_path)}/recipe.json"
    assert main(["compare", "--output-dir", str(tmp_path / "out"), *flags.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def write_own_recipe(folder):
    """A recipe of somebody's own, with its questions; returns its folder."""
    own = folder / "own"
    (own / "images").mkdir(parents=True)
    (own / "questions.jsonl").write_text('{"question_id": 1, "text": "?", "answer": "yes"}\n')
    stage = {"name": "stage1", "flags": {"max_steps": 1}}
    recipe = {"stages": [stage], "question_file": "{recipe}/questions.jsonl", "image_folder": "{recipe}/images"}
    (own / "recipe.json").write_text(json.dumps(recipe))
    return own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": []}, "has no stages"),
        ({"stages": [{"name": "a b", "flags": {}}]}, "its name must be one word"),
        ({"stages": [{"name": "a", "flags": {"--seed": 1}}]}, "without hyphens"),
        ({"stages": [{"name": "a", "flags": {"seed": 1}}]}, "the comparison sets it itself"),
        ({"stages": [{"name": "evaluation", "flags": {}}]}, "not evaluation or speed"),
        ({"stages": [{"name": "a"}]}, 'stage 1 must be {"name"'),
        ({"question_file": "{recipe}/none.jsonl"}, "none.jsonl: no such file"),
        ({"image_folder": "{recipe}/none"}, "none: no such folder"),
        ({"chance_file": "{recipe}/none"}, "chance_file .*none: no such file"),
        ({"question": 1}, "got question; expected a JSON object with stages and question_file"),
        ({"batch_size": "many"}, "batch_size 'many': expected a whole number of at least 1"),
        ({"batch_size": True}, "batch_size True: expected a whole number of at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens 0: expected a whole number of at least 1"),
        ({"stages": 2}, "stages 2: expected a list"),
        ({"question_file": ["a.jsonl"]}, r"question_file \['a.jsonl'\]: expected a text"),
        ({"projector_options": "stride=2"}, "projector_options 'stride=2': expected a JSON object of texts"),
        ({"projector_options": {"saep": {"stride": 2}}}, "projector_options {.*}: expected a JSON object of texts"),
    ],
)
def test_mistakes_in_a_recipe_are_named(tmp_path, change, message):
    path = write_own_recipe(tmp_path) / "recipe.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        read_recipe(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projector_options": {"sapp": "stride=2"}}, "Did you mean 'saep'"),
        (
            {"stages": [{"name": "a", "flags": {"data_path": "nothere.json"}}]},
            "stage a: --data_path nothere.json",
        ),
        (
            {"stages": [{"name": "a", "flags": {"data_path": "{previous}/x"}}]},
            "{previous} is the stage before",
        ),
        ({"stages": [{"name": "a", "flags": {"max_steps": "few"}}]}, "stage a: argument --max_steps"),
        ({"stages": [{"name": "a", "flags": {"learnig_rate": 1}}]}, "stage a: .*learnig_rate"),
    ],
)
def test_stages_that_would_fail_are_told_before_the_first_begins(tmp_path, capsys, monkeypatch, change, message):
    path = write_own_recipe(tmp_path) / "recipe.json"
    monkeypatch.setattr(plan, "_check_placeable", lambda choices, recipe: None)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    command = ["compare", "--projectors", "saep", "--recipe", str(path), "--device", "cpu"]
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "out").exists()


def test_stage_may_start_from_the_model_of_the_stage_before(tmp_path):
    path = write_own_recipe(tmp_path) / "recipe.json"
    flags = {"model_name_or_path": "{previous}", "vision_tower": "none-is-read"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "stages": [{"name": "stage2", "flags": flags}]}))
    recipe, _ = read_recipe(path)
    plan._check_placeable(parse_choices("saep"), recipe)  # there is no such model yet, and that is no mistake


def test_null_in_a_recipe_is_the_default(tmp_path):
    path = write_own_recipe(tmp_path) / "recipe.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_new_tokens": None, "batch_size": None}))
    recipe, _ = read_recipe(path)
    assert (recipe.max_new_tokens, recipe.batch_size) == (None, 32)


def test_installation_without_the_playground_is_told_where_it_is(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(plan, "EMBEDDED", tmp_path / "playground" / "comparison.py")
    assert main(["compare", "--projectors", "saep", "--output-dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "the embedded job is not installed" in error and "--recipe FILE" in error


def test_embedded_recipe_is_the_quick_starts_and_belongs_to_one_folder(tmp_path):
    settings = comparison.BUDGETS["smoke"]
    comparison.write_recipe(tmp_path, world="cells", settings=settings)
    recipe, _ = read_recipe(tmp_path / "recipe.json")
    assert [stage.name for stage in recipe.stages] == ["stage1", "stage2"]
    stage1, stage2 = (stage.flags for stage in recipe.stages)
    assert stage1["learning_rate"] == settings.stage1_learning_rate and stage1["tune_mm_mlp_adapter"] is True
    assert stage2["max_steps"] == settings.stage2_steps and stage2["per_device_train_batch_size"] == 4
    assert recipe.projector_options == SMALL_PROJECTORS
    assert set(recipe.chance) >= {"overall", "relation", "count"}
    held_out = json.loads(Path(stage2["eval_data_path"]).read_text())
    assert len(held_out) == settings.num_held_out_images
    assert held_out[0]["conversations"][0]["value"].startswith("<image>\n")
    assert not any("<image>" in turn["value"] for turn in held_out[0]["conversations"][1:])

    before = (tmp_path / "data" / "train" / "stage2.json").stat().st_mtime_ns
    comparison.write_recipe(tmp_path, world="cells", settings=settings)  # the same again: nothing is made anew
    assert (tmp_path / "data" / "train" / "stage2.json").stat().st_mtime_ns == before
    for world, budget in (("free", "smoke"), ("cells", "quick")):
        with pytest.raises(UserError, match="holds a comparison with another budget, world or recipe"):
            comparison.write_recipe(tmp_path, world=world, settings=comparison.BUDGETS[budget])


def test_a_number_as_budget_is_stage_2s_steps():
    settings = comparison.budget_settings("120")
    assert (settings.stage1_steps, settings.stage2_steps) == (60, 120)
    assert settings.num_train_images == 8000
    for budget in ("some", "1", "-5", "2.5"):
        with pytest.raises(UserError, match=f"--budget {budget}: expected smoke, quick, standard, full, or a number"):
            comparison.budget_settings(budget)


@pytest.fixture
def models(tmp_path):
    """Two saved models and a file of questions, some about one image; the folder that holds them."""
    bases = write_bases(tmp_path / "bases")
    for name in ("saep", "mlp2x_gelu"):
        write_saved_model(tmp_path / name / "stage2", bases, projector=name)
    (tmp_path / "held" / "images").mkdir(parents=True)
    lines = []
    for index in range(4):
        write_image(tmp_path / "held" / "images" / f"{index}.png", seed=index)
        line = {"question_id": index, "image": f"{index}.png", "text": "Which?", "category": "kind", "answer": "red"}
        lines.append(json.dumps(line))
    (tmp_path / "held" / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_trained_models_are_compared_by_their_answers(models, monkeypatch, capsys):
    monkeypatch.setattr(runs, "_context", lambda device: multiprocessing.get_context("fork"))
    command = ["compare", "--model-path", str(models / "saep" / "stage2"), str(models / "mlp2x_gelu" / "stage2")]
    command += ["--question-file", str(models / "held" / "questions.jsonl"), "--max-new-tokens", "4"]
    command += ["--output-dir", str(models / "out"), "--device", "cpu"]
    assert main(command) == 0
    results = json.loads((models / "out" / "results.json").read_text())
    page = (models / "out" / "report.html").read_text()
    assert "<h1>Models compared</h1>" in page and "<th>model</th>" in page and "<th>projector</th>" not in page
    assert "training, s" not in page and "generated images" not in page and "divide the projectors" not in page
    assert sorted(entry["label"] for entry in results["entries"]) == ["mlp2x_gelu-stage2", "saep-stage2"]
    for entry in results["entries"]:
        assert entry["speed"]["tokens_per_image"] == {"saep-stage2": 9, "mlp2x_gelu-stage2": 36}[entry["label"]]
        assert entry["speed"]["num_projector_parameters"] > 0 and entry["speed"]["first_token_seconds"] > 0
        assert entry["runs"][0]["train_seconds"] is None
    assert results["num_questions"] == 4 and results["differences"][0]["mcnemar_p"] == 1.0
    assert "Accuracy against tokens" in (models / "out" / "report.html").read_text()

    capsys.readouterr()
    answers = models / "out" / "runs" / "saep-stage2" / "evaluation" / "answers.jsonl"
    before = answers.stat().st_mtime_ns
    assert main(command) == 0
    assert "2 of 2 runs are there already" in capsys.readouterr().out
    assert answers.stat().st_mtime_ns == before
    write_saved_model(models / "saep" / "stage2", write_bases(models / "bases2", seed=5), seed=5)
    assert main(command) == 0
    assert answers.stat().st_mtime_ns > before  # another model under the same name


def test_benchmarks_are_put_to_each_model(models, monkeypatch):
    monkeypatch.setattr(runs, "_context", lambda device: multiprocessing.get_context("fork"))
    shutil.copytree(models / "held", models / "data" / "spatial_scenes" / "held_out")
    command = ["compare", "--model-path", str(models / "saep" / "stage2"), str(models / "mlp2x_gelu" / "stage2")]
    write_sample("pope", models / "data" / "pope")
    command += ["--task", "spatial_scenes,pope", "--data-dir", str(models / "data"), "--max-new-tokens", "4"]
    assert main([*command, "--output-dir", str(models / "out"), "--device", "cpu"]) == 0
    results = json.loads((models / "out" / "results.json").read_text())
    first = next(row for row in results["benchmarks"] if row["benchmark"] == "spatial_scenes")
    assert (first["metric"], first["counts"]) == ("accuracy", [4])
    for label in ("saep-stage2", "mlp2x_gelu-stage2"):
        answers = models / "out" / "runs" / label / "evaluation" / "spatial_scenes" / "answers.jsonl"
        own = json.loads((answers.parent / "result.json").read_text())["result"]["metrics"][0]
        assert first["values"][label]["value"] == own["value"] and len(answers.read_text().splitlines()) == 4
    page = (models / "out" / "report.html").read_text()
    charts = re.findall("<h3>([^<]*)</h3><figure class=wide[^>]*><svg", page)
    assert "<h2>Benchmarks</h2>" in page and charts == ["pope, F1", "spatial_scenes, accuracy"]
    assert "| spatial_scenes | accuracy | 4 |" in (models / "out" / "report.md").read_text()


def test_what_was_left_out_of_benchmarks_is_told_and_other_settings_are_another_comparison(models, monkeypatch, capsys):
    monkeypatch.setattr(runs, "_context", lambda device: multiprocessing.get_context("fork"))
    shutil.copytree(models / "held", models / "data" / "spatial_scenes" / "held_out")
    (models / "data" / "spatial_scenes" / "held_out" / "images" / "3.png").write_bytes(b"no image")
    command = ["compare", "--model-path", str(models / "saep" / "stage2"), "--task", "spatial_scenes"]
    command += ["--data-dir", str(models / "data"), "--output-dir", str(models / "out"), "--device", "cpu"]
    assert main([*command, "--max-new-tokens", "4"]) == 0
    remark = "spatial_scenes: 1 of 4 questions could not be put, the first one 3"
    assert remark in capsys.readouterr().out
    for name in ("report.md", "report.html", "results.json"):
        assert remark in (models / "out" / name).read_text(), name
    assert main([*command, "--max-new-tokens", "5"]) == 2
    assert "holds another comparison (other recipe; evaluation is done in 1 of its runs" in capsys.readouterr().err


def test_judge_rates_free_answers_and_one_that_fails_is_asked_again(models, monkeypatch, capsys):
    monkeypatch.setattr(runs, "_context", lambda device: multiprocessing.get_context("fork"))
    monkeypatch.setattr("llava_saep.evaluation.judge.time.sleep", lambda seconds: None)
    annotations = write_mmvet(models / "data") / "mm-vet.json"
    annotations.write_text(annotations.read_text().replace("What?", "Which?", 1))
    shutil.copytree(models / "held", models / "data" / "spatial_scenes" / "held_out")
    command = ["compare", "--model-path", str(models / "saep" / "stage2"), str(models / "mlp2x_gelu" / "stage2")]
    command += ["--task", "mmvet,spatial_scenes", "--data-dir", str(models / "data"), "--max-new-tokens", "4"]
    command += ["--output-dir", str(models / "out"), "--device", "cpu"]

    def ratings():
        rows = json.loads((models / "out" / "results.json").read_text())["benchmarks"]
        by_name = {row["benchmark"]: [value["value"] for value in row["values"].values()] for row in reversed(rows)}
        assert len(by_name["spatial_scenes"]) == 2  # whatever becomes of the judge
        return by_name.get("mmvet")

    def answer_ids():
        path = models / "out" / "runs" / "saep-stage2" / "evaluation" / "mmvet" / "answers.jsonl"
        return [json.loads(line)["answer_id"] for line in path.read_text().splitlines()]

    assert main(command) == 0 and ratings() is None
    assert "name one with --judge-url and --judge-model" in capsys.readouterr().out
    before = answer_ids()
    with running_endpoint() as endpoint:
        command += ["--judge-url", endpoint.url, "--judge-model", "rater"]
        endpoint.respond = lambda text, times: (401, "wrong key", {})
        assert main(command) == 1 and ratings() is None
        assert "mmvet: not rated: the judge" in capsys.readouterr().out
        busy = (503, "busy", {})
        endpoint.respond = lambda text, times: busy if "Which?" in text else chat_reply("0.5")
        assert main(command) == 1
        assert "mmvet: the judge failed on" in capsys.readouterr().out
        endpoint.respond = lambda text, times: chat_reply("0.5")
        assert main(command) == 0 and ratings() == [0.5, 0.5]
    assert answer_ids() == before
    assert main(command) == 0 and ratings() == [0.5, 0.5]  # nothing is left to ask


def test_benchmarks_without_scores_are_told_as_such(models, monkeypatch):
    monkeypatch.setattr(runs, "_context", lambda device: multiprocessing.get_context("fork"))
    write_vizwiz_test(models / "data")
    command = ["compare", "--model-path", str(models / "saep" / "stage2"), "--task", "vizwiz"]
    command += ["--data-dir", str(models / "data"), "--max-new-tokens", "4", "--device", "cpu"]
    assert main([*command, "--output-dir", str(models / "out")]) == 0
    page = (models / "out" / "report.html").read_text()
    assert "<h2>Benchmarks</h2>" in page and "labels of these questions are not published" in page
    assert "not run" not in page and "0 questions" not in page


def test_timing_that_failed_with_another_seed_is_forgotten_when_one_succeeds(tmp_path):
    done = [Step(name="evaluation", function=print)]
    finished = []
    for seed in (0, 1):
        folder = tmp_path / f"seed{seed}"
        folder.mkdir()
        (folder / "evaluation.json").write_text("{}")
        finished.append(runs.Run(label="a", seed=seed, folder=folder, model_path=folder, steps=tuple(done)))
    (tmp_path / "seed1" / "failure.json").write_text('{"step": "speed", "error": "no memory"}')
    made = SimpleNamespace(
        runs=finished,
        questions=[as_task_question(Question(question_id=1, text="?", image="a.png"), tmp_path)],
        trusted=frozenset(),
        placement=Placement(device="cpu"),
    )
    measure_speeds(made, SimpleNamespace(do_step=lambda run, step: False))
    assert finished[1].failure == "speed: no memory"
    measure_speeds(made, SimpleNamespace(do_step=lambda run, step: True))
    assert finished[1].failure is None


def test_speed_and_answers_of_another_model_under_the_same_name_are_forgotten(models, monkeypatch):
    """Also where the answers had no record, as while a judge fails."""
    folder = models / "out"
    command = ["--model-path", str(models / "saep" / "stage2"), "--output-dir", str(folder), "--device", "cpu"]
    command += ["--question-file", str(models / "held" / "questions.jsonl")]
    with claimed(folder):
        made = plan.plan_comparison(parser().parse_args(command))
        (run,) = made.runs
        run.folder.mkdir(parents=True)
        facts = {"model_fingerprint": fingerprint_with_parts(run.model_path)}
        for name in ("evaluation", "speed"):
            (run.folder / f"{name}.json").write_text(json.dumps(facts))
        forget_changed_models(made)
        assert sorted(path.name for path in run.folder.iterdir()) == ["evaluation.json", "speed.json"]
        (run.folder / "evaluation.json").unlink()
        write_saved_model(models / "saep" / "stage2", write_bases(models / "bases2", seed=5), seed=5)
        forget_changed_models(made)
        assert list(run.folder.iterdir()) == []


def test_peak_of_answering_is_that_of_all_tries_of_one_model(tmp_path, monkeypatch):
    peaks = iter([900, 300, 400])
    monkeypatch.setattr("llava_saep.train.memory.peak_memory_bytes", lambda device: next(peaks))
    found = [steps._peak_of_answering(tmp_path, fingerprint, "cpu") for fingerprint in ("a", "a", "b")]
    assert [one["peak_memory_bytes"] for one in found] == [900, 900, 400]


def test_processes_are_forked_from_a_server_that_is_quiet_first(monkeypatch):
    """bitsandbytes, which comes with peft, recommends a kernel on some processors when it is imported."""
    name = runs._PRELOADED[0]
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.setLevel(logging.NOTSET)
    monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.import_module(name)
    assert not logger.isEnabledFor(logging.WARNING)


def test_images_that_are_missing_are_found_before_the_training(tmp_path, capsys, monkeypatch):
    own = write_own_recipe(tmp_path)
    monkeypatch.setattr(plan, "_check_placeable", lambda choices, recipe: None)
    (own / "questions.jsonl").write_text('{"question_id": 1, "image": "a.png", "text": "?", "answer": "yes"}\n')
    command = ["compare", "--projectors", "saep", "--recipe", str(own / "recipe.json"), "--device", "cpu"]
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "a.png" in error and "The recipe's image_folder is" in error and "--image-folder" not in error
    assert not (tmp_path / "out").exists()


def test_folder_without_a_model_is_told_before_anything_is_asked(models, capsys):
    (models / "empty").mkdir()
    command = ["compare", "--model-path", str(models / "saep" / "stage2"), str(models / "empty")]
    command += ["--question-file", str(models / "held" / "questions.jsonl"), "--output-dir", str(models / "out")]
    assert main(command) == 2
    assert f"{models / 'empty'} has no config.json" in capsys.readouterr().err
    assert not (models / "out").exists()


def test_folders_are_told_apart_by_the_end_of_their_paths():
    labelled = plan.labelled(["a/one/stage2", "b/two/stage2"])
    assert list(labelled) == ["one-stage2", "two-stage2"]
    assert list(plan.labelled(["x/saep", "x/mlp"])) == ["saep", "mlp"]
    with pytest.raises(UserError, match="one folder twice"):
        plan.labelled(["x/saep", "x/saep"])
