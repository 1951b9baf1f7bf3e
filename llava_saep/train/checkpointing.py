"""Checkpoints that are either complete or not there.

DeepSpeed's `latest` file and transformers' newest folder are both written while other ranks may still be saving, so a
killed run can leave a torn folder that looks like a checkpoint. Here a manifest with every file's size and checksum is
written last, after a barrier, and only a folder that matches its manifest is resumed from.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llava_saep.errors import UserError
from llava_saep.file_modes import share_like_folder

logger = logging.getLogger(__name__)

MANIFEST_NAME = "checkpoint_manifest.json"
_MANIFEST_FORMAT = 1
_FOLDER_PATTERN = re.compile(r"checkpoint-(\d+)")
_WEIGHTS_PATTERN = re.compile(
    r"(model|pytorch_model|adapter_model|mm_projector|non_lora_trainables)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|adapter_config\.json"
)
"""Files that make a saved folder what it is; see `llava_saep.model.loading.inspect_folder`."""
_OWNER_PATTERN = re.compile(r"(?:zero_pp_rank_|rng_state_)(\d+)")
"""In the name of a file that each rank writes for itself: DeepSpeed's shards and the state of random numbers."""
_MAX_HASHING_THREADS = 8
_WRITE_FAILURE_PATTERN = re.compile(r"inline_container|iostream error|I/O error|os error \d+")
"""How torch, safetensors and tokenizers report a disk that takes no more, beside OSError."""
_GONE_PATTERN = re.compile(r"No such file or directory|Parent directory .* does not exist")
"""How they, and OSError, report that the folder they write to has disappeared."""


class SavingError(UserError):
    """Something could not be written to disk."""


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """What a run must have in common with a checkpoint to go on from it.

    Args:
        global_step: optimizer steps taken.
        world_size: ranks whose optimizer shards lie in the checkpoint.
        zero_stage: DeepSpeed's stage; None without DeepSpeed.
        trainable: shape of each parameter that learns, by name.
        samples_per_step: of all ranks and accumulated batches; None: saved before this was written down.
        num_rows: samples of the training data, or with packing the rows that hold them; None as above.
        is_resumable: False: weights alone were saved (`--save_only_model True`).
        quantization: `--bits` and its companions, in words; None: the language model is not rounded.
    """

    global_step: int
    world_size: int
    zero_stage: int | None
    trainable: Mapping[str, tuple[int, ...]]
    samples_per_step: int | None = None
    num_rows: int | None = None
    is_resumable: bool = True
    quantization: str | None = None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_files(paths: Sequence[Path]) -> list[str]:
    """Compute checksums in parallel: hashlib lets other threads run, and one alone is slower than most disks."""
    num_threads = max(1, min(_MAX_HASHING_THREADS, os.cpu_count() or 1, len(paths)))
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(_sha256, paths))


def _flush_to_disk(paths: Sequence[Path]) -> None:
    """Wait until the system has written files out, which is also when some file systems find that they have no room."""
    for path in paths:
        with path.open("r+b") as file:
            os.fsync(file.fileno())


def _files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)


def _owner(name: str, world_size: int) -> int:
    """Which rank wrote a file: its own shards, and rank 0 the rest."""
    match = _OWNER_PATTERN.search(name)
    owner = 0 if match is None else int(match[1])
    return owner if owner < world_size else 0


def describe_files(folder: Path, *, rank: int = 0, world_size: int = 1) -> dict[str, dict[str, int | str]]:
    """Size and checksum of the files that a rank has written, which its machine still has in memory.

    They are on the disk when it returns: older checkpoints are deleted once the manifest is there, and a machine that
    lost its power then would have none. Call it after a barrier that follows the last write of every rank. All ranks'
    answers together make a manifest.

    Returns:
        by path inside the folder: "bytes" and "sha256".
    """
    paths = [path for path in _files_of(folder) if _owner(path.name, world_size) == rank]
    _flush_to_disk(paths)
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": checksum}
        for path, checksum in zip(paths, _hash_files(paths), strict=True)
    }


