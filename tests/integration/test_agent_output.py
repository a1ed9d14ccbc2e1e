"""The output of an `ollama serve` that the agent started, on a disk that is not for it alone."""

import os
import re
import sys
from pathlib import Path

import psutil
import pytest

from ollama_coordinator_agent import process
from ollama_coordinator_agent.process import ServeCommand
from ollama_coordinator_common.settings import AgentConfig
from support.agent_world import Coordinator, eventually, free_port, is_gone, running

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the program is a script")

LARGEST = 64 * 1024

TALKATIVE = f"""#!{sys.executable}
import itertools, sys
for number in itertools.count():
    print(f"line {{number:08}} " + "x" * 80, flush=True)
    if number % 1000 == 0 and number > 100_000:
        sys.stdin.read(1)
"""

SERVES_AND_TALKS = f"""#!{sys.executable}
import http.server, os, sys, threading, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{{"version":"0.33.0","models":[]}}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
host, _, port = os.environ["OLLAMA_HOST"].rpartition(":")
server = http.server.ThreadingHTTPServer((host, int(port)), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
number = 0
while True:
    number += 1
    print(f"line {{number:08}} " + "x" * 80, flush=True)
    time.sleep(0.0005)
"""


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "LARGEST_BYTES", LARGEST)


def script(folder: Path, text: str) -> Path:
    file = folder / "ollama"
    file.write_text(text)
    file.chmod(0o755)
    return file


def sizes(log_file: Path) -> list[int]:
    return [file.stat().st_size for file in sorted(log_file.parent.glob(f"{log_file.stem}.log*"))]


@pytest.mark.spec("AGENT-29")
async def test_a_log_that_grows_is_emptied_under_a_server_that_writes(tmp_path: Path) -> None:
    log_file = tmp_path / "ollama.log"
    command = ServeCommand(script(tmp_path, TALKATIVE), dict(os.environ), free_port(), log_file)
    child = command.start()
    try:
        for _ in range(20):
            await eventually(lambda: log_file.stat().st_size > LARGEST)
            process.keep_small(log_file)
            assert child.is_alive()
        assert len(sizes(log_file)) == 3
        assert max(sizes(log_file)[1:]) <= LARGEST
        await eventually(lambda: log_file.stat().st_size > LARGEST // 2)
    finally:
        await child.stop(grace_seconds=5)
    text = log_file.read_bytes()
    assert b"\0" not in text
    # It begins within a line at most, and goes on line by line.
    lines = text.split(b"\n")[1:-1]
    numbers = [int(line.split()[1]) for line in lines]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


@pytest.mark.spec("AGENT-29")
async def test_an_agent_keeps_its_servers_output_small(tmp_path: Path) -> None:
    async with Coordinator() as coordinator:
        config = AgentConfig(
            coordinator_url=coordinator.url,
            ollama_port=free_port(),
            state_dir=tmp_path / "state",
            ollama_binary=script(tmp_path, SERVES_AND_TALKS),
        )
        log_file = tmp_path / "state" / f"ollama-{config.ollama_port}.log"
        async with running(config):
            await coordinator.next_report(lambda report: report.ollama_running)
            await eventually(lambda: len(sizes(log_file)) == 3)
            await eventually(lambda: log_file.stat().st_size < LARGEST)
        assert max(sizes(log_file)[1:]) <= LARGEST
        older = log_file.with_suffix(".log.1").read_text()
        assert re.search(r"^line \d{8} x{80}$", older, re.MULTILINE)


@pytest.mark.spec("AGENT-29")
async def test_a_server_outlives_its_agent_and_goes_on_writing(tmp_path: Path) -> None:
    async with Coordinator() as coordinator:
        config = AgentConfig(
            coordinator_url=coordinator.url,
            ollama_port=free_port(),
            state_dir=tmp_path / "state",
            ollama_binary=script(tmp_path, SERVES_AND_TALKS),
            keep_ollama=True,
        )
        log_file = tmp_path / "state" / f"ollama-{config.ollama_port}.log"
        async with running(config) as agent:
            await coordinator.next_report(lambda report: report.ollama_running)
            child = agent.parts.watch._supervisor.child
            assert child is not None
        try:
            # Far more than a pipe that nobody reads would take.
            await eventually(lambda: log_file.stat().st_size > 2 * LARGEST)
            # The next agent takes the server back, and its output too.
            async with running(config):
                await eventually(lambda: log_file.stat().st_size < LARGEST)
            assert not is_gone(child.pid)
        finally:
            psutil.Process(child.pid).kill()
            await eventually(lambda: not child.is_alive())


@pytest.mark.spec("AGENT-29")
def test_a_disk_that_takes_no_copy_is_not_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_file = tmp_path / "ollama.log"
    log_file.write_bytes(b"x" * 2 * LARGEST)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(process, "_copy_end", full)
    process.keep_small(log_file)
    assert sizes(log_file) == [0]
