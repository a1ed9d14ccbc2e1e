"""`top`: the fleet and its requests, live, for those who live in the terminal."""

import asyncio
import sys
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from .client import NoAnswer, finished
from .follower import Follower
from .models import DEFAULT, Coordinator
from .screen import screen

DRAWS_PER_SECOND = 4
FIRST_PICTURE_SECONDS = 5.0

Once = Annotated[bool, typer.Option("--once", help="Print one picture and end.")]


def top(coordinator: Coordinator = DEFAULT, once: Once = False) -> None:
    """Show the fleet and its requests, live; Ctrl-C ends it."""
    console = Console()
    follower = Follower(coordinator)
    if once or not sys.stdout.isatty():
        finished(_print_once(follower, console, coordinator))
    else:
        finished(_live(follower, console))


async def _print_once(follower: Follower, console: Console, url: str) -> None:
    try:
        async with (
            asyncio.timeout(FIRST_PICTURE_SECONDS),
            aclosing(follower.follow()) as pictures,
        ):
            async for state in pictures:
                if follower.problem:
                    text = f"no coordinator answers at {url} ({follower.problem})"
                    raise NoAnswer(f"{text}; give its address with --coordinator")
                if state:
                    console.print(screen(state, None, datetime.now(UTC), None))
                    return
    except TimeoutError as exc:
        raise NoAnswer(f"the coordinator at {url} sends no picture") from exc


async def _live(follower: Follower, console: Console) -> None:
    """Draw at a steady pace, whatever the stream does."""
    with Live(console=console, screen=True, auto_refresh=False) as live:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_keep_up(follower))
            while True:
                now = datetime.now(UTC)
                live.update(
                    screen(follower.state, follower.problem, now, console.height), refresh=True
                )
                await asyncio.sleep(1 / DRAWS_PER_SECOND)


async def _keep_up(follower: Follower) -> None:
    async for _ in follower.follow():
        pass
