"""The multimodal model: transformers' Llava with a registered projector, patch features of several layers, and a loss
that multiplies by the language-model head only where there is a label."""

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, Cache, LlavaForConditionalGeneration
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaModel,
    LlavaModelOutputWithPast,
    LlavaPreTrainedModel,
)

from llava_saep.constants import IGNORE_INDEX
from llava_saep.data.images import ImageSize
from llava_saep.errors import UserError
from llava_saep.model.anyres import merge_all
from llava_saep.model.configuration_llava_saep import LlavaSaepConfig
from llava_saep.model.language_model_head import LanguageModelHead
from llava_saep.model.llava_generation import LlavaStyleGeneration
from llava_saep.model.projector_selection import selection_from_config
from llava_saep.model.quantization import QuantizationConfig
from llava_saep.model.vision_tower import VisionFeatures, read_patch_features
from projectors import Projector


class LlavaSaepPreTrainedModel(LlavaPreTrainedModel):
    """Common parts of the bare model and the one with a language-model head."""

    config: LlavaSaepConfig

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # transformers re-draws every Linear with std 0.02, leaves raw parameters uninitialised, and asks nothing of a
        # module without parameters of its own. A projector knows how it starts; children come before their parent
        # here, so it has the last word, and its `reset_parameters` leaves alone what a checkpoint has filled.
        if isinstance(module, Projector):
            module.reset_parameters()
        else:
            super()._initialize_weights(module, is_custom_code)
        if isinstance(module, LlavaSaepModel) and module.image_newline is not None:
            init.normal_(module.image_newline, std=newline_std(self.config.text_config.hidden_size))


def newline_std(text_hidden_size: int) -> float:
    """Return the spread that a fresh newline token starts with, LLaVA's."""
    return 1 / math.sqrt(text_hidden_size)


class LlavaSaepModel(LlavaSaepPreTrainedModel, LlavaModel):
    """Vision tower, projector and language model without the language-model head."""

    def __init__(self, config: LlavaSaepConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = selection_from_config(config.projector).build(config.projector_config)
        self.language_model = AutoModel.from_config(config.text_config)
        newline = torch.empty(config.text_config.hidden_size) if config.image_tokens.has_newline else None
        self.image_newline = None if newline is None else nn.Parameter(newline)
        self.post_init()

    def encode_images(self, pixel_values: Tensor | Sequence[Tensor]) -> VisionFeatures:
        """Run the tower over all crops of all images in one call; `pixel_values` as in `get_image_features`."""
        is_cut = not isinstance(pixel_values, Tensor) or pixel_values.dim() == 5
        crops = torch.cat(tuple(pixel_values)) if is_cut else pixel_values
        reads = self.multi_modal_projector.config
        layers = read_patch_features(self.vision_tower, crops, reads.vision_layers, reads.keep_cls_token)
        counts = tuple(len(stack) for stack in pixel_values) if is_cut else None
        return VisionFeatures(tuple(layers), counts, ImageSize(*crops.shape[-2:]))

    def get_image_features(
        self,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        image_sizes: Tensor | None = None,
        vision_features: VisionFeatures | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Project images to tokens of the language model, all crops of all images in one call.

        Args:
            pixel_values: (images, 3, height, width); or, where images are cut into crops, one (crops, 3, height, width)
                tensor per image, or all of them stacked.
            image_sizes: (images, 2), height and width of each image before it was cut.
            vision_features: what `encode_images` makes of the pixels, in place of them; the tower then does not run.
        Returns:
            an output whose `pooler_output` is a list with one (tokens, text_hidden_size) tensor per image.
        """
        seen = self.encode_images(pixel_values) if vision_features is None else vision_features
        projected = self.multi_modal_projector(list(seen.layers), self.config.patch_grid(*seen.view))
        if seen.crop_counts is None:
            return BaseModelOutputWithPooling(pooler_output=list(projected))
        originals = None if image_sizes is None else [ImageSize(*size) for size in image_sizes.tolist()]
        image_tokens = self.config.image_tokens
        newline = self.image_newline if image_tokens.has_newline else None
        merged = merge_all(image_tokens, projected, seen.crop_counts, originals, seen.view, newline)
        return BaseModelOutputWithPooling(pooler_output=merged)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        vision_features: VisionFeatures | None = None,
        **kwargs,
    ) -> LlavaModelOutputWithPast:
        """Insert the image tokens at their placeholders and run the language model.

        Args:
            input_ids: (batch, length); each image has one placeholder per token. Without any placeholder in the batch,
                `pixel_values` is taken as a stand-in: tower and projector run and count for nothing, so that every rank
                of a ZeRO run makes the same calls whatever its samples hold.
            pixel_values, image_sizes: of the whole batch's images, in the order of the placeholders, as
                `get_image_features` takes them.
            mm_encoder_outputs: `{"image": ...}` from `get_image_features`, instead of `pixel_values`.
            vision_features: from `encode_images`, instead of `pixel_values`.
        Raises:
            UserError: placeholders and image tokens differ in number, or both or neither input is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give exactly one of input_ids and inputs_embeds")
        encoded = (mm_encoder_outputs or {}).get("image")
        num_given = sum(given is not None for given in (encoded, pixel_values, vision_features))
        if num_given > 1:
            raise UserError("give one of pixel_values, vision_features and mm_encoder_outputs")
        if inputs_embeds is not None and num_given:
            raise UserError("images need input_ids: their placeholders say where the image tokens belong")
        if pixel_values is not None or vision_features is not None:
            encoded = self.get_image_features(pixel_values, image_sizes, vision_features)

        image_features = None
        if inputs_embeds is None:
            placeholders = input_ids == self.config.image_token_id
            # The placeholder's id may lie outside the embedding matrix; what is looked up there is overwritten.
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(placeholders, 0))
            if encoded is not None:
                image_features = torch.cat(encoded.pooler_output, dim=0).to(inputs_embeds)
                inputs_embeds = _insert_image_features(inputs_embeds, placeholders, image_features)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return LlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
        )


