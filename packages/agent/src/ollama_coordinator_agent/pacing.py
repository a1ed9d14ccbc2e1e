"""How fast the agent's loops turn, and when they try and log something again."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from msgspec import Struct

from ollama_coordinator_common.protocol import HEARTBEAT_SECONDS

log = logging.getLogger(__name__)

AFTER_A_BUG_SECONDS = 5.0
"""The pause after an error of our own: it is in the log, and must not fill it."""


class AgentPace(Struct, frozen=True, kw_only=True):
    """How often the agent does what, and how long it waits; in seconds. Tests give shorter ones."""

    heartbeat: float = HEARTBEAT_SECONDS
    heartbeat_watched: float = 2.0
    """Between heartbeats while the coordinator asks for the log: an operator is looking."""

    retry_first: float = 1.0
    retry_ceiling: float = 15.0
    """The back-off towards a coordinator that does not answer."""

    rejected: float = 60.0
    """A refusal lasts until an operator acts."""

    first_look: float = 2.0
    """How long the first report may wait for Ollama and the sensors."""

    goodbye: float = 2.0
    """How long the last report may take."""

    reach: float = 30.0
    """Between looks at this machine's addresses and at where Ollama listens."""

    ask_reached: float = 300.0
    """Between questions of a machine with a link whether the coordinator reaches its port now."""

    look: float = 1.0
    """Between looks at Ollama's presence and at the models in memory."""

    availability: float = 5.0
    """Between looks at whether this machine serves now."""

    falls_asleep: float = 15.0
    """How long nothing is reported after a goodbye before sleep: then it stays awake after all."""

    tags: float = 2.0
    output: float = 10.0
    """Between looks at the models on disk, and at the size of the server's output."""

    silence: float = 10.0
    """How long an Ollama that answered may be silent before that is reported."""

    stop: float = 10.0
    """How long our server may take to end before it is killed."""

    start_after: float = 2.0
    """How long nothing may listen on the port before a server is started."""

    adopted_start_after: float = 30.0
    """The same after a server that another program ran: its own supervisor (systemd, the desktop
    app) starts it again within seconds and needs the port for that."""

    restart_first: float = 1.0
    restart_ceiling: float = 60.0
    """The back-off between starts of a server that dies."""


async def forever(step: Callable[[], Awaitable[float]]) -> None:
    """Repeat `step`, which returns the seconds until it is next due; its errors are logged."""
    while True:
        try:
            pause_seconds = await step()
        except Exception:
            log.exception("an error inside the agent; it goes on")
            pause_seconds = AFTER_A_BUG_SECONDS
        await asyncio.sleep(pause_seconds)


class Backoff:
    """Delays that double up to a ceiling, each shortened at random so that a fleet spreads out."""

    def __init__(
        self,
        first_seconds: float,
        ceiling_seconds: float,
        *,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._first_seconds = first_seconds
        self._ceiling_seconds = ceiling_seconds
        self._chance = chance
        self._failures = 0

    def next(self) -> float:
        """The seconds to wait after one more failure: between half and all of the current step."""
        step = min(self._ceiling_seconds, self._first_seconds * 2.0**self._failures)
        if step < self._ceiling_seconds:
            self._failures += 1
        return step * (0.5 + 0.5 * self._chance())

    def reset(self) -> None:
        """Start over after a success."""
        self._failures = 0


class Reminder:
    """When a lasting trouble is worth a line in the log: at once, then at doubling intervals."""

    def __init__(self, first_seconds: float = 15.0, ceiling_seconds: float = 600.0) -> None:
        self._first_seconds = first_seconds
        self._ceiling_seconds = ceiling_seconds
        self._text: str | None = None
        self._interval = first_seconds
        self._next = 0.0

    def due(self, text: str, now: float) -> bool:
        """Whether to log `text` at `now`; another text than the last one always is."""
        if text != self._text:
            self._text, self._interval = text, self._first_seconds
        elif now < self._next:
            return False
        else:
            self._interval = min(self._ceiling_seconds, self._interval * 2)
        self._next = now + self._interval
        return True

    def warn(self, text: str) -> None:
        """Log `text` if it is due by the event loop's clock."""
        if self.due(text, asyncio.get_running_loop().time()):
            log.warning(text)

    def over(self) -> bool:
        """Forget the trouble; true if there was one."""
        was_logged, self._text = self._text is not None, None
        return was_logged
