"""What agents and the coordinator say to each other, as JSON over HTTP.

Wire types grow, they never change: a new field has a default, an unknown field is ignored, so that
yesterday's agent works with today's coordinator and the other way round. An agent must send only
the fields without defaults: four of `RegisterRequest` and four of `HealthReport`.
"""

from datetime import datetime
from typing import Annotated

from msgspec import UNSET, Meta, Raw, Struct, UnsetType, structs

from .network import is_address
from .printable import check_printable
from .types import AgentId, AgentStatus, Gpu, Percent, Port, RunnerSettings

HEARTBEAT_SECONDS = 10.0
"""How often our agent reports by itself; it also reports at once when its models change."""


PROOF_HEADER = "X-Agent-Secret"
"""What an agent sends with every request to the coordinator: a text that its machine alone knows.

The first registration pins it; from then on only who has it is believed to be that agent.
"""


Word = Annotated[str, Meta(max_length=256)]
"""A version or the name of a platform."""


Mac = Annotated[str, Meta(pattern="^[0-9a-f]{2}(:[0-9a-f]{2}){5}$")]
"""The number of a network card, which a magic packet has."""


class RegisterRequest(Struct, frozen=True, omit_defaults=True):
    """`POST /api/agents`: this machine offers its Ollama to the fleet.

    `machine_id` is a random id on the agent's disk: a machine with another name or address keeps
    it. `relay_port` is the agent's own port where Ollama listens on loopback only; the
    coordinator connects to it in place of `ollama_port`. `link`: the coordinator does not reach
    that port, and the agent opens a link. `sleeps`: the machine was seen to sleep. `mac` is the
    network card that faces the coordinator, `broadcast` the address of all machines on its
    network: there the coordinator wakes it. `handshake`: its relay asks for one
    (`handshake.py`), once the coordinator says that it can. `instance_id` is new in every agent
    process, `previous_instance_id` is that of the run before on the same disk: they distinguish
    copies of one disk. `url` is that of an Ollama without an agent that an operator added; no
    agent sends it.
    """

    machine_name: Annotated[str, Meta(min_length=1, max_length=253)]
    ip_address: Annotated[str, Meta(min_length=1, max_length=253)]
    ollama_version: Word
    ollama_port: Port
    machine_id: Annotated[str, Meta(max_length=128)] | None = None
    relay_port: Port | None = None
    agent_version: Word | None = None
    platform: Word | None = None
    instance_id: Annotated[str, Meta(max_length=128)] | None = None
    previous_instance_id: Annotated[str, Meta(max_length=128)] | None = None
    link: bool = False
    url: Annotated[str, Meta(max_length=2000)] | None = None
    sleeps: bool = False
    mac: Mac | None = None
    broadcast: Annotated[str, Meta(max_length=45)] | None = None
    handshake: bool = False

    def __post_init__(self) -> None:
        for name in ("machine_name", "ollama_version", "agent_version", "platform"):
            check_printable(name, getattr(self, name))
        if not is_address(self.ip_address):
            raise ValueError(
                f"ip_address {self.ip_address!r} is none; give an IP address or a host name, "
                "without scheme and port"
            )


class Healthz(Struct, frozen=True):
    """What an agent reads of `GET /healthz`: `id` is the coordinator's own, for as long as its
    database lives; an earlier version gives none.
    """

    agents_online: int
    id: str = ""


SERVICE = "_ollama-coord._tcp.local."
"""The coordinator as multicast DNS names it (RFC 6763; a name has at most 15 letters). Its TXT
record has the `id`, and the `scheme` of its URL where that is not http."""


class RegisterReply(Struct, frozen=True):
    """The agent's id, to be sent with every heartbeat, and `registered` or `updated`.

    `reached` false: the coordinator does not reach the port of the registration. `handshake`: its
    connections to the relay begin with one.
    """

    agent_id: AgentId
    status: str
    reached: bool | UnsetType = UNSET
    handshake: bool | UnsetType = UNSET


