"""Starting one rank: device, process group, rank-zero logging, and what must not be waited for silently.

DeepSpeed on CPU starts by compiling a shared-memory all-reduce unless it is told not to, and ZeRO-3 there needs the
process group before TrainingArguments exist; both are done here. On GPUs nothing special is needed (docs/results.md
says what was run on one).
"""

from __future__ import annotations

import datetime
import logging
import os
import socket
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed
from tqdm import tqdm

from llava_saep.errors import UserError
from llava_saep.program import quieten_adapters

logger = logging.getLogger(__name__)

COMPILE_ALL_REDUCE_VARIABLE = "LLAVA_SAEP_SHM_ALL_REDUCE"
"""Set to 1, DeepSpeed compiles its shared-memory all-reduce for CPU ranks (needs g++ and minutes, once)."""

T = TypeVar("T")


# Ranks


def rank() -> int:
    """This process's number among all; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def cores_per_rank() -> int:
    """Processor cores for each rank of this machine, at least 1."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    return max(1, num_cores // num_ranks)


def is_rank_zero() -> bool:
    return rank() == 0


def is_first_of_machine() -> bool:
    """Whether this process speaks for its machine; a launcher without LOCAL_RANK is taken to run on one machine."""
    return int(os.environ.get("LOCAL_RANK", rank())) == 0


class _RankZeroFilter(logging.Filter):
    """Let other ranks speak of errors alone, since they repeat what rank 0 says."""

    def filter(self, record: logging.LogRecord) -> bool:
        return is_rank_zero() or record.levelno >= logging.ERROR


class _AboveBars(logging.StreamHandler):
    """Writes above a progress bar, which is drawn anew below."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=self.stream)
        except (OSError, ValueError):  # a closed pipe, as StreamHandler takes it
            self.handleError(record)


def configure_logging(level: int = logging.INFO) -> None:
    """Send this project's log to stderr, once, from rank 0 (errors from every rank)."""
    handler = _AboveBars()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    handler.addFilter(_RankZeroFilter())
    for name in ("llava_saep", "projectors"):
        own = logging.getLogger(name)
        own.handlers[:] = [handler]
        own.setLevel(level)
        own.propagate = False


def quieten_libraries() -> None:
    """Leave out what libraries repeat on every rank or step to no use; call it before they are loaded."""
    for name in ("reduce_scatter_tensor", "all_gather_into_tensor"):  # DeepSpeed's calls, renamed in torch 2.13
        warnings.filterwarnings("ignore", message=rf".*{name}. is deprecated", category=FutureWarning)
    quieten_adapters()
    if not has_accelerator():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it finds nothing better
    if not is_rank_zero():
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()


def barrier() -> None:
    """Wait for every rank."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def broadcast_object(value: T) -> T:
    """Return rank 0's value on every rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def is_true_anywhere(claim: bool | torch.Tensor, device: torch.device | str = "cpu") -> bool:
    """Whether any rank claims it; every rank must ask.

    Args:
        claim: as a tensor, a single boolean.
        device: on which the process group's backend works.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return bool(claim)
    flag = torch.as_tensor(claim, device=device).int()
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


def gather_objects(value: T) -> list[T]:
    """Return every rank's value, in the order of ranks, on every rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def gather_on_rank_zero(value: T) -> list[T]:
    """Return every rank's value, in the order of ranks, on rank 0; an empty list elsewhere."""
    values = gather_objects(value)
    return values if is_rank_zero() else []


