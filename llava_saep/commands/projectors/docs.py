"""`llava-saep projectors docs`: the reference page, made from what the built-in projectors register.

Projectors of installed packages are left out, so that the page is the same on every machine.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from llava_saep.bench.placement import CLIP_L_INTO_7B, ProjectorDescription, Sizes, describe_projector
from llava_saep.commands.projectors.explaining import (
    class_description,
    config_description,
    example_flags,
    explain_options,
    paragraphs,
    preset_meaning,
    value_text,
)
from llava_saep.commands.projectors.text import layer_ranges
from llava_saep.errors import UserError
from projectors import ProjectorError, ProjectorSpec, projector_spec, registered_projectors

DEFAULT_OUTPUT = "docs/projectors.md"
REGENERATE = "llava-saep projectors docs"
_BUILT_IN = "built-in"
_MARKUP = re.compile(r"<|(?<!\s)\*|\*(?!\s)|(?<!\w)_|_(?!\w)")
"""Tags, and stars and underscores where they would begin or end emphasis."""

_INTRODUCTION = f"""\
# Projectors

Made by `{REGENERATE}` from what the projectors register; change it there, in their files under `projectors/`.

A projector turns hidden states of the vision tower into tokens of the language model. Choose one with
`--mm_projector_type NAME`, its options with `--mm_projector_options`: `NAME=VALUE,NAME=VALUE` with lists as `1|2|3`, or
a JSON object. `llava-saep projectors` prints tokens and parameters for any tower and language model,
`llava-saep projectors show NAME` everything about one projector, and `llava-saep projectors bench` measures them.

Tokens and parameters below are those between CLIP ViT-L/14 at 336 px (24 x 24 patches of 1024 channels, 24 blocks) and
a language model 4096 wide. In token formulas H and W are the sides of the grid of patches and other names are options.
Layers are hidden states of the tower: 0 is the embedding, -1 the last block, -2 the one before it.

`saep` is a reconstruction from the paper's abstract, not the paper's code.
"""

_ADDING = """\
## Your own

One file is a projector: a config whose fields are the options and whose `num_output_tokens` is arithmetic, and a
module with `forward(features, grid)` and `reset_parameters()`. [projectors/README.md](../projectors/README.md) shows a
complete one. Anywhere on your disk it is named as `path/to/file.py:Class`; in an installed package
([playground/examples/my_projector](../playground/examples/my_projector/README.md) is one), by an entry point of the
group `llava_saep.projectors`; in the folder `projectors/` it is registered by being there. Then:

```bash
llava-saep projectors check path/to/file.py:Class    # does it keep the contract?
llava-saep projectors bench path/to/file.py:Class saep mlp2x_gelu
```
"""


def main(argv: Sequence[str]) -> int:
    """Write the page, or with --check find out whether it is up to date (exit code 1 if not)."""
    arguments = _parser().parse_args(argv)
    page = reference_page()
    if arguments.output == "-" and not arguments.check:
        sys.stdout.write(page)
        return 0
    path = Path(arguments.output)
    if arguments.check:
        return _check(path, page)
    if not path.parent.is_dir():
        raise UserError(
            f"--output {path}: there is no folder {str(path.parent)!r}; run it in the repository or name a file"
        )
    path.write_text(page, encoding="utf-8")
    print(f"written: {path}")
    return 0


def _check(path: Path, page: str) -> int:
    if not path.is_file():
        print(f"{path}: no such file in {Path.cwd()}; run: {REGENERATE} --output {path}", file=sys.stderr)
        return 1
    if path.read_text(encoding="utf-8") == page:
        print(f"{path} is up to date")
        return 0
    print(f"{path} is not what the registry says now; run: {REGENERATE} --output {path}", file=sys.stderr)
    return 1


def reference_page() -> str:
    """The whole page, Markdown."""
    entries = [document_spec(spec) for spec in built_in_specs()]
    sections = "\n".join("\n".join(_section(entry)) for entry in entries)
    return "\n".join([_INTRODUCTION, _class_tokens(entries), *_overview(entries), "", sections, _ADDING])


def _class_tokens(entries: Sequence["Entry"]) -> str:
    options = {"keep_cls_token": True}
    takers = [f"`{e.spec.name}`" for e in entries if describe_projector(e.spec.name, e.sizes, options).error is None]
    return (
        f"The class token (`keep_cls_token=true`, or `--mm_vision_select_feature cls_patch`) is taken by\n"
        f"{', '.join(takers[:-1])} and {takers[-1]}; the others work on the map of patches and refuse it.\n"
    )


def built_in_specs() -> list[ProjectorSpec]:
    """The registry's entries of this package, sorted by name."""
    specs = []
    for name in registered_projectors():
        try:
            spec = projector_spec(name)
        except ProjectorError:  # An installed projector that cannot be imported does not belong here anyway.
            continue
        if spec.provider == _BUILT_IN:
            specs.append(spec)
    return specs


class Entry(NamedTuple):
    """A projector with its description at the page's sizes."""

    spec: ProjectorSpec
    sizes: Sizes
    row: ProjectorDescription


