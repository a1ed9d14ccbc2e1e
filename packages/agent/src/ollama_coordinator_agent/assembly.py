"""Where the agent's parts meet; the only place that knows all of them."""

import asyncio
import logging
import platform
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import aiohttp
import platformdirs

from ollama_coordinator_common.settings import AgentConfig

from .client import CoordinatorClient
from .daemon import Daemon, Pace
from .keeper import Keeper, KeeperPace
from .lock import only_one
from .metrics import Meter
from .network import netloc, reachable
from .ollama import Ollama
from .reach import Reach
from .recent import Logs, Recent
from .relay import Relay, parse_networks
from .serve import ServeCommand, find_binary
from .server_settings import model_folders, serve_host
from .state import State
from .watch import Watch, WatchPace


def state_folder(config: AgentConfig) -> Path:
    """Where the agent keeps its files."""
    fallback = platformdirs.user_state_path("ollama-coordinator-agent", appauthor=False)
    return config.state_dir or fallback


def machine_name(config: AgentConfig) -> str:
    """What people call this machine."""
    return config.machine_name or platform.node() or "unknown"


def ollama_host(environ: Mapping[str, str]) -> str:
    """Where, seen from here, Ollama listens."""
    return reachable(serve_host(environ))


def serve_command(
    config: AgentConfig, environ: Mapping[str, str], log_file: Path
) -> ServeCommand | None:
    """How to start Ollama here; `None` if it is not installed."""
    binary = find_binary(config.ollama_binary, environ)
    if binary is None:
        return None
    return ServeCommand(binary, environ, config.ollama_port, log_file)


PACE, WATCH_PACE, KEEPER_PACE = Pace(), WatchPace(), KeeperPace()


@contextmanager
def _recording() -> Iterator[Recent]:
    """The last lines of the log, kept as long as the block runs."""
    recent = Recent()
    logging.getLogger().addHandler(recent)
    try:
        yield recent
    finally:
        logging.getLogger().removeHandler(recent)


@asynccontextmanager
async def assembled(
    config: AgentConfig,
    environ: Mapping[str, str],
    *,
    pace: Pace = PACE,
    watch_pace: WatchPace = WATCH_PACE,
    keeper_pace: KeeperPace = KEEPER_PACE,
) -> AsyncIterator[Daemon]:
    """A daemon that is ready to run, holding what must be closed afterwards.

    Raises:
        AlreadyRunning: another agent looks after the same Ollama.
    """
    state = State(state_folder(config), config.ollama_port)
    host = ollama_host(environ)
    changed = asyncio.Event()
    relay = Relay(host, config.ollama_port, parse_networks(config.relay_allow))
    async with AsyncExitStack() as stack:
        stack.enter_context(only_one(state.lock_file))
        recent = stack.enter_context(_recording())
        session = await stack.enter_async_context(aiohttp.ClientSession())
        meter = Meter(ollama_port=config.ollama_port, disk=model_folders(environ)[0])
        stack.enter_context(meter)
        command = serve_command(config, environ, state.log_file)
        watch = Watch(
            Ollama(session, f"http://{netloc(host, config.ollama_port)}"),
            Keeper(command, state, may_start=config.manage_ollama, pace=keeper_pace),
            environ=environ,
            port=config.ollama_port,
            changed=changed,
            keep_server=config.keep_ollama,
            pace=watch_pace,
        )
        yield Daemon(
            config,
            client=CoordinatorClient(session, config.coordinator_url),
            watch=watch,
            reach=Reach(config, relay, state, ollama_host=host, changed=changed),
            relay=relay,
            meter=meter,
            state=state,
            logs=Logs(recent, state.log_file),
            machine_name=machine_name(config),
            changed=changed,
            pace=pace,
        )
