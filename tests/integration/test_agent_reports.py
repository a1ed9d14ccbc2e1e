"""What a coordinator hears from a running agent."""

import asyncio
import json
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from msgspec import structs

from ollama_coordinator_agent import reach
from ollama_coordinator_agent.metrics import SHOWS_USE
from ollama_coordinator_agent.pacing import AgentPace
from ollama_coordinator_agent.reach import Offer
from ollama_coordinator_common.protocol import HEARTBEAT_SECONDS
from ollama_coordinator_common.settings import AgentConfig
from support.agent_world import FAST, Coordinator, eventually, free_port, running
from support.ollama import Model, StandIn

SLOW = structs.replace(FAST, heartbeat=60)
"""With this pace, what arrives soon was sent because of news."""


def config_of(coordinator: Coordinator, ollama: StandIn | None, folder: Path) -> AgentConfig:
    return AgentConfig(
        coordinator_url=coordinator.url,
        ollama_port=ollama.port if ollama else free_port(),
        machine_name="gpu-1",
        state_dir=folder,
        manage_ollama=False,
    )


@pytest.mark.spec("AGENT-7")
async def test_an_agent_registers_and_reports_what_it_knows(tmp_path: Path) -> None:
    async with Coordinator() as coordinator, StandIn([Model("llama3.2")]) as ollama:
        async with running(config_of(coordinator, ollama, tmp_path)):
            report = await coordinator.next_report(lambda report: bool(report.tags))
            await coordinator.until(lambda seen: len(seen.reports) > 5)
        registration = coordinator.registrations[-1]
    assert registration.machine_name == "gpu-1"
    assert registration.ip_address == "127.0.0.1"
    assert registration.ollama_port == ollama.port
    assert registration.ollama_version == ollama.settings.version
    assert registration.machine_id == (tmp_path / "machine-id").read_text().strip()
    assert registration.relay_port is None
    assert report.ollama_running
    assert bool(report.tags)
    assert json.loads(bytes(report.tags))["models"][0]["name"] == "llama3.2:latest"
    assert report.memory_total_bytes
    assert 0 < report.memory_usage <= 100
    assert AgentPace().heartbeat == HEARTBEAT_SECONDS == 10


@pytest.mark.spec("AGENT-6")
async def test_a_coordinator_that_starts_later_is_found(tmp_path: Path) -> None:
    coordinator = Coordinator()
    async with StandIn() as ollama, running(config_of(coordinator, ollama, tmp_path)) as daemon:
        await eventually(lambda: "connection refused" in (daemon.trouble or ""))
        async with coordinator:
            await coordinator.next_report(lambda report: report.ollama_running)
            await eventually(lambda: daemon.trouble is None)


@pytest.mark.spec("AGENT-6")
async def test_a_coordinator_that_restarts_gets_heartbeats_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        Coordinator() as coordinator,
        StandIn() as ollama,
        running(config_of(coordinator, ollama, tmp_path)) as daemon,
    ):
        await coordinator.next_report(lambda report: True)
        await coordinator.stop()
        await eventually(lambda: daemon.trouble)
        await coordinator.start()
        await coordinator.next_report(lambda report: True)
        registered = len(coordinator.registrations)
        await coordinator.next_report(lambda report: True)
    assert len(coordinator.registrations) == registered
    assert caplog.text.count("all is well with the coordinator again") <= 1


@pytest.mark.spec("AGENT-45")
async def test_what_the_coordinator_has_against_a_machine_is_logged_and_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    problem = "it sends no requests to http://192.0.2.1:11434: no connection within 3 s"
    async with (
        Coordinator() as coordinator,
        StandIn() as ollama,
        running(config_of(coordinator, ollama, tmp_path)) as daemon,
    ):
        coordinator.problem = problem
        await eventually(lambda: daemon.view().coordinator_trouble == f"connected, but {problem}")
        told = len(coordinator.reports)
        await coordinator.until(lambda seen: len(seen.reports) > told + 3)
        assert caplog.text.count(problem) == 1
        coordinator.problem = None
        await eventually(lambda: daemon.view().coordinator_trouble is None)
    assert caplog.text.count("all is well with the coordinator again") == 1


