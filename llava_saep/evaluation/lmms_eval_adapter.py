"""What lmms-eval is told of this package, and how its requests become messages: what needs no lmms-eval itself.

lmms-eval is imported only when it asks, since it is no dependency: it pins libraries that this package must not pin,
and lives in an environment of its own (docs/evaluation.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from llava_saep.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava_saep.errors import UserError

if TYPE_CHECKING:
    from llava_saep.generation import GenerationOptions

Message = dict[str, Any]
DEFAULT_MAX_NEW_TOKENS = 1024
"""Where a task names no limit; lmms-eval's models take this one."""
MODEL_ID = "llava_saep"
_MODELS = "llava_saep.evaluation.lmms_eval_models"


def manifest() -> Any:
    """The entry point of lmms-eval's group `lmms_eval.models`: a name for `--model`, a class for each interface."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id=MODEL_ID,
        simple_class_path=f"{_MODELS}.LlavaSaepSimple",
        chat_class_path=f"{_MODELS}.LlavaSaepChat",
    )


def batches_of(requests: Sequence[Any], batch_size: int) -> list[list[int]]:
    """Indices of requests that are answered together: one task, equal settings, longest prompts first.

    Args:
        requests: lmms-eval's `Instance`s.
    """

    def settings_of(request: Any) -> str:
        return repr((request.task_name, sorted((k, v) for k, v in _settings(request).items())))

    groups: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(settings_of(request), []).append(index)
    batches = []
    for indices in groups.values():
        indices.sort(key=lambda index: -len(requests[index].args[0]))
        batches += [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    return batches


def _settings(request: Any) -> Mapping[str, Any]:
    return next(argument for argument in request.args if isinstance(argument, Mapping))


def generation_options(settings: Mapping[str, Any]) -> GenerationOptions:
    """Read a task's `generation_kwargs`; what it leaves open is greedy."""
    from llava_saep.generation import GenerationOptions  # brings transformers, for which a list of models cannot wait

    temperature = float(settings.get("temperature") or 0.0)
    if settings.get("do_sample") is False:
        temperature = 0.0
    return GenerationOptions(
        max_new_tokens=int(settings.get("max_new_tokens") or DEFAULT_MAX_NEW_TOKENS),
        temperature=temperature,
        top_p=float(settings.get("top_p") or 1.0),
        num_beams=int(settings.get("num_beams") or 1),
    )


def marked_content(context: str, images: Sequence[Any]) -> list[dict[str, Any]]:
    """The content of a message: images where the text says `<image>`, or before it where it says so nowhere.

    Raises:
        UserError: the text says it, but not as often as there are images.
    """
    from llava_saep.generation.messages import content_with_placeholders

    if not images:
        return [{"type": "text", "text": context}]
    return content_with_placeholders(context.replace(DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER), images)


def ordered_message(message: Message) -> Message:
    """The same message; images that stand after or between texts stay there, each part on a line of its own."""
    parts = message["content"]
    num_images = sum(part["type"] == "image" for part in parts)
    if all(part["type"] == "image" for part in parts[:num_images]):
        return message
    placed: list[dict[str, Any]] = []
    for part in parts:
        if placed:
            placed.append({"type": "text", "text": "\n"})
        placed.append({**part, "in_place": True} if part["type"] == "image" else part)
    return {**message, "content": placed}


def checked_image(image: Any, task: str) -> Any:
    """The image itself.

    Raises:
        UserError: it is something else, such as a video's frames or a sound.
    """
    if not isinstance(image, Image.Image | str):
        raise UserError(
            f"task {task} gives a {type(image).__name__}; llava_saep sees images (PIL, or the path of a file)"
        )
    return image
