"""Which replica or load would have cut waiting most: the recorded requests, played once more.

One model and one agent are looked at. The moments at which requests of the model could really
begin stay; the agent adds those times in which it did nothing else, one request at a time. Each
request, in order of arrival, takes what ends it sooner, and those behind it move up. So what is
said to be saved is rather too little than too much.
"""

import asyncio
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from math import inf

from msgspec import Struct

from ollama_coordinator.aio import Slices
from ollama_coordinator.db import History, Wait
from ollama_coordinator.dispatch import Dispatch
from ollama_coordinator.registry import AgentState
from ollama_coordinator.scheduler import DoesNotPredict, Prospect
from ollama_coordinator_common.names import model_key
from ollama_coordinator_common.types import AgentId, AgentStatus

MOST_REQUESTS = 20_000
"""The newest ones that are looked at: read in 0.1 s, in the database's thread."""

MOST_MODELS, MOST_AGENTS = 5, 12
"""The models waited for longest, and for each the fastest agents: a second or two, in slices."""

KEPT_SECONDS = 60.0
"""How long an answer is given again: what it is made of hardly changes in a minute."""

LEAST_SECONDS, LEAST_SHARE = 60.0, 0.05
"""Less than a minute, or than a twentieth of what a model was waited for, is no advice."""

KEEP_ALIVE_SECONDS = 300.0
"""Ollama's own default: after so long without a request a model has to be loaded again."""

LOAD_SECONDS = 0.5
"""Ollama reports some tenths of a second for a model that is in memory already."""

GAPS_LOOKED_AT = 32
"""So many gaps are looked through for one request; later ones would rarely help it."""

DISK_RESERVE_BYTES = 5_000_000_000
"""Free space on a disk that a pull leaves: a full disk stops more than Ollama."""


class AdvicePiece(Struct, frozen=True):
    """One replica (`pull`) or load (`load`) that would have cut waiting.

    `saved_seconds` of the model's `waited_seconds`; `requests` would have run there. `doubts` are
    what is not known. `bytes` is the model's size.
    """

    action: str
    model: str
    agent_id: AgentId
    agent: str
    saved_seconds: float
    waited_seconds: float
    requests: int
    bytes: int
    text: str
    doubts: list[str]


class Advice(Struct, frozen=True):
    """`GET /api/advice`: what would have cut the waiting of the last `hours`, the best first.

    Waiting is the time until a slot and for loads, batches left out. `since` is the end of the
    oldest request that was looked at. `notes` say what is not known, and why there is no advice.
    """

    hours: float
    since: datetime | None
    requests: int
    waited_seconds: float
    advice: list[AdvicePiece]
    notes: list[str]


class Asked(Struct, frozen=True, gc=False):
    """One request: when it came, had its slot, began to be read, and ended; Unix seconds."""

    arrived: float
    granted: float
    ready: float
    ended: float
    agent_id: str | None
    served: bool
    prompt_tokens: int
    output_tokens: int


class Gaps:
    """The times in which an agent did nothing."""

    def __init__(self, busy: Iterable[tuple[float, float]]) -> None:
        self.starts, self.ends = [-inf], []
        for start, end in sorted(busy):
            if start > self.starts[-1]:
                self.ends.append(start)
                self.starts.append(end)
            else:
                self.starts[-1] = max(self.starts[-1], end)
        self.ends.append(inf)

    def first(self, at: float, seconds: float) -> float:
        """The first time from `at` on when so many seconds are free."""
        number = max(bisect_right(self.starts, at) - 1, 0)
        for index in range(number, min(number + GAPS_LOOKED_AT, len(self.starts))):
            start = max(self.starts[index], at)
            if start + seconds <= self.ends[index]:
                return start
        return inf


class Saved(Struct):
    """What would have been saved, and by how many requests there."""

    seconds: float = 0.0
    requests: int = 0


