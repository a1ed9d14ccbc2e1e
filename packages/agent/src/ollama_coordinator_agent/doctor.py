"""What is wrong with this machine, its Ollama and its way to the coordinator, and what to do.

`of_machine` is pure: the running agent reports what it finds. `of_the_way` asks the coordinator
step by step, from its name to the key, and ends where something is wrong.
"""

import asyncio
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from ollama_coordinator_common.network import cause_of, local_address, parse_address
from ollama_coordinator_common.protocol import Finding
from ollama_coordinator_common.types import LoadedModel

from .client import CoordinatorClient, CoordinatorError, Rejected
from .link.dial import shown_certificate, tls_context
from .metrics import Readings
from .ollama import LEARNED_SLOTS, Presence, is_older
from .reach import RESOLVE_SECONDS, coordinator_address
from .watch import Facts

OK, NOTE, WARNING, FAILED = "ok", "note", "warning", "failed"

REPORTED_OTHERWISE = frozenset({"files", "runners"})
"""Checks whose findings are fields of a heartbeat of their own."""

LOW_DISK_BYTES = 10_000_000_000
"""Less than most models people pull."""

CLOCK_SECONDS = 30.0
"""A clock may be wrong by so much: the coordinator's `Date` is one of whole seconds."""

CONNECT_SECONDS = 5.0
"""As long as any request to the coordinator may take."""

PCI = Path("/sys/bus/pci/devices")
VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
DISPLAY_CLASSES = ("0x0300", "0x0302", "0x0380")
"""VGA, 3D and other display controllers (PCI base class 03)."""


class Card(Struct, frozen=True):
    """A graphics card on the PCI bus; `driver` is the kernel's for it, empty where it has none."""

    vendor: str
    address: str
    driver: str = ""


def cards(folder: Path = PCI) -> tuple[Card, ...]:
    """The graphics cards that the kernel lists (Linux' sysfs); none elsewhere."""
    found = []
    for device in sorted(folder.glob("*")):
        try:
            kind = (device / "class").read_text("ascii").strip()
            vendor = VENDORS.get((device / "vendor").read_text("ascii").strip())
        except (OSError, UnicodeDecodeError):
            continue
        if vendor is not None and kind.startswith(DISPLAY_CLASSES):
            driver = device / "driver"
            name = driver.resolve().name if driver.exists() else ""
            found.append(Card(vendor, device.name, name))
    return tuple(found)


class Surroundings(Struct, frozen=True):
    """What is beside Ollama. `binary`: its program; `may_start`: whether the agent may start it.

    `unkept`: why nothing is kept in the state folder. `skew_seconds`: how far this machine's clock
    is ahead of the coordinator's.
    """

    url: str
    binary: Path | None = None
    may_start: bool = True
    cards: tuple[Card, ...] = ()
    unkept: str = ""
    skew_seconds: float | None = None


def of_machine(facts: Facts, readings: Readings, around: Surroundings) -> Iterator[Finding]:
    """What is found of Ollama and of the machine; nothing is asked."""
    yield from _of_the_program(facts, around)
    yield _of_ollama(facts, around)
    if facts.is_running:
        yield from _of_a_server(facts)
    if facts.left_behind is not None:
        yield Finding("runners", FAILED, facts.left_behind)
    yield from _of_gpus(facts, readings, around.cards)
    yield _of_disk(readings.disk_free_bytes)
    if around.unkept:
        remedy = "make the folder writable, or set AGENT_STATE_DIR"
        text = f"nothing is kept for the next start: {around.unkept}"
        yield Finding("state", WARNING, text, remedy)
    if around.skew_seconds is not None:
        yield _of_clock(around.skew_seconds)


def _of_the_program(facts: Facts, around: Surroundings) -> Iterator[Finding]:
    if around.binary is not None:
        yield Finding("program", OK, str(around.binary))
    elif not facts.is_running:
        remedy = "run `ollama-coordinator-agent install-ollama`, or set OLLAMA_BINARY"
        yield Finding("program", FAILED, "the ollama program is not here", remedy)


