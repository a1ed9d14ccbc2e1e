"""What an ended request teaches: rates, output lengths, slots, cache hits.

Ollama's own dialect tells durations. Elsewhere only tokens are known, and wall times stand in for
durations where they can mean one thing only.
"""

from msgspec import structs

from .affinity import PromptCaches
from .fleet import Place, Running
from .learning import Lengths, Rates
from .priors import Quantity
from .types import Kind, Result, Timings

FEWEST_NEW_TOKENS = 50
FEWEST_OUTPUT_TOKENS = 8
FEWEST_PROMPT_TOKENS_BY_WALL = 200
SHORTEST_STREAM_SECONDS = 0.1
WAITED_SECONDS = 0.1
WAITED_SHARE = 0.2
OVERLAP_SHARE = 0.3
RERATE_OFTEN = 32
RERATE_EVERY = 512


class Lessons:
    """Learns from the ends of requests; tells whether costs of the whole agent should be redone."""

    def __init__(self, rates: Rates, lengths: Lengths, caches: PromptCaches) -> None:
        self._rates = rates
        self._lengths = lengths
        self._caches = caches
        self._lessons: dict[str, int] = {}

    def served(self, run: Running, timings: Timings | None, now: float) -> None:
        """A request ended well."""
        request, place = run.lease.request, run.place
        if timings is None:
            return
        if request.kind is not Kind.EMBED and timings.output_tokens > 0:
            self._lengths.observe(request.client, request.model, timings.output_tokens)
        tokens = timings.prompt_tokens or request.prompt_tokens
        read = tokens + timings.output_tokens
        if place.resident:
            self._caches.remember(place, request.prefix, read, place.slots.count)
        if run.adopted:
            return
        if timings.output_seconds is None and timings.total_seconds is None:
            timings = by_wall(run, timings, now)
        elif request.kind is Kind.EMBED and run.rank == 1 and timings.prompt_seconds is None:
            # An embedding's durations are the whole and the load: the rest is reading.
            reading = (timings.total_seconds or 0.0) - (timings.load_seconds or 0.0)
            timings = structs.replace(timings, prompt_seconds=max(reading, 0.0))
        self._load(run, timings)
        slower = _in_force(run)
        self._prefill(run, timings, slower)
        self._decode(run, timings, slower)
        self._rerate(place)

    def _load(self, run: Running, timings: Timings) -> None:
        if run.loads and timings.load_seconds is not None:
            seconds = max(timings.load_seconds, 0.001)
            self._observe(Quantity.LOAD, run.place, seconds)

    def _prefill(self, run: Running, timings: Timings, slower: float) -> None:
        seconds, tokens = timings.prompt_seconds, timings.prompt_tokens
        new = tokens - run.cached
        if seconds and new > FEWEST_NEW_TOKENS and run.cached < tokens / 2:
            self._observe(Quantity.PREFILL, run.place, new / seconds * slower)

    def _decode(self, run: Running, timings: Timings, slower: float) -> None:
        """The speed alone, or, where that is known, how much company slowed it."""
        seconds, tokens = timings.output_seconds, timings.output_tokens
        if not seconds or tokens < FEWEST_OUTPUT_TOKENS:
            return
        place, rate = run.place, tokens / seconds
        company = run.company
        if company < OVERLAP_SHARE and len(place.machine.busy) <= 1:
            place.solo += 1
        elif company > 1 - OVERLAP_SHARE and place.solo > 1 and len(place.machine.busy) <= 1:
            slowed = 1 / (rate * place.decode) - 1
            self._rates.observe_batch(place.machine.id, slowed / company)
            place.machine.batch = self._rates.batch_factor(place.machine.id)
            return
        self._observe(Quantity.DECODE, place, rate * slower)

    def _observe(self, quantity: Quantity, place: Place, value: float) -> None:
        believed = place.prior(quantity)
        rate = self._rates.observe(quantity, place.machine.id, place.model, value, believed)
        place.rate_one(quantity, rate)

    def _rerate(self, place: Place) -> None:
        """The costs of those of the agent's places that lean on their kin, ever more rarely."""
        agent = place.machine.id
        lessons = self._lessons[agent] = self._lessons.get(agent, 0) + 1
        often = lessons <= RERATE_OFTEN and lessons & (lessons - 1) == 0
        if often or lessons % RERATE_EVERY == 0:
            for other in place.machine.places.values():
                if self._rates.leans(agent, other.model):
                    other.rate(self._rates)


