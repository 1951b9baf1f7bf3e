"""The embedded data set keeps its promises: true answers, no blind way to score, held-out scans never in training."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_saep.data.dataset import read_records
from playground.spatial_scenes import KINDS, QuestionWriter, caption, raster_reading, render, sample_scene, scan_pool
from playground.spatial_scenes.__main__ import main
from playground.spatial_scenes.writing import make_scenes, write_dataset

NUM_TRAIN, NUM_HELD_OUT = 120, 40
ROWS, COLUMNS = ["top", "middle", "bottom"], ["left", "center", "right"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_dataset(folder, world="cells", num_train=NUM_TRAIN, num_held_out=NUM_HELD_OUT, seed=3)
    return folder


def objects_at(scene) -> dict[str, tuple[int, int]]:
    """Name -> (row, column), from pixel centres alone."""
    return {
        placed.kind.name: (int((placed.top + 7) / 48 * 3), int((placed.left + 7) / 48 * 3)) for placed in scene.objects
    }


def derived_answer(text: str, where: dict[str, tuple[int, int]]) -> str:
    """The answer to a question, worked out from its words and the positions, without the generator's code."""
    at = {spot: name for name, spot in where.items()}
    steps = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
    if text == "How many objects are there?":
        return str(len(where))
    if match := re.fullmatch(r"Is there an? (.+)\?", text):
        return "yes" if match[1] in where else "no"
    if match := re.fullmatch(r"Where is the (.+)\?", text):
        row, column = where[match[1]]
        return f"{ROWS[row]} {COLUMNS[column]}"
    if match := re.fullmatch(r"What is at the (\w+) (\w+)\?", text):
        return at.get((ROWS.index(match[1]), COLUMNS.index(match[2])), "nothing")
    if match := re.fullmatch(r"Is the (.+) (left of|right of|above|below) the (.+)\?", text):
        (row, column), (other_row, other_column) = where[match[1]], where[match[3]]
        difference = {
            "left of": other_column - column,
            "right of": column - other_column,
            "above": other_row - row,
            "below": row - other_row,
        }[match[2]]
        assert difference != 0, "a relation was asked that neither holds nor is reversed"
        return "yes" if difference > 0 else "no"
    match = re.fullmatch(r"What (is|colour is the object) directly (left of|right of|above|below) the (.+)\?", text)
    row, column = where[match[3]]
    beside = at[row + steps[match[2]][0], column + steps[match[2]][1]]
    return beside if match[1] == "is" else beside.split()[0]


@pytest.mark.parametrize("world", ["cells", "free"])
def test_every_answer_follows_from_the_scene(world):
    rng = random.Random(5)
    writer = QuestionWriter(rng)
    forms = Counter()
    for _ in range(300):
        scene = sample_scene(rng, world, scan_pool("train"))
        where = objects_at(scene)
        for form in writer.forms:
            question = writer.draw(scene, form)
            if question is None:
                continue
            forms[form] += 1
            assert derived_answer(question.text, where) == question.answer
            assert question.reference.endswith(question.answer)
            for name, row, column in re.findall(
                r"(?:^|, )([\w ]+?) is (top|middle|bottom) (left|center|right)", question.reference
            ):
                assert where[name] == (ROWS.index(row), COLUMNS.index(column)), "the stated evidence is untrue"
    assert min(forms.values()) > 100, "a form of question hardly ever occurs"


@pytest.mark.parametrize("world", ["cells", "free"])
def test_objects_keep_apart_and_inside(world):
    rng = random.Random(6)
    for _ in range(300):
        scene = sample_scene(rng, world, scan_pool("train"))
        where = objects_at(scene)
        assert 3 <= len(scene.objects) <= 6
        assert len(where) == len(set(where.values())) == len(scene.objects), "a kind or a third is used twice"
        assert all(0 <= placed.top <= 34 and 0 <= placed.left <= 34 for placed in scene.objects)
        if world == "free":
            assert all(
                abs(a.top - b.top) >= 14 or abs(a.left - b.left) >= 14
                for a in scene.objects
                for b in scene.objects
                if a is not b
            )


def test_descriptions_agree_with_the_positions():
    scene = sample_scene(random.Random(1), "free", scan_pool("train"))
    where = objects_at(scene)
    spoken = dict(phrase.split(" is ") for phrase in caption(scene).split(", "))
    assert spoken == {name: f"{ROWS[row]} {COLUMNS[column]}" for name, (row, column) in where.items()}
    names = {spot: name for name, spot in where.items()}
    expected = [names.get((row, column), ".") for row in range(3) for column in range(3)]
    assert raster_reading(scene) == " ".join(expected)


