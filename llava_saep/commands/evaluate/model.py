"""Which model answers, and where its answers go, as the flags say."""

import argparse
import sys
from pathlib import Path

from llava_saep.errors import UserError
from llava_saep.evaluation.asking import ModelChoice, local_base


def chosen_model(arguments: argparse.Namespace) -> ModelChoice:
    """The model that the flags name; fetched where it is one of the hub.

    Raises:
        UserError: it cannot be had, or two ways of rounding are asked for.
    """
    import torch

    from llava_saep.model.hub import local_folder
    from llava_saep.model.quantization import QuantizationConfig
    from llava_saep.train import distributed

    hint = idle_gpus_hint(arguments.device, torch.cuda.device_count(), distributed.world_size())
    if hint:
        print(hint, file=sys.stderr)
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


def idle_gpus_hint(device: str | None, num_gpus: int, num_ranks: int) -> str:
    """How to use all GPUs of this machine, where one process would leave some idle; else empty."""
    if device is not None or num_ranks > 1 or num_gpus < 2:
        return ""
    return (
        f"one of {num_gpus} GPUs is used; all are by: torchrun --nproc_per_node {num_gpus} -m "
        "llava_saep.commands.evaluate, with the same flags"
    )


def chosen_output_dir(arguments: argparse.Namespace) -> Path:
    """Where answers and reports go.

    Raises:
        UserError: that is the model's own folder or its base's, whose files tell whether answers are this model's; or
            the folder holds no model.
    """
    from llava_saep.model.hub import is_hub_name
    from llava_saep.model.projector_selection import trusting_projector_code

    path = Path(arguments.model_path).expanduser()
    # Beside a model of the hub nobody would find the answers.
    usual = Path("evaluation") / path.name if is_hub_name(path) else path / "evaluation"
    if not arguments.output_dir:
        return usual
    output_dir = Path(arguments.output_dir).expanduser()
    with trusting_projector_code(arguments.trust_projector_code):
        base = _find_base(path, arguments.model_base)
    for folder, whose in ((path, "the model's own folder"), (base, "the folder of the model's base")):
        if folder is not None and output_dir.resolve() == folder.resolve():
            raise UserError(
                f"--output-dir {output_dir} is {whose}, where reports would pass for parts of a model; name another "
                f"one, or none: then it is {usual}"
            )
    return output_dir


def _find_base(path: Path, given: str | None) -> Path | None:
    """As `local_base`; of a model that has not been fetched yet the one that is given."""
    if path.is_dir():
        return local_base(path, given)
    return Path(given).expanduser() if given else None
