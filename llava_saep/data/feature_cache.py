"""Features of a frozen vision tower on disk, so that it looks at each image once, in whichever run, on whichever rank.

One file per image, in a folder per tower, layers and preprocessing. A file appears under its name when it is whole: it
is written beside its place and renamed, so ranks and machines that share the folder need no locks. Each carries a
checksum; one that is damaged counts as absent and is written anew.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import struct
import time
import uuid
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from llava_saep.data.images import ImageSize
from llava_saep.errors import UserError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Part of each folder's name: a change of the files' format, or of what our preprocessing makes of an image."""

_SIZE_NAME = "original_size"
_UNFINISHED = "unfinished"
_STALE_AFTER_SECONDS = 3600
_CHECKSUM = struct.Struct("<I")


class ImageFeatures(NamedTuple):
    """What a tower sees in one image.

    Attributes:
        original_size: of the image as it was decoded, before it was resized or cut, in pixels.
        layers: one (crops, patches, channels) tensor per layer read; one crop where images are not cut.
    """

    original_size: ImageSize
    layers: tuple[Tensor, ...]


class Lookup(NamedTuple):
    """What the store has for an image.

    Attributes:
        key: names the image.
        features: None where there is no usable file.
        is_damaged: there is a file, and it cannot be used.
    """

    key: str
    features: ImageFeatures | None
    is_damaged: bool


class FeatureStore:
    """A folder with the features of images, for one tower, choice of layers and preprocessing.

    Args:
        folder: of all such folders; need not exist.
        description: everything beside the image that the features depend on, as JSON. Other values, other folder.
    """

    def __init__(self, folder: str | os.PathLike[str], description: Mapping[str, Any]) -> None:
        self.description = {"format_version": FORMAT_VERSION, **description}
        text = json.dumps(self.description, sort_keys=True, default=str)
        self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._is_writing = True

    def open(self) -> None:
        """Make the folder, say in it what it holds, and remove what killed runs left half-written.

        Raises:
            UserError: nothing can be written there.
        """
        about = json.dumps(self.description, indent=1, sort_keys=True, default=str)
        try:
            (self.folder / _UNFINISHED).mkdir(parents=True, exist_ok=True)
            self._write_whole(self.folder / "about.json", about.encode())
            for path in (self.folder / _UNFINISHED).iterdir():
                with contextlib.suppress(FileNotFoundError):  # another rank was faster
                    if time.time() - path.stat().st_mtime > _STALE_AFTER_SECONDS:
                        path.unlink()
        except OSError as error:
            raise UserError(
                f"--cache_vision_features {self.folder.parent}: cannot be written to ({error}); choose another folder, "
                "or train without it"
            ) from error

    def free_bytes(self) -> int:
        """How much more fits on the disk."""
        return shutil.disk_usage(self.folder).free

    def look_up(self, image_path: str | os.PathLike[str]) -> Lookup:
        """Return what is stored for an image file as it is now.

        An image is known by its absolute path, size and time of change, which cost no reading of the file.

        Raises:
            FileNotFoundError: there is no such image.
        """
        status = os.stat(image_path)
        facts = f"{os.path.abspath(image_path)}\0{status.st_size}\0{status.st_mtime_ns}"
        key = hashlib.sha256(os.fsencode(facts)).hexdigest()[:32]
        try:
            data = self.path(key).read_bytes()
        except FileNotFoundError:
            return Lookup(key, None, is_damaged=False)
        except OSError:
            return Lookup(key, None, is_damaged=True)
        features = _decode(data)
        return Lookup(key, features, is_damaged=features is None)

    def write(self, key: str, features: ImageFeatures) -> bool:
        """Store an image's features, unless the disk has refused before.

        Returns:
            whether they are stored. The first failure is logged, and nothing more is written by this process.
        """
        if not self._is_writing:
            return False
        path = self.path(key)
        try:
            path.parent.mkdir(exist_ok=True)
            self._write_whole(path, _encode(features))
        except OSError as error:
            self._is_writing = False
            reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
            logger.error(
                "--cache_vision_features %s: %s. Training goes on and computes what is not there yet, without storing "
                "it; make room and start again to have it stored.",
                self.folder.parent,
                reason,
            )
        return self._is_writing

    def path(self, key: str) -> Path:
        """Where an image's features are; the folders in between keep listings short."""
        return self.folder / key[:2] / f"{key[2:]}.features"

    def _write_whole(self, path: Path, data: bytes) -> None:
        """Write a file that nobody sees before it is complete."""
        unfinished = self.folder / _UNFINISHED / uuid.uuid4().hex
        try:
            unfinished.write_bytes(data)
            os.replace(unfinished, path)
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise


def num_bytes(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> int:
    """How long a file with layers of these shapes is, but for its head of some hundred bytes."""
    return sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize


def _encode(features: ImageFeatures) -> bytes:
    tensors = {str(index): layer.detach().cpu().contiguous() for index, layer in enumerate(features.layers)}
    tensors[_SIZE_NAME] = torch.tensor(features.original_size)
    data = safetensors.torch.save(tensors)
    return data + _CHECKSUM.pack(zlib.crc32(data))


def _decode(data: bytes) -> ImageFeatures | None:
    """Return what a file holds; None if it is not what was written."""
    data, checksum = data[: -_CHECKSUM.size], data[-_CHECKSUM.size :]
    if checksum != _CHECKSUM.pack(zlib.crc32(data)):
        return None
    try:
        tensors = safetensors.torch.load(data)
        size = ImageSize(*tensors.pop(_SIZE_NAME).tolist())
        return ImageFeatures(size, tuple(tensors[str(index)] for index in range(len(tensors))))
    except (safetensors.SafetensorError, KeyError):  # another program's file that happens to end with its checksum
        return None
