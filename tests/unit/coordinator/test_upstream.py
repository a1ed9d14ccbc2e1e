"""Every way an agent's Ollama can fail has one name and a reason that can be read."""

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from ssl import SSLCertVerificationError
from typing import Any

import aiohttp
import pytest
from aiohttp.client_reqrep import ConnectionKey
from yarl import URL

from ollama_coordinator.clock import LAG_SECONDS, Clock
from ollama_coordinator.upstream import (
    LAG_TRIES,
    Cut,
    LargeBody,
    Unreachable,
    UpstreamError,
    Upstreams,
    chunks,
)

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
KEY = ConnectionKey("gpu-1", 11434, False, True, None, None, None)
INFO = aiohttp.RequestInfo(URL("http://gpu-1"), "POST", None, URL("http://gpu-1"))  # type: ignore[arg-type]

NOT_FROM_A_REQUEST = {
    aiohttp.WSServerHandshakeError: "we open no websockets",
}

EXAMPLES: list[Exception] = [
    aiohttp.ClientError("odd"),
    aiohttp.ClientError(),
    aiohttp.ClientConnectionError("Connector is closed."),
    aiohttp.ClientConnectionResetError("Cannot write to closing transport"),
    aiohttp.ClientOSError(104, "Connection reset by peer"),
    aiohttp.ClientConnectorError(KEY, OSError(111, "Connection refused")),
    aiohttp.ClientConnectorError(KEY, OSError("Multiple exceptions")),
    aiohttp.ClientConnectorDNSError(KEY, OSError(-2, "Name or service not known")),
    aiohttp.ClientProxyConnectionError(KEY, OSError(111, "Connection refused")),
    aiohttp.ClientSSLError(KEY, OSError(1, "wrong version number")),
    aiohttp.ClientConnectorSSLError(KEY, ssl.SSLError(1, "wrong version number")),
    aiohttp.ClientConnectorCertificateError(KEY, SSLCertVerificationError(1, "expired")),
    aiohttp.ServerConnectionError("odd"),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ServerFingerprintMismatch(b"a", b"b", "gpu-1", 11434),
    aiohttp.ServerTimeoutError(),
    aiohttp.ConnectionTimeoutError("Connection timeout to host"),
    aiohttp.SocketTimeoutError("Timeout on reading data from socket"),
    aiohttp.ClientPayloadError("Response payload is not completed"),
    aiohttp.ClientResponseError(INFO, (), status=400, message="Bad status line"),
    aiohttp.ClientHttpProxyError(INFO, ()),
    aiohttp.ContentTypeError(INFO, ()),
    aiohttp.TooManyRedirects(INFO, ()),
    aiohttp.InvalidURL("http://"),
    aiohttp.InvalidUrlClientError("http://"),
    aiohttp.NonHttpUrlClientError("ftp://"),
    aiohttp.RedirectClientError("odd"),
    aiohttp.InvalidUrlRedirectClientError("http://"),
    aiohttp.NonHttpUrlRedirectClientError("ftp://"),
    TimeoutError(),
    ConnectionRefusedError(111, "Connection refused"),
    ConnectionResetError(104, "Connection reset by peer"),
    BrokenPipeError(32, "Broken pipe"),
    OSError(113, "No route to host"),
    UnicodeError("label too long"),
]


def classes(root: type[Exception]) -> set[type[Exception]]:
    return {root} | {child for kind in root.__subclasses__() for child in classes(kind)}


LATER = {getattr(aiohttp, name, None) for name in ("UploadAbortedError",)}
"""Classes that not every supported version of the library has; nothing is particular to them."""


def test_every_error_class_of_the_library_is_among_the_examples() -> None:
    here = {type(example) for example in EXAMPLES} | NOT_FROM_A_REQUEST.keys()
    public = {getattr(aiohttp, name) for name in aiohttp.__all__}
    assert (classes(aiohttp.ClientError) & public) - here <= LATER


