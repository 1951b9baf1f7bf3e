"""`llava-saep bench faults`: kill a tiny run at random moments, go on with it, and compare with one left in peace."""

import argparse
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llava_saep.bench.faults.trials import FAULTS, Outcome, draw_plans, run_trial, run_undisturbed
from llava_saep.bench.faults.workload import FaultyRun, write_inputs
from llava_saep.errors import UserError

EXIT_PROBLEMS = 1


def main(argv: Sequence[str]) -> int:
    """Run the trials and print a table; exit code 1 if a run was lost, damaged or left processes behind.

    Raises:
        UserError: a number is out of range, or the folder is not empty.
    """
    arguments = parser().parse_args(argv)
    if arguments.trials < 1:
        raise UserError(f"--trials must be at least 1, got {arguments.trials}")
    try:
        run = FaultyRun(
            num_processes=arguments.num_processes,
            zero_stage=arguments.zero_stage,
            num_steps=arguments.steps,
            seed=arguments.seed,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    folder = make_folder(arguments.output_dir)
    outcomes = run_trials(run, folder, arguments.trials, arguments.faults, arguments.seed)
    (folder / "faults.json").write_text(json.dumps(as_document(run, outcomes), indent=1) + "\n")
    num_bad = sum(bool(outcome.problems) for outcome in outcomes)
    print(f"\n{len(outcomes) - num_bad} of {len(outcomes)} runs lost nothing; logs and faults.json are in {folder}")
    return EXIT_PROBLEMS if num_bad else 0


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(prog="llava-saep bench faults", description=__doc__.split(": ", 1)[1])
    flags.add_argument(
        "--trials", type=int, default=len(FAULTS), metavar="N", help="runs to disturb (default: %(default)s)"
    )
    flags.add_argument("--seed", type=int, default=0, help="of the moments, models and data (default: %(default)s)")
    flags.add_argument(
        "--faults", nargs="+", choices=FAULTS, default=list(FAULTS), help="what happens, in turn (default: everything)"
    )
    flags.add_argument("--zero_stage", type=int, default=2, help="0 to 3; 0: without DeepSpeed (default: %(default)s)")
    flags.add_argument("--num_processes", type=int, default=2, metavar="N", help="ranks (default: %(default)s)")
    flags.add_argument("--steps", type=int, default=16, help="of each run (default: %(default)s)")
    flags.add_argument("--output_dir", help="for logs and faults.json (default: a new temporary folder)")
    return flags


def make_folder(name: str | None) -> Path:
    """The folder for everything; an existing one must be empty, since runs would go on from what lies there."""
    if name is None:
        return Path(tempfile.mkdtemp(prefix="llava-saep-faults-"))
    folder = Path(name).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output_dir {name}: exists and is not an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_trials(run: FaultyRun, folder: Path, num_trials: int, faults: Sequence[str], seed: int) -> list[Outcome]:
    """Train once in peace, then disturb as often as asked; prints each outcome as it comes."""
    inputs = folder / "inputs"
    write_inputs(inputs, run.seed)
    undisturbed = run_undisturbed(run, inputs, folder)
    print(f"undisturbed: {len(undisturbed.losses)} steps, a checkpoint every {undisturbed.seconds_per_save:.2f} s")
    print(f"{'trial':>5}  {'fault':<8}  {'moment':<22}  {'code':>4}  {'ended after':>11}  {'resumed':>7}  result")
    outcomes = []
    for index, plan in enumerate(draw_plans(num_trials, faults, run, seed)):
        name = f"trial_{index}"
        outcomes.append(run_trial(plan, run, inputs, folder, name, undisturbed))
        print(format_outcome(index, outcomes[-1]), flush=True)
        shutil.rmtree(folder / name)
    return outcomes


def format_outcome(index: int, outcome: Outcome) -> str:
    """One line of the table."""
    plan = outcome.plan
    moment = f"step {plan.after_step} + {plan.delay:.2f} saves"
    seconds = "never" if outcome.seconds_to_end is None else f"{outcome.seconds_to_end:.1f} s"
    resumed = "anew" if outcome.resumed_from is None else f"step {outcome.resumed_from}"
    result = "; ".join(outcome.problems) or "equal"
    return f"{index:>5}  {plan.fault:<8}  {moment:<22}  {outcome.exit_code:>4}  {seconds:>11}  {resumed:>7}  {result}"


def as_document(run: FaultyRun, outcomes: Sequence[Outcome]) -> dict:
    """What faults.json holds."""
    return {"run": dataclasses.asdict(run), "trials": [dataclasses.asdict(outcome) for outcome in outcomes]}
