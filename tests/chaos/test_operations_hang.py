"""A pull on an agent that hangs: it is found out by a question that nobody answers."""

import asyncio

import pytest

from support.coordinator import running
from support.ollama import Model, StandIn
from support.transfers import assert_is_one_clean_stream, names, progress

pytestmark = pytest.mark.chaos

TINY = Model("tiny", size_bytes=3_000_000)


@pytest.mark.spec("SURFACE-20")
async def test_an_agent_that_hangs_in_a_pull_is_found_out_and_goes_on_when_it_is_back() -> None:
    async with (
        running(pull_patience=0.1) as coordinator,
        StandIn([], registry=[TINY]) as well,
        StandIn([], registry=[TINY]) as hung,
    ):
        await coordinator.register(well, "well")
        await coordinator.register(hung, "hung")
        stalled = hung.faults.stall(after=2, paths=["/api/pull"])
        pulling = asyncio.create_task(progress(coordinator, "/api/pull", {"model": "tiny"}))
        await hung.seen.wait_for(lambda seen: seen.faulted == 1)
        hole = hung.faults.black_hole()
        assert_is_one_clean_stream(await pulling)
        assert (names(well), names(hung)) == (["tiny:latest"], [])
        hole.clear()
        stalled.clear()
        await coordinator.until(lambda: names(hung) == ["tiny:latest"])
        await coordinator.until(lambda: not coordinator.parts.operations.pending())
