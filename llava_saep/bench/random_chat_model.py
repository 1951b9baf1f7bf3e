"""A model of a realistic shape that chats in numbered words: random weights, since speed does not depend on them.

Its vocabulary is made so that text and tokens say the same: a token is a word, and what the model writes becomes the
same tokens when it is read again in the next turn.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_saep.bench.training.models import build_own_model
from llava_saep.bench.training.shapes import NUM_SPECIAL_TOKENS, ModelShape
from llava_saep.constants import DEFAULT_IMAGE_TOKEN
from llava_saep.generation import Predictor
from llava_saep.model import LlavaSaepProcessor
from projectors import ProjectorSelection


def build_chat_model(
    shape: ModelShape, selection: ProjectorSelection, dtype: torch.dtype, device: torch.device, seed: int
) -> Predictor:
    """Return a model that answers, with the processor that belongs to it."""
    model = build_own_model(shape, selection, dtype, device, seed)
    side = shape.image_size
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = LlavaSaepProcessor.from_model_config(
        model.config, image_processor=image_processor, tokenizer=_word_tokenizer(shape)
    )
    return Predictor(model, processor)


def word(number: int, shape: ModelShape) -> str:
    """One of the vocabulary's words, by any number."""
    first = NUM_SPECIAL_TOKENS
    return f"w{first + number % (shape.image_token_id - first)}"


def _word_tokenizer(shape: ModelShape) -> PreTrainedTokenizerFast:
    """Words between blanks; what is no numbered word is unknown. Ids as `ModelShape` has them."""
    numbered = range(NUM_SPECIAL_TOKENS, shape.image_token_id)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in numbered}}
    vocabulary[DEFAULT_IMAGE_TOKEN] = shape.image_token_id
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    tokenizer.add_tokens([DEFAULT_IMAGE_TOKEN], special_tokens=True)
    return tokenizer
