"""The schedulers by the name of their policy."""

from ollama_coordinator.registry import Registry
from ollama_coordinator_common.settings import POLICIES

from .counting import (
    Choose,
    CountingScheduler,
    Random,
    cpu,
    least_connections,
    loaded_first,
    round_robin,
)
from .predicted import PredictedScheduler
from .protocol import Scheduler

PREDICTED = POLICIES[0]


def create_scheduler(policy: str, registry: Registry, *, max_queue: int) -> Scheduler:
    """The scheduler of one of `POLICIES`, in which at most `max_queue` requests wait.

    Raises:
        KeyError: no such policy.
    """
    if policy == PREDICTED:
        return PredictedScheduler(registry, max_queue=max_queue)
    counting: dict[str, Choose] = {
        "loaded-first": loaded_first,
        "least-connections": least_connections,
        "round-robin": round_robin,
        "random": Random(seed=1),
        "cpu": cpu,
    }
    return CountingScheduler(policy, registry, counting[policy], max_queue=max_queue)
