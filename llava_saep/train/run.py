"""The driver of a training run: a list of steps, in an order that finds mistakes before anything slow or lasting."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from transformers import TrainingArguments

from llava_saep.data.collator import ConversationCollator
from llava_saep.data.dataset import ConversationDataset
from llava_saep.data.image_check import find_damaged_images
from llava_saep.data.images import ImageProcessor, default_grid_pinpoints, parse_grid_pinpoints, processed_image_size
from llava_saep.data.packing import PackedDataset, plan_rows
from llava_saep.data.records import BadSampleError
from llava_saep.data.sampler import padding_share
from llava_saep.data.templates import conversation_template
from llava_saep.errors import UserError
from llava_saep.model import LlavaSaepConfig, LlavaSaepForConditionalGeneration, LlavaSaepProcessor
from llava_saep.model.combined_towers import split_tower_names
from llava_saep.model.formats import read_base_config
from llava_saep.model.hub import hub_cache
from llava_saep.model.loading import (
    build_model,
    build_processor,
    find_projector_weights,
    load_processor,
    make_config,
)
from llava_saep.model.parts import complete_tokenizer, read_tokenizer
from llava_saep.model.projector_check import check_projector_weights
from llava_saep.model.projector_selection import remember_selection, selection_from_config, trusting_projector_code
from llava_saep.model.quantization import QuantizationConfig, quantize_language_model
from llava_saep.model.reading import read_image_processor
from llava_saep.model.vision_tower import unused_tower_parameters
from llava_saep.model.vocabulary import START_END_TOKENS, add_special_tokens, check_special_tokens, with_room_for
from llava_saep.train import checkpointing, distributed, universal
from llava_saep.train.attention import check_attention, choose_attention, library_attention
from llava_saep.train.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from llava_saep.train.interruption import StopWatch
from llava_saep.train.liger import use_liger_kernels
from llava_saep.train.lora import add_lora
from llava_saep.train.loss_guard import NonFiniteLossError
from llava_saep.train.progress import show_progress_of
from llava_saep.train.reporting import guard_reporters
from llava_saep.train.stage_presets import describe_use, fit_preset
from llava_saep.train.stopping import RunStopped, StopCallback
from llava_saep.train.summary import summarized
from llava_saep.train.trainable import set_trainable, trainable_table
from llava_saep.train.trainer import LlavaTrainer, order_seed
from llava_saep.train.vision_cache import open_feature_cache, report_feature_cache
from projectors import ProjectorError

logger = logging.getLogger(__name__)

STAGING_NAME = ".saving"
"""Folder in output_dir in which the trained model is written before it is moved into place."""

_GATHER_ON_SAVE = "stage3_gather_16bit_weights_on_model_save"

T = TypeVar("T")


class RankError(UserError):
    """A mistake that one rank met alone, such as a damaged image among its own samples."""


def train(config: RunConfig) -> None:
    """Run one training stage and leave the trained model in `output_dir`.

    Raises:
        UserError, ProjectorError: a file, flag or record is wrong; nothing half-written is left.
        RunStopped: a signal ended the run early; it goes on from its newest checkpoint.
    """
    with (
        trusting_projector_code(config.model.trust_projector_code),
        hub_cache(config.model.hub_cache),
        StopWatch() as watch,
    ):
        check_paths(config)
        processor, model_config = plan_model(config)
        arguments = start(config.training)
        check_attention(config.model.attn_implementation, on_accelerator=arguments.device.type != "cpu")
        checkpoint = choose_checkpoint(config.training)
        dataset = build_dataset(config.data, processor, model_config)
        held_out = build_held_out_dataset(config.data, processor, model_config)
        if config.data.precheck_images:
            check_images(dataset, arguments)
        model = load_weights(config.model, model_config, arguments)
        trainer = assemble(model, processor, dataset, config, arguments, held_out=held_out)
        if config.data.cache_vision_features is not None:
            open_feature_cache(trainer, dataset, config.data)
        show_progress_of(trainer)
        guard_reporters(trainer)
        with summarized(trainer, config):
            run_loop(trainer, checkpoint, watch)
            save_result(trainer)
            watch.end()


# Before anything is started


def check_paths(config: RunConfig) -> None:
    """Find what is missing on disk.

    Raises:
        UserError: a file or folder that a flag names is not there.
    """
    _check_data_paths(config.data)
    if config.model.projector_weights is not None:
        find_projector_weights(config.model.projector_weights)
    if config.training.trainer_arguments.get("deepspeed") is not None:
        settings = read_deepspeed_config(config.training.trainer_arguments["deepspeed"])
        if config.model.quantization is not None:
            refuse_partitioning(settings, config.model.quantization)
    output_dir = Path(config.training.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir}: is a file; expected a folder, or a new name")
    _check_inputs_outlive_output(config.model, output_dir)


def _check_data_paths(data: DataConfig) -> None:
    for flag, path in (("data_path", data.data_path), ("eval_data_path", data.eval_data_path)):
        if path is not None and not Path(path).is_file():
            raise UserError(f"--{flag} {path}: no such file; expected a JSON file of LLaVA records")
    for flag, folder in (("image_folder", data.image_folder), ("eval_image_folder", data.eval_image_folder)):
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"--{flag} {folder}: no such folder")


def _check_inputs_outlive_output(model: ModelConfig, output_dir: Path) -> None:
    """Refuse an output folder that holds what the run starts from, since the trained model replaces the weights in it.

    Raises:
        UserError: it is the folder of a pretrained part, or holds the projector's weights.
    """
    inputs = {"model_name_or_path": model.language_model, "vision_tower": model.vision_tower}
    places = {flag: Path(path) for flag, path in inputs.items() if path is not None and Path(path).is_dir()}
    if model.projector_weights is not None:
        places["pretrain_mm_mlp_adapter"] = find_projector_weights(model.projector_weights).parent
    for flag, place in places.items():
        if place.resolve() == output_dir.resolve():
            raise UserError(
                f"--output_dir {output_dir}: holds what --{flag} starts from, and the trained model would replace it; "
                "choose another folder"
            )


def find_deepspeed_config(path: str) -> Path:
    """Find DeepSpeed's JSON file; LLaVA's `./scripts/zero2.json` is taken from deepspeed_configs/ where it is missing.

    Raises:
        UserError: there is no such file.
    """
    found = Path(path)
    if not found.is_file():
        ours = Path(__file__).resolve().parents[2] / "deepspeed_configs" / found.name
        if not ours.is_file():
            raise UserError(f"--deepspeed {path}: no such file; deepspeed_configs/ holds zero1.json, zero2.json, ...")
        _warn_of_deepspeed_config_used(path, ours)
        found = ours
    return found


@functools.cache  # the file is looked for when the flags are checked, and when it is read
def _warn_of_deepspeed_config_used(given: str, found: Path) -> None:
    logger.warning("--deepspeed %s: no such file, using %s", given, found)


def read_deepspeed_config(value: str | Mapping[str, Any]) -> dict[str, Any]:
    """Read what `--deepspeed` gives: a file, or the JSON itself.

    Raises:
        UserError: there is no such file, or it holds no JSON object with settings.
    """
    if isinstance(value, Mapping):
        return dict(value)
    is_json = value.lstrip().startswith("{")
    shown = "--deepspeed" if is_json else f"--deepspeed {value}"
    try:
        config = json.loads(value if is_json else find_deepspeed_config(value).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{shown}: not valid JSON: {error}") from error
    if not isinstance(config, dict) or not config:
        raise UserError(
            f"{shown}: holds {json.dumps(config)[:80]}; expected a JSON object with DeepSpeed's settings, such as "
            "deepspeed_configs/zero2.json, or no --deepspeed to train without it"
        )
    return config


def refuse_partitioning(settings: Mapping[str, Any], quantization: QuantizationConfig) -> None:
    """Stop at ZeRO-3, which would split the language model while it is loaded, before it is quantised.

    Raises:
        UserError: DeepSpeed's config asks for stage 3.
    """
    if settings.get("zero_optimization", {}).get("stage") == 3:
        raise UserError(
            f"--bits {quantization.bits} does not work under ZeRO-3 (--deepspeed), which would split quantised weights "
            "among the ranks; use deepspeed_configs/zero2.json, or --bits 16"
        )


# Start


def start(config: TrainingConfig) -> TrainingArguments:
    """Fit the arguments to this machine, join the other ranks and make transformers' arguments.

    Raises:
        UserError: transformers or DeepSpeed refuses a value, or DeepSpeed's config contradicts a flag.
    """
    on_accelerator = distributed.runs_on_accelerator(config.trainer_arguments)
    wanted = apply_preset(config, on_accelerator=on_accelerator)
    fitted, notes = distributed.fit_to_device(
        wanted,
        on_accelerator=on_accelerator,
        available_reporters=distributed.available_reporters(distributed.reporter_names(wanted.get("report_to"))),
    )
    for note in notes:
        logger.warning(note)
    if fitted.get("deepspeed"):
        fitted["deepspeed"] = complete_deepspeed_config(read_deepspeed_config(fitted["deepspeed"]))
    if fitted.get("activation_checkpointing"):
        fitted.setdefault("activation_checkpointing_kwargs", {"use_reentrant": False})
    distributed.start_process_group(
        uses_deepspeed=bool(fitted.get("deepspeed")),
        on_accelerator=on_accelerator,
        timeout_seconds=fitted.get("ddp_timeout", 1800),
    )
    try:
        arguments = TrainingArguments(output_dir=config.output_dir, **fitted)
    except ValueError as error:
        raise UserError(f"transformers refuses the training arguments: {error}") from error
    if arguments.n_gpu > 1:
        raise UserError(
            f"one process sees {arguments.n_gpu} GPUs; start one per GPU (deepspeed --num_gpus {arguments.n_gpu} ...), "
            "or show it a single one (CUDA_VISIBLE_DEVICES=0)"
        )
    check_deepspeed_agrees(arguments)
    return arguments


def apply_preset(config: TrainingConfig, *, on_accelerator: bool) -> dict[str, Any]:
    """Return the Trainer's arguments; those that `--stage` set are fitted to this machine and shown."""
    if config.preset is None:
        return dict(config.trainer_arguments)
    fitted, notes = fit_preset(
        config.trainer_arguments,
        config.preset,
        on_accelerator=on_accelerator,
        has_bf16=on_accelerator and distributed.accelerator_has_bf16(),
        world_size=distributed.world_size(),
        cores_per_rank=distributed.cores_per_rank(),
    )
    logger.info(describe_use(config.preset, notes))
    return fitted


