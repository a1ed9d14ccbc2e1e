"""One operation under way: its parts on the agents, and what it tells to those who wait for it."""

from collections.abc import Iterable
from datetime import datetime

from msgspec import structs

from ollama_coordinator.aio import Interrupt
from ollama_coordinator.registry import AgentState
from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.protocol import AgentOperation
from ollama_coordinator_common.types import AgentId

from .feed import Feed
from .placement import Placement
from .progress import Line, Progress
from .types import Deed, Kind, OperationView, Refused, State, TargetView


class Target:
    """One agent's part. `away_since` is when it was last seen to be away, monotonic."""

    def __init__(self, agent: AgentState, deed: Deed) -> None:
        self.agent_id = agent.id
        self.agent_name = agent.name
        self.deed = deed
        self.state = State.WAITING
        self.status = ""
        self.error: OllamaCoordinatorError | None = None
        self.away_since: float | None = None
        self.heard_at = float("-inf")
        self.doubted_at = float("-inf")
        self.failures = 0
        self.interrupt: Interrupt | None = None


class Operation:
    """What was asked, by whom it is waited for, and how it ended.

    `detached`: it goes on when nobody waits for it any more.
    """

    def __init__(
        self,
        operation_id: str,
        deed: Deed,
        placement: Placement,
        started_at: datetime,
        *,
        detached: bool,
    ) -> None:
        self.id = operation_id
        self.deed = deed
        self.placement = placement
        self.started_at = started_at
        self.ended_at: datetime | None = None
        self.detached = detached
        self.followers = 0
        self.targets: dict[AgentId, Target] = {}
        self.spare: list[AgentState] = []
        self.progress = Progress()
        self.feed = Feed()
        self.error: OllamaCoordinatorError | None = None
        self.cancelled = False

    @property
    def kind(self) -> Kind:
        """What is done."""
        return self.deed.kind

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.feed.is_over

    @property
    def state(self) -> State:
        """Where it stands as a whole."""
        if not self.is_over:
            return State.RUNNING
        if self.cancelled:
            return State.CANCELLED
        return State.FAILED if self.error is not None else State.DONE

    def add(self, agents: Iterable[AgentState], deed: Deed | None = None) -> list[Target]:
        """Take more agents in; those that are new."""
        new = [Target(agent, deed or self.deed) for agent in agents if agent.id not in self.targets]
        self.targets.update((target.agent_id, target) for target in new)
        return new

    # ── what its targets meet ─────────────────────────────────────────────────────────────────

    def begins(self, target: Target) -> None:
        """A target starts, perhaps again."""
        target.state, target.status, target.error = State.RUNNING, "", None
        target.away_since = None
        self.progress.begin(target.agent_id)

    def hears(self, target: Target, line: Line) -> None:
        """A line of progress from a target."""
        status = line.get("status")
        target.status = status if isinstance(status, str) else target.status
        self.feed.tell(self.progress.feed(target.agent_id, line))

    def is_away(self, target: Target, reason: OllamaCoordinatorError | None, now: float) -> None:
        """A target's agent does not answer; it may come back."""
        target.state = State.WAITING
        target.error = reason or target.error
        if target.away_since is None:
            target.away_since = now

    def succeeds(self, target: Target) -> None:
        """A target is done."""
        target.state, target.error = State.DONE, None
        self.feed.tell(self.progress.finish(target.agent_id))

    def gives_up(
        self, target: Target, state: State, reason: OllamaCoordinatorError | None = None
    ) -> None:
        """A target is not waited for any more."""
        target.state = state
        target.error = reason or target.error
        self.feed.tell(self.progress.leave(target.agent_id))

    # ── the end ───────────────────────────────────────────────────────────────────────────────

    def end(self, at: datetime) -> None:
        """Every target is over: one `success`, or what went wrong."""
        if self.is_over:
            return
        self.ended_at = at
        states = [target.state for target in self.targets.values()]
        if State.DONE in states:
            self.feed.tell([{"status": "success"}])
        elif self.cancelled:
            self.error = self.error or Refused(499, "the operation was cancelled")
        else:
            self.error = self.error or self._failure()
        self.feed.end()

    def forget_bodies(self) -> None:
        """An operation is remembered; what was sent for it, perhaps megabytes, is not."""
        self.deed = structs.replace(self.deed, body="")
        for target in self.targets.values():
            target.deed = structs.replace(target.deed, body="")

    def _failure(self) -> OllamaCoordinatorError:
        """What an Ollama said, rather than that others did not answer."""
        errors = [target.error for target in self.targets.values() if target.error is not None]
        said = next((error for error in errors if isinstance(error, Refused)), None)
        return said or next(iter(errors), Refused(503, "no agent could be reached"))

    def view(self) -> OperationView:
        """As the API shows it."""
        return OperationView(
            id=self.id,
            kind=self.kind,
            model=self.deed.name,
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
        completed, total = self.progress.of(target.agent_id)
        return AgentOperation(
            id=self.id,
            kind=self.kind.value,
            model=self.deed.name,
            state=target.state.value,
            status=target.status,
            completed=completed,
            total=total,
            error=None if target.error is None else str(target.error),
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
