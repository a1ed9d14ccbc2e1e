"""`/v1/audio/transcriptions`: the routing fields of a multipart form.

The form passes as it came; of its fields only the model's name is read here, and replaced where it
is an alias.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import suppress

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from ollama_coordinator.aio import Slices
from ollama_coordinator.api.http.errors import UnreadableBody
from ollama_coordinator.api.http.json_edit import Body

from .request import Routing

PATH = "/v1/audio/transcriptions"

HEADERS, HEADER_BYTES = 1000, 64 * 1024
"""Of one part: far more than clients send, and no more than Ollama's own decoder takes."""

PARTS = 1000
"""As many as Ollama's own decoder takes."""

PIECE_BYTES = 4096
"""The parser reads headers character by character: 2 ms for so many."""

# Its warnings are about single requests; a form that is wrong is for Ollama to answer.
logging.getLogger("python_multipart").setLevel(logging.ERROR)


async def read_form(content_type: str, body: Body) -> Routing:
    """The routing fields of a transcription.

    Raises:
        HttpError: 400, it is no form, or the file or the model's name is missing.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    wrong = "failed to parse multipart form: "
    if kind != b"multipart/form-data":
        raise UnreadableBody(400, f"{wrong}request Content-Type isn't multipart/form-data")
    if not boundary:
        raise UnreadableBody(400, f"{wrong}no multipart boundary param in Content-Type")
    if b"--" + boundary not in body:
        raise UnreadableBody(400, f"{wrong}multipart: NextPart: EOF")
    fields, _ = await _read_fields(body, boundary)
    name = fields.get("model", b"").decode(errors="replace").strip()
    if fields and "file" not in fields:
        raise UnreadableBody(400, "file is required: http: no such file")
    if not name:
        raise UnreadableBody(400, "model is required")
    return Routing(name=name)


async def renamed_form(content_type: str, body: Body, model: str) -> Body:
    """The form that `read_form` has read, for another model.

    Raises:
        HttpError: 400, the model's name is not where it can be replaced.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    fields, start = await _read_fields(body, boundary)
    end = start + len(fields["model"])
    if body[start:end] != fields["model"]:
        raise UnreadableBody(400, "the model's name in the form cannot be read")
    return body[:start] + model.encode() + body[end:]


async def _read_fields(body: Body, boundary: bytes) -> tuple[dict[str, bytearray], int]:
    """The named parts, of the file only its name; and where the model's name begins in the body.

    A form that breaks off has the parts before that.
    """
    fields: dict[str, bytearray] = {}
    at = model_at = 0
    header = value = b""
    name = ""
    begun: list[str] = []

    def on_part_begin() -> None:
        nonlocal name
        name = ""
        begun.append(name)

    def on_header_field(data: bytes, start: int, end: int) -> None:
        nonlocal header
        header += data[start:end]

    def on_header_value(data: bytes, start: int, end: int) -> None:
        nonlocal value
        value += data[start:end]

    def on_header_end() -> None:
        nonlocal header, value, name
        if header.lower() == b"content-disposition":
            name = parse_options_header(value)[1].get(b"name", b"").decode("latin-1")
            fields[name] = bytearray()
        header, value = b"", b""

    def on_part_data(data: bytes, start: int, end: int) -> None:
        nonlocal model_at
        if name == "model":
            model_at = model_at if fields[name] else at + start
            fields[name] += data[start:end]

    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": on_part_begin,
            "on_header_field": on_header_field,
            "on_header_value": on_header_value,
            "on_header_end": on_header_end,
            "on_part_data": on_part_data,
        },
        max_header_count=HEADERS,
        max_header_size=HEADER_BYTES,
    )
    with suppress(MultipartParseError):  # whether the rest is right is for Ollama to say
        async for at, piece in _pieces(body, boundary):  # noqa: B007 - the callbacks read it
            parser.write(piece)
            if len(begun) > PARTS:
                raise UnreadableBody(400, "multipart: message too large")
    return fields, model_at


async def _pieces(body: Body, boundary: bytes) -> AsyncIterator[tuple[int, bytes]]:
    """The form from its first boundary on, with its places; other tasks run in between."""
    start, slices = 0, Slices()
    if not body.startswith(b"--" + boundary):
        # A preamble, which RFC 2046 allows.
        start = max(body.find(b"\r\n--" + boundary), 0)
    for at in range(start, len(body), PIECE_BYTES):
        yield at, bytes(body[at : at + PIECE_BYTES])
        await slices.pause()
