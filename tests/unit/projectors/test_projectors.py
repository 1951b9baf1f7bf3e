"""What single projectors promise beyond the contract."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from projectors import PatchGrid, ProjectorError, projector_spec, select_projector
from projectors.conformance import check_projector

REPOSITORY = Path(__file__).parents[3]


def build(spelling, options=None, **sizes):
    selection = select_projector(spelling, options)
    sizes = {"vision_hidden_size": 8, "text_hidden_size": 12} | sizes
    torch.manual_seed(0)
    return selection.build(selection.build_config(**sizes)).eval()


def test_importing_projectors_needs_torch_alone():
    program = """
import sys

class Block:
    names = {"llava_saep", "transformers", "deepspeed", "peft", "accelerate", "timm", "einops"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
import projectors, projectors.conformance

for name in projectors.registered_projectors():
    assert projectors.conformance.check_projector(name).passed, name
report = projectors.conformance.check_projector("saep")
assert any("transformers is not installed" in result.detail for result in report.results), report
print(*projectors.registered_projectors())
"""
    finished = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "saep" in finished.stdout.split()


def test_several_layers_are_concatenated_in_order():
    features = [torch.randn(2, 6, 8) for _ in range(2)]
    projector = build("linear", {"vision_layers": [1, 2]})
    expected = functional.linear(torch.cat(features, dim=2), projector.linear.weight, projector.linear.bias)
    assert torch.equal(projector(features, PatchGrid(2, 3)), expected)


def test_class_token_passes_through_token_wise_projectors():
    projector, tokens = build("mlp", {"keep_cls_token": True}), torch.randn(2, 7, 8)
    output = projector([tokens], PatchGrid(2, 3))
    assert output.shape == (2, 7, 12)
    torch.testing.assert_close(output[:, :1], projector.mlp(tokens[:, :1]), rtol=0, atol=1e-6)


def test_identity_returns_the_features():
    projector, tokens = build("identity", text_hidden_size=8), torch.randn(2, 6, 8)
    assert torch.equal(projector([tokens], PatchGrid(2, 3)), tokens)


def test_average_pooling_takes_rectangles():
    projector, tokens = build("avg_pool", {"num_queries": 4}), torch.randn(1, 24, 8)
    means = tokens.view(1, 2, 2, 2, 3, 8).mean((2, 4)).view(1, 4, 8)  # 4x6 patches: four 2x3 blocks
    torch.testing.assert_close(projector([tokens], PatchGrid(4, 6)), projector.mlp(means), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["avg_pool", "c_abstractor"])
def test_number_of_queries_must_be_square(name):
    with pytest.raises(ValueError, match="num_queries: got 5, expected a square number"):
        build(name, {"num_queries": 5})


@pytest.mark.parametrize("name", ["avg_pool", "c_abstractor"])
def test_fewer_patches_than_queries_are_refused_by_count_and_by_forward(name):
    options = {"num_queries": 9} | ({"hidden_size": 16, "depth": 1} if name == "c_abstractor" else {})
    projector = build(name, options)
    assert projector.config.num_output_tokens(PatchGrid(3, 3)) == 9
    with pytest.raises(ProjectorError, match="2x4 grid holds 8 patches, fewer than num_queries 9"):
        projector.config.num_output_tokens(PatchGrid(2, 4))
    with pytest.raises(ProjectorError, match="2x4 grid"):
        projector([torch.zeros(1, 8, 8)], PatchGrid(2, 4))


@pytest.mark.parametrize("name", ["avg_pool", "c_abstractor", "identity", "linear", "mlp", "qformer", "saep"])
@pytest.mark.parametrize("grid", [PatchGrid(0, 4), PatchGrid(4, 0)])
def test_empty_grids_are_refused_by_count_and_by_forward(name, grid):
    projector = build(name, projector_spec(name).config_class.tiny_options(), text_hidden_size=8)
    with pytest.raises(ProjectorError, match=f"{grid} grid holds no patch"):
        projector.config.num_output_tokens(grid)
    with pytest.raises(ProjectorError, match=f"{grid} grid holds no patch"):
        projector([torch.zeros(1, 0, 8) for _ in projector.config.vision_layers], grid)


def test_many_queries_can_be_checked_for_conformance():
    check_projector("avg_pool", {"num_queries": 144}, checks=["output_has_the_promised_shape"]).raise_if_failed()


def test_c_abstractor_positions_are_interpolated_on_another_grid():
    options = {"num_queries": 4, "hidden_size": 16, "depth": 1, "position_grid": [4, 4]}
    projector = build("c_abstractor", options)
    with torch.no_grad():
        projector.pos_emb.copy_(torch.randn_like(projector.pos_emb))
        without = build("c_abstractor", options | {"use_position_embedding": False})
        without.load_state_dict({k: v for k, v in projector.state_dict().items() if k != "pos_emb"})
        tokens = torch.randn(1, 48, 8)
        position_map = projector.pos_emb.view(1, 4, 4, 8).permute(0, 3, 1, 2)
        resized = functional.interpolate(position_map, size=(6, 8), mode="bicubic").flatten(2).transpose(1, 2)
        expected = without([tokens + resized], PatchGrid(6, 8))
        torch.testing.assert_close(projector([tokens], PatchGrid(6, 8)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{"prenorm": True}, {"num_eos_tokens": 2}, {"depth": 0}, {"init": "trunc_normal"}])
def test_c_abstractor_options_keep_the_contract(options):
    check_projector("c_abstractor", options).raise_if_failed()


def test_c_abstractor_appends_its_learned_tokens():
    projector = build("c_abstractor", {"num_queries": 4, "hidden_size": 16, "depth": 1, "num_eos_tokens": 2})
    output = projector([torch.randn(3, 6, 8)], PatchGrid(2, 3))
    assert output.shape == (3, 6, 12)
    assert torch.equal(output[1, 4:], projector.eos_tokens[0])


def test_qformer_queries_start_different_and_dropout_acts_in_training_only():
    options = {"num_queries": 5, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    projector, features = build("qformer", options), [torch.randn(1, 6, 8)]
    assert projector.query_tokens.std(1).min() > 0
    evaluated = projector(features, PatchGrid(2, 3))
    assert torch.equal(evaluated, projector(features, PatchGrid(2, 3)))
    assert not torch.equal(projector.train()(features, PatchGrid(2, 3)), evaluated)


def test_qformer_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="hidden_size 10.*num_attention_heads 4"):
        build("qformer", {"hidden_size": 10, "num_attention_heads": 4})


def test_qformer_reads_the_image_in_every_other_layer():
    layers = build("qformer", {"hidden_size": 24, "num_attention_heads": 4}).qformer.encoder.layer
    assert [layer.crossattention is not None for layer in layers] == [True, False] * 6
