"""`llava-saep doctor`: looks for what is known to go wrong with machine and installation, and says what to do."""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.version import Version

GIB = 1024**3
MIN_FREE_DISK_BYTES = 2 * GIB
"""Below this a checkpoint of even a small model may not fit."""
MIN_SHARED_MEMORY_BYTES = GIB // 2
"""Docker's default of 64 MiB ends data loader workers and NCCL with a bus error."""

MARKS = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. A note can matter for some uses; a problem is in the way of training."""

    level: Literal["ok", "note", "problem"]
    subject: str
    detail: str
    advice: str = ""


def main(argv: Sequence[str]) -> int:
    """Print all findings; exit code 1 when one of them is a problem."""
    parser = argparse.ArgumentParser(prog="llava-saep doctor", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    findings = list(examine())
    num_problems = sum(finding.level == "problem" for finding in findings)
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            print(format_finding(finding))
        print(f"\n{num_problems or 'no'} problem{'' if num_problems == 1 else 's'} found")
    return 1 if num_problems else 0


def format_finding(finding: Finding) -> str:
    """One line, and a second one with the advice where there is some."""
    line = f"{MARKS[finding.level]}  {finding.subject}: {finding.detail}"
    return f"{line}\n         -> {finding.advice}" if finding.advice else line


def examine() -> Iterator[Finding]:
    """All findings, in the order of printing. A look that fails is itself a finding."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        check_python,
        check_requirements,
        check_torchvision,
        check_accelerator,
        check_compilers,
        check_jit_locks,
        check_space,
    )
    for check in checks:
        try:
            yield from check()
        except Exception as error:  # The doctor is for broken installations: one broken part must not hide the others.
            name = check.__name__.removeprefix("check_").replace("_", " ")
            yield Finding("problem", name, f"could not be examined: {type(error).__name__}: {error}")


def check_python() -> Iterator[Finding]:
    """The interpreter's version."""
    # No check: pip installs the package into a Python that is new enough, or not at all.
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()} ({sys.executable})"
    yield Finding("ok", "Python", detail)


def check_requirements() -> Iterator[Finding]:
    """Installed versions against the ranges of the package and the tested versions of constraints.txt."""
    try:
        declared = importlib.metadata.requires("llava-saep") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            "problem", "llava-saep", "is not installed", "pip install -c constraints.txt -e . in the repository"
        )
        return
    requirements = [Requirement(text) for text in declared]
    core = [requirement for requirement in requirements if requirement.marker is None or requirement.marker.evaluate()]
    yield from requirement_findings(core, installed_versions(), tested_versions())


def installed_versions() -> dict[str, str]:
    """Version of every installed distribution, by normalised name; the one that an import would find first wins."""
    versions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            versions.setdefault(normalized_name(name), distribution.version)
    return versions


def tested_versions() -> dict[str, str]:
    """Pins of the checkout's constraints.txt, by normalised name; empty where there is no checkout."""
    path = Path(__file__).parents[2] / "constraints.txt"
    if not path.is_file():
        return {}
    pins = (line.split("==") for line in path.read_text(encoding="utf-8").splitlines() if "==" in line)
    return {normalized_name(name): version.strip() for name, version in pins if not name.startswith("#")}


def normalized_name(name: str) -> str:
    """The spelling that package indices compare: `huggingface_hub` -> `huggingface-hub`."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def requirement_findings(
    requirements: Sequence[Requirement], installed: Mapping[str, str], tested: Mapping[str, str]
) -> Iterator[Finding]:
    """One finding per requirement: absent, out of range, in range but untested, or as tested."""
    for requirement in requirements:
        version = installed.get(normalized_name(requirement.name))
        pin = tested.get(normalized_name(requirement.name))
        advice = f"pip install -c constraints.txt '{requirement.name}{requirement.specifier}'"
        if version is None:
            yield Finding("problem", requirement.name, "is not installed", advice)
        elif not requirement.specifier.contains(version, prereleases=True):
            yield Finding("problem", requirement.name, f"{version} is outside {requirement.specifier}", advice)
        elif pin is not None and Version(version).public != Version(pin).public:
            yield Finding("note", requirement.name, f"{version}; tested with {pin}")
        else:
            yield Finding("ok", requirement.name, version)


def check_torchvision() -> Iterator[Finding]:
    """A torchvision made for another torch breaks the import of transformers' image code; none at all is fine."""
    installed = installed_versions()
    if "torchvision" not in installed:
        yield Finding("ok", "torchvision", "not installed, and not needed")
        return
    declared = [Requirement(text) for text in importlib.metadata.requires("torchvision") or []]
    yield torchvision_finding(installed["torchvision"], installed.get("torch", "0"), declared)


