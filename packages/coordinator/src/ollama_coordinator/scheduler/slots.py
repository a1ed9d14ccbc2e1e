"""How many requests of one model an agent runs at once: told, or found out by careful trying."""

from dataclasses import dataclass, field

EMBEDDING_EXTRA = 2
"""Embeddings in flight beyond the slot, to hide the round trip."""

TRY_AGAIN_SECONDS = 20.0
FIRST_REST_SECONDS = 60.0
LONGEST_REST_SECONDS = 1800.0
BURST_SECONDS = 0.1

ENOUGH_REFUTED = 2
"""So many models of an agent that run no more than is usual there speak for the others."""

SERIAL_FAMILIES = frozenset(
    {
        "mllama", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "qwen3next", "lfm2", "lfm2moe",
        "nemotron_h", "nemotron_h_moe", "nemotron_h_omni",
    }
)  # fmt: skip
"""Model families that Ollama runs one request at a time, whatever it is configured to."""


@dataclass(slots=True, eq=False)
class Usual:
    """What the models of one agent run at once, as far as they were seen: the setting is for all.

    `refuted`: those that were sent more than `count` in vain since `count` has last changed.
    """

    count: int = 1
    members: "list[Slots]" = field(default_factory=list)
    refuted: "set[Slots]" = field(default_factory=set)

    @property
    def is_settled(self) -> bool:
        """Whether it is pointless to try more with a model of which nothing is known."""
        return len(self.refuted) >= ENOUGH_REFUTED

    def keep(self, members: "set[Slots]") -> None:
        """These are the agent's models now; what others have shown is still believed."""
        self.members = [one for one in self.members if one in members]
        self.refuted &= members

    def proved(self, count: int) -> None:
        """A model was seen to run so many."""
        if count > self.count:
            self._set(count)

    def failed(self, slots: "Slots") -> None:
        """A model was sent one more than it runs; one that is gone tells nothing of the others."""
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
            one.lean()


@dataclass(slots=True, eq=False)
class Slots:
    """The slots of one model on one agent.

    `fixed` is what the agent said. Else `proven` were seen at work together, or what is usual on
    the agent is believed. Beyond them one more is tried, twice as many once two were proven. A
    trial that shows nothing rests for a while, one that fails for longer each time.
    """

    usual: Usual = field(default_factory=Usual)
    fixed: int | None = None
    extra: int = 0
    proven: int = 1
    failures: int = 0
    try_from: float = 0.0
    burst_until: float = -1.0
    limit: int = field(init=False, default=1)
    """How many may be in flight without trying anything."""

    def __post_init__(self) -> None:
        self.usual.members.append(self)
        self.lean()

    @property
    def is_seen(self) -> bool:
        """Whether the model itself has shown how many it runs."""
        return self.proven > 1 or self.failures > 0

    @property
    def count(self) -> int:
        """How many are taken to run at once."""
        if self.fixed is not None:
            return self.fixed
        return self.proven if self.is_seen else self.usual.count

    def lean(self) -> None:
        """What is usual on the agent has changed."""
        self.limit = self.count + self.extra

    def fix(self, count: int | None, *, extra: int = 0) -> None:
        """The agent says how many it runs, or says it no longer."""
        self.fixed, self.extra = count, extra
        self.limit = self.count + extra

    def allowance(self, now: float) -> int:
        """How many may be in flight, trials included."""
        if self.fixed is not None or (now < self.try_from and now > self.burst_until):
            return self.limit
        if self.usual.is_settled and not self.is_seen:
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
        self.lean()
        if proven > 1:
            self.usual.proved(proven)
        if failures:
            self.usual.failed(self)

    def prove(self, count: int) -> None:
        """So many were at work together."""
        if count > self.proven:
            self.proven = count
            self.failures = 0
            self.try_from = 0.0
            self.lean()
            self.usual.proved(count)

    def refute(self, count: int, now: float) -> None:
        """One waited although only `count` others were there."""
        self.proven = min(self.count, max(count, 1))
        self.failures += 1
        self.lean()
        self.usual.failed(self)
        rest = FIRST_REST_SECONDS * 2.0 ** min(self.failures - 1, 10)
        self.try_from = now + min(rest, LONGEST_REST_SECONDS)
        self.burst_until = -1.0
