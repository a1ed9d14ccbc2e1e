"""How many requests of one model an agent runs at once: reported, or found by careful trials."""

from dataclasses import dataclass, field

from msgspec import Struct

from ollama_coordinator_common.types import AgentId

# Embeddings in flight beyond the slot: one takes some ms, as the round trip does.
EMBEDDING_EXTRA = 2
# Trials begin together for so long: one plan and the next, as a single one shows little.
BURST_SECONDS = 0.1
# A trial that showed nothing is repeated when its answers have probably ended.
TRY_AGAIN_SECONDS = 20.0
# A trial that failed made a request wait: it rests twice as long each time:
FIRST_REST_SECONDS = 60.0
MOST_DOUBLINGS = 10
LONGEST_REST_SECONDS = 1800.0
REPORT_HOLDS_SECONDS = 30.0  # three heartbeats
FORGET_WAIT_SECONDS = 60.0  # an owner's chat is over, or has shown itself again
ENOUGH_REFUTED = 2  # so many models that run no more speak for all: one alone may be special

SERIAL_FAMILIES = frozenset(
    {
        "mllama", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "qwen3next", "lfm2", "lfm2moe",
        "nemotron_h", "nemotron_h_moe", "nemotron_h_omni",
    }
)  # fmt: skip
"""Model families that Ollama runs one request at a time, whatever it is configured to: the list in
its `server/sched.go`."""


@dataclass(slots=True, eq=False)
class AgentSlots:
    """What the models of one agent were seen to run at once: its Ollama has one setting for all.

    `refuted` are those that were sent more than `count` in vain since `count` last changed.
    """

    count: int = 1
    members: "list[Slots]" = field(default_factory=list)
    refuted: "set[Slots]" = field(default_factory=set)

    @property
    def is_settled(self) -> bool:
        """Whether it is pointless to try more with a model of which nothing is known."""
        return len(self.refuted) >= ENOUGH_REFUTED

    def keep(self, members: "set[Slots]") -> None:
        """These are the agent's models now; what others have shown still counts."""
        self.members = [one for one in self.members if one in members]
        self.refuted &= members

    def proved(self, count: int) -> None:
        """A model was seen to run so many."""
        if count > self.count:
            self._set(count)

    def failed(self, slots: "Slots") -> None:
        """A model was sent one more than it runs. One that was deleted does not count."""
        if slots not in self.members:
            return
        if slots.proven >= self.count:
            self.refuted.add(slots)
        elif (most := max(one.proven for one in self.members if one.is_seen)) < self.count:
            self._set(most)

    def _set(self, count: int) -> None:
        self.count = count
        self.refuted.clear()
        for one in self.members:
            one.refresh()


