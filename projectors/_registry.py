"""Projectors by name: registration, look-up, and the selection that a checkpoint stores.

Look-up, first hit wins and never by substring: an exact name or alias (built-ins are found by listing this folder), an
installed entry point, a user's own `package.module:Class` or `path/to/file.py:Class`, a spelling that carries options
(`mlp2x_gelu`). A configuration file must not be able to run code, so the third kind needs the caller's consent.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ._base import Projector, ProjectorConfig
from ._checkpoint import initialize_projector
from ._errors import ProjectorError
from ._options import convert_options, unknown_name_message
from .layers.initialization import is_partitioned

ENTRY_POINT_GROUP = "llava_saep.projectors"
BUILT_IN = "built-in"
ENTRY_POINT = "entry-point"

_PACKAGE = __package__
_NOT_PROJECTORS = ("conformance",)
_OUTSIDE_HINT = "A projector outside this package is named as 'package.module:Class' or 'path/to/file.py:Class'."

SpellingParser = Callable[[str], Mapping[str, Any] | None]


@dataclass(frozen=True)
class ProjectorPreset:
    """A name for a projector with some of its options fixed; a checkpoint stores the projector and the options.

    `options` are what the name means: other values are refused. `defaults` hold unless the user says otherwise.
    """

    options: Mapping[str, Any]
    summary: str
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ProjectorSpec:
    """What the registry knows about one projector.

    `provider` says where the class comes from: "built-in", "entry-point", or the `module:Class` of a user's own code.
    `parse_spelling` maps a spelling that carries options (`mlp2x_gelu`) to those options, or to None.
    `token_formula` says how many tokens an H x W grid gives, in Python's arithmetic where that is possible.
    """

    name: str
    config_class: type[ProjectorConfig]
    module_class: type[Projector]
    summary: str
    paper: str = ""
    aliases: tuple[str, ...] = ()
    provider: str = BUILT_IN
    parse_spelling: SpellingParser | None = field(default=None, repr=False)
    token_formula: str = ""
    presets: Mapping[str, ProjectorPreset] = field(default_factory=dict)


@dataclass(frozen=True)
class ProjectorSelection:
    """A projector and the options that were chosen for it; what a checkpoint stores.

    `options` holds JSON-able values only, and only what was given: `build_config` fills in the rest.
    """

    name: str
    provider: str = BUILT_IN
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> ProjectorSpec:
        """The registry's entry."""
        return projector_spec(self.name)

    def to_dict(self) -> dict[str, Any]:
        """{"name", "provider", "options"}, JSON-able."""
        return {"name": self.name, "provider": self.provider, "options": dict(self.options)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any], trust_projector_code: bool = False) -> ProjectorSelection:
        """Read what `to_dict` wrote.

        Raises:
            ProjectorError: malformed entry; unknown projector or option; code outside this package without consent;
                a registered projector of that name that comes from elsewhere.
        """
        unknown = set(stored) - {"name", "provider", "options"}
        if "name" not in stored or unknown:
            raise ProjectorError(
                f"stored projector {dict(stored)!r}: expected the keys 'name', 'provider' and 'options'"
            )
        provider = stored.get("provider", BUILT_IN)
        is_own_code = provider not in (BUILT_IN, ENTRY_POINT)
        selection = select_projector(
            provider if is_own_code else stored["name"], stored.get("options"), trust_projector_code
        )
        if (selection.name, selection.provider) != (stored["name"], _lasting_spelling(provider)):
            raise ProjectorError(
                f"stored projector {stored['name']!r} came from {provider!r}, but here that is "
                f"{selection.name!r} from {selection.provider!r}"
            )
        return selection

    def build_config(
        self, *, vision_hidden_size: int, text_hidden_size: int, num_vision_layers: int | None = None
    ) -> ProjectorConfig:
        """The complete config for a pair of models.

        Args:
            num_vision_layers: blocks of the vision tower; the default layers follow from it, and layers outside the
                tower are refused. None skips both.
        Raises:
            ProjectorError: options that contradict each other or the widths, or layers that the tower lacks.
        """
        spec = self.spec
        options = dict(self.options)
        if "vision_layers" not in options:
            options["vision_layers"] = spec.config_class.default_vision_layers(num_vision_layers, options)
        config = spec.config_class(vision_hidden_size=vision_hidden_size, text_hidden_size=text_hidden_size, **options)
        if num_vision_layers is not None:
            config.check_vision_layers(num_vision_layers)
        return config

    def completed(self, config: ProjectorConfig) -> ProjectorSelection:
        """The same choice with every option written out, so that later defaults cannot change a checkpoint."""
        return ProjectorSelection(self.name, self.provider, config.options())

    def build(self, config: ProjectorConfig) -> Projector:
        """An initialised projector; under ZeRO-3's `zero.Init` every rank must call it."""
        spec = self.spec
        if type(config) is not spec.config_class:
            raise ProjectorError(
                f"projector {self.name!r}: got a {type(config).__name__}, expected a {spec.config_class.__name__} "
                "as build_config returns it"
            )
        projector = spec.module_class(config)
        if any(is_partitioned(parameter) for parameter in projector.parameters()):
            initialize_projector(projector)
        return projector


