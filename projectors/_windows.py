"""The options and the arithmetic of projectors that make one token of each factor x factor window of patches."""

from __future__ import annotations

from dataclasses import dataclass

from ._base import PatchGrid, ProjectorConfig, refuse_small_grid
from ._errors import ProjectorError
from ._options import option


@dataclass(frozen=True, kw_only=True)
class WindowedProjectorConfig(ProjectorConfig):
    """Windows do not overlap; a grid that they do not tile is refused, or padded where the user asks for it."""

    factor: int = option(2, "side of the window of patches that becomes one token", minimum=1, maximum=1000)
    pad_grid: bool = option(
        False, "repeat the last row and column until factor divides the grid, instead of refusing the grid"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_cls_token()

    def padded_grid(self, grid: PatchGrid) -> PatchGrid:
        """The grid that the windows tile: this one, or with `pad_grid` the next one that they do.

        Raises:
            ProjectorError: the grid is empty, or factor does not divide it and pad_grid is off.
        """
        refuse_small_grid(grid)
        padded = PatchGrid(*(-(-side // self.factor) * self.factor for side in grid))
        if padded != grid and not self.pad_grid:
            raise ProjectorError(
                f"a {grid} grid cannot be cut into windows of {self.factor}x{self.factor} patches: factor "
                f"{self.factor} divides not both {grid.height} and {grid.width}. Choose another factor, another image "
                "size, or pad_grid=true, which repeats the last row and column."
            )
        return padded

    def num_output_tokens(self, grid: PatchGrid) -> int:
        return self.padded_grid(grid).num_patches // self.factor**2

    def token_grid(self, grid: PatchGrid) -> PatchGrid | None:
        return PatchGrid(*(side // self.factor for side in self.padded_grid(grid)))
