"""How many connections this process has room for; file descriptors are what runs out first."""

import contextlib
import sys

from msgspec import Struct

OWN = 64
"""Descriptors for everything else: the database, files, listening sockets, probes of agents."""

OPEN_MAX = 10_240
"""What macOS grants where it calls the hard limit infinite, and then refuses infinity."""


class Room(Struct, frozen=True):
    """`connections`: how many clients may be connected (`None`: any number).

    `at_once`: how many may be accepted before any of them is looked at.
    """

    connections: int | None
    at_once: int


def room() -> Room:
    """The room there is; the process's own limit is raised to what the system allows."""
    descriptors = _descriptors()
    if descriptors is None:
        return Room(None, 1024)
    return within(descriptors)


def within(descriptors: int) -> Room:
    """The room that so many file descriptors make.

    A quarter is kept for connections that have to be told that there is no room; of the rest,
    every client needs one, and one more to the agent that serves it.
    """
    at_once = max(8, min(1024, descriptors // 16))
    rest = descriptors - min(descriptors // 4, 4096) - OWN
    return Room(max(8, rest // 2), at_once)


if sys.platform == "win32":

    def _descriptors() -> int | None:
        """Sockets are no file descriptors there, and are not limited."""
        return None

else:
    import resource

    def _descriptors() -> int | None:
        """The limit on open files, raised as far as it goes; `None` where there is none."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY:
            return None
        wanted = OPEN_MAX if hard == resource.RLIM_INFINITY else hard
        if wanted > soft:
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
