"""Ollama, the coordinator and the machine are three things that do not know each other."""

import ast
from pathlib import Path

import pytest

import ollama_coordinator_agent

SOURCE = Path(ollama_coordinator_agent.__file__).parent
SEPARATE = {"ollama", "client", "metrics", "daemon", "watch"}


def siblings(module: str) -> set[str | None]:
    nodes = ast.walk(ast.parse((SOURCE / f"{module}.py").read_text("utf-8")))
    return {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level}


@pytest.mark.parametrize("module", ["ollama", "client", "metrics"])
def test_the_leaves_do_not_import_each_other(module: str) -> None:
    assert siblings(module).isdisjoint(SEPARATE - {module})


def test_metrics_knows_neither_network_nor_loop() -> None:
    text = (SOURCE / "metrics.py").read_text("utf-8")
    assert "import asyncio" not in text
    assert "aiohttp" not in text
