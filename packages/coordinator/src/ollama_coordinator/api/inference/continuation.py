"""Answers that go on: what is kept of a stream, and how another agent continues it after a cut.

A holder of the same content renders the request (`_debug_render_only`, which Ollama does not
document), and its `/api/generate` goes on from that prompt and the text so far, `raw`. Its records
become those of the client's dialect. The text may differ from what the lost agent would have
written: where its tokens end is not known.

Of a stream under way only the bytes are kept; they are read after a cut. An answer that calls
tools, has thought, has a format or probabilities is not continued, nor is a prompt with images.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from urllib.parse import quote

import msgspec
from msgspec import Raw, Struct, structs
from starlette.types import Message, Send

from ollama_coordinator.access.keys import Key
from ollama_coordinator.api.http.dialects import (
    DATA,
    NANOSECONDS,
    Dialect,
    InferenceRoute,
    error_record,
)
from ollama_coordinator.api.http.errors import HttpError
from ollama_coordinator.api.http.json_edit import Body, Scan, edited
from ollama_coordinator.api.models.lists import is_known
from ollama_coordinator.dispatch import Held
from ollama_coordinator.parts import Parts
from ollama_coordinator.scheduler import Form, Outcome, Request, Result
from ollama_coordinator.upstream import Upstreams, whole
from ollama_coordinator_common.error import OllamaCoordinatorError

from .retry_rule import error_text, judge

ROUTES = frozenset({"/api/chat", "/api/generate", "/v1/chat/completions"})
"""Those whose answers are continued."""

GENERATE = "/api/generate"
"""The route that continues an answer, whatever the client's is."""

KEPT_BYTES = 1024 * 1024
"""Of an answer under way: some 5,000 to 10,000 tokens. A longer one is not continued."""

MOST_BODY_BYTES = 4 * 1024 * 1024
"""Of a request: a million tokens. A longer one has images, as a rule."""

CANNOT_RENDER = "its Ollama does not render a prompt without answering it"
"""Why an agent cannot continue an answer: so it is with every agent of its version."""


class CannotContinue(Exception):
    """An agent cannot continue an answer: with the outcome of the attempt."""

    def __init__(self, result: Result, reason: str) -> None:
        super().__init__(reason)
        self.outcome = Outcome(result, reason)


class Written(Struct, frozen=True):
    """What a client has of an answer that broke off, and why it did.

    `seconds` are those from the first byte to the end. `head`: what an OpenAI stream's chunks begin
    with.
    """

    text: str
    tokens: int
    seconds: float
    reason: str
    head: dict[str, str | int] = {}

    def then(self, more: "Written") -> "Written":
        """Both, one after the other."""
        text, tokens = self.text + more.text, self.tokens + more.tokens
        seconds = self.seconds + more.seconds
        return structs.replace(more, text=text, tokens=tokens, seconds=seconds, head=self.head)


class Mark(Struct, frozen=True, rename={"lost": "from"}):
    """An answer went on `by` an agent after `tokens` tokens, when agent `lost` was lost."""

    lost: str
    by: str
    tokens: int


class Onward(Struct, frozen=True):
    """An answer that has to go on: the client's route, what it has, and which agent was lost.

    `limit` is how many tokens the whole answer may have; `None`: as many as Ollama likes. `marks`
    are those of the attempts that have continued it, the last one that of the attempt under way.
    """

    route: str
    written: Written
    lost: str
    limit: int | None = None
    marks: tuple[Mark, ...] = ()

    @property
    def left(self) -> int | None:
        """How many of the `limit` are left; none, where the lost agent wrote all but the end."""
        return None if self.limit is None else max(self.limit - self.written.tokens, 0)

    def by(self, agent: str) -> "Onward":
        """The same for an attempt on an agent."""
        mark = Mark(self.lost, agent, self.written.tokens)
        return structs.replace(self, marks=(*self.marks, mark))

    def then(self, agent: str, more: Written) -> "Onward":
        """The same after an agent that continued it was lost, too."""
        written = self.written.then(more)
        return structs.replace(self.by(agent), written=written, lost=agent)


