"""The agent writes a model: whole, checked, the manifest last, and on from where it was cut."""

import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from ollama_coordinator_agent.client import CoordinatorClient, CoordinatorError
from ollama_coordinator_agent.model_writer import Incoming, ModelWriter
from ollama_coordinator_common import tickets

CONTENT = b"weights" * 50_000
DIGEST = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
NAME = "fleet.internal/transfer-1/m:latest"


class Files:
    """Gives the content away; each entry of `faults` befalls one request."""

    def __init__(self, *faults: str) -> None:
        self.faults = list(faults)
        self.starts: list[int] = []

    async def file(self, path: str, start: int, piece_bytes: int) -> AsyncIterator[bytes]:
        self.starts.append(start)
        fault = self.faults.pop(0) if self.faults else ""
        yield b"x" * len(CONTENT[start:]) if fault == "spoilt" else CONTENT[start:200_000]
        if fault == "cut":
            raise CoordinatorError("it hung up")
        if fault != "spoilt":
            yield CONTENT[max(start, 200_000) :]


async def brought(folder: Path, files: Files, size: int = len(CONTENT)) -> list[dict[str, Any]]:
    layer = {"mediaType": "m", "digest": DIGEST, "size": size}
    manifest = json.dumps({"layers": [layer]}).encode()
    writer = ModelWriter(cast(CoordinatorClient, files))
    order = Incoming(name=NAME, path="/v2/transfer-1/m", manifest=manifest)
    lines = [line async for line in writer.bring(folder, order)]
    if "error" not in lines[-1]:
        written = folder / "manifests/fleet.internal/transfer-1/m/latest"
        assert written.read_bytes() == manifest
        assert (folder / "blobs" / DIGEST.replace(":", "-")).read_bytes() == CONTENT
        assert [file.name for file in (folder / "blobs").iterdir()] == [DIGEST.replace(":", "-")]
    else:
        assert not list(folder.glob("manifests/*/*/*/*"))
    return lines


@pytest.mark.spec("AGENT-83")
async def test_what_was_cut_goes_on_and_what_is_spoilt_begins_anew(tmp_path: Path) -> None:
    files = Files("cut", "spoilt")
    lines = await brought(tmp_path, files)
    assert lines[-1] == {"status": "success"}
    assert files.starts == [0, 200_000, 0]
    assert (await brought(tmp_path, files))[-1] == {"status": "success"}
    assert len(files.starts) == 3


@pytest.mark.spec("AGENT-83")
async def test_a_file_that_never_comes_whole_and_one_without_room_leave_no_manifest(
    tmp_path: Path,
) -> None:
    lines = await brought(tmp_path, Files(*["spoilt"] * 6))
    assert lines[-1] == {"error": "digest mismatch, file must be downloaded again"}
    lines = await brought(tmp_path / "other", files := Files(), size=2**60)
    assert "no space left on device" in lines[-1]["error"]
    assert files.starts == []


@pytest.mark.spec("AGENT-82")
def test_a_ticket_is_for_one_thing_once_and_soon() -> None:
    book, key = tickets.TicketBook("secret"), tickets.key_of("secret")
    ticket = tickets.issue(key, tickets.READ, "m", DIGEST, 100.0)
    wrong = [
        (ticket, tickets.WRITE, "m", DIGEST, 50.0),
        (ticket, tickets.READ, "n", DIGEST, 50.0),
        (ticket, tickets.READ, "m", DIGEST[:-1] + "0", 50.0),
        (ticket, tickets.READ, "m", DIGEST, 101.0),
        (tickets.issue(key, tickets.READ, "m", DIGEST, 1e6), tickets.READ, "m", DIGEST, 50.0),
        (tickets.issue("", tickets.READ, "m", DIGEST, 100.0), tickets.READ, "m", DIGEST, 50.0),
        ("nothing", tickets.READ, "m", DIGEST, 50.0),
    ]
    for case in wrong:
        with pytest.raises(tickets.WrongTicket):
            book.take(*case)
    book.take(ticket, tickets.READ, "m", DIGEST, 50.0)
    with pytest.raises(tickets.WrongTicket):
        book.take(ticket, tickets.READ, "m", DIGEST, 51.0)


@pytest.mark.parametrize(
    ("host", "other"),
    [
        ("192.0.2.7:8080", "[::ffff:192.0.2.7]:8080"),
        ("192.0.2.7", "[::ffff:192.0.2.7]"),
        ("Coordinator.lan:80", "cOORDINATOR.LAN:80"),
    ],
)
def test_a_host_has_another_name(host: str, other: str) -> None:
    assert tickets.other_name(host) == other
