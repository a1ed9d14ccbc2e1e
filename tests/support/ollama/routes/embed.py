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
from support.ollama.script import Script
from support.ollama.wire import ApiError, keep_alive_seconds

from . import options as read
from .lookup import double_quoted, require_name, resolve, single_quoted


async def embed(exchange: Exchange) -> web.StreamResponse:
    fields = exchange.fields("EmbedRequest")
    asked, texts = fields.text("model"), inputs(fields.raw.get("input"))
    missing = double_quoted(asked) if asked else single_quoted(asked)
    model = resolve(exchange.node, asked, missing)
    keep_alive = keep_alive_seconds(fields.raw.get("keep_alive"))
    size = int(fields.number("dimensions") or 0) or model.embedding_length
    vectors, timings = await vectors_of(
        exchange, model, texts, read.chosen(fields), keep_alive, size
    )
    kept = ("total_duration", "load_duration", "prompt_eval_count")
    figures = {key: value for key, value in timings.fields().items() if key in kept}
    return exchange.json({"model": asked, "embeddings": vectors, **figures})


async def embeddings(exchange: Exchange) -> web.StreamResponse:
    fields = exchange.fields("EmbeddingRequest")
    asked, prompt = fields.text("model"), fields.text("prompt")
    require_name(asked)
    model = resolve(exchange.node, asked, double_quoted(asked))
    keep_alive = keep_alive_seconds(fields.raw.get("keep_alive"))
    vectors, _ = await vectors_of(
        exchange,
        model,
        [prompt] if prompt else [],
        read.chosen(fields),
        keep_alive,
        model.embedding_length,
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
    keep_alive: float | None,
    size: int,
) -> tuple[list[list[float]], Timings]:
    """Loads the model, evaluates the texts as one prompt, and answers a vector for each."""
    turn = Turn(
        model=model,
        prompt="".join(texts),
        script=Script(),
        settings=read.settings(exchange, model, options),
        keep_alive=keep_alive,
    )

    async def no_tokens(kind: str, text: str) -> None:
        raise AssertionError("an embedding writes no tokens")

    async with generation(exchange.node.engine, turn) as running:
        await running.run(no_tokens)
    return [vector(text, size) for text in texts], running.timings


def vector(text: str, size: int) -> list[float]:
    """Unit length, the same for the same text."""
    seed = hashlib.shake_256(text.encode("utf-8", "surrogatepass")).digest(size)
    raw = [(byte - 127.5) / 127.5 for byte in seed]
    norm = math.sqrt(sum(value * value for value in raw)) or 1.0
    return [round(value / norm, 8) for value in raw]
