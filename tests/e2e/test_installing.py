"""Each way to install a coordinator gives one that has the agent's wheels. It needs an index."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

PACKAGES = Path(__file__).parents[2] / "packages"
LOOK = "from ollama_coordinator.agent_wheels import agent_wheels; print(*agent_wheels())"


def _run(*words: object, **environ: str) -> str:
    done = subprocess.run(
        [str(word) for word in words],
        env={**os.environ, **environ},
        cwd=PACKAGES.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _pip(folder: Path, *what: object) -> Path:
    _run(sys.executable, "-m", "venv", folder / "venv")
    python = folder / "venv" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    _run(python, "-m", "pip", "install", "-q", "--no-deps", *what)
    return python


def checkout(folder: Path) -> Path:
    return _pip(folder, PACKAGES / "coordinator")


def editable(folder: Path) -> Path:
    return _pip(folder, "-e", PACKAGES / "coordinator")


def wheel(folder: Path) -> Path:
    """By way of a source distribution, as build tools do it."""
    _run("uv", "build", "-q", "--out-dir", folder / "dist", PACKAGES / "coordinator")
    return _pip(folder, *(folder / "dist").glob("*.whl"))


def uv_tool(folder: Path) -> Path:
    where = {"UV_TOOL_DIR": str(folder / "tools"), "UV_TOOL_BIN_DIR": str(folder / "bin")}
    _run("uv", "tool", "install", "-q", PACKAGES / "coordinator", **where)
    place = "Scripts/python.exe" if sys.platform == "win32" else "bin/python"
    return folder / "tools" / "ollama-coordinator" / place


@pytest.mark.spec("JOIN-3")
@pytest.mark.parametrize("way", [checkout, editable, uv_tool, wheel])
def test_the_coordinator_has_the_wheels(way: Callable[[Path], Path], tmp_path: Path) -> None:
    if way in (uv_tool, wheel) and shutil.which("uv") is None:
        pytest.skip("uv is not installed")
    found = _run(way(tmp_path), "-c", LOOK).split()
    assert [name.partition("-")[0] for name in sorted(found)] == [
        "ollama_coordinator_agent",
        "ollama_coordinator_common",
    ]
