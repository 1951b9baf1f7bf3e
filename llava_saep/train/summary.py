"""The page that a run leaves: what was trained on what, how long it took, and how it ended, as JSON and as text.

It is written however the run ends, once training has begun: one that stopped early is the one that has to be explained.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from llava_saep.data.ledger import DataAccount
from llava_saep.provenance import commit, versions
from llava_saep.train import checkpointing, distributed
from llava_saep.train.config import RunConfig
from llava_saep.train.loss_guard import NonFiniteLossError
from llava_saep.train.memory import peak_memory_bytes
from llava_saep.train.progress import describe_seconds
from llava_saep.train.stopping import RunStopped
from llava_saep.train.trainable import PartCount, count_parameters
from llava_saep.train.trainer import LlavaTrainer

logger = logging.getLogger(__name__)

SUMMARY_NAME = "training_summary"
"""With .json and .txt, in the output folder."""


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """What was learnt from, over all ranks.

    Args:
        tokens: of conversations, images' among them.
        supervised: those with a loss.
        padding: share of all positions that held no token; None where nothing was counted.
        last_step: the step up to which was counted, that of the last log entry; 0 where nothing was.
    """

    tokens: int
    supervised: int
    conversations: int
    images: int
    padding: float | None
    last_step: int


@dataclass(frozen=True, kw_only=True)
class LossRecord:
    """Losses as they were logged: value and step.

    Args:
        first, last: of training.
        held_out_first, held_out_last, held_out_best: on held-out records; None without.
    """

    first: tuple[float, int] | None
    last: tuple[float, int] | None
    held_out_first: tuple[float, int] | None = None
    held_out_last: tuple[float, int] | None = None
    held_out_best: tuple[float, int] | None = None
    token_accuracy_last: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingSummary:
    """Everything that the page says.

    Of a run that was resumed, samples that were replaced or cut, micro-batches left out, `seconds`,
    `tokens_per_second` and the peak of memory are those since step `resumed_at`; None: it was not.
    """

    outcome: str
    resumed_at: int | None
    command: str
    output_dir: str
    checkpoints: Sequence[str]
    language_model: str
    vision_tower: str | None
    projector: Mapping[str, Any]
    tokens_per_image: int
    parts: Sequence[PartCount]
    data: DataAccount
    held_out_data: DataAccount | None
    world_size: int
    zero_stage: int | None
    precision: str
    samples_per_step: int
    learning_rate: float
    steps: int
    planned_steps: int
    epochs: float
    micro_batches_left_out: int
    tokens: TokenCounts
    losses: LossRecord
    seconds: float
    tokens_per_second: float | None
    peak_memory_bytes: int | None
    versions: Mapping[str, str]
    commit: str | None


# Figures from the log


def count_tokens(history: Sequence[Mapping[str, float]], *, after_step: int = 0) -> TokenCounts:
    """Add up what log entries later than a step say was learnt from."""
    entries = [entry for entry in history if "tokens" in entry and entry["step"] > after_step]
    totals = {name: int(sum(entry[name] for entry in entries)) for name in ("tokens", "supervised")}
    totals |= {name: int(sum(entry[name] for entry in entries)) for name in ("conversations", "images")}
    num_positions = sum(entry["tokens"] / (1 - entry["padding"]) for entry in entries if entry["padding"] < 1)
    return TokenCounts(
        **totals,
        padding=1 - totals["tokens"] / num_positions if num_positions else None,
        last_step=max((int(entry["step"]) for entry in entries), default=0),
    )


def find_losses(history: Sequence[Mapping[str, float]]) -> LossRecord:
    """Pick the losses that tell how a run went."""
    losses = [(entry["loss"], int(entry["step"])) for entry in history if "loss" in entry]
    held_out = [(entry["eval_loss"], int(entry["step"])) for entry in history if "eval_loss" in entry]
    accuracies = [entry["eval_token_accuracy"] for entry in history if "eval_token_accuracy" in entry]
    return LossRecord(
        first=losses[0] if losses else None,
        last=losses[-1] if losses else None,
        held_out_first=held_out[0] if held_out else None,
        held_out_last=held_out[-1] if held_out else None,
        held_out_best=min(held_out, key=lambda pair: (math.isnan(pair[0]), pair[0])) if held_out else None,
        token_accuracy_last=accuracies[-1] if accuracies else None,
    )


# Writing


class RunClock(TrainerCallback):
    """Remembers when and at which step this session's training began."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began, self.first_step = time.monotonic(), state.global_step


