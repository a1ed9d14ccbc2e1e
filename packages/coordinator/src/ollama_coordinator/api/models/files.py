"""The coordinator as a registry of its agents' models: manifests, and where their files are had.

The routes are those of a registry of models (the OCI distribution specification), as far as a stock
Ollama uses them. With the namespace of a transfer they need no key; a caller without one needs the
right to use models.
"""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import Receive, Scope, Send

from ollama_coordinator.access import Right, caller_of
from ollama_coordinator.api.http.body_timeout import until_disconnect
from ollama_coordinator.api.http.dialects import Dialect
from ollama_coordinator.api.http.errors import ClientLeft, HttpError, send_error
from ollama_coordinator.api.http.openapi import Media, operation
from ollama_coordinator.operations import FileWay, Transfer
from ollama_coordinator.parts import Parts
from ollama_coordinator.registry import AgentState
from ollama_coordinator.upstream import Cut, Unreachable, Upstreams, chunks
from ollama_coordinator_common.names import ModelName
from ollama_coordinator_common.tickets import DIGEST, other_name

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
BINARY = "application/octet-stream"

PIECE = "part"
"""In the query of a URL to which a file's is redirected: pieces are asked for there."""

MOST_PIECES, MOST_OF_ONE = 64, 16
"""Pieces that pass through at a time for callers without a ticket, and for one of them: a stock
Ollama asks for 16 at once."""

_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{0,18})")


