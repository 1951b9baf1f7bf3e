"""What every projector of a comparison goes through alike: stages in LLaVA's flags, then a file of questions.

A recipe is a JSON file. Paths in it may begin with `{recipe}`, the folder that the file is in; a stage's flags may name
`{previous}`, the output folder of the stage before it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from llava_saep.errors import UserError

RECIPE_FILE = "recipe.json"
RESERVED_FLAGS = ("mm_projector_type", "mm_projector_options", "output_dir", "seed", "trust_projector_code")
"""Flags that the comparison sets itself, for each run."""
_COUNTS = ("max_new_tokens", "batch_size")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One call of the training program: `flags` are LLaVA's, without the leading hyphens."""

    name: str
    flags: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How each model is trained and questioned.

    Args:
        title: what is trained, in a few words, for the report.
        question_file: lines of `question_id`, `image`, `text`, `category`, `answer`; None where benchmarks are asked.
        max_new_tokens: None: as for any question file.
        projector_options: options by registered name, as `--mm_projector_options` takes them, for projectors whose
            defaults do not go with the models of the recipe.
        chance_file: what guessing reaches by category, in [0, 1], where more is known than the questions tell.
    """

    title: str
    stages: tuple[Stage, ...]
    question_file: Path | None
    image_folder: Path
    max_new_tokens: int | None = None
    batch_size: int = 32
    projector_options: Mapping[str, str]
    chance_file: Path | None = None

    @classmethod
    def of_benchmarks(cls, labels: Sequence[str], data_dir: Path) -> "Recipe":
        """Nothing is trained, and benchmarks bring their own questions."""
        title = f"trained models on {', '.join(labels)}"
        return cls(title=title, stages=(), question_file=None, image_folder=data_dir, projector_options={})

    @property
    def chance(self) -> dict[str, float]:
        """What the chance file says; empty without one."""
        return {} if self.chance_file is None else json.loads(self.chance_file.read_text(encoding="utf-8"))


def read_recipe(path: Path) -> tuple[Recipe, dict[str, Any]]:
    """Read a recipe.

    Returns:
        the recipe with its paths in full, and the JSON object as it stands in the file.
    Raises:
        UserError: the file is no recipe, or what it names is not there.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--recipe {path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"--recipe {path}: is no JSON ({error})") from error
    _check_keys(content, path)
    _check_kinds(content, path)
    placed = _with_paths(content, path.parent.absolute())
    question_file = Path(placed["question_file"])
    recipe = Recipe(
        title=str(placed.get("title", path.stem)),
        stages=tuple(_stage(stage, index, path) for index, stage in enumerate(placed["stages"])),
        question_file=question_file,
        image_folder=Path(placed.get("image_folder", question_file.parent)),
        **{name: placed[name] for name in _COUNTS if placed.get(name) is not None},
        projector_options=dict(placed.get("projector_options", {})),
        chance_file=Path(placed["chance_file"]) if "chance_file" in placed else None,
    )
    _check(recipe, path)
    return recipe, content


def _check_keys(content: Any, path: Path) -> None:
    needed, known = {"stages", "question_file"}, {field.name for field in fields(Recipe)}
    if not isinstance(content, dict):
        found = f"got a JSON {type(content).__name__}"
    elif needed - set(content):
        found = f"{' and '.join(sorted(needed - set(content)))} missing"
    elif set(content) - known:
        found = f"got {', '.join(sorted(set(content) - known))}"
    else:
        return
    raise UserError(
        f"--recipe {path}: {found}; expected a JSON object with stages and question_file, and besides them only "
        f"{', '.join(sorted(known - needed))}"
    )


def _check_kinds(content: Mapping[str, Any], path: Path) -> None:
    """Raise UserError where a value is of another kind than its key wants. null is the default of counts alone."""
    for key, value in content.items():
        if key in _COUNTS:
            is_right = value is None or (type(value) is int and value >= 1)  # true is an int to Python
            expected = "a whole number of at least 1"
        elif key == "stages":
            is_right, expected = isinstance(value, list), "a list"
        elif key == "projector_options":
            is_right = isinstance(value, Mapping) and all(isinstance(options, str) for options in value.values())
            expected = 'a JSON object of texts, such as {"saep": "stride=2"}'
        else:
            is_right, expected = isinstance(value, str), "a text"
        if not is_right:
            raise UserError(f"--recipe {path}: {key} {value!r}: expected {expected}")


def _with_paths(value: Any, folder: Path) -> Any:
    """Put the recipe's folder where a text says `{recipe}`, at any depth."""
    if isinstance(value, str):
        return value.replace("{recipe}", str(folder))
    if isinstance(value, Mapping):
        return {key: _with_paths(entry, folder) for key, entry in value.items()}
    return [_with_paths(entry, folder) for entry in value] if isinstance(value, list) else value


def _stage(stage: Any, index: int, path: Path) -> Stage:
    if not isinstance(stage, Mapping) or set(stage) != {"name", "flags"} or not isinstance(stage["flags"], Mapping):
        raise UserError(f'--recipe {path}: stage {index + 1} must be {{"name": ..., "flags": {{...}}}}')
    name, flags = str(stage["name"]), dict(stage["flags"])
    if not name.isidentifier():
        raise UserError(f"--recipe {path}: stage {name!r}: its name must be one word, as it names a folder")
    for flag in flags:
        if flag.startswith("-") or flag in RESERVED_FLAGS:
            reason = "flags are written without hyphens" if flag.startswith("-") else "the comparison sets it itself"
            raise UserError(f"--recipe {path}: stage {name!r}, flag {flag!r}: {reason}")
    return Stage(name=name, flags=flags)


def _check(recipe: Recipe, path: Path) -> None:
    if not recipe.stages:
        raise UserError(f"--recipe {path}: has no stages, so that nothing would be trained")
    names = [stage.name for stage in recipe.stages]
    if len(set(names)) < len(names) or "evaluation" in names or "speed" in names:
        raise UserError(f"--recipe {path}: stages {names}: each needs a name of its own, and not evaluation or speed")
    if not recipe.question_file.is_file():
        raise UserError(f"--recipe {path}: question_file {recipe.question_file}: no such file")
    if recipe.chance_file is not None and not recipe.chance_file.is_file():
        raise UserError(f"--recipe {path}: chance_file {recipe.chance_file}: no such file")
    if not recipe.image_folder.is_dir():
        raise UserError(f"--recipe {path}: image_folder {recipe.image_folder}: no such folder")
