"""The registry: who is who, who lives, and who is left alone for a while."""

import json
from datetime import UTC, datetime

import msgspec
import pytest
from msgspec import structs

from ollama_coordinator.registry import (
    AgentSettings,
    AgentState,
    Registration,
    Registry,
    TwoMachines,
    UnknownAgent,
)
from ollama_coordinator.registry.agent import model_cooldown_after
from ollama_coordinator.registry.agent_match import Identities
from ollama_coordinator_common.protocol import HealthReport, RegisterRequest
from ollama_coordinator_common.types import AgentId, AgentStatus

TIMEOUT = 60.0
AT = datetime(2026, 1, 1, tzinfo=UTC)
KEY = "registry.ollama.ai/library/m:latest"


@pytest.fixture
def registry() -> Registry:
    return Registry(TIMEOUT)


def machine(
    name: str = "gpu-1",
    address: str = "10.0.0.1",
    *,
    port: int = 11434,
    machine_id: str | None = None,
    relay_port: int | None = None,
    run: str | None = None,
    before: str | None = None,
) -> RegisterRequest:
    """`run` and `before`: the instance ids of this run of the agent and of the one before."""
    request = RegisterRequest(name, address, "0.33.0", port, machine_id, relay_port)
    return structs.replace(request, instance_id=run, previous_instance_id=before)


def register(registry: Registry, request: RegisterRequest, now: float = 0.0) -> Registration:
    return registry.register(request, AgentId(f"agent-{len(registry)}-{now}"), AT, now)


def add(registry: Registry, agent_id: str, *, now: float = 0.0) -> AgentState:
    request = machine(agent_id, f"{agent_id}.local", machine_id=agent_id)
    return registry.register(request, AgentId(agent_id), AT, now).agent


def lists(*names: str) -> bytes:
    return json.dumps({"models": [{"name": name} for name in names]}).encode()


def report(agent: AgentState, body: str = "") -> HealthReport:
    start = f'{{"agent_id":"{agent.id}","cpu_usage":0,"memory_usage":0,"active_requests":0'
    return msgspec.json.decode(f"{start}{body}}}", type=HealthReport)


# ── who is who ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.spec("FLEET-77")
def test_agents_that_are_called_the_same_have_what_tells_them_apart(registry: Registry) -> None:
    def named() -> list[str]:
        return [agent.name for agent in registry]

    register(registry, machine("gpu", "10.0.0.1", machine_id="m-one"))
    assert named() == ["gpu"]
    register(registry, machine("gpu", "10.0.0.2", machine_id="m-two"))
    assert named() == ["gpu (10.0.0.1)", "gpu (10.0.0.2)"]
    third = register(registry, machine("gpu", "10.0.0.2", port=9, machine_id="m-two")).agent
    assert named() == [
        "gpu (10.0.0.1:11434)", "gpu (10.0.0.2:11434)", "gpu (10.0.0.2:9)"
    ]  # fmt: skip
    registry.update_settings(third.id, AgentSettings(display_name="spare"))
    assert named() == ["gpu (10.0.0.1)", "gpu (10.0.0.2)", "spare"]
    registry.remove(next(iter(registry)).id)
    assert named() == ["gpu", "spare"]


@pytest.mark.spec("FLEET-77")
def test_what_tells_two_apart_is_their_ids_where_their_places_are_the_same(
    registry: Registry,
) -> None:
    for name in "ab":
        wanted = structs.replace(machine("gpu", "10.0.0.1", machine_id=f"m-{name}"), link=True)
        registry.register(wanted, AgentId(name * 36), AT, 0.0, host=f"link {name}")
    assert [agent.name for agent in registry] == ["gpu (aaaaaaaa)", "gpu (bbbbbbbb)"]


def test_a_machine_that_registers_again_keeps_its_id_and_its_age(registry: Registry) -> None:
    first = register(registry, machine())
    again = registry.register(machine(), AgentId("new"), datetime(2027, 1, 1, tzinfo=UTC), 5.0)
    assert first.created
    assert not again.created
    assert again.agent is first.agent
    assert again.agent.registered_at == AT
    assert again.agent.heard_at == 5.0


