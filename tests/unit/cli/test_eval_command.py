"""`llava-saep eval`, with a model that knows its answers: files, table and mistakes."""

import json

import pytest
from PIL import Image

from llava_saep import generation
from llava_saep.cli import main
from llava_saep.evaluation.answer_files import claimed
from tests.fixtures.evaluation_runs import TINY_MODEL, copy_checkpoint


class Oracle(generation.Predictor):
    """Answers rightly when it sees the image, and always "no" when it does not."""

    def generate(self, conversations, options=None):
        assert options.temperature == 0
        return ["so yes" if messages[0]["content"][0]["type"] == "image" else "no" for messages in conversations]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A model folder and a question file with its images; loading the model gives the oracle."""
    oracle = Oracle.from_pretrained(TINY_MODEL, device="cpu")
    monkeypatch.setattr(generation.Predictor, "from_pretrained", lambda folder, **kwargs: oracle)
    copy_checkpoint(TINY_MODEL, tmp_path / "model")
    (tmp_path / "held_out" / "images").mkdir(parents=True)
    lines = []
    for index, answer in enumerate(["yes", "yes", "yes", "no"]):
        Image.new("RGB", (2, 2)).save(tmp_path / "held_out" / "images" / f"{index}.png")
        question = {"question_id": index, "image": f"{index}.png", "text": "Is it?", "category": "existence"}
        lines.append(json.dumps({**question, "answer": answer}))
    (tmp_path / "held_out" / "questions.jsonl").write_text("\n".join(lines))
    return tmp_path


def flags(folders, *extra):
    question_file = folders / "held_out" / "questions.jsonl"
    return ["eval", "--model_path", str(folders / "model"), "--question_file", str(question_file), *extra]


def test_answers_longer_than_the_context_are_shortened_and_it_is_said(folders, caplog):
    context_length = generation.Predictor.from_pretrained(TINY_MODEL).context_length
    assert main(flags(folders, "--max-new-tokens", str(context_length))) == 0
    report = json.loads((folders / "model" / "evaluation" / "report.json").read_text())
    assert 0 < report["decoding"]["max_new_tokens"] <= context_length // 2
    assert "questions: answers of up to 512 tokens are more than half of the model's context of 512" in caplog.text


def test_limit_that_leaves_room_for_a_prompt_is_kept_as_it_was_asked_for(folders, caplog):
    """The tiny model's context is 512 tokens."""
    assert main(flags(folders, "--max-new-tokens", "400")) == 0
    report = json.loads((folders / "model" / "evaluation" / "report.json").read_text())
    assert report["decoding"]["max_new_tokens"] == 400 and "context" not in caplog.text


def test_images_beside_the_question_file_are_found_and_both_runs_scored(folders, capsys):
    assert main(flags(folders, "--blind")) == 0
    written = folders / "model" / "evaluation"
    report = json.loads((written / "report.json").read_text())
    assert report["with_image"]["overall"]["num_correct"] == 3
    assert report["blind"]["overall"]["num_correct"] == 1
    assert report["with_image"]["existence"]["chance"] == 0.75
    assert sorted(path.name for path in written.iterdir()) == [
        "answers.jsonl",
        "answers_blind.jsonl",
        "report.json",
        "report.md",
    ]
    last_row = capsys.readouterr().out.split("overall")[-1]
    assert "75.0 %" in last_row and "25.0 %" in last_row


@pytest.mark.parametrize("name", ["answers.jsonl", "answers_blind.jsonl"])
def test_second_evaluation_into_a_folder_is_refused_before_the_model_is_loaded(folders, monkeypatch, capsys, name):
    monkeypatch.setattr(generation.Predictor, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    with claimed(folders / "model" / "evaluation" / name):
        assert main(flags(folders, "--blind")) == 2
    assert "another evaluation is writing" in capsys.readouterr().err


def test_report_says_what_made_the_numbers(folders):
    assert main(flags(folders)) == 0
    report = json.loads((folders / "model" / "evaluation" / "report.json").read_text())
    assert report["prompt"]["template"] and report["prompt"]["example"].count("<image>") == 1
    assert report["decoding"]["max_new_tokens"] == 64 and report["decoding"]["temperature"] == 0
    assert report["preprocessing"]["size"] and report["model"]["fingerprint"]
    assert report["data"]["num_questions"] == 4 and report["program"]["versions"]["transformers"]


def test_damaged_image_is_left_out_of_both_scores_and_reported(folders, capsys):
    (folders / "held_out" / "images" / "3.png").write_bytes(b"no image")
    assert main(flags(folders, "--blind")) == 0
    written = folders / "model" / "evaluation"
    report = json.loads((written / "report.json").read_text())
    assert [report[run]["overall"]["num_questions"] for run in ("with_image", "blind")] == [3, 3]
    assert report["with_image"]["overall"]["num_correct"] == 3
    assert [each["question_id"] for each in report["excluded_questions"]] == [3]
    sentence = "1 of 4 questions could not be put and count in no score, the first one 3: "
    assert sentence in capsys.readouterr().out and sentence in (written / "report.md").read_text()


def test_missing_images_can_be_left_out_where_that_is_asked_for(folders):
    (folders / "held_out" / "images" / "0.png").unlink()
    assert main(flags(folders)) == 2
    assert main(flags(folders, "--on_bad_image", "exclude")) == 0
    report = json.loads((folders / "model" / "evaluation" / "report.json").read_text())
    assert report["with_image"]["overall"]["num_questions"] == 3


def test_model_of_the_hub_is_evaluated_into_a_folder_of_its_name(folders, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: str(folders / "model"))
    monkeypatch.chdir(folders)
    argv = flags(folders)
    argv[argv.index("--model_path") + 1] = "org/some-llava"
    assert main(argv) == 0
    records = (folders / "evaluation" / "some-llava" / "answers.jsonl").read_text().splitlines()
    assert {json.loads(record)["model_id"] for record in records} == {"some-llava"}


def test_without_blind_only_the_images_are_asked_about(folders):
    assert main(flags(folders)) == 0
    assert not (folders / "model" / "evaluation" / "answers_blind.jsonl").exists()
    assert json.loads((folders / "model" / "evaluation" / "report.json").read_text())["blind"] == {}


def test_questions_without_answers_are_answered_and_not_scored(folders, capsys):
    (folders / "held_out" / "questions.jsonl").write_text('{"question_id": 1, "image": "0.png", "text": "What?"}')
    assert main(flags(folders)) == 0
    assert "no `answer` fields" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--model_path", "absent"], "absent: no such folder"),
        (["--question_file", "absent.jsonl"], "absent.jsonl: no such file"),
        (["--image_folder", "absent"], "4 images of the questions are missing"),
        (["--batch_size", "0"], "--batch-size must be at least 1"),
    ],
)
def test_mistakes_exit_with_2_and_write_nothing(folders, capsys, extra, message):
    assert main(flags(folders, *extra)) == 2
    assert message in capsys.readouterr().err
    assert not (folders / "model" / "evaluation").exists()
