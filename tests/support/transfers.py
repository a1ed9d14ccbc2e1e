"""Pulling and the like in tests: every line of a progress stream, and what must hold of it."""

import json
from typing import Any

import aiohttp

from .coordinator import Running
from .ollama import StandIn

Line = dict[str, Any]


async def lines_of(response: aiohttp.ClientResponse) -> list[Line]:
    """Every line of a stream."""
    return [json.loads(line) async for line in response.content]


async def progress(
    coordinator: Running, path: str, body: Any, headers: dict[str, str] | None = None
) -> list[Line]:
    """The lines that answer a request which must succeed at first."""
    async with coordinator.session.post(
        coordinator.url + path, json=body, headers=headers
    ) as response:
        assert response.status == 200, await response.text()
        return await lines_of(response)


def assert_is_one_clean_stream(lines: list[Line]) -> None:
    """One `success`, last; no error; totals constant; nothing goes backwards."""
    states = [line.get("status") for line in lines]
    assert not [line for line in lines if "error" in line], lines
    assert states.count("success") == 1
    assert states[-1] == "success"
    totals: dict[str, int] = {}
    done: dict[str, int] = {}
    for line in lines:
        digest = line.get("digest")
        if digest is None:
            continue
        assert totals.setdefault(digest, line["total"]) == line["total"]
        assert done.get(digest, 0) <= line.get("completed", 0) <= line["total"]
        done[digest] = line.get("completed", 0)
    assert done == totals


def names(ollama: StandIn) -> list[str]:
    """What is on a stand-in's disk."""
    return sorted(model.name for model in ollama.models)