def test_two_agents_on_one_host_are_two(registry: Registry) -> None:
    first = register(registry, machine(machine_id="a"))
    second = register(registry, machine(machine_id="a", port=11435))
    assert second.created
    assert first.agent is not second.agent
    assert len(registry) == 2


@pytest.mark.spec("FLEET-3")
def test_a_machine_that_got_another_address_stays_itself(registry: Registry) -> None:
    before = register(registry, machine(machine_id="a")).agent
    after = register(registry, machine(address="10.0.0.2", machine_id="a"), now=1.0)
    assert after.agent is before
    assert after.agent.url == "http://10.0.0.2:11434"


@pytest.mark.spec("FLEET-3")
def test_a_machine_that_got_another_name_stays_itself(registry: Registry) -> None:
    before = register(registry, machine("old", machine_id="a")).agent
    after = register(registry, machine("new", machine_id="a"), now=1.0)
    assert after.agent is before
    assert after.agent.name == "new"


def test_a_machine_without_an_id_is_known_by_its_name(registry: Registry) -> None:
    before = register(registry, machine()).agent
    assert register(registry, machine(address="10.0.0.2"), now=100.0).agent is before
    assert register(registry, machine("other")).created


def test_an_agent_that_learned_to_send_an_id_stays_itself(registry: Registry) -> None:
    before = register(registry, machine()).agent
    after = register(registry, machine(machine_id="a"), now=1.0).agent
    assert after is before
    assert register(registry, machine("renamed", machine_id="a"), now=2.0).agent is before


@pytest.mark.spec("FLEET-3")
def test_clones_of_one_image_are_separate_while_both_live(registry: Registry) -> None:
    original = register(registry, machine("gpu-1", "10.0.0.1", machine_id="image")).agent
    clone = register(registry, machine("gpu-2", "10.0.0.2", machine_id="image"), now=1.0)
    assert clone.created
    assert register(registry, machine("gpu-1", "10.0.0.1", machine_id="image")).agent is original
    again = register(registry, machine("gpu-2", "10.0.0.2", machine_id="image"), now=2.0)
    assert again.agent is clone.agent


@pytest.mark.spec("FLEET-3")
def test_namesakes_with_ids_are_separate_while_both_live(registry: Registry) -> None:
    first = register(registry, machine("ubuntu", "10.0.0.1", machine_id="a")).agent
    second = register(registry, machine("ubuntu", "10.0.0.2", machine_id="b"), now=1.0)
    assert second.created
    assert register(registry, machine("ubuntu", "10.0.0.1", machine_id="a")).agent is first
    again = register(registry, machine("ubuntu", "10.0.0.2", machine_id="b"), now=2.0)
    assert again.agent is second.agent


HERE, THERE, ELSEWHERE = "10.0.0.1", "10.0.0.2", "10.0.0.3"


def copy(address: str, run: str, before: str | None = None) -> RegisterRequest:
    """A machine made of an image in which the agent had run."""
    return machine("gpu", address, machine_id="image", run=run, before=before)


@pytest.mark.spec("FLEET-26")
def test_copies_of_one_disk_with_one_name_are_separate_while_both_live(registry: Registry) -> None:
    one = register(registry, copy(HERE, "r1", "r0")).agent
    other = register(registry, copy(THERE, "s1", "r0"), now=1.0)
    assert other.created
    for now in (2.0, 3.0):
        assert register(registry, copy(HERE, "r1", "r0"), now=now).agent is one
        assert register(registry, copy(THERE, "s1", "r0"), now=now).agent is other.agent
    assert f"gpu at {THERE}" in (registry.conflict(one, 4.0) or "")
    assert "remove its agent's state folder" in (registry.conflict(other.agent, 4.0) or "")
    # Only while they live.
    assert registry.conflict(one, 100.0) is None


