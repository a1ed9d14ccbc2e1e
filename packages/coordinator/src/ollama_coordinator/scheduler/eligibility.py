"""Which agents may serve a request at all, and which requests may wait, under every policy."""

from collections import Counter
from collections.abc import Callable, Sequence

from msgspec import Struct

from ollama_coordinator.registry import AgentState, Registry
from ollama_coordinator_common.types import AgentId, AgentStatus

from .error import HoldersUnavailable, ModelNotFound, NoAgentRegistered, SchedulerError
from .types import Request

# How long a request waits while all agents of its model are out of rotation: a few probes.
RECOVERY_SECONDS = 5.0


class Eligible(Struct, frozen=True):
    """The agents that may serve a request, and why the other holders may not, by their name.

    `patience`: for how many seconds waiting can help, since some of the refused may come back.
    """

    agents: Sequence[AgentState]
    refused: dict[str, str]
    patience: float


def eligible(
    registry: Registry,
    request: Request,
    now: float,
    *,
    runs: Callable[[AgentId, str], bool] = lambda _agent, _model: False,
) -> Eligible:
    """Sort the holders of the request's model into those that may serve it and the others.

    An agent on which this model failed a moment ago, or which it failed on when it last ran and
    now `runs` again, may serve it only when no other may.
    """
    agents: list[AgentState] = []
    resting_model: list[AgentState] = []
    refused: dict[str, str] = {}
    patience = 0.0
    for agent in registry.servers(request.model):
        reason = _refusal(registry, agent, request, now)
        if reason is not None:
            refused[agent.name] = reason
            patience = max(patience, _patience(registry, agent, request, now))
            continue
        tried = request.model in agent.model_cooldowns and runs(agent.id, request.model)
        avoided = agent.avoids(request.model, now, tried=tried)
        (resting_model if avoided else agents).append(agent)
    return Eligible(agents or resting_model, refused, patience)


def _patience(registry: Registry, agent: AgentState, request: Request, now: float) -> float:
    """For how many seconds a request may wait for an agent that cannot serve it now."""
    if agent.id in request.excluded:
        return 0.0
    if registry.is_online(agent, now):
        return RECOVERY_SECONDS if agent.out_of_rotation() is not None else 0.0
    return registry.wake_seconds if request.wakes and agent.can_wake(now) else 0.0


def _refusal(registry: Registry, agent: AgentState, request: Request, now: float) -> str | None:
    if agent.id in request.excluded:
        return request.unfit.get(agent.id, "already tried")
    status = agent.status(now, registry.agent_timeout)
    if status is AgentStatus.DRAINING and agent.paused and not agent.settings.draining:
        return f"paused: {agent.paused}"
    if status is AgentStatus.OFFLINE:
        return agent.why_offline
    if status is AgentStatus.DRAINING:
        return str(status.value)
    return agent.out_of_rotation()


def makes_room(waiting: Sequence[Request], client: str) -> Request | None:
    """Which of the requests that wait, in the order of their arrivals, leaves a full queue.

    It is the last one of the client that has most of them. `None`: this `client` itself has as
    many, or would have.
    """
    counts = Counter(request.client for request in waiting)
    heaviest = max(counts, key=lambda one: counts[one], default=client)
    if counts[heaviest] <= counts[client] + 1:
        return None
    mine = (one for one in reversed(waiting) if one.client == heaviest and not one.admitted)
    return next(mine, None)


def unavailable(
    registry: Registry, request: Request, found: Eligible, now: float
) -> SchedulerError:
    """The error that says why no agent can serve the request."""
    if len(registry) == 0:
        return NoAgentRegistered()
    if not registry.servers(request.model):
        return ModelNotFound(request.name)
    others = [agent.name for agent in registry if registry.is_routable(agent, now)]
    return HoldersUnavailable(request.name, found.refused, others)
