"""Projectors by name: registration, look-up, and the selection that a checkpoint stores.

Look-up, first hit wins and never by substring: an exact name or alias (built-ins are found by listing this folder), an
installed entry point, a user's own `package.module:Class` or `path/to/file.py:Class`, a preset, a spelling that carries
options (`mlp2x_gelu`), and at last what installed packages register beside the names that they announce, for which all
of them are imported. A configuration file must not be able to run code, so the third kind needs the caller's consent.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import itertools
import pkgutil
import re
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
_FILE_MODULE_PREFIX = "projector_file_"
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
    `package` is the installed package of an entry point, as "my-projector 0.1.0"; empty for all others.
    `parse_spelling` maps a spelling that carries options (`mlp2x_gelu`) to those options, or to None;
    `example_spellings` are some that it understands.
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
    package: str = ""
    example_spellings: tuple[str, ...] = ()


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
        """{"name", "provider", "options"}, JSON-able, and for an entry point the "package" that offers it."""
        stored = {"name": self.name, "provider": self.provider, "options": dict(self.options)}
        if self.provider == ENTRY_POINT and self.name in _specs and _specs[self.name].package:
            stored["package"] = _specs[self.name].package
        return stored

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any], trust_projector_code: bool = False) -> ProjectorSelection:
        """Read what `to_dict` wrote.

        Raises:
            ProjectorError: malformed entry; unknown projector or option; code outside this package without consent;
                a registered projector of that name that comes from elsewhere.
        """
        unknown = set(stored) - {"name", "provider", "options", "package"}
        if "name" not in stored or unknown:
            raise ProjectorError(
                f"stored projector {dict(stored)!r}: expected the keys 'name', 'provider' and 'options'"
            )
        provider = stored.get("provider", BUILT_IN)
        is_own_code = provider not in (BUILT_IN, ENTRY_POINT)
        if provider == ENTRY_POINT:
            _require_plug_in(stored["name"], stored.get("package", ""))
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
        widths = {"vision_hidden_size": vision_hidden_size, "text_hidden_size": text_hidden_size}
        try:
            config = spec.config_class(**widths, **options)
        except ProjectorError as error:
            raise ProjectorError(_with_projector_named(str(error), spec)) from error
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


def _with_projector_named(message: str, spec: ProjectorSpec) -> str:
    """A config's error speaks of its class; the user knows the projector's name and the option's."""
    class_name = re.escape(spec.config_class.__name__)
    message = re.sub(rf"\b{class_name}\.(\w+)", rf"projector {spec.name!r}, option \1", message)
    return re.sub(rf"\b{class_name}:", f"projector {spec.name!r}:", message)


_specs: dict[str, ProjectorSpec] = {}
_aliases: dict[str, str] = {}
_presets: dict[str, str] = {}


class _LoadState:
    built_ins_loaded = False
    plug_in: importlib.metadata.EntryPoint | None = None


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
    example_spellings: tuple[str, ...] = (),
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
        example_spellings: spellings that `parse_spelling` understands and that occur in the field; they are listed
            and suggested, and tried where unknown weights are to be recognised.
    Raises:
        ProjectorError: the name, an alias or a preset is taken, or the class or config is not of the contract's type,
            or a preset's options are not the projector's, or an example is not understood.
    """

    def register(module_class: type[Projector]) -> type[Projector]:
        if not (isinstance(module_class, type) and issubclass(module_class, Projector)):
            raise ProjectorError(f"projector {name!r}: got {module_class!r}, expected a subclass of Projector")
        if not (isinstance(config, type) and issubclass(config, ProjectorConfig)):
            raise ProjectorError(f"projector {name!r}: config is {config!r}, expected a subclass of ProjectorConfig")
        provider, package = _origin_of(module_class)
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
            _checked_presets(config, presets or {}),
            package,
            tuple(example_spellings),
        )
        _check_examples(spec)
        _add(spec)
        return module_class

    return register


def _checked_presets(
    config_class: type[ProjectorConfig], presets: Mapping[str, ProjectorPreset]
) -> dict[str, ProjectorPreset]:
    """The presets with their options converted to the types that the config declares."""
    return {
        name: replace(
            preset,
            options=convert_options(name, config_class, preset.options),
            defaults=convert_options(name, config_class, preset.defaults),
        )
        for name, preset in presets.items()
    }


def _check_examples(spec: ProjectorSpec) -> None:
    for spelling in spec.example_spellings:
        if spec.parse_spelling is None or spec.parse_spelling(spelling) is None:
            raise ProjectorError(
                f"projector {spec.name!r}: parse_spelling does not understand {spelling!r} of example_spellings; "
                "expected the options that it stands for"
            )


def registered_spellings() -> tuple[str, ...]:
    """Examples of spellings that carry options, sorted; a plug-in's count once it is loaded."""
    _load_built_ins()
    return tuple(sorted(itertools.chain.from_iterable(spec.example_spellings for spec in _specs.values())))


