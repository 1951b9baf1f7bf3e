"""The flags of `llava-saep eval`."""

import argparse
from collections.abc import Sequence

from llava_saep.errors import UserError
from llava_saep.evaluation.questions import DEFAULT_MAX_NEW_TOKENS
from llava_saep.evaluation.tasks._base import DATA_ROOT
from llava_saep.program import AbbreviatingParser

DEFAULT_BATCH_SIZE = 32

_OF_BENCHMARKS = ("answers", "limit", "data_dir", "judge_url", "judge_model", "judge_key_file")
_OF_QUESTION_FILES = ("image_folder", "blind")
_OF_MODELS = (
    *("model_path", "model_base", "conv_mode", "device", "load_8bit", "load_4bit", "trust_projector_code"),
    *("batch_size", "max_new_tokens", "on_bad_image"),
)

_DESCRIPTION = """\
Answer benchmarks (--task) or a question file of your own (--question-file), and score the answers. An interrupted run
goes on where it stopped when the same command is given again.

  llava-saep eval --task list                                         what benchmarks there are
  llava-saep eval doctor --task pope,gqa                              which files are missing, and where to get them
  llava-saep eval --model-path DIR --task pope,gqa                    answers, scores, upload files
  llava-saep eval --task pope --answers answers.jsonl                 score answers that are there, LLaVA's too
  llava-saep eval --model-path DIR --question-file questions.jsonl    your own, one JSON object per line: question_id,
                                                                      image, text, category, answer; scored by the
                                                                      final words of each generated answer
"""


def parser() -> argparse.ArgumentParser:
    """The parser of `llava-saep eval`."""
    made = AbbreviatingParser(
        prog="llava-saep eval", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = made.add_argument_group("what is asked")
    add_flag(what, "question-file", help="questions of your own")
    add_flag(what, "image-folder", help="default: images/ beside the question file, or else the folder that it is in")
    add_flag(what, "blind", action="store_true", help="also answer a question file without the images, for comparison")
    add_flag(what, "task", help="benchmarks, with commas between them; name:split for one split; list prints all")
    add_flag(what, "data-dir", help=f"LLaVA's evaluation folders (default: {DATA_ROOT})")
    add_flag(what, "answers", "answers-file", help="score this answer file; no model is loaded")
    add_flag(what, "limit", type=int, help="only the first questions of each benchmark, to try things out")
    _add_model_flags(made.add_argument_group("who answers"))
    how = made.add_argument_group("how")
    add_flag(
        how, "output-dir", help="default: evaluation/ in the model's folder; evaluation/NAME for a model of the hub"
    )
    add_flag(how, "batch-size", type=int, help=f"halved when it does not fit (default: {DEFAULT_BATCH_SIZE})")
    limit = f"default: what the benchmark allows; {DEFAULT_MAX_NEW_TOKENS} for a question file"
    add_flag(how, "max-new-tokens", type=int, help=limit)
    add_flag(
        how,
        "on-bad-image",
        choices=("exclude", "error"),
        help="questions whose image will not open: leave out and report, or stop (default: stop before the start where "
        "files are missing, leave out those that turn out damaged)",
    )
    add_judge_flags(made.add_argument_group("who rates free answers (mm-vet, llava-bench)"))
    # The deepspeed launcher hands it to each rank, which reads it from the environment.
    made.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return made


def add_flag(group, *names: str, **kwargs) -> None:
    """Add a flag under its names, with hyphens and with underscores between their words."""
    spellings = [f"--{spelling}" for name in names for spelling in (name, name.replace("-", "_"))]
    group.add_argument(*dict.fromkeys(spellings), **kwargs)


def _add_model_flags(group) -> None:
    add_flag(group, "model-path", help="folder that training wrote, or hub name")
    add_flag(
        group, "model-base", help="language model of a projector or adapter, where that is not known, or has moved"
    )
    add_flag(group, "conv-mode", help="conversation template (default: the one that the model was trained with)")
    add_flag(
        group, "device", help="cpu, cuda, cuda:1 (default: a GPU where there is one, with several ranks each its own)"
    )
    add_flag(group, "load-8bit", action="store_true", help="round the language model to 8 bits")
    add_flag(group, "load-4bit", action="store_true", help="round the language model to 4 bits")
    add_flag(
        group,
        "trust-projector-code",
        action="store_true",
        help="import a projector that the checkpoint names as package.module:Class or path/to/file.py:Class",
    )


def add_judge_flags(group) -> None:
    """Add the flags that name a judge; `check_judge_flags` looks at what they were given."""
    add_flag(group, "judge-url", help="an OpenAI-compatible endpoint, such as https://api.openai.com/v1")
    add_flag(group, "judge-model", help="the name by which the endpoint knows the model")
    add_flag(
        group,
        "judge-key-file",
        help="file with the key (default: what LLAVA_SAEP_JUDGE_KEY or OPENAI_API_KEY holds, if anything)",
    )


def check_flags(arguments: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, would change nothing, or are out of range.

    Raises:
        UserError: with the flags as they were given.
    """
    if (arguments.task is None) == (arguments.question_file is None):
        raise UserError("name either benchmarks (--task pope,gqa) or a question file (--question-file FILE)")
    if arguments.task is None:
        refuse_idle_flags(arguments, _OF_BENCHMARKS, "is for benchmarks (--task)")
    else:
        why = "is for question files (--question-file); benchmarks have folders of their own, and no blind run"
        refuse_idle_flags(arguments, _OF_QUESTION_FILES, why)
    if arguments.answers is not None:
        refuse_idle_flags(arguments, _OF_MODELS, "is for a model that answers; --answers scores answers that are there")
        if not arguments.answers:
            raise UserError("--answers is empty; name a file of answers")
    elif arguments.model_path is None:
        raise UserError("--model-path is missing: which model shall answer? (--answers FILE scores without one)")
    for flag in ("batch_size", "max_new_tokens", "limit"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1, got {value}")
    check_judge_flags(arguments)


def refuse_idle_flags(arguments: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Refuse flags that would change nothing beside the others.

    Args:
        names: attributes of `arguments`, None or False where the flag was not given.
        why: goes on after the flag.
    Raises:
        UserError: with the first one that was given.
    """
    given = [name for name in names if getattr(arguments, name) not in (None, False)]
    if given:
        raise UserError(f"--{given[0].replace('_', '-')} {why}")


def check_judge_flags(arguments: argparse.Namespace) -> None:
    """Refuse half a judge.

    Raises:
        UserError: only one of address and model is there, or a key for no judge.
    """
    if (arguments.judge_url is None) != (arguments.judge_model is None):
        raise UserError("a judge needs both --judge-url and --judge-model")
    if arguments.judge_key_file is not None and arguments.judge_url is None:
        raise UserError("--judge-key-file is for a judge, and there is none: --judge-url and --judge-model name it")
