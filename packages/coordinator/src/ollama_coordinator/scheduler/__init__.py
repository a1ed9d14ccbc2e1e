"""Who serves what, when; pure: time and facts in, decisions out."""

from ollama_coordinator_common.settings import POLICIES

from .error import (
    DoesNotPredict,
    HoldersUnavailable,
    ModelNotFound,
    NoAgentRegistered,
    QueueFull,
    SchedulerError,
)
from .explain import Candidate, Decision
from .export import Estimate, Learned
from .policies import create_scheduler
from .predicted import PredictedScheduler
from .protocol import Plan, Scheduler, Waiting
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
    "Candidate",
    "Decision",
    "DoesNotPredict",
    "Estimate",
    "HoldersUnavailable",
    "Kind",
    "Lane",
    "Learned",
    "Lease",
    "LeaseId",
    "ModelNotFound",
    "NoAgentRegistered",
    "Outcome",
    "Plan",
    "PredictedScheduler",
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
