"""What is rounded to 4 or 8 bits, to which values, and what stays as it is, bit for bit."""

import copy
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from llava_saep import load_pretrained_model, process_images, tokenizer_image_token
from llava_saep.convert.checkpoint import Source
from llava_saep.convert.run import convert
from llava_saep.data.images import load_image
from llava_saep.errors import UserError
from llava_saep.model.loading import build_model, build_processor, build_tokenizer, load_model
from llava_saep.model.quantization import QuantizationConfig, num_weights, quantize_language_model
from llava_saep.train.config import LoraConfig
from llava_saep.train.lora import add_lora
from llava_saep.train.trainable import count_parameters
from projectors import select_projector
from tests.fixtures.quantization import needs_bitsandbytes
from tests.fixtures.tiny import write_bases

pytestmark = needs_bitsandbytes

GOLDEN = Path(__file__).parents[2] / "golden" / "llava"
WHOLE = GOLDEN / "checkpoints" / "llava_tiny_v15"
ADAPTER = GOLDEN / "checkpoints" / "llava_tiny_lora"
LAYERS = "model.language_model.layers."

CONFIGS = [
    QuantizationConfig(bits=4),
    QuantizationConfig(bits=4, quant_type="fp4", double_quant=False),
    QuantizationConfig(bits=8),
]

NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
"""The sixteen values of NF4, from appendix E of QLoRA (arXiv 2305.14314)."""


def model_of(linear: nn.Linear):
    """The least that has a language model of one layer."""
    return SimpleNamespace(model=SimpleNamespace(language_model=nn.Sequential(linear)))


def quantized(linear: nn.Linear, config: QuantizationConfig, compute_dtype=torch.float32) -> nn.Module:
    model = model_of(copy.deepcopy(linear))
    quantize_language_model(model, config, compute_dtype=compute_dtype, device="cpu")
    return model.model.language_model[0]


def rounded_to_nf4(weight: torch.Tensor) -> torch.Tensor:
    """By hand: blocks of 64 weights in memory order, each scaled to [-1, 1], go to the nearest of the values."""
    flat = weight.flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks / scale).unsqueeze(-1).sub(NF4).abs().argmin(dim=-1)
    return (NF4[nearest] * scale).flatten()[: len(flat)].view_as(weight)