def take_largest(values: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the largest of all ranks' values at each place, on every rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    largest = values.to(device, copy=True)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return largest.to(values.device)


# Start


def has_accelerator() -> bool:
    """Whether transformers would place a model on something else than the CPU."""
    return torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()


def accelerator_has_bf16() -> bool:
    """Whether the accelerator computes in bfloat16, which those that are not CUDA devices are taken to do."""
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def fit_to_device(
    arguments: Mapping[str, Any], *, on_accelerator: bool, available_reporters: tuple[str, ...] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Adapt arguments for transformers.TrainingArguments to this machine.

    Args:
        arguments: as given on the command line.
        on_accelerator: False: the run is on CPU, whether asked for or for want of a GPU.
        available_reporters: what `--report_to` can name here; None: everything.
    Returns:
        the adapted arguments, and a sentence on each thing that was changed against the user's word.
    Raises:
        UserError: fp16 on CPU.
    """
    fitted, notes = dict(arguments), []
    if not on_accelerator:
        fitted["use_cpu"] = True
        if fitted.get("fp16"):
            raise UserError("--fp16 True: training in fp16 needs a GPU, none is used here; use --bf16 True or neither")
        if fitted.pop("tf32", None):
            notes.append("--tf32 True is ignored: it is a mode of NVIDIA GPUs, and this run is on CPU")
    reporters = reporter_names(fitted.get("report_to"))
    if available_reporters is not None:
        reporters = list(available_reporters) if "all" in reporters else reporters
        missing = [name for name in reporters if name not in (*available_reporters, "none")]
        for name in missing:
            notes.append(f"--report_to {name} is ignored: the package is not installed, or does not work")
        reporters = [name for name in reporters if name not in missing]
    fitted["report_to"] = reporters or "none"
    fitted.setdefault("log_level_replica", "error")
    fitted.setdefault("logging_nan_inf_filter", False)  # the library would log the mean of earlier losses for a NaN
    return fitted, notes


def reporter_names(report_to: str | Sequence[str] | None) -> list[str]:
    """Read what `--report_to` names: one, or several with commas between them."""
    return report_to.split(",") if isinstance(report_to, str) else list(report_to or ())


def available_reporters(asked: Sequence[str]) -> tuple[str, ...]:
    """Names that `--report_to` can take here; of those that are asked for, only what can be started."""
    from transformers.integrations import (
        get_available_reporting_integrations,
        get_reporting_integration_callbacks,
    )

    usable = []
    for name in get_available_reporting_integrations():
        try:
            if name in asked or "all" in asked:
                get_reporting_integration_callbacks(name)[0]()
            usable.append(name)
        except Exception as error:  # whatever a package throws when it is imported
            logger.warning("%s cannot be used: %s: %s", name, type(error).__name__, error)
    return tuple(usable)


def runs_on_accelerator(arguments: Mapping[str, Any]) -> bool:
    """Whether a run with these arguments uses the machine's accelerator."""
    return has_accelerator() and not arguments.get("use_cpu", False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _describe_lone_process() -> None:
    """Give a process without a launcher the variables that process groups are made from."""
    if "RANK" in os.environ:
        return
    lone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({**lone, "MASTER_PORT": str(_free_port())})


def start_process_group(*, uses_deepspeed: bool, on_accelerator: bool, timeout_seconds: float) -> None:
    """Make the process group where transformers would make it too late or not at all.

    With DeepSpeed on CPU, ZeRO-3's zero.Init asks deepspeed.comm for the world size before any engine exists, and
    transformers initialises torch.distributed alone there. Everywhere else transformers does it.
    """
    if not uses_deepspeed:
        return
    _describe_lone_process()
    if on_accelerator:
        return
    timeout = datetime.timedelta(seconds=timeout_seconds)
    # DeepSpeed makes groups of its own for its collectives and gives them no timeout, so that a rank would wait half an
    # hour for a machine that has fallen silent, whatever --ddp_timeout says. torch reads its default when one is made.
    torch.distributed.distributed_c10d.default_pg_timeout = timeout
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if os.environ.get(COMPILE_ALL_REDUCE_VARIABLE) == "1":
        warn_of_stale_jit_locks()
    else:
        # The op is only a faster all-reduce between ranks of one host. Without it gloo does the work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", timeout=timeout, verbose=False)


def leave_process_group() -> None:
    """End the process group, without waiting for other ranks."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# Locks of interrupted compilations


@dataclass(frozen=True)
class StaleLock:
    """A lock file that a killed compilation left; every later run waits for it without a word.

    Args:
        path: the lock; deleting it lets the compilation start again.
        age_seconds: since it was made.
    """

    path: Path
    age_seconds: float


def extensions_folder() -> Path:
    """Where PyTorch keeps the extensions that it compiles at run time."""
    override = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(override) if override else Path.home() / ".cache" / "torch_extensions"


def _open_paths() -> set[str] | None:
    """Files that this user's processes hold open; None where the system does not tell."""
    processes = Path("/proc")
    if not (processes / "self" / "fd").is_dir():
        return None
    paths = set()
    for descriptors in processes.glob("[0-9]*/fd"):
        try:
            for descriptor in descriptors.iterdir():
                paths.add(os.readlink(descriptor))
        except OSError:  # another user's process, or one that has just ended
            continue
    return paths


def find_stale_jit_locks(folder: Path | None = None, *, max_age_seconds: float = 1800) -> list[StaleLock]:
    """Find locks of compilations that no longer run.

    torch.utils.file_baton creates `<extension>/lock`, keeps it open while it compiles, and deletes it at the end; a
    killed run does not. Where open files cannot be listed, a lock older than `max_age_seconds` counts as stale.

    Args:
        folder: None: where PyTorch puts its extensions.
    """
    folder = extensions_folder() if folder is None else folder
    locks = [path for depth in ("*/lock", "*/*/lock") for path in sorted(folder.glob(depth))]
    held = _open_paths() if locks else None
    stale = []
    for path in locks:
        try:
            age = time.time() - path.stat().st_mtime
        except FileNotFoundError:
            continue
        is_stale = age > max_age_seconds if held is None else str(path.resolve()) not in held
        if is_stale:
            stale.append(StaleLock(path, age))
    return stale


def warn_of_stale_jit_locks() -> None:
    """Say which locks would make a compilation wait for ever."""
    for lock in find_stale_jit_locks():
        logger.warning(
            "%s was left %d minutes ago by a compilation that is no longer running; DeepSpeed may wait for it without "
            "end. Delete it if no other run is compiling: rm %s",
            lock.path,
            lock.age_seconds // 60,
            lock.path,
        )
