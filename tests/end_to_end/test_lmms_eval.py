"""lmms-eval itself runs a local task on a saved model, through the entry point, with both of its interfaces.

lmms-eval pins other libraries, so that it has an environment of its own (scripts/lmms_eval.sh FOLDER). Its interpreter
is named by LLAVA_SAEP_LMMS_EVAL_PYTHON; without one, these tests are skipped.
"""

import configparser
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.saved_models import write_saved_model
from tests.fixtures.tiny import write_bases

ROOT = Path(__file__).parents[2]
VARIABLE = "LLAVA_SAEP_LMMS_EVAL_PYTHON"
SAMPLES = ("red_circle_blue_square.png", "three_green_circles.png", "yellow_above_blue.png")
MAX_NEW_TOKENS = 6

TASK = """\
task: colours_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function colours_utils.images
doc_to_text: !function colours_utils.question
doc_to_messages: !function colours_utils.messages
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {limit}
  temperature: 0
  do_sample: false
process_results: !function colours_utils.score
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 0.0
"""

UTILS = """\
from PIL import Image

def images(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def messages(doc, lmms_eval_specific_kwargs=None):
    parts = [{"type": "image", "url": images(doc)[0]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": parts}]

def score(doc, results):
    return {"exact": float(results[0] == doc["answer"])}
"""


@pytest.fixture(scope="module")
def lmms_eval_python():
    """The interpreter of an environment that has lmms-eval."""
    python = os.environ.get(VARIABLE)
    if not python:
        pytest.skip(f"{VARIABLE} names no interpreter; scripts/lmms_eval.sh FOLDER makes an environment for it")
    found = subprocess.run([python, "-c", "import lmms_eval"], capture_output=True, text=True, timeout=120)
    if found.returncode:
        pytest.skip(f"{VARIABLE}={python} has no lmms-eval: {found.stderr.strip().splitlines()[-1]}")
    return python


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """A saved random model, six questions, and what `Predictor` answers to them one by one; as folder and rows."""
    from llava_saep.generation import GenerationOptions, Predictor

    folder = tmp_path_factory.mktemp("lmms")
    model = write_saved_model(folder / "model", write_bases(folder / "bases"))
    predictor = Predictor.from_pretrained(model, device="cpu")
    rows = []
    for index in range(6):
        image = ROOT / "playground" / "data" / "sample" / "images" / SAMPLES[index % len(SAMPLES)]
        question = f"Which colour is the {['square', 'circle', 'triangle'][index // 2]}?" + " Say it." * index
        content = [{"type": "image", "image": str(image)}, {"type": "text", "text": question}]
        options = GenerationOptions(max_new_tokens=MAX_NEW_TOKENS)
        [answer] = predictor.generate([[{"role": "user", "content": content}]], options)
        # The last row's answer is made wrong, so that a score of 1 for everything would be noticed.
        rows.append({"image": str(image), "question": question, "answer": answer if index < 5 else answer + " no"})
    return folder, rows


def write_task(folder, rows):
    folder.mkdir()
    (folder / "data.json").write_text(json.dumps(rows))
    (folder / "colours_local.yaml").write_text(TASK.format(data=folder / "data.json", limit=MAX_NEW_TOKENS))
    (folder / "colours_utils.py").write_text(UTILS)


def write_entry_points(folder):
    """The package's entry points as installing it would declare them, whatever is installed there."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    metadata = folder / "llava_saep_checkout-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: llava-saep-checkout\nVersion: 0\n")
    group = setup["options.entry_points"]["lmms_eval.models"].strip()
    (metadata / "entry_points.txt").write_text(f"[lmms_eval.models]\n{group}\n")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("extra", [["--force_simple"], []], ids=["simple", "chat"])
def test_lmms_eval_scores_the_answers_that_the_predictor_gives(lmms_eval_python, expected, tmp_path, extra):
    folder, rows = expected
    write_task(tmp_path / "task", rows)
    write_entry_points(tmp_path / "installed")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "installed"), str(ROOT)]),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        *(lmms_eval_python, "-m", "lmms_eval", "--model", "llava_saep"),
        *("--model_args", f"pretrained={folder / 'model'}", "--device", "cpu"),
        *("--tasks", "colours_local", "--include_path", str(tmp_path / "task"), "--batch_size", "4"),
        *("--output_path", str(tmp_path / "out"), "--log_samples", *extra),
    ]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    [samples] = (tmp_path / "out").rglob("*samples*colours_local*.jsonl")
    logged = [json.loads(line) for line in samples.read_text().splitlines()]
    by_id = {sample["doc_id"]: sample["filtered_resps"] for sample in logged}
    assert [by_id[index] for index in range(5)] == [row["answer"] for row in rows[:5]]
    [report] = (tmp_path / "out").rglob("*results*.json")
    scores = json.loads(report.read_text())["results"]["colours_local"]
    assert scores["exact,none"] == pytest.approx(5 / 6)


def test_entry_point_names_what_exists_without_lmms_eval():
    """What the entry point names can be imported where lmms-eval is absent; it is wanted only when called."""
    adapter = "llava_saep.evaluation.lmms_eval_adapter"
    code = f"from {adapter} import manifest; import sys; assert 'lmms_eval' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    declared = setup["options.entry_points"]["lmms_eval.models"].strip()
    assert declared == "llava_saep = llava_saep.evaluation.lmms_eval_adapter:manifest"
