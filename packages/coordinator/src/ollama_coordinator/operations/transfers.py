"""Transfers: which machine gives a model to which other one, and by which tickets.

A transfer brings one content of a model to one agent. Its namespace is the ticket of a stock
Ollama, which sends no key; it ends with the transfer. Each piece of a file has a ticket of its own
for the agent that gives it, and where a piece is asked for again, another one gives it: so a
machine that dies, or that the receiver cannot reach, is passed by.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, suppress
from hashlib import sha256
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from ollama_coordinator.access import KnownMachines
from ollama_coordinator.aio import Interrupt
from ollama_coordinator.clock import Clock
from ollama_coordinator.dispatch import Dispatch
from ollama_coordinator.registry import AgentState
from ollama_coordinator.upstream import Unreachable, Upstreams
from ollama_coordinator_common.names import ModelName
from ollama_coordinator_common.network import (
    is_loopback,
    link_host,
    local_address,
    netloc,
    parse_address,
)
from ollama_coordinator_common.protocol import ModelStore
from ollama_coordinator_common.tickets import (
    DIGEST,
    READ,
    TICKET_SECONDS,
    WRITE,
    is_passing,
    issue,
    new_namespace,
    path_of,
)
from ollama_coordinator_common.types import AgentId

from .types import Refused

log = logging.getLogger(__name__)

MOST_AT_ONCE = 2
"""Transfers that one machine gives at a time; one alone while it answers requests."""

LOOK_SECONDS = 0.1
"""How often a transfer that waits looks for a machine that gives it."""

LISTED_SECONDS = 15.0
"""How long a machine is waited for that gives the model: its list may come with a heartbeat only,
and the internet costs more."""

MANIFEST_SECONDS = 10.0
MANIFEST_BYTES, MANIFEST_COMMAS = 2 * 1024 * 1024, 50_000
"""A manifest has some kilobytes, and that of a model of many tensors some hundred. What is more
would hold up others while it is read, and is remembered."""

UNREACHED_SECONDS = 600.0
"""How long a way from machine to machine is not tried again on which a piece did not come."""

MOST_PUBLISHED = 64
"""Models whose manifests are remembered for callers that come without a ticket."""

WAYS_TRIED = 2
"""How often a piece of a file is asked for in each way before it is given up."""


class NoSource(Refused):
    """No machine can give the model now."""

    def __init__(self, name: str) -> None:
        super().__init__(503, f"no machine of the fleet can give {name} away now")


class SourceLost(Refused):
    """The machines that gave a model away do not any more."""

    def __init__(self, name: str) -> None:
        super().__init__(503, f"the machines that gave {name} away do not answer any more")


class _Layer(Struct):
    digest: str = ""
    size: int = 0


class _Manifest(Struct):
    layers: list[_Layer] = []
    config: _Layer | None = None


def files_of(manifest: bytes) -> dict[str, int]:
    """The files that a manifest names, by digest, with their sizes in bytes.

    Raises:
        msgspec.DecodeError: it is none.
    """
    if manifest.count(b",") > MANIFEST_COMMAS:
        raise msgspec.DecodeError("it has more values than a manifest")
    read = msgspec.json.decode(manifest, type=_Manifest)
    found = [*read.layers, *([read.config] if read.config is not None else ())]
    return {one.digest: one.size for one in found if DIGEST.fullmatch(one.digest)}


class FileWay(Struct, frozen=True):
    """How a piece of a file is had: from an agent, at a URL; `direct`: by the receiver itself."""

    agent: AgentState
    url: str
    direct: bool


class Transfer:
    """One content of a model on its way to `receiver`; `None`: to a caller of the registry.

    `first` gives it, and others where that fails, unless it comes `from_one` alone. `given_by`:
    those that were asked for pieces.
    `lost` ends what runs inside of it, once no machine gives the content any more.
    """

    def __init__(
        self, receiver: AgentState | None, name: ModelName, manifest: bytes, first: AgentState
    ) -> None:
        self.namespace = new_namespace()
        self.receiver = receiver
        self.name = name
        self.manifest = manifest
        self.digest = f"sha256:{sha256(manifest).hexdigest()}"
        self.files = files_of(manifest)
        self.first = first
        self.from_one = False
        self.given_by: set[AgentId] = set()
        self.excluded: frozenset[AgentId] = frozenset()
        self.lost = Interrupt()
        self.asked: Counter[tuple[str, str]] = Counter()


class Transfers:
    """The transfers under way. `port`: where this coordinator listens, 0 if that is not known."""

    def __init__(
        self, dispatch: Dispatch, upstreams: Upstreams, machines: KnownMachines, *, port: int
    ) -> None:
        self._registry = dispatch.registry
        self._scheduler = dispatch.scheduler
        self._clock: Clock = dispatch.clock
        self._upstreams = upstreams
        self._machines = machines
        self._port = port
        self._open: dict[str, Transfer] = {}
        self._published: dict[tuple[str, str], Transfer] = {}
        self._giving: Counter[AgentId] = Counter()
        self._unreached: dict[tuple[AgentId, AgentId], float] = {}

    # ── who gives, and who takes ──────────────────────────────────────────────────────────────

    def sources(
        self, key: str, digest: str | None = None, excluded: Collection[AgentId] = ()
    ) -> list[AgentState]:
        """The agents that can give a model, or one content of it: a manifest's digest, away."""
        now, found = self._clock.now(), []
        for agent_id, row in self._registry.models.copies(key).items():
            agent = self._registry.get(agent_id)
            fits = digest is None or _digest(row.model.digest) == digest
            if fits and agent_id not in excluded and self.can_give(agent, now):
                found.append(agent)
        return found

    def can_give(self, agent: AgentState, now: float) -> bool:
        """Whether an agent serves the files of its models."""
        store = agent.store
        ready = store is not None and store.readable and self._registry.is_reachable(agent, now)
        return ready and bool(self._machines.ticket_key(agent.id))

    def arrival(self, agent: AgentState) -> str | None:
        """Where a model comes from for an agent's Ollama; empty: the agent writes it itself.

        `None`: neither is possible. A stock Ollama takes plain HTTP alone. A port becomes a part of
        a folder's name, which has no colon on Windows.
        """
        store = agent.store
        if store is None:
            return self._arrival_of_bare(agent)
        url = urlsplit(store.coordinator)
        on_windows = (agent.registration.platform or "").startswith("Windows")
        plain = url.scheme == "http" and not url.path.strip("/") and bool(url.hostname)
        plain = plain and ":" not in (url.hostname or "")
        plain = plain and not (on_windows and (url.port or 80) != 80)
        if store.writable and (store.owns or not plain) and self._machines.ticket_key(agent.id):
            return ""
        return url.netloc.rpartition("@")[2] if plain else None

    def _arrival_of_bare(self, agent: AgentState) -> str | None:
        """The address that this coordinator has towards an Ollama without an agent of today."""
        address = parse_address(agent.host)
        plain = agent.registration.url is None and not agent.registration.link
        if not (self._port and plain and address is not None and address.version == 4):
            return None
        own = local_address([str(address)], agent.registration.ollama_port)
        return None if own is None else netloc(own, self._port)

    # ── a transfer ────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def moving(
        self,
        receiver: AgentState,
        name: ModelName,
        digest: str | None,
        excluded: Collection[AgentId] = (),
    ) -> AsyncIterator[Transfer]:
        """Wait for a machine that gives this content, and let the receiver take it in the block.

        Raises:
            NoSource: there is none.
        """
        banned = {receiver.id, *excluded}
        while True:
            first = await self._free_source(name, digest, banned)
            self._giving[first.id] += 1
            try:
                manifest = await self._manifest(first, name, digest)
                if manifest is None:
                    banned.add(first.id)
                    continue
                transfer = Transfer(receiver, name, manifest, first)
                transfer.excluded = frozenset(banned)
                self._open[transfer.namespace] = transfer
                try:
                    yield transfer
                finally:
                    del self._open[transfer.namespace]
                return
            finally:
                self._giving[first.id] -= 1

    async def _free_source(
        self, name: ModelName, digest: str | None, banned: Collection[AgentId]
    ) -> AgentState:
        began = self._clock.now()
        while True:
            found, now = self.sources(name.key, digest, banned), self._clock.now()
            if not found and (now - began >= LISTED_SECONDS or not self._may_give(banned, now)):
                raise NoSource(name.short)
            free = [agent for agent in found if self._giving[agent.id] < self._most(agent)]
            if free:
                return min(free, key=lambda agent: (self._load(agent), agent.id))
            await asyncio.sleep(LOOK_SECONDS)

    def _may_give(self, banned: Collection[AgentId], now: float) -> bool:
        """Whether any other machine is there that may turn out to have a model."""
        return any(a.id not in banned and self._registry.is_online(a, now) for a in self._registry)

    def _most(self, agent: AgentState) -> int:
        return 1 if self._scheduler.in_flight(agent.id) else MOST_AT_ONCE

    def _load(self, agent: AgentState) -> tuple[int, int]:
        return self._giving[agent.id], self._scheduler.in_flight(agent.id)

    async def _manifest(
        self, agent: AgentState, name: ModelName, digest: str | None
    ) -> bytes | None:
        """The bytes of an agent's manifest; `None` where they are not had, or are others."""
        row = agent.inventory.available.get(name.key)
        if row is None and digest is None:
            return None
        digest = digest or _digest(row.model.digest if row is not None else "")
        try:
            status, body = await self._upstreams.fetch(
                "GET",
                self.url(agent, _listed_name(agent, name), digest, READ),
                seconds=MANIFEST_SECONDS,
                limit=MANIFEST_BYTES,
            )
        except Unreachable as exc:
            log.info("no manifest from an agent", extra={"agent": agent.name, "reason": str(exc)})
            return None
        if status == 200 and f"sha256:{sha256(body).hexdigest()}" == digest:
            with suppress(msgspec.DecodeError):
                files_of(body)
                return body
        return None

    def url(self, agent: AgentState, model: str, digest: str, purpose: str) -> str:
        """Where this coordinator asks an agent for one thing, once."""
        store = agent.store
        if store is None:
            raise NoSource(model)
        host = agent.registration.ip_address
        if agent.registration.link:
            host = link_host(agent.id)
        elif store.host:
            host = store.host
        return self._signed(agent, store, netloc(host, store.port), model, digest, purpose)

    def _signed(
        self, agent: AgentState, store: ModelStore, at: str, model: str, digest: str, purpose: str
    ) -> str:
        ends = store.clock + self._clock.now() - agent.heard_at + TICKET_SECONDS
        key = self._machines.ticket_key(agent.id)
        return f"http://{at}{path_of(issue(key, purpose, model, digest, ends), model, digest)}"

    def writing(self, transfer: Transfer, agent: AgentState, name: str) -> str:
        """Where an agent is told to fetch and keep what a transfer brings, under a name."""
        return self.url(agent, name, transfer.digest, WRITE)

    # ── what the receiver asks for ────────────────────────────────────────────────────────────

    def find(self, namespace: str) -> Transfer | None:
        """The transfer under way with this namespace."""
        return self._open.get(namespace) if is_passing(namespace) else None

    def is_taking(self, agent: AgentState) -> bool:
        """Whether a transfer to this agent is under way."""
        return any(transfer.receiver is agent for transfer in self._open.values())

    async def publish(self, name: ModelName) -> Transfer | None:
        """What a caller without a ticket is shown of a model; `None`: nobody has it."""
        banned: set[AgentId] = set()
        while found := self.sources(name.key, excluded=banned):
            manifest = await self._manifest(found[0], name, None)
            if manifest is not None:
                known = Transfer(None, name, manifest, found[0])
                self._published[(name.key, known.digest)] = known
                while len(self._published) > MOST_PUBLISHED:
                    del self._published[next(iter(self._published))]
                return known
            banned.add(found[0].id)
        return None

    def published(self, repository: str, digest: str) -> Transfer | None:
        """The model of a repository (`host/namespace/model`) that was shown and has this file."""
        for (key, _), known in reversed(self._published.items()):
            if key.rpartition(":")[0] == repository and digest in known.files:
                return known
        return None

    def way(self, transfer: Transfer, digest: str, piece: str) -> FileWay | None:
        """Where a piece of a file is had this time; `None` once no way has brought it.

        `piece` says which one: where it ends. What a receiver asks for again did not come before;
        of callers without a ticket there may be many.
        """
        ways = list(self._ways(transfer, digest))
        if transfer.receiver is None:
            return ways[0] if ways else None
        asked = transfer.asked[digest, piece]
        if not ways or asked >= WAYS_TRIED * len(ways):
            transfer.lost.fire(SourceLost(transfer.name.short))
            return None
        transfer.asked[digest, piece] += 1
        way = ways[asked % len(ways)]
        if asked:
            self._note_missed(transfer, ways[(asked - 1) % len(ways)])
        transfer.given_by.add(way.agent.id)
        return way

    def note_failed(self, transfer: Transfer, digest: str, agent: AgentState) -> None:
        """An agent did not give a file to this coordinator itself: it is not asked again."""
        transfer.excluded |= {agent.id}
        if not any(self._ways(transfer, digest)):
            transfer.lost.fire(SourceLost(transfer.name.short))

    def _ways(self, transfer: Transfer, digest: str) -> Iterator[FileWay]:
        """First by the receiver itself, then through this coordinator; `first` before others."""
        key, own = transfer.name.key, _digest(transfer.digest)
        banned = {*transfer.excluded, transfer.first.id}
        others = [] if transfer.from_one else self.sources(key, own, banned)
        others.sort(key=lambda agent: (self._load(agent), agent.id))
        # Its list may be older than its model: a report that was under way when it got it.
        gives = transfer.first.id not in transfer.excluded
        gives = gives and self.can_give(transfer.first, self._clock.now())
        first = [transfer.first] if gives else []
        agents = [*first, *others]
        for agent in agents:
            if (at := self._direct(transfer.receiver, agent)) is not None and agent.store:
                name = _listed_name(agent, transfer.name)
                yield FileWay(agent, self._signed(agent, agent.store, at, name, digest, READ), True)
        for agent in agents:
            name = _listed_name(agent, transfer.name)
            yield FileWay(agent, self.url(agent, name, digest, READ), False)

    def _direct(self, receiver: AgentState | None, agent: AgentState) -> str | None:
        """Host and port at which the receiver reaches an agent; `None`: by the coordinator."""
        store = agent.store
        if store is None or not store.direct or receiver is None:
            return None
        host = store.host or agent.registration.ip_address
        if is_loopback(host) and not is_loopback(receiver.registration.ip_address):
            return None
        until = self._unreached.get((receiver.id, agent.id), 0.0)
        return None if self._clock.now() < until else netloc(host, store.port)

    def _note_missed(self, transfer: Transfer, before: FileWay) -> None:
        if before.direct and transfer.receiver is not None:
            now = self._clock.now()
            self._unreached = {ab: until for ab, until in self._unreached.items() if until > now}
            self._unreached[transfer.receiver.id, before.agent.id] = now + UNREACHED_SECONDS


def _listed_name(agent: AgentState, name: ModelName) -> str:
    """A model's name in the letter case in which an agent's Ollama has it."""
    row = agent.inventory.available.get(name.key)
    return name.short if row is None else row.model.name


def _digest(text: str) -> str:
    """A digest as manifests write it: Ollama lists those of models without the algorithm."""
    return text if text.startswith("sha256:") else f"sha256:{text}"
