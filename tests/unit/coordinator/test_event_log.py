"""What was logged about each agent, for its page."""

import io
import logging

import pytest

from ollama_coordinator.journal import events
from ollama_coordinator.journal.events import EVENTS_PER_AGENT, EventLog
from ollama_coordinator_common.commandline import log_to

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


@pytest.mark.spec("OPERATION-51")
@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARNING", "ERROR"])
def test_the_level_of_the_log_does_not_matter(level: str) -> None:
    root, written = logging.getLogger(), io.StringIO()
    before = root.handlers[:], root.level
    try:
        log_to(logging.StreamHandler(written), level, "%(message)s")
        with EventLog() as filed:
            log.debug("probed", extra={"agent_id": "a"})
            log.info("agent back", extra={"agent_id": "a"})
            log.warning("agent offline", extra={"agent_id": "a"})
        assert [event.event for event in filed.of("a")] == ["agent offline", "agent back"]
        lines = ["probed", "agent back", "agent offline"]
        first = {"DEBUG": 0, "INFO": 1, "WARNING": 2, "ERROR": 3}[level]
        assert written.getvalue().replace(" agent_id=a", "").splitlines() == lines[first:]
    finally:
        root.handlers[:], root.level = before


def test_the_log_is_bounded() -> None:
    with EventLog() as filed:
        for number in range(EVENTS_PER_AGENT + 5):
            log.warning("again", extra={"agent_id": "a", "number": number})
        for number in range(events.AGENTS + 5):
            log.warning("once", extra={"agent_id": f"agent-{number}"})
        log.warning("still here", extra={"agent_id": "agent-1004"})
    assert filed.of("a") == []
    assert len(filed.of("agent-1004")) == 2
