"""Keeps the list of concerns up to date, and tells a webhook of new and ended ones.

A webhook gets few messages: one may follow another only after some seconds and tells all that is
new, an agent that comes and goes is one concern, and what is over must stay over for a while.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from datetime import datetime

import aiohttp
import msgspec
from msgspec import Struct

from ollama_coordinator.access import Access
from ollama_coordinator.aliases import Aliases
from ollama_coordinator.dispatch import Dispatch
from ollama_coordinator.journal import Observation, state_of
from ollama_coordinator.settings import Settings
from ollama_coordinator_common.network import cause_of
from ollama_coordinator_common.types import AgentId

from .concerns import GRACE_SECONDS, Concern, Concerns, Severity, sentence, span

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""People and their tools need no better than seconds."""

OVER_SECONDS = 30.0
"""How long a fact must be gone before its end is told: what returns within it never ended."""

FLAPS = ((2, 300.0), (3, 1800.0))
"""An agent that went out so often within so many seconds comes and goes."""

AWAY = ("resting", "offline")
"""States in which a machine gets no requests although nobody wants that."""

ANNOUNCED_SECONDS = 60.0
"""So long after a goodbye or a restart that was asked for, a machine has to be in rotation: its
Ollama starts and its link opens meanwhile, and that is no outage."""

GONE_SECONDS = 120.0
"""A machine that stays out for so long is out, whatever it did before."""

MESSAGE_SECONDS = 10.0
"""Between two messages: what happens together is told together."""

LONGEST_PAUSE_SECONDS = 300.0
"""Between two tries of a webhook that fails."""

ANSWER_SECONDS = 10.0
"""A webhook that has not answered by then is tried again."""

ORDER = (Severity.CRITICAL, Severity.WARNING, Severity.NOTE)


class OpenConcern(Struct, frozen=True):
    """A concern as the API shows it, and since when (UTC) it lasts."""

    concern: Concern
    since: datetime


class Message(Struct, frozen=True):
    """The body of a webhook's request; `text` says all of it, `open` counts what is open now."""

    text: str
    new: Sequence[Concern]
    over: Sequence[Concern]
    open: int


class _Watched(Struct):
    """A fact that lasts: `at` is when it was last seen; all in monotonic seconds."""

    concern: Concern
    since: float
    at: float
    told: bool = False


class _Standing(Struct):
    """Whether an agent is away, since when (monotonic seconds), and when it went before."""

    is_away: bool
    since: float
    reason: str = ""
    went_at: deque[float] = msgspec.field(default_factory=lambda: deque(maxlen=FLAPS[-1][0]))

    def flapping(self, now: float) -> str | None:
        """How often it went; `None` where that is not often, or where it stays away."""
        if self.is_away and now - self.since > GONE_SECONDS:
            return None
        for times, seconds in FLAPS:
            recent = list(self.went_at)[-times:]
            if len(recent) == times and now - recent[0] <= seconds:
                went = f"It comes and goes, {times} times within {span(recent[-1] - recent[0])}"
                return f"{went}; the last time: {sentence(self.reason)}"
        return None


