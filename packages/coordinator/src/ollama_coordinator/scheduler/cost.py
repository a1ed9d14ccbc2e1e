"""What a request costs where, in seconds: what its receiver feels, and what it does to others.

The formula, its symbols and an example: `DESIGN.md`.
"""

from typing import NamedTuple

from .queue import Receiver, receiver_of
from .state import Place, Running
from .types import Form, Kind

NO_PLACE = float("inf")  # the cost where no place comes into question: anything is cheaper
# The delay of others is half as bad: their first token is there, and others will end.
HARM_WEIGHT = 0.5
OVERLAP = 0.7  # how much of the slow-down found at the start lasts: others end while a request runs
# A reader feels half of that: a stream that fell behind beside others catches up without them.
READER_OVERLAP = 0.5
# How much the slow-down grows until the slot is free, measured on the simulated fleet.
CONCURRENCY_TO_COME = 1.3
# A first byte is late when it is both so much later and so many times as late as predicted: rates
# that were never measured are off by less than three times, and Ollama pauses for less than 2 s.
LATE_SECONDS = 2.0
LATE_FACTOR = 3.0


def felt_seconds(receiver: Receiver, writing: float, slow_down: float) -> float:
    """What the receiver feels of an answer that takes `writing` seconds alone.

    A stream is felt as far as it falls behind its reader, any other answer as a whole.
    """
    late = writing * (1 + READER_OVERLAP * (slow_down - 1)) - receiver.reading_seconds
    felt = receiver.write_weight * writing * slow_down
    return felt + late if late > 0 else felt


def alone_seconds(place: Place, tokens: float, receiver: Receiver) -> float:
    """What the receiver feels of a request that finds nothing else running."""
    writing = receiver.output * place.decode
    return tokens * place.prefill + felt_seconds(receiver, writing, 1.0)


def run_seconds(place: Place, tokens: float, receiver: Receiver, now: float) -> float:
    """The cost of reading `tokens` and writing an answer, with the delay of others.

    With k = places at work on the machine, this one included, n = requests at this place, b = the
    batch factor, w = the receiver's courtesy, T = the time alone:

        slow-down   s = 1 + OVERLAP (k (1 + b n) - 1)
        for others  d = OVERLAP b / (1 + b (n - 1))    at a place at work
                    d = OVERLAP / (k - 1)              at an idle one, for all of the machine
        cost          = reading s + felt + w d (HARM_WEIGHT min(left, m T s) + waiting T s)

    `left` is the sum of the predicted seconds left of the m requests that are delayed; as `ends`
    sums absolute times, it is ends - m now. `waiting` requests wait for the machine's other places:
    only a model that begins to run delays them.
    """
    machine = place.machine
    reading, writing = tokens * place.prefill, receiver.output * place.decode
    if not machine.running:
        return reading + felt_seconds(receiver, writing, 1.0)
    beside = len(place.running)
    batch = machine.batch
    if beside:
        active = len(machine.busy)
        slower = OVERLAP * batch / (1 + batch * (beside - 1))
        others, left = beside, place.ends - beside * now
    else:
        active = len(machine.busy) + 1
        slower = OVERLAP / (active - 1)
        others, left = machine.running, machine.ends - machine.running * now
    slow_down = 1 + OVERLAP * (active * (1 + batch * beside) - 1)
    run = reading * slow_down + felt_seconds(receiver, writing, slow_down)
    service = (reading + writing) * slow_down
    harmed = HARM_WEIGHT * max(min(left, others * service), 0.0)
    if not beside:
        harmed += (machine.waiting_load - place.waiting_load) * service
    return run + receiver.courtesy * slower * harmed


LaterRates = tuple[float, float, float]
"""Seconds per token at a place in a slot that gets free later: read, written, and written as far
as a reader feels it."""


def later_rates(place: Place) -> LaterRates:
    """Those of a place as it is now.

    The request takes the slot of another one: what runs there is then as much as now, and no others
    are slowed further.
    """
    now = place.slow_down if place.running else len(place.machine.busy) or 1
    slow_down = 1 + OVERLAP * (now - 1)
    late = place.decode * (1 + READER_OVERLAP * (slow_down - 1))
    return place.prefill * slow_down, place.decode * slow_down, late


def service_seconds(place: Place, tokens: float, output: float) -> float:
    """How long a request holds its slot beside what runs there now, and what is to come.

    Where the slots are known, no more can come than there are.
    """
    machine, running, slots = place.machine, bool(place.running), place.slots
    active = len(machine.busy)
    now = place.slow_down if running else active + 1
    slow_down = 1 + CONCURRENCY_TO_COME * (now - 1)
    if slots.fixed is not None:
        full = (active + (not running)) * (1 + machine.batch * (slots.limit - 1))
        slow_down = min(slow_down, max(full, now))
    return (tokens * place.prefill + output * place.decode) * slow_down


def first_byte_at(run: Running, output: float) -> float | None:
    """When its first byte is predicted: of an answer in one piece, `output` tokens later."""
    place, request = run.place, run.lease.request
    if run.loads or run.tries or run.adopted or not place.resident:
        return None
    seconds = max(request.prompt_tokens - run.cached, 0) * place.prefill
    if request.form is not Form.STREAM:
        seconds += output * place.decode
    if not place.slots.extra:
        seconds += run.choice.wait  # for what is not ours
    elif place.mean_service:
        seconds += place.mean_service  # it may have come behind another
    return run.lease.granted_at + seconds * max(place.slow_down, 1.0)


def longest_output(run: Running) -> float | None:
    """The most tokens that an answer may get before its first byte: as the request says, or as its
    context holds; `None` where neither is known.
    """
    request, place = run.lease.request, run.place
    if request.kind is Kind.EMBED or request.form is Form.STREAM:
        return run.output
    limit = request.output_limit
    if limit is not None and limit >= 0:
        return limit
    return place.context or place.machine.context_length


def is_late(silent: float, predicted: float) -> bool:
    """Whether a first byte that was `predicted` after so many seconds is late after `silent`."""
    return silent >= max(predicted + LATE_SECONDS, predicted * LATE_FACTOR)


class Stay(NamedTuple):
    """What is felt from now on of a request that stays where it is; the work lost if it goes."""

    felt: float
    lost: float


def stay_seconds(run: Running, now: float) -> Stay | None:
    """That of a request without a byte which waits for a blocked load, or is late.

    `None` where nothing is wrong, as far as can be seen: an answer in one piece may just be long. A
    blocked load begins when the first model in use becomes idle. What is late is expected after as
    long again as it has taken.
    """
    place, request = run.place, run.lease.request
    receiver, age = receiver_of(request, run.output), now - run.lease.granted_at
    if place.blocked and place.loading_until is not None:
        in_use = [other.remaining(now) for other in place.machine.busy if other is not place]
        left = min(in_use) + place.load if in_use else max(place.loading_until - now, 0.0)
        new = max(request.prompt_tokens - run.cached, 0)
        lost = 0.0 if in_use else min(age, place.load)
        return Stay(left + alone_seconds(place, new, receiver), lost)
    most = longest_output(run)
    due_at = first_byte_at(run, most) if most is not None else None
    if due_at is None or not is_late(age, due_at - run.lease.granted_at):
        return None
    writing = receiver.output * place.decode if request.form is Form.STREAM else 0.0
    return Stay(age + felt_seconds(receiver, writing, 1.0), due_at - run.lease.granted_at)
