"""Ollama's versions, compared by their numbers."""

from collections.abc import Iterable

UNKNOWN = "0.0.0"
"""What a development build of Ollama reports; clients draw no conclusion from it."""


def version_key(version: str) -> tuple[list[int], str]:
    """What sorts versions; a release candidate counts as its release."""
    numbers = version.strip().lstrip("v").partition("-")[0].split(".")
    return [int(number) if number.isdecimal() else 0 for number in numbers], version


def lowest(versions: Iterable[str]) -> str | None:
    """The lowest of the versions that say something."""
    known = [version for version in versions if version not in (UNKNOWN, "")]
    return min(known, key=version_key, default=None)


def is_older(version: str, than: str) -> bool:
    """Whether a known version is older than another."""
    return version not in (UNKNOWN, "") and version_key(version)[0] < version_key(than)[0]
