"""The original's optimizer groups and its order of samples."""

import pytest
import torch
from transformers import TrainingArguments

from llava_saep.data.sampler import length_grouped_indices, modality_grouped_indices
from llava_saep.model.loading import load_model
from llava_saep.train.config import TrainingConfig
from llava_saep.train.trainable import set_trainable
from llava_saep.train.trainer import LlavaTrainer

from .llava_reference import REFERENCE_FOLDER, original_name, read_json

GROUPS = read_json("multimodal_merge.json")["optimizer_groups"]
SAMPLING = read_json("sampler_and_stopping.json")
RECORDS = read_json("training_records.json")
ALL_TRAINED = frozenset({"projector", "language_model"})


def in_words(groups):
    """Learning rate and weight decay of each parameter by its name, however they are put together."""
    named = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["params"]}
    assert len(named) == sum(len(group["params"]) for group in groups)
    return named


@pytest.mark.parametrize("projector_rate", GROUPS)
def test_optimizer_groups_equal_the_originals(projector_rate, tmp_path):
    """By the Trainer itself, with --mm_projector_lr and without; the rates are the groups' own."""
    expected = GROUPS[projector_rate]
    rate, decay = in_words(expected)["model.embed_tokens.weight"]
    model = load_model(REFERENCE_FOLDER / "checkpoints" / "llava_tiny_v15")
    set_trainable(model, ALL_TRAINED)
    own_rate = None if projector_rate == "None" else float(projector_rate)
    trainer = LlavaTrainer(
        config=TrainingConfig(output_dir=str(tmp_path), trainable=ALL_TRAINED, projector_learning_rate=own_rate),
        conversations=None,
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), learning_rate=rate, weight_decay=decay, use_cpu=True, report_to="none"
        ),
    )
    names = {id(parameter): original_name(name) for name, parameter in model.named_parameters()}
    found = [
        group | {"params": [names[id(parameter)] for parameter in group["params"]]}
        for group in trainer.create_optimizer().param_groups
    ]
    assert in_words(found) == in_words(expected)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("case", SAMPLING["sampler"], ids=lambda case: f"{len(case['lengths'])}")
def test_order_of_samples_equals_the_originals(case):
    sizes = (case["batch_size"], case["world_size"])
    assert modality_grouped_indices(case["lengths"], *sizes, seeded(7)) == case["modality_manual_seed7"]
    lengths = [abs(length) for length in case["lengths"]]
    assert length_grouped_indices(lengths, *sizes, seeded(5)) == case["length_generator_seed5"]


@pytest.mark.skipif(
    len(SAMPLING["dataset_lengths"]["lengths"]) != len(RECORDS), reason="the lengths are those of records left out here"
)
def test_modality_of_each_record_is_the_originals():
    """Lengths differ: the original counts words and 128 for an image, ours are tokens."""
    for record, length in zip(RECORDS, SAMPLING["dataset_lengths"]["modality_lengths"], strict=True):
        assert ("image" in record) == (length > 0)