class FilesApi:
    """The handlers of `/v2`."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._transfers = parts.transfers
        self._usage = parts.access.usage
        self._turns = PieceTurns()

    @operation(gives={200: Media("application/json", dict[str, str])}, errors=(401, 403))
    async def root(self, request: Request) -> Response:
        """Whether the coordinator is a registry of models: it is."""
        return Response(b"{}", media_type="application/json")

    @operation(gives={200: Media(MANIFEST)}, errors=(400, 401, 403, 404))
    async def manifest(self, request: Request) -> Response:
        """The manifest of a model, byte for byte as a machine of the fleet has it."""
        transfer = self._transfers.find(request.path_params["namespace"])
        if transfer is None:
            name = self._name(request, request.path_params["tag"])
            with self._usage.admitted(caller_of(request.scope), 0, 0):
                transfer = await self._transfers.publish(name)
        if transfer is None or not _names(request, transfer):
            raise HttpError(404, "no machine of the fleet can give this model away")
        headers = {"docker-content-digest": transfer.digest}
        return Response(transfer.manifest, headers=headers, media_type=MANIFEST)

    @operation(
        gives={200: Media(BINARY), 206: Media(BINARY), 307: None}, errors=(400, 401, 403, 404, 503)
    )
    async def file(self, request: Request) -> Response:
        """A file of a model: a redirect to a machine that has it, or the file through here.

        A stock Ollama wants a redirect to another host name first, and asks for pieces there: that
        is another name of this coordinator, which can so name another machine for each of them.
        """
        digest = request.path_params["digest"].replace("-", ":", 1)
        transfer = await self._transfer(request, digest)
        size = transfer.files.get(digest)
        if size is None:
            raise HttpError(404, "this model has no such file")
        headers = {"docker-content-digest": digest, "accept-ranges": "bytes"}
        if request.method == "HEAD":
            headers["content-length"] = str(size)
            return Response(headers=headers, media_type=BINARY)
        if PIECE not in request.query_params:
            host = other_name(request.headers.get("host", ""))
            url = f"{request.url.scheme}://{host}{request.url.path}?{PIECE}=1"
            return RedirectResponse(url, 307)
        asked = request.headers.get("range", "")
        match = _RANGE.fullmatch(asked)
        if asked and match is None:
            asked = ""  # RFC 9110, section 14.2: what is not understood is passed over
        async with AsyncExitStack() as held:
            if transfer.receiver is None:
                await self._wait(request, held)
            way = self._transfers.way(transfer, digest, match[2] if match else "")
            if way is None:
                raise HttpError(503, "no machine of the fleet could give this file")
            if way.direct:
                return RedirectResponse(way.url, 307)
            failed = partial(self._transfers.note_failed, transfer, digest, way.agent)
            return PassedFile(self._parts.upstreams, way, asked, failed, held.pop_all())

    async def _wait(self, request: Request, held: AsyncExitStack) -> None:
        """Wait until a caller without a ticket may have a piece; `held` until that has passed.

        Raises:
            Denied: 429, a limit of the caller is reached.
            ClientLeft: it has.
        """
        caller = caller_of(request.scope)
        held.enter_context(self._usage.admitted(caller, 0, 0))
        async with until_disconnect(request.scope, request.receive):
            await held.enter_async_context(self._turns.turn(caller.name))

    async def _transfer(self, request: Request, digest: str) -> Transfer:
        """What is asked for with a ticket, or without.

        Raises:
            HttpError: 404, nothing.
            Denied: the caller has no ticket, and may not use models either.
        """
        found = self._transfers.find(request.path_params["namespace"])
        if found is None and DIGEST.fullmatch(digest):
            repository = self._name(request, "latest").key.rpartition(":")[0]
            found = self._transfers.published(repository, digest)
            if found is None:
                with self._usage.admitted(caller_of(request.scope), 0, 0):
                    found = await self._published(repository, digest)
        if found is None or not _names(request, found):
            raise HttpError(404, "no machine of the fleet can give this file away")
        return found

    async def _published(self, repository: str, digest: str) -> Transfer | None:
        """The model of a repository that has a file, by asking machines that have the model."""
        found = None
        for key in list(self._parts.registry.models):
            if key.rpartition(":")[0] == repository:
                shown = await self._transfers.publish(ModelName.parse(key))
                found = shown if shown is not None and digest in shown.files else found
        return found

    def _name(self, request: Request, tag: str) -> ModelName:
        """The model that a caller without a ticket asks for, if it may.

        Raises:
            Denied: it may not use this model.
        """
        self._parts.access.admit(request.scope, Right.USE)
        path = request.path_params
        name = ModelName.parse(f"{path['namespace']}/{path['model']}:{tag}")
        caller_of(request.scope).check_model(name.short)
        return name


def _names(request: Request, transfer: Transfer) -> bool:
    return bool(request.path_params["model"].lower() == transfer.name.model.lower())


class PassedFile(Response):
    """A file of an agent, or a piece of it, passed on as it comes; else `failed` is called.

    What is `held` for it ends with it.
    """

    def __init__(
        self,
        upstreams: Upstreams,
        way: FileWay,
        asked: str,
        failed: Callable[[], None],
        held: AsyncExitStack,
    ) -> None:
        super().__init__()
        self._upstreams = upstreams
        self._failed = failed
        self._held = held
        self._agent: AgentState = way.agent
        self._url = way.url
        self._asked = [("Range", asked)] if asked else []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; where the agent's answer breaks off, so does this one."""
        try:
            async with (
                self._held,
                until_disconnect(scope, receive),
                self._upstreams.open("GET", self._url, headers=self._asked) as response,
            ):
                if response.status not in (200, 206):
                    self._failed()
                    text = f"agent {self._agent.name} does not give this file away"
                    await send_error(send, Dialect.NATIVE, HttpError(503, text))
                    return
                names = ("content-length", "content-range", "content-type")
                given = [(name, response.headers.get(name)) for name in names]
                headers = [(k.encode(), v.encode()) for k, v in given if v is not None]
                status = response.status
                await send({"type": "http.response.start", "status": status, "headers": headers})
                async for chunk in chunks(response):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except Unreachable as exc:
            self._failed()
            await send_error(send, Dialect.NATIVE, exc)
        except (Cut, ClientLeft):
            return


class PieceTurns:
    """Whose piece passes through next: that of the client with the fewest under way."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Wait until a client may have one more; it has it as long as the block runs."""
        mine = client, asyncio.get_running_loop().create_future()
        self._waiting.append(mine)
        self._grant()
        try:
            await mine[1]
            yield
        finally:
            if mine in self._waiting:
                self._waiting.remove(mine)
            else:
                self._open[client] -= 1
                self._open += Counter()  # without those that have none
            self._grant()

    def _grant(self) -> None:
        while self._waiting and self._open.total() < MOST_PIECES:
            one = min(self._waiting, key=lambda one: self._open[one[0]])
            if self._open[one[0]] >= MOST_OF_ONE:
                return
            self._waiting.remove(one)
            self._open[one[0]] += 1
            if not one[1].done():  # else it has just left, and gives back what it got
                one[1].set_result(None)
