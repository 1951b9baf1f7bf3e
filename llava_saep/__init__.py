"""LLaVA with exchangeable projectors: train, compare and serve.

Importing the package registers `llava_saep` with transformers' Auto classes; it does nothing else.
"""

__version__ = "0.1.0"

from llava_saep.model import LlavaSaepConfig, LlavaSaepForConditionalGeneration, LlavaSaepProcessor

__all__ = ["LlavaSaepConfig", "LlavaSaepForConditionalGeneration", "LlavaSaepProcessor", "__version__"]