_specs: dict[str, ProjectorSpec] = {}
_aliases: dict[str, str] = {}
_presets: dict[str, str] = {}


class _LoadState:
    built_ins_loaded = False
    provider: str | None = None


def register_projector(
    name: str,
    *,
    config: type[ProjectorConfig],
    summary: str,
    paper: str = "",
    aliases: tuple[str, ...] = (),
    parse_spelling: SpellingParser | None = None,
    token_formula: str = "",
    presets: Mapping[str, ProjectorPreset] | None = None,
) -> Callable[[type[Projector]], type[Projector]]:
    """Class decorator that makes a projector known under a name.

    Args:
        config: its frozen config dataclass; the fields are its options.
        summary: one sentence for help texts and tables.
        paper: where the architecture is described, as a URL or citation.
        parse_spelling: maps a spelling that carries options to those options, or to None when it is not one.
        token_formula: tokens per image as an expression of H, W and the options, such as
            `"ceil(H / stride) * ceil(W / stride)"` (conformance evaluates it), or in words.
        presets: further names, each for this projector with some options fixed.
    Raises:
        ProjectorError: the name, an alias or a preset is taken, or the class or config is not of the contract's type,
            or a preset's options are not the projector's.
    """

    def register(module_class: type[Projector]) -> type[Projector]:
        if not (isinstance(module_class, type) and issubclass(module_class, Projector)):
            raise ProjectorError(f"projector {name!r}: got {module_class!r}, expected a subclass of Projector")
        if not (isinstance(config, type) and issubclass(config, ProjectorConfig)):
            raise ProjectorError(f"projector {name!r}: config is {config!r}, expected a subclass of ProjectorConfig")
        provider = _provider_of(module_class)
        checked_presets = {
            preset_name: replace(
                preset,
                options=convert_options(preset_name, config, preset.options),
                defaults=convert_options(preset_name, config, preset.defaults),
            )
            for preset_name, preset in (presets or {}).items()
        }
        spec = ProjectorSpec(
            name,
            config,
            module_class,
            summary,
            paper,
            tuple(aliases),
            provider,
            parse_spelling,
            token_formula,
            checked_presets,
        )
        _add(spec)
        return module_class

    return register


def registered_projectors() -> tuple[str, ...]:
    """Canonical names, sorted: built-ins, what has been registered since, and installed entry points (not loaded)."""
    _load_built_ins()
    return tuple(sorted({*_specs, *_entry_points()}))


def registered_presets() -> dict[str, ProjectorPreset]:
    """Names that stand for a projector with some options fixed, sorted; entry points count once they are loaded."""
    _load_built_ins()
    return {name: _specs[_presets[name]].presets[name] for name in sorted(_presets)}


