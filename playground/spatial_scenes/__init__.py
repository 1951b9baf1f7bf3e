"""Spatial scenes: small images of handwritten digits and coloured shapes, and LLaVA conversations about where they are.

`python -m playground.spatial_scenes --output DIR` writes the data set; the functions below are the parts that the
stand-in backbones (playground/backbones) are trained with.
"""

from playground.spatial_scenes.descriptions import caption, listing, raster_reading
from playground.spatial_scenes.objects import KINDS, Kind, scan_pool
from playground.spatial_scenes.questions import Question, QuestionWriter
from playground.spatial_scenes.rendering import render
from playground.spatial_scenes.scene import IMAGE_SIZE_PX, NUM_CELLS, PlacedObject, Scene, cell_name, sample_scene
from playground.spatial_scenes.writing import write_dataset

__all__ = [
    "IMAGE_SIZE_PX",
    "KINDS",
    "NUM_CELLS",
    "Kind",
    "PlacedObject",
    "Question",
    "QuestionWriter",
    "Scene",
    "caption",
    "cell_name",
    "listing",
    "raster_reading",
    "render",
    "sample_scene",
    "scan_pool",
    "write_dataset",
]
