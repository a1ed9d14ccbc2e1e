"""Who may come in: zones, keys, sessions, and the gate that every request passes."""

from .caller import NOBODY, Caller, Denied, caller_of, granted
from .gate import SAFE_METHODS, Access
from .keys import (
    EVERYTHING,
    FREE,
    INCLUDED,
    KEY_TEXT,
    Key,
    KeyLimits,
    KeyRing,
    NewKey,
    Right,
    UnknownKey,
    WrongKey,
    key_in,
    token_in,
)
from .limits import Account, KeyUsage, limits_of_names
from .machines import (
    JoinRequest,
    KnownMachines,
    UnknownJoinRequest,
    check_address,
    secret_in,
)
from .sessions import COOKIE, SESSION_SECONDS, SecretFile, Sessions, cookie_of, secret_path
from .zones import Zone, Zones, networks

__all__ = [
    "COOKIE",
    "EVERYTHING",
    "FREE",
    "INCLUDED",
    "KEY_TEXT",
    "NOBODY",
    "SAFE_METHODS",
    "SESSION_SECONDS",
    "Access",
    "Account",
    "Caller",
    "Denied",
    "JoinRequest",
    "Key",
    "KeyLimits",
    "KeyRing",
    "KeyUsage",
    "KnownMachines",
    "NewKey",
    "Right",
    "SecretFile",
    "Sessions",
    "UnknownJoinRequest",
    "UnknownKey",
    "WrongKey",
    "Zone",
    "Zones",
    "caller_of",
    "check_address",
    "cookie_of",
    "granted",
    "key_in",
    "limits_of_names",
    "networks",
    "secret_in",
    "secret_path",
    "token_in",
]