def _insert_image_features(inputs_embeds: Tensor, placeholders: Tensor, image_features: Tensor) -> Tensor:
    """Put image tokens (total, width) at the True positions of `placeholders` (batch, length), in row-major order."""
    num_placeholders = int(placeholders.sum())
    if num_placeholders == 0:
        return inputs_embeds + image_features.sum() * 0.0
    if num_placeholders != image_features.shape[0]:
        raise UserError(
            f"the batch has {num_placeholders} image placeholders, but its images give {image_features.shape[0]} tokens"
        )
    return inputs_embeds.masked_scatter(placeholders.unsqueeze(-1), image_features)


class LlavaSaepForConditionalGeneration(LlavaStyleGeneration, LlavaSaepPreTrainedModel, LlavaForConditionalGeneration):
    """The model that is trained, saved and talked to.

    Attributes:
        quantization: how the language model has been rounded (`quantize_language_model`); None: not at all.
    """

    quantization: QuantizationConfig | None = None

    def __init__(self, config: LlavaSaepConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.model = LlavaSaepModel(config)
        self.lm_head = LanguageModelHead(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Save as transformers does, under this model's own names however the weights were gathered.

        Raises:
            UserError: the language model is quantised; its rounded weights would be no model that loads.
        """
        if self.quantization is not None:
            raise UserError(
                f"{save_directory}: a language model in {self.quantization.bits} bits is not saved; load the model "
                "without quantisation and save that, or use `llava-saep convert`"
            )
        # transformers would rename them as its first Llava did where the model was read from a state dict.
        super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Put another head in place, as the library does when it changes the vocabulary's size."""
        is_head = isinstance(new_embeddings, LanguageModelHead)
        self.lm_head = new_embeddings if is_head else LanguageModelHead.like(new_embeddings)

    def get_image_features(
        self,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        image_sizes: Tensor | None = None,
        vision_features: VisionFeatures | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """See `LlavaSaepModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_sizes, vision_features)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        vision_features: VisionFeatures | None = None,
        logits_at_labels: bool = False,
        **kwargs,
    ) -> LlavaCausalLMOutputWithPast:
        """Return logits, or the loss when `labels` are given.

        In training mode with labels, `logits` is None: the head is applied at supervised positions alone, because the
        logits of image and prompt tokens are most of the memory and are ignored anyway.

        Args:
            labels: (batch, length), IGNORE_INDEX where there is nothing to learn; position i is predicted from i - 1.
            num_items_in_batch: supervised tokens of the whole optimizer step; the loss is the sum divided by it, so
                that the result does not depend on how samples fall to ranks and micro-batches. None: this batch's mean.
            logits_at_labels: return no loss, and as `logits` those that predict a label, (labels, vocabulary) in
                row-major order.
            logits_to_keep: keep the last so many positions' logits (0: all), as in transformers.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            vision_features=vision_features,
            **kwargs,
        )
        loss = logits = None
        if logits_at_labels:
            at_labels = outputs.last_hidden_state[:, :-1][labels[:, 1:] != IGNORE_INDEX]
            logits = self.lm_head(at_labels, softcap=self._softcap)
        elif labels is not None and self.training:
            loss = self._supervised_loss(outputs.last_hidden_state, labels, num_items_in_batch)
        else:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(outputs.last_hidden_state[:, keep], softcap=self._softcap)
            if labels is not None:
                loss = _logits_loss(logits, labels, num_items_in_batch)
        return LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    @property
    def _softcap(self) -> float | None:
        return getattr(self.config.text_config, "final_logit_softcapping", None)  # Gemma 2

    def _supervised_loss(self, hidden_states: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        """Apply the head where there is a target, some positions at a time.

        A batch without a single target gives 0, not NaN, and keeps the head in the graph.
        """
        targets = labels[:, 1:]
        is_target = targets != IGNORE_INDEX
        total = self.lm_head(hidden_states[:, :-1][is_target], targets[is_target], softcap=self._softcap)
        return total / _num_targets(targets, num_items)


def _logits_loss(logits: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
    """Cross-entropy in float32 of logits (batch, length, vocabulary), the prediction of each position's next label."""
    targets = labels[:, 1:]
    total = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    return total / _num_targets(targets, num_items)


def _num_targets(targets: Tensor, num_items: Tensor | int | None) -> Tensor:
    """What a summed loss is divided by: `num_items`, or the number of targets when None; at least 1."""
    if num_items is None:
        num_items = (targets != IGNORE_INDEX).sum()
    return torch.as_tensor(num_items, device=targets.device).clamp(min=1)
