"""Ollama's model names: `[scheme://][host/][namespace/]model[:tag]`, compared without case.

Two spellings of one model have one `key`; lists show the `short` form, as Ollama's own do.
The rules are those of Ollama's `types/model` package.
"""

import re

from msgspec import Struct

from .error import ConflictingSource, InvalidModelName

DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"
DEFAULT_TAG = "latest"

_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}")
_NAMESPACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")


class ModelName(Struct, frozen=True):
    """One parsed name, with Ollama's defaults filled in and its letter case kept."""

    host: str
    namespace: str
    model: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> "ModelName":
        """Parse `text` as Ollama does.

        A `:local` suffix only says where to run and is dropped; `model:tag:cloud` is the stub that
        Ollama stores as `model:tag-cloud`.

        Raises:
            InvalidModelName: a part is missing, too long or has a character it must not have.
            ConflictingSource: the name ends in two of `:local`, `:cloud` and `-cloud`.
        """
        head, slash, last = _without_source(text.strip()).rpartition("/")
        model, colon, tag = last.partition(":")
        host, inner_slash, namespace = head.rpartition("/")
        if "://" in host:
            host = host.partition("://")[2]
        name = cls(
            host=host if inner_slash else DEFAULT_HOST,
            namespace=namespace if slash else DEFAULT_NAMESPACE,
            model=model,
            tag=tag if colon else DEFAULT_TAG,
        )
        if not name._is_valid():
            raise InvalidModelName(text)
        return name

    def _is_valid(self) -> bool:
        return bool(
            _HOST.fullmatch(self.host)
            and _NAMESPACE.fullmatch(self.namespace)
            and _PART.fullmatch(self.model)
            and _PART.fullmatch(self.tag)
        )

    @property
    def key(self) -> str:
        """The same for every spelling of one model."""
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}".lower()

    @property
    def short(self) -> str:
        """The name as Ollama's lists show it: without the defaults, always with the tag."""
        name = f"{self.model}:{self.tag}"
        if self.host.lower() != DEFAULT_HOST:
            return f"{self.host}/{self.namespace}/{name}"
        if self.namespace.lower() != DEFAULT_NAMESPACE:
            return f"{self.namespace}/{name}"
        return name

    @property
    def runs_in_the_cloud(self) -> bool:
        """Whether ollama.com runs the model, and not an agent."""
        tag = self.tag.lower()
        return tag == "cloud" or tag.endswith("-cloud")


def _without_source(text: str) -> str:
    """The name with an explicit `:local` dropped and `x:tag:cloud` folded into `x:tag-cloud`."""
    base, source = _split_source(text)
    if source and _split_source(base)[1]:
        raise ConflictingSource(text)
    if source == ":local":
        return base
    has_tag = ":" in base.rpartition("/")[2]
    return f"{base}-cloud" if source == ":cloud" and has_tag else text


def _split_source(text: str) -> tuple[str, str]:
    """A name without its source, and the source: `:local`, `:cloud`, `-cloud` or nothing."""
    head, colon, suffix = text.rpartition(":")
    word = suffix.strip().lower()
    if colon and word in ("local", "cloud"):
        return head, f":{word}"
    if colon and "/" not in word and word.endswith("-cloud"):
        return text[: -len("-cloud")], "-cloud"
    return text, ""


def model_key(text: str) -> str:
    """The canonical routing key of a name as a client wrote it.

    Raises:
        InvalidModelName: see `ModelName.parse`.
    """
    return ModelName.parse(text).key


def is_name(text: str) -> bool:
    """Whether a model can have this name."""
    try:
        ModelName.parse(text)
    except InvalidModelName:
        return False
    return True
