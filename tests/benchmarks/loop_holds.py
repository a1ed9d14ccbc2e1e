"""For how long hostile requests hold the event loop, and what memory stays afterwards.

A coordinator runs as a process of its own, on asyncio's loop, with one stand-in; each input is sent
by several clients at once. Shown is the longest iteration of the loop, in milliseconds of its own
CPU time (other load of the machine does not count), all CPU time of the process, and its resident
memory afterwards. The bound is 50 ms (OPERATION-30). `nox -s holds`; `-- --copies 8` sends each
input eight times at once.
"""

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import aiohttp
import psutil
import zstandard

sys.path.insert(0, str(Path(__file__).parents[1]))

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
INPUTS: dict[str, tuple[str, Callable[[], bytes], dict[str, str]]] = {
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
host, path, headers = sys.argv[1:]
connection = http.client.HTTPConnection(host)
connection.request("POST", path, sys.stdin.buffer.read(), json.loads(headers))
print(connection.getresponse().status)
"""


async def sent(url: str, path: str, body: bytes, headers: dict[str, str]) -> int:
    """The status of one answer, for a client that is a process of its own."""
    host = url.removeprefix("http://")
    sender = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SENDER, host, path, json.dumps(headers)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await sender.communicate(body)
    return int(output or 0)


async def measure(copies: int, only: str) -> None:
    """Send every input and print a line for each."""
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        settings = {
            "COORDINATOR_HOST": "127.0.0.1",
            "COORDINATOR_PORT": str(port),
            "COORDINATOR_LOOP": "asyncio",
            "DATABASE_URL": "sqlite://:memory:",
        }
        longest = folder / "longest"
        command = (sys.executable, "-c", MEASURED, str(longest))
        async with StandIn() as ollama, program(folder / "log", *command, **settings) as running:
            url = f"http://127.0.0.1:{port}"
            await answers(url, running)
            await register(url, ollama)
            process = psutil.Process(running.pid)
            print(f"{'input':35} {'status':>6} {'longest ms':>10} {'CPU s':>6} {'MiB after':>9}")
            for title, (path, body, headers) in INPUTS.items():
                if only not in title:
                    continue
                whole, before = body(), sum(process.cpu_times()[:2])
                running.send(signal.SIGUSR1)
                longest.write_text("0")
                asked = [sent(url, path, whole, headers) for _ in range(copies)]
                statuses = await asyncio.gather(*asked)
                print(
                    f"{title:35} {statuses[0]:6} {float(longest.read_text()) * 1000:10.0f}"
                    f" {sum(process.cpu_times()[:2]) - before:6.1f}"
                    f" {process.memory_info().rss / MEBIBYTE:9.0f}",
                    flush=True,
                )


async def register(url: str, ollama: StandIn) -> None:
    """Make the stand-in the only agent; its model has a larger context in memory."""
    facts = {
        "machine_name": "m",
        "ip_address": "127.0.0.1",
        "ollama_version": "0.24.0",
        "ollama_port": ollama.port,
    }
    warm = {"model": "llama3.2", "prompt": "x", "options": {"num_ctx": 4096}}
    async with aiohttp.ClientSession() as session:
        for path, body in (("agents", facts), ("generate", warm)):
            async with session.post(f"{url}/api/{path}", json=body) as response:
                await response.read()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    asyncio.run(measure(options.copies, options.only))
