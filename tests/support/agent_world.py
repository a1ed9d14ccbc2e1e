"""What an agent meets in a test: a coordinator that records, and an `ollama` program to start."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import psutil
from aiohttp import web

from ollama_coordinator_agent.assembly import assembled
from ollama_coordinator_agent.daemon import Daemon
from ollama_coordinator_agent.pacing import AgentPace
from ollama_coordinator_common.protocol import HealthReport, LogReport, RegisterRequest
from ollama_coordinator_common.settings import AgentConfig

from .deadline import DEADLINE_SECONDS

FAST = AgentPace(
    heartbeat=0.1, retry_first=0.02, retry_ceiling=0.1, rejected=0.1, first_look=2.0,
    look=0.02, tags=0.02, silence=0.5, stop=5.0, output=0.1,
    availability=0.02, start_after=0.0, adopted_start_after=0.0,
    restart_first=0.05, restart_ceiling=0.2,
)  # fmt: skip


class Report(HealthReport, frozen=True):
    """A heartbeat with its raw bodies; one that was left out is empty."""

    tags: msgspec.Raw = msgspec.Raw()
    ps: msgspec.Raw = msgspec.Raw()


class Coordinator:
    """Takes registrations and heartbeats on a real socket and keeps them."""

    def __init__(self, prefix: str = "", identity: str = "one") -> None:
        self.identity = identity
        self.registrations: list[RegisterRequest] = []
        self.asked_by: list[dict[str, str]] = []
        self.tokens: list[str | None] = []
        self.reports: list[Report] = []
        self.known: set[str] = set()
        self.answer: web.Response | None = None
        self.is_mute = False
        self.log_status: int | None = None
        self.problem: str | None = None
        self.asks_findings = False
        self.handshake = False
        self.logs: list[LogReport] = []
        self._prefix = prefix
        self._port = free_port()
        self._runner: web.AppRunner | None = None
        self._news = asyncio.Condition()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}{self._prefix}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post(f"{self._prefix}/api/agents", self._register)
        app.router.add_get(f"{self._prefix}/api/agents", self._list)
        app.router.add_get(f"{self._prefix}/healthz", self._healthz)
        app.router.add_post(f"{self._prefix}/api/health", self._health)
        app.router.add_post(f"{self._prefix}/api/agents/{{agent_id}}/log", self._log)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def until(self, happened: Callable[[Coordinator], bool]) -> None:
        """Wait for something to be true of what was received."""
        async with asyncio.timeout(DEADLINE_SECONDS), self._news:
            await self._news.wait_for(lambda: happened(self))

    async def next_report(self, wanted: Callable[[Report], bool]) -> Report:
        """The first report from now on that is as wanted."""
        seen = len(self.reports)
        await self.until(lambda self: any(wanted(report) for report in self.reports[seen:]))
        return next(report for report in self.reports[seen:] if wanted(report))

    async def _register(self, request: web.Request) -> web.StreamResponse:
        registration = msgspec.json.decode(await request.read(), type=RegisterRequest)
        self.tokens.append(request.headers.get("X-Api-Key"))
        await self._note(lambda: self.registrations.append(registration))
        if self.answer is not None:
            return _again(self.answer)
        agent_id = f"agent-{registration.ollama_port}"
        self.known.add(agent_id)
        can = {"handshake": True} if self.handshake else {}
        return web.json_response({"agent_id": agent_id, "status": "registered", **can}, status=201)

    async def _healthz(self, request: web.Request) -> web.StreamResponse:
        self.asked_by.append(dict(request.headers))
        return web.json_response({"status": "ok", "agents_online": 0, "id": self.identity})

    async def _list(self, request: web.Request) -> web.StreamResponse:
        now = datetime.now(UTC).isoformat()
        last = {f"agent-{seen.ollama_port}": seen for seen in self.registrations}
        rows = [
            {
                **msgspec.to_builtins(last[agent_id]),
                "id": agent_id,
                "status": "online",
                "registered_at": now,
                "last_seen": now,
            }
            for agent_id in self.known
        ]
        return web.json_response(rows)

    async def _health(self, request: web.Request) -> web.StreamResponse:
        report = msgspec.json.decode(await request.read(), type=Report)
        await self._note(lambda: self.reports.append(report))
        if self.is_mute:
            await asyncio.sleep(DEADLINE_SECONDS)
        if report.agent_id not in self.known:
            return web.json_response({"error": "no such agent"}, status=404)
        wanted = {} if self.log_status is None else {"log_after": 0}
        problem = {} if self.problem is None else {"problem": self.problem}
        asked = {"asks_findings": True} if self.asks_findings else {}
        can = {"handshake": True} if self.handshake else {}
        return web.json_response({"status": "ok", **wanted, **problem, **asked, **can})

    async def _log(self, request: web.Request) -> web.StreamResponse:
        report = msgspec.json.decode(await request.read(), type=LogReport)
        await self._note(lambda: self.logs.append(report))
        return web.json_response({"error": "as the test wants"}, status=self.log_status or 200)

    async def _note(self, change: Callable[[], None]) -> None:
        async with self._news:
            change()
            self._news.notify_all()


def _again(answer: web.Response) -> web.Response:
    """A response can be sent once; this is another one like it."""
    return web.Response(body=answer.body, status=answer.status, content_type=answer.content_type)


@asynccontextmanager
async def running(
    config: AgentConfig, environ: dict[str, str] | None = None, *, pace: AgentPace = FAST
) -> AsyncIterator[Daemon]:
    """An agent in this process, stopped as a signal would."""
    everything = {"PATH": os.environ.get("PATH", ""), **(environ or {})}
    async with (
        assembled(config, everything, pace=pace) as daemon,
        asyncio.TaskGroup() as tasks,
    ):
        task = tasks.create_task(daemon.run())
        yield daemon
        task.cancel()


async def eventually(is_so: Callable[[], object]) -> None:
    """Wait for something that tells nobody when it becomes so."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not is_so():
            await asyncio.sleep(0.01)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has collected yet counts."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


