"""`/api/agents`: registration, the list, an operator's settings of one agent, and its log."""

import asyncio
import re
import socket
from typing import Annotated, Any
from urllib.parse import urlsplit
from uuid import uuid4

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, structs
from starlette.requests import Request
from starlette.responses import Response

from ollama_coordinator.access import Caller, Denied, Right, caller_of, check_address, secret_in
from ollama_coordinator.agent_logs import LogView
from ollama_coordinator.aio import Slices
from ollama_coordinator.api.http.errors import (
    DECODED_BYTES,
    JSON,
    HttpError,
    decode,
    decoded,
    log_event,
    own_body,
    reply,
)
from ollama_coordinator.api.http.openapi import Either, operation
from ollama_coordinator.api.http.routing import tell
from ollama_coordinator.clock import Clock
from ollama_coordinator.journal import AgentEvent
from ollama_coordinator.link import relay_key_here
from ollama_coordinator.model_probes import ask_restart
from ollama_coordinator.monitor import LIST_BYTES, InCircles, VersionReply
from ollama_coordinator.parts import Parts
from ollama_coordinator.registry import AgentSettings, AgentState, Registration, place_of, url_of
from ollama_coordinator.scheduler import Estimate
from ollama_coordinator.upstream import Unreachable, bearer
from ollama_coordinator_common.handshake import relay_key
from ollama_coordinator_common.network import machine_of, netloc, parse_address
from ollama_coordinator_common.printable import check_printable
from ollama_coordinator_common.protocol import (
    AgentView,
    LogReport,
    RegisterReply,
    RegisterRequest,
)
from ollama_coordinator_common.types import AgentId

FIRST_LOOK_SECONDS = 1.0
"""How long a registration waits for the first list of models: the next request finds them."""


LOOKUP_SECONDS = 1.0
"""How long a host name may take to look up: an agent waits 5 s for its registration."""


CHECK_SECONDS = 10.0
"""How long an Ollama that is added may take to list its models."""


Label = Annotated[str, Meta(max_length=100)]


class SettingsPatch(Struct, frozen=True, forbid_unknown_fields=True):
    """`PATCH /api/agents/{id}`: the settings to change; the others stay.

    `slots`, `memory_bytes` and `gpu` (a name, or `none`) count in place of what the agent reports,
    until they are null again. `overruled`: it gets requests although it pauses, until it returns by
    itself.
    """

    display_name: Annotated[str, Meta(max_length=100)] | UnsetType | None = UNSET
    labels: Annotated[list[Label], Meta(max_length=50)] | UnsetType = UNSET
    notes: Annotated[str, Meta(max_length=10_000)] | UnsetType = UNSET
    draining: bool | UnsetType = UNSET
    overruled: bool | UnsetType = UNSET
    preference: Annotated[float, Meta(gt=0, le=1000)] | UnsetType = UNSET
    backup_seconds: Annotated[float, Meta(ge=0, le=86_400)] | UnsetType = UNSET
    slots: Annotated[int, Meta(ge=1, le=1024)] | UnsetType | None = UNSET
    memory_bytes: Annotated[int, Meta(ge=1, le=2**50)] | UnsetType | None = UNSET
    gpu: Annotated[str, Meta(min_length=1, max_length=100)] | UnsetType | None = UNSET

    def __post_init__(self) -> None:
        if isinstance(self.display_name, str):
            check_printable("display_name", self.display_name)
        if isinstance(self.gpu, str):
            check_printable("gpu", self.gpu)
        if isinstance(self.labels, list):
            check_printable("a label", *self.labels)
        if isinstance(self.notes, str):
            check_printable("notes", self.notes, lines=True)


class UrlRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /api/agents` with the URL of an Ollama without an agent, such as https://HOST/PATH.

    It may be behind TLS, a path, or an API key, which is sent there as a bearer token.
    """

    url: Annotated[str, Meta(max_length=2000)]
    api_key: Annotated[str, Meta(max_length=4096)] = ""
    machine_name: Annotated[str, Meta(max_length=253)] = ""

    def __post_init__(self) -> None:
        if not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("api_key is none that a header can carry")

    def registration(self, version: str = "unknown") -> RegisterRequest:
        """What is kept of it, but for the key.

        Raises:
            ValueError: the URL is none of an Ollama.
        """
        parts = urlsplit(self.url.strip())
        if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
            raise ValueError("give a URL such as https://gateway.example/ollama")
        if parts.username is not None or parts.password is not None:
            raise ValueError("give the key as api_key, and not in the URL, which is shown")
        if parts.query or parts.fragment or not is_plain(parts.path):
            raise ValueError("give a URL without a query, with a path of plain characters")
        usual = DEFAULT_PORTS[parts.scheme]
        port = parts.port or usual
        where = netloc(parts.hostname, port)
        place = (where.removesuffix(f":{port}") if port == usual else where) + parts.path.rstrip(
            "/"
        )
        return RegisterRequest(
            machine_name=self.machine_name or place,
            ip_address=parts.hostname,
            ollama_version=version,
            ollama_port=port,
            url=f"{parts.scheme}://{place}",
        )


is_plain = re.compile(r"[A-Za-z0-9._~/%@:+,-]*").fullmatch
DEFAULT_PORTS = {"http": 80, "https": 443}


class ModelOnAgent(Struct, frozen=True):
    """One model on an agent's disk, and the prediction of its speed there."""

    name: str
    size: int
    digest: str
    details: dict[str, Any]
    capabilities: list[str]
    loaded: bool
    estimate: Estimate | None


class AgentDetails(Struct, frozen=True):
    """`GET /api/agents/{id}/details`: `agent` is its row in the event stream."""

    agent: dict[str, Any]
    models: list[ModelOnAgent]
    events: list[AgentEvent]


async def _addresses_of(host: str, clock: Clock) -> list[str]:
    """What the address of a registration is looked up as, IPv4 first; none where that fails."""
    loop = asyncio.get_running_loop()
    try:
        async with clock.timeout(LOOKUP_SECONDS):
            found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # a TimeoutError is one
        return []
    return sorted((str(address[0]) for *_, address in found), key=lambda text: ":" in text)


class AgentsApi:
    """The handlers of `/api/agents`."""

    def __init__(self, parts: Parts) -> None:
        self._registry = parts.registry
        self._dispatch = parts.dispatch
        self._monitor = parts.monitor
        self._upstreams = parts.upstreams
        self._agent_store = parts.agent_store
        self._store = parts.store
        self._operations = parts.operations
        self._observation = parts.observation
        self._snapshots = parts.snapshots
        self._logs = parts.agent_logs
        self._clock = parts.clock
        self._machines = parts.machines
        self._access = parts.access
        self._keys = parts.access.keys

    @operation(
        takes=Either(RegisterRequest, UrlRequest),
        gives={200: RegisterReply, 201: RegisterReply},
        errors=(403, 409, 503),
    )
    async def register(self, request: Request) -> Response:
        """Register a machine, or renew its registration.

        201 `registered`, or 200 `updated` for a machine that is known already. One with `link` is
        reached once it has opened that. With `url` an operator adds an Ollama that has no agent: it
        is asked first, and kept if it answers.
        """
        body = await own_body(request, DECODED_BYTES)
        if b'"url"' in body and "url" in decoded(dict[str, msgspec.Raw], body):
            return await self._add(decoded(UrlRequest, body), request)
        return await self._register(decoded(RegisterRequest, body), request)

    async def _register(self, wanted: RegisterRequest, request: Request) -> Response:
        caller, secret = caller_of(request.scope), secret_in(request.scope)

        def believed(agent: AgentState) -> bool:
            before = wanted.previous_instance_id
            return self._machines.believes(agent, caller, secret, wanted.instance_id, before)

        may_join = bool(caller.rights & Right.JOIN) or self._machines.admits(secret, caller)
        if not (may_join or self._machines.is_known(secret, caller)):
            raise self._unknown(wanted, secret, request)
        host = await self._host_of(wanted.ip_address, caller, linked=wanted.link)
        if wanted.link:
            host = place_of(wanted, host)
        now = self._clock.now()
        if not (may_join or self._registry.renews(wanted, now, believed, host=host)):
            raise self._unknown(wanted, secret, request)
        away = self._registry.doubtful(wanted, now, host=host, believed=believed)
        answering = [away.id] if away is not None and await self._monitor.answers(away) else []
        key = relay_key(secret) if wanted.handshake and wanted.relay_port else ""
        found = None if wanted.link else await self._version_of(wanted, key)
        now = self._clock.now()
        done = self._registry.register(
            wanted,
            AgentId(str(uuid4())),
            self._clock.utc(now),
            now,
            host=host,
            answering=answering,
            believed=believed,
            yields=lambda agent: self._machines.yields(agent, host, caller),
        )
        agent = done.agent
        if found is not None:
            self._registry.note_probe(agent, found.version, frozenset(found.coordinators))
        for other in done.replaced:
            log_event("agent's Ollama is another agent's now", other, by=agent.name)
            self._agent_store.keep(other)
        if done.created or believed(agent):
            await self._note(done, secret, caller)
        await self._agent_store.keep_now(agent)
        tell(request.scope, agent.name, url=agent.way)
        log_event("agent registered" if done.created else "agent updated", agent, url=agent.way)
        self._dispatch.agent_failed.set()  # if it was out of rotation, it is probed now
        if wanted.link:
            self._dispatch.plan()
        elif agent.inventory.sampled_at is None or not agent.brings_inventory:
            await self._monitor.look_at(agent, seconds=FIRST_LOOK_SECONDS)
        status = "registered" if done.created else "updated"
        reached = UNSET if wanted.link or found is not None else False
        shakes_hands = bool(key) and self._machines.relay_key(agent) == key
        answer = RegisterReply(agent.id, status, reached, shakes_hands or UNSET)
        return reply(answer, 201 if done.created else 200)

    async def _add(self, asked: UrlRequest, request: Request) -> Response:
        """Add an Ollama by its URL, or change the API key of one that was added."""
        caller = caller_of(request.scope)
        if not caller.rights & Right.OPERATE:
            raise caller.needs(Right.OPERATE)
        try:
            wanted = asked.registration()
        except ValueError as exc:
            raise HttpError(400, f"url: {exc}") from exc
        host = place_of(wanted, await self._host_of(wanted.ip_address, caller))
        version = await self._checked(url_of(wanted), asked.api_key)
        wanted = structs.replace(wanted, ollama_version=version)
        now = self._clock.now()
        done = self._registry.register(
            wanted, AgentId(str(uuid4())), self._clock.utc(now), now, host=host
        )
        agent = done.agent
        if agent.registration.url is not None:  # else a machine's own agent has this Ollama
            settings = structs.replace(agent.settings, api_key=asked.api_key)
            self._registry.update_settings(agent.id, settings)
        await self._agent_store.keep_now(agent)
        log_event("Ollama added" if done.created else "Ollama added again", agent, url=agent.way)
        self._dispatch.agent_failed.set()
        await self._monitor.look_at(agent, seconds=FIRST_LOOK_SECONDS)
        status = "registered" if done.created else "updated"
        return reply(RegisterReply(agent.id, status), 201 if done.created else 200)

    async def _checked(self, url: str, api_key: str) -> str:
        """The version of the Ollama at a URL, which answers to this key.

        Raises:
            HttpError: it does not (400).
        """
        try:
            found = await self._monitor.version_at(url, api_key=api_key)
            if not found.version:
                raise Unreachable("is no Ollama: give the URL before its /api")
            status, _ = await self._upstreams.fetch(
                "GET",
                f"{url}/api/tags",
                seconds=CHECK_SECONDS,
                headers=[bearer(api_key)] if api_key else (),
                limit=LIST_BYTES,
            )
            if status != 200:
                raise Unreachable(f"lists no models: /api/tags is answered with {status}")
        except Unreachable as exc:
            raise HttpError(400, f"{url} was not added: {exc}") from exc
        return found.version

    async def _note(self, done: Registration, secret: str, caller: Caller) -> None:
        """Note from where a machine of the fleet spoke, and that its token is used.

        Raises:
            DatabaseError: that it is used is not written: a crash would bring it back.
        """
        self._machines.note(done.agent.id, caller.client.address, secret)
        self._machines.joined(secret, caller)
        if done.created and caller.key is not None and caller.key.once:
            self._keys.revoke(caller.key.id)
            self._agent_store.keep(done.agent)
            await self._store.commit()

    def _unknown(self, wanted: RegisterRequest, secret: str, request: Request) -> Denied:
        """The answer to a machine that is not of the fleet and has nothing to join with."""
        caller = caller_of(request.scope)
        if not secret:
            return caller.needs(Right.JOIN)
        asked = self._machines.ask(wanted, secret, caller)
        return self._access.wrong_key(request.scope) if caller.was_wrong else asked

    async def _host_of(self, host: str, caller: Caller, *, linked: bool = False) -> str:
        """The machine of an agent's address; a name that cannot be looked up is its own.

        Raises:
            Denied: the caller may not register it.
        """
        check_address(host, [], caller)  # a name of clouds' metadata is not even looked up
        found = await _addresses_of(host, self._clock)
        parsed = [address for address in map(parse_address, found or [host]) if address is not None]
        check_address(host, parsed, caller, linked=linked)
        return machine_of(found[0] if found else host)

    async def _version_of(self, wanted: RegisterRequest, key: str) -> VersionReply | None:
        """What the Ollama of a registration says of itself; `None`: it does not answer now.

        `key`: of its relay.

        Raises:
            HttpError: it is a coordinator that asks this one (400).
        """
        url = url_of(wanted)
        token = relay_key_here.set(key)
        try:
            async with self._clock.timeout(FIRST_LOOK_SECONDS):
                return await self._monitor.version_at(url)
        except InCircles as exc:
            raise HttpError(400, f"the Ollama at {url} {exc}") from exc
        except (TimeoutError, Unreachable):
            return None
        finally:
            relay_key_here.reset(token)

    @operation(gives={200: list[AgentView]})
    async def list(self, request: Request) -> Response:
        """Every agent, by name."""
        slices, rows = Slices(), []
        for agent in sorted(self._registry, key=lambda agent: (agent.name, agent.id)):
            await slices.pause()
            rows.append(msgspec.json.encode(self._view(agent)))
        return Response(b"[" + b",".join(rows) + b"]", media_type=JSON)

    @operation(gives={200: AgentView}, errors=(404,))
    async def show(self, request: Request) -> Response:
        """One agent, with the operations that concern it."""
        agent = self._registry.get(request.path_params["agent_id"])
        operations = self._operations.of_agent(agent.id)
        return reply(structs.replace(self._view(agent), operations=operations))

    @operation(takes=SettingsPatch, gives={200: AgentView}, errors=(404, 503))
    async def change(self, request: Request) -> Response:
        """Change the operator's settings of an agent; they are kept across restarts."""
        agent = self._registry.get(request.path_params["agent_id"])
        patch = await decode(SettingsPatch, request)
        changes: dict[str, Any] = {
            name: value for name, value in structs.asdict(patch).items() if value is not UNSET
        }
        settings: AgentSettings = structs.replace(agent.settings, **changes)
        self._registry.update_settings(agent.id, settings)
        await self._agent_store.keep_now(agent)
        tell(request.scope, agent.name, **changes)
        log_event("agent settings changed", agent, changed=sorted(changes))
        self._dispatch.plan()
        return reply(self._view(agent))

    @operation(gives={202: AgentView}, errors=(404, 409))
    async def restart(self, request: Request) -> Response:
        """Restart an Ollama that its agent started, where nothing runs; within some seconds."""
        agent = self._registry.get(request.path_params["agent_id"])
        ask_restart(agent, self._dispatch)
        tell(request.scope, agent.name)
        log_event("restart of its Ollama asked for", agent)
        return reply(self._view(agent), 202)

    @operation(gives={202: AgentView}, errors=(404, 409))
    async def wake(self, request: Request) -> Response:
        """Send a magic packet to an agent's machine; it is there once its agent reports."""
        agent = self._registry.get(request.path_params["agent_id"])
        self._monitor.waker.wake(agent)
        tell(request.scope, agent.name)
        return reply(self._view(agent), 202)

    @operation(gives={204: None}, errors=(404, 503))
    async def remove(self, request: Request) -> Response:
        """Forget an agent; its requests in flight end as they would have."""
        agent = self._registry.remove(AgentId(request.path_params["agent_id"]))
        await self._agent_store.forget(agent.id)
        tell(request.scope, agent.name)
        log_event("agent removed", agent)
        self._dispatch.plan()
        return Response(status_code=204)

    @operation(gives={200: AgentDetails}, errors=(404,))
    async def details(self, request: Request) -> Response:
        """An agent's models with their predictions, and the events logged about it."""
        agent = self._registry.get(request.path_params["agent_id"])
        return reply(
            AgentDetails(
                agent=self._snapshots.agent(agent),
                models=[self._model(agent, key) for key in sorted(agent.inventory.available)],
                events=self._observation.events.of(agent.id),
            )
        )

    @operation(gives={200: LogView}, errors=(404,))
    async def log(self, request: Request) -> Response:
        """An agent's own log; its first lines come some seconds after the first question."""
        agent = self._registry.get(request.path_params["agent_id"])
        sends = agent.registration.agent_version is not None
        return reply(self._logs.look(agent.id, self._clock.now(), sends=sends))

    @operation(takes=LogReport, gives={204: None}, errors=(404,))
    async def take_log(self, request: Request) -> Response:
        """Take the lines of an agent's log, from the agent itself."""
        agent = self._registry.get(request.path_params["agent_id"])
        self._machines.check(agent, request.scope)
        report = await decode(LogReport, request)
        now = self._clock.now()
        self._logs.take(agent.id, report, now, self._clock.utc(now))
        return Response(status_code=204)

    # ── views ─────────────────────────────────────────────────────────────────────────────────────

    def _view(self, agent: AgentState) -> AgentView:
        return self._registry.view(
            agent,
            self._clock.now(),
            last_seen=self._clock.utc(agent.heard_at),
            in_flight=self._dispatch.scheduler.in_flight(agent.id),
        )

    def _model(self, agent: AgentState, key: str) -> ModelOnAgent:
        row = agent.inventory.available[key]
        return ModelOnAgent(
            name=row.model.name,
            size=row.model.size,
            digest=row.model.digest,
            details=row.model.details,
            capabilities=row.model.capabilities,
            loaded=agent.inventory.is_loaded(key),
            estimate=self._dispatch.scheduler.estimate(agent.id, key),
        )
