"""Two clocks and the way between them."""

import time
from datetime import UTC, datetime, timedelta

from ollama_coordinator.clock import Clock


def test_now_is_the_clock_of_the_event_loop() -> None:
    before = time.monotonic()
    assert before <= Clock().now() <= time.monotonic()


def test_a_reading_and_its_utc_time_are_translated_both_ways() -> None:
    clock = Clock()
    now = clock.now()
    assert abs(clock.utc(now) - datetime.now(UTC)) < timedelta(seconds=1)
    assert abs(clock.monotonic(clock.utc(now)) - now) < 0.001
    assert clock.utc(now).tzinfo is UTC


def test_the_translation_keeps_distances() -> None:
    clock = Clock()
    later = clock.utc(100.0) - clock.utc(40.0)
    assert abs(later - timedelta(seconds=60)) < timedelta(milliseconds=1)
    assert clock.monotonic(datetime(1990, 1, 1, tzinfo=UTC)) < 0
