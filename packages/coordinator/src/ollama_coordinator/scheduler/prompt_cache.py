"""Which conversations an agent has in its prompt cache, as hashes of their prefixes.

A saving in the cost, never a pin: a runner keeps about one conversation per slot, and so the oldest
is forgotten here too.
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from math import exp2
from typing import NamedTuple

MOST_CONVERSATIONS = 64  # no runner has more slots; an agent may report any number
LONGEST_CHAIN = 128  # the newest messages that are looked for: an older beginning rarely decides

# How fast it is doubted that a conversation goes on: half after two of its pauses, or of these,
# as a program of a second's pauses may run its tests in between.
SHORTEST_PAUSE_SECONDS = 15.0
OVER_SECONDS = 600.0  # a conversation silent for so long is taken for one that has ended

Chain = tuple[int, ...]


class Conversation(NamedTuple):
    """One in the cache: its chain, its tokens, when it was last read, the mean of its pauses.

    `pause` is in seconds, from an answer to the next request; `None` of one that has had none.
    """

    chain: Chain
    tokens: int
    at: float
    pause: float | None

    def goes_on(self, now: float) -> float:
        """The probability that it does."""
        if self.pause is None:
            return 0.0
        return exp2((self.at - now) / (2 * max(self.pause, SHORTEST_PAUSE_SECONDS)))


CacheHits = Mapping[Hashable, int] | None
"""Prompt tokens expected in the cache, by place."""


class PromptCaches:
    """Prefix hashes, each with the tokens it has for the places that saw it.

    A prefix that a place holds in several chains is counted once for each further one.
    """

    def __init__(self) -> None:
        self._index: dict[int, dict[Hashable, int]] = {}
        self._further: Counter[tuple[int, Hashable]] = Counter()
        self._held: dict[Hashable, OrderedDict[int, Conversation]] = {}

    def __len__(self) -> int:
        return len(self._index) + len(self._further)

    def expected(self, prefix: Chain) -> Mapping[Hashable, int]:
        """The tokens of a prompt with this chain that each place is expected to have cached."""
        found: dict[Hashable, int] = {}
        for link in reversed(prefix[-LONGEST_CHAIN:]):
            seen = self._index.get(link)
            if seen and len(seen) > len(found):  # a place with this link has those before it
                found = {**seen, **found} if found else seen
        return found

    def remember(
        self, place: Hashable, prefix: Chain, tokens: int, slots: int, *, arrived: float, now: float
    ) -> None:
        """The place has just read a prompt of so many tokens, of a request that came then."""
        if not prefix:
            return
        chain = prefix[-LONGEST_CHAIN:]
        held = self._held.setdefault(place, OrderedDict())
        self._add(place, chain, tokens)
        pause: float | None = None
        for link in chain:  # the conversation goes on: it replaces its earlier self
            if (earlier := held.pop(link, None)) is not None:
                self._remove(place, earlier.chain)
                newest = max(arrived - earlier.at, 0.0)
                pause = newest if earlier.pause is None else (earlier.pause + newest) / 2
        held[chain[-1]] = Conversation(chain, tokens, now, pause)
        while len(held) > min(max(slots, 1), MOST_CONVERSATIONS):
            self._remove(place, held.popitem(last=False)[1].chain)

    def under_way(self, place: Hashable, now: float) -> Iterator[Conversation]:
        """The conversations in the cache of that place that may go on, the newest first."""
        for one in reversed(self._held.get(place, {}).values()):
            if now - one.at > OVER_SECONDS:
                return
            if one.pause is not None:
                yield one

    def forget(self, place: Hashable) -> None:
        """The model left the memory of that place."""
        for one in self._held.pop(place, OrderedDict()).values():
            self._remove(place, one.chain)

    def _add(self, place: Hashable, chain: Chain, tokens: int) -> None:
        for index, link in enumerate(chain):
            seen = self._index.setdefault(link, {})
            known = seen.get(place)
            if known is not None:
                self._further[link, place] += 1
            seen[place] = max(known or 0, tokens * (index + 1) // len(chain))

    def _remove(self, place: Hashable, chain: Chain) -> None:
        for link in chain:
            seen = self._index[link]
            if (further := self._further.get((link, place), 0)) > 1:
                self._further[link, place] = further - 1
            elif further:
                del self._further[link, place]
            else:
                del seen[place]
            if not seen:
                del self._index[link]
