"""Which machine it is that registers: one that is known, a new one, or the copy of one.

A machine id is kept on a disk, and disks are copied. What cannot be copied is a running process:
each gives itself an instance id at its start, and remembers that of the run before.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable

from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.protocol import RegisterRequest
from ollama_coordinator_common.types import AgentId

from .agent import AgentState

REMEDY = "stop one of them, remove its agent's state folder (AGENT_STATE_DIR), and start it again"


class TwoMachines(OllamaCoordinatorError):
    """Two living agents cannot be told apart."""

    def __init__(self, agent: AgentState) -> None:
        registration = agent.registration
        super().__init__(
            f"two agents report as '{registration.machine_name}' with the same machine id, name,"
            f" address and port ({registration.ip_address}:{registration.ollama_port}); {REMEDY}"
        )


def match(
    request: RegisterRequest,
    agents: Iterable[AgentState],
    lives: Callable[[AgentState], bool],
) -> AgentState | None:
    """The agent that a registration renews.

    The instance decides, then that of the run before, then the machine id where both have one;
    the name and port decide otherwise. What a *living* agent uses elsewhere is that of a clone of
    an image or of a namesake, who gets an id of its own.

    The run before is believed to be over, although it was heard a moment ago: a machine that comes
    back after a crash may have another address. Should it report again, both live: it takes its
    place back, and the later one, that of a clone, gets an id of its own.

    Raises:
        TwoMachines: both live and nothing tells them apart.
    """
    same_port = [a for a in agents if a.registration.ollama_port == request.ollama_port]
    instance = request.instance_id
    for agent in same_port:
        if instance is not None and agent.registration.instance_id == instance:
            return agent

    def is_elsewhere(agent: AgentState) -> bool:
        return lives(agent) and agent.registration.ip_address != request.ip_address

    before = request.previous_instance_id
    for agent in same_port:
        known, clashes = agent.registration, instance in agent.replaced and is_elsewhere(agent)
        if clashes and known.previous_instance_id == instance:
            return agent
        if before is not None and known.instance_id == before and not clashes:
            return _checked(agent, request, lives)
    found = _by_name_and_id(request, same_port, is_elsewhere)
    return None if found is None else _checked(found, request, lives)


def _checked(
    agent: AgentState, request: RegisterRequest, lives: Callable[[AgentState], bool]
) -> AgentState:
    """The agent, unless the process that registers was replaced there by one that lives too."""
    if request.instance_id in agent.replaced and lives(agent):
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
    """Take over what an agent says of itself, and remember a process that another one replaces."""
    before, now = agent.registration.instance_id, request.instance_id
    if before is not None and before != now:
        agent.replaced = (*agent.replaced, before)[-8:]
    agent.replaced = tuple(instance for instance in agent.replaced if instance != now)
    agent.registration = request


def conflict(agent: AgentState, living: Iterable[AgentState]) -> str | None:
    """What an operator should know and do, where others with the same machine id live.

    Several agents of one machine, each for another Ollama, are as they should be.
    """
    own = agent.registration
    copies = [one for one in living if one.registration.ollama_port == own.ollama_port]
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
    """The agents by machine id; those without one are alike in nothing."""

    def __init__(self) -> None:
        self._agents: defaultdict[str, set[AgentId]] = defaultdict(set)

    def __len__(self) -> int:
        return len(self._agents)

    def add(self, machine_id: str | None, agent_id: AgentId) -> None:
        """An agent reports this id."""
        if machine_id is not None:
            self._agents[machine_id].add(agent_id)

    def discard(self, machine_id: str | None, agent_id: AgentId) -> None:
        """An agent is gone, or reports another id."""
        if machine_id is None or machine_id not in self._agents:
            return
        self._agents[machine_id].discard(agent_id)
        if not self._agents[machine_id]:
            del self._agents[machine_id]

    def others(self, machine_id: str | None, agent_id: AgentId) -> set[AgentId]:
        """The other agents with the id of this one."""
        if machine_id is None or machine_id not in self._agents:
            return set()
        return self._agents[machine_id] - {agent_id}
