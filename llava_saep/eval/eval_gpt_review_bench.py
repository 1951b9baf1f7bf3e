"""LLaVA's program of this name: a language model compares answers to LLaVA-Bench with those of a reference.

python -m llava_saep.eval.eval_gpt_review_bench --question questions.jsonl --context context.jsonl \\
    --answer-list answers_gpt4.jsonl answers.jsonl --output reviews.jsonl

The judge is OpenAI's gpt-4-0314, as there, unless --judge-url and --judge-model name another one; the key is read from
--judge-key-file or the environment. An interrupted run goes on, also after an answer has changed.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_saep.errors import UserError
from llava_saep.evaluation.judge import KEY_VARIABLES, REQUEST_FIELD, Judge, find_api_key, review_answers
from llava_saep.evaluation.tasks import JudgeRequest, TaskQuestion
from llava_saep.evaluation.tasks import llava_bench as bench
from llava_saep.evaluation.tasks._files import (
    read_answers,
    read_json,
    read_json_lines,
    read_task_questions,
    required,
)
from llava_saep.evaluation.tasks._matching import match_answers
from llava_saep.program import AbbreviatingParser, run_program

OPENAI_URL = "https://api.openai.com/v1"
DEFAULT_RULE = "default"

Rules = Mapping[str, bench.JudgeRule]


@dataclass(frozen=True, kw_only=True)
class ReviewProgram:
    """What LLaVA's three programs differ in.

    `read_contexts` gives the description of each image, or is None where the judge sees none. `category_prefix` stands
    before a question's category in rules and reviews. `built_in_rules` are used without --rule.
    """

    name: str
    judge_model: str = "gpt-4-0314"
    read_contexts: Callable[[Path], dict[str, str]] | None = None
    category_prefix: str = ""
    built_in_rules: Rules | None = None


BENCH = ReviewProgram(
    name="llava_saep.eval.eval_gpt_review_bench",
    read_contexts=bench.read_contexts,
    category_prefix=bench.CATEGORY_PREFIX,
    built_in_rules=dict.fromkeys((bench.CATEGORY_PREFIX + each for each in bench.CATEGORIES), bench.JudgeRule()),
)


def build_parser(program: ReviewProgram, description: str | None = __doc__) -> argparse.ArgumentParser:
    """Return the parser; flags are LLaVA's, and where the judge is."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = AbbreviatingParser(prog=program.name, description=description, formatter_class=formatter)
    parser.add_argument("-q", "--question", required=True, help="the question file")
    if program.read_contexts is not None:
        parser.add_argument("-c", "--context", required=True, help="descriptions of the images (jsonl)")
    parser.add_argument("-a", "--answer-list", nargs=2, required=True, help="answers of the reference, and the model's")
    parser.add_argument(
        "-r", "--rule", required=program.built_in_rules is None, help="instructions per category (JSON)"
    )
    parser.add_argument("-o", "--output", required=True, help="review file to write")
    parser.add_flag("max-tokens", type=int, default=bench.JUDGE_TOKENS, help="of a review (default: %(default)s)")
    parser.add_flag("judge-url", default=OPENAI_URL, help="an OpenAI-compatible endpoint (default: %(default)s)")
    parser.add_flag("judge-model", default=program.judge_model, help="default: %(default)s")
    parser.add_flag("judge-key-file", help=f"file with the key (default: {' or '.join(KEY_VARIABLES)})")
    return parser


def read_rules(path: Path) -> dict[str, bench.JudgeRule]:
    """Instructions per category, of LLaVA's table/rule.json.

    Raises:
        UserError: the file is absent or malformed.
    """
    return {
        category: bench.JudgeRule(*(required(rule, name, f"{path}: {category}", str) for name in ("prompt", "role")))
        for category, rule in read_json(path, dict).items()
    }


