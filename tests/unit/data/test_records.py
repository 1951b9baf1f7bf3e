"""Conversation files are read as LLaVA has them; what is wrong is named by file, index and id."""

import json
import pickle

import pytest

from llava_saep.data.conversation import MMTAG_IMAGE_MARKER, Turn
from llava_saep.data.records import BadSampleError, read_records
from llava_saep.errors import UserError

QUESTION = {"from": "human", "value": "What?"}
IMAGE_QUESTION = {"from": "human", "value": "What?\n<image>"}
ANSWER = {"from": "gpt", "value": "A cat."}


def _write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_record_becomes_turns_and_images(tmp_path):
    record = {"id": 7, "image": "a/cat.png", "conversations": [IMAGE_QUESTION, ANSWER]}
    (read,) = read_records(_write(tmp_path / "data.json", [record]))
    assert read.turns == (Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat."))
    assert read.images == ("a/cat.png",)
    assert (read.source.index, read.source.id) == (0, 7)


def test_json_lines_are_read(tmp_path):
    lines = [json.dumps({"id": number, "conversations": [QUESTION, ANSWER]}) for number in range(3)]
    records = read_records(_write(tmp_path / "data.jsonl", "\n\n".join(lines) + "\n"))
    assert [record.source.id for record in records] == [0, 1, 2]


def test_several_images_keep_their_order(tmp_path):
    question = {"from": "human", "value": "<image>\n<image>\nCompare."}
    record = {"image": ["b.png", "a.png"], "conversations": [question, ANSWER]}
    (read,) = read_records(_write(tmp_path / "data.json", [record]))
    assert read.images == ("b.png", "a.png")
    assert read.turns[0].text == "<image>\n<image>\nCompare."


def test_an_answer_before_the_first_question_is_left_out_and_counted(tmp_path, caplog):
    greeted = {"id": "g", "conversations": [ANSWER, QUESTION, ANSWER]}
    path = _write(tmp_path / "data.json", [{"conversations": [QUESTION, ANSWER]}, greeted, greeted])
    read = read_records(path)
    assert [[turn.role for turn in record.turns] for record in read] == [["user", "assistant"]] * 3
    assert f"{path}: 2 samples start with an answer, which is left out as in LLaVA; the first: sample 1" in caplog.text
    read = read_records(path, any_order=True)
    assert [turn.role for turn in read[1].turns] == ["assistant", "user", "assistant"]


def test_a_marker_without_images_is_text_and_counted(tmp_path, caplog):
    records = [{"id": "x", "conversations": [IMAGE_QUESTION, ANSWER]}, {"conversations": [QUESTION, ANSWER]}]
    read = read_records(_write(tmp_path / "data.json", records), use_im_start_end=True, image_marker="<i><image></i>")
    assert read[0].turns[0].text == IMAGE_QUESTION["value"]
    assert "1 samples have <image> in their text but no 'image'" in caplog.text
    assert "sample 0 (id 'x')" in caplog.text


def test_a_first_turn_from_system_is_the_system_prompt(tmp_path):
    record = {"conversations": [{"from": "system", "value": "Be brief."}, QUESTION, ANSWER]}
    (read,) = read_records(_write(tmp_path / "data.json", [record]))
    assert read.system == "Be brief."
    assert read.turns == (Turn("user", "What?"), Turn("assistant", "A cat."))


def test_markers_are_written_as_the_template_does(tmp_path):
    record = {"image": "a.png", "conversations": [IMAGE_QUESTION, ANSWER]}
    path = _write(tmp_path / "data.json", [record])
    (read,) = read_records(path, image_marker=MMTAG_IMAGE_MARKER)
    assert read.turns[0].text == "<Image><image></Image>\nWhat?"
    (read,) = read_records(path, image_marker=MMTAG_IMAGE_MARKER, use_im_start_end=True)
    assert read.turns[0].text == "<Image><im_start><image><im_end></Image>\nWhat?"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": 1},\n {"id" 2}]', r"data.json: is not JSON: Expecting ':' delimiter at line 2 column 8"),
        ('{"id": 1}\n{"id": 2}', r"is not JSON: Extra data at line 2 column 1 \(one object per line\?"),
        ("", "is not JSON: Expecting value at line 1 column 1"),
        ('{"id": 1}', "holds a JSON dict, expected a list of LLaVA records"),
        ("[]", "holds no records"),
    ],
)
def test_unusable_file_is_described(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_records(_write(tmp_path / "data.json", content))


CUT_OFF = "cut off when it was written or copied"


@pytest.mark.parametrize("num_characters", [10, 60, 100, 150])
def test_a_list_that_was_cut_off_is_named_with_its_last_line(tmp_path, num_characters):
    """In a string, between two records, after a comma."""
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    content = json.dumps([{"id": index, "conversations": turns} for index in range(3)], indent=1)[:num_characters]
    last_line = content.count("\n") + 1
    with pytest.raises(UserError, match=rf"data.json: is not JSON: .* at line {last_line} .*{CUT_OFF}"):
        read_records(_write(tmp_path / "data.json", content))


def test_a_line_that_is_not_json_is_one_bad_record_among_the_others(tmp_path):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    lines = [json.dumps({"id": name, "conversations": turns}) for name in "abc"]
    path = _write(tmp_path / "data.jsonl", "\n".join([lines[0], "{oops}", "", lines[1], lines[2][:40]]))
    with pytest.raises(BadSampleError, match="data.jsonl: sample 1 .*: line 2 is not JSON: .* at column 2$"):
        read_records(path)
    errors = []
    records = read_records(path, on_bad_record=errors.append)
    assert [record.source.id for record in records] == ["a", "b"]
    assert [error.source.index for error in errors] == [1, 3]
    assert {error.cause for error in errors} == {"malformed record"}
    assert "line 5" in str(errors[1]) and CUT_OFF in str(errors[1])


def test_missing_and_binary_files_are_named(tmp_path):
    with pytest.raises(UserError, match="none.json: no such data file"):
        read_records(tmp_path / "none.json")
    (tmp_path / "image.json").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match="image.json: is not UTF-8 text"):
        read_records(tmp_path / "image.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_records(tmp_path)


BAD_RECORDS = {
    "is a str, expected an object": "text",
    "'conversations' is missing, expected a list": {"id": "x"},
    r"'conversations' is \[\], expected a list": {"id": "x", "conversations": []},
    r"turn 0 is \{'from': 'human'\}, expected \{'from'": {"id": "x", "conversations": [{"from": "human"}]},
    "turn 0 is from 'Human', expected one of 'human', 'gpt'": {
        "id": "x",
        "conversations": [{"from": "Human", "value": "What?"}, ANSWER],
    },
    "turn 1 is from 'system', expected one of 'human', 'gpt'; only the first turn may be from 'system'": {
        "id": "x",
        "conversations": [QUESTION, {"from": "system", "value": "Be brief."}, ANSWER],
    },
    r"'image' is \{'path': 'a.png'\}, expected a file name": {"id": "x", "image": {"path": "a.png"}},
    "two turns in a row are from the same side": {"id": "x", "conversations": [QUESTION, QUESTION, ANSWER]},
    "its answer 1 is empty": {"id": "x", "conversations": [QUESTION, {"from": "gpt", "value": ""}]},
    "has no question with an answer": {"id": "x", "conversations": [QUESTION]},
    "hold 2 <image> markers, but 'image' names 1 images": {
        "id": "x",
        "image": "a.png",
        "conversations": [IMAGE_QUESTION, ANSWER, IMAGE_QUESTION, ANSWER],
    },
    "hold 0 <image> markers, but 'image' names 1 images": {
        "id": "x",
        "image": "a.png",
        "conversations": [QUESTION, ANSWER],
    },
}


@pytest.mark.parametrize("message", BAD_RECORDS)
def test_bad_record_is_named_by_file_index_and_id(tmp_path, message):
    good = {"id": "good", "conversations": [QUESTION, ANSWER]}
    bad = BAD_RECORDS[message]
    identity = "id 'x'" if isinstance(bad, dict) else "without id"
    path = _write(tmp_path / "data.json", [good, bad])
    with pytest.raises(BadSampleError, match=rf"data.json: sample 1 \({identity}\): .*{message}"):
        read_records(path)
    errors = []
    assert [record.source.id for record in read_records(path, on_bad_record=errors.append)] == ["good"]
    assert len(errors) == 1


def test_error_survives_pickling(tmp_path):
    with pytest.raises(BadSampleError) as info:
        read_records(_write(tmp_path / "data.json", ["text"]))
    copy = pickle.loads(pickle.dumps(info.value))
    assert (str(copy), copy.cause, copy.source) == (str(info.value), info.value.cause, info.value.source)
