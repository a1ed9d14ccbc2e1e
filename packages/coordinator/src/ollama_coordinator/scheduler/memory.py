"""What fits into an agent's memory.

What an agent reports decides, with a margin: Ollama loads a model beside others only where it is
predicted to fit well, and how well is learned. Where an agent reports nothing, what was seen
together fits, and what was seen to push another model out does not. Between the two it is tried:
then the agent's Ollama decides itself which model leaves.
"""

from dataclasses import dataclass
from enum import Enum

from ollama_coordinator.registry import MEMORY_SHARE_WITHOUT_GPU, OVERHEAD_FACTOR, AgentState

MODELS_PER_DEVICE = 3  # Ollama's own default of `OLLAMA_MAX_LOADED_MODELS`
OVERHEAD_BYTES = 200_000_000  # what every model takes beside `OVERHEAD_FACTOR`
# The share of the free memory that fits for certain: Ollama is off by some 20 %.
CAREFUL_SHARE = 0.8
SAFE_FACTOR = 0.98  # what was refused is not certain either when it is only a little smaller


class Fit(Enum):
    """Whether models are in memory together."""

    YES = "yes"
    NO = "no"
    MAYBE = "maybe"


@dataclass(slots=True)
class MemoryLimits:
    """The limits of one agent: reported, and seen.

    A model that took `share` of the free memory was seen to fit, one that took `refused` was not.
    Without a known `total`, `most` bytes were seen together, and `tight` bytes were not. `models`
    may be loaded at once by the agent's settings; `most_models` were seen.
    """

    total: int | None = None
    models: int | None = None
    share: float = CAREFUL_SHARE
    refused: float = 1.0
    most: int = 0
    most_models: int = 0
    tight: int | None = None

    def fit(self, new: int, beside: int, count: int) -> Fit:
        """Whether a model of `new` bytes fits beside others of so many, `count` with itself."""
        bytes_fit, models_fit = self._bytes(new, beside), self._count(count)
        if Fit.NO in (bytes_fit, models_fit):
            return Fit.NO
        return Fit.MAYBE if Fit.MAYBE in (bytes_fit, models_fit) else Fit.YES

    def _bytes(self, new: int, beside: int) -> Fit:
        if self.total is None:
            if new + beside <= self.most:
                return Fit.YES
            return Fit.NO if self.tight is not None and new + beside >= self.tight else Fit.MAYBE
        share = self.taken_share(new, beside)
        if share <= self.share:
            return Fit.YES
        return Fit.NO if share >= self.refused else Fit.MAYBE

    def taken_share(self, new: int, beside: int) -> float:
        """The share of the free memory that a model takes."""
        return new / max((self.total or 0) - beside, 1)

    def _count(self, count: int) -> Fit:
        if count <= max(self.most_models, 1):
            return Fit.YES
        if self.models is not None:
            return Fit.YES if count <= self.models else Fit.NO
        return Fit.YES if count <= MODELS_PER_DEVICE else Fit.MAYBE

    def fitted(self, new: int, beside: int, count: int) -> None:
        """A model was loaded and nothing left."""
        self.most = max(self.most, new + beside)
        self.most_models = max(self.most_models, count)
        if self.tight is not None and self.tight <= self.most:
            self.tight = None
        if self.total is not None:
            self.share = min(max(self.share, self.taken_share(new, beside)), 1.0)
            self.refused = max(self.refused, self.share)

    def pushed_out(self, new: int, beside: int) -> None:
        """A model was loaded and another left, which had not been asked to."""
        self.tight = min(new + beside, self.tight or new + beside)
        self.most = min(self.most, self.tight - 1)
        if self.total is not None:
            self.refused = min(self.refused, self.taken_share(new, beside))
            self.share = min(self.share, self.refused * SAFE_FACTOR)

    def read(self, agent: AgentState) -> None:
        """Take over what the agent reports of its memory."""
        self.total = memory_of(agent)
        runner = agent.runner
        if runner is not None and runner.max_loaded_models is not None:
            per_device = MODELS_PER_DEVICE * max(len(agent.cards), 1)
            self.models = runner.max_loaded_models or per_device


def memory_of(agent: AgentState) -> int | None:
    """The memory in bytes that models may take: as the operator says, else as reported.

    From the latter goes what other programs use; `None` is unknown.
    """
    if agent.settings.memory_bytes is not None:
        return agent.settings.memory_bytes
    main = (agent.report.memory_total_bytes if agent.report is not None else None) or 0
    total = agent.gpu_bytes or int(main * MEMORY_SHARE_WITHOUT_GPU)
    return max(total - agent.foreign_bytes, 1) if total else None


def main_memory_of(agent: AgentState) -> int | None:
    """All the memory that a model may take, of GPUs and beside them; `None` is unknown."""
    if agent.settings.memory_bytes is not None:
        return agent.settings.memory_bytes
    main = (agent.report.memory_total_bytes if agent.report is not None else None) or 0
    return agent.gpu_bytes + int(main * MEMORY_SHARE_WITHOUT_GPU) or None


def predicted_bytes(disk_bytes: int) -> int:
    """The memory that a model never seen loaded will probably take."""
    return int(disk_bytes * OVERHEAD_FACTOR) + OVERHEAD_BYTES
