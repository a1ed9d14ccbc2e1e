"""The demonstration: a coordinator, three agents, chats by a real client, and who served what.

Everything runs as its own process, by the commands an operator would type, and is reached from
this machine only. The agents offer stand-ins for Ollama, of different speeds; with `--own` a
single one offers this machine's Ollama. `--once` ends by itself; otherwise it stays until Ctrl-C.
"""

import argparse
import asyncio
import contextlib
import os
import shlex
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import unquote

import aiohttp
import httpx
import ollama
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

START_SECONDS = 60.0
STOP_SECONDS = 10.0
OWN_OLLAMA = "http://127.0.0.1:11434"
OWN_SECONDS = 10.0


@dataclass
class Machine:
    """One machine of the demonstration; `ollama`: its stand-in's options, none for its own."""

    name: str
    port: int
    ollama: Sequence[str] = ()


@dataclass
class Chat:
    """One question on its way through the coordinator."""

    number: int
    model: str
    question: str
    started: float = 0.0
    first: float | None = None
    ended: float | None = None
    agent: str = ""
    answer: str = ""
    tokens: int = 0
    error: str = ""


QUESTIONS = (
    "Why is the sky blue?",
    "Name three uses of a paperclip.",
    "What is a monad, in one sentence?",
    "Write a haiku about load balancing.",
)
MODELS = ("llama3.2", "llama3.2", "qwen3:8b", "llama3.2")
FAST = ("--decode-rate", "45", "--prefill-rate", "4000", "--load-rate", "4e9", "--slots", "2")
MIDDLE = ("--decode-rate", "25", "--prefill-rate", "1500", "--load-rate", "3e9")
LAPTOP = ("--decode-rate", "12", "--prefill-rate", "500", "--load-rate", "2e9", "--cpu-only")
SMALL, LARGE = ("--model", "llama3.2=2e9"), ("--model", "qwen3:8b=5.2e9")


@dataclass
class Show:
    """What the terminal shows."""

    machines: list[Machine]
    chats: list[Chat] = field(default_factory=list)

    def __rich__(self) -> Group:
        return Group(self._agents(), self._chats())

    def _agents(self) -> Table:
        served = Counter(chat.agent for chat in self.chats if chat.agent)
        running = Counter(chat.agent for chat in self.chats if chat.agent and not chat.ended)
        tokens: Counter[str] = Counter()
        for chat in self.chats:
            tokens[chat.agent] += chat.tokens
        table = Table("agent", title="Who served what", title_justify="left")
        for heading in ("chats", "running", "tokens"):
            table.add_column(heading, justify="right")
        for name in (machine.name for machine in self.machines):
            table.add_row(name, str(served[name]), str(running[name]), str(tokens[name]))
        return table

    def _chats(self) -> Table:
        table = Table()
        table.add_column("#", justify="right", min_width=2)
        table.add_column("model", no_wrap=True, min_width=8)
        table.add_column("agent", no_wrap=True, min_width=10)
        table.add_column("answer", no_wrap=True, overflow="ellipsis", max_width=22)
        for heading in ("first", "whole"):
            table.add_column(heading, justify="right", no_wrap=True, min_width=7)
        for chat in self.chats:
            answer = Text(chat.error, "red") if chat.error else Text(chat.answer)
            first, whole = (_seconds(chat, at) for at in (chat.first, chat.ended))
            table.add_row(str(chat.number), chat.model, chat.agent, answer, first, whole)
        return table


def _seconds(chat: Chat, at: float | None) -> str:
    return "" if at is None else f"{at - chat.started:.2f} s"


