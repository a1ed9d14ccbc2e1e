"""How fast models write now, measured in virtual time."""

from datetime import UTC, datetime
from itertools import count

import pytest

from ollama_coordinator.attention.concerns import SLOW_RATIO
from ollama_coordinator.dispatch import Held
from ollama_coordinator.journal.entry import JournalAttempt, JournalEntry
from ollama_coordinator.journal.speeds import Lateness, Speeds
from ollama_coordinator.registry import AgentState
from ollama_coordinator.scheduler import (
    Kind,
    Lease,
    LeaseId,
    Outcome,
    Request,
    RequestId,
    Result,
    Timings,
)
from ollama_coordinator_common.names import model_key
from ollama_coordinator_common.protocol import RegisterRequest
from ollama_coordinator_common.types import AgentId

pytestmark = pytest.mark.spec("OPERATION-96")

KEY, AGENT = model_key("llama3.2"), AgentId("a")
ALONE = 50.0
"""What the machine writes alone, in tokens a second, as long as it is well."""


class Machine:
    """Writes answers in virtual seconds; each other one slows one by `batch`."""

    def __init__(self, batch: float = 0.4) -> None:
        self.batch, self.speed, self.now = batch, ALONE, 1000.0
        self.speeds = Speeds()
        self.running: dict[JournalEntry, float] = {}
        self._ids = count(1)
        registered = RegisterRequest("gpu-1", "10.0.0.1", "0.24.0", 11434)
        self._agent = AgentState(AGENT, registered, registered_at=datetime.now(UTC), heard_at=0.0)

    def begin(self, *, streams: bool = True, reads: bool = False, prompt: int = 0) -> JournalEntry:
        """A request whose answer is written from now on; or its prompt is read for ever."""
        number = next(self._ids)
        request = Request(
            id=RequestId(str(number)), model=KEY, name="llama3.2", arrived_at=self.now,
            kind=Kind.CHAT, prompt_tokens=prompt,
        )  # fmt: skip
        lease = Lease(id=LeaseId(number), request=request, agent_id=AGENT, granted_at=self.now)
        entry, held = JournalEntry(request, "/api/chat"), Held(lease, self._agent, self.now)
        held.began_at = self.now if streams and not reads else None
        writes_at = self.now if not streams else None
        entry.attempts.append(JournalAttempt(held, None, {}, writes_at=writes_at))
        self.running[entry] = 0.0
        return entry

    def end(self, entry: JournalEntry) -> None:
        held, tokens = entry.attempts[-1].held, self.running.pop(entry)
        seconds = self.now - held.lease.granted_at
        timings = Timings(output_tokens=int(tokens), output_seconds=seconds)
        held.outcome, held.ended = Outcome(Result.SERVED, timings=timings), True
        self.speeds.ended(entry, self.now)

    def step(self) -> None:
        """A second passes, and a sample is taken."""
        writes = [one for one in self.running if _is_writing(one)]
        each = self.speed / (1 + self.batch * (len(writes) - 1)) if writes else 0.0
        for entry in writes:
            self.running[entry] += each
            if (held := entry.attempts[-1].held).began_at is not None:
                held.records = int(self.running[entry])
        self.now += 1.0
        self.speeds.sample(self.running, self.now)

    def ratio(self) -> float | None:
        """How many times slower than a machine that is well it is measured to be."""
        recent = self.speeds.recent(AGENT, KEY, self.now)
        return None if recent is None else ALONE / recent

    def seconds_until_slow(self, most: int = 60) -> int:
        """How many seconds of use it takes until it is found slow."""
        for second in range(most):
            ratio = self.ratio()
            if ratio is not None and ratio > SLOW_RATIO:
                return second
            self.step()
        pytest.fail(f"it is not found within {most} seconds: {self.ratio()}")


def _is_writing(entry: JournalEntry) -> bool:
    attempt = entry.attempts[-1]
    return attempt.held.began_at is not None or attempt.writes_at is not None


def wrote(machine: Machine, answers: int, tokens: int, *, streams: bool, beside: int = 0) -> None:
    """So many answers one after the other, each with others beside it."""
    for _ in range(answers):
        entries = [machine.begin(streams=streams) for _ in range(beside + 1)]
        while min(machine.running[one] for one in entries) < tokens:
            machine.step()
        for entry in entries:
            machine.end(entry)


@pytest.mark.parametrize("beside", [0, 1, 3])
@pytest.mark.parametrize("slower", [5, 20, 100])
def test_streams_show_within_a_minute_that_a_machine_became_slow(beside: int, slower: int) -> None:
    machine = Machine()
    for _ in range(beside + 1):
        machine.begin()
    for _ in range(15):
        machine.step()
    assert machine.ratio() == pytest.approx(1.0, abs=0.2)
    machine.speed = ALONE / slower
    assert machine.seconds_until_slow() <= 50


