"""Puts the agent's wheels into the coordinator's: it gives them to the machines that join.

An editable installation has none, since its coordinator makes them of the checkout.
"""

import importlib.util
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

MODULE = Path("src") / "ollama_coordinator" / "agent_wheels.py"


def _module(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("agent_wheels", root / MODULE)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{root / MODULE} is missing")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class AgentWheels(BuildHookInterface):  # type: ignore[misc, type-arg, unused-ignore]
    """Adds the wheels to a wheel or to a source distribution, which then needs no siblings."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it builds; `version` is "editable" or "standard"."""
        module = _module(Path(self.root))
        if version == "editable":
            return
        wheels = module.agent_wheels()
        if not wheels:
            raise RuntimeError("the folders of agent and common are not beside the coordinator's")
        prefix = "src/ollama_coordinator" if self.target_name == "sdist" else "ollama_coordinator"
        self._folder = tempfile.TemporaryDirectory()
        for name, content in wheels.items():
            path = Path(self._folder.name) / name
            path.write_bytes(content)
            build_data["force_include"][str(path)] = f"{prefix}/{module.FOLDER}/{name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called once the distribution is written."""
        if version != "editable":
            self._folder.cleanup()
