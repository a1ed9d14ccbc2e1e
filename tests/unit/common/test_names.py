"""Model names: the same model has the same key, however a client spells it."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ollama_coordinator_common.error import ConflictingSource, InvalidModelName
from ollama_coordinator_common.names import ModelName, model_key

FIRST = "[A-Za-z0-9_]"
PART = st.from_regex(rf"{FIRST}[A-Za-z0-9_.-]{{0,20}}", fullmatch=True)
NAMESPACE = st.from_regex(rf"{FIRST}[A-Za-z0-9_-]{{0,20}}", fullmatch=True)
HOST = st.from_regex(rf"{FIRST}[A-Za-z0-9_.:-]{{0,20}}", fullmatch=True)


def places_nowhere(part: str) -> bool:
    """Whether a tag is just a tag, and no wish for a cloud or a local model."""
    return part.lower() not in ("local", "cloud") and not part.lower().endswith("-cloud")


TAG = PART.filter(places_nowhere)
NAMES = st.builds(ModelName, host=HOST, namespace=NAMESPACE, model=PART, tag=TAG)


@pytest.mark.parametrize(
    ("text", "key", "short"),
    [
        ("llama3.2", "registry.ollama.ai/library/llama3.2:latest", "llama3.2:latest"),
        ("  llama3.2:1b\n", "registry.ollama.ai/library/llama3.2:1b", "llama3.2:1b"),
        ("Qwen3:4B", "registry.ollama.ai/library/qwen3:4b", "Qwen3:4B"),
        ("me/mine", "registry.ollama.ai/me/mine:latest", "me/mine:latest"),
        ("Library/x", "registry.ollama.ai/library/x:latest", "x:latest"),
        ("Registry.Ollama.AI/library/x", "registry.ollama.ai/library/x:latest", "x:latest"),
        ("hf.co/a/b:Q4_K_M", "hf.co/a/b:q4_k_m", "hf.co/a/b:Q4_K_M"),
        ("hf.co/library/b", "hf.co/library/b:latest", "hf.co/library/b:latest"),
        ("localhost:5000/a/b:c", "localhost:5000/a/b:c", "localhost:5000/a/b:c"),
        ("http://localhost:5000/a/b", "localhost:5000/a/b:latest", "localhost:5000/a/b:latest"),
        ("_x", "registry.ollama.ai/library/_x:latest", "_x:latest"),
        ("a" * 80, f"registry.ollama.ai/library/{'a' * 80}:latest", f"{'a' * 80}:latest"),
    ],
)
def test_a_name_has_a_key_and_a_short_form(text: str, key: str, short: str) -> None:
    assert ModelName.parse(text).key == model_key(text) == key
    assert ModelName.parse(text).short == short


@pytest.mark.parametrize(
    "text",
    [
        "", " ", ":", "/", "x:", ":latest", "/x", "x/", "a//x", "a/b/c/d", "a b", "x:a:b", "-x",
        ".x", "x:-a", "n.s/x", "x@sha256:0", "ä", "x\0", "x\n/y", "\ud800", "a" * 81,
        f"{'h' * 351}/a/x", "http://x", "http://a/x", "x/y/z://q", "http:///a/x", ":local",
    ],
)  # fmt: skip
def test_what_ollama_does_not_accept_is_no_name(text: str) -> None:
    with pytest.raises(InvalidModelName, match=re.escape("invalid model name")) as caught:
        ModelName.parse(text)
    assert caught.value.text == text


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("x:local", "x"),
        ("x:20b:LOCAL", "x:20b"),
        ("x-cloud:local", "x-cloud"),
        ("gpt-oss:20b:cloud", "gpt-oss:20b-cloud"),
        ("gpt-oss:20b:Cloud", "gpt-oss:20b-cloud"),
        ("h:1/a/x:cloud", "h:1/a/x:cloud"),
    ],
)
def test_where_a_model_is_to_run_is_not_part_of_its_name(text: str, same: str) -> None:
    assert model_key(text) == model_key(same)


@pytest.mark.parametrize(
    "text",
    ["x:local:cloud", "x:cloud:local", "x:b-cloud:local", "x:local:local", "x:b-cloud:cloud"],
)
def test_a_name_cannot_ask_for_two_places(text: str) -> None:
    with pytest.raises(ConflictingSource) as caught:
        ModelName.parse(f" {text} ")
    assert str(caught.value) == f'use either :local or :cloud, not both: "{text}"'


@pytest.mark.parametrize(
    ("text", "in_the_cloud"),
    [
        ("x:cloud", True),
        ("x:7b-CLOUD", True),
        ("x:7b:cloud", True),
        ("x", False),
        ("x-cloud", False),
        ("cloud", False),
        ("x:cloudy", False),
        ("x:cloud-7b", False),
    ],
)
def test_a_tag_tells_of_the_cloud(text: str, in_the_cloud: bool) -> None:
    assert ModelName.parse(text).runs_in_the_cloud is in_the_cloud


@given(NAMES)
def test_the_key_of_a_key_is_the_key(name: ModelName) -> None:
    assert model_key(name.key) == name.key


@given(NAMES)
def test_letter_case_makes_no_other_model(name: ModelName) -> None:
    full = f"{name.host}/{name.namespace}/{name.model}:{name.tag}"
    assert model_key(full.upper()) == model_key(full.lower()) == name.key


@given(NAMES)
def test_the_short_form_is_the_same_name(name: ModelName) -> None:
    again = ModelName.parse(name.short)
    assert again.key == name.key
    assert again.short == name.short


@given(st.text() | st.from_regex(r"[a-z:/.\-_ ]{0,12}(:local|:cloud|-cloud)*", fullmatch=True))
@example("x:cloud:cloud")
@example("x:LOCAL-cloud")
@example("\u0130x:local")
def test_any_text_is_a_name_with_a_stable_key_or_an_invalid_one(text: str) -> None:
    try:
        key = model_key(text)
    except InvalidModelName:
        return
    assert model_key(key) == key
    assert model_key(ModelName.parse(text).short) == key
