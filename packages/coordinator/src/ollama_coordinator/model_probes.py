"""Finds models that do not answer on an agent whose Ollama does, and probes them with one token.

A runner that hangs is the oldest trouble of Ollama: version and lists answer, and requests wait for
ever. Late requests raise the doubt, and a probe decides. Until one succeeds the agent is asked for
that model only after others. Models that failed there are probed too, once their time is over.
"""

import asyncio
import logging
from contextlib import AsyncExitStack
from functools import partial
from secrets import token_hex
from weakref import WeakValueDictionary

import msgspec
from msgspec import Raw, Struct, structs

from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.types import AgentId

from .dispatch import Dispatch, HandedOver, Held
from .registry import AgentState, AvailableRow
from .scheduler import Kind, Outcome, Request, RequestId, Result, SchedulerError, cost
from .scheduler.eligibility import eligible
from .upstream import (
    SMALL_ANSWER_BYTES,
    ConnectionLost,
    Cut,
    NotConnected,
    Unreachable,
    UpstreamError,
    Upstreams,
    whole,
)

log = logging.getLogger(__name__)

RESTART_SECONDS = 60.0
"""An agent whose Ollama an operator wants restarted sends a heartbeat within this time, or the wish
is void: it must not come true hours later."""

LATE_REQUESTS = 2
"""One may have a prompt that is stranger than it looks. None can follow one in the only slot."""

GAP_SECONDS = 20.0
GAP_TOKENS = 100
"""In mid-stream a silence of both is a sign: a tool call that is held back has fewer tokens."""

TOKEN_SECONDS = 5.0
"""The time limit of a probe, for a slot and then for its token: the model is in memory."""

WELL_SECONDS = 30.0
"""The same for an agent whose runner died, with the load; a client waits for it."""

LISTED_SECONDS = 2.0
"""Time limit for the list of models in memory."""

LONGEST_PAUSE_SECONDS = 30.0
"""Between probes of a model that hangs: 1, 2, 4 … 30 s, as for an agent out of rotation."""

PROBER = "coordinator"
"""The client of a probe's request."""

STUCK = (
    "it hangs: it is in memory and answers nothing; restart Ollama on that machine (`systemctl "
    "restart ollama`, or quit and open its app)"
)


