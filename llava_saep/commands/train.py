"""`llava-saep train`: checks the flags once, then has the deepspeed launcher start the script on every rank."""

import argparse
import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from llava_saep.errors import UserError

if TYPE_CHECKING:
    from llava_saep.train.config import RunConfig

TRAINING_SCRIPT = Path(__file__).parents[1] / "train" / "train_mem.py"

VALUED_LAUNCHER_FLAGS = (
    "--hostfile",
    "--include",
    "--exclude",
    "--num_nodes",
    "--master_addr",
    "--master_port",
    "--node_rank",
    "--launcher",
    "--launcher_args",
    "--ssh_port",
    "--bind_core_list",
    "--venv_script",
)
SWITCHES_OF_LAUNCHER = ("--no_ssh", "--no_ssh_check", "--force_multi", "--bind_cores_to_rank")
"""Flags that the deepspeed launcher takes itself; all others go to the training script."""
LOCAL_LAUNCHER_FLAGS = frozenset(("--master_port", "--bind_cores_to_rank", "--bind_core_list"))
"""Those that mean something where all ranks are on this machine."""
DEFAULT_HOSTFILE = Path("/job/hostfile")
"""Where the deepspeed launcher looks for machines if it is told of none."""


def main(argv: Sequence[str]) -> int:
    """Check the flags, train with one process or start the ranks, and return the exit code."""
    if not argv:
        raise UserError("no flags were given; `llava-saep train --help` lists them")
    if {"-h", "--help"} & set(argv):
        print_help()
        return 0
    launch, training_flags = split_flags(argv)
    config = check_training_flags(training_flags)
    num_processes = launch.num_processes
    if num_processes is None and not (launch.hostfile or launch.include or launch.exclude):
        num_processes = default_num_processes()
    own_flags = launcher_flags(launch)
    if needs_no_launcher(num_processes, own_flags):
        from llava_saep.train import train_mem

        return train_mem.main(training_flags)
    check_models(config)
    command = launcher_command(own_flags, training_flags, num_processes)
    return run_launcher(command, launcher_environment(num_processes, os.environ))


def launcher_parser() -> argparse.ArgumentParser:
    """The flags that are the launcher's, in the deepspeed launcher's own spelling, and `--num_processes`."""
    # No abbreviations: `--num_train_epochs` and the like belong to the training script.
    parser = argparse.ArgumentParser(prog="llava-saep train", allow_abbrev=False, add_help=False)
    group = parser.add_argument_group("launcher")
    group.add_argument(
        "--num_processes",
        "--num_gpus",
        "--num_accelerators",
        type=int,
        metavar="N",
        help="processes on each machine (default: one per GPU, or one without GPUs)",
    )
    for flag in VALUED_LAUNCHER_FLAGS:
        group.add_argument(flag, help="as in deepspeed --help")
    for flag in SWITCHES_OF_LAUNCHER:
        group.add_argument(flag, action="store_true", help="as in deepspeed --help")
    return parser


def split_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Separate the launcher's flags from those of the training script.

    Raises:
        UserError: fewer than one process, both a number and a choice of GPUs (the launcher takes one of them), or a
            hostfile that is not there (the launcher would go on without it).
    """
    launch, training_flags = launcher_parser().parse_known_args(argv)
    if launch.num_processes is not None and launch.num_processes < 1:
        raise UserError(f"--num_processes must be at least 1, got {launch.num_processes}")
    for flag, chosen in (("--include", launch.include), ("--exclude", launch.exclude)):
        if chosen and launch.num_processes is not None:
            raise UserError(f"--num_processes {launch.num_processes} contradicts {flag} {chosen}; drop one of them")
    if launch.hostfile and not Path(launch.hostfile).is_file():
        raise UserError(f"--hostfile {launch.hostfile}: no such file; it has one line 'name slots=GPUS' per machine")
    return launch, training_flags


def check_training_flags(training_flags: Sequence[str]) -> "RunConfig":
    """Raise UserError or ProjectorError for wrong flags and missing files, before any process is started."""
    from llava_saep.arguments import parse_arguments
    from llava_saep.train.run import check_paths

    config = parse_arguments(list(training_flags))
    check_paths(config)
    return config


def check_models(config: "RunConfig") -> None:
    """Raise UserError or ProjectorError where the models' configs already show that the run cannot work.

    The machine that launches need not have the models: what cannot be read here is left to the ranks.
    """
    from llava_saep.model.hub import hub_cache
    from llava_saep.model.projector_selection import trusting_projector_code
    from llava_saep.model.reading import UnreadableModel
    from llava_saep.train.planning import plan_model

    model = config.model
    with (
        trusting_projector_code(model.trust_projector_code),
        hub_cache(model.hub_cache),
        contextlib.suppress(UnreadableModel),
    ):
        plan_model(config)


def default_num_processes() -> int:
    """One process per GPU; one where there is none."""
    import torch

    return max(1, torch.cuda.device_count())


def needs_no_launcher(num_processes: int | None, launcher_flags: Sequence[str]) -> bool:
    """Whether one process without launcher does the same, and starts sooner.

    On a machine with several GPUs it does not: transformers would spread a lone process over all of them.
    """
    import torch

    return num_processes == 1 and not launcher_flags and torch.cuda.device_count() <= 1


def launcher_flags(launch: argparse.Namespace) -> list[str]:
    """The launcher's flags as they were given, without `--num_processes`."""
    flags = []
    for flag in VALUED_LAUNCHER_FLAGS:
        value = getattr(launch, flag.lstrip("-"))
        flags += [] if value is None else [flag, value]
    return flags + [flag for flag in SWITCHES_OF_LAUNCHER if getattr(launch, flag.lstrip("-"))]


