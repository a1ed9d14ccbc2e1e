"""The coordinator's last log lines, kept in memory: all, and those about each agent."""

import logging
from collections import OrderedDict, deque
from datetime import UTC, datetime

from msgspec import Struct

from ollama_coordinator_common.names import DEFAULT_HOST, DEFAULT_NAMESPACE

EVENTS_PER_AGENT = 100
"""As many lines as a page shows."""

EVENTS = 300
"""Of all agents together, for the page of events."""

LINES = 500
"""Of the whole log, for its page."""

AGENTS = 1000
"""Agents with events; beyond, those whose first event is the oldest lose theirs."""

PACKAGE = "ollama_coordinator"

_NOT_FACTS = frozenset(vars(logging.makeLogRecord({}))) | {
    "agent", "agent_id", "asctime", "message", "taskName",
}  # fmt: skip


_OWN = f"{DEFAULT_HOST}/{DEFAULT_NAMESPACE}/"


def _text(value: object) -> str:
    """A fact as people read it: without what most names of models begin with."""
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(map(_text, value))
    return str(value).removeprefix(_OWN)


class AgentEvent(Struct, frozen=True):
    """One log line; of one about an agent, `agent` is the name that it had."""

    at: datetime
    level: str
    event: str
    facts: dict[str, str]
    agent_id: str = ""
    agent: str = ""


class EventLog(logging.Handler):
    """A log handler that files lines; those with an `agent_id` also under their agent."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._level_before = logging.NOTSET
        self._events: OrderedDict[str, deque[AgentEvent]] = OrderedDict()
        self._all: deque[AgentEvent] = deque(maxlen=EVENTS)
        self._lines: deque[AgentEvent] = deque(maxlen=LINES)

    def __enter__(self) -> "EventLog":
        ours = logging.getLogger(PACKAGE)
        ours.addHandler(self)
        # The level of the log is that of its own handler (`log_to`): events do not depend on it.
        self._level_before = ours.level
        ours.setLevel(min(logging.INFO, ours.getEffectiveLevel()))
        return self

    def __exit__(self, *_: object) -> None:
        ours = logging.getLogger(PACKAGE)
        ours.removeHandler(self)
        ours.setLevel(self._level_before)

    def emit(self, record: logging.LogRecord) -> None:
        """File one line."""
        agent_id = getattr(record, "agent_id", "")
        agent_id = agent_id if isinstance(agent_id, str) else ""
        facts = {
            key: _text(value)
            for key, value in vars(record).items()
            if key not in _NOT_FACTS and value is not None
        }
        if record.exc_info and record.exc_info[1] is not None:
            facts["exception"] = repr(record.exc_info[1])
        at = datetime.fromtimestamp(record.created, UTC)
        name = str(getattr(record, "agent", ""))
        level, text = record.levelname.lower(), record.getMessage()
        event = AgentEvent(at, level, text, facts, agent_id, name)
        self._lines.append(event)
        if not agent_id:
            return
        self._all.append(event)
        self._events.setdefault(agent_id, deque(maxlen=EVENTS_PER_AGENT)).append(event)
        if len(self._events) > AGENTS:
            self._events.popitem(last=False)

    def all(self) -> list[AgentEvent]:
        """The last lines about any agent, newest first."""
        return list(reversed(self._all))

    def lines(self) -> list[AgentEvent]:
        """The last lines of the whole log, newest first."""
        return list(reversed(self._lines))

    def of(self, agent_id: str) -> list[AgentEvent]:
        """The lines about one agent, newest first."""
        return list(reversed(self._events.get(agent_id, ())))
