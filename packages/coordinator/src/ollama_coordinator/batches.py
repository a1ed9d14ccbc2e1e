"""Batches that nobody marked: known by what their client does.

A run are requests of one client without earlier turns that share the head of their prompt and
follow each other within a second. From the tenth on they are a batch, until they stop. An address
behind which several people are is not classed: several conversations that go on, or several chats
that are read at once, show that.

It is pure: values and the time go in. Times are in seconds on a clock that never goes back.
"""

from collections import OrderedDict

from msgspec import Struct

IN_A_ROW = 10
"""A person who tries something repeats it a few times, not ten times without a pause."""

FOLLOWS_SECONDS = 1.0
"""A program sends its next request at once; nobody reads an answer in that time."""

PEOPLE_SECONDS = 3600.0
"""So long an address counts as several people's: a lunch break, or a meeting."""

CONVERSATIONS = 8
HEADS = 32
CLIENTS = 4096
"""What is kept: conversations and heads of a client, and clients; some 10 MB at the very most."""

REASON = (
    "batch by what its client does: ten requests or more without earlier turns, with the same head"
    " of the prompt, each within a second of the one before"
)


class Opening(Struct, frozen=True):
    """How a prompt begins, as hashes; 0 is none.

    `head` is that of the first words of a prompt without earlier turns, `conversation` that of the
    first turn of one that goes on.
    """

    head: int = 0
    conversation: int = 0


NO_OPENING = Opening()


class _Run(Struct):
    """The requests with one head: how many in a row, how many run, and the last sign of one."""

    count: int = 0
    running: int = 0
    at: float = float("-inf")


class _Client(Struct):
    """What is known of one address."""

    runs: OrderedDict[int, _Run]
    conversations: OrderedDict[int, float]
    reading: int = 0
    people_until: float = float("-inf")


class Batches:
    """The runs of each client. Report each request's arrival and end once."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, _Client] = OrderedDict()

    def arrived(self, name: str, opening: Opening, now: float, *, is_read: bool) -> bool:
        """A client's request came: whether it is part of a batch.

        `is_read`: its answer is a plain stream of a chat, which somebody may read.
        """
        client = self._client(name)
        if opening.conversation:
            self._talks(client, opening.conversation, now)
        if is_read:
            if client.reading:
                client.people_until = now + PEOPLE_SECONDS
            client.reading += 1
        if not opening.head:
            return False
        run = client.runs.get(opening.head)
        if run is None:
            run = client.runs[opening.head] = _Run()
            if len(client.runs) > HEADS:
                client.runs.popitem(last=False)
        follows = now - run.at <= FOLLOWS_SECONDS and not (is_read and run.running)
        run.count = run.count + 1 if follows else 1
        run.running += 1
        run.at = now
        return run.count >= IN_A_ROW and now >= client.people_until

    def ended(
        self, name: str, opening: Opening, now: float, *, is_read: bool, is_whole: bool
    ) -> None:
        """It ended; a client that left before the end of an answer is no program at work."""
        client = self._clients.get(name)
        if client is None:
            return
        if is_read and client.reading:
            client.reading -= 1
        run = client.runs.get(opening.head)
        if run is None:
            return
        run.running = max(run.running - 1, 0)
        run.at = now
        if not is_whole:
            run.count = 0

    def _client(self, name: str) -> _Client:
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = _Client(OrderedDict(), OrderedDict())
            if len(self._clients) > CLIENTS:
                self._clients.popitem(last=False)
        else:
            self._clients.move_to_end(name)
        return client

    def _talks(self, client: _Client, conversation: int, now: float) -> None:
        """A conversation goes on; a second one within an hour shows several people."""
        known = client.conversations
        known[conversation] = now
        known.move_to_end(conversation)
        if len(known) > CONVERSATIONS:
            known.popitem(last=False)
        if any(now - at <= PEOPLE_SECONDS for id_, at in known.items() if id_ != conversation):
            client.people_until = now + PEOPLE_SECONDS
