"""What `llava-saep compare` trains where it is given no recipe: the quick start's two stages on the embedded data.

All projectors see one data set, so that they can be compared question by question; a run's seed decides how it starts
and in which order it learns. The stages are the quick start's, in one process without ZeRO, which learns the same.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_saep.errors import UserError
from llava_saep.evaluation.comparison.recipe import RECIPE_FILE
from llava_saep.program import run_program
from playground.quickstart import (
    BACKBONES,
    DATASET_FILE,
    SMALL_PROJECTORS,
    SMOKE,
    Settings,
    make_dataset,
    read_json,
    schedule_flags,
    write_json,
)

BUDGETS = {
    "smoke": SMOKE,
    "quick": Settings(num_train_images=2000, num_held_out_images=100, stage1_steps=50, stage2_steps=100),
    "standard": Settings(num_train_images=4000, num_held_out_images=100, stage1_steps=100, stage2_steps=200),
    "full": Settings(),
}
"""By name; a number is that of stage 2's steps, stage 1 then has half as many, on the quick start's data."""
NUM_HELD_OUT_LOSSES = 5
NUM_LOGGED_LOSSES = 50
DATA_SEED = 0
CHANCE_FILE = "most_frequent_answers.json"
"""What giving the most frequent answer of its kind to every question reaches, by category."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write data and recipe into the folder; exit code 2 where it holds those of another comparison."""
    return run_program("llava-saep compare", _main, sys.argv[1:] if argv is None else argv)


def _main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m playground.comparison", description=__doc__.split("\n")[0])
    parser.add_argument("--world", choices=("cells", "free"), default="free", help="as in the quick start")
    parser.add_argument("--budget", default="standard", help=f"{', '.join(BUDGETS)}, or stage 2's number of steps")
    parser.add_argument("--output_dir", type=Path, required=True, help=f"for data/ and {RECIPE_FILE}")
    arguments = parser.parse_args(argv)
    write_recipe(arguments.output_dir, world=arguments.world, settings=budget_settings(arguments.budget))
    return 0


def budget_settings(budget: str) -> Settings:
    """Sizes by the name of a budget, or for a number of steps.

    Raises:
        UserError: neither a name nor a number of at least 2.
    """
    if budget in BUDGETS:
        return BUDGETS[budget]
    if not budget.isdecimal() or int(budget) < 2:
        raise UserError(f"--budget {budget}: expected {', '.join(BUDGETS)}, or a number of steps of at least 2")
    return replace(Settings(), stage1_steps=int(budget) // 2, stage2_steps=int(budget))


def write_recipe(folder: Path, *, world: str, settings: Settings) -> None:
    """Generate the data set where it is not there yet, and write the recipe.

    Raises:
        UserError: the folder holds another comparison's recipe, or other files.
    """
    recipe = embedded_recipe(world, settings)
    facts = {
        "world": world,
        "seed": DATA_SEED,
        "num_train_images": settings.num_train_images,
        "num_held_out_images": settings.num_held_out_images,
    }
    _check_folder(folder, recipe, facts)
    folder.mkdir(parents=True, exist_ok=True)
    if make_dataset(folder / "data", facts):
        print(f"{settings.num_train_images:,} training images and their conversations written to {folder / 'data'}")
    _write_held_out_conversations(folder / "data" / "held_out")
    _write_chance(folder / "data" / "held_out")
    write_json(folder / RECIPE_FILE, recipe)


def _check_folder(folder: Path, recipe: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    if folder.is_file():
        raise UserError(f"--output-dir {folder}: is a file; name a folder")
    stored, stored_facts = read_json(folder / RECIPE_FILE), read_json(folder / "data" / DATASET_FILE)
    if (folder / "data").is_dir() and stored_facts is None:
        raise UserError(f"--output-dir {folder}: data/ in it is not a data set of a comparison; name another folder")
    if stored not in (None, json.loads(json.dumps(recipe))) or stored_facts not in (None, facts):
        raise UserError(
            f"--output-dir {folder}: holds a comparison with another budget, world or recipe; name another folder"
        )


def embedded_recipe(world: str, settings: Settings) -> dict[str, Any]:
    """The recipe as its file has it."""
    return {
        "title": f"embedded scenes, world {world}: stage 1 with {settings.stage1_steps} steps and stage 2 with "
        f"{settings.stage2_steps}, each of {settings.global_batch_size} samples, {settings.num_train_images:,} images",
        "stages": [
            {"name": "stage1", "flags": _stage1_flags(settings)},
            {"name": "stage2", "flags": _stage2_flags(settings)},
        ],
        "question_file": "{recipe}/data/held_out/questions.jsonl",
        "image_folder": "{recipe}/data/held_out/images",
        "max_new_tokens": settings.max_new_tokens,
        "batch_size": settings.evaluation_batch_size,
        "projector_options": SMALL_PROJECTORS,
        "chance_file": f"{{recipe}}/data/held_out/{CHANCE_FILE}",
    }


def _stage1_flags(settings: Settings) -> dict[str, Any]:
    common = _common_flags(settings, "stage1", settings.stage1_steps, settings.stage1_learning_rate)
    return {**common, "version": "plain", "tune_mm_mlp_adapter": True}


def _stage2_flags(settings: Settings) -> dict[str, Any]:
    common = _common_flags(settings, "stage2", settings.stage2_steps, settings.stage2_learning_rate)
    return {
        **common,
        "version": "v1",
        "pretrain_mm_mlp_adapter": "{previous}/mm_projector.safetensors",
        "eval_data_path": "{recipe}/data/held_out/conversations.json",
        "eval_image_folder": "{recipe}/data/held_out/images",
        "eval_strategy": "steps",
        "eval_steps": max(1, settings.stage2_steps // NUM_HELD_OUT_LOSSES),
        "per_device_eval_batch_size": settings.global_batch_size,
    }


def _common_flags(settings: Settings, stage: str, num_steps: int, learning_rate: float) -> dict[str, Any]:
    return {
        "model_name_or_path": str(BACKBONES / "language_model"),
        "vision_tower": str(BACKBONES / "vision_tower"),
        "data_path": f"{{recipe}}/data/train/{stage}.json",
        "image_folder": "{recipe}/data/train/images",
        "per_device_train_batch_size": settings.global_batch_size,
        **schedule_flags(settings, num_steps, learning_rate),
        "logging_steps": max(1, num_steps // NUM_LOGGED_LOSSES),
    }


def _write_chance(folder: Path) -> None:
    chance = read_json(folder / "chance.json") or {}
    write_json(folder / CHANCE_FILE, {category: baseline["constant"] for category, baseline in chance.items()})


def _write_held_out_conversations(folder: Path) -> None:
    """The held-out questions as conversations with their reference answers, for the loss during training."""
    lines = (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    by_image: dict[str, list[Mapping[str, Any]]] = {}
    for question in map(json.loads, lines):
        by_image.setdefault(question["image"], []).append(question)
    records = [
        {"id": f"held-out-{image}", "image": image, "conversations": _turns(questions)}
        for image, questions in by_image.items()
    ]
    (folder / "conversations.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def _turns(questions: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    turns = []
    for index, question in enumerate(questions):
        marker = "<image>\n" if index == 0 else ""
        turns.append({"from": "human", "value": marker + question["text"]})
        turns.append({"from": "gpt", "value": question["reference"]})
    return turns


if __name__ == "__main__":
    sys.exit(main())
