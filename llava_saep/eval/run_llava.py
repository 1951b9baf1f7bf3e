"""One question about one image or several, with the flags of LLaVA's script of this name.

python -m llava_saep.eval.run_llava --model-path MODEL --image-file a.jpg,b.jpg --query "What has changed?"

Images stand in front of the question, or where it says <image-placeholder>. Several go with it, each with a marker of
its own (LLaVA writes a single marker and drops all but the first).
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from llava_saep.data.remote_images import find_image
from llava_saep.eval.model_vqa import add_decoding_flags, decoding_options
from llava_saep.evaluation.asking import fit_to_context
from llava_saep.generation import Predictor, content_with_placeholders
from llava_saep.program import AbbreviatingParser, run_program

NAME = "llava_saep.eval.run_llava"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; flags and defaults are LLaVA's."""
    parser = AbbreviatingParser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_flag("model-path", required=True, help="folder or hub name")
    parser.add_flag(
        "model-base", help="language model of a projector or adapter, where that is not known, or has moved"
    )
    parser.add_flag("image-file", required=True, help="paths or http addresses, with --sep between them")
    parser.add_flag("query", required=True, help="the question")
    parser.add_flag("conv-mode", help="conversation template (default: the one that the model was trained with)")
    parser.add_flag("sep", default=",", help="stands between two images (default: %(default)s)")
    add_decoding_flags(parser, max_new_tokens=512)
    return parser


def eval_model(args: Any) -> str:
    """Answer one question and print the answer, as LLaVA's function of this name.

    Args:
        args: an object with the flags as attributes; `image_file` may be a list. `device` and `trust_projector_code`
            may be absent.
    Returns:
        the answer.
    Raises:
        UserError, ProjectorError: a value, the model's folder or an image is wrong.
    """
    options = decoding_options(args)
    paths = args.image_file.split(args.sep) if isinstance(args.image_file, str) else args.image_file
    images = [find_image(path) for path in paths]
    predictor = Predictor.from_pretrained(
        args.model_path,
        device=getattr(args, "device", None),
        trust_projector_code=getattr(args, "trust_projector_code", False),
        model_base=args.model_base,
        template=args.conv_mode,
    )
    content = content_with_placeholders(args.query, images)
    fitted = fit_to_context(options, predictor, "--max-new-tokens")
    (answer,) = predictor.generate([[{"role": "user", "content": content}]], fitted)
    print(answer)
    return answer


def main(argv: Sequence[str] | None = None) -> int:
    """Answer one question; returns the exit code. Errors as `eval_model`."""
    eval_model(build_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(NAME, main, sys.argv[1:]))
