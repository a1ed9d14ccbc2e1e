"""Machines that crash, move and are copied, in any order: who lives is told apart in the end."""

from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import count

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import structs

from ollama_coordinator.registry import Registry, UnknownAgent
from ollama_coordinator_common.protocol import HealthReport, RegisterRequest
from ollama_coordinator_common.types import AgentId

AT = datetime(2026, 1, 1, tzinfo=UTC)


class Agent:
    """An agent process on the disk that the one before left, at an address of its own."""

    def __init__(self, registry: Registry, numbers: Iterator[int], before: str | None) -> None:
        self._registry = registry
        self._numbers = numbers
        number = next(numbers)
        self.run = f"run-{number}"
        self._request = RegisterRequest(
            "gpu", f"10.0.0.{number}", "0.33.0", 11434, "disk", instance_id=self.run
        )
        self._request = structs.replace(self._request, previous_instance_id=before)
        self.register()

    def register(self) -> None:
        new_id = AgentId(f"agent-{next(self._numbers)}")
        self.id = self._registry.register(self._request, new_id, AT, 0.0).agent.id

    def reports(self) -> bool:
        """Whether its heartbeat is taken; it registers again when it is not."""
        fields = {"agent_id": self.id, "instance_id": self.run}
        usage = {"cpu_usage": 0, "memory_usage": 0, "active_requests": 0}
        try:
            self._registry.heartbeat(msgspec.convert({**fields, **usage}, HealthReport), 0.0)
        except UnknownAgent:
            self.register()
            return False
        return True


events = st.tuples(st.sampled_from(["crash", "copy", "report"]), st.integers(0, 5))

COPY_OF_EACH_COPY = [*(("copy", number) for number in range(4)), ("crash", 4)]
MANY_CRASHES_OF_A_COPY = [("copy", 0), *[("crash", 1)] * 10]


@pytest.mark.spec("FLEET-26")
@given(st.lists(events, max_size=12))
@example(COPY_OF_EACH_COPY)
@example(MANY_CRASHES_OF_A_COPY)
def test_all_that_live_are_told_apart(happened: list[tuple[str, int]]) -> None:
    """After as many heartbeats of each as agents are online, nobody's id is taken any more.

    A copy takes its original's id, and the original takes it back with its next heartbeat: the
    copy then needs an id, perhaps that of a copy of itself. So each round settles at least one.
    """
    registry, numbers = Registry(60.0), count(1)
    living = [Agent(registry, numbers, None)]
    for event, number in happened:
        place = number % len(living)
        if event == "crash":
            living[place] = Agent(registry, numbers, living[place].run)
        elif event == "copy":
            living.append(Agent(registry, numbers, living[place].run))
        else:
            living[place].reports()
    for _ in living:
        settled = [agent.reports() for agent in living]
    assert all(settled)
    assert len({agent.id for agent in living}) == len(living)
    if "copy" not in dict(happened):
        assert len(registry) == 1