@pytest.mark.spec("FLEET-26")
def test_copies_find_themselves_again_wherever_they_are_then(registry: Registry) -> None:
    one = register(registry, copy(HERE, "r1", "r0")).agent
    other = register(registry, copy(THERE, "s1", "r0"), now=1.0).agent
    later = 1000.0
    assert register(registry, copy(ELSEWHERE, "s2", "s1"), now=later).agent is other
    assert register(registry, copy(THERE, "r2", "r1"), now=later).agent is one


@pytest.mark.spec("FLEET-26")
def test_a_machine_that_crashed_stays_itself_at_another_address(registry: Registry) -> None:
    agent = register(registry, copy(HERE, "r1", "r0")).agent
    registry.update_settings(agent.id, AgentSettings(draining=True))
    again = register(registry, copy(THERE, "r2", "r1"), now=1.0)
    assert (again.created, again.agent, agent.settings.draining) == (False, agent, True)
    registry.heartbeat(structs.replace(report(agent), instance_id="r2"), 2.0)
    assert registry.conflict(agent, 2.0) is None


@pytest.mark.spec("FLEET-26")
def test_an_image_of_a_running_machine_takes_nothing_from_it(registry: Registry) -> None:
    original = register(registry, copy(HERE, "r1", "r0")).agent
    # It might be the same machine after a crash, until the first one reports again.
    assert register(registry, copy(THERE, "s1", "r1"), now=1.0).agent is original
    with pytest.raises(UnknownAgent):
        registry.heartbeat(structs.replace(report(original), instance_id="r1"), 2.0)
    assert register(registry, copy(HERE, "r1", "r0"), now=2.0).agent is original
    with pytest.raises(UnknownAgent):
        registry.heartbeat(structs.replace(report(original), instance_id="s1"), 3.0)
    clone = register(registry, copy(THERE, "s1", "r1"), now=3.0)
    assert clone.created
    assert f"gpu at {HERE}" in (registry.conflict(clone.agent, 4.0) or "")
    for now in (5.0, 6.0):
        assert register(registry, copy(HERE, "r1", "r0"), now=now).agent is original
        assert register(registry, copy(THERE, "s1", "r1"), now=now).agent is clone.agent
    assert register(registry, copy(ELSEWHERE, "s2", "s1"), now=7.0).agent is clone.agent
    assert register(registry, copy(ELSEWHERE, "r2", "r1"), now=7.0).agent is original


@pytest.mark.spec("FLEET-26")
def test_an_agent_that_starts_again_stays_itself(registry: Registry) -> None:
    agent = register(registry, copy(HERE, "r1")).agent
    assert register(registry, copy(HERE, "r2", "r1"), now=1.0).agent is agent
    # Also without a memory, and at another address once the old one is silent.
    assert register(registry, copy(HERE, "r3"), now=2.0).agent is agent
    assert register(registry, copy(THERE, "r4", "r3"), now=100.0).agent is agent
    # The same process may move at any time.
    assert register(registry, copy(ELSEWHERE, "r4", "r3"), now=101.0).agent is agent
    assert registry.conflict(agent, 101.0) is None


@pytest.mark.spec("FLEET-26")
def test_two_that_cannot_be_told_apart_are_refused(registry: Registry) -> None:
    agent = register(registry, copy(HERE, "r1")).agent
    assert register(registry, copy(HERE, "s1"), now=1.0).agent is agent
    # The first one still lives: its report is not taken, whereupon it registers again.
    stale = structs.replace(report(agent), instance_id="r1")
    with pytest.raises(UnknownAgent):
        registry.heartbeat(stale, 2.0)
    with pytest.raises(TwoMachines, match="remove its agent's state folder"):
        register(registry, copy(HERE, "r1"), now=3.0)
    registry.heartbeat(structs.replace(stale, instance_id="s1"), 4.0)
    # Once the other one is gone, it is welcome.
    assert register(registry, copy(HERE, "r1"), now=100.0).agent is agent
    registry.heartbeat(stale, 101.0)


def test_a_machine_that_was_installed_anew_takes_its_place_back(registry: Registry) -> None:
    before = register(registry, machine(machine_id="a")).agent
    assert register(registry, machine(machine_id="b"), now=1.0).agent is before


