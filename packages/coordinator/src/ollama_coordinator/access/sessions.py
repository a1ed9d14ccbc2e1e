"""Proofs of who a caller is that are no keys: the dashboard's sessions, and the secret file.

A session is begun with a key and ends with it. The secret file is beside the database, readable by
its owner alone: who can read it is on this machine and may do everything.
"""

import contextlib
import hmac
import logging
import secrets
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from msgspec import Struct

from ollama_coordinator.db import Store, write_for_owner

from .keys import Key, KeyRing, hash_of, new_secret

log = logging.getLogger(__name__)

COOKIE = "ollama_coordinator_session"

SESSION_SECONDS = 30 * 86_400
"""A browser that was not used for a month logs in again."""

SESSIONS_OF_A_KEY = 50
"""The oldest one ends for one more: browsers that delete their cookies leave sessions behind."""

DOCUMENT = "sessions"
"""Under which name the sessions are in the database: a JSON object of hashes and sessions."""


class Session(Struct):
    """One browser's; `begun_at` and `used_at` are in Unix seconds."""

    key_id: str
    begun_at: float
    used_at: float


class Sessions:
    """The dashboard's sessions, in memory and in the database; a cookie is kept as its hash."""

    def __init__(self, store: Store, keys: KeyRing) -> None:
        self._store = store
        self._keys = keys
        self._sessions: dict[str, Session] = {}

    async def restore(self) -> None:
        """Take the sessions over from the database; unreadable ones have ended.

        Raises:
            DatabaseError: it cannot be read.
        """
        body = await self._store.document(DOCUMENT)
        with contextlib.suppress(msgspec.DecodeError):
            self._sessions = msgspec.json.decode(body or b"{}", type=dict[str, Session])

    def begin(self, key: Key, at: float) -> str:
        """A new session of a key; its cookie's value."""
        own = [one for one in self._sessions.items() if one[1].key_id == key.id]
        for hashed, _ in sorted(own, key=lambda one: one[1].used_at)[: -SESSIONS_OF_A_KEY + 1]:
            del self._sessions[hashed]
        value = secrets.token_urlsafe(32)
        self._sessions[hash_of(value)] = Session(key.id, at, at)
        self._keep()
        return value

    def find(self, value: str, at: float) -> Key | None:
        """The key of a session that is in force."""
        hashed = hash_of(value)
        session = self._sessions.get(hashed)
        if session is None:
            return None
        key = self._keys.by_id(session.key_id, at)
        if key is None or at - session.used_at > SESSION_SECONDS:
            del self._sessions[hashed]
            self._keep()
            return None
        session.used_at = at
        return key

    def end(self, value: str) -> None:
        """End a session; no error if there is none."""
        if self._sessions.pop(hash_of(value), None) is not None:
            self._keep()

    def end_all(self, key: Key) -> int:
        """End all sessions of a key; how many there were."""
        before = len(self._sessions)
        self._sessions = {h: one for h, one in self._sessions.items() if one.key_id != key.id}
        if len(self._sessions) != before:
            self._keep()
        return before - len(self._sessions)

    def of(self, key: Key) -> int:
        """How many sessions a key has."""
        return sum(one.key_id == key.id for one in self._sessions.values())

    def _keep(self) -> None:
        self._store.note_document(DOCUMENT, lambda: msgspec.json.encode(self._sessions))


def cookie_of(header: bytes, name: str = COOKIE) -> str | None:
    """The value of a cookie in a `Cookie` header."""
    for part in header.decode("latin-1").split(";"):
        key, _, value = part.strip().partition("=")
        if key == name:
            return value.strip('"')
    return None


class SecretFile:
    """The proof of being on this machine; `None` in place of a path: there is none."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._secret = ""

    def write(self) -> None:
        """Make a new secret, for its owner alone to read; where that fails, none is in force."""
        if self._path is None:
            return
        secret = new_secret()
        try:
            write_for_owner(self._path, secret.encode())
        except OSError as exc:
            extra = {"file": str(self._path), "reason": str(exc)}
            log.warning("the command line cannot prove that it is on this machine", extra=extra)
        else:
            self._secret = secret

    def is_secret(self, text: bytes) -> bool:
        """Whether a text is the secret."""
        return bool(self._secret) and hmac.compare_digest(text, self._secret.encode())


def secret_path(database: Path | None) -> Path | None:
    """Where the secret of the coordinator with this database is; `None` for one in memory."""
    return None if database is None else database.with_name(f"{database.name}.secret")


def utc(seconds: float) -> datetime | None:
    """A time of Unix seconds; `None` for 0, which is never, and for what no calendar has."""
    with contextlib.suppress(ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(seconds, UTC) if seconds else None
    return None
