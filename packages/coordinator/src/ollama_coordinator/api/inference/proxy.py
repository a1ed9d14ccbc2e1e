"""The request path, in the order a request meets it.

Read the routing fields; lease a place; open the upstream; relay until either side ends; settle the
lease with the outcome; or answer the error in the client's dialect. Bodies pass as they are.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import inf
from secrets import token_hex

import msgspec
from msgspec import structs
from starlette.types import Receive, Scope, Send

from ollama_coordinator.access import Account, Right, caller_of
from ollama_coordinator.agent_queries import CloudDisabled
from ollama_coordinator.aliases import Alias
from ollama_coordinator.api.http.body_timeout import until_disconnect
from ollama_coordinator.api.http.dialects import Dialect, InferenceRoute, error_record
from ollama_coordinator.api.http.errors import (
    ClientLeft,
    HttpError,
    NoSuchModel,
    send_error,
    send_whole,
)
from ollama_coordinator.api.http.headers import to_client, to_ollama, uncompressed
from ollama_coordinator.api.http.json_edit import Body, edited, is_small
from ollama_coordinator.api.http.routing import change_of, tell
from ollama_coordinator.batches import REASON, Batches
from ollama_coordinator.dispatch import HandedOver, Held
from ollama_coordinator.journal import JournalEntry, tokens_of
from ollama_coordinator.parts import Parts
from ollama_coordinator.registry import AgentState
from ollama_coordinator.scheduler import (
    Form,
    Kind,
    Lane,
    ModelNotFound,
    Request,
    Result,
    SchedulerError,
)
from ollama_coordinator.traces import traced
from ollama_coordinator.upstream import (
    SMALL_ANSWER_BYTES,
    RequestCancelled,
    UpstreamError,
    whole,
)
from ollama_coordinator_common.error import InvalidModelName, OllamaCoordinatorError
from ollama_coordinator_common.names import model_key

from . import audio
from .context_fit import ContextFit
from .continuation import Continuations, Onward
from .portions import Portions
from .relay import CARRIER, Call, Carrier, Course, Failure, Sent, Way, attempted
from .request import (
    LANE,
    WAITED,
    NotDecompressed,
    Routing,
    plain_body,
    read_any,
    read_body,
    schedulable,
)
from .retry_rule import Poison, error_text, say_the_same
from .unload import make_room, unload_everywhere

ASKED_SECONDS = 1.0
"""How long an Ollama may take to refuse a body; the client waits for its 404 meanwhile."""

IDLE_SECONDS = 1.0
"""Whoever closes idle connections lets them be idle for longer."""

OF_THE_NAME = ("", "model is required", "invalid model name")
"""What Ollama says of a body without a model's name where nothing else is wrong with it."""

OF_THE_CLOUD = (":cloud", "-cloud")
"""The ends of the routing keys of models that ollama.com runs."""


