"""The machines of a simulated fleet as stand-ins: `python -m benchmarks.traffic.machines FLEET`.

FLEET is a file with a `simulation.Fleet` in JSON. Prints a line of JSON with where the machines
listen, and at SIGTERM one with how late the program was. A machine behaves like the simulator's:
the same rates, memory, slots and rules. An answer has as many tokens as the last message asks for
between equals signs (`=220=`), which a scheduler does not read: no limit gives the length away.
"""

import argparse
import asyncio
import re
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
from msgspec import Struct

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.traffic.lag import Lag
from ollama_coordinator.scheduler.rates import TYPICAL_BYTES
from ollama_coordinator.simulation import Fleet, MachineSpec, ModelSpec
from ollama_coordinator.simulation.node import FIT_SHARE
from support.ollama import Hardware, Model, Request, Script, StandIn

CONTEXT_TOKENS = 16_384
LINE_SECONDS = 0.1
LENGTH = re.compile(r"=(\d+)=")
WORDS = (
    *("act", "bay", "cup", "dew", "elm", "fir", "gem", "hay", "ink", "jar"),
    *("key", "log", "map", "net", "oak", "pea", "ray", "sea", "tin"),
)
"""Three letters each: with a space after it, a word is as long as a token is taken for.

Nineteen, a prime: lines of less than that many words in turn never repeat the line before. A proxy
may take an answer that repeats itself for a model's fault and end it, as LiteLLM does.
"""


class Place(Struct, frozen=True):
    """Where a machine listens."""

    name: str
    url: str
    control_url: str


class Farewell(Struct, frozen=True):
    """How late the event loop of the machines was."""

    lag_p99_seconds: float


def answer(request: Request) -> Script:
    """As many tokens as the request asks for in its own words; 16 if it does not.

    Each is as long as a token is taken for, so that it counts as one in the next turn's prompt.
    """
    found = LENGTH.search(request.last_user)
    count = int(found[1]) if found else 16
    return Script(content=[f"{WORDS[n % len(WORDS)]} " for n in range(count)])


def stand_in(spec: MachineSpec, speed: float, max_loaded: int) -> StandIn:
    """A machine of the simulator as a server."""
    scale = TYPICAL_BYTES / Hardware.reference_bytes
    hardware = Hardware(
        vram_bytes=spec.memory_bytes,
        cpu_only=not spec.has_gpu,
        load_bytes_per_second=spec.load_bytes_per_second,
        load_overhead_seconds=spec.load_overhead_seconds,
        unload_seconds=spec.unload_seconds,
        prefill_tokens_per_second=spec.prefill_tokens_per_second * scale,
        decode_tokens_per_second=spec.decode_tokens_per_second * scale,
        batch_slowdown=spec.batch_factor,
        fit_share=FIT_SHARE,
        line_seconds=LINE_SECONDS,
        speed=speed,
    )
    return StandIn(
        [_model(model, spec) for model in spec.models],
        control_port=0,
        hardware=hardware,
        slots=spec.slots,
        max_loaded_models=max_loaded,
        default_context=CONTEXT_TOKENS,
        answer=answer,
    )


def _model(model: ModelSpec, spec: MachineSpec) -> Model:
    """With the simulator's use of memory: what is beyond the weights counts as context."""
    slots = 1 if model.embeds else spec.slots
    context_bytes = model.memory_bytes - model.size_bytes
    return Model(
        model.name,
        size_bytes=model.size_bytes,
        capabilities=("embedding",) if model.embeds else ("completion", "tools"),
        kv_bytes_per_token=context_bytes // (CONTEXT_TOKENS * slots),
    )


async def serve(fleet: Fleet, speed: float, max_loaded: int, warm_up: float) -> None:
    """Until SIGTERM or SIGINT."""
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    lag = Lag()
    async with AsyncExitStack() as stack:
        places = []
        for spec in fleet.machines:
            machine = await stack.enter_async_context(stand_in(spec, speed, max_loaded))
            assert machine.control is not None
            places.append(Place(spec.name, machine.url, machine.control.url))
        print(msgspec.json.encode(places).decode(), flush=True)
        with lag.measured(after=warm_up):
            await ended.wait()
        print(msgspec.json.encode(Farewell(lag.p99)).decode(), flush=True)


def main() -> None:
    """Read the fleet and serve it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fleet", type=Path)
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument("--max-loaded", type=int, default=3)
    parser.add_argument("--warm-up", type=float, default=0.0, help="seconds without lag counted")
    options = parser.parse_args()
    fleet = msgspec.json.decode(options.fleet.read_bytes(), type=Fleet)
    asyncio.run(serve(fleet, options.speed, options.max_loaded, options.warm_up))


if __name__ == "__main__":
    main()
