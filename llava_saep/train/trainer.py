"""The smallest subclass of transformers' Trainer that trains this project's models.

It changes eight things: the order of samples, what is counted, the optimizer's groups, what becomes of a loss that is
no number, how held-out records are measured, what is written, when a checkpoint counts as complete, and how one is
loaded. The loop, the loss over the tokens of a whole optimizer step, logging and schedules are the library's.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import EvalLoopOutput

from llava_saep.data.collator import SAMPLE_INDICES
from llava_saep.data.dataset import ConversationDataset
from llava_saep.data.sampler import LengthGroupedSampler, padding_share
from llava_saep.errors import UserError
from llava_saep.file_modes import share_like_folder
from llava_saep.model.cached_features import CachedVisionFeatures
from llava_saep.model.loading import load_projector_weights, read_weights_file
from llava_saep.train import checkpointing, distributed, saving, universal
from llava_saep.train.config import TrainingConfig
from llava_saep.train.distributed import barrier
from llava_saep.train.held_out import HeldOutShard, add_up, blank_sample, held_out_loader, measure
from llava_saep.train.interruption import shielded
from llava_saep.train.loss_guard import LossGuard, MicroBatchLeftOut
from llava_saep.train.optimizer import parameter_groups
from llava_saep.train.throughput import Throughput

logger = logging.getLogger(__name__)


def order_seed(arguments: TrainingArguments) -> int:
    """Return the seed that decides the order of samples: `--data_seed`, else `--seed`."""
    return arguments.seed if arguments.data_seed is None else arguments.data_seed


class LlavaTrainer(Trainer):
    """transformers' Trainer for a `TrainingConfig`.

    Args:
        config: what learns and how; its save_total_limit is applied here, after a checkpoint is known to be complete.
        conversations: the samples that train_dataset is made of; None where there is none.
        kwargs: as for Trainer. `args.save_total_limit` must be None.
    """

    def __init__(self, *, config: TrainingConfig, conversations: ConversationDataset | None, **kwargs) -> None:
        assert kwargs["args"].save_total_limit is None
        super().__init__(**kwargs)
        self.config = config
        self.throughput = Throughput(self.base_model.config.image_token_id)
        self.conversations = conversations
        describe_sample = str if conversations is None else conversations.describe_sample
        self.loss_guard = LossGuard(config.on_nan_loss, describe_sample, self.args.device)
        self._sample_indices: Tensor | None = None
        self._num_noted = 0
        self._num_steps, self._num_steps_left_out = 0, 0  # since the last log entry
        self.output_kind = saving.output_kind(config.trainable)
        self.converted_checkpoint: Path | None = None
        """Where the shards of the checkpoint to go on from lie for another number of ranks; deleted after loading."""
        self.cached_features: CachedVisionFeatures | None = None
        self._set_use_cache(self.args.use_cache)  # the library sets it on the outer config alone

    @property
    def base_model(self) -> PreTrainedModel:
        """The multimodal model itself, without LoRA's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    # Order of samples and optimizer

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        loader.worker_init_fn = shielded(loader.worker_init_fn)
        return loader

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        by_length = self.args.train_sampling_strategy == "group_by_length"
        if not (self.config.group_by_modality_length or by_length):
            return super()._get_train_sampler(train_dataset)
        # transformers would measure lengths by opening every image, and by the processor's first input name.
        dataset = self.train_dataset if train_dataset is None else train_dataset
        sampler = LengthGroupedSampler(
            dataset.modality_lengths,
            batch_size=self.args.train_batch_size,
            world_size=self.args.world_size * self.args.gradient_accumulation_steps,
            seed=order_seed(self.args),
            group_by_modality=self.config.group_by_modality_length,
        )
        if not self.data_collator.padding_free:
            lengths = [dataset.lengths[index] for index in sampler]
            waste = padding_share(lengths, self.args.train_batch_size)
            logger.info("grouped by length, %.1f%% of all positions will be padding", 100 * waste)
        return sampler

    # What is counted

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Fetch the batches of an optimizer step, as the library does, and count their tokens."""
        self.throughput.start()
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.throughput.add(batches)
        self._num_steps += bool(batches)
        return batches, num_items_in_batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and beside each loss of training what was learnt from since the last one and what became of samples."""
        if "loss" in logs:
            logs |= self.throughput.report(lambda counts: self.accelerator.reduce(counts, reduction="sum"))
            logs |= self._report_samples()
            self._correct_mean(logs)
        super().log(logs, start_time)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """See `Trainer.evaluate`; its time does not count as training's."""
        with self.throughput.paused():
            return super().evaluate(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer that `--optim` names, over this project's parameter groups."""
        if self.optimizer is None and self.config.projector_learning_rate is not None:
            model = self.model if model is None else model
            groups = parameter_groups(
                model,
                decayed_names=set(self.get_decay_parameter_names(model)),
                weight_decay=self.args.weight_decay,
                projector_learning_rate=self.config.projector_learning_rate,
            )
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            if {"params", "model", "optimizer_dict"} & kwargs.keys():
                raise UserError(f"--optim {self.args.optim.value} makes its own groups and takes no --mm_projector_lr")
            self.optimizer = optimizer_class(groups, **kwargs)
        return super().create_optimizer(model)

    # Images

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared = super()._prepare_inputs(inputs)
        if "image_lookups" not in prepared:
            return prepared
        with self.accelerator.autocast():  # as the model's forward
            return self.cached_features.complete(prepared)

    # Losses that are no numbers

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Learn from a micro-batch, or from nothing where `--on_nan_loss skip` leaves it out."""
        self._sample_indices = inputs.pop(SAMPLE_INDICES)
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        except MicroBatchLeftOut:
            if self.current_gradient_accumulation_steps > 1:
                # The step's other micro-batches count, and ZeRO and DDP join gradients in the last one's backward pass.
                super().training_step(model, self._blank_batch(), num_items_in_batch)
            else:
                self._num_steps_left_out += 1
            return torch.zeros((), device=self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outcome = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = outcome[0] if return_outputs else outcome
        if not self.args.fp16:  # there a loss scale that is too high shows so, and its step is left out anyway
            self.loss_guard.check_loss(loss.detach(), self._sample_indices, self.state.global_step + 1)
        return outcome

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.args.fp16:
            self.loss_guard.check_gradient(norm, self.state.global_step + 1)
        return norm

    def _blank_batch(self) -> dict[str, Tensor]:
        return self.data_collator([blank_sample(self.processing_class.tokenizer.pad_token_id)])

    # Held-out records

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """Batches of this rank's share of the held-out records, each record on one rank alone."""
        shard = HeldOutShard(
            self.eval_dataset if eval_dataset is None else eval_dataset,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            blank=blank_sample(self.processing_class.tokenizer.pad_token_id),
        )
        loader = held_out_loader(
            shard,
            batch_size=self.args.per_device_eval_batch_size,
            collator=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )
        loader.worker_init_fn = shielded(None)
        return loader

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Loss and share of right tokens over all ranks' records; predictions are not kept."""
        self.callback_handler.eval_dataloader = dataloader

        def on_batch() -> None:
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        sums = add_up(measure(self.model, dataloader, self._prepare_inputs, on_batch), self.args.device)
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics=sums.metrics(metric_key_prefix),
            num_samples=len(self.eval_dataset),
        )

    # What became of the samples

    def _correct_mean(self, logs: dict[str, float]) -> None:
        """Take the steps that were left out, which the library counts with a loss of 0, out of the logged mean."""
        num_steps, num_left_out = self._num_steps, self._num_steps_left_out
        self._num_steps, self._num_steps_left_out = 0, 0
        if num_left_out >= num_steps:
            del logs["loss"]
        elif num_left_out > 0:
            logs["loss"] *= num_steps / (num_steps - num_left_out)

    def _report_samples(self) -> dict[str, float]:
        """Compare notes with the other ranks and return how many samples were replaced or cut, and steps left out."""
        self.compare_notes()
        ledger = self.conversations.ledger
        counts = {
            "samples_replaced": sum(map(len, ledger.bad_indices().values())),
            "samples_cut": len(ledger.cut_indices()),
            "micro_batches_left_out": self.loss_guard.num_skipped,
        }
        return {name: count for name, count in counts.items() if count}

    def compare_notes(self) -> None:
        """Have every rank know which samples were replaced or cut anywhere; every rank must call it."""
        ledgers = [data.ledger for data in (self.conversations, self.eval_dataset) if data is not None]
        num_noted = sum(ledger.num_noted for ledger in ledgers)
        if not distributed.is_true_anywhere(num_noted != self._num_noted, self.args.device):
            return
        for ledger in ledgers:
            ledger.take_over(distributed.take_largest(ledger.flags, self.args.device))
        self._num_noted = sum(ledger.num_noted for ledger in ledgers)

    # What is written

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained parts, config and processor; every rank must call it (ZeRO-3 gathers from all)."""
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        self._set_use_cache(True)  # a saved model is for generation
        try:
            if self.output_kind == "full":
                super().save_model(str(folder), _internal_call=True)
                return
            added = self.base_model.config.added_token_ids or ()
            weights = saving.gather_changed_parameters(self.model, self.output_kind, added, keep=self.args.should_save)
            if self.args.should_save:
                write = saving.write_projector if self.output_kind == "projector" else saving.write_lora
                write(folder, weights, self.model)
                self.processing_class.save_pretrained(folder)
        finally:
            self._set_use_cache(self.args.use_cache)

    def _set_use_cache(self, use_cache: bool) -> None:
        """Choose whether the language model keeps keys and values, which training has no use for."""
        config = self.base_model.config
        config.use_cache = use_cache
        config.get_text_config().use_cache = use_cache

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # What is frozen comes from where the run got it; the manifest holds resuming runs to the same parameters.
        self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    # Checkpoints

    def checkpoint_facts(self) -> checkpointing.CheckpointFacts:
        """What this run and a checkpoint of it have in common."""
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        return checkpointing.CheckpointFacts(
            global_step=self.state.global_step,
            world_size=self.args.world_size,
            zero_stage=None if plugin is None else plugin.zero_stage,
            trainable={
                name: tuple(getattr(parameter, "ds_shape", parameter.shape))
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad
            },
            samples_per_step=self.get_total_train_batch_size(self.args),
            num_rows=len(self.train_dataset),
            is_resumable=not self.args.save_only_model,
            quantization=None if self.base_model.quantization is None else str(self.base_model.quantization),
        )

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        with self.throughput.paused():
            self._save_complete_checkpoint(model, trial)

    def _save_complete_checkpoint(self, model: nn.Module, trial) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)  # torn: a complete one would have been resumed from
        barrier()
        with checkpointing.removing_what_fails(folder):
            super()._save_checkpoint(model, trial)
            barrier()  # every rank's shard and random state are on disk
            described = checkpointing.describe_files(folder, rank=distributed.rank(), world_size=self.args.world_size)
            parts = distributed.gather_on_rank_zero(described)
            if self.args.should_save:
                share_like_folder(folder)
                files = {name: entry for part in parts for name, entry in part.items()}
                checkpointing.write_manifest(folder, self.checkpoint_facts(), files)
        if self.args.should_save:
            checkpointing.remove_old_checkpoints(Path(self.args.output_dir), keep=self.config.save_total_limit)
        barrier()

    def _run_epoch(self, **kwargs) -> None:
        if self.state.global_step >= self.state.max_steps:
            # The run ended between its last checkpoint and its result. The library would train one more step.
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if resume_from_checkpoint is None or not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.converted_checkpoint is not None:
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}
        # The library loads strictly, which needs the frozen weights that our checkpoints leave out.
        model, train_dataloader = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_deepspeed_checkpoint(model, str(resume_from_checkpoint))
        return model, train_dataloader

    def _load_deepspeed_checkpoint(self, engine: nn.Module, checkpoint: str) -> None:
        if self.converted_checkpoint is None:
            loaded, _ = engine.load_checkpoint(checkpoint, load_module_strict=False)
        else:
            with universal.keeping_optimizer_apart(engine.optimizer.optimizer):
                loaded, _ = engine.load_checkpoint(str(self.converted_checkpoint), load_module_strict=False)
        if loaded is None:
            raise UserError(f"{checkpoint}: DeepSpeed finds no state in it; choose another checkpoint")
        self._load_optimizer_and_scheduler(checkpoint)
        if self.converted_checkpoint is not None:
            universal.set_learning_rates(engine.optimizer.optimizer, self.lr_scheduler.get_last_lr())
            barrier()
            if self.args.should_save:
                shutil.rmtree(self.converted_checkpoint, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load weights without DeepSpeed."""
        if self.output_kind != "projector":
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.output_kind != "full":
            load_projector_weights(self.base_model, resume_from_checkpoint)
            beside = Path(resume_from_checkpoint) / saving.NON_LORA_WEIGHTS_NAME
            if beside.is_file():
                self.base_model.load_state_dict(read_weights_file(beside), strict=False)
