"""Pulls onto three agents that are killed and started again while they download."""

import asyncio
import random

import pytest

from support.coordinator import running
from support.ollama import Model, StandIn
from support.transfers import assert_is_one_clean_stream, names, progress

pytestmark = pytest.mark.chaos

ROUNDS = 6
KILLS = 2
BYTES_PER_SECOND = 2e7


async def _killed(ollamas: list[StandIn], dice: random.Random) -> None:
    for _ in range(KILLS):
        await asyncio.sleep(dice.random() * 0.25)
        ollama = dice.choice(ollamas)
        await ollama.kill(dice.choice(["rst", "fin"]))
        await asyncio.sleep(dice.random() * 0.4)
        await ollama.start()


@pytest.mark.spec("SURFACE-20")
@pytest.mark.timeout(300)
async def test_every_pull_is_one_clean_stream_and_every_agent_has_the_model_in_the_end() -> None:
    dice = random.Random(5)
    async with (
        running(pull_patience=20) as coordinator,
        StandIn([], download_bytes_per_second=BYTES_PER_SECOND) as first,
        StandIn([], download_bytes_per_second=BYTES_PER_SECOND) as second,
        StandIn([], download_bytes_per_second=BYTES_PER_SECOND) as third,
    ):
        ollamas = [first, second, third]
        for number, ollama in enumerate(ollamas):
            await coordinator.register(ollama, f"agent-{number}")
        operations = coordinator.parts.operations
        for number in range(ROUNDS):
            name = f"model-{number}:latest"
            for ollama in ollamas:
                ollama.node.registry.add(Model(name, size_bytes=8_000_000))
            pulling = asyncio.create_task(progress(coordinator, "/api/pull", {"model": name}))
            await _killed(ollamas, dice)
            assert_is_one_clean_stream(await pulling)
            await coordinator.until(lambda: not operations.pending())
            assert all(name in names(ollama) for ollama in ollamas)
        for ollama in ollamas:
            await ollama.seen.wait_for(lambda seen: seen.open == 0)
