"""docs/projectors.md is what the registry says, on every machine, and its links and examples hold."""

import dataclasses
import importlib.metadata
import re
from pathlib import Path

import pytest

from llava_saep.cli import main
from llava_saep.commands.projectors import docs
from llava_saep.commands.projectors.docs import REGENERATE, built_in_specs, reference_page
from llava_saep.commands.projectors.explaining import example_flags, paragraphs
from projectors import (
    Projector,
    ProjectorConfig,
    parse_projector_options,
    register_projector,
    select_projector,
)

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "projectors.md"


@pytest.fixture(scope="module")
def page():
    return reference_page()


def test_committed_page_is_what_the_registry_says(page):
    assert PAGE.read_text(encoding="utf-8") == page, f"docs/projectors.md is out of date; run: {REGENERATE}"


def section(page, name):
    return page.split(f"\n## {name}\n")[1].split("\n## ")[0]


def test_page_has_a_row_and_a_section_for_every_built_in_projector_with_all_it_registers(page):
    for spec in built_in_specs():
        text = section(page, spec.name)
        assert f"| [`{spec.name}`](#{spec.name}) |" in page
        assert spec.paper in text
        for name in (*spec.aliases, *spec.presets):
            assert f"`{name}`" in text
        for field in dataclasses.fields(spec.config_class):
            assert field.name in ("vision_hidden_size", "text_hidden_size") or f"| `{field.name}` |" in text


def test_saep_is_said_to_be_a_reconstruction(page):
    assert "reconstruction from the paper's abstract" in page.split("| projector |")[0]
    assert "reconstruction of SAEP from its abstract" in section(page, "saep")


def test_numbers_are_those_known_from_elsewhere(page):
    # mlp2x_gelu: 1024 * 4096 + 4096 and 4096 * 4096 + 4096.
    assert "- parameters: 20,979,712" in section(page, "mlp")
    assert "`ceil(H / stride) * ceil(W / stride)`, 144 on 24 x 24" in section(page, "saep")
    assert "- layers read: 12 16 22 23" in section(page, "saep")
    assert "(language model 1024 wide)" in section(page, "identity")


def test_projectors_from_elsewhere_leave_the_page_as_it_is(page, monkeypatch):
    class Own(Projector):
        """A projector of a test."""

    register_projector("own_of_a_test", config=ProjectorConfig, summary="Not built in.")(Own)
    broken = importlib.metadata.EntryPoint("broken", "absent_package.module", "llava_saep.projectors")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **selection: [broken])
    assert reference_page() == page


def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)]+)\)", page)
    headings = set(re.findall(r"^## (.+)$", page, flags=re.MULTILINE))
    for target in targets:
        path, _, anchor = target.partition("#")
        assert anchor in headings if not path else (PAGE.parent / path).exists(), target


def test_rows_of_a_table_have_as_many_cells_as_its_header(page):
    lines = page.splitlines()
    for previous, line in zip(lines, lines[1:], strict=False):
        if previous.startswith("|") and line.startswith("|"):
            bars = [len(re.findall(r"(?<!\\)\|", each)) for each in (previous, line)]
            assert bars[0] == bars[1], line


@pytest.mark.parametrize("spec", built_in_specs(), ids=lambda spec: spec.name)
def test_example_of_every_projector_and_preset_is_taken(spec):
    for name in (spec.name, *spec.presets):
        fixed = spec.presets[name].options if name in spec.presets else {}
        flags = example_flags(name, spec, fixed).split(maxsplit=3)
        assert flags[:2] == ["--mm_projector_type", name]
        select_projector(name, parse_projector_options(flags[3].strip("'") if len(flags) > 2 else ""))


def test_check_tells_whether_the_file_is_up_to_date_and_how_to_make_it_so(tmp_path, capsys, monkeypatch, page):
    monkeypatch.setattr(docs, "reference_page", lambda: page)
    path = tmp_path / "page.md"
    assert main(["projectors", "docs", "--output", str(path), "--check"]) == 1
    assert f"{REGENERATE} --output {path}" in capsys.readouterr().err
    assert main(["projectors", "docs", "--output", str(path)]) == 0
    assert path.read_text(encoding="utf-8") == page
    assert main(["projectors", "docs", "--output", str(path), "--check"]) == 0
    path.write_text(page + "more", encoding="utf-8")
    assert main(["projectors", "docs", "--output", str(path), "--check"]) == 1
    assert path.read_text(encoding="utf-8").endswith("more")


def test_check_of_a_page_that_is_not_there_says_so(tmp_path, capsys, monkeypatch, page):
    monkeypatch.setattr(docs, "reference_page", lambda: page)
    monkeypatch.chdir(tmp_path)
    assert main(["projectors", "docs", "--check"]) == 1
    error = capsys.readouterr().err
    assert "docs/projectors.md: no such file" in error and str(tmp_path) in error


def test_default_options_are_written_as_they_are_typed(page):
    for spec in built_in_specs():
        rows = re.findall(r"^\| `vision_layers` \|.*$", section(page, spec.name), flags=re.MULTILINE)
        default = re.split(r"(?<!\\)\|", rows[0])[3].strip(" `").replace("\\|", "|")
        expected = spec.config_class.default_vision_layers(24)
        assert tuple(select_projector(spec.name, {"vision_layers": default}).options["vision_layers"]) == expected


def test_spellings_stand_beside_the_aliases(page):
    row = next(line for line in page.splitlines() if line.startswith("| [`mlp`]"))
    assert "`mlp{N}x_gelu`" in row and "`mlp{N}x_res{M}x_gelu`" in row
    assert "`mlp{N}x_gelu`" in section(page, "mlp").split("| option |")[0]


def test_page_can_be_printed(capsys, page):
    assert main(["projectors", "docs", "--output", "-"]) == 0
    assert capsys.readouterr().out == page


def test_literal_blocks_of_a_docstring_stay_as_they_are():
    docstring = "Does this::\n\n    x = 1\n\n    y = 2\n\nand\nthat.\n\n    not literal"
    assert paragraphs(docstring) == [
        ("Does this:", False),
        ("x = 1\n\ny = 2", True),
        ("and\nthat.", False),
        ("    not literal", False),
    ]
