"""Models that are named as on the hub: where they are kept, and what is fetched of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

from llava_saep.errors import UserError
from llava_saep.model.reading import first_line, read_json_object

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_NOT_TO_BE_HAD = (OSError, ValueError, HfHubHTTPError)


@contextmanager
def hub_cache(folder: str | None) -> Iterator[None]:
    """Keep what is fetched from the hub inside the block in `folder`; None: where HF_HOME says.

    transformers reads this variable of huggingface_hub on each call, so that no `cache_dir` has to be handed down.
    """
    usual = huggingface_hub.constants.HF_HUB_CACHE
    huggingface_hub.constants.HF_HUB_CACHE = usual if folder is None else str(Path(folder).resolve())
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_CACHE = usual


def is_hub_name(name_or_path: str | Path) -> bool:
    """Whether this can only name a model of the hub: nothing of this name is here."""
    return _HUB_NAME.fullmatch(str(name_or_path)) is not None and not Path(name_or_path).exists()


def local_folder(name_or_path: str | Path) -> Path:
    """Return the folder of a saved model; one that is named as on the hub is downloaded unless it has been.

    Raises:
        UserError: neither a folder nor a model of the hub that can be had.
    """
    if not is_hub_name(name_or_path):
        return Path(name_or_path)
    try:
        return Path(huggingface_hub.snapshot_download(str(name_or_path)))
    except _NOT_TO_BE_HAD as error:
        raise UserError(
            f"{name_or_path} is no folder here, and cannot be had from the hub: {first_line(error)}"
        ) from error


def find_file(name_or_path: str | Path, file_name: str) -> Path | None:
    """Find one file of a model, of the hub without the rest of it; None where there is none."""
    if is_hub_name(name_or_path):
        try:
            return Path(huggingface_hub.hf_hub_download(str(name_or_path), file_name))
        except _NOT_TO_BE_HAD:
            return None
    path = Path(name_or_path) / file_name
    return path if path.is_file() else None


def read_config_fields(name_or_path: str) -> dict[str, Any] | None:
    """Read the fields of config.json, of a model of the hub without the rest of it; None where there is none.

    Raises:
        UserError: the file is damaged.
    """
    path = find_file(name_or_path, "config.json")
    return None if path is None else read_json_object(path)
