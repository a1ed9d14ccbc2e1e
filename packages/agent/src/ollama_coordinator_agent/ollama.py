"""The local Ollama: what it answers over HTTP, and what the environment of its process says.

Ollama's API has none of its settings; names and defaults of its variables are those of its
`envconfig` package.
"""

import re
import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec
import psutil

from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.network import LOOPBACK, cause_of, is_ours, netloc, parse_address
from ollama_coordinator_common.types import RunnerSettings

T = TypeVar("T")

DEFAULT_MAX_QUEUE = 512
"""Ollama's own default of OLLAMA_MAX_QUEUE."""

LEARNED_SLOTS = (0, 10)
"""Before it the number of slots is learned: up to 0.9.6 an unset OLLAMA_NUM_PARALLEL means "as many
as fit", later it means one."""


class Presence(Enum):
    """What a look at Ollama's port finds."""

    ABSENT = "not running"
    """Nothing listens on it."""

    SILENT = "not answering"
    """It is open, but there is no whole answer: Ollama starts, or is stuck."""

    FOREIGN = "another program has its port"
    ANSWERING = "running"


class OllamaError(OllamaCoordinatorError):
    """The local Ollama did not answer as it should; `presence` is what that means."""

    def __init__(self, presence: Presence, text: str) -> None:
        super().__init__(text)
        self.presence = presence


class Version(msgspec.Struct):
    """The body of `GET /api/version`."""

    version: str


class ModelRow(msgspec.Struct):
    """One model of a list: the fields whose change is news to the coordinator."""

    name: str
    digest: str = ""
    context_length: int | None = None
    size_vram: int = 0


class ModelRows(msgspec.Struct):
    """The body of `GET /api/tags` and `GET /api/ps`, as far as we read it."""

    models: list[ModelRow] | None = None


class ModelList(msgspec.Struct, frozen=True):
    """One body of `/api/tags` or `/api/ps`, byte for byte, and (name, digest, context) of each.

    Only a change of `models` is news: the expiry in `/api/ps` moves with every request.
    `gpu_bytes` is what they take of a GPU's memory.
    """

    body: bytes
    models: tuple[tuple[str, str, int | None], ...] = ()
    gpu_bytes: int = 0

    @property
    def names(self) -> list[str]:
        """The models' names, in Ollama's order."""
        return [name for name, _, _ in self.models]


NOTHING_LOADED = ModelList(b'{"models":[]}')