@pytest.mark.parametrize("beside", [0, 1, 3])
def test_answers_in_one_piece_show_it_too(beside: int) -> None:
    machine = Machine()
    wrote(machine, 10, 200, streams=False, beside=beside)
    assert machine.ratio() == pytest.approx(1.0, abs=0.35)
    machine.speed, began = ALONE / 5, machine.now
    wrote(machine, 3, 60, streams=False, beside=beside)
    assert (machine.ratio() or 0) > SLOW_RATIO
    assert machine.now - began <= 60


def test_requests_that_are_late_there_one_after_the_other_show_it() -> None:
    """Another machine serves what waits there in vain: no answer ever tells its speed."""
    machine = Machine()
    wrote(machine, 3, 100, streams=False)
    for number, result in enumerate((Result.TAKEN_BACK, Result.MODEL_FAILED)):
        assert machine.speeds.lateness(AGENT, KEY, machine.now) is None
        at_once = [machine.begin(streams=False) for _ in range(2)]  # which are one trouble
        machine.speed = ALONE / 10
        for _ in range(25):
            machine.step()
        for entry in at_once:
            held = entry.attempts[-1].held
            held.late, held.ended, held.outcome = bool(number), True, Outcome(result)
        machine.step()  # the requests are there, and wait for their next attempts
        for entry in at_once:
            del machine.running[entry]
    found = machine.speeds.lateness(AGENT, KEY, machine.now)
    assert found == Lateness(2, 26.0)
    machine.speed = ALONE
    wrote(machine, 1, 100, streams=False)
    assert machine.speeds.lateness(AGENT, KEY, machine.now) is None


def test_a_machine_that_is_well_again_is_seen_to_be_by_short_answers_too() -> None:
    machine = Machine()
    machine.speed = ALONE / 10
    machine.begin()
    machine.seconds_until_slow()
    for entry in list(machine.running):
        machine.end(entry)
    machine.speed = ALONE
    wrote(machine, 12, 40, streams=True)
    assert machine.ratio() == pytest.approx(1.0, abs=0.3)


@pytest.mark.parametrize("beside", [1, 3, 7, 15])
def test_requests_that_share_a_processor_do_not_make_it_slow(beside: int) -> None:
    machine = Machine(batch=1.0)
    for _ in range(beside + 1):
        machine.begin()
    for _ in range(60):
        machine.step()
        assert (machine.ratio() or 1.0) < SLOW_RATIO


def test_a_prompt_that_is_read_beside_it_does_not_make_it_slow() -> None:
    machine = Machine()
    machine.begin()
    machine.begin(streams=False)
    for _ in range(15):
        machine.step()
    machine.begin(reads=True)
    machine.speed = ALONE / 30
    for _ in range(60):
        machine.step()
    for entry in [one for one in machine.running if _is_writing(one)]:
        machine.end(entry)
    assert (machine.ratio() or 1.0) < SLOW_RATIO


def test_tool_calls_and_pauses_do_not_make_it_slow_nor_what_comes_after_them_fast() -> None:
    machine = Machine()
    entry = machine.begin()
    for _ in range(15):
        machine.step()
    before = machine.ratio()
    for _ in range(6):  # calls of 100 tokens each, which come as one record, and then text again
        machine.speed = 0.0
        for _ in range(2):
            machine.step()
        machine.speed = 1.0
        machine.step()
    machine.speed = 0.0
    for _ in range(30):
        machine.step()
    machine.speed = ALONE * 30  # what was held up on its way comes at once
    machine.step()
    machine.speed = 0.0
    machine.step()
    assert (machine.ratio() or 1.0) < SLOW_RATIO
    assert (machine.ratio() or 0.0) >= (before or 0.0) * 0.9
    machine.end(entry)


def test_a_slow_reader_and_a_long_prompt_do_not_make_it_slow() -> None:
    machine = Machine()
    machine.begin()
    for _ in range(30):
        machine.step()
    machine.speed = 1.0  # what lies between is full: we read as its client does
    for _ in range(60):
        machine.step()
    assert machine.ratio() == pytest.approx(1.0, abs=0.1)
    machine = Machine()
    machine.speed = 5.0
    machine.begin(prompt=100_000)
    for _ in range(60):
        machine.step()
    assert machine.ratio() is None


def test_a_measurement_of_long_ago_and_of_a_removed_agent_says_nothing() -> None:
    machine = Machine()
    machine.begin()
    for _ in range(20):
        machine.step()
    assert machine.ratio() is not None
    machine.running.clear()
    machine.now += 1000.0
    assert machine.ratio() is None
    machine.now -= 1000.0
    machine.speeds.forget(AGENT)
    assert machine.ratio() is None