def complete_deepspeed_config(config: dict[str, Any]) -> dict[str, Any]:
    """Have ZeRO-3 put the weights together when it saves; what it writes otherwise is no model that loads."""
    zero = config.get("zero_optimization", {})
    if zero.get("stage") != 3 or zero.get(_GATHER_ON_SAVE):
        return config
    logger.warning(
        "--deepspeed: zero_optimization.%s is set to true, so that the saved model is whole", _GATHER_ON_SAVE
    )
    return {**config, "zero_optimization": {**zero, _GATHER_ON_SAVE: True}}


def check_deepspeed_agrees(arguments: TrainingArguments) -> None:
    """Refuse a DeepSpeed config that says otherwise than the flags; the Trainer would, but much later.

    Raises:
        UserError: names each setting and flag that differ.
    """
    # transformers makes the config's attribute only where there is a config
    if not arguments.deepspeed or not arguments.hf_deepspeed_config.mismatches:
        return
    differences = "; ".join(line.removeprefix("- ds ") for line in arguments.hf_deepspeed_config.mismatches)
    differences = differences.replace(" vs hf ", " against --")
    raise UserError(f'--deepspeed contradicts the flags: {differences}; write "auto" there to have the flags decide')


def choose_checkpoint(config: TrainingConfig) -> Path | None:
    """Let rank 0 look for a checkpoint, since reading checksums takes time, and tell every rank."""
    return _on_rank_zero(lambda: checkpointing.choose_checkpoint(Path(config.output_dir), config.resume))


