"""The rule for retries: which answers are the request's own fault, and which requests are poison.

Only before the client has seen a byte. What Ollama says of the request itself would be the same
everywhere and is passed on; every other answer is the agent's until another agent says the same.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from hashlib import sha256

from msgspec import Struct

from ollama_coordinator.api.http.json_edit import Body
from ollama_coordinator.dispatch import Held
from ollama_coordinator.registry import AgentState
from ollama_coordinator.scheduler import Outcome, Request, Result
from ollama_coordinator_common.types import AgentId

Lists = Callable[[str], bool | None]
"""Whether the listing of another holder has a capability; `None` where no listing says."""


def _any_of(*texts: str) -> re.Pattern[str]:
    return re.compile("|".join(texts), re.IGNORECASE)


OF_THE_REQUEST = _any_of(
    # Go's decoders of JSON, numbers, durations, base64 and forms
    r"^invalid character ", r"^json: ", r"^unexpected end of JSON",
    r"cannot unmarshal ", r"^missing request body", r"^time: ", r"^strconv\.", r"illegal base64",
    r"multipart", r"Content-Type isn't", r"^zstd: ", r"decompress",
    # fields and their values
    r" (?:is|are) required", r"missing required ",
    r"must be (?:a|an|of|one|between|positive|set)\b",
    r"^invalid (?:model name|option|think|reasoning|format|input|message|image|base64|tool|type"
    r"|value|stop|role|json|duration|request|schema|options|parameter)", r"^Invalid value for ",
    r"^unsupported (?:type|value|role|image)", r"^unknown (?:content|input item|parameter|field)",
    r"is too short - ", r"not currently supported", r"^raw mode does not support",
    r"only supports one image", r"^use either ", r"^(?:name|source|destination) .* is invalid",
    r"^(?:content|input|output)\[?\d*\]?(?: must|:) ",
    r"audio file is empty", r"not supported for this model", r"insert is not supported",
    # what does not fit
    r"context (?:length|size|window)", r"prompt (?:is )?too long", r"input (?:is )?too long",
    # grammars and schemas
    r"(?:parse|compile|invalid|initialize) (?:the )?grammar", r"JSON schema",
)  # fmt: skip
"""Ollama's 400s (v0.5 to v0.33) that speak of the request. A text that is not here is tried on each
holder once; one too many here, and a broken machine keeps its requests."""

TOO_SMALL_HERE = _any_of(r"prompt is longer than the context length currently available")
"""Ollama's 400 for a prompt that does not fit the runner here; another machine's may be larger."""

WRONG_OPTION = _any_of(
    r"\boption \S+ must be of ", r"^invalid format: ", r"^invalid JSON schema in format",
    r"^json: cannot unmarshal ", r"^unknown type loading config params",
)  # fmt: skip
"""The same with another status: Ollama answers 500 for an option of a wrong type."""

OF_THE_MODEL = _any_of(r"parsing tool call", r"invalid tool call arguments", r"token repeat limit")
"""What a model wrote cannot be read. In mid-stream that says nothing against its machine."""

LACKS = re.compile(r"does not support (\w+)")
BASIC = ("generate", "chat", "completion")
COMPLETION = "completion"
"""Ollama's words in errors, and that in its listings, for what every model but an embedding one
can. It also says so of a model whose file is missing."""

BUSY = (429, 499, 502, 503, 504)

DIED = _any_of(
    r"unexpectedly stopped", r"process has terminated", r"process no longer running",
    r"\bEOF\b", r"connection reset", r"forcibly closed", r"broken pipe", r"signal: ",
)  # fmt: skip
"""Texts of an Ollama whose runner was lost while a request ran."""

SAME = re.compile(r"0x[0-9a-f]+|[0-9a-f]{12,}|[/\\][^\s\"']+|\d+", re.IGNORECASE)
"""What differs between two machines that say the same: addresses, digests, paths, numbers."""


def judge(
    status: int, body: bytes, *, of_cloud: bool = False, lists: Lists = lambda _: None
) -> Outcome | None:
    """Why another agent should be asked in place of passing this answer on; `None`: pass it on.

    `body` is the whole body of an answer with an error status. `of_cloud`: ollama.com runs the
    model, and says itself who may use it.
    """
    text = error_text(body)
    told = f"answered {status}: {text}" if text else f"answered {status} with no text"
    if TOO_SMALL_HERE.search(text):
        return Outcome(Result.REJECTED, told)
    if status == 403 and not body.strip():
        # Ollama's Host check: it is bound to loopback and does not take our name for it.
        return Outcome(Result.UNREACHABLE, f"{told}; set OLLAMA_HOST=0.0.0.0 on that machine")
    if is_of_the_request(status, text, of_cloud=of_cloud, lists=lists):
        return None
    if status == 404 and body.startswith(b"404 page not found"):
        return Outcome(Result.BUSY, "its Ollama is too old for this route")
    if status == 404 and "not found" in text:
        return Outcome(Result.MODEL_MISSING, told)
    died = status >= 400 and DIED.search(text) is not None
    return Outcome(Result.BUSY if status in BUSY else Result.MODEL_FAILED, told, died=died)


def is_of_the_request(status: int, text: str, *, of_cloud: bool, lists: Lists) -> bool:
    """Whether an error is known to be the request's own fault."""
    if status in (401, 403) and (of_cloud or text.startswith("ollama cloud is disabled")):
        return True
    if status != 400:
        return WRONG_OPTION.search(text) is not None
    if lacks := LACKS.search(text):
        return lacks[1] not in BASIC or lists(COMPLETION) is False
    return DIED.search(text) is None and OF_THE_REQUEST.search(text) is not None


