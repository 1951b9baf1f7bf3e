"""One side of the comparison, in a process of its own: build the model, train under a Trainer, report every step.

The process takes a step when it is told to and waits in between, so that several sides can take turns. Nothing is
measured around a private loop: a stock side runs transformers' Trainer as it is, an own side the functions of
`llava_saep.train.run` that a training run is made of.
"""

import gc
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from llava_saep.bench.placement import select_by_hand
from llava_saep.bench.timing import synchronize
from llava_saep.bench.training.conversations import (
    ConversationSamples,
    TextLengths,
    draw_conversations,
    pad_to_longest,
)
from llava_saep.bench.training.models import build_own_model, build_stock_model, projector_config_for
from llava_saep.bench.training.shapes import ModelShape
from llava_saep.bench.training.work import Train
from llava_saep.program import quieten_adapters
from llava_saep.train import run
from llava_saep.train.config import DataConfig, LoraConfig, ModelConfig, RunConfig, TrainingConfig
from llava_saep.train.lora import add_lora
from llava_saep.train.trainable import set_trainable

STOCK_PROJECTOR = "mlp2x_gelu"
"""What transformers' Llava has."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_KIB = 1024


@dataclass(frozen=True, kw_only=True)
class TrainingWorkload:
    """What every side does.

    Args:
        batch_size: conversations per optimizer step; more than fit on a GPU are halved until they do.
        num_micro_batches: equal parts that a step's conversations go through the model in.
        num_threads: of torch on the processor; None: torch's own.
        lora: present exactly if `train` is "lora".
        stock_arguments: of transformers.TrainingArguments for the stock side.
    """

    shape: ModelShape
    train: Train
    batch_size: int
    texts: TextLengths
    device: str
    dtype: Literal["fp32", "bf16"]
    seed: int
    num_threads: int | None
    stock_arguments: Mapping[str, Any]
    num_micro_batches: int = 1
    lora: LoraConfig | None = None

    @property
    def micro_batch_size(self) -> int:
        """Conversations that go through the model at once."""
        return max(self.batch_size // self.num_micro_batches, 1)

    @property
    def trainable(self) -> frozenset[str]:
        """Parts of the model that learn."""
        beside = {"projector": set(), "lora": {"lora"}, "full": {"language_model"}}
        return frozenset({"projector", *beside[self.train]})


@dataclass(frozen=True, kw_only=True)
class Side:
    """Who trains: transformers' Llava and Trainer, or this project's with a projector and what a user's flags say."""

    name: str
    projector: str
    projector_options: Mapping[str, Any] = field(default_factory=dict)
    own_data: DataConfig | None = None
    own_training: TrainingConfig | None = None
    attn_implementation: str | None = None

    @property
    def is_stock(self) -> bool:
        """Whether transformers' own model and Trainer are measured."""
        return self.own_training is None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step, from the end of the step before: batch, forward, backward, optimizer.

    Args:
        cpu_seconds: of all threads of the process.
        num_positions: what the language model was given, padding included.
        peak_memory_bytes: so far, since the model began to be built.
        first_loss: of the very first step, once it is known.
    """

    seconds: float
    cpu_seconds: float
    batch_size: int
    num_positions: int
    peak_memory_bytes: int | None
    first_loss: float | None


@dataclass(frozen=True)
class Failure:
    """Why there are no more steps."""

    reason: str
    is_out_of_memory: bool = False


def run_side(side: Side, workload: TrainingWorkload, log_path: str, connection: Connection) -> None:
    """Be the process: told a batch size, build; for each "step" answer a `Step`, or for the last time a `Failure`."""
    quieten_adapters()
    with _output_to(log_path):
        try:
            _train_as_told(side, workload, connection)
        except EOFError:
            return  # the other end is gone, and nobody waits for an answer
        except Exception as error:  # whatever ends this side must not end the others
            traceback.print_exc()
            is_out_of_memory = isinstance(error, torch.OutOfMemoryError)
            connection.send(Failure(f"{type(error).__name__}: {error}", is_out_of_memory))


@contextmanager
def _output_to(path: str) -> Iterator[None]:
    """Send what libraries say, also from C, to a file."""
    with open(path, "w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        yield
        sys.stdout.flush()
        sys.stderr.flush()


def _train_as_told(side: Side, workload: TrainingWorkload, connection: Connection) -> None:
    """Train, with half the batch again and again where the GPU has too little memory for the first step."""
    if workload.num_threads is not None:
        torch.set_num_threads(workload.num_threads)
    device = torch.device(workload.device)
    workload = replace(workload, batch_size=connection.recv())
    while True:
        clock = StepClock(connection, device, workload.batch_size)
        try:
            _train(side, workload, clock)
            return
        except torch.OutOfMemoryError:
            if clock.num_steps or workload.batch_size == 1:
                raise
        gc.collect()
        torch.cuda.empty_cache()
        workload = replace(workload, batch_size=workload.batch_size // 2)


def _train(side: Side, workload: TrainingWorkload, clock: "StepClock") -> None:
    if side.is_stock:
        trainer = make_stock_trainer(workload, str(Path(workload.stock_arguments["output_dir"])))
    else:
        trainer = make_own_trainer(side, workload)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    counter = clock.count_positions(trainer.model)
    try:
        trainer.train()
    finally:
        counter.remove()


# The two Trainers


def make_stock_trainer(workload: TrainingWorkload, output_dir: str) -> Trainer:
    """transformers' model under transformers' Trainer, with its defaults: sdpa, its loss, padding to the longest."""
    arguments = {**workload.stock_arguments, "output_dir": output_dir}
    arguments["per_device_train_batch_size"] = workload.micro_batch_size
    model = build_stock_model(workload.shape, DTYPES[workload.dtype], torch.device(workload.device), workload.seed)
    if workload.lora is not None:
        model = add_lora(model, workload.lora)
    set_trainable(model, workload.trainable)
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        data_collator=pad_to_longest,
        train_dataset=_samples(workload, workload.shape.grid.num_patches),
    )


@dataclass(frozen=True)
class _Tokenizer:
    pad_token_id: int = 0


@dataclass(frozen=True)
class _Processor:
    """As much of a processor as training in memory needs."""

    tokenizer: _Tokenizer = _Tokenizer()


def make_own_trainer(side: Side, workload: TrainingWorkload) -> Trainer:
    """What `llava_saep.train.run` makes of a user's flags, with model and samples drawn in place of files."""
    selection = select_by_hand(side.projector, side.projector_options)
    trainer_arguments = {
        **side.own_training.trainer_arguments,
        "per_device_train_batch_size": workload.micro_batch_size,
    }
    training = replace(side.own_training, trainer_arguments=trainer_arguments)
    model_config = ModelConfig(
        language_model="random",
        vision_tower="random",
        projector=selection,
        attn_implementation=side.attn_implementation,
    )
    arguments = run.start(training)
    model = build_own_model(
        workload.shape, selection, DTYPES[workload.dtype], torch.device(workload.device), workload.seed
    )
    num_image_tokens = projector_config_for(selection, workload.shape).num_output_tokens(workload.shape.grid)
    config = RunConfig(model=model_config, data=side.own_data, training=training)
    return run.assemble(model, _Processor(), _samples(workload, num_image_tokens), config, arguments)


