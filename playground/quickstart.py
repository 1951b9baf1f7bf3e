"""The main job of quickstart.sh: a LLaVA trained in its two stages on generated images, then questioned.

Everything is what a user's own run would be: LLaVA's flags, the deepspeed launcher, ZeRO, LLaVA's JSON files. Only the
data, the vision tower and the language model are small (playground/spatial_scenes, playground/backbones).
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llava_saep.errors import UserError
from playground.display import format_seconds, heading, shown_command, shown_path, step
from projectors import ProjectorError

ROOT = Path(__file__).parents[1]
BACKBONES = ROOT / "playground" / "backbones"
"""The small stand-ins for CLIP and Vicuna, and the recipe that made them."""
SETTINGS_FILE = "quickstart.json"
DATASET_FILE = "dataset.json"


_SMALL_ATTENTION = "hidden_size=96,num_heads=4"
_SMALL_QUERIES = "num_queries=9"
SMALL_PROJECTORS = {
    "avg_pool": _SMALL_QUERIES,
    "c_abstractor": f"{_SMALL_QUERIES},hidden_size=96,position_grid=6|6",
    "d_abstractor": f"{_SMALL_QUERIES},{_SMALL_ATTENTION},depth=2,intermediate_size=96,position_grid=6|6",
    "llava_sp": "kernel_sizes=1|2|3|4|5|6,spatial_hidden_size=96,detail_kernel_size=3,detail_stride=1",
    "perceiver": f"{_SMALL_QUERIES},depth=2,num_heads=4,head_size=24",
    "qformer": f"{_SMALL_QUERIES},hidden_size=96,num_hidden_layers=2,num_attention_heads=4,intermediate_size=384",
    "resampler": f"{_SMALL_QUERIES},{_SMALL_ATTENTION},depth=2,intermediate_size=384,position_grid=6|6",
    "token_packer": _SMALL_ATTENTION,
}
"""Options of the projectors whose defaults are made for towers of 24 x 24 patches; nine tokens, as many as SAEP's."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the quick start trains, on how much, for how long. The flags change some of it, the rest is set here.

    Args:
        global_batch_size: samples of one step, over all processes.
    """

    num_train_images: int = 8000
    num_held_out_images: int = 200
    global_batch_size: int = 32
    stage1_steps: int = 250
    stage1_learning_rate: float = 2e-3
    stage2_steps: int = 500
    stage2_learning_rate: float = 1e-3
    warmup_share: float = 0.03
    max_length: int = 512
    max_new_tokens: int = 48
    evaluation_batch_size: int = 100
    num_examples: int = 3


SMOKE = Settings(
    num_train_images=64,
    num_held_out_images=2,
    global_batch_size=4,
    stage1_steps=3,
    stage2_steps=3,
    max_new_tokens=8,
)
"""--smoke: every step of the way, none of them long enough to learn anything."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One quick start, checked and ready to run."""

    settings: Settings
    projector: str
    projector_options: str
    small_sizes: str
    is_smoke: bool
    world: str
    seed: int
    data_dir: Path
    output_dir: Path
    vision_tower: str
    language_model: str
    num_processes: int
    deepspeed_config: Path
    on_gpu: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the quick start; exit code 2 for wrong flags, before anything is written."""
    try:
        job = plan_job(_parser().parse_args(argv))
        run_job(job)
    except (UserError, ProjectorError) as error:
        print(f"\nquickstart: {error}", file=sys.stderr)
        return 2
    except StageFailed as error:
        print(f"\nquickstart: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nquickstart: interrupted", file=sys.stderr)
        return 130
    return 0


def run_job(job: Job) -> None:
    """Data, stage 1, stage 2, evaluation, examples; then what to try next."""
    print(describe_job(job))
    started, seconds = time.monotonic(), {}
    with step(f"1/5  Data: {job.settings.num_train_images:,} generated images with conversations", seconds, "data"):
        prepare_data(job)
    prepare_output_dir(job)
    with step("2/5  Stage 1: the projector learns to describe, tower and language model frozen", seconds, "stage 1"):
        run_stage(job, stage1_flags(job), "stage 1")
    with step("3/5  Stage 2: projector and language model learn to answer", seconds, "stage 2"):
        run_stage(job, stage2_flags(job), "stage 2")
    with step("4/5  Evaluation: free answers to held-out images, and without the images", seconds, "evaluation"):
        evaluation = evaluate(job)
    heading("5/5  What the model sees and says")
    show_examples(job, evaluation)
    show_results(job, evaluation, seconds, time.monotonic() - started)
    show_next_steps(job)


# The flags


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="./quickstart.sh", description=__doc__.split("\n")[0])
    parser.add_argument("--mm_projector_type", default="saep", help="any registered projector (default: saep)")
    parser.add_argument("--mm_projector_options", default="", help="'{\"stride\": 1}' or stride=1,kernel_size=5")
    parser.add_argument(
        "--world",
        choices=("cells", "free"),
        default="cells",
        help="objects in cells with jitter, or at free positions (harder; default: cells)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of data, initialisation and order (default: 0)")
    parser.add_argument(
        "--output_dir", type=Path, help="default: runs/quickstart/<world>-<projector and options>-seed<seed>"
    )
    parser.add_argument("--data_dir", type=Path, help="default: runs/data/<world>-seed<seed>; made when absent")
    parser.add_argument("--vision_tower", default=str(BACKBONES / "vision_tower"), help="another vision tower")
    parser.add_argument(
        "--model_name_or_path", default=str(BACKBONES / "language_model"), help="another language model"
    )
    parser.add_argument("--stage1_steps", type=int, help=f"default: {Settings.stage1_steps}")
    parser.add_argument("--stage2_steps", type=int, help=f"default: {Settings.stage2_steps}")
    parser.add_argument(
        "--deepspeed",
        type=Path,
        default=ROOT / "deepspeed_configs" / "zero2.json",
        help="DeepSpeed config (default: deepspeed_configs/zero2.json)",
    )
    parser.add_argument("--num_processes", type=int, help="default: one per GPU, or two without GPUs")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, to see that it runs")
    return parser


def plan_job(arguments: argparse.Namespace) -> Job:
    """Turn the flags into a job.

    Raises:
        UserError, ProjectorError: a flag names something that does not exist, or does not go with the others.
    """
    import torch

    settings = SMOKE if arguments.smoke else Settings()
    for name in ("stage1_steps", "stage2_steps", "num_processes"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
        if value is not None and name != "num_processes":
            settings = replace(settings, **{name: value})
    num_gpus = torch.cuda.device_count()
    options, small_sizes = merged_options(arguments.mm_projector_type, arguments.mm_projector_options)
    projector_label = _file_name(arguments.mm_projector_type) + options_mark(arguments.mm_projector_options)
    label = f"{arguments.world}-{projector_label}-seed{arguments.seed}"
    data_label = f"{arguments.world}-seed{arguments.seed}"
    runs = ROOT / "runs" / ("smoke" if arguments.smoke else "")
    job = Job(
        settings=settings,
        projector=arguments.mm_projector_type,
        projector_options=options,
        small_sizes=small_sizes,
        is_smoke=arguments.smoke,
        world=arguments.world,
        seed=arguments.seed,
        data_dir=(arguments.data_dir or runs / "data" / data_label).absolute(),
        output_dir=(arguments.output_dir or runs / "quickstart" / label).absolute(),
        vision_tower=arguments.vision_tower,
        language_model=arguments.model_name_or_path,
        num_processes=arguments.num_processes or default_num_processes(num_gpus, settings.global_batch_size),
        deepspeed_config=arguments.deepspeed.absolute(),
        on_gpu=num_gpus > 0,
    )
    check_job(job, num_gpus)
    return job


def small_options(projector: str) -> str:
    """Options that make a projector small enough here, where its defaults are not.

    Raises:
        ProjectorError: there is no such projector.
    """
    from projectors import parse_projector_options, registered_presets, select_projector

    selection = select_projector(projector, trust_projector_code=True)
    small = parse_projector_options(SMALL_PROJECTORS.get(selection.name, ""))
    preset = registered_presets().get(projector)
    meant_by_the_name = selection.options if preset is None else preset.options
    return ",".join(f"{name}={value}" for name, value in small.items() if name not in meant_by_the_name)


def merged_options(projector: str, given_text: str) -> tuple[str, str]:
    """The given options over the small ones, and what is left of the small ones, both as one would type them.

    Raises:
        ProjectorError: there is no such projector, or the text is not options.
    """
    from projectors import parse_projector_options

    given = parse_projector_options(given_text)
    small = {k: v for k, v in parse_projector_options(small_options(projector)).items() if k not in given}
    small_text = ",".join(f"{name}={value}" for name, value in small.items())
    if given_text.strip().startswith("{"):
        return json.dumps({**small, **given}), small_text
    return ",".join(filter(None, (small_text, given_text.strip()))), small_text


def options_mark(given_text: str) -> str:
    """`factor=3` -> `-factor-3`, in any order and spelling; shortened ones end in a hash, and no options in nothing."""
    from projectors import parse_projector_options

    options = sorted((name, str(value)) for name, value in parse_projector_options(given_text).items())
    mark = "".join(f"-{name}-{_file_name(value)}" for name, value in options)
    if len(mark) <= 48 and all(re.fullmatch(r"\w+", value) for _, value in options):
        return mark
    return f"{mark[:40]}-{hashlib.sha256(repr(options).encode()).hexdigest()[:8]}"


def default_num_processes(num_gpus: int, global_batch_size: int) -> int:
    """One process per GPU as far as they can share a batch evenly; two without GPUs."""
    if num_gpus == 0:
        return 2
    return max(count for count in range(1, num_gpus + 1) if global_batch_size % count == 0)


def _gpu_knows_bf16() -> bool:
    import torch

    return torch.cuda.is_bf16_supported(including_emulation=False)


def check_job(job: Job, num_gpus: int) -> None:
    """Raise UserError or ProjectorError for what would fail later, or write where it must not."""
    if not job.deepspeed_config.is_file():
        raise UserError(f"--deepspeed {job.deepspeed_config}: no such file; the configs are in deepspeed_configs/")
    if num_gpus and job.num_processes > num_gpus:
        raise UserError(f"--num_processes {job.num_processes}, but this machine has {num_gpus} GPUs")
    if job.settings.global_batch_size % job.num_processes:
        raise UserError(
            f"--num_processes {job.num_processes} must divide the batch of {job.settings.global_batch_size} samples"
        )
    for flag, folder, marker in (
        ("--output_dir", job.output_dir, SETTINGS_FILE),
        ("--data_dir", job.data_dir, DATASET_FILE),
    ):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{flag} {folder} is a file; name a folder")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
            raise UserError(f"{flag} {folder} holds files that are not the quick start's; name an empty or new folder")
    stored = read_json(job.data_dir / DATASET_FILE)
    if stored is not None and stored != dataset_facts(job):
        raise UserError(
            f"--data_dir {job.data_dir} holds another data set ({describe(stored)}; this job needs "
            f"{describe(dataset_facts(job))}); name another folder, or delete it"
        )
    check_projector(job)


def check_projector(job: Job) -> None:
    """Raise UserError or ProjectorError when the projector is unknown or cannot be placed between tower and model."""
    from llava_saep.model.loading import make_config
    from projectors import parse_projector_options, select_projector

    options = parse_projector_options(job.projector_options)
    make_config(
        language_model=job.language_model,
        vision_tower=job.vision_tower,
        projector=select_projector(job.projector, options, trust_projector_code=True),
        image_token_id=0,
    )


# The steps


def prepare_data(job: Job) -> None:
    """Generate the data set, or say that it is there already."""
    if make_dataset(job.data_dir, dataset_facts(job)):
        print(f"written to {job.data_dir}")
    else:
        print(f"{job.data_dir} is there already: reused.")


def make_dataset(folder: Path, facts: Mapping[str, Any]) -> bool:
    """Generate a data set unless it is there; False: it is. A folder without dataset.json is never a finished one.

    Args:
        folder: new, empty, or a data set's with these facts.
        facts: what `write_dataset` is told.
    """
    if (folder / DATASET_FILE).is_file():
        return False
    from playground.spatial_scenes.writing import write_dataset

    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    write_dataset(unfinished, **{name.removesuffix("_images"): value for name, value in facts.items()})
    write_json(unfinished / DATASET_FILE, facts)
    if folder.is_dir():
        folder.rmdir()
    unfinished.rename(folder)
    return True


def prepare_output_dir(job: Job) -> None:
    """Remove what an earlier quick start left in the output folder, and note what this one is."""
    earlier = [folder for name in ("stage1", "stage2", "evaluation") if (folder := job.output_dir / name).exists()]
    if earlier:
        names = ", ".join(folder.name for folder in earlier)
        print(
            f"\nThis run replaces the earlier one in {shown_path(job.output_dir)} ({names}); --output_dir keeps both."
        )
    for folder in earlier:
        shutil.rmtree(folder, ignore_errors=True)
    job.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(job.output_dir / SETTINGS_FILE, job_facts(job))


def stage1_flags(job: Job) -> list[str]:
    """LLaVA's pre-training: captions, template `plain`, the projector alone is trained."""
    return [
        *common_flags(job, "stage1", job.settings.stage1_steps, job.settings.stage1_learning_rate),
        *("--version", "plain"),
        *("--tune_mm_mlp_adapter", "True"),
    ]


