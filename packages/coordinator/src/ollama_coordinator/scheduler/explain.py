"""Explained decisions: the candidates, each term of their cost, and why one cannot serve."""

from collections.abc import Mapping

from msgspec import Struct, structs

from ollama_coordinator.registry import AgentState, Registry
from ollama_coordinator_common.types import AgentId

from .choose import Chooser
from .cost import felt_seconds
from .eligibility import eligible, unavailable
from .prompt_cache import CacheHits
from .queue import Queue, QueueEntry, Receiver, Tag, receiver_of
from .slot_plan import Slot, slots_to_come, soonest_slots
from .state import Action, Choice, Place, Running
from .types import Lane, Request, RequestId

# Candidates that are kept, and so evaluated, at most: a page, some 10 KB in the history.
MOST_EXPLAINED = 50
# What accounts may take in the long run and after a rest, at 20 us each: 1 % of a core:
EVALUATIONS_PER_SECOND = 500.0
EVALUATIONS_AT_ONCE = 400.0

NO_TAG = Tag(0.0, 0.0, 0)
"""The order of a request that is explained and not queued."""


class Candidate(Struct, frozen=True):
    """One agent for one request; all terms in seconds.

    `cost` is what is compared: the sum of the other seconds, divided by the agent's preference, and
    `backup_seconds` more.
    `decode_seconds` is the weighted part of writing. `crowding_seconds` is how much slower it runs
    beside others, and the weighted delay of these. `evict_seconds` is how much the evicted models
    will be missed. In the batch lane what others lose counts `COURTESY` times. `None`: the agent
    cannot serve the request now, and `refused` says why.
    """

    agent_id: AgentId
    agent: str
    action: str
    cost: float | None = None
    wait_seconds: float = 0.0
    load_seconds: float = 0.0
    evict_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    crowding_seconds: float = 0.0
    failure_seconds: float = 0.0
    preference: float = 1.0
    backup_seconds: float = 0.0
    cached_tokens: int = 0
    unload: tuple[str, ...] = ()
    refused: str | None = None


class Decision(Struct, frozen=True):
    """What was decided for a request, and between which agents.

    `chosen` is `None` when no agent may serve it; `action` is `go`, `load` or `wait`. `position`
    counts from 1 in the queue of its model; a request not sent would be the last. `unevaluated`
    holders of the model were not evaluated. `lane_reason` says why it is in a lane that it did not
    ask for. `rule` says in words what decided. The candidates are in the order of their costs.
    """

    request_id: RequestId
    model: str
    action: str
    chosen: AgentId | None
    position: int = 1
    start_in_seconds: float | None = None
    expected_output_tokens: float = 0.0
    candidates: tuple[Candidate, ...] = ()
    unevaluated: int = 0
    lane: str = Lane.INTERACTIVE.value
    lane_reason: str = ""
    rule: str = ""

    @property
    def candidate(self) -> Candidate | None:
        """The chosen one."""
        return next((one for one in self.candidates if self.is_chosen(one)), None)

    def is_chosen(self, one: Candidate) -> bool:
        """Whether a candidate is the chosen one: an agent may be there twice, now and later."""
        return one.agent_id == self.chosen and one.action == self.action


TERMS = {
    "wait_seconds": "the wait for a slot",
    "load_seconds": "the load of the model",
    "evict_seconds": "the models that would be pushed out",
    "prefill_seconds": "the reading of the prompt",
    "decode_seconds": "the writing of the answer",
    "crowding_seconds": "the requests beside it",
    "failure_seconds": "recent failures",
    "backup_seconds": "that it is a backup",
}
"""The terms of a cost, in words."""


def _rule(decision: Decision) -> str:
    """What decided: the lowest cost, and the term that made most of the difference to the next."""
    chosen = decision.candidate
    if chosen is None or chosen.cost is None:
        return ""
    others = [one for one in decision.candidates if one is not chosen and one.cost is not None]
    if not others:
        return "the only agent that can serve it"
    second = min(others, key=_dearest_last)
    margins = {term: getattr(second, term) - getattr(chosen, term) for term in TERMS}
    term = max(margins, key=margins.__getitem__)
    says = f"lowest cost, {chosen.cost:.2f} s; next best: "
    says += f"{second.agent} ({second.action}), {second.cost:.2f} s"
    if chosen.preference > second.preference and sum(margins.values()) <= 0:
        return f"{says}; the difference is its preference"
    return f"{says}; most of the difference: {TERMS[term]}" if margins[term] > 0 else says


def brief(run: Running) -> Decision:
    """What the choice compared: the chosen place and the best alternative of each kind."""
    request, choice = run.lease.request, run.choice
    candidates = _compared(request, choice, receiver_of(request, run.output))
    return _decision(request, choice, run.output, candidates)


def _compared(request: Request, choice: Choice, receiver: Receiver) -> list[Candidate]:
    return [
        _candidate(request, one, one.place, receiver)
        for one in (choice, *choice.others)
        if one.place is not None
    ]


