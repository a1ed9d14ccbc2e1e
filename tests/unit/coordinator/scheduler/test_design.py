"""What `DESIGN.md` says is so: its examples, its fields, its constants."""

import ast
import doctest
import re
from importlib import import_module
from pathlib import Path

import pytest
from msgspec import structs

import ollama_coordinator.scheduler
from ollama_coordinator.registry import AgentState
from ollama_coordinator.scheduler.cost import alone_seconds, run_seconds, service_seconds
from ollama_coordinator.scheduler.eviction import wanted_again
from ollama_coordinator.scheduler.memory import MemoryLimits
from ollama_coordinator.scheduler.queue import FadingRate, receiver_of
from ollama_coordinator.scheduler.queues import DEMAND_MEMORY_SECONDS
from ollama_coordinator.scheduler.rates import UNLOAD_SECONDS, Quantity
from ollama_coordinator.scheduler.slots import Slots
from ollama_coordinator.scheduler.state import Action, Choice, Machine, Place, Running
from ollama_coordinator.scheduler.types import Form, Lane, Lease, LeaseId
from unit.coordinator.scheduler.test_state_writers import OWNERS, fields, parsed
from unit.coordinator.scheduler.world import World

SCHEDULER = Path(ollama_coordinator.scheduler.__file__).parent
DESIGN = SCHEDULER / "DESIGN.md"
TEXT = DESIGN.read_text("utf-8")
NOW = 100.0


def place(machine: Machine, model: str) -> Place:
    """One that reads 1,000 and writes 40 tokens a second."""
    made = Place(machine, model, model, 4_000_000_000, 5_000_000_000, Slots())
    made.take_rate(Quantity.PREFILL, 1000.0)
    made.take_rate(Quantity.DECODE, 40.0)
    return made


def begin(world: World, at: Place, number: int, seconds: float) -> None:
    lease = Lease(
        id=LeaseId(number), request=world.request(), agent_id=at.machine.id, granted_at=NOW
    )
    run = Running(
        lease, at, number, NOW + seconds, loads=False, tries=False, rank=number, cached=0,
        output=100.0, choice=Choice(Action.GO, at, 0.0),
    )  # fmt: skip
    at.begin(run, NOW)


def machine(agent: AgentState) -> Machine:
    return Machine(agent.id, agent, MemoryLimits(), batch=0.4)


def test_the_examples_are_right() -> None:
    world = World()
    one, two = machine(world.agent("one")), machine(world.agent("two"))
    busy, idle, free = place(one, "busy"), place(one, "idle"), place(two, "free")
    begin(world, busy, 1, 1.0)
    begin(world, busy, 2, 3.0)
    busy.slow_down_changed(busy.current_slow_down())
    busy.wait_for(1.0)
    demand = FadingRate(DEMAND_MEMORY_SECONDS)
    demand.count(NOW)
    slow = place(two, "slow")
    slow.take_rate(Quantity.DECODE, 10.0)
    asked = world.request()
    names = {
        "stream": receiver_of(asked, 100.0), "slow": slow,
        "whole": receiver_of(structs.replace(asked, form=Form.WHOLE), 100.0),
        "batch": receiver_of(structs.replace(asked, lane=Lane.BATCH), 100.0),
        "busy": busy, "idle": idle, "free": free, "run_seconds": run_seconds, "demand": demand,
        "wanted_again": wanted_again,
        "alone_seconds": alone_seconds, "service_seconds": service_seconds,
        "UNLOAD_SECONDS": UNLOAD_SECONDS,
    }  # fmt: skip
    result = doctest.testfile(str(DESIGN), module_relative=False, globs=names)
    assert (result.failed, result.attempted) == (0, 8)


@pytest.mark.parametrize("module", OWNERS)
def test_every_field_of_the_state_is_in_its_table(module: str) -> None:
    for name in OWNERS[module]:
        table = TEXT.split(f"### {name}: ")[1].split("\n#")[0]
        rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
        listed = {field for row in rows for field in re.findall(r"`(\w+)`", row)}
        assert listed == fields(SCHEDULER / module, {name})


def constants(module: Path) -> set[str]:
    """The names of all numbers at the top of a module, also within a mapping."""
    found: set[str] = set()
    for node in parsed(module).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                value = getattr(import_module(f"ollama_coordinator.scheduler.{module.stem}"), name)
                if name.isupper() and numbers(value):
                    found.add(name)
    return found - {"BOTH", "NO_PLACE", "NEVER"}  # flags and infinities


def numbers(value: object) -> list[float]:
    if isinstance(value, dict):
        return [float(one) for one in value.values() if isinstance(one, int | float)]
    return [float(value)] if isinstance(value, int | float) else []


def listed_constants() -> dict[tuple[str, str], list[float]]:
    rows = re.findall(r"^\| (\w+) \| `(\w+)` \| ([\d. ]+) \|", TEXT, re.MULTILINE)
    return {(module, name): [float(one) for one in values.split()] for module, name, values in rows}


def test_every_constant_is_listed_with_its_value_and_its_reason() -> None:
    listed = listed_constants()
    there = {(p.stem, name) for p in SCHEDULER.glob("*.py") for name in constants(p)}
    assert listed.keys() == there
    for (module, name), values in listed.items():
        value = getattr(import_module(f"ollama_coordinator.scheduler.{module}"), name)
        assert numbers(value) == pytest.approx(values, rel=1e-4), name


@pytest.mark.parametrize("module", sorted(SCHEDULER.glob("*.py")), ids=lambda path: path.stem)
def test_every_constant_has_its_reason_beside_it(module: Path) -> None:
    """A comment in its line, or a comment or docstring beside it or the group that it is in."""
    lines = module.read_text("utf-8").splitlines()
    for name in constants(module):
        at = next(i for i, line in enumerate(lines) if re.match(rf"{name}\b.* = ", line))
        group = at
        while re.match(r"[A-Z_]+ = [^#]*$", lines[group]):
            group -= 1
        after = next(line for line in lines[at + 1 :] if not re.match(r"    |}|[A-Z_]+ = ", line))
        assert "  # " in lines[at] or lines[group].startswith("# ") or after.startswith('"""'), name
