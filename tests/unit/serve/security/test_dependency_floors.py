"""Versions below which a dependency has a known hole are excluded by setup.cfg, and none of them is installed."""

import configparser
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

FLOORS = {"gradio": "6.20", "python-multipart": "0.0.18", "torch": "2.10"}
SETUP_CFG = Path(__file__).parents[4] / "setup.cfg"


@pytest.mark.parametrize(("name", "floor"), FLOORS.items())
def test_the_floor_is_declared_and_kept(name, floor):
    parser = configparser.ConfigParser()
    parser.read(SETUP_CFG)
    requirements = [Requirement(line) for line in parser["options"]["install_requires"].split("\n") if line.strip()]
    [requirement] = [one for one in requirements if one.name == name]
    major, _, last = floor.rpartition(".")
    assert requirement.specifier.contains(floor) and not requirement.specifier.contains(f"{major}.{int(last) - 1}")
    assert requirement.specifier.contains(version(name), prereleases=True)