def _of_ollama(facts: Facts, around: Surroundings) -> Finding:
    text = facts.trouble or facts.presence.value
    match facts.presence:
        case Presence.ANSWERING:
            return Finding("Ollama", OK, f"version {facts.version} at {around.url}")
        case Presence.FOREIGN:
            remedy = "set OLLAMA_PORT to Ollama's port, or end the other program"
        case Presence.SILENT:
            remedy = "wait until it has started, or restart it; its log says more"
        case _ if around.binary is None:
            remedy = "install Ollama, or start it"
        case _ if not around.may_start:
            remedy = "start `ollama serve`: AGENT_MANAGE_OLLAMA is false"
        case _:
            remedy = f"`ollama-coordinator-agent run` starts {around.binary}"
    return Finding("Ollama", FAILED, text, remedy)


def _of_a_server(facts: Facts) -> Iterator[Finding]:
    """What is found of an Ollama that answers."""
    if is_older(facts.version, LEARNED_SLOTS):
        text = f"Ollama {facts.version} says not how many requests it runs at once"
        yield Finding("version", WARNING, text, "update it: that has to be learned by trials")
    elif facts.runner is None:
        text = "Ollama's environment cannot be read, so its slots are learned by trials"
        yield Finding("settings", NOTE, text, "run the agent as the user that runs Ollama")
    for name, fault in sorted(facts.disk.broken.items()):
        yield Finding("files", FAILED, f"{name} cannot run: {fault}", "pull it again")
    if facts.tags is None:
        return
    if facts.tags.models:
        yield Finding("models", OK, f"{len(facts.tags.models)} on its disk")
    else:
        remedy = "pull one: `ollama-coordinator models pull MODEL`, or on the dashboard"
        yield Finding("models", WARNING, "no model is on its disk", remedy)


def _of_gpus(facts: Facts, readings: Readings, found: tuple[Card, ...]) -> Iterator[Finding]:
    """Whether each card has a driver, is read, and is what Ollama computes on."""
    bad = list(_of_drivers(readings, found))
    yield from bad
    if not readings.gpus:
        if not bad:
            yield Finding("GPU", OK, "none: models run on the processor")
        return
    names = ", ".join(gpu.name for gpu in readings.gpus)
    slow = [row.name for row in _loaded(facts) if row.size and not row.size_vram]
    if slow:
        text = f"Ollama runs {', '.join(slow)} on the processor, although there is {names}"
        remedy = "restart Ollama; its log says under 'inference compute' why it sees no GPU"
        yield Finding("GPU", WARNING, text, remedy)
    else:
        yield Finding("GPU", OK, names)


def _of_drivers(readings: Readings, found: tuple[Card, ...]) -> Iterator[Finding]:
    for card in found:
        name = f"the {card.vendor} card at {card.address}"
        if not card.driver:
            yield Finding("GPU", FAILED, f"{name} has no driver", "install its driver")
        elif card.driver == "nouveau":
            text = f"{name} has the driver nouveau, with which Ollama cannot use it"
            yield Finding("GPU", FAILED, text, "install NVIDIA's driver")
        elif card.vendor == "NVIDIA" and not readings.gpus:
            remedy = "install the driver's library, or give a container its GPUs (`--gpus all`)"
            yield Finding("GPU", FAILED, f"{name} has a driver that answers nothing here", remedy)


def _loaded(facts: Facts) -> list[LoadedModel]:
    if facts.ps is None:
        return []
    try:
        return msgspec.json.decode(facts.ps.body, type=_Ps).models or []
    except msgspec.DecodeError:
        return []


class _Ps(Struct):
    models: list[LoadedModel] | None = None