@pytest.mark.spec("AGENT-8")
async def test_an_ollama_that_hangs_delays_no_heartbeat(tmp_path: Path) -> None:
    async with (
        Coordinator() as coordinator,
        StandIn() as ollama,
        running(config_of(coordinator, ollama, tmp_path)),
    ):
        await coordinator.next_report(lambda report: bool(report.tags))
        with ollama.faults.black_hole():
            loop = asyncio.get_running_loop()
            started, count = loop.time(), len(coordinator.reports)
            await coordinator.until(lambda seen: len(seen.reports) >= count + 5)
            assert loop.time() - started < 5 * FAST.heartbeat + 1.0
            assert coordinator.reports[-1].tags


@pytest.mark.spec("AGENT-30")
async def test_a_silent_ollama_counts_as_running_for_a_while_and_then_not(tmp_path: Path) -> None:
    async with (
        Coordinator() as coordinator,
        StandIn() as ollama,
        running(config_of(coordinator, ollama, tmp_path)) as daemon,
    ):
        daemon.parts.watch._ollama._timeout = aiohttp.ClientTimeout(total=0.05)
        await coordinator.next_report(lambda report: bool(report.tags))
        with ollama.faults.hang(paths=["/api/version"]):
            report = await coordinator.next_report(lambda report: True)
            assert report.ollama_running
            await coordinator.next_report(lambda report: not report.ollama_running)
        await coordinator.next_report(lambda report: report.ollama_running)


@pytest.mark.spec("AGENT-9")
async def test_news_of_ollama_is_reported_at_once(tmp_path: Path) -> None:
    async with Coordinator() as coordinator, StandIn([Model("a")]) as ollama:
        config = config_of(coordinator, ollama, tmp_path)
        async with running(config, pace=SLOW), aiohttp.ClientSession() as session:
            await coordinator.next_report(lambda report: b'"a:latest"' in bytes(report.tags))
            ollama.models.add(Model("pulled"))
            await coordinator.next_report(lambda report: b"pulled" in bytes(report.tags))
            ollama.models.remove("pulled")
            await coordinator.next_report(lambda report: b"pulled" not in bytes(report.tags))
            await session.post(ollama.url + "/api/generate", json={"model": "a", "stream": False})
            await coordinator.next_report(lambda report: b"a:latest" in bytes(report.ps))
            await ollama.kill()
            report = await coordinator.next_report(lambda report: not report.ollama_running)
            assert bytes(report.ps) == b'{"models":[]}'
            await ollama.start()
            await coordinator.next_report(lambda report: report.ollama_running)


@pytest.mark.spec("AGENT-9")
async def test_an_expiry_that_moves_is_no_news(tmp_path: Path) -> None:
    async with Coordinator() as coordinator, StandIn([Model("a")]) as ollama:
        config = config_of(coordinator, ollama, tmp_path)
        async with running(config, pace=SLOW) as daemon, aiohttp.ClientSession() as session:
            ask = {"model": "a", "stream": False}
            await session.post(ollama.url + "/api/generate", json=ask)
            await coordinator.next_report(lambda report: b"a:latest" in bytes(report.ps))
            first = daemon.view().facts.ps
            await session.post(ollama.url + "/api/generate", json=ask)
            await eventually(lambda: daemon.view().facts.ps != first)
            reports = [report for report in coordinator.reports if b"a:latest" in bytes(report.ps)]
            assert len(reports) == 1


@pytest.mark.spec("AGENT-10")
async def test_a_forgotten_agent_registers_at_once(tmp_path: Path) -> None:
    async with (
        Coordinator() as coordinator,
        StandIn() as ollama,
        running(config_of(coordinator, ollama, tmp_path)) as daemon,
    ):
        await coordinator.next_report(lambda report: bool(report.tags))
        registered = len(coordinator.registrations)
        coordinator.known.clear()
        daemon.parts.changed.set()
        await coordinator.until(lambda seen: len(seen.registrations) == registered + 1)
        await coordinator.next_report(lambda report: True)


