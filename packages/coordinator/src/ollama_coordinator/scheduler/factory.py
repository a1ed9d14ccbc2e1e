"""The schedulers by the name of their policy."""

from collections.abc import Iterator

from ollama_coordinator.registry import Registry

from .base import Scheduler
from .immediate import Choose, ImmediateScheduler
from .policies import Random, cpu, least_connections, loaded_first, round_robin
from .predicted import PredictedScheduler

PREDICTED = "predicted"
POLICIES = (PREDICTED, "loaded-first", "least-connections", "round-robin", "random", "cpu")


def create_scheduler(
    policy: str, registry: Registry, *, max_queue: int, numbers: Iterator[int] | None = None
) -> Scheduler:
    """The scheduler for one of `POLICIES`, with a waiting line of at most `max_queue` requests.

    `numbers` gives the ids of its leases, where others have given some before.

    Raises:
        KeyError: no such policy.
    """
    if policy == PREDICTED:
        return PredictedScheduler(registry, max_queue=max_queue, numbers=numbers)
    counting: dict[str, Choose] = {
        "loaded-first": loaded_first,
        "least-connections": least_connections,
        "round-robin": round_robin,
        "random": Random(seed=1),
        "cpu": cpu,
    }
    return ImmediateScheduler(registry, counting[policy], max_queue=max_queue, numbers=numbers)
