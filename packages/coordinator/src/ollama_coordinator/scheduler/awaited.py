"""How many interactive requests wait for each place and machine, from what the lines tell them."""

from .fleet import Place

TOLERANCE = 0.25
"""What is known of who waits may be wrong by so much: it is not told anew for each request."""

STEP = 256
"""Shares are multiples of this part of one, which add up and subtract exactly."""


class Awaited:
    """The places that one line told how many wait in it.

    `moved`: which places may serve the line has changed since.
    """

    def __init__(self) -> None:
        self.moved = True
        self._places: list[Place] = []
        self._each = 0.0

    def tell(self, waiting: int, hot: list[Place], loading: list[Place]) -> None:
        """So many wait for these places now: an equal share for each."""
        ready, told = len(hot) + len(loading), self._each
        each = round(waiting / ready * STEP) / STEP if ready and waiting else 0.0
        if not self.moved and abs(each - told) <= TOLERANCE * told:
            return
        self.moved = False
        if not each and not told:
            return
        for place in self._places:
            place.awaited -= told
            place.machine.awaited -= told
        self._places, self._each = ([*hot, *loading] if each else []), each
        for place in self._places:
            place.awaited += each
            place.machine.awaited += each
