"""Leases and what follows from them: what runs where, what is in memory, what is being loaded."""

from bisect import insort

from ollama_coordinator_common.types import AgentId

from .cost import service_seconds
from .queue import Queue, QueueEntry
from .queues import Queues
from .state import Action, Choice, Machine, Place, Running
from .sync import FRESH_SECONDS, Machines
from .types import Lease, LeaseId

SLOW_DOWN_TOLERANCE = 0.01  # A hundredth more or less is not worth sorting the predicted ends anew
# Without a sign of it a load is assumed to be over a little late, as loads scatter so much.
LATE_LOAD = 1.1


class Leases:
    """Every count here derives from `running`: one entry per lease, from its grant to its end."""

    def __init__(self, machines: Machines, queues: Queues) -> None:
        self._machines = machines
        self._queues = queues
        self._last_id = 0
        self.unconfirmed: dict[Place, float] = {}
        """Models whose load was assumed to be over at this time, and no sign of them yet."""
        self._disturbed: dict[Machine, None] = {}
        """Machines where a lease began or ended since the ends were predicted."""
        self.loads: list[Place] = []
        """The loads under way, the one that ends soonest first."""
        self.running: dict[LeaseId, tuple[Running, Queue]] = {}
        self.by_agent: dict[AgentId, int] = {}

    def grant(
        self, queue: Queue, entry: QueueEntry, choice: Choice, now: float, *, tries: bool
    ) -> Lease:
        """Give a request the place that was chosen for it."""
        place, request = choice.place, entry.request
        if place is None:
            raise ValueError("nothing was chosen")
        number = self._last_id = self._last_id + 1
        lease = Lease(
            id=LeaseId(number),
            request=request,
            agent_id=place.machine.id,
            granted_at=now,
            unload=tuple(victim.model for victim in choice.eviction.victims),
        )
        loads = choice.action is Action.LOAD
        wait = choice.wait + (LATE_LOAD - 1) * place.load if loads else 0.0
        if not loads and place.owner.is_seen:
            wait = place.owner_wait(len(place.running), now)
        new = max(request.prompt_tokens - choice.cached, 0)
        run = Running(
            lease, place, number, now + wait + service_seconds(place, new, entry.receiver.output),
            loads=loads, tries=tries, rank=len(place.running) + 1, cached=choice.cached,
            output=entry.receiver.output, choice=choice,
        )  # fmt: skip
        if loads:
            self._begin_load(place, queue, choice, now)
        if tries:
            place.slots.try_more(now)
        self._begin(run, queue, now)
        return lease

    def adopt(self, queue: Queue, place: Place, lease: Lease, output: float, now: float) -> None:
        """Count a lease that another scheduler granted; its model is there, or is on its way.

        It counts as the first of its place: how long it waited behind others, and so how many slots
        there are, is not known.
        """
        self._last_id = max(self._last_id, lease.id)
        absent = not place.resident and place.loading_until is None
        loads = absent and place.machine.loading is None
        wait = place.load if loads else 0.0
        choice = Choice(Action.LOAD if loads else Action.GO, place, wait, wait)
        run = Running(
            lease, place, lease.id,
            now + wait + service_seconds(place, lease.request.prompt_tokens, output),
            loads=loads, tries=False, rank=1, cached=0, output=output, choice=choice,
            adopted=True,
        )  # fmt: skip
        if loads:
            self._begin_load(place, queue, choice, now)
        elif absent:
            self._machines.settle(place, queue.options)
            self._queues.moved(place)
        self._begin(run, queue, now)

    def _begin_load(self, place: Place, queue: Queue, choice: Choice, now: float) -> None:
        for victim in choice.eviction.victims:
            victim.evicted(now)
            self._machines.vacate(victim)
            self._queues.moved(victim)
        if place.resident:  # in memory with other options: it is loaded anew
            self._machines.vacate(place)
        place.begin_load(queue.options, choice.wait * LATE_LOAD, now)
        self._machines.occupy(place)
        insort(self.loads, place, key=_load_ends)
        self._queues.moved(place)

    def _begin(self, run: Running, queue: Queue, now: float) -> None:
        place, agent_id = run.place, run.lease.agent_id
        self.running[run.lease.id] = (run, queue)
        self.by_agent[agent_id] = self.by_agent.get(agent_id, 0) + 1
        self._disturbed[place.machine] = None
        place.begin(run, now)
        queue.started(run)

    def finish(self, lease_id: LeaseId, now: float) -> tuple[Running, Queue]:
        """Take a lease out of every count.

        Raises:
            KeyError: there is no such lease, or it has ended before.
        """
        run, queue = self.running.pop(lease_id)
        place, agent_id = run.place, run.lease.agent_id
        self.by_agent[agent_id] -= 1
        if not self.by_agent[agent_id]:
            del self.by_agent[agent_id]
        self._disturbed[place.machine] = None
        queue.ended(run)
        place.end(run, now)
        for freed in self._queues.of(place.names):
            freed.freed(place)
        return run, queue

    def repredict(self, now: float) -> None:
        """Predict ends anew where other requests run beside them than when they were predicted.

        Call it after a plan: by then most slots that got free have been given away again.
        """
        while self._disturbed:
            for place in self._disturbed.popitem()[0].busy:
                self._repredict_place(place, now)

    def _repredict_place(self, place: Place, now: float) -> None:
        slow_down = place.current_slow_down()
        slower = slow_down / place.slow_down - 1
        if abs(slower) < SLOW_DOWN_TOLERANCE:
            return
        place.slow_down_changed(slow_down)
        start = max(now, place.loading_until or now)
        for lease_id, run in place.running.items():
            if run.ends_at > start:
                _, queue = self.running[lease_id]
                queue.ended(run)
                place.delay_end(run, (run.ends_at - start) * slower)
                queue.started(run)

    # ── loads ─────────────────────────────────────────────────────────────────────────────────

    def loaded(self, place: Place, now: float) -> None:
        """A load is over and the model in memory."""
        if place.machine.places.get(place.model) is not place:  # deleted meanwhile
            self.load_failed(place)
            return
        self._end_load(place, at=now)
        self._machines.settle(place, place.options)
        self._queues.moved(place)

    def load_failed(self, place: Place) -> None:
        """A load came to nothing."""
        self._end_load(place, at=None)
        self._machines.vacate(place)
        self._queues.moved(place)

    def _end_load(self, place: Place, *, at: float | None) -> None:
        if place in self.loads:
            self.loads.remove(place)
        self.unconfirmed.pop(place, None)
        machine = place.machine
        place.load_ended(next((one for one in self.loads if one.machine is machine), None), at=at)

    def assume_loaded(self, now: float) -> list[Place]:
        """End the loads that should be over by now, and return their places."""
        if not self.loads or _load_ends(self.loads[0]) > now:
            return []
        due = [place for place in self.loads if _load_ends(place) <= now]
        over = [place for place in due if not place.blocked or _is_listed(place)]
        for place in due:
            if place in over:
                due_at = place.loading_until or now
                self.loaded(place, now)
                self.unconfirmed[place] = due_at
            else:
                place.delay_load(now)
                self.loads.sort(key=_load_ends)
        return over

    def answered(self, place: Place) -> None:
        """A request was answered there: its model is in memory."""
        self.unconfirmed.pop(place, None)

    def blocked_loads(self, now: float) -> list[Place]:
        """Loads that were assumed to be over and are not: their agents do not list the models.

        Without room Ollama waits for a model in use to become idle, and all later loads wait behind
        that one: none are sent there until it is done.
        """
        found = []
        for place, due_at in list(self.unconfirmed.items()):
            sampled = place.machine.agent.inventory.sampled_at or 0.0
            if not place.running or not place.resident:
                del self.unconfirmed[place]
            elif sampled > due_at + FRESH_SECONDS:
                del self.unconfirmed[place]
                if not _is_listed(place):
                    place.block_load(now)
                    insort(self.loads, place, key=_load_ends)
                    self._queues.moved(place)
                    found.append(place)
        return found

    def lost(self, machine: Machine) -> None:
        """The agent is offline: what it was loading is not being loaded any more."""
        for place in [one for one in self.loads if one.machine is machine]:
            self.load_failed(place)


def _load_ends(place: Place) -> float:
    return place.loading_until or 0.0


def _is_listed(place: Place) -> bool:
    return place.machine.agent.inventory.is_loaded(place.model)
