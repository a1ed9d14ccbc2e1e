"""One version for the three distributions."""

import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

PACKAGES = Path(__file__).parents[2] / "packages"
NAMES = ("common", "coordinator", "agent")


def project(name: str) -> dict[str, Any]:
    text = (PACKAGES / name / "pyproject.toml").read_text("utf-8")
    settings: dict[str, Any] = tomllib.loads(text)["project"]
    return settings


def test_the_three_distributions_have_one_version() -> None:
    assert len({project(name)["version"] for name in NAMES}) == 1


def test_the_three_distributions_run_on_the_same_pythons() -> None:
    assert {project(name)["requires-python"] for name in NAMES} == {">=3.11"}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_installed_is_what_is_here(name: str) -> None:
    assert version(project(name)["name"]) == project(name)["version"]


@pytest.mark.parametrize("name", ["coordinator", "agent"])
def test_what_both_sides_share_is_taken_from_beside_and_not_from_an_index(name: str) -> None:
    shared = [need for need in project(name)["dependencies"] if "-common" in need]
    assert shared == ["ollama-coordinator-common @ {root:parent:uri}/common"]
