"""`/v1/audio/transcriptions`: what routing reads of a multipart form.

The form passes as it came; of its fields only the model's name is read here.
"""

from email.message import Message

from ollama_coordinator.api.http.errors import HttpError

from .request import Routing

PATH = "/v1/audio/transcriptions"


def read_form(content_type: str, body: bytes) -> Routing:
    """The routing fields of a transcription.

    Raises:
        HttpError: 400, it is no form, or the file or the model's name is missing.
    """
    header = Message()
    header["content-type"] = content_type
    boundary = header.get_boundary()
    if header.get_content_type() != "multipart/form-data" or not boundary:
        raise HttpError(400, "request Content-Type isn't multipart/form-data")
    fields = dict(_fields(body, boundary.encode("latin-1", "replace")))
    if "file" not in fields:
        raise HttpError(400, "file is required")
    name = fields.get("model", b"").decode(errors="replace").strip()
    if not name:
        raise HttpError(400, "model is required")
    return Routing(name=name)


def _fields(body: bytes, boundary: bytes) -> list[tuple[str, bytes]]:
    """Every named part, in order (RFC 7578)."""
    parts = (b"\r\n" + body).split(b"\r\n--" + boundary)
    fields = []
    for part in parts[1:]:
        if part.startswith(b"--"):
            break
        head, separator, content = part.partition(b"\r\n\r\n")
        name = _name(head) if separator else None
        if name is not None:
            fields.append((name, content))
    return fields


def _name(head: bytes) -> str | None:
    for line in head.decode("latin-1").splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() == "content-disposition":
            header = Message()
            header["content-disposition"] = value.strip()
            name = header.get_param("name", header="content-disposition")
            return name if isinstance(name, str) else None
    return None