@contextmanager
def summarized(trainer: LlavaTrainer, config: RunConfig) -> Iterator[None]:
    """Write the summary when the block ends, whatever ends it, if training has begun in it by then."""
    clock = RunClock()
    trainer.add_callback(clock)
    try:
        yield
    except NonFiniteLossError as error:
        _conclude(trainer, config, clock, f"stopped: {error}", is_together=True)
        raise
    except RunStopped:
        # The launcher may have ended other ranks by now.
        _conclude(trainer, config, clock, "stopped: it was told to stop", is_together=False)
        raise
    except BaseException as error:
        _conclude_failure(trainer, config, clock, error)
        raise
    _conclude(trainer, config, clock, "finished", is_together=True)


def _conclude_failure(trainer: LlavaTrainer, config: RunConfig, clock: RunClock, error: BaseException) -> None:
    """Write the summary of a run that failed, without hiding why it did."""
    first_line = (str(error).splitlines() or [""])[0]
    try:
        _conclude(trainer, config, clock, f"failed: {type(error).__name__}: {first_line}", is_together=False)
    except Exception as problem:  # what is broken may be what the summary is made from
        logger.warning("%s is not written: %s: %s", SUMMARY_NAME, type(problem).__name__, problem)


def _conclude(trainer: LlavaTrainer, config: RunConfig, clock: RunClock, outcome: str, *, is_together: bool) -> None:
    """Make the summary, and have rank 0 write and show it.

    Args:
        is_together: every rank is here, so that they can put together what each of them knows.
    """
    if clock.began is None:
        return
    peak = peak_memory_bytes(trainer.args.device)
    if is_together:
        trainer.compare_notes()
        peaks = [peak for peak in distributed.gather_objects(peak) if peak is not None]
        peak = max(peaks, default=None)
    if not trainer.args.should_save:
        return
    summary = summarize(trainer, config, clock, outcome, peak)
    try:
        write(summary, Path(trainer.args.output_dir))
    except OSError as error:
        logger.warning("%s is not written: %s", SUMMARY_NAME, error)
    logger.info("summary of the run (also in %s/%s.txt):\n%s", trainer.args.output_dir, SUMMARY_NAME, render(summary))


def summarize(
    trainer: LlavaTrainer, config: RunConfig, clock: RunClock, outcome: str, peak: int | None
) -> TrainingSummary:
    """Collect what is known at the end of a run."""
    args, state = trainer.args, trainer.state
    model_config = trainer.base_model.config
    facts = trainer.checkpoint_facts()
    seconds = time.monotonic() - clock.began
    in_session = count_tokens(state.log_history, after_step=clock.first_step)
    complete = [path for path in checkpointing.list_checkpoints(Path(args.output_dir)) if is_complete(path)]
    return TrainingSummary(
        outcome=outcome,
        resumed_at=clock.first_step or None,
        command=shlex.join(sys.argv),
        output_dir=str(Path(args.output_dir).resolve()),
        checkpoints=[path.name for path in complete],
        language_model=config.model.language_model,
        vision_tower=model_config.vision_tower_name_or_path,
        projector=dict(model_config.projector),
        tokens_per_image=trainer.conversations.max_tokens_per_image,
        parts=count_parameters(trainer.model),
        data=trainer.conversations.account(),
        held_out_data=None if trainer.eval_dataset is None else trainer.eval_dataset.account(),
        world_size=facts.world_size,
        zero_stage=facts.zero_stage,
        precision="bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        samples_per_step=trainer.get_total_train_batch_size(args),
        learning_rate=args.learning_rate,
        steps=state.global_step,
        planned_steps=state.max_steps,
        epochs=state.epoch or 0.0,
        micro_batches_left_out=trainer.loss_guard.num_skipped,
        tokens=count_tokens(state.log_history),
        losses=find_losses(state.log_history),
        seconds=seconds,
        tokens_per_second=in_session.tokens / seconds if in_session.tokens else None,
        peak_memory_bytes=peak,
        versions=versions(),
        commit=commit(),
    )


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was finished; its contents were compared when it was written."""
    return (checkpoint / checkpointing.MANIFEST_NAME).is_file()


def write(summary: TrainingSummary, folder: Path) -> None:
    """Write both forms; each appears whole."""
    folder.mkdir(parents=True, exist_ok=True)
    content = _without_nan(dataclasses.asdict(summary))
    texts = {".json": json.dumps(content, indent=2, allow_nan=False) + "\n", ".txt": render(summary) + "\n"}
    for suffix, text in texts.items():
        path = folder / (SUMMARY_NAME + suffix)
        beside = path.with_name(path.name + ".new")
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)


def _without_nan(value: Any) -> Any:
    """Replace numbers that JSON does not have by None, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(entry) for key, entry in value.items()}
    return [_without_nan(entry) for entry in value] if isinstance(value, list | tuple) else value


# The page


def render(summary: TrainingSummary) -> str:
    """Draw the page."""
    sections = (_run_lines, _model_lines, _data_lines, _result_lines)
    return "\n".join(line for lines in sections for line in lines(summary))


