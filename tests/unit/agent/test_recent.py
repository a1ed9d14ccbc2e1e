"""The last lines of both logs, and what of them is sent."""

import logging
from pathlib import Path

import pytest

from ollama_coordinator_agent.recent import LINE_CHARACTERS, LINES, TAIL_BYTES, Logs, Recent, tail


def record(text: str, level: int = logging.INFO, **extra: object) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": text, "levelno": level, "levelname": "INFO", **extra})


async def sent(logs: Logs, *, after: int) -> list[str] | None:
    """The server's lines in a report that arrives."""
    async with logs.news(after) as report:
        return report.server


@pytest.mark.spec("AGENT-44")
def test_the_last_lines_are_kept_with_their_facts() -> None:
    recent = Recent()
    for number in range(LINES + 5):
        recent.handle(record(f"line {number}", agent="a"))
    recent.handle(record("x" * 10_000))
    lines = recent.after(0)
    assert len(lines) == LINES
    assert lines[0].text == "line 6 agent=a"
    assert len(lines[-1].text) == LINE_CHARACTERS
    assert [line.number for line in lines] == sorted({line.number for line in lines})
    assert recent.after(lines[-3].number) == lines[-2:]


@pytest.mark.spec("AGENT-44")
async def test_the_servers_lines_are_sent_when_there_are_new_ones(tmp_path: Path) -> None:
    file = tmp_path / "ollama.log"
    logs = Logs(Recent(), file)
    assert await sent(logs, after=0) is None
    file.write_text("one\ntwo\n")
    assert await sent(logs, after=7) == ["one", "two"]
    assert await sent(logs, after=7) is None
    assert await sent(logs, after=0) == ["one", "two"]
    file.write_text("one\ntwo\nthree\n")
    assert await sent(logs, after=7) == ["one", "two", "three"]


@pytest.mark.spec("AGENT-44")
async def test_what_is_lost_on_the_way_is_sent_again(tmp_path: Path) -> None:
    file = tmp_path / "ollama.log"
    file.write_text("last words\n")
    logs = Logs(Recent(), file)
    with pytest.raises(ConnectionError):
        async with logs.news(7):
            raise ConnectionError
    assert await sent(logs, after=7) == ["last words"]


@pytest.mark.spec("AGENT-44")
def test_a_record_that_cannot_be_written_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    recent = Recent()
    recent.handle(record("%d files", args=("three",)))
    recent.handle(record("next"))
    assert [line.text for line in recent.after(0)] == ["next"]


@pytest.mark.spec("AGENT-44")
def test_only_the_end_of_a_long_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "ollama.log"
    file.write_bytes(b"\xff not text\n" + b"".join(b"%06d\n" % n for n in range(TAIL_BYTES // 4)))
    lines = tail(file)
    assert len(lines) == LINES
    assert lines[-1] == f"{TAIL_BYTES // 4 - 1:06}"
    file.write_bytes(b"y" * (TAIL_BYTES * 2) + b"\nlast")
    assert tail(file) == ["last"]
    assert tail(tmp_path / "missing") == []
