"""The machine's readings."""

import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ollama_coordinator_agent import metrics
from ollama_coordinator_agent.metrics import Meter, Readings, requests_at


@pytest.mark.spec("AGENT-35")
def test_the_meter_reads_in_its_own_thread_and_ends_with_its_block(tmp_path: Path) -> None:
    with Meter(ollama_port=1, disk=tmp_path / "not" / "yet", interval_seconds=0.01) as meter:
        assert meter.ready.wait(10)
        readings = meter.latest
        assert not meter._thread.name.startswith("MainThread")
    assert not meter._thread.is_alive()
    assert 0 <= readings.cpu_percent <= 100
    assert 0 < readings.memory_percent <= 100
    assert readings.memory_total_bytes
    assert readings.disk_free_bytes


@pytest.mark.spec("AGENT-35")
def test_a_reading_that_fails_leaves_the_last_one_standing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise RuntimeError("no such sensor")

    monkeypatch.setattr(psutil, "virtual_memory", broken)
    with Meter(ollama_port=1, disk=tmp_path) as meter:
        assert meter.ready.wait(10)
    assert meter.latest.memory_total_bytes is None
    assert "no such sensor" in caplog.text


@pytest.mark.spec("AGENT-35")
def test_a_reading_that_waits_delays_no_other(tmp_path: Path) -> None:
    class Waiting(Meter):
        def read(self) -> Readings:
            time.sleep(2.0)  # as for a processor that others use
            readings.release()
            return Readings()

    readings = threading.Semaphore(0)
    with Waiting(ollama_port=1, disk=tmp_path, interval_seconds=0.01):
        assert readings.acquire(timeout=10)
        assert readings.acquire(timeout=20)


def eventually_true(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.mark.spec("AGENT-36")
@pytest.mark.parametrize(
    ("listens", "asks"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::", "127.0.0.1")]
)
def test_our_own_connections_do_not_count(listens: str, asks: str) -> None:
    family = socket.AF_INET6 if ":" in listens else socket.AF_INET
    both = family == socket.AF_INET6 and asks == "127.0.0.1"
    with socket.create_server((listens, 0), family=family, dualstack_ipv6=both) as server:
        port = server.getsockname()[1]
        with socket.create_connection((asks, port)) as client, server.accept()[0] as accepted:
            client.send(b"POST")
            assert accepted.recv(4) == b"POST"
            if requests_at(port) is None:
                pytest.skip("this system shows connections to root only")
            # Others may use the same number of a port at another address.
            assert client.getsockname()[:2] in metrics._ends_in_use(port)
            assert client.getsockname()[:2] in metrics._own_ends()
            accepted.send(b"200")  # it is still ours
            assert client.recv(3) == b"200"


@pytest.mark.spec("AGENT-36")
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows when bytes came and went")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_of_others_only_connections_in_use_count(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "ANSWER_GAP_MS", 200)
    monkeypatch.setattr(metrics, "_own_ends", set)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        socket.create_server((host, 0), family=family) as server,
        socket.create_connection(server.getsockname()[:2]) as client,
        server.accept()[0] as accepted,
    ):
        port = server.getsockname()[1]

        def settled(count: int) -> bool:
            return eventually_true(lambda: requests_at(port) == count)

        assert settled(0)
        client.send(b"POST")
        assert settled(1)
        time.sleep(0.3)  # longer than an answer may pause: it has not begun
        assert requests_at(port) == 1
        accepted.send(b"HTTP/1.1 200 OK")
        assert requests_at(port) == 1
        assert settled(0)


@pytest.mark.spec("AGENT-36")
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel is not asked")
def test_a_kernel_that_shows_nothing_is_replaced_by_a_list_of_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def denied(_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(metrics, "_ask_kernel", denied)
    monkeypatch.setattr(metrics, "_own_ends", set)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), server.accept()[0]:
            assert requests_at(port) == 1


@pytest.mark.spec("AGENT-36")
def test_what_the_system_does_not_tell_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise psutil.AccessDenied

    def silent(_: int) -> None:
        raise OSError

    monkeypatch.setattr(metrics, "_ask_kernel", silent, raising=False)
    for lists in (psutil, psutil.Process):
        monkeypatch.setattr(lists, "net_connections", denied)
    assert requests_at(1) is None
