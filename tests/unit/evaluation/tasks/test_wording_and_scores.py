"""What each benchmark asks, word for word, and scores that were worked out by hand."""

import hashlib
import json
import math
import statistics
from collections import Counter
from statistics import NormalDist
from zipfile import ZipFile

import pytest
from PIL import Image

from llava_saep.errors import UserError
from llava_saep.evaluation.benchmarks import first_questions
from llava_saep.evaluation.tasks import (
    Answer,
    Review,
    find_task,
    llava_bench,
    mme,
    mmvet,
    pope,
    refcoco,
    scienceqa,
    vsr,
    whatsup,
)
from llava_saep.evaluation.tasks import _mmbench as mmbench
from llava_saep.evaluation.tasks._files import read_answers
from llava_saep.evaluation.tasks._options import read_letter
from llava_saep.evaluation.tasks._scoring import mean_metric
from tests.fixtures.benchmarks import LETTER, SHORT, answers_to, write_sample


@pytest.fixture
def ask(tmp_path):
    """Write a task's sample; returns (task, folder, function that scores texts)."""

    def write(name, split):
        write_sample(name, tmp_path)
        task = find_task(name)
        return (
            task,
            tmp_path,
            lambda *texts: task.score(tmp_path, split, answers_to(name, tmp_path, split, list(texts))),
        )

    return write


def values(metrics):
    return {metric.name: metric.value for metric in metrics}


def rows(result):
    return {row.category: values(row.metrics) for row in result.rows}


def texts(task, folder, split):
    return [question.text for question in task.questions(folder, split)]


def test_vqav2_val(ask):
    task, folder, score = ask("vqav2", "val")
    assert texts(task, folder, "val")[0] == f"What animal?{SHORT}"
    # "dog" was said by one of ten people: nine times a third, once nothing. "2" was said as 2 and two by all.
    result = score("Dog.", "two", "no")
    assert result.metrics[0].value == pytest.approx((0.3 + 1 + 0) / 3)
    assert {row: each["accuracy"] for row, each in rows(result).items()} == pytest.approx(
        {"other": 0.3, "number": 1, "yes/no": 0}
    )


def test_vqav2_upload_lists_the_whole_test_set(ask):
    task, folder, _ = ask("vqav2", "test-dev")
    (path,) = task.export(folder, "test-dev", answers_to("vqav2", folder, "test-dev", ["A dog", "two"]), folder / "up")
    assert json.loads(path.read_text()) == [
        {"question_id": 10, "answer": "dog"},
        {"question_id": 11, "answer": "2"},
        {"question_id": 20, "answer": ""},
    ]


@pytest.mark.parametrize("num_lines", [0, 1])
def test_vqav2_upload_leaves_no_answer_out(ask, num_lines):
    task, folder, _ = ask("vqav2", "test-dev")
    answers = answers_to("vqav2", folder, "test-dev", ["A dog", "two"])
    path = folder / "llava_vqav2_mscoco_test2015.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:num_lines]))
    with pytest.raises(
        UserError, match=rf"test2015.jsonl: lacks {2 - num_lines} questions of llava_vqav2_mscoco_test-"
    ):
        task.export(folder, "test-dev", answers, folder / "up")


def test_gqa_is_exact_and_counts_forms_of_questions(ask):
    _, _, score = ask("gqa", "testdev_balanced")
    result = score("No...", "the car", "Dog")
    assert result.metrics[0].value == pytest.approx(2 / 3)
    accuracies = {row: each["accuracy"] for row, each in rows(result).items()}
    assert accuracies == {"binary": 1, "open": 0, "verify": 1, "query": 0, "choose": 1}


def test_vizwiz_val_has_llavas_two_instructions(ask):
    task, folder, score = ask("vizwiz", "val")
    instruction = f"\nWhen the provided information is insufficient, respond with 'Unanswerable'.{SHORT}"
    assert texts(task, folder, "val")[0] == f"What is this?{instruction}"
    assert score("unanswerable", "can of soda").metrics[0].value == pytest.approx((1 + 0.3) / 2)