def write_manifest(
    folder: Path, facts: CheckpointFacts, files: Mapping[str, Mapping[str, int | str]] | None = None
) -> Path:
    """List every file of a finished checkpoint, with size and checksum; the manifest appears in one step.

    Call it on one rank.

    Args:
        files: from `describe_files` of every rank; None: looked at here.
    """
    files = describe_files(folder) if files is None else files
    manifest = {
        "format": _MANIFEST_FORMAT,
        "global_step": facts.global_step,
        "world_size": facts.world_size,
        "zero_stage": facts.zero_stage,
        "trainable": {name: list(shape) for name, shape in facts.trainable.items()},
        "samples_per_step": facts.samples_per_step,
        "num_rows": facts.num_rows,
        "is_resumable": facts.is_resumable,
        "quantization": facts.quantization,
        "files": dict(sorted(files.items())),
    }
    partial = folder / f"{MANIFEST_NAME}.partial"
    with partial.open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / MANIFEST_NAME)
    return folder / MANIFEST_NAME


def _read_manifest(folder: Path) -> dict | None:
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return manifest if manifest.get("format") == _MANIFEST_FORMAT else None


def read_facts(folder: Path) -> CheckpointFacts:
    """Read what a checkpoint's manifest says about the run that wrote it.

    Raises:
        UserError: the folder has no readable manifest.
    """
    manifest = _read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} has no readable {MANIFEST_NAME}; expected a checkpoint that a run finished writing")
    return CheckpointFacts(
        global_step=manifest["global_step"],
        world_size=manifest["world_size"],
        zero_stage=manifest["zero_stage"],
        trainable={name: tuple(shape) for name, shape in manifest["trainable"].items()},
        samples_per_step=manifest.get("samples_per_step"),
        num_rows=manifest.get("num_rows"),
        is_resumable=manifest["is_resumable"],
        quantization=manifest.get("quantization"),  # manifests are older than quantised training
    )


def why_incomplete(folder: Path) -> str | None:
    """Say why a checkpoint cannot be resumed from; None if every file is there, in full.

    A missing or short file is found at once; a file of the right size is read to compare its checksum.
    """
    manifest = _read_manifest(folder)
    if manifest is None:
        return f"it has no readable {MANIFEST_NAME}, so saving it was interrupted"
    if not manifest["is_resumable"]:
        return "it holds weights alone (--save_only_model True), without optimizer state"
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
    names = list(manifest["files"])
    for name, checksum in zip(names, _hash_files([folder / name for name in names]), strict=True):
        if checksum != manifest["files"][name]["sha256"]:
            return f"{name} has another content than when it was saved"
    return None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, complete or not, newest first."""
    if not output_dir.is_dir():
        return []
    found = [(int(match[1]), path) for path in output_dir.iterdir() if (match := _FOLDER_PATTERN.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir()]


def find_newest_complete(output_dir: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Find the newest complete checkpoint.

    Returns:
        its folder or None, and the newer ones that were passed over, each with the reason.
    """
    passed_over = []
    for folder in list_checkpoints(output_dir):
        reason = why_incomplete(folder)
        if reason is None:
            return folder, passed_over
        passed_over.append((folder, reason))
    return None, passed_over


