"""Machines that sleep: who is asleep, what wakes it, and where that goes."""

import pytest
from msgspec import structs

from ollama_coordinator.registry import Registry
from ollama_coordinator.wake import EVERYBODY, broadcasts, magic_packet, place_of
from ollama_coordinator_common.types import AgentStatus
from unit.coordinator.test_registry import TIMEOUT, add, machine, register, report

MAC = "00:1a:2b:3c:4d:5e"


@pytest.mark.spec("FLEET-83")
def test_a_magic_packet_has_six_bytes_of_255_and_the_number_sixteen_times() -> None:
    packet = magic_packet(MAC)
    assert packet[:6] == b"\xff" * 6
    assert packet[6:] == bytes([0x00, 0x1A, 0x2B, 0x3C, 0x4D, 0x5E]) * 16


@pytest.mark.spec("FLEET-83")
@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("192.168.1.255", ("192.168.1.255", 9)),
        ("192.168.1.255:7", ("192.168.1.255", 7)),
        ("[ff02::1]:9", ("ff02::1", 9)),
        ("ff02::1", ("ff02::1", 9)),
    ],
)
def test_where_packets_go_is_an_address_with_or_without_a_port(
    text: str, place: tuple[str, int]
) -> None:
    assert place_of(text) == place


@pytest.mark.spec("FLEET-83")
@pytest.mark.parametrize("text", ["", "desk", "192.168.1.255:0", "192.168.1.255:x", "1.2.3.4:5:6"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        place_of(text)


@pytest.mark.spec("FLEET-83")
@pytest.mark.parametrize(
    ("reported", "found"),
    [
        ("192.168.1.255", ["192.168.1.255", EVERYBODY]),
        ("8.8.8.8", [EVERYBODY]),  # no agent has the coordinator send packets out of the network
        ("desk.example", [EVERYBODY]),
        (None, [EVERYBODY]),
    ],
)
def test_packets_go_to_the_machines_own_network(reported: str | None, found: list[str]) -> None:
    request = machine()
    agent = register(Registry(TIMEOUT), structs.replace(request, mac=MAC, broadcast=reported)).agent
    assert broadcasts(agent) == found


@pytest.mark.spec("FLEET-81")
def test_a_goodbye_says_whether_the_machine_sleeps() -> None:
    registry = Registry(TIMEOUT)
    agent = add(registry, "desk")
    registry.heartbeat(report(agent, ',"leaving":true,"asleep":true'), 1.0)
    assert (agent.asleep, agent.registration.sleeps) == (True, True)
    assert agent.status(1.0, TIMEOUT) is AgentStatus.OFFLINE
    registry.heartbeat(report(agent), 2.0)
    assert (agent.asleep, agent.status(2.0, TIMEOUT)) == (False, AgentStatus.ONLINE)
    registry.heartbeat(report(agent, ',"leaving":true'), 3.0)
    assert (agent.asleep, agent.registration.sleeps) == (False, False)


@pytest.mark.spec("FLEET-82")
def test_only_one_that_sleeps_and_has_a_card_is_woken() -> None:
    registry = Registry(TIMEOUT)
    plain = add(registry, "plain")
    agent = register(registry, structs.replace(machine("desk", "10.0.0.9"), mac=MAC)).agent
    for one in (plain, agent):
        registry.heartbeat(report(one, ',"leaving":true,"asleep":true'), 1.0)
    assert (plain.can_wake(2.0), agent.can_wake(2.0)) == (False, True)
    agent.left_alone_until = 600.0
    assert (agent.can_wake(599.0), agent.can_wake(600.0)) == (False, True)