def _of_disk(free: int | None) -> Finding:
    if free is None:
        return Finding("disk", NOTE, "the folder of the models cannot be looked at")
    text = f"{free / 1e9:.0f} GB free"
    if free >= LOW_DISK_BYTES:
        return Finding("disk", OK, text)
    return Finding("disk", WARNING, f"only {text}", "remove a model, or make room")


def _of_clock(skew: float) -> Finding:
    if abs(skew) <= CLOCK_SECONDS:
        return Finding("clock", OK, "as the coordinator's")
    side = "ahead of" if skew > 0 else "behind"
    # Not to the second: the sentence is to stay the same from report to report.
    size = "about a minute" if abs(skew) < 90 else f"about {abs(skew) / 60:.0f} minutes"
    text = f"this machine's clock is {size} {side} the coordinator's"
    switch = "w32tm /resync" if sys.platform == "win32" else "timedatectl set-ntp true"
    return Finding("clock", WARNING, text, f"have one of the two set: `{switch}`")


async def of_the_way(client: CoordinatorClient, certificate: str) -> AsyncIterator[Finding]:
    """The steps to the coordinator that the client follows; the first that fails is the last."""
    url = client.url
    host, port = coordinator_address(url)
    yield Finding("coordinator", OK, url)
    try:
        async with asyncio.timeout(RESOLVE_SECONDS):
            loop = asyncio.get_running_loop()
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        remedy = "correct COORDINATOR_URL, or the name in DNS or in the hosts file"
        text = f"no host {host}: {cause_of(exc)}"
        yield Finding("name", FAILED, text, remedy)
        return
    addresses = list(dict.fromkeys(str(one[4][0]) for one in found))
    if parse_address(host) is None:
        yield Finding("name", OK, f"{host} is {', '.join(addresses)}")
    own = local_address(addresses, port)
    if own is None:
        text = f"this machine has no route to {', '.join(addresses)}"
        yield Finding("route", FAILED, text, "look at its network: cable, Wi-Fi, VPN, gateway")
        return
    yield Finding("route", OK, f"from {own}")
    async for finding in _of_the_port(url, host, port, certificate):
        yield finding
        if finding.level == FAILED:
            return
    yield await _of_the_key(client)


async def _of_the_port(url: str, host: str, port: int, certificate: str) -> AsyncIterator[Finding]:
    """The connection, and TLS on it."""
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(host, port)
    except OSError as exc:
        remedy = f"let this machine through to port {port} in the firewalls between"
        if isinstance(exc, ConnectionRefusedError):
            remedy = "start `ollama-coordinator serve` there, or correct COORDINATOR_URL"
        yield Finding("port", FAILED, f"{host} port {port}: {cause_of(exc)}", remedy)
        return
    writer.close()
    yield Finding("port", OK, f"{port} takes connections")
    if not url.startswith("https:"):
        return
    remedy = "give the join token again (AGENT_JOIN_TOKEN), or the SHA-256 of its certificate"
    remedy += " (COORDINATOR_CERTIFICATE); of an authority's certificate, set the clock"
    context = tls_context(bool(certificate))
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except (OSError, ssl.SSLError) as exc:
        yield Finding("TLS", FAILED, cause_of(exc), remedy)
        return
    shown = shown_certificate(writer.transport).hex()
    writer.transport.abort()
    if certificate and shown != certificate:
        yield Finding("TLS", FAILED, "its certificate is not the one that is believed", remedy)
    else:
        yield Finding("TLS", OK, "its certificate is believed")


async def _of_the_key(client: CoordinatorClient) -> Finding:
    try:
        await client.agents()
    except Rejected as exc:
        remedy = "give a join token: `ollama-coordinator join-token create` there, AGENT_JOIN_TOKEN"
        return Finding("key", FAILED, str(exc), f"{remedy} here")
    except CoordinatorError as exc:
        return Finding("key", FAILED, str(exc))
    return Finding("key", OK, "the coordinator takes this machine")
