"""A scheduler whose policy can be changed while requests wait and run.

It hands everything on to the scheduler of the policy in force. A switch makes a new one over the
same registry, gives it the leases that live and the requests that wait, and lets the old one go;
what the old one learned is kept until a policy that predicts is in force again.
"""

from collections.abc import Iterable
from itertools import count

from ollama_coordinator.registry import Registry
from ollama_coordinator_common.types import AgentId

from .base import Plan, Scheduler, Waiting
from .error import SchedulerError
from .explain import Decision
from .factory import create_scheduler
from .predicted import PredictedScheduler
from .state import Estimate, Learned
from .types import Lease, LeaseId, Outcome, Request, RequestId

NO_LIMIT = 1_000_000_000


class DoesNotPredict(SchedulerError):
    """The policy in force has no estimates to tell."""

    def __init__(self, policy: str) -> None:
        super().__init__(
            f"policy '{policy}' does not predict; choose 'predicted' on the settings page "
            "or with COORDINATOR_POLICY"
        )


class SwitchingScheduler:
    """A `Scheduler` under one of `POLICIES`, and another one after `switch`.

    Raises:
        KeyError: no such policy.
    """

    def __init__(self, policy: str, registry: Registry, *, max_queue: int) -> None:
        self.policy = policy
        self._registry = registry
        self._max_queue = max_queue
        self._numbers = count(1)
        self._learned = Learned()
        self._orphans: dict[LeaseId, Lease] = {}
        self._decided: dict[LeaseId, Decision | None] = {}
        self._refused: dict[RequestId, SchedulerError] = {}
        self._current = self._create(policy)

    def _create(self, policy: str) -> Scheduler:
        return create_scheduler(
            policy, self._registry, max_queue=self._max_queue, numbers=self._numbers
        )

    # ── what can be changed ───────────────────────────────────────────────────────────────────

    @property
    def max_queue(self) -> int:
        """How many requests may wait. Who waits already stays when it is lowered."""
        return self._max_queue

    @max_queue.setter
    def max_queue(self, value: int) -> None:
        self._max_queue = self._current.max_queue = value

    def switch(self, policy: str, now: float) -> None:
        """Go on under another policy: nobody loses a place, and who waits keeps its turn.

        Call `plan` next: it also tells who cannot wait any longer under the new one.

        Raises:
            KeyError: no such policy; nothing has changed.
        """
        if policy == self.policy:
            return
        old, new = self._current, self._create(policy)
        self._learned = self.export_state()
        if isinstance(new, PredictedScheduler):
            new.import_state(self._learned)
        # In the order in which they were granted, which tells who runs and who queues at an agent.
        for lease in sorted(old.leases(), key=_number):
            self._decided[lease.id] = self.decision(lease.id)
            if not new.adopt(lease, now):
                self._orphans[lease.id] = lease
        self._hand_over(old.waiting(now), new, now)
        self.policy, self._current = policy, new

    def _hand_over(self, line: Iterable[Waiting], new: Scheduler, now: float) -> None:
        """Who waits, in its order, however long the line may be."""
        new.max_queue = NO_LIMIT
        for waiting in line:
            try:
                new.submit(waiting.request, now)
            except SchedulerError as exc:
                self._refused[waiting.request.id] = exc
        new.max_queue = self._max_queue

    # ── the protocol ──────────────────────────────────────────────────────────────────────────

    def submit(self, request: Request, now: float) -> None:
        """See `Scheduler.submit`."""
        self._current.submit(request, now)

    def withdraw(self, request_id: RequestId, now: float) -> None:
        """See `Scheduler.withdraw`."""
        self._refused.pop(request_id, None)
        self._current.withdraw(request_id, now)

    def began(self, lease_id: LeaseId, now: float) -> None:
        """See `Scheduler.began`."""
        self._current.began(lease_id, now)

    def end(self, lease_id: LeaseId, outcome: Outcome, now: float) -> None:
        """See `Scheduler.end`."""
        self._decided.pop(lease_id, None)
        if self._orphans.pop(lease_id, None) is None:
            self._current.end(lease_id, outcome, now)

    def plan(self, now: float) -> Plan:
        """See `Scheduler.plan`."""
        plan = self._current.plan(now)
        if not self._refused:
            return plan
        refused, self._refused = self._refused, {}
        return Plan(plan.granted, (*refused.items(), *plan.refused))

    def wake_at(self, now: float) -> float | None:
        """See `Scheduler.wake_at`."""
        return now if self._refused else self._current.wake_at(now)

    def leases(self) -> Iterable[Lease]:
        """See `Scheduler.leases`."""
        if not self._orphans:
            return self._current.leases()
        return [*self._orphans.values(), *self._current.leases()]

    def in_flight(self, agent_id: AgentId) -> int:
        """See `Scheduler.in_flight`."""
        orphans = sum(lease.agent_id == agent_id for lease in self._orphans.values())
        return orphans + self._current.in_flight(agent_id)

    def waiting(self, now: float) -> list[Waiting]:
        """See `Scheduler.waiting`."""
        return self._current.waiting(now)

    def waiting_count(self) -> int:
        """See `Scheduler.waiting_count`."""
        return self._current.waiting_count()

    def adopt(self, lease: Lease, now: float) -> bool:
        """See `Scheduler.adopt`."""
        return self._current.adopt(lease, now)

    # ── what the policy predicts ──────────────────────────────────────────────────────────────

    @property
    def predictor(self) -> PredictedScheduler:
        """The scheduler in force.

        Raises:
            DoesNotPredict: it is none that predicts.
        """
        if not isinstance(self._current, PredictedScheduler):
            raise DoesNotPredict(self.policy)
        return self._current

    def decision(self, lease_id: LeaseId) -> Decision | None:
        """Why a lease went where it is, if the policy that granted it predicts."""
        if lease_id in self._decided:
            return self._decided[lease_id]
        current = self._current
        return current.decision(lease_id) if isinstance(current, PredictedScheduler) else None

    def account(self, lease_id: LeaseId) -> Decision | None:
        """The same with the other holders of its model, where that can still be told."""
        current = self._current
        if lease_id in self._decided or not isinstance(current, PredictedScheduler):
            return self.decision(lease_id)
        return current.account(lease_id)

    def explain(self, request: Request, now: float) -> Decision:
        """What would be decided for a request that is not sent.

        Raises:
            DoesNotPredict: the policy in force weighs nothing.
            ModelNotFound, NoAgentRegistered, HoldersUnavailable: as `submit`.
        """
        return self.predictor.explain(request, now)

    def estimates(self) -> list[Estimate]:
        """What is predicted of every model on every agent; nothing unless the policy predicts."""
        if not isinstance(self._current, PredictedScheduler):
            return []
        return self._current.estimates()

    def estimate(self, agent_id: AgentId, model: str) -> Estimate | None:
        """What is predicted of one model on one agent, if it has it and the policy predicts."""
        current = self._current
        return (
            current.estimate(agent_id, model) if isinstance(current, PredictedScheduler) else None
        )

    def export_state(self) -> Learned:
        """What was learned, also under an earlier policy."""
        if not isinstance(self._current, PredictedScheduler):
            return self._learned
        return self._current.export_state()

    def import_state(self, learned: Learned) -> None:
        """Take over what an earlier process learned; before the first request."""
        self._learned = learned
        if isinstance(self._current, PredictedScheduler):
            self._current.import_state(learned)


def _number(lease: Lease) -> int:
    return lease.id
