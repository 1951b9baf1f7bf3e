"""How each original's options, as the reference data names them, are said to our projectors.

A projector that gains reference data gains one entry in CASES; reference data that no entry claims fails its test. The
same original in other sizes is claimed by the words of its name: `c_abstractor_12x12` by `c_abstractor`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from projectors import PatchGrid

_GOLDEN = Path(os.environ.get("LLAVA_SAEP_GOLDEN") or Path(__file__).parents[1] / "golden")
REFERENCE_FOLDER = _GOLDEN / "projectors" if (_GOLDEN / "projectors").is_dir() else _GOLDEN

Options = Mapping[str, Any]

_ATTENTION = 1e-4
_NUM_QUERIES = ("num_queries", "num_query_tokens", "query_num", "latents", "num_latents")
_DEPTH = ("depth", "layers", "num_layers", "decoder_layers", "num_hidden_layers")
_FACTOR = ("factor", "scale_factor", "spatial_merge_size", "mp_pixel_shuffle_factor")


@dataclass(frozen=True)
class Case:
    """A spelling of ours, its options from the original's, and the agreement to ask for.

    1e-5 absolute at these scales for linear and convolution modules (float32, same order of operations), 1e-4 where
    attention sums in another order. `reads_hidden_states` says that the inputs are all hidden states of a tower, from
    which the projector takes its layers, and not the layers themselves.
    """

    spelling: str
    options: Callable[[Options], dict[str, Any]] = lambda original: {}
    tolerance: float = 1e-5
    reads_hidden_states: bool = False


def grid_of(original: Options) -> PatchGrid:
    """`grid` is the side of a square, or height and width."""
    grid = original["grid"]
    return PatchGrid(grid, grid) if isinstance(grid, int) else PatchGrid(*grid)


def complete_options(reference: Mapping[str, Any]) -> dict[str, Any]:
    """The original's options as stated; sizes left at its defaults as its output and its weights show them."""
    options, keys = dict(reference["options"]), [key for key, *_ in reference["parameters"]]
    layers = {found.group(1) for key in keys if (found := re.search(r"(?:^|\.)layers\.(\d+)\.", key))}
    if not any(name in options for name in _NUM_QUERIES):
        options["num_queries"] = reference["output"][1]
    if layers and not any(name in options for name in _DEPTH):
        options["depth"] = len(layers)
    options["readout_depth"] = max(1, sum(re.search(r"mm_projector\.\d+\.weight$", key) is not None for key in keys))
    return options