class ModelStore(Struct, frozen=True, omit_defaults=True):
    """How an agent gives its machine's models to others, and how it can take theirs.

    `port` is its own, which takes tickets (`tickets.py`); `host` where other machines reach that,
    empty: at the machine's address. `direct` false: over the link alone. `clock` is the agent's, in
    seconds, at the report. `readable`: it may read the files of its Ollama; `writable`: it may
    write there. `owns`: the Ollama is its own, or needs it to write (Windows). `coordinator` is the
    URL at which it reaches the coordinator.
    """

    port: Port
    clock: float
    coordinator: Annotated[str, Meta(max_length=2000)] = ""
    host: Annotated[str, Meta(max_length=253)] = ""
    direct: bool = True
    readable: bool = False
    writable: bool = False
    owns: bool = False


Sentence = Annotated[str, Meta(max_length=1000)]


class Finding(Struct, frozen=True, omit_defaults=True):
    """What the agent's doctor finds at one check; `remedy` is what to do about it.

    `level`: ok, note, warning or failed.
    """

    check: Word
    level: Word
    text: Sentence
    remedy: Sentence = ""


class HealthReport(Struct, frozen=True, omit_defaults=True):
    """`POST /api/health`: one heartbeat. Percentages are of the whole machine.

    `tags` and `ps` are the bodies of the local Ollama's `/api/tags` and `/api/ps`, byte for byte;
    without them the coordinator asks that Ollama itself. `model_blobs` maps a model's name to the
    digest of its weights (`sha256:…`), which is the same in every version of Ollama,
    `model_contents` to one of all its layers, and `broken_models` to what its files lack: such a
    model is listed and cannot run. `left_behind` is a sentence on model runners of an Ollama that
    was killed: they still hold memory.
    `ollama_running` false: the agent runs, its Ollama does not answer. `leaving`: the agent stops,
    and this is its last report. `instance_id` is that of the registration. `other_requests` are
    those of `active_requests` that did not come through the agent's relay or link, where all of the
    coordinator's do and the system shows which connections are in use. `paused` is why the machine
    takes no new requests now, by its own schedule or for its owner. `store`: models can be
    brought from this machine, or to it. `findings` are those of the doctor that are not ok, when
    they have changed or were asked for. `owned`: the agent started this Ollama, and may restart it.
    `asleep`, with `leaving`: the machine goes to sleep or is switched off.
    """

    agent_id: AgentId
    cpu_usage: Percent
    memory_usage: Percent
    active_requests: Annotated[int, Meta(ge=0)]
    ollama_running: bool = True
    ollama_version: Word | None = None
    memory_total_bytes: int | None = None
    disk_free_bytes: int | None = None
    gpus: Annotated[list[Gpu], Meta(max_length=256)] = []
    runner: RunnerSettings | None = None
    tags: Raw | UnsetType = UNSET
    ps: Raw | UnsetType = UNSET
    model_blobs: Annotated[dict[str, str], Meta(max_length=4000)] = {}
    model_contents: dict[str, str] = {}
    broken_models: dict[str, str] = {}
    left_behind: str | None = None
    leaving: bool = False
    instance_id: Annotated[str, Meta(max_length=128)] | None = None
    other_requests: Annotated[int, Meta(ge=0)] | None = None
    paused: Word | None = None
    store: ModelStore | UnsetType = UNSET
    findings: Annotated[list[Finding], Meta(max_length=64)] | UnsetType = UNSET
    owned: bool = False
    asleep: bool = False

    def __post_init__(self) -> None:
        check_printable("ollama_version", self.ollama_version)
        check_printable("paused", self.paused)
        # A null counts as a list that was left out.
        for name, body in (("tags", self.tags), ("ps", self.ps)):
            if body is not UNSET and bytes(body) == b"null":
                structs.force_setattr(self, name, UNSET)


class HealthReply(Struct, frozen=True):
    """The coordinator's answer to a heartbeat.

    `log_after`: an operator looks at the agent's log; lines with greater numbers are wanted.
    `problem`: a sentence for the operator: why the agent gets no requests, or which other machine
    it is mistaken for. `restart`: why the agent should restart the Ollama that it started itself.
    `reached` false: the coordinator cannot connect to the port of the registration.
    `asks_findings`: the coordinator knows none of the agent's findings, and wants them.
    `handshake`: as in the reply to a registration.
    """

    status: str = "ok"
    log_after: int | UnsetType = UNSET
    problem: str | UnsetType = UNSET
    restart: str | UnsetType = UNSET
    reached: bool | UnsetType = UNSET
    asks_findings: bool | UnsetType = UNSET
    handshake: bool | UnsetType = UNSET


