"""Addresses that people type, and what goes wrong with connections."""

import asyncio
import errno
import socket
import ssl
from ipaddress import ip_address

import pytest

from ollama_coordinator_common.network import (
    cause_of,
    coordinator_url,
    is_address,
    public_address,
)
from support.deadline import DEADLINE_SECONDS


@pytest.mark.spec("DASH-35")
@pytest.mark.parametrize(
    ("bound", "told"),
    [
        ("127.0.0.1", None),
        ("::1", None),
        ("localhost", None),
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8::7", "[2001:db8::7]"),
        ("gpu-1.lan", "gpu-1.lan"),
    ],
)
def test_one_address_is_told_as_it_is_unless_it_is_loopback(bound: str, told: str | None) -> None:
    assert public_address(bound) == told


@pytest.mark.spec("DASH-35")
@pytest.mark.parametrize("bound", ["0.0.0.0", "::", ""])
def test_of_all_addresses_one_is_told_that_others_can_use(bound: str) -> None:
    told = public_address(bound)
    if told is not None:  # a machine without a network has none
        address = ip_address(told.strip("[]"))
        assert not address.is_unspecified
        assert not address.is_loopback
        assert (":" in told) == told.startswith("[")


@pytest.mark.spec("AGENT-3")
@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("coordinator", "http://coordinator:8080"),
        ("10.77.0.10:9000", "http://10.77.0.10:9000"),
        ("::1", "http://[::1]:8080"),
        ("[::1]:9000", "http://[::1]:9000"),
        ("coordinator/k/oc_abc", "http://coordinator:8080/k/oc_abc"),
        ("http://coordinator/", "http://coordinator"),
        ("https://example.org/below/", "https://example.org/below"),
    ],
)
def test_a_coordinators_url_is_taken_as_ollama_takes_its_host(written: str, meant: str) -> None:
    assert coordinator_url(written) == meant


@pytest.mark.spec("AGENT-3")
@pytest.mark.parametrize("written", ["", "ftp://c", "c:99999", "http://[::1", "two words", "://c"])
def test_what_is_no_coordinators_url_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match="give a URL such as http://coordinator:8080"):
        coordinator_url(written)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("192.168.1.20", True), ("gpu-1.lan", True), ("4090", False), ("300.1.1.1", False)],
)
def test_a_number_at_the_end_of_a_name_makes_it_no_address(text: str, expected: bool) -> None:
    assert is_address(text) is expected


def wrapped(inner: OSError) -> Exception:
    """As aiohttp wraps what the system said."""
    outer = Exception("Cannot connect to host c:1 ssl:default")
    outer.os_error = inner  # type: ignore[attr-defined]
    return outer


def unverified(code: int) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code = code
    return error


BOTH_REFUSED = "Multiple exceptions: " + ", ".join(
    f"[Errno {errno.ECONNREFUSED}] Connect call failed ('{host}', 8080)"
    for host in ("::1", "127.0.0.1")
)


@pytest.mark.spec("AGENT-62")
@pytest.mark.parametrize(
    ("error", "clause"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "x"), "connection refused"),
        (wrapped(ConnectionRefusedError()), "connection refused"),
        (OSError(BOTH_REFUSED), "connection refused"),
        (OSError(errno.EHOSTUNREACH, "No route to host"), "unreachable"),
        (OSError(errno.ENETUNREACH, "x"), "no route to its network"),
        (OSError(errno.EPERM, "x"), "a firewall of this machine"),
        (TimeoutError(), "no answer in time"),
        (ConnectionResetError(), "reset the connection"),
        (socket.gaierror(socket.EAI_NONAME, "x"), "host name is not found"),
        (socket.gaierror(socket.EAI_AGAIN, "x"), "no name server answers"),
        (unverified(10), "has expired, or this machine's clock is ahead"),
        (unverified(9), "clock behind"),
        (unverified(18), "vouched for by nobody"),
        (unverified(62), "another host's"),
        (unverified(23), "not believed"),
        (ssl.SSLError(1, "handshake failure"), "TLS fails: handshake failure"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "Permission denied: /x/y"),
        (asyncio.InvalidStateError(), "invalid state error"),
    ],
)
def test_an_error_is_told_by_its_cause(error: Exception, clause: str) -> None:
    assert clause in cause_of(error)
    assert not any(piece in cause_of(error) for piece in ("Errno", "Error(", "SSL:"))


@pytest.mark.spec("AGENT-62")
async def test_what_the_system_really_says_is_told_by_its_cause() -> None:
    with socket.create_server(("127.0.0.1", 0)) as plain:
        port = plain.getsockname()[1]
        plain.settimeout(DEADLINE_SECONDS)
        calling = asyncio.open_connection("127.0.0.1", port, ssl=ssl.create_default_context())
        task = asyncio.create_task(calling)
        peer, _ = await asyncio.to_thread(plain.accept)
        peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        with pytest.raises(ssl.SSLError) as spoken:
            await task
        peer.close()
    assert cause_of(spoken.value) == "it speaks no TLS there: http in place of https?"
    with pytest.raises(OSError, match="127") as refused:
        await asyncio.open_connection("127.0.0.1", port)
    assert cause_of(refused.value).startswith("connection refused")
