"""The waiting line of one model with one set of runner options, and who may serve it.

Lanes are sorted by start-time fair queueing between clients over predicted work; the lane whose
head is due first goes first.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping

from msgspec import Struct

from .awaited import Awaited
from .cost import COURTESY
from .demand import Demand
from .fair import FairClock, Tag
from .fleet import Place, Running
from .types import Lane, Request, RunnerOptions

BUDGET_SECONDS: Mapping[Lane, float] = {
    Lane.INTERACTIVE: 6.0,
    Lane.BATCH: 90.0,
    Lane.EMBEDDING: 3.0,
}
"""How long a request of each lane may wait before it is late."""

OCCUPANCY_GAIN = 0.1


class Entry(Struct, eq=False):
    """A waiting request: its place in the order, and what is predicted of it.

    `due` is when it begins to be late, `courtesy` how much more the seconds of others count.
    """

    request: Request
    tag: Tag
    line: "Line"
    output: float
    work: float
    stranded_since: float | None = None
    due: float = 0.0
    courtesy: float = 1.0

    def __post_init__(self) -> None:
        self.due = self.request.arrived_at + BUDGET_SECONDS[self.request.lane]
        self.courtesy = COURTESY[self.request.lane]


class Line:
    """Requests that one loaded runner can serve alike, in the order in which they go."""

    def __init__(self, model: str, options: RunnerOptions, demand: Demand) -> None:
        self.model = model
        self.options = options
        self.demand = demand
        self.clock = FairClock()
        self.lanes: dict[Lane, list[tuple[Tag, Entry]]] = {lane: [] for lane in Lane}
        self.interactive = self.lanes[Lane.INTERACTIVE]
        self.urgent: list[list[tuple[Tag, Entry]]] = []  # the lanes in use, most urgent first
        self.size = 0
        self.retried = 0
        self.hot: list[Place] = []
        self.loading: list[Place] = []
        self.cold: list[Place] = []
        self._open: list[Place] = []  # those of `hot` that may have a free slot
        self.away: set[Place] = set()  # perhaps: what gets free there is not for this line
        self.awaited = Awaited()
        self.futile = (0.0, 0.0)
        self.guesses = False  # whether any place has slots that nobody told
        self.turn = 0
        self.could_load: set[Place] = set()
        self.due = float("inf")
        self.drain_at = float("-inf")
        self.fresh_until = float("-inf")
        self.embeds = False
        self.ends: list[tuple[float, int, Running]] = []
        self.occupancy: float | None = None
        self.looked_at = 0.0
        self.used_at = 0.0

    # ── the order ─────────────────────────────────────────────────────────────────────────────

    def add(self, entry: Entry) -> None:
        """One more request waits."""
        lane = self.lanes[entry.request.lane]
        insort(lane, (entry.tag, entry))
        self.size += 1
        if lane[0][1] is entry:
            self._sort_lanes()
        self.retried += bool(entry.request.excluded)

    def remove(self, entry: Entry) -> None:
        """It waits no longer."""
        lane = self.lanes[entry.request.lane]
        index = bisect_left(lane, (entry.tag,))
        del lane[index]
        self.size -= 1
        if not index:
            self._sort_lanes()
        self.retried -= bool(entry.request.excluded)
        if not self.size:
            self.tell()

    def tell(self) -> None:
        """Tell the places that may serve this line how many people wait for them."""
        self.awaited.tell(len(self.interactive), self.hot, self.loading)

    def only(self, place: Place) -> "Line":
        """The same line, empty, as if its model had this place alone."""
        alone = Line(self.model, self.options, self.demand)
        alone.hot = [place] if place in self.hot else []
        alone.loading = [place] if place in self.loading else []
        alone.cold = [place] if place in self.cold else []
        alone.rearranged()
        alone.ends = sorted((run.ends_at, run.number, run) for run in place.running.values())
        alone.occupancy = self.occupancy
        return alone

    @property
    def quickest_load(self) -> float:
        """The seconds of the fastest load that may be possible."""
        return load_seconds(self.cold[0]) if self.cold else float("inf")

    def drop(self, place: Place) -> bool:
        """Take a place out of those that come into question; false if it did not."""
        for part in (self.hot, self.loading, self.cold):
            if place in part:
                part.remove(place)
                self.could_load.discard(place)
                self.rearranged()
                return True
        return False

    def rearranged(self) -> None:
        """Which places come into question has changed, or what is known of their slots."""
        self.awaited.moved = True
        self._open = list(self.hot)

    def freed(self, place: Place) -> None:
        """A slot there got free."""
        if place in self.hot and place not in self._open:
            self._open.append(place)

    def with_free_slot(self) -> list[Place]:
        """The places in memory that have one."""
        found = [place for place in self._open if len(place.running) < place.slots.limit]
        if not self.guesses:  # where slots are learned, there may be more of them at any time
            self._open = found
        return found

    def _sort_lanes(self) -> None:
        """The head of a lane is another one."""
        used = [lane for lane in self.lanes.values() if lane]
        if len(used) > 1:
            used.sort(key=_due_of_head)
        self.urgent = used
        self.due = used[0][0][1].due if used else float("inf")

    def at(self, position: int) -> Entry:
        """The request at this position, from 0."""
        for lane in self.urgent:
            if position < len(lane):
                return lane[position][1]
            position -= len(lane)
        raise IndexError(position)

    def lasts(self) -> Iterator[int]:
        """The position of the last one of each lane, those of the most urgent first."""
        position = -1
        for lane in self.urgent:
            position += len(lane)
            yield position

    def entries(self) -> Iterator[Entry]:
        """All of them, next first."""
        for lane in self.urgent:
            for _, entry in lane:
                yield entry

    # ── what runs ─────────────────────────────────────────────────────────────────────────────

    def started(self, run: Running) -> None:
        """A request of this line runs."""
        insort(self.ends, (run.ends_at, run.number, run))

    def ended(self, run: Running) -> None:
        """It runs no longer."""
        del self.ends[bisect_left(self.ends, (run.ends_at, run.number))]

    def held(self, seconds: float) -> None:
        """A request held its slot for so long."""
        before = seconds if self.occupancy is None else self.occupancy
        self.occupancy = before + OCCUPANCY_GAIN * (seconds - before)


def _due_of_head(lane: list[tuple[Tag, Entry]]) -> float:
    return lane[0][1].due


def load_seconds(place: Place) -> float:
    """How long a load takes there, as places are compared."""
    return place.load / place.machine.preference
