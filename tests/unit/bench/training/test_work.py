"""The operations that a step needs: by hand, and as torch's counter sees them in transformers' own models."""

from dataclasses import replace

import peft
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel

from llava_saep.bench.flops import FlopCount
from llava_saep.bench.training.conversations import Conversation
from llava_saep.bench.training.shapes import PRESETS
from llava_saep.bench.training.work import (
    PEAK_FLOPS,
    language_model_parameters,
    peak_flops,
    step_work,
    tower_forward_flops,
    utilisation,
)

SHAPE = replace(PRESETS["tiny"], text_hidden_size=8, text_intermediate_size=12, num_text_heads=2, num_key_value_heads=1)
NOTHING = FlopCount(0, 0)
LENGTH = 10
RANK = 3


def language_model_work(train):
    """Of one conversation with 4 image tokens and LENGTH - 4 of text."""
    conversation = Conversation(num_text_tokens=LENGTH - 4, num_supervised=2)
    return step_work(
        SHAPE,
        [conversation],
        num_image_tokens=4,
        deepest_layer=2,
        projector=NOTHING,
        train=train,
        lora_rank=RANK if train == "lora" else 0,
    )


def counted_language_model_flops(train):
    """What torch counts in transformers' Llama."""
    config = LlamaConfig(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.text_hidden_size,
        intermediate_size=SHAPE.text_intermediate_size,
        num_hidden_layers=SHAPE.num_text_layers,
        num_attention_heads=SHAPE.num_text_heads,
        num_key_value_heads=SHAPE.num_key_value_heads,
        attn_implementation="eager",
        use_cache=False,
    )
    model = LlamaModel(config)
    if train == "lora":
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules=names))
    else:
        model.requires_grad_(train == "full")
    embeddings = torch.randn(1, LENGTH, SHAPE.text_hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embeddings).last_hidden_state.sum().backward()
    return counter.get_total_flops()


def test_one_block_has_the_matrices_of_llama():
    # 8 wide with one of two heads of keys and values: q, o 8 x 8; k, v 8 x 4; gate, up 8 x 12; down 12 x 8
    assert language_model_parameters(SHAPE) == 2 * 64 + 2 * 32 + 3 * 96


@pytest.mark.parametrize("train", ["full", "projector", "lora"])
def test_language_model_equals_torchs_count_but_for_attention_above_the_diagonal(train):
    pairs_above = LENGTH * (LENGTH - 1) // 2
    above = 3 * SHAPE.num_text_layers * 2 * 2 * SHAPE.text_hidden_size * pairs_above
    assert language_model_work(train).language_model + above == counted_language_model_flops(train)


def test_tower_equals_torchs_count_at_every_depth():
    for depth in (1, SHAPE.num_vision_layers):
        config = CLIPVisionConfig(
            image_size=SHAPE.image_size,
            patch_size=SHAPE.patch_size,
            hidden_size=SHAPE.vision_hidden_size,
            intermediate_size=SHAPE.vision_intermediate_size,
            num_hidden_layers=depth,
            num_attention_heads=SHAPE.num_vision_heads,
            attn_implementation="eager",
        )
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            CLIPVisionModel(config)(torch.empty(1, 3, SHAPE.image_size, SHAPE.image_size))
        assert tower_forward_flops(SHAPE, depth) == counter.get_total_flops()


def test_head_counts_at_supervised_positions_alone():
    # 2 operations x 8 channels x 256 words x 2 positions, forward and the input's gradient; full: the weights', too
    assert language_model_work("projector").head == 2 * (2 * 8 * 256 * 2)
    assert language_model_work("full").head == 3 * (2 * 8 * 256 * 2)


def test_work_of_a_batch_is_the_sum_of_its_conversations():
    one, two = Conversation(5, 2), Conversation(9, 4)
    kwargs = {"num_image_tokens": 4, "deepest_layer": 2, "train": "full"}
    works = [step_work(SHAPE, batch, projector=NOTHING, **kwargs).total for batch in ([one], [two], [one, two])]
    assert works[2] == works[0] + works[1]
    with_projector = step_work(SHAPE, [one], projector=FlopCount(7, 11), **kwargs)
    assert with_projector.total == works[0] + 18


@pytest.mark.parametrize(
    ("device_name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("AMD EPYC", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peak_is_found_by_whole_words_of_the_devices_name(device_name, peak):
    assert peak_flops(device_name, "bf16") == peak


def test_single_precision_has_no_known_peak():
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp32") is None
    assert utilisation(10**12, 1.0, None) is None


def test_utilisation_is_needed_work_per_second_over_the_peak():
    # 494.5 of 989 TFLOP/s
    assert utilisation(989 * 10**12, 2.0, PEAK_FLOPS["H100"]) == pytest.approx(0.5)
