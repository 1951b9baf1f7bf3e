"""Write a checkpoint in our format: safetensors, config, processor."""

from pathlib import Path

from llava_saep.convert.checkpoint import Checkpoint


def write_own(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a folder that AutoModelForImageTextToText and AutoProcessor load after `import llava_saep`."""
    checkpoint.model.save_pretrained(folder)
    checkpoint.processor.save_pretrained(folder)
