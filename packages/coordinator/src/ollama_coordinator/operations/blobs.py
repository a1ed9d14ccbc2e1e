"""Files that need not be uploaded, since the agents on which a model is created have them already.

One Ollama keeps a file as long as a model is made of it, and says so when it is asked. Here the
agents keep it, and the fleet has it only where *every* agent that needs it does: no agent gives a
file away again. So they are asked, each time; nothing is remembered that could be wrong.
"""

import asyncio
from collections.abc import Iterable, Sequence
from itertools import islice

from ollama_coordinator.asking import Answer, Asking
from ollama_coordinator.registry import AgentState
from ollama_coordinator_common.types import AgentId

from .choosing import Choosing
from .placement import Placement, Places, Rule

AT_ONCE = 32
PATIENCE_SECONDS = 2.0
"""An Ollama looks a file up in no time; one that does not answer shall not hold up an upload."""


class Blobs:
    """Asks agents for files by their digest."""

    def __init__(self, asking: Asking, choosing: Choosing) -> None:
        self._asking = asking
        self._choosing = choosing

    async def suffice(self, digest: str, placement: Placement) -> bool:
        """Whether a model can be created from this file with no upload of it.

        Of agents that are away it counts what they last reported.
        """
        meant = self._choosing.meant(placement)
        there = self._asking.reachable(meant)
        if placement.rule is Rule.COUNT:
            return bool(there) and await self._enough(digest, there, placement.count)
        lack = any(agent not in there and not _reported(agent, digest) for agent in meant)
        return bool(there) and not lack and await self._enough(digest, there, len(there))

    async def _enough(self, digest: str, agents: Sequence[AgentState], wanted: int) -> bool:
        """Whether at least so many of the agents have it; asks no more of them than it must."""
        wanted = min(wanted, len(agents))
        held, left = 0, len(agents)
        rest = iter(agents)
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while held < wanted <= held + left:
                    asked = list(islice(rest, AT_ONCE))
                    left -= len(asked)
                    held += len(await self._holders(digest, asked))
        except TimeoutError:
            return False
        return held >= wanted

    async def _holders(self, digest: str, agents: Iterable[AgentState]) -> set[AgentId]:
        answers = await self._asking.each(agents, "HEAD", f"/api/blobs/{digest}")
        given = (answer for answer in answers if isinstance(answer, Answer))
        return {answer.agent.id for answer in given if answer.status == 200}

    async def preferring(self, found: Places, digests: Iterable[str], key: str) -> Places:
        """The same number of places, on agents that have the files as far as there are any.

        An agent that has a model of this name stays chosen: it would be left with the old one.
        """
        having = {agent.id for agent in (*found.chosen, *found.spare)}
        for digest in digests:
            everybody = [agent for agent in (*found.chosen, *found.spare) if agent.id in having]
            having &= await self._holders(digest, everybody)
        bound = [a for a in found.chosen if a.id in having or key in a.inventory.available]
        others = [a for a in (*found.chosen, *found.spare) if a not in bound]
        others.sort(key=lambda agent: agent.id not in having)
        missing = len(found.chosen) - len(bound)
        return Places([*bound, *others[:missing]], others[missing:])


def _reported(agent: AgentState, digest: str) -> bool:
    """Whether an agent reported a model that has this file for its weights."""
    return any(row.blob == digest for row in agent.inventory.available.values())
