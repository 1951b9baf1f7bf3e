"""The SentencePiece model of the stand-in language model, trained on the corpus and LLaVA's chat template.

BPE with byte fallback, as Llama's: any text can be written, and every word of the corpus is one piece.
"""

from __future__ import annotations

import io
import random
import string
from pathlib import Path

import sentencepiece
from transformers import LlamaTokenizer

from llava_saep.data.templates import conversation_template
from playground.spatial_scenes import (
    KINDS,
    NUM_CELLS,
    QuestionWriter,
    cell_name,
    raster_reading,
    sample_scene,
    scan_pool,
)
from playground.spatial_scenes.writing import CAPTION_PROMPT, READING_PROMPT

VOCABULARY_SIZE = 704
MODEL_MAX_LENGTH = 2048
_NUM_SCENES = 2000
_WITHOUT_PUNCTUATION = str.maketrans("", "", ".,:?")


def train_tokenizer(folder: Path, seed: int) -> LlamaTokenizer:
    """Train on sentences about scenes, save tokenizer files into `folder`, and return the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_sentences(seed)),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY_SIZE,
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=False,
        character_coverage=1.0,
        num_threads=1,
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer.json").unlink(missing_ok=True)  # an older one would be read in place of the new model
    tokenizer = LlamaTokenizer.from_pretrained(
        folder,
        legacy=False,
        add_bos_token=True,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=MODEL_MAX_LENGTH,
        padding_side="right",
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def _sentences(seed: int) -> list[str]:
    rng = random.Random(f"{seed}/tokenizer")
    writer = QuestionWriter(rng)
    system = conversation_template("v1").render([])[0].text.strip()
    # Quotes let these words be learned without a space before them too: they follow a line break or the end token.
    sentences = [system, '"USER "USER USER ASSISTANT ASSISTANT "Is "What "Where "How "Describe "Read'] * _NUM_SCENES
    sentences += [CAPTION_PROMPT, READING_PROMPT] * _NUM_SCENES
    named = [f"{kind.name} is nowhere {cell_name(cell)} nothing" for kind in KINDS for cell in range(NUM_CELLS)]
    sentences += named * 20
    readings = []  # their full stops stand alone and are words: empty cells
    for _ in range(_NUM_SCENES):
        scene = sample_scene(rng, "cells", scan_pool("train"))
        readings.append(raster_reading(scene))
        for question in writer.conversation(scene, 6):
            sentences += [question.text, question.reference]
    # Without punctuation no piece joins a word to it; the marks themselves are in the vocabulary as characters.
    return [sentence.translate(_WITHOUT_PUNCTUATION) for sentence in sentences] + readings
