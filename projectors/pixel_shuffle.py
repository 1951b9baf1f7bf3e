"""Pixel shuffle: each window of patches becomes one token of as many times more channels, then Linear layers.

One operation serves InternVL, Idefics3, SmolVLM and nanoVLM, which order the channels alike: patches of a window row by
row, the channels of a patch together. They differ in what follows, and that is what the options say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ._base import PatchGrid, Projector
from ._keys import rename_modules
from ._options import option
from ._registry import ProjectorPreset, register_projector
from ._windows import WindowedProjectorConfig
from .layers import concatenate_layers, fold_windows, pad_to_windows, reset_module, reset_module_normal

_NORM_EPS = 1e-5
_ONE_LINEAR = {"norm": False, "readout_depth": 1, "readout_bias": False}
_WHOLE_MODELS_NAME = "MP."  # where a nanoVLM model keeps its projector, beside vision_encoder and decoder


@dataclass(frozen=True, kw_only=True)
class PixelShuffleConfig(WindowedProjectorConfig):
    """The defaults are InternVL's; the presets name the other originals.

    InternVL, Idefics3 and SmolVLM read the tower's last hidden state (`vision_layers=[-1]`); the default here is the
    package's. Their grids are square, any grid that the windows tile is taken here.
    """

    norm: bool = option(True, "LayerNorm over the channels of a whole window before the Linear layers")
    readout_depth: int = option(2, "Linear layers, with GELU between each two", minimum=1, maximum=1000)
    readout_bias: bool = option(True, "bias in the Linear layers")
    token_order: Literal["row", "column"] = option(
        "row", "order of the tokens: row by row, or column by column as InternVL's ps_version v1 had it"
    )
    init: Literal["default", "normal"] = option(
        "default", "PyTorch's default, or nanoVLM's: normal of std 0.02 with zero biases"
    )

    def token_grid(self, grid: PatchGrid) -> PatchGrid | None:
        """None in column order: read row by row, such tokens are the transposed map."""
        return super().token_grid(grid) if self.token_order == "row" else None


@register_projector(
    "pixel_shuffle",
    config=PixelShuffleConfig,
    summary="InternVL's pixel shuffle: the patches of a 2x2 window side by side, LayerNorm, MLP; a quarter of the "
    "tokens.",
    paper="https://arxiv.org/abs/2404.16821",
    token_formula="ceil(H / factor) * ceil(W / factor)",
    presets={
        "pixel_shuffle_internvl": ProjectorPreset(
            {"norm": True, "readout_depth": 2, "readout_bias": True},
            "InternVL: LayerNorm, Linear, GELU, Linear on 2x2 windows.",
            defaults={"factor": 2, "token_order": "row", "init": "default"},
        ),
        "pixel_shuffle_idefics3": ProjectorPreset(
            _ONE_LINEAR, "Idefics3 and SmolVLM: one Linear without bias.", defaults={"factor": 2}
        ),
        "pixel_shuffle_nanovlm": ProjectorPreset(
            _ONE_LINEAR, "nanoVLM: one Linear without bias on 4x4 windows.", defaults={"factor": 4, "init": "normal"}
        ),
    },
)
class PixelShuffle(Projector):
    """Windows of factor x factor patches side by side, LayerNorm (eps 1e-5), `readout_depth` Linear with exact GELU.

    Loads the keys of InternVL (`mlp1.{0,1,3}`), of its port in transformers (`layer_norm`, `linear_1`, `linear_2`), of
    Idefics3 and SmolVLM (`modality_projection.proj`) and of nanoVLM (`MP.proj`). Writes Idefics3's where there is one
    Linear and no norm (nanoVLM's if it also starts as nanoVLM's), InternVL's otherwise.

    Source: InternVL `modeling_internvl_chat.py` (MIT), transformers `models/idefics3/modeling_idefics3.py`
    (Apache-2.0), nanoVLM `models/modality_projector.py` (Apache-2.0).
    """

    def __init__(self, config: PixelShuffleConfig) -> None:
        super().__init__(config)
        width = config.fused_hidden_size * config.factor**2
        self.norm = nn.LayerNorm(width, eps=_NORM_EPS) if config.norm else nn.Identity()
        layers: list[nn.Module] = [nn.Linear(width, config.text_hidden_size, config.readout_bias)]
        for _ in range(config.readout_depth - 1):
            layers += [nn.GELU(), nn.Linear(config.text_hidden_size, config.text_hidden_size, config.readout_bias)]
        self.readout = nn.Sequential(*layers)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear layers as the option `init` says."""
        self.apply(reset_module_normal if self.config.init == "normal" else reset_module)

    def forward(self, features: Sequence[Tensor], grid: PatchGrid) -> Tensor:
        self.check_features(features, grid)
        padded_grid, factor = self.config.padded_grid(grid), self.config.factor
        tokens = pad_to_windows(concatenate_layers(features), grid, factor)
        windows = fold_windows(tokens, padded_grid, factor, column_major=self.config.token_order == "column")
        return self.readout(self.norm(windows))

    def convert_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The keys of any of the originals; of a whole nanoVLM model only its projector is read."""
        names = {"layer_norm": "norm", "linear_1": "readout.0", "linear_2": "readout.2", "proj": "readout.0"}
        names |= {"modality_projection.proj": "readout.0", "MP.proj": "readout.0"}
        for ours, theirs in self._internvl_names().items():
            names |= {theirs: ours, theirs.removeprefix("mlp1."): ours}
        is_whole_nanovlm = any(key.startswith(_WHOLE_MODELS_NAME) for key in state_dict)
        wanted = _WHOLE_MODELS_NAME if is_whole_nanovlm else ""
        return rename_modules({key: state_dict[key] for key in state_dict if key.startswith(wanted)}, names)

    def to_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        is_one_linear = not self.config.norm and self.config.readout_depth == 1
        one_linear = f"{_WHOLE_MODELS_NAME}proj" if self.config.init == "normal" else "modality_projection.proj"
        names = {"readout.0": one_linear} if is_one_linear else self._internvl_names()
        return rename_modules(state_dict, names)

    def _internvl_names(self) -> dict[str, str]:
        """Ours -> the places in InternVL's Sequential, where the norm comes first."""
        linear = {f"readout.{2 * index}": f"mlp1.{2 * index + 1}" for index in range(self.config.readout_depth)}
        return {"norm": "mlp1.0"} | linear
