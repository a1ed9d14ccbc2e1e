"""Requests, leases and outcomes, and the runner options that a loaded model must have."""

from collections.abc import Iterable, Mapping, Set
from enum import Enum
from typing import NewType

from msgspec import Struct, structs

from ollama_coordinator_common.types import AgentId


class PlainEnum(Enum):
    """An enum whose members are hashed by identity: `Enum` hashes names, in Python."""

    __hash__ = object.__hash__


RequestId = NewType("RequestId", str)
LeaseId = NewType("LeaseId", int)


class Kind(PlainEnum):
    """What a request asks of a model."""

    CHAT = "chat"
    GENERATE = "generate"
    EMBED = "embed"


class Form(PlainEnum):
    """How an answer reaches its receiver, as the request asks for it.

    A plain stream is read along while it is written. Every other form is of use only when it is
    whole: an answer in one piece, calls of tools, structured output.
    """

    STREAM = "stream"
    WHOLE = "whole"
    TOOLS = "tools"
    FORMAT = "format"


PACE_TOKENS_PER_SECOND = 15.0
"""How fast a stream is read along: some 650 English words a minute, which is skimming."""


class Lane(PlainEnum):
    """How long a request may wait before it is late; shorter budgets go first."""

    INTERACTIVE = "interactive"
    BATCH = "batch"
    EMBEDDING = "embedding"


class RunnerOptions(Struct, frozen=True):
    """The options that decide whether a loaded runner can serve a request or must be reloaded.

    Field names are Ollama's (`options`); `None` is absent, which matches a runner that was loaded
    automatically too. Sampling options never reload.
    """

    num_ctx: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    use_mmap: bool | None = None
    num_thread: int | None = None
    draft_num_predict: int | None = None
    shift: bool | None = None


NO_OPTIONS = RunnerOptions()


class Request(Struct, frozen=True, kw_only=True):
    """One request as the scheduler sees it; times are monotonic seconds.

    `model` is the routing key, `name` what the client wrote. `prompt_tokens` is an estimate.
    `prefix` are hashes of the conversation's messages, oldest first, each over all before it.
    `weight` is its client's share of a contended model, `key` the name of its key, for the history.
    `output_limit` is the client's own bound on the answer in tokens, `pace` the tokens a second at
    which a stream is read along, `lane_reason` why it is in a lane that it did not ask for.
    `larger`: a runner with a larger context than `options` ask for may serve it. `admitted`: it
    had a lease before, so that a full queue does not refuse it. After `deadline` the client no
    longer wants to wait for a lease. `excluded` are agents that were tried already, or cannot serve
    it: `unfit` says why. From `taken_back` of them it was taken back. `alias` is the name that the
    client wrote, where it stands for `model`.
    """

    id: RequestId
    model: str
    name: str
    arrived_at: float
    kind: Kind = Kind.CHAT
    lane: Lane = Lane.INTERACTIVE
    lane_reason: str = ""
    form: Form = Form.STREAM
    pace: float = PACE_TOKENS_PER_SECOND
    client: str = ""
    weight: float = 1.0
    key: str = ""
    prompt_tokens: int = 0
    prefix: tuple[int, ...] = ()
    output_limit: int | None = None
    options: RunnerOptions = NO_OPTIONS
    larger: bool = False
    load_only: bool = False
    admitted: bool = False
    deadline: float | None = None
    excluded: frozenset[AgentId] = frozenset()
    unfit: Mapping[AgentId, str] = {}
    taken_back: int = 0
    alias: str = ""
    wakes: bool = True

    @property
    def is_retry(self) -> bool:
        """Whether an agent failed it."""
        return len(self.excluded) > len(self.unfit)

    def without(self, agents: Iterable[AgentId]) -> "Request":
        """The same request after these agents failed it."""
        return structs.replace(self, excluded=self.excluded | frozenset(agents))

    def taken_from(self, agent: AgentId) -> "Request":
        """The same request, taken back from this agent, as another one serves it sooner."""
        return structs.replace(self.without([agent]), taken_back=self.taken_back + 1)

    def unfit_for(self, reasons: Mapping[AgentId, str]) -> "Request":
        """The same request, which these agents cannot serve, and why."""
        unfit = {**self.unfit, **reasons}
        return structs.replace(self, excluded=self.excluded | frozenset(reasons), unfit=unfit)

    def fit_for(self, agents: Set[AgentId]) -> "Request":
        """The same request, which these agents may be asked after all."""
        unfit = {agent: reason for agent, reason in self.unfit.items() if agent not in agents}
        return structs.replace(self, excluded=self.excluded - agents, unfit=unfit)


