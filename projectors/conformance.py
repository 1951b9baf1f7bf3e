"""check_projector(name_or_class): is this projector safe to train, save, load, shard and serve?

What scikit-learn's check_estimator is to estimators. Each check keeps one promise of the contract in `_base.py`; it
passes, fails with the reason, or is skipped with the reason. For pytest: parametrise over `CHECK_NAMES` and call
`run_check`.
"""

from __future__ import annotations

import ast
import copy
import fnmatch
import importlib
import inspect
import itertools
import json
import math
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import _registry
from ._base import PatchGrid, Projector, ProjectorConfig
from ._checkpoint import load_projector_state_dict
from ._errors import ProjectorError
from ._options import describe_options, option_fields
from ._registry import BUILT_IN, ProjectorSelection, ProjectorSpec, select_projector, spec_of_class

_VISION_HIDDEN_SIZE, _TEXT_HIDDEN_SIZE, _NUM_VISION_LAYERS = 16, 24, 6
_GRIDS = (PatchGrid(6, 6), PatchGrid(4, 4), PatchGrid(7, 7), PatchGrid(4, 6), PatchGrid(6, 4), PatchGrid(5, 3))
_LARGE_GRID = PatchGrid(24, 24)  # for projectors that refuse all of these
_BATCH_SIZE = 3
_BF16_RELATIVE_ERROR = 0.05  # about six roundings of 2**-8 in sequence
_CLEARLY_NEARER = 0.5  # of the mean squared distance; a wrong order of unmixed windows is 3 to 20 times as far
_OPTIONAL_PACKAGES = ("transformers", "llava_saep", "deepspeed", "peft", "accelerate", "timm", "torchvision", "einops")


@dataclass(frozen=True)
class CheckResult:
    """Outcome of one check; `detail` says what failed, or why it was skipped."""

    name: str
    status: Literal["passed", "failed", "skipped"]
    detail: str = ""


@dataclass(frozen=True)
class ConformanceReport:
    """All outcomes for one projector; printable as a table."""

    projector: str
    results: tuple[CheckResult, ...]

    @property
    def passed(self) -> bool:
        """No check failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        """The checks that failed."""
        return tuple(result for result in self.results if result.status == "failed")

    def raise_if_failed(self) -> None:
        """Raise AssertionError with the failures, if there are any."""
        if self.failures:
            raise AssertionError(str(ConformanceReport(self.projector, self.failures)))

    def __str__(self) -> str:
        width = max((len(result.name) for result in self.results), default=0)
        lines = [f"  {result.status:<7}  {result.name:<{width}}  {result.detail}".rstrip() for result in self.results]
        counts = [f"{sum(r.status == status for r in self.results)} {status}" for status in _STATUSES]
        return "\n".join([f"{self.projector}: {', '.join(counts)}", *lines])


_STATUSES = ("passed", "failed", "skipped")


class _Skip(Exception):
    """Raised by a check that does not apply."""


class _Broken(AssertionError):
    """Raised by a check whose promise is broken."""


@dataclass(frozen=True)
class _Subject:
    """The projector under test, in its tiny form."""

    spec: ProjectorSpec
    selection: ProjectorSelection
    config: ProjectorConfig
    grid: PatchGrid
    compile: bool

    def build(self, seed: int = 0) -> Projector:
        with _seeded(seed):
            return self.selection.build(self.config).eval()

    def features(self, grid: PatchGrid, batch_size: int = _BATCH_SIZE, seed: int = 1) -> list[Tensor]:
        """Random features whose rows and columns differ, one tensor per layer."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch_size, self.config.num_input_tokens(grid), self.config.vision_hidden_size)
        return [torch.randn(shape, generator=generator) for _ in self.config.vision_layers]

    def randomised(self, seed: int = 2) -> Projector:
        """With every parameter random, so that zero gains and equal queries hide nothing."""
        projector = self.build()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in projector.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return projector


Check = Callable[[_Subject], None]
_CHECKS: dict[str, Check] = {}


