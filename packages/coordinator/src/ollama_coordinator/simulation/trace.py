"""A recorded load: what arrived when, so that it can be played again under any policy."""

from collections.abc import Iterable
from operator import attrgetter

import msgspec
from msgspec import Struct

from ollama_coordinator.scheduler.types import (
    NO_OPTIONS,
    Form,
    Kind,
    Lane,
    Request,
    RequestId,
    RunnerOptions,
)
from ollama_coordinator_common.names import model_key


class TraceRequest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request of a trace: `at` seconds from its start, and how long its answer was."""

    at: float
    model: str
    client: str = ""
    kind: Kind = Kind.CHAT
    lane: Lane = Lane.INTERACTIVE
    form: Form = Form.STREAM
    prompt_tokens: int = 0
    output_tokens: int = 0
    output_limit: int | None = None
    prefix: tuple[int, ...] = ()
    options: RunnerOptions = NO_OPTIONS
    deadline_seconds: float | None = None

    def arrive(self, request_id: str) -> Request:
        """The request as the scheduler sees it, at its time."""
        late = self.deadline_seconds
        return Request(
            id=RequestId(request_id),
            model=model_key(self.model),
            name=self.model,
            arrived_at=self.at,
            kind=self.kind,
            lane=self.lane,
            form=self.form,
            client=self.client,
            prompt_tokens=self.prompt_tokens,
            prefix=self.prefix,
            output_limit=self.output_limit,
            options=self.options,
            deadline=None if late is None else self.at + late,
        )


_decoder = msgspec.json.Decoder(TraceRequest)


def read_trace(lines: Iterable[bytes | str]) -> list[TraceRequest]:
    """A trace from JSON lines, in order of time.

    Raises:
        msgspec.DecodeError: a line is not a request.
    """
    return sorted((_decoder.decode(line) for line in lines if line.strip()), key=attrgetter("at"))


def write_trace(trace: Iterable[TraceRequest]) -> bytes:
    """The JSON lines of a trace."""
    return b"".join(msgspec.json.encode(request) + b"\n" for request in trace)