def free_port(wanted: int = 0) -> int:
    """`wanted` if nobody listens there, else any free port."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            return free_port()
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def process(log: Path, *command: str, **environment: str) -> AsyncIterator[None]:
    """A program that runs as long as the block and writes to a file."""
    with log.open("ab") as output:
        running = await asyncio.create_subprocess_exec(
            *command,
            env={**os.environ, **environment},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C is for us; we end the others in order
        )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            running.terminate()
        try:
            await asyncio.wait_for(running.wait(), STOP_SECONDS)
        except TimeoutError:
            running.kill()
            await running.wait()


def program(name: str) -> str:
    """A command of the environment that runs us."""
    return str(Path(sys.executable).with_name(name))


@contextlib.asynccontextmanager
async def fleet(folder: Path, url: str, machines: list[Machine]) -> AsyncIterator[None]:
    """The coordinator at `url` with an agent for each machine."""
    port = url.rpartition(":")[2]
    database = f"sqlite:///{folder.as_posix()}/coordinator.db"
    async with contextlib.AsyncExitStack() as stack:
        for machine in machines:
            if machine.ollama:
                port_options = ("--port", str(machine.port))
                command = (sys.executable, "-m", "support.ollama", *port_options, *machine.ollama)
                await stack.enter_async_context(process(folder / "ollama.log", *command))
        coordinator = process(
            folder / "coordinator.log",
            program("ollama-coordinator"),
            "serve",
            COORDINATOR_HOST="127.0.0.1",
            COORDINATOR_PORT=port,
            COORDINATOR_DRAIN_TIMEOUT="1",
            DATABASE_URL=database,
        )
        await stack.enter_async_context(coordinator)
        for machine in machines:
            agent = process(
                folder / f"{machine.name}.log",
                program("ollama-coordinator-agent"),
                "run",
                COORDINATOR_URL=url,
                OLLAMA_PORT=str(machine.port),
                AGENT_MACHINE_NAME=machine.name,
                AGENT_STATE_DIR=str(folder / machine.name),
                AGENT_MANAGE_OLLAMA="false",
            )
            await stack.enter_async_context(agent)
        yield


async def until_ready(url: str, machines: list[Machine], logs: Path) -> None:
    """Wait until every agent is online with its models."""
    async with aiohttp.ClientSession() as session:
        try:
            async with asyncio.timeout(START_SECONDS):
                while not await _are_ready(session, url, len(machines)):
                    await asyncio.sleep(0.1)
        except TimeoutError:
            told = "\n".join(path.read_text() for path in sorted(logs.glob("*.log")))
            raise SystemExit(
                f"the fleet did not start within {START_SECONDS:g} s:\n{told}"
            ) from None


async def _are_ready(session: aiohttp.ClientSession, url: str, count: int) -> bool:
    try:
        async with session.get(f"{url}/api/agents") as response:
            agents = await response.json()
    except aiohttp.ClientError:
        return False
    ready = [agent for agent in agents if agent["status"] == "online" and agent["models"]]
    return len(ready) == count


async def ask(url: str, chat: Chat) -> None:
    """Stream one answer with the unmodified `ollama` client; it never learns who served it."""

    async def note_agent(response: httpx.Response) -> None:
        chat.agent = unquote(response.headers.get("x-ollama-coordinator-agent", ""))

    client = ollama.AsyncClient(url, event_hooks={"response": [note_agent]})
    chat.started = time.monotonic()
    try:
        messages = [{"role": "user", "content": chat.question}]
        options = {"num_predict": 40}
        async for part in await client.chat(chat.model, messages, stream=True, options=options):
            chat.first = chat.first or time.monotonic()
            chat.answer += (part.message.content or "").replace("\n", " ")
            chat.tokens += 1
    except (ollama.ResponseError, httpx.HTTPError) as exc:
        chat.error = str(exc)
    chat.ended = time.monotonic()
    await client._client.aclose()


async def own_model(url: str = OWN_OLLAMA) -> str | None:
    """The smallest model of an Ollama that chats and runs there, not on ollama.com; if any does."""
    timeout = aiohttp.ClientTimeout(total=OWN_SECONDS)
    try:
        async with aiohttp.ClientSession(url, timeout=timeout) as session:
            async with session.get("/api/tags") as response:
                models = (await response.json(content_type=None))["models"] or []
            for model in sorted(models, key=lambda model: model["size"]):
                here = not model.get("remote_host")
                if here and "completion" in await _capabilities(session, model):
                    return str(model["name"])
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError):
        return None
    return None


async def _capabilities(session: aiohttp.ClientSession, model: dict[str, Any]) -> list[str]:
    """What a model can do; the lists of Ollama before 0.30 do not tell."""
    if "capabilities" in model:
        return list(model["capabilities"])
    async with session.post("/api/show", json={"model": model["name"]}) as response:
        shown = await response.json(content_type=None)
    return list(shown.get("capabilities") or [])


async def plan(*, own: bool) -> tuple[list[Machine], Sequence[str], str]:
    """The machines, the models to ask, and a sentence that says what they are."""
    if own:
        model = await own_model()
        if model is None:
            raise SystemExit(
                f"no Ollama with a model that can chat answers at {OWN_OLLAMA}; start it and pull"
                " one, or leave --own out"
            )
        port = int(OWN_OLLAMA.rpartition(":")[2])
        return [Machine("this-machine", port)], (model,), f"the Ollama of this machine, {model}"
    machines = [
        Machine("gpu-fast", free_port(), (*FAST, *SMALL, *LARGE)),
        Machine("gpu-middle", free_port(), (*MIDDLE, *SMALL, *LARGE)),
        Machine("laptop", free_port(), (*LAPTOP, *SMALL)),
    ]
    return machines, MODELS, "three stand-ins for Ollama, of different speeds"


def by_hand(url: str, model: str) -> Text:
    """What to type to try it by hand."""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    lines = (
        f"curl {url}/api/chat -d {shlex.quote(body)}",
        f"curl {url}/api/agents",
        f"curl {url}/api/tags",
        f"{url}/dashboard    # in a browser",
        f"OLLAMA_HOST={url} ollama run {model}    # any Ollama client works",
    )
    return Text("\n".join(lines), "cyan")


async def main(*, once: bool, own: bool) -> None:
    """Show it."""
    console = Console()
    machines, models, what = await plan(own=own)
    url = f"http://localhost:{free_port(8080)}"
    with tempfile.TemporaryDirectory(prefix="ollama-coordinator-") as folder:
        async with fleet(Path(folder), url, machines):
            console.print(f"Starting a coordinator at {url} and agents for {what} …")
            await until_ready(url, machines, Path(folder))
            show = Show(machines)
            with Live(show, console=console, refresh_per_second=10):
                await chat_along(url, models, show, 12)
            failed = [chat for chat in show.chats if chat.error]
            console.print(f"\nThe coordinator is at [bold]{url}[/], by hand:\n")
            console.print(by_hand(url, models[0]), soft_wrap=True)
            if failed:
                raise SystemExit(f"{len(failed)} of {len(show.chats)} chats failed")
            if not once:
                console.print("\nCtrl-C ends it.")
                await asyncio.Event().wait()


async def chat_along(url: str, models: Sequence[str], show: Show, count: int) -> None:
    """Ask `count` questions, a new one every quarter of a second."""
    async with asyncio.TaskGroup() as tasks:
        for number in range(count):
            question = QUESTIONS[number % len(QUESTIONS)]
            chat = Chat(number + 1, models[number % len(models)], question)
            show.chats.append(chat)
            tasks.create_task(ask(url, chat))
            await asyncio.sleep(0.25)


def end_once(number: int, frame: FrameType | None) -> None:
    """End in order; a second request does not interrupt that."""
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="nox -s demo --", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end after the chats")
    parser.add_argument("--own", action="store_true", help="with the Ollama of this machine")
    arguments = parser.parse_args()
    # A request to stop ends the programs that were started too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, end_once)
    with contextlib.suppress(KeyboardInterrupt):
        once = arguments.once or not sys.stdin.isatty()
        asyncio.run(main(once=once, own=arguments.own))
