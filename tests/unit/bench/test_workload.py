"""What projectors are fed: hidden states laid out as a tower's, and gradients where a trained tower wants them."""

from dataclasses import replace

import pytest
import torch

from llava_saep.bench.workload import TowerOutput
from projectors import ProjectorConfig


def config(**options):
    return ProjectorConfig(vision_hidden_size=16, text_hidden_size=24, **options)


def test_patches_are_what_is_left_of_a_sequence_without_its_class_token(workload):
    (tokens,) = TowerOutput(workload).features(config())
    assert tokens.shape == (2, 24, 16)
    # Rows of 16 channels follow each other; from image to image there is one token more.
    assert tokens.stride() == (25 * 16, 16, 1) and tokens.storage_offset() == 16


def test_kept_class_token_comes_with_the_whole_sequence(workload):
    (tokens,) = TowerOutput(workload).features(config(keep_cls_token=True))
    assert tokens.shape == (2, 25, 16) and tokens.is_contiguous()


def test_layers_differ_and_are_shared_between_projectors(workload):
    tower_output = TowerOutput(workload)
    first, second = tower_output.features(config(vision_layers=(1, 2)))
    (again,) = tower_output.features(config())
    assert not torch.equal(first, second)
    assert again.data_ptr() == first.data_ptr()


def test_frozen_tower_gets_no_gradient(make_step):
    step = make_step("linear")
    assert not step.features[0].requires_grad
    step.forward_backward()
    assert step.projector.linear.weight.grad is not None


def test_trained_tower_gets_the_gradient_of_every_step_and_nothing_is_stored_for_it(make_step):
    step = make_step("linear", train_tower=True)
    seen = []
    step.features[0].register_hook(lambda gradient: seen.append(gradient.clone()))
    step.forward_backward()
    step.forward_backward()
    expected = step.output_gradient @ step.projector.linear.weight
    assert len(seen) == 2
    # Another order of summation over 24 channels.
    assert torch.allclose(seen[0], expected, atol=1e-5) and torch.equal(seen[0], seen[1])


def test_gradients_are_released_between_steps(make_step):
    step = make_step("linear")
    step.forward_backward()
    step.release_gradients()
    assert all(parameter.grad is None for parameter in step.projector.parameters())


def test_inference_keeps_no_graph_and_training_is_in_training_mode(make_step):
    step = make_step("linear")
    modes = []
    step.projector.register_forward_hook(
        lambda module, inputs, output: modes.append((module.training, output.requires_grad))
    )
    step.forward()
    step.forward_backward()
    assert modes == [(False, False), (True, True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_and_features_have_the_chosen_number_format(make_step, dtype):
    step = make_step("saep", dtype=dtype)
    assert {parameter.dtype for parameter in step.projector.parameters()} == {dtype}
    assert {tokens.dtype for tokens in step.features} == {dtype}


def test_same_weights_at_every_build(make_step):
    assert torch.equal(make_step("linear").projector.linear.weight, make_step("linear").projector.linear.weight)


def test_features_do_not_depend_on_what_was_drawn_before(workload):
    first = TowerOutput(workload).features(config())[0]
    torch.manual_seed(123)
    assert torch.equal(TowerOutput(replace(workload)).features(config())[0], first)
