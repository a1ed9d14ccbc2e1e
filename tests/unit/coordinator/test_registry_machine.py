"""Whatever happens in whatever order: the registry's indexes say what the agents say."""

import json
from datetime import UTC, datetime

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ollama_coordinator.registry import AgentSettings, AgentState, Registry
from ollama_coordinator_common.names import model_key
from ollama_coordinator_common.protocol import HealthReport, RegisterRequest
from ollama_coordinator_common.types import AgentId

TIMEOUT = 60.0
AT = datetime(2026, 1, 1, tzinfo=UTC)
MODELS = ("m", "n", "o:1b")
KEYS = tuple(model_key(name) for name in MODELS)

models = st.sets(st.sampled_from(MODELS))
key = st.sampled_from(KEYS)
which = st.integers(0, 7)


def lists(names: set[str]) -> bytes:
    return json.dumps({"models": [{"name": name} for name in sorted(names)]}).encode()


class RegistryMachine(RuleBasedStateMachine):
    """Does everything that can be done to a registry, beside a model that is plain and slow.

    The model: which agents there are, when each was last heard (`None` after a goodbye), what each
    listed, and who was told offline.
    """

    @initialize()
    def begin(self) -> None:
        self.registry = Registry(TIMEOUT)
        self.now = 0.0
        self.everyone: list[AgentState] = []
        self.heard: dict[AgentId, float | None] = {}
        self.disk: dict[AgentId, set[str]] = {}
        self.told_offline: set[AgentId] = set()

    def _one(self, number: int) -> AgentState | None:
        """Any agent that ever was, removed ones too."""
        return self.everyone[number % len(self.everyone)] if self.everyone else None

    def _sign_of_life(self, agent: AgentState) -> None:
        if agent.id in self.heard:
            self.heard[agent.id] = self.now
            self.told_offline.discard(agent.id)

    @rule(name=st.sampled_from("abcd"), port=st.sampled_from([1, 2]))
    def register(self, name: str, port: int) -> None:
        new_id = AgentId(f"{name}{port}-{len(self.everyone)}")
        request = RegisterRequest(name, f"10.0.{port}.{ord(name)}", "0.33.0", port, f"id-{name}")
        done = self.registry.register(request, new_id, AT, self.now)
        if done.created:
            self.everyone.append(done.agent)
            self.disk[new_id] = set()
            self.heard[new_id] = self.now
        self._sign_of_life(done.agent)

    @rule(number=which, age=st.floats(0, 200))
    def restore(self, number: int, age: float) -> None:
        agent_id = AgentId(f"restored-{len(self.everyone)}")
        request = RegisterRequest(str(agent_id), f"{agent_id}.local", "0.33.0", 1)
        heard_at = self.now - age
        agent = AgentState(agent_id, request, registered_at=AT, heard_at=heard_at)
        agent.inventory.read_tags(lists({MODELS[number % 3]}), {})
        self.registry.restore(agent, self.now)
        self.everyone.append(agent)
        self.disk[agent_id] = {KEYS[number % 3]}
        self.heard[agent_id] = heard_at
        if self.now - heard_at > TIMEOUT:
            self.told_offline.add(agent_id)

    @rule(number=which, tags=st.none() | models, leaving=st.booleans(), runs=st.booleans())
    def heartbeat(self, number: int, tags: set[str] | None, leaving: bool, runs: bool) -> None:
        agent = self._one(number)
        if agent is None or agent.id not in self.heard:
            return
        report = HealthReport(agent.id, 0, 0, 0, leaving=leaving, ollama_running=runs)
        if tags is not None:
            self.registry.list_models(agent, lists(tags), {}, self.now)
            self.disk[agent.id] = {model_key(name) for name in tags}
        self.registry.heartbeat(report, self.now)
        self._sign_of_life(agent)
        if leaving:
            self.heard[agent.id] = None
            self.told_offline.add(agent.id)

    @rule(number=which)
    def remove(self, number: int) -> None:
        agent = self._one(number)
        if agent is None or agent.id not in self.heard:
            return
        assert self.registry.remove(agent.id) is agent
        del self.heard[agent.id], self.disk[agent.id]
        self.told_offline.discard(agent.id)

    @rule(number=which, tags=models)
    def list_models(self, number: int, tags: set[str]) -> None:
        agent = self._one(number)
        if agent is None:
            return
        self.registry.list_models(agent, lists(tags), {}, self.now)
        if agent.id in self.disk:
            self.disk[agent.id] = {model_key(name) for name in tags}

    @rule(number=which, of=key)
    def note_missing(self, number: int, of: str) -> None:
        agent = self._one(number)
        if agent is None:
            return
        self.registry.note_missing(agent, of)
        if agent.id in self.disk:
            self.disk[agent.id].discard(of)

    @rule(number=which)
    def hear(self, number: int) -> None:
        agent = self._one(number)
        if agent is not None:
            self.registry.heard(agent, self.now)
            self._sign_of_life(agent)

    @rule(number=which, of=key, ps=models)
    def use(self, number: int, of: str, ps: set[str]) -> None:
        agent = self._one(number)
        if agent is None:
            return
        self.registry.fail(agent, "refused", self.now)
        self.registry.probed(agent)
        self.registry.fail_model(agent, of, "failed", self.now)
        self.registry.succeeded(agent, of)
        self.registry.list_loaded(agent, lists(ps), self.now)

    @rule(number=which, draining=st.booleans())
    def drain(self, number: int, draining: bool) -> None:
        agent = self._one(number)
        if agent is not None and agent.id in self.heard:
            self.registry.update_settings(agent.id, AgentSettings(draining=draining))

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def expire(self) -> None:
        offline = {agent.id for agent in self.registry.expire(self.now)}
        silent = {agent_id for agent_id in self.heard if not self._lives(agent_id)}
        assert offline == silent - self.told_offline
        self.told_offline |= offline

    def _lives(self, agent_id: AgentId) -> bool:
        heard = self.heard[agent_id]
        return heard is not None and self.now - heard <= TIMEOUT

    @invariant()
    def the_agents_are_those_not_removed(self) -> None:
        assert {agent.id for agent in self.registry} == set(self.heard)

    @invariant()
    def online_is_who_was_heard(self) -> None:
        online = {a.id for a in self.registry if self.registry.is_online(a, self.now)}
        assert online == {agent_id for agent_id in self.heard if self._lives(agent_id)}

    @invariant()
    def holders_are_derived_from_the_lists(self) -> None:
        for of in KEYS:
            holders = [agent.id for agent in self.registry.holders(of)]
            assert holders == sorted(a for a, models in self.disk.items() if of in models)
        assert list(self.registry.models) == sorted(set().union(*self.disk.values()))

    @invariant()
    def the_next_expiry_is_the_earliest(self) -> None:
        counted = set(self.heard) - self.told_offline
        times = [heard + TIMEOUT for a in counted if (heard := self.heard[a]) is not None]
        assert self.registry.next_expiry() == min(times, default=None)


TestRegistry = RegistryMachine.TestCase
TestRegistry.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
