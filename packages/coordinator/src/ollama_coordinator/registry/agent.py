"""One registered agent: what it said of itself, what was met on the way to it, what follows."""

from dataclasses import dataclass, field
from datetime import datetime

from msgspec import UNSET, Struct

from ollama_coordinator_common.network import netloc
from ollama_coordinator_common.protocol import AgentView, HealthReport, RegisterRequest
from ollama_coordinator_common.types import AgentId, AgentStatus

from .inventory import Inventory

LONGEST_COOLDOWN_SECONDS = 30.0


class AgentSettings(Struct, frozen=True):
    """What an operator sets for one agent; kept across restarts."""

    display_name: str | None = None
    labels: list[str] = []
    notes: str = ""
    draining: bool = False
    preference: float = 1.0


class Cooldown(Struct, frozen=True):
    """An agent, or one model of it, is left alone until a probe or a request succeeds.

    `since` is when it last failed, `until` the earliest time of the next try (monotonic seconds).
    """

    failures: int
    since: float
    until: float
    reason: str


def cooldown_after(
    previous: Cooldown | None, reason: str, now: float, *, first: float, began: float | None = None
) -> Cooldown:
    """The next cooldown: `first` seconds at the first failure, then 1, 2, 4 … 30 s.

    What `began` before the last failure failed with it: a crash is one failure, however many
    requests it ends.
    """
    if previous is not None and began is not None and began <= previous.since:
        return previous
    failures = previous.failures + 1 if previous else 1
    # A probe fails thousands of times in a night; a float has room for 1023 doublings.
    doubled = 2.0 ** min(failures - 2, 10)
    wait = first if failures == 1 else min(doubled, LONGEST_COOLDOWN_SECONDS)
    return Cooldown(failures=failures, since=now, until=now + wait, reason=reason)


@dataclass(slots=True)
class AgentState:
    """One agent. `heard_at` is its last sign of life on the monotonic clock of this process.

    `cooldown` keeps its count of failures after the agent is back in rotation (`resting` false),
    until a request succeeds; so an agent whose probes pass while its requests fail is tried less
    and less often. `replaced` are the instance ids of processes that later ones have replaced.
    """

    id: AgentId
    registration: RegisterRequest
    registered_at: datetime
    heard_at: float
    left: bool = False
    settings: AgentSettings = field(default_factory=AgentSettings)
    report: HealthReport | None = None
    inventory: Inventory = field(default_factory=Inventory)
    cooldown: Cooldown | None = None
    resting: bool = False
    replaced: tuple[str, ...] = ()
    model_cooldowns: dict[str, Cooldown] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What people call it."""
        return self.settings.display_name or self.registration.machine_name

    @property
    def url(self) -> str:
        """Where its Ollama, or the relay before it, is reached; without a trailing slash."""
        host = self.registration.ip_address
        port = self.registration.relay_port or self.registration.ollama_port
        return f"http://{netloc(host, port)}"

    @property
    def ollama_running(self) -> bool:
        """Whether the agent says that its Ollama answers; one that says nothing is believed to."""
        return self.report is None or self.report.ollama_running

    @property
    def is_bare(self) -> bool:
        """Whether it is an Ollama that no agent speaks for: it lives as long as it answers."""
        return self.report is None and self.registration.instance_id is None and not self.left

    @property
    def brings_inventory(self) -> bool:
        """Whether its heartbeats list the models; else its Ollama is asked."""
        return self.report is not None and self.report.tags is not UNSET

    def status(self, now: float, timeout: float) -> AgentStatus:
        """Derived: offline after `timeout` seconds of silence or a goodbye."""
        if self.left or now - self.heard_at > timeout:
            return AgentStatus.OFFLINE
        return AgentStatus.DRAINING if self.settings.draining else AgentStatus.ONLINE

    def view(
        self, status: AgentStatus, *, last_seen: datetime, in_flight: int, conflict: str | None
    ) -> AgentView:
        """The agent as the API shows it; `last_seen` is `heard_at` in UTC."""
        registration, report, inventory = self.registration, self.report, self.inventory
        return AgentView(
            id=self.id,
            machine_name=registration.machine_name,
            ip_address=registration.ip_address,
            ollama_version=registration.ollama_version,
            ollama_port=registration.ollama_port,
            status=status,
            registered_at=self.registered_at,
            last_seen=last_seen,
            in_flight=in_flight,
            url=self.url,
            display_name=self.settings.display_name,
            labels=self.settings.labels,
            notes=self.settings.notes,
            agent_version=registration.agent_version,
            platform=registration.platform,
            ollama_running=self.ollama_running,
            out_of_rotation=self.out_of_rotation(),
            conflict=conflict,
            cpu_usage=report.cpu_usage if report else None,
            memory_usage=report.memory_usage if report else None,
            memory_total_bytes=report.memory_total_bytes if report else None,
            disk_free_bytes=report.disk_free_bytes if report else None,
            active_requests=report.active_requests if report else None,
            gpus=report.gpus if report else [],
            runner=report.runner if report else None,
            models=sorted(row.model.name for row in inventory.available.values()),
            loaded_models=sorted(row.model.name for row in inventory.loaded.values()),
        )

    def out_of_rotation(self) -> str | None:
        """Why a living agent gets no request just now; `None` when it may."""
        if not self.ollama_running:
            return "its Ollama does not answer"
        if self.resting and self.cooldown is not None:
            return self.cooldown.reason
        return None
