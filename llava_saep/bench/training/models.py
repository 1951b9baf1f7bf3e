"""Models of a given shape with random weights: transformers' own Llava, and this project's.

Both are made directly in the wanted number format on the wanted device, and weights of one name are the same in both.
With an `mlp2x_gelu` projector the two therefore compute the same loss, which shows that they do the same work.
"""

from collections.abc import Iterable
from zlib import crc32

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from llava_saep.bench.training.shapes import ModelShape
from llava_saep.model import LlavaSaepConfig, LlavaSaepForConditionalGeneration
from llava_saep.model.projector_selection import remember_selection
from projectors import ProjectorConfig, ProjectorSelection

_PROJECTOR = "model.multi_modal_projector."
_STD = 0.02
_MAX_POSITIONS = 4096


def projector_config_for(selection: ProjectorSelection, shape: ModelShape) -> ProjectorConfig:
    """The projector's config between the shape's tower and language model."""
    return selection.build_config(
        vision_hidden_size=shape.vision_hidden_size,
        text_hidden_size=shape.text_hidden_size,
        num_vision_layers=shape.num_vision_layers,
    )


def build_own_model(
    shape: ModelShape, selection: ProjectorSelection, dtype: torch.dtype, device: torch.device, seed: int
) -> LlavaSaepForConditionalGeneration:
    """This project's model with any projector."""
    selection = selection.completed(projector_config_for(selection, shape))
    remember_selection(selection)  # the user named it
    config = LlavaSaepConfig(**_config_parts(shape), projector=selection.to_dict())
    return _build(LlavaSaepForConditionalGeneration, config, dtype, device, seed)


def build_stock_model(
    shape: ModelShape, dtype: torch.dtype, device: torch.device, seed: int
) -> LlavaForConditionalGeneration:
    """transformers' model; its projector is LLaVA-1.5's mlp2x_gelu on the last but one layer."""
    config = LlavaConfig(**_config_parts(shape), image_seq_length=shape.grid.num_patches)
    for each in (config, config.text_config):
        each.use_cache = False  # its Trainer sets the outer one; keeping keys and values only costs memory here
    return _build(LlavaForConditionalGeneration, config, dtype, device, seed)


def _config_parts(shape: ModelShape) -> dict[str, object]:
    vision_config = CLIPVisionConfig(
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        hidden_size=shape.vision_hidden_size,
        intermediate_size=shape.vision_intermediate_size,
        num_hidden_layers=shape.num_vision_layers,
        num_attention_heads=shape.num_vision_heads,
    )
    text_config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.text_hidden_size,
        intermediate_size=shape.text_intermediate_size,
        num_hidden_layers=shape.num_text_layers,
        num_attention_heads=shape.num_text_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=_MAX_POSITIONS,
        tie_word_embeddings=False,
    )
    parts = {"vision_config": vision_config, "text_config": text_config}
    return {**parts, "image_token_index": shape.image_token_id, "tie_word_embeddings": False}


def _build(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, seed: int
) -> PreTrainedModel:
    torch.manual_seed(seed)
    with device:
        model = model_class._from_config(config, dtype=dtype)
    draw_weights(model, seed)
    return model


@torch.no_grad()
def draw_weights(model: nn.Module, seed: int) -> None:
    """Draw each weight from a generator of its own, seeded by its name.

    A projector that is made of linear layers alone is drawn by the order of its weights, since implementations name
    them differently; any other keeps its own start.
    """
    projector = model.get_submodule(_PROJECTOR.rstrip("."))
    names = {f"{_PROJECTOR}{name}": f"projector.{index}" for index, (name, _) in _numbered(projector)}
    is_mlp = all(isinstance(each, nn.Linear) for each in projector.modules() if list(each.parameters(recurse=False)))
    for name, parameter in model.named_parameters():
        if name not in names or is_mlp:
            _draw(parameter, names.get(name, name), seed)


def _numbered(module: nn.Module) -> Iterable[tuple[int, tuple[str, nn.Parameter]]]:
    return enumerate(module.named_parameters())


def _draw(parameter: nn.Parameter, name: str, seed: int) -> None:
    if parameter.dim() > 1:
        generator = torch.Generator(parameter.device).manual_seed(crc32(name.encode()) + seed)
        parameter.normal_(0.0, _STD, generator=generator)
    elif "norm" in name and name.endswith("weight"):
        parameter.fill_(1.0)
    else:
        parameter.zero_()
