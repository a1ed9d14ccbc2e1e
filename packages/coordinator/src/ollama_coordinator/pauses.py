"""Long computations in the event loop, in slices: streams go on between them."""

import asyncio
from time import perf_counter

SLICE_SECONDS = 0.002


class Pauses:
    """`await pauses.now_and_then()` often; every two milliseconds it lets others run."""

    def __init__(self) -> None:
        self._since = perf_counter()

    async def now_and_then(self) -> None:
        """Let others run, if it is time; what is shared may be another afterwards."""
        if perf_counter() - self._since >= SLICE_SECONDS:
            await asyncio.sleep(0)
            self._since = perf_counter()