@pytest.mark.spec("AGENT-10")
async def test_a_coordinator_that_comes_back_without_its_memory_is_joined_at_once(
    tmp_path: Path,
) -> None:
    pace = structs.replace(FAST, heartbeat=0.1, retry_first=1.0, retry_ceiling=1.0)
    async with (
        Coordinator() as coordinator,
        StandIn() as ollama,
        running(config_of(coordinator, ollama, tmp_path), pace=pace) as daemon,
    ):
        await coordinator.next_report(lambda report: bool(report.tags))
        await coordinator.stop()
        await eventually(lambda: daemon.trouble)
        coordinator.known.clear()
        registered = len(coordinator.registrations)
        await coordinator.start()
        await coordinator.next_report(lambda report: True)
        started = asyncio.get_running_loop().time()
        await coordinator.until(lambda seen: len(seen.registrations) > registered)
        assert asyncio.get_running_loop().time() - started < pace.retry_first / 2


@pytest.mark.spec("AGENT-10")
async def test_a_coordinator_that_forgets_at_once_is_not_stormed(tmp_path: Path) -> None:
    async with Coordinator() as coordinator, StandIn() as ollama:
        coordinator.known = set_that_forgets()
        pace = structs.replace(FAST, heartbeat=0.01, retry_first=0.05, retry_ceiling=10)
        async with running(config_of(coordinator, ollama, tmp_path), pace=pace):
            loop = asyncio.get_running_loop()
            await coordinator.until(lambda seen: len(seen.registrations) >= 2)
            started = loop.time()
            await coordinator.until(lambda seen: len(seen.registrations) >= 5)
            assert loop.time() - started > (0.1 + 0.2 + 0.4) / 2 * 0.9


class set_that_forgets(set[str]):  # noqa: N801 (it is used as a set)
    """Holds nothing."""

    def add(self, element: str) -> None:
        """Forget it."""


