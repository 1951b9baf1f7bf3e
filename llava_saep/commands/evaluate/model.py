"""Which model answers, and where its answers go, as the flags say."""

import argparse
from pathlib import Path

from llava_saep.evaluation.asking import ModelChoice


def chosen_model(arguments: argparse.Namespace) -> ModelChoice:
    """The model that the flags name; fetched where it is one of the hub.

    Raises:
        UserError: it cannot be had, or two ways of rounding are asked for.
    """
    from llava_saep.model.hub import local_folder
    from llava_saep.model.quantization import QuantizationConfig

    path = Path(arguments.model_path).expanduser()
    return ModelChoice(
        path=local_folder(path),
        model_id=path.resolve().name if path.exists() else path.name,
        base=arguments.model_base,
        template=arguments.conv_mode,
        device=arguments.device,
        quantization=QuantizationConfig.for_loading(load_4bit=arguments.load_4bit, load_8bit=arguments.load_8bit),
        trust_projector_code=arguments.trust_projector_code,
    )


def chosen_output_dir(arguments: argparse.Namespace) -> Path:
    """Where answers and reports go."""
    from llava_saep.model.hub import is_hub_name

    if arguments.output_dir:
        return Path(arguments.output_dir).expanduser()
    path = Path(arguments.model_path).expanduser()
    # Beside a model of the hub nobody would find the answers.
    return Path("evaluation") / path.name if is_hub_name(path) else path / "evaluation"
