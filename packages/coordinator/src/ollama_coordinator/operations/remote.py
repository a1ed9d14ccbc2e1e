"""One command on one agent's Ollama: the request, its progress lines, and its success."""

from collections.abc import AsyncIterator, Callable
from math import inf

import aiohttp
import msgspec

from ollama_coordinator.clock import Clock
from ollama_coordinator.registry import AgentState
from ollama_coordinator.upstream import Cut, Unreachable, Upstreams, chunks, whole

from .progress import ProgressLine
from .types import AgentCommand, MissingBlob, OperationKind, Refused
from .uploads import Uploads

JSON = [("content-type", "application/json")]
QUICK = (OperationKind.COPY, OperationKind.DELETE, OperationKind.UNLOAD)
QUICK_SECONDS = 30.0
"""Time limit of commands that touch a few files, or answer at once."""

LONGEST_LINE_BYTES = 1024 * 1024
"""A line of progress has some hundred bytes; one without end must not fill the memory."""

_line = msgspec.json.Decoder(dict[str, object])


class Remote:
    """Sends commands to agents; `uploads` has the files that they need."""

    def __init__(self, upstreams: Upstreams, uploads: Uploads, clock: Clock) -> None:
        self._upstreams = upstreams
        self._clock = clock
        self.uploads = uploads

    async def do(
        self, agent: AgentState, command: AgentCommand, report: Callable[[ProgressLine], None]
    ) -> None:
        """One attempt; `report` gets every line of progress but the last.

        Raises:
            Refused: the Ollama answered with an error.
            UpstreamError: the answer broke off, or there was none.
        """
        for digest in command.blobs:
            await self._send_blob(agent, digest)
        try:
            async with self._clock.timeout(QUICK_SECONDS if command.kind in QUICK else inf):
                await self._request(agent, command, report)
        except TimeoutError as exc:
            raise Unreachable(f"no answer within {QUICK_SECONDS:g} s") from exc

    async def _request(
        self, agent: AgentState, command: AgentCommand, report: Callable[[ProgressLine], None]
    ) -> None:
        async with self._upstreams.open(
            command.method, agent.url + command.path, headers=JSON, body=command.body.encode()
        ) as response:
            if response.status >= 400:
                await _refuse(response, command)
            elif command.kind.streams:
                await _follow(response, report)
            else:
                async for _ in chunks(response):
                    pass

    async def order(self, url: str, body: bytes, report: Callable[[ProgressLine], None]) -> None:
        """Have an agent itself do something that it reports on as Ollama does.

        Raises:
            Refused: the agent answered with an error.
            UpstreamError: the answer broke off, or there was none.
        """
        async with self._upstreams.open("POST", url, headers=JSON, body=body) as response:
            if response.status >= 400:
                raise Refused(response.status, await _text_of(response))
            await _follow(response, report)

    async def _send_blob(self, agent: AgentState, digest: str) -> None:
        """Upload a file to an agent that does not have it yet."""
        url = f"{agent.url}/api/blobs/{digest}"
        async with self._upstreams.open("HEAD", url) as response:
            if response.status == 200:
                return
        size = self.uploads.size(digest)
        if size is None:
            raise MissingBlob(agent.name, digest)
        headers = [("content-type", "application/octet-stream"), ("content-length", str(size))]
        body = self.uploads.read(digest)
        async with self._upstreams.open("POST", url, headers=headers, stream=body) as response:
            if response.status >= 400:
                raise Refused(response.status, await _text_of(response))


async def _follow(response: aiohttp.ClientResponse, report: Callable[[ProgressLine], None]) -> None:
    async for line in _lines(response):
        error = line.get("error")
        if error is not None:
            raise Refused(500, error if isinstance(error, str) else str(error))
        if line.get("status") == "success":
            return
        report(line)
    raise Cut("ended its progress without a success")


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[ProgressLine]:
    rest = b""
    async for chunk in chunks(response):
        *whole, rest = (rest + chunk).split(b"\n")
        if len(rest) > LONGEST_LINE_BYTES:
            raise Cut("sends a line of progress without end")
        for text in whole:
            if text.strip():
                yield _decoded(text)
    if rest.strip():
        yield _decoded(rest)


def _decoded(text: bytes) -> ProgressLine:
    try:
        return _line.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise Cut("sends progress that is not JSON") from exc


async def _refuse(response: aiohttp.ClientResponse, command: AgentCommand) -> None:
    text = await _text_of(response)
    if response.status == 404 and command.kind in (OperationKind.DELETE, OperationKind.UNLOAD):
        return  # the model is gone already
    raise Refused(response.status, text or f"answers {command.path} with status {response.status}")


async def _text_of(response: aiohttp.ClientResponse) -> str:
    body = await whole(response, LONGEST_LINE_BYTES)
    try:
        error = _line.decode(body).get("error")
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body.decode(errors="replace").strip()[:500]
    return error if isinstance(error, str) else ""
