"""Uploads that can be skipped, since every agent that may need the file has it already.

Ollama has no download of blobs, and `POST /api/blobs` does not say for which model. So the upload
may be skipped only if every candidate agent has the digest. The agents are asked each time:
nothing is remembered that could be wrong.
"""

from collections.abc import Iterable
from itertools import islice

from ollama_coordinator.agent_queries import AgentQueries, Answer
from ollama_coordinator.clock import Clock
from ollama_coordinator.registry import AgentState
from ollama_coordinator_common.types import AgentId

from .targets import Chosen, Placement, TargetChooser
from .types import MissingBlob

PARALLEL_AGENTS = 32
"""Agents asked at the same time; the next ones only while none lacks the file."""

HEAD_SECONDS = 2.0
"""Time limit of all questions about a file: an Ollama finds it in no time, the client waits."""


class Blobs:
    """Asks agents for files by their digest."""

    def __init__(self, queries: AgentQueries, targets: TargetChooser, clock: Clock) -> None:
        self._clock = clock
        self._queries = queries
        self._targets = targets

    async def suffice(self, digest: str, placement: Placement) -> bool:
        """Whether a model can be created from this file without uploading it.

        An agent that is away has the files that it reported last.
        """
        candidates = self._targets.candidates(placement)
        reachable = self._queries.reachable(candidates)
        ids = {agent.id for agent in reachable}
        lacks = any(agent.id not in ids and not _reported(agent, digest) for agent in candidates)
        return bool(reachable) and not lacks and await self._all_have(digest, reachable)

    async def _all_have(self, digest: str, agents: Iterable[AgentState]) -> bool:
        rest = iter(agents)
        try:
            async with self._clock.timeout(HEAD_SECONDS):
                while asked := list(islice(rest, PARALLEL_AGENTS)):
                    have = await self._ask(digest, asked)
                    if len(have) < len(asked) or not all(have.values()):
                        return False
        except TimeoutError:
            return False
        return True

    async def _ask(self, digest: str, agents: Iterable[AgentState]) -> dict[AgentId, bool]:
        """Whether each agent has the file; without those that do not answer."""
        path = f"/api/blobs/{digest}"
        answers = await self._queries.each(agents, "HEAD", path, seconds=HEAD_SECONDS)
        given = [answer for answer in answers if isinstance(answer, Answer)]
        return {answer.agent.id: answer.status == 200 for answer in given if answer.status < 500}

    async def arrange(self, found: Chosen, digests: Iterable[str], key: str) -> Chosen:
        """As many agents as `found` has chosen, with the files that the coordinator lacks first.

        An agent that has a model with this routing key stays chosen: else it would keep the old
        one.

        Raises:
            MissingBlob: a chosen agent lacks a file, and no other can take its place.
        """
        everybody = [*found.chosen, *found.spare]
        having = {agent.id for agent in everybody}
        lacking: dict[AgentId, str] = {}
        for digest in digests:
            asked = [agent for agent in everybody if agent.id in having]
            have = await self._ask(digest, self._queries.reachable(asked))
            having = {agent_id for agent_id, has in have.items() if has}
            lacking |= {agent_id: digest for agent_id, has in have.items() if not has}
        bound = [a for a in found.chosen if a.id in having or key in a.inventory.available]
        bound_ids = {agent.id for agent in bound}
        others = [agent for agent in everybody if agent.id not in bound_ids]
        others.sort(key=lambda agent: agent.id not in having)
        missing = len(found.chosen) - len(bound)
        chosen = [*bound, *others[:missing]]
        for agent in chosen:
            if agent.id in lacking:
                raise MissingBlob(agent.name, lacking[agent.id])
        return Chosen(chosen, others[missing:])


def _reported(agent: AgentState, digest: str) -> bool:
    """Whether the agent reported a model whose weights are this file."""
    return any(row.blob == digest for row in agent.inventory.available.values())