# ── which answers ─────────────────────────────────────────────────────────────────────────────

CONTINUE = b"x-ollama-coordinator-continue"
CHOICES = {b"on": True, b"off": False}

PARAMETER_SECONDS = 1.0
"""How long a cut answer waits for the model's own parameters."""

UNLIMITED = re.compile(rb'"num_predict"\s*:\s*-')
"""A client wants as many tokens as there may be, whatever the model's parameters say."""

STRANGER = "it has another content of this name than the agent that began the answer"


class Continuations:
    """Decides which answers may go on, and where; knows the versions of Ollama that cannot."""

    def __init__(self, parts: Parts) -> None:
        self._settings = parts.settings
        self._registry = parts.registry
        self._model_info = parts.model_info
        self._clock = parts.clock
        self._unable: set[str] = set()

    def may(
        self,
        route: InferenceRoute,
        request: Request,
        body: Body,
        headers: Mapping[bytes, bytes],
        key: Key | None,
    ) -> bool:
        """Whether the answer to a request may be continued, as far as that shows before it begins.

        Raises:
            HttpError: 400, the header says neither on nor off.
        """
        wanted = key is None or key.continues
        if CONTINUE in headers:
            choice = CHOICES.get(headers[CONTINUE].strip().lower())
            if choice is None:
                raise HttpError(400, "X-Ollama-Coordinator-Continue: give on or off")
            wanted = choice
        return (
            wanted
            and self._settings.config.continue_answers
            and route.path in ROUTES
            and request.form is Form.STREAM
            and not request.load_only
            and b"content-encoding" not in headers
            and len(body) <= MOST_BODY_BYTES
            and len(self._registry.holders(request.model)) > 1
        )

    async def limit(self, request: Request, body: Body) -> int | None:
        """How many tokens the answer to a request may have; `None`: as many as Ollama likes."""
        limit = request.output_limit
        if limit is None and UNLIMITED.search(body) is None:
            with suppress(OllamaCoordinatorError, TimeoutError):
                async with self._clock.timeout(PARAMETER_SECONDS):
                    limit = await self._model_info.number_parameter(request.name, "num_predict")
        return limit or None

    def rest(self, request: Request, held: Held, onward: Onward) -> Request:
        """The request for what is left of an answer after `held` has broken off."""
        groups = self._registry.models.contents(request.model)
        same = next((group for group in groups if held.agent.id in group), {})
        strangers = {one: STRANGER for group in groups for one in group if one not in same}
        tokens = request.prompt_tokens + held.passed_on
        request = structs.replace(request, prompt_tokens=tokens, output_limit=onward.left)
        return self.without_unable(request.unfit_for(strangers), held)

    def without_unable(self, request: Request, held: Held) -> Request:
        """The request less the agents whose Ollama cannot continue an answer, as `held` showed."""
        version = held.agent.registration.ollama_version
        if held.outcome.reason == CANNOT_RENDER and is_known(version):
            self._unable.add(version)
        if not self._unable:
            return request
        agents = self._registry.holders(request.model)
        unable = [one.id for one in agents if one.registration.ollama_version in self._unable]
        return request.unfit_for(dict.fromkeys(unable, CANNOT_RENDER))


# ── what is kept of a stream ──────────────────────────────────────────────────────────────────


class _Said(Struct):
    """A message or a delta of a chat."""

    content: str | None = None
    thinking: str | None = None
    reasoning: str | None = None
    tool_calls: Raw = Raw()


class _Line(Struct):
    """A record of Ollama's own dialect."""

    message: _Said | None = None
    response: str = ""
    thinking: str | None = None
    tool_calls: Raw = Raw()
    logprobs: Raw = Raw()
    done: bool = False
    error: Raw = Raw()

    def said(self) -> tuple[str, bool]:
        """Its text, and whether there is more to it."""
        more = self.done or any(map(_is_given, (self.logprobs, self.tool_calls, self.error)))
        if self.message is None:
            return self.response, more or bool(self.thinking)
        return _content(self.message, more)