async def played(
    asked: Sequence[Asked],
    gaps: Gaps,
    there: Prospect,
    slices: Slices,
    *,
    resident_on: str | None = None,
) -> Saved:
    """The requests of one model, in order of arrival, with one more place for them.

    `resident_on`: the model is kept in memory on this agent; otherwise it is loaded when needed.
    """
    begins = sorted(
        one.granted if one.agent_id == resident_on else one.ready for one in asked if one.served
    )
    saved, index, free_at, used_at = Saved(), 0, -inf, -inf
    for one in asked:
        await slices.pause()
        while index < len(begins) and begins[index] < one.arrived:
            index += 1
        has_turn = one.served and index < len(begins)
        begin = begins[index] if has_turn else one.ready
        takes = there.prefill * one.prompt_tokens + there.decode * one.output_tokens
        earliest = max(one.arrived, free_at)
        is_warm = resident_on is not None or earliest - used_at <= KEEP_ALIVE_SECONDS
        load = 0.0 if is_warm else there.load
        start = gaps.first(earliest, load + takes)
        ends_here = begin + (one.ended - one.ready if one.served else 0.0)
        if start + load < begin and (start + load + takes < ends_here or not one.served):
            begin, free_at = start + load, start + load + takes
            used_at = free_at
            saved.requests += 1
        elif has_turn:
            index += 1
        saved.seconds += one.ready - begin
    return saved


class Advisor:
    """Advice from the history; one computation at a time, kept for a minute."""

    def __init__(self, dispatch: Dispatch, history: History) -> None:
        self._registry = dispatch.registry
        self._scheduler = dispatch.scheduler
        self._clock = dispatch.clock
        self._history = history
        self._turn = asyncio.Lock()
        self._kept: dict[float, tuple[float, Advice]] = {}

    async def advice(self, hours: float) -> Advice:
        """What would have cut the waiting of the last hours.

        Raises:
            DatabaseError: the history cannot be read.
        """
        async with self._turn:
            now = self._clock.now()
            self._kept = {
                key: kept for key, kept in self._kept.items() if now - kept[0] < KEPT_SECONDS
            }
            if hours not in self._kept:
                self._kept[hours] = now, await self._computed(hours)
            return self._kept[hours][1]

    async def _computed(self, hours: float) -> Advice:
        slices = Slices()
        at = self._clock.utc(self._clock.now()).timestamp()
        rows = await self._history.waits(at - hours * 3600, MOST_REQUESTS)
        by_model: defaultdict[str, list[Asked]] = defaultdict(list)
        busy: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        ran: defaultdict[str, set[str]] = defaultdict(set)
        waited: defaultdict[str, float] = defaultdict(float)
        count, since = len(rows), None
        while rows:  # taken from the list, as freeing them all at once holds up the loop too
            await slices.pause()
            row = Wait(*rows.pop())
            since = since or row.ended_at
            one = _asked(row)
            by_model[row.model].append(one)
            waited[row.model] += one.ready - one.arrived
            if one.agent_id is not None and one.served:
                busy[one.agent_id].append((one.granted, one.ended))
                ran[one.agent_id].add(model_key(row.model))
        longest = sorted(waited, key=lambda name: -waited[name])[:MOST_MODELS]
        gaps = {}
        for agent_id, intervals in busy.items():
            await slices.pause()
            gaps[agent_id] = Gaps(intervals)
        pieces: list[AdvicePiece] = []
        total = sum(waited.values())
        notes = _notes(count, total, hours)
        try:
            for name in longest:
                if waited[name] < LEAST_SECONDS:
                    continue
                asked = sorted(by_model.pop(name), key=lambda one: one.arrived)
                found = await self._best(name, asked, gaps, ran, waited[name], hours, slices)
                pieces += [found] if found is not None else []
        except DoesNotPredict as exc:
            notes.append(str(exc))
        pieces.sort(key=lambda piece: -piece.saved_seconds)
        while by_model:
            by_model.popitem()
            await slices.pause()
        if not pieces and not notes:
            notes.append(
                "no single replica or load would have saved a minute, or a twentieth of it"
            )
        return Advice(
            hours=hours,
            since=datetime.fromtimestamp(since, UTC) if since is not None else None,
            requests=count,
            waited_seconds=total,
            advice=pieces,
            notes=notes,
        )

    async def _best(
        self,
        name: str,
        asked: Sequence[Asked],
        gaps: dict[str, Gaps],
        ran: dict[str, set[str]],
        waited: float,
        hours: float,
        slices: Slices,
    ) -> AdvicePiece | None:
        """The agent on which this model would have saved most; `None` if on none."""
        key = model_key(name)
        holders = self._registry.holders(key)
        size = max((_size(agent, key) for agent in holders), default=0)
        if not size:
            return None  # nobody has it any more, or ollama.com runs it
        choices: list[tuple[float, AgentState, Prospect]] = []
        for agent in self._registry:
            there = self._prospect(agent, key, size, ran.get(agent.id, set()))
            if there is not None:
                choices.append((there.decode, agent, there))
        choices.sort(key=lambda choice: choice[0])
        best: AdvicePiece | None = None
        for _, agent, there in choices[:MOST_AGENTS]:
            has_it = key in agent.inventory.available
            if agent.inventory.is_loaded(key) and not _loaded_late(asked, agent.id):
                continue  # it is kept in memory as it is
            free = gaps.get(agent.id) or Gaps(())
            resident_on = agent.id if has_it else None
            saved = await played(asked, free, there, slices, resident_on=resident_on)
            enough = max(LEAST_SECONDS, LEAST_SHARE * waited)
            if saved.seconds >= enough and (best is None or saved.seconds > best.saved_seconds):
                action = "load" if has_it else "pull"
                best = AdvicePiece(
                    action=action,
                    model=name,
                    agent_id=agent.id,
                    agent=agent.name,
                    saved_seconds=saved.seconds,
                    waited_seconds=waited,
                    requests=saved.requests,
                    bytes=size,
                    text=_text(action, name, agent.name, saved.seconds, size, hours),
                    doubts=_doubts(agent, there, action),
                )
        return best

    def _prospect(
        self, agent: AgentState, key: str, size: int, ran: Iterable[str]
    ) -> Prospect | None:
        """What is predicted there; `None` where the model cannot or should not run."""
        now = self._clock.now()
        is_online = agent.status(now, self._registry.agent_timeout) is AgentStatus.ONLINE
        if not is_online or agent.settings.backup_seconds or agent.avoids(key, now):
            return None
        free = agent.report.disk_free_bytes if agent.report is not None else None
        on_disk = key in agent.inventory.available
        if not on_disk and free is not None and free < size + DISK_RESERVE_BYTES:
            return None
        there = self._scheduler.prospect(agent.id, key, size, ran)
        return None if there is None or there.fits is False else there


