"""What people see: the table and the log lines."""

import logging

import pytest
from rich.console import Console

from ollama_coordinator_agent.display import StatusView, render
from ollama_coordinator_agent.manifests import OnDisk
from ollama_coordinator_agent.metrics import Readings
from ollama_coordinator_agent.ollama import ModelList, Presence
from ollama_coordinator_agent.watch import Facts
from ollama_coordinator_common.commandline import EventFormatter
from ollama_coordinator_common.types import Gpu, RunnerSettings


def shown(facts: Facts, readings: Readings, **rest: object) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(
            render(
                StatusView(
                    machine_name="gpu-1",
                    coordinator_url="http://c:8080",
                    ollama_url="http://127.0.0.1:11434",
                    facts=facts,
                    readings=readings,
                    **rest,  # type: ignore[arg-type]
                )
            )
        )
    return capture.get()


@pytest.mark.spec("AGENT-5")
def test_the_table_shows_what_is_known() -> None:
    many = ModelList(b"{}", tuple((f"m{n}:latest", "", None) for n in range(14)))
    text = shown(
        Facts(Presence.ANSWERING, "0.33.0", many, ModelList(b"{}"), OnDisk(), RunnerSettings(4)),
        Readings(50.0, 91.0, 2**34, 2**31, [Gpu("RTX", 0, 2**34, 2**33, 75.0, 61.0)]),
        agent_id="agent-7",
        ip_address="192.0.2.4",
        relay_port=4000,
    )
    for piece in (
        "gpu-1 (192.0.2.4, relayed on port 4000)",
        "connected at http://c:8080",
        "running, version 0.33.0 at http://127.0.0.1:11434",
        "m11:latest and 2 more",
        "4 per loaded model",
        "91.0 % of 16.0 GiB",
        "2.0 GiB free",
        "75.0 %  RTX  8.0 of 16.0 GiB  61 °C",
    ):
        assert piece in text


@pytest.mark.spec("DASH-36")
def test_what_others_say_steers_no_terminal() -> None:
    model = ModelList(b"{}", (("m\x1b[2J:latest", "", None),))
    text = shown(
        Facts(Presence.ANSWERING, "0.33\u202e", model),
        Readings(gpus=[Gpu("RTX\x1b")]),
        coordinator_trouble="no\x9bway",
    )
    for piece in (r"m\x1b[2J:latest", r"0.33\u202e", r"RTX\x1b", r"no\x9bway"):
        assert piece in text


@pytest.mark.spec("AGENT-5")
def test_the_table_says_what_is_missing() -> None:
    text = shown(
        Facts(Presence.SILENT), Readings(), coordinator_trouble="no answer from http://c:8080: why"
    )
    for piece in (
        "no answer from http://c:8080: why",
        "not answering",
        "none yet: never registered",
        "none found",
    ):
        assert piece in text


@pytest.mark.spec("AGENT-5")
def test_a_log_line_ends_with_its_facts() -> None:
    record = logging.makeLogRecord({"msg": "agent offline", "levelname": "INFO", "agent_id": "a"})
    assert EventFormatter("%(levelname)s %(message)s").format(record) == (
        "INFO agent offline agent_id=a"
    )
