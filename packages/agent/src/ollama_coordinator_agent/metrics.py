"""CPU, memory, disk and GPU readings, taken in one thread; no network, no asyncio."""

import logging
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import pynvml  # type: ignore[import-untyped]
from msgspec import Struct

from ollama_coordinator_common.types import Gpu

log = logging.getLogger(__name__)

FIRST_SAMPLE_SECONDS = 0.2
"""The time that the first CPU reading averages over; later ones cover the whole interval."""

DUTY = 20
"""Listing every connection is slow on a busy machine: it takes at most a twentieth of the time."""


class Readings(Struct, frozen=True):
    """One reading of the machine; `connections` is `None` where the system does not show them."""

    cpu_percent: float = 0.0
    memory_percent: float = 0.0
    memory_total_bytes: int | None = None
    disk_free_bytes: int | None = None
    gpus: list[Gpu] = []
    connections: int | None = None


class Meter:
    """Reads the machine every few seconds in a thread of its own; `latest` is the last reading.

    The thread is a daemon: a graphics driver that hangs must not keep the agent from ending.
    """

    def __init__(self, *, ollama_port: int, disk: Path, interval_seconds: float = 2.0) -> None:
        self.latest = Readings()
        self.ready = threading.Event()
        self._ollama_port = ollama_port
        self._disk = disk
        self._interval_seconds = interval_seconds
        self._stop = threading.Event()
        self._gpus = Nvidia()
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
            started = time.monotonic()
            try:
                self.latest = self.read()
            except Exception:  # a driver may raise anything; the readings go on
                log.exception("the machine could not be read; the last readings stand")
            self.ready.set()
            took = time.monotonic() - started
            if self._stop.wait(max(self._interval_seconds, DUTY * took)):
                return

    def read(self) -> Readings:
        """A reading of the machine; the CPU's share is that since the previous one."""
        memory = psutil.virtual_memory()
        return Readings(
            cpu_percent=psutil.cpu_percent(),
            memory_percent=memory.percent,
            memory_total_bytes=memory.total,
            disk_free_bytes=_free_bytes(self._disk),
            gpus=self._gpus.read() or built_in(platform.system(), platform.machine()),
            connections=connections_to(self._ollama_port),
        )


class Nvidia:
    """NVIDIA's driver; where there is none, it is looked for again after some readings."""

    RETRY_AFTER_READINGS = 30
    """A minute at the usual interval: loading the library again is slow."""

    def __init__(self) -> None:
        self._is_open = False
        self._skip = 0

    def read(self) -> list[Gpu]:
        """Every NVIDIA GPU; none without a driver."""
        if self._skip:
            self._skip -= 1
            return []
        try:
            if not self._is_open:
                pynvml.nvmlInit()
                self._is_open = True
            return [_gpu(index) for index in range(pynvml.nvmlDeviceGetCount())]
        except pynvml.NVMLError:
            self._is_open = False
            self._skip = self.RETRY_AFTER_READINGS
            return []


def built_in(system: str, processor: str) -> list[Gpu]:
    """The GPU of Apple's own processors; it shares the machine's memory and has no readings.

    `system` and `processor` are `platform.system()` and `platform.machine()`.
    """
    return [Gpu(name="Apple GPU")] if (system, processor) == ("Darwin", "arm64") else []


def _gpu(index: int) -> Gpu:
    """One GPU; a reading that its driver does not support is `None`."""
    device = pynvml.nvmlDeviceGetHandleByIndex(index)
    name = pynvml.nvmlDeviceGetName(device)
    memory = _reading(pynvml.nvmlDeviceGetMemoryInfo, device)
    load = _reading(pynvml.nvmlDeviceGetUtilizationRates, device)
    return Gpu(
        name=name.decode() if isinstance(name, bytes) else name,
        index=index,
        memory_total_bytes=memory and memory.total,
        memory_used_bytes=memory and memory.used,
        utilization_percent=load and float(load.gpu),
        temperature_celsius=_reading(_temperature, device),
    )


def _temperature(device: object) -> float:
    return float(pynvml.nvmlDeviceGetTemperature(device, pynvml.NVML_TEMPERATURE_GPU))


def _reading(read: Callable[[object], Any], device: object) -> Any:
    try:
        return read(device)
    except pynvml.NVMLError:
        return None


def _free_bytes(folder: Path) -> int | None:
    """The free space where `folder` is, or will be."""
    for place in (folder, *folder.parents):
        try:
            return psutil.disk_usage(str(place)).free
        except OSError:
            continue
    return None


def connections_to(port: int) -> int | None:
    """How many connections other processes have to a local port; `None` where that is not shown.

    An upper bound of the requests in progress: a client that keeps an idle connection open counts
    too. The agent's own connections (probes, the relay) do not. macOS shows them to root only.
    """
    try:
        # Our own are listed before and after: a probe may begin or end in between.
        own = _own_ends()
        everyone = psutil.net_connections("tcp")
        own |= _own_ends()
    except (psutil.Error, OSError):
        return None
    return sum(
        c.status == psutil.CONN_ESTABLISHED and c.laddr.port == port and _end(c.raddr) not in own
        for c in everyone
        if c.laddr and c.raddr
    )


def _own_ends() -> set[tuple[str, int]]:
    return {_end(c.laddr) for c in psutil.Process().net_connections("tcp") if c.laddr}


def _end(address: Any) -> tuple[str, int]:
    """One end of a connection; a socket for both families shows IPv4 inside IPv6."""
    return address.ip.removeprefix("::ffff:"), address.port
