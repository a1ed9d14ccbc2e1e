"""Machines on a switch: Linux network namespaces, each with one cable that can be pulled."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from support import programs

SWITCH = "10.88.0.1"
"""The switch's own address, which its own programs have."""


def have_namespaces(*more: str) -> str:
    """Why there can be no such machines, with these programs on them; empty where there can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "needs root"
    if missing := [name for name in ("ip", *more) if shutil.which(name) is None]:
        return f"needs {', '.join(missing)} (Debian: iproute2, and packages of these names)"
    tried = subprocess.run(["ip", "netns", "add", "switch-probe"], capture_output=True)
    subprocess.run(["ip", "netns", "del", "switch-probe"], capture_output=True)
    return "" if tried.returncode == 0 else "this system allows no network namespaces"


class Switch:
    """A namespace with a bridge; `address` gives each further machine its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._prefix = f"switch-{os.getpid()}"
        self._cards: dict[str, str] = {}
        self._spaces = [self._prefix]

    def __enter__(self) -> "Switch":
        try:
            _ip("netns", "add", self._prefix)
            _ip("-n", self._prefix, "link", "set", "lo", "up")
            _ip("-n", self._prefix, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._prefix, "address", "add", f"{SWITCH}/24", "dev", "bridge")
            _ip("-n", self._prefix, "link", "set", "bridge", "up")
        except subprocess.CalledProcessError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        for space in self._spaces:
            subprocess.run(["ip", "netns", "del", space], check=False)

    def machine(self) -> str:
        """Add a machine; its address."""
        number = len(self._spaces)
        space, card, address = f"{self._prefix}-{number}", f"port{number}", f"10.88.0.{number + 1}"
        _ip("netns", "add", space)
        self._spaces.append(space)
        self._cards[address] = card
        _ip(
            *("-n", self._prefix, "link", "add", card, "type", "veth"),
            *("peer", "name", "cable", "netns", space),
        )
        _ip("-n", self._prefix, "link", "set", card, "master", "bridge", "up")
        _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", space, "address", "add", f"{address}/24", "dev", "cable")
        _ip("-n", space, "link", "set", "cable", "up")
        return address

    def pull(self, address: str) -> None:
        """Pull a machine's cable: nothing passes, and nobody is told."""
        _ip("-n", self._prefix, "link", "set", self._cards[address], "down")

    def plug(self, address: str) -> None:
        """Put it back."""
        _ip("-n", self._prefix, "link", "set", self._cards[address], "up")

    def run(
        self, address: str, name: str, *command: str, **environment: str
    ) -> AbstractAsyncContextManager[programs.Program]:
        """Run a program on a machine, or on the switch, during a block."""
        inside = self._inside(address, command)
        return programs.program(self._folder / f"{name}.log", *inside, **environment)

    async def output(self, address: str, *command: str) -> bytes:
        """What a program writes that ends by itself."""
        process = await asyncio.create_subprocess_exec(
            *self._inside(address, command), stdout=asyncio.subprocess.PIPE
        )
        return (await process.communicate())[0]

    def _inside(self, address: str, command: Iterable[str]) -> list[str]:
        space = self._spaces[int(address.rpartition(".")[2]) - 1]
        return ["ip", "netns", "exec", space, *command]


def _ip(*command: str) -> None:
    subprocess.run(["ip", *command], check=True)
