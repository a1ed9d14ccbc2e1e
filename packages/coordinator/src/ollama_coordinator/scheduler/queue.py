"""The queue of one model with one set of runner options, and the places that may serve it.

Each lane is sorted by start-time fair queueing between clients over predicted work; the lane whose
head is late first goes first. `Queue` alone writes its fields, as `state` does those of places.
"""

from bisect import bisect_left, insort
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress
from math import exp
from operator import attrgetter
from typing import NamedTuple

from msgspec import Struct

from ollama_coordinator_common.types import AgentId

from .state import NEVER, Place, Running
from .types import Form, Lane, Request, RunnerOptions, serves

BUDGET_SECONDS: Mapping[Lane, float] = {
    Lane.INTERACTIVE: 6.0,
    Lane.BATCH: 90.0,
    Lane.EMBEDDING: 3.0,
}
"""How long a request may wait before it is late; this orders the lanes only."""

COURTESY: Mapping[Lane, float] = {Lane.INTERACTIVE: 1.0, Lane.BATCH: 20.0, Lane.EMBEDDING: 1.0}
"""By how much more the seconds of others count: a batch has time."""

STREAM_WEIGHT = 0.1  # writing that a reader keeps up with: it only holds a slot for longer
WHOLE_WEIGHT = 1.0  # an answer that is of use only when it is whole
BATCH_WEIGHT = 0.1  # nobody waits for the end of a batch's answers
MOST_TAGS = 1024  # so many clients' turns are kept before those that have caught up are dropped
# The shares of places are written anew when they are off by a quarter: costs are no better known.
WAITING_TOLERANCE = 0.25
WAITING_STEP = 256  # shares are multiples of a 256th, which floats add and subtract exactly
# Places where one search evaluates a load: the fastest, and others in turn; 100 us in all:
FASTEST_LOOKED_AT = 12
OTHERS_LOOKED_AT = 8
# Of many places with a free slot a choice compares the fastest, those freed last, and others in
# turn; 1 us each:
FASTEST_COMPARED = 24
FREED_COMPARED = 24
OTHERS_COMPARED = 16


class Tag(NamedTuple):
    """The order in a lane: a start in virtual time, then the arrival, then a number."""

    start: float
    arrived_at: float
    number: int


@dataclass(slots=True)
class FairClock:
    """Start-time fair queueing: a client's next request starts where its last one finished."""

    virtual: float = 0.0
    finished: dict[str, float] = field(default_factory=dict)

    def start(self, client: str, work: float, weight: float) -> float:
        """The start tag of one more request of this client."""
        start = max(self.virtual, self.finished.get(client, 0.0))
        self.finished[client] = start + work / weight
        return start

    def give_back(self, client: str, work: float) -> None:
        """A request of this client left without being served; `work` as weighted as it was."""
        if client in self.finished:
            self.finished[client] -= work

    def serve(self, start: float) -> None:
        """The request with this tag is being served. Clients that have caught up need no memory."""
        self.virtual = max(self.virtual, start)
        if len(self.finished) > MOST_TAGS:
            now = self.virtual
            self.finished = {client: end for client, end in self.finished.items() if end > now}


class FadingRate:
    """How often something happens: each event weighs less the longer ago it was."""

    def __init__(self, memory_seconds: float) -> None:
        self._memory = memory_seconds
        self._weight = 0.0
        self._at = 0.0

    def count(self, now: float) -> None:
        """It happened once more."""
        self._weight = self._weight * exp((self._at - now) / self._memory) + 1.0
        self._at = now

    def per_second(self, now: float) -> float:
        """Events per second."""
        return self._weight * exp((self._at - now) / self._memory) / self._memory


class Receiver(Struct, frozen=True):
    """How the receiver of an answer feels its delays.

    `output` are the expected tokens. A second of writing counts `write_weight`; a second by which
    the writing takes longer than `reading_seconds` counts in full. The seconds that others lose
    count `courtesy` times.
    """

    output: float
    write_weight: float
    reading_seconds: float
    courtesy: float = 1.0


