"""Who serves what, when; pure: time and facts in, decisions out."""

from .base import Plan, Scheduler, Waiting
from .error import (
    HoldersUnavailable,
    ModelNotFound,
    NoAgentRegistered,
    QueueFull,
    SchedulerError,
)
from .factory import POLICIES, create_scheduler
from .types import (
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
    "POLICIES",
    "HoldersUnavailable",
    "Kind",
    "Lane",
    "Lease",
    "LeaseId",
    "ModelNotFound",
    "NoAgentRegistered",
    "Outcome",
    "Plan",
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
]