def _on_rank_zero(decide: Callable[[], T]) -> T:
    """Return rank 0's answer on every rank, and raise its UserError on every rank."""
    answer, problem = None, None
    if distributed.is_rank_zero():
        try:
            answer = decide()
        except UserError as error:
            problem = str(error)
    answer, problem = distributed.broadcast_object((answer, problem))
    if problem is not None:
        raise UserError(problem)
    return answer


# Model and data


def plan_model(config: RunConfig) -> tuple[LlavaSaepProcessor, LlavaSaepConfig]:
    """Make processor and config from the parts' configs, before any weights are read or ranks wait for each other.

    Raises:
        UserError, ProjectorError: a part cannot be read, the projector cannot work between them, the weights that it
            shall start from are not its own, or the tokenizer is not the language model's.
    """
    processor, model_config = _plan(config)
    check_special_tokens(processor.tokenizer, model_config.text_config.vocab_size)
    processor.apply_exif_orientation = config.data.apply_exif_orientation
    _check_named_layers(config.model, model_config)
    _warn_about_absent_tokens(config.data, model_config)
    side = model_config.vision_config.image_size
    model_config.num_image_tokens(model_config.patch_grid(side, side))  # refuses layers and grids that cannot be
    if config.model.projector_weights is not None:
        check_projector_weights(config.model.projector_weights, model_config)
    return processor, model_config


