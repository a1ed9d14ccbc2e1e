"""One stand-in on its own: `python -m support.ollama --port 11434 --model llama3.2=2e9`."""

from __future__ import annotations

import argparse
import asyncio
import math
import signal
from collections.abc import Sequence

from .hardware import GIB, Hardware
from .models import Model
from .server import StandIn


def main(arguments: Sequence[str] | None = None) -> None:
    asyncio.run(_serve(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m support.ollama",
        description="A stand-in for one Ollama node. Prints its URL and its control URL.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to bind; loopback checks Host")
    add("--port", type=int, default=11434, help="0 takes a free one")
    add("--control-port", type=int, default=0, help="for /faults, /seen, /reset; 0: a free one")
    add(
        "--model",
        action="append",
        default=[],
        metavar="NAME[=BYTES]",
        help="on disk; repeatable; names with 'embed' in them embed (none given: llama3.2)",
    )
    add(
        "--registry",
        action="append",
        default=[],
        metavar="NAME[=BYTES]",
        help="what can be pulled; repeatable",
    )
    add("--models-path", default="", metavar="FOLDER", help="keep models there, as files")
    add("--version", default="0.33.0", help="the version it claims to be")
    add("--slots", type=int, default=1, help="OLLAMA_NUM_PARALLEL")
    add("--max-loaded-models", type=int, default=3, help="OLLAMA_MAX_LOADED_MODELS")
    add("--max-queue", type=int, default=512, help="OLLAMA_MAX_QUEUE")
    add("--keep-alive", type=float, default=300.0, help="OLLAMA_KEEP_ALIVE, seconds")
    add("--context", type=int, default=None, help="OLLAMA_CONTEXT_LENGTH; none: by memory")
    add("--vram-gib", type=float, default=24.0, help="memory models are loaded into")
    add("--cpu-only", action="store_true", help="that memory is main memory")
    add("--load-rate", type=float, default=math.inf, help="bytes per second of a load")
    add("--load-overhead", type=float, default=0.0, help="seconds on top of each load")
    add("--prefill-rate", type=float, default=math.inf, help="prompt tokens/s of a 5 GB model")
    add("--decode-rate", type=float, default=math.inf, help="output tokens/s of a 5 GB model")
    add("--download-rate", type=float, default=math.inf, help="bytes per second of a pull")
    add("--batch-slowdown", type=float, default=0.4, help="per further generation in a runner")
    add("--speed", type=float, default=1.0, help="divides every wait, keep-alive included")
    add("--seed", type=int, default=0, help="of faults with a probability")
    return parser


def _stand_in(arguments: argparse.Namespace) -> StandIn:
    hardware = Hardware(
        vram_bytes=int(arguments.vram_gib * GIB),
        cpu_only=arguments.cpu_only,
        load_bytes_per_second=arguments.load_rate,
        load_overhead_seconds=arguments.load_overhead,
        prefill_tokens_per_second=arguments.prefill_rate,
        decode_tokens_per_second=arguments.decode_rate,
        batch_slowdown=arguments.batch_slowdown,
        speed=arguments.speed,
    )
    path = arguments.models_path
    held = arguments.model or ([] if path else ["llama3.2"])
    return StandIn(
        [model_from(text) for text in held],
        host=arguments.host,
        port=arguments.port,
        control_port=arguments.control_port,
        hardware=hardware,
        registry=[model_from(text) for text in arguments.registry],
        seed=arguments.seed,
        version=arguments.version,
        **({"on_disk": True, "models_path": path} if path else {}),
        slots=arguments.slots,
        max_loaded_models=arguments.max_loaded_models,
        max_queue=arguments.max_queue,
        keep_alive=arguments.keep_alive,
        default_context=arguments.context,
        download_bytes_per_second=arguments.download_rate,
    )


def model_from(text: str) -> Model:
    """`NAME` or `NAME=BYTES`, bytes also as 2e9."""
    name, _, size = text.partition("=")
    capabilities = ("embedding",) if "embed" in name else ("completion", "tools")
    return Model(name, size_bytes=int(float(size or 2e9)), capabilities=capabilities)


async def _serve(arguments: argparse.Namespace) -> None:
    """Until SIGTERM or SIGINT, which cut everything, as they do to the real one."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    async with _stand_in(arguments) as ollama:
        assert ollama.control is not None
        print(f"ollama   {ollama.url}", f"control  {ollama.control.url}", sep="\n", flush=True)
        await ended.wait()
        await ollama.kill()


if __name__ == "__main__":
    main()
