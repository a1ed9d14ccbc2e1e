"""The HTTP surface of the local Ollama: is it there, which version, which models.

OllamaError
├── OllamaAbsent   nothing listens on the port
├── OllamaSilent   the port is open but there is no (whole) answer: starting, or stuck
└── NotOllama      something else answers there
"""

from enum import Enum
from typing import TypeVar

import aiohttp
import msgspec

from ollama_coordinator_common.error import OllamaCoordinatorError

T = TypeVar("T")


class Presence(Enum):
    """What a look at Ollama's port finds."""

    ABSENT = "not running"
    SILENT = "not answering"
    FOREIGN = "another program has its port"
    ANSWERING = "running"


class OllamaError(OllamaCoordinatorError):
    """The local Ollama did not give what was asked."""

    presence = Presence.SILENT


class OllamaAbsent(OllamaError):
    """Nothing listens on the port."""

    presence = Presence.ABSENT


class OllamaSilent(OllamaError):
    """The port is open, but there is no whole answer."""


class NotOllama(OllamaError):
    """Something answers that is not an Ollama."""

    presence = Presence.FOREIGN


class Version(msgspec.Struct):
    """The body of `GET /api/version`."""

    version: str


class Row(msgspec.Struct):
    """What makes one model of an inventory differ from another."""

    name: str
    digest: str = ""
    context_length: int | None = None


class Rows(msgspec.Struct):
    """The body of `GET /api/tags` and `GET /api/ps`, as far as a change of it matters."""

    models: list[Row] | None = None


class Inventory(msgspec.Struct, frozen=True):
    """One inventory body, untouched, and what must differ for the coordinator to be told."""

    body: bytes
    models: tuple[tuple[str, str, int | None], ...] = ()

    @property
    def names(self) -> list[str]:
        """The models' names, in Ollama's order."""
        return [name for name, _, _ in self.models]


NOTHING_LOADED = Inventory(b'{"models":[]}')


class Ollama:
    """Asks the Ollama at `url`; every call raises `OllamaError` and nothing else."""

    def __init__(
        self, session: aiohttp.ClientSession, url: str, *, timeout_seconds: float = 5.0
    ) -> None:
        self.url = url
        self._session = session
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)

    async def version(self) -> str:
        """Ollama's version; takes no lock there, so that a busy server answers too."""
        return self._decode(await self._get("/api/version"), Version).version

    async def tags(self) -> Inventory:
        """The models on disk."""
        return await self._inventory("/api/tags")

    async def ps(self) -> Inventory:
        """The models in memory; their expiry moves with every request and is no change."""
        return await self._inventory("/api/ps")

    async def _inventory(self, path: str) -> Inventory:
        body = await self._get(path)
        rows = self._decode(body, Rows).models or []
        return Inventory(body, tuple((row.name, row.digest, row.context_length) for row in rows))

    async def _get(self, path: str) -> bytes:
        try:
            async with self._session.get(
                self.url + path, timeout=self._timeout, allow_redirects=False
            ) as response:
                body = await response.read()
        except aiohttp.ClientConnectorError as exc:
            raise OllamaAbsent(f"nothing listens at {self.url}") from exc
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            raise OllamaSilent(f"{self.url} does not answer: {exc!r}") from exc
        if response.status >= 500:
            raise OllamaSilent(f"{self.url}{path} answers {response.status}")
        if response.status != 200:
            raise NotOllama(f"{self.url}{path} answers {response.status}, as no Ollama does")
        return body

    def _decode(self, body: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.DecodeError as exc:
            raise NotOllama(f"what {self.url} answers is not an Ollama's") from exc
