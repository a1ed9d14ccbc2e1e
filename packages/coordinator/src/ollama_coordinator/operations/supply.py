"""Where each target of a pull gets its model from: one from the internet, the others from it.

The seed is the target that pulls from the model registry. The others wait for it; whoever has the
model then gives it to the next ones, so that the number of givers doubles. A target that no machine
can give the model pulls it from the internet as well.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

import msgspec

from ollama_coordinator.clock import Clock
from ollama_coordinator.dispatch import Dispatch
from ollama_coordinator.registry import AgentState
from ollama_coordinator.upstream import UpstreamError
from ollama_coordinator_common.names import ModelName
from ollama_coordinator_common.tickets import FLEET_HOST
from ollama_coordinator_common.types import AgentId

from .operation import Operation, Target
from .progress import ProgressLine
from .remote import Remote
from .room import lacks_disk
from .transfers import NoSource, SourceLost, Transfer, Transfers
from .types import AgentCommand, OperationKind, OperationState, Refused

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.1
"""How often a target looks whether the seed has the model."""

SEED_AWAY_SECONDS = 5.0
"""After so long another target becomes the seed in place of one that went away."""

TRIES = 4
"""For one target: with each, the machines that failed are left out."""

SAME_EVERYWHERE = ("does not exist", "invalid", "not authorized", "unauthorized")
"""Words of refusals that every other agent would answer with too."""

NO_ROOM = "no space left"
"""Words of a refusal for which no other source helps."""

FLEET = "fleet"
"""The origin of a pull that takes a model from whichever machine has it, and from nowhere else."""


class WriterLost(UpstreamError):
    """The agent that fetched a model for its Ollama does not answer any more; Ollama may."""


Report = Callable[[ProgressLine], None]


class Supply:
    """Carries out the pulls of operations."""

    def __init__(self, dispatch: Dispatch, transfers: Transfers, remote: Remote) -> None:
        self._registry = dispatch.registry
        self._clock: Clock = dispatch.clock
        self._transfers = transfers
        self._remote = remote
        self._seen_passing: set[tuple[AgentId, str]] = set()

    def plan(self, operation: Operation) -> None:
        """Choose the seed of a pull; without any, each target pulls from the internet."""
        if operation.kind is not OperationKind.PULL:
            return
        now = self._clock.now()
        agents = [self._registry.find(target.agent_id) for target in operation.targets.values()]
        there = [a for a in agents if a is not None and self._registry.is_reachable(a, now)]
        able = [agent for agent in there if self._transfers.can_give(agent, now)]
        takers = [agent for agent in there if self._transfers.arrival(agent) is not None]
        operation.takers = {agent.id for agent in takers}
        if operation.command.origin:
            operation.progress.share_among(len(operation.targets))
            return
        seed = min(able, key=lambda agent: self._fitness(operation, agent), default=None)
        if seed is None or all(agent is seed for agent in takers):
            return
        operation.seed = seed.id
        operation.progress.share_among(len(there))
        others = [agent.name for agent in takers if agent is not seed]
        text = f"{seed.name} pulls it; then it goes from machine to machine to {_listed(others)}"
        operation.feed.publish([{"status": text}])

    def _fitness(self, operation: Operation, agent: AgentState) -> tuple[bool, float, str]:
        """A holder first, which may have most of it already; then the most free disk."""
        free = agent.report.disk_free_bytes if agent.report is not None else None
        lacks = operation.command.key not in agent.inventory.available
        return lacks, -(free or 0), agent.id

    async def turn(self, operation: Operation, target: Target) -> None:
        """Wait until a target may begin: a seed at once, the others when the seed is done.

        Raises:
            Refused: the seed was refused what every other would be refused too.
        """
        while operation.seed is not None and target.agent_id != operation.seed:
            seed = operation.targets.get(operation.seed)
            if seed is None or target.replaced is not None or self._is_alone(operation, target):
                return
            if seed.state is OperationState.DONE:
                return
            if seed.state is OperationState.FAILED:
                if any(words in str(seed.error) for words in SAME_EVERYWHERE):
                    raise Refused(500, str(seed.error))
                return
            away = seed.away_since
            is_away = away is not None and self._clock.now() - away >= SEED_AWAY_SECONDS
            if seed.state.is_over or is_away:
                operation.seed = target.agent_id
                return
            target.status = f"waits for {seed.agent_name}"
            await asyncio.sleep(LOOK_SECONDS)

    def succeeded(self, operation: Operation, agent: AgentState) -> None:
        """The models of an agent that did its part were just listed."""
        row = agent.inventory.available.get(operation.command.key)
        if agent.id == operation.seed and row is not None:
            operation.content = row.model.digest

    def _is_alone(self, operation: Operation, target: Target) -> bool:
        """Whether a target gets nothing from other machines."""
        agent = self._registry.find(target.agent_id)
        could = target.agent_id in operation.takers
        lacks_way = agent is None or not (could or self._transfers.arrival(agent) is not None)
        return lacks_way or target.agent_id in operation.on_their_own

    def is_ready(self, operation: Operation, target: Target, agent: AgentState) -> bool:
        """Whether an attempt may begin: its agent was heard since it was lost, and takes models."""
        if target.agent_id == operation.seed or target.agent_id in operation.on_their_own:
            return True
        lacks_way = agent.id in operation.takers and self._transfers.arrival(agent) is None
        return not lacks_way and agent.heard_at > target.lost_at

    async def carry_out(
        self, operation: Operation, target: Target, agent: AgentState, report: Report
    ) -> None:
        """One attempt of one target.

        Raises:
            Refused: it cannot be done.
            UpstreamError: the answer broke off, or there was none.
        """
        origin = operation.command.origin
        from_fleet = operation.seed not in (None, agent.id)
        if not origin and (not from_fleet or self._is_alone(operation, target)):
            await self._remote.do(agent, operation.command, report)
            return
        seed = operation.seed
        try:
            await self._from_fleet(operation, agent, report)
        except Refused as exc:
            if origin or NO_ROOM in str(exc):
                raise
            if isinstance(exc, SourceLost | NoSource) and operation.seed != seed:
                # Another one pulls from the internet in place of the seed that is gone.
                await self.turn(operation, target)
                await self.carry_out(operation, target, agent, report)
                return
            log.warning(
                "a machine pulls from the internet, as no other gives it the model",
                extra={"agent": agent.name, "model": operation.command.name, "reason": str(exc)},
            )
            if isinstance(exc, SourceLost | NoSource):
                operation.seed, operation.content = agent.id, ""
            else:
                operation.on_their_own.add(agent.id)
            report({"status": f"{agent.name} pulls it from the internet: {exc}"})
            await self._remote.do(agent, operation.command, report)

    async def _from_fleet(self, operation: Operation, agent: AgentState, report: Report) -> None:
        command = operation.command
        name, digest = ModelName.parse(command.name), self._wanted(operation)
        row = agent.inventory.available.get(command.key)
        if row is not None and row.model.digest == digest:
            return
        if reason := lacks_disk(agent, command.key, self._size(command.key)):
            raise Refused(507, f"{NO_ROOM}: {reason}")
        failed: set[AgentId] = self._not_asked(command)
        last: Refused | None = None
        from_one = False
        for attempt in range(TRIES):
            transfer = None
            try:
                async with self._transfers.moving(agent, name, _full(digest), failed) as transfer:
                    transfer.from_one = from_one
                    report({"status": f"{agent.name} gets it from {transfer.first.name}"})
                    await self._bring(agent, transfer, report)
                    return
            except Refused as exc:
                givers = transfer.given_by or {transfer.first.id} if transfer is not None else set()
                from_one = from_one or len(givers) > 1  # which of them spoilt it is not known
                failed |= set() if len(givers) > 1 else givers
                if isinstance(exc, NoSource) and last is not None:
                    raise last from exc
                last = exc
                if isinstance(exc, NoSource) or NO_ROOM in str(exc) or attempt + 1 == TRIES:
                    raise
                names = [one.name for one in map(self._registry.find, givers) if one is not None]
                facts = {"agent": agent.name, "from": names, "reason": str(exc)}
                log.warning("a model did not come whole from other machines", extra=facts)

    def _wanted(self, operation: Operation) -> str | None:
        """The digest of the content that the others get: the seed's, else the preferred one."""
        key = operation.command.key
        seed = None if operation.seed is None else operation.targets.get(operation.seed)
        ids = [seed.agent_id] if seed is not None and seed.state is OperationState.DONE else []
        if ids and operation.content:
            return operation.content
        for agent in [*map(self._registry.find, ids), *self._registry.holders(key)]:
            row = None if agent is None else agent.inventory.available.get(key)
            if row is not None:
                return row.model.digest
        return None

    def _size(self, key: str) -> int | None:
        """The bytes of a model, of whichever copy is largest."""
        rows = self._registry.models.copies(key).values()
        return max((row.model.size for row in rows), default=0) or None

    def _not_asked(self, command: AgentCommand) -> set[AgentId]:
        """The agents that an operator's choice of one origin leaves out."""
        if command.origin in ("", FLEET):
            return set()
        named = (command.origin,)
        return {agent.id for agent in self._registry if not {agent.id, agent.name} & set(named)}

    # ── bringing it ───────────────────────────────────────────────────────────────────────────

    async def _bring(self, agent: AgentState, transfer: Transfer, report: Report) -> None:
        """Have an agent take a model under a name of passage, and give it its own name then."""
        host, name = self._transfers.arrival(agent), transfer.name
        if host is None:
            raise NoSource(name.short)
        arrived = f"{host or FLEET_HOST}/{transfer.namespace}/{name.model}:{name.tag}"
        before = f"{FLEET_HOST}/{transfer.namespace}/{name.model}:before"
        had_one = name.key in agent.inventory.available
        try:
            async with transfer.lost:
                if host:
                    pull = AgentCommand.pull(f"http://{arrived}", insecure=True)
                    await self._remote.do(agent, pull, report)
                else:
                    await self._order(agent, transfer, arrived, report)
            if had_one:  # whose files go with it, if nothing else needs them
                await self._quick(agent, AgentCommand.copy(name.short, before))
            await self._remote.do(agent, AgentCommand.copy(arrived, name.short), report)
        finally:
            for passing in (arrived, *((before,) if had_one else ())):
                await self._quick(agent, AgentCommand.delete(passing))

    async def _quick(self, agent: AgentState, command: AgentCommand) -> None:
        with suppress(Refused, UpstreamError):
            await self._remote.do(agent, command, lambda line: None)

    async def _order(
        self, agent: AgentState, transfer: Transfer, arrived: str, report: Report
    ) -> None:
        path = f"/v2/{transfer.namespace}/{transfer.name.model}"
        order = {"name": arrived, "path": path, "manifest": transfer.manifest}
        url = self._transfers.writing(transfer, agent, arrived)
        try:
            await self._remote.order(url, msgspec.json.encode(order), report)
        except UpstreamError as exc:
            raise WriterLost(str(exc)) from exc

    async def sweep(self) -> None:
        """Delete what transfers that were cut off left under names of passage.

        Not while a transfer to the same agent is under way, which may need the same files, and not
        at the first sight of it: another coordinator may be ending what it began.
        """
        now, seen = self._clock.now(), set[tuple[AgentId, str]]()
        for agent in list(self._registry):
            if not self._registry.is_reachable(agent, now) or self._transfers.is_taking(agent):
                continue
            for passing in agent.inventory.passing:
                seen.add((agent.id, passing))
                if (agent.id, passing) in self._seen_passing:
                    await self._quick(agent, AgentCommand.delete(passing))
        self._seen_passing = seen


def _full(digest: str | None) -> str | None:
    return None if digest is None else f"sha256:{digest.removeprefix('sha256:')}"


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