def stage2_flags(job: Job) -> list[str]:
    """LLaVA's instruction tuning: conversations, template `v1`, starting from the projector of stage 1."""
    return [
        *common_flags(job, "stage2", job.settings.stage2_steps, job.settings.stage2_learning_rate),
        *("--version", "v1"),
        *("--pretrain_mm_mlp_adapter", str(job.output_dir / "stage1" / "mm_projector.safetensors")),
    ]


def common_flags(job: Job, stage: str, num_steps: int, learning_rate: float) -> list[str]:
    """What both stages are told, in LLaVA's flags."""
    flags: dict[str, Any] = {
        "deepspeed": job.deepspeed_config,
        "model_name_or_path": job.language_model,
        "vision_tower": job.vision_tower,
        "mm_projector_type": job.projector,
        "data_path": job.data_dir / "train" / f"{stage}.json",
        "image_folder": job.data_dir / "train" / "images",
        "output_dir": job.output_dir / stage,
        "per_device_train_batch_size": job.settings.global_batch_size // job.num_processes,
        **schedule_flags(job.settings, num_steps, learning_rate),
        "seed": job.seed,
    }
    if job.projector_options:
        flags["mm_projector_options"] = job.projector_options
    if job.on_gpu:
        flags["bf16" if _gpu_knows_bf16() else "fp16"] = True
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def schedule_flags(settings: Settings, num_steps: int, learning_rate: float) -> dict[str, Any]:
    """How long and how fast a stage learns, and what it writes: the same for whoever trains on this data."""
    return {
        "max_steps": num_steps,
        "learning_rate": learning_rate,
        "warmup_steps": settings.warmup_share,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0,
        "model_max_length": settings.max_length,
        "save_strategy": "no",
        "logging_steps": max(1, num_steps // 20),
        "report_to": "none",
    }


class StageFailed(RuntimeError):
    """The launcher ended with an error, which its output tells; `exit_code` is 2 for a mistake in the flags."""

    def __init__(self, name: str, exit_code: int):
        super().__init__(f"{name} ended with exit code {exit_code}: its messages are above")
        self.exit_code = exit_code


def run_stage(job: Job, flags: Sequence[str], name: str) -> None:
    """Start the training script on every rank through the deepspeed launcher and wait for its end.

    Raises:
        StageFailed: a rank ended with an error.
    """
    from llava_saep.commands.train import launcher_command, launcher_environment, run_launcher

    command = launcher_command(["--quiet"], flags, job.num_processes)
    environment = launcher_environment(job.num_processes, os.environ)
    if not job.on_gpu:
        # Also where there are more cores: threads of a small model wait for each other longer than they compute.
        environment["OMP_NUM_THREADS"] = "1"
        environment.setdefault("DS_ACCELERATOR", "cpu")
    print(
        f"$ deepspeed --num_gpus {job.num_processes} {shown_command(command[command.index('--quiet') + 1 :])}",
        flush=True,
    )
    exit_code = run_launcher(command, environment)
    if exit_code:
        raise StageFailed(name, exit_code)


def evaluate(job: Job):
    """Answer the held-out questions with the images and without them."""
    from llava_saep.evaluation.evaluate import evaluate_model
    from llava_saep.evaluation.questions import read_questions

    held_out = job.data_dir / "held_out"
    chance = read_json(held_out / "chance.json") or {}
    return evaluate_model(
        job.output_dir / "stage2",
        read_questions(held_out / "questions.jsonl"),
        image_folder=held_out / "images",
        output_dir=job.output_dir / "evaluation",
        batch_size=job.settings.evaluation_batch_size,
        max_new_tokens=job.settings.max_new_tokens,
        chance={category: baseline["constant"] for category, baseline in chance.items()},
        trust_projector_code=True,  # whoever runs the quick start has named the projector
    )


# What is shown


def describe_job(job: Job) -> str:
    """What will happen, in one sentence."""
    device = f"GPU, NCCL, {'bf16' if _gpu_knows_bf16() else 'fp16'}" if job.on_gpu else "CPU, gloo, fp32"
    processes = f"{job.num_processes} process{'es' if job.num_processes > 1 else ''}"
    small = f"\nsmall sizes for this small tower: {job.small_sizes}" if job.small_sizes else ""
    return (
        f"Training a small LLaVA with projector {job.projector!r} on the world {job.world!r}, seed {job.seed}: "
        f"{processes} under DeepSpeed ({device}, {job.deepspeed_config.name}).{small}"
    )


def show_examples(job: Job, evaluation) -> None:
    """Draw the first held-out image and what the model answered about it. Nothing is picked: it is the first one."""
    from PIL import Image

    from llava_saep.evaluation.metrics import ends_with_answer
    from playground.terminal_image import image_to_text, supports_color

    first = evaluation.questions[0].image
    path = job.data_dir / "held_out" / "images" / first
    with Image.open(path) as image:
        print(image_to_text(image, num_columns=48, color=supports_color(sys.stdout)))
    print(f"{shown_path(path)}\n")
    asked = [question for question in evaluation.questions if question.image == first]
    for question in asked[: job.settings.num_examples]:
        answer = evaluation.answers[question.question_id]
        verdict = "right" if ends_with_answer(answer, question.answer) else f"wrong, it is: {question.answer}"
        print(f"question: {question.text}\nanswer:   {answer}   ({verdict})\n")


def show_results(job: Job, evaluation, seconds: Mapping[str, float], total_seconds: float) -> None:
    """Print the table and the times, and keep them beside the model."""
    from llava_saep.commands.evaluate import print_evaluation

    print_evaluation(evaluation)
    print(accuracy_note(job), end="")
    times = ", ".join(f"{name} {format_seconds(value)}" for name, value in seconds.items())
    print(f"\ntime: {format_seconds(total_seconds)} in all, without installation ({times})")
    rounded = {name: round(value, 1) for name, value in {**seconds, "total": total_seconds}.items()}
    write_json(job.output_dir / SETTINGS_FILE, {**job_facts(job), "seconds": rounded})


def accuracy_note(job: Job) -> str:
    """What to think of the table; nothing after a whole run."""
    return (
        "\n--smoke: after so few steps the accuracy means nothing; it only shows that all ran.\n"
        if job.is_smoke
        else ""
    )


def show_next_steps(job: Job) -> None:
    """Print the commands that a newcomer may want next."""
    program = shown_path(Path(sys.executable).parent / "llava-saep")
    image = shown_path(job.data_dir / "held_out" / "images" / "000000.png")
    model = shown_path(job.output_dir / "stage2")
    trust = " --trust_projector_code" if ":" in job.projector else ""
    other = "mlp2x_gelu" if job.projector == "saep" else "saep"
    print(
        f"\nThe model is in {model}, answers and reports in {shown_path(job.output_dir / 'evaluation')}.\n"
        f"\ntalk to it:          {program} chat --model_path {model} --image_file {image}{trust}"
        f"\nin the browser:      {program} demo --model-path {model}{trust}"
        f"\nanother projector:   ./quickstart.sh --mm_projector_type {other}"
        f"\nwhich there are:     {program} projectors"
        "\none of your own:     ./quickstart.sh --mm_projector_type playground/examples/blur_projector.py:BlurProjector"
        f"\na harder world:      ./quickstart.sh --world free"
    )


# Small things


def dataset_facts(job: Job) -> dict[str, Any]:
    """What a data set was made from; a data set with other facts is not reused."""
    return {
        "world": job.world,
        "seed": job.seed,
        "num_train_images": job.settings.num_train_images,
        "num_held_out_images": job.settings.num_held_out_images,
    }


def job_facts(job: Job) -> dict[str, Any]:
    """The job as JSON."""
    return json.loads(json.dumps(asdict(job), default=str))


def describe(facts: Mapping[str, Any]) -> str:
    """`{"world": "cells", "seed": 0}` -> `world cells, seed 0`."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None when there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that people read too."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _file_name(spelling: str) -> str:
    return "".join(character if character.isalnum() or character in "-_" else "-" for character in spelling)


if __name__ == "__main__":
    sys.exit(main())