def says_nothing_of_the_machine(text: str) -> bool:
    """Whether an error in mid-stream is the request's or the model's own."""
    return any(kind.search(text) for kind in (WRONG_OPTION, OF_THE_MODEL))


ERROR_BYTES = 64 * 1024
"""Of an error of Ollama's, which may repeat a name of the request's."""


def error_text(body: bytes) -> str:
    """The sentence in an error body of any dialect; the body itself where it is not JSON."""
    try:
        value = json.loads(body if len(body) <= ERROR_BYTES else b"")
    except (ValueError, RecursionError):
        return body.decode(errors="replace").strip()[:500]
    error = value.get("error") if isinstance(value, dict) else None
    if isinstance(error, dict):
        error = error.get("message")
    return error if isinstance(error, str) else ""


def say_the_same(one: Outcome, other: Outcome) -> bool:
    """Whether two agents failed in the same words, but for what differs between machines."""
    return SAME.sub("#", one.reason) == SAME.sub("#", other.reason)


# ── poison ────────────────────────────────────────────────────────────────────────────────────

MOST_DEATHS = 2
"""One death may be the agent's; of two healthy agents the request is the common cause."""

SUSPECT_SECONDS = 300.0
"""A client repeats for some minutes; afterwards the model or Ollama may be another version."""

MOST_SUSPECTS = 256
"""Requests that are remembered; each needs a machine to die for it, so that more are an outage."""


class Suspect(Struct):
    """A request under which agents died: which healthy ones, which that had never answered, and
    until when it is remembered.

    One crash of an agent ends every request that runs there, so that copies of a request on one
    agent are one death.
    """

    agents: set[AgentId] = set()
    unproven: dict[AgentId, AgentState] = {}
    until: float = 0.0


WasWell = Callable[[AgentState, str], Awaitable[bool]]
"""Whether an agent that never answered was well until it died under a request for this model."""


class Poison:
    """Requests that killed healthy agents, by model and hash of the body."""

    def __init__(self, was_well: WasWell) -> None:
        self._was_well = was_well
        self._suspects: OrderedDict[tuple[str, bytes], Suspect] = OrderedDict()

    async def stops(self, request: Request, body: Body, held: Held, now: float) -> bool:
        """Note how an attempt ended; whether its request may be tried nowhere else.

        A death counts only if the agent's last answer before the attempt was good. One that never
        answered well may be broken: it is asked something else before a third agent could die.
        """
        outcome = held.outcome
        if outcome.result is Result.SERVED:
            if any(model == request.model for model, _ in self._suspects):
                self._suspects.pop(_fingerprint(request, body), None)
            return False
        if outcome.result in (Result.CANCELLED, Result.TAKEN_BACK, Result.REJECTED):
            return False
        fingerprint = _fingerprint(request, body)
        suspect = self._suspects.get(fingerprint)
        if suspect is None or suspect.until <= now:
            suspect = Suspect()
        agent = held.agent
        was_good = agent.was_good_at(held.lease.granted_at)
        if outcome.died and (was_good or not agent.proven):
            if was_good:
                suspect.agents.add(agent.id)
            else:
                suspect.unproven[agent.id] = agent
            suspect.until = now + SUSPECT_SECONDS
            self._suspects[fingerprint] = suspect
            self._suspects.move_to_end(fingerprint)
            if len(self._suspects) > MOST_SUSPECTS:
                self._suspects.popitem(last=False)
        await self._examine(suspect, request.model)
        return len(suspect.agents) >= MOST_DEATHS

    async def _examine(self, suspect: Suspect, model: str) -> None:
        """Find out which deaths of agents that had never answered count, as long as it matters.

        The last one first: it is the least likely to have been asked by others meanwhile.
        """
        while len(suspect.agents) < MOST_DEATHS <= len(suspect.agents | suspect.unproven.keys()):
            agent = next(reversed(suspect.unproven.values()))
            was_well = await self._was_well(agent, model)
            suspect.unproven.pop(agent.id, None)
            if was_well:
                suspect.agents.add(agent.id)


HASHED_BYTES = 256 * 1024
"""Of each end of a body: hashing all of a large one would hold up other requests."""


def _fingerprint(request: Request, body: Body) -> tuple[str, bytes]:
    digest = sha256(b"%d" % len(body))
    digest.update(body[:HASHED_BYTES])
    digest.update(body[-HASHED_BYTES:])
    return request.model, digest.digest()
