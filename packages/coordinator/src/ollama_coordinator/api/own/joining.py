"""`GET /join`: how a machine joins, as a page or as the script that does it; and its files.

It needs no right: what is there is the program itself, and a registration has its own gate.
"""

import asyncio
import base64
import re
from functools import cache
from hashlib import sha256
from html import escape
from importlib.metadata import version
from importlib.resources import files
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import Response

from ollama_coordinator.access.zones import FORWARDING
from ollama_coordinator.agent_wheels import PIP, agent_wheels, pip_wheel
from ollama_coordinator.api.http.errors import SECURITY, HttpError
from ollama_coordinator.api.http.openapi import Media, Query, operation
from ollama_coordinator.parts import Parts

SHELLS = {"sh": "join.sh", "powershell": "join.ps1"}

_HOST = re.compile(r"[A-Za-z0-9.:_\[\]-]{1,255}")
_PREFIX = re.compile(r"(?:/[A-Za-z0-9._~-]+)*")
"""These texts go into a script that somebody runs: no quote, no blank, no dollar."""

_STYLE = """
:root{color-scheme:light dark;font:16px/1.5 system-ui,sans-serif}
body{max-width:42rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1rem;margin:1.5rem 0 0}
pre{overflow-x:auto;padding:.75rem 1rem;border:1px solid #8888;border-radius:.5rem;user-select:all}
"""
_STYLE_HASH = base64.b64encode(sha256(_STYLE.encode()).digest()).decode()
_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

NO_WHEELS = (
    "this coordinator has no agent to give away: it was installed in a way that left the wheels"
    " out; install the agent from the repository, with `pip install ./packages/agent`"
)
NO_PIP = (
    "this coordinator has no pip to give away: install uv on the machine that joins, or pip in the"
    " coordinator's environment"
)


class InstallApi:
    """The handlers of joining."""

    def __init__(self, parts: Parts) -> None:
        self._tls = parts.tls

    @operation(
        gives={200: (Media("text/html"), Media("text/x-shellscript"), Media("text/plain"))},
        query=(
            Query("shell", "`sh` or `powershell`: this script and not what the client suggests."),
        ),
        errors=(400, 404),
    )
    async def join(self, request: Request) -> Response:
        """How a machine joins: a page for a browser, for curl and PowerShell the script for it."""
        wheels = await _wheels()
        url = _url(request)
        kind = _shell(request)
        headers = {"cache-control": "no-cache", "vary": "accept, user-agent, x-forwarded-proto"}
        common, agent = sorted(wheels, key=lambda name: "_agent-" in name)
        values = {
            "URL": url,
            "COMMON": common,
            "AGENT": agent,
            "VERSION": version("ollama-coordinator"),
            **self._believed(request),
        }
        if kind is not None:
            type_ = "text/x-shellscript" if kind == "sh" else "text/plain"
            text = _filled(SHELLS[kind], values)
            return Response(text, 200, {**SECURITY, **headers}, f"{type_}; charset=utf-8")
        shown = {name: escape(value) for name, value in values.items()}
        page = _filled("join.html", {**shown, "STYLE": _STYLE})
        headers |= {**SECURITY, "content-security-policy": _POLICY}
        return Response(page, 200, headers, "text/html; charset=utf-8")

    def _believed(self, request: Request) -> dict[str, str]:
        """How a client that comes directly knows a certificate that the coordinator has made."""
        direct = FORWARDING.isdisjoint(name for name, _ in request.scope["headers"])
        pin = self._tls.pin if direct else ""
        url = _url(request)
        if not pin:
            lines = {"CURL": f"curl -fsSL {url}/join", "IRM": f"irm {url}/join"}
            return {"PIN": "", "CERTIFICATE": "", "WGET": f"wget -qO- {url}/join", **lines}
        curl = f"-fsSLk --pinnedpubkey '{pin}' '{url}/join"
        return {
            "PIN": pin,
            "CERTIFICATE": self._tls.fingerprint,
            "CURL": f"curl {curl}'",
            "WGET": f"wget -qO- --no-check-certificate --pinnedpubkey='{pin}' '{url}/join'",
            "IRM": f"curl.exe {curl}?shell=powershell' | Out-String",
        }

    @operation(gives={200: Media("application/octet-stream")}, errors=(404,))
    async def file(self, request: Request) -> Response:
        """A file that the script fetches: a wheel of the agent, or pip's own."""
        name = request.path_params["file"]
        if name == PIP:
            content = await asyncio.to_thread(pip_wheel)
            if content is None:
                raise HttpError(404, NO_PIP)
        else:
            wheels = await _wheels()
            if name not in wheels:
                raise HttpError(404, f"there is no {name} here; {', '.join(wheels)} and {PIP} are")
            content = wheels[name]
        return Response(content, headers=SECURITY, media_type="application/octet-stream")


async def _wheels() -> dict[str, bytes]:
    found = await asyncio.to_thread(agent_wheels)
    if not found:
        raise HttpError(404, NO_WHEELS)
    return found


def _shell(request: Request) -> str | None:
    """Which script a client takes; `None` for the page."""
    asked = request.query_params.get("shell")
    if asked is not None:
        if asked not in SHELLS:
            raise HttpError(400, "shell is 'sh' or 'powershell'")
        return asked
    # PowerShell's own client calls itself Mozilla first.
    if "PowerShell" in request.headers.get("user-agent", ""):
        return "powershell"
    return None if "text/html" in request.headers.get("accept", "") else "sh"


def _url(request: Request) -> str:
    """The coordinator's URL as this client knows it, also behind a proxy."""
    host = request.headers.get("host", "")
    scheme = request.headers.get("x-forwarded-proto", request.url.scheme)
    prefix = request.headers.get("x-forwarded-prefix", "").rstrip("/")
    if not _HOST.fullmatch(host) or not _PREFIX.fullmatch(prefix):
        raise HttpError(400, "ask by the coordinator's address or name: this Host is none")
    return f"{'https' if scheme == 'https' else 'http'}://{host}{prefix}"


@cache
def _text(name: str) -> str:
    folder: Traversable = files("ollama_coordinator") / "joining"
    return (folder / name).read_text("utf-8")


def _filled(name: str, values: dict[str, str]) -> str:
    return re.sub(r"@([A-Z]+)\b", lambda found: values.get(found[1], found[0]), _text(name))
