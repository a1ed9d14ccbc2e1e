"""The weights behind a name, from Ollama's manifests."""

import hashlib
import json
from pathlib import Path

import pytest

from ollama_coordinator_agent.manifests import read_manifests

WEIGHTS = "sha256:" + "ab" * 32


def manifest(folder: Path, place: str, layers: object) -> str:
    """Write a manifest; returns its digest as `/api/tags` shows it."""
    file = folder / "manifests" / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"layers": layers}))
    return hashlib.sha256(file.read_bytes()).hexdigest()


def layers(digest: str = WEIGHTS) -> list[dict[str, str]]:
    return [
        {"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:" + "00" * 32},
        {"mediaType": "application/vnd.ollama.image.model", "digest": digest},
    ]


@pytest.mark.spec("AGENT-33")
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("llama3.2:latest", "registry.ollama.ai/library/llama3.2/latest"),
        ("me/own:1b", "registry.ollama.ai/me/own/1b"),
        ("hf.co/some/model-GGUF:Q4", "hf.co/some/model-GGUF/Q4"),
    ],
)
def test_the_weights_are_the_model_layer(tmp_path: Path, name: str, place: str) -> None:
    digest = manifest(tmp_path, place, layers())
    assert read_manifests([(name, digest)], [tmp_path], is_certain=False).blobs == {name: WEIGHTS}


@pytest.mark.spec("AGENT-33")
def test_another_stores_manifest_counts_only_where_the_place_is_certain(tmp_path: Path) -> None:
    manifest(tmp_path, "registry.ollama.ai/library/m/latest", layers())
    models = [("m:latest", "another digest")]
    assert read_manifests(models, [tmp_path], is_certain=False).blobs == {}
    assert read_manifests(models, [tmp_path], is_certain=True).blobs == {"m:latest": WEIGHTS}


@pytest.mark.spec("AGENT-33")
def test_the_first_folder_that_fits_counts(tmp_path: Path) -> None:
    manifest(tmp_path / "old", "registry.ollama.ai/library/m/latest", layers("sha256:" + "11" * 32))
    digest = manifest(tmp_path / "used", "registry.ollama.ai/library/m/latest", layers())
    folders = [tmp_path / "none", tmp_path / "old", tmp_path / "used"]
    assert read_manifests([("m:latest", digest)], folders, is_certain=False).blobs == {
        "m:latest": WEIGHTS
    }


@pytest.mark.spec("AGENT-33")
@pytest.mark.parametrize("content", [None, [], "text", [{"digest": 1}]])
def test_what_cannot_be_read_is_left_out(tmp_path: Path, content: object) -> None:
    digest = manifest(tmp_path, "registry.ollama.ai/library/m/latest", content)
    models = [("m:latest", digest), ("gone:latest", ""), ("../../etc:passwd", "")]
    assert read_manifests(models, [tmp_path], is_certain=True).blobs == {}


LAYER = {"mediaType": "application/vnd.ollama.image.model", "digest": WEIGHTS, "size": 3}
SYSTEM = {"mediaType": "application/vnd.ollama.image.system", "digest": "sha256:" + "cd" * 32}
PLACE = "registry.ollama.ai/library/m/latest"


def content(folder: Path, layers: object) -> str:
    manifest(folder, PLACE, layers)
    return read_manifests([("m:latest", "")], [folder], is_certain=True).contents["m:latest"]


@pytest.mark.spec("AGENT-46")
def test_the_content_is_the_layers_whatever_the_manifest_says_beside_them(tmp_path: Path) -> None:
    one = content(tmp_path, [LAYER, SYSTEM])
    created = [{**LAYER, "from": "/home/other/.ollama/models/blobs/sha256-x"}, SYSTEM]
    assert content(tmp_path, created) == one
    assert content(tmp_path, [SYSTEM, LAYER]) == one
    assert content(tmp_path, [LAYER]) != one
    assert content(tmp_path, [LAYER, {**SYSTEM, "digest": WEIGHTS}]) != one
    assert content(tmp_path, [LAYER, {**SYSTEM, "mediaType": "x"}]) != one


@pytest.mark.spec("AGENT-47")
@pytest.mark.parametrize(
    ("file", "size", "fault"),
    [
        ("sha256-" + "ab" * 32, 3, None),
        (WEIGHTS, 3, None),
        ("sha256-" + "ab" * 32, 2, f"its file {WEIGHTS} has 2 bytes in place of 3"),
        ("sha256-" + "00" * 32, 3, f"its file {WEIGHTS} is missing"),
    ],
)
def test_a_model_whose_file_is_missing_or_cut_is_broken(
    tmp_path: Path, file: str, size: int, fault: str | None
) -> None:
    manifest(tmp_path, PLACE, [LAYER])
    # Where the files cannot be seen at all, nothing is said.
    models = [("m:latest", "")]
    assert read_manifests(models, [tmp_path], is_certain=True).broken == {}
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / file).write_bytes(b"x" * size)
    broken = read_manifests(models, [tmp_path], is_certain=True).broken
    told = {} if fault is None else {"m:latest": f"{fault}; pull or create the model again"}
    assert broken == told