def choose_checkpoint(output_dir: Path, resume: str) -> Path | None:
    """Decide what a run goes on from, and log the decision.

    Args:
        resume: "auto", "never", or the path of a checkpoint.
    Returns:
        the checkpoint's folder; None to start from the beginning.
    Raises:
        UserError: the path names no complete checkpoint, or there were complete ones and all are damaged.
    """
    if resume == "never":
        return None
    if resume != "auto":
        folder = Path(resume)
        if not folder.is_dir():
            raise UserError(f"--resume {resume}: no such folder; expected auto, never, or a checkpoint-N folder")
        reason = why_incomplete(folder)
        if reason is not None:
            raise UserError(f"--resume {resume}: {reason}; choose another checkpoint, or --resume auto")
        logger.info("resuming from %s", folder)
        return folder
    folder, passed_over = find_newest_complete(output_dir)
    for path, reason in passed_over:
        logger.warning("passing over %s: %s", path, reason)
    if folder is not None:
        logger.info("resuming from %s; --resume never starts anew", folder)
    elif any(_read_manifest(path) is not None for path, _ in passed_over):
        raise UserError(
            f"{output_dir} holds {len(passed_over)} checkpoint(s), none of which can be resumed from; "
            "--resume never starts from the beginning"
        )
    elif passed_over:
        logger.warning("no checkpoint was ever complete in %s: starting from the beginning", output_dir)
    return folder


def check_same_run(folder: Path, found: CheckpointFacts, current: CheckpointFacts) -> None:
    """Refuse to load optimizer state into a run that it does not belong to.

    Another number of ranks is none of the reasons: the shards are put together for it (`llava_saep.train.universal`).

    Raises:
        UserError: the ZeRO stage, the quantisation, the set of learning parameters, or the samples of a step differ.
    """
    advice = "go on with the settings of that run, or start anew with --resume never and another --output_dir"
    if found.zero_stage != current.zero_stage:
        raise UserError(
            f"{folder} was saved under ZeRO stage {found.zero_stage}, this run has {current.zero_stage}; {advice}"
        )
    if found.quantization != current.quantization:
        raise UserError(
            f"{folder} was saved beside a language model of {found.quantization or '16 bits or more'}, this run has "
            f"{current.quantization or '16 bits or more'} (--bits, --quant_type, --double_quant); {advice}"
        )
    _check_same_parameters(folder, found, current, advice)
    if found.samples_per_step not in (None, current.samples_per_step):
        raise UserError(
            f"{folder} was saved by a run of {found.samples_per_step} samples per step on {found.world_size} rank(s), "
            f"this one takes {current.samples_per_step} on {current.world_size}: its place in the data and its "
            "schedule count steps. Choose --per_device_train_batch_size and --gradient_accumulation_steps so that "
            f"their product with the number of ranks is {found.samples_per_step}, or start anew with --resume never"
        )
    if found.num_rows not in (None, current.num_rows):
        logger.warning(
            "%s was saved by a run on %d samples or packed rows, this one has %d: their order and the number of steps "
            "differ, so some samples come twice in this epoch and others not at all",
            folder,
            found.num_rows,
            current.num_rows,
        )


def _check_same_parameters(folder: Path, found: CheckpointFacts, current: CheckpointFacts, advice: str) -> None:
    if found.trainable == current.trainable:
        return
    names = sorted(
        name
        for name in found.trainable.keys() | current.trainable.keys()
        if found.trainable.get(name) != current.trainable.get(name)
    )
    name = names[0]
    raise UserError(
        f"{folder} belongs to a run that trains other parameters ({len(names)} differ, such as {name!r}: "
        f"saved {found.trainable.get(name)}, now {current.trainable.get(name)}); {advice}"
    )


# Disks that take no more


def _find_write_failure(error: BaseException | None) -> BaseException | None:
    """The exception, among this one and what led to it, that says that a file could not be written; None: none does."""
    while error is not None:
        shown = str(error)
        if isinstance(error, OSError) or _WRITE_FAILURE_PATTERN.search(shown) or _GONE_PATTERN.search(shown):
            return error
        error = error.__context__
    return None


def _free_space(folder: Path) -> str:
    place = folder
    while not place.is_dir():
        place = place.parent
    usage = shutil.disk_usage(place)
    return f"{usage.free / 2**20:,.1f} MiB of {usage.total / 2**20:,.1f} MiB are free there"


