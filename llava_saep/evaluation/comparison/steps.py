"""What the processes of a comparison do: train a stage, answer the questions, measure the speed of an answer.

Each step is a process of its own, so that its peak of memory is its own, and its record appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_saep.errors import UserError
from llava_saep.evaluation.benchmarks import BenchmarkSettings
from llava_saep.evaluation.judge import Judge
from llava_saep.evaluation.tasks import TaskQuestion
from projectors import ProjectorError

if TYPE_CHECKING:
    from llava_saep.generation import Predictor

LOG_FILE = "log.txt"
FAILURE_FILE = "failure.json"
PEAK_FILE = "peak.json"
MODEL_ID = "model"
EXIT_FAILED = 1


@dataclass(frozen=True, kw_only=True)
class Step:
    """One process: `function(**arguments)` returns facts that go into `<name>.json`. It must be importable by name."""

    name: str
    function: Callable[..., Mapping[str, Any]]
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where steps compute.

    Args:
        device: "cpu", "cuda" or "cuda:1".
        num_threads: of torch, in each process.
    """

    device: str
    num_threads: int = 1


def record_path(folder: Path, name: str) -> Path:
    """Where the record of a finished step is, which exists only then."""
    return folder / f"{name}.json"


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that appears whole."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None when there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def run_in_child(step: Step, folder: Path, placement: Placement) -> None:
    """In a process of its own: do a step and write its record, or why there is none, and end the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the comparison, which Ctrl-C reaches too, ends its steps
    _end_with_parent()
    _take_place(placement)
    _redirect_output(folder / LOG_FILE)
    print(f"\n=== {step.name} ===", flush=True)
    began = time.monotonic()
    try:
        facts = step.function(**step.arguments)
        write_json(record_path(folder, step.name), {**_costs(began, placement), **facts})
    except BaseException as error:
        # A mistake that a person can correct has its message; the others' traces are in the log.
        is_explained = isinstance(error, UserError | ProjectorError)
        traceback.print_exc()
        message = str(error) if is_explained else f"{type(error).__name__}: {error}"
        write_json(folder / FAILURE_FILE, {"step": step.name, "error": message.strip()})
        _leave(EXIT_FAILED)
    _leave(0)


def _leave(exit_code: int) -> None:
    """End at once: a forked process has its parent's threads on its list, and would wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _end_with_parent() -> None:
    """A step whose comparison was killed ends too: a later one works in the same folder."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(EXIT_FAILED)

    threading.Thread(target=watch, daemon=True).start()


def _take_place(placement: Placement) -> None:
    kind, _, index = placement.device.partition(":")
    if kind == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif index:
        os.environ["CUDA_VISIBLE_DEVICES"] = index
    os.environ["OMP_NUM_THREADS"] = str(placement.num_threads)
    # A data loader's workers would each import everything anew: a child keeps its parent's way of starting.
    multiprocessing.set_start_method("fork", force=True)
    import torch

    torch.set_num_threads(placement.num_threads)


def _redirect_output(path: Path) -> None:
    """Everything that is said from here on goes into the log, also what libraries write below Python."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))


def _costs(began: float, placement: Placement) -> dict[str, Any]:
    import torch

    from llava_saep.provenance import commit
    from llava_saep.train.memory import peak_memory_bytes

    device = torch.device("cpu" if placement.device == "cpu" else "cuda")
    return {
        "seconds": time.monotonic() - began,
        "cpu_seconds": time.process_time(),
        "peak_memory_bytes": peak_memory_bytes(device),
        "num_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "commit": commit(),
    }


def train(flags: list[str]) -> dict[str, Any]:
    """Run the training program with these flags.

    Raises:
        UserError: it refused them, or was told to stop.
    """
    from llava_saep.train import train_mem

    messages = _Messages()
    with contextlib.redirect_stderr(messages):
        exit_code = train_mem.main(flags)
    if exit_code:
        raise UserError(messages.last_error or f"the training program ended with exit code {exit_code}")
    return {}


class _Messages:
    """Standard error, which remembers the message of a mistake."""

    def __init__(self) -> None:
        self._stream = sys.stderr
        self.last_error = ""

    def write(self, text: str) -> int:
        if text.startswith("error: "):
            self.last_error = text.removeprefix("error: ").strip()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def evaluate(
    model_path: Path,
    question_file: Path,
    image_folder: Path,
    output_dir: Path,
    *,
    max_new_tokens: int | None,
    batch_size: int,
    trust_projector_code: bool,
    device: str,
) -> dict[str, Any]:
    """Answer the questions with the images and without them, as `llava-saep eval --blind` does."""
    from llava_saep.evaluation.asking import fingerprint_with_parts
    from llava_saep.evaluation.evaluate import evaluate_model
    from llava_saep.evaluation.questions import read_questions

    logging.basicConfig(level=logging.INFO)
    evaluate_model(
        model_path,
        read_questions(question_file),
        image_folder=image_folder,
        output_dir=output_dir,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        device=_visible(device),
        trust_projector_code=trust_projector_code,
    )
    fingerprint = fingerprint_with_parts(model_path)
    return {"model_fingerprint": fingerprint, **_peak_of_answering(output_dir, fingerprint, device)}


