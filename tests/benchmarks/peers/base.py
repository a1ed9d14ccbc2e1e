"""What a peer is."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from msgspec import Struct

from benchmarks.traffic.clients import Target
from benchmarks.traffic.fleet import RunningFleet

Serving = Callable[[str, Path, RunningFleet], AbstractAsyncContextManager[Target]]


class Peer(Struct, frozen=True):
    """Another system; `serving(executable, folder, fleet)` runs it before these machines."""

    name: str
    executable: str
    where: str
    serving: Serving