@contextmanager
def removing_what_fails(folder: Path) -> Iterator[None]:
    """Delete a folder that cannot be written to its end, so that it does not fill the disk, and say why.

    Ranks write into one folder and fail alone: one that still writes there finds it gone, and says that instead.

    Raises:
        SavingError: a file in the folder could not be written, with the free space, or the folder has disappeared.
    """
    try:
        yield
    except Exception as error:
        failure = _find_write_failure(error)
        if failure is None:
            raise
        shown = str(error).strip() or type(error).__name__
        space = _free_space(folder)
        shutil.rmtree(folder, ignore_errors=True)
        if _GONE_PATTERN.search(str(failure)):
            raise SavingError(
                f"{folder} disappeared while it was being saved ({shown}): another rank could not write there and "
                "removed it, as its own message says, or another program did. What was complete before is untouched; "
                "give the same command again to go on"
            ) from error
        raise SavingError(
            f"{folder} could not be written ({shown}); {space}. It was removed, what was complete before is untouched. "
            "Make room, or keep fewer checkpoints (--save_total_limit), and give the same command again to go on"
        ) from error


def remove_old_checkpoints(output_dir: Path, *, keep: int | None) -> list[Path]:
    """Delete checkpoints beyond the `keep` newest complete ones, and torn ones that are older than a complete one.

    Call it only after the newest manifest is written, so that a complete checkpoint exists at every moment. A folder
    counts as complete here if it has a manifest; contents were compared when it was written.

    Args:
        keep: None: all complete ones.
    Returns:
        the deleted folders.
    """
    removed, num_complete = [], 0
    for folder in list_checkpoints(output_dir):
        is_complete = _read_manifest(folder) is not None
        if is_complete and (keep is None or num_complete < keep):
            num_complete += 1
        elif num_complete > 0:
            try:
                # Without its manifest a half-deleted folder is no checkpoint.
                (folder / MANIFEST_NAME).unlink(missing_ok=True)
                shutil.rmtree(folder)
            except OSError as error:  # on shared storage, somebody may be reading there
                logger.warning("%s is no longer needed and could not be deleted: %s", folder, error)
            else:
                removed.append(folder)
    return removed


def publish(staging: Path, output_dir: Path) -> None:
    """Move the files of a finished model from `staging` into `output_dir`, config.json last, and remove `staging`.

    A reader that finds config.json finds all of the model; each file appears whole (same file system). Weights of an
    earlier model of another kind are deleted, since a folder is taken for what the weights in it say.
    """
    share_like_folder(staging)
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    names = {path.relative_to(staging).as_posix() for path in files}
    for path in files:
        if path != staging / "config.json":
            target = output_dir / path.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    for path in sorted(output_dir.iterdir()):
        if _WEIGHTS_PATTERN.fullmatch(path.name) and path.name not in names:
            logger.warning("%s of an earlier model gives way to the trained one", path)
            path.unlink()
    if "config.json" in names:
        os.replace(staging / "config.json", output_dir / "config.json")
    shutil.rmtree(staging)


def set_aside(output_dir: Path, *, resumed: Path | None = None) -> Path | None:
    """Move checkpoints that a run does not go on from out of its way.

    Left in place, they would be taken for this run's when it is resumed, and push its own out of `save_total_limit`.

    Args:
        resumed: the checkpoint that the run goes on from, which stays, as do older ones beside it, and torn ones, which
            are never resumed from. None: everything is moved (`--resume never`).
    Returns:
        the folder that holds them now; None if there were none.
    """
    folders = list_checkpoints(output_dir)
    if resumed is not None:
        places = [folder.resolve() for folder in folders]
        # From another folder: nothing here belongs to the run that it goes on.
        num_newer = places.index(resumed.resolve()) if resumed.resolve() in places else len(folders)
        folders = [folder for folder in folders[:num_newer] if _read_manifest(folder) is not None]
    if not folders:
        return None
    number = 1
    while (target := output_dir / f"earlier_run_{number}").exists():
        number += 1
    target.mkdir()
    for folder in folders:
        os.replace(folder, target / folder.name)
    logger.warning("%d checkpoint(s) of an earlier run were moved to %s", len(folders), target)
    return target
