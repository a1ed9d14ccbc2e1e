"""One registered agent: its registration, its reports, its failures, and what follows from them."""

from dataclasses import dataclass, field
from datetime import datetime
from math import inf
from urllib.parse import urlsplit

from msgspec import UNSET, Struct, structs

from ollama_coordinator_common.network import LOOPBACK, link_host, netloc, same_host
from ollama_coordinator_common.protocol import (
    AgentView,
    ByHand,
    Finding,
    HealthReport,
    ModelStore,
    RegisterRequest,
)
from ollama_coordinator_common.types import AgentId, AgentStatus, Gpu, RunnerSettings

from .inventory import Inventory

LONGEST_COOLDOWN_SECONDS = 30.0
"""An agent that is repaired gets requests again within half a minute."""


MEMORY_SHARE_WITHOUT_GPU = 0.8
"""The share of main memory that models may take; the rest is for the system and the desktop."""

OVERHEAD_FACTOR = 1.1
"""What a model takes beside its weights: its context and buffers."""

DRIVER_BYTES = 1_000_000_000
"""The desktop and the driver take so much of a GPU and are not another program."""

FOREIGN_STEP = 512 * 1024**2
"""Smaller changes of what other programs take change no decision."""

NO_GPU = "none"
"""How an operator says that a machine has no GPU."""

LISTED_SECONDS = 60.0
"""An agent reads its own list of models again within this time."""

LINK_RETURN_SECONDS = 5.0
"""An agent whose link ended is offline so much later. Requests for it wait so long: one that lost
its network for a moment is back within a second or two."""


def url_of(registration: RegisterRequest) -> str:
    """The URL that an operator added, or that of its Ollama's port, or of the relay before it.

    It has no trailing slash.
    """
    if registration.url is not None:
        return registration.url
    port = registration.relay_port or registration.ollama_port
    return f"http://{netloc(registration.ip_address, port)}"


def endpoints(registration: RegisterRequest, host: str = "") -> frozenset[tuple[str, int]]:
    """Host and port at which the coordinator connects.

    The address of a machine with a link is one of its own network only, where others may have the
    same: its `host` has its disk too. On the coordinator's own machine also Ollama's port behind
    the relay: nothing forwards it there.
    """
    host = host or same_host(registration.ip_address)
    if registration.link:
        return frozenset({(host, registration.ollama_port)})
    found = {(host, registration.relay_port or registration.ollama_port)}
    return frozenset(found | {(host, registration.ollama_port)} if host == LOOPBACK else found)


def place_of(registration: RegisterRequest, machine: str) -> str:
    """The `host` of an agent whose address was found to be that of a machine.

    Of one with a link: its disk, or its process, and its address in its own network. Behind one
    address may be several Ollamas, each below a path of its own.
    """
    if registration.url is not None:
        return machine + urlsplit(registration.url).path
    if not registration.link:
        return machine
    identity = registration.machine_id or registration.instance_id or registration.machine_name
    return f"link {identity} {same_host(registration.ip_address)}"


class AgentSettings(Struct, frozen=True):
    """What an operator sets for one agent; kept across restarts.

    A backup is taken only where all others would take `backup_seconds` longer; 0 for no backup.
    `api_key` is sent to its Ollama and to nobody else; nothing shows it. `slots`, `memory_bytes`
    and `gpu` (a name, or `none`) are what the operator says of the machine; they count in place of
    what its agent reports, and where it has none. `overruled`: it gets requests although it pauses,
    until it returns by itself.
    """

    display_name: str | None = None
    labels: list[str] = []
    notes: str = ""
    draining: bool = False
    preference: float = 1.0
    backup_seconds: float = 0.0
    api_key: str = ""
    slots: int | None = None
    memory_bytes: int | None = None
    gpu: str | None = None
    overruled: bool = False


class Cooldown(Struct, frozen=True):
    """An agent, or one model of it, gets no requests until a probe or a request succeeds.

    `since` is when it last failed, `until` the earliest time of the next try (monotonic seconds).
    """

    failures: int
    since: float
    until: float
    reason: str
    stuck: bool = False

    def avoids(self, now: float, *, tried: bool) -> bool:
        """Whether others are asked first; once its time is over, while something tries it."""
        return self.stuck or now < self.until or tried


