"""What the agent keeps on its disk: the id of this machine, and what the last run left.

`machine-id` is shared by all agents of one machine; `agent-PORT.json` and `agent-PORT.lock` belong
to the agent of one Ollama. If the folder cannot be read or written, that is logged once and the
agent runs all the same: the coordinator then knows the machine by its name and port.

In the user's state folder they have a folder of their own for each host: home folders may be on a
network, and what is shared there is no sign of a cloned disk.
"""

import hashlib
import logging
import os
import re
import secrets
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock, Timeout
from msgspec import Struct

from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.network import cause_of

log = logging.getLogger(__name__)

MACHINE_ID = "machine-id"
"""The name of the file with the machine's id."""

PROOF = "machine-secret"
"""The name of the file with what proves to the coordinator that this machine speaks."""

_SECRET = re.compile(r"[A-Za-z0-9_-]{43}")

_MACHINE_ID = re.compile(r"[A-Za-z0-9-]{8,128}")


_HOST_IDS = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
"""Where Linux keeps a random id of the host (machine-id(5)); it must not be shown, hence hashed."""


def host_id() -> str:
    """A short id that this host keeps when it is renamed: of its system, or of its network card."""
    own = hex(uuid.getnode())
    for file in _HOST_IDS:
        with suppress(OSError):
            own = file.read_text("utf-8", errors="replace").strip() or own
            break
    return hashlib.sha256(f"ollama-coordinator-agent {own}".encode()).hexdigest()[:12]


def host_folder(base: Path, name: str, own_id: str, *, take_over: bool) -> Path:
    """The folder of this host in `base`, which other hosts may share.

    If there is none yet, the folder that it had under another name or with an earlier version is
    taken over, unless an agent uses that now. Without `take_over` nothing is changed.
    """
    own = base / f"{re.sub(r'[^A-Za-z0-9.-]', '_', name)[:64]}-{own_id}"
    if own.is_dir():
        return own
    candidates = [*sorted(base.glob(f"*-{own_id}")), base]
    known = [one for one in candidates if (one / MACHINE_ID).is_file() and not _is_in_use(one)]
    if not known or not take_over:
        return known[0] if known else own
    try:
        if known[0] != base:
            return known[0].rename(own)
        own.mkdir(parents=True)
        for file in sorted(base.iterdir(), key=lambda file: file.name != MACHINE_ID):
            if file.is_file():
                file.rename(own / file.name)
    except OSError as exc:
        extra = {"folder": str(known[0]), "reason": cause_of(exc)}
        log.warning("what this machine kept before could not be taken over", extra=extra)
    return own


def _is_in_use(folder: Path) -> bool:
    for file in folder.glob("agent-*.lock"):
        try:
            with FileLock(file, blocking=False):
                pass
        except Timeout:
            return True
        except (OSError, NotImplementedError):
            continue
    return False


class AlreadyRunning(OllamaCoordinatorError):
    """Another agent on this machine looks after the same Ollama."""

    def __init__(self, file: Path) -> None:
        super().__init__(
            "another agent on this machine already looks after this Ollama"
            f" (it holds {file}); stop it, or set OLLAMA_PORT for a second Ollama"
        )


class ChildRecord(Struct, frozen=True):
    """An `ollama serve` that the agent started; pid and start time together identify it."""

    pid: int
    created: float


class LastRun(Struct, frozen=True):
    """What the agent of one Ollama knows of its last run; `linked`: it was reached by a link.

    `slept`: the machine was seen to sleep.
    `coordinator` is the id of the one that it found, which was at `coordinator_url` last.
    `handshakes_with` is the URL of one whose connections to the relay begin with a handshake.
    """

    agent_id: str | None = None
    instance_id: str | None = None
    relay_port: int | None = None
    models_port: int | None = None
    linked: bool = False
    slept: bool = False
    coordinator: str | None = None
    coordinator_url: str | None = None
    handshakes_with: str | None = None
    child: ChildRecord | None = None


