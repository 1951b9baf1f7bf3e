"""Answering questions: format, order, resuming, batches too large, images that do not open, the blind run."""

import errno
import fcntl
import json
import os

import pytest
import torch
from PIL import Image

from llava_saep.errors import UserError
from llava_saep.evaluation.answer_files import claimed
from llava_saep.evaluation.questions import Question, as_task_question
from llava_saep.evaluation.ranks import RankError
from llava_saep.evaluation.runner import Asking, answer_questions, check_images, question_messages
from llava_saep.evaluation.tasks import TaskQuestion
from llava_saep.evaluation.tasks._files import read_answers


def question(index, text=None, **fields):
    text = text or f"question {index}"
    return TaskQuestion(question_id=index, text=text, prompt=text, **fields)


QUESTIONS = [question(index) for index in range(5)]


class Model:
    """Stands in for Predictor.generate: says what it was asked, and remembers its batches."""

    def __init__(self, fail_after=None, fits=None, refuses=()):
        self.batches = []
        self.fail_after, self.fits, self.refuses = fail_after, fits, refuses

    @property
    def batch_sizes(self):
        return [len(batch) for batch in self.batches]

    def __call__(self, conversations):
        texts = [messages[0]["content"][-1]["text"] for messages in conversations]
        if self.fail_after is not None and len(self.batches) >= self.fail_after:
            raise KeyboardInterrupt
        if self.fits is not None and len(texts) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if any(text in self.refuses for text in texts):
            raise UserError("the conversation has 900 tokens, but the language model's context is 512")
        self.batches.append(texts)
        return [f"answer to {text}" for text in texts]


def answer(model, path, questions=QUESTIONS, fingerprint="f", **changes):
    asking = Asking(generate_batch=model, **{"batch_size": 2, **changes})
    return answer_questions(questions, asking, answers_path=path, model_id="m", fingerprint=fingerprint)


