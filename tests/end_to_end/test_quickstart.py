"""The quick start as a newcomer runs it, through the real launcher: a few steps of everything, and the whole job."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.tiny import write_bases

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_smoke_run_goes_from_data_to_table_and_leaves_a_model_that_answers(tmp_path):
    tower, language_model = write_bases(tmp_path / "bases")
    output_dir, image = tmp_path / "out", tmp_path / "data" / "held_out" / "images" / "000000.png"
    quickstart = [
        *(sys.executable, "-m", "playground.quickstart", "--smoke"),
        *("--vision_tower", str(tower), "--model_name_or_path", str(language_model)),
        *("--output_dir", str(output_dir), "--data_dir", str(tmp_path / "data")),
    ]
    environment = {**os.environ, "NO_COLOR": "1"}
    result = subprocess.run(quickstart, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "question: " in result.stdout and "answer: " in result.stdout
    assert "overall" in result.stdout and "blind" in result.stdout

    report = json.loads((output_dir / "evaluation" / "report.json").read_text())
    num_questions = len((tmp_path / "data" / "held_out" / "questions.jsonl").read_text().splitlines())
    assert report["with_image"]["overall"]["num_questions"] == num_questions
    assert report["blind"]["overall"]["num_questions"] == num_questions

    chat = [sys.executable, "-m", "llava_saep.cli", "chat", "--model_path", str(output_dir / "stage2")]
    question = ["--image_file", str(image), "--query", "How many objects are there?", "--max_new_tokens", "8"]
    answer = subprocess.run([*chat, *question], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1800)
def test_whole_job_answers_held_out_questions_and_needs_the_image(tmp_path):
    """What the quick start promises; chance is a quarter overall and a half on relations."""
    output_dir = tmp_path / "out"
    quickstart = [sys.executable, "-m", "playground.quickstart", "--data_dir", str(tmp_path / "data")]
    result = subprocess.run(
        [*quickstart, "--output_dir", str(output_dir)], cwd=ROOT, capture_output=True, text=True, timeout=1700
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((output_dir / "evaluation" / "report.json").read_text())
    assert report["with_image"]["overall"]["accuracy"] >= 0.85
    assert report["with_image"]["relation"]["accuracy"] >= 0.80
    assert report["blind"]["overall"]["accuracy"] < 0.55
