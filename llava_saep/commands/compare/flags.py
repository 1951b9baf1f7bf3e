"""The flags of `llava-saep compare`."""

import argparse

from llava_saep.commands.evaluate.flags import (
    DEFAULT_BATCH_SIZE,
    add_flag,
    add_judge_flags,
    check_judge_flags,
    refuse_idle_flags,
)
from llava_saep.errors import UserError
from llava_saep.evaluation.tasks._base import DATA_ROOT
from llava_saep.program import AbbreviatingParser

DEFAULT_WORLD, DEFAULT_BUDGET, DEFAULT_SEEDS = "free", "standard", 3
_OF_TRAINING = ("recipe", "world", "budget", "seeds")
_OF_BENCHMARKS = ("limit", "data_dir", "judge_url", "judge_model", "judge_key_file")
_OF_MODELS = (
    *("question_file", "task", "image_folder", "max_new_tokens", "batch_size", "trust_projector_code"),
    *_OF_BENCHMARKS,
)


def parser() -> argparse.ArgumentParser:
    """The parser of `llava-saep compare`."""
    made = AbbreviatingParser(
        prog="llava-saep compare",
        description="Train projectors with the same recipe, seeds and budget and ask them the same questions, or ask "
        "trained models; write report.html, report.md and results.json. The same command goes on where a killed one "
        "was, and tries again what failed; more projectors or seeds can be added to a folder.",
    )
    made.add_flag("output-dir", required=True, help="folder of this comparison: data, runs and report")
    _add_training_flags(made.add_argument_group("projectors that are trained"))
    _add_model_flags(made.add_argument_group("models that are trained already"))
    add_judge_flags(made.add_argument_group("who rates free answers of trained models (mm-vet, llava-bench)"))
    both = made.add_argument_group("both")
    both.add_argument("--reference", help="what the others are compared with in pairs (default: the first one)")
    both.add_argument("--jobs", type=int, help="runs at once (default: as many as cores; 1 on a GPU, or of models)")
    both.add_argument("--threads", type=int, default=1, help="of each run on a processor (default 1)")
    both.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    return made


def _add_training_flags(group) -> None:
    group.add_argument(
        "--projectors", help="as in 'saep,saep(stride=1),path/to/file.py:Class': names, options in brackets"
    )
    group.add_argument("--seeds", type=int, help=f"runs of each projector, seeds 0 to N-1 (default {DEFAULT_SEEDS})")
    group.add_argument("--seed", help=argparse.SUPPRESS)  # else an abbreviation of --seeds, and it means another thing
    group.add_argument(
        "--budget", help=f"smoke, quick, standard, full, or stage 2's number of steps (default: {DEFAULT_BUDGET})"
    )
    group.add_argument("--world", choices=("cells", "free"), help=f"of the embedded scenes (default: {DEFAULT_WORLD})")
    group.add_argument("--recipe", metavar="FILE", help="train this in place of the embedded job (JSON)")


def _add_model_flags(group) -> None:
    add_flag(group, "model-path", nargs="+", metavar="FOLDER", help="saved models of any format")
    add_flag(group, "question-file", help="one JSON object per line, with `answer`")
    add_flag(group, "image-folder", help="default: images/ beside the question file, or else the folder that it is in")
    add_flag(group, "task", help="benchmarks in place of a question file, as in `llava-saep eval`: pope,gqa")
    add_flag(group, "data-dir", help=f"LLaVA's evaluation folders (default: {DATA_ROOT})")
    add_flag(group, "limit", type=int, help="only the first questions of each benchmark, to try things out")
    add_flag(group, "batch-size", type=int, help=f"default {DEFAULT_BATCH_SIZE}")
    add_flag(group, "max-new-tokens", type=int, help="default: what the benchmark allows; 64 for a question file")
    add_flag(group, "trust-projector-code", action="store_true", help="as in `llava-saep eval`")


def check_flags(arguments: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, would change nothing, or are out of range.

    Raises:
        UserError: with the flags as they were given.
    """
    if arguments.seed is not None:
        raise UserError("--seed: a comparison takes a number of seeds, --seeds N, and runs the seeds 0 to N-1")
    if bool(arguments.projectors) == bool(arguments.model_path):
        raise UserError("name either --projectors NAMES, which are trained, or --model-path FOLDERS, which are not")
    if arguments.model_path:
        refuse_idle_flags(arguments, _OF_TRAINING, "says how to train, and --model-path names what is trained already")
        _check_questions(arguments)
    else:
        why = "belongs to --model-path; with --projectors the recipe says what is asked, and how"
        refuse_idle_flags(arguments, _OF_MODELS, why)
    if arguments.recipe:
        refuse_idle_flags(arguments, ("world", "budget"), "belongs to the embedded job; the recipe says it")
    for flag in ("seeds", "jobs", "threads", "batch_size", "max_new_tokens", "limit"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1, got {value}")


def _check_questions(arguments: argparse.Namespace) -> None:
    if (arguments.question_file is None) == (arguments.task is None):
        raise UserError("--model-path needs either --question-file or --task")
    if arguments.task is None:
        refuse_idle_flags(arguments, _OF_BENCHMARKS, "is for benchmarks (--task)")
    else:
        refuse_idle_flags(arguments, ("image_folder",), "belongs to --question-file; benchmarks have their own")
    check_judge_flags(arguments)
