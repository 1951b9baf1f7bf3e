"""What the README and the recipes tell people to type: it parses, and the example projector keeps the contract."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llava_saep.arguments import parse_arguments
from llava_saep.cli import main
from projectors.conformance import CHECK_NAMES, check_projector

ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "playground" / "recipes" / "saep"
EXAMPLE = ROOT / "playground" / "examples" / "blur_projector.py"

FAKE_DEEPSPEED = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["RECORDED_COMMAND"], "w") as file:
    json.dump(sys.argv[1:], file)
"""


def recipe_config(name, tmp_path):
    """Run a recipe with a launcher that only writes down what it was given."""
    launcher = tmp_path / "deepspeed"
    launcher.write_text(FAKE_DEEPSPEED)
    launcher.chmod(0o755)
    recorded = tmp_path / "command.json"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORDED_COMMAND": str(recorded)}
    subprocess.run(["bash", str(RECIPES / name)], cwd=ROOT, env=environment, check=True, timeout=60)
    script, *flags = json.loads(recorded.read_text())
    assert (ROOT / script).is_file()
    assert (ROOT / flags[flags.index("--deepspeed") + 1]).is_file()
    return parse_arguments(flags)


@pytest.mark.parametrize(
    ("name", "trainable", "learning_rate", "batch_size", "template"),
    [
        ("pretrain.sh", {"projector"}, 1e-3, 32, "plain"),
        ("finetune.sh", {"projector", "language_model"}, 2e-5, 16, "v1"),
        ("finetune_lora.sh", {"projector", "lora"}, 2e-4, 16, "v1"),
    ],
)
def test_recipes_parse_to_llavas_hyper_parameters(name, trainable, learning_rate, batch_size, template, tmp_path):
    config = recipe_config(name, tmp_path)
    assert config.model.projector.name == "saep"
    assert config.training.trainable == trainable
    assert config.training.trainer_arguments["learning_rate"] == learning_rate
    assert config.training.trainer_arguments["per_device_train_batch_size"] == batch_size
    assert config.training.trainer_arguments["warmup_steps"] == 0.03
    assert config.data.conversation_template == template
    assert config.data.max_length == 2048


def test_lora_recipe_has_llavas_ranks(tmp_path):
    config = recipe_config("finetune_lora.sh", tmp_path)
    assert (config.training.lora.rank, config.training.lora.alpha) == (128, 256)
    assert config.training.projector_learning_rate == 2e-5


def test_training_commands_of_the_readme_parse():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
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


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_links_between_the_pages_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text)
    missing = [target for target in targets if not ((ROOT / page).parent / target).exists()]
    assert missing == []
