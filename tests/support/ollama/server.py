"""The stand-in as tests hold it: a node, its port, and the life and death of both."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Literal, Self

from aiohttp import StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.web_protocol import RequestHandler

from support.deadline import DEADLINE_SECONDS

from . import access
from .control import Control
from .exchange import EndEarly, Exchange, Garbled, Severed
from .faults import Faults
from .gojson import BadBody
from .hardware import Hardware
from .listener import Listener, Mode, ResetOnAccept, sever
from .models import Model, Store
from .node import Node, Settings
from .routes import Handler, find, not_allowed, unclean
from .seen import Outcome, Record, Seen
from .wire import ApiError, StreamError

NO_BODY_LIMIT = 2**62


class StandIn:
    """One Ollama node on a port of its own.

    Keyword arguments beyond those named are the fields of `node.Settings` (slots, keep_alive,
    max_queue, version, answer, ...).
    """

    def __init__(
        self,
        models: Iterable[Model | str] = ("llama3.2:latest",),
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        control_port: int | None = None,
        hardware: Hardware | None = None,
        registry: Iterable[Model] = (),
        seed: int = 0,
        **settings: Any,
    ) -> None:
        self.host = host
        self.settings = Settings(**settings)
        self.faults = Faults(seed=seed, on_change=self._faults_changed)
        self.node = Node.build(
            self.settings,
            hardware or Hardware(),
            [Model(model) if isinstance(model, str) else model for model in models],
            registry,
            self.faults,
        )
        self.node.audible.set()
        self.control = Control(self.node, host, control_port) if control_port is not None else None
        self._listener = Listener(host, port, self._connection)
        self._web: web.Server | None = None
        self._exchanges: dict[asyncio.Task[Any], Exchange] = {}
        self._dead = True

    # What it is

    @property
    def port(self) -> int:
        return self._listener.port

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.host in ("0.0.0.0", "") else self.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def seen(self) -> Seen:
        return self.node.seen

    @property
    def models(self) -> Store:
        """What is on disk; `add` and `remove` work while it runs."""
        return self.node.store

    @property
    def loaded(self) -> list[str]:
        return [runner.model.name for runner in self.node.engine.loaded]

    # Its life

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Starts it, or starts it again on the same port: disk as before, memory empty."""
        self._dead = False
        self._web = web.Server(
            self._handle,
            request_factory=self._request,
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            lingering_time=0.5,  # for what is still being sent when the answer is out, as Go
            max_line_size=65_536,
            max_field_size=1_048_576,
        )
        try:
            await self._listener.open()
            if self.control is not None:
                await self.control.start()
        except OSError:  # a port that is taken
            await self.stop()
            raise
        self._faults_changed()

    async def kill(self, how: Literal["rst", "fin"] = "fin") -> None:
        """The end of the process, as SIGTERM or the OOM killer bring it: everything is cut."""
        self._dead = True
        await self._listener.close()
        if self._web is None:
            return
        while connections := self._web.connections:
            for connection in connections:
                sever(connection.transport, how, flush=False)
            if running := list(self._exchanges):
                await asyncio.wait(running, timeout=DEADLINE_SECONDS)
            await asyncio.sleep(0)
        await self._web.shutdown(1.0)
        await self.node.engine.close()
        self._web = None

    async def stop(self) -> None:
        """Ends it for good, control port included."""
        await self.kill()
        self.faults.clear()
        self.release()
        if self.control is not None:
            await self.control.stop()

    async def load(self, name: str, *, keep_alive: float | None = None) -> None:
        """Brings a model into memory, as a request with an empty prompt does."""
        model = self.models.find(name)
        if model is None:
            raise LookupError(f"{name!r} is not on this node's disk: add it to `models`")
        engine = self.node.engine
        async with engine.runner(model, engine.settings(model, {}), keep_alive):
            pass

    # Its brakes

    def hold(self, after: int = 0) -> None:
        """Every generation waits before its token number `after` (0: the first) until released."""
        self.node.gate.hold(after)

    def hold_prompts(self) -> None:
        """Every evaluation of a prompt stays unfinished, also one whose client leaves."""
        self.node.gate.hold_prompts()

    def hold_loads(self) -> None:
        self.node.gate.hold_loads()

    def hold_unloads(self) -> None:
        """What is unloaded stays listed as loaded."""
        self.node.gate.hold_unloads()

    def release(self) -> None:
        self.node.gate.release()

    # Its connections

    def _connection(self) -> asyncio.Protocol:
        self.seen.connections += 1
        self.seen.changed()
        if self._dead or self._web is None or self.faults.pick(("reset_on_accept",)):
            return ResetOnAccept()
        return self._web()

    def _request(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: RequestHandler,
        writer: AbstractStreamWriter,
        task: asyncio.Task[None],
    ) -> web.BaseRequest:
        loop = asyncio.get_running_loop()
        return web.BaseRequest(
            message, payload, protocol, writer, task, loop, client_max_size=NO_BODY_LIMIT
        )

    def _faults_changed(self) -> None:
        hole, refused = self.faults.in_force("black_hole"), self.faults.in_force("refuse")
        if hole:
            self.node.audible.clear()
        else:
            self.node.audible.set()
        if self._dead:
            return
        mode: Mode = "hole" if hole else "closed" if refused else "open"
        self._listener.apply(mode)
        if refused and not hole:
            self._drop_idle_connections()

    def _drop_idle_connections(self) -> None:
        busy = {exchange.request.transport for exchange in self._exchanges.values()}
        for connection in self._web.connections if self._web else ():
            if connection.transport not in busy:
                sever(connection.transport, "fin")

    # Its requests

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        now = asyncio.get_running_loop().time
        record = Record(request.method, request.path, request.headers, now())
        exchange = Exchange(self.node, request, record)
        task = asyncio.current_task()
        assert task is not None
        self._exchanges[task] = exchange
        self.seen.begin(record)
        outcome: Outcome = "failed"
        try:
            response = await self._answered(exchange)
            outcome = "failed" if response.status >= 500 else "completed"
            return response
        except Severed as cut:
            sever(request.transport, cut.how)
            return await self._until_cancelled()
        except ConnectionError:  # the client left while we were writing
            outcome = "cancelled"
            return await self._until_cancelled()
        except asyncio.CancelledError:
            if not self._dead:
                outcome = "cancelled"
            raise
        finally:
            del self._exchanges[task]
            self.seen.end(record, outcome, now())

    async def _answered(self, exchange: Exchange) -> web.StreamResponse:
        response = await self._answer(exchange)
        await self.node.audible.wait()
        exchange.record.status = response.status
        await response.prepare(exchange.request)
        await response.write_eof()
        return response

    async def _answer(self, exchange: Exchange) -> web.StreamResponse:
        await self.node.audible.wait()
        if starting := self.faults.pick(("slow_start",), exchange.path):
            await exchange.parked(starting)
        if answer := unclean(exchange) or self._refusal(exchange):
            return answer
        try:
            route = find(exchange)
            if route.reads_body:
                await exchange.read()
            return await exchange.before_answer() or await self._handled(exchange, route.handler)
        except Garbled:
            return exchange.text('{"', content_type="application/json")
        except StreamError as exc:
            return exchange.error(exc.status, str(exc))
        except ApiError as exc:
            return exchange.refusal(exc)
        except BadBody as exc:
            return exchange.refusal(ApiError(400, str(exc), early=True))

    async def _handled(self, exchange: Exchange, handler: Handler) -> web.StreamResponse:
        answer = await handler(exchange)
        if exchange.troubled:  # a stream's fault on a route that does not stream
            with contextlib.suppress(EndEarly):
                await exchange.ending()
        return answer

    def _refusal(self, exchange: Exchange) -> web.StreamResponse | None:
        """The answer to a request from where Ollama does not want any, or to a preflight."""
        headers = exchange.request.headers
        origin, host = headers.get("Origin"), headers.get("Host", "")
        if origin:
            if not access.origin_allowed(origin, host, self.settings.origins):
                return exchange.nothing(403)
            if exchange.request.method == "OPTIONS":
                exchange.cors = access.preflight_headers(origin)
                if find(exchange).handler is not_allowed:
                    exchange.cors["Allow"] = exchange.argument
                return exchange.nothing(204)
            exchange.cors = access.cors_headers(origin)
        if access.is_loopback(self.host) and not access.host_allowed(host):
            return exchange.nothing(403)
        return None

    async def _until_cancelled(self) -> web.StreamResponse:
        """aiohttp cancels a handler whose connection was cut; the time only bounds a mistake."""
        await asyncio.sleep(DEADLINE_SECONDS)
        raise ConnectionResetError("the connection was cut, its handler was not cancelled")
