"""The wheels with which a machine gets the agent of this very version, and pip for one without it.

The coordinator's wheel holds them, put there by `hatch_build.py`, which loads this file by its
path: so it imports nothing but the standard library. In a checkout they are made when asked for.

A wheel is a zip of the package, its metadata and a list of hashes (PyPA's binary distribution
format 1.0).
"""

import importlib.util
import io
import re
import tomllib
import zipfile
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

PACKAGES = ("agent", "common")
"""Folders beside the coordinator's own, in the order in which pip takes them."""

FOLDER = "wheels"
"""Where they lie inside the coordinator's package; the folder is there in an installation only."""

PIP = "pip.whl"
"""pip's own wheel; the name says no version, since its content is run and not installed."""

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[2]
"""The folder of the packages, where this file lies in one."""

BY_PATH = re.compile(r" @ \{root:parent:uri\}/common$")
TAG = "py3-none-any"


def agent_wheels() -> dict[str, bytes]:
    """The wheels of the agent and of what it needs of ours, by their file names.

    Empty where this installation has none.
    """
    kept = sorted((HERE / FOLDER).glob("*.whl"))
    if kept:
        return {path.name: path.read_bytes() for path in kept}
    projects = [CHECKOUT / name for name in PACKAGES]
    if not all((project / "pyproject.toml").is_file() for project in projects):
        return {}
    return dict(build_wheel(project) for project in projects)


def pip_wheel() -> bytes | None:
    """pip as one file that Python runs: the one bundled with Python, or the installed one."""
    bundled = importlib.util.find_spec("ensurepip")
    if bundled is not None and bundled.origin is not None:
        for path in sorted((Path(bundled.origin).parent / "_bundled").glob("pip-*.whl")):
            return path.read_bytes()
    installed = importlib.util.find_spec("pip")
    if installed is None or installed.origin is None:
        return None
    return _zip(_files(Path(installed.origin).parent))


def build_wheel(project: Path) -> tuple[str, bytes]:
    """The file name and the content of the wheel of a package that is pure Python.

    `common` is pinned by the version, since its path is this machine's.
    """
    facts: dict[str, Any] = tomllib.loads((project / "pyproject.toml").read_text("utf-8"))[
        "project"
    ]
    package, version = facts["name"].replace("-", "_"), facts["version"]
    info = f"{package}-{version}.dist-info"
    content = _files(project / "src" / package)
    needs = [BY_PATH.sub(f"=={version}", need) for need in facts["dependencies"]]
    metadata = [
        "Metadata-Version: 2.1",
        f"Name: {facts['name']}",
        f"Version: {version}",
        f"Summary: {facts['description']}",
        f"Requires-Python: {facts['requires-python']}",
        *(f"Requires-Dist: {need}" for need in needs),
    ]
    tag = ["Wheel-Version: 1.0", f"Generator: {facts['name']}", "Root-Is-Purelib: true"]
    content[f"{info}/METADATA"] = _lines(metadata)
    content[f"{info}/WHEEL"] = _lines([*tag, f"Tag: {TAG}"])
    content[f"{info}/licenses/LICENSE"] = (project / "LICENSE").read_bytes()
    if scripts := facts.get("scripts"):
        entries = [f"{name} = {target}" for name, target in scripts.items()]
        content[f"{info}/entry_points.txt"] = _lines(["[console_scripts]", *entries])
    record = [f"{name},{_hash(body)},{len(body)}" for name, body in content.items()]
    content[f"{info}/RECORD"] = _lines([*record, f"{info}/RECORD,,"])
    return f"{package}-{version}-{TAG}.whl", _zip(content)


def _files(package: Path) -> dict[str, bytes]:
    """Everything in a package by its path in a wheel, without what Python compiled."""
    found = (path for path in sorted(package.rglob("*")) if path.is_file())
    return {
        path.relative_to(package.parent).as_posix(): path.read_bytes()
        for path in found
        if "__pycache__" not in path.parts
    }


def _zip(content: Mapping[str, bytes]) -> bytes:
    """The same content always gives the same bytes: each file has the date 1980-01-01."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, body in content.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, body, zipfile.ZIP_DEFLATED)
    return written.getvalue()


def _lines(lines: list[str]) -> bytes:
    return "".join(line + "\n" for line in lines).encode()


def _hash(body: bytes) -> str:
    return "sha256=" + urlsafe_b64encode(sha256(body).digest()).rstrip(b"=").decode()