def _in_force(run: Running) -> float:
    """The slow-down while it ran."""
    machine = run.place.machine
    active = max(len(machine.busy) + (not run.place.running), 1)
    return active * (1 + machine.batch * run.company)


def by_wall(run: Running, timings: Timings, now: float) -> Timings:
    """Durations by our own clock, for a stream; an answer in one piece tells nothing."""
    granted, began = run.lease.granted_at, run.began_at
    if began is None or now - began < max(SHORTEST_STREAM_SECONDS, (now - granted) * 0.1):
        return timings
    first = began - granted
    prompt: float | None = None
    load: float | None = None
    if run.loads:
        load = max(first - run.place.prefill * timings.prompt_tokens, 0.0)
    elif run.rank <= run.place.slots.count and timings.prompt_tokens > FEWEST_PROMPT_TOKENS_BY_WALL:
        prompt = first
    return Timings(
        prompt_tokens=timings.prompt_tokens,
        output_tokens=timings.output_tokens,
        load_seconds=load,
        prompt_seconds=prompt,
        output_seconds=now - began,
    )


# ── slots ─────────────────────────────────────────────────────────────────────────────────────


def began(run: Running, now: float) -> None:
    """Its first byte came: whoever was granted before it and still runs was at work beside it."""
    run.began_at = now
    place = run.place
    if place.slots.fixed is None:
        earlier = sum(other.number < run.number for other in place.running.values())
        place.slots.prove(earlier + 1)


def ended(run: Running, result: Result, timings: Timings | None, now: float) -> None:
    """Judge by its own waiting whether it had a slot at once; `run` is out of its place already."""
    place = run.place
    if place.slots.fixed is not None:
        return
    _mark_end(run, now)
    if result is not Result.SERVED or run.rank < 2 or run.lease.request.kind is Kind.EMBED:
        return
    waited = _waited(run, timings, now)
    if waited:
        place.slots.refute(max(run.rank - 1, 1), now)
    elif waited is False and run.saw_end_at is not None:
        beside = run.saw_end_at - run.lease.granted_at
        if beside > OVERLAP_SHARE * (now - run.lease.granted_at):
            place.slots.prove(run.beside + 1)


def _mark_end(run: Running, now: float) -> None:
    """Those granted later note that one before them has ended."""
    later = [other for other in run.place.running.values() if other.number > run.number]
    earlier = len(run.place.running) - len(later)
    for index, other in enumerate(later):
        other.saw_end_at, other.beside = now, earlier + index + 1


def _waited(run: Running, timings: Timings | None, now: float) -> bool | None:
    """Whether it waited for a slot; `None` when that cannot be told."""
    if timings is not None and timings.total_seconds is not None:
        parts = (timings.load_seconds, timings.prompt_seconds, timings.output_seconds)
        if timings.output_seconds is not None:
            wait = timings.total_seconds - sum(part or 0.0 for part in parts)
            return wait > max(WAITED_SECONDS, WAITED_SHARE * timings.total_seconds)
    if run.saw_end_at is None:
        return None
    return _waited_by_wall(run, timings, now)


def _waited_by_wall(run: Running, timings: Timings | None, now: float) -> bool | None:
    """A first byte soon after another's end, and long after its own grant, tells of waiting.

    An answer in one piece tells by its length: it cannot have been written since that end.
    """
    granted, freed, began_at = run.lease.granted_at, run.saw_end_at or now, run.began_at
    if began_at is not None and now - began_at > max(SHORTEST_STREAM_SECONDS, (now - granted) / 10):
        expected = run.place.prefill * run.lease.request.prompt_tokens + 0.3
        return freed < began_at < freed + OVERLAP_SHARE * (began_at - granted) and (
            freed - granted > 2 * expected
        )
    tokens = timings.output_tokens if timings is not None else 0
    if tokens >= FEWEST_OUTPUT_TOKENS and (now - freed) < tokens * run.place.decode / 2:
        return False
    return None
