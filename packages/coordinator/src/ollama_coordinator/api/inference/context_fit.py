"""A request fitted to the fleet before it is scheduled: unfit agents excluded, a context chosen.

A runner with a larger context serves a request for a smaller one: nothing is cut off that would
have fitted. Ollama itself would reload the model. Where such a runner is in memory and none of the
wanted size, the request's `num_ctx` is raised to that runner's, for the scheduler too; this is
the one change that is ever made to a body, and only that number differs. A request without
`num_ctx` is raised only where its context would be known: the agent's reported default, and no
context among the model's own parameters.
"""

import asyncio
from collections.abc import Sequence

from msgspec import Struct, structs

from ollama_coordinator.api.http.dialects import Dialect, InferenceRoute
from ollama_coordinator.api.http.json_edit import WINDOW_BYTES, Body, Scan, edited
from ollama_coordinator.api.models.lists import is_older
from ollama_coordinator.parts import Parts
from ollama_coordinator.registry import AgentState
from ollama_coordinator.scheduler import NO_OPTIONS, Kind, Request
from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.types import AgentId

SHOW_SECONDS = 1.0
"""How long a request waits for the model's own parameters."""

SINCE = {
    "/v1/responses": "0.14.0",
    "/v1/messages": "0.14.0",
    "/v1/audio/transcriptions": "0.24.0",
}
"""The first version of Ollama with a route, for the routes that old versions lack."""


class Fitted(Struct, frozen=True):
    """A request and its body as they go on; `note` is a header's value, for the client."""

    request: Request
    body: Body
    note: str = ""


class ContextFit:
    """Fits requests to the fleet; the setting `larger_context` off leaves every body alone."""

    def __init__(self, parts: Parts) -> None:
        self._registry = parts.registry
        self._model_info = parts.model_info
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
        unfit = self._registry.models.strangers(request.model)
        if route.path in SINCE:
            unfit |= _too_old([*holders, *offered], SINCE[route.path])
        if unfit:
            request = request.without(unfit)
        context = await self._context(route, request, holders)
        raised = None if context is None else await self._raised(body, context)
        if context is None or raised is None:
            return Fitted(request, body)
        wanted = request.options.num_ctx or "default"
        options = structs.replace(request.options, num_ctx=context)
        note = f"num_ctx={context}; wanted={wanted}"
        return Fitted(structs.replace(request, options=options), raised, note)

    async def _raised(self, body: Body, context: int) -> Body | None:
        """The body with this `num_ctx`; `None` where it has no place, or no wish, for it."""
        async with self._turn:
            members = await Scan(body).members()
            truncate = None if members is None else members.get("truncate")
            if truncate is not None and body[truncate.start : truncate.start + 5] == b"false":
                return None  # the client wants an error for what does not fit
            span = None if members is None else members.get("options")
            options = b"{}" if span is None else span.of(body) if len(span) <= WINDOW_BYTES else b""
            number = str(context).encode()
            if options in (b"{}", b"null"):
                return await edited(body, {"options": b'{"num_ctx":' + number + b"}"})
            changed = await edited(options, {"num_ctx": number}) if options else None
            return None if changed is None else await edited(body, {"options": bytes(changed)})

    async def _context(
        self, route: InferenceRoute, request: Request, holders: Sequence[AgentState]
    ) -> int | None:
        """The smallest larger context in memory, unless one that fits exactly is there too."""
        if not self._settings.config.larger_context or route.dialect is not Dialect.NATIVE:
            return None
        if route.kind is Kind.EMBED:
            return None  # Ollama cuts the text at `num_ctx`: more of it has another vector
        options = request.options
        if structs.replace(options, num_ctx=None) != NO_OPTIONS:
            return None  # something else may force a reload, and then the wanted size is right
        best: int | None = None
        for has, default in self._in_memory(request.model, holders):
            wants = options.num_ctx or default
            if wants <= 0 or has < wants:
                continue
            if has == wants:
                return None
            best = has if best is None else min(best, has)
        if best is not None and options.num_ctx is None and await self._has_own(request.name):
            return None
        return best

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
            async with asyncio.timeout(SHOW_SECONDS):
                return await self._model_info.context_parameter(name) is not None
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
