"""Tokenizers, image processor and a data set in the form that LLaVA's reference outputs were made with."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessorPil, LlamaTokenizer, PreTrainedTokenizerFast

from llava_saep.data.dataset import ConversationDataset
from llava_saep.data.templates import conversation_template

GOLDEN = Path(__file__).parents[2] / "golden" / "llava"

IMAGE_TOKEN_ID = 5_000
"""Outside every vocabulary used here."""


def read_golden(name):
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def llama_tokenizer(**options):
    return LlamaTokenizer.from_pretrained(GOLDEN / "tokenizers", **options)


def _byte_level_tokenizer():
    """Bytes with merges, as GPT-2's and Qwen's vocabularies: no bos, no dummy prefix, ChatML tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((GOLDEN / "README.md").read_text().splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")


@pytest.fixture(scope="session")
def tokenizers():
    """The three tokenizers of the reference outputs, one with <im_start> and <im_end> added, and a byte-level one."""
    with_im_start_end = llama_tokenizer(legacy=False, add_bos_token=True)
    with_im_start_end.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    return {
        "llama_legacy": llama_tokenizer(legacy=True, add_bos_token=True),
        "llama_new": llama_tokenizer(legacy=False, add_bos_token=True),
        "yi_new": llama_tokenizer(
            legacy=False, add_bos_token=False, additional_special_tokens=["<|im_start|>", "<|im_end|>"]
        ),
        "im_start_end": with_im_start_end,
        "byte_level": _byte_level_tokenizer(),
    }


@pytest.fixture(scope="session")
def tokenizer(tokenizers):
    return tokenizers["llama_new"]


@pytest.fixture(scope="session")
def image_processor():
    """CLIP's, for images of 56 x 56 pixels: 4 x 4 patches of 14."""
    return clip_processor(56)


def clip_processor(side):
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


@pytest.fixture
def make_dataset(tmp_path, tokenizer, image_processor):
    """Write records and make a data set of them; images "red.png" and "blue.png" exist. 16 tokens per image."""
    for name in ("red", "blue"):
        Image.new("RGB", (60, 40), name).save(tmp_path / f"{name}.png")

    def make(records, template="v1", **options):
        data_path = tmp_path / "data.json"
        data_path.write_text(json.dumps(records))
        settings = {
            "tokenizer": tokenizer,
            "image_processor": image_processor,
            "image_aspect_ratio": "pad",
            "template": conversation_template(template, options.get("tokenizer")),
            "num_image_tokens": lambda grid: grid.height * grid.width,
            "patch_size": 14,
            "image_token_id": IMAGE_TOKEN_ID,
            "max_length": 512,
        }
        return ConversationDataset(data_path, tmp_path, **(settings | options))

    return make