class LogLine(Struct, frozen=True):
    """One record of an agent's log; `number` grows from line to line, also over restarts."""

    number: int
    at: datetime
    level: Annotated[str, Meta(max_length=32)]
    text: str


class LogReport(Struct, frozen=True, omit_defaults=True):
    """`POST /api/agents/{id}/log`: what the coordinator asked for.

    `server` is the last output of the `ollama serve` that the agent started; `None` while it has
    not changed, and where there is none.
    """

    lines: list[LogLine] = []
    server: list[str] | None = None


class LinkReport(Struct, frozen=True, omit_defaults=True):
    """A line from an agent to the coordinator on the control connection of its link.

    Nothing at all: a sign of life. `asks_reached`: whether the coordinator reaches the agent's
    port after all.
    """

    health: HealthReport | UnsetType = UNSET
    log: LogReport | UnsetType = UNSET
    asks_reached: bool = False


class LinkOrder(Struct, frozen=True, omit_defaults=True):
    """A line from the coordinator to an agent on the control connection of its link.

    Nothing at all: a ping, which wants a sign of life. `session` is what the agent names when it
    opens a connection to be parked, `connections` how many requests wait for one. `reply` answers a
    heartbeat, `reached` the question for it. `error`: why a report was refused; `forgotten`: the
    agent should register again. `report`: a heartbeat is wanted now.
    """

    session: str | UnsetType = UNSET
    connections: int = 0
    reply: HealthReply | UnsetType = UNSET
    reached: bool | UnsetType = UNSET
    error: str | UnsetType = UNSET
    forgotten: bool = False
    report: bool = False


class ByHand(Struct, frozen=True, omit_defaults=True):
    """What an operator says of a machine, in place of what its agent reports.

    `gpu` is a name, or `none`. `memory_bytes` is what models may take there.
    """

    slots: int | None = None
    memory_bytes: int | None = None
    gpu: str | None = None


class AgentOperation(Struct, frozen=True):
    """An agent's part of a model operation; `completed` and `total` in bytes."""

    id: str
    kind: str
    model: str
    state: str
    status: str = ""
    completed: int = 0
    total: int = 0
    error: str | None = None


class AgentView(Struct, frozen=True):
    """One row of `GET /api/agents`; times are UTC.

    `name` is the display name or the machine's, with what tells it apart where another agent is
    called the same.
    `foreign_memory_bytes` is what other programs take where models could be. `paused` is why its
    machine takes no new requests by itself; where that is `overruled`, it gets them. `asleep`: it
    is offline as machines that sleep are; `waking`: it was sent a magic packet and has time to
    come.
    """

    id: AgentId
    machine_name: str
    ip_address: str
    ollama_version: Word
    ollama_port: int
    status: AgentStatus
    registered_at: datetime
    last_seen: datetime
    in_flight: int = 0
    url: str = ""
    link: bool = False
    display_name: str | None = None
    labels: list[str] = []
    notes: str = ""
    agent_version: str | None = None
    platform: str | None = None
    ollama_running: bool = True
    out_of_rotation: str | None = None
    avoided_models: dict[str, str] = {}
    conflict: str | None = None
    cpu_usage: float | None = None
    memory_usage: float | None = None
    memory_total_bytes: int | None = None
    disk_free_bytes: int | None = None
    active_requests: int | None = None
    gpus: list[Gpu] = []
    runner: RunnerSettings | None = None
    by_hand: ByHand | None = None
    foreign_memory_bytes: int = 0
    paused: str | None = None
    overruled: bool = False
    asleep: bool = False
    waking: bool = False
    mac: str | None = None
    models: list[str] = []
    broken_models: dict[str, str] = {}
    left_behind: str | None = None
    loaded_models: list[str] = []
    findings: list[Finding] = []
    owned: bool = False
    name: str = ""
    operations: list[AgentOperation] = []
