"""The fields of places, machines, running leases and queues are written in one module each."""

import ast
from collections.abc import Iterator
from pathlib import Path

import ollama_coordinator.scheduler

SCHEDULER = Path(ollama_coordinator.scheduler.__file__).parent
OWNERS = {
    "state.py": {"Place", "Machine", "Running"},
    "queue.py": {"Queue", "QueueEntry"},
}
MUTATORS = {
    "add", "append", "clear", "discard", "extend", "insert", "pop", "popitem", "remove",
    "setdefault", "sort", "update",
}  # fmt: skip


def parsed(module: Path) -> ast.Module:
    return ast.parse(module.read_text("utf-8"))


def fields(module: Path, classes: set[str]) -> set[str]:
    """Every field of these classes: those that the class declares, and those `__init__` sets."""
    found: set[str] = set()
    for node in parsed(module).body:
        if isinstance(node, ast.ClassDef) and node.name in classes:
            for one in ast.walk(node):
                match one:
                    case ast.AnnAssign(target=ast.Name(id=name)) if one in node.body:
                        found.add(name)
                    case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                        found.add(name)
    return found


def written(module: Path) -> Iterator[tuple[str, int]]:
    """The attributes of other objects that a module sets, deletes or changes in place."""
    for node in ast.walk(parsed(module)):
        target: ast.expr | None = None
        match node:
            case ast.Attribute(ctx=ast.Store() | ast.Del()):
                target = node
            case ast.Subscript(value=ast.Attribute() as target, ctx=ast.Store() | ast.Del()):
                pass
            case ast.Call(func=ast.Attribute(value=ast.Attribute() as target, attr=name)):
                target = target if name in MUTATORS else None
        if isinstance(target, ast.Attribute) and not (
            isinstance(target.value, ast.Name) and target.value.id == "self"
        ):
            yield target.attr, target.lineno


def test_only_its_own_module_writes_a_field_of_the_state() -> None:
    owned = {name: fields(SCHEDULER / name, classes) for name, classes in OWNERS.items()}
    assert all(len(names) > 20 for names in owned.values())
    strangers = [
        f"{module.name}:{line} writes {name}"
        for module in sorted(SCHEDULER.glob("*.py"))
        for name, line in written(module)
        if any(name in names for names in owned.values())
        and name not in owned.get(module.name, set())
    ]
    assert strangers == []


def test_the_search_finds_every_way_to_write(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        "a.one = 1\na.two += 1\ndel a.three\na.b.four[0] = 1\ndel a.five[0]\na.six.pop()\n"
        "a.seven, x = 1, 2\nself.own = 1\na.read[0]\na.called()\n"
    )
    assert {name for name, _ in written(module)} == {
        "one", "two", "three", "four", "five", "six", "seven"
    }  # fmt: skip
