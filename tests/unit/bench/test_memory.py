"""Peak memory on the processor, against bytes counted by hand."""

import torch

from llava_saep.bench.memory import peak_of

CPU = torch.device("cpu")


def test_peak_is_the_most_that_is_allocated_at_one_time():
    kept = []

    def run():
        first = torch.zeros(1000)
        second = torch.zeros(500)
        del first
        kept.append(torch.zeros(700) + second.sum())

    # At first 1000 and 500 numbers of 4 bytes; later 500, two of 700 and the sum.
    assert peak_of(run, CPU) == 4 * max(1000 + 500, 500 + 700 + 700 + 1)


def test_what_was_there_before_is_not_counted():
    before = torch.zeros(10_000)
    # The 1.0 itself becomes a tensor of a few bytes.
    assert peak_of(lambda: before.add_(1.0), CPU) < 100


def test_training_step_of_an_mlp_holds_gradients_output_and_both_hidden_maps(make_step):
    step = make_step("mlp2x_gelu")
    step.forward_backward()
    step.release_gradients()
    peak = peak_of(step.forward_backward, CPU)
    c, d, tokens = 16, 24, 2 * 24
    gradients = (c * d + d) + (d * d + d)
    assert gradients == sum(parameter.numel() for parameter in step.projector.parameters())
    # Kept for the backward: the hidden map before and after GELU; above them the output.
    assert peak >= 4 * (gradients + tokens * d)
    assert peak >= 4 * 3 * tokens * d
    # Never more than everything at once: the input's concatenation, three maps, a gradient of each, all gradients.
    assert peak <= 4 * (tokens * c + 6 * tokens * d + 2 * gradients)


def test_forward_without_a_graph_needs_less_than_training(make_step):
    step = make_step("saep")
    step.forward_backward()
    step.release_gradients()
    output = 4 * 2 * 6 * 24
    assert output <= peak_of(step.forward, CPU) < peak_of(step.forward_backward, CPU)


def test_devices_that_tell_nothing_give_no_number():
    assert peak_of(lambda: None, torch.device("meta")) is None
