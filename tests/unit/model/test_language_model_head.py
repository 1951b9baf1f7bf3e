"""The head's summed loss: what whole logits would give, chunk by chunk, with equal gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from llava_saep.model import language_model_head
from llava_saep.model.language_model_head import LanguageModelHead

CHANNELS, VOCABULARY, POSITIONS = 6, 11, 10


@pytest.fixture
def head():
    torch.manual_seed(0)
    return LanguageModelHead(CHANNELS, VOCABULARY, bias=False)


def inputs(num_positions=POSITIONS):
    generator = torch.Generator().manual_seed(1)
    hidden_states = torch.randn(num_positions, CHANNELS, generator=generator) * 3
    return hidden_states.requires_grad_(), torch.randint(VOCABULARY, (num_positions,), generator=generator)


def reference(head, hidden_states, targets, softcap):
    """torch's own cross-entropy on all logits at once -> loss and both gradients."""
    logits = F.linear(hidden_states, head.weight)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return loss, *torch.autograd.grad(loss * 0.5, (hidden_states, head.weight))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("rows_per_chunk", [1, 3, POSITIONS, 100])
def test_loss_and_gradients_equal_those_of_whole_logits(head, rows_per_chunk, softcap, monkeypatch):
    """In float32 both sum ten terms of order one, in another order: a few units of the last place."""
    monkeypatch.setattr(language_model_head, "_CHUNK_NUMBERS", rows_per_chunk * VOCABULARY)
    hidden_states, targets = inputs()
    expected = reference(head, hidden_states, targets, softcap)
    loss = head(hidden_states, targets, softcap)
    gradients = torch.autograd.grad(loss * 0.5, (hidden_states, head.weight))
    for found, wanted in zip((loss, *gradients), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_gradients_hold_up_in_double_precision(head):
    head = head.double()
    hidden_states, targets = inputs()
    hidden_states = hidden_states.detach().double().requires_grad_()
    expected = reference(head, hidden_states, targets, None)
    gradients = torch.autograd.grad(head(hidden_states, targets) * 0.5, (hidden_states, head.weight))
    for found, wanted in zip(gradients, expected[1:], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)  # the softmax is float32's


def test_no_more_logits_are_held_than_a_chunk(head, monkeypatch):
    monkeypatch.setattr(language_model_head, "_CHUNK_NUMBERS", 3 * VOCABULARY)
    rows = []
    original = language_model_head._loss_and_gradient

    def watched(logits, targets, softcap):
        rows.append(len(logits))
        return original(logits, targets, softcap)

    monkeypatch.setattr(language_model_head, "_loss_and_gradient", watched)
    hidden_states, targets = inputs()
    head(hidden_states, targets).backward()
    assert rows == [3, 3, 3, 1]


def test_without_targets_the_loss_is_zero_and_the_head_stays_in_the_graph(head):
    hidden_states, targets = inputs(0)
    loss = head(hidden_states, targets)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))


def test_frozen_weights_get_no_gradient_and_pass_one_on(head):
    head.requires_grad_(False)
    hidden_states, targets = inputs()
    head(hidden_states, targets).backward()
    assert head.weight.grad is None
    assert hidden_states.grad.abs().sum() > 0


def test_weight_gradients_of_many_chunks_are_summed_in_single_precision(monkeypatch):
    """Ten thousand equal parts: summed in bfloat16 they would stand still at 256 of them."""
    monkeypatch.setattr(language_model_head, "_CHUNK_NUMBERS", 2)
    head = LanguageModelHead(1, 2, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(head.weight)
    hidden_states = torch.ones(1024, 1, dtype=torch.bfloat16, requires_grad=True)
    head(hidden_states, torch.zeros(1024, dtype=torch.long)).backward()
    assert head.weight.grad.flatten().tolist() == [-512.0, 512.0]  # 1024 x (0.5 - 1) and 1024 x 0.5


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
def test_half_precision_keeps_the_dtypes_of_its_inputs(head, weights_dtype):
    """Under autocast, as training with bf16 and float32 weights; bfloat16 keeps 8 bits of a number."""
    hidden_states, targets = inputs()
    expected = reference(head, hidden_states, targets, None)
    head = head.to(weights_dtype)
    states = hidden_states.detach().to(weights_dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head(states, targets)
    (loss * 0.5).backward()
    assert loss.dtype == torch.float32
    assert states.grad.dtype == head.weight.grad.dtype == weights_dtype
    torch.testing.assert_close(loss, expected[0], rtol=2e-2, atol=0.1)
    torch.testing.assert_close(head.weight.grad.float(), expected[2], rtol=5e-2, atol=0.1)


def test_head_made_of_a_linear_layer_shares_its_weight():
    linear = nn.Linear(CHANNELS, VOCABULARY, bias=False)
    head = LanguageModelHead.like(linear)
    assert head.weight is linear.weight
    hidden_states, _ = inputs()
    assert torch.equal(head(hidden_states), linear(hidden_states))