class _Choice(Struct):
    delta: _Said
    finish_reason: str | None = None
    logprobs: Raw = Raw()


class _Chunk(Struct):
    """A record of OpenAI's."""

    choices: list[_Choice]
    id: str = ""
    created: int = 0
    model: str = ""
    system_fingerprint: str = ""

    def said(self) -> tuple[str, bool]:
        """As `_Line.said`."""
        if len(self.choices) != 1:
            return "", True
        choice = self.choices[0]
        return _content(
            choice.delta, choice.finish_reason is not None or _is_given(choice.logprobs)
        )


_line = msgspec.json.Decoder(_Line)
_chunk = msgspec.json.Decoder(_Chunk)
_given = msgspec.json.Decoder(dict[str, Raw])
_text = msgspec.json.Decoder(str)


def _is_given(raw: Raw) -> bool:
    return bytes(raw) not in (b"", b"null", b"[]")


def _content(said: _Said, more: bool) -> tuple[str, bool]:
    more = more or bool(said.thinking or said.reasoning) or _is_given(said.tool_calls)
    return said.content or "", more


class Kept:
    """The bytes of an answer under way; nothing is read of them before a cut."""

    def __init__(self, route: InferenceRoute) -> None:
        self._route = route
        self._parts: list[bytes] = []
        self._left = KEPT_BYTES

    def add(self, data: bytes) -> None:
        """The client has these records."""
        self._left -= len(data)
        if self._left >= 0:
            self._parts.append(data)
        else:
            self._parts.clear()

    def written(self, seconds: float, reason: str) -> Written | None:
        """What the client has; `None` where that cannot be continued."""
        parts = b"".join(self._parts)
        if self._left < 0 or not parts:
            return None
        try:
            read = _read_lines if self._route.dialect is Dialect.NATIVE else _read_chunks
            said, head = read(parts)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        texts = [text for text, _ in said if text]
        if not texts or any(more for _, more in said):
            return None
        return Written("".join(texts), len(texts), seconds, reason, head)


_Read = tuple[list[tuple[str, bool]], dict[str, str | int]]


def _read_lines(data: bytes) -> _Read:
    return [_line.decode(line).said() for line in data.splitlines() if line.strip()], {}


def _read_chunks(data: bytes) -> _Read:
    lines = [line for line in data.splitlines() if line.startswith(DATA)]
    chunks = [_chunk.decode(line[len(DATA) :]) for line in lines]
    first = chunks[0]
    head: dict[str, str | int] = {"id": first.id, "created": first.created, "model": first.model}
    head["system_fingerprint"] = first.system_fingerprint
    return [chunk.said() for chunk in chunks], head


# ── what an agent is asked ────────────────────────────────────────────────────────────────────


class _DebugInfo(Struct):
    rendered_template: str
    image_count: int = 0


class _Rendered(Struct, rename={"info": "_debug_info"}):
    info: _DebugInfo | None = None


_rendered = msgspec.json.Decoder(_Rendered)

RENDERED_BYTES = 4 * MOST_BODY_BYTES
"""Of a rendered prompt: JSON escapes what a template adds."""

SAMPLED = ("temperature", "seed", "frequency_penalty", "presence_penalty", "top_p", "stop")
"""Fields of OpenAI's that are options of Ollama's under the same names."""

DEFAULTS = {"temperature": Raw(b"1.0"), "top_p": Raw(b"1.0")}
"""What Ollama takes on OpenAI's routes where they are not given."""

KEPT_FIELDS = ("keep_alive", "shift", "truncate")
"""Fields of Ollama's dialect that stay when an answer is continued."""


