"""The full account of a decision: every holder of the model, whether it may serve or not."""

from ollama_coordinator.registry import AgentState, Registry

from .choice import Chooser
from .eligibility import eligible, unavailable
from .explain import Candidate, Decision, candidate
from .fleet import Action, Place
from .line import Entry, Line
from .mirror import Mirror


def explain(
    registry: Registry, mirror: Mirror, chooser: Chooser, entry: Entry, now: float
) -> Decision:
    """What would be decided for this entry if it were the last of its line.

    Raises:
        ModelNotFound, NoAgentRegistered, HoldersUnavailable: nobody may ever serve it.
    """
    request, line = entry.request, entry.line
    found = eligible(registry, request, now)
    if not found.agents and not found.recovering:
        raise unavailable(registry, request, found, now)
    choice = chooser.choose(line, entry, line.size, now)
    candidates = [
        _refused(agent, found.refused)
        for agent in registry.servers(request.model)
        if agent.name in found.refused
    ]
    candidates += [
        _candidate(chooser, line, entry, place, now)
        for place in (*line.hot, *line.loading, *line.cold)
        if place.machine.id not in request.excluded
    ]
    candidates.sort(key=lambda one: (one.cost is None, one.cost or 0.0, one.agent))
    return Decision(
        request_id=request.id,
        model=request.model,
        action=choice.action.value,
        chosen=choice.place.machine.id if choice.place is not None else None,
        position=line.size + 1,
        start_in_seconds=choice.wait if choice.place is not None else None,
        expected_output_tokens=entry.output,
        candidates=tuple(candidates),
    )


def _candidate(chooser: Chooser, line: Line, entry: Entry, place: Place, now: float) -> Candidate:
    """The same evaluation with this place as the only one."""
    alone = line.only(place)
    choice = chooser.choose(alone, entry, line.size if place in line.hot else 0, now)
    if choice.place is None:
        return Candidate(
            agent_id=place.machine.id,
            agent=place.machine.agent.name,
            action=Action.WAIT.value,
            refused=_blocked(place),
        )
    failure = place.machine.penalty(now)
    return candidate(entry.request, choice, place, entry.output, failure=failure)


def _blocked(place: Place) -> str:
    machine = place.machine
    if machine.loading is not None:
        return f"it is loading {machine.loading.model}"
    if machine.reserved is not None and machine.reserved is not place:
        return f"it makes way for {machine.reserved.model}"
    if place.running:
        return "the model is in use there with other options"
    return "what is in its memory is in use, or was loaded a moment ago"


def _refused(agent: AgentState, reasons: dict[str, str]) -> Candidate:
    return Candidate(
        agent_id=agent.id, agent=agent.name, action=Action.WAIT.value, refused=reasons[agent.name]
    )
