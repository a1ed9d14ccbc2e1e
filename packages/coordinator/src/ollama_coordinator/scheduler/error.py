"""Why a request cannot be served; `api/http/errors.py` knows what that means in HTTP.

SchedulerError
├── ModelNotFound        no agent of the fleet has the model
├── NoAgentRegistered    no agent is registered
├── HoldersUnavailable   the agents that have the model cannot take a request now
├── QueueFull            as many requests wait as may
└── DoesNotPredict       the policy has no estimates
"""

from collections.abc import Iterable, Mapping

from ollama_coordinator_common.error import OllamaCoordinatorError


class SchedulerError(OllamaCoordinatorError):
    """A request cannot be served."""


class ModelNotFound(SchedulerError):
    """No agent of the fleet has the model on disk."""

    def __init__(self, name: str) -> None:
        super().__init__(f"model '{name}' not found")


class NoAgentRegistered(SchedulerError):
    """No agent is registered."""

    def __init__(self) -> None:
        super().__init__(
            "no agent is registered; start one on a machine with Ollama: "
            "COORDINATOR_URL=http://THIS-HOST:PORT ollama-coordinator-agent run"
        )


class HoldersUnavailable(SchedulerError):
    """The agents that have the model cannot take a request now; `reasons` by their names."""

    def __init__(self, name: str, reasons: Mapping[str, str], others: Iterable[str] = ()) -> None:
        listed = "; ".join(f"{agent}: {reason}" for agent, reason in sorted(reasons.items()))
        online = ", ".join(sorted(others)) or "none"
        super().__init__(
            f"no agent that has model '{name}' can serve it now ({listed}). "
            f"Other agents online: {online}. Start one that has it, or pull the model elsewhere"
        )


class QueueFull(SchedulerError):
    """As many requests wait as may; `retry_after_seconds` is when there will probably be room."""

    def __init__(self, retry_after_seconds: float) -> None:
        # Ollama's own text, with its two spaces: clients match on it.
        super().__init__("server busy, please try again.  maximum pending requests exceeded")
        self.retry_after_seconds = retry_after_seconds


class DoesNotPredict(SchedulerError):
    """The policy has no estimates."""

    def __init__(self, policy: str) -> None:
        super().__init__(
            f"policy '{policy}' does not predict; start the coordinator with "
            "COORDINATOR_POLICY=predicted"
        )