def evaluate_tasks(
    model_path: Path, tasks: str, settings: BenchmarkSettings, *, trust_projector_code: bool, device: str
) -> dict[str, Any]:
    """Put benchmarks to the model, as `llava-saep eval --task` does.

    Raises:
        UserError: answers that were to be scored were not, such as by a judge that refuses. They are kept, and so are
            the scores of others: the next try does the rest. Without any judge the answers for one are no mistake.
    """
    from llava_saep.evaluation.asking import AskedModel, ModelChoice
    from llava_saep.evaluation.benchmarks import evaluate_benchmarks, unscored
    from llava_saep.evaluation.results import ALL_FILE
    from llava_saep.evaluation.tasks import JudgedTask, select_tasks

    logging.basicConfig(level=logging.INFO)
    choice = ModelChoice(
        path=model_path, model_id=MODEL_ID, device=_visible(device), trust_projector_code=trust_projector_code
    )
    chosen = select_tasks([tasks])
    (settings.output_dir / ALL_FILE).unlink(missing_ok=True)  # of an earlier try, perhaps with another model
    model = AskedModel.load(choice)
    entries = evaluate_benchmarks(model, chosen, settings)
    due = [each for each in chosen if settings.judge is not None or not isinstance(each.task, JudgedTask)]
    peak = _peak_of_answering(settings.output_dir, model.fingerprint, device)
    missing = [f"{label}: {why}" for label, why in unscored(entries, due).items()]
    for label, entry in entries.items():
        if entry["num_failed_judge_requests"]:
            missing.append(f"{label}: the judge failed on {entry['num_failed_judge_requests']} answers")
    if missing:
        raise UserError("; ".join(missing))
    return {"model_fingerprint": model.fingerprint, "judge": describe_judge(settings.judge), **peak}


def _peak_of_answering(output_dir: Path, fingerprint: str, device: str) -> dict[str, Any]:
    """The most memory that answering took, of all tries: one that finds answers only scores them."""
    import torch

    from llava_saep.train.memory import peak_memory_bytes

    path = output_dir / PEAK_FILE
    earlier = read_json(path) or {}
    peaks = [peak_memory_bytes(torch.device(_visible(device)))]
    if earlier.get("model_fingerprint") == fingerprint:
        peaks.append(earlier["peak_memory_bytes"])
    peak = {"peak_memory_bytes": max((value for value in peaks if value is not None), default=None)}
    write_json(path, {"model_fingerprint": fingerprint, **peak})
    return peak


def describe_judge(judge: Judge | None) -> dict[str, str] | None:
    """By whom free answers were rated, as it stands in a run's record."""
    return None if judge is None else {"url": judge.url, "model": judge.model}


def _visible(device: str) -> str:
    """The device as a process calls it that sees no other."""
    return device.partition(":")[0]


def _first_token_seconds(predictor: Predictor, question: TaskQuestion) -> float:
    from llava_saep.evaluation.image_loading import open_image
    from llava_saep.evaluation.runner import question_messages
    from llava_saep.generation import GenerationOptions

    began = time.perf_counter()
    messages = question_messages(question, [open_image(image) for image in question.images])
    predictor.generate([messages], GenerationOptions(max_new_tokens=1))
    return time.perf_counter() - began


def _opens(question: TaskQuestion) -> bool:
    from llava_saep.evaluation.image_loading import open_image

    try:
        return bool([open_image(image) for image in question.images])
    except UserError:
        return False


def measure_speed(
    model_path: Path,
    questions: Sequence[TaskQuestion],
    *,
    num_warmup: int,
    num_repeats: int,
    trust_projector_code: bool,
    device: str,
) -> dict[str, Any]:
    """Time from a question with its image to the first token, for one question after another; and sizes.

    Everything on the way counts: reading and preparing the image, tower, projector, and the language model's first
    pass.

    Args:
        questions: asked in this order, over again where there are too few; each has an image. Those whose image will
            not open are passed over: the evaluation has reported them.
    Raises:
        UserError: none of the images will open.
    """
    from llava_saep.evaluation.asking import fingerprint_with_parts
    from llava_saep.generation import Predictor
    from llava_saep.train.trainable import count_parameters

    predictor = Predictor.from_pretrained(
        model_path, device=_visible(device), trust_projector_code=trust_projector_code
    )
    readable = [question for question in questions if _opens(question)]
    if not readable:
        raise UserError(f"none of the {len(questions)} images that the first token is timed with can be read")
    asked = [readable[index % len(readable)] for index in range(num_warmup + num_repeats)]
    measured = sorted([_first_token_seconds(predictor, question) for question in asked][num_warmup:])
    counts = {count.part: count.num_parameters for count in count_parameters(predictor.model)}
    return {
        "model_fingerprint": fingerprint_with_parts(model_path),
        "first_token_seconds": statistics.median(measured),
        "first_token_quartiles": [measured[len(measured) // 4], measured[(3 * len(measured)) // 4]],
        "num_repeats": num_repeats,
        "tokens_per_image": predictor.num_image_tokens,
        "num_projector_parameters": counts.get("projector", 0),
        "num_parameters": sum(counts.values()),
        "projector": dict(predictor.model.config.projector),
    }
