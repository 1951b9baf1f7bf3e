"""Each check of the conformance suite fails on a projector that breaks its promise."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from projectors import Projector, ProjectorConfig, ProjectorError, option, register_projector
from projectors.conformance import CHECK_NAMES, CheckResult, ConformanceReport, check_projector
from projectors.layers import reset_module


@dataclass(frozen=True, kw_only=True)
class ToyConfig(ProjectorConfig):
    width: int = option(3, "a width", minimum=1)

    def num_output_tokens(self, grid):
        return grid.num_patches


class Toy(Projector):
    """One Linear layer; each subclass below breaks one promise."""

    def __init__(self, config):
        super().__init__(config)
        self.linear = nn.Linear(config.fused_hidden_size, config.text_hidden_size)
        self.reset_parameters()

    def reset_parameters(self):
        reset_module(self.linear)

    def forward(self, features, grid):
        self.check_features(features, grid)
        return self.linear(torch.cat(tuple(features), dim=2))


class WritesIntoItsInput(Toy):
    def forward(self, features, grid):
        features[0] += 1
        return super().forward(features, grid)


class DropsAToken(Toy):
    def forward(self, features, grid):
        return super().forward(features, grid)[:, 1:]


class TakesAnything(Toy):
    def forward(self, features, grid):
        tokens = features[0]
        return nn.functional.linear(tokens[..., :16], self.linear.weight, self.linear.bias)


class MixesRows(Toy):
    def forward(self, features, grid):
        output = super().forward(features, grid)
        return output - output.mean(0, keepdim=True)


class HasAnIdleParameter(Toy):
    def __init__(self, config):
        super().__init__(config)
        self.idle = nn.Parameter(torch.zeros(3))

    def reset_parameters(self):
        super().reset_parameters()
        if hasattr(self, "idle"):
            nn.init.zeros_(self.idle)


class MultipliesByZero(HasAnIdleParameter):
    def forward(self, features, grid):
        return super().forward(features, grid) + 0 * self.idle.sum()


class ReadsAShapeInReset(Toy):
    def reset_parameters(self):
        num_rows, num_columns = self.linear.weight.shape
        nn.init.uniform_(self.linear.weight, -1 / num_columns, 1 / num_columns)
        nn.init.zeros_(self.linear.bias)


class DetachesItsInput(Toy):
    def forward(self, features, grid):
        return super().forward([tokens.detach() for tokens in features], grid)


class UsesUnseededState(Toy):
    calls = 0

    def forward(self, features, grid):
        self.calls += 1
        return super().forward(features, grid) * self.calls


class ComputesInFloat32(Toy):
    def forward(self, features, grid):
        return super().forward(features, grid).float()


class LosesPrecision(Toy):
    def forward(self, features, grid):
        output = super().forward(features, grid)
        return output if output.dtype == torch.float32 else output * 1.2


class DrawsFromAnotherGenerator(Toy):
    generator = torch.Generator()

    def reset_parameters(self):
        with torch.no_grad():
            self.linear.weight.copy_(torch.rand(self.linear.weight.shape, generator=self.generator))
            nn.init.zeros_(self.linear.bias)


class ForgetsAParameter(Toy):
    def __init__(self, config):
        super().__init__(config)
        self.offset = nn.Parameter(torch.zeros(config.text_hidden_size))

    def forward(self, features, grid):
        return super().forward(features, grid) + self.offset


class LeavesRawMemory(ForgetsAParameter):
    def __init__(self, config):
        super().__init__(config)
        self.offset = nn.Parameter(torch.empty(config.text_hidden_size))


class OverwritesLoadedTensors(Toy):
    def reset_parameters(self):
        self.linear.weight.data.normal_()
        self.linear.bias.data.zero_()


class CreatesAParameterInForward(Toy):
    def forward(self, features, grid):
        if not hasattr(self, "scale"):
            self.scale = nn.Parameter(torch.ones(()))
        return super().forward(features, grid) * self.scale


class LearnsAScalar(Toy):
    def __init__(self, config):
        super().__init__(config)
        self.gain = nn.Parameter(torch.tensor(1.0))

    def reset_parameters(self):
        super().reset_parameters()
        if hasattr(self, "gain"):
            nn.init.ones_(self.gain)

    def forward(self, features, grid):
        return self.gain * super().forward(features, grid)


class HoldsADeviceTensor(Toy):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("scale", torch.ones(1, device="cpu"))

    def forward(self, features, grid):
        return super().forward(features, grid) * self.scale


class LosesItsKeys(Toy):
    def convert_original_state_dict(self, state_dict):
        return {}

    def to_original_state_dict(self, state_dict):
        return {"w": state_dict["linear.weight"]}


class CannotBePickled(Toy):
    def __init__(self, config):
        super().__init__(config)
        self.hook = lambda value: value


class BreaksTheGraph(Toy):
    def forward(self, features, grid):
        output = super().forward(features, grid)
        return output * float(output.detach().sum() != 1e9)


class ComputesAnewDifferently(Toy):
    def forward(self, features, grid):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward([tokens * self.calls for tokens in features], grid)


class ExplodesInBfloat16(Toy):
    def forward(self, features, grid):
        output = super().forward(features, grid)
        return output if output.dtype == torch.float32 else (output * 1e38) * 1e38


BROKEN = [
    (WritesIntoItsInput, "input_is_unchanged"),
    (DropsAToken, "output_has_the_promised_shape"),
    (TakesAnything, "wrong_features_are_refused"),
    (MixesRows, "rows_are_independent"),
    (HasAnIdleParameter, "gradient_reaches_every_parameter"),
    (MultipliesByZero, "gradient_reaches_every_parameter"),
    (ReadsAShapeInReset, "it_builds_with_partitioned_parameters"),
    (DetachesItsInput, "gradient_reaches_the_features"),
    (ComputesAnewDifferently, "gradient_checkpointing_changes_nothing"),
    (LosesPrecision, "bf16_is_close_to_fp32"),
    (ComputesInFloat32, "bf16_is_close_to_fp32"),
    (ExplodesInBfloat16, "bf16_training_step_is_finite"),
    (DrawsFromAnotherGenerator, "same_seed_gives_same_weights"),
    (ForgetsAParameter, "reset_parameters_covers_everything"),
    (LeavesRawMemory, "reset_parameters_covers_everything"),
    (LeavesRawMemory, "same_seed_gives_same_weights"),
    (ForgetsAParameter, "from_pretrained_without_projector_initialises_it"),
    (OverwritesLoadedTensors, "reset_parameters_keeps_loaded_tensors"),
    (OverwritesLoadedTensors, "from_pretrained_keeps_a_part_of_the_projector"),
    (CreatesAParameterInForward, "no_parameter_is_created_by_the_first_call"),
    (LearnsAScalar, "no_parameter_is_a_scalar"),
    (HoldsADeviceTensor, "it_builds_on_the_meta_device"),
    (LosesItsKeys, "original_keys_survive_a_round_trip"),
    (CannotBePickled, "copies_and_pickles_are_equal"),
    (UsesUnseededState, "copies_and_pickles_are_equal"),
    (BreaksTheGraph, "torch_compile_takes_it"),
]


@pytest.fixture
def register_toy(scratch_registry):
    def register(module_class, config=ToyConfig, summary="A toy.", token_formula="H * W"):
        return register_projector("toy", config=config, summary=summary, token_formula=token_formula)(module_class)

    return register


def test_the_sound_toy_passes_everything(register_toy):
    report = check_projector(register_toy(MapsInOrder, MappedConfig), compile=True)
    assert report.passed and not [result for result in report.results if result.status == "skipped"], str(report)


@pytest.mark.parametrize("broken, check", BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_promise_is_found(register_toy, broken, check):
    report = check_projector(register_toy(broken), compile=True, checks=[check])
    assert [result.status for result in report.results] == ["failed"]
    assert report.results[0].detail


def test_missing_metadata_is_found(register_toy):
    @dataclass(frozen=True, kw_only=True)
    class UndescribedConfig(ToyConfig):
        factor: int = field(default=2)

    report = check_projector(register_toy(Toy, UndescribedConfig), checks=["metadata_is_complete"])
    assert "'factor' has no help" in report.results[0].detail


def test_missing_summary_is_found(register_toy):
    report = check_projector(register_toy(Toy, summary=" "), checks=["metadata_is_complete"])
    assert "no summary" in report.results[0].detail


@pytest.mark.parametrize(
    "formula, status, detail",
    [
        ("H * W", "passed", ""),
        ("ceil(H / 1) * floor(W) * len(vision_layers)", "passed", ""),
        ("", "failed", "no token_formula"),
        ("ceil(H / 2) * W", "failed", "on a 6x6 grid"),
        ("H * W * depth", "failed", "depth"),
        ("as many as the patches", "skipped", "in words"),
    ],
)
def test_the_token_formula_is_held_to_the_config(register_toy, formula, status, detail):
    check = "token_formula_tells_the_token_count"
    (result,) = check_projector(register_toy(Toy, token_formula=formula), checks=[check]).results
    assert result.status == status
    assert detail in result.detail


def test_a_map_of_tokens_that_is_too_small_is_found(register_toy):
    @dataclass(frozen=True, kw_only=True)
    class HalvingConfig(ToyConfig):
        def token_grid(self, grid):
            return grid._replace(height=grid.height // 2)

    (result,) = check_projector(register_toy(Toy, HalvingConfig), checks=["token_grid_holds_all_tokens"]).results
    assert result.status == "failed"
    assert "3x6" in result.detail and "36" in result.detail


@dataclass(frozen=True, kw_only=True)
class MappedConfig(ToyConfig):
    def token_grid(self, grid):
        return grid


class MapsInOrder(Toy):
    """Its tokens lie as its patches do."""


class MapsByColumns(Toy):
    """Its tokens are listed column by column."""

    def forward(self, features, grid):
        tokens = super().forward(features, grid)
        return tokens.unflatten(1, grid).transpose(1, 2).flatten(1, 2)


class MapsUpsideDown(Toy):
    """Its tokens are listed from the last row to the first."""

    def forward(self, features, grid):
        return super().forward(features, grid).unflatten(1, grid).flip(1).flatten(1, 2)


class MapsFromRightToLeft(Toy):
    """Each row of its tokens is listed from the last to the first."""

    def forward(self, features, grid):
        return super().forward(features, grid).unflatten(1, grid).flip(2).flatten(1, 2)


class SeesTheWholeMap(Toy):
    """All of its tokens see all patches equally, so that no place is more theirs than another."""

    def forward(self, features, grid):
        tokens = super().forward(features, grid)
        return tokens.mean(1, keepdim=True).expand_as(tokens)


@pytest.mark.parametrize(
    "module_class, status",
    [
        (MapsInOrder, "passed"),
        (MapsByColumns, "failed"),
        (MapsUpsideDown, "failed"),
        (MapsFromRightToLeft, "failed"),
        (SeesTheWholeMap, "passed"),
    ],
)
def test_the_map_of_tokens_is_held_to_the_places_of_the_patches(register_toy, module_class, status):
    check = "tokens_lie_where_token_grid_says"
    (result,) = check_projector(register_toy(module_class, MappedConfig), checks=[check]).results
    assert result.status == status, result.detail


def test_tokens_that_form_no_map_have_no_place_to_check(register_toy):
    (result,) = check_projector(register_toy(Toy), checks=["tokens_lie_where_token_grid_says"]).results
    assert result.status == "skipped"


def test_a_parameter_may_be_declared_to_get_no_gradient(register_toy):
    class Declared(MultipliesByZero):
        """Says that one of its parameters gets a zero gradient."""

        zero_gradient_parameters = ("id*",)

    check_projector(register_toy(Declared), checks=["gradient_reaches_every_parameter"]).raise_if_failed()


def test_simulated_partitioning_leaves_modules_as_they_were(register_toy):
    before = nn.Module.__setattr__, nn.Module.add_module
    check_projector(register_toy(ReadsAShapeInReset), checks=["it_builds_with_partitioned_parameters"])
    assert (nn.Module.__setattr__, nn.Module.add_module) == before
    assert nn.Linear(2, 3).weight.shape == (3, 2)


def test_a_config_that_does_not_survive_json_is_found(register_toy):
    @dataclass(frozen=True, kw_only=True)
    class DriftingConfig(ToyConfig):
        def options(self):
            return super().options() | {"width": self.width + 1}

    report = check_projector(register_toy(Toy, DriftingConfig), checks=["config_survives_json"])
    assert not report.passed


@pytest.mark.parametrize("message, status", [("impossible grid {grid}", "passed"), ("impossible", "failed")])
def test_a_refused_grid_must_be_named(register_toy, message, status):
    @dataclass(frozen=True, kw_only=True)
    class EvenConfig(ToyConfig):
        def num_output_tokens(self, grid):
            if grid.height % 2 or grid.width % 2:
                raise ProjectorError(message.format(grid=grid))
            return grid.num_patches

    class EvenOnly(Toy):
        """Takes even grids only."""

        def forward(self, features, grid):
            self.config.num_output_tokens(grid)
            return super().forward(features, grid)

    report = check_projector(register_toy(EvenOnly, EvenConfig), checks=["output_has_the_promised_shape"])
    assert report.results[0].status == status


def test_a_grid_refused_by_the_config_must_be_refused_by_forward(register_toy):
    @dataclass(frozen=True, kw_only=True)
    class SquareConfig(ToyConfig):
        def num_output_tokens(self, grid):
            if grid.height != grid.width:
                raise ProjectorError(f"{grid} is not square")
            return grid.num_patches

    report = check_projector(register_toy(Toy, SquareConfig), checks=["output_has_the_promised_shape"])
    assert "forward on grid 4x6 is accepted" in report.results[0].detail


def test_an_optional_import_at_module_level_is_found(tmp_path, scratch_registry):
    source = (
        "import json\ntry:\n    import transformers\nexcept ImportError:\n    transformers = None\n"
        "from projectors import Projector, ProjectorConfig, register_projector\n\n"
        "@register_projector('eager', config=ProjectorConfig, summary='Eager.')\nclass Eager(Projector):\n    pass\n"
    )
    path = tmp_path / "eager.py"
    path.write_text(source)
    ProjectorConfig.num_output_tokens, original = (lambda self, grid: 1), ProjectorConfig.num_output_tokens
    try:
        report = check_projector(
            f"{path}:Eager", checks=["importing_needs_nothing_optional"], trust_projector_code=True
        )
    finally:
        ProjectorConfig.num_output_tokens = original
    assert "transformers" in report.results[0].detail


def test_report_reads_as_a_table_and_raises():
    report = ConformanceReport("toy", (CheckResult("a", "passed"), CheckResult("bb", "failed", "why")))
    assert str(report).splitlines() == ["toy: 1 passed, 1 failed, 0 skipped", "  passed   a", "  failed   bb  why"]
    assert not report.passed
    with pytest.raises(AssertionError, match="bb  why") as error:
        report.raise_if_failed()
    assert "  a" not in str(error.value)


def test_unregistered_class_is_refused():
    with pytest.raises(ProjectorError, match="not registered"):
        check_projector(Toy)


def test_every_check_has_a_projector_that_fails_it():
    also_tested_above = {"metadata_is_complete", "config_survives_json", "importing_needs_nothing_optional"}
    also_tested_above |= {"token_formula_tells_the_token_count", "token_grid_holds_all_tokens"}
    also_tested_above |= {"tokens_lie_where_token_grid_says"}
    also_tested_above |= {"state_dict_loads_under_any_prefix"}  # load_projector_state_dict has its own tests
    assert {check for _, check in BROKEN} | also_tested_above == set(CHECK_NAMES)


def test_checking_changes_neither_random_state_nor_modes():
    torch.manual_seed(0)
    state, modes = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    check_projector("linear", checks=["same_seed_gives_same_weights", "reset_parameters_covers_everything"])
    assert torch.are_deterministic_algorithms_enabled() == modes
    assert torch.equal(torch.get_rng_state(), state)
