"""KnownMachines: which addresses an agent may register, and from where the fleet's machines speak.

What a machine registers is where the coordinator connects to, with clients' prompts. So an address
is refused that is none of another machine, or that another machine cannot vouch for.
"""

import logging
from collections.abc import Collection

import msgspec

from ollama_coordinator.db import Store
from ollama_coordinator.registry import Registry
from ollama_coordinator_common.network import (
    METADATA_NAMES,
    Address,
    is_no_machine,
    machine_of,
    parse_address,
)
from ollama_coordinator_common.types import AgentId

from .caller import Caller, Denied
from .zones import Zone, zone_of

log = logging.getLogger(__name__)

DOCUMENT = "machines"
"""Under which name it is in the database from where each agent spoke last: a JSON object."""


class KnownMachines:
    """The addresses that the fleet's machines speak from.

    A machine that is in the fleet stays in it when the first key is made: what comes from its
    address is taken as before. `note` is how an address becomes known.
    """

    def __init__(self, registry: Registry, store: Store) -> None:
        self._registry = registry
        self._store = store
        self._spoke: dict[AgentId, str] = {}

    async def restore(self) -> None:
        """Take the addresses over from the database.

        Raises:
            DatabaseError: it cannot be read.
        """
        body = await self._store.document(DOCUMENT)
        try:
            self._spoke = msgspec.json.decode(body or b"{}", type=dict[AgentId, str])
        except msgspec.DecodeError as exc:
            log.warning("where agents speak from is unreadable", extra={"reason": str(exc)})

    def note(self, agent_id: AgentId, address: str) -> None:
        """An agent was believed that spoke from an address."""
        if self._spoke.get(agent_id) != address:
            known = self._registry.find
            self._spoke = {one: at for one, at in self._spoke.items() if known(one) is not None}
            self._spoke[agent_id] = address
            self._store.note_document(DOCUMENT, lambda: msgspec.json.encode(self._spoke))

    def knows(self, address: str) -> bool:
        """Whether a machine of the fleet is registered at an address, or spoke from it last."""
        host = machine_of(address)
        for agent in self._registry:
            if agent.host == host or agent.registration.ip_address == address:
                return True
            if self._spoke.get(agent.id) == address:
                return True
        return False


def check_address(host: str, found: Collection[Address], caller: Caller) -> None:
    """Refuse what a caller may not register as a machine's address; nothing is sent.

    `found` are the addresses that `host` was resolved to.

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


def _others_loopback(host: str) -> Denied:
    return Denied(
        400,
        f"ip_address {host} is this machine's own loopback, and the request comes from another "
        "one: give the address at which the coordinator reaches the machine",
    )