def receiver_of(request: Request, output: float) -> Receiver:
    """That of a request whose answer is expected to have so many tokens."""
    courtesy = COURTESY[request.lane]
    if request.lane is Lane.BATCH:
        return Receiver(output, BATCH_WEIGHT, float("inf"), courtesy)
    if request.form is Form.STREAM:
        return Receiver(output, STREAM_WEIGHT, output / request.pace, courtesy)
    return Receiver(output, WHOLE_WEIGHT, float("inf"), courtesy)


class QueueEntry(Struct, eq=False):
    """A waiting request: its order, and what is predicted of it.

    `receiver` has the expected tokens of its answer, and what its delays are worth. `work` is what
    its client was charged, `due` when it begins to be late. `stranded_since` is when it was first
    found that no agent may serve it.
    """

    request: Request
    tag: Tag
    queue: "Queue"
    receiver: Receiver
    work: float
    stranded_since: float | None = None
    due: float = 0.0

    def __post_init__(self) -> None:
        self.due = self.request.arrived_at + BUDGET_SECONDS[self.request.lane]

    def may_be_served(self) -> None:
        """Some agent may serve it."""
        self.stranded_since = None

    def stranded(self, now: float) -> float:
        """No agent may serve it: for how many seconds that is so."""
        if self.stranded_since is None:
            self.stranded_since = now
        return now - self.stranded_since


class PredictedEnd(NamedTuple):
    """When a slot gets free; the number breaks ties."""

    at: float
    number: int
    run: Running


class FutileSearch(NamedTuple):
    """A search found no machine to load the model for less than this cost; valid until then."""

    below: float
    until: float


NOT_SEARCHED = FutileSearch(0.0, 0.0)


