"""What every scheduler offers to the asyncio glue around it."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from msgspec import Struct

from ollama_coordinator_common.types import AgentId

from .error import SchedulerError
from .types import Lease, LeaseId, Outcome, Request, RequestId


class Plan(Struct, frozen=True):
    """What a call of `plan` decided: places given, and requests given up with the reason."""

    granted: Sequence[Lease] = ()
    refused: Sequence[tuple[RequestId, SchedulerError]] = ()


class Waiting(Struct, frozen=True):
    """A request in the waiting line: `position` from 1 within its model's line.

    `start_in_seconds` is the predicted wait, `None` when the scheduler does not predict.
    """

    request: Request
    position: int
    start_in_seconds: float | None


class Scheduler(Protocol):
    """Decides which agent serves which request when. Synchronous, without a clock, never logs.

    Tell it what happens (`submit`, `withdraw`, `began`, `end`), then call `plan`, which returns
    everything that follows. Changes of the registry are read in `plan`. `now` never decreases.

    `max_queue` is how many requests may wait; it can be changed at any time.
    """

    max_queue: int

    def submit(self, request: Request, now: float) -> None:
        """Put a request into the waiting line.

        Raises:
            ModelNotFound: no agent has the model.
            NoAgentRegistered: there are no agents at all.
            HoldersUnavailable: the agents that have it, less the excluded, are offline or draining.
            QueueFull: the waiting line has reached its limit.
        """

    def withdraw(self, request_id: RequestId, now: float) -> None:
        """A waiting request's client left. No error if it waits no longer."""

    def began(self, lease_id: LeaseId, now: float) -> None:
        """The first byte of the answer arrived."""

    def end(self, lease_id: LeaseId, outcome: Outcome, now: float) -> None:
        """An attempt ended; its place is free. A second end of one lease is an error (KeyError)."""

    def plan(self, now: float) -> Plan:
        """Everything that can be decided now."""

    def adopt(self, lease: Lease, now: float) -> bool:
        """Take over a living lease that another scheduler granted, under its id.

        False when that agent, or the model on it, is not known any more: it is not taken over.
        """

    def wake_at(self, now: float) -> float | None:
        """When `plan` should be called although nothing happens; `None`: no need."""

    def leases(self) -> Iterable[Lease]:
        """Every attempt that holds a place."""

    def in_flight(self, agent_id: AgentId) -> int:
        """How many leases an agent has."""

    def waiting(self, now: float) -> list[Waiting]:
        """The waiting line, next first."""

    def waiting_count(self) -> int:
        """How long the waiting line is; nothing is predicted for it."""
