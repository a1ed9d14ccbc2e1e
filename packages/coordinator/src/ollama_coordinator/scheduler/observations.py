"""What an ended request shows: rates, output lengths, slots, prompt caches.

Ollama's own dialect reports durations. Elsewhere only tokens are known, and wall times stand in for
durations where they can mean one thing only.
"""

from msgspec import structs

from .prompt_cache import PromptCaches
from .rates import BATCH_MOST, OutputLengths, Quantity, Rates
from .state import Place, Running
from .types import Form, Kind, Result, Timings

# Reading fewer tokens takes as long as the overhead around it: the rate would be too low.
FEWEST_NEW_TOKENS = 50
FEWEST_OUTPUT_TOKENS = 8  # the same for writing
# By our own clock the network and Ollama's start of the request are in it, some tens of ms.
FEWEST_PROMPT_TOKENS_BY_WALL = 200
# An answer whose first byte comes this close to its end came in one piece, and shows no rate:
SHORTEST_STREAM_SECONDS = 0.1
SHORTEST_STREAM_SHARE = 0.1
# More than both, beside load, reading and writing, is a wait: overhead is less:
WAITED_SECONDS = 0.1
WAITED_SHARE = 0.2
# Less of its time beside others is alone, all but so much is beside one; else unclear.
OVERLAP_SHARE = 0.3
# Faster than alone by more is no scatter: as beyond `BATCH_MOST`, the speed may have changed.
SCATTER = 0.5
# Of a rate so sure, the second such answer shows it; the first may have run beside another model.
SURE_SAMPLES = 3
# A first byte takes so long beyond reading the prompt: sampling, the network, a busy CPU.
FIRST_BYTE_SLACK_SECONDS = 0.3
SHORTEST_LOAD_SECONDS = 0.001  # A load of 0 s has no logarithm
# Places take the factors after the 1st, 2nd, 4th ... 32nd answer, then every 512th.
TAKE_OFTEN = 32
TAKE_EVERY = 512


class Observer:
    """Learns from the ends of requests."""

    def __init__(self, rates: Rates, lengths: OutputLengths, caches: PromptCaches) -> None:
        self._rates = rates
        self._lengths = lengths
        self._caches = caches
        self._answers: dict[str, int] = {}

    def served(self, run: Running, timings: Timings | None, now: float) -> None:
        """A request ended well. An adopted one teaches no rate: what ran beside it is not known."""
        request, place = run.lease.request, run.place
        if timings is None:
            return
        if request.kind is not Kind.EMBED and timings.output_tokens > 0:
            self._lengths.observe(request, timings.output_tokens)
        tokens = timings.prompt_tokens or request.prompt_tokens
        if place.resident:
            read = tokens + timings.output_tokens
            slots, arrived = place.slots.count, request.arrived_at
            self._caches.remember(place, request.prefix, read, slots, arrived=arrived, now=now)
        if run.adopted:
            return
        if timings.output_seconds is None and timings.total_seconds is None:
            timings = by_wall(run, timings, now)
        elif request.kind is Kind.EMBED and run.rank == 1 and timings.prompt_seconds is None:
            # An embedding's durations are the whole and the load: the rest is reading.
            reading = (timings.total_seconds or 0.0) - (timings.load_seconds or 0.0)
            timings = structs.replace(timings, prompt_seconds=max(reading, 0.0))
        if run.loads and timings.load_seconds is not None:
            self._observe(Quantity.LOAD, place, max(timings.load_seconds, SHORTEST_LOAD_SECONDS))
        slower = _slow_down(run)
        self._prefill(run, timings, slower)
        self._decode(run, timings, slower)
        self._take_factors(place)

    def _prefill(self, run: Running, timings: Timings, slower: float) -> None:
        seconds, tokens = timings.prompt_seconds, timings.prompt_tokens
        new = tokens - run.cached
        if seconds and new > FEWEST_NEW_TOKENS and run.cached < tokens / 2:
            self._observe(Quantity.PREFILL, run.place, new / seconds * slower)

    def _decode(self, run: Running, timings: Timings, slower: float) -> None:
        """The rate alone, or, where that is known, how much the requests beside it slowed it.

        What no batch factor explains, twice, shows that the rate alone is not known any more.
        """
        seconds, tokens = timings.output_seconds, timings.output_tokens
        if not seconds or tokens < FEWEST_OUTPUT_TOKENS:
            return
        place, rate, beside = run.place, tokens / seconds, run.mean_beside
        machine = place.machine
        if len(machine.busy) <= 1:
            if beside < OVERLAP_SHARE:
                place.confirm_decode(most=SURE_SAMPLES)
            elif beside > 1 - OVERLAP_SHARE and place.solo > 1:
                slowed = (1 / (rate * place.decode) - 1) / beside
                if -SCATTER < slowed < BATCH_MOST:
                    place.confirm_decode(most=SURE_SAMPLES)
                else:
                    place.doubt_decode()
                self._rates.observe_batch(machine.id, slowed)
                machine.take_batch(self._rates.batch_factor(machine.id))
                return
        self._observe(Quantity.DECODE, place, rate * slower)

    def _observe(self, quantity: Quantity, place: Place, value: float) -> None:
        assumed = place.priors.values[quantity]
        rate = self._rates.observe(quantity, place.machine.id, place.model, value, assumed)
        place.take_rate(quantity, rate)

    def _take_factors(self, place: Place) -> None:
        """The agent's places that lean on its factors take these anew, ever more rarely.

        Those in memory at once, others when they are looked at the next time.
        """
        agent = place.machine.id
        answers = self._answers[agent] = self._answers.get(agent, 0) + 1
        often = answers <= TAKE_OFTEN and answers & (answers - 1) == 0
        if often or answers % TAKE_EVERY == 0:
            place.machine.factors_changed()
            for other in place.machine.residents:
                if self._rates.leans(agent, other.model):
                    other.take_rates(self._rates)