OLLAMA_PROGRAM = '''#!{python}
"""A program that is started as `ollama serve` is, and answers as one that has just started."""
import http.server, json, os, subprocess, sys

FOLDER = {folder!r}
BODIES = {{
    "/api/version": {{"version": "0.33.0"}},
    "/api/tags": {{"models": [{{"name": "m:latest", "model": "m:latest", "digest": "d" * 64}}]}},
    "/api/ps": {{"models": []}},
}}

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = json.dumps(BODIES[self.path]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        os._exit(3)
    def log_message(self, *args):
        pass

runner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(FOLDER + "/starts", "a") as starts:
    facts = {{"pid": os.getpid(), "runner": runner.pid, "argv": sys.argv[1:],
             "host": os.environ["OLLAMA_HOST"], "kept": os.environ.get("OLLAMA_KEEP_ALIVE")}}
    starts.write(json.dumps(facts) + "\\n")
print("listening", flush=True)
host, _, port = os.environ["OLLAMA_HOST"].rpartition(":")
http.server.ThreadingHTTPServer((host, int(port)), Handler).serve_forever()
'''


class Start(msgspec.Struct):
    """What one start of the program noted."""

    pid: int
    runner: int
    argv: list[str]
    host: str
    kept: str | None = None


class OllamaProgram:
    """An executable that stands for `ollama`, and the record of its starts."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "ollama"
        self._starts = folder / "starts"
        self.file.write_text(OLLAMA_PROGRAM.format(python=sys.executable, folder=str(folder)))
        self.file.chmod(0o755)

    @property
    def starts(self) -> list[Start]:
        if not self._starts.exists():
            return []
        lines = self._starts.read_bytes().splitlines()
        return [msgspec.json.decode(line, type=Start) for line in lines]


async def _main(url: str, port: str, folder: str) -> None:
    config = AgentConfig(
        coordinator_url=url, ollama_port=int(port), machine_name="desk", state_dir=Path(folder),
        manage_ollama=False, transport="direct",
    )  # fmt: skip
    async with running(config):
        await asyncio.Event().wait()


if __name__ == "__main__":  # an agent in a process of its own, with the pace of tests
    asyncio.run(_main(*sys.argv[1:]))
