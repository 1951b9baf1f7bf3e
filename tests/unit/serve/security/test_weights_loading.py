"""Loading a model runs nothing that its files bring: weights are safetensors, or unpickled as tensors alone."""

import ast
import os
import pickle
from pathlib import Path

import pytest
import torch

from llava_saep.errors import UserError
from llava_saep.generation import LocalEngine
from tests.fixtures.model import write_model

REPOSITORY = Path(__file__).parents[4]


class Attack:
    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writes", ["torch.save", "pickle.dump"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "mm_projector.bin", "non_lora_trainables.bin"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, name, writes):
    folder, victim = write_model(tmp_path), tmp_path / "was_run"
    (folder / "model.safetensors").unlink()
    with (folder / name).open("wb") as file:
        weights = {"model.mm_projector.weight": Attack(victim)}
        torch.save(weights, file) if writes == "torch.save" else pickle.dump(weights, file)
    with pytest.raises(UserError):
        LocalEngine.from_pretrained(folder, device="cpu")
    assert not victim.exists()


def test_the_attack_of_this_test_works(tmp_path):
    pickle.loads(pickle.dumps(Attack(tmp_path / "was_run")))
    assert (tmp_path / "was_run").exists()


def test_nothing_in_the_packages_unpickles():
    """Each call of torch.load says weights_only=True; pickle, joblib and numpy's allow_pickle are not used."""
    for path in [*(REPOSITORY / "llava_saep").rglob("*.py"), *(REPOSITORY / "projectors").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert keywords.get("allow_pickle", "False") == "False", path
            if call == "torch.load":
                assert keywords.get("weights_only") == "True", f"{path}:{node.lineno}"
            if call in ("pickle.load", "pickle.loads", "joblib.load", "cloudpickle.loads"):
                assert path.name == "conformance.py", f"{path}:{node.lineno}"  # of its own dumps
