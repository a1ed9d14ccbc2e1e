"""The control port: faults, gates and figures over HTTP, immune to everything it causes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from aiohttp import web

from .faults import Fault, Injected
from .node import Node
from .wire import encode


class _Hold(msgspec.Struct):
    what: Literal["tokens", "prompts", "loads", "unloads"] = "tokens"
    after: int = 0  # tokens: so many come first


class Control:
    """The routes are in the table below; what they take is `Fault` and `_Hold` as JSON."""

    def __init__(self, node: Node, host: str, port: int) -> None:
        self._node = node
        self._host = host
        self.port = port
        self._runner: web.ServerRunner | None = None
        self._routes = {
            ("GET", "/faults"): self._list,
            ("POST", "/faults"): self._inject,
            ("DELETE", "/faults"): self._clear,
            ("GET", "/seen"): self._seen,
            ("POST", "/reset"): self._reset,
            ("POST", "/hold"): self._hold,
            ("POST", "/release"): self._release,
        }

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self._host in ("0.0.0.0", "") else self._host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    async def start(self) -> None:
        """Stays up while the node is killed and started again."""
        if self._runner is not None:
            return
        runner = web.ServerRunner(web.Server(self._handle, access_log=None), shutdown_timeout=1.0)
        await runner.setup()
        site = web.TCPSite(runner, self._host, self.port)
        await site.start()
        self._runner = runner
        self.port = runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        action = self._routes.get((request.method, request.path))
        if action is None:
            known = sorted(f"{method} {path}" for method, path in self._routes)
            return _answer({"error": f"no such control route; there are {known}"}, 404)
        try:
            return _answer(action(await request.read(), request.query))
        except msgspec.ValidationError as exc:
            return _answer({"error": str(exc)}, 400)
        except msgspec.DecodeError as exc:
            return _answer({"error": f"not JSON: {exc}"}, 400)

    def _list(self, body: bytes, query: Mapping[str, str]) -> Any:
        return [_described(injected) for injected in self._node.faults]

    def _inject(self, body: bytes, query: Mapping[str, str]) -> Any:
        """One fault or a list of them."""
        wanted = msgspec.json.decode(body, type=Fault | list[Fault])
        for fault in wanted if isinstance(wanted, list) else [wanted]:
            self._node.faults.add(fault)
        return self._list(body, query)

    def _clear(self, body: bytes, query: Mapping[str, str]) -> Any:
        self._node.faults.clear()
        return []

    def _seen(self, body: bytes, query: Mapping[str, str]) -> Any:
        seen = self._node.seen
        shown = {
            **seen.figures(),
            "paths": dict(seen.counts),
            "loaded": [runner.model.name for runner in self._node.engine.loaded],
        }
        if "requests" in query:
            shown["requests"] = [record.summary() for record in seen.requests]
        return shown

    def _reset(self, body: bytes, query: Mapping[str, str]) -> Any:
        """Faults and gates gone, counters at zero; models stay loaded."""
        self._node.faults.clear()
        self._node.gate.release()
        self._node.seen.reset()
        return self._seen(body, query)

    def _hold(self, body: bytes, query: Mapping[str, str]) -> Any:
        wanted = msgspec.json.decode(body or b"{}", type=_Hold)
        gate = self._node.gate
        match wanted.what:
            case "tokens":
                gate.hold(wanted.after)
            case "prompts":
                gate.hold_prompts()
            case "loads":
                gate.hold_loads()
            case "unloads":
                gate.hold_unloads()
        return self._seen(body, query)

    def _release(self, body: bytes, query: Mapping[str, str]) -> Any:
        self._node.gate.release()
        return self._seen(body, query)


def _described(injected: Injected) -> dict[str, Any]:
    return {**msgspec.to_builtins(injected.fault), "hits": injected.hits}


def _answer(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=encode(value), status=status, content_type="application/json")
