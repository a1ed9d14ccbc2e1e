"""Aliases: a name that stands for a model, or for several of which the first that serves is taken.

A model that an agent has goes before an alias of the same name, so that an alias hides none.
"""

from collections.abc import Iterator

import msgspec
from msgspec import Struct

from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.names import ModelName, model_key

from .access import Caller
from .db import Store
from .registry import Registry

DOCUMENT = "aliases"
"""Under which name the aliases are in the database: a JSON list of `Alias`."""

MOST_MODELS = 20
"""Of one alias: each may cost a request its whole wait."""

MOST_ALIASES = 1000
"""Each is a row in every client's list of models."""

LONGEST_WAIT_SECONDS = 86_400.0


class WrongAlias(OllamaCoordinatorError):
    """An alias that cannot be made as it is asked for; says why."""


class AliasInTheWay(OllamaCoordinatorError):
    """An agent has a model of the name that an alias is to have."""


class UnknownAlias(OllamaCoordinatorError):
    """There is no alias of this name."""


class Alias(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One alias. `models` are names of models or of other aliases, the preferred one first.

    `wait_seconds`: a request that has waited so long for a place goes to the next model; with
    `null` it goes there only if the model cannot be served at all.
    """

    name: str
    models: tuple[str, ...]
    wait_seconds: float | None = None


class Aliases:
    """Every alias; `revision` grows with each change."""

    def __init__(self, registry: Registry, store: Store) -> None:
        self._registry = registry
        self._store = store
        self._aliases: dict[str, Alias] = {}
        self.revision = 0

    def __iter__(self) -> Iterator[Alias]:
        return iter(sorted(self._aliases.values(), key=lambda alias: alias.name))

    async def restore(self) -> None:
        """Read the aliases of the database.

        Raises:
            DatabaseError: it, or what it has of aliases, cannot be read.
        """
        for alias in await self._store.read(DOCUMENT, list[Alias]) or ():
            self._aliases[model_key(alias.name)] = alias
        self.revision += 1

    # ── what requests ask ─────────────────────────────────────────────────────────────────────

    def find(self, name: str) -> Alias | None:
        """The alias that a name means; `None` where it is the name of a model, or of nothing."""
        if not self._aliases or len(name) > LONGEST_NAME:
            return None
        try:
            key = model_key(name)
        except OllamaCoordinatorError:
            return None
        alias = self._aliases.get(key)
        return None if alias is None or self._registry.holders(key) else alias

    def models(self, alias: Alias) -> list[str]:
        """The names of the models behind an alias, the preferred one first; aliases resolved."""
        found: dict[str, str] = {}
        for name in alias.models:
            other = self.find(name)
            for model in [name] if other is None else self.models(other):
                found.setdefault(model_key(model), model)
        return list(found.values())

    def usable(self, alias: Alias, caller: Caller) -> list[str]:
        """Those of its models that a caller may use.

        Raises:
            Denied: it may use none of them.
        """
        models = self.models(alias)
        usable = [one for one in models if caller.key is None or caller.key.may_use(one)]
        if not usable:
            caller.check_model(models[0])
        return usable

    def first_held(self, alias: Alias, caller: Caller) -> str | None:
        """The first of its models that an agent has and the caller may use."""
        for name in self.models(alias):
            may_use = caller.key is None or caller.key.may_use(name)
            if may_use and self._registry.holders(model_key(name)):
                return name
        return None

    def hidden_by(self, alias: Alias) -> list[str]:
        """The names of the agents that have a model of its name: then it is not in use."""
        return [agent.name for agent in self._registry.holders(model_key(alias.name))]

    # ── what an operator changes ──────────────────────────────────────────────────────────────

    def put(self, wanted: Alias) -> None:
        """Make an alias, or replace it; written behind.

        Raises:
            InvalidModelName: it, or one of its models, has a name that none can have.
            WrongAlias: it would lead to itself, or is out of bounds.
            AliasInTheWay: an agent has a model of its name.
        """
        key = model_key(wanted.name)
        keys = [model_key(name) for name in wanted.models]
        if not 1 <= len(keys) <= MOST_MODELS:
            raise WrongAlias(f"models: give from 1 to {MOST_MODELS} names")
        wait = wanted.wait_seconds
        if wait is not None and not 0 <= wait <= LONGEST_WAIT_SECONDS:
            raise WrongAlias(f"wait_seconds: give from 0 to {LONGEST_WAIT_SECONDS:g}, or null")
        if key not in self._aliases and len(self._aliases) >= MOST_ALIASES:
            raise WrongAlias(f"there are {MOST_ALIASES} aliases already; delete one first")
        for name in wanted.models:
            path = self._path(model_key(name), key)
            if path:
                names = " → ".join(ModelName.parse(one).short for one in [key, *path])
                raise WrongAlias(f"'{wanted.name}' would lead to itself: {names}")
        holders = ", ".join(agent.name for agent in self._registry.holders(key))
        if holders:
            raise AliasInTheWay(
                f"there is a model '{wanted.name}' on {holders}, which the alias would hide: "
                "give it another name, or delete that model first"
            )
        self._aliases[key] = wanted
        self._changed()

    def remove(self, name: str) -> Alias:
        """Delete an alias; written behind.

        Raises:
            InvalidModelName: none can have this name.
            UnknownAlias: there is none of it.
        """
        alias = self._aliases.pop(model_key(name), None)
        if alias is None:
            raise UnknownAlias(f"there is no alias '{name}'; see /api/aliases")
        self._changed()
        return alias

    def _path(self, start: str, end: str) -> list[str]:
        """The keys from one name to another by way of aliases; none: it does not lead there."""
        if start == end:
            return [end]
        alias = self._aliases.get(start)
        for name in () if alias is None else alias.models:
            path = self._path(model_key(name), end)
            if path:
                return [start, *path]
        return []

    def _changed(self) -> None:
        self.revision += 1
        self._store.note_document(DOCUMENT, lambda: msgspec.json.encode(list(self)))


LONGEST_NAME = 1000
"""Characters; a longer name is none that Ollama takes."""
