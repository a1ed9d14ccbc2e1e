"""`keys …`: who may come in, from the command line."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

import typer
from rich.console import Console
from rich.text import Text

from .client import Client, Json, NoAnswer, asks
from .tables import console, shown_json, table

keys = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Who may come in: make, list, show and revoke keys.",
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is.")]
Rights = Annotated[
    str,
    typer.Option(
        "--rights",
        metavar="RIGHT,...",
        help="use, manage (models too), operate (all); join (agents), watch (look on).",
    ),
]
Models = Annotated[
    str, typer.Option("--models", metavar="PATTERN,...", help="Only these models; * is any text.")
]
Weight = Annotated[
    float, typer.Option("--weight", help="Its share among clients that wait for one model.")
]
LaneOfKey = Annotated[
    str, typer.Option("--lane", help="interactive or batch; else by what its requests do.")
]
Continues = Annotated[
    bool,
    typer.Option(
        "--continue/--no-continue",
        help="Whether its answers go on elsewhere where a machine breaks them off.",
    ),
]
Expires = Annotated[
    str, typer.Option("--expires", metavar="DURATION|TIME", help="Such as 30d, 12h, 2030-01-31.")
]
NamesUsers = Annotated[
    bool,
    typer.Option("--names-users", help="Its requests say for which user they are (Open WebUI)."),
]
InPath = Annotated[
    bool, typer.Option("--in-path", help="It may stand in an address: http://HOST:PORT/k/KEY.")
]

PerMinute = Annotated[
    int, typer.Option("--requests-per-minute", metavar="NUMBER", min=0, help="0: any number.")
]
Concurrent = Annotated[
    int, typer.Option("--concurrent", metavar="NUMBER", min=0, help="At a time; 0: any number.")
]
TokensPerDay = Annotated[
    int, typer.Option("--tokens-per-day", metavar="NUMBER", min=0, help="0: any number.")
]
GpuSeconds = Annotated[
    float, typer.Option("--gpu-seconds-per-day", metavar="SECONDS", min=0, help="0: any number.")
]

_DURATION = re.compile(r"(\d+)([mhdw])")
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@keys.command()
@asks
async def create(
    client: Client,
    name: Name,
    rights: Rights = "use",
    models: Models = "",
    weight: Weight = 1.0,
    lane: LaneOfKey = "",
    expires: Expires = "",
    in_path: InPath = False,
    names_users: NamesUsers = False,
    continues: Continues = True,
    requests_per_minute: PerMinute = 0,
    concurrent: Concurrent = 0,
    tokens_per_day: TokensPerDay = 0,
    gpu_seconds_per_day: GpuSeconds = 0.0,
    json: Json = False,
) -> None:
    """Make a key and show it, this once."""
    limits = {
        "requests_per_minute": requests_per_minute,
        "concurrent": concurrent,
        "tokens_per_day": tokens_per_day,
        "gpu_seconds_per_day": gpu_seconds_per_day,
    }
    wanted = _wanted(name, rights, models, weight, expires, names_users=names_users)
    wanted |= {"in_path": in_path, "limits": limits, "lane": lane, "continues": continues}
    made = await client.json("POST", "/api/keys", wanted)
    if json:
        shown_json(made)
        return
    # Nothing but the key on the standard output, so that a script can take it.
    typer.echo(made["key"])
    hints = Console(stderr=True, soft_wrap=True)
    hints.print("It is shown this once. For clients:", highlight=False)
    for line in _lines(client.url, made["key"], in_path=in_path):
        hints.print(f"  {line}", highlight=False, markup=False)


@keys.command("add-ssh")
@asks
async def add_ssh(
    client: Client,
    name: Name,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The user's ~/.ollama/id_ed25519.pub.")
    ],
    rights: Rights = "use",
    models: Models = "",
    weight: Weight = 1.0,
    expires: Expires = "",
    json: Json = False,
) -> None:
    """Let in an `ollama` program by its own public key: it signs with OLLAMA_AUTH=1."""
    try:
        public = file.expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise NoAnswer(f"{file} cannot be read: {exc}") from exc
    wanted = _wanted(name, rights, models, weight, expires, names_users=False)
    made = await client.json("POST", "/api/keys", {**wanted, "ssh": public})
    if json:
        shown_json(made)
        return
    typer.echo(f"OLLAMA_AUTH=1 OLLAMA_HOST={client.url} ollama list")


@keys.command("list")
@asks
async def list_keys(client: Client, json: Json = False) -> None:
    """List every key, and when it was last used."""
    listed = (await client.json("GET", "/api/keys"))["keys"]
    if json:
        shown_json(listed)
        return
    made = table("NAME", "KEY", "RIGHTS", "MODELS", "STATE", "LAST USED")
    for key in listed:
        made.add_row(
            Text(key["name"]),
            f"{key['hint']}…",
            ",".join(key["rights"]),
            Text(",".join(key["models"]) or "all"),
            state_of(key),
            shown_time(key["last_used_at"]) or "never",
        )
    console().print(made)


@keys.command()
@asks
async def show(client: Client, name: Name, json: Json = False) -> None:
    """Show what a key allows; its text is not kept."""
    key = await client.json("GET", f"/api/keys/{quote(name, safe='')}")
    if json:
        shown_json(key)
        return
    screen = console()
    limits = ", ".join(f"{what.replace('_', ' ')} {most:g}" for what, most in key["limits"].items())
    rows = {
        "name": key["name"],
        "id": key["id"],
        "key": f"{key['hint']}…",
        "state": state_of(key),
        "rights": ", ".join(key["rights"]),
        "models": ", ".join(key["models"]) or "all",
        "weight": f"{key['weight']:g}",
        "lane": key["lane"] or "by what they do",
        "limits": limits or "none",
        "in a path": "yes" if key["in_path"] else "no",
        "names users": "yes" if key["names_users"] else "no",
        "continued": "yes" if key["continues"] else "no",
        "made": shown_time(key["created_at"]),
        "last used": shown_time(key["last_used_at"]) or "never",
        "sessions": str(key["sessions"]),
    }
    for title, text in rows.items():
        screen.print(f"{title:<12} {text}", highlight=False, markup=False)


@keys.command()
@asks
async def revoke(client: Client, name: Name, json: Json = False) -> None:
    """End a key at once, and the log-ins with it."""
    key = await client.json("DELETE", f"/api/keys/{quote(name, safe='')}")
    if json:
        shown_json(key)
        return
    typer.echo(f"'{name}' is revoked")


def _wanted(
    name: str, rights: str, models: str, weight: float, expires: str, *, names_users: bool
) -> dict[str, Any]:
    return {
        "name": name,
        "rights": _parts(rights),
        "models": _parts(models),
        "weight": weight,
        "names_users": names_users,
        "expires_at": expiry(expires),
    }


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def expiry(text: str) -> str | None:
    """The time of a duration or a time as people write them; `None` for none.

    Raises:
        NoAnswer: it is neither.
    """
    if not text:
        return None
    if match := _DURATION.fullmatch(text):
        return (datetime.now(UTC) + timedelta(**{_UNITS[match[2]]: int(match[1])})).isoformat()
    try:
        at = datetime.fromisoformat(text)
    except ValueError as exc:
        raise NoAnswer(f"--expires {text}: give such as 30d, 12h or 2030-01-31") from exc
    return (at if at.tzinfo else at.astimezone()).isoformat()


def state_of(key: dict[str, Any]) -> str:
    """Whether a key of the API is in force, and until when."""
    if key["revoked_at"]:
        return f"revoked {shown_time(key['revoked_at'])}"
    expiry = key["expires_at"]
    if not expiry:
        return "in force"
    ended = datetime.fromisoformat(expiry) <= datetime.now(UTC)
    return f"{'expired' if ended else 'until'} {shown_time(expiry)}"


def shown_time(text: str | None) -> str:
    """A time of the API in this place's own; empty for `None`."""
    return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M") if text else ""


def _lines(url: str, key: str, *, in_path: bool) -> list[str]:
    """What a person sets for the usual clients."""
    parts = urlsplit(url)
    shown = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
    lines = [
        f"OPENAI_BASE_URL={shown}/v1 OPENAI_API_KEY={key}",
        f"ANTHROPIC_BASE_URL={shown} ANTHROPIC_API_KEY={key}",
        f"ollama-python: OLLAMA_HOST={shown} OLLAMA_API_KEY={key}",
        f"Open WebUI: connection {shown}, key {key}",
    ]
    if in_path:
        lines.insert(0, f"ollama: OLLAMA_HOST={shown}/k/{key}")
    return lines