def test_an_agent_is_reached_at_its_relay_where_it_has_one(registry: Registry) -> None:
    assert register(registry, machine(relay_port=4000)).agent.url == "http://10.0.0.1:4000"
    six = register(registry, machine("six", "fd00::7")).agent
    assert six.url == "http://[fd00::7]:11434"


def test_the_name_that_an_operator_gave_wins(registry: Registry) -> None:
    agent = add(registry, "a")
    registry.update_settings(agent.id, AgentSettings(display_name="Rack 3"))
    assert agent.name == "Rack 3"


def test_the_error_of_an_unknown_id_says_what_to_do(registry: Registry) -> None:
    with pytest.raises(UnknownAgent, match='agent "x" is not registered; register it with POST'):
        registry.get("x")
    with pytest.raises(UnknownAgent):
        registry.remove(AgentId("x"))
    with pytest.raises(UnknownAgent):
        registry.update_settings(AgentId("x"), AgentSettings())
    with pytest.raises(UnknownAgent):
        registry.heartbeat(HealthReport(AgentId("x"), 0, 0, 0), 0.0)
    assert registry.find(AgentId("x")) is None


# ── who lives ─────────────────────────────────────────────────────────────────────────────────


def test_silence_beyond_the_timeout_is_offline(registry: Registry) -> None:
    agent = add(registry, "a")
    assert agent.status(TIMEOUT, TIMEOUT) is AgentStatus.ONLINE
    assert agent.status(TIMEOUT + 0.1, TIMEOUT) is AgentStatus.OFFLINE


def test_an_agent_is_reported_offline_once(registry: Registry) -> None:
    first, second = add(registry, "a"), add(registry, "b", now=30.0)
    assert registry.expire(60.0) == []
    assert registry.expire(61.0) == [first]
    assert registry.expire(62.0) == []
    assert registry.expire(91.0) == [second]


def test_an_agent_that_came_back_goes_offline_again(registry: Registry) -> None:
    agent = add(registry, "a")
    registry.expire(61.0)
    registry.heartbeat(report(agent), 70.0)
    assert registry.is_online(agent, 70.0)
    assert registry.expire(131.0) == [agent]


def test_the_next_expiry_is_that_of_the_agent_heard_longest_ago(registry: Registry) -> None:
    assert registry.next_expiry() is None
    first = add(registry, "a", now=5.0)
    add(registry, "b", now=7.0)
    assert registry.next_expiry() == 65.0
    registry.heartbeat(report(first), 9.0)
    assert registry.next_expiry() == 67.0
    registry.expire(100.0)
    assert registry.next_expiry() is None


def test_a_goodbye_is_offline_at_once_and_not_reported_again(registry: Registry) -> None:
    agent = add(registry, "a")
    registry.heartbeat(report(agent, ',"leaving":true'), 1.0)
    assert not registry.is_online(agent, 1.0)
    assert registry.expire(100.0) == []
    registry.heartbeat(report(agent), 2.0)
    assert registry.is_online(agent, 2.0)


def test_a_goodbye_ends_with_the_next_registration(registry: Registry) -> None:
    agent = register(registry, machine()).agent
    registry.heartbeat(report(agent, ',"leaving":true'), 1.0)
    register(registry, machine(), now=2.0)
    assert registry.is_routable(agent, 2.0)


def test_a_draining_agent_lives_but_gets_nothing_new(registry: Registry) -> None:
    agent = add(registry, "a")
    registry.update_settings(agent.id, AgentSettings(draining=True))
    assert agent.status(0.0, TIMEOUT) is AgentStatus.DRAINING
    assert registry.is_online(agent, 0.0)
    assert not registry.is_routable(agent, 0.0)
    registry.update_settings(agent.id, AgentSettings())
    assert registry.is_routable(agent, 0.0)