class Accounts:
    """Accounts of decisions just taken: full ones as long as there is time for them.

    What the choice itself compared is always in them. The other holders of the model are evaluated
    as they were at the grant: those with it in memory first, then those that load soonest.
    """

    def __init__(self, chooser: Chooser) -> None:
        self._chooser = chooser
        self._left = EVALUATIONS_AT_ONCE
        self._at = 0.0

    def of(self, run: Running, queue: Queue) -> Decision:
        """The account of a lease that was granted a moment ago."""
        request, choice, now = run.lease.request, run.choice, run.lease.granted_at
        receiver = receiver_of(request, run.output)
        candidates = _compared(request, choice, receiver)
        known = {one.agent_id for one in candidates}
        holders = [*queue.hot, *queue.loading, *queue.cold]
        if request.excluded:
            holders = [one for one in holders if one.machine.id not in request.excluded]
        # A place that a later lease of the same plan went to is not as it was.
        unknown = [
            one
            for one in holders[:MOST_EXPLAINED]
            if one.machine.id not in known and one.last_used <= run.number
        ]
        unknown = unknown[: self._afford(min(len(unknown), MOST_EXPLAINED - len(known)), now)]
        if unknown:
            entry = QueueEntry(request, NO_TAG, queue, receiver, 0.0)
            slots = soonest_slots(choice.slots_left or slots_to_come(queue, now), unknown)
            hits = self._chooser.hits(entry)
            others = [
                _evaluate(self._chooser, entry, one, hits, slots, now)
                for one in unknown
                if one in slots or not (choice.slots_left and one.running)  # the plan has it
            ]
            candidates += others
        unevaluated = max(len(holders) - len({one.agent_id for one in candidates}), 0)
        return _decision(request, choice, run.output, candidates, unevaluated=unevaluated)

    def _afford(self, wanted: int, now: float) -> int:
        """How many evaluations there is time for; they count as done."""
        rested = max(now - self._at, 0.0) * EVALUATIONS_PER_SECOND
        self._left = min(self._left + rested, EVALUATIONS_AT_ONCE)
        self._at = now
        count = min(wanted, int(self._left))
        self._left -= count
        return count


def explain(registry: Registry, chooser: Chooser, entry: QueueEntry, now: float) -> Decision:
    """What would be decided for this entry if it were the last of its queue.

    Raises:
        ModelNotFound, NoAgentRegistered, HoldersUnavailable: no agent may ever serve it.
    """
    request, queue = entry.request, entry.queue
    found = eligible(registry, request, now)
    if not found.agents and not found.patience:
        raise unavailable(registry, request, found, now)
    left = chooser.slots_left(queue, now)
    with queue.unchanged():
        choice = chooser.choose_last(queue, entry, left, now)
    candidates = [
        _refused(agent, found.refused[agent.name])
        for agent in registry.servers(request.model)
        if agent.name in found.refused
    ]
    places = [
        place
        for place in (*queue.hot, *queue.loading, *queue.cold)
        if place.machine.id not in request.excluded
    ]
    slots = soonest_slots(left, places)
    hits = chooser.hits(entry)
    candidates += [
        _candidate(request, choice, place, entry.receiver)  # a tie with another place is in it
        if place is choice.place
        else _evaluate(chooser, entry, place, hits, slots, now)
        for place in places
    ]
    return _decision(request, choice, entry.receiver.output, candidates, position=queue.size + 1)


def _decision(
    request: Request,
    choice: Choice,
    output: float,
    candidates: list[Candidate],
    *,
    position: int = 1,
    unevaluated: int = 0,
) -> Decision:
    candidates.sort(key=_dearest_last)
    decision = Decision(
        request_id=request.id,
        model=request.model,
        action=choice.action.value,
        chosen=choice.place.machine.id if choice.place is not None else None,
        position=position,
        start_in_seconds=choice.wait if choice.place is not None else None,
        expected_output_tokens=output,
        candidates=tuple(candidates),
        unevaluated=unevaluated,
        lane=request.lane.value,
        lane_reason=request.lane_reason,
    )
    return structs.replace(decision, rule=_rule(decision))


def _dearest_last(one: Candidate) -> tuple[bool, float, str]:
    return one.cost is None, one.cost or 0.0, one.agent


def _evaluate(
    chooser: Chooser, entry: QueueEntry, place: Place, hits: CacheHits,
    slots: Mapping[Place, Slot], now: float,
) -> Candidate:  # fmt: skip
    """The same evaluation with this place as the only one, and what is left of its slots."""
    choice = chooser.choose_at(place, entry, hits, slots.get(place), now)
    if choice.place is None:
        return _refused(place.machine.agent, _blocked(place))
    return _candidate(entry.request, choice, place, entry.receiver)


def _candidate(request: Request, choice: Choice, place: Place, receiver: Receiver) -> Candidate:
    """One possibility in the terms of its cost."""
    machine, loads = place.machine, choice.action is Action.LOAD
    prefill = max(request.prompt_tokens - choice.cached, 0) * place.prefill
    decode = felt_seconds(receiver, receiver.output * place.decode, 1.0)
    return Candidate(
        agent_id=machine.id,
        agent=machine.agent.name,
        action=choice.action.value,
        cost=choice.cost,
        wait_seconds=0.0 if loads else choice.wait,
        load_seconds=choice.wait if loads else 0.0,
        evict_seconds=receiver.courtesy * choice.eviction.penalty,
        prefill_seconds=prefill,
        decode_seconds=decode,
        crowding_seconds=max(choice.run - prefill - decode, 0.0),
        failure_seconds=choice.failure,
        preference=machine.preference,
        backup_seconds=machine.backup,
        cached_tokens=choice.cached,
        unload=tuple(victim.model for victim in choice.eviction.victims),
    )


def _blocked(place: Place) -> str:
    machine = place.machine
    if machine.loading is not None:
        return f"it is loading {machine.loading.model}"
    if machine.reserved is not None and machine.reserved is not place:
        return f"it makes way for {machine.reserved.model}"
    if place.running:
        return "the model is in use there with other options"
    return "what is in its memory is in use, or was loaded a moment ago"


def _refused(agent: AgentState, reason: str) -> Candidate:
    return Candidate(agent_id=agent.id, agent=agent.name, action=Action.WAIT.value, refused=reason)