FIRST_AVOIDED_SECONDS = 10.0
AVOIDED_SECONDS = 50.0
TWICE_IN_SECONDS = 60.0
"""How long a model that failed on an agent is asked for elsewhere first: a broken machine is asked
twice a minute at most, and one that failed once is soon equal again."""


def cooldown_after(
    previous: Cooldown | None, reason: str, now: float, *, began: float | None
) -> Cooldown:
    """The next cooldown of an agent.

    An attempt that `began` before the last failure changes nothing: a crash is one failure, however
    many requests it ends.
    """
    if previous is not None and began is not None and began <= previous.since:
        return previous
    failures = previous.failures + 1 if previous else 1
    return Cooldown(failures, now, now + _resting_seconds(failures), reason)


def model_cooldown_after(
    previous: Cooldown | None, reason: str, now: float, *, began: float | None, asked: int
) -> Cooldown:
    """The next cooldown of one model on an agent, which the attempt has `asked` once or twice."""
    if previous is not None and began is not None and began <= previous.since:
        return previous
    if asked > 1:
        until = now + TWICE_IN_SECONDS
    elif previous is None:
        until = now + FIRST_AVOIDED_SECONDS
    else:
        until = max(now + AVOIDED_SECONDS, previous.since + TWICE_IN_SECONDS)
    return Cooldown((previous.failures if previous else 0) + asked, now, until, reason)


def _resting_seconds(failures: int) -> float:
    """None after the first failure, then 1, 2, 4 … 30 s."""
    if failures == 1:
        return 0.0
    # A probe may fail thousands of times; 2.0 ** 1024 overflows.
    return min(2.0 ** min(failures - 2, 10), LONGEST_COOLDOWN_SECONDS)


