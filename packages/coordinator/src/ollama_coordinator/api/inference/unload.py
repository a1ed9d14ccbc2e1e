"""Dropping a model from memory: asked of one Ollama, done by the whole fleet."""

import asyncio
from collections.abc import Iterable

import msgspec

from ollama_coordinator.agent_queries import Answer
from ollama_coordinator.api.http.errors import JSON, HttpError, send_whole
from ollama_coordinator.parts import Parts
from ollama_coordinator.registry import AgentState
from ollama_coordinator.scheduler import ModelNotFound
from ollama_coordinator.upstream import Unreachable

from .relay import Call

MAKE_ROOM_SECONDS = 5.0
"""Ollama answers a request to unload at once."""


async def unload_everywhere(parts: Parts, call: Call) -> None:
    """Answer the client with one agent's `unload` object.

    Raises:
        HttpError: no agent has the model.
        HoldersUnavailable: those that have it cannot be asked now.
        Unreachable: none of them answered.
    """
    request = call.request
    try:
        holders = await parts.queries.holders(request.name)
    except ModelNotFound as exc:
        raise HttpError(404, call.route.missing.format(name=request.name)) from exc
    answers = await parts.queries.each(
        _loaded_on(parts, request.model) or holders, "POST", call.route.path, bytes(call.body)
    )
    for answer in answers:
        if isinstance(answer, Answer) and answer.status == 200:
            parts.registry.note_unloaded(answer.agent, request.model)
    parts.dispatch.plan()
    answer = _best(answers)
    await send_whole(call.send, answer.status, [(b"content-type", JSON.encode())], answer.body)


async def make_room(parts: Parts, agent: AgentState, keys: Iterable[str]) -> None:
    """Have an agent drop models before another is loaded; gives up where it does not answer."""
    for key in keys:
        row = agent.inventory.available.get(key)
        if row is None:
            continue
        body = msgspec.json.encode({"model": row.model.name, "keep_alive": 0})
        try:
            async with asyncio.timeout(MAKE_ROOM_SECONDS):
                await parts.queries.ask(agent, "POST", "/api/generate", body)
        except (Unreachable, TimeoutError):
            # The request itself meets the same trouble next, and is retried elsewhere.
            return
        parts.registry.note_unloaded(agent, key)


def _loaded_on(parts: Parts, key: str) -> list[AgentState]:
    """Also agents whose content of this name is not the preferred one."""
    loaded = [agent for agent in parts.targets.copies(key) if agent.inventory.is_loaded(key)]
    return parts.queries.reachable(loaded)


def _best(answers: list[Answer | Unreachable]) -> Answer:
    """A success before a refusal before silence."""
    given = [answer for answer in answers if isinstance(answer, Answer)]
    if not given:
        raise next(answer for answer in answers if isinstance(answer, Unreachable))
    return min(given, key=lambda answer: answer.status)
