"""A running coordinator as the command line sees it."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
import typer

from ollama_coordinator.access import key_in, secret_path
from ollama_coordinator.aio import OFF
from ollama_coordinator.db import files_beside
from ollama_coordinator_common.error import ConfigError, OllamaCoordinatorError
from ollama_coordinator_common.join_token import certificate_in
from ollama_coordinator_common.network import cause_of, coordinator_url, is_loopback
from ollama_coordinator_common.printable import all_printable, printable
from ollama_coordinator_common.settings import CoordinatorConfig

CONNECT_SECONDS = 5.0
"""How long a coordinator may take to accept; an answer may take any time."""

DATABASE = CoordinatorConfig().database_url

DEFAULT = "http://localhost:8080"
"""The coordinator of this machine on its default port."""

CoordinatorUrl = Annotated[
    str,
    typer.Option(
        "--url",
        "--coordinator",
        envvar="COORDINATOR_URL",
        metavar="URL",
        help="The coordinator to ask.",
        show_envvar=True,
    ),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--key-file",
        envvar="COORDINATOR_KEY_FILE",
        metavar="FILE",
        help="A file with the key to send.",
        show_envvar=True,
    ),
]
Certificate = Annotated[
    str,
    typer.Option(
        "--certificate",
        envvar="COORDINATOR_CERTIFICATE",
        metavar="SHA256",
        help="The SHA-256 of its own certificate; this machine's needs none.",
        show_envvar=True,
    ),
]
OwnTls = Annotated[str, typer.Option("--tls", envvar="COORDINATOR_TLS", hidden=True)]
"""The coordinator's own setting: how one on this machine is reached."""
DatabaseUrl = Annotated[str, typer.Option("--database-url", envvar="DATABASE_URL", hidden=True)]
"""The coordinator's own setting: beside its database is the proof of being on its machine."""

Json = Annotated[bool, typer.Option("--json", help="Print the API's own answer.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model's name.")]


class NoAnswer(OllamaCoordinatorError):
    """The coordinator cannot be reached, or refuses; says what to do about it."""


