"""Conversations that share a row on the GPU: torch's variable-length kernel and flex attention against eager, alone."""

import pytest
import torch
from torch.nn import functional as F

from llava_saep.model import segment_attention
from llava_saep.model.segment_attention import use_segment_attention
from tests.fixtures.text_models import SEGMENT_LENGTHS, TEXT_MODELS, loss_and_gradients, packed_row, tiny_text_model
from tests.fixtures.tiny import write_bases, write_data
from tests.fixtures.training import logged
from tests.gpu.test_training_on_gpu import Run, start

TOLERANCE = 1e-4
"""Gradients near one in float32, whose sums two kernels take in another order."""

BF16_RELATIVE_ERROR = 0.03
"""Of a gradient's norm: some roundings of 2**-8 in sequence through two layers."""

WITHOUT_SOFTCAP = tuple(name for name in TEXT_MODELS if name != "gemma2")


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """Without TF32, which rounds the factors of float32 products to 10 bits."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def varlen_calls(monkeypatch):
    """One entry per call of torch's kernel."""
    calls = []
    attend = segment_attention.varlen.varlen_attn

    def count(*args, **kwargs):
        calls.append(kwargs["window_size"])
        return attend(*args, **kwargs)

    monkeypatch.setattr(segment_attention.varlen, "varlen_attn", count)
    return calls


def row_on_gpu(dtype=torch.float32):
    row = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in packed_row().items()}
    return row | {"inputs_embeds": row["inputs_embeds"].to(dtype)}


def alone(model_type):
    """Loss and gradients of the segments as batches of their own, eagerly in float32."""
    model = tiny_text_model(model_type).cuda()
    model.set_attn_implementation("eager")
    segments = row_on_gpu()["inputs_embeds"].split(SEGMENT_LENGTHS, dim=1)
    return loss_and_gradients(model, [{"inputs_embeds": segment} for segment in segments])


def check_close(found, expected, tolerance):
    assert found[0] == pytest.approx(expected[0], abs=tolerance)
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, expected[1][name], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("model_type", TEXT_MODELS)
def test_float32_segments_equal_eager_alone(model_type):
    model = tiny_text_model(model_type).cuda()
    use_segment_attention(model)
    check_close(loss_and_gradients(model, [row_on_gpu()]), alone(model_type), TOLERANCE)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_flex_attention_equals_eager_alone(model_type):
    model = tiny_text_model(model_type).cuda()
    model.set_attn_implementation("flex_attention")
    row = {name: row_on_gpu()[name] for name in ("inputs_embeds", "position_ids")}
    check_close(loss_and_gradients(model, [row]), alone(model_type), TOLERANCE)


@pytest.mark.parametrize("under_autocast", [False, True])
@pytest.mark.parametrize("model_type", WITHOUT_SOFTCAP)
def test_bf16_segments_go_through_the_variable_length_kernel(model_type, under_autocast, varlen_calls):
    """Weights in bf16 as under DeepSpeed, or float32 ones under autocast as without it."""
    model = tiny_text_model(model_type).cuda()
    model = model if under_autocast else model.to(torch.bfloat16)
    use_segment_attention(model)
    with torch.autocast("cuda", torch.bfloat16, enabled=under_autocast):
        _, gradients = loss_and_gradients(model, [row_on_gpu(torch.float32 if under_autocast else torch.bfloat16)])
    assert len(varlen_calls) == model.config.num_hidden_layers
    _, expected = alone(model_type)
    for name, gradient in gradients.items():
        error = (gradient.float() - expected[name]).norm() / expected[name].norm()
        assert error < BF16_RELATIVE_ERROR, name


def attend_through(mask, query, key, value):
    """Attention by torch's general kernel, in float32."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("sliding_window", [5, None])
def test_kernel_sees_as_far_back_as_the_window_says(sliding_window, varlen_calls):
    """Random states of unit variance, whose outputs a window one token off would change by a tenth and more."""
    generator = torch.Generator("cuda").manual_seed(0)
    length = sum(SEGMENT_LENGTHS)
    query, key, value = torch.randn(3, 1, 4, length, 16, device="cuda", generator=generator)
    segment = torch.arange(len(SEGMENT_LENGTHS), device="cuda").repeat_interleave(torch.tensor(SEGMENT_LENGTHS).cuda())
    is_seen = (segment[:, None] == segment) & torch.ones(length, length, dtype=torch.bool, device="cuda").tril()
    if sliding_window is not None:
        is_seen &= torch.ones_like(is_seen).triu(1 - sliding_window)
    found, _ = segment_attention.segment_attention(
        torch.nn.Identity(),
        *(states.to(torch.bfloat16) for states in (query, key, value)),
        None,
        scaling=16**-0.5,
        sliding_window=sliding_window,
        cu_seq_lens_q=packed_row()["cu_seq_lens_q"].cuda(),
        max_length_q=max(SEGMENT_LENGTHS),
    )
    assert len(varlen_calls) == 1
    expected = attend_through(is_seen, query, key, value)
    assert (found.float() - expected).norm() / expected.norm() < 0.02


def test_packed_runs_equal_an_unpacked_one_on_the_cpu(tmp_path):
    bases, data = write_bases(tmp_path / "bases"), write_data(tmp_path / "data", num_records=12)
    # At the fixtures' learning rate the roundings of bf16 grow from step to step.
    common = {"per_device_train_batch_size": 12, "model_max_length": 256, "max_steps": 4, "learning_rate": 1e-3}
    packed = {**common, "packing": True, "attn_implementation": "segments"}
    runs = {
        "cpu": Run(flags=common, on_cpu=True),
        "packed": Run(flags=packed),
        "packed_bf16": Run(flags={**packed, "bf16": True}),
        "packed_zero3": Run(3, {**packed, "bf16": True, "gradient_checkpointing": True}),
    }
    processes = {name: start(run, bases, data, tmp_path / name) for name, run in runs.items()}
    for name, process in processes.items():
        assert process.wait(timeout=240) == 0, (tmp_path / name).with_suffix(".log").read_text()[-3000:]
    expected = logged(tmp_path / "cpu", "loss")
    assert logged(tmp_path / "packed", "loss") == pytest.approx(expected, abs=1e-4)
    for name in ("packed_bf16", "packed_zero3"):
        assert logged(tmp_path / name, "loss") == pytest.approx(expected, abs=2e-2)
        assert logged(tmp_path / name, "padding") == [0] * 4
