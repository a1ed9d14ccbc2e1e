"""How fast a request's body comes, and where there is room for it."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message

from ollama_coordinator import memory
from ollama_coordinator.api.http import body_timeout
from ollama_coordinator.api.http.body_timeout import BodyTimeout
from ollama_coordinator.api.http.errors import HttpError, headers_of, status_of
from ollama_coordinator.clock import Clock
from ollama_coordinator.db import Store, database_of
from ollama_coordinator.memory import (
    LEAST_ROOM_BYTES,
    BodyRoom,
    NoRoom,
    cgroup_limits,
    memory_share,
)
from ollama_coordinator.settings import Settings
from ollama_coordinator_common.settings import CoordinatorConfig


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "ROOM_SECONDS", 0.01)


async def receive_all(
    parts: Iterator[Message], room: BodyRoom, *, pause: float = 0.0, **scope: Any
) -> list[bytes]:
    """What an application gets of a body that comes in these parts."""
    got: list[bytes] = []

    async def app(_: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            message = await receive()
            got.append(message["body"])
            more = message["more_body"]
            assert room.used >= 0

    async def receive() -> Message:
        await asyncio.sleep(pause)
        return next(parts)

    async def send(_: Message) -> None:
        pass

    settings = Settings(
        CoordinatorConfig(body_timeout=0.05), Store(database_of("sqlite://:memory:"))
    )
    whole = {"type": "http", "http_version": "1.1", "path": "/", "headers": [], **scope}
    await BodyTimeout(app, settings, room, Clock())(whole, receive, send)
    return got


def parts_of(*bodies: bytes) -> Iterator[Message]:
    for number, body in enumerate(bodies, 1):
        yield {"type": "http.request", "body": body, "more_body": number < len(bodies)}


@pytest.mark.spec("OPERATION-33")
async def test_a_body_takes_room_until_its_request_ends() -> None:
    room = BodyRoom(10, Clock())
    assert await receive_all(parts_of(b"12345", b"67890"), room) == [b"12345", b"67890"]
    assert room.used == 0


@pytest.mark.spec("OPERATION-33")
async def test_a_body_without_room_is_refused() -> None:
    room = BodyRoom(10, Clock())
    await room.take(6)
    with pytest.raises(NoRoom) as caught:
        await receive_all(parts_of(b"12345"), room)
    assert (status_of(caught.value), headers_of(caught.value)) == (503, {"retry-after": "5"})
    assert room.used == 6
    announced = [(b"content-length", b"5")]
    with pytest.raises(NoRoom):
        await receive_all(parts_of(b"1", b"2345"), room, headers=announced)
    room.give_back(6)
    assert len(await receive_all(parts_of(b"1", b"2345"), room, headers=announced)) == 2


@pytest.mark.spec("OPERATION-33")
async def test_who_waits_for_room_goes_on_when_there_is_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "ROOM_SECONDS", 60.0)
    room = BodyRoom(10, Clock())
    await room.take(6)
    first = asyncio.create_task(receive_all(parts_of(b"12345"), room))
    second = asyncio.create_task(receive_all(parts_of(b"1"), room))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not first.done()
    assert not second.done()
    room.give_back(6)
    assert (await first, await second) == ([b"12345"], [b"1"])
    assert room.used == 0


@pytest.mark.spec("OPERATION-33")
async def test_a_file_that_goes_to_the_disk_takes_no_room() -> None:
    path = "/api/blobs/sha256:" + "0" * 64
    room = BodyRoom(1, Clock())
    await room.take(1)
    assert await receive_all(parts_of(b"12345"), room, path=path) == [b"12345"]


async def test_a_body_larger_than_all_room_is_let_in_alone() -> None:
    assert await receive_all(parts_of(b"12345"), BodyRoom(1, Clock())) == [b"12345"]


@pytest.mark.spec("OPERATION-33")
def test_a_container_may_take_less_than_its_machine_has(tmp_path: Path) -> None:
    def share(text: str) -> int:
        path = tmp_path / "memory.max"
        path.write_text(text, "ascii")
        return memory_share([str(path), str(tmp_path / "not there")])

    whole = memory_share([])
    assert share(f"{512 * 1024**2}\n") == 128 * 1024**2
    assert share(f"{1024**2}\n") == LEAST_ROOM_BYTES
    assert share("max\n") == share(f"{2**63 - 4096}\n") == whole >= LEAST_ROOM_BYTES


@pytest.mark.spec("OPERATION-33")
def test_the_limits_of_a_service_are_those_of_its_cgroup_and_those_around_it(
    tmp_path: Path,
) -> None:
    own = tmp_path / "cgroup"
    own.write_text("4:cpu,memory:/docker/abc\n1:name=systemd:/x\n0::/system.slice/a.service\n")
    assert list(cgroup_limits(str(own))) == [
        "/sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/docker/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/system.slice/a.service/memory.max",
        "/sys/fs/cgroup/system.slice/memory.max",
        "/sys/fs/cgroup/memory.max",
    ]
    assert list(cgroup_limits(str(tmp_path / "not there"))) == []


@pytest.mark.spec("OPERATION-19")
async def test_a_body_that_trickles_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def trickle() -> Iterator[Message]:
        while True:
            yield {"type": "http.request", "body": b"x", "more_body": True}

    monkeypatch.setattr(body_timeout, "GRACE_SECONDS", 0.05)
    with pytest.raises(HttpError, match="under 1024 bytes a second") as caught:
        await receive_all(trickle(), BodyRoom(10**9, Clock()), pause=0.01)
    assert caught.value.status == 408
