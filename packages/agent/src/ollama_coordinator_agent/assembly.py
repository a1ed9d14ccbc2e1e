"""Where the agent's parts meet: to run, or for one look at everything."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from datetime import datetime
from pathlib import Path

import aiohttp
from msgspec import structs

from ollama_coordinator_common.handshake import relay_key
from ollama_coordinator_common.protocol import Finding
from ollama_coordinator_common.settings import AgentConfig
from ollama_coordinator_common.tickets import key_of
from ollama_coordinator_common.types import AgentStatus

from .availability import Availability, signs
from .client import CoordinatorClient, CoordinatorError
from .coordinators import DEFAULT, Coordinators
from .daemon import AgentParts, Daemon
from .display import StatusView
from .doctor import FAILED, OK, Surroundings, cards, of_machine, of_the_way
from .manifests import OnDisk, read_manifests
from .metrics import FIRST_SAMPLE_SECONDS, Meter
from .model_server import ModelServer
from .ollama import (
    Ollama,
    OllamaError,
    Presence,
    environment_of_listener,
    model_folders,
    ollama_host,
    runner_settings,
)
from .pacing import AgentPace
from .process import ServeCommand, find_binary, left_behind, orphaned_runners
from .reach import Reach, Transport, needs_relay, own_address
from .recent import Logs, Recent
from .relay import TcpRelay, parse_networks
from .settings import certificate, join_token, machine_name, schedule, state_folder
from .state import StateFolder
from .supervisor import GET_OLLAMA, Supervisor
from .watch import Facts, Watch

PACE = AgentPace()


@asynccontextmanager
async def assembled(
    config: AgentConfig, environ: Mapping[str, str], *, pace: AgentPace = PACE
) -> AsyncIterator[Daemon]:
    """A daemon that is ready to run; what it uses is closed after the block.

    Raises:
        AlreadyRunning: another agent looks after the same Ollama.
    """
    state = StateFolder(state_folder(config, take_over=True), config.ollama_port)
    host = ollama_host(environ)
    changed = asyncio.Event()
    secret = state.secret()
    allowed = parse_networks(config.relay_allow)
    relay = TcpRelay(host, config.ollama_port, allowed, relay_key(key_of(secret)) if secret else "")
    supervisor = Supervisor(
        serve_command(config, environ, state.log_file),
        state,
        pace,
        may_start=config.manage_ollama,
        keep=config.keep_ollama,
    )
    async with AsyncExitStack() as stack:
        stack.enter_context(state.only_agent())
        recent = stack.enter_context(_recording())
        session = await stack.enter_async_context(aiohttp.ClientSession())
        ollama = Ollama(session, host, config.ollama_port)
        client = CoordinatorClient(
            session,
            secret=secret,
            token=join_token(config),
            certificate=certificate(config),
        )
        reach = Reach(config, relay, state, changed, pace)
        watch = Watch(ollama, supervisor, environ, changed, pace)
        usual = model_folders(environ)[0]
        meter = Meter(ollama_port=config.ollama_port, disk=usual, folders=lambda: watch.folders)
        stack.enter_context(meter)
        parts = AgentParts(
            client=client,
            coordinators=Coordinators(config, client, reach, state),
            watch=watch,
            reach=reach,
            transport=Transport(config, state),
            meter=meter,
            availability=Availability(schedule(config), config.idle_after),
            state=state,
            logs=Logs(recent, state.log_file),
            models=ModelServer(config, client, watch, state, changed, pace),
            surroundings=surroundings(config, environ, state, ollama.url),
            changed=changed,
        )
        yield Daemon(config, parts, pace)


@contextmanager
def _recording() -> Iterator[Recent]:
    """The last lines of the log, kept as long as the block runs."""
    recent = Recent()
    logging.getLogger().addHandler(recent)
    try:
        yield recent
    finally:
        logging.getLogger().removeHandler(recent)


def serve_command(
    config: AgentConfig, environ: Mapping[str, str], log_file: Path
) -> ServeCommand | None:
    """How to start Ollama here; `None` if it is not installed."""
    binary = find_binary(config.ollama_binary, environ)
    if binary is None:
        return None
    return ServeCommand(binary, environ, config.ollama_port, log_file)


def surroundings(
    config: AgentConfig, environ: Mapping[str, str], state: StateFolder, url: str
) -> Surroundings:
    """What is beside the Ollama at a URL, but for what has to be read or asked."""
    return Surroundings(
        url=url,
        binary=find_binary(config.ollama_binary, environ),
        may_start=config.manage_ollama,
        unkept=state.unkept,
    )


async def diagnosed(
    config: AgentConfig, environ: Mapping[str, str]
) -> AsyncGenerator[Finding, None]:
    """The doctor's findings, each as soon as it is there; nothing is changed."""
    state = StateFolder(state_folder(config), config.ollama_port)
    is_reached = False
    async with aiohttp.ClientSession() as session:
        pinned = certificate(config)
        client = CoordinatorClient(
            session,
            secret=state.secret(create=False),
            token=join_token(config),
            certificate=pinned,
        )
        for url in config.coordinator_urls or (state.last_run.coordinator_url or DEFAULT,):
            client.follow(url)
            async for finding in of_the_way(client, pinned):
                is_reached = finding.check == "key" and finding.level == OK
                yield finding
            if is_reached:
                yield await _standing(client, state.last_run.agent_id)
                break
        ollama = Ollama(session, ollama_host(environ), config.ollama_port)
        facts = await _facts(ollama, config, environ)
    meter = await asyncio.to_thread(_meter, config, environ)
    around = structs.replace(
        surroundings(config, environ, state, ollama.url),
        cards=await asyncio.to_thread(cards),
        skew_seconds=client.skew_seconds,
    )
    for finding in of_machine(facts, await asyncio.to_thread(meter.read), around):
        yield finding


