"""Paths as Go's router wants them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_coordinator.api.http.routing import clean_path


@pytest.mark.spec("SURFACE-51")
@pytest.mark.parametrize(
    ("path", "clean"),
    [
        ("//api/chat", "/api/chat"),
        ("/api//tags", "/api/tags"),
        ("/api/./tags", "/api/tags"),
        ("/api/x/../tags", "/api/tags"),
        ("/api/tags//", "/api/tags/"),
        ("/v1/models/..", "/v1"),
        ("/api/.", "/api"),
        ("/..", "/"),
        ("//", "/"),
        ("/../../x/", "/x/"),
        ("/x//y%20z%3f", "/x/y%20z%3f"),
        ("/api/%2e/tags", "/api/%2e/tags"),
    ],
)
def test_a_path_is_cleaned_as_gos_router_does(path: str, clean: str) -> None:
    assert clean_path(path) == clean


@pytest.mark.spec("SURFACE-51")
@given(st.text("/.a").map(lambda text: "/" + text))
def test_a_clean_path_stays_as_it_is_and_is_on_this_host(path: str) -> None:
    clean = clean_path(path)
    assert clean_path(clean) == clean
    assert not clean.startswith("//")
