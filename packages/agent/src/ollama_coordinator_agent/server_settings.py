"""What the environment of an `ollama serve` says about it.

Ollama exposes none of these on its API; names and defaults are those of its `envconfig` package.
"""

import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from ollama_coordinator_common.types import RunnerSettings

from .network import parse_address

DEFAULT_MAX_QUEUE = 512
FIRST_VERSION_WITH_ONE_SLOT = (0, 10)
"""Up to 0.9.6 an unset OLLAMA_NUM_PARALLEL means "as many as fit"; later it means one."""


def runner_settings(environ: Mapping[str, str], version: str | None) -> RunnerSettings:
    """How a server with this environment runs its models; what it decides by itself is `None`."""
    fallback = None if _is_older(version, FIRST_VERSION_WITH_ONE_SLOT) else 1
    return RunnerSettings(
        num_parallel=_number(environ, "OLLAMA_NUM_PARALLEL") or fallback,
        max_loaded_models=_number(environ, "OLLAMA_MAX_LOADED_MODELS"),
        max_queue=_number(environ, "OLLAMA_MAX_QUEUE") or DEFAULT_MAX_QUEUE,
        context_length=_number(environ, "OLLAMA_CONTEXT_LENGTH"),
    )


def _number(environ: Mapping[str, str], variable: str) -> int | None:
    """A positive number; Ollama takes 0 and what it cannot parse as "decide for me"."""
    text = environ.get(variable, "").strip().strip("\"'")
    return int(text) or None if re.fullmatch(r"[0-9]{1,9}", text) else None


def _is_older(version: str | None, than: tuple[int, int]) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    if numbers is None:
        return False
    found = (int(numbers[1]), int(numbers[2]))
    return (0, 0) < found < than  # development builds say 0.0.0


def model_folders(environ: Mapping[str, str]) -> list[Path]:
    """Where a server with this environment may keep its models, likeliest first."""
    if configured := environ.get("OLLAMA_MODELS", "").strip().strip("\"'"):
        return [Path(configured)]
    home = environ.get("USERPROFILE" if sys.platform == "win32" else "HOME")
    folders = [Path(home) / ".ollama" / "models"] if home else []
    if sys.platform == "linux":  # the home of the user that install.sh makes
        folders.append(Path("/usr/share/ollama/.ollama/models"))
    return folders


def serve_host(environ: Mapping[str, str]) -> str:
    """The host that a server of ours binds: that of OLLAMA_HOST if it is this machine's.

    OLLAMA_HOST also tells the `ollama` command where to go, often to the coordinator; then, and
    without it, the server binds to loopback.
    """
    text = environ.get("OLLAMA_HOST", "").strip().strip("\"'")
    try:
        host = urlsplit(text if "://" in text else f"//{text}").hostname or ""
    except ValueError:
        return "127.0.0.1"
    return host if _is_ours(host) else "127.0.0.1"


def _is_ours(host: str) -> bool:
    address = parse_address(host)
    if address is None:
        return False
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True
