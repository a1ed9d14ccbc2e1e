"""A line to a PostgreSQL server that a test can cut and freeze."""

import asyncio
import os
from contextlib import suppress


class Line:
    """Forwards a port of loopback to the server of a URL; `url` is the same database through it."""

    def __init__(self, url: str) -> None:
        from psycopg.conninfo import conninfo_to_dict

        self._given = {key: str(value) for key, value in conninfo_to_dict(url).items()}
        self._url = url
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._port = 0

    @property
    def url(self) -> str:
        _, _, query = self._url.partition("?")
        user, name = self._given.get("user", ""), self._given["dbname"]
        options = [part for part in query.split("&") if part.startswith("options=")]
        return f"postgresql://{user}@127.0.0.1:{self._port}/{name}?{'&'.join(options)}"

    async def __aenter__(self) -> "Line":
        self._flowing.set()
        await self._listen()
        return self

    async def __aexit__(self, *raised: object) -> None:
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Nobody listens any more, and what is open ends."""
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()
        self._flowing.set()

    def freeze(self) -> None:
        """Connections are accepted, and not a byte passes."""
        self._flowing.clear()

    async def mend(self) -> None:
        """The opposite of both."""
        frozen = not self._flowing.is_set()
        self._flowing.set()
        if not frozen:
            await self._listen()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        task = asyncio.create_task(self._forward(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._flowing.wait()
        host, port = self._given.get("host", "127.0.0.1"), self._given.get("port", "5432")
        if host.startswith("/"):
            path = os.path.join(host, f".s.PGSQL.{port}")  # noqa: PTH118
            there, back = await asyncio.open_unix_connection(path)
        else:
            there, back = await asyncio.open_connection(host, int(port))
        self._writers.add(back)
        await asyncio.gather(self._pass(reader, back), self._pass(there, writer))
        self._writers -= {writer, back}

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while piece := await reader.read(65536):
                await self._flowing.wait()
                writer.write(piece)
        writer.close()
