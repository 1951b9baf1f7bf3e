"""`llava-saep convert`: a saved model in any format to ours, LLaVA's or llava-hf's, or its projector alone."""

import argparse
import logging
from collections.abc import Sequence

from llava_saep.errors import UserError
from llava_saep.program import AbbreviatingParser
from projectors import ProjectorSelection, parse_projector_options, select_projector

DESCRIPTION = """\
Write a saved model in another format. INPUT is recognised from its files:

  own     what training here writes: a whole model, stage 1's projector, or a LoRA adapter
  llava   the original LLaVA's: a whole model (1.5, 1.6), stage 1's mm_projector.bin, or a LoRA adapter with
          non_lora_trainables.bin
  hf      llava-hf's: transformers' Llava and LlavaNext

An adapter is merged and a projector is joined with its language model, so the output is a whole model; with
--to projector it is the projector alone."""

EXAMPLES = """\
examples:
  llava-saep convert llava-v1.5-7b my-model                           the original LLaVA's model in our format
  llava-saep convert --to hf my-model my-model-hf                     for transformers without this package
  llava-saep convert --model_base lmsys/vicuna-7b-v1.5 lora merged    merge a LoRA adapter
  llava-saep convert --to projector llava-v1.5-7b mm_projector.bin    take the projector out, for stage 2
"""


def main(argv: Sequence[str]) -> int:
    """Convert, and say where the result is."""
    arguments = parser().parse_args(argv)
    # Imported here because they bring transformers, which takes seconds; --help shall not.
    from llava_saep.convert.checkpoint import DTYPES, Source
    from llava_saep.convert.run import convert
    from llava_saep.model.hub import local_folder

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    source = Source(
        folder=local_folder(arguments.input),
        format=None if arguments.source_format == "auto" else arguments.source_format,
        model_base=arguments.model_base,
        vision_tower=arguments.vision_tower,
        projector=named_projector(arguments),
        conversation_template=_checked_template(arguments.conversation_template),
        dtype=DTYPES.get(arguments.dtype),
        trust_projector_code=arguments.trust_projector_code,
    )
    convert(source, arguments.target, arguments.output)
    print(f"{arguments.input} -> {arguments.output} ({arguments.target})")
    return 0


def named_projector(arguments: argparse.Namespace) -> ProjectorSelection | None:
    """The projector that the flags name; None where the input says which it is.

    Raises:
        UserError: options without a projector.
        ProjectorError: unknown projector or option.
    """
    if arguments.mm_projector_type is None:
        if arguments.mm_projector_options:
            raise UserError("--mm_projector_options needs --mm_projector_type, the projector that they belong to")
        return None
    options = parse_projector_options(arguments.mm_projector_options or "")
    return select_projector(arguments.mm_projector_type, options, trust_projector_code=True)


def _checked_template(name: str | None) -> str | None:
    from llava_saep.data.templates import conversation_template

    if name is not None:
        conversation_template(name)
    return name


def parser() -> argparse.ArgumentParser:
    """The flags."""
    result = AbbreviatingParser(
        prog="llava-saep convert",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("input", metavar="INPUT", help="folder or hub name of the saved model, projector or adapter")
    result.add_argument("output", metavar="OUTPUT", help="folder to write, or FILE.bin with --to projector")
    result.add_argument(
        "--from",
        dest="source_format",
        choices=("auto", "own", "llava", "hf"),
        default="auto",
        help="refuse INPUT unless it has this format (default: auto, whichever it has)",
    )
    result.add_argument(
        "--to",
        dest="target",
        choices=("own", "llava", "hf", "projector"),
        default="own",
        help="format of OUTPUT (default: own)",
    )
    _add_part_flags(result)
    result.add_argument(
        "--dtype",
        choices=("stored", "float32", "float16", "bfloat16"),
        default="stored",
        help="of the weights (default: as they are stored)",
    )
    result.add_argument(
        "--trust_projector_code",
        "--trust-projector-code",
        action="store_true",
        help="import a projector that INPUT names as package.module:Class or path/to/file.py:Class",
    )
    return result


def _add_part_flags(result: argparse.ArgumentParser) -> None:
    group = result.add_argument_group("what a folder does not say, or says wrongly")
    group.add_argument(
        "--model_base",
        "--model-base",
        help="language model of a projector or adapter (folder or hub name); of ours, where it has moved",
    )
    group.add_argument(
        "--vision_tower",
        "--vision-tower",
        help="folder or hub name, in place of the config's mm_vision_tower; of ours, where it has moved",
    )
    group.add_argument("--mm_projector_type", "--mm-projector-type", help="in place of the config's")
    group.add_argument("--mm_projector_options", "--mm-projector-options", help="its options, as in training")
    group.add_argument(
        "--conversation_template",
        "--conversation-template",
        "--version",
        help="template that the model was trained with (default: mistral_instruct for Mistral, chatml_direct for a "
        "vocabulary with <|im_start|>, plain for stage 1, else v1)",
    )
