"""How many replicas of a model there are: the settings, and their flags."""

import argparse
import dataclasses
from dataclasses import dataclass, fields

from llava_saep.errors import UserError
from llava_saep.program import AbbreviatingParser


@dataclass(frozen=True, kw_only=True)
class ReplicaSettings:
    """How many replicas there are, and what each of them gets.

    Args:
        replicas: copies of each model; with max_replicas the least number.
        max_replicas: where more questions come than replicas answer, start up to so many; None: never.
        max_ongoing_requests: questions that one replica holds, of which it answers one at a time.
        max_queued_requests: questions that wait beyond those; more are refused.
        num_cpus_per_replica: cores that Ray sets aside; also the threads of a replica.
        num_gpus_per_replica: None: one where the cluster has GPUs and the device is not the CPU, else none. Fractions
            put several replicas on one GPU.
        upscale_delay_seconds, downscale_delay_seconds: how long there must be too few or too many replicas.
    """

    replicas: int = 1
    max_replicas: int | None = None
    max_ongoing_requests: int = 4
    max_queued_requests: int = 16
    num_cpus_per_replica: float = 1.0
    num_gpus_per_replica: float | None = None
    upscale_delay_seconds: float = 30.0
    downscale_delay_seconds: float = 600.0

    def __post_init__(self) -> None:
        least = {"replicas": 1, "max_replicas": self.replicas, "max_ongoing_requests": 1}
        for name, value in dataclasses.asdict(self).items():
            # Not `value < least`: that is false of a NaN.
            if value is not None and not value >= least.get(name, 0):
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} must be at least {least.get(name, 0)}, got {value}")

    @property
    def most_replicas(self) -> int:
        """Replicas that there may be at once."""
        return self.max_replicas or self.replicas


def add_replica_flags(parser: AbbreviatingParser) -> None:
    """Give a parser --replicas and what goes with it."""
    default = ReplicaSettings()
    group = parser.add_argument_group("several replicas, on Ray Serve (in the repository: pip install -e '.[serve]')")
    helps = {
        "replicas": (int, "copies of the model; without it one, in this process and without Ray"),
        "max_replicas": (int, "start more while all are busy, up to so many"),
        "max_ongoing_requests": (int, f"questions that one replica holds (default: {default.max_ongoing_requests})"),
        "num_cpus_per_replica": (
            float,
            f"cores, and threads, of one replica (default: {default.num_cpus_per_replica:g})",
        ),
        "num_gpus_per_replica": (float, "GPUs of one replica; fractions share one (default: 1 where there are any)"),
        "upscale_delay_seconds": (float, f"be busy for so long first (default: {default.upscale_delay_seconds:g})"),
        "downscale_delay_seconds": (float, f"be idle for so long first (default: {default.downscale_delay_seconds:g})"),
    }
    for name, (kind, text) in helps.items():
        group.add_argument(*dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}")), type=kind, help=text)


def replica_settings_from(args: argparse.Namespace, *, max_queue: int) -> ReplicaSettings | None:
    """Read what `add_replica_flags` has added; None: nothing was given.

    Args:
        max_queue: questions that may wait while all replicas are busy.
    Raises:
        UserError: a number is too small, or a flag of replicas was given without --replicas.
    """
    names = [f.name for f in fields(ReplicaSettings) if f.name != "max_queued_requests"]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if given and "replicas" not in given:
        raise UserError(f"--{next(iter(given)).replace('_', '-')} is for several replicas; add --replicas N")
    if not given:
        return None
    # The front end counts what waits; Ray's own count is for what other front ends send to the same replicas.
    settings = ReplicaSettings(**given)
    return dataclasses.replace(settings, max_queued_requests=max_queue + settings.most_replicas)
