"""The asyncio glue of the scheduler: one lease per attempt, ended exactly once.

`async with dispatch.lease(request) as held:` waits for a lease, and the end of the block ends it:
with the outcome that the block set, else as cancelled.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager

from ollama_coordinator_common.error import OllamaCoordinatorError

from .aio import Interrupt
from .clock import Clock
from .registry import AgentState, Registry
from .scheduler import Kind, Lease, LeaseId, Outcome, Request, RequestId, Result, Scheduler
from .upstream import AgentLost, ModelStuck, RequestCancelled, TakenBack

log = logging.getLogger(__name__)

CANCELLED = Outcome(Result.CANCELLED)

ELSEWHERE = "another coordinator leads now; please try again"


class HandedOver(OllamaCoordinatorError):
    """Another coordinator leads: it goes on with the request."""


class Held:
    """One attempt under way: its lease, its agent, and the signs of progress that the monitor
    reads.

    The block of the lease sets `outcome`. `progress_at` and `began_at` are monotonic seconds of the
    last and the first byte, `records` counts streamed ones, `status` is the client's HTTP status,
    and `note` the runner that serves it where its context is larger than what was asked for.
    `late`: it is silent for much longer than predicted; `restarts`: it hangs, and its agent was
    asked to restart Ollama. `passed_on`: so many tokens of an answer its client had when another
    attempt went on with it.
    """

    def __init__(self, lease: Lease, agent: AgentState, now: float) -> None:
        self.lease = lease
        self.agent = agent
        self.outcome = CANCELLED
        self.interrupt = Interrupt()
        self.progress_at = now
        self.began_at: float | None = None
        self.records = 0
        self.status = 0
        self.ended = False
        self.late = False
        self.restarts = False
        self.note = ""
        self.passed_on = 0
        self.num_ctx = lease.request.options.num_ctx

    def lose(self, reason: str) -> None:
        """End the attempt's block with `AgentLost`."""
        self.interrupt.fire(AgentLost(reason))

    def move(self, reason: str) -> None:
        """End the attempt's block with `ModelStuck`."""
        self.interrupt.fire(ModelStuck(reason))

    def take_back(self, reason: str) -> None:
        """End the attempt's block with `TakenBack`."""
        self.interrupt.fire(TakenBack(reason))

    def cancel(self, reason: str) -> None:
        """End the attempt's block with `RequestCancelled`."""
        self.interrupt.fire(RequestCancelled(reason))


