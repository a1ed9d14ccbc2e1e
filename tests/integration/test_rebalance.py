"""Placement by demand: advice is done by copies, and what leaves for it is least wanted."""

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from integration.test_advice import remember
from integration.test_models_move import Machines, machines, named
from integration.test_operate import run
from ollama_coordinator.journal import AdvicePiece
from ollama_coordinator.operations import rebalance
from ollama_coordinator_common.names import model_key
from ollama_coordinator_common.types import AgentId
from support.coordinator import running
from support.ollama import Model, StandIn
from support.past import crowd
from support.transfers import names

__all__ = ["machines"]
LONG_AGO = (datetime.now(UTC) - timedelta(days=30)).timestamp()
WANTED = Model("qwen3:32b", size_bytes=300_000)


def piece(agent: Any, size: int, requests: int = 10) -> AdvicePiece:
    return AdvicePiece(
        action="pull", model="wanted", agent_id=agent.id, agent=agent.name, saved_seconds=100.0,
        waited_seconds=200.0, requests=requests, bytes=size, text="wanted there", doubts=[],
    )  # fmt: skip


@pytest.mark.spec("OPERATION-95")
async def test_the_least_wanted_copy_leaves_and_never_the_last_or_a_fresh_one() -> None:
    def old(name: str, size: int) -> Model:
        return Model(name, size_bytes=size, modified_at=LONG_AGO)

    often, seldom, never = old("often", 3000), old("seldom", 2000), old("never", 1000)
    held = [often, seldom, never, old("only", 5000), Model("fresh", size_bytes=5000)]
    others = [often, seldom, never, Model("fresh", size_bytes=5000)]
    async with running(model_disk_gibibytes=1) as coordinator, StandIn(held) as one:
        async with StandIn(others) as two:
            ids = [await coordinator.register(one, "one"), await coordinator.register(two, "two")]
            agent = coordinator.agent(ids[0])
            await coordinator.until(lambda: len(agent.inventory.available) == 5)
            await coordinator.until(lambda: len(coordinator.agent(ids[1]).inventory.available) == 4)
            mover = coordinator.parts.rebalance
            demand = {
                (AgentId(ids[0]), model_key("often")): 9,
                (AgentId(ids[0]), model_key("seldom")): 2,
            }

            def leaving(size: int, requests: int = 10) -> list[str] | None:
                found = mover.victims(agent, piece(agent, size, requests), Counter(demand))
                return None if found is None else [row.model.name for row in found]

            mover.budget_bytes = 16_000
            assert leaving(0) == []
            assert leaving(500) == ["never:latest"]
            assert leaving(2500) == ["never:latest", "seldom:latest"]
            assert leaving(5000) == ["never:latest", "seldom:latest", "often:latest"]
            assert leaving(5000, requests=5) is None
            assert leaving(7000) is None
            await one.load("never")
            await coordinator.parts.monitor.look_at(agent, seconds=5.0)
            assert leaving(500) == ["seldom:latest"]
            await two.kill()
            await coordinator.parts.monitor.look_at(coordinator.agent(ids[1]), seconds=5.0)
            assert leaving(500) is None


@pytest.mark.spec("OPERATION-95")
@pytest.mark.parametrize("setting", ["off", "auto"])
async def test_advice_is_done_by_a_copy_and_stands_in_the_audit(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setattr(rebalance, "REBALANCE_SECONDS", 0.2)
    async with machines([WANTED], [], rebalance=setting) as (coordinator, ollamas):
        if setting == "off":
            code, output = await run(coordinator, "advise", "--apply")
            assert (code, output) == (0, "There is no advice to follow.\n")
        await remember(coordinator, crowd(named(coordinator, 0).id, 30))
        coordinator.parts.observation.advisor._kept.clear()  # an answer is given again for a minute
        if setting == "off":
            code, output = await run(coordinator, "advise", "--apply", width=200)
            assert code == 0, output
            assert "copied: qwen3:32b on machine-1 would have saved" in output
        await coordinator.until(lambda: names(ollamas[1]) == ["qwen3:32b"])
        operations = [o for o in coordinator.parts.operations.views() if o.kind.value == "pull"]
        assert [target.agent for one in operations for target in one.targets] == ["machine-1"]
        audit = await coordinator.get("/api/audit")
        rows = [one for one in audit["changes"] if one["by"] == "rebalance"]
        assert [one["details"]["agent"] for one in rows] == ["machine-1"]
        assert "would have saved" in rows[0]["details"]["why"]
