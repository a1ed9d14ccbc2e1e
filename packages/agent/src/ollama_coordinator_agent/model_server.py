"""The agent's own port: it gives away the files of its machine's models, and takes others' models.

Nothing is answered without a ticket of the coordinator, which is for one file, once. A file is
given away only if a manifest on disk names it. While Ollama answers requests, at most half of the
time is spent on giving files away.
"""

import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from ollama_coordinator_common.protocol import ModelStore
from ollama_coordinator_common.settings import AgentConfig
from ollama_coordinator_common.tickets import (
    DIGEST,
    PREFIX,
    READ,
    WRITE,
    TicketBook,
    WrongTicket,
)

from .client import CoordinatorClient
from .manifests import digests_of, manifest_of
from .model_writer import Incoming, ModelWriter, sweep
from .pacing import AgentPace, Reminder, forever
from .relay import BACKLOG
from .settings import models_address
from .state import StateFolder
from .watch import Watch

log = logging.getLogger(__name__)

PIECE_BYTES = 1024 * 1024
"""Read, sent and waited for at a time."""

YIELD_SECONDS = 0.01
"""The least pause between two pieces while Ollama answers requests: 100 MB/s at most."""

ORDER_BYTES = 16 * 1024 * 1024
"""The longest order to fetch a model: its manifest, of some kilobytes, and an address."""

SWEEP_SECONDS = 600.0
"""Between looks for temporary files of an agent that was killed."""

ANY_HOST, LOOPBACK_HOST = "", "127.0.0.1"