def check_projector(
    name_or_class: str | type[Projector],
    options: Mapping[str, Any] | None = None,
    *,
    compile: bool = False,
    checks: Iterable[str] | None = None,
    trust_projector_code: bool = False,
) -> ConformanceReport:
    """Run the conformance checks on a projector of tiny size.

    Args:
        name_or_class: a registered name, a spelling with options, `package.module:Class` (with consent) or a
            registered class.
        options: options to test with, over the config's `tiny_options()`.
        compile: also run `torch.compile` (seconds).
        checks: names out of CHECK_NAMES; all by default.
    Returns:
        A report; print it, or call its `raise_if_failed()`.
    Raises:
        ProjectorError: no such projector or option, or no consent to import code.
    """
    subject = _make_subject(name_or_class, options, compile, trust_projector_code)
    results = [_run(name, subject) for name in (checks if checks is not None else CHECK_NAMES)]
    return ConformanceReport(subject.spec.name, tuple(results))


def run_check(
    name_or_class: str | type[Projector], check: str, options: Mapping[str, Any] | None = None, compile: bool = False
) -> CheckResult:
    """Run one check by its name, for test parametrisation."""
    return check_projector(name_or_class, options, compile=compile, checks=[check]).results[0]


def _make_subject(
    name_or_class: str | type[Projector],
    options: Mapping[str, Any] | None,
    compile: bool,
    trust_projector_code: bool,
) -> _Subject:
    spelling = name_or_class if isinstance(name_or_class, str) else spec_of_class(name_or_class).name
    asked = select_projector(spelling, options, trust_projector_code)
    spec = asked.spec
    selection = select_projector(spec.name, spec.config_class.tiny_options() | dict(asked.options))
    config = _tiny_config(selection)
    grids = (*_GRIDS, _LARGE_GRID)
    grid = next((grid for grid in grids if _takes(config, grid)), None)
    if grid is None:
        raise ProjectorError(f"projector {spec.name!r} takes none of the grids {', '.join(map(str, grids))}")
    return _Subject(spec, selection, config, grid, compile)


def _tiny_config(selection: ProjectorSelection) -> ProjectorConfig:
    """Different widths where the projector allows it, so that mixing them up shows."""
    try:
        return selection.build_config(
            vision_hidden_size=_VISION_HIDDEN_SIZE,
            text_hidden_size=_TEXT_HIDDEN_SIZE,
            num_vision_layers=_NUM_VISION_LAYERS,
        )
    except ProjectorError:
        return selection.build_config(
            vision_hidden_size=_VISION_HIDDEN_SIZE,
            text_hidden_size=_VISION_HIDDEN_SIZE,
            num_vision_layers=_NUM_VISION_LAYERS,
        )


def _run(name: str, subject: _Subject) -> CheckResult:
    try:
        _CHECKS[name](subject)
    except _Skip as reason:
        return CheckResult(name, "skipped", str(reason))
    except Exception as error:
        detail = str(error) if isinstance(error, _Broken) else f"{type(error).__name__}: {error}"
        return CheckResult(name, "failed", detail)
    return CheckResult(name, "passed")


def _check(function: Check) -> Check:
    _CHECKS[function.__name__.removeprefix("_check_")] = function
    return function


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise _Broken(message)


