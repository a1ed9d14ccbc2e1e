"""Wakes machines that sleep, by magic packets (Wake-on-LAN), for requests that only they can serve.

A magic packet is six bytes of 255 and sixteen times the number of the network card; it goes to all
machines of a network, and the card that has the number switches its machine on. A request waits for
that no longer than `COORDINATOR_WAKE_PATIENCE`. A machine that does not come is left alone for a
while.
"""

import ipaddress
import logging
import socket
from collections.abc import Iterable
from math import inf

from ollama_coordinator_common.error import OllamaCoordinatorError

from .dispatch import Dispatch
from .registry import AgentState

log = logging.getLogger(__name__)

PORT = 9
"""Where magic packets go by custom, `discard`; a card looks at no port."""

EVERYBODY = "255.255.255.255"
"""All machines on the network of the coordinator's usual interface."""

AGAIN_SECONDS = 5.0
"""Between two packets to a machine that has not come yet: each may be lost."""

USUAL_SECONDS = 90.0
"""How long a machine has that an operator woke, where requests wait for none."""

LEFT_ALONE_SECONDS = 600.0
"""How long no request wakes a machine that did not come: it is unplugged, or ignores packets."""


class CannotWake(OllamaCoordinatorError):
    """A machine cannot be woken; says why, and what to do."""


class Waker:
    """Sends the packets; `seconds` is how long a request waits for a machine, 0 for not at all.

    `places` are addresses, with or without a port, where packets go; empty for the broadcast
    addresses of a machine's network and of the coordinator's own.
    """

    def __init__(self, dispatch: Dispatch, *, seconds: float, places: Iterable[str] = ()) -> None:
        self._dispatch = dispatch
        self._registry = dispatch.registry
        self._clock = dispatch.clock
        self._places = [place_of(text) for text in places]
        self._sent_at: dict[str, float] = {}
        self.seconds = seconds

    @property
    def seconds(self) -> float:
        """How long a request waits for a machine to wake; 0: none is woken for it."""
        return self._registry.wake_seconds

    @seconds.setter
    def seconds(self, seconds: float) -> None:
        self._registry.wake_seconds = seconds

    def wake(self, agent: AgentState) -> None:
        """Send a magic packet to an agent's machine.

        Raises:
            CannotWake: it is awake, its card is not known, or no packet can be sent.
        """
        now = self._clock.now()
        if self._registry.is_online(agent, now):
            raise CannotWake(f"{agent.name} is awake")
        if agent.registration.mac is None:
            raise CannotWake(
                f"{agent.name} cannot be woken: the number of its network card is not known. Its"
                " agent reports it from a machine's own network, not from within a container"
            )
        self._send(agent, now)
        if agent.woken_at is None:
            agent.woken_at, agent.left_alone_until = now, -inf
            self._registry.changes += 1
            log.info("agent is woken", extra={"agent_id": agent.id, "agent": agent.name})
            self._dispatch.plan()

    def look(self, now: float) -> None:
        """Wake machines that requests wait for, and give up those that do not come."""
        for agent in self._registry:
            if agent.woken_at is not None:
                self._follow(agent, now)
        for key in self._dispatch.wanted() if self.seconds else ():
            servers = self._registry.servers(key)
            if any(agent.woken_at or self._registry.is_routable(agent, now) for agent in servers):
                continue
            asleep = [agent for agent in servers if agent.can_wake(now)]
            if asleep:
                # The preferred one, else the one that was awake last.
                self._try(max(asleep, key=lambda one: (one.settings.preference, one.heard_at)), now)

    def _follow(self, agent: AgentState, now: float) -> None:
        """Send another packet to a machine that was woken, or give it up."""
        if now - (agent.woken_at or 0.0) < (self.seconds or USUAL_SECONDS):
            if now - self._sent_at.get(agent.id, -inf) >= AGAIN_SECONDS:
                self._try(agent, now)
            return
        self._give_up(agent, now, "it did not come")

    def _try(self, agent: AgentState, now: float) -> None:
        try:
            self.wake(agent)
        except CannotWake as exc:
            self._give_up(agent, now, str(exc))

    def _give_up(self, agent: AgentState, now: float, reason: str) -> None:
        agent.woken_at, agent.left_alone_until = None, now + LEFT_ALONE_SECONDS
        self._sent_at.pop(agent.id, None)
        self._registry.changes += 1
        facts = {"agent_id": agent.id, "agent": agent.name, "reason": reason}
        log.warning("agent was not woken", extra=facts)
        self._dispatch.plan()

    def _send(self, agent: AgentState, now: float) -> None:
        """Send a packet to every place; one that arrives is enough.

        Raises:
            CannotWake: none could be sent.
        """
        packet = magic_packet(agent.registration.mac or "")
        failure: OSError | None = None
        places = self._places or [(place, PORT) for place in broadcasts(agent)]
        is_sent = False
        for host, port in places:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with socket.socket(family, socket.SOCK_DGRAM) as sender:
                sender.setblocking(False)
                sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                try:
                    sender.sendto(packet, (host, port))
                    is_sent = True
                except OSError as exc:
                    failure = exc
        if failure is not None and not is_sent:
            reason = failure.strerror or str(failure)
            raise CannotWake(f"no magic packet could be sent for {agent.name}: {reason}")
        self._sent_at[agent.id] = now


def magic_packet(mac: str) -> bytes:
    """The packet for the card with this number."""
    return b"\xff" * 6 + bytes.fromhex(mac.replace(":", "")) * 16


def broadcasts(agent: AgentState) -> list[str]:
    """Where all machines of an agent's network hear a packet.

    The address that the agent reports counts only where it is of a private network.
    """
    reported = agent.registration.broadcast or ""
    try:
        is_private = ipaddress.IPv4Address(reported).is_private
    except ValueError:
        is_private = False
    return [reported, EVERYBODY] if is_private else [EVERYBODY]


def place_of(text: str) -> tuple[str, int]:
    """The address and port of `192.168.1.255`, `192.168.1.255:7` or `[ff02::1]:9`.

    Raises:
        ValueError: it is none.
    """
    host, port = text, str(PORT)
    if text.startswith("["):
        host, _, port = text[1:].partition("]:")
    elif text.count(":") == 1:
        host, port = text.split(":")
    ipaddress.ip_address(host)
    if not (port.isdecimal() and 1 <= int(port) <= 65535):
        raise ValueError(text)
    return host, int(port)
