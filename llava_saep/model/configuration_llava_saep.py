"""Config of the multimodal model: transformers' LlavaConfig with the projector named instead of hard-wired."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig

from llava_saep.data.images import parse_grid_pinpoints
from llava_saep.errors import UserError
from llava_saep.model.anyres import ImageTokens
from llava_saep.model.projector_selection import selection_from_config
from llava_saep.model.vision_tower import has_class_token
from projectors import PatchGrid, ProjectorConfig


@strict
class LlavaSaepConfig(LlavaConfig):
    """A vision tower, a projector from the registry and a language model.

    Args:
        projector: `{"name", "provider", "options"}` as `ProjectorSelection.to_dict()` writes it. Its options hold the
            vision layers that the projector reads, so LlavaConfig's `vision_feature_layer` is not used.
        image_token_index: the placeholder's id. It may lie outside the embedding matrix.
        mm_patch_merge_type: how the crops of an image are put together: flat, spatial or spatial_unpad.
        image_grid_pinpoints: sizes that an image may be brought to before it is cut into crops, as (width, height);
            None where images are not cut.
        image_aspect_ratio, mm_use_im_start_end: what LLaVA's scripts read from a model's config: how images are made
            square, and whether prompts mark images with <im_start> and <im_end>. The processor has the last word.
        added_token_ids: tokens that the language model in language_model_name_or_path has no embedding of; None: none.
        vision_tower_name_or_path, language_model_name_or_path: where the pretrained parts came from; a folder that
            holds projector weights alone is completed from them.
    """

    model_type = "llava_saep"

    projector: dict[str, Any] | None = None
    mm_patch_merge_type: str = "flat"
    image_grid_pinpoints: list[list[int]] | None = None
    image_aspect_ratio: str | None = None
    mm_use_im_start_end: bool = False
    added_token_ids: list[int] | None = None
    vision_tower_name_or_path: str | None = None
    language_model_name_or_path: str | None = None

    @property
    def projector_config(self) -> ProjectorConfig:
        """The typed config of the projector, with the widths of this tower and language model.

        Raises:
            UserError: the config names no projector, or the projector wants a class token that the tower lacks.
            ProjectorError: the projector or one of its options is unknown, or a layer lies outside the tower.
        """
        if self.projector is None:
            raise UserError("the model's config has no `projector` entry, expected {name, provider, options}")
        config = selection_from_config(self.projector).build_config(
            vision_hidden_size=self.vision_config.hidden_size,
            text_hidden_size=self.text_config.hidden_size,
            num_vision_layers=self.vision_config.num_hidden_layers,
        )
        if config.keep_cls_token and not has_class_token(self.vision_config):
            raise UserError(
                f"the projector keeps the class token (cls_patch), but a {self.vision_config.model_type} tower has "
                "none; use --mm_vision_select_feature patch"
            )
        return config

    @property
    def image_tokens(self) -> ImageTokens:
        """The arithmetic of an image's tokens; raises as `projector_config`, and for an unknown way of merging."""
        return ImageTokens(
            self.projector_config,
            self.vision_config.patch_size,
            self.mm_patch_merge_type,
            parse_grid_pinpoints(self.image_grid_pinpoints),
        )

    def patch_grid(self, height: int, width: int) -> PatchGrid:
        """Return the patch map of an image of `height` x `width` pixels, as preprocessed."""
        return PatchGrid(height // self.vision_config.patch_size, width // self.vision_config.patch_size)

    def num_image_tokens(self, grid: PatchGrid) -> int:
        """Count the tokens that the language model sees for one crop, or image that is not cut, with this patch map."""
        return self.projector_config.num_output_tokens(grid)