def _takes(config: ProjectorConfig, grid: PatchGrid) -> bool:
    try:
        config.num_output_tokens(grid)
    except ValueError:
        return False
    return True


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Fixed random numbers, and NaN in memory that nobody initialises; the caller's state comes back."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # torch.utils.deterministic.fill_uninitialized_memory is on by default and acts in this mode.
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def _first_difference(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> str | None:
    """The first key whose tensors differ; NaN differs from everything."""
    return next((key for key in left if key not in right or not torch.equal(left[key], right[key])), None)


def _relative_error(value: Tensor, reference: Tensor) -> float:
    scale = reference.float().abs().max().clamp_min(1e-12)
    return float((value.float() - reference.float()).abs().max() / scale)


@_check
def _check_metadata_is_complete(subject: _Subject) -> None:
    """Help texts, tables and docs are made from these."""
    spec = subject.spec
    _require(bool(spec.summary.strip()), "the registration has no summary")
    # Its own: inspect.getdoc would take Projector's.
    _require(bool(vars(spec.module_class).get("__doc__")), f"{spec.module_class.__name__} has no docstring")
    for info in describe_options(spec.config_class):
        _require(bool(info.help), f"option {info.name!r} has no help text; declare it with option(default, help)")
    if spec.provider == BUILT_IN:
        _require(bool(spec.paper), "the registration names no paper")


@_check
def _check_token_formula_tells_the_token_count(subject: _Subject) -> None:
    """Read as Python's arithmetic, it gives what the config computes; a formula in words is not checked."""
    formula = subject.spec.token_formula
    _require(bool(formula), "the registration has no token_formula")
    try:
        code = compile(formula, "token_formula", "eval")
    except SyntaxError:
        raise _Skip(f"the formula is in words: {formula}") from None
    for grid in filter(lambda grid: _takes(subject.config, grid), (*_GRIDS, _LARGE_GRID)):
        names = {"ceil": math.ceil, "floor": math.floor, "len": len, "H": grid.height, "W": grid.width}
        names |= {name: getattr(subject.config, name) for name in option_fields(type(subject.config))}
        promised, told = subject.config.num_output_tokens(grid), eval(code, {"__builtins__": {}}, names)
        _require(told == promised, f"on a {grid} grid {formula!r} says {told}, num_output_tokens {promised}")


@_check
def _check_token_grid_holds_all_tokens(subject: _Subject) -> None:
    """Where the output tokens form a map, it has exactly as many places as there are tokens."""
    for grid in filter(lambda grid: _takes(subject.config, grid), (*_GRIDS, _LARGE_GRID)):
        token_grid, num_tokens = subject.config.token_grid(grid), subject.config.num_output_tokens(grid)
        _require(
            token_grid is None or token_grid.num_patches == num_tokens,
            f"on a {grid} grid token_grid is {token_grid}, num_output_tokens says {num_tokens}",
        )


@_check
def _check_tokens_lie_where_token_grid_says(subject: _Subject) -> None:
    """Each token is moved most by the patches around its place; no other order of the places does clearly better.

    The comparison is of the whole map, so that wide kernels, which move a token's neighbours more than itself, pass,
    and so do tokens that all see the whole map alike.
    """
    grids = [grid for grid in (*_GRIDS, _LARGE_GRID) if _takes(subject.config, grid)]
    maps = [(grid, subject.config.token_grid(grid)) for grid in grids]
    maps = [(grid, places) for grid, places in maps if places is not None and min(places) > 1]
    if not maps:
        raise _Skip("its tokens form no map of two rows and two columns on any grid that is tried")
    # A map with unequal sides shows their exchange too.
    grid, places = next((pair for pair in maps if pair[1].height != pair[1].width), maps[0])
    influence = _influence(subject, grid)
    as_promised, *others = (_mean_distance(influence, grid, centres) for centres in _orders(places).values())
    for name, distance in zip(list(_orders(places))[1:], others, strict=True):
        _require(
            distance > _CLEARLY_NEARER * as_promised,
            f"on a {grid} grid the tokens are no {places} map row by row: they lie {name}; return None from "
            "token_grid, or the map that they form",
        )


def _influence(subject: _Subject, grid: PatchGrid) -> Tensor:
    """(patches, tokens): how far each output token moves when one patch of every layer changes."""
    first_patch = subject.config.num_input_tokens(grid) - grid.num_patches
    projector, features = subject.randomised(), []
    for layer, tokens in enumerate(subject.features(grid, batch_size=1)):
        images = tokens.repeat(grid.num_patches + 1, 1, 1)  # the last one stays as it is
        change = torch.randn(tokens.shape[2], generator=torch.Generator().manual_seed(9 + layer))
        for patch in range(grid.num_patches):
            images[patch, first_patch + patch] += 3 * change
        features.append(images)
    with torch.no_grad():
        output = projector(features, grid)
    return (output[:-1] - output[-1:]).float().pow(2).sum(2)


def _orders(places: PatchGrid) -> dict[str, Tensor]:
    """(tokens, 2) relative places of the tokens, row by row first and then as it is easily mistaken."""
    centres = torch.cartesian_prod(*((torch.arange(side) + 0.5) / side for side in places))
    transposed = torch.cartesian_prod(*((torch.arange(side) + 0.5) / side for side in reversed(places)))
    return {
        "row by row": centres,
        "column by column": transposed.flip(1),
        f"row by row of a {places.width}x{places.height} map": transposed,
        "from the last row to the first": centres * torch.tensor([-1, 1]) + torch.tensor([1, 0]),
        "from the last column to the first": centres * torch.tensor([1, -1]) + torch.tensor([0, 1]),
        "from the last token to the first": 1 - centres,
    }


def _mean_distance(influence: Tensor, grid: PatchGrid, centres: Tensor) -> float:
    """Squared distance between a patch and a token, weighted by how far the one moves the other."""
    patches = torch.cartesian_prod(*((torch.arange(side) + 0.5) / side for side in grid))
    return float((influence * torch.cdist(patches, centres).pow(2)).sum() / influence.sum().clamp_min(1e-12))


@_check
def _check_importing_needs_nothing_optional(subject: _Subject) -> None:
    """Read from the source: what the module imports when it is imported."""
    source = inspect.getsource(sys.modules[subject.spec.module_class.__module__])
    imported = set(_imports_at_import_time(ast.parse(source)))
    found = sorted(imported & set(_OPTIONAL_PACKAGES))
    _require(not found, f"importing the module imports {', '.join(found)}; import it where it is used")


def _imports_at_import_time(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name.split(".")[0] for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.level == 0 and child.module:
            yield child.module.split(".")[0]
        yield from _imports_at_import_time(child)


@_check
def _check_config_survives_json(subject: _Subject) -> None:
    stored = json.loads(json.dumps(subject.config.to_dict()))
    restored = type(subject.config).from_dict(stored)
    _require(restored == subject.config, f"{subject.config} became {restored}")
    selection = json.loads(json.dumps(subject.selection.completed(subject.config).to_dict()))
    again = ProjectorSelection.from_dict(selection, trust_projector_code=True)
    rebuilt = again.build_config(
        vision_hidden_size=subject.config.vision_hidden_size, text_hidden_size=subject.config.text_hidden_size
    )
    _require(rebuilt == subject.config, f"the stored selection gives {rebuilt} instead of {subject.config}")


@_check
def _check_output_has_the_promised_shape(subject: _Subject) -> None:
    """On square and rectangular grids; a grid that is refused is refused by both sides, by name."""
    projector = subject.build()
    for grid, batch_size in itertools.product(_GRIDS, (1, 2)):
        features = subject.features(grid, batch_size)
        if not _takes(subject.config, grid):
            _require_refusal(lambda: subject.config.num_output_tokens(grid), (str(grid),), f"grid {grid}")  # noqa: B023
            _require_refusal(lambda: projector(features, grid), (str(grid),), f"forward on grid {grid}")  # noqa: B023
            continue
        with torch.no_grad():
            shape = tuple(projector(features, grid).shape)
        expected = (batch_size, subject.config.num_output_tokens(grid), subject.config.text_hidden_size)
        _require(shape == expected, f"on a {grid} grid the output is {shape}, num_output_tokens promises {expected}")


def _require_refusal(call: Callable[[], Any], words: Iterable[str], what: str) -> None:
    try:
        call()
    except ValueError as error:
        missing = [word for word in words if word not in str(error)]
        _require(not missing, f"the error for {what} does not say {', '.join(missing)}: {error}")
    else:
        raise _Broken(f"{what} is accepted; a ValueError was expected")


@_check
def _check_wrong_features_are_refused(subject: _Subject) -> None:
    """Channels, patches and number of layers, each error with both numbers."""
    projector, grid = subject.build(), subject.grid
    right = subject.features(grid)
    batch, tokens, channels = right[0].shape
    num_layers = len(right)
    cases = {
        "wrong channels": ([torch.zeros(batch, tokens, channels + 1)] * num_layers, (channels, channels + 1)),
        "wrong patches": ([torch.zeros(batch, tokens + 1, channels)] * num_layers, (tokens, tokens + 1)),
        "wrong number of layers": (right + right[:1], (num_layers, num_layers + 1)),
    }
    for what, (features, numbers) in cases.items():
        _require_refusal(lambda: projector(features, grid), map(str, numbers), what)  # noqa: B023


@_check
def _check_input_is_unchanged(subject: _Subject) -> None:
    projector, features = subject.randomised(), subject.features(subject.grid)
    before = [tokens.clone() for tokens in features]
    with torch.no_grad():
        projector(features, subject.grid)
    _require(len(features) == len(before), "forward changed the list of features")
    _require(all(map(torch.equal, features, before)), "forward changed the caller's features in place")


@_check
def _check_rows_are_independent(subject: _Subject) -> None:
    """Image i alone gives what image i gives in a batch (float32, so to summation order)."""
    projector, features = subject.randomised(), subject.features(subject.grid)
    with torch.no_grad():
        batch = projector(features, subject.grid)
        for row in range(_BATCH_SIZE):
            alone = projector([tokens[row : row + 1] for tokens in features], subject.grid)
            error = _relative_error(alone[0], batch[row])
            _require(error < 1e-5, f"image {row} alone differs from its row in the batch by {error:.1e} (relative)")


@_check
def _check_gradient_reaches_every_parameter(subject: _Subject) -> None:
    """Finite, and not zero throughout unless the class says so in `zero_gradient_parameters`."""
    projector = subject.randomised()
    if not list(projector.parameters()):
        raise _Skip("the projector has no parameters")
    projector(subject.features(subject.grid), subject.grid).pow(2).sum().backward()
    for name, parameter in projector.named_parameters():
        _require(parameter.grad is not None, f"parameter {name!r} gets no gradient")
        _require(bool(parameter.grad.isfinite().all()), f"the gradient of parameter {name!r} is not finite")
        is_zero_by_construction = any(fnmatch.fnmatchcase(name, each) for each in projector.zero_gradient_parameters)
        _require(
            is_zero_by_construction or bool(parameter.grad.any()),
            f"the gradient of parameter {name!r} is zero; if that is by construction, name it in "
            "zero_gradient_parameters",
        )


@_check
def _check_gradient_reaches_the_features(subject: _Subject) -> None:
    """A trainable vision tower needs it, from every layer that is read."""
    features = [tokens.requires_grad_() for tokens in subject.features(subject.grid)]
    subject.randomised()(features, subject.grid).pow(2).sum().backward()
    for layer, tokens in zip(subject.config.vision_layers, features, strict=True):
        _require(
            tokens.grad is not None and bool(tokens.grad.isfinite().all()) and bool(tokens.grad.any()),
            f"the features of layer {layer} get no finite, non-zero gradient",
        )


@_check
def _check_gradient_checkpointing_changes_nothing(subject: _Subject) -> None:
    """Equal gradients in training mode, dropout included."""
    gradients = []
    for use_checkpoint in (False, True):
        projector, features = subject.randomised().train(), subject.features(subject.grid)
        with _seeded(3):
            if use_checkpoint:
                output = checkpoint(projector, features, subject.grid, use_reentrant=False)
            else:
                output = projector(features, subject.grid)
            if output.requires_grad:
                output.pow(2).sum().backward()
        gradients.append({name: p.grad for name, p in projector.named_parameters() if p.grad is not None})
    different = _first_difference(*gradients)
    _require(different is None, f"with gradient checkpointing the gradient of {different!r} differs")


@_check
def _check_bf16_is_close_to_fp32(subject: _Subject) -> None:
    projector, features = subject.randomised(), subject.features(subject.grid)
    with torch.no_grad():
        reference = projector(features, subject.grid)
        output = projector.to(torch.bfloat16)([tokens.to(torch.bfloat16) for tokens in features], subject.grid)
    _require(output.dtype == torch.bfloat16, f"bfloat16 in gives {output.dtype} out")
    error = _relative_error(output, reference)
    _require(error < _BF16_RELATIVE_ERROR, f"bfloat16 is {error:.1%} of the largest output away from float32")


@_check
def _check_bf16_training_step_is_finite(subject: _Subject) -> None:
    projector = subject.randomised().to(torch.bfloat16).train()
    output = projector([tokens.to(torch.bfloat16) for tokens in subject.features(subject.grid)], subject.grid)
    if not output.requires_grad:
        raise _Skip("the projector has no parameters")
    output.float().pow(2).mean().backward()
    for name, parameter in projector.named_parameters():
        _require(bool(parameter.grad.isfinite().all()), f"in bfloat16 the gradient of {name!r} is not finite")


@_check
def _check_same_seed_gives_same_weights(subject: _Subject) -> None:
    different = _first_difference(subject.build(5).state_dict(), subject.build(5).state_dict())
    _require(different is None, f"{different!r} differs between two projectors of one seed, or is not initialised")


@_check
def _check_reset_parameters_covers_everything(subject: _Subject) -> None:
    """From raw memory to the values of a fresh projector."""
    projector = subject.build()
    for name, parameter in projector.named_parameters():
        _require(bool(parameter.isfinite().all()), f"the constructor leaves {name!r} uninitialised")
        parameter.data.fill_(float("nan"))
    with _seeded(6):
        projector.reset_parameters()
    reference = subject.build()
    with _seeded(6):
        reference.reset_parameters()
    for name, parameter in projector.named_parameters():
        _require(bool(parameter.isfinite().all()), f"reset_parameters leaves {name!r} uninitialised")
    different = _first_difference(projector.state_dict(), reference.state_dict())
    _require(different is None, f"reset_parameters builds on the old value of {different!r}")


@_check
def _check_reset_parameters_keeps_loaded_tensors(subject: _Subject) -> None:
    """A tensor that transformers has marked as loaded keeps its value."""
    names = [name for name, _ in subject.build().named_parameters()]
    if not names:
        raise _Skip("the projector has no parameters")
    for name in names:
        projector = subject.build()
        parameter = projector.get_parameter(name)
        parameter.data.fill_(7.0)
        parameter._is_hf_initialized = True
        projector.reset_parameters()
        _require(
            bool((parameter == 7.0).all()),
            f"reset_parameters overwrites {name!r} although it is marked as loaded; use projectors.layers' functions",
        )


@_check
def _check_from_pretrained_without_projector_initialises_it(subject: _Subject) -> None:
    """The start of every first training stage: a checkpoint of the other parts, loaded by transformers."""
    fresh = subject.build()
    with _seeded(8):
        fresh.reset_parameters()
    loaded = _load_with_transformers(subject, {})
    different = _first_difference(fresh.state_dict(), loaded.state_dict())
    _require(different is None, f"after from_pretrained {different!r} is not what reset_parameters gives")


@_check
def _check_from_pretrained_keeps_a_part_of_the_projector(subject: _Subject) -> None:
    """A checkpoint with some tensors of the projector: those are kept, the others are initialised."""
    stored = {name: torch.full_like(p, 7.0) for name, p in itertools.islice(subject.build().named_parameters(), 1)}
    if not stored:
        raise _Skip("the projector has no parameters")
    loaded = _load_with_transformers(subject, stored)
    for name, parameter in loaded.named_parameters():
        _require(bool(parameter.isfinite().all()), f"after from_pretrained {name!r} is not initialised")
    different = _first_difference(stored, loaded.state_dict())
    _require(different is None, f"from_pretrained draws {different!r} anew although the checkpoint holds it")


def _load_with_transformers(subject: _Subject, projector_tensors: Mapping[str, Tensor]) -> Projector:
    """The projector of a tiny model that `from_pretrained` reads from a checkpoint with those tensors of it alone."""
    try:
        transformers = importlib.import_module("transformers")
        save_file = importlib.import_module("safetensors.torch").save_file
    except ModuleNotFoundError as error:
        raise _Skip(f"{error.name} is not installed") from error
    config_class, model_class = _transformers_wrapper(subject, transformers)
    tensors = {"body.weight": torch.eye(2), "body.bias": torch.zeros(2)}
    tensors |= {f"projector.{name}": tensor for name, tensor in projector_tensors.items()}
    with tempfile.TemporaryDirectory() as folder, _quiet(transformers.utils.logging), _seeded(7):
        config_class().save_pretrained(folder)
        save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
        return model_class.from_pretrained(folder).projector


def _transformers_wrapper(subject: _Subject, transformers: ModuleType) -> tuple[type, type]:
    """Config and model classes that hold the projector and dispatch its initialisation to reset_parameters."""

    class WrapperConfig(transformers.PretrainedConfig):
        model_type = "projector_conformance"

    class Wrapper(transformers.PreTrainedModel):
        config_class = WrapperConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.body = torch.nn.Linear(2, 2)
            self.projector = subject.selection.build(subject.config)
            self.post_init()

        # Not `_init_weights`: transformers does not call that for a module without parameters of its own.
        def _initialize_weights(self, module: torch.nn.Module, is_custom_code: bool = False) -> None:
            if isinstance(module, Projector):
                torch.manual_seed(8)
                module.reset_parameters()
            else:
                super()._initialize_weights(module, is_custom_code)

    return WrapperConfig, Wrapper


@contextmanager
def _quiet(library_logging: ModuleType) -> Iterator[None]:
    """No progress bar and no report of missing tensors, which are missing on purpose."""
    verbosity, has_bar = library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()
    library_logging.set_verbosity_error()
    library_logging.disable_progress_bar()
    try:
        yield
    finally:
        library_logging.set_verbosity(verbosity)
        if has_bar:
            library_logging.enable_progress_bar()


@_check
def _check_no_parameter_is_created_by_the_first_call(subject: _Subject) -> None:
    """ZeRO-3 partitions what exists after construction."""
    projector = subject.build()
    before = {name: id(tensor) for name, tensor in _tensors(projector)}
    with torch.no_grad():
        projector(subject.features(subject.grid), subject.grid)
    after = {name: id(tensor) for name, tensor in _tensors(projector)}
    _require(
        before == after, f"the first call changed the parameters: {sorted(set(before) ^ set(after)) or 'replaced'}"
    )


def _tensors(projector: Projector) -> Iterator[tuple[str, Tensor]]:
    yield from projector.named_parameters()
    yield from projector.named_buffers()


@_check
def _check_it_builds_with_partitioned_parameters(subject: _Subject) -> None:
    """As under ZeRO-3's zero.Init: a submodule's parameters are empty as soon as it has been built."""
    with _partitioning():
        projector = subject.selection.build(subject.config)
        for parameter in projector.parameters():
            _partition(parameter)
        projector.reset_parameters()
    written = [name for name, parameter in projector.named_parameters() if parameter.numel()]
    _require(not written, f"reset_parameters puts values in place of what is partitioned away: {', '.join(written)}")


@contextmanager
def _partitioning() -> Iterator[None]:
    """Take away the values of every module that is put into another, which is when its constructor has ended."""
    set_attribute, add_module = torch.nn.Module.__setattr__, torch.nn.Module.add_module
    initialize = _registry.initialize_projector

    def partition_all(value: Any) -> None:
        for parameter in value.parameters() if isinstance(value, torch.nn.Module) else ():
            _partition(parameter)

    def partitioning_set(self: torch.nn.Module, name: str, value: Any) -> None:
        partition_all(value)
        set_attribute(self, name, value)

    def partitioning_add(self: torch.nn.Module, name: str, module: torch.nn.Module | None) -> None:
        partition_all(module)
        add_module(self, name, module)

    torch.nn.Module.__setattr__, torch.nn.Module.add_module = partitioning_set, partitioning_add
    _registry.initialize_projector = lambda projector: None  # a projector's inner one: only DeepSpeed can gather it
    try:
        yield
    finally:
        torch.nn.Module.__setattr__, torch.nn.Module.add_module = set_attribute, add_module
        _registry.initialize_projector = initialize


def _partition(parameter: torch.nn.Parameter) -> None:
    """What DeepSpeed leaves of a parameter: its status, its shape elsewhere, and no elements."""
    if not hasattr(parameter, "ds_status"):
        parameter.ds_shape = parameter.shape
        parameter.ds_status = SimpleNamespace(name="NOT_AVAILABLE")
        parameter.data = torch.empty(0, dtype=parameter.dtype)


@_check
def _check_no_parameter_is_a_scalar(subject: _Subject) -> None:
    """DeepSpeed broadcasts what it trains at the start, and cannot where a parameter has no dimension."""
    scalars = [name for name, parameter in subject.build().named_parameters() if parameter.dim() == 0]
    _require(not scalars, f"parameters without a dimension: {', '.join(scalars)}; give them the shape (1,)")


@_check
def _check_it_builds_on_the_meta_device(subject: _Subject) -> None:
    with torch.device("meta"):
        projector = subject.selection.build(subject.config)
        features = [tokens.to("meta") for tokens in subject.features(subject.grid)]
    elsewhere = [name for name, tensor in _tensors(projector) if not tensor.is_meta]
    _require(not elsewhere, f"on the meta device these have memory: {', '.join(elsewhere)}")
    expected = {name: tuple(tensor.shape) for name, tensor in subject.build().state_dict().items()}
    _require({n: tuple(t.shape) for n, t in projector.state_dict().items()} == expected, "the shapes differ on meta")
    shape = tuple(projector(features, subject.grid).shape)
    _require(shape[1] == subject.config.num_output_tokens(subject.grid), f"on the meta device the output is {shape}")


@_check
def _check_state_dict_loads_under_any_prefix(subject: _Subject) -> None:
    source = subject.randomised().state_dict()
    if not source:
        raise _Skip("the projector has no parameters")
    for prefix in ("", "model.mm_projector.", "mm_projector.", "model.multi_modal_projector.", "some.where.else."):
        target = subject.build()
        load_projector_state_dict(target, {prefix + key: tensor for key, tensor in source.items()})
        different = _first_difference(source, target.state_dict())
        _require(different is None, f"under the prefix {prefix!r} {different!r} is not loaded")
    incomplete = dict(itertools.islice(source.items(), len(source) - 1))
    _require_refusal(
        lambda: load_projector_state_dict(subject.build(), incomplete), (), "a state dict lacking a tensor"
    )


@_check
def _check_original_keys_survive_a_round_trip(subject: _Subject) -> None:
    projector = subject.randomised()
    source = projector.state_dict()
    there = projector.to_original_state_dict(source)
    back = there if set(there) == set(source) else projector.convert_original_state_dict(there)
    different = _first_difference(source, back)
    _require(different is None and len(back) == len(source), f"{different!r} is lost in the original's key names")


@_check
def _check_copies_and_pickles_are_equal(subject: _Subject) -> None:
    projector, features = subject.randomised(), subject.features(subject.grid)
    with torch.no_grad():
        expected = projector(features, subject.grid)
        for how, twin in (("deepcopy", copy.deepcopy(projector)), ("pickle", pickle.loads(pickle.dumps(projector)))):
            _require(torch.equal(twin(features, subject.grid), expected), f"after {how} the output differs")


@_check
def _check_torch_compile_takes_it(subject: _Subject) -> None:
    """One full graph, same values; the capturing is tested, not a back end's kernels."""
    if not subject.compile:
        raise _Skip("takes seconds; ask for it with compile=True")
    if type(subject.build()).compile_limitation:
        raise _Skip(type(subject.build()).compile_limitation)
    projector, features = subject.randomised(), subject.features(subject.grid)
    expected = projector(features, subject.grid)
    torch._dynamo.reset()
    compiled = torch.compile(projector, backend="aot_eager", fullgraph=True)
    error = _relative_error(compiled(features, subject.grid).detach(), expected.detach())
    _require(error < 1e-5, f"compiled, the output differs by {error:.1e} (relative)")


CHECK_NAMES = tuple(_CHECKS)
"""Names of all checks, in the order in which they run."""
