"""The three dialects Ollama speaks: how each reports an error, frames a stream and ends it.

Shapes and texts are Ollama's own; the OpenAI and Anthropic ones are those of its `/v1/…` routes.
"""

import re
from enum import Enum
from uuid import uuid4

import msgspec
from msgspec import Raw, Struct, structs

from ollama_coordinator.scheduler import Kind, Timings
from ollama_coordinator_common.printable import quoted

NANOSECONDS = 1e9
"""Of a second; Ollama reports durations in nanoseconds."""


class Dialect(Enum):
    """Whose shapes a route uses."""

    NATIVE = "native"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"

    @property
    def separator(self) -> bytes:
        """The end of a record of a stream."""
        return b"\n" if self is Dialect.NATIVE else b"\n\n"


class InferenceRoute(Struct, frozen=True):
    """One inference route: its dialect, its kind of request, and Ollama's texts for its errors.

    `go_type` is the type of its body in Ollama's source, `missing` the 404 for an unknown model.
    `requires_name`: whether no name is 400, or as unknown as any other. `minds_case`: whether
    Ollama finds a model only in the letter case of its list. `one_piece`: the answer is never
    streamed, whatever its content type says (Ollama sets that of a stream first).
    """

    path: str
    dialect: Dialect
    kind: Kind
    go_type: str
    missing: str = "model '{name}' not found"
    requires_name: bool = True
    minds_case: bool = False
    one_piece: bool = False

    def unknown(self, name: str) -> str:
        """The text of the 404 for a model that no agent has."""
        return self.missing.format(name=name, quoted=quoted(name))

    def nameless(self, name: str) -> tuple[int, str]:
        """Status and text of the answer to a request whose model's name is empty or blank."""
        if self.requires_name and not (name and self.one_piece):
            return 400, "model is required"
        return 404, f"model '{name}' not found"


_TRY_PULLING = "model {quoted} not found, try pulling it first"

_NATIVE, _OPENAI, _ANTHROPIC = Dialect
INFERENCE_ROUTES = (
    InferenceRoute("/api/chat", _NATIVE, Kind.CHAT, "api.ChatRequest"),
    InferenceRoute(
        "/api/generate", _NATIVE, Kind.GENERATE, "api.GenerateRequest", requires_name=False
    ),
    InferenceRoute(
        "/api/embed", _NATIVE, Kind.EMBED, "api.EmbedRequest", _TRY_PULLING, requires_name=False
    ),
    InferenceRoute(
        "/api/embeddings", _NATIVE, Kind.EMBED, "api.EmbeddingRequest", _TRY_PULLING,
        minds_case=True,
    ),
    InferenceRoute("/v1/chat/completions", _OPENAI, Kind.CHAT, "openai.ChatCompletionRequest"),
    InferenceRoute(
        "/v1/completions", _OPENAI, Kind.GENERATE, "openai.CompletionRequest", requires_name=False
    ),
    InferenceRoute(
        "/v1/embeddings", _OPENAI, Kind.EMBED, "openai.EmbedRequest", _TRY_PULLING,
        requires_name=False,
    ),
    InferenceRoute("/v1/responses", _OPENAI, Kind.CHAT, "openai.ResponsesRequest"),
    InferenceRoute("/v1/messages", _ANTHROPIC, Kind.CHAT, "anthropic.MessagesRequest"),
    InferenceRoute(
        "/v1/audio/transcriptions", _OPENAI, Kind.GENERATE, "a form", one_piece=True
    ),
    InferenceRoute(
        "/v1/images/generations", _OPENAI, Kind.GENERATE, "openai.ImageGenerationRequest",
        one_piece=True,
    ),
    InferenceRoute(
        "/v1/images/edits", _OPENAI, Kind.GENERATE, "openai.ImageEditRequest", one_piece=True
    ),
)  # fmt: skip

_OPENAI_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


