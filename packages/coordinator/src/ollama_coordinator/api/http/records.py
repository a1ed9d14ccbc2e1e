"""A stream of bytes cut at the ends of its records, so that a client never gets half of one.

Ollama flushes after each record, so a chunk nearly always is whole records and passes as it is; a
split one waits for its rest. Then an error can be put behind the last whole record.
"""

HELD_BACK_BYTES = 1024 * 1024
"""A record longer than this passes in pieces."""


class Records:
    """Counts records and remembers the last ones; `separator` ends each."""

    def __init__(self, separator: bytes) -> None:
        self._separator = separator
        self._held = b""
        self.last = b""
        self.count = 0

    def feed(self, chunk: bytes) -> bytes:
        """The bytes that may go on now: what was held back and `chunk`, up to the last end."""
        data = self._held + chunk if self._held else chunk
        if data.endswith(self._separator):
            self._held = b""
        else:
            end = data.rfind(self._separator)
            cut = end + len(self._separator) if end >= 0 else 0
            if len(data) - cut > HELD_BACK_BYTES:
                cut = len(data)
            self._held, data = data[cut:], data[:cut]
        if data:
            self.last = data
            self.count += data.count(self._separator) or 1
        return data

    @property
    def rest(self) -> bytes:
        """What came after the last end of a record, once the stream has ended."""
        return self._held