def torchvision_finding(version: str, torch_version: str, declared: Sequence[Requirement]) -> Finding:
    """Compare torch with what torchvision's own metadata asks for."""
    wanted = next((requirement.specifier for requirement in declared if requirement.name == "torch"), None)
    if wanted is not None and not wanted.contains(Version(torch_version).public, prereleases=True):
        detail = f"{version} was made for torch{wanted}, but torch is {torch_version}"
        return Finding("problem", "torchvision", detail, "pip uninstall torchvision (nothing here needs it)")
    return Finding("ok", "torchvision", f"{version}, matches torch {torch_version}; not needed")


def check_accelerator() -> Iterator[Finding]:
    """GPUs, or the cores that stand in for them."""
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: train with --fp16 True"
            yield Finding("ok", f"GPU {index}", f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, {bf16}")
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if shutil.which("nvidia-smi"):
        detail = f"nvidia-smi is there, but torch {torch.__version__} sees no GPU"
        yield Finding("problem", "accelerator", detail, "install a build of torch for this driver's CUDA version")
    else:
        yield Finding("ok", "accelerator", f"none; {cores} processor cores, training through gloo")


def check_compilers() -> Iterator[Finding]:
    """DeepSpeed compiles some operations on first use; plain ZeRO-1, 2 and 3 as configured here need none."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    advice = "needed by the *_offload configs alone (DeepSpeed compiles its Adam for the processor)"
    if compiler:
        yield Finding("ok", "C++ compiler", compiler)
    else:
        yield Finding("note", "C++ compiler", "none found", advice + "; Debian and Ubuntu: apt install g++")
    if shutil.which("ninja") is None and "ninja" not in installed_versions():
        yield Finding("note", "ninja", "not found", advice + "; pip install ninja")
    if shutil.which("numactl") is None:
        yield Finding("note", "numactl", "not found", "needed by the launcher's --bind_cores_to_rank alone")


def check_jit_locks() -> Iterator[Finding]:
    """Locks that a killed compilation left behind: later runs wait for them in silence, for ever."""
    from llava_saep.train.distributed import find_stale_jit_locks

    locks = [str(lock.path) for lock in find_stale_jit_locks()]
    if locks:
        advice = "if no compilation is running: rm " + " ".join(locks)
        yield Finding("problem", "DeepSpeed's compiled operations", f"{len(locks)} stale lock files", advice)
    else:
        yield Finding("ok", "DeepSpeed's compiled operations", "no stale locks")


def check_space() -> Iterator[Finding]:
    """Room on disk, and in the shared memory that processes hand tensors over in."""
    free = shutil.disk_usage(Path.cwd()).free
    yield space_finding(
        "disk", free, MIN_FREE_DISK_BYTES, "checkpoints are written under --output_dir: free some space"
    )
    shared_memory = Path("/dev/shm")
    if shared_memory.is_dir():
        free = shutil.disk_usage(shared_memory).free
        advice = "in a container: docker run --shm-size=8g, or --dataloader_num_workers 0"
        yield space_finding("shared memory", free, MIN_SHARED_MEMORY_BYTES, advice)


def space_finding(subject: str, free_bytes: int, needed_bytes: int, advice: str) -> Finding:
    """Compare the free space with what is needed."""
    detail = f"{free_bytes / GIB:.1f} GiB free"
    if free_bytes < needed_bytes:
        return Finding("problem", subject, f"{detail}, less than {needed_bytes / GIB:.1f} GiB", advice)
    return Finding("ok", subject, detail)
