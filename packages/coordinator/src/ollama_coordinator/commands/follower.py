"""The coordinator's picture in another process: a snapshot, its differences, and coming back."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import aiohttp
import msgspec

AGAIN_SECONDS = 1.0
SILENCE_SECONDS = 40.0
"""The coordinator sends a beat every 15 seconds at least."""

LONGEST_LINE_BYTES = 64 * 1024 * 1024

State = dict[str, Any]


class Follower:
    """Follows the event stream for ever; `state` is empty until the first snapshot.

    `problem` says why there is no stream just now.
    """

    def __init__(self, url: str) -> None:
        self._url = f"{url.rstrip('/')}/dashboard/events"
        self._last_id = ""
        self.state: State = {}
        self.problem: str | None = None

    async def follow(self) -> AsyncGenerator[State, None]:
        """The picture each time it changed, and when the stream is lost."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=SILENCE_SECONDS)
        async with aiohttp.ClientSession(
            timeout=timeout, read_bufsize=LONGEST_LINE_BYTES
        ) as session:
            while True:
                try:
                    async for _ in self._events(session):
                        self.problem = None
                        yield self.state
                    self.problem = "the coordinator has stopped"
                except (aiohttp.ClientError, TimeoutError, ValueError) as exc:
                    self.problem = str(exc) or "the coordinator does not answer"
                yield self.state
                await asyncio.sleep(AGAIN_SECONDS)

    async def _events(self, session: aiohttp.ClientSession) -> AsyncIterator[None]:
        headers = {"last-event-id": self._last_id} if self._last_id else {}
        async with session.get(self._url, headers=headers) as response:
            response.raise_for_status()
            fields: dict[bytes, bytes] = {}
            async for line in response.content:
                name, _, value = line.rstrip(b"\r\n").partition(b": ")
                if name:
                    fields[name] = value
                    continue
                if b"event" in fields:
                    self._take(fields)
                    yield
                fields = {}

    def _take(self, fields: dict[bytes, bytes]) -> None:
        self._last_id = fields.get(b"id", self._last_id.encode()).decode()
        data = msgspec.json.decode(fields.get(b"data", b"{}"))
        if fields.get(b"event") == b"snapshot":
            self.state = data["state"]
        elif fields.get(b"event") == b"patch":
            self.state = merged(self.state, data["patch"])


def merged(target: Any, change: Any) -> Any:
    """A picture after a difference (RFC 7396)."""
    if not isinstance(change, dict):
        return change
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in change.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result