@dataclass(slots=True)
class AgentState:
    """One agent. `heard_at` is when it was last heard, in monotonic seconds of this process.

    `host` is its machine as `same_host` writes it, or what its name was resolved to.
    `resting`: out of rotation after a failure. `cooldown` keeps its count of failures after that,
    until a request succeeds: an agent whose probes succeed while its requests fail is tried less
    and less often. `replaced` are the instance ids of processes that later ones have replaced.
    `model_cooldowns`: by routing key, models that are asked for here only after others. `proven`:
    it has answered a request well; `bad_since` is when the first one failed after its last good
    answer. `passes` are the ids of the coordinators that a request to it passes, where it is one
    itself. `linked`: the link by which it is reached is open; `unlinked_at` is when that ended.
    `reached`: whether the last probe got a connection to it. `mark`: what tells it apart from those
    that are called as it is, see `Identities`. `foreign_bytes` is the memory that other programs
    take where models could be. `listed_at` is when its Ollama itself was asked for its models, and
    `outdated` what the report before had of them. `findings`: what its doctor found; `None`: not
    known yet. `restart_until`: an operator has asked for a restart, which may begin until then.
    `asleep`: it is offline as machines that sleep are; `woken_at` is when it was sent the first
    magic packet since, and until `left_alone_until` no request wakes it. `announced_at` is when it
    was last heard after it had said that it leaves, or was restarted for an operator.
    """

    id: AgentId
    registration: RegisterRequest
    registered_at: datetime
    heard_at: float
    left: bool = False
    host: str = ""
    settings: AgentSettings = field(default_factory=AgentSettings)
    report: HealthReport | None = None
    inventory: Inventory = field(default_factory=Inventory)
    cooldown: Cooldown | None = None
    resting: bool = False
    replaced: tuple[str, ...] = ()
    model_cooldowns: dict[str, Cooldown] = field(default_factory=dict)
    proven: bool = False
    bad_since: float | None = None
    passes: frozenset[str] = frozenset()
    late: dict[str, int] = field(default_factory=dict)
    wants_restart: bool = False
    linked: bool = False
    unlinked_at: float | None = None
    reached: bool = True
    mark: str = ""
    findings: list[Finding] | None = None
    restart_until: float | None = None
    asleep: bool = False
    woken_at: float | None = None
    left_alone_until: float = -inf
    announced_at: float = -inf
    foreign_bytes: int = 0
    _foreign_last: int = 0

    def hear(self, now: float) -> None:
        """It was heard: it is there, and awake."""
        if self.left or self.asleep:
            self.announced_at = now
        self.heard_at, self.left, self.asleep = now, False, False
        self.woken_at, self.left_alone_until = None, -inf

    def leave(self, *, asleep: bool) -> None:
        """It said that it leaves, and whether its machine goes to sleep.

        Its registration keeps that over a restart; the next one of its agent says it anew.
        """
        self.left, self.asleep = True, asleep
        if self.registration.sleeps is not asleep:
            self.registration = structs.replace(self.registration, sleeps=asleep)

    def can_wake(self, now: float) -> bool:
        """Whether a request may wait for its machine to wake."""
        is_known = self.asleep and self.registration.mac is not None
        return is_known and now >= self.left_alone_until

    @property
    def why_offline(self) -> str:
        """A word for the status of an agent that is offline, or some."""
        if self.woken_at is not None:
            return "asleep; it was sent a magic packet and has time to wake"
        return "asleep" if self.asleep else AgentStatus.OFFLINE.value

    def take(self, report: HealthReport) -> bool:
        """Take over a report; whether it has facts that last.

        Other programs' memory is the smaller one of two reports': the readings of a model that
        comes or goes do not belong to the same moment as Ollama's list.
        """
        before = (self.report and lasting(self.report), self.foreign_bytes)
        version = report.ollama_version or self.registration.ollama_version
        if version != self.registration.ollama_version:
            self.registration = structs.replace(self.registration, ollama_version=version)
        self.report = report
        if report.findings is not UNSET:
            self.findings = report.findings
        if self.settings.overruled and report.paused is None:
            self.settings = structs.replace(self.settings, overruled=False)
        foreign = foreign_bytes(self)
        self.foreign_bytes, self._foreign_last = min(foreign, self._foreign_last), foreign
        return before != (lasting(report), self.foreign_bytes)

    @property
    def paused(self) -> str | None:
        """Why it takes no new requests by itself, unless the operator overrules that."""
        reported = self.report.paused if self.report is not None else None
        return None if self.settings.overruled else reported

    @property
    def runner(self) -> RunnerSettings | None:
        """How its Ollama is set up: as reported, with the slots that the operator says."""
        reported = self.report.runner if self.report is not None else None
        if self.settings.slots is None:
            return reported
        return structs.replace(reported or RunnerSettings(), num_parallel=self.settings.slots)

    @property
    def cards(self) -> list[Gpu]:
        """The reported GPUs that are no part of the processor; none where the operator says so."""
        if self.report is None or self.settings.gpu == NO_GPU:
            return []
        return [gpu for gpu in self.report.gpus if not gpu.integrated]

    @property
    def gpu_bytes(self) -> int:
        """The memory of all its GPUs; 0 where they have none of their own."""
        return sum(gpu.memory_total_bytes or 0 for gpu in self.cards)

    @property
    def lacks_gpu(self) -> bool:
        """Whether it is known to have no GPU that Ollama surely uses."""
        if self.settings.gpu is not None:
            return self.settings.gpu == NO_GPU
        report = self.report
        if report is None or not report.memory_total_bytes:
            return False
        return all(gpu.integrated for gpu in report.gpus)

    @property
    def called(self) -> str:
        """Its display name, or else its machine's name; others may have the same."""
        return self.settings.display_name or self.registration.machine_name

    listed_at: float = float("-inf")
    outdated: bytes = b""

    @property
    def name(self) -> str:
        """What it is called; with its `mark` where another agent is called so too."""
        return f"{self.called} ({self.mark})" if self.mark else self.called

    @property
    def url(self) -> str:
        """The URL of its Ollama: by its link, or at its port; without a trailing slash."""
        if self.registration.link:
            return f"http://{link_host(self.id)}"
        return url_of(self.registration)

    @property
    def way(self) -> str:
        """How it is reached, for an operator."""
        return "its link" if self.registration.link else self.url

    def note_listed(self, now: float) -> None:
        """Its models were just read from its Ollama itself."""
        self.listed_at = now
        self.outdated = self._tags(self.report)

    def has_older_list(self, report: HealthReport, now: float) -> bool:
        """Whether a report has the list of models of before one that was read since.

        The agent reads its own only now and then.
        """
        if self._tags(report) != self.outdated or now - self.listed_at >= LISTED_SECONDS:
            self.outdated = b""
        return bool(self.outdated)

    @staticmethod
    def _tags(report: HealthReport | None) -> bytes:
        return b"" if report is None or report.tags is UNSET else bytes(report.tags)

    @property
    def store(self) -> ModelStore | None:
        """How models are brought from this machine, or to it; `None` where no report says so."""
        store = UNSET if self.report is None else self.report.store
        return store if isinstance(store, ModelStore) else None

    @property
    def endpoints(self) -> frozenset[tuple[str, int]]:
        """Hosts and ports of its Ollama: two agents that share one have the same Ollama."""
        return endpoints(self.registration, self.host)

    @property
    def has_answered(self) -> bool:
        """Whether anything was ever heard from it but its registration."""
        known = self.inventory
        return self.report is not None or bool(known.tags) or known.sampled_at is not None

    @property
    def ollama_running(self) -> bool:
        """Whether the agent reports that its Ollama answers; assumed if it reports nothing."""
        return self.report is None or self.report.ollama_running

    @property
    def is_bare(self) -> bool:
        """Whether it is a bare Ollama: it has no daemon, and is online as long as it answers."""
        return self.report is None and self.registration.instance_id is None and not self.left

    @property
    def is_unheard(self) -> bool:
        """Whether its daemon has reported nothing since this process knows it."""
        return self.report is None and not self.is_bare

    @property
    def brings_inventory(self) -> bool:
        """Whether its heartbeats list the models; else the monitor asks its Ollama."""
        return self.report is not None and self.report.tags is not UNSET

    def status(self, now: float, timeout: float) -> AgentStatus:
        """Offline after `timeout` seconds of silence, or when it said that it leaves.

        One with a link: `LINK_RETURN_SECONDS` after that ended.
        """
        if self.left or now - self.heard_at > timeout:
            return AgentStatus.OFFLINE
        if self.unlinked_at is not None and now - self.unlinked_at > LINK_RETURN_SECONDS:
            return AgentStatus.OFFLINE
        drains = self.settings.draining or self.paused is not None
        return AgentStatus.DRAINING if drains else AgentStatus.ONLINE

    def avoids(self, key: str, now: float, *, tried: bool = False) -> bool:
        """Whether others are asked for this model first; `tried`: requests for it run here."""
        cooldown = self.model_cooldowns.get(key)
        return cooldown is not None and cooldown.avoids(now, tried=tried or self.probes(key))

    def probes(self, key: str) -> bool:
        """Whether a probe tries a model that failed here, in place of a request: one that is in
        memory and can answer with a token.
        """
        row = self.inventory.available.get(key)
        return row is not None and row.writes_tokens and self.inventory.is_loaded(key)

    def is_stuck(self, key: str) -> bool:
        """Whether this model is taken to hang here, until a probe succeeds."""
        cooldown = self.model_cooldowns.get(key)
        return cooldown is not None and cooldown.stuck

    def was_good_at(self, now: float) -> bool:
        """Whether its last answer to a request before this time was good."""
        return self.proven and (self.bad_since is None or self.bad_since > now)

    def out_of_rotation(self) -> str | None:
        """Why an online agent gets no requests; `None` if it may get some."""
        if self.registration.link and not self.linked:
            return "its link is not open"
        if not self.ollama_running:
            return "its Ollama does not answer" + self._cause()
        if self.resting and self.cooldown is not None:
            return self.cooldown.reason
        return None

    def _cause(self) -> str:
        """What its doctor says of its Ollama, and what to do."""
        known = (one for one in self.findings or () if one.check == "Ollama" and one.remedy)
        found = next(known, None)
        return "" if found is None else f" ({found.text}): {found.remedy}"


