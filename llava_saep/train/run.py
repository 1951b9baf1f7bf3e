"""The driver of a training run: a list of steps, in an order that finds mistakes before anything slow or lasting."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from transformers import TrainingArguments

from llava_saep.data.collator import ConversationCollator
from llava_saep.data.dataset import ConversationDataset
from llava_saep.data.image_check import find_damaged_images
from llava_saep.data.images import parse_grid_pinpoints
from llava_saep.data.packing import PackedDataset, plan_rows
from llava_saep.data.records import BadSampleError
from llava_saep.data.sampler import padding_share
from llava_saep.data.templates import conversation_template
from llava_saep.errors import UserError
from llava_saep.model import LlavaSaepConfig, LlavaSaepForConditionalGeneration, LlavaSaepProcessor
from llava_saep.model.hub import hub_cache
from llava_saep.model.loading import (
    build_model,
    find_projector_weights,
)
from llava_saep.model.projector_selection import selection_from_config, trusting_projector_code
from llava_saep.model.quantization import quantize_language_model
from llava_saep.model.vision_tower import unused_tower_parameters
from llava_saep.train import checkpointing, distributed, universal
from llava_saep.train.attention import check_attention, choose_attention, library_attention
from llava_saep.train.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from llava_saep.train.deepspeed_config import (
    check_deepspeed_agrees,
    complete_deepspeed_config,
    read_deepspeed_config,
    refuse_partitioning,
)
from llava_saep.train.interruption import StopWatch
from llava_saep.train.liger import use_liger_kernels
from llava_saep.train.lora import add_lora
from llava_saep.train.loss_guard import NonFiniteLossError
from llava_saep.train.planning import as_lasting_path, plan_model
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
    _check_output_dir(output_dir)
    _check_inputs_outlive_output(config.model, output_dir)


def _check_data_paths(data: DataConfig) -> None:
    for flag, path in (("data_path", data.data_path), ("eval_data_path", data.eval_data_path)):
        if path is not None and not Path(path).is_file():
            raise UserError(f"--{flag} {path}: no such file; expected a JSON file of LLaVA records")
    for flag, folder in (("image_folder", data.image_folder), ("eval_image_folder", data.eval_image_folder)):
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"--{flag} {folder}: no such folder")


def _check_output_dir(output_dir: Path) -> None:
    """Refuse a place in which no folder can be made or written to, before hours are spent on what goes there."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir}: is a file; expected a folder, or a new name")
    place = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not place.is_dir():
        raise UserError(f"--output_dir {output_dir}: {place} is a file, so that no folder can be made in it")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {output_dir}: nothing can be written in {place}; choose another place")


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
        logger.info("the language model's linear layers are kept in %s", model.quantization)
    built.config.image_aspect_ratio = model_config.image_aspect_ratio
    # Where an output that holds only what changed finds the rest, wherever it is read from.
    built.config.language_model_name_or_path = as_lasting_path(model.language_model)
    if built.config.vision_tower_name_or_path is not None:
        built.config.vision_tower_name_or_path = as_lasting_path(built.config.vision_tower_name_or_path)
    return built


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