def projector_spec(name: str) -> ProjectorSpec:
    """The entry of a registered name or alias.

    Raises:
        ProjectorError: nothing is registered under that name.
    """
    spec = _find_registered(name)
    if spec is None:
        raise _unknown_projector(name)
    return spec


def spec_of_class(module_class: type[Projector]) -> ProjectorSpec:
    """The entry of a registered class.

    Raises:
        ProjectorError: the class has not been registered.
    """
    _load_built_ins()
    for spec in _specs.values():
        if spec.module_class is module_class:
            return spec
    raise ProjectorError(
        f"{module_class.__module__}:{module_class.__qualname__} is not registered; decorate the class with "
        "@register_projector(name, config=..., summary=...)"
    )


def select_projector(
    spelling: str, options: Mapping[str, Any] | None = None, trust_projector_code: bool = False
) -> ProjectorSelection:
    """Find a projector by what a user wrote and check the options.

    Args:
        spelling: name, alias, spelling with options, or (with consent) `package.module:Class` or
            `path/to/file.py:Class`.
        options: values as JSON has them, or strings as `parse_projector_options` returns them.
        trust_projector_code: consent to import the module that the spelling names. Give it for what a person typed,
            never for what a file said.
    Raises:
        ProjectorError: unknown name (with the nearest and the list), unknown or wrong option, no consent.
    """
    spec, spelled_options = _find(spelling, trust_projector_code)
    given = convert_options(spec.name, spec.config_class, options or {})
    for option_name, value in spelled_options.items():
        if given.setdefault(option_name, value) != value:
            raise ProjectorError(
                f"projector {spelling!r} means {option_name}={value}, but option {option_name!r} says "
                f"{given[option_name]}; leave one of them out"
            )
    if spelling in spec.presets:
        given = {**spec.presets[spelling].defaults, **given}
    given = convert_options(spec.name, spec.config_class, given)
    return ProjectorSelection(spec.name, spec.provider, given)


def _find(spelling: str, trust_projector_code: bool) -> tuple[ProjectorSpec, Mapping[str, Any]]:
    spec = _find_registered(spelling)
    if spec is None and ":" in spelling:
        spec = _find_own_code(spelling, trust_projector_code)
    if spec is not None:
        return spec, {}
    if spelling in _presets:
        spec = _specs[_presets[spelling]]
        return spec, spec.presets[spelling].options
    for candidate in _specs.values():
        options = candidate.parse_spelling(spelling) if candidate.parse_spelling else None
        if options is not None:
            return candidate, options
    raise _unknown_projector(spelling)


def _find_registered(name: str) -> ProjectorSpec | None:
    _load_built_ins()
    canonical = _aliases.get(name, name)
    if canonical in _specs:
        return _specs[canonical]
    entry_point = _entry_points().get(name)
    if entry_point is None:
        return None
    try:
        with _ProviderScope(ENTRY_POINT):
            entry_point.load()
    except ImportError as error:
        raise ProjectorError(f"entry point {name!r} ({entry_point.value}) cannot be imported: {error}") from error
    if name not in _specs:
        raise ProjectorError(
            f"entry point {name!r} ({entry_point.value}) of group {ENTRY_POINT_GROUP} registers no projector {name!r}"
        )
    return _specs[name]


def _unknown_projector(spelling: str) -> ProjectorError:
    known = (*registered_projectors(), *registered_presets())
    message = unknown_name_message("projector", spelling, known, "Registered")
    return ProjectorError(f"{message} {_OUTSIDE_HINT}")


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    found = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    return {entry_point.name: entry_point for entry_point in found}