def _slow_down(run: Running) -> float:
    """By how much slower than alone it ran; it is out of its place already."""
    machine = run.place.machine
    active = max(len(machine.busy) + (not run.place.running), 1)
    return active * (1 + machine.batch * run.mean_beside)


def by_wall(run: Running, timings: Timings, now: float) -> Timings:
    """Durations by our own clock, for a stream; an answer in one piece has none."""
    granted, began = run.lease.granted_at, run.began_at
    if began is None or not _streamed(began, granted, now):
        return timings
    first = began - granted
    prompt: float | None = None
    load: float | None = None
    if run.loads:
        load = max(first - run.place.prefill * timings.prompt_tokens, 0.0)
    elif run.rank <= run.place.slots.count and timings.prompt_tokens > FEWEST_PROMPT_TOKENS_BY_WALL:
        prompt = None if _unexplained(run, began) else first
    return Timings(
        prompt_tokens=timings.prompt_tokens,
        output_tokens=timings.output_tokens,
        load_seconds=load,
        prompt_seconds=prompt,
        output_seconds=now - began,
    )


def _streamed(began: float, granted: float, now: float) -> bool:
    """Whether the first byte came well before the end."""
    return now - began >= max(SHORTEST_STREAM_SECONDS, (now - granted) * SHORTEST_STREAM_SHARE)


# ── slots ─────────────────────────────────────────────────────────────────────────────────────


def began(run: Running, now: float) -> None:
    """Its first byte came: what was granted before it and still runs was at work beside it."""
    run.began(now)
    place = run.place
    if place.owner.is_seen:
        place.owner.answered()
    if place.slots.fixed is None:
        earlier = sum(other.number < run.number for other in place.running.values())
        place.slots.prove(earlier + 1)


def abandoned(run: Running, now: float) -> None:
    """Its client left. Before the first byte, Ollama goes on reading the prompt for itself.

    A stream of which nothing came after all that time waited for something that is not ours.
    """
    if run.began_at is not None or run.loads:
        return
    owner = run.place.owner
    until = run.lease.granted_at + run.choice.wait + _reading(run)
    if until > now:
        owner.abandoned(until)
    elif run.lease.request.form is Form.STREAM and (waited := _unexplained(run, now)):
        owner.made_wait(waited, now)


