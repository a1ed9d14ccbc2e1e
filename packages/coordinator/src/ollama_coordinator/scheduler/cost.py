"""What a request costs where: the terms of the estimate, in seconds.

Time to the first token counts in full, writing the answer by a tenth: people read along. Of the
delay for those who run a half counts, of that for those who wait all of it.
"""

from collections.abc import Mapping

from .fleet import Place
from .types import Lane

NO_PLACE = float("inf")

DECODE_WEIGHT = 0.1
HELD_WEIGHT = 1.5
"""Whoever waits for a slot while another is free holds up those behind by its whole answer."""

HARM_WEIGHT = 0.5
COURTESY: Mapping[Lane, float] = {Lane.INTERACTIVE: 1.0, Lane.BATCH: 20.0, Lane.EMBEDDING: 1.0}
"""By how much more the seconds of others count: who asks for batch has time."""

OVERLAP = 0.7
"""How much of the slow-down found at the start lasts: others end while a request runs."""

COMPANY_TO_COME = 1.3
"""How much the slow-down grows by the time the slot is free: where others run, more come.

Measured on the simulated fleet. A choice compares what a request adds, and so goes by `OVERLAP`.
"""


def alone_seconds(place: Place, tokens: float, output: float) -> float:
    """The weighted cost of a request that finds nothing else running."""
    return tokens * place.prefill + DECODE_WEIGHT * output * place.decode


def run_seconds(
    place: Place, tokens: float, output: float, now: float, courtesy: float = 1.0
) -> float:
    """The weighted cost of reading `tokens` and writing `output`, with the delay of others.

    Others are delayed for as long as the request really stays, all of its writing included. A
    model that begins to run delays those too who wait for what runs here now.
    """
    machine = place.machine
    reading, writing = tokens * place.prefill, output * place.decode
    alone = reading + DECODE_WEIGHT * writing
    if not machine.running:
        return alone
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
    run = alone * slow_down
    stay = (reading + writing) * slow_down
    harmed = HARM_WEIGHT * max(min(left, others * stay), 0.0)
    if not beside:
        harmed += (machine.awaited - place.awaited) * stay
    return run + courtesy * slower * harmed


def pace(place: Place) -> float:
    """By how much what runs at this place now is slower than alone on its machine."""
    machine = place.machine
    return len(machine.busy) * (1 + machine.batch * (len(place.running) - 1))


def stay_seconds(place: Place, tokens: float, output: float) -> float:
    """How long a request holds its slot beside what runs there now, and what is to come."""
    now = place.pace if place.running else len(place.machine.busy) + 1
    return (tokens * place.prefill + output * place.decode) * (1 + COMPANY_TO_COME * (now - 1))