class ModelProbes:
    """Watches the attempts under way; `look` is called twice a second."""

    def __init__(self, dispatch: Dispatch, upstreams: Upstreams) -> None:
        self._dispatch = dispatch
        self._registry = dispatch.registry
        self._clock = dispatch.clock
        self._upstreams = upstreams
        self._running: set[tuple[AgentId, str]] = set()
        self._asking: WeakValueDictionary[tuple[AgentId, str], asyncio.Lock] = WeakValueDictionary()

    def look(self, tasks: asyncio.TaskGroup, now: float) -> None:
        """Find late requests, and start the probes that are due."""
        for held in list(self._dispatch.held()):
            if not held.late and self._is_late(held, now):
                self._note_late(held, now)
        for agent in self._registry:
            for key in agent.model_cooldowns:
                pair = (agent.id, key)
                if pair not in self._running and self._is_due(agent, key, now):
                    self._running.add(pair)
                    task = tasks.create_task(self._probe(agent, key))
                    task.add_done_callback(partial(self._ended, pair))

    def _ended(self, pair: tuple[AgentId, str], task: asyncio.Task[None]) -> None:
        self._running.discard(pair)

    # ── who is late ───────────────────────────────────────────────────────────────────────────

    def _is_late(self, held: Held, now: float, *, longest: bool = False) -> bool:
        """Whether it is silent for much longer than predicted; `longest`: for any answer."""
        lease, scheduler = held.lease, self._dispatch.scheduler
        if lease.request.client == PROBER:
            return False
        if held.records:
            gap = scheduler.token_seconds(lease.agent_id, lease.request.model)
            silent = now - held.progress_at
            return gap is not None and silent > max(GAP_SECONDS, GAP_TOKENS * gap)
        # Bytes that make no record, and no whole answer, are not the answer's beginning.
        silent = now - lease.granted_at
        if silent < cost.LATE_SECONDS:
            return False
        due_at = scheduler.first_byte_at(lease.id, longest=longest)
        if due_at is None or not held.agent.inventory.is_loaded(lease.request.model):
            return False
        return cost.is_late(silent, due_at - lease.granted_at)

    def _note_late(self, held: Held, now: float) -> None:
        agent, model = held.agent, held.lease.request.model
        held.late = True
        late = self._registry.note_late(agent, model)
        log.warning("request late on agent", extra=_facts(agent, model, requests=late))
        is_enough = late >= LATE_REQUESTS or self._all_late(agent, model)
        if is_enough and not agent.is_stuck(model):
            self._registry.doubt(agent, model, "requests are late; it is being probed", now)
            self._dispatch.plan()

    # ── probing ───────────────────────────────────────────────────────────────────────────────

    def _is_due(self, agent: AgentState, key: str, now: float) -> bool:
        """A model that is not in memory would have to be loaded: a client's request tries that."""
        cooldown = agent.model_cooldowns[key]
        if now < cooldown.until or not self._registry.is_routable(agent, now):
            return False
        return cooldown.stuck or agent.probes(key)

    async def _probe(self, agent: AgentState, key: str) -> None:
        """Ask for one token, on a lease as any attempt."""
        try:
            row = await self._in_memory(agent, key)
            if row is None:
                if agent.is_stuck(key):
                    self._registry.pardon(agent, key)
                return
            async with AsyncExitStack() as lease:
                async with self._clock.timeout(TOKEN_SECONDS):
                    granted = self._dispatch.lease(self._request(agent, row))
                    held = await lease.enter_async_context(granted)
                if await self._ask(held, row, TOKEN_SECONDS) is None:
                    self._hangs(agent, key)
        except HandedOver:
            return
        except (TimeoutError, SchedulerError):
            if self._all_hang(agent, key):
                self._hangs(agent, key)
            else:  # every slot is taken by requests of ours, which may be slow only
                self._again(agent, key)
        except Unreachable as exc:
            self._dispatch.take_out(agent, str(exc))
        finally:
            self._dispatch.plan()

    async def _in_memory(self, agent: AgentState, key: str) -> AvailableRow | None:
        """The model's row if Ollama lists it as loaded now.

        Raises:
            Unreachable: it gives no list.
        """
        url = f"{agent.url}/api/ps"
        status, body = await self._upstreams.fetch("GET", url, seconds=LISTED_SECONDS)
        try:
            if status == 200:
                self._registry.list_loaded(agent, body, self._clock.now())
        except msgspec.DecodeError as exc:
            raise Unreachable(f"lists its models in no form of Ollama's: {exc}") from exc
        return agent.inventory.available.get(key) if agent.inventory.is_loaded(key) else None

    def _request(self, agent: AgentState, row: AvailableRow) -> Request:
        others = {one.id for one in self._registry.servers(row.key)} - {agent.id}
        return Request(
            id=RequestId(token_hex(8)),
            model=row.key,
            name=row.model.name,
            arrived_at=self._clock.now(),
            kind=Kind.EMBED if row.embeds else Kind.CHAT,
            client=PROBER,
            output_limit=1,
            options=self._dispatch.scheduler.runner_options(agent.id, row.key),
            excluded=frozenset(others),
        )

    async def _ask(self, held: Held, row: AvailableRow, seconds: float) -> bool | None:
        """Whether the agent answers with a token; `None`: it answered nothing for so long."""
        request, agent = held.lease.request, held.agent
        runner = agent.inventory.runner(row.key)
        path, body = _question(request, runner.model.context_length if runner else None)
        try:
            async with (
                self._clock.timeout(seconds),
                self._upstreams.open(
                    "POST", agent.url + path, body=body, again=lambda _: False
                ) as response,
            ):
                answer = await whole(response, SMALL_ANSWER_BYTES)
        except TimeoutError:
            return None
        except UpstreamError as exc:
            died = isinstance(exc, ConnectionLost | Cut)
            is_gone = isinstance(exc, NotConnected)
            asked = 0 if is_gone else 1
            held.outcome = Outcome(Result.UNREACHABLE, str(exc), died=died, asked=asked)
            return None if is_gone else False
        if agent.is_stuck(row.key):
            self._registry.pardon(agent, row.key)
        if response.status == 200 and _is_answer(answer):
            # Two tokens teach no rate: the scheduler learns nothing from them.
            held.outcome = Outcome(Result.REJECTED)
            self._registry.succeeded(agent, row.key)
            log.info("model answers on agent", extra=_facts(agent, row.key))
            return True
        held.outcome = Outcome(Result.MODEL_FAILED, f"answered {response.status} to a probe")
        return False

    async def was_well(self, agent: AgentState, key: str) -> bool:
        """Whether an agent that never answered was well until it died under a request.

        It was if it answers another one now. It was, too, if its Ollama is gone, or takes too long:
        then nobody else should die of the request. It was not if it fails for others as well.
        """
        asking = self._asking.setdefault((agent.id, key), asyncio.Lock())
        async with asking:  # the next one who wants to know sees what the first one found
            cooldown = agent.model_cooldowns.get(key)
            row = agent.inventory.available.get(key)
            if row is None or (cooldown is not None and cooldown.failures > 1):
                return False
            if agent.proven:
                return True
            try:
                async with (
                    self._clock.timeout(WELL_SECONDS),
                    self._dispatch.lease(self._request(agent, row)) as held,
                ):
                    return await self._ask(held, row, WELL_SECONDS) is not False
            except (TimeoutError, SchedulerError, HandedOver):
                return True
            finally:
                self._dispatch.plan()

    def _there(self, agent: AgentState, key: str) -> list[Held]:
        """The attempts under way of one model on one agent."""
        held = self._dispatch.held()
        return [one for one in held if one.agent is agent and one.lease.request.model == key]

    def _all_late(self, agent: AgentState, key: str) -> bool:
        """Whether late requests have every slot, so that no other can become late."""
        is_full = self._dispatch.scheduler.is_full(agent.id, key)
        return is_full and all(held.late for held in self._there(agent, key))

    def _all_hang(self, agent: AgentState, key: str) -> bool:
        """Whether all that this model has in flight there is silent for longer than any answer
        could take: who waits for a whole answer hears nothing of a long one.
        """
        there, now = self._there(agent, key), self._clock.now()
        return bool(there) and all(
            held.began_at is None and self._is_late(held, now, longest=True) for held in there
        )

    # ── what hangs ────────────────────────────────────────────────────────────────────────────

    def _hangs(self, agent: AgentState, key: str) -> None:
        """No token came although the probe had a slot, or requests as late as any have them all.

        A slot that others use is no proof.
        """
        if _others_use(agent, self._dispatch.scheduler.in_flight(agent.id)):
            self._again(agent, key)
            return
        if agent.model_cooldowns[key].reason != STUCK:
            log.warning("model stuck on agent", extra=_facts(agent, key, reason=STUCK))
        self._again(agent, key, STUCK)
        agent.wants_restart = agent.report is not None
        for held in self._there(agent, key):
            if _is_hung(held) and self._others_serve(held):
                held.move(f"agent {agent.name} does not answer for this model")

    def _again(self, agent: AgentState, key: str, reason: str = "") -> None:
        """The next probe, after a longer pause."""
        now, cooldown = self._clock.now(), agent.model_cooldowns.get(key)
        if cooldown is None or not cooldown.stuck:
            return
        pause = min(2.0 ** min(cooldown.failures, 10), LONGEST_PAUSE_SECONDS)
        self._registry.doubt(agent, key, reason or cooldown.reason, now, pause=pause)

    def _others_serve(self, held: Held) -> bool:
        """Whether another agent may serve a request, on which its model did not fail."""
        request, now = held.lease.request.without([held.agent.id]), self._clock.now()
        found = eligible(self._registry, request, now)
        return any(not one.avoids(request.model, now) for one in found.agents)


