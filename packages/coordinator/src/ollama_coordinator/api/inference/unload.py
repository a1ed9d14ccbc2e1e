"""Dropping a model from memory: asked of one Ollama, done by the whole fleet."""

import asyncio
from collections.abc import Iterable

import msgspec

from ollama_coordinator.agent_queries import Answer
from ollama_coordinator.api.http.errors import JSON, HttpError, send_whole
from ollama_coordinator.model_probes import STUCK
from ollama_coordinator.parts import Parts
from ollama_coordinator.registry import AgentState
from ollama_coordinator.scheduler import ModelNotFound
from ollama_coordinator.upstream import Unreachable

from .relay import Call

MAKE_ROOM_SECONDS = 5.0
"""Ollama answers a request to unload at once."""


UNLOADED_SECONDS = 5.0
"""A runner that nobody uses has ended by then; Ollama waits that long for a GPU's memory."""

LISTED_AGAIN_SECONDS = 0.1
"""How often it is looked meanwhile."""


async def unload_everywhere(parts: Parts, call: Call) -> None:
    """Answer the client with one agent's `unload` object.

    Raises:
        HttpError: no agent has the model, or some still have it in memory.
        HoldersUnavailable: those that have it cannot be asked now.
        Unreachable: none of them answered.
    """
    request = call.request
    try:
        holders = await parts.queries.holders(request.name)
    except ModelNotFound as exc:
        raise HttpError(404, call.route.unknown(request.name)) from exc
    loaded = _loaded_on(parts, request.model)
    asked = parts.queries.reachable(loaded) or ([] if loaded else holders)
    answers = await parts.queries.each(asked, "POST", call.route.path, bytes(call.body))
    for answer in answers:
        if isinstance(answer, Answer) and answer.status == 200:
            parts.registry.note_unloaded(answer.agent, request.model)
    parts.dispatch.plan()
    away = [agent for agent in loaded if agent not in asked]
    still = {agent.name: str(agent.out_of_rotation()) for agent in away}
    if loaded:
        told = zip(asked, answers, strict=True)
        reasons = await asyncio.gather(*(_kept(parts, *one, request.model) for one in told))
        still |= {one.name: why for one, why in zip(asked, reasons, strict=True) if why}
    if still:
        text = "; ".join(f"{name}: {why}" for name, why in sorted(still.items()))
        raise HttpError(503, f"model '{request.name}' is still in memory on {text}")
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
            async with parts.clock.timeout(MAKE_ROOM_SECONDS):
                await parts.queries.ask(agent, "POST", "/api/generate", body)
        except (Unreachable, TimeoutError):
            # The request itself meets the same trouble next, and is retried elsewhere.
            return
        parts.registry.note_unloaded(agent, key)


def _loaded_on(parts: Parts, key: str) -> list[AgentState]:
    """Online agents, also those whose content of this name is not the preferred one."""
    now = parts.clock.now()
    return [
        agent
        for agent in parts.targets.copies(key)
        if agent.inventory.is_loaded(key) and parts.registry.is_online(agent, now)
    ]


async def _kept(
    parts: Parts, agent: AgentState, answer: Answer | Unreachable, key: str
) -> str | None:
    """Why an agent still has the model in memory; `None` if it has not, or our requests use it."""
    if isinstance(answer, Unreachable):
        return str(answer)
    if answer.status != 200:
        return f"it answers {answer.status} to a request to unload"
    try:
        async with parts.clock.timeout(UNLOADED_SECONDS):
            while True:
                if _in_use(parts, agent, key) or not await _lists(parts, agent, key):
                    return None
                await asyncio.sleep(LISTED_AGAIN_SECONDS)
    except (Unreachable, TimeoutError):
        return f"it lists it {UNLOADED_SECONDS:g} s later; it is in use there, or {STUCK}"


async def _lists(parts: Parts, agent: AgentState, key: str) -> bool:
    listed = await parts.queries.ask(agent, "GET", "/api/ps")
    if listed.status == 200:
        parts.registry.list_loaded(agent, listed.body, parts.clock.now())
    return agent.inventory.is_loaded(key)


def _in_use(parts: Parts, agent: AgentState, key: str) -> bool:
    """Whether requests of ours run in it: Ollama drops it when they end."""
    return any(
        lease.agent_id == agent.id and lease.request.model == key
        for lease in parts.scheduler.leases()
    )


def _best(answers: list[Answer | Unreachable]) -> Answer:
    """A success before a refusal before silence."""
    given = [answer for answer in answers if isinstance(answer, Answer)]
    if not given:
        raise next(answer for answer in answers if isinstance(answer, Unreachable))
    return min(given, key=lambda answer: answer.status)
