"""Writes the data set in LLaVA's format: image folders, stage 1 and stage 2 records, and the held-out questions."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from playground.spatial_scenes.chance import chance_per_category
from playground.spatial_scenes.descriptions import caption, raster_reading
from playground.spatial_scenes.objects import Split, scan_pool
from playground.spatial_scenes.questions import Question, QuestionWriter
from playground.spatial_scenes.rendering import render
from playground.spatial_scenes.scene import MAX_OBJECTS, MIN_OBJECTS, Scene, World, sample_scene

CAPTION_PROMPT = "Describe the image."
READING_PROMPT = "Read the image."
DEFAULT_QUESTIONS_PER_CONVERSATION = 6
DEFAULT_READING_SHARE = 0.1


def make_scenes(world: World, split: Split, count: int, seed: int) -> list[Scene]:
    """`count` scenes; the numbers of objects take turns, so that every count is equally frequent."""
    rng = random.Random(f"{seed}/{split}/scenes")
    span = MAX_OBJECTS - MIN_OBJECTS + 1
    return [sample_scene(rng, world, scan_pool(split), MIN_OBJECTS + index % span) for index in range(count)]


def write_dataset(
    output: Path,
    *,
    world: World,
    num_train: int,
    num_held_out: int,
    seed: int,
    questions_per_conversation: int = DEFAULT_QUESTIONS_PER_CONVERSATION,
    reading_share: float = DEFAULT_READING_SHARE,
) -> None:
    """Write `train/` and `held_out/` below `output`; the same arguments always write the same bytes.

    Args:
        reading_share: part of the stage 2 records that are readings and captions instead of questions.
    """
    train = make_scenes(world, "train", num_train, seed)
    held_out = make_scenes(world, "held_out", num_held_out, seed)
    train_images = _write_images(output / "train" / "images", train, "training images")
    held_out_images = _write_images(output / "held_out" / "images", held_out, "held-out images")

    _write_json(output / "train" / "stage1.json", _stage1_records(train, train_images, seed))
    records, train_questions = _stage2_records(train, train_images, seed, questions_per_conversation, reading_share)
    _write_json(output / "train" / "stage2.json", records)

    held_out_questions = _held_out_questions(held_out, held_out_images, seed)
    lines = (
        json.dumps(_question_line(index, image, question)) for index, (image, question) in enumerate(held_out_questions)
    )
    (output / "held_out" / "questions.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    chance = chance_per_category(train_questions, [question for _, question in held_out_questions])
    _write_json(output / "held_out" / "chance.json", chance)


def _write_images(folder: Path, scenes: Sequence[Scene], label: str) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{index:06d}.png" for index in range(len(scenes))]
    for index, (name, scene) in enumerate(zip(tqdm(names, desc=label, unit="image"), scenes, strict=True)):
        Image.fromarray(render(scene, noise_seed=index)).save(folder / name)
    return names


def _record(identifier: str, image: str, turns: Sequence[tuple[str, str]]) -> dict:
    """LLaVA's record; the first user turn carries the image."""
    conversations = []
    for index, (prompt, answer) in enumerate(turns):
        marker = "<image>\n" if index == 0 else ""
        conversations += [{"from": "human", "value": marker + prompt}, {"from": "gpt", "value": answer}]
    return {"id": identifier, "image": image, "conversations": conversations}


def _description_turn(scene: Scene, rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        return READING_PROMPT, raster_reading(scene)
    return CAPTION_PROMPT, caption(scene)


def _stage1_records(scenes: Sequence[Scene], images: Sequence[str], seed: int) -> list[dict]:
    rng = random.Random(f"{seed}/stage1")
    return [
        _record(f"stage1-{index:06d}", image, [_description_turn(scene, rng)])
        for index, (scene, image) in enumerate(zip(scenes, images, strict=True))
    ]


def _stage2_records(
    scenes: Sequence[Scene], images: Sequence[str], seed: int, questions_per_conversation: int, reading_share: float
) -> tuple[list[dict], list[Question]]:
    rng = random.Random(f"{seed}/stage2")
    writer = QuestionWriter(rng)
    records, asked = [], []
    for index, (scene, image) in enumerate(zip(scenes, images, strict=True)):
        turns = [_description_turn(scene, rng)] if rng.random() < reading_share else []
        if not turns:
            questions = writer.conversation(scene, questions_per_conversation)
            turns = [(question.text, question.reference) for question in questions]
            asked += questions
        records.append(_record(f"stage2-{index:06d}", image, turns))
    return records, asked


def _held_out_questions(scenes: Sequence[Scene], images: Sequence[str], seed: int) -> list[tuple[str, Question]]:
    """One question of every form about each image (where the scene allows it)."""
    writer = QuestionWriter(random.Random(f"{seed}/held_out/questions"))
    pairs = []
    for scene, image in zip(scenes, images, strict=True):
        drawn = (writer.draw(scene, form) for form in writer.forms)
        pairs += [(image, question) for question in drawn if question is not None]
    return pairs


def _question_line(index: int, image: str, question: Question) -> dict:
    return {
        "question_id": index,
        "image": image,
        "text": question.text,
        "category": question.category,
        "answer": question.answer,
        "reference": question.reference,
    }


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
