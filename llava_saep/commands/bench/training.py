"""`llava-saep bench training [NAMES]`: training steps beside transformers' own Llava, as text and JSON."""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from llava_saep.arguments import parse_arguments
from llava_saep.bench.placement import refuse_unusable, select_by_hand
from llava_saep.bench.training.benchmark import TrainingBenchmark
from llava_saep.bench.training.conversations import TextLengths
from llava_saep.bench.training.models import projector_config_for
from llava_saep.bench.training.report import training_document
from llava_saep.bench.training.shapes import PRESETS, ModelShape, shape_fields
from llava_saep.bench.training.side import DTYPES, STOCK_PROJECTOR, Side, TrainingWorkload
from llava_saep.bench.training.work import Train
from llava_saep.commands.bench.training_tables import training_lines
from llava_saep.commands.projectors.bench import check_json_path
from llava_saep.commands.projectors.flags import add_option_flag, not_negative, positive
from llava_saep.commands.projectors.progress import Progress
from llava_saep.commands.projectors.text import terminal_width
from llava_saep.errors import UserError
from llava_saep.machine import GIB, describe_machine
from llava_saep.memory import available_memory
from llava_saep.train.config import LoraConfig
from projectors import parse_projector_options

EXIT_INTERRUPTED = 130
DEFAULT_PROJECTORS = ("mlp2x_gelu", "saep")
_BATCH_SIZE = 16
_NUM_STEPS_BEYOND_REACH = 10**6
_LEARNING_RATE = 2e-5

_TRAIN_FLAGS: Mapping[Train, tuple[str, ...]] = {
    "projector": ("--tune_mm_mlp_adapter", "True"),
    "lora": ("--lora_enable", "True"),
    "full": (),
}
"""What `llava-saep train` is told for each choice of what learns."""


def main(argv: Sequence[str]) -> int:
    """Measure, print the tables and write what was asked for; after Ctrl-C with what there is by then.

    Raises:
        UserError: a flag is wrong, or, at the end, a side could not be measured.
    """
    arguments = _parser().parse_args(argv)
    _refuse_contradictions(arguments)
    json_path = check_json_path(arguments.json) if arguments.json else None
    progress = Progress(sys.stderr)
    with tempfile.TemporaryDirectory(prefix="llava-saep-bench-") as folder:
        workload = workload_of(arguments, folder)
        benchmark = plan_benchmark(arguments, workload, Path(folder), progress)
        is_interrupted = _run(benchmark)
    progress.clear()
    document = training_document(
        benchmark,
        command=["llava-saep", "bench", "training", *argv],
        machine=_machine(workload),
        settings={"preset": _preset_name(arguments), "own_flags": _flags_for_everyone(arguments, workload)},
        interrupted=is_interrupted,
    )
    # The file first: it holds everything, whatever happens to the terminal.
    if json_path is not None:
        json_path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print("\n".join(training_lines(document, terminal_width())))
    if json_path is not None:
        print(f"\nevery step, settings and machine: {json_path}")
    if is_interrupted:
        return EXIT_INTERRUPTED
    refuse_unusable({result.side.name: result.error for result in benchmark.results})
    return 0


def _run(benchmark: TrainingBenchmark) -> bool:
    """Returns whether Ctrl-C ended the run early."""
    try:
        benchmark.run()
        return False
    except KeyboardInterrupt:
        print("\ninterrupted; what was measured so far follows", file=sys.stderr)
        return True


def _machine(workload: TrainingWorkload) -> dict[str, Any]:
    machine = describe_machine(torch.device(workload.device))
    return machine | ({} if workload.num_threads is None else {"num_threads": workload.num_threads})


# From flags to a plan


def plan_benchmark(
    arguments: argparse.Namespace, workload: TrainingWorkload, folder: Path, progress: Progress
) -> TrainingBenchmark:
    """One side of transformers' and one per projector named; fewer steps on a processor, where one takes seconds."""
    is_slow = workload.device == "cpu"
    stock = [] if arguments.no_stock else [Side(name=f"stock {STOCK_PROJECTOR}", projector=STOCK_PROJECTOR)]
    names = dict.fromkeys(arguments.names or DEFAULT_PROJECTORS)
    return TrainingBenchmark(
        [*stock, *(own_side(name, arguments, workload, folder) for name in names)],
        workload,
        folder=folder,
        num_warmup=1 if is_slow else 2,
        num_rounds=arguments.rounds or (3 if is_slow else 1),
        steps_per_round=arguments.steps or (1 if is_slow else 5),
        keeps_processes=is_slow,
        progress=progress,
    )


