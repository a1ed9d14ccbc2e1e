"""Watches the agents: marks them offline, probes those in doubt, and learns their models.

An agent's state has five sources: its heartbeats, what they report of its Ollama, the errors of
requests to it, the progress of its answers, and probes of its Ollama. This module sends the probes
where the other four leave a doubt.
"""

import asyncio
import logging
from collections.abc import Iterable
from functools import partial
from math import inf

import msgspec
from msgspec import Struct

from ollama_coordinator_common.types import AgentId, AvailableModel

from .agent_store import AgentStore
from .dispatch import Dispatch, Held
from .model_probes import ModelProbes
from .registry import AgentState, shown_capabilities, shown_content
from .upstream import TimedOut, Unreachable, Upstreams, bearer
from .wake import Waker

log = logging.getLogger(__name__)

PROBE_SECONDS = 2.0
"""A probe's time limit: Ollama answers `/api/version` within milliseconds, also under load."""

LISTS_SECONDS = 120.0
"""Time limit for lists of models. They are read from the disk, which a load or a pull may keep
busy; that an Ollama lists slowly says nothing against it."""

LISTS_WAITED_SECONDS = 1.0
"""How long a probe waits for the lists: an Ollama that comes back should have its models."""

VERSION_BYTES = 16 * 1024
"""Of an answer with a version, and the coordinators that are passed."""

LIST_BYTES = 4 * 1024 * 1024
"""Of a list of models: a row has some 400 bytes, and `MOST_MODELS` rows are read."""

SILENCE_SECONDS = 5.0
"""An attempt without a byte for so long has its agent probed; silence alone is no failure."""

PROBE_AGAIN_SECONDS = 1.0
"""Time between probes of a silent agent after the first one failed."""

SILENT_PROBES = 2
"""Failed probes in a row after which an attempt without a first byte moves to another agent."""

STALLED_PROBES = 5
"""The same for an answer that has begun: no other agent can continue it, so more is waited."""

AFTER_LOAD_SECONDS = 1.0
"""How soon after a load an agent without heartbeats is asked what is in its memory (FLEET-25)."""

LOOP_DETECTED = 508
"""A coordinator's answer to a request that it sent itself."""

SHOW_AGAIN_SECONDS = 30.0
"""Until an agent that did not say what a model consists of is asked again."""

TICK_SECONDS = 0.5
"""How often the agents are looked at; a failure is looked at at once."""


class InCircles(Unreachable):
    """A coordinator that has this one among its agents, or is this one."""

    def __init__(self) -> None:
        super().__init__(
            "is this coordinator itself, or one that has it among its agents: requests would go in"
            " circles; give the address and port of an Ollama"
        )


class VersionReply(Struct, frozen=True):
    """`/api/version`; `coordinators` are the ids of those that a request there passes."""

    version: str = ""
    coordinators: list[str] = []


_version = msgspec.json.Decoder(VersionReply)


