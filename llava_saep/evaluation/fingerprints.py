"""Short texts that change when what they were made of does: a model's weights, the files of a benchmark, questions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llava_saep.evaluation.tasks import EmbeddedImage, TaskQuestion

_MODEL_SUFFIXES = (".safetensors", ".bin", ".json", ".model")
_WHOLE_FILE_BYTES = 256 * 2**20
"""Larger files are sampled: 4 KiB of each MiB. Training changes all values of a tensor, so a look at some will do."""
_STRIDE_BYTES = 2**20
_SAMPLE_BYTES = 4096
_LENGTH = 16


def model_fingerprint(folder: Path) -> str:
    """Of a saved model's weights, configs and tokenizer, by their content: a copy of the folder has the same."""
    files = sorted(file for file in folder.iterdir() if file.suffix in _MODEL_SUFFIXES and file.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        _update(digest, file)
    return digest.hexdigest()[:_LENGTH]


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a whole file, as sha256sum prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def questions_fingerprint(questions: Iterable[TaskQuestion]) -> str:
    """Of all that is asked, in its order; of image files the name alone."""
    facts = [(q.question_id, q.text, q.prompt, [_image_name(image) for image in q.images]) for q in questions]
    return text_fingerprint(facts)


def text_fingerprint(value: Any) -> str:
    """Of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:_LENGTH]


def files_fingerprints(paths: Sequence[Path], root: Path) -> dict[str, str]:
    """SHA-256 of each file that is there, by its path below `root`; folders (of images) are left out."""
    return {path.relative_to(root).as_posix(): file_fingerprint(path) for path in paths if path.is_file()}


def _image_name(image: Path | EmbeddedImage) -> str:
    return text_fingerprint(image.base64_text) if isinstance(image, EmbeddedImage) else image.name


def _update(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE_FILE_BYTES:
            for block in iter(lambda: file.read(_STRIDE_BYTES), b""):
                digest.update(block)
            return
        for start in range(0, size, _STRIDE_BYTES):
            file.seek(start)
            digest.update(file.read(_SAMPLE_BYTES))
