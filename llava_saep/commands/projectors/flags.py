"""Flags that several subcommands share: between which tower and language model a projector is placed."""

import argparse

from llava_saep.bench.placement import CLIP_L_INTO_7B, Sizes
from projectors import PatchGrid


def add_size_flags(parser: argparse.ArgumentParser) -> None:
    """The sizes by the names of two models, or one by one."""
    group = parser.add_argument_group(
        "sizes", "those of CLIP ViT-L/14 at 336 px and a language model 4096 wide, unless:"
    )
    group.add_argument("--vision_tower", help="folder or hub name of a tower to take the sizes from")
    group.add_argument("--language_model", help="folder or hub name of a language model to take the size from")
    group.add_argument("--vision_hidden_size", type=positive, help="channels of the tower (default 1024)")
    group.add_argument("--num_vision_layers", type=positive, help="blocks of the tower (default 24)")
    group.add_argument("--text_hidden_size", type=positive, help="channels of the language model (default 4096)")
    group.add_argument("--grid", type=parse_grid, help="patches of an image, HEIGHTxWIDTH (default 24x24)")


def add_option_flag(parser: argparse.ArgumentParser) -> None:
    """`--mm_projector_options`, as in training."""
    parser.add_argument(
        "--mm_projector_options", default="", metavar="OPTIONS", help="'{\"stride\": 3}' or stride=3,kernel_size=7"
    )


def sizes_of(arguments: argparse.Namespace) -> Sizes:
    """The sizes that the flags say; one that is given by itself goes before a named model's."""
    sizes = CLIP_L_INTO_7B
    vision_hidden_size, num_vision_layers = sizes.vision_hidden_size, sizes.num_vision_layers
    text_hidden_size, grid = sizes.text_hidden_size, sizes.grid
    if arguments.vision_tower:
        # Imported here because it brings transformers, which takes seconds.
        from llava_saep.model.loading import read_vision_config

        config = read_vision_config(arguments.vision_tower)
        vision_hidden_size, num_vision_layers = config.hidden_size, config.num_hidden_layers
        side = config.image_size // config.patch_size
        grid = PatchGrid(side, side)
    if arguments.language_model:
        from llava_saep.model.loading import read_config

        config = read_config(arguments.language_model, "--language_model")
        text_hidden_size = getattr(config, "text_config", config).hidden_size
    return Sizes(
        vision_hidden_size=arguments.vision_hidden_size or vision_hidden_size,
        num_vision_layers=arguments.num_vision_layers or num_vision_layers,
        text_hidden_size=arguments.text_hidden_size or text_hidden_size,
        grid=arguments.grid or grid,
    )


def parse_grid(text: str) -> PatchGrid:
    """`"24x18"` -> PatchGrid(height=24, width=18)."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH in patches, such as 24x24, found {text!r}")
    return PatchGrid(int(height), int(width))


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def not_negative(text: str) -> int:
    """An integer of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, found {text!r}")
    return int(text)