def _asked(row: Wait) -> Asked:
    arrived = row.ended_at - row.total_seconds
    granted = min(arrived + row.waited_seconds, row.ended_at)
    return Asked(
        arrived=arrived,
        granted=granted,
        ready=min(granted + row.load_seconds, row.ended_at),
        ended=row.ended_at,
        agent_id=row.agent_id,
        served=row.status == "served",
        prompt_tokens=row.prompt_tokens,
        output_tokens=row.output_tokens,
    )


def _loaded_late(asked: Iterable[Asked], agent_id: str) -> bool:
    """Whether any request waited there for a load."""
    return any(one.agent_id == agent_id and one.ready - one.granted > LOAD_SECONDS for one in asked)


def _size(agent: AgentState, key: str) -> int:
    row = agent.inventory.available.get(key)
    return row.model.size if row is not None else 0


def _text(action: str, model: str, agent: str, seconds: float, size: int, hours: float) -> str:
    what = "" if action == "pull" else ", kept in memory,"
    when = "the last day" if hours == 24 else f"the last {hours:g} hours"
    saved = f"would have saved {_duration(seconds)} of waiting in {when}"
    return f"{model} on {agent}{what} {saved}; {_gigabytes(size)}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size < 9.95e9 else f"{size / 1e9:.0f} GB"


def _doubts(agent: AgentState, there: Prospect, action: str) -> list[str]:
    doubts = []
    if not there.is_measured:
        doubts.append("its speed there is estimated from its size and the machine's other models")
    if there.fits is None:
        doubts.append("whether it fits in memory beside the other models there is not known")
    if action == "pull" and (agent.report is None or agent.report.disk_free_bytes is None):
        doubts.append("the free space on the machine's disk is not known")
    return doubts


def _notes(requests: int, waited: float, hours: float) -> list[str]:
    notes = []
    if not requests:
        notes.append(f"no request ended in the last {hours:g} hours: nothing is known")
    elif requests >= MOST_REQUESTS:
        notes.append(f"only the newest {MOST_REQUESTS} requests were looked at")
    if requests and waited < LEAST_SECONDS:
        notes.append(f"requests waited {waited:.0f} seconds in all: nothing to save")
    return notes