async def raw_body(
    upstreams: Upstreams, url: str, headers: list[tuple[str, str]], body: Body, onward: Onward
) -> bytes:
    """The body that continues an answer at an agent, which renders the prompt of `body` first.

    `url` is that of the client's route there.

    Raises:
        CannotContinue: it cannot.
        UpstreamError: it does not answer.
    """
    try:
        found = await Scan(body).members() or {}
        given = {name: Raw(span.of(body)) for name, span in found.items()}
        options = _options(onward.route, given)
        raw = bytes(given.get("raw", Raw())) == b"true"
        asked = None if raw else await _rendering(body, onward.route, options)
        prompt = _text.decode(given["prompt"]) if raw else ""
        model = given["model"]
    except (HttpError, msgspec.DecodeError, KeyError) as exc:
        raise CannotContinue(Result.REJECTED, f"its request cannot be read again: {exc}") from exc
    if asked is not None:
        prompt = await _render(upstreams, url, headers, asked)
    if onward.left is not None and not bytes(options.get("num_predict", b"")).startswith(b"-"):
        options["num_predict"] = Raw(b"%d" % max(onward.left, 1))
    kept = {name: given[name] for name in KEPT_FIELDS if name in given}
    return msgspec.json.encode(
        {
            "model": model,
            "prompt": prompt + onward.written.text,
            "raw": True,
            "stream": True,
            "think": False,
            "options": options,
            **kept,
        }
    )


def _options(route: str, given: dict[str, Raw]) -> dict[str, Raw]:
    """The options of a request in Ollama's own dialect."""
    if route in ("/api/chat", GENERATE):
        raw = given.get("options", Raw(b"{}"))
        return {} if bytes(raw) == b"null" else _given.decode(raw)
    options = {**DEFAULTS, **{name: given[name] for name in SAMPLED if name in given}}
    stop = bytes(options.get("stop", b""))
    if stop.startswith(b'"'):
        options["stop"] = Raw(b"[%b]" % stop)
    limit = given.get("max_completion_tokens", given.get("max_tokens"))
    if limit is not None:
        options["num_predict"] = limit
    return {name: value for name, value in options.items() if bytes(value) != b"null"}


async def _rendering(body: Body, route: str, options: dict[str, Raw]) -> bytes:
    """The request once more, to be rendered. An Ollama that does not know that writes one token."""
    changes = {"_debug_render_only": b"true", "stream": b"false"}
    if route == "/v1/chat/completions":
        changes["max_tokens"] = b"1"
    else:
        changes["options"] = msgspec.json.encode({**options, "num_predict": 1})
    return bytes(await edited(bytes(body), changes) or b"")


async def _render(
    upstreams: Upstreams, url: str, headers: list[tuple[str, str]], body: bytes
) -> str:
    async with upstreams.open("POST", url, headers=headers, body=body) as response:
        answer = await whole(response, RENDERED_BYTES)
    if response.status != 200:
        outcome = judge(response.status, answer)
        if outcome is None:
            raise CannotContinue(Result.REJECTED, error_text(answer))
        raise CannotContinue(outcome.result, outcome.reason)
    try:
        info = _rendered.decode(answer).info
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        info = None
    if info is None:
        raise CannotContinue(Result.REJECTED, CANNOT_RENDER)
    if info.image_count:
        raise CannotContinue(Result.REJECTED, "an answer about images is not continued")
    return info.rendered_template


# ── what the client gets ──────────────────────────────────────────────────────────────────────


class _RawLine(Struct):
    """A record of a raw `/api/generate`; durations in nanoseconds."""

    model: str = ""
    created_at: str = ""
    response: str = ""
    done: bool = False
    done_reason: str = ""
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0
    error: str | None = None


_raw_line = msgspec.json.Decoder(_RawLine)


