"""What is in the memory of agents that do not report it by themselves."""

import pytest

from support.coordinator import running
from support.ollama import Hardware, Model, StandIn


@pytest.mark.spec("FLEET-25")
async def test_what_a_load_drove_out_of_memory_is_known_soon_after() -> None:
    size = 10_000_000_000
    tight = Hardware(vram_bytes=15_000_000_000)
    models = [Model("one", size_bytes=size), Model("two", size_bytes=size)]
    async with running() as coordinator, StandIn(models, hardware=tight) as ollama:
        agent = coordinator.agent(await coordinator.register(ollama))
        assert (await coordinator.chat("one"))[0] == 200
        assert (await coordinator.chat("two"))[0] == 200
        await coordinator.until(
            lambda: [row.model.name for row in agent.inventory.loaded.values()] == ["two:latest"]
        )