class Queue:
    """Requests that one loaded runner can serve alike, in the order in which they go.

    `hot` are the places with the model in memory, `loading` those where it is being loaded, `cold`
    the others, the fastest to load first. `ends` are the predicted ends of what runs, the soonest
    first. `guesses`: some place has slots that were not reported. `most_preferred` is the highest
    preference of its places. `avoided` are places where the model failed, for requests that nobody
    else may serve. `version` grows with every change of what runs, or may serve, and with every
    request that leaves.
    """

    def __init__(
        self, model: str, options: RunnerOptions, demand: FadingRate, *, larger: bool = False
    ) -> None:
        self.model = model
        self.options = options
        self.larger = larger
        self.demand = demand
        self.clock = FairClock()
        self._lanes: dict[Lane, list[tuple[Tag, QueueEntry]]] = {lane: [] for lane in Lane}
        self._wholes = 0
        self._interactive = self._lanes[Lane.INTERACTIVE]
        self._urgent: list[list[tuple[Tag, QueueEntry]]] = []  # those in use, most urgent first
        self.size = 0
        self.version = 0
        self.most_preferred = 1.0
        self.retried = 0
        self.due = float("inf")
        self.hot: list[Place] = []
        self.loading: list[Place] = []
        self.cold: list[Place] = []
        self.could_load: set[Place] = set()
        self.away: set[Place] = set()
        self.avoided: list[Place] = []
        self.guesses = False
        self.embeds = False
        self.ends: list[PredictedEnd] = []
        self.futile = NOT_SEARCHED
        self.fresh_until = NEVER
        self.drain_at = NEVER
        self.looked_at = 0.0
        self.used_at = 0.0
        self._open: list[Place] = []  # those of `hot` that may have a free slot
        self._turn = 0
        self._waiting_for: list[Place] = []
        self._share = 0.0
        self._places_changed = True

    # ── the order ─────────────────────────────────────────────────────────────────────────────

    def add(self, entry: QueueEntry) -> None:
        """One more request waits."""
        lane = self._lanes[entry.request.lane]
        insort(lane, (entry.tag, entry))
        self._wholes += entry.receiver.write_weight == WHOLE_WEIGHT
        self.size += 1
        if lane[0][1] is entry:
            self._sort_lanes()
        self.retried += bool(entry.request.excluded)

    def remove(self, entry: QueueEntry) -> None:
        """It waits no longer."""
        lane = self._lanes[entry.request.lane]
        index = bisect_left(lane, (entry.tag,))
        del lane[index]
        self._wholes -= entry.receiver.write_weight == WHOLE_WEIGHT
        self.size -= 1
        self.version += 1
        if not index:
            self._sort_lanes()
        self.retried -= bool(entry.request.excluded)
        if not self.size:
            self.share_waiting()

    def _sort_lanes(self) -> None:
        """The head of a lane is another one."""
        used = [lane for lane in self._lanes.values() if lane]
        if len(used) > 1:
            used.sort(key=_due_of_head)
        self._urgent = used
        self.due = used[0][0][1].due if used else float("inf")

    def at(self, position: int) -> QueueEntry:
        """The request at this position, from 0."""
        for lane in self._urgent:
            if position < len(lane):
                return lane[position][1]
            position -= len(lane)
        raise IndexError(position)

    def lasts(self) -> Iterator[int]:
        """The position of the last one of each lane, that of the most urgent lane first."""
        position = -1
        for lane in self._urgent:
            position += len(lane)
            yield position

    def alike(self) -> Iterator[Sequence[int]]:
        """The positions behind the head, in order, of each lane's requests that feel delays alike.

        Streams feel a part of their writing, answers of other forms all of it.
        """
        first = 0
        for lane in self._urgent:
            positions: Sequence[int] = range(first, first + len(lane))
            parts = [positions]
            if 0 < self._wholes < self.size:
                felt = [entry.receiver.write_weight == WHOLE_WEIGHT for _, entry in lane]
                parts = [list(compress(positions, felt))]
                parts.append([at for at, whole in zip(positions, felt, strict=True) if not whole])
            for part in parts:
                behind = part[1:] if part and not part[0] else part
                if behind:
                    yield behind
            first += len(lane)

    def entries(self) -> Iterator[QueueEntry]:
        """All of them, next first."""
        for lane in self._urgent:
            for _, entry in lane:
                yield entry

    # ── the places ────────────────────────────────────────────────────────────────────────────

    def sort(self, places: Iterable[Place], now: float) -> None:
        """These places may serve the queue: in memory, being loaded, or on disk only."""
        self.hot, self.loading, self.cold = [], [], []
        self.futile = NOT_SEARCHED
        self.guesses, self.most_preferred = False, 0.0
        for place in places:
            self.guesses = self.guesses or place.slots.fixed is None
            self.most_preferred = max(self.most_preferred, place.machine.preference)
            if (part := self._part(place)) is not None:
                part.append(place)
        self.away = {
            run.place
            for _, _, run in self.ends
            if not run.place.machine.routable
            or run.place.draining_until > now
            or run.place in self.avoided
        }
        self.cold.sort(key=load_seconds)
        self.could_load = set(self.cold)
        self.rearranged()

    def _part(self, place: Place) -> list[Place] | None:
        """Which part a place belongs to: none while it loads with other options."""
        loading = place.loading_until is not None
        if not (loading or place.resident):
            return self.cold
        fits = serves(
            place.options,
            self.options,
            context=place.context,
            default_context=place.machine.context_length,
            larger=self.larger,
        )
        if fits:
            return self.loading if loading else self.hot
        return None if loading else self.cold

    def moved(self, place: Place) -> None:
        """What is in memory there has changed. A place that did not count is sorted with all."""
        for part in (self.hot, self.loading, self.cold):
            if place in part:
                part.remove(place)
                self.could_load.discard(place)
                break
        else:
            self.stale()
            return
        new_part = self._part(place)
        if new_part is self.cold:
            insort(new_part, place, key=_load_and_id)
            self.could_load.add(place)
        elif new_part is not None:
            insort(new_part, place, key=attrgetter("machine.id"))
        self.rearranged()
        self.search_again()

    def stale(self) -> None:
        """The places must be sorted anew before they are used."""
        self.fresh_until = NEVER

    def fresh(self, until: float) -> None:
        """The places need not be sorted anew until this time, unless something happens."""
        self.fresh_until = until

    def rearranged(self) -> None:
        """Which places may serve has changed, or what is known of their slots."""
        self._places_changed = True
        self._open = sorted(self.hot, key=attrgetter("decode"))
        self.version += 1

    def draining(self, place: Place) -> None:
        """A place begins to drain: slots that get free there are for others."""
        self.away.add(place)
        self.version += 1

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

    def to_compare(self) -> Collection[Place]:
        """Those of them that a choice compares: all, unless there are more than 64."""
        found = self.with_free_slot()
        if len(found) <= FASTEST_COMPARED + FREED_COMPARED + OTHERS_COMPARED:
            return found
        self._turn += OTHERS_COMPARED
        start = self._turn % len(found)
        compared = dict.fromkeys(found[-FREED_COMPARED:])
        compared.update(dict.fromkeys(found[start : start + OTHERS_COMPARED]))
        compared.update(dict.fromkeys(found[:FASTEST_COMPARED]))
        return compared

    @property
    def is_widespread(self) -> bool:
        """Whether the model is on more disks than are looked at for one request."""
        return len(self.cold) > FASTEST_LOOKED_AT + OTHERS_LOOKED_AT

    def to_load(self) -> list[Place]:
        """Places on disk only: all of a small fleet; of a large one the fastest, others in turn."""
        cold = self.cold
        if not self.is_widespread:
            return cold
        start = max(self._turn % len(cold), FASTEST_LOOKED_AT)
        self._turn = start + OTHERS_LOOKED_AT
        return cold[:FASTEST_LOOKED_AT] + cold[start : start + OTHERS_LOOKED_AT]

    def search_failed(self, below: float, until: float) -> None:
        """There was no machine to load the model for less than this cost."""
        self.futile = FutileSearch(below, until)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Whatever is looked at in the block, the next choice compares what it would have."""
        before = self._turn, self.futile
        yield
        self._turn, self.futile = before

    def search_again(self) -> None:
        """There may be one now."""
        self.futile = NOT_SEARCHED

    @property
    def quickest_load(self) -> float:
        """The seconds of the fastest load that may be possible."""
        return load_seconds(self.cold[0]) if self.cold else float("inf")

    def avoid(self, places: list[Place]) -> None:
        """The model failed there a moment ago."""
        self.avoided = places

    def last_resort(self, excluded: Container[AgentId], now: float) -> "Queue":
        """The same queue, empty, with the avoided places that are not excluded."""
        alone = Queue(self.model, self.options, self.demand, larger=self.larger)
        alone.sort([one for one in self.avoided if one.machine.id not in excluded], now)
        return alone

    def share_waiting(self) -> None:
        """Tell the places how many interactive requests wait for them: an equal share for each."""
        waiting, ready = len(self._interactive), len(self.hot) + len(self.loading)
        share = round(waiting / ready * WAITING_STEP) / WAITING_STEP if ready and waiting else 0.0
        before = self._share
        if not self._places_changed and abs(share - before) <= WAITING_TOLERANCE * before:
            return
        self._places_changed = False
        if not share and not before:
            return
        for place in self._waiting_for:
            place.wait_for(-before)
        self._waiting_for, self._share = ([*self.hot, *self.loading] if share else []), share
        for place in self._waiting_for:
            place.wait_for(share)

    # ── what happens ──────────────────────────────────────────────────────────────────────────

    def started(self, run: Running) -> None:
        """A request of this queue runs."""
        insort(self.ends, PredictedEnd(run.ends_at, run.number, run))
        self.version += 1

    def ended(self, run: Running) -> None:
        """It runs no longer."""
        del self.ends[bisect_left(self.ends, (run.ends_at, run.number))]
        self.version += 1

    def used(self, now: float, *, embeds: bool) -> None:
        """A request came; the first embedding changes how many a place takes."""
        self.used_at = now
        if embeds and not self.embeds:
            self.embeds = True
            self.stale()

    def looked(self, now: float) -> None:
        """Every request was considered for every place."""
        self.looked_at = now

    def drain_later(self, at: float) -> None:
        """No place can be drained for this queue now."""
        self.drain_at = at


def load_seconds(place: Place) -> float:
    """The seconds of a load there, as places are compared."""
    return place.load / place.machine.preference + place.machine.backup


def _due_of_head(lane: list[tuple[Tag, QueueEntry]]) -> float:
    return lane[0][1].due


def _load_and_id(place: Place) -> tuple[float, str]:
    return load_seconds(place), place.machine.id
