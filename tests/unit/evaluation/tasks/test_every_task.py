"""What holds for every benchmark: nothing is lost, nothing is doubled, and what is missing is said."""

import dataclasses
import json
import random
import shutil
from zipfile import ZipFile

import pytest

from llava_saep.errors import UserError
from llava_saep.evaluation.tasks import EmbeddedImage, JudgedTask, find_task, select_tasks, task_names
from llava_saep.evaluation.tasks._files import read_answers, write_json, write_json_lines
from tests.fixtures.benchmarks import answers_to, write_sample

SPLITS = [(name, split) for name in task_names() for split in find_task(name).splits]
SCORED = [
    (name, split)
    for name, split in SPLITS
    if find_task(name).has_labels(split) and not isinstance(find_task(name), JudgedTask)
]


@pytest.fixture
def sample(tmp_path, request):
    """(task, folder with its sample, right answers of each split)."""
    task = find_task(request.param)
    folder = tmp_path / task.folder_name
    return task, folder, write_sample(task.name, folder)


def over_splits(splits):
    return pytest.mark.parametrize(("sample", "split"), splits, indirect=["sample"], ids=[":".join(s) for s in splits])


def read_all(task, folder, split, answers):
    """Everything that is read when a task is run."""
    task.questions(folder, split)
    if isinstance(task, JudgedTask):
        task.judge_requests(folder, split, answers)
    elif task.has_labels(split):
        task.score(folder, split, answers)
    task.export(folder, split, answers, folder / "out")


@over_splits(SPLITS)
def test_questions_are_complete_and_their_images_are_there(sample, split):
    task, folder, right = sample
    questions = task.questions(folder, split)
    assert len(questions) == len(right[split]) > 0
    assert len({question.key for question in questions}) == len(questions)
    for question in questions:
        assert question.text.startswith(question.prompt.removeprefix("<image>\n"))
        for image in question.images:
            assert image.open().mode == "RGB" if isinstance(image, EmbeddedImage) else image.is_file()


@over_splits(SPLITS)
def test_what_the_doctor_asks_for_is_what_the_task_reads(sample, split):
    task, folder, right = sample
    requirements = task.requirements(folder, split)
    assert all(each.path.exists() and each.source for each in requirements)
    assert {each.purpose for each in requirements} <= {"questions", "images", "score"}
    answers = answers_to(task.name, folder, split, right[split])

    read_all(task, folder, split, answers)
    for requirement in requirements:
        if requirement.purpose != "images" and requirement.path.is_file():
            hidden = requirement.path.with_name("hidden")
            requirement.path.rename(hidden)
            with pytest.raises(UserError, match=requirement.path.name.replace("+", r"\+")):
                read_all(task, folder, split, answers)
            hidden.rename(requirement.path)


@over_splits(SCORED)
def test_right_answers_score_one(sample, split):
    task, folder, right = sample
    result = task.score(folder, split, answers_to(task.name, folder, split, right[split]))
    assert (result.task, result.split, result.exclusions) == (task.name, split, ())
    full = {"perception": 2000, "cognition": 800}
    assert result.metrics[0].value == pytest.approx(full.get(result.metrics[0].name, 1))
    assert result.metrics[0].n > 0


@over_splits(SCORED)
def test_a_missing_answer_is_wrong_and_counted_and_keeps_the_denominator(sample, split):
    task, folder, right = sample
    answers = answers_to(task.name, folder, split, right[split])
    whole, part = task.score(folder, split, answers), task.score(folder, split, answers[1:])
    (missing,) = part.exclusions
    assert (missing.reason, missing.count, missing.effect) == ("questions without an answer", 1, "counted as wrong")
    assert missing.examples == (str(answers[0].question_id),)
    assert part.metrics[0].n == whole.metrics[0].n
    assert part.metrics[0].value < whole.metrics[0].value


@over_splits(SCORED)
def test_of_two_answers_to_one_question_the_last_counts_and_the_other_is_reported(sample, split):
    task, folder, right = sample
    answers = answers_to(task.name, folder, split, right[split])
    wrong = answers_to(task.name, folder, split, ["unheard of"] * len(answers))
    result = task.score(folder, split, [wrong[0], *answers])
    assert result.metrics == task.score(folder, split, answers).metrics
    assert [(each.reason, each.count) for each in result.exclusions] == [("answers that a later one replaces", 1)]


@over_splits(SCORED)
def test_answers_to_no_question_are_reported(sample, split):
    task, folder, right = sample
    answers = answers_to(task.name, folder, split, right[split])
    strangers = [type(answers[0])(question_id=each, text="yes") for each in ("stranger", "²")]
    result = task.score(folder, split, [*answers, *strangers])
    (unknown,) = result.exclusions
    assert (unknown.reason, unknown.count, unknown.examples) == ("answers to no question", 2, ("stranger", "²"))
    task.export(folder, split, [*answers, *strangers], folder / "out")


@over_splits(SCORED)
def test_answers_to_other_questions_with_the_same_ids_are_reported(sample, split):
    """Ids are often plain numbers: answers to another benchmark would pass for this one's."""
    task, folder, right = sample
    answers = answers_to(task.name, folder, split, right[split])
    reworded = [dataclasses.replace(each, prompt=f"{each.prompt} Really?") for each in answers]
    reasons = {each.reason: each.effect for each in task.score(folder, split, reworded).exclusions}
    if len({(each.question_id, each.round_id) for each in answers}) == len(answers):
        assert reasons == {"answers to another wording": "scored all the same"}
    else:  # questions that only their words tell apart
        assert set(reasons) == {"questions without an answer", "answers to no question"}


