"""Addresses, and who may use the relay."""

import socket

import pytest

from ollama_coordinator_agent.reach import accepts, coordinator_address, resolve
from ollama_coordinator_agent.relay import TcpRelay, parse_networks
from ollama_coordinator_common.network import is_loopback, local_address


@pytest.mark.spec("AGENT-11")
def test_the_address_towards_a_loopback_coordinator_is_loopback() -> None:
    assert local_address(["127.0.0.1"], 8080) == "127.0.0.1"


@pytest.mark.spec("AGENT-11")
def test_an_address_without_a_route_is_passed_over() -> None:
    assert local_address(["not an address", "127.0.0.1"], 8080) == "127.0.0.1"
    assert local_address([], 8080) is None


@pytest.mark.spec("AGENT-11")
async def test_a_host_that_does_not_resolve_has_no_addresses() -> None:
    assert "127.0.0.1" in await resolve("localhost", 8080)
    assert await resolve("no-such-host.invalid", 8080) == []
    assert await resolve("x" * 300, 8080) == []


@pytest.mark.spec("AGENT-37")
async def test_a_port_accepts_while_somebody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert await accepts("127.0.0.1", port)
    assert not await accepts("127.0.0.1", port)


@pytest.mark.spec("AGENT-16")
@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://coordinator:8080", ("coordinator", 8080)),
        ("http://coordinator/base/", ("coordinator", 80)),
        ("https://coordinator", ("coordinator", 443)),
        ("http://[2001:db8::1]:8080", ("2001:db8::1", 8080)),
    ],
)
def test_where_a_url_leads(url: str, address: tuple[str, int]) -> None:
    assert coordinator_address(url) == address


@pytest.mark.spec("AGENT-37")
def test_which_hosts_are_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.0.1", "::1", "localhost", "::ffff:127.0.0.1")))
    assert not any(map(is_loopback, ("192.168.1.2", "coordinator", "fe80::1%eth0")))


@pytest.mark.spec("AGENT-41")
@pytest.mark.parametrize(
    ("peer", "passes"),
    [
        ("192.0.2.10", True),
        ("::ffff:192.0.2.10", True),
        ("10.1.2.3", True),
        ("2001:db8::5", True),
        ("127.0.0.1", True),
        ("192.0.2.7", True),
        ("192.0.2.11", False),
        ("11.0.0.1", False),
        ("2001:db9::5", False),
        ("", False),
    ],
)
def test_who_may_use_the_relay(peer: str, passes: bool) -> None:
    relay = TcpRelay("127.0.0.1", 11434, parse_networks(["10.0.0.0/8", " 2001:db8::/32", ""]))
    relay.admit_coordinator(["192.0.2.10"])
    assert relay.is_allowed(peer, local="192.0.2.7") is passes
