"""The machine's GPUs, by the trees of files that the kernel's drivers make."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml  # type: ignore[import-untyped]
import pytest

from ollama_coordinator_agent.gpus import Gpus, Nvidia, apple, of_kernel
from ollama_coordinator_common.types import Gpu

GIB = 1024**3

RADEON = {
    "vendor": "0x1002",
    "device": "0x744c",
    "mem_info_vram_total": str(24 * GIB),
    "mem_info_vram_used": str(5 * GIB),
    "mem_info_gtt_total": str(32 * GIB),
    "gpu_busy_percent": "37",
    "mem_busy_percent": "12",
    "power/runtime_status": "active",
    "hwmon/hwmon3/temp1_input": "61000",
    "hwmon/hwmon3/temp2_input": "72000",
}
PHOENIX = {
    "vendor": "0x1002",
    "device": "0x15bf",
    "mem_info_vram_total": str(GIB // 2),
    "mem_info_vram_used": str(GIB // 4),
    "mem_info_gtt_total": str(14 * GIB),
    "gpu_busy_percent": "3",
    "power/runtime_status": "active",
    "hwmon/hwmon4/temp1_input": "48000",
}
ARC_XE = {
    "vendor": "0x8086",
    "device": "0xe20b",
    "tile0/physical_vram_size_bytes": str(12 * GIB),
    "power/runtime_status": "active",
    "hwmon/hwmon2/temp2_input": "55000",
}
UHD = {"vendor": "0x8086", "device": "0x46a6", "power/runtime_status": "active"}
SERVERS_CONSOLE = {"vendor": "0x1a03", "device": "0x2000"}
PCI_IDS = """# the names of PCI devices
1002  Advanced Micro Devices, Inc. [AMD/ATI]
\t744c  Navi 31 [Radeon RX 7900 XT/7900 XTX]
\t\t1002 0e3b  Radeon RX 7900 XTX
8086  Intel Corporation
\t744c  no card of AMD's
"""

Plug = Callable[..., Path]


@pytest.fixture
def plug(tmp_path: Path) -> Plug:
    """Makes a card as the kernel does: its folder, and a link to the device on the PCI bus."""

    def plug(card: str, bus: str, files: dict[str, str], **of_card: str) -> Path:
        device = tmp_path / "sys/devices/pci0000:00" / bus
        folder = tmp_path / "sys/class/drm" / card
        for name, text in files.items():
            (device / name).parent.mkdir(parents=True, exist_ok=True)
            (device / name).write_text(f"{text}\n")
        folder.mkdir(parents=True)
        (folder.with_name(f"{card}-DP-1")).mkdir()
        (folder / "device").symlink_to(device)
        for name, text in of_card.items():
            (folder / name).write_text(f"{text}\n")
        return device

    return plug


@pytest.mark.spec("AGENT-72")
def test_amds_card_has_its_memory_load_and_temperature(plug: Plug, tmp_path: Path) -> None:
    plug("card1", "0000:03:00.0", RADEON)
    names = tmp_path / "usr/share/misc/pci.ids"
    names.parent.mkdir(parents=True)
    names.write_text(PCI_IDS)
    name = "AMD Radeon RX 7900 XT/7900 XTX"
    assert list(of_kernel(tmp_path)) == [Gpu(name, 0, 24 * GIB, 5 * GIB, 37.0, 61.0)]


@pytest.mark.spec("AGENT-72")
def test_a_part_of_the_processor_has_no_memory_of_its_own(plug: Plug, tmp_path: Path) -> None:
    plug("card0", "0000:c4:00.0", PHOENIX)
    plug("card1", "0000:00:02.0", UHD)
    amd, intel = of_kernel(tmp_path)
    assert amd == Gpu("AMD GPU 15bf", 0, None, None, 3.0, 48.0, integrated=True)
    assert intel == Gpu("Intel GPU 46a6", integrated=True)


@pytest.mark.spec("AGENT-72")
def test_intels_card_has_the_memory_that_its_driver_tells(plug: Plug, tmp_path: Path) -> None:
    plug("card0", "0000:03:00.0", ARC_XE)
    plug("card1", "0000:04:00.0", {**UHD, "device": "0x56a0"})
    plug("card2", "0000:05:00.0", {**UHD, "device": "0x56a1"}, lmem_total_bytes=str(16 * GIB))
    newer, mainline, release = of_kernel(tmp_path)
    assert (newer.memory_total_bytes, newer.temperature_celsius) == (12 * GIB, 55.0)
    assert (mainline.memory_total_bytes, mainline.integrated) == (None, False)
    assert release.memory_total_bytes == 16 * GIB


@pytest.mark.spec("AGENT-72")
def test_a_card_that_sleeps_is_not_woken_for_a_reading(plug: Plug, tmp_path: Path) -> None:
    plug("card0", "0000:03:00.0", {**RADEON, "power/runtime_status": "suspended"})
    (gpu,) = of_kernel(tmp_path)
    assert (gpu.utilization_percent, gpu.temperature_celsius) == (None, None)
    assert gpu.memory_total_bytes == 24 * GIB


@pytest.mark.spec("AGENT-72")
def test_what_is_no_gpu_of_theirs_is_left_out(plug: Plug, tmp_path: Path) -> None:
    plug("card0", "0000:02:00.0", SERVERS_CONSOLE)
    plug("card1", "0000:01:00.0", {"vendor": "0x10de", "device": "0x2684"})
    assert list(of_kernel(tmp_path)) == list(of_kernel(tmp_path / "nowhere")) == []


@pytest.mark.spec("AGENT-72")
def test_a_tree_that_changes_is_read_as_it_is(
    plug: Plug, tmp_path: Path, driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    gpus = Gpus(tmp_path)
    assert [gpu.index for gpu in gpus.read()] == [0]
    device = plug("card1", "0000:03:00.0", RADEON)
    assert [gpu.index for gpu in gpus.read()] == [0, 1]
    (device / "mem_info_vram_used").write_text(f"{20 * GIB}\n")
    (device / "gpu_busy_percent").write_text("broken\n")
    card = gpus.read()[1]
    assert (card.memory_used_bytes, card.utilization_percent) == (20 * GIB, None)
    (tmp_path / "sys/class/drm/card1/device").unlink()
    assert [gpu.index for gpu in gpus.read()] == [0]


@pytest.mark.spec("AGENT-73")
def test_apples_gpu_has_its_share_of_the_memory_less_what_others_take() -> None:
    idle = apple("Apple M2", 24 * GIB, 6 * GIB, model_bytes=0)
    assert (idle.memory_total_bytes, idle.memory_used_bytes) == (16 * GIB, 0)
    served = apple("Apple M2", 24 * GIB, 11 * GIB, model_bytes=5 * GIB)
    assert served.memory_used_bytes == 5 * GIB
    crowded = apple("Apple M2", 24 * GIB, 18 * GIB, model_bytes=5 * GIB)
    assert crowded.memory_used_bytes == 10 * GIB
    large = apple("Apple M2 Ultra", 192 * GIB, 10 * GIB, model_bytes=0)
    assert large.memory_total_bytes == 144 * GIB
    widened = apple("Apple M2", 24 * GIB, 6 * GIB, model_bytes=0, limit=20 * GIB)
    assert widened.memory_total_bytes == 20 * GIB


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An NVIDIA driver with one GPU that does not tell its temperature."""
    state = SimpleNamespace(inits=0, is_there=True)

    def init() -> None:
        state.inits += 1
        if not state.is_there:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    def unsupported(*_: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    fakes: dict[str, Any] = {
        "nvmlInit": init,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda device: b"NVIDIA RTX",
        "nvmlDeviceGetMemoryInfo": lambda device: SimpleNamespace(total=24, used=6),
        "nvmlDeviceGetUtilizationRates": lambda device: SimpleNamespace(gpu=37),
        "nvmlDeviceGetTemperature": unsupported,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(pynvml, name, fake)
    return state


@pytest.mark.spec("AGENT-35")
def test_what_the_driver_does_not_give_is_left_out(driver: SimpleNamespace) -> None:
    expected = Gpu("NVIDIA RTX", 0, 24, 6, utilization_percent=37.0, temperature_celsius=None)
    assert Nvidia().read() == [expected]


@pytest.mark.spec("AGENT-35")
def test_without_a_driver_there_are_no_gpus_and_it_is_rarely_asked(driver: SimpleNamespace) -> None:
    driver.is_there = False
    nvidia = Nvidia()
    assert [nvidia.read() for _ in range(31)] == [[]] * 31
    assert driver.inits == 1
    driver.is_there = True
    assert len(nvidia.read()) == 1
