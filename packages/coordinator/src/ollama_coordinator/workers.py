"""Several processes of one coordinator on one machine: each serves clients, one of them leads.

They are coordinators that share a database (`Cluster`), and the sockets on which clients connect.
This process only starts them, starts those anew that die, kills those that are frozen, and ends
with them.
"""

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from ctypes import c_ulonglong
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess

from ollama_coordinator_common.error import ConfigError, OllamaCoordinatorError
from ollama_coordinator_common.settings import CoordinatorConfig

from .db import SharedDatabase, database_of
from .server import Stop, listen
from .tls import Tls

log = logging.getLogger(__name__)

AGAIN_SECONDS = 1.0
"""Between the death of a process and the start of the next one."""

BEAT_SECONDS = 0.5
"""Between two beats of a process, and between two looks at them."""

SILENT_LOOKS = 4
"""A process without a beat for so many looks is frozen: for 2 s; another one leads within 3 s.
It beats in a thread of its own, which no long work of its event loop holds up. Looks are counted
and no seconds, as this process may be frozen too."""

FAILED = 1
"""The exit code of a process that has said why it cannot serve; another one could not either."""

Work = Callable[[CoordinatorConfig, list[socket.socket]], None]


class WorkerFailed(OllamaCoordinatorError):
    """A process of several could not serve, and has said why."""


def check(config: CoordinatorConfig) -> None:
    """Whether several processes can serve with these settings.

    Raises:
        ConfigError: they cannot.
    """
    if sys.platform == "win32":
        expected = "Windows gives one process the port; leave it at 1"
        raise ConfigError("COORDINATOR_WORKERS", config.workers, expected)
    database = database_of(config.database_url)
    if not isinstance(database, SharedDatabase) or database.name == "in memory":
        expected = "a database in memory is one process's alone; give a file, or leave it at 1"
        raise ConfigError("COORDINATOR_WORKERS", config.workers, expected)


async def supervise(config: CoordinatorConfig, work: Work) -> None:
    """Have so many processes serve until a signal; each runs `work`.

    Raises:
        ConfigError: the address cannot be listened on, or the certificate not used.
        WorkerFailed: a process could not serve.
    """
    check(config)
    await asyncio.to_thread(Tls, config)  # a certificate is made by one process, not by each
    stop = Stop()
    with stop.on_signals():
        listening = listen(config.host, config.port)
        try:
            workers = Workers(config, work, listening)
            await workers.run(stop)
        finally:
            for sock in listening:
                sock.close()


class Beats:
    """The beats of one process: `count` is in memory that it shares with this one.

    It has no lock, which a frozen process might hold.
    """

    def __init__(self, count: c_ulonglong) -> None:
        self.count = count
        self._seen = 0
        self._silent = 0

    def look(self) -> bool:
        """Whether the process is frozen; one that starts has not beaten yet, and is not."""
        count = self.count.value
        self._silent = self._silent + 1 if count == self._seen and count else 0
        self._seen = count
        return self._silent >= SILENT_LOOKS


class Workers:
    """The processes, with their beats."""

    def __init__(
        self, config: CoordinatorConfig, work: Work, listening: list[socket.socket]
    ) -> None:
        self._config = config
        self._work = work
        self._listening = listening
        self._running: dict[SpawnProcess, Beats] = {}
        self._changed = asyncio.Event()
        self._has_failed = False

    async def run(self, stop: Stop) -> None:
        """Run them until a signal, and to their end.

        Raises:
            WorkerFailed: one could not serve.
        """
        for _ in range(self._config.workers):
            self._start()
        told = asyncio.create_task(self._pass_on(stop))
        looking = asyncio.create_task(self._kill_frozen())
        try:
            while self._running:
                await self._changed.wait()
                self._changed.clear()
                if self._has_failed:
                    stop.asked.set()
                while not stop.asked.is_set() and len(self._running) < self._config.workers:
                    log.error("a process died; another one starts")
                    await asyncio.sleep(AGAIN_SECONDS)
                    if not stop.asked.is_set():
                        self._start()
        finally:
            told.cancel()
            looking.cancel()
            for process in self._running:
                process.kill()
        if self._has_failed:
            raise WorkerFailed("one of the processes could not serve")

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        beats = Beats(context.RawValue(c_ulonglong, 0))
        process = context.Process(
            target=_run,
            args=(self._work, self._config, self._listening, beats.count),
            daemon=False,
        )
        process.start()
        self._running[process] = beats
        asyncio.get_running_loop().add_reader(process.sentinel, self._ended, process)

    def _ended(self, process: SpawnProcess) -> None:
        asyncio.get_running_loop().remove_reader(process.sentinel)
        process.join()
        self._running.pop(process, None)
        self._has_failed = self._has_failed or process.exitcode == FAILED
        self._changed.set()

    async def _kill_frozen(self) -> None:
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            for process, beats in self._running.items():
                if beats.look():
                    log.error("a process is frozen; it is killed", extra={"pid": process.pid})
                    process.kill()

    async def _pass_on(self, stop: Stop) -> None:
        """Pass signals on; they come here alone."""
        for asked in (stop.asked, stop.insisted):
            await asked.wait()
            for process in self._running:
                if process.pid is not None:
                    os.kill(process.pid, signal.SIGTERM)


def _run(
    work: Work,
    config: CoordinatorConfig,
    listening: list[socket.socket],
    count: c_ulonglong,
) -> None:
    """In a process of its own: serve, and end with the one that started it."""
    os.setsid()  # a Ctrl-C of the terminal would come twice
    parent = multiprocessing.parent_process()
    if parent is not None:
        watch = threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True)
        watch.start()
    threading.Thread(target=_beat, args=(count,), daemon=True).start()
    work(config, listening)


def _beat(count: c_ulonglong) -> None:
    while True:
        count.value += 1
        time.sleep(BEAT_SECONDS)


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
