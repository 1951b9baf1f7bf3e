"""A loaded model as the runner needs it, and what of it has a say in its answers."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from llava_saep.errors import UserError
from llava_saep.evaluation import ranks
from llava_saep.evaluation.fingerprints import model_fingerprint, text_fingerprint
from llava_saep.evaluation.image_loading import open_image
from llava_saep.evaluation.runner import Asking, BadImagePolicy, PromptLengths, question_messages
from llava_saep.evaluation.tasks import EmbeddedImage, TaskQuestion
from llava_saep.evaluation.tasks._base import ImageSource

if TYPE_CHECKING:
    from llava_saep.generation import GenerationOptions, Predictor
    from llava_saep.model.hf_format import HfFolder
    from llava_saep.model.llava_format import LlavaFolder
    from llava_saep.model.loading import SavedFolder
    from llava_saep.model.quantization import QuantizationConfig

logger = logging.getLogger(__name__)

_NO_IMAGE = Path("image")
"""Stands for an image where only the text around it is wanted."""


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which model answers, and how it is loaded; fields as in `Predictor.from_pretrained`."""

    path: Path
    model_id: str
    base: str | None = None
    template: str | None = None
    device: str | None = None
    quantization: QuantizationConfig | None = None
    trust_projector_code: bool = False


@dataclass(frozen=True, kw_only=True)
class AskedModel:
    """A loaded model, and where it came from."""

    choice: ModelChoice
    predictor: Predictor
    fingerprint: str

    @classmethod
    def load(cls, choice: ModelChoice) -> AskedModel:
        """Load the model on this rank's device.

        Raises:
            UserError, ProjectorError: the folder is absent, or see `Predictor.from_pretrained`.
        """
        from llava_saep.generation import Predictor

        if not choice.path.is_dir():
            raise UserError(f"{choice.path}: no such folder; --model-path names what training wrote (its --output_dir)")
        predictor = Predictor.from_pretrained(
            choice.path,
            device=ranks.device_of_rank(choice.device),
            trust_projector_code=choice.trust_projector_code,
            model_base=choice.base,
            template=choice.template,
            quantization=choice.quantization,
        )
        fingerprint = ranks.from_rank_zero(lambda: fingerprint_with_parts(choice.path, choice.base))
        return cls(choice=choice, predictor=predictor, fingerprint=fingerprint)

    def answer_options(self, limit: int | None, default: int, description: str) -> GenerationOptions:
        """Greedy decoding with a limit that suits the model's context.

        Args:
            limit: what the user asks for, which is kept where it leaves any room for a prompt: a question that does
                not fit beside it is left out and reported. None: `default`, halved until it is at most half of the
                context.
            description: of what is asked.
        """
        from llava_saep.generation import GenerationOptions

        options, context = GenerationOptions(max_new_tokens=limit or default), self.predictor.context_length
        if limit is not None and (context is None or limit < context):
            return options
        return fit_to_context(options, self.predictor, description)

    def asking(
        self,
        options: GenerationOptions,
        *,
        batch_size: int,
        blind: bool = False,
        on_bad_image: BadImagePolicy = "exclude",
    ) -> Asking:
        """How this model is asked with some decoding options."""
        return Asking(
            generate_batch=partial(self.predictor.generate, options=options),
            batch_size=batch_size,
            blind=blind,
            open_image=partial(_open_for, self.predictor),
            prompt_lengths=prompt_lengths_of(self.predictor, blind=blind),
            on_bad_image=on_bad_image,
        )

    def describe(self) -> dict[str, Any]:
        """The model, JSON-able: where it is, what it is, how it runs."""
        model = self.predictor.model
        return {
            "id": self.choice.model_id,
            "path": str(self.choice.path),
            "base": self.choice.base,
            "fingerprint": self.fingerprint,
            "projector": dict(model.config.projector),
            "tokens_per_image": self.predictor.num_image_tokens,
            "dtype": str(model.dtype).removeprefix("torch."),
            "bits": None if self.choice.quantization is None else self.choice.quantization.bits,
            "device": str(model.device),
        }

    def describe_prompt(self, example: TaskQuestion | None) -> dict[str, Any]:
        """The template, and the first prompt as the model is given it, `<image>` standing for an image's tokens."""
        return {
            "template": self.predictor.template.name,
            "example": None if example is None else self.predictor.prompt_text(_without_pixels(example)),
        }

    def describe_preprocessing(self) -> dict[str, Any]:
        """What becomes of an image before the tower sees it."""
        from llava_saep.data.images import processed_image_size

        processor = self.predictor.processor
        image_processor = processor.image_processor
        return {
            "aspect_ratio": processor.image_aspect_ratio,
            "size": list(processed_image_size(image_processor)),
            "mean": list(image_processor.image_mean),
            "std": list(image_processor.image_std),
            "patch_merge_type": processor.mm_patch_merge_type,
            "grid_pinpoints": processor.image_grid_pinpoints,
            "applies_exif_orientation": processor.apply_exif_orientation,
        }

    def answers_fingerprint(self, options: GenerationOptions) -> str:
        """Changes with whatever changes answers, so that answers made otherwise are not taken for these."""
        facts = [
            {key: value for key, value in self.describe().items() if key not in ("id", "path", "base", "device")},
            self.predictor.template.name,
            self.describe_preprocessing(),
            dataclasses.asdict(options),
        ]
        return text_fingerprint(facts)


