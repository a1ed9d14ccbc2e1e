"""A node that behaves like Ollama: serial loads, FIFO slots, eviction, batch slow-down, cache.

Time advances by events: `advance` moves everything forward to `now`, `next_event` says when
something will happen by itself, and `happened` lists first tokens and ends since the last look.
"""

from collections import deque

from ollama_coordinator.scheduler.types import normal, serves

from .machine import MachineSpec
from .runner import TINY, Job, Runner

FIT_SHARE = 0.8
"""Ollama is careful: beside others a model must fit into this share of what is free."""

CONVERSATIONS_PER_SLOT = 1
INFINITE = float("inf")


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
        self._awaited: tuple[Job, Runner] | None = None
        self._happened: list[Job] = []

    # ── from outside ──────────────────────────────────────────────────────────────────────────

    def send(self, key: str, job: Job, now: float) -> None:
        """A request arrives."""
        self.advance(now)
        runner = self.runners.get(key)
        if runner is not None and not runner.doomed and serves(runner.options, job.options):
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
            runner.doomed = True
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
        soonest = self._loading.ready_at if self._loading is not None else INFINITE
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
        """One load at a time; who needs one while another waits for room, waits behind it."""
        while self._to_load and self._loading is None:
            key, job = self._to_load[0]
            runner = self.runners.get(key)
            if runner is not None and not runner.doomed and serves(runner.options, job.options):
                self._to_load.popleft()
                runner.queue.append(job)
                self._fill(runner)
                continue
            evicted = self._make_room(key, job)
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
        self._awaited = None

    def _make_room(self, key: str, job: Job) -> bool | None:
        """Evict who must leave: whether anybody did, `None` while who must leave is in use.

        When nobody is idle one runner is chosen and waited for, whoever else becomes idle.
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
                self._awaited = job, victim
                return None
            del self.runners[victim.model.key]
            evicted = True
        return evicted

    def _victim(self, job: Job) -> Runner:
        """The one this job waits for, else the idle one that was used longest ago, else any."""
        if self._awaited is not None:
            waiting, awaited = self._awaited
            if waiting is job and self.runners.get(awaited.model.key) is awaited:
                return awaited
        idle = [runner for runner in self.runners.values() if not runner.busy]
        return min(idle, key=_last_used) if idle else next(iter(self.runners.values()))

    def _fits(self, need: int) -> bool:
        used = sum(runner.model.memory_bytes for runner in self.runners.values())
        return need <= FIT_SHARE * (self.spec.memory_bytes - used)

    def _drop_idle(self, runner: Runner) -> None:
        if runner.doomed and not runner.busy and self.runners.get(runner.model.key) is runner:
            del self.runners[runner.model.key]


def _last_used(runner: Runner) -> float:
    return runner.used_at