def _renamed(original: Options, names: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Ours -> the first of the original's names that is given; what is not given stays at our default."""
    given = {ours: next((name for name in theirs if name in original), None) for ours, theirs in names.items()}
    return {ours: original[name] for ours, name in given.items() if name is not None}


def _taking(**names: tuple[str, ...]) -> Callable[[Options], dict[str, Any]]:
    return lambda original: _renamed(original, names)


def _honeybee_options(original: Options) -> dict[str, Any]:
    names = {"num_queries": _NUM_QUERIES, "depth": _DEPTH, "hidden_size": ("hidden_size",)}
    return _renamed(original, names) | {"position_grid": list(grid_of(original))}


def _resampler_options(original: Options) -> dict[str, Any]:
    # In the original's order of operations: outputs are around 20, and rounding grows with each layer.
    return _renamed(original, {"num_queries": _NUM_QUERIES, "depth": _DEPTH}) | {"attention": "explicit"}


def _qformer_options(original: Options) -> dict[str, Any]:
    names = (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "cross_attention_frequency",
    )
    return _renamed(original, {name: (name,) for name in names} | {"num_queries": _NUM_QUERIES})


def _internvl_options(original: Options) -> dict[str, Any]:
    ratio = original.get("downsample_ratio")
    return _renamed(original, {"factor": _FACTOR}) | ({"factor": round(1 / ratio)} if ratio else {})


def _token_packer_options(original: Options) -> dict[str, Any]:
    # The inputs are the layers themselves: the query's, then those that the original concatenates.
    return _renamed(original, {"factor": _FACTOR}) | {"query_pooling": "bilinear"}


def _sparse_layers(original: Options) -> dict[str, Any]:
    # The original names these two for every tower; ours takes the same relative depths.
    return {"vision_layers": [7, 15, -2]}


CASES = {
    "linear": Case("linear"),
    "deco": Case("deco", _taking(num_queries=_NUM_QUERIES, depth=("layer_num",))),
    "llava_next_pooler": Case("conv_pool", _taking(factor=_FACTOR)),
    "c_abstractor": Case("c_abstractor", _honeybee_options),
    "d_abstractor": Case("d_abstractor", _honeybee_options, _ATTENTION),
    "honeybee_resampler": Case("resampler", _resampler_options, _ATTENTION),
    "qformer": Case("qformer", _qformer_options, _ATTENTION),
    # LLaVA-NeXT's depth says every how many layers the image is attended to.
    "llava_next_qformer": Case(
        "qformer_llava_next",
        _taking(
            num_queries=_NUM_QUERIES,
            cross_attention_frequency=("cross_attention_frequency", *_DEPTH),
            readout_depth=("readout_depth",),
        ),
        _ATTENTION,
    ),
    "tinyllava_qformer": Case("qformer_tinyllava", _taking(num_queries=_NUM_QUERIES), _ATTENTION),
    "perceiver_resampler": Case(
        "perceiver",
        _taking(num_queries=_NUM_QUERIES, depth=_DEPTH, readout_depth=("readout_depth",)),
        _ATTENTION,
    ),
    "tinyllava_resampler": Case("perceiver_tinyllava", _taking(num_queries=_NUM_QUERIES, depth=_DEPTH), _ATTENTION),
    "ldp": Case("ldp"),
    "ldpv2": Case("ldpv2", lambda original: {"output_grid": [12, 12]}),
    "token_packer": Case("token_packer", _token_packer_options, _ATTENTION),
    "internvl_pixel_shuffle": Case("pixel_shuffle_internvl", _internvl_options),
    "idefics3_pixel_shuffle": Case("pixel_shuffle_idefics3", _taking(factor=_FACTOR)),
    "smolvlm_pixel_shuffle": Case("pixel_shuffle_idefics3", _taking(factor=_FACTOR)),
    "nanovlm_pixel_shuffle": Case("pixel_shuffle_nanovlm", _taking(factor=_FACTOR)),
    "qwen2vl_merger": Case("patch_merger_qwen2_vl", _taking(factor=_FACTOR)),
    "qwen2_5vl_merger": Case("patch_merger_qwen2_5_vl", _taking(factor=_FACTOR)),
    "llava_stf": Case("token_fusion"),
    "dense_connector_sti": Case("dense_connector_sti", _sparse_layers, reads_hidden_states=True),
    "dense_connector_sci": Case("dense_connector_sci", _sparse_layers, reads_hidden_states=True),
    "dense_connector_dci": Case("dense_connector_dci", reads_hidden_states=True),
}

_SPELLED = re.compile(r"(?<![a-z0-9])mlp\d+x(_res\d+x)?_gelu(?![a-z])")


def find_case(name: str, original: Options) -> Case | None:
    """The entry that claims a reference: the longest of CASES among the words of its name, or LLaVA's spelling.

    LLaVA's MLPs have one entry per spelling, which the option `projector_type` or the name says. A name that says the
    family alone is completed by the option `kind`.
    """
    words = re.sub(r"[-. ]", "_", f"{name}_{original['kind']}" if "kind" in original else name).lower()
    known = [entry for entry in CASES if re.search(rf"(?<![a-z]){re.escape(entry)}(?![a-z])", words)]
    spelled = _SPELLED.search(original.get("projector_type", "")) or _SPELLED.search(words)
    if spelled and known in ([], ["linear"]):
        return Case(spelled.group())
    if not known and original.get("projector_type") == "linear":
        return CASES["linear"]
    return CASES[max(known, key=len)] if known else None
