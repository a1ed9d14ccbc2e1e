"""The models of one agent, as its Ollama lists them."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_coordinator.registry import Inventory
from ollama_coordinator_common.names import model_key

M, N = model_key("m"), model_key("n")


def body(*rows: Any) -> bytes:
    return json.dumps({"models": list(rows)}).encode()


def row(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "model": name, "digest": f"digest of {name}", "size": 7, **more}


@pytest.fixture
def inventory() -> Inventory:
    """Has `m` and `n` on disk, with the same weights."""
    inventory = Inventory()
    inventory.read_tags(body(row("m"), row("n")), {"m:latest": "sha256:1", "n": "sha256:1"})
    return inventory


def test_rows_stay_as_ollama_wrote_them() -> None:
    raw = b'{"name": "M:latest",\n "model":"M:latest", "size":1e2, "new":{"x":[1]} }'
    inventory = Inventory()
    inventory.read_tags(b'{"models":[' + raw + b"]}", {})
    inventory.read_ps(b'{"models":[' + raw + b"]}")
    assert inventory.available[M].raw == inventory.loaded[M].raw == raw
    assert inventory.available[M].model.name == "M:latest"


def test_what_routing_reads_is_decoded() -> None:
    inventory = Inventory()
    inventory.read_tags(
        body(row("m", modified_at="2026-01-02T03:04:05.123456789+09:00", capabilities=["tools"])),
        {},
    )
    inventory.read_ps(body(row("m", size_vram=5, context_length=8192)))
    model = inventory.available[M].model
    assert (model.digest, model.size, model.capabilities) == ("digest of m", 7, ["tools"])
    assert model.modified_at is not None
    assert model.modified_at.utcoffset() is not None
    assert inventory.loaded[M].model.context_length == 8192


def test_names_are_compared_as_ollama_does() -> None:
    inventory = Inventory()
    inventory.read_tags(body(row("Library/M:LATEST")), {"m": "sha256:1"})
    assert inventory.available[M].blob == "sha256:1"


@pytest.mark.parametrize(
    "odd",
    [
        {"size": "big"},
        {"size": None},
        {"details": None},
        {"modified_at": "yesterday"},
        {"capabilities": None},
        {"digest": 7},
    ],
)
def test_a_row_with_an_odd_field_is_known_by_its_name(odd: dict[str, Any]) -> None:
    inventory = Inventory()
    inventory.read_tags(body(row("m") | odd, row("n")), {})
    assert set(inventory.available) == {M, N}
    assert json.loads(inventory.available[M].raw) == row("m") | odd


@pytest.mark.parametrize("odd", [7, None, [], {}, {"name": 1}, {"name": "a b"}, {"name": ""}])
def test_a_row_without_a_name_that_can_be_asked_for_is_left_out(odd: Any) -> None:
    inventory = Inventory()
    inventory.read_tags(body(odd, row("m")), {})
    inventory.read_ps(body(odd, row("n")))
    assert set(inventory.available) == {M}
    assert set(inventory.loaded) == {N}


@pytest.mark.parametrize(
    "bad",
    [b"", b"null", b"[]", b"7", b'{"models":7}', b'{"models":[}', b'{"models":[{"name":"\xff"}]}',
     b'{"models":[{"name":"m","license":"\xff"}]}', b'{"models":' + b"[" * 100_000],
)  # fmt: skip
def test_a_body_that_is_no_list_is_refused_and_changes_nothing(
    inventory: Inventory, bad: bytes
) -> None:
    inventory.read_ps(body(row("m")))
    before = dict(inventory.available), dict(inventory.loaded), inventory.tags, inventory.ps
    with pytest.raises(msgspec.DecodeError):
        inventory.read_tags(bad, {})
    with pytest.raises(msgspec.DecodeError):
        inventory.read_ps(bad)
    assert (inventory.available, inventory.loaded, inventory.tags, inventory.ps) == before


@given(st.binary())
def test_any_bytes_are_a_list_or_refused(data: bytes) -> None:
    try:
        assert Inventory().read_tags(data, {}) is (data != b"")
        Inventory().read_ps(data)
    except msgspec.DecodeError:
        return


@pytest.mark.parametrize("empty", [b"{}", b'{"models":null}', b'{"models":[]}'])
def test_an_ollama_without_models_has_an_empty_list(inventory: Inventory, empty: bytes) -> None:
    assert inventory.read_tags(empty, {})
    assert inventory.available == {}


def test_the_same_list_again_is_no_news(inventory: Inventory) -> None:
    blobs = {"m:latest": "sha256:1", "n": "sha256:1"}
    assert not inventory.read_tags(inventory.tags, blobs)
    assert inventory.read_tags(inventory.tags, blobs | {"n": "sha256:2"})
    assert inventory.available[N].blob == "sha256:2"


def test_an_expiry_that_moves_is_no_news(inventory: Inventory) -> None:
    assert inventory.read_ps(body(row("m", expires_at="2026-01-01T00:00:00Z")))
    assert not inventory.read_ps(body(row("m", expires_at="2026-01-01T00:05:00Z")))
    expires_at = inventory.loaded[M].model.expires_at
    assert expires_at is not None
    assert expires_at.minute == 5
    assert inventory.read_ps(body())


def test_names_of_the_same_weights_are_in_memory_together(inventory: Inventory) -> None:
    inventory.read_ps(body(row("m")))
    assert inventory.is_loaded(M)
    assert inventory.is_loaded(N)
    assert not inventory.is_loaded(model_key("o"))


def test_names_of_other_weights_are_not(inventory: Inventory) -> None:
    inventory.read_tags(body(row("m"), row("n")), {"m": "sha256:1", "n": "sha256:2"})
    inventory.read_ps(body(row("m")))
    assert not inventory.is_loaded(N)


def test_models_of_unknown_weights_share_none(inventory: Inventory) -> None:
    inventory.read_tags(body(row("m"), row("n")), {})
    inventory.read_ps(body(row("m")))
    assert inventory.is_loaded(M)
    assert not inventory.is_loaded(N)


def test_a_model_that_just_served_is_in_memory_until_a_list_says_no(inventory: Inventory) -> None:
    empty = body()
    inventory.read_ps(empty)
    inventory.note_loaded(M)
    assert inventory.is_loaded(M)
    assert inventory.loaded[M].raw is None
    assert inventory.read_ps(empty)
    assert not inventory.is_loaded(M)


def test_only_a_listed_model_can_have_served(inventory: Inventory) -> None:
    inventory.note_loaded(model_key("o"))
    assert inventory.loaded == {}


def test_a_list_of_memory_is_not_overwritten_by_a_request(inventory: Inventory) -> None:
    inventory.read_ps(body(row("m")))
    before = inventory.loaded[M]
    inventory.note_loaded(M)
    assert inventory.loaded[M] is before


def test_an_unloaded_model_is_out_of_memory_until_a_list_says_otherwise(
    inventory: Inventory,
) -> None:
    listed = body(row("m"))
    inventory.read_ps(listed)
    inventory.note_unloaded([M, N])
    assert not inventory.is_loaded(M)
    assert inventory.read_ps(listed)
    assert inventory.is_loaded(M)


def test_a_missing_model_is_neither_on_disk_nor_in_memory(inventory: Inventory) -> None:
    tags = inventory.tags
    inventory.read_ps(body(row("m")))
    inventory.note_missing(M)
    inventory.note_missing(M)
    assert M not in inventory.available
    assert M not in inventory.loaded
    assert inventory.read_tags(tags, inventory.blobs)
    assert M in inventory.available


def test_two_contents_of_one_name_differ_by_their_layers(inventory: Inventory) -> None:
    inventory.read_tags(body(row("m")), {}, {"m": "layers"})
    assert inventory.available[M].identity == "layers"
    inventory.read_tags(body(row("m")), {})
    assert inventory.available[M].identity == "digest of m"