class StateFolder:
    """The agent's files in `folder`, for the Ollama on one port."""

    def __init__(self, folder: Path, ollama_port: int) -> None:
        self.folder = folder
        self.log_file = folder / f"ollama-{ollama_port}.log"
        self._lock_file = folder / f"agent-{ollama_port}.lock"
        self._machine_id_file = folder / MACHINE_ID
        self._last_run_file = folder / f"agent-{ollama_port}.json"
        self.last_run = self._recall()

    @contextmanager
    def only_agent(self) -> Iterator[None]:
        """Be the only agent of this Ollama while the block runs.

        The system frees the lock when the process ends, however it ends. Where the folder cannot
        lock, that is logged and the block runs all the same.

        Raises:
            AlreadyRunning: another process has the lock.
        """
        lock = FileLock(self._lock_file)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
        except Timeout as exc:
            raise AlreadyRunning(self._lock_file) from exc
        except (OSError, NotImplementedError) as exc:
            log.warning("a second agent would go unnoticed", extra={"reason": cause_of(exc)})
        try:
            yield
        finally:
            lock.release()

    def machine_id(self, *, create: bool = True) -> str | None:
        """The machine's random id, made when there is none yet; `None` if it cannot be kept."""
        try:
            text = self._machine_id_file.read_text("utf-8", errors="replace").strip()
        except FileNotFoundError:
            return self._make_machine_id(replace=False) if create else None
        except OSError as exc:
            self._log_unkept_id(exc)
            return None
        if _MACHINE_ID.fullmatch(text):
            return text
        log.warning(
            "the machine id is damaged and gets replaced, so the coordinator may list this machine"
            " twice: remove the offline one there",
            extra={"file": str(self._machine_id_file)},
        )
        return self._make_machine_id(replace=True) if create else None

    def secret(self, *, create: bool = True) -> str:
        """What proves that this machine speaks, made at the first start; empty if it is not kept.

        One that would be lost with this process would make another machine of it at each start.
        """
        file = self.folder / PROOF
        try:
            if not file.exists():
                if not create:
                    return ""
                self._publish(file, secrets.token_urlsafe(32), replace=False)
            text = file.read_text("utf-8", errors="replace").strip()
            if _SECRET.fullmatch(text) is None:
                log.warning("the machine's secret is damaged: remove it", extra={"file": str(file)})
                return ""
        except OSError as exc:
            facts = {"file": str(file), "reason": cause_of(exc)}
            log.warning("no secret can be kept: this machine is known by its address", extra=facts)
            return ""
        return text

    @property
    def unkept(self) -> str:
        """Why nothing can be kept here; empty where it can."""
        folder = next(one for one in (self.folder, *self.folder.parents) if one.exists())
        if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
            return ""
        return f"{folder} is no folder that this user can write to"

    def remember(self, **changes: Any) -> None:
        """Keep some facts for the next run; a disk that refuses them does no other harm."""
        changed = msgspec.structs.replace(self.last_run, **changes)
        if changed == self.last_run:
            return
        self.last_run = changed
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self._last_run_file, msgspec.json.encode(changed))
        except OSError as exc:
            log.debug("not remembered", extra={"reason": cause_of(exc)})

    def _recall(self) -> LastRun:
        try:
            return msgspec.json.decode(self._last_run_file.read_bytes(), type=LastRun)
        except FileNotFoundError:
            return LastRun()
        except (OSError, msgspec.DecodeError) as exc:
            log.warning(
                "what the last run remembered cannot be read; starting afresh",
                extra={"file": str(self._last_run_file), "reason": cause_of(exc)},
            )
            return LastRun()

    def _make_machine_id(self, *, replace: bool) -> str | None:
        try:
            self._publish(self._machine_id_file, uuid.uuid4().hex, replace=replace)
            return self._machine_id_file.read_text("utf-8").strip()
        except OSError as exc:
            self._log_unkept_id(exc)
            return None

    def _publish(self, file: Path, fresh: str, *, replace: bool) -> None:
        """Write a text whole, for its owner; of two that start at once, the first one's stays."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f"{file.name}.{os.getpid()}"
        draft.touch(0o600)
        draft.write_text(fresh + "\n", "utf-8")
        try:
            if replace:
                draft.replace(file)
            else:
                os.link(draft, file)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            draft.replace(file)
        finally:
            draft.unlink(missing_ok=True)

    def _log_unkept_id(self, exc: OSError) -> None:
        log.warning(
            "the machine id cannot be kept, so the coordinator knows this machine by its name;"
            " make the folder readable and writable, or set AGENT_STATE_DIR",
            extra={"file": str(self._machine_id_file), "reason": cause_of(exc)},
        )


def _write(file: Path, content: bytes) -> None:
    """Replace a file whole, so that a crash leaves the old one or the new one."""
    draft = file.with_suffix(f".{os.getpid()}")
    draft.write_bytes(content)
    draft.replace(file)
