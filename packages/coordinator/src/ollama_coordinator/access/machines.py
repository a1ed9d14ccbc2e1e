"""KnownMachines: who speaks for an agent, which machines want to join, and which addresses may be.

What a machine registers is where the coordinator connects to, with clients' prompts. So an address
is refused that is none of another machine, or that another machine cannot vouch for; and an agent
is renewed and reported on by its own machine alone.
"""

import logging
import secrets
import time
from collections import Counter
from collections.abc import Collection
from datetime import UTC, datetime

import msgspec
from msgspec import Struct, structs
from starlette.types import Scope
from yarl import URL

from ollama_coordinator.db import Store
from ollama_coordinator.registry import AgentState, Registry, UnknownAgent, url_of
from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.handshake import relay_key
from ollama_coordinator_common.network import (
    METADATA_NAMES,
    Address,
    is_no_machine,
    is_ours,
    machine_of,
    parse_address,
)
from ollama_coordinator_common.protocol import PROOF_HEADER, RegisterRequest
from ollama_coordinator_common.types import AgentId

from .caller import Caller, Denied, caller_of, named
from .keys import Right, hash_of
from .zones import Zone, zone_of

log = logging.getLogger(__name__)

DOCUMENT = "known machines"
"""Under which name it is in the database what is known of each agent's machine: a JSON object."""

MOST_REQUESTS = 64
"""Machines that want to join. For one more, one of the address with most of them is forgotten, the
one that was silent for longest: an address that asks with ever new secrets is alone in that."""

MOST_REFUSED = 1024
"""Machines that were refused, and are not asked about again."""

LOG_SECONDS = 60.0
"""At most so often it is logged that somebody else speaks in an agent's name."""

ASK_AGAIN_SECONDS = 5.0
"""When a machine that waits to be admitted asks again."""

_HEADER = PROOF_HEADER.lower().encode()


class NotBelieved(UnknownAgent):
    """What is sent in an agent's name is not sent by its machine; an agent registers again."""

    def __init__(self, agent_id: str) -> None:
        super().__init__(
            agent_id,
            f'agent "{agent_id}" is not believed to say this: an agent is known by its secret, and '
            "a machine without one by its address; register with POST /api/agents",
        )


class UnknownJoinRequest(OllamaCoordinatorError):
    """No machine with this name, id or fingerprint wants to join."""


class KnownMachine(Struct):
    """What is known of an agent's machine: the hash of its secret, and where it spoke from."""

    secret: str = ""
    first: str = ""
    last: str = ""


class JoinRequest(Struct):
    """A machine that wants to join; `address` is where it asks from, `ip_address` what it offers.

    `fingerprint` is of its secret: its agent logs the same.
    """

    id: str
    fingerprint: str
    machine_name: str
    ip_address: str
    address: str
    asked_at: datetime
    last_asked_at: datetime
    agent_version: str | None = None
    platform: str | None = None
    admitted: bool = False


class _SavedMachines(Struct):
    machines: dict[AgentId, KnownMachine] = {}
    refused: list[str] = []
    admitted: list[tuple[str, JoinRequest]] = []


def secret_in(scope: Scope) -> str:
    """The hash of the secret that a request of an agent has; empty where it has none."""
    value = next((value for name, value in scope["headers"] if name == _HEADER), b"")
    return hash_of(value) if value else ""