class Monitor:
    """Watches the agents; `run` is its loop, the other methods may be called at any time.

    `interval` is the time in seconds between questions to agents that report no models. `models`
    probes models, `waker` wakes machines.
    """

    def __init__(
        self,
        dispatch: Dispatch,
        upstreams: Upstreams,
        agent_store: AgentStore,
        waker: Waker,
        *,
        interval: float,
    ) -> None:
        self._dispatch = dispatch
        self._registry = dispatch.registry
        self._clock = dispatch.clock
        self._upstreams = upstreams
        self._agent_store = agent_store
        self.waker = waker
        self.interval = interval
        self._probes: dict[AgentId, asyncio.Task[None]] = {}
        self._silent: dict[AgentId, tuple[int, float]] = {}  # failed probes in a row, last probe
        self.models = ModelProbes(dispatch, upstreams)
        self._asked_at: dict[AgentId, float] = {}  # for the lists of models
        self._gaps = self._clock.gaps
        self._shown: set[str] = set()  # manifests whose capabilities were asked for
        self._listings: dict[AgentId, asyncio.Task[Unreachable | None]] = {}

    async def run(self) -> None:
        """Watch until cancelled."""
        try:
            while True:
                try:
                    await self._watch()
                except Exception:
                    log.exception("the monitor failed and starts again")
                await asyncio.sleep(TICK_SECONDS)
        finally:
            listings = list(self._listings.values())
            for task in listings:
                task.cancel()
            await asyncio.gather(*listings, return_exceptions=True)

    async def _watch(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for agent in self._registry:
                tasks.create_task(self._greet(agent))
            while True:
                self._look(tasks, self._clock.now())
                await self._pause()

    async def _pause(self) -> None:
        self._dispatch.agent_failed.clear()
        try:
            async with asyncio.timeout(TICK_SECONDS):
                await self._dispatch.agent_failed.wait()
        except TimeoutError:
            pass

    async def _greet(self, agent: AgentState) -> None:
        """After a restart: an Ollama that answers counts as one heartbeat of its agent."""
        if agent.left or agent.id in self._probes:
            return
        try:
            await self._ask_version(agent)
        except Unreachable:
            return
        await self._listed(agent, LISTS_WAITED_SECONDS)
        self._registry.heard(agent, self._clock.now())
        self._dispatch.plan()

    def _look(self, tasks: asyncio.TaskGroup, now: float) -> None:
        for held in self._dispatch.held():
            # Bytes of an answer are a sign of life, whatever becomes of the heartbeats.
            agent, is_answering = held.agent, held.began_at is not None
            if is_answering and held.progress_at > agent.heard_at and not agent.left:
                self._registry.heard(agent, held.progress_at)
        self._note_gone(tasks, now)
        self.waker.look(now)
        self.models.look(tasks, now)
        self._dispatch.take_back()
        silent = self._silent_agents(now)
        awaited = self._awaited_agents(now)
        # After a gap nobody is judged by what was not heard: everybody is asked.
        ask_all, self._gaps = self._clock.gaps != self._gaps, self._clock.gaps
        for agent in self._registry:
            if agent.id in self._probes:
                continue
            asked = agent.id in awaited or (ask_all and not agent.left)
            if asked or self._wants_probe(agent, silent, now):
                task = tasks.create_task(self._probe(agent, doubted=agent.id in silent))
                self._probes[agent.id] = task
                task.add_done_callback(partial(self._probed, agent.id))
        for agent, model in self._embedding():
            self._shown.add(model.digest)
            tasks.create_task(self._ask_capabilities(agent, model))
        is_reachable = partial(self._registry.is_reachable, now=now)
        for agent, key in self._registry.models.to_show(is_reachable):
            tasks.create_task(self._ask_content(agent, key))

    def _note_gone(self, tasks: asyncio.TaskGroup, now: float) -> None:
        """Agents that went offline, and those behind which nothing ever answered."""
        for agent in self._registry.expire(now):
            silent_seconds = round(now - agent.heard_at)
            log.warning("agent offline", extra=_facts(agent, silent_seconds=silent_seconds))
            if agent.registration.sleeps:
                tasks.create_task(self._judge_silence(agent))
            self._dispatch.plan()
        for agent in self._registry.forgettable(now):
            log.warning("agent forgotten: it never answered", extra=_facts(agent, url=agent.url))
            self._registry.remove(agent.id)
            tasks.create_task(self._agent_store.forget(agent.id))

    def _probed(self, agent_id: AgentId, task: asyncio.Task[None]) -> None:
        del self._probes[agent_id]

    # ── probing ───────────────────────────────────────────────────────────────────────────────

    def _wants_probe(self, agent: AgentState, silent: set[AgentId], now: float) -> bool:
        online = agent.is_bare or self._registry.is_online(agent, now)
        if agent.resting and agent.cooldown is not None:
            return online and now >= agent.cooldown.until
        if agent.id in silent:
            failures, asked_at = self._silent.get(agent.id, (0, -inf))
            return now - asked_at >= (PROBE_AGAIN_SECONDS if failures else SILENCE_SECONDS)
        if agent.brings_inventory or not online:
            return False
        # A model was loaded: only its Ollama knows which others had to leave memory for it.
        interval = min(AFTER_LOAD_SECONDS if agent.inventory.is_inferred else inf, self.interval)
        return now - self._asked_at.get(agent.id, -inf) >= interval

    def _awaited_agents(self, now: float) -> set[AgentId]:
        """Agents out of rotation that requests wait for, twice a second."""
        awaited: set[AgentId] = set()
        for key in self._dispatch.wanted():
            servers = self._registry.servers(key)
            if any(self._registry.is_routable(agent, now) for agent in servers):
                continue
            awaited |= {
                agent.id
                for agent in servers
                if agent.resting
                and self._registry.is_online(agent, now)
                and now - self._asked_at.get(agent.id, -inf) >= TICK_SECONDS
            }
        return awaited

    def _silent_agents(self, now: float) -> set[AgentId]:
        """The agents with an attempt that has had no byte for `SILENCE_SECONDS`."""
        silent = {
            held.agent.id
            for held in self._dispatch.held()
            if now - held.progress_at >= SILENCE_SECONDS
        }
        for agent_id in self._silent.keys() - silent:
            del self._silent[agent_id]
        return silent

    async def _probe(self, agent: AgentState, *, doubted: bool) -> None:
        """Probe an Ollama, and list its models where no heartbeat brings them."""
        problem: Unreachable | None = None
        try:
            await self._ask_version(agent)
            if not (agent.brings_inventory or doubted):
                problem = await self._listed(agent, LISTS_WAITED_SECONDS)
        except Unreachable as exc:
            problem = exc
        if problem is not None:
            self._not_answering(agent, str(problem), doubted=doubted)
            return
        if agent.is_bare:
            self._registry.heard(agent, self._clock.now())
        self._silent.pop(agent.id, None)
        if doubted:
            self._silent[agent.id] = (0, self._clock.now())
        if agent.resting:
            self._registry.probed(agent)
            log.info("agent back in rotation", extra=_facts(agent))
        self._dispatch.plan()

    async def _ask_version(self, agent: AgentState) -> None:
        agent.reached = False
        found = await self.version_at(agent.url)
        agent.reached = True
        if self._registry.note_probe(agent, found.version, frozenset(found.coordinators)):
            self._agent_store.keep(agent)

    async def version_at(self, url: str, *, api_key: str = "") -> VersionReply:
        """What the Ollama at a URL says of itself; `api_key` is of one that is not an agent yet.

        Raises:
            InCircles: it is a coordinator that asks this one.
            Unreachable: it does not answer as an Ollama does.
        """
        status, body = await self._upstreams.fetch(
            "GET",
            f"{url}/api/version",
            seconds=PROBE_SECONDS,
            headers=[bearer(api_key)] if api_key else (),
            limit=VERSION_BYTES,
        )
        if status == 401:
            raise Unreachable("asks for an API key (401): add its URL again, with the right one")
        if status == 403:
            raise Unreachable("refuses requests from here; set OLLAMA_HOST=0.0.0.0 on that machine")
        if status not in (200, LOOP_DETECTED):
            raise Unreachable(f"answers /api/version with status {status}")
        try:
            found = _version.decode(body) if status == 200 else VersionReply()
        except msgspec.DecodeError:
            found = VersionReply()  # it answers, and its version is not known
        if status == LOOP_DETECTED or self._upstreams.instance_id in found.coordinators:
            raise InCircles
        return found

    def _not_answering(self, agent: AgentState, reason: str, *, doubted: bool) -> None:
        now = self._clock.now()
        self._asked_at[agent.id] = now
        # A probe before its time, since somebody waits, does not put the next one off.
        is_early = agent.resting and agent.cooldown is not None and now < agent.cooldown.until
        if (agent.resting or not doubted) and not is_early:
            self._dispatch.take_out(agent, reason)
        failures = self._silent.get(agent.id, (0, 0.0))[0] + 1
        self._silent[agent.id] = (failures, now)
        if failures == SILENT_PROBES and not agent.resting:
            self._dispatch.take_out(agent, reason)
        for held in self._lost(agent, failures, now):
            held.lose(f"agent {agent.name} does not answer any more: {reason}")

    def _lost(self, agent: AgentState, failures: int, now: float) -> Iterable[Held]:
        """The silent attempts on an agent that are lost after so many failed probes."""
        for held in list(self._dispatch.held()):
            silent = held.agent is agent and now - held.progress_at >= SILENCE_SECONDS
            if silent and failures >= (SILENT_PROBES if held.began_at is None else STALLED_PROBES):
                yield held

    async def _judge_silence(self, agent: AgentState) -> None:
        """One that is known to sleep, and fell silent, sleeps if nothing at all answers there.

        A machine that refuses a connection, or accepts it, is awake. Nothing can be asked where it
        is reached by a link alone.
        """
        where = agent.registration
        try:
            if not where.link:
                async with self._clock.timeout(PROBE_SECONDS):
                    port = where.relay_port or where.ollama_port
                    _, writer = await asyncio.open_connection(where.ip_address, port)
                writer.close()
                return
        except ConnectionError:
            return
        except (OSError, UnicodeError) as exc:  # a TimeoutError is one
            log.debug("nothing answers", extra=_facts(agent, reason=str(exc)))
        now = self._clock.now()
        if self._registry.find(agent.id) is agent and not self._registry.is_online(agent, now):
            agent.asleep = True
            self._registry.changes += 1
            log.info("agent sleeps", extra=_facts(agent))
            self._dispatch.plan()

    # ── models of agents that do not report them ──────────────────────────────────────────────

    async def look_at(self, agent: AgentState, *, seconds: float) -> None:
        """Learn an agent's models now; returns after `seconds`, though the lists may come later.

        An Ollama that does not say its version in that time leaves rotation.
        """
        problem: Exception | None
        began = self._clock.now()
        try:
            async with self._clock.timeout(seconds):
                await self._ask_version(agent)
            problem = await self._listed(agent, began + seconds - self._clock.now(), anew=True)
        except (TimeoutError, Unreachable) as exc:
            if isinstance(exc, TimeoutError) and self._clock.has_lagged_since(began):
                self._asked_at.pop(agent.id, None)  # it is asked again
                return
            problem = exc
        if problem is not None:
            reason = str(problem) or f"no answer within {seconds:g} s"
            log.warning("agent's Ollama not reached", extra=_facts(agent, url=agent.way))
            self._dispatch.take_out(agent, reason)
        self._dispatch.plan()

    async def answers(self, agent: AgentState) -> bool:
        """Whether an Ollama answers at the agent's address now."""
        try:
            await self.version_at(agent.url)
        except Unreachable:
            return False
        return True

    async def refresh(
        self, agents: Iterable[AgentState], *, older_than: float, seconds: float
    ) -> None:
        """List the models of routable agents again that were listed `older_than` seconds ago.

        Returns after `seconds` at most.
        """
        now = self._clock.now()
        stale = [
            agent
            for agent in agents
            if self._registry.is_routable(agent, now)
            and (agent.inventory.is_inferred or self._is_stale(agent, now, older_than))
        ]
        if not stale:
            return
        await asyncio.wait([self._listing(agent) for agent in stale], timeout=seconds)

    def _is_stale(self, agent: AgentState, now: float, older_than: float) -> bool:
        asked_at = self._asked_at.get(agent.id, -inf)
        return not agent.brings_inventory and now - asked_at > older_than

    async def _listed(
        self, agent: AgentState, seconds: float, *, anew: bool = False
    ) -> Unreachable | None:
        """Wait for an agent's lists; why there are none, and `None` also where they are late.

        `anew`: a list that was asked for before does not count.
        """
        listing = self._listing(agent, anew=anew)
        await asyncio.wait([listing], timeout=max(seconds, 0.0))
        return listing.result() if listing.done() and not listing.cancelled() else None

    def _listing(
        self, agent: AgentState, *, anew: bool = False
    ) -> "asyncio.Task[Unreachable | None]":
        """The task that reads the lists of an agent; several may wait for it."""
        before = self._listings.get(agent.id)
        if before is not None and not anew:
            return before

        async def read() -> Unreachable | None:
            try:
                if before is not None:
                    await asyncio.wait([before])
                await self._ask_models(agent)
            except TimedOut:
                log.warning("agent lists its models late", extra=_facts(agent, url=agent.url))
            except Unreachable as exc:
                return exc
            finally:
                if self._listings.get(agent.id) is asyncio.current_task():
                    del self._listings[agent.id]
            self._dispatch.plan()
            return None

        self._asked_at[agent.id] = self._clock.now()
        task = self._listings[agent.id] = asyncio.create_task(read())
        return task

    async def _ask_models(self, agent: AgentState) -> None:
        """Read the lists of the agent's Ollama into the registry.

        Raises:
            Unreachable: it does not list its models.
        """
        self._asked_at[agent.id] = self._clock.now()
        bodies = []
        for path in ("/api/tags", "/api/ps"):
            status, body = await self._upstreams.fetch(
                "GET", agent.url + path, seconds=LISTS_SECONDS, limit=LIST_BYTES
            )
            if status != 200:
                raise Unreachable(f"answers {path} with status {status}")
            bodies.append(body)
        now = self._clock.now()
        try:
            known = agent.inventory
            changed = self._registry.list_models(
                agent, bodies[0], known.blobs, now, known.contents, known.broken
            )
            self._registry.list_loaded(agent, bodies[1], now)
            agent.note_listed(now)
        except msgspec.DecodeError as exc:
            raise Unreachable(f"lists its models in no form of Ollama's: {exc}") from exc
        if changed:
            self._agent_store.keep(agent)

    def _embedding(self) -> list[tuple[AgentState, AvailableModel]]:
        """Models that embedded, of which no list says whether they also complete."""
        found = {}
        for key, agent in self._dispatch.take_embedded().items():
            row = agent.inventory.available.get(key)
            if row is not None and not row.model.capabilities:
                found[row.model.digest] = (agent, row.model)
        return [found[digest] for digest in found.keys() - self._shown]

    async def _ask_capabilities(self, agent: AgentState, model: AvailableModel) -> None:
        """Learn what a model can do: one that completes embeds with all its slots (SCHED-26)."""
        capabilities = shown_capabilities(await self._show(agent, model.name) or b"{}")
        if capabilities:
            self._registry.learn_capabilities(model.digest, capabilities)
            self._dispatch.plan()

    async def _ask_content(self, agent: AgentState, key: str) -> None:
        """Learn what an agent has under a name of which others have another manifest."""
        row = agent.inventory.available.get(key)
        if row is None:
            return
        content = shown_content(await self._show(agent, row.model.name) or b"{}")
        if content:
            self._registry.show(key, row.model.digest, content)
            self._dispatch.plan()
        else:
            await asyncio.sleep(SHOW_AGAIN_SECONDS)
            self._registry.models.doubt([key])

    async def _show(self, agent: AgentState, name: str) -> bytes:
        """An agent's answer to `/api/show`; empty where it gives none that can be read."""
        # Older Ollamas read `name` in place of `model`.
        body = msgspec.json.encode({"model": name, "name": name})
        try:
            status, answer = await self._upstreams.fetch(
                "POST", f"{agent.url}/api/show", seconds=LISTS_SECONDS, body=body
            )
            shown_capabilities(answer)  # it is Ollama's answer
        except (Unreachable, msgspec.DecodeError):
            return b""
        return answer if status == 200 else b""


def _facts(agent: AgentState, **more: object) -> dict[str, object]:
    return {"agent_id": agent.id, "agent": agent.name, **more}
