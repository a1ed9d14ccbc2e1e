"""Which agent a registration belongs to: a known one, a new one, or the copy of a known one.

A machine id is kept on a disk, and disks are copied. A running process cannot be copied: each makes
its own instance id when it starts, and reports that of the run before on the same disk. A bare
Ollama has neither: it is known by its address, and by its name once it is gone from there.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable

from msgspec import Struct

from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.network import netloc, same_host
from ollama_coordinator_common.protocol import RegisterRequest
from ollama_coordinator_common.types import AgentId

from .agent import AgentState, endpoints

REMEDY = "stop one of them, remove its agent's state folder (AGENT_STATE_DIR), and start it again"

REPLACED_KEPT = 8
"""Processes remembered as replaced, per agent: more do not restart between two heartbeats."""

Lives = Callable[[AgentState], bool]
"""Whether an agent is online, or was just found to answer at its address."""


class TwoMachines(OllamaCoordinatorError):
    """Two agents that are online report the same Ollama."""

    def __init__(self, agent: AgentState, request: RegisterRequest) -> None:
        known = agent.registration
        names = f"'{known.machine_name}' and '{request.machine_name}'"
        what = f"two agents ({names}) report the same Ollama, {agent.url}"
        if known.machine_id is not None and known.machine_id == request.machine_id:
            text = f"{what}, with the same machine id; {REMEDY}"
        else:
            text = f"{what}; stop one of them"
        super().__init__(text)


class NotItsOllama(OllamaCoordinatorError):
    """A living agent has this Ollama, and another machine registers it."""

    def __init__(self, agent: AgentState) -> None:
        name = agent.registration.machine_name
        super().__init__(
            f"the Ollama at {agent.url} is that of the agent '{name}', which another machine "
            "registered: register it from there, or remove that agent first "
            f"(`ollama-coordinator agents rm {name}`)"
        )


def match(
    request: RegisterRequest, agents: Iterable[AgentState], lives: Lives, host: str = ""
) -> AgentState | None:
    """The agent that a registration renews; `None`: a new agent, which gets an id of its own.

    Only agents with the same Ollama port, or with the same Ollama (host and port), are compared.
    The first row that applies decides. "Elsewhere" means that the known agent lives at another
    host; an "id" is a machine id.

    | the known agent has                                     | elsewhere | otherwise   |
    |---------------------------------------------------------|-----------|-------------|
    | the same Ollama and lives, and replaced this process    | -         | 409         |
    | the request's instance id                               | renew     | renew       |
    | a later process, which names this one as the run before | renew (1) | next row    |
    | the request's previous instance id                      | renew (2) | renew (3)   |
    | the same id and name                                    | new (4)   | renew (3)   |
    | the same Ollama                                         | -         | renew (5)   |
    | the same name, where one of the two has no id           | new       | renew       |
    | either the same name or the same id                     | new       | renew (3)   |

    1. The later process was taken for this one after a crash, and is the copy of its disk: the
       process that ran first takes its place back, and the copy gets an id of its own.
    2. A machine that comes back after a crash may have another address, although its last
       heartbeat was a moment ago. Not if a later process replaced this one there: next row.
    3. 409 if a later process replaced this one there and lives at the same host.
    4. Renew if one of the two sends no instance id: its address may have changed.
    5. The newer one takes it over. Not if the known agent is away and both have an id: the address
       then belongs to another machine now.

    Raises:
        TwoMachines: both are online with one Ollama, and this process was replaced (409).
    """
    instance, before = request.instance_id, request.previous_instance_id
    where, here = endpoints(request, host), host or same_host(request.ip_address)
    alike = [
        agent
        for agent in agents
        if agent.registration.ollama_port == request.ollama_port or agent.endpoints & where
    ]
    for agent in alike:
        if agent.endpoints & where:
            _checked(agent, request, lives)
    for agent in alike:
        if instance is not None and agent.registration.instance_id == instance:
            return agent

    def is_elsewhere(agent: AgentState) -> bool:
        return lives(agent) and (agent.host or same_host(agent.registration.ip_address)) != here

    for agent in alike:
        known, clashes = agent.registration, instance in agent.replaced and is_elsewhere(agent)
        if clashes and known.previous_instance_id == instance:
            return agent
        if before is not None and known.instance_id == before and not clashes:
            return _checked(agent, request, lives)
    found = _by_evidence(request, alike, where, lives, is_elsewhere)
    return None if found is None else _checked(found, request, lives)


def _checked(agent: AgentState, request: RegisterRequest, lives: Lives) -> AgentState:
    """The agent, unless a later process that lives too replaced the one that registers."""
    if request.instance_id in agent.replaced and lives(agent):
        raise TwoMachines(agent, request)
    return agent


def _by_evidence(
    request: RegisterRequest,
    agents: Iterable[AgentState],
    where: frozenset[tuple[str, int]],
    lives: Lives,
    is_elsewhere: Lives,
) -> AgentState | None:
    """The agent that the first of the last four rows of the table finds."""
    disks: list[AgentState] = []
    ollamas: list[AgentState] = []
    names: list[AgentState] = []
    halves: list[AgentState] = []
    for agent in agents:
        known, elsewhere = agent.registration, is_elsewhere(agent)
        same_name = known.machine_name == request.machine_name
        has_ids = None not in (known.machine_id, request.machine_id)
        same_id = has_ids and known.machine_id == request.machine_id
        # An agent that does not tell its processes apart may have got another address.
        if same_id and same_name and not (elsewhere and known.instance_id and request.instance_id):
            at = 0 if known.ip_address == request.ip_address else len(disks)
            disks.insert(at, agent)
        elif agent.endpoints & where and (lives(agent) or not has_ids):
            ollamas.append(agent)
        elif not elsewhere and same_name and not has_ids:
            names.append(agent)
        elif not elsewhere and (same_id or same_name):
            halves.append(agent)
    return next((found[0] for found in (disks, ollamas, names, halves) if found), None)


def identifies_less(request: RegisterRequest, agent: AgentState) -> bool:
    """Whether a registration has fewer of the two ids, machine and instance, than the agent's."""
    known = agent.registration
    new, old = (
        (one.machine_id is not None) + (one.instance_id is not None) for one in (request, known)
    )
    return new < old


