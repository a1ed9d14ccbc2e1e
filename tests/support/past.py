"""Finished requests as an earlier time left them."""

from datetime import UTC, datetime, timedelta
from typing import Any

from ollama_coordinator.db import Finished, Status

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