class Continuing:
    """In the place of a client's `send`: records of a raw `/api/generate` become its dialect's."""

    def __init__(self, route: InferenceRoute, onward: Onward, body: Body, send: Send) -> None:
        self._route = route
        self._onward = onward
        self._send = send
        self._counts_usage = _counts_usage(body)
        self._refused = False
        self._rest = b""
        self._has_begun = False

    async def __call__(self, message: Message) -> None:
        """Pass on what becomes of a part of the answer; the client has status and headers."""
        if message["type"] == "http.response.start":
            self._refused = message["status"] != 200
            return
        more = message.get("more_body", False)
        *lines, self._rest = (self._rest + message.get("body", b"")).split(b"\n")
        if not more and self._rest:
            lines.append(self._rest)
        records = b"".join(map(self._record, filter(bytes.strip, lines)))
        if records or not more:
            await self._send({"type": "http.response.body", "body": records, "more_body": more})

    def _record(self, line: bytes) -> bytes:
        try:
            read = _raw_line.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return error_record(self._route, "what continued the answer was no JSON of Ollama's")
        if self._refused or read.error is not None:
            return error_record(self._route, read.error or error_text(line))
        if not read.done and (self._onward.left == 0 or not read.response):
            return b""  # the text is complete
        if self._route.dialect is Dialect.NATIVE:
            return self._native(read)
        return self._openai(read)

    def _native(self, line: _RawLine) -> bytes:
        text = "" if line.done and self._onward.left == 0 else line.response
        said: dict[str, object] = {"model": line.model, "created_at": line.created_at}
        if self._route.path == GENERATE:
            said["response"] = text
        else:
            said["message"] = {"role": "assistant", "content": text}
        said["done"] = line.done
        if line.done:
            before = self._onward.written
            ended = int(before.seconds * NANOSECONDS)
            said |= {
                "done_reason": line.done_reason,
                "total_duration": line.total_duration + ended,
                "load_duration": line.load_duration,
                "prompt_eval_count": self._prompt_tokens(line),
                "prompt_eval_duration": line.prompt_eval_duration,
                "eval_count": self._output_tokens(line),
                "eval_duration": line.eval_duration + ended,
                "continued": self._onward.marks,
            }
        return msgspec.json.encode(said) + b"\n"

    def _openai(self, line: _RawLine) -> bytes:
        text = "" if self._onward.left == 0 else line.response
        chunk: dict[str, object] = {"object": "chat.completion.chunk", **self._onward.written.head}
        choice = {"index": 0, "delta": {"role": "assistant", "content": text}}
        choice["finish_reason"] = (line.done_reason or "stop") if line.done else None
        records = b"" if self._has_begun else _comment(self._onward.marks)
        self._has_begun = True
        if not line.done:
            return records + _event({**chunk, "choices": [choice]})
        records += _event({**chunk, "choices": [choice], "continued": self._onward.marks})
        if self._counts_usage:
            read, wrote = self._prompt_tokens(line), self._output_tokens(line)
            usage = {
                "prompt_tokens": read,
                "completion_tokens": wrote,
                "total_tokens": read + wrote,
            }
            records += _event({**chunk, "choices": [], "usage": usage})
        return records + b"data: [DONE]\n\n"

    def _prompt_tokens(self, line: _RawLine) -> int:
        """Without the text so far, which was read as a part of the prompt."""
        return max(line.prompt_eval_count - self._onward.written.tokens, 0)

    def _output_tokens(self, line: _RawLine) -> int:
        written = self._onward.written.tokens
        return written if self._onward.left == 0 else written + line.eval_count


def _event(value: object) -> bytes:
    return DATA + msgspec.json.encode(value) + b"\n\n"


def _comment(marks: Sequence[Mark]) -> bytes:
    """A comment of server-sent events, which clients pass over."""
    last = marks[-1]
    by, lost = quote(last.by), quote(last.lost)
    return f": continued by agent {by} after {last.tokens} tokens of agent {lost}\n\n".encode()


class _StreamOptions(Struct):
    include_usage: bool = False


class _Wishes(Struct):
    stream_options: _StreamOptions | None = None


_wishes = msgspec.json.Decoder(_Wishes)


def _counts_usage(body: Body) -> bool:
    """Whether an OpenAI client wants the number of tokens."""
    if b"include_usage" not in body:
        return False
    try:
        options = _wishes.decode(bytes(body)).stream_options
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return options is not None and options.include_usage