def test_an_agent_without_its_ollama_gets_nothing(registry: Registry) -> None:
    agent = add(registry, "a")
    registry.heartbeat(report(agent, ',"ollama_running":false'), 1.0)
    assert registry.is_online(agent, 1.0)
    assert agent.out_of_rotation() == "its Ollama does not answer"
    registry.heartbeat(report(agent), 2.0)
    assert registry.is_routable(agent, 2.0)


def test_a_heartbeat_reports_a_new_ollama_version(registry: Registry) -> None:
    agent = add(registry, "a")
    registry.heartbeat(report(agent, ',"ollama_version":"0.34.0"'), 1.0)
    assert agent.registration.ollama_version == "0.34.0"
    assert agent.registration.machine_name == "a"


def test_an_answer_after_a_removal_does_not_bring_the_agent_back(registry: Registry) -> None:
    agent = add(registry, "a")
    registry.list_models(agent, lists("m"), {}, 0.0)
    registry.remove(agent.id)
    registry.heard(agent, 1.0)
    registry.list_models(agent, lists("m", "n"), {}, 1.0)
    registry.list_loaded(agent, lists("m"), 1.0)
    registry.succeeded(agent, KEY)
    registry.note_missing(agent, KEY)
    registry.fail(agent, "refused", 1.0)
    registry.probed(agent)
    assert registry.expire(1000.0) == []
    assert registry.next_expiry() is None
    assert list(registry.models) == []
    assert registry.holders(KEY) == []


# ── what the database gives back ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("heard_at", "online"), [(-10.0, True), (-61.0, False)])
def test_an_agent_from_the_database_is_as_alive_as_it_was_heard(
    registry: Registry, heard_at: float, online: bool
) -> None:
    agent = AgentState(AgentId("a"), machine(), registered_at=AT, heard_at=heard_at)
    agent.inventory.read_tags(lists("m"), {})
    registry.restore(agent, 0.0)
    assert registry.is_online(agent, 0.0) is online
    assert registry.holders(KEY) == [agent]
    assert registry.expire(100.0) == ([agent] if online else [])


# ── cooldown ──────────────────────────────────────────────────────────────────────────────────


def waits(registry: Registry, agent: AgentState, failures: int) -> list[float]:
    told = []
    for _ in range(failures):
        registry.fail(agent, "refused", 100.0)
        assert agent.cooldown is not None
        told.append(agent.cooldown.until - 100.0)
    return told


@pytest.mark.spec("FLEET-14")
def test_an_agent_that_fails_is_tried_less_and_less_often(registry: Registry) -> None:
    assert waits(registry, add(registry, "a"), 9) == [0, 1, 2, 4, 8, 16, 30, 30, 30]


def test_an_agent_may_fail_for_weeks(registry: Registry) -> None:
    assert waits(registry, add(registry, "a"), 2000)[-1] == 30


def test_an_agent_that_failed_is_out_of_rotation_until_a_probe_succeeds(
    registry: Registry,
) -> None:
    agent = add(registry, "a")
    registry.fail(agent, "refused", 1.0)
    assert agent.out_of_rotation() == "refused"
    assert not registry.is_routable(agent, 50.0)
    registry.probed(agent)
    assert registry.is_routable(agent, 50.0)


def test_a_probe_does_not_forget_the_failures(registry: Registry) -> None:
    agent = add(registry, "a")
    waits(registry, agent, 3)
    registry.probed(agent)
    assert waits(registry, agent, 1) == [4]


def test_a_served_request_forgets_the_failures(registry: Registry) -> None:
    agent = add(registry, "a")
    waits(registry, agent, 3)
    registry.succeeded(agent, KEY)
    assert registry.is_routable(agent, 0.0)
    assert waits(registry, agent, 1) == [0]


@pytest.mark.spec("FLEET-18")
def test_one_model_that_fails_does_not_take_the_agent_out(registry: Registry) -> None:
    agent = add(registry, "a")
    told, now = [], 10.0
    for _ in range(4):
        registry.fail_model(agent, "k", "out of memory", now)
        now, since = agent.model_cooldowns["k"].until, now
        told.append(now - since)
    assert told == [10, 50, 50, 50]
    assert registry.is_routable(agent, 10.0)
    registry.succeeded(agent, "other")
    assert agent.model_cooldowns["k"].failures == 4
    registry.succeeded(agent, "k")
    assert agent.model_cooldowns == {}