class Failing:
    """Stands where the pool is and raises."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def send(self, *arguments: object, **more: object) -> aiohttp.ClientResponse:
        raise self._error


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
async def test_no_error_of_the_library_escapes(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstreams = Upstreams()
    monkeypatch.setattr(upstreams, "_send", Failing(error).send)
    with pytest.raises(Unreachable) as caught:
        async with upstreams.open("GET", "http://gpu-1:11434/"):
            pytest.fail("must not open")
    reason = str(caught.value)
    assert reason
    assert "\n" not in reason
    assert "object at 0x" not in reason


# ── on the wire ───────────────────────────────────────────────────────────────────────────────

Sends = Sequence[bytes]


@asynccontextmanager
async def answering(*sends: bytes, reset: bool = False) -> AsyncIterator[str]:
    """A server that reads the head of a request, sends these pieces and hangs up; its URL."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in sends:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if reset:
            writer.transport.abort()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def whole(upstreams: Upstreams, url: str) -> bytes:
    async with upstreams.open("POST", f"{url}/api/chat", body=b"{}") as response:
        return b"".join([chunk async for chunk in chunks(response)])


@pytest.fixture
async def upstreams() -> AsyncIterator[Upstreams]:
    async with Upstreams() as upstreams:
        yield upstreams


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "closed the connection without an answer"),
        (OK + b"X", "closed the connection without an answer"),
        (b"220 mail.example ESMTP\r\n\r\n", "answers in no form of HTTP"),
        (b"\x15\x03\x01\x00\x02\x02\n", "answers in no form of HTTP"),
        (OK + b"X: " + b"x" * 100_000 + b"\r\n\r\n", "answers in no form of HTTP"),
        (OK + b"Content-Length: x\r\n\r\n", "answers in no form of HTTP"),
        (b"HTTP/1.1 99 odd\r\n\r\n", "answers in no form of HTTP"),
    ],
)
async def test_an_answer_that_is_none_is_unreachable(
    upstreams: Upstreams, answer: bytes, reason: str
) -> None:
    async with answering(answer) as url:
        with pytest.raises(Unreachable, match=reason):
            await whole(upstreams, url)


@pytest.mark.parametrize(
    "sends",
    [
        [OK + b"Content-Length: 10\r\n\r\n", b"abc"],
        [CHUNKED, b"3\r\nabc\r\n"],
        [CHUNKED, b"3\r\nabc\r\n", b"5\r\nab"],
        [CHUNKED, b"3\r\nabc\r\n", b"zz\r\n"],
        [OK + b"Content-Length: 10\r\nContent-Encoding: gzip\r\n\r\n", b"abc"],
    ],
)
async def test_an_answer_that_breaks_off_is_cut(upstreams: Upstreams, sends: Sends) -> None:
    async with answering(*sends) as url:
        with pytest.raises(UpstreamError) as caught:
            await whole(upstreams, url)
    # A broken chunk that comes with the headers is told before the answer opens.
    assert isinstance(caught.value, Cut | Unreachable)
    assert str(caught.value) in (
        "closed the connection in the middle of the answer",
        "answers in no form of HTTP",
    )


async def test_a_reset_in_the_middle_is_cut(upstreams: Upstreams) -> None:
    async with answering(CHUNKED + b"3\r\nabc\r\n", reset=True) as url:
        async with upstreams.open("POST", f"{url}/api/chat") as response:
            with pytest.raises(Cut):
                _ = [chunk async for chunk in chunks(response)]


async def test_nobody_listening_is_told_as_that(upstreams: Upstreams) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(Unreachable, match="cannot connect"):
            await whole(upstreams, f"http://127.0.0.1:{taken.getsockname()[1]}")


@pytest.mark.parametrize("host", ["a..b", "x" * 70, "[", "", "#", "%zz", "a b", "\n", "ä" * 80])
async def test_a_host_that_cannot_be_one_is_unreachable(upstreams: Upstreams, host: str) -> None:
    with pytest.raises(Unreachable, match=r"address|cannot connect"):
        await whole(upstreams, f"http://{host}:1")


async def test_a_connection_that_does_not_come_about_makes_one_think_of_a_firewall(
    upstreams: Upstreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstreams, "_send", Failing(aiohttp.ConnectionTimeoutError()).send)
    with pytest.raises(Unreachable, match="no connection within 3 s; does a firewall"):
        await upstreams.fetch("GET", "http://gpu-1:11434/", seconds=5)


async def test_a_redirect_and_a_compressed_body_pass_as_they_are(upstreams: Upstreams) -> None:
    answer = b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Encoding: gzip\r\nContent-Length: 3"
    async with answering(answer + b"\r\n\r\nabc") as url:
        async with upstreams.open("GET", url) as response:
            assert response.status == 302
            assert [chunk async for chunk in chunks(response)] == [b"abc"]


