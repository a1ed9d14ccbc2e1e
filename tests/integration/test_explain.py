"""Why a request goes where it goes, over HTTP and on the command line."""

import asyncio
import io
from io import BytesIO
from pathlib import Path

import pytest
from msgspec.structs import replace
from rich.console import Console

from ollama_coordinator.api.http.errors import OWN_BODY_LIMIT
from ollama_coordinator.commands.scheduling import TERMS, decided
from ollama_coordinator.simulation import TraceRequest, write_trace
from support import programs
from support.coordinator import Running, running
from support.ollama import Hardware, StandIn

FAST = Hardware(decode_tokens_per_second=2000, reference_bytes=2_000_000_000)
SLOW = Hardware(decode_tokens_per_second=100, reference_bytes=2_000_000_000)


async def command(folder: Path, url: str, *arguments: str) -> tuple[int, str]:
    """Exit code and output of a command against a coordinator."""
    program = programs.command("ollama-coordinator")
    settings = {"COORDINATOR_URL": url, "COLUMNS": "160"}
    log = folder / f"{arguments[0]}.log"
    async with programs.program(log, program, *arguments, **settings) as started:
        return await started.ended(), started.output


async def chats(coordinator: Running, count: int) -> None:
    for _ in range(count):
        status, _ = await coordinator.chat(options={"num_predict": 20})
        assert status == 200


@pytest.mark.spec("OPERATION-20")
async def test_explain_tells_every_candidate_and_sends_nothing(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    agents = {agent["machine_name"]: agent["id"] for agent in await coordinator.get("/api/agents")}
    await coordinator.heartbeat(agents["spare"], ollama_running=False)
    status, decision = await coordinator.post(
        "/api/explain", {"model": "LLAMA3.2", "messages": [{"role": "user", "content": "hello"}]}
    )
    assert status == 200
    assert decision["chosen"] == agents["first"]
    told = {candidate["agent"]: candidate for candidate in decision["candidates"]}
    assert told["first"]["cost"] > 0
    assert told["spare"]["refused"] == "its Ollama does not answer"
    assert ollama.seen.count("/api/chat") == 0
    assert coordinator.at_rest()


@pytest.mark.spec("OPERATION-20")
def test_of_an_agent_that_could_serve_now_or_later_one_row_is_the_chosen_one() -> None:
    terms = dict.fromkeys((f"{term}_seconds" for term in TERMS), 0.5)
    both = {"agent_id": "a", "agent": "gpu-1", "cached_tokens": 0, **terms}
    candidates = [{**both, "action": "go", "cost": 1.1}, {**both, "action": "wait", "cost": 9.9}]
    decision = {"chosen": "a", "action": "go", "candidates": candidates}
    screen = Console(width=80, file=io.StringIO())
    screen.print(decided(decision, 80))
    assert isinstance(screen.file, io.StringIO)
    lines = [line for line in screen.file.getvalue().splitlines() if "chosen" in line]
    assert [line.split()[:3] for line in lines] == [["gpu-1", "go", "1.10"]]


@pytest.mark.spec("OPERATION-20")
async def test_explain_reads_no_more_than_other_routes_of_its_kind(coordinator: Running) -> None:
    body = BytesIO(b'{"model":"llama3.2","prompt":"' + b"x" * OWN_BODY_LIMIT + b'"}')
    url = f"{coordinator.url}/api/explain"
    async with coordinator.session.post(url, data=body) as response:
        assert response.status == 413


@pytest.mark.spec("OPERATION-20")
async def test_a_client_that_leaves_explain_is_no_error(
    coordinator: Running, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = coordinator.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /api/explain HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    assert (await coordinator.post("/api/explain", {"model": "llama3.2"}))[0] == 503
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.spec("OPERATION-20")
async def test_explain_refuses_as_the_route_would(coordinator: Running, ollama: StandIn) -> None:
    assert (await coordinator.post("/api/explain", {"model": "nope"}))[0] == 404
    assert (await coordinator.post("/api/explain", {}))[0] == 400
    async with running(policy="round-robin") as other:
        status, answer = await other.post("/api/explain", {"model": "m"})
        assert status == 409
        assert "COORDINATOR_POLICY=predicted" in answer["error"]


@pytest.mark.spec("OPERATION-20")
async def test_the_commands_tell_it_in_tables(tmp_path: Path) -> None:
    async with running() as coordinator:
        async with StandIn(hardware=FAST) as fast, StandIn(hardware=SLOW) as slow:
            await coordinator.register(fast, "fast")
            await coordinator.register(slow, "slow")
            await coordinator.register(slow, "[red]like markup[/]", ollama_port=9)
            await chats(coordinator, 4)
            code, output = await command(tmp_path, coordinator.url, "explain", "llama3.2", "hi")
            assert code == 0, output
            assert "← chosen" in output
            assert {"fast", "slow"} <= set(output.split())
            code, output = await command(tmp_path, coordinator.url, "explain", "llama3.2")
            assert "; 0 tokens" not in output  # a request, not a load
            code, output = await command(tmp_path, coordinator.url, "agents")
            assert code == 0, output
            assert output.count("online") == 2
            assert "[red]like markup[/]" in output
            code, output = await command(tmp_path, coordinator.url, "explain", "nope")
            assert code == 1
            assert "not found" in output


@pytest.mark.spec("OPERATION-21")
async def test_what_was_recorded_is_played_again_under_other_policies(tmp_path: Path) -> None:
    async with running() as coordinator:
        async with StandIn(hardware=FAST) as fast, StandIn(hardware=SLOW) as slow:
            await coordinator.register(fast, "fast")
            await coordinator.register(slow, "slow")
            await asyncio.gather(*(chats(coordinator, 3) for _ in range(4)))
            arguments = ("--policy", "predicted", "--policy", "random", "--add", "fast")
            code, output = await command(tmp_path, coordinator.url, "replay", *arguments)
            assert code == 0, output
            assert "12 requests" in output
            assert "too low" not in output  # most of them wait for a load
            lines = [line.split() for line in output.splitlines()]
            assert [line[0] for line in lines if line and line[-1] == "0"] == [
                "predicted",
                "random",
            ]
            seldom = tmp_path / "seldom"
            request = TraceRequest(at=0.0, model="llama3.2:latest", client="c", output_tokens=9)
            seldom.write_bytes(write_trace(replace(request, at=60.0 * n) for n in range(9)))
            code, output = await command(
                tmp_path, coordinator.url, "replay", "--trace", str(seldom)
            )
            assert "The load was too low to tell: at most 0 of 9 requests waited" in output
            code, output = await command(tmp_path, coordinator.url, "replay", "--add", "nobody")
            assert code == 1
            assert "nobody" in output


@pytest.mark.spec("OPERATION-22")
async def test_what_was_learned_survives_a_restart(tmp_path: Path) -> None:
    database = f"sqlite:///{(tmp_path / 'c.db').as_posix()}"
    async with StandIn(hardware=SLOW) as ollama:
        async with running(database_url=database) as coordinator:
            await coordinator.register(ollama)
            await chats(coordinator, 3)
            before = await coordinator.get("/api/estimates")
        async with running(database_url=database) as coordinator:
            after = await coordinator.get("/api/estimates")
    assert before[0]["samples"][1] >= 3
    assert after[0]["samples"] == before[0]["samples"]
    assert after[0]["decode_tokens_per_second"] == pytest.approx(
        before[0]["decode_tokens_per_second"]
    )
