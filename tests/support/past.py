"""Finished requests as an earlier time left them."""

from datetime import UTC, datetime, timedelta
from typing import Any

from ollama_coordinator.db import Finished, Status
from ollama_coordinator_common.types import AgentId

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
MODELS = ("llama3.2:latest", "qwen3:8b", "gemma3:12b")
STATUSES = (Status.SERVED, Status.SERVED, Status.SERVED, Status.FAILED, Status.CANCELLED)


def past(number: int, **changes: Any) -> Finished:
    """The request with this number: one a second, models and results in turn."""
    at = NOON + timedelta(seconds=number)
    facts: dict[str, Any] = {
        "id": f"{number:016x}",
        "status": STATUSES[number % len(STATUSES)],
        "model": MODELS[number % len(MODELS)],
        "path": "/api/chat",
        "client": f"10.0.0.{number % 50}",
        "agent_id": f"agent-{number % 7}",
        "agent": f"machine-{number % 7}",
        "arrived_at": at - timedelta(seconds=2),
        "finished_at": at,
        "waited_seconds": 0.5,
        "total_seconds": 2.0,
        "output_tokens": 100,
        "first_token_seconds": 0.7,
        "tokens_per_second": 60.0,
    }
    return Finished(**facts | changes)


def crowd(agent: str, count: int, *, lane: str = "interactive") -> list[Finished]:
    """So many at once on one agent with one slot, a minute each, an hour ago."""
    start = datetime.now(UTC) - timedelta(hours=2)
    return [
        Finished(
            id=f"{lane}-{number}", status=Status.SERVED, model="qwen3:32b", path="/api/chat",
            client="1.2.3.4", arrived_at=start,
            finished_at=start + timedelta(minutes=number + 1), waited_seconds=60.0 * number,
            total_seconds=60.0 * (number + 1), agent_id=AgentId(agent), agent="busy", attempts=1,
            lane=lane, prompt_tokens=100, output_tokens=100, load_seconds=0.0,
        )
        for number in range(count)
    ]  # fmt: skip
