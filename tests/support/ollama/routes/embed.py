"""`/api/embed` and `/api/embeddings`: vectors that are a function of the text."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from support.ollama.exchange import Exchange
from support.ollama.generation import Timings, Turn, generation
from support.ollama.models import Model
from support.ollama.script import TOKEN_CHARACTERS, Script
from support.ollama.wire import ApiError, keep_alive_seconds

from . import options as read
from .lookup import require_file, require_name, resolve, try_pulling


async def embed(exchange: Exchange) -> web.StreamResponse:
    fields = exchange.fields("EmbedRequest")
    asked, texts = fields.text("model"), inputs(fields.raw.get("input"))
    model = resolve(exchange.node, asked, try_pulling(asked))
    require_file(model, try_pulling(asked))
    vectors, timings = await vectors_of(
        exchange,
        model,
        texts,
        read.chosen(fields),
        keep_alive=keep_alive_seconds(fields.raw.get("keep_alive")),
        size=max(int(fields.number("dimensions") or 0), 0),
        refusal=None if fields.flag("truncate", True) else 400,
    )
    kept = ("total_duration", "load_duration", "prompt_eval_count")
    figures = {key: value for key, value in timings.fields().items() if key in kept and texts}
    return exchange.json({"model": asked, "embeddings": vectors, **figures})


async def embeddings(exchange: Exchange) -> web.StreamResponse:
    """The older route; unlike the other it cuts no prompt, and minds the case of a name."""
    fields = exchange.fields("EmbeddingRequest")
    asked, prompt = fields.text("model"), fields.text("prompt")
    require_name(asked)
    model = resolve(exchange.node, asked, try_pulling(asked), exact=True)
    require_file(model, try_pulling(asked))
    vectors, _ = await vectors_of(
        exchange,
        model,
        [prompt] if prompt else [],
        read.chosen(fields),
        keep_alive=keep_alive_seconds(fields.raw.get("keep_alive")),
        refusal=500,
    )
    return exchange.json({"embedding": vectors[0] if vectors else []})


def inputs(value: Any) -> list[str]:
    if value is None or value == "":
        return []
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ApiError(400, "invalid input type")
    return texts


async def vectors_of(
    exchange: Exchange,
    model: Model,
    texts: Sequence[str],
    options: dict[str, Any],
    *,
    keep_alive: float | None = None,
    size: int = 0,
    refusal: int | None = None,
) -> tuple[list[list[float]], Timings]:
    """Loads the model, evaluates the texts as one prompt, and answers a vector for each.

    A text longer than the context is cut, or refused with the status `refusal` if there is one.
    `size` cuts the vectors; 0 leaves them as they are.
    """
    settings = read.settings(exchange, model, options)
    most = settings.num_ctx * TOKEN_CHARACTERS
    evaluated = [text[:most] for text in texts]
    turn = Turn(
        model=model,
        prompt="".join(evaluated),
        script=Script(),
        settings=settings,
        keep_alive=keep_alive,
    )

    async def no_tokens(kind: str, text: str) -> None:
        raise AssertionError("an embedding writes no tokens")

    async with generation(exchange.node.engine, turn) as running:
        if refusal is not None and any(len(text) > most for text in texts):
            raise ApiError(refusal, read.TOO_LONG)
        if texts:
            await running.run(no_tokens)
    length = min(size or model.embedding_length, model.embedding_length)
    return [vector(text, length) for text in evaluated], running.timings


def vector(text: str, size: int) -> list[float]:
    """Unit length, the same for the same text."""
    seed = hashlib.shake_256(text.encode("utf-8", "surrogatepass")).digest(size)
    raw = [(byte - 127.5) / 127.5 for byte in seed]
    norm = math.sqrt(sum(value * value for value in raw)) or 1.0
    return [round(value / norm, 8) for value in raw]
