"""What lmms-eval is told of this package: the entry point of its group `lmms_eval.models`.

lmms-eval is imported only when it asks, since it is no dependency: it pins libraries that this package must not pin,
and lives in an environment of its own (docs/evaluation.md).
"""

from typing import Any

MODEL_ID = "llava_saep"
_MODELS = "llava_saep.evaluation.lmms_eval_models"


def manifest() -> Any:
    """lmms-eval's description of the model: the name for `--model`, and a class for each of its two interfaces."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id=MODEL_ID,
        simple_class_path=f"{_MODELS}.LlavaSaepSimple",
        chat_class_path=f"{_MODELS}.LlavaSaepChat",
    )