def renew(agent: AgentState, request: RegisterRequest, host: str = "") -> None:
    """Replace an agent's registration, and remember the process that registered before."""
    replace(agent, agent.registration, by=request.instance_id)
    agent.registration, agent.host = request, host


def replace(agent: AgentState, known: RegisterRequest, *, by: str | None) -> None:
    """Remember that the agent's process (instance id `by`) stands where another one stood."""
    before = known.instance_id
    if before is not None and before != by:
        agent.replaced = (*agent.replaced, before)[-REPLACED_KEPT:]
    agent.replaced = tuple(instance for instance in agent.replaced if instance != by)


def conflict(agent: AgentState, others: Iterable[AgentState]) -> str | None:
    """What an operator should do where `others`, online too, may be taken for the agent.

    `others` are `Identities.alike`. Machines of one name are no conflict if each has an id.
    """
    own = agent.registration
    alike = sorted(others, key=lambda one: one.id)
    copies = [
        one
        for one in alike
        if own.machine_id is not None and one.registration.machine_id == own.machine_id
    ]
    if copies:
        return (
            f"this machine ({own.ip_address}) has the same machine id as {_where(copies)}, as"
            f" copies of one disk have; {REMEDY}"
        )
    namesakes = [
        one
        for one in alike
        if own.machine_name == one.registration.machine_name
        and None in (own.machine_id, one.registration.machine_id)
    ]
    if namesakes:
        return (
            f"this machine ({own.ip_address}) has the same name, '{own.machine_name}', as"
            f" {_where(namesakes)}, and not both have a machine id: register one of them under"
            " another machine_name, or run the agent on it"
        )
    return None


def _where(agents: Iterable[AgentState]) -> str:
    return ", ".join(f"{agent.called} at {agent.registration.ip_address}" for agent in agents)


Identity = tuple[str, str | int]


