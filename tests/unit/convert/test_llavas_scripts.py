"""LLaVA's own scripts for adapters and projectors, called with LLaVA's flags."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_saep.model import consolidate

ROOT = Path(__file__).parents[3]
CHECKPOINTS = ROOT / "tests" / "golden" / "llava" / "checkpoints"


@pytest.fixture
def script():
    def load(name):
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_merge_lora_weights_rounds_the_merged_weights_once(tmp_path, script):
    base = CHECKPOINTS / "llava_tiny_v15"
    flags = ["--model-path", str(CHECKPOINTS / "llava_tiny_lora"), "--model-base", str(base)]
    assert script("merge_lora_weights").main([*flags, "--save-model-path", str(tmp_path / "merged")]) == 0
    written = load_file(tmp_path / "merged" / "model.safetensors")
    adapter = load_file(CHECKPOINTS / "llava_tiny_lora" / "adapter_model.safetensors")
    stored = load_file(base / "model.safetensors")
    layer = "layers.0.self_attn.q_proj"
    down, up = (adapter[f"base_model.model.model.{layer}.lora_{part}.weight"] for part in "AB")
    scale = 8 / 4  # lora_alpha / r
    expected = (stored[f"model.{layer}.weight"].float() + scale * up @ down).half()
    assert not torch.equal(expected, stored[f"model.{layer}.weight"])
    torch.testing.assert_close(written[f"model.language_model.{layer}.weight"], expected, atol=0, rtol=1e-3)  # one ulp


def test_extract_mm_projector_writes_llavas_keys(tmp_path, script):
    model = CHECKPOINTS / "llava_tiny_v15"
    output = tmp_path / "mm_projector.bin"
    assert script("extract_mm_projector").main(["--model-path", str(model), "--output", str(output)]) == 0
    stored = load_file(model / "model.safetensors")
    extracted = torch.load(output, weights_only=True)
    assert extracted.keys() == {name for name in stored if "mm_projector" in name}
    assert all(torch.equal(tensor, stored[name]) for name, tensor in extracted.items())


def test_consolidate_joins_the_files_of_a_model_in_its_own_format(tmp_path):
    model = CHECKPOINTS / "llava_tiny_v15"
    stored = load_file(model / "model.safetensors")
    parts = tmp_path / "parts"
    shutil.copytree(model, parts, ignore=shutil.ignore_patterns("model.safetensors"))
    names = {name: f"pytorch_model-0000{1 + index % 2}-of-00002.bin" for index, name in enumerate(sorted(stored))}
    for file in sorted(set(names.values())):
        torch.save({name: tensor for name, tensor in stored.items() if names[name] == file}, parts / file)
    (parts / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    shutil.copytree(CHECKPOINTS / "clip_tiny", tmp_path / "clip_tiny")
    assert consolidate.main(["--src", str(parts), "--dst", str(tmp_path / "whole")]) == 0
    (file,) = [path for path in (tmp_path / "whole").iterdir() if path.suffix in (".bin", ".safetensors")]
    written = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["model_type"] == "llava_llama"
    assert written.keys() == stored.keys()
    assert all(written[name].equal(tensor) for name, tensor in stored.items())


def test_script_ends_with_the_commands_code(tmp_path, script, capsys):
    flags = ["--model-path", str(tmp_path), "--save-model-path", str(tmp_path / "merged")]
    assert script("merge_lora_weights").main(flags) == 2
    assert "has no config.json" in capsys.readouterr().err
