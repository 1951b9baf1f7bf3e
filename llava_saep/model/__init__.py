"""The multimodal model: transformers' Llava with the projector taken from the registry."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from llava_saep.model.combined_towers import CombinedVisionConfig, CombinedVisionTowers
from llava_saep.model.configuration_llava_saep import LlavaSaepConfig
from llava_saep.model.modeling_llava_saep import LlavaSaepForConditionalGeneration, LlavaSaepModel
from llava_saep.model.processing_llava_saep import LlavaSaepProcessor

AutoConfig.register(CombinedVisionConfig.model_type, CombinedVisionConfig)
AutoModel.register(CombinedVisionConfig, CombinedVisionTowers)
AutoConfig.register(LlavaSaepConfig.model_type, LlavaSaepConfig)
AutoModelForImageTextToText.register(LlavaSaepConfig, LlavaSaepForConditionalGeneration)
AutoProcessor.register(LlavaSaepConfig, LlavaSaepProcessor)

__all__ = ["LlavaSaepConfig", "LlavaSaepForConditionalGeneration", "LlavaSaepModel", "LlavaSaepProcessor"]
