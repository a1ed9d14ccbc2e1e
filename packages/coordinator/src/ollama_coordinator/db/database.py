"""What the store needs of an engine, and the error that operators see."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from ollama_coordinator_common.error import OllamaCoordinatorError

IN_USE = "another coordinator uses it; stop that one, or give another DATABASE_URL"

DAMAGED = "a row is damaged; restore a copy, or move the database away"


class DatabaseError(OllamaCoordinatorError):
    """The database cannot be opened, read or written; the text has its name and the reason.

    `in_use`: because another coordinator has it.
    """

    def __init__(self, name: str, reason: str, *, in_use: bool = False) -> None:
        super().__init__(f"database {name}: {reason}")
        self.in_use = in_use
        self._name, self._reason = name, reason

    def with_advice(self, advice: str) -> "DatabaseError":
        """The same, with what it means for whoever asked."""
        return DatabaseError(self._name, f"{self._reason}; {advice}", in_use=self.in_use)


class InUse(Exception):
    """Another coordinator has the database."""

    def __init__(self) -> None:
        super().__init__(IN_USE)


class Database(Protocol):
    """One database with one connection. Its methods block; one thread calls all but `look`.

    SQL is what SQLite and PostgreSQL both take, with `?` for each value and `ON CONFLICT` where a
    row may be there. Everything that fails raises one of `errors`, or a `ValueError`.
    """

    errors: tuple[type[Exception], ...]

    @property
    def name(self) -> str:
        """What operators call it; never with a password."""

    def look(self, document: str) -> bytes | None:
        """A document before the database is open; `None` if there is none or it is unreadable."""

    def open(self) -> None:
        """Connect, be the only coordinator, bring the schema up to date, and try to write.

        Raises:
            InUse: another coordinator has it.
        """

    def open_to_read(self) -> None:
        """Connect and see what is in it now, whoever uses it; `query` and `close` work then."""

    def close(self) -> None:
        """Disconnect, and leave the database to others."""

    def check(self) -> None:
        """Once a second: notice that the database was lost, and come back to it."""

    def atomic(self, *, is_long: bool = False) -> AbstractContextManager[object]:
        """A transaction: an error that leaves the block undoes what was in it.

        One that is not `is_long` and takes too long is broken off.
        """

    def query(self, sql: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """The rows of a statement, by column."""

    def execute(self, sql: str, values: Sequence[Any] = ()) -> None:
        """A statement without rows."""

    def execute_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """A statement for each row of values."""

    def advice(self, error: Exception) -> str:
        """The text of one of `errors`, with what an operator can do about it."""


@runtime_checkable
class SharedDatabase(Database, Protocol):
    """A database that several coordinators have: whoever has opened it with `open` leads.

    `of_machines`: they may be on several machines.
    """

    of_machines: bool

    def open_beside(self) -> None:
        """Connect as a coordinator that does not lead."""

    def address_here(self) -> str:
        """This machine's address towards the database's server."""

    def now_ms(self) -> int:
        """Milliseconds of a clock that all of them have."""

    def is_led(self) -> bool:
        """Whether any coordinator leads."""

    def end_silent_leader(self, seconds: float) -> bool:
        """End the leader's session, where a server has it, if it is silent for so long; whether
        it is ended.
        """

    def yield_lead(self) -> None:
        """Let another coordinator lead; this one may still read and write."""
