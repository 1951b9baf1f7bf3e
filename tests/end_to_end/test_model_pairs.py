"""Every vision tower with every language model, tiny and random: train a step, save, load, answer."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from llava_saep.generation import GenerationOptions, Predictor
from llava_saep.model.loading import build_model
from llava_saep.train import train_mem
from projectors import select_projector
from tests.fixtures.tiny import TinyBases, write_data, write_tokenizer
from tests.fixtures.training import logged, training_flags

SIDE, PATCH = 24, 4
TOWER = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
}

CLIP_SIZES = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
SIGLIP_SIZES = {"size": {"height": SIDE, "width": SIDE}}
# As DINOv2 has it: the tower was trained on larger images than its processor makes.
DINO_SIZES = {"size": {"shortest_edge": 28}, "crop_size": {"height": SIDE, "width": SIDE}}
DINO_TOWER = TOWER | {"image_size": 32, "mlp_ratio": 2}


def siglip2(intermediate_size):
    """The whole two-tower model, as SigLIP2's repositories of fixed resolution hold it."""
    text = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = TOWER | {"intermediate_size": intermediate_size}
    return SiglipModel(SiglipConfig(text_config=text | {"vocab_size": 32}, vision_config=vision))


TOWERS = {
    "clip": (
        lambda: CLIPVisionModel(CLIPVisionConfig(**TOWER, intermediate_size=48)),
        CLIPImageProcessorPil,
        CLIP_SIZES,
    ),
    "siglip": (
        lambda: SiglipVisionModel(SiglipVisionConfig(**TOWER, intermediate_size=48)),
        SiglipImageProcessorPil,
        SIGLIP_SIZES,
    ),
    "siglip2": (lambda: siglip2(48), SiglipImageProcessorPil, SIGLIP_SIZES),
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**DINO_TOWER)), BitImageProcessorPil, DINO_SIZES),
    "dinov2_registers": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO_TOWER)),
        BitImageProcessorPil,
        DINO_SIZES,
    ),
}

LANGUAGE_MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 64}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 32}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 32}),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config, {}),
}

FAST = {("clip", "qwen3"), ("siglip", "gemma2"), ("dinov2_registers", "smollm3")}
"""Pairs that run in every test run; between them prefix tokens, tied embeddings and soft-capped logits all differ."""

PAIRS = [
    pytest.param(tower, model, marks=() if (tower, model) in FAST else pytest.mark.slow)
    for tower in TOWERS
    for model in LANGUAGE_MODELS
]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One record with an image, one without: each step sees both."""
    return write_data(tmp_path_factory.mktemp("data"), num_records=2, text_only_every=2)


def write_pair(folder: Path, tower: str, language_model: str, tokenizer_folder: Path) -> TinyBases:
    make_tower, processor_class, sizes = TOWERS[tower]
    torch.manual_seed(0)
    make_tower().save_pretrained(folder / "tower")
    processor_class(**sizes).save_pretrained(folder / "tower")
    model_class, config_class, own = LANGUAGE_MODELS[language_model]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    # Rounded up as real ones are, with room for the tokens that a family's own tokenizer class adds.
    config = config_class(vocab_size=len(tokenizer) + 24, **ends, **copy.deepcopy(TEXT | own))
    model_class(config).save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    return TinyBases(folder / "tower", folder / "lm")


def questions(data):
    """One with an image, one of text alone."""
    image = str(sorted(data.image_folder.iterdir())[0])
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "Which colour is the square?"}]
    return [[{"role": "user", "content": parts}], [{"role": "user", "content": "Say hello."}]]


@pytest.mark.parametrize(("tower", "language_model"), PAIRS)
def test_pair_trains_saves_loads_and_answers(tower, language_model, tokenizer_folder, data, tmp_path):
    bases = write_pair(tmp_path, tower, language_model, tokenizer_folder)
    out = tmp_path / "out"
    flags = training_flags(
        bases, data, out, max_steps=2, per_device_train_batch_size=2, unfreeze_mm_vision_tower=True, learning_rate=1e-3
    )
    assert train_mem.main(flags) == 0
    first, second = logged(out, "loss")
    assert 0 < second < first < 20
    predictor = Predictor.from_pretrained(out)
    options = GenerationOptions(max_new_tokens=5)
    alone = [predictor.generate([question], options)[0] for question in questions(data)]
    # Left padding must not show, nor what an image's neighbour in the batch is.
    assert predictor.generate(questions(data), options) == alone
    # A fresh load is the same model: nothing was lost or drawn anew.
    assert Predictor.from_pretrained(out).generate(questions(data), options) == alone


def test_language_model_is_taken_out_of_a_model_that_sees(tokenizer_folder, tmp_path):
    """Gemma 3 from 4B on comes with a tower of its own, which has no part in ours."""
    bases = write_pair(tmp_path, "clip", "gemma3", tokenizer_folder)
    _, _, own = LANGUAGE_MODELS["gemma3"]
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=TEXT | own | {"vocab_size": 424},
        vision_config=vision | {"image_size": 32, "patch_size": 8},
        mm_tokens_per_image=4,
    )
    source = Gemma3ForConditionalGeneration(config)
    source.save_pretrained(bases.language_model)
    model = build_model(
        language_model=str(bases.language_model),
        vision_tower=str(bases.vision_tower),
        projector=select_projector("linear"),
        image_token_id=500,
    )
    expected = source.model.language_model.state_dict()
    found = model.model.language_model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)