def test_rendering_draws_each_object_in_its_colour_on_a_dark_ground():
    rng = random.Random(2)
    dominant = {"red": {0}, "green": {1}, "blue": {2}, "yellow": {0, 1}, None: {0, 1, 2}}
    for _ in range(50):
        scene = sample_scene(rng, "free", scan_pool("train"))
        image = render(scene, noise_seed=1).astype(int)
        covered = np.zeros((48, 48), bool)
        for placed in scene.objects:
            box = image[placed.top : placed.top + 14, placed.left : placed.left + 14].reshape(-1, 3)
            brightest = box[box.sum(1).argmax()]
            assert {c for c in range(3) if brightest[c] > 0.75 * brightest.max()} == dominant[placed.kind.colour]
            covered[placed.top : placed.top + 14, placed.left : placed.left + 14] = True
        assert image[~covered].max() < 60


def test_held_out_scans_never_occur_in_training():
    used = {
        split: {
            placed.scan
            for scene in make_scenes("cells", split, 400, seed=0)
            for placed in scene.objects
            if placed.scan is not None
        }
        for split in ("train", "held_out")
    }
    assert len(used["held_out"]) > 100
    assert not used["train"] & used["held_out"]
    assert all(len(scan_pool("held_out")[digit]) >= 20 for digit in range(10))


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(dataset, tmp_path):
    write_dataset(tmp_path / "same", world="cells", num_train=NUM_TRAIN, num_held_out=NUM_HELD_OUT, seed=3)
    write_dataset(tmp_path / "other", world="cells", num_train=NUM_TRAIN, num_held_out=NUM_HELD_OUT, seed=4)
    files, again = (
        sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        for folder in (dataset, tmp_path / "same")
    )
    assert files == again
    assert all((dataset / file).read_bytes() == (tmp_path / "same" / file).read_bytes() for file in files)
    assert (dataset / "train/stage2.json").read_bytes() != (tmp_path / "other/train/stage2.json").read_bytes()


def test_records_are_llava_json(dataset):
    for stage, turns in (("stage1", {2}), ("stage2", {2, 12})):
        records = json.loads((dataset / "train" / f"{stage}.json").read_text())
        assert len(records) == len({record["id"] for record in records}) == NUM_TRAIN
        assert len(read_records(dataset / "train" / f"{stage}.json")) == NUM_TRAIN  # as training reads them
        for record in records:
            conversation = record["conversations"]
            assert len(conversation) in turns
            assert [turn["from"] for turn in conversation] == ["human", "gpt"] * (len(conversation) // 2)
            assert conversation[0]["value"].startswith("<image>\n")
            assert sum(turn["value"].count("<image>") for turn in conversation) == 1
            assert all(turn["value"].strip() for turn in conversation)
            with Image.open(dataset / "train" / "images" / record["image"]) as image:
                assert (image.size, image.mode) == ((48, 48), "RGB")


def test_held_out_questions_are_balanced(dataset):
    lines = [json.loads(line) for line in (dataset / "held_out" / "questions.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in lines] == list(range(len(lines)))
    answers = {
        category: Counter(line["answer"] for line in lines if line["category"] == category)
        for category in ("relation", "existence", "count")
    }
    assert answers["existence"] == {"yes": NUM_HELD_OUT / 2, "no": NUM_HELD_OUT / 2}
    assert abs(answers["relation"]["yes"] - answers["relation"]["no"]) <= 4  # four directions, each alternates
    assert answers["count"] == {str(count): NUM_HELD_OUT / 4 for count in (3, 4, 5, 6)}


def test_no_constant_answer_gets_far(dataset):
    chance = json.loads((dataset / "held_out" / "chance.json").read_text())
    assert set(chance) == {"relation", "position", "count", "neighbour", "existence", "overall"}
    assert chance["existence"]["constant"] == 0.5
    assert chance["relation"]["constant"] == pytest.approx(0.5, abs=0.06)
    assert chance["overall"]["constant"] < 0.4
    assert all(0 < values["uniform"] <= 0.5 for values in chance.values())


def test_verdicts_do_not_depend_on_the_objects_that_are_named():
    """A blind model that knows how often each kind is present must not profit from it."""
    rng = random.Random(8)
    writer = QuestionWriter(rng)
    verdicts = {kind.name: Counter() for kind in KINDS}
    for _ in range(6000):
        question = writer.existence(sample_scene(rng, "cells", scan_pool("train")))
        verdicts[re.fullmatch(r"Is there an? (.+)\?", question.text)[1]][question.answer] += 1
    shares = [counts["yes"] / counts.total() for counts in verdicts.values()]
    assert max(abs(share - 0.5) for share in shares) < 0.14  # 4.2 standard deviations of 230 fair draws


def test_command_line_names_what_is_wrong(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for arguments, words in (
        (["--num-train", "0"], "--num-train"),
        (["--reading-share", "1"], "--reading-share"),
        (["--world", "cellar"], "cellar"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["--output", str(tmp_path / "out"), *arguments])
        assert stop.value.code == 2
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path / "file")])
    assert "name a folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
