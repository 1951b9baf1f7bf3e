"""Who may read what is written."""

from pathlib import Path


def share_like_folder(path: Path) -> None:
    """Let whoever may read a folder read the files in it; safetensors leaves them to their owner alone.

    Args:
        path: the folder, or a single file, which is then shared as the folder that it lies in.
    """
    folder = path if path.is_dir() else path.parent
    mode = folder.stat().st_mode & 0o666
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            file.chmod(file.stat().st_mode | mode)
