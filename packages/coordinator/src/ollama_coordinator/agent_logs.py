"""The agents' own logs, while a client reads them: asked for by the answers to heartbeats.

The coordinator cannot call an agent. So a question for its log is noted here, the answer to its
next heartbeat asks for lines, and the agent sends them. `LOOKING_SECONDS` after the last question
they are forgotten, with the next heartbeat of any agent.
"""

from collections import deque
from collections.abc import Iterable
from datetime import datetime

from msgspec import Struct, field

from ollama_coordinator_common.protocol import LogLine, LogReport
from ollama_coordinator_common.types import AgentId

LINES, LINE_CHARACTERS = 500, 2000
"""Of one agent's log: at most a megabyte, whatever an agent sends."""

LOOKING_SECONDS = 30.0
"""How long after its last question a client is taken to read still; the page asks more often."""


class LogView(Struct, frozen=True):
    """`GET /api/agents/{id}/log`. `asked_seconds` is since when it is being asked for.

    `reported_at` is when the agent last sent something, `None` until it has. `sends`: whether it is
    an agent of ours, which can send a log. `server`: the output of the `ollama serve` it started.
    """

    sends: bool
    asked_seconds: float
    reported_at: datetime | None = None
    lines: list[LogLine] = []
    server: list[str] | None = None


class Looked(Struct):
    """One agent's log while it is read; `since` and `until` in monotonic seconds."""

    since: float
    until: float
    reported_at: datetime | None = None
    lines: deque[LogLine] = field(default_factory=lambda: deque(maxlen=LINES))
    server: list[str] | None = None


class AgentLogs:
    """The logs that are read now."""

    def __init__(self) -> None:
        self._looked: dict[AgentId, Looked] = {}

    def __len__(self) -> int:
        return len(self._looked)

    def look(self, agent_id: AgentId, now: float, *, sends: bool) -> LogView:
        """A client reads an agent's log: its lines so far."""
        self._forget(now)
        if not sends:
            return LogView(sends=False, asked_seconds=0.0)
        looked = self._looked.setdefault(agent_id, Looked(now, now))
        looked.until = now + LOOKING_SECONDS
        return LogView(
            sends=True,
            asked_seconds=now - looked.since,
            reported_at=looked.reported_at,
            lines=list(looked.lines),
            server=looked.server,
        )

    def wanted_after(self, agent_id: AgentId, now: float) -> int | None:
        """Lines with numbers beyond this are wanted, 0 for all; `None` while no client reads."""
        self._forget(now)
        looked = self._looked.get(agent_id)
        if looked is None:
            return None
        if looked.reported_at is None:
            return 0
        return looked.lines[-1].number if looked.lines else 1

    def take(self, agent_id: AgentId, report: LogReport, now: float, at: datetime) -> None:
        """Take over lines that an agent sent at `at` (UTC), if a client still reads them."""
        self._forget(now)
        looked = self._looked.get(agent_id)
        if looked is None:
            return
        last = looked.lines[-1].number if looked.lines else 0
        looked.lines.extend(_cut(line) for line in report.lines if line.number > last)
        if report.server is not None:
            looked.server = [text[:LINE_CHARACTERS] for text in _last(report.server)]
        looked.reported_at = at

    def _forget(self, now: float) -> None:
        for agent_id in [one for one, looked in self._looked.items() if looked.until <= now]:
            del self._looked[agent_id]


def _cut(line: LogLine) -> LogLine:
    return LogLine(line.number, line.at, line.level[:20], line.text[:LINE_CHARACTERS])


def _last(texts: Iterable[str]) -> list[str]:
    return list(texts)[-LINES:]
