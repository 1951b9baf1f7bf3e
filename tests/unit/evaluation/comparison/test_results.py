"""From what runs leave to tables, pairs, disagreements and a page."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from llava_saep.evaluation.comparison.disagreement import disagreements
from llava_saep.evaluation.comparison.report import write_report
from llava_saep.evaluation.comparison.results import collect
from llava_saep.evaluation.comparison.runs import Run
from llava_saep.evaluation.comparison.steps import Step, write_json
from llava_saep.evaluation.comparison.tables import accuracy_table, cost_table, difference_table
from tests.fixtures.comparison import finish_run, speed_record, succeed, write_questions

FACTS = {
    "title": "a test <script>alert(1)</script>",
    "command": ["llava-saep", "compare"],
    "machine": {"processor": "x"},
    "num_jobs": 2,
    "num_threads": 1,
    "recipe": {"stages": []},
    "is_embedded": False,
}
# Questions in the file's order: count, relation, count, relation, ... two about each of four images
GOOD = [[True] * 8, [True] * 7 + [False]]
BAD = [[True, False] * 4, [True, False] * 3 + [False, False]]


@pytest.fixture
def recipe(tmp_path):
    return write_questions(tmp_path / "data")


@pytest.fixture
def runs(tmp_path, recipe):
    """Two projectors with two seeds each, and one whose only run failed."""
    finished = [
        finish_run(tmp_path / "out", label, seed, right[seed], speed=speed_record(tokens) if seed == 0 else None)
        for label, right, tokens in (("bad", BAD, 36), ("good", GOOD, 9))
        for seed in (0, 1)
    ]
    folder = tmp_path / "out" / "runs" / "torn" / "seed0"
    folder.mkdir(parents=True)
    write_json(folder / "failure.json", {"step": "stage1", "error": "out of <memory>"})
    step = Step(name="stage1", function=succeed)
    return [*finished, Run(label="torn", seed=0, folder=folder, model_path=folder, steps=(step,))]


def test_accuracies_are_those_counted_by_hand(runs, recipe):
    results = collect(runs, recipe, "bad")
    assert [entry.label for entry in results.entries] == ["good", "bad", "torn"]  # the best first, the failed last
    good, bad, torn = results.entries
    assert good.accuracy["overall"].value == pytest.approx(15 / 16)
    assert good.accuracy["relation"].value == pytest.approx(7 / 8)
    assert good.accuracy["count"].value == 1.0
    assert bad.accuracy["overall"].value == pytest.approx(7 / 16)
    assert bad.accuracy["relation"].value == 0.0
    assert good.blind["overall"].value == 0.0
    assert torn.accuracy == {} and torn.failures == {"torn, seed 0": "stage1: out of <memory>"}


def test_pairs_compare_equal_seeds_and_equal_questions(runs, recipe):
    [pair] = collect(runs, recipe, "bad").differences
    assert pair.label == "good" and pair.num_seeds == 2
    assert pair.over_seeds.value == pytest.approx(0.5)
    assert (pair.only_here, pair.only_reference) == (8, 0)
    assert pair.over_images is None  # of four images
    assert pair.p_value is None  # two models on a side


@pytest.mark.parametrize("name", ["answers.jsonl", "answers_blind.jsonl"])
def test_question_that_one_run_lacks_counts_for_none_and_is_told(runs, recipe, tmp_path, name):
    path = runs[-2].folder / "evaluation" / name
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    results = collect(runs, recipe, "bad")
    assert (len(results.questions), results.num_excluded) == (7, 1)
    assert all(len(one.correct) == 7 for entry in results.entries for one in entry.finished)
    written = write_report(results, FACTS, tmp_path, recipe.image_folder, num_examples=0)
    for kind in ("page", "table"):
        assert "1 further questions could not be put to every model and count for none" in written[kind].read_text()


def test_tables_have_as_many_cells_as_columns_where_no_question_is_left(runs, recipe):
    for run in runs[:-1]:
        (run.folder / "evaluation" / "answers.jsonl").write_text("")
    header, rows = accuracy_table(collect(runs, recipe, "bad"))
    assert {len(row) for row in rows} == {len(header)}


def test_single_models_have_mcnemars_test(runs, recipe):
    single = [run for run in runs if run.seed == 0 and run.label != "torn"]
    [pair] = collect(single, recipe, "good").differences
    assert (pair.only_here, pair.only_reference) == (0, 4)
    assert pair.p_value == pytest.approx(2 * 0.5**4)
    assert pair.over_seeds.low is None


def test_seeds_that_one_side_lacks_are_left_out_of_pairs(runs, recipe):
    some = [run for run in runs if (run.label, run.seed) != ("good", 1)]
    [pair] = collect(some, recipe, "bad").differences
    assert pair.num_seeds == 1 and pair.over_seeds.value == pytest.approx(0.5)


def test_training_time_is_that_of_the_steps(runs, recipe):
    entry = collect(runs, recipe, None).entries[0]
    assert entry.finished[0].train_seconds == pytest.approx(6.0)  # three times 100 tokens at 50 per second
    assert entry.finished[0].train_cpu_seconds == 8.0
    assert entry.loss["stage1"][0].values == pytest.approx((2.0, 1.0, 2 / 3))


@pytest.mark.parametrize("is_embedded", [True, False])
def test_page_says_what_generated_images_do_not_show_where_they_are_what_was_trained_on(
    runs, recipe, tmp_path, is_embedded
):
    facts = {**FACTS, "is_embedded": is_embedded}
    written = write_report(collect(runs, recipe, "bad"), facts, tmp_path, recipe.image_folder, num_examples=1)
    assert ("Small models on generated images" in written["page"].read_text()) == is_embedded


def test_questions_without_an_image_stand_for_themselves(tmp_path, recipe):
    lines = [json.loads(line) for line in recipe.question_file.read_text().splitlines()]
    for line in lines:
        del line["image"]
    recipe.question_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    compared = [finish_run(tmp_path / "o", "a", 0, [True, False] * 4), finish_run(tmp_path / "o", "b", 0, [True] * 8)]
    results = collect(compared, recipe, "a")
    low, high = results.differences[0].over_images
    assert low < 0.5 < high  # eight questions that are drawn again, half of which differ
    assert len(disagreements(results, limit=10)) == 4
    written = write_report(results, FACTS, tmp_path, recipe.image_folder, num_examples=3)
    assert "8 questions about 0 images" in written["page"].read_text()


def test_questions_about_one_image_tell_nothing_of_other_images(tmp_path):
    recipe = write_questions(tmp_path / "data", num_images=1)
    compared = [finish_run(tmp_path / "o", "a", 0, [True, False]), finish_run(tmp_path / "o", "b", 0, [True, True])]
    results = collect(compared, recipe, "a")
    assert results.differences[0].over_images is None
    assert difference_table(results)[1][0][4] == "-"
    written = write_report(results, FACTS, tmp_path, recipe.image_folder, num_examples=0)
    assert json.loads(written["numbers"].read_text())["differences"][0]["over_images_95"] is None
    assert "In pairs with a" in written["page"].read_text()


def test_disagreements_are_the_evenly_divided_questions_one_per_image(runs, recipe):
    found = disagreements(collect(runs, recipe, "bad"), limit=10)
    # Relations of images 0 to 2 divide entirely (shares 1 and 0), the count of image 3 half (1 and 0.5), kinds take
    # turns, and the relation of image 3 is left out, since its image was shown.
    assert [one.question.question_id for one in found] == [1, 6, 3, 5]
    assert found[0].answers["good"][1:] == (2, 2) and found[0].answers["bad"][1:] == (0, 2)
    assert found[0].answers["good"][0] == "so yes" and found[0].answers["bad"][0] == "no"


def test_equal_entries_disagree_nowhere(tmp_path, recipe):
    same = [finish_run(tmp_path / "o", label, 0, GOOD[0]) for label in ("a", "b")]
    assert disagreements(collect(same, recipe, "a"), limit=10) == []


class Page(HTMLParser):
    """Collects what a page would fetch or run."""

    def __init__(self):
        super().__init__()
        self.references, self.tags, self.open_tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "data", "xlink:href")]
        if tag not in ("meta", "img", "br"):
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag


@pytest.fixture
def page(runs, recipe, tmp_path):
    results = collect(runs, recipe, "bad")
    written = write_report(results, FACTS, tmp_path, recipe.image_folder, num_examples=3)
    text = written["page"].read_text()
    parsed = Page()
    parsed.feed(re.sub(r"<(line|circle|polyline)([^>]*)/>", r"<\1\2></\1>", text).replace("<!doctype html>", ""))
    return text, parsed


def test_page_fetches_nothing_and_runs_nothing(page):
    text, parsed = page
    assert parsed.open_tags == []  # well formed
    assert "script" not in parsed.tags and "link" not in parsed.tags and "iframe" not in parsed.tags
    assert parsed.references and all(value.startswith("data:image/png;base64,") for value in parsed.references)
    assert not re.search(r"https?://|url\(|@import", text)


def test_page_shows_texts_of_others_as_text(page):
    text, _ = page
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert "Is it 0 &lt;b&gt;?" in text and "out of &lt;memory&gt;" in text


def test_page_holds_every_part(page):
    text, parsed = page
    for title in ("Accuracy", "In pairs with bad", "Accuracy against tokens", "Costs", "Learning curves", "Failed"):
        assert f"<h2>{title}</h2>" in text
    assert parsed.tags.count("img") == 3
    assert "prefers-color-scheme: dark" in text and "@media print" in text


def test_tables_and_numbers_agree(runs, recipe, tmp_path):
    results = collect(runs, recipe, "bad")
    header, rows = accuracy_table(results)
    assert header == ["projector", "runs", "tokens", "overall", "count", "relation", "blind, overall"]
    by_label = {row[0]: row for row in rows}
    assert by_label["good"][1:3] == ["2 of 2", "9"] and by_label["good"][3].startswith("93.8 (")
    assert by_label["torn"][1:4] == ["0 of 1", "-", "failed"]
    assert cost_table(results)[1][0][:3] == ["good", "9", "1,000"]
    assert difference_table(results)[1][0][2] == "+50.0"
    written = write_report(results, FACTS, tmp_path, recipe.image_folder, num_examples=3)
    numbers = json.loads(written["numbers"].read_text())
    assert numbers["entries"][0]["accuracy"]["overall"]["value"] == pytest.approx(15 / 16)
    assert "| good | 2 of 2 | 9 | 93.8 (" in written["table"].read_text()
    assert all(len(row) == len(header) for row in rows)


def test_large_images_are_made_smaller_in_the_page(tmp_path):
    recipe = write_questions(tmp_path / "data")
    noise = np.random.default_rng(0).integers(0, 255, (1500, 1500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(recipe.image_folder / "0.png")
    right = [False, False] + [True] * 6
    compared = [finish_run(tmp_path / "o", "a", 0, right), finish_run(tmp_path / "o", "b", 0, [True] * 8)]
    results = collect(compared, recipe, "a")
    assert disagreements(results, 5)[0].question.image == "0.png"
    written = write_report(results, FACTS, tmp_path, recipe.image_folder, num_examples=3)
    assert written["page"].stat().st_size < 1_000_000  # 384 x 384 x 3 bytes of noise in base64, and the rest


def test_comparison_without_a_finished_run_still_reports(runs, recipe, tmp_path):
    results = collect(runs[-1:], recipe, "torn")
    text = write_report(results, FACTS, tmp_path, recipe.image_folder, num_examples=3)["page"].read_text()
    assert "out of &lt;memory&gt;" in text and results.differences == ()