class Lease(Struct, frozen=True, kw_only=True):
    """One attempt's place on one agent, from its grant until its end; every count derives from it.

    `unload` are routing keys of models that the agent should unload first, so that this one fits.
    """

    id: LeaseId
    request: Request
    agent_id: AgentId
    granted_at: float
    unload: tuple[str, ...] = ()


class Timings(Struct, frozen=True):
    """What Ollama's last record says of a request, in seconds and tokens.

    Where the dialect has no durations (`/v1/…`), the seconds are `None` and only tokens are known.
    """

    prompt_tokens: int = 0
    output_tokens: int = 0
    total_seconds: float | None = None
    load_seconds: float | None = None
    prompt_seconds: float | None = None
    output_seconds: float | None = None


class Result(Enum):
    """How an attempt ended."""

    SERVED = "served"
    """Answered."""
    REJECTED = "rejected"
    """Answered with an error of the request's own making: it shows nothing of the agent."""
    ERRORED = "errored"
    """Answered, with an error at the end that says nothing against the agent."""
    CANCELLED = "cancelled"
    """The client left."""
    TAKEN_BACK = "taken back"
    """Another agent serves it sooner; the client had seen nothing."""
    UNREACHABLE = "unreachable"
    """Refused, reset, timed out or silent: the agent leaves rotation."""
    CUT = "cut"
    """Ended in the middle of the answer."""
    BUSY = "busy"
    """The agent answered that it is full."""
    MODEL_FAILED = "model failed"
    """The agent could not load or run the model."""
    MODEL_MISSING = "model missing"
    """The agent does not have the model it was listed with."""


class Outcome(Struct, frozen=True):
    """How an attempt ended, why, and what can be learned from it.

    `died`: the connection or the runner was lost while the request ran. `asked`: how often it went
    out there; 0 where there was no connection, or somebody else found that the agent is lost.
    """

    result: Result
    reason: str = ""
    timings: Timings | None = None
    died: bool = False
    asked: int = 1


# Ollama's own: it raises a smaller `num_ctx`, and takes this `num_batch` where none is given:
SMALLEST_CONTEXT = 4
DEFAULT_BATCH = 512


def normal(options: RunnerOptions) -> RunnerOptions:
    """The same options with every value that Ollama treats as its default left out."""
    if options == NO_OPTIONS:
        return NO_OPTIONS
    context = options.num_ctx or None
    return structs.replace(
        options,
        num_ctx=max(context, SMALLEST_CONTEXT) if context else None,
        num_batch=None if options.num_batch in (0, DEFAULT_BATCH) else options.num_batch,
        num_gpu=None if (options.num_gpu or 0) < 0 else options.num_gpu,
        main_gpu=options.main_gpu or None,
        num_thread=options.num_thread or None,
        draft_num_predict=options.draft_num_predict or None,
        shift=None if options.shift else options.shift,
    )


def serves(
    loaded: RunnerOptions | None,
    wanted: RunnerOptions,
    *,
    context: int | None = None,
    default_context: int | None = None,
    larger: bool = False,
) -> bool:
    """Whether a runner loaded with `loaded` takes a request that wants `wanted`, both normal.

    `loaded` is `None` when somebody else loaded it: it is then assumed to have been loaded without
    options but the `context` that Ollama lists. `default_context` is the agent's own. `larger`: one
    with a larger context takes it too.
    """
    if loaded is wanted:
        return True
    if loaded is None:
        loaded = NO_OPTIONS
        default_context = context or default_context
    has = loaded.num_ctx or default_context
    wants = wanted.num_ctx or default_context
    enough = has == wants or (larger and (has or 0) > (wants or has or 0))
    if loaded.num_ctx != wanted.num_ctx and not enough:
        return False
    if wanted.num_gpu is not None and wanted.num_gpu != loaded.num_gpu:
        return False
    return structs.replace(loaded, num_ctx=None, num_gpu=None) == structs.replace(
        wanted, num_ctx=None, num_gpu=None
    )