def own_side(name: str, arguments: argparse.Namespace, workload: TrainingWorkload, folder: Path) -> Side:
    """A side that trains as `llava-saep train` would with these flags.

    Raises:
        UserError, ProjectorError: a flag or the projector is wrong.
    """
    options = parse_projector_options(arguments.mm_projector_options)
    config = projector_config_for(select_by_hand(name, options), workload.shape)
    max_length = config.num_output_tokens(workload.shape.grid) + workload.texts.longest
    places = {"model_name_or_path": "random", "vision_tower": "random", "data_path": "random"}
    flags = _as_flags({**places, "output_dir": folder / "own", "model_max_length": max_length})
    run_config = parse_arguments([*flags, *_flags_for_everyone(arguments, workload)])
    return Side(
        name=f"own {name}",
        projector=name,
        projector_options=options,
        own_data=run_config.data,
        own_training=run_config.training,
        attn_implementation=run_config.model.attn_implementation,
    )


def _flags_for_everyone(arguments: argparse.Namespace, workload: TrainingWorkload) -> list[str]:
    """Flags of `llava-saep train` for every own side; those of the user last, since the last one counts."""
    lora = [] if workload.lora is None else _as_flags({"lora_r": workload.lora.rank, "lora_alpha": workload.lora.alpha})
    same = {name: value for name, value in workload.stock_arguments.items() if name != "output_dir"}
    flags = _as_flags({**same, "per_device_train_batch_size": workload.micro_batch_size, "resume": "never"})
    return [*flags, *_TRAIN_FLAGS[workload.train], *lora, *shlex.split(arguments.own_flags)]