def test_scienceqa_scores_questions_with_an_image_apart(ask):
    task, folder, score = ask("scienceqa", "test")
    assert texts(task, folder, "test")[0] == f"Which is north?\nContext: N/A\nA. Ohio\nB. Utah{LETTER}"
    result = score("The answer is B. It is.", "B")
    assert values(result.metrics) == {"accuracy with image": 1, "accuracy": 0.5}
    assert {row: each["accuracy"] for row, each in rows(result).items()} == {
        "social science": 1,
        "language science": 0,
        "grades 1-6": 1,
        "grades 7-12": 0,
    }


def test_scienceqa_counts_a_problem_once_that_its_split_lists_twice(ask):
    _, folder, score = ask("scienceqa", "test")
    (folder / "pid_splits.json").write_text(json.dumps({"test": ["4", "5", "4"]}))
    result = score("B", "C")
    assert [(metric.value, metric.n) for metric in result.metrics] == [(1, 1), (1, 2)] and not result.exclusions


def test_scienceqa_looks_for_a_letter_in_answers_that_are_there(ask):
    task, folder, _ = ask("scienceqa", "test")
    result = task.score(folder, "test", answers_to("scienceqa", folder, "test", ["no idea", "B"])[:1])
    assert result.notes == ("answers in which no letter was found: 1",)
    assert [(each.reason, each.count) for each in result.exclusions] == [("questions without an answer", 1)]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is B", "FAILED"),
        ("The answer is B\nIt is.", "FAILED"),
        ("The answer is B, it is", "B"),
        ("B. dog", "B"),
        ("B.dog", "FAILED"),
        ("B.", "FAILED"),
    ],
)
def test_scienceqa_needs_one_more_character_on_the_line(text, letter):
    """The dot in LLaVA's pattern is no period, but no line break either; behind a lone letter `. ` must follow."""
    assert scienceqa.parse_option(text) == letter


def test_textvqa_without_ocr_tokens_asks_the_same_without_them(ask):
    task, folder, _ = ask("textvqa", "val_ocr")
    assert texts(task, folder, "val_ocr")[0] == f"what brand is it?\nReference OCR token: NOKIA, 12{SHORT}"
    assert texts(task, folder, "val_no_ocr")[0] == f"what brand is it?{SHORT}"


def test_pope_labels_belong_to_questions_and_not_to_lines(ask):
    _, folder, score = ask("pope", "test")
    path = folder / "coco" / "coco_pope_random.json"
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    right = ["Yes", "No", "Yes"] * 3
    assert score(*right).metrics[0].value == 1
    path.write_text("\n".join(path.read_text().splitlines()[:2]))
    result = score(*right)
    (unlabelled,) = result.exclusions
    assert unlabelled.reason == "random: questions without a label in coco_pope_random.json"
    assert (unlabelled.count, unlabelled.effect) == (1, "left out")
    assert result.rows[0].metrics[0].n == 2
    path.write_text(path.read_text().replace("000001.jpg", "000002.jpg"))
    with pytest.raises(UserError, match="coco_pope_random.json: none of its annotations is about an image"):
        score(*right)


def test_pope_says_which_set_its_means_are_without(ask):
    _, folder, score = ask("pope", "test")
    assert score(*["Yes", "No", "Yes"] * 3).notes == ()
    path = folder / "llava_pope_test.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[3:]))
    result = score(*["Yes", "No", "Yes"] * 2)
    assert result.metrics[0].n == 6
    assert result.notes == ("sets without a question, which the means are without: random",)


def test_pope_has_no_mean_of_a_ratio_that_a_set_does_not_define(ask):
    """Of a model that never says yes about one set: the mean of the others would look like all three's."""
    _, _, score = ask("pope", "test")
    means = values(score(*["Yes", "No", "Yes"] * 2, "No", "No", "No").metrics)
    assert means["precision"] is None and means["F1"] is None
    assert means["recall"] == pytest.approx(2 / 3) and means["accuracy"] == pytest.approx(7 / 9)


