"""Dropping a model from memory: asked of one Ollama, done by the whole fleet."""

import asyncio
from collections.abc import Iterable

import msgspec

from ollama_coordinator.agent_queries import AgentQueries, Answer
from ollama_coordinator.api.http.errors import JSON, HttpError, send_whole
from ollama_coordinator.dispatch import Dispatch
from ollama_coordinator.registry import AgentState, Registry
from ollama_coordinator.scheduler import ModelNotFound
from ollama_coordinator.upstream import Unreachable

from .relay import Call

MAKE_ROOM_SECONDS = 5.0
"""Ollama answers a request to unload at once."""


class Unloading:
    """Passes a request to unload to every agent that has the model in memory."""

    def __init__(self, asking: AgentQueries, registry: Registry, dispatch: Dispatch) -> None:
        self._asking = asking
        self._registry = registry
        self._dispatch = dispatch

    async def everywhere(self, call: Call) -> None:
        """Answer the client with one agent's `unload` object.

        Raises:
            HttpError: no agent has the model.
            HoldersUnavailable: those that have it are away.
            Unreachable: none of them answered.
        """
        request = call.request
        try:
            holders = await self._asking.holders(request.name)
        except ModelNotFound as exc:
            raise HttpError(404, call.surface.missing.format(name=request.name)) from exc
        answers = await self._asking.each(
            self._loaded_on(request.model) or holders, "POST", call.surface.path, call.body
        )
        for answer in answers:
            if isinstance(answer, Answer) and answer.status == 200:
                self._registry.note_unloaded(answer.agent, request.model)
        self._dispatch.plan()
        told = _most_telling(answers)
        await send_whole(call.send, told.status, [(b"content-type", JSON.encode())], told.body)

    async def make_room(self, agent: AgentState, keys: Iterable[str]) -> None:
        """Have an agent drop models before another is loaded; what does not answer is left."""
        for key in keys:
            row = agent.inventory.available.get(key)
            if row is None:
                continue
            body = msgspec.json.encode({"model": row.model.name, "keep_alive": 0})
            try:
                async with asyncio.timeout(MAKE_ROOM_SECONDS):
                    await self._asking.ask(agent, "POST", "/api/generate", body)
            except (Unreachable, TimeoutError):
                # The request that comes next meets the same trouble, and knows what to do about it.
                return
            self._registry.note_unloaded(agent, key)

    def _loaded_on(self, key: str) -> list[AgentState]:
        """Also agents whose content of this name is not the preferred one."""
        copies = [self._registry.get(agent_id) for agent_id in self._registry.copies(key)]
        loaded = [agent for agent in copies if agent.inventory.is_loaded(key)]
        return self._asking.reachable(loaded)


def _most_telling(answers: list[Answer | Unreachable]) -> Answer:
    """A success before a refusal before silence."""
    given = [answer for answer in answers if isinstance(answer, Answer)]
    if not given:
        raise next(answer for answer in answers if isinstance(answer, Unreachable))
    return min(given, key=lambda answer: answer.status)