class Dispatch:
    """Hands out leases and carries out what the scheduler decides.

    Other modules only read `scheduler`. `agent_failed` is set whenever an agent is taken out of
    rotation; the monitor waits for it. `closed`: nothing is begun any more. `is_held`: nothing is
    granted for now.
    """

    def __init__(self, scheduler: Scheduler, registry: Registry, clock: Clock) -> None:
        self.scheduler = scheduler
        self.registry = registry
        self.clock = clock
        self._held: dict[LeaseId, Held] = {}
        self._waiting: dict[RequestId, asyncio.Future[Held]] = {}
        self._wanted: dict[RequestId, str] = {}
        self._embedded: dict[str, AgentState] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.agent_failed = asyncio.Event()
        self.closed = False
        self.is_held = False
        self._is_over = False

    def held(self) -> Iterable[Held]:
        """Every attempt under way."""
        return self._held.values()

    def wanted(self) -> set[str]:
        """The routing keys of the models that requests wait for."""
        return set(self._wanted.values())

    def take_embedded(self) -> dict[str, AgentState]:
        """The models that embedded since the last call, and an agent that did it."""
        embedded, self._embedded = self._embedded, {}
        return embedded

    @asynccontextmanager
    async def lease(self, request: Request) -> AsyncIterator[Held]:
        """A lease on an agent for one attempt, from its grant until the block ends.

        Raises:
            SchedulerError: no agent can serve the request.
            HandedOver: another coordinator has to serve it.
        """
        held = await self._granted(request)
        try:
            yield held
        finally:
            self._settle(held)

    async def _granted(self, request: Request) -> Held:
        if self._is_over:
            raise HandedOver(ELSEWHERE)
        self.scheduler.submit(request, self.clock.now())
        future: asyncio.Future[Held] = asyncio.get_running_loop().create_future()
        self._waiting[request.id] = future
        self._wanted[request.id] = request.model
        try:
            self.plan()
            return await future
        except asyncio.CancelledError:
            self._give_back(request.id, future)
            raise
        finally:
            del self._waiting[request.id], self._wanted[request.id]
            # An error of the future has this frame in its traceback: else the two keep each other.
            del future

    def _give_back(self, request_id: RequestId, future: asyncio.Future[Held]) -> None:
        """The client left while it waited, perhaps just after its lease was granted."""
        if future.done() and not future.cancelled() and future.exception() is None:
            self._settle(future.result())
        else:
            self.scheduler.withdraw(request_id, self.clock.now())
            self.plan()

    def began(self, held: Held) -> None:
        """The first byte of the answer is here."""
        held.began_at = held.progress_at = self.clock.now()
        self.scheduler.began(held.lease.id, held.began_at)
        # A first byte shows that a load is over, and that there is a slot more than was known.
        self._plan_if_any_waits()

    def _settle(self, held: Held) -> None:
        now = self.clock.now()
        try:
            self._note(held, now)
        finally:
            self._end(held, now)
            self._plan_if_any_waits()

    def _end(self, held: Held, now: float) -> None:
        del self._held[held.lease.id]
        held.ended = True
        self.scheduler.end(held.lease.id, held.outcome, now)

    def cancel(self, request_id: RequestId, reason: str) -> bool:
        """End a request, waiting or running; false when it does neither."""
        future = self._waiting.get(request_id)
        if future is not None and not future.done():
            self.scheduler.withdraw(request_id, self.clock.now())
            future.set_exception(RequestCancelled(reason))
            self.plan()
            return True
        for held in self._held.values():
            if held.lease.request.id == request_id:
                held.cancel(reason)
                return True
        return False

    def _note(self, held: Held, now: float) -> None:
        """What an attempt showed of its agent."""
        agent, lease, outcome = held.agent, held.lease, held.outcome
        model, began = lease.request.model, lease.granted_at
        match outcome.result:
            case Result.SERVED | Result.ERRORED:
                self.registry.succeeded(agent, model, held.num_ctx)
            case Result.UNREACHABLE | Result.CUT:
                if outcome.asked:
                    # Its Ollama may answer probes at once: the model is asked for elsewhere first.
                    self.registry.fail_model(
                        agent, model, outcome.reason, now, began=began, asked=outcome.asked
                    )
                self.take_out(agent, outcome.reason, began)
            case Result.BUSY | Result.MODEL_FAILED:
                self.registry.fail_model(agent, model, outcome.reason, now, began=began)
                log.warning("model failed on agent", extra=_facts(agent, model, outcome.reason))
            case Result.MODEL_MISSING:
                self.registry.note_missing(agent, model)
                # It may go on listing it: others are asked first all the same.
                self.registry.fail_model(agent, model, outcome.reason, now, began=began)
                log.warning("model missing on agent", extra=_facts(agent, model, outcome.reason))
            case Result.CANCELLED | Result.TAKEN_BACK | Result.REJECTED:
                pass

    def pardon(self, agent: AgentState, model: str) -> None:
        """An attempt failed through no fault of its agent: the request's, as others showed."""
        self.registry.pardon(agent, model)
        log.info("model serves again on agent", extra=_facts(agent, model, "others fail alike"))
        self.plan()

    def take_out(self, agent: AgentState, reason: str, began: float | None = None) -> None:
        """An agent does not answer: out of rotation until a probe succeeds.

        `began` is when the request that it does not answer was sent, if that was earlier.
        """
        was_resting, now = agent.resting, self.clock.now()
        self.registry.fail(agent, reason, now, began=began)
        if agent.resting and not was_resting:
            log.warning("agent out of rotation", extra=_facts(agent, None, reason))
        self.agent_failed.set()

    def _plan_if_any_waits(self) -> None:
        """A request began or ended: that changes something for those that wait alone."""
        if self.scheduler.waiting_count():
            self.plan()

    def reported(self, agent: AgentState) -> None:
        """The registry has a new report of this agent."""
        self.scheduler.reported(agent.id, self.clock.now())
        self.plan()

    def take_back(self) -> None:
        """Move requests whose clients have seen nothing to where they are served sooner."""
        for lease_id, reason in self.scheduler.take_back(self.clock.now()):
            self._held[lease_id].take_back(reason)

    def plan(self) -> None:
        """Carry out everything that the scheduler can decide now; call it when facts changed."""
        if self.is_held:
            return
        now = self.clock.now()
        plan = self.scheduler.plan(now)
        for lease in plan.granted:
            self._grant(lease, now)
        for request_id, error in plan.refused:
            future = self._waiting[request_id]
            if not future.done():
                future.set_exception(error)
        self._set_timer(now)

    def _grant(self, lease: Lease, now: float) -> None:
        future = self._waiting[lease.request.id]
        held = Held(lease, self.registry.get(lease.agent_id), now)
        self._held[lease.id] = held
        if lease.request.kind is Kind.EMBED:
            self._embedded[lease.request.model] = held.agent
        if future.done():
            # The client left and its task has not run yet: the lease goes back, and `plan` runs
            # again when that task withdraws.
            self._end(held, now)
        else:
            future.set_result(held)

    def _set_timer(self, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        at = self.scheduler.wake_at(now)
        if at is not None:
            # The timer only calls `plan`; it ends with the loop and owns nothing.
            self._timer = asyncio.get_running_loop().call_later(max(0.0, at - now), self.plan)

    # ── coordinators that follow each other ───────────────────────────────────────────────────

    def hold(self) -> None:
        """Grant nothing until `release`: it is not known yet what runs."""
        self.is_held = True

    def release(self) -> None:
        """Grant again."""
        self.is_held = False
        self.plan()

    @contextmanager
    def adopted(self, lease: Lease, agent: AgentState) -> Iterator[Held]:
        """A lease that another coordinator granted, until the block ends.

        Nothing is counted where the scheduler does not know the model on the agent any more.
        """
        now = self.clock.now()
        held = Held(lease, agent, now)
        if self.scheduler.adopt(lease, now):
            self._held[lease.id] = held
        try:
            yield held
        finally:
            if lease.id in self._held:
                self._settle(held)

    def hand_over(self) -> None:
        """Grant nothing any more: what waits ends with `HandedOver`, and so does what comes."""
        self._is_over = self.is_held = self.closed = True
        for request_id, future in self._waiting.items():
            if not future.done():
                self.scheduler.withdraw(request_id, self.clock.now())
                future.set_exception(HandedOver(ELSEWHERE))

    def close(self, reason: str) -> None:
        """End every attempt and every wait with an error."""
        self.closed = True
        for held in list(self._held.values()):
            held.lose(reason)
        for request_id, future in self._waiting.items():
            if not future.done():
                # A lease granted later would find no task that waits for it.
                self.scheduler.withdraw(request_id, self.clock.now())
                future.set_exception(AgentLost(reason))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _facts(agent: AgentState, model: str | None, reason: str) -> dict[str, str | None]:
    return {"agent_id": agent.id, "agent": agent.name, "model": model, "reason": reason}
