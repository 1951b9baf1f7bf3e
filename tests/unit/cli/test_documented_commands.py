"""What the README tells people to type: it parses, and the example projector keeps the contract."""

import re
from pathlib import Path

import pytest

from llava_saep.arguments import parse_arguments
from llava_saep.cli import main
from projectors.conformance import CHECK_NAMES, check_projector

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "playground" / "examples" / "blur_projector.py"


@pytest.mark.parametrize("page", ["README.md", "docs/running.md"])
def test_training_commands_of_a_page_parse(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    commands = " ".join(blocks).replace("\\\n", " ").splitlines()
    training = [command.split() for command in commands if "--data_path" in command]
    assert training
    for words in training:
        flags = words[next(index for index, word in enumerate(words) if word == "--model_name_or_path") :]
        parse_arguments(flags)


def test_readme_shows_the_example_projector_as_it_is():
    assert EXAMPLE.read_text(encoding="utf-8") in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("check", CHECK_NAMES)
def test_example_projector_keeps_the_contract(check):
    report = check_projector(f"{EXAMPLE}:BlurProjector", checks=[check], trust_projector_code=True)
    report.raise_if_failed()


def test_projectors_check_prints_the_report_and_exits_with_0(capsys):
    assert main(["projectors", "check", f"{EXAMPLE}:BlurProjector"]) == 0
    assert "blur: " in capsys.readouterr().out


def test_projector_that_breaks_the_contract_exits_with_1(tmp_path, capsys):
    broken = EXAMPLE.read_text().replace("return grid.num_patches", "return grid.num_patches + 1")
    (tmp_path / "wrong.py").write_text(broken)
    assert main(["projectors", "check", f"{tmp_path / 'wrong.py'}:BlurProjector"]) == 1
    assert "failed   output_has_the_promised_shape" in capsys.readouterr().out


IGNORED = {".venv", ".pytest_cache", ".ruff_cache", "runs", "checkpoints", "build", "dist"}
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "*/README.md", "*/*/README.md", "*/*/*/README.md")
    for page in ROOT.glob(pattern)
    if not IGNORED & set(page.relative_to(ROOT).parts)
)


def anchors(page):
    """Names of a page's headings in addresses, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_all_pages_are_looked_at():
    assert {"README.md", "docs/results.md", "docs/comparison.md", "deepspeed_configs/README.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_links_between_the_pages_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:|mailto:)([^)#]*)(?:#([^)]*))?\)", text)
    missing = []
    for path, anchor in targets:
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(f"{path}#{anchor}")
    assert missing == []
