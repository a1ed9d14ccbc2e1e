"""Model names as Ollama reads them: `host/namespace/model:tag`, defaults filled, case ignored."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"

Source = Literal["", "cloud", "local"]

_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}")
_NAMESPACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")


@dataclass(frozen=True)
class Name:
    """One parsed model name, every part filled."""

    host: str
    namespace: str
    model: str
    tag: str

    @property
    def canonical(self) -> str:
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}".lower()

    @property
    def path(self) -> str:
        """Where its manifest is, below the folder of all manifests."""
        return f"{self.host}/{self.namespace}/{self.model}/{self.tag}"

    @property
    def short(self) -> str:
        """What tags, ps and show print: defaults dropped, the tag always kept."""
        name = f"{self.model}:{self.tag}"
        if self.host.lower() != DEFAULT_HOST:
            return f"{self.host}/{self.namespace}/{name}"
        if self.namespace.lower() != DEFAULT_NAMESPACE:
            return f"{self.namespace}/{name}"
        return name


def parse(text: str) -> Name | None:
    """The name, or None where Ollama would say it is not one."""
    name = filled(text)
    return name if _valid(name) else None


def filled(text: str) -> Name:
    """The text in parts, the defaults in place of those that are not there; valid or not."""
    tag = "latest"
    if text.rfind(":") > text.rfind("/"):
        text, _, tag = text.rpartition(":")
    parts = text.rsplit("/", 2)
    host, namespace, model = [*[DEFAULT_HOST, DEFAULT_NAMESPACE][: 3 - len(parts)], *parts]
    return Name(host.partition("://")[2] or host, namespace, model, tag)


def _valid(name: Name) -> bool:
    return bool(
        _HOST.fullmatch(name.host)
        and _NAMESPACE.fullmatch(name.namespace)
        and _PART.fullmatch(name.model)
        and _PART.fullmatch(name.tag)
    )


def canonical(text: str) -> str:
    """The key two spellings of one model share; a name that is none is its own key."""
    name = parse(text)
    return name.canonical if name else text.lower()


def split_source(text: str) -> tuple[str, Source]:
    """Takes the `:local` suffix off and says where the model is to run; `x:tag:cloud` is a tag.

    Blanks around the name go too: the routes that look for a source trim, `parse` does not.
    """
    text = text.strip()
    lower = text.lower()
    if lower.endswith(":local"):
        return text[: -len(":local")], "local"
    if lower.endswith(":cloud"):
        base = text[: -len(":cloud")]
        return (f"{base}-cloud" if ":" in base.rpartition("/")[2] else text), "cloud"
    if ":" in lower and lower.endswith("-cloud"):
        return text, "cloud"
    return text, ""


def names_both_sources(text: str) -> bool:
    base, source = split_source(text)
    if source == "local":
        return split_source(base)[1] == "cloud"
    without = text.strip().lower().removesuffix(":cloud").removesuffix("-cloud")
    return source == "cloud" and without.endswith(":local")