def document_spec(spec: ProjectorSpec) -> Entry:
    """Describe it at the page's sizes; what cannot change the width, before a language model as wide as the tower."""
    row = describe_projector(spec.name, CLIP_L_INTO_7B)
    if row.error is None:
        return Entry(spec, CLIP_L_INTO_7B, row)
    sizes = replace(CLIP_L_INTO_7B, text_hidden_size=CLIP_L_INTO_7B.vision_hidden_size)
    return Entry(spec, sizes, describe_projector(spec.name, sizes))


def _overview(entries: Sequence[Entry]) -> Iterator[str]:
    yield "| projector | also | tokens | on 24 x 24 | parameters | layers read | paper |"
    yield "|---|---|---|---:|---:|---|---|"
    for spec, _, row in entries:
        cells = (
            f"[`{spec.name}`](#{spec.name})",
            _other_names(spec),
            _formula(spec),
            str(row.num_tokens),
            f"{row.num_parameters:,}",
            layer_ranges(row.vision_layers),
            _paper(spec),
        )
        yield "| " + " | ".join(map(_cell, cells)) + " |"


def _section(entry: Entry) -> Iterator[str]:
    spec = entry.spec
    yield f"## {spec.name}\n"
    yield _prose(spec.summary) + "\n"
    yield from _facts(entry)
    yield ""
    yield from _description(class_description(spec))
    yield from _options(spec)
    if spec.presets:
        yield from _presets(entry)
    yield f"```bash\nllava-saep train ... {example_flags(spec.name, spec)}\n```\n"


def _facts(entry: Entry) -> Iterator[str]:
    spec, sizes, row = entry
    width = "" if sizes is CLIP_L_INTO_7B else f" (language model {sizes.text_hidden_size} wide)"
    yield f"- tokens: {_formula(spec)}, {row.num_tokens} on 24 x 24"
    yield f"- parameters: {row.num_parameters:,}{width}"
    yield f"- layers read: {layer_ranges(row.vision_layers)}"
    if _other_names(spec):
        yield f"- also called: {_other_names(spec)}"
    yield f"- paper: {_paper(spec)}"
    yield f"- file: [`{_file(spec)}`](../{_file(spec)})"


def _other_names(spec: ProjectorSpec) -> str:
    """Aliases, and the spellings that the summary shows with their numbers in braces."""
    spellings = re.findall(r"\w*\{\w+\}[\w{}]*", spec.summary) if spec.parse_spelling else []
    return ", ".join(f"`{name}`" for name in (*spec.aliases, *spellings))


def _file(spec: ProjectorSpec) -> str:
    return spec.module_class.__module__.replace(".", "/") + ".py"


def _description(docstring: str) -> Iterator[str]:
    for text, is_literal in paragraphs(docstring):
        if is_literal:
            yield f"```\n{text}\n```\n"
        else:
            # What the class was made from, and which original weights load, is easier to find in bold.
            yield re.sub(r"^Sources?:", "**Source and original checkpoints:**", _prose(text)) + "\n"


def _options(spec: ProjectorSpec) -> Iterator[str]:
    yield from _description(config_description(spec))
    yield "| option | type | default | what it does |"
    yield "|---|---|---|---|"
    for option in explain_options(spec.config_class, CLIP_L_INTO_7B.num_vision_layers):
        allowed = f"{option.type}, {option.allowed}" if option.allowed else option.type
        cells = (f"`{option.name}`", _prose(allowed), f"`{value_text(option, option.default)}`", _prose(option.help))
        yield "| " + " | ".join(map(_cell, cells)) + " |"
    yield ""


def _presets(entry: Entry) -> Iterator[str]:
    yield "| preset | fixes | on 24 x 24 | parameters | what it is |"
    yield "|---|---|---:|---:|---|"
    for name, preset in entry.spec.presets.items():
        row = describe_projector(name, entry.sizes)
        cells = (
            f"`{name}`",
            f"`{preset_meaning(preset)}`",
            "-" if row.num_tokens is None else str(row.num_tokens),
            "-" if row.num_parameters is None else f"{row.num_parameters:,}",
            _prose(preset.summary),
        )
        yield "| " + " | ".join(map(_cell, cells)) + " |"
    yield ""


def _formula(spec: ProjectorSpec) -> str:
    try:
        compile(spec.token_formula, "token_formula", "eval")
    except SyntaxError:
        return _prose(spec.token_formula)
    return f"`{spec.token_formula}`"


def _paper(spec: ProjectorSpec) -> str:
    if not spec.paper.startswith("https://"):
        return _prose(spec.paper)
    name = re.sub(r"^https://(arxiv\.org/abs/)?", "", spec.paper)
    return f"[{'arXiv ' if 'arxiv.org/abs/' in spec.paper else ''}{name}]({spec.paper})"


def _prose(text: str) -> str:
    """Text with the characters escaped that Markdown would read as markup, outside of `code`."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else _MARKUP.sub(r"\\\g<0>", part) for part in parts)


def _cell(text: str) -> str:
    """Text for one cell of a table; a bar would end it, in code too."""
    return " ".join(text.split()).replace("|", "\\|")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-saep projectors docs",
        description="Write the reference page of all built-in projectors from what they register.",
    )
    parser.add_argument(
        "--output", default=DEFAULT_OUTPUT, help=f"file, or - for the terminal (default {DEFAULT_OUTPUT})"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the file is not up to date")
    return parser
