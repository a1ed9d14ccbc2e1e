"""A machine that behaves like Ollama: serial loads, FIFO slots, eviction, batches, prompt caches.

Time advances by events: `advance` moves everything forward to `now`, `next_event` returns when
something happens by itself, and `happened` lists first tokens and ends since the last call.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from operator import attrgetter

import msgspec
from msgspec import Raw

from ollama_coordinator.scheduler.types import PACE_TOKENS_PER_SECOND, RunnerOptions, normal, serves
from ollama_coordinator_common.protocol import HealthReport
from ollama_coordinator_common.types import AgentId, Gpu, RunnerSettings

from .machine import MachineSpec, ModelSpec
from .trace import TraceRequest

TINY = 1e-9  # seconds of work that count as none: sums of floats do not end at 0


@dataclass(slots=True, eq=False)
class Job:
    """One request on a node. Its work left is in seconds at full speed, the prompt first.

    `lag` is how late its latest token was for one who reads from the arrival on, in seconds.
    """

    number: int
    request: TraceRequest
    sent_at: float
    options: RunnerOptions
    prefill_left: float = 0.0
    decode_left: float = 0.0
    decode_all: float = 0.0
    lag: float = 0.0
    ready_at: float | None = None
    started_at: float | None = None
    first_token_at: float | None = None
    ended_at: float | None = None

    def work(self, seconds: float) -> None:
        """So much of its work is done: the prompt, and after that the answer."""
        if self.prefill_left > 0:
            self.prefill_left = _left(self.prefill_left, seconds)
        else:
            self.decode_left = _left(self.decode_left, seconds)

    def read_along(self, now: float) -> None:
        """Note the lag. Between two events tokens come evenly: the latest one comes at an event."""
        if self.prefill_left <= 0 and self.decode_all > 0:
            written = self.request.output_tokens * (1 - self.decode_left / self.decode_all)
            reading = written / PACE_TOKENS_PER_SECOND
            self.lag = max(self.lag, now - self.request.at - reading)


@dataclass(slots=True, eq=False)
class Runner:
    """A model in memory, or on its way there."""

    model: ModelSpec
    options: RunnerOptions
    slots: int
    ready_at: float
    ready: bool = False
    leaving: bool = False
    used_at: float = 0.0
    running: list[Job] = field(default_factory=list)
    queue: deque[Job] = field(default_factory=deque)
    cache: "OrderedDict[int, tuple[frozenset[int], int]]" = field(default_factory=OrderedDict)

    @property
    def busy(self) -> bool:
        """Whether anything runs or waits in it."""
        return bool(self.running or self.queue)


def _left(work: float, done: float) -> float:
    return work - done if work - done > TINY else 0.0


# Beside others a model must fit into this share of what is free, as Ollama's estimates do.
FIT_SHARE = 0.8
CONVERSATIONS_PER_SLOT = 1  # A slot of llama.cpp caches the prompt of its last request

NEVER = float("inf")


class Node:
    """One machine at work."""

    def __init__(self, spec: MachineSpec) -> None:
        self.spec = spec
        self.models = {model.key: model for model in spec.models}
        self.runners: dict[str, Runner] = {}
        self.loads = 0
        self.busy_seconds = 0.0
        self._now = 0.0
        self._to_load: deque[tuple[str, Job]] = deque()
        self._loading: Runner | None = None
        self._victim_of: tuple[Job, Runner] | None = None
        self._happened: list[Job] = []

    # ── from outside ──────────────────────────────────────────────────────────────────────────

    def send(self, key: str, job: Job, now: float) -> None:
        """A request arrives."""
        self.advance(now)
        runner = self.runners.get(key)
        if runner is not None and not runner.leaving and serves(runner.options, job.options):
            runner.queue.append(job)
            self._fill(runner)
        else:
            self._to_load.append((key, job))
        self._next_load()

    def unload(self, key: str, now: float) -> None:
        """The model is asked to leave; it does when nothing runs in it."""
        self.advance(now)
        runner = self.runners.get(key)
        if runner is not None and runner.ready:
            runner.leaving = True
            self._drop_idle(runner)

    def cancel(self, job: Job, now: float) -> None:
        """Its client left."""
        self.advance(now)
        self._to_load = deque(item for item in self._to_load if item[1] is not job)
        for runner in list(self.runners.values()):
            if job in runner.running:
                runner.running.remove(job)
            elif job in runner.queue:
                runner.queue.remove(job)
            else:
                continue
            self._fill(runner)
            self._drop_idle(runner)
        self._next_load()

    def crash(self, now: float) -> None:
        """Everything in it is lost."""
        self.advance(now)
        self.runners.clear()
        self._to_load.clear()
        self._loading = None
        self._happened.clear()

    def happened(self) -> list[Job]:
        """The jobs that gave their first token or ended since the last call."""
        jobs, self._happened = self._happened, []
        return jobs

    def loaded(self) -> list[Runner]:
        """What `/api/ps` lists."""
        return [runner for runner in self.runners.values() if runner.ready]

    # ── time ──────────────────────────────────────────────────────────────────────────────────

    def next_event(self) -> float:
        """When something happens by itself."""
        soonest = self._loading.ready_at if self._loading is not None else NEVER
        active = self._active()
        for runner in self.runners.values():
            if runner.running:
                slow = self.spec.slow_down(len(runner.running), active)
                least = min(job.prefill_left or job.decode_left for job in runner.running)
                soonest = min(soonest, self._now + least * slow)
        return soonest

    def advance(self, now: float) -> None:
        """Let time pass until `now`, event by event."""
        while (event := self.next_event()) <= now:
            self._progress(max(event, self._now))
            self._settle()
        self._progress(now)

    def _active(self) -> int:
        return sum(bool(runner.running) for runner in self.runners.values())

    def _progress(self, until: float) -> None:
        passed = until - self._now
        active = self._active()
        if passed > 0 and active:
            self.busy_seconds += passed
            for runner in self.runners.values():
                if runner.running:
                    done = passed / self.spec.slow_down(len(runner.running), active)
                    for job in runner.running:
                        job.work(done)
                        job.read_along(until)
        self._now = until

    def _settle(self) -> None:
        """Whatever is due now."""
        loading = self._loading
        if loading is not None and loading.ready_at <= self._now + TINY:
            loading.ready, self._loading = True, None
            self.loads += 1
            self._fill(loading)
        for runner in list(self.runners.values()):
            self._settle_runner(runner)
        self._next_load()

    def _settle_runner(self, runner: Runner) -> None:
        for job in list(runner.running):
            if job.prefill_left <= 0 and job.first_token_at is None:
                job.first_token_at = self._now
                self._happened.append(job)
            if job.prefill_left <= 0 and job.decode_left <= 0:
                job.ended_at = self._now
                self._happened.append(job)
                runner.running.remove(job)
                runner.used_at = self._now
                self._remember(runner, job)
        self._fill(runner)
        self._drop_idle(runner)

    # ── slots ─────────────────────────────────────────────────────────────────────────────────

    def _fill(self, runner: Runner) -> None:
        while runner.ready and runner.queue and len(runner.running) < runner.slots:
            job = runner.queue.popleft()
            request, spec = job.request, self.spec
            new = max(request.prompt_tokens - self._cached(runner, request.prefix), 1)
            job.started_at = self._now
            job.ready_at = max(job.sent_at, runner.ready_at)
            job.prefill_left = max(spec.prefill_seconds(runner.model, new), TINY)
            job.decode_left = spec.decode_seconds(runner.model, request.output_tokens)
            job.decode_all = job.decode_left
            runner.running.append(job)

    def _cached(self, runner: Runner, prefix: tuple[int, ...]) -> int:
        """The tokens of the longest common beginning with a remembered conversation."""
        best = 0
        for last, (links, tokens) in runner.cache.items():
            common = sum(link in links for link in prefix)
            if common:
                best = max(best, tokens if last in prefix else tokens * common // len(links))
        return best

    def _remember(self, runner: Runner, job: Job) -> None:
        prefix = job.request.prefix
        if not prefix:
            return
        for link in prefix:
            runner.cache.pop(link, None)
        tokens = job.request.prompt_tokens + job.request.output_tokens
        runner.cache[prefix[-1]] = (frozenset(prefix), tokens)
        while len(runner.cache) > runner.slots * CONVERSATIONS_PER_SLOT:
            runner.cache.popitem(last=False)

    # ── loads ─────────────────────────────────────────────────────────────────────────────────

    def _next_load(self) -> None:
        """One load at a time. While one waits for memory, all later ones wait behind it."""
        while self._to_load and self._loading is None:
            key, job = self._to_load[0]
            runner = self.runners.get(key)
            if runner is not None and not runner.leaving and serves(runner.options, job.options):
                self._to_load.popleft()
                runner.queue.append(job)
                self._fill(runner)
                continue
            evicted = self._evict(key, job)
            if evicted is None:
                return
            self._to_load.popleft()
            self._begin_load(key, job, evicted=evicted)

    def _begin_load(self, key: str, job: Job, *, evicted: bool) -> None:
        model, spec = self.models[key], self.spec
        pause = spec.unload_seconds if evicted else 0.0
        runner = Runner(
            model,
            normal(job.options),
            slots=1 if model.embeds else spec.slots,
            ready_at=self._now + pause + spec.load_seconds(model),
        )
        runner.queue.append(job)
        self.runners[key] = self._loading = runner
        self._victim_of = None

    def _evict(self, key: str, job: Job) -> bool | None:
        """Evict what must leave: whether anything did; `None` while what must leave is in use.

        When no runner is idle one is chosen and waited for, whichever becomes idle first.
        """
        evicted = False
        if key in self.runners:  # loaded with other options
            if self.runners[key].busy:
                return None
            del self.runners[key]
            evicted = True
        need = self.models[key].memory_bytes
        while self.runners and not self._fits(need):
            victim = self._victim(job)
            if victim.busy:
                self._victim_of = job, victim
                return None
            del self.runners[victim.model.key]
            evicted = True
        return evicted

    def _victim(self, job: Job) -> Runner:
        """The one this job waits for, else the idle one that was used longest ago, else any."""
        if self._victim_of is not None:
            waiting, victim = self._victim_of
            if waiting is job and self.runners.get(victim.model.key) is victim:
                return victim
        idle = [runner for runner in self.runners.values() if not runner.busy]
        return min(idle, key=attrgetter("used_at")) if idle else next(iter(self.runners.values()))

    def _fits(self, need: int) -> bool:
        used = sum(runner.model.memory_bytes for runner in self.runners.values())
        return need <= FIT_SHARE * (self.spec.memory_bytes - used)

    def _drop_idle(self, runner: Runner) -> None:
        if runner.leaving and not runner.busy and self.runners.get(runner.model.key) is runner:
            del self.runners[runner.model.key]


def health_report(node: Node) -> HealthReport:
    """The heartbeat of a simulated machine's agent."""
    spec = node.spec
    busy = sum(bool(runner.running) for runner in node.runners.values())
    used = sum(runner.model.memory_bytes for runner in node.loaded())
    gpus = [Gpu("simulated", memory_total_bytes=spec.memory_bytes, memory_used_bytes=used)]
    return HealthReport(
        agent_id=AgentId(spec.name),
        cpu_usage=100.0 if busy else 3.0,
        memory_usage=100.0 * used / spec.memory_bytes,
        active_requests=sum(len(runner.running) for runner in node.runners.values()),
        memory_total_bytes=spec.memory_bytes if spec.reports_memory else None,
        gpus=gpus if spec.has_gpu and spec.reports_memory else [],
        runner=RunnerSettings(num_parallel=spec.slots) if spec.reports_slots else None,
        tags=_rows([_tag(model) for model in spec.models]),
        ps=_rows([_loaded(runner.model, spec) for runner in node.loaded()]),
    )


def _rows(rows: list[dict[str, object]]) -> Raw:
    return Raw(msgspec.json.encode({"models": rows}))


def _tag(model: ModelSpec) -> dict[str, object]:
    capabilities = ["embedding"] if model.embeds else ["completion"]
    return {
        "name": model.name,
        "digest": model.name,
        "size": model.size_bytes,
        "capabilities": capabilities,
    }


def _loaded(model: ModelSpec, spec: MachineSpec) -> dict[str, object]:
    vram = model.memory_bytes if spec.has_gpu else 0
    return {"name": model.name, "size": model.memory_bytes, "size_vram": vram}