def view_of(
    agent: AgentState,
    status: AgentStatus,
    conflict: str | None,
    *,
    last_seen: datetime,
    in_flight: int,
) -> AgentView:
    """An agent as the API shows it; `last_seen` is its `heard_at` in UTC."""
    registration, report, inventory = agent.registration, agent.report, agent.inventory
    return AgentView(
        id=agent.id,
        name=agent.name,
        machine_name=registration.machine_name,
        ip_address=registration.ip_address,
        ollama_version=registration.ollama_version,
        ollama_port=registration.ollama_port,
        status=status,
        registered_at=agent.registered_at,
        last_seen=last_seen,
        in_flight=in_flight,
        url=agent.url,
        link=agent.registration.link,
        display_name=agent.settings.display_name,
        labels=agent.settings.labels,
        notes=agent.settings.notes,
        agent_version=registration.agent_version,
        platform=registration.platform,
        ollama_running=agent.ollama_running,
        out_of_rotation=agent.out_of_rotation(),
        conflict=conflict,
        cpu_usage=report.cpu_usage if report else None,
        memory_usage=report.memory_usage if report else None,
        memory_total_bytes=report.memory_total_bytes if report else None,
        disk_free_bytes=report.disk_free_bytes if report else None,
        active_requests=report.active_requests if report else None,
        gpus=report.gpus if report else [],
        runner=agent.runner,
        by_hand=by_hand(agent.settings),
        foreign_memory_bytes=agent.foreign_bytes,
        paused=report.paused if report else None,
        overruled=agent.settings.overruled,
        asleep=agent.asleep,
        waking=agent.woken_at is not None,
        mac=registration.mac,
        avoided_models={
            agent.inventory.available[key].model.name: cooldown.reason
            for key, cooldown in agent.model_cooldowns.items()
            if key in agent.inventory.available
        },
        models=sorted(row.model.name for row in inventory.available.values()),
        broken_models=dict(inventory.broken),
        left_behind=report.left_behind if report else None,
        findings=agent.findings or [],
        owned=report.owned if report else False,
        loaded_models=sorted(row.model.name for row in inventory.loaded.values()),
    )


