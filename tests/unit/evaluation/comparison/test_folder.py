"""The folder of a comparison: whose it is, and which changes of a recipe it goes on with."""

import json
import logging

import pytest

from llava_saep.errors import UserError
from llava_saep.evaluation.comparison.folder import claimed, write_plan

STAGES = [{"name": "stage1", "flags": {"max_steps": 10}}, {"name": "stage2", "flags": {"max_steps": 20}}]
RECIPE = {"title": "a", "stages": STAGES, "question_file": "q.jsonl", "batch_size": 32}
OTHER_STAGE2 = [STAGES[0], {"name": "stage2", "flags": {"max_steps": 21}}]
OTHER_STAGE1 = [{"name": "stage1", "flags": {"max_steps": 11}}, STAGES[1]]
RENAMED_STAGE2 = [STAGES[0], {"name": "finetune", "flags": {"max_steps": 20}}]


def test_folder_of_another_comparison_is_refused(tmp_path):
    with claimed(tmp_path / "out"):
        write_plan(tmp_path / "out", {"kind": "training", "device": "cpu"})
    with (
        claimed(tmp_path / "out"),
        pytest.raises(UserError, match="holds another comparison \\(other device\\)"),
    ):
        write_plan(tmp_path / "out", {"kind": "training", "device": "cuda"})
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["device"] == "cpu"


def test_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds thesis.txt and is no comparison's"), claimed(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="is a file"), claimed(tmp_path / "thesis.txt"):
        pass


def test_folder_in_use_is_refused(tmp_path):
    with claimed(tmp_path), pytest.raises(UserError, match="another comparison is at work"), claimed(tmp_path):
        pass
    with claimed(tmp_path):
        write_plan(tmp_path, {"kind": "training"})


def test_mistake_leaves_no_new_folder_and_nothing_of_an_old_one_is_lost(tmp_path):
    with pytest.raises(UserError), claimed(tmp_path / "new"):
        raise UserError("a flag is wrong")
    assert not (tmp_path / "new").exists()
    (tmp_path / "old" / "data").mkdir(parents=True)
    with pytest.raises(UserError), claimed(tmp_path / "old"):
        raise UserError("a flag is wrong")
    assert (tmp_path / "old" / "data").is_dir()


def test_plan_of_earlier_code_that_lacks_a_key_is_gone_on_from(tmp_path):
    (tmp_path / "comparison.json").write_text('{"kind": "training"}')
    (tmp_path / "runs" / "saep" / "seed0").mkdir(parents=True)
    (tmp_path / "runs" / "saep" / "seed0" / "evaluation.json").write_text("{}")
    write_plan(tmp_path, {"kind": "training", "questions": "abc"})
    assert json.loads((tmp_path / "comparison.json").read_text())["questions"] == "abc"
    with pytest.raises(UserError, match="other questions; evaluation is done in 1 of its runs"):
        write_plan(tmp_path, {"kind": "training", "questions": "abd"})


@pytest.mark.parametrize(
    ("done", "change", "refused_for"),
    [
        pytest.param(["stage1"], {"stages": OTHER_STAGE2}, None, id="stage that no run has done"),
        pytest.param(["stage1"], {"stages": RENAMED_STAGE2}, None, id="stage with another name"),
        pytest.param(["stage1"], {"stages": STAGES[:1]}, None, id="stage less"),
        pytest.param(["stage1", "stage2"], {"stages": OTHER_STAGE2}, "stage2", id="stage that one run has done"),
        pytest.param(["stage1", "stage2"], {"stages": RENAMED_STAGE2}, "stage2", id="done stage with another name"),
        pytest.param(["stage1"], {"stages": OTHER_STAGE1}, "stage1", id="first stage"),
        pytest.param(["stage2"], {"stages": OTHER_STAGE1}, "stage2", id="stage before one that is done"),
        pytest.param([], {"stages": OTHER_STAGE1}, None, id="nothing done"),
        pytest.param(["stage1"], {"projector_options": {"saep": "{}"}}, "stage1", id="options of a projector"),
        pytest.param(["stage1", "stage2"], {"max_new_tokens": 5}, None, id="answers that no run has given"),
        pytest.param(["evaluation"], {"max_new_tokens": 5}, "evaluation", id="answers that one run has given"),
        pytest.param(["speed"], {"question_file": "r.jsonl"}, "speed", id="time with the first questions"),
        pytest.param(["stage1", "stage2", "evaluation"], {"title": "b", "batch_size": 4}, None, id="nothing of weight"),
    ],
)
def test_recipe_may_be_corrected_where_no_run_has_come_to(tmp_path, caplog, done, change, refused_for):
    plan, changed = {"kind": "training", "recipe": RECIPE}, {"kind": "training", "recipe": {**RECIPE, **change}}
    write_plan(tmp_path, plan)
    run_folder = tmp_path / "runs" / "saep" / "seed0"
    run_folder.mkdir(parents=True)
    for step in done:
        (run_folder / f"{step}.json").write_text("{}")
    if refused_for is None:
        with caplog.at_level(logging.WARNING):
            write_plan(tmp_path, changed)
        assert json.loads((tmp_path / "comparison.json").read_text()) == changed
        assert "the recipe changed since" in caplog.text
        return
    with pytest.raises(UserError, match=rf"other recipe; .*{refused_for} is done in 1 of its runs.*\); name another"):
        write_plan(tmp_path, changed)
    assert json.loads((tmp_path / "comparison.json").read_text()) == plan


@pytest.mark.parametrize("run", ["saep/seed0", "saep-stage2"])
def test_reworded_question_is_another_comparison_once_one_was_answered(tmp_path, run):
    """Answers that are there belong to the old words."""
    write_plan(tmp_path, {"kind": "training", "questions": "abc"})
    write_plan(tmp_path, {"kind": "training", "questions": "abd"})
    (tmp_path / "runs" / run).mkdir(parents=True)
    (tmp_path / "runs" / run / "evaluation.json").write_text("{}")
    with pytest.raises(UserError, match="other questions; evaluation is done in 1 of its runs"):
        write_plan(tmp_path, {"kind": "training", "questions": "abe"})


def test_reworded_question_is_not_passed_over_where_the_recipe_has_another_title_too(tmp_path):
    """The title alone has no say in what was done; the questions have."""
    write_plan(tmp_path, {"recipe": RECIPE, "questions": "abc"})
    (tmp_path / "runs" / "saep" / "seed0").mkdir(parents=True)
    (tmp_path / "runs" / "saep" / "seed0" / "evaluation.json").write_text("{}")
    with pytest.raises(UserError, match="other questions and recipe; evaluation is done in 1 of its runs"):
        write_plan(tmp_path, {"recipe": {**RECIPE, "title": "b"}, "questions": "abd"})
