"""A run that is small enough to be killed many times: random models, a handful of images, and flags to train them."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

IMAGE_SIZE = 28
PATCH_SIZE = 7
NUM_RECORDS = 16
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("square", "circle", "triangle", "cross")
NUM_STEPS_PER_SAVE = 2


@dataclass(frozen=True, kw_only=True)
class FaultyRun:
    """What is trained, and how.

    Args:
        num_processes: ranks, on one machine.
        zero_stage: DeepSpeed's stage; 0: without DeepSpeed.
        num_steps: of the optimizer. A checkpoint is saved after every second one.
        seed: of models, data and training.
    """

    num_processes: int = 2
    zero_stage: int = 2
    num_steps: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_processes < 2:
            raise ValueError(f"num_processes must be at least 2, got {self.num_processes}: one rank is killed")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage must be 0, 1, 2 or 3, got {self.zero_stage}")
        if self.num_steps < 4 * NUM_STEPS_PER_SAVE:
            raise ValueError(f"num_steps must be at least {4 * NUM_STEPS_PER_SAVE}, got {self.num_steps}")


def write_models(folder: Path, seed: int) -> None:
    """A random CLIP tower and a random Llama with a byte-level tokenizer, with dropout in its attention."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tower = CLIPVisionConfig(image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, **sizes)
    CLIPVisionModel(tower).save_pretrained(folder / "vision_tower")
    crop = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    preprocessor = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=crop)
    preprocessor.save_pretrained(folder / "vision_tower")
    tokenizer = _make_tokenizer()
    language_model = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        attention_dropout=0.1,  # random numbers take part in every step, so that losing their state shows
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    LlamaForCausalLM(language_model).save_pretrained(folder / "language_model")
    tokenizer.save_pretrained(folder / "language_model")


def _make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([_caption(random.Random(seed)) for seed in range(50)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def _caption(rng: random.Random) -> str:
    return f"a {rng.choice(COLOURS)} {rng.choice(SHAPES)} left of a {rng.choice(COLOURS)} {rng.choice(SHAPES)}"


def write_data(folder: Path, seed: int) -> None:
    """Captions of random images, as LLaVA's first stage learns them."""
    rng, pixels = random.Random(seed), np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    records = []
    for index in range(NUM_RECORDS):
        name = f"{index}.png"
        image = pixels.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / "images" / name)
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": _caption(rng)}]
        records.append({"id": str(index), "image": name, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))


def write_inputs(folder: Path, seed: int) -> None:
    """Everything that a run reads."""
    write_models(folder, seed)
    write_data(folder, seed)


def training_flags(run: FaultyRun, inputs: Path, output_dir: Path) -> list[str]:
    """Flags of `llava-saep train`: the whole model but the tower, shuffled, with a worker that loads the data."""
    values = {
        "num_processes": run.num_processes,
        "model_name_or_path": inputs / "language_model",
        "vision_tower": inputs / "vision_tower",
        "mm_projector_type": "mlp2x_gelu",
        "data_path": inputs / "data.json",
        "image_folder": inputs / "images",
        "version": "plain",
        "output_dir": output_dir,
        "per_device_train_batch_size": 2,
        "dataloader_num_workers": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "max_steps": run.num_steps,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": NUM_STEPS_PER_SAVE,
        "save_total_limit": 2,
        "seed": run.seed,
        "use_cpu": True,
    }
    if run.zero_stage:
        values["deepspeed"] = json.dumps(_deepspeed_config(run.zero_stage))
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def _deepspeed_config(stage: int) -> dict:
    """ZeRO that splits every parameter, however small."""
    auto = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    zero = {"stage": stage, "overlap_comm": False}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    return dict.fromkeys(auto, "auto") | {"zero_optimization": zero, "zero_allow_untested_optimizer": True}
