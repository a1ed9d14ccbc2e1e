"""What clients may rely on from the HTTP/1 server, whichever of the two it is."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest

from ollama_coordinator_common.settings import HTTP_CHOICES
from support.asgi import Client, Shows, connection
from support.coordinator import serving
from support.deadline import DEADLINE_SECONDS

GET = b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /%b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b"


def get(path: bytes = b"") -> bytes:
    return GET % path


def post(path: bytes, body: bytes) -> bytes:
    return POST % (path, len(body), body)


@pytest.fixture(params=HTTP_CHOICES)
def http(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def shows() -> Shows:
    return Shows()


@pytest.fixture
async def url(http: str, shows: Shows) -> AsyncIterator[str]:
    async with serving(shows, http) as url:
        shows.requests.clear()
        yield url


@pytest.fixture
async def client(url: str) -> AsyncIterator[Client]:
    async with connection(url) as client:
        yield client


# ── requests and answers ──────────────────────────────────────────────────────────────────────


@pytest.mark.spec("OPERATION-10")
async def test_a_connection_serves_one_request_after_the_other(client: Client) -> None:
    for number in range(3):
        body = b"%d" % number * 100_000
        client.send(post(b"echo?n=1", body))
        answer = await client.answer()
        assert answer.status == 200
        assert answer.json["body"] == body.decode()
        assert answer.json["query"] == "n=1"
        assert answer.json["version"] == "1.1"


@pytest.mark.spec("OPERATION-10")
async def test_pipelined_requests_are_answered_in_order(client: Client, shows: Shows) -> None:
    client.send(get(b"chunks"), post(b"echo", b"two"), get(b"none"), get(b"echo?4"))
    assert (await client.answer()).body == b"one two three"
    assert (await client.answer()).json["body"] == "two"
    assert (await client.answer(bodiless=True)).status == 204
    assert (await client.answer()).json["query"] == "4"


@pytest.mark.spec("OPERATION-10")
async def test_a_thousand_pipelined_requests_are_answered(client: Client) -> None:
    client.send(get(b"none") * 1000)
    for _ in range(1000):
        assert (await client.answer(bodiless=True)).status == 204


@pytest.mark.spec("OPERATION-10")
async def test_chunked_bodies_are_joined_and_their_extras_dropped(client: Client) -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    client.send(head, b'3;a=b\r\nabc\r\n2;c="d"\r\nde\r\n0\r\nTrailer: x\r\n\r\n', get(b"none"))
    told = (await client.answer()).json
    assert told["body"] == "abcde"
    assert "trailer" not in dict(told["headers"])
    assert (await client.answer(bodiless=True)).status == 204


@pytest.mark.spec("OPERATION-10")
async def test_header_names_are_lower_case_and_values_trimmed(client: Client) -> None:
    client.send(b"GET / HTTP/1.1\r\nHOST: x\r\nX-A:  b c \t\r\nX-Empty:\r\nX-High: \xe9\r\n\r\n")
    headers = (await client.answer()).json["headers"]
    assert headers == [["host", "x"], ["x-a", "b c"], ["x-empty", ""], ["x-high", "é"]]


@pytest.mark.spec("OPERATION-10")
@pytest.mark.parametrize(
    ("request_line", "status"),
    [(b"HEAD /echo", 200), (b"HEAD /chunks", 200), (b"GET /none", 204), (b"GET /unchanged", 304)],
)
async def test_answers_without_a_body_have_none(
    client: Client, request_line: bytes, status: int
) -> None:
    client.send(request_line + b" HTTP/1.1\r\nHost: x\r\n\r\n", get(b"echo?next"))
    assert (await client.answer(bodiless=True)).status == status
    assert (await client.answer()).json["query"] == "next"


@pytest.mark.spec("OPERATION-10")
async def test_the_length_is_told_or_the_body_chunked(client: Client) -> None:
    client.send(get(b"echo"), get(b"chunks"))
    assert "transfer-encoding" not in (await client.answer()).headers
    assert (await client.answer()).headers["transfer-encoding"] == "chunked"


@pytest.mark.spec("OPERATION-10")
@pytest.mark.parametrize("path", [b"echo", b"chunks"])
async def test_http_1_0_gets_no_chunks_and_the_connection_closes(
    client: Client, path: bytes
) -> None:
    client.send(b"GET /%b HTTP/1.0\r\n\r\n" % path)
    answer = await client.answer()
    assert answer.status == 200
    assert "transfer-encoding" not in answer.headers
    assert answer.body == b"one two three" or answer.json["version"] == "1.0"
    assert await client.ends() == b""


@pytest.mark.spec("OPERATION-10")
async def test_connection_close_is_obeyed(client: Client, shows: Shows) -> None:
    client.send(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", get(b"none"))
    answer = await client.answer()
    assert answer.headers["connection"].lower() == "close"
    assert await client.ends() == b""
    assert len(shows.requests) == 1


@pytest.mark.spec("OPERATION-10")
async def test_a_client_that_asks_first_is_told_to_go_on(client: Client) -> None:
    client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
    assert (await client.head())[0] == 100
    client.send(b"abc")
    assert (await client.answer()).json["body"] == "abc"


@pytest.mark.spec("OPERATION-10")
async def test_an_offer_of_http_2_with_a_body_is_passed_over(client: Client) -> None:
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    head = b"POST / HTTP/1.1\r\nHost: x\r\n" + offer
    client.send(head + b"Content-Length: 3\r\n\r\nabc")
    assert (await client.answer()).json["body"] == "abc"
    client.send(head + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", get(b"none"))
    assert (await client.answer()).json["body"] == "abc"
    assert (await client.answer(bodiless=True)).status == 204


@pytest.mark.spec("OPERATION-10")
async def test_a_connection_ends_after_its_most_requests(http: str, shows: Shows) -> None:
    async with serving(shows, http, keep_alive_max_requests=3) as url, connection(url) as client:
        for _ in range(20):
            client.send(get())
            if (await client.answer()).headers.get("connection", "").lower() == "close":
                break
        assert len(shows.requests) <= 6
        assert await client.ends() == b""


# ── waiting, leaving, ending ──────────────────────────────────────────────────────────────────


@pytest.mark.spec("OPERATION-11")
async def test_a_departure_is_told_to_the_application(url: str, shows: Shows) -> None:
    async with connection(url) as client:
        client.send(post(b"wait", b"{}"))
        await asyncio.sleep(0.1)
        assert not shows.departed.is_set()
    async with asyncio.timeout(DEADLINE_SECONDS):
        await shows.departed.wait()


@pytest.mark.spec("OPERATION-11")
async def test_a_departure_within_the_body_is_told_too(url: str, shows: Shows) -> None:
    async with connection(url) as client:
        client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
        await asyncio.sleep(0.1)
    async with asyncio.timeout(DEADLINE_SECONDS):
        await shows.departed.wait()
    assert not shows.requests


@pytest.mark.spec("OPERATION-11")
async def test_who_closes_its_half_still_gets_an_answer(client: Client) -> None:
    client.send(get(b"echo"))
    client.writer.write_eof()
    assert (await client.answer()).status == 200
    assert await client.ends() == b""


@pytest.mark.spec("OPERATION-12")
async def test_a_client_that_does_not_read_makes_the_application_wait(
    client: Client, shows: Shows
) -> None:
    client.send(get(b"flood"))
    sent = -1
    while sent != shows.sent:  # until nothing moves any more
        sent = shows.sent
        await asyncio.sleep(0.3)
    assert sent < 30 * 1024 * 1024  # what the sockets hold, and not much more
    answer = await client.answer()
    assert len(answer.body) == 100 * 1024 * 1024


@pytest.mark.spec("OPERATION-12")
async def test_a_body_that_nobody_reads_stays_at_the_client(url: str, shows: Shows) -> None:
    size = 100 * 1024 * 1024
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port)) as sock:
        sock.sendall(b"POST /deaf HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size)
        sock.setblocking(False)
        taken = await _push(sock, size)
        assert taken < 30 * 1024 * 1024
        shows.release.set()
        async with asyncio.timeout(DEADLINE_SECONDS):
            await asyncio.get_running_loop().sock_sendall(sock, bytes(size - taken))
            answer = await asyncio.get_running_loop().sock_recv(sock, 65536)
        assert answer.endswith(str(size).encode())


async def _push(sock: socket.socket, size: int) -> int:
    """Send until nothing more is taken for a while; how much it was."""
    taken, refusals = 0, 0
    while taken < size and refusals < 30:
        try:
            taken += sock.send(bytes(min(65536, size - taken)))
            refusals = 0
        except BlockingIOError:
            refusals += 1
            await asyncio.sleep(0.01)
    return taken


@pytest.mark.spec("OPERATION-10")
async def test_what_is_sent_early_arrives_early(client: Client, shows: Shows) -> None:
    client.send(get(b"late"))
    assert (await client.head())[0] == 200
    shows.release.set()
    assert b"late" in await client.reader.read(100)
    client.send(get(b"slow"))
    assert (await client.answer()).body == b"first last"


@pytest.mark.spec("OPERATION-13")
async def test_an_idle_connection_is_closed(http: str, shows: Shows) -> None:
    async with serving(shows, http, keep_alive_timeout=0.3) as url, connection(url) as client:
        client.send(get())
        await client.answer()
        assert await client.ends() == b""


@pytest.mark.spec("OPERATION-13")
@pytest.mark.parametrize("begun", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\nA: b"])
async def test_a_head_that_never_ends_is_not_waited_for(
    http: str, shows: Shows, begun: bytes
) -> None:
    async with serving(shows, http, keep_alive_timeout=0.3) as url, connection(url) as client:
        client.send(begun)
        assert await client.ends() == b""


@pytest.mark.spec("OPERATION-13")
async def test_an_answer_may_take_longer_than_an_idle_connection(http: str, shows: Shows) -> None:
    async with serving(shows, http, keep_alive_timeout=0.2) as url, connection(url) as client:
        client.send(get(b"slow"))
        await asyncio.sleep(0.6)
        shows.release.set()
        assert (await client.answer()).body == b"first last"


@pytest.mark.spec("OPERATION-14")
async def test_stopping_lets_answers_end_and_idle_connections_go(http: str, shows: Shows) -> None:
    server = serving(shows, http, graceful_timeout=10)
    url = await server.__aenter__()
    async with connection(url) as busy, connection(url) as idle:
        idle.send(get())
        await idle.answer()
        busy.send(get(b"slow"))
        await busy.head()
        stopping = asyncio.ensure_future(server.__aexit__(None, None, None))
        assert await idle.ends() == b""
        assert not stopping.done()
        shows.release.set()
        assert b"last" in await busy.ends()
        await asyncio.wait_for(stopping, DEADLINE_SECONDS)


@pytest.mark.spec("OPERATION-14")
@pytest.mark.parametrize("path", [b"fail", b"break", b"short", b"inject"])
async def test_a_failing_application_looks_like_no_success(
    client: Client, path: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    client.send(get(path))
    got = await client.ends()
    assert b"HTTP/1.1 500" in got or not got.endswith(b"0\r\n\r\n")
    assert b"set-cookie" not in got
