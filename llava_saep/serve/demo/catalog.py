"""The models that the page offers: what folders hold, without reading weights, and which of them are loaded.

A model is loaded beside those that are loaded already, after a look at the memory that is left; so a failure leaves
everything as it was.
"""

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_saep.errors import UserError
from llava_saep.generation import Engine, LocalEngine
from llava_saep.memory import available_memory
from llava_saep.model.configuration_llava_saep import LlavaSaepConfig
from llava_saep.model.hub import local_folder
from llava_saep.model.loading import inspect_folder
from llava_saep.model.modeling_llava_saep import LlavaSaepForConditionalGeneration
from llava_saep.model.projector_selection import trusting_projector_code
from llava_saep.serve.remote import UNKNOWN
from projectors import ProjectorError

logger = logging.getLogger(__name__)

GB = 10**9
_HEADROOM = 1.1
"""What a loaded model takes, over the size of its weights: activations, cache, and what loading itself needs."""

_SEARCH_DEPTH = 3
_WEIGHTS_SUFFIXES = (".safetensors", ".bin")
_POLL_SECONDS = 0.25


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A checkpoint that can be loaded, as far as its config tells.

    Args:
        folder: None for a model that was handed over loaded.
        projector: UNKNOWN where a server does not tell it.
        tokens_per_image: of an image of the tower's own size; of one crop, where images are cut; 0: unknown.
        weights_bytes: size of the weights files in the folder; a projector's or adapter's base lies elsewhere.
    """

    model_id: str
    folder: Path | None
    projector: str
    tokens_per_image: int
    weights_bytes: int

    @property
    def summary(self) -> str:
        """Name and what distinguishes it, on one line."""
        facts = [self.projector] if self.projector != UNKNOWN else []
        facts += [f"{self.tokens_per_image} tokens per image"] if self.tokens_per_image else []
        facts += [_readable(self.weights_bytes)] if self.weights_bytes else []
        return f"{self.model_id} — {', '.join(facts)}" if facts else self.model_id


@dataclass(frozen=True)
class LoadingProgress:
    """How far loading is: a guess from the memory in use, between 0 and 1, and the seconds so far."""

    fraction: float
    seconds: float


class ModelCatalog:
    """Which models there are, and the engines of those that are loaded. Thread-safe.

    Args:
        entries: what can be loaded.
        engines: what is loaded already.
        load_options: keyword arguments of `LocalEngine.from_pretrained`: device, dtype, ...
    """

    def __init__(
        self,
        entries: Sequence[ModelEntry] = (),
        *,
        engines: Mapping[str, Engine] | None = None,
        load_options: Mapping[str, Any] | None = None,
    ):
        self._engines: dict[str, Engine] = dict(engines or {})
        handed_over = [_entry_of(engine) for engine in self._engines.values()]
        self._entries = {entry.model_id: entry for entry in (*handed_over, *entries)}
        self._load_options = dict(load_options or {})
        self._in_use: dict[str, int] = {}
        self._lock = threading.Lock()
        self._loading = threading.Lock()

    @property
    def entries(self) -> list[ModelEntry]:
        """All models, loaded or not."""
        return list(self._entries.values())

    @property
    def can_look_inside(self) -> bool:
        """Whether any model is, or can become, one of this process, whose pixels and attention can be shown."""
        with self._lock:
            engines = list(self._engines.values())
        return any(entry.folder is not None for entry in self.entries) or any(
            isinstance(engine, LocalEngine) for engine in engines
        )

    @property
    def loaded_ids(self) -> list[str]:
        """Names of the loaded models, in the order in which they were loaded."""
        with self._lock:
            return list(self._engines)

    @property
    def ids_loaded_first(self) -> list[str]:
        """Names of all models, those before others that are loaded."""
        loaded = self.loaded_ids
        return [*loaded, *(entry.model_id for entry in self.entries if entry.model_id not in loaded)]

    @property
    def choices(self) -> list[tuple[str, str]]:
        """What a dropdown offers: a line for each model, which shows whether it is loaded, and its name."""
        loaded = self.loaded_ids
        return [
            (f"{'● ' if entry.model_id in loaded else '○ '}{entry.summary}", entry.model_id) for entry in self.entries
        ]

    def entry(self, model_id: str | None) -> ModelEntry | None:
        """A model, loaded or not; None: there is none of this name."""
        return self._entries.get(model_id or "")

    def engine(self, model_id: str | None) -> Engine:
        """The engine of a loaded model.

        Raises:
            UserError: it is not loaded, or there is no such model.
        """
        with self._lock:
            engine = self._engines.get(model_id or "")
        if engine is None:
            known = model_id in self._entries
            raise UserError(f"{model_id} is not loaded; load it first." if known else "Choose a model first.")
        return engine

    @contextmanager
    def using(self, model_id: str | None) -> Iterator[Engine]:
        """The engine of a loaded model, which stays loaded inside the block; errors as `engine`."""
        with self._lock:
            engine = self._engines.get(model_id or "")
            if engine is not None:
                self._in_use[model_id] = self._in_use.get(model_id, 0) + 1
        if engine is None:
            self.engine(model_id)  # says what is wrong
            raise UserError(f"{model_id} was loaded this moment; ask again.")
        try:
            yield engine
        finally:
            with self._lock:
                self._in_use[model_id] -= 1

    def load(self, model_id: str) -> Iterator[LoadingProgress]:
        """Load a model beside the others, to the end also when nobody waits for it; one that is loaded stays as it is.

        Yields:
            how far it is, a few times a second.
        Raises:
            UserError, ProjectorError: no such model, too little memory, another one is being loaded, or its files are
                wrong.
        """
        if model_id in self.loaded_ids:
            return
        entry = self._entries.get(model_id)
        if entry is None or entry.folder is None:
            raise UserError("There is no such model; reload the page.")
        if not self._loading.acquire(blocking=False):
            raise UserError("Another model is being loaded; try again when it is ready.")
        outcome: list[Exception] = []
        thread = threading.Thread(target=self._load_into, args=(outcome, entry), daemon=True)
        try:
            expected_bytes = self._check_memory(entry)
            thread.start()  # which releases the lock, whoever still waits
        except BaseException:
            self._loading.release()
            raise
        yield from self._progress(thread, expected_bytes)
        if outcome:
            (error,) = outcome
            outcome.clear()
            _release_memory()
            raise _as_told(error, entry) from error

    def load_now(self, model_id: str) -> Engine:
        """Load a model and wait for it; errors as `load`."""
        for _ in self.load(model_id):
            pass
        return self.engine(model_id)

    def unload(self, model_id: str) -> None:
        """Give a model's memory back.

        Raises:
            UserError: it is answering somebody, or was handed over loaded.
        """
        with self._lock:
            if self._in_use.get(model_id, 0) > 0:
                raise UserError(f"{model_id} is answering a question; try again when it has finished.")
            entry = self._entries.get(model_id)
            if entry is not None and entry.folder is None:
                raise UserError(f"{model_id} runs elsewhere and cannot be unloaded from here.")
            engine = self._engines.pop(model_id, None)
        if engine is not None:
            engine.close()
            del engine
            _release_memory()

    def close(self) -> None:
        """Unload all models, stopping their answers."""
        with self._lock:
            engines, self._engines = list(self._engines.values()), {}
        for engine in engines:
            engine.close()

    def _check_memory(self, entry: ModelEntry) -> int:
        """Return the bytes that the model will take.

        Raises:
            UserError: they are not free.
        """
        device = torch.device(self._load_options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = self._load_options.get("dtype") or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        with trusting_projector_code(self._load_options.get("trust_projector_code")):
            config = inspect_folder(entry.folder, model_base=self._load_options.get("model_base")).config
            needed = weights_bytes(config, dtype)
        for place in {torch.device("cpu"), device}:  # weights come to the processor's memory first
            free = available_memory(place)
            if free is not None and needed * _HEADROOM > free:
                raise UserError(self._too_large(entry, needed, place, free))
        return needed

    def _too_large(self, entry: ModelEntry, needed: int, device: torch.device, free: int) -> str:
        where = "of memory" if device.type == "cpu" else f"on {device}"
        loaded = [model_id for model_id in self.loaded_ids if self._entries[model_id].folder is not None]
        advice = f"unload {' or '.join(loaded)} first" if loaded else "end other programs, or use a larger machine"
        return (
            f"{entry.model_id} needs about {_readable(needed * _HEADROOM)}, and {_readable(free)} {where} "
            f"{'is' if device.type == 'cpu' else 'are'} free; {advice}."
        )

    def _progress(self, thread: threading.Thread, expected_bytes: int) -> Iterator[LoadingProgress]:
        """How far a loading thread is, until it ends."""
        device = torch.device(self._load_options.get("device") or "cpu")
        free_before, start = available_memory(device), time.monotonic()
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
            taken = 0 if free_before is None else free_before - (available_memory(device) or 0)
            fraction = min(max(taken / max(expected_bytes, 1), 0.0), 0.99)
            yield LoadingProgress(fraction, time.monotonic() - start)

    def _load_into(self, outcome: list[Exception], entry: ModelEntry) -> None:
        try:
            engine = LocalEngine.from_pretrained(entry.folder, model_id=entry.model_id, **self._load_options)
            with self._lock:
                self._engines[entry.model_id] = engine
        except Exception as error:  # handed to the waiting thread, which raises it
            if _is_out_of_memory(error):
                error = error.with_traceback(None)  # whose frames hold the tensors that were read
            outcome.append(error)
        finally:
            self._loading.release()


def _as_told(error: Exception, entry: ModelEntry) -> Exception:
    """What the visitor is told: that the memory did not suffice, or the error as it is."""
    if not _is_out_of_memory(error):
        return error
    return UserError(
        f"The memory did not suffice for {entry.model_id}; it was not loaded, and all other models are as before. "
        "Unload one of them and try again."
    )


def _is_out_of_memory(error: Exception) -> bool:
    # PyTorch has no class of its own for the processor's memory.
    is_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return is_cpu or isinstance(error, (MemoryError, torch.OutOfMemoryError))


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def weights_bytes(config: LlavaSaepConfig, dtype: torch.dtype) -> int:
    """Count the bytes of a model's weights, without reading any."""
    with torch.device("meta"):
        model = LlavaSaepForConditionalGeneration(config)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def find_models(folder: str | Path, *, on_skipped: Callable[[Path, str], None] | None = None) -> list[ModelEntry]:
    """List the checkpoints in a folder and its subfolders, by their paths.

    Args:
        on_skipped: told of each folder that has a config.json and is no checkpoint that loads here, and why.
    Raises:
        UserError: no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"--models-dir {folder}: no such folder")
    entries = []
    for path in _folders_with_config(root, _SEARCH_DEPTH):
        name = path.name if path == root else str(path.relative_to(root))
        try:
            entries.append(describe_folder(path, name))
        except (UserError, ProjectorError) as error:
            if on_skipped is not None:
                on_skipped(path, str(error))
    return entries


def describe_folder(folder: str | Path, model_id: str, *, model_base: str | None = None) -> ModelEntry:
    """Read what a checkpoint is from its config and the sizes of its files.

    Raises:
        UserError, ProjectorError: it does not load here.
    """
    path = local_folder(folder)
    config = inspect_folder(path, model_base=model_base).config
    side = config.vision_config.image_size
    return ModelEntry(
        model_id=model_id,
        folder=path,
        projector=config.projector["name"],
        tokens_per_image=config.num_image_tokens(config.patch_grid(side, side)),
        weights_bytes=sum(file.stat().st_size for file in path.iterdir() if file.suffix in _WEIGHTS_SUFFIXES),
    )


def _folders_with_config(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "config.json").is_file():
        yield folder
    if depth > 0:
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.name.startswith("."):
                yield from _folders_with_config(path, depth - 1)


def _entry_of(engine: Engine) -> ModelEntry:
    description = engine.description
    return ModelEntry(
        model_id=description.model_id,
        folder=None,
        projector=description.projector,
        tokens_per_image=description.tokens_per_image,
        weights_bytes=0,
    )


def _readable(num_bytes: float) -> str:
    if num_bytes >= GB / 10:
        return f"{num_bytes / GB:.1f} GB"
    return f"{num_bytes / 10**6:.1f} MB"
