"""Everything that can go wrong on demand: what, on which requests, how often.

A fault is data (`Fault`), so the control port takes the same thing as JSON. `Faults` holds those in
force and answers the one question each phase of a request asks: is there one for me?
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

import msgspec

from . import names
from .wire import BUSY, OUT_OF_MEMORY, RUNNER_DIED

HEALTH_PATHS = ("/api/tags", "/api/ps", "/api/version")

ListenerKind = Literal["refuse", "black_hole"]  # the listening socket
AcceptKind = Literal["reset_on_accept", "slow_start"]  # a new connection, a request's first line
RequestKind = Literal["status", "hang", "fin", "rst", "garbage"]  # before any header
StreamKind = Literal["stall", "cut", "malformed", "end_without_done", "error_line"]
LoadKind = Literal["load"]
Kind = Literal[ListenerKind, AcceptKind, RequestKind, StreamKind, LoadKind]


class Fault(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One kind of trouble and whom it befalls."""

    kind: Kind
    # Empty: every route, but for stream faults only those that are not HEALTH_PATHS, so that what
    # befalls an answer never befalls a probe. A trailing * matches any ending.
    paths: tuple[str, ...] = ()
    model: str | None = None  # only requests that name this model
    saying: str = ""  # only requests whose body has this text
    times: int | None = None  # the next so many; None: until cleared
    probability: float = 1.0
    after: int = 0  # stream faults: so many pieces come first
    status: int = 500
    body: str | dict[str, Any] | None = None  # text: put in the route's error shape; object: as is
    raw: str | None = None  # a status's body exactly so, as text/plain; "": none, as of a panic
    headers: dict[str, str] = {}
    how: Literal["rst", "fin"] = "rst"  # a cut: reset, or an end in mid-body
    seconds: float | None = None  # a stall: so long; None: until cleared
    text: str = RUNNER_DIED  # error_line and load: what Ollama would say
    unloads: bool = False  # error_line: every loaded model goes, as after a runtime OOM


class Injected:
    """A fault in force; `clear()` ends it and lets go of what it holds."""

    def __init__(self, fault: Fault, on_clear: Callable[[Injected], None]) -> None:
        self.fault = fault
        self.hits = 0
        self.released = asyncio.Event()
        self._on_clear = on_clear

    @property
    def spent(self) -> bool:
        return self.fault.times is not None and self.hits >= self.fault.times

    def clear(self) -> None:
        self.released.set()
        self._on_clear(self)

    def __enter__(self) -> Injected:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def concerns(self, path: str, model: str, body: bytes = b"") -> bool:
        fault = self.fault
        if fault.saying.encode() not in body:
            return False
        if fault.paths:
            if not any(_matches(path, pattern) for pattern in fault.paths):
                return False
        elif fault.kind in STREAM_KINDS and path in HEALTH_PATHS:
            return False
        return fault.model is None or names.canonical(fault.model) == names.canonical(model)


def _matches(path: str, pattern: str) -> bool:
    return path.startswith(pattern[:-1]) if pattern.endswith("*") else path == pattern


class Faults:
    """The faults in force, in the order they were injected."""

    def __init__(self, *, seed: int = 0, on_change: Callable[[], None]) -> None:
        self._injected: list[Injected] = []
        self._random = random.Random(seed)
        self._on_change = on_change

    def __iter__(self) -> Iterator[Injected]:
        return iter(self._injected)

    def add(self, fault: Fault) -> Injected:
        injected = Injected(fault, self._remove)
        self._injected.append(injected)
        self._on_change()
        return injected

    def clear(self) -> None:
        for injected in list(self._injected):
            injected.clear()

    def pick(
        self, kinds: Iterable[str], path: str = "", model: str = "", body: bytes = b""
    ) -> Injected | None:
        """The first fault of these kinds that befalls this request; counts as a hit."""
        for injected in self._injected:
            fault = injected.fault
            if fault.kind not in kinds or injected.spent:
                continue
            if not injected.concerns(path, model, body):
                continue
            if fault.probability < 1 and self._random.random() >= fault.probability:
                continue
            injected.hits += 1
            return injected
        return None

    def in_force(self, kind: Kind) -> Injected | None:
        return next((i for i in self._injected if i.fault.kind == kind), None)

    # One method per kind, for tests; each takes the fields of Fault that matter to it, and the
    # common ones: paths, model, times, probability.

    def refuse(self) -> Injected:
        """The listening socket is closed, idle connections with it; running requests go on."""
        return self.add(Fault(kind="refuse"))

    def black_hole(self) -> Injected:
        """Connects never complete, and what is connected falls silent."""
        return self.add(Fault(kind="black_hole"))

    def reset_on_accept(self, **common: Any) -> Injected:
        return self.add(Fault(kind="reset_on_accept", **common))

    def slow_start(self, **common: Any) -> Injected:
        """Connections are accepted and not answered until cleared."""
        return self.add(Fault(kind="slow_start", **common))

    def status(
        self, status: int, body: str | dict[str, Any] | None = None, **rest: Any
    ) -> Injected:
        return self.add(Fault(kind="status", status=status, body=body, **rest))

    def busy(self, **common: Any) -> Injected:
        return self.status(503, BUSY, **common)

    def hang(self, **common: Any) -> Injected:
        """The request is read and not answered; when cleared it is served."""
        return self.add(Fault(kind="hang", **common))

    def fin(self, **common: Any) -> Injected:
        """The connection ends before any header."""
        return self.add(Fault(kind="fin", **common))

    def rst(self, **common: Any) -> Injected:
        return self.add(Fault(kind="rst", **common))

    def garbage(self, **common: Any) -> Injected:
        """Another program than an HTTP server answers."""
        return self.add(Fault(kind="garbage", **common))

    def stall(self, after: int = 1, seconds: float | None = None, **common: Any) -> Injected:
        return self.add(Fault(kind="stall", after=after, seconds=seconds, **common))

    def cut(self, after: int = 1, how: Literal["rst", "fin"] = "rst", **common: Any) -> Injected:
        return self.add(Fault(kind="cut", after=after, how=how, **common))

    def malformed(self, after: int = 1, **common: Any) -> Injected:
        return self.add(Fault(kind="malformed", after=after, **common))

    def end_without_done(self, after: int = 1, **common: Any) -> Injected:
        return self.add(Fault(kind="end_without_done", after=after, **common))

    def error_line(self, text: str = RUNNER_DIED, after: int = 1, **common: Any) -> Injected:
        return self.add(Fault(kind="error_line", text=text, after=after, **common))

    def out_of_memory(self, after: int = 1, **common: Any) -> Injected:
        """While generating: the error, and every model on the node is marked for unloading."""
        return self.error_line(OUT_OF_MEMORY, after, unloads=True, **common)

    def load_fails(self, text: str = OUT_OF_MEMORY, **common: Any) -> Injected:
        """The load takes its time, then answers 500."""
        return self.add(Fault(kind="load", text=text, **common))

    def unhealthy(self, status: int = 500, **common: Any) -> Injected:
        """Only the routes a health check asks fail."""
        return self.status(status, "unhealthy", paths=HEALTH_PATHS, **common)

    def _remove(self, injected: Injected) -> None:
        if injected in self._injected:
            self._injected.remove(injected)
            self._on_change()


REQUEST_KINDS = get_args(RequestKind)
STREAM_KINDS = get_args(StreamKind)
