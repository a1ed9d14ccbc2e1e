"""What a model answers: the same words for the same prompt, tool calls and JSON where asked for."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .models import Model

DEFAULT_TOKENS = 16
TOKEN_CHARACTERS = 4  # of a prompt, for counting
IMAGE_TOKENS = 256
REPEAT_LIMIT = 30

_WORDS = [
    *("amber", "basin", "cedar", "delta", "ember", "fjord", "grove"),
    *("haven", "inlet", "jetty", "knoll", "lagoon", "meadow", "nectar"),
    *("orchard", "prairie", "quarry", "ridge", "summit", "thicket", "upland"),
    *("valley", "willow", "yonder", "zephyr", "brook", "cliff", "dune"),
    *("estuary", "forest", "glade", "harbour", "island", "juniper", "kelp"),
    *("loam", "marsh", "nook", "oasis", "pebble"),
]


@dataclass(frozen=True)
class Request:
    """What decides an answer; also what a test's own `answer` function is given."""

    model: Model
    prompt: str
    last_user: str = ""
    num_predict: int | None = None
    exact: bool = True  # num_predict is how many tokens to write, not only how many at most
    stop: tuple[str, ...] = ()
    think: bool = False
    tools: Sequence[Mapping[str, Any]] = ()
    format: Any = None
    after_tool: bool = False  # the conversation ends with a tool's result
    written: str = ""  # the answer begins with it, and goes on from there


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: dict[str, Any]

    @property
    def id(self) -> str:
        return f"call_{zlib.crc32(self.name.encode()):08x}"


@dataclass
class Script:
    """An answer, token by token, and how it ends."""

    content: list[str] = field(default_factory=list)
    thinking: list[str] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)
    done_reason: str = "stop"
    done: bool = True


AnswerFunction = Callable[[Request], Script | str | int]


def count_tokens(text: str) -> int:
    return -(-len(text) // TOKEN_CHARACTERS)


def words(prompt: str, count: int) -> list[str]:
    """That many tokens, a function of the prompt alone."""
    seed = zlib.crc32(prompt.encode("utf-8", "surrogatepass"))
    total = len(_WORDS)
    step = seed % (total - 1) + 1
    first = _WORDS[seed % total].capitalize()
    return [first, *(f" {_WORDS[(seed + n * step) % total]}" for n in range(1, count))][:count]


def pieces(text: str) -> list[str]:
    return [text[n : n + TOKEN_CHARACTERS] for n in range(0, len(text), TOKEN_CHARACTERS)]


ANSWER = "<|answer|>\n"
"""Where the answer to a prompt begins, as it is rendered."""

ASSISTANT = "<|assistant|>\n"
"""The same for a conversation; the prompt of its answer ends with it."""


def beginning(raw: str) -> tuple[str, str]:
    """The prompt that a raw one was rendered from, and what of its answer is in it."""
    prompt, mark, written = raw.rpartition(ANSWER)
    if mark:
        return prompt, written
    prompt, mark, written = raw.rpartition(ASSISTANT)
    return (prompt + mark, written) if mark else (raw, "")


def answer(request: Request, own: AnswerFunction | None = None) -> Script:
    """The node's own answer, or what the test's function makes of it (tokens, text or a script).

    After a text that the model would not have written, it begins its answer again.
    """
    if request.written:
        limit, whole = request.num_predict, replace(request, written="")
        if limit is not None and limit >= 0:
            whole = replace(whole, num_predict=limit + len(request.written))
        script = answer(whole, own)
        count = tokens_in(script.content, request.written)
        rest = replace(whole, num_predict=limit, exact=False)
        limited = _limited(script.content[count:], rest)
        ended = limited.done_reason if limit is not None else script.done_reason
        return replace(script, content=limited.content, done_reason=ended)
    if own is None:
        return _stopped(_usual(request), request)
    made = own(request)
    if isinstance(made, Script):
        return made
    content = words(request.prompt, made) if isinstance(made, int) else pieces(made)
    return _stopped(_limited(content, request), request)


def tokens_in(content: Sequence[str], text: str) -> int:
    """How many tokens at the beginning of an answer make this text; 0: it begins otherwise."""
    length, count = 0, 0
    while length < len(text) and count < len(content):
        length += len(content[count])
        count += 1
    return count if "".join(content[:count]) == text else 0


def _usual(request: Request) -> Script:
    model = request.model
    if model.repeats:
        return Script(content=[" again"] * (REPEAT_LIMIT + 1), done=False)
    thinking = words(f"thinking about {request.prompt}", model.thinking_tokens)
    script = Script(thinking=thinking if request.think else [])
    if call := _tool_call(request):
        script.tool_calls.append(call)
        return script
    if request.format:
        script.content = pieces(json.dumps(_example(request.format)))
        return script
    limited = _limited(words(request.prompt, _length(request)), request)
    script.content, script.done_reason = limited.content, limited.done_reason
    return script


def _length(request: Request) -> int:
    if request.model.output_tokens is not None:
        return request.model.output_tokens
    limit = request.num_predict
    return DEFAULT_TOKENS if limit is None or limit < 0 or not request.exact else limit


def _limited(content: list[str], request: Request) -> Script:
    limit = request.num_predict
    if limit is not None and 0 <= limit <= len(content):
        return Script(content=content[:limit], done_reason="length")
    return Script(content=content)


def _stopped(script: Script, request: Request) -> Script:
    text = "".join(script.content)
    ends = [at for stop in request.stop if stop and (at := text.find(stop)) >= 0]
    if ends:
        script.content, script.done_reason = pieces(text[: min(ends)]), "stop"
    return script


def _tool_call(request: Request) -> ToolCall | None:
    functions = [tool.get("function") or tool for tool in request.tools]
    functions = [function for function in functions if function.get("name")]
    wanted = request.model.calls_tools
    if not functions or wanted is False or request.after_tool:
        return None
    asked = request.last_user.lower()
    named = [function for function in functions if str(function.get("name", "")).lower() in asked]
    if not named and wanted is None and "tool" not in asked:
        return None
    chosen = (named or functions)[0]
    schema = chosen.get("parameters") or {}
    arguments = _example(schema) if isinstance(schema, dict) else {}
    return ToolCall(str(chosen.get("name", "")), arguments if isinstance(arguments, dict) else {})


def _example(schema: Any) -> Any:
    """The smallest value a JSON schema admits, as far as the usual keywords go."""
    if not isinstance(schema, dict):
        return {"answer": "amber"}
    if options := schema.get("enum"):
        return options[0]
    match schema.get("type"):
        case "integer" | "number":
            return schema.get("minimum", 7)
        case "boolean":
            return True
        case "array":
            return [_example(schema.get("items") or {"type": "string"})]
        case "string":
            return "amber"
    return {key: _example(value) for key, value in (schema.get("properties") or {}).items()}