def by_hand(settings: AgentSettings) -> ByHand | None:
    """What the operator says of a machine; `None` for nothing."""
    told = ByHand(settings.slots, settings.memory_bytes, settings.gpu)
    return None if told == ByHand() else told


def foreign_bytes(agent: AgentState) -> int:
    """The memory that other programs take where models could be, in steps of `FOREIGN_STEP`.

    What the system says is used, less what Ollama says its models take, less what every machine
    needs: of GPUs the driver's and the desktop's, of main memory a fifth.
    """
    report = agent.report
    if report is None or not agent.inventory.ps:
        return 0
    loaded = [row.model for row in agent.inventory.loaded.values()]
    if agent.gpu_bytes:
        used = sum(gpu.memory_used_bytes or 0 for gpu in agent.cards)
        own, usual = sum(model.size_vram or model.size for model in loaded), DRIVER_BYTES
    else:
        total = report.memory_total_bytes or 0
        used = int(total * report.memory_usage / 100)
        own = sum(model.size for model in loaded)
        usual = int(total * (1 - MEMORY_SHARE_WITHOUT_GPU))
    # The runner's own overhead is not in Ollama's figure; a tenth more is not another program.
    foreign = max(0, int(used - own * OVERHEAD_FACTOR - usual))
    return foreign // FOREIGN_STEP * FOREIGN_STEP


def lasting(report: HealthReport) -> tuple[object, ...]:
    """The facts of a report that do not change from one report to the next."""
    memory = [gpu.memory_total_bytes for gpu in report.gpus]
    return report.ollama_running, report.runner, report.memory_total_bytes, memory, report.paused
