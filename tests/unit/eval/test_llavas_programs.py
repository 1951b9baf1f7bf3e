"""LLaVA's programs for questions under their names: its flags, its answer format, and the answers of its Python API."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava_saep import conv_templates, load_pretrained_model, process_images, tokenizer_image_token
from llava_saep.errors import UserError
from llava_saep.eval import model_vqa, model_vqa_loader, model_vqa_mmbench, model_vqa_science, run_llava
from llava_saep.eval.model_vqa import chunk
from llava_saep.evaluation.tasks import find_task
from llava_saep.evaluation.tasks._files import read_answers
from llava_saep.serve import chat
from tests.fixtures.benchmarks import write_sample
from tests.fixtures.tiny import write_image

MODEL = Path(__file__).parents[2] / "golden" / "llava" / "checkpoints" / "llava_tiny_v15"

# Flags and defaults of llava/eval/*.py and llava/serve/cli.py. A default that is not here is another one on purpose:
# no model is asked that was not named, and the template is the model's own.
VQA = {
    "--model-base": None,
    "--image-folder": "",
    "--question-file": "tables/question.jsonl",
    "--answers-file": "answer.jsonl",
    "--num-chunks": 1,
    "--chunk-idx": 0,
    "--temperature": 0.2,
    "--top_p": None,
    "--num_beams": 1,
}
PROGRAMS = {
    "model_vqa": (model_vqa.build_parser(), VQA, ["--model-path", "--conv-mode"]),
    "model_vqa_loader": (
        model_vqa.build_parser(model_vqa_loader.NAME, model_vqa_loader.MAX_NEW_TOKENS),
        {**VQA, "--max_new_tokens": 128},
        ["--model-path", "--conv-mode"],
    ),
    "model_vqa_mmbench": (
        model_vqa_mmbench.build_parser(),
        {**VQA, "--all-rounds": False, "--single-pred-prompt": False, "--lang": "en"},
        ["--model-path", "--conv-mode"],
    ),
    "model_vqa_science": (
        model_vqa_science.build_parser(),
        {**VQA, "--question-file": "tables/question.json", "--answer-prompter": False, "--single-pred-prompt": False},
        ["--model-path", "--conv-mode"],
    ),
    "run_llava": (
        run_llava.build_parser(),
        {
            "--model-base": None,
            "--conv-mode": None,
            "--sep": ",",
            "--temperature": 0.2,
            "--top_p": None,
            "--num_beams": 1,
            "--max_new_tokens": 512,
        },
        ["--model-path", "--image-file", "--query"],
    ),
    "cli": (
        chat.build_parser(),
        {"--model-base": None, "--conv-mode": None, "--temperature": 0.2, "--max-new-tokens": 512}
        | dict.fromkeys(("--load-8bit", "--load-4bit", "--debug"), False),
        ["--model-path", "--image-file", "--device"],
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_flags_have_llavas_names_and_defaults(name):
    parser, defaults, others = PROGRAMS[name]
    actions = {option: action for action in parser._actions for option in action.option_strings}
    assert {flag: actions[flag].default for flag in defaults} == defaults
    assert all(flag in actions for flag in others)


@pytest.mark.parametrize(("abbreviation", "flag"), [("--conv", "conv_mode"), ("--answers", "answers_file")])
def test_flags_can_be_abbreviated(abbreviation, flag):
    arguments = model_vqa.build_parser().parse_args(["--model-path", "m", abbreviation, "given"])
    assert getattr(arguments, flag) == "given"


@pytest.fixture
def questions(tmp_path):
    """A question file with LLaVA's fields, where two questions have the same question_id."""
    file = tmp_path / "questions.jsonl"
    texts = ["What is it?", "Which colour is the circle?", "Why  so?\n", "Where is it?", "Is it a dog?"]
    lines = []
    for index, text in enumerate(texts):
        image = f"{index // 2}.png"
        write_image(tmp_path / "images" / image, width=24 + index, seed=index)
        lines.append(json.dumps({"question_id": image, "image": image, "text": text, "category": "default"}))
    file.write_text("\n".join(lines) + "\n")
    return file


def answer(program, questions, *flags, name="answers.jsonl"):
    answers = questions.parent / "answers" / name
    places = {
        "--model-path": MODEL,
        "--question-file": questions,
        "--image-folder": questions.parent / "images",
        "--answers-file": answers,
    }
    words = [str(word) for flag in places.items() for word in flag]
    assert program.main([*words, "--temperature", "0", "--device", "cpu", "--max_new_tokens", "6", *flags]) == 0
    return [json.loads(line) for line in answers.read_text().splitlines()]


