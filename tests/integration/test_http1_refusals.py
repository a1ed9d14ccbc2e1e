"""A request that is malformed, or that others could read as two, is refused by either server.

What Hypercorn's own HTTP/1 does not refuse is in `HYPERCORN_ACCEPTS`, as in OPERATION-15.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable

import pytest
from hypercorn.asyncio import run as worker
from hypercorn.asyncio.tcp_server import TCPServer

from ollama_coordinator.http1 import connection as implementation
from ollama_coordinator.http1 import hypercorn_hook
from ollama_coordinator_common.settings import HTTP_CHOICES
from support.asgi import Client, Shows, connection
from support.coordinator import serving

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
NEXT = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"

MALFORMED = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
    "no version": b"GET /\r\n\r\n",
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "two Hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "no length": HEAD + b"Content-Length: many\r\n\r\n",
    "a negative length": HEAD + b"Content-Length: -1\r\n\r\n",
    "a length with a sign": HEAD + b"Content-Length: +3\r\n\r\nabc",
    "two lengths": HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "two lengths in one": HEAD + b"Content-Length: 3, 4\r\n\r\nabcd",
    "a space before the colon": HEAD + b"Content-Length : 3\r\n\r\nabc",
    "no colon": HEAD + b"Content-Length\r\n\r\n",
    "no name": HEAD + b": a\r\n\r\n",
    "NUL": HEAD + b"A: b\0c\r\n\r\n",
    "a strange coding": HEAD + b"Transfer-Encoding: gzip\r\n\r\n",
    "two codings": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "no chunk size": CHUNKED + b"xyz\r\n",
}

SMUGGLED = {
    "length and coding": HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "coding and length": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "the same length twice": HEAD + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "chunked twice": HEAD + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n0\r\n\r\n",
    "a hidden coding": HEAD + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "chunked in HTTP/1.0": b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a folded header": HEAD + b"A: b\r\n c\r\n\r\n",
    "a folded coding": HEAD + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "a line that ends in LF": HEAD + b"A: b\nContent-Length: 3\r\n\r\nabc",
    "a line that ends in CR": HEAD + b"A: b\rContent-Length: 3\r\n\r\nabc",
    "a head that ends in LF": b"POST / HTTP/1.1\nHost: x\n\n",
    "control characters": HEAD + b"A: b\x01c\r\n\r\n",
    "a chunk that ends in LF": CHUNKED + b"3\nabc\n0\n\n",
    "a chunk longer than it says": CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n",
    "an extension with LF": CHUNKED + b"3;a\nabc\r\n0\r\n\r\n",
    "a huge chunk": CHUNKED + b"fffffffffffffffff\r\nabc\r\n",
    "a hexadecimal chunk": CHUNKED + b"0x3\r\nabc\r\n0\r\n\r\n",
    "a length as trailer": CHUNKED + b"0\r\nContent-Length: 5\r\n\r\n",
    "another expectation": HEAD + b"Expect: more\r\nContent-Length: 3\r\n\r\nabc",
    "CONNECT": b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n",
    "HTTP/2 outright": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/3": b"GET / HTTP/3.0\r\nHost: x\r\n\r\n",
    "HTTP/0.9": b"GET / HTTP/0.9\r\n\r\n",
    "two spaces before the target": b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n",
    "two spaces after the target": b"GET /  HTTP/1.1\r\nHost: x\r\n\r\n",
    "a Host with a space": b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
    "a path with a broken escape": b"GET /api/%zz HTTP/1.1\r\nHost: x\r\n\r\n",
    "a path that ends in an escape": b"GET /a%2 HTTP/1.1\r\nHost: x\r\n\r\n",
    "a Host with a path": b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
    "a Host that is no name": b"GET / HTTP/1.1\r\nHost: <\xff>\r\n\r\n",
}

REFUSED = {400, 405, 417, 431, 501, 505}

HYPERCORN_ACCEPTS = {
    "a path with a broken escape",
    "a path that ends in an escape",
    "length and coding",
    "coding and length",
    "the same length twice",
    "chunked in HTTP/1.0",
    "a folded header",
    "a folded coding",
    "a line that ends in LF",
    "a head that ends in LF",
    "control characters",
    "a huge chunk",
    "a length as trailer",
    "another expectation",
    "CONNECT",
    "HTTP/2 outright",
    "HTTP/3",
    "HTTP/0.9",
    "two spaces before the target",
    "two spaces after the target",
    "a Host with a space",
    "a Host with a path",
    "a Host that is no name",
}

AUTO = pytest.mark.parametrize("http", ["auto"])
"""What only our HTTP/1 does; a comment says what Hypercorn's does instead."""