def test_pope_takes_no_label_that_is_neither_yes_nor_no(ask):
    """LLaVA counts `No` as a yes: precision and recall would be of something else."""
    _, folder, score = ask("pope", "test")
    path = folder / "coco" / "coco_pope_random.json"
    path.write_text(path.read_text().replace('"no"', '"No"'))
    with pytest.raises(UserError, match="coco_pope_random.json: label must be yes or no, found 'No'"):
        score(*["Yes"] * 9)


def test_pope_counts_an_unanswered_yes_as_not_found():
    counts = pope.count_yes_no(["yes", None, "no", None], ["yes", "yes", "no", "no"])
    assert (counts.accuracy, counts.precision, counts.recall, counts.yes_ratio) == (0.5, 1, 0.5, 0.5)
    assert counts.f1 == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "reading"),
    [("Yes", "yes"), ("yes, it is", "yes"), ("No.", "no"), ("I know", "other"), ("know", "no"), ("It is", "other")],
)
def test_mme_reads_the_first_four_characters(text, reading):
    assert mme.parse_mme_answer(text) == reading


def test_mme_sums_accuracy_and_accuracy_of_images(ask):
    _, _, score = ask("mme", "test")
    answers = ["Yes", "No"] * 14
    answers[1] = "Yes"  # one of the two about the image of "existence"
    answers[-1] = "maybe"  # and of "code_reasoning"
    result = score(*answers)
    assert values(result.metrics) == {"perception": 2000 - 150, "cognition": 800 - 150}
    assert rows(result)["existence"] == {"score": 50, "accuracy": 0.5, "accuracy+": 0}
    assert result.notes == ("answers that are neither yes nor no: 1",)


def test_mme_writes_the_files_of_the_official_scorer(ask):
    task, folder, _ = ask("mme", "test")
    answers = answers_to("mme", folder, "test", ["Yes,\nof course", "No"] * 14)
    written = {path.name: path.read_text() for path in task.export(folder, "test", answers, folder / "up")}
    assert len(written) == 14
    assert written["scene.txt"] == "0001.txt\tIs it a dog?\tYes\tYes, of course\n0001.txt\tIs it a cat?\tNo\tNo\n"


@pytest.mark.parametrize("text", ["Yes", "  Yes", "\n\nYes", "\r\n\tYes", "I say\tyes", "know\n"])
def test_mme_file_holds_what_the_score_is_of(ask, text):
    """The official scorer reads lines of four fields, and the first four characters of the last one."""
    task, folder, score = ask("mme", "test")
    answers = [text, "No"] * 14
    written = task.export(folder, "test", answers_to("mme", folder, "test", answers), folder / "up")
    lines = [line.split("\t") for path in written for line in path.read_text().splitlines()]
    is_right = [label.lower() == mme.parse_mme_answer(answer) for _, _, label, answer in lines]
    accuracies = [row["accuracy"] for row in rows(score(*answers)).values()]
    assert sum(is_right) / 28 == pytest.approx(sum(accuracies) / 14)


def test_mmbench_asks_with_hint_and_options(ask):
    task, folder, _ = ask("mmbench", "dev")
    first, _, last = task.questions(folder, "dev")
    assert first.prompt == "A map is shown.\nWhere is it?\nA. left\nB. right\nC. top"
    assert first.text == first.prompt + LETTER
    assert last.text == f'What is it?\nA. None of these\nB. a "cat", asleep{LETTER}'
    assert first.images[0].open().size == (8, 6)


def test_mmbench_uploads_the_first_round(ask):
    task, folder, _ = ask("mmbench", "dev_all_rounds")
    rounds = [question.answer_fields["round_id"] for question in task.questions(folder, "dev_all_rounds")]
    said = ["later" if round_id else "first" for round_id in rounds]
    (path,) = task.export(
        folder, "dev_all_rounds", answers_to("mmbench", folder, "dev_all_rounds", said), folder / "up"
    )
    with ZipFile(path) as book:
        cells = book.read("xl/sharedStrings.xml").decode()
    assert ">first<" in cells and ">later<" not in cells


