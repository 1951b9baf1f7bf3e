"""The table that ends the quick start, cell by cell."""

from llava_saep.evaluation.metrics import Score
from llava_saep.evaluation.report import json_report, markdown_table, report_rows, terminal_table

SCORES = [
    Score(category="count", num_questions=10, num_correct=10, chance=0.3),
    Score(category="overall", num_questions=100, num_correct=50, chance=0.25),
]
BLIND = [Score(category="overall", num_questions=100, num_correct=28, chance=0.25)]


def test_rows_hold_percentages_and_a_dash_where_nothing_was_measured():
    assert report_rows(SCORES, BLIND) == [
        ("count", "10", "100.0 %", "72.2 % - 100.0 %", "30.0 %", "-"),
        ("overall", "100", "50.0 %", "40.4 % - 59.6 %", "25.0 %", "28.0 %"),
    ]


def test_columns_of_the_terminal_table_are_aligned():
    lines = terminal_table(report_rows(SCORES, BLIND)).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].startswith("count ") and lines[-1].startswith("overall ")
    assert set(lines[1]) == set(lines[-2]) == {"-"}


def test_markdown_table_has_one_line_per_row():
    lines = markdown_table(report_rows(SCORES)).splitlines()
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: |"
    assert lines[2] == "| count | 10 | 100.0 % | 72.2 % - 100.0 % | 30.0 % | - |"


def test_json_report_keeps_counts_and_proportions():
    report = json_report("saep", SCORES, BLIND)
    assert report["with_image"]["count"]["num_correct"] == 10
    assert report["blind"]["overall"]["accuracy"] == 0.28
    assert report["model_id"] == "saep"