def review_requests(program: ReviewProgram, arguments: argparse.Namespace) -> list[JudgeRequest]:
    """What to ask the judge, one request per question.

    Raises:
        UserError: a file is absent or malformed, or a question has no answer, no description or no rule.
    """
    questions = read_task_questions(Path(arguments.question).expanduser(), Path())
    references, answers = (_answer_all(questions, Path(name).expanduser()) for name in arguments.answer_list)
    contexts = None if program.read_contexts is None else program.read_contexts(Path(arguments.context).expanduser())
    rules = _chosen_rules(program, arguments.rule)
    requests = []
    for number, (question, reference, answer) in enumerate(zip(questions, references, answers, strict=True), 1):
        category = program.category_prefix + question.category
        context = "" if contexts is None else _context_of(question, contexts, arguments.context)
        rule = _rule_of(category, rules, program)
        requests.append(
            JudgeRequest(
                question_id=question.question_id,
                system=bench.SYSTEM,
                user=bench.judge_prompt(context, question.text, reference.text, answer.text, rule),
                record=bench.review_record(number, question.question_id, reference, answer, category),
                max_tokens=arguments.max_tokens,
                temperature=bench.JUDGE_TEMPERATURE,
            )
        )
    return requests


def _chosen_rules(program: ReviewProgram, rule_file: str | None) -> Rules:
    path = None if rule_file is None else Path(rule_file).expanduser()
    if program.built_in_rules is None or (path is not None and not _is_llavas_own(path)):
        return read_rules(path or Path())
    return program.built_in_rules


def _is_llavas_own(path: Path) -> bool:
    """Whether LLaVA's script names the file that it has in its repository, whose instructions are built in here."""
    return path.parts[-3:] == ("eval", "table", "rule.json") and not path.exists()


def _answer_all(questions: Sequence[TaskQuestion], path: Path) -> list[Any]:
    matched = match_answers(questions, read_answers(path))
    for each in matched.misfits:
        print(f"{path}: {each.count} {each.reason}, {each.effect} (as {', '.join(each.examples)})", file=sys.stderr)
    answers = matched.answers
    missing = [question.question_id for question, answer in zip(questions, answers, strict=True) if answer is None]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(questions)} questions have no answer, the first one {missing[0]!r}"
        )
    return list(answers)


def _context_of(question: TaskQuestion, contexts: Mapping[str, str], place: str) -> str:
    image = str(question.images[0]) if question.images else ""
    if image not in contexts:
        raise UserError(f"{place}: describes no image {image!r}, which question {question.question_id!r} is about")
    return contexts[image]


def _rule_of(category: str, rules: Rules, program: ReviewProgram) -> bench.JudgeRule:
    if category in rules:
        return rules[category]
    if program.read_contexts is None and DEFAULT_RULE in rules:
        return rules[DEFAULT_RULE]
    raise UserError(f"no rule for the category {category!r}; there are rules for {', '.join(sorted(rules))}")


def main(argv: Sequence[str] | None = None, program: ReviewProgram = BENCH, description: str | None = __doc__) -> int:
    """Have answers reviewed; returns the exit code.

    Raises:
        UserError: as `review_requests`; the endpoint refuses or answers nothing; the review file holds others' reviews.
    """
    arguments = build_parser(program, description).parse_args(argv)
    requests = review_requests(program, arguments)
    output = Path(arguments.output).expanduser()
    _refuse_others_reviews(output)
    judge = Judge(url=arguments.judge_url, model=arguments.judge_model, api_key=find_api_key(arguments.judge_key_file))
    lines = review_answers(requests, judge, output, bench.TASK.review_line).lines
    unreadable = sum(not bench.has_points(line) for line in lines)
    print(f"{len(lines) - unreadable} of {len(lines)} answers have points: {output}")
    return 0


def _refuse_others_reviews(path: Path) -> None:
    """Reviews that LLaVA's program made do not say what was asked; they cost money and are not to be overwritten."""
    others = [line for line in read_json_lines(path) if REQUEST_FIELD not in line] if path.is_file() else []
    if others:
        raise UserError(f"{path}: holds {len(others)} reviews that another program made; name another --output")


if __name__ == "__main__":
    sys.exit(run_program(BENCH.name, main, sys.argv[1:]))
