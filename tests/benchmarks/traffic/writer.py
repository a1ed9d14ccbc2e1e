"""What clients write: conversations whose turns repeat what was said before, word by word."""

from collections.abc import Iterable

from ollama_coordinator.scheduler import Kind
from ollama_coordinator.simulation import TraceRequest

from .dialects import Body, Dialect, Messages

SYSTEM_TOKENS = 150
"""Of the system prompt that all chats with a model share; as `simulator.workload` draws it."""

TOKEN = "say "
"""Four characters, which the stand-in and the coordinator both take for a token."""


class Writer:
    """The bodies of a trace's requests, with the answers that were heard so far."""

    def __init__(self, trace: Iterable[TraceRequest], dialect: Dialect) -> None:
        self._turns = {request.prefix[-1]: request for request in trace if request.prefix}
        self._answers: dict[int, str] = {}
        self._dialect = dialect

    def heard(self, request: TraceRequest, answer: bytes) -> None:
        """The answer is part of the conversation's next turn."""
        if len(request.prefix) > 1:
            self._answers[request.prefix[-1]] = self._dialect.text(answer)

    def ask(self, request: TraceRequest) -> tuple[str, Body]:
        """The route and the body."""
        return self._dialect.ask(request.kind, request.model, self._messages(request))

    def _messages(self, request: TraceRequest) -> Messages:
        if request.kind is Kind.EMBED or len(request.prefix) < 2:
            name = request.prefix[0] if request.prefix else 0
            content = _text(name, request.prompt_tokens, request.output_tokens)
            return [{"role": "user", "content": content}]
        system, *links = request.prefix
        messages = [{"role": "system", "content": _text(system, SYSTEM_TOKENS)}]
        said = SYSTEM_TOKENS
        for link in links:
            turn = self._turns[link]
            content = _text(link, turn.prompt_tokens - said, turn.output_tokens)
            messages.append({"role": "user", "content": content})
            # A client that has not heard the answer yet goes on as if it had.
            answer = self._answers.get(link) or _text(link, turn.output_tokens)
            messages.append({"role": "assistant", "content": answer})
            said = turn.prompt_tokens + turn.output_tokens
        return messages[:-1]


def _text(name: int, tokens: int, length: int | None = None) -> str:
    """So many tokens, the first of which are its name; `length` is that of the answer wanted."""
    start = f"{name & 0xFFFFFFFF:08x}" + (f"={length}=" if length is not None else "")
    return start + TOKEN * max(tokens - len(start) // len(TOKEN), 0)
