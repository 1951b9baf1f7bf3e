"""One forward and its gradients on the GPU against the same on the CPU, in float32 and bfloat16."""

from pathlib import Path

import pytest
import torch

from llava_saep.model.loading import load_model
from projectors import PatchGrid, registered_presets, registered_projectors, select_projector

CHECKPOINTS = Path(__file__).parents[1] / "golden" / "llava" / "checkpoints"
GRID = PatchGrid(24, 24)
WIDTH = 64

FLOAT32_TOLERANCE = 1e-4
"""Logits of magnitude ten; the two devices sum in another order."""

BF16_RELATIVE_ERROR = 0.05
"""Of the output's norm: a handful of roundings of 2**-8 in sequence, as in the conformance suite."""


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """Without TF32, which rounds the factors of float32 products to 10 bits."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def image_prompt(config) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    num_tokens = config.num_image_tokens(config.patch_grid(56, 56))
    text = torch.randint(3, 1000, (2, 20), generator=generator)
    image = torch.full((2, num_tokens), config.image_token_id)
    pixels = torch.randn(2, 3, 56, 56, generator=generator)
    return {"input_ids": torch.cat([text[:, :5], image, text[:, 5:]], dim=1), "pixel_values": pixels}


def test_logits_and_greedy_answers_are_those_of_the_cpu(monkeypatch):
    monkeypatch.chdir(CHECKPOINTS)  # the checkpoint names its tower relative to this folder
    on_cpu, on_gpu = (
        load_model(CHECKPOINTS / "llava_tiny_v15"),
        load_model(CHECKPOINTS / "llava_tiny_v15", device="cuda"),
    )
    inputs = image_prompt(on_cpu.config)
    moved = {name: tensor.cuda() for name, tensor in inputs.items()}
    with torch.no_grad():
        expected, found = on_cpu(**inputs).logits, on_gpu(**moved).logits.cpu()
    torch.testing.assert_close(found, expected, atol=FLOAT32_TOLERANCE, rtol=0)
    options = {"max_new_tokens": 16, "do_sample": False}
    assert torch.equal(on_gpu.generate(**moved, **options).cpu(), on_cpu.generate(**inputs, **options))


@pytest.mark.parametrize("name", [*registered_projectors(), *registered_presets(), "mlp2x_gelu"])
def test_projector_is_the_same_on_the_gpu(name):
    """Also in bfloat16, where every parameter gets a finite gradient."""
    selection = select_projector(name)
    text_width = WIDTH if name == "identity" else 96
    config = selection.build_config(vision_hidden_size=WIDTH, text_hidden_size=text_width, num_vision_layers=24)
    torch.manual_seed(0)
    projector = selection.build(config).eval()
    features = [torch.randn(2, config.num_input_tokens(GRID), WIDTH) for _ in config.vision_layers]
    with torch.no_grad():
        expected = projector(features, GRID)
        on_gpu = projector.cuda()([layer.cuda() for layer in features], GRID).cpu()
    torch.testing.assert_close(on_gpu / expected.std(), expected / expected.std(), atol=1e-3, rtol=0)

    half = projector.to(torch.bfloat16)
    inputs = [layer.to("cuda", torch.bfloat16).requires_grad_() for layer in features]
    output = half(inputs, GRID)
    output.float().square().mean().backward()
    error = (output.detach().float().cpu() - expected).norm() / expected.norm()
    assert error < BF16_RELATIVE_ERROR
    learning = [parameter for parameter in half.parameters() if parameter.grad is not None]
    assert all(torch.isfinite(parameter.grad).all() for parameter in learning)
