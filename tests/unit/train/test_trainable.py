"""Exactly the chosen parts learn, and the table says so."""

import pytest
import torch
from torch import nn

from llava_saep.train.config import LoraConfig
from llava_saep.train.lora import add_lora, lora_target_pattern
from llava_saep.train.optimizer import parameter_groups
from llava_saep.train.saving import output_kind
from llava_saep.train.trainable import count_parameters, part_of, set_trainable, trainable_table


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(4, 4, bias=True)
        self.norm = nn.LayerNorm(4)


class Outer(nn.Module):
    """Names of the multimodal model, two parameters at a time."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.vision_tower = nn.Sequential(nn.Linear(3, 4))
        self.model.multi_modal_projector = nn.Linear(4, 4)
        self.model.language_model = nn.Module()
        self.model.language_model.embed_tokens = nn.Embedding(7, 4)
        self.model.language_model.layers = nn.ModuleList([Layer(), Layer()])
        self.lm_head = nn.Linear(4, 7, bias=False)

    def prepare_inputs_for_generation(self):
        """peft looks for it on models that it takes for generating ones."""


def learning(model):
    return {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.vision_tower.encoder.layers.0.mlp.fc1.weight", "vision_tower"),
        ("model.multi_modal_projector.layer_weights", "projector"),
        ("model.language_model.embed_tokens.weight", "token_embedding"),
        ("lm_head.weight", "language_model"),
        ("base_model.model.model.multi_modal_projector.weight", "projector"),
        ("base_model.model.model.language_model.layers.0.q_proj.base_layer.weight", "language_model"),
        ("base_model.model.model.language_model.layers.0.q_proj.lora_A.default.weight", "lora"),
    ],
)
def test_every_parameter_belongs_to_one_part(name, part):
    assert part_of(name) == part


@pytest.mark.parametrize(
    "parts", [{"projector"}, {"projector", "language_model"}, {"vision_tower"}, {"language_model", "vision_tower"}]
)
def test_exactly_the_chosen_parts_learn(parts):
    model = Outer()
    set_trainable(model, parts)
    assert learning(model) - {"token_embedding"} == parts
    assert ("token_embedding" in learning(model)) == ("language_model" in parts)


def test_token_embedding_learns_beside_the_projector_and_the_head_does_not():
    model = Outer()
    set_trainable(model, {"projector", "token_embedding"})
    assert learning(model) == {"projector", "token_embedding"}
    assert not model.lm_head.weight.requires_grad


def test_adapters_cover_every_linear_of_the_language_model_and_nothing_else():
    model = Outer()
    assert lora_target_pattern(model) == r"model\.language_model\..*\.(q_proj)"
    wrapped = add_lora(model, LoraConfig(rank=2))
    set_trainable(wrapped, {"projector", "lora"})
    assert learning(wrapped) == {"projector", "lora"}
    adapted = {name.split(".lora_")[0] for name, _ in wrapped.named_parameters() if "lora_" in name}
    prefix = "base_model.model.model.language_model.layers"
    assert adapted == {f"{prefix}.0.q_proj", f"{prefix}.1.q_proj"}


def test_adapters_have_the_dtype_of_the_weights():
    """ZeRO-3 fails on float32 adapters in a bf16 model; peft would make them float32."""
    wrapped = add_lora(Outer().to(torch.bfloat16), LoraConfig(rank=2))
    assert {p.dtype for name, p in wrapped.named_parameters() if "lora_" in name} == {torch.bfloat16}


def test_biases_that_lora_adds_are_left_to_learn_in_the_language_model_alone():
    wrapped = add_lora(Outer(), LoraConfig(rank=2, bias="all"))
    set_trainable(wrapped, {"lora"})
    assert learning(wrapped) == {"lora", "language_model"}
    own = [name for name, p in wrapped.named_parameters() if p.requires_grad and part_of(name) == "language_model"]
    assert own and all(name.endswith("bias") for name in own)


def test_table_counts_parameters_and_those_that_learn():
    model = Outer()
    set_trainable(model, {"projector"})
    counts = {count.part: (count.num_parameters, count.num_trainable) for count in count_parameters(model)}
    # tower 3*4+4; projector 4*4+4; embedding 7*4; the rest of the language model 2*(4*4+4 + 4+4) + 7*4
    expected = {"vision_tower": (16, 0), "projector": (20, 20), "token_embedding": (28, 0), "language_model": (84, 0)}
    assert counts == expected
    last_line = trainable_table(model).splitlines()[-1].split()
    assert last_line == ["all", "148", "20"]


def test_parameters_that_zero3_has_split_are_counted_whole():
    model = nn.Linear(2, 2, bias=False)
    model.weight.ds_numel = 1000
    assert count_parameters(model)[0].num_parameters == 1000


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        ({"projector"}, "projector"),
        ({"projector", "token_embedding"}, "projector"),
        ({"projector", "lora"}, "lora"),
        ({"lora", "vision_tower"}, "lora"),
        ({"projector", "language_model"}, "full"),
        ({"projector", "vision_tower"}, "full"),
        ({"language_model"}, "full"),
    ],
)
def test_output_holds_everything_that_changed(parts, kind):
    assert output_kind(parts) == kind


def test_projector_learns_at_its_own_rate_and_decay_skips_what_it_should():
    model = Outer()
    set_trainable(model, {"projector", "language_model"})
    decayed = {name for name, p in model.named_parameters() if p.dim() > 1}
    groups = parameter_groups(model, decayed_names=decayed, weight_decay=0.1, projector_learning_rate=0.5)
    projector = model.model.multi_modal_projector
    by_parameter = {id(p): group for group in groups for p in group["params"]}
    assert len(by_parameter) == sum(p.requires_grad for p in model.parameters())
    assert (by_parameter[id(projector.weight)]["lr"], by_parameter[id(projector.weight)]["weight_decay"]) == (0.5, 0.1)
    assert (by_parameter[id(projector.bias)]["lr"], by_parameter[id(projector.bias)]["weight_decay"]) == (0.5, 0.0)
    assert "lr" not in by_parameter[id(model.lm_head.weight)]
    assert by_parameter[id(model.model.language_model.layers[0].norm.weight)]["weight_decay"] == 0.0
