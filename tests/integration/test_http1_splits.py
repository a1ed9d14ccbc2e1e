"""However a client's bytes are cut, they mean the same; and whatever they are, it ends well."""

import asyncio
from itertools import pairwise
from typing import Any

import pytest
from hypercorn.config import Config
from hypothesis import given, settings
from hypothesis import strategies as st

from ollama_coordinator.http1.connection import Http1Connection, Http1Server
from support.asgi import Shows


class Memory(asyncio.Transport):
    """A transport to nowhere that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.protocol: Http1Connection | None = None
        self.closed = False

    def write(self, data: Any) -> None:
        assert not self.closed
        self.written += bytes(data)

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        pass

    resume_reading = write_eof = pause_reading

    def can_write_eof(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed and self.protocol is not None:
            self.closed = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    abort = close


async def converse(parts: list[bytes]) -> tuple[list[tuple[str, str, bytes]], bytes]:
    """What the application saw and the client got, of bytes that arrive in these parts."""
    shows, transport = Shows(), Memory()
    config = Config()
    config.include_date_header = False
    scope = {"type": "http", "state": {}}
    connection = Http1Connection(Http1Server(shows, config), transport, scope)
    transport.protocol = connection
    running = asyncio.ensure_future(connection.run(b""))
    await asyncio.sleep(0)
    for part in parts:
        connection.data_received(part)
        await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)
    if not connection.eof_received():
        transport.close()
    await asyncio.wait_for(running, 5)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    return shows.requests, transport.written


REQUESTS = [
    b"GET /echo?a HTTP/1.1\r\nHost: x\r\nX-Long: %b\r\n\r\n" % (b"y" * 300),
    b"\r\nPOST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab\r\nc",
    (
        b"POST /chunks HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3;e=1\r\nabc\r\nA\r\n0123456789\r\n0\r\nTrailer: t\r\n\r\n"
    ),
    (
        b"POST /echo HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
        b"Content-Length: 4\r\n\r\nGET "
    ),
    b"HEAD /none HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /echo HTTP/1.0\r\n\r\n",
    b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nConnection: close\r\n\r\nend",
    b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nend",
    b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
    b"nonsense\r\n\r\n",
]


def cut(data: bytes, at: list[int]) -> list[bytes]:
    """The parts of `data` between these places."""
    places = sorted({0, len(data), *(place % (len(data) + 1) for place in at)})
    return [data[a:b] for a, b in pairwise(places)]


@pytest.mark.spec("OPERATION-15")
@settings(deadline=None, max_examples=150)
@given(st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=5), st.lists(st.integers(0, 4000)))
def test_bytes_mean_the_same_however_they_are_cut(chosen: list[bytes], at: list[int]) -> None:
    data = b"".join(chosen)
    whole = asyncio.run(converse([data]))
    assert asyncio.run(converse(cut(data, at))) == whole
    assert whole[1].startswith(b"HTTP/1.1 ")


@settings(deadline=None, max_examples=10)
@given(st.sampled_from(REQUESTS))
def test_bytes_mean_the_same_one_by_one(request: bytes) -> None:
    singly = [request[place : place + 1] for place in range(len(request))]
    assert asyncio.run(converse(singly)) == asyncio.run(converse([request]))


TOKENS = st.one_of(
    st.binary(max_size=20),
    st.sampled_from(REQUESTS),
    st.sampled_from(
        [
            *(b"GET ", b"POST ", b"/echo", b"/wait", b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", b"\r\n"),
            *(b"\n", b"\r", b"\0", b" ", b":", b"Host: x\r\n", b"Content-Length: 3\r\n", b"0\r\n"),
            *(b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"\r\n\r\n", b"ffff"),
            *(
                b"Connection: upgrade\r\nUpgrade: a\r\n",
                b"Expect: 100-continue\r\n",
                b"3\r\nabc\r\n",
            ),
        ]
    ),
)


@pytest.mark.spec("OPERATION-15")
@settings(deadline=None, max_examples=400)
@given(st.lists(TOKENS, max_size=20), st.lists(st.integers(0, 4000), max_size=10))
def test_no_bytes_make_it_fail_or_hang(tokens: list[bytes], at: list[int]) -> None:
    data = b"".join(tokens)
    _, answers = asyncio.run(converse(cut(data, at)))
    assert b"HTTP/1.1 500" not in answers