@pytest.mark.spec("AGENT-11")
async def test_another_address_is_noticed_before_the_next_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next look at the addresses is far away."""
    pace = structs.replace(FAST, reach=1000)
    async with Coordinator() as coordinator, StandIn() as ollama:
        async with running(config_of(coordinator, ollama, tmp_path), pace=pace):
            await coordinator.until(lambda seen: len(seen.reports) > 2)
            monkeypatch.setattr(reach, "local_address", lambda *_: "127.0.0.9")
            await coordinator.until(lambda seen: len(seen.registrations) > 1)
    assert coordinator.registrations[-1].ip_address == "127.0.0.9"


@pytest.mark.spec("AGENT-11")
async def test_another_address_is_registered(tmp_path: Path) -> None:
    async with (
        Coordinator() as coordinator,
        StandIn() as ollama,
        running(config_of(coordinator, ollama, tmp_path)) as daemon,
    ):
        await coordinator.next_report(lambda report: bool(report.tags))
        registered = len(coordinator.registrations)
        daemon.parts.reach.offer = Offer("192.0.2.200")
        daemon.parts.changed.set()
        await coordinator.until(lambda seen: len(seen.registrations) == registered + 1)
    assert coordinator.registrations[-1].ip_address == "127.0.0.1"


@pytest.mark.spec("AGENT-11")
async def test_another_version_of_ollama_is_registered(tmp_path: Path) -> None:
    async with (
        Coordinator() as coordinator,
        StandIn(version="0.30.0") as ollama,
        running(config_of(coordinator, ollama, tmp_path)),
    ):
        await coordinator.until(lambda seen: bool(seen.registrations))
        with ollama.faults.status(200, {"version": "0.31.0"}, paths=["/api/version"]):
            await coordinator.until(lambda seen: seen.registrations[-1].ollama_version == "0.31.0")


@pytest.mark.spec("AGENT-14")
async def test_a_refusal_is_told_in_the_coordinators_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with Coordinator() as coordinator, StandIn() as ollama:
        coordinator.answer = web.json_response({"error": "machine_name is taken"}, status=409)
        async with running(config_of(coordinator, ollama, tmp_path)):
            await coordinator.until(lambda seen: len(seen.registrations) >= 3)
            coordinator.answer = None
            await coordinator.next_report(lambda report: True)
    assert caplog.text.count("machine_name is taken") == 1
    assert AgentPace().rejected == 60


@pytest.mark.spec("AGENT-14")
async def test_something_that_is_no_coordinator_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with StandIn() as ollama:
        coordinator = Coordinator()
        config = AgentConfig(
            coordinator_url=ollama.url, ollama_port=ollama.port, state_dir=tmp_path
        )
        async with running(config):
            await eventually(lambda: "is no Ollama Coordinator" in caplog.text)
        assert coordinator.registrations == []


@pytest.mark.spec("AGENT-12")
async def test_the_last_report_says_leaving(tmp_path: Path) -> None:
    async with Coordinator() as coordinator, StandIn() as ollama:
        async with running(config_of(coordinator, ollama, tmp_path)):
            await coordinator.next_report(lambda report: not report.leaving)
        assert [report.leaving for report in coordinator.reports].index(True) == (
            len(coordinator.reports) - 1
        )


@pytest.mark.spec("AGENT-13")
async def test_a_coordinator_that_does_not_answer_delays_the_end_by_two_seconds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with Coordinator() as coordinator, StandIn() as ollama:
        loop = asyncio.get_running_loop()
        async with running(config_of(coordinator, ollama, tmp_path)):
            await coordinator.next_report(lambda report: True)
            coordinator.is_mute = True
            await coordinator.next_report(lambda report: True)
            started = loop.time()
        assert loop.time() - started < 3.5
    assert "without a goodbye" in caplog.text


@pytest.mark.spec("AGENT-36")
async def test_requests_of_others_count(tmp_path: Path) -> None:
    """The stand-in lives in this process, so the other side is a program of its own."""
    async with (
        Coordinator() as coordinator,
        StandIn() as ollama,
        running(config_of(coordinator, ollama, tmp_path)) as daemon,
    ):
        await coordinator.next_report(lambda report: bool(report.tags))
        await coordinator.next_report(lambda report: report.active_requests == 0)
        code = (
            f"import socket, sys; s = socket.create_connection(('127.0.0.1', {ollama.port}));"
            " s.send(b'POST /api/chat HTTP/1.1');"
        )
        other = await asyncio.create_subprocess_exec(
            "python3", "-c", code + " sys.stdin.read()", stdin=asyncio.subprocess.PIPE
        )
        if daemon.parts.meter.latest.requests is not None:
            daemon.parts.meter._interval_seconds = 0.05
            report = await coordinator.next_report(lambda report: report.active_requests == 1)
            assert report.other_requests is None  # the coordinator's would be among them
        other.kill()
        await other.wait()


@pytest.mark.spec("AGENT-36")
async def test_behind_a_relay_the_requests_of_others_are_told_apart(tmp_path: Path) -> None:
    async with Coordinator() as coordinator, StandIn() as ollama:
        config = structs.replace(config_of(coordinator, ollama, tmp_path), relay="always")
        async with running(config) as daemon:
            await coordinator.next_report(lambda report: bool(report.tags))
            port = coordinator.registrations[-1].relay_port
            assert port is not None
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /api/chat HTTP/1.1")
            report = await coordinator.next_report(lambda report: report.active_requests == 1)
            if daemon.parts.meter.latest.requests is not None and SHOWS_USE:
                assert report.other_requests == 0
            writer.close()
            assert not reader.at_eof()


@pytest.mark.spec("AGENT-44")
async def test_a_log_that_is_refused_does_not_hold_up_the_heartbeats(tmp_path: Path) -> None:
    async with Coordinator() as coordinator, StandIn() as ollama:
        coordinator.log_status = 413
        slow_after_refusals = structs.replace(FAST, rejected=600.0)
        config = config_of(coordinator, ollama, tmp_path)
        async with running(config, pace=slow_after_refusals):
            await coordinator.until(lambda self: len(self.logs) > 2)
            coordinator.log_status = 404
            await coordinator.until(lambda self: len(self.registrations) > 1)
