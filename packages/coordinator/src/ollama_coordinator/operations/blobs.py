"""Files that need not be uploaded, since the agents on which a model is created have them already.

One Ollama keeps a file as long as a model is made of it, and says so when it is asked. Here the
agents keep it, and the fleet has it only where *every* agent that may need it does: no agent gives
a file away again, and what the model will be called, so who has one of that name, is told after
the upload. So they are asked, each time; nothing is remembered that could be wrong.
"""

import asyncio
from collections.abc import Iterable
from itertools import islice

from ollama_coordinator.agent_queries import AgentQueries, Answer
from ollama_coordinator.registry import AgentState
from ollama_coordinator_common.types import AgentId

from .targets import Chosen, Placement, TargetChooser
from .types import Lacking

AT_ONCE = 32
PATIENCE_SECONDS = 2.0
"""An Ollama looks a file up in no time; one that does not answer shall not hold up an upload."""


class Blobs:
    """Asks agents for files by their digest."""

    def __init__(self, asking: AgentQueries, targets: TargetChooser) -> None:
        self._asking = asking
        self._targets = targets

    async def suffice(self, digest: str, placement: Placement) -> bool:
        """Whether a model can be created from this file with no upload of it.

        Of agents that are away it counts what they last reported.
        """
        meant = self._targets.concerned(placement)
        there = self._asking.reachable(meant)
        ids = {agent.id for agent in there}
        lack = any(agent.id not in ids and not _reported(agent, digest) for agent in meant)
        return bool(there) and not lack and await self._everywhere(digest, there)

    async def _everywhere(self, digest: str, agents: Iterable[AgentState]) -> bool:
        """Whether all of the agents have it; asks no more of them than it must."""
        rest = iter(agents)
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while asked := list(islice(rest, AT_ONCE)):
                    said = await self._ask(digest, asked)
                    if len(said) < len(asked) or not all(said.values()):
                        return False
        except TimeoutError:
            return False
        return True

    async def _ask(self, digest: str, agents: Iterable[AgentState]) -> dict[AgentId, bool]:
        """Which agents have it and which do not; those that do not say are not among them."""
        path = f"/api/blobs/{digest}"
        answers = await self._asking.each(agents, "HEAD", path, seconds=PATIENCE_SECONDS)
        given = [answer for answer in answers if isinstance(answer, Answer)]
        return {answer.agent.id: answer.status == 200 for answer in given if answer.status < 500}

    async def arrange(self, found: Chosen, digests: Iterable[str], key: str) -> Chosen:
        """The same number of places, on agents that have files that cannot be handed over.

        An agent that has a model of this name stays chosen: it would be left with the old one.

        Raises:
            Lacking: one of them has not got a file, and no other can take its place.
        """
        everybody = [*found.chosen, *found.spare]
        having = {agent.id for agent in everybody}
        lacking: dict[AgentId, str] = {}
        for digest in digests:
            asked = [agent for agent in everybody if agent.id in having]
            said = await self._ask(digest, self._asking.reachable(asked))
            having = {agent_id for agent_id, has in said.items() if has}
            lacking |= {agent_id: digest for agent_id, has in said.items() if not has}
        bound = [a for a in found.chosen if a.id in having or key in a.inventory.available]
        kept = {agent.id for agent in bound}
        others = [agent for agent in everybody if agent.id not in kept]
        others.sort(key=lambda agent: agent.id not in having)
        missing = len(found.chosen) - len(bound)
        chosen = [*bound, *others[:missing]]
        for agent in chosen:
            if agent.id in lacking:
                raise Lacking(agent.name, lacking[agent.id])
        return Chosen(chosen, others[missing:])


def _reported(agent: AgentState, digest: str) -> bool:
    """Whether an agent reported a model that has this file for its weights."""
    return any(row.blob == digest for row in agent.inventory.available.values())
