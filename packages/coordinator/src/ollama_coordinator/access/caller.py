"""Who sends a request, what it may do, and the refusal of what it may not."""

from msgspec import Struct
from starlette.types import Scope

from ollama_coordinator_common.error import OllamaCoordinatorError

from .keys import EVERYTHING, INCLUDED, NOTHING, Key, KeyCounts, Right
from .zones import UNKNOWN_CLIENT, ClientAddress, Zone


class Denied(OllamaCoordinatorError):
    """A request that may not be served; `status` and, for 429, when it may be repeated."""

    def __init__(self, status: int, text: str, retry_after: float = 0.0) -> None:
        super().__init__(text)
        self.status = status
        self.retry_after = retry_after


class Caller(Struct, frozen=True, kw_only=True):
    """Who sends a request. `name` is the client of the history and of the fair queue.

    `rights` are what it may do. `is_proven`: by a key, a session or the secret file, and not by
    where it comes from alone. `by_session`: by a session. `was_wrong`: it gave a key that is none.
    `crosses_sites`: a browser sends it for a page of another site that it does not name. `counts`:
    those of its key, in which its refusals count.
    """

    client: ClientAddress
    name: str
    rights: Right = NOTHING
    key: Key | None = None
    counts: KeyCounts | None = None
    is_proven: bool = False
    by_session: bool = False
    is_browser: bool = False
    was_wrong: bool = False
    crosses_sites: bool = False

    def needs(self, right: Right) -> "Denied":
        """The refusal of what needs a right that its key does not have.

        Without a key there is nothing else to say than that one is needed.
        """
        needed = named(right)
        if self.key is not None:
            self._refused()
            return Denied(403, f"the key '{self.key.name}' may not do this: it needs {needed}")
        return Denied(
            401,
            f"this needs a key with {needed}: send it as `Authorization: Bearer KEY`, or set "
            "OLLAMA_HOST to this coordinator's address with /k/KEY behind it; "
            "`ollama-coordinator keys create NAME` on the coordinator's machine makes one",
        )

    def check_model(self, model: str) -> None:
        """Refuse a model that its key may not use, by its routing key or as people write it.

        Raises:
            Denied: 403.
        """
        if self.key is not None and not self.key.may_use(model):
            self._refused()
            listed = ", ".join(self.key.models)
            text = f"the key '{self.key.name}' may not use this model; it may use: {listed}"
            raise Denied(403, text)

    def _refused(self) -> None:
        if self.counts is not None:
            self.counts.refusals += 1


NOBODY = Caller(client=ClientAddress(UNKNOWN_CLIENT, Zone.PUBLIC), name="")
"""The caller of a request that has not passed `Access.identify`: it may do nothing."""


def caller_of(scope: Scope) -> Caller:
    """Who sends a request."""
    caller: Caller | None = scope.get("caller")
    if caller is not None:
        return caller
    peer = scope.get("client")
    return NOBODY if not peer else Caller(client=NOBODY.client, name=str(peer[0]))


def granted(mode: str, client: ClientAddress, *, any_key: bool) -> Right:
    """What a client may do without a key: the table of zones.

    | | loopback | private | public, or forwarded | trusted network |
    |---|---|---|---|---|
    | `open` | all | all | all | all |
    | `auto`, no key yet | all | all | nothing | all |
    | `auto`, keys exist | all | nothing | nothing | use |
    | `keys` | nothing | nothing | nothing | use |
    """
    if mode == "open":
        return EVERYTHING
    if mode == "auto":
        if client.zone is Zone.LOOPBACK:
            return EVERYTHING
        if not any_key and (client.zone is Zone.PRIVATE or client.is_trusted):
            return EVERYTHING
    return Right.USE if client.is_trusted else NOTHING


def named(wanted: Right) -> str:
    """The rights of which one is needed, for a sentence."""
    names = [f"'{name}'" for name in INCLUDED if Right[name.upper()] & wanted]
    return f"the right {' or '.join(names)}"
