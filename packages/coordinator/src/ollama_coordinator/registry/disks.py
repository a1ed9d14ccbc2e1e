"""Which agents report the same machine id, as those of one machine and copies of its disk do."""

from collections import defaultdict

from ollama_coordinator_common.types import AgentId


class Disks:
    """The agents by machine id; those without one are alike in nothing."""

    def __init__(self) -> None:
        self._agents: defaultdict[str, set[AgentId]] = defaultdict(set)

    def __len__(self) -> int:
        return len(self._agents)

    def add(self, machine_id: str | None, agent_id: AgentId) -> None:
        """An agent reports this id."""
        if machine_id is not None:
            self._agents[machine_id].add(agent_id)

    def discard(self, machine_id: str | None, agent_id: AgentId) -> None:
        """An agent is gone, or reports another id."""
        if machine_id is None or machine_id not in self._agents:
            return
        self._agents[machine_id].discard(agent_id)
        if not self._agents[machine_id]:
            del self._agents[machine_id]

    def others(self, machine_id: str | None, agent_id: AgentId) -> set[AgentId]:
        """The other agents with the id of this one."""
        if machine_id is None or machine_id not in self._agents:
            return set()
        return self._agents[machine_id] - {agent_id}