class Client:
    """Requests to the coordinator at `url`; `key` is sent with each, where there is one."""

    def __init__(self, url: str, session: aiohttp.ClientSession, key: str = "") -> None:
        self.url = url
        self._session = session
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def json(self, method: str, path: str, body: object = None) -> Any:
        """The JSON of an answer; `None` where it has no body.

        Raises:
            NoAnswer: nothing answers, or the answer is an error.
        """
        async with self.answer(method, path, body) as response:
            text = await response.read()
            return all_printable(msgspec.json.decode(text)) if text else None

    async def lines(self, path: str) -> AsyncIterator[dict[str, Any]]:
        """The objects of a stream of lines.

        Raises:
            NoAnswer: the stream broke off, or one of the objects is an error.
        """
        async with self.answer("GET", path) as response:
            try:
                async for text in response.content:
                    line: dict[str, Any] = all_printable(msgspec.json.decode(text))
                    if "error" in line:
                        raise NoAnswer(line["error"])
                    yield line
            except aiohttp.ClientError as exc:
                raise NoAnswer(f"the coordinator broke off: {exc}") from exc

    @asynccontextmanager
    async def answer(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer to a request; `more` is aiohttp's.

        Raises:
            NoAnswer: nothing answers, or the answer is an error.
        """
        data = None if body is None else msgspec.json.encode(body)
        try:
            response = await self._session.request(
                method,
                self.url + path,
                data=data,
                headers={**self._headers, **(headers or {})},
                **more,
            )
        except (aiohttp.ClientError, TimeoutError, ValueError) as exc:
            raise NoAnswer(
                f"no coordinator answers at {self.url} ({_reason(exc)}); "
                "start one, or give its address with --coordinator or COORDINATOR_URL"
            ) from exc
        async with response:
            if response.status == 401:
                raise NoAnswer(
                    "the coordinator asks for a key: give a file that has one with --key-file or "
                    "COORDINATOR_KEY_FILE, or run this on its machine with its DATABASE_URL"
                )
            if response.status >= 400:
                raise NoAnswer(_error_of(await response.read()) or f"status {response.status}")
            yield response


def _reason(exc: Exception) -> str:
    match exc:
        case aiohttp.ServerFingerprintMismatch():
            return "it has another certificate than COORDINATOR_CERTIFICATE"
        case aiohttp.ClientConnectorCertificateError():
            return f"{cause_of(exc)}; give the SHA-256 of its own certificate with --certificate"
        case aiohttp.ServerDisconnectedError():
            return "it hung up: check http against https"
        case _:
            return cause_of(exc)


def _error_of(body: bytes) -> str:
    try:
        error = msgspec.json.decode(body, type=dict[str, Any]).get("error")
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body.decode(errors="replace").strip()
    return error if isinstance(error, str) else ""


def asks(command: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Make a coroutine a command: options that all have replace its first parameter, a `Client`."""
    own = list(inspect.signature(command).parameters.values())[1:]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    options = [
        inspect.Parameter("coordinator", kind, default=DEFAULT, annotation=CoordinatorUrl),
        inspect.Parameter("key_file", kind, default=None, annotation=KeyFile),
        inspect.Parameter("database_url", kind, default=DATABASE, annotation=DatabaseUrl),
        inspect.Parameter("certificate", kind, default="", annotation=Certificate),
        inspect.Parameter("tls", kind, default=OFF, annotation=OwnTls),
    ]

    @wraps(command)
    def run(
        coordinator: str,
        key_file: Path | None,
        database_url: str,
        certificate: str,
        tls: str,
        **values: Any,
    ) -> None:
        async def work() -> None:
            url = url_of(coordinator, tls)
            key = _key(url, key_file, database_url)
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
            connector = aiohttp.TCPConnector(ssl=_believed(url, certificate))
            async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
                await command(Client(url, session, key), **values)

        finished(work(), json=bool(values.get("json")))

    # Typer reads a command's options from its signature.
    signature = inspect.Signature([*own, *options])
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return run


def url_of(text: str, tls: str = OFF) -> str:
    """The coordinator that a person means; `tls` is the setting of the one on this machine.

    Raises:
        NoAnswer: the text is no URL.
    """
    if text == DEFAULT and tls.lower() != OFF:
        text = text.replace("http:", "https:")
    try:
        return coordinator_url(text)
    except ValueError as exc:
        raise NoAnswer(f"'{text}' is no coordinator: {exc}") from exc


def _believed(url: str, certificate: str) -> aiohttp.Fingerprint | bool:
    """Which certificates are believed: one, any on this machine, or those the system trusts.

    Raises:
        NoAnswer: the text is no certificate's SHA-256.
    """
    try:
        digits = certificate_in(certificate)
    except ValueError as exc:
        raise NoAnswer(f"COORDINATOR_CERTIFICATE: {exc}") from exc
    if digits:
        return aiohttp.Fingerprint(bytes.fromhex(digits))
    return not is_loopback(urlsplit(url).hostname or "")


def _key(url: str, key_file: Path | None, database_url: str) -> str:
    """The key to send: that of the file, or the secret of a coordinator on this machine.

    Raises:
        NoAnswer: the file cannot be read.
    """
    if key_file is not None:
        try:
            return key_in(key_file)
        except ConfigError as exc:
            raise NoAnswer(str(exc)) from exc
    try:
        secret = secret_path(files_beside(database_url))
    except ConfigError:
        return ""
    if secret is None or not is_loopback(urlsplit(url).hostname or ""):
        return ""  # the secret is for this machine's eyes alone
    try:
        return secret.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def finished(work: Coroutine[Any, Any, None], *, json: bool = False) -> None:
    """Run a command; an error is one sentence and exit code 1, Ctrl-C is exit code 130.

    `json`: an error is an object on the standard output too, for what reads that.
    """
    try:
        asyncio.run(work)
    except NoAnswer as exc:
        if json:
            typer.echo(msgspec.json.encode({"error": str(exc)}))
        typer.echo(f"Error: {printable(str(exc))}", err=True)
        raise typer.Exit(1) from exc
    except KeyboardInterrupt as exc:
        raise typer.Exit(130) from exc