def lines(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


EXPECTED = [f"answer to question {index}" for index in range(5)]


def test_answers_are_written_in_llavas_format(tmp_path):
    path = tmp_path / "sub" / "answers.jsonl"
    answers = answer(Model(), path)
    assert answers.texts == EXPECTED == [each.text for each in read_answers(path)]
    records = lines(path)
    assert [record["question_id"] for record in records] == list(range(5))
    assert set(records[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert records[3]["prompt"] == "question 3"
    assert len({record["answer_id"] for record in records}) == 5


def test_place_that_cannot_be_written_to_is_said_before_anything_is_asked(tmp_path):
    (tmp_path / "file").write_text("")
    model = Model()
    with pytest.raises(UserError, match="cannot be written .*; choose another place for answers"):
        answer(model, tmp_path / "file" / "answers.jsonl")
    assert model.batches == []


def test_file_that_holds_something_else_is_not_written_over(tmp_path):
    path = tmp_path / "annotations.json"
    path.write_text('{"questions": [1,\n 2]}\n')
    with pytest.raises(UserError, match="annotations.json: holds something else than answers"):
        answer(Model(), path)
    assert path.read_text() == '{"questions": [1,\n 2]}\n'


def test_run_that_was_killed_within_its_first_line_begins_anew(tmp_path):
    path = tmp_path / "answers.jsonl"
    answer(Model(), path)
    path.write_text(path.read_text()[:40])
    assert answer(Model(), path).texts == EXPECTED


def test_answers_that_did_not_arrive_in_the_file_are_an_error(tmp_path):
    """As where ranks write to disks of their own, and rank 0 finds its part alone."""
    path = tmp_path / "answers.jsonl"
    model = Model()

    def generate(conversations):
        path.write_text("")
        return model(conversations)

    with pytest.raises(UserError, match="4 of 5 answers are missing, the first one to question 0. All ranks must"):
        answer(generate, path)


def test_fields_of_a_benchmark_stand_in_its_answer_lines(tmp_path):
    path = tmp_path / "answers.jsonl"
    rounds = [question(7, "Which?", answer_fields={"round_id": index, "options": ["a", "b"]}) for index in range(2)]
    answer(Model(), path, rounds)
    assert [(record["question_id"], record["round_id"], record["options"]) for record in lines(path)] == [
        (7, 0, ["a", "b"]),
        (7, 1, ["a", "b"]),
    ]
    again = Model()
    answer(again, path, rounds)
    assert again.batches == []


def test_interrupted_run_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer(Model(fail_after=1), path)
    with path.open("a") as file:
        file.write('{"question_id": 2, "text": "cut sho')
    model = Model()
    assert answer(model, path).texts == EXPECTED
    assert model.batch_sizes == [2, 1]
    assert len(lines(path)) == 5


def test_answer_with_a_line_separator_of_unicode_is_kept(tmp_path):
    """U+2028 stands unescaped in the file, and is no end of a line there."""
    path = tmp_path / "answers.jsonl"
    questions = [question(0, "what follows\u2028?")]
    answer(Model(), path, questions)
    model = Model()
    assert answer(model, path, questions).texts == ["answer to what follows\u2028?"]
    assert model.batches == []


def test_answer_file_that_is_being_written_is_left_to_whoever_writes_it(tmp_path):
    """Two processes with one file: the second would replace it, and the first go on in a file that has no name."""
    path = tmp_path / "answers.jsonl"
    model, second = Model(), Model()

    def generate(conversations):
        with pytest.raises(UserError, match=r"another evaluation is writing .*answers\.jsonl; wait for its end"):
            answer(second, path)
        return model(conversations)

    assert answer(generate, path).texts == EXPECTED
    assert second.batches == []
    assert answer(second, tmp_path / "others.jsonl").texts == EXPECTED
    assert sorted(os.listdir(tmp_path)) == ["answers.jsonl", "others.jsonl"]


def test_lock_of_a_killed_run_holds_nobody_up(tmp_path):
    (tmp_path / ".answers.jsonl.lock").touch()
    assert answer(Model(), tmp_path / "answers.jsonl").texts == EXPECTED
    assert os.listdir(tmp_path) == ["answers.jsonl"]


def test_lock_that_its_holder_has_removed_since_it_was_opened_is_not_taken(tmp_path, monkeypatch):
    """It would have no name, so that the next one could take another of its name."""
    path, flock, calls = tmp_path / "answers.jsonl", fcntl.flock, []

    def flock_late(file, operation):
        if not calls:
            (tmp_path / ".answers.jsonl.lock").unlink()
        calls.append(operation)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    with claimed(path):
        assert len(calls) == 2
        with pytest.raises(UserError, match="another evaluation"), claimed(path):
            pass


def test_file_system_without_locks_is_written_to_all_the_same(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert answer(Model(), tmp_path / "answers.jsonl").texts == EXPECTED


def test_parts_of_ranks_that_were_killed_count_once_and_go(tmp_path):
    """As they lie after a kill between writing the whole and removing the parts, on another number of ranks."""
    path = tmp_path / "answers.jsonl"
    answer(Model(), path)
    written = path.read_text().split("\n")
    (tmp_path / "answers.jsonl.rank0").write_text("\n".join(written[:2]) + "\n")
    (tmp_path / "answers.jsonl.rank5").write_text(written[4] + "\n" + written[3][:30])
    path.write_text("\n".join(written[:2]) + "\n")
    model = Model()
    assert answer(model, path).texts == EXPECTED
    assert sorted(text for batch in model.batches for text in batch) == ["question 2", "question 3"]
    assert [file.name for file in tmp_path.iterdir()] == ["answers.jsonl"]
    assert len(lines(path)) == 5


def test_answer_that_lies_in_two_files_serves_one_of_two_equal_questions(tmp_path):
    path = tmp_path / "answers.jsonl"
    twice = [question("a.png", "What?"), question("a.png", "What?")]
    answer(Model(), path, twice[:1])
    (tmp_path / "answers.jsonl.rank0").write_text(path.read_text())
    model = Model()
    answer(model, path, twice)
    assert model.batch_sizes == [1]
    assert len({record["answer_id"] for record in lines(path)}) == 2


@pytest.mark.parametrize("change", [{"fingerprint": "other weights"}, {"blind": True}])
def test_answers_of_other_weights_or_of_the_blind_run_are_not_reused(tmp_path, change):
    path = tmp_path / "answers.jsonl"
    answer(Model(), path)
    model = Model()
    answer(model, path, **change)
    assert sum(model.batch_sizes) == 5


def test_answers_made_in_another_way_are_kept_beside_the_file_and_found_again(tmp_path, caplog):
    """Whoever tries another limit, or gives LLaVA's answer file as their own, loses no hours of work."""
    path = tmp_path / "answers.jsonl"
    path.write_text(
        '{"question_id": 0, "prompt": "question 0", "text": "LLaVA says", "answer_id": "x", "metadata": {}}\n'
    )
    answer(Model(), path, fingerprint="one")
    assert "1 answers were made in another way" in caplog.text
    first = {line["answer_id"] for line in lines(path)}
    answer(Model(), path, fingerprint="two")
    model = Model()
    answer(model, path, fingerprint="one")
    assert model.batches == []
    assert {line["answer_id"] for line in lines(path)} == first and len(lines(path)) == 5
    beside = [line["text"] for file in tmp_path.glob("answers.*.jsonl") for line in lines(file)]
    assert sorted(beside) == ["LLaVA says", *EXPECTED]


def test_answers_to_other_questions_are_kept_beside_the_file_and_found_again(tmp_path, caplog):
    """Whoever gives another question file, and the same output folder, loses no hours of work."""
    path = tmp_path / "answers.jsonl"
    answer(Model(), path)
    ids = [line["answer_id"] for line in lines(path)]
    answer(Model(), path, [question(0, "another"), QUESTIONS[1]])
    assert "4 answers are to other questions; they are kept in a file beside it" in caplog.text
    assert [line["answer_id"] for file in tmp_path.glob("answers.*.jsonl") for line in lines(file)] == [
        each for each in ids if each != ids[1]
    ]
    caplog.clear()
    answer(Model(), path, [question(0, "another"), QUESTIONS[1]])
    assert "other questions" not in caplog.text  # they lie there already
    model = Model()
    answer(model, path)
    assert model.batches == [] and [line["answer_id"] for line in lines(path)] == ids


@pytest.mark.parametrize("num_writes", [1, 2, 3])
def test_kill_while_answers_to_other_questions_are_moved_loses_none(tmp_path, monkeypatch, num_writes):
    path = tmp_path / "answers.jsonl"
    answer(Model(), path, QUESTIONS[:3])
    answer(Model(), path, QUESTIONS[2:])  # the first two lie beside it
    replace, calls = os.replace, []

    def replace_or_die(*arguments):
        calls.append(arguments)
        if len(calls) == num_writes:
            raise KeyboardInterrupt
        replace(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", replace_or_die)
        answer(Model(), path, QUESTIONS[:1])
    model = Model()
    assert answer(model, path).texts == EXPECTED
    assert model.batches == []


def test_changed_wording_is_asked_anew(tmp_path):
    path = tmp_path / "answers.jsonl"
    answer(Model(), path)
    model = Model()
    changed = [question(0, "another question"), *QUESTIONS[1:]]
    assert answer(model, path, changed).texts[0] == "answer to another question"
    assert model.batch_sizes == [1]
    assert [record["question_id"] for record in lines(path)] == list(range(5))  # scorers go by the order


def test_questions_that_share_an_id_are_all_answered(tmp_path):
    """In LLaVA's files of TextVQA and MME the id is the image's, and several questions are about it."""
    path = tmp_path / "answers.jsonl"
    questions = [question("a.png", text) for text in ("one", "two", "one")]
    expected = ["answer to one", "answer to two", "answer to one"]
    assert answer(Model(), path, questions).texts == expected
    assert [record["text"] for record in lines(path)] == expected
    model = Model()
    assert answer(model, path, questions).texts == expected
    assert model.batches == []


def test_prompts_of_similar_length_go_together_and_answers_keep_the_order_of_the_questions(tmp_path):
    path = tmp_path / "answers.jsonl"
    texts = ["aaaa", "a", "aaaaa", "aa"]
    model = Model()
    questions = [question(index, text) for index, text in enumerate(texts)]
    answers = answer(model, path, questions, prompt_lengths=lambda asked: [len(each.text) for each in asked])
    assert model.batches == [["aaaaa", "aaaa"], ["aa", "a"]]
    assert answers.texts == [f"answer to {text}" for text in texts] == [record["text"] for record in lines(path)]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_batch_that_does_not_fit_into_memory_is_halved_and_said(tmp_path, caplog, error):
    model = Model()

    def generate(conversations):
        if len(conversations) > 2:
            raise error
        return model(conversations)

    answers = answer(generate, tmp_path / "answers.jsonl", [question(index) for index in range(10)], batch_size=8)
    assert answers.texts == [f"answer to question {index}" for index in range(10)]
    assert model.batch_sizes == [2] * 5
    assert [record.message for record in caplog.records if "memory" in record.message] == [
        "8 questions at once do not fit into memory; going on with 4",
        "4 questions at once do not fit into memory; going on with 2",
    ]


def test_question_that_does_not_fit_alone_ends_the_run_and_keeps_the_answers(tmp_path):
    path = tmp_path / "answers.jsonl"
    answer(Model(), path, QUESTIONS[:2])
    with pytest.raises(UserError, match="question 2 does not fit into memory even alone"):
        answer(Model(fits=0), path)
    assert len(lines(path)) == 2


def test_error_of_the_model_itself_is_not_taken_for_a_lack_of_memory(tmp_path):
    def generate(conversations):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        answer(generate, tmp_path / "answers.jsonl")


@pytest.fixture
def image_questions(tmp_path):
    """Five questions about images, of which the second file is damaged."""
    for index in range(5):
        Image.new("RGB", (3, 3)).save(tmp_path / f"{index}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:40])
    return [question(index, images=(tmp_path / f"{index}.png",)) for index in range(5)]


def test_question_about_a_damaged_image_is_left_out_and_reported(image_questions, tmp_path, caplog):
    path = tmp_path / "answers.jsonl"
    answers = answer(Model(), path, image_questions)
    assert answers.texts == [EXPECTED[0], None, *EXPECTED[2:]]
    assert [(each.position, each.question_id) for each in answers.excluded] == [(1, 1)]
    assert "1.png: cannot be read as an image" in answers.excluded[0].reason
    assert [record["question_id"] for record in lines(path)] == [0, 2, 3, 4]
    assert "1 of 5 questions got no answer, the first one 1: " in caplog.text


def test_mended_image_is_asked_about_by_the_next_run(image_questions, tmp_path):
    path = tmp_path / "answers.jsonl"
    answer(Model(), path, image_questions)
    Image.new("RGB", (3, 3)).save(tmp_path / "1.png")
    model = Model()
    assert answer(model, path, image_questions).texts == EXPECTED
    assert model.batches == [["question 1"]]


def test_damaged_image_ends_the_run_where_that_is_asked_for(image_questions, tmp_path):
    with pytest.raises(RankError, match=r"question 1: .*1\.png: cannot be read as an image"):
        answer(Model(), tmp_path / "answers.jsonl", image_questions, on_bad_image="error")


def test_refused_prompt_costs_its_own_question_alone(tmp_path):
    """The model refuses a batch as a whole, so its questions are asked one by one."""
    answers = answer(Model(refuses=["question 1"]), tmp_path / "answers.jsonl", batch_size=4)
    assert answers.texts == [EXPECTED[0], None, *EXPECTED[2:]]
    assert "context is 512" in answers.excluded[0].reason


def test_run_in_which_nothing_could_be_asked_is_a_mistake(tmp_path):
    (tmp_path / "pointer.png").write_text("version https://git-lfs.github.com/spec/v1")
    questions = [question(index, images=(tmp_path / "pointer.png",)) for index in range(3)]
    with pytest.raises(UserError, match=r"none of the 3 questions could be put, the first one .*pointer\.png: cannot"):
        answer(Model(), tmp_path / "answers.jsonl", questions)


def test_no_more_images_are_open_than_those_of_two_batches(tmp_path):
    """A benchmark's images do not fit into memory together."""
    opened, answered, most = [], [], []

    def open_image(path):
        opened.append(path)
        most.append(len(opened) - len(answered))
        return Image.new("RGB", (2, 2))

    def generate(conversations):
        answered.extend(conversations)
        return ["yes"] * len(conversations)

    questions = [question(index, images=(tmp_path / f"{index}.png",)) for index in range(40)]
    answer(generate, tmp_path / "answers.jsonl", questions, batch_size=4, open_image=open_image)
    assert len(opened) == 40
    assert max(most) <= 8


def test_blind_question_differs_by_the_image_alone(image_questions, tmp_path):
    seeing = question_messages(image_questions[0], ["pixels"])[0]["content"]
    assert seeing == [{"type": "image", "image": "pixels"}, {"type": "text", "text": "question 0"}]
    asked = []

    def generate(conversations):
        asked.extend(conversations)
        return ["no"] * len(conversations)

    answer(generate, tmp_path / "answers.jsonl", image_questions, blind=True)  # the damaged image is not opened
    assert [messages[0]["content"] for messages in asked[:1]] == [seeing[1:]]
    assert len(asked) == 5


def test_missing_images_are_found_before_the_model_is_asked(tmp_path):
    (tmp_path / "0.png").touch()
    questions = [
        as_task_question(Question(question_id=index, text="?", image=f"{index}.png"), tmp_path) for index in range(5)
    ]
    with pytest.raises(UserError, match=r"4 images of the questions are missing, the first one .*1\.png"):
        check_images(questions)


def test_several_ranks_without_a_meeting_place_are_told_how_to_start(monkeypatch):
    from llava_saep.evaluation import ranks

    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="start several processes with torchrun or deepspeed"), ranks.process_group():
        pass


def test_flushed_answers_are_in_the_file_while_the_next_batch_is_answered(tmp_path):
    path = tmp_path / "answers.jsonl"
    seen = []

    def generate(conversations):
        seen.append(len(lines(path)))
        return ["yes"] * len(conversations)

    answer(generate, path)
    assert seen == [0, 2, 4]
    assert os.listdir(tmp_path) == ["answers.jsonl"]