def _meter(config: AgentConfig, environ: Mapping[str, str]) -> Meter:
    """One that looks at the disk where the server keeps its models."""
    served = environment_of_listener(config.ollama_port) or environ
    return Meter(ollama_port=config.ollama_port, disk=model_folders(served)[0])


async def _standing(client: CoordinatorClient, agent_id: str | None) -> Finding:
    """What the coordinator makes of this machine: whether it is known, and reached."""
    trouble = await _look_at_coordinator(client, agent_id)
    if trouble is None:
        return Finding("transport", OK, "registered, and the coordinator reaches its Ollama")
    return Finding("transport", FAILED, trouble)


async def _facts(ollama: Ollama, config: AgentConfig, environ: Mapping[str, str]) -> Facts:
    """What a look at Ollama, at its files and at what a killed one left finds."""
    facts, _ = await _look_at_ollama(ollama, config, environ)
    left = await asyncio.to_thread(orphaned_runners)
    disk = OnDisk()
    if facts.tags is not None:
        pairs = [(name, digest) for name, digest, _ in facts.tags.models]
        folders = model_folders(environ)
        disk = await asyncio.to_thread(read_manifests, pairs, folders, is_certain=False)
    return structs.replace(facts, disk=disk, left_behind=left_behind(left) if left else None)


async def examined(config: AgentConfig, environ: Mapping[str, str]) -> StatusView:
    """One look at everything, which changes nothing; what is wrong is in the view's troubles."""
    state = StateFolder(state_folder(config), config.ollama_port)
    agent_id = state.last_run.agent_id
    host = ollama_host(environ)
    meter = await asyncio.to_thread(_meter, config, environ)
    async with aiohttp.ClientSession() as session:
        ollama = Ollama(session, host, config.ollama_port)
        facts, ollama_trouble = await _look_at_ollama(ollama, config, environ)
        client = CoordinatorClient(
            session,
            secret=state.secret(create=False),
            token=join_token(config),
            certificate=certificate(config),
        )
        for url in config.coordinator_urls or (state.last_run.coordinator_url or DEFAULT,):
            client.follow(url)
            coordinator_trouble = await _look_at_coordinator(client, agent_id)
            if coordinator_trouble is None:
                break
    address = await own_address(config, client.url)
    is_relayed = address and await needs_relay(config, address, host)
    meter.read()
    await asyncio.sleep(FIRST_SAMPLE_SECONDS)  # the CPU's share is that since the previous look
    readings = meter.read()
    availability = Availability(schedule(config), config.idle_after)
    found = await asyncio.to_thread(signs, None)
    return StatusView(
        machine_name=machine_name(config),
        coordinator_url=client.url,
        ollama_url=ollama.url,
        facts=facts,
        readings=readings,
        agent_id=agent_id,
        machine_id=state.machine_id(create=False),
        ip_address=address,
        relay_port=state.last_run.relay_port if is_relayed else None,
        is_linked=Transport(config, state).is_link,
        active_requests=readings.requests or 0,
        paused=availability.reason(datetime.now(), time.monotonic(), found),
        coordinator_trouble=coordinator_trouble,
        ollama_trouble=ollama_trouble,
    )


async def _look_at_ollama(
    ollama: Ollama, config: AgentConfig, environ: Mapping[str, str]
) -> tuple[Facts, str | None]:
    try:
        version = await ollama.version()
        tags, ps = await ollama.tags(), await ollama.ps()
    except OllamaError as exc:
        return Facts(exc.presence, trouble=str(exc)), _advice(exc, config, environ)
    of_server = await asyncio.to_thread(environment_of_listener, config.ollama_port)
    runner = None if of_server is None else runner_settings(of_server, version)
    facts = Facts(Presence.ANSWERING, version=version, tags=tags, ps=ps, runner=runner)
    return facts, None


def _advice(exc: OllamaError, config: AgentConfig, environ: Mapping[str, str]) -> str:
    if exc.presence is not Presence.ABSENT:
        return str(exc)
    command = serve_command(config, environ, state_folder(config) / "unused")
    if command is None:
        return f"{exc}, and it is not installed; {GET_OLLAMA}"
    if not config.manage_ollama:
        return f"{exc}; start `ollama serve` (AGENT_MANAGE_OLLAMA is false)"
    return f"{exc}; `ollama-coordinator-agent run` would start {command.binary}"


async def _look_at_coordinator(client: CoordinatorClient, agent_id: str | None) -> str | None:
    try:
        agents = await client.agents()
    except CoordinatorError as exc:
        return str(exc)
    ours = next((agent for agent in agents if agent.id == agent_id), None)
    if ours is None:
        return "reachable, but this machine is not registered; start `ollama-coordinator-agent run`"
    if ours.status is AgentStatus.OFFLINE:
        return "reachable, but it sees this machine offline; is the agent running?"
    if ours.out_of_rotation is not None:
        way = "its link" if ours.link else ours.url
        return f"reachable, but it sends no requests to {way}: {ours.out_of_rotation}"
    return f"reachable, but {ours.conflict}" if ours.conflict else None
