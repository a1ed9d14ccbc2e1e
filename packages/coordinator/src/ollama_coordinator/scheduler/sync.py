"""The registry's agents as machines and places, kept in step with what the registry learns of
them."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from math import inf
from statistics import median

from ollama_coordinator.registry import AgentState, AvailableRow, Registry
from ollama_coordinator_common.types import AgentId, AgentStatus

from .memory import MemoryLimits, predicted_bytes
from .prompt_cache import PromptCaches
from .rates import Rates
from .slots import EMBEDDING_EXTRA, SERIAL_FAMILIES, LearnedSlots, Slots
from .state import NEVER, Machine, Place, RegistryFacts
from .types import RunnerOptions

# What happened this short before a list was read may not be in it: Ollama lists late.
FRESH_SECONDS = 1.0
# How often agents near their timeout, and unsettled lists, are looked at: half a tick.
RECHECK_SECONDS = 0.25
# A model never seen takes at most twice its weights: one context does not speak for all.
HEAVIEST = 2.0
REMOTE_SLOTS = 64  # A cloud model runs elsewhere, within the cloud's own limits


class Machines:
    """Machines by agent and places by model. `sync` returns the models whose places changed."""

    def __init__(self, registry: Registry, rates: Rates, caches: PromptCaches) -> None:
        self._registry = registry
        self._rates = rates
        self._caches = caches
        self._changes = -1
        self._check_at = 0.0
        self._replicas: Counter[str] = Counter()
        self._known_slots: dict[tuple[AgentId, str], LearnedSlots] = {}
        self._known_failing: dict[tuple[AgentId, str], float] = {}
        self.synced_at = 0.0
        self.by_agent: dict[AgentId, Machine] = {}

    def sync(self, now: float) -> set[str] | None:
        """Take over what changed in the registry: the models concerned, `None` for nothing."""
        self.synced_at = now
        if self._registry.changes == self._changes and now < self._check_at:
            return None
        self._changes = self._registry.changes
        concerned: set[str] = set()
        for agent in self._registry:
            machine = self.by_agent.get(agent.id)
            if machine is None or machine.agent is not agent:
                machine = self._add(agent)
            self._update(machine, now, concerned)
        for agent_id in [known for known in self.by_agent if self._registry.find(known) is None]:
            machine = self.by_agent.pop(agent_id)
            for place in list(machine.residents):
                self.vacate(place)
            machine.in_rotation(routable=False, down=False, now=now)
            concerned.update(machine.places)
            self._rates.forget(machine.id)
        self._check_at = now + RECHECK_SECONDS
        if all(machine.unsettled is None for machine in self.by_agent.values()):
            expiry = self._registry.next_expiry()
            if expiry is None or expiry > now:  # else the registry will say who is gone
                self._check_at = inf if expiry is None else expiry
        return concerned

    def _add(self, agent: AgentState) -> Machine:
        machine = Machine(agent.id, agent, MemoryLimits(), batch=self._rates.batch_factor(agent.id))
        self.by_agent[agent.id] = machine
        return machine

    def _update(self, machine: Machine, now: float, concerned: set[str]) -> None:
        agent = machine.agent
        facts = _facts(agent, routable=self._registry.is_routable(agent, now))
        before, settled = machine.facts, machine.unsettled in (None, agent.inventory.sampled_at)
        if facts == before and settled:
            return
        machine.read(facts)
        offline = agent.status(now, self._registry.agent_timeout) is AgentStatus.OFFLINE
        down = offline or not agent.ollama_running
        if machine.in_rotation(routable=facts.routable, down=down, now=now):
            for place in list(machine.residents):
                self.vacate(place)
        if (
            before is None
            or before.available is not facts.available
            or before.available_count != facts.available_count
            or before.offered != facts.offered
        ):
            self._list(machine, concerned)
        self._judge(machine)
        self._configure(machine)
        self._reconcile(machine)
        concerned.update(machine.places)

    def _list(self, machine: Machine, concerned: set[str]) -> None:
        """The models on disk changed."""
        known, places = machine.places, dict[str, Place]()
        by_weights = {place.weights: place for place in known.values()}
        for key, row in machine.agent.inventory.servable.items():
            weights = row.blob or key
            place = by_weights.get(weights)
            if place is None:
                place = by_weights[weights] = self._place(machine, key, row)
            places[key] = place
        machine.list_places(places)
        for place in set(known.values()) - set(places.values()):
            self.vacate(place)
        concerned.update(known.keys() - places.keys())

    def _place(self, machine: Machine, key: str, row: AvailableRow) -> Place:
        size = row.model.size
        place = Place(
            machine,
            key,
            weights=row.blob or key,
            disk_bytes=size,
            memory_bytes=predicted_bytes(size),
            slots=Slots(machine.agent_slots),
        )
        place.take_rates(self._rates)
        self._remember(machine, key, place)
        return place

    def _judge(self, machine: Machine) -> None:
        """Whether it has a GPU and known memory: what is assumed of its models depends on it.

        The first report says so, long after its models are known from the database. Agents cannot
        ask about the GPUs of some makers: there a model in a GPU's memory shows it.
        """
        loaded = machine.agent.inventory.loaded.values()
        used_gpu = any(row.model.size_vram for row in loaded)
        if machine.judge(used_gpu=used_gpu, lacks_gpu=machine.agent.lacks_gpu):
            for place in machine.places.values():
                place.take_rates(self._rates)

    def _configure(self, machine: Machine) -> None:
        """Slots that need no learning."""
        runner = machine.facts.runner if machine.facts is not None else None
        reported = runner.num_parallel if runner is not None else None
        for key, row in machine.agent.inventory.servable.items():
            place = machine.places[key]
            if row.model.remote_host:
                place.slots.fix(REMOTE_SLOTS)
                place.runs_elsewhere()
            elif row.embeds or (place.slots.extra and not row.completes):
                place.slots.fix(1, extra=EMBEDDING_EXTRA)
            elif _is_serial(row):
                place.slots.fix(1)
            else:
                place.slots.fix(reported)

    def _reconcile(self, machine: Machine) -> None:
        """Believe the agent's list of loaded models, except where it is too old to know."""
        inventory = machine.agent.inventory
        sampled = inventory.sampled_at if inventory.sampled_at is not None else NEVER
        if machine.down_since is not None and sampled <= machine.down_since:
            return
        for key, place in machine.places.items():
            row = inventory.loaded.get(key)
            if row is not None and row.model.size:
                place.measure(row.model.size, row.model.context_length)
        _expect_sizes(list(machine.places.values()))
        self._judge_fit_trial(machine, sampled)
        unsettled: float | None = None
        for key, place in machine.places.items():
            listed = inventory.is_loaded(key)
            comes = listed and not place.resident and place.loading_until is None
            leaves = not listed and place.resident and not place.running
            if not comes and (not leaves or place.slots.fixed == REMOTE_SLOTS):
                continue
            if max(place.touched_at, place.unloaded_at) > sampled - FRESH_SECONDS:
                unsettled = inventory.sampled_at
            elif comes:
                self.settle(place, None)
            else:
                self.vacate(place)
        machine.reconcile(unsettled)

    def _judge_fit_trial(self, machine: Machine, sampled: float) -> None:
        """A list that was read after a load shows whether the other models are still there."""
        trial, is_loaded = machine.fit_trial, machine.agent.inventory.is_loaded
        if trial is None or trial.place.loading_until is not None:
            return
        if sampled < trial.place.loaded_at or not is_loaded(trial.place.model):
            return
        machine.fit_judged()
        beside = [place for place in trial.beside if place.unloaded_at < trial.place.loaded_at]
        together = sum(place.memory_bytes for place in beside)
        if all(is_loaded(place.model) for place in beside):
            machine.memory.fitted(trial.place.memory_bytes, together, len(beside) + 1)
        else:
            machine.memory.pushed_out(trial.place.memory_bytes, together)

    # ── what is in memory ─────────────────────────────────────────────────────────────────────

    def settle(self, place: Place, options: RunnerOptions | None) -> None:
        """The model is in memory; the options are not known (`None`) if somebody else loaded it."""
        place.ready(options)
        self.occupy(place)

    def occupy(self, place: Place) -> None:
        """The model takes memory, loaded or being loaded."""
        self._replicas[place.model] += place.enter_memory()

    def vacate(self, place: Place) -> None:
        """The model is no longer in memory, and its prompt cache is gone."""
        self._caches.forget(place)
        self._replicas[place.model] -= place.leave_memory()

    def replicas(self, model: str) -> int:
        """How many machines have the model in memory; `model` is a place's first name."""
        return self._replicas[model]

    def places(self, model: str) -> Iterator[Place]:
        """The places of the model's preferred content, on machines in and out of rotation."""
        for agent in self._registry.servers(model):
            machine = self.by_agent.get(agent.id)
            if machine is not None and (place := machine.places.get(model)) is not None:
                if place.factors != machine.factors:
                    place.take_rates(self._rates)
                yield place

    # ── what was learned ──────────────────────────────────────────────────────────────────────

    def relearn(
        self, slots: Iterable[LearnedSlots], failing: Mapping[tuple[AgentId, str], float]
    ) -> None:
        """All rates have been replaced, and these slots and shares of failures were seen before."""
        self._known_failing.update(failing)
        self._known_slots.update({(one.agent_id, one.model): one for one in slots})
        for machine in self.by_agent.values():
            machine.take_batch(self._rates.batch_factor(machine.id))
            for name, place in machine.places.items():
                place.take_rates(self._rates)
                self._remember(machine, name, place)

    def _remember(self, machine: Machine, name: str, place: Place) -> None:
        """What was seen before counts once, until more is seen."""
        if (known := self._known_slots.pop((machine.id, name), None)) is not None:
            place.slots.remember(known.proven, known.failures)
        if (share := self._known_failing.pop((machine.id, name), None)) is not None:
            place.remember_failing(share)


def _facts(agent: AgentState, *, routable: bool) -> RegistryFacts:
    inventory = agent.inventory
    return RegistryFacts(
        routable,
        agent.settings,
        runner=agent.runner,
        available=inventory.available,
        available_count=len(inventory.available),
        loaded_list=inventory.ps,
        loaded=tuple(inventory.loaded),
        lacks_gpu=agent.lacks_gpu,
        foreign_bytes=agent.foreign_bytes,
        cooldowns=tuple(agent.model_cooldowns.items()),
        offered=tuple(inventory.offered),
    )


def _expect_sizes(places: list[Place]) -> None:
    """What was never in memory there takes as much more than its weights as what was.

    How much that is depends on the agent's context length and slots.
    """
    seen = [one.memory_bytes / predicted_bytes(one.disk_bytes) for one in places if one.measured]
    if not seen:
        return
    heavier = min(max(median(seen), 1.0), HEAVIEST)
    for place in places:
        if not place.measured:
            place.expect_bytes(int(predicted_bytes(place.disk_bytes) * heavier))


def _is_serial(row: AvailableRow) -> bool:
    details = row.model.details
    families = details.get("families") or [details.get("family")]
    return any(family in SERIAL_FAMILIES for family in families)