def _as_flags(values: Mapping[str, object]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def workload_of(arguments: argparse.Namespace, folder: str) -> TrainingWorkload:
    """What every side does.

    Raises:
        UserError: sizes that do not fit together, or no such device here.
    """
    device = _device(arguments.device)
    dtype = arguments.dtype or ("fp32" if device == "cpu" else "bf16")
    lora = LoraConfig(rank=arguments.lora_r, alpha=arguments.lora_alpha) if arguments.train == "lora" else None
    return TrainingWorkload(
        shape=shape_of(arguments),
        train=arguments.train,
        batch_size=_batch_size(arguments.batch_size, device),
        texts=TextLengths(arguments.min_text_tokens, arguments.max_text_tokens, arguments.supervised_share),
        device=device,
        dtype=dtype,
        seed=arguments.seed,
        num_threads=arguments.threads or (2 if device == "cpu" else None),
        stock_arguments={"output_dir": f"{folder}/stock", **_trainer_arguments(arguments, device, dtype)},
        num_micro_batches=arguments.gradient_accumulation_steps,
        lora=lora,
    )


def _trainer_arguments(arguments: argparse.Namespace, device: str, dtype: str) -> dict[str, Any]:
    """Arguments that both Trainers get; all others stay at the default of each."""
    checkpointing = arguments.gradient_checkpointing
    if checkpointing is None:
        checkpointing = _preset_name(arguments) == "7b"
    return {
        "max_steps": _NUM_STEPS_BEYOND_REACH,
        "learning_rate": _LEARNING_RATE,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": arguments.seed,
        "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
        **({"use_cpu": True} if device == "cpu" else {}),
        **({"bf16": True} if dtype == "bf16" else {}),
        **({"activation_checkpointing": True} if checkpointing else {}),
        **({"optim": arguments.optim} if arguments.optim else {}),
    }


def shape_of(arguments: argparse.Namespace) -> ModelShape:
    """The preset's shape with the sizes that were given."""
    given = {name: getattr(arguments, name) for name in shape_fields() if getattr(arguments, name) is not None}
    return replace(PRESETS[_preset_name(arguments)], **given)


def _preset_name(arguments: argparse.Namespace) -> str:
    return arguments.preset or ("small" if _device(arguments.device) == "cpu" else "7b")


def _device(name: str | None) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; use --device cpu")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def _batch_size(given: str, device: str) -> int:
    """The number given; with "auto" about one conversation per GiB that is free, halved later until it fits."""
    if given != "auto":
        return int(given)
    free_bytes = available_memory(torch.device(device))
    if device == "cpu" or free_bytes is None:
        raise UserError("--batch_size auto: tries what fits on a GPU, and this runs on cpu; give a number")
    return 2 ** (max(free_bytes // GIB, 1).bit_length() - 1)


def _refuse_contradictions(arguments: argparse.Namespace) -> None:
    if arguments.mm_projector_options and len(arguments.names) != 1:
        raise UserError("--mm_projector_options belong to one projector: name it alone, as in `bench training saep`")
    batch_size, num_parts = arguments.batch_size, arguments.gradient_accumulation_steps
    if batch_size != "auto" and int(batch_size) % num_parts:
        raise UserError(f"--batch_size {batch_size}: expected a multiple of --gradient_accumulation_steps {num_parts}")
    if arguments.min_text_tokens > arguments.max_text_tokens:
        raise UserError(
            f"--min_text_tokens {arguments.min_text_tokens} is more than --max_text_tokens {arguments.max_text_tokens}"
        )
    if arguments.min_text_tokens < 2:
        raise UserError("--min_text_tokens 1: expected 2 or more, a token to start with and one to learn")
    if not 0 < arguments.supervised_share < 1:
        raise UserError(f"--supervised_share {arguments.supervised_share}: expected a share between 0 and 1")


def _batch_size_word(word: str) -> str:
    return word if word == "auto" else str(positive(word))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-saep bench training",
        description="Measure training steps of this project and of transformers' LlavaForConditionalGeneration under "
        "its own Trainer, on the same conversations, with random weights: samples and learned tokens per second, "
        "processor time, peak memory, padding, and utilisation where the device's peak is known.",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="projectors of the own sides, as `llava-saep projectors show` takes them (default: "
        f"{' '.join(DEFAULT_PROJECTORS)})",
    )
    add_option_flag(parser)
    parser.add_argument("--no_stock", action="store_true", help="leave out transformers' own Llava and Trainer")
    parser.add_argument("--json", metavar="FILE", help="write every step, the settings and the machine")
    _add_training_flags(parser)
    _add_measuring_flags(parser)
    _add_shape_flags(parser)
    return parser


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument(
        "--train", choices=get_args(Train), default="full", help="projector: stage 1; lora; full: stage 2 (default)"
    )
    group.add_argument(
        "--batch_size",
        type=_batch_size_word,
        default=str(_BATCH_SIZE),
        help=f"conversations per step (default {_BATCH_SIZE}); auto: as many as fit on the GPU, found by halving",
    )
    group.add_argument(
        "--gradient_accumulation_steps",
        type=positive,
        default=1,
        help="equal parts that the conversations of a step go through the model in, on both sides (default 1)",
    )
    group.add_argument("--min_text_tokens", type=positive, default=40, help="of a conversation's text (default 40)")
    group.add_argument("--max_text_tokens", type=positive, default=400, help="of a conversation's text (default 400)")
    group.add_argument(
        "--supervised_share", type=float, default=0.5, help="of a text's tokens that are learned (default 0.5)"
    )
    group.add_argument("--optim", help="of both sides, by transformers' names (default: each side's own default)")
    group.add_argument(
        "--gradient_checkpointing",
        action=argparse.BooleanOptionalAction,
        help="recompute activations on both sides (default: with the preset 7b)",
    )
    group.add_argument("--lora_r", type=positive, default=128, help="rank of adapters (default 128)")
    group.add_argument("--lora_alpha", type=positive, default=256, help="scale of adapters (default 256)")
    group.add_argument(
        "--own_flags", default="", metavar="FLAGS", help="further flags of `llava-saep train` for the own sides, quoted"
    )


def _add_measuring_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measuring")
    group.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    group.add_argument("--dtype", choices=DTYPES, help="of weights and products (default: fp32 on cpu, else bf16)")
    group.add_argument("--threads", type=positive, help="of torch on the processor (default 2 on cpu)")
    group.add_argument("--rounds", type=positive, help="turns of each side (default: 3 on cpu, 1 elsewhere)")
    group.add_argument("--steps", type=positive, help="measured steps of a turn (default: 1 on cpu, 5 elsewhere)")
    group.add_argument("--seed", type=not_negative, default=0, help="of weights, texts and pixels (default 0)")


def _add_shape_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("shape", "a preset, and sizes that differ from it")
    group.add_argument("--preset", choices=PRESETS, help="default: small on cpu, 7b elsewhere")
    for name, meaning in shape_fields().items():
        group.add_argument(f"--{name}", type=positive, help=meaning)
