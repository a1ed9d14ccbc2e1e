"""`join-token …` and `join-request …`: which machines join the fleet, from the command line."""

import secrets
from typing import Annotated, Any
from urllib.parse import quote, urlsplit, urlunsplit

import typer
from rich.console import Console
from rich.text import Text

from ollama_coordinator_common.network import is_loopback, public_address

from .client import Client, Json, asks
from .keys import Expires, expiry, shown_time, state_of
from .tables import console, shown_json, table

tokens = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="With a join token a machine joins the fleet: make, list and revoke them.",
)

requests = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Machines that want to join and have no token: list, admit and refuse them.",
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="What the list calls it.")]
Asking = Annotated[
    str, typer.Argument(metavar="NAME", help="The machine's name, or its fingerprint.")
]
NewName = Annotated[
    str, typer.Argument(metavar="[NAME]", help="What the list calls it.", show_default=False)
]
Once = Annotated[bool, typer.Option("--once", help="For one machine; else for any number.")]


@tokens.command()
@asks
async def create(
    client: Client,
    name: NewName = "",
    once: Once = False,
    expires: Expires = "",
    json: Json = False,
) -> None:
    """Make a join token and show it, this once."""
    wanted = {
        "name": name or f"join-{secrets.token_hex(2)}",
        "rights": ["join"],
        "once": once,
        "expires_at": expiry(expires),
    }
    made = await client.json("POST", "/api/keys", wanted)
    if json:
        shown_json(made)
        return
    # Nothing but the token on the standard output, so that a script can take it.
    typer.echo(made["join_token"])
    hints = Console(stderr=True, soft_wrap=True)
    text = f"It is shown this once; the list calls it '{made['name']}'. On the machine that joins:"
    url, token = _url_for_others(client.url), made["join_token"]
    curl, powershell = f"curl -fsSL {url}/join", f"irm {url}/join"
    if pin := made.get("pin"):
        curl = f"curl -fsSLk --pinnedpubkey '{pin}' {url}/join"
        powershell = f"curl.exe{curl.removeprefix('curl')}?shell=powershell | Out-String"
    lines = (
        text,
        f"  {curl} | AGENT_JOIN_TOKEN={token} sh",
        f"  in PowerShell: $env:AGENT_JOIN_TOKEN='{token}'; {powershell} | iex",
    )
    for line in lines:
        hints.print(line, highlight=False, markup=False)


@tokens.command("list")
@asks
async def list_tokens(client: Client, json: Json = False) -> None:
    """List the join tokens."""
    listed = await _tokens(client)
    if json:
        shown_json(listed)
        return
    made = table("NAME", "TOKEN", "FOR", "STATE", "LAST USED")
    for key in listed:
        made.add_row(
            Text(key["name"]),
            f"oc1.….{key['hint']}…",
            "one machine" if key["once"] else "any number",
            state_of(key),
            shown_time(key["last_used_at"]) or "never",
        )
    console().print(made)


@tokens.command()
@asks
async def revoke(client: Client, name: Name, json: Json = False) -> None:
    """End a join token; the machines that joined with it stay."""
    key = await client.json("DELETE", f"/api/keys/{quote(name, safe='')}")
    if json:
        shown_json(key)
        return
    typer.echo(f"'{name}' is revoked")


def _url_for_others(url: str) -> str:
    """A URL of this machine's loopback as other machines have to write it."""
    parts = urlsplit(url)
    if not is_loopback(parts.hostname or ""):
        return url
    address = public_address("")
    if address is None:
        return url
    return urlunsplit(parts._replace(netloc=f"{address}:{parts.port}" if parts.port else address))


async def _tokens(client: Client) -> list[dict[str, Any]]:
    keys = (await client.json("GET", "/api/keys"))["keys"]
    return [key for key in keys if key["rights"] == ["join"]]


@requests.command("list")
@asks
async def list_requests(client: Client, json: Json = False) -> None:
    """List the machines that want to join; each agent logs its own fingerprint."""
    answer = await client.json("GET", "/api/join-requests")
    if json:
        shown_json(answer)
        return
    made = table("MACHINE", "FINGERPRINT", "FROM", "SINCE")
    for one in answer["join_requests"]:
        facts = (one["machine_name"], one["fingerprint"], one["address"])
        made.add_row(*map(Text, facts), shown_time(one["asked_at"]))
    console().print(made)


@requests.command()
@asks
async def admit(client: Client, name: Asking, json: Json = False) -> None:
    """Let a machine join; it does when it asks again, some seconds later."""
    machine = await client.json("POST", f"/api/join-requests/{quote(name, safe='')}")
    if json:
        shown_json(machine)
        return
    typer.echo(f"'{name}' may join")


@requests.command()
@asks
async def refuse(client: Client, name: Asking, json: Json = False) -> None:
    """Refuse a machine, now and when it asks again."""
    machine = await client.json("DELETE", f"/api/join-requests/{quote(name, safe='')}")
    if json:
        shown_json(machine)
        return
    typer.echo(f"'{name}' is refused")
