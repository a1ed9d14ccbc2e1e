"""Changing single fields of a JSON body; every other value's bytes stay as they came."""

from collections.abc import Mapping

import msgspec
from msgspec import Raw

_object = msgspec.json.Decoder(dict[str, Raw])


def spliced(body: bytes, changes: Mapping[str, bytes]) -> bytes | None:
    """The object in `body` with these fields set to these JSON texts; `None`: it is not an object.

    A field matches in any letter case, as in Ollama's decoder, and keeps the client's spelling.
    """
    try:
        fields = _object.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    for name, text in changes.items():
        spellings = [key for key in fields if key.lower() == name]
        for key in spellings[:-1]:
            del fields[key]
        fields[spellings[-1] if spellings else name] = Raw(text)
    return msgspec.json.encode(fields)


def field(body: bytes, name: str) -> bytes | None:
    """The JSON text of one field, the last of several spellings; `None` where there is none."""
    try:
        fields = _object.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return next((bytes(fields[key]) for key in reversed(fields) if key.lower() == name), None)
