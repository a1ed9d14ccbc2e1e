"""The waiting requests, and who of them is sent where now."""

from heapq import heapify, heappop, heappush

from ollama_coordinator.registry import Registry

from .choice import Chooser
from .eligibility import RECOVERY_SECONDS, eligible, unavailable
from .error import QueueFull, SchedulerError
from .fleet import Action, Choice, Machine
from .ledger import Ledger
from .line import Entry, Line
from .lines import Lines
from .pace import Pace
from .types import Lease, Request, RequestId
from .waits import wait_for_slot

OFFER_SECONDS = 0.1
LINES_OFFERED = 4
"""How many other models are looked at when an agent's model becomes idle, and how often at most."""

HEAD, TAIL = 1, 2
BOTH = HEAD | TAIL
"""What to look at in a line: who is next, and whether somebody far back goes elsewhere."""


class Serving:
    """Serves lines. What was granted and refused is collected until it is taken."""

    def __init__(
        self,
        registry: Registry,
        lines: Lines,
        chooser: Chooser,
        ledger: Ledger,
    ) -> None:
        self._registry = registry
        self._lines = lines
        self._chooser = chooser
        self._ledger = ledger
        self.pace = Pace()
        self.entries: dict[RequestId, Entry] = {}
        self.deadlines: list[tuple[float, int, RequestId]] = []
        self.granted: list[Lease] = []
        self.refused: list[tuple[RequestId, SchedulerError]] = []

    # ── who waits ─────────────────────────────────────────────────────────────────────────────

    def add(self, entry: Entry) -> None:
        """A request begins to wait."""
        entry.line.add(entry)
        self.entries[entry.request.id] = entry
        if entry.request.deadline is not None:
            heappush(self.deadlines, (entry.request.deadline, entry.tag[2], entry.request.id))
            if len(self.deadlines) > 2 * len(self.entries) + 64:
                self.deadlines = [one for one in self.deadlines if one[2] in self.entries]
                heapify(self.deadlines)

    def give_up(self, entry: Entry) -> None:
        """A request leaves without having been served; its client's turn is given back."""
        self._leave(entry)
        entry.line.tell()
        entry.line.clock.give_back(entry.request.client, entry.work)

    def _leave(self, entry: Entry) -> None:
        del self.entries[entry.request.id]
        entry.line.remove(entry)

    def full(self, now: float) -> QueueFull:
        """The answer to whom there is no room for."""
        return QueueFull(self.pace.retry_after(len(self.entries), now))

    def expire(self, now: float) -> None:
        """Refuse who wanted to be served by now."""
        while self.deadlines and self.deadlines[0][0] <= now:
            entry = self.entries.get(heappop(self.deadlines)[2])
            if entry is not None and (entry.request.deadline or now) <= now:
                self._refuse(entry, self._too_late(entry.request, now))

    def _too_late(self, request: Request, now: float) -> SchedulerError:
        found = eligible(self._registry, request, now)
        return self.full(now) if found.agents else unavailable(self._registry, request, found, now)

    def _refuse(self, entry: Entry, error: SchedulerError) -> None:
        self.give_up(entry)
        self.refused.append((entry.request.id, error))

    # ── one line ──────────────────────────────────────────────────────────────────────────────

    def serve(self, line: Line, now: float, part: int = BOTH) -> None:
        """Send whoever goes now: from the head; then who is far enough back; then trials."""
        if not line.size:
            return
        self._lines.refresh(line, now)
        if not (line.hot or line.cold or line.loading) or line.retried:
            self._strand(line, now)
            part = BOTH
        if part & HEAD or line.size == 1:
            self._serve_head(line, now)
        if part & TAIL:
            line.looked_at = now
            self._serve_tail(line, now)
        if line.size and line.guesses:
            self._try_more(line, now)
        line.tell()

    def _serve_head(self, line: Line, now: float) -> None:
        """Send the first ones until one would rather wait.

        When the last free slot is taken the next one is not asked: it could only prefer a load,
        and whoever is farther back, and is asked, prefers it sooner.
        """
        while line.size and self._send(line, 0, now):
            if line.size > 1 and not line.with_free_slot():
                return

    def _serve_tail(self, line: Line, now: float) -> None:
        while line.size > 1:
            position = self._chooser.first_to_go(line, now)
            if position is None or not self._send(line, position, now):
                return

    def _send(self, line: Line, position: int, now: float) -> bool:
        """Grant what is best for the request at this position, unless that is waiting."""
        self._lines.refresh(line, now)
        entry = line.at(position)
        choice = self._chooser.choose(line, entry, position, now)
        if choice.action is Action.WAIT or choice.place is None:
            return False
        self._grant(entry, choice, now)
        return True

    def _grant(self, entry: Entry, choice: Choice, now: float, *, tries: bool = False) -> None:
        self._leave(entry)
        line = entry.line
        line.clock.serve(entry.tag[0])
        self.granted.append(self._ledger.grant(line, entry, choice, now, tries=tries))
        self.pace.granted(now)

    def _try_more(self, line: Line, now: float) -> None:
        """Everything that is known to be free is taken, and somebody waits: try what is not."""
        while line.size:
            entry = line.at(0)
            choice = self._chooser.beyond(line, entry, now)
            if choice is None:
                return
            self._grant(entry, choice, now, tries=True)

    def _strand(self, line: Line, now: float) -> None:
        """Requests that no agent may serve wait for a moment if one may come back, else go."""
        candidates = {place.machine.id for place in (*line.hot, *line.loading, *line.cold)}
        for entry in list(line.entries()):
            if candidates - entry.request.excluded:
                entry.stranded_since = None
                continue
            found = eligible(self._registry, entry.request, now)
            if entry.stranded_since is None:
                entry.stranded_since = now
            hopeless = now - entry.stranded_since >= RECOVERY_SECONDS or not found.recovering
            if hopeless and not found.agents:
                self._refuse(entry, unavailable(self._registry, entry.request, found, now))

    # ── one machine ───────────────────────────────────────────────────────────────────────────

    def offer(self, machine: Machine, now: float) -> None:
        """A machine with something idle looks at the models of others, the most urgent first."""
        if not machine.routable or now - machine.offered_at < OFFER_SECONDS:
            return
        machine.offered_at = now
        for line in self._lines.wanting(machine, LINES_OFFERED):
            if machine.loading is None and self._wanted(line, machine, now):
                line.futile = (0.0, 0.0)
                self.serve(line, now)

    def _wanted(self, line: Line, machine: Machine, now: float) -> bool:
        """Whether the last one of a lane would rather have the model loaded there."""
        self._lines.refresh(line, now)
        place = machine.places[line.model]
        if place not in line.could_load:
            return False
        for last in line.lasts():
            entry = line.at(last)
            wait = wait_for_slot(line, entry, last, None, now)
            if self._chooser.load_at(place, entry, wait.cost, now) is not None:
                return True
        return False
