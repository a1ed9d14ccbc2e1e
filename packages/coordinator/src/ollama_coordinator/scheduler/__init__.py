"""Which agent serves which request when; pure: events and time in, leases out. See `DESIGN.md`."""

from ollama_coordinator_common.settings import POLICIES

from .error import (
    DoesNotPredict,
    HoldersUnavailable,
    ModelNotFound,
    NoAgentRegistered,
    QueueFull,
    SchedulerError,
)
from .explain import Decision
from .export import Estimate, Learned, Prospect
from .memory import main_memory_of, predicted_bytes
from .policies import create_scheduler
from .predicted import PredictedScheduler
from .protocol import Scheduler, Waiting
from .types import (
    NO_OPTIONS,
    Form,
    Kind,
    Lane,
    Lease,
    LeaseId,
    Outcome,
    Request,
    RequestId,
    Result,
    RunnerOptions,
    Timings,
)

__all__ = [
    "NO_OPTIONS",
    "POLICIES",
    "Decision",
    "DoesNotPredict",
    "Estimate",
    "Form",
    "HoldersUnavailable",
    "Kind",
    "Lane",
    "Learned",
    "Lease",
    "LeaseId",
    "ModelNotFound",
    "NoAgentRegistered",
    "Outcome",
    "PredictedScheduler",
    "Prospect",
    "QueueFull",
    "Request",
    "RequestId",
    "Result",
    "RunnerOptions",
    "Scheduler",
    "SchedulerError",
    "Timings",
    "Waiting",
    "create_scheduler",
    "main_memory_of",
    "predicted_bytes",
]
