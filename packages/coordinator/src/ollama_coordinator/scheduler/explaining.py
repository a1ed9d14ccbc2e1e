"""The full account of a decision: every holder of the model, whether it may serve or not."""

from msgspec import structs

from ollama_coordinator.registry import AgentState, Registry

from .affinity import Hits
from .choice import Chooser
from .eligibility import eligible, unavailable
from .explain import Candidate, Decision, brief, candidate
from .fleet import Action, Place, Running
from .line import Entry, Line
from .mirror import Mirror

MOST_TOLD = 50
"""Candidates of one decision that are kept, and so evaluated at most."""

EVALUATIONS_PER_SECOND = 2000.0
EVALUATIONS_AT_ONCE = 400.0
"""What accounts may take in the long run, and after a rest; some percent of a core."""


class Accounts:
    """Accounts of decisions just taken: full ones as long as there is time for them.

    What the choice itself compared is always in them. The other holders of the model are evaluated
    when the place has just been given, the ones in memory first, then those that load soonest.
    """

    def __init__(self, chooser: Chooser) -> None:
        self._chooser = chooser
        self._left = EVALUATIONS_AT_ONCE
        self._at = 0.0

    def of(self, run: Running, line: Line) -> Decision:
        """The account of a lease that was given a moment ago."""
        request, now = run.lease.request, run.lease.granted_at
        told = brief(request, run.choice, run.output)
        places = [
            place
            for place in (*line.hot, *line.loading, *line.cold)
            if not request.excluded or place.machine.id not in request.excluded
        ]
        count = self._afford(min(len(places), MOST_TOLD), now)
        known = {one.agent_id for one in told.candidates}
        unknown = [place for place in places[:count] if place.machine.id not in known]
        entry = Entry(request, (0.0, 0.0, 0), line, run.output, 0.0)
        hits = self._chooser.hits(entry)
        others = [
            _candidate(self._chooser, hits, entry, place, 0, now)
            for place in unknown[: MOST_TOLD - len(known)]
        ]
        others.sort(key=_dearest_last)
        known.update(one.agent_id for one in others)
        return structs.replace(
            told,
            candidates=(*told.candidates, *others),
            unevaluated=max(len(places) - len(known), 0),
        )

    def _afford(self, wanted: int, now: float) -> int:
        """How many evaluations there is time for; they are taken for done."""
        rested = max(now - self._at, 0.0) * EVALUATIONS_PER_SECOND
        self._left = min(self._left + rested, EVALUATIONS_AT_ONCE)
        self._at = now
        count = min(wanted, int(self._left))
        self._left -= count
        return count


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
    hits = chooser.hits(entry)
    candidates += [
        _candidate(chooser, hits, entry, place, line.size if place in line.hot else 0, now)
        for place in (*line.hot, *line.loading, *line.cold)
        if place.machine.id not in request.excluded
    ]
    candidates.sort(key=_dearest_last)
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


def _dearest_last(one: Candidate) -> tuple[bool, float, str]:
    return one.cost is None, one.cost or 0.0, one.agent


def _candidate(
    chooser: Chooser, hits: Hits, entry: Entry, place: Place, ahead: int, now: float
) -> Candidate:
    """The same evaluation with this place as the only one, behind so many others."""
    choice = chooser.choose_with(hits, entry.line.only(place), entry, ahead, now)
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
