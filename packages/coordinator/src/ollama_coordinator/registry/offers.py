"""Models that ollama.com runs, asked for by name although no agent has pulled them.

An Ollama that may use its cloud needs no stub of such a model: the name is enough. The last names
that were asked for are remembered, with the agents that can pass them on.
"""

from collections import OrderedDict
from collections.abc import Iterable

from ollama_coordinator_common.types import AgentId, AvailableModel

from .agent import AgentState
from .inventory import AvailableRow

MOST = 100
CLOUD = "https://ollama.com:443"


class Offers:
    """Which agents were offered for which name; what an agent is offered for is in its inventory.

    It never holds more than `MOST` names: clients ask for any.
    """

    def __init__(self) -> None:
        self._offered: OrderedDict[str, frozenset[AgentId]] = OrderedDict()

    def make(
        self, key: str, name: str, ids: Iterable[AgentId], agents: Iterable[AgentState]
    ) -> bool:
        """Offer these of all agents for a name, and no others; whether anything changed."""
        wanted = frozenset(ids)
        known = self._offered.get(key)
        if wanted or known is not None:
            self._offered[key] = wanted
            self._offered.move_to_end(key)
        if (known or frozenset()) == wanted:
            return False
        row = AvailableRow(key, AvailableModel(name, remote_host=CLOUD), b"")
        oldest = next(iter(self._offered)) if len(self._offered) > MOST else None
        for agent in agents:
            offered = agent.inventory.offered
            if agent.id in wanted:
                offered[key] = row
            else:
                offered.pop(key, None)
            if oldest is not None:
                offered.pop(oldest, None)
        if oldest is not None:
            del self._offered[oldest]
        return True

    def withdraw(self, key: str, agent: AgentState) -> None:
        """An agent could not pass the name on after all."""
        agent.inventory.offered.pop(key, None)
        # A removed agent may answer later than its offer was forgotten.
        if key in self._offered:
            self._offered[key] -= {agent.id}

    def of(self, key: str) -> frozenset[AgentId]:
        """The agents that were offered for a name, some of them perhaps removed since."""
        return self._offered.get(key, frozenset())
