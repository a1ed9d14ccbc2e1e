"""For how long hostile input holds the event loop, and what memory stays afterwards.

A coordinator runs as a process of its own, on asyncio's loop, with one stand-in and one agent whose
answers are hostile. The input: bodies of inference, heads, a body of each kind to every route that
takes one, queries to every route that takes none, and answers of an agent to all that it is asked.
Each is sent by several clients at once. Shown is the longest iteration of the loop, in milliseconds
of its own CPU time (other load of the machine does not count), all CPU time of the process, and its
resident memory afterwards. The bound is 50 ms (OPERATION-30); the exit code is 1 where an input
exceeds it. `nox -s holds`; `-- --copies 8` sends each input eight times at once.
"""

import argparse
import asyncio
import json
import re
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import aiohttp
import psutil
import zstandard

sys.path.insert(0, str(Path(__file__).parents[1]))

from ollama_coordinator.api.http.dialects import INFERENCE_ROUTES
from ollama_coordinator.api.routes import endpoints
from ollama_coordinator.app import create_app
from ollama_coordinator_common.settings import CoordinatorConfig
from support.ollama import StandIn
from support.programs import answers, free_port, program

MEBIBYTE = 1024 * 1024
CHAT, OPENAI = "/api/chat", "/v1/chat/completions"


def repeated(start: bytes, part: bytes, mebibytes: float, end: bytes) -> bytes:
    """A body with so many MiB of the same part."""
    return start + part * int(mebibytes * MEBIBYTE / len(part)) + end


def zstd(body: bytes) -> bytes:
    """Compressed."""
    return zstandard.ZstdCompressor().compress(body)


MESSAGES = b'{"model":"zz","messages":['
Input: TypeAlias = tuple[str, Callable[[], bytes], dict[str, str]]
"""A path (after a method, where it is not POST), a body, and headers."""

INPUTS: dict[str, Input] = {
    "zstd of [], in Model": (
        OPENAI,
        lambda: zstd(repeated(b'{"Model":"zz","messages":[', b"[],", 19.9, b"[]]}")),
        {"Content-Encoding": "zstd"},
    ),
    "60 MiB of {}": (CHAT, lambda: repeated(MESSAGES, b"{},", 60, b"{}]}"), {}),
    "4 MiB of {}": (CHAT, lambda: repeated(MESSAGES, b"{},", 2.8, b"{}]}"), {}),
    "256 KiB of {}": (CHAT, lambda: repeated(MESSAGES, b"{},", 0.24, b"{}]}"), {}),
    "60 MiB of texts": (CHAT, lambda: repeated(b'{"model":"zz","x":[', b'"",', 60, b'""]}'), {}),
    "60 MiB of numbers": (CHAT, lambda: repeated(b'{"model":"zz","x":[', b"1,", 60, b"1]}"), {}),
    "60 MiB of escapes": (
        CHAT,
        lambda: repeated(MESSAGES + b'{"content":"', b'\\"', 60, b'"}]}'),
        {},
    ),
    "60 MiB of blanks": (CHAT, lambda: repeated(b'{"model":"zz","x":[', b" ", 60, b"]}"), {}),
    "60 MiB of keys": (
        CHAT,
        lambda: b"{" + b",".join(b'"%x":0' % n for n in range(5_000_000)) + b"}",
        {},
    ),
    "256 KiB of Keys": (
        CHAT,
        lambda: b'{"Model":"zz"' + b"".join(b',"A%x":0' % n for n in range(9_000)) + b"}",
        {},
    ),
    "256 KiB of surrogates": (
        CHAT,
        lambda: repeated(b'{"Model":"zz","x":"', b"\\ud800", 0.24, b'"}'),
        {},
    ),
    "250 KiB of nested lists, bad end": (
        CHAT,
        lambda: repeated(b'{"Model":"zz","x":[', b"[" * 900 + b"]" * 900 + b",", 0.24, b"[] x"),
        {},
    ),
    "250 KiB of nested lists, surrogate": (
        CHAT,
        lambda: repeated(
            b'{"Model":"zz","y":"\\ud800","x":[', b"[[[[[[[[[[]]]]]]]]]],", 0.2, b"0]}"
        ),
        {},
    ),
    "250 KiB of digits": (CHAT, lambda: repeated(b'{"model":"zz","x":', b"9", 0.24, b"}"), {}),
    "create, 15 MiB of []": (
        "/api/create",
        lambda: repeated(b'{"model":"a","x":[', b"[],", 15, b"[]]}"),
        {},
    ),
    "copy, 15 MiB of []": (
        "/api/copy",
        lambda: repeated(b'{"source":"a","x":[', b"[],", 15, b"[]]}"),
        {},
    ),
    "form of 100,000 parts": (
        "/v1/audio/transcriptions",
        lambda: repeated(
            b"", b'--B\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n', 5, b"--B--\r\n"
        ),
        {"Content-Type": "multipart/form-data; boundary=B"},
    ),
    "60 MiB image, maxTokens": (
        CHAT,
        lambda: repeated(b'{"maxTokens":1,"model":"zz","images":["', b"A", 60, b'"]}'),
        {},
    ),
    "60 MiB image in a message": (
        CHAT,
        lambda: repeated(MESSAGES + b'{"images":["', b"A", 60, b'"]}]}'),
        {},
    ),
    "48 MiB chat, num_ctx raised": (
        CHAT,
        lambda: repeated(
            b'{"model":"llama3.2","options":{"num_ctx":2048},"messages":[{"content":"',
            b"word ",
            48,
            b'"}]}',
        ),
        {},
    ),
    "show, 15 MiB of []": ("/api/show", lambda: repeated(b'{"x":[', b"[],", 15, b"[]]}"), {}),
    "explain, 15 MiB of []": ("/api/explain", lambda: repeated(MESSAGES, b"[],", 15, b"[]]}"), {}),
    "agents, 15 MiB of []": ("/api/agents", lambda: repeated(b'{"x":[', b"[],", 15, b"[]]}"), {}),
    "health, 15 MiB of []": ("/api/health", lambda: repeated(b'{"x":[', b"[],", 15, b"[]]}"), {}),
    "form of 10 MiB of lines": (
        "/v1/audio/transcriptions",
        lambda: repeated(b"--B\r\nX: y\r\n\r\n", b"\r\n", 10, b"--B--\r\n"),
        {"Content-Type": "multipart/form-data; boundary=B"},
    ),
}


