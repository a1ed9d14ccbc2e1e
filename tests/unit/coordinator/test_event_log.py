"""What was logged about each agent, for its page."""

import logging

from ollama_coordinator.journal import events
from ollama_coordinator.journal.events import EVENTS_PER_AGENT, EventLog

log = logging.getLogger("ollama_coordinator.somewhere")


def test_lines_are_filed_under_their_agent_newest_first() -> None:
    with EventLog() as filed:
        log.warning("agent offline", extra={"agent_id": "a", "agent": "first", "seconds": 61})
        log.warning("agent back", extra={"agent_id": "a", "agent": "first"})
        log.warning("agent offline", extra={"agent_id": "b"})
        log.warning("nobody in particular")
    log.warning("too late", extra={"agent_id": "a"})
    back, gone = filed.of("a")
    assert (back.event, gone.event) == ("agent back", "agent offline")
    assert gone.facts == {"seconds": "61"}
    assert gone.level == "warning"
    assert len(filed.of("b")) == 1
    assert filed.of("nobody") == []


def test_the_log_is_bounded() -> None:
    with EventLog() as filed:
        for number in range(EVENTS_PER_AGENT + 5):
            log.warning("again", extra={"agent_id": "a", "number": number})
        for number in range(events.AGENTS + 5):
            log.warning("once", extra={"agent_id": f"agent-{number}"})
        log.warning("still here", extra={"agent_id": "agent-1004"})
    assert filed.of("a") == []
    assert len(filed.of("agent-1004")) == 2
