"""What a number was measured on; it means little without it."""

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llava_saep import __version__
from llava_saep.provenance import commit

GIB = 1024**3


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, memory, accelerator and versions, JSON-able."""
    description = {
        "platform": platform.platform(),
        "processor": processor_name(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _total_memory(),
        "device": str(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "llava_saep": __version__,
        "commit": commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        description |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        }
    return description


def machine_line(machine: Mapping[str, Any]) -> str:
    """What `describe_machine` has found, in the few words that stand above a table."""
    hardware = f"{machine['processor']}, {machine['num_threads']} of {machine['num_cores']} cores"
    if "gpu" in machine:
        hardware = f"{machine['gpu']} ({machine['gpu_memory_bytes'] / GIB:.0f} GiB)"
    at_commit = f" at {machine['commit']}" if machine["commit"] else ""
    return f"{hardware}, torch {machine['torch']}, llava-saep {machine['llava_saep']}{at_commit}"


def processor_name() -> str:
    """The processor's name as its maker gives it, where the system tells; else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _total_memory() -> int | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
