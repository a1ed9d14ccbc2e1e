"""The queues of all models, and the entries that requests become in them."""

from collections import defaultdict
from collections.abc import Iterable
from heapq import nsmallest
from operator import attrgetter

from ollama_coordinator.registry import Registry

from .eligibility import eligible, unavailable
from .queue import FadingRate, Queue, QueueEntry, Tag, receiver_of
from .rates import OutputLengths
from .slots import EMBEDDING_EXTRA
from .state import Machine, Place
from .sync import Machines
from .types import NO_OPTIONS, Kind, Request, RunnerOptions, normal

# How often places are sorted although nothing happened: load times move their order.
REFRESH_SECONDS = 15.0
TRIED_SECONDS = 1.0  # how often it is looked whether a request still tries an avoided place
# Clients may send any options: beyond so many, queues not used for so long are dropped:
FORGET_SECONDS = 10.0
MANY_QUEUES = 512
# Between clients, reading ten tokens counts as writing one: GPUs read 10 to 50 times as fast.
TOKENS_READ_PER_WRITTEN = 10
LEAST_WORK = 1.0  # every request counts: a client of empty ones must not be always first
DEMAND_MEMORY_SECONDS = 120.0  # arrivals fade by this time constant: a pause in a chat is shorter


class Queues:
    """Queues by model and options."""

    def __init__(
        self,
        registry: Registry,
        machines: Machines,
        lengths: OutputLengths,
    ) -> None:
        self._registry = registry
        self._machines = machines
        self._lengths = lengths
        self._last_number = 0
        self._queues: dict[tuple[str, RunnerOptions, bool], Queue] = {}
        self._of_model: defaultdict[str, list[Queue]] = defaultdict(list)
        self.demands: dict[str, FadingRate] = {}

    # ── requests ──────────────────────────────────────────────────────────────────────────────

    def of_request(self, request: Request, now: float) -> Queue:
        """The queue of a request, made for models that some agent has and for no others.

        Raises:
            ModelNotFound, NoAgentRegistered, HoldersUnavailable: no agent has the model.
        """
        options = request.options
        options = NO_OPTIONS if options is NO_OPTIONS else normal(options)
        key = (request.model, options, request.larger)
        queue = self._queues.get(key)
        if queue is None:
            if not self._registry.servers(request.model):
                found = eligible(self._registry, request, now)
                raise unavailable(self._registry, request, found, now)
            queue = self._add(*key, now)
        queue.used(now, embeds=request.kind is Kind.EMBED)
        self.refresh(queue, now)
        return queue

    def of_lease(self, request: Request, now: float) -> Queue:
        """The queue of a request that runs already, whatever agents have its model."""
        key = (request.model, normal(request.options), request.larger)
        queue = self._queues.get(key) or self._add(*key, now)
        queue.used(now, embeds=request.kind is Kind.EMBED)
        return queue

    def _add(self, model: str, options: RunnerOptions, larger: bool, now: float) -> Queue:
        if len(self._queues) >= MANY_QUEUES:
            self._forget(now)
        demand = self.demands.setdefault(model, FadingRate(DEMAND_MEMORY_SECONDS))
        queue = Queue(model, options, demand, larger=larger)
        self._queues[model, options, larger] = queue
        self._of_model[model].append(queue)
        return queue

    def _forget(self, now: float) -> None:
        for key, queue in list(self._queues.items()):
            if not queue.size and not queue.ends and now - queue.used_at > FORGET_SECONDS:
                del self._queues[key]
                self._of_model[queue.model].remove(queue)

    def entry(self, request: Request, queue: Queue) -> QueueEntry:
        """The request with its turn, which its client is charged for.

        A retry was charged when it came first, and goes before those that have waited less.
        """
        output = self.expected_output(request)
        work = request.prompt_tokens / TOKENS_READ_PER_WRITTEN + output + LEAST_WORK
        weight = request.weight
        clock, retry = queue.clock, request.is_retry
        start = clock.virtual if retry else clock.start(request.client, work, weight)
        self._last_number += 1
        tag = Tag(start, request.arrived_at, self._last_number)
        receiver = receiver_of(request, output)
        return QueueEntry(request, tag, queue, receiver, 0.0 if retry else work / weight)

    def expected_output(self, request: Request) -> float:
        """The expected tokens of its answer."""
        if request.load_only or request.kind is Kind.EMBED:
            return 0.0
        return self._lengths.expected(request)

    # ── queues ────────────────────────────────────────────────────────────────────────────────

    def waiting(self) -> list[Queue]:
        """Those in which requests wait, the most urgent first."""
        return sorted(
            (queue for queue in self._queues.values() if queue.size), key=attrgetter("due")
        )

    def wanting(self, machine: Machine, most: int) -> list[Queue]:
        """Those of them that the machine could load the model for, the most urgent first."""
        places = machine.places
        queues = [queue for queue in self._queues.values() if queue.size and queue.model in places]
        return nsmallest(most, queues, key=attrgetter("due"))

    def of(self, models: Iterable[str]) -> Iterable[Queue]:
        """Every queue of these models."""
        for model in models:
            if model in self._of_model:
                yield from self._of_model[model]

    def backlog(self, model: str) -> bool:
        """Whether requests wait for this model."""
        return any(queue.size for queue in self.of((model,)))

    # ── their places ──────────────────────────────────────────────────────────────────────────

    def refresh(self, queue: Queue, now: float) -> None:
        """Sort the places of a queue's model anew if they are stale.

        A place where the model failed a moment ago may serve only when no other does. Once its
        time is over, one request shows whether it fails again.
        """
        if now < queue.fresh_until:
            return
        until = now + REFRESH_SECONDS
        ready: list[Place] = []
        failed: list[Place] = []
        for place in self._machines.places(queue.model):
            if not place.machine.routable:
                continue
            agent = place.machine.agent
            cooldown = agent.model_cooldowns.get(queue.model)
            if cooldown and agent.avoids(queue.model, now, tried=bool(place.running)):
                until = min(until, max(cooldown.until, now + TRIED_SECONDS))
                failed.append(place)
            else:
                ready.append(place)
        queue.fresh(until)
        queue.avoid(failed if ready else [])
        places = ready or failed
        if queue.embeds:
            self._embed_at(places)
        queue.sort(places, now)

    def _embed_at(self, places: list[Place]) -> None:
        """Believe that a model that embeds does nothing else, unless it is known to complete."""
        for place in places:
            row = place.machine.agent.inventory.servable.get(place.model)
            if not place.slots.extra and not (row is not None and row.completes):
                place.slots.fix(1, extra=EMBEDDING_EXTRA)
                for other in self.of(place.names):
                    other.rearranged()

    def moved(self, place: Place) -> None:
        """What is in memory there has changed: this place alone is sorted anew in its queues."""
        for queue in self.of(place.names):
            queue.moved(place)

    def drained(self, machine: Machine) -> None:
        """Places there take no new requests for a while."""
        for place in machine.residents:
            for queue in self.of(place.names):
                queue.draining(place)
