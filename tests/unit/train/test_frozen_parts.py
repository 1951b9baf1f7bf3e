"""What is frozen costs nothing beyond its forward pass: no graph in the tower, no gradients for weights that stay."""

import pytest
import torch

from llava_saep.constants import IGNORE_INDEX
from llava_saep.data.collator import ConversationCollator
from llava_saep.model.loading import build_model, build_tokenizer
from llava_saep.model.segment_attention import use_segment_attention
from llava_saep.train.trainable import set_trainable
from projectors import PatchGrid, select_projector
from tests.fixtures.tiny import IMAGE_SIZE, write_bases


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture
def model(bases):
    image_token_id = build_tokenizer(str(bases.language_model)).convert_tokens_to_ids("<image>")
    model = build_model(
        language_model=str(bases.language_model),
        vision_tower=str(bases.vision_tower),
        projector=select_projector("mlp2x_gelu"),
        image_token_id=image_token_id,
    )
    use_segment_attention(model.model.language_model)
    return model.train()


def batch_of(model):
    num_tokens = model.config.num_image_tokens(PatchGrid(6, 6))
    ids = torch.cat([torch.tensor([1]), torch.full((num_tokens,), model.config.image_token_id), torch.arange(5, 25)])
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    labels = ids.masked_fill(ids == model.config.image_token_id, IGNORE_INDEX)
    samples = [{"input_ids": ids, "labels": labels, "pixel_values": pixels}] * 2
    return ConversationCollator(0, (IMAGE_SIZE, IMAGE_SIZE), 512, padding_free=True)(samples)


def saved_for_backward(model, batch) -> list[torch.Tensor]:
    """Tensors that a forward pass keeps for the backward one."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        model(**batch).loss.backward()
    return saved


def test_stage_one_has_gradients_of_the_projector_alone(model):
    set_trainable(model, {"projector"})
    model(**batch_of(model)).loss.backward()
    with_gradients = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradients == {"multi_modal_projector"}


def test_frozen_tower_leaves_no_graph(model):
    set_trainable(model, {"projector", "language_model"})
    features = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: features.extend(args[0]))
    model(**batch_of(model))
    assert features and not any(feature.requires_grad for feature in features)


def inputs_of_mlp(model) -> list[torch.Tensor]:
    """A list that the next forward pass fills, one tensor per layer; holding them keeps their memory their own."""
    inputs = []
    for layer in model.model.language_model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    return inputs


@pytest.mark.parametrize(("parts", "are_kept"), [({"projector", "language_model"}, True), ({"projector"}, False)])
def test_inputs_of_linear_layers_are_kept_only_for_weights_that_learn(parts, are_kept, model):
    """They are most of what a training step keeps."""
    set_trainable(model, parts)
    inputs = inputs_of_mlp(model)
    saved = {tensor.data_ptr() for tensor in saved_for_backward(model, batch_of(model))}
    assert len(inputs) == model.config.text_config.num_hidden_layers
    assert {tensor.data_ptr() in saved for tensor in inputs} == {are_kept}
