"""Requests that come: the line each belongs to, its turn there, and what is expected of it."""

from collections.abc import Mapping
from itertools import count

from ollama_coordinator.registry import Registry

from .eligibility import eligible, unavailable
from .learning import Lengths
from .line import Entry, Line
from .lines import Lines
from .options import normal
from .types import Kind, Request


class Arrivals:
    """Makes entries of requests. `weights` as in `PredictedScheduler`."""

    def __init__(
        self, registry: Registry, lines: Lines, lengths: Lengths, weights: Mapping[str, float]
    ) -> None:
        self._registry = registry
        self._lines = lines
        self._lengths = lengths
        self._weights = weights
        self._numbers = count(1)

    def line(self, request: Request, now: float) -> Line:
        """The line of a request, made for models that somebody has and for no others.

        Raises:
            ModelNotFound, NoAgentRegistered, HoldersUnavailable: nobody has the model.
        """
        options = normal(request.options)
        if (request.model, options) not in self._lines and not self._registry.servers(
            request.model
        ):
            found = eligible(self._registry, request, now)
            raise unavailable(self._registry, request, found, now)
        line = self._lines.get(request, options, now)
        self._lines.refresh(line, now)
        return line

    def entry(self, request: Request, line: Line) -> Entry:
        """The request with its turn, which its client is charged for.

        A retry was charged when it came first, and goes before those that have waited less.
        """
        output = self.expected_output(request)
        work = request.prompt_tokens / 10 + output + 1.0
        weight = self._weights.get(request.client, 1.0)
        clock, retry = line.clock, bool(request.excluded)
        start = clock.virtual if retry else clock.start(request.client, work, weight)
        tag = (start, request.arrived_at, next(self._numbers))
        charged = 0.0 if retry else work / weight
        return Entry(request, tag, line, output, charged)

    def expected_output(self, request: Request) -> float:
        """The tokens of its answer."""
        if request.load_only or request.kind is Kind.EMBED:
            return 0.0
        return self._lengths.expected(request.client, request.model, request.output_limit)