_DIALECTS = {route.path: route.dialect for route in INFERENCE_ROUTES}


def dialect_of(path: str) -> Dialect:
    """The dialect of a route's errors."""
    other = Dialect.OPENAI if path.startswith("/v1/") else Dialect.NATIVE
    return _DIALECTS.get(path, other)


LONGEST_MESSAGE = 4000
"""Characters; longer is only what echoes a client's own text, such as a model's name."""


def error_body(dialect: Dialect, status: int, message: str) -> bytes:
    """The one-line JSON body of an error answer."""
    message = message[:LONGEST_MESSAGE]
    if dialect is Dialect.NATIVE:
        return msgspec.json.encode({"error": message})
    if dialect is Dialect.OPENAI:
        kind = _OPENAI_TYPES.get(status, "api_error")
        error = {"message": message, "type": kind, "param": None, "code": None}
        return msgspec.json.encode({"error": error})
    kind = _ANTHROPIC_TYPES.get(status, "api_error")
    return msgspec.json.encode(
        {
            "type": "error",
            "error": {"type": kind, "message": message},
            "request_id": f"req_{uuid4().hex[:24]}",
        }
    )


def error_record(route: InferenceRoute, message: str) -> bytes:
    """The record that ends a stream that has begun, with an error."""
    if route.dialect is Dialect.NATIVE:
        return msgspec.json.encode({"error": message}) + b"\n"
    if route.path == "/v1/responses":
        event = {"type": "error", "code": "server_error", "message": message, "param": None}
        return b"event: error\ndata: " + msgspec.json.encode(event) + b"\n\n"
    body = error_body(route.dialect, 500, message)
    prefix = b"event: error\n" if route.dialect is Dialect.ANTHROPIC else b""
    return prefix + b"data: " + body + b"\n\n"


# ── what the first record says ────────────────────────────────────────────────────────────────


class _Answer(Struct):
    """The fields of which every answer of Ollama has one, and that of its errors."""

    error: Raw = Raw()
    model: Raw = Raw()
    done: Raw = Raw()
    embedding: Raw = Raw()
    object: Raw = Raw()
    choices: Raw = Raw()
    data: Raw = Raw()
    type: Raw = Raw()
    text: Raw = Raw()

    @property
    def is_known(self) -> bool:
        """Whether it has one of them."""
        return any(map(bytes, structs.astuple(self)))


_answer = msgspec.json.Decoder(_Answer)
_EVENT = (b"data:", b"event:", b"id:", b"retry:", b":")
"""How a line of a server-sent event begins."""

NO_JSON = "what it answered is no JSON of Ollama's"
NO_DATA = b"{}"


def wrong_start(route: InferenceRoute, first: bytes, *, streamed: bool) -> str | None:
    """Why the first records of a stream, or a whole answer, are no answer; `None`: they are one.

    It is `NO_JSON`, or the JSON object that has an error in place of an answer.
    """
    if streamed and route.dialect is Dialect.NATIVE:
        first = first.partition(b"\n")[0]
    elif streamed:
        if not first.lstrip().startswith(_EVENT):
            return NO_JSON
        data = first.partition(b"data:")[2].partition(b"\n")[0].strip()
        first = data if data.startswith(b"{") else NO_DATA
    if len(first) > DECODED_BYTES:  # no error is so long
        return None if first[:TAIL_BYTES].lstrip().startswith((b"{", b"[")) else NO_JSON
    try:
        answer = _answer.decode(first)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return NO_JSON
    if first != NO_DATA and not answer.is_known:
        return NO_JSON
    error = bytes(answer.error)
    return None if error in (b"", b"null") else first.decode(errors="replace")


# ── the last record ───────────────────────────────────────────────────────────────────────────


class _Final(Struct):
    """The fields of Ollama's last record that say how it went; durations in nanoseconds."""

    error: str | None = None
    total_duration: int | None = None
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0


class _Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class _Counted(Struct):
    usage: _Usage | None = None