def registered_projectors() -> tuple[str, ...]:
    """Canonical names, sorted: built-ins, what has been registered since, and installed entry points (not loaded)."""
    _load_built_ins()
    announced = {name for name in _entry_points() if name not in _aliases and name not in _presets}
    return tuple(sorted({*_specs, *announced}))


def registered_presets() -> dict[str, ProjectorPreset]:
    """Names that stand for a projector with some options fixed, sorted; a plug-in's count once it is loaded."""
    _load_built_ins()
    return {name: _specs[_presets[name]].presets[name] for name in sorted(_presets)}


def load_plug_ins() -> dict[str, ProjectorError]:
    """Import every installed entry point, so that its presets, aliases and spellings are known too.

    Returns:
        the entry points that cannot be used, by name, with the reason; they do not disturb the others. Normally empty.
    """
    _load_built_ins()
    problems = {}
    for name in _entry_points():
        try:
            _load_plug_in(name)
        except ProjectorError as error:
            problems[name] = error
    return problems


def projector_spec(name: str) -> ProjectorSpec:
    """The entry of a registered name or alias.

    Raises:
        ProjectorError: nothing is registered under that name.
    """
    spec = _find_registered(name)
    if spec is not None:
        return spec
    problems = load_plug_ins()
    spec = _find_registered(name)
    if spec is None:
        raise _unknown_projector(name, problems)
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
    found = (spec, {}) if spec is not None else _find_with_options(spelling)
    if found is not None:
        return found
    problems = load_plug_ins()
    spec = _find_registered(spelling)
    found = (spec, {}) if spec is not None else _find_with_options(spelling)
    if found is None:
        raise _unknown_projector(spelling, problems)
    return found


def _find_registered(name: str) -> ProjectorSpec | None:
    _load_built_ins()
    canonical = _aliases.get(name, name)
    if canonical not in _specs and name not in _presets and name in _entry_points():
        _load_plug_in(name)
        canonical = _aliases.get(name, name)
    return _specs.get(canonical)


def _find_with_options(spelling: str) -> tuple[ProjectorSpec, Mapping[str, Any]] | None:
    """The projector and the options that a preset's name or a spelling stands for."""
    if spelling in _presets:
        spec = _specs[_presets[spelling]]
        return spec, spec.presets[spelling].options
    for candidate in _specs.values():
        options = candidate.parse_spelling(spelling) if candidate.parse_spelling else None
        if options is not None:
            return candidate, options
    return None


def _unknown_projector(spelling: str, problems: Mapping[str, ProjectorError]) -> ProjectorError:
    if spelling.endswith(".py") or "/" in spelling or "\\" in spelling:
        return _path_without_class(spelling)
    known = (*registered_projectors(), *registered_presets(), *sorted(_aliases), *registered_spellings())
    message = unknown_name_message("projector", spelling, known, "Registered")
    return ProjectorError(" ".join([message, _OUTSIDE_HINT, *_unusable_plug_ins(problems)]))


def _path_without_class(spelling: str) -> ProjectorError:
    if not spelling.endswith(".py"):
        return ProjectorError(f"unknown projector: got {spelling!r}, expected 'path/to/file.py:Class'")
    if not Path(spelling).is_file():
        return ProjectorError(f"unknown projector: {spelling!r}: there is no such file")
    # Read, not imported: nobody has agreed to run it.
    source = Path(spelling).read_text(encoding="utf-8", errors="replace")
    classes = re.findall(r"^class (\w+)\(.*\bProjector\b", source, re.MULTILINE)
    holds = f". It holds: {', '.join(classes)}" if classes else ""
    return ProjectorError(
        f"unknown projector: {spelling!r} is a file; name the class too, as '{spelling}:Class'{holds}"
    )


def _unusable_plug_ins(problems: Mapping[str, ProjectorError]) -> list[str]:
    """A sentence on each, for messages that somebody reads who may be looking for it."""
    return [f"Not usable: {problem}." for problem in problems.values()]


# Installed packages


def _entry_points() -> dict[str, list[importlib.metadata.EntryPoint]]:
    """What installed packages announce, by name; more than one only where two packages chose the same name."""
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        found.setdefault(entry_point.name, []).append(entry_point)
    return found


