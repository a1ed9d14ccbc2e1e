"""All registered agents: their identity, their status, and the models they have."""

from collections.abc import Container, Iterable, Iterator, Mapping
from datetime import datetime

from msgspec import UNSET, structs

from ollama_coordinator_common.printable import printable
from ollama_coordinator_common.protocol import AgentView, HealthReport, RegisterRequest
from ollama_coordinator_common.types import AgentId, AgentStatus

from . import agent_match
from .agent import (
    AgentSettings,
    AgentState,
    Cooldown,
    cooldown_after,
    endpoints,
    model_cooldown_after,
    view_of,
)
from .agent_match import (
    Identities,
    Judgement,
    NotItsOllama,
    Registration,
    UnknownAgent,
    always,
)
from .inventory import EMPTY
from .model_index import MOST_SHOWN, CloudModels, ModelIndex

VERSION_CHARACTERS = 100
"""Of a version; Ollama's have a dozen."""


class Registry:
    """The agents by id, and by model. Synchronous and without a clock: `now` is monotonic seconds.

    `changes` grows with everything that can alter a routing decision: what was derived at the same
    number is still true. `models` is the index of models, to read only. `wake_seconds` is how long
    a request waits for a machine that sleeps to wake.
    """

    def __init__(self, agent_timeout: float) -> None:
        self._agent_timeout = agent_timeout
        self.wake_seconds = 0.0
        self.changes = 0
        self._agents: dict[AgentId, AgentState] = {}
        self._identities = Identities()
        self._online: set[AgentId] = set()
        self.models = ModelIndex(self._agents, self._online)
        self._cloud = CloudModels()
        self._capabilities: dict[str, list[str]] = {}

    @property
    def api_keys(self) -> Mapping[str, str]:
        """The API keys of Ollamas that an operator added, by their URLs."""
        return self._identities.api_keys

    @property
    def agent_timeout(self) -> float:
        """After how many seconds of silence an agent is offline."""
        return self._agent_timeout

    @agent_timeout.setter
    def agent_timeout(self, seconds: float) -> None:
        self._agent_timeout = seconds
        self.changes += 1

    def __iter__(self) -> Iterator[AgentState]:
        return iter(self._agents.values())

    def __len__(self) -> int:
        return len(self._agents)

    def get(self, agent_id: str) -> AgentState:
        """The agent with this id.

        Raises:
            UnknownAgent: there is none.
        """
        agent = self._agents.get(AgentId(agent_id))
        if agent is None:
            raise UnknownAgent(agent_id)
        return agent

    def find(self, agent_id: AgentId) -> AgentState | None:
        """The agent with this id, or `None` when it was removed meanwhile."""
        return self._agents.get(agent_id)

    # ── identity ──────────────────────────────────────────────────────────────────────────────

    def register(
        self,
        request: RegisterRequest,
        new_id: AgentId,
        at: datetime,
        now: float,
        *,
        host: str = "",
        answering: Container[AgentId] = (),
        believed: Judgement = always,
        yields: Judgement = always,
    ) -> Registration:
        """Add an agent, or renew the one that `agent_match.match` finds.

        `host` is what its address was resolved to, if it is a name. The `answering` agents live,
        although they are not online. A registration that tells less of who it is than a living
        agent does not change it: it gets that agent's id for the same Ollama, else one of its own.
        Only an agent for whom it is `believed` to speak is renewed; a living one with the same
        Ollama stays, unless it `yields`.

        Raises:
            TwoMachines: two that are online report the same Ollama, and this one was replaced.
            NotItsOllama: a living agent that does not yield has this Ollama.
        """

        def lives(agent: AgentState) -> bool:
            return agent.id in answering or self.is_online(agent, now)

        where = endpoints(request, host)
        self.changes += 1
        for other in self._of_others(where, believed):
            if lives(other) and agent_match.identifies_less(request, other):
                return Registration(other, created=False)
            if lives(other) and not yields(other):
                raise NotItsOllama(other)
        known = agent_match.match(request, filter(believed, self), lives, host)
        if known is not None and lives(known) and agent_match.identifies_less(request, known):
            if known.endpoints & where:
                return Registration(known, created=False)
            known = None
        if known is None:
            agent = AgentState(new_id, request, registered_at=at, heard_at=now, host=host)
            self._agents[new_id] = agent
            self._identities.add(agent)
            replaced = self._take_over(agent)
            self._come(new_id)
            return Registration(agent, created=True, replaced=replaced)
        before = known.url
        self._identities.discard(known)
        agent_match.renew(known, request, host)
        self._identities.add(known)
        replaced = self._take_over(known)
        if not request.link:
            known.unlinked_at = None
        if known.left or known.url != before:
            known.resting, known.cooldown = False, None
        self._hasten(known, now)
        self.heard(known, now)
        return Registration(known, created=False, replaced=replaced)

    def renews(
        self, request: RegisterRequest, now: float, believed: Judgement, *, host: str = ""
    ) -> bool:
        """Whether a registration renews an agent, or else makes one.

        Raises:
            TwoMachines: as `register`.
        """

        def is_online(agent: AgentState) -> bool:
            return self.is_online(agent, now)

        known = agent_match.match(request, filter(believed, self), is_online, host)
        if known is None:
            return False
        is_less = is_online(known) and agent_match.identifies_less(request, known)
        return not is_less or bool(known.endpoints & endpoints(request, host))

    def _of_others(
        self, where: frozenset[tuple[str, int]], believed: Judgement
    ) -> list[AgentState]:
        """The agents at some endpoints for whom nobody is believed to speak."""
        found = [self._agents[one] for one in sorted(self._identities.at(where))]
        return [agent for agent in found if not believed(agent)]

    def doubtful(
        self,
        request: RegisterRequest,
        now: float,
        *,
        host: str = "",
        believed: Judgement = always,
    ) -> AgentState | None:
        """An agent that is away, which a registration at another address would renew by its name.

        If it still answers there, it is another machine.

        Raises:
            TwoMachines: as `register`.
        """

        def is_online(agent: AgentState) -> bool:
            return self.is_online(agent, now)

        known = agent_match.match(request, filter(believed, self), is_online, host)
        if known is None or self.is_online(known, now):
            return None
        if known.endpoints & endpoints(request, host):
            return None
        ids = (known.registration.machine_id, request.machine_id)
        return known if None in ids or ids[0] != ids[1] else None

    def _take_over(self, agent: AgentState) -> tuple[AgentState, ...]:
        """Nobody else represents the agent's Ollama from now on; those that did until now."""
        same = [self._agents[agent_id] for agent_id in self._identities.same_ollama(agent)]
        replaced = tuple(other for other in same if not other.left)
        for other in replaced:
            agent_match.replace(agent, other.registration, by=agent.registration.instance_id)
            other.left = True
            self._go(other.id)
        return replaced

    def _is_replaced(self, agent: AgentState) -> bool:
        """Whether another agent, which is online, represents its Ollama."""
        return agent.left and not self._online.isdisjoint(self._identities.same_ollama(agent))

    def restore(self, agent: AgentState, now: float) -> None:
        """Add an agent from the database, as it was when it was last heard."""
        self._agents[agent.id] = agent
        self._identities.add(agent)
        self.models.relist(agent, {})
        same = [self._agents[one] for one in self._identities.same_ollama(agent)]
        if all(one.left or one.heard_at <= agent.heard_at for one in same):
            self._take_over(agent)
        else:  # of an earlier version, which took one Ollama for several
            agent.left = True
        if agent.status(now, self.agent_timeout) is not AgentStatus.OFFLINE:
            self._come(agent.id)
        else:
            agent.asleep = agent.registration.sleeps
        self.changes += 1

    def remove(self, agent_id: AgentId) -> AgentState:
        """Forget an agent.

        Raises:
            UnknownAgent: there is none.
        """
        agent = self.get(agent_id)
        self._identities.discard(agent)
        self._go(agent.id)
        self.models.drop(agent, agent.inventory.available)
        del self._agents[agent.id]
        self.changes += 1
        return agent

    def update_settings(self, agent_id: AgentId, settings: AgentSettings) -> AgentState:
        """Replace what the operator set.

        Raises:
            UnknownAgent: there is none.
        """
        agent = self.get(agent_id)
        self._identities.discard(agent)
        agent.settings = settings
        self._identities.add(agent)
        self.changes += 1
        return agent

    # ── liveness ──────────────────────────────────────────────────────────────────────────────

    def heartbeat(self, report: HealthReport, now: float) -> AgentState:
        """Take a report, with the lists of models that it may contain.

        Raises:
            UnknownAgent: no agent has the reported id, or another process registered as it since.
            msgspec.DecodeError: its `tags` or `ps` are not Ollama's lists.
        """
        agent = self.get(report.agent_id)
        registered = agent.registration.instance_id
        if None not in (registered, report.instance_id) and registered != report.instance_id:
            raise UnknownAgent(report.agent_id)
        if self._is_replaced(agent):
            raise UnknownAgent(report.agent_id)
        if report.tags is not UNSET and not agent.has_older_list(report, now):
            contents, broken = report.model_contents, report.broken_models
            self.list_models(agent, bytes(report.tags), report.model_blobs, now, contents, broken)
        if report.ps is not UNSET:
            self.list_loaded(agent, bytes(report.ps), now)
        if not report.ollama_running:
            self._forget_runners(agent)
        elif not agent.ollama_running:
            self._hasten(agent, now)
        if agent.take(report):
            self.changes += 1
        self.heard(agent, now)
        if report.leaving:
            agent.leave(asleep=report.asleep)
            self._go(agent.id)
            self.changes += 1
        return agent

    def conflict(self, agent: AgentState, now: float) -> str | None:
        """What an operator should do about another online agent that may be taken for this one."""
        others = self._identities.alike(agent)
        if not others or not self.is_online(agent, now):
            return None
        alike = (self._agents[agent_id] for agent_id in others)
        return agent_match.conflict(agent, [one for one in alike if self.is_online(one, now)])

    def view(
        self, agent: AgentState, now: float, *, last_seen: datetime, in_flight: int
    ) -> AgentView:
        """An agent as the API shows it; `last_seen` is its `heard_at` in UTC."""
        status, conflict = agent.status(now, self.agent_timeout), self.conflict(agent, now)
        return view_of(agent, status, conflict, last_seen=last_seen, in_flight=in_flight)

    def note_probe(self, agent: AgentState, version: str, passes: frozenset[str]) -> bool:
        """What an answered probe says of the Ollama; whether that is news."""
        known = agent.registration
        version = printable(version[:VERSION_CHARACTERS]) or known.ollama_version
        if (known.ollama_version, agent.passes) == (version, passes):
            return False
        agent.registration = structs.replace(known, ollama_version=version)
        agent.passes = passes
        self.changes += 1
        return True

    def heard(self, agent: AgentState, now: float) -> None:
        """The agent was heard, by a heartbeat or an answer."""
        # It may have timed out although `expire` was not called since: it comes back all the same,
        # and `changes` must show it.
        is_back = not self.is_online(agent, now) or agent.id not in self._online
        agent.hear(now)
        # An answer may arrive after its agent was removed: that one stays removed.
        if is_back and agent.id in self._agents:
            self._come(agent.id)
            self.changes += 1

    def forgettable(self, now: float) -> list[AgentState]:
        """The registrations behind which nothing ever answered, and nothing will."""
        return agent_match.forgettable(self._agents.values(), now)

    def link(self, agent: AgentState, now: float) -> None:
        """The agent's link is open: it is back at once, whatever failed when the last one ended."""
        ended, agent.linked, agent.unlinked_at = agent.unlinked_at, True, None
        agent.cooldown, agent.resting = None, False
        if ended is not None:
            cooldowns = agent.model_cooldowns.items()
            kept = {key: one for key, one in cooldowns if one.stuck or one.since < ended}
            agent.model_cooldowns = kept
        self.changes += 1
        self.heard(agent, now)

    def unlink(self, agent: AgentState, now: float) -> None:
        """The agent's link has ended: it gets no request, and is offline if it stays away."""
        agent.linked = False
        if agent.registration.link and not agent.left:
            agent.unlinked_at = now
        self.changes += 1

    def expire(self, now: float) -> list[AgentState]:
        """The agents that went offline since the last call."""
        offline = [
            agent
            for agent in map(self.get, sorted(self._online))
            if agent.status(now, self.agent_timeout) is AgentStatus.OFFLINE
        ]
        for agent in offline:
            self._go(agent.id)
            self.changes += 1
        return offline

    def _come(self, agent_id: AgentId) -> None:
        self._online.add(agent_id)
        self.models.doubt(self._agents[agent_id].inventory.available)
        self.models.touch(self._agents[agent_id].inventory.available)

    def _go(self, agent_id: AgentId) -> None:
        self._online.discard(agent_id)
        self.models.touch(self._agents[agent_id].inventory.available)

    def next_expiry(self) -> float | None:
        """When the next agent goes offline if nothing is heard from it."""
        return min(
            (self._agents[agent_id].heard_at + self.agent_timeout for agent_id in self._online),
            default=None,
        )

    # ── failures and successes ────────────────────────────────────────────────────────────────

    def fail(
        self, agent: AgentState, reason: str, now: float, *, began: float | None = None
    ) -> None:
        """Take an agent out of rotation until a probe succeeds; the first probe may come at once.

        `began` is when the attempt that failed began; a probe gives none. An Ollama that does not
        answer a probe either will be another process when it is back.
        """
        if began is None:
            self._forget_runners(agent)
        elif agent.bad_since is None:
            agent.bad_since = now
        cooldown = cooldown_after(agent.cooldown, reason, now, began=began)
        if cooldown is not agent.cooldown:
            agent.cooldown, agent.resting = cooldown, True
            self.changes += 1

    def _hasten(self, agent: AgentState, now: float) -> None:
        """Something says that the agent's Ollama runs again: a probe is due at once."""
        if agent.cooldown is not None:
            agent.cooldown = structs.replace(agent.cooldown, until=min(now, agent.cooldown.until))

    def fail_model(
        self,
        agent: AgentState,
        key: str,
        reason: str,
        now: float,
        *,
        began: float | None = None,
        asked: int = 1,
    ) -> None:
        """One model does not run on this agent, which was asked so often: other agents are
        preferred during its cooldown.
        """
        if agent.bad_since is None:
            agent.bad_since = now
        previous = agent.model_cooldowns.get(key)
        if previous is not None and previous.stuck:
            return
        agent.model_cooldowns[key] = model_cooldown_after(
            previous, reason, now, began=began, asked=asked
        )
        self.changes += 1

    def note_late(self, agent: AgentState, key: str) -> int:
        """A request of this model is late here: how many were since its last good answer."""
        agent.late[key] = late = agent.late.get(key, 0) + 1
        return late

    def doubt(
        self, agent: AgentState, key: str, reason: str, now: float, *, pause: float = 0.0
    ) -> None:
        """A model may hang on this agent: others are preferred until a probe succeeds.

        The next probe is due after `pause` seconds.
        """
        previous = agent.model_cooldowns.get(key)
        failures = previous.failures + 1 if previous is not None and previous.stuck else 0
        agent.model_cooldowns[key] = Cooldown(failures, now, now + pause, reason, stuck=True)
        self.changes += 1

    def pardon(self, agent: AgentState, key: str) -> None:
        """What a model failed with was not the agent's fault: others said the same."""
        if agent.model_cooldowns.pop(key, None) is not None:
            self.changes += 1

    def _forget_runners(self, agent: AgentState) -> None:
        """Its Ollama is not there: it will be another process when it is back."""
        if agent.model_cooldowns:
            agent.model_cooldowns.clear()
            self.changes += 1
        agent.late.clear()
        agent.wants_restart = False

    def probed(self, agent: AgentState) -> None:
        """The agent's Ollama answered a probe: it is back in rotation."""
        if agent.resting:
            agent.resting = False
            self.changes += 1

    def answered(self, agent: AgentState) -> None:
        """Its Ollama did what it was asked: earlier failures are forgotten."""
        if agent.resting:
            self.changes += 1
        agent.cooldown, agent.resting = None, False

    def succeeded(self, agent: AgentState, key: str, context_length: int | None = None) -> None:
        """A request was served: earlier failures are forgotten, and the model is in memory.

        `context_length` is what the request asked for, if anything.
        """
        self.answered(agent)
        agent.proven, agent.bad_since = True, None
        agent.late.pop(key, None)
        agent.wants_restart = False
        if agent.model_cooldowns.pop(key, None) is not None:
            self.changes += 1
        if agent.inventory.note_loaded(key, context_length):
            self._loaded_changed(agent, [key])

    def prove(self, agents: Iterable[AgentId]) -> None:
        """These agents have answered requests well before the coordinator's last start."""
        for agent_id in agents:
            if (agent := self.find(agent_id)) is not None:
                agent.proven = True

    # ── which models ──────────────────────────────────────────────────────────────────────────

    def list_models(
        self,
        agent: AgentState,
        tags: bytes,
        blobs: Mapping[str, str],
        now: float,
        contents: Mapping[str, str] = EMPTY,
        broken: Mapping[str, str] = EMPTY,
    ) -> bool:
        """Read an agent's `/api/tags`, with what it read on its disk; whether its models changed.

        Raises:
            msgspec.DecodeError: the body is not Ollama's list.
        """
        before = agent.inventory.available
        changed = agent.inventory.read_tags(tags, blobs, contents, broken)
        if changed:
            for digest, capabilities in self._capabilities.items():
                agent.inventory.note_capabilities(digest, capabilities)
        agent.inventory.sampled_at = now
        if changed and agent.id in self._agents:
            self.models.relist(agent, before)
            self.changes += 1
        return changed

    def list_loaded(self, agent: AgentState, ps: bytes, now: float) -> bool:
        """Read an agent's `/api/ps`; whether the models in its memory changed.

        Raises:
            msgspec.DecodeError: the body is not Ollama's list.
        """
        before = list(agent.inventory.loaded)
        changed = agent.inventory.read_ps(ps)
        agent.inventory.sampled_at = now
        if changed:
            self._loaded_changed(agent, [*before, *agent.inventory.loaded])
        return changed

    def show(self, key: str, digest: str, content: str) -> None:
        """What `/api/show` says of a manifest, as `shown_content` reads it."""
        self.models.show(key, digest, content)
        self.changes += 1

    def learn_capabilities(self, digest: str, capabilities: list[str]) -> None:
        """What the model with this manifest can do, as `/api/show` says; kept for later lists."""
        self._capabilities[digest] = capabilities
        if len(self._capabilities) > MOST_SHOWN:
            del self._capabilities[next(iter(self._capabilities))]
        for agent in self:
            self.models.touch(agent.inventory.note_capabilities(digest, capabilities))
        self.changes += 1

    def note_missing(self, agent: AgentState, key: str) -> None:
        """The agent answered that it lacks a model that it listed."""
        alike = agent.inventory.namesakes(key)
        agent.inventory.note_missing(key)
        agent.outdated = b""
        self._cloud.withdraw(key, agent)
        self.models.drop(agent, [key])
        self._loaded_changed(agent, alike)

    def note_unloaded(self, agent: AgentState, key: str) -> None:
        """The agent was asked to unload a model, with every name of the same weights."""
        agent.inventory.note_unloaded(agent.inventory.namesakes(key))
        self._loaded_changed(agent, [key])

    def _loaded_changed(self, agent: AgentState, keys: Iterable[str]) -> None:
        """These models were loaded or unloaded, with every name of the same weights."""
        for key in keys:
            self.models.touch(agent.inventory.namesakes(key))
        self.changes += 1

    def holders(self, key: str) -> list[AgentState]:
        """Every agent, online or not, that has the preferred content of the model, by id.

        Agents with another content under this name are not included.
        """
        return [self._agents[agent_id] for agent_id in self.models.holders(key)]

    def offer(self, key: str, name: str, agents: Iterable[AgentId]) -> None:
        """Exactly these agents can pass the name of a cloud model on without a stub."""
        if self._cloud.make(key, name, agents, self):
            self.changes += 1

    def servers(self, key: str) -> list[AgentState]:
        """Every agent that may serve the model: its holders, and those that can pass it on."""
        holders = self.holders(key)
        offered = [agent for id in sorted(self._cloud.of(key)) if (agent := self.find(id))]
        return [*holders, *(agent for agent in offered if agent not in holders)]

    def is_online(self, agent: AgentState, now: float) -> bool:
        """Whether the agent is online; a draining one is."""
        return agent.status(now, self.agent_timeout) is not AgentStatus.OFFLINE

    def is_reachable(self, agent: AgentState, now: float) -> bool:
        """Whether its Ollama can be asked something: online or draining, and in rotation."""
        return self.is_online(agent, now) and agent.out_of_rotation() is None

    def is_routable(self, agent: AgentState, now: float) -> bool:
        """Whether it may get a new request: online, not draining, and in rotation."""
        return (
            agent.status(now, self.agent_timeout) is AgentStatus.ONLINE
            and agent.out_of_rotation() is None
        )
