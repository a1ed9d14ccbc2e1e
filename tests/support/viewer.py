"""A viewer of the dashboard's event stream: keeps the state as the page does."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from support.deadline import DEADLINE_SECONDS


def merge(target: Any, change: Any) -> Any:
    """RFC 7396."""
    if not isinstance(change, dict):
        return change
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in change.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


class Viewer:
    """`state` is the state so far, `events` the kinds of what came, `last_id` the newest id."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.state: dict[str, Any] = {}
        self.extra: dict[str, Any] = {}
        self.events: list[str] = []
        self.last_id = ""
        self.ended = False

    async def next(self) -> str:
        """Read one event; its kind, empty at the end of the stream."""
        fields: dict[str, str] = {}
        while True:
            line = (await self.response.content.readline()).decode()
            if not line:
                self.ended = True
                return ""
            name, _, value = line.rstrip("\n").partition(": ")
            if name and value:
                fields[name] = value
            elif not line.strip() and "event" in fields:
                self._take(fields)
                return fields["event"]

    def _take(self, fields: dict[str, str]) -> None:
        self.events.append(fields["event"])
        self.last_id = fields.get("id", self.last_id)
        data = json.loads(fields["data"])
        if fields["event"] == "snapshot":
            self.state, self.extra = data["state"], data
        elif fields["event"] == "patch":
            self.state = merge(self.state, data["patch"])

    async def until(self, condition: Callable[[dict[str, Any]], Any]) -> None:
        """Read until the state is so."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not condition(self.state):
                assert await self.next(), "the stream has ended"


@asynccontextmanager
async def viewing(url: str, last_id: str = "") -> AsyncIterator[Viewer]:
    """A viewer that has read the first event, of the coordinator at `url`."""
    headers = {"last-event-id": last_id} if last_id else {}
    async with (
        aiohttp.ClientSession(read_bufsize=2**22) as session,
        session.get(f"{url}/dashboard/events", headers=headers) as response,
    ):
        assert response.status == 200
        viewer = Viewer(response)
        await viewer.next()
        yield viewer
