"""`llava-saep projectors`: every registered projector with its tokens and parameters on a given tower and model."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from llava_saep.errors import UserError
from llava_saep.evaluation.report import terminal_table
from projectors import PatchGrid, ProjectorError, parse_projector_options, registered_projectors, select_projector

HEADER = ("projector", "tokens", "parameters", "layers read", "summary")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The tower and language model between which a projector is placed."""

    vision_hidden_size: int
    text_hidden_size: int
    grid: PatchGrid
    num_vision_layers: int | None


@dataclass(frozen=True, kw_only=True)
class ProjectorRow:
    """One line of the table. With `error`, the projector cannot be used with these sizes and has no numbers."""

    name: str
    summary: str
    paper: str
    provider: str
    num_tokens: int | None = None
    num_parameters: int | None = None
    vision_layers: tuple[int, ...] = ()
    error: str | None = None


def main(argv: Sequence[str]) -> int:
    """Print the table, or check one projector against the contract (`llava-saep projectors check NAME`)."""
    if argv and argv[0] == "check":
        return _check(argv[1:])
    arguments = _parser().parse_args(argv)
    sizes = _sizes(arguments)
    if arguments.mm_projector_options and not arguments.names:
        raise UserError("--mm_projector_options belong to one projector: name it, as in `llava-saep projectors saep`")
    options = parse_projector_options(arguments.mm_projector_options)
    rows = [describe_projector(name, sizes, options) for name in arguments.names or registered_projectors()]
    if arguments.json:
        print(json.dumps({"sizes": asdict(sizes), "projectors": [asdict(row) for row in rows]}, indent=2))
    else:
        _print_table(rows, sizes)
    return 0


def describe_projector(name: str, sizes: Sizes, options: Mapping[str, object] | None = None) -> ProjectorRow:
    """Count the tokens and parameters of a projector without allocating its weights.

    Raises:
        ProjectorError: the name or an option is unknown. A projector that is known, but does not go with the sizes,
            gives a row with `error`.
    """
    import torch

    # Whoever writes package.module:Class on the command line means to run it.
    selection = select_projector(name, options, trust_projector_code=True)
    spec = selection.spec
    row = {
        "name": selection.name if ":" in name else name,
        "summary": spec.summary,
        "paper": spec.paper,
        "provider": spec.provider,
    }
    try:
        config = selection.build_config(
            vision_hidden_size=sizes.vision_hidden_size,
            text_hidden_size=sizes.text_hidden_size,
            num_vision_layers=sizes.num_vision_layers,
        )
        num_tokens = config.num_output_tokens(sizes.grid)
        with torch.device("meta"):
            projector = selection.build(config)
    except ProjectorError as error:
        return ProjectorRow(**row, error=str(error))
    num_parameters = sum(parameter.numel() for parameter in projector.parameters())
    layers = tuple(config.vision_layers)
    return ProjectorRow(**row, num_tokens=num_tokens, num_parameters=num_parameters, vision_layers=layers)


def parse_grid(text: str) -> PatchGrid:
    """`"24x18"` -> PatchGrid(height=24, width=18)."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH in patches, such as 24x24, found {text!r}")
    return PatchGrid(int(height), int(width))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-saep projectors",
        description="Every registered projector with its visual tokens per image and its parameters. "
        "The sizes are those of CLIP ViT-L/14 at 336 px and a language model 4096 wide unless others are named.",
        epilog="llava-saep projectors check NAME: test a projector, also one of your own, against the contract.",
    )
    parser.add_argument(
        "names", nargs="*", help="only these: names, spellings such as mlp3x_gelu, or package.module:Class"
    )
    parser.add_argument("--vision_tower", help="folder or hub name of a tower to take the sizes from")
    parser.add_argument("--language_model", help="folder or hub name of a language model to take the size from")
    parser.add_argument("--vision_hidden_size", type=int, help="channels of the tower (default 1024)")
    parser.add_argument("--num_vision_layers", type=int, help="blocks of the tower (default 24)")
    parser.add_argument("--text_hidden_size", type=int, help="channels of the language model (default 4096)")
    parser.add_argument("--grid", type=parse_grid, help="patches of an image, HEIGHTxWIDTH (default 24x24)")
    parser.add_argument("--mm_projector_options", default="", help="'{\"stride\": 3}' or stride=3,kernel_size=7")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _sizes(arguments: argparse.Namespace) -> Sizes:
    from llava_saep.model.loading import read_config, read_vision_config

    vision_hidden_size, num_vision_layers, grid, text_hidden_size = 1024, 24, PatchGrid(24, 24), 4096
    if arguments.vision_tower:
        config = read_vision_config(arguments.vision_tower)
        vision_hidden_size, num_vision_layers = config.hidden_size, config.num_hidden_layers
        side = config.image_size // config.patch_size
        grid = PatchGrid(side, side)
    if arguments.language_model:
        config = read_config(arguments.language_model, "--language_model")
        text_hidden_size = getattr(config, "text_config", config).hidden_size
    return Sizes(
        vision_hidden_size=arguments.vision_hidden_size or vision_hidden_size,
        num_vision_layers=arguments.num_vision_layers or num_vision_layers,
        text_hidden_size=arguments.text_hidden_size or text_hidden_size,
        grid=arguments.grid or grid,
    )


def _print_table(rows: Sequence[ProjectorRow], sizes: Sizes) -> None:
    print(
        f"tower: {sizes.vision_hidden_size} channels, {sizes.num_vision_layers} blocks, "
        f"{sizes.grid.height} x {sizes.grid.width} patches; language model: {sizes.text_hidden_size} channels\n"
    )
    cells = [
        (
            row.name,
            "-" if row.num_tokens is None else str(row.num_tokens),
            "-" if row.num_parameters is None else f"{row.num_parameters:,}",
            " ".join(map(str, row.vision_layers)) or "-",
            row.error or row.summary,
        )
        for row in rows
    ]
    print(_left_aligned(cells))


def _left_aligned(rows: Sequence[Sequence[str]]) -> str:
    # The sentences of the last column stay outside the aligned columns.
    numbers = terminal_table([row[:-1] for row in rows], HEADER[:-1]).splitlines()
    numbers = [line for line in numbers if line.strip("-")]
    return "\n".join(f"{line}  {row[-1]}" for line, row in zip(numbers, [HEADER, *rows], strict=True))


def _check(argv: Sequence[str]) -> int:
    from projectors.conformance import check_projector

    parser = argparse.ArgumentParser(
        prog="llava-saep projectors check",
        description="Test a projector against the contract of docs/architecture.md; exit code 1 if it is not kept.",
    )
    parser.add_argument("name", help="a registered name, package.module:Class or path/to/file.py:Class")
    parser.add_argument("--mm_projector_options", default="", help="options to test it with")
    parser.add_argument("--compile", action="store_true", help="also run torch.compile, which takes longer")
    arguments = parser.parse_args(argv)
    options = parse_projector_options(arguments.mm_projector_options)
    report = check_projector(arguments.name, options, compile=arguments.compile, trust_projector_code=True)
    print(report)
    return 0 if report.passed else 1