class Ending(Struct, frozen=True):
    """The content of an answer's last record: an error, or the timings."""

    error: str | None = None
    timings: Timings | None = None


_final = msgspec.json.Decoder(_Final)
_counted = msgspec.json.Decoder(_Counted)
DECODED_BYTES = 1024 * 1024
"""Of the end of an answer: decoding so much takes 5 ms. Of a longer one only the tail is read."""

TAIL_BYTES = 4096
"""The counts and durations behind the vectors of a large answer take some 200 bytes."""

LAST_LINES = 32
"""Ollama counts tokens in the last record of a stream or the one or two before, in 3 lines each."""

DATA = b"data: "


def read_ending(route: InferenceRoute, last: bytes, records: int) -> Ending:
    """Read the last records of an answer, or a whole one that was not streamed.

    Never raises: an unreadable end is an empty `Ending`. `records` is how many were streamed, an
    estimate of the tokens where the dialect does not count them.
    """
    try:
        if route.dialect is Dialect.NATIVE:
            return _native_ending(_tail(last.rstrip(b"\n").rpartition(b"\n")[2]))
        return Ending(timings=_counted_timings(last, records))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError):
        return Ending()


def _tail(last: bytes) -> bytes:
    """A record; of a large one the last fields, those after its last list."""
    if len(last) <= DECODED_BYTES:
        return last
    tail = last[-TAIL_BYTES:]
    return b"{" + tail[tail.rfind(b'],"') + 2 :]


def _native_ending(line: bytes) -> Ending:
    final = _final.decode(line)
    if final.error is not None:
        return Ending(error=final.error)
    if final.total_duration is None:
        return Ending()
    return Ending(
        timings=Timings(
            prompt_tokens=final.prompt_eval_count,
            output_tokens=final.eval_count,
            total_seconds=final.total_duration / NANOSECONDS,
            load_seconds=final.load_duration / NANOSECONDS,
            prompt_seconds=final.prompt_eval_duration / NANOSECONDS,
            output_seconds=final.eval_duration / NANOSECONDS,
        )
    )


def _counted_timings(last: bytes, records: int) -> Timings:
    lines = last[-DECODED_BYTES:].rsplit(b"\n", LAST_LINES) if records else [DATA + _tail(last)]
    for line in lines[:-LAST_LINES:-1]:
        if not line.startswith(DATA + b"{"):
            continue
        usage = _counted.decode(line[len(DATA) :]).usage
        if usage is not None:
            return Timings(
                prompt_tokens=usage.prompt_tokens or usage.input_tokens,
                output_tokens=usage.completion_tokens or usage.output_tokens,
            )
    return Timings(output_tokens=records)


_EMPTY_CHUNK = re.compile(rb'"(?:delta":\{(?:"role":"assistant",?)?(?:"content":"")?\}|text":"")')
_UNFINISHED = b'"finish_reason":null'


def is_comment(route: InferenceRoute, first: bytes) -> bool:
    """Whether what began a stream are comments of server-sent events: that is no answer yet."""
    return route.dialect is not Dialect.NATIVE and b"data:" not in first


def swallowed_error(route: InferenceRoute, last: bytes) -> bool:
    """Whether Ollama swallowed an error at the end of a `/v1` stream.

    It turns the error line into a chunk with nothing in it and ends without `data: [DONE]`. A
    stream that merely ends early (Ollama stops one that repeats itself) ends with text.
    """
    if route.path not in ("/v1/chat/completions", "/v1/completions"):
        return False
    record = last[-DECODED_BYTES:].replace(b"\r\n", b"\n").rstrip().rpartition(b"\n\n")[2]
    end = record.rfind(_UNFINISHED)
    if end < 0 or record.endswith(b"data: [DONE]"):
        return False
    return _EMPTY_CHUNK.search(record, record.rfind(b"\n", 0, end) + 1, end) is not None
