"""What the agent would report, gathered once and without changing anything."""

import asyncio
from collections.abc import Mapping

import aiohttp

from ollama_coordinator_common.settings import AgentConfig
from ollama_coordinator_common.types import AgentStatus

from .assembly import machine_name, ollama_host, serve_command, state_folder
from .client import CoordinatorClient, CoordinatorError
from .display import Snapshot
from .keeper import GET_OLLAMA
from .metrics import FIRST_SAMPLE_SECONDS, Meter
from .network import coordinator_address, local_address, netloc, resolve
from .ollama import Ollama, OllamaError, Presence
from .reach import needs_relay
from .server_settings import model_folders, runner_settings
from .state import State
from .watch import Facts, environment_of_listener


async def examine(config: AgentConfig, environ: Mapping[str, str]) -> Snapshot:
    """One look at everything; what is wrong is in the snapshot's troubles."""
    state = State(state_folder(config), config.ollama_port)
    agent_id = state.memory.agent_id
    meter = Meter(ollama_port=config.ollama_port, disk=model_folders(environ)[0])
    async with aiohttp.ClientSession() as session:
        url = f"http://{netloc(ollama_host(environ), config.ollama_port)}"
        facts, ollama_trouble = await _look_at_ollama(Ollama(session, url), config, environ)
        client = CoordinatorClient(session, config.coordinator_url)
        coordinator_trouble = await _look_at_coordinator(client, agent_id)
    address = config.ip_address or await _own_address(config)
    is_relayed = address and await needs_relay(config, address, ollama_host(environ))
    meter.read()
    await asyncio.sleep(FIRST_SAMPLE_SECONDS)  # the CPU's share is that since the previous look
    readings = meter.read()
    return Snapshot(
        machine_name=machine_name(config),
        coordinator_url=config.coordinator_url,
        ollama_url=url,
        facts=facts,
        readings=readings,
        agent_id=agent_id,
        machine_id=state.machine_id(create=False),
        ip_address=address,
        relay_port=state.memory.relay_port if is_relayed else None,
        active_requests=readings.connections or 0,
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
        return Facts(presence=exc.presence), _advice(exc, config, environ)
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
        return f"reachable, but it sends no requests to {ours.url}: {ours.out_of_rotation}"
    return f"reachable, but {ours.conflict}" if ours.conflict else None


async def _own_address(config: AgentConfig) -> str | None:
    host, port = coordinator_address(config.coordinator_url)
    return local_address(await resolve(host, port), port)