def _had_a_slot(run: Running) -> bool:
    """Whether only what is not ours can have made it wait."""
    slots, is_plain = run.place.slots, not (run.loads or run.tries or run.adopted)
    has_slot = run.rank <= slots.count if slots.fixed is not None else run.rank == 1
    return is_plain and has_slot and run.lease.request.kind is not Kind.EMBED


def _reading(run: Running) -> float:
    """The predicted seconds until all of its prompt is read, from its slot on."""
    new = max(run.lease.request.prompt_tokens - run.cached, 0)
    return new * run.place.prefill * max(run.place.slow_down, 1.0)


def _unexplained(run: Running, began: float, written: int = 0) -> float:
    """The seconds until its first byte that nothing else explains, where speeds are known.

    So many tokens were `written` before it.
    """
    place = run.place
    explained = _reading(run) + written * place.decode * max(place.slow_down, 1.0)
    waited = began - run.lease.granted_at - explained
    is_long = waited > explained + FIRST_BYTE_SLACK_SECONDS
    return waited if is_long and place.solo > 1 and _had_a_slot(run) else 0.0


def _learn_wait(run: Running, timings: Timings | None, now: float) -> None:
    """How long it waited for what is not ours: by Ollama's durations, else by the first byte."""
    if not _had_a_slot(run):
        return
    waited = _waited_by_timings(timings)
    if waited is None and timings is not None and run.began_at is not None:
        streamed = _streamed(run.began_at, run.lease.granted_at, now)
        waited = _unexplained(run, run.began_at, 0 if streamed else timings.output_tokens)
    if waited is not None:
        run.place.owner.made_wait(waited, now)


def ended(run: Running, result: Result, timings: Timings | None, now: float) -> None:
    """Judge by its waiting whether it had a slot at once; `run` is out of its place already."""
    place = run.place
    if result is Result.SERVED:
        _learn_wait(run, timings, now)
    if place.slots.fixed is not None:
        return
    later = [other for other in place.running.values() if other.number > run.number]
    earlier = len(place.running) - len(later)
    for index, other in enumerate(later):
        other.saw_end(earlier + index + 1, now)
    if result is not Result.SERVED or run.rank < 2 or run.lease.request.kind is Kind.EMBED:
        return
    waited = _waited(run, timings, now)
    if waited:
        place.slots.refute(max(run.rank - 1, 1), now)
    elif waited is False and run.saw_end_at is not None:
        beside = run.saw_end_at - run.lease.granted_at
        if beside > OVERLAP_SHARE * (now - run.lease.granted_at):
            place.slots.prove(run.beside + 1)


def _waited(run: Running, timings: Timings | None, now: float) -> bool | None:
    """Whether it waited for a slot; `None` when that is not known."""
    if (waited := _waited_by_timings(timings)) is not None:
        return waited > 0
    return None if run.saw_end_at is None else _waited_by_wall(run, run.saw_end_at, timings, now)


def _waited_by_timings(timings: Timings | None) -> float | None:
    """The seconds that loading, reading and writing do not explain, if they are no overhead."""
    if timings is None or timings.total_seconds is None or timings.output_seconds is None:
        return None
    parts = (timings.load_seconds, timings.prompt_seconds, timings.output_seconds)
    wait = timings.total_seconds - sum(part or 0.0 for part in parts)
    return wait if wait > max(WAITED_SECONDS, WAITED_SHARE * timings.total_seconds) else 0.0


def _waited_by_wall(run: Running, freed: float, timings: Timings | None, now: float) -> bool | None:
    """A first byte soon after another's end, and long after its own grant, shows waiting.

    An answer in one piece shows it by its length: it cannot have been written since that end.
    """
    granted, began_at = run.lease.granted_at, run.began_at
    if began_at is not None and _streamed(began_at, granted, now):
        reading = run.place.prefill * run.lease.request.prompt_tokens + FIRST_BYTE_SLACK_SECONDS
        return freed < began_at < freed + OVERLAP_SHARE * (began_at - granted) and (
            freed - granted > 2 * reading
        )
    tokens = timings.output_tokens if timings is not None else 0
    if tokens >= FEWEST_OUTPUT_TOKENS and (now - freed) < tokens * run.place.decode / 2:
        return False
    return None
