"""Which headers pass, and which end here."""

import pytest

from ollama_coordinator.api.http.headers import (
    first,
    served_by,
    to_client,
    to_ollama,
)

HOP_BY_HOP = [
    b"Connection", b"Keep-Alive", b"Proxy-Authenticate", b"Proxy-Authorization",
    b"Proxy-Connection", b"TE", b"Trailer", b"Transfer-Encoding", b"Upgrade",
]  # fmt: skip
FOR_US_ALONE = [
    b"Host", b"Origin", b"Referer", b"Authorization", b"Cookie", b"X-API-Key", b"Forwarded",
    b"X-Forwarded-For", b"X-Forwarded-Host", b"X-Forwarded-Proto", b"X-Real-IP",
    b"Content-Length", b"Expect", b"Accept-Encoding",
]  # fmt: skip
FROM_OLLAMA_ALONE = [
    b"Content-Length", b"Date", b"Server", b"Access-Control-Allow-Origin",
    b"Access-Control-Expose-Headers", b"Set-Cookie", b"Clear-Site-Data", b"Location", b"Refresh",
    b"Strict-Transport-Security", b"WWW-Authenticate", b"Authentication-Info", b"Alt-Svc",
    b"X-Accel-Redirect", b"X-Ollama-Coordinator-Agent", b"X-Ollama-Coordinator-Anything",
]  # fmt: skip


@pytest.mark.parametrize("name", [*HOP_BY_HOP, *FOR_US_ALONE])
@pytest.mark.parametrize("spell", [bytes.lower, bytes.upper, bytes])
def test_what_is_not_for_ollama_ends_here(name: bytes, spell: type[bytes]) -> None:
    assert to_ollama([(spell(name), b"x")]) == []


@pytest.mark.parametrize("name", [*HOP_BY_HOP, *FROM_OLLAMA_ALONE])
@pytest.mark.parametrize("spell", [bytes.lower, bytes.upper, bytes])
def test_what_is_not_for_clients_ends_here(name: bytes, spell: type[bytes]) -> None:
    assert to_client([(spell(name), b"x")]) == []


@pytest.mark.parametrize(
    "name",
    ["Content-Type", "Content-Encoding", "Accept", "User-Agent", "anthropic-version", "X-Custom"],
)
def test_the_clients_other_headers_pass_as_they_are(name: str) -> None:
    assert to_ollama([(name.encode(), b"V; x=1")]) == [(name, "V; x=1")]


@pytest.mark.parametrize(
    "name", [b"content-type", b"cache-control", b"x-request-id", b"retry-after"]
)
def test_ollamas_other_headers_pass(name: bytes) -> None:
    assert to_client([(name.title(), b"V")]) == [(name, b"V")]


def test_headers_that_the_connection_names_end_with_it() -> None:
    connection = [(b"Connection", b"close, X-One"), (b"CONNECTION", b" x-two ")]
    sent = [*connection, (b"x-one", b"1"), (b"X-Two", b"2"), (b"x-three", b"3")]
    assert to_ollama(sent) == [("x-three", "3")]
    assert to_client(sent) == [(b"x-three", b"3")]


@pytest.mark.parametrize("value", [b"a\x01b", b"\x7f", b"a\x1b[2J", b"\x00"])
def test_no_control_character_reaches_a_client(value: bytes) -> None:
    sent = [(b"x-a", value), (b"x-b", b"a\tb")]
    assert to_client(sent) == [(b"x-b", b"a\tb")]


def test_repeated_headers_stay_repeated_and_in_order() -> None:
    sent = [(b"x-a", b"1"), (b"x-b", b"2"), (b"x-a", b"3")]
    assert to_client(iter(sent)) == sent
    assert to_ollama(iter(sent)) == [("x-a", "1"), ("x-b", "2"), ("x-a", "3")]


def test_who_served_is_told_in_plain_characters() -> None:
    assert served_by("Büro 3\r\nx: y", "r1") == [
        (b"x-ollama-coordinator-agent", b"B%C3%BCro%203%0D%0Ax%3A%20y"),
        (b"x-ollama-coordinator-request", b"r1"),
    ]


def test_the_first_value_of_a_header_counts() -> None:
    headers = [(b"a", b"1"), (b"b", b"\xe4"), (b"b", b"2")]
    assert first(headers, b"b") == "ä"
    assert first(headers, b"c") is None