class Attention:
    """`run` is its loop; `open` is the list, the worst first."""

    def __init__(
        self,
        dispatch: Dispatch,
        observation: Observation,
        settings: Settings,
        access: Access,
        aliases: Aliases,
    ) -> None:
        self._clock = dispatch.clock
        self._settings = settings
        self._concerns = Concerns(dispatch, observation, access, aliases)
        self._watched: dict[str, _Watched] = {}
        self._over: dict[str, Concern] = {}
        self._looked_at = 0.0
        self._registry = dispatch.registry
        self._standing: dict[AgentId, _Standing] = {}

    async def run(self) -> None:
        """Look for ever, and tell the webhook, until cancelled."""
        timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
        pause, next_at = MESSAGE_SECONDS, 0.0
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                now = self._clock.now()
                try:
                    self.look(now)
                except Exception:
                    log.exception("looking for what needs attention failed and goes on")
                if now >= next_at and self.news():
                    pause = await self._tell(session, pause)
                    next_at = self._clock.now() + pause
                await asyncio.sleep(LOOK_SECONDS)

    # ── the list ──────────────────────────────────────────────────────────────────────────────

    def look(self, now: float) -> None:
        """Take note of what is and what is no longer (monotonic seconds)."""
        self._note_states(now)
        self._looked_at = now
        for concern in self._concerns.now(now, self._flapping(now)):
            known = self._watched.get(concern.id)
            if known is None:
                self._watched[concern.id] = _Watched(concern, now, now)
                self._over.pop(concern.id, None)
            else:
                known.concern, known.at = concern, now
        for name, known in list(self._watched.items()):
            if now - known.at > OVER_SECONDS:
                del self._watched[name]
                if known.told:
                    self._over[name] = known.concern

    def open(self) -> list[OpenConcern]:
        """What needs a person now, the worst first, then the oldest."""
        shown = [known for known in self._watched.values() if self._is_open(known)]
        shown.sort(key=lambda known: (ORDER.index(known.concern.severity), known.since))
        return [OpenConcern(known.concern, self._clock.utc(known.since)) for known in shown]

    def _is_open(self, known: _Watched) -> bool:
        grace = GRACE_SECONDS.get(known.concern.kind, 0.0)
        return known.at == self._looked_at and known.at - known.since >= grace

    def _note_states(self, now: float) -> None:
        """Take note of machines that went out and came back; who leaves or drains did not go."""
        for agent in self._registry:
            state = state_of(agent, now, self._registry.agent_timeout)
            is_away = state in AWAY and not agent.left
            known = self._standing.setdefault(agent.id, _Standing(is_away, now))
            if known.is_away != is_away:
                known.is_away, known.since = is_away, now
                if is_away and now - agent.announced_at > ANNOUNCED_SECONDS:
                    known.went_at.append(now)
                    known.reason = agent.out_of_rotation() or "nothing was heard of it"
        for agent_id in [one for one in self._standing if self._registry.find(one) is None]:
            del self._standing[agent_id]

    def _flapping(self, now: float) -> dict[AgentId, str]:
        how = {agent_id: known.flapping(now) for agent_id, known in self._standing.items()}
        return {agent_id: text for agent_id, text in how.items() if text is not None}

    # ── the webhook ───────────────────────────────────────────────────────────────────────────

    def news(self) -> Message | None:
        """What a webhook has not been told yet; notes are not worth a message."""
        fresh = [one for one in self._watched.values() if not one.told and self._is_open(one)]
        new = [one.concern for one in fresh if one.concern.severity is not Severity.NOTE]
        over = list(self._over.values())
        if not new and not over:
            return None
        lines = [f"{one.subject}: {one.text}" for one in new]
        lines += [f"{one.subject}: over ({one.text})" for one in over]
        return Message("\n".join(lines), new, over, len(self.open()))

    async def _tell(self, session: aiohttp.ClientSession, pause: float) -> float:
        """Send the news to the webhook, if there is one; the seconds until the next message."""
        message, config = self.news(), self._settings.config
        if message is None or not config.webhook:
            return pause
        try:
            await _post(session, config.webhook, webhook_body(message, config.webhook_body))
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as exc:
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
            # The address may contain a secret.
            reason = cause_of(exc).replace(config.webhook, "its address")
            log.warning("the webhook failed", extra={"reason": reason, "again_in": pause})
            return pause
        for known in self._watched.values():
            known.told = known.told or known.concern in message.new
        for concern in message.over:
            self._over.pop(concern.id, None)
        return MESSAGE_SECONDS


async def _post(session: aiohttp.ClientSession, url: str, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    async with session.post(url, data=body, headers=headers, allow_redirects=False) as response:
        if response.status >= 300:
            raise aiohttp.ClientError(f"it answers {response.status}")


PLACE = "{text}"


def webhook_body(message: Message, template: str) -> bytes:
    """The body: the message as JSON, or a template in which `{text}` becomes the text.

    The text is escaped as within a JSON string: `{"content": "{text}"}` is what Discord takes.
    """
    if not template:
        return msgspec.json.encode(message)
    escaped = msgspec.json.encode(message.text)[1:-1].decode()
    return template.replace(PLACE, escaped).encode()
