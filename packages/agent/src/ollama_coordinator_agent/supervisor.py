"""Keeps an Ollama running: uses the one that is there, else starts one, and again when it dies."""

import logging
from collections.abc import Mapping

from ollama_coordinator_common.network import cause_of

from .ollama import Presence
from .pacing import AgentPace, Backoff, Reminder
from .process import Child, ServeCommand, keep_small
from .state import ChildRecord, StateFolder

log = logging.getLogger(__name__)

STABLE_SECONDS = 60.0
"""After a run of this length a server that dies is started again without a longer back-off."""

GET_OLLAMA = (
    "install it (`ollama-coordinator-agent install-ollama`, or https://ollama.com/download), or set"
    " OLLAMA_BINARY"
)


class Supervisor:
    """Starts `ollama serve` where `may_start` allows it, and ends it unless it is to be kept.

    `command` is `None` where Ollama is not installed.
    """

    def __init__(
        self,
        command: ServeCommand | None,
        state: StateFolder,
        pace: AgentPace,
        *,
        may_start: bool = True,
        keep: bool = False,
    ) -> None:
        self.child: Child | None = None
        self.environ_of_child: Mapping[str, str] | None = None
        self.trouble: str | None = None  # why a server of ours does not run
        self._command = command
        self._state = state
        self._pace = pace
        self._may_start = may_start
        self._keep = keep
        self._backoff = Backoff(pace.restart_first, pace.restart_ceiling)
        self._reminder = Reminder()
        self._absent_since: float | None = None
        self._started_at = 0.0
        self._not_before = 0.0

    def reclaim(self) -> None:
        """Take over the server of an earlier agent that was killed and could not end it."""
        record = self._state.last_run.child
        if record and (child := Child.reclaim(record.pid, record.created)):
            log.info("ollama serve of the previous run is ours again", extra={"pid": child.pid})
            self.child = child

    def observe(self, presence: Presence, now: float) -> None:
        """Note what a look at the port found at `now`; starts a server if one is due."""
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
        """Keep the output of our server within bounds; blocks while it copies the file."""
        if self.child is not None:
            keep_small(self._state.log_file)

    async def stop(self) -> None:
        """End the server, if it is ours and is not to be kept."""
        if self._keep:
            return
        if self.child and self.child.is_alive():
            log.info("stopping ollama serve", extra={"pid": self.child.pid})
            await self.child.stop(self._pace.stop)
        self._forget_child()

    async def restart(self, reason: str) -> None:
        """End our server, so that the next look starts another one; one that is not ours stays."""
        if self.child is None or not self.child.is_alive():
            log.warning("Ollama hangs and is not ours: restart it", extra={"reason": reason})
            return
        log.warning("restarting ollama serve", extra={"pid": self.child.pid, "reason": reason})
        await self.child.stop(self._pace.stop)
        self._not_before = self._absent_since = 0.0  # nobody else starts one: not a moment is lost
        self._forget_child()

    def _forget_child(self) -> None:
        self.child = self.environ_of_child = None
        self._state.remember(child=None)

    def _bury(self, now: float) -> None:
        """Notice that our server ended, and choose when the next one may start."""
        if self.child is None or self.child.is_alive():
            return
        if now - self._started_at >= STABLE_SECONDS:
            self._backoff.reset()
        delay = self._backoff.next()
        self._not_before = now + delay
        code, output = self.child.exit_code, self._state.log_file
        self.trouble = f"ollama serve ended by itself (exit code {code}); its output is in {output}"
        log.warning(
            "ollama serve ended by itself; starting it again unless another one answers",
            extra={"exit_code": code, "in_seconds": round(delay, 1), "output": str(output)},
        )
        self._forget_child()

    def _answering(self, now: float) -> None:
        self._absent_since = self.trouble = None
        self._reminder.over()
        if self.child is None:
            self._not_before = now + self._pace.adopted_start_after

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
        elif now >= max(self._not_before, self._absent_since + self._pace.start_after):
            self._start(self._command, now)

    def _start(self, command: ServeCommand, now: float) -> None:
        self._started_at = now
        try:
            self.child = command.start()
        except OSError as exc:
            self._not_before = now + self._backoff.next()
            self.trouble = f"ollama serve cannot be started: {cause_of(exc)}"
            self._say(now, f"{self.trouble}; {GET_OLLAMA}")
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
