"""Which agent a registration belongs to: a known one, a new one, or the copy of a known one.

A machine id is kept on a disk, and disks are copied. A running process cannot be copied: each makes
its own instance id when it starts, and reports that of the run before on the same disk.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable

from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.protocol import RegisterRequest
from ollama_coordinator_common.types import AgentId

from .agent import AgentState

REMEDY = "stop one of them, remove its agent's state folder (AGENT_STATE_DIR), and start it again"

REPLACED_KEPT = 8
"""Processes remembered as replaced, per agent: more do not restart between two heartbeats."""


class TwoMachines(OllamaCoordinatorError):
    """Two agents that are online cannot be told apart."""

    def __init__(self, agent: AgentState) -> None:
        registration = agent.registration
        super().__init__(
            f"two agents report as '{registration.machine_name}' with the same machine id, name,"
            f" address and port ({registration.ip_address}:{registration.ollama_port}); {REMEDY}"
        )


def match(
    request: RegisterRequest,
    agents: Iterable[AgentState],
    online: Callable[[AgentState], bool],
) -> AgentState | None:
    """The agent that a registration renews; `None`: a new agent, which gets an id of its own.

    Only agents with the same Ollama port are compared. The first row that applies decides.
    "Elsewhere" means that the known agent is online and has another address.

    | the known agent has                                      | elsewhere | otherwise |
    |----------------------------------------------------------|-----------|-----------|
    | the request's instance id                                | renew     | renew     |
    | a later process, which names this one as the run before  | renew (1) | next row  |
    | the request's previous instance id                       | renew (2) | renew (3) |
    | the same name, and the same or no machine id             | new (4)   | renew (3) |
    | either the same name or the same machine id              | new       | renew (3) |

    1. The later process was taken for this one after a crash, and is the copy of its disk: the
       process that ran first takes its place back, and the copy gets an id of its own.
    2. A machine that comes back after a crash may have another address, although its last
       heartbeat was a moment ago. Not if a later process replaced this one there: next row.
    3. 409 if a later process replaced this one there and is online at the same address.
    4. Renew if one of the two sends no instance id: its address may have changed.

    Raises:
        TwoMachines: both are online at one address and nothing tells them apart (409).
    """
    same_port = [a for a in agents if a.registration.ollama_port == request.ollama_port]
    instance = request.instance_id
    for agent in same_port:
        if instance is not None and agent.registration.instance_id == instance:
            return agent

    def is_elsewhere(agent: AgentState) -> bool:
        return online(agent) and agent.registration.ip_address != request.ip_address

    before = request.previous_instance_id
    for agent in same_port:
        known, clashes = agent.registration, instance in agent.replaced and is_elsewhere(agent)
        if clashes and known.previous_instance_id == instance:
            return agent
        if before is not None and known.instance_id == before and not clashes:
            return _checked(agent, request, online)
    found = _by_name_and_id(request, same_port, is_elsewhere)
    return None if found is None else _checked(found, request, online)


def _checked(
    agent: AgentState, request: RegisterRequest, online: Callable[[AgentState], bool]
) -> AgentState:
    """The agent, unless a later process that is online too replaced the one that registers."""
    if request.instance_id in agent.replaced and online(agent):
        raise TwoMachines(agent)
    return agent


def _by_name_and_id(
    request: RegisterRequest,
    agents: Iterable[AgentState],
    is_elsewhere: Callable[[AgentState], bool],
) -> AgentState | None:
    twin: AgentState | None = None
    namesake: AgentState | None = None
    for agent in agents:
        known = agent.registration
        same_name = known.machine_name == request.machine_name
        same_id = known.machine_id is not None and known.machine_id == request.machine_id
        if same_name and (same_id or None in (known.machine_id, request.machine_id)):
            if known.ip_address == request.ip_address:
                return agent
            # An agent that does not tell its processes apart may have got another address.
            if None in (known.instance_id, request.instance_id) or not is_elsewhere(agent):
                twin = twin or agent
        elif (same_id or same_name) and not is_elsewhere(agent):
            namesake = agent
    return twin or namesake


def renew(agent: AgentState, request: RegisterRequest) -> None:
    """Replace an agent's registration, and remember the process that registered before."""
    before, now = agent.registration.instance_id, request.instance_id
    if before is not None and before != now:
        agent.replaced = (*agent.replaced, before)[-REPLACED_KEPT:]
    agent.replaced = tuple(instance for instance in agent.replaced if instance != now)
    agent.registration = request


def conflict(agent: AgentState, others: Iterable[AgentState]) -> str | None:
    """What an operator should do where `others`, online too, have the agent's machine id.

    Several agents of one machine with an Ollama port each are no conflict.
    """
    own = agent.registration
    copies = [one for one in others if one.registration.ollama_port == own.ollama_port]
    if not copies:
        return None
    where = ", ".join(
        f"{copy.name} at {copy.registration.ip_address}"
        for copy in sorted(copies, key=lambda copy: copy.id)
    )
    return (
        f"this machine ({own.ip_address}) has the same machine id as {where}, as copies of one disk"
        f" have; {REMEDY}"
    )


class MachineIds:
    """The agents by machine id; agents that report none have nothing in common."""

    def __init__(self) -> None:
        self._agents: defaultdict[str, set[AgentId]] = defaultdict(set)

    def __len__(self) -> int:
        return len(self._agents)

    def add(self, agent: AgentState) -> None:
        """Add an agent under the machine id that it reports."""
        if (machine_id := agent.registration.machine_id) is not None:
            self._agents[machine_id].add(agent.id)

    def discard(self, agent: AgentState) -> None:
        """Remove an agent: before it reports another machine id, or when it is removed."""
        others, machine_id = self.others(agent), agent.registration.machine_id or ""
        if others:
            self._agents[machine_id] = others
        else:
            self._agents.pop(machine_id, None)

    def others(self, agent: AgentState) -> set[AgentId]:
        """The other agents with the machine id of this one."""
        return self._agents.get(agent.registration.machine_id or "", set()) - {agent.id}
