"""The way to a client: bytes go out at once, and whether it reads them is known."""

import asyncio

from .framing import Dates


class Line:
    """Writes to one connection. `choked` while the client does not read what it is sent."""

    __slots__ = ("_dates", "_flows", "_transport", "choked", "ending")

    def __init__(self, transport: asyncio.Transport, dates: Dates) -> None:
        self._transport = transport
        self._dates = dates
        self._flows = asyncio.Event()
        self.choked = False
        self.ending = False
        """The answer that begins next is the last one."""

    def write(self, data: bytes) -> None:
        """Send; what does not go out is kept until it does, unless nobody is there any more."""
        if not self._transport.is_closing():
            self._transport.write(data)

    def common_headers(self) -> bytes:
        """The lines that every answer has."""
        return self._dates.lines()

    def choke(self) -> None:
        """The client does not read."""
        self.choked = True
        self._flows.clear()

    def clear(self) -> None:
        """It reads again, or is gone."""
        self.choked = False
        self._flows.set()

    async def flowing(self) -> None:
        """Wait until it reads again."""
        await self._flows.wait()