class KnownMachines:
    """The fleet's machines, and those that want to join.

    A machine that is in the fleet stays in it when the first key is made: its secret, and of one
    without a secret its address, proves who it is.
    """

    def __init__(self, registry: Registry, store: Store) -> None:
        self._registry = registry
        self._store = store
        self._known: dict[AgentId, KnownMachine] = {}
        self._refused: list[str] = []
        self._requests: dict[tuple[str, str], JoinRequest] = {}
        self._strangers = 0
        self._log_again = 0.0

    async def restore(self) -> None:
        """Take over from the database what is known.

        Raises:
            DatabaseError: it cannot be read.
        """
        body = await self._store.document(DOCUMENT)
        try:
            saved = msgspec.json.decode(body or b"{}", type=_SavedMachines)
        except msgspec.DecodeError as exc:
            log.warning("what is known of machines is unreadable", extra={"reason": str(exc)})
        else:
            self._known, self._refused = saved.machines, saved.refused
            self._requests = {(secret, one.address): one for secret, one in saved.admitted}

    def note(self, agent_id: AgentId, address: str, secret: str = "") -> None:
        """An agent was believed that spoke from an address; a first secret is pinned.

        It is written behind.
        """
        machine = self._known.get(agent_id) or KnownMachine()
        changed = KnownMachine(machine.secret or secret, machine.first or address, address)
        if changed != machine:
            known = self._registry.find
            self._known = {one: at for one, at in self._known.items() if known(one) is not None}
            self._known[agent_id] = changed
            self._keep()

    def _keep(self) -> None:
        def saved() -> bytes:
            admitted = [(key[0], one) for key, one in self._requests.items() if one.admitted]
            return msgspec.json.encode(_SavedMachines(self._known, self._refused, admitted))

        self._store.note_document(DOCUMENT, saved)

    def knows(self, address: str) -> bool:
        """Whether a machine without a secret is registered at an address, or spoke from it."""
        return any(
            not self._of(agent).secret and self._is_at(agent, address) for agent in self._registry
        )

    def has_one_at(self, address: str) -> bool:
        """Whether a machine of the fleet is registered at an address, or spoke from it."""
        return any(self._is_at(agent, address) for agent in self._registry)

    def vouches(self, secret: str) -> bool:
        """Whether a secret (its hash) is that of a machine of the fleet."""
        return bool(secret) and any(self._of(agent).secret == secret for agent in self._registry)

    def believes(
        self, agent: AgentState, caller: Caller, secret: str, *instances: str | None
    ) -> bool:
        """Whether an agent's own machine speaks.

        It has the agent's secret. Where none is pinned: it is the coordinator's own machine, has a
        key, names the agent's process (which no list shows), or speaks from where the agent is
        registered, or from where it was heard before.
        """
        pinned = self._of(agent).secret
        if pinned:
            return pinned == secret  # of hashes, which nobody can choose byte by byte
        if caller.is_proven or caller.client.zone is Zone.LOOPBACK:
            return True
        known = agent.registration.instance_id
        if known is not None and known in instances:
            return True
        return self._is_at(agent, caller.client.address)

    def is_known(self, secret: str, caller: Caller) -> bool:
        """Whether a machine of the fleet may be asking."""
        return self.vouches(secret) or self.knows(caller.client.address)

    def check(self, agent: AgentState, scope: Scope, *instances: str | None) -> None:
        """Refuse what is sent in an agent's name and not by its machine, and log it.

        Raises:
            NotBelieved: it is.
        """
        caller = caller_of(scope)
        if self.believes(agent, caller, secret_in(scope), *instances):
            return
        self._strangers += 1
        if (now := time.monotonic()) >= self._log_again:
            facts = {"agent_id": agent.id, "agent": agent.name, "client": caller.client.address}
            log.warning(
                "not believed: it is not the agent's machine that speaks in its name",
                extra={**facts, "count": self._strangers},
            )
            self._log_again, self._strangers = now + LOG_SECONDS, 0
        raise NotBelieved(agent.id)

    def yields(self, agent: AgentState, host: str, caller: Caller) -> bool:
        """Whether an agent at a host is another machine's word, and that host itself speaks now."""
        machine, address = self._of(agent), caller.client.address
        return machine_of(address) == host and address not in (machine.first, machine.last)

    def ticket_key(self, agent_id: AgentId) -> str:
        """What tickets for an agent are signed with; empty where its secret is not known."""
        return (self._known.get(agent_id) or NO_MACHINE).secret

    def relay_key(self, agent: AgentState) -> str:
        """What a connection to an agent's relay begins with; empty where there is no handshake."""
        where = agent.registration
        is_asked = where.handshake and where.relay_port is not None
        return relay_key(self._of(agent).secret) if is_asked else ""

    def relay_key_at(self, url: URL) -> str:
        """The same, of the agent whose relay is at the host and port of a URL."""
        at = [agent for agent in self._registry if agent.registration.relay_port == url.port]
        for agent in sorted(at, key=lambda agent: agent.left):
            if URL(url_of(agent.registration)).host == url.host:
                return self.relay_key(agent)
        return ""

    def _of(self, agent: AgentState) -> KnownMachine:
        return self._known.get(agent.id) or NO_MACHINE

    def _is_at(self, agent: AgentState, address: str) -> bool:
        machine = self._of(agent)
        return (
            agent.host == machine_of(address)
            or agent.registration.ip_address == address
            or address in (machine.first, machine.last)
        )

    # ── who wants to join ─────────────────────────────────────────────────────────────────────

    def requests(self) -> list[JoinRequest]:
        """The machines that wait to be admitted, the first one first."""
        return [one for one in self._requests.values() if not one.admitted]

    def admits(self, secret: str, caller: Caller) -> bool:
        """Whether an operator has admitted the machine with a secret (its hash)."""
        asked = self._requests.get((secret, caller.client.address))
        return asked is not None and asked.admitted

    def joined(self, secret: str, caller: Caller) -> None:
        """A machine is in the fleet now: it does not ask any more."""
        if self._requests.pop((secret, caller.client.address), None) is not None:
            self._keep()

    def ask(self, wanted: RegisterRequest, secret: str, caller: Caller) -> Denied:
        """Note that a machine wants to join; the answer to it."""
        fingerprint, now = fingerprint_of(secret), datetime.now(UTC)
        if secret in self._refused:
            return Denied(403, f"this machine was refused (its fingerprint is {fingerprint})")
        key = secret, caller.client.address
        asked = self._requests.pop(key, None)
        if asked is None:
            if len(self._requests) >= MOST_REQUESTS:
                self._forget_one()
            asked = JoinRequest(
                id=secrets.token_hex(4),
                fingerprint=fingerprint,
                machine_name=wanted.machine_name,
                ip_address=wanted.ip_address,
                address=caller.client.address,
                asked_at=now,
                last_asked_at=now,
                agent_version=wanted.agent_version,
                platform=wanted.platform,
            )
            facts = {"machine": wanted.machine_name, "address": asked.address}
            log.warning("a machine wants to join", extra={**facts, "fingerprint": fingerprint})
        self._requests[key] = structs.replace(asked, last_asked_at=now)
        return Denied(
            403,
            f"this machine wants to join, with the fingerprint {fingerprint}: an operator admits "
            "it on the Fleet page or with `ollama-coordinator join-request admit`; or give its "
            "agent a join token (AGENT_JOIN_TOKEN)",
            retry_after=ASK_AGAIN_SECONDS,
        )

    def _forget_one(self) -> None:
        many = Counter(address for _, address in self._requests)
        [(most, _)] = many.most_common(1)
        del self._requests[next(key for key in self._requests if key[1] == most)]

    def admit(self, name: str) -> JoinRequest:
        """Let a machine join; it does when it asks again, some seconds later. Written behind.

        Raises:
            UnknownJoinRequest: none has this id, fingerprint or name.
        """
        asked = self._asking(name)
        asked.admitted = True
        self._keep()
        return asked

    def refuse(self, name: str) -> JoinRequest:
        """Never be asked about a machine again.

        Raises:
            UnknownJoinRequest: none has this id, fingerprint or name.
        """
        asked = self._asking(name)
        key = next(key for key, one in self._requests.items() if one is asked)
        del self._requests[key]
        self._refused = [*self._refused, key[0]][-MOST_REFUSED:]
        self._keep()
        return asked

    def _asking(self, name: str) -> JoinRequest:
        found = [
            one for one in self.requests() if name in (one.id, one.fingerprint, one.machine_name)
        ]
        if len(found) != 1:
            what = "several machines are called" if found else "no machine wants to join that is"
            raise UnknownJoinRequest(f"{what} '{name}'; `ollama-coordinator join-request list`")
        return found[0]


