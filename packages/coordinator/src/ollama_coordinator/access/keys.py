"""Keys: who has one, what it allows, and how they are kept.

A key is kept as its SHA-256 alone. Its 256 random bits cannot be guessed, so a slow hash would gain
nothing; and since it is looked up by its hash, which no client can choose byte by byte, the time
that the look-up takes tells nothing of a key either.
"""

import logging
import os
import re
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from enum import IntFlag
from fnmatch import fnmatchcase
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import msgspec
from msgspec import Struct, structs

from ollama_coordinator.db import Store
from ollama_coordinator_common.error import ConfigError, OllamaCoordinatorError
from ollama_coordinator_common.join_token import JoinToken
from ollama_coordinator_common.names import ModelName
from ollama_coordinator_common.network import parse_address

from . import signature

log = logging.getLogger(__name__)

PREFIX = "oc_"
KEY_BYTES = 32
"""256 bits, 43 characters."""

KEY_TEXT = re.compile(r"oc_[A-Za-z0-9_-]{43}")

HINT_CHARACTERS = len(PREFIX) + 6
"""The first characters of a key are kept to recognise it; 220 random bits are left."""

NAME = re.compile(r"[^\W_][\w .@+-]{0,63}")
"""A key's name: it stands in the history and in log lines as the client's."""

SSH_ED25519 = "AAAAC3NzaC1lZDI1NTE5"
"""How the base64 text of an Ed25519 public key begins: its type, with its length before it."""

DOCUMENT = "keys"
"""Under which name the keys are in the database: a JSON list of `Key`."""

USED_SECONDS = 60.0
"""How late at most it is written when a key was last used."""

FROM_FILE = "key file"
FROM_SETTING = "join token"
"""The names of the keys that `COORDINATOR_KEY_FILE` and `COORDINATOR_JOIN_TOKEN` give."""

OF_TOKENS = ("join",)
"""The rights of a join token, which is a key with these alone."""


class Right(IntFlag):
    """What a caller may do; several joined mean any of them.

    `ASK`, to join: every machine with a secret may, where the coordinator is not closed to it.
    """

    USE = 1
    MANAGE = 2
    OPERATE = 4
    JOIN = 8
    WATCH = 16
    ASK = 32

    def meets(self, wanted: "Right") -> bool:
        """Whether any of the wanted rights is among these.

        Without `&`, which makes a new `Right` of the result: that costs a microsecond a request.
        """
        return self._value_ & wanted._value_ != 0


NOTHING = Right(0)
EVERYTHING = Right.USE | Right.MANAGE | Right.OPERATE | Right.JOIN | Right.WATCH

FREE = NOTHING
"""The right of a route that needs none."""

INCLUDED = {
    "use": Right.USE,
    "manage": Right.MANAGE | Right.USE,
    "operate": EVERYTHING,
    "join": Right.JOIN,
    "watch": Right.WATCH,
}
"""The rights by their names, each with those that it includes."""


class WrongKey(OllamaCoordinatorError):
    """A key that cannot be made as it is asked for; says why."""


class UnknownKey(OllamaCoordinatorError):
    """There is no key of this name or id."""