class Ollama:
    """Asks the Ollama at `host:port` of this machine; every call raises `OllamaError` alone."""

    def __init__(
        self, session: aiohttp.ClientSession, host: str, port: int, *, timeout_seconds: float = 5.0
    ) -> None:
        self.port = port
        self.url = f"http://{netloc(host, port)}"
        self._session = session
        self._seconds = timeout_seconds
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)

    async def version(self) -> str:
        """Ollama's version; it takes no lock for that, so that a busy server answers too."""
        return self._decode(await self._get("/api/version"), Version).version

    async def tags(self) -> ModelList:
        """The models on disk."""
        return await self._list("/api/tags")

    async def ps(self) -> ModelList:
        """The models in memory."""
        return await self._list("/api/ps")

    async def _list(self, path: str) -> ModelList:
        body = await self._get(path)
        rows = self._decode(body, ModelRows).models or []
        models = tuple((row.name, row.digest, row.context_length) for row in rows)
        return ModelList(body, models, sum(row.size_vram for row in rows))

    async def _get(self, path: str) -> bytes:
        try:
            async with self._session.get(
                self.url + path, timeout=self._timeout, allow_redirects=False
            ) as response:
                body = await response.read()
        except aiohttp.ClientConnectorError as exc:
            refused = isinstance(exc.os_error, ConnectionRefusedError)
            text = f"nothing listens at {self.url}"
            if not refused:
                text = f"{self.url} cannot be reached: {cause_of(exc)}"
            raise OllamaError(Presence.ABSENT, text) from exc
        except TimeoutError as exc:
            text = f"{self.url} takes the connection and does not answer within {self._seconds:g} s"
            raise OllamaError(Presence.SILENT, text) from exc
        except aiohttp.ServerDisconnectedError as exc:
            text = f"{self.url} ends the connection without an answer"
            raise OllamaError(Presence.SILENT, text) from exc
        except (aiohttp.ClientError, OSError) as exc:
            text = f"{self.url} does not answer: {cause_of(exc)}"
            raise OllamaError(Presence.SILENT, text) from exc
        if response.status >= 500:
            raise OllamaError(Presence.SILENT, f"{self.url}{path} answers {response.status}")
        if response.status != 200:
            raise OllamaError(
                Presence.FOREIGN, f"{self.url}{path} answers {response.status}, as no Ollama does"
            )
        return body

    def _decode(self, body: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.DecodeError as exc:
            raise OllamaError(
                Presence.FOREIGN, f"what {self.url} answers is not an Ollama's"
            ) from exc


def environment_of_listener(port: int) -> dict[str, str] | None:
    """The environment of the process that listens on a port, if this user may read it."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status != psutil.CONN_LISTEN or not connection.laddr:
                continue
            if connection.laddr.port == port and connection.pid:
                return psutil.Process(connection.pid).environ()
    except (psutil.Error, OSError):
        return None
    return None


def runner_settings(environ: Mapping[str, str], version: str | None) -> RunnerSettings:
    """How a server with this environment runs its models; what it chooses itself is `None`."""
    fallback = None if is_older(version, LEARNED_SLOTS) else 1
    return RunnerSettings(
        num_parallel=_number(environ, "OLLAMA_NUM_PARALLEL") or fallback,
        max_loaded_models=_number(environ, "OLLAMA_MAX_LOADED_MODELS"),
        max_queue=_number(environ, "OLLAMA_MAX_QUEUE") or DEFAULT_MAX_QUEUE,
        context_length=_number(environ, "OLLAMA_CONTEXT_LENGTH"),
    )


def _number(environ: Mapping[str, str], variable: str) -> int | None:
    """A positive number; Ollama takes 0 and what it cannot parse as "decide for me"."""
    text = environ.get(variable, "").strip().strip("\"'")
    return int(text) or None if re.fullmatch(r"[0-9]{1,9}", text) else None


def is_older(version: str | None, than: tuple[int, int]) -> bool:
    """Whether a release is older; development builds and unknown versions are not."""
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    if numbers is None:
        return False
    found = (int(numbers[1]), int(numbers[2]))
    return (0, 0) < found < than  # development builds say 0.0.0


def model_folders(environ: Mapping[str, str]) -> list[Path]:
    """Where a server with this environment may keep its models, likeliest first."""
    if configured := environ.get("OLLAMA_MODELS", "").strip().strip("\"'"):
        return [Path(configured)]
    home = environ.get("USERPROFILE" if sys.platform == "win32" else "HOME")
    folders = [Path(home) / ".ollama" / "models"] if home else []
    if sys.platform == "linux":  # the home of the user that install.sh makes
        folders.append(Path("/usr/share/ollama/.ollama/models"))
    return folders


def serve_host(environ: Mapping[str, str]) -> str:
    """The host that a server of ours binds: that of OLLAMA_HOST if it is this machine's.

    OLLAMA_HOST is also the address that the `ollama` command asks, often the coordinator's. In that
    case, and where it is not set, the server binds to loopback.
    """
    text = environ.get("OLLAMA_HOST", "").strip().strip("\"'")
    try:
        host = urlsplit(text if "://" in text else f"//{text}").hostname or ""
    except ValueError:
        return LOOPBACK
    return host if _is_ours(host) else LOOPBACK


def ollama_host(environ: Mapping[str, str]) -> str:
    """The host under which this machine's Ollama is reached from this machine."""
    bound = serve_host(environ)
    address = parse_address(bound)
    return LOOPBACK if address is None or address.is_unspecified else bound


def _is_ours(host: str) -> bool:
    address = parse_address(host)
    return address is not None and is_ours(address)