@pytest.fixture
def shows() -> Shows:
    return Shows()


@pytest.fixture(params=HTTP_CHOICES)
def http(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def client(http: str, shows: Shows) -> AsyncIterator[Client]:
    """A connection to a server."""
    async with serving(shows, http) as url, connection(url) as client:
        shows.requests.clear()
        yield client


@pytest.mark.spec("OPERATION-15")
@pytest.mark.parametrize("what", MALFORMED)
async def test_what_is_malformed_is_refused(shows: Shows, http: str, what: str) -> None:
    async with serving(shows, http) as url, connection(url) as client:
        shows.requests.clear()
        client.send(MALFORMED[what], NEXT)
        got = await client.ends()
    assert int(got[9:12]) in REFUSED
    assert got.count(b"HTTP/1.1 ") == 1
    assert not shows.requests


@pytest.mark.spec("OPERATION-15")
@pytest.mark.parametrize("what", SMUGGLED)
async def test_nothing_is_smuggled(client: Client, shows: Shows, http: str, what: str) -> None:
    if http == "hypercorn" and what in HYPERCORN_ACCEPTS:
        pytest.skip("Hypercorn's own HTTP/1 accepts it")
    client.send(SMUGGLED[what], NEXT)
    got = await client.ends()
    assert int(got[9:12]) in REFUSED
    assert got.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in got
    assert not shows.requests


@AUTO  # Hypercorn's refusals have no body.
@pytest.mark.spec("OPERATION-15")
async def test_the_answers_before_a_refusal_arrive(client: Client) -> None:
    client.send(b"GET /chunks HTTP/1.1\r\nHost: x\r\n\r\n", b"nonsense\r\n\r\n")
    assert (await client.answer()).body == b"one two three"
    refusal = await client.answer()
    assert refusal.status == 400
    assert refusal.body.startswith(b"400 Bad Request: ")
    assert await client.ends() == b""


@pytest.mark.spec("OPERATION-15")
@pytest.mark.parametrize("head", [b"A: %b\r\n" % (b"b" * 200_000), b"A: b\r\n" * 40_000])
async def test_a_head_without_measure_is_refused(http: str, head: bytes, shows: Shows) -> None:
    async with serving(shows, http) as url, connection(url) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: x\r\n", head, b"\r\n")
        assert (await client.head())[0] == 431


@pytest.mark.spec("OPERATION-15")
@pytest.mark.parametrize(
    "endless",
    [
        CHUNKED + b"3;" + b"a" * 200_000,
        CHUNKED + b"0\r\nA: " + b"b" * 200_000,
        b"GET /" + b"a" * 200_000,
        b"\r\n" * 100_000,
    ],
    ids=["extension", "trailer", "target", "nothing"],
)
async def test_nothing_else_grows_without_measure(client: Client, endless: bytes) -> None:
    client.send(endless)
    assert (await client.head())[0] in (400, 431)


@AUTO  # Hypercorn reads the rest of the body, and keeps the connection.
@pytest.mark.spec("OPERATION-15")
async def test_a_refusal_reaches_a_client_that_still_sends(client: Client) -> None:
    client.send(b"POST /refuse HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n")
    for _ in range(20):
        client.send(bytes(65536))
    answer = await client.answer()
    assert answer.status == 413
    assert answer.headers["connection"] == "close"
    assert answer.body == b"too large"


@AUTO  # Hypercorn waits for 180 seconds.
@pytest.mark.spec("OPERATION-13")
async def test_a_head_in_drops_is_not_waited_for(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(implementation, "HEAD_SECONDS", 0.3)
    began = asyncio.get_running_loop().time()
    client.send(b"GET / HTTP/1.1\r\n")
    closed = asyncio.ensure_future(client.ends())
    while not closed.done():
        client.send(b"a: b\r\n")
        await asyncio.sleep(0.05)
    assert asyncio.get_running_loop().time() - began < 3


@AUTO  # Hypercorn takes the absolute form for a path.
@pytest.mark.spec("OPERATION-10")
@pytest.mark.parametrize(
    "target", [b"/echo?a=b", b"http://x/echo?a=b", b"http://x?a=b", b"/%65cho?a=b"]
)
async def test_every_form_of_a_target_is_understood(client: Client, target: bytes) -> None:
    client.send(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % target)
    assert (await client.answer()).json["query"] == "a=b"


@AUTO  # Hypercorn accepts the offer.
@pytest.mark.spec("OPERATION-10")
@pytest.mark.parametrize("offer", [b"h2c", b"websocket"])
async def test_an_offer_to_upgrade_is_passed_over(client: Client, offer: bytes) -> None:
    more = b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: a\r\nHTTP2-Settings: AAMAAABk\r\n"
    head = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: %b\r\n" % offer
    for _ in range(2):
        client.send(head + more + b"\r\n")
        assert (await client.answer()).json["body"] == ""


@AUTO  # Hypercorn sends it in a packet of its own.
@pytest.mark.spec("OPERATION-10")
async def test_the_head_goes_out_with_the_first_piece(client: Client, shows: Shows) -> None:
    client.send(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
    got = await client.reader.read(65536)
    assert got.endswith(b"\r\n\r\n6\r\nfirst \r\n")
    # From Python 3.12 on, a closing server waits for every answer that still runs.
    shows.release.set()
    assert (await client.reader.readuntil(b"0\r\n\r\n")).startswith(b"4\r\nlast")


@AUTO  # Hypercorn's closes it.
@pytest.mark.spec("OPERATION-10")
@pytest.mark.parametrize("path", [b"echo", b"chunks"])
async def test_http_1_0_keeps_a_connection_where_the_client_asks_for_it(
    client: Client, path: bytes
) -> None:
    client.send(b"GET /%b HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" % path)
    answer = await client.answer()
    assert answer.status == 200
    if path == b"chunks":  # whose end would not be seen
        assert await client.ends() == b""
        return
    assert answer.headers["connection"] == "keep-alive"
    client.send(GET)
    assert (await client.answer()).status == 200


@AUTO  # Hypercorn's reads the rest of any body.
@pytest.mark.spec("OPERATION-10")
@pytest.mark.parametrize("length", [1, 256 * 1024])
async def test_a_small_body_that_nobody_reads_is_read_and_the_connection_kept(
    client: Client, length: int
) -> None:
    client.send(b"POST /refuse HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % length)
    assert (await client.answer()).status == 413  # before any of the body
    client.send(b"x" * length, GET)
    assert (await client.answer()).status == 200


@AUTO
@pytest.mark.spec("OPERATION-10")
@pytest.mark.parametrize(
    "more",
    [
        b"Content-Length: 262145\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 3\r\nExpect: 100-continue\r\n",
    ],
    ids=["large", "of unknown length", "not asked for"],
)
async def test_the_connection_ends_where_a_body_that_nobody_reads_may_not_end(
    client: Client, more: bytes
) -> None:
    client.send(b"POST /refuse HTTP/1.1\r\nHost: x\r\n", more, b"\r\n")
    answer = await client.answer()
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    assert await client.ends() == b""


# ── the hook ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.spec("OPERATION-16")
async def test_this_release_of_hypercorn_fits(shows: Shows) -> None:
    # When this fails, Hypercorn's worker has changed: see http1/hypercorn_hook.py. Until that
    # follows, everything works with Hypercorn's own HTTP/1.
    own = vars(worker)["TCPServer"]
    async with serving(shows):
        assert vars(worker)["TCPServer"] is not own
    assert vars(worker)["TCPServer"] is own


def _without_httptools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ollama_coordinator.http1.connection", None)


def _with_other_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hypercorn_hook, "PARAMETERS", ["app", "connection"])


def _with_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hypercorn_hook, "HYPERCORNS", hypercorn_hook._absent)


def _with_another_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "TCPServer", type("TCPServer", (TCPServer,), {}))


@pytest.mark.spec("OPERATION-16")
@pytest.mark.parametrize(
    "trouble",
    [_without_httptools, _with_other_parameters, _with_another_name, _with_another_hook],
)
async def test_where_the_hook_does_not_fit_hypercorn_serves(
    shows: Shows,
    trouble: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trouble(monkeypatch)
    async with serving(shows) as url, connection(url) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"HTTP/1.1 200 \r\n" in await client.reader.readuntil(b"\r\n")
    assert "serving with Hypercorn's own HTTP/1" in caplog.text
