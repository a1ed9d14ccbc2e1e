"""Keeps an Ollama running on this machine: adopts what is there, else starts one and watches it."""

import logging
from collections.abc import Mapping

from msgspec import Struct

from .ollama import Presence
from .pacing import Backoff, Reminder
from .serve import Child, ServeCommand
from .server_log import keep_small
from .state import ChildRecord, State

log = logging.getLogger(__name__)

STABLE_SECONDS = 60.0
"""A server of ours that ran for this long starts its back-off afresh when it dies."""

GET_OLLAMA = "install it from https://ollama.com/download, or set OLLAMA_BINARY"


class KeeperPace(Struct, frozen=True, kw_only=True):
    """How long nobody may answer before a server is started, in seconds.

    `adopted_patience` is for a server that somebody else runs and that has disappeared: its own
    supervisor (systemd, the desktop app) restarts it within seconds and needs the port for it.
    """

    patience: float = 2.0
    adopted_patience: float = 30.0
    restart_first: float = 1.0
    restart_ceiling: float = 60.0


class Keeper:
    """Decides, look by look, whether `ollama serve` is to be started."""

    def __init__(
        self,
        command: ServeCommand | None,
        state: State,
        *,
        may_start: bool = True,
        pace: KeeperPace,
    ) -> None:
        self.child: Child | None = None
        self.environ_of_child: Mapping[str, str] | None = None
        self._command = command
        self._state = state
        self._may_start = may_start
        self._pace = pace
        self._backoff = Backoff(pace.restart_first, pace.restart_ceiling)
        self._reminder = Reminder()
        self._absent_since: float | None = None
        self._started_at = 0.0
        self._not_before = 0.0

    def reclaim(self) -> None:
        """Take back the server of an earlier agent that was killed before it could end it."""
        record = self._state.memory.child
        if record and (child := Child.reclaim(record.pid, record.created)):
            log.info("ollama serve of the previous run is ours again", extra={"pid": child.pid})
            self.child = child

    def observe(self, presence: Presence, now: float) -> None:
        """Take in what a look at the port found; starts a server if one is due."""
        self._bury(now)
        if presence is Presence.ANSWERING:
            self._answering(now)
        elif presence is Presence.ABSENT:
            self._absent(now)
        else:
            self._absent_since = None
            if presence is Presence.FOREIGN:
                self._say(now, "another program has Ollama's port; set OLLAMA_PORT to Ollama's")

    def trim_log(self) -> None:
        """Keep the output of our server within bounds; it may block."""
        if self.child is not None:
            keep_small(self._state.log_file)

    async def stop(self, grace_seconds: float) -> None:
        """End the server, if it is ours."""
        if self.child and self.child.is_alive():
            log.info("stopping ollama serve", extra={"pid": self.child.pid})
            await self.child.stop(grace_seconds)
        self._forget_child()

    def _forget_child(self) -> None:
        self.child = self.environ_of_child = None
        self._state.remember(child=None)

    def _bury(self, now: float) -> None:
        """Notice the death of our server and choose when the next one may start."""
        if self.child is None or self.child.is_alive():
            return
        if now - self._started_at >= STABLE_SECONDS:
            self._backoff.reset()
        delay = self._backoff.next()
        self._not_before = now + delay
        log.warning(
            "ollama serve ended by itself; starting it again unless another one answers",
            extra={
                "exit_code": self.child.exit_code,
                "in_seconds": round(delay, 1),
                "output": str(self._state.log_file),
            },
        )
        self._forget_child()

    def _answering(self, now: float) -> None:
        self._absent_since = None
        self._reminder.over()
        if self.child is None:
            self._not_before = now + self._pace.adopted_patience

    def _absent(self, now: float) -> None:
        if self.child is not None:
            return  # it is starting
        if self._absent_since is None:
            self._absent_since = now
        if not self._may_start:
            self._say(
                now, "no Ollama answers and AGENT_MANAGE_OLLAMA is false; start `ollama serve`"
            )
        elif self._command is None:
            self._say(
                now,
                f"no Ollama answers, and the ollama program is not here; start it, {GET_OLLAMA}",
            )
        elif now >= max(self._not_before, self._absent_since + self._pace.patience):
            self._start(self._command, now)

    def _start(self, command: ServeCommand, now: float) -> None:
        self._started_at = now
        try:
            self.child = command.start()
        except OSError as exc:
            self._not_before = now + self._backoff.next()
            self._say(now, f"ollama serve cannot be started: {exc}; {GET_OLLAMA}")
            return
        self.environ_of_child = command.environ
        self._state.remember(child=ChildRecord(self.child.pid, self.child.created))
        log.info(
            "started ollama serve",
            extra={"pid": self.child.pid, "binary": str(command.binary)},
        )

    def _say(self, now: float, text: str) -> None:
        if self._reminder.due(text, now):
            log.warning(text)