def test_mmbench_cn_asks_in_chinese(ask):
    task, folder, _ = ask("mmbench_cn", "dev")
    assert texts(task, folder, "dev")[0].endswith("\nC. top\n请直接回答选项字母。")


def test_mmbench_counts_a_question_whose_rotations_are_all_right(ask):
    _, _, score = ask("mmbench", "dev")
    result = score("B. right", "B", "The answer is B.")  # the second is the first one rotated, where A is right
    assert values(result.metrics) == {"circular accuracy": 0.5, "accuracy of the first pass": 1}
    assert result.metrics[0].n == 2


def test_mmbench_all_rounds_reads_letters_of_the_rotation(ask):
    task, folder, score = ask("mmbench", "dev_all_rounds")
    rounds = task.questions(folder, "dev_all_rounds")
    assert rounds[1].prompt == "A map is shown.\nWhere is it?\nA. right\nB. top\nC. left"
    assert [mmbench.predicted_letter(rounds[1], letter) for letter in ("A", "C", "D", "top")] == ["B", "A", None, "C"]
    assert score("B", "A", "C", "A", "C", "B", "B", "B").metrics[0].value == 0.5


@pytest.mark.parametrize("empty", ["", "None", "null", "NULL", "n/a", "NA", "NaN", "nan", "none"])
def test_mmbench_options_end_at_the_first_that_the_table_calls_empty(tmp_path, empty):
    """LLaVA stops there, and reads the table with pandas, which takes these words for an empty cell."""
    path = tmp_path / "t.tsv"
    path.write_text(f"index\tquestion\thint\tA\tB\tC\tD\timage\n3\tWhat?\t{empty}\tx\ty\t{empty}\tz\tQQ==\n")
    (question,) = mmbench.table_questions(path, ask_for_letter=False)
    assert question.text == "What?\nA. x\nB. y"
    if empty != "none":  # pandas knows it in two spellings only
        assert mmbench.read_table(path)[0]["C"] is None


@pytest.mark.parametrize("label", ["b", "", "2"])
def test_mmbench_takes_no_label_that_is_no_letter(ask, label):
    _, folder, score = ask("mmbench", "dev")
    path = folder / "mmbench_dev_20230712.tsv"
    path.write_text(path.read_text().replace("\tB\tspatial", f"\t{label}\tspatial"))
    with pytest.raises(UserError, match="dev_20230712.tsv: labels that are none of A, B, C, D: 2, the first .* 7: "):
        score("B", "A", "B")


def test_an_image_in_a_table_that_is_none_is_named_by_its_place(tmp_path):
    table = tmp_path / "t.tsv"
    table.write_text("index\tquestion\tA\tB\timage\n3\tWhat?\tx\ty\tbm8gaW1hZ2U=\n")
    (question,) = mmbench.table_questions(table)
    with pytest.raises(UserError, match="t.tsv, index 3, the embedded image: cannot be read"):
        question.images[0].open()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("index\tquestion\n1\tWhat?\n", "lacks the columns A, image; is it MMBench's table?"),
        ("index\tquestion\tA\timage\n1\tWhat?\tx\n", "line 2: has not 4 cells, as the first line"),
        ("index\tquestion\tA\timage\nfirst\tWhat?\tx\ty\n", "line 2: index must be a number, found 'first'"),
        ("index\tquestion\tA\timage\n²\tWhat?\tx\ty\n", "line 2: index must be a number, found '²'"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, text, message):
    (tmp_path / "t.tsv").write_text(text)
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        mmbench.read_table(tmp_path / "t.tsv")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B) two", "B"),
        ("B: two", "B"),
        ("B\nIt is two.", "B"),
        ("The answer is C\nIt is.", "C"),
        (" b", None),
        ("The answer is C.", "C"),
        ("the answer is: (A)", "A"),
        ("The answer is a dog", None),
        ("A dog", None),
        ("Two.", "B"),
        ("D", None),
        ("", None),
    ],
)
def test_letters_are_read_where_they_are_meant(text, letter):
    assert read_letter(text, ["one", "two", "three"]) == letter