def launcher_command(
    launcher_flags: Sequence[str], training_flags: Sequence[str], num_processes: int | None
) -> list[str]:
    """The command line of the deepspeed launcher.

    The launcher is started as a module of this interpreter, so that it works where its script is not on the PATH. On
    one machine the ranks meet at a free port: with the launcher's own default a second run beside the first one fails.
    """
    named = {flag for flag in launcher_flags if flag.startswith("--")}
    if num_processes is not None and named <= LOCAL_LAUNCHER_FLAGS and not DEFAULT_HOSTFILE.is_file():
        return local_launcher_command(launcher_flags, training_flags, num_processes)
    count = [] if num_processes is None else ["--num_gpus", str(num_processes)]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    is_on_one_machine = not {"--hostfile", "--num_nodes", "--node_rank", "--master_addr"} & named
    port = ["--master_port", str(free_port())] if is_on_one_machine and "--master_port" not in named else []
    return [*launcher, *count, *port, *launcher_flags, str(TRAINING_SCRIPT), *training_flags]


def local_launcher_command(
    launcher_flags: Sequence[str], training_flags: Sequence[str], num_processes: int
) -> list[str]:
    """The part of the deepspeed launcher that starts the ranks of one machine, without the part that finds machines.

    The latter ends with code 0 when the former is killed, and ignores CUDA_VISIBLE_DEVICES beside a number.
    """
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    devices = visible[:num_processes] if len(visible) >= num_processes else list(range(num_processes))
    machines = base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode()
    launcher = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={machines}"]
    port = [] if "--master_port" in launcher_flags else ["--master_port", str(free_port())]
    return [*launcher, "--master_addr", "127.0.0.1", *port, *launcher_flags, str(TRAINING_SCRIPT), *training_flags]


def free_port() -> int:
    """A port of this machine on which nothing listens at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launcher_environment(num_processes: int | None, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of the launcher: threads are shared out among ranks that run on the same processor.

    torch gives every process one thread per core, and threads that wait for each other spin: on a machine without GPUs
    two ranks with all cores each are slower than two ranks with one.
    """
    cores = os.cpu_count() or 1
    threads = str(max(1, cores // (num_processes or 1)))
    # The ranks import llava_saep and projectors from where this command found them, a user's projector from the folder
    # in which the command was given.
    folders = [str(TRAINING_SCRIPT.parents[2]), environment.get("PYTHONPATH"), os.getcwd()]
    search_path = os.pathsep.join(filter(None, folders))
    return {"OMP_NUM_THREADS": threads, **environment, "PYTHONPATH": search_path}


def run_launcher(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the launcher to its end and return its exit code; Ctrl-C reaches the ranks and is waited for.

    SIGTERM and SIGUSR1 go to the ranks, which save and end. The launcher itself would end each rank 30 s after the
    signal, saved or not.
    """
    process = subprocess.Popen(command, env=dict(environment))
    with stopping_ranks_of(process) as received:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            # The terminal has sent the signal to the launcher too, which stops its ranks.
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.terminate()
            raise
    return exit_code_of(code, was_stopped=bool(received))


@contextlib.contextmanager
def stopping_ranks_of(launcher: subprocess.Popen) -> Iterator[list[int]]:
    """Pass signals that ask for a stop on to the ranks.

    Yields:
        the signals that have come.
    """
    from llava_saep.train.interruption import STOP_SIGNALS

    received: list[int] = []

    def pass_on(number: int, _: object) -> None:
        received.append(number)
        ranks = find_ranks(launcher.pid)
        for rank in ranks:
            with contextlib.suppress(psutil.Error):
                rank.send_signal(number)
        if not ranks and launcher.poll() is None:
            launcher.terminate()  # they have not started yet, or are on other machines

    if threading.current_thread() is not threading.main_thread():  # Python allows no handlers there
        yield received
        return
    previous = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def find_ranks(launcher_pid: int) -> list[psutil.Process]:
    """Ranks on this machine below a launcher, without their data loaders' workers."""
    found = {}
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(launcher_pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if str(TRAINING_SCRIPT) in words and not any(word.startswith("deepspeed.launcher") for word in words):
                    found[process.pid] = (process, process.ppid())
    return [process for process, parent in found.values() if parent not in found]


def exit_code_of(code: int, *, was_stopped: bool) -> int:
    """What to end with, as a shell reports it.

    Args:
        code: the launcher's; negative where a signal has ended it.
        was_stopped: the ranks were asked to stop. The launcher says 1 if it had the signal too, or the signal's number
            if the ranks had nothing to save yet.
    """
    from llava_saep.train.interruption import STOPPED_EXIT_CODE

    if was_stopped and code in (1, -signal.SIGTERM, 256 - signal.SIGTERM):
        return STOPPED_EXIT_CODE
    return 128 - code if code < 0 else code


def print_help() -> None:
    """Print the launcher's flags, then those of the training script, and leave the program."""
    from llava_saep.arguments import parse_arguments

    print(launcher_parser().format_help())
    print("All other flags are passed to llava_saep/train/train_mem.py:\n")
    parse_arguments(["--help"])