@over_splits(SCORED)
def test_the_order_of_answers_does_not_matter(sample, split):
    task, folder, right = sample
    answers = answers_to(task.name, folder, split, right[split])
    assert task.score(folder, split, answers[::-1]) == task.score(folder, split, answers)


@over_splits([(name, split) for name, split in SPLITS if not find_task(name).has_labels(split)])
def test_hidden_labels_are_said_and_an_upload_is_written(sample, split):
    task, folder, right = sample
    answers = answers_to(task.name, folder, split, right[split])
    with pytest.raises(UserError, match=f"{task.name}:{split}: the labels are hidden"):
        task.score(folder, split, answers)
    written = task.export(folder, split, answers, folder / "upload")
    assert written and all(path.is_file() for path in written)


def places_in(value, path=()):
    """Paths of keys and indices to everything inside a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places_in(child, (*path, key))


def damaged(value, path, replacement):
    """A copy of a JSON value with one place replaced, or left out where the replacement is `...`."""
    copy = json.loads(json.dumps(value))
    target = copy
    for key in path[:-1]:
        target = target[key]
    if replacement is ...:
        del target[path[-1]]
    else:
        target[path[-1]] = replacement
    return copy


def written_files(task, folder, split, answers, output):
    """Contents of a task's upload files, those inside of an xlsx table one by one."""
    contents = {}
    for path in task.export(folder, split, answers, output):
        if path.suffix == ".xlsx":
            with ZipFile(path) as book:
                names = [name for name in book.namelist() if not name.startswith("docProps")]  # they hold the date
                contents[path.name] = {name: book.read(name) for name in names}
        else:
            contents[path.name] = path.read_text()
    return contents


@over_splits(SPLITS)
def test_ids_may_be_numbers_in_one_file_and_texts_in_the_other(sample, split):
    task, folder, right = sample
    answers = answers_to(task.name, folder, split, right[split])
    as_texts = [dataclasses.replace(each, question_id=str(each.question_id)) for each in answers]
    uploads = [written_files(task, folder, split, each, folder / "out") for each in (answers, as_texts)]
    if task.name not in ("gqa", "mmvet"):  # LLaVA hands their ids on as they are
        assert uploads[0] == uploads[1]
    if (task.name, split) in SCORED:
        assert task.score(folder, split, as_texts) == task.score(folder, split, answers)


@over_splits(SPLITS)
def test_half_of_a_surrogate_pair_in_an_answer_is_no_reason_to_stop(sample, split):
    """JSON can escape one alone, as a program that cuts texts by UTF-16 units does; no file can hold it."""
    task, folder, right = sample
    answers = answers_to(task.name, folder, split, right[split])
    lines = [{**each.fields, "prompt": each.prompt, "text": "cut \ud83d"} for each in answers]
    read = read_answers(write_json_lines(folder / "answers.jsonl", lines))
    assert [each.text for each in read] == ["cut \ufffd"] * len(answers)
    assert all("\ud83d" not in str(each) for each in written_files(task, folder, split, read, folder / "out").values())


@over_splits(SPLITS)
def test_damaged_files_end_in_one_sentence_and_never_in_a_traceback(sample, split):
    """Fifty random damages of each file: a field gone, or with a value of another kind."""
    task, folder, right = sample
    answers = answers_to(task.name, folder, split, right[split])
    rng = random.Random(f"{task.name} {split}")
    refused = 0
    for path in sorted({each.path for each in task.requirements(folder, split) if each.path.is_file()}):
        text = path.read_text()
        if path.suffix == ".tsv":
            continue
        is_lines = path.suffix == ".jsonl" or "coco_pope" in path.name
        content = [json.loads(line) for line in text.splitlines()] if is_lines else json.loads(text)
        places = list(places_in(content))
        for _ in range(50):
            broken = damaged(content, rng.choice(places), rng.choice([..., None, 5, "x", [], {}, True, -1.5, [None]]))
            path.write_text("\n".join(map(json.dumps, broken)) if is_lines else json.dumps(broken))
            try:
                read_all(task, folder, split, answers)
            except UserError as error:
                assert str(error)
                refused += 1
        path.write_text(text)
    assert refused or task.name.startswith("mmbench")


@pytest.mark.parametrize("write", [write_json, write_json_lines])
def test_place_that_cannot_be_written_to_is_said(tmp_path, write):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="upload.json: cannot be written .*; name another place"):
        write(tmp_path / "file" / "upload.json", [{}])


@over_splits(SPLITS)
def test_upload_that_cannot_be_written_is_said(sample, split):
    """After hours of answering it is one note, and the scores are there."""
    task, folder, right = sample
    (folder / "file").write_text("")
    answers = answers_to(task.name, folder, split, right[split])
    if task.export(folder, split, answers, folder / "out"):
        with pytest.raises(UserError, match="cannot be written .*; name another place"):
            task.export(folder, split, answers, folder / "file")


def test_tasks_are_selected_by_name_and_split():
    selected = select_tasks(["pope, textvqa", "mmbench:dev_all_rounds", "pope"])
    labels = ["pope", "textvqa:val_ocr", "textvqa:val_no_ocr", "mmbench:dev_all_rounds"]
    assert [each.label for each in selected] == labels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pop", "unknown task 'pop'. Did you mean 'pope'?"),
        ("mmbench:train", "no split 'train'. Splits: dev, dev_all_rounds, test, test_all_rounds"),
    ],
)
def test_unknown_tasks_and_splits_are_refused(text, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        select_tasks([text])


def test_a_new_file_is_a_task(tmp_path, monkeypatch):
    from llava_saep.evaluation.tasks import _registry

    monkeypatch.setattr(_registry, "__file__", str(tmp_path / "_registry.py"))
    shutil.copy(__file__, tmp_path / "mine.py")
    (tmp_path / "_shared.py").touch()
    assert task_names() == ["mine"]
