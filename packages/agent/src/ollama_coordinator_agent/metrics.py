"""CPU, memory, disk and GPU readings, taken in one thread; no network, no asyncio."""

import logging
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
from msgspec import Struct

from ollama_coordinator_common.types import Gpu

from .gpus import Gpus

log = logging.getLogger(__name__)

FIRST_SAMPLE_SECONDS = 0.2
"""The time that the first CPU reading averages over; later ones cover the whole interval."""

DUTY = 20
"""Listing every connection is slow where there are many: it takes at most a twentieth of a core.

Only the processor's time counts: where others use it, or a driver is waited for, that costs nobody,
and readings would be minutes old on the very machines whose load matters.
"""


class Readings(Struct, frozen=True):
    """One reading of the machine; `requests` is `None` where the system does not show them."""

    cpu_percent: float = 0.0
    memory_percent: float = 0.0
    memory_total_bytes: int | None = None
    disk_free_bytes: int | None = None
    gpus: list[Gpu] = []
    requests: int | None = None


class Meter:
    """Reads the machine every few seconds in a thread of its own; `latest` is the last reading.

    The thread is a daemon: a graphics driver that hangs must not keep the agent from ending.
    """

    def __init__(
        self,
        *,
        ollama_port: int,
        disk: Path,
        folders: Callable[[], Sequence[Path]] = tuple,
        interval_seconds: float = 2.0,
    ) -> None:
        """Prepare; `folders` are where the server keeps its models, `disk` as long as none is."""
        self.latest = Readings()
        self.ready = threading.Event()
        self._ollama_port = ollama_port
        self._disk, self._folders = disk, folders
        self._interval_seconds = interval_seconds
        self._stop = threading.Event()
        self.gpus = Gpus()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        psutil.cpu_percent()
        self._stop.wait(FIRST_SAMPLE_SECONDS)
        while True:
            started = time.thread_time()
            try:
                self.latest = self.read()
            except Exception:  # a driver may raise anything; the readings go on
                log.exception("the machine could not be read; the last readings stand")
            self.ready.set()
            took = time.thread_time() - started
            if self._stop.wait(max(self._interval_seconds, DUTY * took)):
                return

    def read(self) -> Readings:
        """A reading of the machine; the CPU's share is that since the previous one."""
        memory = psutil.virtual_memory()
        return Readings(
            cpu_percent=psutil.cpu_percent(),
            memory_percent=memory.percent,
            memory_total_bytes=memory.total,
            disk_free_bytes=_free_bytes(next(iter(self._folders()), self._disk)),
            gpus=self.gpus.read(),
            requests=requests_at(self._ollama_port),
        )


def _free_bytes(folder: Path) -> int | None:
    """The free space where `folder` is, or will be."""
    for place in (folder, *folder.parents):
        try:
            return psutil.disk_usage(str(place)).free
        except OSError:
            continue
    return None


End = tuple[str, int]

SHOWS_USE = sys.platform == "linux"
"""Whether the system shows which connections are in use; elsewhere idle ones count too."""

ANSWER_GAP_MS = 2000
"""An answer whose last bytes are older is over: Ollama rarely writes a token in more time."""


def requests_at(port: int) -> int | None:
    """How many requests other processes have in progress at a local port; `None`: not shown.

    The agent's own connections (probes, the relay) do not count. Only Linux shows which of the
    others are in use; elsewhere this is an upper bound: an idle connection counts too. macOS shows
    them to root only.
    """
    try:
        # Our own are listed before and after: a probe may begin or end in between.
        own = _own_ends()
        ends = _ends_in_use(port)
        own |= _own_ends()
    except (psutil.Error, OSError):
        return None
    return sum(end not in own for end in ends)


def _ends_in_use(port: int) -> list[End]:
    """The other ends of a local port's connections, without the idle ones where that is known."""
    if sys.platform == "linux":
        try:
            return [end for end, in_use in _ask_kernel(port) if in_use]
        except OSError as exc:  # a sandbox without this interface
            log.debug("the kernel shows no connections", extra={"reason": str(exc)})
    return [
        _end(*c.raddr)
        for c in psutil.net_connections("tcp")
        if c.laddr and c.raddr and c.laddr.port == port and c.status == psutil.CONN_ESTABLISHED
    ]


def _own_ends() -> set[End]:
    """The near ends of this process's connections."""
    if sys.platform != "linux":
        return {_end(*c.laddr) for c in psutil.Process().net_connections("tcp") if c.laddr}
    # By its descriptors: psutil reads the table of all connections of the machine.
    found = (_near_end(int(entry.name)) for entry in Path("/proc/self/fd").iterdir())
    return {end for end in found if end is not None}


def _near_end(descriptor: int) -> End | None:
    """The near end of the connection that a descriptor is, if it is one and still open."""
    with suppress(OSError):
        connection = socket.socket(fileno=descriptor)
        try:
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                return _end(*connection.getsockname()[:2])
        finally:
            connection.detach()
    return None


def _end(host: str, port: int) -> End:
    """One end of a connection; a socket for both families shows IPv4 inside IPv6."""
    return host.removeprefix("::ffff:").partition("%")[0], port


if sys.platform == "linux":
    NETLINK_SOCK_DIAG = 4
    SOCK_DIAG_BY_FAMILY = 20
    DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
    NLMSG_ERROR, NLMSG_DONE = 2, 3
    INET_DIAG_INFO = 2  # the attribute that holds a `struct tcp_info`
    ESTABLISHED = 1
    REPLY_BYTES = 64 * 1024  # the kernel's largest reply is half of that

    def _ask_kernel(port: int) -> Iterator[tuple[End, bool]]:
        """Each established connection to a local port: its other end, and whether it is in use.

        It is while the last bytes are the request's, or those of the answer are new. See
        sock_diag(7); the structures are those of linux/inet_diag.h and linux/tcp.h.

        Raises:
            OSError: the kernel does not answer.
        """
        with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_SOCK_DIAG) as kernel:
            for family in (socket.AF_INET, socket.AF_INET6):
                wanted = 1 << (INET_DIAG_INFO - 1), 1 << ESTABLISHED
                ask = struct.pack("=BBBxI", family, socket.IPPROTO_TCP, *wanted)
                ask += struct.pack("!H46x", port)
                head = struct.pack("=IHHII", 16 + len(ask), SOCK_DIAG_BY_FAMILY, DUMP, 0, 0)
                kernel.sendto(head + ask, (0, 0))
                yield from _parse_dump(kernel, family)

    def _parse_dump(kernel: socket.socket, family: int) -> Iterator[tuple[End, bool]]:
        address_bytes = 4 if family == socket.AF_INET else 16
        while True:
            data = memoryview(kernel.recv(REPLY_BYTES))
            while data:
                length, kind = struct.unpack_from("=IH", data)
                if kind == NLMSG_DONE:
                    return
                if kind == NLMSG_ERROR:
                    raise OSError("no list of connections")
                (port,) = struct.unpack_from("!H", data, 16 + 6)
                address = socket.inet_ntop(family, data[40 : 40 + address_bytes])
                yield (address.removeprefix("::ffff:"), port), _is_in_use(data[88:length])
                data = data[(length + 3) & ~3 :]

    def _is_in_use(attributes: memoryview) -> bool:
        while attributes:
            length, kind = struct.unpack_from("=HH", attributes)
            if kind == INET_DIAG_INFO:
                sent_ms, _, received_ms = struct.unpack_from("=III", attributes, 4 + 44)
                return bool(received_ms < sent_ms or sent_ms < ANSWER_GAP_MS)
            attributes = attributes[(length + 3) & ~3 :]
        return True
