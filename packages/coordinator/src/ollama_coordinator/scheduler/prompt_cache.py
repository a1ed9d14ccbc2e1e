"""Which conversations an agent has in its prompt cache, as hashes of their prefixes.

A saving in the cost, never a pin: a runner keeps about one conversation per slot, and so the oldest
is forgotten here too.
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Mapping

MOST_CONVERSATIONS = 64  # no runner has more slots; an agent may report any number
LONGEST_CHAIN = 128  # the newest messages that are looked for: an older beginning rarely decides

Chain = tuple[int, ...]

CacheHits = Mapping[Hashable, int] | None
"""Prompt tokens expected in the cache, by place."""


class PromptCaches:
    """Prefix hashes, each with the tokens it has for the places that saw it.

    A prefix that a place holds in several chains is counted once for each further one.
    """

    def __init__(self) -> None:
        self._index: dict[int, dict[Hashable, int]] = {}
        self._further: Counter[tuple[int, Hashable]] = Counter()
        self._chains: dict[Hashable, OrderedDict[int, Chain]] = {}

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

    def remember(self, place: Hashable, prefix: Chain, tokens: int, slots: int) -> None:
        """The place has just read a prompt of so many tokens."""
        if not prefix:
            return
        chain = prefix[-LONGEST_CHAIN:]
        chains = self._chains.setdefault(place, OrderedDict())
        self._add(place, chain, tokens)
        for link in chain:  # the conversation goes on: it replaces its earlier self
            if (earlier := chains.pop(link, None)) is not None:
                self._remove(place, earlier)
        chains[chain[-1]] = chain
        while len(chains) > min(max(slots, 1), MOST_CONVERSATIONS):
            self._remove(place, chains.popitem(last=False)[1])

    def forget(self, place: Hashable) -> None:
        """The model left the memory of that place."""
        for chain in self._chains.pop(place, OrderedDict()).values():
            self._remove(place, chain)

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