async def test_a_small_request_has_a_time_limit(upstreams: Upstreams) -> None:
    forever = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await forever.wait()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(Unreachable, match=r"no answer within 0\.01 s; .* firewall"):
            await upstreams.fetch("GET", url, seconds=0.01)
        forever.set()


async def test_a_small_request_that_is_cut_has_not_been_answered(upstreams: Upstreams) -> None:
    async with answering(OK + b"Content-Length: 10\r\n\r\nabc") as url:
        with pytest.raises(Unreachable, match="in the middle of the answer"):
            await upstreams.fetch("GET", url, seconds=5)


@pytest.mark.parametrize("size", [0, 1, LargeBody.SLICE_BYTES, 3 * LargeBody.SLICE_BYTES + 1])
async def test_a_body_of_any_size_arrives_with_its_length(upstreams: Upstreams, size: int) -> None:
    body = bytes(range(256)) * (size // 256 + 1)
    body = body[:size]
    came: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(await reader.readuntil(b"\r\n\r\n"))
        came.append(await reader.readexactly(size))
        writer.write(OK + b"Content-Length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with upstreams.open("POST", url, body=body) as response:
            assert response.status == 200
    head, received = came
    assert received == body
    assert f"content-length: {size}\r\n".encode() in head.lower()
    assert b"transfer-encoding" not in head.lower()


@pytest.mark.parametrize("name", ["user-agent", "accept", "accept-encoding"])
async def test_no_header_is_added_that_the_client_did_not_send(
    upstreams: Upstreams, name: str
) -> None:
    came: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(OK + b"Content-Length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with upstreams.open("GET", url):
            pass
    assert f"\r\n{name}:".encode() not in came[0].lower()


async def test_the_pool_is_used_while_it_is_open() -> None:
    with pytest.raises(RuntimeError, match="not open"):
        async with Upstreams().open("GET", "http://gpu-1"):
            pytest.fail("must not open")


# ── our own lag ───────────────────────────────────────────────────────────────────────────────


class Lagging(Clock):
    """A clock that shows a lag for so many of the questions."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def has_lagged_since(self, now: float) -> bool:
        self.times -= 1
        return self.times >= 0


@pytest.mark.spec("FLEET-76")
@pytest.mark.parametrize(("times", "requests"), [(0, 1), (2, 3), (99, 1 + LAG_TRIES)])
async def test_a_time_out_under_lag_decides_nothing(times: int, requests: int) -> None:
    taken = 0

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal taken
        taken += 1
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, Upstreams(Lagging(times)) as upstreams:
        with pytest.raises(Unreachable, match=r"no answer within 0\.05 s"):
            await upstreams.fetch("GET", url, seconds=0.05)
    assert taken == requests


@pytest.mark.spec("FLEET-76")
@pytest.mark.parametrize(("times", "served"), [(0, False), (2, True)])
async def test_a_connection_that_times_out_under_lag_is_tried_again(
    times: int, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0
    connect = aiohttp.TCPConnector._create_connection

    async def slow(*arguments: Any) -> Any:
        nonlocal tries
        tries += 1
        if tries <= 2:
            raise aiohttp.ConnectionTimeoutError
        return await connect(*arguments)

    monkeypatch.setattr(aiohttp.TCPConnector, "_create_connection", slow)
    async with answering(OK + b"Content-Length: 0\r\n\r\n") as url:
        async with Upstreams(Lagging(times)) as upstreams:
            if served:
                assert await whole(upstreams, url) == b""
            else:
                with pytest.raises(Unreachable, match="no connection within"):
                    await whole(upstreams, url)


@pytest.mark.spec("FLEET-76")
async def test_an_answer_that_came_while_the_loop_was_held_up_counts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(OK + b"Content-Length: 0\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        clock = Clock()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with Upstreams(clock) as upstreams:
            with clock.watching():
                asking = asyncio.create_task(upstreams.fetch("GET", url, seconds=0.3))
                asyncio.get_running_loop().call_soon(time.sleep, 3 * LAG_SECONDS)
                assert (await asking)[0] == 200
        listener.shutdown(socket.SHUT_RDWR)