NO_MACHINE = KnownMachine()


def fingerprint_of(secret: str) -> str:
    """What people compare of a secret's hash: 16 of its hexadecimal digits."""
    return "-".join(secret[at : at + 4] for at in range(0, 16, 4))


def check_address(
    host: str, found: Collection[Address], caller: Caller, *, linked: bool = False
) -> None:
    """Refuse what a caller may not register as a machine's address; nothing is sent.

    `found` are the addresses that `host` was resolved to. `linked`: nothing will be sent there, and
    the network in which that address is may be another one.

    Raises:
        Denied: 400 for what is no other machine; 403 for one that the caller cannot vouch for.
    """
    name = host.lower().rstrip(".")
    if name in METADATA_NAMES:
        raise Denied(400, f"ip_address {host} is no machine's that could run Ollama")
    local = caller.client.zone is Zone.LOOPBACK
    if (name == "localhost" or name.endswith(".localhost")) and not local:
        raise _others_loopback(host)
    for address in found:
        if is_no_machine(address):
            text = (
                f"ip_address {host} is no machine's that could run Ollama; give the machine's own"
            )
            raise Denied(400, text)
        if address.is_loopback and not local:
            raise _others_loopback(host)
        is_own = address == parse_address(caller.client.address)
        if zone_of(address) is Zone.PUBLIC and not (is_own or local or caller.is_proven):
            raise Denied(
                403,
                f"ip_address {host} is in no private network: register it from that machine, from "
                "the coordinator's own machine, or with a key",
            )
        if is_ours(address) and not (local or linked or _may_name_us(caller)):
            raise Denied(
                403,
                f"ip_address {host} is the coordinator's own machine: register it from there, or "
                f"with a key with {named(Right.OPERATE)}",
            )


def _may_name_us(caller: Caller) -> bool:
    """Whether a caller may register this machine: it asks from here, or an operator does."""
    address = parse_address(caller.client.address)
    is_here = address is not None and is_ours(address)
    return is_here or (caller.is_proven and caller.rights.meets(Right.OPERATE))


def _others_loopback(host: str) -> Denied:
    return Denied(
        400,
        f"ip_address {host} is this machine's own loopback, and the request comes from another "
        "one: give the address at which the coordinator reaches the machine",
    )