def test_seed_bench_takes_the_letter_alone(ask):
    _, _, score = ask("seed_bench", "test")
    assert values(score("A.", "C").metrics) == {"accuracy": 0.5, "image accuracy": 0, "video accuracy": 1}


@pytest.mark.parametrize("label", ["c", "", "2"])
def test_seed_bench_takes_no_label_that_is_no_letter(ask, label):
    _, folder, score = ask("seed_bench", "test")
    path = folder / "SEED-Bench.json"
    path.write_text(path.read_text().replace('"answer": "C"', f'"answer": "{label}"'))
    with pytest.raises(UserError, match="SEED-Bench.json: labels that are none of A, B, C, D: 1, the first .* 'v2': "):
        score("A", "C")


@pytest.mark.parametrize(
    ("name", "split", "question_file"),
    [
        ("gqa", "testdev_balanced", "llava_gqa_testdev_balanced.jsonl"),
        ("seed_bench", "test", "llava-seed-bench.jsonl"),
        ("textvqa", "val_ocr", "llava_textvqa_val_v051_ocr.jsonl"),
        ("mme", "test", "llava_mme.jsonl"),
        ("vqav2", "val", "v2_OpenEnded_mscoco_val2014_questions.json"),
    ],
)
def test_annotations_that_are_not_asked_are_reported(ask, name, split, question_file):
    """LLaVA's scorer of SEED-Bench, for one, counts them as wrong: a question file that lost lines must show."""
    task, folder, _ = ask(name, split)
    answers = answers_to(name, folder, split, ["x"] * len(task.questions(folder, split)))
    path = folder / question_file
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "questions": content["questions"][1:]}))
    else:
        path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    reasons = [(each.count, each.effect) for each in task.score(folder, split, answers[1:]).exclusions]
    assert reasons == [(1, "left out")]


@pytest.mark.parametrize(("name", "split"), [("textvqa", "val_ocr"), ("mme", "test")])
def test_first_question_about_an_image_takes_no_answer_to_its_second(ask, name, split):
    """Both have the image for an id, which is unique where only the first is asked, as with --limit 1."""
    task, folder, _ = ask(name, split)
    answers = answers_to(name, folder, split, write_sample(name, folder)[split])
    result = first_questions(task, 1).score(folder, split, answers)
    assert result.metrics[0].value == (200 if name == "mme" else 1)
    reasons = {each.reason: each.count for each in result.exclusions}
    assert reasons["answers to no question"] == len(answers) - 1
    assert not {"answers that a later one replaces", "answers to another wording"} & set(reasons)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [("True", True), ("yes, it is", True), ("false.", False), ("It is not true", False), ("maybe", None)],
)
def test_vsr_reads_the_first_verdict(text, verdict):
    assert vsr.parse_verdict(text) == verdict


def test_vsr_asks_whether_the_sentence_is_true(ask):
    task, folder, score = ask("vsr", "zeroshot_test")
    expected = f'Is this statement about the image true or false? "The cat is left of the dog."{SHORT}'
    assert texts(task, folder, "zeroshot_test")[0] == expected
    result = score("true", "true")
    assert values(result.metrics) == {"accuracy": 0.5, "true ratio": 1}
    assert {row: each["accuracy"] for row, each in rows(result).items()} == {"left of": 1, "under": 0}


def test_whatsup_counts_pairs_and_sets(ask):
    task, folder, score = ask("whatsup", "controlled_a")
    right = write_sample("whatsup", folder)["controlled_a"]
    options = texts(task, folder, "controlled_a")[0].split("\n")
    assert options[0] == "Which sentence describes the image?"
    assert sorted(option[3:] for option in options[1:-1]) == [
        f"A mug {relation} a plate" for relation in ("left of", "on", "right of", "under")
    ]
    wrong = next(letter for letter in "ABCD" if letter != right[0])
    result = score(wrong, *right[1:])  # left_of is wrong; right_of, on and under are right
    assert values(result.metrics) == {"accuracy": 0.75, "pair accuracy": 0.5, "set accuracy": 0}
    assert rows(result)["left_of"]["accuracy"] == 0


