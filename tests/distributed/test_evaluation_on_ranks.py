"""Several ranks answer one file: nothing lost, nothing doubled, the same answers, and a killed run goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llava_saep.evaluation.answer_files import claimed
from tests.fixtures.evaluation_runs import TINY_MODEL, write_pope
from tests.fixtures.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

REPOSITORY = Path(__file__).resolve().parents[2]


def evaluate(data_dir: Path, output_dir: Path, *flags: str) -> int:
    """What a rank does."""
    from llava_saep.commands.evaluate.__main__ import main
    from llava_saep.program import run_program

    argv = ["--task", "pope", "--model-path", str(TINY_MODEL), "--device", "cpu", "--max-new-tokens", "4"]
    places = ["--data-dir", str(data_dir), "--output-dir", str(output_dir)]
    return run_program("llava-saep eval", main, [*argv, *places, "--batch-size", "2", *flags])


def evaluate_until_killed(data_dir: Path, output_dir: Path, rank: int, num_batches: int) -> int:
    """One rank is killed after some of its batches."""
    from llava_saep.generation import Predictor

    generate, calls = Predictor.generate, []

    def generate_or_die(self, *arguments, **kwargs):
        if int(os.environ.get("RANK", "0")) == rank and len(calls) == num_batches:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(1)
        return generate(self, *arguments, **kwargs)

    Predictor.generate = generate_or_die
    return evaluate(data_dir, output_dir)


def lines(output_dir):
    return [json.loads(line) for line in (output_dir / "pope" / "answers.jsonl").read_text().splitlines()]


def parts(output_dir):
    """Answers by id that are on the disk, whole or in parts."""
    found = {}
    for path in (output_dir / "pope").glob("answers.jsonl*"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            found[record["answer_id"]] = record["question_id"]
    return found


def texts(output_dir):
    return [(line["question_id"], line["text"]) for line in lines(output_dir)]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    write_pope(folder, num_images=5)
    return folder


@pytest.fixture(scope="module")
def alone(data_dir, tmp_path_factory):
    """What one rank leaves that answers one question at a time."""
    folder = tmp_path_factory.mktemp("alone")
    (result,) = run_ranks(evaluate, data_dir, folder, "--batch-size", "1", world_size=1, output_dir=folder / "ranks")
    assert result.exit_code == 0, result.output
    return folder


def test_ranks_give_the_answers_of_one_and_the_same_score(data_dir, alone, tmp_path):
    results = run_ranks(evaluate, data_dir, tmp_path / "two", world_size=2, output_dir=tmp_path / "r")
    assert [result.exit_code for result in results] == [0, 0], results
    assert texts(tmp_path / "two") == texts(alone)
    assert len({text for _, text in texts(alone)}) > 1
    assert sorted(path.name for path in (tmp_path / "two" / "pope").iterdir()) == ["answers.jsonl", "result.json"]

    def score(output_dir):
        return json.loads((output_dir / "pope" / "result.json").read_text())["result"]

    assert score(tmp_path / "two") == score(alone)
    shown = [("pope / random" in result.output) for result in results]
    assert shown == [True, False]  # rank 0 alone speaks
    assert "pope, rank 0 of 2" in results[0].output and "questions" not in results[1].output


@pytest.mark.parametrize("num_ranks_afterwards", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_rank_loses_one_batch_and_any_number_of_ranks_goes_on(data_dir, alone, tmp_path, num_ranks_afterwards):
    out = tmp_path / "killed"
    results = run_ranks(
        evaluate_until_killed, data_dir, out, 1, 1, world_size=2, output_dir=tmp_path / "r", timeout_seconds=60
    )
    assert results[1].exit_code == -signal.SIGKILL
    kept = parts(out)
    assert len(kept) >= 2 and sorted(kept.values()) == sorted(set(kept.values()))
    again = run_ranks(evaluate, data_dir, out, world_size=num_ranks_afterwards, output_dir=tmp_path / "again")
    assert [result.exit_code for result in again] == [0] * num_ranks_afterwards, again
    assert texts(out) == texts(alone)
    assert set(kept) <= {line["answer_id"] for line in lines(out)}  # what was there has not been made again


def test_rank_that_outlives_another_says_that_nothing_is_lost(data_dir, tmp_path):
    results = run_ranks(
        evaluate_until_killed, data_dir, tmp_path / "out", 1, 0, world_size=2, output_dir=tmp_path / "r"
    )
    assert results[0].exit_code == 2
    assert "another rank has ended before its questions were answered. Every answer so far is kept" in results[0].output


def test_single_process_killed_in_the_middle_goes_on(data_dir, alone, tmp_path):
    out = tmp_path / "killed"
    (result,) = run_ranks(evaluate_until_killed, data_dir, out, 0, 3, world_size=1, output_dir=tmp_path / "r")
    assert result.exit_code == -signal.SIGKILL
    kept = {line["answer_id"] for line in lines(out)}
    assert len(kept) == 6
    (result,) = run_ranks(evaluate, data_dir, out, world_size=1, output_dir=tmp_path / "r")
    assert result.exit_code == 0
    assert texts(out) == texts(alone)
    assert kept <= {line["answer_id"] for line in lines(out)}


def test_mistake_that_all_ranks_meet_is_told_once(data_dir, tmp_path):
    results = run_ranks(evaluate, data_dir, tmp_path / "out", "--task", "gqa", world_size=2, output_dir=tmp_path / "r")
    assert [result.exit_code for result in results] == [2, 2]
    assert ["is missing" in result.output for result in results] == [True, False]


def test_answer_file_of_another_evaluation_is_refused_by_all_ranks_and_told_once(data_dir, tmp_path):
    with claimed(tmp_path / "out" / "pope" / "answers.jsonl"):
        results = run_ranks(evaluate, data_dir, tmp_path / "out", world_size=2, output_dir=tmp_path / "r")
    assert [result.exit_code for result in results] == [2, 2]
    assert ["another evaluation is writing" in result.output for result in results] == [True, False]


def answer_with_llavas_program(data_dir: Path, answers: Path) -> int:
    """What a rank does, with the flag that the deepspeed launcher adds."""
    from llava_saep.eval import model_vqa

    flags = ["--local_rank=0", "--model-path", str(TINY_MODEL), "--image-folder", str(data_dir / "pope" / "val2014")]
    flags += ["--question-file", str(data_dir / "pope" / "llava_pope_test.jsonl"), "--answers-file", str(answers)]
    return model_vqa.main([*flags, "--temperature", "0", "--max_new_tokens", "4", "--device", "cpu"])


@pytest.mark.slow
def test_llavas_program_shares_its_questions_among_ranks_too(data_dir, alone, tmp_path):
    answers = tmp_path / "out" / "answers.jsonl"
    results = run_ranks(answer_with_llavas_program, data_dir, answers, world_size=2, output_dir=tmp_path / "r")
    assert [result.exit_code for result in results] == [0, 0], results
    written = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [(line["question_id"], line["text"]) for line in written] == texts(alone)
    assert [path.name for path in answers.parent.iterdir()] == ["answers.jsonl"]


@pytest.mark.slow
def test_damaged_image_of_any_rank_is_reported_by_rank_zero(tmp_path):
    folder = write_pope(tmp_path / "data")
    for index in range(2):
        image = folder / "val2014" / f"COCO_val2014_{index:012}.jpg"
        image.write_bytes(image.read_bytes()[:60])
    results = run_ranks(evaluate, folder.parent, tmp_path / "out", world_size=2, output_dir=tmp_path / "r")
    assert [result.exit_code for result in results] == [0, 0], results
    entry = json.loads((tmp_path / "out" / "pope" / "result.json").read_text())
    assert [each["question_id"] for each in entry["excluded_questions"]] == [0, 1, 2, 3, 4, 5]
    assert len(lines(tmp_path / "out")) == 6


TORCHRUN = ("torch.distributed.run", "--nproc_per_node", "2", "-m")
DEEPSPEED = ("deepspeed.launcher.runner", "--num_gpus", "2", "--module")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])
def test_launcher_starts_the_command_on_each_rank(launcher, data_dir, alone, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = [sys.executable, "-m", launcher[0], "--master_port", port, *launcher[1:], "llava_saep.commands.evaluate"]
    flags = ["--task", "pope", "--model-path", TINY_MODEL, "--device", "cpu", "--max-new-tokens", "4"]
    places = ["--data-dir", data_dir, "--output-dir", tmp_path / "out"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [*launch, *map(str, [*flags, *places])]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-4000:]
    assert texts(tmp_path / "out") == texts(alone)
    assert result.stdout.count("answers and results: ") == 1