class _Token(Struct):
    """What an answer to a probe has."""

    message: Raw = Raw()
    embeddings: Raw = Raw()


_token = msgspec.json.Decoder(_Token)


def _is_answer(body: bytes) -> bool:
    try:
        token = _token.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return bool(bytes(token.message) or bytes(token.embeddings))


def _question(request: Request, context: int | None) -> tuple[str, bytes]:
    """The route and the body of a request for one token, which reloads no runner.

    One that was loaded with a `num_ctx` is reloaded for a request without: it gets its own.
    """
    options = {**structs.asdict(request.options), "num_predict": 1}
    shift = options.pop("shift")
    options["num_ctx"] = options["num_ctx"] or context
    options = {name: value for name, value in options.items() if value is not None}
    body = {"model": request.name, "stream": False, "options": options}
    if shift is not None:
        body["shift"] = shift
    if request.kind is Kind.EMBED:
        return "/api/embed", msgspec.json.encode({**body, "input": "1"})
    messages = [{"role": "user", "content": "1"}]
    return "/api/chat", msgspec.json.encode({**body, "messages": messages})


def take_restart(agent: AgentState, dispatch: Dispatch) -> str | None:
    """Why an agent should restart its Ollama now: a model hangs, and so does all that runs there.

    What hangs there ends with the restart, and is then tried once more. Or an operator asked for
    it, and nothing runs there.
    """
    there = [held for held in dispatch.held() if held.agent is agent]
    asked, now = agent.restart_until, dispatch.clock.now()
    if asked is not None and not there and not _others_use(agent, 0):
        agent.restart_until = None
        if now <= asked:
            agent.announced_at = now
            dispatch.take_out(agent, "its Ollama is being restarted")
            return "an operator asked for it"
    if not agent.wants_restart or _others_use(agent, len(there)) or not all(map(_is_hung, there)):
        return None
    agent.wants_restart = False
    rows = agent.inventory.available.values()
    stuck = [row.model.name for row in rows if agent.is_stuck(row.key)]
    if not stuck:
        return None
    for held in there:
        held.restarts = True
    return f"it does not answer for {', '.join(stuck)}"


