"""`/v1/audio/transcriptions`: a multipart form in, a sentence out; and images, which none makes."""

from __future__ import annotations

from aiohttp import web
from aiohttp.multipart import BodyPartReader

from support.ollama.exchange import NDJSON, Exchange
from support.ollama.generation import Turn, generation
from support.ollama.script import Script, words
from support.ollama.wire import ApiError, encode

from .lookup import resolve, single_quoted
from .options import settings

TRANSCRIBED_TOKENS = 8


async def transcriptions(exchange: Exchange) -> web.StreamResponse:
    form = await _form(exchange)
    asked = form.get("model", b"").decode("utf-8", "replace")
    if not asked:
        raise ApiError(400, "model is required", early=True)
    if "file" not in form:
        raise ApiError(400, "file is required: http: no such file", early=True)
    exchange.record.model = asked
    model = resolve(exchange.node, asked, single_quoted(asked))
    heard = form["file"].hex()
    said = words(heard, TRANSCRIBED_TOKENS)
    script = Script(content=said)
    turn = Turn(model=model, prompt=heard, script=script, settings=settings(exchange, model, {}))
    async with generation(exchange.node.engine, turn) as running:
        await running.run(_ignore)
    text = "".join(said)
    # Ollama sets the content type of a stream before it knows that the answer is none.
    if form.get("response_format") == b"text":
        return exchange.text(text, content_type=NDJSON)
    return exchange.text(encode({"text": text}) + b"\n", content_type=NDJSON)


async def image(exchange: Exchange) -> web.StreamResponse:
    """A text model answers with nothing."""
    is_edit = exchange.path.endswith("edits")
    fields = exchange.fields("ImageEditRequest" if is_edit else "ImageGenerationRequest")
    asked = fields.text("model")
    for name in ("prompt", "model", *(["image"] if is_edit else [])):
        if not fields.text(name):
            raise ApiError(400, f"{name} is required", early=True)
    resolve(exchange.node, asked, single_quoted(asked))
    return exchange.text("", content_type=NDJSON)


async def _ignore(kind: str, text: str) -> None:
    """The words are sent when all of them are there."""


async def _form(exchange: Exchange) -> dict[str, bytes]:
    """Every field of the form; the record keeps the size of what was sent."""
    try:
        reader = await exchange.request.multipart()
    except (AssertionError, KeyError, ValueError):  # what aiohttp says to a body that is no form
        text = "failed to parse multipart form: request Content-Type isn't multipart/form-data"
        raise ApiError(400, text, early=True) from None
    form: dict[str, bytes] = {}
    try:
        while (part := await reader.next()) is not None:
            if isinstance(part, BodyPartReader) and part.name:
                form[part.name] = bytes(await part.read(decode=False))
    except ValueError:  # there is no first part
        text = "failed to parse multipart form: multipart: NextPart: EOF"
        raise ApiError(400, text, early=True) from None
    return form
