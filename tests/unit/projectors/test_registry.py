"""Look-up by name, alias, entry point, own file and spelling; and that a stored name cannot run code."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch

from projectors import (
    PatchGrid,
    Projector,
    ProjectorConfig,
    ProjectorError,
    ProjectorSelection,
    load_plug_ins,
    projector_spec,
    register_projector,
    registered_presets,
    registered_projectors,
    select_projector,
)
from projectors._registry import registered_spellings
from projectors.conformance import check_projector

OWN_FILE = '''
from dataclasses import dataclass
from torch import nn
from projectors import Projector, ProjectorConfig, option, register_projector

@dataclass(frozen=True, kw_only=True)
class BlurConfig(ProjectorConfig):
    width: int = option(1, "width of the blur", minimum=1)

    def num_output_tokens(self, grid):
        return grid.num_patches

@register_projector("blur", config=BlurConfig, summary="A blur.")
class Blur(Projector):
    """A blur."""

    def __init__(self, config):
        super().__init__(config)
        self.linear = nn.Linear(config.vision_hidden_size, config.text_hidden_size)

    def reset_parameters(self):
        self.linear.reset_parameters()

    def forward(self, features, grid):
        self.check_features(features, grid)
        return self.linear(features[0])

class Undecorated(Projector):
    pass
'''


@pytest.fixture
def own_file(tmp_path, scratch_registry):
    path = tmp_path / "blur.py"
    path.write_text(OWN_FILE)
    return path


@pytest.fixture
def plug_in(scratch_registry, monkeypatch):
    """An installed package whose entry point `blur` leads to OWN_FILE; `loads` counts how often it is imported."""
    loads = []

    class EntryPoint:
        name, value = "blur", "blur_lab.blur:Blur"

        def load(self):
            loads.append(self.value)
            module = types.ModuleType("blur_lab.blur")
            sys.modules["blur_lab.blur"] = module
            exec(OWN_FILE, module.__dict__)
            return module.Blur

    found = importlib.metadata.entry_points

    def entry_points(**selection):
        return [EntryPoint()] if selection == {"group": "llava_saep.projectors"} else found(**selection)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    return loads


def test_built_ins_are_found_by_listing_the_folder():
    assert {"avg_pool", "c_abstractor", "identity", "linear", "mlp", "qformer", "saep"} <= set(registered_projectors())


@pytest.mark.parametrize(
    "spelling, name, options",
    [
        ("saep", "saep", {}),
        ("deco", "avg_pool", {}),
        ("c-abs", "c_abstractor", {}),
        ("mlp2x_gelu", "mlp", {"depth": 2}),
        ("mlp13x_gelu", "mlp", {"depth": 13}),
    ],
)
def test_spellings(spelling, name, options):
    selection = select_projector(spelling)
    assert (selection.name, selection.provider, selection.options) == (name, "built-in", options)


@pytest.mark.parametrize("spelling", ["mlpx_gelu", "mlp2x_gelu_", "xmlp2x_gelu", "sae", "SAEP", "lin", ""])
def test_substrings_and_near_misses_are_not_names(spelling):
    with pytest.raises(ProjectorError, match="unknown projector"):
        select_projector(spelling)


def test_unknown_name_suggests_and_lists():
    with pytest.raises(ProjectorError) as error:
        select_projector("sape")
    assert str(error.value).startswith("unknown projector: 'sape'. Did you mean 'saep'? Registered: ")
    assert all(name in str(error.value) for name in registered_projectors())
    assert "package.module:Class" in str(error.value)


@pytest.mark.parametrize(
    "misspelled, meant",
    [
        ("mpl2x_gelu", "mlp2x_gelu"),
        ("MLP2x_gelu", "mlp2x_gelu"),
        ("mlp2x_relu", "mlp2x_gelu"),
        ("mlp2x_res2_gelu", "mlp2x_res2x_gelu"),
        ("ldpnett", "ldpnet"),
    ],
)
def test_unknown_name_suggests_aliases_and_spellings(misspelled, meant):
    with pytest.raises(ProjectorError, match=f"Did you mean '{meant}'") as error:
        select_projector(misspelled)
    assert "mlp2x_gelu" in str(error.value).partition("Registered:")[2]


def test_a_file_without_its_class_is_told_which_classes_to_add(own_file, tmp_path):
    with pytest.raises(ProjectorError, match=r"name the class too, as '.*/blur\.py:Class'") as error:
        select_projector(str(own_file), trust_projector_code=True)
    assert "It holds: Blur, Undecorated" in str(error.value) and "Registered" not in str(error.value)
    assert "blur" not in registered_projectors()  # only the naming of a class is consent to run the file
    with pytest.raises(ProjectorError, match=r"'.*/absent\.py': there is no such file"):
        select_projector(f"{tmp_path}/absent.py")
    with pytest.raises(ProjectorError, match="expected 'path/to/file.py:Class'"):
        select_projector(str(tmp_path))


def test_example_spellings_are_listed_and_must_be_understood(scratch_registry):
    def register(*examples):
        return register_projector(
            "spelled",
            config=projector_spec("linear").config_class,
            summary="x",
            parse_spelling=lambda text: {} if text == "spelled7" else None,
            example_spellings=examples,
        )(type("Spelled", (Projector,), {}))

    with pytest.raises(ProjectorError, match="'spelled8'"):
        register("spelled7", "spelled8")
    register("spelled7")
    assert "spelled7" in registered_spellings()


def test_spelled_option_must_agree_with_the_given_one():
    assert select_projector("mlp2x_gelu", {"depth": "2"}).options == {"depth": 2}
    with pytest.raises(ProjectorError, match="depth=2.*3"):
        select_projector("mlp2x_gelu", {"depth": 3})


def test_spelled_option_is_checked():
    with pytest.raises(ProjectorError, match="0.*at least 1"):
        select_projector("mlp0x_gelu")


def test_second_registration_of_a_name_raises(scratch_registry):
    class Other(Projector):
        pass

    for name, aliases in (("saep", ()), ("deco", ()), ("fresh", ("linear",))):
        with pytest.raises(ProjectorError, match="already registered by projectors"):
            register_projector(name, config=ProjectorConfig, summary="x", aliases=aliases)(Other)
    assert "fresh" not in registered_projectors()


def test_only_projector_classes_and_configs_are_registered(scratch_registry):
    with pytest.raises(ProjectorError, match="subclass of Projector"):
        register_projector("fresh", config=ProjectorConfig, summary="x")(torch.nn.Linear)
    with pytest.raises(ProjectorError, match="subclass of ProjectorConfig"):
        register_projector("fresh", config=dict, summary="x")(Projector)


def test_own_file_needs_consent_and_then_works(own_file):
    with pytest.raises(ProjectorError, match="trust_projector_code"):
        select_projector(f"{own_file}:Blur")
    assert not any(name.startswith("projector_file_") for name in sys.modules)
    selection = select_projector(f"{own_file}:Blur", {"width": "2"}, trust_projector_code=True)
    assert selection.to_dict() == {"name": "blur", "provider": f"{own_file}:Blur", "options": {"width": 2}}
    assert "blur" in registered_projectors()
    again = select_projector(f"{own_file}:Blur", trust_projector_code=True)
    assert again.spec.module_class is selection.spec.module_class
    projector = selection.build(selection.build_config(vision_hidden_size=4, text_hidden_size=6))
    assert pickle.loads(pickle.dumps(projector))([torch.zeros(1, 6, 4)], PatchGrid(2, 3)).shape == (1, 6, 6)


def test_own_module_on_the_path(own_file, monkeypatch):
    monkeypatch.syspath_prepend(own_file.parent)
    assert select_projector("blur:Blur", trust_projector_code=True).provider == "blur:Blur"


@pytest.mark.parametrize(
    "spelling, words",
    [
        ("no_such_package.module:Class", ("no_such_package", "PYTHONPATH")),
        ("/no/such/file.py:Class", ("/no/such/file.py", "no such file")),
        (":Class", ("''", "no name of a module", "file.py:Class")),
        ("./blur:Blur", ("./blur", "no name of a module", "file.py:Class")),
        ("{path}:Other", ("Other", "Blur", "Undecorated")),
        ("{path}:Undecorated", ("Undecorated", "@register_projector")),
    ],
)
def test_unusable_own_code_is_explained(own_file, spelling, words):
    with pytest.raises(ProjectorError) as error:
        select_projector(spelling.format(path=own_file), trust_projector_code=True)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("source, words", [("x = (\n", "broken.py, line 1"), ("import no_such_lab\n", "no_such_lab")])
@pytest.mark.parametrize("spelling", ["{path}:Blur", "broken:Blur"])
def test_code_that_cannot_be_imported_is_named_with_its_place(own_file, monkeypatch, spelling, source, words):
    path = own_file.with_name("broken.py")
    path.write_text(source)
    monkeypatch.syspath_prepend(path.parent)
    with pytest.raises(ProjectorError, match=words):
        select_projector(spelling.format(path=path), trust_projector_code=True)
    assert "broken" not in sys.modules


def test_a_file_is_stored_with_its_whole_path(own_file, monkeypatch):
    """What is written down must be found from another working folder too."""
    monkeypatch.chdir(own_file.parent)
    selection = select_projector("blur.py:Blur", trust_projector_code=True)
    assert selection.provider == f"{own_file.resolve()}:Blur"
    older = {"name": "blur", "provider": "blur.py:Blur", "options": {}}  # as earlier checkpoints have it
    assert ProjectorSelection.from_dict(older, trust_projector_code=True) == selection
    monkeypatch.chdir("/")
    assert ProjectorSelection.from_dict(selection.to_dict(), trust_projector_code=True) == selection


def test_stored_selection_does_not_import_code_without_consent(own_file):
    stored = {"name": "blur", "provider": f"{own_file}:Blur", "options": {}}
    with pytest.raises(ProjectorError, match="trust_projector_code"):
        ProjectorSelection.from_dict(stored)
    assert not any(name.startswith("projector_file_") for name in sys.modules)
    assert ProjectorSelection.from_dict(stored, trust_projector_code=True).to_dict() == stored


@pytest.mark.parametrize("name", ["os:path", "saep:Class", "{path}:Blur"])
def test_a_stored_name_cannot_smuggle_code_in(own_file, name):
    with pytest.raises(ProjectorError):
        ProjectorSelection.from_dict({"name": name.format(path=own_file), "provider": "built-in", "options": {}})
    assert not any(module.startswith("projector_file_") for module in sys.modules)


def test_entry_point_is_listed_without_loading_and_loaded_by_name(plug_in):
    assert "blur" in registered_projectors()
    select_projector("saep")
    select_projector("mlp2x_gelu")
    assert plug_in == []
    selection = select_projector("blur")
    assert (selection.provider, plug_in) == ("entry-point", ["blur_lab.blur:Blur"])
    assert ProjectorSelection.from_dict(selection.to_dict()) == selection


def test_selection_from_another_provider_is_refused(plug_in):
    with pytest.raises(ProjectorError, match="came from 'built-in'.*'entry-point'"):
        ProjectorSelection.from_dict({"name": "blur", "provider": "built-in", "options": {}})


@pytest.mark.parametrize("stored", [{}, {"provider": "built-in"}, {"name": "saep", "extra": 1}])
def test_malformed_stored_selection_is_refused(stored):
    with pytest.raises(ProjectorError, match="expected the keys"):
        ProjectorSelection.from_dict(stored)


def test_completed_selection_survives_json_and_changed_defaults():
    selection = select_projector("saep", {"stride": 3})
    sizes = {"vision_hidden_size": 8, "text_hidden_size": 12}
    config = selection.build_config(**sizes, num_vision_layers=12)
    stored = json.loads(json.dumps(selection.completed(config).to_dict()))
    assert ProjectorSelection.from_dict(stored).build_config(**sizes, num_vision_layers=12) == config
    assert stored["options"]["vision_layers"] == [6, 8, 11, 12]
    assert stored["options"]["stride"] == 3


@pytest.mark.parametrize("layer", [25, -26])
def test_layers_that_the_tower_lacks_are_refused(layer):
    selection = select_projector("mlp", {"vision_layers": [layer]})
    with pytest.raises(ProjectorError, match=f"layer {layer} does not exist.*24 blocks.*-25 to 24"):
        selection.build_config(vision_hidden_size=8, text_hidden_size=8, num_vision_layers=24)


def test_outermost_layers_are_allowed():
    selection = select_projector("mlp", {"vision_layers": [0, -25, 24, -1]})
    selection.build_config(vision_hidden_size=8, text_hidden_size=8, num_vision_layers=24)


def test_build_refuses_another_projectors_config():
    config = select_projector("linear").build_config(vision_hidden_size=8, text_hidden_size=8)
    with pytest.raises(ProjectorError, match="LinearConfig.*SAEPConfig"):
        select_projector("saep").build(config)


def test_identity_names_both_widths():
    with pytest.raises(ProjectorError, match="8.*12"):
        select_projector("identity").build_config(vision_hidden_size=8, text_hidden_size=12)


def test_spec_of_an_alias_is_the_spec():
    assert projector_spec("deco") is projector_spec("avg_pool")


def test_the_readmes_example_conforms(tmp_path, scratch_registry):
    readme = (Path(__file__).parents[3] / "projectors" / "README.md").read_text()
    path = tmp_path / "blur.py"
    path.write_text(readme.split("```python\n")[1].split("```")[0])
    check_projector(f"{path}:Blur", {"window": 3}, trust_projector_code=True).raise_if_failed()


def test_entry_point_that_cannot_be_imported_is_explained(plug_in, monkeypatch):
    monkeypatch.setattr(
        importlib.metadata.entry_points(group="llava_saep.projectors")[0].__class__,
        "load",
        lambda self: importlib.import_module("no_such_lab"),
    )
    with pytest.raises(ProjectorError, match="blur_lab.blur:Blur.*no_such_lab"):
        select_projector("blur")


# Installed packages: folders as pip leaves them

LAB = '''
from projectors import Projector, ProjectorConfig, ProjectorPreset, option, register_projector
from dataclasses import dataclass

@dataclass(frozen=True, kw_only=True)
class LabConfig(ProjectorConfig):
    width: int = option(1, "a width", minimum=1)

    def num_output_tokens(self, grid):
        return grid.num_patches

@register_projector(
    "lab", config=LabConfig, summary="x", aliases=("lab_alias",), token_formula="H * W",
    presets={"lab_wide": ProjectorPreset({"width": 9}, "Wide.")},
    parse_spelling=lambda text: {"width": 5} if text == "lab5" else None,
)
class Lab(Projector):
    """A lab."""

@register_projector("lab_second", config=LabConfig, summary="x", token_formula="H * W")
class Second(Projector):
    """Registered by the same module, announced by no entry point."""
'''


@pytest.fixture
def install(tmp_path, scratch_registry, monkeypatch):
    """Put a package with entry points where Python finds it, as pip does: modules and a .dist-info folder."""
    monkeypatch.syspath_prepend(tmp_path)
    modules = set()

    def write(package, entry_points, source, version="0.1.0"):
        module = package.replace("-", "_")
        modules.add(module)
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        lines = [f"{name} = {value}" for name, value in entry_points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[llava_saep.projectors]", *lines]))
        importlib.invalidate_caches()

    yield write
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture
def lab(install):
    install("the-lab", {"lab": "the_lab:Lab"}, LAB)


@pytest.mark.parametrize(
    "spelling, name, options",
    [
        ("lab", "lab", {}),
        ("lab_alias", "lab", {}),
        ("lab_wide", "lab", {"width": 9}),
        ("lab5", "lab", {"width": 5}),
        ("lab_second", "lab_second", {}),
    ],
)
def test_all_that_a_plug_in_registers_is_found_without_asking_for_the_plug_in_first(lab, spelling, name, options):
    """Only `lab` is announced; for the others the packages are imported before the name is called unknown."""
    selection = select_projector(spelling)
    assert (selection.name, selection.provider, selection.options) == (name, "entry-point", options)


def test_known_names_do_not_import_plug_ins(lab):
    for spelling in ("saep", "deco", "mlp2x_gelu", "saep_dw_pw"):
        select_projector(spelling)
    assert "lab" in registered_projectors() and "lab_wide" not in registered_presets()
    assert "the_lab" not in sys.modules


def test_presets_of_plug_ins_are_listed_once_they_are_loaded(lab):
    assert load_plug_ins() == {}
    assert registered_presets()["lab_wide"].options == {"width": 9}
    assert {"lab", "lab_second"} <= set(registered_projectors())


@pytest.mark.parametrize("announced", ["lab_wide", "lab_alias"])
def test_a_package_may_announce_a_presets_or_aliass_name_too(install, announced):
    install("the-lab", {announced: "the_lab:Lab"}, LAB)
    assert select_projector(announced).name == "lab"
    assert announced not in registered_projectors()  # it is a preset or an alias, and listed as such


@pytest.mark.parametrize("name", ["lab", "lab_second"])
def test_a_checkpoint_of_a_plug_in_loads_in_a_fresh_process(lab, scratch_registry, monkeypatch, name):
    stored = json.loads(json.dumps(select_projector(name, {"width": 3}).to_dict()))
    expected = {"name": name, "provider": "entry-point", "options": {"width": 3}, "package": "the-lab 0.1.0"}
    assert stored == expected
    from projectors import _registry

    for names in (_registry._specs, _registry._aliases, _registry._presets):
        for key in [key for key in names if key.startswith("lab")]:
            del names[key]
    del sys.modules["the_lab"]
    assert ProjectorSelection.from_dict(stored).to_dict() == expected


@pytest.mark.parametrize("package", ["the-lab 0.1.0", ""])
def test_a_checkpoint_of_an_absent_plug_in_says_what_to_install(scratch_registry, package):
    stored = {"name": "lab", "provider": "entry-point", "options": {}} | ({"package": package} if package else {})
    with pytest.raises(ProjectorError) as error:
        ProjectorSelection.from_dict(stored)
    words = ("'lab'", "llava_saep.projectors", "the way it was installed before", package or "an installed package")
    assert all(word in str(error.value) for word in words), str(error.value)
    # Whoever owns that name on an index need not be who made the package.
    assert "pip install" not in str(error.value)


def test_a_checkpoint_of_a_broken_plug_in_names_it(install):
    install("the-lab", {"other": "the_lab:Lab"}, "import no_such_lab")
    with pytest.raises(ProjectorError, match=r"'lab' came from .*entry point 'other'.*the-lab 0.1.0.*no_such_lab"):
        ProjectorSelection.from_dict({"name": "lab", "provider": "entry-point", "options": {}})


@pytest.mark.parametrize("imported_first", ["the_lab:Lab", "lab", None])
def test_the_provider_is_what_was_named_whoever_imported_the_module_first(lab, imported_first):
    if imported_first is None:
        importlib.import_module("the_lab")
    else:
        select_projector(imported_first, trust_projector_code=True)
    by_name = select_projector("lab")
    by_class = select_projector("the_lab:Lab", trust_projector_code=True)
    assert (by_name.provider, by_class.provider) == ("entry-point", "the_lab:Lab")
    assert by_name.spec is by_class.spec
    assert "package" not in by_class.to_dict()
    assert ProjectorSelection.from_dict(by_name.to_dict()) == by_name
    assert ProjectorSelection.from_dict(by_class.to_dict(), trust_projector_code=True) == by_class
    with pytest.raises(ProjectorError, match="trust_projector_code"):
        ProjectorSelection.from_dict(by_class.to_dict())


BROKEN_PLUG_INS = {
    "import no_such_lab": "ModuleNotFoundError: No module named 'no_such_lab'",
    "x = (": "SyntaxError",
    "1 / 0": "ZeroDivisionError",
    "raise SystemExit(3)": "SystemExit",
    "pass": "AttributeError",  # the entry point names a class that is not there
    LAB.replace('"lab",', '"saep",'): "'saep' is already registered by projectors.saep:SAEP",
    LAB.replace('"lab",', '"elsewhere",'): "registers no projector 'lab'. It registers: elsewhere, lab_second",
    LAB + "\n1 / 0\n": "ZeroDivisionError",
}


@pytest.mark.parametrize("source, words", BROKEN_PLUG_INS.items(), ids=range(len(BROKEN_PLUG_INS)))
def test_a_broken_plug_in_is_named_and_disturbs_no_other(install, source, words):
    install("broken-lab", {"lab": "broken_lab:Lab"}, source)
    install("sound-lab", {"sound": "sound_lab:Lab"}, LAB.replace('"lab', '"sound').replace("lab5", "sound5"))
    assert {"lab", "sound", "saep"} <= set(registered_projectors())
    assert select_projector("sound_wide").options == {"width": 9}
    problems = load_plug_ins()
    assert list(problems) == ["lab"]
    assert all(word in str(problems["lab"]) for word in ("'lab' (broken_lab:Lab)", "broken-lab 0.1.0", words))
    with pytest.raises(ProjectorError) as error:
        select_projector("lab")
    assert words in str(error.value)
    with pytest.raises(ProjectorError) as error:
        select_projector("no_such_projector")  # which may be what the broken package would have offered
    assert "unknown projector" in str(error.value) and words in str(error.value)


def test_a_plug_in_whose_import_failed_leaves_nothing_behind(install, tmp_path):
    install("the-lab", {"lab": "the_lab:Lab"}, LAB + "\n1 / 0\n")
    with pytest.raises(ProjectorError):
        select_projector("lab")
    assert "lab_wide" not in registered_presets() and "lab_second" not in registered_projectors()
    (tmp_path / "the_lab.py").write_text(LAB)
    importlib.invalidate_caches()
    assert select_projector("lab_wide").options == {"width": 9}


def test_a_mended_file_may_be_named_again_in_the_same_process(own_file):
    own_file.write_text(OWN_FILE + "\nimport no_such_lab\n")
    with pytest.raises(ProjectorError, match="no_such_lab"):
        select_projector(f"{own_file}:Blur", trust_projector_code=True)
    own_file.write_text(OWN_FILE)
    assert select_projector(f"{own_file}:Blur", trust_projector_code=True).name == "blur"


def test_one_name_in_two_packages_is_refused_with_both(install):
    install("first-lab", {"lab": "first_lab:Lab"}, LAB)
    install("second-lab", {"lab": "second_lab:Lab"}, LAB, version="2.0")
    with pytest.raises(ProjectorError) as error:
        select_projector("lab")
    assert all(word in str(error.value) for word in ("first-lab 0.1.0", "second-lab 2.0", "uninstall"))
    assert select_projector("second_lab:Lab", trust_projector_code=True).name == "lab"