def ask_restart(agent: AgentState, dispatch: Dispatch) -> None:
    """Have an agent restart the Ollama that it started, at its next heartbeat.

    Raises:
        CannotRestart: it cannot, or something runs there.
    """
    now = dispatch.clock.now()
    if agent.report is None or not dispatch.registry.is_online(agent, now):
        why = "it has no agent" if agent.is_bare else "its agent is not online"
        raise CannotRestart(agent, f"{why}; restart its Ollama on the machine itself")
    if not agent.report.owned:
        why = "another program started its Ollama; restart it there, as by"
        raise CannotRestart(agent, f"{why} `systemctl restart ollama`")
    here = sum(held.agent is agent for held in dispatch.held())
    running = max(here, agent.report.active_requests)
    if running:
        many = "a request runs" if running == 1 else f"{running} requests run"
        raise CannotRestart(agent, f"{many} there; drain it, and restart it once they have ended")
    agent.restart_until = now + RESTART_SECONDS


class CannotRestart(OllamaCoordinatorError):
    """The Ollama of an agent is not restarted; says why, and what to do."""

    def __init__(self, agent: AgentState, reason: str) -> None:
        super().__init__(f"{agent.name} is not restarted: {reason}")


def _is_hung(held: Held) -> bool:
    """Whether an attempt is known to hang: late without a byte, on a model that is stuck there.

    So does a probe, which is given up by itself.
    """
    request = held.lease.request
    waits = held.began_at is None and held.agent.is_stuck(request.model)
    return waits and (held.late or request.client == PROBER)


def _others_use(agent: AgentState, ours: int) -> bool:
    """Whether the agent reports requests that are not ours: by its count, or beyond so many."""
    report = agent.report
    if report is None:
        return False
    if report.other_requests is not None:
        return report.other_requests > 0
    return report.active_requests > ours


def _facts(agent: AgentState, model: str, **more: object) -> dict[str, object]:
    return {"agent_id": agent.id, "agent": agent.name, "model": model, **more}