class KeyLimits(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How much a key may use; 0 is no limit. A day is a day of UTC."""

    requests_per_minute: int = 0
    concurrent: int = 0
    tokens_per_day: int = 0
    gpu_seconds_per_day: float = 0


NO_LIMITS = KeyLimits()


class NewKey(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /api/keys`. `rights` are `use`, `manage`, `operate`, `join` and `watch`.

    `models`: the models it may use, as patterns with `*`; none is all. `weight`: its share among
    clients that wait for one model. `lane`: that of its requests, `interactive` or `batch`, where
    they name none; empty: by what they do. `in_path`: it may stand in an address, `/k/KEY/…`.
    `names_users`: requests with it may say which user they are for. `continues`: its answers go
    on elsewhere where a machine breaks them off, unless a request says otherwise. `ssh`: the public
    key of an `ollama` program, in place of a secret. `once`: a join token for one machine.
    """

    name: str
    rights: tuple[str, ...] = ("use",)
    models: tuple[str, ...] = ()
    weight: float = 1.0
    lane: str = ""
    in_path: bool = False
    names_users: bool = False
    continues: bool = True
    limits: KeyLimits = NO_LIMITS
    expires_at: datetime | None = None
    ssh: str = ""
    once: bool = False


class Key(Struct, kw_only=True):
    """One key. `hash` is the SHA-256 of its text, or the public key of an `ollama` program.

    `last_used` is in Unix seconds; `revoked_at` and `expires_at` end it.
    """

    id: str
    name: str
    hash: str
    hint: str
    rights: tuple[str, ...]
    models: tuple[str, ...] = ()
    weight: float = 1.0
    lane: str = ""
    in_path: bool = False
    names_users: bool = False
    continues: bool = True
    limits: KeyLimits = NO_LIMITS
    once: bool = False
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used: float = 0.0

    @property
    def allowed(self) -> Right:
        """Its rights with those that they include."""
        return rights_of(self.rights)

    @property
    def is_token(self) -> bool:
        """Whether it is a join token: it lets machines in, and nobody has to have one."""
        return self.rights == OF_TOKENS

    def has_ended(self, at: float) -> bool:
        """Whether it is revoked, or has expired at a Unix time."""
        if self.revoked_at is not None:
            return True
        return self.expires_at is not None and self.expires_at.timestamp() <= at

    def may_use(self, model: str) -> bool:
        """Whether it may use a model, named by its routing key or as people write it."""
        return not self.models or is_among(self.models, model)


@lru_cache(maxsize=1024)
def rights_of(names: tuple[str, ...]) -> Right:
    """The rights of these names, with those that they include."""
    found = NOTHING
    for name in names:
        found |= INCLUDED.get(name, NOTHING)
    return found


@lru_cache(maxsize=8192)
def is_among(patterns: tuple[str, ...], model: str) -> bool:
    """Whether one of the patterns means a model, in any letter case, with its tag or without."""
    try:
        name = ModelName.parse(model)
    except OllamaCoordinatorError:
        return False
    short = name.short.lower()
    spellings = {short, name.key, short.removesuffix(":latest")}
    return any(fnmatchcase(text, one.lower()) for text in spellings for one in patterns)


def hash_of(text: str | bytes) -> str:
    """A key's SHA-256 in hexadecimal digits."""
    return sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def new_secret() -> str:
    """The text of a new key."""
    return PREFIX + secrets.token_urlsafe(KEY_BYTES)


class KeyCounts(Struct):
    """What was asked with the keys of one name since the start of the process.

    `requests`: for inference, that were let in. `tokens`: read and written for them. `refusals`:
    requests of any kind that a key's limits, rights or models did not allow.
    """

    requests: int = 0
    tokens: int = 0
    refusals: int = 0


class KeyRing:
    """All keys of a coordinator, in memory and in its database.

    `any_made`: a key was made once that is no join token, be it revoked or expired since.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._keys: dict[str, Key] = {}
        self._by_hash: dict[str, Key] = {}
        self._unwritten_since: float | None = None
        self.any_made = False

    async def restore(self) -> None:
        """Take the keys over from the database.

        Raises:
            DatabaseError: it cannot be read, or what it has of keys cannot.
        """
        for key in await self._store.read(DOCUMENT, list[Key]) or ():
            self._keys[key.id] = key
        self._index()

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys.values())

    def find(self, name: str) -> Key:
        """The key of an id or a name; of one name the one that is in force.

        Raises:
            UnknownKey: there is none.
        """
        named = [key for key in self._keys.values() if name in (key.id, key.name)]
        if not named:
            raise UnknownKey(f"there is no key '{name}'; `ollama-coordinator keys list` names all")
        return min(named, key=lambda key: (key.revoked_at is not None, key.name != name))

    def by_id(self, key_id: str, at: float) -> Key | None:
        """The key of an id, if it is in force."""
        key = self._keys.get(key_id)
        return None if key is None or key.has_ended(at) else key

    def by_secret(self, text: bytes, at: float) -> Key | None:
        """The key whose text this is, if it is in force; notes that it was used."""
        return self._used(sha256(text).hexdigest(), at)

    def by_public_key(self, public: str, at: float) -> Key | None:
        """The key of an `ollama` program's public key, if it is in force."""
        return self._used(f"ssh {public}", at)

    def _used(self, hashed: str, at: float) -> Key | None:
        key = self._by_hash.get(hashed)
        if key is None or key.has_ended(at):
            return None
        key.last_used = at
        if self._unwritten_since is None:
            self._unwritten_since = at
        elif at - self._unwritten_since >= USED_SECONDS:
            self.keep()
        return key

    def create(self, wanted: NewKey, *, secret: str = "") -> tuple[Key, str]:
        """Make a key; its text is given here and never again. It is written behind.

        Raises:
            WrongKey: it cannot be made so.
        """
        self._check(wanted)
        if wanted.ssh:
            if not signature.CAN_VERIFY:
                raise WrongKey(signature.MISSING)
            text, hashed = "", f"ssh {public_key_of(wanted.ssh)}"
            hint = hashed[-HINT_CHARACTERS:]
        else:
            text = secret or new_secret()
            hashed, hint = hash_of(text), text[:HINT_CHARACTERS]
        known = self._by_hash.get(hashed)
        if known is not None and known.revoked_at is None:
            raise WrongKey(f"'{known.name}' has this key already")
        key = Key(
            id=secrets.token_hex(4),
            name=wanted.name,
            hash=hashed,
            hint=hint,
            rights=tuple(dict.fromkeys(wanted.rights)),
            models=wanted.models,
            weight=wanted.weight,
            lane=wanted.lane,
            in_path=wanted.in_path,
            names_users=wanted.names_users,
            continues=wanted.continues,
            limits=wanted.limits,
            once=wanted.once,
            created_at=_now(),
            expires_at=wanted.expires_at,
        )
        self._keys[key.id] = key
        self._index()
        self.keep()
        return key, text

    def _check(self, wanted: NewKey) -> None:
        if NAME.fullmatch(wanted.name) is None or parse_address(wanted.name) is not None:
            expected = "letters, digits, spaces and .@+-_, at most 64, and no address"
            raise WrongKey(f"'{wanted.name}' cannot be the name of a key: give {expected}")
        if any(key.name == wanted.name and key.revoked_at is None for key in self._keys.values()):
            raise WrongKey(f"there is a key '{wanted.name}' already; revoke it first")
        if not wanted.rights or any(name not in INCLUDED for name in wanted.rights):
            raise WrongKey(f"rights: give one or more of {', '.join(INCLUDED)}")
        if wanted.in_path and set(wanted.rights) != {"use"}:
            text = "addresses are written down in many places"
            raise WrongKey(f"a key in a path may have the right 'use' alone: {text}")
        if wanted.once and wanted.rights != OF_TOKENS:
            raise WrongKey("once: that is for a join token, with the right 'join' alone")
        if not 0.01 <= wanted.weight <= 100:
            raise WrongKey("weight: give a number from 0.01 to 100")
        if wanted.lane not in ("", "interactive", "batch"):
            raise WrongKey("lane: give interactive or batch, or leave it out")
        if any(value < 0 for value in structs.astuple(wanted.limits)):
            raise WrongKey("limits: give numbers from 0 on; 0 is no limit")
        if wanted.expires_at is not None and wanted.expires_at.tzinfo is None:
            raise WrongKey("expires_at: give a time with its zone, such as 2030-01-31T00:00:00Z")

    def forget(self, key: Key) -> None:
        """A key was not made after all: nobody has its text. It is written behind."""
        del self._keys[key.id]
        self._index()
        self.keep()

    def revoke(self, name: str) -> Key:
        """End a key. It is written behind.

        Raises:
            UnknownKey: there is none.
        """
        key = self.find(name)
        if key.revoked_at is None:
            key.revoked_at = _now()
            self.keep()
        return key

    def adopt(self, text: str, name: str, *rights: str) -> None:
        """Have the key that a setting gives in force, in place of the one that it gave before."""
        known = self._by_hash.get(hash_of(text))
        if known is not None and known.revoked_at is None:
            return
        for key in list(self._keys.values()):
            if key.name == name:
                self.revoke(key.id)
        self.create(NewKey(name=name, rights=rights), secret=text)

    def keep(self) -> None:
        """Write all keys behind."""
        self._unwritten_since = None
        self._store.note_document(DOCUMENT, lambda: msgspec.json.encode(list(self)))

    def _index(self) -> None:
        # A key that is in force comes after a revoked one of the same text.
        keys = sorted(self._keys.values(), key=lambda key: key.revoked_at is None)
        self._by_hash = {key.hash: key for key in keys}
        self.any_made = any(not key.is_token for key in keys)


def public_key_of(text: str) -> str:
    """The base64 text of an Ed25519 public key, as `id_ed25519.pub` has it.

    Raises:
        WrongKey: it is none.
    """
    parts = text.split()
    if len(parts) >= 2 and parts[0] == "ssh-ed25519" and parts[1].startswith(SSH_ED25519):
        return parts[1]
    expected = "ssh-ed25519 AAAA…, the content of ~/.ollama/id_ed25519.pub"
    raise WrongKey(f"this is no public key of an ollama program: give {expected}")


def _now() -> datetime:
    return datetime.now(UTC)


def after(seconds: float) -> datetime:
    """The time so many seconds from now."""
    return _now() + timedelta(seconds=seconds)


def key_made_in(file: Path) -> str:
    """The key in a file of `COORDINATOR_KEY_FILE`; the file is made if there is none.

    Raises:
        ConfigError: it cannot be read or made, or has no key.
    """
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        return key_in(file)
    except OSError as exc:
        if file.exists():
            return key_in(file)
        reason = f"it cannot be made: {exc.strerror}"
        raise ConfigError("COORDINATOR_KEY_FILE", file, reason) from exc
    with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
        opened.write(f"{new_secret()}\n")
    log.info("the first key is made", extra={"file": str(file)})
    return key_in(file)


def key_in(file: Path) -> str:
    """The key in a file of `COORDINATOR_KEY_FILE`.

    Raises:
        ConfigError: it cannot be read, or has none.
    """
    try:
        text = file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        reason = getattr(exc, "strerror", None) or "it is no text"
        raise ConfigError("COORDINATOR_KEY_FILE", file, f"it cannot be read: {reason}") from exc
    if KEY_TEXT.fullmatch(text) is None:
        how = "echo oc_$(openssl rand -base64 32 | tr '+/' '-_' | tr -d =)"
        raise ConfigError("COORDINATOR_KEY_FILE", file, f"give a file with a key alone: {how}")
    return text


def token_in(text: str) -> JoinToken:
    """The join token of `COORDINATOR_JOIN_TOKEN`.

    Raises:
        ConfigError: it is none.
    """
    try:
        return JoinToken.parse(text)
    except ValueError as exc:
        raise ConfigError("COORDINATOR_JOIN_TOKEN", "a text that is none", str(exc)) from None
