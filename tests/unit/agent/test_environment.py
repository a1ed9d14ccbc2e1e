"""What an Ollama's environment says about it, and where its program and models are."""

import sys
from pathlib import Path

import pytest

from ollama_coordinator_agent.ollama import model_folders, ollama_host, runner_settings, serve_host
from ollama_coordinator_agent.process import find_binary
from ollama_coordinator_common.network import netloc
from ollama_coordinator_common.types import RunnerSettings


@pytest.mark.spec("AGENT-34")
@pytest.mark.parametrize(
    ("environ", "version", "expected"),
    [
        ({}, "0.33.0", RunnerSettings(num_parallel=1, max_queue=512)),
        ({}, "0.9.6", RunnerSettings(num_parallel=None, max_queue=512)),
        ({}, "0.0.0", RunnerSettings(num_parallel=1, max_queue=512)),
        ({}, None, RunnerSettings(num_parallel=1, max_queue=512)),
        (
            {
                "OLLAMA_NUM_PARALLEL": "4",
                "OLLAMA_MAX_LOADED_MODELS": "2",
                "OLLAMA_MAX_QUEUE": "9",
                "OLLAMA_CONTEXT_LENGTH": ' "8192" ',
            },
            "0.33.0",
            RunnerSettings(num_parallel=4, max_loaded_models=2, max_queue=9, context_length=8192),
        ),
        (
            {"OLLAMA_NUM_PARALLEL": "many", "OLLAMA_MAX_LOADED_MODELS": "0"},
            "0.33.0",
            RunnerSettings(num_parallel=1, max_queue=512),
        ),
    ],
)
def test_what_is_set_is_reported_and_what_ollama_decides_is_not(
    environ: dict[str, str], version: str | None, expected: RunnerSettings
) -> None:
    assert runner_settings(environ, version) == expected


@pytest.mark.spec("AGENT-28")
@pytest.mark.parametrize(
    ("ollama_host", "binds"),
    [
        ("", "127.0.0.1"),
        ("0.0.0.0", "0.0.0.0"),
        ("0.0.0.0:5000", "0.0.0.0"),
        ("http://0.0.0.0:5000", "0.0.0.0"),
        ("127.0.0.1", "127.0.0.1"),
        (":11434", "127.0.0.1"),
        ("coordinator:8080", "127.0.0.1"),
        ("http://192.0.2.77:8080/fleet", "127.0.0.1"),
        ("[", "127.0.0.1"),
    ],
)
def test_a_server_of_ours_binds_only_an_address_of_this_machine(
    ollama_host: str, binds: str
) -> None:
    assert serve_host({"OLLAMA_HOST": ollama_host}) == binds


@pytest.mark.spec("AGENT-28")
def test_a_bound_host_is_reached_and_written_as_urls_have_it() -> None:
    assert ollama_host({"OLLAMA_HOST": "0.0.0.0"}) == "127.0.0.1"
    assert ollama_host({"OLLAMA_HOST": "[::]:1"}) == "127.0.0.1"
    assert ollama_host({"OLLAMA_HOST": "127.0.0.2:11434"}) == "127.0.0.2"
    assert netloc("::1", 11434) == "[::1]:11434"
    assert netloc("127.0.0.1", 11434) == "127.0.0.1:11434"


@pytest.mark.spec("AGENT-33")
def test_the_models_are_where_the_server_was_told_or_where_it_puts_them() -> None:
    assert model_folders({"OLLAMA_MODELS": "/data/models"}) == [Path("/data/models")]
    home = "USERPROFILE" if sys.platform == "win32" else "HOME"
    assert model_folders({home: "/home/me"})[0] == Path("/home/me/.ollama/models")


@pytest.mark.spec("AGENT-23")
def test_the_program_is_the_configured_one_or_the_one_on_the_path(tmp_path: Path) -> None:
    name = "ollama.exe" if sys.platform == "win32" else "ollama"
    program = tmp_path / name
    program.write_bytes(b"")
    program.chmod(0o755)
    assert find_binary(program, {}) == program
    assert find_binary(None, {"PATH": str(tmp_path)}) == program
    assert find_binary(tmp_path / "missing", {"PATH": str(tmp_path)}) is None
