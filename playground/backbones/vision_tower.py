"""The stand-in for CLIP's vision tower: a small CLIPVisionModel, trained contrastively and by captioning.

The contrastive part is CLIP's. The captioning part predicts all words of a caption in parallel (as CapPa does, arXiv
2306.07915), in both directions: what stands at each position, and where each kind of object stands. The text side and
the captioning head are thrown away afterwards.
"""

from __future__ import annotations

import logging
import random
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from playground.backbones.optimisation import train_steps
from playground.spatial_scenes import IMAGE_SIZE_PX, KINDS, NUM_CELLS, Scene, render, sample_scene, scan_pool

logger = logging.getLogger(__name__)

HIDDEN_SIZE = 96
INTERMEDIATE_SIZE = 256
NUM_LAYERS = 4
NUM_HEADS = 4
PATCH_SIZE_PX = 8
BATCH_SIZE = 64
LEARNING_RATE = 1.5e-3
CONTRASTIVE_WEIGHT = 0.1
# Scenes are mostly dark: these bring their pixels to about zero mean and unit variance.
PIXEL_MEAN, PIXEL_STD = 0.13, 0.22
_POSITION_SCALE = 0.25
_EMPTY = len(KINDS)
_NOWHERE = NUM_CELLS
_KIND_INDEX = {kind: index for index, kind in enumerate(KINDS)}


class SceneBatch(NamedTuple):
    """pixels (batch, 3, 48, 48); kind_at (batch, 9) with 26 for empty; cell_of (batch, 26) with 9 for absent."""

    pixels: Tensor
    kind_at: Tensor
    cell_of: Tensor


class SceneSampler:
    """Renders random scenes of both worlds; the same seed gives the same images."""

    def __init__(self, seed: str, split: str = "train") -> None:
        self._rng = random.Random(seed)
        self._pool = scan_pool(split)

    def batch(self, size: int, world: str | None = None) -> SceneBatch:
        rng = self._rng
        scenes = [sample_scene(rng, world or rng.choice(("cells", "free")), self._pool) for _ in range(size)]
        images = np.stack([render(scene, noise_seed=rng.getrandbits(32)) for scene in scenes])
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).sub(PIXEL_MEAN).div(PIXEL_STD)
        kind_at, cell_of = zip(*[_layout(scene) for scene in scenes], strict=True)
        return SceneBatch(pixels.contiguous(), torch.tensor(kind_at), torch.tensor(cell_of))


def _layout(scene: Scene) -> tuple[list[int], list[int]]:
    kind_at, cell_of = [_EMPTY] * NUM_CELLS, [_NOWHERE] * len(KINDS)
    for placed in scene.objects:
        kind_at[placed.cell] = _KIND_INDEX[placed.kind]
        cell_of[_KIND_INDEX[placed.kind]] = placed.cell
    return kind_at, cell_of


class CaptionHead(nn.Module):
    """One query per position and one per kind of object, attending to the patches of one layer."""

    def __init__(self, width: int, num_heads: int = 4) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(NUM_CELLS + len(KINDS), width) * 0.5)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.what = nn.Linear(width, len(KINDS) + 1)
        self.where = nn.Linear(width, NUM_CELLS + 1)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, patches, width) -> what (batch, 9, 27) and where (batch, 26, 10)."""
        keys = self.norm(patches)
        attended, _ = self.attention(self.queries.expand(len(patches), -1, -1), keys, keys, need_weights=False)
        words = attended + self.mlp(attended)
        return self.what(words[:, :NUM_CELLS]), self.where(words[:, NUM_CELLS:])


class CaptionEncoder(nn.Module):
    """The text side of the contrastive loss: a sum over the caption's phrases ("7 is top left") through an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.phrases = nn.Parameter(torch.randn(NUM_CELLS, len(KINDS) + 1, width) * 0.1)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, kind_at: Tensor) -> Tensor:
        cells = torch.arange(NUM_CELLS).expand_as(kind_at)
        return self.mlp(self.phrases[cells, kind_at].sum(dim=1))


