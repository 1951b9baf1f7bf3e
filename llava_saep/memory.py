"""How much memory can be had now, of the machine, its container or a GPU."""

from pathlib import Path

import torch


def available_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated now; None where nothing tells."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    known = [bytes_ for bytes_ in (_free_memory_of_machine(), _free_memory_of_container()) if bytes_ is not None]
    return min(known, default=None)


def _free_memory_of_machine() -> int | None:
    fields = _numbers(Path("/proc/meminfo"))
    return fields["MemAvailable"] * 1024 if "MemAvailable" in fields else None


def _free_memory_of_container() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return None
    # Files that were read and are kept in memory count as used, and go when the memory is wanted.
    cached = _numbers(folder / "memory.stat").get("inactive_file", 0)
    return int(limit) - int(used) + cached if limit.isdecimal() else None


def _numbers(path: Path) -> dict[str, int]:
    """Lines of a name and a number, with or without colon and unit; empty where there is no such file."""
    try:
        lines = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}
