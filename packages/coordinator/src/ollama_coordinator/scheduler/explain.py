"""Decisions that can be told: the candidates, each term of the estimate, and why not."""

from msgspec import Struct

from ollama_coordinator_common.types import AgentId

from .cost import COURTESY, DECODE_WEIGHT
from .fleet import Action, Choice, Place
from .types import Request, RequestId


class Candidate(Struct, frozen=True):
    """One agent for one request; all terms in seconds.

    `cost` is what is compared: the wait, the load and reading the prompt in full, writing in part
    (`decode_seconds` is that part), the crowding (how much slower it runs for what runs there, half
    of what they lose, all that those lose who wait there), how much an evicted model will be
    missed, and recent failures; all divided by the agent's preference. For batch, what others lose
    counts as many times as `COURTESY` says. `None`: it cannot serve it now, and `refused` says why.
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
    cached_tokens: int = 0
    unload: tuple[str, ...] = ()
    refused: str | None = None


class Decision(Struct, frozen=True):
    """What was decided for a request, and between whom.

    `chosen` is `None` when no agent comes into question; `action` is `go`, `load` or `wait`.
    `position` counts from 1 in the line of its model; a request not sent would be the last.
    `unevaluated` is how many more agents have the model that nobody took the time to estimate.
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


def brief(request: Request, choice: Choice, output: float) -> Decision:
    """A decision with the best alternative of each kind, as it was taken."""
    return Decision(
        request_id=request.id,
        model=request.model,
        action=choice.action.value,
        chosen=choice.place.machine.id if choice.place else None,
        start_in_seconds=choice.wait,
        expected_output_tokens=output,
        candidates=tuple(
            candidate(request, one, one.place, output)
            for one in (choice, *choice.others)
            if one.place is not None
        ),
    )


def candidate(
    request: Request, choice: Choice, place: Place, output: float, *, failure: float = 0.0
) -> Candidate:
    """One possibility in the terms of its cost."""
    machine, loads = place.machine, choice.action is Action.LOAD
    prefill = max(request.prompt_tokens - choice.cached, 0) * place.prefill
    decode = DECODE_WEIGHT * output * place.decode
    return Candidate(
        agent_id=machine.id,
        agent=machine.agent.name,
        action=choice.action.value,
        cost=choice.cost,
        wait_seconds=0.0 if loads else choice.wait,
        load_seconds=choice.wait if loads else 0.0,
        evict_seconds=COURTESY[request.lane] * choice.room.penalty,
        prefill_seconds=prefill,
        decode_seconds=decode,
        crowding_seconds=max(choice.run - prefill - decode, 0.0),
        failure_seconds=failure,
        preference=machine.preference,
        cached_tokens=choice.cached,
        unload=tuple(victim.model for victim in choice.room.victims),
    )
