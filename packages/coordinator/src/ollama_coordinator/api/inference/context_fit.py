"""A request fitted to the fleet before it is scheduled: unfit agents excluded, a context chosen.

A long prompt without `num_ctx` goes to agents whose context it fits in.

A runner with a larger context serves a request for a smaller one: nothing is cut off that would
have fitted. Ollama itself would reload the model. So on an agent that has such a runner in memory
the request's `num_ctx` is raised to that runner's, and only that number differs: the one change
that is ever made to a body. A request without `num_ctx` is raised only where its context would be
known: the agent's reported default, and no context among the model's own parameters.
"""

import asyncio
from collections.abc import Mapping, Sequence

from msgspec import Struct, structs

from ollama_coordinator.api.http.dialects import Dialect, InferenceRoute
from ollama_coordinator.api.http.json_edit import WINDOW_BYTES, Body, Scan, edited
from ollama_coordinator.api.models.lists import is_known, is_older
from ollama_coordinator.parts import Parts
from ollama_coordinator.registry import AgentState
from ollama_coordinator.scheduler import NO_OPTIONS, Kind, Request
from ollama_coordinator.scheduler.memory import Fit, MemoryLimits
from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.types import AgentId

SHOW_SECONDS = 1.0
"""How long a request waits for the model's own parameters."""

LOOK_SECONDS = 1.0
"""How long a long prompt waits to learn what a machine without an agent has in memory."""

RESERVE_FACTOR = 1.1
RESERVE_TOKENS = 256
"""What a prompt needs beside its estimate, which may be off by a tenth, and for the answer."""

MOST_GROWTH = 2
"""A `num_ctx` up to so many times that of a runner has grown; a larger one is another use."""

SHORT_NEED = 2048
"""Ollama's smallest default context, that of its old versions: what fits there fits everywhere."""

BY_MEMORY = "0.15.5"
GIBIBYTE = 2**30
CONTEXT_BY_MEMORY = ((47 * GIBIBYTE, 262_144), (23 * GIBIBYTE, 32_768), (0, 4_096))
"""Ollama's default context from this version on, by all GPUs' memory (some GiB below the nominal
48 and 24, which drivers do not report in full)."""

STRANGER = "it has another model of this name"
TOO_OLD = "its Ollama is too old for this route"
UNKNOWN = "its context is not known, and the prompt is long"

SINCE = {
    "/v1/responses": "0.14.0",
    "/v1/messages": "0.14.0",
    "/v1/audio/transcriptions": "0.24.0",
}
"""The first version of Ollama with a route, for the routes that old versions lack."""


class Fitted(Struct, frozen=True):
    """A request and its body as they go on; `note` is a header's value, for the client.

    `raised` is the body for a runner with the context `raised_to`, where one is in memory. `small`:
    the contexts of the agents that are asked only after others, as the prompt may not fit there;
    `None` where that is not known.
    """

    request: Request
    body: Body
    note: str = ""
    raised: Body | None = None
    raised_to: int | None = None
    small: Mapping[AgentId, int | None] = {}


