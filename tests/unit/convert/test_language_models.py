"""Language models beside Llama through LLaVA's format and llava-hf's: their configs say the same when read again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaForConditionalGeneration,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from llava_saep.convert.checkpoint import Checkpoint, Source
from llava_saep.convert.run import convert
from llava_saep.convert.to_hf import write_hf
from llava_saep.convert.to_llava import write_llava
from llava_saep.errors import UserError
from llava_saep.model.loading import build_model, build_processor, load_model, load_processor
from projectors import select_projector
from tests.fixtures.tiny import write_bases

CHECKPOINTS = Path(__file__).parents[2] / "golden" / "llava" / "checkpoints"

SIZES = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA_3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA_3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
CONFIGS = {
    "llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA_3_ROPE),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True, head_dim=8),
    "phi3": Phi3Config(**SIZES),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=16),
    "smollm3": SmolLM3Config(**SIZES),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return write_bases(tmp_path_factory.mktemp("bases"))


def build(bases, config, folder):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model = build_model(
        language_model=str(folder),
        vision_tower=str(bases.vision_tower),
        projector=select_projector("mlp2x_gelu"),
        image_token_id=400,
    ).eval()
    parts = {"language_model": str(bases.language_model), "vision_tower": str(bases.vision_tower)}
    return Checkpoint(model, build_processor(**parts, model_config=model.config))


def logits_of(model):
    """Of a prompt with an image, longer than Gemma's window and than Llama 3's original context."""
    ids = torch.tensor([[1, 5, 7, *[model.config.image_token_id] * 36, 11, 13]])
    pixels = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits[..., :400]


@pytest.fixture(scope="module")
def llava_mistral(tmp_path_factory):
    """A folder as llava-v1.6-mistral-7b is: Mistral, with LLaMA's tokenizer in tokenizer.model alone."""
    around = tmp_path_factory.mktemp("llava_mistral")
    shutil.copytree(CHECKPOINTS / "clip_tiny", around / "clip_tiny")
    folder = shutil.copytree(CHECKPOINTS / "llava_tiny_v15", around / "llava")
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"model_type": "llava_mistral", "architectures": ["LlavaMistralForCausalLM"], "sliding_window": None}
    (folder / "config.json").write_text(json.dumps(fields))
    assert not (folder / "tokenizer.json").exists()
    return folder


@pytest.mark.parametrize("target", [None, "own", "llava", "hf"])
def test_mistrals_tokenizer_puts_llamas_blank_in_front_in_every_format(llava_mistral, target, tmp_path):
    folder = llava_mistral
    if target is not None:
        folder = tmp_path / "converted"
        convert(Source(folder=llava_mistral), target, folder)
    tokenizer = load_processor(folder).tokenizer
    llamas = LlamaTokenizer.from_pretrained(CHECKPOINTS / "llava_tiny_v15")
    for text in ("[INST] What is shown? [/INST]", "\nWhat is shown?", " a", "a</s>b"):
        assert tokenizer(text).input_ids == llamas(text).input_ids
    assert llamas.tokenize("[INST]")[0].startswith("▁")


@pytest.mark.parametrize("name", CONFIGS)
def test_language_model_is_the_same_after_each_format(tmp_path, bases, name):
    checkpoint = build(bases, CONFIGS[name], tmp_path / "language_model")
    expected = logits_of(checkpoint.model)
    (tmp_path / "llava").mkdir()
    write_llava(checkpoint, tmp_path / "llava", final_folder=tmp_path / "llava")
    assert torch.equal(logits_of(load_model(tmp_path / "llava")), expected)
    write_hf(checkpoint, tmp_path / "hf")
    assert torch.equal(logits_of(load_model(tmp_path / "hf")), expected)
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    # The head multiplies one row more there, which may change the order of sums.
    torch.testing.assert_close(logits_of(theirs), expected, atol=1e-6, rtol=0)


def test_gemma_2_is_refused_where_its_logits_would_not_be_capped(tmp_path, bases):
    checkpoint = build(bases, Gemma2Config(**SIZES, head_dim=8), tmp_path / "language_model")
    with pytest.raises(UserError, match="leaves out the soft cap on the logits of gemma2"):
        write_hf(checkpoint, tmp_path / "hf")
