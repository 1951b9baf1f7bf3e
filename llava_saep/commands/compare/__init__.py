"""`llava-saep compare`: projectors trained alike and questioned alike, or trained models, in one report."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from llava_saep.commands.compare.flags import check_flags, parser
from llava_saep.commands.compare.plan import Comparison, plan_comparison
from llava_saep.evaluation.comparison.folder import claimed, write_plan
from llava_saep.evaluation.comparison.results import Results, collect
from llava_saep.evaluation.comparison.runs import Runner, speed_step
from llava_saep.evaluation.comparison.steps import FAILURE_FILE, Placement, describe_judge, read_json, record_path

EXIT_SOME_FAILED = 1
NUM_DISAGREEMENTS = 12


def main(argv: Sequence[str]) -> int:
    """Train what is not trained yet, question it, measure, and write the report; 1 when a run failed."""
    arguments = parser().parse_args(argv)
    check_flags(arguments)
    with claimed(Path(arguments.output_dir)):
        comparison = plan_comparison(arguments)
        write_plan(comparison.folder, comparison.plan)
        return run_comparison(comparison, argv)


def run_comparison(comparison: Comparison, argv: Sequence[str]) -> int:
    """Do what is open in a claimed folder, and write the report; returns the exit code."""
    with _threads_of_children(comparison.placement):
        forget_changed_models(comparison)
        runner = Runner(comparison.placement, num_jobs=comparison.num_jobs, say=lambda line: print(line, flush=True))
        runner.do(comparison.runs)
        measure_speeds(comparison, runner)
        results = collect(comparison.runs, comparison.recipe, comparison.reference)
        write_reports(comparison, results, ["llava-saep", "compare", *argv])
    num_failed = sum(len(entry.failures) for entry in results.entries)
    if num_failed:
        print(f"\n{num_failed} of {len(comparison.runs)} runs failed; the same command tries them again")
    return EXIT_SOME_FAILED if num_failed else 0


def forget_changed_models(comparison: Comparison) -> None:
    """Drop the records of trained models that are others by now than those that were questioned.

    Where another judge is named than the one that rated, or the first one, the questions count as open too: the answers
    are there, and are rated.
    """
    from llava_saep.evaluation.asking import fingerprint_with_parts

    judge = describe_judge(comparison.judge)
    for run in comparison.runs:
        if run.seed is not None:
            continue
        fingerprint = fingerprint_with_parts(run.model_path)
        for name in ("evaluation", "speed"):
            path = record_path(run.folder, name)
            record = read_json(path)
            if record is None:
                continue
            is_rated_by_another = name == "evaluation" and judge is not None and record.get("judge") != judge
            if record.get("model_fingerprint") != fingerprint or is_rated_by_another:
                path.unlink()


def measure_speeds(comparison: Comparison, runner: Runner) -> None:
    """Measure the first token of one model of each label, one after the other, when all training has ended."""
    if not any(question.images for question in comparison.questions):
        print("no question has an image: the time to the first token is not measured")
        return
    for label in dict.fromkeys(run.label for run in comparison.runs):
        finished = [run for run in comparison.runs if run.label == label and not run.open_steps]
        if finished and not any(record_path(run.folder, "speed").is_file() for run in finished):
            trusts = label in comparison.trusted
            step = speed_step(finished[0], comparison.questions, comparison.placement, trust_projector_code=trusts)
            if runner.do_step(finished[0], step):
                # An earlier try may have timed another seed, and failed.
                for run in finished:
                    (run.folder / FAILURE_FILE).unlink(missing_ok=True)


def write_reports(comparison: Comparison, results: Results, command: Sequence[str]) -> None:
    """Write report.html, report.md and results.json, and print the first table."""
    import torch

    from llava_saep.evaluation.comparison.report import write_report
    from llava_saep.evaluation.comparison.tables import all_remarks, first_table
    from llava_saep.evaluation.report import terminal_table
    from llava_saep.machine import describe_machine

    # Not the process that trained, but the same machine with the same software.
    device = torch.device(comparison.placement.device)
    facts = {
        "title": comparison.recipe.title,
        "command": list(command),
        "machine": describe_machine(device),
        "num_jobs": comparison.num_jobs,
        "num_threads": comparison.placement.num_threads,
        "recipe": comparison.plan["recipe"],
        "is_embedded": comparison.is_embedded,
    }
    written = write_report(results, facts, comparison.folder, comparison.recipe.image_folder, NUM_DISAGREEMENTS)
    header, rows = first_table(results)
    print("\n" + terminal_table(rows, header, has_sum_row=not results.asks_benchmarks))
    print("\n".join(all_remarks(results)))
    print("\n" + "\n".join(f"{name:<10} {path}" for name, path in written.items()))


@contextmanager
def _threads_of_children(placement: Placement) -> Iterator[None]:
    """OpenMP reads its number of threads when a process starts, which steps do from one that starts here."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(placement.num_threads)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
