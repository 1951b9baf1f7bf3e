"""Liger kernels (fused norms, rotary embeddings and MLPs in Triton) for the language model, where they are installed.

transformers' own `--use_liger_kernel` looks for kernels by the type of the whole model, which Liger does not know, and
goes on without any. Loss and head are this project's own and stay so.
"""

from __future__ import annotations

import importlib.util
import logging

from transformers import PreTrainedModel

from llava_saep.errors import UserError

logger = logging.getLogger(__name__)

_OWN_PARTS = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def require_liger() -> None:
    """Stop where the package is missing.

    Raises:
        UserError: it is.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError(
            "--use_liger_kernel True: the package liger-kernel is not installed; pip install liger-kernel (it needs "
            "Triton and a GPU), or drop the flag"
        )


def use_liger_kernels(language_model: PreTrainedModel) -> None:
    """Put Liger's kernels in place of a language model's norms, rotary embeddings and MLPs.

    Raises:
        UserError: the package is missing, or has no kernels for this type of model.
    """
    require_liger()
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # what transformers' integration calls
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    model_type = language_model.config.model_type
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = ", ".join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))
        raise UserError(f"--use_liger_kernel True: Liger has no kernels for {model_type}, only for {known}")
    _apply_liger_kernel_to_instance(model=language_model, **_OWN_PARTS)
    logger.info("Liger kernels in the language model (%s)", model_type)
