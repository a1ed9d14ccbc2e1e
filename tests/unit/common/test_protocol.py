"""The wire between agents and the coordinator: yesterday's bytes, today's, and wrong ones."""

import json
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from ollama_coordinator_common.protocol import (
    AgentView,
    HealthReply,
    HealthReport,
    RegisterReply,
    RegisterRequest,
)
from ollama_coordinator_common.types import AgentId, AgentStatus, Gpu, RunnerSettings

# The first version's documented messages, byte for byte. They must decode for ever.
FIRST_REGISTRATION = b"""{
  "machine_name": "my-machine",
  "ip_address": "192.168.1.100",
  "ollama_version": "0.1.0",
  "ollama_port": 11434
}"""
FIRST_HEARTBEAT = b"""{
  "agent_id": "550e8400-e29b-41d4-a716-446655440000",
  "cpu_usage": 45.5,
  "memory_usage": 60.2,
  "active_requests": 3
}"""

REGISTRATION: dict[str, Any] = json.loads(FIRST_REGISTRATION)
HEARTBEAT: dict[str, Any] = json.loads(FIRST_HEARTBEAT)

FULL_REGISTRATION = (
    b'{"machine_name":"gpu-1","ip_address":"fd00::7","ollama_version":"0.33.0","ollama_port":11434,'
    b'"machine_id":"5b0c","relay_port":40001,"agent_version":"0.1.0","platform":"Linux x86_64"}'
)
FULL_HEARTBEAT = (
    b'{"agent_id":"a1","cpu_usage":1.5,"memory_usage":2.0,"active_requests":0,'
    b'"ollama_running":false,"ollama_version":"0.33.0","memory_total_bytes":68719476736,'
    b'"disk_free_bytes":1000,"gpus":[{"name":"RTX","index":1,"memory_total_bytes":8,'
    b'"memory_used_bytes":4,"utilization_percent":50.0,"temperature_celsius":61.0}],'
    b'"runner":{"num_parallel":4,"max_loaded_models":3,"max_queue":512,"context_length":8192},'
    b'"tags":{"models":[ {"name":"m:latest","x":1} ]},"ps":{"models":null},'
    b'"model_blobs":{"m:latest":"sha256:00"},"leaving":true}'
)


def registration(body: bytes) -> RegisterRequest:
    return msgspec.json.decode(body, type=RegisterRequest)


def heartbeat(body: bytes) -> HealthReport:
    return msgspec.json.decode(body, type=HealthReport)


def test_the_first_versions_registration_is_understood() -> None:
    assert registration(FIRST_REGISTRATION) == RegisterRequest(
        "my-machine", "192.168.1.100", "0.1.0", 11434
    )


def test_the_first_versions_heartbeat_is_understood() -> None:
    report = heartbeat(FIRST_HEARTBEAT)
    assert (report.cpu_usage, report.memory_usage, report.active_requests) == (45.5, 60.2, 3)


def test_what_the_first_version_does_not_send_is_unknown_and_not_bad_news() -> None:
    request, report = registration(FIRST_REGISTRATION), heartbeat(FIRST_HEARTBEAT)
    assert (request.machine_id, request.relay_port, request.agent_version) == (None, None, None)
    assert report.ollama_running
    assert not report.leaving
    assert report.tags is report.ps is msgspec.UNSET
    assert (report.runner, report.gpus) == (None, [])
    assert report.model_blobs == {}


def test_todays_whole_registration_is_understood_and_written_alike() -> None:
    request = registration(FULL_REGISTRATION)
    assert request.machine_id == "5b0c"
    assert request.relay_port == 40001
    assert msgspec.json.encode(request) == FULL_REGISTRATION


def test_todays_whole_heartbeat_is_understood() -> None:
    report = heartbeat(FULL_HEARTBEAT)
    assert not report.ollama_running
    assert report.leaving
    assert report.gpus == [Gpu("RTX", 1, 8, 4, 50.0, 61.0)]
    assert report.runner == RunnerSettings(4, 3, 512, 8192)
    assert report.model_blobs == {"m:latest": "sha256:00"}


def test_lists_of_models_pass_byte_for_byte() -> None:
    report = heartbeat(FULL_HEARTBEAT)
    assert report.tags is not msgspec.UNSET
    assert bytes(report.tags) == b'{"models":[ {"name":"m:latest","x":1} ]}'
    assert heartbeat(msgspec.json.encode(report)) == report


def test_a_list_that_is_null_was_not_given() -> None:
    report = heartbeat(json.dumps(HEARTBEAT | {"tags": None, "ps": None}).encode())
    assert report == heartbeat(FIRST_HEARTBEAT)