def _line(name: str, text: str) -> str:
    return f"{name:<18}{text}"


def _run_lines(summary: TrainingSummary) -> list[str]:
    split = "" if summary.zero_stage is None else f", ZeRO-{summary.zero_stage}"
    checkpoints = ", ".join(summary.checkpoints) or "none"
    return [
        _line("outcome", summary.outcome),
        *([] if summary.resumed_at is None else [_line("resumed", _since(summary.resumed_at))]),
        _line("command", summary.command),
        _line("output", f"{summary.output_dir} (checkpoints: {checkpoints})"),
        _line("ranks", f"{summary.world_size}{split}, {summary.precision}"),
        _line("versions", ", ".join(f"{name} {version}" for name, version in summary.versions.items())),
        *([_line("commit", summary.commit)] if summary.commit else []),
    ]


def _since(step: int) -> str:
    return f"at step {step:,}; samples replaced, cut and left out, time and memory are since then"


def _model_lines(summary: TrainingSummary) -> list[str]:
    options = ", ".join(f"{name}={value}" for name, value in summary.projector["options"].items())
    described = f"{summary.projector['name']}{f' ({options})' if options else ''}"
    parts = [
        _line("  " + count.part, f"{count.num_trainable:,} of {count.num_parameters:,} parameters trained")
        for count in summary.parts
    ]
    return [
        _line("language model", summary.language_model),
        _line("vision tower", str(summary.vision_tower)),
        _line("projector", f"{described}, {summary.tokens_per_image} tokens per image"),
        *parts,
    ]


def _data_lines(summary: TrainingSummary) -> list[str]:
    lines = _account_lines("data", summary.data)
    if summary.held_out_data is not None:
        lines += _account_lines("held-out data", summary.held_out_data)
    return lines


def _account_lines(name: str, account: DataAccount) -> list[str]:
    lines = [_line(name, f"{account.path}: {account.num_used:,} of {account.num_records:,} records used")]
    what = (("left out", account.left_out), ("replaced", account.replaced))
    kinds = [(f"{verb}: {cause}", count, cause) for verb, counts in what for cause, count in counts.items()]
    if account.num_cut:
        kinds.append(("cut to the longest allowed", account.num_cut, "cut"))
    for label, count, cause in kinds:
        lines.append(f"  {count:,} {label}")
        lines += [f"    {example}" for example in account.examples.get(cause, ())]
    return lines


def _result_lines(summary: TrainingSummary) -> list[str]:
    lines = [
        _line(
            "steps",
            f"{summary.steps:,} of {summary.planned_steps:,} ({summary.epochs:.2f} epochs), "
            f"{summary.samples_per_step} samples each, learning rate {summary.learning_rate:g}",
        )
    ]
    if summary.micro_batches_left_out:
        lines.append(f"  {summary.micro_batches_left_out:,} micro-batches left out, since their loss was no number")
    return [*lines, *_token_lines(summary), *_loss_lines(summary.losses), *_cost_lines(summary)]


def _token_lines(summary: TrainingSummary) -> list[str]:
    tokens = summary.tokens
    if tokens.padding is None:
        return []
    # Counts come from log entries, and the steps after the last one have none.
    counted = "" if tokens.last_step == summary.steps else f" (up to step {tokens.last_step:,}, the last one logged)"
    return [
        _line(
            "tokens",
            f"{tokens.tokens:,}, {tokens.supervised:,} of them supervised; {tokens.padding:.1%} of positions were "
            f"padding; {tokens.conversations:,} conversations, {tokens.images:,} images{counted}",
        )
    ]


def _loss_lines(losses: LossRecord) -> list[str]:
    lines = []
    if losses.first is not None and losses.last is not None:
        lines.append(_line("loss", f"{_at(losses.first)}, {_at(losses.last)}"))
    if losses.held_out_last is not None and losses.held_out_best is not None:
        accuracy = f", token accuracy {losses.token_accuracy_last:.1%}"
        lines.append(
            _line("held-out loss", f"{_at(losses.held_out_last)}{accuracy}; the lowest {_at(losses.held_out_best)}")
        )
    return lines


def _at(record: tuple[float, int]) -> str:
    return f"{record[0]:.4f} at step {record[1]:,}"


def _cost_lines(summary: TrainingSummary) -> list[str]:
    speed = "" if summary.tokens_per_second is None else f", {summary.tokens_per_second:,.0f} tokens/s"
    lines = [_line("time", f"{describe_seconds(summary.seconds)}{speed}")]
    if summary.peak_memory_bytes is not None:
        lines.append(_line("peak memory", f"{summary.peak_memory_bytes / 2**30:.2f} GiB on a rank"))
    return lines
