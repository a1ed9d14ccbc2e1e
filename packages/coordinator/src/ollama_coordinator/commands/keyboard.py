"""Keys, one at a time, from the terminal of a program that shows a screen."""

import asyncio
import os
import sys
from types import TracebackType
from typing import Any, Self

PRESSED = {
    "\x1b[A": "up", "\x1bOA": "up", "\x1b[B": "down", "\x1bOB": "down", "\x1b": "escape",
    "\r": "enter", "\n": "enter", "\x7f": "backspace", "\x08": "backspace",
}  # fmt: skip
"""What a terminal sends for a key that is no character (ECMA-48, and DEC's application mode)."""

WINDOWS = {"H": "up", "P": "down"}
"""The second character of such a key in a console of Windows."""

POLL_SECONDS = 0.05


class Keyboard:
    """Reads keys without an echo while its block runs; no terminal has none."""

    def __init__(self) -> None:
        self._keys: asyncio.Queue[str] = asyncio.Queue()
        self._before: Any = None

    def __enter__(self) -> Self:
        if sys.platform != "win32" and sys.stdin.isatty():
            import termios
            import tty

            self._before = termios.tcgetattr(sys.stdin)
            tty.setcbreak(sys.stdin)
            asyncio.get_running_loop().add_reader(sys.stdin, self._read)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None
    ) -> None:
        if sys.platform != "win32" and self._before is not None:
            import termios

            asyncio.get_running_loop().remove_reader(sys.stdin)
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._before)

    async def key(self, seconds: float) -> str:
        """The next key: a character, or a name of `PRESSED`; empty if none comes in time."""
        try:
            async with asyncio.timeout(seconds):
                if sys.platform == "win32":
                    return await _of_windows()
                return await self._keys.get()
        except TimeoutError:
            return ""

    def _read(self) -> None:
        for key in keys_in(os.read(sys.stdin.fileno(), 1024).decode(errors="ignore")):
            self._keys.put_nowait(key)


def keys_in(text: str) -> list[str]:
    """The keys of what a terminal sent at once."""
    keys = []
    while text:
        known = next((one for one in PRESSED if text.startswith(one)), text[0])
        keys.append(PRESSED.get(known, known))
        text = text[len(known) :]
    return keys


async def _of_windows() -> str:
    import msvcrt

    while not msvcrt.kbhit():  # type: ignore[attr-defined, unused-ignore]  # noqa: ASYNC110
        await asyncio.sleep(POLL_SECONDS)
    key = str(msvcrt.getwch())  # type: ignore[attr-defined, unused-ignore]
    if key in ("\x00", "\xe0"):
        return WINDOWS.get(msvcrt.getwch(), "")  # type: ignore[attr-defined, unused-ignore]
    return PRESSED.get(key, key)
