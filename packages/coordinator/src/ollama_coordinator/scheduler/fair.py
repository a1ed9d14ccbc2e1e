"""Start-time fair queueing between the clients of one line, over predicted work."""

from dataclasses import dataclass, field

MOST_TAGS = 1024

Tag = tuple[float, float, int]
"""The order in a lane: a start in virtual time, then the arrival, then the number."""


@dataclass(slots=True)
class FairClock:
    """Start-time fair queueing: a client's next request starts where its last one finished."""

    virtual: float = 0.0
    finished: dict[str, float] = field(default_factory=dict)

    def start(self, client: str, work: float, weight: float) -> float:
        """The start tag of one more request of this client."""
        start = max(self.virtual, self.finished.get(client, 0.0))
        self.finished[client] = start + work / weight
        return start

    def give_back(self, client: str, work: float) -> None:
        """A request of this client left without being served; `work` as weighted as it was."""
        if client in self.finished:
            self.finished[client] -= work

    def serve(self, start: float) -> None:
        """The request with this tag is being served; who has caught up needs no memory."""
        self.virtual = max(self.virtual, start)
        if len(self.finished) > MOST_TAGS:
            now = self.virtual
            self.finished = {client: end for client, end in self.finished.items() if end > now}