class ModelServer:
    """Serves what tickets are for; `is_busy`: whether Ollama answers requests now.

    `looked`: it is known whether models can be had from this machine, or written to it.
    """

    def __init__(
        self,
        config: AgentConfig,
        client: CoordinatorClient,
        watch: Watch,
        state: StateFolder,
        changed: asyncio.Event,
        pace: AgentPace,
    ) -> None:
        self.is_busy: Callable[[], bool] = lambda: False
        self.looked = asyncio.Event()
        self.port: int | None = None
        self._mode, self._host, self._wanted_port = models_address(config.models)
        self._client = client
        self._watch = watch
        self._state = state
        self._changed = changed
        self._pace = pace
        secret = state.secret()
        self._mode = self._mode if secret else "off"  # without one, anybody could sign tickets
        self._book = TicketBook(secret)
        self._writer = ModelWriter(client)
        self._open = asyncio.Event()
        self._listener: socket.socket | None = None
        self._reminder = Reminder()

    @property
    def target(self) -> tuple[str, int] | None:
        """Where this machine reaches it; `None` while it does not listen."""
        return None if self.port is None else (LOOPBACK_HOST, self.port)

    def store(self, *, linked: bool) -> ModelStore | UnsetType:
        """What heartbeats say of it; `linked`: the coordinator reaches this machine by a link."""
        if self.port is None:
            return UNSET
        access = self._watch.store_access
        return ModelStore(
            port=self._wanted_port if self._mode == "address" else self.port,
            clock=round(asyncio.get_running_loop().time(), 3),
            coordinator=self._client.url,
            host=self._host,
            direct=self._mode == "address" or (self._mode == "auto" and not linked),
            readable=access.readable,
            writable=access.writable,
            owns=sys.platform == "win32" or self._watch.owns_server,
        )

    async def run(self) -> None:
        """Listen once there are models to be read, or room to write; until cancelled."""
        if self._mode == "off":
            self.looked.set()
            return
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(forever(self._look))
            tasks.create_task(forever(self._sweep))
            await self._open.wait()
            server = web.Server(self._handle, handler_cancellation=True, access_log=None)
            runner = web.ServerRunner(server)
            await runner.setup()
            try:
                if self._listener is not None:
                    await web.SockSite(runner, self._listener, backlog=BACKLOG).start()
                await asyncio.Event().wait()
            finally:
                await runner.cleanup()

    async def _look(self) -> float:
        await self._watch.listed.wait()
        access = self._watch.store_access
        if self.port is None and (access.readable or access.writable):
            self._listen()
        self.looked.set()
        return self._pace.look

    async def _sweep(self) -> float:
        """Remove what a write that was cut long ago left behind."""
        await self._watch.listed.wait()
        if not self._watch.store_access.writable:
            return self._pace.tags
        for folder in self._watch.folders[:1]:
            try:
                removed = await asyncio.to_thread(sweep, folder, time.time())
            except OSError as exc:
                log.warning("temporary files stay", extra={"folder": folder, "reason": str(exc)})
                continue
            for name in removed:
                log.info("a temporary file of an earlier run is removed", extra={"file": name})
        return SWEEP_SECONDS

    def _listen(self) -> None:
        host = LOOPBACK_HOST if self._mode == "link" else ANY_HOST
        remembered = self._state.last_run.models_port or 0
        for port in dict.fromkeys((self._wanted_port or remembered, self._wanted_port)):
            try:
                self._listener = _bound(host, port)
            except OSError as exc:
                text = f"the port for models cannot be opened ({exc}); set AGENT_MODELS"
                self._reminder.warn(text)
                continue
            self.port = int(self._listener.getsockname()[1])
            self._state.remember(models_port=self.port)
            self._open.set()
            self._changed.set()
            log.info("models can be had by other machines", extra={"port": self.port})
            return

    # ── requests ──────────────────────────────────────────────────────────────────────────────

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        ticket, _, digest = request.path.removeprefix(PREFIX).partition("/")
        model = request.query.get("model", "")
        purposes = {"GET": READ, "POST": WRITE}
        is_ours = request.path.startswith(PREFIX) and request.method in purposes
        if not is_ours or DIGEST.fullmatch(digest) is None:
            return _refusal(404, "there is no such thing; this is the models' port of an agent")
        now = asyncio.get_running_loop().time()
        try:
            self._book.take(ticket, purposes[request.method], model, digest, now)
        except WrongTicket as exc:
            return _refusal(403, str(exc))
        if request.method == "POST":
            return await self._fetch(request, digest)
        return await self._give(request, model, digest)

    async def _give(self, request: web.BaseRequest, model: str, digest: str) -> web.StreamResponse:
        """A manifest, or a file that it names, or a range of it."""
        try:
            found = await asyncio.to_thread(find_file, self._watch.folders, model, digest)
            if isinstance(found, bytes):
                return web.Response(body=found, content_type="application/json")
            file = await asyncio.to_thread(found.open, "rb")
        except FileNotFoundError:
            return _refusal(404, f"this machine has no file {digest} of {model}")
        except OSError as exc:
            text = f"the agent may not read {digest} ({exc.strerror}); let it read Ollama's models"
            return _refusal(403, text)
        try:
            return await self._send(request, file)
        finally:
            file.close()

    async def _send(self, request: web.BaseRequest, file: BinaryIO) -> web.StreamResponse:
        size = os.fstat(file.fileno()).st_size
        try:
            wanted = request.http_range
            start, stop, _ = wanted.indices(size)
        except ValueError:
            return _refusal(416, "this range cannot be read")
        is_part = wanted.start is not None or wanted.stop is not None
        if is_part and start >= stop:
            return _refusal(416, f"the file has {size} bytes")
        response = web.StreamResponse(status=206 if is_part else 200)
        response.content_length = stop - start
        response.content_type = "application/octet-stream"
        response.headers["Accept-Ranges"] = "bytes"
        if is_part:
            response.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        await response.prepare(request)
        file.seek(start)
        loop = asyncio.get_running_loop()
        while start < stop:
            began = loop.time()
            piece = await asyncio.to_thread(file.read, min(PIECE_BYTES, stop - start))
            if not piece:
                break  # it was cut meanwhile: the receiver misses bytes and asks again
            await response.write(piece)
            start += len(piece)
            if self.is_busy():
                await asyncio.sleep(max(loop.time() - began, YIELD_SECONDS))
        return response

    async def _fetch(self, request: web.BaseRequest, digest: str) -> web.StreamResponse:
        """Fetch a model and keep it, with progress as Ollama reports it."""
        body = await request.content.read(ORDER_BYTES)
        while not request.content.at_eof() and len(body) < ORDER_BYTES:
            body += await request.content.read(ORDER_BYTES - len(body))
        try:
            order = msgspec.json.decode(body, type=Incoming)
        except msgspec.DecodeError as exc:
            return _refusal(400, f"this is no order: {exc}")
        folders = self._watch.folders
        if not (folders and self._watch.store_access.writable):
            return _refusal(403, "the agent may not write where this Ollama keeps its models")
        if f"sha256:{sha256(order.manifest).hexdigest()}" != digest:
            return _refusal(400, "the manifest is not the one that the ticket is for")
        response = web.StreamResponse()
        response.content_type = "application/x-ndjson"
        await response.prepare(request)
        async for line in self._writer.bring(folders[0], order):
            await response.write(msgspec.json.encode(line) + b"\n")
        return response


def find_file(folders: list[Path], model: str, digest: str) -> bytes | Path:
    """The manifest of a model, if it has this digest; or the file, if the manifest names it.

    Raises:
        FileNotFoundError: it is neither.
        OSError: it cannot be read.
    """
    hidden: OSError | None = None
    for folder in folders:
        try:
            content = manifest_of(folder, model)
        except FileNotFoundError:
            continue
        except OSError as exc:
            hidden = exc
            continue
        if f"sha256:{sha256(content).hexdigest()}" == digest:
            return content
        if digest in digests_of(content):
            return folder / "blobs" / digest.replace(":", "-")
    raise hidden or FileNotFoundError(model)


def _bound(host: str, port: int) -> socket.socket:
    if host == ANY_HOST and socket.has_dualstack_ipv6():
        return socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server((host, port))


def _refusal(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)