# ── which models ──────────────────────────────────────────────────────────────────────────────


def test_a_heartbeat_brings_the_models(registry: Registry) -> None:
    agent = add(registry, "a")
    assert not agent.brings_inventory
    body = f',"tags":{lists("m", "n").decode()},"ps":{lists("m").decode()}'
    registry.heartbeat(report(agent, body), 1.0)
    assert agent.brings_inventory
    assert agent.inventory.sampled_at == 1.0
    assert registry.holders(KEY) == [agent]
    assert agent.inventory.is_loaded(KEY)
    assert list(registry.models) == [KEY, "registry.ollama.ai/library/n:latest"]


@pytest.mark.parametrize("body", [',"tags":[]', ',"ps":7', ',"tags":{"models":1}'])
def test_a_list_that_is_none_is_refused_and_changes_nothing(registry: Registry, body: str) -> None:
    agent = add(registry, "a")
    registry.list_models(agent, lists("m"), {}, 0.0)
    with pytest.raises(msgspec.DecodeError):
        registry.heartbeat(report(agent, body), 1.0)
    assert agent.report is None
    assert registry.holders(KEY) == [agent]


def test_a_model_that_is_gone_from_the_list_has_no_holder(registry: Registry) -> None:
    first, second = add(registry, "a"), add(registry, "b")
    registry.list_models(second, lists("m"), {}, 0.0)
    registry.list_models(first, lists("m"), {}, 0.0)
    assert registry.holders(KEY) == [first, second]
    registry.list_models(first, lists("n"), {}, 1.0)
    assert registry.holders(KEY) == [second]
    registry.list_models(second, b'{"models":null}', {}, 1.0)
    assert KEY not in registry.models


def test_an_offline_agent_still_holds_its_models(registry: Registry) -> None:
    agent = add(registry, "a")
    registry.list_models(agent, lists("m"), {}, 0.0)
    registry.expire(1000.0)
    assert registry.holders(KEY) == [agent]


def test_a_removed_agent_leaves_no_holder_behind(registry: Registry) -> None:
    agent = add(registry, "a")
    registry.list_models(agent, lists("m"), {}, 0.0)
    registry.remove(agent.id)
    assert registry.holders(KEY) == []
    assert list(registry.models) == []
    assert list(registry) == []


def test_a_model_that_an_agent_denies_is_not_asked_of_it_until_its_next_list(
    registry: Registry,
) -> None:
    agent = add(registry, "a")
    registry.list_models(agent, lists("m"), {}, 0.0)
    registry.note_missing(agent, KEY)
    assert registry.holders(KEY) == []
    registry.list_models(agent, lists("m"), {}, 1.0)
    assert registry.holders(KEY) == [agent]


def test_changes_grows_with_everything_that_alters_a_decision(registry: Registry) -> None:
    agent = add(registry, "a")
    registry.list_models(agent, lists("m"), {}, 0.0)
    for act in (
        lambda: registry.list_loaded(agent, lists("m"), 0.0),
        lambda: registry.fail(agent, "refused", 0.0),
        lambda: registry.probed(agent),
        lambda: registry.fail_model(agent, KEY, "failed", 0.0),
        lambda: registry.update_settings(agent.id, AgentSettings(draining=True)),
        lambda: registry.heartbeat(report(agent, ',"ollama_running":false'), 0.0),
        lambda: registry.heartbeat(report(agent, ',"leaving":true'), 0.0),
        lambda: registry.heartbeat(report(agent), 0.0),
        lambda: registry.expire(1000.0),
        lambda: registry.heard(agent, 1000.0),
        lambda: registry.note_missing(agent, KEY),
        lambda: registry.remove(agent.id),
    ):
        before = registry.changes
        act()
        assert registry.changes > before