def answers_of_the_api(questions):
    """What LLaVA's model_vqa does, through `load_pretrained_model` and `generate`."""
    tokenizer, model, image_processor, _ = load_pretrained_model(str(MODEL), None, "llava", device="cpu")
    texts = []
    for line in questions.read_text().splitlines():
        question = json.loads(line)
        conversation = conv_templates["llava_v1"].copy()
        conversation.append_message(conversation.roles[0], "<image>\n" + question["text"])
        conversation.append_message(conversation.roles[1], None)
        input_ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, return_tensors="pt")[None]
        image = Image.open(questions.parent / "images" / question["image"])
        pixels = process_images([image], image_processor, model.config)
        with torch.inference_mode():
            ids = model.generate(input_ids, images=pixels, image_sizes=[image.size], do_sample=False, max_new_tokens=6)
        texts.append(tokenizer.batch_decode(ids, skip_special_tokens=True)[0].strip())
    return texts


def test_answers_equal_those_of_llavas_api_and_are_written_in_its_format(questions):
    records = answer(model_vqa_loader, questions, "--conv-mode", "llava_v1")
    asked = [json.loads(line) for line in questions.read_text().splitlines()]
    assert [record["text"] for record in records] == answers_of_the_api(questions)
    assert any(record["text"] for record in records)
    assert [(r["question_id"], r["prompt"]) for r in records] == [(q["question_id"], q["text"]) for q in asked]
    assert {record["model_id"] for record in records} == {"llava_tiny_v15"}
    assert len({record["answer_id"] for record in records}) == len(asked)


def test_chunks_are_llavas():
    reference = json.loads((MODEL.parents[1] / "eval_scores.json").read_text())["chunks"]
    for case in reference:
        # LLaVA's list of chunks ends where the items do.
        chunks = [list(chunk(range(case["n"]), case["k"], index)) for index in range(case["k"])]
        assert [chunk for chunk in chunks if chunk] == case["chunks"]


def test_chunks_one_after_the_other_are_the_whole(questions):
    whole = answer(model_vqa, questions)
    parts = []
    for index in range(3):
        parts += answer(model_vqa, questions, "--num-chunks", "3", "--chunk-idx", str(index), name=f"3_{index}.jsonl")
    drop = ("answer_id",)
    assert [{k: v for k, v in r.items() if k not in drop} for r in parts] == [
        {k: v for k, v in r.items() if k not in drop} for r in whole
    ]


def answer_file(program, *flags):
    decoding = ["--temperature", "0", "--device", "cpu", "--max_new_tokens", "4", "--model-path", MODEL]
    assert program.main([str(word) for word in (*decoding, *flags)]) == 0
    return read_answers(Path(flags[flags.index("--answers-file") + 1]))


def test_model_vqa_mmbench_stores_what_llavas_does_and_its_task_scores_it(tmp_path):
    """The stored prompt has no instruction; `option_char` says which letter of the table stood where."""
    write_sample("mmbench", tmp_path)
    table = tmp_path / "mmbench_dev_20230712.tsv"
    places = ("--question-file", table, "--answers-file", tmp_path / "answers" / "all.jsonl")
    answers = answer_file(model_vqa_mmbench, *places, "--all-rounds", "--single-pred-prompt")
    assert [(answer.question_id, answer.round_id) for answer in answers] == [
        *((7, i) for i in range(3)),
        *((1_000_007, i) for i in range(3)),
        *((8, i) for i in range(2)),
    ]
    second = answers[1].fields
    assert second["prompt"] == "A map is shown.\nWhere is it?\nA. right\nB. top\nC. left"
    assert (second["options"], second["option_char"]) == (["right", "top", "left"], ["B", "C", "A"])
    assert not find_task("mmbench").score(tmp_path, "dev_all_rounds", answers).exclusions

    parts = []
    for index in range(2):
        own = ("--question-file", table, "--answers-file", tmp_path / "answers" / f"2_{index}.jsonl")
        chunks = ("--num-chunks", "2", "--chunk-idx", index, "--all-rounds", "--single-pred-prompt")
        parts += answer_file(model_vqa_mmbench, *own, *chunks)
    assert [(part.key, part.text) for part in parts] == [(answer.key, answer.text) for answer in answers]


def test_model_vqa_science_stores_what_llavas_does_and_its_task_scores_it(tmp_path, caplog):
    """The marker in front of the stored prompt tells LLaVA's scorer that there was an image."""
    write_sample("scienceqa", tmp_path)
    places = ("--question-file", tmp_path / "llava_test_CQM-A.json", "--image-folder", tmp_path / "images" / "test")
    output = ("--answers-file", tmp_path / "answers.jsonl")
    answers = answer_file(model_vqa_science, *places, *output, "--single-pred-prompt", "--answer-prompter")
    letter = "Answer with the option's letter from the given choices directly."
    assert [answer.prompt for answer in answers] == [
        f"<image>\nWhich is north?\nContext: N/A\nA. Ohio\nB. Utah\n{letter}",
        f"Which is a noun?\nContext: N/A\nA. run\nB. red\nC. dog\n{letter}",
    ]
    assert [answer.question_id for answer in answers] == ["4", "5"]
    assert "--answer-prompter has no effect" in caplog.text
    assert not find_task("scienceqa").score(tmp_path, "test", answers).exclusions


