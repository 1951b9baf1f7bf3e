"""Vision-language projectors: from hidden states of a vision tower to tokens of a language model.

Needs torch alone. A projector is one plain file of this folder (or of yours) that registers a config and a module;
`projectors/README.md` shows how to write one and `projectors.conformance` checks it.
"""

from ._base import PatchGrid, Projector, ProjectorConfig
from ._checkpoint import gathered_parameters, initialize_projector, load_projector_state_dict
from ._errors import ProjectorError
from ._options import OptionInfo, describe_options, option, parse_projector_options
from ._registry import (
    ProjectorPreset,
    ProjectorSelection,
    ProjectorSpec,
    load_plug_ins,
    projector_spec,
    register_projector,
    registered_presets,
    registered_projectors,
    select_projector,
)

__all__ = [
    "OptionInfo",
    "PatchGrid",
    "Projector",
    "ProjectorConfig",
    "ProjectorError",
    "ProjectorPreset",
    "ProjectorSelection",
    "ProjectorSpec",
    "describe_options",
    "gathered_parameters",
    "initialize_projector",
    "load_plug_ins",
    "load_projector_state_dict",
    "option",
    "parse_projector_options",
    "projector_spec",
    "register_projector",
    "registered_presets",
    "registered_projectors",
    "select_projector",
]