def nothing() -> bytes:
    """No body."""
    return b""


LONG = 60 * 1024
HEADS: dict[str, Input] = {
    f"head: {title}": (target, nothing, headers)
    for title, target, headers in (
        ("250 headers", "GET /api/tags", {f"x-{n}": "y" * 200 for n in range(250)}),
        ("10,000 headers", "GET /api/tags", {f"x-{n}": "" for n in range(10_000)}),
        ("a name of 60 KiB", "GET /api/tags", {"x" * LONG: ""}),
        ("cookies", "GET /api/tags", {"Cookie": "a=b;" * (LONG // 4)}),
        ("session cookies", "GET /api/tags", {"Cookie": "ollama_coordinator=b;" * 2900}),
        ("Basic", "GET /api/tags", {"Authorization": "Basic " + "QQ==" * (LONG // 4)}),
        ("Bearer", "GET /api/tags", {"Authorization": "Bearer " + "a.b:" * (LONG // 4)}),
        ("signature", "GET /api/tags", {"Authorization": "AAAA" * (LONG // 8) + ":" + "A" * 99}),
        ("x-forwarded-for", "GET /api/tags", {"X-Forwarded-For": "1.2.3.4," * (LONG // 8)}),
        ("forwarded", "GET /api/tags", {"Forwarded": "for=1.2.3.4;" * (LONG // 12)}),
        ("via", "GET /api/tags", {"X-Ollama-Coordinator-Via": "a," * (LONG // 2)}),
        ("origin", "GET /api/tags", {"Origin": "http://" + "a." * (LONG // 2)}),
        ("accept", "GET /dashboard", {"Accept-Encoding": "gzip;q=0.1," * (LONG // 11)}),
        ("host", "GET /join", {"Host": "a." * (LONG // 2)}),
        ("prefix", "GET /join", {"X-Forwarded-Prefix": "/a" * (LONG // 2)}),
        ("path of escapes", "GET /" + "%41" * (LONG // 3), {}),
        ("path of slashes", "GET " + "/" * LONG, {}),
        ("path of keys", "GET " + "/k/a" * (LONG // 4), {}),
        ("path of dots", "GET /dashboard" + "/.." * (LONG // 3), {}),
        ("model in a path", "GET /v1/models/" + "a:" * (LONG // 2), {}),
        ("alias in a path", "DELETE /api/aliases/" + "a/" * (LONG // 2), {}),
        ("websocket", "GET /api/agents/x/link", {"Upgrade": "websocket," * (LONG // 10)}),
    )
}


BODIES: dict[str, Callable[[], bytes]] = {
    "1 MiB of [],": lambda: repeated(b'{"x":[', b"[],", 0.99, b"[]]}"),
    "10,000 commas": lambda: b'{"x":[' + b"{}," * 9_990 + b"{}]}",
    "1 MiB of keys": lambda: b"{" + b",".join(b'"%087d":0' % n for n in range(9_990)) + b"}",
    "1 MiB of brackets": lambda: repeated(b'{"x":', b"[", 0.99, b""),
    "1 MiB of a text": lambda: repeated(b'{"model":"', b"\\u00e9", 0.99, b'","name":"x"}'),
    "16 MiB of pairs": lambda: repeated(b"key=a", b"&a=b", 15.9, b""),
    "17 MiB": lambda: repeated(b'{"x":"', b"A", 17, b'"}'),
}
"""Of each kind one, for every route that takes a body."""

FIELDS: dict[str, dict[str, Any]] = {
    "POST /api/keys": {"name": "n", "models": ["m*" * 50] * 9_000},
    "POST /api/aliases": {"name": "n", "models": ["m"] * 9_000},
    "POST /api/operations": {"kind": "pull", "model": "m" * 900_000},
    "POST /api/agents": {
        "machine_name": "m" * 900_000, "ip_address": "127.0.0.1", "ollama_version": "0.1.0",
        "ollama_port": 1,
    },
    "PATCH /api/agents/{agent_id}": {"labels": ["l" * 90] * 9_000},
    "PATCH /api/settings": {f"s{n}": n for n in range(9_000)},
    "POST /api/explain": {"model": "llama3.2", "messages": [{"content": "a"}] * 4_000},
    "POST /api/agents/{agent_id}/log": {"agent": ["x" * 90] * 9_000, "ollama": []},
}  # fmt: skip
"""What a route takes, and too much of it."""


def routes(agent_id: str) -> dict[str, Input]:
    """A hostile input of each kind to every route that is not inference's."""
    found: dict[str, Input] = {}
    parts = create_app(CoordinatorConfig(database_url="sqlite://:memory:")).state.parts
    inference = {one.path for one in INFERENCE_ROUTES}
    for one in endpoints(parts):
        path = re.sub(r"\{\w+(?::path)?\}", "x", one.path.replace("{agent_id}", agent_id))
        target, name = f"{one.method} {path}", f"{one.method} {one.path}"
        if one.method in ("POST", "PATCH", "DELETE") and one.path not in inference:
            for title, body in BODIES.items():
                found[f"{name}: {title}"] = (target, body, {})
            if name in FIELDS:
                whole = json.dumps(FIELDS[name]).encode()
                found[f"{name}: its fields"] = (target, partial(bytes, whole), {})
        elif one.method == "GET" and not one.path.endswith(("/link", "/events")):
            for title, pair in (("of fields", "a=b&"), ("of one", "agent=%C3%A9&model=a&since=1&")):
                query = pair * (LONG // len(pair))
                found[f"{name}: a query {title}"] = (f"{target}?{query}", nothing, {})
    missing = set(FIELDS) - {f"{one.method} {one.path}" for one in endpoints(parts)}
    assert not missing, missing
    return found


# ── an agent whose answers are hostile ────────────────────────────────────────────────────────


def listed(count: int, **more: Any) -> bytes:
    """A list of models, of which no two are alike."""
    details = {"family": "llama", "families": ["llama"], "parameter_size": "8B"}
    rows = [
        {"name": f"m{n}:latest", "model": f"m{n}:latest", "digest": f"{n:064x}", "size": n,
         "modified_at": "2026-01-01T00:00:00Z", "details": details, **more}
        for n in range(count)
    ]  # fmt: skip
    return json.dumps({"models": rows}).encode()


LINE = b'{"model":"bad","created_at":"2026-01-01T00:00:00Z","message":{"content":"a"}}\n'
END = b'{"model":"bad","done":true,"eval_count":1}\n'
ANSWERS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "tags: 1,000 models": ("/api/tags", lambda: listed(1_000)),
    "tags: 15,000 models": ("/api/tags", lambda: listed(15_000)),
    "tags: 3.9 MiB of [],": ("/api/tags", lambda: repeated(b'{"models":[', b"[],", 3.9, b"[]]}")),
    "tags: 3.9 MiB of {},": ("/api/tags", lambda: repeated(b'{"models":[', b"{},", 3.9, b"{}]}")),
    "tags: 3.9 MiB of details": (
        "/api/tags",
        lambda: repeated(b'{"models":[{"name":"a","details":{"x":[', b"1,", 3.9, b"1]}}]}"),
    ),
    "tags: a digest of 3.9 MiB": (
        "/api/tags",
        lambda: repeated(b'{"models":[{"name":"a","digest":"', b"a", 3.9, b'"}]}'),
    ),
    "ps: 1,000 models": ("/api/ps", lambda: listed(1_000, size_vram=1, context_length=1)),
    "ps: 1 MiB of [],": ("/api/ps", lambda: repeated(b'{"models":[', b"[],", 0.99, b"[]]}")),
    "version: 1 MiB": ("/api/version", lambda: repeated(b'{"version":"', b"1.", 0.99, b'"}')),
    "version: 1 MiB of [],": (
        "/api/version",
        lambda: repeated(b'{"version":"1","x":[', b"[],", 0.99, b"[]]}"),
    ),
    "show: 31 MiB of tensors": (
        "/api/show",
        lambda: repeated(b'{"tensors":[', b'{"name":"a","shape":[1]},', 31, b"{}]}"),
    ),
    "show: 31 MiB of a template": (
        "/api/show",
        lambda: repeated(b'{"template":"', b"\\n", 31, b'"}'),
    ),
    "show: 4 MiB of parameters": (
        "/api/show",
        lambda: repeated(b'{"parameters":"', b"num_ctx 1\\n", 4, b'"}'),
    ),
    "show: 4 MiB of FROM": (
        "/api/show",
        lambda: repeated(b'{"modelfile":"', b"FROM sha256-", 4, b'"}'),
    ),
    "chat: 60 MiB of records": ("/api/chat", lambda: repeated(b"", LINE, 60, END)),
    "chat: 15 MiB of line ends": ("/api/chat", lambda: repeated(b"", b"\n", 15, END)),
    "chat: a record of 60 MiB": (
        "/api/chat",
        lambda: repeated(b'{"message":{"content":"', b"\\n", 60, b'"},"done":true}\n'),
    ),
    "chat: a record of 16 MiB of [],": (
        "/api/chat",
        lambda: repeated(b'{"done":true,"context":[', b"[],", 16, b"[]]}\n"),
    ),
    "openai: 60 MiB of events": (
        OPENAI,
        lambda: repeated(
            b"", b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n', 60, b"data: [DONE]\n\n"
        ),
    ),
    "openai: 15 MiB of CRs": (OPENAI, lambda: repeated(b"data: {}", b"\r", 15, b"\n\n")),
    "openai: a last event of text": (
        OPENAI,
        lambda: repeated(b'data: {"choices":[', b'"text":"",', 1, b"1]}\n\ndata: [DONE]\n\n"),
    ),
    "embed: 15 MiB": (
        "/api/embed",
        lambda: repeated(b'{"embeddings":[[', b"0.12345,", 15, b'1]],"prompt_eval_count":1}'),
    ),
    "embed: 60 MiB": (
        "/api/embed",
        lambda: repeated(b'{"embeddings":[[', b"0.12345,", 60, b'1]],"prompt_eval_count":1}'),
    ),
    "pull: 60 MiB of progress": (
        "/api/pull",
        lambda: repeated(b"", b'{"status":"a","total":9,"completed":1}\n', 60, b""),
    ),
    "pull: a line of 60 MiB": ("/api/pull", lambda: repeated(b"", b"a", 60, b"")),
    "delete: 60 MiB": ("/api/delete", lambda: repeated(b"", b"a", 60, b"")),
    "error: 60 MiB": ("400 /api/chat", lambda: repeated(b'{"error":"', b"0x1 ", 60, b'"}')),
    "error: 1 MiB of [],": (
        "400 /api/chat",
        lambda: repeated(b'{"x":[', b"[],", 0.99, b'[]],"error":"a"}'),
    ),
    "error: 500": ("500 /api/chat", lambda: repeated(b'{"error":"', b"EO", 15, b'"}')),
    "blob: 60 MiB": ("/api/blobs", lambda: repeated(b"", b"a", 60, b"")),
}
"""What the hostile agent answers on one path (after a status, where that is not 200)."""

ASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "/api/tags": ("POST /api/agents", {}),
    "/api/ps": ("POST /api/agents", {}),
    "/api/version": ("POST /api/agents", {}),
    "/api/show": ("POST /api/show", {"model": "bad"}),
    "/api/chat": ("POST /api/chat", {"model": "bad", "messages": [{"content": "a"}]}),
    OPENAI: (f"POST {OPENAI}", {"model": "bad", "stream": True, "messages": [{"content": "a"}]}),
    "/api/embed": ("POST /api/embed", {"model": "bad", "input": "a"}),
    "/api/pull": ("POST /api/pull", {"model": "bad"}),
    "/api/delete": ("DELETE /api/delete", {"model": "bad"}),
    "/api/blobs": ("HEAD /api/blobs/sha256:" + "a" * 64, {}),
}
"""What makes the coordinator ask the agent on a path."""


KINDS = {
    "/api/chat": b"application/x-ndjson",
    "/api/pull": b"application/x-ndjson",
    OPENAI: b"text/event-stream",
}
"""The content types of what is streamed."""


class Hostile:
    """An agent's Ollama that has the model `bad`; `path` is answered with `body`."""

    def __init__(self) -> None:
        self.port = free_port()
        self.status, self.path, self.body = 200, "", b""
        self._usual = {
            "/api/version": b'{"version":"0.24.0"}',
            "/api/tags": listed(1).replace(b"m0:", b"bad:"),
            "/api/ps": b'{"models":[]}',
            "/api/show": b'{"capabilities":["completion"]}',
        }

    def answer(self, title: str) -> dict[str, Any]:
        """Answer so from now on; returns the request that makes the coordinator ask."""
        path, body = ANSWERS[title]
        status, _, self.path = path.rpartition(" ")
        self.status, self.body = int(status or 200), body()
        target, asked = ASKS[self.path]
        return {"target": target, "body": asked}

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = re.search(rb"(?i)content-length: (\d+)", head)
                await reader.readexactly(int(length[1]) if length else 0)
                path = head.split()[1].decode()
                is_bad = bool(self.path) and path.startswith(self.path)
                body = self.body if is_bad else self._usual.get(path, b"{}")
                status = self.status if is_bad else 200
                size = 0 if head.startswith(b"HEAD") else len(body)
                kind = KINDS.get(path, b"application/json")
                lines = (b"HTTP/1.1 %d OK" % status, b"Content-Type: %b" % kind)
                writer.writelines(line + b"\r\n" for line in lines)
                writer.write(b"Content-Length: %d\r\n\r\n" % size)
                writer.write(body[:size])
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


MEASURED = """
import asyncio.base_events, os, sys, time
from ollama_coordinator.main import app as main
path = sys.argv.pop(1)
once, longest = asyncio.base_events.BaseEventLoop._run_once, 0.0
def run_once(loop):
    global longest
    began = time.thread_time()
    once(loop)
    spent = time.thread_time() - began
    if spent > longest:
        longest = spent
        with open(path + ".new", "w") as file:
            file.write(str(longest))
        os.replace(path + ".new", path)
import signal
def forget(*_):
    global longest
    longest = 0.0
signal.signal(signal.SIGUSR1, forget)
asyncio.base_events.BaseEventLoop._run_once = run_once
sys.argv.append("serve")
sys.exit(main())
"""
"""A coordinator that writes the CPU seconds of its longest iteration into a file."""

SENDER = """
import http.client, sys, json
given, body = sys.stdin.buffer.readline(), sys.stdin.buffer.read()
host, method, path, headers = json.loads(given)
connection = http.client.HTTPConnection(host, timeout=120)
try:
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    if body or method not in ("GET", "HEAD"):
        connection.putheader("Content-Length", len(body))
    connection.endheaders()
    try:
        connection.send(body)
    except OSError:
        pass  # it was answered, and closed, before all of it was sent
    answer = connection.getresponse()
    print(answer.status)
    while answer.read(65536):
        pass
except (OSError, http.client.HTTPException):
    pass
"""


async def sent(url: str, target: str, body: bytes, headers: dict[str, str]) -> int:
    """The status of one answer, for a client that is a process of its own; 0: it was cut."""
    method, _, path = target.rpartition(" ")
    given = json.dumps([url.removeprefix("http://"), method or "POST", path, headers])
    sender = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SENDER),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await sender.communicate(given.encode() + b"\n" + body)
    return int(output or 0)


BOUND_MS = 50.0


async def measure(copies: int, only: str) -> bool:
    """Send every input and print a line for each; whether all kept to the bound."""
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        settings = {
            "COORDINATOR_HOST": "127.0.0.1",
            "COORDINATOR_PORT": str(port),
            "COORDINATOR_LOOP": "asyncio",
            "DATABASE_URL": f"sqlite:///{folder}/fleet.db",
        }
        longest = folder / "longest"
        command = (sys.executable, "-c", MEASURED, str(longest))
        hostile = Hostile()
        async with (
            StandIn() as ollama,
            await asyncio.start_server(hostile, "127.0.0.1", hostile.port, limit=2**20),
            program(folder / "log", *command, **settings) as running,
        ):
            url = f"http://127.0.0.1:{port}"
            await answers(url, running)
            agent_id = await register(url, "m", ollama.port)
            await register(url, "bad", hostile.port)
            await warm(url)
            process = psutil.Process(running.pid)
            print(f"{'input':60} {'status':>6} {'longest ms':>10} {'CPU s':>6} {'MiB after':>9}")
            inputs = {**INPUTS, **HEADS, **reports(agent_id), **routes(agent_id)}
            exceeded = []
            for title in [*inputs, *ANSWERS]:
                if only not in title:
                    continue
                if title in inputs:
                    target, body, headers = inputs[title]
                    whole = body()
                else:
                    asked = hostile.answer(title)
                    target, headers = asked["target"], {}
                    facts = facts_of("bad", hostile.port) if target == "POST /api/agents" else {}
                    whole = json.dumps({**asked["body"], **facts}).encode()
                before = sum(process.cpu_times()[:2])
                running.send(signal.SIGUSR1)
                longest.write_text("0")
                sending = [sent(url, target, whole, headers) for _ in range(copies)]
                statuses = await asyncio.gather(*sending)
                if title in ANSWERS:
                    await asyncio.sleep(0.3)  # it may be asked after it was answered
                    hostile.path = ""
                    await register(url, "bad", hostile.port)
                took = float(longest.read_text()) * 1000
                if took > BOUND_MS:
                    exceeded.append(title)
                print(
                    f"{title:60} {statuses[0]:6} {took:10.0f}"
                    f" {sum(process.cpu_times()[:2]) - before:6.1f}"
                    f" {process.memory_info().rss / MEBIBYTE:9.0f}",
                    flush=True,
                )
            print(f"over {BOUND_MS:g} ms: {', '.join(exceeded) or 'none'}")
            return not exceeded


def facts_of(name: str, port: int) -> dict[str, Any]:
    """The registration of a bare Ollama."""
    return {
        "machine_name": name,
        "ip_address": "127.0.0.1",
        "ollama_version": "0.24.0",
        "ollama_port": port,
    }


async def register(url: str, name: str, port: int) -> str:
    """Register a bare Ollama; returns the agent's id."""
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{url}/api/agents", json=facts_of(name, port)) as response:
            return str((await response.json())["agent_id"])


async def warm(url: str) -> None:
    """Have the stand-in's model in memory with a larger context."""
    body = {"model": "llama3.2", "prompt": "x", "options": {"num_ctx": 4096}}
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{url}/api/generate", json=body) as response:
            await response.read()


def reports(agent_id: str) -> dict[str, Input]:
    """Heartbeats of an agent with lists as long as they may be, and longer."""
    facts = {"agent_id": agent_id, "cpu_usage": 1, "memory_usage": 1, "active_requests": 0}

    def report(**more: Any) -> Callable[[], bytes]:
        return lambda: json.dumps({**facts, **more}).encode()

    found = {
        "1,000 models": report(tags=json.loads(listed(1_000)), ps=json.loads(listed(100))),
        "1,100 models": report(tags=json.loads(listed(1_100)), ps={"models": []}),
        "4 MiB of unknown": report(x="a" * 4_100_000),
        "20,000 commas": report(x=[1] * 19_990),
        "19,000 blobs": report(model_blobs={f"m{n}": "a" * 64 for n in range(19_000)}),
        "10,000 GPUs": report(gpus=[{"name": "G"}] * 10_000),
        "a version of 4 MiB": report(ollama_version="1." * 2_000_000),
        "notes of 4 MiB": report(machine_id="a" * 4_000_000),
    }
    return {f"heartbeat: {name}": ("/api/health", body, {}) for name, body in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    sys.exit(not asyncio.run(measure(options.copies, options.only)))
