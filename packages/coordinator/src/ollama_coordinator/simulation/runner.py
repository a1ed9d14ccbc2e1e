"""A request on a simulated node, and the runner of a model that serves it."""

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from ollama_coordinator.scheduler.types import RunnerOptions

from .machine import ModelSpec
from .trace import TraceRequest

TINY = 1e-9


@dataclass(slots=True, eq=False)
class Job:
    """One request on a node. `left` is work in seconds at full speed, prompt first."""

    number: int
    request: TraceRequest
    sent_at: float
    options: RunnerOptions
    prefill_left: float = 0.0
    decode_left: float = 0.0
    ready_at: float | None = None
    started_at: float | None = None
    first_token_at: float | None = None
    ended_at: float | None = None

    def work(self, seconds: float) -> None:
        """So much of its work is done: the prompt, and after that the answer."""
        if self.prefill_left > 0:
            self.prefill_left = _left(self.prefill_left, seconds)
        else:
            self.decode_left = _left(self.decode_left, seconds)


@dataclass(slots=True, eq=False)
class Runner:
    """A model in memory, or on its way there."""

    model: ModelSpec
    options: RunnerOptions
    slots: int
    ready_at: float
    ready: bool = False
    doomed: bool = False
    used_at: float = 0.0
    running: list[Job] = field(default_factory=list)
    queue: deque[Job] = field(default_factory=deque)
    cache: "OrderedDict[int, tuple[frozenset[int], int]]" = field(default_factory=OrderedDict)

    @property
    def busy(self) -> bool:
        """Whether anything runs or waits in it."""
        return bool(self.running or self.queue)


def _left(work: float, done: float) -> float:
    return work - done if work - done > TINY else 0.0