def test_a_heartbeat_without_news_changes_nothing(registry: Registry) -> None:
    agent = add(registry, "a")
    body = f',"tags":{lists("m").decode()},"ps":{lists("m").decode()}'
    registry.heartbeat(report(agent, body), 1.0)
    before = registry.changes
    registry.heartbeat(report(agent, body), 2.0)
    assert registry.changes == before


def test_a_sign_of_life_after_the_time_is_over_is_a_change_also_before_anybody_noticed() -> None:
    registry = Registry(agent_timeout=60.0)
    agent = registry.register(
        RegisterRequest("m", "10.0.0.1", "0.33.0", 11434), AgentId("a"), datetime.now(UTC), 0.0
    ).agent
    changes = registry.changes
    registry.heard(agent, 30.0)
    assert registry.changes == changes
    registry.heard(agent, 100.0)
    assert registry.changes > changes


ALIKE = {"m:latest": "sha256:1", "copy:latest": "sha256:1"}
COPY = "registry.ollama.ai/library/copy:latest"


@pytest.mark.parametrize("how", ["listed", "missing"])
def test_the_revision_of_a_copy_changes_with_the_model_it_is_a_copy_of(
    registry: Registry, how: str
) -> None:
    agent = add(registry, "a")
    registry.list_models(agent, lists("m:latest", "copy:latest"), ALIKE, 0.0)
    registry.list_loaded(agent, lists("m:latest"), 0.0)
    loaded = registry.models.revision(COPY)
    assert agent.inventory.is_loaded(COPY)
    if how == "listed":
        registry.list_models(agent, lists("copy:latest"), ALIKE, 1.0)
    else:
        registry.note_missing(agent, KEY)
    assert not agent.inventory.is_loaded(COPY)
    gone = registry.models.revision(COPY)
    assert gone != loaded
    registry.list_models(agent, lists("m:latest", "copy:latest"), ALIKE, 2.0)
    registry.list_loaded(agent, lists("m:latest"), 2.0)
    assert agent.inventory.is_loaded(COPY)
    assert registry.models.revision(COPY) not in (loaded, gone)


CLOUD = "registry.ollama.ai/library/gpt-oss:120b-cloud"


def test_a_removed_agent_that_answers_late_of_a_cloud_model_harms_nothing(
    registry: Registry,
) -> None:
    agent = add(registry, "a")
    registry.offer(CLOUD, "gpt-oss:120b-cloud", [agent.id])
    registry.remove(agent.id)
    add(registry, "b")
    for number in range(101):
        registry.offer(f"{number}-cloud", f"{number}-cloud", [AgentId("b")])
    registry.note_missing(agent, CLOUD)
    assert not agent.inventory.is_loaded(CLOUD)


def test_what_identifies_no_agent_any_more_is_forgotten() -> None:
    identities = Identities()
    first, second, without = (
        AgentState(AgentId(name), machine(name, f"{name}.local", machine_id=machine_id), AT, 0.0)
        for name, machine_id in (("a", "image"), ("b", "image"), ("c", None))
    )
    for agent in (first, second, without):
        identities.add(agent)
    assert identities.alike(first) == {"b"}
    assert identities.alike(without) == set()
    for agent in (first, second, second, without):
        identities.discard(agent)
    assert len(identities) == 0


@pytest.mark.spec("FLEET-18")
@pytest.mark.parametrize("early", [None, 0.1, 3.0, 9.0])
@pytest.mark.parametrize("asked", [1, 2])
def test_a_model_that_fails_is_asked_for_twice_a_minute_at_most(
    early: float | None, asked: int
) -> None:
    """Also where a second question follows at once, or the first one went out twice."""
    cooldown, asks = None, []
    at = 0.0
    for number in range(8):
        times = asked if number == 0 else 1
        asks += [at] * times
        cooldown = model_cooldown_after(cooldown, "CUDA error", at, began=at, asked=times)
        at = cooldown.until
        if number == 0 and early is not None and asked == 1:
            at = early
    assert all(sum(since <= one < since + 60 for one in asks) <= 2 for since in asks)