def test_whatsup_does_not_give_the_answer_away_by_its_place():
    """In 2,000 questions each place is right 500 times, with a standard deviation of 19."""
    places = Counter(
        whatsup.shuffled_options(whatsup.Example(f"{index}.jpg", ("right", "b", "c", "d")), index)[1]
        for index in range(2000)
    )
    assert all(abs(places[letter] - 500) < 100 for letter in "ABCD")


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[0.1, 0.2, 0.5, 0.9]", (0.1, 0.2, 0.5, 0.9)),
        ("It is at [0,0,1,.5].", (0, 0, 1, 0.5)),
        ("(0.1, 0.2, 0.5, 0.9)", (0.1, 0.2, 0.5, 0.9)),
        ("[0.1, 0.2, 0.5]", None),
        ("[10, 20, 50, 90]", None),
        ("on the left", None),
    ],
)
def test_boxes_are_read_from_text(text, box):
    assert refcoco.parse_box(text) == box


def test_intersection_over_union_of_boxes():
    a, b = refcoco.Box(0, 0, 2, 2), refcoco.Box(1, 1, 3, 3)
    assert refcoco.intersection_over_union(a, b) == pytest.approx(1 / 7)
    assert refcoco.intersection_over_union(a, a) == 1
    assert refcoco.intersection_over_union(a, refcoco.Box(5, 5, 6, 6)) == 0
    assert refcoco.intersection_over_union(refcoco.Box(1, 1, 0, 0), refcoco.Box(1, 1, 0, 0)) == 0


@pytest.mark.parametrize("size", [(40, 20), (41, 20), (20, 41), (30, 30), (7, 10)])
def test_boxes_of_the_padded_image_fit_what_the_padding_does(size):
    """The corners of the image, where the images' own padding put them."""
    from llava_saep.data.images import expand_to_square

    width, height = size
    padded = expand_to_square(Image.new("RGB", size, (255, 255, 255)), (0, 0, 0))
    left, top, right, bottom = padded.convert("L").getbbox()
    side = padded.width
    box = refcoco.Box(left / side, top / side, right / side, bottom / side)
    assert refcoco.box_in_pixels(box, width, height, padded=True) == pytest.approx((0, 0, width, height))


def test_refcoco_reports_both_readings_of_a_box(ask):
    task, folder, score = ask("refcoco", "refcoco_val")
    expected = "Please provide the bounding box coordinate of the region this sentence describes: the left cup"
    assert texts(task, folder, "refcoco_val") == [expected]
    padded, image = "accuracy, boxes of the padded image", "accuracy, boxes of the image"
    # Half of the 40 x 20 image; as a box of the padded square it covers the upper margin and half of the labelled box.
    assert values(score("[0.0, 0.25, 0.5, 0.75]").metrics) == {padded: 1, image: 1}
    assert values(score("[0.0, 0.0, 0.5, 1.0]").metrics) == {padded: 1, image: 1}
    assert values(score("[0.0, 0.0, 0.5, 0.5]").metrics) == {padded: 0, image: 1}


def test_mmvet_asks_the_judge_with_mmvets_table(ask):
    task, folder, _ = ask("mmvet", "test")
    requests = task.judge_requests(folder, "test", answers_to("mmvet", folder, "test", ["x = -1", "left"]))
    assert (requests[0].system, requests[0].temperature, requests[0].max_tokens) == ("", 0, 3)
    lines = requests[0].user.split("\n")
    assert lines[0].startswith("Compare the ground truth and prediction from AI models")
    assert lines[2:5] == [
        "Question | Ground truth | Prediction | Correctness",
        "--- | --- | --- | ---",
        "What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0",
    ]
    assert lines[-3].endswith(" | 1.0")
    assert lines[-2:] == ["", "What is x? | -1 <AND> -5 | x = -1 | "]
    assert requests[1].record == {"capability": ["rec", "spat"]}
    assert requests[1].user.endswith("Where is the cup? | left <OR> on the left | left | ")