def _load_plug_in(name: str) -> None:
    """Import the module of an entry point, which registers what it holds.

    Raises:
        ProjectorError: two packages offer the name, the import fails, or the name is not registered by it.
    """
    entry_point, *others = _entry_points()[name]
    if any(other.value != entry_point.value for other in others):
        offers = " and ".join(map(_described, (entry_point, *others)))
        raise ProjectorError(
            f"projector {name!r} is offered by more than one installed package: {offers}; uninstall all but one, or "
            "name the class as 'package.module:Class'"
        )
    before = set(_specs)
    _LoadState.plug_in = entry_point
    try:
        entry_point.load()
    except (Exception, SystemExit) as error:  # other people's code may raise anything
        _forget_failed_imports(before)
        raise ProjectorError(f"{_described(entry_point)} cannot be imported: {_first_line(error)}") from error
    finally:
        _LoadState.plug_in = None
    if not any(name in names for names in (_specs, _aliases, _presets)):
        package = _top_level(entry_point.value)
        own = [other for other, spec in _specs.items() if _top_level(spec.module_class.__module__) == package]
        raise ProjectorError(
            f"{_described(entry_point)} of group {ENTRY_POINT_GROUP} registers no projector {name!r}. It registers: "
            f"{', '.join(sorted(own)) or 'none'}; an entry point is named as its projector is registered"
        )


def _described(entry_point: importlib.metadata.EntryPoint) -> str:
    package = _package_of(entry_point)
    return f"entry point {entry_point.name!r} ({entry_point.value}){f' of package {package}' if package else ''}"


def _package_of(entry_point: importlib.metadata.EntryPoint) -> str:
    """Name and version, as in my-projector 0.1.0; empty where the entry point does not say."""
    distribution = getattr(entry_point, "dist", None)
    return f"{distribution.name} {distribution.version}" if distribution is not None else ""


def _first_line(error: BaseException) -> str:
    if isinstance(error, ProjectorError):
        return str(error)
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _forget_failed_imports(registered_before: set[str]) -> None:
    """Unregister what a module registered before its import failed: Python has dropped the module as well."""
    for name in set(_specs) - registered_before:
        if _specs[name].module_class.__module__ not in sys.modules:
            del _specs[name]
            for names in (_aliases, _presets):
                for other in [other for other, target in names.items() if target == name]:
                    del names[other]


def _require_plug_in(name: str, package: str) -> None:
    """Say what to install where a stored projector came from a package that is not there.

    Raises:
        ProjectorError: no installed package registers the projector.
    """
    _load_built_ins()
    if name in _specs or name in _entry_points():
        return
    problems = load_plug_ins()  # a package may register more projectors than it announces
    if name in _specs:
        return
    source = f"the package {package}" if package else "an installed package"
    message = (
        f"stored projector {name!r} came from {source} (an entry point of the group {ENTRY_POINT_GROUP}), and no "
        f"package that is installed here offers it. Install that package into this environment, from where you got "
        "it and the way it was installed before."
    )
    raise ProjectorError(" ".join([message, *_unusable_plug_ins(problems)]))


# Built-ins


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


def _origin_of(module_class: type[Projector]) -> tuple[str, str]:
    """The provider of a class and its package, the same whoever imported its module first."""
    module_name, class_name = module_class.__module__, module_class.__qualname__
    if module_name.startswith(f"{_PACKAGE}."):
        return BUILT_IN, ""
    if _LoadState.plug_in is not None:
        return ENTRY_POINT, _package_of(_LoadState.plug_in)
    for entry_point in itertools.chain.from_iterable(_entry_points().values()):
        if _top_level(entry_point.value) == _top_level(module_name):
            return ENTRY_POINT, _package_of(entry_point)
    if module_name.startswith(_FILE_MODULE_PREFIX):
        module_name = str(sys.modules[module_name].__file__)
    return f"{module_name}:{class_name}", ""


def _top_level(module_name: str) -> str:
    """`my_projector.pooling:Class` -> `my_projector`."""
    return module_name.partition(":")[0].partition(".")[0]


# A user's own code


def _find_own_code(spelling: str, trust_projector_code: bool) -> ProjectorSpec:
    if not trust_projector_code:
        raise ProjectorError(
            f"projector {spelling!r} is code outside this package, and importing it runs it. If you trust that code, "
            "say so with --trust_projector_code (trust_projector_code=True in Python)."
        )
    spelling = _lasting_spelling(spelling)
    module_name, _, class_name = spelling.rpartition(":")
    before = set(_specs)
    try:
        module = _import_file(Path(module_name)) if module_name.endswith(".py") else _import_module(module_name)
    except BaseException:
        _forget_failed_imports(before)  # whoever mends the code may try again in this process
        raise
    module_class = getattr(module, class_name, None)
    if not (isinstance(module_class, type) and issubclass(module_class, Projector)):
        found = [name for name, value in vars(module).items() if _is_projector_class(value)]
        raise ProjectorError(
            f"projector {spelling!r}: {module_name} holds no Projector class {class_name!r}. "
            f"It holds: {', '.join(found) or 'none'}."
        )
    # The provider is what was named, also where the class belongs to an installed package too.
    return replace(spec_of_class(module_class), provider=spelling, package="")


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
        raise ProjectorError(
            f"cannot import {str(path)!r} for a projector: there is no such file. If a checkpoint names it, put it "
            "back there, or write its new place into the checkpoint's config.json and processor_config.json"
        )
    name = f"{_FILE_MODULE_PREFIX}{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
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