@pytest.mark.parametrize(("num_items", "num_chunks"), [(5, 1), (5, 2), (5, 4), (3, 5), (0, 2)])
def test_every_item_is_in_one_chunk(num_items, num_chunks):
    items = list(range(num_items))
    assert [item for index in range(num_chunks) for item in chunk(items, num_chunks, index)] == items


@pytest.mark.parametrize(("num_chunks", "index"), [(0, 0), (2, 2), (2, -1)])
def test_chunk_that_does_not_exist_is_refused(num_chunks, index):
    with pytest.raises(UserError, match="expected 0 <= chunk-idx < num-chunks"):
        chunk([1], num_chunks, index)


def test_another_way_of_decoding_is_answered_anew(questions):
    first = answer(model_vqa, questions)
    assert answer(model_vqa, questions) == first
    again = answer(model_vqa, questions, "--num_beams", "2")
    assert not {r["answer_id"] for r in first} & {r["answer_id"] for r in again}


def test_limit_that_the_context_does_not_allow_is_said(questions, caplog):
    """The tiny model's context is 512 tokens."""
    answer(model_vqa, questions, "--max_new_tokens", "300", "--num-chunks", "5")
    said = "answers of up to 300 tokens are more than half of the model's context of 512; 150 are allowed"
    assert f"--max-new-tokens: {said}" in caplog.text


def test_eval_model_takes_the_arguments_of_llavas_readme(tmp_path, capsys):
    images = [write_image(tmp_path / f"{index}.png", seed=index) for index in range(2)]
    values = {
        "model_path": str(MODEL),
        "model_base": None,
        "model_name": "llava",
        "query": "What has changed?",
        "conv_mode": None,
        "image_file": ";".join(map(str, images)),
        "sep": ";",
        "temperature": 0,
        "top_p": None,
        "num_beams": 1,
        "max_new_tokens": 6,
    }
    answer = run_llava.eval_model(type("Args", (), values)())
    assert capsys.readouterr().out.splitlines()[-1] == answer.splitlines()[-1]
    flags = ["--model-path", str(MODEL), "--image-file", ",".join(map(str, images)), "--query", "What has changed?"]
    assert run_llava.main([*flags, "--temperature", "0", "--max_new_tokens", "6", "--device", "cpu"]) == 0
    assert answer in capsys.readouterr().out


def test_eval_model_finds_device_and_trust_in_any_object(tmp_path, monkeypatch):
    """The README of LLaVA makes a class of the arguments; flags of ours may be added to it."""
    handed_on = {}

    def from_pretrained(folder, **kwargs):
        handed_on.update(kwargs)
        raise UserError("seen")

    monkeypatch.setattr(run_llava.Predictor, "from_pretrained", from_pretrained)
    image = str(write_image(tmp_path / "0.png"))
    values = {"model_path": "m", "model_base": None, "query": "?", "conv_mode": None, "image_file": image, "sep": ","}
    decoding = {"temperature": 0, "top_p": None, "num_beams": 1, "max_new_tokens": 6}
    arguments = type("Args", (), {**values, **decoding, "device": "cpu", "trust_projector_code": True})()
    with pytest.raises(UserError, match="seen"):
        run_llava.eval_model(arguments)
    assert (handed_on["device"], handed_on["trust_projector_code"]) == ("cpu", True)


@pytest.mark.parametrize(
    "module",
    [
        "llava_saep.serve.cli",
        "llava_saep.eval.run_llava",
        "llava_saep.eval.model_vqa",
        "llava_saep.eval.model_vqa_loader",
        "llava_saep.model.consolidate",
    ],
)
def test_program_ends_with_code_two_and_one_message_after_a_mistake(module, tmp_path, questions, monkeypatch, capsys):
    flags = {
        "llava_saep.serve.cli": ["--model-path", tmp_path],
        "llava_saep.eval.run_llava": ["--model-path", tmp_path, "--image-file", tmp_path / "no.png", "--query", "?"],
        "llava_saep.model.consolidate": ["--src", tmp_path, "--dst", tmp_path / "out"],
    }.get(module, ["--model-path", tmp_path, "--question-file", questions, "--image-folder", tmp_path / "images"])
    monkeypatch.setattr(sys, "argv", [module, *map(str, flags)])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"{module}: ") and len(said.splitlines()) == 1