def test_instructions_to_judges_change_by_no_character():
    """Ratings under other words cannot be compared, so that each change is to be a decision."""

    def fingerprint(prompt):
        return hashlib.sha256(prompt.encode()).hexdigest()[:16]

    assert fingerprint(llava_bench.judge_prompt("C", "Q", "R", "A", llava_bench.JudgeRule())) == "77807f4a9c0e252f"
    assert fingerprint(mmvet.judge_prompt("Q", "a<AND>b<OR>c", "P")) == "8f27f89799ca1b93"


def test_mmvet_means_scores_per_ability_and_counts_failed_reviews(ask):
    task, folder, _ = ask("mmvet", "test")
    requests = task.judge_requests(folder, "test", answers_to("mmvet", folder, "test", ["x = -1", "left"]))
    replies = ["0.5", None]
    lines = [
        task.review_line(Review(question_id=r.question_id, reply=reply, record=r.record))
        for r, reply in zip(requests, replies, strict=True)
    ]
    result = task.score_reviews(folder, "test", lines)
    assert (result.metrics[0].value, result.metrics[0].n) == (0.5, 1)
    assert rows(result) == {"math": {"score": 0.5}}
    assert [(each.reason, each.count, each.effect) for each in result.exclusions] == [
        ("reviews without a score", 1, "left out")
    ]
    (unasked,) = task.score_reviews(folder, "test", lines[:1]).exclusions
    assert (unasked.reason, unasked.examples) == ("questions without a review", ("1",))
    with pytest.raises(UserError, match="none of the 1 reviews holds a score"):
        task.score_reviews(folder, "test", lines[1:])


def test_mean_of_soft_scores_has_the_normal_interval_of_a_mean():
    scores = [0.3, 1.0, 0.0, 0.9, 0.6]
    half_width = NormalDist().inv_cdf(0.975) * statistics.stdev(scores) / len(scores) ** 0.5
    expected = (statistics.mean(scores) - half_width, statistics.mean(scores) + half_width)
    assert mean_metric("accuracy", scores).interval == pytest.approx(expected)


@pytest.mark.parametrize(
    ("reply", "score"), [("0.7", 0.7), ("1.0 because", 1), ("2", None), ("good", None), ("", None)]
)
def test_mmvet_scores_are_read(reply, score):
    assert mmvet.parse_score(reply) == score


@pytest.mark.parametrize(
    ("reply", "points"),
    [
        ("8 6\nwell", (8, 6)),
        ("8, 6", (8, 6)),
        ("8,6", (8, 6)),
        ("Scores: 8 6", (-1, -1)),
        ("8 6 7", (-1, -1)),
        ("8 nan", (-1, -1)),
        ("inf 6", (-1, -1)),
        ("", (-1, -1)),
    ],
)
def test_llava_bench_points_are_read(reply, points):
    assert llava_bench.parse_points(reply) == points


def test_llava_bench_rounds_means_before_it_divides_as_llava_does():
    summary = llava_bench.summarize_points([{"tuple": [1, 10]}, {"tuple": [1, 10]}, {"tuple": [2, 9]}], "file")["all"]
    assert summary.line_numbers == (725.2, 13.3, 96.7)  # 9.667 / 1.333; unrounded means give 725.0


def test_llava_bench_has_no_relative_score_where_the_reference_has_no_points():
    summary = llava_bench.summarize_points([{"tuple": [0, 10]}], "file")["all"]
    assert math.isnan(summary.line_numbers[0]) and summary.line_numbers[1:] == (0, 100)


@pytest.mark.parametrize("pair", [5, [1], ["8", "6"], [1, 2, 3], {"a": 1}, [math.nan, 6], [8, math.inf]])
def test_damaged_points_of_a_review_are_none(pair):
    assert not llava_bench.has_points({"tuple": pair})


