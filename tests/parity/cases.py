"""How each original's options, as the reference data names them, are said to our projectors.

A projector that gains reference data gains one entry here; a case without an entry is reported as skipped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REFERENCE_FOLDER = Path(os.environ.get("LLAVA_SAEP_GOLDEN") or Path(__file__).parents[1] / "golden" / "projectors")


@dataclass(frozen=True)
class Case:
    """A spelling of ours, its options from the original's, and the agreement to ask for.

    1e-5 absolute at these scales for linear and convolution modules (float32, same order of operations), 1e-4 where
    attention sums in another order.
    """

    spelling: str
    options: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda original: {}
    tolerance: float = 1e-5


def _c_abstractor_options(original: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_queries": original["num_query_tokens"],
        "depth": original["depth"],
        "hidden_size": original["hidden_size"],
        "position_grid": [original["grid"], original["grid"]],
    }


def _qformer_options(original: Mapping[str, Any]) -> dict[str, Any]:
    names = ("num_queries", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    return {name: original[name] for name in names}


CASES = {
    "linear": Case("linear"),
    "mlp2x_gelu": Case("mlp2x_gelu"),
    "mlp3x_gelu": Case("mlp3x_gelu"),
    "deco": Case("deco", lambda original: {"num_queries": original["query_num"]}),
    "c_abstractor": Case("c_abstractor", _c_abstractor_options),
    "qformer": Case("qformer", _qformer_options, tolerance=1e-4),
}
