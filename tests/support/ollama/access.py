"""Who may talk to the node: the Host check of a loopback bind, and CORS."""

from __future__ import annotations

import fnmatch
import ipaddress
import re
import socket
from collections.abc import Sequence

ALLOWED_SCHEMES = ("app", "file", "tauri", "vscode-webview", "vscode-file")
LOCAL_NAMES = ("localhost", "127.0.0.1", "0.0.0.0")
STAINLESS = tuple(
    f"X-Stainless-{part}"
    for part in (
        *("Arch", "Async", "Custom-Poll-Interval", "Helper-Method", "Lang", "Os"),
        *("Package-Version", "Poll-Helper", "Retry-Count", "Runtime", "Runtime-Version", "Timeout"),
    )
)
ALLOWED_HEADERS = (
    *("Authorization", "Content-Type", "User-Agent", "Accept", "X-Requested-With", "Openai-Beta"),
    *STAINLESS,
)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def host_allowed(header: str) -> bool:
    """Whether a node on a loopback address answers to this Host."""
    host = _without_port(header).lower()
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        own = socket.gethostname().lower()
        suffixes = (".localhost", ".local", ".internal")
        return host in ("", "localhost", own) or host.endswith(suffixes)
    return address.is_loopback or address.is_private or address.is_unspecified


def origin_allowed(origin: str, host_header: str, extra: Sequence[str]) -> bool:
    if origin in (f"http://{host_header}", f"https://{host_header}"):
        return True
    scheme, _, rest = origin.partition("://")
    if scheme in ALLOWED_SCHEMES or (
        scheme in ("http", "https") and rest.split(":")[0] in LOCAL_NAMES
    ):
        return True
    return any(fnmatch.fnmatchcase(origin, pattern) for pattern in extra)


def cors_headers(origin: str) -> dict[str, str]:
    return {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}


def preflight_headers(origin: str) -> dict[str, str]:
    return {
        "Access-Control-Allow-Origin": origin,
        "Vary": "Origin, Access-Control-Request-Method, Access-Control-Request-Headers",
        "Access-Control-Allow-Methods": "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS",
        "Access-Control-Allow-Headers": ",".join(ALLOWED_HEADERS),
        "Access-Control-Max-Age": "43200",
    }


def _without_port(header: str) -> str:
    if match := re.fullmatch(r"\[(.*)\](:\d*)?", header):
        return match.group(1)
    return header.rsplit(":", 1)[0] if header.count(":") == 1 else header
