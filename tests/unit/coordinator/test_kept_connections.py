"""Kept connections to agents, and the moment in which an agent closes one."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from ollama_coordinator.upstream import LargeBody, Unreachable, Upstreams, chunks

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Agent:
    """Answers the first request of a connection, and ends the connection at its second.

    `begins`: what it still says then; `how`: abruptly or not; `heard`: every request's body.
    """

    def __init__(self, *, begins: bytes = b"", how: str = "fin", first: int = 10**6) -> None:
        self.begins = begins
        self.how = how
        self.first = first
        self.connections = 0
        self._open: list[asyncio.StreamWriter] = []
        self.heard: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._open.append(writer)
        try:
            if self.connections <= self.first:
                await self._request(reader)
                writer.write(OK)
            await self._request(reader)
            writer.write(self.begins)
            if self.how == "rst":
                writer.transport.abort()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _request(self, reader: asyncio.StreamReader) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        _, _, length = head.partition(b"content-length: ")
        self.heard.append(await reader.readexactly(int(length.split(b"\r\n")[0] or 0)))

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        async with await asyncio.start_server(self.serve, "127.0.0.1", 0) as server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            # From Python 3.12 on, a closing server waits for the connections that are kept.
            for writer in self._open:
                writer.transport.abort()


@pytest.fixture
async def upstreams() -> AsyncIterator[Upstreams]:
    async with Upstreams() as upstreams:
        yield upstreams


async def ask(upstreams: Upstreams, url: str, body: bytes = b"{}") -> bytes:
    async with upstreams.open("POST", f"{url}/api/chat", body=body) as response:
        return b"".join([chunk async for chunk in chunks(response)])


@pytest.mark.spec("PROXY-25")
@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("size", [2, 3 * LargeBody.SLICE_BYTES])
async def test_a_kept_connection_that_ends_under_a_request_is_replaced(
    upstreams: Upstreams, how: str, size: int
) -> None:
    agent = Agent(how=how)
    body = b"x" * size
    async with agent.listening() as url:
        for _ in range(3):
            assert await ask(upstreams, url, body) == b"ok"
    # The second is heard twice; the connection of its answer is not kept, so the third is not.
    assert agent.heard == [body] * 4
    assert agent.connections == 3


@pytest.mark.spec("PROXY-25")
async def test_a_request_is_sent_once_more_only(upstreams: Upstreams) -> None:
    agent = Agent(first=1)
    async with agent.listening() as url:
        assert await ask(upstreams, url) == b"ok"
        with pytest.raises(Unreachable, match="closed the connection without an answer"):
            await ask(upstreams, url)
    assert len(agent.heard) == 3


@pytest.mark.spec("PROXY-25")
async def test_a_request_that_may_have_been_worked_on_is_not_sent_again(
    upstreams: Upstreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ollama_coordinator.upstream.STALE_SECONDS", 0.0)
    agent = Agent()
    async with agent.listening() as url:
        assert await ask(upstreams, url) == b"ok"
        with pytest.raises(Unreachable, match="closed the connection without an answer"):
            await ask(upstreams, url)
    assert len(agent.heard) == 2


@pytest.mark.spec("PROXY-25")
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])  # `localhost` may have two addresses
async def test_an_agent_that_fails_on_a_new_connection_fails(
    upstreams: Upstreams, host: str
) -> None:
    agent = Agent(first=0)
    async with agent.listening() as url:
        with pytest.raises(Unreachable):
            await ask(upstreams, url.replace("127.0.0.1", host))
    assert len(agent.heard) == 1


@pytest.mark.spec("PROXY-25")
async def test_an_answer_that_had_begun_is_not_asked_for_again(upstreams: Upstreams) -> None:
    agent = Agent(begins=b"HTTP/1.1 200 OK\r\nContent-Le")
    async with agent.listening() as url:
        assert await ask(upstreams, url) == b"ok"
        with pytest.raises(Unreachable):
            await ask(upstreams, url)
    assert len(agent.heard) == 2


@pytest.mark.spec("PROXY-25")
async def test_a_body_in_pieces_is_not_sent_again(upstreams: Upstreams) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"only once"

    agent = Agent()
    async with agent.listening() as url:
        assert await ask(upstreams, url) == b"ok"
        headers = [("Content-Length", "9")]
        with pytest.raises(Unreachable):
            async with upstreams.open("POST", url, headers=headers, stream=pieces()):
                pytest.fail("must not open")
    assert agent.heard == [b"{}", b"only once"]
