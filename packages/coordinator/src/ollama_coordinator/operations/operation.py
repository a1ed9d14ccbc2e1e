"""One operation: its parts on the agents, and the progress that its clients follow."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from datetime import datetime

import msgspec
from msgspec import structs

from ollama_coordinator.aio import Interrupt
from ollama_coordinator.registry import AgentState
from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.protocol import AgentOperation
from ollama_coordinator_common.types import AgentId

from .progress import Progress, ProgressLine
from .targets import Placement
from .types import AgentCommand, OperationKind, OperationState, OperationView, Refused, TargetView

NAMED = 5
"""Agents that a line of progress names: terminals show one line, and the page shows all."""


class ProgressFeed:
    """An operation's progress lines, for any number of clients that each read at their own pace.

    Only the newest line about each layer and step is kept. A client that is slow or comes late gets
    the present state, so nothing piles up.
    """

    def __init__(self) -> None:
        self._lines: dict[str, tuple[int, bytes]] = {}
        self._version = 0
        self._changed = asyncio.Event()
        self.is_over = False

    def publish(self, lines: Iterable[ProgressLine]) -> None:
        """Replace what is known about the same layer or step."""
        for line in lines:
            about = str(line.get("digest") or line.get("status") or "error")
            self._lines.pop(about, None)
            self._version += 1
            self._lines[about] = (self._version, msgspec.json.encode(line) + b"\n")
        self._wake()

    def end(self) -> None:
        """No more lines follow."""
        self.is_over = True
        self._wake()

    @property
    def last(self) -> bytes:
        """The newest line; empty before there is one."""
        return next(reversed(self._lines.values()))[1] if self._lines else b""

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def began(self) -> None:
        """Wait for the first line, or the end."""
        while not self._lines and not self.is_over:
            await self._changed.wait()

    async def over(self) -> None:
        """Wait for the end."""
        while not self.is_over:
            await self._changed.wait()

    async def follow(self) -> AsyncIterator[bytes]:
        """The newest lines, then each change, until the end."""
        seen = 0
        while True:
            changed, is_over = self._changed, self.is_over
            news = self._since(seen)
            seen = self._version
            if news:
                yield news
            if is_over:
                return
            if changed is self._changed:
                await changed.wait()

    def _since(self, version: int) -> bytes:
        newer: list[bytes] = []
        for at, line in reversed(self._lines.values()):
            if at <= version:
                break
            newer.append(line)
        return b"".join(reversed(newer))


class Target:
    """One agent's part of an operation. Times are monotonic seconds.

    `heard_at`: its last progress; `probed_at`: its last probe for silence; `away_since`: when the
    agent went away, minus infinity if it was away from the start, `None` while it is there.
    `failures` counts attempts that broke off since the last progress. `replaced` says which newer
    command makes this part void. `lost_at`: when its agent, which fetched the model itself, was
    lost.
    """

    def __init__(self, agent: AgentState) -> None:
        self.agent_id = agent.id
        self.agent_name = agent.name
        self.state = OperationState.WAITING
        self.status = ""
        self.error: OllamaCoordinatorError | None = None
        self.replaced: OllamaCoordinatorError | None = None
        self.away_since: float | None = None
        self.heard_at = float("-inf")
        self.probed_at = float("-inf")
        self.failures = 0
        self.lost_at = float("-inf")
        self.interrupt: Interrupt | None = None

    def replace(self, reason: OllamaCoordinatorError) -> None:
        """A newer command for the model makes this part void: it ends, and is not deferred."""
        self.replaced = reason
        if self.interrupt is not None:
            self.interrupt.fire(reason)


class Operation:
    """A command for several agents, with its followers, its progress and its end.

    `followers` counts the clients that wait for it. Without any, it continues if `detached`, and is
    cancelled otherwise. `spare` are agents that replace those that fail. `seed` is the agent that
    pulls from the internet where others get the model from it, but for those `on_their_own`;
    `content` is the digest of what it pulled. `takers` are those that others could give the model
    when it was planned: they wait for that where their agents have just started.
    """

    def __init__(
        self,
        operation_id: str,
        command: AgentCommand,
        placement: Placement,
        started_at: datetime,
    ) -> None:
        self.id = operation_id
        self.command = command
        self.placement = placement
        self.started_at = started_at
        self.ended_at: datetime | None = None
        self.detached = False
        self.followers = 0
        self.targets: dict[AgentId, Target] = {}
        self.spare: list[AgentState] = []
        self.seed: AgentId | None = None
        self.on_their_own: set[AgentId] = set()
        self.takers: set[AgentId] = set()
        self.content = ""
        self.progress = Progress()
        self.feed = ProgressFeed()
        self.error: OllamaCoordinatorError | None = None
        self.cancelled = False
        self.task: asyncio.Task[None] | None = None

    @property
    def kind(self) -> OperationKind:
        """What is done to the model."""
        return self.command.kind

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.feed.is_over

    @property
    def is_refused(self) -> bool:
        """Whether it failed on an agent and worked on none, and nobody cancelled it."""
        states = [target.state for target in self.targets.values()]
        failed = OperationState.FAILED in states and OperationState.DONE not in states
        return failed and not self.cancelled

    @property
    def state(self) -> OperationState:
        """Its state as a whole."""
        if not self.is_over:
            return OperationState.RUNNING
        if self.cancelled:
            return OperationState.CANCELLED
        return OperationState.FAILED if self.error is not None else OperationState.DONE

    def add(self, agents: Iterable[AgentState]) -> list[Target]:
        """Add agents; the targets of those that are new."""
        new = [Target(agent) for agent in agents if agent.id not in self.targets]
        self.targets.update((target.agent_id, target) for target in new)
        return new

    def leave_out(self, left_out: Iterable[tuple[AgentState, str]]) -> None:
        """Agents that get nothing, and why: it is said at once."""
        for agent, reason in left_out:
            for target in self.add([agent]):
                target.state, target.error = OperationState.LEFT_OUT, Refused(507, reason)
                self.feed.publish([{"status": f"not on {agent.name}: {reason}"}])

    # ── what happens to its targets ───────────────────────────────────────────────────────────

    def begins(self, target: Target) -> None:
        """A target starts an attempt."""
        target.state, target.status, target.error = OperationState.RUNNING, "", None
        target.away_since = None
        self.progress.begin(target.agent_id)

    def reports(self, target: Target, line: ProgressLine) -> None:
        """A target sends a line of progress."""
        status = line.get("status")
        target.status = status if isinstance(status, str) else target.status
        self.feed.publish(self.progress.feed(target.agent_id, line))

    def is_away(self, target: Target, reason: OllamaCoordinatorError | None, now: float) -> None:
        """A target's agent does not answer; the operation waits for it."""
        target.state = OperationState.WAITING
        target.error = reason or target.error
        if target.away_since is None:
            target.away_since = now

    def succeeds(self, target: Target) -> None:
        """A target is done."""
        target.state, target.error = OperationState.DONE, None
        self.feed.publish(self.progress.finish(target.agent_id))

    def gives_up(
        self, target: Target, state: OperationState, reason: OllamaCoordinatorError | None = None
    ) -> None:
        """The operation waits for a target no longer."""
        target.state = state
        target.error = reason or target.error
        self.feed.publish(self.progress.leave(target.agent_id))

    # ── the end ───────────────────────────────────────────────────────────────────────────────

    def end(self, at: datetime) -> None:
        """Publish `success` if any target is done and nothing ended it, else keep the error."""
        if self.is_over:
            return
        self.ended_at = at
        states = [target.state for target in self.targets.values()]
        if self.error is None and (OperationState.DONE in states or not states):
            lacking = self._lacking()
            self.feed.publish([{"status": text} for text in (lacking, "success") if text])
        elif self.cancelled:
            self.error = self.error or Refused(499, "the operation was cancelled")
        else:
            self.error = self.error or self._failure()
        self.feed.end()

    def forget_body(self) -> None:
        """Drop its command's body, perhaps megabytes; the rest is remembered."""
        self.command = structs.replace(self.command, body="")

    def _lacking(self) -> str:
        """Which agents did not do their part, and why; empty if all did."""
        lacking = [
            f"{target.agent_name}: {target.error or target.state.value}"
            for target in self.targets.values()
            if target.state is not OperationState.DONE
        ]
        more = f"; and {len(lacking) - NAMED} more" if len(lacking) > NAMED else ""
        return f"not on {'; '.join(lacking[:NAMED])}{more}" if lacking else ""

    def _failure(self) -> OllamaCoordinatorError:
        """What an Ollama answered, if any did; else that an agent was not reached."""
        errors = [target.error for target in self.targets.values() if target.error is not None]
        said = next((error for error in errors if isinstance(error, Refused)), None)
        return said or next(iter(errors), Refused(503, "no agent could be reached"))

    def view(self) -> OperationView:
        """As the API shows it."""
        return OperationView(
            id=self.id,
            kind=self.kind,
            model=self.command.name,
            state=self.state,
            started_at=self.started_at,
            ended_at=self.ended_at,
            placement=self.placement.text,
            detached=self.detached,
            targets=[self._target_view(target) for target in self.targets.values()],
            error=None if self.error is None else str(self.error),
        )

    def view_for(self, target: Target) -> AgentOperation:
        """One agent's part, as that agent's own view shows it."""
        view = self._target_view(target)
        return AgentOperation(
            id=self.id,
            kind=self.kind.value,
            model=self.command.name,
            state=view.state.value,
            status=view.status,
            completed=view.completed,
            total=view.total,
            error=view.error,
        )

    def _target_view(self, target: Target) -> TargetView:
        completed, total = self.progress.of(target.agent_id)
        return TargetView(
            agent_id=target.agent_id,
            agent=target.agent_name,
            state=target.state,
            status=target.status,
            completed=completed,
            total=total,
            error=None if target.error is None else str(target.error),
        )
