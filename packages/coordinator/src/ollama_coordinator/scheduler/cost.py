"""What a request costs where: the terms of the estimate, in seconds.

Time to the first token counts in full, writing the answer by a tenth: people read along. A half of
the delay for others counts.
"""

from .fleet import Place

NO_PLACE = float("inf")

DECODE_WEIGHT = 0.1
HELD_WEIGHT = 0.9
"""Whoever waits for a slot while another is free holds up those behind by its whole answer."""

HARM_WEIGHT = 0.5
OVERLAP = 0.7
"""How much of the slow-down found at the start lasts: others end while a request runs."""


def alone_seconds(place: Place, tokens: float, output: float) -> float:
    """The weighted cost of a request that finds nothing else running."""
    return tokens * place.prefill + DECODE_WEIGHT * output * place.decode


def slow_down(place: Place) -> float:
    """How much slower a request runs here because of what runs here already."""
    machine = place.machine
    if not machine.running:
        return 1.0
    beside = len(place.running)
    active = machine.active if beside else machine.active + 1
    return 1 + OVERLAP * (active * (1 + machine.batch * beside) - 1)


def run_seconds(place: Place, tokens: float, output: float, now: float) -> float:
    """The weighted cost of reading `tokens` and writing `output`, with the delay of others.

    Others are delayed for as long as the request really stays, all of its writing included.
    """
    machine = place.machine
    reading, writing = tokens * place.prefill, output * place.decode
    alone = reading + DECODE_WEIGHT * writing
    if not machine.running:
        return alone
    beside = len(place.running)
    batch = machine.batch
    if beside:
        active = machine.active
        slower = OVERLAP * batch / (1 + batch * (beside - 1))
        others, left = beside, place.ends - beside * now
    else:
        active = machine.active + 1
        slower = OVERLAP / machine.active
        others, left = machine.running, machine.ends - machine.running * now
    slow_down = 1 + OVERLAP * (active * (1 + batch * beside) - 1)
    run = alone * slow_down
    harmed = min(left, others * (reading + writing) * slow_down)
    return run + HARM_WEIGHT * slower * harmed if harmed > 0 else run


def stay_seconds(place: Place, tokens: float, output: float) -> float:
    """How long the request will really hold its slot here."""
    return (tokens * place.prefill + output * place.decode) * slow_down(place)
