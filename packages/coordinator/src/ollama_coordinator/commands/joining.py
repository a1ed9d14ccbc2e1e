"""`join-token …`: which machines may join the fleet, from the command line."""

import secrets
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console
from rich.table import Table

from .client import Client, asks
from .keys import Expires, expiry, shown_time, state_of

tokens = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="With a join token a machine joins the fleet: make, list and revoke them.",
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="What the list calls it.")]
NewName = Annotated[
    str, typer.Argument(metavar="[NAME]", help="What the list calls it.", show_default=False)
]
Once = Annotated[bool, typer.Option("--once", help="For one machine; else for any number.")]


@tokens.command()
@asks
async def create(
    client: Client, name: NewName = "", once: Once = False, expires: Expires = ""
) -> None:
    """Make a join token and show it, this once."""
    wanted = {
        "name": name or f"join-{secrets.token_hex(2)}",
        "rights": ["join"],
        "once": once,
        "expires_at": expiry(expires),
    }
    made = await client.json("POST", "/api/keys", wanted)
    # Nothing but the token on the standard output, so that a script can take it.
    typer.echo(made["join_token"])
    hints = Console(stderr=True, soft_wrap=True)
    text = f"It is shown this once; the list calls it '{made['name']}'. On the machine that joins:"
    hints.print(text, highlight=False, markup=False)
    line = f"  COORDINATOR_URL={client.url} AGENT_JOIN_TOKEN={made['join_token']}"
    hints.print(f"{line} ollama-coordinator-agent", highlight=False, markup=False)


@tokens.command("list")
@asks
async def list_tokens(client: Client) -> None:
    """List the join tokens."""
    table = Table(box=None, pad_edge=False)
    for column in ("NAME", "TOKEN", "FOR", "STATE", "LAST USED"):
        table.add_column(column)
    for key in await _tokens(client):
        table.add_row(
            key["name"],
            f"oc1.….{key['hint']}…",
            "one machine" if key["once"] else "any number",
            state_of(key),
            shown_time(key["last_used_at"]) or "never",
        )
    Console().print(table)


@tokens.command()
@asks
async def revoke(client: Client, name: Name) -> None:
    """End a join token; the machines that joined with it stay."""
    await client.json("DELETE", f"/api/keys/{quote(name, safe='')}")
    typer.echo(f"'{name}' is revoked")


async def _tokens(client: Client) -> list[dict[str, Any]]:
    keys = (await client.json("GET", "/api/keys"))["keys"]
    return [key for key in keys if key["rights"] == ["join"]]
