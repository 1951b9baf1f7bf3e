"""What a training run is told, as frozen values: `llava_saep.arguments` makes them from LLaVA's flags.

Nothing here touches a device, a file or another process, so a command line can be checked anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llava_saep.data.dataset import OnBadSample, OnTooLong
from llava_saep.data.images import AspectRatio, GridPinpoints
from llava_saep.model.anyres import PatchMergeType
from llava_saep.model.quantization import QuantizationConfig
from llava_saep.train.stage_presets import PresetUse
from projectors import ProjectorSelection

TRAINABLE_PARTS = ("vision_tower", "projector", "token_embedding", "language_model", "lora")
"""What a run can train. With `language_model` its token embedding learns too; `lora` stands for adapters on a language
model whose own weights stay as they are."""

TrainablePart = Literal["vision_tower", "projector", "token_embedding", "language_model", "lora"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which pretrained parts the model is made of.

    Args:
        language_model: `--model_name_or_path`; a language model, or a model that this project saved.
        vision_tower: `--vision_tower`; None only where `language_model` is a saved model that names its own.
        default_vision_tower: a stage preset's, for a language model that no tower is named for.
        projector: the projector to train with.
        keeps_saved_projector: no flag names a projector, so that a saved model's own takes precedence.
        named_layers: `--mm_vision_select_layer`, also where the projector combines several and does not apply it.
        projector_weights: `--pretrain_mm_mlp_adapter`: stage 1's output, a file or its folder.
        mm_patch_merge_type: how the crops of an image are put together; None: flat, or as a saved model does.
        image_grid_pinpoints: sizes that an image may be brought to before it is cut; (): a saved model's, or
            LLaVA-1.6's arrangements of the tower's input.
        use_im_start_end: `--mm_use_im_start_end`; None: as a saved model does, else not.
        attn_implementation: of the language model; None: segment by segment where it can, else as transformers chooses.
        quantization: how the language model, which is then frozen, is rounded; None: not at all.
        hub_cache: `--cache_dir`: where models that are named as on the hub are kept; None: as HF_HOME says.
    """

    language_model: str
    vision_tower: str | None
    projector: ProjectorSelection
    default_vision_tower: str | None = None
    keeps_saved_projector: bool = False
    named_layers: tuple[int, ...] = ()
    projector_weights: str | None = None
    mm_patch_merge_type: PatchMergeType | None = None
    image_grid_pinpoints: GridPinpoints = ()
    use_im_start_end: bool | None = None
    attn_implementation: str | None = None
    trust_projector_code: bool = False
    quantization: QuantizationConfig | None = None
    hub_cache: str | None = None

    @property
    def tower_for_language_model(self) -> str | None:
        """The tower that goes with a bare language model; a saved model brings its own."""
        return self.vision_tower or self.default_vision_tower


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which records are trained on, and how they become tokens.

    Args:
        conversation_template: a name of `llava_saep.data.templates`.
        apply_exif_orientation: turn images as their EXIF tags say; LLaVA does not.
        jpeg_draft: decode JPEGs at a reduced scale where the resize allows it; pixels then differ slightly.
        cache_vision_features: folder for what the frozen tower sees in each image; None: it looks every time.
        max_length: tokens of one sample, image tokens included.
        packing: several whole conversations share a row of at most `max_length` tokens.
        on_bad_sample: what a record does that is found to be unusable before training.
        on_bad_image: what an image does that is found damaged while training.
        on_too_long: what becomes of a sample of more than `max_length` tokens.
        precheck_images: decode every image before training.
        eval_data_path: held-out records; None: no held-out loss.
        eval_image_folder: what their images are relative to.
    """

    data_path: str
    image_folder: str | None
    image_aspect_ratio: AspectRatio = "square"
    apply_exif_orientation: bool = False
    jpeg_draft: bool = False
    cache_vision_features: str | None = None
    conversation_template: str = "v1"
    max_length: int = 512
    packing: bool = False
    on_bad_sample: OnBadSample = "error"
    on_bad_image: OnBadSample = "skip"
    on_too_long: OnTooLong = "truncate"
    precheck_images: bool = False
    eval_data_path: str | None = None
    eval_image_folder: str | None = None


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on the linear layers of the language model (Hu et al., 2021)."""

    rank: int = 64
    alpha: float = 16
    dropout: float = 0.05
    bias: Literal["none", "all", "lora_only"] = "none"


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How the model is trained.

    Args:
        trainable: parts whose weights change.
        lora: present exactly if `trainable` holds "lora".
        projector_learning_rate: `--mm_projector_lr`; None: as the rest.
        save_total_limit: checkpoints kept; None: all.
        resume: "auto" (newest complete checkpoint in output_dir, if any), "never", or the path of one.
        preset: what `--stage` set among these values.
        on_nan_loss: whether a loss that is no finite number ends the run, or costs its optimizer step.
        liger_kernels: `--use_liger_kernel`: Liger's norms, rotary embeddings and MLPs in the language model.
        trainer_arguments: keyword arguments of transformers.TrainingArguments, as given on the command line.
    """

    output_dir: str
    trainable: frozenset[TrainablePart]
    lora: LoraConfig | None = None
    projector_learning_rate: float | None = None
    group_by_modality_length: bool = False
    save_total_limit: int | None = None
    resume: str = "auto"
    preset: PresetUse | None = None
    on_nan_loss: Literal["stop", "skip"] = "stop"
    liger_kernels: bool = False
    trainer_arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert ("lora" in self.trainable) == (self.lora is not None)
        assert not {"lora", "language_model"} <= self.trainable


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run."""

    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