class Proxy:
    """The ASGI application of one inference route."""

    def __init__(
        self,
        parts: Parts,
        route: InferenceRoute,
        context_fit: ContextFit,
        poison: Poison,
        batches: Batches,
        continuations: Continuations,
    ) -> None:
        self._parts = parts
        self._registry = parts.registry
        self._aliases = parts.aliases
        self._dispatch = parts.dispatch
        self._upstreams = parts.upstreams
        self._clock = parts.clock
        self._cloud = parts.cloud
        self._journal = parts.observation.journal
        self._route = route
        self._context_fit = context_fit
        self._poison = poison
        self._batches = batches
        self._continuations = continuations
        self._portions = Portions(parts)
        self._settings = parts.settings
        self._turn = parts.reading
        self._usage = parts.access.usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        body: Body = b""
        began_at = self._clock.now()
        try:
            headers = dict(scope["headers"])
            body = await read_body(receive, self._settings.config.max_body_bytes, headers)
            async with until_disconnect(scope, receive):
                routing = await self._read_routing(headers, body)
                alias = self._aliases.find(routing.name)
                if alias is not None:
                    await self._serve_alias(alias, routing, scope, body, send)
                    return
                request = self._schedulable(routing, scope)
                with self._watched(request, routing, headers) as request:
                    call = await self._prepare(request, routing, scope, body, send)
                    if call.unloads:
                        await self._unload(call, scope)
                        return
                    with self._followed(call, scope) as (entry, account):
                        await self._serve(call, entry, account)
        except ClientLeft:
            return
        except HandedOver:
            if self._parts.pass_on is None or CARRIER in scope:
                raise  # its front passes it on
            waited = self._clock.now() - began_at
            await self._parts.pass_on(scope, body, receive, send, waited)
        except (NotDecompressed, CloudDisabled) as error:
            await send_error(send, Dialect.NATIVE, error)
        except (NoSuchModel, InvalidModelName) as error:
            if not await self._ask_ollama(error, scope, body, send):
                await send_error(send, self._route.dialect, error)
        except OllamaCoordinatorError as error:
            await send_error(send, self._route.dialect, error)

    # ── read ──────────────────────────────────────────────────────────────────────────────────

    async def _read_routing(self, headers: Mapping[bytes, bytes], body: Body) -> Routing:
        if self._route.path == audio.PATH:
            content_type = headers.get(b"content-type", b"").decode("latin-1")
            async with self._turn:
                return await audio.read_form(content_type, body)
        if b"content-encoding" in headers:
            async with self._turn:  # one decompressed body at a time
                plain = await plain_body(self._route, headers, body)
                return await read_any(self._route, plain, asyncio.Lock())
        return await read_any(self._route, body, self._turn)

    async def _ask_ollama(
        self, error: OllamaCoordinatorError, scope: Scope, body: Body, send: Send
    ) -> bool:
        """Answer as an agent's Ollama does, if it refuses the body before it looks for the model.

        It is asked for a model that it cannot have, so that nothing runs there.
        """
        is_named = not isinstance(error, NoSuchModel) or error.name != ""
        agent = next(iter(self._parts.queries.routable()), None)
        if agent is None or self._route.path == audio.PATH:
            return False
        async with self._turn:  # one decompressed body at a time
            plain = await plain_body(self._route, dict(scope["headers"]), body)
        if not is_small(plain):
            return False
        absent: Body | None = plain
        try:
            if is_named:
                absent = await edited(plain, {"model": b'"%b"' % token_hex(16).encode()})
            if absent is None:
                return False
            async with (
                self._clock.timeout(ASKED_SECONDS),
                self._upstreams.open(
                    "POST",
                    agent.url + self._route.path,
                    headers=uncompressed(to_ollama(scope["headers"])),
                    body=absent,
                ) as response,
            ):
                answer = await whole(response, SMALL_ANSWER_BYTES)
        except (HttpError, UpstreamError, TimeoutError):
            return False
        if response.status != 400 or error_text(answer) in OF_THE_NAME:
            return False
        await send_whole(send, 400, to_client(response.raw_headers), answer)
        return True

    def _schedulable(self, routing: Routing, scope: Scope) -> Request:
        pace = self._settings.config.reading_pace
        arrived_at = self._clock.now() - scope.get(WAITED, 0.0)
        return schedulable(self._route, routing, scope, arrived_at, pace=pace)

    @contextmanager
    def _watched(
        self, request: Request, routing: Routing, headers: Mapping[bytes, bytes]
    ) -> Iterator[Request]:
        """See what the client does, as long as the block runs; a batch changes its lane."""
        opening, is_whole = routing.opening, False
        is_read = request.form is Form.STREAM and request.kind is Kind.CHAT
        if (
            self._batches.arrived(request.client, opening, request.arrived_at, is_read=is_read)
            and LANE not in headers
            and not request.lane_reason
        ):
            request = structs.replace(request, lane=Lane.BATCH, lane_reason=REASON)
        try:
            yield request
            is_whole = True
        finally:
            now = self._clock.now()
            self._batches.ended(request.client, opening, now, is_read=is_read, is_whole=is_whole)

    async def _prepare(
        self, request: Request, routing: Routing, scope: Scope, body: Body, send: Send
    ) -> Call:
        """The request as it goes on. Its model's holders are found here, and by the scheduler."""
        holders = self._registry.holders(request.model)
        if not holders:
            # Perhaps pulled a moment ago on an agent that does not report its models by itself.
            await self._parts.monitor.refresh(self._registry, older_than=0.5, seconds=1.0)
            holders = self._registry.holders(request.model)
        offered: list[AgentState] = []
        if request.model.endswith(OF_THE_CLOUD):
            offered = await self._cloud.offer(request.model, request.name, holders)
        fitted = await self._context_fit.fit(self._route, request, body, holders, offered)
        # A model at ollama.com is not in any agent's memory.
        unloads = routing.unload_only and not (offered and not holders)
        headers = to_ollama(scope["headers"])
        carrier: Carrier | None = scope.get(CARRIER)
        body, request = fitted.body, fitted.request
        continues = self._continuations.may(
            self._route, request, body, dict(scope["headers"]), caller_of(scope).key
        )
        return Call(self._route, request, headers, body, send, unloads, fitted, carrier, continues)

    async def _unload(self, call: Call, scope: Scope) -> None:
        caller = caller_of(scope)
        if not caller.rights & Right.MANAGE:
            raise caller.needs(Right.MANAGE)
        await unload_everywhere(self._parts, call)
        tell(scope, call.request.name, unloads=True)
        self._parts.observation.note_change(change_of(scope, self._route.path, 200))

    @contextmanager
    def _followed(self, call: Call, scope: Scope) -> Iterator[tuple[JournalEntry, Account]]:
        """Keep the request in the journal, and its caller's account, as long as the block runs."""
        request, caller = call.request, caller_of(scope)
        now, path = self._clock.now(), self._route.path
        trace = self._parts.traces.begin(request, path, call.headers, now)
        with (
            self._journal.follow(request, path, trace) as entry,
            self._usage.admitted(caller, request.prompt_tokens, request.output_limit) as account,
        ):
            yield entry, account

    # ── an alias: its models in their order, until one serves ─────────────────────────────────

    async def _serve_alias(
        self, alias: Alias, routing: Routing, scope: Scope, body: Body, send: Send
    ) -> None:
        models = self._aliases.usable(alias, caller_of(scope))
        headers = dict(scope["headers"])
        if len(models) > 1:
            body = bytes(body)  # which is edited for one model after the other
        wanted = self._schedulable(structs.replace(routing, name=models[0]), scope)
        with self._watched(wanted, routing, headers) as watched:
            wanted = structs.replace(watched, alias=alias.name)
            prepared = partial(
                self._renamed, wanted, routing=routing, scope=scope, body=body, send=send
            )
            call = await prepared(models[0])
            if call.unloads:
                await self._unload(call, scope)
                return
            with self._followed(call, scope) as (entry, account):
                errors: list[OllamaCoordinatorError] = []
                for model in models[1:]:
                    tried = structs.replace(call, request=self._impatient(call.request, alias))
                    if await self._has_served(tried, entry, account, errors):
                        return
                    call = await prepared(model)
                    entry.request = call.request
                if not await self._has_served(call, entry, account, errors):
                    raise self._none_served(alias, errors)

    async def _has_served(
        self,
        call: Call,
        entry: JournalEntry,
        account: Account,
        errors: list[OllamaCoordinatorError],
    ) -> bool:
        """Whether one model of an alias has given the answer; else why not is added to `errors`."""
        try:
            failures, is_poison = await self._attempts(call, entry, account)
        except (SchedulerError, NoSuchModel, CloudDisabled) as error:
            errors.append(error)
            return False
        if is_poison:  # the request's own fault: it would be the same with another model
            await self._answer_failure(call, failures)
        elif failures:
            errors.append(self._failed(call, failures))
        return is_poison or not failures

    def _none_served(
        self, alias: Alias, errors: Sequence[OllamaCoordinatorError]
    ) -> OllamaCoordinatorError:
        """Why the first model did not serve that an agent has; 404 if none has any."""
        for error in errors:
            if not isinstance(error, NoSuchModel | ModelNotFound):
                return error
        missing = self._route.unknown(alias.name)
        text = f"{missing}: it is an alias of {', '.join(alias.models)}, which no agent has"
        return HttpError(404, text)

    def _impatient(self, request: Request, alias: Alias) -> Request:
        """The request as it waits for a model that another one may replace."""
        request = structs.replace(request, wakes=False)
        if alias.wait_seconds is None:
            return request
        until = self._clock.now() + alias.wait_seconds
        earlier = until if request.deadline is None else min(until, request.deadline)
        return structs.replace(request, deadline=earlier)

    async def _renamed(
        self, wanted: Request, model: str, *, routing: Routing, scope: Scope, body: Body, send: Send
    ) -> Call:
        """The request for one model of an alias: its name is the only thing that changes."""
        headers = dict(scope["headers"])
        if self._route.path == audio.PATH:
            content_type = headers.get(b"content-type", b"").decode("latin-1")
            body = await audio.renamed_form(content_type, body, model)
        else:
            async with self._turn:
                plain = await plain_body(self._route, headers, body)
                body = await edited(plain, {"model": msgspec.json.encode(model)}) or body
        request = structs.replace(wanted, model=model_key(model), name=model)
        call = await self._prepare(request, routing, scope, body, send)
        return structs.replace(call, headers=uncompressed(call.headers))

    # ── lease and try, each agent at most once ────────────────────────────────────────────────

    async def _serve(self, call: Call, entry: JournalEntry, account: Account) -> None:
        failures, _ = await self._attempts(call, entry, account)
        if failures:
            await self._answer_failure(call, failures)

    async def _attempts(
        self, call: Call, entry: JournalEntry, account: Account
    ) -> tuple[list[Failure], bool]:
        """Why no agent served the request; none: it has its answer. And whether it is poison.

        Raises:
            OllamaCoordinatorError: it was not tried at all.
        """
        portions = await self._portions.of(call)
        if portions:
            attempts = partial(self._tried, entry=entry, account=account)
            return await self._portions.serve(call, portions, entry, attempts)
        return await self._tried(call, entry, account)

    async def _tried(
        self, call: Call, entry: JournalEntry, account: Account
    ) -> tuple[list[Failure], bool]:
        """As `_attempts`, of a request that goes out whole."""
        course = Course(call.request, () if call.fitted is None else call.fitted.small)
        is_poison = False
        while not (is_poison or course.is_over):
            try:
                held, failure = await self._next(call, course, entry, account)
                now = self._clock.now()
                is_poison = await self._poison.stops(course.request, call.body, held, now)
            except SchedulerError as exc:
                course.refused(exc, self._missing)
                continue
            except HandedOver:
                if course.onward is None:
                    raise
                break  # the next leader does not know what the client has
            except RequestCancelled as exc:
                if course.onward is None:
                    raise
                entry.cancelled(str(exc))
                await _break_off(call, str(exc))
                return [], False
            if failure is None:
                return [], False
            course.failed(held, failure)
            await self._turn_on(call, course, entry, held, failure)
        self._pardon(course.request, course.failures, is_poison=is_poison)
        if course.onward is not None:  # the client has a part of the answer
            await _break_off(call, course.onward.written.reason)
            return [], False
        return course.failures, is_poison

    async def _next(
        self, call: Call, course: Course, entry: JournalEntry, account: Account
    ) -> tuple[Held, Failure | None]:
        """One attempt, with its lease, and why it failed."""
        with traced(entry.trace) as trace:
            async with self._dispatch.lease(course.request) as held:
                self._journal.leased(entry, held)
                if trace is not None:
                    call = structs.replace(call, headers=trace.granted(held, call.headers))
                try:
                    return held, await self._attempt(call, held, course.onward)
                finally:
                    seconds = self._clock.now() - held.lease.granted_at
                    entry.gpu_seconds += seconds
                    account.add(tokens_of(held), seconds)

    async def _turn_on(
        self, call: Call, course: Course, entry: JournalEntry, held: Held, failure: Failure
    ) -> None:
        """Where the client has a part of the answer, look for who goes on with it."""
        written, onward = failure.written, course.onward
        if written is not None:
            self._journal.passed_on(entry, held, written.tokens)
            course.is_over = self._dispatch.closed
            if onward is None:
                limit = await self._continuations.limit(course.request, call.body)
                course.onward = Onward(call.route.path, written, held.agent.name, limit)
            else:
                course.onward = onward.then(held.agent.name, written)
            course.request = self._continuations.rest(course.request, held, course.onward)
        elif onward is not None:
            course.request = self._continuations.without_unable(course.request, held)

    def _pardon(self, request: Request, failures: Sequence[Failure], *, is_poison: bool) -> None:
        """No agent served the request: those that say the same are not to blame for it."""
        for one in failures:
            if one.outcome.result in (Result.REJECTED, Result.TAKEN_BACK):
                continue  # nobody blamed it
            others = (other.outcome for other in failures if other is not one)
            agent = self._registry.find(one.agent_id)
            is_blameless = is_poison or any(say_the_same(one.outcome, other) for other in others)
            if is_blameless and agent is not None:
                self._dispatch.pardon(agent, request.model)

    def _missing(self, request: Request) -> OllamaCoordinatorError:
        if request.model.endswith(OF_THE_CLOUD):
            return CloudDisabled("remote model is unavailable")
        return NoSuchModel(404, self._route.unknown(request.name), request.name)

    async def _attempt(self, call: Call, held: Held, onward: Onward | None) -> Failure | None:
        """Try one agent; `None` when the client has its answer, also one that broke off for good.

        `onward`: the client has a part of the answer, which this attempt continues.
        """
        body, held.note = call.body, ""
        if call.fitted is not None:
            body, held.note, held.num_ctx = await self._context_fit.at(call.fitted, held.agent)
        if held.lease.unload:
            await make_room(self._parts, held.agent, held.lease.unload)
        url, path = held.agent.url, call.route.path
        way = self._way(call, held)
        continues = None if onward is None else onward.by(held.agent.name)
        sent = Sent(url + path, path, call.headers, way, onward=continues)
        if call.carrier is not None and not self._is_ours_alone(held.agent, call.carrier):
            sent = structs.replace(sent, relay_key=self._parts.machines.relay_key(held.agent))
            if body is not call.body:
                sent = structs.replace(sent, body=bytes(body))
            others, again_after = self._others(call.request, held), self._again_after(held)
            failure = await call.carrier.carry(sent, held, others, again_after)
            if failure is None:  # whoever looks at answers on their way sees this one here
                await send_whole(call.send, held.status or 200, [], b"")
        else:
            began = partial(self._dispatch.began, held)
            failure = await attempted(
                self._upstreams,
                sent,
                body,
                held,
                call.send,
                began,
                self._clock.now,
                partial(self._others, call.request, held),
                lambda idle_seconds: idle_seconds >= self._again_after(held),
            )
        if held.status and call.request.model.endswith(OF_THE_CLOUD):
            self._cloud.note(held.agent.id, held.status)
        return failure

    def _is_ours_alone(self, agent: AgentState, carrier: Carrier) -> bool:
        """Whether a front cannot carry out attempts at an agent."""
        if agent.registration.link or self._upstreams.has_key(agent.url):
            return True
        return not carrier.shakes_hands and bool(self._parts.machines.relay_key(agent))

    def _way(self, call: Call, held: Held) -> Way:
        request, agent = call.request, held.agent
        key = request.model
        row, servable = agent.inventory.available.get(key), agent.inventory.servable.get(key)
        of_cloud = servable is not None and bool(servable.model.remote_host)
        return Way(
            agent.id,
            agent.name,
            request.id,
            request.name,
            request.name if request.alias else "",
            held.note,
            None if row is None else row.model.name,
            of_cloud,
            call.continues and not of_cloud,
        )

    def _others(self, request: Request, held: Held) -> list[str] | None:
        """The capabilities that other holders list; `None` where none lists any."""
        listed = {
            capability
            for agent in self._registry.holders(request.model)
            if agent is not held.agent
            for capability in agent.inventory.available[request.model].model.capabilities
        }
        return sorted(listed) or None

    def _again_after(self, held: Held) -> float:
        """How long a kept connection was idle that was closed for that; else its agent broke it
        off. The only agent is asked once more anyway.
        """
        request, now = held.lease.request, self._clock.now()
        others = (one for one in self._registry.servers(request.model) if one is not held.agent)
        if not any(
            one.id not in request.excluded and self._registry.is_routable(one, now)
            for one in others
        ):
            return 0.0
        return inf if request.model in held.agent.model_cooldowns else IDLE_SECONDS

    async def _answer_failure(self, call: Call, failures: Sequence[Failure]) -> None:
        """Every agent failed: answer with the last one's refusal, or why none was reached."""
        for failure in reversed(failures):
            if failure.status:
                await send_whole(call.send, failure.status, failure.headers, failure.body)
                return
        raise self._failed(call, failures)

    def _failed(self, call: Call, failures: Sequence[Failure]) -> HttpError:
        reason = failures[-1].outcome.reason
        return HttpError(503, f"no agent could serve model '{call.request.name}': {reason}")


async def _break_off(call: Call, reason: str) -> None:
    """End an answer of which the client has a part, with an error."""
    record = error_record(call.route, reason)
    await call.send({"type": "http.response.body", "body": record, "more_body": False})
