"""One conversion, from a folder in any format to a folder in the one asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from llava_saep.convert.checkpoint import Source, check_format, load_checkpoint
from llava_saep.convert.extract_projector import extract_projector
from llava_saep.convert.output import refuse_existing, written_at_once
from llava_saep.convert.to_hf import refuse_unrepresentable, write_hf
from llava_saep.convert.to_llava import write_llava
from llava_saep.convert.to_own import write_own
from llava_saep.errors import UserError
from llava_saep.model.projector_selection import trusting_projector_code

Target = Literal["own", "llava", "hf", "projector"]


def convert(source: Source, target: Target, output: str | Path) -> None:
    """Write the model of a folder in another format; adapters are merged.

    Raises:
        UserError, ProjectorError: the source cannot be read, the target has no place for it, or the output exists.
    """
    output = Path(output)
    found = check_format(source)
    refuse_existing(output)
    if output.resolve().is_relative_to(source.folder.resolve()):
        raise UserError(f"{output} lies inside {source.folder}; name an output outside of what is read")
    if target == "projector":
        extract_projector(source, output)
        return
    # Only LLaVA's folders are read with the help of a name for the tower; here it is what LLaVA's config shall say.
    only_written = target == "llava" and found != "llava"
    checkpoint = load_checkpoint(replace(source, vision_tower=None) if only_written else source)
    if target == "hf":
        refuse_unrepresentable(checkpoint.model.config)
    with trusting_projector_code(source.trust_projector_code), written_at_once(output) as partial:
        if target == "own":
            write_own(checkpoint, partial)
        elif target == "hf":
            write_hf(checkpoint, partial)
        else:
            write_llava(checkpoint, partial, final_folder=output, vision_tower=source.vision_tower)
