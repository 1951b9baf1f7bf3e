"""What is written about results: tables, remarks, and the command that can be given again."""

import json

import pytest

from llava_saep.errors import UserError
from llava_saep.evaluation.results import (
    SCHEMA,
    circumstances,
    collect_results,
    command_line,
    metric_rows,
    read_result,
    remark_lines,
    results_markdown,
    write_overview,
    write_result,
)

METRIC = {"name": "accuracy", "value": 0.5, "n": 8, "unit": "share", "interval": [0.25, 0.75]}


def entry(label="pope", **changes):
    result = {
        "metrics": [METRIC, {**METRIC, "name": "points", "value": 12.5, "unit": "points", "interval": None}],
        "rows": [{"category": "left", "metrics": [{**METRIC, "value": None, "interval": None}]}],
        "exclusions": [{"reason": "unknown ids", "count": 5, "effect": "ignored", "examples": list("abcd")}],
        "notes": ["of the task"],
    }
    machine = {"processor": "a processor"}
    versions = {"llava_saep": "0.1", "torch": "2", "transformers": "5", "commit": None}
    made = {
        "label": label,
        "model": {"id": "m", "fingerprint": "f"},
        "data": {"num_questions": 8},
        "program": {"versions": versions, "machine": machine, "date": "today", "command": "llava-saep eval"},
        "excluded_questions": [{"question_id": 3, "reason": "3.png is damaged"}],
        "result": result,
        "notes": ["of the run"],
        "uploads": ["out/upload/a.json"],
    }
    return {**made, **changes}


def test_shares_are_shown_in_percent_points_as_they_are_and_undefined_numbers_as_such():
    assert metric_rows(entry()) == [
        ("pope", "accuracy", "50.00 %", "25.00 % - 75.00 %", "8"),
        ("pope", "points", "12.50", "", "8"),
        ("pope / left", "accuracy", "undefined", "", "8"),
    ]


def test_circumstances_tell_how_weights_were_rounded():
    asked = {
        "prompt": {"template": "v1"},
        "preprocessing": {"size": [336, 336], "aspect_ratio": "pad"},
        "decoding": {"temperature": 0.0, "top_p": 1.0, "num_beams": 1, "max_new_tokens": 8},
    }
    model = {"id": "m", "fingerprint": "f", "tokens_per_image": 9, "dtype": "bfloat16"}
    whole, rounded = (circumstances(entry(model={**model, "bits": bits}, **asked)) for bits in (None, 4))
    assert "9 tokens per image, bfloat16; template v1; images pad, 336 x 336; greedy, at most 8 tokens" in whole
    assert "9 tokens per image, bfloat16, language model in 4 bits; template v1" in rounded


def test_everything_that_changes_a_denominator_is_said():
    assert remark_lines(entry()) == [
        "pope: of the run",
        "pope: 1 of 8 questions could not be put, the first one 3: 3.png is damaged",
        "pope: 5 unknown ids, ignored (a, b, c, ...)",
        "pope: of the task",
        "pope: to hand in: out/upload/a.json",
    ]


def test_benchmark_that_was_not_scored_has_remarks_and_no_rows():
    unscored = entry(result=None)
    assert metric_rows(unscored) == []
    assert remark_lines(unscored)[0] == "pope: of the run"
    assert "| benchmark |" not in results_markdown({"pope": unscored})


def test_page_says_once_what_several_results_were_made_with():
    page = results_markdown({"pope": entry(), "gqa": entry("gqa")})
    assert page.count("model m (f)") == 1 and "**pope, gqa**" in page


def test_results_are_read_back_as_they_were_written(tmp_path):
    write_result(tmp_path / "pope", entry())
    assert read_result(tmp_path / "pope" / "result.json") == {"schema": SCHEMA, **entry()}
    write_overview(tmp_path, {"pope": entry()})
    assert json.loads((tmp_path / "results.json").read_text()) == {"schema": SCHEMA, "results": {"pope": entry()}}


def test_overview_is_of_one_model(tmp_path):
    write_result(tmp_path / "pope", entry())
    write_result(tmp_path / "gqa", entry("gqa", model={"id": "m", "fingerprint": "of other weights"}))
    assert list(collect_results(tmp_path, "f")) == ["pope"]


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": "llava-saep-results/0"}', f'{{"schema": "{SCHEMA}"}}'])
def test_file_that_is_no_result_is_refused(tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(UserError, match="delete it and evaluate again"):
        read_result(tmp_path / "result.json")


def test_command_can_be_given_again():
    flags = ["eval", "--task", "a b"]
    assert command_line(["/venv/bin/llava-saep", *flags], ["/venv/bin/python", "/venv/bin/llava-saep", *flags]) == (
        "llava-saep eval --task 'a b'"
    )
    whole = ["/venv/bin/python", "-m", "llava_saep.commands.evaluate", *flags[1:]]
    assert command_line(["/code/llava_saep/commands/evaluate/__main__.py", *flags[1:]], whole) == (
        "python -m llava_saep.commands.evaluate --task 'a b'"
    )