def test_llava_bench_leaves_unanswered_questions_and_failed_reviews_out_and_counts_them(ask):
    task, folder, _ = ask("llava_bench", "test")
    answers = answers_to("llava_bench", folder, "test", ["a", "b", "c"])[:2]
    requests = task.judge_requests(folder, "test", answers)
    assert [request.question_id for request in requests] == [0, 1]
    assert requests[1].record == {
        "id": 2,
        "question_id": 1,
        "answer1_id": "r1",
        "answer2_id": "id1",
        "category": "llava_bench_detail",
    }
    lines = [
        task.review_line(Review(question_id=r.question_id, reply=reply, record=r.record))
        for r, reply in zip(requests, ("8 6", None), strict=True)
    ]
    result = task.score_reviews(folder, "test", lines)
    assert values(result.metrics) == {"relative score": 75, "reference x 10": 80, "model x 10": 60}
    assert [(each.reason, each.count) for each in result.exclusions] == [
        ("reviews without points", 1),
        ("questions without a review", 1),
    ]


def test_llava_bench_reports_answers_of_the_reference_to_no_question(ask):
    task, folder, _ = ask("llava_bench", "test")
    answers = answers_to("llava_bench", folder, "test", ["a", "b", "c"])
    assert task.misfits(folder, "test", answers) == ()
    path = folder / "questions.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    assert [(each.reason, each.count, each.examples) for each in task.misfits(folder, "test", answers)] == [
        ("answers to no question", 1, ("2",)),
        ("annotations in answers_gpt4.jsonl of no question", 1, ("2",)),
    ]


def test_spatial_scenes_score_the_last_words_beside_a_constant_answer(ask):
    _, _, score = ask("spatial_scenes", "held_out")
    result = score("the 7 is left, so yes", "top left is 8", "so yes")
    assert result.metrics[0].value == pytest.approx(1 / 3)
    assert rows(result)["relation"] == {"accuracy": 0.5, "constant answer": 0.5}
    assert result.metrics[1].value == pytest.approx(2 / 3)
    assert rows(result)["position"]["constant answer"] == 1


def test_answers_whose_file_is_of_another_split_are_refused(ask):
    task, folder, _ = ask("seed_bench", "test")
    (folder / "llava-seed-bench.jsonl").write_text(json.dumps({"question_id": 77, "image": "a.jpg", "text": "Q?"}))
    with pytest.raises(UserError, match="SEED-Bench.json: says nothing about any of the 1 questions"):
        task.score(folder, "test", [Answer(question_id=77, text="A")])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question_id": 1}', "line 2: lacks 'text'; it has 'question_id'"),
        ('{"question_id": 1, "text": null}', "line 2: text must be a text, found None"),
        ('{"question_id": true, "text": "x"}', "line 2: question_id must be a text or a whole number, found True"),
        ('{"question_id": 1, "text": "x", "round_id": "2"}', "line 2: round_id must be a whole number, found '2'"),
        ('{"question_id": 1, "te', "line 2: expected a JSON object"),
        ('{"text": "x", "question_id": ' + "1" * 5000 + "}", "line 2: expected a JSON object"),
        ("[" * 100_000, "line 2: expected a JSON object"),
        ("[1]", "line 2: expected a JSON object"),
    ],
)
def test_a_damaged_line_of_an_answer_file_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"question_id": 0, "text": "a\\u2028b"}\n' + line)
    with pytest.raises(UserError, match=message):
        read_answers(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text('\ufeff{"question_id": 0, "text": "a\u2028b"}\n\n')
    assert [answer.text for answer in read_answers(tmp_path / "a.jsonl")] == ["a\u2028b"]


def test_question_file_given_for_answers_is_not_scored(tmp_path):
    path = tmp_path / "questions.jsonl"
    question = {"question_id": 0, "image": "a.jpg", "text": "Is there a dog?", "category": "random"}
    path.write_text(json.dumps(question) + "\n")
    with pytest.raises(
        UserError, match="holds questions, with 'question_id', 'image', 'text', 'category'; expected an"
    ):
        read_answers(path)
    # Answers may carry what their questions had.
    path.write_text(json.dumps({**question, "text": "No", "model_id": "m"}) + "\n")
    assert [answer.text for answer in read_answers(path)] == ["No"]
