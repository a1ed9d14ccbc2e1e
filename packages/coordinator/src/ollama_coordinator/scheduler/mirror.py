"""The registry's agents as machines and places, kept up to date with what it learns of them."""

from collections import Counter
from collections.abc import Collection, Iterator
from statistics import median

from ollama_coordinator.registry import AgentState, AvailableRow, Registry
from ollama_coordinator_common.types import AgentId, AgentStatus

from .affinity import PromptCaches
from .fleet import Machine, Place
from .learning import Rates
from .memory import Memory, predicted_bytes
from .slots import EMBEDDING_EXTRA, SERIAL_FAMILIES, Slots

FRESH_SECONDS = 1.0
"""What happened this short before a list of loaded models was read is not in it yet."""

RECHECK_SECONDS = 0.25
HEAVIEST = 2.0
REMOTE_SLOTS = 64


class Mirror:
    """Machines by agent and places by model. `sync` says which models' candidates changed."""

    def __init__(self, registry: Registry, rates: Rates, caches: PromptCaches) -> None:
        self._registry = registry
        self._rates = rates
        self._caches = caches
        self._changes = -1
        self._check_at = 0.0
        self.machines: dict[AgentId, Machine] = {}
        self._replicas: Counter[str] = Counter()
        self.known_slots: dict[tuple[AgentId, str], tuple[int, int]] = {}

    def sync(self, now: float) -> set[str] | None:
        """Take over what changed in the registry: the models concerned, `None` for nothing."""
        if self._registry.changes == self._changes and now < self._check_at:
            return None
        self._changes = self._registry.changes
        concerned: set[str] = set()
        for agent in self._registry:
            machine = self.machines.get(agent.id)
            if machine is None or machine.agent is not agent:
                machine = self._add(agent)
            self._update(machine, now, concerned)
        for agent_id in [known for known in self.machines if self._registry.find(known) is None]:
            machine = self.machines.pop(agent_id)
            for place in list(machine.residents):
                self.vacate(place)
            machine.routable = False
            concerned.update(machine.places)
            self._rates.forget(machine.id)
        self._check_at = now + RECHECK_SECONDS
        if all(machine.unsettled is None for machine in self.machines.values()):
            expiry = self._registry.next_expiry()
            self._check_at = max(self._check_at, float("inf") if expiry is None else expiry)
        return concerned

    def _add(self, agent: AgentState) -> Machine:
        machine = Machine(agent.id, agent, Memory(), batch=self._rates.batch_factor(agent.id))
        self.machines[agent.id] = machine
        return machine

    def _update(self, machine: Machine, now: float, concerned: set[str]) -> None:
        agent = machine.agent
        routable = self._registry.is_routable(agent, now)
        inventory = agent.inventory
        seen = (
            routable, agent.settings, agent.report and agent.report.runner, inventory.available,
            len(inventory.available), inventory.ps, tuple(inventory.loaded), _lacks_gpu(agent),
            tuple(agent.model_cooldowns.items()), tuple(inventory.offered),
        )  # fmt: skip
        settled = machine.unsettled in (None, inventory.sampled_at)
        if seen == machine.seen and settled:
            return
        listed = not machine.seen or machine.seen[3] is not inventory.available
        listed = listed or machine.seen[4] != len(inventory.available)
        listed = listed or machine.seen[-1] != tuple(inventory.offered)
        machine.seen = seen
        machine.epoch += 1
        machine.preference = max(agent.settings.preference, 0.01)
        machine.memory.read(agent)
        self._in_rotation(machine, routable=routable, now=now)
        if listed:
            self._list(machine, concerned)
        self._judge(machine)
        self._configure(machine)
        self._reconcile(machine, now)
        concerned.update(machine.places)

    def _in_rotation(self, machine: Machine, *, routable: bool, now: float) -> None:
        """Who was away is taken back without a grudge; what it had in memory is uncertain."""
        if routable and not machine.routable:
            machine.trouble = 0.0
        agent = machine.agent
        offline = agent.status(now, self._registry.agent_timeout) is AgentStatus.OFFLINE
        machine.down_since = now if offline or not agent.ollama_running else machine.down_since
        if machine.down_since == now:
            for place in list(machine.residents):
                self.vacate(place)
        machine.routable = routable

    def _list(self, machine: Machine, concerned: set[str]) -> None:
        """The models on disk changed."""
        known, machine.places = machine.places, {}
        by_weights = {place.weights: place for place in known.values()}
        for key, row in machine.agent.inventory.servable.items():
            weights = row.blob or key
            place = by_weights.get(weights)
            if place is None:
                place = by_weights[weights] = self._place(machine, key, row)
            place.names.add(key)
            machine.places[key] = place
        stays = set(machine.places.values())
        machine.usual.keep({place.slots for place in stays})
        for place in set(known.values()) - stays:
            self.vacate(place)
        for name in known.keys() - machine.places.keys():
            known[name].names.discard(name)
            concerned.add(name)

    def _judge(self, machine: Machine) -> None:
        """What kind of machine it is: what is believed of models not measured there depends on it.

        The first report tells, long after models are known from the database; of a GPU whose maker
        the agent cannot ask, a model in its memory does.
        """
        loaded = machine.agent.inventory.loaded.values()
        machine.used_gpu = machine.used_gpu or any(row.model.size_vram for row in loaded)
        has_gpu = machine.used_gpu or not _lacks_gpu(machine.agent)
        sized = machine.memory.total is not None
        if (has_gpu, sized) != (machine.has_gpu, machine.sized):
            machine.has_gpu, machine.sized = has_gpu, sized
            for place in machine.places.values():
                place.rate(self._rates)

    def _place(self, machine: Machine, key: str, row: AvailableRow) -> Place:
        size = row.model.size
        place = Place(
            machine,
            key,
            weights=row.blob or key,
            disk_bytes=size,
            memory_bytes=predicted_bytes(size),
            slots=Slots(machine.usual),
        )
        place.rate(self._rates)
        self._remember_slots(machine, key, place)
        return place

    def _remember_slots(self, machine: Machine, key: str, place: Place) -> None:
        """What was seen before this process or this policy counts once, until more is seen."""
        if (known := self.known_slots.pop((machine.id, key), None)) is not None:
            place.slots.remember(*known)

    def _configure(self, machine: Machine) -> None:
        """Slots that need no learning."""
        report = machine.agent.report
        runner = report.runner if report is not None else None
        told = runner.num_parallel if runner is not None else None
        machine.context_length = runner.context_length if runner is not None else None
        for key, row in machine.agent.inventory.servable.items():
            slots = machine.places[key].slots
            if row.model.remote_host:
                slots.fix(REMOTE_SLOTS)
                machine.places[key].resident = True
            elif _embeds(row) or slots.extra:
                slots.fix(1, extra=EMBEDDING_EXTRA)
            elif _is_serial(row):
                slots.fix(1)
            else:
                slots.fix(told)

    def _reconcile(self, machine: Machine, now: float) -> None:
        """Believe the agent's list of loaded models, save for what it cannot know yet."""
        inventory = machine.agent.inventory
        sampled = inventory.sampled_at if inventory.sampled_at is not None else float("-inf")
        if machine.down_since is not None and sampled <= machine.down_since:
            return
        for key, place in machine.places.items():
            row = inventory.loaded.get(key)
            if row is not None and row.model.size:
                place.memory_bytes, place.measured = row.model.size, True
                place.context = row.model.context_length
        _size(machine.places.values())
        self._judge_trial(machine, sampled)
        machine.unsettled = None
        for key, place in machine.places.items():
            listed = inventory.is_loaded(key)
            comes = listed and not place.resident and place.loading_until is None
            leaves = not listed and place.resident and not place.running
            if not comes and (not leaves or place.slots.fixed == REMOTE_SLOTS):
                continue
            if max(place.touched_at, place.unloaded_at) > sampled - FRESH_SECONDS:
                machine.unsettled = inventory.sampled_at
            elif comes:
                self.settle(place, now, options_known=False)
            else:
                self.vacate(place)
        machine.epoch += 1

    def _judge_trial(self, machine: Machine, sampled: float) -> None:
        """A list that was read after a load tells whether the other models are still there."""
        trial, loaded = machine.trial, machine.agent.inventory.is_loaded
        if trial is None or trial.place.loading_until is not None:
            return
        if sampled < trial.place.loaded_at or not loaded(trial.place.model):
            return
        machine.trial = None
        beside = [place for place in trial.beside if place.unloaded_at < trial.place.loaded_at]
        together = sum(place.memory_bytes for place in beside)
        if all(loaded(place.model) for place in beside):
            machine.memory.fitted(trial.place.memory_bytes, together, len(beside) + 1)
        else:
            machine.memory.pushed_out(trial.place.memory_bytes, together)

    def settle(self, place: Place, now: float, *, options_known: bool) -> None:
        """The model is in memory."""
        place.resident = True
        place.loading_until = None
        if not options_known:
            place.options = None
        self.occupy(place)

    def occupy(self, place: Place) -> None:
        """The model takes memory, as it is or while it is being loaded."""
        machine = place.machine
        if place not in machine.residents:
            machine.residents[place] = None
            self._replicas[place.model] += 1
        machine.epoch += 1

    def vacate(self, place: Place) -> None:
        """The model is no longer in memory, nor are the prompts it had read."""
        self._caches.forget(place)
        machine = place.machine
        place.resident = False
        place.options = None
        if place in machine.residents:
            del machine.residents[place]
            self._replicas[place.model] -= 1
        machine.epoch += 1

    def relearn(self) -> None:
        """What was known of agents and models has been replaced."""
        for machine in self.machines.values():
            machine.batch = self._rates.batch_factor(machine.id)
            for name, place in machine.places.items():
                place.rate(self._rates)
                self._remember_slots(machine, name, place)

    def places(self, model: str) -> Iterator[Place]:
        """The places of the model's preferred content, on machines in and out of rotation."""
        for agent in self._registry.servers(model):
            machine = self.machines.get(agent.id)
            if machine is not None and (place := machine.places.get(model)) is not None:
                yield place

    def replicas(self, model: str) -> int:
        """How many machines have the model in memory; `model` is a place's first name."""
        return self._replicas[model]


def _size(places: Collection[Place]) -> None:
    """What was never in memory there takes as much more than its weights as what was.

    How much that is depends on the agent's context length and slots.
    """
    seen = [one.memory_bytes / predicted_bytes(one.disk_bytes) for one in places if one.measured]
    if not seen:
        return
    heavier = min(max(median(seen), 1.0), HEAVIEST)
    for place in places:
        if not place.measured:
            place.memory_bytes = int(predicted_bytes(place.disk_bytes) * heavier)


def _lacks_gpu(agent: AgentState) -> bool:
    """Whether its report has no GPU; which those of some makers are not in."""
    report = agent.report
    return report is not None and bool(report.memory_total_bytes) and not report.gpus


def _embeds(row: AvailableRow) -> bool:
    capabilities = row.model.capabilities
    if capabilities:
        return "embedding" in capabilities
    return "bert" in str(row.model.details.get("family", ""))


def _is_serial(row: AvailableRow) -> bool:
    details = row.model.details
    families = details.get("families") or [details.get("family")]
    return any(family in SERIAL_FAMILIES for family in families)