@dataclass(slots=True, eq=False)
class Slots:
    """The slots of one model on one agent.

    `fixed` is what the agent reported. Else `proven` were seen at work together; a model that was
    never seen is assumed to run what others on its agent do. Beyond that one more is tried, or
    twice as many once two were proven. A trial that shows nothing is repeated after a while, one
    that failed after longer each time. `extra` may be in flight beyond the slots.
    """

    agent_slots: AgentSlots = field(default_factory=AgentSlots)
    fixed: int | None = None
    extra: int = 0
    proven: int = 1
    failures: int = 0
    try_from: float = 0.0
    burst_until: float = -1.0
    count: int = field(init=False, default=1)
    """How many run at once, as far as known."""
    limit: int = field(init=False, default=1)
    """How many may be in flight without trying anything."""

    def __post_init__(self) -> None:
        self.agent_slots.members.append(self)
        self.refresh()

    @property
    def is_seen(self) -> bool:
        """Whether the model itself has shown how many it runs."""
        return self.proven > 1 or self.failures > 0

    def refresh(self) -> None:
        """What is known of this model's slots, or assumed of the agent's models, has changed."""
        seen = self.proven if self.is_seen else self.agent_slots.count
        self.count = seen if self.fixed is None else self.fixed
        self.limit = self.count + self.extra

    def fix(self, count: int | None, *, extra: int = 0) -> None:
        """The agent reports how many it runs, or no longer does (`None`)."""
        self.fixed, self.extra = count, extra
        self.refresh()

    def allowance(self, now: float) -> int:
        """How many may be in flight, trials included."""
        if self.fixed is not None or (now < self.try_from and now > self.burst_until):
            return self.limit
        if self.agent_slots.is_settled and not self.is_seen:
            return self.limit
        count = self.count
        return count + 1 if count < 2 else count * 2

    def try_more(self, now: float) -> None:
        """A request was sent beyond what is proven."""
        if now >= self.try_from:
            self.burst_until = now + BURST_SECONDS
            self.try_from = now + TRY_AGAIN_SECONDS

    def remember(self, proven: int, failures: int) -> None:
        """Take over what was seen before."""
        self.proven, self.failures = proven, failures
        self.refresh()
        if proven > 1:
            self.agent_slots.proved(proven)
        if failures:
            self.agent_slots.failed(self)

    def prove(self, count: int) -> None:
        """So many were at work together."""
        if count > self.proven:
            self.proven = count
            self.failures = 0
            self.try_from = 0.0
            self.refresh()
            self.agent_slots.proved(count)

    def refute(self, count: int, now: float) -> None:
        """A request waited although only `count` others were there."""
        self.proven = min(self.count, max(count, 1))
        self.failures += 1
        self.refresh()
        self.agent_slots.failed(self)
        rest = FIRST_REST_SECONDS * 2.0 ** min(self.failures - 1, MOST_DOUBLINGS)
        self.try_from = now + min(rest, LONGEST_REST_SECONDS)
        self.burst_until = -1.0


@dataclass(slots=True, eq=False)
class OwnerUse:
    """Slots of one model on one agent that are held by what is not ours: by its owner, who uses
    Ollama directly, or by a prompt that Ollama goes on reading after its client left.

    `requests` is how many the agent reported, `share` the probability that they use this model.
    `waited` are seconds of a wait that nothing else explains; they count less every second.
    `is_seen`: any of it may count.
    """

    is_seen: bool = False
    requests: int = 0
    share: float = 1.0
    reported_at: float = 0.0
    read_until: float = 0.0
    waited: float = 0.0
    waited_at: float = 0.0

    def reported(self, requests: int, share: float, now: float) -> None:
        """The agent reports so many requests that are not ours."""
        if requests or self.requests:
            self.requests, self.share, self.reported_at = requests, share, now
            self.is_seen = True

    def abandoned(self, until: float) -> None:
        """A client left before the first byte: its prompt is probably read until this time."""
        self.read_until, self.is_seen = until, True

    def answered(self) -> None:
        """A first byte came: no abandoned prompt is being read any more."""
        self.read_until = 0.0

    def made_wait(self, waited: float, now: float) -> None:
        """A request waited so many seconds, of which nothing else explains any."""
        if waited or self.waited:
            self.waited, self.waited_at = (self._learned(now) + waited) / 2, now
            self.is_seen = True

    def wait(self, ours: int, slots: int, service: float, now: float) -> float:
        """The expected wait in seconds of one more request beside so many of ours."""
        reported = self.requests if now - self.reported_at < REPORT_HOLDS_SECONDS else 0
        reading = max(self.read_until - now, 0.0)
        seconds = self._learned(now)
        self.is_seen = bool(reported or reading or seconds)
        if ours + reported + (reading > 0) >= slots:
            seconds = max(seconds, reading, self.share * service if reported else 0.0)
        return seconds

    def _learned(self, now: float) -> float:
        return self.waited * max(1 - (now - self.waited_at) / FORGET_WAIT_SECONDS, 0.0)


class LearnedSlots(Struct, frozen=True):
    """What was seen of a model's slots on an agent; see `Slots`."""

    agent_id: AgentId
    model: str
    proven: int
    failures: int = 0
