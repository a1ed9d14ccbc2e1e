"""How a client asks in a dialect, and how it recognises the first token."""

import re
from enum import Enum
from typing import Any

import msgspec

from ollama_coordinator.scheduler import Kind

Body = dict[str, Any]
Messages = list[dict[str, str]]

# The first bytes may be a role or a sign of life: what counts is a token or a vector.
TOKEN = re.compile(rb'"(?:content|response)":\s*"[^"]|"embeddings?":\s*[\["]')


class Dialect(Enum):
    """Whose API a system under test offers."""

    OLLAMA = "Ollama"
    OPENAI = "OpenAI"

    def ask(self, kind: Kind, model: str, messages: Messages) -> tuple[str, Body]:
        """The route and the body of a streaming request."""
        prompt = messages[-1]["content"]
        if self is Dialect.OPENAI:
            if kind is Kind.EMBED:
                return "/v1/embeddings", {"model": model, "input": prompt}
            body = {"model": model, "messages": messages, "stream": True}
            return "/v1/chat/completions", body
        if kind is Kind.EMBED:
            return "/api/embed", {"model": model, "input": prompt}
        if kind is Kind.GENERATE:
            return "/api/generate", {"model": model, "prompt": prompt}
        return "/api/chat", {"model": model, "messages": messages}

    def text(self, answer: bytes) -> str:
        """What a streamed chat said; empty if it cannot be read."""
        try:
            return "".join(map(self._piece, answer.splitlines()))
        except (msgspec.DecodeError, LookupError, TypeError):
            return ""

    def _piece(self, line: bytes) -> str:
        if self is Dialect.OLLAMA:
            return str(msgspec.json.decode(line)["message"]["content"])
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or data == b"[DONE]":
            return ""
        choices = msgspec.json.decode(data)["choices"]
        return str(choices[0]["delta"].get("content") or "") if choices else ""
