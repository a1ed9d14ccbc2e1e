"""What every scheduler offers to the asyncio glue around it."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from msgspec import Struct

from ollama_coordinator_common.types import AgentId

from .error import DoesNotPredict, SchedulerError
from .explain import Decision
from .export import Estimate, Learned, Prospect
from .types import NO_OPTIONS, Lease, LeaseId, Outcome, Request, RequestId, RunnerOptions


class Plan(Struct, frozen=True):
    """What one call of `plan` decided: leases granted, and requests refused with their errors."""

    granted: Sequence[Lease] = ()
    refused: Sequence[tuple[RequestId, SchedulerError]] = ()


class Waiting(Struct, frozen=True):
    """A request in the queue: `position` counts from 1 within the queue of its model.

    `start_in_seconds` is the predicted wait; `None` where nothing is predicted.
    """

    request: Request
    position: int
    start_in_seconds: float | None


class Scheduler(Protocol):
    """Decides which agent serves which request when. Synchronous, without a clock, never logs.

    Policies inherit from it: what only a prediction can answer has the answer of those without one.

    Report events (`submit`, `withdraw`, `began`, `end`), then call `plan`, which returns all that
    follows from them. `plan` reads changes of the registry. `now` is in monotonic seconds and
    never decreases.

    `policy` is the name that `create_scheduler` knows, `rule` what it decides by, in words; empty
    where each decision has its own. `max_queue` is how many requests may wait;
    it can be changed at any time, and requests that wait already stay.
    """

    policy: str
    rule: str = ""
    max_queue: int

    # ── events ────────────────────────────────────────────────────────────────────────────────

    def submit(self, request: Request, now: float) -> None:
        """Queue a request.

        Raises:
            ModelNotFound: no agent has the model.
            NoAgentRegistered: there are no agents at all.
            HoldersUnavailable: the agents that have it, less the excluded, are offline or draining.
            QueueFull: `max_queue` requests wait already, this one had no lease before, and no other
                client has more of them; else the last one of the client with most is refused by
                the next plan.
        """

    def withdraw(self, request_id: RequestId, now: float) -> None:
        """The client of a waiting request left. No error if the request does not wait."""

    def began(self, lease_id: LeaseId, now: float) -> None:
        """The first byte of the answer arrived. No error if the lease has ended."""
        return

    def end(self, lease_id: LeaseId, outcome: Outcome, now: float) -> None:
        """An attempt ended; its slot is free.

        Raises:
            KeyError: there is no such lease, or it has ended before.
        """

    def reported(self, agent_id: AgentId, now: float) -> None:
        """The registry has a new report of an agent, with what its Ollama runs for others."""
        return

    def adopt(self, lease: Lease, now: float) -> bool:
        """Take over a running lease that another scheduler granted, under its id.

        Adopt in the order of the grants, before the first `plan`; then `submit` the requests that
        wait there, in their order. Later leases get higher ids. False, and nothing is taken over,
        when the agent or the model on it is not known any more.
        """

    # ── decisions ─────────────────────────────────────────────────────────────────────────────

    def plan(self, now: float) -> Plan:
        """Everything that can be decided now."""

    def wake_at(self, now: float) -> float | None:
        """When to call `plan` although nothing happens; `None`: never."""

    def take_back(self, now: float) -> Sequence[tuple[LeaseId, str]]:
        """Leases without a first byte whose requests another agent would serve sooner, and why.

        End each as taken back, and submit its request `taken_from` that agent. Ask twice a second.
        """
        return ()

    # ── counts ────────────────────────────────────────────────────────────────────────────────

    def leases(self) -> Iterable[Lease]:
        """Every lease that has not ended."""

    def in_flight(self, agent_id: AgentId) -> int:
        """How many of them are on this agent."""

    def waiting(self, now: float) -> list[Waiting]:
        """The requests that wait, next first."""

    def waiting_count(self) -> int:
        """How many requests wait; cheap, as nothing is predicted for it."""

    # ── explanations ──────────────────────────────────────────────────────────────────────────

    def first_byte_at(self, lease_id: LeaseId, *, longest: bool = False) -> float | None:
        """When the first byte of a lease's answer is predicted (monotonic seconds).

        `longest`: if the answer gets as long as the request and its context allow. `None` for a
        lease that waits for a load or has ended, and where nothing is predicted.
        """
        return None

    def token_seconds(self, agent_id: AgentId, model: str) -> float | None:
        """The predicted seconds per token written; `None` where nothing is predicted."""
        return None

    def is_full(self, agent_id: AgentId, model: str) -> bool:
        """Whether all slots of a model there are taken, as far as they are known."""
        return False

    def runner_options(self, agent_id: AgentId, model: str) -> RunnerOptions:
        """Options with which a request reloads nothing there, as far as is known."""
        return NO_OPTIONS

    def decision(self, lease_id: LeaseId) -> Decision | None:
        """Why a lease went to its agent: what the choice compared.

        `None` for a lease that has ended or was adopted, and where nothing is predicted.
        """
        return None

    def account(self, lease_id: LeaseId) -> Decision | None:
        """The same with the other holders of the model, evaluated now: ask right after the grant.

        `None` as for `decision`.
        """
        return None

    def explain(self, request: Request, now: float) -> Decision:
        """What would be decided for a request that is not sent, with every holder of its model.

        Raises:
            DoesNotPredict: the policy evaluates nothing.
            ModelNotFound, NoAgentRegistered, HoldersUnavailable: as `submit`.
        """
        raise DoesNotPredict(self.policy)

    def estimate(self, agent_id: AgentId, model: str) -> Estimate | None:
        """What is predicted of one model on one agent.

        `None` where the agent does not have it or the policy does not predict.
        """
        return None

    def estimates(self) -> list[Estimate]:
        """The same of every model on every agent.

        Raises:
            DoesNotPredict: the policy does not predict.
        """
        raise DoesNotPredict(self.policy)

    def prospect(
        self, agent_id: AgentId, model: str, size: int, beside: Iterable[str]
    ) -> Prospect | None:
        """What is predicted of a model of `size` bytes there, on disk or not, `beside` others.

        `None` if there is no such agent.

        Raises:
            DoesNotPredict: the policy does not predict.
        """
        raise DoesNotPredict(self.policy)

    # ── what was learned ──────────────────────────────────────────────────────────────────────

    def export_state(self) -> Learned:
        """What was learned, to be kept over a restart.

        A policy that does not predict returns what it was given, for a later one that does.
        """

    def import_state(self, learned: Learned) -> None:
        """Take over what an earlier process learned; before the first request."""