def _warn_about_absent_tokens(data: DataConfig, model_config: LlavaSaepConfig) -> None:
    """Say that `plain` has no place for <im_start> and <im_end>: LLaVA drops them, and so they learn nothing there."""
    if model_config.mm_use_im_start_end and data.conversation_template in ("plain", "v0_plain"):
        logger.warning(
            "--version %s writes images without <im_start> and <im_end>, as in LLaVA: in this run their embedding "
            "learns nothing; --version v1 would write them",
            data.conversation_template,
        )


def _check_named_layers(model: ModelConfig, model_config: LlavaSaepConfig) -> None:
    """Refuse a layer that the tower lacks, also where the projector does not apply it."""
    depth = model_config.vision_config.num_hidden_layers
    for layer in model.named_layers:
        if not -(depth + 1) <= layer <= depth:
            raise UserError(
                f"--mm_vision_select_layer {layer}: the vision tower has {depth} blocks, so layers run from "
                f"{-(depth + 1)} to {depth}"
            )


def _plan(config: RunConfig) -> tuple[LlavaSaepProcessor, LlavaSaepConfig]:
    model = config.model
    base = read_base_config(model.language_model, "--model_name_or_path", fallback_tower=model.vision_tower)
    if isinstance(base, LlavaSaepConfig):
        return _plan_from_saved(config, base)
    tower = model.tower_for_language_model
    if tower is None:
        raise UserError(
            "--vision_tower is missing: expected a vision tower (folder or hub name), unless --model_name_or_path is "
            "a model that a run saved"
        )
    tokenizer = read_tokenizer(model.language_model)
    added = add_special_tokens(tokenizer, START_END_TOKENS if model.use_im_start_end else ())
    complete_tokenizer(tokenizer)
    model_config = make_config(
        language_model=model.language_model,
        vision_tower=tower,
        projector=model.projector,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        mm_use_im_start_end=bool(model.use_im_start_end),
        added_token_ids=added,
        **_crops(config, read_image_processor(tower)),
    )
    processor = build_processor(
        language_model=model.language_model,
        vision_tower=tower,
        model_config=model_config,
        tokenizer=tokenizer,
        image_aspect_ratio=config.data.image_aspect_ratio,
        conversation_template=config.data.conversation_template,
    )
    return processor, model_config


