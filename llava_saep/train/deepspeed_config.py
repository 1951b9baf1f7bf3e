"""DeepSpeed's settings: where the file is found, what is completed in it, and what in it contradicts the flags."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from llava_saep.errors import UserError
from llava_saep.model.quantization import QuantizationConfig

logger = logging.getLogger(__name__)

_GATHER_ON_SAVE = "stage3_gather_16bit_weights_on_model_save"


def find_deepspeed_config(path: str) -> Path:
    """Find DeepSpeed's JSON file; LLaVA's `./scripts/zero2.json` is taken from deepspeed_configs/ where it is missing.

    Raises:
        UserError: there is no such file.
    """
    found = Path(path)
    if not found.is_file():
        ours = Path(__file__).resolve().parents[2] / "deepspeed_configs" / found.name
        if not ours.is_file():
            raise UserError(f"--deepspeed {path}: no such file; deepspeed_configs/ holds zero1.json, zero2.json, ...")
        _warn_of_deepspeed_config_used(path, ours)
        found = ours
    return found


@functools.cache  # the file is looked for when the flags are checked, and when it is read
def _warn_of_deepspeed_config_used(given: str, found: Path) -> None:
    logger.warning("--deepspeed %s: no such file, using %s", given, found)


def read_deepspeed_config(value: str | Mapping[str, Any]) -> dict[str, Any]:
    """Read what `--deepspeed` gives: a file, or the JSON itself.

    Raises:
        UserError: there is no such file, or it holds no JSON object with settings.
    """
    if isinstance(value, Mapping):
        return dict(value)
    is_json = value.lstrip().startswith("{")
    shown = "--deepspeed" if is_json else f"--deepspeed {value}"
    try:
        config = json.loads(value if is_json else find_deepspeed_config(value).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{shown}: not valid JSON: {error}") from error
    if not isinstance(config, dict) or not config:
        raise UserError(
            f"{shown}: holds {json.dumps(config)[:80]}; expected a JSON object with DeepSpeed's settings, such as "
            "deepspeed_configs/zero2.json, or no --deepspeed to train without it"
        )
    return config


def refuse_partitioning(settings: Mapping[str, Any], quantization: QuantizationConfig) -> None:
    """Stop at ZeRO-3, which would split the language model while it is loaded, before it is quantised.

    Raises:
        UserError: DeepSpeed's config asks for stage 3.
    """
    if settings.get("zero_optimization", {}).get("stage") == 3:
        raise UserError(
            f"--bits {quantization.bits} does not work under ZeRO-3 (--deepspeed), which would split quantised weights "
            "among the ranks; use deepspeed_configs/zero2.json, or --bits 16"
        )


def complete_deepspeed_config(config: dict[str, Any]) -> dict[str, Any]:
    """Have ZeRO-3 put the weights together when it saves; what it writes otherwise is no model that loads."""
    zero = config.get("zero_optimization", {})
    if zero.get("stage") != 3 or zero.get(_GATHER_ON_SAVE):
        return config
    logger.warning(
        "--deepspeed: zero_optimization.%s is set to true, so that the saved model is whole", _GATHER_ON_SAVE
    )
    return {**config, "zero_optimization": {**zero, _GATHER_ON_SAVE: True}}


def check_deepspeed_agrees(arguments: TrainingArguments) -> None:
    """Refuse a DeepSpeed config that says otherwise than the flags; the Trainer would, but much later.

    Raises:
        UserError: names each setting and flag that differ.
    """
    # transformers makes the config's attribute only where there is a config
    if not arguments.deepspeed or not arguments.hf_deepspeed_config.mismatches:
        return
    differences = "; ".join(line.removeprefix("- ds ") for line in arguments.hf_deepspeed_config.mismatches)
    differences = differences.replace(" vs hf ", " against --")
    raise UserError(f'--deepspeed contradicts the flags: {differences}; write "auto" there to have the flags decide')
