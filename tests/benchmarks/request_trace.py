"""How much of the coordinator's code one warm streamed chat passes: modules, functions, calls.

A real coordinator on a real socket answers from two stand-ins in the same process that both have
the model. Of several chats the one with the fewest calls counts: what else runs now and then
(probes, samples) is not in it. Counted are the functions of the packages' own code, comprehensions
apart; a coroutine that goes on is no further call. `nox -s trace`; with `-- --list` every module
with its functions, in the order of the first call.
"""

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, FrameType

import ollama_coordinator
import ollama_coordinator_common

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.coordinator import Running, running
from support.ollama import StandIn

PACKAGES = tuple(
    str(Path(package.__path__[0])) for package in (ollama_coordinator, ollama_coordinator_common)
)
COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")
"""Newer Pythons run some of them within the function they are in."""

WARM_CHATS = 20
"""Connections are open and every cache is filled after so many."""

TRACED_CHATS = 10
SETTLING_SECONDS = 0.05
"""What follows the last byte of an answer (the lease, the journal) is over by then."""


class Calls:
    """Counts the calls of the packages' functions, by their code, while it is the profiler."""

    def __init__(self) -> None:
        self.counts: Counter[CodeType] = Counter()

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        """`sys.setprofile` calls this at each call and return."""
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGES):
            return
        if code.co_name not in COMPREHENSIONS and not _goes_on(frame):
            self.counts[code] += 1

    def modules(self) -> dict[str, list[CodeType]]:
        """The functions that were called, by module, in the order of their first call."""
        found: dict[str, list[CodeType]] = {}
        for code in self.counts:
            path = Path(code.co_filename)
            root = next(package for package in PACKAGES if path.is_relative_to(package))
            found.setdefault(str(path.relative_to(Path(root).parent)), []).append(code)
        return found

    def summary(self) -> str:
        """One line."""
        return (
            f"{len(self.modules())} modules, {len(self.counts)} functions, "
            f"{self.counts.total()} calls"
        )


_STARTS: dict[CodeType, int] = {}


def _goes_on(frame: FrameType) -> bool:
    """Whether this is a coroutine or generator that was suspended before."""
    start = _STARTS.setdefault(frame.f_code, frame.f_lasti)
    if frame.f_lasti < start:
        _STARTS[frame.f_code] = start = frame.f_lasti
    return frame.f_lasti > start


async def trace() -> Calls:
    """The chat with the fewest calls."""
    traced: list[Calls] = []
    async with running() as coordinator, StandIn() as first, StandIn() as second:
        for ollama in (first, second):
            agent_id = await coordinator.register(ollama)
            await coordinator.heartbeat(agent_id, runner={"num_parallel": 4})
        for number in range(WARM_CHATS + TRACED_CHATS):
            calls = Calls()
            if number >= WARM_CHATS:
                traced.append(calls)
                sys.setprofile(calls)
            try:
                await _chat(coordinator)
                await asyncio.sleep(SETTLING_SECONDS)
            finally:
                sys.setprofile(None)
    return min(traced, key=lambda calls: calls.counts.total())


async def _chat(coordinator: Running) -> None:
    """One streamed answer, read to its end; the connection is kept."""
    body = {"model": "llama3.2", "messages": [{"role": "user", "content": "hello"}]}
    async with coordinator.session.post(f"{coordinator.url}/api/chat", json=body) as response:
        assert response.status == 200
        await response.read()


def listing(calls: Calls) -> str:
    """Every module with its functions, and how often each was called."""
    lines = []
    for module, codes in calls.modules().items():
        lines.append(f"{module} ({len(codes)})")
        lines += [f"    {calls.counts[code]:3} {code.co_qualname}" for code in codes]
    return "\n".join(lines)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="nox -s trace --", description=__doc__)
    parser.add_argument("--list", action="store_true", help="print every function")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    chosen = parse(sys.argv[1:])
    calls = asyncio.run(trace())
    if chosen.list:
        print(listing(calls))
    print(calls.summary())