def build_vision_tower() -> CLIPVisionModel:
    """A CLIPVisionModel with random weights and 2-D sine-cosine positions, which stay decodable from its patches."""
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=HIDDEN_SIZE,
            intermediate_size=INTERMEDIATE_SIZE,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=NUM_HEADS,
            image_size=IMAGE_SIZE_PX,
            patch_size=PATCH_SIZE_PX,
            projection_dim=HIDDEN_SIZE,
        )
    )
    with torch.no_grad():
        positions = sincos_positions(IMAGE_SIZE_PX // PATCH_SIZE_PX, HIDDEN_SIZE)
        tower.embeddings.position_embedding.weight[1:] = _POSITION_SCALE * positions
    return tower


def sincos_positions(side: int, width: int) -> Tensor:
    """(side * side, width): sines and cosines of the column, then of the row, at width / 4 frequencies each."""
    frequencies = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (columns, rows)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)


def train_vision_tower(folder: Path, *, num_steps: int, seed: int) -> dict[str, float]:
    """Train, save tower and image processor into `folder`, and return the figures of the card."""
    torch.manual_seed(seed)
    started = time.monotonic()
    tower = build_vision_tower()
    captioner, text_encoder = CaptionHead(HIDDEN_SIZE), CaptionEncoder(HIDDEN_SIZE)
    log_scale = nn.Parameter(torch.tensor(2.0))
    sampler = SceneSampler(f"{seed}/scenes")

    def loss_of_step(step: int) -> Tensor:
        batch = sampler.batch(BATCH_SIZE)
        outputs = tower(batch.pixels, output_hidden_states=True)
        # Projectors read the last layer or the one before it: each step captions from one of them.
        patches = outputs.hidden_states[-1 - step % 2][:, 1:]
        captioning = caption_loss(captioner(patches), batch)
        contrastive = contrastive_loss(outputs.pooler_output, text_encoder(batch.kind_at), log_scale)
        return captioning + CONTRASTIVE_WEIGHT * contrastive

    def report(step: int) -> None:
        logger.info("vision tower, step %d: %s", step, evaluate_vision_tower(tower, captioner))
        save_vision_tower(tower, folder)

    parameters = [*tower.parameters(), *captioner.parameters(), *text_encoder.parameters(), log_scale]
    train_steps(
        parameters, loss_of_step, num_steps=num_steps, learning_rate=LEARNING_RATE, label="vision tower", report=report
    )
    save_vision_tower(tower, folder)
    return {**evaluate_vision_tower(tower, captioner, num_images=1000), "minutes": (time.monotonic() - started) / 60}


def caption_loss(predictions: tuple[Tensor, Tensor], batch: SceneBatch) -> Tensor:
    what, where = predictions
    return functional.cross_entropy(what.flatten(0, 1), batch.kind_at.flatten()) + functional.cross_entropy(
        where.flatten(0, 1), batch.cell_of.flatten()
    )


def contrastive_loss(images: Tensor, texts: Tensor, log_scale: Tensor) -> Tensor:
    """CLIP's symmetric loss; both inputs (batch, width), row i of one belongs to row i of the other."""
    cosines = functional.normalize(images, dim=1) @ functional.normalize(texts, dim=1).T
    similarity = log_scale.exp().clamp(max=100) * cosines
    targets = torch.arange(len(images))
    return (functional.cross_entropy(similarity, targets) + functional.cross_entropy(similarity.T, targets)) / 2


def save_vision_tower(tower: CLIPVisionModel, folder: Path) -> None:
    tower.save_pretrained(folder)
    size = {"height": IMAGE_SIZE_PX, "width": IMAGE_SIZE_PX}
    CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE_PX}, crop_size=size, image_mean=[PIXEL_MEAN] * 3, image_std=[PIXEL_STD] * 3
    ).save_pretrained(folder)


@torch.no_grad()
def evaluate_vision_tower(tower: CLIPVisionModel, captioner: CaptionHead, num_images: int = 300) -> dict[str, float]:
    """On held-out scans: share of occupied positions named rightly, and of present objects located rightly."""
    figures = {}
    for world in ("cells", "free"):
        batch = SceneSampler("evaluation", split="held_out").batch(num_images, world)
        patches = tower(batch.pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        what, where = captioner(patches)
        occupied, present = batch.kind_at != _EMPTY, batch.cell_of != _NOWHERE
        figures[f"what_{world}"] = round((what.argmax(-1) == batch.kind_at)[occupied].float().mean().item(), 4)
        figures[f"where_{world}"] = round((where.argmax(-1) == batch.cell_of)[present].float().mean().item(), 4)
        figures[f"scene_exact_{world}"] = round((what.argmax(-1) == batch.kind_at).all(1).float().mean().item(), 4)
    return figures