def rounded_to_eight_bits(weight: torch.Tensor) -> torch.Tensor:
    """By hand: each row in steps of a 127th of its largest weight."""
    step = weight.half().float().abs().amax(dim=1, keepdim=True) / 127
    return (weight.half().float() / step).round() * step


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same model in our format and in LLaVA's; its layers are wide enough for 4 bits on the CPU."""
    folder = tmp_path_factory.mktemp("folders")
    bases = write_bases(folder, text_hidden_size=64)
    tokenizer = build_tokenizer(str(bases.language_model))
    model = build_model(
        language_model=str(bases.language_model),
        vision_tower=str(bases.vision_tower),
        projector=select_projector("mlp2x_gelu"),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model.save_pretrained(folder / "own")
    parts = {"language_model": str(bases.language_model), "vision_tower": str(bases.vision_tower)}
    build_processor(model_config=model.config, **parts).save_pretrained(folder / "own")
    convert(Source(folder=folder / "own"), "llava", folder / "llava")
    return {format: folder / format for format in ("own", "llava")}


@pytest.fixture(scope="module")
def loaded(folders):
    return load_model(folders["own"])


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def rounded(request, folders):
    return load_model(folders["own"], quantization=request.param), request.param


# The values


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(64, 32), (128, 40), (192, 16)])
def test_layer_multiplies_by_the_weights_that_nf4_rounds_to(num_inputs, num_outputs, training):
    """With and without gradients; float32 sums differ in their last bits."""
    torch.manual_seed(0)
    linear = nn.Linear(num_inputs, num_outputs)
    layer = quantized(linear, QuantizationConfig(bits=4, double_quant=False)).train(training)
    inputs = torch.randn(2, 5, num_inputs, requires_grad=training)
    by_hand = nn.functional.linear(inputs, rounded_to_nf4(linear.weight.detach()), linear.bias.detach())
    torch.testing.assert_close(layer(inputs), by_hand, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_layer_multiplies_by_the_weights_that_eight_bits_round_to(training):
    """Generating rounds the inputs to 8 bits as well: an error of up to half a 127th of the largest, in 64 terms."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    layer = quantized(linear, QuantizationConfig(bits=8)).train(training)
    inputs = torch.randn(2, 5, 64, requires_grad=training)
    by_hand = nn.functional.linear(inputs, rounded_to_eight_bits(linear.weight.detach()), linear.bias.detach())
    torch.testing.assert_close(layer(inputs), by_hand, atol=1e-5 if training else 2e-2, rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS[:2], ids=str)
def test_layer_multiplies_by_what_bitsandbytes_itself_reads_back(config):
    import bitsandbytes

    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    packed, state = bitsandbytes.functional.quantize_4bit(
        linear.weight.data, quant_type=config.quant_type, compress_statistics=config.double_quant, blocksize=64
    )
    read_back = bitsandbytes.functional.dequantize_4bit(packed, state)
    assert 0.01 < (read_back - linear.weight).abs().max() / linear.weight.abs().max() < 0.2
    inputs = torch.randn(3, 64)
    expected = nn.functional.linear(inputs, read_back, linear.bias)
    torch.testing.assert_close(quantized(linear, config)(inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_inputs_get_the_gradient_of_the_rounded_layer(config):
    """What adapters and projector learn from: for a sum of outputs, the column sums of the rounded weights."""
    torch.manual_seed(0)
    layer = quantized(nn.Linear(64, 32, bias=False), config).train()
    inputs = torch.randn(3, 64, requires_grad=True)
    layer(inputs).sum().backward()
    columns = layer(torch.eye(64)).detach().sum(dim=1)
    torch.testing.assert_close(inputs.grad, columns.expand(3, 64), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_bit_layer_multiplies_in_the_runs_dtype(dtype):
    layer = quantized(nn.Linear(64, 32), CONFIGS[0], compute_dtype=dtype).train()
    assert layer.compute_dtype is dtype
    inputs = torch.randn(3, 64)
    outputs = layer(inputs)
    assert outputs.dtype is torch.float32
    assert torch.equal(outputs, outputs.to(torch.bfloat16).float()) == (dtype is torch.bfloat16)


def test_sizes_that_come_out_wrong_on_the_cpu_are_refused():
    """bitsandbytes 0.50.2 quantises them and reads other weights back; so for Linear(96, 40), by more than 1."""
    with pytest.raises(UserError, match="4 bits on the CPU: the language model's 0 has 96 inputs.*; use 8 bits"):
        quantized(nn.Linear(96, 40), CONFIGS[0])
    assert quantized(nn.Linear(96, 40), CONFIGS[2]).weight.dtype is torch.int8


FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True},  # biases beside the rounded weights
    "qwen3": {"head_dim": 16},
    "phi3": {"pad_token_id": None},  # one layer for queries, keys and values
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "smollm3": {"pad_token_id": None},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_language_models_of_every_family_compute_with_the_rounded_weights(family):
    """Against the same model whose linear layers got their weights rounded by hand; float32 through two layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(family, vocab_size=50, num_hidden_layers=2, **sizes, **FAMILIES[family])
    language_model = AutoModel.from_config(config).eval()
    for bias in (p for name, p in language_model.named_parameters() if name.endswith(".bias")):
        nn.init.normal_(bias)
    model = SimpleNamespace(model=SimpleNamespace(language_model=copy.deepcopy(language_model)))
    four_bits = QuantizationConfig(bits=4, double_quant=False)
    quantize_language_model(model, four_bits, compute_dtype=torch.float32, device="cpu")
    input_ids = torch.randint(50, (2, 12))
    with torch.no_grad():
        before = language_model(input_ids).last_hidden_state
        for module in language_model.modules():
            if type(module) is nn.Linear:
                module.weight.copy_(rounded_to_nf4(module.weight))
        by_hand = language_model(input_ids).last_hidden_state
        found = model.model.language_model(input_ids).last_hidden_state
    torch.testing.assert_close(found, by_hand, atol=1e-4, rtol=1e-4)
    assert (found - before).abs().max() > 1e-3


# What is rounded


def test_linear_layers_of_the_language_model_are_rounded_and_nothing_else(rounded, loaded):
    import bitsandbytes

    model, config = rounded
    kind = {4: bitsandbytes.nn.Linear4bit, 8: bitsandbytes.nn.Linear8bitLt}[config.bits]
    before, after = dict(loaded.named_modules()), dict(model.named_modules())
    changed = {name for name in before if type(before[name]) is not type(after[name])}
    assert before.keys() == after.keys()
    assert changed == {n for n, m in before.items() if type(m) is nn.Linear and n.startswith(LAYERS)}
    assert {type(after[name]) for name in changed} == {kind}
    assert all(after[name].weight.dtype == {4: torch.uint8, 8: torch.int8}[config.bits] for name in changed)
    if config.bits == 4:
        assert {after[name].compute_dtype for name in changed} == {model.dtype} == {torch.float32}


def test_tower_projector_embedding_norms_and_head_keep_every_bit(rounded, loaded):
    kept, whole = rounded[0].state_dict(), loaded.state_dict()
    assert kept and all(torch.equal(tensor, whole[name]) for name, tensor in kept.items())
    left_out = whole.keys() - kept.keys()
    assert left_out == {n for n in whole if n.startswith(LAYERS) and n.endswith("_proj.weight")}
    for part in ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.embed_tokens", "lm_head"):
        assert any(name.startswith(part) for name in kept)


def test_counts_are_those_of_the_model_that_was_rounded(rounded, loaded):
    assert [part.num_parameters for part in count_parameters(rounded[0])] == [
        part.num_parameters for part in count_parameters(loaded)
    ]
    assert num_weights(nn.Linear(3, 4).weight) == 12


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_learn_in_the_dtype_of_the_models_weights(bits, dtype, folders):
    """Without DeepSpeed these are float32 whatever the layers multiply in."""
    model = load_model(folders["own"], dtype=dtype)
    quantize_language_model(model, QuantizationConfig(bits=bits), compute_dtype=torch.bfloat16, device="cpu")
    adapted = add_lora(model, LoraConfig(rank=2))
    dtypes = {parameter.dtype for name, parameter in adapted.named_parameters() if "lora_" in name}
    assert dtypes == {dtype}
    kind = {4: peft.tuners.lora.Linear4bit, 8: peft.tuners.lora.Linear8bitLt}[bits]
    assert sum(type(module) is kind for module in adapted.modules()) == 7 * 2  # beside each linear layer


def test_llavas_adapter_is_merged_before_the_language_model_is_rounded():
    config = QuantizationConfig(bits=8)
    merged = load_model(ADAPTER, model_base=str(WHOLE))
    name = f"{LAYERS}0.self_attn.q_proj"
    expected = quantized(merged.get_submodule(name), config).weight
    plain = load_model(WHOLE, quantization=config).get_submodule(name).weight
    found = load_model(ADAPTER, model_base=str(WHOLE), quantization=config).get_submodule(name).weight
    assert torch.equal(found, expected) and not torch.equal(found, plain)


def test_language_model_without_linear_layers_is_refused():
    model = SimpleNamespace(model=SimpleNamespace(language_model=nn.Sequential(nn.Embedding(3, 4))))
    with pytest.raises(UserError, match="Sequential has no torch.nn.Linear layer"):
        quantize_language_model(model, CONFIGS[0], compute_dtype=torch.float32, device="cpu")


# Use


def test_rounded_model_is_not_saved_as_if_it_were_whole(rounded, tmp_path):
    with pytest.raises(UserError, match=r"a language model in \d bits is not saved; load the model without"):
        rounded[0].save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("format", ["own", "llava"])
@pytest.mark.parametrize("switch", ["load_4bit", "load_8bit"])
def test_llavas_switches_load_a_model_that_answers(switch, format, folders):
    tokenizer, model, image_processor, _ = load_pretrained_model(
        str(folders[format]), None, "llava", device="cpu", **{switch: True}
    )
    assert model.quantization == QuantizationConfig(bits=int(switch[5]))
    prompt = "USER: <image>\nWhat is the color of the car? ASSISTANT:"
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
    pixels = process_images([load_image(GOLDEN / "images" / "square.png")], image_processor, model.config)
    answers = [model.generate(ids, images=pixels, do_sample=False, max_new_tokens=8).tolist() for _ in range(2)]
    assert answers[0] == answers[1] and len(answers[0][0]) > 0


def test_rounding_says_nothing_in_each_step(capfd, caplog):
    layer = quantized(nn.Linear(64, 32), QuantizationConfig(bits=8)).eval()
    layer(torch.randn(3, 64))
    assert "cast" not in caplog.text and "cast" not in capfd.readouterr().err


@pytest.mark.parametrize("bits", [4, 8])
def test_chat_takes_llavas_switches(bits, monkeypatch):
    from llava_saep.serve import chat

    asked = []
    monkeypatch.setattr(chat.LocalEngine, "from_pretrained", lambda *args, **kwargs: asked.append(kwargs) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        chat.main(["--model-path", str(WHOLE), f"--load-{bits}bit"])
    assert asked[0]["quantization"] == QuantizationConfig(bits=bits)