def _crops(config: RunConfig, image_processor: ImageProcessor, saved: LlavaSaepConfig | None = None) -> dict[str, Any]:
    """Say how images are cut and put together: as the flags do, else the saved model, else as LLaVA-1.6, flat."""
    merge_type = "flat" if saved is None else saved.mm_patch_merge_type
    pinpoints = () if saved is None else parse_grid_pinpoints(saved.image_grid_pinpoints)
    if config.data.image_aspect_ratio == "anyres":
        merge_type = config.model.mm_patch_merge_type or merge_type
        pinpoints = config.model.image_grid_pinpoints or pinpoints
        pinpoints = pinpoints or default_grid_pinpoints(processed_image_size(image_processor))
    return {"mm_patch_merge_type": merge_type, "image_grid_pinpoints": pinpoints}


def _plan_from_saved(config: RunConfig, base: LlavaSaepConfig) -> tuple[LlavaSaepProcessor, LlavaSaepConfig]:
    """Plan a run that goes on from a saved model: its tower, its tokenizer, and its projector unless one is named.

    Raises:
        UserError: a flag asks for another tower, or for other layers of it than the kept projector reads.
    """
    planned = copy.deepcopy(base)
    _check_saved_tower(config.model, base)
    if config.model.keeps_saved_projector:
        _check_saved_projector(config.model, base)
    else:
        remember_selection(config.model.projector)
        planned.projector = config.model.projector.to_dict()
    saved = load_processor(config.model.language_model, fallback_tower=config.model.vision_tower)
    crops = _crops(config, saved.image_processor, base)
    planned.mm_patch_merge_type = crops["mm_patch_merge_type"]
    planned.image_grid_pinpoints = [list(pair) for pair in crops["image_grid_pinpoints"]] or None
    if config.model.use_im_start_end is not None:
        planned.mm_use_im_start_end = config.model.use_im_start_end
    added = add_special_tokens(saved.tokenizer, START_END_TOKENS if planned.mm_use_im_start_end else ())
    planned.added_token_ids = list(added) or None
    planned.text_config = with_room_for(planned.text_config, added)
    processor = LlavaSaepProcessor.from_model_config(
        planned,
        image_processor=saved.image_processor,
        tokenizer=saved.tokenizer,
        image_aspect_ratio=config.data.image_aspect_ratio,
        conversation_template=config.data.conversation_template,
    )
    processor.tokenizer.padding_side = "right"
    return processor, planned


def _check_saved_tower(model: ModelConfig, base: LlavaSaepConfig) -> None:
    """Refuse a tower that is not the saved model's own, which would otherwise be silently used in its place."""
    own = base.vision_tower_name_or_path
    accepted = {_as_lasting_path(path) for path in (own, model.language_model) if path is not None}
    if model.vision_tower is not None and _as_lasting_path(model.vision_tower) not in accepted:
        raise UserError(
            f"--vision_tower {model.vision_tower}: the model in {model.language_model} brings its own tower (from "
            f"{own}); drop --vision_tower, or start from a language model"
        )


def _check_saved_projector(model: ModelConfig, base: LlavaSaepConfig) -> None:
    """Refuse options from flags on the tower's layers that the saved projector, which is kept, does not have.

    LLaVA's scripts always name a single layer; a projector that combines several ignores it, as a fresh one does.
    """
    num_states = base.vision_config.num_hidden_layers + 1  # the embeddings' state comes first
    asked, kept = model.projector.options, base.projector_config
    layers = [layer % num_states for layer in asked.get("vision_layers", kept.vision_layers)]
    kept_layers = [layer % num_states for layer in kept.vision_layers]
    name = base.projector["name"]
    advice = f"name it to start a fresh one (--mm_projector_type {name}), or drop the flag"
    if len(layers) == 1 < len(kept_layers):
        logger.warning("--mm_vision_select_layer is not applied: the saved %s combines several layers", name)
    elif layers != kept_layers:
        raise UserError(
            f"--mm_vision_select_layer: the saved {name} projector reads layer(s) {list(kept.vision_layers)} and not "
            f"{list(asked['vision_layers'])}; {advice}"
        )
    if asked.get("keep_cls_token", False) and not kept.keep_cls_token:
        raise UserError(f"--mm_vision_select_feature cls_patch: the saved {name} projector reads none; {advice}")


