"""Model operations over the fleet: pull, push, create, copy, delete, load and unload."""

from .blobs import Blobs
from .deferred import Deferred
from .operation import Operation
from .rebalance import DOCUMENT as MOVES
from .rebalance import Moves, MoveView, Rebalance
from .remote import Remote
from .room import ModelSizes
from .runner import Operations
from .supply import FLEET
from .targets import Chosen, Placement, TargetChooser, WrongPlacement, choose
from .transfers import FileWay, Transfer, Transfers
from .types import (
    AgentCommand,
    DeferredCommand,
    NoAgentForModel,
    OperationError,
    OperationKind,
    OperationState,
    OperationView,
    Refused,
    UnknownOperation,
)
from .uploads import UploadError, Uploads, digest_of

__all__ = [
    "FLEET",
    "MOVES",
    "AgentCommand",
    "Blobs",
    "Chosen",
    "Deferred",
    "DeferredCommand",
    "FileWay",
    "ModelSizes",
    "MoveView",
    "Moves",
    "NoAgentForModel",
    "Operation",
    "OperationError",
    "OperationKind",
    "OperationState",
    "OperationView",
    "Operations",
    "Placement",
    "Rebalance",
    "Refused",
    "Remote",
    "TargetChooser",
    "Transfer",
    "Transfers",
    "UnknownOperation",
    "UploadError",
    "Uploads",
    "WrongPlacement",
    "choose",
    "digest_of",
]
