"""LLaVA with exchangeable projectors: train, compare and serve.

Importing the package registers `llava_saep` with transformers' Auto classes; it does nothing else. LLaVA's own names
are here too, for code that was written against it; what they need is imported when one is asked for.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

from llava_saep.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IGNORE_INDEX,
    IMAGE_PLACEHOLDER,
    IMAGE_TOKEN_INDEX,
)
from llava_saep.model import LlavaSaepConfig, LlavaSaepForConditionalGeneration, LlavaSaepProcessor

_FROM_LLAVA = {
    "load_pretrained_model": "llava_saep.model.builder",
    "process_images": "llava_saep.mm_utils",
    "tokenizer_image_token": "llava_saep.mm_utils",
    "get_model_name_from_path": "llava_saep.mm_utils",
    "KeywordsStoppingCriteria": "llava_saep.mm_utils",
    "conv_templates": "llava_saep.conversation",
    "default_conversation": "llava_saep.conversation",
    "SeparatorStyle": "llava_saep.conversation",
}
"""LLaVA's names, and the modules that they come from."""

__all__ = [
    "DEFAULT_IMAGE_PATCH_TOKEN",
    "DEFAULT_IMAGE_TOKEN",
    "DEFAULT_IM_END_TOKEN",
    "DEFAULT_IM_START_TOKEN",
    "IGNORE_INDEX",
    "IMAGE_PLACEHOLDER",
    "IMAGE_TOKEN_INDEX",
    "LlavaSaepConfig",
    "LlavaSaepForConditionalGeneration",
    "LlavaSaepProcessor",
    "__version__",
    *_FROM_LLAVA,
]


def __getattr__(name: str) -> Any:
    if name not in _FROM_LLAVA:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_FROM_LLAVA[name]), name)