def build_dataset(
    config: DataConfig, processor: LlavaSaepProcessor, model_config: LlavaSaepConfig
) -> ConversationDataset:
    """Read and check the records.

    Raises:
        UserError: the file is no list of records, or a record cannot be used and on_bad_sample is "error".
    """
    return ConversationDataset(
        config.data_path,
        config.image_folder,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
        image_aspect_ratio=config.image_aspect_ratio,
        template=conversation_template(config.conversation_template, processor.tokenizer),
        num_image_tokens=model_config.num_image_tokens,
        patch_size=model_config.vision_config.patch_size,
        image_token_id=model_config.image_token_id,
        max_length=config.max_length,
        image_grid_pinpoints=parse_grid_pinpoints(model_config.image_grid_pinpoints),
        num_anyres_tokens=model_config.image_tokens.num_tokens,
        apply_exif_orientation=config.apply_exif_orientation,
        jpeg_draft=config.jpeg_draft,
        on_bad_sample=config.on_bad_sample,
        use_im_start_end=model_config.mm_use_im_start_end,
        vocab_size=model_config.text_config.vocab_size,
        on_bad_image=config.on_bad_image,
        on_too_long=config.on_too_long,
    )


def build_held_out_dataset(
    config: DataConfig, processor: LlavaSaepProcessor, model_config: LlavaSaepConfig
) -> ConversationDataset | None:
    """Read and check the held-out records, as those that are trained on; None without `--eval_data_path`."""
    if config.eval_data_path is None:
        return None
    held_out = dataclasses.replace(config, data_path=config.eval_data_path, image_folder=config.eval_image_folder)
    return build_dataset(held_out, processor, model_config)


def check_images(dataset: ConversationDataset, arguments: TrainingArguments) -> None:
    """Decode every image, each rank its share, and leave out or refuse samples whose image is damaged.

    Raises:
        UserError: one is, and on_bad_sample is "error".
    """
    own = range(distributed.rank(), len(dataset), distributed.world_size())
    found = find_damaged_images(dataset, own, num_workers=arguments.dataloader_num_workers)
    everywhere = [(index, str(error), error.source, error.cause) for index, error in found.items()]
    findings = [finding for share in distributed.gather_objects(everywhere) for finding in share]
    if findings:
        dataset.leave_out({index: BadSampleError(*error) for index, *error in findings})
    logger.info("all images were decoded: %d samples can be used", len(dataset))


def weights_dtype(arguments: TrainingArguments) -> torch.dtype:
    """Return the dtype of the weights: DeepSpeed keeps float32 copies itself, autocast needs them in the model."""
    return compute_dtype(arguments) if arguments.deepspeed else torch.float32


def compute_dtype(arguments: TrainingArguments) -> torch.dtype:
    """Return the dtype in which linear layers multiply."""
    if arguments.bf16:
        return torch.bfloat16
    return torch.float16 if arguments.fp16 else torch.float32


def load_weights(model: ModelConfig, model_config: LlavaSaepConfig, arguments: TrainingArguments) -> nn.Module:
    """Read the pretrained parts; the projector starts anew, or from `--pretrain_mm_mlp_adapter`.

    Raises:
        UserError, ProjectorError: weights are missing, unreadable or misshapen.
    """
    dtype = weights_dtype(arguments)
    transformers.set_seed(arguments.seed)  # decides how a fresh projector starts
    built = build_model(
        language_model=model.language_model,
        vision_tower=model.tower_for_language_model,
        projector=selection_from_config(model_config.projector),
        image_token_id=model_config.image_token_id,
        projector_weights=model.projector_weights,
        mm_patch_merge_type=model_config.mm_patch_merge_type,
        image_grid_pinpoints=model_config.image_grid_pinpoints,
        mm_use_im_start_end=model_config.mm_use_im_start_end,
        added_token_ids=model_config.added_token_ids or (),
        dtype=dtype,
        attn_implementation=library_attention(model.attn_implementation),
    )
    # One dtype for all: ZeRO-3 fails on a float32 projector in a bf16 model.
    built.model.multi_modal_projector.to(dtype)
    if model.quantization is not None:
        quantize_language_model(
            built, model.quantization, compute_dtype=compute_dtype(arguments), device=arguments.device
        )
    # Where an output that holds only what changed finds the rest, wherever it is read from.
    built.config.language_model_name_or_path = _as_lasting_path(model.language_model)
    if built.config.vision_tower_name_or_path is not None:
        built.config.vision_tower_name_or_path = _as_lasting_path(built.config.vision_tower_name_or_path)
    return built


