"""Model operations over the fleet: pull, push, create, copy, delete, load and unload."""

from .blobs import Blobs
from .choosing import Choosing
from .operation import Operation, Target
from .pending import Debts
from .placement import Placement, Places, WrongPlacement, places
from .remote import Remote
from .running import Operations
from .spool import Spool, SpoolError, digest_of
from .types import (
    Deed,
    Kind,
    NoAgentForModel,
    OperationError,
    OperationView,
    Pending,
    Refused,
    State,
    TargetView,
    UnknownOperation,
)
from .work import Patience

__all__ = [
    "Blobs",
    "Choosing",
    "Debts",
    "Deed",
    "Kind",
    "NoAgentForModel",
    "Operation",
    "OperationError",
    "OperationView",
    "Operations",
    "Patience",
    "Pending",
    "Placement",
    "Places",
    "Refused",
    "Remote",
    "Spool",
    "SpoolError",
    "State",
    "Target",
    "TargetView",
    "UnknownOperation",
    "WrongPlacement",
    "digest_of",
    "places",
]