class ContextFit:
    """Fits requests to the fleet; the setting `larger_context` off leaves every body alone."""

    def __init__(self, parts: Parts) -> None:
        self._registry = parts.registry
        self._model_info = parts.model_info
        self._monitor = parts.monitor
        self._clock = parts.clock
        self._settings = parts.settings
        self._turn = parts.reading
        self._contexts: dict[str, tuple[int, list[tuple[int, int]]]] = {}

    async def fit(
        self,
        route: InferenceRoute,
        request: Request,
        body: Body,
        holders: Sequence[AgentState],
        offered: Sequence[AgentState],
    ) -> Fitted:
        """The request less the agents that cannot serve it, on a context that is in memory.

        `holders` have the preferred content of the model; `offered` pass its name on to ollama.com.
        """
        unfit = dict.fromkeys(self._registry.models.strangers(request.model), STRANGER)
        if route.path in SINCE:
            unfit |= dict.fromkeys(_too_old([*holders, *offered], SINCE[route.path]), TOO_OLD)
        holders = [agent for agent in holders if agent.id not in unfit]
        too_small, too_long, small = await self._too_small(route, request, holders)
        unfit |= too_small
        if unfit:
            request = request.unfit_for(unfit)
            holders = [agent for agent in holders if agent.id not in unfit]
        context = await self._context(route, request, holders)
        if context is None:
            grown = await self._grown(route, request, body, holders)
            if grown is not None:
                return grown
        raised = None if context is None else await self._raised(body, context)
        if context is None or raised is None:
            return Fitted(request, body, too_long, small=small)
        request = structs.replace(request, larger=True)
        return Fitted(request, body, too_long, raised, context, small)

    async def at(self, fitted: Fitted, agent: AgentState) -> tuple[Body, str, int | None]:
        """The body for this agent, the note for the client, and the context that it asks for.

        A runner there with a larger context serves the request: its `num_ctx` becomes that one's.
        """
        request, wanted = fitted.request, fitted.request.options.num_ctx
        if agent.id in fitted.small:
            context = fitted.small[agent.id] or "unknown"
            return fitted.body, f"num_ctx={context}; prompt={request.prompt_tokens}", wanted
        has = _loaded_context(agent, request.model) if request.larger else None
        if has is None or has <= (wanted or _default_context(agent) or has):
            return fitted.body, fitted.note, wanted
        same = has == fitted.raised_to
        raised = fitted.raised if same else await self._raised(fitted.body, has)
        if raised is None:
            return fitted.body, fitted.note, wanted
        return raised, f"num_ctx={has}; wanted={wanted or 'default'}", has

    async def _raised(self, body: Body, context: int) -> Body | None:
        """A copy of the body with this `num_ctx`; `None` where it has no place, or wish, for it.

        The body itself stays: it may go to another agent next.
        """
        async with self._turn:
            members = await Scan(body).members()
            truncate = None if members is None else members.get("truncate")
            if truncate is not None and body[truncate.start : truncate.start + 5] == b"false":
                return None  # the client wants an error for what does not fit
            span = None if members is None else members.get("options")
            options = b"{}" if span is None else span.of(body) if len(span) <= WINDOW_BYTES else b""
            number = str(context).encode()
            if options in (b"{}", b"null"):
                return await edited(bytearray(body), {"options": b'{"num_ctx":' + number + b"}"})
            changed = await edited(options, {"num_ctx": number}) if options else None
            if changed is None:
                return None
            return await edited(bytearray(body), {"options": bytes(changed)})

    async def _too_small(
        self, route: InferenceRoute, request: Request, holders: Sequence[AgentState]
    ) -> tuple[dict[AgentId, str], str, dict[AgentId, int | None]]:
        """The holders whose context a long prompt does not fit in, where another's is larger.

        With the note for the client, and their contexts.

        Ollama drops the middle of such a prompt without a word. Where nobody has a context that is
        large enough, the largest there is serves it, and the note says so.
        """
        need = int(request.prompt_tokens * RESERVE_FACTOR) + RESERVE_TOKENS
        if request.options.num_ctx is not None or request.kind is Kind.EMBED or need <= SHORT_NEED:
            return {}, "", {}
        now = self._clock.now()
        online = [agent for agent in holders if self._registry.is_routable(agent, now)]
        bare = [agent for agent in online if not agent.brings_inventory]
        if bare:
            await asyncio.gather(
                *(self._monitor.look_at(one, seconds=LOOK_SECONDS) for one in bare)
            )
        native = route.dialect is Dialect.NATIVE
        contexts = {agent.id: _known_context(agent, request.model, native) for agent in online}
        if all(context is None or context >= need for context in contexts.values()):
            return {}, "", {}
        if await self._has_own(request.name):
            contexts = {agent.id: _loaded_context(agent, request.model) for agent in online}
        known = {agent: context for agent, context in contexts.items() if context is not None}
        largest = max(known.values(), default=0)
        least = min(need, largest)
        if len(known) < len(contexts) and largest < need:
            least = need  # one of those that are not known may be large enough
        unfit = {
            agent: f"its context of {context} tokens is too small for a prompt of about"
            f" {request.prompt_tokens}"
            for agent, context in known.items()
            if context < least
        }
        if largest >= need:
            unfit |= {agent: UNKNOWN for agent, context in contexts.items() if context is None}
        too_long = largest < need and len(known) == len(contexts)
        note = f"num_ctx={largest}; prompt={request.prompt_tokens}" if too_long else ""
        return unfit, note, {agent: contexts[agent] for agent in unfit}

    def _may_change(self, route: InferenceRoute, request: Request) -> bool:
        """Whether a larger context than the wanted one would do as well."""
        if not self._settings.config.larger_context or route.dialect is not Dialect.NATIVE:
            return False
        if route.kind is Kind.EMBED:
            return False  # Ollama cuts the text at `num_ctx`: more of it has another vector
        # Something else may force a reload, and then the wanted size is right.
        return structs.replace(request.options, num_ctx=None) == NO_OPTIONS

    async def _context(
        self, route: InferenceRoute, request: Request, holders: Sequence[AgentState]
    ) -> int | None:
        """The smallest context in memory that is larger than what would be loaded there, if any."""
        if not self._may_change(route, request):
            return None
        options = request.options
        larger = [
            has
            for has, default in self._in_memory(request.model, holders)
            if 0 < (options.num_ctx or default) < has
        ]
        if larger and options.num_ctx is None and await self._has_own(request.name):
            return None
        return min(larger, default=None)

    async def _grown(
        self, route: InferenceRoute, request: Request, body: Body, holders: Sequence[AgentState]
    ) -> Fitted | None:
        """The request with its `num_ctx` rounded up to a power of two; `None` if it stays as it is.

        A conversation that asks for a little more each time would reload the model each time. So
        where all runners in memory are smaller and one not by much, the next one has room to grow,
        if the agents with such runners have the memory for it.
        """
        wanted, key = request.options.num_ctx or 0, request.model
        rounded = 1 << max(wanted - 1, 0).bit_length()
        if not self._may_change(route, request) or rounded == wanted:
            return None
        runners = [
            (agent, has)
            for agent in holders
            if agent.inventory.loaded and (has := _loaded_context(agent, key)) is not None
        ]
        largest = max((has for _, has in runners), default=0)
        if not largest < wanted <= MOST_GROWTH * largest:
            return None
        rounded = min(rounded, await self._trained(request.name) or rounded)
        if rounded <= wanted or not all(_has_room(agent, key, rounded) for agent, _ in runners):
            return None
        raised = await self._raised(body, rounded)
        if raised is None:
            return None
        options = structs.replace(request.options, num_ctx=rounded)
        note = f"num_ctx={rounded}; wanted={wanted}"
        return Fitted(structs.replace(request, options=options), raised, note)

    async def _trained(self, name: str) -> int | None:
        try:
            async with self._clock.timeout(SHOW_SECONDS):
                return await self._model_info.trained_context(name)
        except (OllamaCoordinatorError, TimeoutError):
            return None

    def _in_memory(self, key: str, holders: Sequence[AgentState]) -> list[tuple[int, int]]:
        """The context of every runner in memory, and its agent's default (0: not known)."""
        if not holders:
            return []  # not remembered: clients ask for any name
        changes, found = self._contexts.get(key, (-1, []))
        if changes != self._registry.changes:
            now = self._clock.now()
            found = [
                (context, _default_context(agent))
                for agent in holders
                if agent.inventory.loaded
                and self._registry.is_routable(agent, now)
                and (context := _loaded_context(agent, key)) is not None
            ]
            self._contexts[key] = (self._registry.changes, found)
        return found

    async def _has_own(self, name: str) -> bool:
        """Whether the model's own parameters set a context; assumed where no answer comes soon."""
        try:
            async with self._clock.timeout(SHOW_SECONDS):
                return await self._model_info.number_parameter(name, "num_ctx") is not None
        except (OllamaCoordinatorError, TimeoutError):
            return True