def _as_lasting_path(name_or_path: str) -> str:
    """Make the paths of folders absolute; of towers side by side, each."""
    names = split_tower_names(name_or_path)
    return ",".join(str(Path(name).resolve()) if Path(name).is_dir() else name for name in names)


def choose_trainable(model: nn.Module, config: TrainingConfig, arguments: TrainingArguments) -> nn.Module:
    """Add adapters if asked for, let the chosen parts learn, and show them as a table.

    Returns:
        the model, or peft's wrapper around it.
    """
    base = model
    if config.lora is not None:
        # How many random numbers loading has drawn depends on ZeRO's stage; the adapters' start shall not.
        transformers.set_seed(arguments.seed)
        model = add_lora(model, config.lora)
    set_trainable(model, config.trainable)
    if "vision_tower" in config.trainable:
        for parameter in unused_tower_parameters(
            base.model.vision_tower, base.model.multi_modal_projector.config.vision_layers
        ):
            parameter.requires_grad_(False)
    if arguments.activation_checkpointing and "language_model" not in config.trainable:
        # A checkpointed block whose inputs want no gradient would give none to what learns inside it.
        model.enable_input_require_grads()
    if config.trainable == {"projector", "token_embedding"} and base.config.tie_word_embeddings:
        logger.warning(
            "this language model's head is its token embedding (tie_word_embeddings), so the head learns with it"
        )
    logger.info("what is trained:\n%s", trainable_table(model))
    return model


# The loop


def assemble(
    model: LlavaSaepForConditionalGeneration,
    processor: LlavaSaepProcessor,
    dataset: ConversationDataset,
    config: RunConfig,
    arguments: TrainingArguments,
    *,
    held_out: ConversationDataset | None = None,
) -> LlavaTrainer:
    """Make the Trainer of a run: attention, what learns, rows of conversations, batches.

    Raises:
        UserError: the language model cannot attend as asked for, or Liger has no kernels for it.
    """
    padding_free = choose_attention(
        model.model.language_model, config.model.attn_implementation, packing=config.data.packing
    )
    if config.training.liger_kernels:
        use_liger_kernels(model.model.language_model)
    model = choose_trainable(model, config.training, arguments)
    rows = pack(dataset, arguments, padding_free=padding_free) if config.data.packing else dataset
    return make_trainer(
        model,
        processor,
        rows,
        config,
        arguments,
        conversations=dataset,
        held_out=held_out,
        padding_free=padding_free,
    )


def pack(dataset: ConversationDataset, arguments: TrainingArguments, *, padding_free: bool) -> PackedDataset:
    """Plan the rows of `--packing`, the same on every rank, and say what is planned."""
    plan = plan_rows(dataset.lengths, capacity=dataset.max_length, seed=order_seed(arguments))
    batch_size = arguments.per_device_train_batch_size
    in_random_order = torch.randperm(len(plan.rows), generator=torch.Generator().manual_seed(arguments.seed)).tolist()
    waste = 0.0 if padding_free else padding_share([plan.row_lengths[row] for row in in_random_order], batch_size)
    logger.info("packing: %s; %.1f%% of all positions will be padding", plan, 100 * waste)
    per_batch = batch_size * len(plan.lengths) / len(plan.rows)
    logger.info("--per_device_train_batch_size %d counts rows: about %.1f conversations", batch_size, per_batch)
    return PackedDataset(dataset, plan)


