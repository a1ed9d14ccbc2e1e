"""A fleet and a scheduler driven through its protocol, with time in the test's hand."""

from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import count
from typing import Any

import msgspec
from msgspec import Raw

from ollama_coordinator.registry import AgentState, Registry
from ollama_coordinator.scheduler import (
    Lease,
    Outcome,
    Request,
    RequestId,
    Result,
    Scheduler,
    SchedulerError,
    Timings,
    create_scheduler,
)
from ollama_coordinator.scheduler.predicted import PredictedScheduler
from ollama_coordinator_common.names import model_key
from ollama_coordinator_common.protocol import HealthReport, RegisterRequest
from ollama_coordinator_common.types import AgentId, Gpu, RunnerSettings

GB = 1_000_000_000
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
AGENT_TIMEOUT = 1_000_000.0
M = model_key("m")


class World:
    """Agents that report what a test says, and the scheduler of a policy before them."""

    def __init__(self, *, max_queue: int = 100, policy: str = "predicted", **options: Any) -> None:
        self.registry = Registry(AGENT_TIMEOUT)
        self.scheduler: Scheduler = create_scheduler(policy, self.registry, max_queue=max_queue)
        if options:
            self.scheduler = PredictedScheduler(self.registry, max_queue=max_queue, **options)
        self.now = 0.0
        self.refused: dict[RequestId, SchedulerError] = {}
        self.numbers = count(1)

    @property
    def predictor(self) -> PredictedScheduler:
        """The scheduler itself, for what it knows beyond the protocol."""
        assert isinstance(self.scheduler, PredictedScheduler)
        return self.scheduler

    def agent(
        self,
        name: str,
        *,
        models: dict[str, int] | Iterable[str] = ("m",),
        loaded: Iterable[str] = (),
        slots: int | None = None,
        memory: int | None = None,
        details: dict[str, Any] | None = None,
    ) -> AgentState:
        """Register an agent, or let it report anew; sizes in bytes, 4 GB where none is given."""
        agent_id = AgentId(name)
        if self.registry.find(agent_id) is None:
            request = RegisterRequest(name, name, "0.12.0", 11434)
            self.registry.register(request, agent_id, EPOCH, self.now)
        sizes = models if isinstance(models, dict) else dict.fromkeys(models, 4 * GB)
        report = HealthReport(
            agent_id=agent_id,
            cpu_usage=1.0,
            memory_usage=1.0,
            active_requests=0,
            gpus=[Gpu("gpu", memory_total_bytes=memory)] if memory else [],
            runner=RunnerSettings(num_parallel=slots) if slots else None,
            tags=_rows(
                {"name": model, "digest": model, "size": size, "details": details or {}}
                for model, size in sizes.items()
            ),
            ps=_rows({"name": model, "digest": model, "size": sizes[model]} for model in loaded),
        )
        return self.registry.heartbeat(report, self.now)

    def request(self, model: str = "m", **fields: Any) -> Request:
        """A request that arrives now."""
        return Request(
            id=RequestId(f"r{next(self.numbers)}"),
            model=model_key(model),
            name=model,
            arrived_at=self.now,
            **fields,
        )

    def submit(self, model: str = "m", **fields: Any) -> Request:
        """Send one, without planning."""
        request = self.request(model, **fields)
        self.scheduler.submit(request, self.now)
        return request

    def plan(self, after: float = 0.0) -> list[Lease]:
        """What is granted after so many seconds."""
        self.now += after
        plan = self.scheduler.plan(self.now)
        self.refused.update(plan.refused)
        return list(plan.granted)

    def send(self, model: str = "m", **fields: Any) -> Lease:
        """Send one that must be granted at once."""
        request = self.submit(model, **fields)
        (lease,) = self.plan()
        assert lease.request is request
        return lease

    def began(self, lease: Lease) -> None:
        """The first byte came."""
        self.scheduler.began(lease.id, self.now)

    def end(
        self, lease: Lease, result: Result = Result.SERVED, timings: Timings | None = None
    ) -> list[Lease]:
        """The attempt ended; what is granted then."""
        if result is Result.SERVED:
            self.registry.succeeded(self.registry.get(lease.agent_id), lease.request.model)
        self.scheduler.end(lease.id, Outcome(result, timings=timings), self.now)
        return self.plan()

    def serve(self, lease: Lease, timings: Timings, *, after: float = 0.0) -> list[Lease]:
        """The request is answered with these timings."""
        self.now += after
        self.began(lease)
        return self.end(lease, timings=timings)

    def tick(self, seconds: float) -> list[Lease]:
        """Let time pass as the scheduler asks to be woken; everything that was granted."""
        until, granted = self.now + seconds, []
        while (wake := self.scheduler.wake_at(self.now)) is not None and wake <= until:
            self.now = max(wake, self.now + 1e-3)
            granted += self.plan()
        self.now = max(until, self.now)
        return granted + self.plan()


def _rows(rows: Iterable[dict[str, Any]]) -> Raw:
    return Raw(msgspec.json.encode({"models": list(rows)}))
