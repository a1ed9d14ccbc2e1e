"""The schedulers by the name of their policy."""

from ollama_coordinator.registry import Registry

from .base import Scheduler
from .immediate import Choose, ImmediateScheduler
from .policies import loaded_first

_COUNTING: dict[str, Choose] = {"loaded-first": loaded_first.choose}
POLICIES = ("loaded-first",)


def create_scheduler(policy: str, registry: Registry, *, max_queue: int) -> Scheduler:
    """The scheduler for one of `POLICIES`, with a waiting line of at most `max_queue` requests.

    Raises:
        KeyError: no such policy.
    """
    return ImmediateScheduler(registry, _COUNTING[policy], max_queue=max_queue)
