"""A tiny model that answers, its projector loud enough to be heard, and images for it."""

import pytest
import torch

from llava_saep.generation import Predictor
from llava_saep.model.loading import build_model, build_processor, build_tokenizer
from projectors import select_projector
from tests.fixtures.tiny import write_bases, write_image


@pytest.fixture(scope="module", params=["saep", "mlp2x_gelu"])
def predictor(request, tmp_path_factory):
    bases = write_bases(tmp_path_factory.mktemp("bases"))
    tokenizer = build_tokenizer(str(bases.language_model))
    torch.manual_seed(0)
    model = build_model(
        language_model=str(bases.language_model),
        vision_tower=str(bases.vision_tower),
        projector=select_projector(request.param),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    with torch.no_grad():  # a random projector's output is too faint to change a random language model's words
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(20)
    processor = build_processor(
        language_model=str(bases.language_model),
        vision_tower=str(bases.vision_tower),
        model_config=model.config,
        tokenizer=tokenizer,
    )
    return Predictor(model, processor)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return [write_image(folder / f"{seed}.png", height=24, width=24 + 8 * seed, seed=seed) for seed in range(3)]
