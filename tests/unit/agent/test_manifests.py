"""The weights behind a name, from Ollama's manifests."""

import hashlib
import json
from pathlib import Path

import pytest

from ollama_coordinator_agent.manifests import model_blobs

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
    assert model_blobs([(name, digest)], [tmp_path], is_certain=False) == {name: WEIGHTS}


@pytest.mark.spec("AGENT-33")
def test_another_stores_manifest_counts_only_where_the_place_is_certain(tmp_path: Path) -> None:
    manifest(tmp_path, "registry.ollama.ai/library/m/latest", layers())
    models = [("m:latest", "another digest")]
    assert model_blobs(models, [tmp_path], is_certain=False) == {}
    assert model_blobs(models, [tmp_path], is_certain=True) == {"m:latest": WEIGHTS}


@pytest.mark.spec("AGENT-33")
def test_the_first_folder_that_fits_counts(tmp_path: Path) -> None:
    manifest(tmp_path / "old", "registry.ollama.ai/library/m/latest", layers("sha256:" + "11" * 32))
    digest = manifest(tmp_path / "used", "registry.ollama.ai/library/m/latest", layers())
    folders = [tmp_path / "none", tmp_path / "old", tmp_path / "used"]
    assert model_blobs([("m:latest", digest)], folders, is_certain=False) == {"m:latest": WEIGHTS}


@pytest.mark.spec("AGENT-33")
@pytest.mark.parametrize("content", [None, [], "text", [{"digest": 1}]])
def test_what_cannot_be_read_is_left_out(tmp_path: Path, content: object) -> None:
    digest = manifest(tmp_path, "registry.ollama.ai/library/m/latest", content)
    models = [("m:latest", digest), ("gone:latest", ""), ("../../etc:passwd", "")]
    assert model_blobs(models, [tmp_path], is_certain=True) == {}
