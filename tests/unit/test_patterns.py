"""No regular expression of the packages takes quadratic time, whatever it is given."""

import ast
import importlib
import pkgutil
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import ollama_coordinator
import ollama_coordinator_agent
import ollama_coordinator_common

ROOTS = (ollama_coordinator, ollama_coordinator_agent, ollama_coordinator_common)
USES = ("match", "fullmatch", "search", "sub", "subn", "split", "findall", "finditer")

LENGTH = 60_000
"""Of each hostile text: a quadratic pattern takes 1,800 million steps, a linear one 60,000."""

SECONDS = 0.15
"""Of the thread's own CPU time; a linear pattern needs some milliseconds."""


@cache
def modules() -> list[ModuleType]:
    """Every module of the packages but those that start a program when imported."""
    names = [
        found.name
        for root in ROOTS
        for found in pkgutil.walk_packages(root.__path__, f"{root.__name__}.")
        if not found.name.endswith("__main__")
    ]
    return [importlib.import_module(name) for name in names]


def uses_in(module: ModuleType) -> Iterator[tuple[Any, str]]:
    """Each pattern that a module uses, with the method that it calls or hands over."""
    tree = ast.parse(Path(str(module.__file__)).read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in USES:
            pattern = vars(module).get(ast.unparse(node.value))
            if isinstance(pattern, re.Pattern):
                yield pattern, node.attr
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"re.{one}" for one in USES}:
            text = node.args[0]
            assert isinstance(text, ast.Constant), f"{module.__name__}:{node.lineno}: no constant"
            yield re.compile(text.value, flags_of(node)), ast.unparse(node.func)[3:]


def flags_of(call: ast.Call) -> int:
    named = [ast.unparse(arg) for arg in call.args[2:]]
    return re.IGNORECASE if any("IGNORECASE" in text for text in named) else 0


@cache
def patterns() -> dict[re.Pattern[Any], set[str]]:
    """Every pattern with the methods that are called on it; the costliest where none is seen."""
    found: dict[re.Pattern[Any], set[str]] = defaultdict(set)
    for module in modules():
        for value in vars(module).values():
            if isinstance(value, re.Pattern):
                found[value] |= set()
        for pattern, method in uses_in(module):
            found[pattern].add(method)
    return {pattern: methods or {"finditer"} for pattern, methods in found.items()}


def compiled() -> int:
    """How often the source calls `re.compile`, or a helper that does."""
    return sum(
        isinstance(node, ast.Call) and ast.unparse(node.func) in ("re.compile", "_any_of")
        for module in modules()
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text("utf-8")))
    )


# ── hostile texts for a pattern, made of its own parts ────────────────────────────────────────


def sample(tokens: Any) -> str:
    """A short text that a part of a pattern takes."""
    return "".join(sample_of(str(kind), value) for kind, value in tokens)


def sample_of(kind: str, value: Any) -> str:
    if kind in ("LITERAL", "NOT_LITERAL"):
        return chr(value) if kind == "LITERAL" else other_than({value})
    if kind == "ANY":
        return "a"
    if kind == "IN":
        return member(value)
    if kind in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        return sample(value[2]) * max(1, min(int(value[0]), 64))
    if kind == "BRANCH":
        return sample(value[1][0])
    if kind in ("SUBPATTERN", "ATOMIC_GROUP"):
        return sample(value[-1] if kind == "SUBPATTERN" else value)
    assert kind in ("AT", "ASSERT", "ASSERT_NOT"), kind
    return ""


CATEGORIES: dict[str, str] = {"CATEGORY_SPACE": " ", "CATEGORY_DIGIT": "0", "CATEGORY_WORD": "a"}


def member(items: Any) -> str:
    """A character of a class."""
    if str(items[0][0]) == "NEGATE":
        return other_than({value for kind, value in items[1:] if str(kind) == "LITERAL"})
    kind, value = items[0]
    if str(kind) == "CATEGORY":
        return CATEGORIES.get(str(value), "-")
    return chr(int(value if str(kind) == "LITERAL" else value[0]))


def other_than(values: set[int]) -> str:
    return next(one for one in "a b0-" if ord(one) not in values)


def parts(tokens: Any) -> Iterator[str]:
    """Texts that the parts take which repeat without end, and what comes before each of them."""
    for index, (kind, value) in enumerate(tokens):
        if str(kind).endswith("REPEAT") and value[1] > LENGTH:
            yield from (sample(value[2]), sample(tokens[:index]), sample(tokens[: index + 1]))
        for inner in inside(str(kind), value):
            yield from parts(inner)


def inside(kind: str, value: Any) -> list[Any]:
    if kind in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        return [value[2]]
    if kind == "BRANCH":
        return list(value[1])
    if kind == "SUBPATTERN":
        return [value[-1]]
    return [value] if kind == "ATOMIC_GROUP" else []


def hostile(pattern: re.Pattern[Any], length: int = LENGTH) -> Iterator[Any]:
    """Long texts of which parts of the pattern take much, and the whole of it does not."""
    text = pattern.pattern
    tokens = re._parser.parse(
        text, pattern.flags & ~re.UNICODE if isinstance(text, bytes) else pattern.flags
    )
    found = list(dict.fromkeys(["", *parts(tokens)]))
    for pump in found:
        for start in found if pump else ():
            body = start + pump * (length // len(pump))
            for whole in (body, body[:-1] + "\0"):
                yield whole.encode("latin-1", "replace") if isinstance(text, bytes) else whole


def run(pattern: re.Pattern[Any], method: str, text: Any) -> float:
    """The CPU seconds of one call."""
    began = time.thread_time()
    if method in ("sub", "subn"):
        getattr(pattern, method)("" if isinstance(text, str) else b"", text)
    elif method == "finditer":
        list(pattern.finditer(text))
    else:
        getattr(pattern, method)(text)
    return time.thread_time() - began


@pytest.mark.spec("OPERATION-36")
def test_every_pattern_is_known() -> None:
    """One that is made elsewhere than at the top of a module is not."""
    assert len(patterns()) >= compiled() - 1  # the helper's own call


@pytest.mark.spec("OPERATION-36")
@pytest.mark.parametrize("pattern", patterns(), ids=lambda pattern: repr(pattern.pattern)[:60])
def test_a_pattern_takes_linear_time(pattern: re.Pattern[Any]) -> None:
    for text in hostile(pattern):
        for method in patterns()[pattern]:
            took = run(pattern, method, text)
            assert took < SECONDS, (method, text[:80], took)


@pytest.mark.parametrize("pattern", [r"\s+$", r"\d+\.", r'(?:"text":"",?)*x"'])
def test_a_quadratic_pattern_is_found(pattern: str) -> None:
    compiled = re.compile(pattern)
    slow = 0.0
    for text in hostile(compiled, LENGTH if "text" in pattern else 20_000):
        slow = max(slow, run(compiled, "search", text))
        if slow > SECONDS:
            return
    pytest.fail(f"at most {slow} s")