def test_an_agent_sends_no_more_than_it_knows() -> None:
    request = RegisterRequest("my-machine", "192.168.1.100", "0.1.0", 11434)
    assert json.loads(msgspec.json.encode(request)) == REGISTRATION
    report = HealthReport(HEARTBEAT["agent_id"], 45.5, 60.2, 3)
    assert json.loads(msgspec.json.encode(report)) == HEARTBEAT


@pytest.mark.parametrize("more", [{"tomorrow": {"a": [1]}}, {"memory_total_bytes": None}])
def test_tomorrows_fields_are_ignored(more: dict[str, Any]) -> None:
    assert registration(json.dumps(REGISTRATION | more).encode()).ollama_port == 11434
    assert heartbeat(json.dumps(HEARTBEAT | more).encode()).active_requests == 3


@pytest.mark.parametrize("field", sorted(REGISTRATION))
def test_a_registration_without_one_of_its_four_fields_is_refused(field: str) -> None:
    less = {name: value for name, value in REGISTRATION.items() if name != field}
    with pytest.raises(msgspec.ValidationError, match=field):
        registration(json.dumps(less).encode())


@pytest.mark.parametrize("field", sorted(HEARTBEAT))
def test_a_heartbeat_without_one_of_its_four_fields_is_refused(field: str) -> None:
    less = {name: value for name, value in HEARTBEAT.items() if name != field}
    with pytest.raises(msgspec.ValidationError, match=field):
        heartbeat(json.dumps(less).encode())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("machine_name", ""),
        ("machine_name", "x" * 254),
        ("machine_name", None),
        ("ip_address", ""),
        ("ip_address", 127),
        ("ip_address", "http://192.168.1.2"),
        ("ip_address", "192.168.1.2:11434"),
        ("ip_address", "a b"),
        ("ip_address", "host/path"),
        ("ip_address", "user@host"),
        ("ollama_port", 0),
        ("ollama_port", 65536),
        ("ollama_port", "11434"),
        ("relay_port", 0),
        ("machine_id", "x" * 129),
        ("machine_id", 1),
    ],
)
def test_a_registration_with_a_wrong_field_is_refused(field: str, value: Any) -> None:
    with pytest.raises(msgspec.ValidationError, match=field):
        registration(json.dumps(REGISTRATION | {field: value}).encode())


@pytest.mark.parametrize("address", ["10.0.0.1", "::1", "fd00::7", "gpu-1", "gpu-1.lan", "GPU_1"])
def test_an_address_or_a_host_name_is_taken(address: str) -> None:
    body = json.dumps(REGISTRATION | {"ip_address": address}).encode()
    assert registration(body).ip_address == address


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cpu_usage", -0.1),
        ("cpu_usage", "45"),
        ("memory_usage", None),
        ("active_requests", -1),
        ("active_requests", 1.5),
        ("agent_id", 1),
        ("ollama_running", "yes"),
        ("gpus", [{"index": 0}]),
        ("gpus", {}),
        ("runner", {"num_parallel": 0}),
        ("model_blobs", {"m": 1}),
        ("leaving", 1),
    ],
)
def test_a_heartbeat_with_a_wrong_field_is_refused(field: str, value: Any) -> None:
    with pytest.raises(msgspec.ValidationError, match=field):
        heartbeat(json.dumps(HEARTBEAT | {field: value}).encode())


def test_a_process_may_use_more_than_one_processor() -> None:
    assert heartbeat(json.dumps(HEARTBEAT | {"cpu_usage": 340}).encode()).cpu_usage == 340


def test_replies_have_the_documented_fields() -> None:
    reply = msgspec.json.encode(RegisterReply(AgentId("a1"), "registered"))
    assert json.loads(reply) == {"agent_id": "a1", "status": "registered"}
    assert json.loads(msgspec.json.encode(HealthReply())) == {"status": "ok"}


def test_an_agent_in_the_list_has_the_first_versions_fields() -> None:
    at = datetime(2025, 10, 30, 12, tzinfo=UTC)
    view = AgentView(
        AgentId("a1"), "my-machine", "192.168.1.100", "0.1.0", 11434, AgentStatus.ONLINE, at, at
    )
    first = {
        "id": "a1",
        "machine_name": "my-machine",
        "ip_address": "192.168.1.100",
        "ollama_version": "0.1.0",
        "ollama_port": 11434,
        "status": "online",
        "registered_at": "2025-10-30T12:00:00Z",
        "last_seen": "2025-10-30T12:00:00Z",
    }
    assert first.items() <= json.loads(msgspec.json.encode(view)).items()


def test_the_states_of_an_agent_have_these_names() -> None:
    assert {status.value for status in AgentStatus} == {"online", "offline", "draining"}