def make_trainer(
    model: nn.Module,
    processor: LlavaSaepProcessor,
    dataset: ConversationDataset | PackedDataset,
    config: RunConfig,
    arguments: TrainingArguments,
    *,
    conversations: ConversationDataset,
    held_out: ConversationDataset | None,
    padding_free: bool,
) -> LlavaTrainer:
    """Join model, data and arguments.

    Args:
        dataset: the rows that are trained on, made of `conversations`.
    """
    collator = ConversationCollator(
        pad_token_id=processor.tokenizer.pad_token_id,
        image_size=dataset.image_size,
        max_length=config.data.max_length,
        cuts_images=config.data.image_aspect_ratio == "anyres",
        padding_free=padding_free,
        caches_features=config.data.cache_vision_features is not None,
    )
    for target in (model.config.get_text_config(), model.generation_config):
        target.pad_token_id = processor.tokenizer.pad_token_id  # the Trainer would, with a warning
    return LlavaTrainer(
        config=config.training,
        conversations=conversations,
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=dataset,
        eval_dataset=held_out,
        processing_class=processor,
    )


def run_loop(trainer: LlavaTrainer, checkpoint: Path | None, watch: StopWatch) -> None:
    """Train to the end, from a checkpoint if there is one.

    Raises:
        RankError: this rank met a record that cannot be used, or could not write.
        NonFiniteLossError: a loss was no number.
        UserError: the checkpoint belongs to another run.
        RunStopped: the run was told to stop.
    """
    if checkpoint is not None:
        prepare_resuming(trainer, checkpoint)
    if trainer.args.should_save:
        checkpointing.set_aside(Path(trainer.args.output_dir), resumed=checkpoint)
    stop = StopCallback(watch, trainer.args.device)
    trainer.add_callback(stop)
    watch.accept_signals()
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except NonFiniteLossError:
        raise  # every rank does, so that it is said once
    except (UserError, ProjectorError) as error:
        raise RankError(f"rank {distributed.rank()}: {error}") from error
    if stop.has_stopped:
        raise RunStopped
    trainer.compare_notes()
    skipped = trainer.conversations.skipped
    if skipped:
        logger.warning("skipped records, by reason: %s", dict(skipped))
    report_feature_cache(trainer)


def prepare_resuming(trainer: LlavaTrainer, checkpoint: Path) -> None:
    """Check that the checkpoint is this run's, and put its shards together where the number of ranks has changed.

    Raises:
        UserError: it belongs to another run, or there is no room to convert it.
    """
    found, current = checkpointing.read_facts(checkpoint), trainer.checkpoint_facts()
    checkpointing.check_same_run(checkpoint, found, current)
    if found.world_size == current.world_size:
        return
    logger.warning(
        "%s was saved by %d rank(s), this run has %d: steps hold the same samples, but random numbers (dropout) differ",
        checkpoint,
        found.world_size,
        current.world_size,
    )
    if current.zero_stage:  # without ZeRO, and at its stage 0, the optimizer's state is whole
        output_dir = Path(trainer.args.output_dir)
        trainer.converted_checkpoint = _on_rank_zero(lambda: universal.convert(checkpoint, output_dir))


def save_result(trainer: LlavaTrainer) -> None:
    """Write the trained model, its processor and the log of losses (trainer_state.json) into output_dir.

    Raises:
        SavingError: the disk is full.
    """
    output_dir = Path(trainer.args.output_dir)
    staging = output_dir / STAGING_NAME
    if trainer.args.should_save:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    distributed.barrier()
    with checkpointing.removing_what_fails(staging):
        trainer.save_model(str(staging))
        distributed.barrier()
        if trainer.args.should_save:
            trainer.state.save_to_json(str(staging / "trainer_state.json"))
            checkpointing.publish(staging, output_dir)
            logger.info("the trained model is in %s", output_dir)
    distributed.barrier()