def _samples(workload: TrainingWorkload, num_image_tokens: int) -> ConversationSamples:
    conversations = draw_conversations(workload.batch_size, workload.texts, workload.seed)
    return ConversationSamples(conversations, workload.shape, num_image_tokens, workload.seed)


# Watching it


class StepClock(TrainerCallback):
    """Reports each step and waits for the word to take the next one; it waits before the first, too."""

    def __init__(self, connection: Connection, device: torch.device, batch_size: int) -> None:
        self.num_steps = 0
        self._connection, self._device, self._batch_size = connection, device, batch_size
        self._memory_before = resident_bytes()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._num_positions = 0
        self._first_loss: float | None = None
        self._start = self._cpu_start = 0.0

    def count_positions(self, model: nn.Module) -> RemovableHandle:
        """Have the language model's inputs counted."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        return base.model.language_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for the word before the first step."""
        self._wait(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock, report, wait."""
        synchronize(self._device)
        seconds, cpu_seconds = time.perf_counter() - self._start, time.process_time() - self._cpu_start
        self.num_steps += 1
        step = Step(
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            batch_size=self._batch_size,
            num_positions=self._num_positions,
            peak_memory_bytes=self._peak(),
            first_loss=self._first_loss,
        )
        self._connection.send(step)
        self._wait(control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **_: Any) -> None:
        """Keep the first step's loss, which becomes known after the step has been reported."""
        if self._first_loss is None and "loss" in logs:
            self._first_loss = float(logs["loss"])

    def _wait(self, control: Any) -> None:
        if self._connection.recv() != "step":
            control.should_training_stop = True
        self._num_positions = 0
        synchronize(self._device)
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def _count(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._num_positions += kwargs["inputs_embeds"].shape[:2].numel()

    def _peak(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        peak = peak_resident_bytes()
        return None if peak is None or self._memory_before is None else peak - self._memory_before


def resident_bytes() -> int | None:
    """Bytes of this process that are in memory now; None where the system does not tell."""
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int | None:
    """The most bytes of this process that were in memory at once; None where the system does not tell."""
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int | None:
    path = Path("/proc/self/status")
    if not path.is_file():
        return None
    fields = (line.split() for line in path.read_text().splitlines())
    return next((int(words[1]) * _KIB for words in fields if words[0] == f"{name}:"), None)