def fit_to_context(options: GenerationOptions, predictor: Predictor, description: str) -> GenerationOptions:
    """Shorten answers for a model with a short context (`Predictor.fit`), and say so: the answers may end early.

    Args:
        description: of what is asked.
    """
    fitted = predictor.fit(options)
    if fitted != options:
        logger.warning(
            "%s: answers of up to %d tokens are more than half of the model's context of %d; %d are allowed",
            description,
            options.max_new_tokens,
            predictor.context_length,
            fitted.max_new_tokens,
        )
    return fitted


def prompt_lengths_of(predictor: Predictor, *, blind: bool = False) -> PromptLengths:
    """How many tokens prompts have, images included, to within a few; of image files no more than the head is read."""
    processor = predictor.processor

    def count(texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in processor.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def lengths(questions: Sequence[TaskQuestion]) -> list[int]:
        if not questions:
            return []
        # The template adds the same to all of them, so it is rendered once: a benchmark may have 400,000 questions.
        example = predictor.prompt_text(_without_pixels(questions[0], blind=blind))
        template_tokens = count([example])[0] - count([questions[0].text])[0]
        images = [() if blind else question.images for question in questions]
        num_image_tokens = _image_token_counter(predictor)
        return [
            template_tokens + num_text_tokens + sum(map(num_image_tokens, own))
            for num_text_tokens, own in zip(count([question.text for question in questions]), images, strict=True)
        ]

    return lengths


def _image_token_counter(predictor: Predictor) -> Callable[[ImageSource], int]:
    from llava_saep.data.images import processed_image_size, read_image_size

    processor, tokens_per_view = predictor.processor, predictor.num_image_tokens
    view, image_tokens = processed_image_size(processor.image_processor), processor.image_tokens

    def count(image: ImageSource) -> int:
        # The size of one in a table is not known without decoding it, and lengths are for sorting alone.
        if processor.image_aspect_ratio != "anyres" or isinstance(image, EmbeddedImage):
            return tokens_per_view
        try:
            size = read_image_size(image, apply_exif_orientation=processor.apply_exif_orientation)
        except UserError:
            return 0  # reported when it is to be opened
        return image_tokens.num_tokens(size, view)

    return count


def _without_pixels(question: TaskQuestion, *, blind: bool = False) -> list[dict[str, Any]]:
    return question_messages(question, [] if blind else [_NO_IMAGE] * len(question.images))


def _open_for(predictor: Predictor, source: ImageSource) -> Image.Image:
    """As the model's processor would open it: upright where the training data were."""
    if isinstance(source, EmbeddedImage):
        return predictor.processor.load_images([open_image(source)])[0]
    return predictor.processor.load_images([source])[0]


def local_base(folder: Path, given: str | None) -> Path | None:
    """The folder here of the language model (or LLaVA model) that a saved projector or adapter belongs to.

    Args:
        given: what the user names as the base.
    Returns:
        None for a whole model, and for a base that is fetched from the hub.
    Raises:
        UserError, ProjectorError: as `inspect_folder`.
    """
    from llava_saep.model.loading import inspect_folder

    return _local_base(inspect_folder(folder, model_base=given))


def _local_base(saved: SavedFolder | LlavaFolder | HfFolder) -> Path | None:
    named = None if saved.kind == "full" else saved.config.language_model_name_or_path
    return Path(named) if named and Path(named).is_dir() else None


def _local_towers(saved: SavedFolder | LlavaFolder | HfFolder) -> list[Path]:
    """Folders here of vision towers whose weights a saved folder leaves out, as LLaVA's own whole models do."""
    from llava_saep.model.combined_towers import split_tower_names
    from llava_saep.model.llava_format import LlavaFolder

    named = saved.config.vision_tower_name_or_path
    if named is None or (saved.kind == "full" and not isinstance(saved, LlavaFolder)):
        return []
    return [path for path in map(Path, split_tower_names(named)) if path.is_dir()]


def fingerprint_with_parts(folder: Path, given: str | None = None) -> str:
    """Of a saved model, and of the language model and vision towers here that it is completed from.

    Parts that are fetched from the hub are taken for what their names say.

    Args:
        given: what the user names as the base.
    Raises:
        UserError, ProjectorError: as `inspect_folder`.
    """
    from llava_saep.model.loading import inspect_folder

    saved = inspect_folder(folder, model_base=given)
    base = _local_base(saved)
    parts = [folder, *([] if base is None else [base]), *_local_towers(saved)]
    return "+".join(map(model_fingerprint, parts))
