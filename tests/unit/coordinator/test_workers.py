"""Which of several processes is frozen."""

from ctypes import c_ulonglong

import pytest

from ollama_coordinator.workers import SILENT_LOOKS, Beats


@pytest.mark.spec("CLUSTER-10")
def test_a_process_is_frozen_after_so_many_looks_without_a_beat() -> None:
    beats = Beats(c_ulonglong(0))
    assert not any(beats.look() for _ in range(100))  # it starts: there was no beat yet
    beats.count.value += 1
    assert [beats.look() for _ in range(SILENT_LOOKS + 1)] == [False] * SILENT_LOOKS + [True]


@pytest.mark.spec("CLUSTER-10")
def test_a_late_beat_saves_a_process() -> None:
    beats = Beats(c_ulonglong(1))
    for _ in range(3):
        assert not any(beats.look() for _ in range(SILENT_LOOKS))
        beats.count.value += 1
