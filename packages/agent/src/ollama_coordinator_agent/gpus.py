"""The machine's GPUs: NVIDIA's by its driver, AMD's and Intel's by Linux' files, Apple's by macOS.

What a source does not give is `None`; nothing here needs a privilege or a program of a vendor.
"""

import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pynvml  # type: ignore[import-untyped]
from msgspec import structs

from ollama_coordinator_common.types import Gpu

AMD, INTEL = "0x1002", "0x8086"
"""PCI's numbers of the makers whose files are read; NVIDIA's driver has an interface of its own."""

SMALLEST_CARD_BYTES = 4 * 1024**3
"""AMD's driver does not say whether a GPU is a part of the processor. Such a one has a small share
of the main memory as its own, and no file that says how busy that is."""

PROCESSORS_GPU = "0000:00:02.0"
"""Where Intel's processors have their GPU on the PCI bus; a card is on another one."""

PCI_IDS = ("usr/share/hwdata/pci.ids", "usr/share/misc/pci.ids")
"""Where Linux distributions keep the names of PCI devices, below the root."""

SMALL_MAC_BYTES = 36 * 1024**3
"""Macs up to this size give their GPU two thirds of the memory, larger ones three quarters: Metal's
`recommendedMaxWorkingSetSize`."""

SYSCTL_SECONDS = 2.0
"""How long macOS may take to tell its processor's name."""


class Gpus:
    """All GPUs of this machine; `root` is where its files are.

    `model_bytes` is what Ollama has in a GPU's memory, by its `/api/ps`.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self.model_bytes = 0
        self._nvidia = Nvidia()
        self._root = root

    def read(self) -> list[Gpu]:
        """Every GPU as it is now, numbered over all makers."""
        if (platform.system(), platform.machine()) == ("Darwin", "arm64"):
            memory = psutil.virtual_memory()
            used = memory.total - memory.available
            name = _sysctl("machdep.cpu.brand_string") or "Apple GPU"
            wired_mebibytes = int(_sysctl("iogpu.wired_limit_mb") or 0)
            return [apple(name, memory.total, used, self.model_bytes, wired_mebibytes * 1024**2)]
        found = [*self._nvidia.read(), *of_kernel(self._root)]
        return [structs.replace(gpu, index=index) for index, gpu in enumerate(found)]


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


def of_kernel(root: Path) -> Iterator[Gpu]:
    """The GPUs of AMD and Intel, by the files of their drivers below `sys/class/drm`.

    The files are those of the kernel's documents on amdgpu, xe, i915 and hwmon. A GPU that sleeps
    is not woken: reading how busy it is would do that.
    """
    cards = (root / "sys/class/drm").glob("card*")
    for card in sorted(card for card in cards if card.name.removeprefix("card").isdigit()):
        device = card / "device"
        vendor = _text(device / "vendor")
        if vendor not in (AMD, INTEL):
            continue
        sleeps = _text(device / "power/runtime_status") == "suspended"
        total = _card_bytes(card, device, vendor)
        yield Gpu(
            name=_name(root, device, vendor),
            memory_total_bytes=total,
            memory_used_bytes=_number(device / "mem_info_vram_used") if total else None,
            utilization_percent=None if sleeps else _number(device / "gpu_busy_percent"),
            temperature_celsius=None if sleeps else _celsius(device),
            integrated=total is None and _is_integrated(device, vendor),
        )


def _card_bytes(card: Path, device: Path, vendor: str) -> int | None:
    """The memory that a card has by itself; `None` where it has none, or its driver hides it.

    Intel's xe has it by tiles; i915 tells it only where Intel's own release of it is installed.
    """
    if vendor == INTEL:
        sizes = [_number(file) for file in sorted(device.glob("tile*/physical_vram_size_bytes"))]
        return sum(size or 0 for size in sizes) or _number(card / "lmem_total_bytes")
    return None if _is_integrated(device, vendor) else _number(device / "mem_info_vram_total")


def _is_integrated(device: Path, vendor: str) -> bool:
    if vendor == INTEL:
        return device.resolve().name == PROCESSORS_GPU
    total = _number(device / "mem_info_vram_total") or 0
    return total < SMALLEST_CARD_BYTES and not (device / "mem_busy_percent").exists()


def _celsius(device: Path) -> float | None:
    found = (_number(file) for file in sorted(device.glob("hwmon/hwmon*/temp*_input")))
    return next((milli / 1000 for milli in found if milli is not None), None)


def _name(root: Path, device: Path, vendor: str) -> str:
    maker = "AMD" if vendor == AMD else "Intel"
    number = (_text(device / "device") or "").removeprefix("0x")
    found = _text(device / "product_name") or _pci_name(root, vendor.removeprefix("0x"), number)
    if not found:
        return f"{maker} GPU {number}".strip()
    return found if maker in found else f"{maker} {found}"


@cache
def _pci_name(root: Path, vendor: str, number: str) -> str:
    """What pci.ids calls a device: of "Navi 31 [Radeon RX 7900 XT]" what buyers know."""
    lines = next(filter(None, (_text(root / file) for file in PCI_IDS)), "").splitlines()
    inside = False
    for line in lines:  # a maker's line, below it those of its devices, with a tab
        if not line.startswith(("\t", "#")):
            inside = line.startswith(f"{vendor}  ")
        elif inside and line.startswith(f"\t{number}  "):
            return line.partition("  ")[2].rpartition("[")[2].rstrip("]")
    return ""


def _text(file: Path) -> str | None:
    with suppress(OSError):
        return file.read_text("utf-8", errors="replace").strip()
    return None


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text and text.isdigit() else None


def apple(name: str, total: int, used: int, model_bytes: int, limit: int = 0) -> Gpu:
    """The GPU of one of Apple's processors, in bytes of the memory that all programs share.

    It may use `limit`, or Metal's share where none is set. Others may use the rest: what they take
    beyond that is taken from the GPU. macOS has no reading of its load without privileges.
    """
    usable = limit or (total * 2 // 3 if total <= SMALL_MAC_BYTES else total * 3 // 4)
    taken = min(max(model_bytes, used - (total - usable), 0), usable)
    return Gpu(name=name, memory_total_bytes=usable, memory_used_bytes=taken)


@cache
def _sysctl(key: str) -> str:
    """A value of macOS' kernel; empty where it has none."""
    command = ["/usr/sbin/sysctl", "-n", key]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, timeout=SYSCTL_SECONDS, check=True)  # noqa: S603
        return done.stdout.decode(errors="replace").strip()
    return ""