def _load_built_ins() -> None:
    """Import every plain file of this package; each registers what it holds."""
    if _LoadState.built_ins_loaded:
        return
    for module in pkgutil.iter_modules(sys.modules[_PACKAGE].__path__):
        if not (module.ispkg or module.name.startswith("_") or module.name in _NOT_PROJECTORS):
            importlib.import_module(f"{_PACKAGE}.{module.name}")
    _LoadState.built_ins_loaded = True


def _add(spec: ProjectorSpec) -> None:
    for name in (spec.name, *spec.aliases, *spec.presets):
        taken = _specs.get(_presets.get(name, _aliases.get(name, name)))
        if taken is not None:
            raise ProjectorError(
                f"projector {name!r} is already registered by {taken.module_class.__module__}:"
                f"{taken.module_class.__qualname__}; choose another name"
            )
    _specs[spec.name] = spec
    _aliases.update(dict.fromkeys(spec.aliases, spec.name))
    _presets.update(dict.fromkeys(spec.presets, spec.name))


def _provider_of(module_class: type[Projector]) -> str:
    if module_class.__module__.startswith(f"{_PACKAGE}."):
        return BUILT_IN
    return _LoadState.provider or f"{module_class.__module__}:{module_class.__qualname__}"


class _ProviderScope:
    """While active, newly registered classes are recorded as coming from `provider`."""

    def __init__(self, provider: str) -> None:
        self.provider = provider

    def __enter__(self) -> None:
        self.previous, _LoadState.provider = _LoadState.provider, self.provider

    def __exit__(self, *exception: object) -> None:
        _LoadState.provider = self.previous


def _find_own_code(spelling: str, trust_projector_code: bool) -> ProjectorSpec:
    if not trust_projector_code:
        raise ProjectorError(
            f"projector {spelling!r} is code outside this package, and importing it runs it. If you trust that code, "
            "say so with --trust_projector_code (trust_projector_code=True in Python)."
        )
    spelling = _lasting_spelling(spelling)
    module_name, _, class_name = spelling.rpartition(":")
    with _ProviderScope(spelling):
        module = _import_file(Path(module_name)) if module_name.endswith(".py") else _import_module(module_name)
    module_class = getattr(module, class_name, None)
    if not (isinstance(module_class, type) and issubclass(module_class, Projector)):
        found = [name for name, value in vars(module).items() if _is_projector_class(value)]
        raise ProjectorError(
            f"projector {spelling!r}: {module_name} holds no Projector class {class_name!r}. "
            f"It holds: {', '.join(found) or 'none'}."
        )
    return spec_of_class(module_class)


def _lasting_spelling(spelling: str) -> str:
    """`path/to/file.py:Class` with the whole path, which holds from every folder; other spellings stay."""
    path, _, class_name = spelling.rpartition(":")
    return f"{Path(path).resolve()}:{class_name}" if path.endswith(".py") else spelling


def _is_projector_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Projector) and value is not Projector


@contextmanager
def _explaining_broken_code(name: str) -> Iterator[None]:
    """Turn the errors of code that cannot even be read, or that imports what is absent, into a ProjectorError."""
    try:
        yield
    except SyntaxError as error:
        place = f"{error.filename}, line {error.lineno}"
        raise ProjectorError(f"cannot import {name!r} for a projector: {place}: {error.msg}") from error
    except ImportError as error:
        raise ProjectorError(
            f"cannot import {name!r} for a projector: {error}. What it names must be on PYTHONPATH; a file can be "
            "named directly as 'path/to/file.py:Class'."
        ) from error


def _import_module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ProjectorError(
            f"cannot import {name!r} for a projector: that is no name of a module, such as 'package.module'. A file is "
            "named with its ending, as 'path/to/file.py:Class'."
        )
    with _explaining_broken_code(name):
        return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    """Import a file once, under a name that follows from its path, so that pickling its classes works."""
    if not path.is_file():
        raise ProjectorError(f"cannot import {str(path)!r} for a projector: there is no such file")
    name = f"projector_file_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        with _explaining_broken_code(str(path)):
            module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
