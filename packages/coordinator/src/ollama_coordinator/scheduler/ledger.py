"""Leases and what follows from them: who runs where, what is in memory, what is being loaded."""

from ollama_coordinator_common.types import AgentId

from .cost import pace, stay_seconds
from .fleet import Action, Choice, Machine, Place, Running, Trial
from .line import Entry, Line
from .lines import Lines
from .mirror import FRESH_SECONDS, Mirror
from .types import Lease, LeaseId

PACE_TOLERANCE = 0.01

LATE_LOAD = 1.1
"""A load is taken to be over a little after its predicted end when nothing was heard of it."""

SHORTEST_DELAY_SECONDS = 1.0


class Ledger:
    """Every count here derives from `running`: one entry per lease, from its grant to its end."""

    def __init__(self, mirror: Mirror, lines: Lines) -> None:
        self._mirror = mirror
        self._lines = lines
        self._last_id = 0
        self.loads: list[Place] = []
        self._unheard: dict[Place, float] = {}  # since when what was being loaded should be there
        self.running: dict[LeaseId, tuple[Running, Line]] = {}
        self._disturbed: dict[Machine, None] = {}
        self.by_agent: dict[AgentId, int] = {}

    def grant(self, line: Line, entry: Entry, choice: Choice, now: float, *, tries: bool) -> Lease:
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
            unload=tuple(victim.model for victim in choice.room.victims),
        )
        loads = choice.action is Action.LOAD
        wait = choice.wait + (LATE_LOAD - 1) * place.load if loads else 0.0
        new = max(request.prompt_tokens - choice.cached, 0)
        run = Running(
            lease, place, number, now + wait + stay_seconds(place, new, entry.output),
            loads=loads, tries=tries, rank=len(place.running) + 1, cached=choice.cached,
            output=entry.output, choice=choice,
        )  # fmt: skip
        if loads:
            self._begin_load(place, line, choice, now)
        if tries:
            place.slots.try_more(now)
        self._start(run, line, now)
        return lease

    def adopt(self, line: Line, place: Place, lease: Lease, output: float, now: float) -> None:
        """Count a lease that another scheduler granted; its model is there, or is on its way.

        It is taken for the first of its place: how long it waited behind others, and so how many
        slots there are, cannot be told any more.
        """
        self._last_id = max(self._last_id, lease.id)
        absent = not place.resident and place.loading_until is None
        loads = absent and place.machine.loading is None
        wait = place.load if loads else 0.0
        choice = Choice(Action.LOAD if loads else Action.GO, place, wait, wait)
        run = Running(
            lease, place, lease.id,
            now + wait + stay_seconds(place, lease.request.prompt_tokens, output),
            loads=loads, tries=False, rank=1, cached=0, output=output, choice=choice,
            adopted=True,
        )  # fmt: skip
        if loads:
            self._begin_load(place, line, choice, now)
        elif absent:
            place.options = line.options
            self._mirror.settle(place, now, options_known=True)
            self._lines.moved(place)
        self._start(run, line, now)

    def _begin_load(self, place: Place, line: Line, choice: Choice, now: float) -> None:
        for victim in choice.room.victims:
            victim.unloaded_at = now
            self._mirror.vacate(victim)
            self._lines.moved(victim)
        if place.resident:  # in memory with other options: it is loaded anew
            self._mirror.vacate(place)
        machine = place.machine
        machine.loading = place
        machine.trial = Trial(place, tuple(machine.residents))
        if machine.reserved is place:
            machine.reserved = None
        place.options = line.options
        place.loading_since, place.blocked = now, False
        place.loading_until = now + choice.wait * LATE_LOAD
        place.loaded_at = place.loading_until
        self._mirror.occupy(place)
        self.loads.append(place)
        self._lines.moved(place)

    def _start(self, run: Running, line: Line, now: float) -> None:
        place, machine = run.place, run.place.machine
        self.running[run.lease.id] = (run, line)
        self.by_agent[machine.id] = self.by_agent.get(machine.id, 0) + 1
        run.crowd = place.count_crowd(now)
        self._disturbed[machine] = None
        if not place.running:
            machine.epoch += 1
            machine.busy[place] = None
            place.pace = len(machine.busy)
        place.running[run.lease.id] = run
        place.ends += run.ends_at
        place.touched_at = now
        place.last_used = run.number
        machine.running += 1
        machine.ends += run.ends_at
        line.started(run)

    def finish(self, lease_id: LeaseId, now: float) -> tuple[Running, Line]:
        """Take a lease out of every count.

        Raises:
            KeyError: there is no such lease, or it has ended before.
        """
        run, line = self.running.pop(lease_id)
        place, machine = run.place, run.place.machine
        self.by_agent[machine.id] -= 1
        if not self.by_agent[machine.id]:
            del self.by_agent[machine.id]
        crowd = place.count_crowd(now) - run.crowd
        run.company = max(crowd / max(now - run.lease.granted_at, 1e-6) - 1, 0.0)
        self._disturbed[machine] = None
        del place.running[lease_id]
        place.touched_at = now
        place.ends -= run.ends_at
        machine.running -= 1
        machine.ends -= run.ends_at
        if not place.running:
            machine.epoch += 1
            del machine.busy[place]
            place.ends = 0.0
        if not machine.running:
            machine.ends = 0.0
        line.ended(run)
        for freed in self._lines.of(place.names):
            freed.freed(place)
        return run, line

    def repredict(self, now: float) -> None:
        """Whoever has other company than when its end was predicted ends sooner, or later.

        After a plan, when most slots that got free have been given away again.
        """
        while self._disturbed:
            for place in self._disturbed.popitem()[0].busy:
                self._keep_pace(place, now)

    def _keep_pace(self, place: Place, now: float) -> None:
        found = pace(place)
        slower = found / place.pace - 1
        if abs(slower) < PACE_TOLERANCE:
            return
        place.pace = found
        start = max(now, place.loading_until or now)
        for lease_id, run in place.running.items():
            if run.ends_at <= start:
                continue
            later = (run.ends_at - start) * slower
            line = self.running[lease_id][1]
            line.ended(run)
            run.ends_at += later
            line.started(run)
            place.ends += later
            place.machine.ends += later

    # ── loads ─────────────────────────────────────────────────────────────────────────────────

    def loaded(self, place: Place, now: float) -> None:
        """A load is over and the model in memory."""
        if place.machine.places.get(place.model) is not place:  # deleted meanwhile
            self.load_failed(place)
            return
        self._end_load(place)
        place.loaded_at = now
        place.machine.epoch += 1
        self._mirror.settle(place, now, options_known=True)
        self._lines.moved(place)

    def load_failed(self, place: Place) -> None:
        """A load came to nothing."""
        self._end_load(place)
        place.loading_until = None
        self._mirror.vacate(place)
        self._lines.moved(place)

    def _end_load(self, place: Place) -> None:
        if place in self.loads:
            self.loads.remove(place)
        self._unheard.pop(place, None)
        machine = place.machine
        if machine.loading is place:
            machine.loading = next((one for one in self.loads if one.machine is machine), None)

    def over_loads(self, now: float) -> list[Place]:
        """End the loads that should be over by now: these."""
        due = [place for place in self.loads if (place.loading_until or 0.0) <= now]
        over = [place for place in due if not place.blocked or _is_listed(place)]
        for place in due:
            if place in over:
                due_at = place.loading_until or now
                self.loaded(place, now)
                self._unheard[place] = due_at
            else:
                self._put_off(place, now)
        return over

    def heard(self, place: Place) -> None:
        """A request was answered there: its model is in memory."""
        self._unheard.pop(place, None)

    def blocked_loads(self, now: float) -> list[Place]:
        """Loads that were taken to be over and are not: their agents do not list the models.

        Ollama waits for a model in use to leave when there is no room, and all later loads wait
        behind that one: none are sent there until it is done.
        """
        found = []
        for place, due_at in list(self._unheard.items()):
            sampled = place.machine.agent.inventory.sampled_at or 0.0
            if not place.running or not place.resident:
                del self._unheard[place]
            elif sampled > due_at + FRESH_SECONDS:
                del self._unheard[place]
                if not _is_listed(place):
                    self._take_back(place, now)
                    found.append(place)
        return found

    def _take_back(self, place: Place, now: float) -> None:
        place.resident, place.blocked = False, True
        self._put_off(place, now)
        self.loads.append(place)
        machine = place.machine
        machine.loading = machine.loading or place
        machine.epoch += 1
        self._lines.moved(place)

    def _put_off(self, place: Place, now: float) -> None:
        more = (now - place.loading_since) / 4
        place.loading_until = now + max(more, SHORTEST_DELAY_SECONDS)

    def lost(self, machine: Machine) -> None:
        """The agent is gone: what it was loading is not being loaded any more."""
        for place in [one for one in self.loads if one.machine is machine]:
            self.load_failed(place)


def _is_listed(place: Place) -> bool:
    return place.machine.agent.inventory.is_loaded(place.model)
