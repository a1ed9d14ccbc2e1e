"""Asking one question of an endpoint, and what of the answer two endpoints must agree on."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from yarl import URL

VOLATILE = frozenset(
    {
        *("created_at", "created", "modified_at", "expires_at", "completed_at", "id", "item_id"),
        *("total_duration", "load_duration", "prompt_eval_duration", "eval_duration"),
        *("request_id", "response_id", "system_fingerprint", "call_id", "size_vram", "size"),
    }
)
"""Fields that no two answers have in common, or that a fleet sums up."""

ABSENT = "(absent)"

HEADERS = ("content-type", "allow", "location", "access-control-allow-methods")
SAID_IN_PASSING = re.compile(r"(req|msg|resp|call|chatcmpl|cmpl|toolu|rs|fc)[_-][0-9A-Za-z]+")


@dataclass(frozen=True)
class Aim:
    """Where the suite is aimed, and which models are there."""

    url: str | None
    model: str
    embeds: str


@dataclass(frozen=True)
class Case:
    """One request and what is expected of its answer.

    `{model}` and `{embeds}` in `path` and `body` become names of models that are there. `says` is
    the text of the error, `has` are fields of the last object, `ends` the end of the body.
    """

    name: str
    method: str
    path: str
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    status: int = 200
    kind: str | None = None
    says: str | None = None
    has: tuple[str, ...] = ()
    ends: bytes = b""


@dataclass(frozen=True)
class Reply:
    """An answer; `records` are its JSON objects, one or many."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def kind(self) -> str:
        return self.headers.get("content-type", "")

    @property
    def records(self) -> list[Any]:
        if "event-stream" in self.kind:
            lines = [line[6:] for line in self.body.splitlines() if line.startswith(b"data: ")]
        else:
            lines = self.body.splitlines()
        return [_decoded(line) for line in lines if line]

    @property
    def error(self) -> str | None:
        """The sentence of an error in any dialect."""
        last = self.records[-1] if self.records else None
        error = last.get("error") if isinstance(last, dict) else None
        return error.get("message") if isinstance(error, dict) else error

    def comparable(self) -> dict[str, Any]:
        """The answer without what differs by nature."""
        headers = {name: self.headers[name] for name in HEADERS if name in self.headers}
        records = [_masked(record) for record in self.records]
        return {"status": self.status, "headers": headers, "records": records}


def _decoded(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return line.decode(errors="replace")


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: type(item).__name__ if key in VOLATILE else _masked(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_masked(item) for item in value]
    return SAID_IN_PASSING.sub("<id>", value) if isinstance(value, str) else value


@dataclass(frozen=True)
class Endpoint:
    """An Ollama, or what passes for one."""

    url: str
    aim: Aim
    session: aiohttp.ClientSession

    async def ask(self, case: Case) -> Reply:
        """The answer to a case's request; redirects are not followed."""
        async with self.session.request(
            case.method,
            URL(self.url + self.named(case.path), encoded=True),
            data=self._body(case.body),
            headers=case.headers,
            allow_redirects=False,
        ) as response:
            headers = {name.lower(): value for name, value in response.headers.items()}
            return Reply(response.status, headers, await response.read())

    async def say(self, method: str, path: str, body: Any = None, **case: Any) -> Reply:
        """The answer to a request that is no case by itself."""
        return await self.ask(Case("", method, path, body, **case))

    def _body(self, body: Any) -> Any:
        if isinstance(body, bytes):
            return self.named(body.decode("latin-1")).encode("latin-1")
        if body is None:
            return None
        return self.named(json.dumps(body)).encode()

    def named(self, text: str) -> str:
        """The text with the names of models that are there."""
        text = text.replace("{MODEL}", self.aim.model.upper())
        return text.replace("{model}", self.aim.model).replace("{embeds}", self.aim.embeds)


def check(endpoint: Endpoint, case: Case, reply: Reply) -> None:
    """Assert what the case expects; everything that is otherwise is named in one go."""
    fail_with(
        f"{case.method} {endpoint.url}{endpoint.named(case.path)}",
        _unexpected(endpoint, case, reply),
    )


def fail_with(about: str, differences: Iterable[str]) -> None:
    """Fail with the differences, one a line, if there are any."""
    lines = [about, *differences]
    if len(lines) > 1:
        pytest.fail("\n    ".join(lines), pytrace=False)


def _unexpected(endpoint: Endpoint, case: Case, reply: Reply) -> Iterator[str]:
    if reply.status != case.status:
        yield f"status: expected {case.status}, got {reply.status}: {reply.body[:300]!r}"
    if case.kind not in (None, reply.kind):
        yield f"content type: expected {case.kind}, got {reply.kind}"
    if case.says is not None and reply.error != endpoint.named(case.says):
        yield f"error: expected {endpoint.named(case.says)!r}, got {reply.error!r}"
    last = reply.records[-1] if case.has and reply.records else {}
    lacks = [name for name in case.has if name not in last]
    if lacks:
        yield f"lacks {', '.join(lacks)}: {last!r:.300}"
    if not reply.body.endswith(case.ends):
        yield f"end: expected {case.ends!r}, got {reply.body[-100:]!r}"


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Where two answers differ, as paths into them."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            inner = f"{where}.{key}".lstrip(".")
            yield from differences(one.get(key, ABSENT), other.get(key, ABSENT), inner)
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            yield f"{where}: {len(one)} of them alone, {len(other)} through the fleet"
        for index, pair in enumerate(zip(one, other, strict=False)):
            yield from differences(*pair, f"{where}[{index}]")
    elif one != other:
        yield f"{where}: {one!r} alone, {other!r} through the fleet"