def _too_old(agents: Sequence[AgentState], since: str) -> frozenset[AgentId]:
    """The agents older than the route; none if all are, so that the client gets Ollama's 404."""
    old = [agent.id for agent in agents if is_older(agent.registration.ollama_version, since)]
    return frozenset(old) if len(old) < len(agents) else frozenset()


def _loaded_context(agent: AgentState, key: str) -> int | None:
    runner = agent.inventory.runner(key)
    return runner.model.context_length if runner is not None else None


def _default_context(agent: AgentState) -> int:
    runner = agent.report.runner if agent.report is not None else None
    return (runner.context_length or 0) if runner is not None else 0


def _has_room(agent: AgentState, key: str, context: int) -> bool:
    """Whether the runner there, with a context of so many tokens, fits beside the others for sure.

    What it takes beside its weights grows with the context at most.
    """
    runner, on_disk = agent.inventory.runner(key), agent.inventory.available.get(key)
    if runner is None or on_disk is None or not (runner.model.size and runner.model.context_length):
        return False
    beside = max(runner.model.size - on_disk.model.size, 0)
    memory = runner.model.size + beside * (context / runner.model.context_length - 1)
    loaded = agent.inventory.loaded.values()
    others = sum(row.model.size for row in loaded if row is not runner)
    limits = MemoryLimits()
    limits.read(agent)
    return limits.fit(int(memory), others, len(loaded)) is Fit.YES


def _known_context(agent: AgentState, key: str, native: bool) -> int | None:
    """The context that a request without `num_ctx` finds there; `None` where that is not known.

    A runner in memory with a larger context than the default stays for native requests only: those
    of other dialects cannot ask for it, and Ollama reloads the model.
    """
    loaded, default = _loaded_context(agent, key), _default_context(agent) or _by_memory(agent)
    if loaded is None or (default and not native):
        return default or loaded
    return loaded


def _by_memory(agent: AgentState) -> int:
    """The default that follows from the GPUs' memory, where that is so and known; else 0."""
    report, version = agent.report, agent.registration.ollama_version
    if report is None or report.runner is None or not is_known(version):
        return 0
    if is_older(version, BY_MEMORY):
        return 0
    total = sum(gpu.memory_total_bytes or 0 for gpu in report.gpus)
    return next(context for least, context in CONTEXT_BY_MEMORY if total >= least)