class Identities:
    """The agents by each thing that identifies them: machine id, name, host and port.

    `api_keys` are those of Ollamas that an operator added, by their URLs; empty where one has none.
    Agents that are called the same get a `mark` each: the first of address, address with port, and
    start of the id that all of them have different ones of.
    """

    def __init__(self) -> None:
        self.api_keys: dict[str, str] = {}
        self._called: defaultdict[str, dict[AgentId, AgentState]] = defaultdict(dict)
        self._agents: defaultdict[Identity, set[AgentId]] = defaultdict(set)

    def __len__(self) -> int:
        return len(self._agents)

    def add(self, agent: AgentState) -> None:
        """Add an agent under everything that it reports."""
        for one in (*_claims(agent), *agent.endpoints):
            self._agents[one].add(agent.id)
        if agent.registration.url is not None:
            self.api_keys[agent.url] = agent.settings.api_key
        self._called[agent.called][agent.id] = agent
        self._mark(agent.called)

    def discard(self, agent: AgentState) -> None:
        """Remove an agent: before it reports something else, or when it is removed."""
        for one in (*_claims(agent), *agent.endpoints):
            self._agents[one].discard(agent.id)
            if not self._agents[one]:
                del self._agents[one]
        if agent.registration.url is not None:
            self.api_keys.pop(agent.url, None)
        self._called[agent.called].pop(agent.id, None)
        self._mark(agent.called)

    def _mark(self, called: str) -> None:
        """Tell those apart that are called the same."""
        same = list(self._called[called].values())
        if not same:
            del self._called[called]
            return
        choices = zip(*map(_marks, same), strict=True)
        marks = next(found for found in choices if len({*found}) == len(same))
        for agent, mark in zip(same, marks, strict=True):
            agent.mark = mark if len(same) > 1 else ""

    def alike(self, agent: AgentState) -> set[AgentId]:
        """The other agents with its Ollama port and its machine id or its name.

        Several agents of one machine with an Ollama port each are not alike.
        """
        return self._others(agent, _claims(agent))

    def at(self, where: frozenset[tuple[str, int]]) -> set[AgentId]:
        """The agents at one of these hosts and ports."""
        return set().union(*(self._agents[one] for one in where if one in self._agents))

    def same_ollama(self, agent: AgentState) -> set[AgentId]:
        """The other agents with its host and port."""
        return self._others(agent, agent.endpoints)

    def _others(self, agent: AgentState, claims: Iterable[Identity]) -> set[AgentId]:
        found = (self._agents[one] for one in claims if one in self._agents)
        return set().union(*found) - {agent.id}


def _marks(agent: AgentState) -> tuple[str, ...]:
    """What may tell an agent apart from one that is called the same; the last one always does."""
    known = agent.registration
    place = known.url or netloc(known.ip_address, known.relay_port or known.ollama_port)
    return known.ip_address, place, agent.id[:8], agent.id


def _claims(agent: AgentState) -> list[Identity]:
    """Its machine id and name; hosts are texts too, so that each has a mark of its own."""
    known = agent.registration
    claims: list[Identity] = [(f"name {known.machine_name}", known.ollama_port)]
    if known.machine_id is not None:
        claims.append((f"id {known.machine_id}", known.ollama_port))
    return claims


class UnknownAgent(OllamaCoordinatorError):
    """No agent has this id; an agent that gets this answer registers again."""

    def __init__(self, agent_id: str, text: str = "") -> None:
        text = text or f'agent "{agent_id}" is not registered; register it with POST /api/agents'
        super().__init__(text)


Judgement = Callable[[AgentState], bool]
"""Something that is asked of an agent; see `access.machines` for who is believed."""


def always(agent: AgentState) -> bool:
    """Everybody is believed."""
    return True


class Registration(Struct, frozen=True):
    """The agent that a registration created or renewed.

    `replaced` are agents that reported the same Ollama until now; they are offline.
    """

    agent: AgentState
    created: bool
    replaced: tuple[AgentState, ...] = ()


FORGET_SECONDS = 86_400.0
"""A machine that is registered before it is set up is so by the next day."""

MOST_UNANSWERED = 256
"""Registrations of machines that are still to come; each is probed again and again."""


def forgettable(agents: Iterable[AgentState], now: float) -> list[AgentState]:
    """The agents behind which nothing ever answered, and nothing will.

    Those older than `FORGET_SECONDS`, and the oldest where there are more than `MOST_UNANSWERED`.
    """
    silent = [agent for agent in agents if not agent.has_answered]
    silent.sort(key=lambda agent: agent.heard_at, reverse=True)
    return [
        agent
        for place, agent in enumerate(silent)
        if place >= MOST_UNANSWERED or now - agent.heard_at >= FORGET_SECONDS
    ]
