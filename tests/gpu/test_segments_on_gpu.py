"""Conversations that share a row on the GPU: torch's variable-length kernel and flex attention against eager, alone."""

import pytest
import torch

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


def test_window_reaches_as_far_as_eagers(varlen_calls):
    """A window one token off changes a tenth of the outputs; half precision changes their third digit."""
    model = tiny_text_model("mistral").cuda()
    model.set_attn_implementation("eager")
    row = row_on_gpu()
    expected = model(inputs_embeds=row["inputs_embeds"], position_ids=row["position_ids"]).last_hidden_state
    use_segment_attention(model.to(torch.bfloat16))
    found = model(**row_on_gpu(torch.bfloat16)).last_hidden_state.float()
    assert (found - expected).norm() / expected.norm() < 0.01
    assert varlen_calls == [(model.config.sliding_window - 1, 0)] * 2
    model.config.sliding_window += 1
    wider = model(**row_on_gpu(torch.bfloat16)).last_hidden_state.float()
    assert (wider - expected).norm() / expected.norm() > 0.02


def test_packed_runs_equal_an_unpacked_one_on_the_cpu(tmp_path):
    bases, data = write_bases(tmp_path / "bases"), write_data(tmp_path / "data", num_records=12)
    common = {"per_device_train_batch_size": 12, "model_max_length": 256, "max_steps": 4}
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
